"""How much faster a compressed model is than the dense one, in onnxruntime and in torch, at half of its weights.

`python -m benchmarks.onnx_speed` on a machine that does nothing else. Needs the Brown corpus for MiniLM
(python -m benchmarks.fetch_data); `--text lee` and CREPE need packages from PyPI only.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

import panther
from benchmarks.common import header, say, table
from models import crepe, minilm
from models.data import MissingDataError
from models.recipe import Recipe
from panther.batches import as_call, device_of, inference, run
from panther.converters import WRITERS, ExportReport
from panther.converters.inputs import flatten
from panther.errors import PantherError
from panther.verify import medians_in_turn

# How ranks are chosen, and what they are stored in.
WAYS: dict[str, dict[str, Any]] = {
    "uniform": {"search": "uniform"},
    "sensitivity": {},
    "sensitivity, int8": {"dtypes": ("int8",), "heal": "refit"},  # which rounds for what the layers are used for
}
ROUNDED = {"sensitivity, int8, rounded inputs": "sensitivity, int8"}  # files that are written another way besides
DYNAMIC = "none: onnxruntime's dynamic int8"  # of the dense file; inputs are rounded as well, while it runs
EXCLUDED: dict[str, list[Any] | None] = {"minilm": None, "crepe": [nn.Linear]}  # as in benchmarks.crepe
COLUMNS = (
    "model",
    "ranks",
    "batch",
    "FLOPs, dense / compressed",
    "onnxruntime: dense ms",
    "compressed ms",
    "ratio",
    "torch: dense ms",
    "compressed ms",
    "ratio",
    "largest difference of the file",
)


@dataclass(frozen=True)
class Speed:
    """Median milliseconds of the dense and of one compressed model, at one batch size."""

    model: str
    ranks: str
    batch: int
    flops_ratio: float  # of the dense Linear and Conv layers, dense / compressed
    onnx_ms: tuple[float, float]
    torch_ms: tuple[float, float] | None
    parity: float | None  # of the compressed file with the compressed model, as a share of the output's largest value

    def cells(self) -> list[str]:
        onnx, eager = self.onnx_ms, self.torch_ms
        own = ["-"] * 3 if eager is None else [f"{eager[0]:.2f}", f"{eager[1]:.2f}", f"{eager[0] / eager[1]:.2f}"]
        return [
            self.model,
            self.ranks,
            str(self.batch),
            f"{self.flops_ratio:.2f}",
            *(f"{onnx[0]:.2f}", f"{onnx[1]:.2f}", f"{onnx[0] / onnx[1]:.2f}"),
            *own,
            "-" if self.parity is None else f"{self.parity:.0e}",
        ]


def compress(recipe: Recipe, keep: float, seed: int, exclude: Sequence[Any] | None = None) -> dict[str, panther.Result]:
    """The recipe's model as `panther.compress` makes it, for each way to choose ranks."""
    results = {}
    for way, options in WAYS.items():
        say(f"{recipe.name}: compressing, {way} ranks")
        results[way] = panther.compress(
            recipe.model,
            keep,
            example_inputs=recipe.example_inputs,
            calib_data=recipe.batches,
            exclude=exclude,
            **{"heal": "none", **options},  # speed depends on the plan alone
            seed=seed,
            progress=False,
            verify=False,
        )
    return results


def speeds(
    recipe: Recipe, results: Mapping[str, panther.Result], batches: Sequence[int], seconds: float, threads: int
) -> Iterator[Speed]:
    """All models at every batch size, in turns within one process: first the files, then torch, `seconds` each.

    Raises: PantherError when a file does not agree with its model.
    """
    inputs = {size: batch_of(recipe.example_inputs, size) for size in batches}
    models = {"dense": recipe.model, **{search: result.model for search, result in results.items()}}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: exported(models[name], Path(folder) / f"{name}.onnx", recipe, inputs) for name in models}
        for name, of in ROUNDED.items() if results else ():
            file = exported(models[of], Path(folder) / f"{name}.onnx", recipe, inputs, round_inputs=True)
            if file.rounding:  # convolutions stay as they are
                files[name] = file
        paths = {name: file.path for name, file in files.items()} | {DYNAMIC: Path(folder) / "dynamic.onnx"}
        dynamic_int8(paths["dense"], paths[DYNAMIC])
        sessions = {name: session(path, threads) for name, path in paths.items()}
        for size, given in inputs.items():
            say(f"{recipe.name}: batch {size}")
            onnx_ms = _milliseconds({name: file_run(s, recipe.model, given) for name, s in sessions.items()}, seconds)
            torch_ms = _torch_milliseconds(models, given, seconds)
            yield Speed(recipe.name, DYNAMIC, size, 1.0, (onnx_ms["dense"], onnx_ms[DYNAMIC]), None, None)
            for name in (*results, *(name for name in ROUNDED if name in files)):
                result = results[ROUNDED.get(name, name)]
                yield Speed(
                    recipe.name,
                    name,
                    size,
                    result.report.dense.flops / result.report.compressed.flops,
                    (onnx_ms["dense"], onnx_ms[name]),
                    (torch_ms["dense"], torch_ms[name]) if name in torch_ms else None,
                    files[name].rounding or max(check.max_rel for check in files[name].checks),
                )


def dynamic_int8(path: Path, target: Path) -> None:
    """Write what onnxruntime makes of a file by itself: weights in int8, inputs rounded while it runs."""
    from onnxruntime.quantization import quantize_dynamic

    logging.getLogger().setLevel(logging.ERROR)  # it asks for a preprocessing that changes nothing here
    quantize_dynamic(path, target)


def batch_of(example: Any, size: int) -> Any:
    """The example inputs with `size` samples: its own again and again."""
    if isinstance(example, Tensor):
        return example[torch.arange(size) % len(example)]
    return {name: batch_of(tensor, size) for name, tensor in example.items()}


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """A file ready to run on the CPU."""
    return onnxruntime.InferenceSession(str(path), session_options(threads), providers=["CPUExecutionProvider"])


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """One operator after the other, each with `threads` threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # Else the threads of the model that has just run keep a core busy while another one is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    _share_memory()
    options.add_session_config_entry("session.use_env_allocators", "1")
    return options


@functools.cache
def _share_memory() -> None:
    """One pool for all sessions that grows by what is asked for: each by itself keeps up to twice what a run took."""
    pool = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    as_requested = onnxruntime.OrtArenaCfg({"arena_extend_strategy": 1})
    onnxruntime.create_and_register_allocator(pool, as_requested)


def exported(model: nn.Module, path: Path, recipe: Recipe, inputs: Mapping[int, Any], **options: Any) -> ExportReport:
    report = WRITERS["onnx"](model, path, recipe.example_inputs, batches=list(inputs.values()), **options)
    if not report.ok:
        raise PantherError(f"the file differs from the model, so that its speed means nothing:\n{report}")
    return report


def file_run(of: onnxruntime.InferenceSession, model: nn.Module, given: Any) -> Callable[[], object]:
    flat = flatten(model, given, device_of(model))
    used = {value.name for value in of.get_inputs()}
    fed = {name: tensor.numpy() for name, tensor in zip(flat.names, flat.tensors, strict=True) if name in used}
    return functools.partial(of.run, None, fed)


def _torch_milliseconds(models: Mapping[str, nn.Module], given: Any, seconds: float) -> dict[str, float]:
    with contextlib.ExitStack() as stack:
        for model in models.values():
            stack.enter_context(inference(model))
        call = as_call(given)
        return _milliseconds({name: functools.partial(run, model, call) for name, model in models.items()}, seconds)


def _milliseconds(runs: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    medians = medians_in_turn(list(runs.values()), seconds=seconds)
    return {name: 1e3 * median for name, median in zip(runs, medians, strict=True)}


def report(recipes: Sequence[Recipe], found: Sequence[Speed], keep: float, seed: int, threads: int) -> str:
    """Header and table: all that this script prints."""
    sizes = "; ".join(f"{recipe.name} {_sample(recipe.example_inputs)}" for recipe in recipes)
    what = [
        f"keep {keep}; medians of runs in turns, {threads} threads in both runtimes; ratio: dense / compressed",
        f"one sample: {sizes}",
        "FLOPs: of the Linear and Conv layers",
        "difference: to the compressed model in torch, of the largest output; with rounded inputs its root mean square",
    ]
    return "\n".join([header(recipes, what, seed), "", table(COLUMNS, [speed.cells() for speed in found])])


def _sample(example: Any) -> str:
    tensors = [example] if isinstance(example, Tensor) else list(example.values())
    return " x ".join(map(str, tensors[0].shape[1:]))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.onnx_speed", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=["minilm", "crepe"], default=["minilm", "crepe"])
    parser.add_argument("--text", choices=sorted(minilm.SOURCES), default="brown", help="calibration text of MiniLM")
    parser.add_argument("--calibration", type=int, default=512, help="texts and frames (512)")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the weights (0.5)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30.0, help="for each model, batch size and runtime (30)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    try:
        recipes = [_recipe(name, given.text, given.calibration, given.seed) for name in given.models]
        found = [
            speed
            for name, recipe in zip(given.models, recipes, strict=True)
            for speed in speeds(
                recipe,
                compress(recipe, given.keep, given.seed, exclude=EXCLUDED[name]),
                given.batches,
                given.seconds,
                given.threads,
            )
        ]
    except (MissingDataError, PantherError, ValueError) as error:
        print(f"onnx_speed: {error}", file=sys.stderr)
        return 1
    print(report(recipes, found, given.keep, given.seed, given.threads))
    return 0


def _recipe(name: str, text: str, calibration: int, seed: int) -> Recipe:
    """With as little to check as a recipe allows: only speed is measured here."""
    if name == "crepe":
        return crepe.build(calibration, count=1)
    return minilm.build(text, calibration, minilm.NEIGHBOURS + 1, seed=seed)


if __name__ == "__main__":
    sys.exit(main())
