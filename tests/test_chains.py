"""What a chain of links computes and costs, held against torch's own convolutions and torch's own counter."""

import functools
import math
import warnings
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from panther import chains
from panther.batches import Call
from panther.capture import capture
from panther.nn import PIVOTED, SKETCHED, SKLinear, SKPivotedLinear
from panther.spec import Cost, LayerSpec

# Torch's advice on even kernels: both sides of a comparison get it.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

# Odd sizes, so that a swapped axis or a forgotten stride changes a shape.
CONVS = {
    "conv1d": (lambda: nn.Conv1d(6, 10, 5, stride=2, padding=1, dilation=2), (23,)),
    "conv1d same": (lambda: nn.Conv1d(6, 10, 4, padding="same", dilation=3), (17,)),
    "conv2d": (lambda: nn.Conv2d(6, 10, (3, 5), stride=(2, 3), padding=(1, 2), dilation=(2, 1)), (19, 22)),
    "conv2d plain": (lambda: nn.Conv2d(6, 10, 3), (9, 12)),
    "conv2d same": (lambda: nn.Conv2d(6, 10, (4, 3), padding="same"), (9, 12)),
    "conv2d valid": (lambda: nn.Conv2d(6, 10, (4, 3), padding="valid", stride=2), (9, 12)),
    "conv2d wide": (lambda: nn.Conv2d(6, 10, (1, 5), padding=(0, 2)), (9, 12)),
    "conv2d pointwise": (lambda: nn.Conv2d(6, 10, 1, stride=2), (9, 12)),
    "conv2d reflect": (lambda: nn.Conv2d(6, 10, 3, padding=1, padding_mode="reflect", stride=2), (9, 12)),
    "conv2d circular": (lambda: nn.Conv2d(6, 10, (3, 4), padding="same", padding_mode="circular"), (9, 12)),
    "conv3d": (lambda: nn.Conv3d(6, 10, (2, 3, 3), stride=(1, 2, 1), padding=(0, 1, 2)), (7, 8, 9)),
}

CASES = [
    (name, scheme)
    for name in CONVS
    for scheme in chains.CONV_SCHEMES
    if scheme != "spatial" or name.startswith("conv2d")
]

# The other padding modes pad the input before the chain, whose links then pad nothing.
ZERO_PADDED = [case for case in CASES if case[0] not in ("conv2d reflect", "conv2d circular")]


@functools.cache
def made(name):
    """A dense layer, an input for it and its spec; shared, since no test changes them."""
    make, size = CONVS[name]
    conv = make()
    x = torch.randn(2, 6, *size)
    (spec,) = capture(conv, Call((x,))).layers
    return conv, x, spec


def ranks_of(scheme):
    return (3, 4) if scheme == "tucker2" else (4,)


def counted(function, *args):
    """What torch counts, whether gradients are recorded, which runs standard operations, or not, which runs our ops."""
    with FlopCounterMode(display=False) as recording:
        function(*args)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*args)
    assert counter.get_total_flops() == recording.get_total_flops()
    return counter.get_total_flops()


# --- geometry --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "scheme"), ZERO_PADDED)
def test_a_chain_of_torch_convolutions_has_the_shape_of_the_dense_one(name, scheme):
    conv, x, spec = made(name)
    expected = conv(x).shape
    for link in chains.links(scheme, spec, ranks_of(scheme)):
        weight = torch.randn(link.weight_shape)
        assert weight.numel() == link.params
        x = CONVOLVE[len(spec.kernel_size)](x, weight, None, link.stride, link.padding, link.dilation)
    assert x.shape == expected


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_a_sketched_layer_has_the_shape_of_the_dense_one(name, scheme):
    conv, x, _ = made(name)
    assert SKETCHED[type(conv)].from_dense(conv, rank=1, scheme=scheme)(x).shape == conv(x).shape


@pytest.mark.parametrize("scheme", chains.CONV_SCHEMES)
def test_links_pass_on_what_the_one_before_them_makes(scheme):
    spec = made("conv2d")[2]
    chain = chains.links(scheme, spec, ranks_of(scheme))
    assert chain[0].in_channels == spec.in_features and chain[-1].out_channels == spec.out_features
    assert all(one.out_channels == two.in_channels for one, two in pairwise(chain))
    assert tuple(link.out_channels for link in chain[:-1]) == ranks_of(scheme)
    # Along each axis exactly one link has the kernel, the stride and the dilation of the layer.
    for axis in range(2):
        wide = [link for link in chain if link.kernel_size[axis] != 1]
        assert [link.kernel_size[axis] for link in wide] == [spec.kernel_size[axis]]
        assert [link.padding[axis] for link in wide] == [spec.padding[axis]]
        assert math.prod(link.stride[axis] for link in chain) == spec.stride[axis]
        assert math.prod(link.dilation[axis] for link in chain) == spec.dilation[axis]


def test_a_linear_layer_is_two_thin_ones():
    first, last = chains.links("linear", LayerSpec("a", "linear", 12, 20, rows=1), (5,))
    assert (first.weight_shape, last.weight_shape) == ((5, 12), (20, 5))


@pytest.mark.parametrize(
    ("scheme", "name", "kind"),
    [
        ("linear", "conv2d", "2-d"),
        ("spatial", "conv1d", "1-d"),
        ("spatial", "conv3d", "3-d"),
        ("other", "conv2d", "2-d"),
    ],
)
def test_a_scheme_that_does_not_apply_lists_those_that_exist(scheme, name, kind):
    with pytest.raises(
        ValueError, match=f"no scheme '{scheme}' for a {kind} convolution; schemes: linear, output_chan"
    ):
        chains.links(scheme, made(name)[2], (4,))
    with pytest.raises(ValueError, match="no scheme 'tucker2' for a linear layer"):
        chains.links("tucker2", LayerSpec("a", "linear", 12, 20, rows=1), (4, 4))


@pytest.mark.parametrize(
    ("name", "schemes"),
    [
        ("conv1d", ("output_channel", "input_channel", "tucker2")),
        ("conv2d", chains.CONV_SCHEMES),
        ("conv2d wide", ("output_channel", "input_channel", "tucker2")),
        ("conv2d pointwise", ("output_channel",)),
        ("conv3d", ("output_channel", "input_channel", "tucker2")),
    ],
)
def test_only_schemes_that_split_the_layer_are_tried(name, schemes):
    assert chains.schemes_for(made(name)[2]) == schemes


# --- costs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVS)
def test_the_dense_cost_is_what_torch_counts(name):
    conv, x, spec = made(name)
    assert chains.dense_cost(spec, 4) == Cost(conv.weight.numel(), counted(conv, x), 4 * conv.weight.numel())


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_the_cost_of_a_chain_is_what_its_layer_holds_and_torch_counts(name, scheme):
    conv, x, spec = made(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # some of these chains are larger than their layer
        sketched = SKETCHED[type(conv)].from_dense(conv, rank=ranks_of(scheme), scheme=scheme)
    held = sum(p.numel() for n, p in sketched.named_parameters() if n != "bias")
    assert chains.chain_cost(scheme, spec, ranks_of(scheme), 2) == Cost(held, counted(sketched, x), 2 * held)


def test_the_cost_of_a_linear_chain_is_what_torch_counts():
    x, dense = torch.randn(2, 7, 24), nn.Linear(24, 40)
    (spec,) = capture(dense, Call((x,))).layers
    cost = chains.chain_cost("linear", spec, (5,), 4)
    assert cost == Cost(5 * 64, counted(SKLinear.from_dense(dense, rank=5), x), 4 * 5 * 64)
    assert cost.flops == 2 * 14 * 5 * 64


@pytest.mark.parametrize(("name", "scheme"), [case for case in CASES if chains.PIVOTS[case[1]]])
def test_the_cost_of_a_pivoted_chain_is_what_its_layer_holds_and_torch_counts(name, scheme):
    conv, x, spec = made(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # as above
        sketched = SKETCHED[type(conv)].from_dense(conv, rank=ranks_of(scheme), scheme=scheme)
    layer = PIVOTED[type(sketched)].from_sketched(sketched)
    held = sum(p.numel() for n, p in layer.named_parameters() if n != "offset")
    sides = {chains.COLUMNS: spec.in_features, chains.ROWS: spec.out_features}
    order = sum(sides[side] for side in chains.PIVOTS[scheme])
    cost = chains.chain_cost(scheme, spec, ranks_of(scheme), 2, chains.PIVOTED)
    assert cost == Cost(held + order, counted(layer, x), 2 * held + 4 * order)
    assert [None if w is None else w.numel() for w in (layer.down, layer.up)] == [
        link.params or None
        for link in chains.pivoted(chains.links(scheme, spec, ranks_of(scheme)), chains.PIVOTS[scheme])[
            :: len(layer.ranks)
        ]
    ]


@pytest.mark.parametrize("side", [chains.ROWS, chains.COLUMNS])
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 40), (40, 24), (30, 30)])
def test_a_pivoted_linear_chain_costs_the_rank_squared_less_and_an_order_on_its_smaller_side(inputs, outputs, side):
    x = torch.randn(2, 7, inputs)
    dense = nn.Linear(inputs, outputs)
    (spec,) = capture(dense, Call((x,))).layers
    layer = SKPivotedLinear.from_sketched(SKLinear.from_dense(dense, rank=5), side=side)
    cost = chains.chain_cost("linear", spec, (5,), 4, chains.PIVOTED)
    weights = 5 * (inputs + outputs - 5)
    order = min(inputs, outputs)
    assert cost == Cost(weights + order, 2 * 14 * weights, 4 * (weights + order))
    assert weights == sum(p.numel() for n, p in layer.named_parameters() if n != "offset")
    assert counted(layer, x) == cost.flops


@pytest.mark.parametrize(("scheme", "ranks"), [("output_channel", (11,)), ("input_channel", (7,)), ("tucker2", (7, 4))])
def test_more_pivots_than_channels_are_refused(scheme, ranks):
    spec = made("conv2d")[2]
    with pytest.raises(ValueError, match=f"rank {ranks[0]} has no pivots among {ranks[0] - 1} (inputs|outputs)"):
        chains.pivoted(chains.links(scheme, spec, ranks), chains.PIVOTS[scheme])


def test_every_scheme_says_where_its_pivots_are_and_only_spatial_has_none():
    assert set(chains.PIVOTS) == {chains.LINEAR, *chains.CONV_SCHEMES}
    assert [s for s in chains.PIVOTS if chains.packings_for(s) != chains.PACKINGS] == ["spatial"]


def test_several_calls_and_a_missing_batch_dimension_are_counted():
    conv = nn.Conv2d(6, 6, 3, padding=1)
    sketched = SKETCHED[nn.Conv2d].from_dense(conv, rank=2, scheme="input_channel")
    unbatched = torch.randn(6, 9, 12)
    (spec,) = capture(conv, Call((unbatched,))).layers
    assert chains.chain_cost("input_channel", spec, (2,), 4).flops == counted(sketched, unbatched)
    (spec,) = capture(nn.Sequential(conv, conv), Call((torch.randn(2, 6, 9, 12),))).layers
    assert spec.calls == 2
    twice = counted(nn.Sequential(sketched, sketched), torch.randn(2, 6, 9, 12))
    assert chains.chain_cost("input_channel", spec, (2,), 4).flops == twice


# --- what pays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "scheme"), [case for case in CASES if case[1] != "tucker2"])
def test_break_even_is_where_the_chain_holds_as_much_as_the_layer(name, scheme):
    spec = made(name)[2]
    even = chains.break_even(scheme, spec)
    per_rank = chains.chain_cost(scheme, spec, (1,), 4).params
    assert even * per_rank == pytest.approx(spec.params)
    for rank in range(1, 40):
        assert (chains.chain_cost(scheme, spec, (rank,), 4).params < spec.params) == (rank < even)


@pytest.mark.parametrize(("name", "scheme"), [case for case in CASES if case[1] != "tucker2"])
def test_the_rank_limit_is_the_first_rank_at_which_no_packing_is_smaller(name, scheme):
    spec = made(name)[2]
    limit = chains.rank_limit(scheme, spec)
    assert limit >= math.ceil(chains.break_even(scheme, spec))
    full = min(link.params for link in chains.links(scheme, spec, (1,)))
    for rank in range(1, full + 1):
        assert (chains.smallest_params(scheme, spec, (rank,)) < spec.params) == (rank < limit)


def test_a_square_layer_has_pivoted_ranks_up_to_nearly_its_width():
    spec = LayerSpec("a", "linear", 384, 384, rows=1)
    # (384 - r)^2 > 384 leaves more than the order of its channels.
    assert chains.rank_limit("linear", spec) == 384 - math.isqrt(384)


@pytest.mark.parametrize(("features", "step"), [(32, 8), (31, 1), (512, 8), (8, 1), (2, 1)])
def test_ranks_go_in_steps_of_eight_once_two_steps_pay(features, step):
    # A square layer breaks even at half its width.
    assert chains.rank_step(LayerSpec("a", "linear", features, features, rows=1)) == step


def test_a_wide_kernel_has_room_for_steps_of_eight_with_few_channels():
    conv = LayerSpec("c", "conv2d", 16, 24, rows=1, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    assert chains.break_even("output_channel", conv) == pytest.approx(16 * 9 * 24 / (16 * 9 + 24))
    assert chains.rank_step(conv) == 8


@pytest.mark.parametrize(("inputs", "outputs", "pays"), [(64, 64, True), (64, 2, True), (64, 1, False), (2, 2, False)])
def test_a_layer_that_no_rank_makes_smaller_says_where_it_breaks_even(inputs, outputs, pays):
    spec = LayerSpec("a", "linear", inputs, outputs, rows=1)
    reason = chains.no_rank_pays(spec)
    assert (reason is None) == pays == (inputs * outputs > inputs + outputs)
    if reason:
        assert reason == f"no rank pays: break-even is rank {inputs * outputs / (inputs + outputs):.2f}"
