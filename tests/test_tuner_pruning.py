"""Reports, and the rules that end a trial by them."""

import math

import pytest
import torch

from panther.tuner.pruning import PRUNERS, Monitor, PrunedError, halving, listening, median, report


def curve(*values, start=1):
    return tuple((float(step), float(value)) for step, value in enumerate(values, start=start))


OTHERS = [curve(0, level, 2 * level) for level in (1, 2, 3, 4, 5)]


def test_report_outside_of_a_study_does_nothing():
    assert report(1.0) is None
    assert report("whatever") is None  # which a study would refuse


def test_only_the_inside_of_a_study_listens():
    monitor = Monitor()
    with listening(monitor):
        report(1)
        report(torch.tensor(2.0), step=7)
    report(3)
    assert monitor.reports == [(1.0, 1.0), (7.0, 2.0)]


@pytest.mark.parametrize("args", [("high",), (None,), (1.0, "two"), (1.0, math.inf)])
def test_reports_that_are_no_numbers_are_refused(args):
    with listening(Monitor()), pytest.raises(TypeError, match="report"):
        report(*args)


def test_nan_ends_a_trial_where_something_judges():
    with listening(Monitor(median)), pytest.raises(PrunedError, match="NaN"):
        report(math.nan)
    with listening(Monitor()):
        report(math.nan)


@pytest.mark.parametrize("name", PRUNERS)
def test_no_trial_is_pruned_without_others_or_when_it_leads(name):
    assert not PRUNERS[name](curve(-5), [])
    assert not PRUNERS[name](curve(0, 9, 99), OTHERS)
    assert not PRUNERS[name](curve(7), [curve(*[1] * 9)] * 9)


@pytest.mark.parametrize("name", PRUNERS)
def test_equal_trials_are_not_pruned(name):
    assert not PRUNERS[name](curve(1, 1, 1), [curve(1, 1, 1)] * 9)


@pytest.mark.parametrize("name", PRUNERS)
def test_the_worst_of_many_is_pruned(name):
    assert PRUNERS[name](curve(0, 0, 0), [curve(1, 1, 1)] * 9)


def test_median_compares_at_the_same_step():
    assert not median(curve(0, 3), OTHERS)  # 1 2 3 4 5 at step 2
    assert median(curve(0, 2.9), OTHERS)
    assert not median(curve(0, 0, 0, 0), OTHERS)  # nobody came as far as step 4


def test_median_waits_for_enough_trials():
    assert not median(curve(-1, -1), OTHERS[:3])
    assert median(curve(-1, -1), OTHERS[:4])


def test_median_takes_the_best_so_far():
    assert not median(curve(9, 0), OTHERS)


def test_halving_judges_at_its_rungs_only():
    others = [curve(*[level] * 9) for level in range(9)]
    verdicts = [halving(curve(*[4] * count), others) for count in range(1, 10)]
    assert [count for count, verdict in enumerate(verdicts, start=1) if verdict] == [1, 3, 9]


def test_halving_keeps_the_best_third():
    others = [curve(level) for level in range(8)]  # with this one there are nine, and three go on
    assert [level for level in range(-1, 9) if not halving(curve(level + 0.5), others)] == [5, 6, 7, 8]


def test_less_is_better_where_a_goal_is_minimised():
    with listening(Monitor(median, OTHERS, maximise=False)):
        report(2.9, step=2)
    with listening(Monitor(median, OTHERS, maximise=False)), pytest.raises(PrunedError, match="at step 2"):
        report(3.1, step=2)


def test_what_it_raises_can_be_caught_as_an_error_of_panther():
    from panther.errors import PantherError

    assert issubclass(PrunedError, PantherError)
