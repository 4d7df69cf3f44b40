"""What a study is about and what it has found so far: goals, observed limits and trials, as data that JSON can hold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from panther.errors import one_line

Params = dict[str, Any]  # by name: Python ints, floats, strings or other JSON scalars
Scores = dict[str, float]

STATUSES = ("ok", "failed", "pruned", "out_of_memory", "over_memory", "infeasible")


@dataclass(frozen=True)
class Goal:
    """One thing that is optimised, by the name that the objective gives it."""

    name: str = "score"
    maximise: bool = True

    def gain(self, scores: Mapping[str, float]) -> float:
        """This goal's score with the sign that makes more of it better."""
        return scores[self.name] if self.maximise else -scores[self.name]


@dataclass(frozen=True)
class Limit:
    """A constraint on what the objective answers: its number `name` must be at most (or at least) `bound`."""

    name: str
    bound: float
    is_upper: bool = True

    def is_met_by(self, scores: Mapping[str, float]) -> bool:
        return scores[self.name] <= self.bound if self.is_upper else scores[self.name] >= self.bound

    def __str__(self) -> str:
        short = f"{self.bound:g}"
        bound = short if float(short) == self.bound else repr(self.bound)
        return f"{self.name} {'<=' if self.is_upper else '>='} {bound}"


@dataclass(frozen=True)
class Trial:
    """One point of the search and what came of it.

    `status` is one of
      ok             it has its scores,
      infeasible     it has its scores and breaks an observed limit,
      failed         the objective raised, answered something that is no score, or its process died; `error` says which,
      pruned         it was stopped early; `reports` hold what it had reported by then,
      out_of_memory  the objective ran out of memory,
      over_memory    it took more than max_memory_gb.
    Scores are by the names of the goals and observed limits; they may be infinite and are never NaN.
    """

    number: int  # the order of suggestion, from 0
    params: Params
    phase: str = "given"  # who asked for it: "initial", "tpe", "gp", "broad", "refined"; "given" without a search
    status: str = "ok"
    scores: Scores = field(default_factory=dict)
    seconds: float = 0.0
    memory_gb: float | None = None  # what the objective took beyond what was in use before it, where measured
    error: str = ""  # one line
    reports: tuple[tuple[float, float], ...] = ()  # (step, value)
    repeats: tuple[Scores, ...] = ()  # the single results where a trial has several; scores are their means

    @property
    def has_scores(self) -> bool:
        return bool(self.scores)

    @property
    def is_feasible(self) -> bool:
        """True of a trial that may win: it has scores and breaks no limit."""
        return self.status == "ok" and bool(self.scores)

    def to_json(self) -> str:
        """One line of strict JSON; infinite numbers are the strings "inf" and "-inf"."""
        fields = asdict(self)
        fields["scores"] = numbers_spelled(self.scores)
        fields["repeats"] = [numbers_spelled(scores) for scores in self.repeats]
        fields["reports"] = [[_spell(step), _spell(value)] for step, value in self.reports]
        return json.dumps(fields, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Trial:
        """The trial that `to_json` wrote.

        Raises: ValueError where the line is no trial.
        """
        try:
            fields = json.loads(line)
            fields["scores"] = numbers_read(fields["scores"])
            fields["repeats"] = tuple(numbers_read(scores) for scores in fields["repeats"])
            fields["reports"] = tuple((float(step), float(value)) for step, value in fields["reports"])
            trial = cls(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no trial: {line[:200]!r}") from error
        if trial.status not in STATUSES:
            raise ValueError(f"a trial's status is one of {', '.join(STATUSES)}, not {trial.status!r}")
        return trial


def number_of(value: Any) -> float:
    """A number of any kind as a float: Python's, NumPy's, Fraction, Decimal, an array or tensor of one element.

    Raises: TypeError with the reason for anything else; infinite numbers and NaN are numbers.
    """
    if hasattr(value, "shape") and hasattr(value, "item"):
        if math.prod(value.shape) != 1:
            raise TypeError(f"it has {math.prod(value.shape)} elements (shape {tuple(value.shape)}), not one")
        value = value.item()
    if isinstance(value, (str, bytes)) or not hasattr(type(value), "__float__"):
        raise TypeError(f"{_shown(value)} is no number")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{_shown(value)} is no number that a float can hold: {one_line(error)}") from error


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def best_of(trials: Sequence[Trial], goal: Goal) -> Trial | None:
    """The feasible trial with the best score, the first of equals; None where there is none."""
    feasible = [trial for trial in trials if trial.is_feasible]
    return max(feasible, key=lambda trial: goal.gain(trial.scores), default=None)


def _spell(number: float) -> float | str:
    return number if math.isfinite(number) else str(float(number))


def numbers_spelled(scores: Mapping[str, float]) -> dict[str, float | str]:
    """Scores as strict JSON has them."""
    return {name: _spell(value) for name, value in scores.items()}


def numbers_read(scores: Mapping[str, Any]) -> Scores:
    return {name: float(value) for name, value in scores.items()}
