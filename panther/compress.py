"""compress(): the stages in order, and the result that people hold in their hands."""

from __future__ import annotations

import copy
import fnmatch
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from dataclasses import replace as changed
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from panther.allocate import allocate, resolve
from panther.allocators import ALLOCATORS, Allocator
from panther.batches import Calibration, Call, as_call, calibration, inference, run
from panther.capture import capture
from panther.decompose import candidates, decompose, refuse_non_finite
from panther.errors import CaptureError, PantherError, PlanError
from panther.factors import Factors, Profile
from panther.gradients import chunk_size
from panther.importance import Importance, Reference, affordable_samples, importance, reference
from panther.measure import check_batches, measure, passes
from panther.nn.surgery import put_layers
from panther.progress import Progress
from panther.replace import replace
from panther.spec import Budget, Capture, Choice, Plan, Report, Target
from panther.verify import verify as check

HEALS = ("none", "auto")
LATER_HEALS = ("refit", "blocks", "distill")


@dataclass(frozen=True)
class _Prepared:
    """Everything that does not depend on the budget: kept so that another budget needs no new measurement."""

    model: nn.Module
    example: Call
    found: Capture
    data: Calibration | None
    factors: Mapping[str, Factors]
    options: Mapping[str, Sequence[Choice]]
    reference: Reference
    importances: dict[str, Importance]  # filled when a search first asks for them
    dtype_bytes: Mapping[str, int]
    eval_fn: Callable[[nn.Module], float] | None
    search: str | Allocator
    seed: int
    progress: Progress
    verify: bool
    seconds: dict[str, float]
    notes: tuple[str, ...]

    def divergence(self, choices: Sequence[Choice]) -> float:
        """What a whole plan does to the model's output on the reference samples."""
        return self.reference.divergence(self.factors, choices)


@dataclass(frozen=True)
class Result:
    """A compressed model, how it was made, and what it is worth."""

    model: nn.Module
    report: Report
    plan: Plan
    target: Target
    _prepared: _Prepared | None = field(repr=False)
    _example: Call = field(repr=False)

    @property
    def budget_met(self) -> bool:
        return self.report.budget_met

    def resolve(self, budget: Any) -> Result:
        """The result for another budget, without measuring or decomposing again.

        Raises: RuntimeError after compress(..., inplace=True), which gives the dense layers up.
        """
        if self._prepared is None:
            raise RuntimeError("resolve() needs the dense layers, which inplace=True gave up: call compress again")
        wanted, known = Budget.parse(budget), self._prepared
        known.progress.say("target: " + resolve(wanted, known.found, known.dtype_bytes).text)
        return _solve(known, wanted, plan=None)

    def save(self, folder: str | Path) -> Path:
        """Write model.safetensors and panther.json; read them again with panther.load(folder, model=...)."""
        from panther.converters.compressed import save

        return save(self.model, folder, plan=self.plan, report=self.report)

    def export_onnx(self, path: str | Path, **options: Any) -> Any:
        """Write a standard ONNX file, read it back and compare it before its path is returned (an ExportReport)."""
        from panther.converters import WRITERS

        return WRITERS["onnx"](self.model, path, self._example.args or dict(self._example.kwargs), **options)


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
    return _selected(capture(model, as_call(example_inputs)), model, include, exclude)


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
    heal: str = "auto",
    seed: int = 0,
    device: torch.device | str | None = None,
    inplace: bool = False,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    verify: bool = True,
) -> Result:
    """A smaller model of the same class and call signature, checked against the dense one.

    budget: the fraction of the sketchable weights KEPT (0.5, "50%"), a panther.Budget or a dict of its fields.
    example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments, as for torch.export.
    calib_data: an iterable of inputs, of (input, target) pairs or of dicts; unlabelled. Without it the weights alone
        decide, which costs much accuracy.
    eval_fn: eval_fn(model) -> float, higher is better; shown for both models in the report.
    include, exclude: layer names, globs ("encoder.*"), "re:..." or layer classes.
    plan: a Plan (or its JSON) instead of a search.
    search: "sensitivity", "uniform", or an allocator of your own (panther.allocators.Allocator).
    heal: "auto" or "none"; both correct the biases.
    inplace: put the sketched layers into `model` itself.
    verify: measure latency, memory and agreement of both models; sizes are counted in any case.

    Raises: ValueError or TypeError for a bad argument, CaptureError when the model does not run or holds nothing to
    sketch, CalibrationError for unusable data, PlanError for a plan of another architecture. The model is unchanged
    after any error, and after Ctrl-C.
    """
    wanted = Budget.parse(budget)
    _check_arguments(model, search, n_trials, timeout, dtypes, heal, checkpoint, inplace)
    if plan is not None and not isinstance(plan, Plan):
        plan = Plan.from_json(plan)
    work = model if device is None else copy.deepcopy(model).to(device)
    reporter = Progress(progress)
    prepared = _prepare(
        work,
        as_call(example_inputs),
        wanted,
        calib_data,
        include,
        exclude,
        plan,
        search,
        eval_fn,
        seed,
        reporter,
        verify,
    )
    result = _solve(prepared, wanted, plan)
    if not inplace:
        return result
    if device is not None:
        model.to(device)
    put_layers(model, {c.layer: result.model.get_submodule(c.layer) for c in result.plan.sketched})
    return changed(result, model=model, _prepared=None)


def _check_arguments(
    model: nn.Module,
    search: str | Allocator,
    n_trials: int | None,
    timeout: float | None,
    dtypes: Sequence[str],
    heal: str,
    checkpoint: str | Path | None,
    inplace: bool,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is {type(model).__name__}: expected a torch.nn.Module (load a state_dict into one first)"
        )
    if isinstance(search, str) and search not in ALLOCATORS:
        tuned = " The tuned search is not part of this version." if search == "tuned" else ""
        raise ValueError(f"search={search!r}: expected one of {', '.join(ALLOCATORS)} or an allocator.{tuned}")
    if n_trials is not None or timeout is not None:
        raise ValueError(
            'n_trials and timeout belong to search="tuned", which is not part of this version: leave them out'
        )
    if tuple(dtypes) != ("float32",):
        raise ValueError(
            f"dtypes={tuple(dtypes)}: this version stores factors in the layer's own dtype only; leave it out"
        )
    if heal not in HEALS:
        later = " (not part of this version)" if heal in LATER_HEALS else ""
        raise ValueError(f"heal={heal!r}{later}: expected one of {', '.join(HEALS)}")
    if checkpoint is not None:
        raise ValueError("checkpoint= is not part of this version: leave it out")
    if inplace and next(model.children(), None) is None:
        raise ValueError(
            f"inplace=True: {type(model).__name__} is itself the layer, and cannot be another in its own place: "
            "leave inplace out and use the model of the result"
        )


def _prepare(
    model: nn.Module,
    example: Call,
    budget: Budget,
    calib_data: Any,
    include: Sequence[Any] | None,
    exclude: Sequence[Any] | None,
    plan: Plan | None,
    search: str | Allocator,
    eval_fn: Callable[[nn.Module], float] | None,
    seed: int,
    progress: Progress,
    verify: bool,
) -> _Prepared:
    """Capture, measure and decompose: everything that another budget can use again."""
    seconds: dict[str, float] = {}
    with _timed(seconds, "capture"):
        found = _selected(capture(model, example), model, include, exclude)
    if not found.sketchable:
        raise CaptureError(_nothing_to_sketch(model, found))
    if plan is not None:
        plan.check_fits(found)
    weights = {spec.name: _weight(model, spec.name) for spec in found.sketchable}
    for name, weight in weights.items():
        refuse_non_finite(weight, name)
    dtype_bytes = {name: weight.element_size() for name, weight in weights.items()}
    progress.say("target: " + (resolve(budget, found, dtype_bytes).text if plan is None else "the given plan"))
    notes: list[str] = []
    data = None if calib_data is None else calibration(calib_data, example, model)
    if data is not None:
        notes.extend([data.note] if data.note else [])
        check_batches(model, data.held_out, len(data))
    else:
        text = (
            "no calibration data: the weights alone decide. On real models this loses several times more of the output "
            "than with a few hundred unlabelled inputs (calib_data=...)."
        )
        warnings.warn(text, UserWarning, stacklevel=3)
        notes.append(text)
    factors = _factors(model, example, found, data, seed, progress, seconds, notes)
    notes.extend(_thin(factors))
    options = {name: candidates(f, dtype_bytes[name]) for name, f in factors.items()}
    with _timed(seconds, "importance"):
        samples = affordable_samples(found, example)
        against = reference(model, [example] if data is None else list(_first(data, samples)), samples)
    return _Prepared(
        model,
        example,
        found,
        data,
        factors,
        options,
        against,
        {},
        dtype_bytes,
        eval_fn,
        search,
        seed,
        progress,
        verify,
        seconds,
        tuple(notes),
    )


def _first(data: Calibration, samples: int) -> Iterator[Call]:
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
    model: nn.Module,
    example: Call,
    found: Capture,
    data: Calibration | None,
    seed: int,
    progress: Progress,
    seconds: dict[str, float],
    notes: list[str],
) -> dict[str, Factors]:
    """Layers measured in as many passes as memory asks for, each decomposed and its statistics freed."""
    factors: dict[str, Factors] = {}
    chunk = chunk_size(found.layers, example.batch_size)
    if chunk == 0 and data is not None:
        notes.append("a backward pass would need too much memory, so all outputs of a layer count the same")
    for part in passes(found.sketchable) if data is not None else [list(found.sketchable)]:
        profiles: dict[str, Profile] = {}
        if data is not None:
            with _timed(seconds, "measure"):
                samples = len(data) * next(iter(data)).batch_size
                measured = measure(
                    model,
                    part,
                    data,
                    samples=samples,
                    gradient_samples=None if chunk else 0,
                    chunk=max(1, chunk),
                    seed=seed,
                    progress=progress,
                    total=len(data),
                )
            profiles = measured.profiles
            if measured.not_differentiated is not None:
                reason = measured.not_differentiated
                text = f"the model cannot be differentiated, so all outputs of a layer count the same ({reason})"
                notes.extend([] if text in notes else [text])
        with _timed(seconds, "decompose"):
            for spec in progress.track(part, "decomposing", len(part)):
                module = model.get_submodule(spec.name)
                profile = profiles.pop(spec.name, None)
                factors[spec.name] = decompose(module, spec, profile, seed=seed)
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


def _solve(prepared: _Prepared, budget: Budget, plan: Plan | None) -> Result:
    """Allocate, replace and verify for one budget."""
    if plan is None and prepared.search != "uniform" and not prepared.importances:
        with _timed(prepared.seconds, "importance"):
            prepared.importances.update(_importances(prepared))
    seconds = dict(prepared.seconds)
    target = resolve(budget, prepared.found, prepared.dtype_bytes)
    with _timed(seconds, "allocate"):
        if plan is None:
            plan = allocate(
                prepared.options,
                target,
                prepared.found,
                search=prepared.search,
                divergence=lambda layer, error: prepared.importances[layer].divergence(error),
                evaluate=prepared.divergence if prepared.reference.is_comparable else None,
                budget=str(budget),
                seed=prepared.seed,
            )
        else:
            plan = _completed(plan, prepared)
    with _timed(seconds, "replace"):
        compressed = replace(prepared.model, prepared.factors, plan)
        _refuse_broken(compressed, prepared.example)
    held_out = prepared.data.held_out if prepared.data is not None else (prepared.example,)
    report = check(
        prepared.model,
        compressed,
        capture=prepared.found,
        plan=plan,
        target=target,
        example=prepared.example,
        held_out=held_out,
        is_held_out=prepared.data.is_held_out if prepared.data is not None else False,
        eval_fn=prepared.eval_fn,
        seconds=seconds,
        notes=prepared.notes,
        seed=prepared.seed,
        measure=prepared.verify,
    )
    return Result(compressed, report, plan, target, prepared, prepared.example)


def _importances(prepared: _Prepared) -> dict[str, Importance]:
    """Measured where the model answers with numbers; else every layer's error counts the same."""
    if not prepared.reference.is_comparable:
        return dict.fromkeys(prepared.options, Importance(1.0, 1.0))
    return importance(prepared.reference, prepared.factors, prepared.options, progress=prepared.progress)


def _refuse_broken(compressed: nn.Module, example: Call) -> None:
    """Raise PantherError when the model around the sketched layers needs something that only the dense ones have."""
    try:
        with inference(compressed):
            run(compressed, example)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise PantherError(
            f"the compressed model does not run ({type(error).__name__}: {reason[0][:200] if reason else ''}): "
            "it uses something that a sketched layer does not have. Leave that layer out with exclude=[...]; "
            "the dense model is unchanged."
        ) from error


def _completed(plan: Plan, prepared: _Prepared) -> Plan:
    """A given plan with a choice for every layer: costs and errors are this model's, not the file's.

    Raises: PlanError when it asks for a rank or scheme that the layer cannot have.
    """
    given = {c.layer: c for c in plan.choices}
    choices = []
    for name, options in prepared.options.items():
        choice = given.get(name)
        if choice is None or choice.is_dense:
            choices.append(changed(options[-1], reason=choice.reason if choice else "the plan leaves it dense"))
            continue
        fits = [o for o in options if (o.scheme, o.ranks) == (choice.scheme, choice.ranks)]
        if not fits:
            known = ", ".join(dict.fromkeys(o.scheme for o in options[:-1]))
            raise PlanError(
                f"the plan gives {name!r} scheme {choice.scheme!r} at ranks {choice.ranks}, which would not make it "
                f"smaller or is not a multiple of its step; schemes of this layer: {known}"
            )
        choices.append(fits[0])
    return changed(plan, choices=tuple(choices), fingerprint=prepared.found.fingerprint)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


def _nothing_to_sketch(model: nn.Module, found: Capture) -> str:
    if not found.layers:
        return (
            f"{type(model).__name__} has no Linear or Conv layer that runs on the example inputs: nothing to compress"
        )
    reasons = "; ".join(f"{s.name}: {s.blockers[0]}" for s in found.layers[:5])
    return f"none of the {len(found.layers)} dense layers of {type(model).__name__} can be sketched ({reasons})"


def _selected(
    found: Capture, model: nn.Module, include: Sequence[Any] | None, exclude: Sequence[Any] | None
) -> Capture:
    """The capture with layers outside `include`, or inside `exclude`, blocked for that reason."""
    if include is None and exclude is None:
        return found
    names = {spec.name for spec in found.layers}
    wanted = names if include is None else _matches(include, "include", found, model)
    unwanted = set() if exclude is None else _matches(exclude, "exclude", found, model)
    layers = []
    for spec in found.layers:
        reasons = list(spec.blockers)
        if spec.name in unwanted:
            reasons.append("excluded by exclude=")
        elif spec.name not in wanted:
            reasons.append("not among include=")
        layers.append(changed(spec, blockers=tuple(reasons)))
    return changed(found, layers=tuple(layers))


def _matches(patterns: Any, argument: str, found: Capture, model: nn.Module) -> set[str]:
    """Names of the layers that the patterns mean.

    Raises: ValueError for a pattern that means none, TypeError for one that is neither text nor a class.
    """
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str | type) else patterns:
        hits = {spec.name for spec in found.layers if _means(pattern, spec.name, model, argument)}
        if not hits:
            close = get_close_matches(str(pattern), [s.name for s in found.layers], 3)
            hint = f"; nearest: {', '.join(close)}" if close else ""
            raise ValueError(f"{argument}={pattern!r} matches no dense layer of this model{hint}")
        chosen |= hits
    return chosen


def _means(pattern: Any, name: str, model: nn.Module, argument: str) -> bool:
    if isinstance(pattern, type):
        try:
            return isinstance(model.get_submodule(name), pattern)
        except AttributeError:
            return False
    if not isinstance(pattern, str):
        raise TypeError(f"{argument} holds {pattern!r}: expected layer names, globs, 're:...' or layer classes")
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise ValueError(f"{argument}={pattern!r} is not a regular expression: {error}") from None
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(pattern + ".")
