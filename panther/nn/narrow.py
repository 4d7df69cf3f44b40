"""Layers with fewer inputs or outputs than they had: the same modules with part of their numbers.

Unlike a sketched layer such a layer has no type of its own, so that whatever runs, prints or exports the dense one
takes it too. It remembers in `dense_sizes` what it was made from.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
DENSE_SIZES = "dense_sizes"  # an attribute: inputs and outputs that a layer had
NARROWED = "Narrowed"  # the type of such a layer in a saved model
NUMBERS = ("weight", "bias", "running_mean", "running_var")


def is_depthwise(module: nn.Module) -> bool:
    """Whether a convolution gives one output for each input, from that input alone."""
    return isinstance(module, CONVOLUTIONS) and 1 < module.groups == module.in_channels == module.out_channels


def is_narrowed(module: nn.Module) -> bool:
    return DENSE_SIZES in vars(module)


def sizes_of(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a layer, dense or sketched, or the channels of a batch norm twice.

    Raises: TypeError for any other module.
    """
    if isinstance(module, NORMS):
        return module.num_features, module.num_features
    for names in (("in_features", "out_features"), ("in_channels", "out_channels")):
        sizes = [getattr(module, name, None) for name in names]
        if all(type(size) is int for size in sizes):
            return cast(tuple[int, int], tuple(sizes))
    raise TypeError(f"{type(module).__name__} has no channels that could be left out")


@torch.no_grad()
def narrowed(
    module: nn.Module, *, inputs: Tensor | None = None, outputs: Tensor | None = None, gains_bias: bool = False
) -> nn.Module:
    """The module with these of its inputs and outputs only (integer indices, None: all); it is not changed itself.

    A batch norm and a depthwise convolution have one input for each output: `outputs` says which. gains_bias: a layer
    without a bias gets one of zeros. Numbers are copied; what else the module refers to is shared.

    Raises: TypeError for a module that is neither a Linear or convolution nor a batch norm, ValueError for a grouped
    convolution that is not depthwise, or where inputs are to be left out of a layer that has none of its own.
    """
    if not isinstance(module, (nn.Linear, *CONVOLUTIONS, *NORMS)):
        raise TypeError(f"{type(module).__name__} is no layer that can be narrowed")
    before, follows = sizes_of(module), isinstance(module, NORMS) or is_depthwise(module)
    if follows and inputs is not None:
        raise ValueError(f"{type(module).__name__} reads what it gives: say which outputs stay, and not which inputs")
    if not follows and getattr(module, "groups", 1) != 1:
        raise ValueError(f"a convolution of {module.groups} groups cannot be narrowed")
    new = module.__class__.__new__(module.__class__)
    vars(new).update(vars(module))
    for name in ("_parameters", "_buffers", "_modules"):
        vars(new)[name] = copy.copy(vars(module)[name])
    for name in NUMBERS:
        old = getattr(module, name, None)
        if old is None:
            continue
        kept = old if outputs is None else old.index_select(0, outputs.to(old.device))
        kept = kept if inputs is None or name != "weight" else kept.index_select(1, inputs.to(old.device))
        kept = kept.detach().clone()
        if isinstance(old, nn.Parameter):
            new._parameters[name] = nn.Parameter(kept, requires_grad=old.requires_grad)
        else:
            new._buffers[name] = kept
    for name, buffer in new._buffers.items():
        if name not in NUMBERS and buffer is not None:
            new._buffers[name] = buffer.clone()
    after = tuple(size if index is None else len(index) for size, index in zip(before, (inputs, outputs), strict=True))
    if gains_bias and new._parameters.get("bias") is None:
        weight = new._parameters["weight"]
        learns = weight is not None and weight.requires_grad
        new._parameters["bias"] = nn.Parameter(_zeros(new, after[1]), requires_grad=learns)
    _resize(new, after[1] if follows else after[0], after[1])
    vars(new)[DENSE_SIZES] = vars(module).get(DENSE_SIZES, before)
    return new


def narrow_config(module: nn.Module) -> dict[str, Any]:
    """What `narrowed_to` needs to make such a layer of the dense one."""
    (inputs, outputs), (before_in, before_out) = sizes_of(module), vars(module)[DENSE_SIZES]
    return {
        "inputs": [before_in, inputs],
        "outputs": [before_out, outputs],
        "bias": module._parameters.get("bias") is not None,
    }


def narrowed_to(module: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """The module with as many inputs and outputs as a config says, whichever: their numbers are read afterwards.

    Raises: ValueError or TypeError where the config is not one, or is of another layer.
    """
    if set(config) != {"inputs", "outputs", "bias"} or type(config["bias"]) is not bool:
        raise ValueError("expected inputs, outputs and bias, as a saved model has them")
    wanted = []
    for name, size in zip(("inputs", "outputs"), sizes_of(module), strict=True):
        given = config[name]
        if not isinstance(given, list) or len(given) != 2 or not all(type(n) is int for n in given):
            raise ValueError(f"{name} is {str(given)[:80]}: expected two integers, before and after")
        if given[0] != size or not 1 <= given[1] <= size:
            raise ValueError(f"{name} goes from {given[0]} to {given[1]}, the architecture given has {size}")
        wanted.append(None if given[1] == size else torch.arange(given[1]))
    follows = isinstance(module, NORMS) or is_depthwise(module)
    return narrowed(module, inputs=None if follows else wanted[0], outputs=wanted[1], gains_bias=config["bias"])


def _zeros(module: nn.Module, size: int) -> Tensor:
    """A vector of a module's numbers, of its weight's dtype and on its device."""
    weight = module._parameters["weight"]
    return torch.zeros(size) if weight is None else weight.new_zeros(size)


def _resize(module: Any, inputs: int, outputs: int) -> None:
    """Tell a module how many inputs and outputs it has now."""
    if isinstance(module, nn.Linear):
        module.in_features, module.out_features = inputs, outputs
    elif isinstance(module, CONVOLUTIONS):
        module.groups = outputs if is_depthwise(module) else 1
        module.in_channels, module.out_channels = inputs, outputs
    else:
        module.num_features = outputs
