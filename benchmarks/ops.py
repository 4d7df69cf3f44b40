"""How fast the linear layers of panther.ops are, beside what they replace.

low_rank_linear and its form for int8 stand beside two F.linear; linear ("dense float32") and quantised_linear ("dense
int8" with a scale a row, "dense int4" with a scale for 32 numbers) beside the F.linear of the dense layer.

`python -m benchmarks.ops` takes the layers of MiniLM, BERT, ViT and GPT-2 and 4096-wide ones.

Both run in turns; a ratio above 1 means that the op is faster. The weights are the same in each call, so that those of
the smaller layers stay in the cache (warm), or others, which no cache holds, as in a whole model (cold); there the
speed of reading is given beside that of summing up a large tensor. F.linear has float32 weights where the op's are
int8, since torch has none of these.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import command, say, table
from panther.build_info import build_info
from panther.ops import linear, low_rank_linear, low_rank_linear_int8, packed_int4, quantised, quantised_linear

LAYERS = {
    "MiniLM": [(384, 384), (384, 1536), (1536, 384)],
    "BERT, ViT, GPT-2": [(768, 768), (768, 2304), (768, 3072), (3072, 768)],
    "BERT large": [(1024, 1024)],
    "4096-wide": [(4096, 4096), (4096, 11008), (11008, 4096)],
}
KEEPS = (0.5, 0.25)
ROWS = (1, 2, 4, 6, 8, 12, 16, 32, 128, 512)
BITS = {"float32": 32, "bfloat16": 16, "int8": 8}
BITS |= {"dense float32": 32, "dense bfloat16": 16, "dense int8": 8, "dense int4": 4}  # beside x of float32
COLD_BYTES = 300_000_000  # of weights that calls take in turn: far more than any cache
TURN_SECONDS = 0.002
READ_BYTES = 400_000_000


@dataclass(frozen=True)
class Case:
    """One layer and batch, and what was found."""

    group: str
    size_in: int
    rank: int  # 0 for a dense layer
    size_out: int
    rows: int
    dtype: str
    threads: int
    is_cold: bool
    op: float = 0.0  # microseconds a call, as is
    plain: float = 0.0

    @property
    def ratio(self) -> float:
        return self.plain / self.op

    @property
    def gigabytes_a_second(self) -> float:
        return self.numbers * BITS[self.dtype] / 8 / self.op / 1e3

    @property
    def numbers(self) -> int:
        return self.rank * (self.size_in + self.size_out) if self.rank else self.size_in * self.size_out

    @property
    def is_dense(self) -> bool:
        return self.dtype.startswith("dense")


def rank_of(size_in: int, size_out: int, keep: float) -> int:
    return max(8, round(keep * size_in * size_out / (size_in + size_out) / 8) * 8)


def cases(
    groups: Sequence[str], rows: Sequence[int], dtypes: Sequence[str], threads: Sequence[int], caches: Sequence[bool]
) -> Iterator[Case]:
    for thread, dtype, is_cold in itertools.product(threads, dtypes, caches):
        for group, keep in itertools.product(groups, (0,) if dtype.startswith("dense") else KEEPS):
            for (size_in, size_out), count in itertools.product(LAYERS[group], rows):
                rank = rank_of(size_in, size_out, keep) if keep else 0
                yield Case(group, size_in, rank, size_out, count, dtype, thread, is_cold)


Inputs = tuple[Tensor, ...]


def inputs_of(case: Case) -> list[Inputs]:
    """One set of inputs of F.linear, or as many as no cache holds."""
    dtype = torch.bfloat16 if case.dtype == "bfloat16" else torch.float32
    count = math.ceil(COLD_BYTES / (case.numbers * dtype.itemsize)) if case.is_cold else 1
    x, bias = torch.randn(case.rows, case.size_in).to(dtype), torch.randn(case.size_out).to(dtype)
    shapes = [(case.rank, case.size_in), (case.size_out, case.rank)] if case.rank else [(case.size_out, case.size_in)]
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    return [(x, *(weight.clone() for weight in weights), bias) for _ in range(count)]


def in_few_bits(inputs: list[Inputs], dtype: str) -> list[Inputs]:
    """The inputs of the op for int8, or of quantised_linear; the weights are equal numbers, in memory of their own."""
    x, *weights, bias = inputs[0]
    if dtype == "dense bfloat16":
        parts = [weights[0].bfloat16().view(torch.int16), weights[0].new_empty(len(weights[0]), 0)]
    elif dtype == "dense int4":
        values, scales = quantised(weights[0], 32, bits=4)
        parts = [packed_int4(values), scales]
    else:
        parts = [part for weight in weights for part in quantised(weight)]
    return [(x, *(part.clone() for part in parts), bias) for _ in inputs]


def plain(x: Tensor, *weights_and_bias: Tensor) -> Tensor:
    *inner, last, bias = weights_and_bias
    for weight in inner:
        x = F.linear(x, weight)
    return F.linear(x, last, bias)


OPS: dict[str, Callable[..., Tensor]] = {
    "float32": low_rank_linear,
    "bfloat16": low_rank_linear,
    "int8": low_rank_linear_int8,
    "dense float32": linear,
    "dense bfloat16": quantised_linear,
    "dense int8": quantised_linear,
    "dense int4": quantised_linear,
}


def seconds_of(function: Callable[..., Tensor], inputs: Iterator[Inputs], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function(*next(inputs))
    return (time.perf_counter() - start) / calls


def measured(case: Case, repeats: int) -> Case:
    """Medians of both, in turns of about TURN_SECONDS."""
    given = inputs_of(case)
    is_given = case.dtype in ("float32", "bfloat16", "dense float32")
    own = given if is_given else in_few_bits(given, case.dtype)
    dense = F.linear if case.is_dense else plain
    both = [(function, itertools.cycle(inputs)) for function, inputs in ((OPS[case.dtype], own), (dense, given))]
    calls = [max(1, int(TURN_SECONDS / seconds_of(function, inputs, 3))) for function, inputs in both]
    turns = [[seconds_of(*one, count) for one, count in zip(both, calls, strict=True)] for _ in range(repeats)]
    op, other = (1e6 * statistics.median(times) for times in zip(*turns, strict=True))
    return Case(**{**vars(case), "op": op, "plain": other})


def reading_speed(repeats: int = 7) -> float:
    """GB/s of the best plain read: the sum of a large tensor."""
    tensor = torch.ones(READ_BYTES // 4)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        tensor.sum()
        times.append(time.perf_counter() - start)
    return READ_BYTES / min(times) / 1e9


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def summary(found: Sequence[Case], reads: dict[int, float]) -> str:
    """By threads, type and cache: the ratio at every number of rows, the worst, and what a single row tells."""
    lines = []
    rows = sorted({case.rows for case in found})
    single_rows = {
        _without_dtype(case): case.op for case in found if case.dtype.endswith("float32") and case.rows == rows[0]
    }
    for key, group in itertools.groupby(found, key=lambda case: (case.threads, case.dtype, case.is_cold)):
        part = list(group)
        threads, dtype, is_cold = key
        single = [case.gigabytes_a_second / reads[threads] for case in part if case.rows == rows[0]]
        wider = [single_rows[_without_dtype(c)] / c.op for c in part if _without_dtype(c) in single_rows]
        lines.append(
            [
                f"{threads} threads, {dtype}, {'other weights each call' if is_cold else 'the same weights'}",
                *(f"{geometric_mean([c.ratio for c in part if c.rows == count]):.2f}" for count in rows),
                f"{min(case.ratio for case in part):.2f}",
                f"{100 * statistics.median(single):.0f} %" if is_cold else "",
                f"{geometric_mean(wider):.2f}" if wider else "",
            ]
        )
    last = ["worst", f"reading, {rows[0]} rows", f"to the op in float32, {rows[0]} rows"]
    return table(["geometric mean of the ratios", *(f"{n} rows" for n in rows), *last], lines)


def _without_dtype(case: Case) -> tuple[Any, ...]:
    return case.size_in, case.rank, case.size_out, case.rows, case.threads, case.is_cold


def details(found: Sequence[Case]) -> str:
    rows = sorted({case.rows for case in found})
    by_layer: dict[tuple[str, ...], dict[int, Case]] = {}
    for c in found:
        where = "cold" if c.is_cold else "warm"
        shape = " x ".join(str(size) for size in (c.size_in, c.rank, c.size_out) if size)
        by_layer.setdefault((c.group, shape, c.dtype, f"{c.threads} threads, {where}"), {})[c.rows] = c
    lines = [[", ".join(key), *(f"{known[n].ratio:.2f}" for n in rows)] for key, known in by_layer.items()]
    return table(["in x rank x out", *(f"{n} rows" for n in rows)], lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="turns of each (9)")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--dtypes", nargs="+", choices=BITS, default=list(BITS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cache", nargs="+", choices=["in", "out"], default=["in", "out"])
    given = parser.parse_args()
    torch.manual_seed(0)
    before, reads, found = torch.get_num_threads(), {}, []
    try:
        with torch.no_grad():
            caches = [cache == "out" for cache in given.cache]
            for case in cases(given.layers, given.rows, given.dtypes, given.threads, caches):
                torch.set_num_threads(case.threads)
                if case.threads not in reads:
                    reads[case.threads] = reading_speed()
                    say(f"{case.threads} threads: {reads[case.threads]:.1f} GB/s of plain reading")
                found.append(measured(case, given.repeats))
    finally:
        torch.set_num_threads(before)
    speeds = ", ".join(f"{speed:.1f} GB/s with {threads} threads" for threads, speed in reads.items())
    lines = [f"command: {command()}", str(build_info()), f"plain reading: {speeds}"]
    print("\n".join([*lines, "", details(found), "", summary(found, reads)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
