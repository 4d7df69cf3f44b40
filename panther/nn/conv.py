"""Convolutions as chains of two or three smaller ones, over 1, 2 or 3 axes; panther.chains has the schemes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panther import chains
from panther.chains import Link
from panther.nn.arguments import MAX_SIZE, Config, as_count, one_of, per_axis
from panther.nn.base import COMMON_KEYS, Shape, SketchedLayer, ranks_for
from panther.ops import conv, low_rank_conv

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
PADDING_WORDS = ("same", "valid")
CONFIG_KEYS = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "padding_mode",
    "scheme",
    *COMMON_KEYS,
)

PerAxis: TypeAlias = int | Sequence[int]


class SketchedConv(SketchedLayer):
    """A convolution with `DENSE`'s arguments whose weight is a chain of smaller ones, of rank 2 * num_terms * low_rank.

    scheme: "output_channel" (the full kernel to R channels, then 1 x 1), "input_channel" (1 x 1 to R, then the full
    kernel), "spatial" (kh x 1 to R, then 1 x kw; two axes only) or "tucker2" (1 x 1 to min(R, in), the full kernel to
    min(R, out), 1 x 1; its terms cannot be switched off). groups must be 1, and basis="random" is SKLinear's only.

    Warns when the dense layer would be smaller.

    Shapes: input (batch, in_channels, *size) or (in_channels, *size) -> as the dense layer.
    Raises: TypeError for a size that is not an integer; ValueError for one out of range, or an unknown word.
    """

    DEFAULT_SCHEME = "output_channel"
    DIMS: ClassVar[int]
    CONVOLVE: ClassVar[Callable[..., Tensor]]

    _padded_first: tuple[int, ...]
    core: nn.Parameter  # Tucker-2's middle link; the others have none

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: PerAxis,
        num_terms: int,
        low_rank: int,
        stride: PerAxis = 1,
        padding: PerAxis | str = 0,
        dilation: PerAxis = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        scheme: str = "output_channel",
        basis: str = "learned",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name, dims = type(self).__name__, self.DIMS
        _check_groups(name, as_count(name, "groups", groups))
        if basis != "learned":
            raise ValueError(f"{name}(basis={basis!r}): only 'learned' exists here; random bases are SKLinear's")
        shape = Shape(
            as_count(name, "in_channels", in_channels),
            as_count(name, "out_channels", out_channels),
            per_axis(name, "kernel_size", kernel_size, dims),
            per_axis(name, "stride", stride, dims),
            one_of(name, "padding", padding, PADDING_WORDS)
            if isinstance(padding, str)
            else per_axis(name, "padding", padding, dims, low=0),
            per_axis(name, "dilation", dilation, dims),
        )
        num_terms, low_rank = as_count(name, "num_terms", num_terms), as_count(name, "low_rank", low_rank)
        one_of(name, "padding_mode", padding_mode, PADDING_MODES)
        ranks = ranks_for(scheme, shape, 2 * num_terms * low_rank)
        self._build(shape, padding_mode, scheme, ranks, low_rank=low_rank, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()
        self._warn_if_larger(stacklevel=3)

    def _build(
        self,
        shape: Shape,
        padding_mode: str,
        scheme: str,
        ranks: Sequence[int],
        *,
        low_rank: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if shape.padding == "same" and any(step != 1 for step in shape.stride):
            raise ValueError(f"{type(self).__name__}(padding='same', stride={shape.stride}): 'same' needs stride 1")
        self.scheme, self.padding_mode, self.groups = scheme, padding_mode, 1
        self.in_channels, self.out_channels = shape.in_features, shape.out_features
        self.kernel_size, self.stride, self.dilation = shape.kernel_size, shape.stride, shape.dilation
        self.padding = shape.padding
        # Modes other than zeros pad the input once, before the chain; its links then pad nothing.
        self._padded_first = () if padding_mode == "zeros" else chains.pad_amounts(shape)
        inner = shape if padding_mode == "zeros" else replace(shape, padding=(0,) * self.DIMS)
        chain = self._chain(scheme, inner, ranks)
        self._allocate(shape, chain, low_rank=low_rank, bias=bias, device=device, dtype=dtype)
        self._ends_in_points = _is_of_single_places(self._links[-1])

    @property
    def in_features(self) -> int:
        return self.in_channels

    @property
    def out_features(self) -> int:
        return self.out_channels

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, self._padded_first, mode=self.padding_mode) if self._padded_first else x

    def forward(self, input: Tensor) -> Tensor:
        x, weights, last = self._padded(input), self.active_weights(), len(self._links) - 1
        for index, link in enumerate(self._links):
            where = {"stride": link.stride, "padding": link.sides, "dilation": link.dilation}
            if index == last - 1 and self._ends_in_points:
                return low_rank_conv(x, weights[index], weights[last], self.bias, **where)
            x = conv(x, weights[index], self.bias if index == last else None, **where)
        return x

    @classmethod
    def _shape_of(cls, layer: nn.Module) -> Shape:
        conv = cast(nn.Conv2d, layer)  # any of the three: they have the same fields
        _check_groups(cls.__name__, conv.groups)
        padding = conv.padding if isinstance(conv.padding, str) else tuple(conv.padding)
        # as tuples: a subclass may hold them as lists
        return Shape(
            conv.in_channels,
            conv.out_channels,
            tuple(conv.kernel_size),
            tuple(conv.stride),
            padding,
            tuple(conv.dilation),
        )

    @classmethod
    def _like(cls, layer: nn.Module, scheme: str, ranks: Sequence[int], *, low_rank: int, bias: bool) -> Self:
        new, conv = cls._bare(), cast(nn.Conv2d, layer)
        new._build(
            cls._shape_of(conv),
            conv.padding_mode,
            scheme,
            ranks,
            low_rank=low_rank,
            bias=bias,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        return new

    def _dense(self, dense_class: Callable[..., Any]) -> Any:
        sizes = (self.kernel_size, self.stride, self.padding, self.dilation, 1, self.bias is not None)
        return self._fill(dense_class(self.in_channels, self.out_channels, *sizes, self.padding_mode, device="meta"))

    def _geometry(self) -> dict[str, Any]:
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": list(self.kernel_size),
            "stride": list(self.stride),
            "padding": self.padding if isinstance(self.padding, str) else list(self.padding),
            "dilation": list(self.dilation),
            "padding_mode": self.padding_mode,
            "scheme": self.scheme,
        }

    def config(self) -> dict[str, Any]:
        return {**self._geometry(), **super().config()}

    @classmethod
    def _read_geometry(cls, read: Config) -> tuple[Shape, str]:
        """The shape that a config describes, and its padding mode."""
        dims, in_words = cls.DIMS, isinstance(read.data["padding"], str)
        shape = Shape(
            read.integer("in_channels"),
            read.integer("out_channels"),
            read.integers("kernel_size", dims),
            read.integers("stride", dims),
            read.word("padding", PADDING_WORDS) if in_words else read.integers("padding", dims, low=0),
            read.integers("dilation", dims),
        )
        return shape, read.word("padding_mode", PADDING_MODES)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        read = Config(cls.__name__, config, CONFIG_KEYS)
        shape, mode = cls._read_geometry(read)
        scheme = read.word("scheme", chains.CONV_SCHEMES)
        ranks = read.integers("ranks", 2 if scheme == "tucker2" else 1, high=MAX_SIZE)
        read.check_numbers(sum(link.params for link in chains.links(scheme, shape, ranks)))
        new, low_rank = cls._bare(), read.integer("low_rank")
        bias, dtype = read.flag("bias"), read.dtype()
        new._build(shape, mode, scheme, ranks, low_rank=low_rank, bias=bias, dtype=dtype)
        return new._read_active_terms(read)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        parts += [f"padding={self.padding!r}"] if self.padding != (0,) * self.DIMS else []
        parts += [f"dilation={self.dilation}"] if self.dilation != (1,) * self.DIMS else []
        parts += [f"padding_mode={self.padding_mode!r}"] if self.padding_mode != "zeros" else []
        return ", ".join([*parts, f"scheme={self.scheme!r}", self._describe_terms()])


class SKConv1d(SketchedConv):
    """nn.Conv1d as a chain of smaller convolutions; the arguments and what they mean are SketchedConv's."""

    DENSE = nn.Conv1d
    DIMS = 1
    CONVOLVE = staticmethod(F.conv1d)

    def to_dense(self) -> nn.Conv1d:
        """The nn.Conv1d that computes the same (with the active terms), up to rounding."""
        return cast(nn.Conv1d, self._dense(nn.Conv1d))


class SKConv2d(SketchedConv):
    """nn.Conv2d as a chain of smaller convolutions; the arguments and what they mean are SketchedConv's."""

    DENSE = nn.Conv2d
    DIMS = 2
    CONVOLVE = staticmethod(F.conv2d)

    def to_dense(self) -> nn.Conv2d:
        """The nn.Conv2d that computes the same (with the active terms), up to rounding."""
        return cast(nn.Conv2d, self._dense(nn.Conv2d))


class SKConv3d(SketchedConv):
    """nn.Conv3d as a chain of smaller convolutions; the arguments and what they mean are SketchedConv's."""

    DENSE = nn.Conv3d
    DIMS = 3
    CONVOLVE = staticmethod(F.conv3d)

    def to_dense(self) -> nn.Conv3d:
        """The nn.Conv3d that computes the same (with the active terms), up to rounding."""
        return cast(nn.Conv3d, self._dense(nn.Conv3d))


def _check_groups(owner: str, groups: int) -> None:
    if groups != 1:
        raise ValueError(f"{owner}(groups={groups}): only groups=1 can be sketched; keep the dense layer for others")


def _is_of_single_places(link: Link) -> bool:
    """Whether a link reads each place of its input alone, and each once."""
    return all(size == 1 for size in link.kernel_size + link.stride) and not any(link.sides)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, link: Link) -> Tensor:
    """One link of a chain, in the faster kernel."""
    return conv(x, weight, bias, stride=link.stride, padding=link.sides, dilation=link.dilation)
