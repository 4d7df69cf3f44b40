"""What only some sketched layers do, or only their constructors; contract/test_layers.py has what all of them do."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panther import chains
from panther.nn import SKConv1d, SKConv2d, SKConv3d, SKLinear
from panther.nn.base import Shape, largest_rank_that_pays, ranks_for
from panther.nn.factor import compose, factorise, full_ranks
from panther.nn.weight import DenseWeight


def inputs(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(2))


def random_basis(**options: Any) -> SKLinear:
    torch.manual_seed(0)
    return SKLinear(40, 48, num_terms=3, low_rank=2, basis="random", **options)


# --- sizes and warnings


def test_a_linear_layer_holds_the_numbers_of_the_formula() -> None:
    layer = SKLinear(96, 64, num_terms=2, low_rank=8)
    assert (layer.rank, layer.num_terms, layer.low_rank, layer.active_terms) == (32, 2, 8, 2)
    assert (tuple(layer.down.shape), tuple(layer.up.shape)) == ((32, 96), (64, 32))
    assert layer.down.numel() + layer.up.numel() == 2 * 2 * 8 * (96 + 64)


def test_a_layer_larger_than_dense_warns_and_still_works() -> None:
    with pytest.warns(UserWarning, match=re.escape("17,024 weights; nn.Linear would be smaller: 2,560")) as caught:
        layer = SKLinear(256, 10, num_terms=2, low_rank=16)
    assert "It pays up to rank 9, that is num_terms*low_rank <= 4." in str(caught[0].message)
    assert caught[0].filename == __file__
    assert layer(inputs(3, 256)).shape == (3, 10)


def test_the_warning_names_the_place_that_asked_for_the_layer() -> None:
    with pytest.warns(UserWarning, match=r"nn\.Conv1d would be smaller") as caught:
        SKConv1d(4, 4, 3, num_terms=2, low_rank=4)
    with pytest.warns(UserWarning, match=r"nn\.Linear would be smaller") as caught_too:
        SKLinear.from_dense(nn.Linear(8, 8), rank=5)
    assert caught[0].filename == caught_too[0].filename == __file__


@pytest.mark.parametrize(("size", "text"), [((3, 1), "No rank pays."), ((3, 2), "It pays at rank 1 only")])
def test_the_warning_says_when_hardly_any_rank_pays(size: tuple[int, int], text: str) -> None:
    with pytest.warns(UserWarning, match=text):
        SKLinear(*size, num_terms=1, low_rank=1)


def test_a_layer_as_large_as_dense_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SKLinear(64, 64, num_terms=1, low_rank=16)
        SKConv2d(16, 16, 3, num_terms=1, low_rank=4)


@pytest.mark.parametrize("scheme", chains.CONV_SCHEMES)
def test_the_largest_rank_that_pays_is_the_largest(scheme: str) -> None:
    shape = Shape(24, 40, (3, 5), (1, 1), (0, 0), (1, 1))
    rank = largest_rank_that_pays(scheme, shape)

    def held(r: int) -> int:
        return sum(link.params for link in chains.links(scheme, shape, ranks_for(scheme, shape, r)))

    assert held(rank) <= shape.params < held(rank + 1)


MAKERS: dict[str, Callable[..., nn.Module]] = {
    "SKLinear": lambda **size: SKLinear(64, 64, **size),
    "SKConv1d": lambda **size: SKConv1d(64, 64, 3, **size),
    "SKConv2d": lambda **size: SKConv2d(16, 16, 3, **size),
    "SKConv3d": lambda **size: SKConv3d(8, 8, 3, **size),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("which", ["num_terms", "low_rank"])
def test_wrong_sizes_are_named(name: str, which: str) -> None:
    size = {"num_terms": 1, "low_rank": 1}
    for value in (0, -3):
        with pytest.raises(ValueError, match=re.escape(f"{name}({which}={value}): expected an integer of at least 1")):
            MAKERS[name](**{**size, which: value})
    for wrong in (4.0, "4", None, True, 2.5):
        with pytest.raises(TypeError, match=re.escape(f"{name}({which}={wrong!r}): expected an integer")):
            MAKERS[name](**{**size, which: wrong})


@pytest.mark.parametrize("name", MAKERS)
def test_any_kind_of_integer_is_taken(name: str) -> None:
    layer: Any = MAKERS[name](num_terms=np.int64(1), low_rank=torch.tensor(2))
    assert (type(layer.num_terms), type(layer.low_rank), layer.rank) == (int, int, 4)
    json.dumps(layer.config())


# --- initial weights

WIDE: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "learned": (lambda: SKLinear(512, 512, 2, 16), lambda: nn.Linear(512, 512), (64, 512)),
    "random": (lambda: SKLinear(512, 512, 2, 16, basis="random"), lambda: nn.Linear(512, 512), (64, 512)),
    **{
        scheme: (
            lambda scheme=scheme: SKConv2d(64, 64, 3, 1, 8, scheme=scheme),  # type: ignore[misc]
            lambda: nn.Conv2d(64, 64, 3),
            (8, 64, 10, 10),
        )
        for scheme in chains.CONV_SCHEMES
    },
}


@pytest.mark.parametrize("kind", WIDE)
def test_outputs_vary_as_much_as_those_of_a_new_dense_layer(kind: str) -> None:
    make, make_dense, size = WIDE[kind]
    x = inputs(*size)
    torch.manual_seed(0)
    ratios = [float((make()(x).var() / make_dense()(x).var()).detach()) for _ in range(8)]
    # The weight of a rank-16 chain has few random numbers, so single layers vary by 20 %; eight of them average that.
    assert 0.8 < sum(ratios) / len(ratios) < 1.25


def test_new_layers_follow_torchs_seed() -> None:
    def made(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return SKLinear(32, 32, 1, 4).weight

    assert torch.equal(made(1), made(1))
    assert not torch.equal(made(1), made(2))


# --- basis="random"


def test_the_random_basis_computes_the_formula_of_the_paper() -> None:
    layer, x = random_basis(), inputs(5, 40)
    for active in (1, 2, 3):
        layer.active_terms = active
        terms = [(x @ layer.s1[i].T) @ layer.u1[:, i].T + (x @ layer.u2[i].T) @ layer.s2[:, i].T for i in range(active)]
        assert layer.bias is not None
        wanted = layer.bias + sum(terms) / (2 * active)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.to_dense()(x), wanted, rtol=1e-5, atol=1e-5)


def test_the_random_basis_trains_and_stores_half_the_numbers() -> None:
    layer = random_basis()
    assert sum(p.numel() for p in layer.parameters()) == 3 * 2 * (40 + 48) + 48
    assert set(layer.state_dict()) == {"s1", "s2", "bias"}
    assert {name for name, _ in layer.named_buffers()} == {"u1", "u2"}


def test_the_random_basis_is_rebuilt_from_its_seed() -> None:
    layer, x = random_basis(seed=7), inputs(4, 40)
    again = SKLinear.from_config(json.loads(json.dumps(layer.config())))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    assert not torch.equal(random_basis(seed=8).u1, layer.u1)
    torch.manual_seed(99)  # torch's own generator plays no part
    assert torch.equal(SKLinear(40, 48, 3, 2, basis="random", seed=7).u2, layer.u2)


def test_more_terms_begin_with_the_same_random_bases() -> None:
    few, many = SKLinear(40, 48, 2, 2, basis="random"), SKLinear(40, 48, 5, 2, basis="random")
    assert torch.equal(many.u1[:, :2], few.u1)
    assert torch.equal(many.u2[:2], few.u2)


def test_random_bases_are_scaled_signs() -> None:
    layer = SKLinear(300, 200, 1, 4, basis="random")
    for basis in (layer.u1, layer.u2):
        assert set(basis.unique().tolist()) == {-0.5, 0.5}
        assert abs(float(basis.mean())) < 0.1


def test_random_bases_survive_copies_moves_and_an_empty_start() -> None:
    layer, x = random_basis(seed=3), inputs(4, 40)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert copy.deepcopy(layer).double().u1.dtype == torch.float64
    with torch.device("meta"):
        empty = SKLinear(40, 48, 3, 2, basis="random", seed=3)
    assert empty.u1.is_meta
    empty.to_empty(device="cpu").reset_parameters()
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x))
    other = SKLinear(40, 48, 3, 2, basis="random", seed=3)
    other.load_state_dict(copy.deepcopy(layer).double().state_dict(), assign=True)
    assert torch.equal(other(x.double()), copy.deepcopy(layer).double()(x.double()))


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch.export's own use of its deprecated class
def test_the_random_basis_compiles_exports_and_trains() -> None:
    layer, x = random_basis(), inputs(6, 40)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    exported = torch.export.export(layer.eval(), (x,))
    torch.testing.assert_close(exported.module()(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    before = layer.u1.clone()
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    first = layer(x).square().mean()
    first.backward()
    optimiser.step()
    assert float(layer(x).square().mean().detach()) < float(first.detach())
    assert torch.equal(layer.u1, before)


def test_a_random_basis_with_a_partial_term_is_refused() -> None:
    config = random_basis().config()
    with pytest.raises(ValueError, match="multiple of 2 \\* low_rank"):
        SKLinear.from_config({**config, "ranks": [11]})


def test_unknown_bases_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one of 'learned', 'random'"):
        SKLinear(64, 64, 1, 4, basis="fixed")
    with pytest.raises(ValueError, match="random bases are SKLinear's"):
        SKConv2d(16, 16, 3, 1, 2, basis="random")
    with pytest.raises(ValueError, match="seed=-1"):
        SKLinear(64, 64, 1, 4, basis="random", seed=-1)


# --- the weight, which is multiplied out only when its values are used


class ReadsDtype(nn.Module):
    """Reads the dtype of a weight before it calls the layer, as T5's feed-forward layers do."""

    def __init__(self, wo: nn.Module) -> None:
        super().__init__()
        self.wo = wo

    def forward(self, x: Tensor) -> Tensor:
        if self.wo.weight.dtype not in (x.dtype, torch.int8):
            x = x.to(self.wo.weight.dtype)
        y: Tensor = self.wo(x)
        return y


def small() -> SKLinear:
    torch.manual_seed(0)
    return SKLinear(24, 16, num_terms=1, low_rank=4)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets longer with every product of factors."""
    made: list[int] = []
    monkeypatch.setattr("panther.nn.base.compose", lambda weights: made.append(1) or compose(weights))
    return made


@pytest.mark.parametrize("basis", ["learned", "random"])
def test_a_forward_that_reads_the_dtype_multiplies_nothing_out(basis: str, products: list[int]) -> None:
    layer = SKLinear(24, 16, 1, 4, basis=basis)
    x = inputs(3, 24)
    assert torch.equal(ReadsDtype(layer)(x.double()), layer(x))
    assert products == []


def test_a_compiled_or_exported_forward_that_reads_the_dtype_holds_no_product(products: list[int]) -> None:
    model, x = ReadsDtype(small()), inputs(3, 24)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x.double()), model(x))
    products.clear()
    exported = torch.export.export(model, (x.double(),))
    assert products == []
    torch.testing.assert_close(exported.module()(x.double()), model(x))


class Multiplies(ReadsDtype):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.wo.weight)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_a_traced_compiled_or_exported_use_of_the_values_is_right() -> None:
    model, x = Multiplies(small()), inputs(3, 24)
    wanted = F.linear(x, compose(model.wo.active_weights()))
    torch._dynamo.reset()
    for made in (
        torch.compile(model, fullgraph=True, backend="aot_eager"),
        torch.export.export(model, (x,)).module(),
        torch.jit.trace(model, x),
    ):
        torch.testing.assert_close(made(x), wanted)


def test_every_kind_of_use_gets_the_values() -> None:
    layer, x = small(), inputs(3, 24)
    plain = compose(layer.active_weights())
    uses: list[Callable[[Tensor], Any]] = [
        *(repr, str, list, Tensor.tolist, Tensor.detach, Tensor.clone, Tensor.double, Tensor.sum, Tensor.t),
        *(lambda w: w.T, lambda w: w[3], lambda w: w[:, 1:4], lambda w: w.data.norm(), lambda w: w.to(torch.bfloat16)),
        *(lambda w: w @ x.T, lambda w: x @ w.T, lambda w: F.linear(x, w), lambda w: torch.cat([w, w]), lambda w: w > 0),
        *(lambda w: torch.einsum("oi,bi->bo", w, x), lambda w: torch.add(input=w, other=1), lambda w: 2 - w),
        *(lambda w: np.asarray(w.detach()).tolist(), lambda w: w.detach().numpy().tolist(), lambda w: w.view(-1)),
        *(lambda w: torch.zeros(16, 24).copy_(w), torch.linalg.svdvals, lambda w: torch.stack(w.unbind())),
    ]
    for use in uses:
        got, wanted = use(layer.weight), use(plain)
        assert type(got) is type(wanted)
        for one, other in zip(*((v if isinstance(v, list) else [v]) for v in (got, wanted)), strict=True):
            assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
            assert not isinstance(one, DenseWeight)


def test_code_that_goes_past_torchs_overrides_gets_the_values_too() -> None:
    layer = small()
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.equal(layer.weight + 1, layer.to_dense().weight + 1)
        with pytest.raises(RuntimeError, match="cannot apply add_ in place"):
            layer.weight.add_(1)


def test_data_is_detached_and_follows_the_layer() -> None:
    layer = small()
    weight, data = layer.weight, layer.weight.data
    assert weight.sum().requires_grad
    assert not data.sum().requires_grad
    kept = weight.clone()
    with torch.no_grad():
        layer.down *= 2
    assert torch.equal(weight, 2 * kept)
    assert torch.equal(data, 2 * kept)


def _subtract(weight: Tensor) -> None:
    weight -= 1


def _assign(weight: Tensor) -> None:
    weight[0] = 1


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "normal_": Tensor.normal_,
    "__isub__": _subtract,
    "__setitem__": _assign,
    "out": lambda w: torch.add(torch.ones(16, 24), 1, out=w),
    "inplace": lambda w: F.relu(w, inplace=True),
    "foreach": lambda w: torch._foreach_mul_([w], 2),
    "nn.init": nn.init.xavier_uniform_,
    "aten": lambda w: torch.ops.aten.add_(w, 1),
    "requires_grad": lambda w: setattr(w, "requires_grad", False),
    "requires_grad_": lambda w: w.requires_grad_(requires_grad=False),
    "data =": lambda w: setattr(w, "data", torch.ones(16, 24)),
    "grad =": lambda w: setattr(w, "grad", torch.ones(16, 24)),
}


@pytest.mark.parametrize("name", WRITES)
def test_writing_to_the_weight_is_refused(name: str) -> None:
    layer = small()
    for weight in (layer.weight, layer.weight.data):
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"would be lost. Change layer.parameters\(\)"):
            WRITES[name](weight)


def test_writing_the_weight_into_another_tensor_is_not_refused() -> None:
    layer, other = small(), torch.zeros(16, 24)
    other += layer.weight.data
    other.add_(layer.weight.data)
    other[0] = layer.weight.data[0]
    torch.testing.assert_close(other[1:], 2 * layer.weight.detach()[1:])


def test_weights_that_a_module_keeps_are_copied_with_their_layer_and_pickled_as_values() -> None:
    holder = nn.Sequential(small())
    holder.kept, holder.kept_data = holder[0].weight, holder[0].weight.data
    copied = copy.deepcopy(holder)
    with torch.no_grad():
        copied[0].down.zero_()
    assert not copied.kept.any() and not copied.kept_data.any()
    assert holder.kept.all()
    buffer = io.BytesIO()
    torch.save({"kept": holder.kept, "data": holder.kept_data}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert type(loaded["kept"]) is Tensor
    assert torch.equal(loaded["kept"], holder.kept) and torch.equal(loaded["data"], holder.kept)
    again = pickle.loads(pickle.dumps(holder))  # noqa: S301  # our own bytes
    assert torch.equal(again.kept, holder.kept)
    assert set(holder.state_dict()) == {"0.down", "0.up", "0.bias"}


def test_the_weight_follows_moves_functional_calls_and_parametrizations() -> None:
    layer, x = small(), inputs(3, 24)
    assert copy.deepcopy(layer).to("meta").weight.is_meta
    assert copy.deepcopy(layer).half().weight.dtype == torch.float16
    model = Multiplies(layer)
    parameters = {name: 2 * value.detach() for name, value in model.named_parameters()}
    called = torch.func.functional_call(model, parameters, (x,))
    torch.testing.assert_close(called, 4 * model(x))
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(parameters)
    assert gradients["wo.down"].any()
    before = layer.weight.detach()
    torch.nn.utils.parametrize.register_parametrization(layer, "down", Doubled())
    torch.testing.assert_close(layer.weight.detach(), 2 * before)
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


# --- terms at run time


def test_terms_are_views_of_the_parameters() -> None:
    layer = SKLinear(64, 64, 2, 4)
    layer.active_terms = 1
    down, up = layer.active_weights()
    assert (tuple(down.shape), tuple(up.shape)) == ((8, 64), (64, 8))
    assert down.data_ptr() == layer.down.data_ptr()
    assert up.data_ptr() == layer.up.data_ptr()
    assert tuple(layer.down.shape) == (16, 64)
    assert "active_terms=1" in repr(layer)


def test_a_compiled_layer_follows_its_active_terms() -> None:
    layer, x = SKLinear(64, 64, 2, 4), inputs(3, 64)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    whole = compiled(x)
    layer.active_terms = 1
    torch.testing.assert_close(compiled(x), layer(x))
    assert not torch.allclose(compiled(x), whole)


def test_tucker_layers_say_why_terms_cannot_be_switched() -> None:
    layer = SKConv2d(32, 32, 3, 2, 2, scheme="tucker2")
    assert (layer.ranks, layer.rank, layer.num_terms, layer.active_terms) == ((8, 8), 8, 2, 2)
    with pytest.raises(ValueError, match=r"core fitted to both.*scheme='output_channel'"):
        layer.active_terms = 1


# --- convolutions


def test_the_constructor_takes_what_the_dense_constructor_takes() -> None:
    sizes: dict[str, Any] = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "padding_mode": "circular"}
    layer = SKConv2d(32, 64, (3, 5), 1, 4, bias=False, **sizes)
    dense = nn.Conv2d(32, 64, (3, 5), bias=False, **sizes)
    assert repr(layer.to_dense()) == repr(dense)
    assert layer(inputs(2, 32, 9, 12)).shape == dense(inputs(2, 32, 9, 12)).shape
    assert (layer.in_features, layer.out_features, layer.groups) == (32, 64, 1)


def test_a_sketched_convolution_is_a_geometry_for_chains() -> None:
    layer = SKConv2d(32, 64, 3, 1, 4, padding=1, scheme="input_channel")
    wanted = [link.weight_shape for link in chains.links(layer.scheme, layer, layer.ranks)]
    assert [tuple(weight.shape) for weight in layer.active_weights()] == wanted


def test_grouped_convolutions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"SKConv1d\(groups=4\): only groups=1"):
        SKConv1d(16, 16, 3, 1, 2, groups=4)
    with pytest.raises(ValueError, match=r"SKConv2d\(groups=8\): only groups=1"):
        SKConv2d.from_dense(nn.Conv2d(8, 8, 3, groups=8), rank=1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scheme": "spatial"}, "no scheme 'spatial' for a 1-d convolution"),
        ({"padding": "full"}, "padding='full'"),
        ({"padding": -1}, "padding=-1"),
        ({"padding": "same", "stride": 2}, "'same' needs stride 1"),
        ({"padding_mode": "mirror"}, "padding_mode='mirror'"),
        ({"stride": (1, 2)}, "expected one integer or 1 of them"),
        ({"dilation": 0}, "dilation=0"),
    ],
)
def test_impossible_convolutions_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SKConv1d(32, 32, 3, 1, 4, **options)


def test_tucker_takes_two_ranks_and_no_more_than_the_channels() -> None:
    dense = nn.Conv2d(6, 20, 3)
    assert SKConv2d.from_dense(dense, rank=(3, 5), scheme="tucker2").ranks == (3, 5)
    assert SKConv2d.from_dense(dense, rank=8, scheme="tucker2").ranks == (6, 8)
    assert SKConv2d(6, 20, 3, 2, 2, scheme="tucker2").ranks == (6, 8)
    with pytest.raises(ValueError, match=r"scheme 'output_channel' has 1 rank"):
        SKConv2d.from_dense(dense, rank=(3, 5))


# --- from_dense


def test_the_error_is_that_of_the_best_approximation() -> None:
    dense = nn.Linear(40, 30)
    singular = torch.linalg.svdvals(dense.weight.detach().double())
    for rank in (1, 7, 15):
        error = (SKLinear.from_dense(dense, rank=rank).weight - dense.weight).detach().norm()
        assert math.isclose(float(error), float(singular[rank:].norm()), rel_tol=1e-5)


def test_ranks_beyond_the_full_one_are_cut_unless_they_were_named_by_terms() -> None:
    dense = nn.Linear(24, 16)
    with pytest.warns(UserWarning, match="would be smaller"):
        assert SKLinear.from_dense(dense, rank=500).rank == 16
    with pytest.warns(UserWarning, match="would be smaller"):
        asked = SKLinear.from_dense(dense, num_terms=3, low_rank=4)
    assert (asked.rank, asked.num_terms) == (24, 3)
    x = inputs(5, 24)
    torch.testing.assert_close(asked(x), dense(x), rtol=1e-5, atol=1e-5)
    asked.active_terms = 2
    torch.testing.assert_close(asked(x), dense(x), rtol=1e-5, atol=1e-5)


def test_factors_share_the_norm_equally() -> None:
    layer = SKLinear.from_dense(nn.Linear(64, 64), rank=8)
    torch.testing.assert_close(layer.down.norm(dim=1), layer.up.norm(dim=0))


def test_a_bias_can_be_added_to_a_layer_that_had_none() -> None:
    dense = nn.Linear(12, 9, bias=False)
    dense.weight.requires_grad_(requires_grad=False)
    layer = SKLinear.from_factors(dense, chains.LINEAR, [torch.ones(2, 12), torch.ones(9, 2)], torch.ones(9))
    assert layer.bias is not None
    assert not layer.bias.requires_grad
    assert torch.equal(layer(torch.ones(1, 12)), torch.full((1, 9), 25.0))


def test_factors_that_overflow_the_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match=r"NaN or Inf.*float16"):
        SKLinear.from_factors(
            nn.Linear(4, 4).half(), chains.LINEAR, [torch.full((1, 4), 1e6), torch.ones(4, 1)], bias=None
        )


def test_weights_of_another_number_than_the_scheme_has_are_refused() -> None:
    for number in (0, 1, 3):
        with pytest.raises(
            ValueError, match=rf"scheme='output_channel'\): expected the weights of 2 links, got {number}"
        ):
            SKConv1d.from_factors(nn.Conv1d(4, 4, 3), "output_channel", [torch.ones(2, 4, 1)] * number, bias=None)


# --- the factorisation itself


@pytest.mark.parametrize("scheme", chains.CONV_SCHEMES)
def test_an_exactly_low_rank_weight_is_found_again(scheme: str) -> None:
    shape = Shape(7, 9, (3, 4), (1, 1), (0, 0), (1, 1))
    generator = torch.Generator().manual_seed(0)
    links = chains.links(scheme, shape, (2, 3))
    weight = compose([torch.randn(link.weight_shape, generator=generator, dtype=torch.float64) for link in links])
    found = compose(factorise(scheme, shape, weight, (2, 3)))
    torch.testing.assert_close(found, weight, rtol=1e-9, atol=1e-9)


def test_tucker_is_at_least_as_good_as_its_start() -> None:
    weight = torch.randn(10, 12, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shape = Shape(12, 10, (3, 3), (1, 1), (0, 0), (1, 1))
    outputs = torch.linalg.svd(weight.flatten(1))[0][:, :4]
    ins = torch.linalg.svd(weight.transpose(0, 1).flatten(1))[0][:, :5]
    start = torch.einsum("oikl,op,iq->pqkl", weight, outputs @ outputs.T, ins @ ins.T)
    found = compose(factorise("tucker2", shape, weight, (5, 4)))
    assert float((found - weight).norm()) < float((start - weight).norm())


def test_full_ranks_are_those_of_the_unfolded_weight() -> None:
    shape = Shape(4, 100, (3, 5), (1, 1), (0, 0), (1, 1))
    wanted = {"output_channel": (60,), "input_channel": (4,), "spatial": (12,), "tucker2": (4, 60)}
    assert {scheme: full_ranks(scheme, shape) for scheme in chains.CONV_SCHEMES} == wanted
