"""The compiled kernels, for tests that need them."""

import importlib

import pytest

from panther.build_info import build_info
from panther.ops import _kernels, _windows

COMPILED = _kernels.load()[0]
SETS = COMPILED.build_info()["instruction_sets"] if COMPILED else ["none"]
needs_kernels = pytest.mark.skipif(COMPILED is None, reason=f"no compiled kernels here: {build_info().reason}")


def forget_choices():
    """Have the functions ask again which kernel is faster, as they do once for a shape: the instructions changed."""
    chain = importlib.import_module("panther.ops.low_rank_conv")  # the function has its name
    for choice in (_windows.torch_serves, chain._torch_serves, chain._instruction_set):
        getattr(choice, "cache_clear", lambda: None)()
