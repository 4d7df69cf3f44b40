"""A sketch of many rows in few: each row is added, with random signs, to a few random rows of the sketch.

Notation: x (rows, n) the input, S (l, n) the sketch, Omega (l, all rows) the map with `nonzeros` entries of
+-1/sqrt(nonzeros) a column, so that S = Omega X and the expectation of S^T S is X^T X.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from panther.ops._define import define
from panther.ops._philox import philox
from panther.ops._text import dtype_text, shape_text

_MOST_NONZEROS = 8
_WORD = 0xFFFFFFFF


def reference(sketch: Tensor, x: Tensor, first_row: int, seed: int, nonzeros: int) -> None:
    """What `sparse_sign_sketch` computes, in standard PyTorch operations: the same sums in the same order."""
    _check(sketch, x, first_row, nonzeros)
    rows = torch.arange(x.shape[0], device=x.device) + first_row
    targets, signs = _entries(rows, sketch.shape[0], seed, nonzeros)
    scales = signs.to(x.dtype) * (1 / math.sqrt(nonzeros))
    values = x.unsqueeze(1) * scales.unsqueeze(2)
    sketch.index_add_(0, targets.flatten(), values.flatten(0, 1))


def _entries(rows: Tensor, size: int, seed: int, nonzeros: int) -> tuple[Tensor, Tensor]:
    """Where and with what sign each row goes, (rows, nonzeros); the sketch is cut into `nonzeros` parts, one each.

    The upper bits of a random word choose the row of its part, the lowest bit the sign.
    """
    zero = torch.zeros_like(rows)
    key = seed & _WORD, (seed >> 32) & _WORD
    words = [
        word
        for call in range(-(-nonzeros // 4))
        for word in philox((rows & _WORD, (rows >> 32) & _WORD, zero + call, zero), key)
    ]
    starts = [part * size // nonzeros for part in range(nonzeros + 1)]
    targets = [
        start + (word * (end - start) >> 32) for word, start, end in zip(words, starts, starts[1:], strict=False)
    ]
    signs = [1 - 2 * (word & 1) for word in words[:nonzeros]]
    return torch.stack(targets, 1), torch.stack(signs, 1)


def _check(sketch: Tensor, x: Tensor, first_row: int, nonzeros: int) -> None:
    """The compiled kernel refuses the same inputs in the same words (csrc/cpu/sparse_sign_sketch.cpp)."""
    if sketch.dim() != 2 or x.dim() != 2 or sketch.shape[1] != x.shape[1]:
        got = f"{shape_text(sketch)}, {shape_text(x)}"
        raise ValueError(f"sparse_sign_sketch: expected the shapes sketch (l, n), x (rows, n); got {got}")
    if sketch.dtype != x.dtype or x.dtype not in (torch.float32, torch.float64):
        got = f"{dtype_text(sketch)}, {dtype_text(x)}"
        raise ValueError(f"sparse_sign_sketch: expected float32 or float64 for both sketch and x; got {got}")
    if sketch.device != x.device:
        got = f"{sketch.device}, {x.device}"
        raise ValueError(f"sparse_sign_sketch: expected one device for sketch, x; got {got}")
    if first_row < 0:
        raise ValueError(f"sparse_sign_sketch: expected first_row of at least 0; got {first_row}")
    if not 1 <= nonzeros <= min(_MOST_NONZEROS, sketch.shape[0]):
        most = f"{_MOST_NONZEROS} and the {sketch.shape[0]} rows of sketch"
        raise ValueError(f"sparse_sign_sketch: expected nonzeros of at least 1 and at most {most}; got {nonzeros}")


def _samples(dtype: torch.dtype) -> list[tuple[Tensor | int, ...]]:
    """Inputs of odd sizes: no rows, no columns, views that are not contiguous, few rows of sketch, large numbers."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, generator=generator)

    generator = torch.Generator().manual_seed(0)
    return [
        (random(13, 7), random(9, 7), 0, 0, 4),
        (random(40, 33), random(50, 33), 5, -1, 8),
        (random(1, 5), random(3, 5), 2**40, 2**62, 1),
        (random(8, 4), random(0, 4), 3, 7, 3),
        (random(8, 0), random(5, 0), 3, 7, 5),
        (random(11, 30).T, random(22, 12).T[:, ::2], 1, 9, 2),
    ]


def _flops(sketch: Sequence[int], x: Sequence[int], first_row: int, seed: int, nonzeros: int, **_: Any) -> int:
    return nonzeros * math.prod(x)


SPARSE_SIGN_SKETCH = define(
    "sparse_sign_sketch(Tensor(a!) sketch, Tensor x, int first_row, int seed, int nonzeros) -> ()",
    reference=reference,
    samples=_samples,
    flops=_flops,
)


def sparse_sign_sketch(x: Tensor, sketch: Tensor, *, first_row: int, seed: int, nonzeros: int = 4) -> None:
    """Add the sketch of some rows to `sketch`, whose product with itself estimates that of all rows seen so far.

    `first_row` counts the rows that came before, which makes the result independent of how they are batched. Where a
    row goes follows from its number, `seed` and `nonzeros` alone: on the CPU, the same bits for any batches and number
    of threads. No gradient is recorded.

    Shapes: x (rows, n), sketch (l, n).
    Cost:   nonzeros*rows*n additions.
    Raises: ValueError when shapes, dtypes or devices do not fit together, or a number is out of range.
    Source: Kane, Nelson, Journal of the ACM 61 (2014), the block construction.
    """
    torch.autograd.graph.increment_version(sketch)  # so that autograd sees the change
    SPARSE_SIGN_SKETCH(sketch.detach(), x.detach(), first_row, seed, nonzeros)
