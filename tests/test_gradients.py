from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from panther import gradients
from panther.batches import Call
from panther.capture import capture
from panther.gradients import CHUNK, Reactions
from panther.products import fast_layers

# G is the mean over N products of Gaussian noise: each entry is off by about sqrt(2 / N) of the diagonal.
MANY = 4096
SAMPLING = 6 * (2 / MANY) ** 0.5


def sensitivities(model: nn.Module, calls: Sequence[Call], seed: int = 0) -> dict[str, Tensor]:
    with torch.no_grad(), Reactions(model.eval(), capture(model, calls[0]).sketchable, seed) as reactions:
        for call in calls:
            for chunk in reactions.chunks(call):
                reactions.run(chunk)
    return reactions.found()


def scaled(reaction: Tensor, weight: Tensor | None = None) -> Tensor:
    """G with a mean diagonal of one, or W^T G W of that G."""
    reaction = reaction.double() / float(reaction.double().diagonal().mean())
    return reaction if weight is None else weight.double().T @ reaction @ weight.double()


def assert_within_sampling(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=SAMPLING * float(expected.diagonal().max()))


@pytest.fixture
def many_samples_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "CHUNK", 512)


@pytest.mark.usefixtures("many_samples_at_once")
def test_it_is_the_mean_of_the_squared_jacobian_of_a_linear_model() -> None:
    model = nn.Sequential(nn.Linear(9, 5), nn.Linear(5, 3, bias=False))
    found = sensitivities(model, [Call((torch.randn(MANY, 9),))])
    after = model[1].weight.detach()
    assert_within_sampling(found["0"], scaled(after.T @ after))  # o = after y, so that J = after
    assert_within_sampling(found["1"], torch.eye(3, dtype=torch.float64))  # o = y


@pytest.mark.usefixtures("many_samples_at_once")
def test_a_layer_with_more_outputs_than_inputs_has_it_seen_from_its_inputs() -> None:
    model = nn.Sequential(nn.Linear(4, 10), nn.Linear(10, 6, bias=False))
    found = sensitivities(model, [Call((torch.randn(MANY, 4),))])
    after, weight = model[1].weight.detach(), model[0].weight.detach()
    assert found["0"].shape == (4, 4)
    assert_within_sampling(found["0"], scaled(after.T @ after, weight))


@pytest.mark.usefixtures("many_samples_at_once")
def test_every_position_of_a_sequence_counts() -> None:
    model = nn.Sequential(nn.Linear(9, 5), nn.Linear(5, 3, bias=False))
    found = sensitivities(model, [Call((torch.randn(MANY // 8, 8, 9),))])
    after = model[1].weight.detach()
    assert_within_sampling(found["0"], scaled(after.T @ after))


@pytest.mark.usefixtures("many_samples_at_once")
def test_a_convolution_has_it_over_its_output_channels() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.mix = nn.Conv2d(2, 5, 3), nn.Conv2d(5, 4, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            mixed: Tensor = self.mix(self.conv(x))
            return mixed

    model = Net()
    found = sensitivities(model, [Call((torch.randn(MANY // 16, 2, 6, 6),))])
    after = model.mix.weight.detach().flatten(1)
    assert_within_sampling(found["conv"], scaled(after.T @ after))


@pytest.mark.usefixtures("many_samples_at_once")
def test_outputs_count_in_units_of_their_spread() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.layer(x)
            return {"large": 1000.0 * y[:, :2], "small": 0.001 * y[:, 2:]}

    model = Two()
    with torch.no_grad():  # both halves of the outputs vary as much
        model.layer.weight.copy_(torch.eye(4, 8))
    found = sensitivities(model, [Call((torch.randn(MANY, 8),))])
    assert_within_sampling(found["layer"], torch.eye(4, dtype=torch.float64))


def test_a_direction_that_the_output_ignores_has_none() -> None:
    model = nn.Sequential(nn.Linear(9, 5), nn.Linear(5, 3, bias=False))
    with torch.no_grad():
        model[1].weight[:, 2] = 0
    found = sensitivities(model, [Call((torch.randn(40, 9),))])["0"]
    assert float(found[2].abs().max()) == 0 and float(found.diagonal().mean()) == pytest.approx(1)


def test_a_layer_whose_output_is_not_used_is_left_out() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.used(x) + 0.0 * self.idle(x)
            return answer

    found = sensitivities(Idle(), [Call((torch.randn(10, 4),))])
    assert set(found) == {"used"}


def test_padded_positions_do_not_count() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            # The last position, which is padding, would say that only the first of the outputs counts.
            self.scale = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 1], [50, 0, 0, 0]])

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            answer: Tensor = self.layer(x) * self.scale
            return answer

    x, mask = torch.randn(100, 3, 4), torch.tensor([[1, 1, 0]]).repeat(100, 1)
    found = sensitivities(Masked(), [Call((), {"x": x, "attention_mask": mask})])["layer"]
    torch.testing.assert_close(found, torch.eye(4, dtype=torch.float64), rtol=0, atol=6 * (2 / 200) ** 0.5)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    model, call = nn.Sequential(nn.Linear(9, 5), nn.Linear(5, 3)), Call((torch.randn(20, 9),))
    first, second, other = (sensitivities(model, [call], seed)["0"] for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_which_layers_are_watched_together_changes_no_bit() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.second(self.first(x).relu())
            return answer

    model, call = Net().eval(), Call((torch.randn(6, 2, 16, 16),))  # more positions than are looked at
    together = sensitivities(model, [call])
    for spec in capture(model, call).sketchable:
        with torch.no_grad(), Reactions(model, [spec], 0) as reactions:
            reactions.run(call)
        assert torch.equal(reactions.found()[spec.name], together[spec.name])


@pytest.mark.parametrize("shape", [(16, 6), (4, 4, 6), (16, 6, 1, 1)])
def test_an_in_place_activation_behind_a_layer_is_no_trouble(shape: tuple[int, ...]) -> None:
    """Of a linear layer of three dimensions torch gives a view."""

    def layer(outputs: int) -> nn.Module:
        return nn.Conv2d(6, outputs, 1) if len(shape) == 4 else nn.Linear(6, outputs)

    class Net(nn.Module):
        def __init__(self, *, inplace: bool) -> None:
            super().__init__()
            self.first, self.layer, self.act, self.last = layer(6), layer(6), nn.ReLU(inplace=inplace), layer(2)

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.last(self.act(self.layer(self.first(x))))
            return answer

    call = Call((torch.randn(*shape),))
    found = []
    for inplace in (True, False):
        torch.manual_seed(3)
        with fast_layers():
            found.append(sensitivities(Net(inplace=inplace), [call])["layer"])
    assert torch.equal(*found)


def test_a_model_whose_output_has_no_gradient_raises() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).detach()

    with pytest.raises(ValueError, match="no floating-point output that depends on its layers"):
        sensitivities(Frozen(), [Call((torch.randn(4, 4),))])


class Checkpointed(nn.Module):
    """Its blocks run again in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 9), nn.SiLU(), nn.Linear(9, 6)) for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + (block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant))
        return x


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # before gradients are wanted
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_checkpointed_is_as_sensitive_as_without(reentrant: bool) -> None:
    plain, calls = Checkpointed(None), [Call((torch.randn(8, 6),))]
    model = Checkpointed(reentrant)
    model.load_state_dict(plain.state_dict())
    wanted, got = sensitivities(plain, calls), sensitivities(model, calls)
    assert list(wanted) == list(got) and len(wanted) == 5
    for name, matrix in wanted.items():
        torch.testing.assert_close(got[name], matrix)


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(nn.Linear(9, 5), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    sensitivities(model, [Call((torch.randn(4, 9),))])
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model[0].weight.requires_grad and model[1].weight.requires_grad


def test_chunks_are_the_whole_call_in_small_parts() -> None:
    model, call = nn.Sequential(nn.Linear(4, 2)), Call((torch.randn(2 * CHUNK + 3, 4),), {"scale": 2.0})
    parts = list(Reactions(model, capture(model, Call((torch.randn(2, 4),))).sketchable, 0).chunks(call))
    assert [part.batch_size for part in parts] == [CHUNK, CHUNK, 3]
    assert torch.equal(torch.cat([part.args[0] for part in parts]), call.args[0])
    assert all(part.kwargs == {"scale": 2.0} for part in parts)


def test_samples_with_large_activations_run_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "HELD_BYTES", 1)
    model, call = nn.Sequential(nn.Linear(4, 2)), Call((torch.randn(3, 4),))
    layers = capture(model, call).layers
    chunk = gradients.chunk_size(layers, call.batch_size)
    parts = list(Reactions(model, layers, 0, chunk).chunks(call))
    assert [part.batch_size for part in parts] == [1, 1, 1]


def test_a_sample_that_would_hold_too_much_gets_no_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, call = nn.Sequential(nn.Linear(4, 2)), Call((torch.randn(3, 4),))
    layers = capture(model, call).layers
    assert gradients.chunk_size(layers, 3) == gradients.CHUNK
    monkeypatch.setattr(gradients, "MOST_HELD_BYTES", 4 * 2 * gradients.HELD_PER_OUTPUT - 1)
    assert gradients.chunk_size(layers, 3) == 0
