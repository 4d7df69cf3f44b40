"""What a user may pass to the tuner, as what it works with; each function raises an error that names the argument."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from numbers import Integral
from typing import Any

from panther.tuner.executors import width
from panther.tuner.objective import call, keywords_taken, takes_keywords
from panther.tuner.pruning import PRUNERS, Pruner
from panther.tuner.space import Space
from panther.tuner.trial import Goal, Limit, Params, Trial, number_of

DIRECTIONS: dict[Any, bool] = {
    max: True,
    min: False,
    "max": True,
    "min": False,
    "maximize": True,
    "minimize": False,
    "maximise": True,
    "minimise": False,
}
# What a row of the history and of the data frame has besides parameters and scores.
COLUMNS = ("seconds", "trial", "phase", "status", "error")
LIMIT = re.compile(r"\s*(?P<name>[^<>=]+?)\s*(?P<sign><=|>=)\s*(?P<bound>[^<>=]+?)\s*")


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    if most is not None and int(value) > most:
        raise ValueError(f"{name} must be at most {most}, not {value}")
    return int(value)


def positive(name: str, value: Any) -> float:
    try:
        number = number_of(value)
    except TypeError as error:
        raise TypeError(f"{name} must be a number: {error}") from None
    if not number > 0:
        raise ValueError(f"{name} must be above 0, not {value!r}")
    return number


def jobs_of(n_jobs: Any) -> int:
    if isinstance(n_jobs, Integral) and n_jobs == -1:
        return os.cpu_count() or 1
    return whole("n_jobs", n_jobs, least=1)


def executor_of(executor: Any) -> Any:
    if hasattr(executor, "get_executor"):  # a dask.distributed Client, whose own submit has other futures
        return executor.get_executor()
    if executor is not None and not hasattr(executor, "submit"):
        raise TypeError(f"executor must be a concurrent.futures.Executor, not {executor!r}")
    return executor


def batch_size_of(batch_size: Any, n_jobs: int, executor: Any) -> int:
    if batch_size is not None:
        return whole("batch_size", batch_size, least=1)
    if executor is None or n_jobs > 1:
        return n_jobs
    found = width(executor)
    if found is None:
        raise ValueError("this executor does not say how much runs at the same time: set batch_size to that")
    return found


def callbacks_of(callbacks: Any) -> tuple[Callable[[Any, Trial], Any], ...]:
    found = (callbacks,) if callable(callbacks) else tuple(callbacks)
    for callback in found:
        if not callable(callback):
            raise TypeError(f"a callback must be a function of (tuner, trial), not {callback!r}")
    return found


def memory_limit_of(limit: Any) -> float | None:
    if limit is None:
        return None
    number = positive("max_memory_gb", limit)
    if find_spec("psutil") is None:
        raise ImportError(
            "max_memory_gb is measured with psutil, which is not installed; type: python -m pip install psutil"
        )
    return number


def pruner_of(pruner: Any, goals: Sequence[Goal]) -> Pruner | None:
    if pruner is None:
        return None
    if len(goals) > 1:
        raise ValueError("a pruner compares trials by one number: it cannot be used with several objectives")
    if isinstance(pruner, str):
        if pruner not in PRUNERS:
            raise ValueError(f"pruner={pruner!r}: expected one of {', '.join(map(repr, PRUNERS))} or a function")
        return PRUNERS[pruner]
    if not callable(pruner):
        raise TypeError(f"pruner must be a name or a function, not {pruner!r}")
    return pruner  # type: ignore[no-any-return]


def goals_of(objectives: Any) -> tuple[Goal, ...]:
    if objectives is None:
        return (Goal(),)
    if not isinstance(objectives, Mapping) or not objectives:
        raise TypeError(
            f"objectives must be a dict like {{'accuracy': 'max', 'latency_ms': 'min'}}, not {objectives!r}"
        )
    found = []
    for name, direction in objectives.items():
        if not isinstance(name, str):
            raise TypeError(f"an objective's name must be a string, not {name!r}")
        if not (isinstance(direction, str) or callable(direction)) or direction not in DIRECTIONS:
            raise ValueError(f"the objective {name!r} must be 'max' or 'min', not {direction!r}")
        found.append(Goal(name, DIRECTIONS[direction]))
    return tuple(found)


def check_names(space: Space, goals: Sequence[Goal], limits: Sequence[Limit]) -> None:
    """A row of the history holds all of them, so that no two may have the same name."""
    answered = {goal.name for goal in goals} | {limit.name for limit in limits}
    for name in space.parameters:
        if name in answered or name in COLUMNS:
            what = "an objective" if name in answered else "a column of the history"
            raise ValueError(f"the parameter {name!r} has the name of {what}: give it another one")
    for name in answered & set(COLUMNS):
        raise ValueError(f"the objective {name!r} has the name of a column of the history: give it another one")


def constraints_of(constraints: Any, names: list[str]) -> tuple[list[Callable[[Params], bool]], tuple[Limit, ...]]:
    """What is known before an evaluation, as functions of a dict, and what is observed after it."""
    if isinstance(constraints, str) or callable(constraints):
        constraints = (constraints,)
    known: list[Callable[[Params], bool]] = []
    observed: list[Limit] = []
    for constraint in constraints:
        if isinstance(constraint, str):
            limit = _limit(constraint)
            if limit.name in names:
                known.append(_bound(limit))
            else:
                observed.append(limit)
        elif callable(constraint):
            known.append(_known(constraint, names))
        else:
            raise TypeError(
                f"a constraint is a function of the parameters or a string like 'latency_ms <= 12', not {constraint!r}"
            )
    return known, tuple(observed)


def _limit(text: str) -> Limit:
    match = LIMIT.fullmatch(text)
    try:
        bound = float(match["bound"]) if match else math.nan
    except ValueError:
        bound = math.nan
    if match is None or math.isnan(bound):
        raise ValueError(
            f"the constraint {text!r} is not understood: expected a name, <= or >=, and a number, like 'latency_ms <= "
            "12'; for anything else pass a function of the parameters"
        )
    return Limit(match["name"], bound, match["sign"] == "<=")


def _bound(limit: Limit) -> Callable[[Params], bool]:
    def allowed(params: Params) -> bool:
        return limit.is_met_by(params)

    allowed.__name__ = str(limit)
    return allowed


def _known(constraint: Callable[..., Any], names: list[str]) -> Callable[[Params], bool]:
    name = str(getattr(constraint, "__name__", type(constraint).__name__))
    taken = keywords_taken(constraint, names)
    by_keyword = bool(taken) or takes_keywords(constraint, names, f"the constraint {name}")

    def allowed(params: Params) -> bool:
        given = {key: params[key] for key in taken} if taken else params
        return bool(call(constraint, given, by_keyword))

    allowed.__name__ = name
    return allowed
