"""A dense weight as the weights of a chain, and back, from the weight alone (no data).

Every scheme splits the axes of a weight (out, in, *kernel) between its links: an axis that one link works along has
size 1 in all the others. So one product with broadcasting composes any chain, and one reshape prepares the weight of
any two-link scheme for the singular value decomposition. K is the number of kernel positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from panther import chains

# Two sweeps after the start: ten lowered the error of CREPE's conv2, conv5 and conv6 (ranks 32, 64) by < 0.05 % more.
TUCKER_SWEEPS = 2


def compose(weights: Sequence[Tensor]) -> Tensor:
    """The dense weight that a chain of link weights amounts to.

    Shapes: (R, in, ...), (out, R, ...) -> (out, in, ...); any number of links.
    """
    return reduce(lambda first, second: torch.einsum("or...,ri...->oi...", second, first), weights)


def full_ranks(scheme: str, shape: chains.Geometry) -> tuple[int, ...]:
    """The ranks from which a chain can express every dense weight of this shape."""
    if scheme != "tucker2":
        return (min(link.params for link in chains.links(scheme, shape, (1,))),)
    inputs, outputs, positions = shape.in_features, shape.out_features, math.prod(shape.kernel_size)
    return (min(inputs, outputs * positions), min(outputs, inputs * positions))


def factorise(scheme: str, shape: chains.Geometry, weight: Tensor, ranks: Sequence[int]) -> tuple[Tensor, ...]:
    """The chain of link weights nearest to a weight: the best there is for two links, nearly so for Tucker-2.

    Ranks beyond `full_ranks` are filled with zeros. The two factors of a pair have equal norms.

    Shapes: weight (out, in, *kernel) -> one tensor a link, shaped as its `weight_shape`.
    """
    chain = chains.links(scheme, shape, ranks)
    if scheme == "tucker2":
        return _tucker(weight, chain, *ranks)
    down, up = chain
    with_up = [axis + 2 for axis, size in enumerate(up.kernel_size) if size != 1]
    with_down = [axis for axis in range(2, weight.dim()) if axis not in with_up]
    rows = math.prod(weight.shape[axis] for axis in (0, *with_up))
    matrix = weight.permute(0, *with_up, 1, *with_down).reshape(rows, -1)
    left, right = _truncated_svd(matrix, ranks[0])
    left = left.reshape(*(weight.shape[axis] for axis in (0, *with_up)), ranks[0]).movedim(-1, 1)
    return right.reshape(down.weight_shape), left.reshape(up.weight_shape)


def _truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (m, rank) and (rank, n) of equal norms whose product is the nearest matrix of that rank.

    Source: Eckart, Young, Psychometrika 1 (1936).
    """
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    missing = rank - len(root)
    return F.pad(u[:, :rank] * root, (0, missing)), F.pad(root[:, None] * vh[:rank], (0, 0, 0, missing))


def _tucker(weight: Tensor, chain: Sequence[chains.Link], first: int, last: int) -> tuple[Tensor, ...]:
    """Bases of the input and the output channels, and the core between them, by alternating improvement.

    Source: De Lathauwer, De Moor, Vandewalle, SIAM J. Matrix Anal. Appl. 21 (2000), 1324-1342 (HOOI).
    """
    outputs = _leading_basis(weight.flatten(1), last)
    for _ in range(1 + TUCKER_SWEEPS):
        inputs = _leading_basis(torch.einsum("oi...,ob->ib...", weight, outputs).flatten(1), first)
        outputs = _leading_basis(torch.einsum("oi...,ia->oa...", weight, inputs).flatten(1), last)
    core = torch.einsum("oi...,ob,ia->ba...", weight, outputs, inputs)
    return inputs.T.reshape(chain[0].weight_shape), core, outputs.reshape(chain[2].weight_shape)


def _leading_basis(matrix: Tensor, rank: int) -> Tensor:
    """An orthonormal basis (m, rank) of the directions in which the rows of a matrix (m, n) are largest."""
    vectors: Tensor = torch.linalg.eigh(matrix @ matrix.T).eigenvectors
    return vectors.flip(1)[:, :rank]
