"""Matrices rounded to few bits: which multiples of which scales lose least of the layer's output.

Notation: W (m, n) the matrix, S (m, groups) its scales, H (n, n) the second moment of its inputs. A number of W becomes
a whole number times the scale of its group: all of its row, or so many neighbours in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from panther.sketches import with_ridge
from panther.spec import Grid

RANGES = {8: (-127, 127), 4: (-8, 7), 3: (-4, 3), 2: (-2, 1)}  # by bits; with 8, -128 is left out: signs are alike
CLIPS = tuple(1 - 0.05 * step for step in range(12))  # shares of a group's largest number that are tried as its limit
# Of the mean diagonal of H, so that columns the data hardly showed are rounded by themselves.
RIDGE = 0.01
MOST_FEATURES = 4096  # of a matrix whose inputs are looked at: the factorisation of more takes too long
BLOCK = 128  # columns whose errors are carried over to the others together


@dataclass(frozen=True)
class Rounded:
    """A matrix on a grid: values int8 (m, n), scales (m, groups) in the dtype that they are stored in."""

    values: Tensor
    scales: Tensor
    grid: Grid

    def matrix(self) -> Tensor:
        """What it stands for, (m, n), in the dtype of the scales."""
        return self.values.to(self.scales.dtype) * spread(self.scales, self.values.shape[1], self.grid)


def spread(scales: Tensor, columns: int, grid: Grid) -> Tensor:
    """The scale of every number: (m, groups) -> (m, columns), or (m, 1) where a row has one."""
    size = grid.group_size
    return scales if size is None else scales.repeat_interleave(size, 1)[:, :columns]


def scales_for(matrix: Tensor, grid: Grid, weights: Tensor | None = None) -> Tensor:
    """For each group the scale of least squared error after rounding, of those in CLIPS; 1 for a group of zeros.

    weights: (n,) of the columns' errors; without them all count the same.

    Shapes: matrix (m, n) -> (m, groups), of its dtype.
    """
    m, n = matrix.shape
    size, count = grid.group_size or max(1, n), grid.groups(n)
    low, high = RANGES[grid.bits]
    pad = (0, size * count - n)
    groups = torch.nn.functional.pad(matrix, pad).reshape(m, count, size)
    counted = matrix.new_ones(n) if weights is None else weights.to(matrix)
    counted = torch.nn.functional.pad(counted, pad).reshape(count, size)
    largest = groups.abs().amax(-1)
    best, found = torch.full_like(largest, torch.inf), torch.ones_like(largest)
    for clip in CLIPS:
        scale = (clip / high * largest).clamp_min(torch.finfo(matrix.dtype).tiny)
        step = scale.unsqueeze(-1)
        error = ((groups / step).round_().clamp_(low, high).mul_(step) - groups).square_().mul_(counted).sum(-1)
        is_better = error < best
        best, found = torch.where(is_better, error, best), torch.where(is_better, scale, found)
    return torch.where(largest > 0, found, 1.0)


def to_nearest(matrix: Tensor, grid: Grid, weights: Tensor | None = None, dtype: torch.dtype | None = None) -> Rounded:
    """Each number to the nearest multiple of its scale, which `scales_for` chooses.

    dtype: of the scales as they are stored; the matrix's own unless it is given.
    """
    scales = _storable(scales_for(matrix, grid, weights), dtype or matrix.dtype)
    steps = spread(scales.to(matrix.dtype), matrix.shape[1], grid)
    return Rounded((matrix / steps).round_().clamp_(*RANGES[grid.bits]).to(torch.int8), scales, grid)


def in_data_norm(matrix: Tensor, moment: Tensor, grid: Grid, dtype: torch.dtype | None = None) -> Rounded:
    """Rounded such that the error of the outputs is small, not that of the numbers: column after column, each error
    made up for by the columns that are still to come.

    moment: H (n, n), the second moment of the inputs. The columns of the largest inputs are rounded first.

    Cost:   m n^2 multiply-adds, and a factorisation of H.
    Raises: torch.linalg.LinAlgError when H is not finite.
    Source: OPTQ/GPTQ (arXiv 2210.17323), with scales chosen beforehand.
    """
    wide = matrix.double()
    diagonal = moment.diagonal()
    if not bool(diagonal.sum() > 0):
        return to_nearest(matrix, grid, dtype=dtype)
    scales = _storable(scales_for(wide, grid, diagonal), dtype or matrix.dtype)
    order = diagonal.argsort(descending=True)
    steps = spread(scales.double(), wide.shape[1], grid).expand_as(wide)[:, order]
    given = wide[:, order].contiguous()
    lower = with_ridge(moment.double()[order][:, order], RIDGE)
    carry = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    values, (low, high) = torch.empty_like(given), RANGES[grid.bits]
    for first in range(0, given.shape[1], BLOCK):
        last = min(first + BLOCK, given.shape[1])
        errors = given.new_empty(len(given), last - first)
        for column in range(first, last):
            step = steps[:, column]
            value = (given[:, column] / step).round_().clamp_(low, high)
            values[:, column] = value
            error = (given[:, column] - value * step) / carry[column, column]
            errors[:, column - first] = error
            given[:, column + 1 : last].addr_(error, carry[column, column + 1 : last], alpha=-1)
        given[:, last:].addmm_(errors, carry[first:last, last:], alpha=-1)
    return Rounded(values[:, order.argsort()].to(torch.int8), scales, grid)


def balanced(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The two links of a chain with the same product, and columns of equal norm in the second.

    A row of the first has a scale of its own, whatever its size; the columns of the second share theirs. Query of
    MiniLM's fourth layer at rank 96, 4 bits, share of the output energy lost: .063 before rounding, .073 after it; .075
    where both links have the roots of the singular values, .108 where the second has all of them.

    Shapes: down (r, ...), up (m, r, ...).
    """
    norms = up.transpose(0, 1).flatten(1).norm(dim=1)
    size = torch.where(norms > 0, norms, 1.0)
    rest = (1,) * (up.dim() - 2)
    return down * size.reshape(-1, *(1,) * (down.dim() - 1)), up / size.reshape(1, -1, *rest)


def _storable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as they are stored: never zero, so that no number is divided by it."""
    stored = scales.to(dtype)
    return torch.where(stored > 0, stored, torch.finfo(dtype).tiny)


def lost(matrix: Tensor, stands_for_it: Tensor, moment: Tensor | None, sensitivity: Tensor | None = None) -> float:
    """Share of the output energy that a stand-in for a matrix loses: tr(G E H E^T) / tr(G W H W^T); 0 to 1.

    What is unknown is the identity: the share of the numbers' own energy without H.
    """

    def energy(of: Tensor) -> Tensor:
        wide = of.double()
        through = wide if moment is None else wide @ moment.double()
        if sensitivity is not None:
            through = sensitivity.double() @ through
        return (through * wide).sum()

    whole = float(energy(matrix))
    return min(1.0, max(0.0, float(energy(matrix - stands_for_it)) / whole)) if whole > 0 else 0.0
