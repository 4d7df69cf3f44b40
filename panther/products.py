"""Products of float32 matrices by the faster kernel, and half of one where a matrix meets itself.

On x86 processors torch multiplies with MKL, which keeps to AVX2 unless Intel made the processor. Where there is
AVX-512 all the same, panther.ops.linear takes less than half of the time, to the same precision. Products of rows with
themselves are panther.ops.add_moments' where that has instructions for vectors, and some of torch's elsewhere.
Convolutions of images that are one number wide, as sounds are at times, take torch's way for sequences.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from panther.ops import _kernels, add_moments, linear

BLOCK = 192  # columns that torch multiplies at once, with all columns before them
FEWEST_ROWS, LEAST_MULTIPLICATIONS = 16, 1 << 20  # below, the visit to the op costs what it gains
_PLAIN = (Tensor, nn.Parameter)


@functools.cache
def has_faster_kernel() -> bool:
    """Whether panther.ops.linear multiplies float32 faster than what torch takes for it here."""
    kernels, _ = _kernels.load()
    is_held_back = kernels is not None and kernels.build_info()["mkl_keeps_to_avx2"]
    return bool(is_held_back and torch.backends.mkl.is_available())


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b.

    Shapes: a (rows, between), b (between, columns) -> (rows, columns).
    """
    return linear(a, b.T) if _pays(a, b.T) else a @ b


def _pays(x: Tensor, weight: Tensor) -> bool:
    """Whether x weight^T is worth the op: of plain float32 matrices, and large enough."""
    if not (type(x) in _PLAIN and type(weight) in _PLAIN and x.dtype == weight.dtype == torch.float32):
        return False
    between = x.shape[-1] if x.dim() else 0
    rows = x.numel() // max(1, between)
    is_large = rows >= FEWEST_ROWS and rows * weight.numel() >= LEAST_MULTIPLICATIONS
    is_on_cpu = x.layout == weight.layout == torch.strided and x.is_cpu and weight.is_cpu
    return is_large and is_on_cpu and weight.dim() == 2 and weight.shape[1] == between and has_faster_kernel()


class _FastLayers(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if kwargs or torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        if func is functional.linear and has_faster_kernel() and len(args) >= 2 and _is_eager() and _pays(*args[:2]):
            bias = args[2] if len(args) > 2 else None
            if bias is None or (type(bias) in _PLAIN and _is_offset(bias, args[1])):
                return linear(args[0], args[1], bias)
        if func is functional.conv2d and (y := _of_sequences(*args)) is not None:
            return y
        return func(*args)


def _of_sequences(
    x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor | None:
    """A convolution of images that are one number wide, as one of sequences; None for others.

    Torch's is 1.7 to 2.9 times as fast (CREPE's six layers, AVX2): its kernels work side by side along the last axis.
    Only where no gradient is recorded: a view can lose its hooks, and checkpoints run their part outside of this mode.
    """
    if torch.is_grad_enabled() or not all(map(_is_one_wide, (x, weight))) or x.shape[2] == 1:
        return None
    pairs = [tuple(s) if isinstance(s, tuple | list) else (s, s) for s in (stride, padding, dilation)]
    if any(len(pair) != 2 for pair in pairs) or pairs[1][1] not in (0, "same", "valid"):
        return None
    step, pad, apart = (pair[0] for pair in pairs)
    return functional.conv1d(x.squeeze(3), weight.squeeze(3), bias, step, pad, apart, groups).unsqueeze(3)


def _is_one_wide(tensor: Any) -> bool:
    """Whether this is an image or a kernel of that shape, side by side in the memory of a CPU."""
    is_plain = type(tensor) in _PLAIN and tensor.layout == torch.strided and tensor.is_cpu
    return bool(is_plain and tensor.dim() == 4 and tensor.shape[3] == 1 and tensor.is_contiguous())


def _is_offset(bias: Tensor, weight: Tensor) -> bool:
    """A number for each output, and not one of the other shapes that F.linear spreads."""
    return bias.dtype == torch.float32 and bias.is_cpu and bias.shape == weight.shape[:1]


def _is_eager() -> bool:
    """No autocast, compiler, transform of torch.func or forward-mode tangent, which want standard operations."""
    in_transform = torch._C._functorch.peek_interpreter_stack() is not None
    return not (
        torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or in_transform
        or torch.autograd.forward_ad._current_level >= 0
    )


def fast_layers() -> AbstractContextManager[Any]:
    """Within, layers run in the faster kernel or way: for work of panther's own, never where a user's model is timed.

    Of this thread: others enter it themselves.
    """
    return _FastLayers()


@functools.cache
def has_moments_kernel() -> bool:
    """Whether panther.ops.add_moments has more than a plain loop here."""
    kernels, _ = _kernels.load()
    return kernels is not None and kernels.build_info()["instruction_set"] in ("avx2", "avx512")


def runs_in_moments_kernel(rows: Tensor) -> bool:
    return type(rows) in _PLAIN and rows.is_cpu and rows.dtype == torch.float32 and has_moments_kernel()


def gram(rows: Tensor) -> Tensor:
    """rows^T rows in half of the multiplications of the plain product.

    Shapes: rows (count, n) -> (n, n).
    """
    total = rows.new_zeros(rows.shape[1], rows.shape[1])
    add_gram(total, rows)
    return mirrored(total)


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add rows^T rows to what is on and below the diagonal of `total`, and anything above it: see `mirrored`.

    Shapes: total (n, n), float32 or float64; rows (count, n).
    """
    if runs_in_moments_kernel(rows):
        add_moments(rows.new_zeros(rows.shape[1], dtype=torch.float64), total, rows)
    else:
        _add_blocks(total, rows)


def add_sums(
    sums: Tensor, products: Tensor | None, rows: Tensor, *, counts: Tensor | None = None, shift: Tensor | None = None
) -> None:
    """As panther.ops.add_moments, but that anything may be added to `products` above the diagonal: see `mirrored`.

    Where it is not that op, gradients are recorded as for any operation of torch's.
    """
    if runs_in_moments_kernel(rows):
        add_moments(sums, products, rows, counts=counts, shift=shift)
        return
    rows = rows if counts is None else rows[counts]
    rows = rows if shift is None else rows - shift
    sums += rows.sum(0)
    if products is not None:
        _add_blocks(products, rows)


def _add_blocks(total: Tensor, rows: Tensor) -> None:
    n = rows.shape[1]
    for first in range(0, n, BLOCK):
        last = min(first + BLOCK, n)
        total[first:last, :last] += product(rows[:, first:last].T, rows[:, :last])


def mirrored(matrix: Tensor) -> Tensor:
    """The symmetric matrix that is as this one on and below the diagonal; in place."""
    n = len(matrix)
    for first in range(0, n, BLOCK):
        last = min(first + BLOCK, n)
        block = matrix[first:last, first:last]
        block.copy_(block.tril() + block.tril(-1).T)
        matrix[:first, first:last] = matrix[first:last, :first].T
    return matrix
