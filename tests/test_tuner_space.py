"""The box of a search: what users may write, what is drawn from it, and its points as numbers."""

import itertools
import json
import math
import random

import numpy as np
import pytest

from panther.errors import ExhaustedError, PantherError, TunerError
from panther.tuner.space import Category, Float, Integer, Space

MIXED = Space.parse(
    {
        "rank": (8, 64),
        "terms": Integer(1, 9, step=2),
        "width": Integer(1, 1000, log=True),
        "share": (0.0, 1.0),
        "rate": Float(1e-5, 1e-1, log=True),
        "act": ["relu", "gelu", None],
    }
)


def drawn(space, count, seed=0):
    rng = np.random.default_rng(seed)
    return [space.sample(rng) for _ in range(count)]


# --- what users may write --------------------------------------------------------------------------------------------


def test_two_whole_numbers_are_an_integer_and_any_other_two_a_float():
    space = Space.parse({"a": (2, 16), "b": (2, 16.0), "c": ["x", "y"], "d": (np.int64(1), np.int32(4))})
    assert space.parameters == {
        "a": Integer(2, 16),
        "b": Float(2.0, 16.0),
        "c": Category(["x", "y"]),
        "d": Integer(1, 4),
    }
    assert type(space.parameters["d"].low) is int


@pytest.mark.parametrize(
    ("bound", "error", "says"),
    [
        ((9, 2), ValueError, "above high"),
        ((0.5, 0.1), ValueError, "above high"),
        ((float("nan"), 1.0), ValueError, "finite"),
        ((0.0, float("inf")), ValueError, "finite"),
        ((False, True), TypeError, "list for a choice"),
        ((0, True), TypeError, "list for a choice"),
        ((1, 10**30), ValueError, r"high is not within 2\*\*61"),
        ((-(10**400), 1), ValueError, r"low is not within 2\*\*61"),
        (("a", "b"), TypeError, "number"),
        ((1, 2, 3), TypeError, "Integer, Float or Category"),
        ((), TypeError, "Integer, Float or Category"),
        (7, TypeError, "Integer, Float or Category"),
        (None, TypeError, "Integer, Float or Category"),
        ("relu", TypeError, "Integer, Float or Category"),
        ([], ValueError, "empty"),
        (["a", "a"], ValueError, "twice"),
        ([object()], TypeError, "string, number"),
        ([float("nan")], ValueError, "finite"),
    ],
)
def test_a_wrong_bound_is_an_error_that_names_the_parameter(bound, error, says):
    with pytest.raises(error, match=f"'rank'.*{says}"):
        Space.parse({"rank": bound})


@pytest.mark.parametrize("make", [lambda: Integer(0, 8, log=True), lambda: Float(-1.0, 8.0, log=True)])
def test_a_logarithmic_scale_needs_positive_bounds(make):
    with pytest.raises(ValueError, match="low > 0"):
        make()


def test_a_step_is_at_least_one():
    with pytest.raises(ValueError, match="step"):
        Integer(0, 8, step=0)


def test_no_bounds_at_all_are_an_error():
    with pytest.raises(ValueError, match="empty"):
        Space.parse({})
    with pytest.raises(TypeError, match="dict"):
        Space.parse([(1, 2)])
    with pytest.raises(TypeError, match="string"):
        Space.parse({1: (1, 2)})


def test_a_constraint_is_a_function():
    with pytest.raises(TypeError, match="constraint"):
        Space.parse({"a": (1, 2)}, ["a <= 1"])


# --- drawing ---------------------------------------------------------------------------------------------------------


def test_drawn_points_are_inside_and_of_plain_types():
    types = {"rank": int, "terms": int, "width": int, "share": float, "rate": float}
    for params in drawn(MIXED, 300):
        assert MIXED.contains(params)
        assert all(type(params[name]) is kind for name, kind in types.items())
        assert list(params) == list(MIXED.parameters)
        assert json.loads(json.dumps(params)) == params


def test_both_ends_are_drawn_and_all_values_alike():
    counts = np.bincount([params["a"] for params in drawn(Space.parse({"a": (2, 5)}), 4000)], minlength=6)
    assert counts[:2].sum() == 0
    # 1000 of each are expected, with a standard deviation of 27.
    assert np.abs(counts[2:] - 1000).max() < 5 * 27


def test_only_every_step_th_number_is_drawn():
    assert {params["a"] for params in drawn(Space.parse({"a": Integer(1, 8, step=3)}), 100)} == {1, 4, 7}


def test_a_logarithmic_scale_draws_each_factor_alike():
    space = Space.parse({"i": Integer(1, 1023, log=True), "f": Float(1e-4, 1.0, log=True)})
    points = drawn(space, 2000)
    # Half of them below the geometric mean: 1000 with a standard deviation of 22, and some for rounding.
    assert abs(sum(params["i"] <= 32 for params in points) - 1000) < 150
    assert abs(sum(params["f"] < 1e-2 for params in points) - 1000) < 5 * 22
    assert {1, 2, 3} <= {params["i"] for params in points}


def test_the_same_generator_draws_the_same():
    assert drawn(MIXED, 5) == drawn(MIXED, 5) != drawn(MIXED, 5, seed=1)


def test_global_generators_are_left_alone():
    before = np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002 - the global one is what is looked at
    drawn(MIXED, 3)
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before  # noqa: NPY002 - the same


def test_only_allowed_points_are_drawn():
    space = Space.parse({"a": (1, 30), "b": (1, 30)}, [lambda p: p["a"] * p["b"] <= 60, lambda p: p["b"] > p["a"]])
    for params in drawn(space, 100):
        assert params["a"] * params["b"] <= 60 and params["b"] > params["a"]


def test_avoided_points_are_not_drawn_until_none_is_left():
    space = Space.parse({"a": (1, 3), "b": ["x", "y"]}, [lambda p: p["a"] != 2])
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(4):
        seen.add(space.key(space.sample(rng, seen)))
    assert seen == {space.key(params) for params in space.all_points()}
    with pytest.raises(ExhaustedError, match="taken"):
        space.sample(rng, list(seen))


def test_the_last_point_of_many_is_found():
    space = Space.parse({"a": (1, 200), "b": (1, 200)})
    everything = {space.key(params) for params in space.all_points()}
    last = {"a": 17, "b": 180}
    assert space.sample(np.random.default_rng(0), everything - {space.key(last)}) == last


@pytest.mark.parametrize("bounds", [{"a": (1, 5)}, {"a": (0.0, 1.0)}, {"a": (1, 10**9)}])
def test_constraints_that_allow_nothing_are_an_error_that_names_them(bounds):
    def at_most_4_gb(params):
        return False

    with pytest.raises(TunerError, match="at_most_4_gb") as caught:
        Space.parse(bounds, [at_most_4_gb]).sample(np.random.default_rng(0))
    assert not isinstance(caught.value, ExhaustedError)
    assert isinstance(caught.value, PantherError)


def test_a_constraint_that_raises_is_named_with_the_point():
    def broken(params):
        raise KeyError("hidden")

    with pytest.raises(TunerError, match=r"broken failed on {'a': 3}.*hidden"):
        Space.parse({"a": (3, 3)}, [broken]).sample(np.random.default_rng(0))


def test_a_constraint_is_asked_once_a_point_and_cannot_change_it():
    asked = []

    def greedy(params):
        asked.append(params.pop("a"))
        return True

    space = Space.parse({"a": (1, 3)}, [greedy])
    for params in drawn(space, 50):
        assert params["a"] in (1, 2, 3)
    assert sorted(asked) == [1, 2, 3]


# --- points ----------------------------------------------------------------------------------------------------------


def test_the_size_is_the_number_of_points():
    space = Space.parse({"a": Integer(1, 8, step=3), "b": ["x", "y"], "c": (0.5, 0.5)})
    assert space.size == 6 == len(list(space.all_points()))
    assert Space.parse({"a": (0.0, 1.0)}).size is None
    with pytest.raises(ValueError, match="continuous"):
        next(MIXED.all_points())


def test_only_equal_points_share_a_key():
    space = Space.parse({"a": [1, True, "1", None, 0, False, "None"]})
    keys = {space.key(params) for params in space.all_points()}
    assert len(keys) == 7
    reread = json.loads(json.dumps(list(space.all_points())))
    assert {space.key(params) for params in reread} == keys


@pytest.mark.parametrize(
    "changed",
    [
        {"rank": 65},
        {"rank": 8.0},
        {"rank": True},
        {"terms": 2},
        {"share": 1.5},
        {"share": 1},
        {"act": "tanh"},
        {"more": 1},
    ],
)
def test_what_is_outside_is_not_contained(changed):
    params = {"rank": 8, "terms": 3, "width": 10, "share": 0.5, "rate": 1e-3, "act": None}
    assert MIXED.contains(params)
    assert not MIXED.contains({**params, **changed})


def test_what_is_not_allowed_is_not_contained():
    space = Space.parse({"a": (1, 9)}, [lambda p: p["a"] < 5])
    assert space.contains({"a": 4})
    assert not space.contains({"a": 5})


def test_encoded_points_have_one_column_a_number_and_one_a_choice():
    space = Space.parse({"a": (2, 6), "b": ["x", "y", "z"], "c": (7, 7), "d": Float(1e-4, 1.0, log=True)})
    rows = space.encode([{"a": 2, "b": "y", "c": 7, "d": 1e-2}, {"a": 6, "b": "x", "c": 7, "d": 1.0}])
    np.testing.assert_allclose(rows, [[0, 0, 1, 0, 0.5, 0.5], [1, 1, 0, 0, 0.5, 1]], atol=1e-15)
    assert space.encode([]).shape == (0, 6)


def test_encoded_points_are_in_the_unit_cube():
    rows = MIXED.encode(drawn(MIXED, 200))
    assert rows.shape == (200, 8)
    assert rows.min() >= 0 and rows.max() <= 1


def test_a_point_is_the_nearest_to_its_own_place():
    for params in drawn(MIXED, 100):
        again = MIXED.near(MIXED.unit(params))
        for name in ("rank", "terms", "width", "act"):
            assert again[name] == params[name]
        assert math.isclose(again["rate"], params["rate"], rel_tol=1e-12)


def test_the_widest_ranges_stay_finite():
    space = Space.parse({"f": (-1e308, 1e308), "i": (-(10**18), 10**18)})
    rows = space.encode(drawn(space, 20))
    assert np.isfinite(rows).all()


@pytest.mark.parametrize("share", [0.01, 0.25, 1.0])
def test_a_narrowed_space_is_a_part_around_the_centre(share):
    for centre in drawn(MIXED, 50):
        part = MIXED.narrowed(centre, share)
        assert part.contains(centre)
        assert part.size is None
        for params in drawn(part, 20):
            assert MIXED.contains(params)
            gap = np.abs(np.subtract(MIXED.unit(params)[:5], MIXED.unit(centre)[:5]))
            # Half of the share, and for whole numbers a step: log(2) of log(1000) is the largest of the third.
            assert (gap <= share / 2 + np.array([1 / 56, 1 / 4, 0.101, 0, 0]) + 1e-9).all()


def test_a_narrowed_space_has_the_guide_s_sides():
    part = Space.parse({"num_terms": (1, 33), "low_rank": (8, 512)}).narrowed({"num_terms": 2, "low_rank": 500}, 0.25)
    assert part.parameters["num_terms"] == Integer(1, 6)
    assert part.parameters["low_rank"] == Integer(437, 512)


def test_a_centre_outside_of_the_box_is_brought_in():
    part = Space.parse({"a": (1, 101), "b": (0.0, 1.0)}).narrowed({"a": 500, "b": -3.0}, 0.1)
    assert part.parameters == {"a": Integer(96, 101), "b": Float(0.0, 0.05)}


def test_a_description_is_json_and_tells_spaces_apart():
    def small(params):
        return True

    bounds = {"a": (1, 3), "b": (1.0, 3.0), "c": [1, 3], "d": Integer(1, 3, log=True), "e": Integer(1, 3, step=2)}
    spaces = [Space.parse({"x": bound}) for bound in bounds.values()] + [Space.parse({"x": (1, 3)}, [small])]
    written = [json.dumps(space.describe()) for space in spaces]
    for one, other in itertools.combinations(written, 2):
        assert one != other
    assert "small" in written[-1]
