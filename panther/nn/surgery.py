"""Putting sketched layers into a model, so that nothing else about the model changes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from panther.errors import CaptureError, one_line

T = TypeVar("T")

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",  # says how torch calls the backward hooks
)


def with_layers(
    model: nn.Module, layers: Mapping[str, nn.Module], shared: Mapping[int, Any] | None = None
) -> nn.Module:
    """A copy of the model in which the named layers are these; the replaced ones are never copied.

    Class, hooks, training flags, tied tensors and state-dict prefixes stay; a layer registered under several names
    is replaced under all of them. Hooks that are methods of the model become those of the copy.
    shared: by id, what the copy has in common with the model.

    Raises: AttributeError for a name that the model does not have, CaptureError for a model that cannot be copied.
    """
    memo: dict[int, Any] = dict(shared or {})
    hooks: list[tuple[nn.Module, dict[str, Any]]] = []
    for name, layer in layers.items():
        dense = model.get_submodule(name)
        inherit(layer, dense)
        memo[id(dense)] = layer
        hooks.append((dense, {kind: getattr(dense, kind) for kind in _HOOKS}))
    compressed, hooks = copied(model, memo, hooks)
    for layer, own in hooks:
        vars(layer).update(own)
    keep_unfused(compressed, layers.values())
    return compressed


def copied(model: nn.Module, memo: Mapping[int, Any], besides: T) -> tuple[nn.Module, T]:
    """A deep copy of a model, and of what refers to its modules; what refuses to be copied is shared with the model.

    Those are locks, files, generators and the like. Tensors that were computed are copied as plain numbers.
    memo: by id, what stands for what is not to be copied.

    Raises: CaptureError where a module itself refuses.
    """
    with contextlib.suppress(Exception):  # few models refuse, and they may do so in any way
        return copy.deepcopy((model, besides), dict(memo))
    try:
        return copy.deepcopy((model, besides), {**_uncopied(model), **memo})
    except Exception as error:
        raise CaptureError(
            f"this {type(model).__name__} cannot be copied, and panther works on copies: {_refusing(model, memo)} "
            f"refuses ({one_line(error)}); give its class a __deepcopy__ that works"
        ) from error


def _uncopied(model: nn.Module) -> dict[int, Any]:
    """By id, what stands in a copy of the model for those of its attributes, and of their items, that refuse."""
    known: dict[int, Any] = {id(part): part for part in (*model.modules(), *model.parameters())}
    found: dict[int, Any] = {}
    seen: set[int] = set()

    def look(value: Any) -> None:
        if id(value) in seen or not _refuses(value, {**known, **found}):
            return
        seen.add(id(value))
        if isinstance(value, dict | list | tuple | set):
            for part in value.values() if isinstance(value, dict) else value:
                look(part)
        if _refuses(value, {**known, **found}):
            found[id(value)] = value.detach().clone() if isinstance(value, Tensor) else value

    for module in model.modules():
        for value in vars(module).values():
            look(value)
    return found


def _refuses(value: Any, memo: dict[int, Any]) -> bool:
    try:
        copy.deepcopy(value, memo)
    except Exception:  # an object's own way to be copied may raise anything
        return True
    return False


def _refusing(model: nn.Module, memo: Mapping[int, Any]) -> str:
    """The module that cannot be copied although those in it can."""
    modules = {id(module): module for module in model.modules()}
    others = {**modules, **_uncopied(model), **memo}
    for name, module in model.named_modules():
        if name and _refuses(module, {key: value for key, value in others.items() if key != id(module)}):
            return repr(name)
    return "it"


def put_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """The same in place, wherever a module's attributes hold a replaced layer: in lists, tuples, sets and dicts too."""
    dense = {name: model.get_submodule(name) for name in layers}
    for name, layer in layers.items():
        inherit(layer, dense[name])
    _exchange(model, {id(dense[name]): layer for name, layer in layers.items()}, set())
    keep_unfused(model, layers.values())


def _exchange(value: Any, new: Mapping[int, nn.Module], seen: set[int]) -> Any:
    """The value with the modules of these ids exchanged; all that can be changed is changed in place, once."""
    value = new.get(id(value), value)
    if isinstance(value, tuple):
        parts = [_exchange(part, new, seen) for part in value]
        if all(part is old for part, old in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if not isinstance(value, nn.Module | list | dict | set) or id(value) in seen:
        return value
    seen.add(id(value))
    if isinstance(value, set):
        for part in [part for part in value if id(part) in new]:
            value.remove(part)
            value.add(new[id(part)])
        return value
    held = vars(value) if isinstance(value, nn.Module) else value
    for key, part in list(held.items() if isinstance(held, dict) else enumerate(held)):
        exchanged = _exchange(part, new, seen)
        if exchanged is not part:
            held[key] = exchanged
    return value


def inherit(layer: nn.Module, dense: nn.Module) -> None:
    """Take over what was attached to the dense layer: hooks, training flag, and attributes that its class has not.

    The values of attributes are shared, not copied; so are modules in it that hold no numbers (a subclass's padding).
    Names that the new layer has already keep their own.
    """
    for name in _HOOKS:
        setattr(layer, name, copy.copy(getattr(dense, name)))
    layer.train(dense.training)
    of_its_class = {name for kind in type(dense).__mro__ for name in getattr(kind, "__annotations__", ())}
    parts = {name: part for name, part in dense.named_children() if not part.state_dict()}
    for name, value in {**vars(dense), **parts}.items():
        if name not in of_its_class and not hasattr(layer, name):
            vars(layer)[name] = value  # past nn.Module, which would register a module that is only referred to


def as_plain(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """The module as a plain layer of the class that it derives from, with the same parameters: what `kind` would do."""
    if type(module) is kind:
        return module
    plain = kind.__new__(kind)
    vars(plain).update(vars(module))
    return plain


def keep_unfused(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Stop nn.TransformerEncoderLayer from reading its layers' dense weights in a fused kernel of its own.

    In evaluation mode it would skip linear1 and linear2 and multiply with their `weight`, which a sketched layer can
    only give by multiplying its factors out.
    """
    sketched = {id(layer) for layer in layers}
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(id(m) in sketched for m in module.modules()):
            module.activation_relu_or_gelu = 0  # the one condition of the fused path that nothing else reads
        if isinstance(module, nn.TransformerEncoder) and any(id(m) in sketched for m in module.modules()):
            module.use_nested_tensor = False  # it would hand nested tensors to layers that no longer fuse
