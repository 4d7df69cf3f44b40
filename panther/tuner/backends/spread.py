"""Points far from each other and from all that was tried: the first look at a box."""

from __future__ import annotations

import numpy as np

from panther.errors import ExhaustedError
from panther.tuner.backends.base import Question, is_known, taken
from panther.tuner.trial import Params

# Drawn for each point. The more, the closer it gets to the sides of the box, where little is learned.
DRAWN = 24


def spread(question: Question) -> list[Params]:
    """Of a few points drawn evenly, the one farthest from all others; then the next."""
    space, rng = question.space, question.rng()
    avoid = taken(question)
    others = [t.params for t in question.trials if is_known(space, t.params)]
    others += [params for params in question.pending if is_known(space, params)]
    answer: list[Params] = []
    while len(answer) < question.count:
        drawn: dict[object, Params] = {}
        try:
            for _ in range(DRAWN):
                params = space.sample(rng, avoid)
                drawn[space.key(params)] = params
        except ExhaustedError:
            break
        places = space.encode(list(drawn.values()))
        if others or answer:
            gaps = np.abs(places[:, None, :] - space.encode(others + answer)[None, :, :])
            distance = np.sqrt((gaps**2).sum(-1)).min(1)
        else:
            distance = -np.abs(places - 0.5).max(1)
        params = list(drawn.values())[int(distance.argmax())]
        avoid.add(space.key(params))
        answer.append(params)
    return answer
