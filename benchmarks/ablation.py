"""What each of panther's techniques is worth at one size: added one after the other, and each alone.

Started by `python -m benchmarks.fidelity --ablation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed

from torch import nn

from benchmarks.common import METHODS, ONE_SCHEME, PANTHER, Decomposition, Subject, factors_of, plans_of
from benchmarks.peers.base import Compress, Compressed, Job
from panther.chains import PACKINGS, TWO_GEMM
from panther.factors import Factors
from panther.heal import heal
from panther.pack import pack
from panther.replace import replace
from panther.spec import Budget, Heal, Plan

PLAIN = METHODS[0].how
WHITENED = Decomposition("whitened", ONE_SCHEME)
ALL_SCHEMES = changed(PANTHER, channels=False)


@dataclass(frozen=True)
class Variant:
    """Which techniques a row has."""

    label: str
    how: Decomposition = WHITENED
    search: str = "uniform"
    packings: tuple[str, ...] = (TWO_GEMM,)
    mode: str = "none"  # of panther.Heal
    refits: bool = True  # whether healing begins with the closed form


@dataclass
class Fits:
    """Decompositions of one model; neighbouring rows share the last."""

    of: Subject
    seed: int
    how: Decomposition | None = None
    last: Mapping[str, Factors] = field(default_factory=dict)

    def __call__(self, how: Decomposition) -> Mapping[str, Factors]:
        if how != self.how:
            self.last = {}  # not two at a time in memory
            self.how, self.last = how, factors_of(self.of, how, self.seed)
        return self.last

    def plan(self, how: Decomposition, search: str, share: float, packings: Sequence[str]) -> Plan:
        """The plan at this share of the FLOPs."""
        budget = Budget(flops=share)
        ((_, _, plan),) = plans_of(self.of, self(how), [search], [budget], self.seed, packings)
        return plan


def variants(of: Subject) -> tuple[Variant, ...]:
    """Every row, first those that add up and then those with one technique each.

    The choice among schemes is a technique only where there are convolutions.
    """
    has_convolutions = any(spec.kernel_size for spec in of.found.sketchable)
    sensitive = changed(WHITENED, sees_gradients=True)
    sums = [Variant("plain SVD", PLAIN), Variant("+ whitening"), Variant("+ sensitivity of the output", sensitive)]
    if has_convolutions:
        sums.append(Variant("+ choice of the scheme", ALL_SCHEMES))
    ranked = Variant("+ ranks by importance", ALL_SCHEMES if has_convolutions else sensitive, "sensitivity")
    pivots = changed(ranked, label="+ pivoted packing", packings=PACKINGS)
    everything = changed(pivots, label="+ fewer channels", how=changed(pivots.how, channels=True))
    healed = [("+ refit", "refit"), ("+ blocks", "blocks"), ("+ distillation: all together", "auto")]
    sums += [ranked, pivots, everything, *(changed(everything, label=label, mode=mode) for label, mode in healed)]
    alone = [
        Variant("whitening + sensitivity of the output alone", sensitive),
        *([Variant("whitening + choice of the scheme alone", Decomposition("whitened"))] if has_convolutions else []),
        Variant("whitening + ranks by importance alone", search="sensitivity"),
        Variant("whitening + pivoted packing alone", packings=PACKINGS),
        Variant("whitening + refit alone", mode="refit"),
        Variant("whitening + blocks alone", mode="blocks", refits=False),
        Variant("whitening + distillation alone", mode="distill", refits=False),
    ]
    return (*sums, *alone)


def compress_as(variant: Variant, fits: Fits) -> Compress:
    """How a variant compresses: panther's own stages, with its techniques and no others."""

    def compress(job: Job, share: float) -> Compressed:
        plan = fits.plan(variant.how, variant.search, share, variant.packings)
        student = replace(job.of.model, fits(variant.how), plan)
        notes = [] if variant.mode == "none" else _heal(job, student, plan, fits(variant.how), variant)
        return Compressed(pack(student, plan, job.of.found.followers, notes=notes), tuple(notes))

    return compress


def _heal(job: Job, student: nn.Module, plan: Plan, factors: Mapping[str, Factors], variant: Variant) -> list[str]:
    """Heal the student in place with what the variant may know; how it went, in words."""
    seen = {name: known.profile.seen.sensitivity for name, known in factors.items()}
    sketched = {choice.layer for choice in plan.sketched}
    done = heal(
        job.of.model,
        student,
        job.recipe.batches,
        job.recipe.example_inputs,
        Heal(mode=variant.mode, time_limit=60 * job.task.minutes),
        layers=[spec for spec in job.of.found.sketchable if spec.name in sketched] if variant.refits else (),
        sensitivities={name: matrix for name, matrix in seen.items() if matrix is not None},
        narrow={c.layer: factors[c.layer].at(c).module for c in plan.sketched if c.channels},
        seed=job.task.seed,
    )
    return [f"healed for {done.seconds:.0f} s, {done.steps} steps", *done.notes]
