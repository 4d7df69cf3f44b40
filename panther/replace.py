"""Factors and a plan in, the compressed model out."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from panther.factors import Factors
from panther.nn import SKETCHED
from panther.nn.surgery import as_plain, with_layers
from panther.spec import Choice, Plan


def replace(model: nn.Module, factors: Mapping[str, Factors], plan: Plan) -> nn.Module:
    """A copy of the model with every layer that the plan sketches replaced; the model itself is not touched."""
    layers = {choice.layer: sketched_layer(factors[choice.layer], choice) for choice in plan.sketched}
    return with_layers(model, layers)


def sketched_layer(factors: Factors, choice: Choice) -> nn.Module:
    """One sketched layer with the dense layer's dtype, device and geometry."""
    parts, bias = factors.slice(choice)
    kind = next(dense for dense in SKETCHED if isinstance(factors.module, dense))
    # A subclass that capture offers computes what its parent does, and becomes what its parent would.
    return SKETCHED[kind].from_factors(as_plain(factors.module, kind), choice.scheme, parts, bias)
