"""The nouns of panther: frozen data that prints, compares and goes to JSON. No torch in here.

A layer is a matrix of `out` rows and `in` columns applied at `rows` positions; a convolution's `in` is
in_channels / groups x kernel area. "kept" is always the fraction that REMAINS.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from panther.errors import PlanError

PLAN_VERSION = 2

MODES = ("none", "refit", "blocks", "distill", "auto")  # of healing
TIME_LIMIT = 300.0

BITS = {"bfloat16": 16, "int8": 8, "int4": 4, "int3": 3}  # of the numbers of weights that are stored shorter
SCALE_BYTES = 2  # of a scale in a file: none has more digits than bfloat16
DTYPES = ("float32", *BITS)  # what weights may be stored in; the first stands for the layer's own

BUDGET_FIELDS = ("params", "flops", "size_mb", "latency_ms", "peak_memory_mb", "max_drop")

# Fields that are an amount or a percentage of the dense model's: what the amount is, and one that people write.
_AMOUNTS = {
    "size_mb": ("megabytes (10^6 bytes) of the saved file", 20.0),
    "latency_ms": ("milliseconds of one run of the example inputs", 12.0),
    "peak_memory_mb": ("megabytes (10^6 bytes) of tensors alive at once in one run of the example inputs", 80.0),
}


@dataclass(frozen=True)
class LayerSpec:
    """One dense operation of the model: its shape, its cost, and why it cannot be sketched (if it cannot)."""

    name: str  # qualified module name, or the parameter's name for a functional use
    kind: str  # "linear", "conv1d", "conv2d", "conv3d"
    in_features: int  # channels for a convolution
    out_features: int
    rows: int  # positions the matrix is applied to in one run of the example inputs, over all calls
    calls: int = 1
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    has_bias: bool = True
    dtype: str = "float32"
    input_shape: tuple[int, ...] = ()  # of the first call
    output_shape: tuple[int, ...] = ()
    input_key: str = ""  # layers with the same key read the same tensor
    aliases: tuple[str, ...] = ()  # other names under which the same module is registered
    blockers: tuple[str, ...] = ()  # reasons to stay dense; empty means it can be sketched

    @property
    def can_be_sketched(self) -> bool:
        return not self.blockers

    @property
    def fan_in(self) -> int:
        """Columns of the weight seen as a matrix."""
        return self.in_features // self.groups * math.prod(self.kernel_size)

    @property
    def params(self) -> int:
        """Numbers in the weight (the bias stays as it is and is not counted)."""
        return self.out_features * self.fan_in

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.params

    @property
    def shape(self) -> str:
        """What a reader recognises: "384 -> 1536" or "128 -> 256 (3x3, stride 2)"."""
        text = f"{self.in_features} -> {self.out_features}"
        if not self.kernel_size:
            return text
        extra = ["x".join(map(str, self.kernel_size))]
        if any(s != 1 for s in self.stride):
            extra.append("stride " + "x".join(map(str, self.stride)))
        if any(d != 1 for d in self.dilation):
            extra.append("dilation " + "x".join(map(str, self.dilation)))
        if self.groups != 1:
            extra.append(f"groups {self.groups}")
        return f"{text} ({', '.join(extra)})"


@dataclass(frozen=True)
class Pair:
    """Two layers of which the second reads all that the first writes, channel by channel, and nobody else does.

    Only what works on each channel alone lies between: elementwise operations, pooling, and the batch norms and
    depthwise convolutions named in `between`. So the channels may change places, and some of them be left out.
    """

    producer: str
    consumer: str
    between: tuple[str, ...] = ()


@dataclass(frozen=True)
class Capture:
    """Every dense operation of a model, in the order in which they run."""

    way: str  # "torch.export", "torch.fx" or "observation"
    layers: tuple[LayerSpec, ...]
    model_params: int  # numbers in all parameters and buffers, tied ones once
    model_bytes: int  # of the safetensors file that holds them, its header included
    notes: tuple[str, ...] = ()  # why an earlier way failed, what was not run
    followers: tuple[Pair, ...] = ()  # neighbours between which the order of channels is free
    rectified: tuple[tuple[str, str], ...] = ()  # layers that only a ReLU reads, and the batch norm between or ""

    @property
    def sketchable(self) -> tuple[LayerSpec, ...]:
        return tuple(spec for spec in self.layers if spec.can_be_sketched)

    @property
    def fingerprint(self) -> str:
        """Equal for two models exactly when a plan for one fits the other."""
        rows = [(s.name, s.kind, s.in_features, s.out_features, s.kernel_size, s.groups) for s in self.layers]
        return hashlib.sha256(repr(sorted(rows)).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        width = max((len(spec.name) for spec in self.layers), default=5)
        lines = [f"{len(self.sketchable)} of {len(self.layers)} dense layers can be sketched (found by {self.way})"]
        for spec in self.layers:
            verdict = "can be sketched" if spec.can_be_sketched else "stays dense: " + "; ".join(spec.blockers)
            calls = f" x{spec.calls}" if spec.calls != 1 else ""
            lines.append(f"  {spec.name:<{width}}  {spec.kind} {spec.shape}{calls}  {spec.params:,} weights  {verdict}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class Cost:
    """What one layer's weights cost: numbers stored, operations per run of the example inputs, bytes, milliseconds.

    A bias that the dense layer has is not counted; one that sketching gives to a layer without is. In a plan, bytes are
    those by which a file grows, with the entries in its header. Milliseconds are of all calls in one run of the example
    inputs, and 0 unless a budget made somebody measure them.
    """

    params: int = 0
    flops: int = 0
    size_bytes: int = 0
    latency_ms: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.params + other.params,
            self.flops + other.flops,
            self.size_bytes + other.size_bytes,
            self.latency_ms + other.latency_ms,
        )


@dataclass(frozen=True)
class Grid:
    """How a matrix is rounded: bits a number, and how many neighbours in a row share a scale (None: all).

    16 bits are bfloat16, which has no scales; fewer are whole numbers.
    """

    bits: int
    group_size: int | None = None

    def __str__(self) -> str:
        """ "int4, groups of 32"."""
        if self.is_bfloat16:
            return "bfloat16"
        return f"int{self.bits}" + ("" if self.group_size is None else f", groups of {self.group_size}")

    @property
    def is_bfloat16(self) -> bool:
        return self.bits == BITS["bfloat16"]

    def groups(self, columns: int) -> int:
        """Scales a row."""
        if self.is_bfloat16:
            return 0
        return 1 if self.group_size is None else max(1, -(-columns // self.group_size))

    def size_bytes(self, rows: int, columns: int) -> int:
        """Of the numbers in a file, each row from a new byte on, and the scales."""
        return rows * (-(-columns * self.bits // 8) + self.groups(columns) * SCALE_BYTES)


@dataclass(frozen=True)
class Choice:
    """What becomes of one layer: a scheme and its ranks, or "dense" with the reason.

    The scheme "channels" is a dense layer with fewer inputs or outputs; with `channels`, the others are of that layer.
    With the packing "quantised" the weights of the scheme are whole numbers, or bfloat16: "whole" is the dense weight,
    "corrected" the same and a chain for part of its error. What "pivoted" chains are stored in says the dtype.
    """

    layer: str
    scheme: str = "dense"
    ranks: tuple[int, ...] = ()
    packing: str = "two_gemm"
    dtype: str = "float32"  # of DTYPES; "float32" stands for the layer's own
    error: float = 0.0  # predicted: see LayerReport
    cost: Cost = Cost()
    reason: str = ""
    channels: int = 0  # of those to or from its neighbour, how many are left; 0: all
    group_size: int = 0  # numbers that share a scale, where it is quantised; 0: all of a row

    @property
    def is_dense(self) -> bool:
        return self.scheme == "dense"

    @property
    def grid(self) -> Grid | None:
        """What its weights are rounded to, if they are."""
        bits = BITS.get(self.dtype)
        return None if bits is None or self.is_dense else Grid(bits, self.group_size or None)

    @property
    def kind(self) -> tuple[str, tuple[int, ...], str, int, Grid | None]:
        """What tells one option of a layer from another."""
        return self.scheme, self.ranks, "dense" if self.is_dense else self.packing, self.channels, self.grid


def _number(value: object) -> object:
    """The Python number in a NumPy scalar or a 0-d tensor; anything else as it is."""
    item = getattr(value, "item", None)
    try:
        return item() if callable(item) else value
    except (ValueError, RuntimeError):  # several numbers
        return value


FEWEST_AS_TEXT = 100  # of numbers or operations: a smaller count that is typed is a percentage without its sign


def _fraction_or_count(name: str, given: object) -> float | int:
    """A float in (0, 1] (also "50%") or a positive int, told apart by type and never guessed."""
    value = _number(given)
    if isinstance(value, str):
        text = value.strip()
        try:
            if text.endswith("%"):
                value = float(text[:-1]) / 100
            else:
                value = float(text) if any(c in text for c in ".eE") else int(text)
        except ValueError:
            raise ValueError(f'Budget({name}={given!r}): not a number; write 0.5, "50%" or an absolute count') from None
        if isinstance(value, int) and value <= FEWEST_AS_TEXT:
            raise ValueError(f'Budget({name}={given!r}): write {name}="{text}%" for a percentage; so few are no count')
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ValueError(f"Budget({name}={given}): an int is an absolute count and must be at least 1")
        return value
    if isinstance(value, float) and 0 < value <= 1:
        return value
    raise ValueError(
        f"Budget({name}={given}): a float is the fraction KEPT and must be in (0, 1]; an int is an absolute count. "
        f'Write {name}=0.5 or {name}="50%" to keep half, {name}=5_000_000 for five million.'
    )


def _amount(name: str, given: object) -> float | str:
    """A positive amount (also as text), or a percentage of the dense model's as text."""
    meaning, example = _AMOUNTS[name]
    text = str(_number(given)).strip()
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        number = math.nan
    top = 1.0 if text.endswith("%") else math.inf
    if isinstance(given, bool) or not 0 < number <= top or math.isinf(number):
        raise ValueError(
            f"Budget({name}={given!r}): expected {meaning}, as in {name}={example}, or a percentage of the dense "
            f'model\'s, as in {name}="50%"'
        )
    return text if text.endswith("%") else number


def _drop(name: str, given: object) -> float:
    """How far a metric may fall: a number that is not negative."""
    value = _number(given)
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]  # refused below
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(
            f"Budget({name}={given!r}): expected by how much eval_fn may fall at most, in its own unit and 0 or more, "
            f"as in {name}=0.01 for one point of an accuracy between 0 and 1"
        )
    return number


@dataclass(frozen=True)
class Budget:
    """What the compressed model may cost; every field that is given holds.

    params, flops: a float in (0, 1] or "50%" is the fraction kept, an int is absolute (flops are 2 x
    multiply-adds of the sketchable layers at the example inputs). size_mb: megabytes (10^6 bytes) of the
    saved file. latency_ms: median milliseconds of one run of the example inputs at torch's current threads.
    peak_memory_mb: megabytes of tensors alive at once in such a run, weights included. Each of these three may
    also be "50%" of the dense model's. max_drop: how far `eval_fn` may fall, in its own unit (0.01 is one point of
    an accuracy between 0 and 1). of: what a fraction of `params` counts, the "sketchable" weights or the whole "model".
    """

    params: float | int | None = None
    flops: float | int | None = None
    size_mb: float | str | None = None
    latency_ms: float | str | None = None
    peak_memory_mb: float | str | None = None
    max_drop: float | None = None
    of: str = "sketchable"

    def __post_init__(self) -> None:
        checks = {"params": _fraction_or_count, "flops": _fraction_or_count, "max_drop": _drop}
        for name in BUDGET_FIELDS:
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, checks.get(name, _amount)(name, given))
        if self.of not in ("sketchable", "model"):
            raise ValueError(f"Budget(of={self.of!r}): expected 'sketchable' or 'model'")
        if all(getattr(self, name) is None for name in BUDGET_FIELDS):
            raise ValueError("Budget() holds nothing: give at least one of " + ", ".join(BUDGET_FIELDS))

    @property
    def limits_size(self) -> bool:
        """Whether anything besides the drop of the metric is limited."""
        return any(getattr(self, name) is not None for name in BUDGET_FIELDS if name != "max_drop")

    @classmethod
    def parse(cls, value: object) -> Budget:
        """The Budget that a user's `budget=` argument means.

        Raises: ValueError when it is ambiguous or out of range, TypeError when it is of no known kind.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, Mapping):
            return cls.from_fields(value)
        if isinstance(value, str) and value.strip().endswith("%"):
            text = value.strip()[:-1]
            try:
                percent = float(text)
            except ValueError:
                percent = math.nan
            if 0 < percent <= 100:
                return cls(params=percent / 100)
            raise ValueError(f'budget={value!r}: a percentage is what is KEPT, above 0 and up to 100, as in "50%"')
        value = _number(value)
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise TypeError(
                f"budget={value!r} ({type(value).__name__}): expected the fraction of weights to keep (0.5), "
                'a percentage ("50%"), panther.Budget(...) or a dict of its fields'
            )
        if isinstance(value, float) and 0 < value <= 1:
            return cls(params=value)
        raise ValueError(_two_readings(value))

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Budget:
        for name in fields:
            if name not in (*BUDGET_FIELDS, "of"):
                close = get_close_matches(name, [*BUDGET_FIELDS, "of"], 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"Budget has no field {name!r} (it has {', '.join(BUDGET_FIELDS)}, of){hint}")
        return cls(**dict(fields))

    def __str__(self) -> str:
        parts = [f"{n}={getattr(self, n)}" for n in BUDGET_FIELDS if getattr(self, n) is not None]
        return ", ".join(parts) + (", of=model" if self.of == "model" else "")


def _two_readings(value: object) -> str:
    """The error text for a bare budget that is not a fraction: what it might mean, and how to write each."""
    if isinstance(value, str):
        return (
            f'budget={value!r} is neither a fraction nor a percentage; write budget=0.5 or budget="50%" to keep '
            "half of the weights, or panther.Budget(params=..., flops=..., size_mb=..., latency_ms=...)"
        )
    number = float(value)  # type: ignore[arg-type]  # an int or a float: checked by the caller
    if not math.isfinite(number):
        return f"budget={value!r} is not a finite number; a fraction KEPT is above 0 and up to 1.0, as in budget=0.5"
    if number <= 0:
        return f"budget={value!r}: nothing would remain; a fraction KEPT is above 0 and up to 1.0, as in budget=0.5"
    if number <= 1:
        percent = "budget=1.0 keeps everything, budget=0.01 keeps one percent"
    elif number <= 100:
        percent = f'budget="{value}%" keeps {value} percent'
    else:
        percent = 'budget="50%" keeps half'
    return (
        f"budget={value!r} can be read two ways: {percent}; panther.Budget(params={math.ceil(number)}) keeps "
        f"{math.ceil(number)} numbers. A bare budget is a float above 0 and up to 1.0."
    )


@dataclass(frozen=True)
class Measured:
    """What was measured of a whole model; None where nothing asked for it."""

    latency_ms: float | None = None  # median of one run of the example inputs
    peak_memory_bytes: int | None = None
    metric: float | None = None  # what eval_fn says


@dataclass(frozen=True)
class Target:
    """A Budget worked out for one model: limits on the sketchable layers, on the whole, and the line that says so.

    The layers' limits are what an allocator works with. While `size_bytes` holds for the layers, `file_bytes` holds
    for the file that `save` writes. `weight_bytes` and `latency_ms` follow from `peak_memory_bytes` and
    `model_latency_ms`, as well as layers tell; whether these hold is measured on the whole model.
    """

    params: int | None = None
    flops: int | None = None
    size_bytes: int | None = None
    text: str = ""
    file_bytes: int | None = None
    latency_ms: float | None = None
    weight_bytes: int | None = None
    model_latency_ms: float | None = None
    latency_share: float | None = None  # of the dense model measured beside it, where that was asked for
    peak_memory_bytes: int | None = None
    max_drop: float | None = None

    def limits(self) -> Mapping[str, float]:
        """The limits on the layers that were given, by the name of the Cost field they bound."""
        return self._limits

    @cached_property
    def _limits(self) -> Mapping[str, float]:  # an allocator asks for them a million times
        sizes = [limit for limit in (self.size_bytes, self.weight_bytes) if limit is not None]
        pairs = {
            "params": self.params,
            "flops": self.flops,
            "size_bytes": min(sizes, default=None),
            "latency_ms": self.latency_ms,
        }
        return {name: limit for name, limit in pairs.items() if limit is not None}

    def is_met_by(self, cost: Cost) -> bool:
        return all(getattr(cost, name) <= limit for name, limit in self.limits().items())

    def allows_drop(self, dense: float, compressed: float) -> bool:
        """Whether a metric may fall this far; 0.9 - 0.89 counts as 0.01, which it is not in binary."""
        return self.max_drop is None or dense - compressed <= self.max_drop + 1e-9 * (abs(dense) + self.max_drop)


def to_data(value: Any) -> Any:
    """Dataclasses, tuples and mappings as plain JSON values; numbers that JSON lacks are "nan", "inf" and "-inf"."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_data(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_data(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_data(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))  # which float() reads
    return value


@dataclass(frozen=True)
class Plan:
    """One Choice a layer, for one architecture. JSON-able: save it, edit it, use it again."""

    choices: tuple[Choice, ...]
    fingerprint: str = ""
    allocator: str = ""
    budget: str = ""
    seed: int = 0
    knobs: Mapping[str, float] = field(default_factory=dict, hash=False)  # of the tuned search: what made this plan

    def __getitem__(self, layer: str) -> Choice:
        for choice in self.choices:
            if choice.layer == layer:
                return choice
        raise KeyError(layer)

    @property
    def sketched(self) -> tuple[Choice, ...]:
        return tuple(c for c in self.choices if not c.is_dense)

    @property
    def cost(self) -> Cost:
        return sum((c.cost for c in self.choices), Cost())

    def to_json(self) -> str:
        return json.dumps({"panther_plan": PLAN_VERSION, **to_data(self)}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote.

        Raises: PlanError when the text is not a plan, or is one of a newer version.
        """
        try:
            data = json.loads(text)
            version = data.pop("panther_plan")
            if version not in (1, PLAN_VERSION):
                raise PlanError(f"this plan is of another version (this panther reads versions 1 and {PLAN_VERSION})")
            choices = tuple(map(_choice_from, data["choices"]))
            if version == 1:  # in which floats of a layer said its dtype
                own = [replace(c, dtype=c.dtype if c.packing == "quantised" else DTYPES[0]) for c in choices]
                choices = tuple(own)
            read = {"choices": choices, "knobs": dict(data.get("knobs", {}))}
            if not all(isinstance(data.get(name, ""), str) for name in ("fingerprint", "allocator", "budget")):
                raise TypeError("fingerprint, allocator and budget are texts")
            return cls(**{**data, **read})
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise PlanError(f"not a panther plan: {error!r}; write one with plan.to_json()") from error

    def check_fits(self, capture: Capture) -> None:
        """Raise PlanError unless this plan was made for a model of this architecture."""
        known = {spec.name: spec for spec in capture.layers}
        for choice in self.sketched:
            if choice.layer not in known:
                close = ", ".join(get_close_matches(str(choice.layer), known, 3)) or "none"
                raise PlanError(
                    f"the plan sketches {choice.layer!r}, which this model does not have; nearest: {close}. "
                    "A plan belongs to one architecture: make a new one with panther.compress(..., plan=None)."
                )
            if not known[choice.layer].can_be_sketched:
                raise PlanError(
                    f"the plan sketches {choice.layer!r}, which stays dense in this model: "
                    + "; ".join(known[choice.layer].blockers)
                )
        if self.fingerprint and self.fingerprint != capture.fingerprint:
            raise PlanError(
                f"the plan was made for another architecture (fingerprint {self.fingerprint}, this model "
                f"{capture.fingerprint}): the layer names match but their shapes do not. Make a new plan with "
                "panther.compress(..., plan=None)."
            )


def _choice_from(row: Mapping[str, Any]) -> Choice:
    return Choice(
        **{
            **row,
            "ranks": tuple(int(r) for r in row["ranks"]),
            "error": float(row.get("error", 0.0)),
            "cost": Cost(**{**row["cost"], "latency_ms": float(row["cost"].get("latency_ms", 0.0))}),
            "channels": int(row.get("channels", 0)),
            "group_size": int(row.get("group_size", 0)),
        }
    )


@dataclass(frozen=True)
class Heal:
    """How a compressed model is healed.

    mode: "none" (biases only), "refit" (closed form, no gradient steps), "blocks" (refit, then each block on its own),
        "distill" (refit, then the whole model) or "auto" (refit, then blocks, then the whole model).
    time_limit: seconds of gradient steps, at most. steps: their number, instead of as many as fit into the time.
    learning_rate: of matrices and of everything else alike; it is halved where training diverges.
    """

    mode: str = "auto"
    time_limit: float = TIME_LIMIT
    steps: int | None = None
    learning_rate: float = 5e-4

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"heal={self.mode!r}: expected one of {', '.join(MODES)}, or panther.Heal(mode=...)")
        for name in ("time_limit", "learning_rate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"Heal({name}={value!r}): expected a number above 0")
        if self.steps is not None and (
            isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1
        ):
            raise ValueError(f"Heal(steps={self.steps!r}): expected an integer of at least 1, or None")

    @classmethod
    def parse(cls, value: object) -> Heal:
        """The Heal that a user's `heal=` argument means.

        Raises: ValueError for an unknown mode, TypeError for anything that is neither a word nor a Heal.
        """
        if isinstance(value, Heal):
            return value
        if isinstance(value, str):
            return cls(mode=value)
        raise TypeError(f"heal={value!r}: expected one of {', '.join(MODES)}, or panther.Heal(mode=...)")


@dataclass(frozen=True)
class Healed:
    """What healing did.

    before, after: the loss of the answers to held-out inputs, 1 being what a constant answer would lose (2 where the
        answers are sequences, whose mean counts as well).
    history: (seconds since the start, stage, held-out loss) at every stage and check.
    interrupted: whether Ctrl-C ended it; a checkpoint is then kept, to go on from.
    """

    seconds: float
    steps: int
    before: float
    after: float
    history: tuple[tuple[float, str, float], ...] = ()
    notes: tuple[str, ...] = ()
    interrupted: bool = False


@dataclass(frozen=True)
class TrialReport:
    """One plan that the tuned search tried on the whole model."""

    number: int
    phase: str  # who thought of it: "given", or a strategy's phase
    score: float | None  # None where there is none; `error` says why
    kept: float  # share of the sketchable weights, or bytes where these are to be fewest
    seconds: float
    knobs: Mapping[str, float]
    error: str = ""


@dataclass(frozen=True)
class Tuning:
    """What the tuned search tried, and what it gained.

    objective: "eval_fn", or "divergence" (its negative is the score) where there is no eval_fn.
    start, best: score and share kept of the sensitivity plan, and of the one that won; a score is None where the
        objective could not say.
    seconds, outside: of the whole search, and of it all that was not spent in the objective.
    """

    objective: str
    start: tuple[float | None, float]
    best: tuple[float | None, float]
    trials: tuple[TrialReport, ...]
    stopped_by: str  # "trials", "timeout", "interrupt" or "nothing new"
    seconds: float
    outside: float
    is_smallest: bool = False  # whether the smallest plan that holds max_drop was wanted, not the best score

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Tuning:
        """What `to_data` made of one."""
        trials = tuple(TrialReport(**{**row, "score": _score(row["score"])}) for row in data["trials"])
        start, best = ((_score(score), float(kept)) for score, kept in (data["start"], data["best"]))
        return cls(**{**data, "start": start, "best": best, "trials": trials})


def _score(value: Any) -> float | None:
    return None if value is None else float(value)


@dataclass(frozen=True)
class LayerReport:
    """One row of the report: what happened to a layer, before and after.

    error: predicted share of the layer's output energy that is lost, each direction of the output weighted by how
        strongly the model's output reacts to it; without calibration data, of the weight's energy.
    """

    name: str
    kind: str
    shape: str
    scheme: str  # "dense" when it was left
    ranks: tuple[int, ...]
    terms: int  # quanta of rank (0 for a dense layer)
    kept: float  # fraction of the layer's weights that remain
    error: float
    before: Cost
    after: Cost
    reason: str = ""  # why it stayed dense
    packing: str = "dense"  # how its factors are stored: see Choice
    channels: int = 0  # that are left between it and its neighbour; 0: all
    stored: str = ""  # of a quantised layer: "int8", "int4, groups of 32"
    in_sample: bool = False  # the error is of fewer rows than there are inputs: those that were fitted to


@dataclass(frozen=True)
class Figures:
    """Totals of one model. latency and memory are measured, the rest is counted; None means not measured."""

    params: int  # parameters and buffers, tied ones once
    size_bytes: int  # of the file that `save` writes
    flops: int  # of the layers that capture lists, at the example inputs
    latency_ms: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class Baseline:
    """The dense model with the weights of the same layers in few bits and nothing else done to it."""

    name: str  # "int8", "int4": rounded by the weights alone, one scale a row
    figures: Figures
    agreement: Mapping[str, float]  # as Report's


@dataclass(frozen=True)
class LimitReport:
    """One limit of the budget and what the compressed model needs of it, both in `unit`."""

    name: str  # "sketchable weights", "latency", ...
    limit: float
    got: float | None  # None when it could not be measured
    unit: str  # "numbers", "FLOPs", "bytes", "ms" or "" for a metric's own
    met: bool


@dataclass(frozen=True)
class Report:
    """What a compression did, in numbers measured beside the dense model in the same run."""

    target: str
    budget_met: bool
    capture_way: str
    layers: tuple[LayerReport, ...]
    dense: Figures
    compressed: Figures
    agreement: Mapping[str, float] = field(default_factory=dict)  # "cosine", "relative_error", "top1"
    agreement_batches: int = 0
    agreement_held_out: bool = True
    metric: tuple[float, float] | None = None  # eval_fn of the dense and of the compressed model
    seconds: Mapping[str, float] = field(default_factory=dict)  # per stage
    environment: Mapping[str, str] = field(default_factory=dict)  # torch, threads, device, kernels, seed
    notes: tuple[str, ...] = ()  # warnings: no calibration data, few rows, not faster, ...
    limits: tuple[LimitReport, ...] = ()  # one for each limit of the budget
    healing: Healed | None = None  # None where nothing was healed
    tuning: Tuning | None = None  # of search="tuned"
    baselines: tuple[Baseline, ...] = ()  # what storing whole numbers alone would do

    def to_json(self) -> str:
        """Strict JSON: a number that is not finite is the string "nan", "inf" or "-inf"."""
        return json.dumps(to_data(self), indent=1, allow_nan=False)

    def to_html(self) -> str:
        """One page that needs no other file, with all that str() shows."""
        from panther.report.html import render

        return render(self)

    def __str__(self) -> str:
        from panther.report.text import render  # the table needs rich; the data does not

        return render(self)
