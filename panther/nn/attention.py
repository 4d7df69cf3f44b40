"""Attention whose projections are layers, so that each can be sketched: what nn.MultiheadAttention becomes.

nn.MultiheadAttention multiplies with bare parameters in one function of torch. Here the same numbers are in Linear
layers: one for query, key and value where all three are one tensor, which shares its factor among them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panther.nn.arguments import Config, as_count, one_of

# Which projections are one layer: those of the inputs that are one tensor in every call.
LAYOUTS: dict[str, tuple[str, ...]] = {
    "in_proj": ("in_proj",),
    "kv_proj": ("q_proj", "kv_proj"),
    "separate": ("q_proj", "k_proj", "v_proj"),
}
SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")  # as nn.MultiheadAttention has them
_KEYS = ("embed_dim", "num_heads", "kdim", "vdim", "bias", "dropout", "batch_first", "layout")


class SKMultiheadAttention(nn.Module):
    """nn.MultiheadAttention with its projections as layers: in_proj (or q_proj and kv_proj, or three) and out_proj.

    The layers are dense until someone sketches them (panther.compress does). `bias_k` and `add_zero_attn` are not
    there. Arguments and shapes of `forward` are those of nn.MultiheadAttention: (L, N, E), (N, L, E) with batch_first,
    or (L, E).

    layout: "in_proj" (query, key and value are one tensor), "kv_proj" (key and value are) or "separate". The first two
    take other inputs too, at the price of products that are not used.

    Raises: ValueError or TypeError for sizes that do not fit each other.
    """

    layout: str
    has_bias: bool
    in_proj: nn.Module  # those of the layout
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    kv_proj: nn.Module

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        layout: str = "separate",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        self.embed_dim = as_count(owner, "embed_dim", embed_dim)
        self.num_heads = as_count(owner, "num_heads", num_heads)
        self.kdim = self.embed_dim if kdim is None else as_count(owner, "kdim", kdim)
        self.vdim = self.embed_dim if vdim is None else as_count(owner, "vdim", vdim)
        self.layout = one_of(owner, "layout", layout, LAYOUTS)
        if self.embed_dim % self.num_heads:
            raise ValueError(f"{owner}: embed_dim={embed_dim} is not a multiple of num_heads={num_heads}")
        if (layout == "in_proj" and self.kdim != self.embed_dim) or (layout != "separate" and self.kdim != self.vdim):
            raise ValueError(f"{owner}: layout={layout!r} needs inputs of one size, got {embed_dim}, {kdim}, {vdim}")
        self.head_dim = self.embed_dim // self.num_heads
        self.dropout, self.batch_first, self.has_bias = float(dropout), bool(batch_first), bool(bias)
        for name, (inputs, parts) in self._projections().items():
            made = nn.Linear(inputs, parts * self.embed_dim, bias=bias, device=device, dtype=dtype)
            self.add_module(name, made)
        self.out_proj = nn.Linear(self.embed_dim, self.embed_dim, bias=bias, device=device, dtype=dtype)
        # What torch's transformer layers ask their attention for before they would read its bare weights.
        self.in_proj_weight = self.in_proj_bias = self.bias_k = self.bias_v = None
        self.add_zero_attn = self._qkv_same_embed_dim = False

    def _projections(self) -> dict[str, tuple[int, int]]:
        """By name: the inputs of a projection, and how many of query, key and value it gives."""
        if self.layout == "in_proj":
            return {"in_proj": (self.embed_dim, 3)}
        if self.layout == "kv_proj":
            return {"q_proj": (self.embed_dim, 1), "kv_proj": (self.kdim, 2)}
        return {"q_proj": (self.embed_dim, 1), "k_proj": (self.kdim, 1), "v_proj": (self.vdim, 1)}

    @classmethod
    def from_dense(cls, attention: nn.MultiheadAttention, layout: str = "separate") -> Self:
        """The same attention with layers in it, which share the memory of its weights.

        Raises: ValueError for one with `bias_k` or `add_zero_attn`, or a layout that its sizes do not allow.
        """
        if attention.bias_k is not None or attention.bias_v is not None or attention.add_zero_attn:
            raise ValueError(f"{cls.__name__}.from_dense: bias_k, bias_v and add_zero_attn are not there")
        with torch.device("meta"):
            new = cls(
                attention.embed_dim,
                attention.num_heads,
                attention.dropout,
                attention.in_proj_bias is not None,
                attention.kdim,
                attention.vdim,
                attention.batch_first,
                layout,
            )
        weights, biases = (_grouped(parts, layout) for parts in _parts(attention))
        own = "in_proj_weight" if attention._qkv_same_embed_dim else SEPARATE[0]
        for name, weight, bias in zip(LAYOUTS[layout], weights, biases, strict=True):
            _fill(
                getattr(new, name), weight, bias, getattr(attention, own).requires_grad, _needs(attention.in_proj_bias)
            )
        out = attention.out_proj
        _fill(new.out_proj, [out.weight], [out.bias], out.weight.requires_grad, _needs(out.bias))
        return new.train(attention.training)

    @torch.no_grad()
    def to_dense(self) -> nn.MultiheadAttention:
        """The nn.MultiheadAttention that computes the same; it shares the memory of projections that are dense."""
        with torch.device("meta"):
            dense = nn.MultiheadAttention(
                self.embed_dim,
                self.num_heads,
                self.dropout,
                self.has_bias,
                kdim=self.kdim,
                vdim=self.vdim,
                batch_first=self.batch_first,
            )
        layers = [getattr(self, name) for name in LAYOUTS[self.layout]]
        weights = [_numbers(layer.weight) for layer in layers]
        if dense._qkv_same_embed_dim:
            own = {"in_proj_weight": weights[0] if len(weights) == 1 else torch.cat(weights)}
        else:
            parts = [part for weight in weights for part in weight.split(self.embed_dim)]
            own = dict(zip(SEPARATE, parts, strict=True))
        if self.has_bias:
            biases = [layer.bias.detach() for layer in layers]
            own["in_proj_bias"] = biases[0] if len(biases) == 1 else torch.cat(biases)
        for name, numbers in own.items():
            dense._parameters[name] = nn.Parameter(numbers, requires_grad=_learns(layers, "bias" in name))
        out = [self.out_proj]
        _fill(dense.out_proj, [_numbers(self.out_proj.weight)], [self.out_proj.bias], _learns(out), _learns(out, True))
        return dense.train(self.training)

    def config(self) -> dict[str, Any]:
        """All that `from_config` needs to build this attention again; its weights, and its layers, are not in it."""
        return {
            "embed_dim": self.embed_dim,
            "num_heads": self.num_heads,
            "kdim": self.kdim,
            "vdim": self.vdim,
            "bias": self.has_bias,
            "dropout": self.dropout,
            "batch_first": self.batch_first,
            "layout": self.layout,
        }

    @classmethod
    def from_config(cls, data: Mapping[str, Any]) -> Self:
        """The attention that `config` describes, with dense projections.

        Raises: ValueError for anything that `config` would not have written.
        """
        read = Config(cls.__name__, data, _KEYS)
        dropout = data["dropout"]
        if type(dropout) not in (int, float) or not 0 <= dropout <= 1:
            raise ValueError(f"{cls.__name__} config: dropout={str(dropout)[:40]}: expected a number from 0 to 1")
        embed_dim, kdim, vdim = (read.integer(name) for name in ("embed_dim", "kdim", "vdim"))
        read.check_numbers(embed_dim * (2 * embed_dim + kdim + vdim))
        return cls(
            embed_dim,
            read.integer("num_heads"),
            dropout,
            read.flag("bias"),
            kdim,
            vdim,
            read.flag("batch_first"),
            read.word("layout", LAYOUTS),
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The attended values, and the weights (averaged over heads if `average_attn_weights`) if `need_weights`.

        Masks as in nn.MultiheadAttention: of booleans, where True leaves out, or of numbers that are added.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask: give the mask too")
        is_batched = query.dim() == 3
        q, k, v = (self._heads(x) for x in self._projected(query, key, value))
        if is_causal and key_padding_mask is None and not need_weights:
            mask = None
        else:
            mask, is_causal = self._mask(attn_mask, key_padding_mask, q), False
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1 / self.head_dim)) @ k.transpose(-2, -1)
            weights = F.softmax(scores if mask is None else scores + mask, -1)
            weights = F.dropout(weights, dropout) if dropout else weights
            attended = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if is_batched else weights.squeeze(0)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        if not is_batched:
            joined = attended[0].transpose(0, 1).flatten(1)
        else:
            joined = (attended.transpose(1, 2) if self.batch_first else attended.permute(2, 0, 1, 3)).flatten(2)
        return self.out_proj(joined), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of all heads."""
        size = self.embed_dim
        if self.layout == "separate":
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if self.layout == "kv_proj":
            k, v = self.kv_proj(key).split(size, -1)
            return self.q_proj(query), k, v if value is key else self.kv_proj(value).split(size, -1)[1]
        if query is key and key is value:
            return cast(tuple[Tensor, Tensor, Tensor], self.in_proj(query).split(size, -1))
        q, k, v = (self.in_proj(x).split(size, -1)[i] for i, x in enumerate((query, key, value)))
        return q, k, v

    def _heads(self, x: Tensor) -> Tensor:
        """(N, heads, L, head_dim) of what a projection gave."""
        heads = x.reshape(*x.shape[:-1], self.num_heads, self.head_dim)
        if heads.dim() == 3:
            return heads.transpose(0, 1).unsqueeze(0)
        return heads.transpose(1, 2) if self.batch_first else heads.permute(1, 2, 0, 3)

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one that is added to the scores, (N or 1, heads or 1, L or 1, S)."""
        mask = None
        if attn_mask is not None:
            mask = _added(attn_mask, q.dtype)
            if mask.dim() == 3:
                mask = mask[None] if mask.shape[0] == 1 else mask.unflatten(0, (q.shape[0], self.num_heads))
            else:
                mask = mask[None, None]
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, q.dtype)
            padding = (padding if padding.dim() == 2 else padding[None])[:, None, None, :]
            mask = padding if mask is None else mask + padding
        return mask

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that a mask adds to scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)


def _parts(attention: nn.MultiheadAttention) -> tuple[list[Tensor], list[Tensor | None]]:
    """Weights and biases of query, key and value."""
    if attention._qkv_same_embed_dim:
        weights = list(attention.in_proj_weight.chunk(3))
    else:
        weights = [getattr(attention, name) for name in SEPARATE]
    return weights, [None] * 3 if attention.in_proj_bias is None else list(attention.in_proj_bias.chunk(3))


def _grouped(parts: list[Any], layout: str) -> list[list[Any]]:
    """Query, key and value by the layer that they are in."""
    return {"in_proj": [parts], "kv_proj": [parts[:1], parts[1:]], "separate": [[part] for part in parts]}[layout]


def _needs(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad


def _learns(layers: list[Any], biases: bool = False) -> bool:
    """Whether the biases of layers, dense or sketched, are trained, or else what makes up their weights."""
    found = [layer.bias for layer in layers if layer.bias is not None]
    if not biases:
        own = {id(bias) for bias in found}
        found = [p for layer in layers for p in layer.parameters() if id(p) not in own]
    return any(p.requires_grad for p in found)


def _fill(
    layer: nn.Linear, weights: list[Tensor], biases: list[Tensor | None], learns: bool, bias_learns: bool
) -> None:
    """Give a layer these rows, without a copy where they lie one after the other."""
    layer.weight = nn.Parameter(_stacked([weight.detach() for weight in weights]), requires_grad=learns)
    if layer.bias is not None:
        kept = [cast(Tensor, bias).detach() for bias in biases]
        layer.bias = nn.Parameter(_stacked(kept), requires_grad=bias_learns)


def _stacked(parts: list[Tensor]) -> Tensor:
    """The parts as one tensor: a view, where they are neighbours in one memory."""
    first, rows = parts[0], sum(len(part) for part in parts)
    step = first.numel()
    follow = all(
        not part.is_meta
        and part.is_contiguous()
        and part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and part.storage_offset() == first.storage_offset() + i * step
        for i, part in enumerate(parts)
    )
    if len(parts) == 1:
        return first
    return first.as_strided((rows, *first.shape[1:]), first.stride()) if follow else torch.cat(parts)


def _numbers(weight: Tensor) -> Tensor:
    """A weight as a plain tensor; that of a sketched layer is multiplied out."""
    return weight.detach().clone() if type(weight) not in (Tensor, nn.Parameter) else weight.detach()
