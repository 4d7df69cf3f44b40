"""search="tuned": plans tried on the whole model, from the sensitivity plan on, and the same search driven by hand."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import panther
from panther.allocators.base import total
from panther.allocators.sensitivity import sensitivity
from panther.allocators.tuned import (
    BEYOND,
    Problem,
    Search,
    Smallest,
    finer,
    key_of,
    parts_of,
    plan_of,
    problem_of,
    roles_of,
    space_of,
    starting_points,
    tune,
    weight_of,
    with_groups,
)
from panther.allocators.uniform import uniform
from panther.errors import JournalError, PlanError
from panther.healers.checkpoint import Checkpoint
from panther.spec import Choice, Cost, Plan, Target, Tuning
from panther.trials import trials_file
from panther.tuner import SkAutoTuner
from panther.tuner.trial import Trial
from panther.tuning import ModelTuner

tuned = import_module("panther.allocators.tuned")  # the name in the package is the function


@pytest.fixture(autouse=True)
def _quick_suggestions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here holds whoever thinks of the points."""
    monkeypatch.setattr(tuned, "STRATEGY", "random")


# --- knobs and groups, on layers that are a formula ------------------------------------------------------------------

BERT = (
    "embeddings.project",
    *(
        f"encoder.layer.{block}.{part}"
        for block in range(4)
        for part in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    ),
    "pooler.dense",
)


def options_of(layers: Sequence[str], scheme: str = "linear", ranks: int = 12) -> dict[str, list[Choice]]:
    """Every layer at `ranks` ranks, losing (1 - kept) ** 2."""
    rng, options = random.Random(0), {}
    for layer in layers:
        size = rng.randint(600, 3000)
        parts = [rank / (ranks + 1) for rank in range(1, ranks + 1)]
        choices = [
            Choice(layer, scheme, (rank,), error=(1 - part) ** 2, cost=Cost(int(part * size), int(part * size)))
            for rank, part in enumerate(parts, 1)
        ]
        options[layer] = [*choices, Choice(layer, cost=Cost(size, size))]
    return options


def problem(layers: Sequence[str] = BERT, kept: float = 0.5, **more: Any) -> Problem:
    options = options_of(layers, **more)
    dense = total([choices[-1] for choices in options.values()]).params
    return problem_of(options, Target(params=int(kept * dense)), lambda _, error: error)


def start_of(of: Problem) -> list[Choice]:
    return sensitivity(
        of.options, of.target, divergence=of.divergence, evaluate=lambda plan: sum(c.error for c in plan)
    )


def hidden(of: Problem, seed: int = 0) -> Callable[[Sequence[Choice]], float]:
    """A score that weighs roles of layers as nobody predicted."""
    rng = random.Random(seed)
    weights = {role: 2 ** rng.uniform(-3, 3) for role in ("query", "dense", "attention", "intermediate", "project")}

    def score(choices: Sequence[Choice]) -> float:
        return -sum(
            choice.error * math.prod(weight for role, weight in weights.items() if role in choice.layer)
            for choice in choices
        )

    return score


def test_groups_are_kinds_but_for_the_largest_and_the_ends() -> None:
    groups = problem().groups
    assert set(groups) == {"attention", "linear", "first", "last"} or set(groups) == {"mlp", "linear", "first", "last"}
    assert groups["first"] == ("embeddings.project",) and groups["last"] == ("pooler.dense",)


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        ("encoder.layer.0.attention.self.query", "attention"),
        ("encoder.layer.0.attention.output.dense", "attention"),
        ("encoder.layer.0.output.dense", "mlp"),
        ("encoder.layer.0.intermediate.dense", "mlp"),
        ("decoder.blocks.1.self_attn.out_proj", "attention"),
        ("model.layers.3.mlp.gate_proj", "mlp"),
        ("layers.0.linear1", "mlp"),
        ("transformer.h.0.attn.c_proj", "attention"),
        ("transformer.h.0.mlp.c_fc", "mlp"),
        ("classifier", "linear"),
        ("features.3", "linear"),
    ],
)
def test_kinds_are_known_by_the_names_that_people_give(layer: str, kind: str) -> None:
    assert tuned._kind(layer, options_of([layer])[layer]) == kind


def test_convolutions_are_told_from_linear_layers_by_their_schemes() -> None:
    convolutions = options_of(["features.0", "features.3", "features.6"], "spatial")
    of = problem_of({**convolutions, **options_of(["head"])}, Target(params=3000), lambda _, error: error)
    assert of.groups["last"] == ("head",) and "convolutions" not in of.groups


def test_one_layer_has_no_groups_and_two_have_one() -> None:
    assert problem(["only"]).groups == {}
    assert list(problem(["a.0", "a.1"]).groups) == ["first"]
    assert "depth" not in space_of(problem(["a.0", "a.1", "a.2"])).parameters
    assert "depth" in space_of(problem([f"a.{i}" for i in range(4)])).parameters


def test_layers_that_cannot_be_sketched_are_in_no_group() -> None:
    options = {**options_of(["a.0", "a.1"]), "dense": [Choice("dense", cost=Cost(10, 10))]}
    of = problem_of(options, Target(params=1500), lambda _, error: error)
    assert all("dense" not in layers for layers in of.groups.values())
    assert plan_of(of, {"first": 1.0})[-1].is_dense


def test_a_floor_of_one_is_the_uniform_plan() -> None:
    of = problem()
    even = uniform(of.options, of.target, divergence=of.divergence, evaluate=None)
    assert plan_of(of, {"floor": 1.0, "power": 0.3, "attention": 2.0}) == even


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.8])
def test_the_sensitivity_plan_is_one_of_the_points(kept: float) -> None:
    of = problem(kept=kept)
    (params, start), (even, _) = starting_points(of, start_of(of))
    assert plan_of(of, params) == list(start) == start_of(of)
    assert even["floor"] == 1.0 and space_of(of).contains(params)


def test_what_a_group_is_worth_is_what_it_gets() -> None:
    of = problem()
    attention = [layer for layer in of.options if "attention" in layer]
    name = "attention" if "attention" in of.groups else "mlp"
    sign = 1 if name == "attention" else -1

    def kept(worth: float) -> int:
        plan = {c.layer: c for c in plan_of(of, {"floor": 0.2, "power": 1.0, name: sign * worth})}
        return sum(plan[layer].cost.params for layer in attention)

    assert kept(-3) < kept(0) < kept(3)


def test_a_slope_moves_weights_to_the_end() -> None:
    of = problem()
    layers = list(of.places)
    steep = {c.layer: c.cost.params for c in plan_of(of, {"floor": 0.2, "depth": 3.0})}
    flat = {c.layer: c.cost.params for c in plan_of(of, {"floor": 0.2})}
    assert steep[layers[0]] <= flat[layers[0]] and steep[layers[-1]] >= flat[layers[-1]] and steep != flat
    assert weight_of(of, {"depth": 3.0}, layers[0]) == -1.5 and weight_of(of, {"depth": 3.0}, layers[-1]) == 1.5


def test_every_point_of_the_box_is_a_plan_within_the_limits() -> None:
    of = problem(kept=0.4)
    rng, space = import_module("numpy").random.default_rng(0), space_of(of)
    for _ in range(40):
        assert of.target.is_met_by(total(plan_of(of, space.sample(rng))))


def test_kept_takes_the_place_of_the_target() -> None:
    of = problem(kept=0.9)
    dense = total([choices[-1] for choices in of.options.values()]).params
    for kept in (0.3, 0.6):
        share = total(plan_of(of, {"kept": kept})).params / dense
        assert kept - 0.1 < share <= kept


def test_roles_are_names_without_their_numbers() -> None:
    roles = roles_of(problem())
    assert roles["encoder.layer.*.output.dense"] == tuple(f"encoder.layer.{i}.output.dense" for i in range(4))
    assert "pooler.dense" not in roles  # it is "last" already


def test_where_all_names_are_alike_each_layer_is_a_group() -> None:
    of = problem([f"features.{i}" for i in range(5)])
    assert set(roles_of(of)) == {f"layer features.{i}" for i in (1, 2, 3)}


def test_parts_are_roles_blocks_and_layers_each_once_and_none_that_is_a_group_already() -> None:
    of = problem()
    parts = parts_of(of)
    assert {"encoder.layer.*.output.dense", "block encoder.layer.1", "layer encoder.layer.1.output.dense"} <= set(parts)
    assert len(set(parts.values())) == len(parts) and not set(parts.values()) & set(of.groups.values())


def test_layers_named_like_knobs_are_no_knobs() -> None:
    of = problem(["first", "last", "depth", "floor", "power"])
    split = with_groups(of, parts_of(of))
    assert split.groups["first"] == ("first",) and split.groups["layer depth"] == ("depth",)
    assert not {"floor", "power", "depth"} & set(split.groups)


def test_the_group_that_the_scores_followed_comes_first() -> None:
    of = problem([f"features.{i}" for i in range(30)])
    of = with_groups(of, ["layer features.7"])
    moved = [
        Trial(i, {"layer features.7": value}, scores={"score": -value}) for i, value in enumerate((0.0, 1.0, -1.0, 2.0))
    ]
    split = finer(replace(of, groups={}), [])
    assert len(split.groups) == tuned.FINER  # without trials: the largest
    ranked = finer(of, [tuned.Tried(trial, ()) for trial in moved])
    assert {"layer features.7"} < set(ranked.groups) and len(ranked.groups) == len(of.groups) + tuned.FINER


# --- the search ------------------------------------------------------------------------------------------------------


def searched(of: Problem, score: Callable[[Sequence[Choice]], float], **options: Any) -> Search:
    return tune(of, start_of(of), score, **{"trials": 20, **options})


@pytest.mark.parametrize("strategy", ["random", "tpe", "auto"])
def test_the_search_beats_the_sensitivity_plan_where_that_believes_wrong(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned, "STRATEGY", strategy)
    of = problem(kept=0.4)
    score = hidden(of)
    search = searched(of, score, trials=24)
    gain = 1 - score(search.best.choices) / score(start_of(of))
    assert gain > (0.05 if strategy == "auto" else 0.0)
    assert search.best.trial.scores["score"] == max(one.trial.scores["score"] for one in search.tried)


def test_the_first_trial_is_the_sensitivity_plan_and_the_second_the_uniform_one() -> None:
    of = problem()
    search = searched(of, hidden(of), trials=5)
    assert [one.trial.phase for one in search.tried[:2]] == ["given", "given"]
    assert list(search.tried[0].choices) == start_of(of)
    assert search.tried[1].trial.params["floor"] == 1.0


@pytest.mark.parametrize("trials", [1, 2, 3, 10])
def test_as_many_plans_are_scored_as_were_asked_for_and_none_twice(trials: int) -> None:
    of, scored = problem(), []
    search = searched(of, lambda plan: scored.append(key_of(plan)) or -1.0, trials=trials)  # type: ignore[func-returns-value]
    assert len(scored) == len(set(scored)) == trials
    assert search.stopped_by == "trials" and len(search.tried) == trials


def test_global_knobs_come_first_and_finer_groups_after() -> None:
    of = problem()
    phases = [one.trial.phase.startswith("finer") for one in searched(of, hidden(of), trials=20).tried]
    assert phases == sorted(phases) and 5 < sum(phases) < 10


def test_the_second_stage_begins_at_the_best_of_the_first() -> None:
    of = problem()
    search = searched(of, hidden(of), trials=20)
    coarse = [one for one in search.tried if not one.trial.phase.startswith("finer")]
    best = max(coarse, key=lambda one: one.trial.scores["score"]).trial.params
    for one in search.tried[len(coarse) :]:
        assert {name: one.trial.params[name] for name in best} == best
        assert len(one.trial.params) == len(best) + tuned.FINER


def test_equal_scores_leave_the_sensitivity_plan() -> None:
    of = problem()
    assert list(searched(of, lambda _: 1.0).best.choices) == start_of(of)


def test_the_same_seed_tries_the_same_and_another_does_not() -> None:
    of = problem()
    runs = [[one.trial.params for one in searched(of, hidden(of), seed=seed).tried] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("bad", [math.nan, RuntimeError("diverged"), "two lines\nof text"])
def test_scores_that_fail_cost_their_trial_only(bad: Any) -> None:
    of, calls = problem(), []
    score = hidden(of)

    def sometimes(plan: Sequence[Choice]) -> float:
        calls.append(plan)
        if len(calls) % 3 == 0:
            if isinstance(bad, float):
                return bad
            raise bad if isinstance(bad, Exception) else ValueError(bad)
        return score(plan)

    search = searched(of, sometimes, trials=12)
    failed = [one.trial for one in search.tried if one.trial.status == "failed"]
    assert len(search.tried) == 12 and len(failed) == 4
    assert all(trial.error and "\n" not in trial.error and not trial.scores for trial in failed)
    assert search.best.trial.status == "ok"


def test_where_every_score_fails_the_sensitivity_plan_is_left() -> None:
    of = problem()
    search = searched(of, lambda _: math.nan, trials=6)
    assert list(search.best.choices) == start_of(of) and len(search.tried) == 6


def test_a_sensitivity_plan_that_fails_is_replaced_by_one_that_does_not() -> None:
    of = problem()
    first = key_of(start_of(of))
    search = searched(of, lambda plan: math.nan if key_of(plan) == first else -9.0, trials=6)
    assert key_of(search.best.choices) != first


def test_infinite_scores_are_scores() -> None:
    of, calls = problem(), []

    def score(plan: Sequence[Choice]) -> float:
        calls.append(plan)
        return -math.inf if len(calls) % 2 else 0.5

    assert searched(of, score, trials=8).best.trial.scores == {"score": 0.5}


@pytest.mark.parametrize("after", [1, 2, 7])
def test_an_interrupt_keeps_the_best(after: int) -> None:
    of, scores = problem(), []
    score = hidden(of)

    def interrupted(plan: Sequence[Choice]) -> float:
        if len(scores) == after - 1:
            raise KeyboardInterrupt
        scores.append(score(plan))
        return scores[-1]

    search = searched(of, interrupted)
    assert search.stopped_by == "interrupt"
    if scores:
        assert search.best.trial.scores["score"] == max(scores)
    else:
        assert list(search.best.choices) == start_of(of)


def test_the_timeout_ends_it_after_the_trial_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(tuned.time, "monotonic", lambda: now[0])

    def slow(_: Sequence[Choice]) -> float:
        now[0] += 4.0
        return 1.0

    search = searched(problem(), slow, timeout=10.0)
    assert search.stopped_by == "timeout" and len(search.tried) == 3


def test_a_search_ends_when_every_plan_is_known() -> None:
    of = problem(["a"], ranks=3)
    search = searched(of, lambda plan: -plan[0].error)
    assert search.stopped_by == "nothing new" and len(search.tried) <= 4


def test_no_layer_is_no_search() -> None:
    assert tuned.tuned({}, Target(params=3), divergence=lambda *_: 0.0, evaluate=lambda _: 0.0) == []


def test_plans_beyond_the_limits_are_not_scored() -> None:
    of = problem(kept=0.5)
    even = key_of(plan_of(of, {"floor": 1.0}))
    tight = replace(of, target=replace(of.target, flops=1))  # nothing holds this
    scored = []
    search = searched(tight, lambda plan: scored.append(key_of(plan)) or 1.0, trials=9)  # type: ignore[func-returns-value]
    assert even not in scored[1:] and len(scored) == 1
    assert [one.trial.error for one in search.tried[1:]] in ([BEYOND], [""])


@pytest.mark.parametrize(
    ("killed", "strategy"), [(1, "random"), (2, "random"), (14, "random"), (16, "random"), (9, "auto")]
)
def test_a_resumed_search_goes_on_as_the_first_would_have(
    killed: int, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned, "STRATEGY", strategy)
    of = problem(BERT[:9])
    whole: list[Trial] = []
    first = searched(of, hidden(of), trials=16, tell=whole.append)
    written = [Trial.from_json(trial.to_json()) for trial in whole[:killed]]
    again: list[Trial] = []
    second = searched(problem(BERT[:9]), hidden(of), trials=16, resumed=written, tell=again.append)
    assert [trial.params for trial in written + again] == [trial.params for trial in whole]
    assert second.best.choices == first.best.choices


# The smallest plan that holds a score


def smallest(of: Problem, score: Callable[[Sequence[Choice]], float], drop: float, **options: Any) -> Search:
    start = plan_of(of, {"floor": 0.5, "kept": 0.7})
    wanted = Smallest(0.0, drop)
    assert score(start) >= -drop
    return tune(of, start, score, smallest=wanted, given=[(start, score(start))], **{"trials": 24, **options})


@pytest.mark.parametrize("strategy", ["random", "tpe"])
def test_the_smallest_plan_holds_the_score_and_is_smaller(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "STRATEGY", strategy)
    of = replace(problem(kept=0.7), target=Target())
    score = hidden(of)
    drop = -1.05 * score(plan_of(of, {"floor": 0.5, "kept": 0.7}))
    search = smallest(of, score, drop)
    start, best = search.tried[0], search.best
    assert score(best.choices) >= -drop
    assert total(best.choices).params < total(start.choices).params
    holding = [one for one in search.tried if one.trial.status == "ok"]
    assert all(total(best.choices).params <= total(one.choices).params for one in holding)
    assert {one.trial.status for one in search.tried} <= {"ok", "infeasible"}


def test_no_plan_larger_than_one_that_holds_is_tried() -> None:
    of = replace(problem(kept=0.7), target=Target())
    search = smallest(of, lambda _: 0.0, 0.0, trials=8)
    sizes = [total(one.choices).params for one in search.tried if one.trial.phase != "given"]
    assert all(later < earlier for earlier, later in itertools.pairwise(sizes))


def test_where_no_smaller_plan_holds_the_known_one_is_left() -> None:
    of = replace(problem(kept=0.7), target=Target())
    start = key_of(plan_of(of, {"floor": 0.5, "kept": 0.7}))
    search = smallest(of, lambda plan: 0.0 if key_of(plan) == start else -1.0, 0.5, trials=6)
    assert key_of(search.best.choices) == start


# --- on models -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Four blocks whose singular values fall, so that ranks matter."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn": nn.Linear(width, width), "fc1": nn.Linear(width, 2 * width)}) for _ in range(4)
        )
        self.outputs = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(4))
        with torch.no_grad():
            for power, layer in enumerate(m for m in self.modules() if isinstance(m, nn.Linear)):
                u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)
                falling = s[0] / torch.arange(1, len(s) + 1) ** (0.2 + 0.1 * (power % 5))
                layer.weight.copy_((u * falling) @ v)

    def forward(self, x: Tensor) -> Tensor:
        for block, out in zip(self.blocks, self.outputs, strict=True):
            x = x + block["attn"](x)  # type: ignore[index]
            x = x + out(torch.relu(block["fc1"](x)))  # type: ignore[index]
        return x


INPUTS = torch.randn(48, 48, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


class Quality:
    """How near a model is to the dense one in the first eight outputs, and how often that was asked."""

    def __init__(self, dense: nn.Module) -> None:
        self.calls = 0
        with torch.no_grad():
            self.wanted = dense(INPUTS)[:, :8]
        self.scale = self.wanted.square().mean()

    def __call__(self, model: nn.Module) -> float:
        self.calls += 1
        with torch.no_grad():
            return 1 - float((model(INPUTS)[:, :8] - self.wanted).square().mean() / self.scale)


def compressed(model: nn.Module, budget: Any = 0.5, **options: Any) -> panther.Result:
    given = {"search": "tuned", "heal": "none", "progress": False, "verify": False, "n_trials": 8, **options}
    return panther.compress(
        model, budget, **{"example_inputs": INPUTS[:4], "calib_data": list(INPUTS.split(8)), **given}
    )


def test_compress_takes_the_best_of_the_trials(net: Net) -> None:
    quality = Quality(net)
    result = compressed(net, eval_fn=quality)
    tuning = result.report.tuning
    assert tuning is not None and tuning.objective == "eval_fn" and tuning.stopped_by == "trials"
    assert quality.calls == len(tuning.trials) == 8
    assert tuning.best[0] == max(trial.score for trial in tuning.trials)  # type: ignore[type-var]
    assert quality(result.model) == pytest.approx(tuning.best[0], abs=1e-4)
    assert result.budget_met and result.plan.allocator == "tuned"


@pytest.mark.parametrize("seed", range(3))
def test_the_result_is_never_worse_than_the_sensitivity_plan(net: Net, seed: int) -> None:
    quality = Quality(net)
    plain = quality(compressed(net, eval_fn=quality, search="sensitivity", n_trials=None, seed=seed).model)
    assert quality(compressed(net, eval_fn=quality, seed=seed).model) >= plain - 1e-5  # packing rounds


def test_the_model_is_decomposed_once(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = import_module("panther.compress"), []
    real = module.decompose
    monkeypatch.setattr(module, "decompose", lambda *args, **more: calls.append(1) or real(*args, **more))
    compressed(net, eval_fn=Quality(net))
    assert len(calls) == 12


def test_the_dense_model_is_untouched(net: Net) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    compressed(net, eval_fn=Quality(net))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_plan_keeps_its_knobs_and_makes_the_same_model_again(net: Net) -> None:
    result = compressed(net, eval_fn=Quality(net))
    read = Plan.from_json(result.plan.to_json())
    assert read == result.plan and set(read.knobs) >= {"floor", "power", "depth"}
    again = compressed(net, plan=read, search="sensitivity", n_trials=None)
    assert again.plan.choices == result.plan.choices and again.report.tuning is None


@pytest.mark.parametrize("knobs", [3, "floor", [1, 2]])
def test_knobs_that_are_no_mapping_are_no_plan(net: Net, knobs: Any) -> None:
    data = json.loads(compressed(net, eval_fn=Quality(net), n_trials=1).plan.to_json())
    with pytest.raises(PlanError, match="not a panther plan"):
        Plan.from_json(json.dumps({**data, "knobs": knobs}))
    data.pop("knobs")
    assert Plan.from_json(json.dumps(data)).knobs == {}


def test_without_eval_fn_the_divergence_decides_and_the_report_says_so(net: Net) -> None:
    result = compressed(net)
    tuning = result.report.tuning
    assert tuning is not None and tuning.objective == "divergence"
    assert all(trial.score is not None and trial.score <= 0 for trial in tuning.trials)
    assert tuning.best[0] >= tuning.start[0]  # type: ignore[operator]
    assert any(
        note.startswith("without eval_fn the tuned search went by the divergence") for note in result.report.notes
    )


def test_an_eval_fn_that_fails_now_and_then_does_not_end_the_run(net: Net) -> None:
    quality, calls = Quality(net), []

    def fragile(model: nn.Module) -> float:
        calls.append(1)
        if len(calls) in (2, 5):
            raise RuntimeError("out of luck")
        return math.nan if len(calls) == 4 else quality(model)

    result = compressed(net, eval_fn=fragile)
    assert any(
        "3 of 8 plans could not be scored, the last: RuntimeError: out of luck" in n for n in result.report.notes
    )
    rows = result.report.tuning.trials  # type: ignore[union-attr]
    assert [row.number for row in rows if row.score is None] == [1, 3, 4] and "nan" in rows[3].error


def test_an_eval_fn_that_answers_no_number_leaves_the_sensitivity_plan(net: Net) -> None:
    result = compressed(net, eval_fn=lambda _: "good")
    plain = compressed(net, search="sensitivity", n_trials=None)
    assert result.plan.choices == plain.plan.choices
    assert any("could not be scored" in note and "expected one number" in note for note in result.report.notes)


def test_ctrl_c_ends_the_search_and_not_the_run(net: Net) -> None:
    quality = Quality(net)

    def interrupted(model: nn.Module) -> float:
        if quality.calls == 4:
            quality.calls += 1
            raise KeyboardInterrupt
        return quality(model)

    result = compressed(net, eval_fn=interrupted, n_trials=20)
    assert len(result.report.tuning.trials) == 4  # type: ignore[union-attr]
    assert any("was ended by Ctrl-C after 4 plans" in note for note in result.report.notes)


def test_a_timeout_ends_the_search(net: Net) -> None:
    result = compressed(net, eval_fn=Quality(net), timeout=1e-9, n_trials=None)
    assert len(result.report.tuning.trials) == 1  # type: ignore[union-attr]
    assert any("was ended by its timeout after 1 plans" in note for note in result.report.notes)


def test_max_drop_alone_gives_the_smallest_model_that_holds_it(net: Net) -> None:
    quality = Quality(net)
    plain = compressed(net, {"max_drop": 0.05}, eval_fn=quality, search="sensitivity", n_trials=None)
    result = compressed(net, {"max_drop": 0.05}, eval_fn=quality, n_trials=24)
    tuning = result.report.tuning
    assert tuning is not None and tuning.is_smallest and result.budget_met
    assert result.plan.cost.params <= plain.plan.cost.params
    assert quality(result.model) >= 1 - 0.05 - 1e-6
    assert tuning.start[1] == pytest.approx(plain.plan.cost.params / sum(p.numel() for p in weights(net)))


def weights(model: nn.Module) -> list[Tensor]:
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear)]


def test_max_drop_beside_a_size_is_reported_and_the_score_is_what_counts(net: Net) -> None:
    quality = Quality(net)
    result = compressed(net, {"params": 0.3, "max_drop": 1e-9}, eval_fn=quality)
    assert not result.budget_met and result.report.tuning is not None and not result.report.tuning.is_smallest
    (drop,) = [limit for limit in result.report.limits if limit.name == "drop of eval_fn"]
    assert not drop.met and drop.got == pytest.approx(1 - result.report.tuning.best[0], abs=1e-4)  # type: ignore[operator]


@pytest.mark.parametrize("limit", ["latency_ms", "peak_memory_mb"])
def test_limits_on_the_whole_model_are_held_by_the_tuned_plan(
    net: Net, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("panther.verify"), "LATENCY_SECONDS", 0.05)
    result = compressed(net, {limit: "90%"}, eval_fn=Quality(net), n_trials=4)
    assert result.report.tuning is not None and len(result.report.limits) == 1
    if limit == "peak_memory_mb":  # which does not differ from run to run
        assert result.budget_met


def test_another_budget_is_tuned_anew(net: Net) -> None:
    quality = Quality(net)
    first = compressed(net, eval_fn=quality)
    second = first.resolve(0.3)
    assert second.budget_met and second.report.tuning != first.report.tuning
    assert second.plan.choices == compressed(net, 0.3, eval_fn=quality).plan.choices


# Killed and resumed


class KilledError(BaseException):
    """Stands for kill -9: nothing that the search catches."""


def test_a_killed_search_goes_on_where_it_was(net: Net, tmp_path: Path) -> None:
    quality, checkpoint = Quality(net), tmp_path / "run"
    whole = compressed(net, eval_fn=quality)

    def killed(model: nn.Module) -> float:
        if quality.calls == 5:
            raise KilledError
        return quality(model)

    quality.calls = 0
    with pytest.raises(KilledError):
        compressed(net, eval_fn=killed, checkpoint=checkpoint)
    with trials_file(checkpoint).open("ab") as file:
        file.write(b'{"number": 5, "par')  # the line that the kill cut
    result = compressed(net, eval_fn=quality, checkpoint=checkpoint)
    assert quality.calls == 8
    assert result.plan == whole.plan and not list(tmp_path.iterdir())
    rows = [(row.number, row.score, row.knobs) for row in result.report.tuning.trials]  # type: ignore[union-attr]
    assert rows == [(row.number, row.score, row.knobs) for row in whole.report.tuning.trials]  # type: ignore[union-attr]


def test_a_run_killed_while_healing_keeps_its_search(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run goes on with the plan of the first, and reports what the first tried."""
    quality = Quality(net)
    options: dict[str, Any] = {"heal": panther.Heal("distill", steps=8, time_limit=1e6), "checkpoint": tmp_path / "run"}

    def odd(model: nn.Module) -> float:
        return quality(model) if quality.calls != 3 else math.nan * quality(model)

    def killed(self: Checkpoint, *args: Any) -> None:
        save(self, *args)
        raise KilledError

    save = Checkpoint.save
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", killed)
        with pytest.raises(KilledError):
            compressed(net, eval_fn=odd, **options)
    assert quality.calls == 8
    result = compressed(net, eval_fn=odd, **options)
    assert quality.calls == 8 and result.report.healing is not None and not list(tmp_path.iterdir())
    quality.calls = 0
    whole = compressed(net, eval_fn=odd, **{**options, "checkpoint": None})
    assert result.plan == whole.plan and searched_in(result) == searched_in(whole)
    assert any("1 of 8 plans could not be scored" in note for note in result.report.notes)


def searched_in(result: panther.Result) -> Tuning:
    """What a search found, without the clock's part of it."""
    found = result.report.tuning
    assert found is not None
    return replace(found, seconds=0, outside=0, trials=tuple(replace(trial, seconds=0) for trial in found.trials))


def other_weights() -> Net:
    torch.manual_seed(1)
    return Net().eval()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"budget": 0.4}, "budget: "),
        ({"seed": 1}, "seed: "),
        ({"n_trials": 9}, "n_trials: "),
        ({"eval_fn": None}, "objective: "),
        ({"exclude": ["outputs.0"]}, "layers: "),
        ({"dtypes": ("float32", "int8")}, "dtypes: "),
        ({"calib_data": list(INPUTS.flip(0).split(8))}, "inputs: "),
        ({"calib_data": list(INPUTS.split(6))}, "batches: "),
        ({}, "weights of the dense model: "),
    ],
)
def test_the_trials_of_another_search_are_refused(
    net: Net, tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    checkpoint, quality = tmp_path / "run", Quality(net)
    model = net if changed else other_weights()

    def killed(model: nn.Module) -> float:
        if quality.calls == 2:
            raise KilledError
        return quality(model)

    with pytest.raises(KilledError):
        compressed(net, eval_fn=killed, checkpoint=checkpoint)
    with pytest.raises(JournalError, match=f"of another study: .*{words}"):
        compressed(model, **{"eval_fn": quality, "checkpoint": checkpoint, **changed})
    assert quality.calls == 2


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_trials": 0}, "n_trials=0: expected a number of plans"),
        ({"n_trials": 2.5}, "n_trials=2.5: expected"),
        ({"n_trials": True}, "n_trials=True: expected"),
        ({"timeout": 0}, "timeout=0: expected seconds, above 0"),
        ({"timeout": math.nan}, "timeout=nan: expected seconds"),
        ({"timeout": "1h"}, "timeout='1h': expected seconds"),
        ({"plan": Plan(())}, "search='tuned' is given beside a plan, which leaves nothing to search for: leave out"),
        (
            {"search": "sensitivity"},
            "n_trials and timeout belong to search=\"tuned\", and this is search='sensitivity'",
        ),
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused(net: Net, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        compressed(net, **options)


# --- driven by hand --------------------------------------------------------------------------------------------------


def driven(model: nn.Module, budget: Any = 0.5, **options: Any) -> ModelTuner:
    given = {"n_initial_points": 3, "n_iterations": 3, "strategy": "random", "verify": False, **options}
    tuner = SkAutoTuner.from_model(model, budget, example_inputs=INPUTS[:4], calib_data=list(INPUTS.split(8)), **given)
    assert isinstance(tuner, ModelTuner)
    return tuner


def test_from_model_gives_a_tuner_whose_trials_are_plans(net: Net) -> None:
    quality = Quality(net)
    tuner = driven(net, eval_fn=quality)
    params, score = tuner.optimize()
    assert [trial.phase for trial in tuner.trials[:2]] == ["given", "given"] and len(tuner.trials) == 6
    assert list(params) == ["floor", "power", "depth", "mlp", "linear", "first", "last"]
    assert score >= tuner.trials[0].scores["score"]
    result = tuner.result()
    assert quality(result.model) == pytest.approx(score, abs=1e-4)
    assert result.budget_met and result.plan.knobs == params and result.report.healing is None


def test_its_first_point_is_the_sensitivity_plan(net: Net) -> None:
    tuner = driven(net)
    tuner.optimize()
    plain = compressed(net, search="sensitivity", n_trials=None)
    assert tuner.plan(tuner.trials[0].params).choices == plain.plan.choices


def dense(tuner: Any) -> list[Choice]:
    """Every layer as large as it can be in the plans of a tuner."""
    return [options[-1] for options in tuner.problem.options.values()]


def test_any_parameters_have_a_result(net: Net) -> None:
    tuner = driven(net)
    even = tuner.result({"floor": 1.0})
    plain = compressed(net, search="sensitivity", n_trials=None)
    assert [choice.channels for choice in even.plan.choices] == [choice.channels for choice in plain.plan.choices]
    assert even.budget_met and even.plan.choices != plain.plan.choices
    shares = [
        choice.cost.params / full.cost.params for choice, full in zip(even.plan.choices, dense(tuner), strict=True)
    ]
    assert max(shares) - min(shares) < 0.25  # of what its channels leave of each layer: ranks come in steps
    with pytest.raises(ValueError, match=r"'flor' is no knob of this model, which has floor, power.*mean 'floor'"):
        tuner.plan({"flor": 1.0})
    with pytest.raises(panther.errors.TunerError):
        tuner.result()  # nothing was tried yet


def test_equal_plans_are_scored_once(net: Net) -> None:
    quality = Quality(net)
    tuner = driven(net, eval_fn=quality)
    tuner._objective.function(floor=1.0)
    tuner._objective.function(floor=1.0, power=0.5)
    assert quality.calls == 1


def test_several_goals_have_a_front(net: Net) -> None:
    quality = Quality(net)

    def both(model: nn.Module) -> dict[str, float]:
        return {"quality": quality(model), "rank": float(sum(getattr(m, "ranks", (0,))[0] for m in model.modules()))}

    tuner = driven(net, eval_fn=both, objectives={"quality": "max", "rank": "min"})
    params, scores = tuner.optimize()
    assert set(scores) == {"quality", "rank"} and tuner.pareto_front and tuner.plan(params).sketched  # type: ignore[arg-type]


def test_a_journal_goes_on_and_that_of_another_model_or_budget_is_refused(net: Net, tmp_path: Path) -> None:
    quality, journal = Quality(net), tmp_path / "journal"
    first = driven(net, eval_fn=quality, journal=journal)
    found = first.optimize()
    calls = quality.calls
    assert driven(net, eval_fn=quality, journal=journal).optimize() == found and quality.calls == calls
    for other, words in (
        (driven(net, 0.4, eval_fn=quality, journal=journal), "budget: "),
        (driven(other_weights(), eval_fn=quality, journal=journal), "weights of the dense model: "),
        (driven(net, journal=journal), "objective: "),
    ):
        with pytest.raises(JournalError, match=f"of another study: .*{words}"):
            other.optimize()
    assert quality.calls == calls


def test_finer_knobs_are_there_when_asked_for(net: Net) -> None:
    assert "blocks.*.attn" in driven(net, finer=True).space.parameters
    assert "blocks.*.attn" not in driven(net).space.parameters


@pytest.mark.parametrize("budget", [{"max_drop": 0.1}, {"latency_ms": "50%"}, {"peak_memory_mb": "50%"}])
def test_limits_that_only_the_whole_model_tells_are_refused(net: Net, budget: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is within it before it is evaluated"):
        driven(net, budget, eval_fn=Quality(net))
