"""How much faster the randomised decomposition of a large layer is than the exact one, and what it loses and holds.

`python -m benchmarks.decomposition` on a machine that does nothing else: weights of 4096 x 4096 and 11008 x 4096 with
the covariance of their inputs, at rank 512, in a few minutes. Weights and statistics are random, their singular values
and eigenvalues fall as those of trained layers do.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.common import command, say, table
from panther.batches import Call
from panther.build_info import build_info
from panther.sketches import LowRank, Moments, Seen, randomised, whitened
from panther.verify import peak_memory

# Powers by which the singular values of the weight, and the eigenvalues of its inputs' covariance, fall.
SPECTRA = {"flat": (0.0, 0.5), "falling": (0.0, 1.0), "steep": (0.5, 1.0)}
SHAPES = ("4096x4096", "11008x4096")
COLUMNS = ("weight", "spectrum", "rank", "exact s", "randomised s", "ratio", "error", "over the optimum", "memory")
_POWERS = ", ".join(f"{name} {weight:g} and {inputs:g}" for name, (weight, inputs) in SPECTRA.items())
LEGEND = (
    f"spectrum, powers of the weight's singular values and of the covariance's eigenvalues: {_POWERS}\n"
    "error: share of the output energy that the exact sketch loses; over the optimum: how much more the randomised one "
    "loses, at this rank and at the worst of all up to it\n"
    "memory: the most that the randomised sketch allocates at once beside weight and statistics, in numbers of four "
    "bytes, as a multiple of rank x (rows + columns)"
)


@dataclass(frozen=True)
class Found:
    """Both decompositions of one weight."""

    shape: str
    spectrum: str
    rank: int
    exact_seconds: float
    randomised_seconds: float
    error: float
    excess: float  # at the rank
    worst: float  # at any rank up to it
    memory: float  # in numbers a rank, row and column

    def cells(self) -> list[str]:
        return [
            self.shape,
            self.spectrum,
            str(self.rank),
            f"{self.exact_seconds:.2f}",
            f"{self.randomised_seconds:.2f}",
            f"{self.exact_seconds / self.randomised_seconds:.1f}",
            f"{self.error:.4f}",
            f"{100 * self.excess:.2f} %, {100 * self.worst:.2f} %",
            f"{self.memory:.2f}",
        ]


class Sketching(nn.Module):
    """A decomposition as a model without weights, whose peak memory can be measured."""

    def __init__(self, sketch: Callable[[], LowRank]) -> None:
        super().__init__()
        self.sketch = sketch

    def forward(self) -> Tensor:
        return self.sketch().errors


def layer_of(shape: str, spectrum: str, generator: torch.Generator) -> tuple[Tensor, Seen]:
    """A weight and the covariance of its inputs, of different random directions.

    Raises: ValueError when the shape is not rows x columns.
    """
    try:
        m, n = map(int, shape.split("x"))
    except ValueError:
        raise ValueError(f"the shape {shape!r} is not rows x columns, as in 4096x4096") from None
    powers, places = SPECTRA[spectrum], torch.arange(1, n + 1, dtype=torch.float64)
    weight = (torch.randn(m, n, generator=generator) * places.float() ** -powers[0]) @ rotation(n, generator).T
    directions = rotation(n, generator).double()
    covariance = (directions * places ** -powers[1]) @ directions.T
    return weight, Seen(inputs=Moments(64 * n, torch.zeros(n, dtype=torch.float64), covariance))


def rotation(size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator)).Q


def measured(shape: str, spectrum: str, rank: int, seed: int) -> Found:
    """One of each, the exact one first; the memory in further runs, which are not timed."""
    weight, seen = layer_of(shape, spectrum, torch.Generator().manual_seed(seed))
    exact, exact_seconds = timed(functools.partial(whitened, weight, seen, max_rank=rank, generator=torch.Generator()))

    def sketch() -> LowRank:
        return randomised(weight, seen, max_rank=rank, generator=torch.Generator().manual_seed(seed))

    near, seconds = timed(sketch)
    excess = near.errors / exact.errors - 1
    return Found(
        shape,
        spectrum,
        rank,
        exact_seconds,
        seconds,
        float(exact.errors[-1]),
        float(excess[-1]),
        float(excess.max()),
        peak_memory(Sketching(sketch), Call(())) / 4 / (rank * sum(weight.shape)),
    )


def timed(sketch: Callable[[], LowRank]) -> tuple[LowRank, float]:
    start = time.perf_counter()
    found = sketch()
    return found, time.perf_counter() - start


def report(found: Sequence[Found], seed: int) -> str:
    rows = table(COLUMNS, [one.cells() for one in found])
    return "\n".join([f"command: {command()}", str(build_info()), f"seed {seed}", "", rows, "", LEGEND])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decomposition", description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="rows x columns (4096x4096 11008x4096)")
    parser.add_argument("--spectra", nargs="+", choices=SPECTRA, default=list(SPECTRA), help="(all)")
    parser.add_argument("--rank", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found = []
    try:
        for shape in given.shapes:
            for spectrum in given.spectra:
                say(f"{shape}, {spectrum}")
                found.append(measured(shape, spectrum, given.rank, given.seed))
    except ValueError as error:
        print(f"decomposition: {error}", file=sys.stderr)
        return 1
    print(report(found, given.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
