"""A study's trials in a file, so that a killed study goes on where it was.

One line of JSON each: a header that says which study this is, what was asked for (written before it is evaluated),
each trial as it finishes, and what the study ended with where somebody wants to know. Every line is on the disk before
the study goes on; a kill can cut the last line only, and that is dropped. The file is locked while a study writes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from panther.errors import JournalError, one_line
from panther.tuner.trial import Params, Scores, Trial, numbers_read, numbers_spelled

FORMAT = "panther journal"
VERSION = 1
WAY_OUT = "choose another file for this study, or delete this one"

# What a header's entries are called in a sentence.
NAMES = {
    "space": "the parameters and constraints",
    "goals": "the objectives",
    "limits": "the observed constraints",
    "initial": "n_initial_points",
}


@dataclass(frozen=True)
class Batch:
    """Points that were asked for at once; `first` is the number of the first of them."""

    first: int
    phase: str
    points: tuple[Params, ...]

    @property
    def numbers(self) -> range:
        return range(self.first, self.first + len(self.points))


@dataclass
class Record:
    """What a study has asked for and found; with a file, all of it is there as well."""

    batches: list[Batch] = field(default_factory=list)
    trials: dict[int, Trial] = field(default_factory=dict)
    baseline: Scores | None = None
    file: IO[bytes] | None = None

    def ask(self, batch: Batch) -> None:
        self._write(json.dumps({"asked": batch.first, "phase": batch.phase, "points": batch.points}, allow_nan=False))
        self.batches.append(batch)

    def tell(self, trial: Trial) -> None:
        self._write(trial.to_json())
        self.trials[trial.number] = trial

    def end(self, summary: Any) -> None:
        """Keep what the study ended with, as JSON data, for `ended` to answer."""
        self._write(json.dumps({"ended": summary}, allow_nan=False))

    def set_baseline(self, scores: Scores) -> None:
        self._write(json.dumps({"baseline": numbers_spelled(scores)}, allow_nan=False))
        self.baseline = scores

    @property
    def asked(self) -> int:
        """How many points were asked for so far: the next one's number."""
        return self.batches[-1].numbers.stop if self.batches else 0

    def _write(self, line: str) -> None:
        if self.file is not None:
            self.file.write(line.encode() + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())

    def _read(self, line: str) -> None:
        fields = json.loads(line)
        if "asked" in fields:
            batch = Batch(fields["asked"], fields["phase"], tuple(fields["points"]))
            if batch.first != self.asked or not batch.points:
                raise ValueError(f"points from {batch.first} on follow {self.asked} points")
            self.batches.append(batch)
        elif "baseline" in fields:
            self.baseline = numbers_read(fields["baseline"])
        elif "ended" in fields:
            return
        else:
            trial = Trial.from_json(line)
            if not 0 <= trial.number < self.asked:
                raise ValueError(f"trial {trial.number} was not asked for")
            self.trials[trial.number] = trial


@contextmanager
def opened(path: Path, header: Mapping[str, Any]) -> Iterator[Record]:
    """The record of a study in a file, which is made if there is none; locked until the end.

    Raises: JournalError where another process has it, it is of another study, no journal at all, or damaged.
    """
    line = json.dumps({"format": FORMAT, "version": VERSION, **header}, allow_nan=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        raise JournalError(f"the journal {path} cannot be opened: {one_line(error)}") from error
    with file:
        _lock(file, path)
        try:
            yield _loaded(file, path, line)
        finally:
            _unlock(file)


def ended(path: Path) -> Any:
    """What the study in a file ended with, the last time; None where it did not, or there is no such file."""
    with suppress(OSError, ValueError):
        for line in reversed(path.read_bytes().splitlines()):
            if line.startswith(b'{"ended": '):
                return json.loads(line)["ended"]
    return None


def _loaded(file: IO[bytes], path: Path, header: str) -> Record:
    file.seek(0)
    content = file.read()
    whole, _, cut = content.rpartition(b"\n")
    record = Record()
    if b"\n" not in content:
        if not header.encode().startswith(content):  # not even a header that a kill cut
            raise JournalError(f"{path} is no journal of panther's tuner; {WAY_OUT}")
    else:
        first, *others = whole.split(b"\n")
        _check_header(first, path, json.loads(header))
        for number, line in enumerate(others, start=2):
            _read_line(record, line, number, path)
    if cut:
        file.truncate(len(content) - len(cut))
        file.seek(0, os.SEEK_END)
    record.file = file
    if b"\n" not in content:
        record._write(header)
    return record


def _read_line(record: Record, line: bytes, number: int, path: Path) -> None:
    try:
        record._read(line.decode())
    except (ValueError, KeyError, TypeError) as error:
        raise JournalError(
            f"line {number} of the journal {path} is damaged ({one_line(error)}): restore the file, cut it before this "
            "line to go on from there, or choose another file"
        ) from error


def _check_header(line: bytes, path: Path, mine: Mapping[str, Any]) -> None:
    try:
        theirs = json.loads(line)
    except ValueError:
        theirs = None
    if not isinstance(theirs, dict) or theirs.get("format") != FORMAT:
        raise JournalError(f"{path} is no journal of panther's tuner; {WAY_OUT}")
    if theirs.get("version") != VERSION:
        raise JournalError(
            f"the journal {path} has version {theirs.get('version')}, and this panther reads {VERSION}; {WAY_OUT}"
        )
    differing = [name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name)]
    if differing:
        reasons = "; ".join(_difference(name, theirs.get(name), mine.get(name)) for name in differing)
        raise JournalError(f"the journal {path} is of another study: {reasons}. To keep it, {WAY_OUT}.")


def _difference(name: str, theirs: Any, mine: Any) -> str:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        inner = [key for key in {**theirs, **mine} if theirs.get(key) != mine.get(key)]
        if inner:
            return "; ".join(_difference(key, theirs.get(key), mine.get(key)) for key in inner)
    return f"{NAMES.get(name, name)}: {_short(theirs)} there, {_short(mine)} here"


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


# --- the lock --------------------------------------------------------------------------------------------------------

FAR = 2**40  # the byte that Windows locks: one that is never written

if sys.platform == "win32":
    import msvcrt

    def _lock(file: IO[bytes], path: Path) -> None:
        file.seek(FAR)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise _in_use(path) from error

    def _unlock(file: IO[bytes]) -> None:
        file.flush()
        file.seek(FAR)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(file: IO[bytes], path: Path) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _in_use(path) from error
        except OSError:  # a file system without locks: a study without one is better than none
            return

    def _unlock(file: IO[bytes]) -> None:
        """Closing does it."""


def _in_use(path: Path) -> JournalError:
    return JournalError(
        f"the journal {path} is in use by another study, in this process or another: let that end, or give each a "
        "file of its own"
    )
