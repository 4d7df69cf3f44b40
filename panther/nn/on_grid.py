"""Layers whose float weights are held to a grid while they are trained: what they compute is what they are stored as.

Gradients pass the rounding as if it were not there (the straight-through estimator, arXiv 1308.3432), so that healing
learns with the error of rounding in place, and undoes part of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from panther.quantise import RANGES, Rounded, as_bfloat16, spread
from panther.spec import Grid


class OnGrid(nn.Module):
    """A parametrisation: the weight rounded to the nearest multiples of fixed scales."""

    scales: Tensor

    def __init__(self, scales: Tensor, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("scales", scales)

    def forward(self, weight: Tensor) -> Tensor:
        if self.grid.is_bfloat16:
            return (
                weight + (as_bfloat16(weight.flatten(1), weight.dtype).matrix().reshape(weight.shape) - weight).detach()
            )
        flat = weight.flatten(1)
        low, high = RANGES[self.grid.bits]
        steps = spread(self.scales, flat.shape[1], self.grid)
        inside = torch.minimum(torch.maximum(flat, low * steps), high * steps)  # no gradient beyond the last multiple
        rounded = (inside / steps).round().clamp(low, high) * steps
        return (inside + (rounded - inside).detach()).reshape(weight.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


class CorrectedLinear(nn.Module):
    """A linear layer and the chain that makes up for part of its rounding error: y = b + W x + up (down x)."""

    def __init__(self, layer: nn.Linear, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        like = layer.weight
        self.down, self.up = (nn.Parameter(t.to(like.device, like.dtype), like.requires_grad) for t in (down, up))

    def to_dense(self) -> nn.Linear:
        """A linear layer of this geometry, with the weight that is to be corrected."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight, dense.bias = self.weight, self.bias
        return dense.train(self.training)

    def add_to(self, _layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
        """As a forward hook, with kwargs, of the layer that this one is made of: its output with the correction."""
        given = args[0] if args else kwargs["input"]
        return output + F.linear(F.linear(given, self.down), self.up)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias) + F.linear(F.linear(input, self.down), self.up)


def corrected(layer: nn.Linear, left: Tensor, rank: int, lower: Tensor | None = None) -> CorrectedLinear:
    """A linear layer with the chain of this rank that makes up for most of `left`, what rounding its weight loses.

    lower: L (n, n) of the second moment L L^T of the inputs, in whose norm that is; without it in the plain one.

    Shapes: left (m, n), float64.
    """
    whitened = left if lower is None else left @ lower
    u, s, vh = torch.linalg.svd(whitened, full_matrices=False)
    root = s[:rank].sqrt()
    down = root[:, None] * vh[:rank]
    if lower is not None:
        down = torch.linalg.solve_triangular(lower, down, upper=False, left=False)
    return CorrectedLinear(layer, down.float(), (u[:, :rank] * root).float())


def hold(layer: nn.Module, name: str, rounded: Rounded) -> None:
    """Put the numbers of a grid into a weight of a layer, and hold it to that grid from now on."""
    weight: Any = getattr(layer, name)
    matrix = rounded.matrix().to(weight.device, weight.dtype)
    with torch.no_grad():
        weight.copy_(matrix.reshape(weight.shape))
    parametrize.register_parametrization(
        layer, name, OnGrid(rounded.scales.to(weight.device, weight.dtype), rounded.grid)
    )


def is_held(layer: nn.Module) -> bool:
    """Whether any weight of this layer is on a grid."""
    return parametrize.is_parametrized(layer) and any(isinstance(m, OnGrid) for m in layer.parametrizations.modules())  # type: ignore[union-attr]


def let_go(layer: nn.Module) -> None:
    """Leave the weights of a layer at the numbers where they stand, plain parameters again."""
    if parametrize.is_parametrized(layer):
        for name in list(layer.parametrizations):  # type: ignore[arg-type]
            parametrize.remove_parametrizations(layer, name, leave_parametrized=True)


@torch.no_grad()
def held(layer: nn.Module, name: str) -> Rounded | None:
    """The numbers that a weight of a layer stands at; None where it is not on a grid."""
    if not parametrize.is_parametrized(layer, name):
        return None
    parts: Any = layer.parametrizations[name]  # type: ignore[index]
    if not isinstance(parts[0], OnGrid):
        return None
    scales, grid = parts[0].scales, parts[0].grid
    flat = parts.original.flatten(1)
    if grid.is_bfloat16:
        return as_bfloat16(flat, scales.dtype)
    values = (flat / spread(scales, flat.shape[1], grid)).round().clamp(*RANGES[grid.bits])
    return Rounded(values.to(torch.int8), scales.clone(), grid)
