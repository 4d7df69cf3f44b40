"""A torch.export archive (.pt2), read as a module whose dense products are layers again.

An exported program is a graph of torch's operations over parameters that have kept their names. A product with such a
parameter becomes the nn.Linear or nn.Conv that it was exported from, or could have been; all else stays an operation.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from panther.converters.weights import ModelSource
from panther.errors import LoadError, one_line

EXAMPLE = "example_inputs"  # key of a module's `meta`: the arguments and keyword arguments that it was exported with

_ATEN = torch.ops.aten
_CONVS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONV_OPS = frozenset(
    {
        *(_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default, _ATEN.convolution.default),
        *(_ATEN.conv1d.padding, _ATEN.conv2d.padding, _ATEN.conv3d.padding),
    }
)
_LINEAR_OPS = frozenset({_ATEN.linear.default, _ATEN.addmm.default, _ATEN.mm.default})
_NAMES: dict[tuple[Any, str], str] = {
    (_ATEN.addmm.default, "self"): "bias",
    (_ATEN.addmm.default, "mat1"): "input",
    (_ATEN.addmm.default, "mat2"): "weight",
    (_ATEN.mm.default, "self"): "input",
    (_ATEN.mm.default, "mat2"): "weight",
}
# Where an operation says that it is in training, by the name of the argument.
_TRAINING = {
    _ATEN.dropout.default: "train",
    _ATEN.batch_norm.default: "training",
    _ATEN.native_dropout.default: "train",
}


def read(path: Path | str, *, model: ModelSource | None = None, trust_pickle: bool = False) -> nn.Module:
    """The model of a .pt2 file, in eval mode; `model` is not needed, for the program is the architecture.

    The inputs that it was exported with are in its `meta` (see `example_inputs_of`). It takes the sizes that it was
    exported for: those with dynamic_shapes may vary.

    Raises: LoadError when the file is not trusted or damaged, was written by another version of torch that this one
        does not read, or was exported in training mode.
    """
    path = Path(path)
    if model is not None:
        raise LoadError(
            f"{path} is a torch.export archive, which holds the architecture: leave model= (--model) out, or give a "
            "file of weights instead of the archive"
        )
    if not trust_pickle:
        raise LoadError(
            f"{path} is a torch.export archive, and torch evaluates text and may unpickle objects in it: that could "
            "run code. If you trust its source, pass --trust-pickle (trust_pickle=True)."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about its own format
            program = torch.export.load(path)
    except Exception as error:  # torch raises whatever comes first in a damaged file
        raise LoadError(
            f"{path} cannot be read as a torch.export archive by torch {torch.__version__}: {one_line(error)}. Copy it "
            "again, or export the model again with this version."
        ) from error
    return module_of(program, str(path))


def module_of(program: torch.export.ExportedProgram, source: str = "the program") -> nn.Module:
    """An exported program as a module in eval mode, its dense products as layers; its parameters are the program's.

    Raises: LoadError when it was exported in training mode.
    """
    exported = program.module()
    _refuse_training(exported.graph.nodes, source)
    made = fx.GraphModule(exported, exported.graph)
    layers: dict[_Product, str] = {}
    for node in list(made.graph.nodes):
        node.meta.pop("nn_module_stack", None)  # modules that are no more
        product = _product(node)
        if product is None or not _is_of_a_layer(made, product):
            continue
        if product not in layers:
            layers[product] = _add_layer(made, product)
        with made.graph.inserting_before(node):
            node.replace_all_uses_with(made.graph.call_module(layers[product], (_operands(node)["input"],)))
        made.graph.erase_node(node)
    made.graph.eliminate_dead_code()
    _forget_unread(made, layers.values())
    made.recompile()
    if program.example_inputs is not None:
        made.meta[EXAMPLE] = program.example_inputs
    return made.eval()


def example_inputs_of(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments that the program of a model from `read` was exported with; None of any other model."""
    meta = getattr(model, "meta", None)
    return meta.get(EXAMPLE) if isinstance(meta, Mapping) else None


@dataclass(frozen=True)
class _Product:
    """A product with a parameter: names of the weight and the bias, and what a convolution does with them.

    geometry: stride, padding, dilation and groups; None of a linear layer.
    """

    weight: str
    bias: str | None
    geometry: tuple[Any, ...] | None


def _refuse_training(nodes: Iterable[fx.Node], source: str) -> None:
    found = [node for node in nodes if node.target in _TRAINING and _operands(node).get(_TRAINING[node.target])]
    if found:
        raise LoadError(
            f"{source} was exported in training mode ({found[0].name} and {len(found) - 1} more operations would draw "
            "random numbers or take statistics of the batch): export model.eval() instead"
        )


def _operands(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operation by their names, those of products as nn.Linear has them, with their defaults."""
    schema = cast(Any, node.target)._schema.arguments
    given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    given |= {argument.name: value for argument, value in zip(schema, node.args, strict=False)} | dict(node.kwargs)
    return {_NAMES.get((node.target, str(name)), str(name)): value for name, value in given.items()}


def _product(node: fx.Node) -> _Product | None:
    """What a node multiplies with; None where it is no product, or not one with a parameter as it is."""
    if node.op != "call_function" or node.target not in {*_LINEAR_OPS, *_CONV_OPS}:
        return None
    given = _operands(node)
    weight, bias = given["weight"], given.get("bias")
    if node.target in (_ATEN.addmm.default, _ATEN.mm.default):  # what decompositions make of a linear layer
        weight = _transposed(weight)
    is_scaled = given.get("alpha", 1) != 1 or given.get("beta", 1) != 1
    if not _is_parameter(weight) or not (bias is None or _is_parameter(bias)) or given.get("transposed") or is_scaled:
        return None
    names = weight.target, None if bias is None else bias.target
    if node.target in _LINEAR_OPS:
        return _Product(*names, None)
    padding = given["padding"]
    sizes = (tuple(given["stride"]), padding if isinstance(padding, str) else tuple(padding), tuple(given["dilation"]))
    return _Product(*names, (*sizes, int(given["groups"])))


def _is_of_a_layer(made: fx.GraphModule, product: _Product) -> bool:
    """Whether a layer can have this weight and this bias: functions take others, too."""
    weight = _parameter(made, product.weight)
    dims = (2,) if product.geometry is None else tuple(2 + axes for axes in _CONVS)
    has_bias = product.bias is None or _parameter(made, product.bias).shape == weight.shape[:1]
    return weight.is_floating_point() and weight.dim() in dims and has_bias


def _transposed(node: Any) -> Any:
    """The matrix that a node is the transpose of; None where it is none."""
    is_node = isinstance(node, fx.Node)
    if is_node and (
        node.target is _ATEN.t.default or (node.target is _ATEN.permute.default and node.args[1] == [1, 0])
    ):
        return node.args[0]
    return None


def _is_parameter(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _add_layer(made: fx.GraphModule, product: _Product) -> str:
    """Put the layer of a product into the module, in the place of what held its parameters where that is possible."""
    weight = _parameter(made, product.weight)
    bias = None if product.bias is None else _parameter(made, product.bias)
    layer = _layer(weight, bias is not None, product.geometry)
    layer.weight, layer.bias = _trainable(weight), None if bias is None else _trainable(bias)
    owner = product.weight.rpartition(".")[0]
    if not _held_alone(made, owner, product):
        owner = product.weight.replace(".", "_") + "_layer"
        while hasattr(made, owner):
            owner += "_"
    made.add_submodule(owner, layer.eval())
    return owner


def _held_alone(made: fx.GraphModule, owner: str, product: _Product) -> bool:
    """Whether a module of the program holds this weight and bias, as a layer does, and nothing else."""
    names = {product.weight, product.bias} - {None}
    if not owner or not names <= {f"{owner}.weight", f"{owner}.bias"}:
        return False
    module = made.get_submodule(owner)
    held = {f"{owner}.{name}" for name in (*dict(module.named_parameters()), *dict(module.named_buffers()))}
    return type(module) is nn.Module and held == names


def _forget_unread(made: fx.GraphModule, layers: Iterable[str]) -> None:
    """Take out what no operation reads: parameters that layers have now, also under their other names."""
    read_by_operations = {node.target for node in made.graph.nodes if node.op == "get_attr"}
    inside = tuple(f"{name}." for name in layers)
    for name in [
        *dict(made.named_parameters(remove_duplicate=False)),
        *dict(made.named_buffers(remove_duplicate=False)),
    ]:
        if name not in read_by_operations and not name.startswith(inside):
            owner, _, attribute = name.rpartition(".")
            delattr(made.get_submodule(owner), attribute)


def _parameter(made: fx.GraphModule, name: str) -> Tensor:
    found: Tensor = operator.attrgetter(name)(made)
    return found


def _trainable(found: Tensor) -> nn.Parameter:
    """A buffer as the parameter that a layer has."""
    return found if isinstance(found, nn.Parameter) else nn.Parameter(found, requires_grad=False)


def _layer(weight: Tensor, has_bias: bool, geometry: Sequence[Any] | None) -> Any:
    """A layer of this weight's sizes without numbers."""
    if geometry is None:
        return nn.Linear(weight.shape[1], weight.shape[0], has_bias, device="meta")
    stride, padding, dilation, groups = geometry
    dims = weight.dim() - 2

    def each(sizes: Any) -> Any:
        return sizes * dims if not isinstance(sizes, str) and len(sizes) == 1 else sizes

    kind: Any = _CONVS[dims]
    return kind(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        each(stride),
        each(padding),
        each(dilation),
        groups,
        has_bias,
        device="meta",
    )
