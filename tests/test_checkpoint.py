"""A file that a killed run goes on from: whole or as it was, read only by the run that wrote it."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from panther.errors import LoadError
from panther.healers.checkpoint import KEY, VERSION, Checkpoint, Saved, forget, saved_plan

IDENTITY = {"seed": 3, "mode": "auto", "plan": "{}", "time_limit": 1.5}
FACTS = {"stage": "blocks", "blocks": ["a", "b"], "reached": 0.1 + 0.2, "history": [[0.5, "before", 1.0]]}


def tensors() -> dict[str, list[Tensor]]:
    shared = torch.randn(4, 4)
    return {
        "kept": [torch.randn(3), torch.randn(2, 5).T, torch.tensor(7), torch.zeros(0)],
        "student": [shared, shared[1:3], shared.bfloat16(), torch.tensor([True, False])],
        "now": [torch.full((1,), float(i)) for i in range(12)],
    }


def written(path: Path) -> dict[str, list[Tensor]]:
    given = tensors()
    Checkpoint(path, IDENTITY).save(FACTS, given)
    return given


def read(path: Path) -> Saved:
    saved = Checkpoint(path, IDENTITY).saved
    assert saved is not None
    return saved


def test_what_was_saved_is_read_bit_for_bit_and_in_order(tmp_path: Path) -> None:
    given = written(tmp_path / "run")
    saved = read(tmp_path / "run")
    assert saved.facts == FACTS
    assert list(saved.tensors) == sorted(given)
    for name, group in given.items():
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(saved.tensors[name], group, strict=True))


def test_without_a_file_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    assert Checkpoint(tmp_path / "run", IDENTITY).saved is None and saved_plan(tmp_path / "run") is None


def test_a_folder_that_is_not_there_yet_is_made_and_only_the_file_is_in_it(tmp_path: Path) -> None:
    written(tmp_path / "new" / "run")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run"]


def test_a_second_save_replaces_the_first(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "run", IDENTITY)
    for stage in ("refit done", "blocks done"):
        checkpoint.save({**FACTS, "stage": stage}, tensors())
    assert read(tmp_path / "run").facts["stage"] == "blocks done"


def test_at_the_end_nothing_is_left(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "run", IDENTITY)
    checkpoint.save(FACTS, tensors())
    forget(checkpoint.path)
    forget(checkpoint.path)
    assert not list(tmp_path.iterdir())


def test_the_plan_in_it_can_be_asked_for(tmp_path: Path) -> None:
    written(tmp_path / "run")
    assert saved_plan(tmp_path / "run") == "{}"
    Checkpoint(tmp_path / "other", {"seed": 3}).save(FACTS, {})
    assert saved_plan(tmp_path / "other") is None


# What cannot be written


def no_room(given: Any, path: Path, **options: Any) -> None:
    path.write_bytes(b"half of it")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_no_room_leaves_the_file_as_it_was_and_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = written(tmp_path / "run")
    checkpoint = Checkpoint(tmp_path / "run", IDENTITY)
    monkeypatch.setattr(safetensors.torch, "save_file", no_room)
    checkpoint.save({"stage": "distill"}, given)
    assert "could not be written" in checkpoint.problem and "No space left" in checkpoint.problem
    assert read(tmp_path / "run").facts == FACTS and [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_place_that_cannot_hold_a_file_is_remembered_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checkpoint = Checkpoint(tmp_path / "file" / "run", IDENTITY)
    checkpoint.save(FACTS, tensors())
    assert "could not be written" in checkpoint.problem
    forget(checkpoint.path)
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("kind", ["sparse", "complex", "facts"])
def test_what_no_file_holds_is_remembered_too(kind: str, tmp_path: Path) -> None:
    given = written(tmp_path / "run")
    odd = torch.eye(3).to_sparse() if kind == "sparse" else torch.ones(3, dtype=torch.complex128)
    checkpoint = Checkpoint(tmp_path / "run", IDENTITY)
    facts = {**FACTS, "stage": object()} if kind == "facts" else FACTS
    checkpoint.save(facts, given if kind == "facts" else {"kept": [odd]})
    assert "could not be written" in checkpoint.problem and "goes on without" in checkpoint.problem
    assert read(tmp_path / "run").facts == FACTS and [p.name for p in tmp_path.iterdir()] == ["run"]


# What cannot be read


@pytest.mark.parametrize("kept", [0, 3, 100, 0.5, -1], ids=lambda kept: f"{kept}")
def test_a_truncated_file_is_refused(tmp_path: Path, kept: float) -> None:
    written(tmp_path / "run")
    whole = (tmp_path / "run").read_bytes()
    size = int(kept * len(whole)) if isinstance(kept, float) else kept
    (tmp_path / "run").write_bytes(whole[:size])
    with pytest.raises(LoadError, match=r"cannot be read as a checkpoint .*: delete it to begin anew"):
        Checkpoint(tmp_path / "run", IDENTITY)


def hostile(facts: str | None, version: str = VERSION) -> dict[str, str]:
    return {KEY: version} if facts is None else {KEY: version, "facts": facts}


@pytest.mark.parametrize(
    "metadata",
    [
        hostile(None),
        hostile("no json"),
        hostile("[]"),
        hostile("7"),
        hostile("{}"),
        hostile('{"identity": 1, "facts": {}}'),
        hostile(json.dumps({"identity": IDENTITY})),
        hostile("[" * 100_000),
    ],
)
def test_a_file_with_other_facts_is_refused(tmp_path: Path, metadata: dict[str, str]) -> None:
    safetensors.torch.save_file({"kept.000000": torch.zeros(2)}, tmp_path / "run", metadata=metadata)
    with pytest.raises(LoadError, match="cannot be read as a checkpoint"):
        Checkpoint(tmp_path / "run", IDENTITY)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, hostile("{}", version="2")])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    """Such as a model's weights, which must not be replaced by a checkpoint."""
    safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "run", metadata=metadata)
    with pytest.raises(LoadError, match="is no checkpoint of this panther: give another name, or delete it"):
        Checkpoint(tmp_path / "run", IDENTITY)
    with pytest.raises(LoadError, match="is no checkpoint"):
        saved_plan(tmp_path / "run")


def test_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    torch.save({"kept": torch.zeros(2)}, tmp_path / "run")
    with pytest.raises(LoadError, match="cannot be read"):
        Checkpoint(tmp_path / "run", IDENTITY)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="cannot be read"):
        Checkpoint(tmp_path, IDENTITY)


@pytest.mark.parametrize("change", [{"seed": 4}, {"mode": "refit"}, {"extra": 1}])
def test_another_runs_file_is_refused_and_says_what_differs(tmp_path: Path, change: dict[str, Any]) -> None:
    written(tmp_path / "run")
    with pytest.raises(LoadError, match=rf"checkpoint of another run \(different: {next(iter(change))}\)"):
        Checkpoint(tmp_path / "run", {**IDENTITY, **change})
