"""Quantised layers in ONNX files: whole numbers of standard operators, which onnxruntime reads as the model does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from panther import chains
from panther.converters import onnx as writer
from panther.converters.onnx import write
from panther.nn import QUANTISED, SKETCHED, QuantisedLinear
from panther.nn.on_grid import corrected
from panther.quantise import to_nearest
from panther.spec import Grid

pytestmark = pytest.mark.filterwarnings("ignore:.*would be smaller:UserWarning")  # layers this small hardly pay


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 130), nn.ReLU(), nn.Linear(130, 64, bias=False), nn.Tanh(), nn.Linear(64, 10))


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 20, 3, padding=1), nn.ReLU(), nn.Conv2d(20, 8, 3, stride=2, bias=False))


def with_whole(model: nn.Sequential, grid: Grid) -> nn.Sequential:
    """Every layer in whole numbers."""
    small = [
        QUANTISED[type(m)].from_dense(m, bits=grid.bits, group_size=grid.group_size) if type(m) in QUANTISED else m
        for m in model
    ]
    return nn.Sequential(*small).eval()


def with_chains(model: nn.Sequential, grid: Grid) -> nn.Sequential:
    """The second last layer as a chain of whole numbers."""
    small = list(model)
    place = 2
    dense: Any = small[place]
    sketch = SKETCHED[type(dense)].from_dense(dense, rank=6)
    parts = [to_nearest(weight.detach().flatten(1), grid) for weight in sketch.active_weights()]
    small[place] = QUANTISED[type(dense)].from_rounded(dense, sketch.scheme, parts, dense.bias)
    return nn.Sequential(*small).eval()


def with_correction(model: nn.Sequential, grid: Grid) -> nn.Sequential:
    small = list(model)
    dense: Any = small[0]
    whole = to_nearest(dense.weight.detach(), grid)
    chain = corrected(dense, (dense.weight.detach() - whole.matrix()).double(), 8)
    factors = [to_nearest(t.detach(), Grid(8)) for t in (chain.down, chain.up)]
    small[0] = QuantisedLinear.from_rounded(dense, chains.CORRECTED, [whole, *factors], dense.bias)
    return nn.Sequential(*small).eval()


def test_layers_of_equal_weights_are_both_whole_numbers_in_the_file(tmp_path: Path) -> None:
    dense = nn.Linear(16, 16)
    small = nn.Sequential(*(QuantisedLinear.from_dense(dense) for _ in range(2)))
    report = write(small.eval(), tmp_path / "small.onnx", torch.randn(4, 16))
    assert report.ok and not report.notes


def inputs(model: nn.Sequential) -> Tensor:
    return torch.randn((4, 96) if isinstance(model[0], nn.Linear | QuantisedLinear) else (2, 3, 9, 8))


def kinds(path: Path) -> dict[str, set[str]]:
    """Operator types of a file, and the element types of its initializers."""
    graph = onnx.load(path).graph
    types = onnx.TensorProto.DataType
    return {
        "operators": {node.op_type for node in graph.node},
        "numbers": {types.Name(t.data_type) for t in graph.initializer if len(t.dims) > 1},
    }


@pytest.mark.parametrize("grid", [Grid(16), Grid(8), Grid(4), Grid(4, 32), Grid(8, 64), Grid(3), Grid(3, 32)], ids=str)
@pytest.mark.parametrize("make", [with_whole, with_chains, with_correction], ids=lambda f: f.__name__)
@pytest.mark.parametrize("build", [net, conv_net], ids=lambda f: f.__name__)
def test_onnxruntime_agrees_and_the_file_holds_whole_numbers(build: Any, make: Any, grid: Grid, tmp_path: Path) -> None:
    if make is with_correction and build is conv_net:
        pytest.skip("a convolution has no correction")
    dense = build()
    small = make(dense, grid)
    report = write(small, tmp_path / "small.onnx", inputs(dense))
    assert report.ok and report.checks and all(check.ok for check in report.checks), report.notes
    found = kinds(report.path)
    assert ("Cast" if grid.bits == 16 else "DequantizeLinear") in found["operators"]
    assert {16: "BFLOAT16", 8: "INT8"}.get(grid.bits, "INT4") in found["numbers"]
    assert any("weights of 3 bits take 4 in the file: ONNX has no int3" in n for n in report.notes) == (grid.bits == 3)
    assert not any("float numbers in the file" in note for note in report.notes)
    whole = write(dense.eval(), tmp_path / "dense.onnx", inputs(dense))
    if make is with_whole:
        assert "FLOAT" not in found["numbers"] or grid.group_size is not None  # whose scales are a matrix
        assert report.size_bytes < whole.size_bytes


def test_an_opset_without_int4_takes_a_byte_a_number_and_says_so(tmp_path: Path) -> None:
    small = with_whole(net(), Grid(4))
    report = write(small, tmp_path / "small.onnx", inputs(small), opset=18)
    assert report.ok and report.opset == 18 and "INT8" in kinds(report.path)["numbers"]
    assert any("weights of 4 bits take 8 in the file: opset 18" in note for note in report.notes)


def test_an_opset_without_blocks_keeps_floats_and_says_so(tmp_path: Path) -> None:
    small = with_whole(net(), Grid(8, 32))
    report = write(small, tmp_path / "small.onnx", inputs(small), opset=18)
    assert report.ok and kinds(report.path)["numbers"] == {"FLOAT"}
    assert any("3 of 3 quantised weights are float numbers in the file: opset 18 can" in note for note in report.notes)


@pytest.mark.parametrize(
    ("dtype", "grid", "told"),
    [
        (torch.float16, Grid(8), "float numbers in the file: opset 18 .*, use 19 or later"),
        (torch.float16, Grid(4), "float numbers in the file: opset 18 .*, use 19 or later"),
        (torch.float32, Grid(4, 32), "float numbers in the file: opset 18 .*, use 21 or later"),
        (torch.float32, Grid(4), "weights of 4 bits take 8 in the file: opset 18"),
        (torch.float32, Grid(3), "weights of 3 bits take 8 in the file: opset 18"),
        (torch.float64, Grid(4), "float numbers in the file: ONNX has no scales of float64"),
    ],
    ids=str,
)
def test_an_old_opset_is_told_of_once_and_with_the_one_to_use(
    dtype: torch.dtype, grid: Grid, told: str, tmp_path: Path
) -> None:
    model = with_whole(nn.Sequential(nn.Linear(64, 32)).to(dtype), grid)
    report = write(model, tmp_path / "old.onnx", torch.randn(3, 64, dtype=dtype), opset=18)
    notes = [note for note in report.notes if "float numbers" in note or "bits take" in note]
    assert len(notes) == 1 and re.search(told, notes[0]), report.notes


class Tokens(nn.Module):
    """Linear layers over (batch, tokens, features), as in a transformer: the exporter turns their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(96, 200), nn.Linear(200, 96, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.down(self.up(x).relu())
        return answer


@pytest.mark.parametrize("grid", [Grid(8), Grid(4), Grid(4, 32)], ids=str)
def test_weights_that_the_exporter_turns_are_whole_numbers_too(grid: Grid, tmp_path: Path) -> None:
    model = Tokens().eval()
    for name in ("up", "down"):
        layer = QuantisedLinear.from_dense(getattr(model, name), bits=grid.bits, group_size=grid.group_size)
        setattr(model, name, layer.eval())
    report = write(model, tmp_path / "tokens.onnx", torch.randn(2, 5, 96))
    assert report.ok and not any("float numbers" in note for note in report.notes), report.notes
    found = kinds(report.path)["numbers"]
    assert ("INT4" if grid.bits == 4 else "INT8") in found and ("FLOAT" not in found or grid.group_size is not None)


@pytest.mark.parametrize("grid", [Grid(8), Grid(4)], ids=str)
def test_a_batch_norm_that_the_exporter_multiplies_in_goes_to_the_scales(grid: Grid, tmp_path: Path) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(24)
    nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
    nn.init.uniform_(norm.running_var, 0.5, 2)  # type: ignore[arg-type]
    nn.init.normal_(norm.weight)  # also negative ones
    model = with_whole(nn.Sequential(nn.Conv2d(16, 24, 3, bias=False), norm, nn.ReLU(), nn.Conv2d(24, 8, 3)), grid)
    report = write(model, tmp_path / "normed.onnx", torch.randn(2, 16, 9, 8))
    assert report.ok, report.checks
    assert kinds(report.path)["numbers"] == {"INT4" if grid.bits == 4 else "INT8"}


def test_a_layer_whose_name_ends_alike_keeps_its_own_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.ReLU(), nn.Linear(64, 64)), nn.Linear(64, 64)).eval()
    model[1] = QuantisedLinear.from_dense(model[1]).eval()
    assert write(model, tmp_path / "named.onnx", torch.randn(4, 64)).ok


@pytest.mark.parametrize(
    ("dtype", "opset", "numbers"),
    [(torch.bfloat16, None, "FLOAT"), (torch.float16, 18, "FLOAT16"), (torch.float64, None, "DOUBLE")],
)
def test_scales_of_other_types_are_written_or_the_weight_stays(
    dtype: torch.dtype, opset: int | None, numbers: str, tmp_path: Path
) -> None:
    """What onnxruntime cannot run in such a type is not panther's matter: only that the file is right where it can."""
    model = with_whole(nn.Sequential(nn.Linear(64, 32)).to(dtype), Grid(8))
    x = torch.randn(3, 64, dtype=dtype)
    dense = nn.Sequential(model[0].to_dense()).eval()
    try:
        expected = write(dense, tmp_path / "dense.onnx", x, opset=opset).ok
    except Exception as error:
        with pytest.raises(type(error)):
            write(model, tmp_path / "small.onnx", x, opset=opset)
        return
    report = write(model, tmp_path / "small.onnx", x, opset=opset)
    assert report.ok == expected and kinds(report.path)["numbers"] == {numbers}


def test_a_model_that_is_itself_the_layer_is_written(tmp_path: Path) -> None:
    layer = QuantisedLinear.from_dense(nn.Linear(40, 30), bits=4).eval()
    report = write(layer, tmp_path / "layer.onnx", torch.randn(3, 40))
    assert report.ok and kinds(report.path)["numbers"] == {"INT4"}


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def adds_in_16_bits() -> bool:
    """Without VNNI onnxruntime adds products of bytes in pairs on x86, which overflow: docs/quantisation.md."""
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text() if cpu.exists() else ""
    return "avx2" in flags and "vnni" not in flags


def test_rounded_inputs_become_products_of_whole_numbers(tmp_path: Path) -> None:
    model, x = with_whole(net(), Grid(8)), torch.randn(4, 96)
    report = write(model, tmp_path / "whole.onnx", x, round_inputs=True, batches=[torch.randn(4, 96)])
    assert report.ok and report.rounding is not None
    assert max(check.max_rel for check in report.checks) <= report.tolerance  # of the file without that
    found = operators(report.path)
    assert found.count("MatMulInteger") == 3 and not {"DequantizeLinear", "MatMul", "Gemm"} & set(found)
    assert "rms" in str(report) and '"rounding"' in report.to_json()
    wanted = model(x).detach()
    (meant,) = ReferenceEvaluator(str(report.path)).run(None, {onnx.load(report.path).graph.input[0].name: x.numpy()})
    assert (torch.from_numpy(meant) - wanted).norm() < 0.03 * wanted.norm()
    if adds_in_16_bits():
        pytest.skip("the file is right; onnxruntime overflows on this processor")
    assert 0 < report.rounding < 0.03
    session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert (torch.from_numpy(got) - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("order", ["abc", "cba", "bac", "cab", "acb"])
@pytest.mark.parametrize("sizes", [(4, 40), (2, 5, 40)], ids=str)
def test_layers_that_read_the_same_value_share_its_rounding(sizes: tuple[int, ...], order: str, tmp_path: Path) -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in order:  # the order of the weights in the file
                self.add_module(name, QuantisedLinear.from_dense(nn.Linear(40, 40, bias=name != "b"), bits=8))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            inner = self.a(x)
            return self.b(inner), self.c(inner)

    report = write(Three().eval(), tmp_path / "three.onnx", torch.randn(sizes), round_inputs=True)
    found = operators(report.path)
    assert report.ok and (found.count("MatMulInteger"), found.count("DynamicQuantizeLinear")) == (3, 2)


def test_a_layer_that_runs_often_is_in_the_file_once(tmp_path: Path) -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = QuantisedLinear.from_dense(nn.Linear(128, 128), bits=8)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(5):
                x = self.layer(x).tanh()
            return x

    report = write(Again().eval(), tmp_path / "again.onnx", torch.randn(4, 128), round_inputs=True)
    assert report.ok and operators(report.path).count("MatMulInteger") == 5
    assert report.size_bytes < 2 * 128 * 128


def test_other_nodes_of_that_kind_and_branches_stay_as_they_are(tmp_path: Path) -> None:
    class Faked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = QuantisedLinear.from_dense(nn.Linear(24, 24), bits=8)
            self.second = QuantisedLinear.from_dense(nn.Linear(24, 24), bits=8)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.fake_quantize_per_tensor_affine(self.first(x), 0.05, 0, -128, 127)
            return torch.cond(x.sum() > 0, self.second, lambda x: x - 1, (x,))

    report = write(Faked().eval(), tmp_path / "faked.onnx", torch.randn(4, 24), round_inputs=True)
    found = operators(report.path)
    assert report.ok and found.count("MatMulInteger") == 1 and "QuantizeLinear" in found
    assert any("1 quantised weights are read as before" in note for note in report.notes)


@pytest.mark.parametrize("fails", [False, True])
def test_the_rounded_file_is_judged_on_all_batches_and_failing_is_no_success(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(QuantisedLinear.from_dense(nn.Linear(16, 8), bits=8)).eval()
    model[0].stored[0].values[:, 0] = 0
    large = torch.randn(4, 16)
    large[:, 0] = 1e4  # all else is rounded to nothing beside it, and nothing reads it
    if fails:
        usual, calls = writer._session, []

        def session(file: Path, *, exact: bool) -> Any:
            calls.append(file)
            return usual(file, exact=exact) if len(calls) < 3 else None  # exact, as usual, and then the rounded file

        monkeypatch.setattr(writer, "_session", session)
    given = iter([torch.randn(4, 16) if fails else large])  # which can be read once
    report = write(model, tmp_path / "judged.onnx", torch.randn(4, 16), round_inputs=True, batches=given)
    assert not report.ok and all(check.ok for check in report.checks)
    assert report.rounding is not None and report.rounding > 0.5
    assert "agrees with" in str(report) and "MORE than" in str(report)


@pytest.mark.parametrize(
    ("build", "grid"),
    [(net, Grid(4)), (net, Grid(8, 64)), (conv_net, Grid(8))],
    ids=["4 bits", "groups", "convolutions"],
)
def test_what_cannot_be_multiplied_in_whole_numbers_stays_and_is_told(build: Any, grid: Grid, tmp_path: Path) -> None:
    model = with_whole(build(), grid)
    report = write(model, tmp_path / "kept.onnx", inputs(model), round_inputs=True)
    assert report.ok and report.rounding is None and "MatMulInteger" not in operators(report.path)
    assert any("round_inputs changed nothing" in note for note in report.notes)


def test_the_rest_of_a_mixed_model_is_told(tmp_path: Path) -> None:
    model = with_whole(net(), Grid(8))
    model[4] = QuantisedLinear.from_dense(nn.Linear(64, 10), bits=4)
    report = write(model.eval(), tmp_path / "mixed.onnx", torch.randn(4, 96), round_inputs=True)
    assert report.ok and operators(report.path).count("MatMulInteger") == 2
    assert any(note.startswith("1 quantised weights are read as before") for note in report.notes)


def test_a_model_that_rounded_inputs_break_is_no_success(tmp_path: Path) -> None:
    model = nn.Sequential(QuantisedLinear.from_dense(nn.Linear(16, 8), bits=8)).eval()
    x = torch.randn(4, 16)
    x[0, 0] = 1e4  # beside which everything else is rounded to nothing
    report = write(model, tmp_path / "well.onnx", x, round_inputs=True, batches=[x[1:] / 1e3])
    assert report.ok
    x[:, 0] = 1e4
    model[0].stored[0].values[:, 0] = 0  # and which is not even read
    report = write(model, tmp_path / "broken.onnx", x, round_inputs=True)
    assert not report.ok and report.rounding is not None and report.rounding > 0.25
    assert report.path.name == "broken.failed.onnx" and not (tmp_path / "broken.onnx").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("opset", [18, None])
def test_bfloat16_needs_no_scales_to_be_written(opset: int | None, dtype: torch.dtype, tmp_path: Path) -> None:
    small = with_whole(net().to(dtype), Grid(16))
    report = write(small, tmp_path / "small.onnx", inputs(net()).to(dtype), opset=opset)
    assert report.ok and "BFLOAT16" in kinds(report.path)["numbers"], report.notes
    assert not any("float numbers in the file" in note for note in report.notes)


def test_a_batch_norm_is_multiplied_to_bfloat16_in_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16)
    norm.running_var = torch.rand(16) + 0.5
    norm.weight.data.uniform_(0.5, 2)
    small = nn.Sequential(QUANTISED[nn.Conv2d].from_dense(conv, bits=16), norm).eval()
    report = write(small, tmp_path / "small.onnx", torch.randn(2, 8, 7, 7))
    assert report.ok and not any("float numbers" in note for note in report.notes), report.notes
    assert "BFLOAT16" in kinds(report.path)["numbers"]
