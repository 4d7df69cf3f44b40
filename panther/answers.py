"""What a model's answers mean: whether they are scores of classes, and where these are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from panther.batches import float_outputs

# Parts of an output, by their names, that are on the way to the scores beside them.
BYPRODUCTS = ("hidden_state", "attentions")
# Least divergence that is a unit: about what 10 classes have when their scores vary by 0.3 from row to row. A few rows
# may have less by chance, and all that say the same do; the errors of neither should count a thousandfold.
LEAST_UNIT = 0.05
CLASSIFIER_NAMES = frozenset({"classifier", "fc", "head", "heads", "lm_head", "logits", "score"})


def class_scores(output: Any) -> Tensor:
    named = named_logits(output)
    return float_outputs(output)[0] if named is None else named


def named_logits(output: Any) -> Tensor | None:
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) and logits.dim() in (2, 3) and logits.shape[-1] >= 2 else None


def answers_of(output: Any) -> list[Tensor]:
    """The tensors of an output that are answers: beside scores that it calls logits, hidden states are none."""
    if named_logits(output) is None or not isinstance(output, Mapping):
        return float_outputs(output)
    parts = [part for name, part in output.items() if not any(word in str(name) for word in BYPRODUCTS)]
    return [tensor for part in parts for tensor in float_outputs(part)]


def class_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence of log-probabilities (rows, classes), in units of that of the mean probabilities.

    At least zero: that of answers that hardly differ, added up in float32, may come out below.
    """
    usable = torch.isfinite(teacher).any(-1)
    student, teacher = student[usable].clamp_min(-1e4), teacher[usable].clamp_min(-1e4)
    lost = kl_div(student, teacher, reduction="batchmean", log_target=True)
    mean = teacher.exp().mean(0, keepdim=True).clamp_min(1e-12).log()
    unit = kl_div(mean.expand_as(teacher), teacher, reduction="batchmean", log_target=True)
    return lost.clamp_min(0.0) / unit.clamp_min(_least_unit(teacher))


def _least_unit(teacher: Tensor) -> float:
    """Less the more rows there are whose answer is not the most frequent one."""
    answers = teacher.argmax(-1)
    others = int((answers != answers.mode().values).sum()) if len(answers) else 0
    return LEAST_UNIT / (1 + others)


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
