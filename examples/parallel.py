"""Several evaluations at the same time.

    python -m examples.parallel --jobs 4

With the same seed and batch size the study is the same for any number of jobs: results are told in the order of
suggestion. `executor=` takes the place of `n_jobs=` for anything that is a concurrent.futures.Executor, such as
loky's, or a dask.distributed Client for a cluster.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

import panther as pr
from examples.common import accuracy, digits, parser, pays, train
from panther.tuner import SkAutoTuner

BATCH = 4  # suggested at once; at least the number of jobs


def evaluate(num_terms: int, low_rank: int, quick: bool = False) -> float:
    """At the module's top, where worker processes find it; each of them reads the images once."""
    data = digits(quick)
    torch.manual_seed(0)
    first = pr.nn.SKLinear(784, 512, num_terms=num_terms, low_rank=low_rank)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(512, 10))
    return accuracy(train(model, data.train, 1 if quick else 3), data.valid)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    chosen = options.parse_args(arguments)
    quick = chosen.quick
    tuner = SkAutoTuner(
        parameter_bounds={"num_terms": (2, 16), "low_rank": (16, 128)},
        objective_function=partial(evaluate, quick=quick),
        n_initial_points=4 if quick else 8,
        n_iterations=0 if quick else 16,
        constraints=[pays],
        n_jobs=chosen.jobs,
        batch_size=max(BATCH, chosen.jobs),
    )
    start = time.perf_counter()
    best_params, best_score = tuner.optimize()

    inside = sum(trial.seconds for trial in tuner.trials)
    print(f"{inside:.1f} s of evaluations in {time.perf_counter() - start:.1f} s, with {chosen.jobs} processes")
    print(f"Best parameters: {best_params}, accuracy: {best_score:.4f}")


if __name__ == "__main__":
    main()
