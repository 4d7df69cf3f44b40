"""Every snippet of README.md and docs/ runs: Python blocks in one namespace a file, panther.convert from the shell."""

import re
import shlex
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from panther.convert import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FACTORY = """
import torch

def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10)
    )

def evaluate(model):
    return 1 - sum(p.numel() for p in model.parameters()) * 1e-9
"""
# Set up a whole environment, which the tests run in; checked in another way (see .ci/run) or by hand.
NOT_RUN = ("make ", "pip install", "PANTHER_CUDA=1 pip install")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the snippets assume: a module that builds the model, its weights, calibration data."""
    (tmp_path / "my_models.py").write_text(FACTORY)
    namespace: dict = {}
    exec(FACTORY, namespace)  # noqa: S102  # written above
    torch.save(namespace["make"]().state_dict(), tmp_path / "model.pt")
    data = np.random.default_rng(0).normal(size=(256, 16)) @ np.random.default_rng(1).normal(size=(16, 64))
    np.savez(tmp_path / "calib.npz", input=data.astype(np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_snippets_run(page: Path, folder: Path) -> None:
    snippets = blocks(page, "python")
    torch.manual_seed(0)
    namespace: dict = {}
    for snippet in snippets:
        exec(compile(snippet, str(page), "exec"), namespace)  # noqa: S102  # our own documentation
    assert not snippets or "panther" in namespace


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shell_snippets_run(page: Path, folder: Path) -> None:
    lines = [line.split("#")[0].strip() for block in blocks(page, "sh") for line in block.splitlines()]
    for line in filter(None, lines):
        if line.startswith(NOT_RUN):
            continue
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "panther.convert"], f"no test runs this line of {page.name}: {line}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # some of them show a run without calibration data
            assert main(words[3:]) == 0, line


def test_every_file_that_the_documentation_links_to_exists() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists() or target.startswith("http"), f"{page.name} links to {target}"
