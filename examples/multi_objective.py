"""Accuracy and speed at once: what one costs in the other.

    python -m examples.multi_objective

A weighted sum (0.7 * accuracy + 0.3 * speed, say) hides the trade behind two made-up numbers. With `objectives` the
function answers each by name, and the study finds all the trades worth having; `optimize()` picks the knee among them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import nn

import panther as pr
from examples.common import accuracy, device, digits, parser, pays, train
from panther.tuner import SkAutoTuner


@torch.no_grad()
def latency_ms(model: nn.Module, calls: int = 30) -> float:
    """The median of several calls with 64 images, after some to warm up."""
    x = torch.randn(64, 784, device=device())
    seconds = []
    for _ in range(calls + 10):
        if x.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        model(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 1000 * median(seconds[10:])


def main(arguments: Sequence[str] | None = None) -> None:
    quick = parser(__doc__).parse_args(arguments).quick
    data = digits(quick)

    def measured(first: nn.Module) -> dict[str, float]:
        model = train(nn.Sequential(first, nn.ReLU(), nn.Linear(512, 10)), data.train, 1 if quick else 3)
        return {"accuracy": accuracy(model, data.valid), "latency_ms": latency_ms(model.eval())}

    def multi_objective_evaluation(num_terms: int, low_rank: int) -> dict[str, float]:
        torch.manual_seed(0)
        return measured(pr.nn.SKLinear(784, 512, num_terms=num_terms, low_rank=low_rank))

    tuner = SkAutoTuner(
        parameter_bounds={"num_terms": (1, 20), "low_rank": (8, 256)},
        objective_function=multi_objective_evaluation,
        n_initial_points=3 if quick else 10,
        n_iterations=2 if quick else 30,
        objectives={"accuracy": max, "latency_ms": min},
        constraints=[pays],
        baseline=lambda: measured(nn.Linear(784, 512)),
    )
    best_params, best_scores = tuner.optimize()

    print("accuracy  ms per 64 images")
    print(f"  {tuner.baseline['accuracy']:.4f}  {tuner.baseline['latency_ms']:.3f}  the dense layer")
    for params, scores in tuner.pareto_front:
        chosen = "  <- knee" if params == best_params else ""
        print(f"  {scores['accuracy']:.4f}  {scores['latency_ms']:.3f}  {params}{chosen}")
    print(f"Best trade: {best_params} with accuracy: {best_scores['accuracy']:.4f}")


if __name__ == "__main__":
    main()
