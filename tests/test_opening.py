from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

import panther
import panther.errors
from panther.batches import Call, as_call
from panther.errors import LoadError
from panther.nn import SketchedLayer, SKLinear, SKMultiheadAttention
from panther.opening import opened
from panther.spec import Heal


class Matrix(nn.Module):
    """A matrix of (in, out) and a bias, as in Hugging Face's Conv1D."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class Outputs(Matrix):
    """The same with its matrix as Linear has it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(outputs, inputs)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Block(nn.Module):
    """A pair of matrices with attention before it, of one tensor or of two."""

    def __init__(self, size: int = 32, cross: bool = False, first: type[Matrix] = Matrix) -> None:
        super().__init__()
        self.cross = cross
        self.attention = nn.MultiheadAttention(size, 4, batch_first=True)
        self.up, self.down = first(size, 3 * size), Matrix(3 * size, size)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        other = y if self.cross else x
        x = x + self.attention(x, other, other, need_weights=False)[0]
        return x + self.down(torch.relu(self.up(x)))


def call(rows: int = 6, size: int = 32, seed: int = 0) -> Call:
    generator = torch.Generator().manual_seed(seed)
    return as_call(tuple(torch.randn(3, rows, size, generator=generator) for _ in range(2)))


def batches(count: int = 8) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    return [(call(12, seed=1 + i).args, torch.zeros(3)) for i in range(count)]


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules() if name}


def compressed(model: nn.Module, budget: object = 0.5, **options: object) -> panther.compress:
    given = {"heal": "refit", "progress": False, "verify": False, **options}
    data = [args for args, _ in batches()]
    return panther.compress(model, budget, example_inputs=call().args, calib_data=data, **given)


def nothing_changes(model: nn.Module, work) -> None:
    before, attributes = copy.deepcopy(model.state_dict()), kinds(model)
    work()
    assert kinds(model) == attributes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_hidden_products_become_layers_that_share_their_numbers():
    model = Block().eval()
    found = opened(model, call())
    assert kinds(found.model) == {
        "attention": "SKMultiheadAttention",
        "attention.in_proj": "Linear",
        "attention.out_proj": "Linear",
        "up": "Linear",
        "down": "Linear",
    }
    assert found.model.up.weight.data_ptr() == model.up.weight.data_ptr()
    assert found.model.attention.in_proj.weight.data_ptr() == model.attention.in_proj_weight.data_ptr()
    assert kinds(model)["attention"] == "MultiheadAttention" and isinstance(model.up, Matrix)
    torch.testing.assert_close(found.model(*call().args), model(*call().args))


def test_a_model_without_hidden_products_is_itself():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(3, 3, 1)).eval()
    assert opened(model, as_call(torch.randn(2, 3, 4))).model is model


def test_each_orientation_of_a_matrix_is_found():
    model = Block(first=Outputs).eval()
    found = opened(model, call())
    assert found.closed["up"].way is False and found.closed["down"].way is True
    torch.testing.assert_close(found.model(*call().args), model(*call().args))


@pytest.mark.parametrize("cross", [False, True])
def test_the_layout_of_attention_follows_its_inputs(cross):
    found = opened(Block(cross=cross).eval(), call())
    assert found.closed["attention"].way == ("kv_proj" if cross else "in_proj")


class Twice(nn.Module):
    """One attention, called with one tensor and then with two, or three."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last, self.attention = last, nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.attention(x, x, x)[0]
        return z + self.attention(x, y, y if self.last == 2 else y + 1)[0]


@pytest.mark.parametrize(("last", "layout"), [(2, "kv_proj"), (3, "separate")])
def test_the_layout_suits_every_call(last, layout):
    model = Twice(last).eval()
    found = opened(model, call())
    assert found.closed["attention"].way == layout
    torch.testing.assert_close(found.model(*call().args), model(*call().args))


class Scaled(Matrix):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.01


class Clipped(Matrix):
    """Linear only for numbers as small as those of the example."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-20, 20))


class Noisy(Matrix):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.1, self.training))


class Counting(Matrix):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


class Listing(Matrix):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return super().forward(x)


class Rounding(Matrix):
    """As bfloat16 would be by itself, nearly."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x * 64).round() / 64)


class Normed(Matrix):
    """Nothing more than its product as long as its columns are of length 1."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight.data = nn.functional.normalize(self.weight.data, dim=0)

    def forward(self, x: Tensor) -> Tensor:
        return x @ nn.functional.normalize(self.weight, dim=0) + self.bias


class Zero(Matrix):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.square())


class Scaling(Matrix):
    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        return super().forward(x) if scale is None else super().forward(x) * scale


class Referring(Matrix):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.others = (nn.ReLU(),)


class Shifting(Matrix):
    """Its bias is as long as its input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.bias = nn.Parameter(torch.randn(inputs))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.bias) @ self.weight


MORE = [Scaled, Clipped, Noisy, Counting, Listing, Rounding, Normed, Zero, Scaling, Referring, Shifting]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MORE)
def test_a_matrix_whose_forward_does_more_stays_closed(kind, dtype):
    model = Block(first=kind).eval().to(dtype)
    found = opened(model, as_call(tuple(x.to(dtype) for x in call().args)))
    assert "up" not in found.closed and {"attention", "down"} <= set(found.closed)
    assert not hasattr(model.up, "calls")


@pytest.mark.parametrize("kind", [Matrix, Outputs])
def test_a_symmetric_matrix_is_read_as_the_module_reads_it(kind):
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix, self.last = kind(32, 32), nn.Linear(32, 32)
            self.matrix.weight.data = torch.eye(32)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.matrix(x))

    model = Square().eval()
    x = call().args[0]
    found = opened(model, as_call(x))
    assert found.closed["matrix"].way is (kind is Matrix)
    copied = copy.deepcopy(found.model)
    copied.matrix.weight.data += torch.randn(32, 32)
    wanted = copied(x)
    found.close(copied, model)
    assert type(copied.matrix) is kind
    torch.testing.assert_close(copied(x), wanted)


def test_what_is_closed_again_shares_nothing_that_changes():
    model = Block().eval()
    result = compressed(model, include=["down"])
    result.model.up.register_buffer("extra", torch.zeros(1))
    result.model.up.register_load_state_dict_pre_hook(lambda *_: 1 / 0)
    assert "up.extra" not in model.state_dict()
    model.load_state_dict(model.state_dict())


@pytest.mark.parametrize("change", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_attention_with_more_in_it_stays_closed(change):
    model = Block().eval()
    model.attention = nn.MultiheadAttention(32, 4, batch_first=True, **change).eval()
    assert "attention" not in opened(model, call()).closed
    result = compressed(model, plan=None)
    assert type(result.model.attention) is nn.MultiheadAttention


class LowRankOutput(nn.Linear):
    def __init__(self) -> None:
        super().__init__(32, 32)
        self.more = nn.Parameter(torch.zeros(32, 2))


def parametrised(attention: nn.MultiheadAttention) -> None:
    nn.utils.parametrizations.weight_norm(attention.out_proj)


def extended(attention: nn.MultiheadAttention) -> None:
    attention.gate = nn.Parameter(torch.ones(1))


def replaced(attention: nn.MultiheadAttention) -> None:
    attention.out_proj = LowRankOutput()


def half_biased(attention: nn.MultiheadAttention) -> None:
    attention.in_proj_bias = None


@pytest.mark.parametrize("change", [parametrised, extended, replaced, half_biased])
def test_attention_that_was_changed_stays_closed(change, tmp_path):
    model = Block().eval()
    change(model.attention)
    assert set(opened(model, call()).closed) == {"up", "down"}
    result = compressed(model)
    assert set(result.model.attention.state_dict()) == set(model.attention.state_dict())
    result.save(tmp_path / "small")
    again = panther.load(tmp_path / "small", model=model)
    assert torch.equal(again(*call().args), result.model(*call().args))


def test_which_parameters_learn_stays():
    model = Block().eval().requires_grad_(False)
    model.attention.in_proj_bias.requires_grad_(True)
    model.attention.out_proj.weight.requires_grad_(True)
    result = compressed(model, include=["down"])
    for name, parameter in model.named_parameters():
        if not name.startswith("down"):
            assert result.model.get_parameter(name).requires_grad == parameter.requires_grad, name


def test_a_lazy_model_is_refused_and_stays_as_it_was():
    model = nn.Sequential(nn.LazyLinear(32), Matrix(32, 8))
    with pytest.raises(panther.errors.CaptureError, match="has no shape yet"):
        panther.analyze(model, torch.randn(2, 5))
    assert model(torch.randn(2, 5)).shape == (2, 8)


def test_a_model_of_inference_mode_is_analysed_as_it_is_compressed():
    with torch.inference_mode():
        model = Block().eval()
    found = panther.analyze(model, call().args)
    assert {spec.name for spec in found.sketchable} == {"attention.in_proj", "attention.out_proj", "up", "down"}


def test_where_only_a_symbolic_trace_works_attention_is_a_leaf(monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no export today")

    monkeypatch.setattr(torch.export, "export", fails)
    found = panther.analyze(Block().eval(), call().args)
    assert found.way == "torch.fx" and len(found.sketchable) == 4
    assert [(pair.producer, pair.consumer) for pair in found.followers] == [("up", "down")]


def test_milliseconds_are_of_the_model_as_it_is_given_back(monkeypatch):
    from panther import prepared

    seen = []

    def latency(dense, model, example):
        seen.append([type(module.self_attn) for module in model.layers.layers])
        return 1.0, 1.0

    monkeypatch.setattr(prepared, "measure_latency", latency)
    model = encoder(False)
    compressed(model, {"params": 0.9, "latency_ms": "100%"}, exclude=["*self_attn*"])
    assert seen and all(kind is nn.MultiheadAttention for kinds in seen for kind in kinds)


def test_an_architecture_that_has_the_layer_itself(tmp_path):
    def own() -> Block:
        model = Block().eval()
        model.attention = SKMultiheadAttention.from_dense(model.attention, "in_proj")
        return model

    model = own()
    result = compressed(model, include=["attention.*"])
    assert type(result.model.attention) is SKMultiheadAttention
    result.save(tmp_path / "small")
    for source in (model, own, result.model):
        again = panther.load(tmp_path / "small", model=source)
        assert torch.equal(again(*call().args), result.model(*call().args))
    model.attention = SKMultiheadAttention(32, 4, batch_first=True, layout="kv_proj")
    with pytest.raises(LoadError, match="layout=in_proj, the architecture given has kv_proj"):
        panther.load(tmp_path / "small", model=model)


def test_tied_and_shared_matrices_stay_closed():
    model = Block().eval()
    model.down.weight = nn.Parameter(model.up.weight.detach().t())
    model.other = Matrix(32, 96)
    model.other.weight = model.up.weight
    model.again = model.down
    assert set(opened(model, call()).closed) == {"attention"}


def test_a_model_that_needs_what_was_closed_stays_closed():
    class Asking(Block):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x, y) * self.attention.in_proj_weight.shape[0]

    assert set(opened(Asking().eval(), call()).closed) == {"up", "down"}

    class Choosing(Block):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x, y) * (2 if isinstance(self.up, nn.Linear) else 1)

    assert set(opened(Choosing().eval(), call()).closed) == {"attention"}


def test_compress_offers_them_and_the_file_holds_them(tmp_path):
    model = Block().eval()
    nothing_changes(model, lambda: compressed(model))
    result = compressed(model)
    assert [row.name for row in result.report.layers] == ["attention.in_proj", "attention.out_proj", "up", "down"]
    changed = {row.name for row in result.report.layers if row.scheme != "dense"}
    assert {"attention.in_proj", "up"} & changed
    assert result.report.compressed.params < 0.6 * result.report.dense.params
    result.save(tmp_path / "small")
    for source in (model, Block):
        again = panther.load(tmp_path / "small", model=source)
        assert kinds(again) == kinds(result.model)
        assert torch.equal(again(*call().args), result.model(*call().args))


def test_what_nothing_was_sketched_in_is_again_what_it_was(tmp_path):
    model = Block().eval()
    model.up.note = "kept"
    result = compressed(model, include=["down"])
    assert isinstance(result.model.down, SketchedLayer)
    assert type(result.model.attention) is nn.MultiheadAttention
    assert vars(result.model.attention).keys() == vars(model.attention).keys()
    assert type(result.model.up) is Matrix and result.model.up.note == "kept" and result.model.up.nf == 96
    assert torch.equal(result.model.up.weight, model.up.weight)
    assert torch.equal(result.model.attention.in_proj_weight, model.attention.in_proj_weight)
    own = {name for name in result.model.state_dict() if not name.startswith("down.")}
    assert own == {name for name in model.state_dict() if not name.startswith("down.")}
    result.save(tmp_path / "small")
    again = panther.load(tmp_path / "small", model=model)
    assert torch.equal(again(*call().args), result.model(*call().args))


def test_classes_of_what_was_closed_can_be_named():
    model = Block().eval()
    found = panther.analyze(model, call().args, include=[nn.MultiheadAttention])
    assert {spec.name for spec in found.sketchable} == {"attention.in_proj", "attention.out_proj"}
    found = panther.analyze(model, call().args, exclude=[Matrix, "attention.out_proj"])
    assert {spec.name for spec in found.sketchable} == {"attention.in_proj"}
    with pytest.raises(ValueError, match="matches no dense layer"):
        panther.analyze(model, call().args, exclude=[nn.Linear])


def test_in_place_they_are_put_where_they_were():
    model = Block().eval()
    wanted = compressed(copy.deepcopy(model))
    result = compressed(model, inplace=True)
    assert result.model is model and kinds(model) == kinds(wanted.model)
    assert torch.equal(model(*call().args), wanted.model(*call().args))


def test_another_budget_of_the_same_measurements():
    model = Block().eval()
    result = compressed(model)
    dense = result.resolve(0.99)
    assert type(dense.model.attention) in (nn.MultiheadAttention, SKMultiheadAttention)
    smaller = result.resolve(0.3)
    assert smaller.report.compressed.params < result.report.compressed.params
    nothing_changes(model, lambda: result.resolve(0.3))


def test_whole_numbers(tmp_path):
    model = Block().eval()
    result = compressed(model, {"size_mb": 0.02}, dtypes=("int8", "int4"))
    assert {row.stored.partition("_")[0] for row in result.report.layers if row.stored}
    result.save(tmp_path / "small")
    again = panther.load(tmp_path / "small", model=model)
    assert torch.equal(again(*call().args), result.model(*call().args))


def test_fewer_channels_between_two_matrices(tmp_path):
    model = Block(first=Outputs).eval()
    model.up.weight.data[30:] *= 0.001
    model.up.bias.data[30:] = 0
    result = compressed(model, 0.6, heal="none", dtypes=("float32",))
    assert any(row.channels for row in result.report.layers), [(r.name, r.scheme) for r in result.report.layers]
    result.save(tmp_path / "small")
    again = panther.load(tmp_path / "small", model=Block(first=Outputs))
    assert torch.equal(again(*call().args), result.model(*call().args))


def test_hooks_and_flags_stay(tmp_path):
    model = Block().eval()
    seen = []
    model.up.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    result = compressed(model, 0.4)
    seen.clear()
    result.model(*call().args)
    assert seen == [type(result.model.up).__name__]
    assert not any(module.training for module in result.model.modules())


def encoder(mask: bool) -> nn.Module:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            padding = torch.arange(x.shape[1]).expand(x.shape[:2]) > 4 if mask else None
            return self.layers(x, src_key_padding_mask=padding)[:, :4]

    torch.manual_seed(0)
    return Encoder().eval()


@pytest.mark.parametrize("mask", [False, True])
def test_transformer_layers_of_torch(mask, tmp_path):
    model = encoder(mask)
    result = compressed(model, 0.5)
    assert any(isinstance(module, SKMultiheadAttention) for module in result.model.modules())
    with torch.no_grad():
        result.model(*call().args)  # without gradients torch's layers would fuse, and read dense weights
    result.save(tmp_path / "small")
    again = panther.load(tmp_path / "small", model=model)
    with torch.no_grad():
        assert torch.equal(again(*call().args), result.model(*call().args))


def test_layers_that_nothing_was_sketched_in_fuse_again():
    model = encoder(False)
    result = compressed(model, include=["layers.layers.0.linear1"])
    first, second = result.model.layers.layers
    assert first.activation_relu_or_gelu == 0 and second.activation_relu_or_gelu == 1
    assert type(first.self_attn) is type(second.self_attn) is nn.MultiheadAttention


def test_a_file_of_another_attention_is_refused(tmp_path):
    model = Block().eval()
    compressed(model, 0.4).save(tmp_path / "small")
    other = Block()
    other.attention = nn.MultiheadAttention(32, 8, batch_first=True)
    with pytest.raises(LoadError, match="num_heads=4, the architecture given has 8"):
        panther.load(tmp_path / "small", model=other)
    other.attention = nn.Linear(32, 32)
    with pytest.raises(LoadError, match=r"was made of nn.MultiheadAttention, the architecture given has Linear"):
        panther.load(tmp_path / "small", model=other)
    path = tmp_path / "small" / "panther.json"
    good = path.read_text()
    huge = dict.fromkeys(("embed_dim", "kdim", "vdim"), 2**31 - 4)
    for change in ({"num_heads": 5}, {"layout": "q"}, {"dropout": "a"}, {"dropout": float("nan")}, {"more": 1}, huge):
        data = json.loads(good)
        data["layers"]["attention"].update(change)
        path.write_text(json.dumps(data))
        with pytest.raises(LoadError, match="attention"):
            panther.load(tmp_path / "small", model=model)


def test_a_checkpoint_of_healing_goes_on(tmp_path):
    model = Block().eval()
    whole = compressed(model, 0.4, heal=Heal("distill", steps=6))
    again = compressed(model, 0.4, heal=Heal("distill", steps=6), checkpoint=tmp_path / "state")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])


def test_gpt2(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 50, "n_positions": 32}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    ids = torch.randint(0, 50, (4, 4, 12))
    data = [{"input_ids": part} for part in ids]
    result = panther.compress(
        model, 0.4, example_inputs=data[0], calib_data=data, heal="refit", progress=False, verify=False
    )
    found = {row.name: row.scheme for row in result.report.layers}
    assert list(found)[:2] == ["transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"]
    assert sum(scheme != "dense" for scheme in found.values()) >= 6
    result.save(tmp_path / "small")
    again = panther.load(tmp_path / "small", model=model)
    assert torch.equal(again(**data[0]).logits, result.model(**data[0]).logits)
    assert result.model.generate(data[0]["input_ids"], max_new_tokens=3, do_sample=False).shape == (4, 15)


def test_a_layer_of_users_can_be_put_into_attention():
    attention = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    layer = SKMultiheadAttention.from_dense(attention, "in_proj")
    layer.in_proj = SKLinear.from_dense(layer.in_proj, rank=24)
    x = call().args[0]
    with torch.no_grad():
        got, wanted = layer(x, x, x)[0], attention(x, x, x)[0]
    assert 0 < float((got - wanted).norm()) < float(wanted.norm())
    back = layer.to_dense()
    assert type(back) is nn.MultiheadAttention
    torch.testing.assert_close(back(x, x, x)[0], layer(x, x, x)[0])
