"""Putting a file's tensors into a model: names, shapes, prefixes and ties, the same for every format."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from panther.errors import CaptureError, LoadError
from panther.nn.surgery import copied

# An architecture to load weights into: a module, or a function (or class) that makes one when called with nothing.
ModelSource: TypeAlias = nn.Module | Callable[[], nn.Module]

# Added to every key by nn.DataParallel / DistributedDataParallel and by torch.compile.
WRAPPER_PREFIXES = ("module.", "_orig_mod.")

_LISTED = 5


def make_model(model: ModelSource | None, source: str) -> nn.Module:
    """A module of the user's architecture that may be changed: what the factory returns, or a copy of the instance.

    Raises: LoadError when no architecture was given, or the factory fails.
    """
    if model is None:
        raise LoadError(
            f"{source} holds weights only: give the architecture too, with model=factory_or_instance "
            "(--model pkg.mod:factory on the command line)"
        )
    if isinstance(model, nn.Module):
        return copy_of(model)
    name = getattr(model, "__qualname__", repr(model))
    try:
        made = model()
    except Exception as error:  # it is the user's function: any error of it gets the same context
        raise LoadError(f"the model factory {name}, called without arguments, failed: {error!r}") from error
    if not isinstance(made, nn.Module):
        raise LoadError(f"the model factory {name} returned {type(made).__name__}, expected a torch.nn.Module")
    return made


def copy_of(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy; `memo` maps the ids of what is not to be copied to what stands in its place.

    Raises: LoadError when the module cannot be copied.
    """
    try:
        return copied(model, memo or {}, None)[0]
    except CaptureError as error:
        raise LoadError(f"{error}, or a function that makes the model instead of the instance") from error


def fit(model: nn.Module, tensors: Mapping[str, Any], source: str) -> nn.Module:
    """The model with these tensors in it, in its own dtypes and on its own devices, and in eval mode.

    Tied tensors stay tied; of a tied group the file may hold any one name. A model built on the meta device takes the
    file's tensors as they are.

    Raises: LoadError when names or shapes do not fit; the model is then not usable.
    """
    ties = tied_names(model)
    target = model.state_dict()
    tensors = _without_wrapper(tensors, target)
    mismatched = _mismatches(tensors, target)
    if mismatched:
        raise _does_not_fit(source, model, [], [], mismatched)
    tensors = _with_tied(tensors, ties, source)
    _warn_of_wider(tensors, target, source)
    on_meta = any(value.is_meta for value in target.values() if isinstance(value, Tensor))
    try:
        # Not strict, so that the layers' own rules for older checkpoints apply before the keys are judged.
        missing, unexpected = model.load_state_dict(tensors, strict=False, assign=on_meta)
    except Exception as error:  # a module's own hooks may raise anything
        raise LoadError(f"{source}: {type(model).__name__}.load_state_dict failed: {error}") from error
    if missing or unexpected:
        raise _does_not_fit(source, model, missing, unexpected, [])
    if on_meta:
        for names in ties:
            tie(model, names)
        check_no_meta(model)
    return model.eval()


def tied_names(model: nn.Module) -> list[list[str]]:
    """The groups of names, in the order of the state dict, under which one parameter or buffer is registered."""
    saved = model.state_dict(keep_vars=True)
    groups: dict[int, list[str]] = {}
    for name, value in saved.items():
        if isinstance(value, Tensor):
            groups.setdefault(id(value), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def tie(model: nn.Module, names: Sequence[str]) -> None:
    """Make every name mean the tensor that the first one means."""
    first = _owner(model, names[0])
    tensor = getattr(*first)
    for name in names[1:]:
        setattr(*_owner(model, name), tensor)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def check_no_meta(model: nn.Module) -> None:
    """Raise LoadError when a tensor of the model has no values yet (a buffer that no file holds)."""
    empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        raise LoadError(
            f"{_some(empty)} of {type(model).__name__} would have no values: they are on the meta device and in no "
            "file. Build the model on the CPU."
        )


def _without_wrapper(tensors: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
    kept = dict(tensors)
    for prefix in WRAPPER_PREFIXES * 2:  # twice: they nest in either order
        if kept and all(name.startswith(prefix) for name in kept) and not any(n.startswith(prefix) for n in target):
            kept = {name.removeprefix(prefix): value for name, value in kept.items()}
    return kept


def _with_tied(tensors: dict[str, Any], ties: Iterable[Sequence[str]], source: str) -> dict[str, Any]:
    """The tensors with every name of each tied group that the file holds in part."""
    for names in ties:
        held = [name for name in names if isinstance(tensors.get(name), Tensor)]
        if not held:
            continue
        for name in held[1:]:
            if not _same(tensors[held[0]], tensors[name]):
                raise LoadError(
                    f"{source}: {held[0]} and {name} differ, and this model ties them (one tensor, two names). "
                    "Give an architecture that does not tie them."
                )
        tensors.update(dict.fromkeys(names, tensors[held[0]]))
    return tensors


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, so that NaN equals itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _mismatches(tensors: Mapping[str, Any], target: Mapping[str, Any]) -> list[str]:
    found = []
    for name, wanted in target.items():
        if name not in tensors or not isinstance(wanted, Tensor) or is_lazy(wanted):
            continue
        got = tensors[name]
        if not isinstance(got, Tensor):
            found.append(f"{name}: file {type(got).__name__}, model a tensor")
        elif got.shape != wanted.shape:
            found.append(f"{name}: file {tuple(got.shape)}, model {tuple(wanted.shape)}")
        elif _number_kind(got) != _number_kind(wanted):
            found.append(f"{name}: file {got.dtype}, model {wanted.dtype}")
    return found


def _number_kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _does_not_fit(
    source: str, model: nn.Module, missing: Sequence[str], unexpected: Sequence[str], mismatched: Sequence[str]
) -> LoadError:
    kinds = {
        "that the model needs are missing": missing,
        "are not in the model": unexpected,
        "have another shape or type": mismatched,
    }
    parts = [f"{len(names)} tensors {kind} ({_some(names)})" for kind, names in kinds.items() if names]
    return LoadError(
        f"{source} does not fit {type(model).__name__}: {'; '.join(parts)}. {_prefix_hint(missing, unexpected)}"
    )


def _warn_of_wider(tensors: Mapping[str, Any], target: Mapping[str, Any], source: str) -> None:
    """Say where the architecture's numbers are larger than the file's."""
    pairs = [(got, wanted) for name, wanted in target.items() if isinstance(got := tensors.get(name), Tensor)]
    kinds = dict.fromkeys(
        f"{dtype_name(got)} in the file and {dtype_name(wanted)} here"
        for got, wanted in pairs
        if isinstance(wanted, Tensor) and got.is_floating_point() and got.itemsize < wanted.itemsize
        if not wanted.is_meta  # such a model takes the file's tensors
    )
    if kinds:
        warnings.warn(
            f"{source}: weights are {', '.join(kinds)}: sizes, budgets and speeds are those of the architecture, which "
            "may be made in the file's dtype",
            UserWarning,
            stacklevel=3,
        )


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")


def _prefix_hint(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """A sentence on the way out, which names the prefix when one explains the difference."""
    for longer, shorter, which, other in (
        (unexpected, missing, "file", "model"),
        (missing, unexpected, "model", "file"),
    ):
        for end in (index + 1 for index, letter in enumerate(longer[0] if longer else "") if letter == "."):
            prefix = longer[0][:end]
            if longer[0][end:] in shorter:
                return (
                    f"The {which}'s names start with {prefix!r} and the {other}'s do not: rename the keys, or give an "
                    "architecture with the same nesting."
                )
    return "Give the architecture that the file was saved from."
