from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace as changed
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor, nn

from panther import decompose as stage
from panther.batches import Call
from panther.capture import capture
from panther.chains import COLUMNS, CORRECTED, PIVOTED, QUANTISED, ROWS, TWO_GEMM, WHOLE, smallest_params
from panther.decompose import candidates, decompose, with_pair
from panther.factors import Factors, Profile, on_grid
from panther.measure import measure
from panther.nn.factor import compose, factorise
from panther.pack import packed
from panther.quantise import to_nearest
from panther.replace import sketched_layer
from panther.sketches import SENSITIVITY_RIDGE, with_ridge
from panther.spec import Choice, Grid, LayerSpec

# Even kernels with padding="same" pad one side more; torch says that this copies the input, of the dense layer too.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

RIDGE_SHOWS = 0.02, 1e-4  # errors of 1 x 1 kernels come with the ridge of the covariance; relative, absolute
BETWEEN_PROBES = 0.3  # how far off an interpolated error of a convolution may be, relative to it


class Case(NamedTuple):
    title: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]


def cases() -> Iterator[Case]:
    geometries: dict[str, dict[str, Any]] = {
        "plain": {},
        "strided": {"stride": 2, "padding": 1},
        "dilated": {"dilation": 2, "padding": 2},
        "same": {"padding": "same"},
        "reflect": {"padding": 2, "padding_mode": "reflect"},
        "circular same": {"padding": "same", "padding_mode": "circular"},
        "without bias": {"bias": False},
        "uneven": {"stride": (2, 1, 1), "padding": (1, 0, 2), "kernel_size": (3, 4, 2)},
    }
    kinds: tuple[tuple[Callable[..., nn.Module], tuple[int, ...]], ...] = (
        (nn.Conv1d, (11,)),
        (nn.Conv2d, (9, 8)),
        (nn.Conv3d, (6, 5, 7)),
    )
    for make, size in kinds:
        for title, options in geometries.items():
            cut = {k: v[: len(size)] if isinstance(v, tuple) else v for k, v in options.items()}
            given = {"kernel_size": 3, **cut}
            yield Case(f"{make.__name__} {title}", lambda m=make, g=given: m(6, 10, **g), (2, 6, *size))
        yield Case(f"{make.__name__} pointwise", lambda m=make: m(12, 10, 1), (2, 12, *(min(s, 4) for s in size)))


CASES = {case.title: case for case in cases()}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def decaying_(layer: nn.Module) -> nn.Module:
    """Make the singular values of a layer's weight fall as those of trained ones do."""
    with torch.no_grad():
        weight: Any = layer.weight
        u, _, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        values = 1 / torch.arange(1, u.shape[1] + 1)
        weight.copy_((u * values @ v).reshape(weight.shape))
    return layer


def spread_inputs(shape: tuple[int, ...], count: int = 4) -> list[Tensor]:
    """Batches whose channels are correlated and have a mean."""
    mix = torch.randn(shape[1], shape[1]) / torch.arange(1, shape[1] + 1).sqrt()
    return [torch.einsum("cd,nd...->nc...", mix, torch.randn(shape)) + 1.5 for _ in range(count)]


class Studied(NamedTuple):
    factors: Factors
    layer: Any
    given: Tensor  # all calibration inputs
    sensitivity: Tensor | None


def study(layer: nn.Module, batches: list[Tensor], *, gradient_samples: int = 0, **options: Any) -> Studied:
    model = nn.Sequential(layer)
    calls = [Call((batch,)) for batch in batches]
    (spec,) = capture(model, calls[0]).sketchable
    measured = measure(
        model,
        [spec],
        calls,
        samples=sum(len(b) for b in batches),
        gradient_samples=gradient_samples,
        for_rounding="grids" in options,
    ).profiles
    profile = measured["0"]
    return Studied(decompose(layer, spec, profile, **options), layer, torch.cat(batches), profile.seen.sensitivity)


def all_choices(factors: Factors) -> list[Choice]:
    return [choice for choice in candidates(factors, 4) if not choice.is_dense]


@torch.no_grad()
def lost_share(studied: Studied, choice: Choice) -> tuple[float, float]:
    """Share of the output's variance that the built layer loses on the calibration inputs, and the mean it is off by.

    The mean is relative to the spread of the dense layer's outputs.
    """
    dense, got = studied.layer(studied.given), sketched_layer(studied.factors, choice)(studied.given)
    channel = -1 if studied.factors.spec.kind == "linear" else 1
    rest, whole = (t.movedim(channel, -1).flatten(0, -2).double() for t in (dense - got, dense))
    off = float(rest.mean(0).abs().max() / (whole - whole.mean(0)).std())
    rest, whole = rest - rest.mean(0), whole - whole.mean(0)
    if studied.sensitivity is not None and len(studied.sensitivity) == rest.shape[1]:
        factor = with_ridge(studied.sensitivity, SENSITIVITY_RIDGE)
        rest, whole = rest @ factor, whole @ factor
    return float(rest.square().sum() / whole.square().sum()), off


# Convolutions


@every_case
def test_a_built_convolution_loses_what_its_factors_say_and_keeps_the_mean(case: Case) -> None:
    studied = study(decaying_(case.build()), spread_inputs(case.input_shape))
    scheme_is_exact = math.prod(studied.factors.spec.kernel_size) == 1  # nothing needs to be tried
    assert studied.factors.schemes
    for scheme, decomposed in studied.factors.schemes.items():
        ranks = sorted({0, len(decomposed.ranks) // 2, len(decomposed.ranks) - 1})
        for index in ranks if decomposed.ranks else ():
            choice = Choice(studied.factors.spec.name, scheme, decomposed.ranks[index])
            lost, off = lost_share(studied, choice)
            exactly = index in (0, len(decomposed.ranks) - 1)  # measured, unless a smaller rank lost less
            between = (1e-3 if exactly else BETWEEN_PROBES), 1e-5
            relative, absolute = RIDGE_SHOWS if scheme_is_exact else between
            assert decomposed.errors[index] == pytest.approx(lost, rel=relative, abs=absolute), (scheme, index)
            assert off < 1e-4


@every_case
def test_the_dense_equivalent_computes_what_the_built_layer_does(case: Case) -> None:
    studied = study(case.build(), spread_inputs(case.input_shape))
    for choice in all_choices(studied.factors)[::7]:
        weight, bias = studied.factors.dense_equivalent(choice)
        same = case.build()
        same.weight, same.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
        with torch.no_grad():
            built = sketched_layer(studied.factors, choice)(studied.given)
            torch.testing.assert_close(same(studied.given), built, rtol=1e-4, atol=1e-4)


@every_case
def test_errors_of_a_scheme_never_rise_with_its_cost(case: Case) -> None:
    for gradients in (0, 100):
        factors = study(case.build(), spread_inputs(case.input_shape), gradient_samples=gradients).factors
        for scheme, decomposed in factors.schemes.items():
            costs = [smallest_params(scheme, factors.spec, ranks) for ranks in decomposed.ranks]
            assert costs == sorted(costs) and costs[-1] < factors.spec.params
            assert list(decomposed.errors) == sorted(decomposed.errors, reverse=True)
            assert all(0 <= error <= 1 + 1e-6 for error in decomposed.errors)


@every_case
def test_every_candidate_is_smaller_than_the_dense_layer_which_comes_last(case: Case) -> None:
    factors = study(case.build(), spread_inputs(case.input_shape)).factors
    *smaller, dense = candidates(factors, 4)
    assert dense.is_dense and dense.error == 0 and dense.cost.params == factors.spec.params
    assert [c.cost.params for c in smaller] == sorted(c.cost.params for c in smaller)
    for choice in smaller:
        layer = packed(sketched_layer(factors, choice), choice)
        gains_bias = not factors.spec.has_bias
        held = sum(p.numel() for name, p in layer.named_parameters() if name != layer.BIAS or gains_bias)
        sides = {ROWS: factors.spec.out_features, COLUMNS: factors.spec.in_features}
        order = sum(sides[side] for side in layer.sides) if choice.packing == PIVOTED else 0
        assert held + order == choice.cost.params < dense.cost.params
        assert choice.cost.size_bytes == 4 * (held + order)


@pytest.mark.parametrize("title", ["Conv1d plain", "Conv2d plain", "Conv2d strided", "Conv3d plain"])
def test_where_the_output_is_known_to_react_errors_count_in_that_norm(title: str) -> None:
    case = CASES[title]
    studied = study(decaying_(case.build()), spread_inputs(case.input_shape), gradient_samples=100)
    assert studied.sensitivity is not None
    for scheme, decomposed in studied.factors.schemes.items():
        choice = Choice(studied.factors.spec.name, scheme, decomposed.ranks[0])
        assert decomposed.errors[0] == pytest.approx(lost_share(studied, choice)[0], rel=1e-3)


def test_all_schemes_are_there_for_two_axes_and_all_but_spatial_for_others() -> None:
    def names(title: str) -> set[str]:
        return set(study(CASES[title].build(), spread_inputs(CASES[title].input_shape)).factors.schemes)

    assert names("Conv2d plain") == {"output_channel", "input_channel", "spatial", "tucker2"}
    assert names("Conv1d plain") == names("Conv3d plain") == {"output_channel", "input_channel", "tucker2"}
    assert names("Conv2d pointwise") == {"output_channel"}


def test_a_weight_of_few_input_directions_is_kept_best_by_its_input_channels() -> None:
    layer = nn.Conv2d(16, 16, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.einsum("mrhw,rc->mchw", torch.randn(16, 8, 3, 3), torch.randn(8, 16)))
    schemes = study(layer, spread_inputs((2, 16, 8, 8))).factors.schemes
    errors = {name: s.errors[s.ranks.index((8,))] for name, s in schemes.items() if (8,) in s.ranks}
    assert errors["input_channel"] < 1e-6 < errors["output_channel"]


def test_tucker2_that_knows_the_data_loses_less_than_the_nearest_weight() -> None:
    torch.manual_seed(3)
    layer = nn.Conv2d(16, 16, 3, padding=1)
    studied = study(layer, spread_inputs((4, 16, 10, 10)))
    fresh = torch.cat(spread_inputs((4, 16, 10, 10)))
    weight = layer.weight.detach()

    def lost(parts: tuple[Tensor, ...]) -> float:
        rest, whole = (nn.functional.conv2d(fresh, w, padding=1) for w in (weight - compose(parts), weight))
        return float(rest.var((0, 2, 3)).sum() / whole.var((0, 2, 3)).sum())

    tucker = studied.factors.schemes["tucker2"]
    for ranks in tucker.ranks[1::3]:
        plain = [part.float() for part in factorise("tucker2", studied.factors.spec, weight.double(), ranks)]
        assert lost(tucker.links(weight, ranks)) < 0.9 * lost(tuple(plain)), ranks


def test_a_pair_of_tucker2_that_is_not_offered_has_about_the_error_that_is_measured() -> None:
    torch.manual_seed(3)
    layer = decaying_(nn.Conv2d(32, 32, 3, padding=1))
    inputs = spread_inputs((4, 32, 10, 10))
    studied, seen, weight = study(layer, inputs), torch.cat(inputs), layer.weight.detach()
    offered = studied.factors.schemes["tucker2"]
    others = [(a, b) for a in (8, 16, 24) for b in (8, 16, 24) if (a, b) not in offered.ranks]
    assert len(others) >= 3
    for ranks in others:
        known = with_pair(studied.factors, ranks).schemes["tucker2"]
        assert known.ranks == (*offered.ranks, ranks) and known.errors[:-1] == offered.errors
        rest, whole = (
            nn.functional.conv2d(seen, w, padding=1) for w in (weight - compose(known.links(weight, ranks)), weight)
        )
        measured = float(rest.var((0, 2, 3)).sum() / whole.var((0, 2, 3)).sum())
        assert known.errors[-1] == pytest.approx(measured, rel=0.3)


@pytest.mark.parametrize("ranks", [(), (8,), (8, 8, 8), (0, 8), (8, -8), (9, 8), (40, 8), (8, 40)])
def test_no_other_ranks_of_tucker2_can_be_asked_for(ranks: tuple[int, ...]) -> None:
    factors = study(nn.Conv2d(32, 32, 3, padding=1), spread_inputs((4, 32, 10, 10))).factors
    assert with_pair(factors, ranks) is factors


# Linear layers


@pytest.mark.parametrize(("inputs", "outputs"), [(20, 12), (16, 16), (12, 20)])
def test_a_built_linear_layer_loses_what_its_factors_say_and_keeps_the_mean(inputs: int, outputs: int) -> None:
    layer = decaying_(nn.Linear(inputs, outputs))
    studied = study(layer, [batch + 2 for batch in torch.randn(4, 200, inputs)])
    assert set(studied.factors.schemes) == {"linear"}
    for choice in all_choices(studied.factors):
        lost, off = lost_share(studied, choice)
        assert choice.error == pytest.approx(lost, rel=5e-3, abs=1e-4)  # the ridge of 1e-3 counts in the error only
        assert off < 1e-4


@pytest.mark.parametrize(("inputs", "outputs"), [(20, 12), (12, 20)])
def test_the_dense_equivalent_of_a_linear_layer_computes_what_the_built_one_does(inputs: int, outputs: int) -> None:
    studied = study(nn.Linear(inputs, outputs), list(torch.randn(4, 50, inputs)))
    for choice in all_choices(studied.factors):
        weight, bias = studied.factors.dense_equivalent(choice)
        built = sketched_layer(studied.factors, choice)(studied.given)
        torch.testing.assert_close(nn.functional.linear(studied.given, weight, bias), built, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("build", [lambda b: nn.Linear(12, 12, b), lambda b: nn.Conv2d(6, 10, 3, bias=b)])
def test_a_layer_without_a_bias_gains_one_only_from_calibration(build: Callable[[bool], nn.Module], bias: bool) -> None:
    layer = build(bias)
    given = torch.randn(4, 12) if isinstance(layer, nn.Linear) else torch.randn(4, 6, 8, 8)
    calibrated = study(layer, [given]).factors
    alone = decompose(layer, calibrated.spec, None)
    choice = all_choices(calibrated)[0]
    assert sketched_layer(calibrated, choice).bias is not None
    assert (sketched_layer(alone, choice).bias is not None) == bias


# Data types


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("build", [lambda: nn.Linear(16, 16), lambda: nn.Conv2d(6, 10, 3)])
def test_layers_keep_their_dtype_and_are_factored_in_float32(
    build: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    layer: Any = build().to(dtype)
    shape = (4, 16) if isinstance(layer, nn.Linear) else (4, 6, 8, 8)
    factors = study(layer, [torch.randn(shape, dtype=dtype)]).factors
    choice = all_choices(factors)[-1]
    parts, bias = factors.slice(choice)
    assert all(part.dtype == torch.float32 for part in parts) and bias is not None and bias.dtype == torch.float32
    built = sketched_layer(factors, choice)
    assert {p.dtype for p in built.parameters()} == {dtype}
    assert {t.dtype for t in factors.dense_equivalent(choice) if t is not None} == {dtype}
    assert built(torch.randn(shape, dtype=dtype)).dtype == dtype
    assert choice.dtype == "float32" and choice.grid is None  # the layer's own


# Promises


def layers_and_profiles() -> list[tuple[nn.Module, LayerSpec, Profile]]:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(4, 12, 3), nn.Flatten(2), nn.Linear(16, 24), nn.Linear(24, 10))
    calls = [Call((torch.randn(4, 4, 6, 6),)) for _ in range(2)]
    specs = capture(model, calls[0]).sketchable
    profiles = measure(model, specs, calls, samples=8).profiles
    return [(model.get_submodule(spec.name), spec, profiles[spec.name]) for spec in specs]


def test_the_order_of_layers_changes_no_bit_of_their_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "EXACT_UP_TO", 4)  # so that the randomised sketch is used
    found = []
    for turn in (1, -1):
        given = layers_and_profiles()[::turn]
        found.append({spec.name: decompose(layer, spec, profile, seed=5) for layer, spec, profile in given})
    for name, factors in found[0].items():
        assert all_choices(factors) == all_choices(found[1][name])
        for choice in all_choices(factors)[::3]:
            for a, b in zip(factors.slice(choice)[0], found[1][name].slice(choice)[0], strict=True):
                assert torch.equal(a, b)


def test_large_layers_take_the_randomised_sketch_and_lose_hardly_more(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, batches = decaying_(nn.Linear(64, 64)), list(torch.randn(2, 200, 64))
    exact = study(layer, batches).factors
    monkeypatch.setattr(stage, "EXACT_UP_TO", 63)
    near = study(layer, batches).factors
    errors = [{choice.kind: choice for choice in all_choices(factors)} for factors in (exact, near)]
    assert set(errors[1]) < set(errors[0])  # of nearly all directions the exact sketch is the cheaper one
    assert max(kind[1][0] for kind in errors[1]) == 32 and max(kind[1][0] for kind in errors[0]) == 48
    pairs = [(errors[0][kind], near_by) for kind, near_by in errors[1].items()]
    rounding = 1e-6  # of the whole energy: its products are in float32
    assert all(a.error <= b.error + rounding and b.error <= 1.02 * a.error + rounding for a, b in pairs)
    assert any(a.error != b.error for a, b in pairs)


def test_the_sketch_can_be_named() -> None:
    layer, batches = nn.Linear(16, 16), list(torch.randn(2, 100, 16) * torch.linspace(0.01, 3, 16))
    plain = study(layer, batches, sketch="data_free").factors
    values = torch.linalg.svdvals(layer.weight.detach().double()).square()
    for choice in all_choices(plain):
        assert choice.error == pytest.approx(float(values[choice.ranks[0] :].sum() / values.sum()), abs=1e-6)


@pytest.mark.parametrize("profile", [None, Profile(0)])
def test_a_layer_that_was_not_seen_is_decomposed_by_its_weight(profile: Profile | None) -> None:
    for layer, spec, _ in layers_and_profiles():
        factors = decompose(layer, spec, profile)
        assert factors.profile.rows == 0 and all_choices(factors)
        parts, bias = factors.slice(all_choices(factors)[0])
        assert all(bool(part.isfinite().all()) for part in parts)
        assert bias is not None and torch.equal(bias, layer.bias.detach())


@pytest.mark.parametrize("build", [lambda: nn.Linear(16, 16), lambda: nn.Linear(8, 32), lambda: nn.Conv2d(6, 10, 3)])
def test_a_layer_that_only_saw_zeros_still_has_finite_factors(build: Callable[[], nn.Module]) -> None:
    layer: Any = build()
    shape = (4, layer.in_features) if isinstance(layer, nn.Linear) else (4, 6, 8, 8)
    studied = study(layer, [torch.zeros(shape)], gradient_samples=4)
    for choice in all_choices(studied.factors):
        built = sketched_layer(studied.factors, choice)
        torch.testing.assert_close(built(studied.given), layer(studied.given), rtol=0, atol=1e-6)
    errors = [choice.error for choice in all_choices(studied.factors) if choice.scheme != "tucker2"]
    assert all(0 <= error <= 1 for error in errors)


def test_a_weight_that_is_not_finite_is_refused_by_name_with_the_way_out() -> None:
    layer = nn.Linear(8, 8)
    (_, spec, _), *_ = layers_and_profiles()
    with torch.no_grad():
        layer.weight[0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    with pytest.raises(ValueError, match=r"layer '0' holds 3 values .*NaN or infinite.*exclude=\['0'\]"):
        decompose(layer, spec, None)


def test_statistics_are_given_up_once_a_layer_is_decomposed() -> None:
    kept = []
    gone = []
    for layer, spec, profile in layers_and_profiles():
        for moments in (profile.seen.inputs, profile.seen.outputs):
            if moments is not None:
                gone.append(weakref.ref(moments.covariance))
        kept.append(decompose(layer, spec, profile))
        del profile, moments
    gc.collect()
    assert gone and all(reference() is None for reference in gone)
    for factors in kept:  # what the refit needs is left, in half the digits
        seen = factors.profile.seen
        assert factors.profile.rows and seen.inputs is None and seen.outputs is None
        assert seen.sensitivity is None or seen.sensitivity.dtype == torch.bfloat16


@torch.no_grad()
def test_plans_of_whole_numbers_are_judged_as_the_data_will_round_them() -> None:
    torch.manual_seed(0)
    mix = torch.linalg.qr(torch.randn(48, 48)).Q * torch.logspace(1, -3, 48)
    layer, data = nn.Linear(48, 30), [torch.randn(64, 48) @ mix.T for _ in range(8)]
    grids = [Grid(8), Grid(4), Grid(4, 32), Grid(3)]
    studied = study(layer, data, grids=grids)
    centred = (studied.given - studied.given.mean(0)).double()

    def energy(weight: Tensor) -> float:
        return float((centred @ weight.double().T).square().sum())

    whole = {c.grid: c for c in candidates(studied.factors, 4) if c.scheme == WHOLE}
    assert set(whole) == set(grids)
    for grid, choice in whole.items():
        weight, bias = studied.factors.dense_equivalent(choice)
        assert bias is not None and energy(layer.weight - weight) == pytest.approx(
            choice.error * energy(layer.weight), rel=0.02
        )
        nearest = energy(layer.weight - to_nearest(layer.weight, cast(Grid, grid)).matrix())
        assert energy(layer.weight - weight) < 0.3 * nearest  # far less than half, which is usual


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_without_healing_a_plan_is_judged_as_it_will_be_stored(kind: str) -> None:
    torch.manual_seed(0)
    layer = decaying_(nn.Linear(64, 48) if kind == "linear" else nn.Conv2d(16, 24, 3))
    data = [torch.randn(64, 64) if kind == "linear" else torch.randn(8, 16, 9, 9) for _ in range(4)]
    grids = [Grid(4), Grid(4, 32)]
    factors = study(layer, data, grids=grids, rounds_by_data=False).factors
    choices = [c for c in candidates(factors, 4) if c.grid is not None and c.scheme != CORRECTED]
    assert {(c.packing, c.grid) for c in choices} >= {(QUANTISED, grid) for grid in grids}
    for choice in choices:
        weight, _ = factors.dense_equivalent(choice)
        stored = packed(sketched_layer(factors, choice), choice)
        actual = stored.to_dense().weight if choice.packing == QUANTISED else stored.weight
        scale = float(layer.weight.square().mean().sqrt())
        assert float((weight - actual).square().mean().sqrt()) < 1e-3 * scale, choice


@torch.no_grad()
def test_links_are_judged_in_the_basis_that_healing_rounds_them_in() -> None:
    torch.manual_seed(0)
    layer, data = decaying_(nn.Linear(64, 96)), [torch.randn(64, 64) for _ in range(8)]
    layer.weight[0].mul_(30)  # what stands out in one link takes the scale of its row
    found: dict[bool, Tensor] = {}
    for by_data in (True, False):
        factors = study(layer, data, grids=[Grid(4)], rounds_by_data=by_data).factors
        choice = next(c for c in candidates(factors, 4) if c.packing == QUANTISED and c.ranks == (16,))
        found[by_data] = factors.dense_equivalent(choice)[0] - compose(factors.slice(choice)[0])
    ratio = float(found[True].square().sum() / found[False].square().sum())
    assert ratio == pytest.approx(stage.LEFT_BY_DATA, rel=1e-3)
    down, up = factors.slice(choice)[0]
    as_they_are = compose([on_grid(down, Grid(4)), on_grid(up, Grid(4))]) - compose((down, up))
    assert found[False].square().sum() < 0.5 * as_they_are.square().sum()


def test_factors_hold_no_copy_of_the_dense_weight() -> None:
    layer = nn.Linear(16, 16)
    factors = study(layer, [torch.randn(64, 16)]).factors
    assert factors.module is layer
    choice = all_choices(factors)[-1]
    before = factors.slice(choice)[0]
    with torch.no_grad():
        layer.weight.mul_(2)
    after = factors.slice(choice)[0]
    torch.testing.assert_close(after[1] @ after[0], 2 * before[1] @ before[0])


def test_ranks_are_multiples_of_eight_where_the_layer_has_room_for_two_and_small_ones_below() -> None:
    large, small = (all_choices(decompose(nn.Linear(n, n), square_spec(n), None)) for n in (64, 16))
    ranks = {
        packing: [[c.ranks[0] for c in choices if c.packing == packing] for choices in (large, small)]
        for packing in (TWO_GEMM, PIVOTED)
    }
    assert ranks[TWO_GEMM] == [[1, 2, 4, 8, 16, 24], [1, 2, 3, 4, 5, 6, 7]]
    # (n - r)^2 > n leaves more than the order of n channels.
    assert ranks[PIVOTED] == [[1, 2, 4, 8, 16, 24, 32, 40, 48], [*range(1, 12)]]


@pytest.mark.parametrize("bias", [True, False])
def test_the_bias_that_calibration_gives_to_a_layer_without_one_counts(bias: bool) -> None:
    layer = nn.Linear(40, 24, bias=bias)
    spec = changed(square_spec(24), in_features=40, has_bias=bias)
    unseen = candidates(decompose(layer, spec, None), 2)
    seen = candidates(decompose(layer, spec, Profile(50, mean=torch.ones(40))), 2)
    gained = 0 if bias else 24
    sizes = {choice.kind: choice.cost for choice in unseen[:-1]}
    assert {choice.kind: choice.cost for choice in seen[:-1]} == {
        kind: changed(cost, params=cost.params + gained, size_bytes=cost.size_bytes + 2 * gained)
        for kind, cost in sizes.items()
        if cost.params + gained < spec.params
    }
    assert seen[-1].cost == unseen[-1].cost


def test_a_layer_that_only_grows_by_its_new_bias_stays_dense_and_says_so() -> None:
    layer = nn.Linear(2, 1000, bias=False)
    spec = LayerSpec("layer", "linear", 2, 1000, rows=1, has_bias=False)
    (dense,) = candidates(decompose(layer, spec, Profile(50, mean=torch.ones(2))), 4)
    assert dense.is_dense and "gain a bias of 1,000 numbers" in dense.reason
    assert [c.packing for c in candidates(decompose(layer, spec, None), 4)] == [TWO_GEMM, PIVOTED, "dense"]


@every_case
def test_a_packing_that_is_not_asked_for_is_not_offered(case: Case) -> None:
    factors = study(case.build(), spread_inputs(case.input_shape)).factors
    every = candidates(factors, 4)
    for packing in (TWO_GEMM, PIVOTED):
        offered = [choice.kind for choice in candidates(factors, 4, packings=(packing,))]
        assert offered == [choice.kind for choice in every if choice.packing in (packing, "dense")]
    assert {c.scheme for c in every if c.packing == PIVOTED} == {*factors.schemes} - {"spatial"}
    (dense,) = candidates(factors, 4, packings=())
    assert dense.is_dense


@pytest.mark.parametrize("packings", [("two_gemms",), "pivoted", ("pivoted", "dense")])
def test_an_unknown_packing_is_refused(packings: Any) -> None:
    factors = decompose(nn.Linear(16, 16), square_spec(16), None)
    with pytest.raises(ValueError, match="expected a sequence of two_gemm, pivoted"):
        candidates(factors, 4, packings=packings)


def test_at_equal_numbers_pivots_allow_a_higher_rank_and_a_smaller_error() -> None:
    factors = study(decaying_(nn.Linear(256, 256)), list(torch.randn(2, 300, 256))).factors
    for kept in (0.75, 0.5):
        best = {
            packing: min(
                (c for c in candidates(factors, 4, packings=(packing,)) if c.cost.params <= kept * 256 * 256),
                key=lambda c: c.error,
            )
            for packing in (TWO_GEMM, PIVOTED)
        }
        assert best[PIVOTED].ranks > best[TWO_GEMM].ranks
        assert best[PIVOTED].error < best[TWO_GEMM].error


def square_spec(size: int) -> LayerSpec:
    return LayerSpec("layer", "linear", size, size, rows=1)


@pytest.mark.parametrize("diagonal", [(0.0, 0.0), (-1e-48, -3e-50), (1.0, -1e-9), (1e-320, 0.0), (1e300, 1e300)])
def test_a_ridge_makes_any_matrix_of_products_positive(diagonal: tuple[float, float]) -> None:
    """What does not vary has a covariance that rounding can leave below zero."""
    factor = with_ridge(torch.tensor(diagonal, dtype=torch.float64).diag(), 0.0)
    assert bool(torch.isfinite(factor).all()) and bool((factor.diagonal() > 0).all())
