"""The sketched layers solved again in execution order, each on the inputs that it really gets: no gradient steps.

A layer behind other sketched layers sees inputs that differ from those it was decomposed for. Both models walk through
the same calibration calls in lockstep; at each sketched layer the best factors for the student's own inputs are
computed in closed form and put in before the walk goes on. Cost: a forward pass of each model and the products of rows.

Notation: x (rows, n) what the dense layer gets, h (rows, n) what the sketched one gets, both less their means; W (m, n)
the dense weight; G (m, m) how strongly the model's output reacts to each direction of the layer's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # it is not in torch's list of names

from panther.batches import Call, masked_rows
from panther.factors import dense_weight
from panther.healers.lockstep import Arrival, LeftStepError, Lockstep, in_precision, stretches
from panther.nn import SketchedLayer
from panther.nn.narrow import sizes_of
from panther.products import add_sums, gram, mirrored, product
from panther.progress import Progress
from panther.sketches import with_ridge
from panther.spec import LayerSpec

# The target mixes what the dense layer makes of the student's input with what it makes of its own: the second part
# undoes errors of earlier layers. On MiniLM at half the FLOPs, 512 texts, cosine: 0 .899, 0.25 .912, 0.5 .914, 1 .899.
ANCHOR = 0.5
# Of the mean variance of an input, towards the dense weight. Same setting: 0.001 .9147, 0.01 .9150, 0.03 .9156.
RIDGE = 0.03
SENSITIVITY_RIDGE = 0.2
FEWEST_CALLS = 64  # that are fitted to where they fit, however many rows each has: the rows of one are alike
HELD_OUT_EVERY = 8  # one call in so many is not fitted to, and decides whether the new factors stay
ROWS_PER_FEATURE = 64  # rows that are fitted to: more change nothing
NARROW_ROWS = 24  # the same for a layer with fewer channels, whose inputs are the widest
MOST_FEATURES = 4096  # a Gram matrix of more costs more than it gives
MOST_NUMBERS = 100_000_000  # in the rows that the last link of a convolution is fitted to
RELU_ROUNDS = 3  # of solving and setting the target anew


@dataclass(frozen=True)
class Refitted:
    """Which layers took new factors, and why others did not."""

    accepted: tuple[str, ...]
    kept: Mapping[str, str]  # layer -> reason


@dataclass
class Products:
    """Sums over rows of both models' inputs: means and products, shifted by the first rows' mean."""

    rows: int = 0
    shift: tuple[Tensor, Tensor] = (torch.zeros(0), torch.zeros(0))
    totals: list[Tensor] = field(default_factory=list)
    own: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))  # sum of h h^T, its lower half
    cross: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))  # sum of x h^T

    def add(self, x: Tensor, h: Tensor) -> None:
        if not len(h):
            return
        if not self.rows:
            self.shift = x.mean(0), h.mean(0)
            self.totals = [torch.zeros(t.shape[1], dtype=torch.float64) for t in (x, h)]
            self.own, self.cross = (torch.zeros(t.shape[1], h.shape[1], dtype=torch.float64) for t in (h, x))
        x, h = x - self.shift[0], h - self.shift[1]
        self.rows += len(h)
        add_sums(self.totals[0], None, x)
        add_sums(self.totals[1], self.own, h)
        self.cross += product(x.T, h)

    def means(self) -> tuple[Tensor, Tensor]:
        mean_x, mean_h = (t / self.rows + s for t, s in zip(self.totals, self.shift, strict=True))
        return mean_x, mean_h

    def covariances(self) -> tuple[Tensor, Tensor]:
        """E[h h^T] and E[x h^T] about the means."""
        x, h = (t / self.rows for t in self.totals)
        own = mirrored(self.own) / self.rows
        return own - torch.outer(h, h), self.cross / self.rows - torch.outer(x, h)

    def about_zero(self) -> tuple[Tensor, Tensor]:
        """E[h h^T] and E[x h^T] as they are, for a layer that has no bias to set the means right with."""
        (own, cross), (x, h) = self.covariances(), self.means()
        return own + torch.outer(h, h), cross + torch.outer(x, h)


def refit(
    teacher: nn.Module,
    student: nn.Module,
    calls: Sequence[Call],
    specs: Sequence[LayerSpec],
    sensitivities: Mapping[str, Tensor],
    *,
    relu_after: Mapping[str, str] | None = None,
    narrow: Mapping[str, nn.Module] | None = None,
    held_bytes: float = math.inf,
    seed: int = 0,
    progress: Progress | None = None,
) -> Refitted:
    """Better factors for every sketched layer of the student, in place.

    calls: as many of them as `held_bytes` allow are held at one depth of both models at once.
    specs: the sketched layers, in execution order.
    sensitivities: G by layer ((n, n) W^T G W where m > n), as panther.sketches.Seen has it, of the outputs that are
        left where a layer gives fewer; a layer without one weighs all outputs alike.
    relu_after: layers whose output goes into a ReLU only, which has to be right only where that lets it pass; with the
        name of the BatchNorm between, or "".
    narrow: layers that have fewer channels, as they were before they were sketched. What such a layer makes of the
        student's input stands for what the dense one would.

    Raises: LeftStepError when the calls run through different layers, or through one twice.
    Source: sequential reduced-rank regression as in AA-SVD; the nonlinear target of Zhang et al., TPAMI 38 (2016).
    """
    fitted = [s for s in specs if s.calls == 1]
    kept = {s.name: "it runs more than once in a forward pass" for s in specs if s.calls != 1}
    accepted: list[str] = []
    by_name, norms = {spec.name: spec for spec in fitted}, relu_after or {}

    def solve(name: str, held: Sequence[Call], x: Sequence[Arrival], h: Sequence[Arrival]) -> str | None:
        spec, own_layer = by_name[name], cast(SketchedLayer, student.get_submodule(name))
        gate = gate_of(teacher, norms[name], spec) if name in norms else None
        dense_layer, local = teacher.get_submodule(name), (narrow or {}).get(name)
        known = sensitivities.get(name)
        layer = _Layer(spec, dense_layer, own_layer, dense_layer if local is None else local, known, gate, seed)
        if local is not None and sizes_of(local)[1] < spec.out_features:  # only part of the outputs is wanted
            layer = changed(layer, dense=local, gate=None)
        return _refit_layer(layer, held, x, h)

    def wanted(name: str, numbers: int) -> int:
        rows = max(1, numbers // by_name[name].out_features)
        fitted_rows = rows * (HELD_OUT_EVERY - 1) / HELD_OUT_EVERY
        return max(FEWEST_CALLS, math.ceil(ROWS_PER_FEATURE * by_name[name].fan_in / fitted_rows))

    walks = stretches(student, calls, list(by_name), held_bytes, wanted)
    with torch.no_grad(), (progress or Progress(False)).bar("refitting") as bar:
        for walk in walks:
            held = calls[: walk.calls]
            with Lockstep(teacher, held, walk.stops) as dense, Lockstep(student, held, walk.stops) as own:
                while (name := own.advance()) is not None:
                    if dense.advance() != name:
                        raise LeftStepError("the two models run their layers in different orders")
                    if name in accepted or name in kept:  # the second inputs would undo what the first ones gave
                        raise LeftStepError(f"{name} runs more than once in some batches")
                    bar(len({*accepted, *kept}) / len(specs), name)
                    reason = solve(name, held, dense.arrivals, own.arrivals)
                    if reason is None:
                        accepted.append(name)
                    else:
                        kept[name] = reason
    return Refitted(tuple(accepted), kept)


@dataclass(frozen=True)
class Gate:
    """What a ReLU behind a layer lets pass: outputs above their threshold, or below it where the sign is -1."""

    threshold: Tensor  # (m,), float64
    sign: Tensor  # (m,)

    def passed(self, rows: Tensor) -> Tensor:
        """What is left of (rows, m), in the layer's own units and counted from the threshold."""
        threshold, sign = self.threshold.to(rows), self.sign.to(rows)
        return sign * (sign * (rows - threshold)).relu()

    def wanted(self, target: Tensor, got: Tensor) -> Tensor:
        """What the output should be: the target where that passes, else anything that does not, best what it is.

        Source: Zhang, Zou, He, Sun, TPAMI 38 (2016), with the penalty at infinity.
        """
        threshold, sign = self.threshold.to(target), self.sign.to(target)
        passes = [sign * (rows - threshold) > 0 for rows in (target, got)]
        return torch.where(passes[0], target, torch.where(passes[1], threshold, got))


NEVER = 1e30  # a threshold that nothing reaches, and float32 can hold


def gate_of(model: nn.Module, norm: str, spec: LayerSpec) -> Gate:
    """The gate of a ReLU behind a layer, or behind the BatchNorm of this name behind it (in evaluation mode).

    That is open where weight * (y - mean) / sqrt(variance + eps) + bias > 0.
    """
    if not norm:
        zeros = torch.zeros(spec.out_features, dtype=torch.float64)
        return Gate(zeros, torch.ones_like(zeros))
    module: Any = model.get_submodule(norm)
    mean, spread = module.running_mean.double().cpu(), (module.running_var.double().cpu() + module.eps).sqrt()
    weight, bias = (
        torch.full_like(mean, otherwise) if given is None else given.detach().double().cpu()
        for given, otherwise in ((module.weight, 1.0), (module.bias, 0.0))
    )
    threshold = torch.where(weight != 0, mean - bias * spread / weight, NEVER).clamp(-NEVER, NEVER)
    return Gate(threshold, torch.where(weight < 0, -1.0, 1.0))


@dataclass(frozen=True)
class _Layer:
    """One layer in both models, and what is known of it."""

    spec: LayerSpec
    dense: nn.Module
    sketched: SketchedLayer  # or a dense one that has fewer channels
    local: nn.Module  # what stands for the dense layer on the student's inputs: it reads as many
    sensitivity: Tensor | None
    gate: Gate | None
    seed: int

    @property
    def is_narrowed(self) -> bool:
        """Whether the student's layer is a dense one with fewer channels, which is solved for as a matrix."""
        return not isinstance(self.sketched, SketchedLayer)

    @property
    def is_pointwise(self) -> bool:
        """Whether the layer multiplies one matrix with every row of its input."""
        return self.spec.kind == "linear" or (
            math.prod(self.spec.kernel_size) == 1
            and not any(self.spec.padding if not isinstance(self.spec.padding, str) else ())
        )


def _refit_layer(layer: _Layer, calls: Sequence[Call], dense: Sequence[Arrival], own: Sequence[Arrival]) -> str | None:
    """New factors for one layer; the reason when it keeps those it has."""
    solvers: list[Callable[[_Layer, Sequence[_Pair]], str | None]] = []
    if layer.is_pointwise and layer.spec.fan_in <= MOST_FEATURES:
        solvers.append(_solve_narrowed if layer.is_narrowed else _solve_pointwise)
    if not layer.is_narrowed and (layer.gate is not None or not solvers):
        solvers.append(_solve_last_link)
    if not solvers:
        return f"its {layer.spec.fan_in} inputs are too many for a regression"
    checked = [i for i in range(len(calls)) if i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1] if len(calls) > 1 else [0]
    checked = checked or [len(calls) - 1]
    fitted = [i for i in range(len(calls)) if i not in checked] or checked
    pairs, checks = ([(calls[i], dense[i], own[i]) for i in part] for part in (fitted, checked))
    old = _held_out_error(layer, checks)
    reasons = []
    for solve in solvers:
        reason, old = _improve(layer, solve, pairs, checks, old)
        reasons.append(reason)
    return None if None in reasons else reasons[-1]


def _improve(
    layer: _Layer, solve: Callable[..., str | None], pairs: Sequence[_Pair], checks: Sequence[_Pair], old: float
) -> tuple[str | None, float]:
    """Let one solver try: the reason when its factors were not taken, and the held-out error, which was `old`."""
    before = _state(layer.sketched)
    try:
        reason = solve(layer, pairs)
    except LinAlgError as error:
        reason = f"its inputs are degenerate ({str(error).splitlines()[0][:80]})"
    if reason is not None:
        _restore(layer.sketched, before)
        return reason, old
    new = _held_out_error(layer, checks)
    if not new < old:  # also NaN
        _restore(layer.sketched, before)
        return f"new factors did not help on held-out batches ({old:.3g} -> {new:.3g})", old
    return None, new


def _state(layer: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in layer.parameters()]


def _restore(layer: nn.Module, state: Sequence[Tensor]) -> None:
    for parameter, value in zip(layer.parameters(), state, strict=True):
        parameter.data.copy_(value)


_Pair = tuple[Call, Arrival, Arrival]  # a call, and what the layer gets in both models


def _held_out_error(layer: _Layer, pairs: Sequence[_Pair]) -> float:
    """||y - y'||^2 of both layers' outputs, in the directions that the model's output reacts to."""
    factor = None
    if layer.sensitivity is not None and len(layer.sensitivity) == len(dense_weight(layer.dense)):
        factor = with_ridge(layer.sensitivity.double(), SENSITIVITY_RIDGE).float()
    lost = 0.0
    for call, x, h in pairs:
        outputs = (_channels_last(layer, y) for y in (x.run(layer.dense), h.run(layer.sketched)))
        target, got = (masked_rows(y.float().cpu(), _cpu_masks(call)) for y in outputs)
        if layer.gate is not None:
            target, got = layer.gate.passed(target), layer.gate.passed(got)
        error = (got - target).float()
        lost += float((error if factor is None else error @ factor).square().sum())
    return lost


def _cpu_masks(call: Call) -> dict[tuple[int, ...], Tensor]:
    return {shape: mask.cpu() for shape, mask in call.masks().items()}


def _channels_last(layer: _Layer, tensor: Tensor) -> Tensor:
    return tensor if layer.spec.kind == "linear" else tensor.movedim(-1 - len(layer.spec.kernel_size), -1)


def _rows(layer: _Layer, call: Call, *tensors: Tensor, enough: int) -> list[Tensor]:
    """Tensors with the features last as (rows, features) in float32 on the CPU: the same random rows of each."""
    return rows_of(call if layer.spec.kind == "linear" else None, *tensors, enough=enough, seed=layer.seed)


def rows_of(call: Call | None, *tensors: Tensor, enough: int, seed: int) -> list[Tensor]:
    """The same without a layer; call: whose padding is left out."""
    masks = {} if call is None else _cpu_masks(call)
    rows = [masked_rows(tensor.float().cpu(), masks) for tensor in tensors]
    if len(rows[0]) > enough:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(rows[0]), generator=generator)[:enough]
        rows = [r[chosen] for r in rows]
    return rows


# --- one matrix for every row: reduced-rank regression ---------------------------------------------------------------


def _products(layer: _Layer, pairs: Sequence[_Pair], rows_per_feature: int) -> Products:
    products = Products()
    enough = max(64, math.ceil(rows_per_feature * layer.spec.fan_in / len(pairs)))
    for call, x, h in pairs:
        both = (_channels_last(layer, _read(layer, arrival.first)) for arrival in (x, h))
        products.add(*_rows(layer, call, *both, enough=enough))
    return products


def _solve_narrowed(layer: _Layer, pairs: Sequence[_Pair]) -> str | None:
    """The matrix for the channels that are left, of a layer that reads or gives fewer."""
    products = _products(layer, pairs, NARROW_ROWS)
    if products.rows == 0:
        return "no row of the calibration data reaches it"
    narrow: Any = layer.sketched
    weight, now = (dense_weight(module).flatten(1).double().cpu() for module in (layer.dense, layer.local))
    own, cross = products.covariances()
    ridge = RIDGE * (float(own.diagonal().mean()) or 1.0) * torch.eye(len(own), dtype=torch.float64)
    if narrow.bias is None:
        own, cross = products.about_zero()
    target = (1 - ANCHOR) * now @ own + ANCHOR * weight @ cross + now @ ridge
    solved = torch.cholesky_solve(target.T, with_ridge(own + ridge, 0.0)).T
    mean_x, mean_h = products.means()
    bias = weight @ mean_x - solved @ mean_h
    if layer.dense.bias is not None:
        bias = bias + cast(Tensor, layer.dense.bias).detach().double().cpu()
    if not all(bool(torch.isfinite(t).all()) for t in (solved, bias)):
        return "the regression gave values that are not finite"
    narrow.weight.data.copy_(solved.reshape(narrow.weight.shape))
    if narrow.bias is not None:
        narrow.bias.data.copy_(bias)
    return None


def _solve_pointwise(layer: _Layer, pairs: Sequence[_Pair]) -> str | None:
    products = _products(layer, pairs, ROWS_PER_FEATURE)
    if products.rows == 0:
        return "no row of the calibration data reaches it"
    weight = dense_weight(layer.dense).flatten(1).double().cpu()
    rank = layer.sketched.rank
    local = None if layer.local is layer.dense else dense_weight(layer.local).flatten(1).double().cpu()
    up, down = regression(weight, *products.covariances(), layer.sensitivity, rank, local=local)
    mean_x, mean_h = products.means()
    bias = weight @ mean_x - up @ (down @ mean_h)
    own = getattr(layer.dense, "bias", None)
    return _put(layer, (down, up), bias if own is None else bias + own.detach().double().cpu())


def _read(layer: _Layer, given: Tensor) -> Tensor:
    """The positions of the input that a pointwise layer reads: a stride leaves others out."""
    if layer.spec.kind == "linear":
        return given
    read: tuple[Any, ...] = (..., *(slice(None, None, step) for step in layer.spec.stride))
    return given[read]


def regression(
    weight: Tensor,
    own: Tensor,
    cross: Tensor,
    sensitivity: Tensor | None,
    rank: int,
    *,
    local: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The factors of least ||G^1/2 (W ((1 - a) h + a x) - up down h)||^2, ridged towards W; a is ANCHOR.

    local: (m, n) what stands for W on the student's inputs, of which there may be fewer than W reads.

    Shapes: weight (m, n), own = E[h h^T] (n, n), cross = E[x h^T] (n, n) -> up (m, rank), down (rank, n); float64.
    Raises: torch.linalg.LinAlgError when the products are not finite.
    """
    m, n = len(weight), len(own)
    scale = float(own.diagonal().mean())
    ridge = RIDGE * (scale if scale > 0 else 1.0) * torch.eye(n, dtype=torch.float64)
    lower = with_ridge(own + ridge, 0.0)
    if local is not None:
        of_outputs = sensitivity is not None and len(sensitivity) == m
        metric = with_ridge(sensitivity.double(), SENSITIVITY_RIDGE) if sensitivity is not None and of_outputs else None
        return _truncated(local @ ((1 - ANCHOR) * own + ridge) + ANCHOR * weight @ cross, lower, metric, rank)
    target = (1 - ANCHOR) * own + ANCHOR * cross + ridge  # W target = E[y h^T], ridged
    if m <= n:
        metric = None if sensitivity is None else with_ridge(sensitivity.double(), SENSITIVITY_RIDGE)
        left, right = _truncated(weight @ target, lower, metric, rank)
        return left, right
    squared = weight.T @ weight
    known = squared
    if sensitivity is not None:
        seen = sensitivity.double()
        seen = weight.T @ seen @ weight if len(seen) == m else seen  # a convolution's is (m, m) whatever its inputs
        known = (seen + SENSITIVITY_RIDGE * squared) / (1 + SENSITIVITY_RIDGE)
    left, right = _truncated(target, lower, with_ridge(known, 1e-6), rank)
    return weight @ left, right


def _truncated(target: Tensor, lower: Tensor, metric: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """left right of this rank, nearest to target (L L^T)^-1 in the norms of metric K K^T and L L^T."""
    whitened = torch.linalg.solve_triangular(lower, target.T, upper=False).T
    if metric is not None:
        whitened = metric.T @ whitened
    u, s, vh = _leading(whitened, rank)
    left = u * s.sqrt()
    right = s.sqrt()[:, None] * torch.linalg.solve_triangular(lower.T, vh.T, upper=True).T
    if metric is not None:
        left = torch.linalg.solve_triangular(metric.T, left, upper=True)
    return left, right


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets, from an eigendecomposition of the smaller side: several times faster."""
    m, n = matrix.shape
    if m > n:
        v, s, ut = _leading(matrix.T, rank)
        return ut.T, s, v.T
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    u = vectors.flip(1)[:, :rank]
    s = values.flip(0)[:rank].clamp_min(0).sqrt()
    vh = (u.T @ matrix) / s.clamp_min(float(s.max()) * 1e-7 + 1e-300)[:, None]
    return u, s, vh


# --- convolutions: the last link of the chain, by least squares ------------------------------------------------------


def _solve_last_link(layer: _Layer, pairs: Sequence[_Pair]) -> str | None:
    """A new last link for what the links before it give, ReLU or not.

    One that sees too much for a regression is multiplied by a matrix (outputs, outputs) instead, the best there is.
    """
    sketched, m = layer.sketched, layer.spec.out_features
    link, up = sketched._links[-1], sketched.up.detach().flatten(1).double().cpu()
    sees_outputs = up.shape[1] > MOST_FEATURES or getattr(sketched, "padding_mode", "zeros") != "zeros"
    start = torch.eye(m, dtype=torch.float64) if sees_outputs else up
    features = start.shape[1]
    if features > MOST_FEATURES:
        return f"its {features} outputs are too many for a regression"
    rows = min(ROWS_PER_FEATURE * features, MOST_NUMBERS // (features + m))
    enough = max(64, math.ceil(rows / len(pairs)))
    rows_of = _output_rows if sees_outputs else _link_rows
    inputs, targets = (
        torch.cat(part) for part in zip(*(rows_of(layer, *pair, enough=enough) for pair in pairs), strict=True)
    )
    if not len(inputs):
        return "no row of the calibration data reaches it"
    weight, bias = _least_squares(inputs, targets, start, layer.gate)
    if sees_outputs:  # which have the bias in them already
        bias = bias if sketched.bias is None else bias + weight @ sketched.bias.detach().double().cpu()
        weight = weight @ up
    kept = [getattr(sketched, name).detach() for name in sketched._weight_names[:-1]]
    return _put(layer, (*kept, weight.reshape(m, *link.weight_shape[1:])), bias)


def _least_squares(inputs: Tensor, targets: Tensor, start: Tensor, gate: Gate | None) -> tuple[Tensor, Tensor]:
    """The weight and the bias that make targets (rows, m) of inputs (rows, n), ridged towards `start` (m, n); float64.

    With a gate, only what passes has to be right. The inputs are overwritten.
    """
    mean_in = inputs.mean(0, dtype=torch.float64)
    centred = inputs.sub_(mean_in.float())
    own = gram(centred).double() / len(centred)
    ridge = RIDGE * (float(own.diagonal().mean()) or 1.0)
    lower = with_ridge(own + ridge * torch.eye(len(own), dtype=torch.float64), 0.0)
    weight, wanted = start, targets
    for _ in range(RELU_ROUNDS):
        mean_out = wanted.mean(0, dtype=torch.float64)
        cross = product(wanted.sub(mean_out.float()).T, centred).double() / len(centred) + ridge * weight
        weight = torch.cholesky_solve(cross.T, lower).T
        if gate is None:
            break
        wanted = gate.wanted(targets, centred @ weight.T.float() + mean_out.float())
    return weight, mean_out - weight @ mean_in


def _link_rows(layer: _Layer, call: Call, x: Arrival, h: Arrival, *, enough: int) -> tuple[Tensor, Tensor]:
    """What the last link gets in the student, (rows, channels * kernel), and what should come out of it (rows, m)."""
    sketched = layer.sketched
    with in_precision(h.precision):
        inner = h.first
        if layer.spec.kind == "linear":
            inputs, targets = _rows(
                layer, call, nn.functional.linear(inner, sketched.down), _wanted(layer, x, h), enough=enough
            )
            return inputs, targets
        for link, weight in list(zip(sketched._links, sketched.active_weights(), strict=True))[:-1]:
            inner = cast(Any, sketched).CONVOLVE(inner, weight, None, link.stride, link.padding, link.dilation)
    patches, dims = patches_of(_with_batch(layer, inner), sketched._links[-1]), len(layer.spec.kernel_size)
    places = places_in(patches.shape[: 1 + dims], layer.seed, enough, inner.device)
    target = _with_batch(layer, _wanted(layer, x, h)).movedim(1, -1)
    return patches[places].flatten(1).float().cpu(), target[places].float().cpu()


def _output_rows(layer: _Layer, call: Call, x: Arrival, h: Arrival, *, enough: int) -> tuple[Tensor, Tensor]:
    """What comes out of the sketched layer and what should, (rows, m) both."""
    outputs = (_channels_last(layer, y) for y in (h.run(layer.sketched), _wanted(layer, x, h)))
    inputs, targets = _rows(layer, call, *outputs, enough=enough)
    return inputs, targets


def _wanted(layer: _Layer, x: Arrival, h: Arrival) -> Tensor:
    """What should come out of the layer: see ANCHOR."""
    own, given = h.first, x.first
    if layer.local is layer.dense and own.shape == given.shape and own.dtype == given.dtype == torch.float32 and h.args:
        # A dense layer of a mixture is the mixture of what it gives.
        between = changed(h, args=((1 - ANCHOR) * own + ANCHOR * given, *h.args[1:]))
        return cast(Tensor, between.run(layer.dense))
    target: Tensor = (1 - ANCHOR) * h.run(layer.local) + ANCHOR * x.run(layer.dense)
    return target


def _with_batch(layer: _Layer, tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(0) if tensor.dim() == 1 + len(layer.spec.kernel_size) else tensor


def places_in(sizes: Sequence[int], seed: int, most: int, device: torch.device) -> tuple[Tensor, ...]:
    """Random places in an array of these sizes, the same every time; all of them where there are few."""
    count = math.prod(sizes)
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most]
    return torch.unravel_index(chosen.to(device), tuple(sizes))


def patches_of(inner: Tensor, link: Any) -> Tensor:
    """(N, channels, *positions) as a view (N, *output positions, channels, *kernel): what the kernel lies on."""
    kernel, dims = link.kernel_size, len(link.kernel_size)
    views = nn.functional.pad(inner, _amounts(link))
    for axis in range(dims):  # one more dimension a kernel axis, at the end
        span = link.dilation[axis] * (kernel[axis] - 1) + 1
        views = views.unfold(2 + axis, span, link.stride[axis])[..., :: link.dilation[axis]]
    return views.permute(0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))


def _amounts(link: Any) -> list[int]:
    """What F.pad must add, last axis first."""
    amounts: list[int] = []
    for axis in reversed(range(len(link.kernel_size))):
        span = link.dilation[axis] * (link.kernel_size[axis] - 1)
        if isinstance(link.padding, str):
            whole = span if link.padding == "same" else 0
            amounts += [whole // 2, whole - whole // 2]
        else:
            amounts += [link.padding[axis]] * 2
    return amounts


# --- putting the solution in ------------------------------------------------------------------------------------------


def _put(layer: _Layer, weights: Sequence[Tensor], bias: Tensor) -> str | None:
    """Write the links' weights and the bias into the sketched layer; the reason when they are unusable."""
    sketched = layer.sketched
    if not all(bool(torch.isfinite(t).all()) for t in (*weights, bias)):
        return "the regression gave values that are not finite"
    if sketched.bias is None:
        return "it has no bias to correct"
    for name, weight in zip(sketched._weight_names, weights, strict=True):
        target = getattr(sketched, name)
        target.data.copy_(weight.reshape(target.shape))
    sketched.bias.data.copy_(bias)
    return None
