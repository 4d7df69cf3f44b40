"""The whole student trained to answer as the teacher does, on batches of any kind and for students of any kind."""

from __future__ import annotations

import copy
import gc
import importlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panther.batches import Call, inference
from panther.healers import distill
from panther.healers.training import Limits, Progressed
from panther.nn import SKETCHED
from panther.nn.surgery import with_layers

module_of_distill: Any = importlib.import_module("panther.healers.distill")

LONG = 1e6  # seconds
RATE = 0.005
STRENGTHS = torch.linspace(2, 0.1, 12)  # of the inputs' features: factors made without data do not know of them
pytestmark = pytest.mark.filterwarnings("ignore:SK.*would be smaller:UserWarning")  # layers this small hardly pay


def sketched(model: nn.Module, *names: str, rank: int = 3) -> nn.Module:
    dense = {name: model.get_submodule(name) for name in names}
    return with_layers(model, {n: SKETCHED[type(layer)].from_dense(layer, rank=rank) for n, layer in dense.items()})


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 5))


def data(count: int = 8, size: int = 16) -> list[Call]:
    return [Call((torch.randn(size, 12) * STRENGTHS,)) for _ in range(count)]


def distilled(teacher: nn.Module, student: nn.Module, calls: Sequence[Call], **options: Any) -> Progressed:
    limits = options.pop("limits", Limits(LONG, options.pop("steps", 80), RATE))
    with inference(teacher), inference(student):
        return distill(teacher, student, calls[:-2], calls[-2:], limits, **options)


@torch.no_grad()
def error(teacher: nn.Module, student: nn.Module, calls: Sequence[Call]) -> float:
    with inference(teacher), inference(student):
        return sum(float((teacher(*c.args) - student(*c.args)).square().sum()) for c in calls)


def test_the_answers_to_unseen_inputs_get_nearer() -> None:
    teacher, calls, unseen = net(), data(), data(3)
    student = sketched(teacher, "0", "2")
    before = error(teacher, student, unseen)
    run = distilled(teacher, student, calls, steps=300)
    assert run.best < run.first and error(teacher, student, unseen) < 0.7 * before


def test_a_student_of_another_make_learns_from_the_answers_alone() -> None:
    """Such as a narrower net, or one that another tool has pruned."""
    teacher, calls = net(), data()
    student = nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 5))
    run = distilled(teacher, student, calls, steps=200)
    assert run.best < 0.7 * run.first


def test_a_batch_that_makes_large_outputs_is_run_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, calls, unseen = net(), data(), data(3)
    student = sketched(teacher, "0", "2")
    before = error(teacher, student, unseen)
    seen: list[int] = []
    student.register_forward_pre_hook(lambda _m, args: seen.append(len(args[0])) if torch.is_grad_enabled() else None)
    monkeypatch.setattr(module_of_distill, "LARGEST_BYTES", 6 * 12 * 4)  # six samples of the widest layer
    distilled(teacher, student, calls, steps=100)
    assert set(seen) == {5, 6} and error(teacher, student, unseen) < 0.8 * before


def test_parts_hold_every_sample_once_and_are_never_of_too_few() -> None:
    calls = [*data(1, 16), *data(1, 5), *data(1, 2), Call((torch.ones(6, 3), torch.ones(2)))]
    parts = module_of_distill._in_parts(calls, 4)
    assert [[part.batch_size for part in call] for call in parts] == [[4] * 4, [5], [2], [1]]
    assert all(
        torch.equal(torch.cat([p.args[0] for p in made]), call.args[0]) for made, call in zip(parts, calls, strict=True)
    )


def test_the_same_seed_gives_the_same_bits_also_from_a_save() -> None:
    teacher, calls = net(), data()
    saved: list[Progressed] = []
    whole = sketched(teacher, "0", "2")
    distilled(teacher, whole, calls, seed=4, save=lambda now: saved.append(copy.deepcopy(now)))
    again = sketched(teacher, "0", "2")
    distilled(teacher, again, calls, seed=4, went_on=saved[5])
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in whole.state_dict().items())


@pytest.mark.parametrize("rate", [1e3, 1e20])
def test_a_rate_that_diverges_leaves_the_student_no_worse(rate: float) -> None:
    teacher, calls = net(), data()
    student = sketched(teacher, "0", "2")
    before = error(teacher, student, calls[-2:])
    run = distilled(teacher, student, calls, limits=Limits(LONG, 200, rate))
    assert run.best <= run.first and error(teacher, student, calls[-2:]) <= before * 1.001


@pytest.mark.parametrize("interrupts", [False, True])
def test_flags_frozen_parameters_and_hooks_come_back(interrupts: bool) -> None:
    teacher, calls = net().train(), data()
    student = sketched(teacher, "0", "2").train()
    student[1].eval()
    student[0].down.requires_grad_(False)
    before = {name: p.clone() for name, p in student.named_parameters()}
    dense = {name: value.clone() for name, value in teacher.state_dict().items()}
    steps = []

    def show(share: float, best: float) -> None:
        steps.append(share)
        if interrupts and len(steps) == 40:
            raise KeyboardInterrupt

    if interrupts:
        with pytest.raises(KeyboardInterrupt):
            distilled(teacher, student, calls, show=show)
    else:
        distilled(teacher, student, calls, show=show)
    assert all(torch.equal(value, dense[name]) for name, value in teacher.state_dict().items())
    assert [m.training for m in student] == [True, False, True, True, True] and student.training and teacher.training
    assert [n for n, p in student.named_parameters() if not p.requires_grad] == ["0.down"]
    assert all(p.grad is None for model in (teacher, student) for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for net in (teacher, student) for m in net.modules())
    assert all(not torch.equal(p, before[name]) for name, p in student.named_parameters())


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.layers = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)])
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return {"logits": self.head(x), "hidden": x}


def test_tied_weights_and_embeddings_stay_and_stay_tied() -> None:
    teacher = Tokens()
    student = sketched(teacher, "layers.0", "layers.1")
    embedded = student.embed.weight.clone()
    calls = [Call((torch.randint(20, (3, length)),)) for length in (5, 3, 8, 5, 1, 4)]
    run = distilled(teacher, student, calls)
    assert run.best < run.first
    assert student.head.weight is student.embed.weight and torch.equal(student.embed.weight, embedded)
    assert student.embed.weight.requires_grad and student.embed.weight.grad is None


def test_batches_of_every_kind_in_one_run_are_trained_on() -> None:
    """Positional, by keyword, with and without a mask, of different lengths and sizes."""
    teacher = Tokens()
    student = sketched(teacher, "layers.0", "layers.1")
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    calls = [
        Call((torch.randint(20, (2, 4)),)),
        Call((), {"input_ids": torch.randint(20, (1, 7))}),
        Call((torch.randint(20, (2, 4)),), {"attention_mask": mask}),
        Call((), {"input_ids": torch.randint(20, (2, 4)), "attention_mask": mask}),
        Call((torch.randint(20, (3, 2)),)),
        Call((torch.randint(20, (2, 6)),)),
    ]
    run = distilled(teacher, student, calls)
    assert run.best < run.first and not run.left_out


@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("size", [1, 2])
def test_few_calls_and_single_samples_are_enough(count: int, size: int) -> None:
    teacher, calls = net(), data(count, size)
    run = distilled(teacher, sketched(teacher, "0", "2"), calls)
    assert run.best <= run.first and run.step == 80


def test_a_batch_that_is_not_finite_is_left_out() -> None:
    teacher, calls = net(), data()
    calls[1] = Call((torch.full((16, 12), torch.nan),))
    student = sketched(teacher, "0", "2")
    run = distilled(teacher, student, calls)
    assert run.best < run.first and all(bool(p.isfinite().all()) for p in student.parameters())


class InPlace(nn.Module):
    """ReLUs that overwrite the outputs of the blocks before them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x), inplace=True)
        return x


def test_a_relu_in_place_behind_a_block_is_no_obstacle() -> None:
    teacher, calls = InPlace(), data()
    run = distilled(teacher, sketched(teacher, "layers.0", "layers.1"), calls)
    assert run.best < run.first


def test_norms_and_dropout_are_in_evaluation_mode_and_statistics_stay() -> None:
    teacher = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Conv2d(8, 8, 3)
    ).train()
    student = sketched(teacher, "4")
    calls = [Call((torch.randn(4, 3, 6, 6),)) for _ in range(6)]
    before = {name: value.clone() for name, value in student.state_dict().items()}
    run = distilled(teacher, student, calls)
    assert run.best < run.first and student.training and student[3].training
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name]) == ("running" in name or "num_batches" in name)


class Rnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.rnn, self.head = nn.Linear(12, 12), nn.LSTM(12, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.rnn(self.inner(x))[0][:, -1])
        return answer


def test_a_recurrent_layer_is_trained_with_the_rest() -> None:
    teacher = Rnn()
    student = sketched(teacher, "inner")
    calls = [Call((torch.randn(4, 5, 12) * STRENGTHS,)) for _ in range(6)]
    before = student.rnn.weight_ih_l0.clone()
    run = distilled(teacher, student, calls)
    assert run.best < run.first and not torch.equal(student.rnn.weight_ih_l0, before)


class Paths(nn.Module):
    """Batches run through different layers; nothing is paused here, so that is no obstacle."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)])

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.layers[len(x) % 2](x)
        return answer


def test_batches_that_take_different_paths_are_trained_on() -> None:
    teacher = Paths()
    student = sketched(teacher, "layers.0", "layers.1")
    before = {name: p.clone() for name, p in student.named_parameters()}
    calls = [Call((torch.randn(size, 12) * STRENGTHS,)) for size in (4, 5, 8, 9, 6, 7)]
    run = distilled(teacher, student, calls)
    assert run.best < run.first and all(not torch.equal(p, before[n]) for n, p in student.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_students_get_no_worse(dtype: torch.dtype) -> None:
    teacher = net().to(dtype)
    calls = [Call((c.args[0].to(dtype),)) for c in data()]
    student = sketched(teacher, "0", "2")
    run = distilled(teacher, student, calls)
    assert run.best < run.first and {p.dtype for p in student.parameters()} == {dtype}


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            answer: Tensor = self.net(x)
        return answer


def test_a_model_that_uses_autocast_is_trained() -> None:
    teacher = Mixed()
    run = distilled(teacher, sketched(teacher, "net.0", "net.2"), data())
    assert run.best < run.first


def test_the_teacher_runs_once_for_each_batch_as_far_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, calls = net(), data()
    runs: list[int] = []
    teacher.register_forward_hook(lambda *_: runs.append(1))
    distilled(teacher, sketched(net(), "0"), calls, steps=60)
    assert len(runs) == len(calls) + 1  # and once to see what the answers mean
    runs.clear()
    monkeypatch.setattr(module_of_distill, "CACHED_BYTES", 0)
    distilled(teacher, sketched(net(), "0"), calls, steps=60)
    assert len(runs) > 60


class Decoder(nn.Module):
    """Answers with its keys and values too, as decoders do for the next token."""

    class Cache:
        def __init__(self, keys: list[Tensor]) -> None:
            self.keys = keys

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"logits": self.net(x), "past_key_values": self.Cache([x] * 4)}


def test_caches_in_the_answers_are_neither_compared_nor_kept() -> None:
    teacher, seen = Decoder(), []

    def show(share: float, best: float) -> None:
        gc.collect()
        seen.append(sum(type(o) is Decoder.Cache for o in gc.get_objects()))

    run = distilled(teacher, sketched(teacher, "net.0", "net.2"), data(), show=show, steps=6)
    assert run.best <= run.first and max(seen) == 0
