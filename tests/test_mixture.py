"""The linear program of choices, beside what can be said of it by hand."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from panther.mixture import mixture, undominated


def test_one_layer_takes_its_best_choice_within_the_limits() -> None:
    costs, losses = [[[0.2, 0.3], [0.9, 0.8], [2.0, 0.1]]], [[5.0, 1.0, 0.0]]
    assert mixture(costs, losses, math.inf) in ([[0, 1]], [[1]], [[1, 2]])
    assert mixture([[[0.2, 0.3], [1.0, 1.0]]], [[5.0, 1.0]], math.inf) == [[1]]


def test_no_more_layers_mix_than_there_are_limits() -> None:
    rng = random.Random(0)
    for limits in (1, 2, 3):
        costs = [[[rng.random() / 10 for _ in range(limits)] for _ in range(12)] for _ in range(20)]
        losses = [[rng.random() for _ in range(12)] for _ in range(20)]
        taken = mixture(costs, losses, math.inf)
        assert taken is not None and all(taken)
        assert sum(len(places) > 1 for places in taken) <= limits


def test_what_cannot_be_within_the_limits_has_no_mixture() -> None:
    assert mixture([[[2.0]], [[0.1]]], [[0.0], [0.0]], math.inf) is None


@pytest.mark.parametrize("most", [math.inf, 3.0])
def test_choices_that_are_infinitely_bad_or_worse_than_a_known_plan_are_left_out(most: float) -> None:
    costs, losses = [[[0.1], [0.9]], [[0.1], [0.2]]], [[math.inf, 1.0], [4.0, 1.0]]
    taken = mixture(costs, losses, most)
    assert taken is None or 0 not in taken[0]
    assert mixture([[[0.1]]], [[math.inf]], most) is None


def test_undominated_rows_are_those_that_no_other_is_below() -> None:
    rng = np.random.default_rng(0)
    for columns in (2, 3, 4):
        points = rng.integers(0, 6, (60, columns)).astype(float)
        kept = undominated(points)
        for i, point in enumerate(points):
            below = [j for j, other in enumerate(points) if (other <= point).all() and (other < point).any()]
            assert (i in kept) == (not below and not any((points[j] == point).all() for j in range(i)))
        assert all(a < b for a, b in itertools.pairwise(kept))
