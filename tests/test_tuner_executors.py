"""Workers: here, in processes of our own, and in executors of others; what dies costs its trial and no more."""

import math
import os
import pickle
import threading
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import pytest

from panther.tuner import executors
from panther.tuner.executors import Here, Pool, width, workers_for
from panther.tuner.objective import Job, Objective


def square(x):
    return x * x


def deadly(x):
    if x == 2:
        os._exit(1)
    return x


def finish(workers, count, start=0):
    """The trials of so many jobs, by number."""
    for number in range(start, start + count):
        workers.start(Job(number, {"x": number}))
    trials = []
    while workers.is_busy:
        trial = workers.wait(None)
        if trial is None:
            break
        trials.append(trial)
    return sorted(trials, key=lambda trial: trial.number)


def outcomes(trials):
    return [trial.scores.get("score", trial.status) for trial in trials]


class Fake(Executor):
    """Answers at once; breaks as an executor of processes does, with all that it holds, after so many jobs."""

    def __init__(self, breaks_at=None, hold=False):
        self.breaks_at, self.hold, self.held, self.broken, self.closed = breaks_at, hold, [], False, False

    def submit(self, function, objective, job):
        if self.broken:
            raise BrokenProcessPool("not usable anymore")
        future = Future()
        if job.params["x"] == self.breaks_at:
            self.broken = True
            for other in (future, *self.held):
                other.set_exception(BrokenProcessPool("a process was terminated abruptly"))
        elif self.hold:
            self.held.append(future)
        else:
            future.set_result(function(objective, job))
        return future

    def shutdown(self, wait=True, *, kill_workers=False):
        self.closed = True


def test_here_runs_in_order_and_keeps_the_first_error():
    workers = Here(Objective(lambda x: 1 / (x - 1)))
    assert outcomes(finish(workers, 3)) == [-1.0, "failed", 1.0]
    assert isinstance(workers.first_error, ZeroDivisionError)


class TwoParts(Exception):  # noqa: N818
    """Pickled, and not unpickled again: that calls it with one argument."""

    def __init__(self, left, right):
        super().__init__(f"{left} and {right}")


def raising(x):
    if x == 0:
        return x
    if x == 1:
        raise TwoParts(1, 2)
    if x == 2:
        raise ValueError(threading.Lock())
    raise KeyError(x)


@pytest.mark.parametrize(("start", "kind"), [(0, RuntimeError), (2, RuntimeError), (3, KeyError)])
def test_an_executor_keeps_the_first_error_or_its_words(start, kind):
    workers = Pool(Objective(raising), Fake())
    trials = finish(workers, 3, start)
    failed = next(trial for trial in trials if trial.status == "failed")
    taught = (TwoParts,) if start == 0 else ()  # distributed, once imported, has pickle send any exception
    assert type(workers.first_error) in (kind, *taught)
    if type(workers.first_error) is not RuntimeError:
        assert "in raising" in workers.first_error.__notes__[0]
    else:
        assert str(workers.first_error) == failed.error


def test_here_begins_nothing_after_the_deadline():
    workers = Here(Objective(square))
    workers.start(Job(0, {"x": 1}))
    assert workers.wait(time.monotonic() - 1) is None
    assert workers.is_busy and len(workers.running()) == 1


def test_an_executor_of_threads_is_used_and_left_running():
    with ThreadPoolExecutor(2) as executor:
        workers = workers_for(Objective(square), 1, executor)
        assert outcomes(finish(workers, 5)) == [0, 1, 4, 9, 16]
        workers.close(abandon=True)
        assert executor.submit(square, 3).result() == 9


def test_the_deadline_ends_the_wait_for_a_running_trial():
    go = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        workers = Pool(Objective(lambda x: go.wait()), executor)
        workers.start(Job(0, {"x": 0}))
        assert workers.wait(time.monotonic()) is None
        assert [job.number for job in workers.running()] == [0]
        go.set()
        assert workers.wait(None).scores == {"score": 1.0}


def test_our_broken_executor_is_replaced_and_only_the_guilty_job_is_lost():
    made = []

    def make():
        made.append(Fake(breaks_at=2, hold=not made))  # the first holds all that it is given until it breaks
        return made[-1]

    workers = Pool(Objective(square), make=make)
    trials = finish(workers, 4)
    assert outcomes(trials) == [0, 1, "failed", 9]
    assert "the worker process died" in trials[2].error
    assert len(made) == 3 and all(executor.closed for executor in made[:-1])
    assert not workers.stopped


def test_our_executor_that_broke_while_idle_is_replaced():
    made = []

    def make():
        made.append(Fake())
        made[-1].broken = len(made) == 1
        return made[-1]

    assert outcomes(finish(Pool(Objective(square), make=make), 2)) == [0, 1]


def test_somebody_elses_broken_executor_stops_and_accuses_nobody_without_proof():
    workers = Pool(Objective(square), Fake(breaks_at=2, hold=True))
    assert finish(workers, 3) == []
    assert "the executor broke" in workers.stopped and not workers.is_busy


def test_the_only_job_of_a_broken_executor_is_guilty():
    workers = Pool(Objective(square), Fake(breaks_at=0))
    assert outcomes(finish(workers, 1)) == ["failed"]
    assert finish(workers, 1, start=1) == []
    assert workers.stopped


def test_an_executor_that_was_shut_down_stops_the_study():
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    workers = Pool(Objective(square), executor)
    assert finish(workers, 2) == []
    assert "after shutdown" in workers.stopped


class Refusing(Fake):
    def submit(self, function, objective, job):
        if job.number == 0:
            raise pickle.PicklingError("cannot send this")
        future = Future()
        future.set_exception(ImportError("no module named secret"))
        return future


def test_what_an_executor_cannot_send_or_run_is_a_failed_trial():
    first, second = finish(Pool(Objective(square), Refusing()), 2)
    assert first.status == second.status == "failed"
    assert "cannot send this" in first.error and "no module named secret" in second.error


def test_the_width_of_an_executor_is_read_where_it_has_one():
    with ThreadPoolExecutor(3) as executor:
        assert width(executor) == 3
    assert width(Fake()) is None


def test_processes_refuse_what_cannot_be_pickled_before_anything_runs(monkeypatch):
    monkeypatch.setattr(executors, "find_spec", lambda name: None)
    with pytest.raises(TypeError, match="install loky"):
        workers_for(Objective(lambda x: x), 2)
    with ProcessPoolExecutor(1) as executor, pytest.raises(TypeError, match="cannot be sent"):
        workers_for(Objective(lambda x: x), 1, executor)


def test_what_cannot_be_pickled_at_all_is_refused_with_loky_too():
    pytest.importorskip("loky")
    lock = threading.Lock()
    with pytest.raises(TypeError, match="locks"):
        workers_for(Objective(lambda x: lock.locked()), 2)


def test_processes_without_loky_run_functions_of_modules(monkeypatch):
    monkeypatch.setattr(executors, "find_spec", lambda name: None)
    workers = workers_for(Objective(abs, by_keyword=False), 2)
    try:
        workers.start(Job(0, {"x": -3}))
        assert workers.wait(None).scores == {"score": 3.0}
    finally:
        workers.close(abandon=False)


def test_errors_come_from_other_processes():
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        workers = Pool(Objective(math.sqrt, by_keyword=False), executor)
        workers.start(Job(0, {"x": -1}))
        assert workers.wait(None).status == "failed"
    assert isinstance(workers.first_error, ValueError)


def test_loky_runs_lambdas_and_survives_a_worker_that_dies():
    pytest.importorskip("loky")
    workers = workers_for(Objective(lambda x: deadly(x) + 10), 2)
    try:
        trials = finish(workers, 4)
    finally:
        workers.close(abandon=False)
    assert outcomes(trials) == [10, 11, "failed", 13]
    assert "the worker process died" in trials[2].error


def test_abandoned_processes_end():
    loky = pytest.importorskip("loky")
    workers = workers_for(Objective(lambda x: time.sleep(600)), 2)
    assert isinstance(workers._executor, loky.ProcessPoolExecutor)
    workers.start(Job(0, {"x": 0}))
    workers.close(abandon=True)


def test_a_process_pool_of_the_user_that_breaks_stops():
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        workers = Pool(Objective(os._exit, by_keyword=False), executor)
        assert outcomes(finish(workers, 1)) == ["failed"]
        assert workers.stopped
