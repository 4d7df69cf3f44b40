"""What this installation runs on: versions, threads, and whether compiled kernels are in use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BuildInfo:
    """What runs here. `str()` of it is what to put into a bug report."""

    version: str
    torch: str
    threads: int
    compiled: bool  # the module panther._C is loaded
    reason: str  # why it is not; empty when it is
    kernels: tuple[str, ...]  # the ops that have a compiled CPU kernel, as the dispatcher sees it
    instruction_set: str  # "avx512", "avx2", "scalar", or "none" without kernels
    compiler: str

    def __str__(self) -> str:
        lines = [f"panther {self.version}, torch {self.torch}, {self.threads} threads"]
        if not self.compiled:
            return "\n".join([*lines, f"compiled CPU kernels: none; {self.reason}"])
        how = f"{self.instruction_set}, compiler {self.compiler}"
        return "\n".join([*lines, f"compiled CPU kernels: {', '.join(self.kernels)} ({how})"])


def build_info() -> BuildInfo:
    """Versions, threads and kernels in use. Without a compiled module, `reason` says why there is none."""
    import torch  # not needed to import panther

    from panther import __version__
    from panther.ops import OPS, _kernels

    module, reason = _kernels.load()
    built = module.build_info() if module else {"instruction_set": "none", "compiler": "none"}
    return BuildInfo(
        version=__version__,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        compiled=module is not None,
        reason=reason,
        kernels=tuple(name for name, op in OPS.items() if op.has_kernel("cpu")),
        instruction_set=built["instruction_set"],
        compiler=built["compiler"],
    )
