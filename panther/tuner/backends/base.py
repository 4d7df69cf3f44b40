"""What a back end is asked, and what all of them need: the points already taken, and trials as numbers.

A back end keeps nothing between two questions. All it knows is in the question, so that a study that was read back
from its journal goes on with the points that it would have asked for anyway.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch.quasirandom import SobolEngine

from panther.errors import ExhaustedError
from panther.tuner.space import Category, Key, Space
from panther.tuner.trial import Goal, Limit, Params, Trial

Numbers = NDArray[np.float64]

FAR = 3.0  # interquartile ranges beyond the quartiles: what lies further counts as this far


@dataclass(frozen=True)
class Question:
    """Which points to evaluate next, given all that is known."""

    space: Space
    goals: tuple[Goal, ...]
    limits: tuple[Limit, ...]  # observed constraints
    trials: Sequence[Trial]  # told, in order of suggestion
    pending: Sequence[Params]  # asked for, not told yet
    count: int  # how many points are wanted
    seed: int
    number: int  # of the first point wanted

    def rng(self) -> np.random.Generator:
        """The only source of randomness: the same for the same place in the same study."""
        return np.random.default_rng([self.seed, self.number])


Ask = Callable[[Question], list[Params]]  # as many new points as are wanted, fewer where the box has no more


def taken(question: Question) -> set[Key]:
    """The keys of the points that are not to be asked for again."""
    points = [trial.params for trial in question.trials] + list(question.pending)
    return {question.space.key(params) for params in points if is_known(question.space, params)}


def filled(question: Question, points: Sequence[Params], rng: np.random.Generator) -> list[Params]:
    """The new ones of the points and, up to the number wanted, points drawn at random."""
    avoid = taken(question)
    answer: list[Params] = []
    for params in points:
        key = question.space.key(params)
        if key not in avoid and len(answer) < question.count:
            avoid.add(key)
            answer.append(params)
    while len(answer) < question.count:
        try:
            params = question.space.sample(rng, avoid)
        except ExhaustedError:
            break
        avoid.add(question.space.key(params))
        answer.append(params)
    return answer


def evenly(columns: int, count: int, seed: int) -> list[list[float]]:
    """At least so many places of the unit cube, more even than drawn ones; the first of them alone are so too."""
    engine = SobolEngine(columns, scramble=True, seed=seed)
    # A power of two: only then has each half of a range equally many of them.
    places: list[list[float]] = engine.draw(2 ** (count - 1).bit_length(), dtype=torch.float64).tolist()
    return places


def is_known(space: Space, params: Params) -> bool:
    """Whether a point has all parameters, and no category that the space lacks; it may lie outside of the box."""
    return params.keys() == space.parameters.keys() and all(
        parameter.contains(params[name])
        if isinstance(parameter, Category)
        else isinstance(params[name], (int, float)) and np.isfinite(params[name])
        for name, parameter in space.parameters.items()
    )


def known_trials(question: Question) -> list[Trial]:
    """The trials that tell something about this space."""
    return [trial for trial in question.trials if is_known(question.space, trial.params)]


def has_all_scores(question: Question, trial: Trial) -> bool:
    return all(goal.name in trial.scores for goal in question.goals)


def excess(limit: Limit, trial: Trial) -> float:
    """How far a trial is beyond a limit, in the limit's own unit; 0 or less within it, infinite where unknown."""
    if limit.name not in trial.scores:
        return np.inf
    value = trial.scores[limit.name]
    return value - limit.bound if limit.is_upper else limit.bound - value


def ranks(values: Sequence[float]) -> Numbers:
    """The place of each number in rising order as a share; equal numbers, infinite ones too, share a place."""
    order = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True)[1]
    return order / max(int(order.max(initial=0)), 1)


def losses(question: Question, trials: Sequence[Trial]) -> list[float]:
    """One number a trial whose order says which are better: less is better, infinite without scores.

    Trials beyond a limit come after all within, the furthest last. Several goals are joined by the worst of their
    weighted ranks, with weights drawn anew for each question, so that in time the whole front is looked for.
    """
    scored = [trial for trial in trials if has_all_scores(question, trial)]
    if not scored:
        return [np.inf] * len(trials)
    weights = question.rng().dirichlet(np.ones(len(question.goals)))
    columns = [ranks([-goal.gain(trial.scores) for trial in scored]) for goal in question.goals]
    loss = np.max([weight * column for weight, column in zip(weights, columns, strict=True)], axis=0)
    beyond = np.zeros(len(scored))
    for limit in question.limits:
        beyond += ranks([max(excess(limit, trial), 0.0) for trial in scored])
    broken = [any(excess(limit, trial) > 0 for limit in question.limits) for trial in scored]
    found = iter(np.where(broken, 1 + beyond, loss).tolist())
    return [next(found) if has_all_scores(question, trial) else np.inf for trial in trials]


def clipped(column: Numbers) -> Numbers:
    """Numbers as they are, those far off the quartiles brought near, and infinite ones with them."""
    finite = column[np.isfinite(column)]
    if not len(finite):
        return np.nan_to_num(column, posinf=1.0, neginf=-1.0)
    low, high = np.quantile(finite, [0.25, 0.75])
    far = FAR * (high - low) or np.abs(finite).max() or 1.0
    return np.clip(column, max(low - far, finite.min()), min(high + far, finite.max()))


@cache
def warn_missing(package: str, what: str, instead: str) -> None:
    """Say once that an optional package is not there, what that costs, and what to install."""
    warnings.warn(
        f"{package} is not installed, so that the search goes on {instead} instead of {what}, and will need more "
        f"trials for the same result. Install it with: pip install {package}",
        UserWarning,
        stacklevel=2,
    )
