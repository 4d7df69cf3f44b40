"""What every op of panther.ops holds: a new line in OPS is tested by this file as it stands."""

import contextlib
import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from panther.build_info import build_info
from panther.ops import OPS, quantised

# Roundings add up along a sum: 16 of them cover samples with up to 20 terms, whose errors mostly cancel. The inner
# result of the 16-bit types is rounded as well, which the same 16 cover.
ROUNDINGS = 16

FUNCTIONS = {name: op for name, op in OPS.items() if not op.accumulates}
ACCUMULATING = {name: op for name, op in OPS.items() if op.accumulates}

every = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
ops = pytest.mark.parametrize("op", FUNCTIONS.values(), ids=FUNCTIONS)
accumulating = pytest.mark.parametrize("op", ACCUMULATING.values(), ids=ACCUMULATING)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


def is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def each(inputs, change):
    """The inputs with all floating-point tensors changed; int8 values, numbers and None stay."""
    return tuple(change(value) if is_float(value) else value for value in inputs)


def sizes(inputs):
    """What roundings are relative to: all numbers without their signs, in float64."""
    return tuple(
        value.detach().abs() if isinstance(value, torch.Tensor) else value
        for value in each(inputs, lambda value: value.detach().double())
    )


def assert_near(got, op, inputs):
    """`got` is what the reference gives in float64, within the roundings of its dtype."""
    exact = op.reference(*each(inputs, lambda value: value.detach().double()))
    # What the roundings are relative to: the largest of a row, since where an op subtracts the other sums are smaller.
    features = 1 if op.name.endswith("conv") else -1
    scale = op.reference(*sizes(inputs)).abs().amax(features, keepdim=True)
    assert got.shape == exact.shape
    assert bool(((got.double() - exact).abs() <= ROUNDINGS * torch.finfo(got.dtype).eps * scale).all())


def counted(function, *inputs):
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_flop_counts().get("Global", {})


def wanting_gradients(inputs):
    return each(inputs, lambda value: value.detach().clone().requires_grad_())


@ops
@dtypes
def test_op_equals_its_reference_in_float64(op, dtype):
    for inputs in op.samples(dtype):
        got = op(*inputs)
        assert got.dtype == dtype
        assert_near(got, op, inputs)


@ops
def test_op_gives_the_same_bits_with_and_without_recording_gradients(op):
    for inputs in op.samples(torch.float32):
        recorded = op(*each(inputs, lambda value: value.detach().requires_grad_()))  # where they lie, as they lie
        with torch.no_grad():
            assert torch.equal(op(*inputs), recorded)
        with torch.inference_mode():
            assert torch.equal(op(*inputs), recorded)


@ops
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch 2.14's own
def test_op_passes_opcheck(op):
    for inputs in op.samples(torch.float32):
        torch.library.opcheck(op.overload, wanting_gradients(inputs))


@ops
def test_gradients_of_op_are_those_of_finite_differences(op):
    for inputs in op.samples(torch.float64):
        wanting = wanting_gradients(inputs)
        assert torch.autograd.gradcheck(op, wanting)
        assert torch.autograd.gradgradcheck(op, wanting)


@ops
def test_each_input_alone_gets_the_gradient_it_gets_among_all(op):
    for inputs in op.samples(torch.float64):
        together = wanting_gradients(inputs)
        op(*together).square().sum().backward()
        for position, value in enumerate(inputs):
            if not is_float(value):
                continue
            alone = tuple(
                one.requires_grad_(i == position) if is_float(one) else one
                for i, one in enumerate(wanting_gradients(inputs))
            )
            op(*alone).square().sum().backward()
            assert torch.equal(alone[position].grad, together[position].grad)


@ops
def test_op_tells_shapes_of_tensors_without_data(op):
    for inputs in op.samples(torch.float32):
        without_data = tuple(value.to("meta") if isinstance(value, torch.Tensor) else value for value in inputs)
        assert op(*without_data).shape == op(*inputs).shape


@ops
def test_compiled_function_keeps_op_in_one_graph_and_gives_the_same(op):
    torch._dynamo.reset()  # it compiles one function for so many ops only
    inputs = op.samples(torch.float32)[0]
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda *values: op(*values) * 2, fullgraph=True, backend=keep)
    assert torch.equal(compiled(*inputs), op(*inputs) * 2)
    assert [node.target for node in graphs[0].graph.nodes].count(op.overload) == 1


@ops
def test_compiled_gradients_equal_eager_ones(op):
    torch._dynamo.reset()  # it compiles one function for so many ops only
    eager, compiled = (wanting_gradients(op.samples(torch.float64)[0]) for _ in range(2))
    op(*eager).square().sum().backward()
    torch.compile(lambda *values: op(*values).square().sum(), fullgraph=True, backend="aot_eager")(*compiled).backward()
    for one, other in zip(eager, compiled, strict=True):
        if is_float(one):
            torch.testing.assert_close(one.grad, other.grad)


class Call(torch.nn.Module):
    """A call of an op whose first input is the module's, and the others its own."""

    def __init__(self, op, others):
        super().__init__()
        self.op, self.others = op, others

    def forward(self, x):
        return self.op(x, *self.others)


@ops
@pytest.mark.parametrize("strict", [False, True])
def test_exported_op_is_standard_ops_with_equal_results(op, strict):
    inputs = op.samples(torch.float32)[0]
    program = torch.export.export(Call(op, inputs[1:]), inputs[:1], strict=strict)
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert {target.namespace for target in called} == {"aten"}
    assert_near(program.module()(inputs[0]), op, inputs)


@ops
@pytest.mark.parametrize("records", [False, True], ids=["no_grad", "grad"])
def test_traced_op_is_standard_ops_with_equal_results_and_no_warning(op, records):
    for inputs in op.samples(torch.float32):
        with warnings.catch_warnings(action="error"), torch.set_grad_enabled(records):
            warnings.filterwarnings("ignore", category=DeprecationWarning)  # TorchScript is
            traced = torch.jit.trace(Call(op, inputs[1:]), inputs[0], check_trace=False)
        assert "panther::" not in str(traced.inlined_graph)
        assert_near(traced(inputs[0]), op, inputs)


@ops
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_op_under_autocast_runs_in_its_dtype_as_linear_does(op, dtype):
    for inputs in op.samples(torch.float32):
        with torch.autocast("cpu", dtype=dtype):
            got = op(*inputs)
        assert torch.equal(got, op(*each(inputs, lambda value: value.to(dtype))))


@ops
def test_autocast_leaves_float64_alone(op):
    inputs = op.samples(torch.float64)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert op(*inputs).dtype == torch.float64


@ops
def test_gradients_flow_through_autocast_in_the_dtype_of_the_inputs(op):
    inputs = wanting_gradients(op.samples(torch.float32)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        op(*inputs).sum().backward()
    assert all(value.grad.dtype == torch.float32 for value in inputs if is_float(value))


@ops
def test_vmap_over_the_first_input_equals_a_loop(op):
    first, *others = op.samples(torch.float64)[0]
    stacked = torch.stack([first, first * 2, first - 1])
    mapped = torch.vmap(lambda value: op(value, *others))(stacked)
    torch.testing.assert_close(mapped, torch.stack([op(value, *others) for value in stacked]))


@ops
def test_gradients_per_sample_equal_a_loop(op):
    first, *others = op.samples(torch.float64)[0]
    stacked = torch.stack([first, first * 2])
    gradient = torch.func.grad(lambda value: op(value, *others).square().sum())
    torch.testing.assert_close(torch.vmap(gradient)(stacked), torch.stack([gradient(value) for value in stacked]))


forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")  # torch's own use of it


@ops
@forward_mode
@pytest.mark.parametrize("records", [True, False])
def test_forward_mode_carries_tangents_of_each_input_through_frozen_others(op, records):
    for inputs in op.samples(torch.float64):
        for position in [place for place, value in enumerate(inputs) if is_float(value)]:
            with forward_ad.dual_level(), torch.set_grad_enabled(records):
                dual = list(inputs)
                dual[position] = forward_ad.make_dual(inputs[position], torch.ones_like(inputs[position]))
                got = forward_ad.unpack_dual(op(*dual)).tangent
                wanted = forward_ad.unpack_dual(op.reference(*dual)).tangent
            assert got is not None and torch.equal(got, wanted)


@ops
@forward_mode
def test_forward_mode_inside_autocast_casts_as_the_op_does(op):
    first, *others = op.samples(torch.float32)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16), forward_ad.dual_level():
        dual = forward_ad.make_dual(first.bfloat16(), torch.ones_like(first).bfloat16())
        y, tangent = forward_ad.unpack_dual(op(dual, *others))
    assert y.dtype == tangent.dtype == torch.bfloat16 and bool(tangent.any())


@ops
@forward_mode
def test_backward_carries_tangents_of_the_gradient(op):
    inputs = wanting_gradients(op.samples(torch.float64)[0])
    y = op(*inputs)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.randn_like(y), torch.ones_like(y))
        (grad,) = torch.autograd.grad(y, inputs[0], dual, retain_graph=True)
        tangent = forward_ad.unpack_dual(grad).tangent
    torch.testing.assert_close(tangent, *torch.autograd.grad(y, inputs[0], torch.ones_like(y)))


@ops
def test_transforms_inside_autocast_cast_as_the_op_does(op):
    first, *others = op.samples(torch.float32)[0]
    stacked = torch.stack([first, first * 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mapped = torch.vmap(lambda value: op(value, *others))(stacked.bfloat16())
        gradient = torch.func.grad(lambda value: op(value, *others).float().sum())(first)
    assert mapped.dtype == torch.bfloat16 and gradient.dtype == torch.float32
    for got, value in zip(mapped, stacked, strict=True):
        assert_near(got, op, each((value, *others), lambda v: v.bfloat16()))


# Of rows (..., in), whose first input a layer is given.
LINEAR = {name: op for name, op in FUNCTIONS.items() if "linear" in name}
linear_ops = pytest.mark.parametrize("op", LINEAR.values(), ids=LINEAR)


@linear_ops
def test_what_no_gradient_needs_may_be_changed_in_place(op):
    for x, *others in op.samples(torch.float64):
        given = x.clone().requires_grad_()
        h = given * 1
        y = op(h, *others)
        h += 1
        y.square().sum().backward()
        again = x.clone().requires_grad_()
        op(again, *others).square().sum().backward()
        assert torch.equal(given.grad, again.grad)


@contextlib.contextmanager
def keeping():
    """Where the tensors lie that are kept for the backward."""
    kept = []

    def keep(tensor):
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


@linear_ops
@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 1), (1, 2), ()], ids=str)
def test_nothing_is_kept_that_no_gradient_needs(op, trained):
    """What a frozen F.linear keeps: nothing for the bias alone, and of the first input nothing for its own gradient."""
    for inputs in op.samples(torch.float64)[:3]:
        places = [place for place, value in enumerate(inputs) if is_float(value)]
        bias = op.overload._schema.arguments[places[-1]].name == "bias"
        weights = places[1 : len(places) - bias]
        wanted = [place for at, place in enumerate([0, *weights]) if at in trained]
        given = [
            value.clone().requires_grad_(i in wanted) if is_float(value) else value for i, value in enumerate(inputs)
        ]
        with keeping() as kept:
            y = op(*given)
        assert (given[0].data_ptr() in kept) == any(place in weights for place in wanted)
        if wanted:
            y.square().sum().backward()
            assert all((given[i].grad is not None) == (i in wanted) for i in places)


def without_features(name, size_in, out):
    """Inputs of an op without columns of x, or of y."""
    rank, x = 2, torch.randn(4, size_in, requires_grad=True)
    factors = torch.randn(rank, size_in), torch.randn(out, rank)
    if name == "low_rank_linear_int8":
        return x, *quantised(factors[0]), *quantised(factors[1]), torch.randn(out)
    if name == "low_rank_linear":
        return x, *factors, torch.randn(out)
    weight = torch.randn(out, size_in)
    return (x, *quantised(weight), torch.randn(out)) if name == "quantised_linear" else (x, weight, torch.randn(out))


@pytest.mark.parametrize("name", [name for name in LINEAR if name != "pivoted_linear"])  # whose rank is above 0
@pytest.mark.parametrize(("size_in", "out"), [(0, 5), (5, 0)])
def test_gradients_where_there_are_no_features(name, size_in, out):
    inputs = wanting_gradients(without_features(name, size_in, out))
    LINEAR[name](*inputs).sum().backward()
    for value in inputs:
        assert not is_float(value) or value.grad.shape == value.shape
    assert not inputs[0].grad.any()


@linear_ops
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested_tensors_are_their_parts(op, layout):
    for x, *others in op.samples(torch.float64):
        if x.dim() != 2 or not len(x):
            continue
        parts = [x.clone(), x[:1].clone() * 2]
        nested = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
        y = op(nested, *others)
        assert y.is_nested and y.layout == layout
        for got, part in zip(y.unbind(), parts, strict=True):
            torch.testing.assert_close(got, op(part, *others))
        y.values().sum().backward() if layout == torch.jagged else sum(part.sum() for part in y.unbind()).backward()
        for grad, part in zip(nested.grad.unbind(), parts, strict=True):
            alone = part.requires_grad_()
            torch.testing.assert_close(grad, *torch.autograd.grad(op(alone, *others).sum(), alone))


def copies(op, inputs):
    """The inputs with copies of those that an accumulating op changes."""
    arguments = op.overload._schema.arguments
    return [v.clone() if a.is_write and v is not None else v for v, a in zip(inputs, arguments, strict=True)]


def added_to(op, inputs):
    """Those of the inputs that an accumulating op changes."""
    arguments = op.overload._schema.arguments
    changed = [value for value, argument in zip(inputs, arguments, strict=True) if argument.is_write]
    return [value for value in changed if value is not None]


def assert_same_sums(op, one, other):
    assert all(map(torch.equal, added_to(op, one), added_to(op, other)))


@accumulating
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_accumulating_op_adds_what_its_reference_adds(op, dtype):
    for inputs in op.samples(dtype):
        own, known = copies(op, inputs), copies(op, inputs)
        assert op(*own) is None
        op.reference(*known)
        coarsest = max(torch.finfo(value.dtype).eps for value in inputs if is_float(value))
        for got, wanted in zip(added_to(op, own), added_to(op, known), strict=True):
            near = ROUNDINGS * coarsest * (1 + wanted.abs().amax() if wanted.numel() else 0)
            assert bool(((got - wanted).abs() <= near).all())
        assert any(value.numel() == 0 for value in inputs if is_float(value)) or not all(
            map(torch.equal, added_to(op, own), added_to(op, inputs))
        )


@accumulating
def test_accumulating_op_passes_opcheck(op):
    for inputs in op.samples(torch.float32):
        torch.library.opcheck(op.overload, tuple(copies(op, inputs)))


@accumulating
def test_accumulating_op_adds_into_views(op):
    for inputs in op.samples(torch.float32):
        own, rooms = copies(op, inputs), []
        for position, argument in enumerate(op.overload._schema.arguments):
            if argument.is_write and own[position] is not None:
                rooms.append(own[position].new_zeros(*own[position].shape, 2))
                rooms[-1][..., 0] = own[position]
                own[position] = rooms[-1][..., 0]
        op(*own)
        known = copies(op, inputs)
        op(*known)
        assert_same_sums(op, own, known)
        assert not any(room[..., 1].any() for room in rooms)


@accumulating
def test_accumulating_op_takes_tensors_without_data(op):
    for inputs in op.samples(torch.float32):
        assert op(*(value.to("meta") if isinstance(value, torch.Tensor) else value for value in inputs)) is None


@accumulating
def test_compiled_function_keeps_accumulating_op_in_one_graph_and_adds_the_same(op):
    def twice(*inputs):
        op(*inputs)
        op(*inputs)
        return inputs[0] * 2

    inputs = op.samples(torch.float32)[0]
    eager, compiled = copies(op, inputs), copies(op, inputs)
    expected = twice(*eager)
    assert torch.equal(torch.compile(twice, fullgraph=True, backend="aot_eager")(*compiled), expected)
    assert_same_sums(op, compiled, eager)


@accumulating
def test_accumulating_op_leaves_autocast_alone(op):
    inputs = op.samples(torch.float32)[0]
    own, known = copies(op, inputs), copies(op, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        op(*own)
    op(*known)
    assert_same_sums(op, own, known)


@every
def test_flops_of_op_are_counted_once_and_under_its_name(op):
    for inputs in op.samples(torch.float32):
        counts = counted(op, *inputs)
        assert list(counts) == [op.overload.overloadpacket]
        with torch.no_grad():
            assert counted(op, *inputs) == counts
        with torch.inference_mode():
            assert counted(op, *inputs) == counts
    assert sum(counted(op, *op.samples(torch.float32)[0]).values()) > 0


@ops
def test_flops_of_op_are_those_that_torch_counts_in_a_reference_made_of_products(op):
    for inputs in op.samples(torch.float32):
        wanted = counted(op.reference, *inputs)
        assert not wanted or sum(wanted.values()) == sum(counted(op, *wanting_gradients(inputs)).values())


@every
def test_dispatcher_has_the_kernel_that_build_info_names(op):
    info = build_info()
    if not info.compiled:
        assert info.kernels == ()
        pytest.skip(f"no compiled kernels here: {info.reason}")
    assert op.name in info.kernels
    assert op.has_kernel("cpu")
