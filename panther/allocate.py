"""A budget worked out for one model, and the plan that an allocator makes within it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from panther.allocators import ALLOCATORS, Allocator, Evaluate, Options
from panther.allocators.base import Divergence, total
from panther.chains import dense_cost
from panther.sizes import header_reserve
from panther.spec import Budget, Capture, Choice, Cost, LayerSpec, Plan, Target


def resolve(budget: Budget, capture: Capture, dtype_bytes: Mapping[str, int]) -> Target:
    """Absolute limits on the sketchable layers, and the line that says what they mean in both scopes.

    dtype_bytes: bytes of one number of each sketchable layer.
    """
    dense = dense_total(capture.sketchable, dtype_bytes)
    rest = capture.model_params - dense.params
    params = _limit(budget.params, capture.model_params if budget.of == "model" else dense.params)
    if params is not None and budget.of == "model":
        params -= rest
    flops = _limit(budget.flops, dense.flops)
    whole = _file_limit(budget, capture)
    size = None if whole is None else whole - (capture.model_bytes - dense.size_bytes) - _header_growth(capture)
    return Target(params, flops, size, _describe(params, flops, whole, size, dense, rest, capture), whole)


def _limit(value: float | None, whole: int) -> int | None:
    if value is None:
        return None
    return int(value * whole) if isinstance(value, float) else value


def _file_limit(budget: Budget, capture: Capture) -> int | None:
    """Bytes that the saved file may take."""
    if budget.size_mb is None:
        return None
    text = str(budget.size_mb)
    return int(capture.model_bytes * float(text[:-1]) / 100 if text.endswith("%") else float(text) * 1e6)


def _header_growth(capture: Capture) -> int:
    """The most by which the header of the file can grow: the entries that every layer may have once it is sketched."""
    added = {}
    largest = 0
    for spec in capture.sketchable:
        names = ["down", "up", *(["core"] if spec.kernel_size else [])]
        added.update({f"{spec.name}.{name}": 2 + len(spec.kernel_size) for name in names})
        if not spec.has_bias:  # sketching adds one, which makes the mean output right
            added[f"{spec.name}.bias"] = 1
        largest = max(largest, spec.fan_in, spec.out_features)
    return header_reserve(added, largest_size=largest, largest_offset=capture.model_bytes)


def _describe(
    params: int | None,
    flops: int | None,
    whole: int | None,
    size: int | None,
    dense: Cost,
    rest: int,
    capture: Capture,
) -> str:
    parts = []
    if params is not None:
        parts.append(
            f"keep {millions(max(0, params))} of {millions(dense.params)} sketchable weights; "
            f"{millions(params + rest)} of {millions(capture.model_params)} in the whole model"
        )
    if flops is not None:
        parts.append(f"keep {flops / 1e9:.3g} of {dense.flops / 1e9:.3g} GFLOPs of the sketchable layers")
    if whole is not None and size is not None:
        parts.append(
            f"save at most {whole / 1e6:.3g} of {capture.model_bytes / 1e6:.3g} MB; "
            f"{max(0, size) / 1e6:.3g} of {dense.size_bytes / 1e6:.3g} MB in sketchable weights"
        )
    return "; ".join(parts)


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
        if (choice.scheme, choice.ranks) not in {(o.scheme, o.ranks) for o in options[choice.layer]}:
            raise ValueError(
                f"the allocator {allocator} gave {choice.layer!r} scheme {choice.scheme!r} at ranks {choice.ranks}, "
                f"which is none of its options: return one of options[{choice.layer!r}]"
            )


def _explained(choice: Choice) -> Choice:
    if choice.is_dense and not choice.reason:
        return Choice(**{**choice.__dict__, "reason": "kept dense: the budget allows it and its error would cost more"})
    return choice


def is_met(plan: Plan, target: Target) -> bool:
    return target.is_met_by(total(plan.choices))
