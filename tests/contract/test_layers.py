"""Every sketched layer, against the dense one that it stands for. A new member of LAYERS needs its lines in CASES."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from panther import chains
from panther.nn import IN_WHOLE_NUMBERS, LAYERS, PivotedLayer, SketchedLayer, SKLinear, SKPivotedLinear
from panther.nn.factor import compose

# Even kernels with padding="same" pad one side more; torch says that this copies the input, of the dense layer too.
# The sketches of this file are as large as the dense layers on purpose; test_nn.py tests the warning about it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*would be smaller:UserWarning"),
]


class Case(NamedTuple):
    layer: str
    title: str
    dense: Callable[..., nn.Module]
    arguments: tuple[int, ...]
    options: dict[str, Any]
    input_shape: tuple[int, ...]
    scheme: str = chains.LINEAR
    side: str = chains.ROWS  # of a pivoted linear layer

    @property
    def is_pivoted(self) -> bool:
        return issubclass(LAYERS[self.layer], PivotedLayer)

    def build(self, **more: Any) -> nn.Module:
        torch.manual_seed(0)
        return self.dense(*self.arguments, **self.options, **more)

    def sketch(self, dense: nn.Module | None = None, **size: Any) -> Any:
        layer = self.build() if dense is None else dense
        if self.side == chains.COLUMNS:
            whole = SKLinear.from_dense(layer, **(size or {"rank": 1_000_000}))
            return SKPivotedLinear.from_sketched(whole, side=self.side)
        return LAYERS[self.layer].from_dense(layer, scheme=self.scheme, **(size or {"rank": 1_000_000}))

    def inputs(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(self.input_shape, generator=torch.Generator().manual_seed(1)).to(dtype)


GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2, "padding": 2},
    "same": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid", "bias": False},
    "reflect": {"padding": 2, "padding_mode": "reflect"},
    "replicate same": {"padding": "same", "padding_mode": "replicate"},
    "circular": {"padding": 1, "padding_mode": "circular", "stride": 2},
    "reflect valid": {"padding": "valid", "padding_mode": "reflect"},
}


# Pivoted layers leave the geometry to the links, which are the same as without pivots.
FEW_GEOMETRIES = {title: GEOMETRIES[title] for title in ("strided", "same", "valid", "reflect")}


def convolutions(
    layer: str,
    dense: Callable[..., nn.Module],
    schemes: tuple[str, ...],
    dims: int,
    geometries: dict[str, dict[str, Any]] = GEOMETRIES,
) -> Iterator[Case]:
    size = (9, 8, 7)[:dims]
    for title, options in geometries.items():
        for scheme in schemes:
            yield Case(layer, f"{title} {scheme}", dense, (4, 5, 3), options, (2, 4, *size), scheme)
    uneven: dict[str, Any] = {"stride": (2, 1, 1)[:dims], "padding": (1, 2, 0)[:dims]}
    for scheme in schemes:
        kernel = (4, 3, 2)[:dims]
        yield Case(
            layer, f"uneven {scheme}", lambda k=kernel, **o: dense(6, 3, k, **o), (), uneven, (2, 6, *size), scheme
        )
        yield Case(layer, f"even same {scheme}", dense, (3, 4, 2), {"padding": "same"}, (2, 3, *size), scheme)
        yield Case(layer, f"pointwise {scheme}", dense, (6, 5, 1), {}, (2, 6, *size), scheme)


PLAIN_SCHEMES = ("output_channel", "input_channel", "tucker2")

CASES: dict[str, list[Case]] = {
    "SKLinear": [
        Case("SKLinear", "tall", nn.Linear, (9, 13), {}, (5, 9)),
        Case("SKLinear", "wide, no bias", nn.Linear, (13, 6), {"bias": False}, (2, 3, 13)),
        Case("SKLinear", "one output", nn.Linear, (7, 1), {}, (7,)),
    ],
    "SKConv1d": list(convolutions("SKConv1d", nn.Conv1d, PLAIN_SCHEMES, 1)),
    "SKConv2d": list(convolutions("SKConv2d", nn.Conv2d, chains.CONV_SCHEMES, 2)),
    "SKConv3d": list(convolutions("SKConv3d", nn.Conv3d, PLAIN_SCHEMES, 3)),
    "SKPivotedLinear": [
        Case("SKPivotedLinear", "tall", nn.Linear, (9, 13), {}, (5, 9)),
        Case("SKPivotedLinear", "tall, columns", nn.Linear, (9, 13), {}, (5, 9), side=chains.COLUMNS),
        Case("SKPivotedLinear", "wide, no bias", nn.Linear, (13, 6), {"bias": False}, (2, 3, 13)),
        Case(
            "SKPivotedLinear",
            "wide, columns, no bias",
            nn.Linear,
            (13, 6),
            {"bias": False},
            (2, 3, 13),
            side=chains.COLUMNS,
        ),
        Case("SKPivotedLinear", "one output", nn.Linear, (7, 1), {}, (7,)),
    ],
    "SKPivotedConv1d": list(convolutions("SKPivotedConv1d", nn.Conv1d, PLAIN_SCHEMES, 1, FEW_GEOMETRIES)),
    "SKPivotedConv2d": list(convolutions("SKPivotedConv2d", nn.Conv2d, PLAIN_SCHEMES, 2, FEW_GEOMETRIES)),
    "SKPivotedConv3d": list(convolutions("SKPivotedConv3d", nn.Conv3d, PLAIN_SCHEMES, 3, FEW_GEOMETRIES)),
}


def cases(wanted: Callable[[Case], bool]) -> pytest.MarkDecorator:
    chosen = filter(wanted, itertools.chain(*CASES.values()))
    return pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.layer} {case.title}") for case in chosen])


def is_typical(case: Case) -> bool:
    return case.scheme == chains.LINEAR or case.title.startswith(("strided", f"reflect {case.scheme}"))


def is_traced(case: Case) -> bool:
    """Tracing takes half a second: one geometry a scheme, the one that takes the longest way through forward."""
    return is_typical(case) and not case.title.startswith("strided")


def has_terms(case: Case) -> bool:
    """Tucker-2 and pivoted layers have no terms to switch; one-output layers have no second rank."""
    has_some = case.scheme != "tucker2" and not case.is_pivoted
    return is_typical(case) and has_some and case.title != "one output"


def is_whole(case: Case) -> bool:
    """Pivoted layers are made from whole ones; tests/test_pivoted.py has how."""
    return is_typical(case) and not case.is_pivoted


def close(got: Tensor, wanted: Tensor, depth: int = 1) -> None:
    """Equal up to the rounding of `depth` sums of at most 512 terms, each up to a few units in size."""
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got, wanted, rtol=16 * eps, atol=depth * 8 * eps * math.sqrt(512))


def test_every_layer_has_cases() -> None:
    """Those of whole numbers are made of no rank and have tests of their own (test_quantised_layers.py)."""
    assert set(CASES) == {name for name, layer in LAYERS.items() if not issubclass(layer, IN_WHOLE_NUMBERS)}
    assert all(issubclass(layer, SketchedLayer) and layer.__name__ == name for name, layer in LAYERS.items())


@cases(lambda _: True)
def test_full_rank_reproduces_the_dense_layer(case: Case) -> None:
    dense = case.build()
    close(case.sketch(dense)(case.inputs()), dense(case.inputs()))


@cases(is_typical)
def test_the_input_may_be_named_as_that_of_the_dense_layer(case: Case) -> None:
    sketched = case.sketch(rank=2)
    assert torch.equal(sketched(input=case.inputs()), sketched(case.inputs()))


@cases(lambda _: True)
def test_to_dense_computes_the_same_at_any_rank(case: Case) -> None:
    sketched = case.sketch(rank=2)
    dense = sketched.to_dense()
    assert type(dense) is LAYERS[case.layer].DENSE
    close(dense(case.inputs()), sketched(case.inputs()))
    assert repr(dense) == repr(case.build())


@cases(is_typical)
def test_the_weight_is_that_of_the_dense_layer(case: Case) -> None:
    dense = case.build()
    sketched = case.sketch(dense)
    close(sketched.weight.clone(), dense.get_parameter("weight"))
    assert not any(name.endswith("weight") for name in sketched.state_dict())


@cases(is_typical)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_weight_says_of_itself_is_so_and_costs_no_product(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    sketched = case.sketch(case.build(dtype=dtype), rank=2)
    products = count_products(monkeypatch)
    weight = sketched.weight
    said = describe(weight)
    assert isinstance(weight, Tensor)
    assert not weight.requires_grad
    assert products == []
    assert said == describe(weight.clone())
    assert len(products) == 1


def count_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets longer with every product of factors."""
    products: list[int] = []
    monkeypatch.setattr("panther.nn.base.compose", lambda weights: products.append(1) or compose(weights))
    return products


def describe(weight: Tensor) -> dict[str, Any]:
    """What a program can ask of a weight without its values."""
    sizes = (weight.shape, weight.size(), weight.size(0), weight.dim(), weight.ndim, len(weight), weight.stride())
    counts = (weight.numel(), weight.nelement(), weight.element_size(), weight.itemsize, weight.nbytes)
    places = (weight.device, weight.is_cuda, weight.is_cpu, weight.is_meta, weight.get_device(), weight.layout)
    kinds = (weight.dtype, weight.is_floating_point(), torch.is_floating_point(weight), weight.is_complex())
    return {"sizes": sizes, "counts": counts, "places": places, "kinds": kinds, "whole": weight.is_contiguous()}


@cases(is_typical)
def test_gradients_reach_the_factors_through_the_weight(case: Case) -> None:
    sketched = case.sketch(rank=2)
    sketched.weight.square().sum().backward()
    found = {name: parameter.grad for name, parameter in sketched.named_parameters()}
    assert {name for name, gradient in found.items() if gradient is None} <= {sketched.BIAS}
    sketched.zero_grad()
    compose(sketched.active_weights()).square().sum().backward()
    for name, parameter in sketched.named_parameters():
        if name != sketched.BIAS:
            torch.testing.assert_close(found[name], parameter.grad)


@cases(is_typical)
def test_links_have_the_shapes_that_chains_gives(case: Case) -> None:
    sketched = case.sketch(rank=2)
    shape = type(sketched)._shape_of(case.build())
    wanted = [link.weight_shape for link in chains.links(case.scheme, shape, sketched.ranks)]
    assert [tuple(weight.shape) for weight in sketched.active_weights()] == wanted


@cases(is_typical)
def test_the_error_of_the_weight_falls_with_the_rank(case: Case) -> None:
    dense = case.build()
    weight = dense.get_parameter("weight").detach()
    errors = [float((case.sketch(dense, rank=rank).weight.detach() - weight).norm()) for rank in (1, 2, 3, 1_000)]
    assert all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(errors))
    assert errors[-1] <= 1e-5 * float(weight.norm())


@cases(lambda _: True)
def test_config_goes_through_json_and_gives_the_same_layer(case: Case) -> None:
    sketched = case.sketch(rank=2)
    again: Any = LAYERS[case.layer].from_config(json.loads(json.dumps(sketched.config())))
    again.load_state_dict(sketched.state_dict())
    assert again.config() == sketched.config()
    assert repr(again) == repr(sketched)
    assert torch.equal(again(case.inputs()), sketched(case.inputs()))


@cases(is_typical)
def test_state_dict_deepcopy_and_pickle_keep_every_bit(case: Case) -> None:
    sketched = case.sketch(rank=2)
    other = LAYERS[case.layer].from_config(sketched.config()).apply(_zero)
    wanted = sketched(case.inputs())
    other.load_state_dict(sketched.state_dict())
    assert torch.equal(other(case.inputs()), wanted)
    assert torch.equal(copy.deepcopy(sketched)(case.inputs()), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(sketched))(case.inputs()), wanted)  # noqa: S301  # our own bytes


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


@cases(is_typical)
def test_gradients_reach_every_parameter_and_the_input(case: Case) -> None:
    sketched, x = case.sketch(rank=2), case.inputs().requires_grad_()
    sketched(x).square().sum().backward()
    tensors = {**dict(sketched.named_parameters()), "x": x}
    for name, tensor in tensors.items():
        assert tensor.grad is not None, name
        assert torch.isfinite(tensor.grad).all(), name
        assert tensor.grad.abs().sum() > 0, name


@cases(is_typical)
def test_an_optimiser_lowers_the_loss(case: Case) -> None:
    dense, sketched, x = case.build(), case.sketch(rank=1), case.inputs()
    target = dense(x).detach() + 1
    optimiser = torch.optim.AdamW(sketched.parameters(), lr=0.01)

    def step() -> float:
        optimiser.zero_grad()
        loss = (sketched(x) - target).square().mean()
        loss.backward()
        optimiser.step()
        return float(loss.detach())

    losses = [step() for _ in range(20)]
    assert losses[-1] < losses[0]


@cases(is_typical)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_from_dense_and_to_keep_the_dtype(case: Case, dtype: torch.dtype) -> None:
    dense = case.build(dtype=dtype)
    sketched = case.sketch(dense)
    assert {parameter.dtype for parameter in sketched.parameters()} == {dtype}
    assert sketched.weight.dtype == dtype
    # one rounding of each factor, and one of each link's output
    close(sketched(case.inputs(dtype)), dense(case.inputs(dtype)), depth=3)
    assert case.sketch().to(dtype)(case.inputs(dtype)).dtype == dtype


@cases(is_typical)
def test_autocast_computes_in_the_lower_dtype(case: Case) -> None:
    sketched = case.sketch(rank=2)
    with torch.autocast("cpu", torch.bfloat16):
        y = sketched(case.inputs())
    assert y.dtype == torch.bfloat16
    close(y, sketched(case.inputs()).bfloat16(), depth=2)


@cases(is_typical)
def test_autocast_takes_inputs_of_the_lower_dtype_and_gradients_flow(case: Case) -> None:
    """As behind another layer inside autocast."""
    sketched = case.sketch(rank=2)
    with torch.autocast("cpu", torch.bfloat16):
        sketched(case.inputs(torch.bfloat16)).float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in sketched.parameters())


@cases(is_typical)
def test_tensors_without_data_go_through_with_gradients_on(case: Case) -> None:
    sketched = case.sketch(rank=2)
    y = copy.deepcopy(sketched).to("meta")(case.inputs().to("meta"))
    assert y.shape == sketched(case.inputs()).shape and y.requires_grad


@cases(is_traced)
def test_torch_compile_traces_the_whole_layer(case: Case) -> None:
    sketched = case.sketch(rank=2)
    torch._dynamo.reset()
    compiled = torch.compile(sketched, fullgraph=True, backend="aot_eager")
    close(compiled(case.inputs()), sketched(case.inputs()))


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch.export's own use of its deprecated class
@cases(is_traced)
def test_export_leaves_only_standard_operations(case: Case) -> None:
    sketched, x = case.sketch(rank=2).eval(), case.inputs()
    exported = torch.export.export(sketched, (x,))
    names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert names
    assert all(name.startswith("aten.") for name in names)
    close(exported.module()(x), sketched(x))


@cases(lambda case: is_typical(case) and len(case.input_shape) > 1)
def test_an_empty_batch_gives_an_empty_batch(case: Case) -> None:
    x = case.inputs()[:0]
    assert case.sketch()(x).shape == case.build()(x).shape


@cases(is_typical)
def test_an_input_without_batch_axis_works_as_in_torch(case: Case) -> None:
    dense, x = case.build(), case.inputs()
    x = x[0] if x.dim() > 1 else x
    close(case.sketch(dense)(x), dense(x))


@cases(has_terms)
def test_the_first_terms_are_the_layer_built_from_them(case: Case) -> None:
    dense = case.build()
    sketched = case.sketch(dense, num_terms=2, low_rank=1)
    sketched.active_terms = 1
    small = case.sketch(dense, num_terms=1, low_rank=1)
    assert torch.equal(sketched(case.inputs()), small(case.inputs()))
    assert torch.equal(sketched.weight, small.weight)
    close(sketched.to_dense()(case.inputs()), sketched(case.inputs()))
    again: Any = LAYERS[case.layer].from_config(sketched.config())
    again.load_state_dict(sketched.state_dict())
    assert again.active_terms == 1
    assert torch.equal(again(case.inputs()), small(case.inputs()))
    sketched.active_terms = 2
    assert torch.equal(sketched(case.inputs()), case.sketch(dense, num_terms=2, low_rank=1)(case.inputs()))


@cases(has_terms)
def test_a_partial_last_term_counts_as_a_term(case: Case) -> None:
    sketched = case.sketch(rank=3, low_rank=1)
    assert (sketched.rank, sketched.num_terms, sketched.active_terms) == (3, 2, 2)
    sketched.active_terms = 1
    assert torch.equal(sketched(case.inputs()), case.sketch(rank=2, low_rank=1)(case.inputs()))
    wrong: list[tuple[Any, type[Exception]]] = [(0, ValueError), (3, ValueError), (1.0, TypeError), ("1", TypeError)]
    for value, error in wrong:
        with pytest.raises(error, match="active_terms"):
            sketched.active_terms = value
    assert sketched.active_terms == 1


@cases(is_whole)
def test_from_factors_places_given_weights(case: Case) -> None:
    dense, made = case.build(), case.sketch(rank=2)
    weights = [weight.detach().double() for weight in made.active_weights()]
    bias = torch.randn(made.out_features, dtype=torch.float64)
    placed = LAYERS[case.layer].from_factors(dense, case.scheme, weights, bias, low_rank=4)
    assert placed.low_rank == 4
    assert placed.bias is not None
    assert all(map(torch.equal, placed.active_weights(), made.active_weights()))
    assert torch.equal(placed.bias, bias.float())
    assert LAYERS[case.layer].from_factors(dense, case.scheme, weights, None).bias is None


@cases(is_typical)
def test_from_factors_refuses_what_does_not_fit(case: Case) -> None:
    layer, dense = LAYERS[case.layer], case.build()
    weights = [weight.detach() for weight in case.sketch(rank=2).active_weights()]
    with pytest.raises(ValueError, match="expected shapes"):
        layer.from_factors(dense, case.scheme, [*weights[:-1], weights[-1][:-1]], None)
    with pytest.raises(ValueError, match="expected shapes"):
        layer.from_factors(dense, case.scheme, weights, torch.zeros(99))
    with pytest.raises(ValueError, match="NaN or Inf"):
        layer.from_factors(dense, case.scheme, [*weights[:-1], weights[-1] * math.nan], None)
    with pytest.raises(ValueError, match="scheme"):
        layer.from_factors(dense, "middle_out", weights, None)


@cases(is_typical)
def test_flags_of_the_dense_layer_are_kept(case: Case) -> None:
    dense = case.build().eval()
    dense.get_parameter("weight").requires_grad_(False)
    before = torch.random.get_rng_state()
    sketched = case.sketch(dense, rank=2)
    assert not sketched.training
    trainable = {name for name, parameter in sketched.named_parameters() if parameter.requires_grad}
    assert trainable == ({sketched.BIAS} if sketched.bias is not None else set())
    back = sketched.to_dense()
    assert not back.training
    assert not back.weight.requires_grad
    assert torch.equal(torch.random.get_rng_state(), before)  # nobody's random numbers were used up
    if sketched.bias is not None:
        assert sketched.bias.data_ptr() != dense.get_parameter("bias").data_ptr()


@cases(is_typical)
def test_dense_layers_that_cannot_be_sketched_are_refused(case: Case) -> None:
    layer, dense = LAYERS[case.layer], case.build()
    subclass = type("Padded", (layer.DENSE,), {})
    odd = case.build()
    odd.__class__ = subclass
    with pytest.raises(TypeError, match=f"Padded, a subclass of nn.{layer.DENSE.__name__}: its forward may differ"):
        layer.from_dense(odd, rank=1)
    with pytest.raises(TypeError, match=f"{case.layer} is made from nn.{layer.DENSE.__name__}.*got ReLU"):
        layer.from_dense(nn.ReLU(), rank=1)
    for bad in (math.nan, math.inf):
        with torch.no_grad():
            dense.get_parameter("weight").view(-1)[0] = bad
        with pytest.raises(ValueError, match="1 NaN or Inf of"):
            layer.from_dense(dense, rank=1)


@cases(is_typical)
def test_sizes_must_be_said_in_one_way(case: Case) -> None:
    layer, dense = LAYERS[case.layer], case.build()
    for size in ({}, {"num_terms": 1}, {"low_rank": 1}, {"num_terms": 1, "rank": 1}):
        with pytest.raises(ValueError, match="give num_terms= and low_rank=, or rank="):
            layer.from_dense(dense, **size)
    with pytest.raises(ValueError, match="rank=0"):
        layer.from_dense(dense, rank=0)
    with pytest.raises(TypeError, match=r"rank=2\.5"):
        layer.from_dense(dense, rank=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no scheme 'middle_out'"):
        layer.from_dense(dense, rank=1, scheme="middle_out")


HOSTILE: list[Any] = [
    None,
    True,
    -1,
    0,
    2**70,
    1.0,
    math.nan,
    "x" * 100,
    "__import__('os')",
    [],
    [1] * 9,
    [[1]],
    {},
    [2**40],
]


@cases(is_typical)
def test_hostile_configs_are_refused(case: Case) -> None:
    layer = LAYERS[case.layer]
    good = case.sketch(rank=2).config()
    for key, value in itertools.product(good, HOSTILE):
        if (key, value) in (("bias", True), ("seed", 0), ("row_order", True), ("column_order", True)):
            continue  # not hostile
        with pytest.raises(ValueError, match="config"):
            layer.from_config({**good, key: value})
    for data in (None, [], "config", {}, {**good, "code": "x"}, {k: v for k, v in good.items() if k != "ranks"}):
        with pytest.raises(ValueError, match="config"):
            layer.from_config(data)  # type: ignore[arg-type]


@cases(is_whole)
def test_a_config_that_asks_for_too_much_memory_is_refused(case: Case) -> None:
    good = case.sketch(rank=2).config()
    ranks = [2**30] * len(good["ranks"])
    with pytest.raises(ValueError, match="more than any real layer"):
        LAYERS[case.layer].from_config({**good, "ranks": ranks, "low_rank": 2**28, "active_terms": 1})


@cases(is_typical)
def test_a_saved_and_loaded_module_is_the_same(case: Case) -> None:
    model = nn.Sequential(case.sketch(rank=2))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = nn.Sequential(LAYERS[case.layer].from_config(model[0].config()))  # type: ignore[operator]
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(case.inputs()), model(case.inputs()))


@cases(is_typical)
def test_the_printed_layer_tells_its_size(case: Case) -> None:
    text = repr(case.sketch(rank=2))
    assert text.startswith(f"{case.layer}(")
    assert ("pivots=" if case.is_pivoted else "num_terms=1, low_rank=8") in text
    assert ("bias=False" in text) == ("bias" in case.options)
