"""Healing as a whole: better or as it was, whatever goes wrong, and a killed run ends as if nothing had happened."""

from __future__ import annotations

import copy
import errno
import importlib
import json
import math
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import panther
from panther.errors import LoadError
from panther.healers.checkpoint import Checkpoint
from panther.nn import SKETCHED, SketchedLayer, SKLinear
from panther.nn.surgery import with_layers
from panther.spec import Choice, Heal, Healed, LayerSpec

module_of_heal: Any = importlib.import_module("panther.heal")  # the package has the function by this name

ROOT = Path(__file__).parents[1]
LONG = 1e6  # seconds
MODES = ("refit", "blocks", "distill", "auto")
STRENGTHS = torch.linspace(2, 0.1, 12)  # of the inputs' features
pytestmark = pytest.mark.filterwarnings("ignore:SK.*would be smaller:UserWarning")  # layers this small hardly pay


class Block(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = x + self.down(self.up(self.norm(x)).relu())
        return answer


class Net(nn.Module):
    """Two blocks and a head, the singular values of whose weights fall as those of trained ones do."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.out = nn.Linear(12, 5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                steepen(module)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        answer: Tensor = self.out(x)
        return answer


@torch.no_grad()
def steepen(layer: nn.Linear) -> None:
    u, s, vh = torch.linalg.svd(layer.weight, full_matrices=False)
    layer.weight.copy_(2 * (u * torch.arange(1.0, len(s) + 1) ** -0.7) @ vh)


def data(count: int = 12, size: int = 16, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 12, generator=generator) * STRENGTHS for _ in range(count)]


NAMES = ("layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down")


def sketched(model: nn.Module, names: Sequence[str] = NAMES, rank: int = 3) -> nn.Module:
    dense = {name: model.get_submodule(name) for name in names}
    return with_layers(model, {n: SKETCHED[type(layer)].from_dense(layer, rank=rank) for n, layer in dense.items()})


def specs(model: nn.Module, names: Sequence[str] = NAMES) -> list[LayerSpec]:
    """What capture would say of layers that run once."""
    return [spec(name, model.get_submodule(name)) for name in names]


def spec(name: str, layer: Any) -> LayerSpec:
    if isinstance(layer, nn.Linear):
        return LayerSpec(name, "linear", layer.in_features, layer.out_features, 1)
    sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return LayerSpec(name, "conv2d", layer.in_channels, layer.out_channels, 1, 1, *sizes)


def heal(teacher: nn.Module, student: nn.Module, given: Sequence[Any], mode: str = "auto", **options: Any) -> Healed:
    settings = Heal(
        mode,
        time_limit=options.pop("time_limit", LONG),
        steps=options.pop("steps", 48),
        learning_rate=options.pop("learning_rate", 0.005),
    )
    layers = options.pop("layers", None)
    layers = specs(teacher) if layers is None else layers
    return panther.heal(teacher, student, list(given), given[0], settings, layers=layers, **options)


@torch.no_grad()
def error(teacher: nn.Module, student: nn.Module, given: Sequence[Any]) -> float:
    return sum(float((teacher(x) - student(x)).square().sum()) for x in given)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(value, other[name]) for name, value in one.items())


def hooks_of(*models: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for model in models for m in model.modules())


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


# Better


@pytest.mark.parametrize("mode", MODES)
def test_each_way_of_healing_brings_answers_to_unseen_inputs_nearer(mode: str) -> None:
    teacher, given, unseen = Net(), data(), data(4, seed=2)
    student = sketched(teacher)
    before, dense = error(teacher, student, unseen), bits(teacher)
    done = heal(teacher, student, given, mode, steps=200)
    assert done.after < done.before and error(teacher, student, unseen) < before
    assert [stage for _, stage, _ in done.history][:2] == ["before", "refit"]
    assert {stage for _, stage, _ in done.history} == {"before", "refit", *stages_of(mode)}
    assert (done.steps > 0) == bool(stages_of(mode)) and done.steps <= 200
    assert same(bits(teacher), dense) and hooks_of(teacher, student) == 0


def stages_of(mode: str) -> list[str]:
    return {"refit": [], "blocks": ["blocks"], "distill": ["distill"], "auto": ["blocks", "distill"]}[mode]


def test_the_history_has_times_that_rise_and_figures_that_never_do() -> None:
    done = heal(teacher := Net(), sketched(teacher), data())
    seconds, _, figures = zip(*done.history, strict=True)
    assert list(seconds) == sorted(seconds) and list(figures) == sorted(figures, reverse=True)
    assert (done.before, done.after) == (figures[0], figures[-1]) and done.seconds >= seconds[-1]


def test_none_does_nothing() -> None:
    teacher, given = Net(), data()
    student = sketched(teacher)
    before = bits(student)
    done = heal(teacher, student, given, "none")
    assert same(bits(student), before) and done.steps == 0 and done.after == done.before > 0 and not done.notes


@pytest.mark.parametrize("mode", MODES)
def test_the_same_seed_gives_the_same_bits(mode: str) -> None:
    teacher, given = Net(), data()
    students = [sketched(teacher) for _ in range(2)]
    for student in students:
        heal(teacher, student, given, mode)
    assert same(bits(students[0]), bits(students[1]))


def test_terms_are_in_the_order_of_importance_again() -> None:
    teacher, given = Net(), data()
    student = sketched(teacher, rank=6)
    heal(teacher, student, given, "distill")
    for name in NAMES:
        layer = student.get_submodule(name)
        assert isinstance(layer, SKLinear)
        norms = layer.up.detach().norm(dim=0)
        assert float(norms[0]) == float(norms.max())


def test_a_time_limit_of_nothing_leaves_the_closed_form() -> None:
    teacher, given = Net(), data()
    students = [sketched(teacher) for _ in range(2)]
    done = [
        heal(teacher, student, given, mode, time_limit=1e-9)
        for student, mode in zip(students, ("auto", "refit"), strict=True)
    ]
    assert done[0].steps == 0 and done[0].after == done[1].after and same(bits(students[0]), bits(students[1]))


@pytest.mark.parametrize(("mode", "steps"), [("auto", 1), ("auto", 5), ("blocks", 1), ("distill", 2)])
def test_no_more_steps_are_taken_than_allowed(mode: str, steps: int) -> None:
    torch.manual_seed(0)
    teacher, given = Net(), data()
    assert heal(teacher, sketched(teacher), given, mode, steps=steps).steps == steps


@pytest.mark.parametrize("shared", ["model", "layer", "memory", "statistics"])
def test_a_student_that_shares_with_the_teacher_is_refused_and_nothing_is_trained(shared: str) -> None:
    torch.manual_seed(0)
    teacher, given = Net(), data()
    teacher.norm = nn.BatchNorm1d(3)
    student: Any = teacher if shared == "model" else sketched(teacher)
    if shared == "layer":
        student.layers[0].norm = teacher.layers[0].norm
    elif shared == "memory":
        student.layers[0].norm.weight = nn.Parameter(teacher.layers[0].norm.weight.detach())
    elif shared == "statistics":
        student.norm.running_mean = teacher.norm.running_mean
    before = bits(teacher)
    with pytest.raises(ValueError, match="the teacher itself" if shared == "model" else r"shares . tensors.*deepcopy"):
        heal(teacher, student, given)
    assert same(bits(teacher), before)


def test_constants_may_be_shared_with_the_teacher() -> None:
    torch.manual_seed(0)
    teacher, given = Net(), data()
    teacher.register_buffer("table", torch.ones(3))
    student = sketched(teacher)
    student.register_buffer("table", teacher.table)
    assert heal(teacher, student, given, "distill", steps=2).steps == 2
    assert torch.equal(teacher.table, torch.ones(3))


def test_a_student_that_panther_did_not_make_is_distilled() -> None:
    """Such as one that another tool has pruned: no sketched layer, other sizes."""
    teacher, given = Net(), data()
    student = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))
    done = heal(teacher, student, given, "auto", layers=(), steps=300)
    assert done.after < 0.8 * done.before and not done.notes
    same_shape = copy.deepcopy(teacher)
    with torch.no_grad():
        same_shape.layers[0].up.weight.mul_(0.5)
    assert heal(teacher, same_shape, given, "distill", layers=()).after < 0.1


def test_a_packed_student_is_distilled() -> None:
    teacher, given = Net(), data()
    small = panther.compress(
        teacher, 0.6, example_inputs=given[0][:2], calib_data=given, heal="none", progress=False, verify=False
    ).model
    before = error(teacher, small, given)
    done = heal(teacher, small, given, "auto", layers=())
    assert done.after < done.before and error(teacher, small, given) < before


# Never worse


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("rate", [1e3, 1e20])
def test_a_learning_rate_that_diverges_is_caught_and_undone(mode: str, rate: float) -> None:
    teacher, given = Net(), data()
    students = [sketched(teacher) for _ in range(2)]
    closed = heal(teacher, students[1], given, "refit")
    done = heal(teacher, students[0], given, mode, learning_rate=rate)
    assert done.after <= closed.after
    assert all(bool(p.isfinite().all()) for p in students[0].parameters())


def test_what_makes_the_answers_worse_is_undone_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(_teacher: nn.Module, student: nn.Module, *_: Any, **__: Any) -> None:
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(1.5)

    teacher, given = Net(), data()
    students = [sketched(teacher) for _ in range(2)]
    heal(teacher, students[1], given, "refit")
    monkeypatch.setattr(module_of_heal, "distill", spoil)
    done = heal(teacher, students[0], given, "distill")
    assert any(note.startswith("distill made held-out answers worse (") for note in done.notes)
    assert same(bits(students[0]), bits(students[1]))


@pytest.mark.parametrize("error_", [RuntimeError, ValueError, IndexError, MemoryError])
def test_what_fails_is_undone_and_said_and_the_rest_goes_on(
    error_: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_teacher: nn.Module, student: nn.Module, *_: Any, **__: Any) -> None:
        with torch.no_grad():
            next(student.parameters()).fill_(math.nan)
        raise error_("no such thing\nand more")

    teacher, given = Net(), data()
    student = sketched(teacher)
    monkeypatch.setattr(module_of_heal, "heal_blocks", fail)
    done = heal(teacher, student, given, "auto")
    assert f"blocks failed and was undone: {error_.__name__}: no such thing" in done.notes
    assert done.after < done.before and done.steps > 0


def spoilt(monkeypatch: pytest.MonkeyPatch, names: Sequence[str], by: float = 30.0) -> None:
    """The refit gives these layers factors that are wrong."""
    real = module_of_heal.refit

    def refit(teacher: nn.Module, student: nn.Module, *args: Any, **options: Any) -> Any:
        done = real(teacher, student, *args, **options)
        for name in names:
            student.get_submodule(name)._parameters["up"].data.mul_(by)
        return replace(done, accepted=tuple(dict.fromkeys((*done.accepted, *names))))

    monkeypatch.setattr(module_of_heal, "refit", refit)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_refit_that_one_layer_spoils_keeps_the_others(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, given, at_fault = Net(), data(), "layers.1.up"
    student = sketched(teacher)
    before = {name: student.get_submodule(name).weight.clone() for name in NAMES}
    spoilt(monkeypatch, [at_fault])
    monkeypatch.setattr(module_of_heal, "MOST_GROUPS", groups)
    done = heal(teacher, student, given, "refit")
    assert done.after < done.before
    # Terms are put in another order at the end, which changes no product.
    back = [name for name in NAMES if torch.allclose(before[name], student.get_submodule(name).weight, atol=1e-5)]
    assert at_fault in back and len(back) < len(NAMES)
    said = f"{at_fault} took the old factors back"
    assert any("refit as a whole made held-out answers worse" in note and said in note for note in done.notes)
    assert not any("undone" in note for note in done.notes)


def test_a_refit_of_which_no_part_helps_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, given = Net(), data()
    student = sketched(teacher)
    before = student(given[0])
    spoilt(monkeypatch, NAMES, math.nan)
    done = heal(teacher, student, given, "refit")
    assert done.after == done.before
    torch.testing.assert_close(student(given[0]), before)
    assert any(note.startswith("refit made held-out answers worse") and "undone" in note for note in done.notes)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("size", [1, 4])
def test_one_sample_and_batches_of_one_are_enough(size: int, count: int) -> None:
    teacher, given = Net(), data(count, size)
    student = sketched(teacher)
    done = heal(teacher, student, given, "auto")
    assert done.after <= done.before and all(bool(p.isfinite().all()) for p in student.parameters())


@pytest.mark.parametrize("mode", ["blocks", "distill"])
def test_an_empty_batch_is_left_out(mode: str) -> None:
    torch.manual_seed(0)
    teacher, given = Net(), data()
    done = heal(teacher, student := sketched(teacher), [given[0], given[0][:0], *given[1:]], mode, layers=[])
    assert done.after < done.before and not any("failed" in note for note in done.notes)
    assert error(teacher, student, data(4, seed=9)) < error(teacher, sketched(teacher), data(4, seed=9))


def test_students_that_answer_with_nan_are_left_as_they_are() -> None:
    teacher, given = Net(), data()
    student = sketched(teacher)
    with torch.no_grad():
        student.layers[0].up.bias[0] = math.inf
    before = bits(student)
    done = heal(teacher, student, given)
    assert same(bits(student), before) and done.notes == (
        "nothing was healed: the answers to held-out inputs are not finite, or there are none",
    )


class Broken(Net):
    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layers[0].up, SketchedLayer) and len(x) == 3:
            raise IndexError("three")
        return super().forward(x)


def test_a_student_that_does_not_run_on_a_held_out_batch_is_left_as_it_is() -> None:
    teacher, given = Broken(), [*data(5), *data(1, 3)]
    student = sketched(teacher)
    before = bits(student)
    done = heal(teacher, student, given)
    assert same(bits(student), before)
    assert done.notes[0] == "the compressed model does not run on a held-out batch: IndexError: three"


class Chooses(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(-1)


def test_answers_that_are_no_numbers_cannot_be_healed() -> None:
    teacher, given = Chooses(), data()
    student = sketched(teacher)
    before = bits(student)
    done = heal(teacher, student, given)
    assert same(bits(student), before) and len(done.notes) == 1 and "no floating-point numbers" in done.notes[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mode", ["refit", "auto"])
def test_other_dtypes_are_healed_and_stay_what_they_are(dtype: torch.dtype, mode: str) -> None:
    teacher, given = Net().to(dtype), [x.to(dtype) for x in data()]
    student = sketched(teacher)
    before = error(teacher, student, given)
    done = heal(teacher, student, given, mode)
    assert done.after < done.before and error(teacher, student, given) < before
    assert {p.dtype for p in student.parameters()} == {dtype}


# What is left behind


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Dropout(0.5)
        self.last = nn.Conv2d(16, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.last(self.drop(self.norm(self.conv(x)).relu_())).mean((2, 3))
        return answer


def test_a_model_in_training_mode_comes_back_in_it_and_frozen_parameters_are_healed_and_stay_frozen() -> None:
    teacher = Norms().train()
    with torch.no_grad():
        for _ in range(20):
            teacher(torch.randn(8, 3, 8, 8))
    teacher.norm.eval()
    given = [torch.randn(8, 3, 8, 8) for _ in range(10)]
    student = sketched(teacher, ["conv", "last"], rank=4)
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    dense, before = bits(teacher), bits(student)
    layers = specs(teacher, ["conv", "last"])
    done = heal(teacher, student, given, "auto", layers=layers, relu_after={"conv": "norm"})
    assert done.after < done.before and same(bits(teacher), dense)
    for model in (teacher, student):
        assert [m.training for m in (model, model.conv, model.norm, model.drop)] == [True, True, False, True]
    assert not any(p.requires_grad or p.grad is not None for p in student.parameters())
    assert not torch.equal(student.last.down, before["last.down"])
    assert torch.equal(student.norm.num_batches_tracked, before["norm.num_batches_tracked"])
    assert hooks_of(teacher, student) == 0


class Paths(Net):
    """Small batches skip the second block."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        answer: Tensor = self.out(self.layers[1](x) if len(x) > 8 else x)
        return answer


def test_batches_that_take_different_paths_are_said_and_distilled_all_the_same() -> None:
    teacher, given = Paths(), [*data(4, 16), *data(4, 4), *data(2, 16)]
    student = sketched(teacher)
    done = heal(teacher, student, given, "auto", steps=200)
    ended = [note for note in done.notes if "ended early" in note]
    assert [note.split()[0] for note in ended] == ["refit", "blocks"] and "through different layers" in ended[0]
    assert done.after < done.before and done.history[-1][1] == "distill" and hooks_of(teacher, student) == 0


class Recurs(Net):
    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.out(self.layers[1](self.layers[0](self.layers[0](x))))
        return answer


def test_a_layer_that_runs_twice_is_said_and_distilled_all_the_same() -> None:
    teacher, given = Recurs(), data()
    student = sketched(teacher)
    before = student.layers[0].up.down.clone()
    layers = [replace(spec, calls=2) if "layers.0" in spec.name else spec for spec in specs(teacher)]
    done = heal(teacher, student, given, "auto", layers=layers, steps=200)
    assert any(
        note.startswith("refit left 2 of 4 layers as they were (layers.0.up: it runs more") for note in done.notes
    )
    assert any(note.startswith("all of the time went to distillation") for note in done.notes)
    assert done.after < done.before and not torch.equal(student.layers[0].up.down, before)


class Shared(nn.Module):
    """One block for four steps, and a layer before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layers, self.out = nn.Linear(12, 12), nn.ModuleList([Block()]), nn.Linear(12, 5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                steepen(module)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(4):
            x = self.layers[0](x)
        answer: Tensor = self.out(x)
        return answer


def test_where_blocks_can_train_little_all_time_goes_to_distillation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, given, names = Shared(), data(), ("first", "layers.0.up", "layers.0.down")
    whole, first, second = (sketched(teacher, names) for _ in range(3))
    layers = [replace(one, calls=1 if one.name == "first" else 4) for one in specs(teacher, names)]
    done = heal(teacher, whole, given, layers=layers)
    assert {stage for _, stage, _ in done.history} == {"before", "refit", "distill"}
    assert done.steps == 48 and done.after < done.before
    assert [note for note in done.notes if "all of the time went to distillation: blocks that run once hold" in note]
    with monkeypatch.context() as patch:
        killed(patch, 3)
        with pytest.raises(KilledError):
            heal(teacher, first, given, layers=layers, checkpoint=tmp_path / "run")
    resumed = heal(teacher, second, given, layers=layers, checkpoint=tmp_path / "run")
    assert same(bits(whole), bits(second)) and resumed.notes == done.notes
    blocks = heal(teacher, sketched(teacher, names), given, "blocks", layers=layers)
    assert {stage for _, stage, _ in blocks.history} == {"before", "refit", "blocks"}


def test_a_block_that_runs_twice_is_left_and_said() -> None:
    teacher = Recurs()
    done = heal(teacher, sketched(teacher), data(), "blocks", layers=specs(teacher, NAMES[2:]))
    assert any(note.startswith("blocks left layers.0 as they were") for note in done.notes)


def test_more_data_than_memory_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_of_heal, "HELD_BYTES", 3 * data(1)[0].numel() * 4)
    teacher, given = Net(), data()
    student = sketched(teacher)
    done = heal(teacher, student, [*given])
    assert done.notes[0] == "blocks were trained on 1 of 11 batches: more at one depth would not fit in memory"
    assert done.after <= done.before
    loader = torch.utils.data.DataLoader(torch.cat(given), batch_size=len(given[0]))  # which need not be in memory
    settings = Heal("auto", steps=8, time_limit=LONG)
    done = panther.heal(teacher, sketched(teacher), loader, given[0], settings, layers=specs(teacher))
    assert done.notes[0] == "healing saw 3 of 11 batches: more would not fit in memory" and done.after <= done.before


# Interruptions


def interrupting(monkeypatch: pytest.MonkeyPatch, stage: str, after: int) -> None:
    """Ctrl-C at a step of one stage."""
    training = importlib.import_module("panther.healers.training")
    refitting = importlib.import_module("panther.healers.refit")
    calls: list[int] = []

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == after:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return step

    owner, name = (refitting, "_refit_layer") if stage == "refit" else (training, "_step")
    monkeypatch.setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize(
    ("mode", "stage", "after"), [("refit", "refit", 3), ("blocks", "blocks", 30), ("distill", "distill", 30)]
)
def test_ctrl_c_keeps_the_best_so_far_and_the_checkpoint_and_leaves_nothing_behind(
    mode: str, stage: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, given = Net().train(), data()
    student, whole = sketched(teacher).train(), sketched(teacher).train()
    heal(teacher, whole, given, mode)
    with monkeypatch.context() as patch:
        interrupting(patch, stage, after)
        done = heal(teacher, student, given, mode, checkpoint=tmp_path / "run")
    assert f"{stage}: interrupted; the best state so far was kept" in done.notes
    assert done.after < done.before and done.history[-1][1] == stage
    assert (tmp_path / "run").exists() == (mode != "refit")  # before that there was nothing to save
    assert hooks_of(teacher, student) == 0 and teacher.training and student.training
    assert all(p.requires_grad and p.grad is None for p in student.parameters())
    again = sketched(teacher)
    resumed = heal(teacher, again, given, mode, checkpoint=tmp_path / "run")
    assert same(bits(again), bits(whole)) and not (tmp_path / "run").exists()
    assert not any("interrupted" in note for note in resumed.notes)


@pytest.mark.parametrize("mode", ["refit", "distill"])
def test_ctrl_c_while_a_stage_is_judged_keeps_what_was_judged_before(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    teacher, given = Net(), data()
    student = sketched(teacher)
    before, real, calls = bits(student), module_of_heal._Healer.figure, list[int]()

    def figure(self: Any) -> float:
        calls.append(1)
        if len(calls) == 3 or (mode == "refit" and len(calls) == 2):
            raise KeyboardInterrupt
        return float(real(self))

    monkeypatch.setattr(module_of_heal._Healer, "figure", figure)
    done = heal(teacher, student, given, mode, layers=[], checkpoint=tmp_path / "run")
    assert any("interrupted while it was judged" in note for note in done.notes)
    assert same(bits(student), before) and done.after == done.before


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), RuntimeError("this batch is odd")])
def test_what_ends_the_ordering_of_terms_leaves_the_healed_student(
    problem: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    teacher, given = Net(), data()
    plain, student = sketched(teacher), sketched(teacher)

    def raising(student: nn.Module, calls: Any) -> None:
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(1)
        raise problem

    monkeypatch.setattr(module_of_heal, "reorder", lambda *_: [])
    wanted = heal(teacher, plain, given, "distill")
    monkeypatch.setattr(module_of_heal, "reorder", raising)
    done = heal(teacher, student, given, "distill")
    assert same(bits(student), bits(plain)) and done.after == wanted.after < done.before
    assert any("keep their order" in note for note in done.notes)


def test_the_figure_is_that_of_the_student_with_its_terms_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    teacher, given = Net(), data()
    student, real = sketched(teacher), module_of_heal.reorder

    def worse(student: nn.Module, calls: Any) -> Any:
        done = real(student, calls)
        with torch.no_grad():
            student.out.bias.add_(1e-4)
        return done

    monkeypatch.setattr(module_of_heal, "reorder", worse)
    done = heal(teacher, student, given, "distill")
    again = heal(teacher, student, given, "none")
    assert done.after == pytest.approx(again.before, rel=1e-6)


def test_after_ctrl_c_no_further_stage_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupting(monkeypatch, "blocks", 10)
    done = heal(teacher := Net(), sketched(teacher), data(), "auto")
    assert {stage for _, stage, _ in done.history} == {"before", "refit", "blocks"}


# Checkpoints


class KilledError(BaseException):
    """Nothing in panther catches it."""


def killed(monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    """The run ends right after this many saves."""
    save, made = Checkpoint.save, []

    def counted(self: Checkpoint, *args: Any) -> None:
        save(self, *args)
        made.append(1)
        if len(made) == saves:
            raise KilledError

    monkeypatch.setattr(Checkpoint, "save", counted)


@pytest.mark.parametrize("saves", [1, 2, 3, 4, 6, 11])
def test_a_run_that_ended_after_any_save_goes_on_to_the_same_bits(
    saves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, given = Net(), data()
    whole, first, second = (sketched(teacher) for _ in range(3))
    done = heal(teacher, whole, given)
    with monkeypatch.context() as patch:
        killed(patch, saves)
        with pytest.raises(KilledError):
            heal(teacher, first, given, checkpoint=tmp_path / "run")
    resumed = heal(teacher, second, given, checkpoint=tmp_path / "run")
    assert same(bits(second), bits(whole)) and not list(tmp_path.iterdir())
    assert (resumed.before, resumed.after, resumed.steps) == (done.before, done.after, done.steps)
    assert [row[1:] for row in resumed.history] == [row[1:] for row in done.history] and resumed.notes == done.notes


def test_blocks_that_a_whole_run_undoes_are_undone_by_one_that_goes_on_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are judged by what there was before them, not by what the killed run left."""
    teacher, given = Net(), data()
    real = module_of_heal.heal_blocks

    def spoiling(dense: nn.Module, student: nn.Module, *args: Any, **options: Any) -> Any:
        found = real(dense, student, *args, **options)
        with torch.no_grad():
            student.out.weight.mul_(1.2)
        return found

    monkeypatch.setattr(module_of_heal, "heal_blocks", spoiling)
    whole, first, second = (sketched(teacher) for _ in range(3))
    done = heal(teacher, whole, given, "blocks")
    assert any("worse" in note for note in done.notes)
    with monkeypatch.context() as patch:
        killed(patch, 2)
        with pytest.raises(KilledError):
            heal(teacher, first, given, "blocks", checkpoint=tmp_path / "run")
    resumed = heal(teacher, second, given, "blocks", checkpoint=tmp_path / "run")
    assert same(bits(second), bits(whole)) and resumed.notes == done.notes


RUN = """
import torch
import panther

def run(mode, path):
    torch.manual_seed(0)
    parts = [torch.nn.Sequential(torch.nn.Linear(12, 24), torch.nn.ReLU(), torch.nn.Linear(24, 12)) for _ in range(2)]
    data = torch.randn(320, 6) @ torch.randn(6, 12) + 0.1 * torch.randn(320, 12)
    settings = panther.Heal(mode, steps=60, time_limit=1e6, learning_rate=0.005)
    return panther.compress(
        torch.nn.Sequential(*parts).eval(), 0.5, example_inputs=data[:2], calib_data=list(data.split(16)),
        progress=False, verify=False, heal=settings, checkpoint=path,
    )
"""
KILL = """
import os, signal, sys
from panther.healers.checkpoint import Checkpoint

save, made = Checkpoint.save, []

def counted(self, *args):
    save(self, *args)
    made.append(1)
    if len(made) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

Checkpoint.save = counted
run(sys.argv[1], sys.argv[2])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize(("mode", "saves"), [("blocks", 2), ("distill", 5)])
def test_a_process_killed_in_the_middle_goes_on_to_the_same_model(mode: str, saves: int, tmp_path: Path) -> None:
    path, space = tmp_path / "run", dict[str, Any]()
    command = [sys.executable, "-c", RUN + KILL, mode, str(path), str(saves)]
    first = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert first.returncode == -signal.SIGKILL and path.exists(), first.stderr
    exec(RUN, space)  # noqa: S102  # written above
    whole, second = space["run"](mode, None), space["run"](mode, path)
    assert same(bits(second.model), bits(whole.model)) and second.plan == whole.plan and not path.exists()
    assert second.report.healing.history[0][2] == whole.report.healing.history[0][2]


def test_no_room_for_a_checkpoint_is_said_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    teacher, given = Net(), data()
    students = [sketched(teacher) for _ in range(2)]
    heal(teacher, students[1], given)
    monkeypatch.setattr(safetensors.torch, "save_file", no_room)
    done = heal(teacher, students[0], given, checkpoint=tmp_path / "run")
    (note,) = [note for note in done.notes if "checkpoint" in note]
    assert "could not be written" in note and "No space left on device" in note and "goes on without" in note
    assert same(bits(students[0]), bits(students[1])) and not list(tmp_path.iterdir())


def left_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: nn.Module, given: Sequence[Tensor]) -> Path:
    """The checkpoint of a run that was killed in the middle of its blocks."""
    with monkeypatch.context() as patch:
        killed(patch, 2)
        with pytest.raises(KilledError):
            heal(teacher, sketched(teacher), given, checkpoint=tmp_path / "run")
    return tmp_path / "run"


CHANGES: dict[str, Callable[[Net, list[Tensor]], tuple[Net, list[Tensor], dict[str, Any]]]] = {
    "seed": lambda model, given: (model, given, {"seed": 1}),
    "steps": lambda model, given: (model, given, {"steps": 49}),
    "learning_rate": lambda model, given: (model, given, {"learning_rate": 0.001}),
    "mode": lambda model, given: (model, given, {"mode": "blocks"}),
    "batches": lambda model, given: (model, given[:8] + given[-1:], {}),
    "inputs": lambda model, given: (model, [x + 1 for x in given], {}),
    "weights of the dense model": lambda model, given: (tuned(model), given, {}),
    "shapes": lambda model, given: (model, given, {"rank": 4}),
}


def tuned(model: Net) -> Net:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.out.bias += 0.01
    return other


@pytest.mark.parametrize("changed", CHANGES)
def test_the_checkpoint_of_another_run_is_refused_and_says_what_differs(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, given = Net(), data()
    path = left_over(tmp_path, monkeypatch, teacher, given)
    other, inputs, options = CHANGES[changed](teacher, given)
    student = sketched(other, rank=options.pop("rank", 3))
    before = bits(student)
    with pytest.raises(LoadError, match=rf"checkpoint of another run \(different: .*\b{changed}\b"):
        heal(other, student, inputs, checkpoint=path, **options)
    assert same(bits(student), before) and path.exists() and hooks_of(other, student) == 0


def test_the_checkpoint_of_another_student_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, given = Net(), data()
    path = left_over(tmp_path, monkeypatch, teacher, given)
    student = sketched(teacher)
    with torch.no_grad():
        student.layers[0].up.down.mul_(1.5)
    before = bits(student)
    with pytest.raises(LoadError, match=r"different: weights of the student"):
        heal(teacher, student, given, checkpoint=path)
    assert same(bits(student), before)


DAMAGE: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Any]] = {
    "no stage": lambda facts, tensors: facts.pop("stage"),
    "another stage": lambda facts, tensors: facts.update(stage="lunch"),
    "no history": lambda facts, tensors: facts.update(history=[]),
    "odd history": lambda facts, tensors: facts.update(history=[1, 2]),
    "no figure": lambda facts, tensors: facts.update(reached="good"),
    "no weights": lambda facts, tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("kept")],
    "no student": lambda facts, tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("student")],
    "fewer weights": lambda facts, tensors: tensors.pop("kept.000000"),
    "other shapes": lambda facts, tensors: tensors.update({"student.000000": torch.zeros(1)}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_the_student_stays(
    damage: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, given = Net(), data()
    path = left_over(tmp_path, monkeypatch, teacher, given)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    whole = json.loads(metadata["facts"])
    damage(whole["facts"], tensors)
    safetensors.torch.save_file(tensors, path, metadata={**metadata, "facts": json.dumps(whole)})
    student = sketched(teacher)
    before = bits(student)
    with pytest.raises(LoadError, match=r"is damaged.*: delete it to begin anew"):
        heal(teacher, student, given, checkpoint=path)
    assert same(bits(student), before)


# Models of other people


def test_a_decoder_of_transformers_keeps_no_cache_while_it_is_healed_and_its_config_comes_back() -> None:
    """With a cache, each run of a block alone would add keys and values to those of the runs before."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    teacher = transformers.LlamaForCausalLM(config).eval()
    names = [
        f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    student = sketched(teacher, names, rank=4)
    ids = [{"input_ids": torch.randint(30, (2, length))} for length in (5, 7, 5, 6, 8, 5, 7, 6, 5, 6)]
    with torch.no_grad():
        wanted = teacher(**ids[0]).logits
    before = student.model.embed_tokens.weight.clone()
    done = heal(teacher, student, ids, "auto", layers=specs(teacher, names), steps=120)
    assert done.after < done.before and not any("failed" in note or "early" in note for note in done.notes)
    assert {stage for _, stage, _ in done.history} == {"before", "refit", "blocks", "distill"}
    assert teacher.config.use_cache and student.config.use_cache and hooks_of(teacher, student) == hooks_of(teacher)
    assert torch.equal(student.model.embed_tokens.weight, before)
    with torch.no_grad():
        assert torch.equal(teacher(**ids[0]).logits, wanted)


@pytest.mark.parametrize("nested", [True, False])  # True is torch's default: padding is cut off, in the dense model
def test_torchs_own_transformer_encoder_is_healed_with_padding(nested: bool) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True, dropout=0.1)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            answer: Tensor = self.encoder(x, src_key_padding_mask=attention_mask == 0)
            return answer

    teacher = Encoder().eval()
    names = [f"encoder.layers.{i}.{part}" for i in (0, 1) for part in ("linear1", "linear2")]
    student = sketched(teacher, names)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1] * 5])
    given = [{"x": torch.randn(3, 5, 12), "attention_mask": mask} for _ in range(10)]
    layers = specs(teacher, names)
    done = heal(teacher, student, given, "auto", layers=layers, steps=120)
    assert done.after < done.before
    assert not any("failed" in note or "early" in note or "4 of 4" in note for note in done.notes)


def test_a_fingerprint_tells_sparse_tensors_apart() -> None:
    dense = torch.eye(6)
    other = dense.clone()
    other[2, 2] = 3
    found = {module_of_heal.fingerprint([tensor.to_sparse()]) for tensor in (dense, other, dense.clone())}
    assert len(found) == 2


# Through compress


def compressed(model: nn.Module, given: Sequence[Tensor], heal_: Any = "refit", **options: Any) -> panther.Result:
    budget = options.pop("budget", 0.5)
    return panther.compress(
        model,
        budget,
        example_inputs=given[0][:2],
        calib_data=list(given),
        heal=heal_,
        progress=False,
        verify=False,
        **options,
    )


def test_compress_reports_what_healing_did_and_is_nearer_on_unseen_inputs() -> None:
    model, given, unseen = Net(), data(), data(4, seed=2)
    plain = compressed(model, given, "none")
    assert plain.report.healing is None
    result = compressed(model, given, Heal("auto", steps=200, time_limit=LONG, learning_rate=0.005))
    healing = result.report.healing
    assert healing is not None and healing.after < healing.before and healing.steps > 0
    assert result.plan == plain.plan
    assert error(model, result.model, unseen) < error(model, plain.model, unseen)
    assert set(healing.notes) <= set(result.report.notes)


def test_inside_autocast_every_figure_is_of_the_weights_as_they_are() -> None:
    """It keeps casts of weights until its outermost context ends, which here is the caller's."""
    model, given, found = Net(), data(), []
    for keeps in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=keeps):
            model(given[0])
            result = compressed(model, given, Heal("auto", steps=24, time_limit=LONG, learning_rate=0.005))
            student = sketched(model)
            student(given[0])
            healed = heal(model, student, given, "auto", steps=24)
            answers = [m(given[0]) for m in (result.model, student)]
            assert torch.is_autocast_cache_enabled() == keeps
        figures = [[figure for _, _, figure in h.history] for h in (result.report.healing, healed) if h is not None]
        found.append((bits(result.model), bits(student), figures, answers))
    (plain, own, figures, answers), (kept, own_kept, figures_kept, answers_kept) = found
    assert same(plain, kept) and same(own, own_kept) and figures == figures_kept
    assert all(map(torch.equal, answers, answers_kept))


def test_in_inference_mode_the_same_is_trained_and_can_be_trained_on() -> None:
    settings = Heal("auto", steps=24, time_limit=LONG, learning_rate=0.005)
    torch.manual_seed(0)
    plain = compressed(Net(), data(), settings)
    torch.manual_seed(0)
    with torch.inference_mode():  # also the weights and the inputs are made there
        result = compressed(Net(), data(), settings)
        again = result.resolve(0.4)
    assert same(bits(plain.model), bits(result.model))
    assert not any(t.is_inference() for m in (result.model, again.model) for t in m.state_dict().values())
    result.model(data()[0]).sum().backward()


def test_a_student_made_in_inference_mode_is_refused_and_any_other_is_healed_there() -> None:
    teacher, given = Net(), data()
    student = sketched(teacher)
    with torch.inference_mode():
        with pytest.raises(ValueError, match=r"student was made in torch\.inference_mode"):
            heal(teacher, sketched(teacher), given)
        with pytest.raises(ValueError, match="inplace=True cannot write into a model that was made in"):
            compressed(Net(), given, inplace=True)
        done = heal(teacher, student, given, "distill", layers=[])
    assert done.after < done.before


def test_without_data_nothing_is_healed() -> None:
    model, given = Net(), data(1)
    with pytest.warns(UserWarning, match="no calibration data"):
        result = panther.compress(model, 0.5, example_inputs=given[0], progress=False, verify=False)
    assert result.report.healing is None


def test_in_place_the_model_gets_everything_that_was_healed() -> None:
    model, given = Norms().eval(), [torch.randn(8, 3, 8, 8) for _ in range(10)]
    other = copy.deepcopy(model)
    settings = Heal("distill", steps=60, time_limit=LONG, learning_rate=0.005)
    options = {"example_inputs": given[0], "calib_data": given, "heal": settings, "progress": False, "verify": False}
    result = panther.compress(other, 0.5, **options)
    panther.compress(model, 0.5, inplace=True, **options)
    assert same(bits(model), bits(result.model)) and not torch.equal(model.norm.weight, other.norm.weight)


def test_compress_tells_refit_where_a_relu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    prepared = importlib.import_module("panther.prepared")
    real = prepared.heal

    def spy(*args: Any, **options: Any) -> Healed:
        seen.append(options["relu_after"])
        done: Healed = real(*args, **options)
        return done

    monkeypatch.setattr(prepared, "heal", spy)
    given = [torch.randn(8, 3, 8, 8) for _ in range(10)]
    panther.compress(
        Norms(), 0.5, example_inputs=given[0], calib_data=given, heal="refit", progress=False, verify=False
    )
    assert seen == [{"conv": "norm"}]


def test_a_killed_compression_goes_on_to_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = Net(), data()
    settings = Heal("auto", steps=90, time_limit=LONG, learning_rate=0.005)
    whole = compressed(model, given, settings)
    with monkeypatch.context() as patch:
        killed(patch, 3)
        with pytest.raises(KilledError):
            compressed(model, given, settings, checkpoint=tmp_path / "run")
    again = compressed(model, given, settings, checkpoint=tmp_path / "run")
    assert same(bits(again.model), bits(whole.model)) and again.plan == whole.plan and not list(tmp_path.iterdir())


@pytest.mark.parametrize("problem", [KeyboardInterrupt, RuntimeError])
def test_what_ends_a_compression_after_the_healing_keeps_the_checkpoint(
    problem: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = Net(), data()
    settings = Heal("distill", steps=40, time_limit=LONG, learning_rate=0.005)
    whole = compressed(model, given, settings)

    def ended(*_: Any, **__: Any) -> Any:
        raise problem

    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("panther.compress"), "check", ended)
        with pytest.raises(problem):
            compressed(model, given, settings, checkpoint=tmp_path / "run")
    interrupting(monkeypatch, "distill", 1)  # nothing is trained again
    again = compressed(model, given, settings, checkpoint=tmp_path / "run")
    assert again.report.healing is not None and not again.report.healing.interrupted
    assert same(bits(again.model), bits(whole.model)) and not list(tmp_path.iterdir())


def test_a_file_that_a_run_has_nothing_to_do_with_stays(tmp_path: Path) -> None:
    model, given = Net(), data()
    plan = compressed(model, given).plan
    (tmp_path / "weights.pt").write_bytes(b"precious")
    options: dict[str, Any] = {"example_inputs": given[0], "calib_data": given, "progress": False, "verify": False}
    panther.compress(model, 0.5, plan=plan, heal="none", checkpoint=tmp_path / "weights.pt", **options)
    assert (tmp_path / "weights.pt").read_bytes() == b"precious"


def test_ctrl_c_in_the_refit_of_a_run_that_goes_on_keeps_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given, path = Net(), data(), tmp_path / "run"
    options: dict[str, Any] = {"dtypes": ("float32", "int4"), "budget": {"size_mb": "40%"}, "checkpoint": path}
    with monkeypatch.context() as patch:
        interrupting(patch, "distill", 10)
        compressed(model, given, "distill", **options)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        interrupting(patch, "refit", 1)
        result = compressed(model, given, "distill", **options)
    assert result.report.healing is not None and result.report.healing.interrupted and path.read_bytes() == before
    compressed(model, given, Heal("distill", steps=20), **{**options, "checkpoint": None})


@pytest.mark.parametrize("without", ["calib_data", "heal"])
def test_a_run_that_would_not_heal_is_refused_the_checkpoint_of_one_that_did(
    without: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given, path = Net(), data(), tmp_path / "run"
    with monkeypatch.context() as patch:
        killed(patch, 2)
        with pytest.raises(KilledError):
            compressed(model, given, "distill", checkpoint=path)
    before = path.read_bytes()
    options: dict[str, Any] = {"example_inputs": given[0], "progress": False, "checkpoint": path}
    others = {"heal": "none", "calib_data": given} if without == "heal" else {"heal": "distill"}
    with pytest.raises(
        LoadError, match="a run that heals, and this one has " + ("heal=none" if without == "heal" else "no")
    ):
        panther.compress(model, 0.5, **options, **others)
    assert path.read_bytes() == before


def test_a_plan_whose_milliseconds_were_measured_goes_on_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run measures others, and heals the plan of the first."""
    measured: list[float] = [1.0]

    def with_latency(options: Mapping[str, Sequence[Choice]], *_: Any, **__: Any) -> Mapping[str, Sequence[Choice]]:
        measured.append(measured[-1] * 1.1)
        return {
            name: [replace(c, cost=replace(c.cost, latency_ms=c.cost.params * measured[-1])) for c in choices]
            for name, choices in options.items()
        }

    monkeypatch.setattr(importlib.import_module("panther.prepared"), "with_latency", with_latency)
    model, given = Net(), data()
    options: dict[str, Any] = {"budget": {"params": 0.5, "latency_ms": 1e6}, "checkpoint": tmp_path / "run"}
    with monkeypatch.context() as patch:
        killed(patch, 1)
        with pytest.raises(KilledError):
            compressed(model, given, "refit", **options)
    result = compressed(model, given, "refit", **options)
    assert result.report.healing is not None and result.plan.sketched and not list(tmp_path.iterdir())


MORE_DTYPES = {"dtypes": ("float32", "int8")}


@pytest.mark.parametrize(
    "changed", [{"budget": 0.6}, {"seed": 1}, {"search": "uniform"}, {"dtypes": ("int8",)}, MORE_DTYPES]
)
def test_the_checkpoint_of_another_compression_is_refused(
    changed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other dtypes also where the plan that is being healed uses none of them."""
    model, given = Net(), data()
    with monkeypatch.context() as patch:
        killed(patch, 1)
        with pytest.raises(KilledError):
            compressed(model, given, checkpoint=tmp_path / "run")
    name = next(iter(changed))
    said = r"different: dtypes\)" if changed == MORE_DTYPES else rf"{name} .*, now .*\)"
    with pytest.raises(LoadError, match=rf"checkpoint of another run \({said}"):
        compressed(model, given, checkpoint=tmp_path / "run", **changed)


def test_another_budget_heals_anew() -> None:
    model, given = Net(), data()
    result = compressed(model, given)
    smaller = result.resolve(0.4)
    assert result.report.healing is not None and smaller.report.healing is not None
    assert smaller.report.healing != result.report.healing


@pytest.mark.parametrize(
    "search", [{"search": "sensitivity"}, {"search": "tuned", "n_trials": 2}], ids=lambda s: s["search"]
)
def test_another_budget_has_no_part_in_the_checkpoint(
    search: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which stays when Ctrl-C ended the healing, and is of the first budget."""
    model, given, options = Net(), data(), {"checkpoint": tmp_path / "run", **search}
    with monkeypatch.context() as patch:
        interrupting(patch, "distill", 10)
        result = compressed(model, given, "distill", **options)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "run" in before
    smaller = result.resolve(0.4)
    assert smaller.report.healing is not None and smaller.budget_met
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    compressed(model, given, "distill", **options)
    assert not list(tmp_path.iterdir())


def test_bad_settings_are_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match="heal='magic': expected one of none, refit, blocks, distill, auto"):
        panther.heal(Net(), Net(), [torch.zeros(1, 12)], torch.zeros(1, 12), "magic")
    with pytest.raises(ValueError, match=r"Heal\(steps=0\)"):
        Heal(steps=0)
