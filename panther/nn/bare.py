"""Modules that multiply with a bare matrix, as Hugging Face's Conv1D does: the Linear layer that computes the same."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

# Besides the real input: other leading sizes, and how large the numbers are. A module that does more shows it here.
LEADING = ((), (1,), (3,), (2, 3))
SCALES = (1.0, 0.01, 30.0)


def may_be_bare(module: nn.Module) -> bool:
    """Whether all that a module holds is a matrix and perhaps a bias, and it is no layer of torch's that says so."""
    if isinstance(module, nn.Linear | torch.jit.ScriptModule) or is_parametrized(module):
        return False
    if any(True for _ in module.children()):
        return False
    if "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__:
        return False
    if any(True for _ in module.buffers()) or not set(module._parameters) <= {"weight", "bias"}:
        return False
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    return (
        weight is not None
        and not is_lazy(weight)
        and weight.dim() == 2
        and weight.is_floating_point()
        and weight.layout == torch.strided
        and (bias is None or (bias.dim() == 1 and len(bias) in weight.shape))
    )


@torch.no_grad()
def reads_transposed(module: nn.Module, given: Any) -> bool | None:
    """Whether the module computes what a Linear layer of its numbers does, with its weight as (in, out) or (out, in).

    given: an input that the module gets. On it, on others and in training mode too both must give the same; None where
    they do not.
    """
    weight = cast(nn.Parameter, module._parameters["weight"])
    if not isinstance(given, Tensor) or given.is_nested or given.layout != torch.strided or given.dim() == 0:
        return None
    if given.dtype != weight.dtype or given.numel() == 0:
        return None
    generator = torch.Generator().manual_seed(0)
    tried = [given]
    for leading in LEADING:
        drawn = torch.randn(len(SCALES), *leading, given.shape[-1], generator=generator)
        tried += [(x * scale).to(given) for x, scale in zip(drawn, SCALES, strict=True)]
    for transposed in (True, False):
        if given.shape[-1] == weight.shape[0 if transposed else 1]:
            layer = as_linear(module, transposed=transposed)
            if all(_is_same(module, layer, x, must=x is given) for x in tried):
                return transposed
    return None


def _is_same(module: nn.Module, layer: nn.Linear, given: Tensor, *, must: bool) -> bool:
    """Whether both give the same in either mode; `must`: a module that does not take the input is another."""
    before, was_training = dict(vars(module)), module.training
    wanted = layer(given)
    try:
        for training in (False, True):
            module.training = training
            try:
                got = module.forward(given)
            except Exception:  # of fewer or more axes than it was written for
                if must:
                    return False
                continue
            if not is_close(wanted, got):
                return False
    finally:
        module.training = was_training
    return len(vars(module)) == len(before) and all(vars(module).get(name) is value for name, value in before.items())


def is_close(wanted: Tensor, got: Any) -> bool:
    """Whether both are the same up to rounding in sums of another order; what is not finite must be so in both."""
    if not isinstance(got, Tensor) or got.shape != wanted.shape or got.dtype != wanted.dtype:
        return False
    finite = wanted.isfinite()
    if not torch.equal(finite, got.isfinite()):
        return False
    first, second = wanted[finite].double(), got[finite].double()
    if first.numel() == 0:
        return True
    room = 16 * torch.finfo(wanted.dtype).eps ** (1 if wanted.dtype.itemsize < 4 else 0.8)
    return bool((first - second).abs().max() <= room * first.abs().max())


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
    new = type(module).__new__(type(module))
    vars(new).update(vars(module))
    weight = layer.weight.detach()
    numbers = nn.Parameter(weight.t() if transposed else weight, requires_grad=layer.weight.requires_grad)
    new._parameters = {**module._parameters, "weight": numbers}
    if layer.bias is not None:
        new._parameters["bias"] = layer.bias
    return new
