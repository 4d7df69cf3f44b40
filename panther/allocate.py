"""A budget worked out for one model, and the plan that an allocator makes within it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace as changed
from functools import lru_cache
from typing import cast

from panther.allocators import ALLOCATORS, Allocator, Evaluate, Options
from panther.allocators.base import Divergence, total
from panther.chains import CHANNELS, CORRECTED, PIVOTED, WHOLE, dense_cost, stored_names
from panther.sizes import header_growth
from panther.spec import Budget, Capture, Choice, Cost, LayerSpec, Measured, Plan, Target

NOTHING_MEASURED = Measured()


def resolve(
    budget: Budget,
    capture: Capture,
    dtype_bytes: Mapping[str, int],
    measured: Measured = NOTHING_MEASURED,
) -> Target:
    """Absolute limits on the sketchable layers and on the whole model, and the line that says what they mean.

    dtype_bytes: bytes of one number of each sketchable layer. measured: of the dense model, as far as the budget's
    fields ask for it. The limit on bytes is one on options `in_file`. The layers' own limit on milliseconds needs
    theirs: see `with_layer_latency`.
    """
    dense = dense_total(capture.sketchable, dtype_bytes)
    rest = capture.model_params - dense.params
    params = _limit(budget.params, capture.model_params if budget.of == "model" else dense.params)
    if params is not None and budget.of == "model":
        params -= rest
    whole = _bytes_limit(budget.size_mb, capture.model_bytes)
    size = None if whole is None else whole - (capture.model_bytes - dense.size_bytes)
    peak = (
        None if measured.peak_memory_bytes is None else _bytes_limit(budget.peak_memory_mb, measured.peak_memory_bytes)
    )
    weights = None if peak is None else peak - (cast(int, measured.peak_memory_bytes) - dense.size_bytes)
    latency, share = _latency_limit(budget, measured)
    target = Target(
        params=params,
        flops=_limit(budget.flops, dense.flops),
        size_bytes=size,
        file_bytes=whole,
        weight_bytes=weights,
        model_latency_ms=latency,
        latency_share=share,
        peak_memory_bytes=peak,
        max_drop=budget.max_drop,
    )
    return changed(target, text="; ".join(_describe(target, dense, capture, measured)))


def with_layer_latency(target: Target, layers_ms: float, whole_ms: float) -> Target:
    """The target with the limit on the layers' milliseconds: what is to be saved, they must save.

    layers_ms, whole_ms: of the dense layers that can be sketched, all together, and of the whole dense model.
    """
    if target.model_latency_ms is None:
        return target
    return changed(target, latency_ms=layers_ms - (whole_ms - target.model_latency_ms))


def _limit(value: float | None, whole: int) -> int | None:
    if value is None:
        return None
    return int(value * whole) if isinstance(value, float) else value


def _latency_limit(budget: Budget, measured: Measured) -> tuple[float | None, float | None]:
    """Milliseconds that the whole model may take, and the share of the dense model's where the budget is one."""
    if budget.latency_ms is None or measured.latency_ms is None:
        return None, None
    if not isinstance(budget.latency_ms, str):
        return budget.latency_ms, None
    share = float(budget.latency_ms[:-1]) / 100
    return share * measured.latency_ms, share


def _bytes_limit(megabytes: float | str | None, dense: int) -> int | None:
    """Bytes that an amount in megabytes, or a percentage of the dense model's bytes, allows."""
    if megabytes is None:
        return None
    text = str(megabytes)
    return int(dense * float(text[:-1]) / 100 if text.endswith("%") else float(text) * 1e6)


def in_file(options: Options, capture: Capture) -> dict[str, tuple[Choice, ...]]:
    """The options with their bytes as the file grows by them: with the entries that they add to its header."""
    specs = {spec.name: spec for spec in capture.sketchable}
    return {
        name: tuple(_in_file(choice, specs[name], capture.model_bytes) for choice in choices)
        for name, choices in options.items()
    }


def _in_file(choice: Choice, spec: LayerSpec, file_bytes: int) -> Choice:
    of = spec, choice.scheme, choice.packing, choice.grid is not None, bool(choice.channels)
    growth = _header_growth(*of, file_bytes)
    return changed(choice, cost=choice.cost + Cost(size_bytes=growth)) if growth else choice


@lru_cache(maxsize=2**14)  # a few forms a layer, of a hundred options
def _header_growth(spec: LayerSpec, scheme: str, packing: str, is_whole: bool, is_narrow: bool, file_bytes: int) -> int:
    """Bytes of the header that a layer adds to in this form; is_whole: in whole numbers."""
    if scheme == "dense":
        return 0
    added: dict[str, int] = {}
    removed: dict[str, Sequence[int]] = {}
    if scheme != CHANNELS:
        added = dict.fromkeys(stored_names(scheme), 2 + len(spec.kernel_size))
        removed["weight"] = (spec.out_features, spec.fan_in // math.prod(spec.kernel_size), *spec.kernel_size)
    if is_whole:  # a weight is two tensors then
        added = {f"{name}.{part}": 2 for name in added for part in ("values", "scales")}
    gains_bias = not spec.has_bias and (is_narrow or scheme not in (WHOLE, CORRECTED))
    if packing == PIVOTED:
        added |= dict.fromkeys(("row_order", "column_order") if spec.kernel_size else ("column_order",), 1)
        removed |= {"bias": (spec.out_features,)} if spec.has_bias else {}
    if packing == PIVOTED or gains_bias:  # which makes the mean output right
        added["offset"] = 1
    return header_growth(
        {f"{spec.name}.{name}": dims for name, dims in added.items()},
        {f"{spec.name}.{name}": sizes for name, sizes in removed.items()},
        largest_size=max(spec.fan_in, spec.out_features),
        largest_offset=file_bytes,
    )


def _describe(target: Target, dense: Cost, capture: Capture, measured: Measured) -> Iterator[str]:
    if target.params is not None:
        rest = capture.model_params - dense.params
        yield (
            f"keep {millions(max(0, target.params))} of {millions(dense.params)} sketchable weights; "
            f"{millions(target.params + rest)} of {millions(capture.model_params)} in the whole model"
        )
    if target.flops is not None:
        yield f"keep {target.flops / 1e9:.3g} of {dense.flops / 1e9:.3g} GFLOPs of the sketchable layers"
    if target.file_bytes is not None and target.size_bytes is not None:
        yield (
            f"save at most {target.file_bytes / 1e6:.3g} of {capture.model_bytes / 1e6:.3g} MB; "
            f"{max(0, target.size_bytes) / 1e6:.3g} of {dense.size_bytes / 1e6:.3g} MB in sketchable weights"
        )
    if target.model_latency_ms is not None and measured.latency_ms is not None:
        share = "" if target.latency_share is None else f", {target.latency_share:.3g} of what the dense model takes"
        yield f"run in at most {target.model_latency_ms:.3g} of {measured.latency_ms:.3g} ms{share}"
    if target.peak_memory_bytes is not None and measured.peak_memory_bytes is not None:
        peak, before = target.peak_memory_bytes / 1e6, measured.peak_memory_bytes / 1e6
        yield f"need at most {peak:.3g} of {before:.3g} MB of memory"
    if target.max_drop is not None and measured.metric is not None:
        least = f"{measured.metric - target.max_drop:.4g} or more of {measured.metric:.4g}"
        yield f"lose at most {target.max_drop:.3g} of eval_fn, which stays at {least}"


def millions(count: int) -> str:
    """5.4 M, 740 k or 12: a count as people say it."""
    for unit, name in ((1_000_000_000, "G"), (1_000_000, "M"), (1_000, "k")):
        if abs(count) >= unit:
            return f"{count / unit:.3g} {name}"
    return str(count)


def dense_total(specs: Sequence[LayerSpec], dtype_bytes: Mapping[str, int]) -> Cost:
    return sum((dense_cost(spec, dtype_bytes[spec.name]) for spec in specs), Cost())


def allocate(
    options: Options,
    target: Target,
    capture: Capture,
    *,
    search: str | Allocator,
    divergence: Divergence,
    evaluate: Evaluate | None,
    budget: str,
    seed: int,
) -> Plan:
    """The plan of the named allocator (or of the user's own) for these options.

    Raises: ValueError unless the allocator answers with one of its options for each layer.
    """
    allocator = ALLOCATORS[search] if isinstance(search, str) else search
    chosen = allocator(options, target, divergence=divergence, evaluate=evaluate)
    name = search if isinstance(search, str) else getattr(search, "__name__", "custom")
    _check_answer(name, chosen, options)
    return Plan(tuple(_explained(c) for c in chosen), capture.fingerprint, name, budget, seed)


def _check_answer(allocator: str, chosen: Sequence[Choice], options: Options) -> None:
    if sorted(c.layer for c in chosen) != sorted(options):
        raise ValueError(
            f"the allocator {allocator} answered for {len(chosen)} layers where {len(options)} were asked: return one "
            "Choice for each layer of `options`"
        )
    for choice in chosen:
        if choice.kind not in {option.kind for option in options[choice.layer]}:
            raise ValueError(
                f"the allocator {allocator} gave {choice.layer!r} scheme {choice.scheme!r} at ranks {choice.ranks} "
                f"in packing {choice.packing!r}, which is none of its options: return one of options[{choice.layer!r}]"
            )


def _explained(choice: Choice) -> Choice:
    if choice.is_dense and not choice.reason:
        return Choice(**{**choice.__dict__, "reason": "kept dense: the budget allows it and its error would cost more"})
    return choice


def is_met(plan: Plan, target: Target) -> bool:
    return target.is_met_by(total(plan.choices))
