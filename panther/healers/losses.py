"""How far a student's answers are from the teacher's, as one number that can be differentiated: no labels.

Every output counts in units of how much the teacher's own answers vary, so that 1 is what a constant answer would
lose. Class scores count by the Kullback-Leibler divergence of their probabilities; all other outputs by their squared
error, rows and (in a sequence) their mean over the positions, which is what embeddings are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from panther.answers import named_logits
from panther.batches import Call, float_outputs, masked_rows, run

Masks = Mapping[tuple[int, ...], Tensor]


def answer_loss(answer: Any, target: Any, call: Call, *, classifies: bool) -> Tensor:
    """The loss of a whole output of a model; 0 for the teacher's own, 1 for a part of another shape.

    classifies: a single output is class scores even where it is not named `logits`.
    """
    masks = call.masks()
    answers, targets = float_outputs(answer), float_outputs(target)
    scores = named_logits(target)
    if scores is None and classifies:
        scores = targets[0]
    total = torch.zeros((), dtype=torch.float32, device=targets[0].device if targets else None)
    for index, wanted in enumerate(targets):
        if index >= len(answers) or answers[index].shape != wanted.shape:
            total = total + 1.0
            continue
        loss = _class_loss if wanted is scores else tensor_loss
        total = total + loss(answers[index], wanted, masks)
    return total / max(1, len(targets))


@torch.no_grad()
def held_out_loss(
    student: nn.Module, calls: Sequence[Call], target_of: Callable[[int], Any], *, classifies: bool
) -> float:
    """The mean `answer_loss` of a student over calls; target_of: the teacher's output by the number of the call."""
    lost = 0.0
    for index, call in enumerate(calls):
        answer = run(student, call)
        lost += float(answer_loss(answer, target_of(index), call, classifies=classifies))
    return lost / max(1, len(calls))


def tensor_loss(got: Tensor, target: Tensor, masks: Masks) -> Tensor:
    """Squared error of rows in units of their variance; of a (batch, length, features) sequence also of its mean.

    Padded positions and values that are not finite in the target (masked ones) are left out.
    """
    finite = torch.isfinite(target)
    error = torch.where(finite, got.float() - target.float(), 0.0)
    values = torch.where(finite, target.float(), 0.0)
    loss = _relative(_rows(error, masks), _rows(values, masks))
    if target.dim() == 3:
        loss = loss + _relative(_means(error, masks), _means(values, masks))
    return loss


def _rows(tensor: Tensor, masks: Masks) -> Tensor:
    """(rows, features): a row is a position of a sequence, else a sample."""
    if tensor.dim() < 2:
        return tensor.reshape(-1, 1)
    return tensor.flatten(1) if tensor.dim() > 3 else masked_rows(tensor, masks)


def _means(tensor: Tensor, masks: Masks) -> Tensor:
    """The mean over the positions of each sample of (batch, length, features), padding left out."""
    mask = masks.get(tuple(tensor.shape[:2]))
    if mask is None:
        return tensor.mean(1)
    weights = mask.to(tensor).unsqueeze(-1)
    return (tensor * weights).sum(1) / weights.sum(1).clamp_min(1)


def _relative(error: Tensor, values: Tensor) -> Tensor:
    """Mean squared error over the variance of the values; over their size where there is one row or no variance."""
    spread = (values - values.mean(0)).square().mean() if len(values) > 1 else values.square().mean()
    size = values.square().mean()
    return error.square().mean() / torch.maximum(spread, 1e-6 * size).clamp_min(1e-20)


def _class_loss(got: Tensor, target: Tensor, masks: Masks) -> Tensor:
    """Divergence of the student's class probabilities, in units of that of the mean probabilities."""
    student, teacher = (log_softmax(_rows(t, masks).float(), dim=-1) for t in (got, target))
    usable = torch.isfinite(teacher).any(-1)
    student, teacher = student[usable].clamp_min(-1e4), teacher[usable].clamp_min(-1e4)
    lost = kl_div(student, teacher, reduction="batchmean", log_target=True)
    mean = teacher.exp().mean(0, keepdim=True).clamp_min(1e-12).log()
    unit = kl_div(mean.expand_as(teacher), teacher, reduction="batchmean", log_target=True)
    return lost / unit.clamp_min(0.05)  # one row, or rows that agree, have no divergence to compare with
