"""What calibration texts cost as a tokeniser pads them, and without their padding, as panther.compress runs them.

`python -m benchmarks.padding` on a machine that does nothing else, in a few minutes: MiniLM's calibration texts in any
order, 32 a batch, filled up to the longest of each batch and to a fixed length, through the dense model, in turns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from random import Random

import torch
from torch import Tensor, nn

from benchmarks.common import header, table
from models import minilm
from models.data import MissingDataError
from models.recipe import Recipe
from models.text import split_documents
from panther.batches import Call, as_call, calibration, inference, run
from panther.padding import without_padding
from panther.verify import medians_in_turn

COLUMNS = ("filled up to", "positions that are padding", "left", "a pass in seconds", "without", "times as fast")
BATCH, LONGEST = 32, 128


def as_padded(recipe: Recipe, text: str, samples: int, fixed: int | None, seed: int) -> list[dict[str, Tensor]]:
    """The calibration texts of the recipe in random order; fixed: a length for all batches."""
    texts = split_documents(minilm.SOURCES[text](), samples, minilm.NEIGHBOURS + 1, seed)[0]
    Random(seed).shuffle(texts)
    _, tokenise = minilm.load()
    batches = [tokenise(texts[start : start + BATCH], LONGEST) for start in range(0, len(texts), BATCH)]
    return batches if fixed is None else [_filled(batch, fixed) for batch in batches]


def _filled(batch: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """Zeros behind the texts: [PAD] is 0 here, and so is what masks."""
    return {name: nn.functional.pad(value, (0, length - value.shape[1])) for name, value in batch.items()}


def line(recipe: Recipe, name: str, batches: Sequence[dict[str, Tensor]], seconds: float) -> list[str]:
    """One row: a pass over batches as they are and as panther runs them."""
    data = calibration(batches, as_call(recipe.example_inputs), recipe.model)
    given, other = list(data), list(without_padding(data)[0])

    def through(calls: Sequence[Call]) -> None:
        with inference(recipe.model):
            for call in calls:
                run(recipe.model, call)

    times = medians_in_turn([lambda: through(given), lambda: through(other)], seconds=seconds)
    shares = [f"{100 * _padding(calls):.0f} %" for calls in (given, other)]
    return [name, *shares, *(f"{t:.3g}" for t in times), f"{times[0] / times[1]:.2f}"]


def _padding(calls: Iterable[Call]) -> float:
    masks = [mask for call in calls for mask in call.masks().values()]
    return 1 - sum(int(mask.sum()) for mask in masks) / max(1, sum(mask.numel() for mask in masks))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.padding", description=__doc__)
    parser.add_argument("--text", choices=sorted(minilm.SOURCES), default="brown")
    parser.add_argument("--samples", type=int, default=1024, help="calibration texts (1024)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="of passes, each row (60)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    try:
        recipe = minilm.build(given.text, given.samples, minilm.NEIGHBOURS + 1, seed=given.seed)
        lengths = {"the longest of the batch": None, f"{LONGEST} tokens": LONGEST}
        data = {n: as_padded(recipe, given.text, given.samples, fixed, given.seed) for n, fixed in lengths.items()}
    except MissingDataError as error:
        print(f"padding: {error}", file=sys.stderr)
        return 1
    lines = [line(recipe, name, batches, given.seconds) for name, batches in data.items()]
    print("\n".join([header([recipe], [f"{given.threads} threads"], given.seed), "", table(COLUMNS, lines)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
