"""The terms of healed layers put back in the order of their importance.

Training mixes the ranks of a layer. On the calibration data z = down x has some covariance Z; the new ranks are the
principal directions of up Z up^T, largest first, so that the first terms alone are again the best smaller layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from panther.batches import Call, inference, masked_rows, run
from panther.chains import TWO_GEMM
from panther.nn import SketchedLayer, SKLinear
from panther.nn.on_grid import is_held
from panther.products import gram
from panther.sketches import with_ridge

RIDGE = 1e-6
ROWS = 4096  # of each call


def reorder(student: nn.Module, calls: Sequence[Call]) -> list[str]:
    """Re-order the ranks of every layer of two links, in place; what the layers compute stays as it is.

    Returns the names of the layers. One whose inputs the calls never reach keeps its order.
    """
    layers = {
        name: module
        for name, module in student.named_modules()
        if isinstance(module, SketchedLayer) and module.PACKING == TWO_GEMM and len(module.ranks) == 1
        if hasattr(module, "up") and not is_held(module)  # a random basis has none; a grid would lose new rounding
    }
    sums: dict[str, Tensor] = {}
    masks: dict[tuple[int, ...], Tensor] = {}

    def see(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
            rows = _inner_rows(layer, args[0] if args else kwargs["input"], masks)
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float32)) + gram(rows)

        return hook

    hooks = [m.register_forward_hook(see(name), with_kwargs=True) for name, m in layers.items()]
    try:
        with inference(student):
            for call in calls:
                masks = {shape: mask.cpu() for shape, mask in call.masks().items()}
                run(student, call)
    finally:
        for one in hooks:
            one.remove()
    for name, products in sums.items():
        _turn(layers[name], products.double())
    return list(sums)


def _inner_rows(layer: SketchedLayer, given: Tensor, masks: dict[tuple[int, ...], Tensor]) -> Tensor:
    """What the first link makes of an input, (rows, rank)."""
    if isinstance(layer, SKLinear):
        return masked_rows(nn.functional.linear(given, layer.down).float().cpu(), masks)
    link = layer._links[0]
    given = cast(Any, layer)._padded(given)
    inner: Tensor = cast(Any, layer).CONVOLVE(given, layer.down, None, link.stride, link.padding, link.dilation)
    rows = inner.movedim(-1 - len(link.kernel_size), -1).reshape(-1, link.out_channels)
    some: Tensor = rows[:: max(1, len(rows) // ROWS)].float().cpu()
    return some


@torch.no_grad()
def _turn(layer: SketchedLayer, products: Tensor) -> None:
    if not (math.isfinite(trace := float(products.trace())) and trace > 0):
        return
    lower = with_ridge(products, RIDGE)  # Z = L L^T, so that L^-1 z is white
    up = layer.up.detach().double().cpu().movedim(1, -1)  # (m, *kernel, rank)
    whitened = up @ lower
    flat = whitened.reshape(-1, whitened.shape[-1])
    turn = torch.linalg.eigh(flat.T @ flat).eigenvectors.flip(1)
    down = layer.down.detach().double().cpu()
    new_down = turn.T @ torch.linalg.solve_triangular(lower, down.flatten(1), upper=False)
    new_up = whitened @ turn
    balance = (new_up.norm() / new_down.norm().clamp_min(1e-30)).sqrt().clamp_min(1e-15)
    layer.down.copy_((new_down * balance).reshape(down.shape))
    layer.up.copy_((new_up / balance).movedim(-1, 1))
