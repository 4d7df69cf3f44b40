"""A smooth function through noisy scores, to ask what they depend on: a Gaussian process in NumPy and SciPy.

It explains a finished study and suggests no points. Notation: n trials, d parameters, D_p (n, n) squared distances in
one parameter alone, l_p its length scale, K = M52(sum_p D_p / l_p^2) + noise the kernel with Matern's 5/2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Centre and width of the priors on log(length / sqrt(d)) and log(noise): wide enough that forty trials outweigh them.
LENGTHS = (np.log(0.5), 1.5)
NOISE = (np.log(1e-2), 2.0)
JITTER = 1e-8  # keeps K positive definite where points coincide
STARTS = (np.log(0.3), np.log(2.0))  # of the length scales; the better of both fits is taken


@dataclass(frozen=True)
class Surrogate:
    """The fitted process: call it with encoded points to get mean scores."""

    points: Array  # (n, columns)
    blocks: tuple[int, ...]  # columns of each parameter
    lengths: Array  # (d,)
    weights: Array  # (n,) K^-1 y
    mean: float
    scale: float
    fit: float  # the share of the scores' variance that is predicted for trials left out; below 0: worse than the mean

    def __call__(self, points: Array) -> Array:
        distances = _squared_distances(points, self.points, self.blocks)
        kernel, _slope = _matern(np.tensordot(self.lengths**-2.0, distances, 1))
        return np.asarray(self.mean + self.scale * (kernel @ self.weights), dtype=np.float64)


def fit(points: Array, scores: Array, blocks: Sequence[int]) -> Surrogate:
    """The process of the most probable length scales and noise.

    Shapes: points (n, sum of blocks) in [0, 1], scores (n,) finite and not all equal.
    Cost:   n^3 flops and d * n^2 numbers for each of about a hundred steps.
    """
    from scipy.linalg import cho_solve
    from scipy.optimize import minimize

    mean, scale = float(scores.mean()), float(scores.std())
    y = (scores - mean) / scale
    distances = _squared_distances(points, points, blocks)
    count = len(blocks)
    centre = np.append(np.full(count, LENGTHS[0] + np.log(count) / 2), NOISE[0])
    width = np.append(np.full(count, LENGTHS[1]), NOISE[1])

    def loss(theta: Array) -> tuple[float, Array]:
        """Minus the log posterior without constants, the variance of the process put at its best, and the gradient."""
        scaled = distances * np.exp(-2 * theta[:count])[:, None, None]
        kernel, slope = _matern(scaled.sum(0))
        factor, inverse = _inverted(kernel, theta[count])
        weights = inverse @ y
        variance = float(y @ weights) / len(y)
        outer = inverse - np.outer(weights, weights) / variance
        slopes = [(outer * slope * part).sum() / 2 for part in scaled]
        gradient = np.append(slopes, np.trace(outer) * np.exp(theta[count]) / 2)
        off = (theta - centre) / width
        value = len(y) * np.log(variance) / 2 + float(np.log(np.diag(factor)).sum()) + float(off @ off) / 2
        return value, gradient + off / width

    limits = [(-5.0, 5.0)] * count + [(-12.0, 3.0)]
    tried = [
        minimize(loss, np.append(np.full(count, start), NOISE[0]), jac=True, method="L-BFGS-B", bounds=limits)
        for start in STARTS
    ]
    theta = min(tried, key=lambda found: float(found.fun)).x
    lengths = np.exp(theta[:count])
    kernel, _slope = _matern(np.tensordot(lengths**-2.0, distances, 1))
    factor, inverse = _inverted(kernel, theta[count])
    weights = cho_solve((factor, True), y)
    left_out = weights / np.diag(inverse)  # y minus its prediction from all others
    return Surrogate(points, tuple(blocks), lengths, weights, mean, scale, 1.0 - float((left_out**2).mean()))


def _inverted(kernel: Array, log_noise: float) -> tuple[Array, Array]:
    """The lower Cholesky factor of kernel + noise, and its inverse."""
    from scipy.linalg import cho_solve, cholesky

    identity = np.eye(len(kernel))
    factor = cholesky(kernel + (np.exp(log_noise) + JITTER) * identity, lower=True)
    return factor, cho_solve((factor, True), identity)


def _squared_distances(left: Array, right: Array, blocks: Sequence[int]) -> Array:
    """(d, n, m): for each parameter by itself; two different categories are at 1."""
    ends = np.cumsum(blocks)
    parts = []
    for start, end in zip(ends - np.asarray(blocks), ends, strict=True):
        squares = ((left[:, None, start:end] - right[None, :, start:end]) ** 2).sum(-1)
        parts.append(squares / (2 if end - start > 1 else 1))
    return np.stack(parts)


def _matern(squares: Array) -> tuple[Array, Array]:
    """The kernel of squared distances, and its slope against the logarithm of a length, a part's square left out."""
    a = np.sqrt(5 * squares)
    decay = np.exp(-a)
    return (1 + a + a * a / 3) * decay, 5 / 3 * (1 + a) * decay
