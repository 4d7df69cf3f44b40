"""The C++ core, and the arithmetic of the CUDA kernel, watched by the address and undefined-behaviour sanitizers.

Each driver in tests/cpp is a program of its own, without Python and without torch's libraries; it says what it checks.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
FLAGS = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}"]


def compiled(source, program, *options):
    command = [COMPILER, *FLAGS, *options, source, "-o", program]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def sanitizing_compiler(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler here")
    folder = tmp_path_factory.mktemp("empty")
    source = folder / "empty.cpp"
    source.write_text("int main() {}")
    if compiled(source, folder / "empty").returncode:
        pytest.skip(f"{COMPILER} has no address and undefined-behaviour sanitizers")


def run_driver(name, folder, *options):
    build = compiled(ROOT / "tests" / "cpp" / f"{name}.cpp", folder / name, *options)
    assert build.returncode == 0, build.stderr
    run = subprocess.run([folder / name], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout.split()


@pytest.mark.usefixtures("sanitizing_compiler")
def test_cpu_kernels_stay_within_their_buffers_and_near_the_exact_sums(tmp_path):
    assert run_driver("cpu_kernels", tmp_path)[0] == "scalar"


@pytest.mark.usefixtures("sanitizing_compiler")
def test_cpu_kernels_without_vector_instructions_compile_and_hold_the_same(tmp_path):
    assert run_driver("cpu_kernels", tmp_path, "-DPANTHER_SCALAR") == ["scalar"]


@pytest.mark.usefixtures("sanitizing_compiler")
def test_arithmetic_of_the_cuda_kernel_stays_within_its_buffers_and_near_the_exact_sums(tmp_path):
    run_driver("cuda_arithmetic", tmp_path, *(f"-I{path}" for path in include_paths()))
