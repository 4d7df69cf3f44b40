"""Which back end asks when, and that a strategy never asks for less than there is."""

import numpy as np
import pytest

from panther.tuner import strategy as module
from panther.tuner.backends import BACKENDS, Question
from panther.tuner.space import Space
from panther.tuner.strategy import REFINED_SHARE, STRATEGIES, Strategy, ask
from panther.tuner.trial import Goal, Trial

SPACE = Space.parse({"terms": (1, 32), "rank": (8, 512)})


def trial(number, params, score=0.0, phase="initial"):
    return Trial(number, params, phase, "ok", {"score": score}, 1.0)


def question(number, trials=(), space=SPACE, count=1):
    return Question(space, (Goal(),), (), trials, (), count, 0, number)


@pytest.fixture
def asked(monkeypatch):
    """The names of the back ends asked, each answering at random at once."""
    names = []

    def stand_in(name):
        def answer(asked):
            names.append(name)
            return BACKENDS["random"](asked)

        return answer

    monkeypatch.setattr(module, "BACKENDS", {name: stand_in(name) for name in BACKENDS})
    return names


def phases(name, initial, iterations):
    return [ask(Strategy(name, initial, iterations), question(number))[1] for number in range(initial + iterations)]


def test_a_strategy_is_one_of_those_there_are():
    with pytest.raises(ValueError, match=r"'auto'.*not 'grid'"):
        Strategy("grid", 5, 20)
    with pytest.raises(ValueError, match="negative"):
        Strategy("auto", -1, 20)


def test_auto_looks_around_first_and_models_from_there_on(asked):
    assert phases("auto", 5, 20) == ["initial"] * 5 + ["gp"] * 20
    assert asked == ["spread"] * 5 + ["gp"] * 20


@pytest.mark.parametrize(("name", "first"), [("random", "random"), ("tpe", "random"), ("gp", "spread")])
def test_a_single_back_end_follows_the_initial_points(asked, name, first):
    assert phases(name, 2, 3) == ["initial"] * 2 + [name] * 3
    assert asked == [first] * 2 + [name] * 3


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_initial_points_and_no_iterations_are_served(name):
    for initial, iterations in ((0, 3), (3, 0), (0, 1)):
        for number in range(initial + iterations + 2):
            assert len(ask(Strategy(name, initial, iterations), question(number))[0]) == 1


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_batch_is_whole_wherever_it_begins(name):
    trials = [trial(0, {"terms": 3, "rank": 9}, 1.0), trial(1, {"terms": 7, "rank": 90}, 2.0)]
    for number in (0, 4, 10, 24):
        points, _ = ask(Strategy(name, 5, 20), question(number, trials, count=3))
        assert len({SPACE.key(params) for params in points}) == 3


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_small_box_is_asked_for_once_and_completely(name):
    space = Space.parse({"a": (1, 4), "b": ["x", "y", "z"]}, [lambda p: p["a"] != 2])
    trials = []
    for number in range(9):
        points, phase = ask(Strategy(name, 3, 17), question(number, trials, space))
        trials.append(trial(number, points[0], float(points[0]["a"]), phase))
    assert {space.key(t.params) for t in trials} == {space.key(params) for params in space.all_points()}
    assert ask(Strategy(name, 3, 17), question(9, trials, space))[0] == []


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_resumed_study_goes_on_the_same_way(name):
    """What is asked depends on what was told, not on who asked for it or how often."""
    plan = Strategy(name, 2, 6)
    trials = []
    for number in range(8):
        points, phase = ask(plan, question(number, trials))
        again = question(number, [Trial.from_json(told.to_json()) for told in trials])
        assert ask(plan, again) == (points, phase)
        trials.append(trial(number, points[0], -abs(points[0]["rank"] - 100.0), phase))


# --- progressive -----------------------------------------------------------------------------------------------------


def test_progressive_searches_the_box_then_a_part_around_the_best():
    plan = Strategy("progressive", 4, 12)
    trials = []
    for number in range(16):
        points, phase = ask(plan, question(number, trials))
        assert phase == ("broad" if number < 10 else "refined")
        if phase == "refined":
            best = max(trials, key=lambda told: told.scores["score"]).params
            gap = np.abs(np.subtract(SPACE.unit(points[0]), SPACE.unit(best)))
            assert (gap <= REFINED_SHARE / 2 + np.array([1 / 31, 1 / 504])).all()
        terms, rank = SPACE.unit(points[0])
        trials.append(trial(number, points[0], -((terms - 0.9) ** 2) - rank**2, phase))
    assert all(SPACE.contains(told.params) for told in trials)


def test_progressive_takes_the_rest_of_the_box_once_the_part_is_used_up():
    space = Space.parse({"a": (1, 40)})
    told = [trial(number, {"a": 16 + number}, 10.0 - abs(number - 4)) for number in range(9)]
    points, phase = ask(Strategy("progressive", 1, 4), question(9, told, space, count=4))
    assert phase == "refined"
    assert len(points) == 4 and all(not 16 <= params["a"] <= 24 for params in points[2:])
    assert len({params["a"] for params in points}) == 4


def test_progressive_without_any_score_keeps_to_the_whole_box():
    failed = [Trial(n, {"terms": 1 + n, "rank": 9}, "broad", "failed", {}, 1.0) for n in range(6)]
    points, phase = ask(Strategy("progressive", 2, 4), question(6, failed))
    assert phase == "broad" and len(points) == 1


def test_progressive_around_a_given_point_that_is_not_allowed_goes_elsewhere():
    space = Space.parse({"a": (1, 10_000), "b": (1, 10_000)}, [lambda p: p["a"] < 100])
    given = [trial(0, {"a": 9000, "b": 9000}, 9.0, "given"), trial(1, {"a": 3, "b": 30}, 1.0)]
    points, _ = ask(Strategy("progressive", 1, 1), question(2, given, space))
    assert len(points) == 1 and space.contains(points[0])
