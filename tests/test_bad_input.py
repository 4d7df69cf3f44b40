"""What people hand in by mistake or by malice: every message says the way out, and nothing is lost or changed."""

from __future__ import annotations

import json
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import panther
from panther import CalibrationError, CaptureError, ExportError, LoadError, PlanError
from panther.converters import read


class Net(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(16, width), nn.BatchNorm1d(width), nn.Linear(width, 16)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.last(self.norm(self.first(x)).relu())
        return answer


X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(32, 16, generator=generator) for _ in range(count)]


def compress(model: nn.Module, budget: Any = 0.5, **options: Any) -> panther.Result:
    given = {"example_inputs": X, "calib_data": batches(), "progress": False, "verify": False, **options}
    return panther.compress(model, budget, **given)


class Watched:
    """A model, and the assertion that it is as it was."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = Net().train()
        self.model.norm.eval()
        self.model.last.requires_grad_(False)
        self.state = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.modules = dict(self.model.named_modules())

    def assert_unchanged(self) -> None:
        model = self.model
        assert dict(model.named_modules()) == self.modules
        assert list(model.state_dict()) == list(self.state)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, self.state[name], rtol=0, atol=0, equal_nan=True)
        assert model.training and model.first.training and not model.norm.training
        assert model.first.weight.requires_grad and not model.last.weight.requires_grad
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(
            hooks
            for module in model.modules()
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        )
        assert torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled()


@pytest.fixture
def watched() -> Iterator[Watched]:
    held = Watched()
    yield held
    held.assert_unchanged()


# Budgets


@pytest.mark.parametrize(
    ("budget", "error", "words"),
    [
        (0, ValueError, r"budget=0: nothing would remain.*budget=0\.5"),
        (0.0, ValueError, r"nothing would remain"),
        (-0.5, ValueError, r"nothing would remain"),
        (float("nan"), ValueError, r"not a finite number; a fraction KEPT is above 0"),
        (1, ValueError, r"budget=1 can be read two ways: budget=1\.0 keeps everything.*Budget\(params=1\) keeps 1"),
        (1.7, ValueError, r'budget=1\.7 can be read two ways: budget="1\.7%".*Budget\(params=2\)'),
        (
            50,
            ValueError,
            r'budget=50 can be read two ways: budget="50%" keeps 50 percent; panther\.Budget\(params=50\)',
        ),
        (
            "abc",
            ValueError,
            r'budget=\'abc\' is neither a fraction nor a percentage; write budget=0\.5 or budget="50%"',
        ),
        ("0%", ValueError, r"a percentage is what is KEPT, above 0 and up to 100"),
        ("150%", ValueError, r"a percentage is what is KEPT, above 0 and up to 100"),
        (None, TypeError, r"budget=None \(NoneType\): expected the fraction of weights to keep"),
        (True, TypeError, r"budget=True \(bool\): expected the fraction"),
        ({}, ValueError, r"holds nothing: give at least one of params, flops, size_mb"),
        ({"params": 1.7}, ValueError, r"a float is the fraction KEPT.*an int is an absolute count"),
        ({"params": 0}, ValueError, r"an int is an absolute count and must be at least 1"),
        ({"size_mb": -3}, ValueError, r"expected megabytes"),
        ({"params": 0.5, "of": "layers"}, ValueError, r"expected 'sketchable' or 'model'"),
    ],
)
def test_budgets_that_mean_nothing_or_two_things(
    watched: Watched, budget: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        compress(watched.model, budget)


@pytest.mark.parametrize(
    ("seed", "error"), [(-1, ValueError), (2**63, ValueError), (1.5, TypeError), (True, TypeError), ("3", TypeError)]
)
def test_a_seed_that_no_generator_takes_is_refused_before_any_work(
    watched: Watched, seed: Any, error: type[Exception]
) -> None:
    words = r"expected an integer from 0 to 2\*\*63 - 1"
    with pytest.raises(error, match=words):
        compress(watched.model, seed=seed, example_inputs=None)
    with pytest.raises(error, match=words):
        panther.heal(watched.model, Net(), batches(), X, seed=seed)


# Calibration data


@pytest.mark.parametrize(
    "data", [[], (), iter(()), DataLoader([], batch_size=2)], ids=["list", "tuple", "generator", "loader"]
)  # type: ignore[arg-type]
def test_an_empty_loader(watched: Watched, data: Any) -> None:
    with pytest.raises(CalibrationError, match=r"calib_data has no batches.*at least one batch"):
        compress(watched.model, calib_data=data)


@pytest.mark.parametrize("bad", [torch.randn(32, 17), torch.randn(16), torch.zeros(32, 16, dtype=torch.long)])
def test_batches_of_the_wrong_shape_or_kind(watched: Watched, bad: Tensor) -> None:
    data = [*batches(2), bad, *batches(2)]
    with pytest.raises(
        CalibrationError, match=r"calibration batch 2 \(shapes \(.*\)\) does not run: .*like example_inputs"
    ):
        compress(watched.model, calib_data=data)


def test_batches_with_too_few_parts(watched: Watched) -> None:
    with pytest.raises(
        CalibrationError, match=r"a calibration batch has 1 parts, the example inputs 2.*same arguments"
    ):
        panther.compress(TwoInputs(), 0.5, example_inputs=(X, X), calib_data=[(X,), (X,)], progress=False, verify=False)


class TwoInputs(Net):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + y)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_calibration_data_that_is_not_finite(watched: Watched, value: float) -> None:
    data = batches()
    data[1][3, 4] = value
    with pytest.raises(CalibrationError, match=r"batch 1 holds 1 values .*NaN or infinite.*clean the data, or leave"):
        compress(watched.model, calib_data=data)


@pytest.mark.parametrize("error", [OSError("the share is not mounted"), TypeError("cannot cast row 7")])
def test_a_loader_that_fails_by_itself_is_not_blamed_on_its_kind(watched: Watched, error: Exception) -> None:
    def broken() -> Iterator[Tensor]:
        yield from batches(1)
        raise error

    with pytest.raises(type(error), match=str(error)):
        compress(watched.model, calib_data=broken())


# Models


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite(value: float) -> None:
    held = Watched()
    with torch.no_grad():
        held.model.first.weight[2, 3] = held.state["first.weight"][2, 3] = value
    with pytest.raises(
        ValueError, match=r"weight of layer 'first' holds 1 values .*Reload it, or .*exclude=\['first'\]"
    ):
        compress(held.model)
    held.assert_unchanged()


def test_a_value_elsewhere_that_is_not_finite_is_found_at_the_layer_behind_it() -> None:
    held = Watched()
    with torch.no_grad():
        held.model.norm.weight[0] = held.state["norm.weight"][0] = float("nan")
    with pytest.raises(CalibrationError, match=r"values at layer 'last' are not finite.*check its outputs.*exclude"):
        compress(held.model)
    held.assert_unchanged()


def test_excluding_the_damaged_layer_is_a_way_out() -> None:
    model = nn.ModuleDict({"good": nn.Linear(16, 16), "bad": nn.Linear(16, 16)})
    with torch.no_grad():
        model["bad"].weight[0, 0] = float("inf")

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.parts["good"](x), self.parts["bad"](x).detach() * 0

    result = compress(Both(), exclude=["parts.bad"])
    assert [c.layer for c in result.plan.sketched] == ["parts.good"]


def test_a_model_without_dense_layers() -> None:
    model = nn.Sequential(nn.BatchNorm1d(16), nn.ReLU())
    with pytest.raises(CaptureError, match=r"Sequential has no Linear or Conv layer.*nothing to compress"):
        compress(model)


def test_a_model_whose_dense_layers_cannot_be_sketched_says_why() -> None:
    model = nn.Sequential(nn.Unflatten(1, (16, 1)), nn.Conv1d(16, 16, 1, groups=16))
    with pytest.raises(
        CaptureError, match=r"none of the 1 dense layers of Sequential can be sketched \(1: .*depthwise"
    ):
        compress(model)


def test_a_model_that_does_not_run_on_the_example_inputs(watched: Watched) -> None:
    with pytest.raises(CaptureError, match="example"):
        compress(watched.model, example_inputs=torch.randn(2, 99))


@pytest.mark.parametrize("heal", ["none", "refit"])
def test_layers_between_which_hardly_anything_is_left(heal: str) -> None:
    """Squares of such numbers are zero in float32, and those of their means are not in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)).eval()
    with torch.no_grad():
        model[0].weight.mul_(1e-24)
        model[0].bias.mul_(1e-24)
    result = compress(model, heal=heal)
    assert result.budget_met and torch.allclose(result.model(X), model(X), atol=1e-5)


def test_a_dead_layer_is_compressed_like_the_others() -> None:
    class Dead(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 0)

    torch.manual_seed(0)
    model = Dead().eval()
    result = compress(model)
    assert result.budget_met and "first" in {c.layer for c in result.plan.choices}
    with torch.no_grad():
        torch.testing.assert_close(result.model(X), model(X), rtol=1e-4, atol=1e-5)


# Files


class Bomb:
    """A pickle that would leave a trace if it were loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


def truncated(path: Path) -> None:
    torch.save(Net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:700])


def random_bytes(path: Path) -> None:
    path.write_bytes(torch.randint(0, 256, (4096,), dtype=torch.uint8).numpy().tobytes())


def random_bytes_in_a_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + bytes(range(256)))


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (truncated, "download it again"),
        (random_bytes, "no format that panther reads|torch.save"),
        (random_bytes_in_a_zip, "download it again"),
    ],
)
def test_a_damaged_pt_file(tmp_path: Path, write: Callable[[Path], None], words: str) -> None:
    path = tmp_path / "model.pt"
    write(path)
    with pytest.raises(LoadError, match=words):
        read(path, model=Net)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_bomb_is_named_and_never_loaded(tmp_path: Path, *, zipped: bool) -> None:
    path, trace = tmp_path / "model.pt", tmp_path / "trace"
    torch.save({"state_dict": Bomb(trace)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(LoadError, match=r"would run code: it imports .*pathlib.*--trust-pickle.*state_dict"):
        read(path, model=Net)
    assert not trace.exists()


def test_a_bare_pickle_is_not_loaded_either(tmp_path: Path) -> None:
    path, trace = tmp_path / "model.pt", tmp_path / "trace"
    path.write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(LoadError):
        read(path, model=Net)
    assert not trace.exists()


# Plans


def test_a_plan_of_another_architecture(watched: Watched) -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.firsts = nn.Linear(16, 32)

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.firsts(x)
            return answer

    plan = compress(Renamed()).plan
    with pytest.raises(PlanError, match=r"'firsts', which this model does not have; nearest: first.*plan=None"):
        compress(watched.model, plan=plan)


def test_a_plan_for_other_shapes_under_the_same_names(watched: Watched) -> None:
    plan = compress(Net(48)).plan
    with pytest.raises(PlanError, match=r"another architecture.*shapes do not.*plan=None"):
        compress(watched.model, plan=plan)


def test_a_plan_that_asks_for_a_rank_that_does_not_pay(watched: Watched) -> None:
    data = json.loads(compress(watched.model).plan.to_json())
    data["choices"] = [{**data["choices"][0], "scheme": "linear", "ranks": [1000]}]
    with pytest.raises(
        PlanError, match=r"'first' scheme 'linear' at ranks \(1000,\) in packing '\w+', which would not make it smaller"
    ):
        compress(watched.model, plan=json.dumps(data))


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", '{"panther_plan": 1}', '{"panther_plan": 99, "choices": []}'),
        '{"panther_plan": 1, "choices": [], "budget": 3}',
    ],
)
def test_a_plan_that_is_none(watched: Watched, text: str) -> None:
    with pytest.raises(PlanError, match=r"plan"):
        compress(watched.model, plan=text)


def test_a_plan_for_a_layer_that_has_to_stay_dense(watched: Watched) -> None:
    plan = compress(watched.model).plan
    assert "first" in {c.layer for c in plan.sketched}
    with pytest.raises(PlanError, match=r"'first', which stays dense in this model: excluded"):
        compress(watched.model, plan=plan, exclude=["first"])


# Compressed models on disk


def saved(folder: Path) -> tuple[Path, dict[str, Any]]:
    place = compress(Net().eval()).save(folder)
    return place, json.loads((place / "panther.json").read_text())


@pytest.mark.parametrize("kind", ["os.system", "builtins.eval", "panther.nn.SKLinear", "__import__('os')", None, ["x"]])
def test_a_panther_json_that_names_code_imports_nothing(tmp_path: Path, kind: Any) -> None:
    folder, manifest = saved(tmp_path / "m")
    name = next(iter(manifest["layers"]))
    manifest["layers"][name]["type"] = kind
    (folder / "panther.json").write_text(json.dumps(manifest))
    with pytest.raises(LoadError, match=r"panther builds SKLinear.*imports nothing that a file names"):
        panther.load(folder, model=Net)


def test_the_class_that_panther_json_names_is_never_imported(tmp_path: Path) -> None:
    folder, manifest = saved(tmp_path / "m")
    manifest["model_class"] = "os.system"
    (folder / "panther.json").write_text(json.dumps(manifest))
    with pytest.raises(LoadError, match=r"weights of os\.system, not its code.*model=factory_or_instance"):
        panther.load(folder)
    assert isinstance(panther.load(folder, model=Net), Net)


def test_a_panther_json_for_more_memory_than_there_is(tmp_path: Path) -> None:
    folder, manifest = saved(tmp_path / "m")
    name = next(iter(manifest["layers"]))
    manifest["layers"][name].update(in_features=2**40, out_features=2**40, ranks=[2**39])
    (folder / "panther.json").write_text(json.dumps(manifest))
    with pytest.raises(LoadError, match=rf"layer '{name}'"):
        panther.load(folder, model=Net)


def test_weights_of_another_model_under_a_good_manifest(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "m")
    save_file({"other": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(LoadError, match=r"does not fit Net.*architecture that was compressed"):
        panther.load(folder, model=Net)


def test_an_output_folder_that_cannot_be_written_loses_nothing(tmp_path: Path) -> None:
    result = compress(Net().eval())
    (tmp_path / "file").write_text("precious")
    for place in (tmp_path / "file" / "below", tmp_path / "file"):
        with pytest.raises(ExportError, match=r"file"):
            result.save(place)
    assert (tmp_path / "file").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
    assert result.save(tmp_path / "elsewhere").is_dir()  # the result is still there to be saved


# Ctrl-C


class Interrupting(Dataset[Tensor]):
    """Samples for a loader; the user presses Ctrl-C when it is read for the `after`-th time."""

    def __init__(self, after: int) -> None:
        self.after, self.reads = after, 0

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Tensor:
        self.reads += 1
        if self.reads > self.after:
            raise KeyboardInterrupt
        return X[index % 8]


@pytest.mark.parametrize("after", [0, 3, 17, 19, 22, 30, 40])
def test_ctrl_c_in_the_middle_leaves_the_model_as_it_was(watched: Watched, after: int) -> None:
    data = Interrupting(after)
    with pytest.raises(KeyboardInterrupt):
        compress(watched.model, calib_data=DataLoader(data, batch_size=4), inplace=True)
    assert data.reads == after + 1


STAGES = (
    *(("compress", stage) for stage in ("capture", "measure", "decompose", "check")),
    *(("prepared", stage) for stage in ("importance", "replace", "heal", "pack")),
    ("solve", "allocate"),
)


@pytest.mark.parametrize(("module", "stage"), STAGES, ids=[stage for _, stage in STAGES])
def test_ctrl_c_in_any_stage_leaves_the_model_as_it_was(
    watched: Watched, module: str, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[f"panther.{module}"], stage, interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(watched.model, inplace=True)


@pytest.mark.parametrize("at", [1, 2, 6, 14])
def test_ctrl_c_in_the_middle_of_a_forward_leaves_the_model_as_it_was(watched: Watched, at: int) -> None:
    calls = 0

    def interrupted(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt

    handle = watched.model.norm.register_forward_hook(interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            compress(watched.model, inplace=True)
    finally:
        handle.remove()


def test_a_metric_that_fails_does_not_lose_the_model(watched: Watched) -> None:
    def broken(_model: nn.Module) -> float:
        raise RuntimeError("no labels here")

    result = compress(watched.model, eval_fn=broken, verify=True)
    assert result.budget_met and any("no labels here" in note for note in result.report.notes)
