"""The comparison with other methods: equal work, honest cells, and a run that goes on where it was stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace as changed
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import panther
from benchmarks import ablation, fidelity
from benchmarks.ablation import Fits, compress_as, variants
from benchmarks.common import METHODS
from benchmarks.fidelity import Results, comparison, fixed_width, measure, rows_of
from benchmarks.peers import PEERS, base, environment
from benchmarks.peers.base import (
    CannotError,
    Cell,
    Compressed,
    Job,
    Task,
    best_of,
    cells,
    flops,
    job_of,
    largest_within,
)
from benchmarks.peers.environment import EnvironmentFailedError, Peer, run_peer
from benchmarks.peers.random_basis import projected_convolution, with_random_bases
from models.data import MissingDataError
from models.recipe import Recipe
from panther.chains import PACKINGS, TWO_GEMM
from panther.nn import SKConv2d
from tests.stand_ins import FIGURES, recipe_of

PLAIN = METHODS[0]


def encoder_recipe() -> Recipe:
    torch.manual_seed(0)
    return recipe_of(nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)), 64)


@pytest.fixture
def encoder() -> Job:
    return job_of(Task("minilm"), encoder_recipe())


@pytest.fixture
def tracker() -> Job:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 48, 3, padding=1), nn.Flatten()]
    return job_of(Task("crepe"), recipe_of(nn.Sequential(*layers, nn.Linear(48 * 64, 40)), 1, 8, 8))


# FLOPs


def test_flops_of_the_dense_layers_are_those_of_the_specs(encoder: Job, tracker: Job) -> None:
    for job in (encoder, tracker):
        assert job.dense.layers == sum(spec.flops for spec in job.of.found.sketchable)
    assert tracker.dense.model - tracker.dense.layers == 2 * 4 * 48 * 64 * 40  # the classifier is excluded


@pytest.mark.parametrize("packings", [(TWO_GEMM,), PACKINGS])
def test_flops_of_a_compressed_model_are_those_of_its_plan(
    packings: tuple[str, ...], encoder: Job, tracker: Job
) -> None:
    for job in (encoder, tracker):
        fits = Fits(job.of, 0)
        variant = ablation.Variant("", ablation.PANTHER, packings=packings)
        model = compress_as(variant, fits)(job, 0.5).model
        plan = fits.plan(variant.how, "uniform", 0.5, packings)
        assert flops(model, job.of).layers == plan.cost.flops <= 0.5 * job.dense.layers


def test_products_of_attention_are_not_those_of_layers() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            y = self.project(x).unsqueeze(1)
            return F.scaled_dot_product_attention(y, y, y).squeeze(1)

    torch.manual_seed(0)
    job = job_of(Task("minilm"), recipe_of(Attention(), 8, 64))
    assert job.dense.layers == 2 * 4 * 8 * 64 * 64
    assert job.dense.model == job.dense.layers + 4 * 4 * 8 * 8 * 64


def test_the_largest_size_within_a_share_is_found(encoder: Job) -> None:
    def build(size: float) -> nn.Module:
        width = max(1, round(96 * size))
        return nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, 64))

    size = largest_within(0.5, encoder, build, halvings=12)
    assert round(96 * size) == 48
    with pytest.raises(CannotError, match=r"more than 0\.00 of the dense layers"):
        largest_within(0.0001, encoder, build)


# Cells


def halved(job: Job, share: float) -> Compressed:
    return Compressed(nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 64)), ("cut",))


def test_a_model_is_scored_before_and_after_it_is_healed(encoder: Job) -> None:
    def heal(job: Job, model: nn.Module) -> tuple[str, ...]:
        model.load_state_dict(halved(job, 0.5).model.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        return ("zeroed",)

    before, after = cells(encoder, "row", 0.5, ["unhealed", "healed"], halved, heal)
    assert before.figures["cosine"] != after.figures["cosine"] == pytest.approx(0.0)
    assert before.notes == ("cut",) and after.notes == ("cut", "zeroed")
    assert before.layer_flops == after.layer_flops == pytest.approx(0.5)
    assert after.seconds >= before.seconds > 0


def test_a_method_that_fails_says_why_in_every_state(encoder: Job) -> None:
    def broken(job: Job, share: float) -> Compressed:
        raise RuntimeError("cannot trace aten::roll\nand a long stack")

    def unfit(job: Job, share: float) -> Compressed:
        raise CannotError("it factorises convolutions, and this model has none")

    for method, why in (
        (broken, "RuntimeError: cannot trace aten::roll"),
        (unfit, "it factorises convolutions, and this model has none"),
    ):
        found = list(cells(encoder, "row", 0.5, base.STATES, method))
        assert [cell.state for cell in found] == list(base.STATES)
        assert {cell.why for cell in found} == {why} and not any(cell.figures for cell in found)


def test_healing_that_fails_leaves_the_unhealed_cell(encoder: Job) -> None:
    def heal(job: Job, model: nn.Module) -> tuple[str, ...]:
        raise ValueError("diverged")

    before, after = cells(encoder, "row", 0.5, base.STATES, halved, heal)
    assert before.figures and not before.why
    assert after.why == "ValueError: diverged" and not after.figures


def test_a_cell_survives_json() -> None:
    cell = Cell("minilm", "a", 1 / 3, "healed", {"cosine": 0.1}, 0.33, 0.4, 1.5, ("x", "y"))
    assert Cell.from_json(cell.to_json()) == cell


def test_the_best_option_on_calibration_data_is_kept_and_failures_are_told(tracker: Job) -> None:
    def fail() -> nn.Module:
        raise RuntimeError("no")

    def noisy(scale: float) -> nn.Module:
        model = nn.Sequential(*tracker.of.model)
        return nn.Sequential(model, nn.Linear(40, 40).requires_grad_(False)) if scale else model

    best = best_of(tracker, {"worse": lambda: noisy(1.0), "same": lambda: noisy(0.0), "broken": fail})
    assert best.notes == ("best of 3 on calibration data: same", "broken: RuntimeError: no")
    with pytest.raises(CannotError, match="broken: RuntimeError: no"):
        best_of(tracker, {"broken": fail})


def test_the_distiller_gets_the_minutes_and_the_data_of_the_task(encoder: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}

    def heal(teacher: nn.Module, student: nn.Module, *data: object, **options: object) -> SimpleNamespace:
        given.update(options, teacher=teacher, student=student, data=data)
        return SimpleNamespace(seconds=90.0, steps=7, notes=("a note",))

    monkeypatch.setattr(base, "heal", heal)
    job = changed(encoder, task=Task("minilm", minutes=1.5, seed=4))
    student = halved(job, 0.5).model
    assert base.distilled(job, student) == ("distilled for 90 s, 7 steps", "a note")
    assert given["teacher"] is job.of.model and given["student"] is student and given["seed"] == 4
    assert given["data"] == (job.recipe.batches, job.recipe.example_inputs)
    assert given["settings"].mode == "distill" and given["settings"].time_limit == 90.0


# The paper's layer


def test_a_random_basis_of_a_convolution_has_the_weight_as_its_mean() -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(6, 16, 3, stride=2, padding=1)

    def error(weight: Tensor) -> float:
        return float((weight - dense.weight.detach()).norm() / dense.weight.detach().norm())

    layers = [projected_convolution(dense, low_rank=4, seed=seed) for seed in range(400)]
    weights = [layer.weight.detach() for layer in layers]
    assert all(isinstance(layer, SKConv2d) and torch.equal(layer.bias, dense.bias) for layer in layers)
    typical = sum(map(error, weights)) / len(weights)
    assert error(torch.stack(weights).mean(0)) < 1.5 * typical / 400**0.5  # independent errors


def test_random_bases_have_the_ranks_of_plain_svd_up_to_one(tracker: Job) -> None:
    plan = Fits(tracker.of, 0).plan(PLAIN.how, "uniform", 0.5, PLAIN.packings)
    model = with_random_bases(tracker.of.model, plan, 0)
    for choice in plan.sketched:  # two sketches of equal rank
        assert model.get_submodule(choice.layer).ranks == (choice.ranks[0] // 2 * 2,)
    assert flops(model, tracker.of).layers <= plan.cost.flops


# Ablation


def test_techniques_add_up_and_each_stands_alone(encoder: Job, tracker: Job) -> None:
    for job, schemes in ((encoder, False), (tracker, True)):
        rows = variants(job.of)
        labels = [row.label for row in rows]
        assert len(set(labels)) == len(labels)
        assert ("+ choice of the scheme" in labels) == schemes
        whole = labels.index("+ distillation: all together")
        assert labels[:2] == ["plain SVD", "+ whitening"] and rows[whole].mode == "auto"
        base_row = rows[1]
        for row in rows[whole + 1 :]:
            parts = ("how", "search", "packings", "mode")
            assert sum(getattr(row, part) != getattr(base_row, part) for part in parts) == 1


def test_a_variant_is_healed_with_its_own_techniques_only(encoder: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, object]] = []

    def heal(*arguments: object, **options: object) -> SimpleNamespace:
        given.append({**options, "settings": arguments[4]})
        return SimpleNamespace(seconds=1.0, steps=0, notes=())

    monkeypatch.setattr(ablation, "heal", heal)
    fits = Fits(encoder.of, 0)
    by_label = {row.label: row for row in variants(encoder.of)}
    for label in ("+ pivoted packing", "+ refit", "whitening + blocks alone"):
        compress_as(by_label[label], fits)(encoder, 0.5)
    refit, blocks = given  # the first is not healed
    assert refit["settings"].mode == "refit" and [s.name for s in refit["layers"]] == ["0", "2"]
    assert set(refit["sensitivities"]) == {"0", "2"}
    assert blocks["settings"].mode == "blocks" and not blocks["layers"] and not blocks["sensitivities"]


# Results


def stored(path: Path, *, resume: bool = True, **settings: object) -> Results:
    return Results(path, {"seed": 0, **settings}, resume=resume)


def cell(row: str = "a", **fields: object) -> Cell:
    return changed(Cell("minilm", row, 0.5, "unhealed", dict.fromkeys(FIGURES, 0.5)), **fields)


def test_results_are_read_back_up_to_a_half_written_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    first = stored(path)
    first.add(cell("a"))
    first.add(cell("b"))
    path.write_text(path.read_text() + '{"model": "mini')
    again = stored(path)
    assert again.cells == first.cells
    again.add(cell("c"))
    assert list(stored(path).cells.values()) == [cell("a"), cell("b"), cell("c")]


def test_results_are_neither_overwritten_nor_mixed_with_others(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    stored(path).add(cell())
    with pytest.raises(ValueError, match="give --resume"):
        stored(path, resume=False)
    with pytest.raises(ValueError, match="other settings"):
        stored(path, minutes=5.0)


def test_a_run_that_goes_on_measures_only_what_is_missing_or_failed(encoder: Job, tmp_path: Path) -> None:
    asked: list[tuple[str, float, tuple[str, ...]]] = []

    def row(name: str, why: str = "") -> fidelity.Row:
        def run(share: float, states: Sequence[str]) -> Iterator[Cell]:
            asked.append((name, share, tuple(states)))
            for state in states:
                yield cell(name, share=share, state=state, why=why)

        return run

    rows = {"a": row("a"), "b": row("b", why="RuntimeError: no")}
    results = stored(tmp_path / "results.jsonl")
    for count, _ in enumerate(measure(encoder, rows, [0.5], base.STATES, results), 1):
        assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1 + count  # stored before it is given out
        if count == 2:
            break
    list(measure(encoder, rows, [0.5], base.STATES, stored(tmp_path / "results.jsonl")))
    assert asked == [("a", 0.5, base.STATES), ("a", 0.5, ("healed",)), ("b", 0.5, base.STATES)]
    list(measure(encoder, rows, [0.5], base.STATES, stored(tmp_path / "results.jsonl")))
    assert asked[3:] == [("b", 0.5, base.STATES)]


# Peers' processes and environment

PEER = Peer("benchmarks.peers.none", ("one==1.0", "two==2.0"), "MIT", "nothing")


def test_a_peers_cells_come_from_its_process_and_its_end_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = cell("peer", notes=("best of 2",)).to_json()
    script = f"#!{sys.executable}\nimport os, sys\nassert os.environ['PYTHONPATH']\nassert '--share' in sys.argv\n"
    program = tmp_path / "python"
    program.write_text(f"{script}print({answer!r}, flush=True)\nsys.exit(9)\n")
    program.chmod(0o755)
    monkeypatch.setattr(environment, "environment", lambda peer: program)
    good, lost = run_peer(PEER, Task("minilm"), "peer", 0.5, base.STATES)
    assert good == Cell.from_json(answer)
    assert lost.state == "healed" and "ended with status 9" in lost.why


def test_an_environment_that_cannot_be_made_is_the_reason_in_every_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(peer: Peer) -> Path:
        raise EnvironmentFailedError("no index")

    monkeypatch.setattr(environment, "environment", fail)
    assert [c.why for c in run_peer(PEER, Task("minilm"), "peer", 0.5, base.STATES)] == ["no index"] * 2


def fake_pip(monkeypatch: pytest.MonkeyPatch, folder: Path, fails: str = "") -> list[list[str]]:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> None:
        commands.append(command)
        if fails and fails in command:
            raise subprocess.CalledProcessError(1, command, stderr="a line\nERROR: no such version\n")
        if command[1:3] == ["-m", "venv"]:
            Path(command[-1]).mkdir(parents=True)

    monkeypatch.setattr(environment, "data_roots", lambda: [folder])
    monkeypatch.setattr(environment.subprocess, "run", run)
    return commands


def test_torch_goes_in_first_and_peers_without_their_dependencies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = fake_pip(monkeypatch, tmp_path)
    python = environment.environment(PEER)
    assert tmp_path in python.parents
    torches = [command for command in commands if any(word.startswith("torch==") for word in command)]
    assert commands[1] is torches[0] and commands[1][-1] == f"torch=={torch.__version__}"
    assert commands[-1][-3:] == ["--no-deps", "one==1.0", "two==2.0"]
    assert not any("torchvision" in word for command in commands for word in command)
    done = len(commands)
    environment.environment(PEER)
    assert len(commands) == done  # everything is there
    environment.environment(changed(PEER, requirements=("three==3.0",)))
    assert [command[-1] for command in commands[done:]] == ["three==3.0"]


def test_a_step_that_fails_is_told_and_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = fake_pip(monkeypatch, tmp_path, fails="one==1.0")
    with pytest.raises(EnvironmentFailedError, match=r"one==1\.0 two==2\.0: ERROR: no such version"):
        environment.environment(PEER)
    done = len(commands)
    with pytest.raises(EnvironmentFailedError):
        environment.environment(PEER)
    assert len(commands) == done + 1


def test_a_peers_process_prints_cells_and_nothing_else(
    encoder: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chatty(job: Job, share: float) -> Compressed:
        sys.stdout.write("the package says hello\n")
        return halved(job, share)

    monkeypatch.setattr(base, "load", lambda task: changed(encoder, task=task))
    task = json.dumps({"model": "minilm", "options": {}, "minutes": 1.0, "seed": 0})
    given = ["peer", "--task", task, "--row", "peer", "--share", "0.5", "--states", "unhealed"]
    monkeypatch.setattr(sys, "argv", given)
    assert base.main(chatty) == 0
    out, err = capsys.readouterr()
    assert Cell.from_json(out).row == "peer" and "hello" in err


# Command line


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A small model in the place of MiniLM, no peer and no healing; what compress was asked to heal with."""
    asked: list[str] = []
    real = panther.compress

    def compress(*arguments: object, heal: object, **options: object) -> object:
        asked.append(heal if isinstance(heal, str) else f"{heal.mode} for {heal.time_limit:.0f} s")
        return real(*arguments, heal="none", **options)

    def peer_cells(peer: Peer, task: Task, row: str, share: float, states: Sequence[str]) -> Iterator[Cell]:
        yield from (Cell(task.model, row, share, state, why="RuntimeError: cannot trace") for state in states)

    monkeypatch.setattr(panther, "compress", compress)
    monkeypatch.setattr(base, "distilled", lambda job, model: ("distilled for 0 s, 0 steps",))
    monkeypatch.setattr(fidelity, "run_peer", peer_cells)
    monkeypatch.setattr(fidelity, "RESULTS", tmp_path)
    monkeypatch.setattr(fidelity, "load", lambda task: job_of(task, encoder_recipe()))
    return asked


def start(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fidelity", *arguments])
    return fidelity.main()


def test_a_quick_run_prints_every_row_in_both_states(
    stubs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert start(monkeypatch, "--quick", "--markdown") == 0
    text = capsys.readouterr().out
    columns, _, *rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in columns] == ["cosine / top-10 / Spearman", "1/2 of the FLOPs", "really"]
    names = ["random basis (the paper's layer)", "plain SVD", "whitened SVD", *PEERS, "panther"]
    wanted = ["dense", *(f"{name}{state}" for name in names for state in ("", ", healed"))]
    assert [row[0].strip() for row in rows] == wanted
    really = {row[0].strip(): row[2].strip() for row in rows}
    assert all(0.4 < float(really[name]) <= 0.5 for name in ("plain SVD", "panther", "panther, healed"))
    assert really["Torch-Pruning"] == "-" and "Torch-Pruning: not run: RuntimeError: cannot trace" in text
    assert stubs == ["refit", "auto for 10 s"]
    for told in (
        "licence of stand-in: none needed",
        f"torch {torch.__version__}",
        "seed 0",
        "torch-pruning==1.6.1 (MIT)",
    ):
        assert told in text
    lines = (tmp_path / "fidelity-quick.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 1 + 2 * len(names)


def test_a_run_goes_on_only_when_it_is_told_to(
    stubs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--models", "minilm", "--shares", "1/2", "--rows", "plain SVD"]
    assert start(monkeypatch, *given) == 0
    first = capsys.readouterr().out
    assert start(monkeypatch, *given) == 1
    assert "give --resume" in capsys.readouterr().err
    assert start(monkeypatch, *given, "--resume") == 0
    again = capsys.readouterr().out
    assert "minilm 1/2 plain SVD" in first and "minilm 1/2 plain SVD" not in again
    assert first.splitlines()[-2:] == again.splitlines()[-2:]  # the same table


def test_the_ablation_has_a_row_for_every_variant(
    stubs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], encoder: Job
) -> None:
    monkeypatch.setattr(ablation, "heal", lambda *_, **__: SimpleNamespace(seconds=0.0, steps=0, notes=()))
    assert start(monkeypatch, "--ablation", "--models", "minilm") == 0
    text = capsys.readouterr().out
    assert all(f"\n{variant.label}  " in text for variant in variants(encoder.of))
    assert "healed:" not in text and ", healed" not in text and not stubs


def test_bad_arguments_are_told(
    stubs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(monkeypatch, "--quick", "--rows", "SVD") == 1
    assert "no row is called SVD; there are random basis" in capsys.readouterr().err
    for share in ("0", "3/2", "half", "1/0"):
        with pytest.raises(SystemExit):
            start(monkeypatch, "--shares", share)
        assert "expected a share between 0 and 1" in capsys.readouterr().err

    def missing(task: Task) -> Job:
        raise MissingDataError("type: python -m benchmarks.fetch_data")

    monkeypatch.setattr(fidelity, "load", missing)
    assert start(monkeypatch, "--quick") == 1
    assert capsys.readouterr().err == "fidelity: type: python -m benchmarks.fetch_data\n"


def test_cells_that_were_not_measured_are_dashes(encoder: Job, tmp_path: Path) -> None:
    results = stored(tmp_path / "results.jsonl")
    results.add(cell("dense", share=1.0))
    results.add(cell("a", layer_flops=0.49))
    text = comparison(encoder, ["a"], [0.5, 1 / 3], ["unhealed"], results, markdown=False)
    assert text.splitlines()[3].split() == ["a", "0.500", "/", "0.50", "/", "0.500", "0.490", "-", "-"]


def test_a_table_of_text_is_aligned() -> None:
    assert fixed_width(["", "a"], [["long name", "1"], ["b", "12345"]]).splitlines() == [
        "               a",
        "----------------",
        "long name      1",
        "b          12345",
    ]


def test_only_rows_that_exist_can_be_asked_for(encoder: Job) -> None:
    assert list(rows_of(encoder, ["panther"])) == ["panther"]
    with pytest.raises(ValueError, match="no row is called SVD"):
        rows_of(encoder, ["SVD"])
