"""Sketched layers solved again in closed form: the best factors for what they really get, where these help."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panther import chains
from panther.batches import Call
from panther.capture import capture
from panther.healers.lockstep import Arrival, LeftStepError
from panther.healers.refit import (
    ANCHOR,
    HELD_OUT_EVERY,
    RIDGE,
    Gate,
    Refitted,
    _Layer,
    _solve_last_link,
    gate_of,
    refit,
    regression,
)
from panther.nn import SKETCHED, SketchedLayer
from panther.nn.surgery import with_layers
from panther.spec import LayerSpec

module_of_refit: Any = importlib.import_module("panther.healers.refit")  # the package has the function by this name

pytestmark = pytest.mark.filterwarnings("ignore:SK.*would be smaller:UserWarning")  # layers this small hardly pay

CLOSE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}  # sums of a few thousand float32 products against float64


def steep(layer: nn.Module, power: float = 0.7) -> nn.Module:
    """A layer whose singular values fall like k^-power, as those of trained ones do."""
    with torch.no_grad():
        flat = layer.weight.flatten(1)  # type: ignore[operator, union-attr]
        u, s, vh = torch.linalg.svd(flat, full_matrices=False)
        values = torch.arange(1.0, len(s) + 1) ** -power
        layer.weight.copy_(2 * (u * values @ vh).reshape(layer.weight.shape))  # type: ignore[operator, union-attr]
    return layer


def mlp(depth: int = 4, width: int = 24) -> nn.Sequential:
    parts = [part for _ in range(depth) for part in (steep(nn.Linear(width, width)), nn.GELU())]
    return nn.Sequential(*parts, nn.Linear(width, 5)).eval()


def data(count: int = 24, size: int = 16, width: int = 24, seed: int = 1) -> list[Call]:
    """Inputs of a few strong directions."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(width, width, generator=torch.Generator().manual_seed(5)) * torch.linspace(2, 0.05, width)
    return [Call((torch.randn(size, width, generator=generator) @ basis.T,)) for _ in range(count)]


def specs_of(model: nn.Module, call: Call, names: Sequence[str]) -> list[LayerSpec]:
    return [spec for spec in capture(model, call).layers if spec.name in names]


def sketched(model: nn.Module, ranks: Mapping[str, int], scheme: str | None = None) -> nn.Module:
    def made(layer: nn.Module, rank: int) -> SketchedLayer:
        return SKETCHED[type(layer)].from_dense(layer, rank=rank, scheme=scheme)

    return with_layers(model, {name: made(model.get_submodule(name), rank) for name, rank in ranks.items()})


@torch.no_grad()
def error(model: nn.Module, other: nn.Module, calls: Sequence[Call]) -> float:
    pairs = [(model(*call.args), other(*call.args)) for call in calls]
    return sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(a.square().sum()) for a, _ in pairs)


def refitted(
    model: nn.Module, student: nn.Module, calls: Sequence[Call], names: Sequence[str], **options: Any
) -> Refitted:
    return refit(model, student, calls, specs_of(model, calls[0], names), {}, **options)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, before: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# A whole net


def test_the_error_on_unseen_inputs_falls() -> None:
    model, calls, unseen = mlp(), data(), data(6, seed=2)
    names = ["0", "2", "4", "6"]
    student = sketched(model, dict.fromkeys(names, 6))
    before = error(model, student, unseen)
    done = refitted(model, student, calls, names)
    assert set(done.accepted) == set(names) and not done.kept
    assert error(model, student, unseen) < 0.5 * before


def test_a_walk_in_stretches_refits_every_layer_on_what_fits_there() -> None:
    model, unseen, names = mlp(), data(6, seed=2), ["0", "2", "4", "6"]
    calls = data()
    widest = max(2 * 4 * call.args[0].numel() for call in calls)
    students = [sketched(model, dict.fromkeys(names, 6)) for _ in range(2)]
    before = error(model, students[0], unseen)
    done = refitted(model, students[0], calls, names, held_bytes=8 * 3 * widest)
    assert set(done.accepted) == set(names) and error(model, students[0], unseen) < 0.7 * before
    refitted(model, students[1], calls, names, held_bytes=1e12)
    whole = sketched(model, dict.fromkeys(names, 6))
    refitted(model, whole, calls, names)
    assert same(students[1], weights(whole)) or error(model, students[1], unseen) < 0.5 * before


def test_the_dense_model_the_flags_and_the_other_layers_stay() -> None:
    model, calls = mlp().train(), data()
    model[1].eval()
    student = sketched(model, {"0": 6, "4": 6})
    dense, before = weights(model), weights(student)
    refitted(model, student, calls, ["0", "4"])
    assert same(model, dense)
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"0", "4"}
    for net in (model, student):
        assert net.training and not net[1].training
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())
        assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_a_layer_keeps_its_factors_where_new_ones_do_not_help_on_held_out_calls() -> None:
    """The calls that decide are of another kind than those that are fitted to."""
    model, names = mlp(2), ["0", "2"]
    calls = data(16)
    for index in range(HELD_OUT_EVERY - 1, 16, HELD_OUT_EVERY):
        calls[index] = Call((torch.randn(16, 24) @ torch.randn(24, 24),))
    student = sketched(model, dict.fromkeys(names, 20))
    before = weights(student)
    done = refitted(model, student, calls, names)
    assert set(done.kept) | set(done.accepted) == set(names)
    assert "0" in done.kept and "did not help on held-out batches" in done.kept["0"]
    assert all(torch.equal(student.state_dict()[n], before[n]) for n in before if n.split(".")[0] in done.kept)


def test_it_gives_the_same_bits_twice() -> None:
    model, calls = mlp(), data(size=200)  # more rows than are fitted to
    students = [sketched(model, {"0": 6, "2": 6}) for _ in range(2)]
    for student in students:
        refitted(model, student, calls, ["0", "2"], seed=3)
    assert same(students[0], weights(students[1]))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 5])
def test_few_calls_and_few_samples_are_enough_for_finite_factors(count: int, size: int) -> None:
    model, calls, names = mlp(), data(count, size), ["0", "2", "4", "6"]
    student = sketched(model, dict.fromkeys(names, 6))
    done = refitted(model, student, calls, names)
    assert {*done.accepted, *done.kept} == set(names)
    assert all(bool(value.isfinite().all()) for value in student.state_dict().values())


def one_direction(count: int = 10) -> list[Call]:
    direction = torch.randn(1, 24)
    return [Call((torch.randn(16, 1) @ direction,)) for _ in range(count)]


DEGENERATE: dict[str, Callable[[], list[Call]]] = {
    "rank one": one_direction,
    "zeros": lambda: [Call((torch.zeros(16, 24),)) for _ in range(10)],
    "constant": lambda: [Call((torch.full((16, 24), 3.0),)) for _ in range(10)],
    "one feature": lambda: [Call((torch.randn(16, 24) * (torch.arange(24) == 3),)) for _ in range(10)],
}


@pytest.mark.parametrize("inputs", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_inputs_give_finite_factors_that_are_no_worse_on_them(inputs: Callable[[], list[Call]]) -> None:
    model, calls, names = mlp(), inputs(), ["0", "2", "4", "6"]
    student = sketched(model, dict.fromkeys(names, 6))
    before = error(model, student, calls)
    refitted(model, student, calls, names)
    assert all(bool(value.isfinite().all()) for value in student.state_dict().values())
    assert error(model, student, calls) <= before + 1e-9


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_activations_that_are_not_finite_keep_the_factors(value: float) -> None:
    model, calls = mlp(), data(10)
    student = sketched(model, {"0": 6, "2": 6})
    with torch.no_grad():
        student[0].bias[0] = value
    before = weights(student)
    done = refitted(model, student, calls, ["2"])
    assert list(done.kept) == ["2"]
    assert all(torch.equal(student.state_dict()[n], v) for n, v in before.items() if n.startswith("2"))


def test_a_dense_layer_of_zeros_is_no_obstacle() -> None:
    model, calls = mlp(), data(10)
    with torch.no_grad():
        model[8].weight.zero_()
        model[2].weight.zero_()
    student = sketched(model, {"0": 6, "2": 6, "8": 2})
    refitted(model, student, calls, ["0", "2", "8"])
    assert all(bool(value.isfinite().all()) for value in student.state_dict().values())


class Twice(nn.Module):
    """Runs its second layer once more for long inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (steep(nn.Linear(24, 24)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).tanh()).tanh()
        if len(x) > 16:
            x = self.b(x).tanh()
        answer: Tensor = self.c(x)
        return answer


def test_a_layer_that_runs_twice_is_left_and_the_others_are_not() -> None:
    model, calls = Twice(), data(10, 20)
    student = sketched(model, {"a": 6, "b": 6, "c": 6})
    done = refitted(model, student, calls, ["a", "b", "c"])
    assert done.kept == {"b": "it runs more than once in a forward pass"} and set(done.accepted) <= {"a", "c"}


def test_a_layer_that_runs_twice_with_the_data_only_ends_the_refit() -> None:
    model, calls = Twice(), data(10, 20)
    student = sketched(model, {"a": 6, "b": 6, "c": 6})
    specs = specs_of(model, data(1, 4)[0], ["a", "b", "c"])
    with pytest.raises(LeftStepError, match="b runs more than once in some batches"):
        refit(model, student, calls, specs, {})


def test_batches_that_part_ways_end_the_refit_and_leave_no_hook() -> None:
    model = Twice()
    student = sketched(model, {"a": 6, "b": 6, "c": 6})
    specs = specs_of(model, data(1, 4)[0], ["a", "b", "c"])
    with pytest.raises(LeftStepError, match="different layers"):
        refit(model, student, [*data(3, 4), *data(3, 20)], specs, {})
    assert not any(m._forward_pre_hooks for net in (model, student) for m in net.modules())


def test_a_layer_without_a_bias_to_correct_is_left() -> None:
    model, calls = nn.Sequential(steep(nn.Linear(24, 24, bias=False))), data(10)
    student = sketched(model, {"0": 6})
    assert refitted(model, student, calls, ["0"]).kept == {"0": "it has no bias to correct"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layers_are_solved_in_float32_or_better(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    calls, unseen = ([Call((c.args[0].to(dtype),)) for c in data(n, seed=s)] for n, s in ((16, 1), (4, 2)))
    names = ["0", "2", "4", "6"]
    student = sketched(model, dict.fromkeys(names, 6))
    before = error(model, student, unseen)
    refitted(model, student, calls, names)
    assert error(model, student, unseen) < 0.7 * before
    assert all(p.dtype == dtype for p in student.parameters())


class Mixed(nn.Module):
    """Runs its layers in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            answer: Tensor = self.net(x.bfloat16())
        return answer


def test_layers_inside_autocast_are_solved_too() -> None:
    model, calls = Mixed(), data(10)
    student = sketched(model, {"net.0": 6, "net.2": 6})
    before = error(model, student, calls)
    assert refitted(model, student, calls, ["net.0", "net.2"]).accepted
    assert error(model, student, calls) < before


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = steep(nn.Linear(24, 24))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        answer: Tensor = self.layer(x) * attention_mask[..., None]
        return answer


def test_padding_has_no_say_in_the_factors() -> None:
    model = Masked()
    students = [sketched(model, {"layer": 6}) for _ in range(2)]
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    quiet = [Call((), {"x": torch.randn(2, 6, 24), "attention_mask": mask}) for _ in range(20)]
    loud = [
        Call((), {"x": torch.where(mask[..., None] > 0, c.kwargs["x"], 1e4), "attention_mask": mask}) for c in quiet
    ]
    for student, calls in zip(students, (quiet, loud), strict=True):
        refitted(model, student, calls, ["layer"])
    assert same(students[0], weights(students[1]))


# One matrix for every row


def sums(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    return h.T @ h / len(h), x.T @ h / len(h)


def lost(weight: Tensor, factors: tuple[Tensor, Tensor], x: Tensor, h: Tensor, metric: Tensor) -> float:
    """The loss that `regression` says it minimises, ridge included."""
    target = (1 - ANCHOR) * h @ weight.T + ANCHOR * x @ weight.T
    product = factors[0] @ factors[1]
    ridge = RIDGE * float(h.square().mean())
    off = ((target - h @ product.T) @ metric).square().sum() / len(h)
    return float(off + ridge * (metric.T @ (weight - product)).square().sum())


@pytest.mark.parametrize(("m", "n"), [(6, 9), (9, 6), (7, 7)])
@pytest.mark.parametrize("rank", [1, 3])
def test_no_other_factors_of_this_rank_lose_less(m: int, n: int, rank: int) -> None:
    """Among those that gradient steps find from several starts, the closed form's loss is the least."""
    weight, x = torch.randn(m, n).double(), torch.randn(200, n).double()
    h = x + 0.3 * torch.randn(200, n)
    factors = regression(weight, *sums(x, h), None, rank)
    metric = torch.eye(m, dtype=torch.float64)
    best = lost(weight, factors, x, h, metric)
    for _ in range(3):
        pair = [torch.randn(m, rank).double().requires_grad_(), torch.randn(rank, n).double().requires_grad_()]
        optimiser = torch.optim.LBFGS(pair, max_iter=300, line_search_fn="strong_wolfe")

        def closure(pair: list[Tensor] = pair, optimiser: Any = optimiser) -> Tensor:
            optimiser.zero_grad()
            target = (1 - ANCHOR) * h @ weight.T + ANCHOR * x @ weight.T
            product = pair[0] @ pair[1]
            loss = (target - h @ product.T).square().sum() / len(h)
            loss = loss + RIDGE * float(h.square().mean()) * (weight - product).square().sum()
            loss.backward()
            return loss

        optimiser.step(closure)
        found = lost(weight, (pair[0].detach(), pair[1].detach()), x, h, metric)
        assert best <= found * (1 + 1e-9)


def test_at_full_rank_with_its_own_inputs_the_dense_weight_comes_back() -> None:
    weight, x = torch.randn(6, 9).double(), torch.randn(50, 9).double()
    up, down = regression(weight, *sums(x, x), None, 6)
    assert torch.allclose(up @ down, weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("m", "n"), [(6, 9), (9, 6)])
def test_directions_that_the_model_reacts_to_are_kept_first(m: int, n: int) -> None:
    weight, x = torch.randn(m, n).double(), torch.randn(300, n).double()
    strong = torch.zeros(m, dtype=torch.float64)
    strong[0] = 100.0
    sensitivity = strong.diag() + 0.01 * torch.eye(m)
    given = sensitivity if m <= n else weight.T @ sensitivity @ weight
    plain, told = (regression(weight, *sums(x, x), s, 1) for s in (None, given))

    def off(factors: tuple[Tensor, Tensor]) -> float:
        return float(((weight - factors[0] @ factors[1])[0] @ x.T).square().sum())

    assert off(told) < 0.5 * off(plain)


# Convolutions against brute force


def case(
    kind: type[nn.Module], scheme: str, size: tuple[int, ...], rank: int, **options: Any
) -> tuple[_Layer, list[tuple[Call, Arrival, Arrival]]]:
    """A layer alone, in both models, and different inputs for each."""
    dense = kind(4, 5, **options)
    student = sketched(nn.Sequential(dense), {"0": rank}, scheme)
    teacher = nn.Sequential(dense)
    x = [torch.randn(3, 4, *size) for _ in range(2)]
    spec = specs_of(teacher, Call((x[0],)), ["0"])[0]
    pairs = [(Call((t,)), Arrival((t,), {}), Arrival((t + 0.3 * torch.randn_like(t),), {})) for t in x]
    own: Any = student.get_submodule(spec.name)
    return _Layer(spec, dense, own, dense, None, None, 0), pairs


@torch.no_grad()
def solved(layer: _Layer, pairs: Any) -> bool:
    return _solve_last_link(layer, pairs) is None


def brute_force(layer: _Layer, pairs: Any, gate: Gate | None = None, rounds: int = 1) -> tuple[Tensor, Tensor]:
    """Each column of the design matrix is what the chain gives with one number of its last link set to one."""
    student = copy.deepcopy(layer.sketched).double()
    dense = copy.deepcopy(layer.dense).double()
    start = student.up.detach().clone()
    assert student.bias is not None
    with torch.no_grad():
        student.bias.zero_()
        columns = []
        for index in range(start[0].numel()):
            one = torch.zeros_like(start)
            one[0].view(-1)[index] = 1
            student.up.copy_(one)
            columns.append(torch.cat([student(h.first.double())[:, 0].flatten() for _, _, h in pairs]))
        target = torch.cat(
            [
                ((1 - ANCHOR) * dense(h.first.double()) + ANCHOR * dense(x.first.double())).transpose(0, 1).flatten(1)
                for _, x, h in pairs
            ],
            dim=1,
        ).T
    design = torch.stack(columns, 1)
    mean_in = design.mean(0)
    centred = design - mean_in
    ridge = (RIDGE * float(centred.square().mean())) ** 0.5 * len(design) ** 0.5
    weight, wanted = start.flatten(1), target
    for _ in range(rounds):
        rows = torch.cat([centred, ridge * torch.eye(len(mean_in), dtype=torch.float64)])
        right = torch.cat([wanted - wanted.mean(0), ridge * weight.T])
        weight = torch.linalg.lstsq(rows, right).solution.T
        bias = wanted.mean(0) - weight @ mean_in
        if gate is not None:
            wanted = gate.wanted(target, design @ weight.T + bias)
    return weight.reshape(start.shape), bias


SCHEMES: list[tuple[type[nn.Module], str, tuple[int, ...], dict[str, Any]]] = [
    *(
        (nn.Conv2d, scheme, (7, 6), options)
        for scheme in chains.CONV_SCHEMES
        for options in (
            {"kernel_size": 3},
            {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2)},
            {"kernel_size": (2, 3), "dilation": (2, 1), "padding": "same"},
            {"kernel_size": 3, "padding": "valid", "bias": False},
        )
    ),
    *((nn.Conv1d, scheme, (12,), {"kernel_size": 4, "stride": 3, "padding": 2}) for scheme in ("output_channel",)),
    *((nn.Conv1d, scheme, (12,), {"kernel_size": 4, "padding": "same"}) for scheme in ("input_channel", "tucker2")),
    (nn.Conv3d, "input_channel", (4, 5, 4), {"kernel_size": (2, 3, 2), "stride": (1, 2, 1), "padding": 1}),
]


def named(value: Any) -> str | None:
    return value if isinstance(value, str) else getattr(value, "__name__", None)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")  # torch's own advice
@pytest.mark.parametrize(("kind", "scheme", "size", "options"), SCHEMES, ids=named)
def test_the_last_link_is_that_of_brute_force_least_squares(
    kind: type[nn.Module], scheme: str, size: tuple[int, ...], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_of_refit, "ROWS_PER_FEATURE", 10_000)  # all of them, as the other way
    layer, pairs = case(kind, scheme, size, 2, **options)
    if layer.sketched.bias is None:
        layer.sketched.bias = nn.Parameter(torch.zeros(5))  # as compress gives to a layer without one
    others = [getattr(layer.sketched, name).clone() for name in layer.sketched._weight_names[:-1]]
    weight, bias = brute_force(layer, pairs)
    assert solved(layer, pairs)
    assert layer.sketched.bias is not None
    assert torch.allclose(layer.sketched.up.double(), weight, **CLOSE)
    assert torch.allclose(layer.sketched.bias.double(), bias, **CLOSE)
    kept = [getattr(layer.sketched, name) for name in layer.sketched._weight_names[:-1]]
    assert all(torch.equal(a, b) for a, b in zip(kept, others, strict=True))


@pytest.mark.parametrize("scheme", chains.CONV_SCHEMES)
def test_the_last_link_before_a_relu_is_that_of_brute_force_too(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_of_refit, "ROWS_PER_FEATURE", 10_000)
    layer, pairs = case(nn.Conv2d, scheme, (7, 6), 2, kernel_size=3)
    gate = Gate(torch.linspace(-1, 1, 5).double(), torch.tensor([1.0, -1, 1, -1, 1]).double())
    weight, bias = brute_force(layer, pairs, gate, module_of_refit.RELU_ROUNDS)
    gated = replace(layer, gate=gate)
    assert solved(gated, pairs)
    assert layer.sketched.bias is not None
    assert torch.allclose(layer.sketched.up.double(), weight, **CLOSE)
    assert torch.allclose(layer.sketched.bias.double(), bias, **CLOSE)


@pytest.mark.parametrize("scheme", ["output_channel", "input_channel", "spatial", "tucker2"])
def test_a_last_link_of_too_many_inputs_is_multiplied_by_the_best_matrix(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_of_refit, "MOST_FEATURES", 5)
    monkeypatch.setattr(module_of_refit, "ROWS_PER_FEATURE", 10_000)
    layer, pairs = case(nn.Conv2d, scheme, (9, 8), 6, kernel_size=3, padding_mode="circular", padding=1)
    before = copy.deepcopy(layer.sketched).double()
    assert solved(layer, pairs)
    with torch.no_grad():
        dense = copy.deepcopy(layer.dense).double()
        got, wanted = (
            torch.cat([y.transpose(0, 1).flatten(1) for y in parts], 1).T
            for parts in (
                [before(h.first.double()) for _, _, h in pairs],
                [(1 - ANCHOR) * dense(h.first.double()) + ANCHOR * dense(x.first.double()) for _, x, h in pairs],
            )
        )
        centred = got - got.mean(0)
        ridge = (RIDGE * float(centred.square().mean()) * len(got)) ** 0.5
        eye = torch.eye(5, dtype=torch.float64)
        solution = torch.linalg.lstsq(
            torch.cat([centred, ridge * eye]), torch.cat([wanted - wanted.mean(0), ridge * eye])
        ).solution
        best = centred @ solution + wanted.mean(0)
        after = torch.cat([layer.sketched(h.first).double().transpose(0, 1).flatten(1) for _, _, h in pairs], 1).T
    assert torch.allclose(after, best, **CLOSE)


def test_inputs_without_a_batch_are_rows_too() -> None:
    """A convolution takes (channels, *positions) as well."""
    dense = steep(nn.Conv1d(6, 8, 3))
    model = nn.Sequential(dense)
    mix = torch.randn(6, 6) * torch.linspace(2, 0.05, 6)
    calls = [Call((mix @ torch.randn(6, 40) + 1,)) for _ in range(10)]
    student = sketched(model, {"0": 2}, "input_channel")
    before = error(model, student, calls)
    assert refitted(model, student, calls, ["0"]).accepted == ("0",)
    assert error(model, student, calls) < before


def cnn() -> nn.Sequential:
    convs = [steep(nn.Conv2d(3, 16, 3, padding=1)), steep(nn.Conv2d(16, 16, 3)), steep(nn.Conv2d(16, 12, 1, stride=2))]
    return nn.Sequential(
        convs[0], nn.ReLU(inplace=True), convs[1], nn.ReLU(inplace=True), convs[2], nn.Flatten()
    ).eval()


@pytest.mark.parametrize("scheme", ["output_channel", "input_channel", "spatial", "tucker2"])
def test_a_net_of_convolutions_with_in_place_relus_is_better_on_unseen_inputs(scheme: str) -> None:
    model = cnn()
    calls, unseen = ([Call((torch.randn(8, 3, 9, 9),)) for _ in range(n)] for n in (16, 4))
    student = sketched(sketched(model, {"0": 4, "2": 5}, scheme), {"4": 5})
    names = ["0", "2", "4"]
    before = error(model, student, unseen)
    done = refitted(model, student, calls, names, relu_after={"0": "", "2": ""})
    assert {"2", "4"} <= set(done.accepted)  # the first one may be exact already
    assert error(model, student, unseen) < before


# ReLU


def gates() -> Iterator[tuple[str, nn.Module | None]]:
    yield "no norm", None
    norm = nn.BatchNorm1d(6)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.5, -0.7, 0.0, 1e-20, -2.0, 1.0]))
        norm.bias.copy_(torch.tensor([0.3, 0.4, 1.0, -0.2, -0.5, 0.0]))
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(torch.linspace(-1, 1, 6))
        norm.running_var.copy_(torch.linspace(0.2, 2, 6))
    yield "norm", norm.eval()
    plain = nn.BatchNorm1d(6, affine=False).eval()
    yield "norm without weights", plain


@pytest.mark.parametrize("norm", [norm for _, norm in gates()], ids=[name for name, _ in gates()])
def test_a_gate_lets_pass_what_the_relu_lets_pass(norm: nn.Module | None) -> None:
    layer = nn.Linear(4, 6)
    model = nn.Sequential(layer, *([] if norm is None else [norm]), nn.ReLU())
    spec = specs_of(model, Call((torch.randn(2, 4),)), ["0"])[0]
    gate = gate_of(model, "" if norm is None else "1", spec)
    with torch.no_grad():
        y = layer(3 * torch.randn(500, 4))
        after = (y if norm is None else norm(y)).relu()
        passed = gate.passed(y)
        assert torch.equal(passed != 0, after > 0) or norm is not None
        # What passes moves the ReLU's output; what does not, does not: equal for two rows exactly when that is equal.
        apart = [(t[:250] - t[250:]).abs() for t in (passed, after)]
        assert bool(((apart[0] < 1e-6) == (apart[1] < 1e-6))[:, [0, 1, 4, 5]].all())
        wanted = gate.wanted(y[:250], y[250:])
        assert torch.allclose((wanted if norm is None else norm(wanted)).relu(), after[:250], atol=1e-5)
        closed = passed[:250] == 0
        assert torch.equal(wanted[~closed], y[:250][~closed])
        assert torch.equal(wanted[closed & (passed[250:] == 0)], y[250:][closed & (passed[250:] == 0)])


def test_a_channel_that_its_norm_switches_off_never_counts() -> None:
    norm = dict(gates())["norm"]
    model = nn.Sequential(nn.Linear(4, 6), norm, nn.ReLU())
    gate = gate_of(model, "1", specs_of(model, Call((torch.randn(2, 4),)), ["0"])[0])
    y = torch.randn(50, 6)
    assert bool((gate.passed(y)[:, 2] == 0).all())
    got = torch.randn(50, 6)
    assert torch.equal(gate.wanted(y, got)[:, 2], got[:, 2])


def test_knowing_of_the_relu_is_better_where_most_outputs_are_closed() -> None:
    """The outputs that the ReLU closes cost rank only where nobody says that they do not matter."""
    torch.manual_seed(3)
    layer = nn.Conv2d(4, 24, 3, padding=1)
    with torch.no_grad():
        layer.bias -= 0.6  # type: ignore[operator]
    model = nn.Sequential(layer, nn.BatchNorm2d(24), nn.ReLU()).eval()
    with torch.no_grad():
        model[1].weight[::2] = -1.0
        model[1].running_mean -= 0.6  # type: ignore[operator]
    calls, unseen = ([Call((torch.randn(8, 4, 8, 8),)) for _ in range(n)] for n in (24, 6))
    errors = []
    for told in ({}, {"0": "1"}):
        student = sketched(model, {"0": 5}, "output_channel")
        refitted(model, student, calls, ["0"], relu_after=told)
        errors.append(error(model, student, unseen))
    assert errors[1] < 0.97 * errors[0]


def test_a_linear_layer_before_a_relu_is_solved_both_ways() -> None:
    model = nn.Sequential(steep(nn.Linear(24, 24), 0.3), nn.ReLU()).eval()
    with torch.no_grad():
        model[0].bias -= 1.0  # type: ignore[operator]
    calls, unseen = data(32), data(8, seed=2)
    errors = []
    for told in ({}, {"0": ""}):
        student = sketched(model, {"0": 6})
        refitted(model, student, calls, ["0"], relu_after=told)
        errors.append(error(model, student, unseen))
    assert errors[1] < errors[0]


def test_more_inputs_than_a_regression_can_take_leave_the_first_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_of_refit, "MOST_FEATURES", 10)
    model, calls = mlp(2), data(16)
    student = sketched(model, {"0": 6, "2": 6})
    before, down = error(model, student, calls), student[2].down.clone()
    assert set(refitted(model, student, calls, ["0", "2"]).accepted) == {"0", "2"}
    assert error(model, student, calls) < before and torch.equal(student[2].down, down)


def test_rows_are_chosen_and_not_copied_whole() -> None:
    """The patches of a large picture would take kernel times as much memory as the picture."""
    layer, pairs = case(nn.Conv2d, "input_channel", (40, 40), 3, kernel_size=5)
    with torch.no_grad():
        inputs, targets = module_of_refit._link_rows(layer, *pairs[0], enough=100)
        assert inputs.shape == (100, 75) and targets.shape == (100, 5)
        whole = F.unfold(layer.sketched.CONVOLVE(pairs[0][2].first, layer.sketched.down), 5).transpose(1, 2)
        found = {tuple(row.tolist()) for row in whole.reshape(-1, 75)}
    assert all(tuple(row.tolist()) in found for row in inputs)


def test_a_sensitivity_of_the_outputs_and_one_seen_from_the_inputs_say_the_same() -> None:
    """Where a layer has more outputs than inputs, a linear one's is (n, n), a 1 x 1 convolution's is (m, m)."""
    weight, rows = torch.randn(12, 5, dtype=torch.float64), torch.randn(500, 5, dtype=torch.float64)
    own = rows.T @ rows / len(rows)
    root = torch.randn(12, 12, dtype=torch.float64)
    outputs = root @ root.T
    up, down = regression(weight, own, own, outputs, 3)
    other_up, other_down = regression(weight, own, own, weight.T @ outputs @ weight, 3)
    torch.testing.assert_close(up @ down, other_up @ other_down, rtol=1e-9, atol=1e-9)
