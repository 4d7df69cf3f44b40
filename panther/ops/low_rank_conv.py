"""A convolution of low rank: one to a few channels, and one of single places from there, without groups.

Notation: x (batch, in, *size) of one to three sizes, down (R, in, *kernel_size) and up (out, R, 1, ...) the factors, R
the rank, bias (out) or None.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from panther.ops import _kernels
from panther.ops._define import define, is_exported
from panther.ops._text import FLOATING, dtype_text, shape_text
from panther.ops._windows import (
    Sizes,
    TorchCall,
    are_plain,
    arguments,
    both_sides,
    check_windows,
    convolved,
    convolved_by_torch,
    fit,
    flops,
    gradients,
)
from panther.ops.conv import conv

# Few windows are copied side by side; pictures as they come in have few channels, which torch has kernels for; torch's
# own take a kernel's row at once where it is short, and windows that follow each other.
_FEW_WINDOWS, _IMAGE_CHANNELS, _MANY_CHANNELS = 28, 4, 1024
_LONG_ROW, _LARGE_PICTURE, _LARGE_LINE = 8, 512, 256
_MANY_SAMPLES, _FEW_COLUMNS = 16, 128  # torch multiplies single places of fewer samples, slowly where columns are few

_Geometry = tuple[Sizes, Sizes, Sizes]


def _single_places(dims: int) -> _Geometry:
    """The second convolution's stride, padding and dilation."""
    return [1] * dims, [0] * 2 * dims, [1] * dims


def reference(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, stride: Sizes, padding: Sizes, dilation: Sizes
) -> Tensor:
    """What `low_rank_conv` computes, in standard PyTorch operations."""
    check_windows("low_rank_conv", x, down.shape[2:], stride, padding, dilation)
    _check(x, down, up, bias)
    is_one = x.dim() < up.dim()  # with a batch between the two, as the kernel has it, the result has its strides
    inner = convolved(x.unsqueeze(0) if is_one else x, down, None, stride, padding, dilation)
    y = convolved(inner, up, bias, *_single_places(len(stride)))
    return y.squeeze(0) if is_one else y


def _check(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> None:
    """The compiled kernel refuses the same inputs in the same words (csrc/cpu/low_rank_conv.cpp)."""
    _check_shapes(x, down, up, bias)
    tensors = [x, down, up] + ([] if bias is None else [bias])
    if x.dtype not in FLOATING or any(tensor.dtype != x.dtype for tensor in tensors):
        got = ", ".join(map(dtype_text, tensors))
        raise ValueError(f"low_rank_conv: expected one floating-point dtype for x, down, up, bias; got {got}")
    if any(tensor.device != x.device for tensor in tensors):
        got = ", ".join(str(tensor.device) for tensor in tensors)
        raise ValueError(f"low_rank_conv: expected one device for x, down, up, bias; got {got}")


def _check_shapes(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> None:
    if not _shapes_fit(x.shape, down.shape, up.shape, None if bias is None else bias.shape):
        got = ", ".join(shape_text(tensor) for tensor in (x, down, up, bias))
        raise ValueError(
            "low_rank_conv: expected the shapes x (batch, in, *size) or (in, *size), down (R, in, *kernel_size), up "
            f"(out, R, 1, ...), bias (out) or None; got {got}"
        )


def _shapes_fit(x: Sizes, down: Sizes, up: Sizes, bias: Sizes | None) -> bool:
    if len(up) != len(down) or len(x) + 1 < len(down) or any(size != 1 for size in up[2:]):
        return False
    if min(*down[:1], *up[:1]) == 0:
        return False
    if bias is not None and tuple(bias) != tuple(up[:1]):
        return False
    return x[1 - len(down)] == down[1] and up[1] == down[0]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.geometry = inputs[4:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """What is between the convolutions is computed again: the forward keeps nothing but its inputs."""
    x, down, up = ctx.saved_tensors
    wants_x, wants_down, wants_up, wants_bias = ctx.needs_input_grad[:4]
    if not (wants_x or wants_down or wants_up):
        return None, None, None, grad.transpose(0, 1 - up.dim()).flatten(1).sum(1), None, None, None
    inner = convolved(x, down, None, *ctx.geometry)
    single = _single_places(len(ctx.geometry[0]))
    wants = (wants_x or wants_down, wants_up, wants_bias)
    of_inner, of_up, of_bias = gradients(grad, inner, up, single, wants)
    of_x = of_down = None
    if of_inner is not None:
        of_x, of_down, _ = gradients(of_inner, x, down, ctx.geometry, (wants_x, wants_down, False))
    return of_x, of_down, of_up, of_bias, None, None, None


def _flops(x: Sizes, down: Sizes, up: Sizes, bias: Sizes | None, *geometry: Sizes, **_: Any) -> int:
    first = flops(x, down[0], down[2:], *geometry)
    return first + first // max(1, math.prod(down[1:])) * up[0]


def _samples(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Inputs of odd sizes in one, two and three dimensions: few windows and more, views, no samples, no bias."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, generator=generator)

    generator = torch.Generator().manual_seed(0)
    return [
        (random(1, 3, 9), random(2, 3, 3), random(7, 2, 1), random(7), [2], [1, 1], [1]),
        (random(2, 2, 6, 7), random(3, 2, 3, 3), random(5, 3, 1, 1), random(5), [1, 1], [1, 0, 1, 0], [1, 2]),
        (random(3, 5, 6), random(5, 3, 3, 2), random(2, 5, 1, 1), None, [2, 1], [2, 1, 1, 0], [1, 1]),
        (
            random(1, 2, 3, 4, 3),
            random(2, 2, 2, 2, 2),
            random(4, 2, 1, 1, 1),
            random(4),
            [1, 1, 1],
            [0, 1, 0, 1, 1, 0],
            [1, 1, 1],
        ),
        (random(2, 5, 31), random(3, 5, 1), random(6, 3, 1), random(6), [1], [0, 0], [1]),
        (random(0, 2, 5), random(1, 2, 3), random(3, 1, 1), random(3), [1], [1, 1], [1]),
        (
            random(3, 8, 2).transpose(0, 2),
            random(8, 8, 3)[::2],
            random(12, 4, 1)[::2],
            random(12)[::2],
            [1],
            [0, 0],
            [1],
        ),
    ]


LOW_RANK_CONV = define(
    "low_rank_conv(Tensor x, Tensor down, Tensor up, Tensor? bias, int[] stride, int[] padding, int[] dilation) "
    "-> Tensor",
    reference=reference,
    setup_context=_setup_context,
    backward=_backward,
    samples=_samples,
    flops=_flops,
)


@functools.cache
def _instruction_set() -> str:
    kernels, _ = _kernels.load()
    return "none" if kernels is None else kernels.build_info()["instruction_set"]


@functools.lru_cache(1024)
def _torch_serves(
    x: Sizes, down: Sizes, up: Sizes, bias: Sizes | None, where: _Geometry, threads: int
) -> TorchCall | None:
    """How the first of two of torch's own convolutions is called, where they are faster; else None."""
    stride, padding, dilation = where
    sides = both_sides(padding, stride)
    is_faster = _torch_is_faster(x, down, up, bias, (stride, sides, dilation), threads)
    return arguments(stride, sides, dilation) if is_faster else None


def _torch_is_faster(x: Sizes, down: Sizes, up: Sizes, bias: Sizes | None, where: _Geometry, threads: int) -> bool:
    """Whether two of torch's own convolutions take less time than the op, with AVX2; no where shapes do not fit.

    Measured on Zen 3, one and two threads, batches of 1 and 8, ranks that keep a half and a quarter: the op is 1.0 to
    1.9 times as fast as they for single places with two threads, 0.9 to 1.2 times with one where channels become more,
    and 1.0 to 5 times for small pictures, short lines and long kernels; 0.6 to 1.1 times elsewhere. To be asked before
    the op, whose visit takes as long as a small convolution; with AVX-512 it was not measured, and the op decides.
    """
    stride, padding, dilation = where
    dims, taps = len(stride), math.prod(down[2:])
    is_known = _instruction_set() == "avx2" and fit(x, down[2:], stride, padding, dilation)
    if not is_known or not _shapes_fit(x, down, up, bias) or math.prod(x) == 0:
        return False
    channels, samples = down[1], x[0] if len(x) == dims + 2 else 1
    windows = flops(x, 1, down[2:], stride, padding, dilation) // (2 * channels * taps)
    if windows <= _FEW_WINDOWS:
        return False
    if taps == 1 and threads == 1:
        multiplies = samples < _MANY_SAMPLES and dims <= 2 and math.prod(stride) == 1  # torch does, as conv.h says
        return up[0] <= channels or (multiplies and windows // samples > _FEW_COLUMNS)
    if taps == 1:
        return channels >= _MANY_CHANNELS and samples > 1
    if dims > 1 and channels <= _IMAGE_CHANNELS:
        return True
    if channels % 8 != 0 or down[-1] >= _LONG_ROW:
        return False
    return windows // samples >= (_LARGE_PICTURE if dims > 1 else _LARGE_LINE)


def low_rank_conv(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
) -> Tensor:
    """A convolution with the kernel `down`, and of what it gives one with single places of `up`.

    padding: a number for each axis, or as many before all axes and then after all.

    Shapes: x (batch, in, *size) or (in, *size), down (R, in, *kernel_size), up (out, R, 1, ...), bias (out) or None
            -> (batch, out, *positions) or (out, *positions).
    Cost:   2*batch*positions*R*(in*kernel + out) flops.
    Raises: ValueError when shapes, sizes of windows, dtypes or devices do not fit together.
    """
    is_open = not is_exported() and not torch.compiler.is_compiling()
    trains = torch.is_grad_enabled() and (x.requires_grad or down.requires_grad or up.requires_grad)
    if is_open and not trains and are_plain(x, down, up, bias):
        offset, where = None if bias is None else bias.shape, (tuple(stride), tuple(padding), tuple(dilation))
        call = _torch_serves(x.shape, down.shape, up.shape, offset, where, torch.get_num_threads())
        if call is not None:
            return convolved_by_torch(convolved_by_torch(x, down, None, call), up, bias, ((), ()))
    sides = both_sides(padding, stride)
    single = _single_places(len(stride))
    if is_exported() or x.dtype not in FLOATING:
        return convolved(convolved(x, down, None, stride, sides, dilation), up, bias, *single)
    if is_open and trains:
        _check_shapes(x, down, up, bias)
        # They keep what is between them for the backward, which the op computes again.
        inner = conv(x, down, None, stride=stride, padding=sides, dilation=dilation)
        return conv(inner, up, bias, stride=single[0], padding=single[1], dilation=single[2])
    y: Tensor = LOW_RANK_CONV(x, down, up, bias, list(stride), sides, list(dilation))
    return y
