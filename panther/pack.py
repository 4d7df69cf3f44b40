"""A healed model and its plan in, the same model stored as the plan says.

A layer that the plan packs as "pivoted" leaves an identity out of a factor, which leaves its channels in another order.
Where the neighbour can take that order over, nothing has to be gathered when the model runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from panther import chains
from panther.nn import (
    PIVOTED,
    QUANTISED,
    QUANTISED_PIVOTED,
    PivotedLayer,
    QuantisedLayer,
    QuantisedPivotedLayer,
    SketchedLayer,
)
from panther.nn.narrow import DENSE_SIZES, NUMBERS, is_narrowed
from panther.nn.on_grid import CorrectedLinear, corrected, held, hold, is_held, let_go
from panther.nn.packing import not_pivoted, pivoted
from panther.nn.surgery import as_plain, inherit, put_layers
from panther.quantise import Rounded, incoherent, to_nearest
from panther.spec import Choice, Grid, Pair, Plan


def pack(model: nn.Module, plan: Plan, followers: Iterable[Pair] = (), *, notes: list[str] | None = None) -> nn.Module:
    """The model with each layer stored as its Choice says; it is changed in place, and returned.

    Where pivots would cost accuracy a layer keeps its two products, or becomes dense where those would be larger; the
    reason is added to `notes`. followers: neighbours that share the order of their channels (Capture.followers). The
    model computes the same as before, up to rounding.
    """
    known = {choice.layer for choice in plan.choices if choice.grid is None}  # numbers keep their order
    pairs = [pair for pair in followers if {pair.producer, pair.consumer} <= known]
    followed = {pair.producer for pair in pairs}
    made = {}
    for choice in plan.sketched:
        layer = model.get_submodule(choice.layer)
        stored = packed(layer, choice, has_follower=choice.layer in followed, notes=notes)
        if stored is not layer:
            made[choice.layer] = stored
    if "" in made:  # the model is itself the layer
        inherit(made[""], model)
        return made[""]
    put_layers(model, made)
    for pair in pairs:
        _absorb(model, pair)
    return model


def packed(
    layer: nn.Module, choice: Choice, *, has_follower: bool = False, notes: list[str] | None = None
) -> nn.Module:
    """One layer stored as its Choice says; the layer itself, or the dense one, where pivots would cost accuracy.

    has_follower: another layer takes the outputs in any order.
    """
    if choice.packing == chains.PIVOTED and isinstance(layer, SketchedLayer) and type(layer) in PIVOTED:
        is_whole = choice.grid is not None
        try:
            layer = pivoted(layer, on_rows=has_follower or is_whole)
        except ValueError as error:
            weights = layer.active_weights()
            is_larger = sum(weight.numel() for weight in weights) >= layer.weight.numel()
            if notes is not None:
                becomes = "it is dense" if is_larger and not is_whole else "it keeps its products"
                notes.append(not_pivoted(choice, becomes, error))
            layer = layer.to_dense() if is_larger and not is_whole else layer
    if choice.grid is None:
        return layer
    return _quantised_pivots(layer, choice) if isinstance(layer, PivotedLayer) else _quantised(layer, choice)


def _quantised_pivots(layer: PivotedLayer, choice: Choice) -> QuantisedPivotedLayer:
    """A pivoted layer that was held to its grid, or is rounded here and now, as whole numbers."""
    parts = [held(layer, name) or _nearest(getattr(layer, name), grid) for name, grid in _grids(layer, choice)]
    let_go(layer)
    kind = next(kind for kind in QUANTISED_PIVOTED if isinstance(layer, kind))
    new = QUANTISED_PIVOTED[kind].from_rounded(layer, parts)
    if is_narrowed(layer):
        vars(new)[DENSE_SIZES] = vars(layer)[DENSE_SIZES]
    return new


def _quantised(layer: nn.Module, choice: Choice) -> QuantisedLayer:
    """A layer that was held to its grid, or is rounded here and now, as whole numbers."""
    layer = _corrected(layer, choice)
    _turn(layer)
    parts = [held(layer, name) or _nearest(getattr(layer, name), grid) for name, grid in _grids(layer, choice)]
    let_go(layer)
    dense = layer.to_dense() if isinstance(layer, SketchedLayer | CorrectedLinear) else layer
    kind = next(kind for kind in QUANTISED if isinstance(dense, kind))
    new = QUANTISED[kind].from_rounded(as_plain(dense, kind), choice.scheme, parts, cast(Tensor | None, layer.bias))
    if is_narrowed(layer):
        vars(new)[DENSE_SIZES] = vars(layer)[DENSE_SIZES]
    return new


def hold_nearest(layer: nn.Module, choice: Choice) -> nn.Module:
    """A layer held to its grid with each number rounded by itself, as `packed` stores one that is held to none."""
    layer = _corrected(layer, choice)
    if choice.packing == chains.PIVOTED and isinstance(layer, SketchedLayer):
        with contextlib.suppress(ValueError):  # as `packed` does
            layer = pivoted(layer, on_rows=True)
    _turn(layer)
    for name, grid in _grids(layer, choice):
        hold(layer, name, _nearest(getattr(layer, name), grid))
    return layer


@torch.no_grad()
def _turn(layer: nn.Module) -> None:
    """Two links in a basis between them that rounds well, where nothing holds them to a grid."""
    if not isinstance(layer, SketchedLayer) or isinstance(layer, PivotedLayer) or len(layer._weight_names) != 2:
        return
    if is_held(layer):
        return
    links = [cast(Tensor, getattr(layer, name)) for name in layer._weight_names]
    for weight, value in zip(links, incoherent(links[0], links[1]), strict=True):
        weight.copy_(value)


def _corrected(layer: nn.Module, choice: Choice) -> nn.Module:
    """The layer with its correction, where its Choice wants one that it does not have."""
    if choice.scheme != chains.CORRECTED or isinstance(layer, CorrectedLinear):
        return layer
    weight = cast(nn.Linear, layer).weight.detach()
    left = weight.double().cpu() - _nearest(weight, cast(Grid, choice.grid)).matrix().double()
    return corrected(cast(nn.Linear, layer), left, choice.ranks[0])


def _grids(layer: nn.Module, choice: Choice) -> list[tuple[str, Grid]]:
    """The weights of a layer that are whole numbers, and of what grid."""
    names = {chains.WHOLE: ("weight",), chains.CORRECTED: ("weight", "down", "up")}.get(choice.scheme)
    if names is None:
        names = tuple(n for n in cast(SketchedLayer, layer)._weight_names if getattr(layer, n) is not None)
    return list(zip(names, chains.grids_for(choice.scheme, cast(Grid, choice.grid), len(names)), strict=True))


def _nearest(weight: Tensor, grid: Grid) -> Rounded:
    return to_nearest(weight.detach().flatten(1).float().cpu(), grid, dtype=weight.dtype)


def _absorb(model: nn.Module, pair: Pair) -> None:
    """Store the channels between two layers in the order in which one of them wants them anyway."""
    producer: Any = model.get_submodule(pair.producer)
    consumer: Any = model.get_submodule(pair.consumer)
    index = _wanted_order(producer, consumer)
    if index is None:
        return
    if isinstance(producer, PivotedLayer):
        producer.reorder_outputs(index)
    else:
        _reorder(_outputs_of(producer), index)
    for name in pair.between:
        of_channels = (getattr(model.get_submodule(name), number, None) for number in NUMBERS)
        _reorder([(tensor, 0) for tensor in of_channels if tensor is not None], index)
    if isinstance(consumer, PivotedLayer):
        consumer.reorder_inputs(index)
    else:
        _reorder([(consumer.down if isinstance(consumer, SketchedLayer) else consumer.weight, 1)], index)


def _wanted_order(producer: nn.Module, consumer: nn.Module) -> Tensor | None:
    """The order of channels that spares a gather: at every place, the channel that is to be there."""
    if isinstance(producer, PivotedLayer) and producer.row_order is not None:
        return producer.row_order.argsort()
    if isinstance(consumer, PivotedLayer) and consumer.column_order is not None:
        return consumer.column_order.long()
    return None


def _outputs_of(layer: Any) -> list[tuple[Tensor, int]]:
    """The tensors that have one entry an output, and along which axis."""
    weight = layer.up if isinstance(layer, SketchedLayer) else layer.weight
    return [(tensor, 0) for tensor in (weight, layer.bias) if tensor is not None]


@torch.no_grad()
def _reorder(tensors: Sequence[tuple[Tensor, int]], index: Tensor) -> None:
    for tensor, axis in tensors:
        tensor.copy_(tensor.index_select(axis, index.to(tensor.device)))
