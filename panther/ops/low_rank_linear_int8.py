"""A linear layer whose two factors are whole numbers of eight bits with scales: a quarter of the bytes to read.

Notation: as in low_rank_linear, and for values and scales as in _quantised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from panther.ops._define import define, rows_of
from panther.ops._quantised import dequantised, scale_gradient, scales_fit
from panther.ops._text import FLOATING, dtype_text, shape_text


def reference(
    x: Tensor, down: Tensor, down_scales: Tensor, up: Tensor, up_scales: Tensor, bias: Tensor | None
) -> Tensor:
    """What `low_rank_linear_int8` computes, in standard PyTorch operations."""
    _check(x, down, down_scales, up, up_scales, bias)
    return F.linear(F.linear(x, dequantised(down, down_scales)), dequantised(up, up_scales), bias)


def _check(x: Tensor, down: Tensor, down_scales: Tensor, up: Tensor, up_scales: Tensor, bias: Tensor | None) -> None:
    """The compiled kernel refuses the same inputs in the same words (csrc/cpu/low_rank_linear_int8.cpp)."""
    given = (x, down, down_scales, up, up_scales, bias)
    tensors = [tensor for tensor in given if tensor is not None]
    name = "low_rank_linear_int8"
    if not _shapes_fit(*given):
        got = ", ".join(shape_text(tensor) for tensor in given)
        raise ValueError(
            f"{name}: expected the shapes x (..., in), down (R, in), its scales (R, groups), up (out, R), its scales "
            f"(out, groups), bias (out) or None, one group a row or one for 32, 64 or 128 numbers; got {got}"
        )
    like_x = [x, down_scales, up_scales] + ([] if bias is None else [bias])
    is_one = x.dtype in FLOATING and all(tensor.dtype == x.dtype for tensor in like_x)
    if not is_one or down.dtype != torch.int8 or up.dtype != torch.int8:
        got = ", ".join(dtype_text(tensor) for tensor in tensors)
        raise ValueError(f"{name}: expected int8 factors, and one floating-point dtype for x, scales, bias; got {got}")
    if any(tensor.device != x.device for tensor in tensors):
        got = ", ".join(str(tensor.device) for tensor in tensors)
        raise ValueError(f"{name}: expected one device for all tensors; got {got}")


def _shapes_fit(
    x: Tensor, down: Tensor, down_scales: Tensor, up: Tensor, up_scales: Tensor, bias: Tensor | None
) -> bool:
    for values, scales in ((down, down_scales), (up, up_scales)):
        if not scales_fit(values, scales, values.shape[-1] if values.dim() else 0):
            return False
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != up.shape[0]):
        return False
    return bool(x.dim() >= 1 and x.shape[-1] == down.shape[1] and down.shape[0] == up.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps what F.linear keeps: models may change in place what no gradient needs."""
    x, down, down_scales, up, up_scales, _ = inputs
    wants_x, _, wants_down, _, wants_up = ctx.needs_input_grad[:5]
    wants = wants_x or wants_down or wants_up
    stored = (down, down_scales, up, up_scales) if wants else (None,) * 4
    ctx.save_for_backward(x if wants_down or wants_up else None, *stored)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, both scales and the bias; the int8 values have none."""
    x, down, down_scales, up, up_scales = ctx.saved_tensors
    wants_x, _, wants_down, _, wants_up, wants_bias = ctx.needs_input_grad
    grad_rows, rows = rows_of(grad), None if x is None else rows_of(x)
    wide_down = dequantised(down, down_scales) if wants_x or wants_up else None
    inner = grad_rows @ dequantised(up, up_scales) if wants_x or wants_down else None  # gradient of x down^T, (rows, R)
    return (
        (inner @ wide_down).reshape(*grad.shape[:-1], down.shape[1])
        if wants_x and inner is not None and wide_down is not None
        else None,
        None,
        scale_gradient(inner.T @ rows, down, down_scales)
        if wants_down and inner is not None and rows is not None
        else None,
        None,
        scale_gradient(grad_rows.T @ (rows @ wide_down.T), up, up_scales)
        if wants_up and wide_down is not None and rows is not None
        else None,
        grad_rows.sum(0) if wants_bias else None,
    )


def _samples(dtype: torch.dtype) -> list[tuple[Tensor | None, ...]]:
    """Inputs of odd sizes: one scale a row or several, no rows, views that are no copies, with and without bias."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, generator=generator)

    def factor(rows: int, columns: int, groups: int) -> tuple[Tensor, Tensor]:
        values = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)
        return values, torch.rand(rows, groups, dtype=dtype, generator=generator) / 64

    generator = torch.Generator().manual_seed(0)
    down, down_scales = factor(12, 3, 1)
    return [
        (random(1, 13), *factor(3, 13, 1), *factor(7, 3, 1), random(7)),
        (random(5, 39), *factor(33, 39, 2), *factor(1, 33, 2), None),
        (random(2, 9, 70), *factor(4, 70, 2), *factor(3, 4, 1), random(3)),
        (random(17), *factor(5, 17, 1), *factor(8, 5, 1), random(8)),
        (random(0, 6), *factor(2, 6, 1), *factor(5, 2, 1), random(5)),
        (random(12, 3).T, down.T, down_scales[:3], *factor(18, 3, 1), random(36)[::2]),
    ]


def _flops(
    x: Sequence[int], down: Sequence[int], down_scales: Sequence[int], up: Sequence[int], *_: Any, **__: Any
) -> int:
    return 2 * math.prod(x[:-1]) * (math.prod(down) + math.prod(up))


LOW_RANK_LINEAR_INT8 = define(
    "low_rank_linear_int8(Tensor x, Tensor down, Tensor down_scales, Tensor up, Tensor up_scales, Tensor? bias)"
    " -> Tensor",
    reference=reference,
    setup_context=_setup_context,
    backward=_backward,
    samples=_samples,
    flops=_flops,
)


def low_rank_linear_int8(
    x: Tensor, down: Tensor, down_scales: Tensor, up: Tensor, up_scales: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`low_rank_linear` with factors that `quantised` made: low_rank_linear(x, down * scales, up * scales, bias).

    Shapes: x (..., in), down int8 (R, in), down_scales (R, groups), up int8 (out, R), up_scales (out, groups), bias
            (out) or None -> (..., out).
    Cost:   2*rows*R*(in + out) flops; on a CPU the factors are never widened as a whole.
    Raises: ValueError when shapes, dtypes or devices do not fit together.
    """
    y: Tensor = LOW_RANK_LINEAR_INT8(x, down, down_scales, up, up_scales, bias)
    return y
