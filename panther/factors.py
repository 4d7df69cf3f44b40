"""The nouns that hold tensors: what calibration saw of a layer, and a layer decomposed once for every rank.

Notation: m outputs, c input channels, k kernel positions; W (m, c, *kernel) is the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panther.chains import CHANNELS, CORRECTED, PIVOTED, PIVOTS, WHOLE
from panther.nn.factor import compose
from panther.nn.pivoted import Pivots
from panther.quantise import Rounded, incoherent, to_nearest
from panther.sketches import Moments, Seen
from panther.spec import BITS, Choice, Grid, LayerSpec, Pair

_CONV: dict[str, Callable[..., Tensor]] = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}


NOTHING_SEEN = Seen()


@dataclass(frozen=True)
class Profile:
    """What calibration saw of one layer.

    seen: a linear layer's features, or a convolution's input channels, outputs and output sensitivity.
    """

    rows: int
    seen: Seen = NOTHING_SEEN
    mean: Tensor | None = None  # (in,) mean input of a linear layer, (in * kernel,) mean patch of a convolution
    samples: Tensor | None = None  # a convolution's inputs, (samples, channels, *positions)


@dataclass(frozen=True)
class Decomposed:
    """One scheme of one layer: slice it into link weights at any of its ranks."""

    scheme: str
    links: Callable[[Tensor, Sequence[int]], tuple[Tensor, ...]]  # dense weight, ranks -> link weights
    ranks: tuple[tuple[int, ...], ...]  # what is offered, in rising cost
    errors: tuple[float, ...]  # share of the output energy lost at each of them
    # The same at any ranks before it is measured, infinite where there are no links; None where all ranks are offered.
    estimate: Callable[[Sequence[int]], float] | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Rounding:
    """Shares of a layer's output energy that are lost on one grid, predicted.

    nearest: with every number of the weight rounded by itself. whole: with the data looked at. links: what rounding its
    links adds to the loss of a chain, by packing. corrected: by the rank of the chain that makes up for the error.
    """

    nearest: float
    whole: float
    links: Mapping[str, float]
    corrected: Mapping[int, float]
    left: float = 1.0  # what looking at the data leaves of the error of links with every number rounded by itself


@dataclass(frozen=True)
class Factors:
    """One layer, decomposed once for every scheme that applies to it."""

    spec: LayerSpec
    module: nn.Module  # the dense layer: its weight is read when a rank is sliced, never copied
    schemes: Mapping[str, Decomposed]
    profile: Profile
    pair: Pair | None = None  # with its neighbour, where the channels between them may become fewer
    inputs: Moments | None = None  # of the first layer of such a pair
    kept: Tensor | None = None  # of a layer with fewer channels: which of the dense layer's, along `axis` of its weight
    axis: int = 0
    narrow: dict[int, Factors] = field(default_factory=dict)  # the layer with so many channels, as far as was asked for
    rounding: Mapping[Grid, Rounding] = field(default_factory=dict)  # of the grids that its weights may be stored on
    numbers: Mapping[Grid, Rounded] = field(default_factory=dict)  # of the dense weight, rounded in the data norm
    rounds_by_data: bool = True  # whether numbers are going to be rounded in the norm of the data

    def at(self, choice: Choice) -> Factors:
        """The layer that a choice is of: this one, or with fewer channels."""
        return self.narrow[choice.channels] if choice.channels and self.kept is None else self

    def slice(self, choice: Choice) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Link weights and the corrected bias (None where nothing is known and the layer has none), float32.

        Of the layer with the choice's channels, which is asked for by `at`.

        The bias makes the mean output of the chain on the calibration data that of the dense layer.
        """
        weight = dense_weight(self.module).float().cpu()
        parts = self.schemes[choice.scheme].links(weight, choice.ranks)
        own: Tensor | None = getattr(self.module, "bias", None)
        bias = None if own is None else own.detach().float().cpu()
        shift = self._mean_shift(weight, parts)
        if shift is None:
            return parts, bias
        return parts, shift if bias is None else bias + shift

    def dense_equivalent(self, choice: Choice) -> tuple[Tensor, Tensor | None]:
        """The dense weight and bias that a choice amounts to, in the layer's dtype.

        Channels that are left out keep what gives them, and nothing reads them.
        """
        known, weight = self.at(choice), dense_weight(self.module)
        own: Tensor | None = getattr(known.module, "bias", None)
        if choice.scheme in (CHANNELS, WHOLE, CORRECTED):
            whole, bias = known._rounded_whole(choice), None if own is None else own.detach()
        else:
            parts, bias = known.slice(choice)
            left = 1.0 if choice.grid is None else known.rounding[choice.grid].left
            whole = _composed(parts, choice, left)
        whole, bias = whole.to(weight), None if bias is None else bias.to(weight)
        if known.kept is None:
            return whole, bias
        kept = known.kept.to(weight.device)
        if known.axis == 1:
            return torch.zeros_like(weight).index_copy(1, kept, whole), bias
        given: Tensor | None = getattr(self.module, "bias", None)
        if bias is not None and given is None:
            given = bias.new_zeros(len(weight))
        every = None if bias is None or given is None else given.detach().index_copy(0, kept, bias)
        return weight.index_copy(0, kept, whole), every

    def _rounded_whole(self, choice: Choice) -> Tensor:
        """The dense weight with the error that a choice is expected to leave."""
        weight = dense_weight(self.module)
        if choice.grid is None:
            return weight
        known, wide = self.rounding[choice.grid], weight.float().cpu()
        left = known.whole if choice.scheme == WHOLE else known.corrected[choice.ranks[0]]
        bits = choice.grid.bits
        alike = min(self.numbers, key=lambda grid: abs(grid.bits - bits), default=None)
        if alike is None:
            rounded, lost = on_grid(wide, choice.grid), known.nearest
        else:  # errors of other grids point the same way
            rounded, lost = self.numbers[alike].matrix(), self.rounding[alike].whole
        return wide.lerp(rounded, min(1.0, math.sqrt(left / lost)) if lost > 0 else 1.0)

    def _mean_shift(self, weight: Tensor, parts: tuple[Tensor, ...]) -> Tensor | None:
        """Mean of (dense - chain), (m,), without biases."""
        if self.profile.mean is None:
            return None
        mean = self.profile.mean.float()
        if self.spec.kind == "linear":
            return weight @ mean - parts[1] @ (parts[0] @ mean)
        return (weight - compose(parts)).flatten(1) @ mean


def _composed(parts: Sequence[Tensor], choice: Choice, left: float) -> Tensor:
    """The weight that a chain amounts to as a choice stores it; left: what stays of the energy of its rounding."""
    grid = choice.grid
    if grid is None:
        return compose(parts)
    if grid.bits >= BITS["int8"]:  # with so many neither the basis nor pivots make a difference
        return compose([on_grid(part, grid) for part in parts])
    if choice.packing == PIVOTED:
        rounded = Pivots(parts, PIVOTS[choice.scheme]).rounded(lambda part: on_grid(part, grid))
    else:
        turned = incoherent(parts[0], parts[1]) if len(parts) == 2 else parts
        rounded = compose([on_grid(part, grid) for part in turned])
    return compose(parts).to(rounded).lerp(rounded, math.sqrt(left))


def on_grid(weight: Tensor, grid: Grid) -> Tensor:
    """A weight with every number rounded by itself, (m, ...) float32."""
    return to_nearest(weight.flatten(1), grid).matrix().reshape(weight.shape)


def dense_weight(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight).detach()


def convolve(spec: LayerSpec, module: Any, samples: Tensor, weight: Tensor) -> Tensor:
    """The convolution of a layer with another weight and no bias, in float32 on the CPU."""
    given = samples.float()
    padding = module.padding
    if spec.padding_mode != "zeros":
        given = F.pad(given, module._reversed_padding_repeated_twice, mode=spec.padding_mode)
        padding = 0
    return _CONV[spec.kind](given, weight, None, module.stride, padding, module.dilation, module.groups)


def mean_patch(spec: LayerSpec, module: Any, samples: Tensor) -> Tensor:
    """The mean of what a convolution's kernel lies on, padding included: (in * kernel,).

    The mean output is linear in the weight, so it is the gradient of one output channel's mean.
    """
    probe = torch.zeros(1, spec.in_features, *spec.kernel_size, dtype=torch.float32, requires_grad=True)
    with torch.enable_grad():
        mean = convolve(spec, module, samples, probe).mean()
    return torch.autograd.grad(mean, probe)[0].flatten()
