"""Healing that a killed process does not lose: one safetensors file, replaced as a whole at each save."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from panther.errors import LoadError, one_line

VERSION = "1"
KEY = "panther_healing"


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds: facts as JSON data, and lists of tensors by name."""

    facts: Mapping[str, Any]
    tensors: Mapping[str, list[Tensor]]


@dataclass
class Checkpoint:
    """A file to save to, and what it held when the run began.

    identity: what the healing depends on (plan, settings, seed, data size); a file of another one is refused.
    problem: why nothing could be written, once that happened; the run goes on without.
    """

    path: Path
    identity: Mapping[str, Any]
    problem: str = ""
    saved: Saved | None = field(default=None)

    def __post_init__(self) -> None:
        if self.path.exists():
            self.saved = _read(self.path, self.identity)

    def save(self, facts: Mapping[str, Any], tensors: Mapping[str, Sequence[Tensor]]) -> None:
        """Write everything, or leave the file as it was and remember why."""
        from safetensors.torch import save_file

        partial = self.path.with_name(self.path.name + ".partial")
        try:
            whole = json.dumps({"identity": self.identity, "facts": facts})
            flat = {
                f"{name}.{i:06d}": t.detach().cpu().clone().contiguous()
                for name, group in tensors.items()
                for i, t in enumerate(group)
            }
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(flat, partial, metadata={KEY: VERSION, "facts": whole})
            partial.replace(self.path)
        except Exception as error:  # no room, a folder that is none, a buffer of a kind that files do not hold
            self.problem = (
                f"the checkpoint {self.path} could not be written ({one_line(error)}): the run goes on without"
            )
            with contextlib.suppress(OSError):
                partial.unlink()


def forget(path: Path) -> None:
    """Remove a checkpoint: the run has ended, and nothing is left to go on with."""
    with contextlib.suppress(OSError):
        path.unlink()


def _contents(path: Path) -> tuple[dict[str, Any], Saved]:
    """The identity of the run that wrote a checkpoint, and what it saved."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = sorted(file.keys())
            if metadata.get(KEY) != VERSION:
                raise LoadError(f"{path} is no checkpoint of this panther: give another name, or delete it")
            whole = json.loads(metadata["facts"])
            tensors: dict[str, list[Tensor]] = {}
            for name in names:
                tensors.setdefault(name.rpartition(".")[0], []).append(file.get_tensor(name))
            found, facts = dict(whole["identity"]), dict(whole["facts"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise LoadError(f"{path} cannot be read as a checkpoint ({error}): delete it to begin anew") from error
    return found, Saved(facts, tensors)


def _read(path: Path, identity: Mapping[str, Any]) -> Saved:
    found, saved = _contents(path)
    wanted = json.loads(json.dumps(identity))
    if found != wanted:
        other = ", ".join(sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k)))
        raise LoadError(
            f"{path} is a checkpoint of another run (different: {other}): give the same arguments as then, another "
            "name, or delete it to begin anew"
        )
    return saved


def saved_plan(path: Path) -> str | None:
    """The plan (JSON) that a checkpoint's run heals; None when there is no file, or it was not made by compress.

    Raises: LoadError when the file is no checkpoint.
    """
    if not path.exists():
        return None
    plan = _contents(path)[0].get("plan")
    return plan if isinstance(plan, str) else None
