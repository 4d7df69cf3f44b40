"""A model and example inputs in, a LayerSpec for every dense operation out, with the reasons why some must stay dense.

Three ways, tried in order, give the same answer: the FX graph of `torch.export` (ATen operations with parameter
owners), `torch.fx.symbolic_trace` run by its interpreter, and watching one real call. Each yields the uses of every
parameter; a layer can be sketched when all uses of its weight are its own forward.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import logging
import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from panther import chains
from panther.batches import Call, device_of, inference, run, unchanged
from panther.errors import CaptureError, one_line
from panther.followers import (
    ELEMENTWISE,
    ELEMENTWISE_MODULES,
    PAD_MODULES,
    PADS,
    POOL_MODULES,
    POOLS,
    Found,
    Role,
    before_relu,
    followers,
    pairs,
    rectified,
)
from panther.nn import SKMultiheadAttention
from panther.nn.narrow import NORMS, is_depthwise
from panther.nn.surgery import put_layers, with_layers
from panther.sizes import file_bytes, model_params
from panther.spec import Capture, LayerSpec
from panther.subclasses import plain_subclasses

DENSE: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
}
T = TypeVar("T")

MENTIONED = 0.01  # of a model: fewer numbers are not worth a note
LEFT_BEHIND = "a copy of the model still runs the original layer: a function or an object that keeps it is not copied"

_OPS = ("linear", "conv1d", "conv2d", "conv3d")
_PRODUCTS = ("addmm", "mm", "matmul", "rmatmul", "bmm", "baddbmm", "einsum")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_ALL = (*_OPS, *_PRODUCTS, *_TRANSPOSED)
# Parts, casts and reshapes of a parameter on its way into a product: what they feed is the use that counts.
_VIEWS = frozenset(
    [
        "t",
        "T",
        "mT",
        "H",
        "mH",
        "numpy_T",
        "data",
        "transpose",
        "permute",
        "movedim",
        "swapaxes",
        "detach",
        "alias",
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "unsqueeze",
        "squeeze",
        "contiguous",
        "clone",
        "expand",
        "narrow",
        "select",
        "slice",
        "getitem",
        "chunk",
        "split",
        "split_with_sizes",
        "unbind",
        "to",
        "to_copy",
        "float",
        "half",
        "bfloat16",
        "double",
    ]
)
_PROPERTIES: dict[Any, str] = {Tensor.T: "T", Tensor.mT: "mT", Tensor.H: "H", Tensor.mH: "mH", Tensor.data: "data"}


@dataclass(frozen=True)
class Use:
    """One operation that reads a parameter: which operation, inside which module, on what."""

    parameter: Tensor | None  # None: the weight of a dense operation is computed on the way
    op: str
    inside: str  # innermost module that was running
    input_key: str = ""
    input_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()

    @property
    def is_dense(self) -> bool:
        """Whether a matrix or a kernel is multiplied with something here (the bias of addmm is not)."""
        return self.op in _ALL and (self.parameter is None or self.parameter.dim() >= 2)


@dataclass(frozen=True)
class Reading:
    """What one way to read a model found: every use of a weight, and where it sees a graph what lies behind layers."""

    uses: list[Use]
    pairs: list[Found] = field(default_factory=list)
    rectified: list[tuple[str, str]] = field(default_factory=list)


def capture(model: nn.Module, example: Call) -> Capture:
    """Every dense operation of the model, in execution order.

    Raises: CaptureError when the model cannot run on the example inputs, or is of a kind that hides its layers.
    """
    refuse_opaque(model)
    with inference(model), _same_random_numbers(model):
        try:
            with unchanged(model):
                run(model, example)
        except Exception as error:
            shapes = ", ".join(str(tuple(t.shape)) for t in example.tensors()) or "none"
            raise CaptureError(
                f"{type(model).__name__} does not run on the example inputs (shapes {shapes}): "
                f"{type(error).__name__}: {_first_line(error)}. Give example_inputs as the model's forward takes them."
            ) from error
        way, reading, notes = _first_way_that_works(model, example)
        with unchanged(model):
            plain = plain_subclasses(model, example, tuple(DENSE))
        layers = tuple(_specs(model, reading.uses, plain))
        dims = {use.inside: len(use.output_shape) for use in reading.uses}
        neighbours = tuple(followers(model, reading.pairs, layers, dims))
        offered = [spec.name for spec in layers if not spec.blockers]
        left = left_behind(model, example, [*offered, *(name for pair in neighbours for name in pair.between)])
    layers = tuple(replace(s, blockers=(*s.blockers, LEFT_BEHIND)) if s.name in left else s for s in layers)
    return Capture(
        way=way,
        layers=layers,
        model_params=model_params(model),
        model_bytes=file_bytes(model),
        notes=tuple(notes),
        followers=tuple(p for p in neighbours if left.isdisjoint((p.producer, p.consumer, *p.between))),
        rectified=tuple(before_relu(model, reading.rectified, layers, dims)),
    )


def left_behind(model: nn.Module, example: Call, names: Iterable[str]) -> frozenset[str]:
    """Modules that a copy of the model runs less often in its own: what refers to the others is not copied.

    A function that keeps the model is such a thing, and so is an object that only the model's own attributes lead to.
    They are exchanged as compress does it, by modules that compute the same: while the model is copied, then in place.

    Raises: CaptureError when the copy cannot be made, or does not run.
    """
    own = {name: model.get_submodule(name) for name in names if name}
    if not own:
        return frozenset()
    with unchanged(model):
        wanted = _runs(model, example, own)
        first = {name: _twin(module) for name, module in own.items()}
        other = with_layers(model, first)
        try:
            found = _runs(other, example, first)
            second = {name: _twin(module) for name, module in first.items()}
            put_layers(other, second)
            again = _runs(other, example, second)
        except Exception as error:
            raise CaptureError(
                f"a copy of this {type(model).__name__} does not run ({one_line(error)}), and panther works on copies"
            ) from error
    return frozenset(name for name in own if min(found[name], again[name]) < wanted[name])


def _runs(model: nn.Module, example: Call, modules: Mapping[str, nn.Module]) -> Counter[str]:
    """How often each of these modules runs in one call of the model, which is as before afterwards."""
    runs: Counter[str] = Counter()
    hooks = [m.register_forward_pre_hook(lambda *_, name=name: runs.update([name])) for name, m in modules.items()]
    try:
        with unchanged(model):
            run(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return runs


def _twin(module: nn.Module) -> nn.Module:
    """Another module of this class with the same attributes, and the same numbers."""
    twin = type(module).__new__(type(module))
    vars(twin).update(vars(module))
    return twin


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else "no message"


def refuse_opaque(model: nn.Module) -> None:
    """Raise CaptureError for a model of a kind that hides its layers."""
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("a TorchScript model hides its layers: pass the Python module that it was made from")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise CaptureError(
            f"this model is in {type(model).__name__}, which spreads calls over devices: pass model.module, and wrap "
            "the result"
        )
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            where = repr(name) if name else "this model"
            raise CaptureError(f"{where} is compiled: pass the module before torch.compile, and compile the result")
    lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
    if lazy:
        raise CaptureError(f"{lazy[0]!r} has no shape yet (a lazy module): run the model once, then compress it")


def _same_random_numbers(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """A forward that draws random numbers leaves the generators of its device as they were."""
    device = device_of(model)
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _first_way_that_works(model: nn.Module, example: Call) -> tuple[str, Reading, list[str]]:
    notes: list[str] = []
    for way, watch in WAYS.items():
        try:
            with unchanged(model), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # tracers' advice is about tracing; the trial run has warned already
                return way, watch(model, example), notes
        except Exception as error:  # tracers raise whatever they like; the next way is the handler
            notes.append(f"{way} did not work ({type(error).__name__}: {_first_line(error)})")
    raise CaptureError("the model ran, but none of the three ways to read its layers worked: " + "; ".join(notes))


# --- the three ways ------------------------------------------------------------------------------------------------


def by_export(model: nn.Module, example: Call) -> Reading:
    """Uses read from the ATen graph of torch.export: every parameter is a placeholder with its owner's name."""
    moved = example.to(device_of(model))
    with _quiet_logs():
        program = torch.export.export(model, moved.args, dict(moved.kwargs), strict=False)
    names = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    owners = dict(model.named_parameters(remove_duplicate=False))
    uses: list[Use] = []
    holders: dict[fx.Node, Tensor] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            parameter = owners.get(names.get(node.name, ""))
            if parameter is not None:
                holders[node] = parameter
        elif node.op == "call_function":
            uses.extend(_node_uses(node, holders))
    role_of = functools.partial(_exported_role, names)
    return Reading(uses, pairs(program.graph, role_of), rectified(program.graph, role_of))


def _exported_role(names: Mapping[str, str], node: fx.Node) -> Role:
    """What a node of an exported graph is to the search for neighbours; `names` are those of parameters and buffers."""
    op = _plain_name(node.target)
    if node.op != "call_function":
        return Role("")
    if op == "assert_tensor_metadata":
        return Role("nothing")
    if op in _OPS and isinstance(node.args[1], fx.Node):
        owner, _, tensor = names.get(node.args[1].name, "").rpartition(".")
        kind = "depthwise" if _is_depthwise(node) else "dense"
        return Role(kind if tensor == "weight" else "", owner, dims=_kernel_dims(op))
    if op == "batch_norm":
        return Role("norm", _inside(node))
    return _function_role(op, node)


def _is_depthwise(node: fx.Node) -> bool:
    given, weight = (_meta_shape(arg) for arg in node.args[:2])
    dims = len(weight) - 2
    return dims > 0 and weight[1] == 1 < weight[0] == given[-1 - dims]


def _kernel_dims(op: str) -> int:
    return int(op[4]) if op.startswith("conv") else 0


def _function_role(op: str, node: fx.Node) -> Role:
    """What an operation without numbers of its own is to the search."""
    inside = _inside(node)
    if op in ELEMENTWISE:
        return Role("elementwise", inside, is_relu=op == "relu")
    if op in POOLS:
        return Role("pool", inside, dims=POOLS[op])
    if op in PADS:
        amounts = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad")
        return Role("pad", inside, dims=len(amounts) // 2 if isinstance(amounts, tuple | list) else 0)
    return Role("", inside)


def _inside(node: fx.Node) -> str:
    """The innermost module that was running."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return re.sub(r"@\d+", "", stack[-1][0]) if stack else ""


@contextlib.contextmanager
def _quiet_logs() -> Iterator[None]:
    """The exporter logs and prints the whole graph when it gives up; the note of `capture` says why in one line."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _node_uses(node: fx.Node, holders: dict[fx.Node, Tensor]) -> Iterator[Use]:
    op, operands = _plain_name(node.target), node.all_input_nodes
    weight = node.args[1] if op in _OPS else None
    if op == "assert_tensor_metadata":  # the exporter's note beside a cast; it reads no numbers
        return
    holds_a_graph = isinstance(node.target, HigherOrderOperator)
    for index, operand in enumerate(operands):
        parameter = holders.get(operand)
        if parameter is None and operand is not weight:
            continue
        if holds_a_graph:  # no_grad, autocast or cond in a forward
            raise ValueError(f"a layer is inside {op}, whose graph is apart")
        if parameter is not None and index == 0 and op in _VIEWS:
            holders[node] = parameter
            continue
        source = _other_operand(operands, index)
        yield Use(
            parameter,
            op if operand is weight or op not in _OPS else "argument of " + op,
            _inside(node),
            source.name if source is not None else "",
            _meta_shape(source),
            _meta_shape(node),
        )


def _other_operand(operands: Sequence[T], index: int) -> T | None:
    """What a weight is multiplied with: the operand before it, or after it where the weight comes first."""
    return operands[index - 1] if index else next(iter(operands[1:]), None)


def _plain_name(target: Any) -> str:
    """The operation's name, the same for an ATen overload, a function and an operator."""
    return str(getattr(target, "__name__", target)).split(".")[0].strip("_")


def _meta_shape(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(int(n) for n in value.shape) if isinstance(value, Tensor) else ()


class _LeafTracer(fx.Tracer):
    """Traces through the user's own modules; torch's (attention, transformer layers) run as they are, and watched."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        has_children = any(True for _ in m.children())
        return (
            not has_children
            or isinstance(m, SKMultiheadAttention)
            or (type(m).__module__.startswith("torch.nn.") and not isinstance(m, nn.Sequential))
        )


class _WatchedInterpreter(fx.Interpreter):
    """Runs a traced graph and tells the watcher which module a node is from, and which node made which tensor."""

    def __init__(self, module: fx.GraphModule, watcher: _Watcher) -> None:
        super().__init__(module)
        self.watcher = watcher

    def run_node(self, n: fx.Node) -> Any:
        stack = list(n.meta.get("nn_module_stack", {}).values())
        with self.watcher.inside(stack[-1][0] if stack else ""):
            result = super().run_node(n)
        if isinstance(result, Tensor):
            self.watcher.keys[result] = n.name
        return result


def by_symbolic_trace(model: nn.Module, example: Call) -> Reading:
    """Uses seen while the interpreter runs the graph of torch.fx.symbolic_trace."""
    if "forward" in model.__dict__ or model._forward_hooks or model._forward_pre_hooks:
        raise ValueError("hooks on the whole model, or a forward of its own, would be left out of a symbolic trace")
    moved = example.to(device_of(model))
    signature = inspect.signature(model.forward)
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature.parameters.values()):
        raise ValueError("*args and **kwargs have no order in a symbolic trace")
    bound = signature.bind(*moved.args, **moved.kwargs)
    bound.apply_defaults()
    fixed = {n: value for n, value in bound.arguments.items() if not isinstance(value, Tensor | tuple | list | dict)}
    graph = fx.GraphModule(model, _LeafTracer().trace(model, fixed))
    with _Watcher(model) as watcher:
        _WatchedInterpreter(graph, watcher).run(*bound.arguments.values())
    role_of = functools.partial(_traced_role, model)
    return Reading(watcher.uses, pairs(graph.graph, role_of), rectified(graph.graph, role_of))


def _traced_role(model: nn.Module, node: fx.Node) -> Role:
    """What a node of a symbolic trace is to the search for neighbours."""
    if node.op == "call_module":
        name = str(node.target)
        module = model.get_submodule(name)
        for dense, of in DENSE.items():
            if isinstance(module, dense):
                plain = type(module) is dense  # what a subclass does besides is not seen here
                return Role("depthwise" if plain and is_depthwise(module) else "dense", name, dims=_kernel_dims(of))
        for kind, known in (("pool", POOL_MODULES), ("pad", PAD_MODULES)):
            if type(module) in known:
                return Role(kind, name, dims=known[type(module)])
        kind = "norm" if type(module) in NORMS else "elementwise" if type(module) in ELEMENTWISE_MODULES else ""
        return Role(kind, name, type(module) is nn.ReLU)
    if node.op not in ("call_function", "call_method"):
        return Role("", _inside(node))
    return _function_role(_plain_name(node.target), node)


def by_observation(model: nn.Module, example: Call) -> Reading:
    """Uses seen during one real call; what an untaken branch would use is not seen."""
    with _Watcher(model) as watcher:
        run(model, example)
    return Reading(watcher.uses)


WAYS: dict[str, Callable[[nn.Module, Call], Reading]] = {
    "torch.export": by_export,
    "torch.fx": by_symbolic_trace,
    "observation": by_observation,
}


class _Watcher(TorchFunctionMode):
    """Sees every torch function that is called, and which module is running."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.uses: list[Use] = []
        self.keys: Any = WeakTensorKeyDictionary()
        self.views: Any = WeakTensorKeyDictionary()
        self._parameters = {id(p) for p in model.parameters()}
        self._modules = {module: name for name, module in model.named_modules()}
        self._running: list[str] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for module, name in self._modules.items():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks, and what is in it cannot be replaced
                continue
            self._hooks.append(module.register_forward_pre_hook(self._enter_module(name), prepend=True))
            self._hooks.append(module.register_forward_hook(self._leave_module, always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]  # torch leaves it without annotations
        return self

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]  # as above
        for hook in self._hooks:
            hook.remove()

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """What runs here belongs to the module of this name."""
        self._running.append(name)
        try:
            yield
        finally:
            self._running.pop()

    def _enter_module(self, name: str) -> Callable[[nn.Module, Any], None]:
        return lambda _module, _args: self._running.append(name)

    def _leave_module(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        op = _plain_name(func)
        if op == "get":  # an attribute; only those that hold the numbers matter
            op = _PROPERTIES.get(getattr(func, "__self__", None), "")
        if op == "multi_head_attention_forward":  # one Python function for the watcher, several products inside
            self.uses.extend(self._attention_uses(inspect.signature(func).bind(*args, **(kwargs or {})).arguments))
        elif op:
            self._note(op, args, kwargs or {}, result)
        return result

    def _note(self, op: str, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        operands = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
        weight = (args[1] if len(args) > 1 else kwargs.get("weight")) if op in _OPS else None
        for index, operand in enumerate(operands):
            parameter = self._parameter(operand)
            if parameter is None and operand is not weight:
                continue
            if parameter is not None and index == 0 and op in _VIEWS:
                self.views.update(dict.fromkeys(_tensors(result), parameter))
                continue
            source = _other_operand(operands, index)
            named = op if operand is weight or op not in _OPS else "argument of " + op
            self.uses.append(self._use(parameter, named, source, _shape(result)))

    def _use(self, parameter: Tensor | None, op: str, source: Tensor | None, output_shape: tuple[int, ...]) -> Use:
        inside = self._running[-1] if self._running else ""
        return Use(parameter, op, inside, self._key(source), _shape(source), output_shape)

    def _attention_uses(self, given: dict[str, Any]) -> Iterator[Use]:
        """The products of F.multi_head_attention_forward: the in-projections of what differs, the out-projection."""
        query, key, value = given["query"], given["key"], given["value"]
        width = query.shape[-1]
        if given.get("use_separate_proj_weight", False):
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            parts = [(given[name], source, width) for name, source in zip(names, (query, key, value), strict=True)]
        else:
            parts = [(given["in_proj_weight"], source, n * width) for source, n in _packed(query, key, value)]
        for weight, source, outputs in parts:
            batched = source.shape if source.dim() == 3 else (source.shape[0], 1, source.shape[1])
            if self._parameter(weight) is not None:
                yield self._use(self._parameter(weight), "linear", source, (*batched[:-1], outputs))
        flat = (math.prod(query.shape[:-1]), width)
        if self._parameter(given["out_proj_weight"]) is not None:
            yield replace(self._use(self._parameter(given["out_proj_weight"]), "linear", None, flat), input_shape=flat)

    def _parameter(self, tensor: Tensor) -> Tensor | None:
        if id(tensor) in self._parameters:
            return tensor
        found: Tensor | None = self.views.get(tensor)
        return found

    def _key(self, tensor: Tensor | None) -> str:
        if tensor is None:
            return ""
        if tensor not in self.keys:
            self.keys[tensor] = f"tensor_{len(self.keys)}_{len(self.uses)}"
        # A tensor of inference mode does not tell when it was changed: each of its readers has a key of its own.
        version = len(self.uses) if tensor.is_inference() else tensor._version
        return f"{self.keys[tensor]}.{version}"


def _packed(query: Tensor, key: Tensor, value: Tensor) -> list[tuple[Tensor, int]]:
    """What one packed in-projection is applied to, and how many of its three parts each time."""
    if key is not value:
        return [(query, 1), (key, 1), (value, 1)]
    return [(query, 3)] if query is key else [(query, 1), (key, 2)]


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, tuple | list):
        return [t for value in values for t in _tensors(value)]
    return []


# --- from uses to layers -------------------------------------------------------------------------------------------


def _specs(model: nn.Module, uses: list[Use], plain: frozenset[nn.Module]) -> Iterator[LayerSpec]:
    """LayerSpecs in execution order, then the dense layers that were never reached."""
    owners = _owners(model, plain)
    by_weight: dict[int, list[Use]] = defaultdict(list)
    for use in uses:
        by_weight[owners.key(use)].append(use)
    done: set[int] = set()
    for use in uses:
        key = owners.key(use)
        if key not in done and use.is_dense:
            done.add(key)
            yield from _weight_specs(owners, by_weight[key])
    for module, names in owners.modules.items():
        if not isinstance(module, tuple(DENSE)):
            continue
        weight = module._parameters.get("weight")
        key = id(module if weight is None else weight)
        if key not in done:
            reasons = _blockers(owners, module, weight, by_weight[key])
            unused = "not used when the model runs on the example inputs"
            yield _module_spec(module, names, [], (unused, *reasons))


@dataclass(frozen=True)
class _Owners:
    """Who owns what: a module's names, and a parameter's names, tied and shared ones together."""

    modules: dict[nn.Module, tuple[str, ...]]
    by_name: dict[str, nn.Module]
    parameters: dict[int, tuple[str, ...]]
    plain: frozenset[nn.Module]  # of a class with its own forward that does what the plain layer's does

    def key(self, use: Use) -> int:
        """Equal for the uses of one weight; a computed one belongs to the module that it is used in."""
        return id(self.by_name.get(use.inside) if use.parameter is None else use.parameter)


def _owners(model: nn.Module, plain: frozenset[nn.Module]) -> _Owners:
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    parameters: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameters[id(parameter)].append(name)
    return _Owners(
        {module: tuple(found) for module, found in names.items()},
        {name: module for module, found in names.items() for name in found},
        {key: tuple(found) for key, found in parameters.items()},
        plain,
    )


def _weight_specs(owners: _Owners, uses: list[Use]) -> Iterator[LayerSpec]:
    """One spec for a layer module that runs this weight, or one for its use as a bare parameter."""
    weight = uses[0].parameter
    callers = [owners.by_name.get(use.inside) for use in uses]
    dense = [m for m in dict.fromkeys(callers) if m is not None and isinstance(m, tuple(DENSE))]
    if weight is not None:
        dense = [module for module in dense if module._parameters.get("weight") is weight]
    for module in dense:
        own = [use for use, caller in zip(uses, callers, strict=True) if caller is module and use.is_dense]
        if own:
            yield _module_spec(module, owners.modules[module], own, _blockers(owners, module, weight, uses))
    if not dense and weight is not None:
        yield _functional_spec(owners, weight, [use for use in uses if use.is_dense])


def _blockers(owners: _Owners, module: nn.Module, parameter: Tensor | None, uses: list[Use]) -> tuple[str, ...]:
    """Everything that speaks against replacing this layer."""
    reasons = []
    kind = type(module).__bases__[0] if is_parametrized(module) else type(module)
    if kind not in DENSE and module not in owners.plain:
        base = next(known for known in DENSE if isinstance(module, known))
        reasons.append(f"{kind.__name__} is a subclass of {base.__name__} whose own forward may do more")
    if "forward" in module.__dict__:
        reasons.append("its forward was replaced on the instance")
    made = [n for n in ("weight", "bias") if getattr(module, n, None) is not None and n not in module._parameters]
    if made:
        reasons.append(
            f"its {' and '.join(made)} is computed from others (weight norm, a parametrisation or pruning): make it "
            "one tensor first, with remove_parametrizations, remove_weight_norm or prune.remove of torch.nn.utils"
        )
    names = owners.modules[module]
    tied = [name for name in owners.parameters.get(id(parameter), ()) if name.rpartition(".")[0] not in names]
    if tied:
        reasons.append("tied to " + ", ".join(tied))
    foreign = Counter(
        f"{use.op} in {use.inside or 'the model itself'}"
        for use in uses
        if owners.by_name.get(use.inside) is not module or use.op not in _OPS
    )
    if foreign and not tied:
        reasons.append("its weight is also used by " + ", ".join(foreign))
    if parameter is not None and not parameter.is_floating_point():
        reasons.append(f"its weight is {str(parameter.dtype).removeprefix('torch.')}, not floating point")
    groups = getattr(module, "groups", 1)
    if groups != 1:
        reasons.append(_grouped_reason(module, groups))
    return tuple(reasons)


def _grouped_reason(module: Any, groups: int) -> str:
    inputs = module.in_channels // groups
    if inputs == 1:
        return "a depthwise convolution has one input a group: no rank pays"
    return f"groups={groups} leaves {inputs} inputs each; grouped convolutions are not sketched"


def _module_spec(module: Any, names: tuple[str, ...], uses: list[Use], blockers: tuple[str, ...]) -> LayerSpec:
    kind = next(name for known, name in DENSE.items() if isinstance(module, known))
    is_linear = kind == "linear"
    outputs = int(module.out_features if is_linear else module.out_channels)
    weight: Tensor = module.weight
    spec = LayerSpec(
        name=names[0],
        kind=kind,
        in_features=int(module.in_features if is_linear else module.in_channels),
        out_features=outputs,
        rows=sum(math.prod(use.output_shape) // max(1, outputs) for use in uses),
        calls=len(uses),
        kernel_size=() if is_linear else tuple(module.kernel_size),
        stride=() if is_linear else tuple(module.stride),
        padding=() if is_linear else _padding(module),
        dilation=() if is_linear else tuple(module.dilation),
        groups=1 if is_linear else int(module.groups),
        padding_mode="zeros" if is_linear else module.padding_mode,
        has_bias=module.bias is not None,
        dtype=str(weight.dtype).removeprefix("torch."),
        input_shape=_batched(uses[0].input_shape, kind) if uses else (),
        output_shape=_batched(uses[0].output_shape, kind) if uses else (),
        input_key=uses[0].input_key if len(uses) == 1 else "",
        aliases=names[1:],
        blockers=blockers,
    )
    reason = chains.no_rank_pays(spec) if not blockers else None
    return LayerSpec(**{**spec.__dict__, "blockers": (reason,)}) if reason else spec


def in_no_layer(model: nn.Module, layers: Iterable[LayerSpec]) -> Iterator[str]:
    """A note where much of a model is in what is no layer here: recurrent layers, embeddings."""
    known = {name for spec in layers for name in (spec.name, *spec.aliases)}
    counted: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path = name.split(".")
        if any(".".join(path[:i]) in known for i in range(len(path) + 1)):
            counted.add(id(parameter))
    left: Counter[str] = Counter()
    for module in model.modules():
        for own in module._parameters.values():
            if own is not None and own.dim() > 1 and id(own) not in counted:
                counted.add(id(own))
                left[type(module).__name__] += own.numel()
    numbers, whole = left.total(), model_params(model)
    if numbers and numbers >= MENTIONED * whole:
        parts = ", ".join(f"{kind} {count:,}" for kind, count in left.most_common(4))
        yield f"{numbers:,} of the {whole:,} numbers are in no layer that panther knows and stay as they are: {parts}"


def _padding(module: Any) -> tuple[int, ...] | str:
    return module.padding if isinstance(module.padding, str) else tuple(module.padding)


def _batched(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """A convolution's shape with the batch dimension that unbatched inputs leave out."""
    dims = 0 if kind == "linear" else int(kind[4]) + 2
    return (1, *shape) if dims and len(shape) == dims - 1 else shape


def _functional_spec(owners: _Owners, weight: Tensor, uses: list[Use]) -> LayerSpec:
    """A dense operation on a bare parameter (attention's in_proj, F.linear(x, self.w), Conv1D of GPT-2)."""
    use = uses[0]
    names = owners.parameters.get(id(weight), ("?",))
    owner = owners.by_name.get(use.inside)
    where = f"{use.inside} ({type(owner).__name__})" if use.inside and owner is not None else "the model itself"
    transposed = use.op in _TRANSPOSED
    reason = f"used as a bare parameter: {use.op} in {where}"
    outputs, inputs = _sides(weight, use)
    positions = sum(math.prod(u.input_shape if transposed else u.output_shape) for u in uses)
    return LayerSpec(
        name=names[0],
        kind="linear" if use.op in _PRODUCTS else use.op,
        in_features=inputs,
        out_features=outputs,
        rows=positions // max(1, inputs if transposed else outputs),
        calls=len(uses),
        kernel_size=() if use.op in _PRODUCTS else tuple(weight.shape[2:]),
        has_bias=False,
        dtype=str(weight.dtype).removeprefix("torch."),
        input_shape=use.input_shape,
        output_shape=use.output_shape,
        aliases=names[1:],
        blockers=("transposed convolutions are not sketched" if transposed else reason,),
    )


def _sides(weight: Tensor, use: Use) -> tuple[int, int]:
    """Outputs and inputs of a bare weight; a product may have it on either side and transposed."""
    if use.op in _TRANSPOSED:
        return int(weight.shape[1]), int(weight.shape[0])
    if use.op in _OPS:
        return int(weight.shape[0]), int(weight.shape[1])
    outputs = next((n for n in reversed(weight.shape) if use.output_shape[-1:] == (n,)), weight.shape[0])
    return int(outputs), weight.numel() // max(1, int(outputs))
