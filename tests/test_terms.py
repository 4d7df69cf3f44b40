"""The ranks of healed layers in the order of their importance again, and nothing else about the model changed."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from panther.batches import Call
from panther.healers.terms import RIDGE, reorder
from panther.nn import SKConv2d, SketchedLayer, SKLinear, SKPivotedLinear


def mixed(layer: SketchedLayer) -> SketchedLayer:
    """The same function with its ranks stirred, as training does: up M^-1 M down."""
    rank = layer.rank
    stir = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64)).Q * torch.logspace(-0.5, 0.5, rank).double()
    with torch.no_grad():
        down = (stir @ layer.down.double().flatten(1)).reshape(layer.down.shape)
        up = (layer.up.double().movedim(1, -1) @ torch.linalg.inv(stir)).movedim(-1, 1)
        layer.down.copy_(down)
        layer.up.copy_(up)
    return layer


def steep(shape: tuple[int, ...]) -> Tensor:
    """A weight whose singular values fall like 1/k."""
    flat = torch.randn(shape).flatten(1)
    u, s, vh = torch.linalg.svd(flat, full_matrices=False)
    values = 1 / torch.arange(1.0, len(s) + 1)
    return (u * values @ vh).reshape(shape)


def linear() -> SketchedLayer:
    dense = nn.Linear(20, 16)
    dense.weight.data = steep((16, 20))
    return SKLinear.from_dense(dense, rank=8, scheme=None)


def conv(scheme: str) -> SketchedLayer:
    dense = nn.Conv2d(6, 16, 3, padding=1)
    dense.weight.data = steep((16, 6, 3, 3))
    return SKConv2d.from_dense(dense, rank=4, scheme=scheme)


CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (linear, (40, 20)),
    "sequence": (linear, (5, 8, 20)),
    "output_channel": (lambda: conv("output_channel"), (3, 6, 7, 7)),
    "input_channel": (lambda: conv("input_channel"), (3, 6, 7, 7)),
    "spatial": (lambda: conv("spatial"), (3, 6, 7, 7)),
}
every_case = pytest.mark.parametrize("case", CASES)


def made(case: str) -> tuple[SketchedLayer, list[Call]]:
    build, shape = CASES[case]
    layer = mixed(build())
    layer.low_rank = 1  # two ranks a term
    layer.num_terms = layer._active_terms = layer.rank // 2
    scale = torch.linspace(0.3, 2, shape[1 if len(shape) == 4 else -1])
    scale = scale[:, None, None] if len(shape) == 4 else scale
    return layer, [Call((torch.randn(shape) * scale,)) for _ in range(4)]


def rounding(layer: SketchedLayer, call: Call) -> float:
    """A bound of what storing other factors in float32 may change in an output.

    Each product is rounded twice, and the ridge lets the factors of a rank that carries nothing grow to 1/sqrt(RIDGE)
    of their share.
    """
    norms = float(layer.up.norm() * layer.down.norm()) * float(call.args[0].flatten(1).norm(dim=1).max())
    return 4 * torch.finfo(layer.down.dtype).eps * norms / RIDGE**0.5


@every_case
def test_the_layer_computes_the_same(case: str) -> None:
    layer, calls = made(case)
    before = copy.deepcopy(layer)
    assert reorder(nn.Sequential(layer), calls) == ["0"]
    assert not torch.equal(layer.down, before.down)
    with torch.no_grad():
        for call in calls:
            assert float((layer(*call.args) - before(*call.args)).abs().max()) <= rounding(before, call)


def test_layers_whose_input_is_named_are_put_in_order_too() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.layer(input=x)
            return answer

    layer, calls = made("linear")
    assert reorder(Named(), calls) == ["layer"]


@every_case
def test_each_rank_carries_less_of_the_output_than_the_one_before(case: str) -> None:
    layer, calls = made(case)
    reorder(nn.Sequential(layer), calls)
    carried = []
    for rank in range(layer.rank):
        only = copy.deepcopy(layer)
        with torch.no_grad():
            only.up[:, torch.arange(layer.rank) != rank] = 0
            assert only.bias is not None
            only.bias.zero_()
            carried.append(sum(float(only(*call.args).square().sum()) for call in calls))
    if case in ("input_channel", "spatial"):  # kernels overlap at their positions: their energies only nearly add up
        assert carried[0] == max(carried) and carried[-1] == min(carried)
    else:
        assert all(a >= b * (1 - 1e-3) for a, b in itertools.pairwise(carried))


@every_case
def test_the_first_term_alone_is_better_than_any_other_and_than_before(case: str) -> None:
    layer, calls = made(case)
    whole = copy.deepcopy(layer)

    def lost(first: list[int]) -> float:
        part = copy.deepcopy(layer)
        with torch.no_grad():
            order = [*first, *(i for i in range(layer.rank) if i not in first)]
            part.down.copy_(layer.down[order])
            part.up.copy_(layer.up[:, order])
            part.active_terms = 1
            return sum(float((part(*call.args) - whole(*call.args)).square().sum()) for call in calls)

    before = lost([0, 1])
    reorder(nn.Sequential(layer), calls)
    best = lost([0, 1])
    assert best < before
    assert all(best < lost([i, i + 1]) for i in range(2, layer.rank, 2))


def test_padding_has_no_say() -> None:
    """A layer whose padded positions are huge is ordered by the others."""

    class Masked(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            answer: Tensor = self.layer(x)
            return answer

    layer, _ = made("linear")
    other = copy.deepcopy(layer)
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[:, 3:] = 0
    x = torch.randn(4, 6, 20)
    loud = torch.where(mask[..., None].bool(), x, 1e3 * torch.randn(4, 6, 20))
    reorder(Masked(layer), [Call((), {"x": x, "attention_mask": mask})])
    reorder(Masked(other), [Call((), {"x": loud, "attention_mask": mask})])
    assert torch.equal(layer.down, other.down) and torch.equal(layer.up, other.up)


@pytest.mark.parametrize("inputs", [torch.zeros(4, 20), torch.full((4, 20), torch.nan), torch.full((4, 20), 1e30)])
def test_inputs_without_a_usable_size_leave_the_order_as_it_is(inputs: Tensor) -> None:
    layer, _ = made("linear")
    before = copy.deepcopy(layer)
    reorder(nn.Sequential(layer), [Call((inputs,))])
    assert torch.equal(layer.down, before.down) and torch.equal(layer.up, before.up)


def test_inputs_of_one_direction_change_nothing_that_the_layer_computes_on_others() -> None:
    layer, _ = made("linear")
    before, x = copy.deepcopy(layer), torch.randn(30, 20)
    reorder(nn.Sequential(layer), [Call((torch.randn(9, 1) @ torch.randn(1, 20),))])
    with torch.no_grad():
        assert float((layer(x) - before(x)).abs().max()) <= rounding(before, Call((x,)))


def test_layers_of_other_kinds_and_flags_and_hooks_stay() -> None:
    tucker = SKConv2d.from_dense(nn.Conv2d(8, 8, 3, padding=1), rank=4, scheme="tucker2")
    pivoted = SKPivotedLinear.from_sketched(linear(), side="rows")
    model = nn.Sequential(tucker, nn.Dropout(), nn.AdaptiveAvgPool2d((4, 5)), nn.Flatten(2), pivoted).train()
    before = copy.deepcopy(model.state_dict())
    assert reorder(model, [Call((torch.randn(2, 8, 6, 6),))]) == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and model[1].training
    assert not any(m._forward_hooks for m in model.modules())
