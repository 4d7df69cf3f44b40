"""Runs of a model that differ from an earlier one only from some layer on: what comes before is not computed again.

One run is watched, and what its modules answer is kept. In a later run on the same inputs, where other numbers stand
for some parameters, every module that had ended before the first of these was read answers from memory. What is not
kept is computed, from exact inputs, so that the result is exact too. Nothing is kept of a module that does more than
answer: one that changes its inputs or an attribute, has a cache or draws random numbers. Python cannot show all that a
module does, so that who uses records compares some of the results with those of whole runs (see importance).
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from panther.batches import Call, device_of, float_outputs, parts_of, run, unchanged

HELD_BYTES = 200_000_000  # of answers, in all records of a model together
MOST_PARTS = 1000  # of a container that are compared; of a larger one its length is

_PLAIN = (Tensor, nn.Parameter)
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)
_CONTAINERS = (list, tuple, set, deque, dict, OrderedDict, defaultdict)


@dataclass(frozen=True)
class Answer:
    """What a module answered in its only call of a run."""

    stop: int  # when it ended
    depth: int  # of the calls around it
    output: Any
    nbytes: int


@dataclass(frozen=True)
class Record:
    """What the modules of a model answered in one call of it, and when parameters were first read."""

    answers: Mapping[nn.Module, Answer] = field(default_factory=dict)
    read: Mapping[int, int] = field(default_factory=dict)  # by the identity of a parameter

    @contextlib.contextmanager
    def replayed(self, changed: Collection[Tensor]) -> Iterator[None]:
        """Modules that had ended when the first of these parameters was read answer from memory."""
        first = min((self.read.get(id(parameter), 0) for parameter in changed), default=0)
        with _from_memory({module: kept for module, kept in self.answers.items() if kept.stop < first}):
            yield


def record(model: nn.Module, call: Call, held_bytes: float = HELD_BYTES) -> Record:
    """Run a model, in evaluation mode and without gradients as the caller has set it, and keep what its modules answer.

    Up to so many bytes are kept, of modules that hold a matrix or a kernel, the outermost first. Nothing is kept of a
    model that draws random numbers, or answers otherwise, or not at all, when all that was kept stands for running it.
    """
    watch = _Watch(model, held_bytes)
    try:
        with unchanged(model):
            wanted = [output.clone() for output in float_outputs(watch.run(call))]
        with unchanged(model), _from_memory(watch.answers):
            got = float_outputs(run(model, call))
    except Exception:  # of a module or a tensor that cannot be watched: the model itself has run before
        return Record()
    return Record(watch.answers, watch.read) if _are_same(wanted, got) else Record()


def _are_same(wanted: list[Tensor], got: list[Tensor]) -> bool:
    return len(wanted) == len(got) and all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


@contextlib.contextmanager
def _from_memory(answers: Mapping[nn.Module, Answer]) -> Iterator[None]:
    """Modules answer as they did, with copies, which may be changed; called once more they run."""

    def replaying(forward: Callable[..., Any], output: Any) -> Callable[..., Any]:
        left = [output]

        def answered(*args: Any, **kwargs: Any) -> Any:
            return _copied(left.pop()) if left else forward(*args, **kwargs)

        return answered

    with _forwards({module: replaying(module.forward, kept.output) for module, kept in answers.items()}):
        yield


def _copied(output: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)


@contextlib.contextmanager
def _forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Modules with another forward, each, which says that it takes what their own does."""
    own = {module: vars(module)["forward"] for module in forwards if "forward" in vars(module)}
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = functools.update_wrapper(forward, module.forward)
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
    answers: dict[nn.Module, Answer] = field(default_factory=dict)
    read: dict[int, int] = field(default_factory=dict)
    calls: Counter[nn.Module] = field(default_factory=Counter)
    busy: set[nn.Module] = field(default_factory=set)  # an attribute of theirs was changed while they ran
    clock: int = 0
    depth: int = 0
    held: int = 0

    def run(self, call: Call) -> Any:
        watched = [module for module in self.model.modules() if not isinstance(module, torch.jit.ScriptModule)]
        states: list[list[Tensor]] = []
        device = device_of(self.model)

        def between_generators(forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            states.append(_generators(device))
            output = forward(*args, **kwargs)
            states.append(_generators(device))
            return output

        forwards = {module: functools.partial(self._watched, module, module.forward) for module in watched}
        forwards[self.model] = functools.partial(between_generators, forwards[self.model])
        with _forwards(forwards), _Reading(self):
            output = run(self.model, call)
        if len(states) == 2 and _are_same(*states):
            self._leave_out_those_that_do_more(watched)
        else:
            self.answers.clear()
        return output

    def _leave_out_those_that_do_more(self, watched: Iterable[nn.Module]) -> None:
        hooked = {m for m in watched if m._forward_hooks or m._forward_pre_hooks}
        # What was changed may have been so by any module inside.
        suspects = self.busy | {m for module in self.busy for m in module.modules() if not _is_of_torch(m)}
        last = max(self.read.values(), default=0)
        for module, kept in list(self.answers.items()):
            inside = list(module.modules())
            is_pure = self.calls[module] == 1 and suspects.isdisjoint(inside)
            if not is_pure or not hooked.isdisjoint(inside[1:]) or kept.stop > last:  # nobody asks for what is last
                del self.answers[module]

    def _watched(self, module: nn.Module, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self.calls[module] += 1
        self.clock += 1
        for parameter in module._parameters.values():
            self.saw(parameter)
        given, kinds = tree_flatten((args, kwargs))
        versions, state = [_version(leaf) for leaf in given], _state(module)
        self.depth += 1
        try:
            output = forward(*args, **kwargs)
        finally:
            self.depth -= 1
        self.clock += 1
        left, now = tree_flatten((args, kwargs))
        if not _is_same_state(state, _state(module)):
            self.busy.add(module)
        is_unchanged = now == kinds and all(a is b for a, b in zip(given, left, strict=True))
        if is_unchanged and versions == [_version(leaf) for leaf in given] and module is not self.model:
            self._keep(module, given, output)
        return output

    def saw(self, value: Any) -> None:
        if isinstance(value, nn.Parameter):
            self.read.setdefault(id(value), self.clock)

    def _keep(self, module: nn.Module, given: list[Any], output: Any) -> None:
        """Keep an answer that is a value of its own; leave out the innermost ones where they become too many."""
        answers = tree_leaves(output)
        is_plain = all(map(_is_plain, (*given, *answers))) and not torch.is_grad_enabled() and not _is_transformed()
        if not is_plain or self.calls[module] > 1 or all(p.dim() < 2 for p in module.parameters()):
            return
        tensors = [leaf for leaf in answers if isinstance(leaf, Tensor)]
        places = [_place(tensor) for tensor in tensors]
        held = (*given, *(part for t in (*module.parameters(), *module.buffers()) for part in parts_of(t)))
        if len(set(places)) < len(places) or not {_place(t) for t in held if isinstance(t, Tensor)}.isdisjoint(places):
            return
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if nbytes > self.held_bytes:
            return
        copies = _copied(output)
        strides = [leaf.stride() for leaf in tree_leaves(copies) if isinstance(leaf, Tensor)]
        if strides != [tensor.stride() for tensor in tensors]:  # what comes next might sum up in another order
            return
        self.answers[module] = Answer(self.clock, self.depth, copies, nbytes)
        self.held += nbytes
        while self.held > self.held_bytes:
            worst = max(self.answers.items(), key=lambda item: (item[1].depth, item[1].nbytes, item[1].stop))
            self.held -= self.answers.pop(worst[0]).nbytes


class _Reading(TorchFunctionMode):
    """Tells a watch of every parameter that a function of torch is given."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            for part in value if isinstance(value, list | tuple) else (value,):
                self.watch.saw(part)
        return func(*args, **(kwargs or {}))


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.") and "forward" not in vars(module)


def _is_transformed() -> bool:
    """Whether a transform of torch.func is active, whose tensors are not what they seem."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


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


def _state(module: nn.Module) -> dict[str, list[tuple[Any, int]]]:
    """The attributes of a module and what is in those that are containers; tensors with how often they were changed."""
    return {name: list(_parts(value)) for name, value in vars(module).items()}


def _parts(value: Any, levels: int = 3) -> Iterator[tuple[Any, int]]:
    yield value, _version(value)
    if type(value) not in _CONTAINERS or not levels:
        return
    if len(value) > MOST_PARTS:
        yield None, len(value)
        return
    for part in [part for item in value.items() for part in item] if isinstance(value, dict) else value:
        yield from _parts(part, levels - 1)


def _is_same_state(before: dict[str, list[Any]], after: dict[str, list[Any]]) -> bool:
    def is_same(first: list[Any], second: list[Any]) -> bool:
        pairs = zip(first, second, strict=False)
        return len(first) == len(second) and all(a is b and v == w for (a, v), (b, w) in pairs)

    return before.keys() == after.keys() and all(is_same(state, after[name]) for name, state in before.items())
