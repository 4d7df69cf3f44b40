"""Whether an exported file computes what the model computes, as data that prints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from panther.spec import to_data

# How far an output may be off, as a share of that output's largest value. float32: MiniLM and small CNNs show 1e-6
# to 1e-5, a wrong graph 1e-2 and more. The others: ten units in the last place of the type, as sums are long.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}

# Of the root mean square of an output: what rounding inputs may change. MiniLM's token vectors show .2 to .3, whose
# means, the embeddings, keep a cosine of .99; what is broken shows 1.
MOST_ROUNDED = 0.5

# An output whose largest value is below this is compared with it instead: it is rounding noise of larger numbers.
SMALLEST_SCALE = 1e-6


@dataclass(frozen=True)
class ShapeCheck:
    """One run of the file beside the model: the input shapes, and the largest difference over all outputs."""

    shapes: Mapping[str, tuple[int, ...]]
    max_abs: float
    max_rel: float  # as a share of the output's largest value
    ok: bool
    problem: str = ""  # why the file could not be run at these shapes

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {shape}" for name, shape in self.shapes.items())
        figures = self.problem or f"max difference {self.max_abs:.2g}, relative {self.max_rel:.2g}"
        return f"{shapes}: {figures}  {'ok' if self.ok else 'FAILED'}"


@dataclass(frozen=True)
class ExportReport:
    """An exported file and what was checked of it. str() is for people, to_json() for programs."""

    path: Path  # ends in .failed.<extension> when the parity failed
    size_bytes: int  # with external data
    external_data: Path | None  # the weights, when they are beside the model
    opset: int
    dynamic: tuple[str, ...]  # the sizes that may differ from the example's: "batch", "sequence"
    checks: tuple[ShapeCheck, ...]  # empty with verify=False
    tolerance: float
    ok: bool  # every check passed, and `rounding` is small
    standard_ops: bool
    seconds: float
    notes: tuple[str, ...] = ()
    # What rounding inputs changes besides: root mean square of the differences, as a share of the output's own. The
    # checks are of the file before that. None where inputs are not rounded, or that was not looked at.
    rounding: float | None = None

    def to_json(self) -> str:
        return json.dumps(to_data(self), indent=1, default=str, allow_nan=False)

    def __str__(self) -> str:
        ops = "standard operators only" if self.standard_ops else "operators of other domains"
        beside = f" (weights in {self.external_data.name})" if self.external_data else ""
        lines = [
            f"{self.path}: {self.size_bytes / 1e6:.1f} MB{beside}, opset {self.opset}, {ops}, {self.seconds:.1f} s",
            f"sizes that may vary: {', '.join(self.dynamic) or 'none'}; all others are the example's",
        ]
        if self.checks:
            verdict = "agrees with" if all(check.ok for check in self.checks) else "DIFFERS from"
            before = "" if self.rounding is None else "before inputs were rounded, it "
            lines.append(f"{before}{verdict} the model (tolerance {self.tolerance:.0e} of each output's largest value)")
        lines += [f"  {check}" for check in self.checks]
        if self.rounding is not None:
            verdict = "" if self.ok else f", MORE than the {MOST_ROUNDED:g} allowed"
            lines.append(f"inputs rounded to 8 bits: answers change by {self.rounding:.2g} of their rms{verdict}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def tolerance_for(tensors: list[Tensor]) -> float:
    """The tolerance of the least exact floating-point type among the tensors."""
    return max((TOLERANCES.get(tensor.dtype, 0.0) for tensor in tensors), default=0.0) or TOLERANCES[torch.float32]


def relative_rms(got: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference as a share of the wanted values' own; of integers, the share that differs.

    Values that are not finite in both are left out; infinite where they differ in that, or in shape.
    """
    if got.shape != wanted.shape:
        return math.inf
    if not wanted.is_floating_point():
        return (got != wanted).double().mean().item() if wanted.numel() else 0.0
    a, b = got.double(), wanted.double()
    finite = torch.isfinite(b)
    if not torch.equal(torch.isfinite(a), finite):
        return math.inf
    a, b = a[finite], b[finite]
    size = b.square().mean().sqrt().item() if b.numel() else 0.0
    return (a - b).square().mean().sqrt().item() / max(size, SMALLEST_SCALE) if b.numel() else 0.0


def difference(got: Tensor, wanted: Tensor) -> tuple[float, float]:
    """The largest absolute difference, and the same as a share of the largest value wanted.

    Both are infinite when shapes differ, or when NaN or Inf are not where they should be; integers and booleans count
    as infinitely different unless equal.
    """
    if got.shape != wanted.shape:
        return math.inf, math.inf
    if not wanted.is_floating_point():
        return (0.0, 0.0) if torch.equal(got.to(wanted.dtype), wanted) else (math.inf, math.inf)
    a, b = got.double(), wanted.double()
    finite = torch.isfinite(b)
    if not torch.equal(a.masked_fill(finite, 0).nan_to_num(nan=1.0), b.masked_fill(finite, 0).nan_to_num(nan=1.0)):
        return math.inf, math.inf
    a, b = a[finite], b[finite]
    if not b.numel():
        return 0.0, 0.0
    largest = (a - b).abs().max().item()
    largest = math.inf if math.isnan(largest) else largest
    return largest, largest / max(b.abs().max().item(), SMALLEST_SCALE)
