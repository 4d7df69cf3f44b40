"""A run from memory equals the whole run, to the bit, whatever a model's modules do besides answering."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, cast
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

from panther.batches import Call, float_outputs, inference, parts_of, run
from panther.replay import record


class Block(nn.Module):
    """A residual block that changes what its own layers answer in place."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.norm, self.up, self.relu, self.down = (
            nn.LayerNorm(size),
            nn.Linear(size, 16),
            nn.ReLU(inplace=True),
            nn.Linear(16, size),
        )

    def forward(self, x: Tensor) -> Tensor:
        inside = self.down(self.relu(self.up(self.norm(x))))
        inside += x
        return cast(Tensor, inside)


class Stack(nn.Module):
    """Blocks in a row; what the first gave is used again behind all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(8, 8), nn.Sequential(Block(), Block()), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        return cast(Tensor, self.last(self.blocks(first)) + first.tanh())


class Twice(nn.Module):
    """A layer that runs before and after another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.last(self.layer(self.other(self.layer(x)))))


class Spoils(nn.Module):
    """A module that changes its input besides answering."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            answer = self.layer(x)
            x.mul_(2.0)
            return cast(Tensor, answer)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.part, self.last = nn.Linear(8, 8), Spoils.Part(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return cast(Tensor, self.last(self.part(x)) + x)


class Remembers(nn.Module):
    """A module that leaves something in an attribute, which the model reads."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.seen: list[Tensor] = []
            self.register_buffer("mean", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.seen[:] = [x.square()]
            cast(Tensor, self.mean).copy_(x.mean())
            return cast(Tensor, self.layer(x))

    def __init__(self) -> None:
        super().__init__()
        self.first, self.part, self.last = nn.Linear(8, 8), Remembers.Part(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        answer = self.last(self.part(self.first(x)))
        return cast(Tensor, answer + self.part.seen[0] * cast(Tensor, self.part.mean))


class Store:
    """Something that is no tensor, into which layers write."""

    def __init__(self) -> None:
        self.held: list[Tensor] = []


class Stores(nn.Module):
    """Parts that are given an object, a list or a dict, and write into it."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor, store: Any) -> Tensor:
            if isinstance(store, dict):
                store[len(store)] = x
            else:
                (store.held if isinstance(store, Store) else store).append(x)
            return cast(Tensor, self.layer(x))

    def __init__(self, store: Callable[[], Any]) -> None:
        super().__init__()
        self.parts, self.last, self.store = nn.ModuleList([Stores.Part(), Stores.Part()]), nn.Linear(8, 8), store

    def forward(self, x: Tensor) -> Tensor:
        store = self.store()
        for part in self.parts:
            x = part(x, store)
        held = store.held if isinstance(store, Store) else list(store.values()) if isinstance(store, dict) else store
        return cast(Tensor, self.last(x) + sum(held))


class Draws(nn.Module):
    """A part that draws random numbers before another does."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.layer(x) + torch.randn_like(x))

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.last = nn.Sequential(Draws.Part(), Draws.Part()), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.last(self.parts(x)))


class Listens(nn.Module):
    """What a hook took from inside of a block is part of the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.last = Block(), nn.Linear(8, 8)
        self.taken: dict[str, Tensor] = {}
        self.block.up.register_forward_hook(lambda _module, _args, output: self.taken.update(up=output))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        answer = self.last(self.block(x))
        return {"answer": answer, "inside": self.taken.pop("up")}


class Tied(nn.Module):
    """The last layer's weight is read by another module before the other layers."""

    def __init__(self) -> None:
        super().__init__()
        self.given, self.block, self.last = nn.Embedding(8, 8), Block(), nn.Linear(8, 8, bias=False)
        self.last.weight = self.given.weight

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.last(self.block(self.given(x.argmax(-1)))))


class Same(nn.Module):
    """A part answers with what it was given, and that is changed afterwards."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x

    def __init__(self) -> None:
        super().__init__()
        self.first, self.part, self.last = nn.Linear(8, 8), Same.Part(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.part(x)
        y += 1.0
        return cast(Tensor, self.last(y) + x)


class Several(nn.Module):
    """Parts that answer with several things."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 16)

        def forward(self, x: Tensor, *, scale: float) -> dict[str, Any]:
            low, high = self.layer(x).split(8, -1)
            return {"parts": (low.contiguous(), [high.contiguous(), None]), "scale": scale}

    def __init__(self) -> None:
        super().__init__()
        self.part, self.last = Several.Part(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        found = self.part(x, scale=2.0)
        low, (high, _) = found["parts"]
        low *= found["scale"]
        return cast(Tensor, self.last(low + high))


class Sparse(nn.Module):
    """A part with a sparse matrix among its buffers."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.register_buffer("neighbours", torch.eye(6).to_sparse())

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.neighbours) @ self.layer(x)

    def __init__(self) -> None:
        super().__init__()
        self.part, self.last = Sparse.Part(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.last(self.part(x)))


class Mapped(nn.Module):
    """A block that runs inside of a transform."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(8, 8), Block(), nn.Linear(8, 8)
        self.block.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.last(torch.vmap(lambda row: self.block.down(self.block.up(row)))(self.first(x))))


class Forces(nn.Module):
    """A gradient is what it answers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.last = nn.Linear(8, 8), nn.Linear(8, 1), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.outer(self.inner(x).tanh()).sum()
            forces = torch.autograd.grad(energy, x)[0]
        return cast(Tensor, self.last(forces))


class Rounds(nn.Module):
    """Layers run as often as what they answer asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        with torch.no_grad():
            self.second.weight.mul_(8.0)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.second(self.first(x))
            if x.square().mean() > 1.5:
                break
        return cast(Tensor, self.last(x))


class Centred(nn.Module):
    """The bias of the last layer is read before all others."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down(self.up(x - self.down.bias).relu()))


class Aside(nn.Module):
    """A part leaves something in an attribute, which is empty again when the model has answered."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scores = nn.Linear(8, 8), None

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            self.scores = y.softmax(-1)
            return cast(Tensor, 2 * y)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.inner = Aside.Part(), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.part(x)
            scores, self.part.scores = self.part.scores, None
            return cast(Tensor, self.inner(y) * (1.0 if scores is None else scores))

    def __init__(self) -> None:
        super().__init__()
        self.both, self.last = Aside.Both(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.last(self.both(x)))


class Narrow(nn.Module):
    """A part answers with a view whose rows are not side by side."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 12)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.layer(x)[:, 2:10])

    def __init__(self) -> None:
        super().__init__()
        self.part, self.last = Narrow.Part(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.part(x)
        return cast(Tensor, self.last(x) * (1.0 if x.is_contiguous() else 2.0))


class Noise(nn.Module):
    """Dropout that stays on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.first(x), 0.5, training=True)
        return cast(Tensor, self.last(nn.functional.dropout(x, 0.5, training=True)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "stack": Stack,
    "twice": Twice,
    "spoils": Spoils,
    "remembers": Remembers,
    "object": lambda: Stores(Store),
    "list": lambda: Stores(list),
    "dict": lambda: Stores(dict),
    "draws": Draws,
    "listens": Listens,
    "tied": Tied,
    "same": Same,
    "several": Several,
    "sparse": Sparse,
    "mapped": Mapped,
    "forces": Forces,
    "rounds": Rounds,
    "centred": Centred,
    "aside": Aside,
    "narrow": Narrow,
    "noise": Noise,
    "dropout": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(8, 8)).train(),
    "transformer": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(-1, (2, 2, 2)), nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.ReLU(True), nn.Conv2d(4, 2, 1)
    ),
}


def inputs(name: str) -> Call:
    return Call((torch.randn(3, 5, 8) if name == "transformer" else torch.randn(6, 8),))


@pytest.mark.parametrize("held_bytes", [0, 500, 1e9])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_run_with_another_weight_is_the_same_from_memory(name: str, held_bytes: float) -> None:
    model, call = MODELS[name](), inputs(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    with inference(model):
        known = record(model, call, held_bytes)
    assert held_bytes < 1e9 or bool(known.answers) == (name not in ("draws", "noise", "forces"))
    differ = 0
    for changed in [name for layer in layers for name in (f"{layer}.weight", f"{layer}.bias")]:
        if changed.endswith(".bias") and model.get_submodule(changed[:-5]).bias is None:
            continue
        other = {changed: model.get_parameter(changed).detach() * 0.5}
        with inference(model):
            wanted = run(model, call, tensors=other)
        with inference(model), known.replayed([model.get_parameter(changed)]):
            got = run(model, call, tensors=other)
        pairs = list(zip(float_outputs(wanted), float_outputs(got), strict=True))
        assert pairs and all(torch.equal(a, b) for a, b in pairs), changed
        with inference(model):
            dense = run(model, call)
        differ += any(not torch.equal(a, b) for a, b in zip(float_outputs(dense), float_outputs(got), strict=True))
    assert differ >= len(layers)  # most of the exchanges change the answer
    assert all("forward" not in vars(module) for module in model.modules())
    for key, value in model.state_dict().items():
        assert all(torch.equal(a, b) for a, b in zip(parts_of(value), parts_of(before[key]), strict=True))


def runs_of(model: nn.Module, layer: str, held_bytes: float = 1e9) -> list[str]:
    """Which modules run when this layer is another and the rest is answered from memory."""
    call = Call((torch.randn(6, 8),))
    with inference(model):
        known = record(model, call, held_bytes)
    ran: list[str] = []
    weight = model.get_parameter(f"{layer}.weight")
    names = {module: name for name, module in model.named_modules()}
    classes = {type(module) for module in names}

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            ran.append(names[self])
            return original(self, *args, **kwargs)

        return forward

    with pytest.MonkeyPatch.context() as patch, inference(model):
        for kind in classes:
            patch.setattr(kind, "forward", watched(kind.forward))
        with known.replayed([weight]):
            run(model, call)
    return [name for name in ran if name]


def test_what_ended_before_a_layer_does_not_run() -> None:
    assert runs_of(Stack(), "last") == ["last"]
    assert runs_of(Stack(), "blocks.1.down") == [
        "blocks",
        *(f"blocks.1{part}" for part in ("", ".norm", ".relu", ".down")),
        "last",
    ]
    # The first call of a layer counts.
    assert runs_of(Twice(), "layer") == ["layer", "other", "layer", "last"]
    assert runs_of(Twice(), "last") == ["layer", "layer", "last"]


def test_the_outermost_answers_stay_where_not_all_can() -> None:
    one = 6 * 8 * 4
    assert runs_of(Stack(), "last", 2 * one) == ["last"]
    assert "blocks" in runs_of(Stack(), "last", 0) and "first" in runs_of(Stack(), "last", one - 1)
    model = Stack()
    with inference(model):
        known = record(model, Call((torch.randn(6, 8),)), 5 * one)
    assert sum(kept.nbytes for kept in known.answers.values()) <= 5 * one
    assert {model.first, model.blocks} < set(known.answers)


def test_nothing_is_kept_of_modules_that_do_more_than_answer() -> None:
    def kept(model: nn.Module) -> set[str]:
        with inference(model):
            known = record(model, Call((torch.randn(6, 8),)))
        return {name for name, module in model.named_modules() if module in known.answers}

    assert kept(Spoils()) == {"first", "part.layer"}
    assert kept(Remembers()) == {"first", "part.layer"}
    for store in (Store, list, dict):
        assert kept(Stores(store)) == {"parts.0.layer", "parts.1.layer"}
    assert kept(Draws()) == set()
    assert kept(Listens()) == {"block.up", "block.down"}
    assert kept(Twice()) == {"other"}
    assert kept(Same()) == {"first"}
    assert kept(Forces()) == kept(Noise()) == kept(Narrow()) - {"part.layer"} == set()
    assert kept(Mapped()) == {"first"}
    assert kept(Aside()) == {"both.part.layer", "both.inner"}


def test_nothing_is_kept_where_the_answer_from_memory_is_another() -> None:
    class Hidden(nn.Module):
        """A global that a part writes and the model reads."""

        def __init__(self) -> None:
            super().__init__()
            self.part, self.last = nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8)
            part = self.part
            part.forward = lambda x: (kept.append(x), nn.Sequential.forward(part, x))[1]  # type: ignore[method-assign,func-returns-value]

        def forward(self, x: Tensor) -> Tensor:
            kept.clear()
            return cast(Tensor, self.last(self.part(x)) + kept[0])

    kept: list[Tensor] = []
    model = Hidden()
    own = vars(model.part)["forward"]
    with inference(model):
        assert record(model, Call((torch.randn(6, 8),))).answers == {}
    assert vars(model.part)["forward"] is own


def test_modules_have_their_forward_again_after_an_error() -> None:
    class Fails(Stack):
        fails = False

        def forward(self, x: Tensor) -> Tensor:
            answer = super().forward(x)
            if self.fails:
                raise ValueError("not again")
            return answer

    model, call = Fails(), Call((torch.randn(6, 8),))
    with inference(model):
        known = record(model, call)
    model.fails = True
    with pytest.raises(ValueError, match="not again"), inference(model), known.replayed([model.last.weight]):
        run(model, call)
    assert all("forward" not in vars(module) for module in model.modules())
    with inference(model):
        assert record(model, call).answers == {}
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_layer_that_did_not_run_leaves_everything_to_be_run() -> None:
    model = Stack()
    spare = nn.Linear(8, 8)
    with inference(model):
        known = record(model, Call((torch.randn(6, 8),)))
        with known.replayed([spare.weight]):
            assert all("forward" not in vars(module) for module in model.modules())
        with known.replayed([]):
            assert all("forward" not in vars(module) for module in model.modules())


def test_what_a_model_computes_is_freed_with_its_record() -> None:
    model = Stack()
    with inference(model):
        known = record(model, Call((torch.randn(6, 8),)))
    held = [ref(kept.output) for kept in known.answers.values()]
    assert held and all(tensor() is not None for tensor in held)
    del known
    gc.collect()
    assert all(tensor() is None for tensor in held)


def test_a_decoder_with_a_cache_is_replayed_but_for_its_attention() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=12)
    model = transformers.GPT2LMHeadModel(config).eval()
    call = Call((), {"input_ids": torch.randint(0, 40, (3, 9)), "use_cache": True})
    with inference(model):
        known = record(model, call)
    names = {name for name, module in model.named_modules() if module in known.answers}
    assert {"transformer.h.0.mlp", "transformer.h.1.attn.c_attn"} <= names
    assert names.isdisjoint({"transformer", "transformer.h.0", "transformer.h.0.attn"})
    for layer in ("transformer.h.0.attn.c_proj", "transformer.h.1.mlp.c_fc"):
        weight = model.get_parameter(f"{layer}.weight")
        other = {f"{layer}.weight": weight.detach() * 0.5}
        with inference(model):
            wanted = run(model, call, tensors=other)
            with known.replayed([weight]):
                got = run(model, call, tensors=other)
        assert torch.equal(wanted.logits, got.logits)
