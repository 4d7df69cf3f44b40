"""Sums of rows, and of their products with themselves: what means and covariances are made of.

Notation: x (rows, n), z = x - shift, sums (n) += sum z, products (n, n) += sum z z^T, over the rows that count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from panther.ops._define import define
from panther.ops._text import dtype_text, shape_text


def reference(sums: Tensor, products: Tensor | None, x: Tensor, counts: Tensor | None, shift: Tensor | None) -> None:
    """What `add_moments` computes, in standard PyTorch operations."""
    _check(sums, products, x, counts, shift)
    z = x if shift is None else x - shift
    if counts is not None:  # whatever the others hold
        z = torch.where(counts.unsqueeze(1), z, 0.0)
    sums += z.sum(0, dtype=torch.float64)
    if products is not None:
        products += (z.T @ z).tril()


def _check(sums: Tensor, products: Tensor | None, x: Tensor, counts: Tensor | None, shift: Tensor | None) -> None:
    """The compiled kernel refuses the same inputs in the same words (csrc/cpu/add_moments.cpp)."""
    given = (sums, products, x, counts, shift)
    fits = x.dim() == 2 and sums.shape == x.shape[1:]
    fits = fits and all(
        some is None or some.shape == size for some, size in ((counts, x.shape[:1]), (shift, x.shape[1:]))
    )
    if not fits or (products is not None and products.shape != (x.shape[1], x.shape[1])):
        got = ", ".join(shape_text(some) for some in given)
        raise ValueError(
            "add_moments: expected the shapes sums (n), products (n, n) or None, x (rows, n), counts (rows) or None, "
            f"shift (n) or None; got {got}"
        )
    if (
        sums.dtype != torch.float64
        or x.dtype != torch.float32
        or (products is not None and products.dtype not in (torch.float32, torch.float64))
        or (counts is not None and counts.dtype != torch.bool)
        or (shift is not None and shift.dtype != torch.float32)
    ):
        got = ", ".join(dtype_text(some) for some in given)
        raise ValueError(
            "add_moments: expected float64 for sums, float32 or float64 for products, float32 for x and shift, bool "
            f"for counts; got {got}"
        )
    if any(some is not None and some.device != x.device for some in given):
        got = ", ".join("None" if some is None else str(some.device) for some in given)
        raise ValueError(f"add_moments: expected one device for sums, products, x, counts, shift; got {got}")


def _samples(dtype: torch.dtype) -> list[tuple[Tensor | None, ...]]:
    """Inputs of odd sizes: no rows, no columns, one of each, views that are not contiguous, rows that do not count."""

    def random(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, dtype=of, generator=generator)

    def sums(n: int) -> Tensor:
        return random(n, of=torch.float64)

    generator = torch.Generator().manual_seed(0)
    return [
        (sums(7), random(7, 7, of=dtype), random(9, 7), None, random(7)),
        (sums(33), random(33, 33, of=dtype), random(50, 33), random(50) > 0, None),
        (sums(5), None, random(3, 5), None, None),
        (sums(4), random(4, 4, of=dtype), random(0, 4), None, random(4)),
        (sums(0), random(0, 0, of=dtype), random(5, 0), None, None),
        (sums(1), random(1, 1, of=dtype), random(1, 1), None, None),
        (sums(40)[::2], random(20, 20, of=dtype).T, random(40, 30).T[:, ::2], random(60)[::2] > 0, random(40)[::2]),
        (sums(6), None, random(12, 8)[:, 1:7], random(12) > 0, random(6)),
    ]


def _flops(sums: Sequence[int], products: Sequence[int] | None, x: Sequence[int], *_: Any, **__: Any) -> int:
    rows, n = x
    return rows * n if products is None else rows * n * (n + 1)


ADD_MOMENTS = define(
    "add_moments(Tensor(a!) sums, Tensor(b!)? products, Tensor x, Tensor? counts, Tensor? shift) -> ()",
    reference=reference,
    samples=_samples,
    flops=_flops,
)


def add_moments(
    sums: Tensor,
    products: Tensor | None,
    x: Tensor,
    *,
    counts: Tensor | None = None,
    shift: Tensor | None = None,
) -> None:
    """Add rows to `sums`, and their products with themselves to what is on and below the diagonal of `products`.

    With z = x - shift for the rows of x that count (all of them without `counts`), sums += sum z and products +=
    sum z z^T. What is above the diagonal stays as it is. Rows that do not count may hold anything. Some rows at a time
    are summed in float32: in the kernel of the CPU at most 1,024 for products and 128 for sums, with the same bits for
    any number of threads. No gradient is recorded.

    Shapes: sums (n), products (n, n) or None, x (rows, n), counts (rows), shift (n).
    Cost:   rows*n*(n+1)/2 multiply-adds, half of those of x^T x.
    Raises: ValueError when shapes, dtypes or devices do not fit together: sums are float64, products float32 or
            float64, x and shift float32, counts bool.
    """
    for changed in (sums, *([] if products is None else [products])):
        torch.autograd.graph.increment_version(changed)  # so that autograd sees the change
    ADD_MOMENTS(sums.detach(), None if products is None else products.detach(), x.detach(), counts, shift)
