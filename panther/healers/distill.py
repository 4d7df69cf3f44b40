"""The whole student trained to give the teacher's answers on unlabelled inputs.

Besides the answers, what comes out of each block counts: errors are corrected where they arise, and every block has a
gradient of its own. Where a block's output is changed in place behind it, in both models, what it became counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from panther.answers import is_classifier, last_dense_call
from panther.batches import Call, device_of, float_outputs, inference, run
from panther.healers.blocks import find_blocks, gradients_for, has_module, is_replaced, trainable
from panther.healers.losses import answer_loss, comparable, held_out_loss, tensor_loss
from panther.healers.training import Limits, Progressed, Task, train

# Weights of the mean loss of what comes out of the blocks, beside the answers' 1. MiniLM, half the FLOPs, held-out loss
# of the answers after 150 equal steps: .132, .120, .118 and .116 at .2, 1, 3 and 10. A single layer says less of what
# matters (keys and queries count by their products only): with all layers watched at 10 as well, .151.
BLOCK_SHARE, LAYER_SHARE = 10.0, 1.0
CACHED_BYTES = 1_000_000_000  # of the teacher's answers, which are the same in every epoch
# A CPU's memory of this size is given back to the system and taken anew by every step, a page at a time (glibc): steps
# of EfficientNet-lite0 with 32 images take 4.9 s whole and 2.3 s in four parts. A part has a few samples all the same,
# since their variance is the unit of the loss.
LARGEST_BYTES, FEWEST_SAMPLES = 32 << 20, 4


@dataclass(frozen=True)
class _Answers:
    """What one model says to one call."""

    output: Any
    hidden: dict[str, list[Tensor]]

    @property
    def size_bytes(self) -> int:
        tensors = [*float_outputs(self.output), *(t for part in self.hidden.values() for t in part)]
        apart = {(t.data_ptr(), t.numel()): t for t in tensors}  # the last block's output may be the answer
        return sum(t.numel() * t.element_size() for t in apart.values())


class _Watched:
    """A model and the outputs of some of its modules."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model, self.names = model, names
        self.hidden: dict[str, list[Tensor]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        hooks = [
            self.model.get_submodule(name).register_forward_hook(
                lambda _m, _a, output, name=name: self.hidden.update({name: float_outputs(output)})
            )
            for name in self.names
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def answer(self, call: Call) -> _Answers:
        self.hidden = {}
        output = comparable(run(self.model, call))
        hidden, self.hidden = self.hidden, {}
        return _Answers(output, hidden)


def distill(
    teacher: nn.Module,
    student: nn.Module,
    calls: Sequence[Call],
    held_out: Sequence[Call],
    limits: Limits,
    *,
    seed: int = 0,
    went_on: Progressed | None = None,
    save: Callable[[Progressed], None] | None = None,
    show: Callable[[float, float], None] | None = None,
) -> Progressed:
    """Train the student in place; it ends in its best state on the held-out calls, which may be the one it came with.

    Works with any student of the teacher's call signature; one without sketched layers learns from the answers alone.
    Both models are used in evaluation mode: dropout is off and the statistics of a BatchNorm stay as they are.

    Cost: a forward and a backward pass of the student a step, and one forward pass of the teacher over all calls
    (again in every epoch where its answers would take more than CACHED_BYTES).
    """
    names = [n for n in find_blocks(student) if n and has_module(teacher, n)]
    shares = {n: LAYER_SHARE if is_replaced(student.get_submodule(n)) else BLOCK_SHARE for n in names}
    dense, own = _Watched(teacher, names), _Watched(student, names)
    classifies = _classifies(teacher, held_out[0] if held_out else calls[0])
    batches = _in_parts(calls, _part_size(student, calls[0]))
    places = [*itertools.accumulate((len(parts) for parts in batches), initial=0)]
    cache = TeacherAnswers(dense, [part for parts in batches for part in parts])
    checked = TeacherAnswers(dense, held_out)

    def loss(index: int) -> Iterator[Tensor]:
        for place, part in enumerate(batches[index], places[index]):
            call = part.to(device_of(student))
            found = _loss(own.answer(call), cache.answer(place), call, shares, classifies=classifies)
            yield found * (part.batch_size / max(1, calls[index].batch_size))

    def figure() -> float:
        return held_out_loss(student, held_out, lambda i: checked.answer(i).output, classifies=classifies)

    parameters = trainable(student)
    with gradients_for(student, parameters), dense.watching(), own.watching():
        return train(
            Task(parameters, loss, len(calls), figure),
            limits,
            seed=seed,
            went_on=went_on,
            save=save,
            show=show,
        )


def _part_size(model: nn.Module, call: Call) -> int:
    """How many samples at a time give no output of a module above LARGEST_BYTES, judged by one call."""
    size = call.batch_size
    if device_of(model).type != "cpu":
        return size
    return max(FEWEST_SAMPLES, size * LARGEST_BYTES // max(1, _largest_output(model, call)))


def _largest_output(model: nn.Module, call: Call) -> int:
    """Bytes of the largest output of any module in one call."""
    largest = 0

    def see(_module: nn.Module, _args: Any, output: Any) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, output.numel() * output.element_size())

    hooks = [module.register_forward_hook(see) for module in model.modules()]
    try:
        with inference(model):
            run(model, call)
    finally:
        for hook in hooks:
            hook.remove()
    return largest


def _in_parts(calls: Sequence[Call], size: int) -> list[list[Call]]:
    """Each call as calls of at most about `size` samples, all of about as many."""
    found = []
    for call in calls:
        whole = call.batch_size
        count = max(1, min(-(-whole // size), whole // FEWEST_SAMPLES))
        ends = [whole * i // count for i in range(count + 1)]
        found.append([call] if count == 1 else [call.rows(*pair) for pair in itertools.pairwise(ends)])
    return found


@torch.no_grad()
def _classifies(teacher: nn.Module, call: Call) -> bool:
    with last_dense_call(teacher) as last:
        return is_classifier(run(teacher, call), last)


def _loss(got: _Answers, wanted: _Answers, call: Call, shares: Mapping[str, float], *, classifies: bool) -> Tensor:
    """The answers' loss and, for every share, that share of the mean loss of what the modules with it put out."""
    loss = answer_loss(got.output, wanted.output, call, classifies=classifies)
    masks = call.masks()
    parts: dict[float, list[Tensor]] = {}
    for name, targets in wanted.hidden.items():
        for y, z in zip(got.hidden.get(name, []), targets, strict=False):
            if y.shape == z.shape and y.requires_grad:
                parts.setdefault(shares[name], []).append(tensor_loss(y, z, masks))
    return loss + sum(share * torch.stack(losses).mean() for share, losses in parts.items())


class TeacherAnswers:
    """The teacher's answers by call, kept as far as memory allows."""

    def __init__(self, teacher: nn.Module | _Watched, calls: Sequence[Call]) -> None:
        self.teacher = teacher if isinstance(teacher, _Watched) else _Watched(teacher, ())
        self.calls = calls
        self.kept: dict[int, _Answers] = {}
        self.size_bytes = 0

    @torch.no_grad()
    def answer(self, index: int) -> _Answers:
        if index in self.kept:
            return self.kept[index]
        found = self.teacher.answer(self.calls[index])
        if self.size_bytes + found.size_bytes <= CACHED_BYTES:
            self.kept[index] = found
            self.size_bytes += found.size_bytes
        return found
