"""Layers whose weights are whole numbers of 8, 4 or 3 bits with scales: the weight itself, or the links of a chain.

Or numbers of bfloat16, which are counted as 16 bits here and have no scales.

Scheme "whole": the dense weight. A chain's scheme: each of its links. "corrected" (linear layers): the dense weight in
few bits, and a chain of 8 bits that makes up for part of the error of that: y = b + Q x + up (down x).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panther import chains
from panther.nn.arguments import MAX_SIZE, Config, one_of
from panther.nn.base import COMMON_KEYS, Shape, SketchedLayer, _check_finite
from panther.nn.conv import CONFIG_KEYS as CONV_KEYS
from panther.nn.conv import SKConv1d, SKConv2d, SKConv3d, SketchedConv
from panther.nn.factor import compose
from panther.nn.linear import SKLinear
from panther.ops import dequantised, low_rank_linear_int8, packed_int4, quantised_conv, quantised_linear, unpacked_int4
from panther.quantise import Rounded, to_nearest
from panther.spec import BITS, Grid

GROUP_SIZES = (32, 64, 128)
HELD_BITS = {
    16: torch.int16,
    8: torch.int8,
    4: torch.uint8,
}  # that numbers take in memory and in the ops; others are held in the next larger
KEYS = ("ranks", "bits", "group_size", "bias", "dtype")
LINEAR_KEYS = ("in_features", "out_features", "scheme", *KEYS)
QUANTISED_CONV_KEYS = (*(key for key in CONV_KEYS if key not in COMMON_KEYS), *KEYS)
LINEAR_SCHEMES = (chains.WHOLE, chains.LINEAR, chains.CORRECTED)
CONV_SCHEMES = (chains.WHOLE, *chains.CONV_SCHEMES)


class StoredWeight(nn.Module):
    """One weight (out, *rest) as whole numbers and scales; its rows are packed each from a new byte on.

    values: int8 (out, columns), uint8 (out, ceil(columns / 2)), which hold 4 bits or 3, or int16 (out, columns), the
    bits of bfloat16. scales: (out, groups). In a file 3 bits are 3 bits, and scales bfloat16 where that is the same.
    A quantised layer runs it without its hooks.
    """

    values: Tensor
    scales: Tensor

    def __init__(
        self, size: Sequence[int], grid: Grid, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.size, self.grid = tuple(size), grid
        rows, columns = size[0], math.prod(size[1:])
        kind = HELD_BITS.get(grid.bits, torch.uint8)
        held = -(-columns // 2) if kind == torch.uint8 else columns
        self.register_buffer("values", torch.zeros(rows, held, dtype=kind, device=device))
        self.register_buffer("scales", torch.ones(rows, grid.groups(columns), dtype=dtype, device=device))

    @property
    def held(self) -> tuple[Tensor, Tensor]:
        """values and scales. As attributes of a module they take as long to find as a quarter of a small product."""
        values, scales = self._buffers.get("values"), self._buffers.get("scales")
        if values is None or scales is None:  # made parameters, or computed from some
            return self.values, self.scales
        return values, scales

    @property
    def columns(self) -> int:
        return math.prod(self.size[1:])

    @property
    def numbers(self) -> int:
        """Whole numbers, of which four bits hold two in a byte."""
        return math.prod(self.size)

    def fill(self, rounded: Rounded) -> None:
        """Take numbers of this size and grid."""
        if rounded.values.shape != (self.size[0], self.columns) or rounded.grid != self.grid:
            raise ValueError(
                f"expected {(self.size[0], self.columns)} numbers in {self.grid}, got {tuple(rounded.values.shape)} in "
                f"{rounded.grid}"
            )
        self.values.copy_(packed_int4(rounded.values) if self.values.dtype == torch.uint8 else rounded.values)
        self.scales.copy_(rounded.scales)
        _check_finite("scales of a quantised weight", self.scales)

    def rounded(self) -> Rounded:
        """The numbers, one by one."""
        values = unpacked_int4(self.values, self.columns) if self.values.dtype == torch.uint8 else self.values
        return Rounded(values, self.scales, self.grid)

    def for_file(self) -> dict[str, Tensor]:
        """`values` and `scales` as a file has them."""
        values = self.values
        if self.grid.bits not in HELD_BITS:
            values = packed_bits(unpacked_int4(values, self.columns), self.grid.bits)
        short = self.scales.bfloat16()
        return {
            "values": values,
            "scales": short if bool((short.to(self.scales) == self.scales).all()) else self.scales,
        }

    def from_file(self, values: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """The buffers that `for_file` made these of.

        Raises: ValueError when they are of other shapes or types.
        """
        dtype, short = self.scales.dtype, torch.bfloat16
        held = -(-self.columns * self.grid.bits // 8 // self.values.element_size())
        sizes = (self.size[0], held), tuple(self.scales.shape)
        expected = (values, sizes[0], self.values.dtype), (scales, sizes[1], short if scales.dtype == short else dtype)
        for name, (tensor, size, kind) in zip(("values", "scales"), expected, strict=True):
            if tensor.dtype != kind:
                raise ValueError(f"{name} is {tensor.dtype}, expected {kind}")
            if tensor.shape != size:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {size}")
        if self.grid.bits not in HELD_BITS:
            values = packed_int4(unpacked_bits(values, self.columns, self.grid.bits))
        return {"values": values, "scales": scales.to(self.scales.dtype)}

    def dense(self) -> Tensor:
        """The weight that is meant, (out, *rest), in the dtype of the scales."""
        return dequantised(self.values, self.scales, self.columns).reshape(self.size)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., columns) -> (..., out), without a copy of the whole weight on a CPU."""
        return quantised_linear(x, *self.held, bias)

    def convolve(self, x: Tensor, bias: Tensor | None, link: chains.Link) -> Tensor:
        """x (batch, channels, *size) or (channels, *size) -> as a convolution of the link, without such a copy."""
        values, scales = self.held
        geometry = {"stride": link.stride, "padding": link.sides, "dilation": link.dilation}
        return quantised_conv(x, values, scales, bias, kernel_size=link.kernel_size, **geometry)

    def extra_repr(self) -> str:
        group = "" if self.grid.group_size is None else f", group_size={self.grid.group_size}"
        return f"{self.size}, bits={self.grid.bits}{group}"


def for_file(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model's state dict as its file has them: whole numbers of few bits are smaller there."""
    found = dict(tensors)
    for place, module in model.named_modules(remove_duplicate=False):
        names = {part: f"{place}.{part}".lstrip(".") for part in ("values", "scales")}
        if isinstance(module, StoredWeight) and not tensors.keys().isdisjoint(names.values()):
            parts = module.for_file()
            found |= {name: parts[part] for part, name in names.items() if name in tensors}
    return found


class QuantisedLayer(SketchedLayer):
    """A dense or sketched layer whose weights are stored in few bits.

    Made from trained layers: `from_dense` rounds a dense one by its weight alone, panther.compress by its data.
    `whole` is the dense weight (schemes "whole" and "corrected"); `down`, `core` and `up` are the links of a chain.
    """

    PACKING = chains.QUANTISED
    DEFAULT_SCHEME = chains.WHOLE
    SKETCHED: ClassVar[type[SketchedLayer]]

    grid: Grid

    def __init__(self, *_args: object, **_options: object) -> None:
        name = type(self).__name__
        raise TypeError(
            f"{name} is made from a trained layer and has no constructor: {name}.from_dense(layer, bits=8) takes an "
            f"nn.{self.DENSE.__name__}"
        )

    @property
    def _weight_names(self) -> tuple[str, ...]:
        if self.scheme == chains.WHOLE:
            return ("whole",)
        links = ("down", "core", "up") if self.scheme == "tucker2" else ("down", "up")
        return ("whole", *links) if self.scheme == chains.CORRECTED else links

    def _chain(self, scheme: str, shape: chains.Geometry, ranks: Sequence[int]) -> tuple[chains.Link, ...]:
        return chains.stored_links(scheme, shape, ranks)

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
        self._shape, self._links, self.low_rank = shape, tuple(chain), low_rank
        factors = chain[1:] if self.scheme == chains.CORRECTED else chain
        self.ranks = tuple(link.out_channels for link in factors[:-1])
        self.rank = max(self.ranks, default=0)
        self.num_terms = self._active_terms = 1
        grids = chains.grids_for(self.scheme, self.grid, len(chain))
        for name, link, grid in zip(self._weight_names, chain, grids, strict=True):
            setattr(self, name, StoredWeight(link.weight_shape, grid, device, dtype))
        zeros = nn.Parameter(torch.zeros(shape.out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", zeros)

    @property
    def stored(self) -> tuple[StoredWeight, ...]:
        """The weights as they are stored, in the order in which they are used."""
        return tuple(cast(StoredWeight, self._modules[name]) for name in self._weight_names)

    def reset_parameters(self) -> None:
        """Refused: whole numbers are not drawn at random."""
        raise TypeError(f"{type(self).__name__} has no random weights to draw: make it again with from_dense(layer)")

    @property
    def active_terms(self) -> int:
        """1: all of a quantised layer runs."""
        return self.num_terms

    @active_terms.setter
    def active_terms(self, value: int) -> None:
        raise ValueError(
            f"{type(self).__name__}.active_terms: the links of a quantised layer were rounded to fit each other, so "
            f'no part of it is a smaller layer. Keep a {self.SKETCHED.__name__} (dtype "float32") to switch terms.'
        )

    def active_weights(self) -> tuple[Tensor, ...]:
        """What the stored weights stand for, in the dtype of the scales."""
        return tuple(part.dense() for part in self.stored)

    def _first_weight(self) -> Tensor:
        return self.stored[0].scales

    def _compose(self) -> Tensor:
        weights = [weight.to(torch.promote_types(weight.dtype, torch.float32)) for weight in self.active_weights()]
        if self.scheme == chains.CORRECTED:
            whole = weights[0] + compose(weights[1:])
        else:
            whole = weights[0] if len(weights) == 1 else compose(weights)
        return whole.to(self._first_weight().dtype).contiguous()

    @classmethod
    def from_dense(  # type: ignore[override]  # its size is a number of bits, not a rank
        cls, layer: nn.Module, *, bits: int = 8, group_size: int | None = None
    ) -> Self:
        """The quantised layer nearest to a dense one, judged by the weight alone (compress() also looks at data).

        bits: 16 (bfloat16), 8, 4 or 3. group_size: 32, 64 or 128 neighbours share a scale; None: all of a row.
        dtype, device, bias and training flag stay as they are.

        Raises: TypeError for a class other than the one this layer stands for, its subclasses included.
                ValueError for other bits or group sizes, and for a weight with NaN or Inf.
        """
        cls._check_dense(layer)
        grid = grid_of(cls.__name__, bits, group_size)
        weight = cast(Tensor, layer.weight).detach()
        _check_finite(f"{cls.__name__}.from_dense: the weight of the dense layer", weight)
        wide = weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32)).cpu()
        return cls.from_rounded(layer, chains.WHOLE, [to_nearest(wide, grid, dtype=weight.dtype)], layer.bias)  # type: ignore[arg-type]

    @classmethod
    def from_rounded(cls, layer: nn.Module, scheme: str, parts: Sequence[Rounded], bias: Tensor | None) -> Self:
        """The layer of these numbers in the place of a dense one, first link first ("corrected": the whole one first).

        Raises: TypeError as from_dense. ValueError when a size or a grid does not fit, or a scale is not finite.
        """
        cls._check_dense(layer)
        chain = parts[1:] if scheme == chains.CORRECTED else parts
        ranks = [len(part.values) for part in chain[:-1]]
        new = cls._bare()
        new.grid = parts[0].grid
        new._follow_dense(layer, scheme, ranks, bias is not None)
        with torch.no_grad():
            for target, part in zip(new.stored, parts, strict=True):
                target.fill(part)
            if bias is not None and new.bias is not None:
                new.bias.copy_(bias)
                _check_finite(f"{cls.__name__}.from_rounded: the bias", new.bias)
                old = cast(Tensor | None, layer.bias)
                new.bias.requires_grad_(cast(Tensor, layer.weight if old is None else old).requires_grad)
        return new.train(layer.training)

    def _follow_dense(self, layer: nn.Module, scheme: str, ranks: Sequence[int], bias: bool) -> None:
        raise NotImplementedError(f"{type(self).__name__} does not say how to follow a dense layer")

    @classmethod
    def _shape_of(cls, layer: nn.Module) -> Shape:
        return cls.SKETCHED._shape_of(layer)

    def config(self) -> dict[str, Any]:
        return {
            "ranks": list(self.ranks),
            "bits": self.grid.bits,
            "group_size": self.grid.group_size or 0,
            "bias": self.bias is not None,
            "dtype": str(self._first_weight().dtype).removeprefix("torch."),
        }

    def _describe_terms(self) -> str:
        rank = f"rank={self.ranks[0] if len(self.ranks) == 1 else self.ranks}, " if self.ranks else ""
        group = "" if self.grid.group_size is None else f", group_size={self.grid.group_size}"
        return f"{rank}bits={self.grid.bits}{group}" + ("" if self.bias is not None else ", bias=False")


def packed_bits(values: Tensor, bits: int) -> Tensor:
    """Whole numbers from -2^(bits - 1) on, each plus that, one after another from the lowest bit of a byte on.

    Shapes: int8 (m, n) -> uint8 (m, ceil(n * bits / 8)); what is left of the last byte of a row is zero.
    """
    stored = (values.cpu().numpy() + (1 << bits - 1)).astype(np.uint8)
    each = stored[:, :, None] >> np.arange(bits, dtype=np.uint8) & 1
    packed = np.packbits(each.reshape(len(stored), -1), axis=1, bitorder="little")
    return torch.from_numpy(packed).to(values.device)


def unpacked_bits(packed: Tensor, columns: int, bits: int) -> Tensor:
    """The numbers that `packed_bits` stored: uint8 (m, ceil(columns * bits / 8)) -> int8 (m, columns)."""
    each = np.unpackbits(packed.cpu().numpy(), axis=1, count=columns * bits, bitorder="little")
    stored = each.reshape(len(each), columns, bits) << np.arange(bits, dtype=np.uint8)
    return torch.from_numpy(stored.sum(-1, dtype=np.uint8).astype(np.int8) - (1 << bits - 1)).to(packed.device)


def grid_of(owner: str, bits: int, group_size: int | None) -> Grid:
    """Raises: ValueError for bits or a group size that no layer stores."""
    if bits not in BITS.values() or isinstance(bits, bool):
        raise ValueError(f"{owner}(bits={bits!r}): expected 16 (bfloat16), 8, 4 or 3")
    if bits == BITS["bfloat16"] and group_size is not None:
        raise ValueError(f"{owner}(bits=16, group_size={group_size!r}): bfloat16 has no scales, leave group_size out")
    if group_size is not None and group_size not in GROUP_SIZES:
        raise ValueError(f"{owner}(group_size={group_size!r}): expected None or one of {GROUP_SIZES}")
    return Grid(bits, group_size)


def read_grid(read: Config) -> Grid:
    """That of a config, from the keys "bits" and "group_size"."""
    bits, size = (
        read.integer("bits", min(BITS.values()), max(BITS.values())),
        read.integer("group_size", 0, max(GROUP_SIZES)),
    )
    return grid_of(read.owner, bits, size or None)


class QuantisedLinear(QuantisedLayer):
    """nn.Linear in 16 (bfloat16), 8, 4 or 3 bits a weight: QuantisedLinear.from_dense(layer, bits=8).

    On a CPU the weight is widened as it is read, a few rows of inputs at a time, and never as a whole.

    Shapes: input (..., in_features) -> (..., out_features).
    """

    DENSE = nn.Linear
    SKETCHED = SKLinear

    def _follow_dense(self, layer: nn.Module, scheme: str, ranks: Sequence[int], bias: bool) -> None:
        one_of(type(self).__name__, "scheme", scheme, LINEAR_SCHEMES)
        weight = cast(nn.Linear, layer).weight
        self._build(self._shape_of(layer), scheme, ranks, bias=bias, device=weight.device, dtype=weight.dtype)

    def _build(
        self,
        shape: Shape,
        scheme: str,
        ranks: Sequence[int],
        *,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.scheme = scheme
        self.in_features, self.out_features = shape.in_features, shape.out_features
        chain = self._chain(scheme, shape, ranks)
        self._allocate(shape, chain, low_rank=max(ranks, default=1), bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        parts = self.stored
        if self.scheme == chains.WHOLE:
            return parts[0].forward(input, self.bias)
        down, up = parts[-2:]
        bias = self.bias if self.scheme == chains.LINEAR else None
        if down.grid.bits == 8:
            y = low_rank_linear_int8(input, *down.held, *up.held, bias)
        else:
            y = up.forward(down.forward(input, None), bias)
        return y if self.scheme == chains.LINEAR else y + parts[0].forward(input, self.bias)

    def to_dense(self) -> nn.Linear:
        """The nn.Linear that computes the same, up to rounding."""
        return self._fill(nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta"))

    def config(self) -> dict[str, Any]:
        sizes = {"in_features": self.in_features, "out_features": self.out_features, "scheme": self.scheme}
        return {**sizes, **super().config()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        read = Config(cls.__name__, config, LINEAR_KEYS)
        shape, scheme = (
            Shape(read.integer("in_features"), read.integer("out_features")),
            read.word("scheme", LINEAR_SCHEMES),
        )
        ranks = read.integers("ranks", 0 if scheme == chains.WHOLE else 1, high=MAX_SIZE)
        read.check_numbers(sum(link.params for link in chains.stored_links(scheme, shape, ranks)))
        new = cls._bare()
        new.grid = read_grid(read)
        new._build(shape, scheme, ranks, bias=read.flag("bias"), dtype=read.dtype())
        return new

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme!r}, "
            f"{self._describe_terms()}"
        )


class QuantisedConv(QuantisedLayer, SketchedConv):
    """A convolution, or a chain of them, in few bits a weight, which are widened as they are read.

    Shapes: input (batch, in_channels, *size) or (in_channels, *size) -> as the dense layer.
    """

    def forward(self, input: Tensor) -> Tensor:
        x, last = self._padded(input), self._links[-1]
        for link, part in zip(self._links, self.stored, strict=True):
            x = part.convolve(x, self.bias if link is last else None, link)
        return x

    def _follow_dense(self, layer: nn.Module, scheme: str, ranks: Sequence[int], bias: bool) -> None:
        one_of(type(self).__name__, "scheme", scheme, CONV_SCHEMES)
        conv = cast(nn.Conv2d, layer)
        self._build(
            self._shape_of(conv),
            conv.padding_mode,
            scheme,
            ranks,
            low_rank=max(ranks, default=1),
            bias=bias,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )

    def config(self) -> dict[str, Any]:
        return {**self._geometry(), **QuantisedLayer.config(self)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        read = Config(cls.__name__, config, QUANTISED_CONV_KEYS)
        shape, mode = cls._read_geometry(read)
        scheme = read.word("scheme", CONV_SCHEMES)
        count = {chains.WHOLE: 0, "tucker2": 2}.get(scheme, 1)
        ranks = read.integers("ranks", count, high=MAX_SIZE)
        read.check_numbers(sum(link.params for link in chains.stored_links(scheme, shape, ranks)))
        new = cls._bare()
        new.grid = read_grid(read)
        bias, dtype = read.flag("bias"), read.dtype()
        new._build(shape, mode, scheme, ranks, low_rank=max(ranks, default=1), bias=bias, dtype=dtype)
        return new


class QuantisedConv1d(QuantisedConv):
    """nn.Conv1d in few bits a weight: QuantisedConv1d.from_dense(layer, bits=8)."""

    DENSE = nn.Conv1d
    DIMS = 1
    CONVOLVE = staticmethod(F.conv1d)
    SKETCHED = SKConv1d

    def to_dense(self) -> nn.Conv1d:
        """The nn.Conv1d that computes the same, up to rounding."""
        return cast(nn.Conv1d, self._dense(nn.Conv1d))


class QuantisedConv2d(QuantisedConv):
    """nn.Conv2d in few bits a weight: QuantisedConv2d.from_dense(layer, bits=8)."""

    DENSE = nn.Conv2d
    DIMS = 2
    CONVOLVE = staticmethod(F.conv2d)
    SKETCHED = SKConv2d

    def to_dense(self) -> nn.Conv2d:
        """The nn.Conv2d that computes the same, up to rounding."""
        return cast(nn.Conv2d, self._dense(nn.Conv2d))


class QuantisedConv3d(QuantisedConv):
    """nn.Conv3d in few bits a weight: QuantisedConv3d.from_dense(layer, bits=8)."""

    DENSE = nn.Conv3d
    DIMS = 3
    CONVOLVE = staticmethod(F.conv3d)
    SKETCHED = SKConv3d

    def to_dense(self) -> nn.Conv3d:
        """The nn.Conv3d that computes the same, up to rounding."""
        return cast(nn.Conv3d, self._dense(nn.Conv3d))
