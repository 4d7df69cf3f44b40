"""Convolutions in panther's own kernel, with float weights and with stored ones, beside torch's in float64."""

import importlib
import warnings
from dataclasses import dataclass

import pytest
import torch
from functorch.compile import aot_module, nop
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from panther.nn import QuantisedConv2d, SKConv2d
from panther.ops import (
    OPS,
    _kernels,
    _windows,
    conv,
    dequantised,
    low_rank_conv,
    packed_int4,
    quantised,
    quantised_conv,
)
from panther.ops._windows import SMALL
from tests.kernels import COMPILED, needs_kernels

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
KINDS = ("float", 8, 4, 16)  # 16: bfloat16

WHERE = {"stride": [1, 1], "padding": [0, 0, 0, 0], "dilation": [1, 1]}

every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


@dataclass(frozen=True)
class Geometry:
    size: tuple[int, ...]  # of x, with batch and channels
    out: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    def where(self):
        """stride, padding and dilation, as the ops take them."""
        ones = (1,) * len(self.kernel)
        zeros = (0,) * len(self.kernel)
        return {
            "stride": self.stride or ones,
            "padding": self.padding or zeros,
            "dilation": self.dilation or ones,
        }


GEOMETRIES = {
    "few windows": Geometry((1, 5, 9), 7, (3,), padding=(1,)),
    "points": Geometry((3, 101, 11, 11), 130, (1, 1)),
    "points of one sample, apart": Geometry((1, 9, 30, 31), 18, (1, 1), stride=(2, 2)),
    "points with an edge": Geometry((1, 9, 12, 13), 18, (1, 1), padding=(2, 1)),
    "long kernel": Geometry((3, 4, 50), 21, (33,), padding=(16,)),
    "even kernel": Geometry((2, 6, 70), 17, (4,), padding=(1, 2)),
    "one channel, far apart": Geometry((2, 1, 300), 33, (20,), stride=(7,)),
    "picture": Geometry((2, 17, 15, 14), 40, (3, 3), padding=(1, 1)),
    "picture, every second": Geometry((1, 8, 41, 40), 24, (3, 3), stride=(2, 2), padding=(1, 1)),
    "small pictures": Geometry((9, 20, 7, 7), 30, (3, 3), padding=(1, 1)),
    "narrow pictures": Geometry((30, 5, 9, 2), 5, (2, 2), padding=(1, 0)),
    "dilated": Geometry((1, 10, 23, 26), 19, (3, 2), stride=(1, 2), padding=(3, 0, 1, 4), dilation=(2, 3)),
    "edge wider than the input": Geometry((2, 5, 4, 5), 6, (3, 3), padding=(4, 6)),
    "volume": Geometry((2, 5, 6, 7, 8), 20, (2, 3, 3), stride=(1, 2, 1), padding=(1, 0, 1)),
    "many windows and channels": Geometry((1, 70, 20, 19), 21, (3, 3), padding=(1, 1)),
    "sixteen channels": Geometry((2, 16, 24, 24), 32, (3, 3), padding=(1, 1)),
    "small volumes": Geometry((5, 6, 4, 3, 4), 18, (3, 2, 3), padding=(1, 0, 1, 1, 1, 2)),
    "three channels": Geometry((1, 3, 40, 40), 20, (5, 5), stride=(2, 2), padding=(2, 2)),
    # Windows that begin as far apart as in one run at both ends of a register, and not between.
    "padding wider than the kernel": Geometry((1, 8, 5, 5, 3), 8, (3, 3, 3), padding=(0, 0, 2)),
    "padding wider than the kernel, joined": Geometry((2, 5, 3, 1), 8, (3, 3), padding=(1, 3)),
    "a wide stride over few": Geometry((3, 5, 4, 5, 6), 8, (1, 1, 2), (1, 2, 2), (0, 0, 2)),
    "joined in place": Geometry((3, 20, 7, 7), 70, (3, 3), padding=(1, 1)),
    "joined in place, a large weight": Geometry((3, 90, 5, 5), 200, (3, 3), padding=(1, 1)),
}

every_geometry = pytest.mark.parametrize("of", GEOMETRIES.values(), ids=GEOMETRIES)


def stored(weight, kind, group_size=32):
    if kind == 16:
        return weight.flatten(1).bfloat16().view(torch.int16), weight.new_empty(len(weight), 0)
    values, scales = quantised(weight.flatten(1), group_size, kind)
    return packed_int4(values) if kind == 4 else values, scales


def inputs_of(of, kind, dtype=torch.float32):
    """A function of x alone, and what it is to be near: the weight in float64, and the bias."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(of.size, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(of.out, of.size[1], *of.kernel, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(of.out, generator=generator, dtype=torch.float64).to(dtype)
    if kind == "float":
        where = of.where()
        sides = list(where["padding"]) * (1 if len(where["padding"]) > len(of.kernel) else 2)
        lists = list(where["stride"]), sides, list(where["dilation"])
        return x, weight.double(), bias, lambda x: OPS["conv"](x, weight, bias, *lists)  # which torch is not given
    values, scales = stored(weight, kind)
    meant = dequantised(values, scales.double(), weight[0].numel()).reshape(weight.shape)
    return x, meant, bias, lambda x: quantised_conv(x, values, scales, bias, kernel_size=of.kernel, **of.where())


def exactly(of, x, weight, bias):
    where, dims = of.where(), len(of.kernel)
    befores, afters = where["padding"][:dims], where["padding"][-dims:]
    amounts = [amount for pair in zip(reversed(befores), reversed(afters), strict=True) for amount in pair]
    return CONVOLVE[dims](F.pad(x, amounts), weight, bias, where["stride"], 0, where["dilation"])


def assert_within_the_rounding_bound(got, of, x, weight, bias):
    exact = exactly(of, x.double(), weight, bias.double())
    scale = exactly(of, x.double().abs(), weight.abs(), bias.double().abs())
    roundings = weight[0].numel() + 3
    assert got.shape == exact.shape
    assert bool(((got.double() - exact).abs() <= roundings * torch.finfo(got.dtype).eps * scale).all())


@needs_kernels
@every_kind
@every_geometry
@pytest.mark.usefixtures("instruction_set")
def test_every_geometry_is_within_the_rounding_bound(of, kind):
    x, weight, bias, run = inputs_of(of, kind)
    assert_within_the_rounding_bound(run(x), of, x, weight, bias)


@every_geometry
def test_whatever_runs_a_convolution_is_within_the_rounding_bound(of):
    x, weight, bias, _ = inputs_of(of, "float")
    assert_within_the_rounding_bound(conv(x, weight.float(), bias, **of.where()), of, x, weight, bias)


@every_kind
@every_geometry
def test_input_without_a_batch_is_one_sample(of, kind):
    x, _, _, run = inputs_of(of, kind)
    torch.testing.assert_close(run(x[0]), run(x[:1])[0], rtol=1e-4, atol=1e-4)


@needs_kernels
@every_kind
@every_geometry
def test_number_of_threads_changes_no_bit(of, kind, threads):
    x, _, _, run = inputs_of(of, kind)
    threads(1)
    alone = run(x)
    threads(3)
    assert torch.equal(alone, run(x))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["few windows", "picture"])
def test_other_types_are_rounded_at_the_end(name, dtype, kind):
    of = GEOMETRIES[name]
    x, weight, bias, run = inputs_of(of, kind, dtype)
    got, exact = run(x), exactly(of, x.double(), weight, bias.double())
    assert got.dtype == dtype
    loose = 1e-12 if dtype == torch.float64 else 0.03
    torch.testing.assert_close(got.double(), exact, rtol=loose, atol=loose * float(exact.abs().mean()))


@every_kind
@pytest.mark.parametrize("channels", [24, 600])  # the latter: more than a tile of the weight
@pytest.mark.usefixtures("scalar_kernels")
def test_where_torch_convolves_the_weight_is_widened_in_parts(channels, kind):
    of = Geometry((1, channels, 6, 6), 260, (3, 3), padding=(1, 1))
    x, weight, bias, run = inputs_of(of, kind)
    assert_within_the_rounding_bound(run(x), of, x, weight, bias)


@every_kind
@pytest.mark.parametrize("channels", [24, 600])
def test_channels_last_stay_last(channels, kind):
    of = Geometry((2, channels, 6, 6), 260, (3, 3), padding=(1, 1))
    x, weight, bias, run = inputs_of(of, kind)
    last = x.contiguous(memory_format=torch.channels_last)
    got = run(last)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert_within_the_rounding_bound(got, of, x, weight, bias)


@every_kind
def test_views_give_what_their_copies_give(kind):
    of = GEOMETRIES["picture"]
    x, weight, bias, run = inputs_of(of, kind)
    views = (x.transpose(2, 3).contiguous().transpose(2, 3), torch.cat((x, x), 1)[:, : x.shape[1]], x.flip(0).flip(0))
    for view in views:
        assert_within_the_rounding_bound(run(view), of, x, weight, bias)


@every_kind
def test_no_samples_give_none(kind):
    of = GEOMETRIES["picture"]
    x, _, _, run = inputs_of(of, kind)
    assert run(x[:0]).shape == (0, *run(x).shape[1:])


@every_kind
def test_infinities_and_nans_reach_their_windows_only(kind):
    of = Geometry((1, 20, 40), 18, (3,), padding=(1,))
    x, _, _, run = inputs_of(of, kind)
    x[0, 3, 0] = torch.nan
    got = run(x)
    assert bool(got[..., :2].isnan().all())
    assert bool(got[..., 2:].isfinite().all())


STRIDES = {  # the axes, and what lies in memory
    "turned": (1, torch.ones(2, 100, 1).transpose(1, 2)),
    "turned, of more channels": (1, torch.ones(2, 100, 7).transpose(1, 2)),
    "one channel last": (2, torch.ones(1, 28, 28, 1).permute(0, 3, 1, 2)),
    "channels last": (2, torch.ones(2, 28, 28, 5).permute(0, 3, 1, 2)),
    "one line": (2, torch.ones(2, 1, 30, 6).permute(0, 3, 1, 2)),
    "one place": (2, torch.ones(9, 1, 1, 6).permute(0, 3, 1, 2)),
    "one place of one channel": (2, torch.ones(40, 1, 1, 1)),
    "a part": (2, torch.ones(2, 9, 28, 28)[:, 2:7]),
    "volume, channels last": (3, torch.ones(2, 5, 6, 7, 6).permute(0, 4, 1, 2, 3)),
    "no batch": (2, torch.ones(28, 28, 6).permute(2, 0, 1)),
}


@pytest.mark.parametrize(("dims", "x"), STRIDES.values(), ids=STRIDES)
@pytest.mark.parametrize("is_last", [False, True], ids=["", "so is the weight"])
@every_kind
def test_result_lies_in_memory_as_the_compiler_is_told(dims, x, is_last, kind):
    weight = torch.ones(8, x.shape[-1 - dims], *[1] * dims)
    if is_last and dims > 1:
        weight = weight.to(memory_format={2: torch.channels_last, 3: torch.channels_last_3d}[dims])
    ones, zeros = [1] * dims, [0] * 2 * dims
    if kind == "float":
        op, inputs = OPS["conv"], (x, weight, None, ones, zeros, ones)
    else:
        op, inputs = OPS["quantised_conv"], (x, *stored(weight.contiguous(), kind, None), None, ones, ones, zeros, ones)
    with FakeTensorMode() as mode:
        told = op(*(mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in inputs))
    assert op(*inputs).stride() == told.stride()


@needs_kernels
def test_places_beyond_32_bits_are_left_to_torch():
    far = {"stride": [2**33], "padding": [2**33], "dilation": [1]}
    try:
        got = conv(torch.arange(3.0).reshape(1, 1, 3), torch.ones(1, 1, 1), **far)
    except RuntimeError:
        return  # torch counts in 32 bits, too
    assert got.shape == (1, 1, 3)


# Chains of two ------------------------------------------------------------------------------------------------------


def chain_of(of, rank=11, dtype=torch.float32):
    """A function of x alone, x, and the factors and the bias in float64."""
    generator = torch.Generator().manual_seed(0)
    sizes = (of.size, (rank, of.size[1], *of.kernel), (of.out, rank, *[1] * len(of.kernel)), (of.out,))
    x, down, up, bias = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    where = of.where()
    sides = [*where["padding"], *where["padding"]][: 2 * len(of.kernel)]
    geometry = [list(where["stride"]), sides, list(where["dilation"])]
    return lambda x: OPS["low_rank_conv"](x, down, up, bias, *geometry), x, down.double(), up.double(), bias.double()


def torch_convolves(of, x, out):
    """Whether the first convolution of a chain is torch's."""
    where = of.where()
    sides = [*where["padding"], *where["padding"]][: 2 * len(of.kernel)]
    sizes = list(x.shape) if x.dim() == len(of.kernel) + 2 else [1, *x.shape]
    geometry = list(of.kernel), list(where["stride"]), sides, list(where["dilation"])
    return _kernels.load()[0].torch_convolves(sizes, out, *geometry)


def in_a_row(of, x, down, up, bias):
    inner = exactly(of, x, down, None)
    return CONVOLVE[len(of.kernel)](inner, up, bias)


def assert_chain_is_within_the_rounding_bound(got, of, x, down, up, bias):
    exact = in_a_row(of, x.double(), down, up, bias)
    scale = in_a_row(of, x.double().abs(), down.abs(), up.abs(), bias.abs())
    roundings = down[0].numel() + len(down) + 4
    assert got.shape == exact.shape
    assert bool(((got.double() - exact).abs() <= roundings * torch.finfo(got.dtype).eps * scale).all())


@needs_kernels
@every_geometry
@pytest.mark.parametrize("rank", [1, 11, 50])
@pytest.mark.usefixtures("instruction_set")
def test_every_chain_is_within_the_rounding_bound(of, rank):
    run, x, *exact = chain_of(of, rank)
    assert_chain_is_within_the_rounding_bound(run(x), of, x, *exact)


@needs_kernels
@every_geometry
def test_number_of_threads_changes_no_bit_of_a_chain(of, threads):
    run, x, *exact = chain_of(of)
    threads(1)
    alone = run(x)
    threads(3)
    if torch_convolves(of, x, len(exact[0])):  # other threads take other parts of its products, on some processors
        assert_chain_is_within_the_rounding_bound(run(x), of, x, *exact)
    else:
        assert torch.equal(alone, run(x))


@every_geometry
def test_chain_of_input_without_a_batch_is_of_one_sample(of):
    run, x, *_ = chain_of(of)
    torch.testing.assert_close(run(x[0]), run(x[:1])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("view", ["channels last", "turned", "a part", "no samples"])
def test_chain_of_a_view_is_that_of_its_copy(view):
    of = GEOMETRIES["picture"]
    run, x, *exact = chain_of(of)
    x = {
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "turned": x.transpose(2, 3).contiguous().transpose(2, 3),
        "a part": torch.cat((x, x), 1)[:, : x.shape[1]],
        "no samples": x[:0],
    }[view]
    assert_chain_is_within_the_rounding_bound(run(x), of, x, *exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["few windows", "picture"])
def test_chains_of_other_types_are_rounded_twice(name, dtype):
    of = GEOMETRIES[name]
    run, x, *exact = chain_of(of, dtype=dtype)
    got, wanted = run(x), in_a_row(of, x.double(), *exact)
    assert got.dtype == dtype
    loose = 1e-12 if dtype == torch.float64 else 0.03
    torch.testing.assert_close(got.double(), wanted, rtol=loose, atol=loose * float(wanted.abs().mean()))


CHAINS = {  # where torch's own are faster with one thread and AVX2, where with any number of threads, and where never
    "fewer channels": Geometry((1, 64, 20, 20), 32, (1, 1)),
    "more channels": Geometry((1, 32, 20, 20), 64, (1, 1)),
    "large picture": Geometry((1, 16, 24, 24), 32, (3, 3), padding=(1, 1)),
    "small picture": Geometry((1, 16, 9, 9), 32, (3, 3), padding=(1, 1)),
    "three channels": Geometry((1, 3, 40, 40), 20, (5, 5), stride=(2, 2), padding=(2, 2)),
    "one place": Geometry((1, 16, 3, 3), 32, (3, 3)),
    "long line": Geometry((1, 8, 400), 24, (3,), padding=(1,)),
    "long line, long kernel": Geometry((1, 8, 400), 24, (9,), padding=(4,)),
}


@pytest.mark.parametrize("of", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("trains", [False, True])
def test_chain_is_the_same_in_whatever_kernel(of, count, trains, threads):
    threads(count)
    _, x, *exact = chain_of(of)
    down, up, bias = (tensor.float() for tensor in exact)
    got = low_rank_conv(x.requires_grad_(trains), down, up, bias, **of.where())
    assert_chain_is_within_the_rounding_bound(got.detach(), of, x.detach(), *exact)
    assert got.requires_grad == trains


def test_kernels_are_chosen_by_shape_and_threads(monkeypatch):
    module = importlib.import_module("panther.ops.low_rank_conv")  # the function has its name
    monkeypatch.setattr(module, "_instruction_set", lambda: "avx2")
    rule, chosen = module._torch_is_faster, {}
    for name, of in CHAINS.items():
        where, dims = of.where(), len(of.kernel)
        sizes = of.size, (8, of.size[1], *of.kernel), (of.out, 8, *[1] * dims)
        geometry = where["stride"], where["padding"] * 2, where["dilation"]
        chosen[name] = [rule(*sizes, None, geometry, count) for count in (1, 2)]
    assert chosen == {
        "fewer channels": [True, False],
        "more channels": [True, False],
        "large picture": [True, True],
        "small picture": [False, False],
        "three channels": [True, True],
        "one place": [False, False],
        "long line": [True, True],
        "long line, long kernel": [False, False],
    }


# By input, weight and padding: where one thread and where two leave plain inputs to torch with AVX2.
LEFT_TO_TORCH = {
    "single places": ((1, 40, 28, 28), (240, 40, 1, 1), (0, 0), [True, False]),
    "many single places": ((1, 24, 56, 56), (144, 24, 1, 1), (0, 0), [True, True]),
    "few single places": ((1, 320, 7, 7), (1280, 320, 1, 1), (0, 0), [False, False]),
    "little work": ((1, 16, 7, 7), (32, 16, 1, 1), (0, 0), [True, True]),
    "large picture": ((1, 64, 56, 56), (64, 64, 3, 3), (1, 1), [True, True]),
    "small picture": ((1, 64, 14, 14), (64, 64, 3, 3), (1, 1), [False, False]),
    "without a batch": ((64, 56, 56), (64, 64, 3, 3), (1, 1), [True, True]),
    "a long line": ((2, 16, 300), (8, 16, 3), (1,), [True, True]),
    "padded on one side": ((1, 64, 56, 56), (64, 64, 2, 2), (0, 0, 1, 1), [True, True]),
    "windows that do not fit": ((1, 64, 2, 2), (64, 64, 3, 3), (0, 0), [False, False]),
    "other channels": ((1, 32, 56, 56), (64, 64, 3, 3), (1, 1), [False, False]),
    "a line of pictures": ((1, 64, 56), (64, 64, 3, 3), (1, 1), [False, False]),
    "padding that is no number": ((1, 64, 56, 56), (64, 64, 3, 3), "same", [False, False]),
}


@needs_kernels
@pytest.mark.parametrize(("x", "weight", "padding", "expected"), LEFT_TO_TORCH.values(), ids=LEFT_TO_TORCH)
def test_dense_convolutions_are_left_to_torch_where_that_is_faster(x, weight, padding, expected, threads):
    if COMPILED.build_info()["instruction_set"] != "avx2":
        pytest.skip("the rule was measured with AVX2")
    ones, got = (1,) * (len(weight) - 2), []
    for count in (1, 2):
        threads(count)
        got.append(_windows.torch_serves(x, weight, weight[:1], ones, padding, ones, count) is not None)
    assert got == expected


@needs_kernels
@pytest.mark.parametrize("of", [case for case in LEFT_TO_TORCH.values() if case[-1] == [True, True]])
def test_what_is_left_to_torch_is_what_it_computes(of, monkeypatch):
    if COMPILED.build_info()["instruction_set"] != "avx2":
        pytest.skip("the rule was measured with AVX2")
    size, weight_size, padding, _ = of
    x, weight, bias = torch.randn(size), torch.randn(weight_size), torch.randn(weight_size[0])
    ones, dims = (1,) * (len(weight_size) - 2), len(weight_size) - 2
    monkeypatch.setattr(importlib.import_module("panther.ops.conv"), "CONV", lambda *_: pytest.fail("the op was asked"))
    got = conv(x, weight, bias, stride=ones, padding=padding, dilation=ones)
    sides = padding if len(padding) > dims else padding * 2
    assert torch.equal(got, _windows.convolved(x, weight, bias, ones, sides, ones))


@needs_kernels
def test_sides_that_differ_are_padded_before_two_of_torchs_own(monkeypatch):
    if COMPILED.build_info()["instruction_set"] != "avx2":
        pytest.skip("the rule was measured with AVX2")
    module = importlib.import_module("panther.ops.low_rank_conv")
    monkeypatch.setattr(module, "LOW_RANK_CONV", lambda *_: pytest.fail("the op was asked"))
    x, down, up = torch.randn(1, 16, 56, 56), torch.randn(8, 16, 4, 4), torch.randn(32, 8, 1, 1)
    got = low_rank_conv(x, down, up, stride=(1, 1), padding=(1, 1, 2, 2), dilation=(1, 1))
    assert torch.equal(got, F.conv2d(F.conv2d(F.pad(x, (1, 2, 1, 2)), down), up))


@pytest.mark.parametrize(
    ("stride", "sides", "dilation", "expected"),
    [
        ((1, 1), (0, 0, 0, 0), (1, 1), ((), ())),
        ((2, 2), (0, 0, 0, 0), (1, 1), ((2,), ())),
        ((1, 1), (1, 2, 1, 2), (1, 1), ((1, (1, 2)), ())),
        ((2, 1), (0, 0, 0, 0), (3, 3), (((2, 1), 0, 3), ())),
        ((1,), (1, 3), (1,), ((1, 1), (0, 2))),
    ],
)
def test_torch_gets_no_arguments_that_are_its_defaults(stride, sides, dilation, expected):
    assert _windows.arguments(stride, sides, dilation) == expected


BAD_CHAINS = {  # of 16 channels in 24 x 24, for which torch's own would be taken
    "up of nine places": {"up": torch.ones(32, 8, 3, 3)},
    "another rank": {"up": torch.ones(32, 7, 1, 1)},
    "bias of the rank": {"bias": torch.ones(8)},
    "another dtype": {"up": torch.ones(32, 8, 1, 1, dtype=torch.float64)},
    "another device": {"down": torch.ones(8, 16, 3, 3, device="meta")},
    "no stride": {"stride": [0, 1]},
    "padding of three sides": {"padding": [0, 0, 0]},
    "dilation of one axis": {"dilation": [1]},
    "dilation wider than both": {"dilation": [100, 100]},
}


@pytest.mark.parametrize("given", BAD_CHAINS.values(), ids=BAD_CHAINS)
@pytest.mark.parametrize("count", [1, 2])
def test_chains_that_do_not_fit_are_refused_whoever_would_serve_them(given, count, threads):
    threads(count)
    inputs = {"down": torch.ones(8, 16, 3, 3), "up": torch.ones(32, 8, 1, 1), "bias": torch.ones(32), **WHERE} | given
    with pytest.raises(ValueError, match=r"^low_rank_conv: expected"):
        low_rank_conv(torch.ones(1, 16, 24, 24), **inputs)


@pytest.mark.parametrize("size", [9, 24])
def test_chain_runs_where_sizes_are_symbols(size):
    layer, x = SKConv2d(16, 32, 3, 1, 4, padding=1).eval().requires_grad_(False), torch.randn(2, 16, size, size)
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        compiled = aot_module(layer, nop, dynamic=True)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", [("x",), ("down",), ("up",), ("bias",), ("x", "bias")], ids=str)
def test_gradients_of_a_chain_are_those_of_two_convolutions(wanted):
    of = GEOMETRIES["picture, every second"]
    _, x, *exact = chain_of(of, dtype=torch.float64)
    inputs = dict(zip(("x", "down", "up", "bias"), (x, *exact), strict=True))
    where = of.where()
    geometry = [list(where["stride"]), [*where["padding"]] * 2, list(where["dilation"])]
    found = []
    for run in (
        lambda given: OPS["low_rank_conv"](*given.values(), *geometry),
        lambda given: low_rank_conv(**given, **where),
        lambda given: in_a_row(of, **given),
    ):
        given = {name: value.clone().requires_grad_(name in wanted) for name, value in inputs.items()}
        run(given).square().sum().backward()
        found.append([value.grad for value in given.values()])
    for one in found[:2]:
        for got, theirs in zip(one, found[2], strict=True):
            assert (got is None) == (theirs is None)
            if got is not None:
                torch.testing.assert_close(got, theirs)


# In layers ------------------------------------------------------------------------------------------------------------


def layers():
    dense = torch.nn.Conv2d(6, 20, 3, padding=1).eval()
    return {
        "sketched": SKConv2d.from_dense(dense, num_terms=1, low_rank=2),
        "stored": QuantisedConv2d.from_dense(dense),
    }


every_layer = pytest.mark.parametrize("name", ["sketched", "stored"])


@every_layer
def test_other_tools_see_standard_operations_in_what_is_exported_or_traced(name):
    layer, x = layers()[name].eval().requires_grad_(False), torch.randn(2, 6, 9, 10)
    program = torch.export.export(torch.nn.Sequential(layer), (x,))
    assert not any("panther" in str(node.target) for node in program.graph.nodes)
    with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated
        traced = torch.jit.trace(layer, x)
    assert "panther::" not in str(traced.inlined_graph)
    for again in (program.module(), traced):
        torch.testing.assert_close(again(x), layer(x), rtol=1e-4, atol=1e-4)


@every_layer
@pytest.mark.parametrize("x", [torch.randn(2, 6, 9, 10), torch.randn(2, 10, 9, 6).transpose(1, 3)], ids=["", "last"])
def test_compiled_layer_computes_the_same(name, x):
    layer = layers()[name].eval()
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("small", [0, SMALL])  # in the op, and in standard operations
def test_gradients_of_a_sketched_convolution_are_those_of_its_dense_form(small, monkeypatch):
    monkeypatch.setattr(_windows, "SMALL", small)
    monkeypatch.setattr(importlib.import_module("panther.ops.conv"), "torch_serves", lambda *_: None)
    layer, x = layers()["sketched"].train(), torch.randn(2, 6, 8, 9)
    assert ("panther" in type(layer(x).grad_fn).__name__) == (small == 0)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(ours).square().mean().backward()
    F.conv2d(theirs, layer.weight.detach(), layer.bias.detach(), padding=1).square().mean().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_a_chain_without_data_lies_as_one_with_data(last, batched):
    layout = torch.channels_last if last else torch.contiguous_format
    x, up = torch.randn(2, 5, 9, 8), torch.randn(4, 23, 1, 1)
    down = torch.randn(23, 5, 3, 3).to(memory_format=layout)
    inputs = (x if batched else x[0], down, up, None, [1, 1], [1] * 4, [1, 1])
    with torch.no_grad(), FakeTensorMode() as mode:
        without = [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in inputs]
        found = OPS["low_rank_conv"](*without).stride()
    with torch.no_grad():
        assert OPS["low_rank_conv"](*inputs).stride() == found


def test_complex_numbers_are_left_to_torch():
    x, weight = torch.randn(2, 3, 9, dtype=torch.complex64), torch.randn(4, 3, 3, dtype=torch.complex64)
    got = conv(x, weight, stride=[1], padding=[1], dilation=[1])
    torch.testing.assert_close(got, F.conv1d(x, weight, padding=1))


# Refusals -------------------------------------------------------------------------------------------------------------

X, WEIGHT, BIAS = torch.ones(2, 3, 5, 6), torch.ones(4, 3, 3, 2), torch.ones(4)
UP = torch.ones(6, 4, 1, 1)
VALUES, SCALES = torch.ones(4, 18, dtype=torch.int8), torch.ones(4, 1)

BAD_WINDOWS = {
    "larger than the input": ({}, torch.ones(2, 3, 2, 6), "got (2, 3, 2, 6), [3, 2], [1, 1], [1, 1], [0, 0, 0, 0]"),
    "no stride": ({"stride": [0, 1]}, X, "[3, 2], [0, 1]"),
    "strides of one axis": ({"stride": [1]}, X, "[3, 2], [1], [1, 1]"),
    "negative padding": ({"padding": [0, -1, 0, 0]}, X, "[0, -1, 0, 0]"),
    "padding of three sides": ({"padding": [0, 0, 0]}, X, "[0, 0, 0]"),
    "no dilation": ({"dilation": [1, 0]}, X, "[1, 0], [0, 0, 0, 0]"),
    "an empty axis": ({"padding": [3, 3, 3, 3]}, torch.ones(2, 3, 0, 6), "got (2, 3, 0, 6)"),
    "no channels": ({}, torch.ones(2, 0, 5, 6), "got (2, 0, 5, 6)"),
    "x without channels": ({}, torch.ones(5, 6), "got (5, 6), [3, 2]"),
    "x of another size": ({}, torch.ones(1, 1, 3, 5, 6), "got (1, 1, 3, 5, 6)"),
}


@pytest.mark.parametrize(("where", "x", "says"), BAD_WINDOWS.values(), ids=BAD_WINDOWS)
@pytest.mark.parametrize("name", ["conv", "low_rank_conv", "quantised_conv"])
def test_windows_that_do_not_fit_are_refused_in_the_same_words_with_and_without_kernel(name, where, x, says):
    given = WHERE | where
    geometry = [given["stride"], given["padding"], given["dilation"]]
    inputs = {
        "conv": (x, WEIGHT, BIAS),
        "low_rank_conv": (x, WEIGHT, UP, torch.ones(6)),
        "quantised_conv": (x, VALUES, SCALES, BIAS, [3, 2]),
    }[name]
    assert_refused(name, (*inputs, *geometry), says)


BAD = {
    "other channels": ("conv", (X, torch.ones(4, 2, 3, 2), BIAS), "got (2, 3, 5, 6), (4, 2, 3, 2), (4)"),
    "bias of another size": ("conv", (X, WEIGHT, torch.ones(3)), "(4, 3, 3, 2), (3)"),
    "no bias": ("conv", (X, torch.ones(4, 2, 3, 2), None), "(4, 2, 3, 2), None"),
    "no outputs": ("conv", (X, WEIGHT[:0], None), "(0, 3, 3, 2), None"),
    "no stored outputs": ("quantised_conv", (X, VALUES[:0], SCALES[:0], None), "(0, 18), (0, 1), None"),
    "another dtype": ("conv", (X, WEIGHT.double(), BIAS), "got float32, float64, float32"),
    "whole numbers": ("conv", (X.int(), WEIGHT.int(), BIAS.int()), "got int32, int32, int32"),
    "another rank": ("low_rank_conv", (X, WEIGHT, UP[:, :3], None), "(4, 3, 3, 2), (6, 3, 1, 1), None"),
    "not single places": ("low_rank_conv", (X, WEIGHT, torch.ones(6, 4, 1, 2), None), "(6, 4, 1, 2), None"),
    "up of fewer axes": ("low_rank_conv", (X, WEIGHT, UP[..., 0], None), "(4, 3, 3, 2), (6, 4, 1), None"),
    "no rank": ("low_rank_conv", (X, WEIGHT[:0], UP[:, :0], None), "(0, 3, 3, 2), (6, 0, 1, 1), None"),
    "bias of the rank": ("low_rank_conv", (X, WEIGHT, UP, BIAS), "(6, 4, 1, 1), (4)"),
    "a factor of another dtype": ("low_rank_conv", (X, WEIGHT, UP.half(), None), "got float32, float32, float16"),
    "values of another size": (
        "quantised_conv",
        (X, VALUES[:, :17], SCALES, BIAS),
        "got (2, 3, 5, 6), (4, 17), (4, 1), (4) and [3, 2]",
    ),
    "scales of other rows": ("quantised_conv", (X, VALUES, torch.ones(3, 1), BIAS), "(4, 18), (3, 1), (4)"),
    "no such groups": ("quantised_conv", (X, VALUES, torch.ones(4, 5), None), "(4, 18), (4, 5), None"),
    "stored bias of another size": ("quantised_conv", (X, VALUES, SCALES, torch.ones(5)), "(4, 1), (5)"),
    "float values": ("quantised_conv", (X, VALUES.float(), SCALES, BIAS), "got float32, float32, float32, float32"),
    "scales of another dtype": ("quantised_conv", (X, VALUES, SCALES.double(), None), "got float32, int8, float64"),
}


@pytest.mark.parametrize(("name", "inputs", "says"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_the_same_words_with_and_without_kernel(name, inputs, says):
    sizes = ([3, 2],) if name == "quantised_conv" else ()
    assert_refused(name, (*inputs, *sizes, *WHERE.values()), says)


def assert_refused(name, inputs, says):
    messages = []
    for function in (OPS[name], OPS[name].reference, getattr(torch.ops.panther, name)):
        with pytest.raises(ValueError, match=f"^{name}: ") as refusal:
            function(*inputs)
        messages.append(str(refusal.value))
    assert says in messages[0]
    assert messages[0] == messages[1] == messages[2]
