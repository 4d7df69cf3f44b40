"""An ONNX file of standard operators, checked beside the model in onnxruntime before its path is given out."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import math
import re
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from panther.batches import device_of, inference
from panther.converters import onnx_quantised
from panther.converters.files import staging
from panther.converters.inputs import (
    Axes,
    Inputs,
    dynamic_axes,
    flatten,
    is_token_like,
    named_outputs,
    only,
    other_sizes,
    resized,
    sizes,
    unique,
)
from panther.converters.parity import MOST_ROUNDED, ExportReport, ShapeCheck, difference, relative_rms, tolerance_for
from panther.errors import ExportError
from panther.nn import QuantisedPivotedLinear, SKPivotedLinear
from panther.nn.surgery import with_layers
from panther.spec import Grid

# The oldest opset that torch's exporter writes.
MIN_OPSET = 18

# Protocol buffers end at 2 GiB; above this the weights go into a file beside the model.
EXTERNAL_DATA_BYTES = 1_500_000_000

# Of an onnxruntime session: without it DequantizeLinear before a product becomes a product of eight-bit inputs.
EXACT = ("session.disable_quant_qdq", "1")

_STANDARD_DOMAINS = ("", "ai.onnx")

# What torch says of its own insides, and nothing that a user could act on. nn.LSTM causes the second; should another
# module's attribute matter, the comparison with the model shows it.
_CHATTER = (r"`isinstance\(treespec, LeafSpec\)` is deprecated", r"The tensor attributes? .* assigned during export")
_CHATTING_LOGGERS = ("torch.onnx", "torch.fx.experimental.symbolic_shapes", "onnxscript", "onnx_ir")


@dataclass(frozen=True)
class _Exported:
    program: Any  # torch.onnx.ONNXProgram
    axes: tuple[dict[int, str], ...]
    notes: tuple[str, ...]


def write(
    model: nn.Module,
    path: Path | str,
    example_inputs: Any,
    *,
    opset: int | None = None,
    batches: Iterable[Any] = (),
    verify: bool = True,
    tolerance: float | None = None,
    external_data_above: int = EXTERNAL_DATA_BYTES,
    keep_pivots: bool = False,
    round_inputs: bool = False,
    dynamic_axes: Mapping[str, Axes] | None = None,
) -> ExportReport:
    """Export a model to ONNX; the report's `path` is the file.

    The model is exported in eval mode and its training flags are put back. Batch and sequence sizes are dynamic where
    the model allows it (the report says so), outputs carry the names of the model's own, and the file is run beside
    the model at the example's and at other sizes, and on `batches` (inputs like the example's). When they differ by
    more than `tolerance` (a share of each output's largest value), the report says ok=False and the file is named
    *.failed.onnx.

    keep_pivots: also pivoted linear layers that gather their features are written as they are stored, not as products
        of the same numbers. The file is smaller for it, and slower: onnxruntime gathers along the last axis one number
        at a time. On MiniLM at keep 0.5 such a file runs at 0.7 to 1.0 times the dense model's speed, and one without
        at 1.15 to 1.4 times.
    round_inputs: linear layers of 8 bits also round what they are given to 8 bits, on a scale of the whole tensor that
        is found as it comes, and multiply whole numbers: the fastest that onnxruntime does on a processor with VNNI or
        its like. Pivoted ones are rounded anew for that, unless keep_pivots. The file as it is without is held to the
        tolerance first; the report's `rounding` is what comes on top, and above MOST_ROUNDED it says ok=False. On x86
        without VNNI onnxruntime sums such products in pairs of 16 bits, which may overflow: check there.
    dynamic_axes: which sizes of an input may vary, and what they are called: {"audio": {0: "batch", 2: "time"}}. Those
        of inputs that it does not name are found as ever.

    Raises: ExportError when the model cannot be exported to standard operators, or not with the dynamic_axes asked for,
        or onnxruntime refuses the file. ValueError for an opset that does not exist, and for dynamic_axes that do not
        fit the inputs.
    """
    path, started, batches = Path(path), time.perf_counter(), list(batches)
    check_ready(opset, verify=verify)
    with inference(model), _without_cache(model), _quiet():
        inputs = flatten(model, example_inputs, device_of(model))
        outputs = _run_model(model, inputs)
        as_stored = _for_rounded_inputs(model) if round_inputs and not keep_pivots else model
        written_as = as_stored if keep_pivots else _without_gathers(as_stored)
        gathers = written_as is not as_stored
        written_as, stored = onnx_quantised.with_floats(written_as)
        exported = _export(
            written_as, inputs, tuple(outputs), opset or onnx_quantised.least_opset(stored), dynamic_axes or {}
        )
        notes = [*_built_in(inputs), *exported.notes, *onnx_quantised.put_numbers(exported.program, stored)]
        if as_stored is not model:
            notes.append(
                "pivoted layers of 8 bits are written as two products that were rounded anew, such that what comes "
                "between can be rounded as well"
            )
        if gathers:
            notes.append("pivoted layers that gather are written as two products, or dense: faster (keep_pivots=False)")
        with staging(path.parent, str(path)) as stage:
            file = _save(exported.program, stage / path.name, external_data_above)
            found_opset = _check_file(file, opset)
            limit = tolerance_for([*model.parameters(), *outputs.values()]) if tolerance is None else tolerance
            checks: list[ShapeCheck] = []
            if verify:
                checks, skipped = _parity(
                    as_stored, file, inputs, exported.axes, batches, limit, has_numbers=bool(stored)
                )
                notes += skipped
            else:
                notes.append("the file was not run beside the model (verify=False)")
            ok, rounding = all(check.ok for check in checks), None
            if ok and round_inputs:
                products, weights = onnx_quantised.round_inputs(exported.program)
                notes += _rounding_notes(products, len(stored) - weights)
                if products:
                    file = _save(exported.program, stage / path.name, external_data_above)
                    _check_file(file, opset)
                if verify and (products or as_stored is not model):
                    rounding = _rounding(model, file, inputs, exported.axes, batches)
                    ok = rounding <= MOST_ROUNDED
            if not ok:
                file = _save(exported.program, stage / f"{path.stem}.failed{path.suffix}", external_data_above)
            size_bytes, external_data, written = _publish(file, path.parent)
    return ExportReport(
        path=written,
        size_bytes=size_bytes,
        external_data=external_data,
        opset=found_opset,
        dynamic=tuple(sizes(inputs, exported.axes)),
        checks=tuple(checks),
        tolerance=limit,
        ok=ok,
        rounding=rounding,
        standard_ops=True,  # _check_file raises otherwise
        seconds=time.perf_counter() - started,
        notes=tuple(notes),
    )


class _Flat(nn.Module):
    """The model as a function of tensors that returns tensors, which is all that ONNX knows."""

    def __init__(self, model: nn.Module, inputs: Inputs, axes: Sequence[Axes]) -> None:
        super().__init__()
        self.model = model
        self._inputs = inputs
        self._axes = axes
        self.training = False  # not by eval(): that the submodules are in eval mode is `inference`'s work

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        # A batch is one size, also where the model only reads as many rows of a mask as there are of tokens.
        batches = [tensor.shape[0] for tensor, one in zip(tensors, self._axes, strict=True) if one.get(0) == "batch"]
        for size in batches[1:]:
            torch._check(size == batches[0])
        args, kwargs = self._inputs.call(tensors)
        return tuple(named_outputs(self.model(*args, **kwargs)).values())


def _without_gathers(model: nn.Module) -> nn.Module:
    """The model with the pivoted linear layers that gather as products; the model itself where there are none."""
    gathering = {n: m for n, m in model.named_modules() if isinstance(m, SKPivotedLinear) and m.gathers}
    products = {name: layer.to_products() for name, layer in gathering.items()}
    products = {name: new for name, new in products.items() if new is not gathering[name]}
    return with_layers(model, products) if products else model


def _for_rounded_inputs(model: nn.Module) -> nn.Module:
    """The model with the pivoted layers of 8 bits as such that bear it; the model itself where there are none."""
    layers = {
        name: layer.for_rounded_inputs()
        for name, layer in model.named_modules()
        if isinstance(layer, QuantisedPivotedLinear)
        and layer.grid == Grid(8)
        and layer.stored[0].scales.dtype == torch.float32
    }
    return with_layers(model, layers) if layers else model


def _run_model(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    args, kwargs = inputs.call([tensor.clone() for tensor in inputs.tensors])  # a model may change them in place
    outputs = named_outputs(model(*args, **kwargs))
    if not outputs:
        raise ExportError(
            f"{type(model).__name__} returns no tensor for the example inputs: there is nothing to export"
        )
    return outputs


def _built_in(inputs: Inputs) -> list[str]:
    listed = ", ".join(map(repr, inputs.constants))
    return [f"arguments that are not tensors are built into the file: {listed[:200]}"] if listed else []


def _export(
    model: nn.Module, inputs: Inputs, outputs: Sequence[str], opset: int | None, asked: Mapping[str, Axes]
) -> _Exported:
    """The ONNX program with as many dynamic sizes as the exporter can follow.

    Raises: ExportError when it cannot even follow the example's own sizes, and those that were asked for.
    """
    axes = dynamic_axes(inputs, asked)
    labels = frozenset(sizes(inputs, axes))
    least = frozenset(label for one in asked.values() for label in one.values())
    failures: dict[str, str] = {}  # by reason, so that the same one is told once
    for wanted in dict.fromkeys((labels, labels & (least | {"batch"}), least)):
        attempt = only(axes, wanted)
        try:
            program, named = _program(model, inputs, attempt, outputs, opset, frozenset(asked))
        except Exception as error:  # tracing runs the user's code; each failure is told with its reason
            failures.setdefault(_reason(error), f"dynamic {', '.join(sorted(wanted))}" if wanted else "fixed sizes")
            continue
        notes = _fixed_notes(inputs, axes, wanted)
        return _Exported(program, named, (*notes, *(f"no {when}: {reason}" for reason, when in failures.items())))
    reasons = "; ".join(f"{when}: {reason}" for reason, when in failures.items())
    raise ExportError(
        f"{type(model).__name__} cannot be exported to ONNX ({reasons}). Make what is named traceable: torch.cond for "
        "branches on values, standard torch operators."
    )


def _fixed_notes(inputs: Inputs, axes: Sequence[Axes], dynamic: frozenset[str]) -> list[str]:
    present = sizes(inputs, axes)
    notes = [f"{label} is fixed to {size}" for label, size in present.items() if label not in dynamic]
    if "batch" not in present:
        notes.append("batch is fixed: the inputs have no first dimension in common")
    return notes


def _program(
    model: nn.Module,
    inputs: Inputs,
    axes: tuple[dict[int, str], ...],
    outputs: Sequence[str],
    opset: int | None,
    asked: Collection[str],
) -> tuple[Any, tuple[dict[int, str], ...]]:
    """The ONNX program for one choice of dynamic sizes, and these by the names that they have in it."""
    # A size of 1 in the example would be taken for a constant.
    traced = resized(inputs, axes, {label: max(size, 2) for label, size in sizes(inputs, axes).items()})
    # Copies, for the tracer marks the tensors it is given as dynamic, for good.
    traced = traced.with_tensors([tensor.clone() for tensor in traced.tensors])
    exported = _trace(_Flat(model, traced, axes), traced, axes, asked)
    names, results = list(inputs.names), list[str]()
    for name in outputs:
        results.append(unique(f"{name}_out", [*names, *outputs, *results]) if name in names else name)
    program = torch.onnx.export(
        exported,
        (),
        dynamo=True,
        input_names=names,
        output_names=results,
        opset_version=opset,
        verbose=False,
    )
    return program, _named_apart(program, axes)


def _trace(
    flat: nn.Module, inputs: Inputs, axes: Sequence[Axes], asked: Collection[str]
) -> torch.export.ExportedProgram:
    """The graph of a call.

    Raises: ExportError with the line of the model's code that could not be followed, where torch tells it.
    """
    dynamic = tuple(
        {dim: _dynamic(dim, is_sure=name in asked or is_token_like(name, tensor)) for dim in one}
        for name, tensor, one in zip(inputs.names, inputs.tensors, axes, strict=True)
    )
    shapes = (dynamic,) if any(dynamic) else None
    printed = io.StringIO()  # torch prints the graph so far when it fails, with the lines of code as comments
    try:
        with contextlib.redirect_stderr(printed):
            return torch.export.export(flat, inputs.tensors, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        places = re.findall(r"# File: (.+)", printed.getvalue())
        if not places:
            raise
        raise ExportError(f"{places[-1]}: {_reason(error)}") from None


def _dynamic(dim: int, *, is_sure: bool) -> Any:
    """Whether a size must be dynamic, or may be: a length that is only as large as that of the tokens."""
    return torch.export.Dim.DYNAMIC if is_sure or dim == 0 else torch.export.Dim.AUTO


def _named_apart(program: Any, axes: Sequence[Axes]) -> tuple[dict[int, str], ...]:
    """The dynamic sizes with one name for each of the tracer's s0, s1, and the program renamed so.

    Sizes that were equal in the example may be free of each other. Under one name a runtime would take them for equal,
    and give the memory of one to the other.
    """
    names: dict[str, str] = {}
    found: list[dict[int, str]] = []
    for value in (*program.model.graph.inputs, *program.model.graph.outputs):
        for dim, size in enumerate(value.shape or ()):
            if str(getattr(size, "value", None)).isdecimal():  # torch's way to write a size that proved to be fixed
                value.shape[dim] = int(size.value)
    for value, one in zip(program.model.graph.inputs, axes, strict=True):
        symbols = {dim: getattr(value.shape[dim], "value", None) for dim in one}
        for dim, symbol in symbols.items():
            if symbol and symbol not in names:
                names[symbol] = unique(re.sub(r"_\d+$", "", one[dim]), names.values())
        found.append({dim: names[symbol] for dim, symbol in symbols.items() if symbol})
    # torch 2.10 cannot rename; the names are for readers only.
    if names and hasattr(program, "rename_axes"):
        program.rename_axes(names)
    return tuple(found)


def _save(program: Any, file: Path, external_data_above: int) -> Path:
    total = sum(
        value.const_value.nbytes for value in program.model.graph.initializers.values() if value.const_value is not None
    )
    program.save(str(file), external_data=total > external_data_above)
    return file


def _check_file(file: Path, opset: int | None) -> int:
    """The opset of a file that is valid and holds standard operators only.

    Raises: ExportError otherwise.
    """
    onnx = importlib.import_module("onnx")
    proto = onnx.load(str(file), load_external_data=False)
    foreign = foreign_operators(proto)
    if foreign:
        raise ExportError(
            f"the exported graph has operators that are not standard ONNX: {', '.join(foreign)}. No other runtime "
            "would run it; express them by standard torch operators."
        )
    try:
        onnx.checker.check_model(str(file), full_check=True)
    except Exception as error:  # the checker has several error types, none of them stable API
        halves = any(tensor.data_type == onnx.TensorProto.BFLOAT16 for tensor in proto.graph.initializer)
        advice = "Export model.float(): many operators take no bfloat16" if halves else "Try another opset"
        raise ExportError(f"the exported file is not valid ONNX: {_reason(error)}. {advice}.") from error
    found = next(entry.version for entry in proto.opset_import if entry.domain in _STANDARD_DOMAINS)
    if opset is not None and found != opset:
        raise ExportError(
            f"the exporter could write opset {found} only, not {opset}: leave opset out, or ask for another"
        )
    return int(found)


def foreign_operators(proto: Any) -> tuple[str, ...]:
    """Every operator of an ONNX model outside the standard domain, subgraphs and functions included."""
    found = {
        f"{node.domain}::{node.op_type}"
        for nodes in (proto.graph.node, *(function.node for function in proto.functions))
        for node in _all_nodes(nodes)
        if node.domain not in _STANDARD_DOMAINS
    }
    return tuple(sorted(found))


def _all_nodes(nodes: Iterable[Any]) -> Iterator[Any]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _all_nodes(graph.node)


def _parity(
    model: nn.Module,
    file: Path,
    inputs: Inputs,
    axes: Sequence[Axes],
    batches: Iterable[Any],
    tolerance: float,
    *,
    has_numbers: bool,
) -> tuple[list[ShapeCheck], list[str]]:
    """The file beside the model at the example's and other sizes and on the batches; then what was not checked.

    has_numbers: the file holds quantised weights.
    """
    session = _session(file, exact=True)
    usual = _session(file, exact=False) if has_numbers else session
    checks: list[ShapeCheck] = []
    skipped: list[str] = []
    rounded = 0.0
    for what, case in _cases(model, inputs, axes, batches, skipped):
        try:
            expected = _run_model(model, case)
        except Exception as error:  # the user's model: that it refuses a size is no fault of the file
            skipped.append(f"{what} not checked, as the model itself refuses them: {_reason(error)}")
            continue
        checks.append(_check(session, case, expected, tolerance))
        if has_numbers and checks[-1].ok and not rounded:
            rounded = max(rounded, _check(usual, case, expected, math.inf).max_rel)
    if rounded > tolerance:
        skipped.append(
            "onnxruntime by itself also rounds what goes into quantised layers, which is faster: its answers differ by "
            f"up to {rounded:.1e} of the largest then, and by no more than the tolerance with the session option "
            f"{EXACT[0]}={EXACT[1]}, as checked here"
        )
    return checks, skipped


def _cases(
    model: nn.Module, inputs: Inputs, axes: Sequence[Axes], batches: Iterable[Any], skipped: list[str]
) -> list[tuple[str, Inputs]]:
    """What a file is run on: the example's and other sizes, and those batches that it takes; the others are told."""
    cases = [(f"sizes {wanted}", resized(inputs, axes, wanted)) for wanted in other_sizes(sizes(inputs, axes))]
    for index, batch in enumerate(batches):
        case = flatten(model, batch, device_of(model))
        if case.names != inputs.names:
            raise ValueError(f"batches[{index}] has the inputs {case.names}, the example inputs are {inputs.names}")
        if _fits(case, inputs, axes):
            cases.append((f"batches[{index}]", case))
        else:
            skipped.append(f"batches[{index}] was not checked: its sizes {case.shapes} are not those the file takes")
    return cases


def _rounding(model: nn.Module, file: Path, inputs: Inputs, axes: Sequence[Axes], batches: Iterable[Any]) -> float:
    """The largest root mean square of the differences to the model, as a share of that of the output."""
    session, found = _session(file, exact=True), list[float]()
    for _, case in _cases(model, inputs, axes, batches, []):
        expected: Mapping[str, Tensor] = {}
        with contextlib.suppress(Exception):  # where the model itself refuses a size, which the checks have told
            expected = _run_model(model, case)
        if not expected:
            continue
        try:
            answers = _answers(session, case)
        except Exception:  # onnxruntime's error types are not public
            return math.inf
        found.extend(relative_rms(got, wanted.cpu()) for got, wanted in zip(answers, expected.values(), strict=True))
    return max(found, default=math.inf)


def _rounding_notes(products: int, left: int) -> list[str]:
    if not products:
        wanted = "a linear layer of 8 bits, with one float32 scale a row (dtypes=('int8',), or --int8)"
        return [f"round_inputs changed nothing: it is for {wanted}"]
    if not left:
        return []
    kinds = "blocks, 4 bits, half scales, bfloat16, convolutions"
    return [f"{left} quantised weights are read as before by some or all: {kinds}"]


def _fits(case: Inputs, inputs: Inputs, axes: Sequence[Axes]) -> bool:
    return all(
        got.dim() == wanted.dim()
        and all(got.shape[dim] == wanted.shape[dim] for dim in range(wanted.dim()) if dim not in one)
        for got, wanted, one in zip(case.tensors, inputs.tensors, axes, strict=True)
    )


def _session(file: Path, *, exact: bool) -> Any:
    """exact: in the arithmetic that the file's operators ask for, and not with inputs rounded to eight bits."""
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = torch.get_num_threads()
    if exact:
        options.add_session_config_entry(*EXACT)
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's error types are not public
        raise ExportError(
            f"onnxruntime {onnxruntime.__version__} cannot load the exported file: {_reason(error)}. Try another "
            "opset, or export model.float(): half-precision kernels are often missing on the CPU."
        ) from error


def _check(session: Any, case: Inputs, expected: Mapping[str, Tensor], tolerance: float) -> ShapeCheck:
    try:
        got = _answers(session, case)
    except TypeError as error:
        raise ExportError(
            f"the file cannot be checked: {_reason(error)}. onnxruntime takes no such type from Python; export "
            "model.float(), or pass verify=False."
        ) from error
    except Exception as error:  # as in _session
        return ShapeCheck(case.shapes, float("inf"), float("inf"), False, f"onnxruntime failed: {_reason(error)}")
    pairs = [difference(a, b.cpu()) for a, b in zip(got, expected.values(), strict=True)]
    max_abs, max_rel = max(pair[0] for pair in pairs), max(pair[1] for pair in pairs)
    return ShapeCheck(case.shapes, max_abs, max_rel, max_rel <= tolerance)


def _answers(session: Any, case: Inputs) -> list[Tensor]:
    used = {value.name for value in session.get_inputs()}  # the exporter may drop an input that changes nothing
    fed = {n: t.cpu().numpy() for n, t in zip(case.names, case.tensors, strict=True) if n in used}
    return [torch.as_tensor(array) for array in session.run(None, fed)]


def _publish(file: Path, folder: Path) -> tuple[int, Path | None, Path]:
    """Move a file and its external data out of the staging folder; their size and where they are now."""
    data = file.with_name(file.name + ".data")
    size_bytes, external_data = file.stat().st_size, None
    if data.exists():
        size_bytes += data.stat().st_size
        external_data = folder / data.name
        data.replace(external_data)
    file.replace(folder / file.name)
    return size_bytes, external_data, folder / file.name


def check_ready(opset: int | None, *, verify: bool = True) -> None:
    """That a file can be written here at all, for whoever works long before.

    Raises: ExportError for a package that is missing, ValueError for an opset that does not exist.
    """
    _require("onnx", "onnxscript", *(["onnxruntime"] if verify else []))
    _check_opset(opset)


def _require(*packages: str) -> None:
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ExportError(f"exporting to ONNX needs the package {package}: pip install {package}") from error


def _check_opset(opset: int | None) -> None:
    newest = importlib.import_module("onnx").defs.onnx_opset_version()
    if opset is not None and (isinstance(opset, bool) or not MIN_OPSET <= opset <= newest):
        raise ValueError(f"opset={opset!r}: expected an integer from {MIN_OPSET} to {newest} (or None for torch's own)")


def _reason(error: BaseException) -> str:
    """What the innermost cause says, on one line and cut to its first sentences."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(".")


@contextlib.contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """A Hugging Face decoder without its key/value cache, which is no tensor and is not wanted in the file."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if getattr(config, "use_cache", None) is True}
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on its own insides."""
    levels = {name: logging.getLogger(name).level for name in _CHATTING_LOGGERS}
    with warnings.catch_warnings():
        for message in _CHATTER:
            warnings.filterwarnings("ignore", message=message)
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


__all__ = ["EXTERNAL_DATA_BYTES", "ExportReport", "check_ready", "foreign_operators", "write"]
