"""Calibration batches of texts without most of their padding, where the model answers the same without it.

A tokeniser fills each batch up to its longest text, or to the longest of all. A model that honours the mask computes
those positions for nothing, in every pass of calibration and in every step of healing. Positions that no sample of a
batch needs are cut off, and samples of like length are put together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from panther.batches import (
    MASKS,
    Calibration,
    Call,
    batch_call,
    device_of,
    float_outputs,
    inference,
    run,
    runs,
    scale_of,
)

WINDOW = 16  # batches whose samples are put in order at a time: of sentences in Brown 8 leave 10 % of padding, 16 6 %
WINDOW_BYTES = 64_000_000  # of their tensors, at most
LEAST_SHARE = 0.1  # of the positions that are cut off, below which batches stay what the user made them
# Largest change of an answer in units of their spread; positions that are off by one change it by a tenth or more.
TOLERANCE, HALF_TOLERANCE = 1e-3, 3e-2
PROBED = 8  # samples that the model is tried on
EXTRA = 3  # positions of padding that are added to them

Sample = tuple[int, int]  # the number of a batch, and of a row in it
Padding = Mapping[str, Tensor]  # by keyword, what one position of padding holds


@dataclass(frozen=True)
class Span:
    """Where the positions that count are in a call: for every sample the first, and behind the last.

    names: keywords of the tensors (samples, length, ...), the mask among them.
    """

    names: tuple[str, ...]
    first: Tensor
    end: Tensor
    length: int

    @property
    def starts_alike(self) -> bool:
        """Whether all samples begin at 0."""
        return not bool(self.first.any())

    @property
    def ends_alike(self) -> bool:
        return bool((self.end == self.length).all())

    @property
    def lengths(self) -> Tensor:
        return self.end - self.first


def without_padding(data: Calibration) -> tuple[Calibration, str | None]:
    """The same samples with less padding, and a note that says so; the data as it is where that would not do.

    Batches are as many as before. Those that are held out keep their samples.

    Nothing is changed where the first batch has no padding mask among its keywords, or several of different lengths,
    where less than LEAST_SHARE of the positions of the first batches would go, and where the model's answers depend on
    what is masked.

    Cost: the first WINDOW batches are read, or one where that has no mask; three forward passes of PROBED samples and
    one of a batch of the shortest.
    """
    calls = iter(data)
    first = list(itertools.islice(calls, 1))
    if not any(map(_span, first)):
        return data, None
    window = next(_windows(itertools.chain(first, calls)))
    most = max(window, key=lambda call: _positions([call]) - _counted(call))
    padding = _padding(most)
    if not padding:
        return data, None
    parts = _less_padded(window, padding, 0)
    before, after = _positions(window), _positions(parts)
    shortest = min(parts, key=lambda call: _positions([call]))
    pays = after <= (1 - LEAST_SHARE) * before
    if not (pays and _ignores_padding(data.model, most, padding) and runs(data.model, shortest)):
        return data, None
    source: Iterable[Any] = _WithoutPadding(data, padding)
    if isinstance(data.source, list | tuple):
        source = list(source)
    note = (
        f"{1 - after / before:.0%} of the positions in the first batches are padding that the model ignores: left out"
    )
    return replace(data, source=source, held_out=tuple(_cut_off(call, padding) for call in data.held_out)), note


@dataclass(frozen=True)
class _WithoutPadding:
    """The batches of some data, those for fitting in windows; what is behind them as it is."""

    data: Calibration
    padding: Padding

    def __len__(self) -> int:
        return len(self.data.source)  # type: ignore[arg-type]  # as that of Calibration

    def __iter__(self) -> Iterator[Call]:
        data = self.data
        batches = iter(data.source)
        fitted = batches if data.stop is None else itertools.islice(batches, data.stop)
        calls = (batch_call(batch, data.example, data.model) for batch in fitted)
        for number, window in enumerate(_windows(calls)):
            yield from _less_padded(window, self.padding, number)
        yield from (batch_call(batch, data.example, data.model) for batch in batches)


def _windows(calls: Iterable[Call]) -> Iterator[list[Call]]:
    """WINDOW calls at a time, or as many as have WINDOW_BYTES."""
    window: list[Call] = []
    size_bytes = 0
    for call in calls:
        window.append(call)
        size_bytes += _bytes(call.tensors())
        if len(window) == WINDOW or size_bytes >= WINDOW_BYTES:
            yield window
            window, size_bytes = [], 0
    if window:
        yield window


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# --- one batch --------------------------------------------------------------------------------------------------------


def _span(call: Call) -> Span | None:
    """None where a call can't be cut: without one shape of masks, or of those alone, or where a sample is all masked.

    What a model makes of a sample that is all masked depends on how much there is.
    """
    masks = call.masks() if call.can_be_cut else {}
    if len(masks) != 1:
        return None
    shape, mask = next(iter(masks.items()))
    names = tuple(n for n, v in call.kwargs.items() if isinstance(v, Tensor) and tuple(v.shape[:2]) == shape)
    if all(name.endswith(MASKS) for name in names) or not shape[0] or not bool(mask.any(1).all()):
        return None
    counts = mask.cpu().int()
    return Span(names, counts.argmax(1), shape[1] - counts.flip(1).argmax(1), shape[1])


def _padding(call: Call) -> Padding:
    """What stands where the mask says padding: token ids of their own, zeros, and the mask's own numbers."""
    span = _span(call)
    if span is None:
        return {}
    places = (~next(iter(call.masks().values()))).nonzero()
    if not len(places):
        return {}
    row, position = places[0].tolist()
    return {name: call.kwargs[name][row, position].clone() for name in span.names}


def _cut_off(call: Call, padding: Padding) -> Call:
    """The call without the positions in front of and behind those that any sample needs.

    One in which other tensors than those that have padding look as if they had is left as it is.
    """
    span = _span(call)
    if span is None or list(span.names) != list(padding):
        return call
    first, end = int(span.first.min()), int(span.end.max())
    if end - first == span.length:
        return call
    cut = {name: call.kwargs[name][:, first:end].contiguous() for name in span.names}
    return Call(call.args, {**call.kwargs, **cut})


def _positions(calls: Iterable[Call]) -> int:
    """Samples times length, padding included, of all calls."""
    return sum(int(shape[0]) * int(shape[1]) for call in calls for shape in call.masks())


def _counted(call: Call) -> int:
    return sum(int(mask.sum()) for mask in call.masks().values())


# --- several batches --------------------------------------------------------------------------------------------------


def _less_padded(calls: Sequence[Call], padding: Padding, number: int) -> list[Call]:
    """As many calls, of the same samples: put together by their lengths where that leaves fewer positions."""
    cut = [_cut_off(call, padding) for call in calls]
    together = _put_together(calls, padding, number)
    return together if together and _positions(together) < _positions(cut) else cut


def _put_together(calls: Sequence[Call], padding: Padding, number: int) -> list[Call]:
    """The samples of calls in calls of the same sizes, each with samples of like length; none where that can't be.

    The first one is a large one of a middle length, by which others are judged; the rest come in random order, since
    some of what reads them stops early.
    number: of the window, which gives each an order of its own.
    """
    found = [_span(call) for call in calls]
    some = [span for span in found if span is not None and list(span.names) == list(padding)]
    if not 1 < len(calls) == len(some) or not _are_alike(calls, some):
        return []
    lengths = [span.lengths.tolist() for span in some]
    samples = sorted(
        ((b, r) for b, of in enumerate(lengths) for r in range(len(of))), key=lambda s: lengths[s[0]][s[1]]
    )
    sizes = sorted((call.batch_size for call in calls), reverse=True)
    ends = [*itertools.accumulate(sizes)]
    groups = [samples[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    middle = groups.pop(min(sizes.count(sizes[0]) - 1, len(groups) // 2))
    Random(number).shuffle(groups)
    return [_gathered(calls, some, group, padding) for group in (middle, *groups)]


def _are_alike(calls: Sequence[Call], spans: Sequence[Span]) -> bool:
    """Whether samples may change places: the same names, of tensors with the same features, padded on the same side.

    And whether the texts are most of what there is: large pictures beside them would be copied.
    """
    first, names = calls[0], spans[0].names
    if not (all(span.starts_alike for span in spans) or all(span.ends_alike for span in spans)):
        return False
    if any(list(c.kwargs) != list(first.kwargs) or len(c.args) != len(first.args) for c in calls):
        return False
    parts = [[call.kwargs[name] for name in names] for call in calls]
    whole = [[*call.args, *(v for name, v in call.kwargs.items() if name not in names)] for call in calls]
    return (
        2 * _bytes(parts[0]) >= _bytes(first.tensors())
        and all(
            a.shape[2:] == b.shape[2:] and a.dtype == b.dtype for p in parts for a, b in zip(parts[0], p, strict=True)
        )
        and all(_fit(a, b) for other in whole for a, b in zip(whole[0], other, strict=True))
    )


def _fit(first: Any, other: Any) -> bool:
    """Whether one sample of each may stand in one call, as far as they have samples."""
    if isinstance(first, Tensor) and isinstance(other, Tensor) and first.dim() and other.dim():
        return first.shape[1:] == other.shape[1:] and first.dtype == other.dtype
    try:
        return type(first) is type(other) and bool(first == other)
    except (TypeError, ValueError, RuntimeError):  # some objects cannot be compared
        return False


def _gathered(calls: Sequence[Call], spans: Sequence[Span], group: Sequence[Sample], padding: Padding) -> Call:
    """One call of these samples, each tensor as long as the longest of them asks for."""
    kwargs = {
        name: _stack([call.kwargs[name] for call in calls], spans, group, padding[name])
        if name in padding
        else _rows([call.kwargs[name] for call in calls], group)
        for name in calls[0].kwargs
    }
    args = tuple(_rows([call.args[place] for call in calls], group) for place in range(len(calls[0].args)))
    return Call(args, kwargs)


def _rows(values: Sequence[Any], group: Sequence[Sample]) -> Any:
    if not isinstance(values[0], Tensor) or not values[0].dim():
        return values[0]
    return torch.stack([values[batch][row] for batch, row in group])


def _stack(tensors: Sequence[Tensor], spans: Sequence[Span], group: Sequence[Sample], padding: Tensor) -> Tensor:
    """(samples, longest of them, ...), aligned as they were."""
    at_start = all(span.starts_alike for span in spans)
    length = max(int(spans[batch].lengths[row]) for batch, row in group)
    rows = []
    for batch, place in group:
        row = tensors[batch][place]
        row = row[:length] if at_start else row[-length:]
        rows.append(_longer(row, length - len(row), padding, at_end=at_start))
    return torch.stack(rows)


def _longer(row: Tensor, more: int, padding: Tensor, *, at_end: bool) -> Tensor:
    if more <= 0:
        return row
    added = padding.to(row.device).expand(more, *row.shape[1:])
    return torch.cat([row, added] if at_end else [added, row])


# --- whether a model ignores it ---------------------------------------------------------------------------------------


def _ignores_padding(model: nn.Module, given: Call, padding: Padding) -> bool:
    """Whether short samples are answered the same inside of a batch, without its padding and with a little.

    Seen on PROBED samples at most.
    """
    span = _span(given)
    if span is None:
        return False
    shorter = span.lengths.argsort(stable=True)[: min(PROBED, -(-given.batch_size // 2))]
    whole = Call(tuple(_at(v, shorter) for v in given.args), {n: _at(v, shorter) for n, v in given.kwargs.items()})
    short = _cut_off(whole, padding)
    try:
        with inference(model):
            answers = float_outputs(run(model, whole))
            return bool(answers) and all(
                _agree(answers, float_outputs(run(model, other)), whole, other, _tolerance(model))
                for other in (short, _lengthened(short, padding))
            )
    except Exception:  # a model of one length
        return False


def _at(value: Any, rows: Tensor) -> Any:
    return value[rows.to(value.device)] if isinstance(value, Tensor) and value.dim() else value


def _lengthened(call: Call, padding: Padding) -> Call:
    """The call with EXTRA positions of padding, where all samples are padded on one side."""
    span = _span(call)
    if span is None or not (span.starts_alike or span.ends_alike):
        return call
    longer = {
        name: torch.stack([_longer(row, EXTRA, padding[name], at_end=span.starts_alike) for row in call.kwargs[name]])
        for name in span.names
    }
    return Call(call.args, {**call.kwargs, **longer})


def _tolerance(model: nn.Module) -> float:
    is_half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()) or torch.is_autocast_enabled(
        device_of(model).type
    )
    return HALF_TOLERANCE if is_half else TOLERANCE


def _agree(answers: Sequence[Tensor], others: Sequence[Tensor], whole: Call, other: Call, tolerance: float) -> bool:
    """Whether two calls of the same samples were answered alike where it counts."""
    ((shape, mask),), ((other_shape, other_mask),) = whole.masks().items(), other.masks().items()

    def counted(answer: Tensor, got: Tensor) -> tuple[Tensor, Tensor]:
        if (tuple(answer.shape[:2]), tuple(got.shape[:2])) == (shape, other_shape):
            return answer[mask.to(answer.device)], got[other_mask.to(got.device)]
        return answer, got

    if len(answers) != len(others):
        return False
    for wanted, got in itertools.starmap(counted, zip(answers, others, strict=True)):
        if wanted.shape != got.shape or not bool((wanted.isfinite() == got.isfinite()).all()):
            return False
        error = torch.where(wanted.isfinite(), (wanted - got).float(), 0.0)
        if error.numel() and float(error.abs().max()) > tolerance * scale_of(wanted.float()):
            return False
    return True
