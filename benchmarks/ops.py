"""How long panther.ops.low_rank_linear takes, beside the two F.linear it replaces.

    python benchmarks/ops.py [--repeats N] [--shapes 384x128x1536,...] [--rows 1,2,4] [--threads 1,2]

Both run in turns, and the medians are compared: a ratio below 1 means that the op is faster.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from panther.build_info import build_info
from panther.ops import low_rank_linear

# in x rank x out of layers at keep 0.5: MiniLM's attention and feed-forward, BERT-base's, Whisper tiny's, CREPE's head.
SHAPES = "384x96x384,384x152x1536,1536x152x384,768x192x768,768x304x3072,3072x304x768,2048x152x360"
ROWS = "1,2,3,4,6,8,16,32,64"


def seconds_of(function: Callable[[], Tensor], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def medians(functions: list[Callable[[], Tensor]], repeats: int) -> list[float]:
    """Median seconds a call of each function, measured in turns of about 2 ms."""
    calls = [max(1, int(0.002 / seconds_of(function, 3))) for function in functions]
    turns = [[seconds_of(f, n) for f, n in zip(functions, calls, strict=True)] for _ in range(repeats)]
    return [statistics.median(times) for times in zip(*turns, strict=True)]


def compare(size_in: int, rank: int, size_out: int, rows: int, repeats: int) -> tuple[float, float]:
    """Median microseconds of the op and of two F.linear."""
    x, down, up = torch.randn(rows, size_in), torch.randn(rank, size_in), torch.randn(size_out, rank)
    bias = torch.randn(size_out)
    op, plain = medians(
        [lambda: low_rank_linear(x, down, up, bias), lambda: F.linear(F.linear(x, down), up, bias)], repeats
    )
    return op * 1e6, plain * 1e6


def numbers(text: str, separator: str = ",") -> list[int]:
    return [int(part) for part in text.split(separator)]


def main() -> None:
    parser = argparse.ArgumentParser(description="low_rank_linear beside two F.linear; ratios below 1 mean faster")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--shapes", default=SHAPES, help="in x rank x out, separated by commas")
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--threads", default="1,2")
    options = parser.parse_args()
    torch.manual_seed(0)
    for threads in numbers(options.threads):
        torch.set_num_threads(threads)
        print(build_info())
        print(f"{'in x rank x out':>18} {'rows':>5} {'op us':>9} {'2 linear us':>12} {'ratio':>6}")
        with torch.no_grad():
            for shape in options.shapes.split(","):
                for rows in numbers(options.rows):
                    size_in, rank, size_out = numbers(shape, "x")
                    op, plain = compare(size_in, rank, size_out, rows, options.repeats)
                    print(f"{shape:>18} {rows:>5} {op:>9.1f} {plain:>12.1f} {op / plain:>6.2f}")
        print()


if __name__ == "__main__":
    main()
