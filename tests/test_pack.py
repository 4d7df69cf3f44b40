"""A packed model computes what the model of two products did, from fewer numbers and with fewer gathers."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import panther
from panther import chains
from panther.batches import Call
from panther.capture import capture
from panther.nn import SKETCHED, PivotedLayer, SketchedLayer, SKLinear, SKPivotedConv2d, SKPivotedLinear
from panther.nn import pivoted as pivoted_layers
from panther.nn.surgery import with_layers
from panther.pack import pack, packed
from panther.spec import Choice, Pair, Plan
from panther.verify import layer_report

DENSE, WHOLE, PIVOTS = "dense", chains.TWO_GEMM, chains.PIVOTED
X = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(1))


def close(got: Tensor, wanted: Tensor, layers: int = 3, terms: int = 24 * 9) -> None:
    """Equal up to the rounding of a few layers, each of two products with sums of at most `terms` terms."""
    eps, scale = torch.finfo(got.dtype).eps, float(wanted.detach().abs().max())
    torch.testing.assert_close(got, wanted, rtol=16 * eps, atol=16 * layers * eps * math.sqrt(terms) * scale)


class Mlp(nn.Module):
    def __init__(self, hidden: int = 24, *, norm: bool = False) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(12, hidden), nn.GELU(), nn.Linear(hidden, 16)
        self.norm = nn.BatchNorm1d(hidden) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.fc2(self.act(self.norm(self.fc1(x))))
        return answer


def cnn(last: int = 16) -> nn.Sequential:
    body = [nn.Conv2d(8, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, last, 3)]
    return nn.Sequential(*body, nn.SiLU())


def lively(model: nn.Module) -> nn.Module:
    """Batch norms that treat every channel differently; evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 2.0)  # type: ignore[arg-type]
    return model.eval()


def sketched(model: nn.Module, kinds: Mapping[str, tuple[str, str]], rank: int = 5) -> tuple[nn.Module, Plan]:
    """A model with some layers as two products, and the plan that packs them: name -> (scheme, packing)."""
    layers, choices = {}, []
    for name, (scheme, packing) in kinds.items():
        if scheme == DENSE:
            choices.append(Choice(name, packing=DENSE))
            continue
        dense = model.get_submodule(name)
        layers[name] = SKETCHED[type(dense)].from_dense(dense, rank=rank, scheme=scheme)
        choices.append(Choice(name, scheme, layers[name].ranks, packing))
    return with_layers(model, layers), Plan(tuple(choices))


def gathers(model: nn.Module, x: Tensor) -> int:
    program = torch.export.export(model, (x,))
    return sum("index_select" in str(node.target) for node in program.graph.nodes)


# One layer


@pytest.mark.parametrize("scheme", ["output_channel", "input_channel", "tucker2"])
def test_a_convolution_is_stored_as_its_choice_says(scheme: str) -> None:
    dense = nn.Conv2d(8, 16, 3)
    whole = SKETCHED[nn.Conv2d].from_dense(dense, rank=4, scheme=scheme)
    assert packed(whole, Choice("c", scheme, whole.ranks)) is whole
    layer = packed(whole, Choice("c", scheme, whole.ranks, PIVOTS))
    assert type(layer) is SKPivotedConv2d
    close(layer(IMAGES), whole(IMAGES))


@pytest.mark.parametrize(("inputs", "outputs"), [(12, 40), (40, 12), (24, 24)])
def test_a_linear_layer_gathers_its_smaller_side(inputs: int, outputs: int) -> None:
    whole = SKLinear.from_dense(nn.Linear(inputs, outputs), rank=5)
    choice = Choice("fc", "linear", (5,), PIVOTS)
    layer: Any = packed(whole, choice)
    assert layer.side == (chains.COLUMNS if outputs > inputs else chains.ROWS)
    assert sum(len(order) for order in layer.buffers()) == min(inputs, outputs)
    assert packed(whole, choice, has_follower=True).side == chains.ROWS


def test_a_layer_without_good_pivots_keeps_its_products_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pivoted_layers, "LARGEST_COEFFICIENT", 0.1)
    notes: list[str] = []
    whole = SKLinear.from_dense(nn.Linear(24, 24), rank=5)
    assert packed(whole, Choice("fc", "linear", (5,), PIVOTS), notes=notes) is whole
    assert len(notes) == 1 and notes[0].startswith(
        "fc is not pivoted, it keeps its products: SKPivotedLinear.from_sket"
    )
    assert "a coefficient of" in notes[0]


@pytest.mark.filterwarnings("ignore:.*would be smaller:UserWarning")
def test_where_two_products_would_be_larger_it_becomes_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pivoted_layers, "LARGEST_COEFFICIENT", 0.1)
    notes: list[str] = []
    model, plan = sketched(Mlp(), {"fc1": ("linear", PIVOTS), "fc2": ("linear", PIVOTS)}, rank=11)
    before = model(X)
    pack(model, plan, notes=notes)
    assert type(model.fc1) is nn.Linear and not hasattr(model.fc1, "ranks") and "_links" not in vars(model.fc1)
    close(model(X), before)
    assert [note[: note.index(":")] for note in notes] == [f"{n} is not pivoted, it is dense" for n in ("fc1", "fc2")]


# A model


def test_only_layers_that_the_plan_pivots_change_and_the_model_is_the_same_object() -> None:
    kinds = {"fc1": ("linear", PIVOTS), "fc2": ("linear", WHOLE)}
    model, plan = sketched(Mlp(), kinds)
    before, second = model(X), model.fc2
    assert pack(model, plan) is model
    assert type(model.fc1) is SKPivotedLinear and model.fc2 is second
    close(model(X), before)


def test_packing_again_changes_nothing() -> None:
    model, plan = sketched(Mlp(), {"fc1": ("linear", PIVOTS), "fc2": ("linear", PIVOTS)})
    followers = (Pair("fc1", "fc2"),)
    pack(model, plan, followers)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    pack(model, plan, followers)
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_model_that_is_itself_the_layer_is_returned_packed() -> None:
    whole = SKLinear.from_dense(nn.Linear(24, 24), rank=5).eval()
    whole.register_forward_hook(lambda _module, _args, output: output + 1)
    layer = pack(whole, Plan((Choice("", "linear", (5,), PIVOTS),)))
    assert type(layer) is SKPivotedLinear and not layer.training
    close(layer(torch.ones(2, 24)), whole(torch.ones(2, 24)))


def test_hooks_flags_and_shared_layers_stay() -> None:
    model = Mlp()
    model.again = model.fc1
    model.fc1.tag = "kept"  # type: ignore[assignment]
    packed_model, plan = sketched(model, {"fc1": ("linear", PIVOTS)})
    seen: list[Any] = []
    packed_model.fc1.register_forward_hook(lambda *_: seen.append(1))
    pack(packed_model, plan)
    assert packed_model.again is packed_model.fc1 and packed_model.fc1.tag == "kept"
    packed_model(X)
    assert seen == [1]


# Orders that a neighbour takes over


@pytest.mark.parametrize("second", [DENSE, WHOLE, PIVOTS])
@pytest.mark.parametrize("norm", [False, True])
def test_the_next_layer_takes_the_order_of_a_linear_layer_over(second: str, norm: bool) -> None:
    model = lively(Mlp(norm=norm))
    kinds = {"fc1": ("linear", PIVOTS), "fc2": (DENSE if second == DENSE else "linear", second)}
    model, plan = sketched(model, kinds)
    before = model(X)
    pairs = capture(lively(Mlp(norm=norm)), Call((X,))).followers
    assert pairs == (Pair("fc1", "fc2", ("norm",) if norm else ()),)
    apart = pack(copy.deepcopy(model), plan)
    together = pack(model, plan, pairs)
    assert gathers(apart, X) - gathers(together, X) == 1 and together.fc1.row_order is None
    assert apart.fc1.side == chains.COLUMNS and together.fc1.side == chains.ROWS
    close(together(X), before)
    close(apart(X), before)


FIRST = {
    "dense": (DENSE, DENSE),
    **{f"{s} whole": (s, WHOLE) for s in chains.CONV_SCHEMES},
    **{f"{s} pivoted": (s, PIVOTS) for s in ("output_channel", "input_channel", "tucker2")},
}


@pytest.mark.parametrize("second", FIRST.values(), ids=FIRST)
@pytest.mark.parametrize("first", FIRST.values(), ids=FIRST)
def test_convolutions_share_one_order_at_most(first: tuple[str, str], second: tuple[str, str]) -> None:
    model, plan = sketched(lively(cnn()), {"0": first, "3": second})
    before = model(IMAGES)
    apart = pack(copy.deepcopy(model), plan)
    pack(model, plan, [Pair("0", "3", ("1",))])
    close(model(IMAGES), before)
    makes = first[1] == PIVOTS and chains.ROWS in chains.PIVOTS[first[0]]
    takes = second[1] == PIVOTS and chains.COLUMNS in chains.PIVOTS[second[0]]
    # Of an order on each side one is left, which is both; an order on one side is taken over by the other.
    spared = 1 if makes or takes else 0
    assert orders(apart) - orders(model) == spared
    assert makes + takes - spared == sum(layer_orders(model, "0", "3"))


def orders(model: nn.Module) -> int:
    return sum(order is not None for m in model.modules() if isinstance(m, PivotedLayer) for order in m.buffers())


def layer_orders(model: nn.Module, first: str, second: str) -> list[bool]:
    """Whether something is still gathered between two layers, after the first and before the second."""
    made, taken = model.get_submodule(first), model.get_submodule(second)
    return [getattr(made, "row_order", None) is not None, getattr(taken, "column_order", None) is not None]


def test_a_chain_of_layers_passes_on_one_order_after_the_other() -> None:
    torch.manual_seed(3)
    layers = [nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 28), nn.Tanh(), nn.Linear(28, 20)]
    model = nn.Sequential(*layers).eval()
    x = torch.randn(4, 20)
    pairs = capture(model, Call((x,))).followers
    assert [(pair.producer, pair.consumer) for pair in pairs] == [("0", "2"), ("2", "4")]
    model, plan = sketched(model, dict.fromkeys(("0", "2", "4"), ("linear", PIVOTS)))
    before = model(x)
    pack(model, plan, pairs)
    assert gathers(model, x) == 1 and orders(model) == 1
    close(model(x), before)


def test_a_neighbour_that_is_not_in_the_plan_is_left_alone() -> None:
    model, plan = sketched(Mlp(), {"fc1": ("linear", PIVOTS)})
    weight, before = model.fc2.weight.clone(), model(X)
    pack(model, plan, [Pair("fc1", "fc2")])
    assert torch.equal(model.fc2.weight, weight) and orders(model) == 1
    assert model.fc1.side == chains.COLUMNS  # the smaller side, as nobody takes the outputs over
    close(model(X), before)


def test_the_numbers_of_neighbours_stay_in_their_tensors() -> None:
    model, plan = sketched(lively(Mlp(norm=True)), {"fc1": ("linear", PIVOTS), "fc2": (DENSE, DENSE)})
    mine = {name: p for name, p in model.named_parameters() if not name.startswith("fc1")}
    flags = {name: p.requires_grad for name, p in mine.items()}
    pack(model, plan, [Pair("fc1", "fc2", ("norm",))])
    after = dict(model.named_parameters())
    assert all(after[name] is p and p.requires_grad == flags[name] for name, p in mine.items())


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_a_norm_without_some_of_its_tensors_is_no_trouble(options: dict[str, bool]) -> None:
    model = Mlp(norm=True)
    model.norm = nn.BatchNorm1d(24, **options)
    model, plan = sketched(model.eval(), {"fc1": ("linear", PIVOTS), "fc2": ("linear", WHOLE)})
    before = model(X)
    pack(model, plan, [Pair("fc1", "fc2", ("norm",))])
    close(model(X), before)
    assert orders(model) == 0


def test_training_goes_on_after_packing() -> None:
    model, plan = sketched(lively(Mlp(norm=True)), {"fc1": ("linear", PIVOTS), "fc2": ("linear", PIVOTS)})
    pack(model, plan, [Pair("fc1", "fc2", ("norm",))])
    model.train()(X).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


# The report


def test_the_report_counts_what_a_pivoted_layer_really_stores() -> None:
    dense = Mlp().eval()
    found = capture(dense, Call((X,)))
    first, second = found.layers
    kinds = {"fc1": ("linear", PIVOTS), "fc2": ("linear", PIVOTS)}
    model, plan = sketched(dense, kinds)
    pack(model, plan, found.followers)
    rows = {spec.name: layer_report(spec, plan[spec.name], model) for spec in found.layers}
    assert [(row.scheme, row.packing, row.terms, row.ranks) for row in rows.values()] == [
        ("linear", PIVOTS, 1, (5,))
    ] * 2
    assert rows["fc1"].after.params == 5 * (12 + 24 - 5)  # whose order fc2 took over
    assert rows["fc2"].after.params == 5 * (24 + 16 - 5) + 16
    assert rows["fc2"].after.size_bytes == 4 * rows["fc2"].after.params
    for spec in (first, second):
        cost = chains.chain_cost("linear", spec, (5,), 4, PIVOTS)
        assert rows[spec.name].after.flops == cost.flops and rows[spec.name].after.params <= cost.params


# Through compress


class Net(nn.Module):
    """Convolutions with norms, then blocks of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(8, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 32, 3), nn.ReLU()
        )
        self.block = nn.Sequential(nn.Linear(32, 96), nn.GELU(), nn.Linear(96, 32))
        self.head = nn.Linear(32, 20)

    def forward(self, image: Tensor) -> Tensor:
        pooled = self.body(image).mean((2, 3))
        answer: Tensor = self.head(pooled + self.block(pooled))
        return answer


@pytest.fixture(scope="module")
def compressed() -> tuple[nn.Module, panther.Result, Tensor]:
    torch.manual_seed(0)
    model, images = lively(Net()), torch.randn(96, 8, 8, 8).cumsum(-1)
    result = panther.compress(
        model,
        0.6,
        example_inputs=images[:2],
        calib_data=list(images.split(16)),
        heal="none",  # so that the two products of the plan are known
        progress=False,
        verify=False,
    )
    return model, result, images


def test_compress_packs_as_its_plan_says_within_the_budget(compressed: Any) -> None:
    _, result, images = compressed
    choices = {choice.layer: choice for choice in result.plan.sketched}
    assert any(choice.packing == PIVOTS for choice in choices.values())
    for name, choice in choices.items():
        layer: Any = result.model.get_submodule(name)
        assert isinstance(layer, SketchedLayer)
        assert (layer.scheme, layer.ranks, layer.PACKING) == (choice.scheme, choice.ranks, choice.packing)
    assert result.budget_met
    assert {row.packing for row in result.report.layers} <= {DENSE, WHOLE, PIVOTS}
    assert "pivoted" in str(result.report)
    assert result.model(images[:3]).isfinite().all()


def test_a_packed_model_computes_what_its_plan_does_in_two_products(compressed: Any) -> None:
    model, result, images = compressed
    from panther.replace import replace

    whole = replace(model, result._prepared.factors, result.plan)
    close(result.model(images), whole(images), layers=10, terms=32 * 9)


def test_a_packed_model_is_saved_and_loaded_to_the_bit(compressed: Any, tmp_path: Any) -> None:
    _, result, images = compressed
    result.save(tmp_path / "saved")
    loaded = panther.load(tmp_path / "saved", model=Net)
    assert torch.equal(loaded(images[:5]), result.model(images[:5]))
    again = panther.compress(
        Net().eval(),
        0.6,
        example_inputs=images[:2],
        calib_data=images,
        plan=result.plan,
        heal="none",
        progress=False,
        verify=False,
    )
    assert [c.kind for c in again.plan.choices] == [c.kind for c in result.plan.choices]


def test_a_packed_model_is_exported_and_checked(compressed: Any, tmp_path: Any) -> None:
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    _, result, _ = compressed
    report = result.export_onnx(tmp_path / "net.onnx")
    assert report.ok
    kinds = {node.op_type for node in onnx.load(report.path).graph.node}
    assert {"Concat", "Gather"} & kinds and {node.domain for node in onnx.load(report.path).graph.node} == {""}


def test_inplace_gives_neighbours_the_order_too(compressed: Any) -> None:
    _, result, images = compressed
    torch.manual_seed(0)
    model = lively(Net())
    mine = panther.compress(
        model,
        0.6,
        example_inputs=images[:2],
        calib_data=list(images.split(16)),
        plan=result.plan,
        heal="none",
        progress=False,
        verify=False,
        inplace=True,
    )
    assert mine.model is model
    assert torch.equal(model(images[:5]), result.model(images[:5]))
