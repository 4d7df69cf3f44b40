"""Points evenly over the box: the first look at it."""

from __future__ import annotations

from panther.tuner.backends.base import Question, evenly, filled
from panther.tuner.trial import Params

AHEAD = 64  # points of the sequence looked at for the next one, at least: constraints drop some of them


def spread(question: Question) -> list[Params]:
    """The next points of one sequence for the whole study, which fills the box more evenly than drawn points do."""
    space = question.space
    length = max(AHEAD, 4 * (question.number + question.count))
    places = evenly(len(space.parameters), length, question.seed)
    points = {space.key(p): p for p in map(space.at, places) if space.is_allowed(p)}
    order = list(points.values())
    return filled(question, order[question.number :] + order[: question.number], question.rng())
