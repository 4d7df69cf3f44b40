"""What a study's trials say: as rows of numbers, as a data frame, and which parameters its scores depend on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from panther.errors import TunerError
from panther.tuner.backends.base import clipped
from panther.tuner.space import Category, Space
from panther.tuner.trial import Goal, Params, Trial, best_of

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, float]
Array = NDArray[np.float64]

METHOD = "variance shares (Sobol') of a Gaussian process fitted to the trials"
FEWEST = 5  # trials that a fit needs
MOST = 400  # trials that are fitted, since the time grows with their cube
DRAWS = 1024  # points that the shares are averaged over: they come out within 0.03


@dataclass(frozen=True)
class Importance:
    """How much of the variation of a score over the whole box is due to each parameter, the largest share first.

    `shares` counts what a parameter does alone and together with others, so they may add up to more than 1; `alone`
    leaves the interactions out. Both describe the fitted function: `fit` is the share of variance that it predicts for
    trials left out, and near 0 or below the shares mean nothing.
    """

    method: str
    goal: str
    shares: dict[str, float]
    alone: dict[str, float]
    fit: float
    trials: int

    def __str__(self) -> str:
        width = max(map(len, self.shares))
        lines = [f"importance for {self.goal}: {self.method}"]
        lines += [f"  {n:<{width}} {share:4.2f} (alone {self.alone[n]:4.2f})" for n, share in self.shares.items()]
        trust = "" if self.fit > 0.3 else ": too little to trust the shares"
        return "\n".join([*lines, f"the fit predicts {self.fit:.2f} of the variance of {self.trials} trials{trust}"])


# --- tables


def rows(trials: Sequence[Trial], space: Space) -> list[Row]:
    """One flat row of numbers a trial: each parameter (a category as its place in the list), scores, seconds, trial.

    A trial without scores has none in its row, which a data frame shows as NaN.
    """
    return [_numeric(t.params, space) | t.scores | {"seconds": t.seconds, "trial": float(t.number)} for t in trials]


def _numeric(params: Params, space: Space) -> Row:
    found = {}
    for name, parameter in space.parameters.items():
        value = params[name]
        if not isinstance(parameter, Category):
            found[name] = value
        elif parameter.contains(value):
            found[name] = parameter.place(value)
    return found


def data_frame(trials: Sequence[Trial], space: Space, goals: Sequence[Goal]) -> pd.DataFrame:
    """A row a trial, in order of suggestion: parameters as they are, scores, seconds, memory, trial, phase, status."""
    pd = _pandas()
    scored = dict.fromkeys([*(goal.name for goal in goals), *(name for trial in trials for name in trial.scores)])
    columns = {name: [trial.params[name] for trial in trials] for name in space.parameters}
    columns |= {name: [trial.scores.get(name, math.nan) for trial in trials] for name in scored}
    columns["seconds"] = [trial.seconds for trial in trials]
    if "memory_gb" not in columns:  # which may be what is optimised
        columns["memory_gb"] = [math.nan if trial.memory_gb is None else trial.memory_gb for trial in trials]
    for column, field in {"trial": "number", "phase": "phase", "status": "status", "error": "error"}.items():
        columns[column] = [getattr(trial, field) for trial in trials]
    return pd.DataFrame(columns)


def correlations(trials: Sequence[Trial], space: Space, goals: Sequence[Goal]) -> pd.DataFrame:
    """Pearson's correlation of each pair of columns of `rows`; infinite scores are left out.

    It sees straight lines only: for anything else ask `importance`. A column that does not vary has NaN.
    """
    pd = _pandas()
    wanted = [*space.parameters, *(goal.name for goal in goals), "seconds", "trial"]
    frame = pd.DataFrame(rows(trials, space)).reindex(columns=wanted).astype(float)
    return frame.replace([math.inf, -math.inf], math.nan).corr()


def _pandas() -> Any:
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError(
            "data frames need pandas; type: python -m pip install pandas (get_evaluation_history() does without)"
        ) from error
    return pd


# --- what the model expects


def expected_best(trials: Sequence[Trial], space: Space, goal: Goal) -> Trial | None:
    """The trial where a Gaussian process fitted to all finite scores is highest, among those that may win.

    Scores far below the others count as less far. With fewer than five, or equal ones, it is the best observed.
    """
    from panther.tuner.surrogate import fit

    able = [trial for trial in trials if trial.is_feasible and math.isfinite(trial.scores[goal.name])]
    able = sorted(_within(able, space), key=lambda trial: -goal.gain(trial.scores))[:MOST]
    gains = np.array([goal.gain(trial.scores) for trial in able])
    if len(able) < FEWEST or not _vary(gains):
        return best_of(trials, goal)
    points = space.encode([trial.params for trial in able])
    return able[int(np.argmax(fit(points, clipped(gains), _blocks(space))(points)))]


def _within(trials: Sequence[Trial], space: Space) -> list[Trial]:
    """Those in the box, as it may have been another one when they were made."""
    return [trial for trial in trials if all(p.contains(trial.params[n]) for n, p in space.parameters.items())]


def _vary(scores: Array) -> bool:
    return bool(np.ptp(scores) > 1e-12 * np.abs(scores).max())


# --- importance


def goal_of(goals: Sequence[Goal], name: str | None) -> Goal:
    """The goal of that name; the first for None."""
    found = {goal.name: goal for goal in goals}
    if name is not None and name not in found:
        raise ValueError(f"goal={name!r}: expected one of {', '.join(map(repr, found))}")
    return goals[0] if name is None else found[name]


def importance(trials: Sequence[Trial], space: Space, goals: Sequence[Goal], goal: str | None = None) -> Importance:
    """Which parameters one goal's score (the first goal's, unless named) depends on, over the whole box.

    Known constraints are left out of account: where they cut off much of the box, the shares describe also that part.

    Raises: TunerError with fewer than five finite scores.
    """
    name = goal_of(goals, goal).name
    used = [trial for trial in trials if math.isfinite(trial.scores.get(name, math.nan))]
    used = _within(used, space)
    if len(used) < FEWEST:
        raise TunerError(
            f"importance needs at least {FEWEST} trials with a finite {name!r}; this study has {len(used)}"
        )
    used = used[:: math.ceil(len(used) / MOST)]
    scores = np.array([trial.scores[name] for trial in used])
    shares, alone, fitted = _shares([trial.params for trial in used], scores, space)
    order = sorted(shares, key=lambda parameter: -shares[parameter])
    return Importance(METHOD, name, {n: shares[n] for n in order}, {n: alone[n] for n in order}, fitted, len(used))


def _shares(points: list[Params], scores: Array, space: Space) -> tuple[Row, Row, float]:
    """Of each parameter: its share of the variance with interactions, and without; and how well the fit predicts.

    Source: Saltelli et al., Computer Physics Communications 181 (2010), formulas (b) and (f) of table 2.
    """
    from panther.tuner.surrogate import fit

    nothing = dict.fromkeys(space.parameters, 0.0)
    if not _vary(scores):
        return nothing, dict(nothing), 0.0
    surrogate = fit(space.encode(points), scores, _blocks(space))
    left, right = _draws(len(space.parameters))
    at_left, at_right = (surrogate(space.encode(list(map(space.at, u)))) for u in (left, right))
    variance = float(np.concatenate([at_left, at_right]).var())
    centred = at_right - at_right.mean()  # the mean takes no part in (b), and only adds noise to it
    if variance <= 1e-12 * float(scores.var()):
        return nothing, dict(nothing), surrogate.fit
    shares, alone = {}, {}
    for place, name in enumerate(space.parameters):
        mixed = left.copy()
        mixed[:, place] = right[:, place]
        at_mixed = surrogate(space.encode(list(map(space.at, mixed))))
        shares[name] = min(float(((at_left - at_mixed) ** 2).mean()) / 2 / variance, 1.0)
        first = float((centred * (at_mixed - at_left)).mean()) / variance
        alone[name] = min(max(first, 0.0), shares[name])
    return shares, alone, surrogate.fit


def _blocks(space: Space) -> list[int]:
    return [p.count if isinstance(p, Category) else 1 for p in space.parameters.values()]


def _draws(count: int) -> tuple[Array, Array]:
    """Two sets of points in the unit cube, spread evenly over the cube of both: the same in every call."""
    from scipy.stats.qmc import Sobol

    # Shifted instead of scrambled: the argument that makes scrambling repeatable has another name in older SciPy.
    both = (Sobol(2 * count, scramble=False).random(DRAWS) + np.random.default_rng(0).random(2 * count)) % 1
    return both[:, :count], both[:, count:]
