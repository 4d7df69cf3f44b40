"""What every row of benchmarks.fidelity is measured with, here or in a peer's process: data, FLOPs, healing, figures.

A method is a function `compress(job, share) -> Compressed`; `cells` turns it into measured Cells.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from dataclasses import replace as changed
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.common import Subject, say, subject
from models.data import MissingDataError
from models.minilm import embed, mean_cosine
from models.recipe import Recipe
from panther.batches import float_outputs, inference, run, squared_error
from panther.heal import heal
from panther.importance import reference
from panther.spec import Heal

STATES = ("unhealed", "healed")
MODELS = {"minilm": "models.minilm", "crepe": "models.crepe"}
EXCLUDED: dict[str, list[Any] | None] = {"minilm": None, "crepe": [nn.Linear]}  # CREPE's classifier stays dense
LAYER_OPS = frozenset(
    {"mm", "addmm", "convolution", "conv", "low_rank_conv", "low_rank_linear", "low_rank_linear_int8", "pivoted_linear"}
)  # attention's products without weights are bmm
COMPARED_SAMPLES = 64  # calibration samples on which a method's own options are compared
REASON = 300  # characters of a reason that are shown


@dataclass(frozen=True)
class Task:
    """A model, its data and the healing that every row gets; goes to a peer's process as JSON."""

    model: str  # a name of MODELS
    options: Mapping[str, Any] = field(default_factory=dict)  # of the recipe's own build
    minutes: float = 3.0  # of healing
    seed: int = 0


@dataclass(frozen=True)
class Flops:
    """Operations of one run of the example inputs, 2 for a multiply-add."""

    layers: int  # of Linear and Conv layers, or of what stands in their place, but for the excluded ones
    model: int  # of everything, attention included


@dataclass(frozen=True)
class Job:
    """A task with its model and data loaded."""

    task: Task
    recipe: Recipe
    of: Subject
    dense: Flops


@dataclass(frozen=True)
class Compressed:
    """What a method made of a model, and what a reader should know of it."""

    model: nn.Module
    notes: tuple[str, ...] = ()


class CannotError(Exception):
    """The method does not apply to this model; the text says why."""


Compress = Callable[[Job, float], Compressed]


@dataclass(frozen=True)
class Cell:
    """One method at one size: its figures, or why there are none."""

    model: str
    row: str
    share: float  # of the dense layers' FLOPs that was asked for
    state: str
    figures: Mapping[str, float] = field(default_factory=dict)
    layer_flops: float = 0.0  # share of the dense model's that it really has, in the layers
    model_flops: float = 0.0  # and in all
    seconds: float = 0.0  # of compressing, and of healing where it was healed
    notes: tuple[str, ...] = ()
    why: str = ""  # there are no figures

    @property
    def key(self) -> tuple[str, str, float, str]:
        return self.model, self.row, self.share, self.state

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Cell:
        fields = json.loads(line)
        return cls(**{**fields, "notes": tuple(fields["notes"])})


def load(task: Task) -> Job:
    """The model and its data.

    Raises: MissingDataError when something is not installed.
    """
    return job_of(task, importlib.import_module(MODELS[task.model]).build(**task.options))


def job_of(task: Task, recipe: Recipe) -> Job:
    of = subject(recipe, EXCLUDED[task.model])
    return Job(task, recipe, of, flops(recipe.model, of))


# FLOPs ----------------------------------------------------------------------------------------------------------------


def flops(model: nn.Module, of: Subject) -> Flops:
    """What a model multiplies, counted as it runs: the same way for dense, pruned, factorised and sketched layers."""
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with inference(model), counter:
        run(model, of.example)
    counts = counter.get_flop_counts()
    outside = [f"{type(model).__name__}.{spec.name}" for spec in of.found.layers if not spec.can_be_sketched]
    layers = _layer_flops(counts["Global"]) - sum(_layer_flops(counts.get(name, {})) for name in outside)
    return Flops(layers, sum(counts["Global"].values()))


def _layer_flops(counts: Mapping[Any, int]) -> int:
    return sum(count for op, count in counts.items() if str(op).partition(".")[2] in LAYER_OPS)


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


FORMULAS: dict[Any, Callable[..., int]] = {  # of what torch's counter does not know
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}


def largest_within(share: float, job: Job, build: Callable[[float], nn.Module], halvings: int = 8) -> float:
    """The largest size in (0, 1) at which `build(size)` has at most this share of the dense layers' FLOPs.

    Raises: CannotError when even the smallest that was tried has more.
    """
    low, high = 0.0, 1.0
    for _ in range(halvings):
        middle = (low + high) / 2
        if flops(build(middle), job.of).layers <= share * job.dense.layers:
            low = middle
        else:
            high = middle
    if low == 0.0:
        raise CannotError(f"its smallest model has more than {share:.2f} of the dense layers' FLOPs")
    return low


# Choosing among a method's own options --------------------------------------------------------------------------------


def best_of(job: Job, options: Mapping[str, Callable[[], nn.Module]]) -> Compressed:
    """The model that loses least on some calibration inputs; options that fail are noted.

    Raises: CannotError with every reason when none can be built.
    """
    found: list[tuple[float, str, nn.Module]] = []
    failed: list[str] = []
    for label, build in options.items():
        try:
            model = build()
            lost = lost_on_calibration(job, model)
        except Exception as error:
            failed.append(f"{label}: {reason(error)}")
            continue
        say(f"  {label}: loses {lost:.4f} on calibration data")
        found.append((lost, label, model))
    if not found:
        raise CannotError("; ".join(failed))
    _, best, model = min(found, key=lambda one: one[0])
    return Compressed(model, (f"best of {len(options)} on calibration data: {best}", *failed))


def lost_on_calibration(job: Job, model: nn.Module) -> float:
    """What the model loses by the measure that its figures use, without their data: smaller is better.

    A sentence encoder's is 1 - cosine of the embeddings, any other's the squared error of the outputs in units of
    their variance.
    """
    against = reference(job.of.model, job.of.calls, COMPARED_SAMPLES)
    if job.task.model == "minilm":
        dense, other = (torch.cat([embed(m, dict(c.kwargs)) for c in against.calls]) for m in (job.of.model, model))
        return 1 - mean_cosine(dense, other)
    lost, count = 0.0, 0
    with inference(model):
        for call, answers in zip(against.calls, against.outputs, strict=True):
            for answer, got in zip(answers, float_outputs(run(model, call)), strict=True):
                lost += squared_error(answer, got, call)
                count += answer.numel()
    return lost / max(1, count)


def reason(error: BaseException) -> str:
    """What went wrong, on one line."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return text if len(text) <= REASON else text[:REASON] + "..."


# Cells ----------------------------------------------------------------------------------------------------------------


def cells(
    job: Job,
    row: str,
    share: float,
    states: Sequence[str],
    compress: Compress,
    healing: Callable[[Job, nn.Module], tuple[str, ...]] | None = None,
) -> Iterator[Cell]:
    """The method's cells in the order of `states`; one that fails says why, and never ends the run.

    healing: trains a model in place and says how it went; None is `distilled`.
    """
    start = time.perf_counter()
    blank = Cell(job.task.model, row, share, "")
    try:
        made = compress(job, share)
    except Exception as error:
        why = str(error) if isinstance(error, CannotError) else reason(error)
        yield from (changed(blank, state=state, why=why) for state in states)
        return
    for state in states:
        try:
            notes = made.notes if state == "unhealed" else (*made.notes, *(healing or distilled)(job, made.model))
            seconds = time.perf_counter() - start
            cell = measured(job, changed(blank, state=state, seconds=seconds, notes=notes), made.model)
        except Exception as error:
            cell = changed(blank, state=state, why=reason(error))
        yield cell


def measured(job: Job, cell: Cell, model: nn.Module) -> Cell:
    """The cell with the model's figures and the FLOPs that it really has."""
    counted = flops(model, job.of)
    return changed(
        cell,
        figures=job.recipe.metrics(model),
        layer_flops=counted.layers / job.dense.layers,
        model_flops=counted.model / job.dense.model,
    )


def distilled(job: Job, model: nn.Module) -> tuple[str, ...]:
    """Train the model in place with panther's label-free distiller for the task's minutes; how it went, in words."""
    healed = heal(
        job.of.model,
        model,
        job.recipe.batches,
        job.recipe.example_inputs,
        settings=Heal(mode="distill", time_limit=60 * job.task.minutes),
        seed=job.task.seed,
        progress=False,
    )
    return f"distilled for {healed.seconds:.0f} s, {healed.steps} steps", *healed.notes


# A peer's process -----------------------------------------------------------------------------------------------------


def main(compress: Compress) -> int:
    """Compress, score, heal and score again, as the command line says; a cell a line of standard output, as JSON."""
    parser = argparse.ArgumentParser(description="Started by benchmarks.fidelity in the peer's own environment.")
    parser.add_argument("--task", required=True, help="a Task as JSON")
    parser.add_argument("--row", required=True, help="the name of the row")
    parser.add_argument("--share", type=float, required=True, help="of the dense layers' FLOPs")
    parser.add_argument("--states", nargs="+", choices=STATES, default=list(STATES))
    given = parser.parse_args()
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what the package prints is not an answer
        try:
            job = load(Task(**json.loads(given.task)))
        except MissingDataError as error:
            print(error)
            return 1
        for cell in cells(job, given.row, given.share, given.states, compress):
            print(cell.to_json(), file=answers, flush=True)
    return 0
