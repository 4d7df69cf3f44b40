"""Points drawn evenly: what every other search has to beat."""

from __future__ import annotations

from panther.tuner.backends.base import Question, filled
from panther.tuner.trial import Params


def random(question: Question) -> list[Params]:
    """Points drawn evenly among those allowed and new, whatever the trials say."""
    return filled(question, [], question.rng())
