"""TensorLy-Torch on a recipe's model: every convolution as a Tucker factorisation of its kernel.

Runs in the environment of benchmarks.peers.environment. The weights alone decide, and one share of every kernel's
parameters is kept, as the package does it; it is the largest at which the FLOPs hold.

Source: Kossaifi et al., "Factorized Higher-Order CNNs" (CVPR 2020).
"""

from __future__ import annotations

import copy
import functools
import sys

import torch
from tltorch import FactorizedConv
from torch import nn

from benchmarks.peers.base import CannotError, Compressed, Job, best_of, largest_within, main
from panther.nn.surgery import with_layers

# The kernel's own axes factorised like the channels, and left as they are.
KINDS = {"Tucker of all axes": None, "Tucker of the channels (kernel axes left)": "spatial"}


def compress(job: Job, share: float) -> Compressed:
    """The better of the two kinds at this share of the FLOPs."""
    if not any(spec.kernel_size for spec in job.of.found.sketchable):
        raise CannotError("it factorises convolutions, and this model has none")
    return best_of(job, {label: functools.partial(_fitted, job, share, fixed) for label, fixed in KINDS.items()})


def _fitted(job: Job, share: float, fixed: str | None) -> nn.Module:
    kept = largest_within(share, job, lambda size: factorised(job, fixed, size, decompose=False))
    return factorised(job, fixed, kept, decompose=True)


def factorised(job: Job, fixed: str | None, kept: float, *, decompose: bool) -> nn.Module:
    """A copy of the model whose convolutions keep this share of their parameters; random ones do to count FLOPs.

    The package shares a bias with the layer that it is given, so that it gets a copy.
    """
    torch.manual_seed(job.task.seed)
    layers = {}
    for spec in job.of.found.sketchable:
        if spec.kernel_size:
            layers[spec.name] = FactorizedConv.from_conv(
                copy.deepcopy(job.of.model.get_submodule(spec.name)),
                rank=kept,
                factorization="tucker",
                implementation="factorized",
                fixed_rank_modes=fixed,
                decompose_weights=decompose,
            )
    return with_layers(job.of.model, layers)


if __name__ == "__main__":
    sys.exit(main(compress))
