"""How much of a sentence encoder's embeddings is left at half of its weights, beside three baselines, and at what cost.

`python -m benchmarks.minilm` needs the Brown corpus (python -m benchmarks.fetch_data); `--text lee` needs packages from
PyPI only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.common import (
    METHODS,
    PANTHER,
    Row,
    Subject,
    built,
    factors_of,
    plans_of,
    report,
    rows_of,
    say,
    subject,
)
from benchmarks.peers.random_basis import with_random_bases
from models.data import CHECKOUT, MissingDataError
from models.minilm import NEIGHBOURS, SOURCES, build
from models.recipe import Recipe
from panther.batches import as_call, inference, run

FORMATS = {
    "cosine / top-10 / Spearman": lambda f: f"{f['cosine']:.3f} / {f['top10']:.2f} / {f['spearman']:.3f}",
    "Lee Pearson": lambda f: f"{f['lee_pearson']:.3f}",
}


def compare(recipe: Recipe, keeps: Sequence[float], seed: int) -> str:
    """The dense row, the random basis and every method of the other scripts, with their header."""
    of = subject(recipe)
    rows = with_random_row(recipe, of, keeps, seed)
    return report(recipe, of, rows, keeps, FORMATS, f"{of.samples} texts of other documents", seed)


def with_random_row(recipe: Recipe, of: Subject, keeps: Sequence[float], seed: int) -> list[Row]:
    dense, plain, *others = rows_of(recipe, of, METHODS, keeps, seed, "texts")
    random = {}
    for keep in keeps:
        say(f"{recipe.name}: random basis at keep {keep}")
        random[keep] = recipe.metrics(with_random_bases(of.model, plain.plans[keep], seed))
    return [dense, Row("random basis (the paper's layer)", "none", random, plain.plans), plain, *others]


@dataclass(frozen=True)
class Cost:
    """What compressing takes, beside what the dense model itself takes."""

    keep: float
    seconds: float  # measure, decompose, replace and pack
    forward_seconds: float  # one pass of the dense model over the same texts
    peak_before: int  # bytes of the process, once the dense model has run one batch
    peak_after: int  # once the compressed model exists

    def __str__(self) -> str:
        rise, before = (self.peak_after - self.peak_before) / 1e6, self.peak_before / 1e6
        times = self.seconds / self.forward_seconds
        return (
            f"cost at keep {self.keep}, uniform ranks: measure + decompose + replace + pack {self.seconds:.2f} s, one "
            f"forward pass over the calibration texts {self.forward_seconds:.2f} s: {times:.2f} times; peak memory of "
            f"the process rises by {rise:.0f} MB over {before:.0f} MB"
        )


def cost(recipe: Recipe, keep: float, seed: int, repeats: int) -> Cost:
    """Seconds (medians, in turns) and memory of this process, which should have done nothing else before.

    The memory includes capture, the seconds do not.
    """
    model = recipe.model
    with inference(model):
        run(model, as_call(recipe.batches[0]))
    before = peak_bytes()
    of = subject(recipe)
    stages, forwards, after = [], [], before
    for _ in range(repeats):
        stages.append(_stage_seconds(of, keep, seed))
        after = max(after, peak_bytes()) if len(stages) == 1 else after
        start = time.perf_counter()
        with inference(model):
            for call in of.calls:
                run(model, call)
        forwards.append(time.perf_counter() - start)
    return Cost(keep, statistics.median(stages), statistics.median(forwards), before, after)


def _stage_seconds(of: Subject, keep: float, seed: int) -> float:
    start = time.perf_counter()
    factors = factors_of(of, PANTHER, seed)
    middle = time.perf_counter()
    ((_, _, plan),) = plans_of(of, factors, ["uniform"], [keep], seed)
    restart = time.perf_counter()
    built(of, factors, plan)
    return time.perf_counter() - restart + middle - start


def peak_bytes() -> int:
    """The most memory that this process has held.

    Linux tells it without what the parent process held when it started this one, which getrusage counts.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cost_apart(text: str, calibration: int, keep: float, seed: int, repeats: int) -> Cost:
    """`cost` in a process of its own.

    Raises: CalledProcessError when that fails; why is on its stderr.
    """
    options = {"--text": text, "--calibration": calibration, "--seed": seed, "--repeats": repeats, "--keep": keep}
    words = [str(word) for option in options.items() for word in option]
    started = [sys.executable, "-m", "benchmarks.minilm", "--only-cost", *words]
    done = subprocess.run(started, cwd=CHECKOUT, check=True, stdout=subprocess.PIPE, text=True)
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.minilm", description=__doc__)
    parser.add_argument("--text", choices=sorted(SOURCES), default="brown")
    parser.add_argument("--calibration", type=int, default=512, help="calibration texts (512)")
    parser.add_argument("--held-out", type=int, default=512, help="texts that are compared (512)")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5], help="shares of the weights (0.75 0.5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3, help="runs whose median is the cost (3)")
    parser.add_argument("--only-cost", action="store_true", help="print the cost as JSON and nothing else")
    given = parser.parse_args()
    try:
        if given.only_cost:
            alone = build(given.text, given.calibration, NEIGHBOURS + 1, seed=given.seed)
            print(json.dumps(asdict(cost(alone, given.keep[-1], given.seed, given.repeats))))
            return 0
        recipe = build(given.text, given.calibration, given.held_out, seed=given.seed)
    except (MissingDataError, ValueError) as error:
        print(f"minilm: {error}", file=sys.stderr)
        return 1
    print(compare(recipe, given.keep, given.seed), flush=True)
    say("cost, in a process of its own")
    print(cost_apart(given.text, given.calibration, given.keep[-1], given.seed, given.repeats))
    return 0


if __name__ == "__main__":
    sys.exit(main())
