"""The fast Walsh-Hadamard transform: the rotation without multiplications that spreads energy evenly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from panther.ops._define import define
from panther.ops._text import FLOATING, dtype_text, shape_text


def reference(x: Tensor) -> Tensor:
    """What `hadamard` computes, in standard PyTorch operations. The 16-bit types are float32 on the way."""
    _check(x)
    n = x.shape[-1]
    y: Tensor = (x.float() if x.dtype.itemsize == 2 else x).contiguous() * n**-0.5
    half = n // 2
    while half:
        pairs = y.reshape(-1, 2, half)
        y = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1)
        half //= 2
    return y.reshape(x.shape).to(x.dtype)


def _check(x: Tensor) -> None:
    """The compiled kernel refuses the same inputs in the same words (csrc/cpu/hadamard.cpp)."""
    n = x.shape[-1] if x.dim() else 0
    if n < 1 or n & (n - 1):
        raise ValueError(f"hadamard: expected the shape x (..., n) with n a power of two; got {shape_text(x)}")
    if x.dtype not in FLOATING:
        raise ValueError(f"hadamard: expected float32, float64, bfloat16 or float16; got {dtype_text(x)}")


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    """The backward needs no input: the transform is linear."""


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    """The transform is symmetric, so that it is its own backward."""
    result: Tensor = HADAMARD(grad)
    return result


def _samples(dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    """Inputs of many sizes: one number, no rows, several dimensions, views that are not contiguous."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, generator=generator)

    generator = torch.Generator().manual_seed(0)
    return [
        (random(3, 8),),
        (random(5, 1),),
        (random(2),),
        (random(0, 4),),
        (random(2, 3, 16),),
        (random(4, 7).T,),
        (random(3, 64)[:, ::2],),
    ]


def _flops(x: Sequence[int], **_: Any) -> int:
    return math.prod(x) * int(math.log2(x[-1]))


HADAMARD = define(
    "hadamard(Tensor x) -> Tensor",
    reference=reference,
    setup_context=_setup_context,
    backward=_backward,
    samples=_samples,
    flops=_flops,
)


def hadamard(x: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of the last dimension, in Sylvester's order; it is its own inverse.

    Shapes: x (..., n), n a power of two -> (..., n).
    Cost:   n*log2(n) additions a row, where a product with the matrix has n*n.
    Raises: ValueError when n is no power of two, or x holds no floating numbers.
    """
    result: Tensor = HADAMARD(x)
    return result
