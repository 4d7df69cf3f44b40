"""What every op file says, and how the saying becomes a registered op."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_tracing_state
from torch.autograd import forward_ad
from torch.compiler import is_exporting
from torch.utils.flop_counter import register_flop_formula

from panther.ops import _kernels

# Holds the registrations: they are undone when it is collected, so it lives as long as the process.
_LIBRARY = torch.library.Library("panther", "DEF")


@dataclass(frozen=True)
class Op:
    """One registered op: its name in the dispatcher, and what it computes in plain PyTorch."""

    name: str
    reference: Callable[..., Any]
    overload: torch._ops.OpOverload
    samples: Callable[[torch.dtype], list[tuple[Any, ...]]]  # valid inputs at the edges, for the contract tests

    def __call__(self, *inputs: Any) -> Any:
        """Run the op; where no gradient is recorded, without a visit to its backward, which is written in Python."""
        # Tangents pass standard ops only (the dispatcher would drop them in silence), and so does what is written down.
        if forward_ad._current_level >= 0 or is_exported():
            return self._in_standard_ops(*inputs)
        # The compiler comes before inference mode, which it cannot follow.
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return self.overload(*inputs)
        # The visit costs as much as the rest of the call: 4 us beside 4 us for small inputs.
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload._op(*inputs)  # what calling the overload does, at less than its cost

    def _in_standard_ops(self, *inputs: Any) -> Any:
        device_type, formula = inputs[0].device.type, self.reference
        if autocasts(device_type):
            formula = _outside_autocast(formula, device_type, casts=not self.accumulates)
        if _get_tracing_state() is None:
            return formula(*inputs)
        with warnings.catch_warnings():  # while tracing sizes are tensors, and comparing them is told
            warnings.filterwarnings("ignore", "Converting a tensor to a Python")
            return formula(*inputs)

    @property
    def accumulates(self) -> bool:
        """Whether it adds to some of its inputs and returns nothing."""
        return bool(self.overload._schema.is_mutable)

    def has_kernel(self, device_type: str) -> bool:
        """Whether compiled code serves this device, as the dispatcher sees it."""
        key = getattr(torch._C.DispatchKey, device_type.upper())
        return bool(self.overload.has_kernel_for_dispatch_key(key))


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    samples: Callable[[torch.dtype], list[tuple[Any, ...]]],
    flops: Callable[..., int],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Op:
    """Register an op of the `panther` namespace from its schema, its formula and its backward.

    The reference serves every device that has no kernel of its own, and tensors without data. Under autocast the
    floating inputs are cast to the autocast dtype, as they are for F.linear. torch.func transforms and
    forward-mode tangents see the reference.
    flops: what one run needs, from the shapes of tensors and from other inputs as they are; torch's FlopCounterMode
    counts it. What a backward needs is counted from the standard ops that it is made of.
    An op that accumulates comes without backward, and autocast leaves its inputs alone: casts would be copies, not what
    is added to.
    """
    name = schema.partition("(")[0]
    qualified = f"panther::{name}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = Op(name, reference, getattr(torch.ops.panther, name).default, samples)
    _LIBRARY.impl(name, _falling_back_to(reference), "CompositeExplicitAutograd")
    register_flop_formula(getattr(torch.ops.panther, name))(flops)
    torch.library.register_fake(qualified, reference, lib=_LIBRARY)
    # The key that every torch.func transform sets first: the transforms meet standard ops only. A backward from
    # register_autograd would raise inside them.
    _LIBRARY.impl(name, reference, "FuncTorchDynamicLayerFrontMode")
    for device_type in ("cpu", "cuda", "mps", "xpu"):
        kernel = _outside_autocast(op.overload, device_type, casts=not op.accumulates)
        _LIBRARY.impl(name, kernel, "Autocast" + device_type.upper())
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    return op


def is_exported() -> bool:
    """Whether what runs is written down (torch.export, torch.onnx, TorchScript) for others, who know standard ops."""
    return _get_tracing_state() is not None or is_exporting()  # torch.onnx does one or the other


def autocasts(device_type: str) -> bool:
    """Whether torch.autocast is on for a kind of device; some (meta) it does not know."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _falling_back_to(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference as a kernel: it runs for real tensors only where no compiled kernel does."""

    def kernel(x: Tensor, *others: Any) -> Any:
        if x.is_cpu and _kernels.load()[0] is None:
            _kernels.warn_that_they_are_missing()
        return reference(x, *others)

    return kernel


def _outside_autocast(function: Callable[..., Any], device_type: str, *, casts: bool) -> Callable[..., Any]:
    """An op, or its reference, for inputs inside torch.autocast: they are cast, if at all, and it runs outside."""

    def cast(value: Any, dtype: torch.dtype) -> Any:
        # float64 stays what it is, which is the rule of torch's own autocast ops.
        lower = casts and isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if lower else value

    def call(*inputs: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return function(*(cast(value, dtype) for value in inputs))

    return call
