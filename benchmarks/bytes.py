"""How small the weights can be stored: rounding alone, ranks alone, and what panther makes of both, at equal bytes.

`python -m benchmarks.bytes` takes a few minutes a cell; --minutes is of training, for the healed row. Needs what
models/requirements-bench.txt lists and what `python -m benchmarks.fetch_data` gets.

Bytes are those of the Linear and convolution weights that can be sketched, with their scales (two bytes each), and
biases that ranks bring. Rounding to 2 bits has no layer here: its row is computed with the numbers that they stand
for, and costs what such a file would.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

import panther
from benchmarks.common import header, say, table
from benchmarks.peers import quantisers
from models import crepe, minilm, whisper
from models.data import MissingDataError
from models.recipe import Recipe
from panther.factors import dense_weight
from panther.nn.surgery import with_layers
from panther.quantise import to_nearest
from panther.spec import BITS, DTYPES, Budget, Capture, Grid

SHARES = (1 / 4, 1 / 8, 0.109, 1 / 16)
PLAIN = (Grid(8), Grid(4, 32), Grid(4), Grid(3, 32), Grid(3), Grid(2, 32))  # rounding by the weights alone
ROWS = ("plain", "peers", "ranks", "mix", "healed")


@dataclass(frozen=True)
class Case:
    """A model, what stays out, and the figure that is looked at."""

    build: Callable[[], Recipe]
    figures: tuple[str, ...]
    exclude: tuple[Any, ...] = ()
    loops: bool = False  # as in benchmarks.peers.quantisers


CASES = {
    "minilm": Case(functools.partial(minilm.build, calibration=1024), ("cosine", "top10", "spearman")),
    "crepe": Case(functools.partial(crepe.build, 1024), ("accuracy_minus_5_db",)),
    "whisper": Case(functools.partial(whisper.build, 192), ("wer",), ("proj_out",), True),  # the head is the embedding
}

Cell = tuple[str, float, dict[str, float], str]  # row, share of the bytes, figures, remark


def stored_bytes(found: Capture, grid: Grid) -> int:
    """Of all layers on a grid."""
    return sum(grid.size_bytes(spec.out_features, spec.fan_in) for spec in found.sketchable)


def dense_bytes(found: Capture) -> int:
    return sum(4 * spec.params for spec in found.sketchable)


def rounded(model: nn.Module, found: Capture, grid: Grid) -> nn.Module:
    """The model whose weights stand on a grid, each number rounded by itself."""
    layers = {}
    for spec in found.sketchable:
        layer: Any = model.get_submodule(spec.name)
        new = type(layer).__new__(type(layer))
        vars(new).update(vars(layer))
        new._parameters = dict(layer._parameters)
        weight = dense_weight(layer)
        numbers = to_nearest(weight.flatten(1), grid).matrix().reshape(weight.shape)
        new._parameters["weight"] = nn.Parameter(numbers, requires_grad=False)
        layers[spec.name] = new
    return with_layers(model, layers)


def plain_cells(recipe: Recipe, found: Capture) -> Iterator[Cell]:
    whole = dense_bytes(found)
    for grid in PLAIN:
        label = f"int{grid.bits}, a scale " + ("a row" if grid.group_size is None else f"for {grid.group_size}")
        say(f"{recipe.name}: {label}")
        figures = recipe.metrics(rounded(recipe.model, found, grid))
        remark = "" if grid.bits in BITS.values() else "computed, no such layer"
        yield f"{label}, to nearest", stored_bytes(found, grid) / whole, figures, remark


def panther_cells(
    recipe: Recipe,
    found: Capture,
    exclude: Sequence[Any],
    shares: Sequence[float],
    groups: Sequence[str],
    minutes: float,
    seed: int,
) -> Iterator[Cell]:
    """Ranks alone, ranks in 8 bits, and both with 4 bits as well, refitted and trained."""
    everything = DTYPES
    rows: dict[str, tuple[str, tuple[str, ...], Any]] = {
        "ranks alone": ("ranks", ("float32",), "refit"),
        "ranks and 8 bits": ("ranks", ("float32", "int8"), "refit"),
        "all of it": ("mix", everything, "refit"),
    }
    if minutes > 0:
        healing = panther.Heal("distill", time_limit=60 * minutes)
        rows["all of it, healed"] = ("healed", everything, healing)
    whole = dense_bytes(found)
    for label, (group, dtypes, heal) in rows.items():
        for share in shares if group in groups else ():
            say(f"{recipe.name}: panther, {label}, {share:.3f} of the bytes")
            start = time.perf_counter()
            budget = Budget(size_mb=(found.model_bytes - whole + share * whole) / 1e6)
            result = panther.compress(
                recipe.model,
                budget,
                example_inputs=recipe.example_inputs,
                calib_data=recipe.batches,
                exclude=exclude,
                dtypes=dtypes,
                heal=heal,
                seed=seed,
                verify=False,
            )
            names = {spec.name for spec in found.sketchable}
            held = sum(row.after.size_bytes for row in result.report.layers if row.name in names)
            remark = f"{time.perf_counter() - start:.0f} s" + ("" if result.budget_met else ", budget not met")
            yield f"panther, {label}", held / whole, recipe.metrics(result.model), remark


def _size_last(cell: Cell) -> float:
    """From large to small, and what was not measured at the end."""
    return math.inf if math.isnan(cell[1]) else -cell[1]


def _row(cell: Cell, names: Sequence[str]) -> list[str]:
    label, share, figures, remark = cell
    size = "-" if math.isnan(share) else f"{share:.4f}"
    return [label, size, *(f"{figures[name]:.3f}" if name in figures else "-" for name in names), remark]


def compare(
    names: Sequence[str], shares: Sequence[float], minutes: float, seed: int, rows: Sequence[str] = ROWS
) -> str:
    """The header, and a table for each model. rows: groups of ROWS."""
    recipes, parts = [], []
    for name in names:
        case = CASES[name]
        say(f"{name}: loading")
        recipe = case.build()
        recipes.append(recipe)
        found = panther.analyze(recipe.model, recipe.example_inputs, exclude=case.exclude)
        groups: list[Iterable[Cell]] = [[("dense", 1.0, recipe.metrics(recipe.model), "")]]
        if "plain" in rows:
            groups.append(plain_cells(recipe, found))
        if "peers" in rows:
            groups.append(quantisers.cells(recipe, found, loops=case.loops))
        groups.append(panther_cells(recipe, found, case.exclude, shares, rows, minutes, seed))
        cells = []
        for cell in itertools.chain(*groups):  # said as they come, since all of them can take hours
            cells.append(cell)
            say("; ".join(filter(None, _row(cell, case.figures))))
        lines = [_row(cell, case.figures) for cell in sorted(cells, key=_size_last)]
        columns = ["", "bytes", *(figure.replace("_", " ") for figure in case.figures), ""]
        parts.append(f"{recipe.name}\n\n" + table(columns, lines))
    what = [f"{recipe.name}: {recipe.notes}" for recipe in recipes]
    return "\n\n".join(["\n".join([header(recipes, [*what, f"{minutes:g} minutes of training"], seed)]), *parts])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bytes", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES), help="which (all)")
    parser.add_argument(
        "--shares", nargs="+", type=float, default=list(SHARES), help="of the bytes (1/4 1/8 .109 1/16)"
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="of training for the healed row; 0: none (5)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="groups of rows (all)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    try:
        print(compare(given.models, given.shares, given.minutes, given.seed, given.rows))
    except MissingDataError as error:
        print(f"bytes: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
