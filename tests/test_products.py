"""The product of rows with themselves, in blocks, against the plain one."""

from __future__ import annotations

import pytest
import torch

from panther.products import BLOCK, add_gram, gram, mirrored


@pytest.mark.parametrize("features", [0, 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 7])
@pytest.mark.parametrize("count", [0, 1, 5, 300])
def test_it_is_the_plain_product_within_rounding(count, features):
    rows = torch.randn(count, features, generator=torch.Generator().manual_seed(0))
    got = gram(rows)
    bound = count * torch.finfo(torch.float32).eps * (rows.abs().T @ rows.abs()).double()
    assert bool(((got - rows.double().T @ rows.double()).abs() <= bound).all())


@pytest.mark.parametrize("features", [0, 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK + 1, 3 * BLOCK])
def test_sums_of_products_are_the_product_of_all_rows(features):
    parts = torch.randn(3, 40, features, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(features, features, dtype=torch.float64)
    for rows in parts:
        add_gram(total, rows)
    got, whole = mirrored(total), parts.flatten(0, 1)
    assert got is total and torch.equal(got, got.T)
    bound = len(whole) * torch.finfo(torch.float32).eps * (whole.abs().T @ whole.abs()).double()
    assert bool(((got - whole.double().T @ whole.double()).abs() <= bound).all())


def test_rows_that_are_views():
    rows = torch.randn(700, 50, generator=torch.Generator().manual_seed(0)).T
    assert torch.allclose(gram(rows), rows.T @ rows, atol=1e-4)
