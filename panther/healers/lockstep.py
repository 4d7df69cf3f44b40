"""A model running on all calibration calls at once, one stop at a time.

Every call runs in a thread of its own, and only one thread runs at any time: each pauses where a module named as a stop
is about to run, until all calls have got there. Between two stops the caller may change the weights of what comes
next. So a whole network is refitted in execution order at the cost of one forward pass, whatever its structure, and
what is held in memory is one depth of the network, not all of it.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from panther.batches import Call, inference, run

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
    """These autocast modes: each thread has its own, and a part of a model that runs alone needs the model's."""
    now = precision()
    with contextlib.ExitStack() as modes:
        for device, dtype in wanted.items():
            if dtype != now[device]:
                modes.enter_context(torch.autocast(device, dtype=dtype, enabled=dtype is not None))
        yield


@dataclass(frozen=True)
class Arrival:
    """What one call brings to a stop."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    precision: Precision = field(default_factory=precision)

    @property
    def first(self) -> Any:
        """The first argument, which for layers is the input."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)

    def run(self, module: nn.Module) -> Any:
        """What a module makes of it, in the model's autocast mode; it may change its inputs, which are copies."""
        with in_precision(self.precision):
            return module(*_own(self.args), **_own(self.kwargs))


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


class _Runner:
    """One call in a thread that runs only while it is told to."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        self.model, self.call = model, call
        self.at: tuple[str, Arrival] | None = None
        self.error: BaseException | None = None
        self._abandoned = False
        self._precision = precision()
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._abandoned:
                with torch.no_grad(), in_precision(self._precision):  # a thread has modes of its own
                    run(self.model, self.call)
        except BaseException as error:
            self.error = error
        self.at = None
        self._done.release()

    def advance(self) -> None:
        """Run to the next stop, or to the end (`at` is then None)."""
        self._go.release()
        self._done.acquire()
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
        self._inference = inference(model)

    def __enter__(self) -> Self:
        self._inference.__enter__()
        try:
            for name in self.stops:
                module = self.model.get_submodule(name)
                self._hooks.append(module.register_forward_pre_hook(self._stop(name), with_kwargs=True, prepend=True))
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
        for runner in self._runners:
            runner.advance()
        names = {None if runner.at is None else runner.at[0] for runner in self._runners}
        if len(names) > 1:
            raise LeftStepError(f"the batches run through different layers ({', '.join(map(str, names))})")
        return names.pop() if names else None

    @property
    def arrivals(self) -> list[Arrival]:
        """What each call brings to the stop where all are now."""
        return [runner.at[1] for runner in self._runners if runner.at is not None]
