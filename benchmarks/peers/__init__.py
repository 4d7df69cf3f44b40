"""Other people's methods, one file each, made comparable: same model, same data, same amount of work.

A peer that is a package runs in an environment of its own (environment.py), where its file is started as a module.
To add one, write its file and add its line below.
"""

from __future__ import annotations

from benchmarks.peers.environment import Peer

PEERS: dict[str, Peer] = {
    "Torch-Pruning": Peer(
        "benchmarks.peers.torch_pruning",
        ("torch-pruning==1.6.1",),
        "MIT",
        "structured pruning of heads and hidden units, or of channels",
    ),
    "tensorly-torch": Peer(
        "benchmarks.peers.tensorly_torch",
        ("tensorly-torch==0.5.0", "tensorly==0.10.0", "opt-einsum==3.4.0"),
        "BSD-3-Clause",
        "Tucker factorisation of convolution kernels, from the weights alone",
    ),
}
