"""What holds for every writer; a new one is held from its line in WRITERS on, once RUNNERS says how its file is run."""

import pytest
import torch
from torch import nn

from panther.converters import WRITERS, ExportReport
from panther.errors import ExportError
from panther.nn import SKConv2d, SKLinear


def run_onnx(path, x):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.as_tensor(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


# Reads a written file back without panther, and runs it on one input.
RUNNERS = {"onnx": run_onnx}


def network():
    torch.manual_seed(0)
    conv = SKConv2d.from_dense(nn.Conv2d(3, 12, 3, padding=1, stride=2), rank=4, scheme="tucker2")
    head = SKLinear.from_dense(nn.Linear(12 * 16, 10), num_terms=2, low_rank=2)
    head.active_terms = 1
    net = nn.Sequential(conv, nn.BatchNorm2d(12), nn.GELU(), nn.Dropout(0.5), nn.Flatten(), head)
    net[1].running_mean.uniform_(-1, 1)
    return net


@pytest.fixture(scope="module", params=sorted(WRITERS))
def written(request, tmp_path_factory):
    model, folder = network(), tmp_path_factory.mktemp(request.param)
    model[1].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    report = WRITERS[request.param](model, folder / f"net.{request.param}", torch.randn(2, 3, 8, 8))
    return request.param, model, state, flags, report


def test_every_writer_can_be_read_back_here():
    assert set(RUNNERS) == set(WRITERS)


def test_the_report_says_that_the_file_was_checked(written):
    name, _, _, _, report = written
    assert isinstance(report, ExportReport)
    assert report.ok and report.standard_ops and len(report.checks) >= 3
    assert report.path.name == f"net.{name}" and report.size_bytes == report.path.stat().st_size
    assert str(report.path) in str(report)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_file_computes_what_the_model_computes_at_any_batch_size(written, batch):
    name, model, _, _, report = written
    x = torch.randn(batch, 3, 8, 8)
    flags = {module: module.training for module in model.modules()}
    with torch.no_grad():
        wanted = model.eval()(x)
    for module, flag in flags.items():
        module.training = flag
    difference = (RUNNERS[name](report.path, x) - wanted).abs().max()
    assert difference <= report.tolerance * wanted.abs().max()


def test_the_model_is_left_as_it_was(written):
    _, model, state, flags, _ = written
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_a_model_that_cannot_be_written_leaves_nothing_behind(name, tmp_path):
    class Broken(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else x + 1

    with pytest.raises(ExportError):
        WRITERS[name](Broken(), tmp_path / f"net.{name}", torch.randn(2, 4))
    assert list(tmp_path.iterdir()) == []
