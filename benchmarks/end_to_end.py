"""How much of what the sketched layers gain a whole model gains, in torch and in onnxruntime, at half of its weights.

`python -m benchmarks.end_to_end` on a machine that does nothing else. Needs the Brown corpus for MiniLM and spoken
prompts for Whisper (python -m benchmarks.fetch_data); `--text lee` and CREPE need packages from PyPI only.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import nn

import panther
from benchmarks.common import header, say, table
from benchmarks.onnx_speed import EXCLUDED, batch_of, exported, file_run, session, session_options
from models import crepe, minilm, whisper
from models.data import MissingDataError
from models.recipe import Recipe
from panther.batches import as_call, inference, run
from panther.errors import PantherError
from panther.spec import Cost
from panther.verify import medians_in_turn

WEIGHTED = ("MatMul", "Gemm", "Conv")  # how the types of operators that read weights end, fused ones too
COLUMNS = (
    "model",
    "runtime",
    "batch",
    "dense ms",
    "compressed ms",
    "speed-up",
    "share in the layers",
    "their speed-up",
    "FLOPs, dense / compressed",
    "ceiling by FLOPs",
    "reached",
    "ceiling by time",
    "reached",
)
LEGEND = (
    "share in the layers: of the dense model's time; ceiling: the model's speed-up if all but the layers took as long "
    "as before, and the layers as much less as they have fewer FLOPs, or what they take by themselves; reached: "
    "speed-up / ceiling\n"
    "torch: the layers that were sketched, run by themselves on the inputs that they have in the model, in turns with "
    "both models\n"
    "onnxruntime: all operators with weights, timed by its profiler in other runs in turn; what a sketched layer needs "
    "beside them counts against the speed-up"
)


@dataclass(frozen=True)
class Timed:
    """Milliseconds (dense, compressed) of both models and of their layers."""

    model: str
    runtime: str
    batch: int
    whole_ms: tuple[float, float]
    layers_ms: tuple[float, float]
    flops_ratio: float  # of the layers, dense / compressed

    @property
    def speedup(self) -> float:
        return self.whole_ms[0] / self.whole_ms[1]

    def ceiling(self, sketched_ms: float) -> float:
        """The speed-up of the model if nothing but its layers' time were another one."""
        dense, layers = self.whole_ms[0], self.layers_ms[0]
        return dense / (dense - layers + sketched_ms)

    def cells(self) -> list[str]:
        ceilings = [self.ceiling(taken) for taken in (self.layers_ms[0] / self.flops_ratio, self.layers_ms[1])]
        return [
            self.model,
            self.runtime,
            str(self.batch),
            *(f"{taken:.2f}" for taken in self.whole_ms),
            f"{self.speedup:.2f}",
            f"{100 * self.layers_ms[0] / self.whole_ms[0]:.0f} %",
            f"{self.layers_ms[0] / self.layers_ms[1]:.2f}",
            f"{self.flops_ratio:.2f}",
            *(cell for c in ceilings for cell in (f"{c:.2f}", f"{100 * self.speedup / c:.0f} %")),
        ]


def compress(recipe: Recipe, keep: float, seed: int, exclude: Sequence[Any] | None) -> panther.Result:
    say(f"{recipe.name}: compressing")
    return panther.compress(
        recipe.model,
        keep,
        example_inputs=recipe.example_inputs,
        calib_data=recipe.batches,
        exclude=exclude,
        heal="none",  # speed depends on the plan alone
        seed=seed,
        progress=False,
    )


def in_torch(recipe: Recipe, result: panther.Result, size: int, seconds: float) -> Timed:
    """Both models and their layers, `seconds` in all."""
    call = as_call(batch_of(recipe.example_inputs, size))
    names = [choice.layer for choice in result.plan.sketched]
    models = (recipe.model, result.model)
    with contextlib.ExitStack() as modes:
        for model in models:
            modes.enter_context(inference(model))
        wholes = [functools.partial(run, model, call) for model in models]
        parts = [replay_of(model, names, whole) for model, whole in zip(models, wholes, strict=True)]
        dense, compressed, layers, sketched = (1e3 * s for s in medians_in_turn([*wholes, *parts], seconds=seconds))
    rows = [row for row in result.report.layers if row.name in names]
    before, after = sum((row.before for row in rows), Cost()), sum((row.after for row in rows), Cost())
    ratio = before.flops / after.flops
    return Timed(recipe.name, "torch", size, (dense, compressed), (layers, sketched), ratio)


def replay_of(model: nn.Module, names: Sequence[str], whole: Callable[[], object]) -> Callable[[], None]:
    """Runs the layers of these names on the inputs that they have in one run of the model, and nothing else."""
    calls: list[Callable[[], object]] = []

    def remember(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(functools.partial(layer, *args, **kwargs))

    hooks = [model.get_submodule(name).register_forward_pre_hook(remember, with_kwargs=True) for name in names]
    try:
        whole()
    finally:
        for hook in hooks:
            hook.remove()

    def replay() -> None:
        for call in calls:
            call()

    return replay


def in_onnxruntime(
    recipe: Recipe, result: panther.Result, sizes: Sequence[int], seconds: float, threads: int
) -> Iterator[Timed]:
    """Both models' files at every batch size, `seconds` each, and then with the operators timed: every session holds
    what it needed once for as long as it lives.

    Raises: PantherError when a file does not agree with its model.
    """
    inputs = {size: batch_of(recipe.example_inputs, size) for size in sizes}
    ratio = result.report.dense.flops / result.report.compressed.flops
    with tempfile.TemporaryDirectory() as folder:
        models = {"dense": recipe.model, "compressed": result.model}
        files = [exported(model, Path(folder) / f"{name}.onnx", recipe, inputs).path for name, model in models.items()]
        for size, given in inputs.items():
            dense, compressed = (
                1e3 * median
                for median in medians_in_turn(
                    [file_run(session(path, threads), recipe.model, given) for path in files], seconds=seconds / 2
                )
            )
            watched = [_profiled(path, threads) for path in files]
            medians_in_turn([file_run(one, recipe.model, given) for one in watched], seconds=seconds / 2)
            shares = [_weighted_share(one, path) for one, path in zip(watched, files, strict=True)]
            del watched
            layers_ms = dense * shares[0], compressed * shares[1]
            yield Timed(recipe.name, "onnxruntime", size, (dense, compressed), layers_ms, ratio)


def _profiled(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """A session that times every operator, and writes down which ones it made of the file's."""
    options = session_options(threads)
    options.enable_profiling, options.profile_file_prefix = True, str(path)
    options.optimized_model_filepath = str(path.with_suffix(".optimised"))
    options.log_severity_level = 3  # it warns that such a file fits this machine only
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _weighted_share(of: onnxruntime.InferenceSession, path: Path) -> float:
    """The share of a profiled session's time in operators that read a weight, the median of its runs."""
    graph = onnx.load(str(path.with_suffix(".optimised")), load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer if len(tensor.dims) > 1}
    layers = {node.name for node in graph.node if node.op_type.endswith(WEIGHTED) and weights & set(node.input)}
    shares, inside = [], 0
    for event in json.loads(Path(of.end_profiling()).read_text(encoding="utf-8")):
        if event["name"].removesuffix("_kernel_time") in layers:
            inside += event["dur"]
        elif event["name"] == "model_run":  # after those of its operators
            shares.append(inside / event["dur"])
            inside = 0
    return statistics.median(shares)


def compare(recipe: Recipe, result: panther.Result, given: argparse.Namespace) -> tuple[list[Timed], str]:
    """Both runtimes at every batch size, and the latency of the report beside what is measured here at its size."""
    own = as_call(recipe.example_inputs).batch_size
    found = {}
    for size in sorted({own, *given.batches}):
        say(f"{recipe.name}: torch, batch {size}")
        found[size] = in_torch(recipe, result, size, given.seconds)
    say(f"{recipe.name}: onnxruntime")
    files = in_onnxruntime(recipe, result, given.batches, given.seconds, given.threads)
    dense, compressed = result.report.dense.latency_ms, result.report.compressed.latency_ms
    if dense is None or compressed is None:
        raise PantherError(f"the report of {recipe.name} has no latency: {result.report.notes}")
    line = (
        f"{recipe.name}: speed-up of the report {dense / compressed:.2f} ({dense:.2f} and {compressed:.2f} ms at batch "
        f"{own}), measured here {found[own].speedup:.2f}"
    )
    return [*found.values(), *files], line


def report(recipe: Recipe, found: Sequence[Timed], line: str, given: argparse.Namespace) -> str:
    """Header and table of one model, printed as soon as it is through."""
    what = [f"keep {given.keep}; medians of runs in turns, {given.threads} threads in both runtimes; nothing is healed"]
    rows = table(COLUMNS, [timed.cells() for timed in found])
    return "\n".join([header([recipe], what, given.seed), "", rows, "", line, LEGEND])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=BUILD, default=list(BUILD), help="which (all)")
    parser.add_argument("--text", choices=sorted(minilm.SOURCES), default="brown", help="calibration text of MiniLM")
    parser.add_argument("--calibration", type=int, default=64, help="texts, frames and prompts (64)")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the weights (0.5)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each model, batch size and runtime (60)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    try:
        for name in given.models:
            recipe = BUILD[name](given)
            result = compress(recipe, given.keep, given.seed, EXCLUDED.get(name))
            print(report(recipe, *compare(recipe, result, given), given), flush=True)
    except (MissingDataError, PantherError, ValueError) as error:
        print(f"end_to_end: {error}", file=sys.stderr)
        return 1
    return 0


def _encoder_of(recipe: Recipe) -> Recipe:
    """Whisper's encoder alone."""
    example, *batches = (
        {"input_features": batch["input_features"]} for batch in (recipe.example_inputs, *recipe.batches)
    )
    encoder = recipe.model.get_encoder()  # type: ignore[operator]
    return changed(recipe, name=f"{recipe.name} encoder", model=encoder, example_inputs=example, batches=batches)


# With as little to check as a recipe allows: only speed is measured here.
BUILD: dict[str, Callable[[argparse.Namespace], Recipe]] = {
    "minilm": lambda of: minilm.build(of.text, of.calibration, minilm.NEIGHBOURS + 1, seed=of.seed),
    "crepe": lambda of: crepe.build(of.calibration, count=1),
    "whisper": lambda of: _encoder_of(whisper.build(of.calibration, 1, seed=of.seed)),
}


if __name__ == "__main__":
    sys.exit(main())
