"""The sketched layers: drop-in replacements of dense ones, whose weight is a chain of small factors.

SK... layers store both factors whole; SKPivoted... are made from those and leave an identity out.

To add one, write its file (a SketchedLayer) and add its line to `LAYERS`; the contract tests then hold it.
"""

from __future__ import annotations

from torch import nn

from panther.nn.base import SketchedLayer
from panther.nn.conv import SKConv1d, SKConv2d, SKConv3d
from panther.nn.linear import SKLinear
from panther.nn.pivoted import PivotedLayer, SKPivotedConv1d, SKPivotedConv2d, SKPivotedConv3d, SKPivotedLinear

LAYERS: dict[str, type[SketchedLayer]] = {
    "SKLinear": SKLinear,
    "SKConv1d": SKConv1d,
    "SKConv2d": SKConv2d,
    "SKConv3d": SKConv3d,
    "SKPivotedLinear": SKPivotedLinear,
    "SKPivotedConv1d": SKPivotedConv1d,
    "SKPivotedConv2d": SKPivotedConv2d,
    "SKPivotedConv3d": SKPivotedConv3d,
}

# The layer of two products that stands for a dense one, and the pivoted form of that layer.
SKETCHED: dict[type[nn.Module], type[SketchedLayer]] = {
    layer.DENSE: layer for layer in LAYERS.values() if not issubclass(layer, PivotedLayer)
}
PIVOTED: dict[type[SketchedLayer], type[PivotedLayer]] = {
    layer.SKETCHED: layer for layer in LAYERS.values() if issubclass(layer, PivotedLayer)
}

__all__ = [
    "LAYERS",
    "PIVOTED",
    "SKETCHED",
    "PivotedLayer",
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
