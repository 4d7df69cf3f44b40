"""The product of rows with themselves, in blocks, against the plain one."""

from __future__ import annotations

import pytest
import torch

from panther.products import BLOCK, gram


@pytest.mark.parametrize("features", [0, 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 7])
@pytest.mark.parametrize("count", [0, 1, 5, 300])
def test_it_is_the_plain_product_within_rounding(count, features):
    rows = torch.randn(count, features, generator=torch.Generator().manual_seed(0))
    got = gram(rows)
    bound = count * torch.finfo(torch.float32).eps * (rows.abs().T @ rows.abs()).double()
    assert bool(((got - rows.double().T @ rows.double()).abs() <= bound).all())


def test_rows_that_are_views():
    rows = torch.randn(700, 50, generator=torch.Generator().manual_seed(0)).T
    assert torch.allclose(gram(rows), rows.T @ rows, atol=1e-4)
