from __future__ import annotations

import copy
import pickle
import threading
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from panther.errors import CaptureError
from panther.nn import SKConv2d, SKLinear
from panther.nn.surgery import inherit, put_layers, with_layers


def full(layer: nn.Linear) -> SKLinear:
    """The sketched layer of full rank, which computes the same."""
    with pytest.warns(UserWarning, match="would be smaller"):
        return SKLinear.from_dense(layer, rank=min(layer.weight.shape))


def encoder_layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


# Copies


def test_a_replaced_layer_is_not_copied() -> None:
    class Uncopied(nn.Linear):
        def __deepcopy__(self, memo: object) -> nn.Linear:
            raise AssertionError("copied")

    model = nn.Sequential(Uncopied(4, 4), nn.Linear(4, 4))
    layer = SKLinear(4, 4, 1, 1)
    built = with_layers(model, {"0": layer})
    assert built[0] is layer and type(built[1]) is nn.Linear and built[1] is not model[1]  # type: ignore[index]


def test_a_layer_under_several_names_is_replaced_under_all_of_them() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "inner": nn.Sequential(nn.ReLU(), shared)})
    layer = SKLinear(4, 4, 1, 1)
    built = with_layers(model, {"a": layer})
    assert built.get_submodule("a") is built.get_submodule("inner.1") is layer
    put_layers(model, {"a": layer})
    assert model["a"] is model["inner"][1] is layer  # type: ignore[index]


def test_references_from_other_attributes_follow() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.in_a_list = [self.layer]

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.in_a_list[0](x)
            return answer

    layer = SKLinear(4, 4, 1, 1)
    built = with_layers(Holder(), {"layer": layer})
    x = torch.randn(2, 4)
    assert torch.equal(built(x), layer(x))


def test_a_name_that_the_model_does_not_have_raises() -> None:
    for put in (with_layers, put_layers):
        with pytest.raises(AttributeError, match="nowhere"):
            put(nn.Sequential(nn.Linear(4, 4)), {"nowhere": SKLinear(4, 4, 1, 1)})


def test_what_cannot_be_copied_is_shared_and_the_rest_is_not() -> None:
    model, lock = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), threading.Lock()
    model.lock, model.rows = lock, (row for row in range(3))
    model.nested = {"locks": [lock, (lock, ["own"])], "own": ["own"], "layer": model[1]}
    built: Any = with_layers(model, {"1": SKLinear(4, 4, 1, 1)})
    assert built.lock is lock and built.rows is model.rows
    assert built.nested == {"locks": [lock, (lock, ["own"])], "own": ["own"], "layer": built[1]}
    for held in ("locks", "own"):
        assert built.nested[held] is not model.nested[held]
    assert built.nested["locks"][1][1] is not model.nested["locks"][1][1]
    assert built[0] is not model[0] and torch.equal(built[0].weight, model[0].weight)


def test_tensors_that_were_computed_and_kept_are_copied_as_numbers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    kept = model[0].weight * 2
    model.register_buffer("also", kept)
    model[0].kept = [kept]
    built: Any = with_layers(model, {"1": SKLinear(4, 4, 1, 1)})
    (copied,) = built[0].kept
    assert copied is built.also and copied is not kept
    assert torch.equal(copied, kept) and not copied.requires_grad


@pytest.mark.parametrize("change", ["weight norm", "pruning", "spectral norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")  # and still in published models
def test_layers_with_a_computed_weight_are_copied(change: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if change == "weight norm":
        nn.utils.weight_norm(model[0])
    elif change == "pruning":
        prune.l1_unstructured(model[0], "weight", amount=0.5)  # type: ignore[no-untyped-call]
    else:
        nn.utils.spectral_norm(model[0])
    x = torch.randn(3, 4)
    model(x)
    model.eval()
    layer = full(model[1])
    torch.testing.assert_close(with_layers(model, {"1": layer})(x), layer(model[0](x)))


def test_a_module_that_refuses_to_be_copied_is_named() -> None:
    class Refusing(nn.Linear):
        def __deepcopy__(self, memo: object) -> nn.Linear:
            raise NotImplementedError("one of a kind")

    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), Refusing(4, 4)), nn.Linear(4, 4))
    with pytest.raises(CaptureError, match=r"Sequential cannot be copied.*'0\.1' refuses \(Not.*: one of a kind\)"):
        with_layers(model, {"1": SKLinear(4, 4, 1, 1)})


# In place


def test_in_place_the_model_stays_the_same_object_and_computes_with_the_new_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    layer = SKLinear(4, 4, 1, 1)
    x = torch.randn(3, 4)
    put_layers(model, {"0": layer})
    assert model[0] is layer and torch.equal(model(x), layer(x).relu())


def test_in_place_references_from_other_attributes_follow_through_containers() -> None:
    class Pair(NamedTuple):
        first: nn.Module
        number: int

    model, dense, layer = nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4), SKLinear(4, 4, 1, 1)
    model.append(dense)
    kept, loop = (1, 2), [dense]
    loop.append(loop)
    vars(model)["bare"] = dense
    model.nested = {"a": [dense, (dense, {"b": dense})], "pair": Pair(dense, 3)}
    model.members, model.kept, model.loop = {dense}, kept, loop
    vars(model)["unregistered"] = [nn.Sequential(dense)]
    nested, members = model.nested, model.members
    put_layers(model, {"1": layer})
    assert model[1] is model.bare is layer
    assert model.nested is nested and nested["a"] == [layer, (layer, {"b": layer})]
    assert nested["pair"] == Pair(layer, 3) and type(nested["pair"]) is Pair
    assert model.members is members and members == {layer}
    assert model.kept is kept and model.loop is loop and loop[0] is layer and loop[1] is loop
    assert model.unregistered[0][0] is layer


# What the new layer takes over


def test_hooks_and_flag_are_taken_over_and_not_shared() -> None:
    dense, layer = nn.Linear(4, 4).eval(), SKLinear(4, 4, 1, 1)
    calls: list[str] = []
    handle = dense.register_forward_hook(lambda *_: calls.append("after"))
    inherit(layer, dense)
    assert not layer.training
    layer(torch.randn(2, 4))
    assert calls == ["after"]
    handle.remove()
    layer(torch.randn(2, 4))
    assert calls == ["after", "after"]


class Grabbing(nn.Module):
    """Keeps what a layer gives in a hook that is its own method, and uses it later."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.kept = nn.Linear(4, 4), torch.zeros(4)
        self.layer.register_forward_hook(self.grab)
        self.layer.register_forward_pre_hook(self.pre, with_kwargs=True)
        self.inputs: list[Tensor] = []

    def grab(self, _layer: nn.Module, _args: object, output: Tensor) -> None:
        self.kept = output

    def pre(self, _layer: nn.Module, args: tuple[Tensor, ...], _kwargs: object) -> None:
        self.inputs.append(args[0])

    def forward(self, x: Tensor) -> Tensor:
        self.layer(x)
        return self.kept * 2


@pytest.mark.parametrize("in_place", [False, True])
def test_hooks_that_are_methods_of_the_model_belong_to_the_one_that_runs(in_place: bool) -> None:
    model, layer, x = Grabbing(), SKLinear(4, 4, 1, 1), torch.randn(2, 4)
    other = copy.deepcopy(model)
    built = other if in_place else with_layers(model, {"layer": layer})
    if in_place:
        put_layers(other, {"layer": layer})
    assert torch.equal(built(x), 2 * layer(x)) and len(built.inputs) == 2  # type: ignore[arg-type]
    assert not model.kept.any() and not model.inputs
    assert model(x).shape == (2, 4) and len(built.inputs) == 2 and len(model.inputs) == 1  # type: ignore[arg-type]


def test_a_full_backward_hook_stays_a_full_one() -> None:
    dense, layer = nn.Linear(4, 4), SKLinear(4, 4, 1, 1)
    shapes: list[torch.Size] = []
    dense.register_full_backward_hook(lambda _module, grad_input, _grad_output: shapes.append(grad_input[0].shape))
    inherit(layer, dense)
    layer(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert shapes == [torch.Size([2, 4])]


@pytest.mark.parametrize("in_place", [False, True])
def test_each_parameter_stays_as_trainable_as_the_new_layer_says(in_place: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    layer = full(model[0])
    built = model if in_place else with_layers(model, {"0": layer})
    if in_place:
        put_layers(model, {"0": layer})
    trained = {name: parameter.requires_grad for name, parameter in built.named_parameters()}
    assert trained == {"0.down": False, "0.up": False, "0.bias": True}


@pytest.mark.parametrize("in_place", [False, True])
def test_attributes_that_users_put_on_a_layer_are_taken_over(in_place: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    tags = ["first"]
    model[0].tags, model[0]._initialised = tags, True
    layer = SKLinear(4, 4, 1, 1)
    built = model if in_place else with_layers(model, {"0": layer})
    if in_place:
        put_layers(model, {"0": layer})
    assert built[0] is layer and layer.tags is tags and layer._initialised is True  # type: ignore[index]


def test_what_the_new_layer_has_already_and_what_belongs_to_the_dense_class_is_not_taken_over() -> None:
    dense = nn.Conv2d(4, 4, 3)
    dense.low_rank, dense.forward, dense.scheme = 99, print, "mine"
    layer = SKConv2d.from_dense(dense, rank=2)
    before = dict(vars(layer))
    inherit(layer, dense)
    assert set(vars(layer)) == set(before)
    assert (layer.low_rank, layer.scheme) == (before["low_rank"], before["scheme"])
    assert layer(torch.randn(1, 4, 5, 5)).shape == (1, 4, 3, 3)


def test_a_module_that_is_only_referred_to_is_not_registered() -> None:
    dense, layer = nn.Linear(4, 4), SKLinear(4, 4, 1, 1)
    vars(dense)["partner"] = nn.Linear(2, 2)
    inherit(layer, dense)
    assert layer.partner is dense.partner and not list(layer.children())


def test_a_compressed_model_with_attributes_and_hooks_copies_and_pickles() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[0].tags = ["first"]
    built = with_layers(model, {"0": SKLinear(4, 4, 1, 1)})
    x = torch.randn(3, 4)
    for other in (copy.deepcopy(built), pickle.loads(pickle.dumps(built))):  # noqa: S301  # our own bytes
        assert torch.equal(other(x), built(x)) and other[0].tags == ["first"]
        assert other[0].tags is not model[0].tags


def test_hooks_that_change_the_output_still_do() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda _module, _args, output: output + 100)
    layer = SKLinear(4, 4, 1, 1)
    assert float(with_layers(model, {"0": layer})(torch.zeros(1, 4)).detach().min()) > 50


# nn.TransformerEncoderLayer has a fused kernel that reads its layers' weights


def test_the_fused_encoder_kernel_is_not_taken_with_sketched_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(encoder_layer())
    fused: list[int] = []
    kernel = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a, **k: fused.append(1) or kernel(*a, **k))
    with torch.inference_mode():
        expected = model(X)
    assert fused == [1]  # so that this test watches the right kernel
    layer = full(model[0].linear1)
    built = with_layers(model, {"0.linear1": layer})
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        torch.testing.assert_close(built(X), expected, rtol=1e-4, atol=1e-5)
    assert calls == [1] and fused == [1]
    put_layers(model, {"0.linear1": full(model[0].linear1)})
    with torch.inference_mode():
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
    assert fused == [1]


def test_encoder_layers_without_sketched_layers_keep_their_kernel() -> None:
    model = nn.Sequential(encoder_layer(), encoder_layer())
    built = with_layers(model, {"1.linear2": full(model[1].linear2)})
    first, second = built.children()
    assert first.activation_relu_or_gelu == 1 and second.activation_relu_or_gelu == 0


def test_a_whole_encoder_with_padding_computes_the_same() -> None:
    model = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False).eval()
    layers = {
        f"layers.{i}.{n}": full(model.get_submodule(f"layers.{i}.{n}")) for i in (0, 1) for n in ("linear1", "linear2")
    }  # type: ignore[arg-type]
    built = with_layers(model, layers)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected, got = (m(X, src_key_padding_mask=padding) for m in (model, built))
    torch.testing.assert_close(got[~padding], expected[~padding], rtol=1e-4, atol=1e-5)
