from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import panther
from panther import products
from panther.batches import Call
from panther.capture import capture
from panther.errors import CalibrationError
from panther.factors import Profile
from panther.measure import Accumulator, Measured, check_batches, measure, passes
from panther.progress import Progress
from panther.spec import LayerSpec

# Products are summed in float32 a batch and in float64 over batches.
RELATIVE = 1e-5


class Tokens(nn.Module):
    """Three layers that read one tensor, one with fewer outputs than inputs, and a mask that the layers ignore."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 6)
        self.down = nn.Linear(8, 3)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mixed = self.query(x).tanh() * self.key(x) + self.value(x).mean(-1, keepdim=True)
        answer: Tensor = self.down(mixed)
        return answer if attention_mask is None else answer * attention_mask.unsqueeze(-1)


class Pixels(nn.Module):
    def __init__(self, size: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.strided = nn.Conv2d(4, 6, 1, stride=2)
        self.head = nn.Linear(6, 2)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.strided(self.conv(x).relu()).mean((2, 3)))
        return answer

    def batches(self, count: int = 3, size: int = 4) -> list[Call]:
        return [Call((torch.randn(size, 3, self.size, self.size),)) for _ in range(count)]


def specs_of(model: nn.Module, call: Call) -> tuple[LayerSpec, ...]:
    return capture(model, call).sketchable


def measured(model: nn.Module, batches: Sequence[Call], *, gradient_samples: int = 0, **options: Any) -> Measured:
    samples = sum(call.batch_size for call in batches)
    specs = specs_of(model, batches[0])
    return measure(model, specs, batches, samples=samples, gradient_samples=gradient_samples, **options)


def profiles_of(model: nn.Module, batches: Sequence[Call], **options: Any) -> dict[str, Profile]:
    return measured(model, batches, **options).profiles


@contextlib.contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """What goes into and comes out of every layer while the block runs."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    hooks = [
        module.register_forward_hook(
            lambda _m, args, output, name=name: seen.setdefault(name, []).append((args[0].clone(), output.clone()))
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def rows_of(model: nn.Module, batches: Sequence[Call], layer: str, side: int, keep: Any = None) -> np.ndarray:
    """Every row that a layer saw (side 0) or gave (side 1), channels last, over all batches."""
    with recorded(model) as seen:
        for call in batches:
            model(*call.args, **call.kwargs)
    rows = []
    for pair in seen[layer]:
        tensor = pair[side].float()
        tensor = tensor if isinstance(model.get_submodule(layer), nn.Linear) else tensor.movedim(1, -1)
        rows.append(tensor.reshape(-1, tensor.shape[-1]))
    return torch.cat(rows)[slice(None) if keep is None else keep].double().numpy()


def assert_moments(moments: Any, rows: np.ndarray) -> None:
    assert moments.rows == len(rows)
    assert moments.mean.dtype == moments.covariance.dtype == torch.float64
    scale = float(np.abs(rows).max())
    np.testing.assert_allclose(moments.mean.numpy(), rows.mean(0), rtol=RELATIVE, atol=RELATIVE * scale)
    expected = np.cov(rows.T, bias=True).reshape(rows.shape[1], rows.shape[1])
    np.testing.assert_allclose(
        moments.covariance.numpy(), expected, rtol=RELATIVE, atol=RELATIVE * float(np.abs(expected).max())
    )


def token_batches(count: int = 3, **more: Any) -> list[Call]:
    return [Call((), {"x": torch.randn(4, 5, 6) + 3, **more}) for _ in range(count)]


# Moments


def test_input_moments_are_those_of_all_rows_together() -> None:
    model, batches = Tokens(), token_batches()
    profile = profiles_of(model, batches)["query"]
    assert_moments(profile.seen.inputs, rows_of(model, batches, "query", 0))
    assert profile.seen.outputs is None
    np.testing.assert_allclose(profile.mean, rows_of(model, batches, "query", 0).mean(0), rtol=RELATIVE)


def test_a_layer_with_fewer_outputs_than_inputs_is_watched_at_its_outputs() -> None:
    model, batches = Tokens(), token_batches()
    profile = profiles_of(model, batches)["down"]
    assert_moments(profile.seen.outputs, rows_of(model, batches, "down", 1))
    assert profile.seen.inputs is None
    np.testing.assert_allclose(profile.mean, rows_of(model, batches, "down", 0).mean(0), rtol=RELATIVE, atol=RELATIVE)


def test_layers_that_read_one_tensor_share_its_moments() -> None:
    profiles = profiles_of(Tokens(), token_batches())
    assert profiles["query"].seen.inputs is profiles["key"].seen.inputs is profiles["value"].seen.inputs


def test_nothing_cancels_when_the_mean_is_far_larger_than_the_spread() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    rows = torch.randint(-4, 5, (200, 4)) / 8 + 1000.0  # exact in float32
    profile = profiles_of(model, [Call((part,)) for part in rows.split(50)])["0"]
    assert_moments(profile.seen.inputs, rows.double().numpy())


def excess(truth: Tensor, found: Tensor, rank: int) -> float:
    """How much more of the energy is outside the leading vectors of what was found than of the truth."""
    lost = [
        float(truth.trace() - (kept * (truth @ kept)).sum())
        for kept in (torch.linalg.eigh(matrix).eigenvectors[:, -rank:] for matrix in (found, truth))
    ]
    return lost[0] / lost[1] - 1


@pytest.mark.parametrize(("samples", "is_sketched"), [(400, True), (40, False)])
def test_products_of_wide_layers_are_sketched_where_enough_rows_come(
    monkeypatch: pytest.MonkeyPatch, samples: int, *, is_sketched: bool
) -> None:
    monkeypatch.setattr("panther.measure.SKETCHED_FROM", 64)
    torch.manual_seed(0)
    model = nn.Linear(64, 80)
    rows = torch.randn(samples, 12, 64) * torch.arange(1, 65) ** -0.5 + 3
    rows[:, 0] *= 30  # a few rows that carry most of the energy, as the first token of many models
    found = profiles_of(model, [Call((part,)) for part in rows.split(100)])[""].seen.inputs
    assert found is not None
    exact = torch.cov(rows.reshape(-1, 64).double().T, correction=0)
    torch.testing.assert_close(found.mean, rows.reshape(-1, 64).double().mean(0), rtol=1e-6, atol=1e-6)
    assert found.rows == 12 * samples
    if not is_sketched:
        torch.testing.assert_close(found.covariance, exact, rtol=1e-5, atol=1e-5)
        return
    assert not torch.allclose(found.covariance, exact, rtol=1e-2, atol=1e-3)
    assert excess(exact, found.covariance, 8) < 0.05 and excess(exact, found.covariance, 16) < 0.07


@pytest.mark.parametrize("in_kernel", [True, False])
@pytest.mark.parametrize("sizes", [(300,), (5, 300, 7), (40, 40, 40, 40), (200, 3, 200)])
def test_moments_of_small_and_large_padded_batches_are_those_of_all_rows(
    sizes: tuple[int, ...], in_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_kernel:
        monkeypatch.setattr(products, "has_moments_kernel", lambda: False)
    rows, counts = torch.randn(sum(sizes), 20) + 5, torch.rand(sum(sizes)) > 0.2
    rows[~counts] = torch.nan
    accumulator = Accumulator()
    for part, there in zip(rows.split(sizes), counts.split(sizes), strict=True):
        accumulator.add(part, counts=there)
    kept = rows[counts].double()
    found = accumulator.moments()
    assert found is not None and found.rows == len(kept)
    torch.testing.assert_close(found.mean, kept.mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.covariance, kept.T.cov(correction=0), rtol=0, atol=1e-5)


def test_padded_positions_are_left_out() -> None:
    model = Tokens()
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    batches = token_batches(attention_mask=mask)
    keep = mask.bool().flatten().repeat(len(batches)).nonzero().flatten()
    profiles = profiles_of(model, batches)
    assert_moments(profiles["query"].seen.inputs, rows_of(model, batches, "query", 0, keep))
    assert_moments(profiles["down"].seen.outputs, rows_of(model, batches, "down", 1, keep))


@pytest.mark.parametrize("gradient_samples", [0, 100])
def test_what_stands_in_padded_positions_changes_nothing(gradient_samples: int) -> None:
    model = Tokens()
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    batches = token_batches(attention_mask=mask)
    garbage = [
        Call((), {**call.kwargs, "x": call.kwargs["x"].masked_fill(~mask.bool().unsqueeze(-1), -77.0)})
        for call in batches
    ]
    clean, dirty = (profiles_of(model, b, gradient_samples=gradient_samples) for b in (batches, garbage))
    for name, profile in clean.items():
        assert_same_profile(profile, dirty[name])


def test_of_many_rows_a_random_part_of_those_that_count_is_looked_at_whatever_else_is_watched() -> None:
    model, counted = Tokens(), 250
    mask = torch.zeros(1, 300, dtype=torch.int64)
    mask[:, :counted] = 1
    x = torch.randn(1, 300, 6).masked_fill(mask.unsqueeze(-1) == 0, 1e6)
    batches = [Call((), {"x": x, "attention_mask": mask})] * 2
    together = profiles_of(model, batches)
    for name, rows in {"query": 2 * 32 * 6, "down": 2 * 32 * 3}.items():
        moments = together[name].seen.inputs or together[name].seen.outputs
        assert moments is not None and moments.rows == together[name].rows == rows < 2 * counted
        assert bool(moments.mean.abs().max() < 1e3)
        (spec,) = (spec for spec in specs_of(model, batches[0]) if spec.name == name)
        alone = measure(model, [spec], batches, samples=2, gradient_samples=0).profiles[name]
        assert_same_profile(together[name], alone)
    query = together["query"].seen.inputs
    assert query is not None
    assert abs(float(query.mean[0]) - float(x[0, :counted, 0].mean())) > 1e-4  # not all, and not one part twice


def test_a_convolution_is_watched_at_its_channels_and_outputs_over_all_positions() -> None:
    model = Pixels()
    batches = model.batches(3, 2)
    profile = profiles_of(model, batches)["conv"]
    assert_moments(profile.seen.inputs, rows_of(model, batches, "conv", 0))
    assert_moments(profile.seen.outputs, rows_of(model, batches, "conv", 1))
    assert profile.samples is not None and profile.mean is None
    first = torch.cat([call.args[0] for call in batches])[: len(profile.samples)]
    assert all(any(torch.equal(kept, sample) for sample in torch.cat([c.args[0] for c in batches])) for kept in first)


def test_a_strided_pointwise_convolution_has_the_mean_of_the_positions_it_reads() -> None:
    model = Pixels()
    batches = model.batches()
    profile = profiles_of(model, batches)["strided"]
    with recorded(model) as seen, torch.no_grad():
        for call in batches:
            model(*call.args)
    read = torch.cat([given[:, :, ::2, ::2] for given, _ in seen["strided"]]).mean((0, 2, 3))
    assert profile.mean is not None
    torch.testing.assert_close(profile.mean.float(), read, rtol=1e-5, atol=1e-6)


def test_only_a_fixed_part_of_a_large_image_is_looked_at() -> None:
    model = Pixels(40)
    batches = model.batches(8, 16)
    profile = profiles_of(model, batches)["conv"]
    rows = profile.rows
    assert 64 * 4 <= rows < 8 * 16 * 40 * 40
    assert rows % (8 * 16) == 0  # as many positions of every sample
    assert_same_profile(profile, profiles_of(model, batches)["conv"])


def test_inputs_without_a_batch_dimension_are_one_sample() -> None:
    model = nn.Sequential(nn.Conv1d(2, 6, 3))
    rows = torch.randn(2, 9)
    profile = profiles_of(model, [Call((rows,))])["0"]
    assert_moments(profile.seen.inputs, rows.T.double().numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_summed_in_full_precision(dtype: torch.dtype) -> None:
    model = Tokens().to(dtype)
    batches = [Call((), {"x": call.kwargs["x"].to(dtype)}) for call in token_batches()]
    profiles = profiles_of(model, batches, gradient_samples=100)
    assert_moments(profiles["query"].seen.inputs, rows_of(model, batches, "query", 0))
    assert_moments(profiles["down"].seen.outputs, rows_of(model, batches, "down", 1))
    sensitivity = profiles["down"].seen.sensitivity
    assert sensitivity is not None and sensitivity.dtype == torch.float64


def test_hooks_of_the_user_do_not_change_what_a_layer_is_seen_to_give() -> None:
    """A steering vector or an adapter stays on the model when the layer under it is replaced."""
    first, last, factor = nn.Linear(6, 3), nn.Linear(3, 4), torch.tensor([1.0, 10.0, 100.0])
    calls = [Call((torch.randn(16, 6),)) for _ in range(2)]

    class Scale(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * factor

    wanted = profiles_of(nn.Sequential(first, Scale(), last), calls, gradient_samples=32)["0"].seen
    with first.register_forward_hook(lambda _module, _args, output: output * factor):
        found = profiles_of(nn.Sequential(first, nn.Identity(), last), calls, gradient_samples=32)["0"].seen
    assert wanted.outputs is not None and found.outputs is not None
    assert wanted.sensitivity is not None and found.sensitivity is not None
    assert torch.equal(wanted.outputs.covariance, found.outputs.covariance)
    assert torch.equal(wanted.sensitivity, found.sensitivity)


def test_a_layer_that_no_batch_reaches_has_no_rows() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.rare = nn.Linear(4, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.always(x)
            return self.rare(x) if bool((x > 1e6).any()) else x

    model = Gated()
    batches = [Call((torch.randn(5, 4),))]
    reached = capture(model, Call((torch.full((1, 4), 1e9),))).sketchable
    profiles = measure(model, reached, batches, samples=5).profiles
    assert profiles["rare"].rows == 0 and profiles["rare"].seen.inputs is None
    assert profiles["always"].rows == 5


class Twice(nn.Module):
    """Two layers whose names are those that the graph gives to tensors that other layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)  # called twice, so that it shares its inputs with nobody
        self.conv1d = nn.Conv1d(6, 6, 1)
        self.after, self.last = nn.Linear(6, 8), nn.Linear(9, 12)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(self.linear(x))
        return self.last(self.conv1d(x.transpose(1, 2))).sum() + self.after(hidden)


def test_a_layer_named_like_a_tensor_is_not_taken_for_one_of_its_readers() -> None:
    model = Twice()
    batches = [Call((torch.randn(4, 9, 6),)) for _ in range(2)]
    # Whatever the graph of this torch calls them: the tensors that `after` and `last` read are named like layers.
    keys = {"after": "linear", "last": "conv1d"}
    specs = [replace(spec, input_key=keys.get(spec.name, "")) for spec in specs_of(model, batches[0])]
    profiles = measure(model, specs, batches, samples=8).profiles
    for name in ("after", "last"):
        assert_moments(profiles[name].seen.inputs, rows_of(model, batches, name, 0))


# Several passes


def assert_same_profile(first: Profile, second: Profile) -> None:
    assert first.rows == second.rows
    for a, b in (
        (first.mean, second.mean),
        (first.samples, second.samples),
        (first.seen.sensitivity, second.seen.sensitivity),
        *((getattr(first.seen.inputs, f, None), getattr(second.seen.inputs, f, None)) for f in ("mean", "covariance")),
        *(
            (getattr(first.seen.outputs, f, None), getattr(second.seen.outputs, f, None))
            for f in ("mean", "covariance")
        ),
    ):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)


@pytest.mark.parametrize("model", [Tokens(), Pixels(12)], ids=["tokens", "pixels"])
def test_several_passes_give_the_profiles_of_one(model: Tokens | Pixels) -> None:
    batches = token_batches() if isinstance(model, Tokens) else model.batches(3, 10)
    specs = specs_of(model, batches[0])
    whole = measure(model, specs, batches, samples=30).profiles
    parts = passes(specs, limit_bytes=1)
    assert len(parts) > 1
    for part in parts:
        for name, profile in measure(model, part, batches, samples=30).profiles.items():
            assert_same_profile(profile, whole[name])


def test_every_layer_is_in_one_pass_and_readers_of_one_tensor_stay_together() -> None:
    specs = specs_of(Tokens(), token_batches()[0])
    for limit in (1, 400, 10**9):
        parts = passes(specs, limit_bytes=limit)
        assert sorted(s.name for part in parts for s in part) == ["down", "key", "query", "value"]
        assert any({"query", "key", "value"} <= {s.name for s in part} for part in parts)
    assert len(passes(specs, limit_bytes=10**9)) == 1


def test_no_layers_are_no_passes() -> None:
    assert passes([]) == []


# What goes wrong


def test_batches_that_are_not_finite_are_named() -> None:
    batches = token_batches()
    batches[2].kwargs["x"][0, 0, 0] = float("nan")
    batches[2].kwargs["x"][0, 0, 1] = float("inf")
    with pytest.raises(CalibrationError, match=r"batch 2 holds 2 values .*NaN or infinite .*leave this batch out"):
        profiles_of(Tokens(), batches)


class Graph(nn.Module):
    """Takes the features of nodes and the edges between them, dense or sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        answer: Tensor = self.layer(edges @ x)
        return answer


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse")  # torch calls one of these layouts beta
def test_sparse_inputs_are_measured_and_named_when_they_are_not_finite(layout: torch.layout) -> None:
    nodes, edges = torch.randn(8, 6), torch.eye(8)
    good = Call((nodes, edges.to_sparse(layout=layout)))
    edges[0, 0] = torch.nan
    batches = [good, Call((nodes, edges.to_sparse(layout=layout)))]
    assert profiles_of(Graph(), [good])["layer"].rows == 8
    with pytest.raises(CalibrationError, match=r"batch 1 holds 1 values .*NaN or infinite \(shape \(8, 8\)\)"):
        profiles_of(Graph(), batches)


@pytest.mark.parametrize("gradient_samples", [0, 100])
def test_a_batch_of_another_shape_is_named_with_its_shape(gradient_samples: int) -> None:
    batches = [*token_batches(1), Call((), {"x": torch.randn(4, 5, 7)})]
    with pytest.raises(CalibrationError, match=r"batch 1 \(shapes \(4, 5, 7\)\) does not run.*example_inputs"):
        profiles_of(Tokens(), batches, gradient_samples=gradient_samples)


class Strict(nn.Module):
    """Asserts the size of its batches, with a message or without."""

    def __init__(self, *message: str) -> None:
        super().__init__()
        self.layer, self.message = nn.Linear(6, 3), message

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] != 4:
            raise AssertionError(*self.message)
        answer: Tensor = self.layer(x)
        return answer


@pytest.mark.parametrize(("message", "said"), [(("four, please",), "four, please"), ((), r"AssertionError\(\)")])
def test_a_batch_that_the_model_itself_refuses_is_named(message: tuple[str, ...], said: str) -> None:
    batches = [Call((torch.randn(size, 6),)) for size in (4, 4, 3)]
    with pytest.raises(CalibrationError, match=rf"batch 2 \(shapes \(3, 6\)\) does not run: {said}"):
        profiles_of(Strict(*message), batches)
    with pytest.raises(CalibrationError, match=rf"batch 7 \(shapes \(3, 6\)\) does not run: {said}"):
        check_batches(Strict(*message), batches[2:], 7)


def test_a_layer_whose_values_overflow_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8))
    with torch.no_grad():
        model[0].weight.fill_(3e38)
    with pytest.raises(CalibrationError, match=r"layer '1' are not finite.*exclude"):
        profiles_of(model, [Call((torch.ones(3, 4),))])


class Interrupted:
    """Batches that end in an exception."""

    def __init__(self, batches: Iterable[Call], error: BaseException) -> None:
        self.batches, self.error = batches, error

    def __iter__(self) -> Iterator[Call]:
        yield from self.batches
        raise self.error


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("gradient_samples", [0, 100])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), OSError("the disk is gone")], ids=repr)
def test_the_model_is_as_before_however_it_ends(error: BaseException | None, gradient_samples: int) -> None:
    model = Tokens().train()
    model.key.eval()
    model.query.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = token_batches(2)
    fused = torch.backends.mha.get_fastpath_enabled()
    data = batches if error is None else Interrupted(batches, error)
    with contextlib.nullcontext() if error is None else pytest.raises(type(error)):
        measure(model, specs_of(model, batches[0]), data, samples=8, gradient_samples=gradient_samples)
    assert hooks_of(model) == 0
    assert model.training and model.query.training and not model.key.training
    assert not model.query.weight.requires_grad and model.down.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled() == fused and torch.is_grad_enabled()


# Models that cannot be differentiated


class Detached(Tokens):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return super().forward(x, attention_mask)


class Bars(Progress):
    """Counts how many bars are open."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.labels = 0, list[str]()

    def track(self, items: Iterable[Any], label: str, total: int | None = None) -> Iterator[Any]:
        self.open += 1
        self.labels.append(label)
        assert self.open == 1, "a bar is open already"
        try:
            yield from items
        finally:
            self.open -= 1


def test_a_model_that_cannot_be_differentiated_is_measured_without_and_says_why() -> None:
    torch.manual_seed(1)
    model, batches, bars = Detached(), token_batches(), Bars()
    found = measured(model, batches, gradient_samples=100, progress=bars)
    assert found.not_differentiated is not None and "no floating-point output" in found.not_differentiated
    plain = profiles_of(model, batches)
    for name, profile in found.profiles.items():
        assert profile.seen.sensitivity is None
        assert_same_profile(profile, plain[name])
    assert bars.labels == ["measuring", "measuring again", "measuring again"] and bars.open == 0


def test_a_differentiable_model_says_nothing() -> None:
    found = measured(Tokens(), token_batches(), gradient_samples=100)
    assert found.not_differentiated is None
    assert all(profile.seen.sensitivity is not None for profile in found.profiles.values())


def test_only_the_first_samples_run_backward_and_all_are_measured() -> None:
    model, batches = Tokens(), token_batches()
    some, none = (profiles_of(model, batches, gradient_samples=count) for count in (6, 0))
    for name, profile in some.items():
        assert profile.seen.sensitivity is not None and profile.rows == none[name].rows == 60
        for side in ("inputs", "outputs"):
            first, second = getattr(profile.seen, side), getattr(none[name].seen, side)
            if first is not None:
                torch.testing.assert_close(first.covariance, second.covariance, rtol=1e-5, atol=1e-6)


def test_statistics_stay_in_full_precision_inside_the_models_own_autocast() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.layer(x)

    model, rows = Mixed(), torch.randn(64, 6)
    call = Call((rows,))
    found = measure(model, capture(model, call).sketchable, [call], samples=64).profiles["layer"]
    assert found.seen.inputs is not None
    expected = torch.cov(rows.double().T, correction=0)
    torch.testing.assert_close(found.seen.inputs.covariance, expected, rtol=1e-5, atol=1e-6)


def test_a_layer_that_is_called_by_keyword_is_measured() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=x)

    model, call = Keyword(), Call((torch.randn(8, 4),))
    assert measure(model, capture(model, call).sketchable, [call], samples=8).profiles["layer"].rows == 8


def test_a_model_of_one_batch_size_is_differentiated_whole() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).reshape(16, 2, 2).sum(1)

    model, call = Fixed(), Call((torch.randn(16, 4),))
    found = measure(model, capture(model, call).sketchable, [call, call], samples=32)
    assert found.not_differentiated is None
    assert found.profiles["layer"].seen.sensitivity is not None


def test_a_mask_of_minus_infinity_is_no_damage() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(6, 6)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            y: Tensor = (x @ x.mT + mask).softmax(-1) @ self.mix(x)
            return y

    mask = nn.Transformer.generate_square_subsequent_mask(4)
    given = [(torch.randn(8, 4, 6), mask) for _ in range(3)]
    options: dict[str, Any] = {"heal": "none", "progress": False, "verify": False}
    assert panther.compress(Attends(), 0.7, example_inputs=given[0], calib_data=given, **options).plan.choices
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken = [*given, (given[0][0].clone().index_fill_(0, torch.tensor([1]), bad), mask)]
        with pytest.raises(CalibrationError, match="NaN or infinite"):
            panther.compress(Attends(), 0.7, example_inputs=given[0], calib_data=broken, **options)
    silent = [*given, (torch.full_like(given[0][0], -torch.inf), mask)]
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        panther.compress(Attends(), 0.7, example_inputs=given[0], calib_data=silent, **options)
