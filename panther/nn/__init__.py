"""The sketched layers: drop-in replacements of dense ones, whose weight is a chain of small factors.

SK... layers store both factors whole; SKPivoted... are made from those and leave an identity out; Quantised... store
whole numbers with scales, of the dense weight or of factors.

To add one, write its file (a SketchedLayer) and add its line to `LAYERS`; the contract tests then hold it.
"""

from __future__ import annotations

from torch import nn

from panther.nn.base import SketchedLayer
from panther.nn.conv import SKConv1d, SKConv2d, SKConv3d
from panther.nn.linear import SKLinear
from panther.nn.pivoted import PivotedLayer, SKPivotedConv1d, SKPivotedConv2d, SKPivotedConv3d, SKPivotedLinear
from panther.nn.quantised import QuantisedConv1d, QuantisedConv2d, QuantisedConv3d, QuantisedLayer, QuantisedLinear

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
}

# The layer of two products that stands for a dense one, the pivoted form of that layer, and what stores whole numbers.
SKETCHED: dict[type[nn.Module], type[SketchedLayer]] = {
    layer.DENSE: layer for layer in LAYERS.values() if not issubclass(layer, PivotedLayer | QuantisedLayer)
}
PIVOTED: dict[type[SketchedLayer], type[PivotedLayer]] = {
    layer.SKETCHED: layer for layer in LAYERS.values() if issubclass(layer, PivotedLayer)
}
QUANTISED: dict[type[nn.Module], type[QuantisedLayer]] = {
    layer.DENSE: layer for layer in LAYERS.values() if issubclass(layer, QuantisedLayer)
}

__all__ = [
    "LAYERS",
    "PIVOTED",
    "QUANTISED",
    "SKETCHED",
    "PivotedLayer",
    "QuantisedConv1d",
    "QuantisedConv2d",
    "QuantisedConv3d",
    "QuantisedLayer",
    "QuantisedLinear",
    "SKConv1d",
    "SKConv2d",
    "SKConv3d",
    "SKLinear",
    "SKPivotedConv1d",
    "SKPivotedConv2d",
    "SKPivotedConv3d",
    "SKPivotedLinear",
    "SketchedLayer",
]
