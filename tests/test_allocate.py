from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from panther.allocate import allocate, dense_total, in_file, is_met, millions, resolve, with_layer_latency
from panther.allocators.base import total
from panther.compress import compress
from panther.spec import Budget, Capture, Choice, Cost, LayerSpec, Measured, Plan, Target

LAYERS = (
    LayerSpec("first", "linear", 100, 200, rows=10),
    LayerSpec("second", "linear", 20, 1000, rows=10, has_bias=False),
    LayerSpec("tied", "linear", 100, 1000, rows=10, blockers=("tied to embed.weight",)),
)
SKETCHABLE = 40_000  # weights of the first two
WHOLE = 150_000
FILE = 4 * WHOLE + 400  # with its header
CAPTURE = Capture("torch.export", LAYERS, model_params=WHOLE, model_bytes=FILE)
FLOAT32 = {"first": 4, "second": 4}


def target(**fields: Any) -> Target:
    return resolve(Budget(**fields), CAPTURE, FLOAT32)


# Budgets worked out


@pytest.mark.parametrize("size_mb", [0.0925, 0.091, 0.0895, "99%", "97%"])
def test_a_file_whose_layers_hold_their_limit_is_within_the_budget(size_mb: Any, tmp_path: Path) -> None:
    """Also where the header is a large part of it, and a layer gains a bias."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 24, 3, bias=False), nn.BatchNorm2d(24), nn.Flatten(), nn.Linear(24, 64, bias=False)]
    model = nn.Sequential(*body, *(nn.BatchNorm1d(64) for _ in range(60))).eval()
    inputs = torch.randn(64, 3, 3, 3)
    result = compress(
        model, Budget(size_mb=size_mb), example_inputs=inputs, calib_data=inputs, progress=False, verify=False
    )
    size = (result.save(tmp_path / "m") / "model.safetensors").stat().st_size
    dense = result.report.dense.size_bytes
    limit = int(float(size_mb) * 1e6) if isinstance(size_mb, float) else int(dense * float(size_mb[:-1]) / 100)
    assert result.budget_met and size <= result.target.file_bytes == limit < dense
    assert result.target.is_met_by(result.plan.cost)


def test_the_dense_total_counts_what_can_be_sketched() -> None:
    assert dense_total(CAPTURE.sketchable, FLOAT32) == Cost(SKETCHABLE, 2 * 10 * SKETCHABLE, 4 * SKETCHABLE)
    assert dense_total(CAPTURE.sketchable, {"first": 2, "second": 4}).size_bytes == 2 * 20_000 + 4 * 20_000


@pytest.mark.parametrize(
    ("budget", "params"), [(0.5, 20_000), ("25%", 10_000), (1.0, 40_000), (12_345, 12_345), (1, 1)]
)
def test_a_fraction_counts_the_sketchable_weights_and_an_int_is_absolute(budget: Any, params: int) -> None:
    assert target(params=budget).limits() == {"params": params}


def test_of_the_whole_model_leaves_less_for_the_sketchable_weights() -> None:
    rest = WHOLE - SKETCHABLE
    assert target(params=0.9, of="model").params == 135_000 - rest
    assert target(params=140_000, of="model").params == 140_000 - rest


def test_a_model_whose_other_parts_are_too_large_has_nothing_left_and_says_so() -> None:
    found = target(params=0.5, of="model")
    assert found.params is not None and found.params < 0
    assert not found.is_met_by(Cost(1, 1, 1))
    assert found.text.startswith("keep 0 of 40 k sketchable weights")


def test_flops_are_those_of_the_sketchable_layers() -> None:
    assert target(flops=0.5).limits() == {"flops": 400_000}
    assert target(flops=123).limits() == {"flops": 123}


def test_megabytes_are_those_of_the_whole_file_with_its_header() -> None:
    found = target(size_mb=0.55)
    assert found.file_bytes == 550_000 and found.size_bytes is not None
    assert found.size_bytes == 550_000 - (FILE - 4 * SKETCHABLE)  # what stays, with the header as it is


def test_a_percentage_of_the_file_is_a_percentage_of_the_dense_file() -> None:
    found = target(size_mb="80%")
    assert found.file_bytes == int(0.8 * FILE) and found.size_bytes is not None
    assert found.size_bytes + FILE - 4 * SKETCHABLE == int(0.8 * FILE)


def test_the_bytes_of_an_option_are_those_by_which_the_file_grows() -> None:
    """first is 100 -> 200 with a bias, second 20 -> 1000 without; `dense` has its entry in the header already."""
    cost = Cost(10, 10, 40)
    forms = [
        Choice("second", "linear", (1,), cost=cost),
        Choice("second", "whole", (), "quantised", "int8", cost=cost),
        Choice("second", "corrected", (8,), "quantised", "int4", cost=cost),
        Choice("second", packing="dense", cost=cost),
    ]
    grown = [choice.cost.size_bytes - 40 for choice in in_file({"second": forms}, CAPTURE)["second"]]
    linear, whole, corrected, dense = grown  # two tensors more, one, five (of two of which names are longer), none
    assert dense == 0 and 60 < whole < linear < 2 * whole < 4 * whole < corrected < 6 * whole
    (first,) = in_file({"first": [Choice("first", "linear", (1,), cost=cost)]}, CAPTURE)["first"]
    assert 40 < first.cost.size_bytes - 40 < grown[0]


def test_several_limits_all_hold() -> None:
    found = target(params=0.5, flops=0.25)
    assert found.limits() == {"params": 20_000, "flops": 200_000}
    assert found.is_met_by(Cost(20_000, 200_000, 10**9))
    assert not found.is_met_by(Cost(20_001, 200_000)) and not found.is_met_by(Cost(1, 200_001))


def test_the_text_says_what_remains_in_both_scopes() -> None:
    text = target(params=0.5, flops=0.5, size_mb=0.6).text
    assert "keep 20 k of 40 k sketchable weights; 130 k of 150 k in the whole model" in text
    assert "keep 0.0004 of 0.0008 GFLOPs of the sketchable layers" in text
    assert "save at most 0.6 of 0.6 MB; 0.16 of 0.16 MB in sketchable weights" in text


MEASURED = Measured(latency_ms=20.0, peak_memory_bytes=1_000_000, metric=0.9)


def measured_target(**fields: Any) -> Target:
    return resolve(Budget(**fields), CAPTURE, FLOAT32, MEASURED)


def test_milliseconds_are_those_of_the_whole_model_and_the_layers_must_save_what_is_missing() -> None:
    found = measured_target(latency_ms=12.0)
    assert (found.model_latency_ms, found.latency_share, found.latency_ms) == (12.0, None, None)
    assert found.limits() == {} and found.text == "run in at most 12 of 20 ms"
    # The layers take 15 of the 20 ms, and 8 must go.
    assert with_layer_latency(found, 15.0, 20.0).limits() == {"latency_ms": 7.0}
    assert with_layer_latency(found, 6.0, 20.0).latency_ms == -2.0  # not even without the layers
    assert with_layer_latency(target(params=0.5), 15.0, 20.0) == target(params=0.5)


def test_a_percentage_of_the_latency_is_one_of_the_dense_model_beside_it() -> None:
    found = measured_target(latency_ms="60%")
    assert found.model_latency_ms == 12.0 and found.latency_share == 0.6
    assert found.text == "run in at most 12 of 20 ms, 0.6 of what the dense model takes"


@pytest.mark.parametrize("memory", [0.9, "90%"])
def test_memory_that_is_to_be_saved_is_saved_in_weights(memory: Any) -> None:
    found = measured_target(peak_memory_mb=memory)
    assert found.peak_memory_bytes == 900_000
    assert found.limits() == {"size_bytes": 4 * SKETCHABLE - 100_000}
    assert found.text == "need at most 0.9 of 1 MB of memory"


def test_a_file_and_memory_are_limited_each_for_itself() -> None:
    found = measured_target(peak_memory_mb=0.95, size_mb=0.55)
    assert found.weight_bytes == 4 * SKETCHABLE - 50_000 and found.size_bytes is not None
    assert found.limits() == {"size_bytes": min(found.size_bytes, found.weight_bytes)}
    assert found.file_bytes == 550_000 and found.peak_memory_bytes == 950_000


def test_a_drop_limits_no_layer_and_is_said_in_the_metrics_own_unit() -> None:
    found = measured_target(max_drop=0.02)
    assert found.max_drop == 0.02 and found.limits() == {}
    assert found.text == "lose at most 0.02 of eval_fn, which stays at 0.88 or more of 0.9"


def test_every_limit_is_in_the_text() -> None:
    found = measured_target(params=0.5, flops=0.5, size_mb=0.6, latency_ms="50%", peak_memory_mb=0.9, max_drop=0.1)
    parts = found.text.split("; ")
    starts = ("keep 20 k of", "130 k of", "keep 0.0004", "save at most", "0.16 of", "run in", "need at", "lose at")
    assert len(parts) == len(starts)
    assert all(part.startswith(start) for part, start in zip(parts, starts, strict=True))


@pytest.mark.parametrize(
    ("count", "text"),
    [(5_412_345, "5.41 M"), (740_000, "740 k"), (12, "12"), (0, "0"), (1_500_000_000, "1.5 G"), (-2_000, "-2 k")],
)
def test_counts_read_as_people_say_them(count: int, text: str) -> None:
    assert millions(count) == text


# Plans


def options() -> dict[str, list[Choice]]:
    return {
        name: [
            *(Choice(name, "linear", (r,), error=1 / (r + 1), cost=Cost(r, r, 4 * r)) for r in (1, 2, 3)),
            Choice(name, packing="dense", cost=Cost(10, 10, 40)),
        ]
        for name in ("first", "second")
    }


def plan_of(search: Any, limit: int = 5, **more: Any) -> Plan:
    return allocate(
        options(),
        Target(params=limit),
        CAPTURE,
        search=search,
        divergence=lambda layer, error: error,
        evaluate=None,
        budget="params=0.5",
        seed=3,
        **more,
    )


@pytest.mark.parametrize("search", ["uniform", "sensitivity"])
def test_a_plan_says_what_it_was_made_for_and_by_what(search: str) -> None:
    plan = plan_of(search)
    assert (plan.allocator, plan.budget, plan.seed) == (search, "params=0.5", 3)
    assert plan.fingerprint == CAPTURE.fingerprint
    assert plan.cost.params <= 5 and is_met(plan, Target(params=5))
    assert Plan.from_json(plan.to_json()) == plan


def test_what_stays_dense_has_a_reason() -> None:
    plan = plan_of("uniform", limit=20)
    assert all(choice.is_dense and "budget allows it" in choice.reason for choice in plan.choices)


def test_an_allocator_of_the_users_own_is_called_with_everything() -> None:
    seen: dict[str, Any] = {}

    def mine(given: Any, wanted: Target, *, divergence: Any, evaluate: Any) -> Sequence[Choice]:
        seen.update(options=given, target=wanted, divergence=divergence("first", 0.25), evaluate=evaluate)
        return [choices[0] for choices in given.values()]

    plan = plan_of(mine)
    assert plan.allocator == "mine" and [c.ranks for c in plan.choices] == [(1,), (1,)]
    assert seen == {"options": options(), "target": Target(params=5), "divergence": 0.25, "evaluate": None}


def test_an_allocator_without_a_name_is_custom() -> None:
    class Mine:
        def __call__(self, given: Any, wanted: Target, **_: Any) -> list[Choice]:
            return [choices[-1] for choices in given.values()]

    assert plan_of(Mine()).allocator == "custom"


@pytest.mark.parametrize(
    "answer",
    [
        lambda given: [given["first"][0]],
        lambda given: [given["first"][0], given["first"][1]],
        lambda given: [given["first"][0], given["first"][0], given["second"][0]],
        lambda given: [given["first"][0], Choice("third", "linear", (1,))],
    ],
    ids=["one left out", "one twice", "one too often", "one unknown"],
)
def test_an_allocator_that_does_not_answer_for_every_layer_is_refused(answer: Any) -> None:
    with pytest.raises(ValueError, match=r"answered for \d layers.*2 were asked: return one Choice for each layer"):
        plan_of(lambda given, wanted, **_: answer(given))


def test_an_allocator_that_invents_a_rank_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"'first' scheme 'linear' at ranks \(7,\) in packing 'two_gemm', which is none"
    ):
        plan_of(lambda given, wanted, **_: [Choice("first", "linear", (7,)), given["second"][0]])


def test_limits_that_nothing_meets_give_a_plan_that_says_so() -> None:
    plan = plan_of("sensitivity", limit=1)
    assert not is_met(plan, Target(params=1)) and total(plan.choices).params == 2
