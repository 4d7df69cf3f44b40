"""What the ops that convolve share: which windows fit, what they cost, and their gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from panther.ops import _kernels
from panther.ops._text import shape_text

CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

SMALL = 1 << 24

_PLAIN = (Tensor, torch.nn.Parameter)

Sizes = Sequence[int]


def check_windows(name: str, x: Tensor, kernel_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> None:
    """The compiled kernels refuse the same inputs in the same words (csrc/conv.h)."""
    if not fit(x.shape, kernel_size, stride, padding, dilation):
        lists = ", ".join(str(list(sizes)) for sizes in (kernel_size, stride, dilation, padding))
        raise ValueError(
            f"{name}: expected x (batch, channels, *size) or (channels, *size) of one to three sizes, for each of them "
            "a positive kernel_size, stride and dilation, and what is padded before all and after all of them, of "
            f"windows that fit; got {shape_text(x)}, {lists}"
        )


def fit(x: Sizes, kernel_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> bool:
    """Whether there are such windows in a tensor of the shape x."""
    dims = len(kernel_size)
    if dims not in CONVOLVE or len(x) - dims not in (1, 2) or len(padding) != 2 * dims or min(padding) < 0:
        return False
    if x[-1 - dims] == 0:
        return False
    return len(stride) == len(dilation) == dims and all(
        size > 0 and kernel > 0 and step > 0 and apart > 0 and apart * (kernel - 1) < size + before + after
        for size, kernel, step, apart, before, after in zip(
            x[-dims:], kernel_size, stride, dilation, padding[:dims], padding[dims:], strict=True
        )
    )


def trains_little(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's own convolution trains faster than an op, whose visit to a backward in Python takes 90 us.

    A convolution of SMALL multiplications gains so much at best.
    """
    if not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
        return False
    return x.numel() * weight.shape[0] * math.prod(weight.shape[2:]) < SMALL


TorchCall: TypeAlias = tuple[tuple[Any, ...], tuple[int, ...]]  # arguments after the bias, and what F.pad adds before


@functools.lru_cache(1024)
def torch_serves(
    x: Sizes, weight: Sizes, bias: Sizes | None, stride: Sizes, padding: Sizes, dilation: Sizes, _threads: int
) -> TorchCall | None:
    """How torch's own convolution is called, where it serves plain inputs of these sizes in less time than the op.

    To be asked before the op, whose visit takes as long as a small convolution. None where the op serves them better,
    or refuses them.
    """
    kernels, _ = _kernels.load()
    dims, sides = len(stride), both_sides(padding, stride)
    if kernels is None or len(weight) != dims + 2:
        return None
    batched = tuple(x) if len(x) != dims + 1 else (1, *x)
    fits = len(batched) == dims + 2 and batched[1] == weight[1] and weight[0] > 0
    if not fits or (bias is not None and tuple(bias) != (weight[0],)):
        return None
    try:
        leaves = kernels.torch_convolves(batched, weight[0], tuple(weight[2:]), stride, sides, dilation)
    except TypeError:  # sizes that are no integers, which the op refuses
        return None
    return arguments(stride, sides, dilation) if leaves else None


def arguments(stride: Sizes, sides: Sizes, dilation: Sizes) -> TorchCall:
    """Those of F.conv2d after the bias, up to the last that is not its default, and what is to be padded before it.

    Three lists that say the same take 0.7 us longer to read, of the 5 us of a tiny convolution.
    """
    common, more = _split(sides)
    sizes = [sizes[0] if len(set(sizes)) == 1 else tuple(sizes) for sizes in (stride, common, dilation)]
    while sizes and sizes[-1] == (1, 0, 1)[len(sizes) - 1]:
        sizes.pop()
    return tuple(sizes), tuple(more) if any(more) else ()


def convolved_by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, call: TorchCall) -> Tensor:
    """torch's own convolution, called as `torch_serves` says."""
    given, more = call
    result: Tensor = CONVOLVE[weight.dim() - 2](F.pad(x, more) if more else x, weight, bias, *given)
    return result


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether all that are there are float32 on a CPU, with numbers in them and sizes that are no symbols."""
    return all(t is None or (type(t) in _PLAIN and t.dtype == torch.float32 and t.is_cpu) for t in tensors)


def both_sides(padding: Sizes, stride: Sizes) -> list[int]:
    """Padding as the ops take it, before all axes and then after all; a number for each axis is both."""
    return [*padding, *padding] if len(padding) == len(stride) else list(padding)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes, padding: Sizes, dilation: Sizes) -> Tensor:
    """torch's own convolution."""
    common, more = _split(padding)
    result: Tensor = CONVOLVE[len(stride)](_padded(x, more), weight, bias, stride, common, dilation)
    return result


def _split(padding: Sizes) -> tuple[list[int], list[int]]:
    """What is padded on both sides of each axis, and what F.pad must add to that."""
    dims = len(padding) // 2
    common = [min(pair) for pair in zip(padding[:dims], padding[dims:], strict=True)]
    more = [padding[i + side * dims] - common[i] for i in reversed(range(dims)) for side in (0, 1)]
    return common, more


def _padded(x: Tensor, more: Sizes) -> Tensor:
    return F.pad(x, list(more)) if any(more) else x


def gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: tuple[Sizes, Sizes, Sizes],
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of x, weight and bias that are wanted. geometry: stride, padding, dilation."""
    stride, padding, dilation = geometry
    if x.dim() == len(stride) + 1:
        of_x, of_weight, of_bias = gradients(grad.unsqueeze(0), x.unsqueeze(0), weight, geometry, wants)
        return None if of_x is None else of_x.squeeze(0), of_weight, of_bias
    common, more = _split(padding)
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        grad, _padded(x, more), weight, None, stride, common, dilation, False, [0] * len(stride), 1, (*wants[:2], False)
    )
    of_bias = grad.transpose(0, 1).flatten(1).sum(1) if wants[2] else None
    return _padded(of_x, [-m for m in more]) if wants[0] else None, of_weight if wants[1] else None, of_bias


def flops(x: Sizes, out: int, kernel_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> int:
    """Of one run, from the shape of x."""
    dims = len(stride)
    windows: Iterator[int] = (
        (size + before + after - apart * (kernel - 1) - 1) // step + 1
        for size, kernel, step, apart, before, after in zip(
            x[-dims:], kernel_size, stride, dilation, padding[:dims], padding[dims:], strict=True
        )
    )
    return 2 * math.prod(x[:-dims]) * math.prod(windows) * out * math.prod(kernel_size)
