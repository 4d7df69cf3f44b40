"""A model running on all calibration calls at once, one stop at a time.

Every call runs in a thread of its own, and only one thread runs at any time: each pauses where a module named as a stop
is about to run, until all calls have got there. Between two stops the caller may change the weights of what comes
next. So a whole network is refitted in execution order at the cost of one forward pass, whatever its structure, and
what is held in memory is one depth of the network, not all of it. Where that is much at some depths and little at
others (images get small), the walk is made in stretches: the stops of a later one are reached by more calls.
"""

from __future__ import annotations

import contextlib
import copy
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from panther.batches import Call, drawing, float_outputs, inference, refill, run
from panther.products import fast_layers

SYSTEM_THREADS = 1024  # of the system for one model: each call has a thread, and that one the threads of its products
GROWTH = 2  # times as many calls make another walk worth it; all walks together cost two of the longest at most

CPU = torch.device("cpu")
LIBRARIES = ("torch.nn.", "panther.nn.")  # whose modules keep nothing of a forward that another call must not see
CONTAINERS = (list, dict, set)
MACHINERY = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called", "_parameters", "_modules")
MARKS = (bool, int, str, RemovableHandle)  # by which a model knows that it has hooks already
ABSENT = object()
LOCKS = (type(threading.Lock()), type(threading.RLock()), threading.Condition, threading.Semaphore)

# What modules hold under which name, and what is in it where that is a list, a dict or a set.
Held = dict[nn.Module, dict[str, tuple[Any, Any]]]

Precision = Mapping[str, torch.dtype | None]  # by type of device: what autocast computes in, None where it is off


class LeftStepError(Exception):
    """The calls do not all come to the same stops in the same order."""


class _AbandonedError(BaseException):
    """Raised inside a call that is given up; no model may catch it."""


def precision() -> Precision:
    """The autocast modes of this thread."""
    return {d: torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None for d in ("cpu", "cuda")}


@contextlib.contextmanager
def in_precision(wanted: Precision) -> Iterator[None]:
    """These autocast modes: each thread has its own, and a part of a model that runs alone needs the model's.

    Casts of weights are not kept: those are about to change.
    """
    now = precision()
    with contextlib.ExitStack() as modes:
        for device, dtype in wanted.items():
            if dtype != now[device]:
                modes.enter_context(torch.autocast(device, dtype, dtype is not None, cache_enabled=False))
        yield


@dataclass(frozen=True)
class Arrival:
    """What one call brings to a stop."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    precision: Precision = field(default_factory=precision)
    noise: Tensor = field(default_factory=torch.get_rng_state)  # what is drawn from here on
    left: Held = field(default_factory=dict)  # what this call has left on the modules so far

    @property
    def first(self) -> Any:
        """The first argument, which for layers is the input."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)

    def run(self, module: nn.Module) -> Any:
        """What a module makes of it, in the model's autocast mode; it may change its inputs, which are copies.

        It draws the random numbers that it would draw inside the model, and finds on the modules what the call left.
        """
        now = {m: {name: _entry(m.__dict__.get(name, ABSENT)) for name in names} for m, names in self.left.items()}
        put(self.left)
        try:
            with in_precision(self.precision), drawing(self.noise, CPU):
                return module(*_own(self.args), **_own(self.kwargs))
        finally:
            put(now)


def _own(value: Any) -> Any:
    """The same, such that changing it changes nothing else; modules are shared."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_own, value))
    if type(value) in (tuple, list):
        return type(value)(map(_own, value))
    if type(value) is dict:
        return {name: _own(part) for name, part in value.items()}
    if isinstance(value, nn.Module):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # some objects cannot be copied, and most of those are not changed either
        return value


def held(model: nn.Module) -> Held:
    """What a forward may leave on the modules that others wrote: all but parameters, parts and hooks.

    What is changed in place (a buffer that counts the calls) is the same for all calls.
    """
    own = [module for module in model.modules() if not type(module).__module__.startswith(LIBRARIES)]
    return {module: {name: _entry(value) for name, value in _kept(module)} for module in own}


def changed(since: Held) -> Held:
    """What they hold now where that is something else."""
    found: Held = {}
    for module, before in since.items():
        now = dict(_kept(module))
        for name in {*now, *before}:
            value, inside = before.get(name, (ABSENT, None))
            if now.get(name, ABSENT) is not value or not _same(value, inside):
                found.setdefault(module, {})[name] = _entry(now.get(name, ABSENT))
    return found


def put(entries: Held) -> None:
    """Make them hold this."""
    for module, attributes in entries.items():
        for name, (value, inside) in attributes.items():
            if value is ABSENT:
                module.__dict__.pop(name, None)
                continue
            module.__dict__[name] = value
            if inside is not None:
                refill(value, inside)


def _as_in(before: Held, entries: Held) -> Held:
    """What these names held before."""
    return {m: {name: before[m].get(name, (ABSENT, None)) for name in names} for m, names in entries.items()}


def _kept(module: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in module.__dict__.items() if not name.endswith(MACHINERY))


def _entry(value: Any) -> tuple[Any, Any]:
    return value, value.copy() if type(value) in CONTAINERS else None


def _same(value: Any, inside: Any) -> bool:
    """Whether the very same objects are in a container as were."""
    if inside is None:
        return True
    if isinstance(value, dict):
        return [*map(id, value), *map(id, value.values())] == [*map(id, inside), *map(id, inside.values())]
    return list(map(id, value)) == list(map(id, inside))


def _hooks_on(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@contextlib.contextmanager
def _threads(most: int) -> Iterator[None]:
    """At most so many threads for a product: those of a call's own thread stay while it waits."""
    before = torch.get_num_threads()
    if before <= most:
        yield
        return
    torch.set_num_threads(most)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _holds_a_lock(entries: Held) -> bool:
    return any(isinstance(value, LOCKS) for names in entries.values() for value, _ in names.values())


class _Runner:
    """One call in a thread that runs only while it is told to."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        self.model, self.call = model, call
        self.at: tuple[str, Arrival] | None = None
        self.error: BaseException | None = None
        self._abandoned = False
        self._precision = precision()
        self._noise: Tensor | None = None
        self.state: Held = {}  # as Arrival.left
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._abandoned:
                with torch.no_grad(), in_precision(self._precision), fast_layers():  # a thread has modes of its own
                    run(self.model, self.call, shares=True)
        except BaseException as error:
            self.error = error
        self.at = None
        self._done.release()

    def advance(self) -> None:
        """Run to the next stop, or to the end (`at` is then None)."""
        with drawing(torch.get_rng_state() if self._noise is None else self._noise, CPU):
            self._go.release()
            self._done.acquire()
            self._noise = torch.get_rng_state()
        if self.error is not None and not self._abandoned:
            raise self.error

    def pause(self, name: str, arrival: Arrival) -> None:
        if self._abandoned:  # and the model went on all the same
            raise _AbandonedError
        self.at = name, arrival
        self._done.release()
        self._go.acquire()
        if self._abandoned:
            raise _AbandonedError
        self.at = None

    def abandon(self) -> None:
        if self.thread.is_alive():
            self._abandoned = True
            with drawing(torch.get_rng_state(), CPU):  # the thread puts back what it found
                self._go.release()
                self.thread.join()


class Lockstep:
    """A model on its way through several calls; a context manager, which gives up what has not ended.

    stops: names of modules, each called once in a forward, before which the calls are held.

    Raises: whatever the model raises on a call; LeftStepError when the calls part ways.
    """

    def __init__(self, model: nn.Module, calls: Sequence[Call], stops: Sequence[str]) -> None:
        self.model, self.calls, self.stops = model, calls, stops
        self._runners: list[_Runner] = []
        self._hooks: list[RemovableHandle] = []
        self._before: Held = {}
        self._touched: Held = {}  # of these, the modules on which the first call left something
        self._inference = inference(model)

    def __enter__(self) -> Self:
        self._inference.__enter__()
        try:
            for name in self.stops:
                module = self.model.get_submodule(name)
                self._hooks.append(module.register_forward_pre_hook(self._stop(name), with_kwargs=True, prepend=True))
            self._before = held(self.model)
            if _holds_a_lock(self._before):
                raise LeftStepError("the model holds a lock, for which calls in step would wait for each other")
            for call in self.calls:
                self._runners.append(_Runner(self.model, call))
        except BaseException:  # a name that is not there, no more threads, Ctrl-C
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for runner in self._runners:
            runner.abandon()
        for hook in self._hooks:
            hook.remove()
        self._inference.__exit__(None, None, None)

    def _stop(self, name: str) -> Callable[..., None]:
        def pause(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            me = threading.current_thread()
            runner = next((r for r in self._runners if r.thread is me), None)
            if runner is not None:  # else the caller itself runs the module
                runner.pause(name, Arrival(args, kwargs))

        return pause

    def advance(self) -> str | None:
        """Take every call to its next stop: the stop's name, or None when all have ended."""
        with _threads(max(1, SYSTEM_THREADS // max(1, len(self.calls)))):
            return self._advance()

    def _advance(self) -> str | None:
        put(_as_in(self._before, changed(self._before)))  # what the caller's own runs of a module left
        for place, runner in enumerate(self._runners):
            put(runner.state)
            hooks = 0 if place else _hooks_on(self.model)
            try:
                runner.advance()
            finally:  # looking at all modules for every call would take longer than a small model
                runner.state = changed(self._touched if place else self._before)
                if not place and _hooks_on(self.model) != hooks:
                    self._take_over(runner)
                put(_as_in(self._before, runner.state))
                self._touched |= {module: self._before[module] for module in runner.state}
            if runner.at is not None:
                runner.at = runner.at[0], replace(runner.at[1], left=runner.state)
        names = {None if runner.at is None else runner.at[0] for runner in self._runners}
        if len(names) > 1:
            raise LeftStepError(f"the batches run through different layers ({', '.join(map(str, names))})")
        return names.pop() if names else None

    def _take_over(self, runner: _Runner) -> None:
        """Let the marks that a call has left be there for all: it gave itself hooks, and must not for each call."""
        for module, names in runner.state.items():
            self._before[module].update({name: e for name, e in names.items() if isinstance(e[0], MARKS)})

    @property
    def arrivals(self) -> list[Arrival]:
        """What each call brings to the stop where all are now."""
        return [runner.at[1] for runner in self._runners if runner.at is not None]


# --- how many calls to hold where -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stretch:
    """Stops behind one another, and how many calls are held at each of them."""

    stops: tuple[str, ...]
    calls: int


@dataclass(frozen=True)
class _Stop:
    name: str
    size_bytes: int  # of all that one call holds there, in both models, and of what the module puts out
    numbers: int  # that the module puts out


class _Living(TorchDispatchMode):
    """Knows all tensors that were made while it is on."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it without annotations
        self.made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.made += [weakref.ref(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        return output

    def size_bytes(self) -> int:
        """Memory of those that are in use, each piece once."""
        self.made = [ref for ref in self.made if ref() is not None]
        held = {}
        for ref in self.made:
            if (tensor := ref()) is not None:
                storage = tensor.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
        return sum(held.values())


def stretches(
    model: nn.Module,
    calls: Sequence[Call],
    stops: Sequence[str],
    held_bytes: float,
    wanted: Callable[[str, int], int] | None = None,
) -> list[Stretch]:
    """How to walk through stops, each with as many of the calls as fit, or as are of use.

    What one call holds at a stop, in arguments and in whatever is still in use of the forward around them, is measured
    on the first call. Stops that it does not reach go with the last ones.

    held_bytes: of memory, by both models together. At least two calls are held.
    wanted: (stop, numbers that a call's output has there) -> calls that are of use; without it, all.
    """
    if math.isinf(held_bytes):
        return [Stretch(tuple(stops), len(calls))]
    found: list[_Stop] = []
    with contextlib.suppress(Exception):  # a model that does not let itself be watched
        found = _measured(model, calls[0], stops)
    fits: list[int] = []
    for stop in reversed(found):  # a stop is passed on the way to those behind it
        most = min(fits[-1] if fits else len(calls), held_bytes / max(1, stop.size_bytes))
        fits.append(max(2, int(most)))
    fits.reverse()
    useful = [len(calls) if wanted is None else wanted(stop.name, stop.numbers) for stop in found]
    parts: list[tuple[list[str], int]] = []
    for place, stop in enumerate(found):
        count = min(len(calls), fits[place], max(useful[place:]))
        if not parts or count >= GROWTH * parts[-1][1]:
            parts.append(([], count))
        parts[-1][0].append(stop.name)
    if not parts:
        parts.append(([], min(2, len(calls))))
    parts[-1][0].extend(name for name in stops if name not in {stop.name for stop in found})
    return [Stretch(tuple(names), count) for names, count in parts]


def _measured(model: nn.Module, call: Call, stops: Sequence[str]) -> list[_Stop]:
    """What one call holds at each stop, in the order in which it gets there first."""
    held: dict[str, int] = {}
    found: dict[str, _Stop] = {}
    living = _Living()

    def before(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            held.setdefault(name, living.size_bytes())

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs = float_outputs(output)
            size = sum(t.numel() * t.element_size() for t in outputs)
            numbers = max((t.numel() for t in outputs), default=0)
            found.setdefault(name, _Stop(name, 2 * held[name] + size, numbers))

        return hook

    hooks: list[RemovableHandle] = []
    try:
        for name in stops:
            module = model.get_submodule(name)
            hooks += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
        with inference(model), living:
            run(model, call, shares=True)
    finally:
        for hook in hooks:
            hook.remove()
    return [found[name] for name in held if name in found]
