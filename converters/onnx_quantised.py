"""Quantised layers in an ONNX file: whole numbers, with DequantizeLinear before the product that reads them.

The model is exported with the float weights that its numbers stand for; afterwards each of these in the file is put
back as numbers and scales. Eight bits are int8. Four bits are int4, and groups of numbers are blocks, from opset 21 on.
bfloat16 has a Cast in place of DequantizeLinear. `round_inputs` makes products of whole numbers of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from panther import chains
from panther.nn import IN_WHOLE_NUMBERS, SKETCHED, QuantisedLayer, QuantisedPivotedLayer
from panther.nn.on_grid import CorrectedLinear
from panther.nn.quantised import StoredWeight
from panther.nn.surgery import with_layers
from panther.ops import unpacked_int4
from panther.spec import BITS, Grid

BLOCKS_FROM = 21  # the opset that has int4 and blocks
HALF_SCALES_FROM = 19
CAST_FROM = 13  # bfloat16
MOST_SUMMED = 65_536  # products of 255 and 127 that a sum of 32 bits holds
MODEL = "model"  # what the exported program calls the model: its only attribute

Parts = Mapping[str, StoredWeight]  # by the name of the float parameter that stands for it


def with_floats(model: nn.Module) -> tuple[nn.Module, Parts]:
    """The model with float layers in place of quantised ones, and how each of their weights is stored.

    The model itself where it has none.
    """
    quantised = {name: layer for name, layer in model.named_modules() if isinstance(layer, IN_WHOLE_NUMBERS)}
    if not quantised:
        return model, {}
    layers = {name: _as_floats(layer) for name, layer in quantised.items()}
    parts = {
        f"{name}.{parameter}" if name else parameter: part
        for name, layer in quantised.items()
        for parameter, part in zip(_parameters(layer), layer.stored, strict=True)
    }
    return (layers[""] if "" in layers else with_layers(model, layers)), parts


def _parameters(layer: QuantisedLayer | QuantisedPivotedLayer) -> tuple[str, ...]:
    """What the stored weights of a layer are called in its float form."""
    if isinstance(layer, QuantisedPivotedLayer):
        return layer.stored_names
    return tuple("weight" if name == "whole" else name for name in layer._weight_names)


def _as_floats(layer: QuantisedLayer | QuantisedPivotedLayer) -> nn.Module:
    if isinstance(layer, QuantisedPivotedLayer):
        return layer.to_pivoted()
    dense, weights = layer.to_dense(), layer.active_weights()
    if layer.scheme == chains.WHOLE:
        return dense
    if layer.scheme == chains.CORRECTED and isinstance(dense, nn.Linear):
        dense.weight.data.copy_(weights[0])
        return CorrectedLinear(dense, *weights[1:])
    sketch = SKETCHED[layer.DENSE].from_factors(dense, layer.scheme, weights, layer.bias, low_rank=layer.low_rank)
    return sketch.train(layer.training)


def least_opset(parts: Parts) -> int | None:
    """The opset from which these weights can be written as they are stored; None where any will do."""
    needs = any(part.grid.bits < 8 or part.grid.group_size is not None for part in parts.values())
    return BLOCKS_FROM if needs else None


@dataclass(frozen=True)
class _Numbers:
    """A weight as ONNX holds it: whole numbers, scales, and along which axis these differ.

    Or bfloat16, without scales, or with such as broadcast to it.
    """

    values: np.ndarray[Any, Any]
    scales: np.ndarray[Any, Any]
    axis: int
    block: int | None
    shape: tuple[int, ...]  # that the reader wants

    @property
    def is_bfloat16(self) -> bool:
        return bool(self.values.dtype.name == "bfloat16")

    @property
    def transposed(self) -> _Numbers:
        """Of a matrix."""
        shape = self.shape[::-1]
        return _Numbers(self.values.T.copy(), self.scales.T.copy(), 1 - self.axis, self.block, shape)


def put_numbers(program: Any, parts: Parts) -> list[str]:
    """Put whole numbers and scales in place of the float weights of an exported program; notes on those that stay.

    A weight is known by its numbers: the exporter may have turned it, or multiplied a batch norm into it, and gives it
    another name then. Where a batch norm is in it, the scales take that factor over.

    program: torch.onnx.ONNXProgram of the model that `with_floats` gave.
    """
    graph = program.model.graph
    opset = int(program.model.opset_imports.get("", 0))
    older: list[int] = []  # the opsets that would be needed
    doubles = lost = 0
    placed = set[int]()  # weights by their bytes: of equal ones the exporter writes one
    widened = dict.fromkeys(sorted(BITS.values(), reverse=True), 0)
    for name, part in parts.items():
        needed = _written_from(part)
        if needed is None:
            doubles += 1
        elif needed > opset:
            older.append(needed)
        elif not (_put(graph, name, part, _numbers(part, opset)) or _digest(part) in placed):
            lost += 1
        else:
            placed.add(_digest(part))
            widened[part.grid.bits] += _bits_in_file(part.grid, opset) > part.grid.bits
    reasons = {
        "ONNX has no scales of float64, use float32": doubles,
        f"opset {opset} cannot say their blocks or the type of their scales, use {max(older or [0])} or later": len(
            older
        ),
        "the exporter changed them": lost,
    }
    notes = [
        f"{count} of {len(parts)} quantised weights are float numbers in the file: {reason}"
        for reason, count in reasons.items()
        if count
    ]
    for bits, count in widened.items():
        if count and opset < BLOCKS_FROM:
            notes.append(
                f"weights of {bits} bits take 8 in the file: opset {opset} has no int4, use {BLOCKS_FROM} or later"
            )
        elif count:
            notes.append(f"weights of {bits} bits take 4 in the file: ONNX has no int{bits}")
    return notes


def _digest(part: StoredWeight) -> int:
    wanted = part.dense()
    return hash((tuple(wanted.shape), _array(wanted).tobytes()))


def _bits_in_file(grid: Grid, opset: int) -> int:
    """That a number takes."""
    return 4 if grid.bits <= 4 and opset >= BLOCKS_FROM else max(8, grid.bits)


def _written_from(part: StoredWeight) -> int | None:
    """The opset from which a weight can be whole numbers, of eight bits where need be; None: in none of them."""
    if part.grid.is_bfloat16:
        return CAST_FROM
    if part.scales.dtype == torch.float64:
        return None
    if part.grid.group_size is not None:
        return BLOCKS_FROM
    return 0 if part.scales.dtype == torch.float32 else HALF_SCALES_FROM


def _put(graph: Any, name: str, part: StoredWeight, numbers: _Numbers) -> bool:
    """Put a weight's numbers where its floats are; False where these are nowhere."""
    wanted = _array(part.dense())
    own = f"{MODEL}.{name}"
    values = sorted(graph.initializers.values(), key=lambda value: value.name != own)
    for value in values:
        tensor = value.const_value
        if tensor is None or tensor.size != wanted.size or tensor.dtype.numpy() != wanted.dtype:
            continue
        got = tensor.numpy()
        if got.shape == wanted.shape and np.array_equal(got, wanted):
            _replace(graph, value, numbers)
            return True
        if wanted.ndim == 2 and got.shape == wanted.shape[::-1] and np.array_equal(got, wanted.T):
            _replace(graph, value, numbers, is_turned=True)
            return True
        if value.name == own and got.shape == wanted.shape:
            scaled = _with_factors(numbers, wanted, got)
            if scaled is not None:
                _replace(graph, value, scaled)
                return True
    return False


def _with_factors(numbers: _Numbers, wanted: np.ndarray[Any, Any], got: np.ndarray[Any, Any]) -> _Numbers | None:
    """The numbers of a weight whose rows were each multiplied with a factor; None where something else was done."""
    rows, other = wanted.reshape(len(wanted), -1).astype(np.float64), got.reshape(len(got), -1).astype(np.float64)
    size = (rows * rows).sum(1)
    factors = np.where(size > 0, (rows * other).sum(1) / np.where(size > 0, size, 1.0), 0.0)
    if not np.allclose(rows * factors[:, None], other, rtol=1e-5, atol=1e-6 * float(np.abs(other).max(initial=0.0))):
        return None
    if numbers.is_bfloat16:
        scales = factors.reshape(-1, *(1,) * (wanted.ndim - 1)).astype(wanted.dtype)
        return _Numbers(numbers.values, scales, numbers.axis, numbers.block, numbers.shape)
    scales = numbers.scales * factors.reshape(-1, *(1,) * (numbers.scales.ndim - 1))
    return _Numbers(numbers.values, scales.astype(numbers.scales.dtype), numbers.axis, numbers.block, numbers.shape)


def _numbers(part: StoredWeight, opset: int) -> _Numbers:
    """A stored weight for ONNX, of an opset that can say it."""
    import ml_dtypes  # comes with onnx

    grid = part.grid
    if grid.is_bfloat16:
        return _Numbers(
            _array(part.values.view(torch.bfloat16)).reshape(part.size), _array(part.scales), 0, None, part.size
        )
    whole = part.values if grid.bits == 8 else unpacked_int4(part.values, part.columns)
    values, scales = _array(whole), _array(part.scales)
    if _bits_in_file(grid, opset) == 4:
        values = values.astype(ml_dtypes.int4)
    if grid.group_size is not None:
        return _Numbers(values, scales, 1, grid.group_size, part.size)
    return _Numbers(values.reshape(part.size), scales.reshape(-1), 0, None, part.size)


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    import ml_dtypes

    flat = tensor.detach().cpu().contiguous()
    if flat.dtype == torch.bfloat16:  # which NumPy has from elsewhere
        bits: np.ndarray[Any, Any] = flat.view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    array: np.ndarray[Any, Any] = flat.numpy()
    return array


def _replace(graph: Any, value: Any, numbers: _Numbers, *, is_turned: bool = False) -> None:
    """Let every reader of a float weight read whole numbers instead; a transposition in between goes.

    is_turned: the file has the transposed matrix.
    """
    made: dict[bool, Any] = {}

    def stored(*, turned: bool) -> Any:
        if turned not in made:
            made[turned] = _dequantised(graph, f"{value.name}{'.T' if turned else ''}", numbers, turned=turned)
        return made[turned]

    for node, index in list(value.uses()):
        if not is_turned and _is_turned(node, numbers):
            new = stored(turned=True)
            for reader, at in list(node.outputs[0].uses()):
                reader.replace_input_with(at, new)
            if not node.outputs[0].is_graph_output():
                graph.remove(node, safe=True)
                continue
        node.replace_input_with(index, stored(turned=is_turned))
    if not list(value.uses()) and not value.is_graph_output():
        del graph.initializers[value.name]


def round_inputs(program: Any) -> tuple[int, int]:
    """Let matrices of 8 bits be multiplied with inputs of 8 bits, each tensor rounded on a scale found as it comes.

    A product then is of whole numbers: DynamicQuantizeLinear, MatMulInteger, and a multiplication with both scales.
    Matrices in blocks or of 4 bits, and convolutions, stay as they are.

    program: as `put_numbers` leaves it. Returns how many products were changed, and how many weights are
    read by no others.
    """
    graph = program.model.graph
    rounded: dict[Any, Sequence[Any]] = {}  # by what is rounded, which several products may read
    products, weights = 0, 0
    for held in [node for node in graph if node.op_type == "DequantizeLinear"]:
        constants: dict[bool, Sequence[Any]] = {}  # by whether the matrix is turned
        for node, index in list(held.outputs[0].uses()):
            if _multiplies_int8(graph, held, node, index):
                is_turned = node.op_type == "Gemm" and bool(_attribute(node, "transB", 0))
                if is_turned not in constants:
                    constants[is_turned] = _matrix(graph, held, is_turned=is_turned)
                _multiply_whole(graph, node, constants[is_turned], rounded)
                products += 1
        if constants and not list(held.outputs[0].uses()):
            values = held.inputs[:2]
            graph.remove(held, safe=True)
            for value in values:
                if not list(value.uses()):
                    del graph.initializers[value.name]
            weights += 1
    return products, weights


def _multiplies_int8(graph: Any, held: Any, node: Any, index: int) -> bool:
    """Whether a node multiplies with a matrix in int8 with a scale an output, as its right factor."""
    values, scales = (value.const_value for value in held.inputs[:2])
    has_zero_points = len(held.inputs) > 2 and held.inputs[2] is not None
    if values is None or scales is None or has_zero_points or node.graph is not graph or index != 1:
        return False
    plain = {"transA": 0, "alpha": 1.0, "beta": 1.0}
    is_product = node.op_type == "MatMul" or (
        node.op_type == "Gemm" and all(_attribute(node, name, value) == value for name, value in plain.items())
    )
    if not is_product or values.dtype.numpy() != np.int8 or len(values.shape) != 2 or len(scales.shape) != 1:
        return False
    is_turned = node.op_type == "Gemm" and bool(_attribute(node, "transB", 0))
    features = values.shape[1 if is_turned else 0]
    is_small = scales.dtype.numpy() == np.float32 and features <= MOST_SUMMED
    return bool(is_small and _attribute(held, "axis", 1) == 1 - is_turned)


def _matrix(graph: Any, held: Any, *, is_turned: bool) -> Sequence[Any]:
    """Numbers (in, out) and scales (out) that products read, as new initializers."""
    numbers, scales = (value.const_value.numpy() for value in held.inputs[:2])
    name = f"{held.outputs[0].name}.whole{'.T' if is_turned else ''}"
    numbers = np.ascontiguousarray(numbers.T) if is_turned else numbers
    return [_constant(graph, f"{name}.{what}", part) for what, part in (("values", numbers), ("scales", scales))]


def _attribute(node: Any, name: str, default: Any) -> Any:
    found = node.attributes.get(name)
    return default if found is None else found.value


def _multiply_whole(
    graph: Any,
    node: Any,
    matrix: Sequence[Any],
    rounded: dict[Any, Sequence[Any]],
) -> None:
    """Put a product of whole numbers in place of a MatMul or Gemm."""
    import onnx_ir as ir

    given, result = node.inputs[0], node.outputs[0]
    if given not in rounded:
        rounded[given] = _rounded(graph, given)
    values, scale, zero = rounded[given]
    name = f"{result.name}.whole"
    numbers, scales = matrix
    new = [ir.node("MatMulInteger", [values, numbers, zero])]
    new.append(ir.node("Cast", [new[-1].outputs[0]], attributes={"to": int(ir.DataType.FLOAT)}))
    new.append(ir.node("Mul", [scale, scales]))
    new.append(ir.node("Mul", [new[-2].outputs[0], new[-1].outputs[0]]))
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        new.append(ir.node("Add", [new[-1].outputs[0], node.inputs[2]]))
    for place, made in enumerate(new):
        made.outputs[0].name = f"{name}.{made.op_type}.{place}"
    last = new[-1].outputs[0]
    last.shape, last.type = result.shape, result.type
    graph.insert_before(node, new)
    ir.convenience.replace_all_uses_with(result, last, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    last.name = result.name
    if result in rounded:  # a reader of it was changed before
        rounded[last] = rounded.pop(result)


def _rounded(graph: Any, given: Any) -> Sequence[Any]:
    """Whole numbers, scale and zero point of a value, computed right where it is."""
    import onnx_ir as ir

    node = ir.node("DynamicQuantizeLinear", [given], num_outputs=3)
    for output, what in zip(node.outputs, ("values", "scale", "zero"), strict=True):
        output.name = f"{given.name}.rounded.{what}"
    source = given.producer()
    if source is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(source, node)
    return node.outputs


def _is_turned(node: Any, numbers: _Numbers) -> bool:
    perm = node.attributes.get("perm")
    is_matrix = len(numbers.shape) == 2
    return bool(node.op_type == "Transpose" and is_matrix and (perm is None or list(perm.value) == [1, 0]))


def _dequantised(graph: Any, name: str, numbers: _Numbers, *, turned: bool) -> Any:
    """The value of a new DequantizeLinear node of these numbers; it depends on nothing, and comes first."""
    import onnx_ir as ir

    held = numbers.transposed if turned else numbers
    # Blocks are of a matrix: a convolution's weight is one until it has been widened.
    shape = None if numbers.block is None or len(numbers.shape) == 2 else np.array(numbers.shape, dtype=np.int64)
    given = [_constant(graph, f"{name}.values", held.values)]
    kind = ir.TensorType(ir.DataType.from_numpy(held.scales.dtype))
    if held.is_bfloat16:
        made = [ir.node("Cast", given, attributes={"to": int(kind.dtype)})]
        if held.scales.size:  # the factors of a batch norm
            made.append(ir.node("Mul", [made[0].outputs[0], _constant(graph, f"{name}.scales", held.scales)]))
    else:
        given.append(_constant(graph, f"{name}.scales", held.scales))
        block = {} if held.block is None else {"block_size": held.block}
        made = [ir.node("DequantizeLinear", given, attributes={"axis": held.axis, **block})]
    if shape is not None:
        made.append(ir.node("Reshape", [made[0].outputs[0], _constant(graph, f"{name}.size", shape)]))
    for node in made:
        node.outputs[0].name = f"{name}.{node.op_type}"
    result = made[-1].outputs[0]
    result.shape, result.type = ir.Shape(held.shape), kind
    graph.insert_before(graph[0], made)
    return result


def _constant(graph: Any, name: str, array: np.ndarray[Any, Any]) -> Any:
    """A new initializer of a graph."""
    import onnx_ir as ir

    tensor: Any = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
