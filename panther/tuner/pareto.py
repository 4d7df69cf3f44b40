"""The front of several goals, one point of it to begin with, and the volume that it covers.

Gains are scores with the sign that makes more of them better: an array (n, d) of n trials and d goals.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from panther.tuner.trial import Goal, Trial

Gains = NDArray[np.float64]


def gains_of(trials: Sequence[Trial], goals: Sequence[Goal]) -> Gains:
    """(n, d); the trials must have scores."""
    rows = [[goal.gain(trial.scores) for goal in goals] for trial in trials]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(goals))


def is_dominated(gains: Gains) -> NDArray[np.bool_]:
    """(n,): whether another point is at least as good in every goal and better in one; equal points are not."""
    no_worse = (gains[None] >= gains[:, None]).all(-1)  # [i, j]: j is no worse than i
    better = (gains[None] > gains[:, None]).any(-1)
    return np.asarray((no_worse & better).any(-1), dtype=np.bool_)


def front(trials: Sequence[Trial], goals: Sequence[Goal]) -> list[Trial]:
    """The feasible trials that no other beats in every goal, the best of the first goal first."""
    feasible = [trial for trial in trials if trial.is_feasible]
    beaten = is_dominated(gains_of(feasible, goals))
    kept = [trial for trial, out in zip(feasible, beaten, strict=True) if not out]
    return sorted(kept, key=lambda trial: [-goal.gain(trial.scores) for goal in goals])


def knee(trials: Sequence[Trial], goals: Sequence[Goal]) -> Trial | None:
    """The point of the front where giving up more of one goal stops paying in the others; None without a front.

    With each goal scaled to run from 0 to 1 along the front, it is the point farthest beyond the plane through the
    ends (in two dimensions, their chord). Where nothing lies beyond it, the best of the first goal. Infinite scores
    have no distance: a point that has one is taken only where all have.
    """
    best = front(trials, goals)
    finite = [trial for trial in best if np.isfinite(gains_of([trial], goals)).all()]
    if not finite:
        return best[0] if best else None
    gains = gains_of(finite, goals)
    low, high = gains.min(0), gains.max(0)
    heights = ((gains - low) / np.where(high > low, high - low, 1.0)).sum(1)
    # Equal up to rounding is equal: the two ends of a chord are at the same distance of zero.
    return finite[int(np.argmax(heights >= heights.max() - 1e-9))]


def hypervolume(gains: ArrayLike, reference: ArrayLike) -> float:
    """The volume between the points and the reference that is worse than all of them; points not beyond it add none.

    Exact for any number of goals.

    Shapes: gains (n, d), reference (d,).
    Cost:   n log n for two goals, times n for every further one.
    Raises: ValueError for NaN, an infinite reference, or shapes that do not fit.
    """
    points, corner = np.asarray(gains, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if corner.ndim != 1 or not corner.size or not np.isfinite(corner).all():
        raise ValueError(f"hypervolume(reference={reference!r}): expected one finite number for each goal")
    if points.size == 0:
        return 0.0
    if points.ndim != 2 or points.shape[1] != corner.size:
        raise ValueError(f"hypervolume: gains of shape {points.shape} do not fit a reference of {corner.size} goals")
    if np.isnan(points).any():
        raise ValueError("hypervolume: a gain is NaN, which is neither better nor worse than anything")
    return _volume(points[(points > corner).all(1)], corner)


def _volume(points: Gains, corner: Gains) -> float:
    """Of points that are all beyond the corner: slabs along the last goal, each as deep as to the next level."""
    if not len(points):
        return 0.0
    if points.shape[1] == 1:
        return float(points.max() - corner[0])
    points = points[~is_dominated(points)]
    if points.shape[1] == 2:
        return _area(points, corner)
    levels = np.unique(points[:, -1])[::-1]
    depths = levels - np.append(levels[1:], corner[-1])
    slabs = [
        depth * _volume(points[points[:, -1] >= level, :-1], corner[:-1])
        for level, depth in zip(levels, depths, strict=True)
    ]
    return float(sum(slabs))


def _area(points: Gains, corner: Gains) -> float:
    """A staircase: from the widest point on, each adds what it is higher than those before."""
    area, height = 0.0, float(corner[1])
    for x, y in points[np.lexsort((points[:, 1], points[:, 0]))[::-1]].tolist():
        if y > height:
            area += (x - float(corner[0])) * (y - height)
            height = y
    return area
