"""BatchNorm statistics after compression: nearer to the dense model or left alone, and nothing else is touched."""

import copy

import pytest
import torch
from torch import nn

from panther import batchnorm
from panther.batches import Call, as_call
from panther.batchnorm import Reestimated, reestimate


def net(norm=nn.BatchNorm2d):
    """Convolutions and norms whose statistics are of data like that of `calls`."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        norm(12),
        nn.ReLU(),
        nn.Conv2d(12, 10, 3, padding=1),
        norm(10),
        nn.ReLU(),
        nn.Conv2d(10, 6, 3),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 8),
        nn.BatchNorm1d(8),
        nn.Linear(8, 5),
    )
    with torch.no_grad():
        for _ in range(40):
            model(torch.randn(32, 3, 8, 8))  # in training mode: the norms learn
    return model.eval()


def calls(count=4, size=16, *, seed=1, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return [as_call(torch.randn(size, 3, 8, 8, generator=generator) + shift) for _ in range(count)]


def damaged(model, layer="3", scale=0.5, shift=0.3):
    """A copy one of whose layers answers smaller and shifted, as after a coarse compression."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_submodule(layer).weight.mul_(scale)
        other.get_submodule(layer).bias.add_(shift)
    return other


def statistics(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "running" in name}


def norm_inputs(model, name, given):
    """Output of a norm before its scale and shift, channel by channel."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        for call in given:
            model(*call.args)
    hook.remove()
    norm, rows = model.get_submodule(name), torch.cat(seen).transpose(0, 1).flatten(1).double()
    return (rows - norm.running_mean.double()[:, None]) / (norm.running_var.double() + norm.eps).sqrt()[:, None]


def test_a_damaged_layer_is_corrected_by_the_norm_behind_it():
    dense = net()
    student = damaged(dense)
    done = reestimate(student, calls(), dense=dense, held_out=calls(2, seed=5))
    # a scale and a shift is all that was wrong, and just what a norm can put right
    assert done.after < 1e-6 and done.before > 1e-2
    assert done.norms == ("4",) and done.note == ""


def test_the_output_of_a_corrected_norm_is_the_nearest_to_the_dense_one_that_a_scale_and_a_shift_can_give():
    dense = net()
    student = copy.deepcopy(dense)
    with torch.no_grad():
        student[0].weight[:, 0] = 0  # not to be put right by a norm
    given = calls()
    done = reestimate(student, given, dense=dense, held_out=calls(2, seed=5))
    assert done.norms == ("1", "4", "10") and done.after < done.before
    wanted, got = (norm_inputs(model, "1", given) for model in (dense, student))
    rest = got - wanted
    # least squares: what is left has no mean, and nothing in common with what there is
    torch.testing.assert_close(rest.mean(1), torch.zeros(12, dtype=torch.float64), rtol=0, atol=1e-5)
    shared = ((rest - rest.mean(1, keepdim=True)) * got).mean(1) / got.var(1)
    torch.testing.assert_close(shared, torch.zeros(12, dtype=torch.float64), rtol=0, atol=1e-5)


def test_calibration_data_unlike_the_training_data_teaches_nothing_of_its_own():
    dense = net()
    student = damaged(dense)
    done = reestimate(student, calls(shift=3.0), dense=dense, held_out=calls(2, seed=5))
    assert done.norms == ("4",) and done.after < 1e-6
    for name, value in statistics(student).items():
        if not name.startswith("4."):
            assert torch.equal(value, dense.state_dict()[name])


def test_norms_before_the_first_changed_layer_keep_their_statistics():
    dense = net()
    student = damaged(dense, "6", scale=0.2)
    assert reestimate(student, calls(), dense=dense, held_out=calls(2, seed=5)).norms == ("10",)
    assert torch.equal(student[1].running_mean, dense[1].running_mean)


def test_flags_hooks_parameters_counters_and_the_dense_model_stay():
    dense, student = net(), damaged(net())
    student.train()
    student[1].eval()
    flags = [module.training for module in student.modules()]
    before, dense_before = copy.deepcopy(student.state_dict()), copy.deepcopy(dense.state_dict())
    assert reestimate(student, calls(), dense=dense, held_out=calls(2, seed=5)).norms
    assert [module.training for module in student.modules()] == flags
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name]) or name in ("4.running_mean", "4.running_var"), name
    assert all(torch.equal(value, dense_before[name]) for name, value in dense.state_dict().items())
    assert not any(module._forward_pre_hooks for model in (dense, student) for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in student.parameters())
    assert student[4].momentum == dense[4].momentum


def test_a_correction_that_does_not_help_is_taken_back(monkeypatch):
    dense, student = net(), damaged(net())
    before = statistics(student)
    errors = iter([0.5, 0.5])
    monkeypatch.setattr(batchnorm, "_error", lambda *_: next(errors))
    done = reestimate(student, calls(), dense=dense, held_out=calls(2, seed=5))
    assert done == Reestimated((), 0.5, 0.5, "the held-out error did not fall, so the statistics were put back")
    assert all(torch.equal(value, before[name]) for name, value in statistics(student).items())


def test_a_failure_while_checking_takes_the_correction_back(monkeypatch):
    dense, student = net(), damaged(net())
    before = statistics(student)
    answers = iter([lambda: 0.5])
    monkeypatch.setattr(batchnorm, "_error", lambda *_: next(answers)())
    with pytest.raises(StopIteration):
        reestimate(student, calls(), dense=dense, held_out=calls(2, seed=5))
    assert all(torch.equal(value, before[name]) for name, value in statistics(student).items())


def test_a_failing_call_leaves_everything_as_it_was():
    dense, student = net(), damaged(net())
    before = statistics(student)
    with pytest.raises(RuntimeError):
        reestimate(student, [*calls(1), as_call(torch.randn(2, 4, 8, 8))], dense=dense, held_out=calls(1))
    assert all(torch.equal(value, before[name]) for name, value in statistics(student).items())
    assert not any(module._forward_pre_hooks for model in (dense, student) for module in model.modules())


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False))]
)
def test_without_statistics_nothing_runs(model):
    never = iter(lambda: pytest.fail("a batch was asked for"), None)
    done = reestimate(copy.deepcopy(model), never, dense=model, held_out=[])
    assert done == Reestimated(note="the model has no BatchNorm that holds statistics")


def test_a_model_that_computes_the_same_is_left_alone():
    dense = net()
    student = copy.deepcopy(dense)
    done = reestimate(student, calls(), dense=dense, held_out=calls(1))
    assert done == Reestimated(note="the inputs of all BatchNorms are those of the dense model")
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in statistics(student).items())


def test_held_out_calls_are_needed():
    with pytest.raises(ValueError, match="held_out is empty; give calls"):
        reestimate(damaged(net()), calls(), dense=net(), held_out=[])


def test_one_sample_a_batch_is_enough_where_there_are_positions():
    dense = net()
    student = damaged(dense)
    # BatchNorm1d sees one value a channel at a time here: its moments come from all batches together
    done = reestimate(student, calls(24, 1), dense=dense, held_out=calls(2, seed=5))
    assert done.norms == ("4",) and done.after < 1e-6


def test_a_single_value_a_channel_has_no_variance_and_changes_nothing():
    dense = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    student = damaged(dense, "0")
    one = [as_call(torch.randn(1, 3))]
    assert reestimate(student, one, dense=dense, held_out=one).norms == ()
    assert torch.equal(student[1].running_var, dense[1].running_var)


def test_no_batch_at_all_changes_nothing():
    dense = net()
    assert reestimate(damaged(dense), [], dense=dense, held_out=calls(1)).norms == ()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_is_left_out(bad):
    dense = net()
    spoilt = as_call(torch.full((4, 3, 8, 8), bad))
    alone, beside = damaged(dense), damaged(dense)
    reestimate(alone, calls(), dense=dense, held_out=calls(2, seed=5))
    done = reestimate(beside, [*calls(), spoilt], dense=dense, held_out=calls(2, seed=5))
    assert done.norms == ("4",)
    assert all(torch.equal(value, statistics(alone)[name]) for name, value in statistics(beside).items())


def test_a_model_whose_outputs_are_not_finite_keeps_its_statistics():
    dense, student = net(), damaged(net())
    with torch.no_grad():
        student[11].weight.fill_(float("nan"))
    before = statistics(student)
    done = reestimate(student, calls(), dense=dense, held_out=calls(2, seed=5))
    assert done.norms == () and done.before == float("inf")
    assert all(torch.equal(value, before[name]) for name, value in statistics(student).items())


def test_a_channel_that_died_keeps_its_scale():
    dense = net()
    student = copy.deepcopy(dense)
    with torch.no_grad():
        student[3].weight[0] = 0
        student[0].weight[:, 1] *= 0.5
        student[3].bias[0] = 7.0
    reestimate(student, calls(), dense=dense, held_out=calls(2, seed=5))
    assert torch.isfinite(student[4].running_var).all()
    assert float(student[4].running_var[0]) == pytest.approx(float(dense[4].running_var[0]))


class Frozen(nn.BatchNorm2d):
    """As detection models have them: never in training mode, and with a forward of its own."""

    def train(self, mode=True):
        return super().train(False)

    def forward(self, x):
        scale = self.weight / (self.running_var + self.eps).sqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[None, :, None, None] + shift[None, :, None, None]


def frozen_net():
    dense = net()
    for index in (1, 4):
        frozen = Frozen(dense[index].num_features)
        frozen.load_state_dict(dense[index].state_dict())
        dense[index] = frozen
    return dense


def synchronised_net():
    return nn.SyncBatchNorm.convert_sync_batchnorm(net())


@pytest.mark.parametrize("build", [frozen_net, synchronised_net])
def test_frozen_and_synchronised_norms_are_corrected_too(build):
    dense = build().eval()
    student = damaged(dense)
    done = reestimate(student, calls(), dense=dense, held_out=calls(2, seed=5))
    assert done.norms == ("4",) and done.after < 1e-6 and not student[4].training


def test_a_norm_that_is_run_twice_is_corrected_for_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)

        def forward(self, x):
            return self.norm(input=self.second(self.norm(self.first(x))))

    torch.manual_seed(0)
    dense = Twice().eval()
    student = copy.deepcopy(dense)
    with torch.no_grad():
        student.first.weight.mul_(0.7)
        student.second.weight.mul_(0.7)
    given = [as_call(torch.randn(16, 6)) for _ in range(4)]
    done = reestimate(student, given, dense=dense, held_out=[as_call(torch.randn(16, 6))])
    assert done.norms == ("norm",) and done.after < done.before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_statistics_keep_their_type(dtype):
    dense = net().to(dtype)
    student = damaged(dense, scale=0.25)
    given, held_out = ([Call((call.args[0].to(dtype),)) for call in side] for side in (calls(), calls(2, seed=5)))
    done = reestimate(student, given, dense=dense, held_out=held_out)
    assert done.after < done.before
    assert student[4].running_var.dtype == student[4].running_mean.dtype == dtype
