"""add_moments: sums and products within their roundings, of the rows that count, the same bits for any threads."""

import pytest
import torch

from panther.ops import OPS, add_moments
from tests.kernels import needs_kernels

REFERENCE = OPS["add_moments"].reference
FLOAT = torch.finfo(torch.float32).eps


def data(rows, n, *, padded=True):
    """Rows, which of them count (the others are NaN), and a shift."""
    generator = torch.Generator().manual_seed(0)
    x, shift = torch.randn(rows, n, generator=generator) + 3, torch.randn(n, generator=generator)
    counts = torch.rand(rows, generator=generator) > 0.2 if padded else None
    if counts is not None:
        x[~counts] = torch.nan
    return x, counts, shift


def moments(x, counts=None, shift=None, *, of=torch.float64):
    n = x.shape[1]
    sums, products = torch.zeros(n, dtype=torch.float64), torch.zeros(n, n, dtype=of)
    add_moments(sums, products, x, counts=counts, shift=shift)
    return sums, products


def assert_near(got, x, counts, shift, *, of=torch.float64):
    """The exact moments, within the roundings of sums of as many floats as the kernel adds before there are doubles."""
    z = (x if counts is None else x[counts]) - (0 if shift is None else shift)
    exact = z.double()
    sums, products = got
    roundings = min(len(z), 1024) + (0 if of == torch.float64 else len(z) // 960 + 1)
    assert bool(((sums - exact.sum(0)).abs() <= FLOAT * min(len(z), 128) * exact.abs().sum(0)).all())
    bound = FLOAT * roundings * (exact.abs().T @ exact.abs())
    assert bool(((products - (exact.T @ exact).tril()).abs() <= bound).all())


@needs_kernels
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("of", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("n", [1, 7, 16, 17, 31, 40, 65])
@pytest.mark.parametrize("rows", [1, 3, 97, 128, 131, 300])
def test_moments_are_the_exact_ones_within_their_roundings(rows, n, padded, of):
    given = data(rows, n, padded=padded)
    assert_near(moments(*given, of=of), *given, of=of)


@needs_kernels
@pytest.mark.usefixtures("instruction_set")
def test_more_rows_than_are_packed_at_once(threads):
    threads(2)
    given = data(4000, 40)
    assert_near(moments(*given), *given)


def test_what_is_above_the_diagonal_stays_and_the_rest_is_added_to():
    x, _, shift = data(50, 35, padded=False)
    before = torch.randn(35, 35, dtype=torch.float64)
    products, sums = before.clone(), torch.ones(35, dtype=torch.float64)
    add_moments(sums, products, x, shift=shift)
    assert torch.equal(products.triu(1), before.triu(1))
    own_sums, own = moments(x, shift=shift)
    torch.testing.assert_close(products.tril(), before.tril() + own)
    torch.testing.assert_close(sums, 1 + own_sums)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("n", [5, 64, 300])
def test_sums_alone_have_the_bits_of_sums_beside_products(n, padded):
    x, counts, shift = data(333, n, padded=padded)
    alone = torch.zeros(n, dtype=torch.float64)
    add_moments(alone, None, x, counts=counts, shift=shift)
    assert torch.equal(alone, moments(x, counts, shift)[0])


@needs_kernels
def test_rows_that_do_not_count_are_as_if_they_were_not_there():
    x, counts, shift = data(333, 50)
    for got, wanted in zip(moments(x, counts, shift), moments(x[counts], None, shift), strict=True):
        assert torch.equal(got, wanted)
    assert all(not some.any() for some in moments(x, torch.zeros(333, dtype=torch.bool), shift))


@needs_kernels
def test_number_of_threads_changes_no_bit(threads):
    given = data(900, 259)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(moments(*given))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@needs_kernels
def test_views_of_any_strides_are_read():
    x, *_ = data(80, 24, padded=False)
    for view in (x[:, 3:20], x[::3, 3:20], x.T[:20], x[:, ::2], x[:1].expand(7, 24)):
        shift = torch.randn(2 * view.shape[1])[::2]
        own, copied = moments(view, shift=shift), moments(view.contiguous(), shift=shift.contiguous())
        assert all(map(torch.equal, own, copied))


def test_what_is_not_finite_is_passed_on():
    x, _, _ = data(40, 20, padded=False)
    x[7, 3] = torch.inf
    sums, products = moments(x)
    assert torch.isinf(sums[3]) and torch.isfinite(sums[:3]).all()
    assert not torch.isfinite(products[3, :4]).any() and torch.isfinite(products[:3]).all()


def test_gradients_are_not_recorded_and_autograd_sees_the_change():
    x, sums = torch.randn(5, 3, requires_grad=True), torch.zeros(3, dtype=torch.float64)
    version = sums._version
    add_moments(sums, None, x)
    assert not sums.requires_grad and sums._version > version


F64, F32 = torch.float64, torch.float32
X = torch.ones(5, 4)
SHAPES = (
    "expected the shapes sums (n), products (n, n) or None, x (rows, n), counts (rows) or None, shift (n) or None; got "
)
DTYPES = "expected float64 for sums, float32 or float64 for products, float32 for x and shift, bool for counts; got "
BAD = {
    "too few sums": ((torch.ones(3, dtype=F64), None, X, None, None), SHAPES + "(3), None, (5, 4), None, None"),
    "x of three dimensions": (
        (torch.ones(4, dtype=F64), None, torch.ones(2, 5, 4), None, None),
        SHAPES + "(4), None, (2, 5, 4), None, None",
    ),
    "products are not square": (
        (torch.ones(4, dtype=F64), torch.ones(4, 5), X, None, None),
        SHAPES + "(4), (4, 5), (5, 4), None, None",
    ),
    "counts for too few rows": (
        (torch.ones(4, dtype=F64), None, X, torch.ones(4) > 0, torch.ones(4)),
        SHAPES + "(4), None, (5, 4), (4), (4)",
    ),
    "shift of another size": (
        (torch.ones(4, dtype=F64), torch.ones(4, 4), X, None, torch.ones(5)),
        SHAPES + "(4), (4, 4), (5, 4), None, (5)",
    ),
    "sums in float32": ((torch.ones(4), None, X, None, None), DTYPES + "float32, None, float32, None, None"),
    "x in float64": (
        (torch.ones(4, dtype=F64), None, X.double(), None, None),
        DTYPES + "float64, None, float64, None, None",
    ),
    "products in half precision": (
        (torch.ones(4, dtype=F64), torch.ones(4, 4).half(), X, None, None),
        DTYPES + "float64, float16, float32, None, None",
    ),
    "counts are numbers": (
        (torch.ones(4, dtype=F64), None, X, torch.ones(5), None),
        DTYPES + "float64, None, float32, float32, None",
    ),
    "shift in float64": (
        (torch.ones(4, dtype=F64), None, X, None, torch.ones(4).double()),
        DTYPES + "float64, None, float32, None, float64",
    ),
}


@pytest.mark.parametrize(("inputs", "says"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_the_same_words_with_and_without_kernel(inputs, says):
    messages = []
    for function in (OPS["add_moments"], REFERENCE):
        with pytest.raises(ValueError, match=r"^add_moments: ") as refusal:
            function(*inputs)
        messages.append(str(refusal.value))
    assert messages[0] == messages[1] == "add_moments: " + says


def test_inputs_on_two_devices_are_refused_with_their_devices():
    with pytest.raises(ValueError, match=r"expected one device for .*; got cpu, None, meta, None, None"):
        REFERENCE(torch.ones(4, dtype=F64), None, torch.ones(5, 4, device="meta"), None, None)
