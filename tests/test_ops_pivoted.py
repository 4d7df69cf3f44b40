"""pivoted_linear: its kernel in every shape, both sides and every instruction set, and its refusals."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from panther.ops import OPS, pivoted_linear
from tests.kernels import needs_kernels

REFERENCE = OPS["pivoted_linear"].reference
SIZES = [(8, 3, 8), (31, 5, 13), (64, 16, 37), (129, 33, 66), (16, 15, 16)]


def inputs_of(side, rows, size_in, rank, out, *, ordered=True):
    others_in, others_out = (size_in, out - rank) if side == "rows" else (size_in - rank, out)
    return (
        torch.randn(rows, size_in),
        torch.randn(rank, others_in),
        torch.randn(others_out, rank),
        torch.randn(out),
        torch.randperm(out if side == "rows" else size_in).int() if ordered else None,
    )


def changed_floats(inputs, change):
    return (change(value) if value is not None and value.is_floating_point() else value for value in inputs)


def assert_near(got, inputs):
    exact = REFERENCE(*changed_floats(inputs, lambda value: value.double()))
    scale = REFERENCE(*changed_floats(inputs, lambda value: value.double().abs()))
    roundings = inputs[1].shape[0] + inputs[0].shape[-1] + 4
    assert bool(((got.double() - exact).abs() <= roundings * torch.finfo(got.dtype).eps * scale).all())


@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.parametrize("rows", [0, 1, 6])
@pytest.mark.parametrize(("size_in", "rank", "out"), SIZES)
def test_torch_counts_a_run_and_the_products_of_its_backward(side, rows, size_in, rank, out):
    x, *others = inputs_of(side, rows, size_in, rank, out)
    with FlopCounterMode(display=False) as counter:
        pivoted_linear(x, *others)
    assert counter.get_total_flops() == 2 * rows * rank * (size_in + out - rank)
    with FlopCounterMode(display=False) as counter:
        pivoted_linear(x.requires_grad_(), *others).sum().backward()  # the weights' gradients are not wanted
    assert counter.get_total_flops() == 2 * 2 * rows * rank * (size_in + out - rank)


@needs_kernels
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 8, 12, 13, 40])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.usefixtures("instruction_set")
def test_every_number_of_rows_is_within_the_rounding_bound(side, rows, sizes, ordered):
    inputs = inputs_of(side, rows, *sizes, ordered=ordered)
    assert_near(pivoted_linear(*inputs), inputs)


@needs_kernels
@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.usefixtures("instruction_set")
def test_number_of_threads_and_rows_beside_change_no_bit(side, threads):
    x, *others = inputs_of(side, 7, 320, 257, 515 if side == "rows" else 300)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(pivoted_linear(x, *others))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(pivoted_linear(x[:3], *others), results[0][:3])


@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.parametrize("rows", [12, 13, 32, 33])
def test_large_ranks_have_more_rows_in_the_kernel(side, rows):
    inputs = inputs_of(side, rows, 400, 200, 300)
    assert_near(pivoted_linear(*inputs), inputs)


@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.parametrize("records", [False, True])
def test_an_order_that_repeats_a_channel_has_the_gradient_of_its_formula(side, records):
    x, down, up, bias, order = inputs_of(side, 3, 9, 4, 9)
    order[2] = order[5]
    down.requires_grad_(records)
    gradients = []
    for function in (pivoted_linear, REFERENCE):
        wanted = x.clone().requires_grad_()
        function(wanted, down, up, bias, order).square().sum().backward()
        gradients.append(wanted.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.parametrize("rows", [3, 24])
def test_views_give_what_their_copies_give(side, rows):
    x, down, up, bias, order = inputs_of(side, rows, 24, 7, 18)
    views = (x.T.clone().T, down.T.clone().T, up.T.clone().T, bias.flip(0), order.flip(0))
    copies = tuple(view.clone(memory_format=torch.contiguous_format) for view in views)
    torch.testing.assert_close(pivoted_linear(*views), pivoted_linear(*copies))


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 5), (3, 0, 2)], ids=str)
def test_leading_dimensions_are_kept(lead):
    _, *others = inputs_of("rows", 1, 12, 3, 8)
    x = torch.randn(*lead, 12)
    y = pivoted_linear(x, *others)
    assert y.shape == (*lead, 8)
    torch.testing.assert_close(y, REFERENCE(x, *others))


@needs_kernels
@pytest.mark.parametrize("wrong", [-1, 13])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("side", ["rows", "columns"])
def test_an_order_that_points_outside_is_refused(side, rows, wrong):
    x, down, up, bias, order = inputs_of(side, rows, 13, 5, 13)
    order[4] = wrong
    with pytest.raises(IndexError, match="order points outside of its 13 channels"):
        pivoted_linear(x, down, up, bias, order)


def changed(position, value):
    inputs = list(inputs_of("rows", 2, 9, 3, 8))
    inputs[position] = value
    return tuple(inputs)


BAD = {
    "sizes of neither side": (changed(0, torch.ones(2, 11)), "got (2, 11), (3, 9), (5, 3), (8), (8)"),
    "ranks differ": (changed(2, torch.ones(5, 4)), "got (2, 9), (3, 9), (5, 4), (8), (8)"),
    "no rank": (changed(1, torch.ones(0, 9)), "got (2, 9), (0, 9)"),
    "bias of another size": (changed(3, torch.ones(5)), "(5, 3), (5), (8)"),
    "order of another size": (changed(4, torch.arange(9).int()), "(8), (9)"),
    "order of another dtype": (changed(4, torch.arange(8)), "float32, int64"),
    "dtypes differ": (changed(1, torch.ones(3, 9).double()), "float32, float64, float32, float32, int32"),
    "whole numbers": (tuple(value.to(torch.int32) for value in inputs_of("rows", 40, 9, 3, 8)), "got int32, int32"),
    "bytes": (
        (*(value.to(torch.int8) for value in inputs_of("rows", 40, 9, 3, 8)[:4]), None),
        "got int8, int8, int8, int8",
    ),
    "complex numbers": (
        (*(value.to(torch.complex128) for value in inputs_of("rows", 40, 9, 3, 8)[:4]), None),
        "expected one floating-point dtype",
    ),
    "x without dimensions": (changed(0, torch.tensor(1.0)), "got (), (3, 9)"),
}


@pytest.mark.parametrize(("inputs", "says"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_the_same_words_with_and_without_kernel(inputs, says):
    messages = []
    for function in (pivoted_linear, REFERENCE, torch.ops.panther.pivoted_linear):
        with pytest.raises(ValueError, match=r"^pivoted_linear: ") as refusal:
            function(*inputs)
        messages.append(str(refusal.value))
    assert says in messages[0]
    assert len(set(messages)) == 1


@pytest.mark.parametrize(("position", "got"), [(1, "cpu, meta, cpu, cpu, cpu"), (4, "cpu, cpu, cpu, cpu, meta")])
def test_inputs_on_two_devices_are_refused(position, got):
    moved = inputs_of("rows", 2, 9, 3, 8)[position].to("meta")
    with pytest.raises(ValueError, match=f"expected one device for all tensors; got {got}"):
        REFERENCE(*changed(position, moved))
