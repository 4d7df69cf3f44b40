"""Search with a cheap evaluation, then decide between the best few with the expensive one.

    python -m examples.quick_evaluation

A third of the images and one epoch rank the points well enough to throw most of them away, not to choose the last one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

import panther as pr
from examples.common import Part, accuracy, digits, parser, pays, train
from panther.tuner import SkAutoTuner

FINALISTS = 3


def main(arguments: Sequence[str] | None = None) -> None:
    quick = parser(__doc__).parse_args(arguments).quick
    data = digits(quick)
    few: Part = (data.train[0][:350], data.train[1][:350])

    def evaluation(num_terms: int, low_rank: int, part: Part, epochs: int) -> float:
        torch.manual_seed(0)
        first = pr.nn.SKLinear(784, 512, num_terms=num_terms, low_rank=low_rank)
        model = nn.Sequential(first, nn.ReLU(), nn.Linear(512, 10))
        return accuracy(train(model, part, epochs), data.valid)

    def quick_evaluation_for_tuning(num_terms: int, low_rank: int) -> float:
        return evaluation(num_terms, low_rank, few, epochs=1)

    tuner = SkAutoTuner(
        parameter_bounds={"num_terms": (2, 16), "low_rank": (16, 128)},
        objective_function=quick_evaluation_for_tuning,
        n_initial_points=3 if quick else 5,
        n_iterations=2 if quick else 20,
        constraints=[pays],
    )
    tuner.optimize()

    finalists = sorted(tuner.trials, key=lambda trial: -trial.scores["score"])[:FINALISTS]
    in_full = [evaluation(**trial.params, part=data.train, epochs=2 if quick else 10) for trial in finalists]
    for trial, score in zip(finalists, in_full, strict=True):
        print(f"{trial.params}: {trial.scores['score']:.4f} in {trial.seconds:.2f} s, in full {score:.4f}")
    best = max(range(len(finalists)), key=in_full.__getitem__)
    print(f"Best parameters: {finalists[best].params}, accuracy: {in_full[best]:.4f}")


if __name__ == "__main__":
    main()
