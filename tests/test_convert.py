import importlib
import io
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import panther.convert as cli
from panther.compress import Result
from panther.converters import ExportReport
from panther.errors import ExportError
from panther.nn import SKConv2d, SKLinear
from panther.spec import Choice, Heal, Plan

NETS = """
    import torch
    from torch import nn

    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(16, 48), nn.Linear(48, 48), nn.Linear(48, 4)

        def forward(self, x):
            return self.last(self.second(self.first(x).relu()).relu())

    class Versioned(Mlp):
        def get_extra_state(self):
            return {"version": 3}

        def set_extra_state(self, state):
            pass

    class Cnn(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, image):
            return self.conv(image).mean((2, 3))

    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix = nn.Embedding(20, 16), nn.Linear(16, 16)

        def forward(self, ids):
            return self.mix(self.embed(ids))

    class Placed(Text):
        def __init__(self):
            super().__init__()
            self.place = nn.Parameter(torch.zeros(16))

        def forward(self, ids):
            return super().forward(ids) + self.place

    class Optional(Mlp):
        def forward(self, x=None, mask=None):
            return super().forward(x)

    class Keyed(Mlp):
        def forward(self, *, x):
            return super().forward(x)

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 24), nn.Linear(16, 24)

        def forward(self, left, right):
            return self.a(left) + self.b(right)

    class Deeper(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.used = nn.Linear(5, 5), nn.Linear(16, 16)

        def forward(self, x):
            return self.used(x)

    def loader():
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(32, 16, generator=generator) for _ in range(6))

    def endless():
        for number in range(10_000):
            yield torch.randn(256, 16, generator=torch.Generator().manual_seed(number))
        raise RuntimeError("nobody takes as many")

    def broken():
        raise RuntimeError("no such disk")

    def evaluate(model):
        return 0.9

    def undecided(model):
        return None

    def counts(model):
        return sum(p.numel() for p in model.parameters())

    def leaves():
        raise SystemExit(0)

    def forgets():
        pass

    def stops(model):
        raise SystemExit(0)

    class OneDict(Mlp):
        def forward(self, batch):
            return super().forward(batch["x"])

    def dicts():
        return [{"x": torch.randn(8, 16, generator=torch.Generator().manual_seed(n))} for n in range(6)]

    number = 7
    batches = [torch.ones(8, 16)] * 2
    empty = []
"""
EXITS = "import sys; sys.exit(0)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nets.py, and mlp.pt, cnn.pt, ... made by its classes."""
    place = tmp_path_factory.mktemp("models")
    (place / "nets.py").write_text(textwrap.dedent(NETS))
    (place / "exits.py").write_text(EXITS)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(textwrap.dedent(NETS), names)  # noqa: S102 - the text above
    for name in ("Mlp", "Cnn", "Text", "Pair", "Deeper", "Versioned", "Placed", "Keyed"):
        torch.save(names[name]().state_dict(), place / f"{name.lower()}.pt")
    return place


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(here: Path, capsys: pytest.CaptureFixture[str]):
    """Runs a command line in the folder; its exit code, stdout and stderr."""

    def command(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(argv)
        return code, *capsys.readouterr()

    return command


MLP = ("mlp.pt", "--model", "nets.py:Mlp")
CALIB = ("--calib", "nets.py:loader")


def refusal(err: str) -> str:
    """The one line of an error."""
    assert "Traceback" not in err
    *before, line = err.splitlines()
    assert line.startswith("error: ")
    progress = ("target: ", "healing: ", "healing goes on ", "refit: ", "blocks: ", "distill: ")
    assert all(said.startswith(("warning: ", *progress)) for said in before)
    return line


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes exporting quick: a function that says whether the file agrees."""

    def fake(*, ok: bool) -> None:
        def write(self: Result, path: Path, **_: Any) -> ExportReport:
            path = path if ok else path.with_suffix(".failed.onnx")
            path.write_bytes(b"graph")
            return ExportReport(path, 5, None, 20, ("batch",), (), 1e-4, ok, True, 0.1)

        monkeypatch.setattr(Result, "export_onnx", write)

    return fake


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stops at compress() and keeps what it was called with."""
    seen: dict[str, Any] = {}

    class StoppedError(Exception):
        pass

    def compress(model: nn.Module, budget: Any, **options: Any) -> None:
        seen.update(options, model=model, budget=budget)
        raise StoppedError("here")

    monkeypatch.setattr(cli, "compress", compress)
    return seen


# A whole run


def test_the_report_is_a_page_too_with_what_onnxruntime_said(run, here: Path) -> None:
    code, out, _ = run(*MLP, "--report", "page.html")
    page = (here / "page.html").read_text()
    assert code == cli.DONE and "wrote page.html" in out
    assert page.startswith("<!DOCTYPE html>") and "agrees with the model" in page and "<td>" in page


def test_a_run_writes_the_files_beside_the_model_and_names_them_on_stdout(
    run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "medians_in_turn", lambda runs: [len(once()) * 0.002 for once in runs])
    code, out, err = run(*MLP, "--calib", "nets.py:loader", "--benchmark", "--report", "extra.json")
    assert code == cli.DONE
    names = ["mlp.panther", "mlp.onnx", "mlp.plan.json", "mlp.report.txt", "mlp.report.json"]
    wrote = [line.removeprefix("wrote ") for line in out.splitlines() if line.startswith("wrote ")]
    assert wrote == [str(here / name) for name in names] + ["extra.json"]
    assert "budget met: yes" in out and "agrees with the model" in out
    assert "onnxruntime, batch 1, " in out
    assert (
        f"onnxruntime, batch 32, {torch.get_num_threads()} threads: dense 2.000 ms, compressed 2.000 ms, ratio 1.00x"
        in out
    )
    assert err.splitlines()[0].startswith("target: keep ")
    report = json.loads((here / "mlp.report.json").read_text())
    assert report["compressed"]["size_bytes"] == (here / "mlp.panther/model.safetensors").stat().st_size
    assert report["agreement_held_out"] and len(report["onnx"]["checks"]) >= 3 and len(report["benchmark"]) == 2
    assert (here / "extra.json").read_text() == (here / "mlp.report.json").read_text()
    assert (here / "mlp.report.txt").read_text().rstrip() in out
    assert Plan.from_json((here / "mlp.plan.json").read_text()).sketched


HEALED = (*MLP, *CALIB, "--heal", "auto", "--steps", "40", "--time-limit", "1000", "--learning-rate", "0.005")


def test_a_run_says_what_healing_did(run, here: Path, export: Any) -> None:
    export(ok=True)
    code, out, err = run(*HEALED, "-o", "healed")
    assert code == cli.DONE
    assert "healing: auto, training for at most 1000 s, 40 steps; Ctrl-C keeps the best so far" in err
    (line,) = [line for line in out.splitlines() if line.startswith("healed ")]
    assert ": refit " in line and "blocks -> " in line and "distill -> " in line and line.endswith(" steps")
    healing = json.loads((here / "healed/mlp.report.json").read_text())["healing"]
    assert healing["after"] < healing["before"] and 0 < healing["steps"] <= 40
    assert healing["history"][0][1:] == ["before", healing["before"]]


def test_ctrl_c_while_healing_writes_what_there_is_and_the_rest_is_done_by_resume(
    run, here: Path, export: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(ok=True)
    flags = (*HEALED, "--checkpoint", "halted.ckpt", "-q")
    training = importlib.import_module("panther.healers.training")
    step, steps = training._step, []

    def interrupted(*args: Any) -> bool:
        steps.append(1)
        if len(steps) == 25:
            raise KeyboardInterrupt
        return bool(step(*args))

    with monkeypatch.context() as patch:
        patch.setattr(training, "_step", interrupted)
        code, out, _ = run(*flags, "-o", "halted")
    assert code == cli.DONE and "wrote halted/mlp.onnx" in out
    assert "note: distill: interrupted; the best state so far was kept" in (here / "halted/mlp.report.txt").read_text()
    assert (here / "halted.ckpt").exists()
    code, out, err = run(*flags, "-o", "again")
    assert code == cli.USAGE and "halted.ckpt is there already: add --resume" in refusal(err)
    assert run(*flags, "-o", "again", "--budget", "0.6", "--resume")[0] == cli.USAGE
    assert run(*flags, "-o", "again", "--resume")[0] == cli.DONE
    assert run(*HEALED, "-o", "whole", "-q")[0] == cli.DONE
    again, whole = ((here / name / "mlp.panther/model.safetensors").read_bytes() for name in ("again", "whole"))
    assert again == whole and not (here / "halted.ckpt").exists()


def test_a_recipe_has_the_healing_but_not_that_it_was_resumed(run, here: Path, quick: dict[str, Any]) -> None:
    (here / "there.ckpt").write_bytes(b"")
    run(*HEALED, "--checkpoint", "there.ckpt", "--resume", "--save-config", "healing.yaml")
    recipe = yaml.safe_load((here / "healing.yaml").read_text())
    assert recipe["heal"] == "auto" and recipe["steps"] == 40 and recipe["learning-rate"] == 0.005
    assert recipe["checkpoint"] == "there.ckpt" and "resume" not in recipe
    (here / "there.ckpt").unlink()
    quick.clear()
    run("--config", "healing.yaml")
    assert quick["heal"] == Heal("auto", 1000.0, 40, 0.005)


def test_a_saved_plan_is_used_again_with_its_own_budget(run, here: Path) -> None:
    assert run(*MLP, "--dry-run", "--json", "--budget", "0.6")[0] == cli.DONE
    plan = run(*MLP, "--dry-run", "--json", "--budget", "0.6")[1]
    (here / "kept.json").write_text(plan)
    code, out, _ = run(*MLP, "--dry-run", "--json", "--plan", "kept.json")
    assert code == cli.DONE
    assert Plan.from_json(out).choices == Plan.from_json(plan).choices


def test_an_edited_plan_that_misses_its_budget_is_told_to_say_another(run, here: Path) -> None:
    plan = json.loads(run(*MLP, "--dry-run", "--json", "--budget", "0.6")[1])
    changed = next(choice for choice in plan["choices"] if choice["scheme"] != "dense")
    changed["scheme"] = "dense"
    (here / "edited.json").write_text(json.dumps(plan))
    code, _, err = run(*MLP, "--dry-run", "--plan", "edited.json")
    assert code == cli.OVER_BUDGET
    assert "edited.json was made for that budget: once it is edited, say with --budget what" in refusal(err)
    assert run(*MLP, "--dry-run", "--plan", "edited.json", "--budget", "1.0")[0] == cli.DONE


def test_a_budget_out_of_reach_still_writes_files_and_names_them_so(run, here: Path, export: Any) -> None:
    export(ok=True)
    code, out, err = run(*MLP, "--budget", "0.001", "-o", "over", "-q")
    assert code == cli.OVER_BUDGET
    assert sorted(path.name for path in (here / "over").iterdir()) == [
        f"mlp.over-budget.{end}" for end in ("onnx", "panther", "plan.json", "report.json", "report.txt")
    ]
    assert all(line.startswith("wrote over/mlp.over-budget.") for line in out.splitlines())
    assert "budget not met: the sketchable layers hold" in refusal(err)
    assert "over/mlp.over-budget.onnx" in refusal(err)


def test_a_file_that_disagrees_is_exit_code_4_and_the_rest_is_kept(run, here: Path, export: Any) -> None:
    export(ok=False)
    code, out, err = run(*MLP, "--budget", "0.001", "-o", "wrong", "--json")
    assert code == cli.PARITY_FAILED
    assert "does not agree with the model" in refusal(err)
    assert (here / "wrong/mlp.over-budget.panther/panther.json").exists()
    assert json.loads(out)["onnx"]["ok"] is False
    assert len(json.loads(out)["files"]) == 5


def test_a_failed_export_keeps_and_names_what_was_written_and_says_how_to_load_it(
    run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise ExportError("Mlp cannot be exported to ONNX (no such operator).")

    monkeypatch.setattr(Result, "export_onnx", refused)
    code, out, err = run(*MLP, "-o", "kept", "-q", "--report", "kept/copy.txt")
    assert code == cli.UNEXPECTED
    names = ["mlp.panther", "mlp.plan.json", "mlp.report.txt", "mlp.report.json", "copy.txt"]
    assert out.splitlines() == [f"wrote kept/{name}" for name in names]
    assert refusal(err) == (
        "error: the compressed model was saved, but not as ONNX: Mlp cannot be exported to ONNX (no such operator). "
        "Load it with panther.load('kept/mlp.panther', model=...)"
    )
    assert "budget met: yes" in (here / "kept/mlp.report.txt").read_text()
    code, out, _ = run(*MLP, "-o", "kept", "--json")
    assert code == cli.UNEXPECTED
    assert json.loads(out)["onnx"] is None and json.loads(out)["files"][0] == "kept/mlp.panther"


def test_a_file_of_an_earlier_run_is_named_when_there_is_no_new_one(run, here: Path, export: Any) -> None:
    export(ok=True)
    assert run(*MLP, "-o", "twice", "-q")[0] == cli.DONE
    export(ok=False)
    code, _, err = run(*MLP, "-o", "twice", "-q")
    assert code == cli.PARITY_FAILED
    assert refusal(err).endswith("try another --opset. twice/mlp.onnx is of an earlier run")


def test_one_file_that_cannot_be_written_does_not_stop_the_others(
    run, here: Path, export: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise ExportError("cannot write the weights: no space.")

    export(ok=True)
    (here / "folder.txt").mkdir()
    code, out, err = run(*MLP, "-o", "most", "-q", "--report", "folder.txt")
    assert code == cli.UNEXPECTED and "not everything could be written: cannot write folder.txt: " in refusal(err)
    names = ["mlp.panther", "mlp.onnx", "mlp.plan.json", "mlp.report.txt", "mlp.report.json"]
    assert out.splitlines() == [f"wrote most/{name}" for name in names]
    monkeypatch.setattr(Result, "save", refused)
    code, out, err = run(*MLP, "-o", "rest", "-q")
    assert code == cli.UNEXPECTED
    assert refusal(err) == "error: not everything could be written: cannot write the weights: no space"
    assert out.splitlines() == [f"wrote rest/{name}" for name in names[1:]]


def test_what_could_not_be_written_is_refused_before_the_work(
    run, here: Path, quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for argv, words in (
        ([*MLP, "--report", "mlp.pt/r.txt"], "cannot write to mlp.pt: "),
        ([*MLP, "--opset", "3"], "opset=3: expected an integer from"),
        (["versioned.pt", "--model", "nets.py:Versioned"], "_extra_state of Versioned is no dense tensor with values"),
    ):
        code, out, err = run(*argv)
        assert (code, out, quick) == (cli.USAGE, "", {}) and words in refusal(err)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, _, err = run(*MLP)
    assert (code, quick) == (cli.USAGE, {}) and "pip install onnxruntime" in refusal(err)
    run(*MLP, "--opset", "3", "--dry-run")
    assert quick


# Printing only


def test_a_dry_run_prints_the_target_and_the_plan_and_writes_nothing(run, here: Path) -> None:
    before = sorted(here.rglob("*"))
    code, out, _ = run(*MLP, "--dry-run", "--exclude", "last", "-o", "nowhere")
    assert code == cli.DONE
    lines = out.splitlines()
    assert lines[0].startswith("target: keep ")
    assert [line.split()[0] for line in lines[1:]] == ["first", "second"]
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (Choice("a", "linear", (24,)), "linear, rank 24, two_gemm"),
        (Choice("a", "tucker2", (4, 6), "pivoted", channels=9), "tucker2, rank 4 x 6, pivoted, 9 channels"),
        (Choice("a", "whole", (), "quantised", "int8"), "whole, int8"),
        (Choice("a", "linear", (8,), "quantised", "int4", group_size=32), "linear, rank 8, int4, groups of 32"),
        (Choice("a", "channels", (9,), channels=9), "9 channels"),
    ],
)
def test_a_dry_run_says_what_each_layer_is_stored_in(choice: Choice, words: str) -> None:
    assert cli._choice_text(choice) == words


def test_a_dry_run_tells_when_the_budget_is_out_of_reach(run) -> None:
    code, _, err = run(*MLP, "--dry-run", "--budget", "params=101")
    assert code == cli.OVER_BUDGET
    assert "nothing was written" in refusal(err)


def test_listing_layers_prints_what_can_be_sketched(run, here: Path) -> None:
    code, out, err = run(*MLP, "--list-layers", "--include", "first")
    assert (code, err) == (cli.DONE, "")
    assert out.startswith("1 of 3 dense layers can be sketched")
    assert "not among include=" in out
    code, out, _ = run(*MLP, "--list-layers", "--include", "first", "--json")
    assert code == cli.DONE
    layers = json.loads(out)["layers"]
    assert [(layer["name"], bool(layer["blockers"])) for layer in layers] == [
        ("first", False),
        ("second", True),
        ("last", True),
    ]


def test_a_terminal_without_the_characters_of_a_table_gets_the_rest(
    here: Path, export: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(ok=True)
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert cli.main([*MLP, "-o", "plain"]) == cli.DONE
    terminal.seek(0)
    assert "wrote plain" in terminal.read()


def test_version_and_help_are_no_errors(run) -> None:
    assert run("--version")[:2] == (0, f"panther {cli.__version__}\n")
    code, out, _ = run("--help")
    assert code == 0
    assert "3 budget not met" in out and "--int8" in out and "--int4" in out


# What the flags mean


def test_flags_reach_compress(run, quick: dict[str, Any]) -> None:
    flags = ("--include", "first", "--include", "re:s.c", "--exclude", "last", "--search", "uniform", "--seed", "7")
    code, _, err = run(*MLP, *flags, "--budget", "params=0.25,size_mb=50%", "--device", "cpu", "-q", "--no-verify")
    assert code == cli.UNEXPECTED
    assert refusal(err) == "error: StoppedError: here (run again with -v for the traceback)"
    assert str(quick["budget"]) == "params=0.25, size_mb=50%"
    assert (quick["include"], quick["exclude"]) == (["first", "re:s.c"], ["last"])
    assert (quick["search"], quick["seed"], quick["progress"], quick["verify"]) == ("uniform", 7, False, False)
    assert quick["device"] == torch.device("cpu")
    assert quick["plan"] is quick["calib_data"] is quick["eval_fn"] is None


@pytest.mark.parametrize(
    ("flags", "healing"),
    [
        ((), Heal()),
        (("--heal", "none"), Heal("none")),
        ((*CALIB, "--heal", "refit"), Heal("refit")),
        ((*CALIB, "--heal", "blocks", "--steps", "400"), Heal("blocks", steps=400)),
        ((*CALIB, "--time-limit", "60", "--learning-rate", "1e-3"), Heal(time_limit=60.0, learning_rate=1e-3)),
        ((*CALIB, "--heal", "distill", "--dry-run"), Heal("none")),
    ],
)
def test_healing_and_its_limits_reach_compress(
    flags: tuple[str, ...], healing: Heal, run, quick: dict[str, Any]
) -> None:
    assert run(*MLP, *flags)[0] == cli.UNEXPECTED
    assert quick["heal"] == healing and quick["checkpoint"] is None


def test_the_tuned_search_and_its_limits_reach_compress(run, quick: dict[str, Any]) -> None:
    run(*MLP, "--search", "tuned", "--trials", "7", "--timeout", "2.5")
    assert (quick["search"], quick["n_trials"], quick["timeout"]) == ("tuned", 7, 2.5)
    run(*MLP)
    assert quick["n_trials"] is quick["timeout"] is None


def test_trials_of_a_killed_search_are_gone_on_from_only_when_that_is_said(
    run, here: Path, quick: dict[str, Any]
) -> None:
    (here / "tuning.ckpt.trials").touch()
    code, _, err = run(*MLP, "--search", "tuned", "--checkpoint", "tuning.ckpt")
    assert code == cli.USAGE and "tuning.ckpt is there already: add --resume" in refusal(err)
    run(*MLP, "--search", "tuned", "--checkpoint", "tuning.ckpt", "--resume")
    assert quick["checkpoint"] == Path("tuning.ckpt")


def test_a_tuned_run_shows_its_trials_and_writes_their_knobs(run, here: Path) -> None:
    flags = (*MLP, *CALIB, "--search", "tuned", "--trials", "4", "--eval", "nets.py:counts", "--heal", "none")
    code, out, err = run(*flags, "-o", "tuned")
    assert code == cli.DONE
    assert "tuned on eval_fn: best " in out and "sensitivity plan" in out and "trial  by" in out
    assert "trial 0 (given): " in err and "trial 3 (" in err
    plan = json.loads((here / "tuned" / "mlp.plan.json").read_text())
    assert plan["allocator"] == "tuned" and {"floor", "power"} <= plan["knobs"].keys()
    tuning = json.loads((here / "tuned" / "mlp.report.json").read_text())["tuning"]
    assert len(tuning["trials"]) == 4 and tuning["best"][0] == max(trial["score"] for trial in tuning["trials"])


def test_a_checkpoint_reaches_compress(run, here: Path, quick: dict[str, Any]) -> None:
    run(*MLP, *CALIB, "--checkpoint", "heal.ckpt")
    assert quick["checkpoint"] == Path("heal.ckpt")
    run(*MLP, *CALIB, "--checkpoint", "new/heal.ckpt", "--list-layers")
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        (None, "params=0.5"),
        ("0.3", "params=0.3"),
        ("30%", "params=0.3"),
        ("params=500", "params=500"),
        ("params=50%,latency_ms=12.5,peak_memory_mb=80%", "params=0.5, latency_ms=12.5, peak_memory_mb=80%"),
    ],
)
def test_budgets_read_as_in_python(run, quick: dict[str, Any], text: str | None, budget: str) -> None:
    run(*MLP, *([] if text is None else ["--budget", text]))
    assert str(quick["budget"]) == budget


@pytest.mark.parametrize(
    ("flags", "budget"),
    [
        (["--max-drop", "0.01"], "max_drop=0.01"),  # alone: the smallest model that holds it, and not half
        (["--max-drop", "0.01", "--budget", "0.3"], "params=0.3, max_drop=0.01"),
        (["--budget", "latency_ms=50%,max_drop=0.02"], "latency_ms=50%, max_drop=0.02"),
        ([], "params=0.5"),
    ],
)
def test_an_evaluation_reaches_compress_with_or_without_a_limit_on_its_drop(
    run, quick: dict[str, Any], flags: list[str], budget: str
) -> None:
    run(*MLP, "--eval", "nets.py:evaluate", *flags)
    assert quick["eval_fn"](None) == 0.9 and str(quick["budget"]) == budget


@pytest.mark.parametrize(
    ("made_for", "flags", "budget"),
    [
        ("max_drop=0.01", [], "params=1.0"),
        ("max_drop=0.01", ["--eval", "nets.py:evaluate"], "max_drop=0.01"),
        ("params=0.5, max_drop=0.01", [], "params=0.5"),
        ("max_drop=0.01, of=model", [], "params=1.0"),
        ("", [], "params=1.0"),
        ("params=0.5", ["--max-drop", "0.2", "--eval", "nets.py:evaluate"], "params=0.5, max_drop=0.2"),
        ("flops=0.5, max_drop=0.1", ["--max-drop", "0.2", "--eval", "nets.py:evaluate"], "flops=0.5, max_drop=0.2"),
        ("params=0.5", ["--budget", "0.3"], "params=0.3"),
    ],
)
def test_a_plan_brings_its_budget_without_a_drop_that_nothing_evaluates(
    run, here: Path, quick: dict[str, Any], made_for: str, flags: list[str], budget: str
) -> None:
    (here / "made.json").write_text(Plan((), budget=made_for).to_json())
    run(*MLP, "--plan", "made.json", *flags)
    assert str(quick["budget"]) == budget and quick["plan"].budget == made_for


def test_the_smallest_model_within_a_drop_is_found_from_the_shell(run, here: Path, export: Any) -> None:
    export(ok=True)
    flags = ("--calib", "nets.py:loader", "--eval", "nets.py:counts", "--max-drop", "2000", "-o", "drop", "--json")
    code, out, err = run(*MLP, *flags)
    assert code == cli.DONE
    assert err.splitlines()[0].startswith("target: lose at most 2e+03 of eval_fn, which stays at ")
    report = json.loads(out)
    (limit,) = report["limits"]
    assert (limit["name"], limit["limit"], limit["met"]) == ("drop of eval_fn", 2000, True)
    assert limit["got"] == report["dense"]["params"] - report["compressed"]["params"] <= 2000


def test_a_drop_that_is_too_large_is_exit_code_3_and_the_files_are_named_so(run, here: Path, export: Any) -> None:
    export(ok=True)
    flags = ("--eval", "nets.py:counts", "--max-drop", "10", "--budget", "0.3", "-o", "fell", "-q", "--no-verify")
    code, _, err = run(*MLP, *flags)
    assert code == cli.OVER_BUDGET
    assert "budget not met: eval_fn falls by " in refusal(err) and "at most 10 was asked for" in refusal(err)
    text = (here / "fell/mlp.over-budget.report.txt").read_text()
    assert "of 10: NOT met" in text and "M: met" in text


def test_shapes_make_positional_or_named_inputs(run, quick: dict[str, Any]) -> None:
    run("pair.pt", "--model", "nets.py:Pair", "--input-shape", "3,16", "--input-shape", "3,16")
    left, right = quick["example_inputs"].args
    assert left.shape == right.shape == (3, 16)
    assert left.dtype == torch.float32 and not torch.equal(left, right)
    named = ("--input-shape", "ids=2,5:int64", "--input-shape", "attention_mask=2,5:int64")
    run("text.pt", "--model", "nets.py:Text", *named)
    kwargs = quick["example_inputs"].kwargs
    assert kwargs["ids"].tolist() == [[0] * 5] * 2
    assert kwargs["attention_mask"].tolist() == [[1] * 5] * 2


def test_an_argument_by_place_and_one_by_name_are_both_inputs_of_the_file(run, here: Path) -> None:
    shapes = ("--input-shape", "2,16", "--input-shape", "right=2,16")
    flags = ("--heal", "none", "--no-verify", "-o", "mixed", "--benchmark")
    code, out, _ = run("pair.pt", "--model", "nets.py:Pair", *shapes, *flags)
    assert code == cli.DONE and "left (2, 16), right (2, 16): max difference" in out
    assert "onnxruntime, batch 32, " in out


def test_the_input_of_a_first_linear_layer_is_inferred(run, quick: dict[str, Any]) -> None:
    run(*MLP)
    assert quick["example_inputs"].args[0].shape == (1, 16)
    del quick["example_inputs"]
    run("mlp.pt", "--model", "nets.py:Optional")  # of arguments that may all be left out, the first
    assert quick["example_inputs"].args[0].shape == (1, 16)


def test_the_input_of_a_first_layer_that_is_sketched_already_is_inferred() -> None:
    first = SKLinear.from_dense(nn.Linear(16, 48).double(), rank=4)
    call = cli._from_first_layer(nn.Sequential(first, nn.Linear(48, 4).double()))
    assert call.args[0].shape == (1, 16) and call.args[0].dtype == torch.float64
    with pytest.raises(cli.UsageError, match="Add --input-shape 1,3,224,224 "):
        cli._from_first_layer(nn.Sequential(SKConv2d.from_dense(nn.Conv2d(3, 8, 3), rank=2)))


def test_a_compressed_model_is_compressed_again_without_saying_its_inputs(run, here: Path, export: Any) -> None:
    export(ok=True)
    assert run(*MLP, "-o", "once", "-q", "--budget", "0.6")[0] == cli.DONE
    code, out, _ = run("once/mlp.panther", "--model", "nets.py:Mlp", "--list-layers")
    assert code == cli.DONE and "last" in out


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("Cnn", "--input-shape 1,3,224,224 "),
        ("Text", "--input-shape 1,16:int64 "),
        ("Pair", "--input-shape left=1,16 --input-shape right=1,16 "),
        ("Placed", "--input-shape 1,16:int64 "),
        ("Keyed", "which takes x: add --input-shape x=1,16 "),
    ],
)
def test_where_the_input_cannot_be_inferred_the_flag_to_add_is_printed(run, name: str, flag: str) -> None:
    code, _, err = run(f"{name.lower()}.pt", "--model", f"nets.py:{name}")
    assert code == cli.USAGE
    assert flag in refusal(err)


def test_a_wrong_guess_says_that_it_was_one(run) -> None:
    code, _, err = run("deeper.pt", "--model", "nets.py:Deeper")
    assert code == cli.USAGE
    assert "The inputs came from the first layer: say them with --input-shape." in refusal(err)


def test_calibration_data_gives_the_inputs_too(run, quick: dict[str, Any], here: Path) -> None:
    run("deeper.pt", "--model", "nets.py:Deeper", "--calib", "nets.py:loader")
    assert quick["example_inputs"].args[0].shape == (1, 16)
    assert [batch.shape for batch in quick["calib_data"]] == [(32, 16)] * 6  # the first, which was looked at, as well
    run("deeper.pt", "--model", "nets.py:Deeper", "--calib", "nets.py:batches")
    assert len(quick["calib_data"]) == 2


def test_a_loader_without_an_end_is_read_as_far_as_is_needed(run) -> None:
    code, out, _ = run(*MLP, "--calib", "nets.py:endless", "--heal", "none", "--dry-run")
    assert code == cli.DONE and out.startswith("target: ")


def test_arrays_are_taken_by_name_or_by_position(run, quick: dict[str, Any], here: Path) -> None:
    rows = np.arange(40 * 16, dtype=np.float64).reshape(40, 16)
    np.savez("one.npz", rows)
    run(*MLP, "--calib", "one.npz")
    assert quick["calib_data"].dtype == torch.float32 and quick["calib_data"].shape == (40, 16)
    np.savez("named.npz", right=rows, left=-rows, label=np.zeros(40))
    run("pair.pt", "--model", "nets.py:Pair", "--calib", "named.npz")
    assert torch.equal(quick["calib_data"]["left"], -quick["calib_data"]["right"])
    assert set(quick["example_inputs"].kwargs) == {"left", "right"}
    np.savez("placed.npz", rows, -rows)
    run("pair.pt", "--model", "nets.py:Pair", "--calib", "placed.npz")
    assert [len(left) for left, _ in quick["calib_data"]] == [32, 8]
    assert len(quick["example_inputs"].args) == 2
    np.savez("misnamed.npz", r=rows, l=-rows)
    code, _, err = run("pair.pt", "--model", "nets.py:Pair", "--calib", "misnamed.npz")
    assert code == cli.USAGE and "holds arrays called r, l; Pair.forward takes left, right: give them these" in err


def test_a_factory_is_imported_from_the_working_folder(run, here: Path, quick: dict[str, Any]) -> None:
    (here / "package_of_mine").mkdir(exist_ok=True)
    (here / "package_of_mine" / "net.py").write_text("from torch import nn\ndef make():\n    return nn.Linear(16, 8)\n")
    torch.save(nn.Linear(16, 8).state_dict(), "single.pt")
    run("single.pt", "--model", "package_of_mine.net:make")
    assert isinstance(quick["model"], nn.Linear)


def test_a_hugging_face_folder_brings_its_inputs(run, here: Path, quick: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(here / "bert")
    run("bert")
    assert set(quick["example_inputs"].kwargs) == {"input_ids", "attention_mask"}


def test_bfloat16_weights_are_written_as_float32_and_the_report_says_so(run, here: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=30, **sizes))
    model.bfloat16().save_pretrained(here / "half")
    code, out, err = run("half", "-o", "single", "--heal", "none", "--no-verify")
    assert code == cli.DONE and "agrees with the model (tolerance 1e-04" in out
    told = "the weights are bfloat16 in the file and float32 here"
    assert told in err and told in (here / "single/half.report.txt").read_text()


@pytest.mark.parametrize(
    "data",
    [
        "[torch.randn(8, 16).bfloat16() for _ in range(3)]",
        "((torch.randn(8, 16).bfloat16(), torch.zeros(8)) for _ in range(3))",
        "torch.randn(24, 16).bfloat16()",
        "{'input': torch.randn(24, 16).bfloat16()}",
    ],
)
def test_bfloat16_batches_are_what_the_weights_are(run, here: Path, data: str) -> None:
    torch.save(nn.Sequential(nn.Linear(16, 48), nn.Linear(48, 4)).bfloat16(), here / "half.pt")
    (here / "seen.py").write_text(f"import torch\n\ndef loader():\n    return {data}\n")
    flags = ("--calib", "seen.py:loader", "--heal", "refit", "--no-verify")
    code, out, err = run("half.pt", "--trust-pickle", *flags)
    assert code == cli.DONE, out + err


# Recipes


def test_a_recipe_gives_the_flags_and_the_command_line_wins(run, quick: dict[str, Any], here: Path) -> None:
    recipe = {"path": "mlp.pt", "model": "nets.py:Mlp", "budget": {"params": 0.4}, "input_shape": [2, 16], "seed": 3}
    Path("recipe.yaml").write_text(yaml.safe_dump({**recipe, "include": ["first", "last"], "quiet": True}))
    run("--config", "recipe.yaml", "--seed", "5", "--include", "second")
    assert str(quick["budget"]) == "params=0.4"
    assert quick["example_inputs"].args[0].shape == (2, 16)
    assert (quick["seed"], quick["include"], quick["progress"]) == (5, ["second"], False)


def test_recipes_are_read_as_yaml_reads_them(run, quick: dict[str, Any], here: Path) -> None:
    lines = ["path:", "model: nets.py:Mlp", "heal: off", "include: [0, 2]", "quiet: no", "input-shape: [[2, 16]]"]
    Path("plain.yaml").write_text("\n".join(lines))
    run("mlp.pt", "--config", "plain.yaml")
    assert quick["heal"].mode == "none" and quick["include"] == ["0", "2"] and quick["progress"] is True
    assert quick["example_inputs"].args[0].shape == (2, 16)


def test_a_saved_recipe_gives_the_same_run(run, quick: dict[str, Any], here: Path) -> None:
    run(*MLP, "--budget", "0.3", "--exclude", "last", "--input-shape", "2,16", "--save-config", "saved.yaml")
    first = dict(quick)
    assert "config" not in yaml.safe_load(Path("saved.yaml").read_text())
    run("--config", "saved.yaml")
    assert (quick["budget"], quick["exclude"]) == (first["budget"], first["exclude"])
    assert torch.equal(quick["example_inputs"].args[0], first["example_inputs"].args[0])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("budgt: 0.5", "unknown key 'budgt'; did you mean 'budget'?"),
        ("zzz: 1", "unknown key 'zzz'; known: "),
        ("- 1", "holds list: expected lines such as budget: 0.5"),
        ("a: [", "cannot be read"),
        ('seed: !!int ""', "cannot be read"),
        ("trials: 5", "--trials belongs to --search tuned"),
        ("budget: yes", "budget is true, as YAML reads yes, no, on and off: write a value, or quote it"),
        ("calib: off", "calib is false, as YAML reads"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(run, here: Path, text: str, words: str) -> None:
    Path("bad.yaml").write_text(text)
    code, _, err = run(*MLP, "--config", "bad.yaml")
    assert code == cli.USAGE
    assert words in refusal(err)


# Refusals


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--budget", "0"], "a fraction KEPT is above 0"),
        (["--budget", "1"], "can be read two ways"),
        (["--budget", "1.7"], "can be read two ways"),
        (["--budget", "abc"], "neither a fraction nor a percentage"),
        (["--budget", ""], "neither a fraction nor a percentage"),
        (["--budget", "params=0.5,flops=0.5, params=0.3"], "params is given twice"),
        (["--budget", "latency_ms=0"], "latency_ms='0'): expected milliseconds of one run"),
        (["--budget", "peak_memory_mb=200%"], 'or a percentage of the dense model\'s, as in peak_memory_mb="50%"'),
        (["--budget", "max_drop=0.1"], "a drop of at most 0.1 needs something that falls: add --eval my.py:evaluate"),
        (["--budget", "prams=5"], "did you mean 'params'?"),
        (["--trials", "9"], "--trials belongs to --search tuned: add that, or leave --trials out"),
        (["--timeout", "9", "--search", "uniform"], "--timeout belongs to --search tuned"),
        (["--search", "tuned", "--trials", "0"], "--trials 0: expected a number of plans, 1 or more"),
        (["--search", "tuned", "--trials", "x"], "argument --trials: invalid int value: 'x'"),
        (["--search", "tuned", "--timeout", "-1"], "--timeout -1: expected seconds, above 0"),
        (["--search", "tuned", "--timeout", "nan"], "--timeout nan: expected seconds, above 0"),
        (["--search", "best"], "--search best: expected one of uniform, sensitivity, tuned"),
        (["--search", "tunned"], "did you mean 'tuned'?"),
        (["--plan", "p.json", "--search", "tuned", "--trials", "5"], "leave --search tuned out, or --plan"),
        (
            ["--plan", "p.json", "--int4"],
            "and what it is stored in: leave --int4 out, or --plan",
        ),
        (
            ["--time-limit", "9", "--learning-rate", "0.1"],
            "--time-limit, --learning-rate: there is no training",
        ),
        (["--eval", "gone.py:f"], "no file gone.py"),
        (["--eval", "nets.py:score"], "nets.py has no 'score'"),
        (["--eval", "nets.py:empty"], "--eval nets.py:empty is list: expected a function of a model"),
        (["--max-drop", "0.01"], "a drop of at most 0.01 needs something that falls: add --eval my.py:evaluate"),
        (["--max-drop", "1%", "--eval", "nets.py:evaluate"], "max_drop='1%'): expected by how much eval_fn may fall"),
        (
            ["--max-drop", "0.1", "--budget", "max_drop=0.2", "--eval", "nets.py:evaluate"],
            "--max-drop 0.1 and --budget max_drop=0.2: give the drop once",
        ),
        (
            ["--max-drop", "0.1", "--eval", "nets.py:undecided"],
            "max_drop needs what eval_fn says of the dense model: TypeError: eval_fn answered with NoneType",
        ),
        (
            ["--heal", "block"],
            "--heal block: expected one of none, refit, blocks, distill, auto; did you mean 'blocks'?",
        ),
        (["--heal", "refit"], "--heal refit needs inputs to heal with: add --calib data.npz or --calib my.py:loader"),
        (
            [*CALIB, "--heal", "refit", "--steps", "9"],
            "--steps: --heal refit has no training to limit; use --heal blocks",
        ),
        (["--heal", "none", "--time-limit", "9"], "--time-limit: --heal none has no training to limit"),
        ([*CALIB, "--time-limit", "0"], "Heal(time_limit=0.0): expected a number above 0"),
        ([*CALIB, "--time-limit", "soon"], "argument --time-limit: invalid float value: 'soon'"),
        ([*CALIB, "--steps", "0"], "Heal(steps=0): expected an integer of at least 1"),
        ([*CALIB, "--steps", "1.5"], "argument --steps: invalid int value: '1.5'"),
        ([*CALIB, "--learning-rate", "-1"], "Heal(learning_rate=-1.0): expected a number above 0"),
        ([*CALIB, "--learning-rate", "nan"], "Heal(learning_rate=nan): expected a number above 0"),
        (["--resume"], "--resume needs the file to go on from: add --checkpoint FILE, as in the run before"),
        (["--resume", "--checkpoint", "gone"], "--resume: there is no gone to go on from (a run that ends removes its"),
        (["--checkpoint", "cnn.pt"], "cnn.pt is there already: add --resume to go on from it, or delete it (or give"),
        ([*CALIB, "--checkpoint", "cnn.pt", "--resume"], "cnn.pt cannot be read as a checkpoint"),
        (["--report", "r.doc"], "expected a name ending in .txt, .json, .html"),
        (["--device", "gpu9"], "--device gpu9 cannot be used here"),
        (["--device", "meta"], "--device meta cannot be used here: it holds no numbers"),
        (["--checkpoint", "mlp.pt/run"], "File exists; choose another folder with --checkpoint FILE"),
        (["--checkpoint", "."], ". is there already"),
        (["--opset", "x"], "argument --opset: invalid int value: 'x'; see python -m panther.convert --help"),
        (["--typo"], "unrecognized arguments: --typo"),
        (["--seed", "-1"], "--seed -1: expected an integer from 0 to 2**63 - 1"),
        (["--seed", str(2**64)], "expected an integer from 0 to 2**63 - 1"),
        (["--input-shape", "1x16"], "--input-shape 1x16: expected sizes"),
        (["--input-shape", "1,16:floaty"], "expected sizes"),
        (["--input-shape", "1,0"], "expected sizes"),
        (["--input-shape", "1,99999999999999"], "--input-shape 1,99999999999999: RuntimeError"),
        (["--input-shape", f"1,{10**30}"], "--input-shape 1,1000000000000"),
        (["--include", "nothing.*"], "matches no dense layer"),
        (["--calib", "gone.npz"], "gone.npz cannot be read"),
        (["--calib", "nets.py"], "expected MODULE:NAME"),
        (["--calib", "one.npy"], "an array alone has no name; give a file that numpy.savez"),
        (["--calib", "gone.py:loader"], "no file gone.py"),
        (["--calib", "nets.py:lodaer"], "nets.py has no 'lodaer'; nearest: loader"),
        (["--calib", "nets.py:broken"], "failed: RuntimeError: no such disk"),
        (["--calib", "nets.py:leaves"], "failed: SystemExit: 0"),
        (["--calib", "nets.py:forgets"], "gives None: does it end without a return?"),
        (["--calib", "nets.py:number"], "gives int; expected batches to iterate over, or one tensor"),
        (["--calib", "exits.py:loader"], "importing exits.py failed: SystemExit: 0"),
        (["--calib", "nets.py:empty"], "has no batches"),
        (["--plan", "gone.json"], "--plan gone.json cannot be read"),
        (["--plan", "nets.py"], "not a panther plan"),
        (["--config", "gone.yaml"], "--config gone.yaml cannot be read"),
        (["-o", "mlp.pt"], "cannot write to mlp.pt"),
    ],
)
def test_each_of_these_is_refused_in_one_line(run, here: Path, flags: list[str], words: str) -> None:
    before = sorted(here.rglob("*"))
    code, out, err = run(*MLP, *flags)
    assert (code, out) == (cli.USAGE, "")
    assert words in refusal(err)
    assert [path for path in sorted(here.rglob("*")) if "__pycache__" not in str(path)] == [
        path for path in before if "__pycache__" not in str(path)
    ]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "no model given"),
        (["gone.pt"], "gone.pt: No such file"),
        (["mlp.pt"], "--model pkg.mod:factory"),
        (["mlp.pt", "--model", "no_such_package.net:make"], "ModuleNotFoundError"),
        (["mlp.pt", "--model", "nets.py:Cnn"], "does not fit Cnn"),
        (["x.onnx"], "x.onnx is an ONNX model"),
        (["x.pt2"], "a torch.export archive"),
        (["whole.pt"], "pass --trust-pickle"),
    ],
)
def test_models_that_cannot_be_read_say_the_way_out(run, here: Path, argv: list[str], words: str) -> None:
    Path("x.onnx").write_bytes(b"\x08\x07 not really")
    Path("x.pt2").write_bytes(b"not really either")
    torch.save(nn.Sequential(nn.Linear(4, 4)), "whole.pt")
    code, out, err = run(*argv)
    assert (code, out) == (cli.USAGE, "")
    assert words in refusal(err)


def test_code_that_ends_the_process_is_an_error_whatever_its_exit_code(run, here: Path) -> None:
    code, out, err = run(*MLP, "--eval", "nets.py:stops", "--max-drop", "0.1")
    assert (code, out) == (cli.UNEXPECTED, "") and "sys.exit(0)" in refusal(err)


def test_a_users_file_is_run_once_however_many_flags_name_it(run, here: Path, quick: dict[str, Any]) -> None:
    Path("once.py").write_text(
        "import nets\nnets.runs = getattr(nets, 'runs', 0) + 1\nfrom nets import Mlp, evaluate, loader\n"
    )
    run("mlp.pt", "--model", "once.py:Mlp", "--calib", "once.py:loader", "--eval", "once.py:evaluate")
    assert sys.modules["nets"].runs == 1
    run("mlp.pt", "--model", "once.py:Mlp")
    assert sys.modules.pop("nets").runs == 2


def test_a_forward_of_one_dict_gets_whole_dicts(run, here: Path, export: Any) -> None:
    torch.save(cli._module_from_file(Path("nets.py")).OneDict().state_dict(), "onedict.pt")
    code, _, err = run(
        "onedict.pt", "--model", "nets.py:OneDict", "--calib", "nets.py:dicts", "--heal", "none", "--dry-run", "-q"
    )
    assert code == cli.DONE, err


def test_a_reader_that_stops_reading_does_not_make_it_fail(here: Path) -> None:
    flags = [*MLP, "--budget", "0.5", "--dry-run", "-v", "-q"]
    code = f"import sys, panther.convert as c\nc._say('x' * 10**6)\nsys.exit(c.main({flags!r}))"
    argv = [sys.executable, "-W", "ignore", "-c", code]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.read(10)
        running.stdout.close()
        said = running.stderr.read().decode()
        assert running.wait(120) == cli.DONE and "BrokenPipe" not in said


def test_arrays_that_do_not_belong_together_are_refused(run, here: Path) -> None:
    np.savez("uneven.npz", np.ones((3, 16)), np.ones((4, 16)))
    assert "as many rows in each" in refusal(run(*MLP, "--calib", "uneven.npz")[2])
    np.savez("objects.npz", np.array([{}], dtype=object))
    assert "cannot be read as arrays of numbers" in refusal(run(*MLP, "--calib", "objects.npz")[2])


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("damage", [lambda data: data[:90], lambda data: data[:90] + b"????" + data[94:]])
def test_damaged_arrays_are_refused_as_such(run, here: Path, write: Any, damage: Callable[[bytes], bytes]) -> None:
    write("data.npz", np.ones((3, 16)))
    Path("data.npz").write_bytes(damage(Path("data.npz").read_bytes()))
    code, _, err = run(*MLP, "--calib", "data.npz")
    assert code == cli.USAGE and "--calib data.npz cannot be read as arrays of numbers" in refusal(err)


def test_a_trusted_pickle_is_read(run, here: Path, quick: dict[str, Any]) -> None:
    torch.save(nn.Sequential(nn.Linear(4, 4)), "trusted.pt")
    run("trusted.pt", "--trust-pickle")
    assert isinstance(quick["model"], nn.Sequential)


@pytest.mark.parametrize("fault", [ValueError, TypeError])
@pytest.mark.parametrize("stage", ["panther.compress.decompose", "panther.compress.check", "panther.convert.read"])
def test_a_fault_of_the_work_itself_is_not_blamed_on_the_arguments(
    run, stage: str, fault: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise fault("shapes do not match")

    module, _, name = stage.rpartition(".")
    monkeypatch.setattr(sys.modules[module], name, broken)
    code, out, err = run(*MLP, "-o", "faulty")
    assert (code, out) == (cli.UNEXPECTED, "")
    assert f"{fault.__name__}: shapes do not match (run again with -v for the traceback)" in refusal(err)


def test_every_check_of_arguments_is_a_function_of_panther() -> None:
    modules = [module for name, module in sys.modules.items() if name.startswith("panther.")]
    for check in cli.ARGUMENT_CHECKS:
        owner, _, name = check.rpartition(".")
        holders = [getattr(module, owner, None) if owner else module for module in modules]
        assert any(hasattr(holder, name) for holder in holders), check


# Ends that nobody wants


def test_ctrl_c_ends_with_one_line_and_nothing_half_written(run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    before = sorted(here.glob("*"))
    monkeypatch.setattr(cli, "compress", interrupted)
    code, out, err = run(*MLP)
    assert (code, out) == (cli.INTERRUPTED, "")
    assert "interrupted" in refusal(err)
    assert sorted(here.glob("*")) == before


@pytest.mark.parametrize(
    ("before", "after", "flags", "again"),
    [
        (False, True, [], "again with --resume."),
        (True, True, ["--resume"], "again."),
        (True, False, ["--resume"], "again without --resume."),
        (False, False, [], "again."),
    ],
)
def test_ctrl_c_says_whether_to_resume(
    run, here: Path, monkeypatch: pytest.MonkeyPatch, before: bool, after: bool, flags: list[str], again: str
) -> None:
    file = here / "stopped.ckpt.trials"

    def interrupted(*_: Any, **__: Any) -> None:
        file.touch() if after else file.unlink(missing_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "compress", interrupted)
    file.touch() if before else file.unlink(missing_ok=True)
    code, _, err = run(*MLP, *CALIB, "--checkpoint", "stopped.ckpt", *flags)
    file.unlink(missing_ok=True)
    assert code == cli.INTERRUPTED and refusal(err).endswith(f"Run the same command {again}")


def test_ctrl_c_while_writing_leaves_whole_files_only(run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Result, "export_onnx", interrupted)
    assert run(*MLP, "-o", "stopped")[0] == cli.INTERRUPTED
    names = ["mlp.panther", "mlp.plan.json", "mlp.report.json", "mlp.report.txt"]
    assert sorted(path.name for path in (here / "stopped").iterdir()) == names
    assert json.loads((here / "stopped/mlp.panther/panther.json").read_text())["layers"]


def test_the_unexpected_is_one_line_and_a_traceback_with_v(run, quick: dict[str, Any]) -> None:
    code, _, err = run(*MLP, "-v")
    assert code == cli.UNEXPECTED
    assert "Traceback" in err and err.splitlines()[-1].startswith("error: StoppedError: here")


def test_a_run_leaves_the_import_path_as_it_was(run, quick: dict[str, Any]) -> None:
    before = list(sys.path)
    run(*MLP)
    assert sys.path == before
