"""The layer of the Panther paper in the place of trained ones: weights projected on random bases, at a plan's ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from panther.nn import SKETCHED, SKLinear
from panther.nn.surgery import with_layers
from panther.spec import Plan


def with_random_bases(model: nn.Module, plan: Plan, seed: int) -> nn.Module:
    """A copy of the model with every sketched layer projected on random bases, at the plan's ranks.

    One term of two sketches, since only the total rank matters here. Both sides count as kept, although the fixed one
    can be drawn again from its seed: it is multiplied with all the same. A convolution is taken as the matrix of its
    outputs and everything else, so the plan's schemes must be "linear" and "output_channel".
    """
    layers: dict[str, nn.Module] = {}
    for index, choice in enumerate(plan.sketched):
        dense = model.get_submodule(choice.layer)
        project: Any = projected if isinstance(dense, nn.Linear) else projected_convolution
        layers[choice.layer] = project(dense, low_rank=choice.ranks[0] // 2, seed=seed + index)
    return with_layers(model, layers)


@torch.no_grad()
def projected(dense: nn.Linear, *, low_rank: int, seed: int) -> SKLinear:
    """The layer of the Panther paper as it takes a trained weight over: S1 = U1^T W and S2 = W U2^T.

    Each of U1 S1 and S2 U2 has W as its mean over random bases, and the layer is half their sum.

    Source: Panther, arXiv 2601.15473.
    """
    return _projected(dense.weight, dense.bias, low_rank, seed)


def _projected(weight: Tensor, bias: Tensor | None, low_rank: int, seed: int) -> SKLinear:
    layer = SKLinear(weight.shape[1], weight.shape[0], 1, low_rank, bias is not None, basis="random", seed=seed)
    layer.s1[0] = layer.u1[:, 0].T @ weight
    layer.s2[:, 0] = weight @ layer.u2[0].T
    if layer.bias is not None and bias is not None:
        layer.bias.copy_(bias)
    return layer


@torch.no_grad()
def projected_convolution(dense: Any, *, low_rank: int, seed: int) -> nn.Module:
    """The same of a convolution, whose inputs are the patches that its kernel lies on."""
    down, up = _projected(dense.weight.flatten(1), None, low_rank, seed).active_weights()
    links = down.unflatten(1, dense.weight.shape[1:]), up.reshape(*up.shape, *(1,) * (dense.weight.dim() - 2))
    return SKETCHED[type(dense)].from_factors(dense, "output_channel", links, dense.bias)
