"""Tables of trials, correlations, and importances of functions whose shares are known."""

import json
import math
import random

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from panther.errors import TunerError
from panther.tuner import analysis
from panther.tuner.space import Category, Float, Space
from panther.tuner.surrogate import EXPLAINING, SEARCHING, _matern, _squared_distances, fit
from panther.tuner.trial import Goal, Trial, best_of

SPACE = Space.parse({"num_terms": (1, 8), "rate": Float(1e-4, 1e-1, log=True), "act": ["relu", "gelu", "tanh"]})
GOAL = Goal()


def study(function, space=SPACE, count=60, noise=0.0):
    rng = np.random.default_rng(3)
    points = [space.sample(rng) for _ in range(count)]
    return [
        Trial(i, point, "initial", scores={"score": float(function(point) + noise * rng.normal())}, seconds=0.5)
        for i, point in enumerate(points)
    ]


def mixed():
    return [
        Trial(0, {"num_terms": 2, "rate": 0.01, "act": "gelu"}, "initial", scores={"score": 0.5}, seconds=1.5),
        Trial(1, {"num_terms": 4, "rate": 0.02, "act": "relu"}, "initial", "failed", error="ValueError: no"),
        Trial(2, {"num_terms": 6, "rate": 0.01, "act": "tanh"}, "tpe", scores={"score": -math.inf}, memory_gb=0.25),
        Trial(3, {"num_terms": 8, "rate": 0.03, "act": "relu"}, "gp", scores={"score": 0.9}),
    ]


# --- tables


def test_rows_are_flat_and_numeric():
    found = analysis.rows(mixed(), SPACE)
    assert found[0] == {"num_terms": 2, "rate": 0.01, "act": 1, "score": 0.5, "seconds": 1.5, "trial": 0}
    assert list(found[0]) == ["num_terms", "rate", "act", "score", "seconds", "trial"]
    assert all(isinstance(value, (int, float)) for row in found for value in row.values())


def test_a_trial_without_scores_has_none_in_its_row():
    found = analysis.rows(mixed(), SPACE)
    assert len(found) == 4
    assert "score" not in found[1]
    json.dumps(found[0] | found[1] | found[3], allow_nan=False)


def test_the_data_frame_adds_phase_and_status_and_keeps_categories():
    frame = analysis.data_frame(mixed(), SPACE, [GOAL])
    assert list(frame["act"]) == ["gelu", "relu", "tanh", "relu"]
    assert list(frame["status"]) == ["ok", "failed", "ok", "ok"]
    assert list(frame["phase"]) == ["initial", "initial", "tpe", "gp"]
    assert list(frame["trial"]) == [0, 1, 2, 3]
    assert math.isnan(frame["score"][1])
    assert frame["error"][1] == "ValueError: no"
    assert frame["memory_gb"][2] == 0.25
    assert frame["num_terms"].dtype == np.int64


def test_an_objective_called_memory_gb_keeps_its_column():
    pytest.importorskip("pandas")
    told = [Trial(0, {"num_terms": 2, "rate": 0.01, "act": "gelu"}, "initial", scores={"memory_gb": 0.5})]
    assert list(analysis.data_frame(told, SPACE, [Goal("memory_gb", maximise=False)])["memory_gb"]) == [0.5]


def test_a_study_without_trials_or_scores_has_its_columns():
    assert "score" in analysis.data_frame([], SPACE, [GOAL])
    assert list(analysis.data_frame(mixed()[1:2], SPACE, [Goal("accuracy")])["accuracy"].isna()) == [True]
    assert analysis.correlations([], SPACE, [GOAL]).shape == (6, 6)


def test_correlations_are_those_of_the_rows():
    pd = pytest.importorskip("pandas")
    trials = study(lambda p: p["num_terms"], noise=0.1)
    found = analysis.correlations(trials, SPACE, [GOAL])
    wanted = pd.DataFrame(analysis.rows(trials, SPACE)).corr()
    pd.testing.assert_frame_equal(found, wanted)
    assert found.loc["num_terms", "score"] > 0.99
    assert math.isnan(found.loc["seconds", "score"])


def test_infinite_scores_are_left_out_of_correlations():
    trials = study(lambda p: p["num_terms"])
    trials.append(Trial(99, {"num_terms": 1, "rate": 0.01, "act": "relu"}, scores={"score": math.inf}))
    assert analysis.correlations(trials, SPACE, [GOAL]).loc["num_terms", "score"] == pytest.approx(1)


# --- importance


def test_the_method_and_the_goal_are_named():
    found = analysis.importance(study(lambda p: p["num_terms"]), SPACE, [GOAL])
    assert "Gaussian process" in found.method
    assert (found.goal, found.trials) == ("score", 60)
    assert "importance for score" in str(found)
    assert "num_terms" in str(found)


def test_a_score_of_one_parameter_is_due_to_that_parameter():
    for noise in (0.0, 0.05):
        found = analysis.importance(study(lambda p: (p["num_terms"] / 8) ** 2, noise=noise), SPACE, [GOAL])
        assert next(iter(found.shares)) == "num_terms"
        assert found.shares["num_terms"] > 0.9
        assert max(found.shares["rate"], found.shares["act"]) < 0.1
        assert found.fit > 0.9


def test_a_logarithmic_parameter_counts_in_its_scale():
    found = analysis.importance(study(lambda p: -((math.log10(p["rate"]) + 2) ** 2)), SPACE, [GOAL])
    assert found.shares["rate"] > 0.95


def test_categories_count_as_one_parameter():
    values = {"relu": 0.0, "gelu": 1.0, "tanh": 0.2}
    found = analysis.importance(study(lambda p: values[p["act"]]), SPACE, [GOAL])
    assert list(found.shares) == ["act", *list(found.shares)[1:]]
    assert found.shares["act"] > 0.95


def test_shares_of_a_sum_are_those_of_its_variances():
    space = Space.parse({"a": (0.0, 1.0), "b": (0.0, 1.0)})
    found = analysis.importance(study(lambda p: 2 * p["a"] + p["b"], space), space, [GOAL])
    assert found.shares["a"] == pytest.approx(0.8, abs=0.05)
    assert found.shares["b"] == pytest.approx(0.2, abs=0.05)
    assert found.alone["a"] == pytest.approx(0.8, abs=0.05)


def test_what_two_parameters_do_together_is_not_what_they_do_alone():
    space = Space.parse({"a": (-1.0, 1.0), "b": (-1.0, 1.0), "c": (-1.0, 1.0)})
    found = analysis.importance(study(lambda p: p["a"] * p["b"], space), space, [GOAL])
    assert min(found.shares["a"], found.shares["b"]) > 0.9
    assert max(found.alone.values()) < 0.1
    assert found.shares["c"] < 0.1


def test_noise_is_said_to_be_no_fit():
    found = analysis.importance(study(lambda p: 0.0, noise=1.0), SPACE, [GOAL])
    assert found.fit < 0.3
    assert "too little to trust" in str(found)


def test_equal_scores_depend_on_nothing():
    found = analysis.importance(study(lambda p: 0.7), SPACE, [GOAL])
    assert set(found.shares.values()) == {0.0}
    assert found.fit == 0


def test_a_parameter_with_one_value_has_no_share():
    space = Space.parse({"a": (0.0, 1.0), "fixed": (3, 3), "only": ["x"]})
    found = analysis.importance(study(lambda p: p["a"], space), space, [GOAL])
    assert found.shares["a"] > 0.95
    assert (found.shares["fixed"], found.shares["only"]) == (0, 0)


def test_few_or_infinite_scores_are_refused_with_the_number_needed():
    with pytest.raises(TunerError, match=r"at least 5 trials with a finite 'score'; this study has 2"):
        analysis.importance(mixed(), SPACE, [GOAL])


def test_one_goal_of_several_is_asked_for_by_name():
    trials = [
        Trial(t.number, t.params, scores={"accuracy": t.params["num_terms"], "latency_ms": math.log(t.params["rate"])})
        for t in study(lambda p: 0)
    ]
    goals = [Goal("accuracy"), Goal("latency_ms", maximise=False)]
    assert next(iter(analysis.importance(trials, SPACE, goals).shares)) == "num_terms"
    assert next(iter(analysis.importance(trials, SPACE, goals, "latency_ms").shares)) == "rate"
    with pytest.raises(ValueError, match=r"goal='speed': expected one of 'accuracy', 'latency_ms'"):
        analysis.importance(trials, SPACE, goals, "speed")


def test_long_studies_are_thinned():
    found = analysis.importance(study(lambda p: p["num_terms"], count=900), SPACE, [GOAL])
    assert 200 < found.trials <= analysis.MOST


def test_importance_repeats_itself_and_draws_no_global_random_numbers():
    trials = study(lambda p: p["num_terms"] * math.log(p["rate"]), noise=0.1)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002  # the global state is the point
    found = analysis.importance(trials, SPACE, [GOAL])
    assert found == analysis.importance(trials, SPACE, [GOAL])
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002


# --- the fitted function


def test_the_surrogate_goes_through_scores_without_noise():
    points = np.random.default_rng(0).random((40, 2))
    scores = np.sin(3 * points[:, 0]) + points[:, 1]
    fitted = fit(points, scores, [1, 1])
    np.testing.assert_allclose(fitted(points), scores, atol=0.01)
    assert fitted.fit > 0.95


def test_two_categories_are_at_the_distance_of_two_ends():
    points = np.array([[0.0, 1, 0, 0], [1.0, 0, 0, 1]])
    assert _squared_distances(points, points, [1, 3])[:, 0, 1].tolist() == [1, 1]
    assert Category(["a", "b", "c"]).count == 3


def test_coinciding_points_do_no_harm():
    points = np.repeat([[0.2], [0.7]], 5, axis=0)
    scores = np.tile([0.1, 0.2, 0.3, 0.4, 0.5], 2) + np.repeat([0.0, 1.0], 5)
    assert np.isfinite(fit(points, scores, [1])(np.linspace(0, 1, 11)[:, None])).all()


@pytest.mark.parametrize("prior", [EXPLAINING, SEARCHING])
def test_the_fit_is_at_a_peak_of_the_posterior(prior):
    rng = np.random.default_rng(2)
    points = rng.random((25, 2))
    scores = np.sin(4 * points[:, 0]) + points[:, 1] ** 2 + 0.2 * rng.standard_normal(25)
    scores = (scores - scores.mean()) / scores.std()
    found = fit(points, scores, [1, 1], prior)

    def posterior(lengths, noise, constant):
        """Written out, for one point more or less beside the fit."""
        kernel = _matern((((points[:, None] - points[None]) / lengths) ** 2).sum(-1))[0] + noise * np.eye(25)
        rest = scores - constant
        variance = prior.variance or rest @ np.linalg.solve(kernel, rest) / 25
        likelihood = multivariate_normal.logpdf(rest, cov=variance * kernel)
        off = (np.log(lengths / np.sqrt(2)) - prior.length[0]) / prior.length[1]
        return likelihood - (off @ off + ((np.log(noise) - prior.noise[0]) / prior.noise[1]) ** 2) / 2

    top = posterior(found.lengths, found.noise, found.constant)
    for factor in (0.9, 1.1):
        assert posterior(found.lengths * [factor, 1], found.noise, found.constant) < top
        assert posterior(found.lengths * [1, factor], found.noise, found.constant) < top
        assert posterior(found.lengths, found.noise * factor, found.constant) < top
        assert posterior(found.lengths, found.noise, found.constant * factor) < top


def test_equal_scores_can_be_fitted_where_the_variance_is_known():
    points = np.random.default_rng(0).random((6, 2))
    np.testing.assert_allclose(fit(points, np.full(6, 2.5), [1, 1], SEARCHING)(points), 2.5, rtol=1e-12)


# --- the expected best


def test_the_expected_best_is_not_the_luckiest_trial():
    space = Space.parse({"x": (0.0, 1.0)})
    xs = np.linspace(0, 1, 21)
    scores = -((xs - 0.5) ** 2) + 0.01 * np.where(np.arange(21) % 2, -1, 1)
    scores[16] += 0.1  # at 0.8: now the best one observed
    trials = [
        Trial(i, {"x": float(x)}, scores={"score": float(y)}) for i, (x, y) in enumerate(zip(xs, scores, strict=True))
    ]
    assert best_of(trials, GOAL).number == 16
    assert 7 <= analysis.expected_best(trials, space, GOAL).number <= 13
    smallest = [Trial(t.number, t.params, scores={"score": -t.scores["score"]}) for t in trials]
    assert (
        analysis.expected_best(smallest, space, Goal(maximise=False))
        == smallest[analysis.expected_best(trials, space, GOAL).number]
    )


def test_without_noise_the_expected_best_is_the_best():
    trials = study(lambda p: -abs(p["num_terms"] - 5) - abs(math.log10(p["rate"]) + 2) + (p["act"] == "gelu"))
    assert analysis.expected_best(trials, SPACE, GOAL) == best_of(trials, GOAL)


def test_the_expected_best_may_win():
    trials = [Trial(i, {"x": float(i)}, scores={"score": float(i)}) for i in range(8)]
    trials += [Trial(8, {"x": 8.0}, status="infeasible", scores={"score": 8.0})]
    trials += [Trial(9, {"x": 9.0}, scores={"score": -math.inf}), Trial(10, {"x": 9.5}, status="failed")]
    assert analysis.expected_best(trials, Space.parse({"x": (0.0, 10.0)}), GOAL).number == 7


@pytest.mark.parametrize("scores", [[], [0.3, 0.9, 0.2], [0.5] * 8])
def test_with_few_or_equal_scores_the_expected_best_is_the_best_observed(scores):
    trials = [Trial(i, {"x": i / 10}, scores={"score": score}) for i, score in enumerate(scores)]
    assert analysis.expected_best(trials, Space.parse({"x": (0.0, 1.0)}), GOAL) == best_of(trials, GOAL)
