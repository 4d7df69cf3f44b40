"""The exact optimum in the norm of the calibration data, by one eigendecomposition."""

from __future__ import annotations

import torch
from torch import Tensor

from panther.sketches.base import LowRank, Seen, energy_operator, tail_errors


def whitened(weight: Tensor, seen: Seen, *, max_rank: int, generator: torch.Generator) -> LowRank:
    """The factors that lose the least of the layer's output on the calibration data, at every rank at once.

    Shapes: weight (m, n) -> LowRank up to min(max_rank, m, n).
    Cost:   one symmetric eigendecomposition of size min(m, n) (m if only outputs are known), in float64.
    Source: see energy_operator; the generator is not used.
    """
    operator = energy_operator(weight, seen)
    values, vectors = torch.linalg.eigh((operator.matrix + operator.matrix.T) / 2)
    rank = min(max_rank, *weight.shape)
    return operator.finish(vectors.flip(1)[:, :rank].contiguous(), tail_errors(values.flip(0)[:rank], operator.trace))
