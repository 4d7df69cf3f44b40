"""Pictures of a study: how it went, what each parameter does, what two do together, and the front of several goals.

matplotlib through its objects, so that no window opens, no state is shared and no display is needed: each function
returns a Figure, which a notebook shows and `figure.savefig("study.png")` writes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from panther.tuner import pareto
from panther.tuner.analysis import goal_of
from panther.tuner.space import Category, Parameter, Space
from panther.tuner.trial import Goal, Trial, best_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The phases of a search and their colours, which differ also in brightness (Okabe and Ito's palette).
PHASES = {
    "initial": "#999999",
    "tpe": "#56b4e9",
    "gp": "#d55e00",
    "broad": "#009e73",
    "refined": "#cc79a7",
    "given": "#000000",
}
OTHER = "#e69f00"  # a phase of another strategy
ACROSS = 3  # pictures in a row


def plot(kind: str, trials: Sequence[Trial], space: Space, goals: Sequence[Goal], **options: Any) -> Figure:
    """One of the PLOTS by name; the options are those of its function.

    Raises: ValueError for an unknown kind or goal, and where there is nothing to draw.
    """
    if kind not in PLOTS:
        raise ValueError(f"plot(kind={kind!r}): expected one of {', '.join(map(repr, PLOTS))}")
    return PLOTS[kind](trials, space, goals, **options)


def history(trials: Sequence[Trial], space: Space, goals: Sequence[Goal], *, goal: str | None = None) -> Figure:
    """Every score in order of suggestion, coloured by phase, and the best so far; one picture for each goal.

    Hollow: breaks a limit. Crosses at the bottom: trials without a finite score.
    """
    shown = goals if goal is None else [goal_of(goals, goal)]
    figure, axes = _grid(len(shown), across=1, size=(8, 3.5))
    for ax, wanted in zip(axes, shown, strict=True):
        for phase in dict.fromkeys(trial.phase for trial in trials):
            found = [trial for trial in _finite(trials, wanted) if trial.phase == phase]
            _scatter_by_number(ax, found, wanted, PHASES.get(phase, OTHER), phase)
        _draw_best_so_far(ax, trials, wanted)
        _draw_scoreless(ax, trials, wanted)
        ax.set(xlabel="trial", ylabel=_label(wanted))
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize="small", loc="best")
    return figure


def slices(trials: Sequence[Trial], space: Space, goals: Sequence[Goal], *, goal: str | None = None) -> Figure:
    """The score against each parameter by itself; later trials are darker, and the best within all limits is ringed."""
    wanted = goal_of(goals, goal)
    found = _finite(trials, wanted)
    figure, axes = _grid(len(space.parameters), across=ACROSS, size=(4, 3.2))
    for ax, (name, parameter) in zip(axes, space.parameters.items(), strict=True):
        x = _places(found, name, parameter)
        y = [trial.scores[wanted.name] for trial in found]
        numbers = [trial.number for trial in found]
        ax.scatter(x, y, c=numbers, cmap="Blues", vmin=_before(numbers), edgecolors="#00000055", linewidths=0.5, s=28)
        best = best_of(found, wanted)
        if best is not None:
            _circle(ax, _place(best, name, parameter), best.scores[wanted.name], "best")
        _scale(ax, "x", parameter)
        ax.set(xlabel=name, ylabel=_label(wanted))
    return figure


def interaction(
    trials: Sequence[Trial],
    space: Space,
    goals: Sequence[Goal],
    *,
    x: str | None = None,
    y: str | None = None,
    goal: str | None = None,
) -> Figure:
    """Two parameters (the first two, unless named) against each other, coloured by the score.

    The best within all limits is ringed.
    """
    wanted = goal_of(goals, goal)
    across, up = _two(x, y, list(space.parameters), "parameter")
    found = sorted(_finite(trials, wanted), key=lambda trial: wanted.gain(trial.scores))  # the best lie on top
    figure, (ax,) = _grid(1, across=1, size=(6, 4.5))
    horizontal, vertical = space.parameters[across], space.parameters[up]
    drawn = ax.scatter(
        _places(found, across, horizontal),
        _places(found, up, vertical),
        c=[trial.scores[wanted.name] for trial in found],
        cmap="viridis" if wanted.maximise else "viridis_r",
        s=45,
    )
    best = best_of(found, wanted)
    if best is not None:
        _circle(ax, _place(best, across, horizontal), _place(best, up, vertical), "best")
    if found:
        figure.colorbar(drawn, ax=ax, label=_label(wanted))
    _scale(ax, "x", horizontal)
    _scale(ax, "y", vertical)
    ax.set(xlabel=across, ylabel=up)
    return figure


def front(
    trials: Sequence[Trial], space: Space, goals: Sequence[Goal], *, x: str | None = None, y: str | None = None
) -> Figure:
    """Two goals against each other (every pair, unless named): all trials, the Pareto front, and its knee ringed.

    With more than two goals a trial may be on the front and look beaten in one picture.
    """
    names = [goal.name for goal in goals]
    if len(goals) < 2:
        raise ValueError(f"a Pareto front needs at least two goals; this study has only {names[0]!r}: plot 'history'")
    pairs = list(itertools.combinations(names, 2)) if x is None and y is None else [_two(x, y, names, "goal")]
    by_name = {goal.name: goal for goal in goals}
    best, middle = pareto.front(trials, goals), pareto.knee(trials, goals)
    figure, axes = _grid(len(pairs), across=ACROSS, size=(6, 4.5) if len(pairs) == 1 else (4.2, 3.6))
    for ax, (across, up) in zip(axes, pairs, strict=True):
        shown = [trial for trial in _finite(trials, by_name[across]) if math.isfinite(trial.scores.get(up, math.nan))]
        behind = [trial for trial in shown if trial not in best]
        kept = [trial for trial in shown if trial in best]
        for group, label, style in (
            ([t for t in behind if t.is_feasible], "beaten", {"color": "#999999"}),
            (
                [t for t in behind if not t.is_feasible],
                "breaks a limit",
                {"facecolors": "none", "edgecolors": "#999999"},
            ),
            (kept, "front", {"color": "#d55e00", "zorder": 3}),
        ):
            if group:
                points = [trial.scores[across] for trial in group], [trial.scores[up] for trial in group]
                ax.scatter(*points, s=28, label=label, **style)
        if len(goals) == 2 and kept:
            # Steps through what both neighbours reach, since between two trials nothing better is known to be had.
            kept = sorted(kept, key=lambda trial: trial.scores[across])
            where: Literal["pre", "post"] = "pre" if by_name[across].maximise else "post"
            ax.step([t.scores[across] for t in kept], [t.scores[up] for t in kept], where=where, color="#d55e00", lw=1)
        if middle is not None and middle in shown:
            _circle(ax, middle.scores[across], middle.scores[up], "knee")
        ax.set(xlabel=_label(by_name[across]), ylabel=_label(by_name[up]))
        if shown:
            ax.legend(fontsize="small")
    return figure


PLOTS: dict[str, Callable[..., Figure]] = {
    "history": history,
    "slices": slices,
    "interaction": interaction,
    "pareto": front,
}


# --- parts


def _grid(count: int, *, across: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure of so many pictures, `size` inches each."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; type: python -m pip install matplotlib") from error
    columns = min(count, across)
    down = math.ceil(count / columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * down), layout="constrained")
    return figure, [figure.add_subplot(down, columns, place + 1) for place in range(count)]


def _finite(trials: Sequence[Trial], goal: Goal) -> list[Trial]:
    return [trial for trial in trials if math.isfinite(trial.scores.get(goal.name, math.nan))]


def _label(goal: Goal) -> str:
    return f"{goal.name} ({'more' if goal.maximise else 'less'} is better)"


def _scatter_by_number(ax: Axes, trials: Sequence[Trial], goal: Goal, colour: str, label: str) -> None:
    for group, face, text in (
        ([trial for trial in trials if trial.is_feasible], colour, label),
        ([trial for trial in trials if not trial.is_feasible], "none", f"{label}, breaks a limit"),
    ):
        if group:
            numbers, scores = [t.number for t in group], [t.scores[goal.name] for t in group]
            ax.scatter(numbers, scores, s=28, facecolors=face, edgecolors=colour, label=text, zorder=3)


def _draw_best_so_far(ax: Axes, trials: Sequence[Trial], goal: Goal) -> None:
    feasible = [trial for trial in _finite(trials, goal) if trial.is_feasible]
    if not feasible:
        return
    gains = np.maximum.accumulate([goal.gain(trial.scores) for trial in feasible])
    best = gains if goal.maximise else -gains
    # Drawn on to the last trial, also where that has no score.
    numbers = [*(trial.number for trial in feasible), max(trial.number for trial in trials)]
    ax.step(numbers, [*best, best[-1]], where="post", color="black", lw=1, label="best so far")


def _draw_scoreless(ax: Axes, trials: Sequence[Trial], goal: Goal) -> None:
    finite = {trial.number for trial in _finite(trials, goal)}
    numbers = [trial.number for trial in trials if trial.number not in finite]
    if numbers:
        heights = [0.03] * len(numbers)
        bottom = ax.get_xaxis_transform()
        ax.scatter(numbers, heights, marker="x", color="#cc0000", transform=bottom, label="no finite score", s=22)


def _place(trial: Trial, name: str, parameter: Parameter) -> float:
    """Where a trial is drawn along a parameter's axis: a category at its place in the list, an unknown one before."""
    value = trial.params[name]
    if isinstance(parameter, Category):
        return parameter.place(value) if parameter.contains(value) else -1
    return float(value)


def _places(trials: Sequence[Trial], name: str, parameter: Parameter) -> list[float]:
    return [_place(trial, name, parameter) for trial in trials]


def _before(numbers: Sequence[int]) -> float:
    """A start of the colour scale that leaves the first trials visible."""
    return min(numbers, default=0) - 0.4 * (max(numbers, default=0) - min(numbers, default=0) + 1)


def _circle(ax: Axes, x: float, y: float, label: str) -> None:
    ax.scatter([x], [y], s=130, facecolors="none", edgecolors="black", linewidths=1.5, zorder=4, label=label)


def _scale(ax: Axes, which: str, parameter: Parameter) -> None:
    axis = ax.xaxis if which == "x" else ax.yaxis
    if isinstance(parameter, Category):
        axis.set_ticks(range(parameter.count), [str(choice) for choice in parameter.choices])
    elif parameter.log:
        ax.set(**{f"{which}scale": "log"})


def _two(x: str | None, y: str | None, names: Sequence[str], what: str) -> tuple[str, str]:
    """The two names that were asked for; the first ones where not."""
    for name in (x, y):
        if name is not None and name not in names:
            raise ValueError(f"there is no {what} {name!r}; there are {', '.join(map(repr, names))}")
    if len(names) < 2 or (x is not None and x == y):
        raise ValueError(f"expected two {what}s, got {', '.join(map(repr, names if len(names) < 2 else [x, y]))}")
    left = [name for name in names if name not in (x, y)]
    return x if x is not None else left.pop(0), y if y is not None else left.pop(0)
