"""One trial: the user's function is called, and whatever it does becomes a Trial.

It never raises because of the function. It runs as it is in this process or, pickled, in another one.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from panther.errors import one_line
from panther.tuner.pruning import Monitor, PrunedError, Pruner, Reports, listening
from panther.tuner.trial import Goal, Limit, Params, Scores, Trial, number_of

GB = 1024**3
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SAMPLED_EVERY = 0.005  # seconds between two looks at the process's memory: what is held for less can be missed

# How libraries say in a RuntimeError that memory is out: torch on a CPU, the same on Windows, CUDA and its libraries.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "alloc_failed")


class AnswerError(TypeError):
    """The objective answered something that is no score."""


@dataclass(frozen=True)
class Job:
    """A point to evaluate, and the reports of the trials that it is judged against."""

    number: int
    params: Params
    phase: str = "given"
    others: tuple[Reports, ...] = ()


@dataclass(frozen=True)
class Objective:
    """The user's function and how to read it: all that a process needs to evaluate a Job."""

    function: Callable[..., Any]
    by_keyword: bool = True
    goals: tuple[Goal, ...] = (Goal(),)
    limits: tuple[Limit, ...] = ()
    repeats: int = 1
    max_memory_gb: float | None = None
    pruner: Pruner | None = None


def takes_keywords(function: Callable[..., Any], names: Sequence[str], what: str = "the objective") -> bool:
    """True where a function can be called with these names, False where it must be called by position.

    Raises: TypeError where neither fits, or where the order would give a parameter to a wrong name.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C have none
        return False
    if _binds(signature, (), dict.fromkeys(names)):
        return True
    takes = f"{what} takes {signature}, and the parameters are {', '.join(names)}"
    if not _binds(signature, names, {}):
        raise TypeError(f"{takes}: use the same names, or as many parameters in the same order")
    bound = signature.bind(*names).arguments
    wrong = [name for name, given in bound.items() if name in names and isinstance(given, str) and given != name]
    if wrong:
        raise TypeError(
            f"{takes}: called by position {wrong[0]!r} would be given {bound[wrong[0]]!r}; use the same names"
        )
    return False


def keywords_taken(function: Callable[..., Any], names: Sequence[str]) -> list[str]:
    """Those of the names that a function can be called with, where they are all that it needs; else none."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return []
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    taken = [name for name in names if takes_any or name in signature.parameters]
    return taken if _binds(signature, (), dict.fromkeys(taken)) else []


def _binds(signature: inspect.Signature, args: Sequence[Any], keywords: Mapping[str, Any]) -> bool:
    try:
        signature.bind(*args, **keywords)
    except TypeError:
        return False
    return True


def call(function: Callable[..., Any], params: Params, by_keyword: bool) -> Any:
    return function(**params) if by_keyword else function(*params.values())


# --- answers ---------------------------------------------------------------------------------------------------------


def scores_of(answer: Any, goals: Sequence[Goal], limits: Sequence[Limit] = ()) -> Scores:
    """What an objective answered, as floats by the names of the goals and observed limits.

    A number is the score of the only goal. A dict must hold all names; what else it holds is ignored. NaN is refused.

    Raises: AnswerError with a reason that says what was answered and what was expected.
    """
    names = [*dict.fromkeys([*(goal.name for goal in goals), *(limit.name for limit in limits)])]
    wanted = "a number" if len(names) == 1 else "a dict with " + ", ".join(map(repr, names))
    if not isinstance(answer, Mapping):
        if len(names) > 1:
            raise AnswerError(f"the objective answered {_kind(answer)}; expected {wanted}")
        answer = {names[0]: answer}
    missing = [name for name in names if name not in answer]
    if missing:
        advice = "; name what is optimised, like objectives={'accuracy': 'max'}" if names == ["score"] else ""
        given = ", ".join(map(repr, answer)) or "nothing"
        raise AnswerError(
            f"the objective's dict lacks {', '.join(map(repr, missing))}: it has {given}; expected {wanted}{advice}"
        )
    return {name: _score(name, answer[name]) for name in names}


def _score(name: str, value: Any) -> float:
    if value is None:
        raise AnswerError(f"the objective answered None for {name!r}: does it end without a return?")
    try:
        number = number_of(value)
    except Exception as error:
        reason = str(error) if isinstance(error, TypeError) else one_line(error)
        raise AnswerError(f"the objective's answer for {name!r} is no score: {reason}") from error
    if math.isnan(number):
        raise AnswerError(f"the objective answered NaN for {name!r}")
    return number


def _kind(answer: Any) -> str:
    return "None: does it end without a return?" if answer is None else f"{type(answer).__name__}"


def mean(results: Sequence[Scores]) -> Scores:
    """The mean of several results, name by name.

    Raises: AnswerError where it is NaN: inf and -inf in one.
    """
    means = {name: _mean([r[name] for r in results]) for name in results[0]}
    lost = [name for name, value in means.items() if math.isnan(value)]
    if lost:
        raise AnswerError(f"{lost[0]!r} was inf in one repeat and -inf in another, which have no mean")
    return means if len(results) > 1 else results[0]


def _mean(values: Sequence[float]) -> float:
    """Rounded once: the mean of equal numbers is that number, which a limit may be."""
    infinite = {value for value in values if math.isinf(value)}
    if infinite:
        return sum(infinite)  # NaN of both
    low, high = min(values), max(values)
    try:
        found = math.fsum(values) / len(values)
    except OverflowError:  # of numbers near the largest there is
        found = math.fsum(value / len(values) for value in values)
    return min(max(found, low), high)


# --- one trial -------------------------------------------------------------------------------------------------------


def evaluate(objective: Objective, job: Job, keep: Callable[[Exception], None] | None = None) -> Trial:
    """The trial that came of a job; `keep` is given what the function raised, without the variables it held."""
    monitor = Monitor(objective.pruner, job.others, objective.goals[0].maximise)
    results: list[Scores] = []
    found: dict[str, Any]
    memory: float | None = None
    started = time.perf_counter()
    try:
        with _measured(objective.max_memory_gb is not None) as peak:
            for repeat in range(objective.repeats):
                with listening(monitor if repeat == 0 else Monitor()):
                    answer = call(objective.function, dict(job.params), objective.by_keyword)
                results.append(scores_of(answer, objective.goals, objective.limits))
                del answer
        memory = peak.gigabytes
        found = _judged(objective, mean(results), memory)
    except PrunedError as error:
        found = {"status": "pruned", "error": str(error)}
    except (Exception, SystemExit) as error:
        status = "out_of_memory" if is_out_of_memory(error) else "failed"
        found = {"status": status, "error": str(error) if isinstance(error, AnswerError) else one_line(error)}
        _let_go(error)
        if keep is not None and isinstance(error, Exception):
            keep(error)
    if found["status"] == "out_of_memory":
        _free()
    return Trial(
        number=job.number,
        params=job.params,
        phase=job.phase,
        seconds=time.perf_counter() - started,
        memory_gb=memory,
        reports=tuple(monitor.reports),
        repeats=tuple(results) if objective.repeats > 1 else (),
        **found,
    )


def _judged(objective: Objective, scores: Scores, memory: float | None) -> dict[str, Any]:
    """The status and scores of a function that answered."""
    most = objective.max_memory_gb
    if most is not None and memory is not None and memory > most:
        return {"status": "over_memory", "error": f"it took {memory:.3g} GB, and max_memory_gb is {most:g}"}
    broken = [limit for limit in objective.limits if not limit.is_met_by(scores)]
    if broken:
        reasons = ", ".join(f"{limit.name} is {scores[limit.name]:g} ({limit} is wanted)" for limit in broken)
        return {"status": "infeasible", "error": reasons, "scores": scores}
    return {"status": "ok", "scores": scores}


def lost(job: Job, error: str) -> Trial:
    """The trial of a job from which nothing came back."""
    return Trial(job.number, job.params, job.phase, status="failed", error=error)


# --- memory ----------------------------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error).lower() for said in OUT_OF_MEMORY)


def _let_go(error: BaseException | None) -> None:
    """Forgets the variables of the frames that an exception came through: a model's memory hangs on them."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _free() -> None:
    gc.collect()
    cuda = _cuda()
    if cuda is not None:
        cuda.empty_cache()


def _cuda() -> Any:
    """torch.cuda where it is in use, else None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


@dataclass
class Peak:
    gigabytes: float | None = None


@contextmanager
def _measured(wanted: bool) -> Iterator[Peak]:
    """The most memory taken inside beyond what was in use before: a GPU's where one is used, else the process's.

    A GPU's is exact. A thread looks at the process's resident memory every few milliseconds, and misses what comes and
    goes between; Linux's own mark of the most does not, but another trial in this process may have reset it.
    """
    peak = Peak()
    if not wanted:
        yield peak
        return
    gc.collect()
    before = _gpu_memory(start=True)
    with _resident() as resident:
        yield peak
    after = _gpu_memory(start=False)
    used = max((most - before.get(device, 0) for device, most in after.items()), default=0)
    peak.gigabytes = (used or resident.most) / GB


def _gpu_memory(start: bool) -> dict[int, int]:
    """By device, what is allocated now (and counted from now on), or the most since."""
    cuda = _cuda()
    if cuda is None:
        return {}
    devices = range(cuda.device_count())
    if not start:
        return {device: cuda.max_memory_allocated(device) for device in devices}
    for device in devices:
        cuda.reset_peak_memory_stats(device)
    return {device: cuda.memory_allocated(device) for device in devices}


@dataclass
class Resident:
    most: int = 0
    done: threading.Event = field(default_factory=threading.Event)


@contextmanager
def _resident() -> Iterator[Resident]:
    import psutil

    process = psutil.Process()
    _give_back()
    marked = _mark_reset()
    before = process.memory_info().rss
    seen = Resident()

    def look() -> None:
        seen.most = max(seen.most, process.memory_info().rss - before)

    def watch() -> None:
        while not seen.done.wait(SAMPLED_EVERY):
            look()

    thread = threading.Thread(target=watch, name="panther-memory", daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        seen.done.set()
        thread.join()  # before the last look: two threads in look() at once can lose what one of them saw
    look()
    if marked:
        seen.most = max(seen.most, _mark() - before)


def _give_back() -> None:
    """Return to the system what malloc keeps of freed memory: its use again inside a trial would not be seen."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # other systems have no such function, or no such library
        return


def _mark_reset() -> bool:
    """Linux's mark of the most resident memory put back to what is resident now; False where that cannot be done."""
    try:
        CLEAR_REFS.write_text("5", encoding="ascii")  # proc(5): resets the peak resident set size
        return _mark() > 0
    except OSError:
        return False


def _mark() -> int:
    """Bytes of the most resident memory since the mark was reset; 0 where the system keeps none."""
    for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
