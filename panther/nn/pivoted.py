"""Sketched layers without the part of a factor that can be an identity: the same function from r * (m + n - r) numbers.

Notation: W' = up down of rank r, with m rows and n columns. Rows: r rows p of `up` are pivots; with C = up_rest up_p^-1
and W_p = up_p down, y_p = W_p x and y_rest = C y_p. Columns: r columns p of `down` are pivots; with
D = down_p^-1 down_rest and U = up down_p, z = x_p + D x_rest and y = U z. What is stored is W_p and C, or D and U, and
the order of the channels.

Source: interpolative decomposition, Cheng, Gimbutas, Martinsson, Rokhlin, SIAM J. Sci. Comput. 26 (2005), 1389-1404;
as a layer: PIFA, ICML 2025 (arXiv 2501.19090).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panther import chains
from panther.nn.arguments import MAX_SIZE, Config, one_of
from panther.nn.base import COMMON_KEYS, Shape, SketchedLayer
from panther.nn.conv import CONFIG_KEYS as CONV_KEYS
from panther.nn.conv import SKConv1d, SKConv2d, SKConv3d, SketchedConv, convolve
from panther.nn.factor import compose
from panther.nn.linear import SKLinear
from panther.ops import pivoted_linear

SIDES = (chains.ROWS, chains.COLUMNS)
ORDERS = ("row_order", "column_order")
KEYS = (*(key for key in COMMON_KEYS if key not in ("low_rank", "active_terms")), *ORDERS)
LINEAR_KEYS = ("in_features", "out_features", "side", *KEYS)
PIVOTED_CONV_KEYS = (*(key for key in CONV_KEYS if key not in COMMON_KEYS), *KEYS)
SCHEMES = tuple(scheme for scheme, sides in chains.PIVOTS.items() if sides and scheme != chains.LINEAR)

# Coefficients multiply the rounding of what they are applied to. In all layers of MiniLM and in random ones none is
# above 2; the algorithm itself promises less.
LARGEST_COEFFICIENT = 100.0
PARITY = 1e-4  # relative, of the stored weights; half precision rounds each factor by more, and may take 4 eps


def interpolate(tall: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of which all the others are combinations: an order of the rows, these first, and the coefficients.

    tall[order[r:]] = coefficients @ tall[order[:r]]. The pivots are chosen on an orthonormal basis of the columns, so
    that a singular matrix has them too and its coefficients stay small.

    Shapes: tall (m, r), m >= r, float64 -> order (m,), coefficients (m - r, r).
    Cost:   two QR decompositions, 4*m*r^2 flops each.
    """
    from scipy.linalg import qr, solve_triangular

    rank = tall.shape[1]
    basis = torch.linalg.qr(tall).Q
    _, triangle, found = qr(basis.T.numpy(), mode="economic", pivoting=True)
    coefficients = solve_triangular(triangle[:, :rank], triangle[:, rank:]).T
    # Rows in rising order on both sides: no gather is needed where the pivots come first anyway.
    pivots, rest = torch.as_tensor(found[:rank]), torch.as_tensor(found[rank:])
    by_pivot, by_rest = pivots.argsort(), rest.argsort()
    return torch.cat((pivots[by_pivot], rest[by_rest])), torch.as_tensor(coefficients)[by_rest][:, by_pivot]


def _pivot_rows(weights: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The chain with only the coefficients of its last link, and which place each output has."""
    *first, before, last = weights
    rank, ones = last.shape[1], last.shape[2:]
    matrix = last.flatten(1)
    order, coefficients = interpolate(matrix)
    before = torch.einsum("sr,ri...->si...", matrix[order[:rank]], before)
    return [*first, before, coefficients.reshape(-1, rank, *ones)], order.argsort()


def _pivot_columns(weights: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The chain with only the coefficients of its first link, and which input comes at each place."""
    first, after, *last = weights
    rank, ones = first.shape[0], first.shape[2:]
    matrix = first.flatten(1)
    order, coefficients = interpolate(matrix.T)
    after = torch.einsum("or...,rs->os...", after, matrix[:, order[:rank]])
    return [coefficients.T.reshape(rank, -1, *ones), after, *last], order


def pivot(weights: Sequence[Tensor], sides: Sequence[str]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The weights of a chain without the identity at these sides, and the orders of channels by name; float64."""
    parts, orders = list(weights), dict[str, Tensor]()
    if chains.COLUMNS in sides:
        parts, orders["column_order"] = _pivot_columns(parts)
    if chains.ROWS in sides:
        parts, orders["row_order"] = _pivot_rows(parts)
    return parts, orders


def with_identity(rest: Tensor, rank: int, axis: int, order: Tensor | None) -> Tensor:
    """A weight with the identity that it was stored without, along an axis; order: of the channels there."""
    identity = torch.eye(rank, dtype=rest.dtype, device=rest.device).reshape(rank, rank, *rest.shape[2:])
    whole = torch.cat((identity, rest), axis)
    return whole if order is None else whole.index_select(axis, order)


class Pivots:
    """The pivoted form of a chain, to see what rounding it does; float64."""

    def __init__(self, weights: Sequence[Tensor], sides: Sequence[str]) -> None:
        self.sides, self.ranks = sides, [len(weight) for weight in weights[:-1]]
        self.parts, self.orders = pivot([weight.double() for weight in weights], sides)

    def rounded(self, each: Callable[[Tensor], Tensor]) -> Tensor:
        """The dense weight that the chain amounts to, with every stored weight rounded by `each`."""
        parts = [each(part.float()).double() if part.numel() else part for part in self.parts]
        if chains.COLUMNS in self.sides:
            parts[0] = with_identity(parts[0], self.ranks[0], 1, self.orders["column_order"].argsort())
        if chains.ROWS in self.sides:
            parts[-1] = with_identity(parts[-1], self.ranks[-1], 0, self.orders["row_order"])
        return compose(parts)


class PivotedLayer(SketchedLayer):
    """A sketched layer that stores r * (in + out - r) numbers: one factor without the identity that is part of it.

    Made from a layer of two products by `from_sketched`, and computes the same up to rounding. `down`, `core` and `up`
    are its weights, without the identity. `row_order` says which place each output has among the pivots and the
    others, `column_order` which input comes at each place; where the order is the natural one they are None, and
    nothing is gathered. `offset` is added in the order of storage; `bias` is computed from it and cannot be written to.
    """

    PACKING = chains.PIVOTED
    BIAS = "offset"
    SKETCHED: ClassVar[type[SketchedLayer]]

    offset: nn.Parameter | None
    row_order: Tensor | None
    column_order: Tensor | None

    def __init__(self, *_args: object, **_options: object) -> None:
        name = type(self).__name__
        raise TypeError(
            f"{name} is made from a trained layer and has no constructor: {name}.from_sketched(layer) takes a "
            f"{self.SKETCHED.__name__}, {name}.from_dense(layer, rank=...) an nn.{self.DENSE.__name__}"
        )

    @property
    def sides(self) -> tuple[str, ...]:
        """Where the pivots are: "rows" of the last link, "columns" of the first."""
        return chains.PIVOTS[self.scheme]

    def _chain(self, scheme: str, shape: chains.Geometry, ranks: Sequence[int]) -> tuple[chains.Link, ...]:
        return chains.pivoted(chains.links(scheme, shape, ranks), self.sides)

    def _allocate(self, shape: Shape, chain: Sequence[chains.Link], **options: Any) -> None:
        super()._allocate(shape, chain, **options)
        for name in ORDERS:
            self.register_buffer(name, None)

    def reset_parameters(self) -> None:
        """Refused: these weights belong to the pivots that they were computed for."""
        raise TypeError(f"{type(self).__name__} has no random weights to draw: make it again with from_sketched(layer)")

    @property
    def active_terms(self) -> int:
        """1: the pivots belong to the whole rank, so there are no terms to switch off."""
        return self.num_terms

    @active_terms.setter
    def active_terms(self, value: int) -> None:
        raise ValueError(
            f"{type(self).__name__}.active_terms: the pivots of a pivoted layer belong to its whole rank, so no part "
            f'of it is a smaller layer. Keep a {self.SKETCHED.__name__} (packing "two_gemm") to switch terms.'
        )

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]  # computed here, a parameter in the other layers
        """What the dense layer that computes the same adds to its outputs."""
        up = self._weight("up")
        if self.offset is None or chains.ROWS not in self.sides or up is None:
            return self.offset if self.offset is None else self._in_order(self.offset)
        wide = torch.promote_types(self.offset.dtype, torch.float32)
        pivots, rest = self.offset.to(wide).split((self.ranks[-1], up.shape[0]))
        whole = torch.cat((pivots, rest + up.flatten(1).to(wide) @ pivots)).to(self.offset.dtype)
        return self._in_order(whole)

    def _weight(self, name: str) -> Tensor | None:
        """The weight of a link as floating-point numbers; None where it is all identity."""
        weight: Tensor | None = getattr(self, name)
        return weight

    def _in_order(self, stored: Tensor) -> Tensor:
        return stored if self.row_order is None else stored.index_select(0, self.row_order)

    def active_weights(self) -> tuple[Tensor, ...]:
        """The weights of the links with their identity, first link first."""
        weights = [self._weight(name) for name in self._weight_names]
        if chains.COLUMNS in self.sides:
            order = None if self.column_order is None else self.column_order.argsort()
            weights[0] = self._with_identity(weights[0], self.ranks[0], 1, order)
        if chains.ROWS in self.sides:
            weights[-1] = self._with_identity(weights[-1], self.ranks[-1], 0, self.row_order)
        return cast(tuple[Tensor, ...], tuple(weights))

    def _with_identity(self, rest: Tensor | None, rank: int, axis: int, order: Tensor | None) -> Tensor:
        if rest is None:
            sizes = [rank, rank]
            sizes[axis] = 0
            rest = self._first_weight().new_zeros(*sizes, *(1,) * len(self._shape.kernel_size))
        return with_identity(rest, rank, axis, order)

    def _first_weight(self) -> Tensor:
        weights: list[Tensor | None] = [getattr(self, name) for name in self._weight_names]
        return next(weight for weight in weights if weight is not None)

    def _product(self, x: Tensor, weight: Any, bias: Tensor | None, link: chains.Link) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not say how to apply a link")

    @property
    def _axis(self) -> int:
        """The channels' axis, also of inputs without a batch."""
        return -1 - len(self._shape.kernel_size)

    def forward(self, input: Tensor) -> Tensor:
        x, first, last = input, 0, len(self._links) - 1
        parts = zip(self._weight_names, self._biases(), self._links, strict=True)
        for index, (name, bias, link) in enumerate(parts):
            weight = getattr(self, name)
            if index == first and chains.COLUMNS in self.sides:
                x = self._onto_pivots(x, weight, link)
            elif index == last and chains.ROWS in self.sides:
                x = self._beside_pivots(x, weight, bias, link)
            else:
                x = self._product(x, weight, bias, link)
        return x

    def _biases(self) -> tuple[Tensor | None, ...]:
        """What each link adds."""
        missing = (None,) * len(self._links)
        if self.offset is None:
            return missing
        if chains.ROWS not in self.sides:
            return (*missing[1:], self.offset)
        return (*missing[2:], self.offset[: self.ranks[-1]], self.offset[self.ranks[-1] :])

    def given_to(self, name: str, input: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """What the weight of this name is multiplied with for an input of the layer, biases left out.

        weights: stand in for those before it, by name.
        """
        x = input
        for index, (own, link) in enumerate(zip(self._weight_names, self._links, strict=True)):
            weight = weights.get(own, getattr(self, own))
            is_onto = index == 0 and chains.COLUMNS in self.sides
            if own == name:
                return self._pivots_and_rest(x, link)[1] if is_onto else x
            x = self._onto_pivots(x, weight, link) if is_onto else self._product(x, weight, None, link)
        raise KeyError(f"{type(self).__name__} has no weight {name!r}")

    def _pivots_and_rest(self, x: Tensor, link: chains.Link) -> tuple[Tensor, Tensor]:
        if self.column_order is not None:
            x = x.index_select(self._axis, self.column_order)
        pivots = x.narrow(self._axis, 0, link.out_channels)
        return pivots, x.narrow(self._axis, link.out_channels, link.in_channels)

    def _onto_pivots(self, x: Tensor, weight: Any, link: chains.Link) -> Tensor:
        pivots, rest = self._pivots_and_rest(x, link)
        return pivots if weight is None else pivots + self._product(rest, weight, None, link)

    def _beside_pivots(self, x: Tensor, weight: Any, bias: Tensor | None, link: chains.Link) -> Tensor:
        if weight is not None:
            x = torch.cat((x, self._product(x, weight, bias, link)), self._axis)
        return x if self.row_order is None else x.index_select(self._axis, self.row_order)

    @torch.no_grad()
    def reorder_outputs(self, index: Tensor) -> None:
        """From now on output i is what output index[i] was; a row order that this makes the natural one goes."""
        if chains.ROWS in self.sides:
            self.row_order = _order(index if self.row_order is None else self.row_order[index])
            return
        for tensor in (self.up, self.offset):
            if tensor is not None:
                tensor.copy_(tensor[index])

    @torch.no_grad()
    def reorder_inputs(self, index: Tensor) -> None:
        """From now on input i is what input index[i] was; a column order that this makes the natural one goes."""
        if chains.COLUMNS in self.sides:
            places = index.argsort()
            self.column_order = _order(places if self.column_order is None else places[self.column_order])
            return
        self.down.copy_(self.down[:, index])

    @classmethod
    def from_sketched(cls, layer: SketchedLayer) -> Self:
        """The layer that computes what this one does (with its active terms), up to rounding.

        dtype, device, bias, training flag and requires_grad stay as they are.

        Cost:   one pivoted QR decomposition a 1 x 1 link, in float64.
        Raises: TypeError for another class. ValueError for the scheme "spatial", a rank above the number of channels,
                NaN or Inf, or pivots that would multiply rounding errors: then keep the layer as it is.
        """
        return cls._bare()._made_from(layer)

    def _made_from(self, layer: SketchedLayer) -> Self:
        name = type(self).__name__
        if type(layer) is not self.SKETCHED:
            raise TypeError(
                f"{name}.from_sketched takes a {self.SKETCHED.__name__} and nothing else; got {type(layer).__name__}"
            )
        if not chains.PIVOTS[layer.scheme]:
            raise ValueError(
                f"{name}.from_sketched: no link of a {layer.scheme!r} layer is 1 x 1, so none can have pivots; make "
                f"the layer with one of the schemes {', '.join(SCHEMES)}, or keep its two products"
            )
        weights = [weight.detach().double().cpu() for weight in layer.active_weights()]
        if not all(bool(torch.isfinite(weight).all()) for weight in weights):
            raise ValueError(f"{name}.from_sketched: the factors hold NaN or Inf; repair the layer, or leave it dense")
        self._follow(layer, [len(weight) for weight in weights[:-1]])
        self._fill_from(weights, layer)
        return self.train(layer.training)

    def _follow(self, layer: Any, ranks: Sequence[int]) -> None:
        """Take the geometry, dtype and device of a sketched layer; the weights are zeros."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to follow a sketched layer")

    @torch.no_grad()
    def _fill_from(self, weights: Sequence[Tensor], layer: SketchedLayer) -> None:
        device = layer._first_weight().device
        parts, orders = pivot(weights, self.sides)
        for name, order in orders.items():
            setattr(self, name, _order(order.to(device)))
        trainable = any(p.requires_grad for name, p in layer.named_parameters() if name != layer.BIAS)
        for name, part in zip(self._weight_names, parts, strict=True):
            if part.numel():
                getattr(self, name).copy_(part).requires_grad_(trainable)
        self._refuse_inexact(compose(weights))
        if self.offset is not None and layer.bias is not None:
            self.offset.copy_(self._stored_bias(layer.bias)).requires_grad_(layer.bias.requires_grad)

    def _stored_bias(self, bias: Tensor) -> Tensor:
        """A bias in the order of storage, less what the pivots' part already gives to the other rows."""
        if self.row_order is not None:
            bias = bias[self.row_order.argsort()]
        if chains.ROWS not in self.sides or self.up is None:
            return bias
        pivots, rest = bias.double().split((self.ranks[-1], self.up.shape[0]))
        return torch.cat((pivots, rest - self.up.double().flatten(1) @ pivots))

    def _refuse_inexact(self, wanted: Tensor) -> None:
        """Raise ValueError where the stored weights do not give the same layer."""
        name, keep = type(self).__name__, "keep the two products of this layer"
        ends = {chains.COLUMNS: self.down, chains.ROWS: self.up}
        coefficients = [ends[side] for side in self.sides if ends[side] is not None]
        largest = max((float(part.abs().max()) for part in coefficients), default=0.0)
        if not largest <= LARGEST_COEFFICIENT:
            raise ValueError(
                f"{name}.from_sketched: a coefficient of {largest:.3g} would multiply rounding errors (at most "
                f"{LARGEST_COEFFICIENT:g}); {keep}"
            )
        got = compose([weight.double().cpu() for weight in self.active_weights()])
        limit = max(PARITY, 4 * torch.finfo(self._first_weight().dtype).eps)
        error = float((got - wanted).norm() / wanted.norm().clamp_min(1e-300))
        if not error <= limit:
            raise ValueError(
                f"{name}.from_sketched: the stored weights would differ by {error:.1e} (at most {limit:.1e}); {keep}"
            )

    @classmethod
    def from_factors(
        cls, layer: nn.Module, scheme: str, weights: Sequence[Tensor], bias: Tensor | None, *, low_rank: int = 8
    ) -> Self:
        """The pivoted form of `SKETCHED.from_factors(...)`, whose arguments and errors these are."""
        return cls.from_sketched(cls.SKETCHED.from_factors(layer, scheme, weights, bias, low_rank=low_rank))

    @classmethod
    def _shape_of(cls, layer: nn.Module) -> Shape:
        return cls.SKETCHED._shape_of(layer)

    def config(self) -> dict[str, Any]:
        said = {key: value for key, value in super().config().items() if key not in ("low_rank", "active_terms")}
        return {**said, **{name: getattr(self, name) is not None for name in ORDERS}}

    def _read_orders(self, read: Config) -> Self:
        """Make room for the orders that a state dict will bring."""
        sizes = {"row_order": (chains.ROWS, self._shape.out_features)}
        sizes["column_order"] = (chains.COLUMNS, self._shape.in_features)
        for name, (side, size) in sizes.items():
            if not read.flag(name):
                continue
            if side not in self.sides:
                raise ValueError(f"{read.owner}: {name}=True, but the pivots are {' and '.join(self.sides)}")
            setattr(self, name, torch.arange(size, dtype=torch.int32))
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """As nn.Module's, but an order that is none is an error: it would read past the end of a tensor."""
        errors = rest[-1]
        for name in ORDERS:
            own, given = getattr(self, name), state_dict.get(prefix + name)
            if own is None or not isinstance(given, Tensor) or given.is_meta or given.shape != own.shape:
                continue  # nn.Module's own checks see to these
            if given.dtype != own.dtype or not torch.equal(given.cpu().sort().values, torch.arange(len(own)).int()):
                errors.append(f"{prefix}{name} is no order of {len(own)} channels: the file is damaged")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _describe_terms(self) -> str:
        rank = self.rank if len(self.ranks) == 1 else self.ranks
        pivots = " and ".join(self.sides)
        return f"rank={rank}, pivots={pivots!r}" + ("" if self.offset is not None else ", bias=False")


def _order(index: Tensor) -> Tensor | None:
    """An order as it is stored: not at all where it is the natural one."""
    natural = torch.equal(index.cpu().long(), torch.arange(len(index)))
    return None if natural else index.to(torch.int32)


class SKPivotedLinear(PivotedLayer):
    """An SKLinear in r * (in + out - r) numbers: SKPivotedLinear.from_sketched(layer).

    side: "rows" gathers the outputs, "columns" the inputs; the numbers are equally many, so take the smaller side.

    Shapes: input (..., in_features) -> (..., out_features).
    """

    DENSE = nn.Linear
    DEFAULT_SCHEME = chains.LINEAR
    SKETCHED = SKLinear

    side: str

    @property
    def sides(self) -> tuple[str, ...]:
        return (self.side,)

    @property
    def gathers(self) -> bool:
        """Whether features are put into another order when the layer runs: its neighbours did not take that over."""
        return self.row_order is not None or self.column_order is not None

    def to_products(self) -> nn.Module:
        """The same layer without pivots: an SKLinear, or the nn.Linear where that would be no larger."""
        weights, dense = self.active_weights(), self.to_dense()
        if sum(weight.numel() for weight in weights) >= dense.weight.numel():
            return dense
        return SKLinear.from_factors(dense, self.scheme, weights, dense.bias)

    @classmethod
    def from_sketched(cls, layer: SketchedLayer, *, side: str = chains.ROWS) -> Self:
        """The layer that computes what an SKLinear does (with its active terms), up to rounding.

        dtype, device, bias, training flag and requires_grad stay as they are.

        Cost:   one pivoted QR decomposition in float64.
        Raises: TypeError for another class. ValueError for a rank above the number of rows (columns), NaN or Inf, or
                pivots that would multiply rounding errors: then keep the layer as it is.
        """
        new = cls._bare()
        new.side = one_of(cls.__name__, "side", side, SIDES)
        return new._made_from(layer)

    def _follow(self, layer: Any, ranks: Sequence[int]) -> None:
        like = layer._first_weight()
        self._build(layer._shape, ranks[0], layer.bias is not None, device=like.device, dtype=like.dtype)

    def _build(
        self,
        shape: Shape,
        rank: int,
        bias: bool,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.scheme = self.DEFAULT_SCHEME
        self.in_features, self.out_features = shape.in_features, shape.out_features
        chain = self._chain(self.scheme, shape, (rank,))
        self._allocate(shape, chain, low_rank=rank, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        size, order = (
            (self.out_features, self.row_order) if self.side == chains.ROWS else (self.in_features, self.column_order)
        )
        if self.ranks[0] == size:  # there are no others beside the pivots
            return super().forward(input)
        return pivoted_linear(input, self.down, self.up, self.offset, order)

    def _product(self, x: Tensor, weight: Any, bias: Tensor | None, link: chains.Link) -> Tensor:
        return F.linear(x, weight, bias)

    def to_dense(self) -> nn.Linear:
        """The nn.Linear that computes the same, up to rounding."""
        return self._fill(nn.Linear(self.in_features, self.out_features, self.offset is not None, device="meta"))

    def config(self) -> dict[str, Any]:
        sizes = {"in_features": self.in_features, "out_features": self.out_features, "side": self.side}
        return {**sizes, **super().config()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        read = Config(cls.__name__, config, LINEAR_KEYS)
        shape = Shape(read.integer("in_features"), read.integer("out_features"))
        (rank,) = read.integers("ranks", 1, high=min(shape.in_features, shape.out_features))
        read.check_numbers(rank * (shape.in_features + shape.out_features - rank))
        new = cls._bare()
        new.side = read.word("side", SIDES)
        new._build(shape, rank, read.flag("bias"), dtype=read.dtype())
        return new._read_orders(read)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._describe_terms()}"


class PivotedConv(PivotedLayer, SketchedConv):
    """A sketched convolution whose 1 x 1 links are stored without their identity.

    "output_channel" has pivots among its outputs, "input_channel" among its inputs, "tucker2" among both; "spatial" has
    no 1 x 1 link and stays as it is.

    Shapes: input (batch, in_channels, *size) or (in_channels, *size) -> as the dense layer.
    """

    def _follow(self, layer: Any, ranks: Sequence[int]) -> None:
        like = layer._first_weight()
        self._build(
            layer._shape,
            layer.padding_mode,
            layer.scheme,
            ranks,
            low_rank=max(ranks),
            bias=layer.bias is not None,
            device=like.device,
            dtype=like.dtype,
        )

    def _product(self, x: Tensor, weight: Any, bias: Tensor | None, link: chains.Link) -> Tensor:
        return convolve(x, weight, bias, link)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self._padded(input))

    def given_to(self, name: str, input: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        return super().given_to(name, self._padded(input), weights)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        read = Config(cls.__name__, config, PIVOTED_CONV_KEYS)
        shape, mode = cls._read_geometry(read)
        scheme = read.word("scheme", SCHEMES)
        ranks = read.integers("ranks", 2 if scheme == "tucker2" else 1, high=MAX_SIZE)
        chain = chains.links(scheme, shape, ranks)
        try:
            stored = chains.pivoted(chain, chains.PIVOTS[scheme])
        except ValueError as error:
            raise ValueError(f"{read.owner}: {error}") from error
        read.check_numbers(sum(link.params for link in stored))
        new = cls._bare()
        new._build(shape, mode, scheme, ranks, low_rank=max(ranks), bias=read.flag("bias"), dtype=read.dtype())
        return new._read_orders(read)


class SKPivotedConv1d(PivotedConv):
    """An SKConv1d whose 1 x 1 links are stored without their identity: SKPivotedConv1d.from_sketched(layer)."""

    DENSE = nn.Conv1d
    DIMS = 1
    CONVOLVE = staticmethod(F.conv1d)
    SKETCHED = SKConv1d

    def to_dense(self) -> nn.Conv1d:
        """The nn.Conv1d that computes the same, up to rounding."""
        return cast(nn.Conv1d, self._dense(nn.Conv1d))


class SKPivotedConv2d(PivotedConv):
    """An SKConv2d whose 1 x 1 links are stored without their identity: SKPivotedConv2d.from_sketched(layer)."""

    DENSE = nn.Conv2d
    DIMS = 2
    CONVOLVE = staticmethod(F.conv2d)
    SKETCHED = SKConv2d

    def to_dense(self) -> nn.Conv2d:
        """The nn.Conv2d that computes the same, up to rounding."""
        return cast(nn.Conv2d, self._dense(nn.Conv2d))


class SKPivotedConv3d(PivotedConv):
    """An SKConv3d whose 1 x 1 links are stored without their identity: SKPivotedConv3d.from_sketched(layer)."""

    DENSE = nn.Conv3d
    DIMS = 3
    CONVOLVE = staticmethod(F.conv3d)
    SKETCHED = SKConv3d

    def to_dense(self) -> nn.Conv3d:
        """The nn.Conv3d that computes the same, up to rounding."""
        return cast(nn.Conv3d, self._dense(nn.Conv3d))
