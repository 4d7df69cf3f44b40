"""A convolution as a chain of smaller ones: which link does what, and what the chain costs. No torch in here.

A scheme says where the rank sits between two (Tucker-2: three) links:

    output_channel   k x k to r channels, then 1 x 1 to the outputs
    input_channel    1 x 1 to r channels, then k x k to the outputs
    spatial          kh x 1 to r channels, then 1 x kw to the outputs (2-d only)
    tucker2          1 x 1 to r1, k x k to r2, 1 x 1 to the outputs

A linear layer has the one scheme "linear": in to r, then r to out. Only the last link has a bias.

A packing says how the links are stored. "two_gemm" stores them whole. "pivoted" picks r rows of a last 1 x 1 link (or
r columns of a first one) and multiplies them into its neighbour; what is left of that link is the identity at those
rows, which is not stored, and the coefficients of the others. It computes the same from r * (in + out - r) numbers.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from panther.spec import Cost, Grid, LayerSpec

LINEAR = "linear"
CONV_SCHEMES = ("output_channel", "input_channel", "spatial", "tucker2")
CHANNELS = "channels"  # not a chain: two neighbours with fewer channels between them (panther.channels)

WHOLE, CORRECTED = "whole", "corrected"  # a quantised dense weight, alone or with a chain for its error

TWO_GEMM, PIVOTED = PACKINGS = ("two_gemm", "pivoted")
QUANTISED = "quantised"  # whole numbers with scales (panther.nn.quantised)
ROWS, COLUMNS = "rows", "columns"

# Where a scheme has a 1 x 1 link whose rows (the last) or columns (the first) can be pivots. A linear layer may have
# either, not both.
PIVOTS: dict[str, tuple[str, ...]] = {
    LINEAR: (ROWS,),
    "output_channel": (ROWS,),
    "input_channel": (COLUMNS,),
    "spatial": (),
    "tucker2": (COLUMNS, ROWS),
}
INDEX_BYTES = 4  # of one place in an order of channels


class Geometry(Protocol):
    """What a chain must know of a dense layer; LayerSpec and the sketched layers both have it."""

    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def kernel_size(self) -> tuple[int, ...]: ...
    @property
    def stride(self) -> tuple[int, ...]: ...
    @property
    def padding(self) -> tuple[int, ...] | str: ...
    @property
    def dilation(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Link:
    """One convolution of a chain; for a linear layer the tuples are empty."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    sides: tuple[int, ...] = field(init=False, repr=False, compare=False)  # padded before all axes, then after all

    def __post_init__(self) -> None:
        amounts = pad_amounts(self)
        object.__setattr__(self, "sides", (*amounts[-2::-2], *amounts[::-2]))

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels, *self.kernel_size)

    @property
    def params(self) -> int:
        return math.prod(self.weight_shape)


def pad_amounts(layer: Geometry | Link) -> tuple[int, ...]:
    """What F.pad must add for a padding: before and after each axis, last axis first."""
    if layer.padding == "valid":
        pairs = [(0, 0)] * len(layer.kernel_size)
    elif layer.padding == "same":
        spans = [step * (size - 1) for step, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        pairs = [(span // 2, span - span // 2) for span in spans]
    else:
        pairs = [(int(amount), int(amount)) for amount in layer.padding]
    return tuple(amount for pair in reversed(pairs) for amount in pair)


def _pointwise(in_channels: int, out_channels: int, dims: int) -> Link:
    return Link(in_channels, out_channels, (1,) * dims, (1,) * dims, (0,) * dims, (1,) * dims)


def _along(layer: Geometry, axis: int, in_channels: int, out_channels: int) -> Link:
    """The part of a convolution that works along one axis only."""

    def only(values: tuple[int, ...], other: int) -> tuple[int, ...]:
        return tuple(value if i == axis else other for i, value in enumerate(values))

    padding = layer.padding if isinstance(layer.padding, str) else only(layer.padding, 0)
    return Link(
        in_channels, out_channels, only(layer.kernel_size, 1), only(layer.stride, 1), padding, only(layer.dilation, 1)
    )


def links(scheme: str, layer: Geometry, ranks: Sequence[int]) -> tuple[Link, ...]:
    """The chain that a scheme makes of a layer at the given ranks (two for "tucker2", else one).

    Raises: ValueError when the scheme does not exist or does not apply to this layer.
    """
    dims, inputs, outputs = len(layer.kernel_size), layer.in_features, layer.out_features
    if scheme == LINEAR and not dims:
        return (Link(inputs, ranks[0]), Link(ranks[0], outputs))
    if not dims or scheme not in CONV_SCHEMES or (scheme == "spatial" and dims != 2):
        kind = f"{dims}-d convolution" if dims else "linear layer"
        raise ValueError(f"no scheme {scheme!r} for a {kind}; schemes: {', '.join((LINEAR, *CONV_SCHEMES))}")

    def full(in_channels: int, out_channels: int) -> Link:
        return Link(in_channels, out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation)

    first = ranks[0]
    if scheme == "output_channel":
        return (full(inputs, first), _pointwise(first, outputs, dims))
    if scheme == "input_channel":
        return (_pointwise(inputs, first, dims), full(first, outputs))
    if scheme == "spatial":
        return (_along(layer, 0, inputs, first), _along(layer, 1, first, outputs))
    last = ranks[1]
    return (_pointwise(inputs, first, dims), full(first, last), _pointwise(last, outputs, dims))


def stored_links(scheme: str, layer: Geometry, ranks: Sequence[int]) -> tuple[Link, ...]:
    """The weights of a quantised layer: of a chain its links, else the dense one, before the chain that corrects it.

    Raises: ValueError as `links`, and for the correction of a convolution.
    """
    if scheme not in (WHOLE, CORRECTED):
        return links(scheme, layer, ranks)
    sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    whole = Link(layer.in_features, layer.out_features, *sizes)
    return (whole,) if scheme == WHOLE else (whole, *links(LINEAR, layer, ranks))


def stored_names(scheme: str) -> tuple[str, ...]:
    """What the weights of a sketched layer are called in a file."""
    links = ("down", "core", "up") if scheme == "tucker2" else ("down", "up")
    return {WHOLE: ("whole",), CORRECTED: ("whole", *links)}.get(scheme, links)


def pivoted(chain: Sequence[Link], sides: Sequence[str]) -> tuple[Link, ...]:
    """The same chain without the identity in its last link (side "rows") or in its first ("columns").

    Raises: ValueError when a link has fewer rows or columns than pivots are asked for.
    """
    first, *middle, last = chain
    if COLUMNS in sides:
        first = replace(first, in_channels=first.in_channels - first.out_channels)
    if ROWS in sides:
        last = replace(last, out_channels=last.out_channels - last.in_channels)
    if first.in_channels < 0 or last.out_channels < 0:
        what, size = ("inputs", chain[0].in_channels) if first.in_channels < 0 else ("outputs", chain[-1].out_channels)
        raise ValueError(f"rank {max(link.out_channels for link in chain[:-1])} has no pivots among {size} {what}")
    return (first, *middle, last)


def packings_for(scheme: str) -> tuple[str, ...]:
    return PACKINGS if PIVOTS[scheme] else (TWO_GEMM,)


def schemes_for(spec: LayerSpec) -> tuple[str, ...]:
    """The schemes worth trying: those whose links are all smaller than the layer itself."""
    if not spec.kernel_size:
        return (LINEAR,)
    if math.prod(spec.kernel_size) == 1:
        return ("output_channel",)
    if len(spec.kernel_size) == 2 and 1 not in spec.kernel_size:
        return CONV_SCHEMES
    return tuple(scheme for scheme in CONV_SCHEMES if scheme != "spatial")


def _positions(spec: LayerSpec, scheme: str) -> tuple[int, ...]:
    """How many positions each link is applied to, in one run of the example inputs."""
    outputs = spec.rows
    if not spec.kernel_size or scheme == "output_channel":
        return (outputs, outputs)
    sizes_in, sizes_out = spec.input_shape[2:], spec.output_shape[2:]
    per_output = outputs / max(1, math.prod(sizes_out))  # batch x calls
    inputs = round(per_output * math.prod(sizes_in))
    if scheme == "input_channel":
        return (inputs, outputs)
    if scheme == "spatial":
        return (round(per_output * sizes_out[0] * sizes_in[1]), outputs)
    return (inputs, outputs, outputs)


def chain_cost(
    scheme: str, spec: LayerSpec, ranks: Sequence[int], bytes_per_number: int, packing: str = TWO_GEMM
) -> Cost:
    """Numbers, operations and bytes of a layer's weights once they are a chain at these ranks.

    A pivoted chain counts the places of its channels among the numbers; a neighbour may yet take them over.
    """
    chain, places = links(scheme, spec, ranks), 0
    if packing == PIVOTED:
        chain, places = pivoted(chain, PIVOTS[scheme]), _places(scheme, spec)
    weights = sum(link.params for link in chain)
    flops = sum(2 * n * link.params for n, link in zip(_positions(spec, scheme), chain, strict=True))
    return Cost(weights + places, flops, weights * bytes_per_number + places * INDEX_BYTES)


def quantised_cost(
    scheme: str, spec: LayerSpec, ranks: Sequence[int], grids: Sequence[Grid], packing: str = QUANTISED
) -> Cost:
    """Weights, operations and bytes in a file of a layer whose weights are on these grids; scales are bytes only.

    packing: "pivoted" for a chain without its identity, which counts the places of its channels as `chain_cost` does.
    """
    if packing == PIVOTED:
        stored, places = pivoted(links(scheme, spec, ranks), PIVOTS[scheme]), _places(scheme, spec, PIVOTS[scheme])
        flops = chain_cost(scheme, spec, ranks, 0, PIVOTED).flops
        held = _size_bytes(stored, grids) + places * INDEX_BYTES
        return Cost(sum(link.params for link in stored) + places, flops, held)
    stored = stored_links(scheme, spec, ranks)
    held = _size_bytes(stored, grids)
    flops = spec.flops if scheme in (WHOLE, CORRECTED) else 0
    if scheme != WHOLE:
        flops += chain_cost(LINEAR if scheme == CORRECTED else scheme, spec, ranks, 1).flops
    return Cost(sum(link.params for link in stored), flops, held)


def _size_bytes(stored: Sequence[Link], grids: Sequence[Grid]) -> int:
    return sum(
        grid.size_bytes(link.out_channels, link.params // link.out_channels)
        for link, grid in zip(stored, grids, strict=True)
        if link.params
    )


def grids_for(scheme: str, grid: Grid, links: int) -> tuple[Grid, ...]:
    """The grid of each stored weight: a correction has eight bits, whatever it corrects."""
    return (grid,) * links if scheme != CORRECTED else (grid, *(Grid(8),) * (links - 1))


def _places(scheme: str, spec: LayerSpec, sides: Sequence[str] = ()) -> int:
    """Numbers in the orders of channels that a pivoted chain stores.

    sides: where its pivots are; a linear layer of floats has them on its smaller side.
    """
    if scheme == LINEAR and not sides:
        return min(spec.in_features, spec.out_features)
    channels = {ROWS: spec.out_features, COLUMNS: spec.in_features}
    return sum(channels[side] for side in sides or PIVOTS[scheme])


def dense_cost(spec: LayerSpec, bytes_per_number: int) -> Cost:
    return Cost(spec.params, spec.flops, spec.params * bytes_per_number)


def break_even(scheme: str, spec: LayerSpec) -> float:
    """The rank at which a two-link chain stores as many numbers as the dense weight."""
    return spec.params / sum(link.params for link in links(scheme, spec, (1, 1)))


def smallest_params(scheme: str, spec: LayerSpec, ranks: Sequence[int]) -> int:
    """The fewest numbers in which any packing stores a chain."""
    return min(chain_cost(scheme, spec, ranks, 1, packing).params for packing in packings_for(scheme))


def rank_limit(scheme: str, spec: LayerSpec) -> int:
    """The first rank at which no packing of a two-link chain is smaller than the dense weight."""
    full = min(link.params for link in links(scheme, spec, (1,)))
    return 1 + bisect_left(range(1, full + 1), spec.params, key=lambda r: smallest_params(scheme, spec, (r,)))


def rank_step(spec: LayerSpec) -> int:
    """Ranks are multiples of this: 8 suits CPU vector units; a layer too small for two steps of 8 takes single ones."""
    best = max(break_even(scheme, spec) for scheme in schemes_for(spec) if scheme != "tucker2")
    return 8 if best >= 16 else 1


def no_rank_pays(spec: LayerSpec) -> str | None:
    """Why not even rank 1 would make this layer smaller, or None."""
    best = max(break_even(scheme, spec) for scheme in schemes_for(spec) if scheme != "tucker2")
    return None if best > 1 else f"no rank pays: break-even is rank {best:.2f}"
