"""The box that is searched: its parameters, which of its points are allowed, and its points as numbers.

A point is a dict of plain Python values in the order of the parameters. `unit` is a point as one number in [0, 1] for
each parameter, in the scale it is searched in; `encode` widens a category to one column for each of its choices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panther.errors import ExhaustedError, NothingAllowedError, TunerError, one_line
from panther.tuner.trial import Params

Key = tuple[Any, ...]
Allowed = Callable[[Params], bool]
Units = NDArray[np.float64]

TRIES = 1_000  # drawn points before the box is counted out instead
LARGEST = 2**61  # of whole numbers, on either side: they and their differences have 64 bits
LISTED = 100_000  # points that are counted out; a larger box is drawn from this often before giving up
REMEMBERED = 200_000  # verdicts of the constraints


@dataclass(frozen=True)
class Integer:
    """Every `step`-th whole number from low to high, both included; `log` searches ratios instead of differences."""

    low: int
    high: int
    log: bool = False
    step: int = 1

    def __post_init__(self) -> None:
        for name in ("low", "high", "step"):
            object.__setattr__(self, name, _whole(name, getattr(self, name)))
            if abs(getattr(self, name)) > LARGEST:
                raise ValueError(f"{name} is not within 2**61 of 0: search its exponent instead")
        if self.step < 1:
            raise ValueError(f"step must be at least 1, not {self.step}")
        _check_order(self.low, self.high, self.log)

    @property
    def count(self) -> int:
        return (self.high - self.low) // self.step + 1

    @property
    def last(self) -> int:
        return self.low + (self.count - 1) * self.step

    def values(self) -> Iterator[int]:
        return iter(range(self.low, self.high + 1, self.step))

    def read(self, name: str, value: Any) -> int:
        """A user's value as a plain int; TypeError where it is none."""
        return _whole(name, value)

    def contains(self, value: Any) -> bool:
        return type(value) is int and self.low <= value <= self.high and (value - self.low) % self.step == 0

    def at(self, unit: float) -> int:
        """The value at a place in [0, 1]; without `log` every value has an equal share of it."""
        if self.log:
            low, high = math.log(max(self.low - self.step / 2, self.low / 2)), math.log(self.last + self.step / 2)
            place = round((math.exp(low + unit * (high - low)) - self.low) / self.step)
        else:
            place = int(unit * self.count)
        return self.low + self.step * min(max(place, 0), self.count - 1)

    def unit(self, value: Any) -> float:
        """Where a value lies between the first (0) and the last (1)."""
        return _place(value, self.low, self.last, self.log)

    def near(self, unit: float) -> int:
        """The value whose `unit` is nearest."""
        return self.low + self.step * round((_between(unit, self.low, self.last, self.log) - self.low) / self.step)

    def narrowed(self, centre: Any, share: float) -> Integer:
        """A part of the range around a value, one step to each side at least."""
        place = _inside(self.unit(centre))
        middle = self.near(place)
        low = min(self.near(_inside(place - share / 2)), max(middle - self.step, self.low))
        high = max(self.near(_inside(place + share / 2)), min(middle + self.step, self.last))
        return replace(self, low=low, high=high)

    def describe(self) -> dict[str, Any]:
        return {"type": "integer", "low": self.low, "high": self.high, "log": self.log, "step": self.step}


@dataclass(frozen=True)
class Float:
    """Any number from low to high, both included; `log` searches ratios instead of differences."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            object.__setattr__(self, name, _real(name, getattr(self, name)))
        _check_order(self.low, self.high, self.log)

    @property
    def count(self) -> int | None:
        return 1 if self.low == self.high else None

    def values(self) -> Iterator[float]:
        return iter([self.low])

    def read(self, name: str, value: Any) -> float:
        """A user's value as a plain float; TypeError where it is none."""
        return _real(name, value)

    def contains(self, value: Any) -> bool:
        return type(value) is float and self.low <= value <= self.high

    def at(self, unit: float) -> float:
        return min(max(_between(unit, self.low, self.high, self.log), self.low), self.high)

    def unit(self, value: Any) -> float:
        return _place(value, self.low, self.high, self.log)

    near = at

    def narrowed(self, centre: Any, share: float) -> Float:
        place = _inside(self.unit(centre))
        return replace(self, low=self.at(_inside(place - share / 2)), high=self.at(_inside(place + share / 2)))

    def describe(self) -> dict[str, Any]:
        return {"type": "float", "low": self.low, "high": self.high, "log": self.log}


@dataclass(frozen=True)
class Category:
    """One of several values without an order: strings, numbers, booleans or None."""

    choices: tuple[Any, ...]

    def __init__(self, choices: Sequence[Any]) -> None:
        if isinstance(choices, str) or not isinstance(choices, Sequence):
            raise TypeError(f"the choices must be a list, not {choices!r}")
        object.__setattr__(self, "choices", tuple(_scalar(choice) for choice in choices))
        if not self.choices:
            raise ValueError("the list of choices is empty")
        if len({_exactly(choice) for choice in self.choices}) < len(self.choices):
            raise ValueError(f"the choices {list(self.choices)} hold a value twice")

    @property
    def count(self) -> int:
        return len(self.choices)

    def values(self) -> Iterator[Any]:
        return iter(self.choices)

    def place(self, value: Any) -> int:
        """Which of the choices a value is; True is not 1 here."""
        return [_exactly(choice) for choice in self.choices].index(_exactly(value))

    def read(self, name: str, value: Any) -> Any:
        """A user's value as the choice that it equals, itself where there is none."""
        plain = _scalar(value)
        return self.choices[self.place(plain)] if self.contains(plain) else plain

    def contains(self, value: Any) -> bool:
        return any(_exactly(choice) == _exactly(value) for choice in self.choices)

    def at(self, unit: float) -> Any:
        return self.choices[min(int(unit * self.count), self.count - 1)]

    def unit(self, value: Any) -> float:
        return (self.place(value) + 0.5) / self.count

    near = at

    def narrowed(self, centre: Any, share: float) -> Category:
        return self

    def describe(self) -> dict[str, Any]:
        return {"type": "category", "choices": list(self.choices)}


Parameter = Integer | Float | Category


@dataclass(frozen=True)
class Space:
    """A box of parameters and what is known to be allowed in it.

    `allowed` are functions of a point's dict. They are asked once a point, so that slow ones are affordable.
    """

    parameters: Mapping[str, Parameter]
    allowed: tuple[Allowed, ...] = ()
    _verdicts: dict[Key, bool] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def parse(cls, bounds: Mapping[str, Any], constraints: Sequence[Allowed] = ()) -> Space:
        """The box that a user wrote: `(2, 16)` whole numbers, `(0.0, 1.0)` numbers, a list of choices, or our classes.

        Raises: ValueError or TypeError that names the parameter.
        """
        if not isinstance(bounds, Mapping):
            raise TypeError(f"the bounds must be a dict by parameter name, like {{'rank': (8, 64)}}, not {bounds!r}")
        if not bounds:
            raise ValueError("the bounds are empty: name at least one parameter, like {'rank': (8, 64)}")
        for constraint in constraints:
            if not callable(constraint):
                raise TypeError(f"a constraint must be a function of the parameters, not {constraint!r}")
        return cls({name: _parsed(name, bound) for name, bound in bounds.items()}, tuple(constraints))

    @property
    def size(self) -> int | None:
        """How many points the box has, allowed or not; None where a parameter is continuous."""
        counts = [parameter.count for parameter in self.parameters.values()]
        known = [count for count in counts if count is not None]
        return math.prod(known) if len(known) == len(counts) else None

    def all_points(self) -> Iterator[Params]:
        """Every allowed point of a box that is not continuous."""
        if self.size is None:
            raise ValueError("a box with continuous parameters has no list of points")
        for values in itertools.product(*(p.values() for p in self.parameters.values())):
            params = dict(zip(self.parameters, values, strict=True))
            if self.is_allowed(params):
                yield params

    def key(self, params: Params) -> Key:
        """What two equal points share, and only they."""
        return tuple(_exactly(params[name]) for name in self.parameters)

    def point(self, given: Any) -> Params:
        """A point that a user wrote, its values read as bounds are: 1 is a number, np.int64(3) a whole one.

        Raises: TypeError or ValueError with what is wrong with it.
        """
        if not isinstance(given, Mapping) or given.keys() != self.parameters.keys():
            raise ValueError(f"it must be a dict of {', '.join(self.parameters)}")
        params = {name: parameter.read(name, given[name]) for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            if not parameter.contains(params[name]):
                raise ValueError(f"{name}={params[name]!r} is not in {parameter}")
        if not self.is_allowed(params):
            raise ValueError(f"the constraints ({', '.join(map(_name, self.allowed))}) do not hold there")
        return params

    def contains(self, params: Params) -> bool:
        """Whether a point is in the box, of the right types, and allowed."""
        return (
            params.keys() == self.parameters.keys()
            and all(parameter.contains(params[name]) for name, parameter in self.parameters.items())
            and self.is_allowed(params)
        )

    def is_allowed(self, params: Params) -> bool:
        """Whether all constraints hold for a point of the box."""
        if not self.allowed:
            return True
        key = self.key(params)
        if key not in self._verdicts:
            if len(self._verdicts) >= REMEMBERED:
                self._verdicts.clear()
            self._verdicts[key] = all(_holds(constraint, params) for constraint in self.allowed)
        return self._verdicts[key]

    def at(self, unit: Sequence[float]) -> Params:
        """The point at a place of the unit cube, one number a parameter; equal volumes hold equally many points."""
        return {n: p.at(float(u)) for (n, p), u in zip(self.parameters.items(), unit, strict=True)}

    def near(self, unit: Sequence[float]) -> Params:
        """The point whose `unit` is nearest to a place of the unit cube."""
        return {n: p.near(float(u)) for (n, p), u in zip(self.parameters.items(), unit, strict=True)}

    def unit(self, params: Params) -> list[float]:
        """A point as one number in [0, 1] a parameter (outside where the point is outside of the box)."""
        return [parameter.unit(params[name]) for name, parameter in self.parameters.items()]

    def encode(self, points: Sequence[Params]) -> Units:
        """Points as rows of numbers in [0, 1]: one column a parameter, for a category one a choice."""
        columns: list[list[float]] = []
        for name, parameter in self.parameters.items():
            if isinstance(parameter, Category):
                places = [parameter.place(params[name]) for params in points]
                columns += [[float(place == choice) for place in places] for choice in range(parameter.count)]
            else:
                columns.append([parameter.unit(params[name]) for params in points])
        return np.array(columns, dtype=np.float64).reshape(len(columns), len(points)).T

    def sample(self, rng: np.random.Generator, avoid: Collection[Key] = ()) -> Params:
        """A point drawn evenly (where `log` is set: evenly in the logarithm) among those allowed and not avoided.

        Raises: ExhaustedError when all allowed points are avoided; TunerError when none seems to be allowed.
        """
        size = self.size
        avoided = avoid if isinstance(avoid, (set, frozenset, dict)) else set(avoid)
        listed = size is not None and size <= LISTED
        was_allowed = False
        for _ in range(TRIES if listed else LISTED):
            params = self.at(rng.random(len(self.parameters)).tolist())
            if self.is_allowed(params):
                if self.key(params) not in avoided:
                    return params
                was_allowed = True
        left = [params for params in self.all_points() if self.key(params) not in avoided] if listed else []
        if left:
            return left[int(rng.integers(len(left)))]
        if was_allowed or (listed and next(self.all_points(), None) is not None):
            raise ExhaustedError("every allowed point of the box is taken: widen the bounds, or stop here")
        drawn = "no point of the box" if listed else f"none of {LISTED:,} random points of the box"
        raise NothingAllowedError(
            f"{drawn} fulfils the constraints ({', '.join(map(_name, self.allowed))}): check them, for instance their "
            "units, or move the bounds to where they hold"
        )

    def narrowed(self, centre: Params, share: float) -> Space:
        """The part of the box around a point: `share` of each range, cut off at the box's sides. Categories stay."""
        parameters = {name: p.narrowed(centre[name], share) for name, p in self.parameters.items()}
        return Space(parameters, self.allowed, self._verdicts)

    def describe(self) -> dict[str, Any]:
        """The box as JSON, to compare with: constraints by their names."""
        return {
            "parameters": {name: parameter.describe() for name, parameter in self.parameters.items()},
            "allowed": [_name(constraint) for constraint in self.allowed],
        }


def _parsed(name: Any, bound: Any) -> Parameter:
    if not isinstance(name, str):
        raise TypeError(f"a parameter's name must be a string, not {name!r}")
    if isinstance(bound, (Integer, Float, Category)):
        return bound
    try:
        if isinstance(bound, list):
            return Category(bound)
        if not isinstance(bound, tuple) or len(bound) != 2:
            raise TypeError(f"must be (low, high), a list of choices, Integer, Float or Category, not {bound!r}")
        is_whole = all(isinstance(end, Integral) for end in bound)
        return Integer(*bound) if is_whole else Float(*bound)
    except (TypeError, ValueError) as error:
        raise type(error)(f"parameter {name!r}: {error}") from None


def _whole(name: str, value: Any) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, not {value!r}; use a list for a choice between values")
    return int(value)


def _real(name: str, value: Any) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {value!r}; use a list for a choice between values")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, not {value!r}")
    return float(value)


def _check_order(low: float, high: float, log: bool) -> None:
    if low > high:
        raise ValueError(f"low ({low}) is above high ({high})")
    if log and low <= 0:
        raise ValueError(f"a logarithmic scale needs low > 0, not {low}")


def _scalar(value: Any) -> Any:
    """A choice as the plain Python value that a journal can hold."""
    value = value.item() if isinstance(value, np.generic) else value
    if not (value is None or isinstance(value, (str, bool, int, float))):
        raise TypeError(
            f"a choice must be a string, number, boolean or None, not {value!r}; map names to objects inside"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"a choice must be finite, not {value!r}")
    return value


def _exactly(value: Any) -> Any:
    """A value that equals only values of its kind: True is not 1, but 1 is 1.0, as a number may lose its point."""
    return (type(value).__name__, value) if isinstance(value, (bool, str)) or value is None else value


def _inside(unit: float) -> float:
    return min(max(unit, 0.0), 1.0)


def _place(value: float, low: float, high: float, log: bool) -> float:
    if low == high:
        return 0.5
    if log:
        return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low)) if value > 0 else 0.0
    return (value / 2 - low / 2) / (high / 2 - low / 2)  # halves, since the difference may be too large for a float


def _between(unit: float, low: float, high: float, log: bool) -> float:
    if log:
        return math.exp(math.log(low) * (1 - unit) + math.log(high) * unit)
    return low * (1 - unit) + high * unit


def _holds(constraint: Allowed, params: Params) -> bool:
    try:
        return bool(constraint(dict(params)))
    except Exception as error:
        raise TunerError(f"the constraint {_name(constraint)} failed on {params}: {one_line(error)}") from error


def _name(constraint: Allowed) -> str:
    return str(getattr(constraint, "__name__", None) or type(constraint).__name__)
