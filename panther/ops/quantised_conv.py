"""A convolution whose weight is whole numbers of eight or four bits with scales, or bfloat16: see quantised_linear.

Without groups. Notation: x (batch, channels, *size) of one to three sizes,
W (out, channels * the numbers of kernel_size) in values and scales as _quantised stores them, bias (out).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from panther.ops._define import define, is_exported
from panther.ops._quantised import check_types, dequantised, packed_int4, scale_gradient, scales_fit
from panther.ops._text import shape_text
from panther.ops._windows import Sizes, both_sides, check_windows, convolved, flops, gradients


def reference(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    kernel_size: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
) -> Tensor:
    """What `quantised_conv` computes, in standard PyTorch operations."""
    check_windows("quantised_conv", x, kernel_size, stride, padding, dilation)
    _check(x, values, scales, bias, kernel_size)
    return convolved(x, _weight(x, values, scales, kernel_size), bias, stride, padding, dilation)


def _weight(x: Tensor, values: Tensor, scales: Tensor, kernel_size: Sizes) -> Tensor:
    shape = (values.shape[0], x.shape[-1 - len(kernel_size)], *kernel_size)
    return dequantised(values, scales, math.prod(shape[1:])).reshape(shape)


def _check(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, kernel_size: Sizes) -> None:
    """The compiled kernel refuses the same inputs in the same words (csrc/cpu/quantised_conv.cpp)."""
    name = "quantised_conv"
    if not _shapes_fit(values, scales, bias, x.shape[-1 - len(kernel_size)] * math.prod(kernel_size)):
        got = ", ".join(shape_text(tensor) for tensor in (x, values, scales, bias))
        raise ValueError(
            f"{name}: expected the shapes x (batch, channels, *size) or (channels, *size), values (out, in) of int8 or "
            "int16 or (out, ceil(in / 2)) of uint8 with in = channels times the numbers of kernel_size, scales (out, "
            "groups), bias (out) or None, one group a row or one for 32, 64 or 128 numbers, and none with int16; got "
            f"{got} and {list(kernel_size)}"
        )
    check_types(name, x, values, scales, bias)


def _shapes_fit(values: Tensor, scales: Tensor, bias: Tensor | None, columns: int) -> bool:
    if not scales_fit(values, scales, columns) or values.shape[0] == 0:
        return False
    stored = -(-columns // 2) if values.dtype == torch.uint8 else columns
    return bool(values.shape[1] == stored and (bias is None or (bias.dim() == 1 and bias.shape[0] == values.shape[0])))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.geometry = inputs[4:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, the scales and the bias; the values have none."""
    x, values, scales = ctx.saved_tensors
    kernel_size, *geometry = ctx.geometry
    wants_x, _, wants_scales, wants_bias = ctx.needs_input_grad[:4]
    weight = _weight(x, values, scales, kernel_size)
    of_x, of_weight, of_bias = gradients(grad, x, weight, tuple(geometry), (wants_x, wants_scales, wants_bias))
    of_scales = None if of_weight is None else scale_gradient(of_weight.flatten(1), values, scales)
    return (of_x, None, of_scales, of_bias, None, None, None, None)


def _flops(x: Sizes, values: Sizes, scales: Sizes, bias: Sizes | None, *geometry: Sizes, **_: Any) -> int:
    return flops(x, values[0], *geometry)


def _samples(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Inputs of odd sizes in one, two and three dimensions, in all storages: no batch, views, no samples."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, generator=generator)

    def weight(rows: int, columns: int, groups: int, bits: int) -> tuple[Tensor, Tensor]:
        if bits == 16:
            return torch.randn((rows, columns), generator=generator).bfloat16().view(torch.int16), random(rows, 0)
        most = 2 ** (bits - 1)
        values = torch.randint(-most, most, (rows, columns), dtype=torch.int8, generator=generator)
        scales = torch.rand(rows, groups, dtype=dtype, generator=generator) / most
        return packed_int4(values) if bits == 4 else values, scales

    generator = torch.Generator().manual_seed(0)
    return [
        (random(1, 3, 9), *weight(7, 9, 1, 8), random(7), [3], [2], [1, 1], [1]),
        (random(2, 2, 6, 7), *weight(3, 18, 1, 4), random(3), [3, 3], [1, 1], [1, 0, 1, 0], [1, 2]),
        (random(3, 5, 6), *weight(5, 18, 1, 16), None, [3, 2], [2, 1], [2, 1, 1, 0], [1, 1]),
        (random(1, 2, 3, 4, 3), *weight(4, 16, 1, 8), random(4), [2, 2, 2], [1, 1, 1], [0, 1, 0, 1, 1, 0], [1, 1, 1]),
        (random(1, 39, 2), *weight(3, 39, 2, 4), None, [1], [1], [0, 0], [1]),
        (random(0, 2, 5), *weight(3, 6, 1, 8), random(3), [3], [1], [1, 1], [1]),
        (random(3, 8, 2).transpose(0, 2), *weight(2, 24, 1, 8), random(4)[::2], [3], [1], [0, 0], [1]),
    ]


QUANTISED_CONV = define(
    "quantised_conv(Tensor x, Tensor values, Tensor scales, Tensor? bias, int[] kernel_size, int[] stride, "
    "int[] padding, int[] dilation) -> Tensor",
    reference=reference,
    setup_context=_setup_context,
    backward=_backward,
    samples=_samples,
    flops=_flops,
)


def quantised_conv(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_size: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
) -> Tensor:
    """F.conv1d, conv2d or conv3d with a weight of eight bits, of four that `packed_int4` stored, or bfloat16.

    padding: a number for each axis, or as many before all axes and then after all.

    Shapes: x (batch, channels, *size) or (channels, *size); with in = channels times the numbers of kernel_size, in the
            order of a flattened weight: values int8 (out, in), uint8 (out, ceil(in / 2)) or int16 (out, in), the bits
            of bfloat16 numbers, scales (out, groups), with int16 (out, 0), bias (out) or None
            -> (batch, out, *positions) or (out, *positions).
    Cost:   2*batch*positions*in*out flops; on a CPU the weight is never widened as a whole.
    Raises: ValueError when shapes, sizes of windows, dtypes or devices do not fit together.
    """
    sides = both_sides(padding, stride)
    if is_exported():
        return convolved(x, _weight(x, values, scales, kernel_size), bias, stride, sides, dilation)
    y: Tensor = QUANTISED_CONV(x, values, scales, bias, list(kernel_size), list(stride), sides, list(dilation))
    return y
