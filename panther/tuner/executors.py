"""Where trials run: here, in processes of our own, or in any concurrent.futures.Executor.

Both kinds of workers are used alike: `start` takes jobs, `wait` gives back one finished trial after the other, in the
order of finishing. A process that dies costs the trial that it ran.
"""

from __future__ import annotations

import math
import os
import pickle
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, Protocol

from panther.errors import one_line
from panther.tuner.objective import Job, Objective, evaluate, lost
from panther.tuner.trial import Trial

ERROR_BYTES = 2**20  # of an exception; one that holds more is sent as words only
SETTLED = 10  # seconds until a broken executor has told all that it held; it takes milliseconds

Sent = tuple[Trial, bytes | None]  # a trial, and what its function raised


class Workers(Protocol):
    """What the tuner needs of them."""

    stopped: str  # why no more trials can run; "" while they can
    first_error: Exception | None  # what the function raised in the first of the trials that it failed

    @property
    def is_busy(self) -> bool: ...

    def start(self, job: Job) -> None: ...

    def wait(self, deadline: float | None) -> Trial | None:
        """The next finished trial; None when the deadline (of time.monotonic) passed first, or they stopped."""

    def running(self) -> list[Job]: ...

    def close(self, abandon: bool) -> None: ...


class Here:
    """Runs trials in this process, one after the other; a running one is not stopped by a deadline."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.stopped = ""
        self.first_error: Exception | None = None
        self._jobs: deque[Job] = deque()

    @property
    def is_busy(self) -> bool:
        return bool(self._jobs)

    def start(self, job: Job) -> None:
        self._jobs.append(job)

    def wait(self, deadline: float | None) -> Trial | None:
        if deadline is not None and time.monotonic() >= deadline:
            return None
        return evaluate(self.objective, self._jobs.popleft(), self._keep)

    def running(self) -> list[Job]:
        return list(self._jobs)

    def close(self, abandon: bool) -> None:
        self._jobs.clear()

    def _keep(self, error: Exception) -> None:
        self.first_error = self.first_error or error


class Pool:
    """Runs trials in an executor.

    When a worker dies, an executor of processes breaks, and all that it held is lost without saying which job killed
    it. Where we can make another (`make`), what was lost runs again, one job at a time, so that only the guilty one
    is lost for good. An executor of somebody else's stops, and jobs of which it is not known are left undone.
    """

    def __init__(self, objective: Objective, executor: Any = None, make: Callable[[], Any] | None = None) -> None:
        self.objective = objective
        self.stopped = ""
        self._make = make
        self._executor = make() if make is not None else executor
        self._waiting: deque[Job] = deque()
        self._suspects: deque[Job] = deque()
        self._alone = False  # a suspect is running
        self._futures: dict[Future[Sent], Job] = {}
        self._unsent: deque[Trial] = deque()
        self.first_error: Exception | None = None
        self._first_failed = math.inf  # the number of its trial

    @property
    def is_busy(self) -> bool:
        return bool(self._futures or self._suspects or self._waiting or self._unsent)

    def start(self, job: Job) -> None:
        self._waiting.append(job)
        self._fill()

    def running(self) -> list[Job]:
        jobs = [*self._futures.values(), *self._suspects, *self._waiting]
        return sorted(jobs, key=lambda job: job.number)

    def wait(self, deadline: float | None) -> Trial | None:
        while True:
            self._fill()
            if self._unsent:
                return self._unsent.popleft()
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            done = wait(self._futures, left, FIRST_COMPLETED).done
            if not done:  # the deadline passed, or nothing is left because the executor stopped
                return None
            trial = self._result(min(done, key=lambda future: self._futures[future].number))
            if trial is not None:
                return trial

    def close(self, abandon: bool) -> None:
        """Lets go of the workers; `abandon` does not wait for what still runs."""
        for future in self._futures:
            future.cancel()
        if self._make is not None:
            _shut_down(self._executor, abandon)
        self._futures.clear()
        self._waiting.clear()
        self._suspects.clear()

    def _fill(self) -> None:
        """Hands out what waits; suspects one at a time, with nothing beside them."""
        if self._suspects and not self._futures:
            self._alone = self._submit(self._suspects.popleft())
        while self._waiting and not (self._suspects or self._alone):
            job = self._waiting.popleft()
            if not self._submit(job):
                self._waiting.appendleft(job)
                return

    def _submit(self, job: Job) -> bool:
        """Hands a job out; False where that has to wait until what a broken executor lost is known."""
        try:
            try:
                future = self._executor.submit(_evaluated, self.objective, job)
            except BrokenExecutor:
                if self._make is None:
                    raise
                if self._futures:
                    return False
                self._rebuild()  # it broke with nothing running
                future = self._executor.submit(_evaluated, self.objective, job)
        except Exception as error:
            if isinstance(error, RuntimeError):  # broken, or shut down by its owner
                self.stopped = self.stopped or f"the executor takes no more trials ({one_line(error)})"
                self._waiting.clear()
            else:
                self._unsent.append(lost(job, f"the trial could not be handed to the executor: {one_line(error)}"))
        else:
            self._futures[future] = job
        return True

    def _result(self, future: Future[Sent]) -> Trial | None:
        """What a finished future holds; None where its job will run again."""
        job = self._futures.pop(future)
        self._alone = False
        try:
            trial, raised = future.result()
        except BrokenExecutor as error:
            accused = [job, *self._also_broken()]
            if self._make is None:
                self.stopped = f"the executor broke ({one_line(error)})"
            else:
                self._rebuild()
            if len(accused) == 1:
                return _died(job, error)
            if self._make is None:
                return None
            self._suspects.extend(sorted(accused, key=lambda job: job.number))
            return None
        except (Exception, CancelledError) as error:
            if type(error).__name__ == "KilledWorker":  # dask's, after it tried on several workers
                return _died(job, error)
            return lost(job, f"the executor returned no result: {one_line(error)}")
        if raised is not None and trial.number < self._first_failed:
            self._first_failed, self.first_error = trial.number, _arrived(raised, trial)
        return trial

    def _also_broken(self) -> list[Job]:
        """The other jobs that a broken executor lost; those it finished before stay."""
        late = wait(self._futures, SETTLED).not_done
        broken = [f for f in self._futures if f in late or f.cancelled() or isinstance(f.exception(), BrokenExecutor)]
        return [self._futures.pop(future) for future in broken]

    def _rebuild(self) -> None:
        _shut_down(self._executor, abandon=True)
        assert self._make is not None  # noqa: S101 - only called where it is
        self._executor = self._make()


def _evaluated(objective: Objective, job: Job) -> Sent:
    """A job's trial, and what its function raised: pickled, for what cannot be unpickled would break the executor."""
    raised: list[Exception] = []
    trial = evaluate(objective, job, raised.append)
    return trial, _pickled(raised[0]) if raised else None


def _pickled(error: Exception) -> bytes:
    """An exception with its traceback as a note; nothing where it cannot be sent."""
    try:
        error.add_note("".join(traceback.format_exception(error)))
        pickled = pickle.dumps(error)
    except Exception:  # what it holds may raise anything
        return b""
    return pickled if len(pickled) <= ERROR_BYTES else b""


def _arrived(pickled: bytes, trial: Trial) -> Exception:
    """An exception of another process; its words where it did not survive the way."""
    try:
        error = pickle.loads(pickled)  # noqa: S301  # from a worker that ran the user's own code
    except Exception:  # a class of its own may raise anything, or not be known here
        return RuntimeError(trial.error)
    return error if isinstance(error, Exception) else RuntimeError(trial.error)


def _died(job: Job, error: BaseException) -> Trial:
    return lost(job, f"the worker process died: {one_line(error)}")


def _shut_down(executor: Any, abandon: bool) -> None:
    if not abandon:
        executor.shutdown(wait=True)
    elif isinstance(executor, ProcessPoolExecutor):
        processes = list((executor._processes or {}).values())
        executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
    else:
        executor.shutdown(wait=False, kill_workers=True)


# --- which workers ---------------------------------------------------------------------------------------------------


def workers_for(objective: Objective, n_jobs: int, executor: Any = None) -> Workers:
    """The workers that a tuner asked for.

    Raises: TypeError where processes are wanted and the function cannot be sent to them.
    """
    if executor is not None:
        if isinstance(executor, ProcessPoolExecutor):
            _check_sendable(objective, pickle)
        return Pool(objective, executor=executor)
    if n_jobs == 1:
        return Here(objective)
    return Pool(objective, make=_maker(objective, n_jobs))


def width(executor: Any) -> int | None:
    """How many trials an executor runs at once, where it can be told."""
    most = getattr(executor, "_max_workers", None)  # those of the standard library and of loky
    if isinstance(most, int):
        return most
    client: Any = getattr(executor, "_client", None)  # dask's
    return len(client.ncores()) or None if hasattr(client, "ncores") else None


def _maker(objective: Objective, n_jobs: int) -> Callable[[], Any]:
    share = (n_jobs,)
    if find_spec("loky") is not None:
        import cloudpickle
        import loky

        _check_sendable(objective, cloudpickle)
        # One of our own instead of get_reusable_executor: that may be in use elsewhere, and could not be killed.
        return lambda: loky.ProcessPoolExecutor(n_jobs, initializer=_share_cores, initargs=share)
    from multiprocessing import get_context

    _check_sendable(objective, pickle)
    # spawn: a fork of a process with threads, such as torch's, can hang.
    return lambda: ProcessPoolExecutor(n_jobs, get_context("spawn"), initializer=_share_cores, initargs=share)


def _check_sendable(objective: Objective, pickler: Any) -> None:
    try:
        pickler.dumps(objective)
    except Exception as error:
        advice = "" if pickler is not pickle else ", or install loky, which sends lambdas and nested functions too"
        raise TypeError(
            f"the objective cannot be sent to other processes ({one_line(error)}): make it a function at the top of a "
            f"module that holds no open files, locks or the like{advice}; n_jobs=1 needs none of this"
        ) from error


def _share_cores(workers: int) -> None:
    """Gives a worker process its part of the cores: all of them in each would be slower than one process alone."""
    with suppress(ImportError):
        import torch

        torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // workers)))
