"""What a sketch is given and what it returns, and the algebra that all of them share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # it is not in torch's list of names

# Added to the covariance, relative to its mean diagonal: directions the calibration data never showed still count
# for a little, so that other inputs are not lost entirely.
RIDGE = 1e-3
# Added to the sensitivity, relative to its mean diagonal: it is estimated from far fewer rows than the covariance.
# On MiniLM at keep 0.5, uniform ranks, cosine: 0.3 .768, 0.5 .771, 1 .769 (192 samples); no sensitivity .743.
SENSITIVITY_RIDGE = 0.5


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and covariance (d, d) of `rows` observed vectors, in float64."""

    rows: int
    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class LowRank:
    """Nested factors of a weight W (m, n): slice them at any rank.

    errors (max_rank + 1,): share of the output energy that is lost at each rank.
    On the left: up = lift (m, max_rank), down = drop (max_rank, m) W.
    Else:        up = W lift (n, max_rank), down = drop (max_rank, n).
    """

    errors: Tensor
    lift: Tensor
    drop: Tensor
    on_the_left: bool

    @property
    def max_rank(self) -> int:
        return self.errors.numel() - 1

    def slice(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The best factors of this rank: up (m, rank), down (rank, n), float32 with equal norms.

        Equal norms keep half-precision storage in range and gradient steps on both factors comparable.
        """
        matrix, lift, drop = weight.float(), self.lift[:, :rank], self.drop[:rank]
        up, down = (lift, drop @ matrix) if self.on_the_left else (matrix @ lift, drop)
        norms = up.norm(), down.norm()
        scale = (norms[1] / norms[0]).sqrt() if min(norms) > 0 else norms[0].new_ones(())
        return up * scale, down / scale


@dataclass(frozen=True)
class Seen:
    """What calibration knows of one matrix; any part may be missing.

    inputs: moments of its n inputs. outputs: of its m outputs.
    sensitivity: how much the model's output reacts to an error of this matrix's output, G (m, m), the second moment
    of the gradients, or W^T G W (n, n) where n < m; scaled so that G has a mean diagonal of one.
    """

    inputs: Moments | None = None
    outputs: Moments | None = None
    sensitivity: Tensor | None = None


class Sketch(Protocol):
    """Decomposes a weight matrix given what is known of its data."""

    def __call__(self, weight: Tensor, seen: Seen, *, max_rank: int, generator: torch.Generator) -> LowRank: ...


@dataclass(frozen=True)
class Operator:
    """A symmetric positive matrix whose leading eigenvectors become the factors."""

    matrix: Tensor  # (size, size), float64
    finish: Callable[[Tensor, Tensor], LowRank]  # eigenvectors (size, r), errors (r + 1,) -> factors

    @property
    def size(self) -> int:
        return self.matrix.shape[0]

    @property
    def trace(self) -> float:
        return float(self.matrix.trace())


def energy_operator(weight: Tensor, seen: Seen) -> Operator:
    """The matrix whose leading eigenvectors are the best factors of W in the norm of the data.

    With Sigma = L L^T the covariance of the inputs and G = K K^T the sensitivity, the loss of factors W' is
    ||K^T (W - W') L||^2. Where m <= n, or only the outputs are known, it is minimised by the eigenvectors of
    K^T (W Sigma W^T) K; otherwise by those of L^T (W^T G W) L. What is unknown is the identity.

    Source: output PCA as in DRONE, equal to the whitened SVD of SVD-LLM (arXiv 2403.07378); the sensitivity is the
    Gauss-Newton matrix of the model's output, estimated as in K-FAC (arXiv 1503.05671).
    """
    matrix = weight.double().cpu()
    m, n = matrix.shape
    if seen.outputs is not None or m <= n:
        return _output_operator(matrix, seen)
    return _input_operator(matrix, seen)


def output_covariance(matrix: Tensor, seen: Seen) -> Tensor:
    """C = W Sigma W^T (m, m) with its ridge; W W^T where nothing is known or the layer saw only zeros."""
    gram = matrix @ matrix.T
    if seen.outputs is not None:
        covariance = seen.outputs.covariance.double().cpu()
        scale = float(covariance.trace()) / max(
            float(gram.trace()), 1e-300
        )  # mean diagonal of Sigma, as seen from here
    elif seen.inputs is not None:
        sigma = seen.inputs.covariance.double().cpu()
        covariance = matrix @ sigma @ matrix.T
        scale = float(sigma.diagonal().mean())
    else:
        return gram
    return covariance + RIDGE * scale * gram if float(covariance.trace()) > 0 else gram


def with_ridge(matrix: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor of a positive matrix after `ridge` times the mean size of its diagonal was added.

    Where the diagonal is zero, that size counts as 1; where rounding left the matrix indefinite, the ridge grows.

    Shapes: matrix (n, n), float64 -> (n, n), lower.
    Raises: torch.linalg.LinAlgError for a matrix that is not finite.
    """
    if not math.isfinite(float(matrix.sum())):
        raise LinAlgError("a matrix of products holds NaN or Inf")
    scale = float(matrix.diagonal().abs().mean()) or 1.0  # where all are rounding errors, some are negative
    while True:  # a ridge of about the diagonal's size always ends this
        raised = matrix.clone()
        raised.diagonal().add_(ridge * scale)
        factor, failed = torch.linalg.cholesky_ex(raised)
        del raised
        if not int(failed):
            return cast(Tensor, factor)
        ridge = max(10 * ridge, 1e-15)


def _output_operator(matrix: Tensor, seen: Seen) -> Operator:
    energy = output_covariance(matrix, seen)
    if seen.sensitivity is None:
        return Operator(energy, lambda vectors, errors: LowRank(errors, vectors.float(), vectors.T.float(), True))
    factor = with_ridge(seen.sensitivity.double().cpu(), SENSITIVITY_RIDGE)

    def finish(vectors: Tensor, errors: Tensor) -> LowRank:
        lift = torch.linalg.solve_triangular(factor.T, vectors, upper=True)
        return LowRank(errors, lift.float(), (factor @ vectors).T.float(), True)

    return Operator(factor.T @ energy @ factor, finish)


def _input_operator(matrix: Tensor, seen: Seen) -> Operator:
    gram = matrix.T @ matrix
    if seen.sensitivity is not None:
        gram = (seen.sensitivity.double().cpu() + SENSITIVITY_RIDGE * gram) / (1 + SENSITIVITY_RIDGE)
    if seen.inputs is None or float(seen.inputs.covariance.trace()) <= 0:
        return Operator(gram, lambda vectors, errors: LowRank(errors, vectors.float(), vectors.T.float(), False))
    factor = with_ridge(seen.inputs.covariance.double().cpu(), RIDGE)

    def finish(vectors: Tensor, errors: Tensor) -> LowRank:
        drop = torch.linalg.solve_triangular(factor.T, vectors, upper=True).T
        return LowRank(errors, (factor @ vectors).float(), drop.float(), False)

    return Operator(factor.T @ gram @ factor, finish)


def tail_errors(leading: Tensor, total: float) -> Tensor:
    """Share of the energy lost at rank 0, 1, ..., from eigenvalues in falling order and their full sum."""
    kept = torch.cat([torch.zeros(1, dtype=torch.float64), leading.clamp_min(0).cumsum(0)])
    return (1 - kept / max(total, 1e-300)).clamp(0, 1)
