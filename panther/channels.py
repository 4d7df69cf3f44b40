"""Fewer hidden channels between two layers: the structure that a product of two low-rank layers cannot have.

Where a layer's outputs reach one other layer only, channel by channel, a channel can be left out of both. The second
layer is solved again for what is left (panther.columns). Both are then layers like any other, only smaller, and ranks
are chosen for them as for the rest: the two ways together lose less than either alone. MiniLM at half the FLOPs,
unhealed, loss of the answers: ranks alone .326, channels alone .277, both .250.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any, cast

import torch
from torch import Tensor, nn

from panther.allocators.base import convex, total
from panther.allocators.sensitivity import on_one_grid
from panther.batches import Call, float_outputs, inference, run, squared_error
from panther.chains import CHANNELS
from panther.columns import STEP, Columns
from panther.decompose import candidates, decompose
from panther.errors import PlanError
from panther.factors import Factors, Profile
from panther.importance import Importance
from panther.nn.narrow import narrowed, sizes_of
from panther.nn.surgery import with_layers
from panther.progress import Progress
from panther.sketches import Moments, Seen
from panther.spec import DTYPES, Choice, Cost, LayerSpec, Pair, Plan, Target

MOST_CHANNELS = 4096  # and inputs of the first layer: the covariance of more costs more than it gives
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)  # of the weights of all pairs, that channels may leave before ranks are chosen
ALIKE, ALIKE_HALF = 1e-6, 1e-3  # of the variance of answers: what rounding makes, of half-precision numbers the second
LEAST = 0.3  # of a pair's channels stay: importance is measured on one layer at a time


def narrowable(specs: Sequence[LayerSpec], followers: Sequence[Pair]) -> dict[str, Pair]:
    """Pairs between which there may be fewer channels, by the name of either layer; each is in one, the largest."""
    known = {spec.name: spec for spec in specs}
    fits = [pair for pair in followers if {pair.producer, pair.consumer} <= set(known)]
    fits = [pair for pair in fits if _can_be_narrowed(known[pair.producer], known[pair.consumer])]
    found: dict[str, Pair] = {}
    for pair in sorted(fits, key=lambda pair: -sum(known[name].params for name in (pair.producer, pair.consumer))):
        if pair.producer not in found and pair.consumer not in found:
            found |= {pair.producer: pair, pair.consumer: pair}
    return found


def _can_be_narrowed(producer: LayerSpec, consumer: LayerSpec) -> bool:
    """Whether both layers multiply one matrix with every position, and there are enough channels between them."""
    sizes = (producer.in_features, consumer.in_features)
    return all(map(_is_pointwise, (producer, consumer))) and sizes[1] >= 2 * STEP and max(sizes) <= MOST_CHANNELS


def _is_pointwise(spec: LayerSpec) -> bool:
    return math.prod(spec.kernel_size) == 1 and (spec.padding == "valid" or not any(spec.padding))


@torch.no_grad()
def counted_by_nobody(model: nn.Module, pairs: Mapping[str, Pair], call: Call) -> dict[str, Pair]:
    """The pairs with half of whose channels the model answers as it does where the second layer ignores the others.

    It does not where a forward looks at their number, to divide by its root or to assert it: the graph that the pairs
    were found in has a constant there.
    """
    different = list(dict.fromkeys(pairs.values()))
    if not different or _answers_alike(model, different, call):
        return dict(pairs)
    fine = {pair for pair in different if len(different) > 1 and _answers_alike(model, [pair], call)}
    return {name: pair for name, pair in pairs.items() if pair in fine}


def _answers_alike(model: nn.Module, pairs: Sequence[Pair], call: Call) -> bool:
    fewer: dict[str, nn.Module] = {}
    ignoring: dict[str, nn.Module] = {}
    for pair in pairs:
        consumer = model.get_submodule(pair.consumer)
        count = sizes_of(consumer)[0]
        kept = torch.arange(0, count, 2)
        fewer |= {name: narrowed(model.get_submodule(name), outputs=kept) for name in (pair.producer, *pair.between)}
        fewer[pair.consumer] = narrowed(consumer, inputs=kept)
        ignoring[pair.consumer] = narrowed(consumer, inputs=torch.arange(count))
        cast(Tensor, ignoring[pair.consumer].weight)[:, 1::2] = 0
    answers = []
    for layers in (ignoring, fewer):
        other = with_layers(model, layers)
        try:
            with inference(other):
                answers.append(float_outputs(run(other, call)))
        except Exception:  # a user's model may raise anything
            return False
    wanted, got = answers
    lost = sum(squared_error(answer, other, call) for answer, other in itertools.zip_longest(wanted, got))
    is_half = any(cast(Tensor, layer.weight).element_size() < 4 for layer in ignoring.values())
    return lost <= (ALIKE_HALF if is_half else ALIKE) * sum(answer.numel() for answer in wanted)


# How many channels ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Narrow:
    """The layers of a model of whose pairs channels were left out: their options, and what these are of."""

    options: Mapping[str, Sequence[Choice]]  # of all layers
    factors: Mapping[str, Factors]  # the same


def kept_of(target: Target, dense: Cost) -> float:
    """The share of the dense layers that the tightest limit leaves."""
    return min((limit / max(getattr(dense, name), 1e-9) for name, limit in target.limits().items()), default=1.0)


def share_for(kept: float) -> float | None:
    """The share of SHARES for a budget that keeps so much: the nearest to its root, so that ranks leave as much again.

    None where next to nothing is to be saved.
    """
    wanted = math.sqrt(max(kept, 0.0))
    return None if wanted > (1 + SHARES[0]) / 2 else min(SHARES, key=lambda share: abs(share - wanted))


def shares_for(
    kept: float, options: Mapping[str, Sequence[Choice]], paired: Collection[str], target: Target
) -> list[float]:
    """The shares that are worth a try for a target that keeps so much of the dense layers.

    Besides `share_for`, those with which all layers on one grid are within the limits by fewer channels alone: of the
    grids the largest and the smallest of which that can be said.

    paired: layers whose channels may become fewer.
    """
    fitting = []
    for plan in on_one_grid(options):
        whole, inside = total(plan), total([choice for choice in plan if choice.layer in paired])
        missing = [
            (getattr(whole, name) - limit) / max(getattr(inside, name), 1e-9) for name, limit in target.limits().items()
        ]
        fits = [share for share in SHARES if share <= 1 - max(missing, default=0.0)]
        if fits and max(missing, default=0.0) > 0:
            fitting.append(max(fits))
    first = share_for(kept)
    found = [] if first is None else [first, *((min(fitting), max(fitting)) if fitting else ())]
    return list(dict.fromkeys(found))


def narrow(
    model: nn.Module,
    factors: Mapping[str, Factors],
    options: Mapping[str, Sequence[Choice]],
    importances: Mapping[str, Importance],
    share: float,
    dtype_bytes: Mapping[str, int],
    *,
    dtypes: Sequence[str] = DTYPES,
    seed: int = 0,
    progress: Progress | None = None,
) -> Narrow | None:
    """The options once channels have left this share of the weights of all pairs, chosen where they count least.

    None where there is no pair. What the layers are with fewer channels is added to `factors` (Factors.narrow).
    """
    counts = {name: _counts(factors, name) for name, known in factors.items() if CHANNELS in known.schemes}
    if not counts:
        return None
    target = Target(params=int(share * sum(choices[-1].cost.params for choices in counts.values())))
    chosen = convex(counts, target, lambda choice: importances[choice.layer].divergence(choice.error))
    return with_counts(model, factors, options, chosen, dtype_bytes, dtypes=dtypes, seed=seed, progress=progress)


def with_counts(
    model: nn.Module,
    factors: Mapping[str, Factors],
    options: Mapping[str, Sequence[Choice]],
    chosen: Sequence[Choice],
    dtype_bytes: Mapping[str, int],
    *,
    dtypes: Sequence[str] = DTYPES,
    seed: int = 0,
    progress: Progress | None = None,
) -> Narrow:
    """The options of all layers once pairs have the channels of these choices, one for the second layer of each."""
    found, known = dict(options), dict(factors)
    for choice in (progress or Progress(False)).track(chosen, "choosing channels", len(chosen)):
        if choice.is_dense:
            continue
        for name, part in _layers(model, factors, choice, seed).items():
            known[name] = part
            gains_bias = part.spec.has_bias and not factors[name].spec.has_bias
            found[name] = _choices(part, choice, dtype_bytes[name], dtypes, gains_bias=gains_bias)
    return Narrow(found, known)


def counts_of(plan: Plan, factors: Mapping[str, Factors]) -> list[Choice]:
    """The choices of channels that a given plan makes, as `with_counts` takes them.

    Raises: PlanError where the two layers of a pair differ, or the count is none of those that were measured.
    """
    channels = {choice.layer: choice.channels for choice in plan.choices}
    found = []
    for name, count in channels.items():
        pair = factors[name].pair if name in factors else None
        if pair is None and count:
            raise PlanError(
                f"the plan leaves {count} channels to {name!r}, which shares them with no other layer here (without "
                "calibration data no layer does)"
            )
        if pair is None or name != pair.consumer:
            continue
        if channels.get(pair.producer, 0) != count:
            raise PlanError(
                f"{pair.producer!r} and {name!r} share their channels, and the plan leaves "
                f"{channels.get(pair.producer, 0) or 'all'} to one and {count or 'all'} to the other"
            )
        scheme = factors[name].schemes[CHANNELS]
        if count and (count,) not in scheme.ranks:
            raise PlanError(f"the plan leaves {count} channels to {name!r}: expected one of {scheme.ranks}")
        if count:
            error = scheme.errors[scheme.ranks.index((count,))]
            found.append(Choice(name, CHANNELS, (count,), "dense", error=error, channels=count))
    return found


def _counts(factors: Mapping[str, Factors], consumer: str) -> tuple[Choice, ...]:
    """Every count of channels of a pair with the weights of both layers, in rising size, and last both whole."""
    known = factors[consumer]
    if known.pair is None:
        raise ValueError(f"{consumer} is in no pair")
    spec, first, scheme = known.spec, factors[known.pair.producer].spec, known.schemes[CHANNELS]
    dense = Cost(first.params + spec.params)
    found = [
        Choice(
            spec.name,
            CHANNELS,
            (count,),
            "dense",
            error=error,
            cost=Cost(count * (first.fan_in + spec.out_features)),
            channels=count,
        )
        for (count,), error in zip(scheme.ranks, scheme.errors, strict=True)
        if LEAST * spec.in_features <= count
    ]
    return (*found, Choice(spec.name, packing="dense", cost=dense))


@torch.no_grad()
def _layers(model: nn.Module, factors: Mapping[str, Factors], choice: Choice, seed: int) -> dict[str, Factors]:
    """Both layers of a pair with the channels that a choice keeps, decomposed anew."""
    second, count = factors[choice.layer], choice.channels
    if second.pair is None:
        raise ValueError(f"{choice.layer} is in no pair")
    first = factors[second.pair.producer]
    columns = second.schemes[CHANNELS]
    if count not in second.narrow and isinstance(columns, Columns):
        (chosen, solved), bias = second.slice(choice)
        grids = tuple(second.rounding)
        kept = chosen.flatten(1).argmax(1)
        module: Any = narrowed(second.module, inputs=kept, gains_bias=bias is not None)
        module.weight.copy_(solved.reshape(module.weight.shape))
        if bias is not None:
            module.bias.copy_(bias)
        whole = second.profile
        taken_over = columns.kept.taken_over(count).double()
        moments = Moments(whole.rows, torch.zeros(count, dtype=torch.float32), columns.covariance(count))
        seen = Seen(
            inputs=moments, sensitivity=_of_second(whole.seen.sensitivity, second.spec, module.weight, taken_over)
        )
        profile = Profile(whole.rows, seen, None if whole.mean is None else whole.mean[kept])
        spec = changed(
            second.spec,
            in_features=count,
            has_bias=second.spec.has_bias or bias is not None,
            input_shape=_shape(second.spec.input_shape, second.spec, count),
        )
        made = decompose(module, spec, profile, seed=seed, grids=grids, rounds_by_data=second.rounds_by_data)
        second.narrow[count] = changed(made, pair=second.pair, kept=kept, axis=1)
        module, whole = narrowed(first.module, outputs=kept), first.profile
        seen = Seen(inputs=first.inputs, sensitivity=_of_first(whole.seen.sensitivity, first.spec, kept))
        profile = Profile(whole.rows, seen, whole.mean)
        shape = _shape(first.spec.output_shape, first.spec, count)
        spec = changed(first.spec, out_features=count, output_shape=shape)
        made = decompose(module, spec, profile, seed=seed, grids=grids, rounds_by_data=second.rounds_by_data)
        first.narrow[count] = changed(made, pair=second.pair, kept=kept, axis=0)
    return {first.spec.name: first.narrow[count], second.spec.name: second.narrow[count]}


def _shape(shape: tuple[int, ...], spec: LayerSpec, count: int) -> tuple[int, ...]:
    """The shape with so many channels."""
    axis = len(shape) - 1 - len(spec.kernel_size)
    return (*shape[:axis], count, *shape[axis + 1 :])


def _of_first(sensitivity: Tensor | None, spec: LayerSpec, kept: Tensor) -> Tensor | None:
    """The sensitivity of a layer (see Seen) once it gives these outputs only.

    That of a linear layer with more outputs than inputs is of its inputs, W^T G W; what the outputs that went had in it
    is not known, and stays.
    """
    if sensitivity is None or len(sensitivity) == spec.out_features:
        return None if sensitivity is None else sensitivity.double()[kept][:, kept]
    return sensitivity.double() if len(kept) > spec.fan_in else None


def _of_second(sensitivity: Tensor | None, spec: LayerSpec, weight: Tensor, taken_over: Tensor) -> Tensor | None:
    """The sensitivity of a layer (see Seen) once it reads fewer inputs, by this weight.

    taken_over (h, count): what each of these stands for of all that the dense layer reads.
    """
    if sensitivity is None:
        return None
    if len(sensitivity) != spec.out_features:  # W^T G W, of a W that read all
        return taken_over.T @ sensitivity.double() @ taken_over
    if spec.kernel_size or spec.out_features <= taken_over.shape[1]:
        return sensitivity.double()
    matrix = weight.detach().double().cpu()
    return matrix.T @ sensitivity.double() @ matrix


def _choices(
    known: Factors, choice: Choice, bytes_per_number: int, dtypes: Sequence[str], *, gains_bias: bool
) -> tuple[Choice, ...]:
    """The options of a layer with fewer channels; the last is that layer as it is.

    gains_bias: what was left out is made up for by a bias that the dense layer does not have.
    """
    lost = choice.error if known.axis == 1 else 0.0
    gained = known.spec.out_features if gains_bias else 0
    more = Cost(gained, 0, gained * bytes_per_number)
    found = tuple(
        changed(c, channels=choice.channels, error=min(1.0, c.error + lost), cost=c.cost + more)
        for c in candidates(known, bytes_per_number, dtypes=dtypes)
    )
    whole = changed(found[-1], scheme=CHANNELS, ranks=(choice.channels,), reason="")
    return (*found[:-1], whole)
