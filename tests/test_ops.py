"""low_rank_linear: its kernel in every shape, its refusals, and life without a compiler."""

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from panther.build_info import build_info
from panther.ops import OPS, low_rank_linear
from tests.kernels import COMPILED, needs_kernels

REFERENCE = OPS["low_rank_linear"].reference

KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def factors(rows, size_in, rank, out, dtype=torch.float32):
    return (
        torch.randn(rows, size_in, dtype=dtype),
        torch.randn(rank, size_in, dtype=dtype),
        torch.randn(out, rank, dtype=dtype),
        torch.randn(out, dtype=dtype),
    )


def assert_within_the_rounding_bound(got, inputs):
    """The classical bound of two nested sums: (in + rank + 2) roundings of the sum of absolute values."""
    x, down, up, bias = (value.double() for value in inputs)
    exact = x @ down.T @ up.T + bias
    scale = x.abs() @ down.abs().T @ up.abs().T + bias.abs()
    roundings = down.shape[0] + down.shape[1] + 2
    assert bool(((got.double() - exact).abs() <= roundings * torch.finfo(got.dtype).eps * scale).all())


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("rows", range(18))
@pytest.mark.parametrize("sizes", [(8, 8, 8), (31, 5, 13), (64, 1, 3), (7, 9, 1), (64, 16, 37), (129, 33, 66)], ids=str)
def test_every_number_of_rows_is_within_the_rounding_bound(rows, sizes, dtype):
    inputs = factors(rows, *sizes, dtype)
    assert_within_the_rounding_bound(low_rank_linear(*inputs), inputs)


@pytest.mark.parametrize(("rows", "size_in", "rank", "out"), [(1, 13, 3, 7), (6, 19, 1, 1), (0, 8, 2, 4)])
def test_torch_counts_a_run_and_the_products_of_its_backward(rows, size_in, rank, out):
    inputs = factors(rows, size_in, rank, out)
    with FlopCounterMode(display=False) as counter:
        low_rank_linear(*inputs)
    assert counter.get_total_flops() == 2 * rows * rank * (size_in + out)
    x, *others = inputs
    with FlopCounterMode(display=False) as counter:
        low_rank_linear(x.requires_grad_(), *others).sum().backward()  # the weights' gradients are not wanted
    assert counter.get_total_flops() == 2 * 2 * rows * rank * (size_in + out)


@needs_kernels
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("rows", range(1, 14))
@pytest.mark.parametrize("sizes", [(8, 8, 8), (31, 5, 13), (129, 33, 66)], ids=str)
def test_each_instruction_set_is_within_the_rounding_bound(rows, sizes, dtype, instruction_set):
    inputs = factors(rows, *sizes, dtype)
    assert COMPILED.build_info()["instruction_set"] == instruction_set
    assert_within_the_rounding_bound(low_rank_linear(*inputs), inputs)


@needs_kernels
def test_unknown_instruction_set_is_refused_and_changes_nothing():
    before = COMPILED.build_info()["instruction_set"]
    with pytest.raises(ValueError, match="'avx9' is not one that this processor has"):
        COMPILED.set_instruction_set("avx9")
    assert COMPILED.build_info()["instruction_set"] == before


@needs_kernels
@pytest.mark.parametrize("rows", [1, 2, 6, 7, 12])
@pytest.mark.parametrize("rank", [16, 19])
def test_bfloat16_is_rounded_once_at_the_end(rows, rank):
    inputs = factors(rows, 72, rank, 37, torch.bfloat16)
    x, down, up, bias = (value.float() for value in inputs)
    expected = low_rank_linear(x, down, up, bias)  # the same sums in the same order
    assert torch.equal(low_rank_linear(*inputs), expected.bfloat16())


@needs_kernels
@pytest.mark.parametrize(
    ("value", "expected"),
    [(torch.inf, torch.inf), (-torch.inf, -torch.inf), (torch.nan, torch.nan), (3.38e38, 3.38e38), (1e-40, 1e-40)],
)
def test_bfloat16_keeps_what_is_no_usual_number(value, expected):
    one = torch.ones(1, 1).bfloat16()
    got = low_rank_linear(torch.tensor([[value]]).bfloat16(), one, one)
    assert torch.equal(got.nan_to_num(7, 8, 9), torch.tensor([[expected]]).bfloat16().nan_to_num(7, 8, 9))


@needs_kernels
def test_bfloat16_overflows_to_infinity():
    two = torch.full((1, 1), 2.0).bfloat16()
    assert bool(low_rank_linear(torch.tensor([[3.38e38]]).bfloat16(), two, two).isinf().all())


@needs_kernels
@pytest.mark.parametrize("rows", [1, 3, 7, 12])
def test_number_of_threads_changes_no_bit(rows, threads):
    inputs = factors(rows, 320, 257, 515)  # large enough that both products are shared, in ranges of odd length
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(low_rank_linear(*inputs))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_kernels
@pytest.mark.parametrize(
    ("dtype", "sizes", "most"),
    [
        (torch.float32, (77, 19, 45), 8),
        (torch.float32, (64, 16, 37), 8),
        (torch.float32, (80, 200, 45), 11),
        (torch.bfloat16, (77, 19, 45), 12),
        (torch.bfloat16, (64, 16, 37), 12),
    ],
    ids=str,
)
@pytest.mark.usefixtures("instruction_set")
def test_result_of_a_row_does_not_depend_on_the_rows_beside_it(sizes, dtype, most):
    x, down, up, bias = factors(most, *sizes, dtype)
    together = low_rank_linear(x, down, up, bias)
    for rows in range(1, most):
        assert torch.equal(low_rank_linear(x[:rows], down, up, bias), together[:rows])


def test_missing_bias_adds_nothing():
    x, down, up, bias = factors(3, 20, 4, 6)
    assert torch.equal(low_rank_linear(x, down, up), low_rank_linear(x, down, up, torch.zeros_like(bias)))


def test_full_rank_reproduces_the_dense_layer():
    x, weight, _, bias = factors(4, 24, 16, 16, torch.float64)
    torch.testing.assert_close(low_rank_linear(x, weight, torch.eye(16).double(), bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("rows", [1, 9])
def test_rank_zero_gives_the_bias(rows):
    x, down, up, bias = factors(rows, 10, 0, 4)
    assert torch.equal(low_rank_linear(x, down, up, bias), bias.expand(rows, 4))
    assert torch.equal(low_rank_linear(x, down, up), torch.zeros(rows, 4))


@pytest.mark.parametrize("rows", [1, 9])
def test_layer_without_inputs_gives_the_bias(rows):
    x, down, up, bias = factors(rows, 0, 3, 4)
    assert torch.equal(low_rank_linear(x, down, up, bias), bias.expand(rows, 4))


@pytest.mark.parametrize("rows", [2, 20])
def test_layer_without_outputs_gives_none(rows):
    assert low_rank_linear(*factors(rows, 5, 3, 0)).shape == (rows, 0)


@pytest.mark.parametrize("lead", [(), (1,), (4,), (2, 3), (2, 1, 5), (3, 0, 2)], ids=str)
def test_leading_dimensions_are_kept(lead):
    _, down, up, bias = factors(1, 12, 3, 5)
    x = torch.randn(*lead, 12)
    y = low_rank_linear(x, down, up, bias)
    assert y.shape == (*lead, 5)
    torch.testing.assert_close(y, REFERENCE(x, down, up, bias))


@pytest.mark.parametrize("rows", [3, 24])
def test_views_give_what_their_copies_give(rows):
    x, down, up, bias = factors(2 * rows, 24, 10, 14)
    views = (x[::2, 3:20], down[1::2, 3:20], up.T[::2].T, bias.flip(0))
    copies = tuple(view.clone(memory_format=torch.contiguous_format) for view in views)
    torch.testing.assert_close(low_rank_linear(*views), low_rank_linear(*copies))


def test_infinities_and_nans_pass_through():
    x, down, up, bias = factors(2, 16, 4, 8)
    x[0, 3] = torch.nan
    y = low_rank_linear(x, down, up, bias)
    assert bool(y[0].isnan().all())
    assert bool(y[1].isfinite().all())


BAD = {
    "inner sizes differ": (
        factors(2, 5, 3, 4)[:1] + factors(2, 6, 3, 4)[1:],
        "expected the shapes x (..., in), down (R, in), up (out, R), bias (out) or None; got (2, 5)",
    ),
    "ranks differ": ((torch.ones(2, 5), torch.ones(3, 5), torch.ones(4, 2), None), "got (2, 5), (3, 5), (4, 2), None"),
    "bias of another size": (
        (torch.ones(2, 5), torch.ones(3, 5), torch.ones(4, 3), torch.ones(3)),
        "got (2, 5), (3, 5), (4, 3), (3)",
    ),
    "x without dimensions": (
        (torch.tensor(1.0), torch.ones(3, 5), torch.ones(4, 3), None),
        "got (), (3, 5), (4, 3), None",
    ),
    "factor of three dimensions": (
        (torch.ones(2, 5), torch.ones(1, 3, 5), torch.ones(4, 3), None),
        "got (2, 5), (1, 3, 5), (4, 3), None",
    ),
    "dtypes differ": (
        (torch.ones(2, 5), torch.ones(3, 5).bfloat16(), torch.ones(4, 3), torch.ones(4).double()),
        "expected one dtype for x, down, up, bias; got float32, bfloat16, float32, float64",
    ),
}


@pytest.mark.parametrize(("inputs", "says"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_the_same_words_with_and_without_kernel(inputs, says):
    messages = []
    for function in (low_rank_linear, REFERENCE, torch.ops.panther.low_rank_linear):
        with pytest.raises(ValueError, match=r"^low_rank_linear: ") as refusal:
            function(*inputs)
        messages.append(str(refusal.value))
    assert says in messages[0]
    assert len(set(messages)) == 1


def test_gradients_of_complex_numbers_are_those_of_two_products():
    inputs = [value.requires_grad_() for value in factors(3, 5, 2, 4, torch.complex128)]
    assert torch.autograd.gradcheck(torch.ops.panther.low_rank_linear, inputs)


def test_inputs_on_two_devices_are_refused_with_their_devices():
    x, down, up, bias = factors(2, 5, 3, 4)
    with pytest.raises(ValueError, match="expected one device for x, down, up, bias; got cpu, meta, cpu, cpu"):
        REFERENCE(x, down.to("meta"), up, bias)


def test_build_info_names_what_is_in_use():
    info = build_info()
    assert info.torch == torch.__version__
    assert info.threads == torch.get_num_threads()
    assert info.compiled == (COMPILED is not None)
    assert bool(info.reason) == (not info.compiled)
    assert info.torch in str(info)


WITHOUT_KERNELS = """
    import sys, warnings
    sys.modules["panther._C"] = None  # importing it fails, as where it was never built
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import torch
        import panther.ops
        from panther.build_info import build_info
        print(len([w for w in caught if "compiled CPU kernels" in str(w.message)]))
        torch.manual_seed(3)
        x, down, up = torch.randn(3, 20), torch.randn(4, 20), torch.randn(6, 4)
        for _ in range(3):
            y = panther.ops.low_rank_linear(x, down, up)
        said = [str(w.message) for w in caught if "compiled CPU kernels" in str(w.message)]
    print(len(said))
    print(said[0])
    print(torch.equal(y, torch.nn.functional.linear(torch.nn.functional.linear(x, down), up)))
    print(build_info().compiled, build_info().kernels, build_info().reason)
"""


def test_without_compiled_module_results_are_the_reference_and_one_warning_says_so():
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT_KERNELS)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    after_import, after_use, said, equal, info = run.stdout.splitlines()
    assert after_import == "0"  # importing is silent
    assert after_use == "1"
    assert "panther._C was not built" in said
    assert "install a C++17 compiler" in said
    assert equal == "True"
    assert info.startswith("False () panther._C was not built")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
def test_an_op_is_compiled_whole_where_no_gradient_is_recorded(mode: Any) -> None:
    x, down, up = torch.randn(3, 24), torch.randn(4, 24), torch.randn(16, 4)
    with mode():
        compiled = torch.compile(lambda x: low_rank_linear(x, down, up), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), low_rank_linear(x, down, up))
