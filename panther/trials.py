"""search="tuned": plans tried on whole models, one evaluation each, and the one that wins.

Layers are decomposed already: a trial slices their factors into a copy of the model. It is scored unhealed, rounded
where the plan stores whole numbers, and not pivoted, which computes the same; what healing does to a score is looked at
in the end.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

from torch import nn

from panther.allocate import allocate
from panther.allocators.base import total, without_slack
from panther.allocators.tuned import (
    TRIALS,
    Problem,
    Search,
    Smallest,
    Tried,
    best_first,
    kept_of,
    problem_of,
    space_of,
    tune,
)
from panther.heal import fingerprint
from panther.limits import Attempt
from panther.pack import pack
from panther.prepared import Prepared, timed
from panther.replace import replace
from panther.spec import DTYPES, Budget, Choice, Plan, Target, TrialReport, Tuning, to_data
from panther.tuner.journal import Batch, Record, ended, opened
from panther.tuner.trial import Trial
from panther.verify import metric

MEASURED = 4  # of the best plans, at most, until one holds what only the whole model tells


@dataclass
class Scored:
    """The score of a plan's whole model, and the seconds that the objective itself took of it."""

    prepared: Prepared
    seconds: float = 0.0

    @property
    def objective(self) -> str:
        return "divergence" if self.prepared.request.eval_fn is None else "eval_fn"

    def __call__(self, choices: Sequence[Choice]) -> float:
        """What eval_fn says; without one, the negative divergence from the dense model's answers.

        Raises: whatever eval_fn raises, and ValueError or TypeError where its answer is no finite number.
        """
        prepared = self.prepared
        if prepared.request.eval_fn is None:
            with self._clock():
                return -prepared.divergence(choices)
        student = student_of(prepared, choices)
        with self._clock():
            return metric(student, prepared.request.eval_fn)

    @contextmanager
    def _clock(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


def student_of(prepared: Prepared, choices: Sequence[Choice]) -> nn.Module:
    """The model of a plan, unhealed; layers that it stores in whole numbers are."""
    model = replace(prepared.request.model, prepared.factors, Plan(tuple(choices)))
    return pack(model, Plan(tuple(choice for choice in choices if choice.grid is not None)))


def can_score(prepared: Prepared) -> bool:
    return prepared.request.eval_fn is not None or prepared.reference.is_comparable


def problem_for(prepared: Prepared, budget: Budget, target: Target, start: Plan | None = None) -> Problem:
    """What the tuned search divides: `target` as the sensitivity plan `start` was made for it."""
    importances = prepared.importances
    dense = total([choices[-1] for choices in prepared.options.values()])
    options = prepared.options_for(budget, start)
    return problem_of(
        options,
        without_slack(target, options),
        lambda layer, error: importances[layer].divergence(error),
        dense,
        counted="params" if budget.limits_size else prepared.counted,
        only_whole=DTYPES[0] not in prepared.request.dtypes,
    )


def tuned_plan(
    prepared: Prepared,
    budget: Budget,
    target: Target,
    start: Plan,
    *,
    known: Sequence[tuple[Plan, float]] = (),
    notes: list[str],
    seconds: dict[str, float],
) -> tuple[Plan, Tuning | None]:
    """The best of the plans that are tried from the sensitivity plan `start` on, and the record of them.

    A budget of max_drop alone looks for the smallest plan that holds it; `known` are plans evaluated before.
    """
    request = prepared.request
    if not can_score(prepared):
        notes.append("the model gives no numbers to compare and there is no eval_fn: the sensitivity plan was taken")
        return start, None
    problem, score, begin = problem_for(prepared, budget, target, start), Scored(prepared), time.perf_counter()
    count = TRIALS if request.n_trials is None else request.n_trials
    smallest = None
    if not budget.limits_size:
        smallest = Smallest(prepared.dense.metric, target.max_drop or 0.0)
    with timed(seconds, "search"), _journal(prepared, problem, budget, count) as record:
        search = tune(
            problem,
            start.choices,
            score,
            trials=max(1, count - len(known)),
            timeout=request.timeout,
            seed=request.seed,
            smallest=smallest,
            given=[(plan.choices, value) for plan, value in known],
            resumed=_told(record),
            tell=lambda trial: _tell(record, trial, request.progress.say),
        )
        best = _held(prepared, budget, target, search)
        tuning = _report(problem, search, best, score, time.perf_counter() - begin, is_smallest=smallest is not None)
        record.end(to_data(tuning))
    notes.extend(_said(tuning))
    return as_plan(prepared, problem, budget, best), tuning


def earlier_tuning(prepared: Prepared, notes: list[str]) -> Tuning | None:
    """The record of the search that found the plan of the request's checkpoint; None where that was not searched for.

    notes: get what they got then.
    """
    request = prepared.request
    if request.checkpoint is None or request.search != "tuned":
        return None
    data = ended(trials_file(request.checkpoint))
    if data is None:
        return None
    tuning = Tuning.from_data(data)
    notes.extend(_said(tuning))
    return tuning


def as_plan(prepared: Prepared, problem: Problem, budget: Budget, tried: Tried) -> Plan:
    """What was tried as a plan, which keeps its knobs."""
    plan = allocate(
        problem.options,
        problem.target,
        prepared.found,
        search=lambda *_, **__: list(tried.choices),
        divergence=problem.divergence,
        evaluate=None,
        budget=str(budget),
        seed=prepared.request.seed,
    )
    return changed(plan, allocator="tuned", knobs=dict(tried.trial.params))


def _held(prepared: Prepared, budget: Budget, target: Target, search: Search) -> Tried:
    """The best that holds the limits which are measured on whole models, where there are any; else the first."""
    if target.model_latency_ms is None and target.peak_memory_bytes is None:
        return search.best

    def used(tried: Tried) -> float:
        plan = Plan(tried.choices)
        return Attempt(plan, target, prepared.measured(plan, budget)).worst()

    start = search.tried[0]
    for tried in itertools.islice(best_first(search), MEASURED):
        if tried.choices == start.choices:
            return start
        if used(tried) <= 1:
            return tried
    return start


# The journal ----------------------------------------------------------------------------------------------------------


def trials_file(checkpoint: Path) -> Path:
    """Where a search keeps its trials beside a checkpoint."""
    return checkpoint.with_name(checkpoint.name + ".trials")


@contextmanager
def _journal(prepared: Prepared, problem: Problem, budget: Budget, count: int) -> Iterator[Record]:
    """The trials' file of the request's checkpoint; without one a record that nobody keeps.

    Raises: JournalError where the file is of another search, or in use.
    """
    request = prepared.request
    if request.checkpoint is None:
        yield Record()
        return
    header = {
        **identity(prepared, budget),
        "seed": request.seed,
        "n_trials": count,
        "space": space_of(problem).describe(),
    }
    with opened(trials_file(request.checkpoint), header) as record:
        yield record


def identity(prepared: Prepared, budget: Budget) -> dict[str, Any]:
    """What must be the same for a trial to count in another run, besides the knobs.

    Without calibration data the example inputs take its place; beside it only their shapes matter.
    """
    request, data = prepared.request, prepared.data
    calls = [request.example] if data is None else [*itertools.islice(data, 1), *data.held_out]
    return {
        "model": prepared.found.fingerprint,
        "weights of the dense model": fingerprint(itertools.chain(request.model.parameters(), request.model.buffers())),
        "inputs": fingerprint(tensor for call in calls for tensor in call.tensors()),
        "batches": None if data is None else len(data),
        "example": [list(tensor.shape) for tensor in request.example.tensors()],
        "layers": [spec.name for spec in prepared.found.sketchable],
        "dtypes": list(request.dtypes),
        "budget": str(budget),
        "objective": Scored(prepared).objective,
    }


def _told(record: Record) -> list[Trial]:
    """The trials of an earlier run, in order and without a gap."""
    return [record.trials[number] for number in itertools.takewhile(record.trials.__contains__, itertools.count())]


def _tell(record: Record, trial: Trial, say: Callable[[str], None]) -> None:
    if trial.number >= record.asked:
        record.ask(Batch(trial.number, trial.phase, (trial.params,)))
    record.tell(trial)
    score = f"{trial.scores['score']:.4g}" if trial.has_scores else trial.error
    say(f"trial {trial.number} ({trial.phase}): {score}, {trial.seconds:.1f} s")


# The report -----------------------------------------------------------------------------------------------------------


def _report(
    problem: Problem, search: Search, best: Tried, score: Scored, seconds: float, *, is_smallest: bool
) -> Tuning:
    def row(tried: Tried) -> TrialReport:
        trial = tried.trial
        return TrialReport(
            trial.number,
            trial.phase,
            trial.scores.get("score"),
            kept_of(problem, tried.choices),
            trial.seconds,
            trial.params,
            trial.error,
        )

    first, won = row(search.tried[0]), row(best)
    return Tuning(
        score.objective,
        (first.score, first.kept),
        (won.score, won.kept),
        tuple(row(tried) for tried in search.tried if tried.is_new or tried is search.tried[0] or tried is best),
        search.stopped_by,
        seconds,
        seconds - score.seconds,
        is_smallest,
    )


def _said(tuning: Tuning) -> Iterator[str]:
    if tuning.objective == "divergence":
        yield (
            "without eval_fn the tuned search went by the divergence from the dense model on calibration samples, "
            "which is no task's score: give eval_fn for that"
        )
    if tuning.stopped_by in ("interrupt", "timeout"):
        what = "Ctrl-C" if tuning.stopped_by == "interrupt" else "its timeout"
        yield f"the tuned search was ended by {what} after {len(tuning.trials)} plans: this is the best of them"
    failed = [trial for trial in tuning.trials if trial.error]
    if failed:
        yield f"{len(failed)} of {len(tuning.trials)} plans could not be scored, the last: {failed[-1].error}"
