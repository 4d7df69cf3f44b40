"""Pivoted layers against the layers of two products that they are made from."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from panther import chains
from panther.nn import (
    LAYERS,
    PIVOTED,
    SKConv1d,
    SKConv2d,
    SKConv3d,
    SketchedLayer,
    SKLinear,
    SKPivotedConv2d,
    SKPivotedLinear,
)
from panther.nn import pivoted as module
from panther.nn.factor import compose
from panther.nn.pivoted import PARITY, interpolate
from panther.sizes import stored_tensors

# The sketches of this file are as large as the dense layers on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.*would be smaller:UserWarning")

SIDES = (chains.ROWS, chains.COLUMNS)
every_side = pytest.mark.parametrize("side", SIDES)
SHAPES = [(24, 40), (40, 24), (32, 32)]
CONVS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "1d": (SKConv1d, nn.Conv1d, (9,)),
    "2d": (SKConv2d, nn.Conv2d, (9, 8)),
    "3d": (SKConv3d, nn.Conv3d, (6, 5, 7)),
}
every_scheme = pytest.mark.parametrize("scheme", ["output_channel", "input_channel", "tucker2"])


def linear(inputs: int, outputs: int, rank: int, **options: Any) -> SKLinear:
    return SKLinear.from_dense(nn.Linear(inputs, outputs, **options), rank=rank)


def conv(scheme: str, rank: Any = 5, **options: Any) -> SKConv2d:
    return SKConv2d.from_dense(nn.Conv2d(12, 14, 3, padding=1, **options), rank=rank, scheme=scheme)


def close(got: Tensor, wanted: Tensor, terms: int = 64) -> None:
    """Equal up to the rounding of three products with sums of at most `terms` terms of the outputs' size."""
    scale = float(wanted.detach().abs().max())
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got, wanted, rtol=16 * eps, atol=24 * eps * math.sqrt(terms) * max(scale, 1e-30))


def every_layer() -> Iterator[tuple[str, SketchedLayer, Any]]:
    for side in SIDES:
        yield f"linear {side}", (whole := linear(24, 40, 7)), SKPivotedLinear.from_sketched(whole, side=side)
    for scheme in ("output_channel", "input_channel", "tucker2"):
        yield scheme, (whole := conv(scheme)), SKPivotedConv2d.from_sketched(whole)


@pytest.fixture(params=range(5), ids=["linear rows", "linear columns", "output_channel", "input_channel", "tucker2"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A layer of two products and its pivoted form."""
    return list(every_layer())[request.param][1:]


def inputs_for(layer: Any) -> Tensor:
    return torch.randn(3, 24) if isinstance(layer, SKPivotedLinear) else torch.randn(3, 12, 6, 7)


# Interpolation


@pytest.mark.parametrize(("rows", "rank"), [(40, 7), (7, 7), (9, 1), (300, 120)])
def test_the_other_rows_are_combinations_of_the_pivots(rows: int, rank: int) -> None:
    tall = torch.randn(rows, rank, dtype=torch.float64)
    order, coefficients = interpolate(tall)
    assert sorted(order.tolist()) == list(range(rows))
    assert coefficients.shape == (rows - rank, rank)
    torch.testing.assert_close(coefficients @ tall[order[:rank]], tall[order[rank:]], rtol=1e-9, atol=1e-9)
    assert coefficients.numel() == 0 or float(coefficients.abs().max()) < 2


def test_pivots_and_the_rest_come_in_rising_order() -> None:
    order, _ = interpolate(torch.randn(30, 11, dtype=torch.float64))
    assert order[:11].tolist() == sorted(order[:11].tolist()) and order[11:].tolist() == sorted(order[11:].tolist())


@pytest.mark.parametrize("independent", [0, 1, 3])
def test_a_singular_matrix_has_pivots_with_small_coefficients(independent: int) -> None:
    tall = torch.randn(20, independent, dtype=torch.float64) @ torch.randn(independent, 6, dtype=torch.float64)
    order, coefficients = interpolate(tall)
    torch.testing.assert_close(coefficients @ tall[order[:6]], tall[order[6:]], rtol=1e-9, atol=1e-9)
    assert float(coefficients.abs().max()) < 2


def test_columns_of_very_different_size_change_no_coefficient() -> None:
    tall = torch.randn(30, 8, dtype=torch.float64)
    order, coefficients = interpolate(tall)
    again, scaled = interpolate(tall * torch.logspace(0, -9, 8, dtype=torch.float64))
    assert torch.equal(order, again)
    torch.testing.assert_close(scaled, coefficients, rtol=1e-5, atol=1e-6)


# The same function from fewer numbers


@every_side
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 23, 24])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_computes_the_same_and_holds_the_rank_squared_less(
    inputs: int, outputs: int, rank: int, bias: bool, side: str
) -> None:
    whole = linear(inputs, outputs, rank, bias=bias)
    layer, x = SKPivotedLinear.from_sketched(whole, side=side), torch.randn(2, 5, inputs)
    close(layer(x), whole(x))
    held = sum(parameter.numel() for name, parameter in layer.named_parameters() if name != "offset")
    assert held == rank * (inputs + outputs - rank)


@every_scheme
@pytest.mark.parametrize("dims", CONVS)
@pytest.mark.parametrize("options", [{}, {"stride": 2, "dilation": 2}, {"padding_mode": "reflect", "bias": False}])
def test_a_convolution_computes_the_same_and_holds_less(scheme: str, dims: str, options: dict[str, Any]) -> None:
    sketched, dense, size = CONVS[dims]
    whole = sketched.from_dense(dense(12, 14, 3, padding=2, **options), rank=5, scheme=scheme)
    layer, x = PIVOTED[sketched].from_sketched(whole), torch.randn(2, 12, *size)
    close(layer(x), whole(x), terms=12 * 27)
    close(layer(x[0]), whole(x[0]), terms=12 * 27)
    saved = 25 * len(chains.PIVOTS[scheme])
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in whole.parameters()) - saved


def test_weight_bias_and_dense_layer_are_those_of_the_layer_it_was_made_from(pair: tuple[Any, Any]) -> None:
    whole, layer = pair
    close(layer.weight.clone(), whole.weight.clone())
    close(layer.bias, whole.bias)
    dense, x = layer.to_dense(), inputs_for(layer)
    assert type(dense) is whole.DENSE
    close(dense(x), whole(x))


def test_weight_and_bias_together_are_the_layer(pair: tuple[Any, Any]) -> None:
    layer = pair[1]
    x, dense = inputs_for(layer), layer.to_dense()
    close(functional_call(dense, {"weight": layer.weight.clone(), "bias": layer.bias}, (x,)), layer(x))


@every_side
@pytest.mark.parametrize("made", ["zeros", "rank 1"])
def test_a_weight_of_lower_rank_is_no_trouble(made: str, side: str) -> None:
    dense = nn.Linear(20, 30)
    with torch.no_grad():
        dense.weight.copy_(torch.zeros(30, 20) if made == "zeros" else torch.randn(30, 1) @ torch.randn(1, 20))
    whole = SKLinear.from_dense(dense, rank=6)
    layer, x = SKPivotedLinear.from_sketched(whole, side=side), torch.randn(4, 20)
    close(layer(x), whole(x))
    assert all(bool(p.isfinite().all()) for p in layer.parameters())


@every_scheme
def test_a_zero_convolution_is_no_trouble(scheme: str) -> None:
    whole = conv(scheme)
    with torch.no_grad():
        for name in whole._weight_names:
            getattr(whole, name).zero_()
    layer, x = SKPivotedConv2d.from_sketched(whole), torch.randn(2, 12, 5, 5)
    close(layer(x), whole(x))


@every_side
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_kept(dtype: torch.dtype, side: str) -> None:
    whole = linear(40, 60, 13, dtype=dtype)
    layer = SKPivotedLinear.from_sketched(whole, side=side)
    assert {p.dtype for p in layer.parameters()} == {dtype} == {layer.weight.dtype, layer.bias.dtype}  # type: ignore[union-attr]
    order = layer.row_order if side == chains.ROWS else layer.column_order
    assert order is not None and order.dtype == torch.int32
    x = torch.randn(5, 40, dtype=dtype)
    close(layer(x), whole(x))


@every_side
def test_a_model_cast_afterwards_keeps_its_order(side: str) -> None:
    layer = SKPivotedLinear.from_sketched(linear(40, 60, 13), side=side)
    x = torch.randn(5, 40)
    wanted = layer(x)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    close(half(x.bfloat16()), wanted.bfloat16())
    assert all(b.dtype == torch.int32 for b in half.buffers())


def test_only_the_active_terms_are_taken_over() -> None:
    whole = SKLinear.from_dense(nn.Linear(40, 40), num_terms=3, low_rank=2)
    whole.active_terms = 1
    layer, x = SKPivotedLinear.from_sketched(whole), torch.randn(3, 40)
    assert layer.rank == 4
    close(layer(x), whole(x))


def test_a_random_basis_becomes_an_ordinary_layer() -> None:
    whole = SKLinear(40, 48, 1, 4, basis="random")
    layer, x = SKPivotedLinear.from_sketched(whole), torch.randn(3, 40)
    close(layer(x), whole(x))


def test_flags_are_kept_and_nothing_is_shared(pair: tuple[Any, Any]) -> None:
    whole = copy.deepcopy(pair[0]).eval()
    whole.bias.requires_grad_(False)
    layer = PIVOTED[type(whole)].from_sketched(whole)
    assert not layer.training
    assert {name for name, p in layer.named_parameters() if not p.requires_grad} == {"offset"}
    assert not layer.to_dense().bias.requires_grad and layer.to_dense().weight.requires_grad
    ours, theirs = ({p.data_ptr() for p in part.parameters()} for part in (layer, whole))
    assert not ours & theirs


# Orders of channels


def test_no_order_is_kept_where_the_pivots_come_first() -> None:
    full, x = linear(24, 24, 24), torch.randn(3, 24)
    for side in SIDES:
        layer = SKPivotedLinear.from_sketched(full, side=side)
        assert layer.row_order is None and layer.column_order is None
        assert not any("order" in name for name in layer.state_dict())
        close(layer(x), full(x))


def graph_of(layer: nn.Module, x: Tensor) -> set[str]:
    """The names of the operations that a layer executes."""
    program = torch.export.export(layer.eval(), (x,))
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@every_side
def test_nothing_is_gathered_once_the_order_is_the_natural_one(side: str) -> None:
    layer, x = SKPivotedLinear.from_sketched(linear(24, 40, 7), side=side), torch.randn(3, 24)
    assert any("index_select" in name for name in graph_of(layer, x))
    wanted = layer(x)
    if side == chains.ROWS:
        index = layer.row_order.argsort()  # type: ignore[union-attr]
        layer.reorder_outputs(index)
        close(layer(x), wanted[:, index])
    else:
        index = layer.column_order.long()  # type: ignore[union-attr]
        layer.reorder_inputs(index)
        close(layer(x[:, index]), wanted)
    assert layer.row_order is None and layer.column_order is None
    assert not any("index_select" in name for name in graph_of(layer, x))


def test_channels_can_be_reordered_on_both_sides(pair: tuple[Any, Any]) -> None:
    layer = pair[1]
    x = inputs_for(layer)
    wanted = layer(x)
    outputs, inputs = torch.randperm(wanted.shape[1]), torch.randperm(x.shape[1])
    layer.reorder_outputs(outputs)
    close(layer(x), wanted[:, outputs])
    layer.reorder_inputs(inputs)
    close(layer(x[:, inputs]), wanted[:, outputs])
    close(layer.to_dense()(x[:, inputs]), wanted[:, outputs])


# Running


def test_it_maps_over_a_further_axis(pair: tuple[Any, Any]) -> None:
    layer = pair[1]
    x = torch.stack([inputs_for(layer) for _ in range(3)])
    close(vmap(layer)(x), torch.stack([layer(part) for part in x]))


def test_it_maps_over_several_sets_of_weights(pair: tuple[Any, Any]) -> None:
    layer = pair[1]
    x = inputs_for(layer)
    stacked = {name: torch.stack([p, 2 * p]) for name, p in layer.named_parameters()}
    both = vmap(lambda weights: functional_call(layer, weights, (x,)))(stacked)
    close(both[0], layer(x))
    twice = {name: p[1] for name, p in stacked.items()}
    close(both[1], functional_call(layer, twice, (x,)))


def test_it_is_trained_like_any_layer(pair: tuple[Any, Any]) -> None:
    layer = pair[1]
    x = inputs_for(layer)
    layer(x).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in layer.parameters())


def test_it_has_no_constructor_and_no_random_weights(pair: tuple[Any, Any]) -> None:
    layer = pair[1]
    with pytest.raises(
        TypeError, match=rf"{type(layer).__name__}.from_sketched\(layer\) takes a {type(pair[0]).__name__}"
    ):
        type(layer)(3, 4, 1, 2)
    with pytest.raises(TypeError, match="make it again with from_sketched"):
        layer.reset_parameters()


def test_terms_cannot_be_switched_and_the_error_says_how_they_can(pair: tuple[Any, Any]) -> None:
    layer = pair[1]
    assert layer.active_terms == layer.num_terms == 1
    for terms in (1, 2):
        with pytest.raises(
            ValueError, match=rf"active_terms: the pivots .* Keep a {type(pair[0]).__name__} .*two_gemm"
        ):
            layer.active_terms = terms


def test_the_computed_bias_cannot_be_replaced(pair: tuple[Any, Any]) -> None:
    layer = pair[1]
    with pytest.raises((AttributeError, KeyError), match="bias"):
        layer.bias = nn.Parameter(torch.zeros(layer.out_features))


# Refusals


def test_a_spatial_convolution_has_no_pivots() -> None:
    with pytest.raises(ValueError, match=r"no link of a 'spatial' layer is 1 x 1.*or keep its two products"):
        SKPivotedConv2d.from_sketched(conv("spatial"))


def test_a_rank_above_the_number_of_rows_is_refused() -> None:
    whole = SKLinear(30, 6, 2, 2)
    with pytest.raises(ValueError, match="rank 8 has no pivots among 6 outputs"):
        SKPivotedLinear.from_sketched(whole)
    x = torch.randn(3, 30)
    close(SKPivotedLinear.from_sketched(whole, side=chains.COLUMNS)(x), whole(x))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_factors_that_are_not_finite_are_refused(bad: float) -> None:
    whole = linear(20, 30, 6)
    with torch.no_grad():
        whole.up[3, 2] = bad
    with pytest.raises(ValueError, match="the factors hold NaN or Inf"):
        SKPivotedLinear.from_sketched(whole)


def test_other_layers_and_sides_are_refused() -> None:
    for other in (nn.Linear(3, 4), conv("tucker2"), SKPivotedLinear.from_sketched(linear(24, 40, 7))):
        with pytest.raises(TypeError, match=f"takes a SKLinear and nothing else; got {type(other).__name__}"):
            SKPivotedLinear.from_sketched(other)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"side='left'\): expected one of 'rows', 'columns'"):
        SKPivotedLinear.from_sketched(linear(24, 40, 7), side="left")


def test_large_coefficients_are_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def poor(tall: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.arange(len(tall))
        return order, tall[tall.shape[1] :] @ torch.linalg.inv(tall[: tall.shape[1]])

    monkeypatch.setattr(module, "interpolate", poor)
    whole = linear(20, 30, 6)
    with torch.no_grad():
        whole.up[1] = whole.up[0] + 1e-5 * whole.up[1]  # nearly the same row twice among the first
    with pytest.raises(
        ValueError, match=r"a coefficient of .* would multiply rounding errors .*; keep the two products"
    ):
        SKPivotedLinear.from_sketched(whole)


def test_weights_that_do_not_give_the_same_layer_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(tall: Tensor) -> tuple[Tensor, Tensor]:
        order, coefficients = interpolate(tall)
        return order, coefficients * (1 + 1e-3)

    monkeypatch.setattr(module, "interpolate", wrong)
    with pytest.raises(ValueError, match=rf"would differ by .* \(at most {PARITY:.1e}\); keep the two products"):
        SKPivotedLinear.from_sketched(linear(20, 30, 6))
    SKPivotedLinear.from_sketched(linear(20, 30, 6, dtype=torch.bfloat16))  # whose own rounding is larger


# Saved forms


@pytest.mark.parametrize("spoiled", ["twice", "negative", "too large", "float"])
def test_an_order_that_is_none_is_not_loaded(spoiled: str) -> None:
    layer = SKPivotedLinear.from_sketched(linear(24, 40, 7))
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    order = state["row_order"]
    if spoiled == "float":
        state["row_order"] = order.float() + 0.5
    else:
        order[3] = {"twice": order[4], "negative": -1, "too large": 40}[spoiled]
    with pytest.raises(RuntimeError, match="row_order is no order of 40 channels: the file is damaged"):
        copy.deepcopy(layer).load_state_dict(state)


def test_a_config_with_an_order_on_the_wrong_side_is_refused() -> None:
    config = SKPivotedLinear.from_sketched(linear(24, 40, 7)).config()
    assert (config["side"], config["row_order"], config["column_order"]) == ("rows", True, False)
    with pytest.raises(ValueError, match="config: column_order=True, but the pivots are rows"):
        SKPivotedLinear.from_config({**config, "column_order": True})
    with pytest.raises(ValueError, match="config: ranks"):
        SKPivotedLinear.from_config({**config, "ranks": [25]})
    deep = SKPivotedConv2d.from_sketched(conv("tucker2")).config()
    with pytest.raises(ValueError, match="config: rank 15 has no pivots among 14 outputs"):
        SKPivotedConv2d.from_config({**deep, "ranks": [5, 15]})


def test_a_config_that_asks_for_too_much_memory_is_refused() -> None:
    config = SKPivotedLinear.from_sketched(linear(24, 40, 7)).config()
    big = {**config, "in_features": 2**20, "out_features": 2**20, "ranks": [2**19]}
    with pytest.raises(ValueError, match="more than any real layer"):
        SKPivotedLinear.from_config(big)
    deep = SKPivotedConv2d.from_sketched(conv("output_channel")).config()
    with pytest.raises(ValueError, match="more than any real layer"):
        SKPivotedConv2d.from_config({**deep, "in_channels": 2**20, "out_channels": 2**20, "ranks": [2**19]})


def test_what_is_stored_counts_the_order_in_four_bytes_each() -> None:
    layer = SKPivotedLinear.from_sketched(linear(24, 40, 7))
    stored = stored_tensors(layer)
    assert sum(t.numel() for t in stored.values()) == 7 * (24 + 40 - 7) + 40 + 40
    assert stored["row_order"].element_size() == 4


def test_the_printed_layer_says_where_its_pivots_are(pair: tuple[Any, Any]) -> None:
    layer = pair[1]
    assert f"pivots={' and '.join(layer.sides)!r}" in repr(layer) and "rank=" in repr(layer)


def test_every_sketched_layer_has_a_pivoted_form() -> None:
    whole = {layer for layer in LAYERS.values() if layer.PACKING == chains.TWO_GEMM}
    assert set(PIVOTED) == whole
    assert all(form.DENSE is layer.DENSE for layer, form in PIVOTED.items())


def test_the_links_with_their_identity_compose_to_the_weight(pair: tuple[Any, Any]) -> None:
    layer = pair[1]
    close(compose(layer.active_weights()), layer.weight.clone())
    for link, weight in zip(chains.links(layer.scheme, layer._shape, layer.ranks), layer.active_weights(), strict=True):
        assert tuple(weight.shape) == link.weight_shape
