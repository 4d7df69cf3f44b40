"""Gaussian processes over the box (BoTorch): most gained per trial, for noisy scores, limits and several goals.

One process models each goal and each observed limit. The points asked for are those of the largest expected gain over
what the processes believe to be reached so far, among candidates that are points of the box, so that whole numbers
and categories are never rounded behind the model's back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from panther.tuner.backends.base import (
    FAR,
    Question,
    clipped,
    excess,
    filled,
    has_all_scores,
    is_known,
    known_trials,
    losses,
    taken,
    warn_missing,
)
from panther.tuner.backends.candidates import around, first_candidates
from panther.tuner.backends.tpe import tpe
from panther.tuner.surrogate import SEARCHING, fit
from panther.tuner.trial import Goal, Params, Trial

FEWEST = 2  # trials with scores that differ; with fewer there is nothing to model
MOST = 250  # trials that are modelled; the cost of a fit rises with their cube
MOST_GOALS = 4  # the hypervolume of more takes too long; they are joined with changing weights instead
SAMPLES = {1: 128, 2: 64}  # of the model's belief, by the number of goals; else 32
ROUNDS = 2  # of new candidates around the best ones


def gp(question: Question) -> list[Params]:
    """Points of the largest expected gain. Falls back to TPE without BoTorch, and with too few scores."""
    if not _is_installed():
        warn_missing("botorch", "with Gaussian processes", "with TPE")
        return tpe(question)
    trials = known_trials(question)
    rng = question.rng()
    if len({tuple(trial.scores.items()) for trial in trials if has_all_scores(question, trial)}) < FEWEST:
        return tpe(question)
    try:
        with _quietly(int(rng.integers(2**31))):
            points = _points(question, _worth_modelling(question, trials), rng)
    except (RuntimeError, ValueError, ArithmeticError):  # a fit that fails numerically costs this question's model only
        return tpe(question)
    return filled(question, points, rng)


def _is_installed() -> bool:
    with _quietly(0):  # other libraries that it imports say what they will drop
        try:
            import botorch  # noqa: F401 - only that it is there
        except ImportError:
            return False
    return True


@contextmanager
def _quietly(seed: int) -> Iterator[None]:
    """The libraries' numerical warnings kept in, and torch's random numbers put back afterwards."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        yield


def _worth_modelling(question: Question, trials: Sequence[Trial]) -> list[Trial]:
    """All trials or, where they are too many, the better half of what can be modelled and the latest of the rest."""
    if len(trials) <= MOST:
        return list(trials)
    loss = losses(question, trials)
    order = sorted(range(len(trials)), key=lambda place: loss[place])
    rest = sorted(order[MOST // 2 :])[-(MOST - MOST // 2) :]
    return [trials[place] for place in sorted(order[: MOST // 2] + rest)]


def _points(question: Question, trials: Sequence[Trial], rng: np.random.Generator) -> list[Params]:
    """The points of largest expected gain, each one given those before it."""
    space = question.space
    encode = _encoder(question)
    pending = [params for params in question.pending if is_known(space, params)]
    acquisition = _acquisition(question, trials, encode, int(rng.integers(2**31)))
    avoid = taken(question)
    best = _best_first(question, trials)
    chosen: list[Params] = []
    for _ in range(question.count):
        under_way = [*pending, *chosen]
        acquisition.set_X_pending(encode(under_way) if under_way else None)
        known = {space.key(p): p for p in first_candidates(space, [t.params for t in best], avoid, rng)}
        if not known:
            break
        gains = dict(zip(known, _evaluated(acquisition, encode(list(known.values()))), strict=True))
        for turn in range(ROUNDS):
            tops = sorted(known, key=lambda key: -gains[key])[:3]
            more = around(space, [known[key] for key in tops], 0.05 / 4**turn, avoid | known.keys(), rng)
            new = {space.key(params): params for params in more}
            if new:
                known |= new
                gains |= dict(zip(new, _evaluated(acquisition, encode(list(new.values()))), strict=True))
        key = max(known, key=lambda key: gains[key])
        avoid.add(key)
        chosen.append(known[key])
    return chosen


def _encoder(question: Question) -> Callable[[Sequence[Params]], Tensor]:
    return lambda points: torch.from_numpy(np.ascontiguousarray(question.space.encode(points)))


def _best_first(question: Question, trials: Sequence[Trial]) -> list[Trial]:
    loss = losses(question, trials)
    return [trials[place] for place in sorted(range(len(trials)), key=lambda place: loss[place])]


def _evaluated(acquisition: Any, places: Tensor) -> list[float]:
    with torch.no_grad():
        gains = torch.cat([acquisition(part.unsqueeze(-2)) for part in places.split(256)])
    return torch.nan_to_num(gains, nan=-torch.inf).tolist()


# --- what is modelled ---------------------------------------------------------------------------------------------


def _acquisition(
    question: Question, trials: Sequence[Trial], encode: Callable[[Sequence[Params]], Tensor], seed: int
) -> Any:
    """The expected gain as a function of a point."""
    from botorch.acquisition.logei import qLogNoisyExpectedImprovement
    from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
    from botorch.acquisition.multi_objective.objective import IdentityMCMultiOutputObjective
    from botorch.acquisition.objective import GenericMCObjective
    from botorch.models.model_list_gp_regression import ModelListGP
    from botorch.sampling.normal import SobolQMCNormalSampler

    columns = _goal_columns(question, trials)
    places = encode([trial.params for trial in trials])
    models = [_fitted(places, column) for column in columns]
    goals = len(models)
    for limit in question.limits:
        measured = [trial for trial in trials if limit.name in trial.scores]
        if measured:
            beyond = _in_units([excess(limit, trial) for trial in measured])
            models.append(_fitted(encode([trial.params for trial in measured]), beyond))
    model = models[0] if len(models) == 1 else ModelListGP(*models)
    scored = [trial for trial in trials if has_all_scores(question, trial)]
    shared: dict[str, Any] = {
        "X_baseline": encode([trial.params for trial in scored]),
        "sampler": SobolQMCNormalSampler(torch.Size([SAMPLES.get(goals, 32)]), seed=seed),
        "constraints": [_output(place) for place in range(goals, len(models))] or None,
        "prune_baseline": True,
    }
    if goals == 1:
        objective = GenericMCObjective(_first_output) if len(models) > 1 else None
        return qLogNoisyExpectedImprovement(model, objective=objective, **shared)
    _never_compiled()
    reference = [min(column) - 0.1 * (max(column) - min(column)) for column in columns]
    return qLogNoisyExpectedHypervolumeImprovement(
        model,
        ref_point=reference,
        objective=IdentityMCMultiOutputObjective(outcomes=list(range(goals))),
        **shared,
    )


def _never_compiled() -> None:
    """Keep BoTorch from compiling C++ while a study runs.

    From 0.17 on its acquisition of several goals does so at first use where it finds a compiler: half a minute in
    silence, and a process that is killed meanwhile leaves a lock that all later ones wait for.
    """
    from botorch.acquisition.multi_objective import logei

    if hasattr(logei, "_load_attempted"):
        logei._load_attempted = True


def _output(place: int) -> Callable[[Tensor], Tensor]:
    return lambda values: values[..., place]


def _first_output(values: Tensor, X: Tensor | None = None) -> Tensor:
    return values[..., 0]


def _goal_columns(question: Question, trials: Sequence[Trial]) -> list[list[float]]:
    """What is maximised, one number a trial and goal, of mean 0 and spread 1."""
    if len(question.goals) > MOST_GOALS:
        return [_normal([-loss for loss in losses(question, trials)])]
    return [_normal([_gain(goal, trial) for trial in trials]) for goal in question.goals]


def _gain(goal: Goal, trial: Trial) -> float:
    return goal.gain(trial.scores) if goal.name in trial.scores else np.nan


def _normal(values: Sequence[float]) -> list[float]:
    """Numbers of mean 0 and spread 1: what is far off is brought near, and what is missing counts as the worst."""
    column = np.asarray(values, dtype=np.float64)
    column = np.where(np.isnan(column), -np.inf, column)
    column = clipped(column)
    spread = column.std()
    return list((column - column.mean()) / (spread if spread > 0 else 1.0))


def _in_units(beyond: Sequence[float]) -> list[float]:
    """How far beyond a limit, as multiples of the usual distance: its sign is the answer, and stays."""
    column = np.asarray(beyond, dtype=np.float64)
    finite = np.abs(column[np.isfinite(column)])
    unit = float(np.median(finite)) if len(finite) else 1.0
    return list(np.clip(column / (unit or 1.0), -FAR, FAR))


def _fitted(places: Tensor, column: Sequence[float]) -> Any:
    """BoTorch's process with the lengths and noise that ours finds: its own fit has the same ones 15 times as late."""
    from botorch.models.gp_regression import SingleTaskGP
    from gpytorch.kernels import MaternKernel
    from gpytorch.likelihoods import GaussianLikelihood

    columns = places.shape[-1]
    found = fit(places.numpy(), np.asarray(column, dtype=np.float64), [1] * columns, SEARCHING)
    model = SingleTaskGP(
        places,
        torch.tensor(column, dtype=torch.float64).unsqueeze(-1),
        likelihood=GaussianLikelihood(),
        covar_module=MaternKernel(nu=2.5, ard_num_dims=columns),
        outcome_transform=None,
    )
    model.covar_module.lengthscale = torch.from_numpy(found.lengths)
    model.likelihood.noise = found.noise
    model.mean_module.constant.data.fill_(found.mean + found.scale * found.constant)
    return model.eval()
