"""Fewer channels between two layers: which go, what the layers become, and how a whole model fares with it."""

from __future__ import annotations

import copy
import importlib
import json
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import panther
from panther.batches import as_call
from panther.capture import capture
from panther.channels import narrowable, share_for, shares_for
from panther.columns import RIDGE, STEP, channels_of
from panther.errors import LoadError, PlanError
from panther.healers import refit
from panther.nn.narrow import is_narrowed, narrowed, sizes_of
from panther.nn.surgery import with_layers
from panther.sketches import Moments
from panther.spec import Choice, Cost, LayerSpec, Pair, Plan, Target

INPUTS, HIDDEN = 24, 96


def mixed(rows: int, size: int, seed: int = 0) -> Tensor:
    """Rows whose features depend on each other, as hidden units do."""
    generator = torch.Generator().manual_seed(seed)
    strong = torch.randn(size, size, generator=generator) * torch.arange(1, size + 1) ** -0.8
    return torch.randn(rows, size, generator=generator) @ strong.T


class Residual(nn.Module):
    """A block of a transformer without its attention: what narrows, and a layer that does not."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, INPUTS)
        self.up, self.act, self.down = nn.Linear(INPUTS, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, INPUTS, bias=bias)
        self.last = nn.Linear(INPUTS, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(x + self.down(self.act(self.up(x))))


class Inverted(nn.Module):
    """The block of a mobile network: 1 x 1, depthwise, 1 x 1."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.expand, self.norm1 = nn.Conv2d(16, 64, 1, bias=False), nn.BatchNorm2d(64)
        self.depthwise, self.norm2 = nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False), nn.BatchNorm2d(64)
        self.project, self.norm3 = nn.Conv2d(64, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = nn.functional.relu6(self.norm1(self.expand(x)))
        y = self.norm3(self.project(nn.functional.relu6(self.norm2(self.depthwise(y)))))
        return self.head((x + y).mean((2, 3)))


def residual(**options: Any) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return Residual(**options).eval(), list(mixed(640, INPUTS).split(32))


def inverted() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = Inverted()
    with torch.no_grad():  # channels that nearly say the same, as a trained network has them
        for layer in (model.expand, model.depthwise):
            layer.weight[32:] = layer.weight[:32] + 0.1 * layer.weight[32:]
    for _ in range(8):  # statistics that every channel has for itself
        model(torch.randn(8, 3, 12, 12))
    return model.eval(), [torch.randn(8, 3, 12, 12) for _ in range(12)]


MODELS = {"linear": residual, "mobile": inverted}
PAIRS = {"linear": ("up", "down", ()), "mobile": ("expand", "project", ("norm1", "depthwise", "norm2"))}


@pytest.fixture(params=MODELS, scope="module")
def case(request: pytest.FixtureRequest) -> Any:
    """A model, its data, its pair, and what compressing it to a third gives."""
    model, data = MODELS[request.param]()
    result = panther.compress(
        model, 0.35, example_inputs=data[0], calib_data=data, heal="none", progress=False, verify=False
    )
    return model, data, PAIRS[request.param], result


# Which channels go ----------------------------------------------------------------------------------------------------


def moments(rows: Tensor) -> Moments:
    rows = rows.double()
    return Moments(len(rows), rows.mean(0), torch.cov(rows.T, correction=0))


def lost(weight: Tensor, rows: Tensor, links: tuple[Tensor, ...]) -> float:
    """Share of the energy of the layer's outputs that these links lose, each mean made right."""
    chosen, solved = links
    centred = (rows - rows.mean(0)).double()
    wanted, got = centred @ weight.double().T, centred @ (solved.double() @ chosen.double()).T
    return float((wanted - got).square().sum() / wanted.square().sum())


def test_the_predicted_error_is_what_is_lost() -> None:
    rows, weight = mixed(2000, 64), torch.randn(16, 64)
    found = channels_of(weight, moments(rows), None)
    for ranks, error in zip(found.ranks, found.errors, strict=True):
        # the ridge counts as well where channels nearly say the same
        assert lost(weight, rows, found.links(weight, ranks)) == pytest.approx(error, rel=0.1, abs=RIDGE)


def test_channels_that_others_stand_for_go_first_at_no_cost() -> None:
    rows = mixed(2000, 32)
    doubled = torch.cat([rows, rows.flip(1)], 1)  # every channel is there twice
    weight = torch.randn(8, 64)
    found = channels_of(weight, moments(doubled), None)
    assert found.errors[found.ranks.index((32,))] < 2 * RIDGE
    chosen, _ = found.links(weight, (32,))
    pairs = torch.minimum(chosen.argmax(1), 63 - chosen.argmax(1))
    assert sorted(pairs.tolist()) == list(range(32))


def test_it_beats_the_largest_channels_solved_for() -> None:
    rows, weight = mixed(2000, 64, seed=3), torch.randn(16, 64)
    found, count = channels_of(weight, moments(rows), None), 24
    largest = (weight.norm(dim=0) * rows.std(0)).topk(count).indices
    centred = (rows - rows.mean(0)).double()
    wanted = centred @ weight.double().T
    solved = torch.linalg.lstsq(centred[:, largest], wanted).solution
    by_size = float((wanted - centred[:, largest] @ solved).square().sum() / wanted.square().sum())
    assert lost(weight, rows, found.links(weight, (count,))) < by_size


def test_outputs_that_the_model_does_not_react_to_count_less() -> None:
    rows, weight = mixed(2000, 64), torch.randn(16, 64)
    heavy = torch.diag(torch.tensor([1.0] * 2 + [1e-6] * 14)) * 8
    errors = []
    for sensitivity in (None, heavy):
        chosen, solved = channels_of(weight, moments(rows), sensitivity).links(weight, (16,))
        errors.append(lost(weight[:2], rows, (chosen, solved[:2])))
    assert errors[1] < errors[0]


def test_what_is_seen_of_the_inputs_says_the_same_as_of_the_outputs() -> None:
    rows, weight = mixed(500, 32), torch.randn(48, 32)
    factor = torch.randn(48, 48).double()
    reacts = factor @ factor.T / 48
    full = channels_of(weight, moments(rows), reacts)
    # (n, n): what measuring gives where there are more outputs than inputs; both have their own small ridge
    seen = channels_of(weight, moments(rows), weight.double().T @ reacts @ weight.double())
    torch.testing.assert_close(torch.tensor(seen.errors), torch.tensor(full.errors), rtol=0.2, atol=0.01)


def test_leaving_out_one_by_one_is_what_a_solver_says() -> None:
    rows, weight = mixed(800, 24).double(), torch.randn(8, 24).double()
    found = channels_of(weight.float(), moments(rows.float()), None)
    covariance = moments(rows).covariance + RIDGE * moments(rows).covariance.diagonal().mean() * torch.eye(24)
    left, lost, errors = list(range(24)), 0.0, {}
    now = weight.clone()
    while len(left) > STEP:
        inverse = torch.linalg.inv(covariance[left][:, left])
        cost = now.square().sum(0) / inverse.diagonal()
        gone = int(cost.argmin())
        lost += float(cost[gone])
        now = now - torch.outer(now[:, gone], inverse[gone] / inverse[gone, gone])
        left.pop(gone)
        now = now[:, [i for i in range(len(left) + 1) if i != gone]]
        errors[len(left)] = lost / float(((weight @ moments(rows).covariance) * weight).sum())
    for (count,), error in zip(found.ranks, found.errors, strict=True):
        assert error == pytest.approx(errors[count], rel=1e-3)
    chosen, solved = found.links(weight.float(), (STEP,))
    assert chosen.argmax(1).tolist() == left
    torch.testing.assert_close(solved, now.float(), rtol=1e-2, atol=1e-3)


def test_errors_rise_as_channels_go_and_counts_are_multiples_of_the_step() -> None:
    found = channels_of(torch.randn(16, 100), moments(mixed(1000, 100)), None)
    assert [rank % STEP for (rank,) in found.ranks] == [0] * len(found.ranks)
    assert list(found.ranks) == sorted(found.ranks)
    assert list(found.errors) == sorted(found.errors, reverse=True)


@pytest.mark.parametrize("rows", [torch.zeros(50, 32), torch.ones(50, 32), mixed(3, 32)], ids=["0", "1", "few"])
def test_channels_that_never_change_are_no_trouble(rows: Tensor) -> None:
    found = channels_of(torch.randn(8, 32), moments(rows), None)
    for ranks in found.ranks:
        assert all(bool(torch.isfinite(part).all()) for part in found.links(torch.randn(8, 32), ranks))


# Which pairs there are ------------------------------------------------------------------------------------------------


def spec_of(name: str, inputs: int, outputs: int, **more: Any) -> LayerSpec:
    return LayerSpec(name, "conv2d" if more else "linear", inputs, outputs, rows=8, **more)


def test_each_layer_is_in_one_pair_the_largest() -> None:
    specs = [spec_of("a", 8, 32), spec_of("b", 32, 64), spec_of("c", 64, 512)]
    pairs = [Pair("a", "b"), Pair("b", "c")]
    assert narrowable(specs, pairs) == {"b": pairs[1], "c": pairs[1]}


def test_kernels_padding_and_few_channels_make_no_pair() -> None:
    kernel = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    point = {**kernel, "kernel_size": (1, 1)}
    first = spec_of("a", 8, 32, **point)
    assert narrowable([first, spec_of("b", 32, 8, **point)], [Pair("a", "b")])
    assert not narrowable([first, spec_of("b", 32, 8, **kernel)], [Pair("a", "b")])
    assert not narrowable([first, spec_of("b", 32, 8, **{**point, "padding": (1, 1)})], [Pair("a", "b")])
    few = changed(first, out_features=8)
    assert not narrowable([few, spec_of("b", 8, 8, **point)], [Pair("a", "b")])


def test_a_budget_leaves_as_much_to_ranks_as_to_channels() -> None:
    assert [share_for(kept) for kept in (1.0, 0.95, 0.7, 0.5, 0.36, 0.1)] == [None, None, 0.8, 0.7, 0.6, 0.5]


def stored(layer: str, dtype: str, size: int, group: int = 0) -> Choice:
    return Choice(layer, "whole", (), "quantised", dtype=dtype, group_size=group, cost=Cost(size_bytes=size))


def test_shares_with_which_a_grid_alone_is_within_the_limit_are_tried_too() -> None:
    """Both layers in 4 bits take 320 with a scale for 32 numbers, 280 with one for 128, and 500 in 8 bits."""
    options = {
        name: [
            *(stored(name, "int4", 140, 128), stored(name, "int4", 160, 32), stored(name, "int8", 250)),
            Choice(name, packing="dense", cost=Cost(size_bytes=1000)),
        ]
        for name in ("a", "b")
    }
    target = Target(size_bytes=250)
    assert shares_for(0.125, options, ("a", "b"), target) == [0.5, 0.8]  # 250 of 500, of 280, and .7 between them
    assert shares_for(0.36, options, ("a", "b"), target) == [0.6, 0.5, 0.8]
    assert shares_for(0.125, options, ("a",), target) == [0.5, 0.7]  # 160 - 70 of 160, and 140 - 30 of 140
    assert shares_for(0.125, options, (), target) == [0.5]
    assert shares_for(0.5, options, ("a", "b"), Target(size_bytes=1000)) == [0.7]  # all grids are small enough
    assert shares_for(0.99, options, ("a", "b"), Target(size_bytes=1980)) == []


# What layers become ---------------------------------------------------------------------------------------------------


def test_a_narrowed_layer_computes_part_of_what_it_did() -> None:
    layer, x = nn.Linear(12, 20), torch.randn(5, 12)
    inputs, outputs = torch.tensor([0, 3, 7]), torch.tensor([19, 2])
    small = narrowed(layer, inputs=inputs, outputs=outputs)
    only = torch.zeros(12).index_fill(0, inputs, 1.0)
    torch.testing.assert_close(small(x[:, inputs]), layer(x * only)[:, outputs])
    assert sizes_of(small) == (3, 2) and sizes_of(layer) == (12, 20)
    assert is_narrowed(small) and not is_narrowed(layer)
    assert small.weight.data_ptr() != layer.weight.data_ptr()


@pytest.mark.parametrize(
    ("options", "is_pair"),
    [({}, True), ({"include": ["expand", "project"]}, False), ({"include": [nn.Conv2d]}, True)],
    ids=["all", "two", "class"],
)
def test_a_depthwise_convolution_outside_of_include_keeps_its_neighbours_channels(
    options: dict[str, Any], is_pair: bool
) -> None:
    found = panther.analyze(Inverted().eval(), torch.randn(2, 3, 8, 8), **options)
    assert any("depthwise" in pair.between for pair in found.followers) is is_pair


def test_a_narrowed_norm_and_a_depthwise_convolution_keep_their_channels() -> None:
    kept = torch.tensor([1, 4, 6])
    norm, conv = nn.BatchNorm2d(8).eval(), nn.Conv2d(8, 8, 3, groups=8)
    norm.running_mean.copy_(torch.arange(8.0))
    x = torch.randn(2, 8, 5, 5)
    for module in (norm, conv):
        torch.testing.assert_close(narrowed(module, outputs=kept)(x[:, kept]), module(x)[:, kept])


def test_what_cannot_be_narrowed_says_so() -> None:
    with pytest.raises(TypeError, match="LayerNorm"):
        narrowed(nn.LayerNorm(8), outputs=torch.tensor([0]))
    with pytest.raises(ValueError, match="2 groups"):
        narrowed(nn.Conv2d(8, 8, 3, groups=2), outputs=torch.tensor([0]))
    with pytest.raises(ValueError, match="reads what it gives"):
        narrowed(nn.BatchNorm2d(8), inputs=torch.tensor([0]))


# Whole models ---------------------------------------------------------------------------------------------------------


def test_both_layers_and_what_is_between_have_the_channels_of_the_plan(case: Any) -> None:
    model, data, (first, second, between), result = case
    channels = result.plan[first].channels
    assert 0 < channels == result.plan[second].channels < sizes_of(model.get_submodule(second))[0]
    assert sizes_of(result.model.get_submodule(first))[1] == channels
    assert sizes_of(result.model.get_submodule(second))[0] == channels
    assert all(sizes_of(result.model.get_submodule(name)) == (channels, channels) for name in between)
    assert result.budget_met
    with torch.no_grad():
        assert bool(torch.isfinite(result.model(data[0])).all())


def test_the_dense_model_is_as_it_was(case: Any) -> None:
    model, _data, _pair, _result = case
    fresh, _ = MODELS["linear" if isinstance(model, Residual) else "mobile"]()
    torch.testing.assert_close(model.state_dict(), fresh.state_dict(), rtol=0, atol=0)


def test_it_loses_less_than_ranks_alone(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, _pair, result = case
    monkeypatch.setattr("panther.prepared.shares_for", lambda *_: [])
    alone = panther.compress(model, 0.35, example_inputs=data[0], calib_data=data, heal="none", progress=False)
    assert not any(choice.channels for choice in alone.plan.choices)

    def error(candidate: nn.Module) -> float:
        with torch.no_grad():
            return sum(float((candidate(x) - model(x)).square().mean()) for x in data)

    assert error(result.model) < error(alone.model)


def test_the_report_counts_what_is_there(case: Any) -> None:
    _model, _data, (first, second, between), result = case
    rows = {row.name: row for row in result.report.layers}
    for name in (first, second):
        stored = result.model.get_submodule(name)
        numbers = sum(p.numel() for p in stored.state_dict().values())
        own_bias = result._prepared.factors[name].spec.has_bias
        assert rows[name].after.params == numbers - (rows[name].channels and own_bias and len(stored.bias))
        assert rows[name].channels == result.plan[name].channels
        assert rows[name].kept < 1
    assert all(rows[name].kept < 1 for name in between if name in rows)
    assert "channels" in str(result.report)


def test_a_narrowed_model_is_saved_and_loaded(case: Any, tmp_path: Path) -> None:
    model, data, _pair, result = case
    loaded = panther.load(result.save(tmp_path / "saved"), model=copy.deepcopy(model))
    with torch.no_grad():
        torch.testing.assert_close(loaded(data[0]), result.model(data[0]), rtol=0, atol=0)
    again = panther.load(tmp_path / "saved", model=lambda: copy.deepcopy(model))
    assert again.state_dict().keys() == result.model.state_dict().keys()


def test_a_narrowed_model_is_exported(case: Any, tmp_path: Path) -> None:
    *_rest, result = case
    assert result.export_onnx(tmp_path / "model.onnx").ok


def test_a_plan_in_json_makes_the_same_model(case: Any) -> None:
    model, data, _pair, result = case
    plan = Plan.from_json(result.plan.to_json())
    again = panther.compress(
        model, 0.35, example_inputs=data[0], calib_data=data, heal="none", plan=plan, progress=False, verify=False
    )
    with torch.no_grad():
        torch.testing.assert_close(again.model(data[0]), result.model(data[0]), rtol=0, atol=0)


@pytest.mark.parametrize(("count", "message"), [(0, "share their channels"), (9, "expected one of")])
def test_a_plan_whose_channels_do_not_fit_is_refused(case: Any, count: int, message: str) -> None:
    model, data, (first, second, _between), result = case
    layers = (first,) if count == 0 else (first, second)
    choices = tuple(changed(c, channels=count) if c.layer in layers else c for c in result.plan.choices)
    with pytest.raises(PlanError, match=message):
        panther.compress(
            model,
            0.35,
            example_inputs=data[0],
            calib_data=data,
            plan=changed(result.plan, choices=choices),
            progress=False,
        )


def test_a_plan_with_channels_needs_calibration_data(case: Any) -> None:
    model, data, _pair, result = case
    with pytest.raises(PlanError, match="without calibration data"), pytest.warns(UserWarning, match="no calibration"):
        panther.compress(model, 0.35, example_inputs=data[0], plan=result.plan, progress=False)


def test_another_budget_is_solved_without_measuring_again(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    *_rest, result = case
    module = importlib.import_module("panther.compress")  # the package has the function by this name
    monkeypatch.setattr(module, "measure", lambda *a, **k: pytest.fail("measured again"))
    smaller = result.resolve(0.25)
    assert smaller.budget_met and smaller.report.compressed.params < result.report.compressed.params


def test_in_place_the_model_itself_is_narrowed(case: Any) -> None:
    model, data, (_first, second, _between), result = case
    own = copy.deepcopy(model)
    again = panther.compress(
        own, 0.35, example_inputs=data[0], calib_data=data, heal="none", inplace=True, progress=False, verify=False
    )
    assert again.model is own and sizes_of(own.get_submodule(second))[0] == result.plan[second].channels
    with torch.no_grad():
        torch.testing.assert_close(own(data[0]), result.model(data[0]))


@pytest.mark.parametrize("mode", ["refit", "blocks", "distill", "auto"])
def test_healing_brings_it_nearer(case: Any, mode: str) -> None:
    model, data, _pair, result = case
    healed = panther.compress(
        model,
        0.35,
        example_inputs=data[0],
        calib_data=data,
        heal=panther.Heal(mode, steps=40, time_limit=60),
        progress=False,
        verify=False,
    )
    healing = healed.report.healing
    assert healing is not None and healing.after <= healing.before
    assert [c.channels for c in healed.plan.choices] == [c.channels for c in result.plan.choices]
    if mode in ("distill", "auto"):
        assert healing.after < healing.before


def test_a_narrowed_layer_without_a_bias_is_solved_again() -> None:
    model, data = inverted()
    kept = torch.arange(0, 64, 2)
    parts = {name: narrowed(model.get_submodule(name), outputs=kept) for name in ("expand", *PAIRS["mobile"][2])}
    parts["project"] = narrowed(model.get_submodule("project"), inputs=kept)
    stem = copy.deepcopy(model.get_submodule("stem"))  # gives other mixtures, which the next layer could undo
    with torch.no_grad():
        mix = torch.eye(16) + 0.1 * torch.randn(16, 16)
        stem.weight.copy_(torch.einsum("ij,jklm->iklm", mix, stem.weight))  # type: ignore[operator, arg-type]
    student = with_layers(model, {"stem": stem, **copy.deepcopy(parts)})
    calls = [as_call(x) for x in data]
    specs = [spec for spec in capture(model, calls[0]).layers if spec.name in ("expand", "project")]

    def lost(name: str) -> float:
        found: list[Tensor] = []
        for one in (model, student):
            hook = one.get_submodule(name).register_forward_hook(lambda _m, _a, y: found.append(y))
            with torch.no_grad():
                one(data[-1])
            hook.remove()
        wanted = found[0][:, kept] if name == "expand" else found[0]
        return float((wanted - found[1]).square().sum())

    before = {name: lost(name) for name in ("expand", "project")}
    done = refit(model, student, calls, specs, {}, narrow={"expand": parts["expand"], "project": parts["project"]})
    assert set(done.accepted) == {"expand", "project"}, done.kept
    assert lost("expand") < 0.4 * before["expand"]  # a quarter: half of the target undoes it, see ANCHOR
    assert lost("project") < 0.8 * before["project"]


class Counting(Residual):
    """Looks at how many channels there are."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        y = self.act(self.up(x))
        if self.what == "scales":
            y = y * (10 / y.shape[-1] ** 0.5)
        elif self.what == "asserts":
            assert y.shape[-1] == HIDDEN
        return self.last(x + self.down(y))


@pytest.mark.parametrize(("what", "notes"), [("scales", 1), ("asserts", 1), ("nothing", 0)])
def test_channels_that_the_model_counts_all_stay(what: str, notes: int) -> None:
    torch.manual_seed(0)
    model, data = Counting(what).eval(), list(mixed(640, INPUTS).split(32))
    result = panther.compress(
        model, 0.35, example_inputs=data[0], calib_data=data, heal="none", progress=False, verify=False
    )
    assert any(choice.channels for choice in result.plan.choices) == (not notes)
    assert sum("up, down keep all their channels" in note for note in result.report.notes) == notes


class Chained(nn.Module):
    """Residual pairs whose first layers give far more than their second ones need."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 96), nn.Linear(96, 10)
        self.middle = nn.ModuleList(nn.Linear(96, 96) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = x = torch.relu(3 * self.first(x))
        for index, layer in enumerate(self.middle):
            y = torch.relu(3 * layer(y + x if index == 2 else y))
        return self.last(y)


@pytest.mark.parametrize("budget", [0.35, 0.5])
def test_refit_helps_where_layers_give_fewer_channels(budget: float) -> None:
    torch.manual_seed(0)
    model = Chained().eval()
    mixing = torch.randn(12, 64)
    data = [torch.tanh(torch.randn(32, 12) @ mixing / 3) + 0.1 * torch.randn(32, 64) for _ in range(100)]
    result = panther.compress(
        model, budget, example_inputs=data[0], calib_data=data, heal="refit", progress=False, verify=False
    )
    assert any(choice.channels for choice in result.plan.choices), result.plan.choices
    healing = result.report.healing
    assert healing is not None and healing.after < 0.95 * healing.before  # in the plain norm: made worse, so undone


def test_a_latency_budget_times_narrowed_layers() -> None:
    model, data = residual()
    result = panther.compress(
        model,
        panther.Budget(params=0.4, latency_ms="100%"),
        example_inputs=data[0],
        calib_data=data,
        heal="none",
        progress=False,
        verify=False,
    )
    assert all(choice.cost.latency_ms > 0 for choice in result.plan.choices)


def test_the_tuned_search_goes_on_from_a_narrowed_plan(case: Any) -> None:
    model, data, _pair, result = case
    tuned = panther.compress(
        model,
        0.35,
        example_inputs=data[0],
        calib_data=data,
        heal="none",
        search="tuned",
        n_trials=6,
        progress=False,
        verify=False,
    )
    assert [c.channels for c in tuned.plan.choices] == [c.channels for c in result.plan.choices]
    assert tuned.report.tuning is not None
    assert all(trial.kept <= 0.351 for trial in tuned.report.tuning.trials if trial.phase != "given")
    assert tuned.budget_met


def test_hooks_and_frozen_parameters_stay() -> None:
    model, data = residual()
    model.up.register_forward_pre_hook(lambda module, args: None)
    model.act.register_forward_hook(lambda module, args, output: None)
    seen = capture(model, as_call(data[0])).followers
    assert seen == (), "somebody looks at the channels"


def test_a_layer_without_a_bias_gains_one_that_is_counted() -> None:
    model, data = residual(bias=False)
    result = panther.compress(
        model, 0.4, example_inputs=data[0], calib_data=data, heal="none", progress=False, verify=False
    )
    if result.plan["down"].channels:
        assert result.model.down.bias is not None
    stored = sum(row.after.params for row in result.report.layers)
    assert stored <= 0.4 * sum(row.before.params for row in result.report.layers)


# Damaged files --------------------------------------------------------------------------------------------------------


CHANGES: dict[str, Any] = {
    "more than there are": lambda record, key: record.update({key: [96, 960] if key == "inputs" else [24, 960]}),
    "none": lambda record, key: record.update({key: [96, 0]}),
    "text": lambda record, key: record.update({key: "96"}),
    "nothing": lambda record, key: record.pop(key),
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a model whose layers are dense, and fewer channels between them."""
    model, data = residual()
    dense = panther.compress(
        model, 0.35, example_inputs=data[0], calib_data=data, heal="none", progress=False, verify=False
    )
    small = copy.deepcopy(model)
    index = torch.arange(0, HIDDEN, 2)
    small.up, small.down = narrowed(model.up, outputs=index), narrowed(model.down, inputs=index)
    from panther.converters.compressed import save

    return save(small, tmp_path / "folder", plan=dense.plan, report=dense.report)


def test_narrowed_dense_layers_are_saved_and_loaded(saved: Path) -> None:
    model, data = residual()
    loaded = panther.load(saved, model=model)
    assert sizes_of(loaded.up) == (INPUTS, HIDDEN // 2) and sizes_of(loaded.down) == (HIDDEN // 2, INPUTS)
    only = torch.arange(HIDDEN) % 2 == 0
    hidden = torch.nn.functional.gelu(model.up(torch.tanh(model.first(data[0])))) * only
    torch.testing.assert_close(loaded(data[0]), model.last(torch.tanh(model.first(data[0])) + model.down(hidden)))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_sizes_that_do_not_fit_are_refused(saved: Path, change: Any) -> None:
    path = saved / "panther.json"
    manifest = json.loads(path.read_text())
    change(manifest["layers"]["down"], "inputs")
    path.write_text(json.dumps(manifest))
    with pytest.raises(LoadError, match="cannot be cut"):
        panther.load(saved, model=residual()[0])


def test_another_architecture_is_refused(saved: Path) -> None:
    model, _ = residual()
    model.down = nn.Linear(HIDDEN * 2, INPUTS)
    with pytest.raises(LoadError, match="the architecture given has 192"):
        panther.load(saved, model=model)
