"""heal(): a compressed model made better without labels, and never worse.

The ways are in panther.healers. Each leaves the student as it was unless the student's answers to held-out inputs came
nearer to the dense model's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from panther.answers import is_classifier, last_dense_call
from panther.batches import (
    Calibration,
    Call,
    as_call,
    calibration,
    float_outputs,
    inference,
    is_for_inference,
    parts_of,
    run,
    weights_may_change,
)
from panther.batchnorm import reestimate
from panther.errors import LoadError, one_line
from panther.healers import Limits, distill, heal_blocks, refit
from panther.healers.blocks import HealedBlock, find_blocks, share_in_blocks, trainable
from panther.healers.checkpoint import Checkpoint, Saved, forget
from panther.healers.distill import TeacherAnswers
from panther.healers.lockstep import LeftStepError
from panther.healers.losses import held_out_loss
from panther.healers.terms import reorder
from panther.healers.training import Progressed
from panther.nn.quantised import StoredWeight
from panther.nn.surgery import copied
from panther.padding import without_padding
from panther.products import fast_layers
from panther.progress import Progress
from panther.request import parse_seed
from panther.sizes import storage_of
from panther.spec import Heal, Healed, LayerSpec

CORRECTED_CALLS = 64  # batches for statistics of which more change nothing
EPOCHS = 60  # at most: small calibration sets are learnt by heart after that
MOST_THREADS = 512  # of one model: each batch that is held in the middle of it has one
HELD_BYTES = 1_500_000_000  # of activations at one depth, in all batches together; also of their inputs
STAGES = ("refit done", "blocks", "blocks done", "distill", "distill done")  # of a checkpoint, in order
# Of a run that is saved.
PROGRESS = ("step", "seconds", "rate", "halvings", "first", "best", "checks", "left_out", "share")
LEAST_IN_BLOCKS = 0.5  # of what can be trained, for them to get a part of the time
# Of a refit that made things worse: groups of layers that are put back, and layers of one that are tried alone.
MOST_GROUPS, MOST_SINGLES = 8, 8
REORDER_SLACK = 0.01  # what new rounding of re-ordered factors may cost, as a share of the held-out loss
SAMPLED = 1000  # numbers of a tensor that tell it from another


@weights_may_change()
def heal(
    teacher: nn.Module,
    student: nn.Module,
    calib_data: Any,
    example_inputs: Any,
    settings: Heal | str = "auto",
    *,
    layers: Sequence[LayerSpec] = (),
    sensitivities: Mapping[str, Tensor] | None = None,
    relu_after: Mapping[str, str] | None = None,
    narrow: Mapping[str, nn.Module] | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    identity: Mapping[str, Any] | None = None,
    ends: bool = True,
    progress: bool | Progress = False,
) -> Healed:
    """Bring the student's answers nearer to the teacher's on unlabelled inputs; the student is changed in place.

    calib_data, example_inputs: as for panther.compress. The last tenth of the data is held out and decides what stays.
    layers: the sketched layers that refit may solve again, in execution order (panther.compress gives them); with none,
        as for a student that panther did not make, refit is left out.
    narrow: of these layers, those that have fewer channels: as they were before they were sketched.
    relu_after: of these layers, those whose output goes into a ReLU only, with the name of the BatchNorm between ("":
        none).
    checkpoint: a file that a killed run goes on from, given the same arguments; it is removed at the end.
    identity: what else must be the same for that, and tells what the student's weights are; without it they must be.
    ends: whether nothing follows that could still fail; else the checkpoint stays at the end, for the caller to remove.

    Raises: ValueError or TypeError for bad settings or a student that cannot be trained, CalibrationError for unusable
    data, LoadError for a checkpoint of another run. Ctrl-C ends the healing and keeps the best state so far, as well as
    the checkpoint; what else goes wrong on the way is undone, and said in the notes.
    """
    wanted, seed = Heal.parse(settings), parse_seed(seed)
    if is_for_inference(student):
        raise ValueError(
            "the student was made in torch.inference_mode and cannot be trained: make it, or a copy.deepcopy of it, "
            "outside of that mode"
        )
    if is_for_inference(teacher):
        teacher = copied(teacher, {}, None)[0]
    data, note = calib_data, None
    if not isinstance(data, Calibration):
        data, note = without_padding(calibration(calib_data, as_call(example_inputs), teacher))
    shown = progress if isinstance(progress, Progress) else Progress(progress)
    _refuse_shared(teacher, student)
    with _without_caches(teacher), _without_caches(student), fast_layers():
        healer = _Healer(teacher, student, data, wanted, seed, shown)
        healer.notes += [note] if note else []
        if checkpoint is not None:
            if identity is None:
                identity = {"weights of the student": fingerprint(trainable(student))}
            healer.checkpoint = Checkpoint(Path(checkpoint), {**healer.identity(), **identity})
        done = healer.run(layers, sensitivities or {}, relu_after or {}, narrow or {})
    if checkpoint is not None and ends and not done.interrupted:
        forget(Path(checkpoint))
    return done


def _refuse_shared(teacher: nn.Module, student: nn.Module) -> None:
    """Raise ValueError where training the student would train the teacher."""
    if teacher is student:
        raise ValueError("the student is the teacher itself: heal a compressed copy of it")
    known = {storage_of(t): name for name, t in [*teacher.named_parameters(), *teacher.named_buffers()]}
    # Other buffers than statistics and rounded weights are constants, and may be shared.
    changing = [b for m in student.modules() if isinstance(m, _BatchNorm | StoredWeight) for b in m.buffers()]
    shared = [known[place] for t in [*trainable(student), *changing] if (place := storage_of(t)) in known]
    if shared:
        raise ValueError(
            f"the student shares {len(shared)} tensors with the teacher ({', '.join(shared[:3])}), which healing would "
            "change in both: heal a copy.deepcopy of the student"
        )


@dataclass
class _Healer:
    """One healing: both models, the data, and what happened so far."""

    teacher: nn.Module
    student: nn.Module
    data: Calibration
    settings: Heal
    seed: int
    progress: Progress
    checkpoint: Checkpoint | None = None
    start: float = field(default_factory=time.perf_counter)
    history: list[tuple[float, str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    steps: int = 0
    interrupted: bool = False
    kept: list[Tensor] = field(default_factory=list)  # the student at the end of the last stage
    reached: float = math.nan  # and its held-out loss

    def __post_init__(self) -> None:
        self.held_out = list(self.data.held_out)
        with torch.no_grad(), inference(self.teacher), last_dense_call(self.teacher) as last:
            answer = run(self.teacher, self.held_out[0])
            self.is_comparable = bool(float_outputs(answer))
            self.classifies = is_classifier(answer, last)

    @cached_property
    def calls(self) -> list[Call]:
        """What there is to fit to, read when that begins."""
        in_memory = isinstance(self.data.source, list | tuple)
        calls = list(self.data if in_memory else fitting(self.data, HELD_BYTES))
        if len(calls) < len(self.data):
            self.notes.append(f"healing saw {len(calls)} of {len(self.data)} batches: more would not fit in memory")
        return calls

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have been made with to go on from it."""
        shapes = repr([tuple(p.shape) for p in trainable(self.student)]).encode()
        inputs = [tensor for call in [*self.calls[:1], *self.held_out] for tensor in call.tensors()]
        return {
            **dataclasses.asdict(self.settings),
            "seed": self.seed,
            "batches": len(self.calls),
            "inputs": fingerprint(inputs),
            "weights of the dense model": fingerprint(self.teacher.parameters()),
            "shapes": hashlib.sha256(shapes).hexdigest()[:16],
        }

    def run(
        self,
        layers: Sequence[LayerSpec],
        sensitivities: Mapping[str, Tensor],
        gates: Mapping[str, str],
        narrow: Mapping[str, nn.Module],
    ) -> Healed:
        mode = self.settings.mode
        saved = None if self.checkpoint is None else self.checkpoint.saved
        if self.checkpoint is not None and saved is not None:
            self._go_on_from(saved, self.checkpoint.path)
        else:
            self.reached, self.kept = self.figure(), _state(self.student)
            self._note("before", self.reached)
        stage = "" if saved is None else str(saved.facts["stage"])
        if mode != "none" and self._can_heal():
            self.progress.say(f"healing: {_announced(self.settings)}")
            share = self._shares()
            if not _is_past(stage, "refit"):
                self._kept_if_better("refit", lambda: self._refit(layers, sensitivities, gates, narrow))
            if self._has_steps(share[0]) and not _is_past(stage, "blocks"):
                self._kept_if_better("blocks", lambda: self._blocks(share[0], saved if stage == "blocks" else None))
            if self._has_steps(share[1]) and not _is_past(stage, "distill"):
                self._kept_if_better("distill", lambda: self._distill(share[1], saved if stage == "distill" else None))
            self._reorder()
        if self.checkpoint is not None:
            self.notes.extend([self.checkpoint.problem] if self.checkpoint.problem else [])
        return Healed(
            time.perf_counter() - self.start,
            self.steps,
            self.history[0][2],
            self.reached,
            tuple(self.history),
            tuple(self.notes),
            self.interrupted,
        )

    def _has_steps(self, share: float) -> bool:
        return share > 0 and not self.interrupted and self._limits(share).steps > 0

    def _shares(self) -> tuple[float, float]:
        """How much of the time is for blocks, and how much for distillation."""
        shares = {"blocks": (1.0, 0.0), "distill": (0.0, 1.0), "auto": (0.25, 0.75)}.get(self.settings.mode, (0.0, 0.0))
        if self.settings.mode != "auto":
            return shares
        try:
            inside = share_in_blocks(self.teacher, self.student, self.held_out[0])
        except Exception:  # a user's model may raise anything; the stages say it
            return shares
        if inside >= LEAST_IN_BLOCKS:
            return shares
        note = f"all of the time went to distillation: blocks that run once hold {inside:.0%} of what can be trained"
        if find_blocks(self.student) and note not in self.notes:  # as a run that goes on from a checkpoint has it
            self.notes.append(note)
        return 0.0, 1.0

    def _can_heal(self) -> bool:
        """Whether there is something to judge by; a note where there is not."""
        if not self.is_comparable:
            self.notes.append("nothing was healed: the model's outputs hold no floating-point numbers to compare")
        elif not math.isfinite(self.reached):
            self.notes.append("nothing was healed: the answers to held-out inputs are not finite, or there are none")
        return self.is_comparable and math.isfinite(self.reached)

    def _go_on_from(self, saved: Saved, path: Path) -> None:
        """Be where the run was that wrote a checkpoint.

        Raises: LoadError when it does not hold what such a run writes.
        """
        try:
            facts, tensors = saved.facts, saved.tensors
            stage, self.kept, self.reached = str(facts["stage"]), tensors["kept"], float(facts["reached"])
            self.history = [(float(seconds), str(name), float(figure)) for seconds, name, figure in facts["history"]]
            self.notes, self.steps = [str(note) for note in facts["notes"]], int(facts["steps"])
            self.start = time.perf_counter() - float(facts["seconds"])
            own, given = _state(self.student), tensors["student"] if stage == "blocks" else self.kept
            fits = all(_shapes(part) == _shapes(own) for part in (self.kept, given))
        except (KeyError, TypeError, ValueError) as error:
            raise LoadError(f"{path} is damaged ({error!r}): delete it to begin anew") from error
        if not fits or not self.history or stage not in STAGES:
            raise LoadError(f"{path} is damaged, or of another student: delete it to begin anew")
        _write(self.student, given)
        self.progress.say(f"healing goes on from {path} ({stage})")

    def figure(self) -> float:
        """The loss of the student's answers to the held-out calls; NaN when it does not run on one."""
        try:
            with inference(self.teacher), inference(self.student):
                targets = self._targets
                return held_out_loss(
                    self.student, self.held_out, lambda i: targets.answer(i).output, classifies=self.classifies
                )
        except Exception as error:  # a user's model may raise anything
            self.notes.append(f"the compressed model does not run on a held-out batch: {one_line(error)}")
            return math.nan

    @cached_property
    def _targets(self) -> TeacherAnswers:
        """To the held-out calls, which are asked for again and again."""
        return TeacherAnswers(self.teacher, self.held_out)

    def _note(self, stage: str, figure: float) -> None:
        self.history.append((time.perf_counter() - self.start, stage, figure))

    def _kept_if_better(self, stage: str, work: Callable[[], None]) -> None:
        """Do something to the student, and undo it where its held-out answers got worse (or broke)."""
        before = self.reached
        try:
            work()
        except KeyboardInterrupt:
            self.interrupted = True
            self.notes.append(f"{stage}: interrupted; the best state so far was kept")
        except LeftStepError as error:
            self.notes.append(f"{stage} ended early: {error}")
        except Exception as error:  # a user's module may raise anything when it runs alone, or backwards
            self.notes.append(f"{stage} failed and was undone: {one_line(error)}")
            _write(self.student, self.kept)
        try:
            after = self.figure()
        except KeyboardInterrupt:  # what was not judged is not kept
            self.interrupted, after = True, math.nan
            self.notes.append(f"{stage}: interrupted while it was judged; the best state before it was kept")
        if after <= before:  # not so for NaN
            self.kept, self.reached = _state(self.student), after
        else:
            _write(self.student, self.kept)
            if not self.interrupted:
                self.notes.append(f"{stage} made held-out answers worse ({before:.4g} -> {after:.4g}) and was undone")
        self._note(stage, self.reached)
        self.progress.say(f"{stage}: held-out loss {before:.4g} -> {self.reached:.4g}")
        if not self.interrupted:
            self._save(f"{stage} done")

    def _reorder(self) -> None:
        """Put the most important terms first again, where rounding allows it."""
        before = self.history[0][2]
        if self.reached == before:  # as they were decomposed, or as they came
            return
        figure, problem = math.nan, "a new one would cost accuracy in this dtype"
        try:
            reorder(self.student, self.calls[:CORRECTED_CALLS])
            figure = self.figure()
        except KeyboardInterrupt:
            self.interrupted, problem = True, "it was interrupted"
        except Exception as error:  # a user's module may raise anything
            problem = one_line(error)
        if figure <= min(before, self.reached * (1 + REORDER_SLACK) + 1e-12):
            self.kept, self.reached = _state(self.student), figure
            return
        _write(self.student, self.kept)
        self.notes.append(f"the terms of healed layers keep their order: {problem}")

    def _refit(
        self,
        layers: Sequence[LayerSpec],
        sensitivities: Mapping[str, Tensor],
        gates: Mapping[str, str],
        narrow: Mapping[str, nn.Module],
    ) -> None:
        if not layers:
            return
        calls = self.calls[:MOST_THREADS]
        done = refit(
            self.teacher,
            self.student,
            calls,
            layers,
            sensitivities,
            relu_after=gates,
            narrow=narrow,
            held_bytes=HELD_BYTES,
            seed=self.seed,
            progress=self.progress,
        )
        if done.kept:
            first = "; ".join(f"{name}: {why}" for name, why in list(done.kept.items())[:3])
            self.notes.append(f"refit left {len(done.kept)} of {len(layers)} layers as they were ({first})")
        corrected = self._correct_norms()
        whole = self.figure()
        if done.accepted and not whole <= self.reached:
            corrected = self._put_back_some(done.accepted, whole)
        if corrected:
            self.notes.append(f"the statistics of {corrected} BatchNorm layers were corrected")

    def _correct_norms(self) -> int:
        """Correct the statistics of BatchNorms where that helps; of how many it did."""
        calls = self.calls[:CORRECTED_CALLS]
        found = reestimate(self.student, calls, dense=self.teacher, held_out=self.held_out, progress=self.progress)
        return len(found.norms)

    def _put_back_some(self, names: Sequence[str], whole: float) -> int:
        """Old factors for the layers at fault, where a refit made held-out answers worse as a whole (to `whole`).

        Groups of neighbours are put back one after the other, then the layers of the group that mattered most get
        their new factors once more, one by one; all by the old statistics of BatchNorms, which are then corrected for
        what stays. Nothing is put back where no part of the refit would be better than none.

        Returns: of how many BatchNorms that was done.
        Cost:    up to MOST_GROUPS + MOST_SINGLES held-out passes.
        """
        new = self._states(names)
        _write(self.student, self.kept)
        old = self._states(names)
        self._put(names, new)
        best, groups = _or_infinity(self.figure()), _in_groups(names, MOST_GROUPS)
        gains: dict[tuple[str, ...], float] = {}
        for group in reversed(groups):
            self._put(group, old)
            figure = self.figure()
            if figure < best:
                gains[group], best = best - figure, figure
            else:
                self._put(group, new)
        back = [name for group in groups if group in gains for name in group]
        worst = max(gains, key=lambda group: gains[group], default=())
        for name in reversed(worst) if 1 < len(worst) <= MOST_SINGLES else ():
            self._put([name], new)
            figure = self.figure()
            if figure < best:
                best = figure
                back.remove(name)
            else:
                self._put([name], old)
        if not best < self.reached:
            self._put(names, new)
            return 0
        some = ", ".join(back[:5]) + (f" and {len(back) - 5} more" if len(back) > 5 else "")
        said = f": {some} took the old factors back" if back else " with corrected statistics, which were put back"
        self.notes.append(f"refit as a whole made held-out answers worse ({self.reached:.4g} -> {whole:.4g}){said}")
        reached = _state(self.student)
        corrected = self._correct_norms()
        if corrected and not self.figure() <= best:
            _write(self.student, reached)
            return 0
        return corrected

    def _states(self, names: Sequence[str]) -> dict[str, list[Tensor]]:
        return {name: _state(self.student.get_submodule(name)) for name in names}

    def _put(self, names: Sequence[str], states: Mapping[str, Sequence[Tensor]]) -> None:
        for name in names:
            _write(self.student.get_submodule(name), states[name])

    def _blocks(self, share: float, saved: Saved | None) -> None:
        calls = self.calls[: MOST_THREADS - len(self.held_out)]
        batches: list[int] = []
        done = [] if saved is None else [str(name) for name in saved.facts["blocks"]]

        def after(block: HealedBlock) -> None:
            done.append(block.name)
            batches.append(block.batches)
            self.steps += block.steps
            self._save("blocks", student=_state(self.student), blocks=list(done))

        with self.progress.bar("healing blocks") as bar:
            heal_blocks(
                self.teacher,
                self.student,
                [*calls, *self.held_out],
                len(self.held_out),
                self._limits(share),
                held_bytes=HELD_BYTES,
                seed=self.seed,
                skip=tuple(done),
                done=after,
                show=lambda name, part, best: bar(part, f"{name}: held-out {best:.4g}"),
            )
        if min(batches, default=len(self.calls)) < len(self.calls):
            counts = " to ".join(f"{count:,}" for count in sorted({min(batches), max(batches)}))
            self.notes.append(
                f"blocks were trained on {counts} of {len(self.calls):,} batches: more at one depth would not fit in "
                "memory"
            )
        left = [name for name in find_blocks(self.student) if name not in done]
        if left:
            self.notes.append(
                f"blocks left {', '.join(left)} as they were: they run more than once or never, or the limit came first"
            )

    def _distill(self, share: float, saved: Saved | None) -> None:
        now, so_far = Progressed(), self.steps
        if saved is not None:
            run_ = saved.facts["run"]
            now = Progressed(**run_, best_state=saved.tensors["best"], now=saved.tensors["now"])
            so_far -= now.step

        def save(now: Progressed) -> None:
            self._note("distill", now.best)
            self.steps = so_far + now.step
            facts = {name: getattr(now, name) for name in PROGRESS}
            self._save("distill", run=facts, best=now.best_state, now=now.now)

        try:
            with self.progress.bar("distilling") as bar, inference(self.teacher), inference(self.student):
                distill(
                    self.teacher,
                    self.student,
                    self.calls,
                    self.held_out,
                    self._limits(share),
                    seed=self.seed,
                    went_on=now,
                    save=save,
                    show=lambda part, best: bar(part, f"held-out {best:.4g}"),
                )
        finally:
            self.steps = so_far + now.step

    def _limits(self, share: float) -> Limits:
        wanted = self.settings.steps
        steps = EPOCHS * len(self.calls) if wanted is None else round(wanted * share)
        return Limits(self.settings.time_limit * share, steps, self.settings.learning_rate)

    def _save(
        self,
        stage: str,
        *,
        student: Sequence[Tensor] = (),
        best: Sequence[Tensor] = (),
        now: Sequence[Tensor] = (),
        **facts: Any,
    ) -> None:
        if self.checkpoint is None or self.checkpoint.problem:
            return
        common = {
            "stage": stage,
            "reached": self.reached,
            "history": self.history,
            "notes": self.notes,
            "steps": self.steps,
            "seconds": time.perf_counter() - self.start,
        }
        self.checkpoint.save({**common, **facts}, {"kept": self.kept, "student": student, "best": best, "now": now})


def _changing(student: nn.Module) -> list[Tensor]:
    """Everything that healing may change."""
    return [*trainable(student), *student.buffers()]


def _state(student: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in _changing(student)]


@torch.no_grad()
def _write(student: nn.Module, state: Sequence[Tensor]) -> None:
    for tensor, value in zip(_changing(student), state, strict=True):
        tensor.copy_(value)


def _or_infinity(figure: float) -> float:
    return math.inf if math.isnan(figure) else figure


def _in_groups(names: Sequence[str], most: int) -> list[tuple[str, ...]]:
    """Names in a row as groups of about one size."""
    size = math.ceil(len(names) / most)
    return [tuple(names[start : start + size]) for start in range(0, len(names), size)]


def _announced(settings: Heal) -> str:
    """What is about to happen, and for how long."""
    if settings.mode == "refit":
        return "refit, in closed form"
    steps = "" if settings.steps is None else f", {settings.steps:,} steps"
    return f"{settings.mode}, training for at most {settings.time_limit:.0f} s{steps}; Ctrl-C keeps the best so far"


def _is_past(saved: str, stage: str) -> bool:
    """Whether a run that was saved at one place ("" for a new one) is through with a stage."""
    return bool(saved) and STAGES.index(saved) >= STAGES.index(f"{stage} done")


def _shapes(tensors: Sequence[Tensor]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]


def fitting(calls: Iterable[Call], size_bytes: int) -> Iterator[Call]:
    """The first calls whose inputs take about so much memory together; at least one."""
    held = 0
    for call in calls:
        yield call
        held += call.size_bytes
        if held >= size_bytes:
            return


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A few numbers of each tensor, as one that other tensors do not have."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        for part in parts_of(tensor):
            flat = part.flatten()
            some = flat[:: max(1, len(flat) // SAMPLED)].resolve_conj().resolve_neg().cpu().contiguous()
            digest.update(some.view(torch.uint8).numpy().tobytes() if len(some) else b"")
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _without_caches(model: nn.Module) -> Iterator[None]:
    """Hugging Face's decoders keep no keys and values: each block would add to them whenever it runs."""
    found = [getattr(module, "config", None) for module in model.modules()]
    configs: list[Any] = [config for config in found if getattr(config, "use_cache", False) is True]
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs:
            config.use_cache = True
