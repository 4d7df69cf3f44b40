"""Layers and what calibration saw of them in, Factors out: decomposed once, sliced at any rank.

Every scheme of panther.chains has one function here. It keeps bases of the smaller side and multiplies them with the
dense weight when a rank is asked for: about two float32 copies of a square linear layer, less of any other.
Notation: m outputs, c input channels, k kernel positions; W (m, c, *kernel) is the weight.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from functools import cached_property

import torch
from torch import Tensor, nn

from panther import chains
from panther.chains import CHANNELS
from panther.columns import channels_of
from panther.factors import Decomposed, Factors, Profile, Rounding, convolve, dense_weight, mean_patch, on_grid
from panther.nn.factor import compose
from panther.nn.pivoted import Pivots
from panther.products import fast_layers
from panther.quantise import MOST_FEATURES, RIDGE, Rounded, in_data_norm, incoherent, losses_of
from panther.sketches import SENSITIVITY_RIDGE, SKETCHES, LowRank, Moments, Seen, with_ridge
from panther.spec import BITS, DTYPES, Choice, Cost, Grid, LayerSpec, Pair

EXACT_UP_TO = 2048  # larger layers take the randomised sketch; an exact one of 4096 needs minutes on two cores
PREDICTABLE = 1e-3  # a predicted error below this is mostly the ridge of the covariance, also where nothing is lost
PROBED_RANKS = 5  # ranks a scheme at which a convolution's error is measured; those between are interpolated


def decompose(
    module: nn.Module,
    spec: LayerSpec,
    profile: Profile | None,
    *,
    sketch: str = "auto",
    seed: int = 0,
    pair: Pair | None = None,
    grids: Sequence[Grid] = (),
    rounds_by_data: bool = True,
) -> Factors:
    """Every scheme of one layer at every useful rank.

    sketch: a name of panther.sketches.SKETCHES, or "auto": exact up to EXACT_UP_TO features, randomised above;
    without a profile both see the weight only.
    pair: with its neighbour, where the channels between them may become fewer; the profile needs moments of the inputs.
    grids: on which its weights may be stored, whose errors are predicted; rounds_by_data: for numbers that are rounded
    in the norm of the data, as healing does it, else for each to the nearest.

    Raises: ValueError when the weight holds NaN or infinite values.
    """
    weight = dense_weight(module)
    refuse_non_finite(weight, spec.name)
    known = profile if profile is not None and profile.rows > 0 else Profile(0)
    decomposer = _Decomposer(spec, weight.float().cpu(), known.seen, sketch, seed)
    schemes = {scheme: _SCHEMES[scheme](decomposer) for scheme in chains.schemes_for(spec)}
    if pair is not None and known.seen.inputs is None:
        pair = None
    factors = Factors(spec, module, schemes, known, pair, rounds_by_data=rounds_by_data)
    if pair is not None and known.seen.inputs is not None:
        if pair.consumer == spec.name:
            schemes[CHANNELS] = channels_of(decomposer.weight, known.seen.inputs, known.seen.sensitivity)
        else:
            factors = changed(factors, inputs=_in_single_precision(known.seen.inputs))
    mean = known.mean
    if known.samples is not None:
        factors = _with_measured_errors(factors)
        mean = mean_patch(spec, module, known.samples)
    if grids:
        numbers = _numbers(factors, grids)
        factors = changed(factors, rounding=_roundings(factors, grids, numbers), numbers=numbers)
    # Samples and other covariances are not needed again; the sensitivity is, by the refit: half the digits will do.
    kept = None if known.seen.sensitivity is None else known.seen.sensitivity.bfloat16()
    return changed(factors, profile=Profile(known.rows, Seen(sensitivity=kept), mean))


def _in_single_precision(moments: Moments) -> Moments:
    return changed(moments, covariance=moments.covariance.float())


def refuse_non_finite(weight: Tensor, name: str) -> None:
    if not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise ValueError(
            f"the weight of layer {name!r} holds {bad} values that are NaN or infinite: the checkpoint is damaged or "
            f"the training diverged. Reload it, or leave the layer alone with exclude=[{name!r}]."
        )


@dataclass(frozen=True)
class _Decomposer:
    """What every scheme needs: the weight, what is known of its data, and how to sketch a matrix."""

    spec: LayerSpec
    weight: Tensor
    seen: Seen
    sketch: str
    seed: int

    def low_rank(self, matrix: Tensor, seen: Seen, max_rank: int) -> LowRank:
        size = matrix.shape[0] if seen.outputs is not None else min(matrix.shape)
        name = ("whitened" if size <= EXACT_UP_TO else "randomised") if self.sketch == "auto" else self.sketch
        if name == "randomised":  # of most directions it would cost more than the exact one
            max_rank = min(max_rank, max(size // 2, matrix.numel() // sum(matrix.shape)))
        generator = torch.Generator().manual_seed(self.seed)  # one a matrix: the order of layers does not matter
        return SKETCHES[name](matrix, seen, max_rank=max(1, max_rank), generator=generator)

    def useful(self, scheme: str) -> list[int]:
        """The multiples of the step at which some packing is smaller, and powers of two below the first of them.

        The small ranks serve very small budgets only.
        """
        step, end = chains.rank_step(self.spec), chains.rank_limit(scheme, self.spec)
        small = [rank for rank in (1, 2, 4) if rank < min(step, end)]
        return [*small, *range(step, end, step)]

    def outputs_only(self) -> Seen:
        return Seen(outputs=self.seen.outputs, sensitivity=self.seen.sensitivity)

    def inputs_of(self, matrix: Tensor, repeats: int = 1) -> Seen:
        """What is known of the columns of a (m * taps, c * repeats) matrix.

        Taps of one output are equally sensitive, and repeats of one channel are taken as uncorrelated.
        """
        known, taps = self.seen.inputs, matrix.shape[0] // self.spec.out_features
        if known is not None and repeats > 1:
            covariance = torch.kron(known.covariance, torch.eye(repeats, dtype=torch.float64))
            known = Moments(known.rows, known.mean.repeat_interleave(repeats), covariance)
        sensitivity = self.seen.sensitivity
        if sensitivity is None or matrix.shape[0] <= matrix.shape[1]:
            return Seen(inputs=known)
        split = matrix.double().reshape(self.spec.out_features, taps, -1)
        weighted = torch.einsum("op,pkn->okn", sensitivity, split)
        return Seen(inputs=known, sensitivity=split.flatten(0, 1).T @ weighted.flatten(0, 1))


def _nested(scheme: str, links: _Links, ranks: list[int], low: LowRank) -> Decomposed:
    kept = [r for r in ranks if r <= low.max_rank]
    return Decomposed(scheme, links, tuple((r,) for r in kept), tuple(float(low.errors[r]) for r in kept))


# --- one function a scheme -----------------------------------------------------------------------------------------

_Links = Callable[[Tensor, Sequence[int]], tuple[Tensor, ...]]


def _linear(of: _Decomposer) -> Decomposed:
    ranks = of.useful(chains.LINEAR)
    low = of.low_rank(of.weight, of.seen, max(ranks, default=1))

    def links(dense: Tensor, rank: Sequence[int]) -> tuple[Tensor, ...]:
        up, down = low.slice(dense, rank[0])
        return down, up

    return _nested(chains.LINEAR, links, ranks, low)


def _output_channel(of: _Decomposer) -> Decomposed:
    ranks = of.useful("output_channel")
    matrix, seen = of.weight.flatten(1), of.outputs_only()
    if of.seen.outputs is None and of.seen.inputs is not None and math.prod(of.spec.kernel_size) == 1:
        seen = of.seen if matrix.shape[0] <= matrix.shape[1] else of.inputs_of(matrix)
    low = of.low_rank(matrix, seen, max(ranks, default=1))

    def links(dense: Tensor, rank: Sequence[int]) -> tuple[Tensor, ...]:
        up, down = low.slice(dense.flatten(1), rank[0])
        ones = (1,) * (dense.dim() - 2)
        return down.reshape(rank[0], *dense.shape[1:]), up.reshape(*up.shape, *ones)

    return _nested("output_channel", links, ranks, low)


def _channel_matrix(weight: Tensor) -> Tensor:
    """W as (m * k, c): one row for each output and kernel position."""
    return weight.flatten(2).transpose(1, 2).reshape(-1, weight.shape[1])


def _input_channel(of: _Decomposer) -> Decomposed:
    ranks = of.useful("input_channel")
    matrix = _channel_matrix(of.weight)
    low = of.low_rank(matrix, of.inputs_of(matrix), max(ranks, default=1))

    def links(dense: Tensor, rank: Sequence[int]) -> tuple[Tensor, ...]:
        m, r, kernel = dense.shape[0], rank[0], dense.shape[2:]
        up, down = low.slice(_channel_matrix(dense), r)
        last = up.reshape(m, -1, r).transpose(1, 2).reshape(m, r, *kernel)
        return down.reshape(r, -1, *(1,) * len(kernel)), last.contiguous()

    return _nested("input_channel", links, ranks, low)


def _spatial_matrix(weight: Tensor) -> Tensor:
    """W (m, c, kh, kw) as (m * kw, c * kh)."""
    return weight.permute(0, 3, 1, 2).reshape(weight.shape[0] * weight.shape[3], -1)


def _spatial(of: _Decomposer) -> Decomposed:
    ranks = of.useful("spatial")
    matrix = _spatial_matrix(of.weight)
    low = of.low_rank(matrix, of.inputs_of(matrix, repeats=of.weight.shape[2]), max(ranks, default=1))

    def links(dense: Tensor, rank: Sequence[int]) -> tuple[Tensor, ...]:
        (m, c, kh, kw), r = dense.shape, rank[0]
        up, down = low.slice(_spatial_matrix(dense), r)
        last = up.reshape(m, kw, r).transpose(1, 2).unsqueeze(2)
        return down.reshape(r, c, kh, 1), last.contiguous()

    return _nested("spatial", links, ranks, low)


def _tucker2(of: _Decomposer) -> Decomposed:
    """Both bases once, each in the norm of its own side; the core between them is the dense weight seen through both.

    Alternating between them in the norm of channel covariance and sensitivity loses more, since their product knows
    nothing of the correlation between neighbouring positions, and the covariance of the outputs does. Share of the
    held-out output energy lost on CREPE's conv2 to conv5 at keep .25: .0006 .072 .153 .052; after ten sweeps .0009
    .079 .184 .072. Fitting the input basis anew to the kept outputs gains nearly nothing: .0006 .070 .152 .052.
    """
    m, c = of.weight.shape[:2]
    matrix = _channel_matrix(of.weight)
    out = of.low_rank(of.weight.flatten(1), of.outputs_only(), m)
    inn = of.low_rank(matrix, of.inputs_of(matrix), c)

    def links(dense: Tensor, ranks: Sequence[int]) -> tuple[Tensor, ...]:
        first, last = ranks
        kernel, ones = dense.shape[2:], (1,) * (dense.dim() - 2)
        up, projected = out.slice(dense.flatten(1), last)  # (m, last), (last, c * k)
        core, down = inn.slice(_channel_matrix(projected.reshape(last, c, *kernel)), first)  # (last * k, first), ...
        core = core.reshape(last, -1, first).transpose(1, 2).reshape(last, first, *kernel)
        return down.reshape(first, c, *ones), core.contiguous(), up.reshape(m, last, *ones)

    def estimate(ranks: Sequence[int]) -> float:
        """The two projections lose nearly independent parts, so that what they keep multiplies."""
        first, last = ranks
        if first > inn.max_rank or last > out.max_rank:
            return math.inf
        return 1 - (1 - float(inn.errors[first])) * (1 - float(out.errors[last]))

    path = _tucker_path(of.spec, inn.max_rank, out.max_rank, estimate)
    return Decomposed("tucker2", links, tuple(path), tuple(path.values()), estimate=estimate)


def _tucker_path(
    spec: LayerSpec, most_first: int, most_last: int, estimate: Callable[[Sequence[int]], float]
) -> dict[tuple[int, ...], float]:
    """Pairs of ranks that no other pair beats in both numbers and estimated error, in rising size, with that error."""
    step = chains.rank_step(spec)
    pairs = []
    for ranks in itertools.product(_geometric(step, most_first), _geometric(step, most_last)):
        size = chains.smallest_params("tucker2", spec, ranks)
        if size < spec.params:
            pairs.append((size, estimate(ranks), ranks))
    best: dict[tuple[int, ...], float] = {}
    least = math.inf
    for _size, error, ranks in sorted(pairs):
        if error < least:
            best[ranks] = least = error
    return best


def with_pair(factors: Factors, ranks: tuple[int, ...]) -> Factors:
    """The same factors with this pair of ranks among those that tucker2 offers, if the layer can have it.

    Which pairs it offers depends on the data; whether a plan can be used again should not.
    """
    known, step = factors.schemes.get("tucker2"), chains.rank_step(factors.spec)
    is_pair = len(ranks) == 2 and all(rank > 0 and rank % step == 0 for rank in ranks)
    if known is None or known.estimate is None or not is_pair or known.estimate(ranks) == math.inf:
        return factors
    error = min(1.0, known.estimate(ranks) * _measured_share(known, known.estimate(ranks)))
    more = changed(known, ranks=(*known.ranks, ranks), errors=(*known.errors, error))
    return changed(factors, schemes={**factors.schemes, "tucker2": more})


def _measured_share(known: Decomposed, estimate: float) -> float:
    """Error by its estimate, at the ranks on offer of the nearest one."""
    if known.estimate is None:
        return 1.0
    offered = [(known.estimate(ranks), error) for ranks, error in zip(known.ranks, known.errors, strict=True)]
    nearest, error = min(offered, key=lambda pair: abs(pair[0] - estimate), default=(1.0, 1.0))
    return error / nearest if nearest > 0 else 1.0


def _geometric(step: int, top: int) -> list[int]:
    """Multiples of the step up to `top`, about 12 % apart."""
    values, value = [], step
    while value <= top:
        values.append(value)
        value = max(value + step, round(value * 1.12 / step) * step)
    return values


_SCHEMES: dict[str, Callable[[_Decomposer], Decomposed]] = {
    chains.LINEAR: _linear,
    "output_channel": _output_channel,
    "input_channel": _input_channel,
    "spatial": _spatial,
    "tucker2": _tucker2,
}

# --- errors of convolutions, measured on real inputs ---------------------------------------------------------------


def _with_measured_errors(factors: Factors) -> Factors:
    """The same factors with the errors of every scheme measured on the layer's own inputs, so that they compare."""
    weight = dense_weight(factors.module).float().cpu()
    energy = _energy(factors, weight)
    if energy <= 0:
        return factors
    schemes = {}
    for name, decomposed in factors.schemes.items():
        measured = {}
        for index in _spread(len(decomposed.ranks)):
            parts = decomposed.links(weight, decomposed.ranks[index])
            measured[index] = _energy(factors, weight - compose(parts)) / energy
        schemes[name] = changed(decomposed, errors=_interpolate(measured, decomposed.errors))
    return changed(factors, schemes=schemes)


def _energy(factors: Factors, weight: Tensor) -> float:
    """Variance of what a weight makes of the layer's samples, as far as the model's output is sensitive to it."""
    samples, sensitivity = factors.profile.samples, factors.profile.seen.sensitivity
    if samples is None:
        return 0.0
    with fast_layers():
        outputs = convolve(factors.spec, factors.module, samples, weight.contiguous()).transpose(0, 1).flatten(1)
    centred = outputs - outputs.mean(1, keepdim=True)
    if sensitivity is not None:
        centred = with_ridge(sensitivity.double(), SENSITIVITY_RIDGE).float().T @ centred
    return float(centred.square().sum())


def _spread(count: int) -> list[int]:
    """At most PROBED_RANKS indices from first to last, closer together at small ranks, where errors fall fastest."""
    if count <= PROBED_RANKS:
        return list(range(count))
    span = math.log(count)
    return sorted({round(math.exp(span * i / (PROBED_RANKS - 1))) - 1 for i in range(PROBED_RANKS)})


def _interpolate(measured: Mapping[int, float], predicted: Sequence[float]) -> tuple[float, ...]:
    """Predicted errors scaled by measured/predicted, which is interpolated between the probes; never rising."""
    points = sorted(measured)
    floor = 1e-12
    ratios = [math.log(max(measured[i], floor) / max(predicted[i], floor)) for i in points]
    errors: list[float] = []
    for index, value in enumerate(predicted):
        after = next((j for j, p in enumerate(points) if p >= index), len(points) - 1)
        before = max(0, after - 1) if points[after] != index else after
        gap = points[after] - points[before]
        share = (index - points[before]) / gap if gap else 0.0
        ahead = ratios[after] if measured[points[after]] > PREDICTABLE or share == 1 else ratios[before]
        ratio = ratios[before] + share * (ahead - ratios[before])
        error = max(value, floor) * math.exp(ratio)
        errors.append(min(error, errors[-1]) if errors else error)
    return tuple(errors)


# --- errors of whole numbers ------------------------------------------------------------------------------------------

# What is left of the error of plain rounding once the data is looked at (panther.quantise.in_data_norm). All layers of
# MiniLM, 1,024 texts, mean of both: 4 bits .0089 -> .0038, 3 bits .031 -> .013; in groups of 32 .0052 -> .0025. Of what
# rounding the links of a chain adds .45 to .6 are left.
LEFT_BY_DATA = 0.5
MOST_MULTIPLIED = 2e10  # multiply-adds of a weight rounded in the data norm: seconds
HALVES = ("bfloat16", "float16")  # dtypes of layers that bfloat16 does not make smaller
FEWEST_BITS = 4  # of pivoted chains
CORRECTIONS = (8, 16, 32, 64)  # ranks of the chains that make up for part of an error
LEAST_OF_CORRECTED = 4  # times as many features has a layer as its correction has ranks


def _numbers(factors: Factors, grids: Sequence[Grid]) -> dict[Grid, Rounded]:
    """A linear layer's weight in few bits with one scale a row, rounded in the norm of its inputs where they are known.

    It stands for what other scales do: as large a share of the error is left there.
    """
    weight, moment = dense_weight(factors.module), _moment(factors)
    is_slow = weight.numel() * weight[0].numel() > MOST_MULTIPLIED
    if moment is None or is_slow or not _looks_at_data(factors):
        return {}
    return {grid: in_data_norm(weight.float().cpu(), moment, grid) for grid in grids if _is_coarse(grid)}


def _looks_at_data(factors: Factors) -> bool:
    """Whether numbers are rounded in the norm of what the layer sees."""
    return factors.rounds_by_data and factors.profile.rows > 0 and factors.spec.fan_in <= MOST_FEATURES


def _moment(factors: Factors) -> Tensor | None:
    """Covariance of a linear layer's inputs, (in, in), float64."""
    inputs = factors.profile.seen.inputs
    return None if inputs is None or factors.spec.kind != "linear" else inputs.covariance.double().cpu()


def _roundings(factors: Factors, grids: Sequence[Grid], numbers: Mapping[Grid, Rounded]) -> dict[Grid, Rounding]:
    """What rounding a layer to each grid loses."""
    weight, found = dense_weight(factors.module).float().cpu(), dict[Grid, Rounding]()
    share = _lost_by(factors, weight)
    looks_at_data = _looks_at_data(factors)
    left_of_links = LEFT_BY_DATA if looks_at_data else 1.0
    nearest = {grid: share(on_grid(weight, grid)) for grid in grids}
    chained = [
        _Chain(d.scheme, d.links(weight, d.ranks[len(d.ranks) // 2]))
        for d in (factors.schemes.values() if grids else ())
        if d.scheme != CHANNELS and d.ranks
    ]
    left = {grid.bits: share(part.matrix()) / max(nearest[grid], 1e-30) for grid, part in numbers.items()}
    for grid in grids:
        by_data = left.get(grid.bits, min(left.values(), default=LEFT_BY_DATA)) if looks_at_data else 1.0
        whole, links = min(1.0, nearest[grid] * by_data), dict[str, float]()
        for chain in chained:
            # In units of the whole layer's output, as far as the chain's own is it.
            for packing, rounded in chain.rounded(grid).items():
                lost = share(weight - (chain.whole - rounded.to(weight)))
                links[packing] = max(links.get(packing, 0.0), lost * left_of_links)
        corrected = dict[int, float]()
        if _is_coarse(grid):
            rounded = numbers[grid].matrix() if grid in numbers else on_grid(weight, grid)
            corrected = _corrected(factors, weight, rounded, whole)
        found[grid] = Rounding(nearest[grid], whole, links, corrected, left_of_links)
    return found


class _Chain:
    """The links of a layer at one rank, ready to be rounded to several grids."""

    def __init__(self, scheme: str, links: Sequence[Tensor]) -> None:
        self.scheme, self.whole = scheme, compose(links)
        self.turned = incoherent(links[0], links[1]) if len(links) == 2 else links
        sides = chains.PIVOTS[scheme]
        is_finite = all(bool(torch.isfinite(link).all()) for link in links)
        self.links, self.sides = links, sides if is_finite else ()

    @cached_property
    def pivots(self) -> Pivots:
        return Pivots(self.links, self.sides)

    def rounded(self, grid: Grid) -> dict[str, Tensor]:
        """What the chain amounts to with each number rounded by itself, by packing."""
        found = {chains.QUANTISED: compose([on_grid(part, grid) for part in self.turned])}
        if self.sides and chains.PIVOTED in packings_in(self.scheme, grid):
            found[chains.PIVOTED] = self.pivots.rounded(lambda part: on_grid(part, grid))
        return found


def packings_in(scheme: str, grid: Grid, *, is_root: bool = False) -> tuple[str, ...]:
    """Of chains in whole numbers: pivots hand their errors on, and 3 bits have too many of them.

    is_root: the layer is the model itself, which cannot be exchanged for its pivoted form while it is healed.
    """
    has_pivots = chains.PIVOTS[scheme] and grid.bits >= FEWEST_BITS and not is_root
    return (chains.QUANTISED, chains.PIVOTED) if has_pivots else (chains.QUANTISED,)


def _is_coarse(grid: Grid) -> bool:
    """Whether its errors are worth making up for; scales of groups are the cheaper correction where there are some."""
    return grid.bits < BITS["int8"] and grid.group_size is None


def _lost_by(factors: Factors, weight: Tensor) -> Callable[[Tensor], float]:
    """How large a share of a layer's output energy a stand-in for its weight loses."""
    seen = factors.profile.seen
    if factors.profile.samples is None:
        reacts = seen.sensitivity is not None and len(seen.sensitivity) == len(weight)
        share = losses_of(weight.flatten(1), _moment(factors), seen.sensitivity if reacts else None)
        return lambda stand_in: share(stand_in.flatten(1))
    energy = _energy(factors, weight)
    return lambda stand_in: _energy(factors, weight - stand_in) / energy if energy > 0 else 0.0


def _corrected(factors: Factors, weight: Tensor, rounded: Tensor, whole: float) -> dict[int, float]:
    """Of a linear layer of few bits: what is left of its error by the rank of the chain that makes up for it."""
    ranks = [rank for rank in CORRECTIONS if LEAST_OF_CORRECTED * rank <= min(weight.shape)]
    if factors.spec.kind != "linear" or not ranks or max(weight.shape) > EXACT_UP_TO:
        return {}
    whitened = weight.double() - rounded.double()
    moment = _moment(factors)
    if moment is not None and factors.rounds_by_data:
        whitened = whitened @ with_ridge(moment, RIDGE)
    values = torch.linalg.eigvalsh(
        whitened @ whitened.T if len(whitened) <= whitened.shape[1] else whitened.T @ whitened
    )
    left = values.clamp_min(0).cumsum(0).flip(0) / values.clamp_min(0).sum().clamp_min(1e-300)
    return {rank: whole * float(left[rank]) for rank in ranks}


def candidates(
    factors: Factors,
    bytes_per_number: int,
    *,
    packings: Sequence[str] = chains.PACKINGS,
    dtypes: Sequence[str] = DTYPES,
) -> tuple[Choice, ...]:
    """Everything that a layer could become and that makes it smaller, in rising size, and last the dense layer.

    packings: which ways of storing a chain are offered, of panther.chains.PACKINGS. Calibration gives a bias to a layer
    without one, whose numbers count.
    dtypes: of panther.spec.DTYPES; those of grids are offered on the grids that the factors were made with.

    Raises: ValueError for an unknown packing.
    """
    _check_packings(packings)
    spec = factors.spec
    gained = Cost()
    if not spec.has_bias and factors.profile.rows > 0:
        gained = Cost(params=spec.out_features, size_bytes=spec.out_features * bytes_per_number)
    found = [
        Choice(
            spec.name,
            scheme,
            ranks,
            packing,
            error=error,
            cost=chains.chain_cost(scheme, spec, ranks, bytes_per_number, packing) + gained,
        )
        for scheme, decomposed in factors.schemes.items()
        if scheme != CHANNELS  # their cost is that of two layers
        for packing in packings
        if packing in chains.packings_for(scheme) and _are_floats_asked_for(spec, dtypes)
        for ranks, error in zip(decomposed.ranks, decomposed.errors, strict=True)
    ]
    cost = chains.dense_cost(spec, bytes_per_number)
    smaller = [c for c in found if c.cost.params < cost.params]
    stored = [c for c in _quantised(factors, gained, dtypes) if c.packing in (chains.QUANTISED, *packings)]
    whole_numbers = [c for c in stored if c.cost.size_bytes < cost.size_bytes]
    reason = (
        ""
        if smaller or whole_numbers or not gained.params
        else f"no rank pays: the layer would gain a bias of {gained.params:,} numbers"
    )
    dense = Choice(spec.name, packing="dense", cost=cost, reason=reason)
    return (*sorted([*smaller, *whole_numbers], key=lambda c: (c.cost.params, c.cost.size_bytes, c.error)), dense)


def _are_floats_asked_for(spec: LayerSpec, dtypes: Sequence[str]) -> bool:
    """By name, or as bfloat16 in a layer whose own numbers take no more."""
    return DTYPES[0] in dtypes or ("bfloat16" in dtypes and spec.dtype in HALVES)


def _quantised(factors: Factors, gained: Cost, dtypes: Sequence[str]) -> Iterator[Choice]:
    """The options of whole numbers: the dense weight, the same with a correction, and every chain."""
    spec = factors.spec

    def choice(
        scheme: str,
        ranks: tuple[int, ...],
        dtype: str,
        grid: Grid,
        error: float,
        more: Cost,
        packing: str = chains.QUANTISED,
    ) -> Choice:
        grids = chains.grids_for(scheme, grid, len(chains.stored_links(scheme, spec, ranks)))
        cost = chains.quantised_cost(scheme, spec, ranks, grids, packing) + more
        return Choice(
            spec.name,
            scheme,
            ranks,
            packing,
            dtype,
            min(1.0, error),
            cost,
            group_size=grid.group_size or 0,
        )

    for grid, known in factors.rounding.items():
        dtype = next(name for name, bits in BITS.items() if bits == grid.bits)
        if dtype not in dtypes or (grid.is_bfloat16 and spec.dtype in HALVES):
            continue
        # A layer without a bias keeps none: the mean error of rounding is small.
        yield choice(chains.WHOLE, (), dtype, grid, known.whole, Cost())
        for rank, error in known.corrected.items():
            yield choice(chains.CORRECTED, (rank,), dtype, grid, error, Cost())
        for scheme, decomposed in factors.schemes.items():
            for packing, added in known.links.items():
                if scheme == CHANNELS or packing not in packings_in(scheme, grid, is_root=not spec.name):
                    continue
                stored_as = chains.PIVOTED if packing == chains.PIVOTED else chains.TWO_GEMM
                for ranks, error in zip(decomposed.ranks, decomposed.errors, strict=True):
                    if chains.chain_cost(scheme, spec, ranks, 1, stored_as).params < spec.params:
                        yield choice(scheme, ranks, dtype, grid, error + added, gained, packing)


def _check_packings(packings: Sequence[str]) -> None:
    unknown = set(packings) - set(chains.PACKINGS)
    if unknown or isinstance(packings, str):
        raise ValueError(f"packings={packings!r}: expected a sequence of {', '.join(chains.PACKINGS)}")
