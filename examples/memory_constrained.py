"""The best accuracy within a limit on memory.

    python -m examples.memory_constrained

What can be worked out from the parameters is a constraint, and costs no evaluation: a point that breaks it is never
suggested. What cannot be is measured around the evaluation, with `max_memory_gb`; a trial that takes more, or runs
out of memory, is kept in the history and cannot win. No score has to be made worse by hand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

import panther as pr
from examples.common import accuracy, digits, parser, train
from panther.tuner import SkAutoTuner

LAYERS = ((784, 512), (512, 256))
TRAINING_BYTES = 16  # a float32 weight with its gradient and Adam's two averages
STATE_MB = 4.0  # half of what the two dense layers take


def state_mb(num_terms: int, low_rank: int) -> float:
    """What training the sketched layers takes besides the activations."""
    weights = sum(2 * num_terms * low_rank * (inputs + outputs) for inputs, outputs in LAYERS)
    return weights * TRAINING_BYTES / 1e6


def main(arguments: Sequence[str] | None = None) -> None:
    quick = parser(__doc__).parse_args(arguments).quick
    data = digits(quick)

    def evaluate(num_terms: int, low_rank: int, epochs: int) -> float:
        torch.manual_seed(0)
        hidden = []
        for inputs, outputs in LAYERS:
            hidden += [pr.nn.SKLinear(inputs, outputs, num_terms=num_terms, low_rank=low_rank), nn.ReLU()]
        return accuracy(train(nn.Sequential(*hidden, nn.Linear(256, 10)), data.train, epochs), data.valid)

    tuner = SkAutoTuner(
        parameter_bounds={"num_terms": (1, 32), "low_rank": (8, 512)},
        # The names of a lambda need not be those of the parameters: then they are given in order.
        objective_function=lambda nt, lr: evaluate(nt, lr, epochs=1 if quick else 3),
        n_initial_points=3 if quick else 12,
        n_iterations=2 if quick else 40,
        constraints=[lambda num_terms, low_rank: state_mb(num_terms, low_rank) <= STATE_MB],
        max_memory_gb=2.0,
    )
    best_params, best_score = tuner.optimize()

    most = max(trial.memory_gb or 0.0 for trial in tuner.trials)
    print(f"Best parameters: {best_params}, {state_mb(**best_params):.1f} MB of {STATE_MB} MB")
    print(f"  accuracy: {best_score:.4f}")
    print(f"  trials: {dict(Counter(trial.status for trial in tuner.trials))}, the largest took {most:.3f} GB in all")


if __name__ == "__main__":
    main()
