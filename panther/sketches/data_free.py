"""The optimum when nothing is known of the inputs: the truncated SVD of the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from panther.sketches.base import LowRank, Seen
from panther.sketches.whitened import whitened


def data_free(weight: Tensor, seen: Seen, *, max_rank: int, generator: torch.Generator) -> LowRank:
    """The truncated SVD of the weight, whatever is known of the data.

    Its errors are shares of the weight's energy. On real models it loses far more of the outputs than a sketch
    that has seen them.
    Shapes: weight (m, n) -> LowRank up to min(max_rank, m, n).
    """
    return whitened(weight, Seen(), max_rank=max_rank, generator=generator)
