"""Lists the packages and builds the optional module panther._C; all the rest is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent

# The oldest torch that the kernels are built for (2.10, as torch/headeronly/version.h writes it): whatever the torch
# they are compiled against, they load in this one and in every later one.
TORCH_TARGET_VERSION = "0x020a000000000000"


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
        sources=["csrc/module.cpp", *found("csrc/cpu/*.cpp")],
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


def extensions() -> list[Extension]:
    try:
        return [kernels()]
    except ImportError as error:
        print(f"panther: building without compiled kernels, since {error}", file=sys.stderr)
        return []


setup(
    packages=[*find_packages(include=["panther", "panther.*"], exclude=["panther.converters"]), "panther.converters"],
    # In a checkout panther/converters is a link to converters/, for tools that look for modules by their path; an
    # install does not rely on it, since not every system checks out links.
    package_dir={"panther.converters": "converters"},
    ext_modules=extensions(),
)
