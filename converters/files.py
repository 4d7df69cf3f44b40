"""Reading small JSON files strictly, and writing files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from panther.errors import ExportError, LoadError

# A panther.json with a thousand layers, its plan and its report is under 2 MB.
JSON_BYTES = 64 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises: LoadError when the file is missing, too large, not JSON, or holds something else than an object.
    """
    try:
        size = path.stat().st_size
        if size > JSON_BYTES:
            raise LoadError(f"{path} is {size:,} bytes, more than the {JSON_BYTES:,} that panther reads as JSON")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path} cannot be read as JSON: {error}. Copy it again from its source.") from error
    if not isinstance(data, dict):
        raise LoadError(f"{path} holds a JSON {type(data).__name__}, expected an object")
    return data


@contextlib.contextmanager
def staging(parent: Path, what: str) -> Iterator[Path]:
    """A hidden folder inside `parent` to write into and move files out of; it is gone at the end, whatever happens.

    `parent` is made when it does not exist.

    Raises: ExportError, which says that nothing was changed, for whatever the file system refuses inside the block.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".panther-", dir=parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise ExportError(
            f"cannot write {what}: {error}. What was there before is unchanged; choose a folder that you can write "
            "to, with enough free space."
        ) from error
