"""A compressed model on disk: a folder with `model.safetensors` and `panther.json`.

panther.json says which layers are sketched and how they are shaped, which layers have fewer channels, which names share
one tensor, and the plan and the report they came from. It never names code: a layer's type is looked up in
panther.nn.LAYERS and nowhere else, and one with fewer channels is the architecture's own, cut.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from panther import __version__
from panther.batches import device_of
from panther.converters import safetensors
from panther.converters.files import read_json, staging
from panther.converters.formats import MANIFEST
from panther.converters.weights import ModelSource, check_no_meta, copy_of, dtype_name, make_model, tie, tied_names
from panther.errors import ExportError, LoadError
from panther.nn import LAYERS, SKMultiheadAttention
from panther.nn.bare import as_linear, may_be_bare
from panther.nn.narrow import DENSE_SIZES, NARROWED, NORMS, is_narrowed, narrow_config, narrowed_to, sizes_of
from panther.nn.quantised import StoredWeight, for_file
from panther.nn.surgery import inherit, put_layers
from panther.spec import Plan, Report, to_data

# 1: before numbers of three bits, and scales of two bytes in a layer of float32. 2: without UNSAVED
FORMAT = 3
WEIGHTS = "model.safetensors"

UNSAVED = "unsaved_dtypes"

# The fields of panther.json, all of them present.
FIELDS = {
    "panther_format": int,
    "panther": str,
    "torch": str,
    "model_class": str,  # for the reader's information: nothing is imported by it
    "layers": dict,
    "tied": dict,
    UNSAVED: dict,
    "plan": dict,
    "report": dict,
}

ATTENTION = SKMultiheadAttention.__name__  # the type of attention whose projections are layers
TYPES = (*LAYERS, ATTENTION)

_FLOATING = ("float64", "float32", "bfloat16", "float16")
_SIZES = ("in_features", "out_features", "in_channels", "out_channels")
_GEOMETRY = ("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "dilation")


@dataclass(frozen=True)
class Manifest:
    """What panther.json says, checked."""

    model_class: str
    layers: Mapping[str, Mapping[str, Any]]  # by name: "type", "aliases", and what the type's from_config takes
    tied: Mapping[str, str]  # a name that has no tensor of its own -> the name whose tensor it is
    unsaved_dtypes: Mapping[str, str]  # of the buffers of floating-point numbers that no file holds, by name
    plan: Mapping[str, Any]
    report: Mapping[str, Any]


def describe_layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Every sketched or narrowed layer of a model, by name: its type, its other names, its config."""
    types: dict[type[nn.Module], str] = {layer_class: name for name, layer_class in LAYERS.items()}
    types[SKMultiheadAttention] = ATTENTION
    found: dict[int, str] = {}
    layers: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in found:
            layers[found[id(module)]]["aliases"].append(name)
        elif type(module) in types:
            found[id(module)] = name
            layers[name] = {"type": types[type(module)], "aliases": [], **module.config()}
            layers[name] |= {DENSE_SIZES: list(vars(module)[DENSE_SIZES])} if is_narrowed(module) else {}
        elif is_narrowed(module):
            found[id(module)] = name
            layers[name] = {"type": NARROWED, "aliases": [], **narrow_config(module)}
    return layers


def save(model: nn.Module, folder: Path | str, *, plan: Plan, report: Report) -> Path:
    """Write a compressed model into a folder, all or nothing, and return the folder.

    Buffers are saved, tied tensors once. A folder that panther wrote is overwritten; other files in it are left alone.

    Raises: ExportError when the folder cannot be written, or holds files of these names that panther did not write.
    """
    folder = Path(folder)
    _check_overwritable(folder)
    tensors, tied = _tensors_of(model)
    manifest = {
        "panther_format": FORMAT,
        "panther": __version__,
        "torch": str(torch.__version__),
        "model_class": f"{type(model).__module__}.{type(model).__qualname__}",
        "layers": describe_layers(model),
        "tied": tied,
        UNSAVED: {name: dtype_name(buffer) for name, buffer in _unsaved(model).items()},
        "plan": json.loads(plan.to_json()),
        "report": to_data(report),
    }
    exists = folder.exists()
    with staging(folder if exists else folder.parent, f"the folder {folder}") as stage:
        whole = stage / "whole"
        whole.mkdir()
        _write_tensors(tensors, whole / WEIGHTS)
        (whole / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if exists:
            for name in (WEIGHTS, MANIFEST):
                (whole / name).replace(folder / name)
        else:
            whole.rename(folder)
    return folder


def check_can_be_saved(model: nn.Module, folder: Path) -> None:
    """That `save` will not refuse what is made of a model, for whoever works long before.

    Raises: ExportError as `save`.
    """
    _check_overwritable(folder)
    _tensors_of(model)


def load(folder: Path | str, *, model: ModelSource | None = None, trust_pickle: bool = False) -> nn.Module:
    """The compressed model in a folder that `save` wrote, in eval mode; `trust_pickle` is not needed here.

    `model` is the dense architecture: a module (it is not changed) or a function that makes one. Its layers at the
    names listed in panther.json become sketched ones, and all tensors are taken from the file, in the file's dtypes.

    Raises: LoadError when a file is damaged, asks for anything but a layer of panther.nn.LAYERS, or does not fit.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if model is None:
        raise LoadError(
            f"{folder} holds the layers and weights of {manifest.model_class}, not its code: give the dense "
            "architecture, panther.load(folder, model=factory_or_instance)"
        )
    built = _hollow_copy(model) if isinstance(model, nn.Module) else make_model(model, str(folder))
    device = device_of(model if isinstance(model, nn.Module) else built)
    built = _with_layers(built, manifest.layers, folder)
    tensors = safetensors.read_tensors(folder / WEIGHTS)
    _assign(built, tensors, manifest.tied, torch.device("cpu") if device.type == "meta" else device, folder)
    _cast_unsaved(built, manifest.unsaved_dtypes)
    check_no_meta(built)
    return built.eval()


def read_manifest(folder: Path) -> Manifest:
    """What the folder's panther.json says; its layers are checked when they are built.

    Raises: LoadError when it is missing, of a newer format, or not as `save` writes it.
    """
    path = folder / MANIFEST
    data = read_json(path)
    version = data.get("panther_format")
    if isinstance(version, int) and version > FORMAT:
        raise LoadError(f"{path} has format {version}, this panther reads up to {FORMAT}: upgrade panther-compress")
    if isinstance(version, int) and version < FORMAT:
        data.setdefault(UNSAVED, {})
    odd = sorted(set(data) ^ set(FIELDS))
    if odd:
        listed = ", ".join(repr(name[:40]) for name in odd[:5])
        raise LoadError(f"{path} was not written by panther: missing or unknown fields {listed}")
    for name, kind in FIELDS.items():
        if type(data[name]) is not kind:
            raise LoadError(f"{path}: {name} is {type(data[name]).__name__}, expected {kind.__name__}")
    for name, record in data["layers"].items():
        _check_record(path, name, record)
    if not all(isinstance(value, str) for value in data["tied"].values()):
        raise LoadError(f"{path}: 'tied' maps names to names and nothing else")
    dtypes = data[UNSAVED].values()
    if not all(isinstance(dtype, str) and dtype in _FLOATING for dtype in dtypes):
        raise LoadError(f"{path}: {UNSAVED!r} maps names to {', '.join(_FLOATING)} and nothing else")
    return Manifest(*(data[name] for name in ("model_class", "layers", "tied", UNSAVED, "plan", "report")))


def _check_record(path: Path, name: str, record: Any) -> None:
    kind = record.get("type") if isinstance(record, dict) else None
    if not isinstance(kind, str) or (kind not in TYPES and kind != NARROWED):
        raise LoadError(
            f"{path}: layer {name[:80]!r} has the type {str(kind)[:80]!r}; panther builds {', '.join(TYPES)} and "
            "imports nothing that a file names. Was it written by a newer panther, or changed?"
        )
    aliases = record.get("aliases")
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise LoadError(f"{path}: the aliases of layer {name[:80]!r} are not a list of names")


def _tensors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict with each tensor once, and which name stands for which."""
    tied = {name: names[0] for names in tied_names(model) for name in names[1:]}
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
            what = value.layout if isinstance(value, Tensor) and not value.is_meta else type(value).__name__
            raise ExportError(
                f"{name} of {type(model).__name__} is no dense tensor with values ({what}): cannot save it"
            )
        if name not in tied:
            tensors[name] = value
    return for_file(model, tensors), tied


def _unsaved(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of floating-point numbers that no state dict holds; they come with the architecture."""
    return {
        f"{place}.{name}".lstrip("."): buffer
        for place, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set and dtype_name(buffer) in _FLOATING
    }


def _cast_unsaved(model: nn.Module, dtypes: Mapping[str, str]) -> None:
    """Give such buffers the dtypes that they had beside the file's tensors, for a model may have been cast."""
    for name, buffer in _unsaved(model).items():
        place, _, own = name.rpartition(".")
        dtype = getattr(torch, dtypes.get(name, dtype_name(buffer)))
        model.get_submodule(place)._buffers[own] = buffer.to(dtype)


def _write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    own: dict[str, Tensor] = {}
    held: set[int] = set()
    for name, tensor in tensors.items():
        # The format wants one contiguous memory a tensor; views into another's memory are written out.
        storage = tensor.untyped_storage().data_ptr()
        whole = tensor.is_contiguous() and (tensor.numel() == 0 or storage not in held)
        own[name] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
        held.add(storage)
    try:
        save_file(own, path, metadata={"format": "pt"})
    except (SafetensorError, ValueError, KeyError) as error:
        raise ExportError(f"cannot write the weights: {error}. What was there before is unchanged.") from error


def _check_overwritable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder} is a file: give the name of a folder")
    if not folder.exists() or not any((folder / name).exists() for name in (WEIGHTS, MANIFEST)):
        return
    try:
        read_manifest(folder)
    except LoadError as error:
        raise ExportError(
            f"{folder} holds a {WEIGHTS} or {MANIFEST} that panther did not write, and they are not overwritten: "
            "choose another folder"
        ) from error


def _hollow_copy(model: nn.Module) -> nn.Module:
    """A copy whose saved tensors are on the meta device, so that it costs no memory before the file's are put in."""
    saved = model.state_dict(keep_vars=True).values()
    memo: dict[int, Any] = {}
    for tensor in saved:
        if isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(tensor.detach().to("meta"), requires_grad=tensor.requires_grad)
        elif isinstance(tensor, Tensor):
            memo[id(tensor)] = tensor.detach().to("meta")
    return copy_of(model, memo)


def _with_layers(model: nn.Module, records: Mapping[str, Mapping[str, Any]], folder: Path) -> nn.Module:
    """The model with the layers that records describe at their names; it is itself that layer for the name ""."""
    _open(model, records, folder)
    layers: dict[str, nn.Module] = {}
    for name, record in records.items():
        if record["type"] == ATTENTION:
            continue
        build = _narrow_layer if record["type"] == NARROWED else _sketch_layer
        layers.update(dict.fromkeys((name, *record["aliases"]), build(model, name, record, folder)))
    if "" in layers:
        inherit(layers[""], model)
        return layers[""]
    put_layers(model, layers)
    return model


def _open(model: nn.Module, records: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Put layers where the model multiplies with bare parameters and a record describes such a layer, or one in it."""
    attention = {name: record for name, record in records.items() if record["type"] == ATTENTION}
    put_layers(model, {name: _attention(model, name, record, folder) for name, record in attention.items()})
    found = {name: _layer_at(model, name, folder) for name in records if name and name not in attention}
    bare = {name: layer for name, layer in found.items() if may_be_bare(layer)}
    put_layers(model, {name: _linear(layer, records[name]) for name, layer in bare.items()})


def _attention(model: nn.Module, name: str, record: Mapping[str, Any], folder: Path) -> nn.Module:
    try:
        with torch.device("meta"):
            layer = SKMultiheadAttention.from_config(_config(record))
    except (ValueError, TypeError) as error:
        raise LoadError(f"{folder / MANIFEST}: layer {name!r} cannot be built: {error}") from error
    dense = _layer_at(model, name, folder)
    if isinstance(dense, SKMultiheadAttention):  # a user's own, or of a model that was compressed before
        sizes = layer.config()
    elif isinstance(dense, nn.MultiheadAttention) and name:
        sizes = {size: getattr(layer, size) for size in ("embed_dim", "num_heads", "kdim", "vdim", "batch_first")}
    else:
        raise LoadError(
            f"{folder / MANIFEST}: {name!r} was made of nn.MultiheadAttention, the architecture given has "
            f"{type(dense).__name__} there: give the one that was compressed"
        )
    for size, wanted in sizes.items():
        got = dense.has_bias if size == "bias" else getattr(dense, size)
        if wanted != got:
            raise LoadError(
                f"{folder / MANIFEST}: {name!r} has {size}={wanted}, the architecture given has {got}: give the one "
                "that was compressed"
            )
    if isinstance(dense, SKMultiheadAttention):
        return dense
    for parameter in layer.parameters():
        parameter.requires_grad_(any(given.requires_grad for given in dense.parameters()))
    return layer


def _linear(dense: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """A bare matrix as a Linear layer that has as many inputs as the record says; its numbers come from the file."""
    given = record.get(DENSE_SIZES, record.get("inputs"))  # inputs and outputs before, or inputs before and after
    inputs = given[0] if isinstance(given, list) and given else record.get("in_features")
    weight = dense._parameters["weight"]
    return as_linear(dense, transposed=weight is not None and weight.shape[0] == inputs)


def _sketch_layer(model: nn.Module, name: str, record: Mapping[str, Any], folder: Path) -> nn.Module:
    """The layer that a record describes, which fits the model's dense ones at its names; on the meta device.

    It takes no memory, whatever sizes the record claims, until tensors of these sizes were found in the file.
    """
    try:
        with torch.device("meta"):
            layer = LAYERS[record["type"]].from_config(_config(record))
    except (ValueError, TypeError) as error:
        raise LoadError(f"{folder / MANIFEST}: layer {name!r} cannot be built: {error}") from error
    for place in (name, *record["aliases"]):
        dense = _layer_at(model, place, folder)
        if DENSE_SIZES in record:
            _check_sizes(dense, layer, record[DENSE_SIZES], place, folder)
        else:
            _check_geometry(dense, layer, place, folder)
    _freeze_as(_layer_at(model, name, folder), layer)
    return layer


BIASES = ("bias", "offset")  # what layers call what they add


def _freeze_as(dense: nn.Module, layer: nn.Module) -> None:
    """Let a layer train what the one in its place would: the weights, and the bias."""
    given = {name: parameter.requires_grad for name, parameter in dense.named_parameters()}
    if not given:
        return
    weights = any(flag for name, flag in given.items() if name not in BIASES)
    biases = next((flag for name, flag in given.items() if name in BIASES), weights)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(biases if name in BIASES else weights)


def _narrow_layer(model: nn.Module, name: str, record: Mapping[str, Any], folder: Path) -> nn.Module:
    """The model's own layer of this name with fewer channels."""
    places = (name, *record["aliases"])
    dense = _layer_at(model, name, folder)
    try:
        layer = narrowed_to(dense, _config(record))
    except (ValueError, TypeError) as error:
        raise LoadError(f"{folder / MANIFEST}: layer {name!r} cannot be cut: {error}") from error
    if not all(_layer_at(model, place, folder) is dense for place in places) or not name:
        raise LoadError(
            f"{folder / MANIFEST}: the names {', '.join(map(repr, places))} are not of one layer in this model"
        )
    return layer


def _config(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("type", "aliases", DENSE_SIZES)}


def _layer_at(model: nn.Module, name: str, folder: Path) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise LoadError(
            f"{folder / MANIFEST} sketches {name[:80]!r}, which {type(model).__name__} does not have: give the "
            "architecture that was compressed"
        ) from error


def _check_sizes(dense: nn.Module, layer: nn.Module, sizes: Any, name: str, folder: Path) -> None:
    """Take a sketched layer of fewer channels for a dense one of these sizes, and mark it as such."""
    try:
        found = list(sizes_of(dense))
    except TypeError:
        found = []
    own = sizes_of(layer)
    if (
        not found
        or isinstance(dense, NORMS)
        or sizes != found
        or not all(0 < n <= m for n, m in zip(own, found, strict=True))
    ):
        raise LoadError(
            f"{folder / MANIFEST}: {name!r} was made of a layer of sizes {str(sizes)[:80]}, the architecture given has "
            f"{found} there: give the one that was compressed"
        )
    _check_geometry(dense, layer, name, folder, without=_SIZES)
    vars(layer)[DENSE_SIZES] = tuple(sizes)


def _check_geometry(dense: nn.Module, layer: nn.Module, name: str, folder: Path, without: Collection[str] = ()) -> None:
    for attribute in [name for name in _GEOMETRY if name not in without]:
        wanted, got = getattr(layer, attribute, None), getattr(dense, attribute, None)
        if isinstance(got, list):  # a subclass may hold its sizes in one
            got = tuple(got)
        if wanted is not None and got is not None and wanted != got:
            raise LoadError(
                f"{folder / MANIFEST}: {name!r} has {attribute}={wanted}, the architecture given has {got}: give the "
                "one that was compressed"
            )
    if not any(hasattr(dense, attribute) for attribute in _GEOMETRY):
        raise LoadError(
            f"{folder / MANIFEST} sketches {name!r}, which is a {type(dense).__name__} in this architecture"
        )


def _numbers_of(
    model: nn.Module, tensors: Mapping[str, Tensor], names: Mapping[str, str], folder: Path
) -> dict[str, Tensor]:
    """What the file has of whole numbers and their scales, as the model holds them.

    Raises: LoadError unless they are of their own types and sizes, and the scales finite and above zero.
    """
    found: dict[str, Tensor] = {}
    for place, module in model.named_modules():
        if not isinstance(module, StoredWeight):
            continue
        stored = [names[f"{place}.{part}".lstrip(".")] for part in ("values", "scales")]
        values, scales = (tensors[name] for name in stored)
        if not bool((torch.isfinite(scales) & (scales > 0)).all()):
            raise LoadError(
                f"{folder / WEIGHTS}: {place}.scales holds numbers that no scale can be: the file is damaged"
            )
        try:
            found |= dict(zip(stored, module.from_file(values, scales).values(), strict=True))
        except ValueError as error:
            raise LoadError(
                f"{folder / WEIGHTS}: {place}: {error}: give the architecture that was compressed"
            ) from error
    return found


def _assign(
    model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, str], device: torch.device, folder: Path
) -> None:
    """Make the file's tensors the model's own, once every name and shape has been checked."""
    wanted = model.state_dict()
    names = {name: tied.get(name, name) for name in wanted}
    missing = [name for name, stored in names.items() if stored not in tensors]
    unknown = sorted((set(tensors) | set(tied)) - set(names))
    if missing or unknown:
        raise LoadError(
            f"{folder / WEIGHTS} does not fit {type(model).__name__}: {len(missing)} tensors missing "
            f"({', '.join(missing[:5])}), {len(unknown)} not in the model ({', '.join(unknown[:5])}). Give the "
            "architecture that was compressed."
        )
    tensors = {**tensors, **_numbers_of(model, tensors, names, folder)}
    for name, stored in names.items():
        got, expected = tensors[stored], wanted[name]
        if got.shape != expected.shape or got.is_floating_point() != expected.is_floating_point():
            raise LoadError(
                f"{folder / WEIGHTS}: {name} is {tuple(got.shape)} {got.dtype}, the model's is {tuple(expected.shape)} "
                f"{expected.dtype}: give the architecture that was compressed"
            )
    # Copies, for the memory of `tensors` is the mapped file.
    own = {stored: tensors[stored].clone().to(device) for stored in dict.fromkeys(names.values())}
    try:
        model.load_state_dict({name: own[stored] for name, stored in names.items()}, assign=True)
    except RuntimeError as error:
        raise LoadError(f"{folder / WEIGHTS} does not fit {type(model).__name__}: {error}") from error
    for name, stored in tied.items():
        tie(model, [stored, name])
