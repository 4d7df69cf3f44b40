"""Journals: what is written is read back, a cut line is dropped, and every other file is refused and left alone."""

import json
import math
import subprocess
import sys

import pytest

from panther.errors import JournalError
from panther.tuner.journal import Batch, ended, opened
from panther.tuner.trial import Trial

HEADER = {"space": {"parameters": {"x": {"type": "integer", "low": 1, "high": 9}}}, "seed": 0, "strategy": "auto"}
BATCH = Batch(0, "initial", ({"x": 1}, {"x": 2}))
TRIALS = [Trial(1, {"x": 2}, scores={"score": math.inf}), Trial(0, {"x": 1}, status="failed", error="ValueError: no")]


@pytest.fixture
def path(tmp_path):
    """A journal with a batch of two, of which the second finished first."""
    path = tmp_path / "new" / "study.jsonl"
    with opened(path, HEADER) as record:
        record.set_baseline({"score": -math.inf})
        record.ask(BATCH)
        for trial in TRIALS:
            record.tell(trial)
    return path


def test_what_was_written_is_read_back(path):
    with opened(path, HEADER) as record:
        assert record.batches == [BATCH]
        assert record.trials == {1: TRIALS[0], 0: TRIALS[1]}
        assert record.baseline == {"score": -math.inf}
        assert record.asked == 2


def test_every_line_is_strict_json(path):
    def refuse(text):
        raise AssertionError(text)

    lines = path.read_text().splitlines()
    assert len(lines) == 5
    for line in lines:
        json.loads(line, parse_constant=refuse)


def test_each_line_is_on_disk_at_once(tmp_path):
    path = tmp_path / "study.jsonl"
    with opened(path, HEADER) as record:
        assert len(path.read_text().splitlines()) == 1
        record.ask(BATCH)
        record.tell(TRIALS[0])
        assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_cut_last_line_is_dropped_and_written_again(path, share):
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    path.write_bytes(whole[: len(whole) - len(last) + max(1, int(share * len(last)) - 1)])
    with opened(path, HEADER) as record:
        assert list(record.trials) == [1]
        record.tell(TRIALS[1])
    assert path.read_bytes() == whole


@pytest.mark.parametrize("kept", [0, 1, 30])
def test_a_cut_header_is_begun_again(path, kept):
    header = path.read_bytes().splitlines(keepends=True)[0]
    path.write_bytes(header[:kept])
    with opened(path, HEADER) as record:
        assert record.batches == []
    assert path.read_bytes() == header


@pytest.mark.parametrize("content", [b"precious", b"precious\ndata\n", b"\n", b"\nx", b"{}\n", b"\xff\xfe\n", b"[1]\n"])
def test_other_files_are_refused_and_left_as_they_are(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(JournalError, match="no journal"), opened(path, HEADER):
        pass
    assert path.read_bytes() == content


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(JournalError, match="cannot be opened"), opened(tmp_path, HEADER):
        pass


def test_another_study_is_refused_with_what_differs(path):
    before = path.read_bytes()
    wider = {"parameters": {"x": {"type": "integer", "low": 1, "high": 12}}}
    other = HEADER | {"seed": 3, "space": wider, "goals": ["accuracy"]}
    with pytest.raises(JournalError) as caught, opened(path, other):
        pass
    text = str(caught.value)
    for part in ("seed: 0 there, 3 here", "high: 9 there, 12 here", "nothing there", "choose another file"):
        assert part in text
    assert path.read_bytes() == before


def test_what_a_study_ended_with_is_kept_and_the_last_counts(path):
    assert ended(path) is None and ended(path.with_name("missing")) is None
    with opened(path, HEADER) as record:
        record.end({"best": 1})
        record.end({"best": [2, "inf"]})
    assert ended(path) == {"best": [2, "inf"]}
    with opened(path, HEADER) as record:
        assert list(record.trials.values()) == TRIALS


def test_a_newer_version_is_refused(path):
    path.write_text(path.read_text().replace('"version": 1', '"version": 2', 1))
    with pytest.raises(JournalError, match="version 2"), opened(path, HEADER):
        pass


DAMAGE = {
    "no JSON": '{"number": 0, "par\n',
    "no trial": "{}\n",
    "a trial that nobody asked for": Trial(7, {"x": 1}).to_json() + "\n",
    "points out of order": '{"asked": 9, "phase": "gp", "points": [{"x": 3}]}\n',
    "no object": "3\n",
    "no text": b"\xff\n",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_line_is_named(path, name):
    damage = DAMAGE[name] if isinstance(DAMAGE[name], bytes) else DAMAGE[name].encode()
    path.write_bytes(path.read_bytes() + damage)
    with pytest.raises(JournalError, match="line 6 of the journal"), opened(path, HEADER):
        pass


def test_two_studies_at_once_are_refused(path):
    with (
        opened(path, HEADER) as record,
        pytest.raises(JournalError, match="in use"),
        opened(path, HEADER),
    ):
        pass
    assert len(record.trials) == 2


OTHER_PROCESS = """
import sys
from pathlib import Path
from panther.errors import JournalError
from panther.tuner.journal import opened
try:
    with opened(Path(sys.argv[1]), {}):
        print("got it")
except JournalError as error:
    print(error)
"""


def test_another_process_is_refused_until_the_first_ends(path):
    command = [sys.executable, "-c", OTHER_PROCESS, str(path)]

    def answer():
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with opened(path, HEADER):
        assert "in use by another study" in answer()
    assert "of another study" in answer()  # it could look inside
