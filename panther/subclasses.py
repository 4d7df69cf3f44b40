"""Subclasses of a dense layer whose own forward does what the plain layer's does, and nothing else.

A class with its own forward may pad, scale or standardise before it multiplies, and a replacement would drop that. So
each one is run beside its plain parent on the input that it really gets: it passes when both execute the same ATen
operations on the same tensors, also at other sizes and in training mode. A padding that happens to add nothing at one
size, or an empty hook of a framework's layer, is told apart that way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode

from panther.batches import Call, run
from panther.nn.surgery import as_plain

# Other sizes of a convolution's input: small ones, where a padding shows first, and the neighbours of the real one.
SMALL = (1, 2, 3)
NEAR = (-1, 1, 2, 3)


def plain_subclasses(model: nn.Module, example: Call, dense: Sequence[type[nn.Module]]) -> frozenset[nn.Module]:
    """The modules whose class derives from one of `dense` and that compute just what that parent would.

    The model runs once more when it has any such module, else not at all. One that is not reached does not pass.
    """
    suspects = {m: kind for m in model.modules() for kind in dense if _may_be_plain(m, kind)}
    verdicts: dict[nn.Module, bool] = {}

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = args[0] if len(args) == 1 and not kwargs else None
        verdicts[module] = verdicts.get(module, True) and _computes_as(module, suspects[module], given)

    hooks = [module.register_forward_pre_hook(look, with_kwargs=True) for module in suspects]
    try:
        if suspects:
            run(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return frozenset(module for module, passed in verdicts.items() if passed)


def _may_be_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it is worth running: a subclass called as modules are, whose only numbers are a weight and a bias."""
    if not isinstance(module, kind) or type(module) is kind or is_parametrized(module):
        return False
    if any(getattr(type(module), name) is not getattr(nn.Module, name) for name in ("__call__", "_call_impl")):
        return False
    held = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    return held <= {"weight", "bias"}


@torch.no_grad()
def _computes_as(module: nn.Module, kind: type[nn.Module], given: Any) -> bool:
    """Whether the module executes what its plain parent executes, wherever the parent runs at all."""
    if not isinstance(given, Tensor) or given.is_nested or given.layout != torch.strided or given.numel() == 0:
        return False
    plain, before = as_plain(module, kind), dict(vars(module))
    if _trace(plain, given) is None or not _same(module, plain, given):
        return False
    flags = {part: part.training for part in (plain, *module.modules())}
    try:
        for part in flags:
            part.training = True
        if not _same(module, plain, given):
            return False
    finally:
        for part, flag in flags.items():
            part.training = flag
    if any(vars(module).get(name) is not value for name, value in before.items()) or len(vars(module)) != len(before):
        return False  # it keeps something of what it saw
    return all(_same(module, plain, other) for other in _other_sizes(module, given))


def _other_sizes(module: Any, given: Tensor) -> Iterator[Tensor]:
    """The input at other sizes: its positions cut or repeated, one sample of it; other leading sizes if linear."""
    dims = len(getattr(module, "kernel_size", ()))
    if not dims:
        row = given.reshape(-1, given.shape[-1])[:1]
        for leading in ((), (1,), (3,), (2, 3), (2, 1, 2)):
            yield row.expand(*leading, -1).contiguous() if leading else row[0]
        return
    sample = given[:1] if given.dim() == dims + 2 else given
    sizes, steps = sample.shape[-dims:], {*NEAR, max(module.stride) - 1, max(module.stride)}
    wanted = {(size,) * dims for size in SMALL} | {tuple(size + step for size in sizes) for step in steps}
    wanted |= {(*sizes[:-1], sizes[-1] + 1), (sizes[0] + 1, *sizes[1:])}
    for other in sorted(wanted):
        if min(other) > 0:
            resized = sample
            for axis, size in enumerate(other, -dims):
                resized = resized.index_select(axis, torch.arange(size, device=sample.device) % resized.shape[axis])
            yield resized


@dataclass(frozen=True)
class _Trace:
    """What a forward executed, with tensors named by where they come from, and what it returned."""

    steps: list[Any]
    result: Any  # the name of the returned tensor
    output: Tensor


class _Recorder(TorchDispatchMode):
    """Writes down every ATen operation, past autograd and autocast, where padding by nothing is still a padding."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it without annotations
        self.steps: list[Any] = []
        self.names = names
        self.alive: list[Tensor] = []  # an identity belongs to one tensor for as long as that one lives

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.steps.append((str(func), self.name(args), self.name(kwargs or {})))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, Tensor):
                self.names.setdefault(id(part), f"result {len(self.names)}")
                self.alive.append(part)
        return result

    def name(self, value: Any) -> Any:
        """Tensors by their names, everything else by its value."""
        if isinstance(value, Tensor):
            return self.names.get(id(value), "a tensor from elsewhere")
        if isinstance(value, tuple | list):
            return [self.name(part) for part in value]
        if isinstance(value, dict):
            return {key: self.name(part) for key, part in value.items()}
        return str(value)


def _trace(module: Any, given: Tensor) -> _Trace | None:
    """What the forward of a module executes on an input; None when it refuses that input."""
    names = {id(given): "input", id(module.weight): "weight"}
    names |= {} if module.bias is None else {id(module.bias): "bias"}
    try:
        with _Recorder(names) as recorder:
            output = module.forward(given)
    except Exception:  # a forward raises whatever it likes, and that the parent refuses the same input is all we ask
        return None
    return _Trace(recorder.steps, recorder.name(output), output) if isinstance(output, Tensor) else None


def _same(module: nn.Module, plain: nn.Module, given: Tensor) -> bool:
    wanted, got = _trace(plain, given), _trace(module, given)
    if wanted is None or got is None:
        return wanted is got
    same_path = wanted.steps == got.steps and wanted.result == got.result
    return same_path and torch.equal(wanted.output.nan_to_num(), got.output.nan_to_num())
