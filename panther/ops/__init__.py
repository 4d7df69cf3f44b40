"""Operations of panther's own, by name.

An op is one file: a schema, a plain PyTorch `reference` that is also its fallback, fake kernel and decomposition, and a
backward. Compiled code only implements it for a device. To add one, write the file and add its line to `OPS`.
"""

from __future__ import annotations

from panther.ops import _kernels
from panther.ops._define import Op
from panther.ops.low_rank_linear import LOW_RANK_LINEAR, low_rank_linear

OPS: dict[str, Op] = {
    "low_rank_linear": LOW_RANK_LINEAR,
}

# What to give to `exported_program.run_decompositions(REFERENCES)`: afterwards only standard ATen ops are left.
REFERENCES = {op.overload: op.reference for op in OPS.values()}

# The schemas exist by now, so the kernels take over here.
_kernels.load()
_kernels.load_cuda()

__all__ = ["OPS", "REFERENCES", "Op", "low_rank_linear"]
