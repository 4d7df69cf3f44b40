"""Products with bare parameters made layers, so that they can be sketched: attention's, and Hugging Face's Conv1D.

Whatever is opened is run beside what it was made from; what differs stays closed. In the end all that nothing was
sketched in becomes again what it was.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from panther.batches import Call, float_outputs, inference, run
from panther.nn import SKMultiheadAttention
from panther.nn.bare import as_it_was, as_linear, may_be_bare, reads_transposed
from panther.nn.narrow import is_narrowed
from panther.nn.surgery import put_layers, with_layers

NEAR = 1e-3  # of the norm of an answer in float32


@dataclass(frozen=True)
class Closed:
    """A module with a hidden product, and how it is opened: an attention's layout, or that a matrix is (in, out)."""

    module: nn.Module
    way: str | bool

    def open(self) -> nn.Module:
        """The same with its products in layers, and its numbers shared."""
        if isinstance(self.module, nn.MultiheadAttention):
            return SKMultiheadAttention.from_dense(self.module, str(self.way))
        return as_linear(self.module, transposed=bool(self.way))

    def close(self, now: nn.Module) -> nn.Module | None:
        """What it was, with the numbers that are now in what it was opened to; None where a layer is another one."""
        if isinstance(now, SKMultiheadAttention):
            is_dense = all(type(part) is nn.Linear and not is_narrowed(part) for part in now.children())
            return now.to_dense() if is_dense else None
        gains_bias = getattr(now, "bias", None) is not None and self.module._parameters.get("bias") is None
        if type(now) is not nn.Linear or is_narrowed(now) or gains_bias:
            return None
        return as_it_was(now, self.module, transposed=bool(self.way))


@dataclass(frozen=True)
class Opened:
    """A model in which hidden products are layers, and by name the modules that they were hidden in."""

    model: nn.Module
    closed: Mapping[str, Closed] = field(default_factory=dict)

    @property
    def was(self) -> dict[str, nn.Module]:
        """By name, the modules as they were."""
        return {name: closed.module for name, closed in self.closed.items()}

    def holder(self, name: str) -> str:
        """What the closed model has at the place of a layer: the attention, for its projections."""
        owner = name.rpartition(".")[0]
        return owner if owner in self.closed else name

    def close(self, model: nn.Module, given: nn.Module) -> None:
        """Make again what it was, in a model made of the opened one, where nothing was changed; in place."""
        now = {name: closed.close(model.get_submodule(name)) for name, closed in self.closed.items()}
        put_layers(model, {name: module for name, module in now.items() if module is not None})
        if self.closed:
            _keep_fused(model, given)


def opened(model: nn.Module, example: Call) -> Opened:
    """The model with its hidden products as layers; the model itself where it has none.

    Tensors are shared with the model, which is not changed. The opened model answers as the model does on the example:
    where it would not, since something else needs what was closed, less is opened.
    """
    suspects = {name: module for name, module in model.named_modules() if name and _may_be_opened(module)}
    names = defaultdict(list)  # of each parameter
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    suspects = {
        name: module  # no other module holds its parameters, and it has no other name
        for name, module in suspects.items()
        if all(other.startswith(name + ".") for p in module.parameters() for other in names[id(p)])
    }
    if not suspects:
        return Opened(model)
    try:
        ways = _ways(model, example, suspects)
    except Exception:  # the model does not run, and capture says so
        return Opened(model)
    closed = {name: Closed(suspects[name], way) for name, way in ways.items() if way is not None}
    attention = {name: c for name, c in closed.items() if isinstance(c.way, str)}
    matrices = {name: c for name, c in closed.items() if name not in attention}
    for chosen in (closed, matrices, attention):
        made = _made(model, example, chosen) if chosen else None
        if made is not None:
            return Opened(made, chosen)
    return Opened(model)


def _made(model: nn.Module, example: Call, closed: Mapping[str, Closed]) -> nn.Module | None:
    """A copy of the model with these modules opened; None where it cannot be made, or answers something else."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        made = with_layers(model, {name: found.open() for name, found in closed.items()}, shared)
        with inference(model):
            wanted = float_outputs(run(model, example))
        with inference(made), _noting([found.module for found in closed.values()]) as left:
            got = float_outputs(run(made, example))
    except Exception:  # a model may refuse to be copied, or run into what is not there any more
        return None
    same = len(wanted) == len(got) and all(_is_near(y, z) for y, z in zip(wanted, got, strict=True))
    return made if same and not left else None  # a function or an object may keep what was closed


@contextmanager
def _noting(modules: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    """Which of these modules run."""
    ran: list[nn.Module] = []
    hooks = [module.register_forward_pre_hook(lambda module, _: ran.append(module)) for module in modules]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def _is_near(wanted: Tensor, got: Tensor) -> bool:
    """Whether two models that compute the same may answer so: rounding grows from layer to layer."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return False
    finite = wanted.isfinite() & got.isfinite()
    first, second = wanted[finite].double(), got[finite].double()
    room = NEAR * max(1.0, torch.finfo(wanted.dtype).eps / torch.finfo(torch.float32).eps) ** 0.5
    return bool((first - second).norm() <= room * first.norm())


def _may_be_opened(module: nn.Module) -> bool:
    if type(module) is nn.MultiheadAttention:
        return module.bias_k is None and module.bias_v is None and not module.add_zero_attn and _is_plain(module)
    return may_be_bare(module)


def _is_plain(attention: nn.MultiheadAttention) -> bool:
    """Whether it holds what torch made it with, and nothing else."""
    out, biases = attention.out_proj, (attention.in_proj_bias, attention.out_proj.bias)
    kinds = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
    if "forward" in vars(attention) or type(out) not in kinds or (biases[0] is None) != (biases[1] is None):
        return False
    with torch.device("meta"):
        like = nn.MultiheadAttention(
            attention.embed_dim,
            attention.num_heads,
            bias=biases[0] is not None,
            kdim=attention.kdim,
            vdim=attention.vdim,
        )
    own, torchs = (
        {name: p.shape for name, p in (*module.named_parameters(), *module.named_buffers())}
        for module in (attention, like)
    )
    return (
        own == torchs
        and len(list(attention.modules())) == len(list(like.modules()))
        and all(p.is_floating_point() and p.layout == torch.strided for p in attention.parameters())
        and not any(part._forward_hooks or part._forward_pre_hooks for part in attention.children())
    )


def _ways(model: nn.Module, example: Call, suspects: Mapping[str, nn.Module]) -> dict[str, str | bool | None]:
    """How each module that runs can be opened, seen in one call of the model; None where it cannot."""
    seen: dict[str, list[str | bool | None]] = defaultdict(list)

    def watched(name: str) -> Callable[[Any, Any, Any], None]:
        def look(module: Any, args: Any, kwargs: Any) -> None:
            if isinstance(module, nn.MultiheadAttention):
                seen[name].append(_attention_way(module, args, kwargs))
            else:
                seen[name].append(reads_transposed(module, args[0]) if len(args) == 1 and not kwargs else None)

        return look

    hooks = [m.register_forward_pre_hook(watched(name), with_kwargs=True) for name, m in suspects.items()]
    try:
        with inference(model):
            run(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _for_all(ways) for name, ways in seen.items()}


def _for_all(ways: list[str | bool | None]) -> str | bool | None:
    """The one way, or the attention's layout, that suits all calls."""
    if None in ways or len(set(ways)) == 1:
        return None if None in ways else ways[0]
    return next((layout for layout in ("separate", "kv_proj") if layout in ways), None)


@torch.no_grad()
def _attention_way(module: nn.MultiheadAttention, args: Any, kwargs: Any) -> str | None:
    """The layout that fits which inputs are one tensor; None where the opened attention gives something else."""
    names = ("query", "key", "value")
    query, key, value = (args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names))
    if not isinstance(query, Tensor) or query.is_nested:
        return None
    layout = "separate" if key is not value else "in_proj" if query is key else "kv_proj"
    if not module._qkv_same_embed_dim and layout == "in_proj":
        return None
    try:
        wanted, got = module.forward(*args, **kwargs), SKMultiheadAttention.from_dense(module, layout)(*args, **kwargs)
        pairs = [(y, z) for y, z in zip(wanted, got, strict=True) if y is not None or z is not None]
        same = all(y is not None and z is not None and _is_near(y, z) for y, z in pairs)
    except Exception:
        return None
    return layout if same else None


def _keep_fused(model: nn.Module, given: nn.Module) -> None:
    """Let torch's transformer layers fuse again in a copy of `given`, where all that they hold is as it was."""
    own = dict(model.named_modules())
    for name, before in given.named_modules():
        now = own.get(name)
        if now is None or not isinstance(before, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            continue
        kinds = [[type(part) for part in module.modules()] for module in (before, now)]
        if kinds[0] == kinds[1] and not any(is_narrowed(part) for part in now.modules()):
            for flag in ("activation_relu_or_gelu", "use_nested_tensor"):
                if hasattr(before, flag):
                    setattr(now, flag, getattr(before, flag))
