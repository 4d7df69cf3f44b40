"""hadamard: the matrix it multiplies by, the same bits however it is called, its refusals."""

import math

import pytest
import scipy.linalg
import torch
from torch.utils.flop_counter import FlopCounterMode

from panther.ops import OPS, hadamard
from tests.kernels import COMPILED, needs_kernels

REFERENCE = OPS["hadamard"].reference
SIZES = [2**power for power in range(9)]
LARGE = [2**power for power in range(11, 17)]  # on both sides of a block of the kernel


def assert_within_the_rounding_bound(got, x, exact):
    """Each number went through log2(n) additions and a multiplication; a bound of its size is the sum of all."""
    n = x.shape[-1]
    scale = x.double().abs().sum(-1, keepdim=True) / math.sqrt(n)
    roundings = math.log2(n) + 2
    assert bool(((got.double() - exact).abs() <= roundings * torch.finfo(got.dtype).eps * scale).all())


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_transform_is_the_product_with_the_matrix_of_scipy(n, dtype):
    x = torch.randn(5, n).to(dtype)
    exact = x.double() @ torch.from_numpy(scipy.linalg.hadamard(n)).double() / math.sqrt(n)
    assert_within_the_rounding_bound(hadamard(x), x, exact)


@pytest.mark.parametrize("n", [*SIZES, *LARGE])
def test_torch_counts_the_additions_of_a_run_and_of_its_backward(n):
    with FlopCounterMode(display=False) as counter:
        hadamard(torch.randn(2, 3, n))
    assert counter.get_total_flops() == 6 * n * round(math.log2(n))
    with FlopCounterMode(display=False) as counter:
        hadamard(torch.randn(2, 3, n, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 2 * 6 * n * round(math.log2(n))


@pytest.mark.parametrize("n", LARGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_long_rows_are_within_the_rounding_bound(n, dtype):
    x = torch.randn(3, n, dtype=dtype)
    assert_within_the_rounding_bound(hadamard(x), x, REFERENCE(x.double()))


@needs_kernels
@pytest.mark.parametrize("n", [*SIZES, *LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.usefixtures("scalar_kernels")
def test_scalar_kernel_gives_the_same_bits(n, dtype):
    x = torch.randn(3, n, dtype=dtype)
    scalar = hadamard(x)
    COMPILED.set_instruction_set(COMPILED.build_info()["instruction_sets"][-1])
    assert torch.equal(hadamard(x), scalar)


@pytest.mark.parametrize("n", [8, 512, 8192])
def test_transform_is_its_own_inverse_and_keeps_the_energy(n):
    x = torch.randn(4, n, dtype=torch.float64)
    torch.testing.assert_close(hadamard(hadamard(x)), x)
    torch.testing.assert_close(hadamard(x).norm(dim=1), x.norm(dim=1))


def test_number_of_threads_changes_no_bit(threads):
    x = torch.randn(301, 512)  # large enough to be shared, in ranges of odd length
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(hadamard(x))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_result_of_a_row_does_not_depend_on_the_rows_beside_it():
    x = torch.randn(7, 128)
    assert torch.equal(torch.cat([hadamard(row.unsqueeze(0)) for row in x]), hadamard(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_rounded_once_at_the_end(dtype):
    x = torch.randn(6, 256).to(dtype)
    assert torch.equal(hadamard(x), hadamard(x.float()).to(dtype))


@pytest.mark.parametrize("shape", [(1,), (16,), (0, 8), (2, 0, 4), (3, 2, 1, 8)], ids=str)
def test_shapes_are_kept(shape):
    assert hadamard(torch.randn(shape)).shape == shape


def test_views_give_what_their_copies_give_and_stay_as_they_are():
    x = torch.randn(64, 12)
    view = x.T[::2]
    before = x.clone()
    assert torch.equal(hadamard(view), hadamard(view.contiguous()))
    assert torch.equal(x, before)


BAD = {
    "no power of two": (torch.ones(2, 12), "expected the shape x (..., n) with n a power of two; got (2, 12)"),
    "no numbers": (torch.ones(2, 0), "got (2, 0)"),
    "no dimensions": (torch.tensor(1.0), "got ()"),
    "whole numbers": (
        torch.ones(2, 4).long(),
        "expected float32, float64, bfloat16 or float16; got int64",
    ),
}


@pytest.mark.parametrize(("x", "says"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_the_same_words_with_and_without_kernel(x, says):
    messages = []
    for function in (hadamard, REFERENCE):
        with pytest.raises(ValueError, match=r"^hadamard: ") as refusal:
            function(x)
        messages.append(str(refusal.value))
    assert says in messages[0]
    assert messages[0] == messages[1]
