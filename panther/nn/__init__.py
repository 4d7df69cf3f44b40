"""The sketched layers: drop-in replacements of dense ones, whose weight is a chain of small factors.

SK... layers store both factors whole; SKPivoted... are made from those and leave an identity out; Quantised... store
whole numbers with scales, of the dense weight or of factors, and QuantisedPivoted... of what pivots leave.

To add one, write its file (a SketchedLayer) and add its line to `LAYERS`; the contract tests then hold it.
"""

from __future__ import annotations

from torch import nn

from panther.nn.attention import SKMultiheadAttention
from panther.nn.base import SketchedLayer
from panther.nn.conv import SKConv1d, SKConv2d, SKConv3d
from panther.nn.linear import SKLinear
from panther.nn.pivoted import PivotedLayer, SKPivotedConv1d, SKPivotedConv2d, SKPivotedConv3d, SKPivotedLinear
from panther.nn.quantised import QuantisedConv1d, QuantisedConv2d, QuantisedConv3d, QuantisedLayer, QuantisedLinear
from panther.nn.quantised_pivoted import (
    QuantisedPivotedConv1d,
    QuantisedPivotedConv2d,
    QuantisedPivotedConv3d,
    QuantisedPivotedLayer,
    QuantisedPivotedLinear,
)

LAYERS: dict[str, type[SketchedLayer]] = {
    "SKLinear": SKLinear,
    "SKConv1d": SKConv1d,
    "SKConv2d": SKConv2d,
    "SKConv3d": SKConv3d,
    "SKPivotedLinear": SKPivotedLinear,
    "SKPivotedConv1d": SKPivotedConv1d,
    "SKPivotedConv2d": SKPivotedConv2d,
    "SKPivotedConv3d": SKPivotedConv3d,
    "QuantisedLinear": QuantisedLinear,
    "QuantisedConv1d": QuantisedConv1d,
    "QuantisedConv2d": QuantisedConv2d,
    "QuantisedConv3d": QuantisedConv3d,
    "QuantisedPivotedLinear": QuantisedPivotedLinear,
    "QuantisedPivotedConv1d": QuantisedPivotedConv1d,
    "QuantisedPivotedConv2d": QuantisedPivotedConv2d,
    "QuantisedPivotedConv3d": QuantisedPivotedConv3d,
}

# The layer of two products that stands for a dense one, the pivoted form of that layer, and what stores whole numbers
# of a dense layer and of a pivoted one.
SKETCHED: dict[type[nn.Module], type[SketchedLayer]] = {
    layer.DENSE: layer for layer in LAYERS.values() if not issubclass(layer, PivotedLayer | QuantisedLayer)
}
PIVOTED: dict[type[SketchedLayer], type[PivotedLayer]] = {
    layer.SKETCHED: layer
    for layer in LAYERS.values()
    if issubclass(layer, PivotedLayer) and not issubclass(layer, QuantisedPivotedLayer)
}
QUANTISED: dict[type[nn.Module], type[QuantisedLayer]] = {
    layer.DENSE: layer for layer in LAYERS.values() if issubclass(layer, QuantisedLayer)
}
QUANTISED_PIVOTED: dict[type[PivotedLayer], type[QuantisedPivotedLayer]] = {
    layer.FLOAT: layer for layer in LAYERS.values() if issubclass(layer, QuantisedPivotedLayer)
}
IN_WHOLE_NUMBERS = QuantisedLayer, QuantisedPivotedLayer

__all__ = [
    "IN_WHOLE_NUMBERS",
    "LAYERS",
    "PIVOTED",
    "QUANTISED",
    "QUANTISED_PIVOTED",
    "SKETCHED",
    "PivotedLayer",
    "QuantisedConv1d",
    "QuantisedConv2d",
    "QuantisedConv3d",
    "QuantisedLayer",
    "QuantisedLinear",
    "QuantisedPivotedConv1d",
    "QuantisedPivotedConv2d",
    "QuantisedPivotedConv3d",
    "QuantisedPivotedLayer",
    "QuantisedPivotedLinear",
    "SKConv1d",
    "SKConv2d",
    "SKConv3d",
    "SKLinear",
    "SKMultiheadAttention",
    "SKPivotedConv1d",
    "SKPivotedConv2d",
    "SKPivotedConv3d",
    "SKPivotedLinear",
    "SketchedLayer",
]
