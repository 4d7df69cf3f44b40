"""Both models of a healing walk in lockstep: all calls pause at the same places, and nothing is left behind."""

from __future__ import annotations

import contextlib
import gc
import math
import threading
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from panther.batches import Call, run
from panther.healers.lockstep import Arrival, LeftStepError, Lockstep, Stretch, stretches


def chain(depth: int = 3, width: int = 8) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))


def calls(count: int = 3, width: int = 8) -> list[Call]:
    return [Call((torch.randn(4 + index, width),)) for index in range(count)]


def walk(model: nn.Module, given: list[Call], stops: list[str]) -> list[tuple[str, list[Arrival]]]:
    seen = []
    with Lockstep(model, given, stops) as steps:
        while (name := steps.advance()) is not None:
            seen.append((name, steps.arrivals))
    return seen


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def test_every_call_pauses_before_each_stop_in_the_order_of_execution() -> None:
    model, given = chain(), calls()
    seen = walk(model, given, ["2", "1"])
    assert [name for name, _ in seen] == ["1", "2"]
    with torch.no_grad():
        for place, arrivals in enumerate(part for _, part in seen):
            wanted = [model[: place + 1](call.args[0]) for call in given]
            assert all(torch.equal(a.first, y) for a, y in zip(arrivals, wanted, strict=True))


def test_what_is_changed_between_two_stops_is_what_the_calls_go_on_with() -> None:
    model, given = chain(), calls()
    with Lockstep(model, given, ["1", "2"]) as steps:
        steps.advance()
        with torch.no_grad():
            model[1].weight.zero_()
            model[1].bias.fill_(3.0)
        steps.advance()
        assert all(bool((arrival.first == 3.0).all()) for arrival in steps.arrivals)


def test_the_caller_can_run_a_stop_itself() -> None:
    model, given = chain(), calls(1)
    with Lockstep(model, given, ["1"]) as steps:
        steps.advance()
        (arrival,) = steps.arrivals
        assert torch.equal(arrival.run(model[1]), model[1](arrival.first))
        assert steps.advance() is None


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Bilinear(8, 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.inner(x, input2=2 * x)
        return answer


def test_keyword_arguments_arrive() -> None:
    given = calls(1)
    ((_, (arrival,)),) = walk(ByKeyword(), given, ["inner"])
    assert torch.equal(arrival.kwargs["input2"], 2 * given[0].args[0]) and arrival.first is arrival.args[0]


class Swallows(nn.Module):
    """Goes on whatever happens."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with contextlib.suppress(BaseException):
            x = self.a(x)
        answer: Tensor = self.b(x)
        return answer


def test_a_model_that_swallows_every_exception_still_ends() -> None:
    with Lockstep(Swallows(), calls(), ["a", "b"]) as steps:
        assert steps.advance() == "a"


class TwoPaths(nn.Module):
    """Short inputs run through one layer, long ones through the other."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.long = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = (self.short if len(x) < 6 else self.long)(x)
        return answer


def test_calls_that_part_ways_are_an_error_that_names_the_layers() -> None:
    model = TwoPaths().train()
    with (
        pytest.raises(LeftStepError, match="run through different layers") as failed,
        Lockstep(model, calls(), ["short", "long"]) as steps,
    ):
        steps.advance()
    assert "short" in str(failed.value) and "long" in str(failed.value)
    assert hooks_of(model) == 0 and model.training


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 5:
            raise KeyError("five")
        return x


def interrupted(model: nn.Module, error: type[BaseException]) -> None:
    with Lockstep(model, calls(), ["1", "3"]) as steps:
        steps.advance()
        steps.advance()
        raise error


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, RuntimeError])
def test_after_an_error_no_hook_is_left_and_flags_are_as_they_were(error: type[BaseException]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(), Fails() if error is KeyError else nn.Identity(), nn.ReLU())
    model.train()
    model[1].eval()
    with pytest.raises(error):
        interrupted(model, error)
    assert hooks_of(model) == 0
    assert [m.training for m in model.modules()] == [True, True, False, True, True]


def test_a_stop_that_does_not_exist_leaves_nothing_behind() -> None:
    model = chain().train()
    with pytest.raises(AttributeError), Lockstep(model, calls(), ["0", "nowhere"]):
        pass
    assert hooks_of(model) == 0 and model.training and torch.is_grad_enabled()


def test_when_threads_run_out_those_that_started_end(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, []

    def limited(self: threading.Thread) -> None:
        started.append(self)
        if len(started) > 2:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", limited)
    model = chain().train()
    with pytest.raises(RuntimeError, match="new thread"), Lockstep(model, calls(), ["1"]):
        pass
    assert hooks_of(model) == 0 and model.training and not any(thread.is_alive() for thread in started[:2])


class Notes(nn.Module):
    """Writes down in which modes it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.seen: list[tuple[bool, bool, torch.dtype]] = []
        self.note: Callable[..., Any] = self.seen.append

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.layer(x)
        self.note((torch.is_grad_enabled(), self.training, answer.dtype))
        return answer


def test_calls_run_in_evaluation_mode_without_gradients_and_in_the_callers_autocast() -> None:
    model = Notes().train()
    seen: list[Any] = []
    model.note = seen.append
    walk(model, calls(2), ["layer"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        walk(model, calls(1), ["layer"])
    assert seen == [(False, False, torch.float32)] * 2 + [(False, False, torch.bfloat16)]


class Mixed(nn.Module):
    """Runs its layer in bfloat16, whatever the caller does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            answer: Tensor = self.layer(x.bfloat16())
        return answer


def test_a_layer_run_alone_has_the_models_autocast() -> None:
    model = Mixed()
    ((_, arrivals),) = walk(model, calls(1), ["layer"])
    assert arrivals[0].run(model.layer).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.float16):
        assert arrivals[0].run(model.layer).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


class Greedy(nn.Module):
    """Changes everything that it is given."""

    def forward(self, x: Tensor, parts: list[Tensor], cache: dict[str, Any]) -> Tensor:
        parts[0] += 1
        parts.append(x)
        cache["steps"] = cache.get("steps", 0) + 1
        return x.add_(1)


def test_what_a_layer_does_to_its_inputs_stays_with_the_copy() -> None:
    x, parts, cache = torch.zeros(2), [torch.zeros(2)], {"steps": 4, "lock": threading.Lock()}
    arrival = Arrival((x, parts), {"cache": cache})
    for _ in range(2):
        assert torch.equal(arrival.run(Greedy()), torch.ones(2))
    assert torch.equal(x, torch.zeros(2)) and cache["steps"] == 4
    assert len(parts) == 1 and torch.equal(parts[0], torch.zeros(2))


class Layer(nn.Module):
    """Remembers, while they live, the tensors that it made."""

    alive: ClassVar[weakref.WeakSet[Tensor]] = weakref.WeakSet()

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.layer(x)
        self.alive.add(answer)
        return answer


@pytest.mark.parametrize("depth", [3, 12])
def test_what_is_held_is_one_depth_of_the_model(depth: int) -> None:
    gc.collect()
    model, given = nn.Sequential(*(Layer() for _ in range(depth))), calls(5)
    Layer.alive.clear()
    most = 0
    with Lockstep(model, given, [str(i) for i in range(depth)]) as steps:
        while steps.advance() is not None:
            most = max(most, len(Layer.alive))
    assert most == len(given)


def test_no_call_is_no_stop() -> None:
    assert walk(chain(), [], ["1"]) == []


# What a forward leaves on its modules, and draws


class Stores(nn.Module):
    """Hands what later layers need over by attributes, one of which it makes anew and one of which is a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.skips: list[Tensor] = []
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.skips.append(self.first(x))
        self.kept = torch.relu(self.skips[-1])
        self.later = self.kept.sum()
        y = self.second(self.kept)
        answer: Tensor = self.third(y + self.kept + self.later + self.skips.pop())
        return answer


class Noisy(nn.Sequential):
    """Draws before and between its layers."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x + torch.randn(x.shape))
        return x


@pytest.mark.parametrize("kind", [Stores, lambda: Noisy(nn.Linear(8, 8), nn.Linear(8, 8))], ids=["stores", "noisy"])
def test_each_call_has_what_it_left_on_the_modules_and_its_own_noise(kind: Callable[[], nn.Module]) -> None:
    model, given = kind(), calls()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    wanted: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _m, args, name=name: wanted[name].append(args[0]))
        for name in names
    ]
    for call in given:
        run(model, call)
    for hook in hooks:
        hook.remove()
    before, state = dict(model.__dict__), torch.get_rng_state()
    for name, arrivals in walk(model, given, names):
        assert all(torch.equal(a.first, b) for a, b in zip(arrivals, wanted[name], strict=True)), name
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: v for n, v in model.__dict__.items() if n != "later"} == {
        n: v for n, v in before.items() if n != "later"
    }


class HooksItself(nn.Module):
    """Watches its own layers by hooks from its first forward on, as transformers' models do for hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.is_watched = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_watched:
            for layer in (self.first, self.second):
                layer.register_forward_hook(lambda _m, _args, y: self.hidden.append(y))
            self.is_watched = True
        self.hidden: list[Tensor] = []
        self.second(self.first(x))
        answer: Tensor = self.third(torch.stack(self.hidden).sum(0))
        return answer


def test_a_model_that_hooks_itself_does_so_once_for_all_calls() -> None:
    model, given = HooksItself(), calls()
    seen = dict(walk(model, given, ["second", "third"]))
    assert hooks_of(model) == 0 and not model.is_watched
    for call, second, third in zip(given, seen["second"], seen["third"], strict=True):
        hidden = model.first(call.args[0])
        assert torch.equal(second.first, hidden) and torch.equal(third.first, hidden + model.second(hidden))


def test_a_module_that_runs_alone_draws_what_it_would_inside_the_model() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Noisy(nn.Linear(8, 8)))
    given = calls()
    with Lockstep(model, given, ["1"]) as steps, torch.no_grad():
        steps.advance()
        alone = [arrival.run(model[1]) for arrival in steps.arrivals]
        assert all(torch.equal(y, run(model, call)) for y, call in zip(alone, given, strict=True))


class Told(nn.Module):
    """Its forward tells a block what to do, which a block that runs alone has to know too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(8, 8), Scaled()

    def forward(self, x: Tensor) -> Tensor:
        self.block.scale = x.std()
        answer: Tensor = self.block(self.first(x))
        return answer


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.scale: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.scale is not None
        answer: Tensor = self.linear(x) * self.scale
        self.last = answer
        return answer


def test_a_module_that_runs_alone_finds_what_the_call_left_on_it() -> None:
    model, given = Told(), calls()
    with Lockstep(model, given, ["block", "block.linear"]) as steps, torch.no_grad():
        steps.advance()
        alone = [arrival.run(model.block) for arrival in steps.arrivals]
        assert model.block.scale is None
        steps.advance()
        assert not hasattr(model.block, "last")
        wanted = [run(model, call) for call in given]
        assert all(torch.equal(y, z) for y, z in zip(alone, wanted, strict=True))


def test_a_model_that_holds_a_lock_is_not_walked() -> None:
    class Locked(nn.Sequential):
        lock = None

        def forward(self, x: Tensor) -> Tensor:
            with self.lock:  # type: ignore[attr-defined]
                return super().forward(x)

    model = Locked(nn.Linear(8, 8), nn.Linear(8, 8))
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(LeftStepError, match="the model holds a lock"), Lockstep(model, calls(), ["1"]):
        pass


def test_an_abandoned_walk_leaves_the_generator_alone() -> None:
    steps = Lockstep(Noisy(nn.Linear(8, 8), nn.Linear(8, 8)), calls(), ["1"])
    with steps:
        steps.advance()
        first = torch.rand(1)
    assert not torch.equal(first, torch.rand(1))


# How many calls to hold where


class Shrinks(nn.Module):
    """Positions are averaged away between layers; `keeps` keeps what was large in use to the end."""

    def __init__(self, *, keeps: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.keeps = keeps

    def forward(self, x: Tensor) -> Tensor:
        large = self.first(x)
        small = large.reshape(len(x), -1, 16, 8).mean(2)
        if not self.keeps:
            large = small
        small = self.second(small)
        answer: Tensor = self.third(small.mean(1)) + large.mean() * 0
        return answer


STOPS = ["first", "second", "third"]


def images(count: int = 40) -> list[Call]:
    return [Call((torch.randn(2, 64, 8),)) for _ in range(count)]


def test_stops_where_less_is_held_get_more_calls() -> None:
    size = 2 * 64 * 8 * 4  # bytes of the first layer's output, which counts once; what the caller gave does not count
    found = stretches(Shrinks(), images(), STOPS, 4 * size)
    assert [walk.stops for walk in found] == [("first",), ("second", "third")]
    assert found[0].calls == 4 and 3 * 4 <= found[1].calls < 40


def test_what_the_forward_still_uses_counts_at_every_stop() -> None:
    found = stretches(Shrinks(keeps=True), images(), STOPS, 40 * 2 * 64 * 8 * 4)
    assert all(walk.calls < 20 for walk in found if "third" in walk.stops)
    assert stretches(Shrinks(), images(), STOPS, 40 * 2 * 64 * 8 * 4) == [Stretch(tuple(STOPS), 40)]


def test_no_more_calls_are_walked_than_are_of_use_and_no_fewer_than_two() -> None:
    seen: dict[str, int] = {}

    def wanted(name: str, numbers: int) -> int:
        seen[name] = numbers
        return 5

    assert stretches(Shrinks(), images(), STOPS, 1e9, wanted) == [Stretch(tuple(STOPS), 5)]
    assert seen == {"first": 2 * 64 * 8, "second": 2 * 4 * 8, "third": 2 * 4}
    assert [walk.calls for walk in stretches(Shrinks(), images(), STOPS, 1)] == [2]
    assert stretches(Shrinks(), images(1), STOPS, 1) == [Stretch(tuple(STOPS), 1)]
    assert stretches(Shrinks(), images(), STOPS, math.inf) == [Stretch(tuple(STOPS), 40)]


def test_stops_that_the_first_call_does_not_reach_go_with_the_last_ones() -> None:
    model = Shrinks()
    model.add_module("spare", nn.Linear(8, 8))
    assert stretches(model, images(), ["spare", *STOPS], 1e9)[-1].stops == (*STOPS, "spare")
    assert stretches(model, images(), ["spare"], 1e9) == [Stretch(("spare",), 2)]


def test_a_model_that_breaks_is_walked_with_two_calls_and_is_left_without_hooks() -> None:
    model = Shrinks()
    found = stretches(model, [Call((torch.randn(2, 63, 8),))] * 3, STOPS, 1e9)
    assert found == [Stretch(("first",), 2)] or sum(len(walk.stops) for walk in found) == 3
    assert all(walk.calls <= 3 for walk in found) and hooks_of(model) == 0


def test_calls_convolve_images_that_are_one_number_wide_as_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modes of torch belong to a thread, and each call has one."""
    shapes = []

    def counted(x: Tensor, *others: Any) -> Tensor:
        shapes.append(tuple(x.shape))
        return torch.conv1d(x, *others)

    monkeypatch.setattr(torch.nn.functional, "conv1d", counted)
    model = nn.Sequential(nn.Conv2d(2, 3, (3, 1)), nn.ReLU(), nn.Conv2d(3, 2, (3, 1)))
    given = [Call((torch.randn(size, 2, 9, 1),)) for size in (2, 4)]
    assert [name for name, _ in walk(model, given, ["2"])] == ["2"]
    assert shapes == [(2, 2, 9), (4, 2, 9), (2, 3, 7), (4, 3, 7)]


def test_many_calls_have_fewer_threads_each_and_the_caller_has_all_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("panther.healers.lockstep.SYSTEM_THREADS", 8)
    before, seen = torch.get_num_threads(), list[int]()
    torch.set_num_threads(4)
    try:
        for count, wanted in ((2, 4), (3, 2), (8, 1), (20, 1)):
            model = chain()
            model[1].register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
            walk(model, calls(count), ["1", "2"])
            assert set(seen) == {wanted} and torch.get_num_threads() == 4
            seen.clear()
    finally:
        torch.set_num_threads(before)
