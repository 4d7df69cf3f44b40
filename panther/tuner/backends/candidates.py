"""The points among which the model chooses: all over the box, and close to the best known."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from panther.errors import ExhaustedError
from panther.tuner.backends.base import evenly
from panther.tuner.space import Category, Float, Integer, Key, Space
from panther.tuner.trial import Params

ALL = 1_000  # points of a box that are all looked at
WIDE = 512  # points all over a larger box
CLOSE = 5  # known points that others are looked for around
EACH = 40  # points around each of them


def first_candidates(
    space: Space, best: Sequence[Params], avoid: Collection[Key], rng: np.random.Generator
) -> list[Params]:
    """New points: all of a small box; else some all over it, and neighbours of the best."""
    if space.size is not None and space.size <= ALL:
        return [params for params in space.all_points() if space.key(params) not in avoid]
    found = _all_over(space, rng)
    for scale in (0.2, 0.05):
        found += around(space, best[:CLOSE], scale, (), rng)
    return [params for params in found if space.key(params) not in avoid]


def _all_over(space: Space, rng: np.random.Generator) -> list[Params]:
    """Evenly spread points; where few of them are allowed, drawn ones as well."""
    places = evenly(len(space.parameters), WIDE, int(rng.integers(2**31)))
    found = [params for params in map(space.at, places) if space.is_allowed(params)]
    try:
        while len(found) < WIDE // 16:
            found.append(space.sample(rng))
    except ExhaustedError:
        pass
    return found


def around(
    space: Space, centres: Sequence[Params], scale: float, avoid: Collection[Key], rng: np.random.Generator
) -> list[Params]:
    """New points near others: one step along each parameter, and random ones at a distance of about `scale`."""
    found: list[Params] = []
    for centre in centres:
        found += _steps(space, centre)
        units = np.clip(space.unit(centre), 0.0, 1.0)
        moved = rng.random((EACH, len(units))) < max(0.5, 1 / len(units))
        places = np.clip(units + moved * scale * rng.standard_normal(moved.shape), 0.0, 1.0)
        found += [_kept_categories(space, centre, place, rng) for place in places.tolist()]
    return [p for p in found if space.is_allowed(p) and space.key(p) not in avoid]


def _kept_categories(space: Space, centre: Params, place: list[float], rng: np.random.Generator) -> Params:
    """The point at a place, with most categories as they are: they have no near and far."""
    params = space.near(place)
    for name, parameter in space.parameters.items():
        if isinstance(parameter, Category):
            params[name] = centre[name] if rng.random() < 0.8 else parameter.at(rng.random())
    return params


def _steps(space: Space, centre: Params) -> list[Params]:
    """The points that differ in one parameter, by one step or in the choice."""
    near = space.near(np.clip(space.unit(centre), 0.0, 1.0).tolist())
    found: list[Params] = []
    for name, parameter in space.parameters.items():
        if isinstance(parameter, Integer):
            values = [v for v in (near[name] - parameter.step, near[name] + parameter.step) if parameter.contains(v)]
        elif isinstance(parameter, Float):
            values = [parameter.low, parameter.high]
        else:
            values = [choice for choice in parameter.values() if choice != near[name]]
        found += [{**near, name: value} for value in values]
    return found
