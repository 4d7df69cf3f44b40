"""Products by the faster kernel, and of rows with themselves in blocks, against the plain ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from panther import products
from panther.ops import LINEAR
from panther.products import BLOCK, add_gram, add_sums, fast_layers, gram, mirrored, product


@pytest.fixture(params=["as it is here", "by torch"])
def either(request, monkeypatch):
    """Products of rows with themselves in the op, where it has a kernel, and as on other processors."""
    if request.param == "by torch":
        monkeypatch.setattr(products, "has_moments_kernel", lambda: False)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("features", [0, 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 7])
@pytest.mark.parametrize("count", [0, 1, 5, 300])
def test_it_is_the_plain_product_within_rounding(count, features):
    rows = torch.randn(count, features, generator=torch.Generator().manual_seed(0))
    got = gram(rows)
    bound = count * torch.finfo(torch.float32).eps * (rows.abs().T @ rows.abs()).double()
    assert bool(((got - rows.double().T @ rows.double()).abs() <= bound).all())


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("features", [0, 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK + 1, 3 * BLOCK])
def test_sums_of_products_are_the_product_of_all_rows(features):
    parts = torch.randn(3, 40, features, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(features, features, dtype=torch.float64)
    for rows in parts:
        add_gram(total, rows)
    got, whole = mirrored(total), parts.flatten(0, 1)
    assert got is total and torch.equal(got, got.T)
    bound = len(whole) * torch.finfo(torch.float32).eps * (whole.abs().T @ whole.abs()).double()
    assert bool(((got - whole.double().T @ whole.double()).abs() <= bound).all())


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("features", [1, BLOCK, 2 * BLOCK + 1])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_sums_leave_out_what_is_padding_and_are_shifted(padded, shifted, features):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, features, generator=generator)
    counts = torch.rand(60, generator=generator) > 0.3 if padded else None
    shift = torch.randn(features, generator=generator) if shifted else None
    if counts is not None:
        rows[~counts] = torch.nan
    sums, total = torch.zeros(features, dtype=torch.float64), torch.zeros(features, features, dtype=torch.float64)
    add_sums(sums, total, rows, counts=counts, shift=shift)
    alone = torch.zeros_like(sums)
    add_sums(alone, None, rows, counts=counts, shift=shift)
    z = ((rows if counts is None else rows[counts]) - (0 if shift is None else shift)).double()
    rounding = len(z) * torch.finfo(torch.float32).eps
    for got in (sums, alone):
        assert bool(((got - z.sum(0)).abs() <= rounding * z.abs().sum(0)).all())
    assert bool(((mirrored(total) - z.T @ z).abs() <= rounding * (z.abs().T @ z.abs())).all())


def test_rows_that_are_views():
    rows = torch.randn(700, 50, generator=torch.Generator().manual_seed(0)).T
    assert torch.allclose(gram(rows), rows.T @ rows, atol=1e-4)


@pytest.fixture
def faster(monkeypatch):
    """As on a processor whose products torch is slow with, whatever this one is."""
    monkeypatch.setattr(products, "has_faster_kernel", lambda: True)


@pytest.fixture
def calls(monkeypatch):
    """The shapes that the op is called with."""
    seen = []

    def counted(x, weight, bias=None):
        seen.append((tuple(x.shape), tuple(weight.shape)))
        return LINEAR(x, weight, bias)

    monkeypatch.setattr(products, "linear", counted)
    return seen


LARGE = (40, 200, 150)  # enough rows and numbers for the op


def sides(rows, size_in, size_out, **kinds):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, **kinds) for shape in ((rows, size_in), (size_out, size_in))]


@pytest.mark.usefixtures("faster")
def test_large_products_run_in_the_op_and_small_ones_do_not(calls):
    x, weight = sides(*LARGE)
    torch.testing.assert_close(product(x, weight.T), x @ weight.T, atol=1e-4, rtol=0)  # sums of 200 numbers
    assert calls == [((40, 200), (150, 200))]
    product(x[:3], weight.T)
    product(x.double(), weight.T.double())
    assert len(calls) == 1


@pytest.mark.usefixtures("faster")
def test_layers_and_their_gradients_are_the_same_within(calls):
    layer = nn.Linear(200, 150)
    x = torch.randn(4, 10, 200, requires_grad=True)
    got = []
    for context in (fast_layers(), torch.enable_grad()):
        layer.zero_grad()
        x.grad = None
        with context:
            y = layer(x)
        y.square().mean().backward()
        got.append([y, x.grad, layer.weight.grad, layer.bias.grad])
    assert len(calls) == 1
    torch.testing.assert_close(*got, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, of its decompositions
@pytest.mark.usefixtures("faster")
def test_what_needs_standard_operations_gets_them(calls):
    x, weight = sides(*LARGE)
    layer = nn.Linear(200, 150)
    with fast_layers():
        with torch.autocast("cpu", torch.bfloat16):
            assert functional.linear(x, weight).dtype == torch.bfloat16
        torch.func.vmap(functional.linear, (0, None))(torch.stack([x, x]), weight)
        torch.func.jvp(lambda given: functional.linear(given, weight), (x,), (x,))
        functional.linear(x.double(), weight.double())
        functional.linear(x[0], weight)
    layer(x)
    assert not calls


@pytest.mark.parametrize("count", [30, 300])
def test_without_a_faster_kernel_nothing_is_intercepted(monkeypatch, calls, count):
    monkeypatch.setattr(products, "has_faster_kernel", lambda: False)
    x, weight = sides(count, 200, 150)
    with fast_layers():
        functional.linear(x, weight)
    product(x, weight.T)
    assert not calls


@pytest.mark.usefixtures("faster")
def test_a_bias_of_another_shape_is_spread_as_ever(calls):
    x, weight = sides(*LARGE)
    with fast_layers():
        assert functional.linear(x, weight, torch.ones(1)).shape == (40, 150)
    assert not calls


@pytest.mark.usefixtures("faster")
def test_what_no_gradient_needs_may_be_changed_in_place(calls):
    x, weight = sides(*LARGE)
    h = x.requires_grad_() * 1
    with fast_layers():
        y = functional.linear(h, weight)
    h += 1
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(40, 200), atol=1e-4, rtol=0)
    assert len(calls) == 1


@pytest.fixture
def sequences(monkeypatch):
    """The shapes that functional.conv1d is called with."""
    seen = []

    def counted(x, *others):
        seen.append(tuple(x.shape))
        return torch.conv1d(x, *others)

    monkeypatch.setattr(products.functional, "conv1d", counted)
    return seen


NARROW = [
    {},
    {"stride": (2, 1)},
    {"stride": (1, 3), "dilation": (2, 2)},
    {"padding": (3, 0)},
    {"padding": "same"},
    {"padding": "valid", "bias": False},
    {"groups": 2},
]


@pytest.mark.parametrize("options", NARROW)
@torch.no_grad()
def test_images_that_are_one_number_wide_are_convolved_as_sequences(sequences, options):
    layer, x = nn.Conv2d(4, 6, (5, 1), **options), torch.randn(3, 4, 20, 1)
    wanted = layer(x)
    with fast_layers():
        got = layer(x)
    assert sequences == [(3, 4, 20)] and got.is_contiguous()
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_sizes_of_windows_may_be_lists(sequences):
    x, weight = torch.randn(2, 4, 20, 1), torch.randn(6, 4, 3, 1)
    sizes = [[2, 1], [1, 0], [1, 1]], [torch.Size([2, 1]), (1, 0), 1], [2, [1, 0], 1]
    wanted = functional.conv2d(x, weight, None, (2, 1), (1, 0))
    with fast_layers():
        for given in sizes:
            torch.testing.assert_close(functional.conv2d(x, weight, None, *given), wanted)
        assert functional.conv2d(x, weight, None, (2,), (0,)).shape == (2, 6, 9, 1)
    assert sequences == [(2, 4, 20)] * 3


@torch.no_grad()
def test_other_images_are_convolved_as_ever(sequences):
    wide, narrow = torch.randn(2, 4, 9, 5), torch.randn(2, 4, 9, 1)
    with fast_layers():
        assert nn.Conv2d(4, 6, (3, 1))(wide).shape == (2, 6, 7, 5)
        assert nn.Conv2d(4, 6, 3, padding=1)(narrow).shape == (2, 6, 9, 1)
        assert nn.Conv2d(4, 6, (3, 1), padding=(0, 1))(narrow).shape == (2, 6, 7, 3)
        assert functional.conv2d(narrow, torch.randn(6, 4, 3, 1), None, 1, 1).shape == (2, 6, 9, 3)
        assert nn.Conv2d(4, 6, (3, 1))(narrow[0]).shape == (6, 7, 1)
        assert functional.conv2d(narrow, weight=torch.randn(6, 4, 3, 1)).shape == (2, 6, 7, 1)
        assert nn.Conv2d(4, 6, 1)(narrow[:, :, :1]).shape == (2, 6, 1, 1)
        last = nn.Conv2d(4, 6, (3, 1))(narrow.contiguous(memory_format=torch.channels_last))
        assert last.is_contiguous(memory_format=torch.channels_last)
        with torch.enable_grad():
            assert not nn.Conv2d(4, 6, (3, 1))(narrow)._is_view()
    nn.Conv2d(4, 6, (3, 1))(narrow)
    assert not sequences


@torch.no_grad()
def test_transforms_and_autocast_go_through_sequences(sequences):
    x, weight = torch.randn(2, 4, 9, 1), torch.randn(6, 4, 3, 1)
    with fast_layers():
        with torch.autocast("cpu", torch.bfloat16):
            assert functional.conv2d(x, weight).dtype == torch.bfloat16
        mapped = torch.func.vmap(functional.conv2d, (0, None))(torch.stack([x, x]), weight)
    assert sequences == [(2, 4, 9)] * 2
    torch.testing.assert_close(mapped[1], functional.conv2d(x, weight))
