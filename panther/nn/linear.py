"""A linear layer as two thin ones: y = b + up (down x), with down (R, in) and up (out, R)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from panther import chains
from panther.nn.arguments import MAX_SIZE, Config, as_count, one_of
from panther.nn.base import COMMON_KEYS, Shape, SketchedLayer
from panther.ops import low_rank_linear

BASES = ("learned", "random")
CONFIG_KEYS = ("in_features", "out_features", *COMMON_KEYS, "basis", "seed")
MAX_SEED = 2**63 - 1


class SKLinear(SketchedLayer):
    """nn.Linear with a weight of rank R = 2 * num_terms * low_rank, which holds R * (in + out) numbers.

    `low_rank` is the rank of one sketch, best a multiple of 8 on CPU and of 16 on GPU. `num_terms` counts pairs of
    sketches, the most important first: `layer.active_terms = 1` runs the first pair only.

    basis="learned": `down` and `up` are parameters.
    basis="random", for training from scratch only: in each term one side of each sketch is a fixed matrix of random
    signs (buffers u1, u2, rebuilt from `seed`, not in the state dict) and the other is learned (s1, s2), so half as
    many numbers are trained and stored: y = b + 1/(2 active) sum_i (x S1_i U1_i + x U2_i S2_i). Save the seed with
    the weights: `config()` has it. After `to_empty()`, call `reset_parameters()` before loading weights.

    Warns when nn.Linear would be smaller.

    Shapes: input (..., in_features) -> (..., out_features).
    Raises: TypeError for a size that is not an integer, ValueError for one below 1 or an unknown basis.
    Source of basis="random": Panther, arXiv 2601.15473.
    """

    DENSE = nn.Linear
    DEFAULT_SCHEME = chains.LINEAR

    basis: str
    seed: int
    s1: nn.Parameter  # (L, k, in); x S1_i is F.linear(x, s1[i])
    s2: nn.Parameter  # (out, L, k)
    u1: Tensor  # (out, L, k)
    u2: Tensor  # (L, k, in)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_terms: int,
        low_rank: int,
        bias: bool = True,
        *,
        basis: str = "learned",
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        shape = Shape(as_count(name, "in_features", in_features), as_count(name, "out_features", out_features))
        num_terms, low_rank = as_count(name, "num_terms", num_terms), as_count(name, "low_rank", low_rank)
        one_of(name, "basis", basis, BASES)
        seed = as_count(name, "seed", seed, low=0)
        rank = 2 * num_terms * low_rank
        self._build(shape, rank, low_rank, bias, basis=basis, seed=seed, device=device, dtype=dtype)
        self.reset_parameters()
        self._warn_if_larger(stacklevel=3)

    def _build(
        self,
        shape: Shape,
        rank: int,
        low_rank: int,
        bias: bool,
        *,
        basis: str = "learned",
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.scheme, self.basis, self.seed = self.DEFAULT_SCHEME, basis, seed
        self.in_features, self.out_features = shape.in_features, shape.out_features
        chain = chains.links(self.scheme, shape, (rank,))
        self._allocate(shape, chain, low_rank=low_rank, bias=bias, device=device, dtype=dtype)
        if basis == "random":
            self._replace_by_random_basis()

    def _replace_by_random_basis(self) -> None:
        like, terms, k = self.down, self.num_terms, self.low_rank
        del self.down, self.up
        self.s1 = nn.Parameter(like.new_zeros(terms, k, self.in_features))
        self.s2 = nn.Parameter(like.new_zeros(self.out_features, terms, k))
        self.register_buffer("u1", like.new_zeros(self.out_features, terms, k), persistent=False)
        self.register_buffer("u2", like.new_zeros(terms, k, self.in_features), persistent=False)
        self._rebuild_bases()

    @torch.no_grad()
    def _rebuild_bases(self) -> None:
        """Fill u1 and u2 from the seed: the same on any device, and the same first terms for any number of them.

        Signs of size 1/sqrt(k) have E[U1^T U1] = 1, and leave no rounding that could differ between machines.
        """
        if self.u1.is_meta:  # filled once the weights are there
            return
        generator = torch.Generator("cpu").manual_seed(self.seed)
        size = (self.num_terms, self.low_rank, self.in_features + self.out_features)
        bits = torch.randint(2, size, generator=generator, dtype=torch.int8, device="cpu")
        signs = (2 * bits - 1).float() / math.sqrt(self.low_rank)
        self.u2.copy_(signs[..., : self.in_features])
        self.u1.copy_(signs[..., self.in_features :].permute(2, 0, 1))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self.basis != "random" or self.s1.is_meta:
            return
        if self.u1.dtype != self.s1.dtype or self.u1.device != self.s1.device:  # others were assigned
            self.u1, self.u2 = self.s1.new_empty(self.u1.shape), self.s1.new_empty(self.u2.shape)
            self._rebuild_bases()

    def reset_parameters(self) -> None:
        if self.basis == "learned":
            super().reset_parameters()
            return
        self._rebuild_bases()
        # Each of the 2L summands gives the output in * variance(S) of variance, and their mean 1/(2L) of that;
        # nn.Linear gives a third.
        bound = math.sqrt(2 * self.num_terms / self.in_features)
        nn.init.uniform_(self.s1, -bound, bound)
        nn.init.uniform_(self.s2, -bound, bound)
        self._reset_bias()

    def active_weights(self) -> tuple[Tensor, ...]:
        if self.basis == "learned":
            return super().active_weights()
        active = self._active_terms
        down = torch.cat((self.s1[:active], self.u2[:active]), dim=1).flatten(0, 1)
        up = torch.cat((self.u1[:, :active], self.s2[:, :active]), dim=2).flatten(1)
        return down, up / (2 * active)

    def _first_weight(self) -> Tensor:
        return self.down if self.basis == "learned" else self.s1

    def forward(self, input: Tensor) -> Tensor:
        down, up = self.active_weights()
        return low_rank_linear(input, down, up, self.bias)

    def to_dense(self) -> nn.Linear:
        """The nn.Linear that computes the same (with the active terms), up to rounding."""
        has_bias = self.bias is not None
        return self._fill(nn.Linear(self.in_features, self.out_features, has_bias, device="meta"))

    @classmethod
    def _shape_of(cls, layer: nn.Module) -> Shape:
        linear = cast(nn.Linear, layer)
        return Shape(linear.in_features, linear.out_features)

    @classmethod
    def _like(cls, layer: nn.Module, scheme: str, ranks: Sequence[int], *, low_rank: int, bias: bool) -> Self:
        one_of(cls.__name__, "scheme", scheme, (cls.DEFAULT_SCHEME,))
        new, weight = cls._bare(), cast(nn.Linear, layer).weight
        new._build(cls._shape_of(layer), ranks[0], low_rank, bias, device=weight.device, dtype=weight.dtype)
        return new

    def config(self) -> dict[str, Any]:
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return {**sizes, **super().config(), "basis": self.basis, "seed": self.seed}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        read = Config(cls.__name__, config, CONFIG_KEYS)
        shape = Shape(read.integer("in_features"), read.integer("out_features"))
        (rank,) = read.integers("ranks", 1, high=MAX_SIZE)
        low_rank, basis = read.integer("low_rank"), read.word("basis", BASES)
        read.check_numbers(rank * (shape.in_features + shape.out_features))
        if basis == "random" and rank % (2 * low_rank):
            raise ValueError(f"{cls.__name__} config: with basis='random', ranks must be a multiple of 2 * low_rank")
        new = cls._bare()
        seed = read.integer("seed", 0, MAX_SEED)
        new._build(shape, rank, low_rank, read.flag("bias"), basis=basis, seed=seed, dtype=read.dtype())
        return new._read_active_terms(read)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, {self._describe_terms()}"
        return text + (f", basis='random', seed={self.seed}" if self.basis == "random" else "")
