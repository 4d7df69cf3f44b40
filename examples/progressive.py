"""First all over the box, then around the best of it: two phases in one call.

    python -m examples.progressive

The second phase stays inside the box, knows the trials of the first, and repeats none of them; two tuners one after
the other would have to be kept from all three.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

import panther as pr
from examples.common import accuracy, digits, parser, pays, train
from panther.tuner import SkAutoTuner


def main(arguments: Sequence[str] | None = None) -> None:
    quick = parser(__doc__).parse_args(arguments).quick
    data = digits(quick)

    def evaluate(num_terms: int, low_rank: int) -> float:
        torch.manual_seed(0)
        first = pr.nn.SKLinear(784, 512, num_terms=num_terms, low_rank=low_rank)
        model = nn.Sequential(first, nn.ReLU(), nn.Linear(512, 10))
        return accuracy(train(model, data.train, 1 if quick else 3), data.valid)

    tuner = SkAutoTuner(
        parameter_bounds={"num_terms": (1, 32), "low_rank": (8, 512)},
        objective_function=evaluate,
        n_initial_points=2 if quick else 15,
        n_iterations=4 if quick else 30,
        strategy="progressive",
        constraints=[pays],
    )
    best_params, best_score = tuner.optimize()

    for phase in ("broad", "refined"):
        found = [trial for trial in tuner.trials if trial.phase == phase]
        best = max(trial.scores["score"] for trial in found)
        for name in tuner.space.parameters:
            values = [trial.params[name] for trial in found]
            print(f"{phase}: {name} from {min(values)} to {max(values)}")
        print(f"{phase}: {len(found)} trials, the best {best:.4f}")
    print(f"Best parameters: {best_params}, accuracy: {best_score:.4f}")


if __name__ == "__main__":
    main()
