"""Ranks by trials: what the convex machinery believes of each layer is turned, and whole models say how well.

Every plan is within the same limits. A knob only changes what a layer's error is taken to cost:

    loss = 2^w D^power      w = depth * place + the sum of the knobs of all groups that hold the layer

D is the predicted divergence, and `place` runs from -1/2 at the first block to 1/2 at the last. `floor` is the share of
its uniform size that every layer keeps; at 1 it is the uniform plan. Groups are found by name, so that they are there
in any model: attention and MLP, or convolutions and linear layers; the first and the last block. In a second stage the
roles ("encoder.*.query"), blocks or single layers that matter most get knobs as well. Scores come in as a function.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed
from functools import cached_property, partial
from typing import NamedTuple

from panther.allocators.base import Divergence, Evaluate, Options, in_whole_numbers, limit_on, total
from panther.allocators.sensitivity import FLOORS, POWERS, planned, powered, sensitivity
from panther.allocators.uniform import uniform
from panther.chains import LINEAR
from panther.errors import ExhaustedError, one_line
from panther.spec import Choice, Cost, Target
from panther.tuner.backends import Question
from panther.tuner.space import Float, Space
from panther.tuner.strategy import Strategy, ask
from panther.tuner.trial import Goal, Limit, Params, Trial
from panther.tuner.trial import best_of as best_trial

TRIALS = 40  # evaluations unless somebody says how many
GLOBAL = 0.6  # of the trials turn the global knobs, the others those of finer groups
FINER = 5  # groups of the second stage: more than a dozen trials can tell apart teach nothing
REACH, FINER_REACH = 3.0, 1.5  # of a knob to each side: a group's error counts eightfold, or an eighth
FINER_PHASE = "finer "
NEAR = 40  # points ever further from one whose plan is known already, after which there is nothing new
STRATEGY = "auto"
NO_KNOBS: Params = {}
ROUNDING = 1e-6  # of a number of weights, which a share of them is
SIZES = 0.5  # the smallest plan that is looked for, as a share of the one that is known
BEYOND = "the plan is not within the limits"
LESS = 0.005  # by which the next must at least be smaller

# What layers are called that do the same in every architecture; the first that fits counts.
KINDS = {
    "attention": r"attn|attention|query|key|value|qkv|(^|[._])(q|k|v|o|in|out)_?proj|(^|\.)to_(q|k|v|out)",
    "mlp": r"mlp|ffn|feed_?forward|intermediate|output\.dense|dense_(h_to_4h|4h_to_h)|(^|[._])(fc|linear|w)\d$|"
    r"(up|down|gate)_proj|c_fc",
}

Key = tuple[object, ...]
Score = Callable[[Sequence[Choice]], float]  # higher is better; may raise, and NaN says nothing


@dataclass(frozen=True)
class Problem:
    """What is divided among which layers, and the knobs that there are."""

    options: Options
    target: Target
    divergence: Divergence
    groups: Mapping[str, tuple[str, ...]]  # knob -> layers
    places: Mapping[str, float]
    dense: Cost  # of the layers that nothing was done to: what shares are of
    counted: str = "params"  # the field of a cost that shares are of
    only_whole: bool = False  # whether layers without a chain are stored in whole numbers where they can be
    known: dict[Target, list[Choice]] = field(default_factory=dict, repr=False, compare=False)  # uniform plans

    def even(self, target: Target) -> list[Choice]:
        if target not in self.known:
            self.known[target] = uniform(self.options, target, divergence=self.divergence, evaluate=None)
        return self.known[target]


@dataclass(frozen=True)
class Smallest:
    """What to look for instead of the best score: the smallest plan whose score is at most `drop` below `metric`."""

    metric: float
    drop: float

    @property
    def least(self) -> float:
        return self.metric - self.drop - 1e-9 * (abs(self.metric) + self.drop)  # as Target.allows_drop


@dataclass(frozen=True)
class Tried:
    """A trial, its plan, and whether that was a new one; scores of known plans are not asked for again."""

    trial: Trial
    choices: tuple[Choice, ...]
    is_new: bool = True


@dataclass(frozen=True)
class Search:
    """All that was tried, the first being the sensitivity plan, and which of it won."""

    tried: tuple[Tried, ...]
    best: Tried
    stopped_by: str  # "trials", "timeout", "interrupt" or "nothing new"


def tuned(options: Options, target: Target, *, divergence: Divergence, evaluate: Evaluate | None) -> list[Choice]:
    """The best of TRIALS plans on the whole model, the sensitivity plan among them; without `evaluate` that plan."""
    start = sensitivity(options, target, divergence=divergence, evaluate=evaluate)
    if evaluate is None:
        return start
    return list(tune(problem_of(options, target, divergence), start, lambda plan: -evaluate(plan)).best.choices)


# Knobs ----------------------------------------------------------------------------------------------------------------


def problem_of(
    options: Options,
    target: Target,
    divergence: Divergence,
    dense: Cost | None = None,
    *,
    counted: str = "params",
    only_whole: bool = False,
) -> Problem:
    """dense: the cost of the layers that nothing was done to, where the last option of some is not that layer."""
    layers = [name for name, choices in options.items() if len(choices) > 1]
    dense = total([choices[-1] for choices in options.values()]) if dense is None else dense
    return Problem(options, target, divergence, _coarse(layers, options), _places(layers), dense, counted, only_whole)


def space_of(problem: Problem) -> Space:
    """The global knobs."""
    knobs = {"floor": Float(0.0, 1.0), "power": Float(0.25, 1.5)}
    if len(set(problem.places.values())) > 3:  # of fewer blocks the first and the last say as much
        knobs["depth"] = Float(-REACH, REACH)
    return Space({**knobs, **{name: Float(-REACH, REACH) for name in problem.groups}})


def plan_of(problem: Problem, params: Params) -> list[Choice]:
    """The plan that these knobs make; those that are missing are where they change nothing.

    "kept", where it is given, is the share of the sketchable weights (or bytes) that it keeps, instead of the problem's
    target.
    """
    chosen = _plan_of(problem, params)
    return in_whole_numbers(chosen, problem.options) if problem.only_whole else chosen


def _plan_of(problem: Problem, params: Params) -> list[Choice]:
    target = problem.target
    if "kept" in params:
        size = getattr(problem.dense, problem.counted)
        target = limit_on(problem.counted, int(params["kept"] * size + ROUNDING))
    even = problem.even(target)
    floor, power = params.get("floor", 0.0), params.get("power", 1.0)
    if floor >= 1:
        return even
    unscaled, losses = powered(problem.divergence, power), dict[int, float]()
    for layer, choices in problem.options.items():
        scale = 2.0 ** weight_of(problem, params, layer)
        losses |= {id(choice): scale * unscaled(choice) for choice in choices}
    # Asked for many times each; choices are known by their identity, since hashing one takes as long as the loss.
    return planned(problem.options, target, even, floor, lambda choice: losses[id(choice)])


def kept_of(problem: Problem, choices: Sequence[Choice]) -> float:
    """The share of the weights, or bytes, of the dense layers that a plan keeps."""
    used, dense = (getattr(cost, problem.counted) for cost in (total(choices), problem.dense))
    return float(used / max(1, dense))


def weight_of(problem: Problem, params: Params, layer: str) -> float:
    """w of one layer: how often what its error costs is doubled."""
    knobs = sum(params.get(name, 0.0) for name, layers in problem.groups.items() if layer in layers)
    return float(params.get("depth", 0.0) * problem.places.get(layer, 0.0) + knobs)


def _coarse(layers: Sequence[str], options: Options) -> dict[str, tuple[str, ...]]:
    """Kinds of layers, but for the largest, which the others are measured by, and the first and the last block."""
    kinds: dict[str, list[str]] = {}
    for layer in layers:
        kinds.setdefault(_kind(layer, options[layer]), []).append(layer)
    largest = max(kinds, key=lambda kind: len(kinds[kind]), default="")
    groups = {kind: tuple(members) for kind, members in kinds.items() if kind != largest}
    blocks = list(_blocks(layers).values())
    if len(blocks) > 1:
        groups["first"] = blocks[0]
    if len(blocks) > 2:
        groups["last"] = blocks[-1]
    return _distinct(groups)


def _kind(layer: str, choices: Sequence[Choice]) -> str:
    for kind, pattern in KINDS.items():
        if re.search(pattern, layer, re.IGNORECASE):
            return kind
    return "linear" if choices[0].scheme == LINEAR else "convolutions"


def _distinct(
    groups: Mapping[str, tuple[str, ...]], besides: Collection[tuple[str, ...]] = ()
) -> dict[str, tuple[str, ...]]:
    """One name for each set of layers, the last; none for those that there are besides."""
    names = {layers: name for name, layers in groups.items() if layers not in besides}
    return {name: layers for layers, name in names.items()}


def _blocks(layers: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Layers with the same name up to its first number; any other is its own block."""
    blocks: dict[str, list[str]] = {}
    for layer in layers:
        found = re.match(r".*?(^|\.)\d+(?=\.|$)", layer)
        blocks.setdefault(found[0] if found else layer, []).append(layer)
    return {name: tuple(members) for name, members in blocks.items()}


def _places(layers: Sequence[str]) -> dict[str, float]:
    blocks = list(_blocks(layers).values())
    last = max(1, len(blocks) - 1)
    return {layer: place / last - 0.5 for place, block in enumerate(blocks) for layer in block}


def starting_points(
    problem: Problem, start: Sequence[Choice], size: Params = NO_KNOBS
) -> list[tuple[Params, tuple[Choice, ...]]]:
    """Knobs and plans to begin with: those of the sensitivity plan `start`, and uniform; of this size where given."""
    still: Params = {**dict.fromkeys(space_of(problem).parameters, 0.0), "power": 1.0, **size}
    near: Params = {**still, "floor": FLOORS[1]}
    for floor, power in itertools.product((*FLOORS, 0.0, 1.0), POWERS):
        params = {**still, "floor": floor, "power": power}
        if key_of(plan_of(problem, params)) == key_of(start):
            near = params
            break
    even: Params = {**still, "floor": 1.0}
    return [(near, tuple(start)), (even, tuple(plan_of(problem, even)))]


# Finer groups ---------------------------------------------------------------------------------------------------------


def finer(problem: Problem, tried: Sequence[Tried]) -> Problem:
    """The problem with knobs for the FINER groups that matter most besides those that it has.

    A group matters by how closely the score followed its layers' weight w over the trials (the rank correlation), and
    by its share of the numbers.
    """
    scored = [one.trial for one in tried if one.trial.has_scores]
    scores = [trial.scores["score"] for trial in scored]
    layers = list(problem.places)
    weights = {layer: [weight_of(problem, trial.params, layer) for trial in scored] for layer in layers}
    means = [sum(column) / len(layers) for column in zip(*weights.values(), strict=True)]
    numbers = {layer: problem.options[layer][-1].cost.params for layer in layers}

    def matters(group: tuple[str, ...]) -> float:
        rows = zip(*(weights[layer] for layer in group), strict=True)
        apart = [sum(row) / len(group) - mean for row, mean in zip(rows, means, strict=True)]
        return abs(_rank_correlation(apart, scores)) * sum(numbers[layer] for layer in group)

    groups = parts_of(problem)
    return with_groups(problem, sorted(groups, key=lambda name: -matters(groups[name]))[:FINER])


def parts_of(problem: Problem) -> dict[str, tuple[str, ...]]:
    """What the global groups can be split into: roles ("encoder.*.query"), blocks and single layers."""
    layers = list(problem.places)
    parts: dict[str, tuple[str, ...]] = {f"layer {layer}": (layer,) for layer in layers}
    parts |= {f"block {block}": members for block, members in _blocks(layers).items() if len(members) > 1}
    return _distinct({**parts, **_roles(layers)}, besides=problem.groups.values())


def roles_of(problem: Problem) -> dict[str, tuple[str, ...]]:
    """The roles among them; single layers where names tell none."""
    parts, layers = parts_of(problem), list(problem.places)
    roles = _roles(layers)
    return {name: members for name, members in parts.items() if name in roles or (not roles and len(members) == 1)}


def _roles(layers: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Layers whose names differ in numbers only, but for a role that all of them have."""
    roles: dict[str, list[str]] = {}
    for layer in layers:
        roles.setdefault(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", layer), []).append(layer)
    return {name: tuple(members) for name, members in roles.items() if 1 < len(members) < len(layers)}


def _rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's; 0 where one of them does not vary."""
    from scipy.stats import spearmanr

    if len(set(first)) < 2 or len(set(second)) < 2:
        return 0.0
    return float(spearmanr(first, second).statistic)


# Trials ---------------------------------------------------------------------------------------------------------------


def tune(
    problem: Problem,
    start: Sequence[Choice],
    score: Score,
    *,
    trials: int | None = None,
    timeout: float | None = None,
    seed: int = 0,
    smallest: Smallest | None = None,
    given: Sequence[tuple[Sequence[Choice], float]] = (),
    resumed: Sequence[Trial] = (),
    tell: Callable[[Trial], None] = lambda _trial: None,
) -> Search:
    """Score up to `trials` different plans, `start` (the sensitivity plan) first; the best of them wins.

    Plans beyond the target are not scored, nor are equal plans twice, and a score that raises or is NaN costs its trial
    only. Ctrl-C, and `timeout` seconds, end the search with the best so far.

    smallest: look for the smallest plan that holds a score instead; `given` are then plans whose score is known.
    resumed: what an earlier run told; the search goes on behind it as that run would have. tell: hears every new trial.
    """
    end = math.inf if timeout is None else time.monotonic() + timeout
    study = _Study(problem, tuple(start), score, TRIALS if trials is None else trials, seed, smallest)
    for choices, known in given:
        study.scores[key_of(choices)] = known
    return study.run(end, list(resumed), tell)


def best_first(search: Search) -> list[Tried]:
    """What has a score, in falling order of it; the first of equals first."""
    able = [one for one in search.tried if one.trial.is_feasible]
    return sorted(able, key=lambda one: -one.trial.scores["score"])


def best_of(tried: Sequence[Tried], goal: Goal) -> Tried:
    """The first of the best; the first of all, which is the sensitivity plan, where no score says anything."""
    best = best_trial([one.trial for one in tried], goal)
    return next((one for one in tried if one.trial is best), tried[0])


def is_finer(tried: Tried) -> bool:
    """Whether a trial is of the second stage."""
    return tried.trial.phase.startswith(FINER_PHASE)


@dataclass
class _Study:
    """The running search. All it knows is in `tried`, so that a resumed one asks what the first would have asked."""

    problem: Problem
    start: tuple[Choice, ...]
    score: Score
    count: int
    seed: int
    smallest: Smallest | None
    tried: list[Tried] = field(default_factory=list)
    scores: dict[Key, float] = field(default_factory=dict)  # of plans; NaN where there is none

    def run(self, end: float, resumed: Sequence[Trial], tell: Callable[[Trial], None]) -> Search:
        stopped_by = ""
        try:
            for trial in resumed:
                self._remember(trial)
            while not stopped_by and not self._is_done:  # a resumed search may be
                self._try(self._next())
                tell(self.tried[-1].trial)
                if not self._is_done and time.monotonic() >= end:
                    stopped_by = "timeout"
            stopped_by = stopped_by or "trials"
        except KeyboardInterrupt:
            stopped_by = "interrupt"
        except ExhaustedError:
            stopped_by = "nothing new"
        if not self.tried:  # interrupted at once: the sensitivity plan is there all the same
            params, choices = self.given[0]
            self.tried.append(Tried(Trial(0, params, status="failed", error="interrupted"), choices))
        return Search(tuple(self.tried), best_of(self.tried, self.goal), stopped_by)

    @property
    def _is_done(self) -> bool:
        return sum(one.is_new for one in self.tried) >= self.count

    @property
    def goal(self) -> Goal:
        return Goal("score") if self.smallest is None else Goal("kept", maximise=False)

    @cached_property
    def given(self) -> list[tuple[Params, tuple[Choice, ...]]]:
        size = {} if self.smallest is None else {"kept": self._kept(self.start)}
        return starting_points(self.problem, self.start, size)

    # What comes next

    def _next(self) -> _Next:
        if len(self.tried) < len(self.given):
            return _Next("given", *self.given[len(self.tried)])
        coarse = [one for one in self.tried if not is_finer(one)]
        first = len(self.given) + round(GLOBAL * max(0, self.count - len(self.given)))
        stages = [partial(self._coarse, coarse, first), partial(self._finer, self.count - first)]
        if len(coarse) < len(self.tried) or sum(one.is_new for one in coarse) >= first:
            stages.reverse()
        for stage in stages:
            following = stage()
            if following is not None:
                return following
        raise ExhaustedError("every plan is known")

    def _coarse(self, coarse: Sequence[Tried], count: int) -> _Next | None:
        """The next point of the first stage."""
        return self._asked(self.problem, space_of(self.problem), [one.trial for one in coarse], {}, count)

    def _finer(self, count: int) -> _Next | None:
        """The next point of the second stage, which begins at the best one of the first."""
        coarse = list(itertools.takewhile(lambda one: not is_finer(one), self.tried))
        problem = finer(self.problem, coarse)
        names = [name for name in problem.groups if name not in self.problem.groups]
        if not names:
            return None
        best = best_of(coarse, self.goal).trial
        centre = changed(best, params={**best.params, **dict.fromkeys(names, 0.0)})
        space = Space({name: Float(-FINER_REACH, FINER_REACH) for name in names})
        told = [centre, *(one.trial for one in self.tried if is_finer(one))]
        following = self._asked(problem, space, told, centre.params, count)
        return following and following._replace(phase=FINER_PHASE + following.phase)

    def _asked(self, problem: Problem, space: Space, told: Sequence[Trial], fixed: Params, count: int) -> _Next | None:
        """A point of a space, after what was tried in it, whose plan is new: it, or one near it; None without any."""
        limits: tuple[Limit, ...] = ()
        if self.smallest is not None:
            limits = (Limit("score", self.smallest.least, is_upper=False),)
            known = self._kept(self.start)
            space = Space({**space.parameters, "kept": Float(SIZES * known, known)})
        trials = [changed(one, params={name: one.params[name] for name in space.parameters}) for one in told]
        seed = self.seed + bool(fixed)  # the two stages draw different points
        question = Question(space, (self.goal,), limits, trials, pending=(), count=1, seed=seed, number=len(told))
        initial = max(3, count // 4)
        points, phase = ask(Strategy(STRATEGY, initial, max(1, count - initial)), question)
        rng = question.rng()
        for attempt in range(1, NEAR + 1):
            if not points:
                return None
            params = {**fixed, **self._smaller(points[0])}
            choices = tuple(plan_of(problem, params))
            if key_of(choices) not in self.scores and self._fits(choices):
                return _Next(phase, params, choices)
            points = [space.narrowed(points[0], attempt / NEAR).sample(rng)]
        return None

    def _smaller(self, params: Params) -> Params:
        """In search of the smallest plan, a size below the smallest that holds: larger ones teach nothing."""
        if self.smallest is None:
            return params
        least = min(self._kept(self.start), self._kept(best_of(self.tried, self.goal).choices))
        return {**params, "kept": min(params["kept"], least * (1 - LESS))}

    # One trial

    def _try(self, following: _Next) -> None:
        phase, params, choices = following
        number, key, begin = len(self.tried), key_of(choices), time.monotonic()
        is_new, error = key not in self.scores, "the score is not a number"
        if number and is_new and not self._fits(choices):  # uniform, where limits are several and tight
            self.tried.append(Tried(Trial(number, params, phase, "failed", error=BEYOND), choices, is_new=False))
            return
        if is_new:
            try:
                self.scores[key] = float(self.score(choices))
            except Exception as failed:  # the user's function may raise anything, and other plans are still good
                self.scores[key], error = math.nan, one_line(failed)
        value, seconds = self.scores[key], time.monotonic() - begin
        if math.isnan(value):
            trial = Trial(number, params, phase, "failed", seconds=seconds, error=error)
        else:
            trial = Trial(number, params, phase, self._status(value), self._scores(value, choices), seconds)
        self.tried.append(Tried(trial, choices, is_new))

    def _remember(self, trial: Trial) -> None:
        """Take over a trial of an earlier run; its plan follows from its knobs."""
        if trial.number < len(self.given):
            choices = self.given[trial.number][1]
        else:
            choices = tuple(plan_of(with_groups(self.problem, trial.params), trial.params))
        key = key_of(choices)
        is_new = key not in self.scores and trial.error != BEYOND
        if is_new:
            self.scores[key] = trial.scores.get("score", math.nan)
        self.tried.append(Tried(trial, choices, is_new))

    def _fits(self, choices: Sequence[Choice]) -> bool:
        return self.smallest is not None or self.problem.target.is_met_by(total(choices))

    def _status(self, value: float) -> str:
        return "ok" if self.smallest is None or value >= self.smallest.least else "infeasible"

    def _scores(self, value: float, choices: Sequence[Choice]) -> dict[str, float]:
        return {"score": value} if self.smallest is None else {"score": value, "kept": self._kept(choices)}

    def _kept(self, choices: Sequence[Choice]) -> float:
        return 1.0 if self.smallest is None else kept_of(self.problem, choices)


class _Next(NamedTuple):
    """Who thought of a point, its knobs and its plan."""

    phase: str
    params: Params
    choices: tuple[Choice, ...]


def with_groups(problem: Problem, names: Collection[str]) -> Problem:
    """The problem with those of its finer groups besides those that it has."""
    added = {name: layers for name, layers in parts_of(problem).items() if name in names}
    return changed(problem, groups={**problem.groups, **added})


def key_of(choices: Sequence[Choice]) -> Key:
    """What equal plans share."""
    return tuple((choice.layer, choice.kind) for choice in choices)
