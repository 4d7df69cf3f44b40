"""Which format a file or folder has: by its first bytes and entries, then by its extension."""

from __future__ import annotations

from pathlib import Path

from panther.converters.pickles import ZIP_MAGIC, zip_entries
from panther.errors import LoadError

MANIFEST = "panther.json"

# Formats that are recognised and not read: what is missing, and the way out.
UNSUPPORTED = {
    "torchscript": (
        "a TorchScript archive, whose layers are compiled code that panther cannot replace. Build the model in Python, "
        "save its model.state_dict() with torch.save, and give that file with --model pkg.mod:factory"
    ),
    "onnx": (
        "an ONNX model; panther reads PyTorch models only. Give the PyTorch checkpoint that it was exported from, "
        "with --model pkg.mod:factory"
    ),
}

_BY_EXTENSION = {
    ".pt": "state_dict",
    ".pth": "state_dict",
    ".bin": "state_dict",
    ".ckpt": "state_dict",
    ".safetensors": "safetensors",
    ".onnx": "onnx",
    ".pt2": "pt2",
}


class UnsupportedFormat(LoadError):  # noqa: N818 - it says what the format is, as its parents say
    """The format is known, and this version of panther does not read it."""


def unsupported(path: Path, name: str) -> UnsupportedFormat:
    return UnsupportedFormat(f"{path} is {UNSUPPORTED[name]}.")


def format_of(path: Path) -> str:
    """A key of READERS, or of UNSUPPORTED.

    Raises: LoadError when there is nothing at the path, or nothing that is recognised.
    """
    if path.is_dir():
        return _folder_format(path)
    if path.exists() and not path.is_file():
        raise LoadError(f"{path} is neither a file nor a folder")
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror or error}") from error
    if not head:
        raise LoadError(f"{path} is empty (0 bytes): copy or download it again")
    name = _content_format(path, head) or _BY_EXTENSION.get(path.suffix.lower())
    if name is None:
        raise LoadError(
            f"{path} is of no format that panther reads: expected a torch.save file (.pt, .pth, .bin), .pt2, "
            f".safetensors, a Hugging Face folder or a folder written by panther; it starts with {head!r}"
        )
    return name


def _folder_format(path: Path) -> str:
    if (path / MANIFEST).is_file():
        return "compressed"
    if (path / "config.json").is_file():
        return "huggingface"
    names = sorted(entry.name for entry in path.iterdir())
    held = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"
    raise LoadError(
        f"{path} is a folder without config.json (Hugging Face) or {MANIFEST} (written by panther); it holds {held}. "
        "Give one of its files instead."
    )


def _content_format(path: Path, head: bytes) -> str | None:
    if head.startswith(ZIP_MAGIC):
        return _zip_format(path)
    # PROTO of the pickle protocols 2 to 5: the first two bytes of torch.save's older format.
    if len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5:
        return "state_dict"
    if len(head) == 9 and head[8:] == b"{":
        return "safetensors"
    return None


def _zip_format(path: Path) -> str:
    paths = [entry.filename for entry in zip_entries(path)]
    names = [path.partition("/")[2] for path in paths]
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        return "torchscript"
    is_program = "archive_format" in names or any(name.startswith("models/") for name in names)
    if is_program or "serialized_exported_program.json" in paths:  # before torch 2.8
        return "pt2"
    if "data.pkl" in names:
        return "state_dict"
    raise LoadError(
        f"{path} is a zip archive that torch.save did not write; it holds {', '.join(names[:5]) or 'nothing'}"
    )
