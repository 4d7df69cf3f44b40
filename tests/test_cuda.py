"""low_rank_linear's CUDA kernels, where there is a GPU and they were built (PANTHER_CUDA=1)."""

import pytest
import torch

from panther.build_info import build_info
from panther.ops import OPS, low_rank_linear

OP = OPS["low_rank_linear"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Odd sizes, whose numbers are loaded one by one, and sizes whose numbers are loaded 16 bytes at a time.
SIZES = [(1, 1, 1), (31, 5, 13), (64, 16, 37), (129, 33, 66), (1024, 136, 520)]


def missing():
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    return build_info().cuda_reason


needs_cuda_kernels = pytest.mark.skipif(bool(missing()), reason=f"no CUDA kernels here: {missing()}")


def factors(rows, size_in, rank, out, dtype=torch.float32):
    shapes = [(rows, size_in), (rank, size_in), (out, rank), (out,)]
    return tuple(torch.randn(shape).to("cuda", dtype) for shape in shapes)


def test_build_info_tells_the_cuda_kernels_or_why_there_are_none():
    info = build_info()
    assert bool(info.cuda_kernels) != bool(info.cuda_reason)
    assert ("CUDA kernels" in str(info)) == bool(info.cuda)


@needs_cuda_kernels
def test_dispatcher_has_the_kernel():
    assert OP.has_kernel("cuda")


@needs_cuda_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_few_rows_are_within_the_rounding_bound_of_float32_and_rounded_once(sizes, dtype):
    for rows in range(1, 17):
        inputs = factors(rows, *sizes, dtype)
        x, down, up, bias = (value.double() for value in inputs)
        exact = x @ down.T @ up.T + bias
        scale = x.abs() @ down.abs().T @ up.abs().T + bias.abs()
        roundings = (down.shape[0] + down.shape[1] + 2) * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
        got = low_rank_linear(*inputs)
        assert got.dtype == dtype
        assert bool(((got.double() - exact).abs() <= roundings * scale).all())


@needs_cuda_kernels
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [0, 17, 40])
def test_other_numbers_of_rows_are_the_two_products_of_torch(rows, dtype):
    inputs = factors(rows, 64, 16, 37, dtype)
    assert torch.equal(low_rank_linear(*inputs), OP.reference(*inputs))


@needs_cuda_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_result_of_a_row_does_not_depend_on_the_rows_beside_it(sizes, dtype):
    x, down, up, bias = factors(16, *sizes, dtype)
    together = low_rank_linear(x, down, up, bias)
    for rows in range(1, 16):
        assert torch.equal(low_rank_linear(x[:rows], down, up, bias), together[:rows])


@needs_cuda_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_op_equals_its_reference_at_the_edges(dtype):
    for inputs in OP.samples(dtype):
        there = tuple(value if value is None else value.cuda() for value in inputs)
        exact = OP.reference(*(value if value is None else value.double() for value in inputs))
        tolerance = 16 * torch.finfo(dtype).eps  # of sums of up to 20 terms, as in contract/test_ops.py
        torch.testing.assert_close(low_rank_linear(*there).cpu().double(), exact, rtol=tolerance, atol=20 * tolerance)


@needs_cuda_kernels
def test_rank_zero_gives_the_bias_and_no_outputs_give_none():
    x, down, up, bias = factors(3, 10, 0, 4)
    assert torch.equal(low_rank_linear(x, down, up, bias), bias.expand(3, 4))
    assert low_rank_linear(*factors(3, 10, 2, 0)).shape == (3, 0)


@needs_cuda_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 7, 16])
def test_cuda_graph_replays_the_op_for_new_inputs(rows, dtype):
    inputs = factors(rows, 129, 33, 66, dtype)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        low_rank_linear(*inputs)  # loads the kernels, which a capture does not allow
        with torch.cuda.graph(graph):  # on a stream of its own; a capture refuses to wait for the GPU
            got = low_rank_linear(*inputs)
    for value in inputs:
        value.normal_()
    graph.replay()
    assert torch.equal(got, low_rank_linear(*inputs))


@needs_cuda_kernels
def test_op_passes_opcheck():
    for inputs in OP.samples(torch.float32):
        there = tuple(value if value is None else value.cuda().requires_grad_() for value in inputs)
        torch.library.opcheck(OP.overload, there)


@needs_cuda_kernels
def test_inputs_on_two_devices_are_refused_in_the_words_of_the_reference():
    x, down, up, bias = factors(2, 5, 3, 4)
    messages = []
    for function in (OP.overload, OP.reference):
        with pytest.raises(ValueError, match="expected one device for x, down, up, bias; got cuda:0, cpu") as refusal:
            function(x, down.cpu(), up, bias)
        messages.append(str(refusal.value))
    assert messages[0] == messages[1]


@needs_cuda_kernels
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU at most")
def test_op_runs_on_the_device_of_its_inputs():
    inputs = factors(3, 129, 33, 66)
    moved = tuple(value.to("cuda:1") for value in inputs)
    got = low_rank_linear(*moved)
    assert got.device == moved[0].device
    assert torch.equal(got.cpu(), low_rank_linear(*inputs).cpu())
