"""Gradient steps that cannot make things worse: a loop that blocks and distillation share.

Matrices are stepped by Muon (momentum made orthogonal), everything else by AdamW; the learning rate warms up and falls
along a cosine. A held-out figure is taken now and then: the best state is what remains, a state that diverges is undone
and gone on from with half the learning rate.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from panther.products import product

WARM_UP = 0.05  # of the whole
LAST_RATE = 0.05  # of the peak
CHECKS = 12  # held-out figures over the whole
DIVERGED = 1.5  # times the first held-out figure
MOST_HALVINGS = 3
# Before a run a few steps are tried at the full rate and taken back; it is lowered until they raise the held-out figure
# by less than this. A rise grows with the square of the rate, which tells how far, a quarter at most; the trials end
# after a share of the time. Held-out loss after three steps at 1e-3, 5e-4, 2.5e-4, 1.25e-4, times that before: MiniLM
# 1.06, .98, .97, .97; EfficientNet-lite0 2.2, 1.33, 1.07, 1.00; Whisper 67 at 5e-4. 5e-4 is the best for MiniLM.
PROBED_STEPS, PROBED_RISE, MOST_PROBES = 3, 1.05, 7
PROBING_SHARE, PROBED_AT_ALL = 0.1, 0.5  # of the time: after which no other rate is tried, and not even one to its end
CLIP = 1.0
STEPS_TIMED = 31  # the last ones, whose median is the pace: one that had to wait does not count
MUON_SCALE = 0.2  # times sqrt(larger side): the size of AdamW's steps, so that one learning rate serves both
NEWTON_SCHULZ = (
    3.4445,
    -4.7750,
    2.0315,
)  # Jordan et al., "Muon" (2024): a round lifts small singular values 3.4-fold


@dataclass(frozen=True)
class Task:
    """What is trained: losses of numbered batches, and a figure on others.

    loss: what the loss of a batch is the sum of. Gradients are taken of one part after the other, so that no more than
    one is in memory when they are made one by one.
    """

    parameters: Sequence[nn.Parameter]
    loss: Callable[[int], Iterable[Tensor]]
    batches: int
    held_out: Callable[[], float]


@dataclass(frozen=True)
class Limits:
    """When to stop: after `seconds` or after `steps`, whichever comes first."""

    seconds: float
    steps: int
    learning_rate: float = 5e-4


@dataclass
class Progressed:
    """How far a training run is: enough to go on with it."""

    step: int = 0
    seconds: float = 0.0
    rate: float = 1.0  # of the learning rate; halved when a state diverged
    halvings: int = 0
    first: float = math.inf  # held-out figure before the first step
    best: float = math.inf
    best_state: list[Tensor] = field(default_factory=list)
    checks: int = 0
    left_out: list[int] = field(default_factory=list)  # batches whose loss is not finite whatever the rate
    share: float = 0.0  # of the run that is behind
    stopped_by: str = ""
    now: list[Tensor] = field(default_factory=list)  # parameters, then the optimiser's moments, as last saved
    timed: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS_TIMED))  # seconds; not saved


class Muon(torch.optim.Optimizer):
    """Momentum whose singular values are all made equal, for weights seen as matrices (out, everything else).

    torch.optim.Muon takes 2-d parameters only and multiplies in bfloat16, which a CPU without it does slowly.
    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, momentum: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # none is ever given
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient, momentum = parameter.grad.float(), group["momentum"]
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(gradient)
                average = state["momentum"].lerp_(gradient, 1 - momentum)
                matrix = torch.lerp(gradient, average, momentum).flatten(1)
                scale = MUON_SCALE * math.sqrt(max(matrix.shape))
                update = orthogonalised(matrix).reshape(parameter.shape)
                parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * scale)


def orthogonalised(matrix: Tensor, rounds: int = 4) -> Tensor:
    """A matrix of the same singular vectors whose singular values are near one.

    All rounds of x <- (a + b x x^T + c (x x^T)^2) x are polynomials of the first x x^T, so that they are carried out on
    that smaller matrix, and the large one is multiplied twice in all.

    Shapes: matrix (m, n) -> (m, n). Singular values below a hundredth of the largest stay smaller.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if is_tall else matrix) / (matrix.norm() + 1e-12)
    gram = product(x, x.T)
    whole = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for left in reversed(range(rounds)):
        factor = b * gram + c * product(gram, gram)
        factor.diagonal().add_(a)
        whole = product(factor, whole)
        if left:
            gram = product(product(factor, gram), factor)
    result = product(whole, x)
    return result.T if is_tall else result


class _Optimiser:
    """Muon for matrices, AdamW for the rest; a checkpoint has its moments, so that a resumed run is the same run.

    Half-precision parameters are stepped as float32 copies: most steps are smaller than their rounding.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        half = (torch.float16, torch.bfloat16)
        self.copies = [(p, nn.Parameter(p.detach().float())) for p in parameters if p.dtype in half]
        wide = {id(p): copy for p, copy in self.copies}
        stepped = [wide.get(id(p), p) for p in parameters]
        matrices = [p for p in stepped if p.dim() >= 2 and min(p.flatten(1).shape) > 1]
        known = {id(p) for p in matrices}
        others = [p for p in stepped if id(p) not in known]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(Muon(matrices, lr=0.0))
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0))

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for parameter, wide in self.copies:
            wide.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)
        for parameter, wide in self.copies:
            parameter.copy_(wide)

    def moments(self) -> list[Tensor]:
        """Everything that the next step depends on, besides the parameters; empty where there is nothing yet."""
        nothing: dict[str, Tensor] = {}
        found = [
            part.state.get(parameter, nothing).get(name, torch.empty(0)) for part, parameter, name in self._places()
        ]
        return [*(wide.detach() for _, wide in self.copies), *found]

    def _places(self) -> Iterator[tuple[torch.optim.Optimizer, nn.Parameter, str]]:
        """Where each moment belongs, always in the same order."""
        for part in self.parts:
            names = ("momentum",) if isinstance(part, Muon) else ("step", "exp_avg", "exp_avg_sq")
            for group in part.param_groups:
                for parameter in group["params"]:
                    yield from ((part, parameter, name) for name in names)

    @torch.no_grad()
    def forget(self) -> None:
        """Begin anew, as after a state that diverged."""
        for part in self.parts:
            part.state.clear()
        for parameter, wide in self.copies:
            wide.copy_(parameter)

    @torch.no_grad()
    def go_on_from(self, moments: Sequence[Tensor]) -> None:
        """Take moments that another optimiser of the same parameters gave."""
        for (_, wide), saved in zip(self.copies, moments, strict=False):
            wide.copy_(saved)
        for (part, parameter, name), saved in zip(self._places(), moments[len(self.copies) :], strict=True):
            if saved.numel():
                place = parameter if saved.dim() else torch.empty(0)  # a count of steps stays where it was
                part.state[parameter][name] = saved.to(place.device, copy=True)


def train(
    task: Task,
    limits: Limits,
    *,
    seed: int = 0,
    went_on: Progressed | None = None,
    save: Callable[[Progressed], None] | None = None,
    show: Callable[[float, float], None] | None = None,
) -> Progressed:
    """Step until a limit; the parameters end in the best state that was seen on the held-out data.

    went_on: where an earlier run was when it was saved; the steps from there on are those it would have taken.
    save: called after each held-out check. show: called after each step with (share done, best held-out figure).
    """
    now = went_on or Progressed()
    if not now.best_state:
        now.first = now.best = task.held_out()
        now.best_state = _copy(task.parameters)
    if not math.isfinite(now.first) or not task.parameters or not task.batches:
        now.stopped_by = "the held-out figure is not finite" if task.parameters else "nothing to train"
        return now
    optimiser = _Optimiser(task.parameters)
    if now.now:
        _restore(task.parameters, now.now[: len(task.parameters)])
        optimiser.go_on_from(now.now[len(task.parameters) :])
    try:
        if not now.step:
            _find_rate(task, limits, now, seed)
        _loop(task, limits, optimiser, now, seed, save, show)
        _check(task, now, task.held_out())
    finally:  # also after Ctrl-C, or an error in the middle of a step
        _restore(task.parameters, now.best_state)
    now.stopped_by = _why_it_ended(now, task)
    return now


def _find_rate(task: Task, limits: Limits, now: Progressed, seed: int) -> None:
    """Lower the rate where its first steps would already throw the model off; the parameters stay as they are."""
    start, taken = time.perf_counter(), []
    for tried in range(1, MOST_PROBES + 1):
        begin, optimiser = time.perf_counter(), _Optimiser(task.parameters)
        is_late = False
        for step in range(min(PROBED_STEPS, limits.steps)):
            with _timed(now):
                _step(task, optimiser, limits.learning_rate * now.rate, _batch(task, step, seed))
            is_late = time.perf_counter() - start > PROBED_AT_ALL * limits.seconds
            if is_late:  # nothing is known of the rate, and there is no time to find out
                break
        if is_late:
            _restore(task.parameters, now.best_state)
            break
        figure = task.held_out()
        _restore(task.parameters, now.best_state)
        if figure <= PROBED_RISE * now.first:
            break
        now.rate *= _lowered(figure / max(now.first, 1e-300))
        taken.append(time.perf_counter() - begin)
        if min(taken) * (tried + 1) > PROBING_SHARE * limits.seconds:
            break
    now.seconds += time.perf_counter() - start


@contextmanager
def _timed(now: Progressed) -> Iterator[None]:
    start = time.perf_counter()
    yield
    now.timed.append(time.perf_counter() - start)


def _lowered(rise: float) -> float:
    """What to multiply a rate with that made a figure so many times as large: 1/2 or 1/4."""
    expected = math.sqrt((PROBED_RISE - 1) / (rise - 1)) if math.isfinite(rise) else 0.0
    return 0.25 if expected < 0.35 else 0.5  # the nearer one


def _why_it_ended(now: Progressed, task: Task) -> str:
    if now.halvings > MOST_HALVINGS:
        return "it kept diverging"
    return "no batch has a finite loss" if len(now.left_out) == task.batches else "its limit"


def _loop(
    task: Task,
    limits: Limits,
    optimiser: _Optimiser,
    now: Progressed,
    seed: int,
    save: Callable[[Progressed], None] | None,
    show: Callable[[float, float], None] | None,
) -> None:
    start = time.perf_counter() - now.seconds
    while True:
        now.seconds = time.perf_counter() - start
        share = now.share = max(now.share, _share(now, limits))
        if share >= 1 or now.halvings > MOST_HALVINGS or len(now.left_out) == task.batches:
            return
        batch = _batch(task, now.step, seed)
        stepped = False
        if batch not in now.left_out:
            with _timed(now):
                stepped = _step(task, optimiser, limits.learning_rate * now.rate * _schedule(share), batch)
        now.step += 1
        diverged = not stepped and batch not in now.left_out and not _is_at_fault(task, now, batch)
        if diverged or share >= (now.checks + 1) / CHECKS:
            now.checks += 0 if diverged else 1
            if _check(task, now, math.inf if diverged else task.held_out()):
                optimiser.forget()
            if save is not None:
                now.now = [*_copy(task.parameters), *optimiser.moments()]
                save(now)
                now.now = []
        if show is not None:
            show(share, now.best)


def _share(now: Progressed, limits: Limits) -> float:
    """How much of the run is behind, by the limit that is nearer.

    The clock counts only where the steps that are left would not be done in time at the pace of the last ones, so that
    a run whose steps end first does not depend on it, whatever else the machine does for a moment.
    """
    by_time, by_steps = now.seconds / max(limits.seconds, 1e-9), now.step / max(1, limits.steps)
    pace = median(now.timed) if len(now.timed) >= PROBED_STEPS else 0.0
    is_late = now.seconds + (limits.steps - now.step) * pace > limits.seconds
    return max(by_time, by_steps) if is_late or by_time >= 1 else by_steps


def _schedule(share: float) -> float:
    falling = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * share))
    return min(1.0, (share + 0.002) / WARM_UP) * falling


def _batch(task: Task, step: int, seed: int) -> int:
    """The batch of a step: all of them in every epoch, each time in another order."""
    epoch, place = divmod(step, task.batches)
    order = list(range(task.batches))
    Random(seed * 1_000_003 + epoch).shuffle(order)
    return order[place]


def _step(task: Task, optimiser: _Optimiser, rate: float, batch: int) -> bool:
    """One step; False when the loss or its gradient is not finite."""
    is_finite = _has_finite_gradient(task, batch)
    if is_finite:
        optimiser.step(rate)
    else:
        _drop_gradients(task)
    return is_finite


def _has_finite_gradient(task: Task, batch: int) -> bool:
    """Compute the clipped gradient of a batch's loss, which stays with the parameters."""
    with torch.enable_grad():
        for part in task.loss(batch):
            if not bool(torch.isfinite(part)):
                return False
            if part.requires_grad:  # not so where no answer can be compared
                part.backward()
    norm = nn.utils.clip_grad_norm_([p for p in task.parameters if p.grad is not None], CLIP)
    return bool(torch.isfinite(norm))


def _drop_gradients(task: Task) -> None:
    for parameter in task.parameters:
        parameter.grad = None


def _is_at_fault(task: Task, now: Progressed, batch: int) -> bool:
    """Whether a batch is no better in the best state: then it is left out from here on, and nothing is undone."""
    current = _copy(task.parameters)
    _restore(task.parameters, now.best_state)
    is_finite = _has_finite_gradient(task, batch)
    _drop_gradients(task)
    _restore(task.parameters, current)
    if not is_finite:
        now.left_out.append(batch)
    return not is_finite


def _check(task: Task, now: Progressed, figure: float) -> bool:
    """Take a held-out figure in; True when the state was undone."""
    if figure < now.best:
        now.best, now.best_state = figure, _copy(task.parameters)
        return False
    if figure <= DIVERGED * now.first:
        return False
    _restore(task.parameters, now.best_state)
    now.rate /= 2
    now.halvings += 1
    return True


def _copy(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


@torch.no_grad()
def _restore(parameters: Sequence[nn.Parameter], state: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, state, strict=True):
        parameter.copy_(value)
