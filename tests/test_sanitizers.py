"""The kernels of csrc/core and the arithmetic of the CUDA one, under the address and undefined-behaviour sanitizers.

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
ARM_COMPILER = shutil.which("aarch64-linux-gnu-g++")
ARM_EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
FLAGS = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}"]
SANITIZERS = "-fsanitize=address,undefined"


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def sanitizing_compiler(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler here")
    folder = tmp_path_factory.mktemp("empty")
    source = folder / "empty.cpp"
    source.write_text("int main() {}")
    if run(COMPILER, SANITIZERS, source, "-o", folder / "empty").returncode or run(folder / "empty").returncode:
        pytest.skip(f"{COMPILER} has no address and undefined-behaviour sanitizers")


def run_driver(name, folder, *options, compiler=COMPILER, emulator=(), arguments=()):
    """What the program prints, which ends with an error where it finds one."""
    kernels = sorted(ROOT.glob("csrc/core/*.cpp")) if name == "cpu_kernels" else []
    build = run(compiler, *FLAGS, *options, ROOT / "tests" / "cpp" / f"{name}.cpp", *kernels, "-o", folder / name)
    assert build.returncode == 0, build.stderr
    ran = run(*emulator, folder / name, *arguments)
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout.split()


@pytest.mark.usefixtures("sanitizing_compiler")
def test_cpu_kernels_stay_within_their_buffers_and_near_the_exact_sums(tmp_path):
    assert run_driver("cpu_kernels", tmp_path, SANITIZERS)[0] == "scalar"


@pytest.mark.usefixtures("sanitizing_compiler")
def test_cpu_kernels_without_vector_instructions_compile_and_hold_the_same(tmp_path):
    assert run_driver("cpu_kernels", tmp_path, SANITIZERS, "-DPANTHER_SCALAR") == ["scalar"]


@pytest.mark.usefixtures("sanitizing_compiler")
def test_arithmetic_of_the_cuda_kernel_stays_within_its_buffers_and_near_the_exact_sums(tmp_path):
    assert run_driver("cuda_arithmetic", tmp_path, SANITIZERS, *(f"-I{path}" for path in include_paths())) == []


@pytest.mark.skipif(
    ARM_COMPILER is None or ARM_EMULATOR is None, reason="no aarch64-linux-gnu-g++ and qemu-aarch64 to run it with"
)
def test_cpu_kernels_hold_the_same_on_an_emulated_arm_processor(tmp_path):
    options = ("-static", "-fsanitize=undefined")  # the address sanitizer does not run in the emulator
    emulated = {"compiler": ARM_COMPILER, "emulator": [ARM_EMULATOR], "arguments": ["neon"]}  # slow: no twins again
    assert run_driver("cpu_kernels", tmp_path, *options, **emulated) == ["neon"]
