"""The product of rows with themselves: half of it is known by symmetry."""

from __future__ import annotations

from torch import Tensor

BLOCK = 192  # columns that are multiplied at once, with all columns before them


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
        result[first:last, :last] = rows[:, first:last].T @ rows[:, :last]
    return mirrored(result)


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add rows^T rows to what is on and below the diagonal of `total`, and anything above it: see `mirrored`.

    Shapes: total (n, n), of any precision; rows (count, n).
    """
    n = rows.shape[1]
    width = BLOCK if n >= 2 * BLOCK else max(1, n)
    for first in range(0, n, width):
        last = min(first + width, n)
        total[first:last, :last] += rows[:, first:last].T @ rows[:, :last]


def mirrored(matrix: Tensor) -> Tensor:
    """The symmetric matrix that is as this one on and below the diagonal; in place."""
    n = len(matrix)
    for first in range(0, n, BLOCK):
        last = min(first + BLOCK, n)
        matrix[:first, first:last] = matrix[first:last, :first].T
    return matrix
