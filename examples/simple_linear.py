"""The smallest study: how many terms and which rank a sketched layer needs.

    python -m examples.simple_linear

The ten-class head stays dense, since a sketch of 512 x 10 weights only pays up to rank 9. In the box of the study
most layers would be larger than nn.Linear(784, 512) as well, so that a constraint leaves those out, unevaluated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

import panther as pr
from examples.common import accuracy, digits, parser, pays, train
from panther.tuner import SkAutoTuner


def network(first: nn.Module) -> nn.Module:
    return nn.Sequential(first, nn.ReLU(), nn.Linear(512, 10))


def sketched(num_terms: int, low_rank: int) -> nn.Module:
    torch.manual_seed(0)  # the same point has the same score
    return network(pr.nn.SKLinear(784, 512, num_terms=num_terms, low_rank=low_rank))


def main(arguments: Sequence[str] | None = None) -> None:
    quick = parser(__doc__).parse_args(arguments).quick
    data, epochs = digits(quick), 1 if quick else 3

    def evaluate_linear_layer(num_terms: int, low_rank: int) -> float:
        return accuracy(train(sketched(num_terms, low_rank), data.train, epochs), data.valid)

    def evaluate_dense() -> float:
        torch.manual_seed(0)
        return accuracy(train(network(nn.Linear(784, 512)), data.train, epochs), data.valid)

    tuner = SkAutoTuner(
        parameter_bounds={"num_terms": (2, 16), "low_rank": (16, 128)},
        objective_function=evaluate_linear_layer,
        n_initial_points=3 if quick else 5,
        n_iterations=2 if quick else 20,
        constraints=[pays],
        baseline=evaluate_dense,
    )
    best_params, best_score = tuner.optimize()

    print("Best parameters found:")
    print(f"  num_terms: {best_params['num_terms']}")
    print(f"  low_rank: {best_params['low_rank']}")
    print(f"  accuracy: {best_score:.4f} (dense: {tuner.baseline:.4f})")
    best = train(sketched(**best_params), data.train, epochs)
    print(f"  on digits that the tuner never saw: {accuracy(best, data.test):.4f}")


if __name__ == "__main__":
    main()
