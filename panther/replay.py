"""Runs of a model that differ from an earlier one only from some layer on: what comes before is not computed again.

One run is watched, and what its modules answer is kept. In a later run on the same inputs, where other numbers stand
for some parameters, every module that had ended before the first of these was read answers from memory. By itself that
is exact: what is not kept is computed, from exact inputs. It is not where a module does more than answer (it draws
random numbers, changes its inputs, or an attribute that others read), so that no such module is passed over.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from panther.batches import Call, device_of, float_outputs, run

HELD_BYTES = 200_000_000  # of answers, in all records of a model together

_PLAIN = (Tensor, nn.Parameter)
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True)
class Answer:
    """What a module answered in its only call of a run."""

    stop: int  # when it ended
    depth: int  # of the calls around it
    output: Any
    nbytes: int


@dataclass(frozen=True)
class Record:
    """When the modules of a model ran in one call of it, and what can stand for running them again."""

    began: Mapping[nn.Module, int]  # the first time
    answers: Mapping[nn.Module, Answer]

    @contextlib.contextmanager
    def replayed(self, changed: Collection[Tensor]) -> Iterator[None]:
        """Modules that ended before a module that holds one of these parameters began answer as they did."""
        ids = {id(tensor) for tensor in changed}
        holders = [m for m in self.began if any(id(p) in ids for p in m._parameters.values())]
        first = min((self.began[module] for module in holders), default=0)
        with _forwards({m: _from_memory(kept.output) for m, kept in self.answers.items() if kept.stop < first}):
            yield


def record(model: nn.Module, call: Call, held_bytes: float = HELD_BYTES) -> Record:
    """Run a model, in evaluation mode and without gradients as the caller has set it, and keep what its modules answer.

    Of modules that hold a matrix or a kernel, the outermost first, up to so many bytes. Nothing is kept of a model that
    draws random numbers, or answers otherwise when all that was kept stands for running it.
    """
    watch = _Watch(model, held_bytes)
    wanted = watch.run(call)
    found = Record(watch.began, watch.answers)
    if not found.answers:
        return found
    try:
        with _forwards({module: _from_memory(kept.output) for module, kept in found.answers.items()}):
            got = run(model, call)
        is_same = _are_same(float_outputs(wanted), float_outputs(got))
    except Exception:  # whatever a model raises that misses what a module did besides answering
        is_same = False
    return found if is_same else Record(watch.began, {})


def _are_same(wanted: list[Tensor], got: list[Tensor]) -> bool:
    return len(wanted) == len(got) and all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


def _from_memory(output: Any) -> Callable[..., Any]:
    """A forward that answers with copies: what comes next may change them."""
    return lambda *_args, **_kwargs: tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)


@contextlib.contextmanager
def _forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Modules with another forward, each."""
    own = {module: vars(module)["forward"] for module in forwards if "forward" in vars(module)}
    for module, forward in forwards.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module in forwards:
            vars(module).pop("forward", None)
        for module, forward in own.items():
            vars(module)["forward"] = forward


@dataclass
class _Watch:
    """What is seen of one run."""

    model: nn.Module
    held_bytes: float
    began: dict[nn.Module, int] = field(default_factory=dict)
    answers: dict[nn.Module, Answer] = field(default_factory=dict)
    calls: Counter[nn.Module] = field(default_factory=Counter)
    clock: int = 0
    depth: int = 0

    def run(self, call: Call) -> Any:
        watched = [m for m in self.model.modules() if m is not self.model and not isinstance(m, torch.jit.ScriptModule)]
        before = _states(self.model)
        device, drawn = device_of(self.model), False

        def whole(*args: Any, **kwargs: Any) -> Any:
            nonlocal drawn
            states = _generators(device)
            output = forward(*args, **kwargs)
            drawn = not _are_same(states, _generators(device))
            return output

        forward = self.model.forward
        others = {module: functools.partial(self._watched, module, module.forward) for module in watched}
        with _forwards({self.model: whole, **others}):
            output = run(self.model, call)
        after = _states(self.model)
        last = max((began for module, began in self.began.items() if module._parameters), default=0)
        busy = {m for m, state in before.items() if not _is_same_state(state, after.get(m, {}))}
        hooked = {m for m in watched if m._forward_hooks or m._forward_pre_hooks}
        for module in list(self.answers):
            inside = list(module.modules())
            is_pure = self.calls[module] == 1 and busy.isdisjoint(inside) and hooked.isdisjoint(inside[1:])
            if drawn or not is_pure or self.answers[module].stop > last:  # after which no layer comes
                del self.answers[module]
        return output

    def _watched(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.calls[module] += 1
        self.clock += 1
        self.began.setdefault(module, self.clock)
        given = tree_leaves((args, kwargs))
        versions = [_version(leaf) for leaf in given]
        self.depth += 1
        try:
            output = forward(*args, **kwargs)
        finally:
            self.depth -= 1
        self.clock += 1
        left = tree_leaves((args, kwargs))
        is_unchanged = len(left) == len(given) and all(a is b for a, b in zip(given, left, strict=True))
        if is_unchanged and versions == [_version(leaf) for leaf in given] and self.calls[module] == 1:
            self._keep(module, given, output)
        return output

    def _keep(self, module: nn.Module, given: list[Any], output: Any) -> None:
        """Keep an answer that is a value of its own; leave out the innermost ones where they become too many."""
        answers = tree_leaves(output)
        if not all(map(_is_plain, (*given, *answers))) or all(p.dim() < 2 for p in module.parameters()):
            return
        tensors = [leaf for leaf in answers if isinstance(leaf, Tensor)]
        places = [_place(tensor) for tensor in tensors]
        known = {_place(leaf) for leaf in (*given, *module.parameters(), *module.buffers()) if isinstance(leaf, Tensor)}
        if len(set(places)) < len(places) or not known.isdisjoint(places):
            return
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if nbytes > self.held_bytes:
            return
        copies = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)
        self.answers[module] = Answer(self.clock, self.depth, copies, nbytes)
        while sum(kept.nbytes for kept in self.answers.values()) > self.held_bytes:
            worst = max(self.answers.items(), key=lambda item: (item[1].depth, item[1].nbytes, item[1].stop))
            del self.answers[worst[0]]


def _is_plain(leaf: Any) -> bool:
    """Whether nothing but a tensor's numbers, or a constant, is given on."""
    return type(leaf) in _CONSTANTS or (
        type(leaf) in _PLAIN and leaf.layout is torch.strided and not leaf.is_quantized and not leaf.is_inference()
    )


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _version(leaf: Any) -> int:
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0


def _generators(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _states(model: nn.Module) -> dict[nn.Module, dict[str, Any]]:
    """The attributes of all modules, and what is in their containers, tensors with how often they were changed."""
    return {m: {name: _state(value) for name, value in vars(m).items()} for m in model.modules()}


def _state(value: Any) -> list[Any]:
    inside: Iterable[Any] = ()
    if isinstance(value, Mapping):
        inside = [part for item in value.items() for part in item]
    elif isinstance(value, list | tuple | set):
        inside = value
    return [(part, _version(part)) for part in (value, *inside)]


def _is_same_state(before: dict[str, Any], after: dict[str, Any]) -> bool:
    def is_same(first: list[Any], second: list[Any]) -> bool:
        pairs = zip(first, second, strict=True)
        return len(first) == len(second) and all(a is b and v == w for (a, v), (b, w) in pairs)

    return before.keys() == after.keys() and all(is_same(state, after[name]) for name, state in before.items())
