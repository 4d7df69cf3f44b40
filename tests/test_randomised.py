"""The randomised sketch at sizes where it is not the exact one; tests/contract holds it to all sketches' promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from panther.batches import Call
from panther.sketches import LowRank, Moments, Seen, base, randomised, whitened
from panther.verify import peak_memory

SIZE = 256
ROUNDING = 1e-6  # of the whole energy: its products are in float32


def moments(covariance: Tensor) -> Moments:
    return Moments(10_000, torch.zeros(len(covariance), dtype=torch.float64), covariance)


def falling(size: int, power: float, seed: int) -> Tensor:
    """A covariance whose eigenvalues fall as 1 / i^power."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return vectors / torch.arange(1, size + 1) ** power @ vectors.T


def gaussian(m: int, n: int) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(5))


def run(weight: Tensor, seen: Seen, rank: int, seed: int = 0) -> LowRank:
    return randomised(weight, seen, max_rank=rank, generator=torch.Generator().manual_seed(seed))


def optimum(weight: Tensor, seen: Seen, rank: int) -> LowRank:
    return whitened(weight, seen, max_rank=rank, generator=torch.Generator())


def all_known(m: int, n: int, power: float) -> dict[str, Seen]:
    """Everything that calibration can know of a matrix."""
    weight, sigma, reaction = gaussian(m, n).double(), falling(n, power, 1), falling(m, 0.5, 2)
    by_output = reaction / float(reaction.diagonal().mean())
    given = by_output if m <= n else weight.T @ by_output @ weight
    outputs = moments(weight @ sigma @ weight.T)
    return {
        "nothing": Seen(),
        "inputs": Seen(moments(sigma)),
        "outputs": Seen(outputs=outputs),
        "inputs and sensitivity": Seen(moments(sigma), sensitivity=given),
        "outputs and sensitivity": Seen(outputs=outputs, sensitivity=by_output),
        "sensitivity": Seen(sensitivity=given),
    }


@pytest.mark.parametrize("rank", [8, SIZE // 8, SIZE // 3, SIZE // 2])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(SIZE, SIZE), (SIZE, 400), (400, SIZE)], ids=["square", "wide", "tall"])
def test_it_loses_two_percent_more_than_the_least_at_most(shape: tuple[int, int], power: float, rank: int) -> None:
    weight = gaussian(*shape)
    for known, seen in all_known(*shape, power).items():
        least, found = optimum(weight, seen, rank).errors, run(weight, seen, rank).errors
        assert bool((found >= least - ROUNDING).all()), known
        assert bool((found <= 1.02 * least + ROUNDING).all()), known
        assert bool((found != least).any()), known  # else it is the exact sketch that is judged


@pytest.mark.parametrize("shape", [(SIZE, 400), (400, SIZE)], ids=["wide", "tall"])
def test_an_input_far_louder_than_all_others_hides_none_of_them(shape: tuple[int, int]) -> None:
    """Float32 must not lose what a tenth of a thousandth of the energy is in."""
    weight, (_, n) = gaussian(*shape), shape
    sigma = falling(n, 1.0, 1)
    sigma[3, 3] += 1e4
    seen, wide = Seen(moments(sigma)), weight.double()
    least, found = optimum(weight, seen, 32), run(weight, seen, 32)
    up, down = found.slice(weight, 32)
    difference = wide - up.double() @ down.double()
    norm = sigma + base.RIDGE * float(sigma.diagonal().mean()) * torch.eye(n, dtype=torch.float64)
    lost = float((difference @ norm * difference).sum() / (wide @ norm * wide).sum())
    assert float(least.errors[32]) < lost < 1.02 * float(least.errors[32])
    assert float(found.errors[32]) == pytest.approx(lost, rel=0.01)


@pytest.mark.parametrize("shape", [(SIZE, SIZE), (400, SIZE)], ids=["square", "tall"])
def test_a_weight_with_fewer_directions_than_the_basis_is_exact(shape: tuple[int, int]) -> None:
    weight = torch.zeros(shape)
    weight[7:15] = gaussian(8, shape[1])
    for seen in (Seen(), Seen(moments(falling(shape[1], 1.0, 1)))):
        found = run(weight, seen, 40)
        assert float(found.errors[8]) < ROUNDING
        for rank in (8, 40):
            up, down = found.slice(weight, rank)
            torch.testing.assert_close(up @ down, weight, rtol=0, atol=1e-4)


def test_nothing_in_the_weight_gives_finite_factors() -> None:
    found = run(torch.zeros(SIZE, SIZE), Seen(), 16)
    up, down = found.slice(torch.zeros(SIZE, SIZE), 16)
    assert bool(found.errors.isfinite().all()) and bool((up @ down == 0).all())


def test_where_its_basis_would_be_everything_it_is_the_exact_sketch() -> None:
    weight = gaussian(40, 60)
    assert torch.equal(run(weight, Seen(), 30).errors, optimum(weight, Seen(), 30).errors)


@pytest.mark.parametrize("shape", [(512, 512), (1376, 512), (2560, 512), (512, 1376)])
def test_it_allocates_less_than_four_factors_of_its_rank(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(randomised.__globals__, "ROWS", 32)  # as small beside these sizes as 256 beside 4096
    weight, rank = gaussian(*shape), 64
    for known, seen in all_known(*shape, 1.0).items():
        if known == "outputs and sensitivity" and shape[0] > shape[1]:
            continue  # a basis of outputs and its image in the sensitivity: the input side would be smaller

        class Sketching(nn.Module):
            def forward(self, seen: Seen = seen) -> Tensor:
                return run(weight, seen, rank).errors

        numbers = peak_memory(Sketching(), Call(())) / 4  # a float64 is two of them
        assert numbers < 4 * sum(shape) * rank, known
