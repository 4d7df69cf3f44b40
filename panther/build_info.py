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
    instruction_set: str  # "avx512", "avx2", "neon", "scalar", or "none" without kernels
    compiler: str
    cuda: str  # the CUDA that torch was built with; empty without
    cuda_kernels: tuple[str, ...]  # the ops that have a CUDA kernel of panther's own
    cuda_reason: str  # why there are none; empty when there are

    def __str__(self) -> str:
        cpu = f"{', '.join(self.kernels)} ({self.instruction_set}, compiler {self.compiler})"
        lines = [
            f"panther {self.version}, torch {self.torch}, {self.threads} threads",
            f"compiled CPU kernels: {cpu if self.compiled else f'none; {self.reason}'}",
        ]
        if self.cuda:
            lines.append(f"compiled CUDA kernels: {', '.join(self.cuda_kernels) or f'none; {self.cuda_reason}'}")
        return "\n".join(lines)


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
        cuda=torch.version.cuda or "",
        cuda_kernels=tuple(name for name, op in OPS.items() if op.has_kernel("cuda")),
        cuda_reason=_kernels.load_cuda(),
    )
