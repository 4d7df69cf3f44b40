"""A dense layer of eight or four bits, or of bfloat16: how it is stored, and the kernel that multiplies by it."""

import pytest
import torch
from torch.nn import functional as F

from panther.ops import OPS, dequantised, packed_int4, quantised, quantised_linear, unpacked_int4
from tests.kernels import needs_kernels

REFERENCE = OPS["quantised_linear"].reference
GROUPS = (None, 32, 64, 128)

eight_or_four = pytest.mark.parametrize("bits", [8, 4])


every_width = pytest.mark.parametrize("bits", [8, 4, 16])  # 16: bfloat16, which has no groups


def stored(weight, group_size, bits):
    if bits == 16:
        return weight.bfloat16().view(torch.int16), weight.new_empty(len(weight), 0)
    values, scales = quantised(weight, group_size, bits)
    return packed_int4(values) if bits == 4 else values, scales


def inputs_of(rows, size_in, out, group_size=None, bits=8):
    return torch.randn(rows, size_in), *stored(torch.randn(out, size_in), group_size, bits), torch.randn(out)


def assert_within_the_rounding_bound(got, inputs):
    """That of a sum, whose numbers are rounded once more, by their scales."""
    x, values, scales, bias = inputs
    wide = dequantised(values, scales.double(), x.shape[-1])
    exact = x.double() @ wide.T + bias.double()
    scale = x.double().abs() @ wide.abs().T + bias.double().abs()
    roundings = x.shape[-1] + 3
    assert bool(((got.double() - exact).abs() <= roundings * torch.finfo(got.dtype).eps * scale).all())


@needs_kernels
@every_width
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 6, 7, 20, 22, 128, 129, 193])
@pytest.mark.parametrize("sizes", [(31, 13), (1, 3), (65, 37), (260, 66)], ids=str)
@pytest.mark.usefixtures("instruction_set")
def test_every_number_of_rows_is_within_the_rounding_bound(rows, sizes, group_size, bits):
    inputs = inputs_of(rows, *sizes, group_size, bits)
    assert_within_the_rounding_bound(quantised_linear(*inputs), inputs)


@needs_kernels
@eight_or_four
@pytest.mark.parametrize("columns", range(1, 36))
@pytest.mark.usefixtures("instruction_set")
def test_what_lies_after_the_last_number_of_a_row_never_counts(columns, bits):
    """With a scale near the largest float, the half byte after an odd row would be an infinity."""
    values = torch.ones(13, columns, dtype=torch.int8)
    stored_values = packed_int4(values) if bits == 4 else values
    if bits == 4 and columns % 2:
        stored_values[:, -1] &= 15  # it holds -8 now, in place of the zero
    scales = torch.full((13, 1), 1e38)
    for rows in (1, 3, 20):
        x = torch.zeros(rows, columns)
        x[:, -1] = 0.5
        got = quantised_linear(x, stored_values, scales)
        torch.testing.assert_close(got, torch.full((rows, 13), 0.5e38))


@every_width
@pytest.mark.parametrize("rows", [2, 129])
@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weight_above_the_size_of_a_tile_is_widened_in_parts(rows, group_size, dtype, bits):
    weight = torch.randn(1300, 901, dtype=dtype)
    inputs = (
        torch.randn(rows, 901, dtype=dtype),
        *stored(weight, group_size, bits),
        torch.randn(1300, dtype=dtype),
    )
    assert_within_the_rounding_bound(quantised_linear(*inputs), inputs)


@needs_kernels
@every_width
@pytest.mark.parametrize(("group_size", "size_in"), [(32, 77), (None, 48), (128, 301)])
def test_every_row_within_the_kernel_has_the_bits_of_that_row_alone(group_size, size_in, bits, instruction_set):
    if instruction_set == "scalar":
        pytest.skip("the plain kernel serves single rows")
    # More may run in the kernel of many rows, with AVX-512 where those of the weight are short.
    has_fewer = bits != 16 if instruction_set == "avx2" else instruction_set == "avx512" and size_in <= 192
    most = 11 if has_fewer else 28
    x, *others = inputs_of(most, size_in, 45, group_size, bits)
    together = quantised_linear(x, *others)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, most - 1):
        assert torch.equal(quantised_linear(x[:rows], *others), together[:rows])


@needs_kernels
@every_width
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_number_of_threads_changes_no_bit(rows, threads, bits):
    inputs, results = inputs_of(rows, 641, 1003, 64, bits), []
    for count in (1, 2, 3):
        threads(count)
        results.append(quantised_linear(*inputs))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@every_width
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [3, 150])
def test_half_precision_is_rounded_at_the_end(rows, dtype, bits):
    x, values, scales, bias = (
        value.to(dtype) if value.is_floating_point() else value for value in inputs_of(rows, 97, 50, 32, bits)
    )
    got = quantised_linear(x, values, scales, bias)
    exact = F.linear(x.double(), dequantised(values, scales.double(), 97)) + bias.double()
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, rtol=0.02, atol=0.02 * float(exact.abs().mean()))


@every_width
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 70), (3, 0, 2)], ids=str)
def test_leading_dimensions_are_kept(lead, bits):
    _, *others = inputs_of(1, 33, 5, None, bits)
    x = torch.randn(*lead, 33)
    y = quantised_linear(x, *others)
    assert y.shape == (*lead, 5)
    torch.testing.assert_close(y, REFERENCE(x, *others))


@every_width
@pytest.mark.parametrize("rows", [2, 150])
def test_views_give_what_their_copies_give(rows, bits):
    x, values, scales, bias = inputs_of(2 * rows, 64, 14, 32, bits)
    half = values.shape[1] // 2  # of the columns: 32 numbers, one group
    views = (x[::2, 1:33], values[::2, half:], scales[::2, 1:], bias.flip(0)[::2])
    copies = tuple(view.clone(memory_format=torch.contiguous_format) for view in views)
    torch.testing.assert_close(quantised_linear(*views), quantised_linear(*copies))


@every_width
@pytest.mark.parametrize("rows", [0, 2])
def test_layer_without_inputs_or_outputs_gives_the_bias_or_nothing(rows, bits):
    width = torch.uint8 if bits == 4 else torch.int8
    bias = torch.randn(3)
    assert torch.equal(
        quantised_linear(torch.ones(rows, 0), torch.ones(3, 0, dtype=width), torch.ones(3, 1), bias),
        bias.expand(rows, 3),
    )
    assert quantised_linear(*inputs_of(rows, 9, 0, None, bits)).shape == (rows, 0)


@every_width
def test_infinities_and_nans_of_the_input_pass_through(bits):
    x, *others = inputs_of(2, 20, 8, None, bits)
    x[0, 3] = torch.nan
    y = quantised_linear(x, *others)
    assert bool(y[0].isnan().all())
    assert bool(y[1].isfinite().all())


# Storing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("columns", [1, 31, 32, 101, 256])
def test_no_number_of_four_bits_is_off_by_more_than_half_a_step(columns, group_size):
    weight = torch.randn(9, columns) * torch.logspace(-6, 3, 9).unsqueeze(1)
    values, scales = quantised(weight, group_size, bits=4)
    assert values.dtype == torch.int8
    assert values.shape == weight.shape
    size = group_size or columns
    steps = scales.repeat_interleave(size, 1)[:, :columns]
    assert bool(((dequantised(values, scales) - weight).abs() <= steps * 0.5001).all())
    assert int(values.abs().max()) == 7


@eight_or_four
def test_one_huge_number_spoils_its_group_only(bits):
    weight = torch.randn(3, 96)
    weight[1, 5] = 1e30
    values, scales = quantised(weight, 32, bits)
    wide = dequantised(values, scales)
    most = {8: 127, 4: 7}[bits]
    torch.testing.assert_close(wide[1, 5], weight[1, 5])
    assert int(values[1, :32].count_nonzero()) == 1
    steps = weight[1, 32:].reshape(2, 32).abs().amax(1) / most
    assert bool(((wide[1, 32:] - weight[1, 32:]).reshape(2, 32).abs() <= 0.5001 * steps.unsqueeze(1)).all())


@pytest.mark.parametrize("columns", [0, 1, 2, 7, 8])
def test_packing_and_unpacking_give_the_numbers_back(columns):
    values = torch.randint(-8, 8, (5, columns), dtype=torch.int8)
    packed = packed_int4(values)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, (columns + 1) // 2)
    assert torch.equal(unpacked_int4(packed, columns), values)


def test_first_number_is_in_the_low_half_and_the_last_half_is_a_zero():
    assert packed_int4(torch.tensor([[-8, 7, 3]], dtype=torch.int8)).tolist() == [[0xF0, 0x8B]]


def test_reading_back_needs_the_columns_where_they_are_odd():
    values, scales = quantised(torch.randn(4, 33), 32, bits=4)
    assert torch.equal(dequantised(packed_int4(values), scales, 33), dequantised(values, scales))
    even, even_scales = quantised(torch.randn(4, 34), 32, bits=4)
    assert torch.equal(dequantised(packed_int4(even), even_scales), dequantised(even, even_scales))


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda: quantised(torch.ones(2, 2), bits=5), r"bits is 5; use one of \(8, 4\)"),
        (lambda: packed_int4(torch.ones(2, 2)), r"expected an int8 matrix; got \(2, 2\) torch.float32"),
        (lambda: packed_int4(torch.full((2, 2), 9, dtype=torch.int8)), "numbers from -8 to 7; got 9 to 9"),
        (lambda: unpacked_int4(torch.ones(2, 2, dtype=torch.uint8), 5), r"in = 5; got \(2, 2\) torch.uint8"),
        (lambda: unpacked_int4(torch.ones(2, 2), 4), r"got \(2, 2\) torch.float32"),
    ],
)
def test_what_cannot_be_stored_or_read_is_refused(function, says):
    with pytest.raises(ValueError, match=says):
        function()


# Refusals -------------------------------------------------------------------------------------------------------------


def changed(position, value, bits=8):
    inputs = list(inputs_of(2, 41, 3, None, bits))
    inputs[position] = value
    return tuple(inputs)


BAD = {
    "sizes differ": (changed(0, torch.ones(2, 40)), "of int16, the bits of bfloat16, no groups; got"),
    "four bits of another size": (changed(0, torch.ones(2, 43), 4), "got (2, 43), (3, 21), (3, 1), (3)"),
    "no such group size": (changed(2, torch.ones(3, 7)), "got (2, 41), (3, 41), (3, 7), (3)"),
    "scales of other rows": (changed(2, torch.ones(4, 1)), "got (2, 41), (3, 41), (4, 1), (3)"),
    "no scales": (changed(2, torch.ones(3, 0)), "(3, 41), (3, 0)"),
    "bias of another size": (changed(3, torch.ones(4)), "(3, 1), (4)"),
    "no bias": ((torch.ones(2, 3), torch.ones(3, 4, dtype=torch.int8), torch.ones(3, 1), None), "(3, 1), None"),
    "float values": (changed(1, torch.ones(3, 41)), "expected int8, uint8 or int16 values"),
    "wide values": (changed(1, torch.ones(3, 41, dtype=torch.int32)), "got float32, int32, float32, float32"),
    "scales of another dtype": (changed(2, torch.ones(3, 1).double(), 4), "got float32, uint8, float64, float32"),
    "whole numbers": (tuple(value.to(torch.int8) for value in inputs_of(2, 41, 3)), "got int8, int8, int8, int8"),
    "bfloat16 with scales": (changed(1, torch.ones(3, 41, dtype=torch.int16)), "(3, 41), (3, 1)"),
    "bfloat16 of another size": (
        (torch.ones(2, 3), torch.ones(3, 4, dtype=torch.int16), torch.ones(3, 0), None),
        "(3, 4), (3, 0), None",
    ),
    "x without dimensions": (changed(0, torch.tensor(1.0)), "got (), (3, 41)"),
    "values of three dimensions": (changed(1, torch.ones(1, 3, 41, dtype=torch.int8)), "got (2, 41), (1, 3, 41)"),
}


@pytest.mark.parametrize(("inputs", "says"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_the_same_words_with_and_without_kernel(inputs, says):
    messages = []
    for function in (quantised_linear, REFERENCE, torch.ops.panther.quantised_linear):
        with pytest.raises(ValueError, match=r"^quantised_linear: ") as refusal:
            function(*inputs)
        messages.append(str(refusal.value))
    assert says in messages[0]
    assert len(set(messages)) == 1


def test_inputs_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="expected one device for all tensors; got cpu, meta, cpu, cpu"):
        REFERENCE(*changed(1, inputs_of(2, 41, 3)[1].to("meta")))
