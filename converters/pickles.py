"""What a torch.save file would import if it were loaded, found by reading its opcodes: nothing is executed.

A file is a zip archive with an uncompressed entry `data.pkl`, or (before torch 1.6) five pickles and raw storages.
"""

from __future__ import annotations

import io
import mmap
import pickletools
import struct
import warnings
import zipfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panther.errors import LoadError

# A state dict of 10,000 tensors is a pickle of 1 MB and 300,000 opcodes.
PICKLE_BYTES = 64 * 2**20
MAX_OPCODES = 3_000_000

ZIP_MAGIC = b"PK\x03\x04"

# The number that the older format starts with, and which of its pickles is the object.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_OBJECT = 3

_REAL = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_STORAGES = (*_REAL, "ComplexFloat", "ComplexDouble")

# What a file of tensors needs, and what training scripts put beside them; torch reads it with weights_only=True.
_DTYPES = (
    *("float16", "float32", "float64", "bfloat16", "complex64", "complex128", "bool"),
    *("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"),
)
TENSOR_IMPORTS = frozenset(
    {
        "builtins.set",
        "collections.OrderedDict",
        "torch.Size",
        "torch.device",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch.storage.UntypedStorage",
        *(f"torch.{name}Storage" for name in _STORAGES),
        *(f"torch.{name}" for name in _DTYPES),
    }
)


@dataclass(frozen=True)
class Contents:
    """What a torch.save file holds, as far as can be told without loading it."""

    is_zip: bool
    imports: tuple[str, ...]  # every function and class that loading it would import

    @property
    def foreign_imports(self) -> tuple[str, ...]:
        """What it imports beyond the rebuilding of tensors; empty for a plain state dict."""
        return tuple(name for name in self.imports if name not in TENSOR_IMPORTS)


def contents(path: Path) -> Contents:
    """List what a torch.save file would import.

    Cost:   reads the pickle, not the tensors; at most 64 MiB and three million opcodes a pickle.
    Raises: LoadError when the file is damaged, of another kind, or built to exhaust whoever reads it.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == ZIP_MAGIC
        with warnings.catch_warnings():
            # Damaged names may look like escapes; they are refused or listed as they are.
            warnings.filterwarnings("ignore", message="invalid escape sequence")
            names = _imports(io.BytesIO(_zip_pickle(path))) if is_zip else _legacy_imports(path)
            return Contents(is_zip, tuple(dict.fromkeys(names)))
    except (OSError, ValueError, IndexError, OverflowError, struct.error) as error:
        raise LoadError(
            f"{path} is damaged or not a torch.save file ({error}). Copy or download it again; "
            "a good one is written by torch.save(model.state_dict(), path)."
        ) from error


def zip_entries(path: Path) -> list[zipfile.ZipInfo]:
    """The entries of an archive, of which nothing is unpacked.

    Raises: LoadError when the archive is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    # Besides BadZipFile, damaged directories end in these.
    except (zipfile.BadZipFile, OSError, ValueError, IndexError, NotImplementedError, struct.error) as error:
        raise LoadError(f"{path} is a truncated or damaged zip archive ({error}): copy or download it again") from error


def _stored_entries(path: Path) -> list[zipfile.ZipInfo]:
    """The entries of a torch.save archive.

    Raises: LoadError when it is damaged, or its entries are compressed or overlap (torch.save stores them as they are,
        so together they are never larger than the file).
    """
    entries = zip_entries(path)
    total, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if total > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise LoadError(
            f"{path} is a compressed archive: {size:,} bytes that claim to hold {total:,}. torch.save stores tensors "
            "uncompressed; unpack the file, or write it again with torch.save."
        )
    return entries


def _zip_pickle(path: Path) -> bytes:
    """The bytes of data.pkl, read past its checksum: torch.save may be told not to compute one."""
    entry = next((e for e in _stored_entries(path) if e.filename.partition("/")[2] == "data.pkl"), None)
    if entry is None:
        raise ValueError("a zip archive without data.pkl")
    if entry.file_size > PICKLE_BYTES:
        raise ValueError(f"a pickle of {entry.file_size:,} bytes, far larger than any state dict's")
    with path.open("rb") as file:
        file.seek(entry.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
        file.seek(name_length + extra_length, io.SEEK_CUR)
        return file.read(entry.file_size)


def _legacy_imports(path: Path) -> Iterator[str]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        # A stream that ends where the limit is: a length claimed by an opcode cannot ask for more memory.
        stream = io.BytesIO(mapped[:PICKLE_BYTES])
    first = [argument for _, argument in _opcodes(stream)]
    if _LEGACY_MAGIC not in first:
        raise ValueError("a pickle, but without torch.save's mark")
    for _ in range(_LEGACY_OBJECT):
        yield from _imports(stream)


def _opcodes(stream: io.BytesIO) -> Iterator[tuple[str, Any]]:
    """The name and argument of each opcode of one pickle; the stream is left behind its end."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count > MAX_OPCODES:
            raise ValueError(f"a pickle of more than {MAX_OPCODES:,} opcodes, far longer than any state dict")
        yield opcode.name, argument


def _imports(stream: io.BytesIO) -> Iterator[str]:
    """The dotted names that one pickle imports, in order; a name that it computes is "<computed>"."""
    recent: deque[str] = deque(maxlen=2)  # strings pushed last: STACK_GLOBAL takes its two from there
    memo: dict[Any, str | None] = {}
    top: str | None = None  # the string pushed by the opcode before, if it was one
    for name, argument in _opcodes(stream):
        if name in ("GLOBAL", "INST"):
            yield _dotted(*argument.split(" ", 1))
        elif name == "STACK_GLOBAL":
            yield _dotted(*recent) if len(recent) == 2 else "<computed>"
        elif name.startswith("EXT"):
            yield f"<extension {argument}>"
        if "PUT" in name or name == "MEMOIZE":
            memo[len(memo) if argument is None else argument] = top
            continue
        pushed = memo.get(argument) if name.endswith("GET") else argument
        top = pushed if isinstance(pushed, str) and name not in ("GLOBAL", "INST") else None
        if top is not None:
            recent.append(top)


def _dotted(module: str, name: str) -> str:
    return f"{module.replace('__builtin__', 'builtins')}.{name}"
