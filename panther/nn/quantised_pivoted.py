"""Pivoted layers in whole numbers: what is left of the factors without their identity, in 8 or 4 bits with
scales, or in bfloat16.

Made from pivoted layers, whose orders of channels they keep. An error of a pivot reaches all rows that are combinations
of pivots, so 8 bits lose nothing and few bits lose more than they do in two whole factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panther import chains
from panther.nn.arguments import Config
from panther.nn.base import SketchedLayer, _check_finite
from panther.nn.pivoted import (
    LINEAR_KEYS,
    ORDERS,
    PIVOTED_CONV_KEYS,
    PivotedConv,
    PivotedLayer,
    SKPivotedConv1d,
    SKPivotedConv2d,
    SKPivotedConv3d,
    SKPivotedLinear,
)
from panther.nn.quantised import QuantisedLinear, StoredWeight, grid_of, read_grid
from panther.quantise import Rounded, incoherent, to_nearest
from panther.spec import Grid

GRID_KEYS = ("bits", "group_size")


class QuantisedPivotedLayer(PivotedLayer):
    """A pivoted layer whose weights are stored in few bits: from_pivoted(layer, bits=8).

    `down`, `core` and `up` are what is stored of the links; `stored` has those that there are.
    """

    FLOAT: ClassVar[type[PivotedLayer]]
    CONFIG_KEYS: ClassVar[tuple[str, ...]]

    grid: Grid

    def _make_room(
        self, name: str, link: chains.Link, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        setattr(self, name, StoredWeight(link.weight_shape, self.grid, device, dtype))

    @property
    def stored(self) -> tuple[StoredWeight, ...]:
        """The weights as they are stored, in the order in which they are used."""
        return tuple(part for name in self._weight_names if (part := getattr(self, name)) is not None)

    @property
    def stored_names(self) -> tuple[str, ...]:
        """Of those weights."""
        return tuple(name for name in self._weight_names if getattr(self, name) is not None)

    def _weight(self, name: str) -> Tensor | None:
        part = getattr(self, name)
        return None if part is None else part.dense()

    def _first_weight(self) -> Tensor:
        return self.stored[0].scales

    @classmethod
    def from_pivoted(cls, layer: PivotedLayer, *, bits: int = 8, group_size: int | None = None) -> Self:
        """The layer nearest to a pivoted one, judged by its weights alone (compress() also looks at data).

        bits: 16 (bfloat16), 8, 4 or 3. group_size: 32, 64 or 128 neighbours share a scale; None: all of a row.

        Raises: TypeError for a layer of another class. ValueError for other bits or group sizes, NaN or Inf.
        """
        cls._check_pivoted(layer)
        grid = grid_of(cls.__name__, bits, group_size)
        weights = [layer._weight(name) for name in layer._weight_names]
        found = [w.detach().flatten(1) for w in weights if w is not None]
        for weight in found:
            _check_finite(f"{cls.__name__}.from_pivoted: a weight", weight)
        return cls.from_rounded(layer, [to_nearest(w.float().cpu(), grid, dtype=w.dtype) for w in found])

    @classmethod
    def from_rounded(cls, layer: PivotedLayer, parts: Sequence[Rounded]) -> Self:
        """The layer of these numbers in the place of a pivoted one, first link first.

        Raises: TypeError for a layer of another class. ValueError when a size or a grid does not fit, or a number is
                not finite.
        """
        cls._check_pivoted(layer)
        new = cls._of(layer, parts[0].grid)
        with torch.no_grad():
            for target, part in zip(new.stored, parts, strict=True):
                target.fill(part)
            if layer.offset is not None and new.offset is not None:
                new.offset.copy_(layer.offset).requires_grad_(layer.offset.requires_grad)
                _check_finite(f"{cls.__name__}.from_rounded: the offset", new.offset)
        return new.train(layer.training)

    @classmethod
    def _check_pivoted(cls, layer: object) -> None:
        if not isinstance(layer, cls.FLOAT) or isinstance(layer, QuantisedPivotedLayer):
            raise TypeError(f"{cls.__name__} is made from {cls.FLOAT.__name__}; got {type(layer).__name__}")

    @classmethod
    def _of(cls, layer: PivotedLayer, grid: Grid) -> Self:
        """A layer of zeros with the geometry and the orders of a pivoted one."""
        new = cls._bare()
        new.grid = grid
        new._take_side(layer)
        new._follow(layer, layer.ranks)
        for name in ORDERS:
            order = getattr(layer, name)
            setattr(new, name, None if order is None else order.clone())
        return new

    def _take_side(self, layer: PivotedLayer) -> None:
        """Have the pivots of a linear layer where another has them."""

    @classmethod
    def from_sketched(cls, layer: SketchedLayer, **how: Any) -> Self:
        """from_pivoted of the pivoted form of a layer of two products, whose errors these are too.

        how: bits and group_size for from_pivoted; side, of a linear layer.
        """
        grid = {name: how.pop(name) for name in GRID_KEYS if name in how}
        return cls.from_pivoted(cls.FLOAT.from_sketched(layer, **how), **grid)

    def to_pivoted(self) -> PivotedLayer:
        """The same layer with floating-point numbers in place of the stored ones."""
        config = {key: value for key, value in self.config().items() if key not in GRID_KEYS}
        floats = self.FLOAT.from_config(config).to(self._first_weight().device)
        tensors = {name: part.dense() for name, part in zip(self.stored_names, self.stored, strict=True)}
        tensors |= {name: value for name in (*ORDERS, self.BIAS) if (value := getattr(self, name)) is not None}
        floats.load_state_dict(tensors)
        return floats.train(self.training)

    def reorder_outputs(self, index: Tensor) -> None:
        """As in a pivoted layer, where the pivots are rows: numbers keep their places.

        Raises: ValueError where the outputs have no order of their own.
        """
        self._refuse_order(chains.ROWS)
        super().reorder_outputs(index)

    def reorder_inputs(self, index: Tensor) -> None:
        """As in a pivoted layer, where the pivots are columns: numbers keep their places.

        Raises: ValueError where the inputs have no order of their own.
        """
        self._refuse_order(chains.COLUMNS)
        super().reorder_inputs(index)

    def _refuse_order(self, side: str) -> None:
        if side not in self.sides:
            raise ValueError(
                f"{type(self).__name__}: its pivots are {' and '.join(self.sides)}, so that {side} stay put"
            )

    def config(self) -> dict[str, Any]:
        return {**super().config(), "bits": self.grid.bits, "group_size": self.grid.group_size or 0}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        read = Config(cls.__name__, config, (*cls.CONFIG_KEYS, *GRID_KEYS))
        grid = read_grid(read)
        return cls._of(cls.FLOAT.from_config({key: config[key] for key in cls.CONFIG_KEYS}), grid)

    def _describe_terms(self) -> str:
        group = "" if self.grid.group_size is None else f", group_size={self.grid.group_size}"
        return f"{super()._describe_terms()}, bits={self.grid.bits}{group}"


class QuantisedPivotedLinear(QuantisedPivotedLayer, SKPivotedLinear):
    """An SKPivotedLinear in few bits a weight: QuantisedPivotedLinear.from_pivoted(layer, bits=8).

    Shapes: input (..., in_features) -> (..., out_features).
    """

    FLOAT = SKPivotedLinear
    CONFIG_KEYS = LINEAR_KEYS

    def _take_side(self, layer: PivotedLayer) -> None:
        self.side = cast(SKPivotedLinear, layer).side

    def forward(self, input: Tensor) -> Tensor:
        return PivotedLayer.forward(self, input)

    def to_products(self) -> nn.Module:
        """The same layer in two products of the same numbers, without a gather; itself where that would not be smaller.

        Identity rows are ones on a scale of one. Identity columns would share the scales of the others: then itself.
        """
        is_smaller = self.ranks[0] * (self.in_features + self.out_features) < self.in_features * self.out_features
        if self.side != chains.ROWS or not is_smaller:
            return self
        down, up = (part.rounded() for part in self.stored)
        one = torch.eye(self.ranks[0], device=up.values.device)
        ones = to_nearest(one, self.grid).values if self.grid.is_bfloat16 else one.to(torch.int8)
        whole = Rounded(
            torch.cat((ones.to(up.values), up.values)),
            torch.cat((torch.ones_like(up.scales[:1]).expand(len(one), -1), up.scales)),
            self.grid,
        )
        if self.row_order is not None:
            order = self.row_order.long()
            whole = Rounded(whole.values[order], whole.scales[order], self.grid)
        return QuantisedLinear.from_rounded(self.to_dense(), self.scheme, [down, whole], self.bias)

    def _product(self, x: Tensor, weight: Any, bias: Tensor | None, link: chains.Link) -> Tensor:
        return F.linear(x, weight, bias) if isinstance(weight, Tensor) else cast(Tensor, weight(x, bias))

    def for_rounded_inputs(self) -> QuantisedLinear:
        """Nearly the same layer, rounded anew: two products with a basis between in which no number stands out.

        What comes between is to be rounded as well, all on one scale, and outputs that are pivots may be large. The
        dense weight where two products would hold no fewer numbers.
        """
        dense, like = self.to_dense(), self._first_weight()
        links = [weight.float().cpu() for weight in self.active_weights()]
        is_smaller = sum(link.numel() for link in links) < dense.weight.numel()
        links = list(incoherent(links[0], links[1])) if is_smaller else [dense.weight.detach().float().cpu()]
        parts = [to_nearest(link, self.grid, dtype=like.dtype) for link in links]
        return QuantisedLinear.from_rounded(dense, self.scheme if is_smaller else chains.WHOLE, parts, self.bias)


class QuantisedPivotedConv(QuantisedPivotedLayer, PivotedConv):
    """A pivoted convolution in few bits a weight, which are widened as they are read.

    Shapes: input (batch, in_channels, *size) or (in_channels, *size) -> as the dense layer.
    """

    CONFIG_KEYS = PIVOTED_CONV_KEYS

    def _product(self, x: Tensor, weight: Any, bias: Tensor | None, link: chains.Link) -> Tensor:
        if isinstance(weight, Tensor):
            return super()._product(x, weight, bias, link)
        return cast(StoredWeight, weight).convolve(x, bias, link)


class QuantisedPivotedConv1d(QuantisedPivotedConv, SKPivotedConv1d):
    """An SKPivotedConv1d in few bits a weight: QuantisedPivotedConv1d.from_pivoted(layer, bits=8)."""

    FLOAT = SKPivotedConv1d


class QuantisedPivotedConv2d(QuantisedPivotedConv, SKPivotedConv2d):
    """An SKPivotedConv2d in few bits a weight: QuantisedPivotedConv2d.from_pivoted(layer, bits=8)."""

    FLOAT = SKPivotedConv2d


class QuantisedPivotedConv3d(QuantisedPivotedConv, SKPivotedConv3d):
    """An SKPivotedConv3d in few bits a weight: QuantisedPivotedConv3d.from_pivoted(layer, bits=8)."""

    FLOAT = SKPivotedConv3d
