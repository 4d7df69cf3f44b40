"""Modules that multiply with a bare matrix, as Hugging Face's Conv1D does: the Linear layer that computes the same."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

# Inputs that a module is tried on besides those of the model: leading sizes, and how large the numbers are.
LEADING = ((), (1,), (3,), (2, 3))
SCALES = (1.0, 0.01, 30.0)
LARGE = 2**24  # numbers: such a weight is tried in float32, for the memory


def may_be_bare(module: nn.Module) -> bool:
    """Whether a module of one input holds a matrix, perhaps a bias and nothing else, and is no Linear layer."""
    if isinstance(module, nn.Linear | torch.jit.ScriptModule) or is_parametrized(module):
        return False
    if "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__:
        return False
    if any(True for _ in (*module.children(), *module.buffers())) or _refers_to_modules(module):
        return False
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if not set(module._parameters) <= {"weight", "bias"} or weight is None or is_lazy(weight):
        return False
    is_matrix = weight.dim() == 2 and weight.numel() > 0 and weight.layout == torch.strided
    fits = bias is None or (bias.dim() == 1 and len(bias) in weight.shape)
    return is_matrix and fits and weight.is_floating_point() and _takes_one(module)


def _refers_to_modules(module: nn.Module) -> bool:
    held = [value for name, value in vars(module).items() if name != "_modules"]
    parts = [part for value in held if isinstance(value, list | tuple | set) for part in value]
    parts += [part for value in held if isinstance(value, dict) for part in value.values()]
    return any(isinstance(part, nn.Module) for part in (*held, *parts))


def _takes_one(module: nn.Module) -> bool:
    try:
        return len(inspect.signature(module.forward).parameters) == 1
    except (TypeError, ValueError):
        return False


@torch.no_grad()
def reads_transposed(module: nn.Module, given: Any) -> bool | None:
    """Whether the module computes what a Linear layer of its numbers does, with its weight as (in, out) or (out, in).

    given: an input that the module gets. It is tried with other numbers in its weight and bias, on such inputs and in
    both modes, in float64; None where it computes anything else, or keeps anything of what it sees.
    """
    if not isinstance(given, Tensor) or given.is_nested or given.layout != torch.strided or given.dim() == 0:
        return None
    if not given.is_floating_point():
        return None
    weight, bias = cast(nn.Parameter, module._parameters["weight"]), module._parameters.get("bias")
    kind = torch.float64 if weight.numel() <= LARGE else torch.float32
    generator = torch.Generator().manual_seed(0)
    drawn = [
        None if p is None else nn.Parameter(torch.randn(p.shape, generator=generator, dtype=kind).to(p.device))
        for p in (weight, bias)
    ]
    tried = _copy_of(module)
    tried._parameters["weight"], tried._parameters["bias"] = drawn
    size = given.shape[-1]
    shapes = (given.shape if given.numel() <= LARGE else given.shape[-1:], *((*leading, size) for leading in LEADING))
    inputs = [torch.randn(shape, generator=generator, dtype=kind).to(weight.device) for shape in shapes]
    for transposed in (True, False):
        inner, outer = weight.shape if transposed else weight.shape[::-1]
        if size == inner and (bias is None or len(bias) == outer):
            layer = as_linear(tried, transposed=transposed)
            if all(_is_same(tried, layer, x * scale, must=not i) for i, x in enumerate(inputs) for scale in SCALES):
                return transposed
    return None


def _copy_of(module: nn.Module) -> nn.Module:
    """Another module of the same class and attributes, with containers of its own."""
    new = type(module).__new__(type(module))
    for name, value in vars(module).items():
        is_container = type(value) in (dict, list, set, OrderedDict)
        vars(new)[name] = copy.copy(value) if is_container else value
    return new


def _is_same(module: nn.Module, layer: nn.Linear, given: Tensor, *, must: bool) -> bool:
    """Whether both give the same in either mode; `must`: a module that does not take the input is another."""
    wanted, held = layer(given), _contents(module)
    for training in (False, True):
        module.training = training
        try:
            got = module.forward(given.clone())
        except Exception:  # of fewer or more axes than it was written for
            if must:
                return False
            continue
        if not _is_close(wanted, got):
            return False
    module.training = cast(bool, held[0].get("training"))
    now = _contents(module)
    return all(a.keys() == b.keys() and all(a[key] is b[key] for key in a) for a, b in zip(held, now, strict=True))


def _contents(module: nn.Module) -> list[dict[Any, Any]]:
    """The attributes of a module, and what is in those that are containers."""
    held = [value for value in vars(module).values() if isinstance(value, dict | list | set)]
    return [dict(vars(module)), *(dict(v if isinstance(v, dict) else enumerate(v)) for v in held)]


def _is_close(wanted: Tensor, got: Any) -> bool:
    """Whether both are the same up to rounding in sums of another order; what is not finite must be so in both."""
    if not isinstance(got, Tensor) or got.shape != wanted.shape or got.dtype != wanted.dtype:
        return False
    finite = wanted.isfinite()
    if not torch.equal(finite, got.isfinite()):
        return False
    first, second = wanted[finite].double(), got[finite].double()
    room = 16 * torch.finfo(wanted.dtype).eps ** (1 if wanted.dtype.itemsize < 4 else 0.8)
    return first.numel() == 0 or bool((first - second).abs().max() <= room * first.abs().max())


def as_linear(module: nn.Module, *, transposed: bool) -> nn.Linear:
    """A Linear layer of the module's numbers, without a copy; transposed: its weight is (in, out)."""
    weight, bias = cast(nn.Parameter, module._parameters["weight"]), module._parameters.get("bias")
    inputs, outputs = weight.shape if transposed else weight.shape[::-1]
    with torch.device("meta"):
        layer = nn.Linear(inputs, outputs, bias=bias is not None)
    numbers = weight.detach().t() if transposed else weight.detach()
    layer.weight = nn.Parameter(numbers, requires_grad=weight.requires_grad)
    layer.bias = cast(nn.Parameter, bias)
    return layer.train(module.training)


def as_it_was(layer: nn.Linear, module: nn.Module, *, transposed: bool) -> nn.Module:
    """A module of the class and with the attributes of `module`, with the layer's numbers; without a copy."""
    new, weight = _copy_of(module), layer.weight.detach()
    numbers = nn.Parameter(weight.t() if transposed else weight, requires_grad=layer.weight.requires_grad)
    new._parameters["weight"] = numbers
    if layer.bias is not None:
        new._parameters["bias"] = layer.bias
    return new
