"""The tree-structured Parzen estimator of hyperopt, asked for single points."""

from __future__ import annotations

from typing import Any

import numpy as np

from panther.tuner.backends.base import Question, filled, known_trials, losses, taken, warn_missing
from panther.tuner.backends.random import random
from panther.tuner.space import Category, Float, Integer, Key, Parameter, Space
from panther.tuner.trial import Params

FEWEST = 3  # trials with scores; with fewer there is nothing to estimate
TRIES = 6  # other seeds, before a point that hyperopt repeats is replaced by a random one


def tpe(question: Question) -> list[Params]:
    """Points where good trials are dense and bad ones are not. Falls back to random ones without hyperopt."""
    try:
        import hyperopt
    except ImportError:
        warn_missing("hyperopt", "with its TPE", "at random")
        return random(question)
    rng = question.rng()
    space = question.space
    trials = known_trials(question)
    loss = losses(question, trials)
    if np.isfinite(loss).sum() < FEWEST:
        return random(question)
    told = [(trial.params, value) for trial, value in zip(trials, loss, strict=True)]
    domain = hyperopt.Domain(_nothing, {name: _expression(hyperopt, name, p) for name, p in space.parameters.items()})
    avoid = taken(question)
    points: list[Params] = []
    for _ in range(question.count):
        # Points under way count as bad, so that the next one goes elsewhere.
        told_now = told + [(params, np.inf) for params in [*question.pending, *points]]
        point = _new_point(hyperopt, domain, space, told_now, avoid, rng)
        if point is not None:
            avoid.add(space.key(point))
            points.append(point)
    return filled(question, points, rng)


def _nothing(_params: Any) -> None:
    """The objective that hyperopt wants to know and never calls."""


def _expression(hyperopt: Any, name: str, parameter: Parameter) -> Any:
    """What hyperopt searches: a category's choice, the place of a whole number in its list, else a unit number."""
    if isinstance(parameter, Category):
        return hyperopt.hp.choice(name, list(range(parameter.count)))
    if isinstance(parameter, Integer) and not parameter.log:
        return hyperopt.hp.quniform(name, -0.5, parameter.count - 0.5, 1)
    return hyperopt.hp.uniform(name, 0.0, 1.0)


def _new_point(
    hyperopt: Any,
    domain: Any,
    space: Space,
    told: list[tuple[Params, float]],
    avoid: set[Key],
    rng: np.random.Generator,
) -> Params | None:
    trials = _history(hyperopt, domain, space, told)
    for _ in range(TRIES):
        docs = hyperopt.tpe.suggest(
            [len(told)], domain, trials, seed=int(rng.integers(2**31)), n_startup_jobs=0, verbose=False
        )
        values = docs[0]["misc"]["vals"]
        params = {n: _read(parameter, values[n][0]) for n, parameter in space.parameters.items()}
        if space.key(params) not in avoid and space.is_allowed(params):
            return params
    return None


def _history(hyperopt: Any, domain: Any, space: Space, told: list[tuple[Params, float]]) -> Any:
    """The trials as hyperopt keeps them, in memory."""
    trials = hyperopt.Trials()
    docs = []
    for number, (params, loss) in enumerate(told):
        misc = {
            "tid": number,
            "cmd": domain.cmd,
            "workdir": None,
            "idxs": {name: [number] for name in space.parameters},
            "vals": {name: [_written(parameter, params[name])] for name, parameter in space.parameters.items()},
        }
        result = {"loss": float(loss), "status": hyperopt.STATUS_OK}
        doc = trials.new_trial_docs([number], [None], [result], [misc])[0]
        doc["state"] = hyperopt.JOB_STATE_DONE
        docs.append(doc)
    trials.insert_trial_docs(docs)
    trials.refresh()
    return trials


def _written(parameter: Parameter, value: Any) -> float:
    if isinstance(parameter, Category):
        return parameter.place(value)
    if isinstance(parameter, Integer) and not parameter.log:
        return float(np.clip(round((value - parameter.low) / parameter.step), 0, parameter.count - 1))
    return float(np.clip(parameter.unit(value), 0.0, 1.0))


def _read(parameter: Parameter, value: Any) -> Any:
    if isinstance(parameter, Category):
        return parameter.choices[int(value)]
    if isinstance(parameter, Float):
        return parameter.at(float(value))
    if parameter.log:
        return parameter.near(float(value))
    place = min(max(round(float(value)), 0), parameter.count - 1)
    return parameter.low + parameter.step * place
