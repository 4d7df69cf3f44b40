"""What a student's answers lose: nothing for the teacher's own, one for a constant, and nothing for padding."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from panther.batches import Call
from panther.healers.losses import answer_loss, held_out_loss, tensor_loss

CALL = Call((torch.zeros(1),))
SHAPES = [(), (6,), (6, 5), (4, 7, 5), (4, 3, 6, 6)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_teachers_own_answer_loses_nothing(shape: tuple[int, ...]) -> None:
    y = torch.randn(shape)
    assert float(tensor_loss(y, y.clone(), {})) == 0.0


def test_hidden_states_beside_logits_are_no_answers_and_alone_they_are() -> None:
    logits, hidden = torch.randn(6, 4), torch.randn(6, 3, 5)
    target, got = ({"logits": logits, "encoder_last_hidden_state": h, "boxes": b} for h, b in [(hidden, logits)] * 2)
    got["encoder_last_hidden_state"] = torch.randn(6, 3, 5)
    assert float(answer_loss(got, target, CALL, classifies=True)) == 0.0
    got["boxes"] = torch.randn(6, 4)
    assert float(answer_loss(got, target, CALL, classifies=True)) > 0.1
    alone = ({"last_hidden_state": torch.randn(6, 3, 5)} for _ in range(2))
    assert float(answer_loss(*alone, CALL, classifies=False)) > 0.1


@pytest.mark.parametrize(("shape", "lost"), [((64, 5), 1.0), ((32, 3, 6, 6), 1.0), ((16, 7, 5), 2.0)])
def test_the_mean_answer_loses_one_and_of_a_sequence_one_more_for_its_mean(shape: tuple[int, ...], lost: float) -> None:
    y = torch.randn(shape) + 3
    rows = y.flatten(1) if y.dim() > 3 else y.reshape(-1, shape[-1])
    mean = rows.mean(0).expand_as(rows).reshape(shape)
    assert float(tensor_loss(mean, y, {})) == pytest.approx(lost, rel=1e-4)


def test_the_loss_does_not_depend_on_the_scale_or_the_offset_of_the_answers() -> None:
    y, error = torch.randn(50, 6), torch.randn(50, 6)
    plain = float(tensor_loss(y + 0.1 * error, y, {}))
    assert plain == pytest.approx(0.01, rel=0.5)
    assert float(tensor_loss(1000 * y + 100 * error + 7, 1000 * y + 7, {})) == pytest.approx(plain, rel=1e-3)


def test_a_call_counts_by_its_samples() -> None:
    few, many = torch.randn(2, 4), torch.randn(30, 4)
    student = nn.Linear(4, 4, bias=False)
    calls = [Call((few,)), Call((many,))]
    each = [held_out_loss(student, [call], lambda _, c=call: c.args[0], classifies=False) for call in calls]
    both = held_out_loss(student, calls, lambda index: calls[index].args[0], classifies=False)
    assert both == pytest.approx((2 * each[0] + 30 * each[1]) / 32) and each[0] != pytest.approx(each[1])


def test_padding_counts_for_nothing() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    y = torch.randn(2, 3, 4)
    got = torch.where(mask[..., None], y, 1e6)
    assert float(tensor_loss(got, y, {(2, 3): mask})) == 0.0
    assert float(tensor_loss(got + mask[..., None], y, {(2, 3): mask})) > 0


def test_values_that_the_teacher_masks_out_count_for_nothing_and_have_no_gradient() -> None:
    y = torch.randn(3, 4)
    y[:, 2] = -torch.inf
    got = torch.zeros(3, 4, requires_grad=True)
    loss = tensor_loss(got, y, {})
    loss.backward()
    assert bool(loss.isfinite()) and got.grad is not None
    assert bool(got.grad.isfinite().all()) and bool((got.grad[:, 2] == 0).all()) and bool((got.grad[:, 0] != 0).any())


@pytest.mark.parametrize("y", [torch.ones(5, 3), torch.zeros(5, 3), torch.ones(1, 3)], ids=["constant", "zero", "row"])
def test_answers_without_variance_have_a_finite_loss(y: Tensor) -> None:
    assert 0 < float(tensor_loss(y + 0.01, y, {})) < 1e38


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_float32(dtype: torch.dtype) -> None:
    """The squares of 300 are beyond float16."""
    y = 300 * torch.randn(64, 8).to(dtype)
    loss = tensor_loss(y * 0.5, y, {})
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx(0.25, rel=0.05)


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


def test_class_scores_count_by_their_probabilities() -> None:
    """Adding a number to all scores of a row changes no probability."""
    y = torch.randn(20, 5)
    shifted = y + torch.arange(20.0)[:, None]
    assert float(answer_loss({"logits": shifted}, {"logits": y}, CALL, classifies=True)) == pytest.approx(0, abs=1e-5)
    assert float(answer_loss(shifted, y, CALL, classifies=False)) > 1
    mean = y.softmax(-1).mean(0).log().expand_as(y)
    assert float(answer_loss({"logits": mean}, {"logits": y}, CALL, classifies=True)) == pytest.approx(1.0, rel=1e-4)


def test_class_scores_that_hardly_differ_lose_nothing_and_not_less() -> None:
    """A held-out figure below zero would end the training in an error. In float32 a third of these come out so."""
    for scores in 1e-3 * torch.randn(30, 8, 5):
        same = {"logits": scores + 1e-6 * torch.randn(8, 5)}
        assert 0.0 <= float(answer_loss(same, {"logits": scores}, CALL, classifies=True)) < 1e-3


def test_scores_that_nothing_names_count_as_numbers_too_the_more_the_less_sure_they_are() -> None:
    """They may be what a regressor answers whose last layer is called `head`."""
    y = torch.randn(200, 5) + 1
    lost = [float(answer_loss(scale * y + 1, scale * y, CALL, classifies=True)) for scale in (1.0, 3.0, 30.0)]
    assert lost[0] > 0.5 and 0.1 > lost[1] > 0.001 > lost[2]
    assert float(answer_loss(y.mean(0).expand_as(y), y, CALL, classifies=True)) == pytest.approx(1.0, rel=0.1)


def test_the_output_of_a_softmax_counts_by_its_divergence_and_is_not_squashed_again() -> None:
    scores, other = torch.randn(2, 20, 5)
    wanted = float(answer_loss({"logits": other}, {"logits": scores}, CALL, classifies=True))
    for squash in (lambda s: s.softmax(-1), lambda s: s.log_softmax(-1)):
        lost = float(answer_loss(squash(other), squash(scores), CALL, classifies=True))
        assert lost == pytest.approx(wanted, rel=1e-4)
        mean = scores.softmax(-1).mean(0).expand_as(scores)
        mean = mean if float(squash(scores).max()) > 0 else mean.log()
        assert float(answer_loss(mean, squash(scores), CALL, classifies=True)) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_probabilities_that_underflow_stay_finite(dtype: torch.dtype) -> None:
    scores = 300 * torch.randn(20, 5)
    got = (-scores).clone().requires_grad_()
    loss = answer_loss(got.to(dtype).softmax(-1), scores.softmax(-1).to(dtype), CALL, classifies=True)
    loss.backward()
    assert bool(loss.isfinite()) and got.grad is not None and bool(got.grad.isfinite().all())


def test_sigmoids_count_as_numbers() -> None:
    """A softmax over 360 values between 0 and 1 makes nearly the same of any."""
    y = (8 * torch.randn(40, 360) - 20).sigmoid()
    got = y.roll(1, 0)
    assert float(answer_loss(got, y, CALL, classifies=True)) == float(tensor_loss(got, y, {})) > 1


def test_the_unit_of_scores_that_hardly_differ_is_their_own_divergence() -> None:
    y = 0.1 * torch.randn(128, 20)
    mean = y.softmax(-1).mean(0).log().expand_as(y)
    assert float(answer_loss({"logits": mean}, {"logits": y}, CALL, classifies=True)) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("rows", [1, 4, 32])
def test_rows_that_agree_do_not_blow_the_loss_up(rows: int) -> None:
    """An error in them counts no more than in rows with two answers in turn, up to their own unit."""
    y = torch.tensor([9.0, 0.0]).expand(rows, 2) + 0.1 * torch.randn(rows, 2)
    wrong = {"logits": y - torch.tensor([6.0, 0.0])}
    assert float(answer_loss(wrong, {"logits": y}, CALL, classifies=True)) < 2.0


def test_logits_are_known_by_their_name_and_other_outputs_count_as_numbers() -> None:
    y = Output(torch.randn(20, 5), torch.randn(20, 6))
    shifted = Output(y.logits + 3, y.hidden)
    assert float(answer_loss(shifted, y, CALL, classifies=False)) == pytest.approx(0.0, abs=1e-5)
    wrong = Output(y.logits, y.hidden.mean(0).expand_as(y.hidden))
    assert float(answer_loss(wrong, y, CALL, classifies=False)) == pytest.approx(0.5, rel=1e-4)  # one of two outputs


def test_classes_that_the_teacher_rules_out_stay_finite() -> None:
    y = torch.randn(6, 4)
    y[:, 0] = -torch.inf
    got = torch.randn(6, 4, requires_grad=True)
    loss = answer_loss(got, y, CALL, classifies=True)
    loss.backward()
    assert bool(loss.isfinite()) and got.grad is not None and bool(got.grad.isfinite().all())


def test_outputs_of_another_shape_or_none_lose_one_and_integers_are_left_out() -> None:
    y = {"a": torch.randn(4, 3), "index": torch.arange(4), "b": torch.randn(4, 2)}
    other = {"a": torch.randn(4, 5), "index": torch.arange(4), "b": y["b"]}
    assert float(answer_loss(other, y, CALL, classifies=False)) == 0.5  # the mean of both
    assert float(answer_loss({"a": y["a"]}, y, CALL, classifies=False)) == 0.5


def test_no_numbers_are_no_loss() -> None:
    assert float(answer_loss(torch.arange(3), torch.arange(3), CALL, classifies=False)) == 0.0
