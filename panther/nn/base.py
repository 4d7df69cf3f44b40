"""What every sketched layer shares: its chain of weights, its terms, and the ways from and to the dense layer.

R is the rank. A term is a pair of sketches of `low_rank` ranks each, so R = 2 * num_terms * low_rank, or less when the
last term is partial. Terms are ordered by importance: the first ones alone are the best smaller layer.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from panther import chains
from panther.nn.arguments import Config, as_count
from panther.nn.factor import compose, factorise, full_ranks
from panther.nn.weight import DenseWeight

# The rank of one sketch when only a total rank is given: 8 is what CPU vector units like.
DEFAULT_LOW_RANK = 8

# The keys of config() that every layer has.
COMMON_KEYS = ("ranks", "low_rank", "active_terms", "bias", "dtype")

Dense = TypeVar("Dense", bound=nn.Module)


@dataclass(frozen=True)
class Shape:
    """The geometry of a dense layer; the tuples are empty for a linear layer."""

    in_features: int
    out_features: int
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()

    @property
    def fan_in(self) -> int:
        return self.in_features * math.prod(self.kernel_size)

    @property
    def params(self) -> int:
        return self.out_features * self.fan_in


def ranks_for(scheme: str, shape: chains.Geometry, rank: int) -> tuple[int, ...]:
    """The ranks of a chain that is asked for `rank`; Tucker-2 has no use for more than the channels there are."""
    if scheme == "tucker2":
        return (min(rank, shape.in_features), min(rank, shape.out_features))
    return (rank,)


def _chosen_ranks(
    owner: str, scheme: str, shape: Shape, terms: tuple[int | None, int | None], rank: int | Sequence[int] | None
) -> tuple[tuple[int, ...], int]:
    """The ranks and the quantum that the arguments of `from_dense` mean."""
    num_terms, low_rank = terms
    if (rank is None) == (num_terms is None) or (rank is None and low_rank is None):
        raise ValueError(f"{owner}.from_dense: give num_terms= and low_rank=, or rank= (with or without low_rank=)")
    quantum = as_count(owner, "low_rank", DEFAULT_LOW_RANK if low_rank is None else low_rank)
    if rank is None:
        return ranks_for(scheme, shape, 2 * as_count(owner, "num_terms", num_terms) * quantum), quantum
    if isinstance(rank, tuple | list):
        wanted = tuple(as_count(owner, "rank", item) for item in rank)
    else:
        wanted = ranks_for(scheme, shape, as_count(owner, "rank", rank))
    full = full_ranks(scheme, shape)
    if len(wanted) != len(full):
        raise ValueError(f"{owner}.from_dense(rank={rank!r}): scheme {scheme!r} has {len(full)} rank(s)")
    return tuple(map(min, wanted, full)), quantum


class SketchedLayer(nn.Module):
    """A dense layer whose weight is a chain of small factors: `down`, then (Tucker-2: `core`, then) `up`.

    A subclass says which dense layer it stands for (`DENSE`), and builds itself and that layer from a Shape.
    """

    DENSE: ClassVar[type[nn.Module]]
    DEFAULT_SCHEME: ClassVar[str]
    PACKING: ClassVar[str] = chains.TWO_GEMM
    BIAS: ClassVar[str] = "bias"  # the name of the parameter that is added to the outputs

    scheme: str
    ranks: tuple[int, ...]  # one; two for Tucker-2
    rank: int  # the larger one
    num_terms: int  # a partial last one counted
    low_rank: int
    down: nn.Parameter
    up: nn.Parameter
    bias: nn.Parameter | None
    _active_terms: int
    _shape: Shape
    _links: tuple[chains.Link, ...]

    @classmethod
    def _bare(cls) -> Self:
        """An instance that only nn.Module knows of, for the ways to build one other than the constructor."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        return new

    def _allocate(
        self,
        shape: Shape,
        chain: Sequence[chains.Link],
        *,
        low_rank: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Register zeros for the weights of a chain."""
        self._shape, self._links, self.low_rank = shape, tuple(chain), low_rank
        self.ranks = tuple(link.out_channels for link in chain[:-1])
        self.rank = max(self.ranks)
        self.num_terms = self._active_terms = math.ceil(self.rank / (2 * low_rank))
        for name, link in zip(self._weight_names, chain, strict=True):
            if link.params:
                self._make_room(name, link, device, dtype)
            else:
                self.register_parameter(name, None)
        zeros = nn.Parameter(torch.zeros(shape.out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter(self.BIAS, zeros)

    def _make_room(
        self, name: str, link: chains.Link, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        """Register zeros for the weight of one link."""
        self.register_parameter(name, nn.Parameter(torch.zeros(link.weight_shape, device=device, dtype=dtype)))

    def _chain(self, scheme: str, shape: chains.Geometry, ranks: Sequence[int]) -> tuple[chains.Link, ...]:
        """The links whose weights this layer stores."""
        return chains.links(scheme, shape, ranks)

    @property
    def _weight_names(self) -> tuple[str, ...]:
        return ("down", "core", "up") if self.scheme == "tucker2" else ("down", "up")

    def reset_parameters(self) -> None:
        """Draw new weights, such that the output varies as much as that of a newly made dense layer.

        The output's variance is a third of the input's, and all of that third is left to the last link.
        """
        for name, link in zip(self._weight_names, self._links, strict=True):
            fan_in = link.in_channels * math.prod(link.kernel_size)
            bound = math.sqrt((1 if name == "up" else 3) / fan_in)
            nn.init.uniform_(getattr(self, name), -bound, bound)
        self._reset_bias()

    def _reset_bias(self) -> None:
        if self.bias is not None:
            bound = 1 / math.sqrt(self._shape.fan_in)
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def active_terms(self) -> int:
        """How many of the terms `forward` uses; set it to any number from 1 to `num_terms`, as often as you like.

        It is part of `config()` and not of the state dict. The weights stay as they are.
        """
        return self._active_terms

    @active_terms.setter
    def active_terms(self, value: int) -> None:
        owner = type(self).__name__
        if self.scheme == "tucker2":
            raise ValueError(
                f"{owner}.active_terms: a {self.scheme!r} layer has two ranks and a core fitted to both, so its first "
                "terms alone are no smaller version of it. Make the layer with scheme='output_channel', "
                "'input_channel' or 'spatial' to switch terms."
            )
        terms = as_count(owner, "active_terms", value)
        if terms > self.num_terms:
            raise ValueError(f"{owner}.active_terms = {terms}: this layer has {self.num_terms} terms")
        self._active_terms = terms

    def active_weights(self) -> tuple[Tensor, ...]:
        """The weights `forward` uses, first link first: views of the parameters, of the active terms only."""
        if self.scheme == "tucker2":
            return tuple(getattr(self, name) for name in self._weight_names)
        if self._active_terms == self.num_terms:
            return self.down, self.up
        active = 2 * self.low_rank * self._active_terms
        return self.down[:active], self.up[:, :active]

    @property
    def weight(self) -> Tensor:
        """The weight of the dense layer that computes the same, in this layer's dtype.

        Reading its shape, dtype or device costs nothing. Each operation on its values multiplies the factors out anew:
        keep `layer.weight.clone()` to use it often. It cannot be written to.
        """
        if torch.compiler.is_dynamo_compiling():  # it drops a product that nobody uses, and cannot trace a stand-in
            return self._compose()
        size = (self._shape.out_features, self._shape.in_features, *self._shape.kernel_size)
        like = self._first_weight()
        return DenseWeight(self._compose, size, like.dtype, like.device)

    def _first_weight(self) -> Tensor:
        """A weight to read the dtype and the device from, also in replicas, which have no parameters()."""
        return self.down

    def _compose(self) -> Tensor:
        weights = self.active_weights()
        dtype = weights[0].dtype
        wide = torch.promote_types(dtype, torch.float32)
        if all(
            weight.dtype == wide for weight in weights
        ):  # casts that do nothing would keep an unused product in an exported graph
            return compose(weights).contiguous()
        return compose([weight.to(wide) for weight in weights]).to(dtype).contiguous()

    def _fill(self, dense: Dense) -> Dense:
        """Give a dense layer without weights those that this layer amounts to."""
        trainable = any(weight.requires_grad for name, weight in self.named_parameters() if name != self.BIAS)
        dense.weight = nn.Parameter(self._compose().detach(), requires_grad=trainable)
        if self.bias is not None:
            trainable = getattr(self, self.BIAS).requires_grad
            dense.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=trainable)
        return dense.train(self.training)

    def to_dense(self) -> nn.Module:
        """The dense layer that computes the same (with the active terms), up to rounding."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to become dense")

    @classmethod
    def _like(cls, layer: nn.Module, scheme: str, ranks: Sequence[int], *, low_rank: int, bias: bool) -> Self:
        """A layer of zeros with the geometry, dtype and device of a dense one."""
        raise NotImplementedError(f"{cls.__name__} does not say how to follow a dense layer")

    @classmethod
    def _shape_of(cls, layer: nn.Module) -> Shape:
        raise NotImplementedError(f"{cls.__name__} does not say how to read a dense layer")

    @classmethod
    def _check_dense(cls, layer: object) -> None:
        """Raise TypeError unless the layer is exactly of the class that this one stands for."""
        if type(layer) is cls.DENSE:
            return
        got, wanted = type(layer).__name__, f"nn.{cls.DENSE.__name__}"
        why = f", a subclass of {wanted}: its forward may differ" if isinstance(layer, cls.DENSE) else ""
        raise TypeError(f"{cls.__name__} is made from {wanted} and nothing else; got {got}{why}")

    @classmethod
    def from_dense(
        cls,
        layer: nn.Module,
        num_terms: int | None = None,
        low_rank: int | None = None,
        *,
        rank: int | Sequence[int] | None = None,
        scheme: str | None = None,
    ) -> Self:
        """The sketched layer nearest to a dense one, judged by the weight alone (compress() also looks at data).

        Say its size by `num_terms` and `low_rank`, or by `rank`: any total rank (the last term may be partial; low_rank
        is then 8 unless given; Tucker-2 also takes a pair). A rank above the full one is cut to it, and the full one
        reproduces the layer. dtype, device, bias, training flag and requires_grad stay as they are.

        Cost:   one singular value decomposition in float64.
        Raises: TypeError for a class other than the one this layer stands for, its subclasses included.
                ValueError for a weight with NaN or Inf, an impossible scheme or size.
        """
        cls._check_dense(layer)
        shape, scheme = cls._shape_of(layer), scheme or cls.DEFAULT_SCHEME
        chains.links(scheme, shape, (1, 1))  # refuses a scheme that this layer cannot have
        ranks, quantum = _chosen_ranks(cls.__name__, scheme, shape, (num_terms, low_rank), rank)
        weight = cast(Tensor, layer.weight).detach().double()
        _check_finite(f"{cls.__name__}.from_dense: the weight of the dense layer", weight)
        weights = factorise(scheme, shape, weight, ranks)
        bias = cast(Tensor | None, layer.bias)
        sketched = cls.from_factors(layer, scheme, weights, bias, low_rank=quantum)
        sketched._warn_if_larger(stacklevel=3)
        return sketched

    @classmethod
    def from_factors(
        cls, layer: nn.Module, scheme: str, weights: Sequence[Tensor], bias: Tensor | None, *, low_rank: int = 8
    ) -> Self:
        """The sketched layer with these link weights, in the place of a dense one.

        The weights and the bias are copied into the layer's dtype and device.

        Shapes: weights as `chains.links(...)` gives them, first link first: (R, in) and (out, R) for a linear layer.
        Raises: TypeError as from_dense. ValueError when a shape does not fit, or a number is not finite in the dtype.
        """
        cls._check_dense(layer)
        what, links = f"{cls.__name__}.from_factors(scheme={scheme!r})", 3 if scheme == "tucker2" else 2
        if len(weights) != links:
            raise ValueError(f"{what}: expected the weights of {links} links, got {len(weights)}")
        ranks = tuple(len(weight) for weight in weights[:-1])
        low_rank = as_count(cls.__name__, "low_rank", low_rank)
        sketched = cls._like(layer, scheme, ranks, low_rank=low_rank, bias=bias is not None)
        old_weight, old_bias = layer.weight, layer.bias
        targets = [getattr(sketched, name) for name in sketched._weight_names]
        _copy_into(f"{what}: weights", targets, weights, trainable=bool(old_weight.requires_grad))
        if bias is not None and sketched.bias is not None:
            trainable = bool((old_weight if old_bias is None else old_bias).requires_grad)
            _copy_into(f"{what}: bias", [sketched.bias], [bias], trainable=trainable)
        return sketched.train(layer.training)

    def _warn_if_larger(self, stacklevel: int) -> None:
        """Warn when the dense layer would hold fewer weights, with the largest size that would not be so."""
        held, dense = sum(link.params for link in self._links), self._shape.params
        if held <= dense:
            return
        name, dense_name = type(self).__name__, f"nn.{self.DENSE.__name__}"
        pays = largest_rank_that_pays(self.scheme, self._shape, self._chain)
        way_out = f"It pays up to rank {pays}, that is num_terms*low_rank <= {pays // 2}." if pays else "No rank pays."
        if pays == 1:
            way_out = "It pays at rank 1 only, which is less than one term: from_dense(rank=1)."
        warnings.warn(
            f"{name}({self.extra_repr()}) holds {held:,} weights; {dense_name} would be smaller: {dense:,}. {way_out}",
            UserWarning,
            stacklevel=stacklevel,
        )

    def config(self) -> dict[str, Any]:
        """All that `from_config` needs, as JSON-able data: geometry, sizes, dtype; not the weights."""
        return {
            "ranks": list(self.ranks),
            "low_rank": self.low_rank,
            "active_terms": self._active_terms,
            "bias": self.bias is not None,
            "dtype": str(self._first_weight().dtype).removeprefix("torch."),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The layer that `config()` described, full of zeros until a state dict is loaded.

        Raises: ValueError, naming the key, for anything that `config()` would not have written.
        """
        raise NotImplementedError(f"{cls.__name__} does not say how to be read")

    def _read_active_terms(self, read: Config) -> Self:
        lowest = self.num_terms if self.scheme == "tucker2" else 1
        self._active_terms = read.integer("active_terms", lowest, self.num_terms)
        return self

    def _describe_terms(self) -> str:
        rank = self.rank if len(self.ranks) == 1 else self.ranks
        text = f"rank={rank}, num_terms={self.num_terms}, low_rank={self.low_rank}"
        if self._active_terms != self.num_terms:
            text += f", active_terms={self._active_terms}"
        return text + ("" if self.bias is not None else ", bias=False")


def largest_rank_that_pays(
    scheme: str, shape: Shape, chain: Callable[..., Sequence[chains.Link]] = chains.links
) -> int:
    """The largest rank at which a chain holds no more weights than the dense layer; 0 when there is none."""

    def held(rank: int) -> int:
        return sum(link.params for link in chain(scheme, shape, ranks_for(scheme, shape, rank)))

    # A rank above the full one never pays, and there a Tucker-2 chain no longer grows.
    return bisect_right(range(1, max(full_ranks(scheme, shape)) + 1), shape.params, key=held)


def _check_finite(what: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise ValueError(
            f"{what} has {int((~torch.isfinite(tensor)).sum())} NaN or Inf of {tensor.numel()} numbers "
            f"({tensor.dtype}); repair or retrain the layer, or leave it dense"
        )


@torch.no_grad()
def _copy_into(what: str, targets: Sequence[Tensor], values: Sequence[Tensor], *, trainable: bool) -> None:
    for target, value in zip(targets, values, strict=True):
        if target.shape != value.shape:
            wanted = [tuple(target.shape) for target in targets]
            raise ValueError(f"{what}: expected shapes {wanted}, got {[tuple(value.shape) for value in values]}")
        target.copy_(value).requires_grad_(trainable)
        _check_finite(what, target)
