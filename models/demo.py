"""The whole path on a real model: `python -m models.demo` compresses MiniLM to half, checks, saves and exports it.

Needs packages from PyPI only. It writes demo-output/: the compressed model, report.json, report.txt and model.onnx.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill

import torch

import panther
from models.data import MissingDataError
from models.minilm import build, embed_all, load
from models.recipe import Recipe
from panther.errors import PantherError
from panther.spec import Figures

WIDTH = 110  # characters, as the report
SAME = 1e-6  # cosine distance between the model in memory and the one read back; rounding alone gives about 1e-7

# Label, field of Figures, divisor, decimals.
_TOTALS = (
    ("saved size, MB", "size_bytes", 1e6, 1),
    ("parameters and buffers, M", "params", 1e6, 2),
    ("GFLOPs of the dense layers", "flops", 1e9, 2),
    ("latency, ms", "latency_ms", 1.0, 1),
    ("peak memory, MB", "peak_memory_bytes", 1e6, 1),
)
_QUALITIES = (
    ("cosine to the dense embeddings", "cosine"),
    ("ten nearest neighbours kept", "top10"),
    ("rank correlation of similarities", "spearman"),
    ("correlation with people (Lee-50)", "lee_pearson"),
)

HEALING_SECONDS = 60.0


def table(before: Figures, after: Figures, quality: Mapping[str, float], kept: Mapping[str, float]) -> str:
    """The two models beside each other: totals first, then task figures; what was not measured is left out."""
    rows = [_row("", "dense", "compressed")]
    for label, name, scale, digits in _TOTALS:
        old, new = getattr(before, name), getattr(after, name)
        if old is not None and new is not None:
            rows.append(_row(label, f"{old / scale:,.{digits}f}", f"{new / scale:,.{digits}f}"))
    rows += [_row(label, f"{quality[name]:.3f}", f"{kept[name]:.3f}") for label, name in _QUALITIES]
    return "\n".join(rows)


def _row(label: str, dense: str, compressed: str) -> str:
    return f"{label:<34}{dense:>12}{compressed:>14}"


def verdict(dense: Mapping[str, float], compressed: Mapping[str, float]) -> str:
    """What the figures mean for someone who would use this model."""
    change = compressed["lee_pearson"] - dense["lee_pearson"]
    people = (
        f"agreement with people's own ratings falls from {dense['lee_pearson']:.2f} to {compressed['lee_pearson']:.2f}"
        if change < 0
        else f"agreement with people's own ratings is {compressed['lee_pearson']:.2f}, not less than before"
    )
    if compressed["cosine"] >= 0.99:
        return f"The embeddings are nearly those of the dense model; {people}."
    return (
        f"This costs quality: an embedding keeps {compressed['cosine']:.2f} of its direction on average, "
        f"{100 * compressed['top10']:.0f} % of the ten nearest neighbours stay, and {people}. "
        "Its healing trained for a minute at most, without labels: embeddings of the two models should not be mixed in "
        "one index, and a larger --budget or a longer healing (panther.Heal) costs less."
    )


def read_back(recipe: Recipe, model: torch.nn.Module, folder: Path) -> float:
    """The largest cosine distance between embeddings of `model` and of the one that `panther.load` reads."""
    loaded = panther.load(folder, model=lambda: load()[0])
    some = recipe.held_out[:2]
    return float((1 - (embed_all(model, some) * embed_all(loaded, some)).sum(1)).abs().max())


def run(recipe: Recipe, budget: float, folder: Path) -> None:
    """Compress, compare, save, read back, export; everything that is printed is measured here.

    Raises: PantherError when the saved or the exported model, read back, is not the same.
    """
    print(f"model: {recipe.name} ({recipe.notes})\nlicence: {recipe.licence}\n")
    result = panther.compress(
        recipe.model,
        budget=budget,
        example_inputs=recipe.example_inputs,
        calib_data=recipe.batches,
        heal=panther.Heal(time_limit=HEALING_SECONDS),
        seed=0,
    )
    print(f"\n{result.report}\n")
    dense, compressed = recipe.metrics(recipe.model), recipe.metrics(result.model)
    figures = table(result.report.dense, result.report.compressed, dense, compressed)
    print(f"Before and after\n{figures}\n\n{fill(verdict(dense, compressed), WIDTH)}\n")
    result.save(folder)
    (folder / "report.json").write_text(result.report.to_json() + "\n", encoding="utf-8")
    (folder / "report.txt").write_text(f"{result.report}\n\n{figures}\n", encoding="utf-8")
    distance = read_back(recipe, result.model, folder)
    if distance > SAME:
        raise PantherError(f"the model read back from {folder} gives other embeddings (cosine distance {distance:.1e})")
    print(f"saved to {folder} and read back: the same embeddings (largest cosine distance {distance:.1e})")
    exported = result.export_onnx(folder / "model.onnx")
    print(exported)
    if not exported.ok:
        raise PantherError(f"the exported file differs from the model: {exported.path}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m models.demo", description="Compress, check and export MiniLM.")
    parser.add_argument("--budget", type=float, default=0.5, help="fraction of the sketchable weights to keep (0.5)")
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), help="folder to write (default: demo-output)"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    try:
        run(build("lee"), arguments.budget, arguments.output)
    except (MissingDataError, PantherError, ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
