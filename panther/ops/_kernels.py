"""The compiled modules: panther._C, loaded once and missed aloud once, and panther._C_cuda where it was asked for."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from types import ModuleType

import torch


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """The compiled module, or None and the reason why there is none. Loading it registers its kernels."""
    try:
        return importlib.import_module("panther._C"), ""
    except ModuleNotFoundError:
        return None, "panther._C was not built (the install found no C++ compiler, or its run failed)"
    except ImportError as error:
        return None, f"panther._C does not load ({error})"


@functools.cache
def load_cuda() -> str:
    """Why there are no CUDA kernels, or nothing when there are. Loading them registers them and touches no GPU."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    spec = importlib.util.find_spec("panther._C_cuda")
    if spec is None or spec.origin is None:
        return "panther._C_cuda was not built (PANTHER_CUDA=1 asks the install for it)"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"panther._C_cuda does not load ({error.__cause__ or error})"
    return ""


@functools.cache
def warn_that_they_are_missing() -> None:
    """Say once in a process that the CPU kernels are missing, what that costs and how to get them."""
    warnings.warn(
        f"panther runs without its compiled CPU kernels: {load()[1]}. Results are the same within rounding; layers "
        "that see few rows at a time are slower. To get them, install a C++17 compiler and run "
        "`pip install --force-reinstall --no-deps --no-build-isolation panther-compress` "
        "(see panther.build_info()).",
        RuntimeWarning,
        stacklevel=2,
    )
