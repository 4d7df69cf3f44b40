"""A healed model and its plan in, the same model stored as the plan says.

A layer that the plan packs as "pivoted" leaves an identity out of a factor, which leaves its channels in another order.
Where the neighbour can take that order over, nothing has to be gathered when the model runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from panther import chains
from panther.nn import PIVOTED, PivotedLayer, SketchedLayer, SKLinear, SKPivotedLinear
from panther.nn.narrow import NUMBERS
from panther.nn.surgery import inherit, put_layers
from panther.spec import Choice, Pair, Plan


def pack(model: nn.Module, plan: Plan, followers: Iterable[Pair] = (), *, notes: list[str] | None = None) -> nn.Module:
    """The model with each layer stored as its Choice says; it is changed in place, and returned.

    Where pivots would cost accuracy a layer keeps its two products, or becomes dense where those would be larger; the
    reason is added to `notes`. followers: neighbours that share the order of their channels (Capture.followers). The
    model computes the same as before, up to rounding.
    """
    known = {choice.layer for choice in plan.choices}
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
    if choice.packing != chains.PIVOTED or not isinstance(layer, SketchedLayer) or type(layer) not in PIVOTED:
        return layer
    try:
        return _pivoted(layer, has_follower)
    except ValueError as error:
        weights = layer.active_weights()
        is_larger = sum(weight.numel() for weight in weights) >= layer.weight.numel()
        if notes is not None:
            becomes = "it is dense" if is_larger else "it keeps its products"
            notes.append(f"{choice.layer} is not pivoted, {becomes}: {error}")
        return layer.to_dense() if is_larger else layer


def _pivoted(layer: SketchedLayer, has_follower: bool) -> PivotedLayer:
    if not isinstance(layer, SKLinear):
        return PIVOTED[type(layer)].from_sketched(layer)
    # Without a follower, the smaller side is the cheaper to gather.
    on_inputs = layer.out_features > layer.in_features and not has_follower
    return SKPivotedLinear.from_sketched(layer, side=chains.COLUMNS if on_inputs else chains.ROWS)


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
