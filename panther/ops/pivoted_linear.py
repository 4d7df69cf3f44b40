"""A linear layer of rank R without the part of a factor that is an identity, its channels back in their order.

Notation: x (..., in), y (..., out). With pivots among the outputs ("rows"): down (R, in) gives the pivots' outputs y_p,
up (out - R, R) the others from these. Among the inputs ("columns"): the pivots' inputs x_p come first, down (R, in - R)
adds the others to them, up (out, R) gives y. Which of the two it is, the shapes say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from panther.ops._define import autocasts, define, rows_of
from panther.ops._text import FLOATING, dtype_text, shape_text


def reference(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, order: Tensor | None) -> Tensor:
    """What `pivoted_linear` computes, in standard PyTorch operations."""
    _check(x, down, up, bias, order)
    rank = down.shape[0]
    if _has_rows(x, down):
        first, second = (None, None) if bias is None else (bias[:rank], bias[rank:])
        pivots = F.linear(x, down, first)
        y = torch.cat((pivots, F.linear(pivots, up, second)), -1)
        return y if order is None else y.index_select(-1, order)
    if order is not None:
        x = x.index_select(-1, order)
    return F.linear(x[..., :rank] + F.linear(x[..., rank:], down), up, bias)


def _has_rows(x: Tensor, down: Tensor) -> bool:
    """Whether the pivots are outputs."""
    return bool(down.shape[1] == x.shape[-1])


def _check(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, order: Tensor | None) -> None:
    """The compiled kernel refuses the same inputs in the same words (csrc/cpu/pivoted_linear.cpp)."""
    if not _shapes_fit(x, down, up, bias, order):
        got = ", ".join(shape_text(tensor) for tensor in (x, down, up, bias, order))
        raise ValueError(
            "pivoted_linear: expected the shapes x (..., in), down (R, in), up (out - R, R), bias (out) or None, order "
            f"(out) or None; or down (R, in - R), up (out, R), bias (out) or None, order (in) or None; got {got}"
        )
    floats = [x, down, up] + ([] if bias is None else [bias])
    tensors = floats + ([] if order is None else [order])
    is_one = x.dtype in FLOATING and all(tensor.dtype == x.dtype for tensor in floats)
    if not is_one or (order is not None and order.dtype != torch.int32):
        got = ", ".join(map(dtype_text, tensors))
        raise ValueError(
            "pivoted_linear: expected one floating-point dtype for x, down, up, bias, and int32 for order; got " + got
        )
    if any(tensor.device != x.device for tensor in tensors):
        got = ", ".join(str(tensor.device) for tensor in tensors)
        raise ValueError(f"pivoted_linear: expected one device for all tensors; got {got}")


def _shapes_fit(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, order: Tensor | None) -> bool:
    if x.dim() < 1 or down.dim() != 2 or up.dim() != 2 or not 0 < down.shape[0] == up.shape[1]:
        return False
    rank, has_rows = down.shape[0], _has_rows(x, down)
    out = up.shape[0] + (rank if has_rows else 0)
    if not has_rows and x.shape[-1] != down.shape[1] + rank:
        return False
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != out):
        return False
    return bool(order is None or (order.dim() == 1 and order.shape[0] == (out if has_rows else x.shape[-1])))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps what F.linear keeps: models may change in place what no gradient needs."""
    x, down, up, bias, order = inputs
    wants_x, wants_down, wants_up = ctx.needs_input_grad[:3]
    ctx.has_rows, ctx.rank = _has_rows(x, down), down.shape[0]
    ctx.save_for_backward(
        x if wants_down or wants_up else None,
        down if wants_x or wants_up else None,
        up if wants_x or wants_down or ctx.has_rows else None,
        bias if wants_up and ctx.has_rows else None,
        order,
    )


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, down, up and bias. The inner result is computed again: the forward keeps only its inputs."""
    x, down, up, bias, order = ctx.saved_tensors
    wants_x, wants_down, wants_up, wants_bias, _ = ctx.needs_input_grad
    grad_rows, rows, rank = rows_of(grad), None if x is None else rows_of(x), ctx.rank
    of_x = of_down = of_up = of_bias = None
    if ctx.has_rows:
        grad_rows = _gathered_back(grad_rows, order)
        first, second = grad_rows[:, :rank], grad_rows[:, rank:]
        inner = first + second @ up  # gradient of the pivots' outputs
        if wants_x:
            of_x = inner @ down
        if wants_up and rows is not None:
            of_up = second.T @ F.linear(rows, down, None if bias is None else bias[:rank])
        if wants_bias:
            of_bias = torch.cat((inner.sum(0), second.sum(0)))
    else:
        if order is not None and rows is not None:
            rows = rows.index_select(-1, order)
        inner = grad_rows @ up if wants_x or wants_down else None
        if wants_x and inner is not None:
            of_x = _gathered_back(torch.cat((inner, inner @ down), -1), order)
        if wants_up and rows is not None:
            of_up = grad_rows.T @ (rows[:, :rank] + F.linear(rows[:, rank:], down))
        if wants_bias:
            of_bias = grad_rows.sum(0)
    if wants_down and inner is not None and rows is not None:
        of_down = inner.T @ (rows if ctx.has_rows else rows[:, rank:])
    return None if of_x is None else of_x.reshape(*grad.shape[:-1], of_x.shape[1]), of_down, of_up, of_bias, None


def _gathered_back(grad: Tensor, order: Tensor | None) -> Tensor:
    """The gradient of what index_select(-1, order) took its columns from."""
    return grad if order is None else torch.zeros_like(grad).index_add(-1, order, grad)


def _samples(dtype: torch.dtype) -> list[tuple[Tensor | None, ...]]:
    """Pivots on both sides, with and without bias and order, no rows, no other channels, views that are no copies."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, generator=generator)

    def order(size: int) -> Tensor:
        return torch.randperm(size, generator=generator).to(torch.int32)

    generator = torch.Generator().manual_seed(0)
    return [
        (random(1, 13), random(3, 13), random(4, 3), random(7), order(7)),
        (random(5, 19), random(2, 19), random(9, 2), None, None),
        (random(2, 9, 11), random(4, 7), random(6, 4), random(6), order(11)),
        (random(17), random(5, 12), random(8, 5), None, None),
        (random(0, 6), random(2, 6), random(5, 2), random(7), order(7)),
        (random(3, 8), random(5, 8), random(0, 5), random(5), order(5)),
        (random(12, 3).T, random(12, 5).T, random(5, 9).T, random(28)[::2], order(14)),
    ]


def _flops(x: Sequence[int], down: Sequence[int], up: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * (math.prod(down) + math.prod(up))


PIVOTED_LINEAR = define(
    "pivoted_linear(Tensor x, Tensor down, Tensor up, Tensor? bias, Tensor? order) -> Tensor",
    reference=reference,
    setup_context=_setup_context,
    backward=_backward,
    samples=_samples,
    flops=_flops,
)


def pivoted_linear(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None, order: Tensor | None = None
) -> Tensor:
    """`x` times a matrix of rank R that is stored as R * (in + out - R) numbers, plus `bias`.

    order: int32; which of the pivots and the others each output is (bias stays in the order of storage), or which
        input comes at each place.

    Shapes: x (..., in), down (R, in), up (out - R, R), bias (out), order (out) -> (..., out); or down (R, in - R),
            up (out, R), bias (out), order (in).
    Cost:   2*rows*R*(in + out - R) flops.
    Raises: ValueError when shapes, dtypes or devices do not fit together.
    """
    records = torch.is_grad_enabled() and down.requires_grad and not torch.compiler.is_compiling()
    if records and not (autocasts(x.device.type) or x.is_nested):
        return reference(x, down, up, bias, order)  # keeps the inner result for the backward, as low_rank_linear does
    y: Tensor = PIVOTED_LINEAR(x, down, up, bias, order)
    return y
