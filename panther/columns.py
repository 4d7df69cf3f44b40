"""Which of a layer's input channels can be spared, and the matrix that makes up for them: a sketch by columns.

The channels of a trained network say much the same. Leaving out those that the others stand for best, and solving for
the matrix again, loses less than any choice by size.

Notation: h channels, W (m, h) the layer, C (h, h) the covariance of the channels, K K^T = G (m, m) how strongly the
model's output reacts to each direction of the layer's output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from panther.chains import CHANNELS
from panther.factors import Decomposed
from panther.products import product
from panther.sketches import SENSITIVITY_RIDGE, Moments, with_ridge

# Of the mean variance of a channel, added to C: rarely active channels are not to be trusted to stand for others.
RIDGE = 1e-3
COUNTS = 96  # of channels that are offered, at most
SHRUNK = 0.85  # of the channels in the matrices: with fewer to come, those that are left are copied into smaller ones
STEP = 8  # counts of channels are multiples of this, as ranks are


def channels_of(weight: Tensor, inputs: Moments, sensitivity: Tensor | None) -> Columns:
    """A layer at every useful count of its input channels; its links are a choice of channels, and a matrix for them.

    weight (m, h, or with ones behind for a convolution).
    """
    matrix = weight.flatten(1).double()
    kept = _Kept.of(matrix, inputs.covariance.double(), sensitivity)
    ones = (1,) * (weight.dim() - 2)

    def links(dense: Tensor, count: Sequence[int]) -> tuple[Tensor, Tensor]:
        index, solved = kept.solve(dense.flatten(1), count[0])
        chosen = torch.zeros(count[0], dense.shape[1], dtype=torch.float32)
        chosen[torch.arange(count[0]), index] = 1.0
        return chosen.reshape(*chosen.shape, *ones), solved.reshape(*solved.shape, *ones)

    ranks = tuple((count,) for count in kept.counts)
    return Columns(CHANNELS, links, ranks, kept.errors, kept)


@dataclass(frozen=True)
class Columns(Decomposed):
    """A layer decomposed by its columns, and what is known of the channels that stay."""

    kept: _Kept

    def covariance(self, count: int) -> Tensor:
        """Of the first so many channels, rising by their index; (count, count), float64."""
        lower = self.kept.lower[:count, :count]
        places = self.kept.order[:count].argsort()
        return product(lower, lower.T)[places][:, places].double()


@dataclass(frozen=True)
class _Kept:
    """Channels in falling importance; the first so many of them are those that stay.

    lower (h, h), float32: C = L L^T in this order, with its ridge; any number of first channels is solved from it.
    """

    order: Tensor
    lower: Tensor
    counts: tuple[int, ...]  # rising
    errors: tuple[float, ...]  # share of the second layer's output energy that is lost

    @classmethod
    def of(cls, weight: Tensor, covariance: Tensor, sensitivity: Tensor | None) -> _Kept:
        """Leave out the channel that can be spared best, one after the other.

        After each the others take over what they can. What leaving out one costs is |w|^2 / (C^-1)_ii, where w is its
        column of the solved W: the optimal brain surgeon's rule.

        Source: Hassibi and Stork, NIPS 5 (1992); for the hidden units of transformers Lin et al., MoDeGPT, ICLR 2025.
        """
        size = len(covariance)
        ridge = RIDGE * (float(covariance.diagonal().mean()) or 1.0)
        known = covariance.clone()
        known.diagonal().add_(ridge)
        gram = _seen_by_the_model(weight, sensitivity)
        energy = float((gram * covariance).sum()) or 1.0
        inverse = torch.cholesky_inverse(with_ridge(known, 0.0))
        channels, left, gone, lost = torch.arange(size), torch.ones(size, dtype=torch.bool), list[int](), 0.0
        found = []
        for count in _counts(size):
            if count < SHRUNK * len(channels):  # what has left takes no more part in the products
                stay = left.nonzero().flatten()
                channels, gram, inverse = channels[stay], gram[stay[:, None], stay], inverse[stay[:, None], stay]
                left = left[stay]
            out, more = _leave_out(gram, inverse, left, int(left.sum()) - count)
            gone += channels[out].tolist()
            lost += more
            found.append((count, min(1.0, max(0.0, lost / energy))))
        order = torch.tensor([*channels[left].tolist(), *reversed(gone)])
        lower = with_ridge(known[order][:, order], 0.0).float()
        counts, errors = zip(*reversed(found), strict=True)
        return cls(order, lower, counts, errors)

    def solve(self, weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Indices (count,) of the channels that stay, rising, and the matrix (m, count) for them, float32."""
        stay, gone = self.order[:count], self.order[count:]
        solved = weight.float()[:, stay] + weight.float()[:, gone] @ self._stand_for(count)
        index, places = stay.sort()
        return index, solved[:, places].contiguous()

    def taken_over(self, count: int) -> Tensor:
        """What each of the channels that stay stands for of all channels, (h, count) float32; both rising."""
        found = torch.zeros(len(self.order), count, dtype=torch.float32)
        found[self.order[:count], torch.arange(count)] = 1.0
        found[self.order[count:]] = self._stand_for(count)
        return found[:, self.order[:count].argsort()]

    def _stand_for(self, count: int) -> Tensor:
        """What each of the first so many channels stands for of the others, (h - count, count), both in this order.

        Of C the block of the others with them, times the inverse of their own: (B A^T) (A A^T)^-1 = B A^-1.
        """
        lower = self.lower[:, :count]
        return cast(Tensor, torch.linalg.solve_triangular(lower[:count], lower[count:], upper=False, left=False))


def _counts(size: int) -> Iterator[int]:
    """Falling multiples of STEP, at most about COUNTS of them."""
    step = STEP * max(1, round(size / COUNTS / STEP))
    yield from range((size - 1) // step * step, 0, -step)


def _seen_by_the_model(weight: Tensor, sensitivity: Tensor | None) -> Tensor:
    """W^T G W (h, h), with a ridge of W^T W; the sensitivity is G (m, m), or W^T G W already where m > h (see Seen)."""
    m, size = weight.shape
    if sensitivity is not None and len(sensitivity) == m:
        weight = with_ridge(sensitivity.double().cpu(), SENSITIVITY_RIDGE).T @ weight
    gram = weight.T @ weight
    if sensitivity is None or len(sensitivity) == m or len(sensitivity) != size:
        return gram
    return (sensitivity.double().cpu() + SENSITIVITY_RIDGE * gram) / (1 + SENSITIVITY_RIDGE)


def _leave_out(gram: Tensor, inverse: Tensor, left: Tensor, count: int) -> tuple[list[int], float]:
    """Leave out so many channels, in place, and return which in their order, and what that loses.

    gram: W^T G W of the W that is solved anew after each channel, of which w_i goes over to the others as
    w_i (C^-1)_i / (C^-1)_ii. inverse: C^-1 of the channels that are left. Both are brought up to date once for all
    channels that go; until then only their diagonals and the columns that are read.
    """
    size, lost, gone = len(left), 0.0, list[int]()
    # Of each channel that goes a row, in which a number of another stands in its column: they are read side by side.
    parts, shares, moved = (gram.new_zeros(count, size) for _ in range(3))
    costs, diagonal = gram.diagonal().clone(), inverse.diagonal().clone()
    for done in range(count):
        index = int(torch.where(left, costs / diagonal.clamp_min(1e-300), math.inf).argmin())
        column = inverse[index] - parts[:done, index] @ parts[:done]
        read = gram[index] - shares[:done, index] @ moved[:done] - moved[:done, index] @ shares[:done]
        pivot = column[index].clamp_min(1e-300)
        lost += max(0.0, float(read[index] / pivot))
        shares[done] = column / pivot
        moved[done] = read - read[index] / 2 * shares[done]
        parts[done] = column / pivot.sqrt()
        costs -= 2 * moved[done] * shares[done]
        diagonal -= parts[done].square()
        left[index] = False
        gone.append(index)
    inverse.addmm_(parts.T, parts, alpha=-1)
    gram.addmm_(moved.T, shares, alpha=-1).addmm_(shares.T, moved, alpha=-1)
    return gone, lost
