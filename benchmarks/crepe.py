"""Pitch tracking in noise with half and a quarter of CREPE's convolution weights, beside two baselines.

`python -m benchmarks.crepe` takes 1,000 tones of one seed; `--seeds 3` three times as many. Needs packages from PyPI
only.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence

from torch import nn

from benchmarks.common import METHODS, report, rows_of, subject
from models.crepe import build
from models.data import MissingDataError
from models.recipe import Recipe

FORMATS = {
    "-5 dB": lambda f: f"{f['accuracy_minus_5_db']:.3f}",
    "0 dB": lambda f: f"{f['accuracy_0_db']:.3f}",
}


def compare(recipe: Recipe, keeps: Sequence[float], seed: int, tones: int) -> str:
    """The dense row and every method, with their header; `tones` is how many each figure was measured on.

    The classifier stays dense in all of them, so that budgets count the weights of convolutions.
    """
    of = subject(recipe, exclude=[nn.Linear])
    rows = rows_of(recipe, of, METHODS, keeps, seed, "frames")
    notes = [
        "plain and whitened SVD split every convolution by output channels; panther takes each layer's best scheme",
        error_line(rows[0].figures[keeps[0]], tones),
    ]
    calibration = f"{of.samples} frames of other tones, from clean to -10 dB"
    return report(recipe, of, rows, keeps, FORMATS, calibration, seed, notes)


def error_line(dense: Mapping[str, float], tones: int) -> str:
    """How far a figure may be off, because there are only so many tones."""
    share = dense["accuracy_minus_5_db"]
    points = 100 * math.sqrt(share * (1 - share) / tones)
    return f"standard error of the dense figure at -5 dB, from {tones:,} tones: {points:.1f} points"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crepe", description=__doc__)
    parser.add_argument("--calibration", type=int, default=512, help="calibration frames (512)")
    parser.add_argument("--tones", type=int, default=1000, help="check tones a seed and noise level (1000)")
    parser.add_argument("--seeds", type=int, default=1, help="how many sets of check tones (1)")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25], help="shares of the weights (0.5 0.25)")
    parser.add_argument("--seed", type=int, default=0, help="of the compression (0)")
    given = parser.parse_args()
    try:
        recipe = build(given.calibration, given.tones, seeds=tuple(range(1, given.seeds + 1)))
    except (MissingDataError, ValueError) as error:
        print(f"crepe: {error}", file=sys.stderr)
        return 1
    print(compare(recipe, given.keep, given.seed, given.tones * given.seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
