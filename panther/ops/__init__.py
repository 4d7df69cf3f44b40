"""Operations of panther's own, by name.

An op is one file: a schema, a plain PyTorch `reference` that is also its fallback, fake kernel and what is exported or
traced, and a backward (none where it adds to some of its inputs). Compiled code only implements it for a device. To add
one, write the file and add its line to `OPS`.
"""

from __future__ import annotations

from panther.ops import _kernels
from panther.ops._define import Op
from panther.ops._quantised import dequantised, packed_int4, quantised, unpacked_int4
from panther.ops.add_moments import ADD_MOMENTS, add_moments
from panther.ops.conv import CONV, conv
from panther.ops.hadamard import HADAMARD, hadamard
from panther.ops.linear import LINEAR, linear
from panther.ops.low_rank_conv import LOW_RANK_CONV, low_rank_conv
from panther.ops.low_rank_linear import LOW_RANK_LINEAR, low_rank_linear
from panther.ops.low_rank_linear_int8 import LOW_RANK_LINEAR_INT8, low_rank_linear_int8
from panther.ops.pivoted_linear import PIVOTED_LINEAR, pivoted_linear
from panther.ops.quantised_conv import QUANTISED_CONV, quantised_conv
from panther.ops.quantised_linear import QUANTISED_LINEAR, quantised_linear
from panther.ops.sparse_sign_sketch import SPARSE_SIGN_SKETCH, sparse_sign_sketch

OPS: dict[str, Op] = {
    "add_moments": ADD_MOMENTS,
    "conv": CONV,
    "linear": LINEAR,
    "low_rank_conv": LOW_RANK_CONV,
    "low_rank_linear": LOW_RANK_LINEAR,
    "low_rank_linear_int8": LOW_RANK_LINEAR_INT8,
    "pivoted_linear": PIVOTED_LINEAR,
    "quantised_conv": QUANTISED_CONV,
    "quantised_linear": QUANTISED_LINEAR,
    "sparse_sign_sketch": SPARSE_SIGN_SKETCH,
    "hadamard": HADAMARD,
}

# The schemas exist by now, so the kernels take over here.
_kernels.load()
_kernels.load_cuda()

__all__ = [
    "OPS",
    "Op",
    "add_moments",
    "conv",
    "dequantised",
    "hadamard",
    "linear",
    "low_rank_conv",
    "low_rank_linear",
    "low_rank_linear_int8",
    "packed_int4",
    "pivoted_linear",
    "quantised",
    "quantised_conv",
    "quantised_linear",
    "sparse_sign_sketch",
    "unpacked_int4",
]
