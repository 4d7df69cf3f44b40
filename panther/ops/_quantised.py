"""Matrices of few bits: how weights become whole numbers with scales, and how they are read back.

A scale belongs to a group of numbers that are neighbours in a row: to all of the row, or to 32, 64 or 128 of them, the
last ones of a row maybe fewer. A number is its whole number times its scale. Whole numbers of four bits are stored two
to a byte, the first one in the low half, each plus eight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _get_tracing_state

from panther.ops._text import FLOATING, dtype_text, shape_text

GROUP_SIZES = (32, 64, 128)
LARGEST = {8: 127, 4: 7}  # by bits; -128 and -8 are left out, so that a group and its negative are stored alike
ZERO = 8  # how four bits store 0, as ONNX's uint4 does with this zero point


def quantised(weight: Tensor, group_size: int | None = None, bits: int = 8) -> tuple[Tensor, Tensor]:
    """int8 values and their scales: each group rounded to the nearest multiples of about 1/127 of its largest number.

    group_size: 32, 64 or 128; None for one scale a row. A group of zeros has the scale 1. A scale is rounded up in the
    dtype of the weight, so that no number is off by more than half of it.
    bits: with 4 the values are -7 to 7, multiples of about 1/7, still one to a byte; `packed_int4` makes it two.

    Shapes: weight (m, n) -> int8 (m, n) and (m, ceil(n / group_size)) of the weight's dtype.
    Raises: ValueError for another group size or number of bits, for a weight that is not a matrix of floating-point
            numbers, and for NaN or Inf.
    """
    if group_size is not None and group_size not in GROUP_SIZES:
        raise ValueError(f"quantised: group_size is {group_size!r}; use None or one of {GROUP_SIZES}")
    if bits not in LARGEST:
        raise ValueError(f"quantised: bits is {bits!r}; use one of {tuple(LARGEST)}")
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"quantised: expected a floating-point matrix; got {shape_text(weight)} {weight.dtype}")
    wide = weight.double() if weight.dtype == torch.float64 else weight.float()
    if not bool(torch.isfinite(wide).all()):
        raise ValueError("quantised: the weight holds NaN or Inf")
    rows, columns = weight.shape
    largest, size = LARGEST[bits], group_size or max(1, columns)
    count = max(1, -(-columns // size))
    groups = F.pad(wide, (0, size * count - columns)).reshape(rows, count, size)
    exact = groups.abs().amax(-1) / largest
    scales = exact.to(weight.dtype)
    scales = torch.where(scales.to(wide) < exact, torch.nextafter(scales, scales.new_tensor(torch.inf)), scales)
    scales = torch.where(scales > 0, scales, 1.0)
    values = (groups / scales.to(wide).unsqueeze(-1)).round().clamp(-largest, largest).to(torch.int8)
    return values.flatten(1)[:, :columns].contiguous(), scales


def packed_int4(values: Tensor) -> Tensor:
    """Whole numbers from -8 to 7, two to a byte: the first in the low half, each plus eight, in the order of ONNX.

    Shapes: int8 (m, n) -> uint8 (m, ceil(n / 2)); where n is odd the last half byte of a row is a zero.
    Raises: ValueError for anything but an int8 matrix of such numbers.
    """
    if values.dim() != 2 or values.dtype != torch.int8:
        raise ValueError(f"packed_int4: expected an int8 matrix; got {shape_text(values)} {values.dtype}")
    if values.numel() and not -ZERO <= int(values.min()) <= int(values.max()) < ZERO:
        raise ValueError(
            f"packed_int4: expected numbers from -8 to 7; got {int(values.min())} to {int(values.max())}. "
            "quantised(weight, bits=4) makes them."
        )
    stored = (F.pad(values, (0, values.shape[1] % 2)) + ZERO).to(torch.uint8)
    return stored[:, ::2] | stored[:, 1::2] << 4


def unpacked_int4(values: Tensor, columns: int) -> Tensor:
    """The numbers that `packed_int4` stored, `columns` in a row.

    Shapes: uint8 (m, ceil(columns / 2)) -> int8 (m, columns).
    Raises: ValueError for another dtype or shape.
    """
    if values.dim() != 2 or values.dtype != torch.uint8 or values.shape[1] != -(-columns // 2):
        raise ValueError(
            f"unpacked_int4: expected uint8 values (out, ceil(in / 2)) with in = {columns}; got {shape_text(values)} "
            f"{values.dtype}"
        )
    halves = torch.stack((values & 15, values >> 4), -1)
    return halves.flatten(1)[:, :columns].to(torch.int8) - ZERO


def dequantised(values: Tensor, scales: Tensor, columns: int | None = None) -> Tensor:
    """The matrix that values and scales stand for, in the dtype of the scales.

    columns: the numbers in a row of uint8 values, which hold two to a byte; None for as many as they have room for.
    int16 values are the bits of bfloat16 numbers, whose scales (m, 0) are there for their dtype.

    Shapes: int8 or int16 (m, n), or uint8 (m, ceil(n / 2)), and scales (m, groups) -> (m, n).
    Raises: ValueError for a number of scales that is of no group size.
    """
    if values.dtype == torch.int16:
        wide = _from_bits(values).to(scales.dtype)
        return wide + scales.sum(1, keepdim=True)  # of nothing, but tangents find their way
    whole = whole_numbers(values, 2 * values.shape[1] if columns is None else columns)
    columns = whole.shape[1]
    size = size_of_groups(columns, scales.shape[1])
    if columns and not size:
        raise ValueError(
            f"dequantised: {scales.shape[1]} scales a row for {columns} numbers; expected one, or one for 32, 64 or 128"
        )
    return whole.to(scales.dtype) * (scales if size == columns else scales.repeat_interleave(size, 1)[:, :columns])


def _from_bits(values: Tensor) -> Tensor:
    """The bfloat16 numbers whose bits the int16 values are."""
    if _get_tracing_state() is None:
        return values.contiguous().view(torch.bfloat16)
    # TorchScript has no view of another dtype: sign, exponent and fraction one by one.
    bits = values.int()
    exponent, fraction = bits >> 7 & 255, bits & 127
    size = torch.ldexp((fraction + 128 * (exponent > 0)).float(), exponent.clamp(min=1) - 134)
    return torch.where(bits < 0, -size, size).bfloat16()


def whole_numbers(values: Tensor, columns: int) -> Tensor:
    """The numbers of a row one by one: int8 values as they are, uint8 ones unpacked."""
    return unpacked_int4(values, columns) if values.dtype == torch.uint8 else values


def size_of_groups(columns: int, groups: int) -> int:
    """How many numbers of a row share a scale; 0 where so many scales fit none of the sizes."""
    if groups == 1:
        return columns
    return next((size for size in GROUP_SIZES if groups == -(-columns // size)), 0)


def scales_fit(values: Tensor, scales: Tensor, columns: int) -> bool:
    """Whether these are matrices, with as many scales as rows of so many numbers have groups."""
    if values.dim() != 2 or scales.dim() != 2 or values.shape[0] != scales.shape[0]:
        return False
    if values.dtype == torch.int16:
        return scales.shape[1] == 0
    return scales.shape[1] == 1 or bool(size_of_groups(columns, scales.shape[1]))


def check_types(name: str, x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None) -> None:
    """Raises: ValueError, in the name of an op, unless dtypes and devices of a stored weight fit those of x."""
    tensors = [tensor for tensor in (x, values, scales, bias) if tensor is not None]
    like_x = [scales] if bias is None else [scales, bias]
    is_one = x.dtype in FLOATING and all(tensor.dtype == x.dtype for tensor in like_x)
    if not is_one or values.dtype not in (torch.int8, torch.uint8, torch.int16):
        got = ", ".join(dtype_text(tensor) for tensor in tensors)
        raise ValueError(
            f"{name}: expected int8, uint8 or int16 values, and one floating-point dtype for x, scales, bias; got {got}"
        )
    if any(tensor.device != x.device for tensor in tensors):
        got = ", ".join(str(tensor.device) for tensor in tensors)
        raise ValueError(f"{name}: expected one device for all tensors; got {got}")


def scale_gradient(grad: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """The gradient of scales from that of the whole matrix."""
    if values.dtype == torch.int16:
        return torch.zeros_like(scales)
    columns, groups = grad.shape[1], scales.shape[1]
    size = size_of_groups(columns, groups)
    whole = whole_numbers(values, columns)
    return F.pad(grad * whole, (0, groups * size - columns)).reshape(len(grad), groups, size).sum(-1)
