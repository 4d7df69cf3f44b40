"""Checks of what users and files say about a layer: clear words for a wrong argument, strictness for a file."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from reprlib import repr as short_repr

import torch

# What a saved layer may ask for. The largest layers in use hold 2^30 numbers, the longest kernels a few thousand taps.
MAX_SIZE = 2**31 - 1
MAX_EXTENT = 2**16
MAX_NUMBERS = 2**32

DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


def as_count(owner: str, name: str, value: object, low: int = 1) -> int:
    """The integer that an argument means: any kind of integer is taken, a float is not, even a whole one.

    Raises: TypeError when it is not an integer, ValueError when it is below `low`.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)  # type: ignore[arg-type]  # this call is the check
    except TypeError:
        raise TypeError(
            f"{owner}({name}={value!r}): expected an integer of at least {low}, got {type(value).__name__}; "
            f"convert it first, as in {name}=int(value)"
        ) from None
    if count < low:
        raise ValueError(f"{owner}({name}={count}): expected an integer of at least {low}")
    return count


def per_axis(owner: str, name: str, value: object, dims: int, low: int = 1) -> tuple[int, ...]:
    """One integer for each of `dims` axes, from an integer (all the same) or a sequence of them."""
    if not isinstance(value, tuple | list):
        return (as_count(owner, name, value, low),) * dims
    if len(value) != dims:
        raise ValueError(f"{owner}({name}={value!r}): expected one integer or {dims} of them, got {len(value)}")
    return tuple(as_count(owner, name, item, low) for item in value)


def one_of(owner: str, name: str, value: object, allowed: Collection[str]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{owner}({name}={short_repr(value)}): expected one of {', '.join(map(repr, allowed))}")
    return value


class Config:
    """The description of a saved layer, read key by key; it may come from a stranger, so nothing in it is trusted.

    Raises: ValueError, naming the key, for anything that `config()` would not have written.
    """

    def __init__(self, owner: str, data: object, keys: Collection[str]) -> None:
        self.owner = f"{owner} config"
        if not isinstance(data, Mapping):
            raise ValueError(f"{self.owner}: expected a dict, got {type(data).__name__}")  # noqa: TRY004  # one error for bad files
        self.data = data
        odd = sorted(map(short_repr, set(data) ^ set(keys)))
        if odd:
            raise ValueError(
                f"{self.owner}: missing or unknown keys {', '.join(odd[:8])}; expected exactly {', '.join(keys)}"
            )

    def _refuse(self, key: str, wanted: str) -> ValueError:
        return ValueError(f"{self.owner}: {key}={short_repr(self.data[key])}: expected {wanted}")

    def integer(self, key: str, low: int = 1, high: int = MAX_SIZE) -> int:
        value = self.data[key]
        if type(value) is not int or not low <= value <= high:
            raise self._refuse(key, f"an integer from {low} to {high}")
        return value

    def integers(self, key: str, length: int, low: int = 1, high: int = MAX_EXTENT) -> tuple[int, ...]:
        value = self.data[key]
        fits = isinstance(value, list | tuple) and len(value) == length
        if not fits or not all(type(item) is int and low <= item <= high for item in value):
            raise self._refuse(key, f"{length} integers from {low} to {high}")
        return tuple(value)

    def flag(self, key: str) -> bool:
        value = self.data[key]
        if not isinstance(value, bool):
            raise self._refuse(key, "true or false")
        return value

    def word(self, key: str, allowed: Collection[str]) -> str:
        value = self.data[key]
        if not isinstance(value, str) or value not in allowed:
            raise self._refuse(key, f"one of {', '.join(allowed)}")
        return value

    def dtype(self) -> torch.dtype:
        return DTYPES[self.word("dtype", DTYPES)]

    def check_numbers(self, numbers: int) -> None:
        """Refuse sizes that are each possible but together are not, before any memory is asked for."""
        if numbers > MAX_NUMBERS:
            raise ValueError(
                f"{self.owner}: it asks for {numbers:,} numbers, more than any real layer ({MAX_NUMBERS:,})"
            )
