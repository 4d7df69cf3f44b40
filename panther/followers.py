"""Neighbouring layers between which the channels are nobody else's, found in an FX graph.

Where a layer's output reaches one other layer only, through operations that work on each channel alone, its channels
may be stored in any order, or left out, as long as the next layer's inputs are, and so the channels of a batch norm or
a depthwise convolution between them. What is not known to keep channels apart ends the search, and so does a second
reader.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn

from panther.nn.narrow import NORMS, is_depthwise, sizes_of
from panther.spec import LayerSpec, Pair

# ATen operations, functions and methods by their plain names. With scalars as their other operands they work on each
# number alone; with several tensors they are taken only where all of these come from the same layer.
ELEMENTWISE = frozenset(
    [
        *("add", "sub", "rsub", "mul", "div", "truediv", "neg", "pow", "square", "sqrt", "rsqrt", "reciprocal", "abs"),
        *("exp", "log1p", "expm1", "erf", "sin", "cos", "clamp", "clamp_min", "clamp_max", "threshold"),
        *("relu", "relu6", "gelu", "silu", "mish", "elu", "selu", "celu", "leaky_relu", "sigmoid", "tanh", "softplus"),
        *("hardtanh", "hardswish", "hardsigmoid", "hardshrink", "softshrink", "log_sigmoid", "logsigmoid"),
        *("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"),
        *("dropout1d", "dropout2d", "dropout3d", "clone", "contiguous", "detach", "alias", "to", "to_copy"),
        *("float", "double", "half", "bfloat16"),
    ]
)
ELEMENTWISE_MODULES = frozenset(
    [
        *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh),
        *(nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid, nn.Identity, nn.Dropout),
        *(nn.AlphaDropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout),
    ]
)
PADS = frozenset(["pad", "constant_pad_nd"])
# With the number of axes that each works along.
POOLS = {f"{kind}_pool{dims}d": dims for kind in ("avg", "max", "adaptive_avg") for dims in (1, 2, 3)}
PAD_MODULES: dict[type[nn.Module], int] = {nn.ZeroPad1d: 1, nn.ZeroPad2d: 2, nn.ZeroPad3d: 3}
POOL_MODULES: dict[type[nn.Module], int] = {
    kind: dims
    for dims, kinds in enumerate(
        (
            (nn.AvgPool1d, nn.MaxPool1d, nn.AdaptiveAvgPool1d),
            (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d),
            (nn.AvgPool3d, nn.MaxPool3d, nn.AdaptiveAvgPool3d),
        ),
        1,
    )
    for kind in kinds
}


@dataclass(frozen=True)
class Role:
    """What a node of a graph is to this search.

    kind: "dense", "depthwise", "norm", "elementwise", "pool" or "pad" (along the last `dims` axes, which are positions
    behind a convolution of as many), "nothing" (reads no numbers) or "".
    """

    kind: str
    module: str = ""  # the qualified name of the module that it belongs to
    is_relu: bool = False
    dims: int = 0  # axes of positions; of a dense node those of its kernel


@dataclass(frozen=True)
class Found:
    """A pair, and every module that has a hand in what is between its layers."""

    pair: Pair
    between: frozenset[str]


def pairs(graph: fx.Graph, role_of: Callable[[fx.Node], Role]) -> list[Found]:
    """Every dense node whose output ends, what works on each channel alone apart, in one other dense node."""
    nodes = list(graph.nodes)
    roles = {node: role_of(node) for node in nodes}
    uses = [role.module for role in roles.values() if role.kind in ("dense", "depthwise", "norm")]
    once = {module for module in uses if uses.count(module) == 1}
    found = (_follow(node, nodes[at + 1 :], roles) for at, node in enumerate(nodes) if roles[node].kind == "dense")
    return [one for one in found if one is not None and once.issuperset(_layers(one.pair))]


def _layers(pair: Pair) -> tuple[str, ...]:
    return (pair.producer, pair.consumer, *pair.between)


def _follow(producer: fx.Node, later: Sequence[fx.Node], roles: Mapping[fx.Node, Role]) -> Found | None:
    """The pair that a dense node begins, or None where anything else reads what it made."""
    reached, between, consumer = {producer}, [], ""
    for node in later:
        role, read = roles[node], reached.intersection(node.all_input_nodes)
        if not read or role.kind == "nothing":
            continue
        only_first = node.args[:1] == tuple(read)
        if role.kind == "elementwise" and reached.issuperset(node.all_input_nodes):
            reached.add(node)
        elif only_first and (role.kind == "norm" or _is_depthwise_along(role, roles[producer].dims)):
            reached.add(node)
            between.append(role.module)
        elif only_first and _keeps_channels(role, roles[producer].dims):
            reached.add(node)
        elif role.kind == "dense" and only_first and not consumer:
            consumer = role.module
        else:
            return None
    inside = frozenset(roles[node].module for node in reached if node is not producer)
    return Found(Pair(roles[producer].module, consumer, tuple(between)), inside) if consumer else None


def _is_depthwise_along(role: Role, dims: int) -> bool:
    """Whether a depthwise convolution is over the positions of the producer's channels, not of something else."""
    return role.kind == "depthwise" and role.dims == dims


def _keeps_channels(role: Role, dims: int) -> bool:
    """Whether pooling or padding leaves the channels of a convolution over so many axes apart."""
    return (role.kind == "pool" and role.dims == dims) or (role.kind == "pad" and 0 < role.dims <= dims)


def rectified(graph: fx.Graph, role_of: Callable[[fx.Node], Role]) -> list[tuple[str, str]]:
    """Every dense node that only a ReLU reads, directly or (the second name) through one batch norm, each used once."""
    roles = {node: role_of(node) for node in graph.nodes}
    uses = [role.module for role in roles.values() if role.kind in ("dense", "norm")]
    found = []
    for node in graph.nodes:
        reader, norm = _only_reader(node, roles) if roles[node].kind == "dense" else None, ""
        if reader is not None and roles[reader].kind == "norm" and reader.args[:1] == (node,):
            reader, norm = _only_reader(reader, roles), roles[reader].module
        if reader is not None and roles[reader].is_relu:
            found.append((roles[node].module, norm))
    return [pair for pair in found if all(uses.count(name) == 1 for name in pair if name)]


def _only_reader(node: fx.Node, roles: Mapping[fx.Node, Role]) -> fx.Node | None:
    readers = [reader for reader in node.users if roles[reader].kind != "nothing"]
    return readers[0] if len(readers) == 1 else None


def before_relu(
    model: nn.Module, found: Sequence[tuple[str, str]], specs: Sequence[LayerSpec], dims: Mapping[str, int]
) -> Iterator[tuple[str, str]]:
    """Those whose layer panther may solve for what passes the ReLU only: no hook sees more of its output.

    dims: as for `followers`.
    """
    known = {spec.name: spec for spec in specs if spec.can_be_sketched and spec.calls == 1}
    modules = dict(model.named_modules(remove_duplicate=False))
    for layer, norm in found:
        parts = [layer, norm] if norm else [layer]
        if layer not in known or any(name not in modules or _is_watched(modules[name]) for name in parts):
            continue
        if not norm or (
            _is_norm_of(modules, norm, known[layer], dims) and isinstance(modules[norm].running_mean, Tensor)
        ):
            yield layer, norm


def followers(
    model: nn.Module, found: Sequence[Found], specs: Sequence[LayerSpec], dims: Mapping[str, int]
) -> Iterator[Pair]:
    """The pairs whose layers panther may store anew, and whose channels nobody else gets to see.

    A pair is left out where a forward hook would see the channels, or where they would leave a module with several
    dense layers: people call such parts (a backbone, a head) on their own.

    dims: number of dimensions of each layer's output, as it is in the model.
    """
    known = {spec.name: spec for spec in specs if spec.can_be_sketched and spec.calls == 1 and not spec.aliases}
    modules = dict(model.named_modules(remove_duplicate=False))
    for one in found:
        pair, first, second = one.pair, known.get(one.pair.producer), known.get(one.pair.consumer)
        if first is None or second is None or first.kind != second.kind:
            continue
        if all(_is_of_channels(modules, name, first, dims) for name in pair.between) and _is_private(modules, one):
            yield pair


def _is_of_channels(modules: Mapping[str, nn.Module], name: str, layer: LayerSpec, dims: Mapping[str, int]) -> bool:
    """Whether a depthwise convolution or a batch norm works along the layer's channels, and on nothing else."""
    module = modules.get(name)
    if module is None or not is_depthwise(module):
        return _is_norm_of(modules, name, layer, dims)
    registered = sum(other is module for other in modules.values())
    plain = set(module._parameters) == {"weight", "bias"} and module.weight is not None and not module._buffers
    return registered == 1 and plain and sizes_of(module)[0] == layer.out_features


def _is_norm_of(modules: Mapping[str, nn.Module], name: str, layer: LayerSpec, dims: Mapping[str, int]) -> bool:
    """Whether a batch norm works along the layer's channels: its axis 1 is not that of an output without a batch."""
    norm = modules.get(name)
    registered = sum(module is norm for module in modules.values())
    channels_are_second = dims.get(layer.name) == 2 + len(layer.kernel_size)
    return type(norm) in NORMS and registered == 1 and channels_are_second


def _is_private(modules: Mapping[str, nn.Module], one: Found) -> bool:
    """Whether nobody outside of the innermost module around all this sees the channels, and no hook inside does."""
    layers = [name.split(".") for name in (one.pair.producer, one.pair.consumer)]
    between = [name.split(".") if name else [] for name in one.between]
    shared = _common_length([*(path[:-1] for path in layers), *between])
    crossed = {".".join(path[:end]) for path in (*layers, *between) for end in range(shared + 1, len(path) + 1)}
    return all(
        name in modules and not _is_watched(modules[name]) and _layers_in(modules[name]) <= 1 for name in crossed
    )


def _common_length(paths: Sequence[Sequence[str]]) -> int:
    levels = zip(*paths, strict=False)  # down to the end of the shortest
    return sum(1 for _ in itertools.takewhile(lambda level: len(set(level)) == 1, levels))


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _layers_in(module: nn.Module) -> int:
    """Dense layers in a module that can be called; torch's lists of modules cannot."""
    if type(module).forward is nn.Module.forward:
        return 0
    return sum(isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) for m in module.modules())
