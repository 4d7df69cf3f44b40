"""Which neighbours may agree on an order of channels, and which must not, by both ways that see a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panther.batches import Call
from panther.capture import WAYS, capture
from panther.spec import Capture, Pair

WITH_A_GRAPH = ("torch.export", "torch.fx")
every_way = pytest.mark.parametrize("way", WITH_A_GRAPH)


class Between(nn.Module):
    """fc1, then whatever, then fc2."""

    def __init__(self, what: Callable[[Any, Tensor], Tensor], *, hidden: int = 24, **parts: Any) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, hidden), nn.Linear(24, 16)
        self.what = what
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.fc2(self.what(self, self.fc1(x)))


def captured(model: nn.Module, x: Tensor, way: str) -> Capture:
    with mock.patch.dict(WAYS, {way: WAYS[way]}, clear=True):
        return capture(model.eval(), Call((x,)))


def found(model: nn.Module, x: Tensor, way: str = "torch.export") -> tuple[Pair, ...]:
    return captured(model, x, way).followers


X = torch.randn(5, 12)
PAIR = Pair("fc1", "fc2")

ELEMENTWISE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "nothing": lambda m, h: h,
    "relu": lambda m, h: h.relu(),
    "relu in place": lambda m, h: F.relu(h, inplace=True),
    "exact gelu": lambda m, h: F.gelu(h),
    "gelu": lambda m, h: F.gelu(h, approximate="tanh"),
    "gelu by hand": lambda m, h: 0.5 * h * (1 + torch.tanh(0.8 * (h + 0.044715 * torch.pow(h, 3.0)))),
    "silu": lambda m, h: F.silu(h),
    "silu by hand": lambda m, h: h * torch.sigmoid(h),
    "scaled and shifted": lambda m, h: 2 * h / 3 - 1,
    "clamped": lambda m, h: h.clamp(0, 6),
    "dropout": lambda m, h: F.dropout(torch.tanh(h), 0.1, m.training),
    "cast": lambda m, h: h.float().sigmoid(),
}


@every_way
@pytest.mark.parametrize("what", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_layers_with_only_elementwise_operations_between_are_found(what: Any, way: str) -> None:
    assert found(Between(what), X, way) == (PAIR,)


@every_way
@pytest.mark.parametrize(
    "part", [nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.Identity(), nn.Dropout(0.3), nn.LeakyReLU(), nn.Tanh()]
)
def test_activations_that_are_modules_are_found(part: nn.Module, way: str) -> None:
    assert found(nn.Sequential(nn.Linear(12, 24), part, nn.Linear(24, 16)), X, way) == (Pair("0", "2"),)


OTHERS: dict[str, Callable[[Any, Tensor], Any]] = {
    "softmax": lambda m, h: h.softmax(-1),
    "layer norm": lambda m, h: F.layer_norm(h, (24,)),
    "prelu": lambda m, h: F.prelu(h, m.slopes),
    "view": lambda m, h: h.view(-1, 24),
    "reshape": lambda m, h: h.reshape(5, 2, 12).flatten(1),
    "transposed": lambda m, h: h.T.contiguous().T,
    "flip": lambda m, h: h.flip(-1),
    "roll": lambda m, h: h.roll(1, -1),
    "cumulative": lambda m, h: h.cumsum(-1),
    "scale of each channel": lambda m, h: h * m.slopes,
    "another tensor": lambda m, h: h + torch.linspace(0, 1, 24),
    "mean taken off": lambda m, h: h - h.mean(-1, keepdim=True),
    "gate": lambda m, h: h * m.gate(X),
    "gathered": lambda m, h: h[:, list(range(23, -1, -1))],
    "chunks": lambda m, h: torch.cat(h.chunk(2, -1), -1),
    "unknown": lambda m, h: torch.special.i0(h),
}


@every_way
@pytest.mark.parametrize("what", OTHERS.values(), ids=OTHERS)
def test_any_other_operation_between_ends_the_search(what: Any, way: str) -> None:
    model = Between(what, slopes=nn.Parameter(torch.rand(24)), gate=nn.Linear(12, 24))
    assert found(model, X, way) == ()


class TwoReaders(Between):
    def forward(self, x: Tensor) -> Any:
        h = self.fc1(x).relu()
        return self.fc2(h), self.what(self, h)


@every_way
@pytest.mark.parametrize(
    "what",
    [lambda m, h: h, lambda m, h: h.sum(), lambda m, h: m.other(h), lambda m, h: h + 1, lambda m, h: m.fc2(h)],
    ids=["returned", "summed", "a third layer", "returned after an elementwise operation", "the same layer again"],
)
def test_a_second_reader_ends_the_search(what: Any, way: str) -> None:
    assert found(TwoReaders(what, other=nn.Linear(24, 16)), X, way) == ()


class Residual(Between):
    def forward(self, x: Tensor) -> Any:
        return self.fc2(self.fc1(x).relu() + x.repeat(1, 2))


class ReadsItself(Between):
    def forward(self, x: Tensor) -> Any:
        h = self.fc1(x)
        return F.linear(h, h[:, :24])


@every_way
@pytest.mark.parametrize("kind", [Residual, ReadsItself])
def test_what_is_mixed_with_another_stream_is_not_found(kind: Any, way: str) -> None:
    assert found(kind(None), X, way) == ()


class Twice(Between):
    def forward(self, x: Tensor) -> Any:
        return self.fc2(self.fc1(x).relu()) + self.fc2(self.fc1(-x).relu())


@every_way
def test_a_layer_that_runs_twice_is_not_found(way: str) -> None:
    assert found(Twice(None), X, way) == ()


@every_way
def test_a_layer_that_stays_dense_for_a_reason_is_not_found(way: str) -> None:
    tied = Between(ELEMENTWISE["relu"])
    tied.also = nn.Embedding(16, 24)
    tied.fc2.weight = tied.also.weight
    assert found(tied, X, way) == ()
    aliased = Between(ELEMENTWISE["relu"])
    aliased.same = aliased.fc2
    assert found(aliased, X, way) == ()


# Convolutions and norms


def cnn(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 24, 3), *between, nn.Conv2d(24, 16, 3))


IMAGES = torch.randn(2, 3, 9, 9)


@every_way
def test_a_batch_norm_between_is_named(way: str) -> None:
    assert found(cnn(nn.BatchNorm2d(24), nn.ReLU()), IMAGES, way) == (Pair("0", "3", ("1",)),)
    rows = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 16))
    assert found(rows, X, way) == (Pair("0", "3", ("1",)),)


@every_way
def test_a_batch_norm_along_another_axis_ends_the_search(way: str) -> None:
    tokens = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(5), nn.Linear(24, 16))
    assert found(tokens, torch.randn(2, 5, 12), way) == ()


@every_way
def test_a_batch_norm_used_twice_ends_the_search(way: str) -> None:
    norm = nn.BatchNorm2d(24)
    assert found(cnn(norm, nn.ReLU(), norm), IMAGES, way) == ()


@every_way
@pytest.mark.parametrize(
    "between",
    [nn.MaxPool3d((1, 2, 2)), nn.GroupNorm(3, 24), nn.InstanceNorm2d(24, affine=True), nn.PReLU(24), nn.Softmax2d()],
)
def test_other_modules_between_convolutions_end_the_search(between: nn.Module, way: str) -> None:
    assert found(cnn(between), IMAGES, way) == ()


@every_way
def test_layers_whose_channels_are_on_different_axes_are_no_neighbours(way: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.Linear(9, 16), nn.Linear(16, 12))
    assert found(model, IMAGES, way) == (Pair("1", "2"),)


@every_way
def test_grouped_convolutions_take_no_order_over(way: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3, groups=12), nn.Conv2d(24, 16, 1))
    assert found(model, IMAGES, way) == ()
    several = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 48, 3, groups=24), nn.Conv2d(48, 16, 1))
    assert found(several, IMAGES, way) == ()


@every_way
def test_a_depthwise_convolution_between_is_named(way: str) -> None:
    middle = (nn.BatchNorm2d(24), nn.ReLU6(), nn.Conv2d(24, 24, 3, groups=24, bias=False), nn.BatchNorm2d(24))
    assert found(cnn(*middle), IMAGES, way) == (Pair("0", "5", ("1", "3", "4")),)
    twice = nn.Conv2d(24, 24, 3, padding=1, groups=24)
    assert found(cnn(twice, nn.ReLU(), twice), IMAGES, way) == ()


@every_way
@pytest.mark.parametrize(
    "between",
    [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(4), nn.ZeroPad2d(1), nn.ZeroPad2d((0, 1, 0, 1))],
)
def test_what_works_on_the_positions_of_each_channel_keeps_them_apart(between: nn.Module, way: str) -> None:
    assert found(cnn(nn.ReLU(), between), IMAGES, way) == (Pair("0", "3"),)


@every_way
def test_pooling_or_padding_along_the_channels_ends_the_search(way: str) -> None:
    for between in (nn.MaxPool1d(1), nn.AdaptiveAvgPool1d(24), nn.ZeroPad1d((0, 0))):
        rows = nn.Sequential(nn.Linear(12, 24), between, nn.Linear(24, 16))
        assert found(rows, torch.randn(2, 5, 12), way) == ()
    assert found(cnn(nn.ZeroPad3d((0, 0, 0, 0, 2, -2))), IMAGES, way) == ()


# Who may see the channels


class Wrapped(nn.Module):
    """fc1 and its activation in a module of their own, fc2 in another, as transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(12, 24), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(24, 16), nn.LayerNorm(16))

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.second(self.first(x))
        return answer


@every_way
def test_channels_may_leave_a_module_with_one_layer(way: str) -> None:
    assert found(Wrapped(), X, way) == (Pair("first.0", "second.0"),)


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 24), nn.Linear(24, 16)])
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        answer: Tensor = self.head(x)
        return answer


@every_way
def test_channels_do_not_leave_a_list_that_can_be_called(way: str) -> None:
    class Part(nn.ModuleList):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self:
                x = torch.relu(layer(x))
            return x

    two = nn.Sequential(Part([nn.Linear(12, 24), nn.Linear(24, 16)]), Part([nn.Linear(16, 20), nn.Linear(20, 4)]))
    assert found(two, X, way) == (Pair("0.0", "0.1"), Pair("1.0", "1.1"))


@every_way
def test_channels_may_leave_a_list_of_layers_which_nobody_can_call(way: str) -> None:
    assert found(Listed(), X, way) == (Pair("layers.0", "layers.1"), Pair("layers.1", "head"))


@every_way
@pytest.mark.parametrize("part", ["first", "second"])
def test_channels_do_not_leave_or_enter_a_part_with_several_layers(part: str, way: str) -> None:
    """People call a backbone or a head by itself."""
    model = Wrapped()
    if part == "first":
        model.first = nn.Sequential(nn.Linear(12, 18), nn.Linear(18, 24), nn.ReLU())
        inside = Pair("first.0", "first.1")
    else:
        model.second = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 12))
        inside = Pair("second.0", "second.1")
    assert found(model, X, way) == (inside,)


@every_way
@pytest.mark.parametrize("watched", ["first", "first.0", "first.1", "second", "second.0"])
@pytest.mark.parametrize("before", [True, False])
def test_channels_that_a_hook_sees_stay_in_order(watched: str, before: bool, way: str) -> None:
    model = Wrapped()
    module = model.get_submodule(watched)
    if before:
        module.register_forward_pre_hook(lambda *_: None)
    else:
        module.register_forward_hook(lambda *_: None)
    assert found(model, X, way) == ()


@every_way
def test_a_hook_around_both_layers_sees_nothing_new(way: str) -> None:
    model = nn.Sequential(Wrapped(), nn.Identity())
    model[0].register_forward_hook(lambda *_: None)
    assert found(model, X, way) == (Pair("0.first.0", "0.second.0"),)


def test_observation_sees_no_graph_and_finds_no_pair() -> None:
    assert found(Between(ELEMENTWISE["relu"]), X, "observation") == ()


def test_a_model_that_is_one_layer_has_no_pair() -> None:
    assert found(nn.Linear(12, 16), X) == ()


# Layers that only a ReLU reads


def rectified(model: nn.Module, x: Tensor, way: str = "torch.export") -> tuple[tuple[str, str], ...]:
    return captured(model, x, way).rectified


BEFORE_RELU: dict[str, Callable[[Any, Tensor], Any]] = {
    "method": lambda m, h: h.relu(),
    "function": lambda m, h: F.relu(h),
    "torch's function": lambda m, h: torch.relu(h),
    "function in place": lambda m, h: F.relu(h, inplace=True),
    "method in place": lambda m, h: h.relu_(),
    "module": lambda m, h: m.part(h),
    "read twice behind it": lambda m, h: 2 * h.relu(),
}
NOT_BEFORE_RELU: dict[str, Callable[[Any, Tensor], Any]] = {
    "relu6": lambda m, h: F.relu6(h),
    "gelu": lambda m, h: F.gelu(h),
    "leaky": lambda m, h: F.leaky_relu(h),
    "scaled first": lambda m, h: (2 * h).relu(),
    "read beside it": lambda m, h: h.relu() + h,
    "read by its own gate": lambda m, h: h.relu() * h.sigmoid(),
    "read before it in place": lambda m, h: h.abs() + h.relu_(),
    "two relus": lambda m, h: h.relu() + F.relu(h - 0),
    "layer norm": lambda m, h: F.layer_norm(h, (24,)).relu(),
}


@every_way
@pytest.mark.parametrize("what", BEFORE_RELU.values(), ids=BEFORE_RELU)
def test_a_layer_that_only_a_relu_reads_is_found(what: Any, way: str) -> None:
    assert rectified(Between(what, part=nn.ReLU(inplace=True)), X, way) == (("fc1", ""),)


@every_way
@pytest.mark.parametrize("what", NOT_BEFORE_RELU.values(), ids=NOT_BEFORE_RELU)
def test_a_layer_that_something_else_reads_is_not_found(what: Any, way: str) -> None:
    assert rectified(Between(what), X, way) == ()


@every_way
@pytest.mark.parametrize("kind", [Residual, ReadsItself, Twice])
def test_mixed_streams_and_layers_that_run_twice_are_not_found(kind: Any, way: str) -> None:
    expected = (("fc1", ""),) if kind is Residual else ()  # what is added comes behind the ReLU
    assert rectified(kind(None), X, way) == expected


@every_way
def test_an_answer_of_the_model_is_no_secret_of_a_relu(way: str) -> None:
    assert rectified(TwoReaders(lambda m, h: h), X, way) == (("fc1", ""),)

    class Returned(Between):
        def forward(self, x: Tensor) -> Any:
            h = self.fc1(x)
            return self.fc2(h.relu()), h

    assert rectified(Returned(None), X, way) == ()


@every_way
def test_a_batch_norm_in_evaluation_mode_may_lie_between_and_is_named(way: str) -> None:
    assert rectified(cnn(nn.BatchNorm2d(24), nn.ReLU()), IMAGES, way) == (("0", "1"),)
    assert rectified(cnn(nn.BatchNorm2d(24, affine=False), nn.ReLU(inplace=True)), IMAGES, way) == (("0", "1"),)
    assert rectified(cnn(nn.ReLU(), nn.BatchNorm2d(24)), IMAGES, way) == (("0", ""),)
    rows = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 16))
    assert rectified(rows, X, way) == (("0", "1"),)


@every_way
@pytest.mark.parametrize(
    "between",
    [
        (nn.BatchNorm2d(24),),
        (nn.BatchNorm2d(24), nn.ReLU6()),
        (nn.BatchNorm2d(24), nn.BatchNorm2d(24), nn.ReLU()),
        (nn.BatchNorm2d(24, track_running_stats=False), nn.ReLU()),
        (nn.GroupNorm(3, 24), nn.ReLU()),
        (nn.MaxPool2d(2), nn.ReLU()),
    ],
    ids=["no relu", "relu6", "two norms", "batch statistics", "group norm", "pooling"],
)
def test_whatever_else_lies_between_layer_and_relu_ends_the_search(between: tuple[nn.Module, ...], way: str) -> None:
    assert rectified(cnn(*between), IMAGES, way) == ()


@every_way
def test_a_norm_along_another_axis_or_used_twice_is_not_taken_for_the_layers(way: str) -> None:
    tokens = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(24, 16))
    assert rectified(tokens, torch.randn(2, 5, 12), way) == ()
    norm = nn.BatchNorm2d(24)
    assert rectified(cnn(norm, nn.ReLU(), nn.Conv2d(24, 24, 1), norm, nn.ReLU()), IMAGES, way) == ()


@every_way
def test_a_residual_block_has_one_layer_that_only_its_relu_reads(way: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.norm1 = nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24)
            self.conv2, self.norm2 = nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Any:
            return self.relu(self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x))))) + x)

    assert rectified(Block(), torch.randn(2, 24, 9, 9), way) == (("conv1", "norm1"),)


@every_way
@pytest.mark.parametrize("watched", ["0", "1"])
def test_outputs_that_a_hook_sees_are_not_the_relus_alone(watched: str, way: str) -> None:
    model = cnn(nn.BatchNorm2d(24), nn.ReLU())
    model.get_submodule(watched).register_forward_hook(lambda *_: None)
    assert rectified(model, IMAGES, way) == ()


def test_observation_knows_of_no_relu() -> None:
    assert rectified(Between(BEFORE_RELU["method"]), X, "observation") == ()
