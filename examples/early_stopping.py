"""Three ways not to pay for what will not win.

    python -m examples.early_stopping

Inside a trial: training ends when the accuracy has not risen for three epochs. Between trials: `report` tells the
tuner the accuracy after each epoch, and the pruner ends a trial that is behind the others at the same epoch. Of the
study: `patience` ends it when no trial was better than the best for a while.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

import panther as pr
from examples.common import accuracy, device, digits, parser, pays, train_epoch
from panther.tuner import SkAutoTuner, report

PATIENCE = 3  # epochs


def main(arguments: Sequence[str] | None = None) -> None:
    quick = parser(__doc__).parse_args(arguments).quick
    data, most_epochs = digits(quick), 3 if quick else 20

    def evaluation_with_early_stopping(num_terms: int, low_rank: int) -> float:
        torch.manual_seed(0)
        first = pr.nn.SKLinear(784, 512, num_terms=num_terms, low_rank=low_rank)
        model = nn.Sequential(first, nn.ReLU(), nn.Linear(512, 10)).to(device())
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        best, without_gain = 0.0, 0
        for epoch in range(most_epochs):
            train_epoch(model, data.train, optimizer, seed=epoch)
            now = accuracy(model, data.valid)
            best, without_gain = (now, 0) if now > best else (best, without_gain + 1)
            if without_gain >= PATIENCE:
                break
            report(best, step=epoch)  # a trial that is pruned ends here
        return best

    tuner = SkAutoTuner(
        parameter_bounds={"num_terms": (2, 16), "low_rank": (16, 128)},
        objective_function=evaluation_with_early_stopping,
        n_initial_points=4 if quick else 5,
        n_iterations=3 if quick else 25,
        constraints=[pays],
        pruner="median",
        patience=10,
    )
    best_params, best_score = tuner.optimize()

    epochs = sum(len(trial.reports) for trial in tuner.trials)
    print(f"trials: {dict(Counter(trial.status for trial in tuner.trials))}, ended by {tuner.stopped_by}")
    print(f"epochs: {epochs} of {most_epochs * (tuner.n_initial_points + tuner.n_iterations)}")
    print(f"Best parameters: {best_params}, accuracy: {best_score:.4f}")


if __name__ == "__main__":
    main()
