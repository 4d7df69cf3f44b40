"""A dense weight that can be asked what it is like without being multiplied out of its factors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

# What these answer is the same for the stand-in and for the weight that it stands for.
_SAME_FOR_BOTH: frozenset[Any] = frozenset(
    {
        *(
            getattr(Tensor, name).__get__
            for name in (
                *("device", "dtype", "grad", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_mps", "is_quantized"),
                *("is_sparse", "is_xpu", "itemsize", "layout", "nbytes", "ndim", "requires_grad", "shape"),
            )
        ),
        *(Tensor.__len__, Tensor.dim, Tensor.element_size, Tensor.get_device, Tensor.is_complex),
        *(Tensor.is_contiguous, Tensor.is_floating_point, Tensor.ndimension, Tensor.nelement, Tensor.numel),
        *(Tensor.size, Tensor.stride, torch.is_complex, torch.is_floating_point, torch.numel),
    }
)

# These write into their first argument; so does a name like `add_`.
_WRITERS = frozenset(
    f"__i{operator}__"
    for operator in ("add", "and", "floordiv", "lshift", "matmul", "mod", "mul", "or", "pow", "rshift", "sub", "xor")
) | {"__itruediv__", "__idiv__", "__setitem__", "__set__", "__delete__"}


class DenseWeight(Tensor):
    """The stand-in for a layer's dense weight: it holds no numbers, and multiplies the factors out to give some.

    Shape, dtype, device and the like cost nothing. Every operation on values gets the weight as it is at that moment,
    in a plain tensor that gradients flow through to the factors; `clone()` keeps one. Writing into it is an error, as
    the layer would not notice. `requires_grad` is False: the factors are what is trained.
    """

    _compose: Callable[[], Tensor]

    def __new__(
        cls, compose: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Self:
        # torch's tensors without memory: code that goes past __torch_function__ lands in __torch_dispatch__.
        new: Self = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        new._compose = compose
        return new

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SAME_FOR_BOTH:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0]._detached()  # not a plain tensor, since `weight.data` is what most writers write into
        _refuse_to_write(func, args, kwargs)
        return func(*_composed(args), **_composed(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks the function itself
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        _refuse_to_write(func, args, kwargs)
        return func(*_composed(args), **_composed(kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The weight of the copy of the layer."""
        return type(self)(copy.deepcopy(self._compose, memo), self.shape, self.dtype, self.device)

    def _detached(self) -> Self:
        return type(self)(_Detached(self._compose), self.shape, self.dtype, self.device)


class _Detached:
    """A composition that gradients do not flow through; an object and not a lambda, so that copies follow the layer."""

    def __init__(self, compose: Callable[[], Tensor]) -> None:
        self.compose = compose

    def __call__(self) -> Tensor:
        return self.compose().detach()


def _composed(values: Any) -> Any:
    return tree_map_only(DenseWeight, lambda weight: weight._compose(), values)


def _refuse_to_write(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise RuntimeError for an operation that would write into a composed weight, which nobody keeps."""
    name = func.__name__.partition(".")[0]  # add_.Tensor, as __torch_dispatch__ sees it, is add_
    written = [kwargs.get("out")]
    if name in _WRITERS or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace"):
        written.append(next(iter((*args, *kwargs.values())), None))
    if any(isinstance(leaf, DenseWeight) for leaf in tree_leaves(written)):
        what = f"set {func.__self__.__name__!r} of" if name == "__set__" else f"apply {name} in place to"  # type: ignore[attr-defined]
        raise RuntimeError(
            f"cannot {what} the `weight` of a sketched layer: it is the product of the layer's factors, and what is "
            "written into it would be lost. Change layer.parameters() instead, or make the layer dense first with "
            "layer.to_dense()."
        )
