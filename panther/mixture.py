"""The linear program of a layer's choices: how much of each is taken where they may be mixed. Numbers only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

LEAST_SHARE = 1e-6  # of a choice that counts as taken; the program is solved to about a tenth of this

Matrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]


def mixture(
    costs: Sequence[Sequence[Sequence[float]]], losses: Sequence[Sequence[float]], most: float
) -> list[list[int]] | None:
    """Which choices of each layer the mixture of least loss takes; None where none is within the limits.

    No more layers take several than there are limits.

    costs: for each layer, for each of its choices, what it uses of each limit, as parts of it. losses: of the same
    choices; those above `most`, a total that is known to be possible, or infinite are not looked at.
    """
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    if not losses:
        return []
    kept: list[list[int]] = []
    amounts: list[Matrix] = []
    for cost, loss in zip(costs, losses, strict=True):
        points = np.column_stack((np.asarray(cost, dtype=float), np.asarray(loss, dtype=float)))
        useful = [i for i in undominated(points) if points[i, -1] <= most and points[i, -1] < math.inf]
        kept.append(useful)
        amounts.append(points[useful])
    if not all(kept):
        return None
    every, sizes = np.concatenate(amounts), [len(useful) for useful in kept]
    layers = np.repeat(np.arange(len(kept)), sizes)
    unit = most if 0 < most < math.inf else max(float(every[:, -1].max()), 1e-300)
    found = linprog(
        every[:, -1] / unit,
        A_ub=every[:, :-1].T,
        b_ub=np.ones(every.shape[1] - 1),
        A_eq=csr_array((np.ones(len(every)), (layers, np.arange(len(every))))),
        b_eq=np.ones(len(kept)),
        bounds=(0, 1),
        method="highs",
    )
    if found.x is None:
        return None
    shares = np.split(found.x, np.cumsum(sizes)[:-1])
    return [
        [i for i, share in zip(useful, part, strict=True) if share > LEAST_SHARE]
        for useful, part in zip(kept, shares, strict=True)
    ]


def undominated(points: Matrix) -> list[int]:
    """Rows that no other row is at or below in every column; of equal ones the first."""
    front = np.empty_like(points)
    places: list[int] = []
    for place in np.lexsort(points.T[::-1]):  # in this order no row is at or below an earlier one that differs
        if not (front[: len(places)] <= points[place]).all(1).any():
            front[len(places)] = points[place]
            places.append(int(place))
    return sorted(places)
