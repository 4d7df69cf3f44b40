"""Running a model on whatever its users call a batch: tensors, tuples, dicts, with or without targets."""

from __future__ import annotations

import contextlib
import inspect
import math
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler

from panther.errors import CalibrationError

CHUNK = 32  # rows a batch when the calibration data is one big tensor
HELD_OUT_SHARE = 0.1  # of the calibration samples, kept aside to measure agreement
HELD_OUT_SAMPLES = 256  # at most
# Taken of an iterable that cannot be walked twice in one order: it might never end.
STORED_SAMPLES, STORED_BYTES = 2048, 2_000_000_000
KEY_PADDING_MASK = "key_padding_mask"
MASKS = (KEY_PADDING_MASK, "attention_mask")  # how the names of padding masks end
_OPTIONS = (bool, int, float, str, type(None))
_TARGETS = frozenset({"label", "labels", "target", "targets", "decoder_labels"})


@dataclass(frozen=True)
class Call:
    """One forward call: positional and keyword arguments, on any device."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Tensors that were made in inference mode are copied: a backward pass needs others."""
        if not torch.is_inference_mode_enabled() and any(tensor.is_inference() for tensor in self.leaves()):
            object.__setattr__(self, "args", _copied(self.args))
            object.__setattr__(self, "kwargs", _copied(self.kwargs))

    def to(self, device: torch.device | str) -> Call:
        return Call(tuple(_move(a, device) for a in self.args), {k: _move(v, device) for k, v in self.kwargs.items()})

    def masks(self) -> dict[tuple[int, ...], Tensor]:
        """The padding masks of this call, (batch, length) bool, True where a token counts, by their shape."""
        found: dict[tuple[int, ...], Tensor] = {}
        for name, value in self.kwargs.items():
            if not isinstance(value, Tensor) or value.dim() != 2 or not name.endswith(MASKS):
                continue
            # Torch's own is True, or what is added to the scores, at padding.
            counts = value == 0 if name.endswith(KEY_PADDING_MASK) else value.bool()
            shape = tuple(value.shape)
            # Two masks of one shape (encoder's and decoder's) cannot be told apart: what either counts, counts.
            found[shape] = counts | found[shape] if shape in found else counts
        return found

    def copied(self) -> Call:
        """The same call on tensors of its own."""
        return Call(tuple(_copied(a) for a in self.args), {k: _copied(v) for k, v in self.kwargs.items()})

    @property
    def seed(self) -> int:
        """A number that depends on a few of the numbers in this call."""
        return zlib.crc32(repr([_some_numbers(tensor) for tensor in self.leaves()]).encode())

    def leaves(self) -> list[Tensor]:
        """Its tensors, in whatever they are."""
        found = tree_leaves((self.args, dict(self.kwargs)))
        return [part for leaf in found for part in _parts(leaf) if isinstance(part, Tensor)]

    def tensors(self) -> list[Tensor]:
        return [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor)]

    @property
    def can_be_cut(self) -> bool:
        """Whether the first dimension is the batch as far as one can tell: all tensors agree on it, none is nested.

        Sparse tensors cannot be cut.
        """
        nested = any(isinstance(v, list | tuple | Mapping) for v in (*self.args, *self.kwargs.values()))
        sparse = any(t.layout is not torch.strided for t in self.tensors())
        return not nested and not sparse and len({t.shape[0] for t in self.tensors() if t.dim()}) == 1

    @property
    def batch_size(self) -> int:
        """Samples in this call; one when it cannot be cut."""
        return next((t.shape[0] for t in self.tensors() if t.dim()), 1) if self.can_be_cut else 1

    @property
    def size_bytes(self) -> int:
        """Of the tensors in it."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def rows(self, start: int, stop: int) -> Call:
        """The same call on samples start..stop; itself when it cannot be cut."""
        if not self.can_be_cut:
            return self

        def cut(value: Any) -> Any:
            return value[start:stop] if isinstance(value, Tensor) and value.dim() else value

        return Call(tuple(cut(a) for a in self.args), {k: cut(v) for k, v in self.kwargs.items()})


def _parts(leaf: Any) -> tuple[Any, ...]:
    return tuple(leaf) if isinstance(leaf, PackedSequence) else (leaf,)


def _some_numbers(tensor: Tensor) -> list[Any]:
    """The shape of a tensor and a few of its numbers, where they can be read one by one."""
    try:
        places = torch.linspace(0, tensor.numel() - 1, 8).long()
        return [*tensor.shape, *tensor.detach()[torch.unravel_index(places, tensor.shape)].tolist()]
    except (RuntimeError, IndexError, ValueError, NotImplementedError):  # sparse, nested, quantised or empty
        return []


def _copied(value: Any) -> Any:
    return _mapped(value, lambda t: t._replace(data=t.data.clone()) if isinstance(t, PackedSequence) else t.clone())


def _move(value: Any, device: torch.device | str) -> Any:
    return _mapped(value, lambda tensor: tensor.to(device))


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """The same with every tensor and every packed sequence in it replaced."""
    if isinstance(value, Tensor | PackedSequence):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple takes its parts one by one
        return type(value)(*(_mapped(v, function) for v in value))
    if isinstance(value, tuple | list):
        return type(value)(_mapped(v, function) for v in value)
    if isinstance(value, Mapping):
        return {k: _mapped(v, function) for k, v in value.items()}
    return value


def as_call(example_inputs: Any) -> Call:
    """What `example_inputs` means: a tensor or packed sequence is one argument, a tuple several, a dict keywords.

    Raises: TypeError for anything else.
    """
    if isinstance(example_inputs, Call):
        return example_inputs
    if isinstance(example_inputs, Tensor | PackedSequence):
        return Call((example_inputs,))
    if isinstance(example_inputs, Mapping):
        return Call((), dict(example_inputs))
    if isinstance(example_inputs, tuple | list):
        return Call(tuple(example_inputs))
    raise TypeError(
        f"example_inputs is {type(example_inputs).__name__}: expected a tensor, a tuple of arguments or a dict of "
        "keyword arguments, as for torch.export"
    )


def batch_call(batch: Any, example: Call, model: nn.Module) -> Call:
    """The forward call that one calibration batch means, with targets left out.

    Raises: CalibrationError when the batch is of no known kind, has too few parts, or parts of which it is not clear
        which of the example's names they belong to.
    """
    if isinstance(batch, Call):
        return batch
    if _is_one(batch, example):
        several = sum(not isinstance(value, _OPTIONS) for value in example.args) > 1
        return Call((batch,)) if several else _by_position((batch,), example)
    if isinstance(batch, Mapping):
        return Call((batch,)) if _is_argument(batch, example) else Call((), _accepted(batch, example, model))
    if isinstance(batch, tuple | list) and batch:
        first = batch[0]
        is_nested = isinstance(first, Mapping) or (isinstance(first, tuple | list) and len(batch) <= 2)
        if is_nested and not _is_argument(first, example):
            return batch_call(first, example, model)
        return _by_position(batch, example)
    raise CalibrationError(
        f"a calibration batch is {type(batch).__name__}: expected a tensor, a tuple (inputs, target) or a dict"
    )


def _is_one(value: Any, example: Call) -> bool:
    """Whether a value is one input, whatever it holds: a tensor, a packed sequence, or of the example's own class."""
    is_own = type(value) is type(_first_input(example)) and not isinstance(value, Mapping)
    return isinstance(value, Tensor | PackedSequence) or (is_own and type(value) not in (tuple, list, type(None)))


def _is_argument(value: Any, example: Call) -> bool:
    """Whether a dict or a sequence is one argument of the model, as it is in the example, and not several."""
    first = _first_input(example)
    if isinstance(value, Mapping):
        return bool(example.args) and isinstance(first, Mapping)
    return _is_one(value, example) or (isinstance(first, tuple | list) and not isinstance(first, PackedSequence))


def _first_input(example: Call) -> Any:
    return next(iter((*example.args, *example.kwargs.values())), None)


def _by_position(parts: Sequence[Any], example: Call) -> Call:
    """The parts of a batch as the example's arguments, in its order; what is left over is a target.

    Where the example is a dict they go under its names, a single one under the first. Options in it (numbers, strings,
    None) are no inputs, and stay; in a tuple as well, where the batch has none in their places.
    """
    if example.args:
        return Call(_arguments(parts, example.args))
    options = {name: value for name, value in example.kwargs.items() if isinstance(value, _OPTIONS)}
    names = [name for name in example.kwargs if name not in options]
    if len(parts) < len(names) and len(parts) != 1:
        raise _too_few(parts, len(names))
    if not names:
        return Call(tuple(parts[:1]))
    inputs = dict(zip(names, parts, strict=False))
    if len(names) > 1 and not all(_looks_like(value, example.kwargs[name]) for name, value in inputs.items()):
        raise CalibrationError(
            f"a calibration batch has the parts {', '.join(map(_kind, parts))}, the example inputs "
            f"{', '.join(f'{name} {_kind(example.kwargs[name])}' for name in names)}: "
            "yield dicts, or the same inputs in this order, with or without a target behind them"
        )
    return Call((), {**inputs, **options})


def _arguments(parts: Sequence[Any], example: Sequence[Any]) -> tuple[Any, ...]:
    """The parts of a batch as positional arguments, with the example's options where the batch has inputs only."""
    options = [place for place, value in enumerate(example) if isinstance(value, _OPTIONS)]
    inputs = len(example) - len(options)
    if (len(parts) >= len(example) and all(isinstance(parts[place], _OPTIONS) for place in options)) or not inputs:
        return tuple(parts[: len(example)])
    if len(parts) < inputs:
        raise _too_few(parts, inputs)
    given = iter(parts)
    return tuple(value if place in options else next(given) for place, value in enumerate(example))


def _too_few(parts: Sequence[Any], wanted: int) -> CalibrationError:
    return CalibrationError(
        f"a calibration batch has {len(parts)} parts, the example inputs {wanted}: "
        "yield the same arguments, with or without a target behind them"
    )


def _looks_like(value: Any, wanted: Any) -> bool:
    """Whether a part of a batch can be the input that the example has: another size, but as many dimensions."""
    if not (isinstance(value, Tensor) and isinstance(wanted, Tensor)):
        return isinstance(value, type(wanted))
    return value.dim() == wanted.dim() and value.is_floating_point() == wanted.is_floating_point()


def _kind(value: Any) -> str:
    """ "(8, 12) int64"."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__


def _accepted(batch: Mapping[str, Any], example: Call, model: nn.Module) -> dict[str, Any]:
    """The entries of a dict batch that the model's forward takes, without labels that the example does not have."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def wanted(name: str) -> bool:
        if name in example.kwargs:
            return True
        return name not in _TARGETS and (name in parameters or takes_any)

    kept = {name: value for name, value in batch.items() if wanted(name)}
    if not kept:
        raise CalibrationError(
            f"a calibration batch has the keys {sorted(map(str, batch))}, and {type(model).__name__}.forward takes "
            f"none of them (it takes {', '.join(parameters)})"
        )
    return kept


@dataclass(frozen=True)
class Calibration:
    """Calibration data that can be walked more than once, and a part of it that is kept aside."""

    source: Iterable[Any]
    stop: int | None  # batches used for fitting; None means all
    held_out: tuple[Call, ...]
    is_held_out: bool
    example: Call
    model: nn.Module
    note: str | None = None  # what was left out

    def __iter__(self) -> Iterator[Call]:
        for index, batch in enumerate(self.source):
            if self.stop is not None and index >= self.stop:
                return
            yield batch_call(batch, self.example, self.model)

    def __len__(self) -> int:
        return self.stop if self.stop is not None else len(self.source)  # type: ignore[arg-type]  # see `calibration`


def calibration(data: Any, example: Call, model: nn.Module) -> Calibration:
    """Make any loader walkable again and keep a tenth of its samples aside (its last batches).

    A list, or a loader with a length and a fixed order, is walked again and never stored; of a generator or a
    shuffling loader the first STORED_SAMPLES are stored (of STORED_BYTES), so that what is kept aside stays apart.

    Raises: CalibrationError when there is no batch, TypeError for a Dataset (its items are not batches).
    """
    source, note = _walkable(data, example, model)
    count, held = _tail(source, example, model)
    if count == 0:
        raise CalibrationError("calib_data has no batches: give an iterable of inputs (at least one batch)")
    if count > 1:
        return Calibration(source, count - len(held), held, True, example, model, note)
    only = held[0]
    size = only.batch_size
    cut = size - _held_out_of(size)
    parts = only.rows(0, cut), only.rows(cut, size)
    # Some models are written for one size, and the rows of a graph are no samples.
    if size < 4 or not all(runs(model, part) for part in parts):
        return Calibration([only], None, (only,), False, example, model, note)
    return Calibration([parts[0]], None, parts[1:], True, example, model, note)


def _tail(source: Iterable[Any], example: Call, model: nn.Module) -> tuple[int, tuple[Call, ...]]:
    """How many batches there are, and the last ones, which hold about HELD_OUT_SHARE of all samples.

    One walk. By samples and not by batches, because the last batch of a loader is often a small rest. One batch is
    left for fitting, unless there is only one.
    """
    count = total = recent = 0
    last: deque[Call] = deque()  # as many as could be held out
    for batch in source:
        last.append(batch_call(batch, example, model))
        count, total, recent = count + 1, total + last[-1].batch_size, recent + last[-1].batch_size
        while recent - last[0].batch_size >= HELD_OUT_SAMPLES:
            recent -= last.popleft().batch_size
    wanted = min(total * HELD_OUT_SHARE, HELD_OUT_SAMPLES)
    held: list[Call] = []
    samples = 0
    while last and len(held) < max(1, count - 1):
        size = last[-1].batch_size
        comes_nearer = samples + size / 2 <= wanted and samples + size <= HELD_OUT_SAMPLES
        if held and samples >= wanted / 2 and not comes_nearer:
            break
        held.append(last.pop())
        samples += size
    return count, tuple(reversed(held))


def _walkable(data: Any, example: Call, model: nn.Module) -> tuple[Any, str | None]:
    """Batches that can be walked again, and a note when not all of the data is among them."""
    if isinstance(data, Tensor | Mapping):
        return _chunks(batch_call(data, example, model), example, model)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise TypeError(
            "calib_data is a Dataset, whose items are single samples: wrap it, "
            "as in torch.utils.data.DataLoader(dataset, batch_size=32)"
        )
    if isinstance(data, list | tuple) or (isinstance(data, DataLoader) and _has_fixed_order(data)):
        return data, None
    try:
        batches = iter(data)
    except TypeError:
        raise TypeError(
            f"calib_data is {type(data).__name__}: expected an iterable of inputs, of (input, target) pairs or of dicts"
        ) from None
    return _first_samples(batches, example, model)


def _chunks(whole: Call, example: Call, model: nn.Module) -> tuple[list[Call], str | None]:
    """A call as batches of CHUNK samples, or of the example's size where the model takes no other.

    Batches of CHUNK end where what is held out begins, which is less than a batch of a small call.
    """
    count, size = whole.batch_size, CHUNK
    if count > 1 and example.batch_size != size and not runs(model, whole.rows(0, size)):
        size = max(1, example.batch_size)
    if size == CHUNK < count:
        end = count - _held_out_of(count)
        held_out = -(-(count - end) // size)  # of equal size: a single row's loss has a unit of its own
        parts = [*_cut(whole, 0, end, size), *_cut(whole, end, count, -(-(count - end) // held_out))]
        if all(runs(model, part) for part in parts if part.batch_size != size):
            return parts, None
    parts = _cut(whole, 0, count, size)
    rest = count % size
    if size == CHUNK or not rest or len(parts) == 1 or runs(model, parts[-1]):
        return parts, None
    return parts[:-1], f"the last {rest} of {count} samples were left out: the model takes {size} at a time"


def _cut(whole: Call, start: int, stop: int, size: int) -> list[Call]:
    return [whole.rows(i, min(i + size, stop)) for i in range(start, stop, size)]


def _held_out_of(samples: int) -> int:
    """How many of so many samples are held out where they can be cut anywhere."""
    return min(HELD_OUT_SAMPLES, max(1, round(samples * HELD_OUT_SHARE)))


def _first_samples(batches: Iterator[Any], example: Call, model: nn.Module) -> tuple[list[Any], str | None]:
    stored: list[Any] = []
    samples = size_bytes = 0
    for batch in batches:
        if samples >= STORED_SAMPLES or size_bytes >= STORED_BYTES:
            return stored, (
                f"calib_data cannot be walked twice in one order, so its first {samples:,} samples were taken; give a "
                "list or a loader of a fixed order to use all"
            )
        stored.append(batch)
        call = batch_call(batch, example, model)
        samples, size_bytes = samples + call.batch_size, size_bytes + call.size_bytes
    return stored, None


def _has_fixed_order(loader: DataLoader[Any]) -> bool:
    """Whether every walk gives the same batches; a batch sampler of the user's own may shuffle."""
    batches = loader.batch_sampler
    plain = batches is None or getattr(batches, "sampler", None) is loader.sampler
    return plain and type(loader.sampler) is SequentialSampler and not isinstance(loader.dataset, IterableDataset)


@contextlib.contextmanager
def inference(model: nn.Module, *, fused: bool = False) -> Iterator[None]:
    """Evaluation mode without gradients; every training flag, attribute and buffer is put back at the end.

    fused: nn.TransformerEncoder may take its fused path, as it does for its users. That runs no submodule and leaves
    zeros where the padding is, which no sketched layer does, so that only times are taken with it.
    """
    flags = {module: module.training for module in model.modules()}
    attention = contextlib.nullcontext() if fused else slow_attention()
    with unchanged(model), torch.no_grad(), attention:
        _evaluate(model)
        try:
            yield
        finally:
            for module, flag in flags.items():
                module.training = flag


@contextlib.contextmanager
def weights_may_change() -> Iterator[None]:
    """For work that makes, trains or writes weights in place: every run sees the numbers that they have then.

    torch.autocast keeps what it cast a parameter to until its outermost context ends, which may be the caller's. In
    inference mode nothing learns, and what is made there never will; it is left for a while, not so no_grad.
    """
    keeps = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with contextlib.ExitStack() as modes:
            if torch.is_inference_mode_enabled():
                modes.enter_context(torch.inference_mode(False))
                modes.enter_context(torch.no_grad())
            yield
    finally:
        torch.set_autocast_cache_enabled(keeps)
        torch.clear_autocast_cache()


def is_for_inference(model: nn.Module) -> bool:
    """Whether a model was made in inference mode: its tensors can be neither trained nor written outside of it."""
    return any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))


@contextlib.contextmanager
def slow_attention() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _evaluate(model: nn.Module) -> None:
    """Evaluation mode, without what the model's own `eval` does to its weights.

    `eval` is called, because some models prepare there what their forward reads (LeViT its attention biases). Layers
    that merge an adapter into their weight on `eval` (loralib, early peft) would leave the user's weights merged, and
    unmerging by `train` would leave them rounded. Where `eval` changes a parameter all that it did is undone and only
    the flags are set: such a layer, left unmerged, computes the same.
    """
    modules = list(model.modules())
    if not any(module.training for module in modules):
        return
    overriding = [m for m in modules if type(m).train is not nn.Module.train or type(m).eval is not nn.Module.eval]
    if not overriding:
        model.eval()
        return
    parameters = list(model.parameters())
    kept = [(p, p.data, p.detach().clone()) for p in {p for module in overriding for p in module.parameters()}]
    put_back = _snapshot(model)
    model.eval()
    is_same = [id(p) for p in parameters] == [id(p) for p in model.parameters()]
    if is_same and all(torch.equal(parameter, numbers) for parameter, _, numbers in kept):
        return
    put_back()
    for parameter, data, numbers in kept:
        parameter.data = data
        if not torch.equal(data, numbers):
            data.copy_(numbers)
    for module in modules:
        module.training = False


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Puts back what a forward leaves behind: attributes, their lists, dicts and sets, and the numbers in buffers."""
    put_back = _snapshot(model)
    try:
        yield
    finally:
        put_back()


def _snapshot(model: nn.Module) -> Callable[[], None]:
    """What puts back the attributes and the buffers that a model has now."""
    attributes = {module: dict(module.__dict__) for module in model.modules()}
    values = [value for held in attributes.values() for value in held.values()]
    containers = [(value, value.copy()) for value in values if type(value) in (list, dict, set, OrderedDict)]
    tensors = [value for value in values if isinstance(value, Tensor)] + list(model.buffers())
    numbers = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def put_back() -> None:
        for module, held in attributes.items():
            for name in set(module.__dict__) - set(held):
                del module.__dict__[name]
            module.__dict__.update(held)
        for container, before in containers:
            refill(container, before)
        with torch.no_grad():  # and no detach, which of a sparse tensor is a copy
            for tensor, kept in numbers:
                if not are_equal(tensor, kept):
                    tensor.copy_(kept)

    return put_back


def are_equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one layout hold the same numbers; torch.equal knows no sparse ones."""
    return all(torch.equal(a, b) for a, b in zip(parts_of(first), parts_of(second), strict=True))


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The dense tensors that hold a tensor's numbers, the values last: itself unless it is sparse."""
    tensor = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]  # of a tensor that is not coalesced as well
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


def refill(container: Any, before: Any) -> None:
    """Make a list, dict or set hold again what it held, without replacing it."""
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(before)


def device_of(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


# Classes of models that were seen to change their inputs in place.
_SPOILING: WeakSet[type[nn.Module]] = WeakSet()


def run(model: nn.Module, call: Call, *, shares: bool = False, tensors: Mapping[str, Tensor] | None = None) -> Any:
    """model(*args, **kwargs) on the model's own device and on copies of the inputs, which it may change in place.

    What a model draws at random follows from the call alone, so that two models draw the same, and the generators of
    the process are left as they were.

    shares: where many calls are held at once, the inputs themselves, unless such a model was seen to change them.
    tensors: what stands for parameters of these names, as in torch.func.functional_call.
    """
    device = device_of(model)
    moved = call.to(device)
    if not shares or type(model) in _SPOILING:
        moved = moved.copied()
    given = [(tensor, tensor._version) for tensor in moved.leaves() if not tensor.is_inference()]
    with drawing(call.seed, device):
        if tensors is None:
            output = model(*moved.args, **moved.kwargs)
        else:
            output = functional_call(model, dict(tensors), moved.args, dict(moved.kwargs))
    if any(tensor._version != version for tensor, version in given):
        _SPOILING.add(type(model))
    return output


@contextlib.contextmanager
def drawing(noise: int | Tensor, device: torch.device) -> Iterator[None]:
    """With generators that begin anew at a seed (or, on the CPU, at a state), and are put back at the end."""
    before = torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        if isinstance(noise, Tensor):
            torch.set_rng_state(noise)
        else:
            torch.default_generator.manual_seed(noise)
            if on_gpu is not None:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(noise)
        yield
    finally:
        torch.set_rng_state(before)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu, device)


def runs(model: nn.Module, call: Call) -> bool:
    """Whether a model takes a batch of this size; some are written for one."""
    try:
        with inference(model):
            run(model, call)
    except Exception:
        return False
    return True


def float_outputs(output: Any) -> list[Tensor]:
    """Every floating-point tensor of a model's output, in order: tensors, tuples, dicts and dataclass-like outputs."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in float_outputs(value)]
    if isinstance(output, tuple | list):
        return [t for value in output for t in float_outputs(value)]
    if hasattr(output, "__dataclass_fields__"):
        return [t for name in output.__dataclass_fields__ for t in float_outputs(getattr(output, name))]
    return []


def rows_that_count(tensor: Tensor, masks: Mapping[tuple[int, ...], Tensor]) -> tuple[Tensor, Tensor | None]:
    """A (..., features) tensor as (rows, features), and which of them count where a mask leaves some out."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    for shape, mask in masks.items():
        fits = tuple(tensor.shape[:-1]) == shape or (tensor.dim() == 2 and tensor.shape[0] == mask.numel())
        if fits and not bool(mask.all()):
            return rows, mask.reshape(-1)
    return rows, None


def masked_rows(tensor: Tensor, masks: Mapping[tuple[int, ...], Tensor]) -> Tensor:
    """A (..., features) tensor as (rows, features), padded positions left out where a mask fits its shape."""
    rows, counts = rows_that_count(tensor, masks)
    return rows if counts is None else rows[counts]


def scale_of(output: Tensor) -> float:
    """How large the differences between a model's answers are: the root mean square distance from their mean.

    Values that are not finite (masked logits) are left out. Where the answers hardly differ, a thousandth of their own
    root mean square, so that noise in a constant output does not count for more than the other outputs.
    """
    finite = torch.isfinite(output)
    values = torch.where(finite, output, 0.0)
    count = finite.sum(0, keepdim=True).clamp_min(1)
    distance = torch.where(finite, values - values.sum(0, keepdim=True) / count, 0.0)
    total = max(1, int(finite.sum()))
    spread, size = (float((t.square().sum() / total).sqrt()) for t in (distance, values))
    return max(spread, 1e-3 * size, 1e-20) if output.shape[:1] != (1,) else max(size, 1e-20)


def squared_error(answer: Tensor, got: Tensor | None, call: Call) -> float:
    """||got - answer||^2 in units of the answers' variance; infinite if not finite.

    Padded positions, and values that are not finite in the answer (masked logits), are left out. An output of another
    shape, or none, counts as wrong as an unrelated one would be.
    """
    if got is None or got.shape != answer.shape:
        return float(answer.numel())
    scale = scale_of(answer.float())
    finite = torch.isfinite(answer)
    answer, got = torch.where(finite, answer, 0), torch.where(finite, got, 0)
    for shape, mask in call.masks().items():
        if tuple(answer.shape[: len(shape)]) == shape:
            keep = mask.to(answer.device)
            answer, got = answer[keep], got[keep]
    lost = float((got.float() - answer.float()).square().sum()) / scale**2
    return lost if math.isfinite(lost) else math.inf
