"""Which subclasses of a dense layer compute what their parent does, and that compressing them changes nothing else."""

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import panther
from panther.batches import as_call
from panther.capture import WAYS, capture
from panther.nn import SketchedLayer
from panther.nn.surgery import as_plain
from panther.subclasses import plain_subclasses

BELOW = "is a subclass of {} whose own forward may do more"


class StaticPadding(nn.Conv2d):
    """EfficientNet's: pads by a module that the constructor chose for one image size; strides are a list."""

    def __init__(self, *sizes, amount=0, **options):
        super().__init__(*sizes, **options)
        self.stride = list(self.stride)
        self.static_padding = nn.ZeroPad2d(amount) if amount else nn.Identity()
        self.image_size = 9

    def forward(self, x):
        x = self.static_padding(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Renamed(nn.Linear):
    """A class of its own that overrides nothing."""


class Checked(nn.Conv2d):
    """Looks at its input, as frameworks' layers do, and leaves it as it is."""

    norm = None

    def forward(self, x):
        if x.numel() == 0 and self.training:
            raise ValueError("no samples")
        x = super().forward(x.contiguous())
        return x if self.norm is None else self.norm(x)


class CastLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class DynamicPadding(nn.Conv2d):
    """Pads so that the output is the input divided by the stride, rounded up: nothing at some sizes."""

    def forward(self, x):
        amounts = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            pad = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            amounts += [pad // 2, pad - pad // 2]
        return super().forward(F.pad(x, amounts) if any(amounts) else x)


class PaddingByNothing(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (0, 0, 0, 0)))


class PaddingOfSmallInputs(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (2, 2, 2, 2)) if x.shape[-1] < 4 else x)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias, self.stride)


class StandardisedInside(nn.Conv2d):
    """The forward is the parent's, and calls a method that is not."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight / weight.norm(), bias)


class OtherStride(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, 2)


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.0


class Activated(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


class OnPositives(nn.Linear):
    """Does as its parent on the inputs of this test."""

    def forward(self, x):
        return super().forward(x if x.sum() > -1e9 else -x)


class Gated(nn.Linear):
    """Has numbers of its own, even where it does not use them."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gate = nn.Parameter(torch.ones(()))


class NoisyInTraining(nn.Linear):
    def forward(self, x):
        return super().forward(x + torch.randn_like(x) if self.training else x)


class Remembering(nn.Linear):
    def forward(self, x):
        self.seen = x
        return super().forward(x)


class CalledOtherwise(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Flattening(nn.Linear):
    """Joins the leading sizes of inputs that have several."""

    def forward(self, x):
        return super().forward(x.flatten(0, -2) if x.dim() > 2 else x)


class TwoInputs(nn.Linear):
    def forward(self, x, scale=None):
        return super().forward(x)


PLAIN = {
    "static padding": (lambda: StaticPadding(12, 10, 3), (2, 12, 9, 9)),
    "pointwise, strided": (lambda: StaticPadding(12, 10, 1, stride=2), (2, 12, 9, 9)),
    "padding mode": (lambda: Checked(12, 10, 3, padding=1, padding_mode="reflect"), (2, 12, 9, 9)),
    "one size": (lambda: Checked(12, 10, 3), (2, 12, 3, 3)),
    "without bias": (lambda: StaticPadding(12, 10, 3, bias=False), (2, 12, 9, 9)),
    "unbatched": (lambda: Checked(12, 10, 3), (12, 9, 9)),
    "no forward": (lambda: Renamed(16, 12), (2, 16)),
    "cast to its own type": (lambda: CastLinear(16, 12), (2, 5, 16)),
}
OTHER = {
    "static padding": (lambda: StaticPadding(12, 10, 3, amount=1), (2, 12, 9, 9)),
    "dynamic padding that adds something": (lambda: DynamicPadding(12, 10, 2, stride=2), (2, 12, 9, 9)),
    "dynamic padding that adds nothing here": (lambda: DynamicPadding(12, 10, 2, stride=2), (2, 12, 8, 8)),
    "padding by nothing": (lambda: PaddingByNothing(12, 10, 3), (2, 12, 9, 9)),
    "padding of small inputs": (lambda: PaddingOfSmallInputs(12, 10, 3), (2, 12, 9, 9)),
    "standardised": (lambda: Standardised(12, 10, 3), (2, 12, 9, 9)),
    "standardised inside": (lambda: StandardisedInside(12, 10, 3), (2, 12, 9, 9)),
    "another stride": (lambda: OtherStride(12, 10, 3), (2, 12, 9, 9)),
    "scaled by one": (lambda: Scaled(16, 12), (2, 16)),
    "activated": (lambda: Activated(16, 12), (2, 16)),
    "looks at the numbers": (lambda: OnPositives(16, 12), (2, 16)),
    "numbers of its own": (lambda: Gated(16, 12), (2, 16)),
    "noise in training": (lambda: NoisyInTraining(16, 12), (2, 16)),
    "remembers": (lambda: Remembering(16, 12), (2, 16)),
    "another call": (lambda: CalledOtherwise(16, 12), (2, 16)),
    "other shapes": (lambda: Flattening(16, 12), (2, 16)),
    "nothing to see": (lambda: CastLinear(16, 12), (0, 16)),
}


def layers_found(layer, shape, way):
    with mock.patch.dict(WAYS, {way: WAYS[way]}, clear=True):
        return capture(nn.Sequential(layer).eval(), as_call(torch.rand(shape))).layers


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", PLAIN)
def test_a_subclass_that_does_what_its_parent_does_can_be_sketched(case, way):
    build, shape = PLAIN[case]
    (spec,) = layers_found(build(), shape, way)
    assert spec.blockers == ()


@pytest.mark.parametrize(
    ("case", "way"),
    # a forward that asks for numbers cannot be exported
    [(case, way) for case in OTHER for way in WAYS if (case, way) != ("looks at the numbers", "torch.export")],
)
def test_a_subclass_that_does_anything_else_stays_dense(case, way):
    build, shape = OTHER[case]
    layer = build()
    parent = "Conv2d" if isinstance(layer, nn.Conv2d) else "Linear"
    specs = layers_found(layer, shape, way)
    assert not any(spec.can_be_sketched for spec in specs)
    assert any(f"{type(layer).__name__} {BELOW.format(parent)}" in spec.blockers for spec in specs)


def test_a_subclass_that_takes_more_than_its_input_stays_dense():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = TwoInputs(16, 12)

        def forward(self, x):
            return self.layer(x, scale=2)

    (spec,) = capture(Net().eval(), as_call(torch.rand(2, 16))).layers
    assert spec.blockers == ("TwoInputs " + BELOW.format("Linear"),)


def test_every_call_of_a_subclass_counts():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = PaddingOfSmallInputs(12, 12, 1)

        def forward(self, x):
            return self.layer(self.layer(x)[..., :2])

    assert plain_subclasses(Net(), as_call(torch.rand(1, 12, 9, 9)), [nn.Conv2d]) == frozenset()


def test_the_check_leaves_flags_attributes_and_gradients_as_they_were():
    model = nn.Sequential(StaticPadding(12, 10, 3), Remembering(7, 12)).train()
    before = [dict(vars(module)) for module in model]
    capture(model, as_call(torch.rand(2, 12, 9, 9)))
    for module, held in zip(model, before, strict=True):
        assert vars(module) == held and module.training
        assert all(parameter.grad is None and parameter.requires_grad for parameter in module.parameters())
        assert not module._forward_hooks


def test_the_plain_view_shares_the_weights_and_has_the_parents_methods():
    layer = StandardisedInside(12, 10, 3)
    plain = as_plain(layer, nn.Conv2d)
    x = torch.rand(1, 12, 5, 5)
    assert type(plain) is nn.Conv2d and plain.weight is layer.weight
    assert torch.equal(plain(x), F.conv2d(x, layer.weight, layer.bias))
    assert as_plain(plain, nn.Conv2d) is plain


class Net(nn.Module):
    """Subclasses among others, as EfficientNet has them."""

    def __init__(self):
        super().__init__()
        self.stem = StaticPadding(3, 32, 3, amount=1)
        self.expand = StaticPadding(32, 64, 1, bias=False)
        self.squeeze = StaticPadding(64, 32, 3, stride=2)
        self.head = CastLinear(32, 40)

    def forward(self, x):
        x = self.expand(self.stem(x).relu()).relu()
        x = self.squeeze(self.expand.static_padding(x))
        return self.head(x.mean((2, 3)))


def test_such_layers_are_compressed_saved_loaded_and_exported(tmp_path):
    torch.manual_seed(0)
    model = Net().eval()
    images = torch.rand(24, 3, 9, 9)
    result = panther.compress(model, 0.5, example_inputs=images[:2], calib_data=images, progress=False, verify=False)
    assert {c.layer for c in result.plan.sketched} <= {"expand", "squeeze", "head"} and result.budget_met
    layers = {c.layer: result.model.get_submodule(c.layer) for c in result.plan.sketched}
    assert all(isinstance(layer, SketchedLayer) for layer in layers.values()) and "squeeze" in layers
    assert layers["squeeze"].stride == (2, 2) and layers["squeeze"].image_size == 9
    assert type(model.squeeze) is StaticPadding
    expected = result.model(images[:3])
    result.save(tmp_path / "saved")
    loaded = panther.load(tmp_path / "saved", model=Net)
    assert torch.equal(loaded(images[:3]), expected)
    assert result.export_onnx(tmp_path / "net.onnx").path.exists()
