"""compress(): the stages in order, and the result that people hold in their hands."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from panther.allocate import in_file, resolve
from panther.allocators import Allocator
from panther.batches import (
    Calibration,
    Call,
    are_equal,
    as_call,
    calibration,
    is_for_inference,
    weights_may_change,
)
from panther.capture import capture, in_no_layer, refuse_opaque
from panther.channels import counted_by_nobody, counts_of, narrowable, with_counts
from panther.decompose import candidates, decompose, refuse_non_finite, with_pair
from panther.errors import CaptureError, LoadError, PlanError
from panther.factors import Factors, Profile
from panther.gradients import chunk_size
from panther.heal import fingerprint
from panther.healers.checkpoint import forget, saved_plan
from panther.importance import CLOSER, SAMPLES, affordable_samples, reference
from panther.measure import check_batches, measure, passes
from panther.nn.surgery import copied, put_layers
from panther.opening import Opened, opened
from panther.padding import without_padding
from panther.prepared import Dense, Prepared, tensors_of, timed
from panther.progress import Progress
from panther.replace import changed_layers
from panther.request import Request, check_arguments, parse_budget, parse_seed
from panther.selection import selected
from panther.sizes import storage_of
from panther.solve import Found, finished_model, search_plan
from panther.spec import DTYPES, Budget, Capture, Choice, Heal, LayerReport, Plan, Report, Target
from panther.trials import earlier_tuning, trials_file
from panther.verify import verify as check


@dataclass(frozen=True)
class Result:
    """A compressed model, how it was made, and what it is worth."""

    model: nn.Module
    report: Report
    plan: Plan
    target: Target
    _prepared: Prepared | None = field(repr=False)
    _example: Call = field(repr=False)

    @property
    def budget_met(self) -> bool:
        return self.report.budget_met

    @weights_may_change()
    def resolve(self, budget: Any) -> Result:
        """The result for another budget, without measuring or decomposing again.

        Raises: RuntimeError after compress(..., inplace=True), which gives the dense layers up, and where the dense
        model is no longer what it was then.
        """
        if self._prepared is None:
            raise RuntimeError("resolve() needs the dense layers, which inplace=True gave up: call compress again")
        known = self._prepared
        if known.is_changed():
            raise RuntimeError(
                f"resolve() needs the dense model as it was measured, and the {type(known.request.given).__name__} has "
                "been changed since (trained, moved to another dtype, or compressed in place): call compress again"
            )
        wanted = parse_budget(budget, known.request.eval_fn)
        known.request.progress.say("target: " + _target(known.dense, known.found, known.dtype_bytes, wanted).text)
        return solved(known, wanted, plan=None)

    def save(self, folder: str | Path) -> Path:
        """Write model.safetensors and panther.json; read them again with panther.load(folder, model=...)."""
        from panther.converters.compressed import save

        return save(self.model, folder, plan=self.plan, report=self.report)

    def export_onnx(self, path: str | Path, **options: Any) -> Any:
        """Write a standard ONNX file, read it back and compare it before its path is returned (an ExportReport)."""
        from panther.converters import WRITERS

        return WRITERS["onnx"](self.model, path, _as_wide(self._example, self.model), **options)


def analyze(
    model: nn.Module,
    example_inputs: Any,
    *,
    include: Sequence[Any] | None = None,
    exclude: Sequence[Any] | None = None,
) -> Capture:
    """What compress would offer to sketch, what it would not, and why; nothing is changed.

    Raises: CaptureError when the model does not run on the example inputs.
    """
    example = as_call(example_inputs)
    return _captured(_opened(model, example)[1], example, include, exclude)


def _as_wide(example: Call, model: nn.Module) -> Call:
    """The example with inputs of half precision as the model's numbers are, which may have been cast since."""
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if len(kinds) != 1:
        return example
    (wanted,), halves = kinds, (torch.float16, torch.bfloat16)

    def cast_(value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(wanted) if is_float and value.dtype != wanted and (value.dtype in halves) else value

    return Call(*tree_map(cast_, (example.args, dict(example.kwargs))))


@weights_may_change()
def compress(
    model: nn.Module,
    budget: Any,
    *,
    example_inputs: Any,
    calib_data: Any = None,
    eval_fn: Callable[[nn.Module], float] | None = None,
    include: Sequence[Any] | None = None,
    exclude: Sequence[Any] | None = None,
    plan: Plan | str | None = None,
    search: str | Allocator = "sensitivity",
    n_trials: int | None = None,
    timeout: float | None = None,
    dtypes: Sequence[str] = ("float32",),
    heal: str | Heal = "auto",
    seed: int = 0,
    device: torch.device | str | None = None,
    inplace: bool = False,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    verify: bool = True,
) -> Result:
    """A smaller model of the same class and call signature, checked against the dense one.

    budget: the fraction of the sketchable weights KEPT (0.5, "50%"), a panther.Budget or a dict of its fields. What it
        limits is measured, also with verify=False. Milliseconds differ from run to run, and plans for them with them.
    example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments, as for torch.export.
    calib_data: an iterable of inputs, of (input, target) pairs or of dicts; unlabelled. Without it the weights alone
        decide, which costs much accuracy.
    eval_fn: eval_fn(model) -> one number, higher is better; shown for both models in the report. A budget with max_drop
        needs it, and without another limit looks for the smallest model that holds it, in eight to twelve evaluations.
    include, exclude: layer names, globs ("encoder.*"), "re:..." or layer classes.
    plan: a Plan (or its JSON) instead of a search.
    search: "sensitivity", "uniform", "tuned", or an allocator of your own (panther.allocators.Allocator). "tuned" goes
        on from the sensitivity plan, evaluates `n_trials` plans (40) with eval_fn, or as many as `timeout` seconds
        allow, and takes the best. Ctrl-C ends it with the best so far. Without eval_fn it goes by how far the outputs
        are from the dense model's.
    dtypes: what weights may be stored in. "int8", "int4" and "int3" add layers of whole numbers with scales, alone and
        as factors, for budgets of size_mb (they save bytes, and no operations), "bfloat16" the same at half the bytes;
        "float32" is each layer's own dtype, and without it every layer that is changed is stored in one of the others.
        Healing trains with the rounding in place.
    heal: "none" (biases only), "refit" (closed form), "blocks", "distill" or "auto" (all of them, 300 s at most), or a
        panther.Heal with its limits. It needs calib_data. The layers of a result that the clock cut short differ from
        run to run; Heal(steps=...) does not look at the clock before its time limit.
    checkpoint: a file that healing is saved to after every stage, block and check, and beside it, as NAME.trials, every
        trial of a tuned search. Given again with the same arguments after the process was killed, the run goes on from
        there; at the end the files are removed.
    inplace: put the sketched layers into `model` itself.
    verify: measure latency, memory and agreement of both models; sizes are counted in any case.

    Raises: ValueError or TypeError for a bad argument, CaptureError when the model does not run or holds nothing to
    sketch, CalibrationError for unusable data, PlanError for a plan of another architecture. The model is unchanged
    after any error, and after Ctrl-C.
    """
    wanted, seed = parse_budget(budget, eval_fn), parse_seed(seed)
    check_arguments(
        model=model,
        search=search,
        n_trials=n_trials,
        timeout=timeout,
        dtypes=dtypes,
        inplace=inplace,
        has_plan=plan is not None,
    )
    if inplace and is_for_inference(model):
        raise ValueError(
            "inplace=True cannot write into a model that was made in torch.inference_mode: leave it out, or make the "
            "model outside of that mode"
        )
    if plan is None and checkpoint is not None:
        plan = _plan_in(Path(checkpoint), budget=str(wanted), seed=seed, search=search, dtypes=tuple(dtypes))
        if plan is not None and (calib_data is None or Heal.parse(heal).mode == "none"):
            raise LoadError(
                f"{checkpoint} is the checkpoint of a run that heals, and this one has "
                f"{'no calib_data' if calib_data is None else 'heal=none'}: give the same arguments as then, another "
                "name, or delete it to begin anew"
            )
    if plan is not None and not isinstance(plan, Plan):
        plan = Plan.from_json(plan)
    if plan is not None:  # which says itself what it stores weights in
        stored = dict.fromkeys(choice.dtype for choice in plan.choices if choice.grid is not None)
        dtypes = tuple(dict.fromkeys((*dtypes, *stored)))
    request = request_for(
        model if device is None else copied(model, {}, None)[0].to(device),
        as_call(example_inputs),
        budget=wanted,
        calib_data=calib_data,
        eval_fn=eval_fn,
        include=include,
        exclude=exclude,
        plan=plan,
        search=search,
        heal=Heal.parse(heal),
        checkpoint=None if checkpoint is None else Path(checkpoint),
        seed=seed,
        progress=Progress(progress),
        verify=verify,
        n_trials=n_trials,
        timeout=timeout,
        dtypes=tuple(dtypes),
    )
    result = solved(prepared_for(request), wanted, plan)
    if not inplace:
        return changed(result, _prepared=cast(Prepared, result._prepared).without_checkpoint())
    if device is not None:
        model.to(device)
    known = cast(Prepared, result._prepared).factors
    changed_names = [name for c in result.plan.sketched for name in changed_layers(known, c)]
    places = dict.fromkeys(map(request.opened.holder, changed_names))
    put_layers(model, {name: result.model.get_submodule(name) for name in places})
    _copy_numbers(result.model, model)
    return changed(result, model=model, _prepared=None)


@torch.no_grad()
def _copy_numbers(source: nn.Module, model: nn.Module) -> None:
    """Give a model the numbers of another that has layers of the same names: what healing or another order changed.

    Not by way of state_dict, which a model may write as it likes.
    """
    held = _tensors(model)
    storages = Counter(storage_of(tensor) for tensor in held.values())
    for name, value in _tensors(source).items():
        tensor = held[name]
        if tensor is value or are_equal(tensor, value):
            continue
        if storages[storage_of(tensor)] > 1:  # others, which keep their numbers, lie in the same memory
            tensor.data = value.detach().clone()
        else:
            tensor.copy_(value)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def request_for(model: nn.Module, example: Call, **others: Any) -> Request:
    """The request for a model with checked arguments.

    Raises: CaptureError for a model of a kind that hides its layers.
    """
    given, found = _opened(model, example)
    return Request(given=given, opened=found, example=example, **others)


def _opened(model: nn.Module, example: Call) -> tuple[nn.Module, Opened]:
    """The model, a copy of it where its parameters were made in inference mode, and the same opened."""
    refuse_opaque(model)
    given = copied(model, {}, None)[0] if is_for_inference(model) else model
    return given, opened(given, example)


def _captured(model: Opened, example: Call, include: Sequence[Any] | None, exclude: Sequence[Any] | None) -> Capture:
    found = capture(model.model, example)
    found = changed(found, notes=(*found.notes, *in_no_layer(model.model, found.layers)))
    return selected(found, model.model, include, exclude, model.was)


def _plan_in(
    checkpoint: Path, *, budget: str, seed: int, search: str | Allocator, dtypes: tuple[str, ...]
) -> Plan | None:
    """The plan that a killed run was healing; None where there was no such run.

    Raises: LoadError when that run was asked for something else.
    """
    text = saved_plan(checkpoint)
    if text is None:
        return None
    plan = Plan.from_json(text)
    asked: dict[str, Any] = {"budget": budget, "seed": seed, "dtypes": dtypes}
    asked["search"] = search if isinstance(search, str) else plan.allocator
    used = tuple(dict.fromkeys(DTYPES[0] if c.grid is None else c.dtype for c in plan.sketched))
    found = {"budget": plan.budget, "seed": plan.seed, "search": plan.allocator}
    found["dtypes"] = dtypes if set(used) <= set(dtypes) else used  # the checkpoint knows whether all are the same
    other = ", ".join(f"{name} {found[name]!r}, now {asked[name]!r}" for name in asked if found[name] != asked[name])
    if other:
        raise LoadError(
            f"{checkpoint} is a checkpoint of another run ({other}): give the same arguments as then, another name, or "
            "delete it to begin anew"
        )
    return plan


def prepared_for(request: Request) -> Prepared:
    """Capture, measure and decompose: everything that another budget can use again."""
    model, example, dense = request.model, request.example, Dense(request)
    seconds: dict[str, float] = {}
    with timed(seconds, "capture"):
        found = _captured(request.opened, example, request.include, request.exclude)
    if not found.sketchable:
        raise CaptureError(_nothing_to_sketch(model, found))
    if request.plan is not None:
        request.plan.check_fits(found)
    weights = {spec.name: _weight(model, spec.name) for spec in found.sketchable}
    for name, weight in weights.items():
        refuse_non_finite(weight, name)
    dtype_bytes = {name: weight.element_size() for name, weight in weights.items()}
    target = _target(dense, found, dtype_bytes, request.budget)
    request.progress.say("target: " + (target.text if request.plan is None else "the given plan"))
    notes: list[str] = []
    data = None
    if request.calib_data is not None:
        data, note = without_padding(calibration(request.calib_data, example, model))
        notes.extend(said for said in (data.note, note) if said)
        check_batches(model, data.held_out, data.stop or 0)
    else:
        text = (
            "no calibration data: the weights alone decide. On real models this loses several times more of the output "
            "than with a few hundred unlabelled inputs (calib_data=...)."
        )
        warnings.warn(text, UserWarning, stacklevel=4)  # of whoever calls compress, which has a decorator
        notes.append(text)
    factors = _factors(request, found, data, seconds, notes)
    notes.extend(_thin(factors))
    options = {name: candidates(f, dtype_bytes[name], dtypes=request.dtypes) for name, f in factors.items()}
    with timed(seconds, "importance"):
        samples = affordable_samples(found, example)
        calls = [example] if data is None else list(_first(_unfitted_first(data), samples))
        against = reference(model, calls, samples)
    closer = () if data is None else _closer(data, samples, sum(call.batch_size for call in against.calls))
    return Prepared(
        request,
        dense,
        found,
        data,
        factors,
        options,
        against,
        dtype_bytes,
        seconds,
        tuple(notes),
        closer,
        was=fingerprint(tensors_of(request.given)),
    )


def _target(dense: Dense, found: Capture, dtype_bytes: Mapping[str, int], budget: Budget) -> Target:
    return resolve(budget, found, dtype_bytes, dense.measured(budget))


def _unfitted_first(data: Calibration) -> Iterator[Call]:
    """The batches that no layer is decomposed on, then the others.

    Where a layer saw few rows for its features, an error on the same rows says too little. EfficientNet-lite0 at keep
    .7, unhealed, top-1 agreement on 256 other inputs: .711 by the rows of calibration, .750 by held-out ones.
    """
    return itertools.chain(data.held_out if data.is_held_out else (), data)


def _closer(data: Calibration, samples: int, seen: int) -> tuple[Call, ...]:
    """Inputs of several times as many samples; none where the data has not got them, or `seen` are enough."""
    wanted = min(SAMPLES, CLOSER * samples)
    calls = tuple(_first(_unfitted_first(data), wanted))
    return calls if samples < wanted and sum(call.batch_size for call in calls) > seen else ()


def _first(data: Iterable[Call], samples: int) -> Iterator[Call]:
    """Enough batches for this many samples."""
    seen = 0
    for call in data:
        yield call
        seen += call.batch_size
        if seen >= samples:
            return


def _weight(model: nn.Module, name: str) -> torch.Tensor:
    return cast(torch.Tensor, model.get_submodule(name).weight).detach()


def _factors(
    request: Request, found: Capture, data: Calibration | None, seconds: dict[str, float], notes: list[str]
) -> dict[str, Factors]:
    """Layers measured in as many passes as memory asks for, each decomposed and its statistics freed."""
    model, example, seed, progress = request.model, request.example, request.seed, request.progress
    factors: dict[str, Factors] = {}
    chunk = chunk_size(found.layers, example.batch_size)
    if chunk == 0 and data is not None:
        notes.append("a backward pass would need too much memory, so all outputs of a layer count the same")
    pairs = narrowable(found.sketchable, found.followers) if request.may_narrow else {}
    alike = counted_by_nobody(request.model, pairs, request.example)
    if len(alike) < len(pairs):
        names = ", ".join(name for name in pairs if name not in alike)
        notes.append(f"{names} keep all their channels: with fewer the model does something else")
    pairs = alike
    rounds = bool(request.grids)
    parts = passes(found.sketchable, pairs, for_rounding=rounds) if data is not None else [list(found.sketchable)]
    for part in parts:
        profiles: dict[str, Profile] = {}
        if data is not None:
            with timed(seconds, "measure"):
                samples = len(data) * next(iter(data)).batch_size
                measured = measure(
                    model,
                    part,
                    data,
                    samples=samples,
                    channels_of=pairs,
                    gradient_samples=None if chunk else 0,
                    chunk=max(1, chunk),
                    for_rounding=rounds,
                    seed=seed,
                    progress=progress,
                    total=len(data),
                )
            profiles = measured.profiles
            if measured.not_differentiated is not None:
                reason = measured.not_differentiated
                text = f"the model cannot be differentiated, so all outputs of a layer count the same ({reason})"
                notes.extend([] if text in notes else [text])
        with timed(seconds, "decompose"):
            for spec in progress.track(part, "decomposing", len(part)):
                module = model.get_submodule(spec.name)
                profile = profiles.pop(spec.name, None)
                pair = pairs.get(spec.name)
                factors[spec.name] = decompose(
                    module,
                    spec,
                    profile,
                    seed=seed,
                    pair=pair,
                    grids=request.grids,
                    rounds_by_data=request.heal.mode != "none",
                )
    return {spec.name: factors[spec.name] for spec in found.sketchable}


def _thin(factors: Mapping[str, Factors]) -> Iterator[str]:
    """A note when layers saw too few rows to know their covariance."""
    thin = [n for n, f in factors.items() if 0 < f.profile.rows < 10 * min(f.spec.fan_in, f.spec.out_features)]
    unseen = [n for n, f in factors.items() if f.profile.rows == 0]
    if thin:
        least = min(factors[n].profile.rows for n in thin)
        layers = thin[0] if len(thin) == 1 else f"{len(thin)} layers"
        yield f"{layers} saw fewer than 10 rows a feature (least: {least}): more calibration data gives better ranks"
    if unseen and len(unseen) < len(factors):
        yield f"the calibration data never reached {', '.join(unseen)}: decomposed from the weights alone"


def solved(prepared: Prepared, budget: Budget, plan: Plan | None) -> Result:
    """Allocate, replace and verify for one budget."""
    request, target = prepared.request, _target(prepared.dense, prepared.found, prepared.dtype_bytes, budget)
    notes = list(prepared.notes)
    if plan is None:
        found = search_plan(prepared, budget, target, notes)
    else:
        found = Found(_completed(plan, prepared), target, dict(prepared.seconds), earlier_tuning(prepared, notes))
    plan, target, seconds, tuning = found
    with timed(seconds, "replace and heal"):
        compressed, healing = finished_model(prepared, plan, target, notes)
    request.opened.close(compressed, request.given)
    report = check(
        request.given,
        compressed,
        capture=prepared.found,
        plan=plan,
        target=target,
        example=request.example,
        held_out=prepared.data.held_out if prepared.data is not None else (request.example,),
        is_held_out=prepared.data.is_held_out if prepared.data is not None else False,
        eval_fn=request.eval_fn,
        seconds=seconds,
        notes=notes,
        seed=request.seed,
        measure=request.verify,
        opened=request.model,
        dense_metric=None if budget.max_drop is None else prepared.dense.metric,
        healing=healing,
    )
    if request.checkpoint is not None and healing is not None and not healing.interrupted:
        forget(request.checkpoint)  # a file that this run went on from, or wrote
    if request.checkpoint is not None and not request.checkpoint.exists():
        forget(trials_file(request.checkpoint))
    report = changed(report, tuning=tuning, layers=tuple(_marked(row, prepared.factors) for row in report.layers))
    return Result(compressed, report, plan, target, prepared, request.example)


def _marked(row: LayerReport, factors: Mapping[str, Factors]) -> LayerReport:
    """A row of the report that says whether its error is of fewer rows than the layer has inputs."""
    known = factors.get(row.name)
    if known is None or row.scheme == "dense":
        return row
    return changed(row, in_sample=0 < known.profile.rows < known.spec.fan_in)


def _completed(plan: Plan, prepared: Prepared) -> Plan:
    """A given plan with a choice for every layer: costs and errors are this model's, not the file's.

    Raises: PlanError when it asks for a rank, scheme or channels that the layer cannot have.
    """
    given = {c.layer: c for c in plan.choices}
    counts = counts_of(plan, prepared.factors)
    narrow = with_counts(
        prepared.request.model,
        prepared.factors,
        prepared.options,
        counts,
        prepared.dtype_bytes,
        dtypes=prepared.request.dtypes,
        seed=prepared.request.seed,
    )
    choices = []
    for name, options in in_file(narrow.options, prepared.found).items():
        choice = given.get(name)
        if choice is None or choice.is_dense:
            choices.append(changed(options[-1], reason=choice.reason if choice else "the plan leaves it dense"))
            continue
        fits = [option for option in _with_its_ranks(options, choice, prepared) if option.kind == choice.kind]
        if not fits:
            known = ", ".join(dict.fromkeys(o.scheme for o in options[:-1]))
            raise PlanError(
                f"the plan gives {name!r} scheme {choice.scheme!r} at ranks {choice.ranks} in packing "
                f"{choice.packing!r}, which would not make it smaller or is not a multiple of its step; schemes of "
                f"this layer: {known}"
            )
        choices.append(changed(fits[0], reason=choice.reason))
    return changed(plan, choices=tuple(choices), fingerprint=prepared.found.fingerprint)


def _with_its_ranks(options: Sequence[Choice], choice: Choice, prepared: Prepared) -> Sequence[Choice]:
    """The options of a layer; those of a choice's own ranks as well, where tucker2 does not offer them by itself."""
    if choice.scheme != "tucker2" or choice.kind in {option.kind for option in options}:
        return options
    factors = with_pair(prepared.factors[choice.layer], choice.ranks)
    more = candidates(factors, prepared.dtype_bytes[choice.layer], dtypes=prepared.request.dtypes)
    return in_file({choice.layer: more}, prepared.found)[choice.layer]


def _nothing_to_sketch(model: nn.Module, found: Capture) -> str:
    if not found.layers:
        return (
            f"{type(model).__name__} has no Linear or Conv layer that runs on the example inputs: nothing to compress"
        )
    reasons = "; ".join(f"{s.name}: {s.blockers[0]}" for s in found.layers[:5])
    return f"none of the {len(found.layers)} dense layers of {type(model).__name__} can be sketched ({reasons})"
