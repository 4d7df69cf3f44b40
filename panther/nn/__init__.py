"""The sketched layers: drop-in replacements of dense ones, whose weight is a chain of small factors.

To add one, write its file (a SketchedLayer) and add its line to `LAYERS`; the contract tests then hold it.
"""

from __future__ import annotations

from panther.nn.base import SketchedLayer
from panther.nn.conv import SKConv1d, SKConv2d, SKConv3d
from panther.nn.linear import SKLinear

LAYERS: dict[str, type[SketchedLayer]] = {
    "SKLinear": SKLinear,
    "SKConv1d": SKConv1d,
    "SKConv2d": SKConv2d,
    "SKConv3d": SKConv3d,
}

__all__ = ["LAYERS", "SKConv1d", "SKConv2d", "SKConv3d", "SKLinear", "SketchedLayer"]
