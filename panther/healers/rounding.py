"""A student's weights put on the grids of its plan, each in the norm of the inputs that it really gets.

As in the refit, both models walk through the same calls in lockstep: what a layer is rounded to makes up for part of
what the layers before it lost, and for what its own earlier links lost. From then on the layer is held to its grid.

Notation: x (rows, n) what a matrix W (m, n) gets where nothing was rounded, h (rows, n) what it gets.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # it is not in torch's list of names

from panther import chains
from panther.batches import Call
from panther.errors import one_line
from panther.healers.lockstep import Arrival, LeftStepError, Lockstep, Stretch, in_precision, stretches
from panther.healers.refit import (
    ANCHOR,
    MOST_FEATURES,
    RIDGE,
    ROWS_PER_FEATURE,
    Products,
    patches_of,
    places_in,
    rows_of,
)
from panther.nn import PivotedLayer, SketchedLayer
from panther.nn.on_grid import CorrectedLinear, corrected, hold
from panther.nn.packing import not_pivoted, pivoted
from panther.nn.surgery import put_layers
from panther.progress import Progress
from panther.quantise import Rounded, in_data_norm, incoherent, to_nearest
from panther.sketches import with_ridge
from panther.spec import Choice, Grid, LayerSpec

FEWEST_CALLS = 32  # that are looked at where they fit
LEFT_RIDGE = 1e-3  # of the mean variance of an input, for what is left to correct


@dataclass(frozen=True)
class _Link:
    """One weight of a layer: its name, as what it is applied, and the grid that it is to be on."""

    name: str
    link: chains.Link
    grid: Grid


@dataclass(frozen=True)
class _Found:
    """A layer of the student and the numbers of its weights."""

    name: str
    layer: nn.Module
    numbers: Sequence[tuple[str, Rounded]]
    has_unseen: bool = False  # whether some of them were rounded without looking at data
    remark: str | None = None


_Triple = tuple[Call, Arrival, Arrival]  # a call, and what the layer gets in both models


def round_layers(
    teacher: nn.Module,
    student: nn.Module,
    choices: Sequence[Choice],
    specs: Mapping[str, LayerSpec],
    calls: Sequence[Call],
    *,
    held_bytes: float = math.inf,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[str]:
    """Hold every layer that these choices quantise to its grid, in place; remarks on those that went without the data.

    choices: of layers that the student has as float ones (a chain, or the dense layer with all or fewer channels).
    calls: as many of them as `held_bytes` allow are held at one depth of both models at once. None: numbers are rounded
        each by itself.

    Where the calls part ways, or a module fails when it runs so, the layers that are left go without the data.
    """
    by_name = {choice.layer: choice for choice in choices if choice.grid is not None}
    walked = [name for name in by_name if specs[name].calls == 1] if calls else []
    done: list[str] = []
    blind: list[str] = []
    remarks: list[str] = []

    def wanted(name: str, numbers: int) -> int:
        rows = max(1, numbers // specs[name].out_features)
        return max(FEWEST_CALLS, math.ceil(ROWS_PER_FEATURE * specs[name].fan_in / rows))

    said: list[str] = []
    with torch.no_grad(), (progress or Progress(False)).bar("rounding") as bar:
        for walk in stretches(student, calls, walked, held_bytes, wanted) if walked else []:
            held, found = calls[: walk.calls], list[_Found]()
            try:
                for one in _walk(teacher, student, walk, held, by_name, specs, seed):
                    found.append(one)
                    done.append(one.name)
                    blind += [one.name] if one.has_unseen else []
                    remarks += [one.remark] if one.remark else []
                    bar(len(done) / len(by_name), one.name)
            except Exception as error:  # a user's module may raise anything, and the calls may part ways
                said.append(f"rounding stopped looking at the data: {one_line(error)}")
            _hold(student, found)  # a walk leaves the modules of a model as they were
            if said:
                break
        left = [name for name in by_name if name not in done]
        rest = [_round(student, student.get_submodule(n), by_name[n], specs[n], None, (), seed) for n in left]
        _hold(student, rest)
        remarks += [one.remark for one in rest if one.remark]
    if calls and left:
        said.append(f"{_listed(left)} {'was' if len(left) == 1 else 'were'} rounded without looking at data")
    if blind:
        said.append(
            f"{_listed(blind)}: weights that multiply more than {MOST_FEATURES:,} inputs at once, or whose layer pads "
            "with other numbers than zeros, were rounded without looking at data"
        )
    return said + remarks


def _listed(names: Sequence[str]) -> str:
    """ "a, b, c and 4 more"."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _walk(
    teacher: nn.Module,
    student: nn.Module,
    walk: Stretch,
    held: Sequence[Call],
    by_name: Mapping[str, Choice],
    specs: Mapping[str, LayerSpec],
    seed: int,
) -> Iterator[_Found]:
    """The layers of one stretch with their numbers in them, in execution order."""
    done: set[str] = set()
    with contextlib.ExitStack() as stack:
        dense = stack.enter_context(Lockstep(teacher, held, walk.stops))
        own = stack.enter_context(Lockstep(student, held, walk.stops))
        while (name := own.advance()) is not None:
            if dense.advance() != name or name in done:
                raise LeftStepError("the two models run their layers in different orders, or one twice")
            done.add(name)
            layer, given = student.get_submodule(name), list(zip(held, dense.arrivals, own.arrivals, strict=True))
            found = _round(student, layer, by_name[name], specs[name], teacher.get_submodule(name), given, seed)
            if isinstance(found.layer, CorrectedLinear):  # the calls that have stopped here still run the old layer
                stack.callback(layer.register_forward_hook(found.layer.add_to, with_kwargs=True).remove)
            yield found


def _round(
    student: nn.Module,
    layer: nn.Module,
    choice: Choice,
    spec: LayerSpec,
    dense: nn.Module | None,
    given: Sequence[_Triple],
    seed: int,
) -> _Found:
    """Put the numbers of a grid into one layer."""
    found: list[tuple[str, Rounded]] = []
    old, (layer, remark) = layer, _as_stored(layer, choice)
    links, has_unseen = _links(layer, choice, spec), False
    seen = None if dense is None else _products(layer, dense, links[0], found, spec, given, seed)
    if len(links) == 2 and not isinstance(layer, PivotedLayer):
        first, second = (cast(Tensor, getattr(layer, link.name)) for link in links)
        moment = seen.about_zero()[0] if seen is not None and seen.rows else None
        turned = incoherent(first.detach(), second.detach(), moment, seed)
        for weight, value in zip((first, second), turned, strict=True):
            weight.data.copy_(value)
    for link in links:
        is_first = link is links[0]
        products = seen if is_first or dense is None else _products(layer, dense, link, found, spec, given, seed)
        has_unseen = has_unseen or products is None or not products.rows
        weight = cast(Tensor, getattr(layer, link.name)).detach()
        rounded, wanted = _rounded(
            weight.flatten(1).double().cpu(), products, link.grid, weight.dtype, has_bias=layer.bias is not None
        )
        found.append((link.name, rounded))
        if layer.bias is not None and products is not None and products.rows:
            _keep_mean(layer, link, links, weight.flatten(1).double().cpu(), rounded.matrix().double(), products)
        if choice.scheme == chains.CORRECTED:
            sees_data = products is not None and products.rows
            lower = None
            if products is not None and sees_data:  # without a bias the mean is lost as well
                moments = products.about_zero() if layer.bias is None else products.covariances()
                lower = with_ridge(moments[0], LEFT_RIDGE)
            layer = corrected(cast(nn.Linear, layer), wanted - rounded.matrix().double(), choice.ranks[0], lower)
            put_layers(student, {choice.layer: layer})
            found.extend((name, to_nearest(getattr(layer, name).detach().cpu(), Grid(8))) for name in ("down", "up"))
    for name, rounded in found:
        weight = cast(Tensor, getattr(layer, name))
        weight.data.copy_(rounded.matrix().reshape(weight.shape))
    if isinstance(layer, PivotedLayer):
        _compute_as(cast(SketchedLayer, old), layer)
    return _Found(choice.layer, layer, found, has_unseen, remark)


def _as_stored(layer: nn.Module, choice: Choice) -> tuple[nn.Module, str | None]:
    """A chain without its identity where its Choice wants that; the chain and a remark where it would cost accuracy."""
    if choice.packing != chains.PIVOTED or not isinstance(layer, SketchedLayer):
        return layer, None
    try:
        return pivoted(layer, on_rows=True), None
    except ValueError as error:
        return layer, not_pivoted(choice, "it keeps its products", error)


def _compute_as(layer: SketchedLayer, new: PivotedLayer) -> None:
    """Let a layer of two products compute what its pivoted form does: calls that have stopped here still run it."""
    for name, weight in zip(layer._weight_names, new.active_weights(), strict=True):
        getattr(layer, name).data.copy_(weight)
    if layer.bias is not None and new.bias is not None:
        layer.bias.data.copy_(new.bias)


def _keep_mean(
    layer: nn.Module, link: _Link, links: Sequence[_Link], weight: Tensor, rounded: Tensor, products: Products
) -> None:
    """Let a layer's bias make up for what rounding one of its links does to the mean output.

    The norm of the data is about the mean. weight, rounded: (m, n), float64.
    """
    mean_x, mean_h = products.means()
    if not isinstance(layer, PivotedLayer) or chains.ROWS not in layer.sides:
        if link is links[-1]:
            cast(Tensor, layer.bias).data.add_((weight @ mean_x - rounded @ mean_h).to(layer.bias))  # type: ignore[arg-type]
        return
    # What pivots give is an output and goes on to the others, each with its part of the offset.
    offset, rank = cast(Tensor, layer.offset).data, layer.ranks[-1]
    if link.name == layer._weight_names[-2]:
        given = mean_h if link is links[0] else mean_x  # of the student, whose weight this is
        offset[:rank].add_((weight @ given - rounded @ mean_h).to(offset))
    elif link.name == layer._weight_names[-1]:
        given = mean_h + offset[:rank].double().cpu()  # as it is by now, which is as it was before the rounding
        offset[rank:].add_(((weight - rounded) @ given).to(offset))


def _hold(student: nn.Module, found: Sequence[_Found]) -> None:
    put_layers(student, {one.name: one.layer for one in found if student.get_submodule(one.name) is not one.layer})
    for one in found:
        for name, rounded in one.numbers:
            hold(one.layer, name, rounded)


def _links(layer: Any, choice: Choice, spec: LayerSpec) -> list[_Link]:
    """The float weights of a layer that are rounded after each other."""
    grid = cast(Grid, choice.grid)
    if choice.scheme in (chains.WHOLE, chains.CORRECTED):
        sizes = () if spec.kind == "linear" else (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        inputs, outputs = layer.weight.shape[1], layer.weight.shape[0]
        return [_Link("weight", chains.Link(inputs, outputs, *sizes), grid)]
    parts = zip(layer._weight_names, layer._links, strict=True)
    return [_Link(name, link, grid) for name, link in parts if link.params]


def _rounded(
    weight: Tensor, products: Products | None, grid: Grid, dtype: torch.dtype, *, has_bias: bool
) -> tuple[Rounded, Tensor]:
    """A matrix on a grid, and what it stands for: the matrix that does best on the inputs that it gets."""
    if products is None or not products.rows:
        return to_nearest(weight, grid, dtype=dtype), weight
    own, cross = products.covariances() if has_bias else products.about_zero()
    scale = float(own.diagonal().mean()) or 1.0
    ridge = RIDGE * scale * torch.eye(len(own), dtype=torch.float64)
    try:
        target = weight @ ((1 - ANCHOR) * own + ANCHOR * cross + ridge)
        solved = torch.cholesky_solve(target.T, with_ridge(own + ridge, 0.0)).T
        return in_data_norm(solved, own, grid, dtype), solved
    except LinAlgError:  # inputs that are not finite, or all the same
        return to_nearest(weight, grid, dtype=dtype), weight


def _products(
    layer: Any,
    dense: nn.Module,
    link: _Link,
    before: Sequence[tuple[str, Rounded]],
    spec: LayerSpec,
    given: Sequence[_Triple],
    seed: int,
) -> Products | None:
    """Second moments of what a weight gets and should get; None where it sees too much at once."""
    fan_in = link.link.params // link.link.out_channels
    if fan_in > MOST_FEATURES or getattr(layer, "padding_mode", "zeros") != "zeros":
        return None
    products, enough = Products(), max(64, math.ceil(ROWS_PER_FEATURE * fan_in / max(1, len(given))))
    rounded = {name: part.matrix() for name, part in before}
    for call, x, h in given:
        inner = _before(layer, link, h, {})
        if before:  # what the links before this one lost is to be made up for, whatever the teacher gets
            pair = inner, _before(layer, link, h, rounded)
        elif cast(Tensor, x.first).shape == inner.shape:
            pair = x.first, inner
        else:  # fewer channels than the teacher's
            pair = inner, inner
        if spec.kind == "linear":
            products.add(*rows_of(call, *pair, enough=enough, seed=seed))
            continue
        batch = [t if t.dim() == 2 + len(spec.kernel_size) else t.unsqueeze(0) for t in pair]
        views = [patches_of(t, link.link) for t in batch]
        places = places_in(views[0].shape[: 1 + len(spec.kernel_size)], seed, enough, views[0].device)
        products.add(*(view[places].flatten(1).float().cpu() for view in views))
    return products


def _before(layer: Any, link: _Link, arrival: Arrival, rounded: Mapping[str, Tensor]) -> Tensor:
    """What comes to a link of a layer, with some of the links before it rounded."""
    inner = cast(Tensor, arrival.first)
    if not isinstance(layer, SketchedLayer):
        return inner
    if isinstance(layer, PivotedLayer):
        stand_ins = {name: rounded[name].reshape(getattr(layer, name).shape).to(inner) for name in rounded}
        with in_precision(arrival.precision):
            return layer.given_to(link.name, inner, stand_ins)
    apply: Callable[..., Tensor] = _multiplied if layer._shape.kernel_size == () else cast(Any, layer).CONVOLVE
    with in_precision(arrival.precision):
        for name, part in zip(layer._weight_names, layer._links, strict=True):
            if name == link.name:
                break
            own = cast(Tensor, getattr(layer, name))
            weight = rounded[name].reshape(own.shape).to(own) if name in rounded else own
            inner = apply(inner, weight, None, part.stride, part.padding, part.dilation)
    return inner


def _multiplied(inner: Tensor, weight: Tensor, *_: object) -> Tensor:
    return nn.functional.linear(inner, weight)
