"""Factors and a plan in, the compressed model out."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

from torch import nn

from panther.chains import CHANNELS, CORRECTED, WHOLE
from panther.factors import Factors
from panther.nn import SKETCHED
from panther.nn.narrow import DENSE_SIZES, is_narrowed, narrowed
from panther.nn.surgery import as_plain, with_layers
from panther.spec import Choice, Plan


def replace(model: nn.Module, factors: Mapping[str, Factors], plan: Plan) -> nn.Module:
    """A copy of the model with every layer that the plan sketches or narrows replaced; the model is not touched."""
    layers: dict[str, nn.Module] = {}
    for choice in plan.sketched:
        known = factors[choice.layer].at(choice)
        if choice.scheme in (WHOLE, CORRECTED) and not choice.channels:
            continue  # it becomes what it will be when it is rounded
        layers[choice.layer] = sketched_layer(known, choice)
        layers.update(modules_between(model, known) if choice.channels else ())
    return with_layers(model, layers)


def sketched_layer(factors: Factors, choice: Choice) -> nn.Module:
    """One sketched layer with the dense layer's dtype, device and geometry; a dense one where channels are fewer.

    factors: of the layer with the choice's channels. The layer's weights are floating-point numbers in any case.
    """
    if choice.scheme in (CHANNELS, WHOLE, CORRECTED):
        return narrowed(factors.module) if is_narrowed(factors.module) else copy.deepcopy(factors.module)
    parts, bias = factors.slice(choice)
    kind = next(dense for dense in SKETCHED if isinstance(factors.module, dense))
    # A subclass that capture offers computes what its parent does, and becomes what its parent would.
    layer = SKETCHED[kind].from_factors(as_plain(factors.module, kind), choice.scheme, parts, bias)
    if is_narrowed(factors.module):
        vars(layer)[DENSE_SIZES] = vars(factors.module)[DENSE_SIZES]
    return layer


def modules_between(model: nn.Module, known: Factors) -> Iterator[tuple[str, nn.Module]]:
    """What lies between a pair, with the channels that are left; `known` is the second layer with fewer channels."""
    if known.pair is not None and known.axis == 1:
        for name in known.pair.between:
            yield name, narrowed(model.get_submodule(name), outputs=known.kept)


def changed_layers(factors: Mapping[str, Factors], choice: Choice) -> tuple[str, ...]:
    """Names of the modules that a choice puts others in place of."""
    known = factors[choice.layer].at(choice)
    return (choice.layer, *(known.pair.between if choice.channels and known.pair is not None else ()))
