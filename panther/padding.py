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

from panther.batches import Calibration, Call, batch_call, device_of, float_outputs, inference, run, scale_of

WINDOW = 16  # batches whose samples are put in order at a time: of sentences in Brown 8 leave 10 % of padding, 16 6 %
LEAST_SHARE = 0.1  # of the positions that are cut off, below which batches stay what the user made them
# Largest change of an answer in units of their spread; positions that are off by one change it by a tenth or more.
TOLERANCE, HALF_TOLERANCE = 1e-3, 3e-2
PROBED = 8  # samples that the model is tried on
EXTRA = 3  # positions of padding that are added to them

Sample = tuple[int, int]  # the number of a batch, and of a row in it
Padding = Mapping[str, Tensor]  # by keyword, what one position of padding holds


@dataclass(frozen=True)
class Span:
    """Where the positions that count are in a mask (samples, length): for every sample the first, and behind the last.

    Either all samples begin at 0, or all end at `length`, or neither.
    """

    first: Tensor
    end: Tensor
    length: int

    @property
    def starts_alike(self) -> bool:
        return not bool(self.first.any())

    @property
    def ends_alike(self) -> bool:
        return bool((self.end == self.length).all())


def without_padding(data: Calibration) -> tuple[Calibration, str | None]:
    """The same samples with less padding, and a note that says so; the data as it is where that would not do.

    Batches are as many and as large as before. Those that are held out keep their samples.

    Nothing is changed where a batch has no padding mask among its keywords, where less than LEAST_SHARE of the
    positions would go, and where the model's answers depend on what is masked.
    """
    window = list(itertools.islice(data, WINDOW))
    most = max(window, key=lambda call: _positions([call]) - _counted(call))
    padding = _padding(most)
    if not padding:
        return data, None
    before, after = _positions(window), _positions(_put_together(window, padding))
    if after > (1 - LEAST_SHARE) * before or not _ignores_padding(data.model, most, padding):
        return data, None
    source: Iterable[Any] = _WithoutPadding(data, padding)
    if isinstance(data.source, list | tuple):
        source = list(source)
    note = f"{1 - after / before:.0%} of the positions in calib_data are padding that the model ignores: left out"
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
        while window := list(itertools.islice(calls, WINDOW)):
            yield from _put_together(window, self.padding)
        yield from (batch_call(batch, data.example, data.model) for batch in batches)


# --- one batch --------------------------------------------------------------------------------------------------------


def spans(call: Call) -> dict[str, Span]:
    """By keyword, for tensors (samples, length, ...) of a shape that a padding mask has; empty where one can't be cut.

    It cannot where all of a sample is masked: what the model makes of that depends on how much there is.
    """
    masks = {} if not call.can_be_cut else call.masks()
    found = {}
    for shape, mask in masks.items():
        if not shape[0] or not bool(mask.any(1).all()):
            return {}
        counts = mask.cpu().int()
        found[shape] = Span(counts.argmax(1), shape[1] - counts.flip(1).argmax(1), shape[1])
    return {
        name: found[tuple(value.shape[:2])]
        for name, value in call.kwargs.items()
        if isinstance(value, Tensor) and tuple(value.shape[:2]) in found
    }


def _padding(call: Call) -> Padding:
    """What stands where a mask says padding: token ids of their own, zeros, and the mask's own numbers."""
    masks, found = call.masks(), {}
    for name in spans(call):
        value = call.kwargs[name]
        places = (~masks[tuple(value.shape[:2])]).nonzero()
        if not len(places):
            return {}
        row, position = places[0].tolist()
        found[name] = value[row, position]
    return found


def _cut_off(call: Call, padding: Padding) -> Call:
    """The call without the positions in front of and behind those that any sample needs.

    One in which other tensors than those that have padding look as if they had is left as it is.
    """
    found = spans(call)
    if list(found) != list(padding):
        return call
    cut = {n: call.kwargs[n][:, int(s.first.min()) : int(s.end.max())] for n, s in found.items()}
    return Call(call.args, {**call.kwargs, **cut})


def _positions(calls: Iterable[Call]) -> int:
    """Samples times length, padding included, of all calls; 0 where none has a padding mask."""
    return sum(int(shape[0]) * int(shape[1]) for call in calls for shape in call.masks())


# --- several batches --------------------------------------------------------------------------------------------------


def _put_together(calls: Sequence[Call], padding: Padding) -> list[Call]:
    """The samples of calls in as many calls of the same sizes, each with samples of like length.

    In an order that has nothing to do with the length: some of what reads them stops early. Calls whose samples cannot
    be exchanged are only cut off.
    """
    found = [spans(call) for call in calls]
    if len(calls) < 2 or any(list(of) != list(padding) for of in found) or not _are_alike(calls, found):
        return [_cut_off(call, padding) for call in calls]
    samples = [(b, r) for b, call in enumerate(calls) for r in range(call.batch_size)]
    lengths = [[(s.end - s.first).tolist() for s in of.values()] for of in found]
    samples.sort(key=lambda sample: sum(of[sample[1]] for of in lengths[sample[0]]))
    ends = [*itertools.accumulate(call.batch_size for call in calls)]
    groups = [samples[end - call.batch_size : end] for call, end in zip(calls, ends, strict=True)]
    Random(0).shuffle(groups)
    return [_gathered(calls, found, group, padding) for group in groups]


def _are_alike(calls: Sequence[Call], found: Sequence[Mapping[str, Span]]) -> bool:
    """Whether samples may change places: the same names, of tensors with the same features, padded on the same side."""
    first, names = calls[0], list(found[0])
    if any(list(c.kwargs) != list(first.kwargs) or len(c.args) != len(first.args) for c in calls):
        return False
    if any(not _one_side([of[name] for of in found]) for name in names):
        return False
    whole = [[*call.args, *(v for name, v in call.kwargs.items() if name not in names)] for call in calls]
    parts = [[call.kwargs[name] for name in names] for call in calls]
    return all(all(map(_fit, whole[0], other)) for other in whole) and all(
        all(a.shape[2:] == b.shape[2:] and a.dtype == b.dtype for a, b in zip(parts[0], other, strict=True))
        for other in parts
    )


def _one_side(of: Sequence[Span]) -> bool:
    return all(span.starts_alike for span in of) or all(span.ends_alike for span in of)


def _fit(first: Any, other: Any) -> bool:
    """Whether one sample of each may stand in one call, as far as they have samples."""
    if not isinstance(first, Tensor) or not isinstance(other, Tensor):
        return type(first) is type(other) and bool(first == other)
    if first.dim() == 0 or other.dim() == 0:
        return first.dim() == other.dim() and torch.equal(first, other)
    return first.shape[1:] == other.shape[1:] and first.dtype == other.dtype


def _gathered(
    calls: Sequence[Call], found: Sequence[Mapping[str, Span]], group: Sequence[Sample], padding: Padding
) -> Call:
    """One call of these samples, each tensor as long as the longest of them asks for."""
    kwargs = {
        name: _stack([call.kwargs[name] for call in calls], [of[name] for of in found], group, padding[name])
        if name in found[0]
        else _rows([call.kwargs[name] for call in calls], group)
        for name in calls[0].kwargs
    }
    args = tuple(_rows([call.args[place] for call in calls], group) for place in range(len(calls[0].args)))
    return Call(args, kwargs)


def _rows(values: Sequence[Any], group: Sequence[Sample]) -> Any:
    if not isinstance(values[0], Tensor) or not values[0].dim():
        return values[0]
    return torch.stack([values[batch][row] for batch, row in group])


def _stack(tensors: Sequence[Tensor], of: Sequence[Span], group: Sequence[Sample], padding: Tensor) -> Tensor:
    """(samples, longest of them, ...), aligned as they were."""
    at_start = all(span.starts_alike for span in of)
    length = max(int(of[batch].end[row] - of[batch].first[row]) for batch, row in group)
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
    found = spans(given)
    lengths = torch.stack([span.end - span.first for span in found.values()]).sum(0)
    shorter = lengths.argsort(stable=True)[: min(PROBED, -(-given.batch_size // 2))]
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


def _counted(call: Call) -> int:
    return sum(int(mask.sum()) for mask in call.masks().values())


def _at(value: Any, rows: Tensor) -> Any:
    return value[rows.to(value.device)] if isinstance(value, Tensor) and value.dim() else value


def _lengthened(call: Call, padding: Padding) -> Call:
    """The call with EXTRA positions of padding, where all samples are padded on one side."""
    longer = {}
    for name, span in spans(call).items():
        if span.starts_alike or span.ends_alike:
            rows = [_longer(row, EXTRA, padding[name], at_end=span.starts_alike) for row in call.kwargs[name]]
            longer[name] = torch.stack(rows)
    return Call(call.args, {**call.kwargs, **longer})


def _tolerance(model: nn.Module) -> float:
    is_half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()) or torch.is_autocast_enabled(
        device_of(model).type
    )
    return HALF_TOLERANCE if is_half else TOLERANCE


def _agree(answers: Sequence[Tensor], others: Sequence[Tensor], whole: Call, other: Call, tolerance: float) -> bool:
    """Whether two calls of the same samples were answered alike where it counts."""
    names = spans(whole)
    masks, shorter = whole.masks(), other.masks()
    pairs = {tuple(whole.kwargs[n].shape[:2]): tuple(other.kwargs[n].shape[:2]) for n in names}

    def counted(answer: Tensor, got: Tensor) -> tuple[Tensor, Tensor]:
        shape = tuple(answer.shape[:2])
        if shape in pairs and tuple(got.shape[:2]) == pairs[shape]:
            return answer[masks[shape].to(answer.device)], got[shorter[pairs[shape]].to(got.device)]
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
