"""What the statistics of calibration cost beside the forward passes that they are taken in.

`python -m benchmarks.calibration` on a machine that does nothing else, in a few minutes: the calibration data of MiniLM
and CREPE through the dense model as it is, through the same in the kernels that panther takes for work of its own, with
the statistics of all its layers watched, and with channels and backward passes as well, as panther.compress has it; in
turns.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence

import torch

from benchmarks.common import Subject, header, say, subject, table
from models import crepe, minilm
from models.data import MissingDataError
from models.recipe import Recipe
from panther.batches import inference, run
from panther.channels import narrowable
from panther.gradients import chunk_size
from panther.measure import affordable_gradients, measure, passes
from panther.products import fast_layers
from panther.verify import medians_in_turn

COLUMNS = (
    *("model", "samples", "layers", "passes", "as torch runs it, s", "forward s"),
    *("statistics", "and channels", "and backward passes"),
)
LEGEND = (
    "forward: in the kernels that panther takes; statistics, and channels, and backward passes: what each adds to all "
    "before it, as a share of that; "
    "where statistics need several passes, the first of them"
)


def line(recipe: Recipe, seconds: float, seed: int) -> list[str]:
    """One row: every kind of pass, `seconds` for all of them in turns."""
    say(f"{recipe.name}: measuring")
    of = subject(recipe)
    narrow = narrowable(of.found.sketchable, of.found.followers)
    parts = passes(of.found.sketchable, narrow)

    def forward() -> None:
        with inference(of.model):
            for call in of.calls:
                run(of.model, call)

    def in_fast_layers() -> None:
        with fast_layers():
            forward()

    def watched(channels_of: Sequence[str], gradients: int) -> Callable[[], object]:
        return lambda: measure(
            of.model,
            parts[0],
            of.calls,
            samples=of.samples,
            channels_of=channels_of,
            gradient_samples=gradients,
            chunk=_chunk(of),
            seed=seed,
        )

    kinds = [
        forward,
        in_fast_layers,
        watched((), 0),
        watched(tuple(narrow), 0),
        watched(tuple(narrow), affordable_gradients(of.samples)),
    ]
    times = medians_in_turn(kinds, seconds=seconds)
    plain, *times = times
    shares = [f"{100 * (after - before) / times[0]:+.0f} %" for before, after in itertools.pairwise(times)]
    counts = [str(of.samples), str(len(parts[0])), str(len(parts))]
    return [recipe.name, *counts, f"{plain:.3g}", f"{times[0]:.3g}", *shares]


def _chunk(of: Subject) -> int:
    return max(1, chunk_size(of.found.layers, of.example.batch_size))


BUILD: dict[str, Callable[[argparse.Namespace], Recipe]] = {
    "minilm": lambda of: minilm.build(of.text, of.samples, minilm.NEIGHBOURS + 1, seed=of.seed),
    "crepe": lambda of: crepe.build(of.samples, count=1),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=BUILD, default=list(BUILD), help="which (all)")
    parser.add_argument("--text", choices=sorted(minilm.SOURCES), default="brown", help="calibration text of MiniLM")
    parser.add_argument("--samples", type=int, default=512, help="texts and frames (512)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=90.0, help="for each model (90)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    try:
        recipes = [BUILD[name](given) for name in given.models]
        lines = [line(recipe, given.seconds, given.seed) for recipe in recipes]
    except MissingDataError as error:
        print(f"calibration: {error}", file=sys.stderr)
        return 1
    what = [f"{given.threads} threads; medians of passes in turns"]
    print("\n".join([header(recipes, what, given.seed), "", table(COLUMNS, lines), "", LEGEND]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
