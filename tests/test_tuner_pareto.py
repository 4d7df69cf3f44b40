"""The front, its knee, and exact hypervolumes against counting."""

import itertools
import math

import numpy as np
import pytest

from panther.tuner.pareto import front, gains_of, hypervolume, is_dominated, knee
from panther.tuner.trial import Goal, Trial

UP, DOWN = Goal("accuracy"), Goal("latency_ms", maximise=False)


def trials(*scores, status="ok"):
    return [
        Trial(number, {"x": number}, status=status, scores={"accuracy": a, "latency_ms": b})
        for number, (a, b) in enumerate(scores)
    ]


def numbers(found):
    return [trial.number for trial in found]


def test_the_front_holds_what_nothing_beats_and_starts_with_the_best_of_the_first_goal():
    points = trials((0.5, 1.0), (0.9, 9.0), (0.8, 3.0), (0.7, 4.0), (0.9, 10.0), (0.5, 2.0))
    assert numbers(front(points, (UP, DOWN))) == [1, 2, 0]


def test_equal_points_are_all_on_the_front():
    assert numbers(front(trials((0.5, 1.0), (0.5, 1.0)), (UP, DOWN))) == [0, 1]


def test_trials_that_failed_or_break_a_limit_are_on_no_front():
    failed = Trial(7, {"x": 1}, status="failed", error="ValueError: no")
    broken = trials((1.0, 0.0), status="infeasible")
    assert numbers(front([failed, *broken, *trials((0.1, 5.0))], (UP, DOWN))) == [0]
    assert front([failed, *broken], (UP, DOWN)) == []
    assert knee([failed], (UP, DOWN)) is None
    assert knee([], (UP, DOWN)) is None


def test_one_goal_has_its_best_as_the_front():
    assert numbers(front(trials((0.1, 0.0), (0.4, 0.0), (0.3, 0.0)), (UP,))) == [1]


@pytest.mark.parametrize("goals", [2, 3, 4])
def test_domination_agrees_with_its_definition(goals):
    gains = np.random.default_rng(goals).integers(0, 4, (40, goals)).astype(float)
    wanted = [any((b >= a).all() and (b > a).any() for b in gains) for a in gains]
    assert is_dominated(gains).tolist() == wanted


def test_the_knee_is_where_the_front_bends():
    points = trials((0.5, 1.0), (0.90, 2.0), (0.93, 6.0), (0.95, 10.0))
    assert numbers([knee(points, (UP, DOWN))]) == [1]


def test_the_knee_does_not_depend_on_units():
    points = trials((0.5, 1.0), (0.90, 2.0), (0.93, 6.0), (0.95, 10.0))
    scaled = trials(*((100 * t.scores["accuracy"], t.scores["latency_ms"] / 1000) for t in points))
    assert numbers([knee(scaled, (UP, DOWN))]) == numbers([knee(points, (UP, DOWN))])


def test_a_front_without_a_bend_gives_the_best_of_the_first_goal():
    assert numbers([knee(trials((0.2, 1.0), (0.8, 3.0)), (UP, DOWN))]) == [1]
    assert numbers([knee(trials((0.1, 1.0), (0.2, 2.9), (0.8, 3.0)), (UP, DOWN))]) == [2]
    assert numbers([knee(trials((0.2, 3.0), (0.8, 3.0)), (UP, DOWN))]) == [1]


def test_infinite_scores_are_no_knee_while_there_are_others():
    points = trials((math.inf, 9.0), (0.9, 2.0), (0.8, 1.0), (0.1, -math.inf))
    assert numbers([knee(points, (UP, DOWN))]) == [1]
    assert numbers([knee(trials((math.inf, 1.0)), (UP, DOWN))]) == [0]


def counted(points, size):
    """Of integer points from the corner 0: the unit cubes that lie under any of them."""
    cubes = np.array(list(itertools.product(range(size), repeat=points.shape[1])))
    return int((points[None] > cubes[:, None]).all(-1).any(1).sum())


@pytest.mark.parametrize("goals", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 3, 12])
def test_the_hypervolume_is_exact(goals, count):
    for seed in range(5):
        points = np.random.default_rng(seed).integers(0, 6, (count, goals))
        assert hypervolume(points, [0] * goals) == counted(points, 6)


def test_the_hypervolume_is_of_gains_beyond_the_reference():
    gains = gains_of(trials((0.5, 1.0), (0.8, 3.0)), (UP, DOWN))
    assert hypervolume(gains, [0.0, -4.0]) == pytest.approx(0.5 * 2 + 0.8 * 1)
    assert hypervolume(gains, [0.6, -4.0]) == pytest.approx(0.2)
    assert hypervolume(gains, [0.8, -4.0]) == 0
    assert hypervolume([], [0.0, 0.0]) == 0
    assert hypervolume([[math.inf, 2.0], [math.inf, 1.0], [-math.inf, 5.0]], [0.0, 0.0]) == math.inf


@pytest.mark.parametrize(
    ("gains", "reference", "text"),
    [
        ([[1.0, math.nan]], [0.0, 0.0], "NaN"),
        ([[1.0, 2.0]], [0.0, math.inf], "finite"),
        ([[1.0, 2.0]], [0.0], "do not fit"),
        ([[1.0, 2.0]], [], "finite"),
    ],
)
def test_what_has_no_volume_is_refused(gains, reference, text):
    with pytest.raises(ValueError, match=text):
        hypervolume(gains, reference)
