"""Which back end asks when: a strategy is a way through a number of trials, by the place of the next one.

Only that place and what was told decide, so that a resumed study goes the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from panther.errors import TunerError
from panther.tuner.backends import BACKENDS, Question
from panther.tuner.backends.base import known_trials, losses
from panther.tuner.trial import Params

REFINED_SHARE = 0.25  # of each range: what "progressive" searches around the best point in the end


@dataclass(frozen=True)
class Strategy:
    """A way through `initial` + `iterations` trials, by a name of STRATEGIES."""

    name: str
    initial: int
    iterations: int

    def __post_init__(self) -> None:
        if self.name not in STRATEGIES:
            raise ValueError(f"the strategy must be one of {', '.join(map(repr, STRATEGIES))}, not {self.name!r}")
        if self.initial < 0 or self.iterations < 0:
            raise ValueError(
                f"a number of trials cannot be negative: {self.initial} initial and {self.iterations} more"
            )


def ask(strategy: Strategy, question: Question) -> tuple[list[Params], str]:
    """The next points, and the phase of the search that they belong to.

    A batch belongs as a whole to the phase of its first point.
    """
    return STRATEGIES[strategy.name](strategy, question)


def _auto(strategy: Strategy, question: Question) -> tuple[list[Params], str]:
    """Points all over the box, and the model's choice from there on.

    No TPE in between: on nine noisy functions with six seeds, three points by it in 25 raised the regret by a fifth.
    """
    phase = "initial" if question.number < strategy.initial else "gp"
    return BACKENDS["spread" if phase == "initial" else "gp"](question), phase


def _progressive(strategy: Strategy, question: Question) -> tuple[list[Params], str]:
    """The whole box by TPE with half of the iterations, then a part of it around the best point by the model."""
    half = strategy.iterations // 2
    if question.number < strategy.initial + half:
        return BACKENDS["spread" if question.number < strategy.initial else "tpe"](question), "broad"
    trials = known_trials(question)
    loss = losses(question, trials)
    if not trials or min(loss) == float("inf"):
        return BACKENDS["spread"](question), "broad"
    best = trials[loss.index(min(loss))].params
    part = replace(question, space=question.space.narrowed(best, REFINED_SHARE))
    # Where the part has no new points left, the model chooses among all others.
    try:
        points = BACKENDS["gp"](part)
    except TunerError:  # the best point was given, and the constraints allow none of those around it
        points = []
    if len(points) < question.count:
        rest = replace(question, count=question.count - len(points), pending=[*question.pending, *points])
        points += BACKENDS["gp"](rest)
    return points, "refined"


def _single(backend: str, first: str) -> Callable[[Strategy, Question], tuple[list[Params], str]]:
    """One back end for all trials but the initial ones."""

    def ask_one(strategy: Strategy, question: Question) -> tuple[list[Params], str]:
        if question.number < strategy.initial:
            return BACKENDS[first](question), "initial"
        return BACKENDS[backend](question), backend

    return ask_one


STRATEGIES: dict[str, Callable[[Strategy, Question], tuple[list[Params], str]]] = {
    "auto": _auto,
    "progressive": _progressive,
    "random": _single("random", "random"),
    "tpe": _single("tpe", "random"),
    "gp": _auto,
}
