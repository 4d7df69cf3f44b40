"""Models in whole numbers, through panther.compress: within their budgets, healed as they are stored, and saved."""

from __future__ import annotations

import copy
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import panther
from panther import chains, prepared, verify
from panther.batches import Call, as_call
from panther.errors import LoadError
from panther.healers.rounding import round_layers
from panther.nn import IN_WHOLE_NUMBERS, QUANTISED, PivotedLayer
from panther.nn.on_grid import OnGrid, held, is_held
from panther.nn.quantised import packed_bits, unpacked_bits
from panther.spec import Choice, Grid, Plan
from tests.killing import killed_at_step

STRENGTHS = torch.logspace(0, -1.5, 64)  # of the inputs' features: what is rounded in the data norm knows of them


class Block(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return answer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.out = nn.Linear(64, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        answer: Tensor = self.out(x)
        return answer


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 40, 3, stride=2, bias=False), nn.ReLU()
        )
        self.head = nn.Linear(40, 6)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.features(x).mean((2, 3)))
        return answer


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def cnn() -> Cnn:
    torch.manual_seed(0)
    return Cnn().eval()


def rows(count: int = 16, size: int = 32, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(9))).Q
    return [torch.randn(size, 64, generator=generator) * STRENGTHS @ turn for _ in range(count)]


def images(count: int = 12, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 3, 9, 9, generator=generator).cumsum(-1) for _ in range(count)]


def compress(model: nn.Module, budget: Any, **options: Any) -> panther.Result:
    data = rows() if isinstance(model, Net) else images()
    given: dict[str, Any] = {
        "example_inputs": data[0][:4],
        "calib_data": data,
        "progress": False,
        "verify": False,
        "heal": "refit",
    }
    return panther.compress(model, budget, **{**given, **options})


@torch.no_grad()
def error(dense: nn.Module, small: nn.Module, seed: int = 5) -> float:
    unseen = rows(4, seed=seed) if isinstance(dense, Net) else images(4, seed=seed)
    wanted, got = (torch.cat([model(x) for x in unseen]) for model in (dense, small))
    return float((got - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


def quantised_layers(model: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, IN_WHOLE_NUMBERS)}


def everything(model: nn.Module, dtype: str, scheme: str = chains.WHOLE, group_size: int = 0) -> Plan:
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return Plan(tuple(Choice(n, scheme, (), chains.QUANTISED, dtype, group_size=group_size) for n in names))


@pytest.fixture(autouse=True)
def _small_layers_hardly_pay() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*would be smaller")
        yield


# Budgets


@pytest.mark.parametrize("build", [net, cnn], ids=["linear", "convolutions"])
@pytest.mark.parametrize("share", ["45%", "30%"])
def test_a_budget_of_bytes_is_held_by_the_file(build: Any, share: str, tmp_path: Path) -> None:
    model = build()
    result = compress(model, panther.Budget(size_mb=share), dtypes=("float32", "int8", "int4"))
    assert result.budget_met and quantised_layers(result.model)
    result.save(tmp_path / "small")
    size = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert size == result.report.compressed.size_bytes <= float(share[:-1]) / 100 * result.report.dense.size_bytes
    assert error(model, result.model) < 0.2


@pytest.mark.parametrize("build", [net, cnn], ids=["linear", "convolutions"])
def test_what_was_saved_loads_and_computes_the_same(build: Any, tmp_path: Path) -> None:
    model = build()
    result = compress(model, panther.Budget(size_mb="30%"), dtypes=("int8", "int4"))
    result.save(tmp_path / "small")
    again = panther.load(tmp_path / "small", model=build)
    assert list(quantised_layers(again)) == list(quantised_layers(result.model))
    x = rows(1, seed=7)[0] if build is net else images(1, seed=7)[0]
    with torch.no_grad():
        assert torch.equal(again(x), result.model(x))


def test_whole_numbers_lose_less_than_ranks_at_equal_bytes() -> None:
    model = net()
    alone = compress(model, panther.Budget(size_mb="30%"))
    mixed = compress(model, panther.Budget(size_mb="30%"), dtypes=("float32", "int8", "int4"))
    assert error(model, mixed.model) < 0.1 * error(model, alone.model)


def test_a_budget_of_operations_takes_ranks_and_stores_them_in_whole_numbers_where_asked() -> None:
    model = net()
    floats = compress(model, panther.Budget(flops=0.5), dtypes=("float32", "int8"))
    assert not quantised_layers(floats.model)  # they would save no operations
    small = compress(model, panther.Budget(flops=0.5), dtypes=("int8",))
    assert small.budget_met and len(quantised_layers(small.model)) == 6
    assert any(layer.ranks for layer in quantised_layers(small.model).values())
    assert small.report.compressed.size_bytes < 0.35 * floats.report.compressed.size_bytes
    # Pivots, which have more ranks for the same operations, are slower in whole numbers: they are for bytes.
    assert error(model, small.model) < 3 * error(model, floats.model)
    assert not any(isinstance(layer, PivotedLayer) for layer in quantised_layers(small.model).values())


def test_bytes_and_operations_are_both_held() -> None:
    model = net()
    budget = panther.Budget(flops=0.6, size_mb="25%")
    result = compress(model, budget, dtypes=("float32", "int8", "int4"))
    assert result.budget_met and all(limit.met for limit in result.report.limits)
    again = result.resolve(panther.Budget(flops=0.8, size_mb="40%"))
    assert again.budget_met and error(model, again.model) < error(model, result.model)


@pytest.mark.parametrize("bits", [4, 3])
def test_few_bits_alone_are_these_bits(bits: int) -> None:
    result = compress(net(), 1.0, dtypes=(f"int{bits}",))
    assert {layer.grid.bits for layer in quantised_layers(result.model).values()} == {bits}
    assert len(quantised_layers(result.model)) == 6


@pytest.mark.parametrize("build", [net, cnn], ids=["linear", "convolutions"])
@pytest.mark.parametrize("group_size", [0, 32])
def test_three_bits_take_three_in_the_file_and_compute_the_same_when_loaded(
    build: Any, group_size: int, tmp_path: Path
) -> None:
    model = build()
    plan = everything(model, "int3", group_size=group_size)
    result = compress(model, 1.0, dtypes=("int3",), plan=plan)
    path = result.save(tmp_path / "small") / "model.safetensors"
    stored, count = load_file(path), 0
    for name, layer in quantised_layers(result.model).items():
        numbers, scales = stored[f"{name}.whole.values"], stored[f"{name}.whole.scales"]
        assert (
            numbers.shape == (layer.stored[0].size[0], -(-3 * layer.stored[0].columns // 8))
            and numbers.dtype == torch.uint8
        )
        assert scales.dtype == torch.bfloat16
        row = next(row for row in result.report.layers if row.name == name)
        assert row.after.size_bytes == numbers.nbytes + scales.nbytes
        count += 1
    assert count and path.stat().st_size == result.report.compressed.size_bytes
    again = panther.load(tmp_path / "small", model=build)
    x = rows(1, seed=7)[0] if build is net else images(1, seed=7)[0]
    with torch.no_grad():
        assert torch.equal(again(x), result.model(x))
    assert str(again) == str(result.model) and next(iter(quantised_layers(again).values())).grid.bits == 3


@pytest.mark.parametrize("bits", [2, 3, 5])
@pytest.mark.parametrize("columns", [1, 7, 8, 13, 64])
def test_numbers_of_few_bits_are_packed_without_loss(bits: int, columns: int) -> None:
    half = 1 << bits - 1
    values = torch.randint(-half, half, (5, columns), dtype=torch.int8)
    packed = packed_bits(values, bits)
    assert packed.shape == (5, -(-columns * bits // 8)) and torch.equal(unpacked_bits(packed, columns, bits), values)


def test_more_kinds_of_numbers_lose_less_at_equal_bytes() -> None:
    model, lost = net(), dict[int, float]()
    for count in (2, 3, 4):
        dtypes = ("float32", "int8", "int4", "int3")[:count]
        results = [compress(model, panther.Budget(size_mb=size), dtypes=dtypes) for size in ("8.4%", "10%", "12.4%")]
        assert all(result.budget_met for result in results)
        lost[count] = sum(error(model, result.model) for result in results)
    assert lost[4] < 1.1 * lost[3] and lost[3] < 0.5 * lost[2]  # plans are told apart on few samples
    with_three = [layer for result in results for layer in quantised_layers(result.model).values()]
    assert any(layer.grid.bits == 3 for layer in with_three)


# Rounding


def test_rounding_that_looks_at_the_data_loses_less_than_rounding_numbers() -> None:
    model = net()
    plan = everything(model, "int4")
    plain = compress(model, 1.0, dtypes=("int4",), plan=plan, heal="none")
    looked = compress(model, 1.0, dtypes=("int4",), plan=plan, heal="refit")
    assert error(model, looked.model) < 0.75 * error(model, plain.model)
    assert [stage for _, stage, _ in looked.report.healing.history][-1] == "rounding"  # type: ignore[union-attr]


@pytest.mark.parametrize("spoilt", [False, True])
@pytest.mark.parametrize("build", [net, cnn], ids=["linear", "convolutions"])
def test_healed_whole_numbers_are_never_worse_than_unhealed_ones(
    build: Any, spoilt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("panther.prepared")

    def spoil(teacher: nn.Module, student: nn.Module, *given: Any, **options: Any) -> list[str]:
        said = round_layers(teacher, student, *given, **options)
        next(layer for layer in student.modules() if is_held(layer)).bias.data.add_(1.0)
        return said

    if spoilt:
        monkeypatch.setattr(module, "round_layers", spoil)
    model = build()
    small = panther.Budget(size_mb="14%")
    healed = compress(model, small, dtypes=("int4",), heal="refit")
    plain = compress(model, small, dtypes=("int4",), plan=healed.plan, heal="none")
    healing = healed.report.healing
    calls = rows() if build is net else images()
    assert quantised_layers(plain.model) and healing is not None
    assert healing.before == pytest.approx(panther.heal(model, plain.model, calls, calls[0], "none").before, rel=1e-3)
    assert healing.after == pytest.approx(panther.heal(model, healed.model, calls, calls[0], "none").before, rel=1e-3)
    assert [stage for _, stage, _ in healing.history] == ["before", "rounding"]
    if spoilt:
        assert healing.after == healing.before and any(
            "each number was rounded by itself" in n for n in healed.report.notes
        )
        for one, other in zip(plain.model.parameters(), healed.model.parameters(), strict=True):
            assert torch.equal(one, other)
    else:
        assert healing.after < healing.before


@pytest.mark.parametrize("build", [net, cnn], ids=["linear", "convolutions"])
def test_healing_trains_with_the_rounding_in_place(build: Any) -> None:
    model = build()
    plan = everything(model, "int3")
    trained = compress(
        model,
        1.0,
        dtypes=("int3",),
        plan=plan,
        heal=panther.Heal("distill", steps=150, learning_rate=5e-4, time_limit=1e6),
    )
    assert len(quantised_layers(trained.model)) == len(plan.choices)
    healing = trained.report.healing
    assert healing is not None and healing.steps == 150
    figures = {stage: figure for _, stage, figure in healing.history}
    assert figures["distill"] < 0.85 * figures["rounding"]
    # What was trained is what is stored: the last held-out loss is that of the model that came out.
    again = panther.heal(model, trained.model, (rows() if build is net else images()), as_call(rows()[0]), "none")
    assert again.before == pytest.approx(healing.after, rel=1e-3)


def test_blocks_are_trained_on_their_grids_too() -> None:
    model = net()
    plan = everything(model, "int4")
    heal = panther.Heal("blocks", steps=200, learning_rate=1e-4, time_limit=1e6)
    result = compress(model, 1.0, dtypes=("int4",), plan=plan, heal=heal)
    healing = result.report.healing
    assert healing is not None and healing.steps > 0
    figures = {stage: figure for _, stage, figure in healing.history}
    assert figures["blocks"] < figures["rounding"]


def test_the_mean_of_what_a_chain_gives_stays() -> None:
    """Errors are judged about the mean, which the bias has to set right."""
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    data = [x + 3 * torch.linspace(-1, 1, 64) for x in rows(8)]
    plan = Plan((Choice("0", chains.LINEAR, (16,), chains.QUANTISED, "int4"),))
    given: dict[str, Any] = {"example_inputs": data[0], "calib_data": data, "progress": False, "verify": False}
    result = panther.compress(model, 1.0, dtypes=("int4",), plan=plan, heal="refit", **given)
    x = torch.cat(data)
    with torch.no_grad():
        wanted, got = model(x), result.model(x)
    assert float((got - wanted).mean(0).norm()) < 0.1 * float((got - wanted).norm(dim=1).mean())


def test_a_layer_that_runs_twice_is_rounded_without_the_data_and_that_is_said() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.first(x))

    torch.manual_seed(0)
    model = Twice().eval()
    calls = [Call((x,)) for x in rows(8)]
    found = panther.analyze(model, rows(1)[0]).layers
    specs = {spec.name: spec for spec in found}
    student = copy.deepcopy(model)
    choices = [Choice(name, chains.WHOLE, (), chains.QUANTISED, "int4") for name in specs]
    said = round_layers(model, student, choices, specs, calls)
    assert said == ["first was rounded without looking at data"]
    assert all(is_held(student.get_submodule(name)) for name in specs)
    part = held(student.first, "weight")
    assert part is not None and int(part.values.abs().max()) <= 8


def test_a_layer_whose_inputs_are_not_looked_at_is_told_of() -> None:
    torch.manual_seed(0)
    padded = nn.Conv1d(8, 16, 3, padding=1, padding_mode="reflect")
    model = nn.Sequential(padded, nn.ReLU(), nn.Conv1d(16, 8, 3, padding=1)).eval()
    calls = [Call((torch.randn(4, 8, 16),)) for _ in range(4)]
    specs = {spec.name: spec for spec in panther.analyze(model, calls[0].args[0]).layers}
    choices = [Choice(name, chains.WHOLE, (), chains.QUANTISED, "int4") for name in specs]
    (said,) = round_layers(model, copy.deepcopy(model), choices, specs, calls)
    assert said.startswith("0: weights") and "were rounded without looking at data" in said


@pytest.mark.filterwarnings("ignore:no calibration data:UserWarning")
def test_without_data_the_numbers_themselves_are_rounded() -> None:
    model = net()
    result = compress(model, panther.Budget(size_mb="30%"), dtypes=("int8", "int4"), calib_data=None, heal="none")
    assert result.budget_met and quantised_layers(result.model) and error(model, result.model) < 0.2


@pytest.mark.parametrize("scheme", [chains.WHOLE, chains.CORRECTED])
def test_a_correction_is_a_choice_and_helps(scheme: str) -> None:
    model = net()
    names = ["blocks.0.up", "blocks.1.down"]
    ranks = () if scheme == chains.WHOLE else (16,)
    plan = Plan(tuple(Choice(n, scheme, ranks, chains.QUANTISED, "int4") for n in names))
    result = compress(model, 1.0, dtypes=("float32", "int4"), plan=plan)
    layer = quantised_layers(result.model)[names[0]]
    assert layer.scheme == scheme and layer.ranks == ranks
    plain = compress(
        model,
        1.0,
        dtypes=("float32", "int4"),
        plan=Plan(tuple(Choice(n, chains.WHOLE, (), chains.QUANTISED, "int4") for n in names)),
    )
    if scheme == chains.CORRECTED:
        assert error(model, result.model) < 0.9 * error(model, plain.model)
        row = next(row for row in result.report.layers if row.name == names[0])
        assert row.kept > 1 and row.after.size_bytes < row.before.size_bytes / 4


def test_layers_whose_input_is_named_are_rounded_by_their_data() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.b(input=self.a(input=x).relu())
            return answer

    torch.manual_seed(0)
    model, data = Named().eval(), rows(8)
    plan = Plan(
        (
            Choice("a", chains.CORRECTED, (8,), chains.QUANTISED, "int4"),
            Choice("b", chains.WHOLE, (), chains.QUANTISED, "int4"),
        )
    )
    given: dict[str, Any] = {"example_inputs": data[0], "calib_data": data, "progress": False, "verify": False}
    result = panther.compress(model, 1.0, dtypes=("int4",), plan=plan, heal="refit", **given)
    assert not any("without looking at data" in note for note in result.report.notes)
    assert set(quantised_layers(result.model)) == {"a", "b"}


def test_batches_that_part_ways_are_rounded_all_the_same() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.a, self.b = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.c(x).relu()
            first, second = (self.a, self.b) if float(y.mean()) > 0.2 else (self.b, self.a)
            answer: Tensor = second(first(y).relu())
            return answer

    torch.manual_seed(0)
    model = Parts().eval()
    data = [x * scale for x, scale in zip(rows(8), (0.1, 3.0) * 4, strict=True)]
    given: dict[str, Any] = {"example_inputs": data[0], "calib_data": data, "progress": False, "verify": False}
    result = panther.compress(model, 1.0, dtypes=("int4",), heal="refit", **given)
    assert len(quantised_layers(result.model)) == 3
    assert any("rounding stopped looking at the data" in note for note in result.report.notes)


def test_what_follows_a_correction_gets_it_in_the_walk() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    calls = [Call((x,)) for x in rows(4)]
    specs = {spec.name: spec for spec in panther.analyze(model, rows(1)[0]).layers}
    student = copy.deepcopy(model)
    choices = [
        Choice("0", chains.CORRECTED, (8,), chains.QUANTISED, "int4"),
        Choice("1", chains.WHOLE, (), chains.QUANTISED, "int4"),
    ]
    seen: list[Tensor] = []
    student[1].register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    assert not round_layers(model, student, choices, specs, calls)
    with torch.no_grad():
        wanted = torch.cat([student[0](call.args[0]) for call in calls])
    # The last of them ran with the correction in place, which is stored in eight bits afterwards.
    got = torch.cat(seen[-4:])
    assert float((got - wanted).norm()) < 0.01 * float(wanted.norm())


def test_scales_of_a_half_precision_model_stay_in_its_precision(tmp_path: Path) -> None:
    model = net().half()
    layer = panther.nn.QuantisedLinear.from_dense(model.first, bits=3)
    assert layer.whole.scales.dtype == torch.float16
    stored = layer.whole.for_file()
    again = layer.whole.from_file(**stored)
    assert torch.equal(again["values"], layer.whole.values) and torch.equal(again["scales"], layer.whole.scales)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("values", lambda t: t[:, 1:], r"values is \(64, 31\), expected \(64, 32\)"),
        ("values", lambda t: t.view(torch.int8), "values is torch.int8, expected torch.uint8"),
        ("scales", lambda t: t.double(), "scales is torch.float64"),
        ("scales", lambda t: -t, "no scale can be"),
        ("scales", lambda t: t * torch.nan, "no scale can be"),
        ("scales", lambda t: t[:, :0], "scales is"),
    ],
)
def test_a_file_whose_numbers_were_changed_is_refused(name: str, change: Any, message: str, tmp_path: Path) -> None:
    model = net()
    compress(model, 1.0, dtypes=("int4",), plan=everything(model, "int4"), heal="none").save(tmp_path / "small")
    path = tmp_path / "small" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"first.whole.{name}"] = change(tensors[f"first.whole.{name}"]).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(LoadError, match=message):
        panther.load(tmp_path / "small", model=net)


def test_a_plan_says_itself_what_it_stores_weights_in() -> None:
    first = compress(net(), panther.Budget(size_mb="30%"), dtypes=("int8", "int4"))
    again = compress(net(), panther.Budget(size_mb="30%"), plan=first.plan)
    assert list(quantised_layers(again.model)) == list(quantised_layers(first.model))


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    model, plan = net(), everything(net(), "int4")
    heal = panther.Heal("distill", steps=60, learning_rate=1e-3, time_limit=1e6)
    whole = compress(model, 1.0, dtypes=("int4",), plan=plan, heal=heal, checkpoint=tmp_path / "a")
    with killed_at_step(45):
        compress(model, 1.0, dtypes=("int4",), plan=plan, heal=heal, checkpoint=tmp_path / "b")
    assert (tmp_path / "b").exists()
    again = compress(model, 1.0, dtypes=("int4",), plan=plan, heal=heal, checkpoint=tmp_path / "b")
    for (name, a), b in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


# What is said


def test_the_report_shows_what_whole_numbers_alone_would_do() -> None:
    result = compress(net(), panther.Budget(size_mb="30%"), dtypes=("int8", "int4"), verify=True)
    eight, four = result.report.baselines
    assert (eight.name, four.name) == ("int8", "int4")
    assert result.report.dense.size_bytes > eight.figures.size_bytes > four.figures.size_bytes
    assert eight.figures.flops == result.report.dense.flops
    assert eight.agreement["cosine"] > four.agreement["cosine"] > 0.5
    text = str(result.report)
    assert "int4 alone, by the weights only" in text and "whole," in text
    assert "; bytes: of what they take in the file" in text


def test_baselines_are_shown_where_nothing_is_quantised_and_left_out_where_nothing_is_measured() -> None:
    assert len(compress(cnn(), 0.5, verify=True).report.baselines) == 2
    assert not compress(cnn(), 0.5).report.baselines


def test_numbers_that_share_a_byte_are_counted_one_by_one() -> None:
    model = net()
    result = compress(model, 1.0, dtypes=("int4",), plan=everything(model, "int4"))
    assert quantised_layers(result.model) and result.report.compressed.params == result.report.dense.params


def test_milliseconds_are_measured_for_whole_numbers_too() -> None:
    result = compress(net(), panther.Budget(latency_ms="100%", size_mb="30%"), dtypes=("float32", "int8", "int4"))
    chosen = [choice for choice in result.plan.choices if choice.grid is not None]
    assert all(choice.cost.latency_ms > 0 for choice in chosen)


def of_numbers(monkeypatch: pytest.MonkeyPatch, slow: float) -> None:
    """A clock by which whole numbers take `slow` times what floating-point ones do; a model is its layers."""

    def milliseconds(model: nn.Module) -> float:
        whole = [part for layer in quantised_layers(model).values() for part in layer.stored]
        held = {id(t) for part in whole for t in part.buffers()}
        floats = sum(t.numel() for t in model.state_dict(keep_vars=True).values() if id(t) not in held)
        return 1e-3 * (floats + slow * sum(part.numbers for part in whole))

    def layers(runs: Sequence[Callable[[], object]], *, seconds: float) -> list[float]:
        return [1e-3 * milliseconds(inspect.getclosurevars(once).nonlocals["layer"]) for once in runs]

    monkeypatch.setattr(prepared, "medians_in_turn", layers)
    monkeypatch.setattr(prepared, "latencies", lambda models, call: [milliseconds(m) for m in models])
    for module in (prepared, verify):
        monkeypatch.setattr(module, "measure_latency", lambda a, b, call: (milliseconds(a), milliseconds(b)))


@pytest.mark.parametrize("build", [net, cnn], ids=["linear", "convolutions"])
def test_a_limit_on_milliseconds_that_never_binds_changes_no_plan(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    of_numbers(monkeypatch, slow=2.0)
    both = panther.Budget(size_mb="35%", latency_ms=1e6)
    result = compress(build(), both, dtypes=("float32", "int8", "int4"), heal="none")
    assert result.budget_met and quantised_layers(result.model)
    alone = result.resolve(panther.Budget(size_mb="35%"))
    assert [c.kind for c in result.plan.choices] == [c.kind for c in alone.plan.choices]


@pytest.mark.parametrize("dtypes", [("float32", "int8"), ("float32", "int8", "int4"), ("int8", "int4")])
@pytest.mark.parametrize("build", [net, cnn], ids=["linear", "convolutions"])
def test_bytes_and_milliseconds_are_held_as_well_as_by_eight_bits_alone(
    build: Any, dtypes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where whole numbers are slower than others, and the limit is what eight bits just hold."""
    of_numbers(monkeypatch, slow=1.5)
    model = build()
    plain = compress(model, 1.0, dtypes=("int8",), plan=everything(model, "int8"), heal="none", verify=True)
    taken, held = plain.report.compressed.latency_ms, plain.report.compressed.size_bytes
    assert taken is not None and held < 0.45 * plain.report.dense.size_bytes
    budget = panther.Budget(size_mb=1.2 * held / 1e6, latency_ms=1.001 * taken)
    result = compress(model, budget, dtypes=dtypes, heal="none")
    assert result.budget_met and all(limit.met for limit in result.report.limits)
    assert error(model, result.model) < 1.5 * error(model, plain.model)


def test_layers_that_whole_numbers_make_slower_stay_as_they_are_for_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    of_numbers(monkeypatch, slow=3.0)
    result = compress(net(), panther.Budget(latency_ms="90%"), dtypes=("int8",), heal="none")
    assert all(choice.scheme != chains.WHOLE for choice in result.plan.choices)


def test_the_tuned_search_tries_whole_numbers() -> None:
    result = compress(
        net(), panther.Budget(size_mb="30%"), dtypes=("int8", "int4"), search="tuned", n_trials=4, heal="none"
    )
    assert result.budget_met and quantised_layers(result.model) and result.report.tuning is not None


@pytest.mark.parametrize("dtypes", [("float32", "int4"), ("float32", "int8", "int4")])
def test_the_tuned_search_scores_the_model_that_it_gives(dtypes: tuple[str, ...]) -> None:
    model = net()
    unseen = torch.cat(rows(2, seed=5))
    wanted = model(unseen).detach()

    def near(small: nn.Module) -> float:
        return -float((small(unseen) - wanted).square().mean())

    options: dict[str, Any] = {"dtypes": dtypes, "eval_fn": near, "heal": "none", "verify": True}
    plain = compress(model, panther.Budget(size_mb="18%"), **options)
    tuned = compress(model, panther.Budget(size_mb="18%"), search="tuned", n_trials=4, **options)
    tuning = tuned.report.tuning
    assert tuning is not None and plain.report.metric is not None and tuned.report.metric is not None
    assert tuning.start[0] == pytest.approx(plain.report.metric[1], rel=1e-4)
    assert tuning.best[0] == pytest.approx(tuned.report.metric[1], rel=1e-4)
    assert tuned.report.metric[1] >= plain.report.metric[1]


@pytest.mark.parametrize("budget", [0.6, panther.Budget(flops=0.6)], ids=str)
def test_the_tuned_search_leaves_no_layer_in_floating_point_where_none_may_be(budget: Any) -> None:
    model = net()
    options: dict[str, Any] = {"dtypes": ("int8",), "heal": "none", "search": "tuned", "n_trials": 5}
    result = compress(model, budget, eval_fn=lambda small: -error(model, small), **options)
    assert result.budget_met and len(quantised_layers(result.model)) == 6
    tuning = result.report.tuning
    assert tuning is not None and len(tuning.trials) == 5


@pytest.mark.parametrize("dtypes", [("float32", "int8", "int4"), ("int8", "int4")])
@pytest.mark.parametrize("search", ["sensitivity", "tuned"])
def test_the_smallest_model_within_a_drop_is_one_of_fewest_bytes(dtypes: tuple[str, ...], search: str) -> None:
    model = net()
    lost = {"eval_fn": lambda small: -error(model, small), "heal": "none", "search": search}
    plain = compress(model, 1.0, dtypes=("int8",), plan=everything(model, "int8"), heal="none")
    drop = 1.5 * error(model, plain.model)
    found = compress(model, {"max_drop": drop}, dtypes=dtypes, **({"n_trials": 9} if search == "tuned" else {}), **lost)
    assert found.budget_met and found.report.compressed.size_bytes <= plain.report.compressed.size_bytes
    assert not any("stays dense" in note for note in found.report.notes)


def test_a_drop_that_no_whole_numbers_hold_is_said_of_them() -> None:
    """They are what is asked for: nothing stays dense."""
    model = cnn()
    result = compress(
        model, {"max_drop": 0.0}, dtypes=("int4",), eval_fn=lambda small: -error(model, small), heal="none"
    )
    assert not result.budget_met and quantised_layers(result.model)
    assert any(note.startswith("no model that is stored so is within max_drop=0 (at ") for note in result.report.notes)
    assert any("of the bytes eval_fn falls from" in note for note in result.report.notes)


def test_a_plan_in_whole_numbers_goes_through_json() -> None:
    model = net()
    first = compress(model, panther.Budget(size_mb="30%"), dtypes=("int8", "int4"))
    plan = Plan.from_json(first.plan.to_json())
    assert [choice.kind for choice in plan.choices] == [choice.kind for choice in first.plan.choices]
    again = compress(model, panther.Budget(size_mb="30%"), dtypes=("int8", "int4"), plan=plan)
    x = rows(1, seed=3)[0]
    with torch.no_grad():
        assert torch.allclose(first.model(x), again.model(x), atol=1e-5)


def test_the_model_itself_can_be_changed() -> None:
    model = net()
    dense = copy.deepcopy(model)
    result = compress(model, panther.Budget(size_mb="30%"), dtypes=("int8", "int4"), inplace=True)
    assert result.model is model and quantised_layers(model) and error(dense, model) < 0.2


FORMS = [
    (chains.CORRECTED, (8,), chains.QUANTISED, "int4"),
    (chains.WHOLE, (), chains.QUANTISED, "int8"),
    (chains.LINEAR, (8,), chains.QUANTISED, "int8"),
    (chains.LINEAR, (8,), chains.PIVOTED, "float32"),
    (chains.LINEAR, (8,), chains.TWO_GEMM, "float32"),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form[0]} {form[2]} {form[3]}")
def test_the_bytes_of_a_plan_are_those_of_the_file_with_its_header(form: Any) -> None:
    """At most, and within 64 bytes a layer: of ones with a bias, and without, that share no order of channels."""
    layers = [(nn.Linear(64, 64, bias=i % 2 == 0), nn.Softmax(dim=-1)) for i in range(6)]
    model = nn.Sequential(*(module for pair in layers for module in pair)).eval()
    data = rows(4)
    plan = Plan(tuple(Choice(str(i), *form) for i in range(0, 12, 2)))
    given: dict[str, Any] = {"example_inputs": data[0], "calib_data": data, "progress": False, "verify": False}
    made = panther.compress(model, 1.0, dtypes=("float32", "int8", "int4"), plan=plan, heal="none", **given)
    rest = made.report.dense.size_bytes - 4 * 6 * 64 * 64
    assert 0 <= made.plan.cost.size_bytes + rest - made.report.compressed.size_bytes <= 6 * 64


def test_room_for_the_header_is_not_taken_from_the_weights() -> None:
    """Sixteen small layers: in 8 bits they leave 300 bytes of the budget, and their headers are a fifth of the file."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(48, 48) for _ in range(16))).eval()
    data = [torch.randn(64, 48) for _ in range(8)]
    given: dict[str, Any] = {"example_inputs": data[0], "calib_data": data, "progress": False, "verify": False}
    options: dict[str, Any] = {"dtypes": ("float32", "int8", "int4"), "heal": "none", **given}
    plain = panther.compress(model, 1.0, **{**options, "plan": everything(model, "int8")})
    found = panther.compress(model, panther.Budget(size_mb=(plain.report.compressed.size_bytes + 300) / 1e6), **options)
    assert found.budget_met and all(choice.dtype != "int4" for choice in found.plan.sketched)


# bfloat16


@pytest.mark.parametrize("build", [net, cnn], ids=["linear", "convolutions"])
def test_bfloat16_halves_the_weights_and_changes_next_to_nothing(build: Any, tmp_path: Path) -> None:
    model = build()
    result = compress(model, panther.Budget(size_mb="60%"), dtypes=("float32", "bfloat16"), verify=True)
    assert result.budget_met and error(model, result.model) < 1e-4
    stored = {row.stored for row in result.report.layers}
    assert "bfloat16" in stored and stored <= {"bfloat16", ""}
    result.save(tmp_path / "small")
    again = panther.load(tmp_path / "small", model=build)
    x = rows(1, seed=7)[0] if build is net else images(1, seed=7)[0]
    with torch.no_grad():
        assert torch.equal(again(x), result.model(x))
    assert result.export_onnx(tmp_path / "small.onnx").ok
    held_as = {
        str(t.dtype) for name, t in load_file(tmp_path / "small" / "model.safetensors").items() if "values" in name
    }
    assert held_as == {"torch.int16"}


@pytest.mark.parametrize("build", [net, cnn], ids=["linear", "convolutions"])
def test_factors_in_bfloat16_take_half_of_the_bytes_of_others(build: Any) -> None:
    model = build()
    budget = panther.Budget(flops=0.6, size_mb="99%")
    floats, halves = (compress(model, budget, dtypes=(dtype,)) for dtype in ("float32", "bfloat16"))
    assert floats.budget_met and halves.budget_met
    sizes = [sum(row.after.size_bytes for row in r.report.layers) for r in (floats, halves)]
    assert sizes[1] < 0.6 * sizes[0] and error(model, halves.model) < 1.1 * error(model, floats.model) + 1e-4


def test_healing_trains_what_bfloat16_holds() -> None:
    model = net()
    heal = panther.Heal("distill", steps=60, learning_rate=1e-4, time_limit=1e6)
    result = compress(model, panther.Budget(flops=0.5), dtypes=("bfloat16",), heal=heal)
    healing = result.report.healing
    assert healing is not None and healing.after < healing.before
    for layer in quantised_layers(result.model).values():
        assert all(part.values.dtype == torch.int16 and part.scales.numel() == 0 for part in layer.stored)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16",)], ids=str)
def test_a_model_of_half_precision_gains_nothing_from_it(dtypes: tuple[str, ...], dtype: torch.dtype) -> None:
    model = net().to(dtype)
    data = [x.to(dtype) for x in rows(4)]
    given: dict[str, Any] = {"example_inputs": data[0], "calib_data": data, "progress": False, "heal": "none"}
    result = panther.compress(model, panther.Budget(size_mb="60%"), dtypes=dtypes, **given)
    assert result.budget_met and not quantised_layers(result.model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_beyond_its_range_stay_finite(dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 3, dtype=dtype)
    layer.weight.data[0, :2] = torch.finfo(dtype).max * torch.tensor([1, -1])
    small = QUANTISED[nn.Linear].from_dense(layer, bits=16)
    assert bool(torch.isfinite(small.weight.clone()).all())
    assert bool(torch.isfinite(OnGrid(layer.weight.new_empty(3, 0), Grid(16))(layer.weight)).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_layer_of_bfloat16_numbers_is_moved_to_another_type_as_others_are(dtype: torch.dtype) -> None:
    layer = nn.Linear(24, 16)
    small = QUANTISED[nn.Linear].from_dense(layer, bits=16)
    x = torch.randn(3, 24)
    wanted = small(x)
    moved = copy.deepcopy(small).to(dtype)
    assert moved.stored[0].values.dtype == torch.int16 and moved(x.to(dtype)).dtype == dtype
    torch.testing.assert_close(moved(x.to(dtype)).float(), wanted, rtol=0.02, atol=0.02)
