"""Stopping a trial that falls behind: `report` inside of an objective, and the rules that judge what it reports.

A rule sees the trial's own reports and those of earlier trials, as values of which more is better, and says whether the
trial should stop. Only trials that were told before this one was suggested are compared with, so that the verdict does
not depend on what happens to run beside it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from panther.errors import PantherError
from panther.tuner.trial import number_of

Reports = tuple[tuple[float, float], ...]  # (step, value), in the order of reporting
Pruner = Callable[[Reports, Sequence[Reports]], bool]

WARM_UP = 4  # trials to compare with before any is stopped: the median of fewer is mostly chance
KEPT = 3  # one in so many goes on from a rung to the next, which is so many times as long: Li et al.'s usual 3 or 4


class PrunedError(PantherError):
    """Ends a trial that fell behind; raised by `report`, and not an error of the objective."""


@dataclass
class Monitor:
    """What hears the reports of one trial: it keeps them, and asks the rule."""

    pruner: Pruner | None = None
    others: Sequence[Reports] = ()
    maximise: bool = True
    reports: list[tuple[float, float]] = field(default_factory=list)

    def hear(self, value: float, step: float) -> None:
        if math.isnan(value):
            if self.pruner is not None:
                raise PrunedError(f"NaN was reported at step {step:g}")
            return
        self.reports.append((step, value))
        if self.pruner is not None and self.pruner(self._gains(self.reports), [*map(self._gains, self.others)]):
            raise PrunedError(f"{value:g} at step {step:g} is behind the other trials")

    def _gains(self, reports: Sequence[tuple[float, float]]) -> Reports:
        return tuple((step, value if self.maximise else -value) for step, value in reports)


_listening: ContextVar[Monitor | None] = ContextVar("panther_tuner_monitor", default=None)


@contextmanager
def listening(monitor: Monitor) -> Iterator[None]:
    """What is reported inside goes to this monitor."""
    token = _listening.set(monitor)
    try:
        yield
    finally:
        _listening.reset(token)


def report(value: Any, step: float | None = None) -> None:
    """Tells the running study how far a trial is, for instance the accuracy after each epoch; call it in an objective.

    The trial keeps it in `reports`; with a pruner, a trial that falls behind ends here. Outside of a study it does
    nothing. `step` is what trials are compared at: 1, 2, 3, ... unless given. NaN is not kept, and ends a trial where
    there is a pruner. With repeats, only the first is reported and judged.

    Raises: PrunedError to end the trial (let it pass); TypeError where the value or step is no number.
    """
    monitor = _listening.get()
    if monitor is None:
        return
    try:
        number = number_of(value)
        at = float(len(monitor.reports) + 1) if step is None else number_of(step)
    except TypeError as error:
        raise TypeError(f"report(value, step) takes numbers: {error}") from None
    if not math.isfinite(at):
        raise TypeError(f"report(value, step) takes a finite step, not {at}")
    monitor.hear(number, at)


def median(own: Reports, others: Sequence[Reports]) -> bool:
    """Stops a trial whose best value so far is below the median of what earlier trials had at this step.

    Source: Golovin et al., Google Vizier, KDD 2017, section 3.2.2, with values in place of their running means.
    """
    step = own[-1][0]
    reached = [
        [value for at, value in reports if at <= step] for reports in others if reports and reports[-1][0] >= step
    ]
    there = [values[-1] for values in reached if values]
    return len(there) >= WARM_UP and _best(own) < statistics.median(there)


def halving(own: Reports, others: Sequence[Reports]) -> bool:
    """Stops a trial that is not among the best third at its 1st, 3rd, 9th, 27th ... report.

    Compared are all earlier trials that came as far. It is successive halving without waiting for a rung to fill.
    Source: Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020.
    """
    count = len(own)
    if not _is_power(count, KEPT):
        return False
    there = sorted((_best(reports[:count]) for reports in others if len(reports) >= count), reverse=True)
    if len(there) < KEPT:
        return False
    return _best(own) < there[(len(there) + 1) // KEPT - 1]


PRUNERS: dict[str, Pruner] = {"median": median, "halving": halving}


def _best(reports: Reports) -> float:
    return max(value for _, value in reports)


def _is_power(count: int, base: int) -> bool:
    while count % base == 0:
        count //= base
    return count == 1
