"""Trials as data: what they say of themselves, their JSON, and numbers of every kind."""

import json
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from panther.tuner.trial import STATUSES, Goal, Limit, Trial, best_of, number_of

EVERYTHING = Trial(
    number=3,
    params={"rank": 8, "rate": 0.1 + 0.2, "kind": "svd", "fast": True, "nothing": None},
    phase="gp",
    status="infeasible",
    scores={"accuracy": math.inf, "latency_ms": -math.inf, "size": 1 / 3},
    seconds=0.25,
    memory_gb=1.5,
    error="size is 0.3",
    reports=((1.0, 0.5), (2.0, -math.inf)),
    repeats=({"accuracy": math.inf}, {"accuracy": 0.5}),
)


def strict(line):
    def refuse(text):
        raise AssertionError(text)

    return json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize("trial", [EVERYTHING, Trial(0, {})], ids=["everything", "nothing"])
def test_a_trial_survives_json(trial):
    line = trial.to_json()
    assert "\n" not in line
    strict(line)
    back = Trial.from_json(line)
    assert back == trial
    assert [type(value) for value in back.params.values()] == [type(value) for value in trial.params.values()]


@pytest.mark.parametrize("line", ["{}", "[]", "3", '{"number": 1}', EVERYTHING.to_json()[:-9], '{"scores": 1}'])
def test_what_is_no_trial_is_refused(line):
    with pytest.raises(ValueError):
        Trial.from_json(line)


def test_an_unknown_status_is_refused():
    with pytest.raises(ValueError, match="status"):
        Trial.from_json(Trial(0, {}, status="great").to_json())


@pytest.mark.parametrize("status", STATUSES)
def test_only_an_ok_trial_with_scores_may_win(status):
    trial = Trial(0, {}, status=status, scores={"score": 1.0})
    assert trial.has_scores
    assert trial.is_feasible == (status == "ok")
    assert not Trial(0, {}, status=status).is_feasible


def test_the_first_of_equals_is_best_and_infeasible_ones_never():
    trials = [Trial(n, {}, scores={"score": s}) for n, s in enumerate([1.0, 3.0, 3.0])]
    trials.append(Trial(3, {}, status="infeasible", scores={"score": 9.0}))
    assert best_of(trials, Goal()).number == 1
    assert best_of(trials, Goal(maximise=False)).number == 0
    assert best_of(trials[3:], Goal()) is None


def test_infinite_scores_are_ordered_like_others():
    trials = [Trial(n, {}, scores={"score": s}) for n, s in enumerate([-math.inf, 3.0, math.inf])]
    assert best_of(trials, Goal()).number == 2
    assert best_of(trials, Goal(maximise=False)).number == 0


def test_a_limit_holds_on_both_sides_and_at_its_bound():
    upper, lower = Limit("x", 2.0), Limit("x", 2.0, is_upper=False)
    assert upper.is_met_by({"x": 2.0}) and lower.is_met_by({"x": 2.0})
    assert not upper.is_met_by({"x": 2.5}) and not lower.is_met_by({"x": 1.5})
    assert (str(upper), str(lower)) == ("x <= 2", "x >= 2")
    assert str(Limit("x", 0.123456789)) == "x <= 0.123456789" and str(Limit("x", 1e9)) == "x <= 1e+09"


NUMBERS = [
    1,
    1.0,
    True,
    np.float32(1),
    np.int64(1),
    np.bool_(True),
    np.array(1.0),
    np.array([[1.0]]),
    torch.tensor(1.0),
    torch.ones(1, 1, requires_grad=True),
    torch.tensor(1, dtype=torch.bfloat16),
    Fraction(1),
    Decimal(1),
]


@pytest.mark.parametrize("value", NUMBERS, ids=lambda v: f"{type(v).__name__}{getattr(v, 'shape', '')}")
def test_numbers_of_every_kind_are_numbers(value):
    assert number_of(value) == 1.0
    assert type(number_of(value)) is float


WRONG = [None, "1.0", b"1", [1.0], (1.0,), {}, 1j, np.zeros(2), torch.zeros(0), np.str_("1"), 10**400, object()]


@pytest.mark.parametrize("value", WRONG, ids=lambda v: type(v).__name__)
def test_what_is_no_number_is_refused_with_a_reason(value):
    with pytest.raises(TypeError, match=r"no number|elements"):
        number_of(value)


def test_infinite_numbers_and_nan_are_numbers():
    assert number_of(torch.tensor(math.inf)) == math.inf
    assert math.isnan(number_of(np.nan))
