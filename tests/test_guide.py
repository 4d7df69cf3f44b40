"""The tuner is called as its users' guide does: names, results and habits; examples/ has the full programs."""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import nn

import panther as pr
from panther.tuner import SkAutoTuner

# Most points of the guide's boxes make layers larger than dense ones, which panther.nn says.
pytestmark = pytest.mark.filterwarnings("ignore:.*nn.Linear would be smaller")

BOX = {"num_terms": (2, 16), "low_rank": (16, 128)}


def smooth(num_terms, low_rank):
    """Stands for an accuracy: best at 6 terms of rank 48."""
    return math.exp(-(((num_terms - 6) / 8) ** 2) - ((low_rank - 48) / 64) ** 2)


def test_a_linear_layer_is_tuned():
    seen = []

    def evaluate_linear_layer(num_terms, low_rank):
        seen.append((num_terms, low_rank))
        model = nn.Sequential(
            pr.nn.SKLinear(784, 512, num_terms=int(num_terms), low_rank=int(low_rank)),
            nn.ReLU(),
            pr.nn.SKLinear(512, 10, num_terms=max(1, int(num_terms) // 2), low_rank=max(8, int(low_rank) // 2)),
        )
        with torch.no_grad():
            correct = (model(torch.randn(32, 784)).argmax(1) == torch.arange(32) % 10).sum().item()
        return smooth(num_terms, low_rank) + correct / 3200

    tuner = SkAutoTuner(
        parameter_bounds=BOX, objective_function=evaluate_linear_layer, n_initial_points=5, n_iterations=20
    )
    best_params, best_score = tuner.optimize()
    assert len(seen) == len(set(seen)) == 25
    assert all(type(value) is int for point in seen for value in point)
    assert all(2 <= terms <= 16 and 16 <= rank <= 128 for terms, rank in seen)
    assert list(best_params) == ["num_terms", "low_rank"]
    assert isinstance(best_score, float)
    assert best_score > 0.9


def test_a_module_of_four_parameters_is_tuned():
    class SketchedNet(nn.Module):
        def __init__(self, layer1_terms, layer1_rank, layer2_terms, layer2_rank):
            super().__init__()
            self.layer1 = pr.nn.SKLinear(784, 512, num_terms=int(layer1_terms), low_rank=int(layer1_rank))
            self.layer2 = pr.nn.SKLinear(512, 256, num_terms=int(layer2_terms), low_rank=int(layer2_rank))
            self.layer3 = pr.nn.SKLinear(256, 10, num_terms=2, low_rank=16)
            self.dropout = nn.Dropout(0.2)

        def forward(self, x):
            x = self.dropout(self.layer1(x.flatten(1)).relu())
            return self.layer3(self.dropout(self.layer2(x).relu()))

    def evaluate(layer1_terms, layer1_rank, layer2_terms, layer2_rank):
        model = SketchedNet(layer1_terms, layer1_rank, layer2_terms, layer2_rank).eval()
        return (model(torch.randn(4, 1, 28, 28)) ** 2).mean()  # a 0-d tensor is a score too

    bounds = {"layer1_terms": (2, 12), "layer1_rank": (16, 96), "layer2_terms": (2, 8), "layer2_rank": (12, 64)}
    tuner = SkAutoTuner(parameter_bounds=bounds, objective_function=evaluate, n_initial_points=3, n_iterations=3)
    best_params, best_score = tuner.optimize()
    assert best_params.keys() == bounds.keys()
    assert best_score == max(trial.scores["score"] for trial in tuner.trials)
    assert len(tuner.trials) == 6


def test_a_weighted_sum_of_goals_is_tuned():
    def combined(num_terms, low_rank):
        speed = min(1 / (num_terms * low_rank * 1e-3 + 1e-6) / 1000, 1.0)
        return 0.7 * smooth(num_terms, low_rank) + 0.3 * speed

    tuner = SkAutoTuner(
        parameter_bounds={"num_terms": (1, 20), "low_rank": (8, 256)},
        objective_function=combined,
        n_initial_points=4,
        n_iterations=4,
    )
    best_params, best_score = tuner.optimize()
    assert combined(**best_params) == best_score


def test_a_lambda_with_names_of_its_own_gets_the_parameters_in_order():
    def memory_constrained(num_terms, low_rank, max_memory_gb=4.0):
        numbers = sum(2 * num_terms * low_rank * (n + m) for n, m in [(1024, 512), (512, 256), (256, 10)])
        if numbers * 4 / 1024**3 > max_memory_gb:
            return 0.0
        try:
            if low_rank > 400:
                raise torch.cuda.OutOfMemoryError("made up")
            return smooth(num_terms, low_rank)
        except torch.cuda.OutOfMemoryError:
            return 0.0

    memory_tuner = SkAutoTuner(
        parameter_bounds={"num_terms": (1, 32), "low_rank": (8, 512)},
        objective_function=lambda nt, lr: memory_constrained(nt, lr, max_memory_gb=0.05),
        n_initial_points=6,
        n_iterations=4,
    )
    best_params, best_score = memory_tuner.optimize()
    assert best_score == memory_constrained(**best_params, max_memory_gb=0.05) > 0


def test_out_of_memory_that_nobody_catches_is_recorded_and_not_fatal():
    def objective(num_terms, low_rank):
        if low_rank > 64:
            raise torch.cuda.OutOfMemoryError("made up")
        return smooth(num_terms, low_rank)

    tuner = SkAutoTuner(parameter_bounds=BOX, objective_function=objective, n_initial_points=8, n_iterations=2)
    best_params, _best_score = tuner.optimize()
    assert best_params["low_rank"] <= 64
    assert {trial.status for trial in tuner.trials} == {"ok", "out_of_memory"}


def test_a_second_tuner_refines_around_the_best_of_the_first():
    broad_best, broad_score = SkAutoTuner(
        parameter_bounds={"num_terms": (1, 32), "low_rank": (8, 512)},
        objective_function=smooth,
        n_initial_points=8,
        n_iterations=4,
    ).optimize()
    refined_bounds = {
        "num_terms": (max(1, broad_best["num_terms"] - 4), broad_best["num_terms"] + 4),
        "low_rank": (max(8, broad_best["low_rank"] - 32), broad_best["low_rank"] + 32),
    }
    refined = SkAutoTuner(
        parameter_bounds=refined_bounds, objective_function=smooth, n_initial_points=4, n_iterations=4
    )
    refined_best, refined_score = refined.optimize()
    assert all(low <= refined_best[name] <= high for name, (low, high) in refined_bounds.items())
    assert max(refined_score, broad_score) > 0.5


def test_one_call_does_both_phases():
    tuner = SkAutoTuner(
        parameter_bounds={"num_terms": (1, 32), "low_rank": (8, 512)},
        objective_function=smooth,
        n_initial_points=6,
        n_iterations=8,
        strategy="progressive",
    )
    best_params, best_score = tuner.optimize()
    assert [trial.phase for trial in tuner.trials] == ["broad"] * 10 + ["refined"] * 4
    assert smooth(**best_params) == best_score
    assert all(1 <= t.params["num_terms"] <= 32 and 8 <= t.params["low_rank"] <= 512 for t in tuner.trials)


def test_a_cached_objective_keeps_its_arguments_and_is_hit():
    @lru_cache(maxsize=128)
    def cached_evaluation(num_terms, low_rank):
        return smooth(num_terms, low_rank)

    tuner = SkAutoTuner(parameter_bounds=BOX, objective_function=cached_evaluation, n_initial_points=4, n_iterations=2)
    best_params, best_score = tuner.optimize()
    assert cached_evaluation.cache_info().misses == 6
    assert cached_evaluation(**best_params) == best_score
    assert cached_evaluation.cache_info().hits == 1


def test_points_are_evaluated_in_parallel():
    sizes = {"parameter_bounds": BOX, "objective_function": smooth, "n_initial_points": 4, "n_iterations": 2}
    with ThreadPoolExecutor(2) as executor:
        parallel = SkAutoTuner(**sizes, executor=executor).optimize()
    assert parallel == SkAutoTuner(**sizes, batch_size=2).optimize()


def test_the_history_is_a_data_frame_with_correlations_and_pictures(tmp_path):
    pd = pytest.importorskip("pandas")
    plt = pytest.importorskip("matplotlib.pyplot")
    tuner = SkAutoTuner(parameter_bounds=BOX, objective_function=smooth, n_initial_points=8, n_iterations=0)
    tuner.optimize()
    df = pd.DataFrame(tuner.get_evaluation_history())
    correlation_matrix = df.corr()
    assert correlation_matrix.loc["score", "score"] == 1
    assert {"num_terms", "low_rank", "score", "seconds", "trial"} == set(df.columns)

    plt.switch_backend("Agg")
    fig, axes = plt.subplots(2, 2, figsize=(12, 10))
    axes[0, 0].scatter(df["num_terms"], df["score"])
    axes[0, 1].scatter(df["low_rank"], df["score"])
    scatter = axes[1, 0].scatter(df["num_terms"], df["low_rank"], c=df["score"], cmap="viridis")
    plt.colorbar(scatter, ax=axes[1, 0])
    plt.tight_layout()
    fig.savefig(tmp_path / "analysis.png", dpi=30)
    plt.close(fig)
    assert np.isfinite(df.to_numpy()).all()


def test_the_output_layer_of_the_guide_warns_and_does_not_raise():
    with pytest.warns(UserWarning, match=r"nn\.Linear would be smaller"):
        pr.nn.SKLinear(256, 10, num_terms=2, low_rank=16)
