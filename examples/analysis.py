"""What a finished study says about its parameters: correlations, importance and pictures.

    python -m examples.analysis --output pictures

Correlations see straight lines only. The importance comes from a function fitted to the trials, and says how well that
function predicts trials that it was not fitted to: trust it as far as that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import nn

import panther as pr
from examples.common import accuracy, digits, parser, pays, train
from panther.tuner import Float, SkAutoTuner


def analyze_tuning_results(tuner: SkAutoTuner, output: Path | None) -> None:
    df = pd.DataFrame(tuner.get_evaluation_history())
    print("Parameter correlations:")
    print(df.corr().round(2).to_string())
    print()
    print(tuner.parameter_importance())
    print()
    best = tuner.to_dataframe().nlargest(3, "score")
    print(best[["num_terms", "low_rank", "dropout", "score", "phase"]].to_string(index=False))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        for kind in ("history", "slices", "interaction"):
            path = output / f"{kind}.png"
            tuner.plot(kind).savefig(path)  # a matplotlib Figure: no display is needed
            print(f"wrote {path}")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--output", type=Path, help="a folder for pictures (default: none are drawn)")
    chosen = options.parse_args(arguments)
    quick = chosen.quick
    data = digits(quick)

    def evaluate(num_terms: int, low_rank: int, dropout: float) -> float:
        torch.manual_seed(0)
        first = pr.nn.SKLinear(784, 512, num_terms=num_terms, low_rank=low_rank)
        model = nn.Sequential(first, nn.ReLU(), nn.Dropout(dropout), nn.Linear(512, 10))
        return accuracy(train(model, data.train, 1 if quick else 3), data.valid)

    tuner = SkAutoTuner(
        parameter_bounds={"num_terms": (1, 8), "low_rank": (8, 128), "dropout": Float(0.0, 0.8)},
        objective_function=evaluate,
        n_initial_points=5 if quick else 15,
        n_iterations=2 if quick else 15,
        constraints=[pays],
    )
    best_params, best_score = tuner.optimize()
    analyze_tuning_results(tuner, chosen.output)
    print(f"Best parameters: {best_params}, accuracy: {best_score:.4f}")


if __name__ == "__main__":
    main()
