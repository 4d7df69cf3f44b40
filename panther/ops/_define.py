"""What every op file says, and how the saying becomes a registered op."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, is_inference_mode_enabled
from torch._C import _get_tracing_state
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_exporting
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
            return _in_standard_ops(self.reference, self.accumulates, *inputs)
        if inputs[0].is_nested:
            return self._of_nested(*inputs)
        # The compiler comes before inference mode, which it cannot follow.
        if is_grad_enabled() or is_compiling() or is_inference_mode_enabled():
            return self.overload(*inputs)
        # The visit costs as much as the rest of the call: 4 us beside 4 us for small inputs.
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload._op(*inputs)  # what calling the overload does, at less than its cost

    def _of_nested(self, x: Tensor, *others: Any) -> Tensor:
        """A linear op for the rows of a nested tensor."""
        if x.layout == torch.jagged and x._ragged_idx == x.dim() - 1:  # type: ignore[attr-defined]  # of NestedTensor
            raise ValueError(f"{self.name}: expected rows (..., in) of one length; got a nested tensor of others")
        if x.layout != torch.jagged:
            return torch.nested.as_nested_tensor([self(part, *others) for part in x.unbind()])
        rows = self(x.values(), *others)
        # Made with the offsets of x, for by these torch knows which lengths are the same.
        return torch.nested.nested_tensor_from_jagged(rows, x.offsets(), x.lengths(), x._ragged_idx)  # type: ignore[attr-defined]

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
    standard = functools.partial(_in_standard_ops, reference, op.accumulates)
    _LIBRARY.impl(name, standard, "FuncTorchDynamicLayerFrontMode")
    for device_type in ("cpu", "cuda", "mps", "xpu"):
        kernel = _outside_autocast(op.overload, device_type, casts=not op.accumulates)
        _LIBRARY.impl(name, kernel, "Autocast" + device_type.upper())
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    return op


def _in_standard_ops(reference: Callable[..., Any], accumulates: bool, *inputs: Any) -> Any:
    """The reference for inputs that may be inside torch.autocast, or traced."""
    device_type = inputs[0].device.type
    if autocasts(device_type):
        reference = _outside_autocast(reference, device_type, casts=not accumulates)
    if _get_tracing_state() is None:
        return reference(*inputs)
    with warnings.catch_warnings():  # while tracing sizes are tensors, and comparing them is told
        warnings.filterwarnings("ignore", "Converting a tensor to a Python")
        return reference(*inputs)


def rows_of(x: Tensor) -> Tensor:
    """x (..., n) as a matrix; a size of -1 would not do where there are no numbers."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


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
