"""Weights in a .safetensors file: tensors by name, and nothing that could run."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from panther.converters.weights import ModelSource, fit, make_model
from panther.errors import LoadError


def read(path: Path | str, *, model: ModelSource | None = None, trust_pickle: bool = False) -> nn.Module:
    """The model with a .safetensors file's weights, in eval mode; `trust_pickle` is not needed here.

    `model` is the architecture: a module (it is copied) or a function that makes one.

    Raises: LoadError when the file is damaged or does not fit the model.
    """
    path = Path(path)
    architecture = make_model(model, str(path))
    return fit(architecture, read_tensors(path), str(path))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file; their memory is the mapped file, so copy what outlives it.

    Raises: LoadError when the file is missing, truncated or not in this format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    # KeyError and AttributeError: dtypes that this torch does not have.
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise LoadError(
            f"{path} is not a whole .safetensors file ({error}): copy or download it again from its source"
        ) from error
