"""The near-optimum in the norm of the calibration data for large layers, from a block Krylov space.

Notation: C is the energy and M the metric of the problem that `whitened` solves: the factors come from the vectors Z
with Z^T M Z = I that make the trace of Z^T M C M Z the largest. A root of M is never formed, C only of tall weights and
where it fits; products run through the weight and its statistics, in float32, and only small matrices are float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from panther.products import gram, product
from panther.sketches.base import RIDGE, SENSITIVITY_RIDGE, LowRank, Moments, Seen, tail_errors, with_ridge
from panther.sketches.whitened import whitened

# A basis of DEPTH blocks, together twice the rank. Error over the optimum at an eighth of all directions, worst of
# seven spectra: 8 blocks of a quarter of the rank 1.2 %, 4 of a half 2.0 %, 6 of a quarter 4.6 %; two passes over 1.1
# times the rank, without the earlier blocks, 2.9 % for twice the products.
DEPTH = 8
ROWS = 256  # of a matrix of statistics that are turned into float32 at once
NOISE = 1e-6  # of a block's columns, above rounding: what is new in a block when the space is exhausted


@dataclass(frozen=True)
class Ridged:
    """matrix + ridge * identity; the matrix is symmetric, None for zeros."""

    matrix: Tensor | None = None
    ridge: float = 1.0

    def __matmul__(self, block: Tensor) -> Tensor:
        if self.matrix is None:
            return block if self.ridge == 1 else self.ridge * block
        return in_parts(self.matrix, block).add_(block, alpha=self.ridge)


@dataclass(frozen=True)
class Problem:
    """M, and C = factor middle factor^T + known."""

    factor: Tensor | None  # W (m, n) on the left, W^T otherwise; float32
    middle: Ridged
    known: Tensor | None
    metric: Ridged
    on_the_left: bool

    @property
    def size(self) -> int:
        given = self.known if self.factor is None else self.factor
        return 0 if given is None else len(given)

    def energy(self, block: Tensor) -> Tensor:
        """C block."""
        parts = []
        if self.factor is not None:
            parts.append(product(self.factor, self.middle @ product(self.factor.T, block)))
        if self.known is not None:
            parts.append(in_parts(self.known, block))
        return parts[0] if len(parts) == 1 else parts[0].add_(parts[1])

    def total(self) -> float:
        """The trace of M C."""
        total = 0.0 if self.factor is None else traced(self.factor, self.middle, self.metric)
        if self.known is None:
            return total
        if self.metric.matrix is not None:
            pairs = zip(self.metric.matrix.split(ROWS), self.known.split(ROWS), strict=True)
            total += sum(float((a * b).sum()) for a, b in pairs)
        return total + self.metric.ridge * float(self.known.trace())


def randomised(weight: Tensor, seen: Seen, *, max_rank: int, generator: torch.Generator) -> LowRank:
    """Factors that lose within two percent of the least possible (as tested), without a full eigendecomposition.

    Where the basis would be nearly everything it is the exact sketch, which is cheaper then.
    Shapes: weight (m, n) -> LowRank up to min(max_rank, m, n).
    Cost:   products of the weight and its statistics with 2.25 max_rank columns, half a product of the weight with its
            statistics for the errors, and one float64 eigendecomposition of 2 max_rank.
    Memory: below 4 (m + n) max_rank numbers beyond weight and statistics; 5 where m > n, and of the data only outputs
            and sensitivity are known.
    Source: Musco and Musco, NeurIPS 2015 (arXiv 1504.05477), Alg. 2; Halko, Martinsson, Tropp, SIAM Review 53 (2011).
    """
    full = min(weight.shape)
    rank = min(max_rank, full)
    width = min(rank // 4 + 2, -(-(3 * rank + 7 * full) // (10 * DEPTH)))  # a large rank needs 0.7 of what is beyond it
    if DEPTH * width >= full:
        return whitened(weight, seen, max_rank=max_rank, generator=generator)
    columns = DEPTH * width
    held = (2 * columns + 5 * width) * full + 2 * columns**2  # two bases, the blocks in hand, a float64 matrix
    problem = problem_of(weight, seen, room=4 * rank * sum(weight.shape) - held)
    total = problem.total()
    basis, energy = krylov(problem, width, generator)
    values, vectors = torch.linalg.eigh(energy)
    errors = tail_errors(values.flip(0)[:rank], total)
    best = product(basis, vectors.flip(1)[:, :rank].float())
    image = problem.metric @ best
    lift, drop = (best, image) if problem.on_the_left else (image, best)
    return LowRank(errors, lift, drop.T, problem.on_the_left)


def krylov(problem: Problem, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A basis Q of the span of C M X, (C M)^2 X, ... for a random X, with Q^T M Q = I, and Q^T M C M Q in float64.

    Shapes: -> (size, DEPTH * width), (DEPTH * width, DEPTH * width).
    """
    size, columns = problem.size, DEPTH * width
    basis = torch.empty(size, columns, dtype=torch.float32)
    image = basis if problem.metric.matrix is None else torch.empty(size, columns, dtype=torch.float32)
    energy = torch.empty(columns, columns, dtype=torch.float64)
    block = problem.energy(problem.metric @ torch.randn(size, width, generator=generator, dtype=torch.float32))
    for start in range(0, columns, width):
        end = start + width
        known, seen = basis[:, :start], image[:, :start]
        noise = torch.randn(size, width, generator=generator, dtype=torch.float32)
        block += noise.mul_(block.norm(dim=0) * (NOISE / size**0.5))
        block -= product(known, product(seen.T, block))
        block = torch.linalg.qr(block).Q
        for _ in range(2):  # once leaves more than rounding of what the blocks have in common
            block -= product(known, product(seen.T, block))
            block, ahead = upright(block, problem.metric)
        basis[:, start:end], image[:, start:end] = block, ahead
        block = problem.energy(ahead)
        products = product(image[:, :end].T, block)
        energy[:end, start:end], energy[start:end, :end] = products, products.T
    return basis, energy


def upright(block: Tensor, metric: Ridged) -> tuple[Tensor, Tensor]:
    """The block with its columns mixed so that block^T M block = I, and M block."""
    image = metric @ block
    root = with_ridge(product(block.T, image).double(), 0.0)
    mix = torch.linalg.solve_triangular(root, torch.eye(len(root), dtype=torch.float64), upper=False).T.float()
    return product(block, mix), product(image, mix)


def problem_of(weight: Tensor, seen: Seen, room: int) -> Problem:
    """The problem whose matrix energy_operator forms; here it may have `room` numbers."""
    matrix = weight.float().cpu()
    m, n = matrix.shape
    inputs, outputs, sensitivity = covariance(seen.inputs), covariance(seen.outputs), seen.sensitivity
    if seen.outputs is None and m > n:
        middle, metric = Ridged(ridge=1.0 if sensitivity is None else SENSITIVITY_RIDGE), ridged(inputs, RIDGE)
        if n * n > room:
            return Problem(matrix.T, middle, sensitivity, metric, False)
        known = gram(matrix).mul_(middle.ridge)  # as many products as its trace alone
        if sensitivity is not None:
            for start in range(0, n, ROWS):
                known[start : start + ROWS] += sensitivity[start : start + ROWS]
        return Problem(None, middle, known, metric, False)
    middle = ridged(inputs, RIDGE)
    if outputs is not None:
        middle = Ridged(ridge=RIDGE * float(outputs.trace()) / max(squares(matrix), 1e-300))
    elif seen.outputs is not None:
        middle = Ridged()
    return Problem(matrix, middle, outputs, ridged(sensitivity, SENSITIVITY_RIDGE), True)


def covariance(moments: Moments | None) -> Tensor | None:
    """The covariance of what was seen; None where it was nothing, or zeros only."""
    return moments.covariance if moments is not None and float(moments.covariance.trace()) > 0 else None


def ridged(matrix: Tensor | None, share: float) -> Ridged:
    """With a ridge of this share of the mean diagonal; the identity where nothing is known."""
    return Ridged() if matrix is None else Ridged(matrix, share * (float(matrix.diagonal().mean()) or 1.0))


def in_parts(matrix: Tensor, block: Tensor) -> Tensor:
    """A matrix of statistics times a block in float32, without a copy of the whole matrix."""
    result = block.new_empty(len(matrix), block.shape[1])
    for rows, part in zip(matrix.split(ROWS), result.split(ROWS), strict=True):
        part.copy_(product(rows.float(), block))
    return result


def traced(factor: Tensor, middle: Ridged, outer: Ridged) -> float:
    """The trace of outer factor middle factor^T, half of whose products are known by symmetry."""
    if outer.matrix is None:  # the identity in the middle costs nothing
        factor, middle, outer = factor.T, outer, middle
    if outer.matrix is None:
        return middle.ridge * outer.ridge * squares(factor)
    total = 0.0
    for start in range(0, len(factor), ROWS):
        end = min(start + ROWS, len(factor))
        products = product((middle @ factor[start:end].T).T, factor[:end].T)
        total += outer.ridge * float(products[:, start:].trace())
        products[:, :start] *= 2
        total += float((products * outer.matrix[start:end, :end]).sum(dtype=torch.float64))
    return total


def squares(matrix: Tensor) -> float:
    """The sum of the squares of all entries."""
    return sum(float(rows.double().square().sum()) for rows in matrix.split(ROWS))
