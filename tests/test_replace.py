from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from panther.batches import Call
from panther.capture import capture
from panther.decompose import candidates, decompose
from panther.factors import Factors
from panther.nn import LAYERS, SKETCHED, SKConv2d, SKLinear
from panther.replace import replace, sketched_layer
from panther.spec import Choice, Plan


class Net(nn.Module):
    """A convolution, a layer under two names, a tied pair, a buffer, and a custom method."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 16)
        self.again = self.fc
        self.embed, self.head = nn.Embedding(7, 16), nn.Linear(16, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.norm(self.conv(x)).mean((2, 3))
        answer: Tensor = self.head(self.fc(pooled))
        return answer

    def describe(self) -> str:
        return "still here"


def factors_of(model: nn.Module, call: Call) -> dict[str, Factors]:
    specs = capture(model, call).sketchable
    return {spec.name: decompose(model.get_submodule(spec.name), spec, None) for spec in specs}


def plan_for(factors: dict[str, Factors], place: int = 0, **left_dense: bool) -> Plan:
    choices = []
    for name, options in ((name, candidates(f, 4)) for name, f in factors.items()):
        choices.append(options[-1] if left_dense.get(name) else options[place])
    return Plan(tuple(choices))


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net() -> Net:
    model = Net().eval()
    model.norm.running_mean.uniform_()  # type: ignore[union-attr]
    return model


def test_every_layer_class_stands_for_its_dense_one() -> None:
    assert set(SKETCHED.values()) == {layer for layer in LAYERS.values() if layer.PACKING == "two_gemm"}
    assert SKETCHED[nn.Linear] is SKLinear and SKETCHED[nn.Conv2d] is SKConv2d


def test_the_planned_layers_are_sketched_and_no_other(net: Net) -> None:
    factors = factors_of(net, Call((X,)))
    assert set(factors) == {"conv", "fc"}
    built = replace(net, factors, plan_for(factors, fc=True))
    assert type(built) is Net
    assert isinstance(built.conv, SKConv2d) and type(built.fc) is nn.Linear and type(built.head) is nn.Linear


def test_the_layers_have_the_scheme_and_ranks_of_the_plan(net: Net) -> None:
    factors = factors_of(net, Call((X,)))
    for place in (0, 1, -2):
        plan = plan_for(factors, place)
        built = replace(net, factors, plan)
        for choice in plan.sketched:
            layer = built.get_submodule(choice.layer)
            assert (layer.scheme, layer.ranks) == (choice.scheme, choice.ranks)


def test_the_model_itself_is_not_touched(net: Net) -> None:
    factors = factors_of(net, Call((X,)))
    before, modules = copy.deepcopy(net.state_dict()), dict(net.named_modules())
    built = replace(net, factors, plan_for(factors))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.zero_()
        built.norm.running_mean.zero_()  # type: ignore[operator, union-attr]
    assert dict(net.named_modules()) == modules
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_names_of_all_other_tensors_stay(net: Net) -> None:
    factors = factors_of(net, Call((X,)))
    names = set(replace(net, factors, plan_for(factors)).state_dict())
    names.discard("conv.core")  # of the one scheme with three links
    assert names - set(net.state_dict()) == {"conv.down", "conv.up", "fc.down", "fc.up", "again.down", "again.up"}
    assert set(net.state_dict()) - names == {"conv.weight", "fc.weight", "again.weight"}


def test_tied_tensors_stay_tied_and_two_names_stay_one_layer(net: Net) -> None:
    factors = factors_of(net, Call((X,)))
    built = replace(net, factors, plan_for(factors))
    assert built.head.weight is built.embed.weight and built.head.weight is not net.head.weight  # type: ignore[union-attr]
    assert built.again is built.fc and isinstance(built.fc, SKLinear)


def test_the_class_and_its_methods_stay(net: Net) -> None:
    factors = factors_of(net, Call((X,)))
    built = replace(net, factors, plan_for(factors))
    assert isinstance(built, Net) and built.describe() == "still here"


def test_training_flags_stay_layer_by_layer(net: Net) -> None:
    net.train()
    net.fc.eval()
    factors = factors_of(net, Call((X,)))
    built = replace(net, factors, plan_for(factors))
    assert built.training and built.conv.training and built.norm.training and not built.fc.training  # type: ignore[union-attr]


def test_what_is_trained_and_what_is_frozen_stays(net: Net) -> None:
    net.conv.requires_grad_(False)
    factors = factors_of(net, Call((X,)))
    built = replace(net, factors, plan_for(factors))
    assert not any(p.requires_grad for p in built.conv.parameters())  # type: ignore[union-attr]
    assert all(p.requires_grad for p in built.fc.parameters())  # type: ignore[union-attr]


def test_forward_hooks_fire_on_the_layers_that_took_over(net: Net) -> None:
    fired: list[str] = []
    net.fc.register_forward_hook(lambda module, args, output: fired.append(type(module).__name__))
    net.fc.register_forward_pre_hook(lambda module, args: fired.append("before"))
    net.register_forward_hook(lambda module, args, output: fired.append("whole"))
    factors = factors_of(net, Call((X,)))
    built = replace(net, factors, plan_for(factors))
    fired.clear()
    built(X)
    assert fired == ["before", "SKLinear", "whole"]
    fired.clear()
    net(X)
    assert fired == ["before", "Linear", "whole"]


def test_an_empty_plan_is_a_copy(net: Net) -> None:
    built = replace(net, {}, Plan(()))
    assert built is not net and torch.equal(built(X), net(X))


def test_the_largest_ranks_come_closest() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16))
    x = torch.randn(50, 16)
    factors = factors_of(model, Call((x,)))
    with torch.no_grad():
        errors = [float((replace(model, factors, plan_for(factors, i))(x) - model(x)).norm()) for i in range(7)]
    assert errors == sorted(errors, reverse=True)


def test_one_layer_has_the_dtype_geometry_and_bias_of_the_dense_one() -> None:
    dense = nn.Conv2d(4, 8, 3, stride=2, padding=2, padding_mode="reflect", dilation=1).to(torch.bfloat16)
    model = nn.Sequential(dense)
    factors = factors_of(model, Call((torch.randn(1, 4, 9, 9, dtype=torch.bfloat16),)))["0"]
    layer = sketched_layer(factors, Choice("0", "input_channel", (1,)))
    assert isinstance(layer, SKConv2d)
    assert (layer.stride, layer.padding, layer.padding_mode) == ((2, 2), (2, 2), "reflect")
    assert layer.down.dtype == torch.bfloat16 and layer.bias is not None and torch.equal(layer.bias, dense.bias)


def test_a_model_that_is_itself_one_layer_becomes_the_sketched_one() -> None:
    model = nn.Linear(16, 16)
    factors = factors_of(model, Call((torch.randn(2, 16),)))
    assert isinstance(replace(model, factors, plan_for(factors)), SKLinear)
