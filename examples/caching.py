"""No evaluation is paid twice, neither by one study nor by the next.

    python -m examples.caching

Within a study the tuner never evaluates a point again (unless it is asked to, with `repeats`). Between studies in one
process `lru_cache` does it: whole numbers stay Python's ints, so that they hit the cache. Between processes the
journal does it: with the same file, a study goes on where the last one ended, and one that was finished evaluates
nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

import panther as pr
from examples.common import accuracy, digits, parser, train
from panther.tuner import SkAutoTuner


def main(arguments: Sequence[str] | None = None) -> None:
    quick = parser(__doc__).parse_args(arguments).quick
    data = digits(quick)

    @lru_cache(maxsize=128)
    def cached_evaluation(num_terms: int, low_rank: int) -> float:
        torch.manual_seed(0)
        first = pr.nn.SKLinear(784, 512, num_terms=num_terms, low_rank=low_rank)
        model = nn.Sequential(first, nn.ReLU(), nn.Linear(512, 10))
        return accuracy(train(model, data.train, 1 if quick else 3), data.valid)

    def tuner(seed: int, journal: Path | None = None) -> SkAutoTuner:
        return SkAutoTuner(
            parameter_bounds={"num_terms": (1, 3), "low_rank": (4, 8)},
            objective_function=cached_evaluation,
            n_initial_points=3 if quick else 5,
            n_iterations=3 if quick else 7,
            seed=seed,
            journal=journal,
        )

    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "study.jsonl"
        first, second = tuner(0, journal), tuner(1)
        best_params, best_score = first.optimize()
        second.optimize()
        asked = len(first.trials) + len(second.trials)
        print(f"two studies asked for {asked} evaluations: {cached_evaluation.cache_info().misses} were made")
        cached_evaluation.cache_clear()  # as in a new process
        resumed = tuner(0, journal)
        same = resumed.optimize() == (best_params, best_score)
        print(f"the first one again, from its journal: {cached_evaluation.cache_info().misses} evaluations")
        print(f"  and {'the same' if same else 'another'} result")
    print(f"Best parameters: {best_params}, accuracy: {best_score:.4f}")


if __name__ == "__main__":
    main()
