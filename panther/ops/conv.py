"""A convolution without groups: F.conv1d, conv2d, conv3d, with a kernel where torch's own ones are slow.

Notation: x (batch, in, *size) of one to three sizes, weight (out, in, *kernel_size), bias (out) or None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from panther.ops._define import define, is_exported
from panther.ops._text import FLOATING, dtype_text, shape_text
from panther.ops._windows import (
    Sizes,
    are_plain,
    both_sides,
    check_windows,
    convolved,
    convolved_by_torch,
    flops,
    gradients,
    torch_serves,
    trains_little,
)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes, padding: Sizes, dilation: Sizes) -> Tensor:
    """What `conv` computes, in standard PyTorch operations."""
    check_windows("conv", x, weight.shape[2:], stride, padding, dilation)
    _check(x, weight, bias)
    return convolved(x, weight, bias, stride, padding, dilation)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The compiled kernel refuses the same inputs in the same words (csrc/cpu/conv.cpp)."""
    fits = x.shape[1 - weight.dim()] == weight.shape[1] and weight.shape[0] > 0
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        got = ", ".join(shape_text(tensor) for tensor in (x, weight, bias))
        raise ValueError(
            "conv: expected the shapes x (batch, in, *size) or (in, *size), weight (out, in, *kernel_size), bias (out) "
            f"or None; got {got}"
        )
    tensors = [x, weight] + ([] if bias is None else [bias])
    if x.dtype not in FLOATING or any(tensor.dtype != x.dtype for tensor in tensors):
        got = ", ".join(map(dtype_text, tensors))
        raise ValueError(f"conv: expected one floating-point dtype for x, weight, bias; got {got}")
    if any(tensor.device != x.device for tensor in tensors):
        got = ", ".join(str(tensor.device) for tensor in tensors)
        raise ValueError(f"conv: expected one device for x, weight, bias; got {got}")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.geometry = inputs[3:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    return (*gradients(grad, x, weight, ctx.geometry, ctx.needs_input_grad[:3]), None, None, None)


def _flops(x: Sizes, weight: Sizes, bias: Sizes | None, *geometry: Sizes, **_: Any) -> int:
    return flops(x, weight[0], weight[2:], *geometry)


def _samples(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Inputs of odd sizes in one, two and three dimensions: few windows and more, views, no samples, no bias."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, generator=generator)

    generator = torch.Generator().manual_seed(0)
    return [
        (random(1, 3, 9), random(7, 3, 3), random(7), [2], [1, 1], [1]),
        (random(2, 2, 6, 7), random(3, 2, 3, 3), random(3), [1, 1], [1, 0, 1, 0], [1, 2]),
        (random(3, 5, 6), random(5, 3, 3, 2), None, [2, 1], [2, 1, 1, 0], [1, 1]),
        (random(1, 2, 3, 4, 3), random(4, 2, 2, 2, 2), random(4), [1, 1, 1], [0, 1, 0, 1, 1, 0], [1, 1, 1]),
        (random(2, 5, 31), random(6, 5, 1), random(6), [1], [0, 0], [1]),
        (random(0, 2, 5), random(3, 2, 3), random(3), [1], [1, 1], [1]),
        (random(3, 8, 2).transpose(0, 2), random(8, 8, 3)[::2], random(8)[::2], [1], [0, 0], [1]),
    ]


CONV = define(
    "conv(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation) -> Tensor",
    reference=reference,
    setup_context=_setup_context,
    backward=_backward,
    samples=_samples,
    flops=_flops,
)


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: Sizes, padding: Sizes, dilation: Sizes
) -> Tensor:
    """F.conv1d, conv2d or conv3d, whichever fits the weight, within rounding.

    padding: a number for each axis, or as many before all axes and then after all.

    Shapes: x (batch, in, *size) or (in, *size), weight (out, in, *kernel_size), bias (out) or None
            -> (batch, out, *positions) or (out, *positions).
    Cost:   2*batch*positions*out*in*kernel flops.
    Raises: ValueError when shapes, sizes of windows, dtypes or devices do not fit together.
    """
    is_open = not is_exported() and not torch.compiler.is_compiling()
    if is_open and are_plain(x, weight, bias):
        offset, where = None if bias is None else bias.shape, (tuple(stride), tuple(padding), tuple(dilation))
        call = torch_serves(x.shape, weight.shape, offset, *where, torch.get_num_threads())
        if call is not None:
            return convolved_by_torch(x, weight, bias, call)
    sides = both_sides(padding, stride)
    if x.dtype not in FLOATING or (trains_little(x, weight) if is_open else is_exported()):
        return convolved(x, weight, bias, stride, sides, dilation)
    y: Tensor = CONV(x, weight, bias, list(stride), sides, list(dilation))
    return y
