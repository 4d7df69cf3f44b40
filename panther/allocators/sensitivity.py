"""Ranks by what each layer's error does to the model's output, checked on the whole model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from panther.allocators.base import Divergence, Evaluate, Options, best_of, convex, excess, improved, share, total
from panther.allocators.uniform import uniform
from panther.chains import WHOLE
from panther.spec import Choice, Target

# Shares of a layer's uniform size that it keeps whatever its measured importance. One layer's importance is measured
# with all others dense, so a plan without a floor trusts it too far; which floor is right depends on the model.
FLOORS = (0.25, 0.5, 0.75)
POWERS = (1.0, 0.5)  # exponents on the measured divergence: 0.5 trusts differences between layers less

# How much less than the best plan one without the fewest bits must do to the model, to be taken: a share of it. MiniLM
# at .109 of its bytes: taken at .99 of the divergence it ended, refitted, at cosine .977, left at .981.
CLEARLY = 0.8


def sensitivity(options: Options, target: Target, *, divergence: Divergence, evaluate: Evaluate | None) -> list[Choice]:
    """The plan of least predicted divergence within the limits, for several floors; the best on the model wins.

    The uniform plan is among those tried, and every layer on the same grid, each as it is and with what it leaves
    spent, so the answer is never worse on the samples that `evaluate` uses. Without `evaluate` the middle floor is
    taken. A plan without floors is made where none with them is within the limits. The best plan without the grids of
    fewest bits is taken where it is CLEARLY better.
    """
    best = _best_for(options, target, divergence, evaluate)
    fewer = None if evaluate is None else without_coarsest(options)
    if fewer is None or evaluate is None:
        return best
    other = _best_for(fewer, target, divergence, evaluate)
    if not target.is_met_by(total(other)):
        return best
    judge: Evaluate = getattr(evaluate, "closely", evaluate)
    return other if not target.is_met_by(total(best)) or judge(other) < CLEARLY * judge(best) else best


def _best_for(options: Options, target: Target, divergence: Divergence, evaluate: Evaluate | None) -> list[Choice]:
    """The best plan of these options; the one that is nearest to the limits where none is within them."""
    loss = powered(divergence, 1.0)
    plans = _proposed(options, target, divergence=divergence, judged=evaluate is not None)
    if not any(target.is_met_by(total(plan)) for plan in plans):
        plans.append(planned(options, target, plans[0], 0.0, loss))
    for plan in on_one_grid(options):
        plans += [plan, improved(plan, options, target, loss)]
    within = [p for index, p in enumerate(plans) if p not in plans[:index] and target.is_met_by(total(p))]
    if not within:
        return min(plans, key=lambda plan: excess(total(plan), target))
    return within[0] if evaluate is None else best_of(within, evaluate)


def _proposed(options: Options, target: Target, *, divergence: Divergence, judged: bool) -> list[list[Choice]]:
    """The uniform plan and one for each floor where they are going to be `judged`; else one of the middle floor."""
    even = uniform(options, target, divergence=divergence, evaluate=None)
    tried = [(floor, power) for floor in FLOORS for power in POWERS] if judged else [(0.5, 1.0)]
    plans = [even, improved(even, options, target, powered(divergence, 1.0))] if judged else []
    return plans + [planned(options, target, even, floor, powered(divergence, power)) for floor, power in tried]


def without_coarsest(options: Options) -> Options | None:
    """The same without the grids of fewest bits; None where there are no others.

    What is offered changes the uniform plan, and with it the floors: offered 3 bits, plans of 4 were passed over that
    lost a half to a quarter as much.
    """
    bits = sorted({c.grid.bits for choices in options.values() for c in choices if c.grid is not None})
    if len(bits) < 2:
        return None
    return {name: [c for c in cs if c.grid is None or c.grid.bits > bits[0]] for name, cs in options.items()}


def on_one_grid(options: Options) -> list[list[Choice]]:
    """For each grid that is offered the plan in which all layers that can have it do, and the others stay dense."""
    whole = [{c.grid: c for c in choices if c.scheme == WHOLE} for choices in options.values()]
    grids = dict.fromkeys(grid for found in whole for grid in found)
    return [
        [found.get(grid, choices[-1]) for found, choices in zip(whole, options.values(), strict=True)] for grid in grids
    ]


def planned(
    options: Options, target: Target, even: Sequence[Choice], floor: float, loss: Callable[[Choice], float]
) -> list[Choice]:
    """The plan of least total loss in which every layer keeps `floor` times its share of the uniform plan `even`."""
    floors = {c.layer: c for c in even}
    kept = {layer: _above_floor(choices, floors[layer], target, floor) for layer, choices in options.items()}
    return convex(kept, target, loss)


def powered(divergence: Divergence, power: float) -> Callable[[Choice], float]:
    """A choice's loss: its divergence to a power."""
    return lambda choice: float(divergence(choice.layer, choice.error) ** power)


def _above_floor(choices: Sequence[Choice], even: Choice, target: Target, floor: float) -> list[Choice]:
    """The options that keep at least `floor` times what the uniform plan gives this layer; never none."""
    dense = choices[-1].cost
    least = floor * share(even.cost, dense, target)
    kept = [c for c in choices if share(c.cost, dense, target) >= least]
    return kept or [even]
