"""Memory that is kept between batches: only inside, once for all who ask, and never against the user's settings."""

from __future__ import annotations

import os
import platform
import resource
import threading
from pathlib import Path

import pytest
import torch

from panther import malloc

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone can be told")
LARGE = 24 * 2**20  # float32 numbers: 96 MiB


def faults(rounds=4):
    """Pages touched for the first time while large blocks come and go."""
    torch.ones(LARGE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.ones(LARGE)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident():
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * resource.getpagesize()


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name)


@pytest.fixture
def calls(monkeypatch):
    """What mallopt is told, instead of being told."""
    told = []
    monkeypatch.setattr(malloc, "_set", lambda _libc, options: told.append(options))
    return told


def test_large_blocks_are_used_again_inside_and_not_outside():
    outside = faults()
    with malloc.kept():
        inside = faults()
    assert inside < outside / 10
    assert faults() > 10 * inside


def test_what_was_kept_goes_back_to_the_system():
    with malloc.kept():
        torch.ones(LARGE)
        before = resident()
    assert resident() < before - 2**26


def test_a_hole_below_something_that_lives_on_is_used_again():
    with malloc.kept():
        first, pin = torch.ones(LARGE), torch.ones(1000)
        del first
        before = resident()
        for _ in range(6):
            torch.ones(LARGE)
        assert resident() < before + 2 * 4 * LARGE  # at most once more, and not once more each time
    assert len(pin) == 1000


def test_nested_and_threaded_use_sets_it_once(calls):
    both_inside, done = threading.Barrier(2), []

    def other():
        with malloc.kept():
            both_inside.wait(10)
            done.append(len(calls))

    thread = threading.Thread(target=other)
    with malloc.kept(), malloc.kept():
        thread.start()
        both_inside.wait(10)
        thread.join()
    assert done == [1]
    assert calls == [malloc.KEEP_ALL, malloc.AS_BEFORE]


def test_it_ends_with_an_error_too(calls):
    with pytest.raises(KeyError), malloc.kept():
        raise KeyError
    assert calls == [malloc.KEEP_ALL, malloc.AS_BEFORE]


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "1"), ("GLIBC_TUNABLES", "glibc.malloc.check=0")]
)
def test_the_users_own_settings_stay(monkeypatch, calls, name, value):
    monkeypatch.setenv(name, value)
    with malloc.kept():
        pass
    assert calls == []


def test_nothing_happens_without_glibc(monkeypatch, calls):
    monkeypatch.setattr(malloc, "_glibc", lambda: None)
    with malloc.kept():
        malloc.give_back()
    assert calls == []
