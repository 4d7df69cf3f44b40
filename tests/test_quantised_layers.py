"""Layers of whole numbers: what they compute is what their numbers say, on every road from the dense layer and back."""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from panther import chains
from panther.nn import LAYERS, QUANTISED, SKETCHED, QuantisedConv2d, QuantisedLayer, QuantisedLinear, SKLinear
from panther.nn.factor import compose
from panther.nn.on_grid import CorrectedLinear, OnGrid, corrected, held, hold, is_held, let_go
from panther.quantise import to_nearest
from panther.spec import Grid

pytestmark = pytest.mark.filterwarnings("ignore:.*would be smaller:UserWarning")  # layers this small hardly pay

GRIDS = [Grid(8), Grid(4), Grid(4, 32), Grid(8, 64), Grid(3), Grid(3, 32), Grid(16)]
DENSE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(71, 9), (5, 71)),
    "linear, no bias, 3-d": (lambda: nn.Linear(40, 6, bias=False), (2, 3, 40)),
    "conv1d": (lambda: nn.Conv1d(5, 7, 3, stride=2, padding=1), (2, 5, 11)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), (2, 4, 7, 8)),
    "conv2d, reflected": (lambda: nn.Conv2d(4, 6, (3, 2), padding=1, padding_mode="reflect", bias=False), (2, 4, 7, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 4, 5, 3)),
}


def dense(name: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    build, size = DENSE[name]
    return build(), torch.randn(size, generator=torch.Generator().manual_seed(1))


def quantised(name: str, grid: Grid = GRIDS[0]) -> tuple[Any, QuantisedLayer, Tensor]:
    layer, x = dense(name)
    return layer, QUANTISED[type(layer)].from_dense(layer, bits=grid.bits, group_size=grid.group_size), x


def chain(name: str, grid: Grid = GRIDS[1]) -> tuple[Any, QuantisedLayer]:
    """A quantised layer of a chain, and the float chain whose numbers it has."""
    layer, _ = dense(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # also while tests are collected
        sketch = SKETCHED[type(layer)].from_dense(layer, rank=3)
    parts = [to_nearest(weight.detach().flatten(1), grid) for weight in sketch.active_weights()]
    new = QUANTISED[type(layer)].from_rounded(layer, sketch.scheme, parts, layer.bias)
    with torch.no_grad():
        for target, part in zip((sketch.down, sketch.up), parts, strict=True):
            target.copy_(part.matrix().reshape(target.shape))
    return sketch, new


def corrected_linear() -> tuple[CorrectedLinear, QuantisedLinear, Tensor]:
    layer, x = dense("linear")
    whole = to_nearest(layer.weight.detach(), Grid(4))
    float_layer = corrected(layer, (layer.weight - whole.matrix()).detach().double(), 2)
    factors = [to_nearest(t.detach(), Grid(8)) for t in (float_layer.down, float_layer.up)]
    new = QuantisedLinear.from_rounded(layer, chains.CORRECTED, [whole, *factors], layer.bias)
    with torch.no_grad():
        for target, part in zip((float_layer.weight, float_layer.down, float_layer.up), [whole, *factors], strict=True):
            target.copy_(part.matrix())
    return float_layer, new, x


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", DENSE)
def test_a_layer_computes_with_the_numbers_that_it_stores(name: str, grid: Grid) -> None:
    layer, small, x = quantised(name, grid)
    meant = copy.deepcopy(layer)
    meant.weight.data = to_nearest(layer.weight.detach().flatten(1), grid).matrix().reshape(layer.weight.shape)
    with torch.no_grad():
        close(small(x), meant(x))
        close(small.to_dense()(x), meant(x))
        close(small.weight.clone(), meant.weight)
    assert small.weight.shape == layer.weight.shape and small.weight.dtype == layer.weight.dtype
    in_file = sum(t.numel() * t.element_size() for t in small.stored[0].for_file().values())
    assert in_file == grid.size_bytes(*layer.weight.flatten(1).shape)


@pytest.mark.parametrize("grid", GRIDS[:2], ids=str)
@pytest.mark.parametrize("name", DENSE)
def test_a_chain_computes_with_the_numbers_that_it_stores(name: str, grid: Grid) -> None:
    sketch, small = chain(name, grid)
    x = dense(name)[1]
    with torch.no_grad():
        close(small(x), sketch(x))
        close(small.weight.clone(), compose(sketch.active_weights()))


def test_a_correction_is_added_to_the_whole_weight() -> None:
    float_layer, small, x = corrected_linear()
    with torch.no_grad():
        close(small(x), float_layer(x))
        close(small.weight.clone(), float_layer.weight + float_layer.up @ float_layer.down)
    assert [part.grid.bits for part in small.stored] == [4, 8, 8] and small.ranks == (2,)


@pytest.mark.parametrize("name", DENSE)
def test_the_input_may_be_named_as_that_of_the_dense_layer(name: str) -> None:
    _, small, x = quantised(name)
    assert torch.equal(small(input=x), small(x))


def test_the_input_of_a_float_layer_with_a_correction_may_be_named_too() -> None:
    float_layer, _, x = corrected_linear()
    plain = float_layer.to_dense()
    plain.register_forward_hook(float_layer.add_to, with_kwargs=True)
    close(float_layer(input=x), float_layer(x))
    close(plain(input=x), float_layer(x))


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_a_correction_brings_the_weight_nearer(rank: int) -> None:
    layer, _ = dense("linear")
    left = (layer.weight - to_nearest(layer.weight.detach(), Grid(4)).matrix()).detach().double()
    made = corrected(layer, left, rank)
    after = (left - (made.up @ made.down).detach().double()).norm()
    best = torch.linalg.svdvals(left)[rank:].square().sum().sqrt()
    assert float(after) == pytest.approx(float(best), rel=1e-5) and float(after) < float(left.norm())


def some() -> list[QuantisedLayer]:
    return [
        *(quantised(name, grid)[1] for name, grid in zip(DENSE, [*GRIDS, *GRIDS], strict=False)),
        *(chain(name)[1] for name in DENSE),
        corrected_linear()[1],
    ]


@pytest.mark.parametrize("layer", some(), ids=lambda layer: f"{type(layer).__name__} {layer.scheme}")
def test_config_state_dict_copies_and_pickles_keep_every_bit(layer: QuantisedLayer) -> None:
    config = json.loads(json.dumps(layer.config()))
    again = LAYERS[type(layer).__name__].from_config(config)
    assert again.config() == layer.config() and repr(again) == repr(layer)
    again.load_state_dict(layer.state_dict())
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (again, copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bits", 5),
        ("bits", "4"),
        ("group_size", 7),
        ("group_size", None),
        ("group_size", -1),
        ("ranks", [3]),
        ("in_features", 2**40),
        ("scheme", "spatial"),
        ("dtype", "int8"),
        ("bias", 1),
        ("code", "print(1)"),
    ],
)
def test_hostile_configs_are_refused(key: str, value: Any) -> None:
    config = {**quantised("linear")[1].config(), key: value}
    with pytest.raises(ValueError, match="config"):
        QuantisedLinear.from_config(config)


def test_scales_that_were_cut_off_do_not_load() -> None:
    _, layer, _ = quantised("linear", Grid(4, 32))
    state = layer.state_dict()
    state["whole.scales"] = state["whole.scales"][:, :1]
    with pytest.raises(RuntimeError, match="scales"):
        QuantisedLinear.from_config(layer.config()).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "expected 16"),
        ({"bits": True}, "expected 16"),
        ({"bits": 16, "group_size": 32}, "bfloat16 has no scales"),
        ({"group_size": 16}, "group_size=16"),
    ],
)
def test_other_bits_and_groups_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantisedLinear.from_dense(nn.Linear(8, 8), **change)


def test_what_is_not_the_plain_layer_or_not_finite_is_refused() -> None:
    class Own(nn.Linear):
        pass

    with pytest.raises(TypeError, match=r"made from nn\.Linear and nothing else"):
        QuantisedLinear.from_dense(Own(4, 4))
    broken = nn.Linear(4, 4)
    broken.weight.data[1, 2] = torch.nan
    with pytest.raises(ValueError, match="1 NaN or Inf"):
        QuantisedLinear.from_dense(broken)
    with pytest.raises(TypeError, match="no constructor"):
        QuantisedLinear(4, 4)
    with pytest.raises(ValueError, match="groups=2"):
        QuantisedConv2d.from_dense(nn.Conv2d(4, 4, 3, groups=2))
    layer = QuantisedLinear.from_dense(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="rounded to fit each other"):
        layer.active_terms = 1
    with pytest.raises(TypeError, match="no random weights"):
        layer.reset_parameters()
    with pytest.raises(ValueError, match="expected"):
        QuantisedLinear.from_rounded(nn.Linear(4, 5), chains.WHOLE, [to_nearest(torch.ones(4, 4), Grid(8))], None)


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_flags_and_dtype_of_the_dense_layer_are_kept(name: str) -> None:
    layer, x = dense(name)
    layer.to(torch.bfloat16).eval().requires_grad_(False)
    small = QUANTISED[type(layer)].from_dense(layer, bits=8)
    assert not small.training and not any(p.requires_grad for p in small.parameters())
    assert small(x.bfloat16()).dtype == torch.bfloat16
    small.float()
    assert small(x).dtype == torch.float32 and small.stored[0].values.dtype == torch.int8


@pytest.mark.parametrize("name", ["linear", "conv1d"])
def test_gradients_reach_the_input_and_the_bias(name: str) -> None:
    _, small, x = quantised(name)
    x.requires_grad_()
    small(x).square().sum().backward()
    assert x.grad is not None and bool(x.grad.any())
    bias = small.bias
    assert bias is not None and bias.grad is not None and bool(bias.grad.any())


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_scales_may_be_trained_or_computed(name: str) -> None:
    _, layer, x = quantised(name)
    before, part = layer(x), layer.stored[0]
    part.scales = nn.Parameter(part.scales.detach())
    layer(x).square().sum().backward()
    assert part.scales.grad is not None and bool((part.scales.grad != 0).all())
    torch.testing.assert_close(layer(x), before)

    class Twice(nn.Module):
        def forward(self, scales: Tensor) -> Tensor:
            return 2 * scales

    torch.nn.utils.parametrize.register_parametrization(part, "scales", Twice())
    bias = layer(torch.zeros_like(x))
    torch.testing.assert_close(layer(x) - bias, 2 * (before - bias), rtol=1e-4, atol=1e-5)


def test_an_empty_batch_gives_an_empty_batch() -> None:
    for layer in some():
        size = (0, layer._shape.in_features, *(9,) * len(layer._shape.kernel_size))
        assert layer(torch.zeros(size)).shape[:2] == (0, layer._shape.out_features)


@pytest.mark.parametrize("layer", [some()[0], some()[3], corrected_linear()[1]], ids=["linear", "conv2d", "corrected"])
def test_torch_compile_and_export_trace_the_whole_layer(layer: QuantisedLayer) -> None:
    size = (2, layer._shape.in_features, *(9,) * len(layer._shape.kernel_size))
    x = torch.randn(size)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        close(compiled(x), layer(x))
        program = torch.export.export(layer.eval(), (x,))
        close(program.module()(x), layer(x))
    assert not [node for node in program.graph.nodes if str(node.target).startswith("panther.")]


# Held to a grid while training


def test_a_held_layer_computes_what_is_stored_of_it_and_learns() -> None:
    layer, x = dense("linear")
    hold(layer, "weight", to_nearest(layer.weight.detach(), Grid(4, 32)))
    assert is_held(layer) and not is_held(nn.Linear(2, 2)) and held(nn.Linear(2, 2), "weight") is None
    target = torch.randn(5, 9, generator=torch.Generator().manual_seed(3))
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert min(losses[-5:]) < 0.5 * losses[0]
    numbers = held(layer, "weight")
    assert numbers is not None
    after = layer(x).detach()
    stored = QuantisedLinear.from_rounded(nn.Linear(71, 9), chains.WHOLE, [numbers], layer.bias)
    with torch.no_grad():
        close(stored(x), after)
    let_go(layer)
    assert type(layer) is nn.Linear and not is_held(layer)
    with torch.no_grad():
        close(layer(x), after)


def test_a_number_beyond_the_last_multiple_gets_no_gradient() -> None:
    grid = OnGrid(torch.ones(1, 1), Grid(4))
    weight = torch.tensor([[0.3, 6.9, 9.0, -8.4]], requires_grad=True)
    given = grid(weight)
    assert given.tolist() == [[0.0, 7.0, 7.0, -8.0]]
    given.sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_a_sketched_layer_is_held_link_by_link() -> None:
    sketch = SKLinear.from_dense(nn.Linear(40, 30), rank=4)
    for name in ("down", "up"):
        hold(sketch, name, to_nearest(getattr(sketch, name).detach(), Grid(8)))
    assert isinstance(sketch, SKLinear) and is_held(sketch)
    parts = [held(sketch, name) for name in ("down", "up")]
    stored = QuantisedLinear.from_rounded(nn.Linear(40, 30), chains.LINEAR, parts, sketch.bias)  # type: ignore[arg-type]
    x = torch.randn(3, 40)
    with torch.no_grad():
        close(stored(x), sketch(x))
