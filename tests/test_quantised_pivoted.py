"""Pivoted layers in whole numbers: what they compute, how plans take them, and that they round-trip."""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import panther
from panther import chains, decompose
from panther.batches import as_call
from panther.converters.onnx import write
from panther.healers.rounding import round_layers
from panther.nn import (
    LAYERS,
    PIVOTED,
    QUANTISED_PIVOTED,
    SKETCHED,
    PivotedLayer,
    QuantisedLinear,
    QuantisedPivotedLayer,
    QuantisedPivotedLinear,
    SKLinear,
    SKPivotedLinear,
)
from panther.nn.on_grid import is_held
from panther.sizes import file_bytes
from panther.spec import Choice, Grid, Plan
from tests.killing import killed_at_step

pytestmark = pytest.mark.filterwarnings("ignore:.*would be smaller:UserWarning")  # layers this small hardly pay

GRIDS = [Grid(8), Grid(4), Grid(4, 32), Grid(8, 64), Grid(16)]


def linear(*sizes: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(*sizes, **options)


DENSE: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "linear, rows": (linear(71, 19), "linear", (5, 71)),
    "linear, columns": (linear(19, 71), "linear", (5, 19)),
    "linear, no bias, 3-d": (linear(40, 16, bias=False), "linear", (2, 3, 40)),
    "conv1d, outputs": (lambda: nn.Conv1d(5, 17, 3, stride=2, padding=1), "output_channel", (2, 5, 11)),
    "conv2d, inputs": (lambda: nn.Conv2d(14, 6, 3, padding="same", dilation=2), "input_channel", (2, 14, 7, 8)),
    "conv2d, both": (lambda: nn.Conv2d(14, 16, (3, 2), padding=1, bias=False), "tucker2", (2, 14, 7, 8)),
    "conv2d, reflected": (
        lambda: nn.Conv2d(4, 16, 3, padding=1, padding_mode="reflect"),
        "output_channel",
        (2, 4, 7, 8),
    ),
    "conv3d, outputs": (lambda: nn.Conv3d(2, 13, 2), "output_channel", (1, 2, 4, 5, 3)),
}


def layers(name: str, grid: Grid = GRIDS[0], rank: int = 6) -> tuple[PivotedLayer, QuantisedPivotedLayer, Tensor]:
    """A pivoted layer of floating-point numbers, the same in whole ones, and inputs."""
    torch.manual_seed(0)
    build, scheme, size = DENSE[name]
    dense = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # also while tests are collected
        sketch = SKETCHED[type(dense)].from_dense(dense, rank=rank, scheme=scheme)
    if isinstance(sketch, SKLinear):
        side = chains.COLUMNS if "columns" in name else chains.ROWS
        pivoted: PivotedLayer = SKPivotedLinear.from_sketched(sketch, side=side)
    else:
        pivoted = PIVOTED[type(sketch)].from_sketched(sketch)
    small = QUANTISED_PIVOTED[type(pivoted)].from_pivoted(pivoted, bits=grid.bits, group_size=grid.group_size)
    return pivoted, small, torch.randn(size, generator=torch.Generator().manual_seed(1))


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=3e-5, rtol=3e-5)


# The layer


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", DENSE)
def test_a_layer_computes_with_the_numbers_that_it_stores(name: str, grid: Grid) -> None:
    pivoted, small, x = layers(name, grid)
    with torch.no_grad():
        close(small(x), small.to_pivoted()(x))
        close(small(x), small.to_dense()(x))
        lost = float((small(x) - pivoted(x)).norm() / pivoted(x).norm())
    assert 0 < lost < {16: 0.01, 8: 0.02, 4: 0.4}[grid.bits]
    assert type(small.to_pivoted()) is type(pivoted) and type(small.to_dense()) is type(pivoted).DENSE


@pytest.mark.parametrize("name", DENSE)
def test_the_numbers_of_a_layer_are_those_that_its_cost_says(name: str) -> None:
    pivoted, small, _ = layers(name)
    assert sum(part.numbers for part in small.stored) == sum(
        weight.numel() for key in ("down", "core", "up") if (weight := getattr(pivoted, key, None)) is not None
    )


@pytest.mark.parametrize("name", ["linear, rows", "linear, columns"])
def test_a_layer_that_is_all_pivots_stores_one_matrix(name: str) -> None:
    pivoted, small, x = layers(name, rank=19)
    assert len(small.stored) == 1
    with torch.no_grad():
        close(small(x), small.to_pivoted()(x))
        assert float((small(x) - pivoted(x)).norm() / pivoted(x).norm()) < 0.02


@pytest.mark.parametrize("name", DENSE)
def test_config_state_dict_copies_and_pickles_keep_every_bit(name: str) -> None:
    _, layer, x = layers(name, GRIDS[1])
    again: Any = LAYERS[type(layer).__name__].from_config(json.loads(json.dumps(layer.config())))
    assert again.config() == layer.config() and repr(again) == repr(layer)
    again.load_state_dict(layer.state_dict())
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    with torch.no_grad():
        for other in (again, copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
            assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bits", 5),
        ("bits", "4"),
        ("group_size", 7),
        ("group_size", -1),
        ("ranks", [3, 3]),
        ("ranks", [72]),
        ("in_features", 2**40),
        ("side", "both"),
        ("dtype", "int8"),
        ("row_order", 1),
        ("column_order", True),
        ("code", "print(1)"),
    ],
)
def test_hostile_configs_are_refused(key: str, value: Any) -> None:
    config = {**layers("linear, rows")[1].config(), key: value}
    with pytest.raises(ValueError, match="config"):
        QuantisedPivotedLinear.from_config(config)


def test_damaged_orders_and_scales_do_not_load() -> None:
    layer = layers("linear, rows", Grid(4, 32))[1]
    state, empty = layer.state_dict(), QuantisedPivotedLinear.from_config(layer.config())
    with pytest.raises(RuntimeError, match="no order of 19 channels"):
        empty.load_state_dict({**state, "row_order": torch.full_like(state["row_order"], 99)})
    with pytest.raises(RuntimeError, match="scales"):
        empty.load_state_dict({**state, "down.scales": state["down.scales"][:, :1]})


def test_other_bits_and_layers_are_refused() -> None:
    pivoted, small, _ = layers("linear, rows")
    with pytest.raises(ValueError, match="expected 16"):
        QuantisedPivotedLinear.from_pivoted(pivoted, bits=5)
    for other in (small, nn.Linear(4, 4), layers("conv2d, both")[0]):
        with pytest.raises(TypeError, match="is made from SKPivotedLinear"):
            QuantisedPivotedLinear.from_pivoted(other)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no constructor"):
        QuantisedPivotedLinear(4, 4)


@pytest.mark.parametrize("name", DENSE)
def test_gradients_reach_the_input_and_the_bias(name: str) -> None:
    _, layer, x = layers(name)
    layer(x.requires_grad_()).square().sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in layer.parameters())


@pytest.mark.parametrize("name", ["linear, rows", "linear, columns", "conv2d, both"])
def test_torch_compile_and_export_trace_the_whole_layer(name: str) -> None:
    _, layer, x = layers(name)
    with torch.no_grad():
        close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
        close(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_refused(number: float) -> None:
    pivoted = layers("linear, rows")[0]
    pivoted.down.data[0, 0] = number
    with pytest.raises(ValueError, match="NaN or Inf"):
        QuantisedPivotedLinear.from_pivoted(pivoted)


def test_an_order_is_changed_where_there_is_one_and_nowhere_else() -> None:
    _, by_rows, x = layers("linear, rows")
    turn = torch.randperm(19)
    wanted = by_rows(x)[:, turn]
    by_rows.reorder_outputs(turn)
    close(by_rows(x), wanted)
    _, by_columns, y = layers("linear, columns")
    turn, wanted = torch.randperm(19), by_columns(y)
    by_columns.reorder_inputs(turn)
    close(by_columns(y[:, turn]), wanted)
    with pytest.raises(ValueError, match="stay put"):
        by_columns.reorder_outputs(torch.arange(71))
    with pytest.raises(ValueError, match="stay put"):
        by_rows.reorder_inputs(torch.arange(71))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_as_products_a_layer_has_the_same_numbers_and_gathers_nothing(grid: Grid) -> None:
    _, small, x = layers("linear, rows", grid)
    assert isinstance(small, QuantisedPivotedLinear)
    products = small.to_products()
    assert isinstance(products, QuantisedLinear) and products.grid == grid
    with torch.no_grad():
        close(products(x), small(x))
    _, columns, _ = layers("linear, columns", grid)
    assert isinstance(columns, QuantisedPivotedLinear) and columns.to_products() is columns


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_of_the_layer_is_kept(dtype: torch.dtype) -> None:
    dense = nn.Linear(40, 24, dtype=dtype)
    small = QuantisedPivotedLinear.from_sketched(SKLinear.from_dense(dense, rank=8))
    assert small.stored[0].scales.dtype == small(torch.randn(3, 40, dtype=dtype)).dtype == dtype
    assert small.to_pivoted().down.dtype == dtype


# In plans


STRENGTHS = torch.logspace(0, -1.5, 64)


def rows(count: int = 16, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(9))).Q
    return [1 + torch.randn(32, 64, generator=generator) * STRENGTHS @ turn for _ in range(count)]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    parts = (nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 64, bias=False))
    return nn.Sequential(*parts).eval()


class Added(nn.Sequential):
    """No layer of it can have fewer channels."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = x + layer(torch.tanh(x))
        return x


def residual() -> nn.Sequential:
    torch.manual_seed(0)
    return Added(*(nn.Linear(64, 64) for _ in range(4))).eval()


def images(count: int = 12, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 3, 9, 9, generator=generator).cumsum(-1) for _ in range(count)]


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 24, 3, bias=False)).eval()


def plan_of(model: nn.Module, dtype: str = "int8", rank: int = 16, scheme: str = "output_channel") -> Plan:
    choices = [
        Choice(name, "linear" if isinstance(m, nn.Linear) else scheme, (rank,), chains.PIVOTED, dtype)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d)
    ]
    return Plan(tuple(choices))


def compress(model: nn.Sequential, budget: Any = 1.0, **options: Any) -> panther.Result:
    data = rows() if isinstance(model[0], nn.Linear) else images()
    given: dict[str, Any] = {"example_inputs": data[0][:4], "calib_data": data, "progress": False, "heal": "refit"}
    return panther.compress(model, budget, **{**given, "verify": False, **options})


@torch.no_grad()
def error(dense: nn.Module, small: nn.Module) -> float:
    unseen = rows(4, seed=5)
    wanted, got = (torch.cat([model(x) for x in unseen]) for model in (dense, small))
    return float((got - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


def in_whole_numbers(model: nn.Module) -> list[QuantisedPivotedLayer]:
    return [layer for layer in model.modules() if isinstance(layer, QuantisedPivotedLayer)]


def test_operations_and_bytes_at_once_take_pivots_and_lose_less_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, budget = residual(), panther.Budget(flops=0.6, size_mb="20%")
    small = compress(model, budget, dtypes=("int8", "int4"))
    assert small.budget_met and in_whole_numbers(small.model)
    monkeypatch.setattr(decompose, "packings_in", lambda *_, **__: (chains.QUANTISED,))
    without = compress(model, budget, dtypes=("int8", "int4"))
    assert without.budget_met and not in_whole_numbers(without.model)
    assert error(model, small.model) < 0.8 * error(model, without.model)


@pytest.mark.parametrize("scheme", ["output_channel", "input_channel"])
@pytest.mark.parametrize("build", [net, cnn], ids=["linear", "convolutions"])
def test_what_a_plan_says_is_stored_saved_loaded_and_exported(build: Any, scheme: str, tmp_path: Path) -> None:
    model = build()
    rank = 16 if build is net else 2 if scheme == "input_channel" else 8
    result = compress(model, plan=plan_of(model, rank=rank, scheme=scheme), dtypes=("int8",), verify=True)
    assert len(in_whole_numbers(result.model)) == len(result.plan.choices)
    assert {row.packing for row in result.report.layers} == {chains.PIVOTED}
    assert {row.stored for row in result.report.layers} == {"int8"}
    for row in result.report.layers:
        choice = result.plan[row.name]
        assert row.after.flops == choice.cost.flops
        assert row.after.size_bytes <= choice.cost.size_bytes  # an order that is the natural one is not stored
    result.save(tmp_path / "small")
    assert (tmp_path / "small" / "model.safetensors").stat().st_size == file_bytes(result.model)
    again = panther.load(tmp_path / "small", model=build)
    x = (rows if build is net else images)(1, seed=7)[0]
    with torch.no_grad():
        assert torch.equal(again(x), result.model(x))
    report = result.export_onnx(tmp_path / "small.onnx")
    assert report.ok and report.checks, report.notes
    kinds = onnx.TensorProto.DataType
    numbers = {kinds.Name(t.data_type) for t in onnx.load(report.path).graph.initializer if len(t.dims) > 1}
    assert numbers == {"INT8"}


@pytest.mark.parametrize("keep_pivots", [True, False])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_file_has_no_gather_unless_pivots_are_to_stay(grid: Grid, keep_pivots: bool, tmp_path: Path) -> None:
    _, layer, x = layers("linear, rows", grid)
    report = write(layer.eval(), tmp_path / "layer.onnx", x, keep_pivots=keep_pivots)
    assert ("Gather" in {node.op_type for node in onnx.load(report.path).graph.node}) == keep_pivots
    assert report.ok and report.checks and not any("float numbers" in note for note in report.notes), report.notes


def test_calls_that_walk_through_both_models_meet_what_is_stored() -> None:
    """Layers are exchanged behind the walk; until then the old ones compute as the new ones will."""
    model, data = net(), rows(8)
    student = nn.Sequential(*(SKLinear.from_dense(m, rank=16) if isinstance(m, nn.Linear) else m for m in model)).eval()
    met: list[Tensor] = []
    hook = student[4].register_forward_pre_hook(lambda _m, args: met.append(args[0].detach().clone()))
    specs = {spec.name: spec for spec in panther.analyze(model, data[0]).sketchable}
    said = round_layers(model, student, plan_of(model).choices, specs, [as_call(x) for x in data])
    hook.remove()
    assert said == [] and all(is_held(layer) for layer in student if not isinstance(layer, nn.ReLU | nn.Tanh))
    with torch.no_grad():
        wanted = [student[:4](x) for x in data]
    assert all(any(torch.allclose(a, b, atol=1e-5) for a in met) for b in wanted)


@pytest.mark.parametrize("sizes", [(64, 64), (64, 128), (128, 64)], ids=str)
def test_the_mean_of_what_a_layer_gives_stays(sizes: tuple[int, int]) -> None:
    """Errors are judged about the mean, which pivots and the others have to keep each in its place."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*sizes)).eval()
    data = [5 + torch.randn(64, sizes[0], generator=torch.Generator().manual_seed(i)) for i in range(12)]
    given: dict[str, Any] = {"example_inputs": data[0], "calib_data": data, "progress": False, "verify": False}
    result = panther.compress(model, 1.0, dtypes=("int4",), plan=plan_of(model, "int4"), heal="refit", **given)
    assert in_whole_numbers(result.model)
    x = torch.cat(data)
    with torch.no_grad():
        wanted, got = model(x), result.model(x)
    assert float((got - wanted).mean(0).norm()) < 0.02 * float((got - wanted).norm(dim=1).mean())


def test_rounding_that_looks_at_the_data_loses_less_than_rounding_numbers() -> None:
    model = net()
    plan = plan_of(model, "int4", rank=24)
    assert error(model, compress(model, plan=plan, dtypes=("int4",)).model) < 0.8 * error(
        model, compress(model, plan=plan, dtypes=("int4",), heal="none").model
    )


def test_healing_trains_with_the_rounding_in_place() -> None:
    model = net()
    heal = panther.Heal("distill", steps=150, learning_rate=1e-4, time_limit=1e6)
    result = compress(model, plan=plan_of(model, "int4"), dtypes=("int4",), heal=heal)
    healing = result.report.healing
    assert healing is not None and healing.steps > 0 and len(in_whole_numbers(result.model)) == 3
    figures = {stage: figure for _, stage, figure in healing.history}
    assert figures["distill"] < figures["rounding"]


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    model, plan = net(), plan_of(net(), "int4")
    heal = panther.Heal("distill", steps=60, learning_rate=1e-3, time_limit=1e6)
    whole = compress(model, dtypes=("int4",), plan=plan, heal=heal, checkpoint=tmp_path / "a")
    with killed_at_step(45):
        compress(model, dtypes=("int4",), plan=plan, heal=heal, checkpoint=tmp_path / "b")
    again = compress(model, dtypes=("int4",), plan=plan, heal=heal, checkpoint=tmp_path / "b")
    for (name, a), b in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("heal", ["refit", "none"])
def test_pivots_that_would_cost_accuracy_leave_two_products_and_that_is_said(
    heal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("panther.nn.pivoted.LARGEST_COEFFICIENT", 0.0)
    model = net()
    result = compress(model, plan=plan_of(model), dtypes=("int8",), heal=heal)
    assert not in_whole_numbers(result.model)
    assert {type(layer).__name__ for layer in result.model} >= {"QuantisedLinear"}
    assert sum("is not pivoted, it keeps its products" in note for note in result.report.notes) == 3
    assert error(model, result.model) < 0.3


@pytest.mark.parametrize("rank", [16, 60])
def test_inputs_are_rounded_where_pivots_would_not_bear_it(rank: int, tmp_path: Path) -> None:
    """An output that is a pivot sets the scale of all that comes between: one is a hundred times the others here."""
    torch.manual_seed(0)
    dense = nn.Linear(64, 64)
    dense.weight.data[3] *= 100
    sketch = SKLinear.from_dense(dense, rank=rank)
    layer = QuantisedPivotedLinear.from_sketched(sketch)
    model, x = nn.Sequential(layer, nn.LayerNorm(64, elementwise_affine=False)).eval(), rows(1)[0]
    report = model_report = write(model, tmp_path / "small.onnx", x, round_inputs=True)
    assert report.ok and report.rounding is not None and report.rounding < 0.1, report.notes
    assert any("rounded anew" in note for note in model_report.notes)
    kinds = [node.op_type for node in onnx.load(report.path).graph.node]
    assert kinds.count("MatMulInteger") == (2 if rank == 16 else 1) and "Gather" not in kinds
    plain = write(model, tmp_path / "plain.onnx", x)
    assert plain.ok and not any("rounded anew" in note for note in plain.notes)


def test_what_is_rounded_anew_is_measured_and_pivots_that_are_to_stay_do(tmp_path: Path) -> None:
    _, layer, x = layers("linear, rows")
    model = nn.Sequential(layer).eval()
    stays = write(model, tmp_path / "pivots.onnx", x, round_inputs=True, keep_pivots=True)
    assert stays.ok and "Gather" in [node.op_type for node in onnx.load(stays.path).graph.node]
    assert not any("rounded anew" in note for note in stays.notes)
    double = copy.deepcopy(model).double()
    report = write(double, tmp_path / "double.onnx", x.double(), round_inputs=True)
    assert report.ok and not any("rounded anew" in note for note in report.notes)  # nothing of it can be rounded


def test_the_model_itself_keeps_to_layers_that_healing_can_round() -> None:
    data = rows(8)
    given: dict[str, Any] = {"example_inputs": data[0], "calib_data": data, "progress": False, "heal": "refit"}
    result = panther.compress(
        nn.Linear(64, 64).eval(), panther.Budget(flops=0.6, size_mb="90%"), dtypes=("int8",), **given
    )
    assert result.budget_met and not in_whole_numbers(result.model)


@pytest.mark.parametrize("ranks", [(8, 8), (8, 16)])
def test_a_convolution_whose_first_link_is_all_pivots_is_told_of(ranks: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Conv2d(8, 32, 3)).eval()
    plan = Plan((Choice("0", "tucker2", ranks, chains.PIVOTED, "int8"),))
    data = [torch.randn(4, 8, 9, 9) for _ in range(4)]
    given: dict[str, Any] = {"example_inputs": data[0], "calib_data": data, "progress": False, "heal": "none"}
    result = panther.compress(model, 1.0, plan=plan, dtypes=("int8",), **given)
    (layer,) = in_whole_numbers(result.model)
    (row,) = result.report.layers
    held = sum(part.numbers for part in layer.stored)
    orders = [order for order in (layer.row_order, layer.column_order) if order is not None]
    assert row.after.params == held + sum(map(len, orders))


def test_a_float_neighbour_of_numbers_keeps_the_size_that_was_foretold() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    floats = Choice("0", "linear", (16,), chains.PIVOTED)
    for numbers in (Choice("2", chains.WHOLE, (), chains.QUANTISED, "int8"), *plan_of(model).choices[1:]):
        result = compress(model, plan=Plan((floats, numbers)), dtypes=("float32", "int8"))
        grown = file_bytes(result.model) - file_bytes(model)
        foretold = sum(c.cost.size_bytes - 4 * 64 * 256 for c in result.plan.choices)
        assert grown <= foretold


def test_a_plan_goes_through_json() -> None:
    plan = plan_of(net(), "int4")
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert [choice.kind for choice in again.choices] == [choice.kind for choice in plan.choices]
    assert {choice.grid for choice in again.choices} == {Grid(4)}
