"""What other tools make of a model's weights in few bits: torchao, and onnxruntime's own quantisers.

`cells` measures each where it runs, and says why it does not where it does not.
"""

from __future__ import annotations

import copy
import importlib
import logging
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import say
from benchmarks.peers.base import CannotError
from models.recipe import Recipe
from panther.batches import as_call
from panther.converters import WRITERS
from panther.spec import Capture

REQUIREMENT = "torchao==0.18.0"
Cell = tuple[str, float, dict[str, float], str]  # as in benchmarks.bytes
NOTHING: dict[str, float] = {}


class OnnxModel(nn.Module):
    """An ONNX file in the place of the model that it was exported from: same arguments, a tuple of outputs."""

    def __init__(self, path: Path, like: nn.Module) -> None:
        super().__init__()
        onnxruntime = importlib.import_module("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = [value.name for value in self.session.get_inputs()]
        self.device_of = nn.Parameter(next(like.parameters()).detach()[:0].clone(), requires_grad=False)
        self.is_single = len(self.session.get_outputs()) == 1

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        found = self.session.run(None, {name: given[name].numpy() for name in self.names})
        outputs = tuple(torch.as_tensor(array) for array in found)
        return outputs[0] if self.is_single else outputs


def cells(recipe: Recipe, found: Capture, *, loops: bool) -> Iterator[Cell]:
    """The rows of all tools; the share of a row that could not be measured is NaN.

    loops: the figures call parts of the model by themselves (a decoder that is fed its own words), which no single
    ONNX file stands for.
    """
    tools: dict[str, Callable[[], tuple[nn.Module, float]]] = {
        f"{REQUIREMENT}, int8 weights": lambda: torchao(recipe, found, 8),
        f"{REQUIREMENT}, int4 weights, a scale for 32": lambda: torchao(recipe, found, 4),
    }
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tools["onnxruntime, dynamic int8"] = lambda: _onnx(recipe, found, place, dynamic_int8, loops=loops)
        tools["onnxruntime, int4 blocks of 32"] = lambda: _onnx(recipe, found, place, blocked_int4, loops=loops)
        for label, make in tools.items():
            say(f"{recipe.name}: {label}")
            try:
                model, share = make()
                yield label, share, recipe.metrics(model), ""
            except CannotError as reason:
                yield label, math.nan, NOTHING, str(reason)


def torchao(recipe: Recipe, found: Capture, bits: int) -> tuple[nn.Module, float]:
    """The model after torchao's own call, and the bytes of its weights as torchao holds them."""
    if any(spec.kernel_size for spec in found.sketchable):
        raise CannotError("torchao quantises linear layers only")
    try:
        tool = importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise CannotError(f"not here: pip install --no-deps {REQUIREMENT} ({error})") from error
    config = (
        tool.Int8WeightOnlyConfig(version=2)
        if bits == 8
        else tool.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=tool.PerGroup(32))
    )
    model, names = copy.deepcopy(recipe.model), {spec.name for spec in found.sketchable}
    tool.quantize_(model, config, filter_fn=lambda _module, name: name in names)
    held = sum(_bytes(model.get_submodule(name).weight) for name in names)
    return model, held / sum(4 * spec.params for spec in found.sketchable)


def _bytes(tensor: Any) -> int:
    """Of a tensor, or of the parts that a subclass of torchao keeps."""
    parts = getattr(tensor, "__tensor_flatten__", None)
    if parts is None:
        return int(tensor.numel() * tensor.element_size())
    return sum(_bytes(getattr(tensor, name)) for name in parts()[0] if getattr(tensor, name) is not None)


def dynamic_int8(path: Path, target: Path) -> None:
    """Every matrix in int8 with a scale a column; inputs are rounded while the file runs."""
    quantize = importlib.import_module("onnxruntime.quantization")
    logging.getLogger().setLevel(logging.ERROR)  # it asks for a preprocessing that changes nothing here
    layers = ["MatMul", "Gemm", "Conv"]  # embeddings are not what is compared here
    quantize.quantize_dynamic(path, target, per_channel=True, op_types_to_quantize=layers)


def blocked_int4(path: Path, target: Path) -> None:
    """Every matrix of a MatMul in int4 with a scale for 32 numbers."""
    quantizer = importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    onnx = importlib.import_module("onnx")
    logging.getLogger().setLevel(logging.ERROR)
    made = quantizer.MatMulNBitsQuantizer(onnx.load(path), block_size=32, is_symmetric=True)
    made.process()
    made.model.save_model_to_file(str(target))


def _onnx(
    recipe: Recipe, found: Capture, folder: Path, tool: Callable[[Path, Path], None], *, loops: bool
) -> tuple[nn.Module, float]:
    """The exported model after a tool, and the bytes that its file has less, of those of the weights."""
    if loops:
        raise CannotError("the figure needs a decoding loop, which is no single file")
    dense, target = folder / "dense.onnx", folder / f"{tool.__name__}.onnx"
    if not dense.exists():
        report = WRITERS["onnx"](recipe.model, dense, _as_arguments(recipe.example_inputs), verify=False)
        dense = Path(report.path)
    try:
        tool(dense, target)
        model = OnnxModel(target, recipe.model)
    except Exception as error:  # the tools raise anything
        raise CannotError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    whole = sum(4 * spec.params for spec in found.sketchable)
    saved = dense.stat().st_size - target.stat().st_size
    if saved < 0.01 * whole:
        raise CannotError("it changes no layer of this model")
    return model, 1 - saved / whole


def _as_arguments(example: Any) -> Any:
    """As panther.compress takes them: positional or by name."""
    call = as_call(example)
    return call.args or dict(call.kwargs)


__all__ = ["REQUIREMENT", "Cell", "OnnxModel", "cells"]
