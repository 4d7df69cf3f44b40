"""How long each layer takes, dense and at every rank: measured once for all layers of one geometry.

A few ranks of each scheme, packing and grid run strictly in turn with the dense layer, on inputs of the layer's own
shape. The ranks between them are interpolated over the operations that they need. A layer with fewer channels is
measured dense only: its ranks are to it what those of the whole layer are to that, since a plan can have dozens of
widths, and what the whole model takes is measured in the end.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace as changed
from typing import Protocol

import torch
from torch import Tensor, nn

from panther.factors import Factors, dense_weight
from panther.progress import Progress
from panther.spec import Choice, Grid, LayerSpec

PROBES = 3  # ranks measured a scheme and packing: the time of a product is nearly a straight line over its operations
SECONDS_A_RUN = 0.05  # 500 calls of a layer of 0.1 ms, 5 of one of 10 ms
TICK_MS = 2.0**-20  # milliseconds are multiples of this nanosecond, so that their sums are exact in any order

Way = tuple[str, str, Grid | None]  # scheme, packing, grid
Curves = Mapping[Way, Sequence[tuple[float, float]]]  # (operations, ms) of one call


class Medians(Protocol):
    """Median seconds of each run, all measured in turn for about `seconds`."""

    def __call__(self, runs: Sequence[Callable[[], object]], *, seconds: float) -> list[float]: ...


def with_latency(
    options: Mapping[str, Sequence[Choice]],
    factors: Mapping[str, Factors],
    *,
    build: Callable[[Choice], nn.Module],
    medians: Medians,
    whole: Mapping[str, Sequence[Choice]] | None = None,
    progress: Progress | None = None,
) -> dict[str, tuple[Choice, ...]]:
    """The options with their milliseconds, at torch's current threads.

    whole: of layers with fewer channels, the options of the same layers with all of them, with their milliseconds.
    A layer that cannot be run by itself can only stay dense, with that reason.
    """
    groups: dict[object, list[str]] = defaultdict(list)
    for name in options:
        groups[_geometry(factors[name])].append(name)
    timed: dict[str, tuple[Choice, ...]] = {}
    for names in (progress or Progress(False)).track(list(groups.values()), "timing layers", len(groups)):
        first = names[0]
        try:
            probes = [] if whole else [c for group in _grouped(options[first]).values() for c in _spread(group)]
            dense_ms, curves = _measured(probes, factors[first], build, medians)
        except Exception as error:  # its real inputs may be of a kind that random ones are not
            reason = f"its latency could not be measured: {type(error).__name__}: {str(error).strip()[:160]}"
            timed.update({name: (changed(options[name][-1], reason=reason),) for name in names})
            continue
        for name in names:
            spec = factors[name].spec
            own = _curves_of(whole[name], options[name][-1].cost.flops / spec.calls, dense_ms) if whole else curves
            timed[name] = _timed_all(options[name], spec, dense_ms, own)
    return {name: timed[name] for name in options}


def only_faster(options: Mapping[str, Sequence[Choice]]) -> dict[str, tuple[Choice, ...]]:
    """The options that take less time than the dense layer, and that one; where none does, it says so."""
    return {name: _faster(choices) for name, choices in options.items()}


def _geometry(factors: Factors) -> object:
    """Equal for layers that take equally long at equal ranks."""
    weight = dense_weight(factors.module)
    spec = changed(factors.spec, name="", rows=0, calls=1, output_shape=(), input_key="", aliases=())
    return spec, weight.dtype, weight.device, factors.profile.mean is None, tuple(factors.schemes)


def _measured(
    probes: Sequence[Choice], factors: Factors, build: Callable[[Choice], nn.Module], medians: Medians
) -> tuple[float, Curves]:
    """Milliseconds of one call of the dense layer, and of a few of its options."""
    given = _random_input(factors)
    layers = [factors.module, *map(build, probes)]
    with torch.no_grad():
        seconds = medians([_call(layer, given) for layer in layers], seconds=SECONDS_A_RUN * len(layers))
    points: dict[Way, list[tuple[float, float]]] = defaultdict(list)
    for choice, taken in zip(probes, seconds[1:], strict=True):
        points[_way(choice)].append((choice.cost.flops / factors.spec.calls, taken * 1e3))
    return seconds[0] * 1e3, {key: _never_falling(values) for key, values in points.items()}


def _curves_of(whole: Sequence[Choice], flops: float, dense_ms: float) -> Curves:
    """The times of a layer's options, as shares of its own, for one of so many operations and milliseconds a call."""
    *every, dense = whole
    wider, slower = flops / max(dense.cost.flops, 1), dense_ms / max(dense.cost.latency_ms, TICK_MS)
    points: dict[Way, list[tuple[float, float]]] = defaultdict(list)
    for choice in sorted(every, key=lambda c: c.cost.flops):
        points[_way(choice)].append((choice.cost.flops * wider, choice.cost.latency_ms * slower))
    return points


def _way(choice: Choice) -> Way:
    return choice.scheme, choice.packing, choice.grid


def _grouped(options: Sequence[Choice]) -> dict[Way, list[Choice]]:
    """Options that differ by their rank only, in rising operations."""
    groups: dict[Way, list[Choice]] = defaultdict(list)
    for choice in sorted(options[:-1], key=lambda c: c.cost.flops):
        groups[_way(choice)].append(choice)
    return groups


def _spread(group: Sequence[Choice]) -> Iterator[Choice]:
    """The first, the last, and as many evenly between them as PROBES asks for."""
    last = len(group) - 1
    for place in sorted({round(last * i / (PROBES - 1)) for i in range(PROBES)}):
        yield group[place]


def _random_input(factors: Factors) -> Tensor:
    weight = dense_weight(factors.module)
    numbers = torch.randn(factors.spec.input_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    return numbers.to(weight)


def _call(layer: nn.Module, given: Tensor) -> Callable[[], object]:
    """One call without the user's hooks, waited for."""

    def once() -> None:
        layer.forward(given)
        if given.is_cuda:
            torch.cuda.synchronize(given.device)

    return once


def _never_falling(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The nearest times (in squares) that never fall while operations rise: a dip is noise.

    Source: pool adjacent violators, Barlow et al., Statistical Inference under Order Restrictions (1972).
    """
    pools: list[tuple[float, int]] = []
    for _, time in points:
        pools.append((time, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (late, many), (early, few) = pools.pop(), pools.pop()
            pools.append(((late * many + early * few) / (many + few), many + few))
    smooth = [time for time, count in pools for _ in range(count)]
    return [(flops, time) for (flops, _), time in zip(points, smooth, strict=True)]


def _timed_all(options: Sequence[Choice], spec: LayerSpec, dense_ms: float, curves: Curves) -> tuple[Choice, ...]:
    every = [
        _timed(c, spec.calls * _between(curves[_way(c)], c.cost.flops / spec.calls))
        for c in options[:-1]
        if _way(c) in curves
    ]
    return (*every, _timed(options[-1], dense_ms * spec.calls))


def _faster(options: Sequence[Choice]) -> tuple[Choice, ...]:
    *every, dense = options
    faster = [choice for choice in every if choice.cost.latency_ms < dense.cost.latency_ms]
    if every and not faster:
        least = min(choice.cost.latency_ms for choice in every)
        dense = changed(
            dense,
            reason=f"no rank is faster than the dense layer here ({least:.3g} ms at best against "
            f"{dense.cost.latency_ms:.3g} ms)",
        )
    return (*faster, dense)


def _timed(choice: Choice, latency_ms: float) -> Choice:
    return changed(choice, cost=changed(choice.cost, latency_ms=round(latency_ms / TICK_MS) * TICK_MS))


def _between(points: Sequence[tuple[float, float]], flops: float) -> float:
    """Milliseconds at this many operations, on straight lines between the points and level outside of them."""
    if flops <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in itertools.pairwise(points):
        if flops <= right:
            return low + (high - low) * (flops - left) / (right - left)
    return points[-1][1]
