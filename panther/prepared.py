"""All about a model that does not depend on the budget, each part measured once: another budget uses it again."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from dataclasses import replace as changed
from functools import cached_property
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from panther.allocate import in_file
from panther.batches import Calibration, Call, inference, run
from panther.chains import CORRECTED, PIVOTED, WHOLE
from panther.channels import Narrow, narrow, shares_for
from panther.decompose import candidates
from panther.errors import PantherError, one_line
from panther.factors import Factors
from panther.heal import HELD_BYTES, MOST_THREADS, fingerprint, fitting, heal
from panther.healers.rounding import round_layers
from panther.importance import Importance, Reference, importance, reference
from panther.latency import only_faster, with_latency
from panther.nn.surgery import put_layers
from panther.pack import hold_nearest, pack, packed
from panther.replace import replace, sketched_layer
from panther.request import Request
from panther.spec import DTYPES, Budget, Capture, Choice, Cost, Heal, Healed, Measured, Plan, Target
from panther.verify import latencies, measure_latency, medians_in_turn, metric, peak_memory


@dataclass(frozen=True)
class Dense:
    """The whole dense model in numbers, measured when a budget first asks for one."""

    request: Request

    @cached_property
    def latency_ms(self) -> float:
        return latencies([self.request.given], self.request.example)[0]

    @cached_property
    def peak_memory_bytes(self) -> int:
        return peak_memory(self.request.given, self.request.example)

    @cached_property
    def metric(self) -> float:
        """What eval_fn says.

        Raises: ValueError when it fails or says anything but a finite number: then no drop from it can be limited.
        """
        try:
            return metric(self.request.given, cast(Callable[[nn.Module], Any], self.request.eval_fn))
        except Exception as error:
            raise ValueError(f"max_drop needs what eval_fn says of the dense model: {one_line(error)}") from error

    def measured(self, budget: Budget) -> Measured:
        """What this budget needs to know."""
        return Measured(
            latency_ms=None if budget.latency_ms is None else self.latency_ms,
            peak_memory_bytes=None if budget.peak_memory_mb is None else self.peak_memory_bytes,
            metric=None if budget.max_drop is None else self.metric,
        )


@dataclass(frozen=True)
class Prepared:
    """What was captured, measured and decomposed, and what a search measures when it first asks for it."""

    request: Request
    dense: Dense
    found: Capture
    data: Calibration | None
    factors: Mapping[str, Factors]
    options: Mapping[str, Sequence[Choice]]
    reference: Reference
    dtype_bytes: Mapping[str, int]
    seconds: dict[str, float]  # per stage
    notes: tuple[str, ...]
    closer_calls: tuple[Call, ...] = ()  # inputs of `closely`; none where the reference has as many
    was: str = ""  # fingerprint of the dense model
    # By the share of the weights that channels leave, and whether the options have their milliseconds.
    narrow: dict[tuple[float, bool], Narrow] = field(default_factory=dict)
    # What plans were measured to do, by whether on more samples.
    known: dict[tuple[bool, tuple[Choice, ...]], float] = field(default_factory=dict)

    def is_changed(self) -> bool:
        """Whether the dense model is no longer what was measured."""
        return fingerprint(tensors_of(self.request.given)) != self.was

    @cached_property
    def importances(self) -> Mapping[str, Importance]:
        """Measured where the model answers with numbers; else every layer's error counts the same."""
        if not self.reference.is_comparable:
            return dict.fromkeys(self.options, Importance(1.0, 1.0))
        options = self.options
        if DTYPES[0] not in self.request.dtypes:  # a layer is truncated to see how much it matters, not rounded
            options = {n: candidates(f, self.dtype_bytes[n], dtypes=DTYPES[:1]) for n, f in self.factors.items()}
        with timed(self.seconds, "importance"):
            return importance(self.reference, self.factors, options, progress=self.request.progress)

    @property
    def counted(self) -> str:
        """The field of Cost that says how small a model is: whole numbers are as many as others, and fewer bytes."""
        return "params" if self.request.dtypes == DTYPES[:1] else "size_bytes"

    @cached_property
    def file_options(self) -> Mapping[str, Sequence[Choice]]:
        """The options as plans are made of them, with their bytes in a file."""
        return in_file(self.options, self.found)

    @cached_property
    def timed_options(self) -> Mapping[str, Sequence[Choice]]:
        """The options with their milliseconds."""
        with timed(self.seconds, "time layers"):
            return with_latency(
                self.file_options,
                self.factors,
                build=self.layer,
                medians=medians_in_turn,
                progress=self.request.progress,
            )

    def options_for(self, budget: Budget, start: Plan | None = None) -> Mapping[str, Sequence[Choice]]:
        """The options of all layers: those that `start` was chosen from, where that has fewer channels."""
        if start is not None and any(choice.channels for choice in start.choices):
            for (_share, is_timed), found in self.narrow.items():
                if is_timed != (budget.latency_ms is not None):
                    continue
                if all(c.kind in {option.kind for option in found.options[c.layer]} for c in start.choices):
                    return _useful(found.options, budget)
        return _useful(self.file_options if budget.latency_ms is None else self.timed_options, budget)

    def narrow_shares(self, kept: float, options: Mapping[str, Sequence[Choice]], target: Target) -> list[float]:
        """How much channels may leave for a target that keeps this share of the dense layers; none where none may go.

        None may where nothing tells which of them matter, and where ranks are to be uniform or are the user's own.
        """
        if not self.request.may_narrow or not self.reference.is_comparable:
            return []
        paired = {name for name, factors in self.factors.items() if factors.pair is not None}
        return shares_for(kept, options, paired, target)

    def narrow_for(self, budget: Budget, share: float, seconds: dict[str, float]) -> Narrow | None:
        """The layers with fewer channels, which leave this share; None where no layers have any in common.

        seconds: gets what it took.
        """
        is_timed = budget.latency_ms is not None
        found = self.narrow.get((share, is_timed))
        if found is None:
            with timed(seconds, "channels"):
                found = narrow(
                    self.request.model,
                    self.factors,
                    self.options,
                    self.importances,
                    share,
                    self.dtype_bytes,
                    dtypes=self.request.dtypes,
                    seed=self.request.seed,
                    progress=self.request.progress,
                )
            if found is None:
                return None
            found = changed(found, options=in_file(found.options, self.found))
            found = changed(found, options=self._timed(found, seconds)) if is_timed else found
            self.narrow[share, is_timed] = found
        return changed(found, options=_useful(found.options, budget))

    def _timed(self, found: Narrow, seconds: dict[str, float]) -> Mapping[str, Sequence[Choice]]:
        """Layers that are as before keep the times that they have."""
        new = {name: options for name, options in found.options.items() if options[-1].channels}
        whole = self.timed_options
        with timed(seconds, "time layers"):
            times = with_latency(
                new,
                found.factors,
                build=self.layer,
                medians=medians_in_turn,
                whole=whole,
                progress=self.request.progress,
            )
        return {**whole, **times}

    def without_checkpoint(self) -> Prepared:
        """The same, with all that was measured, for runs that have no part in the file of this one."""
        other = copy.copy(self)
        object.__setattr__(other, "request", changed(self.request, checkpoint=None))
        return other

    def divergence(self, choices: Sequence[Choice]) -> float:
        """What a whole plan does to the model's output on the reference samples."""
        return self._divergence(choices, closer=False)

    @cached_property
    def _closer(self) -> Reference:
        """More samples, where few are all that every layer could be truncated on."""
        return reference(self.request.model, self.closer_calls, sum(call.batch_size for call in self.closer_calls))

    def closely(self, choices: Sequence[Choice]) -> float:
        """The same on more samples, for the few plans that one is chosen from."""
        return self._divergence(choices, closer=bool(self.closer_calls))

    def _divergence(self, choices: Sequence[Choice], *, closer: bool) -> float:
        key = closer, tuple(choices)
        if key not in self.known:
            self.known[key] = (self._closer if closer else self.reference).divergence(self.factors, choices)
        return self.known[key]

    def layer(self, choice: Choice) -> nn.Module:
        """One layer as it runs in the end."""
        has_follower = any(pair.producer == choice.layer for pair in self.found.followers)
        return packed(sketched_layer(self.factors[choice.layer].at(choice), choice), choice, has_follower=has_follower)

    def build(self, plan: Plan, notes: list[str] | None = None) -> nn.Module:
        """The model of a plan, unhealed and run once: replaced, then packed.

        Raises: PantherError when it does not run.
        """
        return self._packed(replace(self.request.model, self.factors, plan), plan, notes)

    def build_healed(self, plan: Plan, notes: list[str]) -> tuple[nn.Module, Healed | None]:
        """The same, healed before it is packed; None where that was not asked for, or there is nothing to heal with."""
        compressed = replace(self.request.model, self.factors, plan)
        if self.request.heal.mode == "none" or self.data is None or not plan.sketched:
            return self._packed(compressed, plan, notes), None
        self._refuse_broken(compressed, self._dense_layers(plan))
        if all(choice.grid is None for choice in plan.sketched):
            healing = self.healed(compressed, plan)
        else:
            compressed, healing = self._healed_on_grids(compressed, plan, notes)
        notes.extend(healing.notes)
        return self._packed(compressed, plan, notes), healing

    def _packed(self, compressed: nn.Module, plan: Plan, notes: list[str] | None) -> nn.Module:
        before = {choice.layer: compressed.get_submodule(choice.layer) for choice in plan.sketched}
        compressed = pack(compressed, plan, self.found.followers, notes=notes)
        gone = [(name, layer) for name, layer in before.items() if compressed.get_submodule(name) is not layer]
        self._refuse_broken(compressed, [*self._dense_layers(plan), *gone])
        return compressed

    def _dense_layers(self, plan: Plan) -> list[tuple[str, nn.Module]]:
        return [(choice.layer, self.request.model.get_submodule(choice.layer)) for choice in plan.sketched]

    def _healed_on_grids(self, compressed: nn.Module, plan: Plan, notes: list[str]) -> tuple[nn.Module, Healed]:
        """Refitted, then rounded, then trained as it will be stored; in place, or another where that began worse.

        What comes before the training is done anew by a run that goes on from a checkpoint, and gives the same.
        """
        wanted, start = self.request.heal, time.perf_counter()
        before = self._loss(self._rounded(plan), plan)
        refitted = self.healed(compressed, plan, changed(wanted, mode="refit"), checkpoint=False)
        notes += round_layers(
            self.request.model,
            compressed,
            plan.sketched,
            {spec.name: spec for spec in self.found.sketchable},
            list(itertools.islice(fitting(cast(Calibration, self.data), HELD_BYTES), MOST_THREADS)),
            held_bytes=HELD_BYTES,
            seed=self.request.seed,
            progress=self.request.progress,
        )
        rounded = self._loss(compressed, plan)
        if math.isfinite(before) and not rounded <= before:
            notes.append(
                f"refit and rounding by the data made held-out answers worse ({before:.4g} -> {rounded:.4g}): each "
                "number was rounded by itself"
            )
            compressed, rounded = self._rounded(plan), before
        seconds = time.perf_counter() - start
        mode = "none" if wanted.mode == "refit" or refitted.interrupted else wanted.mode
        saves = not refitted.interrupted
        trained = self.healed(compressed, plan, changed(wanted, mode=mode), fits=False, checkpoint=saves)
        later = [(seconds + s, stage, f) for s, stage, f in trained.history if stage not in ("before", "refit")]
        return compressed, Healed(
            seconds + trained.seconds,
            trained.steps,
            before,
            trained.after,
            ((0.0, "before", before), (seconds, "rounding", rounded), *later),
            tuple(dict.fromkeys((*refitted.notes, *trained.notes))),
            refitted.interrupted or trained.interrupted,
        )

    def _rounded(self, plan: Plan) -> nn.Module:
        """The model of a plan as it is without healing, held to its grids."""
        student = replace(self.request.model, self.factors, plan)
        for choice in plan.sketched:
            if choice.grid is not None:
                layer = student.get_submodule(choice.layer)
                held = hold_nearest(layer, choice)
                if held is not layer:
                    put_layers(student, {choice.layer: held})
        return student

    def _loss(self, student: nn.Module, plan: Plan) -> float:
        """That of a student's held-out answers."""
        return self.healed(student, plan, Heal("none"), fits=False, checkpoint=False).before

    def healed(
        self,
        compressed: nn.Module,
        plan: Plan,
        settings: Heal | None = None,
        *,
        fits: bool = True,
        checkpoint: bool = True,
    ) -> Healed:
        """Heal the model of a plan in place, as the request says; fits: whether layers are solved again first."""
        sketched = {choice.layer for choice in plan.sketched if fits and choice.scheme not in (WHOLE, CORRECTED)}
        known = dict(self.factors)
        narrow = {choice.layer: known[choice.layer].at(choice) for choice in plan.sketched if choice.channels}
        known |= {name: factors for name, factors in narrow.items() if factors.axis == 0}  # which give fewer outputs
        seen = {name: factors.profile.seen.sensitivity for name, factors in known.items()}
        return heal(
            self.request.model,
            compressed,
            self.data,
            self.request.example,
            settings or self.request.heal,
            layers=[spec for spec in self.found.sketchable if spec.name in sketched],
            sensitivities={name: matrix for name, matrix in seen.items() if matrix is not None},
            relu_after=dict(self.found.rectified),
            narrow={name: factors.module for name, factors in narrow.items()},
            seed=self.request.seed,
            checkpoint=self.request.checkpoint if checkpoint else None,
            identity={"plan": _unmeasured(plan).to_json(), "dtypes": list(self.request.dtypes)},
            ends=False,
            progress=self.request.progress,
        )

    def measured(self, plan: Plan, budget: Budget) -> Measured:
        """What the whole model of a plan needs, as far as the budget limits it.

        The dense model runs beside it: milliseconds are as of the speed that the machine had when that was measured
        first.
        """
        model, example = self.build(plan), self.request.example
        self.request.opened.close(model, self.request.given)
        latency = None
        if budget.latency_ms is not None:
            before, after = measure_latency(self.request.given, model, example)
            latency = after * self.dense.latency_ms / before
        return Measured(latency, None if budget.peak_memory_mb is None else peak_memory(model, example))

    def _refuse_broken(self, compressed: nn.Module, replaced: Iterable[tuple[str, nn.Module]]) -> None:
        """Raise PantherError when the model around the sketched layers needs what only the dense ones have.

        So it does where it runs layers that were `replaced`: capture has looked for that on the dense model.
        """
        ran: set[str] = set()
        hooks = [m.register_forward_pre_hook(lambda *_, name=name: ran.add(name)) for name, m in replaced]
        try:
            with inference(compressed):
                run(compressed, self.request.example)
        except Exception as error:
            raise PantherError(
                f"the compressed model does not run ({one_line(error)}): it uses something that a sketched layer does "
                "not have. Leave that layer out with exclude=[...]; the dense model is unchanged."
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        if ran:
            raise PantherError(
                f"the compressed model still runs layers that were replaced ({', '.join(sorted(ran)[:5])}): a function "
                "or an object in it keeps them. Leave them out with exclude=[...]; the dense model is unchanged."
            )


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """What a model was trained to: its parameters, and the statistics of its norms. Other buffers may count runs."""
    yield from model.parameters()
    for module in model.modules():
        if isinstance(module, _NormBase):
            yield from (buffer for buffer in module.buffers(recurse=False) if buffer.is_floating_point())


def _useful(options: Mapping[str, Sequence[Choice]], budget: Budget) -> Mapping[str, Sequence[Choice]]:
    """Those that a budget may take.

    Pivots of numbers on a grid run slower than two products of as many operations (MiniLM, keep 0.5 in int8: 1.18 times
    as fast as dense where these were 1.6, in onnxruntime 1.66 and 2.2): they are for bytes, and where time is measured.
    """
    if all(getattr(budget, name) is None for name in ("size_mb", "peak_memory_mb", "latency_ms")):
        options = {
            name: [c for c in choices if c.packing != PIVOTED or c.grid is None] for name, choices in options.items()
        }
    return options if budget.latency_ms is None or may_be_slower(budget) else only_faster(options)


def may_be_slower(budget: Budget) -> bool:
    """Whether a layer may become slower than it was for what else is limited: for time alone none may."""
    return any(getattr(budget, name) is not None for name in ("params", "size_mb", "peak_memory_mb"))


def _unmeasured(plan: Plan) -> Plan:
    """What a plan decides, without figures that differ from run to run."""
    return changed(plan, choices=tuple(changed(choice, error=0.0, cost=Cost()) for choice in plan.choices))


@dataclass(frozen=True)
class Judge:
    """What whole plans do to the model, and more closely for the best of them: `evaluate` of an allocator."""

    prepared: Prepared

    def __call__(self, choices: Sequence[Choice]) -> float:
        return self.prepared.divergence(choices)

    def closely(self, choices: Sequence[Choice]) -> float:
        return self.prepared.closely(choices)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add what the block takes to the seconds of a stage."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
