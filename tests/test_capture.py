"""What capture finds in a model, by which way, and that it leaves the model as it was."""

import dataclasses
import warnings
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import is_fake
from torch.nn.utils import parametrizations, prune

from panther.batches import Call, as_call
from panther.capture import LEFT_BEHIND, WAYS, capture, left_behind
from panther.errors import CaptureError
from panther.nn import SKETCHED
from panther.nn.surgery import put_layers, with_layers
from panther.sizes import file_bytes

UNUSED = "not used when the model runs on the example inputs"
COMPUTED = (
    "its weight is computed from others (weight norm, a parametrisation or pruning): make it one tensor first, with "
    "remove_parametrizations, remove_weight_norm or prune.remove of torch.nn.utils"
)


class PaddedConv(nn.Conv2d):
    """Pads in its own forward, so that its geometry is not the one it tells."""

    def forward(self, x):
        return super().forward(F.pad(x, (1, 0, 1, 0)))


class ProductLayer(nn.Module):
    """GPT-2's layer: a product with a weight that is the other way round."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / 8)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return flat.reshape(*x.shape[:-1], self.weight.shape[1])


class Functional(nn.Module):
    """Parameters that no layer module owns, and a layer beside them."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(48, 32) / 8)
        self.right = nn.Parameter(torch.randn(48, 32) / 8)
        self.inner = nn.Linear(32, 32)

    def forward(self, x):
        return F.linear(self.inner(x), self.w) @ self.right + F.linear(x, self.w)[..., :32]


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and still in many published models
        return nn.utils.weight_norm(layer)


class Everything(nn.Module):
    """One of each kind of layer and of each way to use a weight that people's models have."""

    def __init__(self, *, branch_on_data):
        super().__init__()
        self.branch_on_data = branch_on_data
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.padded = PaddedConv(32, 32, 2)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(32, 32, 2, stride=2)
        self.reflect = nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect", stride=2, bias=False)
        self.embed = nn.Embedding(50, 32)
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.shared = nn.Linear(32, 32)
        self.again = self.shared
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.cross = nn.MultiheadAttention(32, 4, batch_first=True)
        self.functional = Functional()
        self.product = ProductLayer(32, 24)
        self.wide = nn.Linear(24, 32)
        self.normed = parametrizations.weight_norm(nn.Linear(32, 32))
        self.old = old_weight_norm(nn.Linear(32, 32))
        self.read = nn.Linear(32, 32)
        self.peeked = nn.Linear(32, 32)
        self.patched = nn.Linear(32, 32)
        plain = self.patched.forward
        self.patched.forward = lambda x: 2 * plain(x)
        self.unused = nn.Linear(32, 32)
        self.left, self.right = nn.Linear(32, 32), nn.Linear(32, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.digits = nn.Linear(32, 10)
        self.scalar = nn.Linear(32, 1)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, image, tokens):
        y = self.padded(self.stem(image).relu())
        y = self.reflect(self.up(self.grouped(self.depthwise(y))))
        x = self.embed(tokens) + y.mean((2, 3))[:, None]
        x = self.q(x) * self.k(x) + self.v(x)
        x = self.again(self.shared(x))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        memory = y.flatten(2).transpose(1, 2)
        x = x + self.cross(x, memory, memory)[0]
        x = self.wide(self.product(self.functional(x)))
        x = self.old(self.normed(x))
        x = self.patched(self.read(x)) + self.read.weight.sum() + self.peeked.weight.mean()
        takes_right = self.branch_on_data and x.sum() < -1e9
        x = self.right(x) if takes_right else self.left(x)
        x = self.encoder(x)
        return self.digits(x) * self.scalar(x), self.head(x)


def everything(*, branch_on_data=False):
    example = Call((torch.randn(2, 3, 16, 16), torch.randint(0, 50, (2, 7))))
    return Everything(branch_on_data=branch_on_data).eval(), example


def specs_by(way, model, example):
    """The specs by name, found by one way alone."""
    with mock.patch.dict(WAYS, {way: WAYS[way]}, clear=True):
        found = capture(model, example)
    assert (found.way, found.notes) == (way, ())
    return {spec.name: spec for spec in found.layers}


def without_key(specs):
    return {name: dataclasses.replace(spec, input_key="") for name, spec in specs.items()}


OFFERED = [
    "stem",
    "reflect",
    "q",
    "k",
    "v",
    "shared",
    "functional.inner",
    "wide",
    "left",
    "encoder.layers.0.linear1",
    "encoder.layers.0.linear2",
    "digits",
]

REASONS = {
    "padded": "PaddedConv is a subclass of Conv2d whose own forward may do more",
    "depthwise": "a depthwise convolution has one input a group: no rank pays",
    "grouped": "groups=4 leaves 8 inputs each; grouped convolutions are not sketched",
    "up.weight": "transposed convolutions are not sketched",
    "attention.in_proj_weight": "used as a bare parameter: linear in attention (MultiheadAttention)",
    "attention.out_proj.weight": "used as a bare parameter: linear in attention (MultiheadAttention)",
    "cross.in_proj_weight": "used as a bare parameter: linear in cross (MultiheadAttention)",
    "cross.out_proj.weight": "used as a bare parameter: linear in cross (MultiheadAttention)",
    "functional.w": "used as a bare parameter: linear in functional (Functional)",
    "functional.right": "used as a bare parameter: matmul in functional (Functional)",
    "product.weight": "used as a bare parameter: addmm in product (ProductLayer)",
    "normed": COMPUTED,
    "old": COMPUTED,
    "read": "its weight is also used by sum in the model itself",
    "patched": "its forward was replaced on the instance",
    "encoder.layers.0.self_attn.in_proj_weight": (
        "used as a bare parameter: linear in encoder.layers.0.self_attn (MultiheadAttention)"
    ),
    "encoder.layers.0.self_attn.out_proj.weight": (
        "used as a bare parameter: linear in encoder.layers.0.self_attn (MultiheadAttention)"
    ),
    "scalar": "no rank pays: break-even is rank 0.97",
    "head": "tied to embed.weight",
    "unused": UNUSED,
    "right": UNUSED,
}


# --- what is found, in all three ways --------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_every_layer_is_offered_or_has_its_reason(way):
    specs = specs_by(way, *everything())
    assert [name for name, spec in specs.items() if spec.can_be_sketched] == OFFERED
    peeked = specs.pop("peeked")
    assert peeked.blockers == (UNUSED, "its weight is also used by mean in the model itself")
    refused = {name: spec.blockers for name, spec in specs.items() if not spec.can_be_sketched}
    assert refused == {name: (reason,) for name, reason in REASONS.items()}


@pytest.mark.parametrize("way", ["torch.export", "torch.fx"])
def test_all_ways_find_the_same_layers_in_the_same_order(way):
    model, example = everything()
    graph, seen = specs_by(way, model, example), specs_by("observation", model, example)
    assert without_key(graph) == without_key(seen)
    assert list(graph) == list(seen)


@pytest.mark.parametrize("way", WAYS)
def test_layers_that_read_one_tensor_share_its_key_and_others_do_not(way):
    specs = specs_by(way, *everything())
    keys = {name: spec.input_key for name, spec in specs.items() if spec.can_be_sketched}
    assert keys["q"] == keys["k"] == keys["v"] != ""
    assert keys["digits"] == specs["scalar"].input_key != keys["q"]
    assert keys["shared"] == ""  # two calls read two tensors
    others = [key for name, key in keys.items() if name not in ("q", "k", "v", "shared")]
    assert len(set(others)) == len(others)


@pytest.mark.parametrize("way", WAYS)
def test_a_tensor_changed_in_place_between_two_layers_is_not_the_same_input(way):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.after, self.beside = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            x = x * 2
            y = self.before(x)
            x.relu_()
            return y + self.after(x) + self.beside(x)

    specs = specs_by(way, InPlace(), Call((torch.randn(2, 32),)))
    assert specs["before"].input_key != specs["after"].input_key == specs["beside"].input_key


@pytest.mark.parametrize("way", WAYS)
def test_rows_calls_and_flops_are_counted(way):
    specs = specs_by(way, *everything())
    stem = specs["stem"]
    assert (stem.input_shape, stem.output_shape) == ((2, 3, 16, 16), (2, 32, 8, 8))
    assert (stem.rows, stem.calls, stem.params, stem.flops) == (2 * 64, 1, 27 * 32, 2 * 128 * 27 * 32)
    assert (stem.kernel_size, stem.stride, stem.padding, stem.has_bias) == ((3, 3), (2, 2), (1, 1), True)
    reflect = specs["reflect"]  # its chain gets the input padded: that is what the links see
    assert (reflect.padding_mode, reflect.has_bias, reflect.input_shape) == ("reflect", False, (2, 32, 18, 18))
    assert (specs["shared"].rows, specs["shared"].calls, specs["shared"].aliases) == (2 * 14, 2, ("again",))
    assert (specs["q"].rows, specs["q"].calls) == (14, 1)
    assert (specs["functional.w"].rows, specs["functional.w"].calls) == (2 * 14, 2)
    assert specs["functional.w"].params == 48 * 32
    right, product = specs["functional.right"], specs["product.weight"]
    assert (right.in_features, right.out_features, right.rows) == (48, 32, 14)
    assert (product.in_features, product.out_features, product.rows) == (32, 24, 14)
    # 14 queries, and keys and values of 2 x 64 positions: a third and two thirds of the weight.
    assert specs["cross.in_proj_weight"].flops == 2 * (14 * 32 * 32 + 2 * 64 * 64 * 32)
    up = specs["up.weight"]  # a transposed convolution multiplies at its input positions
    assert (up.kind, up.in_features, up.out_features, up.rows) == ("conv_transpose2d", 32, 32, 2 * 64)
    assert specs["unused"].rows == specs["unused"].calls == specs["unused"].flops == 0
    assert specs["normed"].rows == specs["old"].rows == 14


def test_the_first_way_that_works_is_reported():
    model, example = everything()
    found = capture(model, example)
    assert (found.way, found.notes) == ("torch.export", ())
    assert [spec.name for spec in found.sketchable] == OFFERED


def test_a_branch_on_the_data_is_observed_and_the_notes_say_why():
    model, example = everything(branch_on_data=True)
    found = capture(model, example)
    assert found.way == "observation"
    assert [note.split(" (")[0] for note in found.notes] == ["torch.export did not work", "torch.fx did not work"]
    assert "TraceError: symbolically traced variables" in found.notes[1]
    assert [spec.name for spec in found.sketchable] == OFFERED
    refused = {s.name: s.blockers for s in found.layers if not s.can_be_sketched and s.name != "peeked"}
    assert refused == {name: (reason,) for name, reason in REASONS.items()}
    assert "right" in refused  # the branch that was not taken
    assert "note: torch.fx did not work" in str(found)


def test_a_graph_inside_the_graph_is_left_to_the_next_way():
    class Sections(nn.Module):
        def __init__(self):
            super().__init__()
            self.low, self.high = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = self.low(x)
            return self.high(x.float())

    found = capture(Sections(), as_call(torch.randn(2, 32)))
    assert [spec.name for spec in found.sketchable] == ["low", "high"]
    assert "a layer is inside" in found.notes[0]


def test_layers_without_gradients_in_a_forward_are_found():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            with torch.no_grad():
                x = self.body(x)
            return self.head(x)

    assert [spec.name for spec in capture(Frozen(), as_call(torch.randn(2, 32))).sketchable] == ["body", "head"]


@pytest.mark.parametrize("way", ["torch.fx", "observation"])
def test_a_model_made_in_inference_mode_is_read(way):
    with torch.inference_mode():
        model, example = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32)), as_call(torch.randn(2, 32))
    assert specs_by(way, model, example)["0"].can_be_sketched


def test_failed_traces_print_nothing(capfd):
    model, example = everything(branch_on_data=True)
    capture(model, example)
    assert capfd.readouterr() == ("", "")


# --- weights used in odd ways ----------------------------------------------------------------------------------------


class Uses(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.layer, self.other, self.use = nn.Linear(32, 32), nn.Linear(32, 32), use

    def forward(self, x):
        return self.use(self, x)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("use", "operation"),
    [
        (lambda m, x: m.layer(x) @ m.layer.weight.T, "matmul"),
        (lambda m, x: m.layer(x) @ m.layer.weight.t(), "matmul"),
        (lambda m, x: F.linear(m.layer(x), m.layer.weight), "linear"),
        (lambda m, x: m.layer(x) + m.layer.weight[0].sum(), "sum"),
        (lambda m, x: m.layer(x) + m.layer.weight.float().chunk(2)[1].mean(), "mean"),
        (lambda m, x: m.layer(x) * torch.einsum("bi,oi->bo", x, m.layer.weight), "einsum"),
    ],
)
def test_a_weight_that_is_read_elsewhere_keeps_its_layer_dense(way, use, operation):
    specs = specs_by(way, Uses(use), Call((torch.randn(3, 32),)))
    assert specs["layer"].blockers == (f"its weight is also used by {operation} in the model itself",)


def test_a_weight_that_is_read_past_autograd_keeps_its_layer_dense():
    found = capture(Uses(lambda m, x: m.layer(x) + m.layer.weight.data.sum()), as_call(torch.randn(3, 32)))
    assert found.layers[0].blockers == ("its weight is also used by sum in the model itself",)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("use", [lambda m, x: m.layer(x) * m.layer.weight.shape[0], lambda m, x: m.layer(x.type_as(x))])
def test_asking_a_weight_for_its_shape_is_not_reading_it(way, use):
    assert specs_by(way, Uses(use), Call((torch.randn(3, 32),)))["layer"].can_be_sketched


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_that_is_only_read_is_listed_once_as_a_bare_parameter(way):
    specs = specs_by(way, Uses(lambda m, x: F.linear(x, m.layer.weight)), Call((torch.randn(3, 32),)))
    assert list(specs) == ["layer.weight", "other"]
    assert specs["layer.weight"].blockers == ("used as a bare parameter: linear in the model itself",)


@pytest.mark.parametrize("way", WAYS)
def test_two_layers_with_one_weight_both_stay_dense(way):
    model = Uses(lambda m, x: m.other(m.layer(x)))
    model.other.weight = model.layer.weight
    specs = specs_by(way, model, Call((torch.randn(3, 32),)))
    assert {name: spec.blockers for name, spec in specs.items()} == {
        "layer": ("tied to other.weight",),
        "other": ("tied to layer.weight",),
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        old_weight_norm,
        nn.utils.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    ],
)
def test_a_computed_weight_is_named_as_such_under_all_its_names(way, change):
    model = Uses(lambda m, x: m.layer(m.other(m.layer(x))))
    change(model.layer)
    model.alias = model.layer
    specs = specs_by(way, model, Call((torch.randn(3, 32),)))
    assert list(specs) == ["layer", "other"]
    assert specs["layer"].blockers == (COMPUTED,)
    assert (specs["layer"].calls, specs["layer"].rows, specs["layer"].aliases) == (2, 6, ("alias",))
    assert specs["other"].can_be_sketched


@pytest.mark.parametrize("way", WAYS)
def test_a_computed_bias_keeps_the_layer_dense(way):
    model = Uses(lambda m, x: m.layer(x))
    prune.l1_unstructured(model.layer, "bias", amount=0.5)
    specs = specs_by(way, model, Call((torch.randn(3, 32),)))
    assert specs["layer"].blockers == (COMPUTED.replace("weight is", "bias is"),)


@pytest.mark.parametrize("way", WAYS)
def test_a_subclass_that_multiplies_by_itself_is_listed(way):
    class ByHand(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    specs = specs_by(way, nn.Sequential(ByHand(32, 48)), Call((torch.randn(3, 32),)))
    assert specs["0"].blockers[0] == "ByHand is a subclass of Linear whose own forward may do more"
    assert (specs["0"].rows, specs["0"].calls) == (3, 1)


@pytest.mark.parametrize("way", WAYS)
def test_separate_projections_of_an_attention_have_their_reason(way):
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(32, 4, kdim=24, vdim=40, batch_first=True)

        def forward(self, query, key, value):
            return self.attend(query, key, value)[0]

    example = Call((torch.randn(2, 5, 32), torch.randn(2, 6, 24), torch.randn(2, 6, 40)))
    specs = specs_by(way, Cross(), example)
    shapes = {name: (s.in_features, s.out_features, s.rows) for name, s in specs.items()}
    assert shapes == {
        "attend.q_proj_weight": (32, 32, 10),
        "attend.k_proj_weight": (24, 32, 12),
        "attend.v_proj_weight": (40, 32, 12),
        "attend.out_proj.weight": (32, 32, 10),
    }
    assert not any(spec.can_be_sketched for spec in specs.values())


@pytest.mark.parametrize("way", WAYS)
def test_the_same_weight_under_another_parent_is_one_layer(way):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Linear(32, 32))
            self.second = self.first

        def forward(self, x):
            return self.second(self.first(x))

    specs = specs_by(way, Twice(), Call((torch.randn(3, 32),)))
    assert list(specs) == ["first.0"]
    assert (specs["first.0"].aliases, specs["first.0"].calls) == (("second.0",), 2)
    assert specs["first.0"].can_be_sketched


# --- inputs and dtypes -----------------------------------------------------------------------------------------------


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x, mask=None, *, double=False):
        x = self.a(x) if mask is None else self.b(x) * mask[..., None]
        return 2 * x if double else x


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("example", "used"),
    [
        (torch.randn(2, 32), "a"),
        ((torch.randn(2, 32),), "a"),
        ((torch.randn(2, 32), torch.ones(2)), "b"),
        ({"x": torch.randn(2, 32)}, "a"),
        ({"mask": torch.ones(2), "x": torch.randn(2, 32)}, "b"),
        ({"x": torch.randn(2, 32), "double": True}, "a"),
    ],
)
def test_tensor_tuple_and_dict_examples_run_what_they_would_run(way, example, used):
    specs = specs_by(way, Masked(), as_call(example))
    assert [name for name, spec in specs.items() if spec.can_be_sketched] == [used]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("conv", "size"), [(nn.Conv1d, (9,)), (nn.Conv2d, (9, 7)), (nn.Conv3d, (5, 6, 7))])
def test_an_unbatched_convolution_is_a_batch_of_one(way, conv, size):
    model = nn.Sequential(conv(4, 16, 3))
    plain = specs_by(way, model, Call((torch.randn(4, *size),)))
    batched = specs_by(way, model, Call((torch.randn(1, 4, *size),)))
    assert without_key(plain) == without_key(batched)
    assert plain["0"].can_be_sketched and len(plain["0"].input_shape) == len(size) + 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_captured_and_named(way, dtype):
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding="same"), nn.Flatten(2), nn.Linear(16, 32)).to(dtype)
    specs = specs_by(way, model, Call((torch.randn(2, 3, 4, 4, dtype=dtype),)))
    assert {spec.dtype for spec in specs.values()} == {str(dtype).removeprefix("torch.")}
    assert all(spec.can_be_sketched for spec in specs.values())
    assert specs["0"].padding == "same"


def test_sizes_count_tied_tensors_once_and_buffers_too():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False), nn.BatchNorm1d(10))
    model[1].weight = model[0].weight
    found = capture(model.eval(), as_call(torch.tensor([1, 2])))
    assert found.model_params == 40 + 4 * 10 + 1
    assert found.model_bytes == file_bytes(model) > 4 * (40 + 4 * 10) + 8


def test_a_model_without_dense_layers_gives_an_empty_list():
    found = capture(nn.Sequential(nn.ReLU(), nn.Flatten()), as_call(torch.randn(2, 3)))
    assert found.layers == ()


def test_the_table_has_a_line_for_each_layer():
    model, example = everything()
    text = str(capture(model, example))
    assert text.startswith(f"{len(OFFERED)} of {len(OFFERED) + len(REASONS) + 1} dense layers can be sketched")
    assert "shared" in text and " x2 " in text
    for reason in REASONS.values():
        assert f"stays dense: {reason}" in text


# --- the model is left as it was -------------------------------------------------------------------------------------


class Stateful(nn.Module):
    """Counts its calls in a buffer, keeps tensors in attributes and containers, and draws random numbers."""

    def __init__(self, *, branch_on_data):
        super().__init__()
        self.branch_on_data = branch_on_data
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
        self.norm = nn.BatchNorm1d(32)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("seen", torch.zeros(2, 32), persistent=False)
        self.plain = torch.zeros(2, 32)
        self.last, self.history, self.by_name = None, [], {"x": 1}

    def forward(self, x):
        self.calls += 1
        self.seen.copy_(x)
        self.plain.add_(x)
        x = x + torch.randn_like(x)
        self.last = self.fresh = x
        self.history.append(x)
        self.by_name["x"] = x
        if self.branch_on_data and x.sum() > 1e9:
            return x
        return self.norm(self.b(self.a(x)))


@pytest.mark.parametrize("branch_on_data", [False, True])
def test_what_a_forward_changes_is_put_back(branch_on_data):
    model = Stateful(branch_on_data=branch_on_data)
    history, by_name, plain, buffer = model.history, model.by_name, model.plain, model.calls
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}

    found = capture(model, as_call(torch.randn(2, 32)))

    assert [spec.name for spec in found.sketchable] == ["a", "b"]
    assert model.history is history == [] and model.by_name is by_name == {"x": 1}
    assert model.last is None and not hasattr(model, "fresh")
    assert model.plain is plain and not plain.any() and not model.seen.any()
    assert model.calls is buffer and buffer.item() == 0
    assert not any(is_fake(value) for value in [model.plain, model.seen, *model.state_dict().values()])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("branch_on_data", [False, True])
def test_the_random_generator_is_where_it_was(branch_on_data):
    model, example = Stateful(branch_on_data=branch_on_data), as_call(torch.randn(2, 32))
    before = torch.get_rng_state()
    capture(model, example)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("branch_on_data", [False, True])
def test_class_flags_hooks_and_gradients_stay(branch_on_data):
    model, example = everything(branch_on_data=branch_on_data)
    model.train()
    model.attention.eval()
    model.q.weight.requires_grad_(requires_grad=False)
    calls = Counter()
    model.q.register_forward_hook(lambda *_: calls.update(["q"]))
    handle = model.register_forward_pre_hook(lambda *_: calls.update(["model"]))
    flags = {name: module.training for name, module in model.named_modules()}
    hooks = {name: (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for name, m in model.named_modules()}
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    fast_path = torch.backends.mha.get_fastpath_enabled()

    capture(model, example)

    assert type(model) is Everything
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert {n: (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for n, m in model.named_modules()} == hooks
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    assert not any(module._forward_hooks_always_called for module in model.modules())
    calls.clear()
    with torch.no_grad():
        model(*example.args)
    assert calls == {"q": 1, "model": 1}
    handle.remove()
    assert not model._forward_pre_hooks


def test_a_failing_forward_changes_nothing_either():
    class Fails(Stateful):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("mat1 and mat2 do not fit\nand a second line")

    model = Fails(branch_on_data=False)
    with pytest.raises(CaptureError, match="does not run on the example inputs"):
        capture(model, as_call(torch.randn(2, 32)))
    assert model.history == [] and model.calls.item() == 0 and model.training


def test_interrupting_a_capture_leaves_the_model_as_it_was():
    class Interrupted(Stateful):
        def forward(self, x):
            super().forward(x)
            raise KeyboardInterrupt

    model = Interrupted(branch_on_data=False)
    with pytest.raises(KeyboardInterrupt):
        capture(model, as_call(torch.randn(2, 32)))
    assert model.history == [] and model.calls.item() == 0 and model.training and not model._forward_hooks


def test_hooks_on_the_whole_model_are_not_left_out():
    model = nn.Sequential(nn.Linear(32, 32))
    model.register_forward_pre_hook(lambda _module, args: (args[0][:, :32],))
    example = Call((torch.randn(3, 40),))
    for way in ("torch.export", "observation"):
        assert specs_by(way, model, example)["0"].rows == 3
    with pytest.raises(CaptureError, match="hooks on the whole model"):
        specs_by("torch.fx", model, example)


# --- what cannot be captured -----------------------------------------------------------------------------------------


def test_a_forward_that_fails_names_the_shapes_and_the_error():
    with pytest.raises(CaptureError, match=r"Sequential does not run .*shapes \(2, 5\).*RuntimeError: mat1 and mat2"):
        capture(nn.Sequential(nn.Linear(4, 4)), as_call(torch.randn(2, 5)))


def test_only_the_first_line_of_a_long_error_is_shown():
    class Fails(nn.Module):
        def forward(self):
            raise ValueError("first line\nsecond line")

    with pytest.raises(CaptureError) as caught:
        capture(Fails(), Call())
    assert "(shapes none): ValueError: first line. Give example_inputs" in str(caught.value)
    assert "second line" not in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # the model of the test, not what is tested
def test_a_torchscript_model_is_refused_with_the_way_out():
    scripted = torch.jit.trace(nn.Linear(4, 4), torch.randn(1, 4))
    with pytest.raises(CaptureError, match="pass the Python module that it was made from"):
        capture(scripted, as_call(torch.randn(1, 4)))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # the same
def test_a_torchscript_part_is_left_alone_and_the_rest_is_found():
    scripted = torch.jit.trace(nn.Linear(32, 32), torch.randn(1, 32))
    found = capture(nn.Sequential(nn.Linear(32, 32), scripted, nn.Linear(32, 32)), as_call(torch.randn(2, 32)))
    assert [spec.name for spec in found.sketchable] == ["0", "2"]


@pytest.mark.parametrize("kind", [nn.DataParallel, nn.parallel.DistributedDataParallel])
def test_a_model_spread_over_devices_is_refused_with_the_way_out(kind):
    wrapped = kind.__new__(kind)  # without the devices and the process group that a real one wants
    nn.Module.__init__(wrapped)
    wrapped.module = nn.Linear(32, 32)
    with pytest.raises(CaptureError, match=rf"in {kind.__name__}.*pass model\.module"):
        capture(wrapped, as_call(torch.randn(1, 32)))


def test_a_lazy_module_is_refused_by_name():
    with pytest.raises(CaptureError, match=r"'0.weight' has no shape yet .*run the model once"):
        capture(nn.Sequential(nn.LazyLinear(4)), as_call(torch.randn(1, 4)))


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning"
)  # importing torch's compiler uses what it deprecates
def test_a_compiled_model_is_refused_wherever_it_was_compiled():
    example = as_call(torch.randn(1, 4))
    with pytest.raises(CaptureError, match=r"this model is compiled: pass the module before torch\.compile"):
        capture(torch.compile(nn.Linear(4, 4)), example)
    with pytest.raises(CaptureError, match="'0' is compiled"):
        capture(nn.Sequential(torch.compile(nn.Linear(4, 4))), example)
    in_place = nn.Sequential(nn.Linear(4, 4))
    in_place.compile()
    with pytest.raises(CaptureError, match="this model is compiled"):
        capture(in_place, example)


def test_when_all_ways_fail_the_error_tells_each_reason(monkeypatch):
    def broken(model, example):
        raise RuntimeError("broken")

    for way in list(WAYS):
        monkeypatch.setitem(WAYS, way, broken)
    with pytest.raises(CaptureError, match=r"torch.export did not work \(RuntimeError: broken\).*observation did not"):
        capture(nn.Linear(4, 4), as_call(torch.randn(1, 4)))


# --- what a copy would not run ---------------------------------------------------------------------------------------


class Kept(nn.Module):
    """Layers that run from wherever `keep` puts them, and one that is called as ever."""

    def __init__(self, keep):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
        self.held = keep(self)

    def forward(self, x):
        layers = self.held() if callable(self.held) else self.held
        return self.b(layers[0](x).relu())


class Holder:
    """An object of its own kind, which a copy copies and panther does not look into."""

    def __init__(self, layer):
        self.layer = layer

    def __getitem__(self, index):
        return self.layer


@pytest.mark.parametrize(
    ("keep", "stays"),
    [
        (lambda model: lambda: [model.a], True),
        (lambda model: Holder(model.a), True),
        (lambda model: [model.a], False),
        (lambda model: (model.a,), False),
        (lambda model: {0: model.a}, False),
    ],
    ids=["function", "object", "list", "tuple", "dict"],
)
@pytest.mark.parametrize("way", ["torch.export", "observation"])
def test_a_layer_that_a_copy_would_not_run_stays_dense_with_that_reason(way, keep, stays):
    found = specs_by(way, Kept(keep), as_call(torch.randn(4, 32)))
    assert found["a"].blockers == ((LEFT_BEHIND,) if stays else ())
    assert found["b"].blockers == ()


@pytest.mark.parametrize("kept", [False, True])
def test_layers_around_a_norm_that_a_copy_would_not_run_are_no_neighbours(kept):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.second = nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 32)
            self.held = (lambda x: -self.norm(x)) if kept else None

        def forward(self, x):
            y = self.first(x)
            return self.second((self.held(y) if kept else self.norm(y)).relu())

    found = capture(Net().eval(), as_call(torch.randn(4, 32)))
    assert [pair.between for pair in found.followers] == ([] if kept else [("norm",)])
    assert len(found.sketchable) == 2


def test_a_model_that_remembers_its_first_call_is_not_taken_for_one_that_keeps_layers():
    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.seen, self.cache = nn.Linear(32, 32), 0, {}

        def forward(self, x):
            self.seen += 1
            if "y" not in self.cache:
                self.cache["y"] = self.layer(x)
            return self.cache["y"]

    assert capture(Once(), as_call(torch.randn(4, 32))).sketchable


def test_looking_for_what_a_copy_would_not_run_changes_nothing():
    model = Kept(lambda model: lambda: [model.a])
    hooks = model.a.register_forward_hook(lambda module, args, output: None)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    left_behind(model, as_call(torch.randn(4, 32)), ["a", "b"])
    for name, module in model.named_modules():
        assert vars(module) == before[name] and not module._forward_pre_hooks
    assert list(model.a._forward_hooks) == [hooks.id]


def test_a_model_that_cannot_be_copied_or_whose_copy_does_not_run_is_refused():
    class Refusing(nn.Linear):
        def __deepcopy__(self, memo):
            raise NotImplementedError("one of a kind")

    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Linear(32, 32), 2.0

        def __deepcopy__(self, memo):
            made = Forgetful()
            del made.scale
            return made

        def forward(self, x):
            return self.layer(x) * self.scale

    example = as_call(torch.randn(4, 32))
    with pytest.raises(CaptureError, match=r"'1' refuses \(NotImplementedError: one of a kind\)"):
        capture(nn.Sequential(nn.Linear(32, 32), Refusing(32, 1)), example)
    with pytest.raises(CaptureError, match=r"a copy of this Forgetful does not run \(AttributeError"):
        capture(Forgetful(), example)


# --- replacing what was offered --------------------------------------------------------------------------------------


def full_rank_layers(model, found):
    layers = {}
    for spec in found.sketchable:
        dense = model.get_submodule(spec.name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # at full rank the chain is larger, and says so
            layers[spec.name] = SKETCHED[type(dense)].from_dense(dense, rank=10**6)
    return layers


def counted(layers):
    calls = Counter()
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


def close(outputs, expected):
    for one, other in zip(outputs, expected, strict=True):
        # Two dozen layers in float32, each adding a few eps of the outputs' size.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * float(other.abs().max()))


def everything_but_old_weight_norm():
    """Copying a model with the old weight_norm fails in torch itself, with or without sketched layers."""
    model, example = everything()
    model.old = nn.Identity()
    return model, example


@pytest.mark.parametrize("training", [False, True])
def test_replacing_every_offered_layer_at_full_rank_changes_no_output(training):
    model, example = everything_but_old_weight_norm()
    layers = full_rank_layers(model, capture(model, example))
    replaced = with_layers(model, layers)
    calls = counted(layers)
    model.train(training)
    replaced.train(training)
    with torch.no_grad():
        close(replaced(*example.args), model(*example.args))
    assert calls == {name: 2 if name == "shared" else 1 for name in OFFERED}


def test_replacing_in_place_changes_no_output():
    model, example = everything()
    with torch.no_grad():
        expected = model(*example.args)
    layers = full_rank_layers(model, capture(model, example))
    put_layers(model, layers)
    assert model.again is model.shared is layers["shared"]
    with torch.no_grad():
        close(model(*example.args), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_sketched_layers_of_a_transformer_run_though_torch_has_a_fused_path(masked):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 32)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if masked else None
    example = as_call({"src": x, "src_key_padding_mask": padding} if masked else x)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "The PyTorch API of nested tensors"
        )  # torch's own path, used by the dense one
        expected = model(x, src_key_padding_mask=padding)
    found = capture(model, example)
    assert [s.name for s in found.sketchable] == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    layers = full_rank_layers(model, found)
    replaced = with_layers(model, layers)
    calls = counted(layers)
    with torch.no_grad():
        output = replaced(x, src_key_padding_mask=padding)
    assert calls == dict.fromkeys(layers, 1)
    kept = torch.ones(2, 5, dtype=torch.bool) if padding is None else ~padding
    close([output[:, : expected.shape[1]][kept[:, : expected.shape[1]]]], [expected[kept[:, : expected.shape[1]]]])


def test_a_captured_model_with_sketched_layers_is_captured_again():
    model, example = everything_but_old_weight_norm()
    replaced = with_layers(model, full_rank_layers(model, capture(model, example)))
    again = capture(replaced, example)
    assert again.sketchable == ()
    assert {spec.name for spec in again.layers} >= {"padded", "grouped", "head", "unused"}
