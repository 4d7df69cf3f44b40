"""A linear layer whose weight is the product of two thin matrices.

Notation: x (..., in) the input, down (R, in) and up (out, R) the factors, R the rank, y (..., out) the output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from panther.ops._define import autocasts, define, rows_of
from panther.ops._text import dtype_text, shape_text


def reference(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    """What `low_rank_linear` computes, in standard PyTorch operations."""
    _check(x, down, up, bias)
    return F.linear(F.linear(x, down), up, bias)


def _check(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> None:
    """The compiled kernel refuses the same inputs in the same words (csrc/low_rank_linear.h)."""
    tensors = [x, down, up] + ([] if bias is None else [bias])
    if not _shapes_fit(x, down, up, bias):
        got = ", ".join(shape_text(tensor) for tensor in (x, down, up, bias))
        wanted = "x (..., in), down (R, in), up (out, R), bias (out) or None"
        raise ValueError(f"low_rank_linear: expected the shapes {wanted}; got {got}")
    if any(tensor.dtype != x.dtype for tensor in tensors):
        got = ", ".join(map(dtype_text, tensors))
        raise ValueError(f"low_rank_linear: expected one dtype for x, down, up, bias; got {got}")
    if any(tensor.device != x.device for tensor in tensors):
        got = ", ".join(str(tensor.device) for tensor in tensors)
        raise ValueError(f"low_rank_linear: expected one device for x, down, up, bias; got {got}")


def _shapes_fit(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> bool:
    if x.dim() < 1 or down.dim() != 2 or up.dim() != 2:
        return False
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != up.shape[0]):
        return False
    return bool(x.shape[-1] == down.shape[1] and down.shape[0] == up.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    """Keeps what F.linear keeps: models may change in place what no gradient needs."""
    x, down, up, _ = inputs
    wants_x, wants_down, wants_up = ctx.needs_input_grad[:3]
    ctx.save_for_backward(
        x if wants_down or wants_up else None,
        down if wants_x or wants_up else None,
        up if wants_x or wants_down else None,
    )


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, down, up and bias. x down^T is computed again: the forward keeps nothing but its inputs."""
    x, down, up = ctx.saved_tensors
    wants_x, wants_down, wants_up, wants_bias = ctx.needs_input_grad
    grad_rows, rows = rows_of(grad), None if x is None else rows_of(x).conj()
    inner = grad_rows @ up.conj() if wants_x or wants_down else None  # gradient of x down^T, (rows, R)
    return (
        (inner @ down.conj()).reshape(*grad.shape[:-1], down.shape[1]) if wants_x and inner is not None else None,
        inner.T @ rows if wants_down and inner is not None else None,
        grad_rows.T @ (rows @ down.conj().T) if wants_up and rows is not None else None,
        grad_rows.sum(0) if wants_bias else None,
    )


def _samples(dtype: torch.dtype) -> list[tuple[Tensor | None, ...]]:
    """Inputs of odd sizes: x of several dimensions, no rows, views that are not contiguous, with and without bias."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, generator=generator)

    generator = torch.Generator().manual_seed(0)
    return [
        (random(1, 13), random(3, 13), random(7, 3), random(7)),
        (random(5, 19), random(1, 19), random(1, 1), None),
        (random(2, 9, 11), random(4, 11), random(3, 4), random(3)),
        (random(17), random(5, 17), random(8, 5), random(8)),
        (random(0, 6), random(2, 6), random(5, 2), random(5)),
        (random(12, 3).T, random(12, 5).T, random(5, 9).T, random(18)[::2]),
    ]


def _flops(x: Sequence[int], down: Sequence[int], up: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * (math.prod(down) + math.prod(up))


LOW_RANK_LINEAR = define(
    "low_rank_linear(Tensor x, Tensor down, Tensor up, Tensor? bias) -> Tensor",
    reference=reference,
    setup_context=_setup_context,
    backward=_backward,
    samples=_samples,
    flops=_flops,
)


def low_rank_linear(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` times a matrix of low rank, plus `bias`: what F.linear(x, up @ down, bias) gives, at the cost of the factors.

    Shapes: x (..., in), down (R, in), up (out, R), bias (out) or None -> (..., out).
    Cost:   2*rows*R*(in + out) flops.
    Raises: ValueError when shapes, dtypes or devices do not fit together.
    """
    records = torch.is_grad_enabled() and down.requires_grad and not torch.compiler.is_compiling()
    if records and not (autocasts(x.device.type) or x.is_nested):  # the op casts its inputs, the reference does not
        # It keeps x down^T for the backward, which the op computes again: a sixth less.
        return reference(x, down, up, bias)
    result: Tensor = LOW_RANK_LINEAR(x, down, up, bias)
    return result
