"""What an allocator is given, and the convex machinery that allocators share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from dataclasses import replace as changed
from typing import Any, Protocol

from panther.chains import CHANNELS, WHOLE
from panther.mixture import mixture
from panther.spec import Choice, Cost, Target

Options = Mapping[str, Sequence[Choice]]  # layer -> choices in rising size, dense last
Divergence = Callable[[str, float], float]  # layer, its error -> what that does to the output
Evaluate = Callable[[Sequence[Choice]], float]  # choices -> measured divergence of the whole model

MOST_ROUNDINGS = 64  # plans that are tried for one program
SHORTLIST = 5  # plans that are looked at closely
SMALLEST = 1e-9  # what limits and costs of zero or less are divided as; milliseconds are well above


class Allocator(Protocol):
    """One Choice a layer within the target's limits."""

    def __call__(
        self, options: Options, target: Target, *, divergence: Divergence, evaluate: Evaluate | None
    ) -> list[Choice]: ...


def total(choices: Sequence[Choice]) -> Cost:
    return sum((c.cost for c in choices), Cost())


def limit_on(counted: str, most: int) -> Target:
    """The target with this one limit, on a field of Cost."""
    limits: dict[str, Any] = {counted: most}
    return Target(**limits)


def without_slack(target: Target, options: Options) -> Target:
    """The target without a limit on milliseconds that no plan reaches: it would only count as one that may bind."""
    longest = sum(max(c.cost.latency_ms for c in choices) for choices in options.values())
    return target if target.latency_ms is None or target.latency_ms < longest else changed(target, latency_ms=None)


def in_whole_numbers(plan: Sequence[Choice], options: Options) -> list[Choice]:
    """The choices with layers that have no chain stored in the most bits that are offered, with the fewest scales.

    A layer that this would make larger, or slower where that was measured, stays as it is.
    """
    return [_in_whole_numbers(choice, options[choice.layer]) for choice in plan]


def _in_whole_numbers(choice: Choice, options: Sequence[Choice]) -> Choice:
    if not choice.is_dense and choice.scheme != CHANNELS:
        return choice
    most = choice.cost
    fits = [
        option
        for option in options
        if option.scheme == WHOLE
        and option.channels == choice.channels
        and (option.cost.size_bytes <= most.size_bytes and option.cost.latency_ms <= most.latency_ms)
    ]
    return max(fits, key=lambda c: (c.grid.bits if c.grid else 0, -c.cost.size_bytes), default=choice)


def exchanged(whole: Cost, old: Cost, new: Cost) -> Cost:
    """What everything costs once one part is another."""
    return Cost(
        whole.params - old.params + new.params,
        whole.flops - old.flops + new.flops,
        whole.size_bytes - old.size_bytes + new.size_bytes,
        whole.latency_ms - old.latency_ms + new.latency_ms,
    )


def best_of(plans: Sequence[Sequence[Choice]], evaluate: Evaluate) -> list[Choice]:
    """The plan that does least to the model.

    Few samples tell plans apart by luck: where `evaluate` can look at more of them (a function `closely` of it), those
    that come out best on few are looked at so, and decide.
    """
    ranked = sorted(plans, key=evaluate)
    closely: Evaluate = getattr(evaluate, "closely", evaluate)
    best = ranked[0] if closely is evaluate else min(ranked[:SHORTLIST], key=closely)
    return list(best)


def share(cost: Cost, dense: Cost, target: Target) -> float:
    """The largest share of the dense cost, over the limits that the target sets (1 when it sets none)."""
    return max((_part(getattr(cost, name), getattr(dense, name)) for name in target.limits()), default=1.0)


def price(cost: Cost, target: Target, weights: Mapping[str, float]) -> float:
    """One number for a cost: each limited quantity as a share of its limit, weighted."""
    return sum((weights[name] * _part(getattr(cost, name), limit) for name, limit in target.limits().items()), 0.0)


def _part(amount: float, whole: float) -> float:
    """amount / whole; of nothing, or of less, any amount is a very large part."""
    return amount / max(whole, SMALLEST)


def is_less(loss: float, than: float) -> bool:
    """Whether a loss is smaller by more than rounding: no weights are spent on a difference below one in a million."""
    return loss < than - 1e-6 * abs(than) if than < math.inf else loss < than


def lower_hull(points: Sequence[tuple[float, float, Choice]]) -> list[tuple[float, float, Choice]]:
    """The (price, loss, choice) points that a straight trade-off can ever pick, in rising price and falling loss."""
    hull: list[tuple[float, float, Choice]] = []
    for point in sorted(points, key=lambda p: (p[0], p[1])):
        if hull and not is_less(point[1], hull[-1][1]):
            continue
        while len(hull) >= 2 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _above(a: tuple[float, float, Choice], b: tuple[float, float, Choice], c: tuple[float, float, Choice]) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


_Weighed = tuple[float, list[float], Choice]  # loss, costs that are limited


@dataclass(frozen=True)
class _Ranked:
    """The options of each layer as they are given, and by rising loss; and each of them by its identity."""

    given: Mapping[str, Sequence[_Weighed]]
    by_loss: Mapping[str, Sequence[_Weighed]]
    known: Mapping[int, _Weighed]


def _ranked(options: Options, target: Target, loss: Callable[[Choice], float]) -> _Ranked:
    limits = target.limits()
    given = {
        layer: [(loss(c), [getattr(c.cost, name) for name in limits], c) for c in choices]
        for layer, choices in options.items()
    }
    by_loss = {
        layer: sorted((one for one in choices if not math.isnan(one[0])), key=lambda one: one[0])
        for layer, choices in given.items()
    }
    return _Ranked(given, by_loss, {id(one[2]): one for choices in given.values() for one in choices})


def convex(options: Options, target: Target, loss: Callable[[Choice], float]) -> list[Choice]:
    """The choices of least total loss within the limits, up to one choice a limit.

    With one limit, starts with the cheapest of each layer and takes hull steps in falling gain per price while they
    fit. With several, a linear program says how much of each choice a layer would take if it could take parts of them;
    no more layers than there are limits take parts of more than one. Where neither leads within the limits, single
    exchanges do as far as they can.
    """
    limits = target.limits()
    if not options:
        return []
    losses = {id(c): loss(c) for choices in options.values() for c in choices}  # each is asked for many times

    def lost(choice: Choice) -> float:
        return losses[id(choice)]

    ranked = _ranked(options, target, lost)
    plan = _greedy(options, target, {name: 1.0 / len(limits) for name in limits}, lost, ranked)
    is_within = target.is_met_by(total(plan))
    if len(limits) > 1:
        most = sum(lost(c) for c in plan) if is_within else math.inf
        mixed = _mixed(options, target, lost, ranked, most)
        if mixed is not None and (not is_within or sum(lost(c) for c in mixed) < most):
            return mixed
    if is_within or not target.is_met_by(_least(options)):
        return plan
    return _fill(_nearer(plan, options, target), target, ranked)


def _mixed(
    options: Options, target: Target, loss: Callable[[Choice], float], ranked: _Ranked, most: float
) -> list[Choice] | None:
    """The plan next to the one that may mix the choices of a layer; None where there is none within the limits.

    most: total loss that is known to be possible.
    """
    limits, every = target.limits(), list(options.values())
    found = mixture(
        [[[_part(getattr(c.cost, n), limit) for n, limit in limits.items()] for c in choices] for choices in every],
        [[loss(c) for c in choices] for choices in every],
        most,
    )
    if found is None or not all(found):
        return None
    taken = [[choices[i] for i in places] for choices, places in zip(every, found, strict=True)]
    plans = [list(plan) for plan in itertools.islice(itertools.product(*taken), MOST_ROUNDINGS)]
    plans = [plan if target.is_met_by(total(plan)) else _nearer(plan, options, target) for plan in plans]
    within = [_fill(plan, target, ranked) for plan in plans if target.is_met_by(total(plan))]
    return min(within, key=lambda plan: sum(loss(c) for c in plan), default=None)


def improved(plan: Sequence[Choice], options: Options, target: Target, loss: Callable[[Choice], float]) -> list[Choice]:
    """The plan with what it leaves of the limits spent on larger choices where these gain most; itself beyond them."""
    if not target.is_met_by(total(plan)):
        return list(plan)
    limited = target.limits()
    larger: dict[str, list[Choice]] = {}
    for now in plan:
        choices = options[now.layer]
        larger[now.layer] = [now, *(c for c in choices if all(_adds(c.cost, now.cost, name) for name in limited))]
    return convex(larger, target, loss)


def _adds(cost: Cost, to: Cost, name: str) -> bool:
    return bool(getattr(cost, name) >= getattr(to, name))


def _least(options: Options) -> Cost:
    """What no plan can be below, each kind of cost by itself."""
    kinds = [field.name for field in fields(Cost)]
    return total(
        [
            Choice("", cost=Cost(**{kind: min(getattr(c.cost, kind) for c in choices) for kind in kinds}))
            for choices in options.values()
        ]
    )


def excess(cost: Cost, target: Target) -> tuple[float, float]:
    """How far beyond its limits a cost is: the worst of them, then all together, as parts of the limits."""
    parts = [_part(getattr(cost, name), limit) for name, limit in target.limits().items()]
    return max(parts), sum(parts)


def _nearer(plan: Sequence[Choice], options: Options, target: Target) -> list[Choice]:
    """The plan after the exchanges of one layer's choice that bring it nearest to the limits, until it is within."""
    current = {c.layer: c for c in plan}
    used = total(plan)
    while not target.is_met_by(used):
        moves = [
            (excess(exchanged(used, current[layer].cost, option.cost), target), layer, place)
            for layer, choices in options.items()
            for place, option in enumerate(choices)
        ]
        least, layer, place = min(moves)
        if least >= excess(used, target):
            break
        option = options[layer][place]
        used = exchanged(used, current[layer].cost, option.cost)
        current[layer] = option
    return [current[layer] for layer in options]


def _greedy(
    options: Options, target: Target, weights: Mapping[str, float], loss: Callable[[Choice], float], ranked: _Ranked
) -> list[Choice]:
    hulls = {
        layer: lower_hull([(price(c.cost, target, weights), loss(c), c) for c in choices])
        for layer, choices in options.items()
    }
    at = dict.fromkeys(hulls, 0)
    used = total([hull[0][2] for hull in hulls.values()])
    steps = sorted(
        (
            ((low[1] - high[1]) / max(high[0] - low[0], 1e-30), layer, index)
            for layer, hull in hulls.items()
            for index, (low, high) in enumerate(itertools.pairwise(hull), 1)
        ),
        key=lambda step: (-step[0], step[1], step[2]),
    )
    stuck: set[str] = set()
    for _gain, layer, index in steps:
        if layer in stuck:
            continue
        now, then = hulls[layer][at[layer]][2].cost, hulls[layer][index][2].cost
        after = exchanged(used, now, then)
        if target.is_met_by(after):
            used, at[layer] = after, index
        else:
            stuck.add(layer)
    return _fill([hulls[layer][at[layer]][2] for layer in hulls], target, ranked)


def _fill(chosen: list[Choice], target: Target, ranked: _Ranked) -> list[Choice]:
    """Spend what the hull steps left over on single options that still fit, best gain first."""
    limits = target.limits()
    current = {c.layer: ranked.known[id(c)] for c in chosen}
    used = [getattr(total(chosen), name) for name in limits]

    def fits(old: _Weighed, new: _Weighed) -> bool:
        return all(u - a + b <= most for u, a, b, most in zip(used, old[1], new[1], limits.values(), strict=True))

    # An option of less loss than another gains more: the first one that fits is the best of its layer. What is without
    # bound gains as much by any other option: there it is the first, which is the smallest.
    while True:
        best: tuple[float, _Weighed] | None = None
        for layer, now in current.items():
            for option in (ranked.given if now[0] == math.inf else ranked.by_loss)[layer]:
                gain = now[0] - option[0]
                if gain <= 0 or (best is not None and gain <= best[0]):
                    break
                if is_less(option[0], now[0]) and fits(now, option):
                    best = (gain, option)
                    break
        if best is None:
            return [current[layer][2] for layer in ranked.given]
        option = best[1]
        used = [u - a + b for u, a, b in zip(used, current[option[2].layer][1], option[1], strict=True)]
        current[option[2].layer] = option
