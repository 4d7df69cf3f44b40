"""How fast covariances are summed up: panther.ops.add_moments beside what torch needs for the same.

`python -m benchmarks.moments` on a machine that does nothing else: float32 rows of which one in fourteen is padding,
as calibration leaves it, less their mean, into sums in float64. Torch copies the rows that count, subtracts, multiplies
by the plain product, or by blocks of columns with those before them, and adds. All in turns; a ratio above 1 means
that the op is faster.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import command, table
from panther.build_info import build_info
from panther.ops import add_moments
from panther.products import BLOCK
from panther.verify import medians_in_turn

COLUMNS = ("numbers a row", "rows", "threads", "useful GFLOPS", "beside the plain product", "beside blocks")
PADDING = 14  # one row in so many does not count


def line(n: int, rows: int, seconds: float, seed: int) -> list[str]:
    """One row of the table."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n, generator=generator)
    counts = torch.randperm(rows, generator=generator) >= rows // PADDING
    shift = x.mean(0)
    sums, products = torch.zeros(n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)

    def with_torch(multiply: Callable[[Tensor], None]) -> None:
        z = x[counts] - shift
        sums.add_(z.sum(0))
        multiply(z)

    def plain(z: Tensor) -> None:
        products.add_(z.T @ z)

    def blocks(z: Tensor) -> None:
        for first in range(0, n, BLOCK):
            last = min(first + BLOCK, n)
            products[first:last, :last] += z[:, first:last].T @ z[:, :last]

    runs = [
        lambda: add_moments(sums, products, x, counts=counts, shift=shift),
        lambda: with_torch(plain),
        lambda: with_torch(blocks),
    ]
    own, *others = medians_in_turn(runs, seconds=seconds)
    useful = int(counts.sum()) * n * (n + 1) / own / 1e9
    return [str(n), str(rows), str(torch.get_num_threads()), f"{useful:.0f}", *(f"{t / own:.2f}" for t in others)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moments", description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 768, 1536], help="numbers a row")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 832, 2048], help="at a time")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=3.0, help="each row of the table (3)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    lines = []
    for threads in given.threads:
        torch.set_num_threads(threads)
        lines += [line(n, rows, given.seconds, given.seed) for n in given.widths for rows in given.rows]
    print(f"command: {command()}\n{build_info()}\nseed {given.seed}\n\n{table(COLUMNS, lines)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
