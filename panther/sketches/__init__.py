"""Decompositions of one weight matrix: ONE file and ONE line each.

Notation: W (m, n) is the weight, Sigma (n, n) the covariance of its inputs, C = W Sigma W^T (m, m) that of its
outputs. A sketch answers with the leading directions of the outputs (or, where n < m, of the whitened inputs), from
which the best factors of every rank up to `max_rank` follow by slicing.
"""

from panther.sketches.base import SENSITIVITY_RIDGE, LowRank, Moments, Seen, Sketch, with_ridge
from panther.sketches.data_free import data_free
from panther.sketches.randomised import randomised
from panther.sketches.whitened import whitened

SKETCHES: dict[str, Sketch] = {
    "whitened": whitened,
    "randomised": randomised,
    "data_free": data_free,
}

__all__ = [
    "SENSITIVITY_RIDGE",
    "SKETCHES",
    "LowRank",
    "Moments",
    "Seen",
    "Sketch",
    "data_free",
    "randomised",
    "whitened",
    "with_ridge",
]
