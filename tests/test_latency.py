"""Milliseconds of layers, with a clock that is told what each run takes."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import panther
from panther.decompose import candidates, decompose
from panther.factors import Factors
from panther.latency import TICK_MS, _between, _never_falling, only_faster, with_latency
from panther.replace import sketched_layer
from panther.spec import Choice, Cost, LayerSpec


class Watch:
    """Stands for the clock: a run takes what `milliseconds` says of the layer that it calls."""

    def __init__(self, milliseconds: Callable[[nn.Module], float]) -> None:
        self.milliseconds = milliseconds
        self.timed: list[list[nn.Module]] = []
        self.seconds: list[float] = []

    def __call__(self, runs: Sequence[Callable[[], object]], *, seconds: float) -> list[float]:
        layers: list[nn.Module] = []
        for once in runs:
            once()
            layers.append(inspect.getclosurevars(once).nonlocals["layer"])
        self.timed.append(layers)
        self.seconds.append(seconds)
        return [self.milliseconds(layer) / 1e3 for layer in layers]


def numbers(layer: nn.Module) -> int:
    return sum(p.numel() for name, p in layer.named_parameters() if "bias" not in name)


def factors_of(model: nn.Module, inputs: Tensor, profile: Any = None) -> dict[str, Factors]:
    found = panther.analyze(model, inputs)
    return {s.name: decompose(model.get_submodule(s.name), s, profile) for s in found.sketchable}


def options_of(factors: dict[str, Factors]) -> dict[str, Sequence[Choice]]:
    return {name: candidates(f, 4, packings=("two_gemm",)) for name, f in factors.items()}


def timed(model: nn.Module, inputs: Tensor, watch: Watch) -> dict[str, tuple[Choice, ...]]:
    factors = factors_of(model, inputs)
    return with_latency(
        options_of(factors),
        factors,
        build=lambda choice: sketched_layer(factors[choice.layer], choice),
        medians=watch,
    )


@pytest.fixture
def blocks() -> nn.Module:
    """Two pairs of layers of equal shapes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 128), nn.Linear(128, 64))


def test_every_option_gets_the_time_of_its_rank(blocks: nn.Module) -> None:
    watch = Watch(lambda layer: numbers(layer) * 1e-4)
    options = timed(blocks, torch.randn(3, 64), watch)
    assert list(options) == ["0", "1", "2", "3"]
    for choices in options.values():
        assert len(choices) == 9  # ranks 1, 2, 4, 8, ... 40, and dense
        for choice in choices:
            assert choice.cost.latency_ms == pytest.approx(choice.cost.params * 1e-4, abs=2e-6)
        assert choices[-1].is_dense and choices[-1].reason == ""


def test_layers_of_one_geometry_are_measured_once_and_in_turn_with_the_dense_one(blocks: nn.Module) -> None:
    watch = Watch(lambda layer: numbers(layer) * 1e-4)
    timed(blocks, torch.randn(3, 64), watch)
    assert [type(layers[0]) for layers in watch.timed] == [nn.Linear, nn.Linear]
    assert [len(layers) for layers in watch.timed] == [4, 4]
    assert watch.seconds == [pytest.approx(0.2)] * 2


def test_layers_that_differ_in_more_than_their_name_are_measured_each() -> None:
    watch = Watch(lambda layer: numbers(layer) * 1e-4)
    timed(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 65)), torch.randn(3, 64), watch)
    assert len(watch.timed) == 3


def test_layers_see_inputs_of_their_own_shape_and_dtype_and_no_hooks_run() -> None:
    seen: list[Tensor] = []

    class Seeing(nn.Module):
        def forward(self, given: Tensor) -> Tensor:
            seen.append(given)
            return given

    layer = nn.Linear(32, 48).to(torch.float16)
    layer.register_forward_hook(lambda *_: pytest.fail("a hook of the user's ran"))
    spec = LayerSpec("0", "linear", 32, 48, rows=10, input_shape=(2, 5, 32), output_shape=(2, 5, 48), dtype="float16")
    factors = {"0": decompose(layer, spec, None)}
    with_latency(options_of(factors), factors, build=lambda _: Seeing(), medians=Watch(lambda _: 1.0))
    assert len(seen) == 3 and {(tuple(t.shape), t.dtype) for t in seen} == {((2, 5, 32), torch.float16)}


@pytest.mark.parametrize("calls", [1, 2])
def test_a_layer_with_fewer_channels_is_run_once_and_its_ranks_are_to_it_as_the_whole_ones(calls: int) -> None:
    """The small layer takes half of the time with a quarter of the operations: so do its ranks."""

    def factors(size: int) -> dict[str, Factors]:
        shape = (3, size)
        spec = LayerSpec("0", "linear", size, size, rows=3 * calls, calls=calls, input_shape=shape, output_shape=shape)
        return {"0": decompose(nn.Linear(size, size), spec, None)}

    def timed(of: dict[str, Factors], watch: Watch, whole: Any = None) -> Sequence[Choice]:
        def build(choice: Choice) -> nn.Module:
            return sketched_layer(of["0"], choice)

        return with_latency(options_of(of), of, build=build, medians=watch, whole=whole)["0"]

    large = timed(factors(128), Watch(lambda layer: numbers(layer) * 1e-4))
    watch = Watch(lambda layer: numbers(layer) * 2e-4)
    small = timed(factors(64), watch, {"0": large})
    assert [type(layer) for layers in watch.timed for layer in layers] == [nn.Linear]
    assert len(small) > 5
    for choice in small:
        expected = max(2e-4 * choice.cost.params, large[0].cost.latency_ms / calls / 2)  # level below the least rank
        assert choice.cost.latency_ms == pytest.approx(calls * expected, rel=0.02)


def test_a_layer_that_is_called_twice_costs_twice(blocks: nn.Module) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    options = timed(Twice(), torch.randn(3, 64), Watch(lambda layer: numbers(layer) * 1e-4))
    for choice in options["layer"]:
        assert choice.cost.latency_ms == pytest.approx(2e-4 * choice.cost.params, abs=4e-6)


def test_what_is_not_faster_is_left_out_where_only_time_counts(blocks: nn.Module) -> None:
    """The time of two products is that of one twice as large, and a little more."""
    watch = Watch(lambda layer: numbers(layer) * (1e-4 if isinstance(layer, nn.Linear) else 2e-4) + 0.01)
    every = timed(blocks, torch.randn(3, 64), watch)
    for name, choices in only_faster(every).items():
        dense = choices[-1]
        assert 1 < len(choices) < len(every[name]) == 9 and all(
            c.cost.latency_ms < dense.cost.latency_ms for c in choices[:-1]
        )
        assert max(c.cost.params for c in choices[:-1]) < dense.cost.params / 2 and dense.reason == ""


def test_a_layer_with_no_faster_rank_stays_dense_and_says_so(blocks: nn.Module) -> None:
    watch = Watch(lambda layer: 0.125 if isinstance(layer, nn.Linear) else 0.25)
    for choices in only_faster(timed(blocks, torch.randn(3, 64), watch)).values():
        (dense,) = choices
        assert dense.is_dense and dense.cost.latency_ms == 0.125
        assert dense.reason == "no rank is faster than the dense layer here (0.25 ms at best against 0.125 ms)"


def test_a_layer_that_cannot_be_run_by_itself_stays_dense_and_says_so(blocks: nn.Module) -> None:
    factors = factors_of(blocks, torch.randn(3, 64))

    def broken(choice: Choice) -> nn.Module:
        raise RuntimeError("no such kernel")

    given = options_of(factors)
    for name, choices in with_latency(given, factors, build=broken, medians=Watch(lambda _: 1.0)).items():
        assert [c.cost for c in choices] == [given[name][-1].cost]
        assert choices[0].reason == "its latency could not be measured: RuntimeError: no such kernel"


@pytest.mark.parametrize("conv", [nn.Conv1d(32, 64, 5), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.Conv3d(8, 16, 3)])
def test_every_scheme_of_a_convolution_has_times_that_rise_with_its_operations(conv: nn.Module) -> None:
    inputs = torch.randn(2, conv.in_channels, *(9,) * (conv.weight.dim() - 2))  # type: ignore[operator]
    watch = Watch(lambda layer: 100.0 if isinstance(layer, type(conv)) else numbers(layer) * 1e-3)
    (choices,) = timed(nn.Sequential(conv), inputs, watch).values()
    schemes = {choice.scheme for choice in choices[:-1]}
    assert schemes >= {"output_channel", "input_channel", "tucker2"}
    for scheme in schemes:
        group = sorted((c for c in choices if c.scheme == scheme), key=lambda c: c.cost.flops)
        times = [choice.cost.latency_ms for choice in group]
        assert times == sorted(times) and times[0] < times[-1]


def test_sums_of_times_are_exact_in_any_order(blocks: nn.Module) -> None:
    watch = Watch(lambda layer: numbers(layer) * 1.2345e-5)
    times = [c.cost.latency_ms for choices in timed(blocks, torch.randn(3, 64), watch).values() for c in choices]
    assert all((time / TICK_MS).is_integer() for time in times)
    forwards, backwards = sum(times), sum(reversed(times))
    assert forwards == backwards and forwards - sum(times[1:]) == times[0]


def test_timing_leaves_random_numbers_and_the_layers_alone(blocks: nn.Module) -> None:
    before, state = {n: t.clone() for n, t in blocks.state_dict().items()}, torch.random.get_rng_state()
    factors = factors_of(blocks, torch.zeros(3, 64))
    with_latency(
        options_of(factors),
        factors,
        build=lambda choice: sketched_layer(factors[choice.layer], choice),
        medians=Watch(lambda _: 1.0),
    )
    assert torch.equal(torch.random.get_rng_state(), state) and blocks.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in blocks.state_dict().items())


def test_the_real_clock_gives_a_time_to_every_option(blocks: nn.Module) -> None:
    from panther.verify import medians_in_turn

    factors = factors_of(blocks, torch.randn(3, 64))
    options = with_latency(
        options_of(factors),
        factors,
        build=lambda choice: sketched_layer(factors[choice.layer], choice),
        medians=lambda runs, seconds: medians_in_turn(runs, seconds=0.0),
    )
    assert all(choice.cost.latency_ms > 0 for choices in options.values() for choice in choices)


# The curve


@pytest.mark.parametrize(
    ("times", "smooth"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),
        ([1.0, 3.0, 2.0], [1.0, 2.5, 2.5]),
        ([3.0, 2.0, 1.0], [2.0, 2.0, 2.0]),
        ([3.0, 1.0, 5.0, 4.0], [2.0, 2.0, 4.5, 4.5]),
        ([], []),
    ],
)
def test_a_dip_is_evened_out(times: list[float], smooth: list[float]) -> None:
    points = [(float(i), time) for i, time in enumerate(times)]
    assert _never_falling(points) == [(float(i), time) for i, time in enumerate(smooth)]


def test_between_probes_times_lie_on_a_line_and_outside_they_are_level() -> None:
    points = [(10.0, 1.0), (20.0, 3.0), (20.0, 3.5), (40.0, 4.0)]
    assert [_between(points, flops) for flops in (5, 10, 15, 20, 30, 40, 99)] == [1.0, 1.0, 2.0, 3.0, 3.75, 4.0, 4.0]


def test_an_option_of_another_packing_has_its_own_curve() -> None:
    layer = nn.Linear(32, 32)
    spec = LayerSpec("0", "linear", 32, 32, rows=4, input_shape=(4, 32), output_shape=(4, 32))
    factors = {"0": decompose(layer, spec, None)}
    both = {"0": candidates(factors["0"], 4)}
    assert {choice.packing for choice in both["0"]} == {"two_gemm", "pivoted", "dense"}
    slow = {"two_gemm": 1.0, "pivoted": 2.0}

    class Packed(nn.Module):
        def __init__(self, choice: Choice) -> None:
            super().__init__()
            self.time = slow[choice.packing] + choice.cost.flops * 1e-6

        def forward(self, given: Tensor) -> Tensor:
            return given

    watch = Watch(lambda layer: layer.time if isinstance(layer, Packed) else 9.0)
    choices = with_latency(both, factors, build=Packed, medians=watch)["0"]
    for choice in choices[:-1]:
        assert choice.cost.latency_ms == pytest.approx(slow[choice.packing] + choice.cost.flops * 1e-6, abs=2e-6)
    assert [c.cost.params for c in choices] == [c.cost.params for c in both["0"]]


def test_no_layer_is_no_time() -> None:
    assert with_latency({}, {}, build=lambda _: nn.Identity(), medians=Watch(lambda _: 1.0)) == {}


def test_costs_add_their_times() -> None:
    costs = [Cost(1, 2, 3, i * TICK_MS) for i in range(100)]
    for order in itertools.islice(itertools.permutations(costs[:5]), 10):
        assert sum(order, Cost()) == Cost(5, 10, 15, 10 * TICK_MS)
