"""Which layers take part: what include= and exclude= mean for the layers that capture found."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace as changed
from difflib import get_close_matches
from typing import Any

from torch import nn

from panther.spec import Capture


def selected(
    found: Capture,
    model: nn.Module,
    include: Sequence[Any] | None,
    exclude: Sequence[Any] | None,
    was: Mapping[str, nn.Module] | None = None,
) -> Capture:
    """The capture with layers outside `include`, or inside `exclude`, blocked for that reason.

    was: by name, what modules of the model were made from, and whose classes patterns mean.

    Raises: ValueError for a pattern that means no layer, TypeError for one that is neither text nor a class.
    """
    if include is None and exclude is None:
        return found
    names = {spec.name for spec in found.layers}
    own, was = dict(model.named_modules(remove_duplicate=False)), was or {}
    kinds = {name: was.get(name, was.get(name.rpartition(".")[0], own.get(name))) for name in names}
    wanted = names if include is None else _matches(include, "include", found, kinds)
    unwanted = set() if exclude is None else _matches(exclude, "exclude", found, kinds)
    layers = []
    for spec in found.layers:
        reasons = list(spec.blockers)
        if spec.name in unwanted:
            reasons.append("excluded by exclude=")
        elif spec.name not in wanted:
            reasons.append("not among include=")
        layers.append(changed(spec, blockers=tuple(reasons)))
    left = unwanted | (names - wanted)
    followers = tuple(pair for pair in found.followers if left.isdisjoint(pair.between))
    return changed(found, layers=tuple(layers), followers=followers)


def _matches(patterns: Any, argument: str, found: Capture, kinds: Mapping[str, nn.Module | None]) -> set[str]:
    """Names of the layers that the patterns mean."""
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str | type) else patterns:
        hits = {
            spec.name
            for spec in found.layers
            if any(_means(pattern, name, kinds[spec.name], argument) for name in (spec.name, *spec.aliases))
        }
        if not hits:
            close = get_close_matches(str(pattern), [s.name for s in found.layers], 3)
            hint = f"; nearest: {', '.join(close)}" if close else ""
            raise ValueError(f"{argument}={pattern!r} matches no dense layer of this model{hint}")
        chosen |= hits
    return chosen


def _means(pattern: Any, name: str, module: nn.Module | None, argument: str) -> bool:
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    if not isinstance(pattern, str):
        raise TypeError(f"{argument} holds {pattern!r}: expected layer names, globs, 're:...' or layer classes")
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise ValueError(f"{argument}={pattern!r} is not a regular expression: {error}") from None
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(pattern + ".")
