"""Matrices rounded to few bits: which multiples of which scales lose least of the layer's output.

Notation: W (m, n) the matrix, S (m, groups) its scales, H (n, n) the second moment of its inputs. A number of W becomes
a whole number times the scale of its group: all of its row, or so many neighbours in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from panther.sketches import with_ridge
from panther.spec import BITS, Grid

RANGES = {8: (-127, 127), 4: (-8, 7), 3: (-4, 3), 2: (-2, 1)}  # by bits; with 8, -128 is left out: signs are alike
CLIPS = tuple(1 - 0.05 * step for step in range(12))  # shares of a group's largest number that are tried as its limit
# Of the mean diagonal of H, so that columns the data hardly showed are rounded by themselves.
RIDGE = 0.01
MOST_FEATURES = 4096  # of a matrix whose inputs are looked at: the factorisation of more takes too long
TAME = 0.25  # 0 and .5 are the best for weights of 4 bits and for what comes between; this is near both
LEAST_INDEPENDENT = 1e-4  # pivots of a Cholesky factor by the largest: its rows are then orthonormal to some 1e-8
LARGEST_IN_BOTH = 65280.0  # of bfloat16 and of float16
BLOCK = 128  # columns whose errors are carried over to the others together


@dataclass(frozen=True)
class Rounded:
    """A matrix on a grid: values int8 (m, n), scales (m, groups) as they are stored, in the matrix's dtype.

    Of bfloat16 the values are int16, the bits of the numbers, and there are no scales (m, 0).
    """

    values: Tensor
    scales: Tensor
    grid: Grid

    def matrix(self) -> Tensor:
        """What it stands for, (m, n), in the dtype of the scales."""
        if self.grid.is_bfloat16:
            return self.values.view(torch.bfloat16).to(self.scales.dtype)
        return self.values.to(self.scales.dtype) * spread(self.scales, self.values.shape[1], self.grid)


def spread(scales: Tensor, columns: int, grid: Grid) -> Tensor:
    """The scale of every number: (m, groups) -> (m, columns), or (m, 1) where a row has one."""
    size = grid.group_size
    return scales if size is None else scales.repeat_interleave(size, 1)[:, :columns]


def scales_for(matrix: Tensor, grid: Grid, weights: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """For each group the scale of least squared error after rounding, of those in CLIPS; 1 for a group of zeros.

    weights: (n,) of the columns' errors; without them all count the same.
    dtype: of the layer. Scales have the digits of bfloat16, or of float16 in a layer of that: two bytes in a file.

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
        scale = _storable(clip / high * largest, dtype)
        step = scale.unsqueeze(-1)
        error = ((groups / step).round_().clamp_(low, high).mul_(step) - groups).square_().mul_(counted).sum(-1)
        is_better = error < best
        best, found = torch.where(is_better, error, best), torch.where(is_better, scale, found)
    return torch.where(largest > 0, found, 1.0)


def to_nearest(matrix: Tensor, grid: Grid, weights: Tensor | None = None, dtype: torch.dtype | None = None) -> Rounded:
    """Each number to the nearest multiple of its scale, which `scales_for` chooses.

    dtype: of the scales as they are stored; the matrix's own unless it is given.
    """
    dtype = dtype or matrix.dtype
    if grid.is_bfloat16:
        return as_bfloat16(matrix, dtype)
    scales = scales_for(matrix, grid, weights, dtype).to(dtype)
    steps = spread(scales.to(matrix.dtype), matrix.shape[1], grid)
    return Rounded((matrix / steps).round_().clamp_(*RANGES[grid.bits]).to(torch.int8), scales, grid)


def as_bfloat16(matrix: Tensor, dtype: torch.dtype) -> Rounded:
    """Each number to the nearest of bfloat16 that is none too large for a dtype; what is finite stays so."""
    largest = torch.finfo(torch.bfloat16).max if dtype != torch.float16 else LARGEST_IN_BOTH
    return Rounded(
        matrix.clamp(-largest, largest).bfloat16().contiguous().view(torch.int16),
        matrix.new_empty(len(matrix), 0, dtype=dtype),
        Grid(BITS["bfloat16"]),
    )


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
    if grid.is_bfloat16 or not bool(diagonal.sum() > 0):
        return to_nearest(matrix, grid, dtype=dtype)
    dtype = dtype or matrix.dtype
    scales = scales_for(wide, grid, diagonal, dtype).to(dtype)
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


def incoherent(down: Tensor, up: Tensor, moment: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The two links of a chain with the same product, in a basis between them in which no number stands out.

    A scale is set by the largest numbers that share it. First the columns of the second link become orthonormal; then
    what comes between is made to vary less from direction to direction (by the power TAME of its second moment), so
    that it can be rounded as well. Last a random rotation, after which all columns are alike.
    Eighteen layers of MiniLM at half their weights, output energy lost, in units of what the chain loses before it is
    rounded, 4 bits a row / groups of 32: columns of equal norm 1.189 / 1.147, orthonormal and rotated 1.096 / 1.073.

    moment: (n, n) of what the first link is multiplied with; n are all of its numbers in a row. None: all alike.

    Numbers that are not finite leave the links, or the moment, out of it.

    Shapes: down (r, ...), up (m, r, ...); the same are returned, in the dtypes given.
    Cost:   a Cholesky factor and the eigenvectors of matrices (r, r), and products with such; singular values of the
            second link where its columns are nearly dependent.
    Source: random rotations are the incoherence processing of QuIP (arXiv 2307.13304).
    """
    first, second = down.flatten(1).double().cpu(), up.transpose(0, 1).flatten(1).double().cpu()
    rank = len(first)
    if not bool(torch.isfinite(first).all() and torch.isfinite(second).all()):
        return down, up
    turn, right = _orthonormal_rows(second)
    first = turn @ first
    sees_data = moment is not None and bool(torch.isfinite(moment).all())
    through = first @ moment.double().cpu() if sees_data and moment is not None else first
    among, axes = torch.linalg.eigh(through @ first.T)
    if among[-1] > 0:
        size = among.clamp_min(1e-6 * among[-1]) ** (TAME / 2)
        first, right = (axes / size) @ (axes.T @ first), (axes * size) @ (axes.T @ right)
    rotation = _rotation(rank, seed)
    first, right = rotation @ first, rotation @ right
    back = right.reshape(rank, len(up), *up.shape[2:]).transpose(0, 1)
    return first.reshape(down.shape).to(down), back.contiguous().to(up)


def _orthonormal_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """turn (r, r) and rows (r, n), orthonormal or zero, with matrix = turn^T @ rows; matrix (r, n) float64."""
    lower, failed = torch.linalg.cholesky_ex(matrix @ matrix.T)
    sizes = lower.diagonal()
    if not bool(failed) and bool((sizes > LEAST_INDEPENDENT * sizes.max()).all()):
        return lower.T, torch.linalg.solve_triangular(lower, matrix, upper=False)
    rank = len(matrix)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)  # (r, k), (k), (k, n)
    turn = left.T * values[:, None]
    if len(values) < rank:  # more rows than columns: the directions that nothing reads
        turn = torch.cat((turn, turn.new_zeros(rank - len(values), rank)))
        right = torch.cat((right, right.new_zeros(rank - len(right), right.shape[1])))
    return turn, right


@functools.lru_cache(maxsize=8)
def _rotation(rank: int, seed: int) -> Tensor:
    """A random rotation (rank, rank), float64; it is not to be written to."""
    random = torch.randn(rank, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rotation: Tensor = torch.linalg.qr(random).Q
    return rotation


def _storable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales with no more digits than are stored, rounded up, and never zero: no number is divided by it."""
    short = torch.float16 if dtype == torch.float16 else torch.bfloat16
    found = scales.to(short)
    found = torch.where(found.to(scales) < scales, torch.nextafter(found, found.new_tensor(torch.inf)), found)
    return found.clamp(torch.finfo(short).tiny, torch.finfo(short).max).to(scales)


def lost(matrix: Tensor, stands_for_it: Tensor, moment: Tensor | None, sensitivity: Tensor | None = None) -> float:
    """Share of the output energy that a stand-in for a matrix loses: tr(G E H E^T) / tr(G W H W^T); 0 to 1.

    What is unknown is the identity: the share of the numbers' own energy without H.
    """
    return losses_of(matrix, moment, sensitivity)(stands_for_it)


def losses_of(matrix: Tensor, moment: Tensor | None, sensitivity: Tensor | None = None) -> Callable[[Tensor], float]:
    """`lost` of any stand-in for a matrix: what does not depend on that is computed once."""
    moment = None if moment is None else moment.double()
    sensitivity = None if sensitivity is None else sensitivity.double()

    def energy(of: Tensor) -> float:
        wide = of.double()
        through = wide if moment is None else wide @ moment
        if sensitivity is not None:
            through = sensitivity @ through
        return float((through * wide).sum())

    whole = energy(matrix)

    def share(stands_for_it: Tensor) -> float:
        return min(1.0, max(0.0, energy(matrix - stands_for_it) / whole)) if whole > 0 else 0.0

    return share
