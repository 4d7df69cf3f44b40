"""Factors and a plan in, the compressed model out."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from panther.factors import Factors
from panther.nn import LAYERS
from panther.nn.surgery import with_layers
from panther.spec import Choice, Plan

SKETCHED = {layer.DENSE: layer for layer in LAYERS.values()}


def replace(model: nn.Module, factors: Mapping[str, Factors], plan: Plan) -> nn.Module:
    """A copy of the model with every layer that the plan sketches replaced; the model itself is not touched."""
    layers = {choice.layer: sketched_layer(factors[choice.layer], choice) for choice in plan.sketched}
    return with_layers(model, layers)


def sketched_layer(factors: Factors, choice: Choice) -> nn.Module:
    """One sketched layer with the dense layer's dtype, device and geometry."""
    parts, bias = factors.slice(choice)
    return SKETCHED[type(factors.module)].from_factors(factors.module, choice.scheme, parts, bias)
