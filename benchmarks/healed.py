"""Real models made smaller and healed without labels by panther.compress, as a user would, beside plain SVD.

`python -m benchmarks.healed --minutes 15` takes about half an hour a model: the minutes are of training alone. Needs
what models/requirements-bench.txt lists and what `python -m benchmarks.fetch_data` gets.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

import panther
from benchmarks.common import METHODS, compressed, header, say, subject, table
from models import crepe, efficientnet, whisper
from models.data import MissingDataError
from models.recipe import Recipe

COLUMNS = ("", "keep", "figure", "dense", "plain SVD", "panther", "seconds, of which healing")


@dataclass(frozen=True)
class Case:
    """A model, the share of its layers' weights that is kept, and the figure that is looked at."""

    build: Callable[[], Recipe]
    keep: float
    figure: str
    exclude: tuple[Any, ...] = ()


CASES = {
    "crepe": Case(functools.partial(crepe.build, 1024), 0.25, "accuracy_minus_5_db", (nn.Linear,)),
    "efficientnet": Case(functools.partial(efficientnet.build, 2048), 0.7, "agreement"),
    "whisper": Case(functools.partial(whisper.build, 192), 0.6, "wer", ("proj_out",)),  # the head is the embedding
}


def line(case: Case, recipe: Recipe, minutes: float, seed: int) -> list[str]:
    """One row of the table."""
    of = subject(recipe, exclude=case.exclude)
    _, _, _, svd = next(compressed(of, METHODS[:1], [case.keep], seed))
    say(f"{recipe.name}: plain SVD")
    plain = recipe.metrics(svd)[case.figure]
    del of, svd
    start = time.perf_counter()
    result = panther.compress(
        recipe.model,
        case.keep,
        example_inputs=recipe.example_inputs,
        calib_data=recipe.batches,
        exclude=case.exclude,
        heal=panther.Heal("auto", time_limit=60 * minutes),
        seed=seed,
        verify=False,
    )
    seconds = time.perf_counter() - start
    healing = result.report.healing
    for note in result.report.notes:
        say(f"{recipe.name}: {note}")
    say(f"{recipe.name}: dense and compressed figures")
    dense, own = recipe.metrics(recipe.model), recipe.metrics(result.model)
    return [
        recipe.name,
        str(case.keep),
        case.figure.replace("_", " "),
        *(f"{value:.3f}" for value in (dense[case.figure], plain, own[case.figure])),
        f"{seconds:.0f}, {0 if healing is None else healing.seconds:.0f}",
    ]


def compare(names: Sequence[str], minutes: float, seed: int) -> str:
    """The header, and a row for each model."""
    recipes, lines = [], []
    for name in names:
        say(f"{name}: loading")
        recipe = CASES[name].build()
        lines.append(line(CASES[name], recipe, minutes, seed))
        recipes.append(recipe)
    what = [f"{recipe.name}: {recipe.notes}" for recipe in recipes]
    return "\n".join(
        [header(recipes, [*what, f"{minutes:g} minutes of training at most"], seed), "", table(COLUMNS, lines)]
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.healed", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES), help="which (all)")
    parser.add_argument("--minutes", type=float, default=15.0, help="of training, at most (15)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    try:
        print(compare(given.models, given.minutes, given.seed))
    except MissingDataError as error:
        print(f"healed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
