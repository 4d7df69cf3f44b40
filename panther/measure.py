"""Calibration batches in, the moments of every layer's inputs or outputs out, in one streaming pass.

Linear layers: the covariance of the inputs, once for all layers that read the same tensor, or of the outputs where
they are fewer and weights are not rounded. Convolutions: of the outputs and of the input channels, over a fixed random
subset of the positions, and a few inputs as they are, on which the schemes are compared. Layers whose input channels
may become fewer: of those as well.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from panther.batches import Call, device_of, inference, parts_of, rows_that_count, run
from panther.errors import CalibrationError
from panther.factors import Profile
from panther.gradients import CHUNK, Reactions
from panther.ops import sparse_sign_sketch
from panther.products import (
    add_gram,
    add_sums,
    fast_layers,
    has_moments_kernel,
    mirrored,
    runs_in_moments_kernel,
)
from panther.progress import Progress
from panther.quantise import MOST_FEATURES
from panther.sketches import Moments, Seen
from panther.spec import LayerSpec

ROWS_PER_FEATURE = 64  # rows that are looked at: below about 10 a covariance is noise, above 50 nothing changes
SAMPLE_BYTES = 8_000_000  # inputs kept a convolution, to compare schemes on
MAX_SAMPLES = 8
GRADIENT_SAMPLES = 192  # samples that also run backward, at most
GRADIENT_SHARE = 0.4  # of all samples: a backward pass costs about what a forward pass does
WHOLE_BATCH = 1_000_000  # samples a backward pass: more than any batch has
CHANNEL_ROWS = 24  # rows a channel for the covariance of channels that may become fewer: it is the largest of all
STATISTICS_BYTES = 1_000_000_000  # more than this at once, and the layers are measured in several passes


# Products of wide rows are those of sketches of theirs where so many rows come that a share of them says as much. A
# sketch of 12 rows a feature loses 1.4 to 2 % more than all rows would at an eighth of the features, and 3 to 4 % at a
# quarter; below 2,048 features making it costs too much of what it saves (python -m benchmarks.sketches).
SKETCHED_FROM = 2048  # features
SKETCH_PER_FEATURE = 12  # rows of all sketches together
FEWEST_SKETCHED = 64  # rows of one
# Rows that wait until a product of all is taken, at least, and a feature. In the kernel 64 rows of 384 numbers or 128
# of 4,096 take 1.2 times as long each as many more do; where torch takes the product, few take half as long again.
PENDING_ROWS, PENDING_PER_FEATURE = 128, 0.125
PENDING_ROWS_OF_TORCH, PENDING_PER_FEATURE_OF_TORCH = 2048, 0.5


def shrinkage(features: int, rows: int) -> int:
    """How many rows one row of a sketch may stand for, where so many of these features are expected in all."""
    return max(1, rows // (SKETCH_PER_FEATURE * features)) if features >= SKETCHED_FROM else 1


def shrunk(rows: Tensor, times: int, *, shift: Tensor, first_row: int, seed: int = 0) -> Tensor:
    """A sketch of (count, n) rows less `shift` (n) in (count / times, n), whose product with itself is near theirs."""
    size = len(rows) // times
    if times == 1 or size < FEWEST_SKETCHED or rows.device.type != "cpu":
        return rows - shift
    sketch, of_ones = rows.new_zeros(size, rows.shape[1]), rows.new_zeros(size, 1)
    for part, into in ((rows, sketch), (rows.new_ones(len(rows), 1), of_ones)):
        sparse_sign_sketch(part, into, first_row=first_row, seed=seed)
    return sketch.addmm_(of_ones, shift.unsqueeze(0), alpha=-1)


def enough_pending(features: int, in_kernel: bool) -> int:
    if in_kernel:
        return max(PENDING_ROWS, math.ceil(PENDING_PER_FEATURE * features))
    return max(PENDING_ROWS_OF_TORCH, math.ceil(PENDING_PER_FEATURE_OF_TORCH * features))


class Accumulator:
    """Sums of rows and (unless only the mean is wanted) of their products, shifted so that nothing cancels.

    samples: how many are expected in all; with it, products of wide rows are sketched.
    """

    def __init__(self, *, products: bool = True, samples: int = 0) -> None:
        self.rows = 0
        self.samples = samples
        self.pending: list[Tensor] = []  # rows, or sketches of them, whose product is still to be taken
        self.wants_products = products
        self.shift: Tensor | None = None
        self.total: Tensor | None = None
        self.products: Tensor | None = None  # in float64, on and below the diagonal

    def add(self, rows: Tensor, samples: int = 0, counts: Tensor | None = None) -> None:
        """Take those of (count, features) rows that count, of so many samples: float32 within a batch, float64 beyond.

        counts: (count,) bool; None where all do.
        """
        count = rows.shape[0] if counts is None else int(counts.count_nonzero())
        if count == 0:
            return
        with torch.autocast(rows.device.type, enabled=False):  # hooks run inside the model's own autocast
            self._add(rows.float(), counts, count, shrinkage(rows.shape[1], self.samples * count // max(1, samples)))

    def _add(self, rows: Tensor, counts: Tensor | None, count: int, times: int) -> None:
        if self.shift is None or self.total is None:
            self.total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
            add_sums(self.total, None, rows, counts=counts)
            self.shift = (self.total / count).float()
            self.total.zero_()
        seen, self.rows = self.rows, self.rows + count
        enough = enough_pending(rows.shape[1], runs_in_moments_kernel(rows))
        if not self.wants_products:
            add_sums(self.total, None, rows, counts=counts, shift=self.shift)
        elif times == 1 and not self.pending and count >= enough:
            add_sums(self.total, self._products(rows), rows, counts=counts, shift=self.shift)
        else:
            rows = rows if counts is None else rows[counts]
            add_sums(self.total, None, rows, shift=self.shift)
            self.pending.append(shrunk(rows, times, shift=self.shift, first_row=seen))
            if sum(map(len, self.pending)) >= enough:
                self._take_products()

    def _products(self, rows: Tensor) -> Tensor:
        if self.products is None:
            self.products = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        return self.products

    def _take_products(self) -> None:
        rows = torch.cat(self.pending) if len(self.pending) > 1 else self.pending[0]
        self.pending = []
        add_gram(self._products(rows), rows)

    def mean(self) -> Tensor | None:
        if self.shift is None or self.total is None:
            return None
        return (self.total / self.rows + self.shift).cpu()

    def moments(self) -> Moments | None:
        mean = self.mean()
        if self.pending:
            self._take_products()
        if mean is None or self.total is None or self.products is None:
            return None
        shifted = self.total / self.rows
        covariance = mirrored(self.products) / self.rows - torch.outer(shifted, shifted)
        covariance.diagonal().clamp_min_(0.0)  # of what does not vary, rounding leaves less than nothing
        return Moments(self.rows, mean, covariance.cpu())


@dataclass
class _Batch:
    """The batch that runs, and which rows of it are looked at: the same in all layers that see as many."""

    seed: int = 0  # of this batch, whatever layers are watched
    masks: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    samples: int = 1
    chosen: dict[tuple[tuple[int, ...], int], Tensor | None] = field(default_factory=dict)

    def begin(self, call: Call) -> None:
        self.seed, self.masks, self.samples, self.chosen = self.seed + 1, call.masks(), call.batch_size, {}

    def rows(self, tensor: Tensor, most: int) -> tuple[Tensor, Tensor | None]:
        """(..., features) as rows, and which of them count, `most` at most; None where all do."""
        key = tuple(tensor.shape[:-1]), most
        if key not in self.chosen:
            rows, counts = rows_that_count(tensor, self.masks)
            self.chosen[key] = self._some(counts, len(rows), most, rows.device)
        return tensor.reshape(-1, tensor.shape[-1]), self.chosen[key]

    def _some(self, counts: Tensor | None, rows: int, most: int, device: torch.device) -> Tensor | None:
        """A random part of those that count, where they are more than `most`."""
        those = None if counts is None else counts.nonzero().squeeze(1).cpu()
        count = rows if those is None else len(those)
        if count <= most:
            return counts
        part = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))[:most]
        chosen = torch.zeros(rows, dtype=torch.bool)
        chosen[part if those is None else those[part]] = True
        return chosen.to(device)


@dataclass
class _Watch:
    """What is accumulated for one layer; `shared` is the layer that accumulates the inputs for its group."""

    spec: LayerSpec
    inputs: Accumulator | None
    outputs: Accumulator | None
    mean: Accumulator  # of the inputs
    owns_inputs: bool
    positions: int
    generator: torch.Generator
    channels: Accumulator | None = None  # of the inputs too, where they may become fewer
    channel_generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    samples: list[Tensor] = field(default_factory=list)
    picks: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def pick(self, side: str, count: int) -> Tensor | slice:
        """The same random positions for every batch of one size."""
        if count <= self.positions:
            return slice(None)
        if (side, count) not in self.picks:
            chosen = torch.randperm(count, generator=self.generator)[: self.positions]
            self.picks[side, count] = chosen.sort().values
        return self.picks[side, count]


def passes(
    specs: Sequence[LayerSpec],
    channels_of: Collection[str] = (),
    limit_bytes: int = STATISTICS_BYTES,
    *,
    for_rounding: bool = False,
) -> list[list[LayerSpec]]:
    """The layers in groups whose statistics fit into memory together; layers that share an input stay together.

    channels_of, for_rounding: see `measure`.
    """
    parts: list[list[LayerSpec]] = [[]]
    used = 0
    for group in _groups(specs):
        need = _statistics_bytes(group, for_rounding=for_rounding) + sum(
            _sums_bytes(s.in_features) for s in group if s.name in channels_of
        )
        if parts[-1] and used + need > limit_bytes:
            parts.append([])
            used = 0
        parts[-1].extend(group)
        used += need
    return [part for part in parts if part]


def _groups(specs: Sequence[LayerSpec]) -> list[list[LayerSpec]]:
    """The linear layers that read one tensor together, every other layer alone."""
    groups: dict[tuple[bool, str], list[LayerSpec]] = defaultdict(list)
    for spec in specs:
        shares = spec.kind == "linear" and bool(spec.input_key)
        groups[shares, spec.input_key if shares else spec.name].append(spec)
    return list(groups.values())


def _statistics_bytes(group: Sequence[LayerSpec], *, for_rounding: bool) -> int:
    if group[0].kind != "linear":
        return sum(_sums_bytes(s.out_features) + _sums_bytes(s.in_features) + SAMPLE_BYTES for s in group)
    if _by_outputs(group, for_rounding=for_rounding):
        return sum(_sums_bytes(s.out_features) for s in group)
    return _sums_bytes(group[0].in_features)


def _sums_bytes(features: int) -> int:
    """Of products in float64, and of rows that wait for theirs in float32."""
    return 8 * features**2 + 4 * features * enough_pending(features, has_moments_kernel())


def _by_outputs(group: Sequence[LayerSpec], *, for_rounding: bool) -> bool:
    """Whether the outputs of layers that read one tensor are cheaper to watch than that tensor, and tell enough."""
    inputs = group[0].in_features
    if for_rounding and inputs <= MOST_FEATURES:
        return False
    return all(s.out_features < inputs for s in group) and sum(s.out_features**2 for s in group) < inputs**2


@dataclass(frozen=True)
class Measured:
    """Profiles by layer name, and why the output's sensitivity is unknown (None when it is known)."""

    profiles: dict[str, Profile]
    not_differentiated: str | None


def measure(
    model: nn.Module,
    specs: Sequence[LayerSpec],
    batches: Iterable[Call],
    *,
    samples: int,
    channels_of: Collection[str] = (),
    gradient_samples: int | None = None,
    chunk: int = CHUNK,
    for_rounding: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    total: int | None = None,
) -> Measured:
    """One pass over the batches; what it saw of every layer in `specs`.

    samples: about how many samples the batches hold, which says how many positions of each are enough.
    channels_of: layers whose input channels may become fewer, which takes the covariance of these channels.
    gradient_samples: how many of them also run backward (None: as many as pay); where that fails all are measured
        without.
    chunk: samples a backward pass.
    for_rounding: whether weights are to be rounded, for which a linear layer's inputs have to be known, too.

    Raises: CalibrationError when a batch does not run, or holds or produces values that are not finite.
    """
    shown = (progress or Progress(False)).track(batches, "measuring", total)
    reason = None
    if gradient_samples is None:
        gradient_samples = affordable_gradients(samples)
    watches = partial(_watches, specs, samples, seed, channels_of, for_rounding=for_rounding)
    for size in (chunk, WHOLE_BATCH) if gradient_samples > 0 else ():  # some models are written for one batch size
        try:
            return _measure(model, watches(), shown, gradient_samples, size, seed)
        except _NotDifferentiableError as error:
            reason = str(error)
        # Out here the error is gone, and with it the activations and the progress bar that its traceback held.
        shown = (progress or Progress(False)).track(batches, "measuring again", total)
    return replace(_measure(model, watches(), shown, 0, chunk, seed), not_differentiated=reason)


def affordable_gradients(samples: int) -> int:
    """How many of the samples may also run backward."""
    return min(GRADIENT_SAMPLES, max(16, round(GRADIENT_SHARE * samples)))


class _NotDifferentiableError(Exception):
    """A call ran forward but not backward."""


def _measure(
    model: nn.Module,
    watches: Sequence[_Watch],
    batches: Iterable[Call],
    gradient_samples: int,
    chunk: int,
    seed: int,
) -> Measured:
    batch = _Batch(seed)
    hooks = [  # before the user's own hooks: what those make of an output is not what the layer is replaced for
        model.get_submodule(w.spec.name).register_forward_hook(_hook(w, batch), with_kwargs=True, prepend=True)
        for w in watches
    ]
    try:
        reacting = Reactions(model, [watch.spec for watch in watches], seed, chunk)
        with inference(model), fast_layers(), reacting as reactions:
            for index, call in enumerate(batches):
                _refuse_non_finite(call, index)
                if gradient_samples <= 0:
                    _run_batch(model, call, index, batch)
                    continue
                size = call.batch_size if chunk == WHOLE_BATCH else min(gradient_samples, call.batch_size)
                _run_backward(reactions, call.rows(0, size), batch)
                if size < call.batch_size:
                    _run_batch(model, call.rows(size, call.batch_size), index, batch)
                gradient_samples -= size
    finally:
        for hook in hooks:
            hook.remove()
    sensitivities = reactions.found()
    seen: dict[int, Moments | None] = {}
    profiles = {w.spec.name: _profile(w, seen, sensitivities.pop(w.spec.name, None)) for w in watches}
    return Measured(profiles, None)


def _watches(
    specs: Sequence[LayerSpec], samples: int, seed: int, channels_of: Collection[str], *, for_rounding: bool
) -> list[_Watch]:
    watches = []
    for group in _groups(specs):
        by_outputs = _by_outputs(group, for_rounding=for_rounding) or group[0].kind != "linear"
        wants_inputs = group[0].kind == "linear" and not by_outputs
        shared = Accumulator(samples=samples) if wants_inputs else None
        mean = shared or Accumulator(products=False)
        for index, spec in enumerate(group):
            is_conv = spec.kind != "linear"
            has_inputs = wants_inputs or (is_conv and math.prod(spec.kernel_size) > 1)
            watches.append(
                _Watch(
                    spec,
                    Accumulator() if is_conv and math.prod(spec.kernel_size) > 1 else shared,
                    Accumulator(samples=0 if group[0].kind != "linear" else samples) if by_outputs else None,
                    mean,
                    index == 0,
                    _positions(spec, samples),
                    torch.Generator().manual_seed(seed),
                    Accumulator() if spec.name in channels_of and not has_inputs else None,
                )
            )
    return watches


def _positions(spec: LayerSpec, samples: int) -> int:
    """Positions a sample that give ROWS_PER_FEATURE rows a feature in all."""
    sizes = (spec.in_features, spec.out_features)
    features = min(sizes) if spec.kind == "linear" else max(sizes)
    return max(16, math.ceil(ROWS_PER_FEATURE * features / max(1, samples)))


def _hook(watch: _Watch, batch: _Batch) -> Any:
    @torch.no_grad()
    def see(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        given = args[0] if args else kwargs["input"]
        if watch.channels is not None and watch.channels.rows < CHANNEL_ROWS * watch.spec.in_features:
            _see_channels(watch.channels, watch, given, batch)
        if watch.spec.kind == "linear":
            _see_linear(watch, given, output, batch)
        else:
            _see_conv(watch, given, output)

    return see


def _see_channels(channels: Accumulator, watch: _Watch, given: Tensor, batch: _Batch) -> None:
    """The inputs of a linear layer or a 1 x 1 convolution: a part of them where there are many."""
    spec, dims = watch.spec, len(watch.spec.kernel_size)
    if not dims:
        rows, counts = batch.rows(given, spec.in_features)
        channels.add(rows, counts=counts)
        return
    batched = given if given.dim() > 1 + dims else given.unsqueeze(0)
    rows = _read_by_a_point(batched, spec).movedim(1, -1).reshape(-1, spec.in_features)
    if len(rows) > spec.in_features:
        rows = rows[torch.randperm(len(rows), generator=watch.channel_generator)[: spec.in_features].to(rows.device)]
    channels.add(rows)


def _see_linear(watch: _Watch, given: Tensor, output: Tensor, batch: _Batch) -> None:
    """Its rows: a random part where there are far more than a covariance needs."""
    if watch.owns_inputs:  # `mean` is the accumulator of the inputs where there is one
        rows, counts = batch.rows(given, watch.positions * given.shape[0])
        watch.mean.add(rows, batch.samples, counts)
    if watch.outputs is not None:
        rows, counts = batch.rows(output, watch.positions * output.shape[0])
        watch.outputs.add(rows, batch.samples, counts)


def _see_conv(watch: _Watch, given: Tensor, output: Tensor) -> None:
    dims = len(watch.spec.kernel_size)
    given, output = (t.unsqueeze(0) if t.dim() == dims + 1 else t for t in (given, output))
    if watch.outputs is not None:
        watch.outputs.add(_pixels(output, watch, "out"))
    if watch.inputs is not None:
        watch.inputs.add(_pixels(given, watch, "in"))
        _keep_samples(watch, given)
    else:
        watch.mean.add(_pixels(_read_by_a_point(given, watch.spec), watch, "in"))


def _read_by_a_point(given: Tensor, spec: LayerSpec) -> Tensor:
    """The input positions that a 1 x 1 convolution reads, padding apart: a stride leaves others out."""
    read: tuple[Any, ...] = (..., *(slice(None, None, step) for step in spec.stride))
    return given[read]


def _pixels(tensor: Tensor, watch: _Watch, side: str) -> Tensor:
    """(N, channels, *positions) as (rows, channels), at most `positions` of each sample."""
    flat = tensor.flatten(2)
    chosen = flat[:, :, watch.pick(side, flat.shape[2])]
    return chosen.transpose(1, 2).reshape(-1, tensor.shape[1])


def _keep_samples(watch: _Watch, given: Tensor) -> None:
    room = MAX_SAMPLES - sum(t.shape[0] for t in watch.samples)
    each = given[0].numel() * given.element_size()
    room = min(room, max(1, SAMPLE_BYTES // max(1, each)) - sum(t.shape[0] for t in watch.samples))
    same = not watch.samples or watch.samples[0].shape[1:] == given.shape[1:]
    if room > 0 and same:
        watch.samples.append(given[: min(room, max(1, MAX_SAMPLES // 4))].detach().clone())


def check_batches(model: nn.Module, calls: Sequence[Call], first: int) -> None:
    """Refuse what measure would refuse, in batches that it does not get to see; `first` is the index of the first.

    Raises: CalibrationError as measure.
    """
    with inference(model):
        for index, call in enumerate(calls, first):
            _refuse_non_finite(call, index)
            _run_batch(model, call, index, _Batch())


def _refuse_non_finite(call: Call, index: int) -> None:
    for tensor in call.tensors():
        numbers = parts_of(tensor)[-1]
        if numbers.is_floating_point() and not bool(torch.isfinite(numbers).all()) and not _is_mask(numbers):
            bad = int((~torch.isfinite(numbers)).sum())
            raise CalibrationError(
                f"calibration batch {index} holds {bad} values that are NaN or infinite (shape {tuple(tensor.shape)}): "
                "clean the data, or leave this batch out"
            )


def _is_mask(numbers: Tensor) -> bool:
    """Whether there is nothing but 0 and -inf, as in what is added to the scores of an attention."""
    is_zero = numbers == 0
    return bool(is_zero.any() and (is_zero | (numbers == -torch.inf)).all())


def _run_batch(model: nn.Module, call: Call, index: int, batch: _Batch) -> None:
    batch.begin(call.to(device_of(model)))
    try:
        run(model, call)
    except Exception as error:  # models check their inputs with errors of any kind
        shapes = ", ".join(str(tuple(t.shape)) for t in call.tensors())
        reason = str(error).strip().splitlines()
        raise CalibrationError(
            f"calibration batch {index} (shapes {shapes}) does not run: {reason[0][:200] if reason else repr(error)}. "
            "Batches must look like example_inputs, batch dimension included."
        ) from error


def _run_backward(reactions: Reactions, call: Call, batch: _Batch) -> None:
    for chunk in reactions.chunks(call):
        batch.begin(chunk.to(device_of(reactions.model)))
        try:
            reactions.run(chunk)
        except Exception as error:  # a bad batch is told apart when it runs again without gradients
            reason = str(error).strip().splitlines()
            text = f"{type(error).__name__}: {reason[0][:160] if reason else 'no message'}"
            raise _NotDifferentiableError(text) from error


def _moments(sums: Accumulator | None, seen: dict[int, Moments | None]) -> Moments | None:
    """The moments of an accumulator, worked out once however many layers share it."""
    if sums is None:
        return None
    if id(sums) not in seen:
        seen[id(sums)] = sums.moments()
    return seen[id(sums)]


def _profile(watch: _Watch, seen: dict[int, Moments | None], sensitivity: Tensor | None) -> Profile:
    inputs = _moments(watch.inputs if watch.channels is None else watch.channels, seen)
    outputs = _moments(watch.outputs, seen)
    for moments in (inputs, outputs):
        if moments is not None and not bool(torch.isfinite(moments.covariance).all()):
            raise CalibrationError(
                f"the values at layer {watch.spec.name!r} are not finite on the calibration data: the model overflows "
                "or holds NaN there; check its outputs, or give it exclude=..."
            )
    samples = torch.cat(watch.samples).cpu() if watch.samples else None
    mean = watch.mean.mean() if samples is None else None
    rows = max((m.rows for m in (inputs, outputs) if m is not None), default=0)
    return Profile(rows, Seen(inputs, outputs, sensitivity), mean, samples)
