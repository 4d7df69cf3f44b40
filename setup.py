"""Lists the packages and builds the optional module panther._C; all the rest is in pyproject.toml.

With PANTHER_CUDA=1 it also builds panther._C_cuda, with the nvcc on the PATH and on Linux.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent

# The oldest torch that the kernels are built for (2.10, as torch/headeronly/version.h writes it): whatever the torch
# they are compiled against, they load in this one and in every later one.
TORCH_TARGET_VERSION = "0x020a000000000000"

# Machine code for A100 and H100, and PTX, which the driver translates for later GPUs.
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    "--compiler-options=-fPIC,-fvisibility=hidden",
]


def found(pattern: str) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob(pattern))]


def flags() -> list[str]:
    if sys.platform == "win32":
        return ["/O2", "/std:c++17", "/EHsc"]
    # Contraction is off, since the compiler may fuse the multiplication and addition of one inlined copy of a sum and
    # not those of another, and the same dot product would have different bits.
    return ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-g0"]


def kernels() -> Extension:
    import pybind11
    from torch.utils.cpp_extension import include_paths, library_paths

    return Extension(
        "panther._C",
        sources=["csrc/module.cpp", *found("csrc/core/*.cpp"), *found("csrc/cpu/*.cpp")],
        depends=[*found("csrc/*.h"), *found("csrc/core/*.h")],
        include_dirs=["csrc", pybind11.get_include(), *include_paths()],
        library_dirs=library_paths(),
        libraries=["torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=flags(),
        language="c++",
        # Without a working compiler the install goes on, in pure Python; panther.build_info() says so.
        optional=True,
    )


def cuda_kernels() -> Extension:
    """A library that only registers kernels, without a Python module in it. torch's CUDA headers are not needed."""
    from torch.utils.cpp_extension import include_paths, library_paths

    has_cuda = any(Path(path, "libtorch_cuda.so").exists() for path in library_paths())
    return Extension(
        "panther._C_cuda",
        sources=found("csrc/cuda/*.cu"),
        depends=[*found("csrc/*.h"), *found("csrc/core/*.h")],
        include_dirs=["csrc", *include_paths()],
        library_dirs=library_paths(),
        # Beside the CPU build of torch the kernels are compiled all the same, as a check; they cannot be loaded.
        libraries=["torch_cpu", *(["torch_cuda"] if has_cuda else [])],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("USE_CUDA", "1")],
        extra_compile_args=NVCC_FLAGS,
    )


class Build(build_ext):
    """setuptools' own way to build, a file a core, and one run of nvcc for the CUDA kernels."""

    def compile_side_by_side(self) -> None:
        compile_all = self.compiler.compile

        def compiled(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda source: compile_all([source], **options), sources))
            return [name for names in objects for name in names]

        self.compiler.compile = compiled

    def build_extension(self, extension: Extension) -> None:
        if extension.name != "panther._C_cuda":
            self.compile_side_by_side()
            super().build_extension(extension)
            return
        target = self.get_ext_fullpath(extension.name)
        self.mkpath(str(Path(target).parent))
        options = [
            *extension.extra_compile_args,
            *(f"-D{name}={value}" for name, value in extension.define_macros),
            *(f"-I{path}" for path in extension.include_dirs),
            *(f"-L{path}" for path in extension.library_dirs),
            *(f"-l{library}" for library in extension.libraries),
        ]
        subprocess.run(["nvcc", "-shared", *extension.sources, *options, "-o", target], check=True)


def extensions() -> list[Extension]:
    wanted = [kernels, cuda_kernels] if os.environ.get("PANTHER_CUDA") == "1" else [kernels]
    try:
        return [build() for build in wanted]
    except ImportError as error:
        print(f"panther: building without compiled kernels, since {error}", file=sys.stderr)
        return []


setup(
    packages=[*find_packages(include=["panther", "panther.*"], exclude=["panther.converters"]), "panther.converters"],
    # In a checkout panther/converters is a link to converters/, for tools that look for modules by their path; an
    # install does not rely on it, since not every system checks out links.
    package_dir={"panther.converters": "converters"},
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
)
