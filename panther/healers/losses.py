"""How far a student's answers are from the teacher's, as one number that can be differentiated: no labels.

Every output counts in units of how much the teacher's own answers vary, so that 1 is what a constant answer would
lose. Class scores count by the Kullback-Leibler divergence of their probabilities; all other outputs by their squared
error, rows and (in a sequence) their mean over the positions, which is what embeddings are made of. Scores that only
the name of a layer says to be some count by both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from panther.answers import answers_of, class_divergence, named_logits
from panther.batches import Call, float_outputs, masked_rows, run

Masks = Mapping[tuple[int, ...], Tensor]

SUM_TOLERANCE = 1e-2  # of probabilities in bfloat16, which are right to 2^-9 each
LEAST_PROBABILITY = 1e-30  # the gradient of the logarithm of a smaller one would overflow


def answer_loss(answer: Any, target: Any, call: Call, *, classifies: bool) -> Tensor:
    """The loss of a whole output of a model; 0 for the teacher's own, 1 for a part of another shape.

    classifies: a single output is class scores (or their probabilities) even where it is not named `logits`.
    """
    masks = call.masks()
    answers, targets = answers_of(answer), answers_of(target)
    named = named_logits(target)
    found = targets[0] if named is None and classifies else None
    total = torch.zeros((), dtype=torch.float32, device=targets[0].device if targets else None)
    for index, wanted in enumerate(targets):
        if index >= len(answers) or answers[index].shape != wanted.shape:
            total = total + 1.0
            continue
        loss = _class_loss if wanted is named else _found_scores_loss if wanted is found else tensor_loss
        total = total + loss(answers[index], wanted, masks)
    return total / max(1, len(targets))


@torch.no_grad()
def held_out_loss(
    student: nn.Module, calls: Sequence[Call], target_of: Callable[[int], Any], *, classifies: bool
) -> float:
    """The mean `answer_loss` of a student over calls, by their samples.

    target_of: the teacher's output by the number of the call.
    """
    lost = 0.0
    for index, call in enumerate(calls):
        answer = run(student, call)
        lost += call.batch_size * float(answer_loss(answer, target_of(index), call, classifies=classifies))
    return lost / max(1, sum(call.batch_size for call in calls))


def comparable(output: Any) -> Any:
    """A model's output without the caches of keys and values, which are of no use here and take memory."""
    if isinstance(output, Mapping):
        return {name: part for name, part in output.items() if float_outputs(part)}
    return output


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
    """Divergence of the class probabilities that scores stand for."""
    return class_divergence(*(log_softmax(_rows(scores, masks).float(), dim=-1) for scores in (got, target)))


def _found_scores_loss(got: Tensor, target: Tensor, masks: Masks) -> Tensor:
    """Loss of an output that is class scores by the name of a layer, raw or behind a softmax or a sigmoid.

    Raw ones may be numbers of another kind, of which a softmax sees no common offset. The less sure it makes the
    answers, the more their squared error counts. After equal steps the divergence of digits is .477, by it alone .473
    and by the sum of both .535; the error of a regressor .00413, .00529 and .00413.
    """
    rows = _rows(target, masks).float()
    if _are_within(rows, 0.0, 1.0):
        if not _are_ones(rows.sum(-1)):
            return tensor_loss(got, target, masks)
        return class_divergence(*(_rows(p.float(), masks).clamp_min(LEAST_PROBABILITY).log() for p in (got, target)))
    divergence = _class_loss(got, target, masks)
    if _are_within(rows, -torch.inf, 0.0) and _are_ones(rows.exp().sum(-1)):
        return divergence
    return divergence.lerp(tensor_loss(got, target, masks), _uncertainty(rows))


def _uncertainty(scores: Tensor) -> Tensor:
    """Mean entropy of the probabilities that scores (rows, classes) stand for, as a share of the largest possible."""
    entropy: Tensor = torch.special.entr(scores.softmax(-1)).sum(-1)
    mean = entropy[entropy.isfinite()].mean().nan_to_num()  # a row that is all masked has none
    return mean / math.log(max(2, scores.shape[-1]))


def _are_within(rows: Tensor, low: float, high: float) -> bool:
    return bool(((rows >= low) & (rows <= high)).all())


def _are_ones(sums: Tensor) -> bool:
    return bool(((sums - 1).abs() < SUM_TOLERANCE).all())
