"""Blocks trained one after the other to give what the dense blocks give, whatever stands in and around them."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from panther.batches import Call
from panther.healers import blocks
from panther.healers.blocks import HealedBlock, find_blocks, gradients_for, heal_blocks, trainable
from panther.healers.lockstep import LeftStepError
from panther.healers.training import Limits
from panther.nn import SKETCHED
from panther.nn.surgery import with_layers

LONG = 1e6  # seconds
STRENGTHS = torch.linspace(2, 0.1, 12)  # of the inputs' features: factors made without data do not know of them
pytestmark = pytest.mark.filterwarnings("ignore:SK.*would be smaller:UserWarning")  # layers this small hardly pay


def sketched(model: nn.Module, *names: str, rank: int = 3) -> nn.Module:
    layers = {}
    for name in names:
        dense = model.get_submodule(name)
        layers[name] = SKETCHED[type(dense)].from_dense(dense, rank=rank)
    return with_layers(model, layers)


def block(width: int = 12) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def deep(depth: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 12), nn.Sequential(*(block() for _ in range(depth))), nn.Linear(12, 4))


def data(count: int = 8, size: int = 16) -> list[Call]:
    return [Call((torch.randn(size, 12) * STRENGTHS,)) for _ in range(count)]


def healed(teacher: nn.Module, student: nn.Module, calls: Sequence[Call], **options: Any) -> list[HealedBlock]:
    steps = options.pop("steps", 80)
    limits = options.pop("limits", Limits(LONG, steps, 0.005))
    return heal_blocks(teacher.eval(), student, calls, options.pop("checks", 2), limits, **options)


def test_each_block_is_trained_on_as_many_calls_as_fit_there() -> None:
    teacher, calls, unseen = Narrows(), data(16), data(3)
    student = sketched(teacher, "layers.0.0", "layers.1.0", rank=2)
    before = error(teacher, student, unseen)
    size = calls[0].args[0].numel() * 4
    done = healed(teacher, student, calls, steps=200, held_bytes=6 * size)
    assert [block.name for block in done] == ["layers.0", "layers.1"]
    assert done[0].batches < done[1].batches == 14 and all(b.after < b.before for b in done)
    assert error(teacher, student, unseen) < before


class Narrows(nn.Module):
    """The second block gets an eighth of the rows of the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block(), block()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        x = x.reshape(-1, 8, 12).mean(1)
        answer: Tensor = self.layers[1](x)
        return answer


@torch.no_grad()
def error(teacher: nn.Module, student: nn.Module, calls: Sequence[Call]) -> float:
    def answers(model: nn.Module, call: Call) -> Tensor:
        answer = model(*call.args, **call.kwargs)
        tensor: Tensor = answer[0] if isinstance(answer, tuple) else answer
        return tensor

    return sum(float((answers(teacher, c) - answers(student, c)).square().sum()) for c in calls)


# Which blocks


def test_a_block_is_an_element_of_a_list_and_elsewhere_the_layer_itself() -> None:
    model = deep(2)
    assert find_blocks(sketched(model, "0", "1.0.0", "1.1.2", "2")) == ["0", "1.0", "1.1", "2"]
    assert find_blocks(sketched(model, "1.1.2")) == ["1"]  # a list with one sketched part is a part itself
    assert find_blocks(model) == []


class Named(nn.Module):
    """Layers by name, a list in a module, and a list that runs parts of lists."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(12, 12)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList([block(), block()])
        self.stages = nn.ModuleList([nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)]), nn.ModuleList([block()])])

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for part in (*self.encoder.layers, *self.stages[0], *self.stages[1]):
            x = x + part(x)
        return x


def test_lists_in_lists_are_taken_apart() -> None:
    names = ["start", "encoder.layers.0.0", "encoder.layers.1.2", "stages.0.0", "stages.0.1", "stages.1.0.2"]
    found = find_blocks(sketched(Named(), *names))
    assert found == ["start", "encoder.layers.0", "encoder.layers.1", "stages.0.0", "stages.0.1", "stages.1.0"]


def test_the_model_may_be_a_layer_itself() -> None:
    dense = nn.Linear(12, 12)
    student = SKETCHED[nn.Linear].from_dense(dense, rank=3)
    (done,) = healed(dense, student, data())
    assert done.name == "" and done.after < done.before


def test_embeddings_are_not_trained_and_everything_else_is() -> None:
    model = nn.ModuleDict({"ids": nn.Embedding(9, 4), "bag": nn.EmbeddingBag(9, 4), "rest": nn.Linear(4, 4)})
    model["rest"].register_parameter("count", nn.Parameter(torch.zeros(2, dtype=torch.long), requires_grad=False))
    assert {id(p) for p in trainable(model)} == {id(model["rest"].weight), id(model["rest"].bias)}
    model["rest"].weight = model["ids"].weight  # a tied head is an embedding
    assert {id(p) for p in trainable(model)} == {id(model["rest"].bias)}


# What healing does


def test_every_block_gets_nearer_and_so_does_the_whole() -> None:
    teacher, calls, unseen = deep(), data(), data(3)
    student = sketched(teacher, "0", "1.0.0", "1.1.2", "1.2.0", "2")
    before = error(teacher, student, unseen)
    blocks = healed(teacher, student, calls, steps=400)
    assert [b.name for b in blocks] == ["0", "1.0", "1.1", "1.2", "2"] and all(b.steps == 80 for b in blocks)
    assert all(b.after < b.before for b in blocks)
    assert error(teacher, student, unseen) < 0.7 * before


def test_a_block_learns_to_undo_what_came_before_it() -> None:
    """The first block cannot be healed, and the second sees what it gives."""
    teacher, calls = deep(1).eval(), data()
    student = sketched(teacher, "1.0.0", rank=12)  # exact
    with torch.no_grad():
        student[0].weight.mul_(0.7)
    before = error(teacher, student, calls)
    (done,) = healed(teacher, student, calls, steps=150)
    assert done.before > 0.01 and error(teacher, student, calls) < 0.5 * before


def test_the_teacher_stays_and_flags_gradients_and_hooks_come_back() -> None:
    teacher, calls = deep().train(), data()
    student = sketched(teacher, "1.0.0", "1.1.2").train()
    student[1][0].eval()
    frozen = [student[1][0][0].down, student[1][1][0].weight]
    for parameter in frozen:
        parameter.requires_grad_(False)
    before = {name: p.clone() for name, p in student.named_parameters()}
    dense = {name: value.clone() for name, value in teacher.state_dict().items()}
    heal_blocks(teacher, student, calls, 2, Limits(LONG, 40, 0.01))
    assert all(torch.equal(value, dense[name]) for name, value in teacher.state_dict().items())
    assert teacher.training and student.training and not student[1][0].training and student[1][1].training
    assert all(not p.requires_grad for p in frozen) and sum(not p.requires_grad for p in student.parameters()) == 2
    assert all(p.grad is None for p in student.parameters()) and torch.is_grad_enabled()
    assert not any(m._forward_pre_hooks or m._forward_hooks for net in (teacher, student) for m in net.modules())
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert "1.0.0.down" in changed and "1.1.0.weight" in changed  # frozen ones are healed all the same
    assert not any(name.startswith(("0.", "2.", "1.2.")) for name in changed)


def test_the_same_seed_gives_the_same_bits_also_from_the_middle() -> None:
    teacher, calls = deep(), data()
    names = ("1.0.0", "1.1.2", "1.2.0")
    whole = sketched(teacher, *names)
    middle: list[dict[str, Tensor]] = []

    def done(found: HealedBlock) -> None:
        middle.append({name: value.clone() for name, value in whole.state_dict().items()})

    healed(teacher, whole, calls, seed=3, done=done)
    second = sketched(teacher, *names)
    second.load_state_dict(middle[0])
    rest = healed(teacher, second, calls, seed=3, skip=["1.0"])
    assert [b.name for b in rest] == ["1.1", "1.2"]
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize("rate", [1e3, 1e20])
def test_a_rate_that_diverges_leaves_each_block_no_worse(rate: float) -> None:
    teacher, calls = deep(), data()
    student = sketched(teacher, "1.0.0", "1.1.2")
    before = error(teacher, student, calls[-2:])
    blocks = healed(teacher, student, calls, limits=Limits(LONG, 100, rate))
    assert all(b.after <= b.before for b in blocks)
    assert error(teacher, student, calls[-2:]) <= before * 1.05


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("size", [1, 3])
def test_few_calls_and_single_samples_are_enough(count: int, size: int) -> None:
    teacher, calls = deep(), data(count, size)
    student = sketched(teacher, "1.0.0", "1.1.2")
    blocks = healed(teacher, student, calls, checks=count - 1)
    assert len(blocks) == 2 and all(b.after <= b.before for b in blocks)


def test_a_call_whose_block_is_not_finite_is_left_out() -> None:
    teacher, calls = deep(), data()
    calls[1] = Call((torch.full((16, 12), torch.nan),))
    student = sketched(teacher, "1.0.0")
    (done,) = healed(teacher, student, calls)
    assert done.after < done.before and all(bool(p.isfinite().all()) for p in student.parameters())


# What stands in a block


class WithRnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 12), nn.LSTM(12, 6, batch_first=True, bidirectional=True)])
        self.head = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.layers[1](self.layers[0](x))[0])
        return answer


def test_a_recurrent_layer_in_the_way_is_no_obstacle() -> None:
    teacher, calls = WithRnn(), [Call((torch.randn(4, 5, 12) * STRENGTHS,)) for _ in range(6)]
    blocks = healed(teacher, sketched(teacher, "layers.0", "head"), calls)
    assert [b.name for b in blocks] == ["layers.0", "head"] and all(b.after < b.before for b in blocks)


class RnnBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.rnn = nn.Linear(12, 12), nn.GRU(12, 12, batch_first=True)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        answer: tuple[Tensor, Tensor] = self.rnn(self.inner(x), state)
        return answer


class Rnns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([RnnBlock(), RnnBlock()])

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for layer in self.layers:
            x, state = layer(x, state=state)
        return x


def test_a_block_with_a_recurrent_layer_keyword_arguments_and_several_outputs_is_trained() -> None:
    teacher, calls = Rnns(), [Call((torch.randn(4, 5, 12) * STRENGTHS,)) for _ in range(6)]
    blocks = healed(teacher, sketched(teacher, "layers.0.inner", "layers.1.inner"), calls)
    assert len(blocks) == 2 and all(b.after < b.before for b in blocks)


def conv_block(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ReLU(inplace=True), nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.Dropout(0.5)
    )


def test_norms_and_dropout_are_in_evaluation_mode_and_statistics_stay() -> None:
    teacher = nn.Sequential(nn.Conv2d(3, 8, 1), *(conv_block(8) for _ in range(2))).train()
    student = sketched(teacher, "1.1", "2.1")
    calls = [Call((torch.randn(4, 3, 6, 6),)) for _ in range(6)]
    before = {name: value.clone() for name, value in student.state_dict().items()}
    blocks = heal_blocks(teacher, student, calls, 2, Limits(LONG, 60, 0.01))
    assert all(b.after < b.before for b in blocks)
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name]) == ("running" in name or "num_batches" in name or name[0] == "0")
    assert all(m.training for m in student.modules())


class Accumulates(nn.Module):
    """Changes its input in place, again each time it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        answer: Tensor = self.inner(x)
        return answer


def test_a_block_that_changes_its_input_in_place_sees_the_same_input_every_time() -> None:
    teacher = nn.Sequential(nn.Linear(12, 12), Accumulates(), nn.ReLU(inplace=True), Accumulates())
    student = sketched(teacher, "1.inner", "3.inner", rank=12)  # exact: nothing to heal
    for done in healed(teacher, student, data()):
        assert done.before < 1e-9


class Cached(nn.Module):
    """A decoder whose blocks put what they make into an object that is handed down."""

    class Cache:
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 12) for _ in range(3)])
        self.mix = nn.ModuleList([Remembers() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        cache = self.Cache()
        for layer in self.mix:
            x = layer(x, cache=cache)
        assert len(cache.seen) == 3
        return x


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 12)

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        cache.seen.append(self.inner(x))
        return torch.stack(cache.seen).sum(0).tanh()


def test_an_object_that_blocks_add_to_grows_once_a_forward_only() -> None:
    teacher = Cached()
    blocks = healed(teacher, sketched(teacher, "mix.0.inner", "mix.1.inner", "mix.2.inner", rank=12), data())
    assert len(blocks) == 3 and all(b.before < 1e-9 for b in blocks)


class Mixed(nn.Module):
    """Runs its blocks in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(block(), block())

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            answer: Tensor = self.layers(x.bfloat16())
        return answer


def test_blocks_inside_autocast_are_trained() -> None:
    teacher = Mixed()
    blocks = healed(teacher, sketched(teacher, "layers.0.0", "layers.1.2"), data())
    assert len(blocks) == 2 and all(b.after < b.before for b in blocks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_blocks_get_no_worse(dtype: torch.dtype) -> None:
    teacher = deep().to(dtype)
    calls = [Call((c.args[0].to(dtype),)) for c in data()]
    student = sketched(teacher, "1.0.0", "1.1.2")
    blocks = healed(teacher, student, calls)
    assert all(b.after < b.before for b in blocks) and {p.dtype for p in student.parameters()} == {dtype}


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.layers = nn.ModuleList([block(), block()])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids) * attention_mask[..., None]
        for layer in self.layers:
            x = x + layer(x)
        return {"last_hidden_state": x}


def tokens(lengths: Sequence[int]) -> list[Call]:
    calls = []
    for length in lengths:
        mask = torch.ones(3, length, dtype=torch.long)
        mask[1, length // 2 :] = 0
        calls.append(Call((), {"input_ids": torch.randint(20, (3, length)), "attention_mask": mask}))
    return calls


def test_keyword_calls_of_different_lengths_with_masks_are_trained_on_and_embeddings_stay() -> None:
    teacher = Tokens()
    student = sketched(teacher, "layers.0.0", "layers.1.2")
    embedded = student.embed.weight.clone()
    blocks = healed(teacher, student, tokens([5, 3, 8, 5, 1, 4]))
    assert all(b.after < b.before for b in blocks) and torch.equal(student.embed.weight, embedded)


# Blocks that must not be trained


class Recurs(nn.Module):
    """One block runs twice, one never, and one once."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block(), block(), block()])

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.layers[2](self.layers[0](self.layers[0](x).tanh()).tanh())
        return answer


def test_a_block_that_runs_twice_or_never_is_left_and_the_rest_is_healed() -> None:
    teacher = Recurs()
    student = sketched(teacher, "layers.0.0", "layers.1.0", "layers.2.0")
    before = {name: value.clone() for name, value in student.state_dict().items()}
    blocks = healed(teacher, student, data(), steps=60)
    assert [(b.name, b.steps) for b in blocks] == [("layers.2", 60)] and blocks[0].after < blocks[0].before
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert {name[:8] for name in changed} == {"layers.2"}


def test_parameters_that_two_blocks_share_stay_and_stay_shared() -> None:
    teacher = deep(2)
    teacher[1][1][0].weight = teacher[1][0][0].weight
    student = sketched(teacher, "1.0.2", "1.1.2")
    shared = student[1][0][0].weight
    before = shared.clone()
    blocks = healed(teacher, student, data())
    assert student[1][1][0].weight is shared and torch.equal(shared, before)
    assert all(b.after < b.before for b in blocks)


class Paths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block(), block(), block()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        answer: Tensor = self.layers[1 if len(x) < 10 else 2](x)
        return answer


def test_batches_that_part_ways_end_it_after_the_blocks_that_they_share() -> None:
    teacher = Paths()
    student = sketched(teacher, "layers.0.0", "layers.1.0", "layers.2.0")
    done: list[str] = []
    threads = threading.active_count()
    with pytest.raises(LeftStepError, match="different layers"):
        healed(teacher, student, [*data(2, 4), *data(2, 16)], done=lambda b: done.append(b.name))
    assert threading.active_count() == threads and all(p.grad is None for p in student.parameters())
    assert not any(m._forward_pre_hooks for net in (teacher, student) for m in net.modules())


def test_a_student_of_another_shape_or_without_sketched_layers_has_no_block_to_heal() -> None:
    teacher, student = deep(2), nn.Sequential(nn.Linear(12, 4))
    assert healed(teacher, student, data()) == []
    assert healed(nn.Sequential(nn.Linear(12, 4)), sketched(deep(2), "1.0.0"), data()) == []


class Answers(nn.Module):
    """A block that answers with nothing to compare."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 12)
        self.given: Any = None

    def forward(self, x: Tensor) -> Any:
        self.given = self.inner(x)
        return self.given.argmax(-1)


class Asks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Answers()])

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.layers[0](x)
        return answer.float()


def test_a_block_that_answers_with_integers_is_left() -> None:
    teacher = Asks()
    assert healed(teacher, sketched(teacher, "layers.0.inner"), data()) == []


# Interruptions


@pytest.mark.parametrize("error_", [KeyboardInterrupt, ValueError])
def test_an_interruption_keeps_the_best_of_the_block_and_leaves_nothing_behind(error_: type[BaseException]) -> None:
    teacher, calls = deep().train(), data()
    student = sketched(teacher, "1.0.0", "1.1.2").train()
    before = error(teacher, student, calls)
    threads, seen = threading.active_count(), []

    def show(name: str, share: float, best: float) -> None:
        seen.append(name)
        if seen.count("1.1") == 30:
            raise error_

    with pytest.raises(error_):
        heal_blocks(teacher, student, calls, 2, Limits(LONG, 80, 0.01), show=show)
    assert threading.active_count() == threads and student.training and teacher.training
    assert all(p.requires_grad and p.grad is None for p in student.parameters())
    assert not any(m._forward_pre_hooks for net in (teacher, student) for m in net.modules())
    assert error(teacher, student, calls) < before


def test_gradients_are_for_the_chosen_parameters_only_and_none_is_left() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    with gradients_for(model, [model[0].weight]):
        model(torch.randn(2, 4)).sum().backward()
        assert model[0].weight.grad is not None and model[1].weight.grad is None
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in model.parameters())


# Memory


class Counted(nn.Module):
    """A block whose outputs are counted as long as they live."""

    alive: ClassVar[weakref.WeakSet[Tensor]] = weakref.WeakSet()
    most: ClassVar[list[int]] = [0]

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.inner(x).tanh()
        self.alive.add(answer)
        self.most[0] = max(self.most[0], sum(t.numel() * t.element_size() for t in self.alive))
        return answer


def held(depth: int) -> int:
    teacher = nn.Sequential(*(Counted() for _ in range(depth)))
    student = sketched(teacher, *(f"{i}.inner" for i in range(depth)))
    gc.collect()
    Counted.alive.clear()
    Counted.most[0] = 0
    healed(teacher, student, data(6), steps=4 * depth)
    return Counted.most[0]


def test_the_activations_that_are_held_do_not_grow_with_depth() -> None:
    assert 0 < held(10) == held(4)


@pytest.mark.parametrize("limits", [Limits(0.0, 80), Limits(LONG, 0)])
def test_without_time_or_steps_nothing_is_trained(limits: Limits) -> None:
    teacher = deep()
    student = sketched(teacher, "1.0.0", "1.1.0", "1.2.0")
    before = [p.clone() for p in student.parameters()]
    assert healed(teacher, student, data(), limits=limits) == []
    assert all(torch.equal(p, q) for p, q in zip(before, student.parameters(), strict=True))


def test_steps_are_counted_over_all_blocks() -> None:
    teacher = deep()
    for steps in (1, 2, 3, 4, 8):
        student = sketched(teacher, "1.0.0", "1.1.0", "1.2.0")
        done = healed(teacher, student, data(), steps=steps)
        assert sum(block.steps for block in done) == steps and len(done) == min(steps, 3)


@pytest.mark.parametrize(("taken", "shares"), [(2, [2, 2, 2]), (3, [2, 1.5]), (0.5, [2, 2.75, 5]), (9, [2])])
def test_time_is_shared_by_the_blocks_that_are_left(
    taken: float, shares: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, given = [100.0], list[float]()

    def heal_block(block: Any, fitted: Any, held_out: Any, limits: Limits, *others: Any) -> HealedBlock:
        given.append(limits.seconds)
        now[0] += taken
        return HealedBlock(block.name, 1.0, 1.0, 0, 1)

    monkeypatch.setattr(blocks, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(blocks, "_heal_block", heal_block)
    teacher = deep()
    healed(teacher, sketched(teacher, "1.0.0", "1.1.0", "1.2.0"), data(), limits=Limits(6.0, 1_000_000))
    assert given == shares
