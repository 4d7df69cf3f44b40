"""How refusals name shapes and dtypes; csrc/tensors.h writes the same."""

from __future__ import annotations

from torch import Tensor


def shape_text(tensor: Tensor | None) -> str:
    return "None" if tensor is None else "(" + ", ".join(map(str, tensor.shape)) + ")"


def dtype_text(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
