"""Gradient steps that end in the best state seen, whatever the rate, the batch or the moment at which they stop."""

from __future__ import annotations

import copy
import math
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from panther.healers.training import (
    CHECKS,
    MOST_HALVINGS,
    MOST_PROBES,
    PROBED_STEPS,
    Limits,
    Muon,
    Progressed,
    Task,
    _find_rate,
    _share,
    orthogonalised,
    train,
)

LONG = 1e6  # seconds
RATE = 0.03  # that suits the net below


class Fit:
    """A small net that learns what another one gives."""

    def __init__(self, *, batches: int = 4, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(1)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        wanted = copy.deepcopy(self.net)
        with torch.no_grad():
            for parameter in (*self.net.parameters(), *wanted.parameters()):
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
            self.inputs = [torch.randn(16, 6, generator=generator).to(dtype) for _ in range(batches + 1)]
            self.targets = [wanted(x.float()).to(dtype) for x in self.inputs]
        self.net.to(dtype)
        self.seen: list[int] = []

    def loss(self, batch: int) -> list[Tensor]:
        self.seen.append(batch)
        return [self._error(batch)]

    def _error(self, batch: int) -> Tensor:
        return (self.net(self.inputs[batch]) - self.targets[batch]).float().square().mean()

    @torch.no_grad()
    def held_out(self) -> float:
        return float(self._error(-1))

    def task(self, **changed: Any) -> Task:
        given = {
            "parameters": list(self.net.parameters()),
            "loss": self.loss,
            "batches": len(self.inputs) - 1,
            "held_out": self.held_out,
        }
        return Task(**{**given, **changed})

    def state(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.net.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_steps_bring_the_held_out_figure_down() -> None:
    fit = Fit()
    run = train(fit.task(), Limits(LONG, 200, RATE))
    assert run.best < 0.1 * run.first and fit.held_out() == run.best
    assert run.step == 200 and run.stopped_by == "its limit"


def test_every_epoch_sees_every_batch_once_and_in_an_order_of_its_own() -> None:
    fit = Fit(batches=6)
    train(fit.task(), Limits(LONG, 24))
    seen = fit.seen[PROBED_STEPS:]
    epochs = [seen[i : i + 6] for i in range(0, 24, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs) and len(set(map(tuple, epochs))) > 1


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not() -> None:
    states = []
    for seed in (0, 0, 1):
        fit = Fit()
        train(fit.task(), Limits(LONG, 30), seed=seed)
        states.append(fit.state())
    assert same(states[0], states[1]) and not same(states[0], states[2])


@pytest.mark.parametrize("place", [0, PROBED_STEPS, PROBED_STEPS + 9])
def test_a_moment_in_which_the_machine_does_something_else_changes_nothing(place: int) -> None:
    class Waits(Fit):
        def loss(self, batch: int) -> list[Tensor]:
            if len(self.seen) == place:
                time.sleep(0.3)
            return super().loss(batch)

    ends = []
    for fit in (Fit(), Waits()):
        assert train(fit.task(), Limits(6.0, 30, RATE)).step == 30
        ends.append(fit.state())
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("timed", [[0.1] * 5, [0.1, 0.1, 9.0]])
def test_the_clock_counts_where_the_steps_would_not_be_done_in_time(timed: list[float]) -> None:
    limits = Limits(10.0, 100)
    late, on_time = Progressed(step=20, seconds=2.5), Progressed(step=20, seconds=1.9)
    for now in (late, on_time):
        now.timed.extend(timed)
    assert _share(late, limits) == 0.25 and _share(on_time, limits) == 0.2
    assert _share(Progressed(step=20, seconds=10.5), limits) >= 1 and _share(Progressed(step=100), limits) == 1
    now = Progressed(step=20, seconds=2.5)  # gone on from a save: nothing is known of the pace
    now.timed.append(9.0)
    assert _share(now, limits) == 0.2


def test_no_time_is_no_step() -> None:
    fit = Fit()
    before = fit.state()
    assert train(fit.task(), Limits(0.0, 100)).step == 0 and same(fit.state(), before)


@pytest.mark.parametrize("rate", [1e6, 1e30])
def test_a_rate_that_diverges_is_halved_and_then_given_up_and_the_first_state_stays(rate: float) -> None:
    fit = Fit()
    before, figure = fit.state(), fit.held_out()
    run = train(fit.task(), Limits(LONG, 300, rate))
    assert run.stopped_by == "it kept diverging" and run.halvings == MOST_HALVINGS + 1
    assert run.rate == 0.25**MOST_PROBES * 0.5**run.halvings and run.step < 300
    assert fit.held_out() <= figure and (run.best < figure or same(fit.state(), before))


def test_training_goes_on_with_half_the_rate_where_it_diverged_once() -> None:
    """The held-out figure jumps at the third check, and what was known to be best comes back."""
    fit, figures = Fit(), []

    def held_out() -> float:
        figures.append(fit.held_out())
        return figures[-1] if len(figures) != 4 else 1e9

    run = train(fit.task(held_out=held_out), Limits(LONG, 120, RATE))
    assert (run.halvings, run.rate, run.stopped_by) == (1, 0.5, "its limit") and run.best < run.first


def test_a_batch_that_is_never_finite_is_left_out_and_the_rest_goes_on() -> None:
    fit = Fit()
    fit.inputs[2] = fit.inputs[2] * math.nan
    run = train(fit.task(), Limits(LONG, 200, RATE))
    assert run.left_out == [2] and run.halvings == 0 and run.step == 200 and run.best < 0.2 * run.first
    assert fit.seen[PROBED_STEPS:].count(2) == 2  # when it came, and once more in the best state


def test_a_loss_that_is_never_finite_ends_the_training_at_once() -> None:
    fit = Fit()
    before = fit.state()
    run = train(fit.task(loss=lambda _: [fit.loss(0)[0] * math.nan]), Limits(LONG, 10_000))
    assert run.stopped_by == "no batch has a finite loss" and run.step <= 8 and same(fit.state(), before)


def test_a_gradient_that_is_not_finite_is_no_step() -> None:
    fit = Fit()
    before = fit.state()

    def loss(batch: int) -> list[Tensor]:  # the square root of zero has an infinite slope
        change = fit.net[0].weight - fit.net[0].weight.detach()
        return [(0 * fit.loss(batch)[0]).sqrt() + change.abs().sqrt().sum()]

    run = train(fit.task(loss=loss), Limits(LONG, 20))
    assert len(run.left_out) == 4 and same(fit.state(), before)
    assert all(p.grad is None for p in fit.net.parameters())


def test_a_held_out_figure_that_is_not_finite_trains_nothing() -> None:
    fit = Fit()
    run = train(fit.task(held_out=lambda: math.nan), Limits(LONG, 20))
    assert run.step == 0 and run.stopped_by == "the held-out figure is not finite" and not fit.seen


def test_no_parameter_and_no_batch_are_nothing_to_train() -> None:
    fit = Fit()
    assert train(fit.task(parameters=[]), Limits(LONG, 20)).stopped_by == "nothing to train"
    assert train(fit.task(batches=0), Limits(LONG, 20)).step == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_whatever_stops_it_in_the_middle_the_best_state_stays(error: type[BaseException]) -> None:
    fit, limits = Fit(), Limits(LONG, 100, RATE)
    before = fit.held_out()

    def loss(batch: int) -> list[Tensor]:
        if len(fit.seen) == PROBED_STEPS + 60:
            raise error
        return fit.loss(batch)

    now = Progressed()
    with pytest.raises(error):
        train(fit.task(loss=loss), limits, went_on=now)
    assert fit.held_out() == now.best < before and now.step == 60


# The rate that is begun with


@pytest.mark.parametrize(("rate", "most"), [(RATE, 1.0), (30.0, 0.5)])
def test_a_rate_whose_first_steps_throw_the_model_off_is_lowered_before_the_run(rate: float, most: float) -> None:
    fit = Fit()
    figure, before = fit.held_out(), fit.state()
    now = Progressed(first=figure, best=figure, best_state=before)
    _find_rate(fit.task(), Limits(LONG, 100, rate), now, seed=0)
    assert now.rate <= most and (now.rate == 1.0) == (rate == RATE)
    assert same(fit.state(), before) and not now.halvings and not now.step


def test_the_search_for_a_rate_takes_a_share_of_the_time_only() -> None:
    fit, figures = Fit(), []

    def held_out() -> float:
        figures.append(1)
        time.sleep(0.02)
        return fit.held_out()

    now = Progressed(first=0.0, best=0.0, best_state=fit.state())  # so that no rate will do
    _find_rate(fit.task(held_out=held_out), Limits(0.19, 100, RATE), now, seed=0)
    assert len(figures) == 1 and now.rate == 0.25
    _find_rate(fit.task(held_out=held_out), Limits(LONG, 100, RATE), now, seed=0)
    assert len(figures) == 1 + MOST_PROBES


def test_where_no_time_is_left_to_judge_a_rate_none_is_tried_to_the_end() -> None:
    fit, now = Fit(), Progressed(first=1.0, best=1.0)
    now.best_state = before = fit.state()
    _find_rate(fit.task(held_out=lambda: pytest.fail("judged")), Limits(1e-9, 100, RATE), now, seed=0)
    assert len(fit.seen) == 1 and now.rate == 1.0 and same(fit.state(), before)


def test_a_run_that_goes_on_is_as_far_on_its_schedule_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from panther.healers import training

    rates: list[float] = []
    real = training._step

    def step(task: Task, optimiser: Any, rate: float, batch: int) -> bool:
        rates.append(rate)
        return real(task, optimiser, rate, batch)

    saved: list[Progressed] = []
    train(Fit().task(), Limits(LONG, 40, RATE), save=lambda now: saved.append(copy.deepcopy(now)))
    on = saved[5]
    assert on.share > 0.4
    on.timed.clear()  # as a file has it, which knows nothing of the pace
    monkeypatch.setattr(training, "_step", step)
    # Time is what limits it: half of it is over, few of the steps are done.
    on.seconds, on.step, on.share = 50.0, 4, 0.5
    train(Fit().task(), Limits(100.0, 10_000, RATE), went_on=on, show=lambda *_: on.__setattr__("halvings", 9))
    assert rates == [pytest.approx(RATE * on.rate * training._schedule(0.5), rel=1e-6)]


def test_a_loss_in_parts_is_their_sum_and_no_two_are_in_memory() -> None:
    whole, parted = Fit(), Fit()
    alive: list[weakref.ref[Tensor]] = []

    def loss(batch: int) -> Iterator[Tensor]:
        for half in (slice(0, 4), slice(4, 16)):
            assert all(ref() is None for ref in alive)
            error = (parted.net(parted.inputs[batch][half]) - parted.targets[batch][half]).square()
            alive.append(weakref.ref(error))
            part = error.sum() / parted.targets[batch].numel()
            del error
            yield part
            del part

    train(whole.task(), Limits(LONG, 20, RATE))
    train(parted.task(loss=loss), Limits(LONG, 20, RATE))
    assert len(alive) == 2 * (20 + PROBED_STEPS)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole.state(), parted.state(), strict=True))


def test_a_part_that_is_not_finite_makes_no_step() -> None:
    fit = Fit()
    before = fit.state()

    def loss(batch: int) -> list[Tensor]:
        return [*fit.loss(batch), fit.loss(batch)[0] * math.nan]

    assert train(fit.task(loss=loss), Limits(LONG, 10)).stopped_by == "no batch has a finite loss"
    assert same(fit.state(), before) and all(p.grad is None for p in fit.net.parameters())


def test_a_run_that_goes_on_keeps_its_rate() -> None:
    fit = Fit()
    saved: list[Progressed] = []
    train(fit.task(), Limits(LONG, 40, 30.0), save=lambda now: saved.append(copy.deepcopy(now)))
    rate, step, count = saved[0].rate, saved[0].step, len(fit.seen)
    on = train(fit.task(), Limits(LONG, 40, 30.0), went_on=saved[0])
    assert on.rate <= rate < 1 and len(fit.seen) - count == 40 - step  # no step was tried beforehand


# Going on from a save


def kept(now: Progressed) -> Progressed:
    """What a checkpoint would hold."""
    return copy.deepcopy(now)


def saves(fit: Fit, limits: Limits, **changed: Any) -> list[Progressed]:
    found: list[Progressed] = []
    train(fit.task(**changed), limits, save=lambda now: found.append(kept(now)))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("place", [0, 4, -2])
def test_a_run_that_goes_on_from_a_save_ends_with_the_same_bits(place: int, dtype: torch.dtype) -> None:
    limits, whole, second = Limits(LONG, 90, RATE), Fit(dtype=dtype), Fit(dtype=dtype)
    saved = saves(whole, limits)
    assert len(saved) >= CHECKS - 1
    run = train(second.task(), limits, went_on=saved[place])
    assert run.step == 90 and same(second.state(), whole.state())


def test_a_run_with_a_parameter_that_has_no_gradient_goes_on_from_a_save_too() -> None:
    """It has no moments either, and those of the others must not move into its place."""
    limits, states = Limits(LONG, 60, RATE), []
    for resumes in (False, True):
        fit = Fit()
        unused = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, 4))]
        parameters = [unused[0], unused[1], *fit.net.parameters()]
        saved = saves(fit, limits, parameters=parameters)[5]
        if resumes:
            again = Fit()
            train(again.task(parameters=[*unused, *again.net.parameters()]), limits, went_on=saved)
            fit = again
        states.append(fit.state())
        assert all(bool((p == 1).all()) for p in unused)
    assert same(*states)


def test_a_run_that_left_a_batch_out_and_halved_its_rate_goes_on_from_a_save_too() -> None:
    def made() -> tuple[Fit, Callable[[], float]]:
        fit = Fit()
        fit.inputs[1] = fit.inputs[1] * math.nan
        return fit, lambda: fit.held_out() if float(fit.net[0].bias.detach()[0]) < largest else 1e9

    largest = float(Fit().net[0].bias.detach()[0]) + 0.1
    limits = Limits(LONG, 80, 0.1)
    whole, held_out = made()
    saved = saves(whole, limits, held_out=held_out)
    place = next(now for now in saved if now.halvings)
    assert place.left_out == [1]
    second, held_out = made()
    train(second.task(held_out=held_out), limits, went_on=place)
    assert same(second.state(), whole.state())


# The optimiser


@pytest.mark.parametrize("shape", [(16, 16), (40, 8), (8, 40)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    """Jordan's coefficients bring all but the smallest to between 0.7 and 1.2 in five rounds."""
    values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)))
    assert float(values.max()) < 1.25 and float(values.median()) > 0.65


def test_orthogonalising_nothing_gives_nothing() -> None:
    assert bool((orthogonalised(torch.zeros(4, 6)) == 0).all())


def test_a_step_is_as_large_for_kernels_as_for_matrices() -> None:
    """A convolution's kernel counts as the matrix (out, everything else)."""
    matrix, kernel = nn.Parameter(torch.zeros(8, 36)), nn.Parameter(torch.zeros(8, 4, 3, 3))
    gradient = torch.randn(8, 36)
    matrix.grad, kernel.grad = gradient, gradient.reshape(8, 4, 3, 3).clone()
    Muon([matrix, kernel], lr=0.1).step()
    assert torch.equal(matrix.detach(), kernel.detach().reshape(8, 36)) and float(matrix.detach().norm()) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_learns_although_single_steps_are_below_its_rounding(dtype: torch.dtype) -> None:
    fit = Fit(dtype=dtype)
    run = train(fit.task(), Limits(LONG, 400, 2e-4))
    assert run.best < 0.95 * run.first and run.halvings == 0
    assert all(p.dtype == dtype and bool(p.isfinite().all()) for p in fit.net.parameters())
