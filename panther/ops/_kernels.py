"""The compiled module panther._C: loaded once, and missed aloud once."""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType


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
