"""Formats that models are read from and written to, one a file.

A reader is `read(path, *, model=None, trust_pickle=False) -> nn.Module`. A writer is
`write(model, path, example_inputs, *, ...) -> ExportReport`; the contract tests hold every writer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from panther.converters import compressed, huggingface, onnx, pt2, safetensors, state_dict
from panther.converters.formats import UNSUPPORTED, UnsupportedFormat, format_of, unsupported
from panther.converters.parity import ExportReport, ShapeCheck
from panther.converters.weights import ModelSource

READERS: dict[str, Callable[..., nn.Module]] = {
    "state_dict": state_dict.read,
    "safetensors": safetensors.read,
    "pt2": pt2.read,
    "huggingface": huggingface.read,
    "compressed": compressed.load,
}

WRITERS: dict[str, Callable[..., ExportReport]] = {
    "onnx": onnx.write,
}


def read(path: Path | str, *, model: ModelSource | None = None, trust_pickle: bool = False) -> nn.Module:
    """The model in a file or folder, in eval mode, whatever its format.

    `model` is the architecture, for files that hold weights only: a module (it is copied) or a function that makes one.

    Raises: LoadError, which says the way out; UnsupportedFormat for a format that is recognised and not read.
    """
    name = format_of(Path(path))
    if name in UNSUPPORTED:
        raise unsupported(Path(path), name)
    return READERS[name](path, model=model, trust_pickle=trust_pickle)


__all__ = ["READERS", "WRITERS", "ExportReport", "ShapeCheck", "UnsupportedFormat", "format_of", "read"]
