"""How refusals name shapes and dtypes, and which dtypes count as floating-point; csrc/tensors.h has the same."""

from __future__ import annotations

import torch
from torch import Tensor


def shape_text(tensor: Tensor | None) -> str:
    return "None" if tensor is None else "(" + ", ".join(map(str, tensor.shape)) + ")"


FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def dtype_text(tensor: Tensor | None) -> str:
    return "None" if tensor is None else str(tensor.dtype).removeprefix("torch.")
