"""The dense model against the compressed one: what is counted, what is measured, and how well they agree.

Counted: numbers, bytes of the saved file, operations. Measured, both models in turn in the same process: latency,
peak memory, and the agreement of the outputs on batches that nothing was fitted to.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from panther import chains
from panther.answers import class_scores, is_classifier, last_dense_call
from panther.batches import Call, device_of, drawing, float_outputs, inference, masked_rows, run
from panther.build_info import build_info
from panther.chains import CHANNELS, chain_cost, dense_cost
from panther.errors import CalibrationError, one_line
from panther.nn import IN_WHOLE_NUMBERS, QUANTISED, SketchedLayer
from panther.nn.narrow import is_narrowed, sizes_of
from panther.nn.pivoted import ORDERS
from panther.nn.surgery import as_plain, with_layers
from panther.sizes import file_bytes, model_params, stored_tensors, tensor_bytes
from panther.spec import (
    BITS,
    Baseline,
    Capture,
    Choice,
    Cost,
    Figures,
    Healed,
    LayerReport,
    LayerSpec,
    LimitReport,
    Plan,
    Report,
    Target,
)

T = TypeVar("T")

BASELINES = ("int8", "int4")  # of BITS: what is usual
LATENCY_SECONDS = 1.5  # measured time for both models together: medians of fast models then repeat within 2-3 %
MOST_ROUNDS, FEWEST_ROUNDS = 500, 3
POOR_COSINE = 0.5  # below this the compressed model is not the same function in any useful sense
NUMBERS_AT_ONCE = 2**22  # of each output, compared at a time: 32 MB in float64, and about ten such copies are alive
LATENCY, PEAK_MEMORY, AGREEMENT, METRIC = MEASUREMENTS = ("latency", "peak memory", "agreement", "eval_fn")


# Agreement ------------------------------------------------------------------------------------------------------------


@dataclass
class _Tally:
    """Sums over output rows, in float64."""

    cosine: float = 0.0
    cosine_rows: int = 0
    squared_error: float = 0.0
    squared_norm: float = 0.0
    equal_choices: int = 0
    choices: int = 0
    rows: int = 0
    bad_rows: int = 0

    def add(self, dense: Tensor, compressed: Tensor) -> None:
        """Count rows (rows, features) of the two models; rows with NaN or Inf are only counted as such."""
        rows = max(1, NUMBERS_AT_ONCE // max(1, dense.shape[-1]))
        for y, z in zip(torch.split(dense, rows), torch.split(compressed, rows), strict=True):
            self._add_part(y.double(), z.double())

    def _add_part(self, y: Tensor, z: Tensor) -> None:
        masked = ~y.isfinite() & (y == z)  # both say -inf: a choice that the model rules out
        y, z = y.masked_fill(masked, 0.0), z.masked_fill(masked, 0.0)
        usable = y.isfinite().all(-1) & z.isfinite().all(-1)
        self.rows += len(y)
        self.bad_rows += int((~usable).sum())
        y, z = y[usable], z[usable]
        self.squared_error += float((y - z).square().sum())
        self.squared_norm += float(y.square().sum())
        if y.shape[-1] > 1:  # the cosine of single numbers says no more than their sign
            both_zero = (y == 0).all(-1) & (z == 0).all(-1)
            self.cosine += float(torch.where(both_zero, 1.0, nn.functional.cosine_similarity(y, z, dim=-1)).sum())
            self.cosine_rows += len(y)

    def add_choices(self, dense: Tensor, compressed: Tensor) -> None:
        usable = ~(dense.isnan().any(-1) | compressed.isnan().any(-1))
        self.equal_choices += int((dense[usable].argmax(-1) == compressed[usable].argmax(-1)).sum())
        self.choices += int(usable.sum())

    def figures(self) -> dict[str, float]:
        found: dict[str, float] = {}
        if self.cosine_rows:
            found["cosine"] = self.cosine / self.cosine_rows
        if self.rows > self.bad_rows and (self.squared_norm or not self.squared_error):
            found["relative_error"] = math.sqrt(self.squared_error / (self.squared_norm or 1.0))
        if self.choices:
            found["top1"] = self.equal_choices / self.choices
        if self.bad_rows:
            found["non_finite"] = self.bad_rows / self.rows
        return found


def agreement(dense: nn.Module, compressed: nn.Module, calls: Sequence[Call]) -> dict[str, float]:
    """How alike the outputs of two models are on the same inputs.

    "cosine": mean over output rows (tokens of a (batch, length, features) output, else samples; padded tokens left
    out). "relative_error": ||y - y'|| / ||y|| over everything. "top1": share of rows with the same largest entry, only
    where the model is a classifier: its output has a `logits` field, or it is a single (batch, classes) tensor that
    comes out of a layer named like one (classifier, fc, head, ...), as it is or as (log-)probabilities.
    "non_finite": share of rows that hold NaN or Inf in either model; the other figures leave them out.
    A figure that does not apply is absent; all are where the outputs hold no floating-point numbers.

    Raises: CalibrationError when a call cannot be run, or the two models answer it with other shapes.
    """
    tally = _Tally()
    classifies = False
    with inference(dense), inference(compressed):
        for index, call in enumerate(calls):
            try:
                with last_dense_call(dense) as last:
                    first = run(dense, call)
                second = run(compressed, call)
            except Exception as error:
                raise CalibrationError(f"held-out batch {index} could not be run: {one_line(error)}") from error
            _refuse_other_shapes(first, second, index)
            classifies = is_classifier(first, last) if index == 0 else classifies
            _compare(tally, first, second, call.masks(), classifies)
    return tally.figures()


def _refuse_other_shapes(dense: Any, compressed: Any, index: int) -> None:
    """Rows can be compared one by one only where both models give the same ones."""
    shapes = [[tuple(tensor.shape) for tensor in float_outputs(output)] for output in (dense, compressed)]
    if shapes[0] != shapes[1]:
        raise CalibrationError(
            f"on held-out batch {index} the dense model gives outputs of the shapes {shapes[0]}, the compressed one "
            f"{shapes[1]}: where shapes depend on the data wrap the model so that it returns what comes before"
        )


def _compare(tally: _Tally, dense: Any, compressed: Any, masks: Mapping[tuple[int, ...], Tensor], top1: bool) -> None:
    for y, z in zip(float_outputs(dense), float_outputs(compressed), strict=True):
        tally.add(_rows(y, masks), _rows(z, masks))
    if top1:
        tally.add_choices(_rows(class_scores(dense), masks), _rows(class_scores(compressed), masks))


def _rows(output: Tensor, masks: Mapping[tuple[int, ...], Tensor]) -> Tensor:
    """An output as (rows, features) on the CPU: a row is a token, or a sample where the output is a map of pixels."""
    output = output.cpu()
    if output.dim() == 0:
        return output.reshape(1, 1)
    if output.dim() > 3:
        return output.flatten(1)
    return masked_rows(output, {shape: mask.cpu() for shape, mask in masks.items()})


# Speed and memory -----------------------------------------------------------------------------------------------------


def measure_latency(
    dense: nn.Module, compressed: nn.Module, call: Call, *, seconds: float = LATENCY_SECONDS
) -> tuple[float, float]:
    """Median milliseconds of one call of each model, at torch's current number of threads.

    The two run strictly in turn, so that a machine that slows down slows both; `seconds` is the time for all runs
    after the warm-up (at least three rounds are timed).
    """
    first, second = latencies((dense, compressed), call, seconds=seconds)
    return first, second


def latencies(models: Sequence[nn.Module], call: Call, *, seconds: float = LATENCY_SECONDS) -> list[float]:
    """The same for any number of models."""
    runs = []
    with contextlib.ExitStack() as modes:
        for model in models:
            modes.enter_context(inference(model, fused=True))
            device = device_of(model)
            modes.enter_context(drawing(0, device))
            runs.append(functools.partial(_finished, model, call.copied().to(device), device))
        return [taken * 1e3 for taken in medians_in_turn(runs, seconds=seconds)]


def medians_in_turn(runs: Sequence[Callable[[], object]], *, seconds: float = LATENCY_SECONDS) -> list[float]:
    """Median seconds of each run: two rounds of warm-up, then rounds of one call each until `seconds` have passed.

    Each round has an order of its own, and none begins with the run that the last one ended with: what a run finds in
    the caches and on the heap is what the one before has left, which was worth a tenth to whichever of two equal ones
    came second, and as much to one that followed itself.
    """
    for run_once in [*runs, *runs]:
        run_once()
    taken: list[list[float]] = [[] for _ in runs]
    order, generator = list(range(len(runs))), random.Random(0)
    end = time.perf_counter() + seconds
    while len(taken[0]) < FEWEST_ROUNDS or (time.perf_counter() < end and len(taken[0]) < MOST_ROUNDS):
        last = order[-1]
        generator.shuffle(order)
        while len(order) > 1 and order[0] == last:
            generator.shuffle(order)
        for index in order:
            start = time.perf_counter()
            runs[index]()
            taken[index].append(time.perf_counter() - start)
    return [statistics.median(times) for times in taken]


def _finished(model: nn.Module, call: Call, device: torch.device) -> None:
    """One call, waited for."""
    model(*call.args, **call.kwargs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(model: nn.Module, call: Call) -> int:
    """The most bytes of tensors alive at once while the model runs one call: weights, inputs and everything between.

    On the CPU this follows each allocation and release that torch's profiler records, so buffers inside an operation
    count and other models in the process do not. On CUDA it is the allocator's own peak, less what was there before.
    """
    device = device_of(model)
    inputs = call.copied().to(device)
    held = [*model.parameters(), *model.buffers(), *inputs.tensors()]
    standing = sum({tensor.data_ptr(): tensor_bytes(tensor) for tensor in held}.values())
    with inference(model, fused=True), drawing(0, device):
        model(*inputs.args, **inputs.kwargs)  # what the first call allocates and keeps is not part of a call
        if device.type == "cuda":
            return standing + _cuda_peak(model, inputs, device)
        return standing + _cpu_peak(model, inputs)


def _cuda_peak(model: nn.Module, call: Call, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    model(*call.args, **call.kwargs)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(model: nn.Module, call: Call) -> int:
    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model(*call.args, **call.kwargs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    alive = peak = 0
    for _, change in changes:
        alive += change
        peak = max(peak, alive)
    return peak


@contextlib.contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keep the profiler from printing its start and stop on stderr; a level that the user set stays."""
    name = "KINETO_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "99"  # above every level; 5 still prints
    try:
        yield
    finally:
        del os.environ[name]


# Counting -------------------------------------------------------------------------------------------------------------


def figures(
    model: nn.Module, flops: int, *, latency_ms: float | None = None, peak_memory_bytes: int | None = None
) -> Figures:
    """Totals of one model: counted here, apart from what was measured."""
    return Figures(model_params(model), file_bytes(model), flops, latency_ms, peak_memory_bytes)


def layer_report(spec: LayerSpec, choice: Choice | None, compressed: nn.Module) -> LayerReport:
    """The row of one layer; sizes and ranks are those of the layer in the compressed model, not those of the plan."""
    before = dense_cost(spec, getattr(torch, spec.dtype).itemsize)
    layer = None
    if spec.can_be_sketched or spec.groups > 1:
        with contextlib.suppress(AttributeError):  # a projection of attention that was closed again
            layer = compressed.get_submodule(spec.name)
    if layer is not None and is_narrowed(layer) and not isinstance(layer, SketchedLayer):
        return _narrowed_report(spec, choice, layer, before)
    if not isinstance(layer, SketchedLayer):
        reason = "; ".join(spec.blockers) or (choice.reason if choice else "") or "the plan leaves it dense"
        return LayerReport(spec.name, spec.kind, spec.shape, "dense", (), 0, 1.0, 0.0, before, before, reason)
    after = _stored_cost(spec, layer)
    return LayerReport(
        name=spec.name,
        kind=spec.kind,
        shape=spec.shape,
        scheme=layer.scheme,
        ranks=layer.ranks,
        terms=0 if layer.scheme == chains.WHOLE else layer.num_terms,
        kept=after.params / spec.params,
        error=choice.error if choice else 0.0,
        before=before,
        after=after,
        packing=layer.PACKING,
        channels=_channels(spec, layer),
        stored=str(layer.grid) if isinstance(layer, IN_WHOLE_NUMBERS) else "",
    )


def _narrowed_report(spec: LayerSpec, choice: Choice | None, layer: nn.Module, before: Cost) -> LayerReport:
    """The row of a layer that has fewer channels than it had; its rank is their number."""
    weight = cast(Tensor, layer.weight)
    gained = [] if spec.has_bias or layer.bias is None else [cast(Tensor, layer.bias)]
    numbers = [weight, *gained]
    flops = 2 * spec.rows * weight.numel()
    after = Cost(sum(t.numel() for t in numbers), flops, sum(map(tensor_bytes, numbers)))
    return LayerReport(
        name=spec.name,
        kind=spec.kind,
        shape=spec.shape,
        scheme=CHANNELS,
        ranks=(_channels(spec, layer),),
        terms=0,
        kept=after.params / spec.params,
        error=0.0 if choice is None else choice.error,
        before=before,
        after=after,
        packing="dense",
        channels=_channels(spec, layer),
    )


def _channels(spec: LayerSpec, layer: nn.Module) -> int:
    """How many of the channels to or from its neighbour are left; 0: all."""
    if not is_narrowed(layer):
        return 0
    inputs, outputs = sizes_of(layer)
    return inputs if outputs == spec.out_features else outputs


def _stored_cost(spec: LayerSpec, layer: SketchedLayer) -> Cost:
    """Numbers and bytes in the layer, a bias that it had when dense left out, and the operations of its chain.

    The order of its channels counts among them as far as the layer still stores it.
    """
    inputs, outputs = sizes_of(layer)
    now = changed(spec, in_features=inputs, out_features=outputs)
    if isinstance(layer, IN_WHOLE_NUMBERS):
        gained = 0 if spec.has_bias or layer.bias is None else layer.bias.numel()
        size = sum(tensor_bytes(tensor) for part in layer.stored for tensor in part.for_file().values())
        orders = [order for name in ORDERS if (order := getattr(layer, name, None)) is not None]
        places = sum(order.numel() for order in orders)
        size += sum(map(tensor_bytes, orders))
        grids = chains.grids_for(layer.scheme, layer.grid, len(layer._links))
        cost = chains.quantised_cost(layer.scheme, now, layer.ranks, grids, layer.PACKING)
        numbers = sum(part.numbers for part in layer.stored)
        return Cost(numbers + places, cost.flops, size) + Cost(
            gained, 0, gained * layer.stored[0].scales.element_size()
        )
    counted = [tensor for name, tensor in stored_tensors(layer).items() if name != layer.BIAS or not spec.has_bias]
    flops = chain_cost(layer.scheme, now, layer.ranks, 1, layer.PACKING).flops
    return Cost(sum(t.numel() for t in counted), flops, sum(map(tensor_bytes, counted)))


# The report -----------------------------------------------------------------------------------------------------------


def verify(
    dense: nn.Module,
    compressed: nn.Module,
    *,
    capture: Capture,
    plan: Plan,
    target: Target,
    example: Call,
    held_out: Sequence[Call] = (),
    is_held_out: bool = True,
    eval_fn: Callable[[nn.Module], float] | None = None,
    seconds: Mapping[str, float] | None = None,
    notes: Sequence[str] = (),
    seed: int = 0,
    measure: bool = True,
    opened: nn.Module | None = None,
    dense_metric: float | None = None,
    healing: Healed | None = None,
) -> Report:
    """The whole report of one compression: every layer, both models' totals, and how well their outputs agree.

    `held_out` are the calls that agreement is measured on (the example inputs when there are none); `is_held_out` says
    that nothing was fitted to them. `measure=False` only counts, and measures what the target limits: nothing else of
    latency, memory, agreement and metric. A measurement that fails becomes a note, because by now there is a compressed
    model to lose. `opened` is the dense model with the layers that `capture` names, where it has not got
    them itself, and `dense_metric` what eval_fn says of the dense model, where that is known, and `healing` what
    healing did.
    """
    start = time.perf_counter()
    choices = {choice.layer: choice for choice in plan.choices}
    rows = tuple(layer_report(spec, choices.get(spec.name), compressed) for spec in capture.layers)
    before, after = sum((r.before for r in rows), Cost()), sum((r.after for r in rows), Cost())
    sketchable = {spec.name for spec in capture.sketchable}
    stored = sum((row.after for row in rows if row.name in sketchable), Cost())
    said = [*notes, *capture.notes]
    calls = tuple(held_out) or (example,)
    wanted = MEASUREMENTS if measure else _limited(target)
    measured = _measurements(dense, compressed, example, calls, eval_fn, dense_metric, wanted, said)
    baselines: tuple[Baseline, ...] = ()
    if measure:
        whole = dense if opened is None else opened
        rounded = functools.partial(baselines_of, dense, whole, capture, example, calls)
        baselines = _or_note("int8 and int4 alone", rounded, (), said)
    totals = [
        figures(model, cost.flops, latency_ms=latency, peak_memory_bytes=memory)
        for model, cost, latency, memory in zip(
            (dense, compressed), (before, after), measured.latency_ms, measured.peak_memory_bytes, strict=True
        )
    ]
    said += _verdicts(totals[0], totals[1], measured.agreement)
    limits = tuple(_limits(target, stored, totals[0], totals[1], measured.metric))
    said += [_missed(limit, totals[1].size_bytes - stored.size_bytes) for limit in limits if not limit.met]
    if measured.agreement and not (held_out and is_held_out):
        on_example = all(call is example for call in calls)
        what = "the example inputs only" if on_example else "inputs that were not kept aside from the fit"
        said.append(f"agreement is measured on {what}: give more calibration batches for a measurement on unseen ones")
    return Report(
        target=target.text,
        budget_met=all(limit.met for limit in limits),
        capture_way=capture.way,
        layers=rows,
        dense=totals[0],
        compressed=totals[1],
        agreement=measured.agreement,
        agreement_batches=len(calls) if measured.agreement else 0,
        agreement_held_out=bool(held_out) and is_held_out,
        metric=measured.metric,
        seconds={**(seconds or {}), "verify": time.perf_counter() - start},
        environment=environment(compressed, seed),
        notes=tuple(dict.fromkeys(said)),
        limits=limits,
        healing=healing,
        baselines=baselines,
    )


def baselines_of(
    dense: nn.Module, opened: nn.Module, capture: Capture, example: Call, calls: Sequence[Call]
) -> tuple[Baseline, ...]:
    """What whole numbers alone would do: the sketchable layers rounded to each number of bits, one scale a row.

    opened: the dense model, with these layers in it.

    All of them run in turn with the dense model, whose milliseconds theirs are relative to.
    """
    names = [spec.name for spec in capture.sketchable]
    models = {dtype: _rounded(opened, names, BITS[dtype]) for dtype in BASELINES}
    flops = sum(spec.flops for spec in capture.layers)
    _, *times = latencies([dense, *models.values()], example)
    return tuple(
        Baseline(dtype, figures(model, flops, latency_ms=taken), agreement(dense, model, calls))
        for (dtype, model), taken in zip(models.items(), times, strict=True)
    )


def _rounded(dense: nn.Module, names: Sequence[str], bits: int) -> nn.Module:
    """A copy of a model with these layers in whole numbers."""
    layers = {}
    for name in names:
        layer = dense.get_submodule(name)
        kind = next(kind for kind in QUANTISED if isinstance(layer, kind))
        layers[name] = QUANTISED[kind].from_dense(as_plain(layer, kind), bits=bits)
    return layers[""] if "" in layers else with_layers(dense, layers)


@dataclass(frozen=True)
class _Measured:
    """What was measured of (dense, compressed); the defaults say that nothing was."""

    latency_ms: tuple[float | None, float | None] = (None, None)
    peak_memory_bytes: tuple[int | None, int | None] = (None, None)
    agreement: Mapping[str, float] = field(default_factory=dict)
    metric: tuple[float, float] | None = None


def _measurements(
    dense: nn.Module,
    compressed: nn.Module,
    example: Call,
    calls: Sequence[Call],
    eval_fn: Callable[[nn.Module], float] | None,
    dense_metric: float | None,
    wanted: Collection[str],
    notes: list[str],
) -> _Measured:
    """The measurements that are wanted; what fails is left out and noted."""
    none = _Measured()

    def measured(what: str, measure: Callable[[], T], otherwise: T) -> T:
        return _or_note(what, measure, otherwise, notes) if what in wanted else otherwise

    return _Measured(
        latency_ms=measured(LATENCY, lambda: measure_latency(dense, compressed, example), none.latency_ms),
        peak_memory_bytes=measured(
            PEAK_MEMORY,
            lambda: (peak_memory(dense, example), peak_memory(compressed, example)),
            none.peak_memory_bytes,
        ),
        agreement=measured(AGREEMENT, lambda: _agreement_or_note(dense, compressed, calls, notes), none.agreement),
        metric=measured(METRIC, lambda: _metric(dense, compressed, eval_fn, dense_metric), none.metric),
    )


def _agreement_or_note(
    dense: nn.Module, compressed: nn.Module, calls: Sequence[Call], notes: list[str]
) -> Mapping[str, float]:
    found = agreement(dense, compressed, calls)
    if not found:
        notes.append(
            "the outputs cannot be compared, so nothing says how well the models agree: they hold no floating-point "
            "numbers in a tensor, tuple, dict or dataclass. Wrap the model so that it returns such, or give eval_fn=..."
        )
    return found


def _limited(target: Target) -> set[str]:
    """The measurements that decide whether a target is met."""
    limits = {LATENCY: target.model_latency_ms, PEAK_MEMORY: target.peak_memory_bytes, METRIC: target.max_drop}
    return {what for what, limit in limits.items() if limit is not None}


def _or_note(what: str, measure: Callable[[], T], otherwise: T, notes: list[str]) -> T:
    try:
        return measure()
    except Exception as error:  # the user's eval_fn and batches raise whatever they like; the model is not lost for it
        notes.append(f"{what} could not be measured: {one_line(error)}")
        return otherwise


def _metric(
    dense: nn.Module,
    compressed: nn.Module,
    eval_fn: Callable[[nn.Module], float] | None,
    dense_metric: float | None,
) -> tuple[float, float] | None:
    if eval_fn is None:
        return None
    before = metric(dense, eval_fn) if dense_metric is None else dense_metric
    return before, metric(compressed, eval_fn)


def metric(model: nn.Module, eval_fn: Callable[[nn.Module], Any]) -> float:
    """What eval_fn says of a model in evaluation mode: a number, also as a NumPy scalar or a tensor of one element.

    Raises: TypeError when it answers with something else, ValueError when the number is not finite; whatever eval_fn
        raises.
    """
    with inference(model):
        answer = eval_fn(model)
    is_single = (isinstance(answer, Tensor) and answer.numel() == 1) or getattr(answer, "size", 0) == 1
    value = answer.item() if is_single else answer
    if not isinstance(value, int | float):
        raise TypeError(
            f"eval_fn answered with {type(answer).__name__}: expected one number, higher is better (a float, a NumPy "
            "scalar or a tensor of one element)"
        )
    if not math.isfinite(value):
        raise ValueError(f"eval_fn answered with {value}: expected a finite number, higher is better")
    return float(value)


def _verdicts(dense: Figures, compressed: Figures, agreed: Mapping[str, float]) -> Iterator[str]:
    """What a reader must not overlook in the totals."""
    if dense.latency_ms and compressed.latency_ms and round(dense.latency_ms / compressed.latency_ms, 2) <= 1:
        yield f"not faster than the dense model at these inputs ({dense.latency_ms / compressed.latency_ms:.2f}x)"
    if compressed.size_bytes > dense.size_bytes:
        yield f"larger than the dense model ({compressed.size_bytes:,} against {dense.size_bytes:,} bytes)"
    if (
        dense.peak_memory_bytes
        and compressed.peak_memory_bytes
        and compressed.peak_memory_bytes > dense.peak_memory_bytes
    ):
        yield (
            "needs more memory while it runs than the dense model "
            f"({compressed.peak_memory_bytes:,} against {dense.peak_memory_bytes:,} bytes)"
        )
    if agreed.get("non_finite"):
        yield (
            f"{agreed['non_finite']:.1%} of the output rows hold NaN or Inf in one of the models and are left out of "
            "the agreement: look at the inputs, and at the dense model's own outputs, first"
        )
    if agreed.get("cosine", 1.0) < POOR_COSINE:
        yield (
            f"the outputs hardly agree (cosine {agreed['cosine']:.2f}): keep more, give calibration data from the real "
            "task, or exclude the layers with the largest error"
        )


def _limits(
    target: Target, stored: Cost, dense: Figures, compressed: Figures, metrics: tuple[float, float] | None
) -> Iterator[LimitReport]:
    """Every limit beside what the compressed model needs; where the file is limited, the file itself is what counts."""

    def limit(name: str, at_most: float | None, got: float | None, unit: str) -> Iterator[LimitReport]:
        if at_most is not None:
            yield LimitReport(name, at_most, got, unit, met=got is not None and got <= at_most)

    yield from limit("sketchable weights", target.params, stored.params, "numbers")
    yield from limit("operations of the sketchable layers", target.flops, stored.flops, "FLOPs")
    if target.file_bytes is not None:  # the layers' part of the file is a limit for allocators, less a reserve
        yield from limit("saved file", target.file_bytes, compressed.size_bytes, "bytes")
    else:
        yield from limit("bytes of the sketchable layers", target.size_bytes, stored.size_bytes, "bytes")
    latency = target.model_latency_ms
    if target.latency_share is not None and dense.latency_ms is not None:  # of the dense model in the same run
        latency = target.latency_share * dense.latency_ms
    yield from limit("latency", latency, compressed.latency_ms, "ms")
    yield from limit("peak memory", target.peak_memory_bytes, compressed.peak_memory_bytes, "bytes")
    if target.max_drop is not None:
        drop = None if metrics is None else metrics[0] - metrics[1]
        met = metrics is not None and target.allows_drop(*metrics)
        yield LimitReport("drop of eval_fn", target.max_drop, drop, "", met)


# What a missed limit reads like, by its name.
_SAID = {
    "sketchable weights": "the sketchable layers hold {got:,} params, at most {limit:,} were asked for",
    "operations of the sketchable layers": "the sketchable layers need {got:,} flops, at most {limit:,} were asked for",
    "saved file": "the saved file takes {got:,} bytes, at most {limit:,} were asked for; {others:,} of them are in "
    "what cannot be sketched",
    "bytes of the sketchable layers": "the sketchable layers hold {got:,} size_bytes, at most {limit:,} were asked for",
    "latency": "one run of the example inputs takes {got:.4g} ms, at most {limit:.4g} were asked for",
    "peak memory": "one run of the example inputs needs {got:,} bytes, at most {limit:,} were asked for",
    "drop of eval_fn": "eval_fn falls by {got:.4g}, at most {limit:.4g} was asked for",
}


def _missed(limit: LimitReport, others: int) -> str:
    """others: bytes of the file that are in no layer that can be sketched."""
    if limit.got is None:
        return f"budget not met: the {limit.name} could not be measured"
    return "budget not met: " + _SAID[limit.name].format(got=limit.got, limit=limit.limit, others=others)


def environment(model: nn.Module, seed: int) -> dict[str, str]:
    """Where the numbers were measured."""
    device = device_of(model)
    return {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cpu": _cpu_name(),
        "compiled kernels": ", ".join(build_info().kernels) or "none",
        "seed": str(seed),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
