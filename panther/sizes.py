"""What a model holds and what its saved file takes: parameters and persistent buffers, each tied tensor once."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from panther.nn.quantised import StoredWeight, for_file

# In the order in which safetensors lays tensors out.
_SAFETENSORS_DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def tensor_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def storage_of(tensor: Tensor) -> int:
    """What tensors in the same memory have in common; a number of its own where that cannot be told."""
    with contextlib.suppress(RuntimeError, NotImplementedError):  # sparse tensors have no storage
        return tensor.untyped_storage().data_ptr() or id(tensor)
    return id(tensor)


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What is saved of a model: parameters and persistent buffers, one that has several names once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            found.setdefault(id(value), (name, value))
    return dict(found.values())


def model_params(model: nn.Module) -> int:
    """Numbers in all parameters and persistent buffers, tied ones once.

    Of a quantised weight they are the whole numbers, two in a byte or not: its scales count in bytes only.
    """
    tensors = {id(tensor): tensor.numel() for tensor in stored_tensors(model).values()}
    for module in model.modules():
        if isinstance(module, StoredWeight):
            tensors |= {id(module.values): module.numbers, id(module.scales): 0}
    return sum(tensors.values())


def file_bytes(model: nn.Module) -> int:
    """Bytes of the safetensors file that holds this model: the header, and each stored tensor once."""
    kept = for_file(model, stored_tensors(model))
    return _header_bytes(kept) + sum(map(tensor_bytes, kept.values()))


def _header_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Length field, JSON and padding to 8 bytes; offsets are written in decimal, so the order of layout counts."""
    order = {dtype: place for place, dtype in enumerate(_SAFETENSORS_DTYPES)}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (order.get(item[1].dtype, len(order)), item[0])):
        end = offset + tensor_bytes(tensor)
        dtype = _SAFETENSORS_DTYPES.get(tensor.dtype, str(tensor.dtype))
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    return 8 + _padded(len(_json(header)))


def header_growth(
    added: Mapping[str, int], removed: Mapping[str, Sequence[int]], *, largest_size: int, largest_offset: int
) -> int:
    """Bytes by which the header grows at most, its padding included, when some tensors take the place of others.

    added: number of dimensions of each, by name. removed: their shapes. largest_size: of any dimension of those that
    are added. largest_offset: where the file's data ends. What several changes add may be summed.
    """
    before: dict[str, Any] = {
        name: {"dtype": "U8", "shape": list(shape), "data_offsets": [0, math.prod(shape)]}
        for name, shape in removed.items()
    }
    after: dict[str, Any] = {
        name: {"dtype": "F8_E5M2", "shape": [largest_size] * dims, "data_offsets": [largest_offset] * 2}
        for name, dims in added.items()
    }
    others = {"": None}  # an entry is set apart from others by a comma
    return _padded(max(0, len(_json(others | after)) - len(_json(others | before))))


def _json(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()


def _padded(length: int) -> int:
    return -(-length // 8) * 8
