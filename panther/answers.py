"""What a model's answers mean: whether they are scores of classes, and where these are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from panther.batches import float_outputs

CLASSIFIER_NAMES = frozenset({"classifier", "fc", "head", "heads", "lm_head", "logits", "score"})


def class_scores(output: Any) -> Tensor:
    named = named_logits(output)
    return float_outputs(output)[0] if named is None else named


def named_logits(output: Any) -> Tensor | None:
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) and logits.dim() in (2, 3) and logits.shape[-1] >= 2 else None


def is_classifier(output: Any, last: Sequence[tuple[str, Tensor]]) -> bool:
    """Whether the largest entry of an output row is an answer; an embedding must not be taken for one."""
    if named_logits(output) is not None:
        return True
    tensors = float_outputs(output)
    if len(tensors) != 1 or tensors[0].dim() != 2 or tensors[0].shape[-1] < 2 or not last:
        return False
    name, made = last[-1]
    if CLASSIFIER_NAMES.isdisjoint(part.strip("_") for part in name.split(".")) or made.shape != tensors[0].shape:
        return False
    low, high = float(tensors[0].min()), float(tensors[0].max())
    return made is tensors[0] or (low >= 0 and high <= 1) or high <= 0


@contextlib.contextmanager
def last_dense_call(model: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """The name and output of the dense layer that ran last, as the only entry of the list."""
    last: list[tuple[str, Tensor]] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                last[:] = [(name, output)]

        return hook

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    hooks = [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if isinstance(m, kinds)]
    try:
        yield last
    finally:
        for hook in hooks:
            hook.remove()
