from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from panther.batches import Call
from panther.capture import capture
from panther.decompose import candidates, decompose
from panther.factors import Factors
from panther.importance import Importance, Reference, best_within, fit, importance, reference
from panther.measure import measure
from panther.replace import replace
from panther.spec import Choice, Plan


class Net(nn.Module):
    """Two layers in a row and one whose output is not used."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16, bias), nn.Linear(16, 16, bias)
        self.unused = nn.Linear(16, 16, bias)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.last(self.first(x).relu()) + 0.0 * self.unused(x)
        return answer


class Prepared:
    """A model, its factors and what it could become, from inputs with a mean."""

    def __init__(self, model: nn.Module, calls: Sequence[Call]) -> None:
        self.model, self.calls = model, calls
        specs = capture(model, calls[0]).sketchable
        profiles = measure(model, specs, calls, samples=sum(c.batch_size for c in calls)).profiles
        self.factors: Mapping[str, Factors] = {
            s.name: decompose(model.get_submodule(s.name), s, profiles[s.name]) for s in specs
        }
        self.options = {name: candidates(factors, 4) for name, factors in self.factors.items()}
        self.reference: Reference = reference(model, calls)


def calls_for(count: int = 3, size: int = 8) -> list[Call]:
    return [Call((torch.randn(size, 16) + 1.0,)) for _ in range(count)]


# D = a E^b


@pytest.mark.parametrize("a", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("b", [0.5, 1.0, 1.7, 2.0])
def test_fit_recovers_the_curve_that_two_points_are_from(a: float, b: float) -> None:
    found = fit([(e, a * e**b) for e in (0.1, 0.35)])
    assert found.a == pytest.approx(a) and found.b == pytest.approx(b)
    assert found.divergence(0.2) == pytest.approx(a * 0.2**b)


def test_fit_goes_through_one_point_in_proportion() -> None:
    assert fit([(0.2, 3.0)]) == Importance(pytest.approx(15.0), 1.0)


def test_fit_does_not_trust_slopes_that_only_noise_gives() -> None:
    assert fit([(0.1, 1.0), (0.2, 100.0)]).b == 2.0
    assert fit([(0.1, 1.0), (0.2, 1.01)]).b == 0.5
    assert fit([(0.1, 1.0), (0.2, 0.5)]).b == 1.0  # falling
    assert fit([(0.1, 1.0), (0.1001, 1.5)]).b == 1.0  # too close together


def test_a_layer_whose_truncation_changes_nothing_has_no_importance() -> None:
    assert fit([(0.1, 0.0), (0.2, 0.0)]).divergence(0.5) == 0.0


def test_a_layer_whose_truncation_breaks_the_model_only_counts_nothing_when_dense() -> None:
    for points in ([(0.1, math.inf), (0.2, math.inf)], [(0.1, 0.0), (0.2, math.inf)]):
        assert fit(points).divergence(0.05) == math.inf and fit(points).divergence(0.0) == 0.0


def test_a_layer_that_nothing_judges_only_counts_nothing_when_dense() -> None:
    assert fit([]).divergence(0.05) == math.inf and fit([]).divergence(0.0) == 0.0


# The reference


def test_leaving_everything_dense_diverges_by_nothing() -> None:
    prepared = Prepared(Net(), calls_for())
    dense = [choices[-1] for choices in prepared.options.values()]
    assert prepared.reference.divergence(prepared.factors, dense) == 0.0
    assert prepared.reference.divergence(prepared.factors, []) == 0.0


@pytest.mark.parametrize("bias", [True, False])
def test_divergence_is_the_error_of_the_model_that_would_be_built(bias: bool) -> None:
    prepared = Prepared(Net(bias=bias), calls_for(1, 20))
    choices = [prepared.options[name][2] for name in ("first", "last")]
    built = replace(prepared.model, prepared.factors, Plan(tuple(choices)))
    with torch.no_grad():
        answer, got = (model(*prepared.calls[0].args) for model in (prepared.model, built))
    variance = (answer - answer.mean(0)).square().mean()
    expected = float((got - answer).square().mean() / variance)
    assert prepared.reference.divergence(prepared.factors, choices) == pytest.approx(expected, rel=1e-4)


def test_divergence_of_convolutions_without_bias_counts_the_bias_that_they_gain() -> None:
    model = nn.Sequential(nn.Conv2d(4, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 4, 1)).eval()
    calls = [Call((torch.randn(4, 4, 6, 6) + 2,))]
    prepared = Prepared(model, calls)
    choice = prepared.options["0"][0]
    built = replace(model, prepared.factors, Plan((choice,)))
    with torch.no_grad():
        answer, got = model(*calls[0].args), built(*calls[0].args)
    expected = float((got - answer).square().mean() / (answer - answer.mean(0)).square().mean())
    assert prepared.reference.divergence(prepared.factors, [choice]) == pytest.approx(expected, rel=1e-4)


def test_padded_positions_do_not_count() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            answer: Tensor = self.layer(x)
            return answer

    mask = torch.tensor([[1, 1, 0, 0]]).repeat(6, 1)
    x = torch.randn(6, 4, 16)
    x[:, 2:] = 0.0
    prepared = Prepared(Tokens(), [Call((), {"x": x, "attention_mask": mask})])
    dirty = x.clone()
    dirty[:, 2:] = torch.randn(6, 2, 16) * 1e-3  # small: the variance that scales the error counts all positions
    other = reference(prepared.model, [Call((), {"x": dirty, "attention_mask": mask})])
    choice = prepared.options["layer"][3]
    first, second = (r.divergence(prepared.factors, [choice]) for r in (prepared.reference, other))
    assert first == pytest.approx(second, rel=1e-2) and first > 0


class Speaker(nn.Module):
    """Scores from a hidden state, which is given out as well."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.hidden, self.score, self.name = nn.Linear(16, 16), nn.Linear(16, 24), name

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.hidden(x).relu()
        return {"encoder_hidden_states": hidden, self.name: self.score(hidden)}


def test_scores_count_by_their_probabilities_and_hidden_states_beside_them_do_not() -> None:
    torch.manual_seed(0)
    prepared = Prepared(Speaker("logits"), calls_for(2))
    choices = [prepared.options["hidden"][4]]
    with torch.no_grad():
        dense, small = prepared.model, replace(prepared.model, prepared.factors, Plan(tuple(choices)))
        lost = []
        for call in prepared.calls:
            wanted, got = (model(*call.args)["logits"].log_softmax(-1) for model in (dense, small))
            mean = wanted.exp().mean(0).log()
            unit = float((wanted.exp() * (wanted - mean)).sum(1).mean())
            lost.append(float((wanted.exp() * (wanted - got)).sum(1).mean()) / unit)
    assert prepared.reference.divergence(prepared.factors, choices) == pytest.approx(sum(lost) / 2, rel=1e-3)
    # What another name has is a vector, and nothing is known to be on the way to it.
    torch.manual_seed(0)
    other = Prepared(Speaker("vector"), calls_for(2))
    assert other.reference.scores is None and len(other.reference.outputs[0]) == 2
    assert other.reference.divergence(other.factors, choices) != pytest.approx(sum(lost) / 2, rel=0.01)


def test_an_output_that_is_not_finite_is_infinitely_far() -> None:
    class Log(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)
            with torch.no_grad():
                self.layer.weight.copy_(torch.eye(16))
                self.layer.bias.zero_()

        def forward(self, x: Tensor) -> Tensor:
            return torch.log(self.layer(x))

    prepared = Prepared(Log(), [Call((3 * torch.eye(16) + 0.01,))])
    assert prepared.reference.divergence(prepared.factors, [prepared.options["layer"][0]]) == math.inf


def test_the_reference_takes_as_many_samples_as_asked_for() -> None:
    model, calls = Net(), calls_for(5, 8)
    assert [c.batch_size for c in reference(model, calls, 20).calls] == [8, 8, 4]
    assert [c.batch_size for c in reference(model, calls[:1], 20).calls] == [8]


def test_a_model_in_training_mode_is_judged_in_evaluation_mode_and_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.9), nn.Linear(16, 16)).train()
    prepared = Prepared(model, calls_for())
    assert prepared.reference.divergence(prepared.factors, []) == 0.0
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


# Importance


def test_a_layer_whose_output_is_not_used_has_no_importance() -> None:
    prepared = Prepared(Net(), calls_for())
    found = importance(prepared.reference, prepared.factors, prepared.options)
    assert set(found) == {"first", "last", "unused"}
    assert found["unused"].divergence(0.9) == 0.0
    assert found["first"].divergence(0.5) > 0 and found["last"].divergence(0.5) > 0


def test_importance_predicts_the_divergence_where_it_was_measured() -> None:
    prepared = Prepared(Net(), calls_for())
    found = importance(prepared.reference, prepared.factors, prepared.options)
    for name in ("first", "last"):
        for kept in (0.5, 0.25):
            choice = best_within(prepared.options[name], kept)
            assert choice is not None
            measured = prepared.reference.divergence(prepared.factors, [choice])
            assert found[name].divergence(choice.error) == pytest.approx(measured, rel=0.3)


@pytest.mark.parametrize("batches", [1, 3])
def test_importance_is_the_same_whether_or_not_what_comes_before_a_layer_is_computed_again(
    batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [nn.Sequential(nn.Linear(16, 16), nn.ReLU(inplace=True)) for _ in range(4)]
    prepared = Prepared(nn.Sequential(*layers, nn.Linear(16, 16)), calls_for(batches))
    runs: list[nn.Module] = []
    forward = nn.Linear.forward

    def counted(self: nn.Linear, x: Tensor) -> Tensor:
        runs.append(self)
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    found = importance(prepared.reference, prepared.factors, prepared.options)
    # The run that is watched, one that finds that memory answers alike, twice from each layer on, and two checks.
    assert len(found) == 5 and len(runs) == batches * (5 + 1 + 2 * (5 + 4 + 3 + 2 + 1) + 2 * 5)
    monkeypatch.setattr(Reference, "records", lambda self: [])
    runs.clear()
    assert importance(prepared.reference, prepared.factors, prepared.options) == found
    assert len(runs) == batches * 5 * 2 * 5


def test_importance_is_the_same_where_modules_hide_what_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class Store:
        held: Tensor

    class Part(nn.Module):
        """Leaves its input where neither it nor the model has it as an attribute."""

        def __init__(self, store: Store) -> None:
            super().__init__()
            self.layer, self.store = nn.Linear(16, 16), store

        def forward(self, x: Tensor) -> Tensor:
            self.store.held = x
            answer: Tensor = self.layer(x)
            return answer

    class Hides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.store = Store()
            self.first, self.part, self.last = nn.Linear(16, 16), Part(self.store), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.last(self.part(self.first(x))) + self.store.held
            return answer

    prepared = Prepared(Hides(), calls_for(3))  # with one call what is left from the last run is right by chance
    found = importance(prepared.reference, prepared.factors, prepared.options)
    monkeypatch.setattr(Reference, "records", lambda self: [])
    assert importance(prepared.reference, prepared.factors, prepared.options) == found


def test_a_call_leaves_nothing_to_the_next() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.new, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.state = torch.zeros(1, 16)

        def forward(self, x: Tensor) -> Tensor:
            self.state = torch.tanh(self.own(self.state) + self.new(x))
            answer: Tensor = self.last(self.state)
            return answer

    model, calls = Recurrent(), calls_for(3)
    prepared = Prepared(model, calls)
    with torch.no_grad():
        alone = [prepared.model.last(torch.tanh(model.own(torch.zeros(1, 16)) + model.new(*c.args))) for c in calls]
    assert all(torch.equal(a, b) for (a,), b in zip(prepared.reference.outputs, alone, strict=True))
    found = importance(prepared.reference, prepared.factors, prepared.options)
    choice = best_within(prepared.options["new"], 0.5)
    assert choice is not None
    assert found["new"].divergence(choice.error) == pytest.approx(
        prepared.reference.divergence(prepared.factors, [choice]), rel=0.3
    )


def test_a_layer_that_matters_ten_times_as_much_is_found_to() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.little, self.much = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.little(x) * 0.1 + self.much(x)
            return answer

    prepared = Prepared(Weighted(), calls_for())
    found = importance(prepared.reference, prepared.factors, prepared.options)
    assert found["much"].divergence(0.3) > 20 * found["little"].divergence(0.3)


def test_a_layer_with_no_option_but_dense_is_free_as_that_only() -> None:
    prepared = Prepared(Net(), calls_for())
    options = {"first": prepared.options["first"][-1:]}
    found = importance(prepared.reference, prepared.factors, options)["first"]
    assert found.divergence(0.0) == 0.0 and found.divergence(1.0) == math.inf


@pytest.mark.parametrize("kind", ["linear", "1 x 1", "3 x 3"])
@pytest.mark.parametrize("outputs", [2, 3])
def test_a_layer_of_two_outputs_matters_although_no_rank_is_half_of_it(kind: str, outputs: int) -> None:
    """Rank 1 of 16 -> 2 has 18 of 32 numbers."""
    last: nn.Module
    if kind == "linear":
        last, calls = nn.Linear(16, outputs), calls_for(1, 24)
    else:
        size = int(kind[0])
        last, calls = nn.Conv2d(16, outputs, size), [Call((torch.randn(6, 16, 4, 4) + 1.0,))]
    prepared = Prepared(nn.Sequential(last), calls)
    smallest = prepared.options["0"][0]
    assert not smallest.is_dense
    found = importance(prepared.reference, prepared.factors, prepared.options)["0"]
    measured = prepared.reference.divergence(prepared.factors, [smallest])
    assert found.divergence(smallest.error) == pytest.approx(measured, rel=0.3) and measured > 0.05


def test_a_layer_of_low_rank_is_judged_where_it_loses_more_than_rounding() -> None:
    """At half and a quarter of its weights nothing is lost, and at rank 1 much."""
    model = nn.Sequential(nn.Linear(128, 128))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(128, 8) @ torch.randn(8, 128) / 8)
    prepared = Prepared(model, [Call((torch.randn(2048, 128),))])
    found = importance(prepared.reference, prepared.factors, prepared.options)["0"]
    assert 0.5 < found.a < 2.0


def test_the_best_within_a_share_loses_least_and_is_never_dense() -> None:
    options: list[Choice] = list(Prepared(Net(), calls_for()).options["first"])
    best = best_within(options, 0.5)
    assert best is not None and not best.is_dense and best.cost.params <= 0.5 * options[-1].cost.params
    assert best.error == min(c.error for c in options if c.cost.params <= 0.5 * options[-1].cost.params)
    assert best_within(options, 0.0) is None
    assert best_within(options[-1:], 1.0) is None
