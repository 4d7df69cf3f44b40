"""SkAutoTuner: whatever the objective does there is a result, the same for the same seed, and no trial is lost."""

from __future__ import annotations

import json
import math
import platform
import signal
import subprocess
import sys
import threading
import warnings
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from panther.tuner import Category, JournalError, SkAutoTuner, StopTuning, TunerError, report
from panther.tuner.strategy import STRATEGIES

BOUNDS = {"num_terms": (1, 8), "low_rank": (8, 64)}


def hill(num_terms, low_rank):
    return -((num_terms - 3) ** 2) - (low_rank - 20) ** 2 / 50


def study(function=hill, bounds=None, initial=3, iterations=7, **options):
    options = {"strategy": "random"} | options
    return SkAutoTuner(BOUNDS if bounds is None else bounds, function, initial, iterations, **options)


def timeless(tuner):
    return [replace(trial, seconds=0.0) for trial in tuner.trials]


# --- results ---------------------------------------------------------------------------------------------------------


def test_the_guides_call_finds_the_best_of_its_trials():
    tuner = SkAutoTuner(
        parameter_bounds=BOUNDS, objective_function=hill, n_initial_points=5, n_iterations=6, strategy="random"
    )
    best_params, best_score = tuner.optimize()
    assert best_score == hill(**best_params) == max(hill(**trial.params) for trial in tuner.trials)
    assert [trial.number for trial in tuner.trials] == list(range(11))
    assert [trial.phase for trial in tuner.trials[:5]] == ["initial"] * 5
    assert (tuner.best_params, tuner.best_score, tuner.stopped_by) == (best_params, best_score, "trials")
    assert all(type(value) is int for value in best_params.values())


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_runs_a_study_and_repeats_no_point(name):
    tuner = study(strategy=name, initial=4, iterations=6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an optional package may be missing
        tuner.optimize()
    assert len({tuple(trial.params.values()) for trial in tuner.trials}) == 10


def test_the_same_seed_is_the_same_study_and_global_random_numbers_are_left_alone():
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first, second, other = study(seed=1), study(seed=1), study(seed=2)
    for tuner in (first, second, other):
        tuner.optimize()
    assert timeless(first) == timeless(second) != timeless(other)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.random.get_state()[1].tolist() == state[1]  # noqa: NPY002


def test_a_box_that_is_exhausted_ends_the_study_early():
    tuner = study(bounds={"num_terms": (1, 2), "low_rank": [8, 16, 32]}, initial=3, iterations=30)
    tuner.optimize()
    assert len(tuner.trials) == 6 and tuner.stopped_by == "exhausted"


def test_one_point_only_and_iterations_without_a_random_start():
    assert study(bounds={"num_terms": (3, 3), "low_rank": (20, 20)}).optimize()[1] == 0.0
    tuner = study(initial=0, iterations=2)
    tuner.optimize()
    assert len(tuner.trials) == 2


def test_scores_of_mixed_types_are_compared_and_nan_never_wins():
    answers = iter([Fraction(1, 2), np.float32(0.25), torch.tensor(0.75), math.nan, None, "0.99", True])
    tuner = study(lambda **p: next(answers), initial=7, iterations=0)
    assert tuner.optimize()[1] == 1.0
    assert [trial.status for trial in tuner.trials] == ["ok"] * 3 + ["failed"] * 3 + ["ok"]


@pytest.mark.parametrize(("answers", "best"), [([1.0, math.inf, 2.0], math.inf), ([-math.inf] * 3, -math.inf)])
def test_infinite_scores_count(answers, best):
    left = iter(answers)
    assert study(lambda **p: next(left), initial=3, iterations=0).optimize()[1] == best


def test_ties_go_to_the_first():
    tuner = study(lambda **p: 1.0)
    assert tuner.optimize()[0] == tuner.trials[0].params


def test_minimising_finds_the_least():
    tuner = study(lambda **p: {"loss": -hill(**p)}, objectives={"loss": min})
    assert tuner.optimize()[1] == min(trial.scores["loss"] for trial in tuner.trials)


def test_positions_are_used_where_names_do_not_fit():
    assert timeless_scores(study(lambda nt, lr: hill(low_rank=lr, num_terms=nt))) == timeless_scores(study())


def timeless_scores(tuner):
    tuner.optimize()
    return [trial.scores for trial in tuner.trials]


def two_goals(num_terms, low_rank):
    return {"accuracy": 1 - 1 / (num_terms * low_rank), "latency_ms": num_terms * low_rank}


def test_several_goals_give_a_front_and_its_knee():
    tuner = study(two_goals, objectives={"accuracy": "max", "latency_ms": "min"})
    params, scores = tuner.optimize()
    assert scores == two_goals(**params)
    assert (params, scores) in tuner.pareto_front
    assert len(tuner.pareto_front) >= 2
    assert tuner.best_score == scores


def test_a_goal_that_is_missing_in_the_answer_says_so():
    tuner = study(lambda **p: {"accuracy": 1}, objectives={"accuracy": "max", "size": "min"})
    with pytest.raises(TunerError, match="lacks 'size'"):
        tuner.optimize()


def test_the_expected_best_is_the_models_and_the_result_the_observed_one():
    noise = iter(np.random.default_rng(1).normal(0, 0.3, 40))
    tuner = study(lambda x: next(noise) - 4 * (x - 0.5) ** 2, {"x": (0.0, 1.0)}, initial=40, iterations=0)
    assert tuner.expected_best_trial() is None
    params, score = tuner.optimize()
    assert score == max(trial.scores["score"] for trial in tuner.trials)
    assert abs(tuner.expected_best_trial().params["x"] - 0.5) < abs(params["x"] - 0.5)


def test_of_several_goals_no_trial_is_the_expected_best():
    with pytest.raises(ValueError, match="pareto_front"):
        study(objectives={"accuracy": "max", "latency_ms": "min"}).expected_best_trial()


def test_repeats_score_the_mean():
    noise = iter(range(100))
    tuner = study(lambda **p: next(noise), repeats=2, initial=2, iterations=0)
    assert tuner.optimize()[1] == 2.5
    assert tuner.trials[1].repeats == ({"score": 2.0}, {"score": 3.0})


def test_history_frame_correlations_and_pictures_are_there():
    tuner = study(bounds={**BOUNDS, "kind": ["a", "b"]}, function=lambda kind, **p: hill(**p))
    tuner.optimize()
    rows = tuner.get_evaluation_history()
    assert len(rows) == 10 and list(rows[0]) == ["num_terms", "low_rank", "kind", "score", "seconds", "trial"]
    assert all(isinstance(value, (int, float)) for row in rows for value in row.values())
    pytest.importorskip("pandas")
    assert {"phase", "status"} <= set(tuner.to_dataframe().columns)
    assert "score" in tuner.correlations()
    assert set(tuner.parameter_importance().shares) == {"num_terms", "low_rank", "kind"}
    pytest.importorskip("matplotlib")
    for kind in ("history", "slices", "interaction"):
        assert tuner.plot(kind) is not None


# --- constraints -----------------------------------------------------------------------------------------------------


def small(low_rank, num_terms):
    return low_rank * num_terms <= 100


def test_what_is_known_to_be_forbidden_is_never_evaluated():
    seen = []

    def function(num_terms, low_rank):
        seen.append((num_terms, low_rank))
        return hill(num_terms, low_rank)

    study(
        function, constraints=[small, lambda nt, lr: nt > 1, "low_rank <= 40", lambda num_terms: num_terms < 8]
    ).optimize()
    assert len(seen) == 10
    assert all(small(lr, nt) and 1 < nt < 8 and lr <= 40 for nt, lr in seen)


def test_observed_limits_keep_trials_from_winning():
    tuner = study(lambda **p: {"score": p["low_rank"], "ms": p["low_rank"]}, constraints="ms <= 30")
    assert tuner.optimize()[1] <= 30
    assert "infeasible" in {trial.status for trial in tuner.trials}


def test_constraints_that_allow_nothing_say_so():
    with pytest.raises(TunerError, match="constraints"):
        study(constraints=[lambda num_terms: False]).optimize()


def test_no_feasible_trial_is_an_error_that_counts_them():
    tuner = study(lambda **p: {"score": 1.0, "ms": 50}, constraints=["ms <= 12"])
    with pytest.raises(TunerError, match=r"10 infeasible.*ms is 50 \(ms <= 12 is wanted\)"):
        tuner.optimize()
    assert len(tuner.trials) == 10


# --- failures --------------------------------------------------------------------------------------------------------


def test_some_failures_are_recorded_and_the_study_goes_on():
    def function(num_terms, low_rank):
        if low_rank > 30:
            raise RuntimeError("too wide\nand more")
        return hill(num_terms, low_rank)

    tuner = study(function, iterations=12)
    assert tuner.optimize()[0]["low_rank"] <= 30
    assert {trial.error for trial in tuner.trials if trial.status == "failed"} == {"RuntimeError: too wide"}


def test_an_objective_that_always_raises_shows_its_first_error(tmp_path):
    count = iter(range(1, 100))

    def function(num_terms, low_rank):
        raise ValueError(f"attempt {next(count)}")

    journal = tmp_path / "study.jsonl"
    tuner = study(function, journal=journal)
    with pytest.raises(TunerError, match=r"all 10 trials failed.*study.jsonl.*ValueError: attempt 1$") as caught:
        tuner.optimize()
    assert str(caught.value.__cause__) == "attempt 1"
    assert sum('"number"' in line for line in journal.read_text().splitlines()) == 10


def test_results_before_the_study_are_an_error_that_says_what_to_call():
    with pytest.raises(TunerError, match=r"optimize\(\)"):
        _ = study().best_params
    assert study().trials == [] and study().best_trial is None and study().pareto_front == []


# --- ends ------------------------------------------------------------------------------------------------------------


def interrupted_at(number):
    count = iter(range(100))

    def function(num_terms, low_rank):
        if next(count) == number:
            raise KeyboardInterrupt
        return hill(num_terms, low_rank)

    return function


def test_ctrl_c_returns_the_best_so_far_and_the_study_can_go_on():
    tuner, whole = study(interrupted_at(4)), study()
    assert tuner.optimize()[1] == tuner.best_score
    assert len(tuner.trials) == 4 and tuner.stopped_by == "interrupt"
    assert tuner.optimize() == whole.optimize()
    assert timeless(tuner) == timeless(whole)


def test_ctrl_c_before_any_score_is_raised():
    with pytest.raises(KeyboardInterrupt):
        study(interrupted_at(0)).optimize()


def test_patience_ends_a_study_that_finds_nothing_better():
    tuner = study(lambda **p: 1.0, patience=4, initial=6, iterations=30)
    tuner.optimize()
    # Points spread over the box need not get better and better: only behind them has the search had its chance.
    assert len(tuner.trials) == 6 + 4 and tuner.stopped_by == "patience"
    scores = iter([1, 1, 2, 1, 1, 1, 9])
    tuner = study(lambda **p: next(scores), patience=3, initial=2, iterations=30)
    assert tuner.optimize()[1] == 2 and len(tuner.trials) == 6


def test_patience_counts_the_front_of_several_goals():
    tuner = study(
        lambda **p: {"a": 1, "b": -len(seen.append(1) or seen)}, objectives={"a": "max", "b": "max"}, patience=3
    )
    seen = []
    tuner.optimize()
    assert len(tuner.trials) == 3 + 3


def test_the_timeout_begins_nothing_more(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    tuner = study(timeout=6)
    tuner.optimize()
    assert 0 < len(tuner.trials) < 10 and tuner.stopped_by == "timeout"


def test_a_timeout_before_any_trial_says_so(monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    with pytest.raises(TunerError, match="within the timeout"):
        study(timeout=6).optimize()


def test_the_timeout_does_not_wait_for_other_workers():
    go = threading.Event()

    def function(num_terms, low_rank):
        if threading.current_thread() is not threading.main_thread() and len(begun) >= 2:
            go.wait()
        begun.append(1)
        return hill(num_terms, low_rank)

    begun = []
    with ThreadPoolExecutor(1) as executor:
        try:
            tuner = study(function, executor=executor, timeout=1.0)
            tuner.optimize()
        finally:
            go.set()
    assert len(tuner.trials) == 2 and tuner.stopped_by == "timeout"


def test_a_second_call_evaluates_nothing_unless_there_is_more_to_do():
    calls = []
    tuner = study(lambda **p: calls.append(1) or hill(**p))
    assert tuner.optimize() == tuner.optimize()
    assert len(calls) == 10
    tuner.n_iterations = 9
    tuner.optimize()
    assert len(calls) == 12 == len(tuner.trials)


# --- callbacks, reports, points of the user ---------------------------------------------------------------------------


def test_callbacks_see_each_trial_and_may_end_the_study():
    seen = []

    def callback(tuner, trial):
        assert tuner.trials[-1] is trial
        seen.append(trial.number)
        if trial.number == 3:
            raise StopTuning

    tuner = study(callbacks=[callback])
    tuner.optimize()
    assert seen == [0, 1, 2, 3] and tuner.stopped_by == "callback"


def test_a_callback_that_fails_is_told_once():
    def callback(tuner, trial):
        raise ValueError(f"bad at {trial.number}")

    tuner = study(callbacks=callback)
    with pytest.warns(UserWarning, match="callback failed after trial 0") as caught:
        tuner.optimize()
    assert len(caught) == 1 and len(tuner.trials) == 10


@pytest.mark.parametrize("name", ["median", "halving"])
def test_trials_that_fall_behind_are_pruned(name):
    def function(num_terms, low_rank):
        for epoch in range(1, 10):
            report(hill(num_terms, low_rank) * 10 / epoch)
        return hill(num_terms, low_rank)

    tuner = study(function, pruner=name, iterations=20)
    pruned = [trial for trial in (tuner.optimize() and tuner.trials) if trial.status == "pruned"]
    assert pruned and all(trial.reports and not trial.scores for trial in pruned)
    best = max(hill(**trial.params) for trial in tuner.trials)
    assert tuner.best_score == best


def test_points_of_the_user_come_first():
    tuner = study()
    tuner.try_first({"low_rank": 20, "num_terms": 3}, {"num_terms": 1, "low_rank": 8})
    assert tuner.optimize() == ({"num_terms": 3, "low_rank": 20}, 0.0)
    assert [trial.phase for trial in tuner.trials[:3]] == ["given", "given", "initial"]
    assert len(tuner.trials) == 10
    with pytest.raises(ValueError, match="no allowed point"):
        tuner.try_first({"num_terms": 0, "low_rank": 8})


def test_a_point_of_the_user_is_the_result_where_no_other_is_found():
    def never_else(rate):
        return rate == 0.125

    tuner = study(lambda rate: rate, {"rate": (0.0, 1.0)}, constraints=[never_else])
    tuner.try_first({"rate": 0.125})
    with pytest.warns(UserWarning, match=r"ends with the points that it has: none of .* fulfils the constraints"):
        assert tuner.optimize() == ({"rate": 0.125}, 0.125)
    assert tuner.stopped_by == "exhausted"
    with pytest.raises(TunerError, match="fulfils the constraints"):
        study(lambda rate: rate, {"rate": (0.0, 1.0)}, constraints=[never_else]).optimize()


def test_a_constraint_that_raises_in_the_middle_is_an_error():
    def breaks(num_terms, low_rank):
        return 1 / (num_terms - 3) < 9

    with pytest.raises(TunerError, match=r"the constraint breaks failed on .*ZeroDivisionError"):
        study(constraints=[breaks], iterations=60).optimize()


def test_points_of_the_user_are_read_as_bounds_are():
    box = {"rate": (0.0, 1.0), "rank": (1, 9), "kind": ["a", 2.0]}
    tuner = study(lambda rate, rank, kind: rate * rank, box, initial=2, iterations=0)
    tuner.try_first({"rate": 1, "rank": np.int64(3), "kind": np.str_("a")})
    tuner.try_first({"kind": 2, "rank": 9, "rate": np.float64(0.5)})
    tuner.optimize()
    given = [{"rate": 1.0, "rank": 3, "kind": "a"}, {"rate": 0.5, "rank": 9, "kind": 2.0}]
    assert [trial.params for trial in tuner.trials] == given
    types = [[type(value) for value in trial.params.values()] for trial in tuner.trials]
    assert types == [[float, int, str], [float, int, float]]


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        ({"num_terms": 1}, "it must be a dict of num_terms, low_rank"),
        ({"num_terms": 1, "low_rank": 8, "other": 1}, "it must be a dict of"),
        ([1, 8], "it must be a dict of"),
        ({"num_terms": 0, "low_rank": 8}, r"num_terms=0 is not in Integer\(low=1, high=8"),
        ({"num_terms": 1.5, "low_rank": 8}, "num_terms must be a whole number, not 1.5"),
        ({"num_terms": True, "low_rank": 8}, "num_terms must be a whole number, not True"),
        ({"num_terms": 2, "low_rank": 9}, r"the constraints \(is_even\) do not hold there"),
    ],
)
def test_a_point_that_is_not_allowed_says_why(point, reason):
    def is_even(num_terms, low_rank):
        return low_rank % 2 == 0

    with pytest.raises(ValueError, match=f"is no allowed point of the box: {reason}"):
        study(constraints=[is_even]).try_first(point)


def test_a_study_that_goes_on_takes_another_number_as_its_baseline(tmp_path):
    calls, journal = [], tmp_path / "j"
    for baseline, wanted in ((0.5, 0.5), (0.75, 0.75), (None, 0.75), (lambda: calls.append(1) or 0.1, 0.75), (1, 1.0)):
        tuner = study(journal=journal, baseline=baseline)
        tuner.optimize()
        assert tuner.baseline == wanted
    assert not calls  # an answer is known


def test_the_baseline_is_a_number_or_a_function_called_once():
    calls = []
    tuner = study(baseline=lambda: calls.append(1) or torch.tensor(0.5))
    assert tuner.baseline is None
    tuner.optimize()
    tuner.optimize()
    assert tuner.baseline == 0.5 and len(calls) == 1
    assert study(baseline=2).baseline == 2.0
    goals = {"accuracy": "max", "latency_ms": "min"}
    assert study(two_goals, objectives=goals, baseline={"accuracy": 1, "latency_ms": 9}).baseline["latency_ms"] == 9.0
    with pytest.raises(TunerError, match="baseline failed: ZeroDivisionError"):
        study(baseline=lambda: 1 / 0).optimize()


def test_progress_is_written_to_stderr_only(capsys):
    study(progress=True, baseline=-1).optimize()
    out, err = capsys.readouterr()
    assert out == "" and "best" in err and "baseline -1" in err


def test_memory_is_limited_around_the_objective():
    pytest.importorskip("psutil")

    def function(num_terms, low_rank):
        held = bytearray(2**20 * (96 if num_terms > 4 else 1))
        held[::4096] = b"x" * len(held[::4096])
        return num_terms

    tuner = study(
        function, bounds={"num_terms": (1, 8), "low_rank": (8, 8)}, max_memory_gb=0.05, initial=8, iterations=0
    )
    assert tuner.optimize()[1] == 4
    assert {trial.status for trial in tuner.trials} == {"ok", "over_memory"}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators say nothing of what they keep")
def test_memory_that_malloc_kept_of_an_earlier_trial_is_counted_again():
    pytest.importorskip("psutil")
    pins = []

    def function(num_terms, low_rank):
        held = [bytearray(b"x" * 100_000) for _ in range(800)]
        pins.append(bytearray(b"x" * 120_000))  # at the top of the heap: what is freed below it stays with malloc
        return len(held) + num_terms

    tuner = study(function, bounds={"num_terms": (1, 4), "low_rank": (8, 8)}, max_memory_gb=1, initial=4, iterations=0)
    tuner.optimize()
    assert len(tuner.trials) == 4
    assert all(trial.memory_gb > 0.05 for trial in tuner.trials)


# --- many at once ----------------------------------------------------------------------------------------------------


class Backwards(Executor):
    """Finishes what it was given in the opposite order, when the next but one is asked for."""

    def __init__(self):
        self.held = []

    def submit(self, function, *args):
        future = Future()
        self.held.append((future, function, args))
        if len(self.held) == 3:
            for late, call, given in reversed(self.held):
                late.set_result(call(*given))
            self.held.clear()
        return future


def test_a_study_is_the_same_whatever_finishes_first():
    here, backwards = (
        study(batch_size=3, initial=6, iterations=6),
        study(executor=Backwards(), batch_size=3, initial=6, iterations=6),
    )
    here.optimize()
    seen = []
    backwards.callbacks = (lambda tuner, trial: seen.append(trial.number),)
    backwards.optimize()
    assert timeless(here) == timeless(backwards)
    assert seen == list(range(12))


def test_pruning_is_the_same_whatever_finishes_first():
    def function(num_terms, low_rank):
        report(hill(num_terms, low_rank))
        return hill(num_terms, low_rank)

    options = {"batch_size": 3, "initial": 6, "iterations": 12, "pruner": "median"}
    here, backwards = study(function, **options), study(function, executor=Backwards(), **options)
    here.optimize()
    backwards.optimize()
    assert timeless(here) == timeless(backwards)
    assert "pruned" in {trial.status for trial in here.trials}


def test_asynchronous_studies_keep_all_places_busy_and_repeat_no_point():
    most, running, lock = [0], [0], threading.Lock()
    both = threading.Barrier(2)

    def function(num_terms, low_rank):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        both.wait(60)
        with lock:
            running[0] -= 1
        return hill(num_terms, low_rank)

    with ThreadPoolExecutor(2) as executor:
        tuner = study(function, executor=executor, asynchronous=True)
        tuner.optimize()
    assert most[0] == 2 and tuner.batch_size == 2
    assert [trial.number for trial in tuner.trials] == list(range(10))
    assert len({tuple(trial.params.values()) for trial in tuner.trials}) == 10


class Breaking(Executor):
    def __init__(self, after):
        self.left = after

    def submit(self, function, *args):
        self.left -= 1
        if self.left < 0:
            raise BrokenProcessPool("gone")
        future = Future()
        future.set_result(function(*args))
        return future


def test_an_executor_that_breaks_leaves_the_best_so_far_and_the_rest_to_do(tmp_path):
    journal = tmp_path / "study.jsonl"
    tuner = study(executor=Breaking(4), batch_size=1, journal=journal)
    with pytest.warns(UserWarning, match="gone"):
        tuner.optimize()
    assert len(tuner.trials) == 4 and tuner.stopped_by == "executor"
    resumed, whole = study(journal=journal), study()
    assert resumed.optimize() == whole.optimize()
    assert timeless(resumed) == timeless(whole)
    with pytest.raises(TunerError, match="gone"):
        study(executor=Breaking(0), batch_size=1).optimize()


def test_loky_gives_the_study_of_one_process():
    pytest.importorskip("loky")
    here, there = study(batch_size=2, initial=2, iterations=2), study(n_jobs=2, initial=2, iterations=2)
    here.optimize()
    there.optimize()
    assert timeless(here) == timeless(there)


@pytest.mark.filterwarnings("ignore")  # dask's and its dependencies' own
def test_a_dask_cluster_of_two_processes_gives_the_study_of_one():
    distributed = pytest.importorskip("distributed")
    here = study(batch_size=2, initial=2, iterations=2)
    here.optimize()
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        client.wait_for_workers(2)
        for executor in (client, client.get_executor()):
            there = study(executor=executor, initial=2, iterations=2)
            there.optimize()
            assert there.batch_size == 2
            assert timeless(here) == timeless(there)


# --- the journal -----------------------------------------------------------------------------------------------------


def test_a_journal_is_gone_on_from_without_paying_again(tmp_path):
    journal, calls = tmp_path / "study.jsonl", []
    counted = lambda **p: calls.append(1) or hill(**p)  # noqa: E731
    first = study(counted, journal=journal, baseline=lambda: calls.append(1) or 0.25)
    best = first.optimize()
    assert len(calls) == 11
    second = study(counted, journal=journal, baseline=lambda: calls.append(1) or 0.25)
    assert second.optimize() == best
    assert second.trials == first.trials and second.baseline == 0.25
    assert len(calls) == 11
    longer = study(counted, journal=journal, iterations=9)
    longer.optimize()
    assert len(calls) == 13 and len(longer.trials) == 12


@pytest.mark.parametrize("kept", [1, 2, 3, 5, 8, 12, 13, 14])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_journal_cut_anywhere_leads_to_the_same_study(tmp_path, kept, batch):
    journal = tmp_path / "study.jsonl"
    whole = study(journal=journal, batch_size=batch)
    whole.optimize()
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:kept]) + lines[kept][: len(lines[kept]) // 2])
    resumed = study(journal=journal, batch_size=batch)
    resumed.optimize()
    assert timeless(resumed) == timeless(whole)


DIFFERENT = {
    "another box": {"bounds": {"num_terms": (1, 9), "low_rank": (8, 64)}},
    "another seed": {"seed": 5},
    "another start": {"initial": 4},
    "a constraint": {"constraints": ["low_rank <= 9"]},
    "an observed limit": {"constraints": ["ms <= 9"]},
    "another goal": {"objectives": {"accuracy": "max"}},
    "another strategy": {"strategy": "tpe"},
    "another batch size": {"batch_size": 2},
    "repeats": {"repeats": 2},
    "a pruner": {"pruner": "median"},
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_journal_of_another_study_is_refused_and_kept(tmp_path, name):
    journal = tmp_path / "study.jsonl"
    study(journal=journal).optimize()
    before = journal.read_bytes()
    with pytest.raises(JournalError, match="another study"):
        study(journal=journal, **DIFFERENT[name]).optimize()
    assert journal.read_bytes() == before


def test_a_journal_in_use_is_refused_from_inside_the_study(tmp_path):
    journal = tmp_path / "study.jsonl"

    def callback(tuner, trial):
        with pytest.raises(JournalError, match="in use"):
            study(journal=journal).optimize()

    assert len(study(journal=journal, callbacks=[callback]).optimize()) == 2


KILLED = """
import os, signal, sys
from panther.tuner import SkAutoTuner

def hill(num_terms, low_rank, rate, kind):
    if len(sys.argv) > 2 and sum('"number"' in line for line in open(sys.argv[1])) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return -((num_terms - 3) ** 2) - (low_rank - 20) ** 2 / 50 + rate + (kind == "b")

bounds = {"num_terms": (1, 8), "low_rank": (8, 64), "rate": (1e-5, 0.1), "kind": ["a", "b"]}
SkAutoTuner(bounds, hill, 3, 6, batch_size=2, journal=sys.argv[1]).optimize()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
def test_a_study_that_is_killed_goes_on_to_the_same_trials(tmp_path):
    def run(journal, *killed_at):
        command = [sys.executable, "-c", KILLED, str(tmp_path / journal), *killed_at]
        return subprocess.run(command, check=False, capture_output=True, text=True)

    def trials(journal):
        found = [json.loads(line) for line in (tmp_path / journal).read_text().splitlines()]
        return sorted(({**t, "seconds": 0} for t in found if "number" in t), key=lambda t: t["number"])

    assert run("whole").returncode == 0
    assert run("killed", "4").returncode == -signal.SIGKILL
    assert len(trials("killed")) == 4
    assert run("killed").returncode == 0
    assert trials("killed") == trials("whole") and len(trials("whole")) == 9


# --- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "empty bounds": ({"bounds": {}}, "empty"),
    "low above high": ({"bounds": {"num_terms": (5, 2), "low_rank": (1, 2)}}, "num_terms"),
    "NaN bounds": ({"bounds": {"num_terms": (math.nan, 2.0), "low_rank": (1, 2)}}, "num_terms"),
    "no bounds": ({"bounds": 3}, "bounds"),
    "no function": ({"function": 3}, "objective_function"),
    "a function of something else": ({"function": lambda a: 0}, "num_terms, low_rank"),
    "nothing to do": ({"initial": 0, "iterations": 0}, "nothing to evaluate"),
    "negative start": ({"initial": -1}, "n_initial_points"),
    "negative iterations": ({"iterations": -1}, "n_iterations"),
    "half an iteration": ({"iterations": 2.5}, "n_iterations"),
    "a boolean": ({"iterations": True}, "n_iterations"),
    "unknown strategy": ({"strategy": "magic"}, "magic"),
    "negative seed": ({"seed": -1}, "seed"),
    "huge seed": ({"seed": 2**63}, "seed must be at most 9223372036854775807"),
    "no jobs": ({"n_jobs": 0}, "n_jobs"),
    "no executor": ({"executor": 3}, "executor"),
    "an executor without a width": ({"executor": Backwards()}, "batch_size"),
    "an empty batch": ({"batch_size": 0}, "batch_size"),
    "no repeats": ({"repeats": 0}, "repeats"),
    "no time": ({"timeout": 0}, "timeout"),
    "NaN time": ({"timeout": math.nan}, "timeout"),
    "time as text": ({"timeout": "1h"}, "timeout"),
    "no patience": ({"patience": 0}, "patience"),
    "unknown pruner": ({"pruner": "magic"}, "'median', 'halving'"),
    "a pruner of no kind": ({"pruner": 3}, "pruner"),
    "a pruner for several goals": ({"pruner": "median", "objectives": {"a": "max", "b": "min"}}, "several objectives"),
    "no callback": ({"callbacks": [3]}, "callback"),
    "no memory": ({"max_memory_gb": 0}, "max_memory_gb"),
    "goals as a list": ({"objectives": ["accuracy"]}, "objectives"),
    "no goals": ({"objectives": {}}, "objectives"),
    "a goal of no direction": ({"objectives": {"accuracy": "up"}}, "'max' or 'min'"),
    "a goal of another function": ({"objectives": {"accuracy": abs}}, "'max' or 'min'"),
    "a goal of no name": ({"objectives": {3: "max"}}, "name"),
    "a goal named as a parameter": ({"objectives": {"low_rank": "min"}}, "low_rank"),
    "a goal named as a column": ({"objectives": {"seconds": "min"}}, "column"),
    "a goal named as a column of the frame": ({"objectives": {"status": "min"}}, "column"),
    "a constraint of no kind": ({"constraints": [3]}, "constraint"),
    "a constraint that says nothing": ({"constraints": ["ms"]}, "not understood"),
    "a constraint of two names": ({"constraints": ["ms <= low_rank"]}, "not understood"),
    "a strict constraint": ({"constraints": ["ms < 3"]}, "<= or >="),
    "a constraint of something else": ({"constraints": [lambda a: True]}, "constraint <lambda>"),
    "a baseline of no number": ({"baseline": "good"}, "baseline"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_at_once_and_named(name):
    options, reason = BAD[name]
    with pytest.raises((ValueError, TypeError)) as caught:
        study(**options)
    assert reason in str(caught.value)


def test_names_of_columns_are_refused_as_parameters():
    with pytest.raises(ValueError, match="'trial'"):
        study(lambda trial: 0, {"trial": (1, 2)})


def test_categories_and_floats_reach_the_function_as_they_are():
    seen = []
    bounds = {"kind": Category(["svd", None, 3]), "rate": (0.5, 1.0)}
    study(lambda kind, rate: seen.append((kind, rate)) or 1.0, bounds).optimize()
    assert {kind for kind, _ in seen} <= {"svd", None, 3}
    assert all(type(rate) is float for _, rate in seen)


def test_importing_the_tuner_leaves_optional_packages_alone():
    heavy = ["hyperopt", "botorch", "gpytorch", "pandas", "matplotlib", "psutil", "loky", "distributed", "rich"]
    code = f"import sys, panther.tuner; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
