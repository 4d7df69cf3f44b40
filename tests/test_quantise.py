"""Rounding to few bits: what is stored stands for what is said, and the data decides what is lost."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from panther.nn.factor import compose
from panther.quantise import RANGES, Rounded, in_data_norm, incoherent, lost, scales_for, spread, to_nearest
from panther.spec import Grid

GRIDS = [Grid(8), Grid(4), Grid(4, 32), Grid(4, 128), Grid(3), Grid(3, 32)]


def matrix(rows: int = 24, columns: int = 70, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(columns: int = 70, seed: int = 1) -> Tensor:
    """Of inputs whose directions differ much and that are correlated, as those of real layers are."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64)).Q
    return (basis * torch.logspace(1, -4, columns, dtype=torch.float64)) @ basis.T


def error(given: Tensor, rounded: Rounded, of: Tensor) -> float:
    return lost(given, rounded.matrix().double(), of)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_number_is_the_nearest_multiple_of_its_scale(grid: Grid) -> None:
    given = matrix()
    rounded = to_nearest(given, grid)
    assert rounded.values.dtype == torch.int8 and rounded.scales.shape == (24, grid.groups(70))
    low, high = RANGES[grid.bits]
    assert int(rounded.values.min()) >= low and int(rounded.values.max()) <= high
    steps = spread(rounded.scales, 70, grid).expand_as(given)
    inside = (given / steps).clamp(low, high) * steps
    assert bool(((rounded.matrix() - inside).abs() <= 0.5000001 * steps).all())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_clipped_scale_loses_no_more_than_the_largest_number_as_limit(grid: Grid) -> None:
    given = matrix()
    size = grid.group_size or 70
    padded = torch.nn.functional.pad(given, (0, grid.groups(70) * size - 70)).reshape(24, -1, size)
    plain = padded.abs().amax(-1) / RANGES[grid.bits][1]
    steps = spread(plain, 70, grid)
    unclipped = (given / steps).round().clamp(*RANGES[grid.bits]) * steps
    # Scales have eight binary digits, and are rounded up: by 1/128 at most. Another scale rounds each of the 1,680
    # numbers another way, which changes the norm by a few hundredths more or less.
    got = to_nearest(given, grid)
    assert torch.equal(got.scales, got.scales.bfloat16().double())
    assert float((got.matrix() - given).norm()) <= float((unclipped - given).norm()) * 1.03


def test_one_huge_number_does_not_cost_the_others_of_another_group() -> None:
    given = matrix(4, 64)
    given[:, 3] = 1e6
    rounded = to_nearest(given, Grid(4, 32)).matrix()
    assert float((rounded - given)[:, 32:].abs().max()) < 0.5 and bool(torch.isfinite(rounded).all())


def test_the_data_norm_loses_less_of_the_outputs_and_more_of_the_numbers() -> None:
    given, of = matrix(), moment()
    for grid in GRIDS:
        plain, looked = to_nearest(given, grid, of.diagonal()), in_data_norm(given, of, grid)
        assert error(given, looked, of) < 0.75 * error(given, plain, of)
        assert float((looked.matrix() - given).norm()) > float((plain.matrix() - given).norm())


def test_without_correlation_there_is_nothing_to_make_up_for() -> None:
    given, of = matrix(), torch.diag(torch.logspace(0, -3, 70, dtype=torch.float64))
    plain, looked = to_nearest(given, Grid(4), of.diagonal()), in_data_norm(given, of, Grid(4))
    assert torch.equal(plain.values, looked.values) and torch.equal(plain.scales, looked.scales)


def test_rounding_is_the_same_whatever_block_it_is_carried_over_in(monkeypatch: pytest.MonkeyPatch) -> None:
    given, of = matrix(), moment()
    first = in_data_norm(given, of, Grid(4, 32))
    monkeypatch.setattr("panther.quantise.BLOCK", 7)
    assert torch.equal(in_data_norm(given, of, Grid(4, 32)).values, first.values)


def test_zeros_dead_inputs_and_single_numbers_are_no_problem() -> None:
    nothing = torch.zeros(3, 40, dtype=torch.float64)
    for rounded in (to_nearest(nothing, Grid(4, 32)), in_data_norm(nothing, moment(40), Grid(4))):
        assert not rounded.values.any() and bool((rounded.scales > 0).all()) and not rounded.matrix().any()
    given, dead = matrix(5, 40), torch.zeros(40, 40, dtype=torch.float64)
    assert torch.equal(in_data_norm(given, dead, Grid(8)).values, to_nearest(given, Grid(8)).values)
    dead[0, 0] = 1.0  # all but one input never say anything
    assert bool(torch.isfinite(in_data_norm(given, dead, Grid(4)).matrix()).all())
    assert to_nearest(torch.tensor([[2.5]]), Grid(8)).matrix().item() == pytest.approx(2.5, rel=1 / 128)
    assert to_nearest(torch.zeros(0, 7), Grid(4)).matrix().shape == (0, 7)


def test_scales_are_stored_in_the_dtype_asked_for_and_the_numbers_belong_to_those() -> None:
    given = matrix().float()
    rounded = to_nearest(given, Grid(8), dtype=torch.bfloat16)
    assert rounded.scales.dtype == torch.bfloat16
    steps = rounded.scales.float()
    assert bool(((rounded.values * steps - given.clamp(-127 * steps, 127 * steps)).abs() <= 0.51 * steps).all())


def test_what_is_lost_is_a_share_of_the_energy_of_the_outputs() -> None:
    given, of = matrix(), moment()
    assert lost(given, given, of) == 0 and lost(given, torch.zeros_like(given), of) == 1
    assert lost(given, 0.9 * given, None) == pytest.approx(0.01)
    reacts = torch.diag(torch.tensor([1.0] + [0.0] * 23, dtype=torch.float64))  # to the first output only
    wrong = given.clone()
    wrong[1:] = 0
    assert lost(given, wrong, of, reacts) == pytest.approx(0.0, abs=1e-12) and lost(given, wrong, of) > 0.5


@pytest.mark.parametrize(
    ("bits", "size", "wanted"), [(8, None, 70 + 2), (4, None, 35 + 2), (4, 32, 35 + 6), (3, None, 27 + 2)]
)
def test_bytes_are_those_of_the_numbers_and_of_the_scales(bits: int, size: int | None, wanted: int) -> None:
    assert Grid(bits, size).size_bytes(6, 70) == 6 * wanted
    assert Grid(4).size_bytes(1, 71) == 36 + 2


@pytest.mark.parametrize("sizes", [((6, 40), (30, 6)), ((6, 4, 3, 3), (30, 6, 1, 1)), ((6, 4, 1), (30, 6, 3))], ids=str)
@pytest.mark.parametrize("knows_data", [False, True])
def test_incoherent_links_are_the_same_chain_without_numbers_that_stand_out(
    sizes: tuple[tuple[int, ...], ...], knows_data: bool
) -> None:
    generator = torch.Generator().manual_seed(2)
    down, up = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    up[:, 2] = 0
    up[:, 3] *= 1e4
    inputs = torch.randn(500, down[0].numel(), generator=generator, dtype=torch.float64)
    inputs[:, 0] *= 1e3
    new = incoherent(down, up, inputs.T @ inputs / 500 if knows_data else None)
    torch.testing.assert_close(compose(new), compose((down, up)))
    peaks = [float(part.abs().max() / part.square().mean().sqrt()) for part in (up, new[1])]
    assert peaks[1] < 0.8 * peaks[0]
    again = incoherent(down, up, None, seed=0), incoherent(down, up, None, seed=1)
    assert not torch.equal(again[0][0], again[1][0])


@pytest.mark.parametrize("rank", [2, 9])
def test_an_incoherent_basis_of_more_ranks_than_outputs_or_of_nothing(rank: int) -> None:
    down, up = torch.randn(rank, 12), torch.randn(5, rank)
    moment = torch.eye(12)
    torch.testing.assert_close(compose(incoherent(down, up, moment)), up @ down, atol=1e-5, rtol=1e-5)
    for first, second in ((down, 0 * up), (0 * down, up), (down, up)):
        new = incoherent(first, second, 0 * moment)
        assert bool(torch.isfinite(new[0]).all() and torch.isfinite(new[1]).all())
        torch.testing.assert_close(compose(new), second @ first, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_stay_out_of_the_basis(value: float) -> None:
    down, up, moment = torch.randn(4, 12), torch.randn(5, 4), torch.eye(12)
    broken = down.clone()
    broken[1, 2] = value
    assert incoherent(broken, up, moment)[0] is broken
    moment[3, 3] = value
    torch.testing.assert_close(incoherent(down, up, moment), incoherent(down, up))


def test_what_comes_between_incoherent_links_is_of_one_size() -> None:
    generator = torch.Generator().manual_seed(4)
    down, up, inputs = (torch.randn(size, generator=generator) for size in ((12, 40), (30, 12), (500, 40)))
    down[1] *= 50

    def span(first: torch.Tensor) -> float:
        between = inputs @ first.T
        return float(between.abs().max() / between.square().mean().sqrt())

    with_data, without = (incoherent(down, up, moment)[0] for moment in (inputs.T @ inputs / 500, None))
    assert max(span(with_data), span(without)) < 0.8 * span(down)


def test_an_incoherent_basis_loses_less_when_it_is_rounded() -> None:
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(size, 24, generator=generator)).Q for size in (64, 96))
    down, up = right.T, left * torch.logspace(0, -1.5, 24)  # as an SVD leaves them

    def loss(*links: torch.Tensor) -> float:
        rounded = [to_nearest(link, Grid(4)).matrix() for link in links]
        return float((compose(rounded) - up @ down).square().sum())

    assert loss(*incoherent(down, up)) < 0.8 * loss(down, up)


def test_weights_of_the_columns_move_the_scales_towards_those_that_count() -> None:
    given = torch.tensor([[1.0, 0.3, 0.2, 0.1]])
    counted = torch.tensor([0.0, 1.0, 1.0, 1.0])
    plain, weighted = scales_for(given, Grid(4)), scales_for(given, Grid(4), counted)
    assert float(weighted) < float(plain)
    assert not math.isnan(float(scales_for(given, Grid(4), torch.zeros(4))))
