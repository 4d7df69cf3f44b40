"""A smooth function through noisy scores, to ask what they depend on: a Gaussian process in NumPy and SciPy.

It explains a finished study, and finds the length scales and the noise of the process that suggests points. Notation:
n trials, d parameters, D_p (n, n) squared distances in one parameter alone, l_p its length scale,
K = M52(sum_p D_p / l_p^2) + noise the kernel with Matern's 5/2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Prior:
    """What is believed before any trial: centre and width of log(length / sqrt(d)) and of log(noise)."""

    length: tuple[float, float]
    noise: tuple[float, float]  # its variance, as a share of the process's
    least: tuple[float, float] = (-5.0, -12.0)  # of log(length) and log(noise)
    variance: float | None = None  # of the process, where that is known; else it is put at its best


EXPLAINING = Prior((np.log(0.5), 1.5), (np.log(1e-2), 2.0))  # so wide that forty trials outweigh it
# Most probable lengths are long, the more so the more parameters: what is not seen to matter does not. The numbers are
# those of Hvarfner, Hellsten and Nardi, ICML 2024, for which log-normal priors have their densities' peaks here.
SEARCHING = Prior((2**0.5 - 3, 3**0.5), (-5.0, 1.0), (np.log(0.025), np.log(1e-4)), 1.0)
JITTER = 1e-8  # keeps K positive definite where points coincide
STARTS = (np.log(0.3), np.log(2.0))  # of the length scales; the better of both fits is taken


@dataclass(frozen=True)
class Surrogate:
    """The fitted process: call it with encoded points to get mean scores."""

    points: Array  # (n, columns)
    blocks: tuple[int, ...]  # columns of each parameter
    lengths: Array  # (d,)
    weights: Array  # (n,) K^-1 (y - constant), y the scores of mean 0 and spread 1
    constant: float
    noise: float
    mean: float  # of the scores
    scale: float  # their spread
    fit: float  # the share of the scores' variance that is predicted for trials left out; below 0: worse than the mean

    def __call__(self, points: Array) -> Array:
        distances = _squared_distances(points, self.points, self.blocks)
        kernel, _slope = _matern(np.tensordot(self.lengths**-2.0, distances, 1))
        return np.asarray(self.mean + self.scale * (self.constant + kernel @ self.weights), dtype=np.float64)


def fit(points: Array, scores: Array, blocks: Sequence[int], prior: Prior = EXPLAINING) -> Surrogate:
    """The process of the most probable length scales, noise and constant.

    Shapes: points (n, sum of blocks) in [0, 1], scores (n,) finite; not all equal, unless the prior has the variance.
    Cost:   n^3 flops and d * n^2 numbers for each of about a hundred steps.
    """
    from scipy.optimize import minimize

    mean, scale = float(scores.mean()), float(scores.std()) or 1.0
    y = (scores - mean) / scale
    distances = _squared_distances(points, points, blocks)
    count = len(blocks)
    centre = np.append(np.full(count, prior.length[0] + np.log(count) / 2), prior.noise[0])
    width = np.append(np.full(count, prior.length[1]), prior.noise[1])

    def at_best(inverse: Array) -> tuple[float, Array, float]:
        """The most probable constant, K^-1 (y - constant), and the variance of the process."""
        sums = inverse.sum(0)
        constant = float(sums @ y / sums.sum())
        weights = inverse @ (y - constant)
        known = None if prior.variance is None else prior.variance / scale**2
        return constant, weights, float((y - constant) @ weights) / len(y) if known is None else known

    def loss(theta: Array) -> tuple[float, Array]:
        """Minus the log posterior without constants, and its gradient."""
        closeness = np.exp(-2 * theta[:count])
        kernel, slope = _matern(np.tensordot(closeness, distances, 1))
        factor, inverse = _inverted(kernel, theta[count])
        constant, weights, variance = at_best(inverse)
        outer = inverse - np.outer(weights, weights) / variance
        slopes = closeness * np.tensordot(distances, outer * slope, 2) / 2
        gradient = np.append(slopes, np.trace(outer) * np.exp(theta[count]) / 2)
        off = (theta - centre) / width
        misfit = len(y) * np.log(variance) + float((y - constant) @ weights) / variance
        value = misfit / 2 + float(np.log(np.diag(factor)).sum()) + float(off @ off) / 2
        return value, gradient + off / width

    limits = [(prior.least[0], 5.0)] * count + [(prior.least[1], 3.0)]
    tried = [
        minimize(loss, np.append(np.full(count, start), prior.noise[0]), jac=True, method="L-BFGS-B", bounds=limits)
        for start in STARTS
    ]
    theta = min(tried, key=lambda found: float(found.fun)).x
    lengths = np.exp(theta[:count])
    kernel, _slope = _matern(np.tensordot(lengths**-2.0, distances, 1))
    _factor, inverse = _inverted(kernel, theta[count])
    constant, weights, _variance = at_best(inverse)
    left_out = weights / np.diag(inverse)  # y minus its prediction from all others
    return Surrogate(
        points,
        tuple(blocks),
        lengths,
        weights,
        constant,
        float(np.exp(theta[count])),
        mean,
        scale,
        1.0 - float((left_out**2).mean()),
    )


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
