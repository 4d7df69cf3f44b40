"""The compiled kernels, for tests that need them."""

import pytest

from panther.build_info import build_info
from panther.ops import _kernels

COMPILED = _kernels.load()[0]
SETS = COMPILED.build_info()["instruction_sets"] if COMPILED else ["none"]
needs_kernels = pytest.mark.skipif(COMPILED is None, reason=f"no compiled kernels here: {build_info().reason}")
