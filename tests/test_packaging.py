"""What an install puts on the system, on one without a compiler too."""

import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILT = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc", "panther", "converters", "models", "benchmarks")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel built from a copy of the tree without its links, by a machine whose compiler always fails."""
    source = tmp_path_factory.mktemp("source")
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd")
    for name in BUILT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=unwanted)
        else:
            shutil.copy(ROOT / name, source / name)
    (source / "panther" / "converters").unlink()
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", ".", "."]
    run = subprocess.run(
        command,
        cwd=source,
        env=os.environ | {"CC": "false", "CXX": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (file,) = source.glob("*.whl")
    return file


def test_wheel_adds_one_import_name(wheel):
    names = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"panther"}


def test_wheel_carries_every_python_file_of_panther_and_the_converters(wheel):
    shipped = set(zipfile.ZipFile(wheel).namelist())
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "panther").rglob("*.py")}
    converters = {f"panther/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "converters").rglob("*.py")}
    assert converters
    assert package | converters | {"panther/py.typed"} <= shipped


INSTALLED = """
    import sys
    # An editable install of the checkout would lend its compiled module to this one.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
    import panther, panther.converters
    print(panther.__version__, panther.converters.__file__)
    print(panther.build_info())
"""


def run_python(code, **options):
    return subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def test_install_without_a_compiler_works_and_tells_why_it_has_no_kernels(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    run = run_python(INSTALLED, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert run.returncode == 0, run.stderr
    first, second, third = run.stdout.splitlines()
    assert first == f"0.1.0 {tmp_path / 'panther' / 'converters' / '__init__.py'}"
    assert second.startswith("panther 0.1.0, torch ")
    assert third.startswith("compiled CPU kernels: none; panther._C was not built")


CHECKOUT = os.environ | {"PYTHONPATH": str(ROOT)}


def test_importing_panther_is_silent_and_loads_no_onnx_and_no_gpu():
    code = """
        import sys, panther
        print("onnx" in sys.modules, "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized())
    """
    run = run_python(code, env=CHECKOUT)
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "False False", "")


@pytest.mark.parametrize("name", ["build_info", "compress"])
def test_function_named_like_its_module_can_be_called_after_the_module_was_imported(name):
    run = run_python(f"import panther.{name}, panther; print(callable(panther.{name}))", env=CHECKOUT)
    assert (run.returncode, run.stdout.strip()) == (0, "True"), run.stderr
