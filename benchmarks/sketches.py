"""What a sketch of the calibration rows saves beside their exact covariance, and what it loses.

`python -m benchmarks.sketches --widths 384 1024 4096` gives, for rows with slowly and fast falling spectra, alike or
with a few large ones: the seconds of the exact product in float32 (half its multiplications, as panther computes it),
of sketches with l = 2n, 4n, 8n rows, and of the exact product of l rows that are picked at random; of what
calibration does, which sketches each batch by itself where there are enough rows of enough features; and how much more
energy a basis from each loses than the best basis of its rank, in the exact covariance. Then the time of
panther.ops.hadamard beside its reference and a product with the matrix.

All see the same batches in turn; a ratio above 1 means faster than the exact product, or than the other transform.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common import command, say, table
from panther.build_info import build_info
from panther.measure import Accumulator
from panther.ops import OPS, hadamard, sparse_sign_sketch
from panther.products import gram

SPECTRA = {"slow": 0.5, "fast": 1.5}  # variance i falls as 1 / i^power
OUTLIERS = {"alike": 1.0, "outliers": 30.0}  # how much larger one row in 128 is, as the first token of many models
OUTLIER_EVERY = 128
MULTIPLES = (2, 4, 8)
RANKS = (8, 4, 2)  # of n: rank n/8, n/4, n/2
HADAMARD_SIZES = (64, 1024, 4096, 65536)
HADAMARD_NUMBERS = 1 << 20
LARGEST_MATRIX = 4096  # the product with a larger one is no rival


@dataclass(frozen=True)
class Case:
    """The rows of one layer's input."""

    n: int
    rows: int
    spectrum: str
    kind: str

    def batches(self, size: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        scale = torch.arange(1, self.n + 1).pow(-SPECTRA[self.spectrum] / 2)
        for first in range(0, self.rows, size):
            batch = torch.randn(min(size, self.rows - first), self.n, generator=generator) * scale
            batch[::OUTLIER_EVERY] *= OUTLIERS[self.kind]
            yield batch


class Exact:
    """The sum of the products of all rows, or of about `picked` random ones."""

    def __init__(self, case: Case, picked: int | None = None) -> None:
        self.share = 1.0 if picked is None else picked / case.rows
        self.sum = torch.zeros(case.n, case.n)
        self.generator = torch.Generator().manual_seed(1)
        self.name = "exact" if picked is None else f"{picked // case.n}n random rows"

    def add(self, batch: Tensor) -> None:
        if self.share < 1:
            batch = batch[torch.randperm(len(batch), generator=self.generator)[: round(self.share * len(batch))]]
        self.sum += gram(batch)

    def covariance(self) -> Tensor:
        return self.sum


class Sketched:
    """The sketch of all rows in l, whose product with itself is taken at the end."""

    def __init__(self, case: Case, size: int, nonzeros: int) -> None:
        self.sketch = torch.zeros(size, case.n)
        self.nonzeros, self.rows = nonzeros, 0
        self.name = f"sketch, l = {size // case.n}n"

    def add(self, batch: Tensor) -> None:
        sparse_sign_sketch(batch, self.sketch, first_row=self.rows, seed=0, nonzeros=self.nonzeros)
        self.rows += len(batch)

    def covariance(self) -> Tensor:
        return gram(self.sketch)


class Calibrating:
    """As panther accumulates the inputs of a layer."""

    def __init__(self, case: Case) -> None:
        self.sums = Accumulator(samples=case.rows)
        self.name = "as in calibration"

    def add(self, batch: Tensor) -> None:
        self.sums.add(batch, len(batch))

    def covariance(self) -> Tensor:
        """About zero, as of the other ways: what is subtracted there is added again."""
        found = self.sums.moments()
        if found is None:
            raise ValueError("no rows came")
        return (found.covariance + torch.outer(found.mean, found.mean)).float() * found.rows


def seconds_of(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def lost(covariance: Tensor, basis: Tensor, rank: int) -> float:
    """The energy outside the last `rank` columns of an orthonormal basis."""
    kept = basis[:, -rank:]
    return float(covariance.trace() - (kept * (covariance @ kept)).sum())


def compared(case: Case, multiples: Sequence[int], nonzeros: int, batch: int) -> list[list[str]]:
    """A row of the table for each way to the covariance."""
    ways: list[Exact | Sketched | Calibrating] = [Exact(case), Calibrating(case)]
    for size in (multiple * case.n for multiple in multiples):
        ways += [Sketched(case, size, nonzeros), Exact(case, size)]
    adding = [0.0] * len(ways)
    for rows in case.batches(batch):
        for index, way in enumerate(ways):
            adding[index] += seconds_of(functools.partial(way.add, rows))
    closing = [seconds_of(way.covariance) for way in ways]
    truth = ways[0].covariance().double()
    best = torch.linalg.eigh(truth).eigenvectors
    lines = []
    for way, *seconds in zip(ways, adding, closing, strict=True):
        basis = best if way is ways[0] else torch.linalg.eigh(way.covariance().double()).eigenvectors
        excess = [lost(truth, basis, case.n // part) / lost(truth, best, case.n // part) - 1 for part in RANKS]
        lines.append(
            [
                f"{case.n}, {case.rows}, {case.spectrum}, {case.kind}: {way.name}",
                *(f"{value:.3f}" for value in seconds),
                f"{(adding[0] + closing[0]) / sum(seconds):.1f}",
                *(f"{100 * value:.1f} %" for value in excess),
            ]
        )
    return lines


def transforms(n: int, numbers: int, repeats: int) -> list[str]:
    """Medians of panther.ops.hadamard, its reference and a product, in turns."""
    x = torch.randn(max(1, numbers // n), n)
    rivals: list[Callable[[], object]] = [lambda: hadamard(x), lambda: OPS["hadamard"].reference(x)]
    if n <= LARGEST_MATRIX:
        matrix = hadamard(torch.eye(n))
        rivals.append(lambda: x @ matrix)
    turns = [[seconds_of(rival) for rival in rivals] for _ in range(repeats)]
    own, *others = (statistics.median(times) for times in zip(*turns, strict=True))
    ratios = [f"{other / own:.1f}" for other in others]
    return [f"{len(x)} x {n}", f"{1e3 * own:.3f}", *ratios, *[""] * (2 - len(ratios))]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sketches", description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 1024], help="n, the columns of the rows")
    parser.add_argument("--rows", type=int, help="rows of each case (64 times its width)")
    parser.add_argument("--multiples", type=int, nargs="+", default=list(MULTIPLES), help="l as multiples of n")
    parser.add_argument("--spectra", nargs="+", choices=SPECTRA, default=list(SPECTRA))
    parser.add_argument("--kinds", nargs="+", choices=OUTLIERS, default=list(OUTLIERS))
    parser.add_argument("--nonzeros", type=int, default=4, help="rows of the sketch that each row is added to (4)")
    parser.add_argument("--batch", type=int, default=2048, help="rows that come at once (2048)")
    parser.add_argument("--repeats", type=int, default=9, help="turns of each transform (9)")
    given = parser.parse_args()
    found = []
    with torch.no_grad():
        for n, spectrum, kind in itertools.product(given.widths, given.spectra, given.kinds):
            case = Case(n, given.rows or 64 * n, spectrum, kind)
            say(f"{case.rows} rows of {n}, {spectrum} spectrum, {kind}")
            found += compared(case, given.multiples, given.nonzeros, given.batch)
        turns = [transforms(n, HADAMARD_NUMBERS, given.repeats) for n in HADAMARD_SIZES]
    columns = ["n, rows, spectrum, kind: way", "seconds", "closing", "times as fast"]
    columns += [f"excess at n/{part}" for part in RANKS]
    print(f"command: {command()}\n{build_info()}\n\n{table(columns, found)}\n")
    print(table(["hadamard", "ms", "times as fast as reference", "as matrix product"], turns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
