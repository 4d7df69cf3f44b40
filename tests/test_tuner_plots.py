"""Every kind of picture draws what it says, for every kind of study, without a display or pyplot."""

import io
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest

from panther.tuner import plots
from panther.tuner.space import Float, Space
from panther.tuner.trial import Goal, Trial

pytest.importorskip("matplotlib")

SPACE = Space.parse({"num_terms": (1, 8), "rate": Float(1e-4, 1e-1, log=True), "act": ["relu", "gelu"]})
ONE = (Goal(),)
TWO = (Goal("accuracy"), Goal("latency_ms", maximise=False))
THREE = (*TWO, Goal("size_bytes", maximise=False))
PHASES = ["initial"] * 4 + ["tpe"] * 4 + ["gp"] * 4


def study(goals, count=12):
    rng = np.random.default_rng(1)
    return [
        Trial(i, SPACE.sample(rng), PHASES[i], scores={goal.name: float(rng.random()) for goal in goals})
        for i in range(count)
    ]


def with_trouble(goals):
    trials = study(goals)
    trials[2] = Trial(2, trials[2].params, "initial", "failed", error="ValueError: no")
    trials[5] = Trial(5, trials[5].params, "tpe", "infeasible", scores=trials[5].scores)
    trials[6] = Trial(6, trials[6].params, "tpe", scores={goal.name: -math.inf for goal in goals})
    return trials


def drawn(figure):
    """That it can be written, warnings included."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(file, dpi=30)
    assert file.getvalue().startswith(b"\x89PNG")
    return figure


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.mark.parametrize("kind", plots.PLOTS)
@pytest.mark.parametrize("goals", [ONE, TWO, THREE], ids=len)
@pytest.mark.parametrize("trials", [study, with_trouble, lambda goals: study(goals)[:1], lambda goals: []])
def test_every_kind_draws_every_study(kind, goals, trials):
    if kind == "pareto" and len(goals) < 2:
        pytest.skip("one goal has no front")
    drawn(plots.plot(kind, trials(goals), SPACE, goals))


def test_the_history_shows_phases_the_best_so_far_and_failures():
    (ax,) = drawn(plots.plot("history", with_trouble(ONE), SPACE, ONE)).axes
    assert labels(ax) == ["initial", "tpe", "tpe, breaks a limit", "gp", "best so far", "no finite score"]
    (line,) = ax.lines
    heights = line.get_ydata()
    assert list(heights) == sorted(heights)
    assert line.get_xdata()[-1] == 11
    assert heights[-1] == max(t.scores["score"] for t in with_trouble(ONE) if t.is_feasible)


def test_the_best_so_far_falls_where_less_is_better():
    trials = [Trial(i, {}, scores={"loss": value}) for i, value in enumerate([3.0, 5.0, 1.0, 2.0])]
    (ax,) = plots.history(trials, SPACE, [Goal("loss", maximise=False)]).axes
    assert list(ax.lines[0].get_ydata()) == [3, 3, 1, 1, 1]
    assert ax.get_ylabel() == "loss (less is better)"


def test_slices_have_a_picture_a_parameter_in_its_scale():
    axes = drawn(plots.plot("slices", study(ONE), SPACE, ONE)).axes
    assert [ax.get_xlabel() for ax in axes] == ["num_terms", "rate", "act"]
    assert [ax.get_xscale() for ax in axes] == ["linear", "log", "linear"]
    assert [tick.get_text() for tick in axes[2].get_xticklabels()] == ["relu", "gelu"]


def test_the_interaction_is_of_the_two_parameters_asked_for():
    ax, bar = drawn(plots.plot("interaction", study(ONE), SPACE, ONE, x="act", y="rate")).axes
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == ("act", "rate", "log")
    assert bar.get_ylabel() == "score (more is better)"
    first = plots.plot("interaction", study(ONE), SPACE, ONE).axes[0]
    assert (first.get_xlabel(), first.get_ylabel()) == ("num_terms", "rate")
    other = plots.plot("interaction", study(ONE), SPACE, ONE, y="num_terms").axes[0]
    assert (other.get_xlabel(), other.get_ylabel()) == ("rate", "num_terms")


@pytest.mark.parametrize("signs", [(True, True), (True, False), (False, True), (False, False)])
def test_the_front_is_a_staircase_that_promises_no_more_than_was_found(signs):
    goals = [Goal(name, maximise) for name, maximise in zip("ab", signs, strict=True)]
    rng = np.random.default_rng(0)
    angles, radii = rng.uniform(0, math.pi / 2, 30), rng.uniform(0.8, 1, 30)
    sign = np.array([1 if up else -1 for up in signs])
    points = radii[:, None] * np.column_stack([np.cos(angles), np.sin(angles)]) * sign
    trials = [Trial(i, {}, scores={"a": float(a), "b": float(b)}) for i, (a, b) in enumerate(points)]
    (ax,) = drawn(plots.plot("pareto", trials, SPACE, goals)).axes
    assert labels(ax) == ["beaten", "front", "knee"]
    (line,) = ax.lines
    corners = corners_of(np.column_stack([line.get_xdata(), line.get_ydata()]), line.get_drawstyle())
    assert len(corners) > 2
    gains = np.array([[goal.gain(t.scores) for goal in goals] for t in trials])
    for corner in corners * sign:
        assert (gains >= corner).all(1).sum() >= 2  # both neighbours are at least as good as the corner between them


def corners_of(xy, style):
    """The inner corners of a line that goes in steps."""
    keep = (slice(None, -1), slice(1, None))
    first, second = keep if style == "steps-pre" else keep[::-1]
    return np.column_stack([xy[first, 0], xy[second, 1]])


def test_the_front_of_three_goals_shows_every_pair():
    axes = plots.plot("pareto", study(THREE), SPACE, THREE).axes
    assert len(axes) == 3
    (one,) = plots.plot("pareto", study(THREE), SPACE, THREE, x="latency_ms", y="size_bytes").axes
    assert one.get_xlabel().startswith("latency_ms")


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        ("pie", {}, "expected one of 'history', 'slices', 'interaction', 'pareto'"),
        ("history", {"goal": "speed"}, "expected one of 'score'"),
        ("interaction", {"x": "width"}, "no parameter 'width'; there are 'num_terms', 'rate', 'act'"),
        ("interaction", {"x": "act", "y": "act"}, "two parameters"),
        ("pareto", {}, "needs at least two goals; this study has only 'score'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(kind, options, text):
    with pytest.raises(ValueError, match=text):
        plots.plot(kind, study(ONE), SPACE, ONE, **options)


def test_one_parameter_has_no_interaction():
    space = Space.parse({"rank": (1, 8)})
    with pytest.raises(ValueError, match="expected two parameters, got 'rank'"):
        plots.plot("interaction", [], space, ONE)


def test_drawing_leaves_pyplot_alone():
    code = (
        "import sys; from panther.tuner import plots; from panther.tuner.space import Space; "
        "from panther.tuner.trial import Goal, Trial; assert 'matplotlib' not in sys.modules; "
        "plots.plot('history', [Trial(0, {'a': 1}, scores={'score': 1.0})], Space.parse({'a': (1, 2)}), [Goal()]); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
