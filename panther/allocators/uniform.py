"""The same share of every layer: what everyone else does, and the baseline."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from panther.allocators.base import Divergence, Evaluate, Options, exchanged, share, total
from panther.spec import Choice, Target

HALVINGS = 40  # of the share; ranks are integers, so that more of them change nothing


def uniform(options: Options, target: Target, *, divergence: Divergence, evaluate: Evaluate | None) -> list[Choice]:
    """Every layer keeps the same share of its cost, up to one step of rank: the largest for which the limits hold.

    A layer none of whose ranks is that small takes its smallest. What rounding to whole steps leaves over goes to the
    layers that were rounded down furthest.
    """
    ladders = [_ladder(choices, target) for choices in options.values()]
    low, high = 0.0, 1.0
    if target.is_met_by(total(_at(ladders, high))):
        return _at(ladders, high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if target.is_met_by(total(_at(ladders, middle))):
            low = middle
        else:
            high = middle
    return _rounded_up(_at(ladders, low), options, target, low)


_Ladder = tuple[list[float], list[Choice]]  # shares that rise, and the choice of least error up to each


def _ladder(choices: Sequence[Choice], target: Target) -> _Ladder:
    dense = choices[-1].cost
    rungs = sorted(((share(c.cost, dense, target), c) for c in choices), key=lambda rung: rung[0])
    best, bests = rungs[0][1], list[Choice]()
    for _, choice in rungs:
        best = min(best, choice, key=lambda c: (c.error, c.cost.params))
        bests.append(best)
    return [size for size, _ in rungs], bests


def _at(ladders: Sequence[_Ladder], kept: float) -> list[Choice]:
    """What every layer takes that keeps this share: its smallest one where none is so small."""
    return [bests[max(0, bisect.bisect_right(sizes, kept) - 1)] for sizes, bests in ladders]


def _rounded_up(chosen: list[Choice], options: Options, target: Target, kept: float) -> list[Choice]:
    """One step more for the layers furthest below the share, while the limits hold."""
    used = total(chosen)
    if not target.is_met_by(used):
        return chosen
    current = {c.layer: c for c in chosen}

    def shortfall(choice: Choice) -> float:
        dense = options[choice.layer][-1].cost
        return kept - share(choice.cost, dense, target)

    for choice in sorted(chosen, key=shortfall, reverse=True):
        better = _next_step(choice, options[choice.layer], target)
        after = used if better is None else exchanged(used, choice.cost, better.cost)
        if better is not None and target.is_met_by(after):
            current[choice.layer], used = better, after
    return list(current.values())


def _next_step(choice: Choice, choices: Sequence[Choice], target: Target) -> Choice | None:
    """The smallest option that costs more and loses less, never the dense layer."""
    dense = choices[-1].cost
    size = share(choice.cost, dense, target)
    larger = [c for c in choices[:-1] if share(c.cost, dense, target) > size and c.error < choice.error]
    return min(larger, key=lambda c: share(c.cost, dense, target), default=None)
