"""How fast convolutions of panther.ops are, beside what they replace.

`python -m benchmarks.convolutions` takes layers of CREPE, ResNet-50, EfficientNet-lite0, Whisper's encoder, a temporal
network and of large pictures: "low rank" are the two convolutions of an SKConv that keeps half of the numbers, beside
the same two in torch; "dense", "int8" (a scale a row) and "int4" (a scale for 32 numbers) the whole layer, beside
torch's in float32.

All of a layer's run in turns; a ratio above 1 means that panther's is faster.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from benchmarks.common import command, table
from panther.build_info import build_info
from panther.nn import QUANTISED, SKETCHED
from panther.nn.conv import SketchedConv
from panther.ops import conv
from panther.verify import medians_in_turn


@dataclass(frozen=True)
class Layer:
    channels: int
    out: int
    kernel: int
    size: tuple[int, ...]
    stride: int = 1
    padding: int | None = None  # None: half of the kernel

    @property
    def name(self) -> str:
        stride = f" / {self.stride}" if self.stride > 1 else ""
        kernel, size = (" x ".join([str(n)] * len(self.size)) for n in (self.kernel, self.size[0]))
        return f"{self.channels} to {self.out}, {kernel}{stride}, of {size}"

    def module(self) -> nn.Module:
        dense = {1: nn.Conv1d, 2: nn.Conv2d}[len(self.size)]
        padding = self.kernel // 2 if self.padding is None else self.padding
        return dense(self.channels, self.out, self.kernel, stride=self.stride, padding=padding)


LAYERS = {
    "CREPE": [
        Layer(1, 1024, 512, (1024,), 4, 254),
        Layer(1024, 128, 64, (128,)),
        Layer(128, 128, 64, (64,)),
        Layer(128, 256, 64, (16,)),
        Layer(256, 512, 64, (8,)),
    ],
    "ResNet-50": [
        Layer(3, 64, 7, (224, 224), 2),
        Layer(64, 64, 3, (56, 56)),
        Layer(64, 256, 1, (56, 56)),
        Layer(256, 128, 1, (56, 56)),
        Layer(128, 128, 3, (28, 28)),
        Layer(256, 256, 3, (14, 14)),
        Layer(1024, 256, 1, (14, 14)),
        Layer(512, 512, 3, (7, 7)),
        Layer(512, 2048, 1, (7, 7)),
    ],
    "EfficientNet": [
        Layer(16, 96, 1, (112, 112)),
        Layer(24, 144, 1, (56, 56)),
        Layer(40, 240, 1, (28, 28)),
        Layer(112, 672, 1, (14, 14)),
        Layer(672, 192, 1, (7, 7)),
        Layer(320, 1280, 1, (7, 7)),
    ],
    "Whisper": [Layer(80, 384, 3, (3000,)), Layer(384, 384, 3, (3000,), 2)],
    "temporal": [Layer(256, 256, 5, (300,)), Layer(128, 128, 7, (1000,)), Layer(512, 512, 3, (799,), 2, 0)],
    "large pictures": [Layer(64, 64, 3, (256, 256)), Layer(64, 128, 1, (256, 256)), Layer(48, 8, 1, (200, 200))],
}
KEEP = 0.5
KINDS = ("low rank", "dense", "int8", "int4")

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One layer, batch and kind, and what was found."""

    group: str
    layer: Layer
    batch: int
    threads: int
    kind: str
    ratio: float = 0.0


def runs(dense: nn.Module, x: Tensor) -> Iterator[tuple[str, Run, Run]]:
    """Each kind, in panther's ops and in torch's."""
    chain, other = _chain(dense), copy.deepcopy(dense)
    yield "low rank", functools.partial(chain, x), functools.partial(_in_torch, copy.deepcopy(chain), x)
    where = {"stride": dense.stride, "padding": dense.padding, "dilation": dense.dilation}
    plain = functools.partial(other, x)
    yield "dense", functools.partial(conv, x, dense.weight, dense.bias, **where), plain
    quantised = QUANTISED[type(dense)]
    yield "int8", functools.partial(quantised.from_dense(dense, bits=8), x), plain
    yield "int4", functools.partial(quantised.from_dense(dense, bits=4, group_size=32), x), plain


def _chain(dense: nn.Module) -> SketchedConv:
    taps, (out, channels) = dense.weight[0, 0].numel(), dense.weight.shape[:2]
    rank = max(8, round(KEEP * out * channels * taps / (channels * taps + out) / 8) * 8)
    return cast(SketchedConv, SKETCHED[type(dense)].from_dense(dense, num_terms=1, low_rank=rank // 2))


def _in_torch(chain: SketchedConv, x: Tensor) -> Tensor:
    for link, weight in zip(chain._links, chain.active_weights(), strict=True):
        bias = chain.bias if link is chain._links[-1] else None
        x = chain.CONVOLVE(x, weight, bias, link.stride, link.padding, link.dilation)
    return x


def measured(group: str, layer: Layer, batch: int, threads: int, seconds: float) -> list[Case]:
    dense = layer.module().eval()
    cases = list(runs(dense, torch.randn(batch, layer.channels, *layer.size)))
    # One of panther's, one of torch's, with weights of their own: none finds them in the caches.
    times = medians_in_turn([run for _, own, other in cases for run in (own, other)], seconds=seconds)
    case = Case(group, layer, batch, threads, "")
    return [
        replace(case, kind=kind, ratio=slow / fast)
        for (kind, _, _), fast, slow in zip(cases, times[::2], times[1::2], strict=True)
    ]


def details(found: Sequence[Case]) -> str:
    lines = []
    for (group, layer, batch, threads), part in itertools.groupby(
        found, key=lambda case: (case.group, case.layer, case.batch, case.threads)
    ):
        ratios = [f"{case.ratio:.2f}" for case in part]
        lines.append([f"{group}: {layer.name}", f"batch {batch}, {threads} threads", *ratios])
    return table(["times as fast as torch", "", *KINDS], lines)


def summary(found: Sequence[Case]) -> str:
    """By models, threads and batch: the geometric means; and the slowest of all."""
    lines = []
    groups = sorted({(c.threads, c.batch, c.group) for c in found}, key=lambda key: key[:2])
    for threads, batch, group in groups:
        part = [c for c in found if (c.threads, c.batch, c.group) == (threads, batch, group)]
        means = [statistics.geometric_mean([c.ratio for c in part if c.kind == kind]) for kind in KINDS]
        lines.append([f"{group}, batch {batch}, {threads} threads", *(f"{mean:.2f}" for mean in means)])
    slowest = [min(c.ratio for c in found if c.kind == kind) for kind in KINDS]
    lines.append(["slowest layer of all", *(f"{ratio:.2f}" for ratio in slowest)])
    return table(["geometric mean of the layers", *KINDS], lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convolutions", description=__doc__)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each layer, batch and number of threads (2)")
    given = parser.parse_args()
    torch.manual_seed(0)
    before, found = torch.get_num_threads(), []
    try:
        with torch.no_grad():
            for threads, batch, group in itertools.product(given.threads, given.batch, given.layers):
                torch.set_num_threads(threads)
                for layer in LAYERS[group]:
                    found += measured(group, layer, batch, threads, given.seconds)
    finally:
        torch.set_num_threads(before)
    print("\n".join([f"command: {command()}", str(build_info()), "", details(found), "", summary(found)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
