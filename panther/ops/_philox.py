"""Random numbers of a counter and a key: Philox-4x32-10, in integer operations of PyTorch.

The same counter and key give the same four numbers everywhere, in any order. csrc/core/philox.h gives the same.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from torch import Tensor

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85  # added to the key after each round
_ROUNDS = 10
_WORD = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Four random words for each counter; all are integers of 32 bits, the tensors of int64."""
    a, b, c, d = counter
    first, second = key
    for _ in range(_ROUNDS):
        # A product of two words fills 64 bits: int64 wraps round, and the bits are right.
        low, high = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = _upper(high) ^ b ^ first, high & _WORD, _upper(low) ^ d ^ second, low & _WORD
        first, second = (first + _WEYL[0]) & _WORD, (second + _WEYL[1]) & _WORD
    return a, b, c, d


def _upper(product: Tensor) -> Tensor:
    return (product >> 32) & _WORD
