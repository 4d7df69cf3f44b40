"""A layer of two products as its pivoted form, in the way that what comes after it wants."""

from __future__ import annotations

from panther import chains
from panther.nn import PIVOTED, PivotedLayer, SketchedLayer, SKLinear, SKPivotedLinear
from panther.spec import Choice


def pivoted(layer: SketchedLayer, *, on_rows: bool) -> PivotedLayer:
    """A layer of two products without the identity in one of them.

    on_rows: a linear layer gathers its outputs, not its smaller side. So it has to where another layer takes them in
    any order, and where numbers are stored on a grid: identity rows have any scale, columns that of their row.

    Raises: ValueError where pivots would cost accuracy.
    """
    if not isinstance(layer, SKLinear):
        return PIVOTED[type(layer)].from_sketched(layer)
    on_inputs = layer.out_features > layer.in_features and not on_rows
    return SKPivotedLinear.from_sketched(layer, side=chains.COLUMNS if on_inputs else chains.ROWS)


def not_pivoted(choice: Choice, becomes: str, error: ValueError) -> str:
    """What users are told where pivots would cost accuracy."""
    return f"{choice.layer} is not pivoted, {becomes}: {error}"
