"""Reads the weight file of a CTranslate2 model: named arrays, no code.

Little-endian: version (u32), model name (str), revision (u32), count (u32), then for each array its name (str),
number of dimensions (u8), each dimension (u32), type (u8), bytes (u32), data. A str is its length with the closing zero
(u16) and the characters. Aliases may follow and are not needed.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.data import MissingDataError

TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def take(self, count: int) -> bytes:
        part = self.data[self.position : self.position + count]
        if len(part) < count:
            raise ValueError(f"the file ends {count - len(part)} bytes early, at byte {len(self.data)}")
        self.position += count
        return part

    def number(self, code: str) -> int:
        value: int = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]
        return value

    def text(self) -> str:
        return self.take(self.number("H"))[:-1].decode()


def read_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    """Every array of the file, read-only, by its name.

    Raises: MissingDataError when the file is missing; ValueError when it is cut short, or an array's type is unknown
    or its size is not that of its shape.
    """
    if not path.exists():
        raise MissingDataError(f"{path} is missing; install its package again")
    cursor = _Cursor(path.read_bytes())
    cursor.number("I"), cursor.text(), cursor.number("I")
    return dict(_read_array(cursor) for _ in range(cursor.number("I")))


def _read_array(cursor: _Cursor) -> tuple[str, NDArray[np.generic]]:
    name = cursor.text()
    shape = tuple(cursor.number("I") for _ in range(cursor.number("B")))
    code, size = cursor.number("B"), cursor.number("I")
    if code not in TYPES:
        raise ValueError(f"array {name!r} has type {code}; expected one of {sorted(TYPES)}")
    kind = np.dtype(TYPES[code]).newbyteorder("<")
    if size != math.prod(shape) * kind.itemsize:
        raise ValueError(
            f"array {name!r} of shape {shape} has {size} bytes; expected {math.prod(shape) * kind.itemsize}"
        )
    return name, np.frombuffer(cursor.take(size), kind).reshape(shape)
