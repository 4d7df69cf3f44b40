"""The scripts behind the README's figures: fair rows, honest labels, and each runs from its command line."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace as changed
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import panther
from benchmarks import bytes as stored
from benchmarks import (
    calibration,
    common,
    convolutions,
    crepe,
    decomposition,
    end_to_end,
    healed,
    minilm,
    moments,
    onnx_speed,
    ops,
    padding,
    sketches,
    whisper,
)
from benchmarks.common import METHODS, compressed, factors_of, plans_of, rows_of, subject, table
from benchmarks.peers.random_basis import projected
from models.data import MissingDataError
from models.recipe import Recipe
from panther.converters import WRITERS
from panther.errors import PantherError
from panther.nn import SKLinear
from tests.stand_ins import inputs, recipe_of

PLAIN, WHITENED, UNIFORM, SENSITIVITY = METHODS


@pytest.fixture
def encoder() -> Recipe:
    torch.manual_seed(0)
    return recipe_of(nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)), 64)


@pytest.fixture
def tracker() -> Recipe:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 48, 3, padding=1), nn.Flatten()]
    return recipe_of(nn.Sequential(*layers, nn.Linear(48 * 64, 40)), 1, 8, 8)


def models_by_label(recipe: Recipe, keep: float = 0.5) -> dict[str, nn.Module]:
    return {m.label: model for m, _, _, model in compressed(subject(recipe), METHODS, [keep], seed=0)}


# Rows


def test_every_method_keeps_nearly_its_budget_and_no_more(encoder: Recipe) -> None:
    of = subject(encoder)
    rows = rows_of(encoder, of, METHODS, [0.75, 0.5], 0, "samples")
    for row in rows[1:]:
        for keep, plan in row.plans.items():
            share = plan.cost.params / of.sketchable_params
            assert keep - 8 * 160 / of.sketchable_params < share <= keep  # one step of rank of the larger layer


def test_linear_rows_of_one_packing_have_the_same_ranks_and_pivots_afford_more(encoder: Recipe) -> None:
    rows = rows_of(encoder, subject(encoder), (PLAIN, WHITENED, UNIFORM), [0.5], 0, "samples")
    plain, whitened, pivoted = ([choice.ranks for choice in row.plans[0.5].choices] for row in rows[1:])
    assert plain == whitened
    assert sum(ranks[0] for ranks in pivoted) > sum(ranks[0] for ranks in plain)


def test_the_panther_rows_are_what_compress_makes_of_the_same_data(tracker: Recipe) -> None:
    aside = inputs(1, 7, 1, 8, 8)  # compress fits to nine of ten batches
    for method, _, plan, model in compressed(subject(tracker), (UNIFORM, SENSITIVITY), [0.5], seed=0):
        result = panther.compress(
            tracker.model,
            0.5,
            example_inputs=tracker.example_inputs,
            calib_data=[*tracker.batches, *aside],
            search=method.search,
            heal="none",
            progress=False,
            verify=False,
        )
        assert plan.choices == result.plan.choices
        ours, theirs = model.state_dict(), result.model.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_plain_svd_sees_no_data_and_leaves_the_biases(encoder: Recipe) -> None:
    model = models_by_label(encoder)["plain SVD"]
    other = models_by_label(changed(encoder, batches=inputs(9, 5, 64)))["plain SVD"]
    for index in (0, 2):
        assert torch.equal(model[index].bias, encoder.model[index].bias)
        assert torch.equal(model[index].weight, other[index].weight)


def test_the_baselines_split_convolutions_by_output_channels_and_panther_chooses(tracker: Recipe) -> None:
    of = subject(tracker, exclude=[nn.Linear])
    schemes = {
        method.label: {name for factors in factors_of(of, method.how, 0).values() for name in factors.schemes}
        for method in METHODS
    }
    assert schemes["plain SVD"] == schemes["whitened SVD"] == {"output_channel"}
    assert schemes["panther, uniform ranks"] > {"output_channel", "input_channel", "tucker2"}


def test_looking_at_the_data_beats_plain_svd_on_held_out_data(encoder: Recipe) -> None:
    left = {label: encoder.metrics(model)["cosine"] for label, model in models_by_label(encoder).items()}
    assert left["plain SVD"] < left["whitened SVD"]
    assert left["plain SVD"] < left["panther, uniform ranks"]


def test_importance_is_measured_only_for_searches_that_ask(encoder: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "importance", lambda *_: pytest.fail("importance was measured"))
    of = subject(encoder)
    ((search, keep, _),) = plans_of(of, factors_of(of, UNIFORM.how, 0), ["uniform"], [0.5], 0)
    assert (search, keep) == ("uniform", 0.5)


def test_a_plan_above_its_budget_is_refused(encoder: Recipe) -> None:
    of = subject(encoder)
    with pytest.raises(PantherError, match=r"uniform ranks keep .* weights and may keep"):
        list(plans_of(of, factors_of(of, PLAIN.how, 0), ["uniform"], [0.001], 0))


def test_a_row_says_what_data_it_was_given(encoder: Recipe) -> None:
    of = subject(encoder)
    told = [common.data_used(method, of, "texts") for method in METHODS]
    backward, ranked = min(of.samples, 16), min(of.samples, 32)
    assert told == [
        "none",
        f"{of.samples} texts",
        f"{of.samples} texts, {backward} also backward",
        f"{of.samples} texts, {backward} also backward, {ranked} for the ranks",
    ]


def test_the_random_basis_has_the_weight_as_its_mean_and_is_worse_than_no_layer() -> None:
    dense = nn.Linear(32, 24)

    def error(weight: Tensor) -> float:
        return float((weight - dense.weight.detach()).norm() / dense.weight.detach().norm())

    weights = [projected(dense, low_rank=4, seed=seed).weight.detach() for seed in range(400)]
    assert min(map(error, weights)) > 1  # a layer of zeros has an error of 1
    # Independent errors shrink with the square root of their number.
    typical = sum(map(error, weights)) / len(weights)
    assert error(torch.stack(weights).mean(0)) < 1.5 * typical / 400**0.5


def test_the_random_row_has_the_ranks_of_the_others(encoder: Recipe) -> None:
    of = subject(encoder)
    rows = minilm.with_random_row(encoder, of, [0.5], 0)
    assert [row.label for row in rows] == ["dense", "random basis (the paper's layer)", *(m.label for m in METHODS)]
    plan = rows[1].plans[0.5]
    model = minilm.with_random_bases(of.model, plan, 0)
    for choice in plan.sketched:
        layer = model.get_submodule(choice.layer)
        assert isinstance(layer, SKLinear) and layer.basis == "random" and layer.rank == choice.ranks[0]
        assert torch.equal(layer.bias, of.model.get_submodule(choice.layer).bias)


# Cost and speed


def test_cost_runs_the_stages_and_a_forward_pass(encoder: Recipe) -> None:
    found = minilm.cost(encoder, 0.5, 0, repeats=2)
    assert found.seconds > 0 and found.forward_seconds > 0
    assert found.peak_after >= found.peak_before > 10e6  # torch alone takes more
    assert "rises by 7 MB over 500 MB" in str(changed(found, peak_before=500_000_000, peak_after=507_000_000))


def test_the_cost_of_another_process_is_read_back(
    encoder: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(minilm, "build", lambda *_, **__: encoder)
    monkeypatch.setattr(sys, "argv", ["minilm", "--only-cost", "--repeats", "1"])
    assert minilm.main() == 0
    printed = capsys.readouterr().out
    monkeypatch.setattr(minilm.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="a note\n" + printed))
    assert minilm.cost_apart("lee", 8, 0.5, 0, 1) == minilm.Cost(**json.loads(printed))


def test_speeds_cover_every_batch_and_search_with_files_that_agree(tracker: Recipe) -> None:
    results = onnx_speed.compress(tracker, 0.5, 0, exclude=[nn.Linear])
    found = list(onnx_speed.speeds(tracker, results, [1, 3], 0.0, 1))
    assert [(speed.batch, speed.ranks) for speed in found] == [
        (size, way) for size in (1, 3) for way in (onnx_speed.DYNAMIC, *onnx_speed.WAYS)
    ]
    for speed in found:
        if speed.ranks == onnx_speed.DYNAMIC:  # a file of onnxruntime's own
            assert speed.torch_ms is None and speed.parity is None and min(speed.onnx_ms) > 0
            continue
        assert speed.torch_ms is not None and speed.parity is not None
        assert speed.flops_ratio > 1 and min(*speed.onnx_ms, *speed.torch_ms) > 0
        assert speed.parity <= 1e-4  # the writer's own tolerance for float32


def test_the_speed_of_a_file_that_differs_is_not_told(encoder: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WRITERS, "onnx", lambda *_, **__: SimpleNamespace(ok=False))
    with pytest.raises(PantherError, match="the file differs from the model"):
        next(onnx_speed.speeds(encoder, {}, [1], 0.0, 1))


def test_a_batch_repeats_the_example() -> None:
    example = {"ids": torch.arange(3).unsqueeze(1)}
    assert onnx_speed.batch_of(example, 5)["ids"].flatten().tolist() == [0, 1, 2, 0, 1]
    assert onnx_speed.batch_of(example["ids"], 1).flatten().tolist() == [0]


# Command lines


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def printed_table(text: str) -> list[list[str]]:
    return [cells(line) for line in text.splitlines() if line.startswith("|")]


def start(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [script.__name__, *arguments])
    status: int = script.main()
    return status


@pytest.mark.parametrize(("script", "labels"), [(minilm, 6), (crepe, 5), (whisper, 5)])
def test_a_script_prints_its_header_and_one_table(
    script: ModuleType,
    labels: int,
    encoder: Recipe,
    tracker: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tracker if script is crepe else encoder
    monkeypatch.setattr(script, "build", lambda *_, **__: recipe)
    monkeypatch.setattr(minilm, "cost_apart", lambda *_: minilm.Cost(0.5, 3.0, 2.0, 0, 0))
    assert start(script, monkeypatch, "--keep", "0.6", "0.4", "--seed", "3") == 0
    text = capsys.readouterr().out
    columns, rule, *rows = printed_table(text)
    assert len(rows) == labels and all(len(line) == len(columns) for line in [rule, *rows])
    assert rows[0][0] == "dense" and "keep 0.6" in columns[2] and "keep 0.4" in columns[-1]
    for told in ("licence of stand-in: none needed", f"torch {torch.__version__}", "seed 3", "threads", "cpu", "36 "):
        assert told in text
    assert ("1.50 times" in text) == (script is minilm)


def test_the_speed_script_prints_its_header_and_one_table(
    encoder: Recipe, tracker: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnx_speed.minilm, "build", lambda *_, **__: encoder)
    monkeypatch.setattr(onnx_speed.crepe, "build", lambda *_, **__: changed(tracker, name="other"))
    threads = str(torch.get_num_threads())
    assert start(onnx_speed, monkeypatch, "--seconds", "0", "--batches", "2", "--threads", threads) == 0
    text = capsys.readouterr().out
    columns, _, *rows = printed_table(text)
    assert tuple(columns) == onnx_speed.COLUMNS
    assert [row[:3] for row in rows] == [
        [name, way, "2"]
        for name, more in (("stand-in", onnx_speed.ROUNDED), ("other", ()))  # convolutions are not written so
        for way in (onnx_speed.DYNAMIC, *onnx_speed.WAYS, *more)
    ]
    assert "one sample: stand-in 64; other 1 x 8 x 8" in text


def test_the_healing_script_prints_a_row_a_model(
    encoder: Recipe, tracker: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = [next(iter(recipe.metrics(recipe.model))) for recipe in (encoder, tracker)]
    cases = {
        "one": healed.Case(lambda: encoder, 0.5, (figures[0],), flops=True, bytes=0.2),
        "two": healed.Case(lambda: changed(tracker, name="other"), 0.6, (figures[1],), (nn.Linear,)),
    }
    monkeypatch.setattr(healed, "CASES", cases)
    assert start(healed, monkeypatch, "--models", "one", "two", "--minutes", "0.01") == 0
    columns, _, *rows = printed_table(capsys.readouterr().out)
    assert tuple(columns) == healed.COLUMNS
    assert [row[:3] for row in rows] == [
        ["stand-in", "0.5 of the FLOPs, 0.2 of the bytes", figures[0].replace("_", " ")],
        ["other", "0.6 of the weights", figures[1].replace("_", " ")],
    ]
    for recipe, row, figure in zip((encoder, tracker), rows, figures, strict=True):
        assert row[3] == f"{recipe.metrics(recipe.model)[figure]:.3f}"


def test_the_script_on_bytes_prints_every_way_of_storing(
    encoder: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = next(iter(encoder.metrics(encoder.model)))
    monkeypatch.setattr(stored, "CASES", {"one": stored.Case(lambda: encoder, (figure,))})
    assert start(stored, monkeypatch, "--models", "one", "--shares", "0.25", "--minutes", "0.01") == 0
    columns, _, *rows = printed_table(capsys.readouterr().out)
    assert list(columns)[:3] == ["", "bytes", figure.replace("_", " ")]
    labels = [row[0] for row in rows]
    assert labels[0] == "dense" and len(rows) == 1 + len(stored.PLAIN) + 4 + 4
    shares = {row[0]: float(row[1]) for row in rows if row[1] != "-"}
    measured = [label for label in shares if label.startswith("onnxruntime")]
    assert measured and all(0.05 < shares[label] < 0.6 for label in measured)
    assert all(row[-1] for row in rows if row[1] == "-")  # says why
    assert all(share <= 0.2501 for label, share in shares.items() if label.startswith("panther"))
    assert shares["int8, a scale a row, to nearest"] > shares["int4, a scale a row, to nearest"] > 0.125
    assert float(rows[0][2]) == pytest.approx(encoder.metrics(encoder.model)[figure], abs=1e-3)
    some = ["--models", "one", "--shares", "0.25", "--minutes", "0", "--rows", "mix", "healed"]
    assert start(stored, monkeypatch, *some) == 0  # no minutes, no training
    assert [row[0] for row in printed_table(capsys.readouterr().out)[2:]] == ["dense", "panther, all of it"]


def test_the_op_script_prints_every_layer_and_the_means(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ops, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(ops, "COLD_BYTES", 1_000_000)
    monkeypatch.setattr(ops, "READ_BYTES", 1_000_000)
    monkeypatch.setitem(ops.LAYERS, "MiniLM", [(64, 96), (96, 64)])
    before = torch.get_num_threads()
    arguments = ["--layers", "MiniLM", "--rows", "1", "3", "--threads", "1", "--repeats", "1"]
    assert start(ops, monkeypatch, *arguments) == 0
    assert torch.get_num_threads() == before
    rows = printed_table(capsys.readouterr().out)
    # Layers x keeps x types x caches, and layers x types x caches of dense ones; types x caches.
    assert len(rows) == (2 + 2 * 2 * 3 * 2 + 2 * 4 * 2) + (2 + 7 * 2)
    assert rows[0] == ["in x rank x out", "1 rows", "3 rows"]
    assert rows[2][0].startswith("MiniLM, 64 x 16 x 96, float32, 1 threads, warm")
    assert [row[0] for row in rows[-14:]] == [
        f"1 threads, {dtype}, {cache}"
        for dtype in ("float32", "bfloat16", "int8", "dense float32", "dense bfloat16", "dense int8", "dense int4")
        for cache in ("the same weights", "other weights each call")
    ]
    assert all(float(cell) >= 0 for row in rows[2:42] for cell in row[1:])


def test_the_script_of_convolutions_prints_every_layer_and_the_means(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = [convolutions.Layer(6, 40, 3, (9,), 2), convolutions.Layer(20, 24, 1, (5, 5))]
    monkeypatch.setitem(convolutions.LAYERS, "temporal", layers)
    before = torch.get_num_threads()
    arguments = ["--layers", "temporal", "--batch", "1", "3", "--threads", "1", "--seconds", "0.001"]
    assert start(convolutions, monkeypatch, *arguments) == 0
    assert torch.get_num_threads() == before
    rows = [row for row in printed_table(capsys.readouterr().out) if not row[0].startswith("---")]
    assert [row[0] for row in rows] == [
        "times as fast as torch",
        *["temporal: 6 to 40, 3 / 2, of 9", "temporal: 20 to 24, 1 x 1, of 5 x 5"] * 2,
        "geometric mean of the layers",
        "temporal, batch 1, 1 threads",
        "temporal, batch 3, 1 threads",
        "slowest layer of all",
    ]
    assert rows[0][2:] == rows[5][1:] == list(convolutions.KINDS)
    ratios = [float(cell) for row in rows[1:5] for cell in row[2:]]
    assert len(ratios) == 16 and min(ratios) > 0
    assert float(rows[-1][1]) == min(ratios[::4])


def test_the_convolutions_that_are_timed_compute_the_same() -> None:
    for layer in (convolutions.Layer(6, 40, 3, (9,), 2), convolutions.Layer(20, 24, 3, (5, 5))):
        x = torch.randn(2, layer.channels, *layer.size)
        for kind, own, plain in convolutions.runs(layer.module().eval(), x):
            with torch.no_grad():
                apart = float((own() - plain()).norm() / plain().norm())
            assert apart < {"int8": 0.02, "int4": 0.2}.get(kind, 1e-5)


def test_the_sketch_script_prints_every_way_and_the_exact_one_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sketches, "HADAMARD_NUMBERS", 1 << 10)
    monkeypatch.setattr(sketches, "HADAMARD_SIZES", (16, 64))
    arguments = ["--widths", "24", "--rows", "700", "--multiples", "2", "8", "--batch", "256", "--repeats", "1"]
    assert start(sketches, monkeypatch, *arguments) == 0
    rows = printed_table(capsys.readouterr().out)
    ways = ["exact", "as in calibration", "sketch, l = 2n", "2n random rows", "sketch, l = 8n", "8n random rows"]
    assert [row[0].partition(": ")[2] for row in rows[2:26]] == ways * 4
    excess = [[float(cell.removesuffix(" %")) for cell in row[4:]] for row in rows[2:26]]
    assert all(lost == ([0.0] * 3 if index % 6 < 2 else lost) and min(lost) >= 0 for index, lost in enumerate(excess))
    assert all(sum(excess[first + 4]) < sum(excess[first + 2]) for first in range(0, 24, 6))  # more rows lose less
    assert [row[0] for row in rows[28:]] == ["64 x 16", "16 x 64"]


def test_the_script_of_moments_prints_a_row_for_each_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = str(torch.get_num_threads())
    arguments = ["--widths", "24", "200", "--rows", "30", "--threads", threads, "--seconds", "0"]
    assert start(moments, monkeypatch, *arguments) == 0
    columns, _, *rows = printed_table(capsys.readouterr().out)
    assert tuple(columns) == moments.COLUMNS
    assert [row[:3] for row in rows] == [["24", "30", threads], ["200", "30", threads]]
    assert all(float(ratio) > 0 for row in rows for ratio in row[4:])


def test_the_end_to_end_script_prints_both_runtimes_and_what_the_report_says(
    encoder: Recipe, tracker: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    builds = {"minilm": lambda _: encoder, "crepe": lambda _: changed(tracker, name="other")}
    monkeypatch.setattr(end_to_end, "BUILD", builds)
    threads = str(torch.get_num_threads())
    assert start(end_to_end, monkeypatch, "--seconds", "0", "--batches", "1", "2", "--threads", threads) == 0
    text = capsys.readouterr().out
    _, first, second = text.split("command: ")  # a table is printed when its model is through
    for name, part in (("stand-in", first), ("other", second)):
        columns, _, *rows = printed_table(part)
        assert tuple(columns) == end_to_end.COLUMNS
        assert [row[:3] for row in rows] == [
            [name, runtime, size]
            for runtime, sizes in (("torch", "124"), ("onnxruntime", "12"))  # the example inputs are four
            for size in sizes
        ]
        assert f"\n{name}: speed-up of the report " in part


def test_the_ceiling_is_what_is_left_when_only_the_layers_are_faster() -> None:
    timed = end_to_end.Timed("m", "torch", 1, (10.0, 6.0), (8.0, 3.0), 2.0)
    assert timed.cells()[-8:] == ["1.67", "80 %", "2.67", "2.00", "1.67", "100 %", "2.00", "83 %"]


def test_the_operators_with_weights_are_found_in_the_profile(encoder: Recipe) -> None:
    result = end_to_end.compress(encoder, 0.5, 0, None)
    for timed in end_to_end.in_onnxruntime(encoder, result, [1, 3], 0.0, 1):
        for layers, whole in zip(timed.layers_ms, timed.whole_ms, strict=True):
            assert 0 < layers < whole
        assert timed.flops_ratio > 1.5


def test_the_layers_run_again_on_the_inputs_that_they_have_in_the_model(encoder: Recipe) -> None:
    seen: list[tuple[Tensor, ...]] = []
    hook = encoder.model[2].register_forward_hook(lambda _, given, __: seen.append(given))
    replay = end_to_end.replay_of(encoder.model, ["2"], lambda: encoder.model(encoder.example_inputs))
    replay()
    hook.remove()
    assert len(seen) == 2 and torch.equal(*(given for (given,) in seen))


def test_the_decomposition_script_prints_a_row_a_shape_and_spectrum(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(decomposition, monkeypatch, "--shapes", "96x128", "160x96", "--rank", "16") == 0
    columns, _, *rows = printed_table(capsys.readouterr().out)
    assert tuple(columns) == decomposition.COLUMNS
    assert [row[:3] for row in rows] == [
        [shape, spectrum, "16"] for shape in ("96x128", "160x96") for spectrum in decomposition.SPECTRA
    ]
    for row in rows:
        assert 0 < float(row[6]) < 1 and float(row[8]) > 0
        assert all(-0.01 <= float(share.removesuffix(" %")) <= 2 for share in row[7].split(", "))


def test_a_shape_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(decomposition, monkeypatch, "--shapes", "4096") == 1
    assert "'4096' is not rows x columns" in capsys.readouterr().err


def test_the_cost_of_statistics_is_printed_beside_the_forward_pass(
    encoder: Recipe, tracker: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibration, "BUILD", {"minilm": lambda _: encoder, "crepe": lambda _: tracker})
    assert start(calibration, monkeypatch, "--seconds", "0", "--threads", str(torch.get_num_threads())) == 0
    columns, _, *rows = printed_table(capsys.readouterr().out)
    assert tuple(columns) == calibration.COLUMNS and [row[0] for row in rows] == [encoder.name, tracker.name]
    for row in rows:
        assert int(row[2]) >= 2 and float(row[4]) > 0 and float(row[5]) > 0
        assert all(share[0] in "+-" and math.isfinite(float(share.removesuffix(" %"))) for share in row[6:])


class Sentences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(9, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out: Tensor = self.layer(self.words(input_ids))
        return out


def test_the_time_of_a_pass_is_printed_with_padding_and_without(
    encoder: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tokenise(texts: list[str], longest: int) -> dict[str, Tensor]:
        lengths = [min(int(text.split()[0]), longest) for text in texts]
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        return {"input_ids": mask * 3, "attention_mask": mask}

    torch.manual_seed(0)
    model = Sentences().eval()
    recipe = changed(encoder, model=model, example_inputs=tokenise(["4", "2"], 9))
    documents = [[f"{1 + (7 * s) % 60} words of {d}" for s in range(64)] for d in range(8)]
    monkeypatch.setattr(padding.minilm, "build", lambda *_, **__: recipe)
    monkeypatch.setattr(padding.minilm, "load", lambda: (model, tokenise))
    monkeypatch.setattr(padding.minilm, "SOURCES", {"brown": lambda: documents})
    threads = str(torch.get_num_threads())
    assert start(padding, monkeypatch, "--samples", "160", "--seconds", "0", "--threads", threads) == 0
    columns, _, *rows = printed_table(capsys.readouterr().out)
    assert tuple(columns) == padding.COLUMNS and len(rows) == 2
    for row in rows:
        given, left = (int(share.removesuffix(" %")) for share in row[1:3])
        assert left < given
        assert all(float(figure) > 0 for figure in row[3:])


@pytest.mark.parametrize("script", [minilm, crepe, whisper, onnx_speed, end_to_end, calibration, padding])
def test_missing_data_ends_a_script_with_what_to_type(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: object, **__: object) -> Recipe:
        raise MissingDataError("type: python -m benchmarks.fetch_data")

    takes_threads = script in (onnx_speed, end_to_end, calibration, padding)
    monkeypatch.setattr(script.minilm if takes_threads else script, "build", missing)
    threads = ["--threads", str(torch.get_num_threads())] if takes_threads else []
    assert start(script, monkeypatch, *threads) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.endswith(": type: python -m benchmarks.fetch_data\n")


def test_a_table_is_markdown_with_aligned_columns() -> None:
    assert table(["", "a"], [["long name", "1"], ["b", "12345"]]).splitlines() == [
        "|           |     a |",
        "| --------- | ----: |",
        "| long name |     1 |",
        "| b         | 12345 |",
    ]
