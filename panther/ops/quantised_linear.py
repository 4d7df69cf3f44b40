"""A linear layer whose weight is whole numbers of eight or four bits with scales: a quarter or an eighth of the bytes.

Or of bfloat16 numbers, whose bits are int16 values without scales: half of the bytes.

Notation: x (..., in), W (out, in) in values and scales as _quantised stores them, bias (out).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from panther.ops._define import define, rows_of
from panther.ops._quantised import check_types, dequantised, packed_int4, scale_gradient, scales_fit
from panther.ops._text import shape_text


def reference(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """What `quantised_linear` computes, in standard PyTorch operations."""
    _check(x, values, scales, bias)
    return F.linear(x, dequantised(values, scales, x.shape[-1]), bias)


def _check(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None) -> None:
    """The compiled kernel refuses the same inputs in the same words (csrc/cpu/quantised_linear.cpp)."""
    name = "quantised_linear"
    if not _shapes_fit(x, values, scales, bias):
        got = ", ".join(shape_text(tensor) for tensor in (x, values, scales, bias))
        raise ValueError(
            f"{name}: expected the shapes x (..., in), values (out, in) of int8 or (out, ceil(in / 2)) of uint8, "
            "scales (out, groups), bias (out) or None, one group a row or one for 32, 64 or 128 numbers, and with "
            f"values (out, in) of int16, the bits of bfloat16, no groups; got {got}"
        )
    check_types(name, x, values, scales, bias)


def _shapes_fit(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None) -> bool:
    if x.dim() < 1 or not scales_fit(values, scales, x.shape[-1]):
        return False
    stored = -(-x.shape[-1] // 2) if values.dtype == torch.uint8 else x.shape[-1]
    return bool(values.shape[1] == stored and (bias is None or (bias.dim() == 1 and bias.shape[0] == values.shape[0])))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps what F.linear keeps: models may change in place what no gradient needs."""
    x, values, scales, _ = inputs
    wants_x, _, wants_scales = ctx.needs_input_grad[:3]
    ctx.columns = x.shape[-1]
    stored = (values, scales) if wants_x or wants_scales else (None, None)
    ctx.save_for_backward(x if wants_scales else None, *stored)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, the scales and the bias; the values have none."""
    x, values, scales = ctx.saved_tensors
    wants_x, _, wants_scales, wants_bias = ctx.needs_input_grad
    grad_rows = rows_of(grad)
    return (
        (grad_rows @ dequantised(values, scales, ctx.columns)).reshape(*grad.shape[:-1], ctx.columns)
        if wants_x
        else None,
        None,
        scale_gradient(grad_rows.T @ rows_of(x), values, scales) if wants_scales else None,
        grad_rows.sum(0) if wants_bias else None,
    )


def _flops(x: Sequence[int], values: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * values[0]


def _samples(dtype: torch.dtype) -> list[tuple[Tensor | None, ...]]:
    """Inputs of odd sizes, in both storages: one scale a row or several, no rows, views that are no copies."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, generator=generator)

    def weight(rows: int, columns: int, groups: int, bits: int) -> tuple[Tensor, Tensor]:
        most = 2 ** (bits - 1)
        values = torch.randint(-most, most, (rows, columns), dtype=torch.int8, generator=generator)
        scales = torch.rand(rows, groups, dtype=dtype, generator=generator) / most
        return packed_int4(values) if bits == 4 else values, scales

    def short(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        numbers = torch.randn((rows, columns), generator=generator).bfloat16()
        return numbers.view(torch.int16), torch.empty(rows, 0, dtype=dtype)

    generator = torch.Generator().manual_seed(0)
    values, scales = weight(12, 9, 1, 8)
    four, four_scales = weight(9, 12, 1, 4)
    return [
        (random(1, 13), *weight(7, 13, 1, 4), random(7)),
        (random(1, 13), *weight(7, 13, 1, 8), random(7)),
        (random(5, 39), *weight(11, 39, 2, 4), None),
        (random(2, 9, 70), *weight(3, 70, 2, 8), random(3)),
        (random(2, 3, 65), *weight(4, 65, 3, 4), random(4)),
        (random(17), *weight(5, 17, 1, 8), random(5)),
        (random(0, 6), *weight(2, 6, 1, 4), random(2)),
        (random(12, 3).T, values.T, scales[:9], random(18)[::2]),
        (random(12, 3).T, four.T.contiguous().T, four_scales, random(18)[::2]),
        (random(1, 13), *short(7, 13), random(7)),
        (random(2, 9, 70), *short(3, 70), None),
        (random(0, 6), *short(2, 6), random(2)),
        (random(12, 3).T, short(12, 9)[0].T, short(9, 3)[1], random(18)[::2]),
    ]


QUANTISED_LINEAR = define(
    "quantised_linear(Tensor x, Tensor values, Tensor scales, Tensor? bias) -> Tensor",
    reference=reference,
    setup_context=_setup_context,
    backward=_backward,
    samples=_samples,
    flops=_flops,
)


def quantised_linear(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear with a weight of eight bits from `quantised`, of four that `packed_int4` stored, or of bfloat16.

    Shapes: x (..., in), values int8 (out, in), uint8 (out, ceil(in / 2)) or int16 (out, in), the bits of bfloat16
            numbers, scales (out, groups), with int16 (out, 0), bias (out) or None -> (..., out).
    Cost:   2*rows*in*out flops; on a CPU the weight is never widened as a whole.
    Raises: ValueError when shapes, dtypes or devices do not fit together.
    """
    y: Tensor = QUANTISED_LINEAR(x, values, scales, bias)
    return y
