"""SkAutoTuner: suggests points, has them evaluated, keeps what came of them, and says which was best.

All of a study's state is its Record (points asked for, trials that came of them), which a journal can hold, and the
number of trials told. Whoever suggests points keeps no state, so that a resumed study goes on as the first would.
"""

from __future__ import annotations

import importlib
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from panther.errors import ExhaustedError, NothingAllowedError, TunerError, one_line
from panther.progress import Progress
from panther.tuner.arguments import (
    batch_size_of,
    callbacks_of,
    check_names,
    constraints_of,
    executor_of,
    goals_of,
    jobs_of,
    memory_limit_of,
    positive,
    pruner_of,
    whole,
)
from panther.tuner.backends import Question
from panther.tuner.executors import Workers, workers_for
from panther.tuner.journal import Batch, Record, opened
from panther.tuner.objective import Job, Objective, scores_of, takes_keywords
from panther.tuner.pruning import Pruner
from panther.tuner.space import Space
from panther.tuner.strategy import Strategy, ask
from panther.tuner.trial import Params, Scores, Trial, best_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from panther.tuner.analysis import Importance


class StopTuning(Exception):  # noqa: N818 - it is a request, as StopIteration is
    """Raise it in a callback to end the study; what was found so far is its result."""


class SkAutoTuner:
    """Finds the parameters for which a function of yours answers the highest score.

        tuner = SkAutoTuner({"num_terms": (1, 8), "low_rank": (8, 128)}, evaluate, n_initial_points=5, n_iterations=20)
        best_params, best_score = tuner.optimize()

    `parameter_bounds`: by name (low, high), both included, whole numbers when both are; a list of choices; or Integer,
        Float and Category, which also know a logarithmic scale.
    `objective_function`: called with each parameter by name, or by position where its own names are others. It answers
        a number, or a dict with a number for each of the `objectives` and observed constraints. Where it raises, runs
        out of memory or answers NaN or no number, its trial is kept with the reason and never wins.
    `n_initial_points`, `n_iterations`: points spread over the box, and points searched for. No point is paid twice.
    `objectives`: {"accuracy": "max", "latency_ms": "min"} for several goals, or to minimise one.
    `constraints`: functions of the parameters (False: the point is never evaluated), and strings. "low_rank <= 64"
        bounds a parameter; with any other name the string bounds a number of the dict that the objective answers.
    `strategy`: "auto", or another of panther.tuner.strategy. `seed`: the same seed suggests the same points.
    `n_jobs`: processes that evaluate at the same time (-1: one a core; with loky installed, also a lambda).
        `executor`: any concurrent.futures.Executor instead, or a dask.distributed Client; it is left running.
        `batch_size` points are suggested at once (as many as run at the same time, unless given): with the same
        batch_size and seed the study is the same for any n_jobs. `asynchronous=True` suggests a point whenever a trial
        ends: faster, and in an order that depends on timing.
    `repeats`: calls a point; its score is their mean.
    `timeout`: seconds after which nothing is begun; trials in other processes are given up. Trials in this process are
        never cut off. `patience`: trials in a row without a better score that end the study; initial points do not
        count.
    `pruner`: "median" or "halving" end trials that fall behind in what they `report`; or a function like those.
    `callbacks`: called with (tuner, trial) after each trial; StopTuning ends the study.
    `journal`: a file that keeps each trial; where it exists, the study goes on from it.
    `max_memory_gb`: a trial that took more cannot win. Measured around the objective: what torch allocates on the GPU
        where it uses one, else the memory of the process (exact on Linux, else looked at every 5 ms). It needs psutil.
    `baseline`: a score to compare with, such as the dense model's, or a function without parameters that answers it.
    """

    def __init__(
        self,
        parameter_bounds: Mapping[str, Any],
        objective_function: Callable[..., Any],
        n_initial_points: int = 5,
        n_iterations: int = 20,
        *,
        objectives: Mapping[str, Any] | None = None,
        constraints: Sequence[Any] = (),
        strategy: str = "auto",
        seed: int = 0,
        n_jobs: int = 1,
        executor: Any = None,
        batch_size: int | None = None,
        asynchronous: bool = False,
        repeats: int = 1,
        timeout: float | None = None,
        patience: int | None = None,
        pruner: str | Pruner | None = None,
        callbacks: Sequence[Callable[[SkAutoTuner, Trial], Any]] = (),
        journal: str | Path | None = None,
        max_memory_gb: float | None = None,
        baseline: Any = None,
        progress: bool = False,
    ) -> None:
        box = Space.parse(parameter_bounds)
        known, self.limits = constraints_of(constraints, list(box.parameters))
        self.space = Space.parse(parameter_bounds, known)
        self.goals = goals_of(objectives)
        check_names(self.space, self.goals, self.limits)

        self.n_initial_points = whole("n_initial_points", n_initial_points, least=0)
        self.n_iterations = whole("n_iterations", n_iterations, least=0)
        if self.n_initial_points + self.n_iterations < 1:
            raise ValueError("n_initial_points + n_iterations is 0: there would be nothing to evaluate")
        Strategy(strategy, self.n_initial_points, self.n_iterations)
        self.strategy = strategy
        self.seed = whole("seed", seed, least=0, most=2**63 - 1)
        self.n_jobs = jobs_of(n_jobs)
        self.executor = executor_of(executor)
        self.batch_size = batch_size_of(batch_size, self.n_jobs, self.executor)
        self.asynchronous = bool(asynchronous)
        self.timeout = None if timeout is None else positive("timeout", timeout)
        self.patience = None if patience is None else whole("patience", patience, least=1)
        self.callbacks = callbacks_of(callbacks)
        self.journal = None if journal is None else Path(journal)
        self.progress = Progress(bool(progress))
        self.stopped_by = ""  # "trials", "exhausted", "patience", "timeout", "callback", "interrupt" or "executor"

        if not callable(objective_function):
            raise TypeError(f"objective_function must be a function of the parameters, not {objective_function!r}")
        self._objective = Objective(
            objective_function,
            takes_keywords(objective_function, list(self.space.parameters), "objective_function"),
            self.goals,
            self.limits,
            whole("repeats", repeats, least=1),
            memory_limit_of(max_memory_gb),
            pruner_of(pruner, self.goals),
        )
        self._baseline = baseline if callable(baseline) or baseline is None else self._baseline_scores(baseline)
        self._given: list[Params] = []
        self._record = Record()
        self._told: list[Trial] = []
        self._open: deque[Job] = deque()
        self._first_error: Exception | None = None
        self._warned: set[int] = set()

    @staticmethod
    def from_model(model: Any, budget: Any, **options: Any) -> Any:
        """A tuner over the plans for one model within a budget, scored by eval_fn on the compressed model.

            tuner = SkAutoTuner.from_model(model, 0.5, example_inputs=x, calib_data=batches, eval_fn=accuracy)
            tuner.optimize()
            result = tuner.result()  # as from panther.compress

        Arguments are those of panther.tuning.from_model. Models are looked up only here: the tuner knows none.
        """
        return importlib.import_module("panther.tuning").from_model(model, budget, **options)

    # --- what was found ----------------------------------------------------------------------------------------------

    @property
    def trials(self) -> list[Trial]:
        """All trials, in the order of suggestion."""
        return sorted(self._told, key=lambda trial: trial.number)

    @property
    def best_trial(self) -> Trial | None:
        """The trial with the best score, the first of equals; of several goals, the knee of the Pareto front.

        Only trials that broke no limit count; None where there is none.
        """
        if len(self.goals) == 1:
            return best_of(self.trials, self.goals[0])
        from panther.tuner.pareto import knee

        return knee(self.trials, self.goals)

    def expected_best_trial(self) -> Trial | None:
        """The trial whose score a smooth model of all of them expects to be the best; None where none counts.

        With noisy scores the best one observed is often only lucky; without noise it is mostly this one too.

        Raises: ValueError with several goals.
        """
        if len(self.goals) > 1:
            raise ValueError("of several goals there is no one best trial: see pareto_front")
        from panther.tuner.analysis import expected_best

        return expected_best(self.trials, self.space, self.goals[0])

    @property
    def best_params(self) -> Params:
        """Raises: TunerError where no trial has a score."""
        return dict(self._winner().params)

    @property
    def best_score(self) -> float | Scores:
        """A number, or a dict by name for several goals. Raises: TunerError where no trial has a score."""
        scores = self._winner().scores
        return scores[self.goals[0].name] if len(self.goals) == 1 else dict(scores)

    @property
    def pareto_front(self) -> list[tuple[Params, Scores]]:
        """The parameters and scores that no other trial beats in every goal, the best of the first goal first."""
        from panther.tuner.pareto import front

        return [(dict(trial.params), dict(trial.scores)) for trial in front(self.trials, self.goals)]

    @property
    def baseline(self) -> float | Scores | None:
        """What the result is compared with: a number, or a dict by name for several goals; None where not given."""
        scores = self._record.baseline
        if scores is None and isinstance(self._baseline, dict):
            scores = self._baseline
        if scores is None:
            return None
        return scores[self.goals[0].name] if len(self.goals) == 1 else dict(scores)

    def get_evaluation_history(self) -> list[dict[str, float]]:
        """A flat row of numbers a trial: parameters (a category as its place in the list), scores, seconds, trial."""
        from panther.tuner.analysis import rows

        return rows(self.trials, self.space)

    def to_dataframe(self) -> pd.DataFrame:
        """The trials as a pandas data frame, with phase, status and error."""
        from panther.tuner.analysis import data_frame

        return data_frame(self.trials, self.space, self.goals)

    def parameter_importance(self, goal: str | None = None) -> Importance:
        """How much of a score's variation each parameter makes, by which method, and how far that is to be trusted."""
        from panther.tuner.analysis import importance

        return importance(self.trials, self.space, self.goals, goal)

    def plot(self, kind: str = "history", **options: Any) -> Figure:
        """A matplotlib Figure: "history", "slices", "interaction" (two parameters) or "pareto" (two goals).

        `options` are those of the function in panther.tuner.plots, such as goal=, x= and y=.
        """
        from panther.tuner.plots import plot

        return plot(kind, self.trials, self.space, self.goals, **options)

    def correlations(self) -> pd.DataFrame:
        """How parameters and scores go together along straight lines (Pearson)."""
        from panther.tuner.analysis import correlations

        return correlations(self.trials, self.space, self.goals)

    # --- the study ---------------------------------------------------------------------------------------------------

    def try_first(self, *points: Params) -> None:
        """Has these points evaluated before any that are searched for; they count as trials.

        Raises: ValueError where a point is not in the box, or not allowed.
        """
        for point in points:
            try:
                self._given.append(self.space.point(point))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{point!r} is no allowed point of the box: {error}") from None

    def optimize(self) -> tuple[Params, float] | tuple[Params, Scores]:
        """Runs the study, and answers the best parameters and their score (with several goals: scores by name).

        A second call evaluates nothing unless the first one was cut short, or `n_iterations` was raised since. Ctrl-C
        ends the study with the best so far. `stopped_by` says what ended it.

        Raises: TunerError where no trial has a score (the first error of the objective is its cause); JournalError
            where the journal is of another study, damaged or in use; KeyboardInterrupt where nothing was scored yet.
        """
        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        workers = workers_for(self._objective, self.n_jobs, self.executor)
        self.stopped_by = ""
        interrupt: KeyboardInterrupt | None = None
        try:
            with self._recorded(), self.progress.bar("tuning") as move:
                try:
                    self._score_baseline()
                    self._run(workers, deadline, move)
                except StopTuning:
                    self.stopped_by = "callback"
                except KeyboardInterrupt as error:
                    self.stopped_by, interrupt = "interrupt", error
                self._tell_the_rest()
        finally:
            workers.close(abandon=self.stopped_by not in ("trials", "exhausted", "patience"))
        self._first_error = self._first_error or workers.first_error
        if interrupt is not None and self.best_trial is None:
            raise interrupt
        return self._result(workers.stopped)

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """The record of this study: the journal's, or the one in memory."""
        if self.journal is None:
            self._load()
            yield
            return
        with opened(self.journal, self._header()) as record:
            self._record = record
            try:
                self._load()
                yield
            finally:
                record.file = None

    def _load(self) -> None:
        """Takes up what the record holds: trials to tell, and points that were asked for and not evaluated."""
        record = self._record
        self._told = []
        while len(self._told) in record.trials:
            self._told.append(record.trials[len(self._told)])
        if self.asynchronous:
            self._told = list(record.trials.values())
        self._open = deque(
            self._job(batch, number)
            for batch in record.batches
            for number in batch.numbers
            if number not in record.trials
        )

    def _header(self) -> dict[str, Any]:
        """What makes it this study and no other; n_iterations is not among it, so that a study can be made longer."""
        objective = self._objective
        return {
            "space": self.space.describe(),
            "goals": [asdict(goal) for goal in self.goals],
            "limits": [str(limit) for limit in self.limits],
            "strategy": self.strategy,
            "seed": self.seed,
            "initial": self.n_initial_points,
            "batch_size": self.batch_size,
            "asynchronous": self.asynchronous,
            "repeats": objective.repeats,
            "max_memory_gb": objective.max_memory_gb,
            "pruner": None if objective.pruner is None else getattr(objective.pruner, "__name__", "a pruner"),
        }

    def _run(self, workers: Workers, deadline: float | None, move: Callable[[float, str], None]) -> None:
        while True:
            self._refill(workers, deadline)
            if not workers.is_busy:
                self.stopped_by = "executor" if workers.stopped else self.stopped_by
                return
            trial = workers.wait(deadline)
            if trial is None:
                self.stopped_by = "executor" if workers.stopped else "timeout"
                return
            self._record.tell(trial)
            self._tell(trial)
            move(len(self._told) / self._total, self._standing())

    @property
    def _total(self) -> int:
        return self.n_initial_points + self.n_iterations

    def _refill(self, workers: Workers, deadline: float | None) -> None:
        """Starts what can run now: a batch when the one before is done, or a point for each free place."""
        if not self.asynchronous:
            if not workers.is_busy:
                for job in self._next(self.batch_size, workers, deadline):
                    workers.start(job)
            return
        while len(workers.running()) < self.batch_size and not workers.stopped:
            jobs = self._next(1, workers, deadline)
            if not jobs:
                return
            workers.start(jobs[0])

    def _next(self, count: int, workers: Workers, deadline: float | None) -> list[Job]:
        """The next jobs; none where the study ends, with the reason in `stopped_by`."""
        if self._open:
            return [self._open.popleft() for _ in range(min(count, len(self._open)))]
        self.stopped_by = self._reason_to_stop(workers, deadline)
        if self.stopped_by:
            return []
        batch = self._asked(count, [job.params for job in workers.running()])
        if batch is None:
            self.stopped_by = "exhausted"
            return []
        self._record.ask(batch)
        return [self._job(batch, number) for number in batch.numbers]

    def _reason_to_stop(self, workers: Workers, deadline: float | None) -> str:
        if self._record.asked >= self._total:
            return "trials"
        if workers.stopped:
            return "executor"
        if self.patience is not None and self._since_better() >= self.patience:
            return "patience"
        return "timeout" if deadline is not None and time.monotonic() >= deadline else ""

    def _since_better(self) -> int:
        """How many trials in a row, all behind the initial points, were no better than those before."""
        trials = self.trials
        if len(self.goals) == 1:
            best = best_of(trials, self.goals[0])
            last = -1 if best is None else best.number
        else:
            from panther.tuner.pareto import front

            last = max((trial.number for trial in front(trials, self.goals)), default=-1)
        last = max(last, self.n_initial_points - 1)
        return sum(trial.number > last for trial in trials)

    def _asked(self, count: int, pending: list[Params]) -> Batch | None:
        """New points from the strategy, or those given by the user; None where the box has no more."""
        first = self._record.asked
        count = min(count, self._total - first)
        given = {self.space.key(point): point for point in self._given}
        for tried in (params for batch in self._record.batches if given for params in batch.points):
            given.pop(self.space.key(tried), None)
        if given:
            return Batch(first, "given", tuple(list(given.values())[:count]))
        if first < self.n_initial_points:
            count = min(count, self.n_initial_points - first)
        strategy = Strategy(self.strategy, self.n_initial_points, self.n_iterations)
        question = Question(self.space, self.goals, self.limits, self.trials, pending, count, self.seed, first)
        try:
            points, phase = ask(strategy, question)
        except ExhaustedError:
            return None
        except NothingAllowedError as error:
            if not first:
                raise
            warnings.warn(f"the study ends with the points that it has: {error}", UserWarning, stacklevel=2)
            return None
        return Batch(first, phase, tuple(points)) if points else None

    def _job(self, batch: Batch, number: int) -> Job:
        """A point with what it is judged against: trials from before its batch, whatever runs beside it."""
        others: tuple[Any, ...] = ()
        if self._objective.pruner is not None:
            earlier = [self._record.trials[n] for n in range(batch.first) if n in self._record.trials]
            others = tuple(trial.reports for trial in earlier if trial.reports)
        return Job(number, batch.points[number - batch.first], batch.phase, others)

    def _tell(self, trial: Trial) -> None:
        """Takes finished trials in the order of suggestion, or as they come where asynchronous."""
        if self.asynchronous:
            self._take(trial)
            return
        while len(self._told) in self._record.trials:
            self._take(self._record.trials[len(self._told)])

    def _tell_the_rest(self) -> None:
        """Of a study that ended within a batch: finished trials that come after unfinished ones."""
        told = {trial.number for trial in self._told}
        self._told += [trial for number, trial in sorted(self._record.trials.items()) if number not in told]

    def _take(self, trial: Trial) -> None:
        self._told.append(trial)
        if trial.status == "failed" and sum(known.status == "failed" for known in self._told) == 1:
            self.progress.say(f"trial {trial.number} ({_written(trial.params)}) failed: {trial.error}")
        for callback in self.callbacks:
            try:
                callback(self, trial)
            except StopTuning:
                raise
            except Exception as error:
                if id(callback) not in self._warned:
                    self._warned.add(id(callback))
                    name = getattr(callback, "__name__", type(callback).__name__)
                    warnings.warn(
                        f"the callback {name} failed after trial {trial.number} ({one_line(error)}); the study goes on "
                        "and is silent about further failures of it",
                        UserWarning,
                        stacklevel=2,
                    )

    # --- the end -----------------------------------------------------------------------------------------------------

    def _result(self, executor_stopped: str) -> tuple[Params, float] | tuple[Params, Scores]:
        if executor_stopped:
            if self.best_trial is None:
                raise TunerError(f"{executor_stopped}. No trial has a score yet{self._kept()}")
            warnings.warn(
                f"{executor_stopped}. The result is the best of {len(self._told)} trials; call optimize() again with a "
                f"new executor for the rest{self._kept()}",
                UserWarning,
                stacklevel=3,
            )
        winner = self._winner()
        self.progress.say(f"ended ({self.stopped_by}) at {self._standing()}")
        if len(self.goals) == 1:
            return dict(winner.params), winner.scores[self.goals[0].name]
        return dict(winner.params), dict(winner.scores)

    def _winner(self) -> Trial:
        best = self.best_trial
        if best is None:
            raise self._nothing() from self._first_error
        return best

    def _nothing(self) -> TunerError:
        """Why there is no result, with the first error of the objective."""
        trials = self.trials
        if not trials:
            reason = "within the timeout" if self.stopped_by == "timeout" else "yet: call optimize()"
            return TunerError(f"no trial was finished {reason}")
        counts = ", ".join(f"{count} {status}" for status, count in Counter(t.status for t in trials).items())
        bad = next((trial for trial in trials if trial.status == "failed"), trials[0])
        which = f"trial {bad.number} ({_written(bad.params)}): {bad.error}"
        if all(trial.status == "failed" for trial in trials):
            return TunerError(f"all {len(trials)} trials failed{self._kept()}. The first one, {which}")
        return TunerError(f"no trial has a score that counts ({counts}){self._kept()}. For instance {which}")

    def _kept(self) -> str:
        where = "tuner.trials" if self.journal is None else f"tuner.trials and in {self.journal}"
        return f"; all are in {where}" if self._told else ""

    def _standing(self) -> str:
        """How far it is, in a few words."""
        best = self.best_trial
        if best is None:
            return f"{len(self._told)}/{self._total}, no score yet"
        against = "" if self.baseline is None else f" (baseline {_score_text(self.baseline)})"
        return f"{len(self._told)}/{self._total}, best {_score_text(self.best_score)}{against}: {_written(best.params)}"

    def _score_baseline(self) -> None:
        scores, known = self._baseline, self._record.baseline
        if scores is None or (known is not None and (callable(scores) or scores == known)):
            return
        if callable(scores):
            try:
                scores = self._baseline_scores(scores())
            except Exception as error:
                raise TunerError(f"the baseline failed: {one_line(error)}") from error
        self._record.set_baseline(scores)
        self.progress.say(f"baseline: {_score_text(self.baseline)}")

    def _baseline_scores(self, answer: Any) -> Scores:
        try:
            return scores_of(answer, self.goals)
        except TypeError as error:
            raise TypeError(f"baseline: {error}") from error


def _written(params: Params) -> str:
    return ", ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in params.items()
    )


def _score_text(score: float | Scores | None) -> str:
    return _written(score) if isinstance(score, dict) else f"{score:.4g}"
