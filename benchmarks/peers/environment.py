"""Peers in an environment of their own: the same torch and the same libraries as here, and their packages beside.

The environment is made once, under the data folder, and never holds torchvision or another torch.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.common import say
from benchmarks.peers.base import Cell, Task
from models.data import CHECKOUT, data_roots

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SHARED = ("numpy", "scipy", "safetensors", "rich", "transformers")  # what panther and the recipes import
MODEL_PACKAGES = CHECKOUT / "models" / "requirements.txt"
INSTALL_SECONDS = 1800


@dataclass(frozen=True)
class Peer:
    """A package that compresses models, and the module here that drives it."""

    module: str
    requirements: tuple[str, ...]
    licence: str
    method: str


class EnvironmentFailedError(Exception):
    """The environment could not be made; the text says which step failed and why."""


def environment(peer: Peer) -> Path:
    """The Python of the peers' environment, once it holds what this peer needs.

    Raises: EnvironmentFailedError.
    """
    torch = importlib.metadata.version("torch")
    folder = data_roots()[0].resolve() / "peers" / f"python{sys.version_info[0]}.{sys.version_info[1]}-torch{torch}"
    python = folder / "bin" / "python"
    done = folder / "installed.txt"  # a line for each step that was finished, so that a stopped one is done again
    finished = done.read_text(encoding="utf-8").splitlines() if done.exists() else []
    for name, command in _steps(peer, folder, python, torch):
        if name not in finished:
            say(f"peers' environment: {name}")
            _run(name, command)
            with done.open("a", encoding="utf-8") as file:
                file.write(name + "\n")
    return python


def _steps(peer: Peer, folder: Path, python: Path, torch: str) -> Iterator[tuple[str, list[list[str]]]]:
    """Each step with its commands, of which one that succeeds is enough."""
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    shared = [f"{name}=={importlib.metadata.version(name)}" for name in SHARED]
    yield "venv", [[sys.executable, "-m", "venv", "--clear", str(folder)]]
    # First and alone, so that nothing that asks for torch later chooses another build.
    yield f"torch=={torch}", [[*pip, f"torch=={torch}"], [*pip, "--index-url", CPU_INDEX, f"torch=={torch}"]]
    yield " ".join(shared), [[*pip, f"torch=={torch}", *shared]]
    yield MODEL_PACKAGES.name, [[*pip, "--no-deps", "-r", str(MODEL_PACKAGES)]]
    yield " ".join(peer.requirements), [[*pip, "--no-deps", *peer.requirements]]


def _run(name: str, commands: Sequence[Sequence[str]]) -> None:
    why = ""
    for command in commands:
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS)
        except subprocess.CalledProcessError as error:
            why = (error.stderr.strip().splitlines() or [f"exit status {error.returncode}"])[-1]
        except (OSError, subprocess.TimeoutExpired) as error:
            why = str(error)
        else:
            return
    raise EnvironmentFailedError(f"the peers' environment could not be made: {name}: {why}")


def run_peer(peer: Peer, task: Task, row: str, share: float, states: Sequence[str]) -> Iterator[Cell]:
    """The peer's cells in the order of `states`, each as soon as its process has measured it."""
    missing = list(states)
    try:
        python = environment(peer)
    except EnvironmentFailedError as error:
        yield from (Cell(task.model, row, share, state, why=str(error)) for state in states)
        return
    given = ["--task", json.dumps(asdict(task)), "--row", row, "--share", str(share), "--states", *states]
    command = [str(python), "-m", peer.module, *given]
    surroundings = {**os.environ, "PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, cwd=CHECKOUT, env=surroundings, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            cell = Cell.from_json(line)
            missing.remove(cell.state)
            yield cell
    for state in missing:
        why = f"its process ended with status {process.returncode}; what it wrote is above"
        yield Cell(task.model, row, share, state, why=why)
