"""Limits that only the whole model can be held against: its latency, its peak memory, the drop of a metric.

Plans are made from what single layers cost. Here they are solved for, built and measured again until the whole model
says that it is within. No torch in here: solving, building and measuring are given as functions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any, NamedTuple

from panther.spec import Cost, Measured, Plan, Target

ROUNDS = 3  # of correction after the first plan
AIM = 0.02  # more than what is missing is asked for, by this part: medians repeat within 2-3 %
ROOM = 0.05  # a model this far below its limit is given more
EFFECTS = (0.25, 4.0)  # what one predicted millisecond or byte may turn out to save: beyond it is noise
NOISE = 0.1  # of max_drop: what a smaller model may be better by without being worth a note
# Halvings of the kept fraction at most, and as how large a part of it the smallest model within is known: 8 halvings at
# half of the weights, 11 at a sixteenth of the bytes.
SOLVES, KNOWN_TO = 12, 0.01


class _Kind(NamedTuple):
    """Something measured of the whole, by the names that it has everywhere."""

    measured: str  # field of Measured
    whole: str  # limit in a Target
    inside: str  # limit on the layers in a Target, which follows from it
    cost: str  # field of Cost that this one bounds


_KINDS = (
    _Kind("latency_ms", "model_latency_ms", "latency_ms", "latency_ms"),
    _Kind("peak_memory_bytes", "peak_memory_bytes", "weight_bytes", "size_bytes"),
)

_NOUNS = {"params": "weights", "size_bytes": "bytes"}
COUNTED = ("params", "flops", "size_bytes")  # limits on the layers that do not follow from one on the whole


@dataclass(frozen=True)
class Attempt:
    """A plan, the limits on the layers that it was made for, and what its whole model then needs."""

    plan: Plan
    target: Target
    measured: Measured

    def worst(self) -> float:
        """The largest part of a limit that is used, of the whole or of the layers; above 1 it is missed."""
        pairs = [(getattr(self.measured, kind.measured), getattr(self.target, kind.whole)) for kind in _KINDS]
        whole = [got / limit for got, limit in pairs if got is not None and limit is not None]
        return max((*whole, _counted(self.plan, self.target)), default=0.0)


def _counted(plan: Plan, target: Target) -> float:
    """The largest part of a limit that is used, of those that are counted and not measured."""
    pairs = [(getattr(plan.cost, name), getattr(target, name)) for name in COUNTED]
    return max((got / max(limit, 1) for got, limit in pairs if limit is not None), default=0.0)


def held_by_the_whole(
    target: Target,
    dense: Measured,
    layers: Cost,
    solve: Callable[[Target], Plan],
    measure: Callable[[Plan], Measured],
    others: Sequence[Plan] = (),
    loss: Callable[[Plan], float] = lambda _plan: 0.0,
    limit_ms: float | None = None,
) -> tuple[Plan, Target]:
    """The plan whose whole model holds the limits that are measured on it, and the limits on the layers behind it.

    A first plan is solved for and its model measured. What a millisecond or byte that the layers were to save has
    really saved then corrects their limits, at most ROUNDS times. Of the models within the limits the largest wins;
    where none is, the nearest.

    others: plans that win where they are within the limits and lose less, by `loss`, or where nothing else is within:
        what layers promise may have ruled them out.
    limit_ms: the limit on the model's milliseconds itself, where the target holds one with room for measuring again.

    dense, layers: what the whole dense model needs, and its sketchable layers as predicted. Without a measured limit in
    the target one plan is solved for and nothing is measured.
    """
    if all(getattr(target, kind.whole) is None for kind in _KINDS):
        return solve(target), target
    attempts: list[Attempt] = []
    while len(attempts) <= ROUNDS:
        plan = solve(target)
        if any(plan.choices == attempt.plan.choices for attempt in attempts):
            break
        attempts.append(Attempt(plan, target, measure(plan)))
        following = _corrected(attempts[-1], dense, layers)
        if following == target:
            break
        target = following
    within = [attempt for attempt in attempts if attempt.worst() <= 1]
    best = max(within, key=lambda attempt: _predicted(attempt, layers), default=None) or min(
        attempts, key=Attempt.worst
    )
    if limit_ms is not None:
        best = changed(best, target=changed(best.target, model_latency_ms=limit_ms))
    reached = loss(best.plan) if others else 0.0
    for lost, index in sorted((loss(plan), index) for index, plan in enumerate(others)):
        if best.worst() <= 1 and reached <= lost:
            break
        plan = others[index]
        if _counted(plan, best.target) <= 1:
            other = Attempt(plan, _reaching(best.target, plan.cost), measure(plan))
            if other.worst() <= 1 or other.worst() < best.worst():
                best, reached = other, lost
    return best.plan, best.target


def _reaching(target: Target, cost: Cost) -> Target:
    """The target whose limits on the layers, where they follow from those on the whole, allow this cost."""
    kinds = [kind for kind in _KINDS if getattr(target, kind.inside) is not None]
    return changed(
        target, **{kind.inside: max(getattr(target, kind.inside), getattr(cost, kind.cost)) for kind in kinds}
    )


def _predicted(attempt: Attempt, layers: Cost) -> float:
    """How much of the dense layers the plan keeps, in the kinds of cost that were corrected."""
    kinds = [kind.cost for kind in _KINDS if getattr(attempt.target, kind.whole) is not None]
    return float(sum(getattr(attempt.plan.cost, kind) / max(getattr(layers, kind), 1e-9) for kind in kinds))


def _corrected(attempt: Attempt, dense: Measured, layers: Cost) -> Target:
    """The target whose limits on the layers would have made this model hold the limits on the whole."""
    limits: dict[str, Any] = {}
    for kind in _KINDS:
        limit = getattr(attempt.target, kind.whole)
        got, before = (getattr(measured, kind.measured) for measured in (attempt.measured, dense))
        if limit is None or got is None or limit * (1 - ROOM) <= got <= limit:
            continue
        everything = getattr(layers, kind.cost)
        predicted = everything - getattr(attempt.plan.cost, kind.cost)
        effect = (before - got) / predicted if predicted > 0 else EFFECTS[1]
        missing = (before - limit) * (1 + AIM)
        limits[kind.inside] = everything - missing / min(max(effect, EFFECTS[0]), EFFECTS[1])
    if "weight_bytes" in limits:
        limits["weight_bytes"] = int(limits["weight_bytes"])
    return changed(attempt.target, **limits)


@dataclass(frozen=True)
class Trial:
    """A plan and what eval_fn says of its model: NaN when it could not say."""

    plan: Plan
    metric: float


def smallest_within_drop(
    target: Target,
    dense_metric: float,
    dense_size: int,
    solve: Callable[[int], Plan],
    metric: Callable[[Plan], float],
    *,
    counted: str = "params",
) -> tuple[Plan, tuple[str, ...]]:
    """The plan of fewest weights whose model loses no more of the metric than the target allows, and notes.

    counted: the field of Cost that is to be small, "params" or "size_bytes" for the plan of fewest bytes.
    Halves the kept fraction until it is known to KNOWN_TO of itself. `solve` makes the plan of at most so many weights,
    `metric` builds its model and evaluates it: whoever heals models gives one that heals. That a larger model is better
    is taken for granted by the search and not by the answer, which was evaluated. When no smaller model is within,
    everything stays dense.
    """
    trials: list[Trial] = []
    best: Plan | None = None

    def kept_by(plan: Plan) -> float:
        return float(getattr(plan.cost, counted) / max(1, dense_size))

    low, high = 0.0, 1.0
    for _ in range(SOLVES):
        if high - low <= KNOWN_TO * high:
            break
        middle = (low + high) / 2
        plan = solve(int(middle * dense_size))
        known = next((trial for trial in trials if trial.plan.choices == plan.choices), None)
        trial = known or Trial(plan, metric(plan))
        trials.extend([] if known else [trial])
        kept = kept_by(plan)
        if target.allows_drop(dense_metric, trial.metric):
            best, high = plan, min(middle, kept)
            if kept > middle:  # the smallest plan that there is
                break
        else:
            low = max(middle, kept)
    ordered = sorted(trials, key=lambda trial: kept_by(trial.plan))
    shares = [f"{kept_by(trial.plan):.1%} of the {_NOUNS[counted]}" for trial in ordered]
    if best is None:
        largest = solve(dense_size)
        is_dense = kept_by(largest) >= 1
        return largest, (_nothing_smaller(ordered[-1], shares[-1], target, dense_metric, is_dense=is_dense),)
    return best, tuple(_not_monotone(ordered, shares, target, dense_metric))


def _nothing_smaller(largest: Trial, share: str, target: Target, dense_metric: float, *, is_dense: bool) -> str:
    """is_dense: what is taken instead, which is in whole numbers where nothing else was offered."""
    what = "everything stays dense: no smaller model is" if is_dense else "no model that is stored so is"
    return (
        f"{what} within max_drop={target.max_drop:g} (at {share} eval_fn falls from {dense_metric:.4g} to "
        f"{largest.metric:.4g})"
    )


def _not_monotone(
    ordered: Sequence[Trial], shares: Sequence[str], target: Target, dense_metric: float
) -> Iterator[str]:
    """A note when a model that lost too much has a smaller one that lost less: a yet smaller one might be within."""
    for (small, few), (large, many) in itertools.pairwise(zip(ordered, shares, strict=True)):
        is_better = small.metric - large.metric > NOISE * (target.max_drop or 0.0)
        if is_better and not target.allows_drop(dense_metric, large.metric):
            yield (
                f"eval_fn is not better for larger models ({small.metric:.4g} at {few}, {large.metric:.4g} at {many}): "
                "a smaller model within max_drop may exist"
            )
            return
