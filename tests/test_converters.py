import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from panther.converters import READERS, UnsupportedFormat, compressed, format_of, pickles, read
from panther.converters.compressed import MANIFEST, WEIGHTS, describe_layers, load, save
from panther.converters.huggingface import example_inputs_for
from panther.errors import ExportError, LoadError
from panther.nn import QuantisedLinear, SKConv2d, SKLinear, SKPivotedLinear
from panther.spec import Figures, Plan, Report


class Net(nn.Module):
    """A tied head, a batch norm with buffers, and two layers to sketch."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.fc = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.norm(self.fc(self.embed(ids))))


IDS = torch.tensor([1, 5, 7])


def trained_net():
    net = Net()
    net.norm.running_mean.uniform_()
    return net.eval()


def small():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def assert_same_weights(a, b):
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


# Which format


def make_zip(path, names, packing=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name in names:
            archive.writestr(name, b"x")


def test_content_decides_before_the_extension(tmp_path):
    save_file(small().state_dict(), tmp_path / "weights.pt")
    torch.save(small().state_dict(), tmp_path / "weights.safetensors")
    assert format_of(tmp_path / "weights.pt") == "safetensors"
    assert format_of(tmp_path / "weights.safetensors") == "state_dict"


@pytest.mark.parametrize(
    ("name", "entries", "way_out"),
    [
        ("script.pt", ["m/data.pkl", "m/constants.pkl", "m/code/__torch__/x.py"], "TorchScript.*state_dict.*--model"),
    ],
)
@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_formats_that_are_known_and_not_read_say_what_is_missing(tmp_path, name, entries, way_out, packing):
    make_zip(tmp_path / name, entries, packing)
    with pytest.raises(UnsupportedFormat, match=way_out):
        read(tmp_path / name, model=small)
    with pytest.raises(UnsupportedFormat, match=way_out):
        READERS["state_dict"](tmp_path / name, model=small)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # the file of the test, not what is tested
def test_what_torch_jit_saves_is_known_and_not_read(tmp_path):
    torch.jit.save(torch.jit.trace(small(), torch.randn(1, 4)), tmp_path / "m.pt")  # deflates its code
    with pytest.raises(UnsupportedFormat, match=r"TorchScript.*state_dict.*--model"):
        read(tmp_path / "m.pt", model=small)


def test_an_onnx_file_is_known_and_not_read(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"\x08\x08\x12\x07pytorch")
    with pytest.raises(UnsupportedFormat, match=r"ONNX model.*PyTorch checkpoint"):
        read(tmp_path / "m.onnx")


def test_what_is_no_model_is_refused_with_a_reason(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty.pt").touch()
    make_zip(tmp_path / "other.zip", ["m/readme"])
    os.mkfifo(tmp_path / "pipe.pt")
    for name, reason in {
        "": "without config.json .* or panther.json .*; it holds empty.pt, notes.txt",
        "notes.txt": "no format that panther reads",
        "empty.pt": "0 bytes",
        "missing.pt": "No such file",
        "other.zip": "zip archive that torch.save did not write",
        "pipe.pt": "neither a file nor a folder",
    }.items():
        with pytest.raises(LoadError, match=reason):
            read(tmp_path / name, model=small)


def test_importing_the_formats_imports_no_optional_package():
    heavy = ("onnx", "onnxscript", "onnxruntime", "transformers", "safetensors")
    code = f"import sys, panther.converters; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-W", "ignore", "-c", code], text=True).strip() == "[]"


# State dicts


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_a_state_dict_is_read_plain_nested_and_prefixed(tmp_path, zip_format, wrap, prefix):
    model = small()
    state = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save(wrap(state), tmp_path / "m.pt", _use_new_zipfile_serialization=zip_format)
    assert_same_weights(read(tmp_path / "m.pt", model=small), model)


def test_the_instance_given_is_not_changed_and_the_result_is_in_eval_mode(tmp_path):
    torch.save(small().state_dict(), tmp_path / "m.pt")
    architecture = small()
    before = {name: value.clone() for name, value in architecture.state_dict().items()}
    made = read(tmp_path / "m.pt", model=architecture)
    assert not made.training and architecture.training
    assert not torch.equal(made[0].weight, before["0.weight"])
    assert all(torch.equal(value, before[name]) for name, value in architecture.state_dict().items())


def test_weights_take_the_dtype_of_the_model_and_that_is_said_where_they_grow(tmp_path):
    torch.save(small().half().state_dict(), tmp_path / "m.pt")
    with pytest.warns(UserWarning, match=r"m\.pt: weights are float16 in the file and float32 here"):
        assert read(tmp_path / "m.pt", model=small)[0].weight.dtype == torch.float32
    assert read(tmp_path / "m.pt", model=lambda: small().half())[0].weight.dtype == torch.float16
    torch.save(small().double().state_dict(), tmp_path / "wide.pt")
    assert read(tmp_path / "wide.pt", model=small)[0].weight.dtype == torch.float32


def test_a_model_on_the_meta_device_gets_the_tensors_of_the_file(tmp_path):
    model = trained_net()
    torch.save(model.state_dict(), tmp_path / "m.pt")

    def on_meta():
        with torch.device("meta"):
            return Net()

    made = read(tmp_path / "m.pt", model=on_meta)
    assert made.head.weight is made.embed.weight
    assert torch.equal(made(IDS), model(IDS))


def test_tied_tensors_stay_tied_when_the_file_has_one_of_their_names(tmp_path):
    model = trained_net()
    state = model.state_dict()
    del state["embed.weight"]
    torch.save(state, tmp_path / "m.pt")
    made = read(tmp_path / "m.pt", model=Net)
    assert made.head.weight is made.embed.weight
    assert_same_weights(made, model)


def test_two_values_for_one_tied_tensor_are_refused(tmp_path):
    state = {name: value.clone() for name, value in trained_net().state_dict().items()}
    state["head.weight"] += 1
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(LoadError, match=r"embed.weight and head.weight differ, and this model ties them"):
        read(tmp_path / "m.pt", model=Net)


def test_keys_that_do_not_fit_are_counted_and_listed(tmp_path):
    state = small().state_dict()
    state["extra"] = state.pop("2.bias")
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(LoadError, match=r"1 tensors that the model needs are missing \(2.bias\); 1 .* \(extra\)"):
        read(tmp_path / "m.pt", model=small)
    with pytest.raises(LoadError, match=r"0.weight: file \(3, 4\), model \(3, 5\)"):
        read(tmp_path / "m.pt", model=nn.Sequential(nn.Linear(5, 3)))


def test_a_prefix_that_explains_the_difference_is_named(tmp_path):
    torch.save({f"encoder.{name}": value for name, value in small().state_dict().items()}, tmp_path / "m.pt")
    with pytest.raises(LoadError, match=r"The file's names start with 'encoder.' and the model's do not"):
        read(tmp_path / "m.pt", model=small)
    torch.save(small().state_dict(), tmp_path / "m.pt")
    with pytest.raises(LoadError, match=r"The model's names start with 'encoder.' and the file's do not"):
        read(tmp_path / "m.pt", model=lambda: nn.ModuleDict({"encoder": small()}))


def test_integers_are_not_read_as_real_weights(tmp_path):
    torch.save({name: value.to(torch.int8) for name, value in small().state_dict().items()}, tmp_path / "m.pt")
    with pytest.raises(LoadError, match=r"file torch.int8, model torch.float32"):
        read(tmp_path / "m.pt", model=small)


def test_an_architecture_that_is_missing_or_fails_is_said(tmp_path):
    torch.save(small().state_dict(), tmp_path / "m.pt")
    with pytest.raises(LoadError, match=r"weights only.*--model pkg.mod:factory"):
        read(tmp_path / "m.pt")
    with pytest.raises(LoadError, match="factory Linear, called without arguments, failed"):
        read(tmp_path / "m.pt", model=nn.Linear)
    with pytest.raises(LoadError, match=r"returned dict, expected a torch.nn.Module"):
        read(tmp_path / "m.pt", model=dict)


def test_a_checkpoint_without_tensors_says_which_keys_it_has(tmp_path):
    torch.save({"epoch": 3, "note": "hi"}, tmp_path / "m.pt")
    with pytest.raises(LoadError, match="keys epoch, note: expected tensors by name"):
        read(tmp_path / "m.pt", model=small)
    torch.save([1, 2], tmp_path / "m.pt")
    with pytest.raises(LoadError, match="holds a list, expected a state dict"):
        read(tmp_path / "m.pt", model=small)


# Pickles


@pytest.mark.parametrize("zip_format", [True, False])
def test_a_whole_module_is_refused_by_the_classes_it_names_unless_trusted(tmp_path, zip_format):
    model = small()
    torch.save(model, tmp_path / "m.pt", _use_new_zipfile_serialization=zip_format)
    with pytest.raises(LoadError, match=r"torch.nn.modules.container.Sequential.*--trust-pickle.*state_dict"):
        read(tmp_path / "m.pt", model=small)
    assert_same_weights(read(tmp_path / "m.pt", trust_pickle=True), model)


def test_a_trusted_checkpoint_may_hold_the_module_under_model(tmp_path):
    torch.save({"model": small(), "epoch": 3}, tmp_path / "m.pt")
    assert isinstance(read(tmp_path / "m.pt", trust_pickle=True), nn.Sequential)


def test_a_trusted_pickle_of_code_that_is_not_here_says_so(tmp_path, monkeypatch):
    module = type(sys)("vanished")
    module.Model = type("Model", (nn.Module,), {"__module__": "vanished"})
    monkeypatch.setitem(sys.modules, "vanished", module)
    torch.save(module.Model(), tmp_path / "m.pt")
    monkeypatch.delitem(sys.modules, "vanished")
    with pytest.raises(LoadError, match=r"cannot be unpickled.*vanished.*importable"):
        read(tmp_path / "m.pt", trust_pickle=True)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zip_format", [True, False])
def test_a_pickle_bomb_is_named_and_not_executed(tmp_path, protocol, zip_format):
    state = {**small().state_dict(), "bomb": Bomb(tmp_path / "executed")}
    torch.save(state, tmp_path / "m.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=zip_format)
    with pytest.raises(LoadError, match=r"imports (posix|nt)\.mkdir"):
        read(tmp_path / "m.pt", model=small)
    assert not (tmp_path / "executed").exists()


def test_a_plain_pickle_is_not_loaded(tmp_path):
    (tmp_path / "m.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    for trust in (False, True):
        with pytest.raises(LoadError, match=r"without torch.save's mark"):
            read(tmp_path / "m.pt", model=small, trust_pickle=trust)
    assert not (tmp_path / "executed").exists()


def write_torch_zip(path, pickled):
    """A torch.save file with this pickle in the place of its own."""
    torch.save(small().state_dict(), path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else content)


@pytest.mark.parametrize(
    ("pickled", "reason"),
    [
        (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "holds a list"),  # a list in a list in a list ...
        (b"\x80\x02\x8e" + struct.pack("<Q", 2**60) + b"x.", "damaged"),  # claims 2^60 bytes
        (b"\x80\x02X" + struct.pack("<I", 2**31) + b"x.", "damaged"),  # claims 2 GiB of text
        (b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b".", "holds a NoneType"),  # a memo index of 4 billion
        (b"\x80\x02c__builtin__\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.", "imports builtins.bytearray"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "imports os.system"),
        (b"\x80\x04\x8c\x02osq\x00\x8c\x06systemq\x01h\x00h\x01\x93.", "imports os.system"),
        (b"\x80\x04NN\x93.", "imports <computed>"),
        (b"\x80\x02\x82\x01.", "imports <extension 1>"),
        (b"\x80\x02.", "cannot be read"),  # nothing on the stack
        (b"", "damaged"),
    ],
)
def test_hostile_pickles_end_in_a_load_error(tmp_path, pickled, reason):
    write_torch_zip(tmp_path / "m.pt", pickled)
    with pytest.raises(LoadError, match=reason):
        read(tmp_path / "m.pt", model=small)


def test_a_pickle_that_is_too_long_to_read_is_refused(tmp_path, monkeypatch):
    write_torch_zip(tmp_path / "m.pt", b"\x80\x02" + b"N0" * 1000 + b"N.")
    monkeypatch.setattr(pickles, "MAX_OPCODES", 1000)
    with pytest.raises(LoadError, match="more than 1,000 opcodes"):
        read(tmp_path / "m.pt", model=small)
    monkeypatch.setattr(pickles, "PICKLE_BYTES", 1000)
    with pytest.raises(LoadError, match="a pickle of 2,004 bytes"):
        read(tmp_path / "m.pt", model=small)


def test_a_tensor_that_claims_more_than_its_storage_is_refused(tmp_path):
    path = tmp_path / "m.pt"
    torch.save({"a": torch.ones(3, 4)}, path)
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("m/data.pkl")
    shape = b"K\x03K\x04\x86"
    assert shape in pickled
    write_torch_zip(path, pickled.replace(shape, b"K\x03J\x00\x00\x00\x10\x86"))
    with pytest.raises(LoadError, match="cannot be read"):
        read(path, model=small)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", bytes(10_000_000))
    with pytest.raises(LoadError, match=r"a compressed archive: .* claim to hold 10,000,000"):
        read(tmp_path / "m.pt", model=small)


@pytest.mark.parametrize("zip_format", [True, False])
def test_a_truncated_file_ends_in_a_load_error(tmp_path, zip_format):
    path = tmp_path / "m.pt"
    torch.save(small().state_dict(), path, _use_new_zipfile_serialization=zip_format)
    whole = path.read_bytes()
    for length in (1, 4, 20, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(LoadError):
            read(path, model=small)


def test_random_bytes_end_in_a_load_error(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("m.pt", "m.safetensors"):
        for head in (b"", b"PK\x03\x04", b"\x80\x02"):
            noise = torch.randint(0, 256, (500,), generator=generator, dtype=torch.uint8)
            (tmp_path / name).write_bytes(head + bytes(noise.tolist()))
            with pytest.raises(LoadError):
                read(tmp_path / name, model=small)


# Safetensors


def test_safetensors_are_read_by_the_same_rules(tmp_path):
    model = trained_net()
    state = {f"module.{name}": value for name, value in model.state_dict().items() if name != "head.weight"}
    save_file(state, tmp_path / "m.safetensors")
    made = read(tmp_path / "m.safetensors", model=Net)
    assert made.head.weight is made.embed.weight
    assert_same_weights(made, model)
    with pytest.raises(LoadError, match="does not fit Sequential"):
        read(tmp_path / "m.safetensors", model=small)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**60) + b'{"a":1}',
        struct.pack("<Q", 7) + b'{"a":1}',
        struct.pack("<Q", 68) + b'{"a":{"dtype":"F32","shape":[99999999],"data_offsets":[0,399999996]}}'[:68],
        struct.pack("<Q", 9) + b'{"a": {{}',
    ],
)
def test_a_hostile_safetensors_header_ends_in_a_load_error(tmp_path, content):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(LoadError, match=r"not a whole .safetensors file"):
        read(tmp_path / "m.safetensors", model=small)


def test_a_truncated_safetensors_file_ends_in_a_load_error(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(small().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LoadError, match=r"not a whole .safetensors file"):
        read(path, model=small)


# Hugging Face folders


@pytest.fixture
def bert_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=50, max_position_embeddings=32, **sizes))
    model.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert", model.eval()


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_hugging_face_folder_gives_its_model(bert_folder, capfd):
    folder, model = bert_folder
    capfd.readouterr()
    made = read(folder)
    assert capfd.readouterr() == ("", "")
    assert type(made) is type(model) and not made.training
    assert_same_weights(made, model)


def test_a_folder_that_brings_code_is_refused(bert_folder):
    folder, _ = bert_folder
    edit_json(folder / "config.json", auto_map={"AutoModel": "evil.Model"})
    for trust in (False, True):
        with pytest.raises(LoadError, match=r"auto_map.*code from its folder, which panther does not run"):
            read(folder, trust_pickle=trust)


@pytest.mark.parametrize("name", ["pipeline", "AutoTokenizer", "os.system", "NoSuchModel", 7])
def test_an_architecture_that_is_no_model_is_refused(bert_folder, name):
    folder, _ = bert_folder
    edit_json(folder / "config.json", architectures=[name])
    with pytest.raises(LoadError, match="which is no model of transformers"):
        read(folder)


def test_weights_that_would_be_random_are_refused(bert_folder):
    folder, model = bert_folder
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("pooler")}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"lacks 2 weights of BertModel \(pooler.dense.bias, pooler.dense.weight\)"):
        read(folder)


def test_a_pytorch_bin_of_tensors_is_read_and_one_of_more_is_refused(bert_folder, tmp_path):
    folder, model = bert_folder
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert_same_weights(read(folder), model)
    torch.save({"x": Bomb(tmp_path / "executed")}, folder / "pytorch_model.bin")
    for trust in (False, True):
        with pytest.raises(LoadError, match=r"imports (posix|nt)\.mkdir"):
            read(folder, trust_pickle=trust)
    assert not (tmp_path / "executed").exists()


def test_a_folder_without_weights_or_with_damaged_ones_is_refused(bert_folder):
    folder, _ = bert_folder
    (folder / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(LoadError, match="transformers cannot read"):
        read(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(LoadError, match="no weights that panther reads"):
        read(folder)


def test_a_hugging_face_folder_needs_no_model_argument(bert_folder):
    with pytest.raises(LoadError, match=r"leave model= .* out"):
        read(bert_folder[0], model=small)


def test_without_transformers_the_package_to_install_is_named(bert_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(LoadError, match=r"pip install 'panther-compress\[huggingface\]'"):
        read(bert_folder[0])


def test_example_inputs_follow_the_config(bert_folder):
    transformers = pytest.importorskip("transformers")
    folder, bert = bert_folder
    text = example_inputs_for(folder)
    assert {name: tuple(value.shape) for name, value in text.items()} == {
        "input_ids": (2, 16),
        "attention_mask": (2, 16),
    }
    assert text["attention_mask"].tolist()[1] == [1] * 12 + [0] * 4
    assert all(torch.equal(value, text[name]) for name, value in example_inputs_for(bert).items())
    bert(**text)

    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    vit = transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, num_channels=1, **tiny)).eval()
    assert example_inputs_for(vit)["pixel_values"].shape == (2, 1, 16, 16)
    vit(**example_inputs_for(vit))

    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {"d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_source_positions": 10}
    tokens = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    whisper = transformers.WhisperModel(transformers.WhisperConfig(**layers, **widths, **tokens)).eval()
    audio = example_inputs_for(whisper)
    assert audio["input_features"].shape == (2, 80, 20) and audio["decoder_input_ids"].shape == (2, 12)
    whisper(**audio)


def test_example_inputs_of_an_unknown_model_are_none():
    assert example_inputs_for(small()) is None


# Compressed models


def report():
    nothing = Figures(params=0, size_bytes=0, flops=0)
    return Report("keep half", True, "observation", (), nothing, nothing)


def compress_net(net):
    net.fc = SKLinear.from_dense(net.fc, rank=3)
    return net.eval()


@pytest.fixture
def saved(tmp_path):
    model = compress_net(trained_net())
    return save(model, tmp_path / "out", plan=Plan(()), report=report()), model


def test_a_saved_model_loads_to_equal_outputs(saved):
    folder, model = saved
    assert sorted(path.name for path in folder.iterdir()) == [WEIGHTS, MANIFEST]
    for architecture in (Net, Net()):
        made = load(folder, model=architecture)
        assert type(made.fc) is SKLinear and not made.training
        assert made.head.weight is made.embed.weight
        assert torch.equal(made(IDS), model(IDS))
        assert_same_weights(made, model)


def test_a_compressed_folder_is_a_format_like_the_others(saved):
    folder, model = saved
    assert_same_weights(read(folder, model=Net), model)


def test_tied_tensors_are_stored_once(saved):
    from safetensors import safe_open

    folder, _ = saved
    with safe_open(folder / WEIGHTS, "pt") as file:
        assert "embed.weight" in file.keys() and "head.weight" not in file.keys()  # noqa: SIM118 - not a dict
    assert json.loads((folder / MANIFEST).read_text())["tied"] == {"head.weight": "embed.weight"}


def test_loading_does_not_change_the_instance_given(saved):
    architecture = Net()
    before = architecture.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    made = load(saved[0], model=architecture)
    assert type(architecture.fc) is nn.Linear and architecture.training
    assert all(torch.equal(value, before[name]) for name, value in architecture.state_dict().items())
    assert made.fc.down.data_ptr() not in {value.data_ptr() for value in architecture.state_dict().values()}


def test_dtypes_terms_bases_hooks_and_shared_layers_survive(tmp_path):
    def dense():
        shared = nn.Linear(12, 12)
        hooked = nn.Linear(12, 12)
        hooked.register_forward_hook(lambda module, args, output: output + 1)
        conv = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.Sequential(conv, shared, shared, hooked, nn.Linear(12, 12)).bfloat16()

    model = dense().eval()
    hooks = model[3]._forward_hooks
    model[0][0] = SKConv2d.from_dense(model[0][0], rank=5, scheme="spatial")
    model[1] = model[2] = SKLinear.from_dense(model[1], num_terms=3, low_rank=1)
    model[1].active_terms = 2
    model[3] = SKLinear.from_dense(model[3], rank=2)
    model[3]._forward_hooks = hooks
    model[4] = SKLinear(12, 12, 1, 2, basis="random", seed=7, dtype=torch.bfloat16)
    save(model, tmp_path / "out", plan=Plan(()), report=report())
    made = load(tmp_path / "out", model=dense)
    x = torch.randn(2, 3, 6, 6, dtype=torch.bfloat16)
    assert made[1] is made[2] and made[1].active_terms == 2
    assert made[4].seed == 7 and made[4].s1.dtype == torch.bfloat16
    assert torch.equal(made(x), model(x))


class Shifted(nn.Module):
    """A net with a buffer that no state dict holds."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("shift", torch.rand(8, generator=torch.Generator().manual_seed(0)), persistent=False)
        self.register_buffer("order", torch.arange(8), persistent=False)

    def forward(self, x):
        return self.fc((x + self.shift.to(x.dtype))[:, self.order])


@pytest.mark.parametrize("cast", [lambda net: net.bfloat16(), lambda net: net.fc.bfloat16()], ids=["all", "layer"])
def test_buffers_that_are_not_saved_have_the_dtype_they_had(tmp_path, cast):
    model = Shifted().eval()
    cast(model)
    model.fc = SKLinear.from_dense(model.fc, rank=3)
    save(model, tmp_path / "out", plan=Plan(()), report=report())
    x = torch.randn(5, 8).bfloat16()
    for architecture in (Shifted, Shifted(), Shifted().bfloat16(), Shifted().half()):
        made = load(tmp_path / "out", model=architecture)
        assert (made.shift.dtype, made.order.dtype) == (model.shift.dtype, torch.int64)
        torch.testing.assert_close(made(x), model(x), rtol=0, atol=0.02)  # a buffer that was cast is cast back
    assert torch.equal(load(tmp_path / "out", model=Shifted)(x), model(x))


def test_a_folder_of_an_older_format_is_read(saved):
    folder, model = saved
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["unsaved_dtypes"]
    manifest["panther_format"] = 2
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert_same_weights(load(folder, model=Net), model)


def test_a_model_that_is_itself_one_layer_and_non_contiguous_tensors_survive(tmp_path):
    model = SKLinear.from_dense(nn.Linear(8, 8), rank=2)
    model.up = nn.Parameter(model.up.detach().t().contiguous().t())
    assert not model.up.is_contiguous()
    save(model, tmp_path / "out", plan=Plan(()), report=report())
    assert_same_weights(load(tmp_path / "out", model=lambda: nn.Linear(8, 8)), model)


def test_tensors_that_are_views_of_one_memory_are_saved_in_full(tmp_path):
    memory = torch.randn(2, 4)
    model = nn.Module()
    model.register_buffer("first", memory[0])
    model.register_buffer("second", memory[1])
    model.register_buffer("row", memory[0].expand(3, 4))
    save(model, tmp_path / "out", plan=Plan(()), report=report())
    assert_same_weights(load(tmp_path / "out", model=model), model)


def test_layers_are_described_with_their_other_names():
    layer = SKLinear.from_dense(nn.Linear(8, 8), rank=2)
    described = describe_layers(nn.ModuleDict({"a": layer, "b": nn.Sequential(layer), "c": nn.Linear(2, 2)}))
    assert list(described) == ["a"]
    assert described["a"] == {"type": "SKLinear", "aliases": ["b.0"], **layer.config()}


@pytest.mark.parametrize("kind", ["os.system", "panther.nn.SKLinear", "Linear", None, ["SKLinear"]])
def test_a_layer_type_that_names_code_is_refused_and_nothing_imported(saved, kind):
    folder, _ = saved
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["layers"]["fc"]["type"] = kind
    (folder / MANIFEST).write_text(json.dumps(manifest))
    loaded_before = set(sys.modules)
    with pytest.raises(LoadError, match="imports nothing that a file names"):
        load(folder, model=Net)
    assert set(sys.modules) == loaded_before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update({"import": "os"}), "missing or unknown fields 'import'"),
        (lambda m: m.pop("tied"), "missing or unknown fields 'tied'"),
        (lambda m: m.update(panther_format=99), "format 99, this panther reads up to 3: upgrade"),
        (lambda m: m.update(layers=[]), "layers is list, expected dict"),
        (lambda m: m["layers"]["fc"].update({"import": "os"}), "layer 'fc' cannot be built: .*import"),
        (lambda m: m["layers"]["fc"].update(ranks=[10**30]), "layer 'fc' cannot be built: .*ranks"),
        (lambda m: m["layers"]["fc"].update(aliases="x"), "aliases of layer 'fc' are not a list"),
        (lambda m: m["layers"]["fc"].update(in_features=9), "'fc' has in_features=9, the architecture given has 8"),
        (lambda m: m["layers"].update({"gone": m["layers"].pop("fc")}), "sketches 'gone', which Net does not have"),
        (lambda m: m["layers"].update({"norm": m["layers"].pop("fc")}), "sketches 'norm', which is a BatchNorm1d"),
        (lambda m: m["tied"].update({"head.weight": "nowhere"}), "1 tensors missing"),
        (lambda m: m["tied"].update({"head.weight": "fc.up"}), r"head.weight is \(8, 3\)"),
        (lambda m: m["tied"].update({"other": "fc.up"}), r"1 not in the model \(other\)"),
        (lambda m: m["tied"].update({"head.weight": 3}), "names to names"),
        (lambda m: m["unsaved_dtypes"].update({"fc.x": "load"}), "names to float64, float32"),
        (lambda m: m["unsaved_dtypes"].update({"fc.x": ["float32"]}), "names to float64, float32"),
    ],
)
def test_a_panther_json_that_was_changed_ends_in_a_load_error(saved, change, reason):
    folder, _ = saved
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(LoadError, match=reason):
        load(folder, model=Net)


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that was made inside."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not made.is_meta:
            self.numbers = max(self.numbers, made.numel())
        return made


@pytest.mark.parametrize(
    ("layer", "claims"),
    [
        (QuantisedLinear.from_dense(nn.Linear(8, 8)), {"out_features": 3_000_000}),
        (
            SKPivotedLinear.from_sketched(SKLinear.from_dense(nn.Linear(8, 8), rank=2)),
            {"out_features": 3_000_000, "row_order": True},
        ),
        (SKLinear(8, 8, 1, 1, basis="random"), {"ranks": [3_000_000]}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_sizes_that_only_panther_json_claims_take_no_memory(saved, layer, claims):
    folder, _ = saved
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["layers"]["fc"] = {"type": type(layer).__name__, "aliases": [], **layer.config(), **claims}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with Largest() as made, pytest.raises(LoadError, match=r"the architecture given has 8|tensors missing"):
        load(folder, model=Net)
    assert made.numbers < 1000


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 200_000, "\xff"])
def test_a_panther_json_that_is_no_json_object_ends_in_a_load_error(saved, text):
    (saved[0] / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(LoadError, match=r"panther\.json"):
        load(saved[0], model=Net)


def test_damaged_weights_and_other_architectures_end_in_a_load_error(saved):
    folder, _ = saved
    with pytest.raises(LoadError, match=r"not its code: give the dense architecture.*model=factory_or_instance"):
        load(folder)
    with pytest.raises(LoadError, match="sketches 'fc', which Sequential does not have"):
        load(folder, model=small)
    weights = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(LoadError, match=r"not a whole .safetensors file"):
        load(folder, model=Net)
    (folder / WEIGHTS).unlink()
    with pytest.raises(LoadError, match=r"not a whole .safetensors file"):
        load(folder, model=Net)


def test_saving_again_replaces_our_files_and_leaves_others_alone(saved):
    folder, _ = saved
    (folder / "notes.txt").write_text("mine")
    other = compress_net(trained_net())
    save(other, folder, plan=Plan(()), report=report())
    assert_same_weights(load(folder, model=Net), other)
    assert sorted(path.name for path in folder.iterdir()) == [WEIGHTS, "notes.txt", MANIFEST]


def test_files_that_are_not_ours_are_not_overwritten(tmp_path):
    save_file(small().state_dict(), tmp_path / WEIGHTS)
    before = (tmp_path / WEIGHTS).read_bytes()
    with pytest.raises(ExportError, match=r"panther did not write.*choose another folder"):
        save(trained_net(), tmp_path, plan=Plan(()), report=report())
    assert (tmp_path / WEIGHTS).read_bytes() == before


def test_a_save_that_fails_leaves_what_was_there(saved, monkeypatch):
    folder, model = saved

    def disk_full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compressed, "_write_tensors", disk_full)
    for target in (folder, folder.parent / "new"):
        with pytest.raises(ExportError, match=r"No space left on device.*unchanged"):
            save(trained_net(), target, plan=Plan(()), report=report())
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    assert sorted(path.name for path in folder.iterdir()) == [WEIGHTS, MANIFEST]
    assert_same_weights(load(folder, model=Net), model)


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="is a file: give the name of a folder"):
        save(trained_net(), tmp_path / "file", plan=Plan(()), report=report())
    with pytest.raises(ExportError, match="cannot write the folder"):
        save(trained_net(), tmp_path / "file" / "out", plan=Plan(()), report=report())


def test_what_is_no_tensor_with_values_cannot_be_saved(tmp_path):
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ExportError, match="weight of Linear is no dense tensor with values"):
        save(model, tmp_path / "out", plan=Plan(()), report=report())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("beside", [torch.float32, torch.device("cpu"), {1, 2}], ids=repr)
def test_what_training_scripts_keep_beside_the_weights_is_no_code(tmp_path, beside):
    kept = small()
    torch.save({"model": kept.state_dict(), "beside": beside}, tmp_path / "m.pt")
    assert torch.equal(read(tmp_path / "m.pt", model=small)[0].weight, kept[0].weight)
