"""Factors of eight bits: how weights become them, and the kernel that multiplies by them."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from panther.ops import OPS, dequantised, low_rank_linear_int8, quantised
from tests.kernels import needs_kernels

REFERENCE = OPS["low_rank_linear_int8"].reference
GROUPS = (None, 32, 64, 128)


def inputs_of(rows, size_in, rank, out, group_size=None):
    return (
        torch.randn(rows, size_in),
        *quantised(torch.randn(rank, size_in), group_size),
        *quantised(torch.randn(out, rank), group_size),
        torch.randn(out),
    )


def assert_within_the_rounding_bound(got, inputs):
    """That of two nested sums; a number of a factor is rounded once more, by its scale."""
    x, down, down_scales, up, up_scales, bias = inputs
    wide_down, wide_up = dequantised(down, down_scales.double()), dequantised(up, up_scales.double())
    exact = x.double() @ wide_down.T @ wide_up.T + bias.double()
    scale = x.double().abs() @ wide_down.abs().T @ wide_up.abs().T + bias.double().abs()
    roundings = down.shape[0] + down.shape[1] + 4
    assert bool(((got.double() - exact).abs() <= roundings * torch.finfo(got.dtype).eps * scale).all())


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize(("rows", "size_in", "rank", "out"), [(1, 13, 3, 7), (6, 190, 70, 1), (0, 8, 2, 4)])
def test_torch_counts_a_run_and_the_products_of_its_backward(rows, size_in, rank, out, group_size):
    x, *others = inputs_of(rows, size_in, rank, out, group_size)
    with FlopCounterMode(display=False) as counter:
        low_rank_linear_int8(x, *others)
    assert counter.get_total_flops() == 2 * rows * rank * (size_in + out)
    with FlopCounterMode(display=False) as counter:
        low_rank_linear_int8(x.requires_grad_(), *others).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * rows * rank * (size_in + out)


@needs_kernels
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 8, 9, 20, 48, 49])
@pytest.mark.parametrize("sizes", [(8, 8, 8), (31, 5, 13), (70, 1, 3), (64, 33, 37), (260, 129, 66)], ids=str)
@pytest.mark.usefixtures("instruction_set")
def test_every_number_of_rows_is_within_the_rounding_bound(rows, sizes, group_size):
    inputs = inputs_of(rows, *sizes, group_size)
    assert_within_the_rounding_bound(low_rank_linear_int8(*inputs), inputs)


@pytest.mark.parametrize("rows", [2, 49, 100])
@pytest.mark.parametrize("group_size", [None, 64])
def test_factors_above_the_size_of_a_tile_are_widened_in_parts(rows, group_size):
    inputs = inputs_of(rows, 1500, 1601, 900, group_size)
    assert_within_the_rounding_bound(low_rank_linear_int8(*inputs), inputs)


@needs_kernels
@pytest.mark.usefixtures("instruction_set")
def test_result_of_a_row_does_not_depend_on_the_rows_beside_it():
    x, *others = inputs_of(8, 77, 40, 45, 32)
    together = low_rank_linear_int8(x, *others)
    for rows in range(1, 8):
        assert torch.equal(low_rank_linear_int8(x[:rows], *others), together[:rows])


@needs_kernels
@pytest.mark.parametrize("rows", [1, 7, 48])
def test_number_of_threads_changes_no_bit(rows, threads):
    inputs, results = inputs_of(rows, 640, 515, 771), []
    for count in (1, 2, 3):
        threads(count)
        results.append(low_rank_linear_int8(*inputs))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [3, 60])
def test_half_precision_is_rounded_at_the_end(rows, dtype):
    x, down, down_scales, up, up_scales, bias = (
        value.to(dtype) if value.is_floating_point() else value for value in inputs_of(rows, 96, 40, 50, 32)
    )
    got = low_rank_linear_int8(x, down, down_scales, up, up_scales, bias)
    exact = F.linear(F.linear(x.double(), dequantised(down, down_scales.double())), dequantised(up, up_scales.double()))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact + bias.double(), rtol=0.05, atol=0.05 * float(exact.abs().mean()))


# Quantising -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("columns", [1, 31, 32, 100, 256])
def test_no_number_is_off_by_more_than_half_a_step(columns, group_size):
    weight = torch.randn(9, columns) * torch.logspace(-6, 3, 9).unsqueeze(1)
    values, scales = quantised(weight, group_size)
    assert values.dtype == torch.int8
    assert values.shape == weight.shape
    assert scales.shape == (9, -(-columns // (group_size or columns)))
    size = group_size or columns
    steps = scales.repeat_interleave(size, 1)[:, :columns]
    assert bool(((dequantised(values, scales) - weight).abs() <= steps * 0.5001).all())
    assert int(values.abs().max()) == 127


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e-5, 1e-3, 1.0, 1e3])
def test_scales_are_rounded_up_so_that_no_number_is_cut_off(dtype, size):
    weight = (torch.randn(9, 100) * size).to(dtype)
    values, scales = quantised(weight, 32)
    assert scales.dtype == dtype
    wide = dequantised(values, scales.double())
    steps = scales.double().repeat_interleave(32, 1)[:, :100]
    assert bool(((wide - weight.double()).abs() <= steps * 0.5001).all())


def test_rows_of_zeros_and_one_huge_number_stay_what_they_are():
    weight = torch.zeros(3, 64)
    weight[1] = 0.01
    weight[1, 5] = 1e30
    values, scales = quantised(weight, 32)
    wide = dequantised(values, scales)
    assert torch.equal(wide[0], weight[0])
    assert torch.equal(wide[2], weight[2])
    torch.testing.assert_close(wide[1, 5], weight[1, 5])
    torch.testing.assert_close(wide[1, 32:], weight[1, 32:])  # another group than the huge number's


def test_matrix_without_columns_or_rows_has_no_values():
    assert quantised(torch.zeros(4, 0))[0].shape == (4, 0)
    assert quantised(torch.zeros(0, 4))[0].shape == (0, 4)


@pytest.mark.parametrize(
    ("weight", "group_size", "says"),
    [
        (torch.ones(2, 2), 16, "group_size is 16; use None or one of"),
        (torch.ones(2), None, r"expected a floating-point matrix; got \(2\) torch.float32"),
        (torch.ones(2, 2).int(), None, r"expected a floating-point matrix; got \(2, 2\) torch.int32"),
        (torch.tensor([[1.0, torch.nan]]), None, "the weight holds NaN or Inf"),
        (torch.tensor([[1.0, torch.inf]]), 32, "the weight holds NaN or Inf"),
    ],
)
def test_what_cannot_be_quantised_is_refused(weight, group_size, says):
    with pytest.raises(ValueError, match=says):
        quantised(weight, group_size)


# Refusals -------------------------------------------------------------------------------------------------------------


def changed(position, value):
    inputs = list(inputs_of(2, 40, 3, 4))
    inputs[position] = value
    return tuple(inputs)


BAD = {
    "inner sizes differ": (changed(0, torch.ones(2, 39)), "got (2, 39), (3, 40), (3, 1), (4, 3), (4, 1), (4)"),
    "no such group size": (changed(2, torch.ones(3, 7)), "one group a row or one for 32, 64 or 128 numbers; got"),
    "scales of other rows": (changed(4, torch.ones(3, 1)), "(4, 3), (3, 1), (4)"),
    "no scales": (changed(2, torch.ones(3, 0)), "(3, 40), (3, 0)"),
    "bias of another size": (changed(5, torch.ones(3)), "(4, 1), (3)"),
    "float factor": (changed(1, torch.ones(3, 40)), "expected int8 factors"),
    "factor of four bits": (changed(1, torch.ones(3, 40, dtype=torch.uint8)), "got float32, uint8, float32, int8"),
    "scales of another dtype": (changed(2, torch.ones(3, 1).double()), "got float32, int8, float64, int8, float32"),
    "whole numbers": (tuple(value.to(torch.int8) for value in inputs_of(2, 40, 3, 4)), "got int8, int8, int8"),
    "x without dimensions": (changed(0, torch.tensor(1.0)), "got (), (3, 40)"),
}


@pytest.mark.parametrize(("inputs", "says"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_the_same_words_with_and_without_kernel(inputs, says):
    messages = []
    for function in (low_rank_linear_int8, REFERENCE, torch.ops.panther.low_rank_linear_int8):
        with pytest.raises(ValueError, match=r"^low_rank_linear_int8: ") as refusal:
            function(*inputs)
        messages.append(str(refusal.value))
    assert says in messages[0]
    assert len(set(messages)) == 1


def test_inputs_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="expected one device for all tensors; got cpu, meta, cpu"):
        REFERENCE(*changed(1, inputs_of(2, 40, 3, 4)[1].to("meta")))
