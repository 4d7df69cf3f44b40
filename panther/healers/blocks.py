"""Each block of the student trained to give what the dense block gives, one after the other: no labels.

Both models walk through the same calls in lockstep. Where a block begins, its inputs in the student and what the dense
block made of its own inputs are at hand for all calls: the block alone is trained on them, put in, and the walk goes
on. So a block also learns to undo what the blocks before it did wrong, and memory does not grow with depth.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from panther.batches import Call, float_outputs, inference, run
from panther.healers.lockstep import Arrival, LeftStepError, Lockstep, stretches
from panther.healers.losses import tensor_loss
from panther.healers.training import Limits, Progressed, Task, train
from panther.nn import SketchedLayer
from panther.nn.narrow import DENSE_SIZES, NORMS, is_narrowed, sizes_of
from panther.nn.on_grid import is_held

Lists = (nn.ModuleList, nn.ModuleDict)  # which never run themselves
Containers = (*Lists, nn.Sequential)


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the modules to heal one by one, in the order of registration; together they hold every sketched layer.

    A block is an element of a list of modules that holds no such list itself (a transformer layer, a residual block);
    outside of lists it is the sketched layer alone.
    """
    return list(_blocks(model, ""))


def _blocks(module: nn.Module, name: str) -> Iterator[str]:
    if is_replaced(module):
        yield name
        return
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        if not _holds_sketched(child):
            continue
        if isinstance(module, Containers) and not isinstance(child, Lists) and not _holds_a_list(child):
            yield path
        else:
            yield from _blocks(child, path)


def is_replaced(module: nn.Module) -> bool:
    """Whether compression put a layer here that can learn from the dense one's outputs: it has as many of them."""
    if is_held(module):
        return True
    if is_narrowed(module):
        return not isinstance(module, NORMS) and sizes_of(module)[1] == vars(module)[DENSE_SIZES][1]
    return isinstance(module, SketchedLayer)


def _holds_sketched(module: nn.Module) -> bool:
    return any(is_replaced(m) for m in module.modules())


def _holds_a_list(module: nn.Module) -> bool:
    """Whether several sketched parts stand in a list somewhere inside."""
    return any(
        isinstance(m, Containers) and sum(_holds_sketched(child) for child in m.children()) > 1
        for m in module.modules()
    )


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Floating-point parameters of a module, without embeddings (few of whose rows a batch ever touches)."""
    embeddings = (nn.Embedding, nn.EmbeddingBag)
    embedded = {id(p) for m in module.modules() if isinstance(m, embeddings) for p in m.parameters()}
    unique = {id(p): p for p in module.parameters() if p.is_floating_point() and id(p) not in embedded}
    return list(unique.values())


@contextlib.contextmanager
def gradients_for(module: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """These parameters of a module, and no others, have gradients for a while, whatever their owner set; none is left.

    cuDNN's recurrent layers refuse a backward pass in evaluation mode, so torch's own run in their place.
    """
    known = list(module.parameters())
    flags, chosen = [p.requires_grad for p in known], {id(p) for p in parameters}
    recurrent = any(isinstance(m, nn.RNNBase) for m in module.modules())
    for parameter in known:
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled and not recurrent):
            yield
    finally:
        for parameter, flag in zip(known, flags, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = None


@dataclass(frozen=True)
class Block:
    """The module in the student, and for every call its inputs there and the dense block's answers.

    parameters: those that are trained; what other parts of the model use as well is not among them.
    """

    name: str
    module: nn.Module
    parameters: Sequence[nn.Parameter]
    calls: Sequence[Call]
    inputs: Sequence[Arrival]
    targets: Sequence[list[Tensor]]

    def loss(self, index: int) -> Tensor:
        """How far the block's answer to one call is from the dense one's, in units of its variance."""
        arrival, masks = self.inputs[index], self.calls[index].masks()
        answers = float_outputs(arrival.run(self.module))
        parts = [
            tensor_loss(got, wanted, masks)
            for got, wanted in zip(answers, self.targets[index], strict=False)
            if got.shape == wanted.shape
        ]
        return torch.stack(parts).mean() if parts else torch.zeros((), dtype=torch.float32, requires_grad=True)

    @torch.no_grad()
    def held_out(self, indices: Sequence[int]) -> float:
        return sum(float(self.loss(i)) for i in indices) / max(1, len(indices))


@dataclass(frozen=True)
class HealedBlock:
    """What training did to one block: its held-out figure before and after, and how many batches it was trained on."""

    name: str
    before: float
    after: float
    steps: int
    batches: int


def heal_blocks(
    teacher: nn.Module,
    student: nn.Module,
    calls: Sequence[Call],
    checks: int,
    limits: Limits,
    *,
    held_bytes: float = math.inf,
    seed: int = 0,
    skip: Sequence[str] = (),
    done: Callable[[HealedBlock], None] | None = None,
    show: Callable[[str, float, float], None] | None = None,
) -> list[HealedBlock]:
    """Train the student's blocks in execution order, in place; the last `checks` calls are held out.

    limits: of all blocks together, seconds with the forward passes between them. Each gets an equal share of what is
        left when its turn comes; with fewer steps than blocks, the first ones get one each.
    held_bytes: of both models' activations at one depth; each block gets as many of the calls as fit there.
    Blocks that the first call runs more than once, or not at all, or that the teacher does not have, are left out.

    skip: blocks that are healed already (a resumed run).
    done: called after each block. show: called after each step with (block, share of it done, held-out figure).

    Raises: LeftStepError when the calls run through the blocks in different orders, or through one twice.
    """
    names = _that_can_be_healed(teacher, student, calls[0])
    if not names:
        return []
    healed: list[HealedBlock] = []
    waiting = [name for name in names if name not in skip]
    end = time.perf_counter() + limits.seconds * len(waiting) / len(names)
    each, more = divmod(limits.steps, len(names))
    steps = {name: each + (place < more) for place, name in enumerate(names)}
    visited: set[str] = set()
    for walk in stretches(student, calls, names, held_bytes):
        checked = min(checks, walk.calls // 2)
        last = len(calls) - checks + checked
        held = [*calls[: min(walk.calls - checked, len(calls) - checks)], *calls[len(calls) - checks : last]]
        fitted, held_out = list(range(len(held) - checked)), list(range(len(held) - checked, len(held)))
        with Lockstep(teacher, held, walk.stops) as dense, Lockstep(student, held, walk.stops) as own:
            while (name := own.advance()) is not None:
                if dense.advance() != name or name in visited:
                    raise LeftStepError("the blocks run more than once, or in different orders")
                visited.add(name)
                if name in skip:
                    continue
                left = end - time.perf_counter()
                share = Limits(left / len(waiting), steps[name], limits.learning_rate)
                waiting.remove(name)
                if left <= 0 or not share.steps:
                    return healed
                with torch.no_grad():
                    module = teacher.get_submodule(name)
                    targets = [_answers(module, arrival) for arrival in dense.arrivals]
                if not any(targets):  # no numbers to compare
                    continue
                module = student.get_submodule(name)
                block = Block(name, module, _own_parameters(student, module), held, own.arrivals, targets)
                result = _heal_block(block, fitted, held_out or fitted, share, seed, show)
                healed.append(result)
                if done is not None:
                    done(result)
    return healed


def share_in_blocks(teacher: nn.Module, student: nn.Module, call: Call) -> float:
    """How much of what can be trained of a student its blocks hold, as far as each runs once and shares nothing."""
    blocks = [student.get_submodule(name) for name in _that_can_be_healed(teacher, student, call)]
    inside = {id(p): p.numel() for block in blocks for p in _own_parameters(student, block)}
    return sum(inside.values()) / max(1, sum(p.numel() for p in trainable(student)))


def _that_can_be_healed(teacher: nn.Module, student: nn.Module, call: Call) -> list[str]:
    """The blocks that both models have and that the call runs once, in the order in which they run."""
    names = _that_run_once(student, find_blocks(student), call)
    return _that_run_once(teacher, [name for name in names if has_module(teacher, name)], call)


def has_module(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _that_run_once(model: nn.Module, names: Sequence[str], call: Call) -> list[str]:
    """Those of the modules that one call runs exactly once, in the order in which they run."""
    runs: Counter[str] = Counter()
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _m, _a, name=name: runs.update([name]))
        for name in names
    ]
    try:
        with inference(model):
            run(model, call)
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name, count in runs.items() if count == 1]


def _own_parameters(model: nn.Module, block: nn.Module) -> list[nn.Parameter]:
    """What can be trained of a block without changing other parts of the model."""
    inside = set(block.modules())
    others = {id(p) for m in model.modules() if m not in inside for p in m.parameters(recurse=False)}
    return [p for p in trainable(block) if id(p) not in others]


def _answers(module: nn.Module, arrival: Arrival) -> list[Tensor]:
    return [t.detach() for t in float_outputs(arrival.run(module))]


def _heal_block(
    block: Block, fitted: Sequence[int], held_out: Sequence[int], limits: Limits, seed: int, show: Any
) -> HealedBlock:
    with gradients_for(block.module, block.parameters):
        task = Task(
            block.parameters,
            lambda i: [block.loss(fitted[i])],
            len(fitted),
            lambda: block.held_out(held_out),
        )
        followed = None if show is None else lambda part, best: show(block.name, part, best)
        trained: Progressed = train(task, limits, seed=seed, show=followed)
    return HealedBlock(block.name, trained.first, trained.best, trained.step, len(fitted))
