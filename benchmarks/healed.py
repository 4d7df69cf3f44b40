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
from models import craft, crepe, crnn, efficientnet, minilm, whisper
from models.data import MissingDataError
from models.recipe import Recipe
from panther.spec import DTYPES, Budget

COLUMNS = ("", "what is kept", "figure", "dense", "plain SVD", "panther", "seconds, of which healing")


@dataclass(frozen=True)
class Case:
    """A model, the share of its layers' weights that is kept, and the figures that are looked at.

    flops: the share is of the FLOPs. bytes: the share of the layers' bytes that is kept as well, in whole numbers; it
    goes with flops.
    """

    build: Callable[[], Recipe]
    keep: float
    figures: tuple[str, ...]
    exclude: tuple[Any, ...] = ()
    flops: bool = False
    bytes: float | None = None

    def budget(self, model: nn.Module, example: Any) -> float | Budget:
        if self.bytes is None:
            return Budget(flops=self.keep) if self.flops else self.keep
        found = panther.analyze(model, example, exclude=self.exclude)
        layers = sum(4 * spec.params for spec in found.sketchable)
        if not self.flops:
            raise ValueError("bytes= is for a share of the FLOPs: flops=True")
        return Budget(flops=self.keep, size_mb=(found.model_bytes - (1 - self.bytes) * layers) / 1e6)

    def __str__(self) -> str:
        bytes_too = "" if self.bytes is None else f", {self.bytes:g} of the bytes"
        return f"{self.keep:g} of the {'FLOPs' if self.flops else 'weights'}{bytes_too}"


MINILM = functools.partial(minilm.build, calibration=18432, batch_size=64)
EMBEDDING = ("cosine", "top10", "spearman")


CASES = {
    "minilm": Case(MINILM, 0.5, EMBEDDING, flops=True),
    "minilm-bytes": Case(MINILM, 0.5, EMBEDDING, flops=True, bytes=0.125),
    "crepe": Case(functools.partial(crepe.build, 1024), 0.25, ("accuracy_minus_5_db",), (nn.Linear,)),
    "efficientnet": Case(functools.partial(efficientnet.build, 2048), 0.7, ("agreement",)),
    "craft": Case(functools.partial(craft.build, 48), 0.25, ("recall", "precision")),
    "crnn": Case(functools.partial(crnn.build, 384), 0.5, ("character_error",)),
    "whisper": Case(functools.partial(whisper.build, 192), 0.6, ("wer",), ("proj_out",)),  # the head is the embedding
}


def line(case: Case, recipe: Recipe, minutes: float, seed: int) -> list[str]:
    """One row of the table. Plain SVD keeps the same share of weights or FLOPs; its numbers are not rounded."""
    of = subject(recipe, exclude=case.exclude)
    budget = case.budget(recipe.model, recipe.example_inputs)
    _, _, _, svd = next(compressed(of, METHODS[:1], [Budget(flops=case.keep) if case.flops else case.keep], seed))
    say(f"{recipe.name}: plain SVD")
    plain = recipe.metrics(svd)
    del of, svd
    start = time.perf_counter()
    result = panther.compress(
        recipe.model,
        budget,
        example_inputs=recipe.example_inputs,
        calib_data=recipe.batches,
        exclude=case.exclude,
        dtypes=("float32",) if case.bytes is None else DTYPES,
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
        str(case),
        " / ".join(case.figures).replace("_", " "),
        *(" / ".join(f"{of[name]:.3f}" for name in case.figures) for of in (dense, plain, own)),
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
