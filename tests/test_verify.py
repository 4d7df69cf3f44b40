import copy
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from panther import verify as stage
from panther.batches import Call, as_call
from panther.capture import capture
from panther.chains import chain_cost
from panther.errors import CalibrationError
from panther.nn import SKConv2d, SKLinear
from panther.sizes import file_bytes
from panther.spec import Capture, Choice, Plan, Report, Target


class Encoder(nn.Module):
    """(batch, length) ids and a mask -> (batch, length, 8) tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.mix = nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.mix(self.embed(input_ids))


class Fixed(nn.Module):
    """Returns what it was made with, whatever comes in."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Any:
        return self.output


class Classifier(nn.Module):
    def __init__(self, head: str, after: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.body = nn.Linear(6, 16)
        self.add_module(head, nn.Linear(16, 4))
        self.head_name, self.after = head, after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(getattr(self, self.head_name)(self.body(x).relu()))


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 24, 3, padding=1)
        self.body = nn.Linear(24, 32)
        self.classifier = nn.Linear(32, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(self.conv(x).mean((2, 3))).relu())


X = as_call(torch.zeros(2, 6))


def fixed(dense: Any, compressed: Any) -> dict[str, float]:
    return stage.agreement(Fixed(dense), Fixed(compressed), [X])


@pytest.fixture
def pair() -> tuple[Pixels, Pixels, Capture, Call]:
    """A dense model, the same with two layers sketched at full rank / rank 4, what was captured, and inputs."""
    torch.manual_seed(0)
    dense = Pixels()
    compressed = copy.deepcopy(dense)
    compressed.conv = SKConv2d.from_dense(dense.conv, rank=4)
    compressed.body = SKLinear.from_dense(dense.body, rank=10, low_rank=2)
    call = as_call(torch.randn(5, 8, 6, 6))
    return dense, compressed, capture(dense, call), call


def plan_of(found: Capture) -> Plan:
    choices = {
        "conv": Choice("conv", "output_channel", (4,), error=0.25),
        "body": Choice("body", "linear", (10,), error=0.125),
        "classifier": Choice("classifier", reason="protected"),
    }
    return Plan(tuple(choices[spec.name] for spec in found.layers))


def whole(pair: tuple[Pixels, Pixels, Capture, Call], **changes: Any) -> Report:
    dense, compressed, found, call = pair
    given = {
        "capture": found,
        "plan": plan_of(found),
        "target": Target(params=10**6, text="keep a lot"),
        "example": call,
    }
    return stage.verify(dense, compressed, **{**given, **changes})


# agreement


def test_the_rows_compared_at_a_time_change_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, compressed = torch.randn(37, 10), torch.randn(37, 10)
    at_once = fixed(dense, compressed)
    for numbers in (1, 35, 100):  # single rows where not even one fits; three; ten with a rest of seven
        monkeypatch.setattr(stage, "NUMBERS_AT_ONCE", numbers)
        assert fixed(dense, compressed) == pytest.approx(at_once)


def test_a_model_agrees_fully_with_itself() -> None:
    model = Classifier("classifier")
    assert stage.agreement(model, model, [as_call(torch.randn(9, 6))]) == {
        "cosine": pytest.approx(1.0),
        "relative_error": 0.0,
        "top1": 1.0,
    }


def test_cosine_is_the_mean_over_rows_and_relative_error_is_over_everything() -> None:
    dense = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    compressed = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    found = fixed(dense, compressed)
    assert found["cosine"] == pytest.approx(0.5)
    assert found["relative_error"] == pytest.approx(math.sqrt(8 / 5))


def test_figures_are_summed_over_calls_of_different_sizes() -> None:
    model, other = Classifier("out"), Classifier("out")
    x = torch.randn(12, 6)
    parts = stage.agreement(model, other, [as_call(x[:5]), as_call(x[5:])])
    assert parts == pytest.approx(stage.agreement(model, other, [as_call(x)]))


def test_padded_tokens_do_not_count() -> None:
    dense = Encoder()
    compressed = copy.deepcopy(dense)
    with torch.no_grad():
        compressed.embed.weight[0] = -dense.embed.weight[0] + 3  # only padding uses token 0
    ids, mask = torch.tensor([[4, 5, 0], [6, 0, 0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    call = as_call({"input_ids": ids, "attention_mask": mask})
    assert stage.agreement(dense, compressed, [call])["relative_error"] == 0.0
    unmasked = as_call({"input_ids": ids, "attention_mask": torch.ones_like(mask)})
    assert stage.agreement(dense, compressed, [unmasked])["relative_error"] > 0.1


def test_a_map_of_pixels_is_one_row_a_sample() -> None:
    dense = torch.ones(2, 1, 2, 2)
    compressed = dense.clone()
    compressed[0, 0, 0] = 0.0  # half of one sample: cosine 1/sqrt(2)
    assert fixed(dense, compressed)["cosine"] == pytest.approx((1 + math.sqrt(0.5)) / 2)


def test_rows_that_are_zero_in_both_models_agree_and_in_one_do_not() -> None:
    assert fixed(torch.zeros(2, 3), torch.zeros(2, 3))["cosine"] == 1.0
    assert fixed(torch.zeros(2, 3), torch.ones(2, 3)) == {"cosine": 0.0}  # an error relative to nothing has no number


def test_single_numbers_and_scalars_have_no_cosine() -> None:
    assert fixed(torch.ones(4, 1), torch.full((4, 1), 0.5)) == {"relative_error": 0.5}
    assert fixed(torch.tensor(2.0), torch.tensor(1.0)) == {"relative_error": 0.5}


def test_rows_with_nan_or_inf_are_counted_and_left_out() -> None:
    dense, compressed = torch.ones(4, 3), torch.ones(4, 3)
    dense[0, 0], compressed[1, 1] = math.nan, math.inf
    assert fixed(dense, compressed) == {"cosine": pytest.approx(1.0), "relative_error": 0.0, "non_finite": 0.5}


def test_nothing_but_nan_leaves_only_that_figure() -> None:
    assert fixed(torch.full((4, 3), math.nan), torch.ones(4, 3)) == {"non_finite": 1.0}


def test_minus_infinity_in_both_models_is_a_ruled_out_choice_and_no_fault() -> None:
    logits = torch.tensor([[0.5, -math.inf, 2.0]])
    found = fixed({"logits": logits}, {"logits": logits.clone()})
    assert found == {"cosine": pytest.approx(1.0), "relative_error": 0.0, "top1": 1.0}


def test_top1_is_read_from_a_logits_field_of_two_or_three_dims() -> None:
    dense = torch.eye(3)
    compressed = dense.clone()
    compressed[0] = dense[1]
    assert fixed({"logits": dense, "hidden": torch.ones(3, 2)}, {"logits": compressed, "hidden": torch.ones(3, 2)})[
        "top1"
    ] == pytest.approx(2 / 3)
    assert fixed({"logits": dense[None]}, {"logits": compressed[None]})["top1"] == pytest.approx(2 / 3)
    assert "top1" not in fixed({"logits": torch.ones(2, 3, 4, 4)}, {"logits": torch.ones(2, 3, 4, 4)})


@pytest.mark.parametrize("after", [nn.Identity(), nn.Softmax(-1), nn.LogSoftmax(-1), nn.Sigmoid()])
def test_top1_is_given_where_a_layer_named_like_a_classifier_makes_the_output(after: nn.Module) -> None:
    assert "top1" in stage.agreement(*[Classifier("fc", after)] * 2, [as_call(torch.randn(3, 6))])


@pytest.mark.parametrize(
    "model",
    [
        Classifier("projection"),
        Classifier("fc", nn.LayerNorm(4)),
        nn.Sequential(nn.Linear(6, 4)),
    ],
    ids=["other name", "normalised output", "no name"],
)
def test_an_embedding_is_not_taken_for_a_classifier(model: nn.Module) -> None:
    torch.manual_seed(1)
    assert "top1" not in stage.agreement(model, model, [as_call(torch.randn(3, 6))])


def test_agreement_leaves_no_hook_and_no_flag_behind() -> None:
    model = Classifier("fc").train()
    stage.agreement(model, copy.deepcopy(model), [as_call(torch.randn(3, 6))])
    assert model.training and model.body.training
    assert not model.fc._forward_hooks


def test_a_batch_that_does_not_run_is_named() -> None:
    model = Classifier("fc")
    good, bad = as_call(torch.randn(3, 6)), as_call(torch.randn(3, 5))
    with pytest.raises(CalibrationError, match=r"held-out batch 1 could not be run: RuntimeError: "):
        stage.agreement(model, model, [good, bad])


# speed and memory


def test_latency_runs_the_models_in_turn() -> None:
    order: list[str] = []

    class Logs(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: Tensor) -> Tensor:
            order.append(self.name)
            assert not torch.is_grad_enabled()
            return x

    found = stage.measure_latency(Logs("dense"), Logs("compressed"), X, seconds=0.0)
    assert all(milliseconds > 0 for milliseconds in found)
    assert order == ["dense", "compressed"] * (2 + stage.FEWEST_ROUNDS)


def test_runs_that_are_compared_follow_each_other_in_any_order_and_none_itself(monkeypatch):
    monkeypatch.setattr(stage, "MOST_ROUNDS", 400)
    order: list[int] = []
    stage.medians_in_turn([lambda i=i: order.append(i) for i in range(4)], seconds=60.0)
    order = order[8:]  # the warm-up
    rounds = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert len(rounds) == 400
    assert all(sorted(one) == [0, 1, 2, 3] for one in rounds)
    pairs = Counter(itertools.pairwise(order))
    assert set(pairs) == set(itertools.permutations(range(4), 2))
    assert min(pairs.values()) > 80  # of 1,599 pairs of twelve kinds


def test_peak_memory_is_weights_inputs_and_the_live_activations() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 32))
    batch = torch.randn(128, 64)
    numbers = 64 * 256 + 256 + 256 * 32 + 32 + batch.numel()
    hidden = 2 * 128 * 256  # the activation function's input and output live at the same time
    assert stage.peak_memory(model, as_call(batch)) == 4 * (numbers + hidden)


def test_peak_memory_sees_buffers_inside_an_operation() -> None:
    layer = SKLinear(64, 64, num_terms=1, low_rank=8)
    batch = torch.randn(128, 64)
    numbers = sum(p.numel() for p in layer.parameters()) + batch.numel()
    assert stage.peak_memory(layer, as_call(batch)) >= 4 * (numbers + 128 * 64)


def test_peak_memory_does_not_count_other_models_or_change_the_log_level() -> None:
    model = nn.Linear(16, 16)
    before = stage.peak_memory(model, as_call(torch.ones(2, 16)))
    other = torch.ones(1000, 1000)
    assert stage.peak_memory(model, as_call(torch.ones(2, 16))) == before
    assert other.numel() == 10**6
    assert "KINETO_LOG_LEVEL" not in os.environ


def test_the_profiler_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    stage.peak_memory(nn.Linear(4, 4), as_call(torch.ones(1, 4)))
    assert capfd.readouterr() == ("", "")


# the report


def test_rows_are_counted_in_the_compressed_model(pair: tuple[Pixels, Pixels, Capture, Call]) -> None:
    found = {row.name: row for row in whole(pair, measure=False).layers}
    conv, body = found["conv"], found["body"]
    assert (conv.scheme, conv.ranks, conv.terms, conv.error) == ("output_channel", (4,), 1, 0.25)
    assert conv.after.params == 4 * 8 * 9 + 24 * 4
    assert conv.after.size_bytes == 4 * conv.after.params
    assert conv.kept == conv.after.params / (24 * 8 * 9)
    assert body.terms == math.ceil(10 / (2 * 2))
    spec = next(spec for spec in pair[2].layers if spec.name == "body")
    assert body.after.flops == chain_cost("linear", spec, (10,), 4).flops == 2 * 5 * 10 * (24 + 32)
    assert (body.before.params, body.before.flops) == (24 * 32, 2 * 5 * 24 * 32)


def test_dense_layers_say_why(pair: tuple[Pixels, Pixels, Capture, Call]) -> None:
    rows = {row.name: row for row in whole(pair, measure=False).layers}
    assert (rows["classifier"].scheme, rows["classifier"].reason, rows["classifier"].kept) == (
        "dense",
        "protected",
        1.0,
    )
    tied = Encoder()
    tied.embed = nn.Embedding(8, 8)
    tied.mix.weight = tied.embed.weight
    call = as_call({"input_ids": torch.ones(1, 2, dtype=torch.long), "attention_mask": torch.ones(1, 2)})
    found = capture(tied, call)
    report = stage.verify(tied, tied, capture=found, plan=Plan(()), target=Target(), example=call, measure=False)
    assert report.layers[0].reason == "; ".join(found.layers[0].blockers) != ""


def test_totals_add_up(pair: tuple[Pixels, Pixels, Capture, Call]) -> None:
    report = whole(pair, measure=False)
    saved = report.dense.params - report.compressed.params
    assert saved == sum(row.before.params - row.after.params for row in report.layers) > 0
    assert report.compressed.flops == sum(row.after.flops for row in report.layers)
    assert report.compressed.size_bytes == file_bytes(pair[1])
    assert report.dense.params == pair[2].model_params


def test_the_budget_is_judged_by_what_is_stored(pair: tuple[Pixels, Pixels, Capture, Call]) -> None:
    stored = sum(row.after.params for row in whole(pair, measure=False).layers)
    assert whole(pair, measure=False, target=Target(params=stored)).budget_met
    missed = whole(pair, measure=False, target=Target(params=stored - 1))
    assert not missed.budget_met
    assert any(f"hold {stored:,} params, at most {stored - 1:,}" in note for note in missed.notes)


def test_a_limit_on_the_file_is_judged_by_the_file(pair: tuple[Pixels, Pixels, Capture, Call]) -> None:
    size = file_bytes(pair[1])
    # The reserve in the layers' part of the limit is for the allocator: the file may use it up.
    assert whole(pair, measure=False, target=Target(size_bytes=1, file_bytes=size)).budget_met
    missed = whole(pair, measure=False, target=Target(size_bytes=10**9, file_bytes=size - 1))
    assert not missed.budget_met
    said = f"budget not met: the saved file takes {size:,} bytes, at most {size - 1:,} were asked for; "
    (note,) = (note for note in missed.notes if note.startswith(said))
    names = {spec.name for spec in pair[2].sketchable}
    sketchable = sum(row.after.size_bytes for row in missed.layers if row.name in names)
    assert note == f"{said}{size - sketchable:,} of them are in what cannot be sketched"


def limits_of(report: Report) -> dict[str, tuple[float, float | None, bool]]:
    return {limit.name: (limit.limit, limit.got, limit.met) for limit in report.limits}


def test_each_limit_is_reported_beside_what_the_model_needs(pair: tuple[Pixels, Pixels, Capture, Call]) -> None:
    report = whole(pair, measure=False, target=Target(params=10**6, flops=1, file_bytes=10**9))
    stored, size = sum(row.after.params for row in report.layers), file_bytes(pair[1])
    flops = sum(row.after.flops for row in report.layers)
    assert limits_of(report) == {
        "sketchable weights": (10**6, stored, True),
        "operations of the sketchable layers": (1, flops, False),
        "saved file": (10**9, size, True),
    }
    assert not report.budget_met and sum("budget not met" in note for note in report.notes) == 1
    assert f"budget not met: the sketchable layers need {flops:,} flops, at most 1 were asked for" in report.notes


@pytest.mark.parametrize(
    ("target", "met"),
    [
        (Target(model_latency_ms=11.0), True),
        (Target(model_latency_ms=9.0, latency_ms=1e9), False),  # the limit on the layers is for allocators
        (Target(model_latency_ms=9.0, latency_share=0.6), True),  # the machine is slower than it was
        (Target(model_latency_ms=11.0, latency_share=0.4), False),
    ],
)
def test_a_limit_on_the_latency_is_judged_by_the_whole_model(
    pair: tuple[Pixels, Pixels, Capture, Call], monkeypatch: pytest.MonkeyPatch, target: Target, met: bool
) -> None:
    monkeypatch.setattr(stage, "measure_latency", lambda *_: (20.0, 10.0))
    report = whole(pair, measure=False, target=target)
    assert report.budget_met == met
    limit = 20.0 * target.latency_share if target.latency_share else target.model_latency_ms
    assert limits_of(report) == {"latency": (limit, 10.0, met)}
    assert met or any(f"one run of the example inputs takes 10 ms, at most {limit:g} were" in n for n in report.notes)


def test_a_limit_on_memory_is_judged_by_the_whole_model(pair: tuple[Pixels, Pixels, Capture, Call]) -> None:
    peak = stage.peak_memory(pair[1], pair[3])
    assert whole(pair, measure=False, target=Target(peak_memory_bytes=peak, weight_bytes=1)).budget_met
    missed = whole(pair, measure=False, target=Target(peak_memory_bytes=peak - 1))
    assert limits_of(missed) == {"peak memory": (peak - 1, peak, False)}


def test_what_is_limited_is_measured_where_nothing_else_is(pair: tuple[Pixels, Pixels, Capture, Call]) -> None:
    asked: list[nn.Module] = []

    def evaluate(model: nn.Module) -> float:
        asked.append(model)
        return 0.9

    report = whole(pair, measure=False, target=Target(max_drop=0.0), eval_fn=evaluate)
    assert asked == [pair[0], pair[1]] and report.metric == (0.9, 0.9) and report.budget_met
    assert report.compressed.latency_ms is report.compressed.peak_memory_bytes is None and report.agreement == {}


def test_a_known_figure_of_the_dense_model_is_not_asked_for_again(pair: tuple[Pixels, Pixels, Capture, Call]) -> None:
    asked: list[nn.Module] = []

    def evaluate(model: nn.Module) -> float:
        asked.append(model)
        return 0.8

    report = whole(pair, measure=False, target=Target(max_drop=0.05), eval_fn=evaluate, dense_metric=0.9)
    assert asked == [pair[1]] and report.metric == (0.9, 0.8)
    assert not report.budget_met
    assert any("eval_fn falls by 0.1, at most 0.05 was asked for" in note for note in report.notes)


def test_what_could_not_be_measured_is_not_met_and_says_so(pair: tuple[Pixels, Pixels, Capture, Call]) -> None:
    def broken(model: nn.Module) -> float:
        raise KeyError("accuracy")

    report = whole(pair, measure=False, target=Target(max_drop=0.5), eval_fn=broken)
    assert not report.budget_met and limits_of(report) == {"drop of eval_fn": (0.5, None, False)}
    assert "budget not met: the drop of eval_fn could not be measured" in report.notes
    assert any(note.startswith("eval_fn could not be measured: KeyError") for note in report.notes)


@pytest.mark.parametrize(
    "answer", [1, 1.0, np.float32(1), np.int64(1), np.array(1.0), np.array([1.0]), torch.tensor(1), torch.ones(1, 1)]
)
def test_a_metric_may_be_any_single_number(answer: Any) -> None:
    got = stage.metric(nn.Linear(2, 2), lambda model: answer)
    assert type(got) is float and got == 1.0


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (None, TypeError, "eval_fn answered with NoneType: expected one number, higher is better"),
        ("0.5", TypeError, "eval_fn answered with str"),
        (np.ones(2), TypeError, "eval_fn answered with ndarray"),
        ({"accuracy": 0.5}, TypeError, "eval_fn answered with dict"),
        (torch.ones(2), TypeError, "eval_fn answered with Tensor"),
        (math.nan, ValueError, "eval_fn answered with nan: expected a finite number"),
        (torch.tensor(math.inf), ValueError, "eval_fn answered with inf"),
    ],
)
def test_a_metric_that_is_no_number_is_refused(answer: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        stage.metric(nn.Linear(2, 2), lambda model: answer)


def test_a_metric_sees_a_model_in_evaluation_mode_and_leaves_it_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    assert stage.metric(model, lambda m: float(m.training or torch.is_grad_enabled())) == 0.0
    assert model.training and model[1].training


def test_any_number_of_models_are_timed_in_turn() -> None:
    taken = stage.latencies([nn.Linear(2, 2) for _ in range(3)], as_call(torch.ones(1, 2)), seconds=0.0)
    assert len(taken) == 3 and all(milliseconds > 0 for milliseconds in taken)


def test_a_bias_that_the_dense_layer_did_not_have_is_counted(pair: tuple[Pixels, Pixels, Capture, Call]) -> None:
    dense, compressed, found, call = pair
    spec = next(spec for spec in found.layers if spec.name == "classifier")
    zeros = torch.zeros(4)
    factors = (torch.ones(2, 32), torch.ones(4, 2))
    compressed.classifier = SKLinear.from_factors(dense.classifier, "linear", factors, zeros)
    row = stage.layer_report(spec, None, compressed)
    assert (row.after.params, row.after.size_bytes) == (2 * 32 + 4 * 2 + 4, 4 * (2 * 32 + 4 * 2 + 4))
    compressed.classifier = SKLinear.from_factors(dense.classifier, "linear", factors, None)
    assert stage.layer_report(spec, None, compressed).after.params == 2 * 32 + 4 * 2
    report = stage.verify(
        dense, compressed, capture=found, plan=plan_of(found), target=Target(), example=call, measure=False
    )
    saved = report.dense.params - report.compressed.params
    assert saved == sum(row.before.params - row.after.params for row in report.layers)


def test_everything_is_measured_in_one_run(
    pair: tuple[Pixels, Pixels, Capture, Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "measure_latency", lambda *_: (1.0, 2.0))
    held_out = [as_call(torch.randn(3, 8, 6, 6)), as_call(torch.randn(2, 8, 6, 6))]
    report = whole(
        pair,
        held_out=held_out,
        eval_fn=lambda model: torch.tensor(3.5),
        seconds={"capture": 0.5},
        notes=["said before"],
        seed=7,
    )
    assert (report.dense.latency_ms, report.compressed.latency_ms) == (1.0, 2.0)
    assert report.dense.peak_memory_bytes == stage.peak_memory(pair[0], pair[3])
    assert set(report.agreement) == {"cosine", "relative_error", "top1"}
    assert (report.agreement_batches, report.agreement_held_out) == (2, True)
    assert report.metric == (3.5, 3.5)
    assert list(report.seconds) == ["capture", "verify"]
    assert report.environment["seed"] == "7" and report.environment["torch"] == torch.__version__
    assert report.notes[0] == "said before"
    assert "not faster than the dense model at these inputs (0.50x)" in report.notes
    assert json.loads(report.to_json())["compressed"]["latency_ms"] == 2.0


def test_counting_only_measures_nothing(pair: tuple[Pixels, Pixels, Capture, Call]) -> None:
    report = whole(pair, measure=False, eval_fn=lambda model: pytest.fail("measured"))
    assert report.dense.latency_ms is report.compressed.peak_memory_bytes is report.metric is None
    assert report.agreement == {} and report.agreement_batches == 0


def test_the_report_says_when_the_inputs_were_not_kept_aside(
    pair: tuple[Pixels, Pixels, Capture, Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "measure_latency", lambda *_: (2.0, 1.0))
    on_example = whole(pair)
    assert not on_example.agreement_held_out and on_example.agreement_batches == 1
    assert any("example inputs only" in note for note in on_example.notes)
    fitted = whole(pair, held_out=[as_call(torch.randn(3, 8, 6, 6))], is_held_out=False)
    assert any("not kept aside from the fit" in note for note in fitted.notes)


def test_a_measurement_that_fails_costs_a_note_and_not_the_model(
    pair: tuple[Pixels, Pixels, Capture, Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "measure_latency", lambda *_: (2.0, 1.0))

    def broken(model: nn.Module) -> float:
        raise KeyError("accuracy")

    report = whole(pair, held_out=[as_call(torch.zeros(2, 3, 6, 6))], eval_fn=broken)
    assert report.agreement == {} and report.metric is None
    assert any(note.startswith("eval_fn could not be measured: KeyError") for note in report.notes)
    assert any(
        note.startswith("agreement could not be measured: CalibrationError: held-out batch 0") for note in report.notes
    )


class Opaque:
    """An output class of the user's own."""

    def __init__(self, y: Tensor) -> None:
        self.y = y


@pytest.mark.parametrize("output", [7, torch.tensor([1, 2]), torch.zeros(0, 4), Opaque(torch.ones(2, 3)), None, ()])
def test_outputs_that_cannot_be_compared_are_a_note_and_no_figure(
    pair: tuple[Pixels, Pixels, Capture, Call], monkeypatch: pytest.MonkeyPatch, output: Any
) -> None:
    monkeypatch.setattr(stage, "measure_latency", lambda *_: (2.0, 1.0))
    monkeypatch.setattr(Pixels, "forward", lambda _self, _x: output)
    report = whole(pair, held_out=[as_call(torch.randn(3, 8, 6, 6))])
    assert report.agreement == {} and report.agreement_batches == 0
    assert [note for note in report.notes if "the outputs cannot be compared" in note]
    assert not any("could not be measured" in note for note in report.notes)


@pytest.mark.parametrize(
    ("dense", "compressed"),
    [
        (torch.ones(3, 4), torch.ones(2, 4)),
        (torch.ones(3, 4), torch.ones(3, 1)),
        (torch.ones(2, 3, 4), torch.ones(3, 2, 4)),
        ([torch.ones(3, 4)], []),
    ],
)
def test_outputs_of_other_shapes_are_refused_with_both(dense: Any, compressed: Any) -> None:
    with pytest.raises(CalibrationError, match=r"batch 0 the dense model gives .*, the compressed one \["):
        fixed(dense, compressed)


def test_outputs_that_are_not_finite_are_a_note(
    pair: tuple[Pixels, Pixels, Capture, Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "measure_latency", lambda *_: (2.0, 1.0))
    bad = torch.zeros(4, 8, 6, 6)
    bad[0] = math.nan
    report = whole(pair, held_out=[as_call(bad)])
    assert report.agreement["non_finite"] == 0.25
    assert any("25.0% of the output rows hold NaN or Inf" in note for note in report.notes)


def test_a_model_that_grew_or_no_longer_agrees_is_a_note(
    pair: tuple[Pixels, Pixels, Capture, Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "measure_latency", lambda *_: (2.0, 1.0))
    dense, compressed, found, call = pair
    grown = stage.verify(compressed, dense, capture=found, plan=Plan(()), target=Target(), example=call)
    assert any(note.startswith("larger than the dense model") for note in grown.notes)
    with torch.no_grad():
        compressed.classifier.weight.neg_()
    opposed = whole(pair, held_out=[call])
    assert any(note.startswith("the outputs hardly agree (cosine -") for note in opposed.notes)
