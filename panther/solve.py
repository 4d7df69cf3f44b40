"""One budget's plan and model: what allocators, whole models and eval_fn have to say about it, in turn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace as changed
from typing import Any, NamedTuple, cast

from torch import nn

from panther.allocate import allocate, is_met, with_layer_latency
from panther.allocators.base import Options, excess, in_whole_numbers, limit_on, total, without_slack
from panther.allocators.sensitivity import on_one_grid
from panther.channels import kept_of
from panther.errors import one_line
from panther.limits import held_by_the_whole, smallest_within_drop
from panther.prepared import Judge, Prepared, may_be_slower, timed
from panther.spec import DTYPES, Budget, Cost, Healed, Measured, Plan, Target, Tuning
from panther.trials import tuned_plan
from panther.verify import metric

REPEATS = 0.02  # how well milliseconds of a whole model repeat


class Found(NamedTuple):
    """A plan, the limits on the layers that it was made for, and how it was found."""

    plan: Plan
    target: Target
    seconds: dict[str, float]  # of every stage so far
    tuning: Tuning | None = None  # of search="tuned"


def search_plan(prepared: Prepared, budget: Budget, target: Target, notes: list[str], *, tunes: bool = True) -> Found:
    """The plan for a budget; without `tunes` the one that a tuned search begins with.

    What only the whole model tells is measured on unhealed models: healing changes neither sizes nor times, and is
    undone where eval_fn falls further with it than is allowed (`finished_model`).
    """
    request, options = prepared.request, prepared.options_for(budget)
    importances = prepared.importances if request.search != "uniform" else {}
    seconds, known = dict(prepared.seconds), list[tuple[Plan, float]]()
    search = "sensitivity" if request.search == "tuned" else request.search
    judge = Judge(prepared) if prepared.closer_calls else prepared.divergence

    def found(plan: Plan, target: Target) -> Found:
        if request.search != "tuned" or not tunes:
            return Found(plan, target, seconds)
        tuned = tuned_plan(prepared, budget, target, plan, known=known, notes=notes, seconds=seconds)
        return Found(tuned[0], target, seconds, tuned[1])

    def solve(wanted: Target) -> Plan:
        plans = [allocated(options, wanted)]
        for share in prepared.narrow_shares(kept_of(wanted, layers), options, wanted):
            narrow = prepared.narrow_for(budget, share, seconds)
            if narrow is not None:
                plans.append(allocated(narrow.options, wanted))
        met = [one for one in plans if is_met(one, wanted)]
        if not met:
            return min(plans, key=lambda one: excess(total(one.choices), wanted))
        return met[0] if len(plans) == 1 else min(met, key=lambda one: prepared.closely(one.choices))

    def allocated(options: Options, wanted: Target) -> Plan:
        with timed(seconds, "allocate"):
            plan = allocate(
                options,
                without_slack(wanted, options),
                prepared.found,
                search=search,
                divergence=lambda layer, error: importances[layer].divergence(error),
                evaluate=judge if prepared.reference.is_comparable else None,
                budget=str(budget),
                seed=request.seed,
            )
            if DTYPES[0] in request.dtypes:
                return plan
            return changed(plan, choices=tuple(in_whole_numbers(plan.choices, options)))

    dense, layers = prepared.dense.measured(budget), total([choices[-1] for choices in options.values()])
    if not budget.limits_size:
        plan = _smallest(prepared, target, layers, solve, notes, seconds, known)
        return found(plan, target)

    def measured(plan: Plan) -> Measured:
        with timed(seconds, "measure the whole"):
            return prepared.measured(plan, budget)

    def one_way() -> list[Plan]:
        """Every layer on the same grid, and all in floating point, where slower layers are options."""
        if search != "sensitivity" or budget.latency_ms is None or not may_be_slower(budget):
            return []
        ways: list[Options] = [{choice.layer: [choice] for choice in plan} for plan in on_one_grid(options)]
        if ways and DTYPES[0] in request.dtypes:
            ways.append({name: [c for c in choices if c.grid is None] for name, choices in options.items()})
        return [allocated(way, target) for way in ways]

    def loss(plan: Plan) -> float:
        if prepared.reference.is_comparable:
            return prepared.divergence(plan.choices)
        return sum(importances[choice.layer].divergence(choice.error) for choice in plan.choices)

    limit = target.model_latency_ms
    target = with_layer_latency(_with_room(target, dense), layers.latency_ms, dense.latency_ms or 0.0)
    return found(*held_by_the_whole(target, dense, layers, solve, measured, one_way(), loss, limit))


def _with_room(target: Target, dense: Measured) -> Target:
    """The target with less time than its limit, so that the model is found within when it is measured once more."""
    limit, before = target.model_latency_ms, dense.latency_ms
    if limit is None or before is None or limit >= before:
        return target
    return changed(target, model_latency_ms=limit * (1 - REPEATS))


def _smallest(
    prepared: Prepared,
    target: Target,
    dense: Cost,
    solve: Callable[[Target], Plan],
    notes: list[str],
    seconds: dict[str, float],
    known: list[tuple[Plan, float]],
) -> Plan:
    """The plan of fewest weights, or bytes where these are not the same, whose unhealed model holds max_drop.

    known: gets what was evaluated.
    """

    def evaluated(plan: Plan) -> float:
        with timed(seconds, "evaluate"):
            known.append((plan, _evaluated(prepared, prepared.build(plan), notes)))
        return known[-1][1]

    plan, said = smallest_within_drop(
        target,
        prepared.dense.metric,
        getattr(dense, prepared.counted),
        lambda size: solve(limit_on(prepared.counted, size)),
        evaluated,
        counted=prepared.counted,
    )
    notes.extend(said)
    return plan


def finished_model(prepared: Prepared, plan: Plan, target: Target, notes: list[str]) -> tuple[nn.Module, Healed | None]:
    """The model of a plan, healed and packed, and what healing did.

    It is unhealed where only that holds what eval_fn may fall by.

    Healing brings the outputs nearer to the dense model's, and a metric need not follow.
    """
    said: list[str] = []
    compressed, healing = prepared.build_healed(plan, said)
    if healing is not None and target.max_drop is not None:
        dense, healed = prepared.dense.metric, _evaluated(prepared, compressed, said)
        if not target.allows_drop(dense, healed):
            unhealed = prepared.build(plan)
            if target.allows_drop(dense, _evaluated(prepared, unhealed, said)):
                notes.append(f"healing was undone: eval_fn falls to {healed:.4g} with it, further than max_drop allows")
                return unhealed, None
    notes.extend(said)
    return compressed, healing


def _evaluated(prepared: Prepared, model: nn.Module, notes: list[str]) -> float:
    """What eval_fn says of a model; NaN, and a note, where it fails."""
    try:
        return metric(model, cast(Callable[[nn.Module], Any], prepared.request.eval_fn))
    except Exception as error:
        notes.append(f"a model was taken as too bad, since eval_fn failed: {one_line(error)}")
        return math.nan
