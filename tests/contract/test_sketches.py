"""Every decomposition of a weight matrix, against the optimum that is worked out independently here.

A sketch is judged in the norm it promises: ||K^T (W - W') L|| with Sigma = L L^T the covariance of the inputs and
G = K K^T the sensitivity of the model's output, each with its small ridge; what is unknown is the identity.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from panther.sketches import SENSITIVITY_RIDGE, SKETCHES, LowRank, Moments, Seen
from panther.sketches.base import RIDGE

# How far above the optimum a sketch may be: rounding of an exact one, the known excess of a randomised one.
EXCESS = {"whitened": 1e-5, "data_free": 1e-5, "randomised": 0.03}
DATA_FREE = {"data_free"}  # they look at the weight only, and are judged by it
FLOAT32 = 16 * torch.finfo(torch.float32).eps

SHAPES = {"wide": (24, 40), "square": (32, 32), "tall": (40, 24)}
KNOWLEDGE = ("nothing", "inputs", "outputs", "inputs and sensitivity", "outputs and sensitivity", "sensitivity")


class Case(NamedTuple):
    weight: Tensor
    seen: Seen
    left: Tensor  # K^T, so that the loss is ||left (W - W') right||^2
    right: Tensor  # L

    def loss(self, difference: Tensor) -> float:
        return float((self.left @ difference.double() @ self.right).square().sum())

    def least_loss(self, rank: int) -> float:
        """By the theorem of Eckart, Young and Mirsky: both sides of the difference are square and invertible."""
        values = torch.linalg.svdvals(self.left @ self.weight.double() @ self.right)
        return float(values[rank:].square().sum())


def decaying(rows: int, columns: int, generator: torch.Generator, power: float = 1.0) -> Tensor:
    """A matrix whose singular values fall as 1/i^power, as those of trained layers do."""
    u, _ = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))
    count = min(rows, columns)
    values = 1 / torch.arange(1, count + 1, dtype=torch.float64) ** power
    return (u[:, :count] * values) @ v[:count]


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def with_diagonal(matrix: Tensor, share: float) -> Tensor:
    return matrix + share * float(matrix.diagonal().mean()) * torch.eye(len(matrix), dtype=torch.float64)


def make_case(sketch: str, shape: tuple[int, int], known: str, *, covariance_rank: int | None = None) -> Case:
    generator = torch.Generator().manual_seed(3)
    m, n = shape
    weight = decaying(m, n, generator).float()
    mixing = decaying(n, n, generator, 0.5)[:, : covariance_rank or n]
    sigma = mixing @ mixing.T
    gradients = torch.randn(m, 3 * m, generator=generator, dtype=torch.float64) * torch.linspace(0.2, 2, m)[:, None]
    reaction = gradients @ gradients.T / (3 * m)
    reaction /= float(reaction.diagonal().mean())

    wide = weight.double()
    inputs = Moments(1000, torch.zeros(n, dtype=torch.float64), sigma) if "inputs" in known else None
    outputs = Moments(1000, torch.zeros(m, dtype=torch.float64), wide @ sigma @ wide.T) if "outputs" in known else None
    by_outputs = outputs is not None or m <= n
    given = (reaction if by_outputs else wide.T @ reaction @ wide) if "sensitivity" in known else None
    left, right = torch.eye(m, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    if sketch not in DATA_FREE:
        if inputs is not None or outputs is not None:
            scale = float(sigma.diagonal().mean())
            if outputs is not None:  # the mean diagonal of Sigma as it is seen through the weight
                scale = float((wide @ sigma @ wide.T).trace() / (wide @ wide.T).trace())
            right = root(sigma + RIDGE * scale * torch.eye(n, dtype=torch.float64))
        if given is not None:
            left = root(with_diagonal(reaction, SENSITIVITY_RIDGE))
    return Case(weight, Seen(inputs, outputs, given), left, right)


def run(sketch: str, weight: Tensor, seen: Seen, max_rank: int = 10_000, seed: int = 0) -> LowRank:
    return SKETCHES[sketch](weight, seen, max_rank=max_rank, generator=torch.Generator().manual_seed(seed))


def product(low: LowRank, weight: Tensor, rank: int) -> Tensor:
    up, down = low.slice(weight, rank)
    return up.double() @ down.double()


every_sketch = pytest.mark.parametrize("sketch", SKETCHES)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_knowledge = pytest.mark.parametrize("known", KNOWLEDGE)


def test_every_sketch_has_a_tolerance_here() -> None:
    assert set(EXCESS) == set(SKETCHES)


@every_sketch
@every_shape
@every_knowledge
@pytest.mark.parametrize("rank", [1, 3, 8, 15, 23])
def test_it_loses_no_more_than_the_optimum_and_its_own_excess(
    sketch: str, shape: tuple[int, int], known: str, rank: int
) -> None:
    case = make_case(sketch, shape, known)
    low = run(sketch, case.weight, case.seen, max_rank=rank)
    lost, least = case.loss(case.weight - product(low, case.weight, rank)), case.least_loss(rank)
    assert least * (1 - 1e-5) <= lost <= least * (1 + EXCESS[sketch])
    assert float(low.errors[rank]) == pytest.approx(lost / case.loss(case.weight), rel=1e-3)


@every_sketch
@every_shape
@every_knowledge
def test_errors_are_the_share_of_the_energy_that_is_really_lost(
    sketch: str, shape: tuple[int, int], known: str
) -> None:
    case = make_case(sketch, shape, known)
    low = run(sketch, case.weight, case.seen)
    whole = case.loss(case.weight)
    for rank in range(low.max_rank + 1):
        lost = case.loss(case.weight - product(low, case.weight, rank)) / whole
        assert float(low.errors[rank]) == pytest.approx(lost, rel=1e-4, abs=1e-6)


@every_sketch
@every_shape
@every_knowledge
def test_errors_start_at_one_and_fall_to_nothing_at_full_rank(sketch: str, shape: tuple[int, int], known: str) -> None:
    case = make_case(sketch, shape, known)
    errors = run(sketch, case.weight, case.seen).errors
    assert errors.shape == (min(shape) + 1,)
    assert float(errors[0]) == 1.0
    assert bool((errors.diff() <= 0).all())
    assert float(errors[-1]) < 1e-9


@every_sketch
@every_shape
@every_knowledge
def test_full_rank_reproduces_the_weight(sketch: str, shape: tuple[int, int], known: str) -> None:
    case = make_case(sketch, shape, known)
    low = run(sketch, case.weight, case.seen)
    assert low.max_rank == min(shape)
    # Ill-conditioned norms multiply the rounding: the square root of the ridge's 1e-3 bounds how much.
    tolerance = FLOAT32 * math.sqrt(max(shape)) * 30
    torch.testing.assert_close(
        product(low, case.weight, low.max_rank),
        case.weight.double(),
        rtol=0,
        atol=tolerance * float(case.weight.norm()),
    )


@every_sketch
@every_shape
@every_knowledge
def test_factors_of_a_rank_have_its_shape_and_equal_norms_in_float32(
    sketch: str, shape: tuple[int, int], known: str
) -> None:
    case = make_case(sketch, shape, known)
    up, down = run(sketch, case.weight, case.seen).slice(case.weight, 5)
    assert up.shape == (shape[0], 5) and down.shape == (5, shape[1])
    assert up.dtype == down.dtype == torch.float32
    assert float(up.norm()) == pytest.approx(float(down.norm()), rel=1e-5)


@every_sketch
@every_shape
@every_knowledge
def test_the_same_seed_gives_the_same_bits(sketch: str, shape: tuple[int, int], known: str) -> None:
    case = make_case(sketch, shape, known)
    first, second = (run(sketch, case.weight, case.seen, max_rank=7, seed=4) for _ in range(2))
    assert torch.equal(first.errors, second.errors)
    assert torch.equal(first.lift, second.lift) and torch.equal(first.drop, second.drop)


@every_sketch
@every_shape
@pytest.mark.parametrize("known", ["inputs", "outputs", "inputs and sensitivity"])
def test_a_singular_covariance_gives_finite_factors_and_full_rank_is_still_the_weight(
    sketch: str, shape: tuple[int, int], known: str
) -> None:
    case = make_case(sketch, shape, known, covariance_rank=4)
    low = run(sketch, case.weight, case.seen)
    whole = product(low, case.weight, low.max_rank)
    tolerance = FLOAT32 * math.sqrt(max(shape)) * 30 * float(case.weight.norm())
    torch.testing.assert_close(whole, case.weight.double(), rtol=0, atol=tolerance)
    if sketch not in DATA_FREE:  # all that the data shows is kept by as many ranks as it has directions
        assert float(low.errors[4]) < 2 * RIDGE * min(shape)


@every_sketch
@every_shape
@pytest.mark.parametrize("known", ["inputs", "outputs"])
def test_a_layer_that_only_saw_zeros_is_decomposed_by_its_weight_alone(
    sketch: str, shape: tuple[int, int], known: str
) -> None:
    m, n = shape
    case = make_case(sketch, shape, "nothing")
    size = n if known == "inputs" else m
    dead = Moments(100, torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64))
    seen = Seen(inputs=dead) if known == "inputs" else Seen(outputs=dead)
    got = product(run(sketch, case.weight, seen), case.weight, 5)
    torch.testing.assert_close(got, product(run(sketch, case.weight, Seen()), case.weight, 5), rtol=1e-4, atol=1e-6)


@every_sketch
@every_shape
@every_knowledge
def test_a_weight_of_low_rank_is_exact_at_that_rank(sketch: str, shape: tuple[int, int], known: str) -> None:
    case = make_case(sketch, shape, known)
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(shape[0], 3, generator=generator) @ torch.randn(3, shape[1], generator=generator)
    wide, seen = weight.double(), case.seen
    if seen.outputs is not None:  # the moments belong to another weight: make them this one's
        seen = Seen(outputs=Moments(9, torch.zeros(shape[0], dtype=torch.float64), wide @ wide.T))
    elif seen.sensitivity is not None and shape[0] > shape[1]:
        seen = Seen(inputs=seen.inputs, sensitivity=wide.T @ wide)
    low = run(sketch, weight, seen)
    assert float(low.errors[3]) < 1e-9
    torch.testing.assert_close(product(low, weight, 3), wide, rtol=0, atol=FLOAT32 * 30 * float(weight.norm()))


@every_sketch
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1)])
@pytest.mark.parametrize("known", KNOWLEDGE)
def test_a_single_row_or_column_is_exact_at_rank_one(sketch: str, shape: tuple[int, int], known: str) -> None:
    case = make_case(sketch, shape, known)
    low = run(sketch, case.weight, case.seen)
    assert low.max_rank == 1
    torch.testing.assert_close(product(low, case.weight, 1), case.weight.double(), rtol=1e-5, atol=1e-6)


@every_sketch
@every_shape
def test_a_weight_of_zeros_gives_factors_of_zeros(sketch: str, shape: tuple[int, int]) -> None:
    weight = torch.zeros(shape)
    low = run(sketch, weight, Seen())
    assert bool(torch.isfinite(low.errors).all())
    assert float(product(low, weight, 2).abs().max()) == 0.0


@every_sketch
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_give_float32_factors(sketch: str, dtype: torch.dtype) -> None:
    case = make_case(sketch, (24, 40), "nothing")
    weight = case.weight.to(dtype)
    low = run(sketch, weight, Seen())
    up, down = low.slice(weight, 24)
    assert up.dtype == torch.float32
    torch.testing.assert_close(up @ down, weight.float(), rtol=0, atol=1e-4 * float(weight.float().norm()))


@every_sketch
def test_a_rank_above_the_full_one_is_cut_to_it(sketch: str) -> None:
    weight = make_case(sketch, (24, 40), "nothing").weight
    assert run(sketch, weight, Seen(), max_rank=1000).max_rank == 24
    assert run(sketch, weight, Seen(), max_rank=6).max_rank == 6
