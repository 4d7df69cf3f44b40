from __future__ import annotations

import pytest
import torch
from torch import nn

from panther.nn import SKMultiheadAttention
from panther.nn.attention import LAYOUTS

MASKS = {
    "none": {},
    "padding": {"key_padding_mask": "bool"},
    "padding of numbers": {"key_padding_mask": "float"},
    "positions": {"attn_mask": "bool"},
    "positions of numbers": {"attn_mask": "float"},
    "each head's": {"attn_mask": "heads"},
    "causal": {"attn_mask": "causal", "is_causal": True},
    "causal and padding": {"attn_mask": "causal", "key_padding_mask": "float", "is_causal": True},
    "both": {"attn_mask": "bool", "key_padding_mask": "bool"},
}


def mask_of(kind: object, length: int, keys: int, batch: int, heads: int, name: str) -> object:
    if not isinstance(kind, str):
        return kind
    if name == "key_padding_mask":
        padding = torch.zeros(batch, keys, dtype=torch.bool)
        padding[0, -2:] = True
        return padding if kind == "bool" else torch.zeros(batch, keys).masked_fill(padding, -torch.inf)
    if kind == "causal":
        return nn.Transformer.generate_square_subsequent_mask(length)
    if kind == "heads":
        return torch.randn(batch * heads, length, keys)
    numbers = torch.randn(length, keys)
    numbers[:, 0] = 1.0  # no row is left out whole
    return numbers < -0.5 if kind == "bool" else numbers


def both(layout: str = "separate", **options: object) -> tuple[nn.MultiheadAttention, SKMultiheadAttention]:
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(24, 3, **options).eval()
    if dense.in_proj_bias is not None:
        nn.init.normal_(dense.in_proj_bias)
        nn.init.normal_(dense.out_proj.bias)
    return dense, SKMultiheadAttention.from_dense(dense, layout)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("need_weights", [False, True])
def test_it_computes_what_torchs_does(layout, batch_first, mask, need_weights):
    dense, layer = both(layout, batch_first=batch_first)
    length, batch = 7, 4
    shape = (batch, length, 24) if batch_first else (length, batch, 24)
    x, y = torch.randn(shape), torch.randn(shape)
    options = {k: mask_of(v, length, length, batch, 3, k) for k, v in MASKS[mask].items()}
    for inputs in ((x, x, x), (x, y, y), (x, y, x)):
        wanted = dense(*inputs, need_weights=need_weights, **options)
        got = layer(*inputs, need_weights=need_weights, **options)
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("mask", ["none", "padding", "positions", "both", "each head's"])
def test_inputs_without_a_batch(mask):
    dense, layer = both()
    x, y = torch.randn(5, 24), torch.randn(6, 24)
    options = {k: mask_of(v, 5, 6, 1, 3, k) for k, v in MASKS[mask].items()}
    options = {k: v[0] if k == "key_padding_mask" else v for k, v in options.items()}
    for more in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        torch.testing.assert_close(layer(x, y, y, **options, **more), dense(x, y, y, **options, **more))


@pytest.mark.parametrize("options", [{"bias": False}, {"kdim": 16, "vdim": 10}, {"kdim": 16, "vdim": 16}])
def test_sizes_and_biases(options):
    dense, layer = both(**options)
    x = torch.randn(5, 2, 24)
    key, value = torch.randn(6, 2, dense.kdim), torch.randn(6, 2, dense.vdim)
    torch.testing.assert_close(layer(x, key, value), dense(x, key, value))
    torch.testing.assert_close(layer.to_dense()(x, key, value), dense(x, key, value))
    if dense.kdim == dense.vdim:
        layer = SKMultiheadAttention.from_dense(dense, "kv_proj")
        torch.testing.assert_close(layer(x, key, key), dense(x, key, key))
        torch.testing.assert_close(layer.to_dense()(x, key, key), dense(x, key, key))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back(layout):
    dense, layer = both(layout, dropout=0.3)
    back = layer.to_dense()
    assert back.dropout == 0.3 and not back.training
    for (name, wanted), (other, got) in zip(dense.named_parameters(), back.named_parameters(), strict=True):
        assert name == other and torch.equal(wanted, got) and wanted.requires_grad == got.requires_grad
    again = SKMultiheadAttention.from_config(layer.config())
    again.load_state_dict(layer.state_dict())
    x = torch.randn(5, 2, 24)
    assert torch.equal(again.eval()(x, x, x)[0], layer(x, x, x)[0])


def test_dropout_is_for_training():
    _, layer = both(dropout=0.5)
    x = torch.randn(5, 2, 24)
    assert torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])
    layer.train()
    assert not torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])
    assert not torch.equal(layer(x, x, x, need_weights=False)[0], layer(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"embed_dim": 24, "num_heads": 5}, "not a multiple of num_heads"),
        ({"embed_dim": 24, "num_heads": 0}, "at least 1"),
        ({"embed_dim": 24, "num_heads": 3, "layout": "packed"}, "expected one of 'in_proj'"),
        ({"embed_dim": 24, "num_heads": 3, "kdim": 16, "layout": "in_proj"}, "inputs of one size"),
        ({"embed_dim": 24, "num_heads": 3, "kdim": 16, "layout": "kv_proj"}, "inputs of one size"),
    ],
)
def test_bad_arguments(arguments, said):
    with pytest.raises(ValueError, match=said):
        SKMultiheadAttention(**arguments)


def test_what_is_not_there_is_refused():
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        with pytest.raises(ValueError, match="are not there"):
            SKMultiheadAttention.from_dense(nn.MultiheadAttention(24, 3, **options))
    _, layer = both()
    x = torch.randn(5, 2, 24)
    with pytest.raises(RuntimeError, match="is_causal is a hint"):
        layer(x, x, x, is_causal=True)


def test_gradients_and_export():
    _, layer = both("in_proj", batch_first=True)
    x = torch.randn(2, 5, 24, requires_grad=True)
    layer(x, x, x)[0].sum().backward()
    assert x.grad is not None and all(p.grad is not None for p in layer.parameters())

    class Self(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    model = Self().eval()
    given = x.detach()
    program = torch.export.export(model, (given,), strict=False)
    torch.testing.assert_close(program.module()(given), model(given))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(given), model(given))
