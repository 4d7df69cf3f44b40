"""Rounding to few bits: what is stored stands for what is said, and the data decides what is lost."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from panther.nn.factor import compose
from panther.quantise import RANGES, Rounded, balanced, in_data_norm, lost, scales_for, spread, to_nearest
from panther.spec import Grid

GRIDS = [Grid(8), Grid(4), Grid(4, 32), Grid(4, 128)]


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
    assert float((to_nearest(given, grid).matrix() - given).norm()) <= float((unclipped - given).norm()) * (1 + 1e-12)


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
    assert to_nearest(torch.tensor([[2.5]]), Grid(8)).matrix().item() == pytest.approx(2.5)
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


@pytest.mark.parametrize(("bits", "size", "wanted"), [(8, None, 70 + 4), (4, None, 35 + 4), (4, 32, 35 + 12)])
def test_bytes_are_those_of_the_numbers_and_of_the_scales(bits: int, size: int | None, wanted: int) -> None:
    assert Grid(bits, size).size_bytes(6, 70, 4) == 6 * wanted
    assert Grid(4).size_bytes(1, 71, 4) == 36 + 4


@pytest.mark.parametrize("sizes", [((6, 40), (30, 6)), ((6, 4, 3, 3), (30, 6, 1, 1)), ((6, 4, 1), (30, 6, 3))], ids=str)
def test_balanced_links_are_the_same_chain(sizes: tuple[tuple[int, ...], ...]) -> None:
    down, up = (torch.randn(size, generator=torch.Generator().manual_seed(2), dtype=torch.float64) for size in sizes)
    up[:, 2] = 0
    up[:, 3] *= 1e4
    new = balanced(down, up)
    torch.testing.assert_close(compose(new), compose((down, up)))
    norms = new[1].transpose(0, 1).flatten(1).norm(dim=1)
    assert norms.tolist() == pytest.approx([1, 1, 0, 1, 1, 1])


def test_weights_of_the_columns_move_the_scales_towards_those_that_count() -> None:
    given = torch.tensor([[1.0, 0.3, 0.2, 0.1]])
    counted = torch.tensor([0.0, 1.0, 1.0, 1.0])
    plain, weighted = scales_for(given, Grid(4)), scales_for(given, Grid(4), counted)
    assert float(weighted) < float(plain)
    assert not math.isnan(float(scales_for(given, Grid(4), torch.zeros(4))))
