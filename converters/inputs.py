"""Example inputs as a flat list of named tensors, and the same inputs at other sizes."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from panther.batches import as_call

_HOLE = object()

# A size that may vary, by the dimension it is: {0: "batch", 1: "sequence"}.
Axes = Mapping[int, str]


@dataclass(frozen=True)
class Inputs:
    """One forward call as named tensors, and all that is needed to make the call again from other tensors."""

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    slots: tuple[Any, ...]  # the call's leaves; _HOLE where a tensor goes
    structure: pytree.TreeSpec

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in zip(self.names, self.tensors, strict=True)}

    @property
    def constants(self) -> tuple[Any, ...]:
        """The arguments that are not tensors: an exported file has them built in."""
        return tuple(slot for slot in self.slots if slot is not None and slot is not _HOLE)

    def call(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with these tensors in the place of the example's."""
        rest = iter(tensors)
        leaves = [next(rest) if slot is _HOLE else slot for slot in self.slots]
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return args, kwargs

    def with_tensors(self, tensors: Sequence[Tensor]) -> Inputs:
        return dataclasses.replace(self, tensors=tuple(tensors))


def flatten(model: nn.Module, example_inputs: Any, device: torch.device) -> Inputs:
    """The tensors of a call, on `device`, named as the model's forward names them.

    Raises: TypeError for inputs that are no tensor, tuple or dict; ValueError when they hold no tensor.
    """
    call = as_call(example_inputs).to(device)
    leaves, structure = pytree.tree_flatten_with_path((call.args, dict(call.kwargs)))
    positional = [
        name for name, p in inspect.signature(model.forward).parameters.items() if p.kind is not p.KEYWORD_ONLY
    ]
    tensors: dict[str, Tensor] = {}
    for path, leaf in leaves:
        if isinstance(leaf, Tensor):
            tensors[unique(_name(path, positional), tensors)] = leaf.detach()
    if not tensors:
        raise ValueError("example_inputs hold no tensor: give what the model's forward takes, as for torch.export")
    slots = tuple(_HOLE if isinstance(leaf, Tensor) else leaf for _, leaf in leaves)
    return Inputs(tuple(tensors), tuple(tensors.values()), slots, structure)


def _name(path: tuple[Any, ...], positional: Sequence[str]) -> str:
    """A name for the leaf at a path of ((args), {kwargs}): the parameter's, then keys or indices."""
    keys: list[Any] = [getattr(key, "key", getattr(key, "idx", getattr(key, "name", ""))) for key in path]
    is_keyword, first, *rest = keys
    if not is_keyword:
        first = positional[first] if first < len(positional) else f"input_{first}"
    return re.sub(r"\W", "_", "_".join(map(str, (first, *rest))))


def dynamic_axes(inputs: Inputs, asked: Mapping[str, Axes] | None = None) -> tuple[dict[int, str], ...]:
    """Which sizes of each input may vary: the asked ones of the inputs that `asked` names, and of others a guess.

    That is dimension 0 where all agree, the length of token tensors and masks, and in other inputs a dimension 1 of
    the same length.
    Raises: ValueError for names and dimensions that the inputs do not have, and for labels of several sizes; TypeError
        for anything but labels by dimension, by name.
    """
    asked = {} if asked is None else asked
    _check_asked(inputs, asked)
    ranked = [tensor for tensor in inputs.tensors if tensor.dim()]
    one_batch = len({tensor.shape[0] for tensor in ranked}) == 1
    lengths: dict[int, str] = {}
    for name, tensor in zip(inputs.names, inputs.tensors, strict=True):
        if is_token_like(name, tensor) and name not in asked:
            lengths.setdefault(tensor.shape[1], f"sequence_{len(lengths) + 1}" if lengths else "sequence")
    found = []
    for name, tensor in zip(inputs.names, inputs.tensors, strict=True):
        axes = {0: "batch"} if one_batch and tensor.dim() else {}
        if (is_token_like(name, tensor) or tensor.dim() > 2) and tensor.shape[1] in lengths:
            axes[1] = lengths[tensor.shape[1]]
        found.append(dict(asked.get(name, axes)))
    return tuple(found)


def is_token_like(name: str, tensor: Tensor) -> bool:
    """Whether an input has a place for each token of a text: whole numbers, or a mask."""
    return tensor.dim() == 2 and (not tensor.is_floating_point() or "mask" in name)


def _check_asked(inputs: Inputs, asked: Mapping[str, Axes]) -> None:
    if not isinstance(asked, Mapping) or not all(isinstance(one, Mapping) for one in asked.values()):
        raise TypeError(f"dynamic_axes is {asked!r}; give {{'name of an input': {{0: 'batch', 1: 'time'}}}}")
    unknown = sorted(set(asked) - set(inputs.names))
    if unknown:
        raise ValueError(f"dynamic_axes names {unknown[0]!r}; the inputs are {', '.join(inputs.names)}")
    found: dict[str, int] = {}
    for name, tensor in zip(inputs.names, inputs.tensors, strict=True):
        for dim, label in asked.get(name, {}).items():
            if not isinstance(dim, int) or not isinstance(label, str) or not 0 <= dim < tensor.dim():
                raise ValueError(
                    f"dynamic_axes of {name!r} has {dim!r}: {label!r}; give names to dimensions, {{0: 'batch'}}, of "
                    f"its shape {tuple(tensor.shape)}"
                )
            if found.setdefault(label, tensor.shape[dim]) != tensor.shape[dim]:
                raise ValueError(
                    f"dynamic_axes calls sizes {found[label]} and {tensor.shape[dim]} {label!r}: give each its own name"
                )


def unique(name: str, taken: Collection[str]) -> str:
    """The name, or the first of name_2, name_3, ... that is free."""
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return next(found for found in itertools.chain([name], numbered) if found not in taken)


def only(axes: Sequence[Axes], labels: frozenset[str]) -> tuple[dict[int, str], ...]:
    return tuple({dim: label for dim, label in one.items() if label in labels} for one in axes)


def sizes(inputs: Inputs, axes: Sequence[Axes]) -> dict[str, int]:
    """The present size of each label."""
    return {
        label: tensor.shape[dim] for tensor, one in zip(inputs.tensors, axes, strict=True) for dim, label in one.items()
    }


def resized(inputs: Inputs, axes: Sequence[Axes], wanted: Mapping[str, int]) -> Inputs:
    """The inputs at other sizes, made by repeating or cutting, so that every value remains one the model takes."""
    tensors = []
    for tensor, one in zip(inputs.tensors, axes, strict=True):
        for dim, label in one.items():
            if wanted[label] != tensor.shape[dim]:
                index = torch.arange(wanted[label], device=tensor.device) % tensor.shape[dim]
                tensor = tensor.index_select(dim, index)  # noqa: PLW2901 - one step of several on the same tensor
        tensors.append(tensor)
    return inputs.with_tensors(tensors)


def other_sizes(present: Mapping[str, int]) -> list[dict[str, int]]:
    """The present sizes and others that a file is tried at, each once.

    These are a larger batch, batch 1 with other lengths, the other lengths alone; and of several lengths, which are
    free of each other, each larger while the others are smaller.
    """
    batch = {label: size for label, size in present.items() if label == "batch"}
    lengths = {label: size for label, size in present.items() if label != "batch"}
    other = {label: _smaller(size) for label, size in lengths.items()}
    changes = [
        {},
        {label: size + 1 for label, size in batch.items()},
        {**dict.fromkeys(batch, 1), **other},
        {**{label: size + 2 for label, size in batch.items()}, **other},
        other,
    ]
    if len(lengths) > 1:
        changes += [{**other, label: _larger(size)} for label, size in lengths.items()]
    found = [{**present, **change} for change in changes]
    return [made for index, made in enumerate(found) if made not in found[:index]]


def _smaller(size: int) -> int:
    return size - size // 3 if size > 2 else size + 1  # shorter where it can be: a position table has an end


def _larger(size: int) -> int:
    return size + size // 3 if size > 2 else size + 2


def named_outputs(output: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor of a model's output by name: dict keys and field names, indices for tuples; None is left out.

    Keys that make the same name, as k-1 and k_1 do, are numbered.
    """
    if isinstance(output, Tensor):
        return {name or "output": output}
    found: dict[str, Tensor] = {}
    for key, value in _parts(output):
        stem = name or ("output" if isinstance(key, int) else "")
        for inner, tensor in named_outputs(value, f"{stem}_{key}" if stem else str(key)).items():
            found[unique(inner, found)] = tensor
    return found


def _parts(output: Any) -> list[tuple[str | int, Any]]:
    if isinstance(output, Mapping):
        return [(re.sub(r"\W", "_", str(key)), value) for key, value in output.items()]
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return list(zip(output._fields, output, strict=True))
    if isinstance(output, tuple | list):
        return list(enumerate(output))
    if dataclasses.is_dataclass(output):
        return [(field.name, getattr(output, field.name)) for field in dataclasses.fields(output)]
    return []
