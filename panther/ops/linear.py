"""A dense linear layer: F.linear, with a kernel for processors on which torch's own product is slow.

Notation: x (..., in) the input, weight (out, in), bias (out) or None, y (..., out) the output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from panther.ops._define import define, rows_of
from panther.ops._text import FLOATING, dtype_text, shape_text


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `linear` computes, in standard PyTorch operations."""
    _check(x, weight, bias)
    return F.linear(x, weight, bias)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The compiled kernel refuses the same inputs in the same words (csrc/cpu/linear.cpp)."""
    fits = x.dim() >= 1 and weight.dim() == 2 and x.shape[-1] == weight.shape[1]
    if not fits or (bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0])):
        got = ", ".join(shape_text(tensor) for tensor in (x, weight, bias))
        raise ValueError(f"linear: expected the shapes x (..., in), weight (out, in), bias (out) or None; got {got}")
    tensors = [x, weight] + ([] if bias is None else [bias])
    if x.dtype not in FLOATING or any(tensor.dtype != x.dtype for tensor in tensors):
        got = ", ".join(map(dtype_text, tensors))
        raise ValueError(f"linear: expected one floating-point dtype for x, weight, bias; got {got}")
    if any(tensor.device != x.device for tensor in tensors):
        got = ", ".join(str(tensor.device) for tensor in tensors)
        raise ValueError(f"linear: expected one device for x, weight, bias; got {got}")


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    """Keeps what F.linear keeps: models may change in place what no gradient needs."""
    x, weight, _ = inputs
    wants_x, wants_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad
    grad_rows = rows_of(grad)
    return (
        linear(grad_rows, weight.T).reshape(*grad.shape[:-1], weight.shape[1]) if wants_x else None,
        linear(grad_rows.T, rows_of(x).T) if wants_weight else None,
        grad_rows.sum(0) if wants_bias else None,
    )


def _samples(dtype: torch.dtype) -> list[tuple[Tensor | None, ...]]:
    """Inputs of odd sizes: x of several dimensions, no rows, views that are not contiguous, with and without bias."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, generator=generator)

    generator = torch.Generator().manual_seed(0)
    return [
        (random(1, 13), random(7, 13), random(7)),
        (random(5, 19), random(1, 19), None),
        (random(2, 9, 11), random(3, 11), random(3)),
        (random(17), random(8, 17), random(8)),
        (random(0, 6), random(5, 6), random(5)),
        (random(37, 21), random(50, 21), random(50)),
        (random(12, 3).T, random(12, 9).T, random(18)[::2]),
        (random(20, 34)[:, 3:20], random(40, 40)[::2, 4:38:2], None),
    ]


def _flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * math.prod(weight)


LINEAR = define(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    reference=reference,
    setup_context=_setup_context,
    backward=_backward,
    samples=_samples,
    flops=_flops,
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias: what F.linear gives, within rounding.

    Shapes: x (..., in), weight (out, in), bias (out) or None -> (..., out).
    Cost:   2*rows*in*out flops.
    Raises: ValueError when shapes, dtypes or devices do not fit together.
    """
    y: Tensor = LINEAR(x, weight, bias)
    return y
