"""Weights written by torch.save: a state dict, one nested in a training checkpoint, or (if trusted) a whole module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from panther.converters.formats import UNSUPPORTED, format_of, unsupported
from panther.converters.pickles import Contents, contents
from panther.converters.weights import ModelSource, fit, make_model
from panther.errors import LoadError

# Where training checkpoints keep their weights, in the order in which they are looked for.
NESTED_KEYS = ("state_dict", "model_state_dict", "model")


def read(path: Path | str, *, model: ModelSource | None = None, trust_pickle: bool = False) -> nn.Module:
    """The model in a .pt, .pth or .bin file, in eval mode.

    A file of tensors needs `model`, the architecture: a module (it is copied) or a function that makes one. A file
    that imports anything else is loaded only with trust_pickle=True, for loading it runs the code it names.

    Raises: LoadError when the file is damaged, not trusted, or does not fit the model; UnsupportedFormat when it is
        not a torch.save file at all.
    """
    path = Path(path)
    found = format_of(path)
    if found in UNSUPPORTED:
        raise unsupported(path, found)
    if found != "state_dict":
        raise LoadError(f"{path} is not a torch.save file but one of the format {found!r}")
    held = contents(path)
    if held.foreign_imports and not trust_pickle:
        raise _not_trusted(path, held)
    if not held.foreign_imports:
        architecture = make_model(model, str(path))
        return fit(architecture, tensors_in(_load_tensors(path, held), path), str(path))
    loaded = _model_in(_load_trusted(path))
    if isinstance(loaded, nn.Module):
        return loaded.eval()
    return fit(make_model(model, str(path)), tensors_in(loaded, path), str(path))


def read_tensors(path: Path) -> dict[str, Any]:
    """The state dict in a file of tensors alone.

    Raises: LoadError when the file is damaged or holds anything else.
    """
    held = contents(path)
    if held.foreign_imports:
        raise _not_trusted(path, held)
    return tensors_in(_load_tensors(path, held), path)


def tensors_in(loaded: Any, path: Path) -> dict[str, Any]:
    """The state dict that a loaded checkpoint is, or holds under one of NESTED_KEYS.

    Raises: LoadError when there is none.
    """
    if isinstance(loaded, Mapping):
        for candidate in (*(loaded.get(key) for key in NESTED_KEYS), loaded):
            if isinstance(candidate, Mapping) and any(isinstance(value, Tensor) for value in candidate.values()):
                return {str(name): value for name, value in candidate.items()}
        keys = f" with the keys {', '.join(str(key)[:40] for key in list(loaded)[:8])}" if loaded else " that is empty"
        raise LoadError(
            f"{path} holds a dict{keys}: expected tensors by name, directly or under {' / '.join(NESTED_KEYS)}. "
            "Write it with torch.save(model.state_dict(), path)."
        )
    raise LoadError(
        f"{path} holds a {type(loaded).__name__}, expected a state dict: write it with "
        "torch.save(model.state_dict(), path)"
    )


def _load_tensors(path: Path, held: Contents) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=held.is_zip)
    except Exception as error:  # a hostile pickle makes the reader raise anything; nothing of it is run
        raise LoadError(
            f"{path} cannot be read: {_first_line(error)}. If the file is whole, write it again with "
            "torch.save(model.state_dict(), path) and torch's default pickle protocol."
        ) from error


def _load_trusted(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # the user's own classes are imported and may raise anything
        raise LoadError(
            f"{path} cannot be unpickled: {error!r}. The code that defines its classes must be importable here "
            "(PYTHONPATH); a state_dict with --model pkg.mod:factory does not have this need."
        ) from error


def _model_in(loaded: Any) -> Any:
    """The module in a checkpoint that holds one under "model", as some training scripts write it."""
    if isinstance(loaded, Mapping):
        return next((loaded[key] for key in NESTED_KEYS if isinstance(loaded.get(key), nn.Module)), loaded)
    return loaded


def _not_trusted(path: Path, held: Contents) -> LoadError:
    names = held.foreign_imports
    listed = ", ".join(name[:80] for name in names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return LoadError(
        f"{path} is a pickle of more than tensors, and loading it would run code: it imports {listed}. If you trust "
        "its source, pass --trust-pickle (trust_pickle=True). Better: save model.state_dict() with torch.save and give "
        "--model pkg.mod:factory."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:200]
