"""The grammar of budgets, plans as JSON, and the arithmetic of the nouns."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from panther.errors import PlanError
from panther.spec import (
    BUDGET_FIELDS,
    Budget,
    Capture,
    Choice,
    Cost,
    Figures,
    Healed,
    LayerReport,
    LayerSpec,
    LimitReport,
    Plan,
    Report,
    Target,
    TrialReport,
    Tuning,
    to_data,
)

# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (0.5, 0.5),
        (1.0, 1.0),
        (1e-6, 1e-6),
        ("50%", 0.5),
        (" 12.5 % ", 0.125),
        ("100%", 1.0),
        ("0.1%", 0.001),
        (np.float64(0.25), 0.25),
        (np.float32(0.5), 0.5),
        (torch.tensor(0.75), 0.75),
    ],
)
def test_a_bare_budget_is_the_fraction_kept(given, kept):
    budget = Budget.parse(given)
    assert budget == Budget(params=kept) and isinstance(budget.params, float)
    assert budget.of == "sketchable" and budget.flops is budget.size_mb is None


@pytest.mark.parametrize(
    ("given", "readings"),
    [
        (1, ["two ways", "budget=1.0 keeps everything", "Budget(params=1) keeps 1 numbers"]),
        (1.7, ['budget="1.7%" keeps 1.7 percent', "Budget(params=2) keeps 2 numbers"]),
        (50, ['budget="50%" keeps 50 percent', "Budget(params=50) keeps 50 numbers"]),
        (100, ['budget="100%"', "Budget(params=100)"]),
        (5_000_000, ['budget="50%" keeps half', "Budget(params=5000000)"]),
        (np.int64(50), ['budget="50%"', "Budget(params=50)"]),
    ],
)
def test_an_ambiguous_budget_is_refused_with_both_readings(given, readings):
    with pytest.raises(ValueError, match=r"A bare budget is a float above 0 and up to 1\.0") as caught:
        Budget.parse(given)
    assert all(reading in str(caught.value) for reading in readings)


@pytest.mark.parametrize("given", [0, 0.0, -1, -0.5, np.float64(0.0)])
def test_a_budget_that_keeps_nothing_is_refused(given):
    with pytest.raises(ValueError, match="nothing would remain; a fraction KEPT is above 0"):
        Budget.parse(given)


@pytest.mark.parametrize("given", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_a_budget_that_is_no_number_is_refused(given):
    with pytest.raises(ValueError, match="not a finite number; a fraction KEPT is above 0"):
        Budget.parse(given)


@pytest.mark.parametrize("given", ["abc", "", "0.5", "half"])
def test_text_that_is_no_percentage_is_refused_with_examples(given):
    with pytest.raises(ValueError, match=r"neither a fraction nor a percentage; write budget=0.5 or budget=\"50%\""):
        Budget.parse(given)


@pytest.mark.parametrize("given", ["0%", "-5%", "101%", "nan%", "%", "x%"])
def test_a_percentage_outside_its_range_is_refused(given):
    with pytest.raises(ValueError, match="a percentage is what is KEPT, above 0 and up to 100"):
        Budget.parse(given)


@pytest.mark.parametrize("given", [True, False, None, [0.5], object(), np.bool_(1), torch.tensor(data=True)])
def test_a_budget_of_no_known_kind_is_a_type_error(given):
    with pytest.raises(TypeError, match="expected the fraction of weights to keep"):
        Budget.parse(given)


@pytest.mark.parametrize("given", [np.array([0.5, 0.5]), torch.tensor([0.5, 0.5])])
def test_several_numbers_are_no_budget(given):
    with pytest.raises(TypeError, match="expected the fraction of weights to keep"):
        Budget.parse(given)


def test_a_dict_names_the_fields():
    assert Budget.parse({"params": 0.5, "size_mb": 20, "of": "model"}) == Budget(params=0.5, size_mb=20.0, of="model")
    budget = Budget(flops=10)
    assert Budget.parse(budget) is budget


def test_an_unknown_field_gets_the_nearest_name():
    with pytest.raises(ValueError, match=r"has no field 'parms' .*did you mean 'params'"):
        Budget.parse({"parms": 0.5})
    with pytest.raises(
        ValueError,
        match=r"has no field 'zzz' \(it has params, flops, size_mb, latency_ms, peak_memory_mb, max_drop, of\)$",
    ):
        Budget.parse({"zzz": 0.5})


@pytest.mark.parametrize("name", BUDGET_FIELDS)
def test_every_field_may_be_given_alone_or_be_none(name):
    value = 0.5
    for give in (Budget.parse, lambda fields: Budget(**fields)):
        budget = give({**dict.fromkeys(BUDGET_FIELDS), name: value})
        assert getattr(budget, name) == value
        assert [n for n in BUDGET_FIELDS if getattr(budget, n) is not None] == [name]
        assert budget.limits_size == (name != "max_drop")


@pytest.mark.parametrize("name", ["params", "flops"])
def test_counts_and_fractions_are_told_apart_by_type(name):
    def held(value):
        return getattr(Budget(**{name: value}), name)

    assert held(0.5) == 0.5 and held("50%") == 0.5 and held(np.float32(0.5)) == 0.5
    for count in (1, 5_000_000, "5000000", "101", np.int64(7)):
        assert type(held(count)) is int and held(count) == int(count)
    assert type(held(1.0)) is float  # everything, and not a single number
    assert held("0.25") == 0.25


@pytest.mark.parametrize("name", ["params", "flops"])
def test_a_percentage_without_its_sign_is_no_count(name):
    with pytest.raises(ValueError, match=rf"Budget\({name}='50'\): write {name}=\"50%\" for a percentage"):
        Budget.parse({name: "50"})


@pytest.mark.parametrize("value", [0, -3, 0.0, 1.5, "150%", "0%", "nan%", "abc", True, math.nan, math.inf, [1], "1e6"])
def test_a_count_or_fraction_out_of_range_names_what_was_given(value):
    with pytest.raises(ValueError, match=r"Budget\(params=") as caught:
        Budget(params=value)
    assert str(value) in str(caught.value)


AMOUNTS = {
    "size_mb": r"megabytes \(10\^6 bytes\) of the saved file, as in size_mb=20.0",
    "latency_ms": "milliseconds of one run of the example inputs, as in latency_ms=12.0",
    "peak_memory_mb": r"megabytes \(10\^6 bytes\) of tensors alive at once .* as in peak_memory_mb=80.0",
}


@pytest.mark.parametrize("name", AMOUNTS)
@pytest.mark.parametrize(
    ("value", "held"),
    [
        (20, 20.0),
        (0.5, 0.5),
        ("50%", "50%"),
        (" 50% ", "50%"),
        ("20", 20.0),
        (np.int64(3), 3.0),
        (torch.tensor(2.5), 2.5),
        (1e9, 1e9),
    ],
)
def test_sizes_times_and_memory_are_amounts_or_percentages(name, value, held):
    budget = Budget(**{name: value})
    assert getattr(budget, name) == held and budget == Budget.from_fields({name: value})


@pytest.mark.parametrize("name", AMOUNTS)
@pytest.mark.parametrize("value", [0, -1, "0%", "101%", "abc", True, math.nan, math.inf, "big", "-5%", "nan%", [1], ""])
def test_an_impossible_amount_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"Budget\({name}=.*expected {AMOUNTS[name]}.*{name}=\"50%\"") as caught:
        Budget(**{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("value", "held"),
    [(0, 0.0), (0.01, 0.01), (3, 3.0), ("0.02", 0.02), (np.float32(0.5), 0.5), (torch.tensor(1), 1.0)],
)
def test_a_drop_is_in_the_metrics_own_unit(value, held):
    budget = Budget(max_drop=value)
    assert budget.max_drop == held and type(budget.max_drop) is float


@pytest.mark.parametrize("value", [-0.01, "1%", "abc", True, math.nan, math.inf, [0.1], "", (0.1,)])
def test_an_impossible_drop_is_refused(value):
    with pytest.raises(
        ValueError, match=r"Budget\(max_drop=.*by how much eval_fn may fall.* as in max_drop=0.01"
    ) as caught:
        Budget(max_drop=value)
    assert repr(value) in str(caught.value)


def test_a_budget_must_hold_something_and_count_something_known():
    with pytest.raises(
        ValueError, match="Budget\\(\\) holds nothing: give at least one of " + ", ".join(BUDGET_FIELDS)
    ):
        Budget()
    with pytest.raises(ValueError, match="Budget\\(of='layers'\\): expected 'sketchable' or 'model'"):
        Budget(params=0.5, of="layers")


def test_a_budget_reads_back_as_it_was_written():
    assert str(Budget(params=0.5, size_mb="50%")) == "params=0.5, size_mb=50%"
    assert str(Budget(flops=7, of="model")) == "flops=7, of=model"
    assert str(Budget(latency_ms="50%", max_drop=0.01)) == "latency_ms=50%, max_drop=0.01"
    assert set(to_data(Budget(params=0.5))) == {*BUDGET_FIELDS, "of"}


# --- layers ----------------------------------------------------------------------------------------------------------


LINEAR = LayerSpec("a", "linear", 384, 1536, rows=32, calls=2)
CONV = LayerSpec(
    "c", "conv2d", 128, 256, rows=49, kernel_size=(3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 1), groups=4
)


def test_a_layer_counts_its_weight_and_its_operations():
    assert (LINEAR.fan_in, LINEAR.params, LINEAR.flops) == (384, 384 * 1536, 2 * 32 * 384 * 1536)
    assert (CONV.fan_in, CONV.params, CONV.flops) == (32 * 15, 256 * 480, 2 * 49 * 256 * 480)


def test_a_shape_reads_as_people_write_it():
    assert LINEAR.shape == "384 -> 1536"
    assert CONV.shape == "128 -> 256 (3x5, stride 2x1, groups 4)"
    dilated = dataclasses.replace(CONV, stride=(1, 1), groups=1, dilation=(2, 2))
    assert dilated.shape == "128 -> 256 (3x5, dilation 2x2)"


def capture_of(*layers):
    return Capture("observation", layers, 10, 40)


def test_a_fingerprint_depends_on_shapes_and_names_and_not_on_order_or_data():
    same = dataclasses.replace(LINEAR, rows=7, input_shape=(7, 384), blockers=("reason",), dtype="bfloat16")
    assert capture_of(LINEAR, CONV).fingerprint == capture_of(CONV, same).fingerprint
    for other in (
        dataclasses.replace(LINEAR, in_features=385),
        dataclasses.replace(LINEAR, name="b"),
        dataclasses.replace(LINEAR, kind="conv1d", kernel_size=(1,)),
    ):
        assert capture_of(other, CONV).fingerprint != capture_of(LINEAR, CONV).fingerprint


def test_costs_add_up():
    assert Cost(1, 2, 3) + Cost(10, 20, 30) == Cost(11, 22, 33)
    assert Cost(latency_ms=0.25) + Cost(1, latency_ms=0.5) == Cost(1, 0, 0, 0.75)


def test_a_target_holds_the_limits_that_were_given():
    target = Target(params=10, size_bytes=0)
    assert target.limits() == {"params": 10, "size_bytes": 0}
    assert target.is_met_by(Cost(10, 10**9, 0))
    assert not target.is_met_by(Cost(11, 0, 0))
    assert not target.is_met_by(Cost(10, 0, 1))
    assert Target().is_met_by(Cost(10**9, 10**9, 10**9, 1e9))


def test_the_tighter_of_two_limits_on_bytes_counts():
    assert Target(size_bytes=10, weight_bytes=7).limits() == {"size_bytes": 7}
    assert Target(size_bytes=6, weight_bytes=7).limits() == {"size_bytes": 6}
    assert Target(weight_bytes=7).limits() == {"size_bytes": 7}


def test_what_only_the_whole_tells_is_no_limit_on_the_layers():
    target = Target(file_bytes=1, model_latency_ms=1.0, latency_share=0.5, peak_memory_bytes=1, max_drop=0.0)
    assert target.limits() == {}
    assert Target(latency_ms=1.5).limits() == {"latency_ms": 1.5}
    assert Target(latency_ms=1.5).is_met_by(Cost(latency_ms=1.5))
    assert not Target(latency_ms=1.5).is_met_by(Cost(latency_ms=1.75))


def test_a_drop_is_compared_as_people_do():
    target = Target(max_drop=0.01)
    assert target.allows_drop(0.9, 0.89)  # 0.010000000000000009 in binary
    assert target.allows_drop(0.9, 0.95) and not target.allows_drop(0.9, 0.8899)
    assert not target.allows_drop(0.9, math.nan)
    assert Target(max_drop=0.0).allows_drop(1e12 + 0.1, 1e12 + 0.1) and Target().allows_drop(1.0, -1.0)


# --- plans -----------------------------------------------------------------------------------------------------------


def plan_of(*choices, capture=None):
    return Plan(choices, capture.fingerprint if capture else "", "uniform", "params=0.5", 3)


SKETCHED = Choice("a", "linear", (16,), error=0.125, cost=Cost(1, 2, 4))
TIMED = Choice("b", "linear", (8,), cost=Cost(1, 2, 4, 0.1))
TUCKER = Choice("c", "tucker2", (8, 24), error=0.5, cost=Cost(3, 4, 12))
DENSE = Choice("d", cost=Cost(5, 6, 20), reason="no rank pays")


def test_a_plan_survives_json_exactly():
    plan = plan_of(SKETCHED, TUCKER, DENSE, capture=capture_of(LINEAR, CONV))
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again["c"].ranks == (8, 24) and isinstance(again["c"].cost, Cost)
    assert again.to_json() == plan.to_json()
    assert Plan.from_json(plan_of(TIMED).to_json())["b"].cost.latency_ms == 0.1


def test_an_edited_plan_is_read_as_edited():
    data = json.loads(plan_of(SKETCHED, DENSE).to_json())
    data["choices"][0]["ranks"] = [24]
    assert Plan.from_json(json.dumps(data))["a"].ranks == (24,)


def test_a_plan_knows_its_choices():
    plan = plan_of(SKETCHED, TUCKER, DENSE)
    assert plan.sketched == (SKETCHED, TUCKER)
    assert plan.cost == Cost(9, 12, 36)
    assert plan["d"].is_dense
    with pytest.raises(KeyError):
        plan["missing"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        "{",
        "[]",
        "5",
        "null",
        '"text"',
        "{}",
        '{"panther_plan": 1}',
        '{"panther_plan": 1, "choices": [{}]}',
        '{"panther_plan": 1, "choices": [5]}',
        '{"panther_plan": 1, "choices": 5}',
        '{"panther_plan": 1, "choices": [], "unknown": 1}',
        '{"panther_plan": 1, "choices": [{"layer": "a", "ranks": ["x"], "cost": {}}]}',
        '{"panther_plan": 1, "choices": [{"layer": "a", "ranks": [8], "cost": {"unknown": 1}}]}',
        '{"panther_plan": 1, "choices": [{"layer": "a", "ranks": [8], "cost": {}, "unknown": 1}]}',
        "[" * 100_000,
    ],
)
def test_text_that_is_no_plan_is_refused(text):
    with pytest.raises(PlanError, match="not a panther plan"):
        Plan.from_json(text)


def test_a_half_written_plan_is_refused():
    text = plan_of(SKETCHED, TUCKER).to_json()
    for length in range(0, len(text) - 1, 7):
        with pytest.raises(PlanError, match="not a panther plan"):
            Plan.from_json(text[:length])


@pytest.mark.parametrize("version", [0, 3, "1", None])
def test_a_plan_of_another_version_says_which_is_read(version):
    data = {**json.loads(plan_of(SKETCHED).to_json()), "panther_plan": version}
    with pytest.raises(PlanError, match=r"of another version \(this panther reads versions 1 and 2\)"):
        Plan.from_json(json.dumps(data))


def test_a_plan_fits_the_model_that_it_was_made_for():
    capture = capture_of(LINEAR, dataclasses.replace(CONV, groups=1))
    plan_of(SKETCHED, TUCKER, DENSE, capture=capture).check_fits(capture)
    plan_of(SKETCHED).check_fits(capture)  # written by hand, without a fingerprint


def test_a_plan_for_other_layers_names_the_nearest():
    capture = capture_of(dataclasses.replace(LINEAR, name="encoder.layer.0.dense"))
    with pytest.raises(PlanError, match=r"'encoder.layers.0.dense', which .* nearest: encoder.layer.0.dense. A plan"):
        plan_of(dataclasses.replace(SKETCHED, layer="encoder.layers.0.dense")).check_fits(capture)
    with pytest.raises(PlanError, match="which this model does not have; nearest: none"):
        plan_of(dataclasses.replace(SKETCHED, layer="zzz")).check_fits(capture)


def test_a_plan_for_a_layer_that_stays_dense_says_why():
    capture = capture_of(dataclasses.replace(LINEAR, blockers=("tied to embed.weight", "excluded by exclude=")))
    with pytest.raises(PlanError, match=r"'a', which stays dense in this model: tied to embed\.weight; excluded"):
        plan_of(SKETCHED).check_fits(capture)


def test_a_plan_for_other_shapes_shows_both_fingerprints():
    capture, other = capture_of(LINEAR), capture_of(dataclasses.replace(LINEAR, out_features=7))
    with pytest.raises(
        PlanError, match=rf"another architecture .fingerprint {other.fingerprint}, this model"
    ) as caught:
        plan_of(SKETCHED, capture=other).check_fits(capture)
    assert capture.fingerprint in str(caught.value)


# --- reports ---------------------------------------------------------------------------------------------------------


def test_a_report_goes_to_json_as_plain_data():
    row = LayerReport("a", "linear", "4 -> 8", "linear", (2,), 1, 0.5, 0.25, Cost(1, 2, 3), Cost(1, 1, 1))
    figures = Figures(params=10, size_bytes=40, flops=7)
    limit = LimitReport("latency", 12.0, 11.5, "ms", met=True)
    report = Report(
        "keep half", True, "torch.fx", (row,), figures, figures, {"cosine": 0.9}, metric=(0.5, 0.25), limits=(limit,)
    )
    data = json.loads(report.to_json())
    assert data["layers"][0]["ranks"] == [2] and data["layers"][0]["after"] == {
        "params": 1,
        "flops": 1,
        "size_bytes": 1,
        "latency_ms": 0.0,
    }
    assert data["limits"] == [{"name": "latency", "limit": 12.0, "got": 11.5, "unit": "ms", "met": True}]
    assert data["agreement"] == {"cosine": 0.9} and data["metric"] == [0.5, 0.25]
    assert data["dense"]["latency_ms"] is None and data["budget_met"] is True


def strictly(text):
    """JSON as parsers other than Python's read it, to which NaN is no number."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_strict_json():
    figures = Figures(params=10, size_bytes=40, flops=7)
    healing = Healed(1.0, 0, math.nan, math.nan, ((0.5, "before", math.nan),))
    report = Report("", True, "", (), figures, figures, {"relative_error": math.inf}, healing=healing)
    data = strictly(report.to_json())
    assert data["healing"]["before"] == "nan" and data["healing"]["history"] == [[0.5, "before", "nan"]]
    assert data["agreement"] == {"relative_error": "inf"} and to_data(-math.inf) == "-inf"


def test_a_tuning_is_read_back_from_its_data():
    trials = (
        TrialReport(0, "given", -math.inf, 0.5, 0.1, {"floor": 1.0}),
        TrialReport(1, "gp", None, 0.4, 0.1, {}, "x"),
    )
    tuning = Tuning("eval_fn", (-math.inf, 0.5), (None, 0.4), trials, "timeout", 1.0, 0.5, is_smallest=True)
    assert Tuning.from_data(strictly(json.dumps(to_data(tuning)))) == tuning


def test_a_plan_whose_error_is_not_finite_is_read_back():
    plan = plan_of(dataclasses.replace(SKETCHED, error=math.inf, cost=Cost(1, 2, 3, math.inf)))
    strictly(plan.to_json())
    assert Plan.from_json(plan.to_json()) == plan


def test_to_data_leaves_plain_values_and_makes_keys_text():
    assert to_data({1: (2, [Cost(1)]), "x": None}) == {
        "1": [2, [{"params": 1, "flops": 0, "size_bytes": 0, "latency_ms": 0.0}]],
        "x": None,
    }


def test_plans_of_the_first_version_say_the_dtype_of_floats_which_is_the_layers_own() -> None:
    rows = [
        Choice("a", "linear", (8,), "pivoted", "bfloat16"),
        Choice("b", "linear", (8,), "two_gemm", "float16"),
        Choice("c", "linear", (8,), "quantised", "int8"),
    ]
    old = {**json.loads(Plan(tuple(rows)).to_json()), "panther_plan": 1}
    read = Plan.from_json(json.dumps(old))
    assert [choice.grid for choice in read.choices] == [None, None, read.choices[2].grid]
    assert str(read.choices[2].grid) == "int8"
    new = Plan.from_json(Plan(tuple(rows)).to_json())
    assert [str(choice.grid) for choice in new.choices] == ["bfloat16", "None", "int8"]
