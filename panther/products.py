"""The product of rows with themselves: half of it is known by symmetry."""

from __future__ import annotations

from torch import Tensor

BLOCK = 256  # columns that are multiplied at once, with all columns before them


def gram(rows: Tensor) -> Tensor:
    """rows^T rows: with many features little more than half of the multiplications of the plain product.

    Shapes: rows (count, n) -> (n, n).
    """
    n = rows.shape[1]
    if n < 2 * BLOCK:
        return rows.T @ rows
    result = rows.new_empty(n, n)
    for first in range(0, n, BLOCK):
        last = min(first + BLOCK, n)
        below = rows[:, first:last].T @ rows[:, :last]
        result[first:last, :last] = below
        result[:first, first:last] = below[:, :first].T
    return result
