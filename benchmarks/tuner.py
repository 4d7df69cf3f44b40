"""How good panther's tuner is: against other searches at equal evaluations, and in compress(search="tuned").

    python -m benchmarks.tuner            replays recorded tasks and noisy functions: ranks, regret, seconds a point
    python -m benchmarks.tuner --minilm   share of the time that a tuned compression of MiniLM spends outside of eval_fn
    python -m benchmarks.tuner --record   trains the small networks whose scores are replayed (minutes)

A recorded task is a table: what a small network scores at every point of a grid, with several seeds a point. An
evaluation answers one of the seeds at random, so that the noise is what training really has; regret is in terms of
their mean. Every search sees the same answers to the same questions. What it recommends is the point of its best
answer, as its library does; a column beside it has what panther's model of the same answers would have recommended.

Needs optuna (and scikit-learn for --record) besides what panther has installed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import command, say, table
from panther.tuner.analysis import expected_best
from panther.tuner.backends import Question
from panther.tuner.space import Float, Integer, Space
from panther.tuner.strategy import Strategy, ask
from panther.tuner.trial import Goal, Trial

TASKS = Path(__file__).parent / "tuner_tasks"
EVALUATIONS, SEEDS, INITIAL = 30, 20, 5
NOISE = 0.05  # of a function's spread over its box
SPREAD = 4000  # random points that a function's scale is taken from

Point = dict[str, Any]


# Tasks ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Something to maximise in a box. `observe` is a noisy answer, `truth` what it is on average."""

    name: str
    space: Space
    truth: Callable[[Point], float]
    observe: Callable[[Point, np.random.Generator], float]
    best: float
    scale: float  # the regret of a random point, on average

    def regret(self, point: Point) -> float:
        return (self.best - self.truth(point)) / self.scale


def recorded(path: Path) -> Task:
    """A task of --record."""
    data = json.loads(path.read_text(encoding="utf-8"))
    space = Space({name: Integer(low, high) for name, (low, high) in data["axes"].items()})
    keys = [space.key(dict(zip(data["axes"], values, strict=True))) for values in _grid(data["axes"])]
    scores = [
        [accuracy - data["price"] * kept for accuracy in row]
        for row, kept in zip(data["accuracy"], data["kept"], strict=True)
    ]
    rows = dict(zip(keys, scores, strict=True))
    means = {key: statistics.fmean(row) for key, row in rows.items()}
    best = max(means.values())

    def observe(point: Point, rng: np.random.Generator) -> float:
        row = rows[space.key(point)]
        return float(row[int(rng.integers(len(row)))])

    return Task(
        data["task"],
        space,
        lambda point: means[space.key(point)],
        observe,
        best,
        best - statistics.fmean(means.values()),
    )


def _grid(axes: Mapping[str, Sequence[int]]) -> itertools.product[tuple[int, ...]]:
    return itertools.product(*(range(low, high + 1) for low, high in axes.values()))


def noisy(name: str, space: Space, function: Callable[[Sequence[float]], float], best: float) -> Task:
    """A function to minimise, its sign turned, with noise."""
    rng = np.random.default_rng(0)
    drawn = [-function(list(space.sample(rng).values())) for _ in range(SPREAD)]
    noise = NOISE * statistics.stdev(drawn)

    def truth(point: Point) -> float:
        return -function(list(point.values()))

    return Task(
        name,
        space,
        truth,
        lambda point, rng: truth(point) + noise * float(rng.standard_normal()),
        -best,
        -best - statistics.fmean(drawn),
    )


def branin(x: Sequence[float]) -> float:
    b, c, t = 5.1 / (4 * math.pi**2), 5 / math.pi, 1 / (8 * math.pi)
    return (x[1] - b * x[0] ** 2 + c * x[0] - 6) ** 2 + 10 * (1 - t) * math.cos(x[0]) + 10


def rosenbrock(x: Sequence[float]) -> float:
    return sum(100 * (b - a * a) ** 2 + (1 - a) ** 2 for a, b in itertools.pairwise(x))


def ackley(x: Sequence[float]) -> float:
    root = math.sqrt(sum(v * v for v in x) / len(x))
    waves = sum(math.cos(2 * math.pi * v) for v in x) / len(x)
    return -20 * math.exp(-0.2 * root) - math.exp(waves) + 20 + math.e


_HARTMANN = {
    3: (
        [[3, 10, 30], [0.1, 10, 35], [3, 10, 30], [0.1, 10, 35]],
        [[3689, 1170, 2673], [4699, 4387, 7470], [1091, 8732, 5547], [381, 5743, 8828]],
    ),
    6: (
        [
            [10, 3, 17, 3.5, 1.7, 8],
            [0.05, 10, 17, 0.1, 8, 14],
            [3, 3.5, 1.7, 10, 17, 8],
            [17, 8, 0.05, 10, 0.1, 14],
        ],
        [
            [1312, 1696, 5569, 124, 8283, 5886],
            [2329, 4135, 8307, 3736, 1004, 9991],
            [2348, 1451, 3522, 2883, 3047, 6650],
            [4047, 8828, 8732, 5743, 1091, 381],
        ],
    ),
}


def hartmann(x: Sequence[float]) -> float:
    """Of three or six variables."""
    a, p = (np.array(matrix, dtype=float) for matrix in _HARTMANN[len(x)])
    return -float(np.array([1.0, 1.2, 3.0, 3.2]) @ np.exp(-(a * (np.array(x) - p / 1e4) ** 2).sum(1)))


def box(kind: type[Integer | Float], *bounds: tuple[float, float]) -> Space:
    return Space({f"x{i}": kind(low, high) for i, (low, high) in enumerate(bounds)})  # type: ignore[arg-type]


def functions() -> list[Task]:
    unit = (0.0, 1.0)
    return [
        noisy("branin", box(Float, (-5.0, 10.0), (0.0, 15.0)), branin, 0.397887),
        noisy("branin, whole numbers", box(Integer, (-5, 10), (0, 15)), branin, _least(branin, (-5, 10), (0, 15))),
        noisy("hartmann 3", box(Float, *[unit] * 3), hartmann, -3.86278),
        noisy("hartmann 6", box(Float, *[unit] * 6), hartmann, -3.32237),
        noisy("rosenbrock 4, whole numbers", box(Integer, *[(-5, 10)] * 4), rosenbrock, 0.0),
        noisy("ackley 5, whole numbers", box(Integer, *[(-20, 12)] * 5), ackley, 0.0),
    ]


def _least(function: Callable[[Sequence[float]], float], *bounds: tuple[int, int]) -> float:
    return min(function(point) for point in itertools.product(*(range(low, high + 1) for low, high in bounds)))


@functools.cache
def tasks() -> dict[str, Task]:
    found = [recorded(path) for path in sorted(TASKS.glob("*.json"))]
    return {task.name: task for task in (*found, *functions())}


# Searches: task, answers, evaluations, seed -> the points in order, their scores, seconds spent in the search ---------

Answer = Callable[[Point], float]
Run = tuple[list[Point], list[float], float]


def with_panther(strategy: str, space: Space, answer: Answer, count: int, seed: int) -> Run:
    trials: list[Trial] = []
    seconds = 0.0
    while len(trials) < count:
        start = time.perf_counter()
        question = Question(space, (Goal(),), (), trials, (), 1, seed, len(trials))
        points, phase = ask(Strategy(strategy, INITIAL, count - INITIAL), question)
        seconds += time.perf_counter() - start
        if not points:
            break
        trials.append(Trial(len(trials), points[0], phase, scores={"score": answer(points[0])}))
    return [trial.params for trial in trials], [trial.scores["score"] for trial in trials], seconds


def with_hyperopt(space: Space, answer: Answer, count: int, seed: int) -> Run:
    """tpe.suggest with the settings that fmin has by itself."""
    import hyperopt
    from hyperopt import hp

    points: list[Point] = []
    scores: list[float] = []
    inside = 0.0

    def objective(drawn: Mapping[str, Any]) -> float:
        nonlocal inside
        start = time.perf_counter()
        point = {n: int(v) if isinstance(space.parameters[n], Integer) else float(v) for n, v in drawn.items()}
        points.append({name: point[name] for name in space.parameters})
        scores.append(answer(points[-1]))
        inside += time.perf_counter() - start
        return -scores[-1]

    expressions = {
        name: hp.uniformint(name, p.low, p.high) if isinstance(p, Integer) else hp.uniform(name, p.low, p.high)  # type: ignore[union-attr]
        for name, p in space.parameters.items()
    }
    start = time.perf_counter()
    hyperopt.fmin(
        objective,
        expressions,
        algo=hyperopt.tpe.suggest,
        max_evals=count,
        rstate=np.random.default_rng(seed),
        show_progressbar=False,
        verbose=False,
    )
    return points, scores, time.perf_counter() - start - inside


def with_optuna(kind: str, space: Space, answer: Answer, count: int, seed: int) -> Run:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    samplers = {"tpe": optuna.samplers.TPESampler, "gp": optuna.samplers.GPSampler}
    points: list[Point] = []
    scores: list[float] = []
    seconds = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study(direction="maximize", sampler=samplers[kind](seed=seed))
        for _ in range(count):
            start = time.perf_counter()
            trial = study.ask()
            point: Point = {}
            for name, p in space.parameters.items():
                if isinstance(p, Integer):
                    point[name] = trial.suggest_int(name, p.low, p.high)
                elif isinstance(p, Float):
                    point[name] = trial.suggest_float(name, p.low, p.high)
            seconds += time.perf_counter() - start
            points.append(point)
            scores.append(answer(point))
            start = time.perf_counter()
            study.tell(trial, scores[-1])
            seconds += time.perf_counter() - start
    return points, scores, seconds


SEARCHES: dict[str, Callable[[Space, Answer, int, int], Run]] = {
    "panther auto": functools.partial(with_panther, "auto"),
    "random": functools.partial(with_panther, "random"),
    "hyperopt TPE": with_hyperopt,
    "Optuna TPE": functools.partial(with_optuna, "tpe"),
    "Optuna GP": functools.partial(with_optuna, "gp"),
}
BASELINE = "hyperopt TPE"


# The replay -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """One search on one task with one seed."""

    task: str
    search: str
    seed: int
    regret: float  # of what it recommends, in units of a random point's
    expected: float  # the same of the point where panther's model of its answers is highest
    seconds: float  # a suggestion


def replayed(name: str, search: str, seed: int, count: int) -> Outcome:
    """Run a search on a task. The n-th question about a point has the same answer in every search."""
    task = tasks()[name]
    asked: dict[Any, int] = {}

    def answer(point: Point) -> float:
        key = task.space.key(point)
        asked[key] = asked.get(key, -1) + 1
        return task.observe(point, np.random.default_rng([seed, asked[key], _hash(key)]))

    points, scores, seconds = SEARCHES[search](task.space, answer, count, seed)
    trials = [Trial(n, p, scores={"score": score}) for n, (p, score) in enumerate(zip(points, scores, strict=True))]
    best = points[int(np.argmax(scores))]
    expected = expected_best(trials, task.space, Goal())
    of_model = task.regret(expected.params if expected else best)
    return Outcome(name, search, seed, task.regret(best), of_model, seconds / len(points))


def _hash(key: Any) -> int:
    """The same in every process, which hash() of a string is not."""
    return zlib.crc32(repr(key).encode())


def replay(
    names: Sequence[str],
    searches: Sequence[str],
    seeds: Sequence[int],
    count: int,
    jobs: int,
    keep: Callable[[list[Outcome]], None] = lambda _so_far: None,
) -> list[Outcome]:
    """Every search on every task with every seed; `keep` hears of all so far after each seed."""
    work = [(name, search, seed, count) for seed in seeds for name in names for search in searches]
    outcomes: list[Outcome] = []
    with ProcessPoolExecutor(jobs, initializer=_one_thread) as pool:
        for outcome in pool.map(replayed, *zip(*work, strict=True)):
            outcomes.append(outcome)
            if len(outcomes) % (len(names) * len(searches)) == 0:
                keep(outcomes)
                say(f"seed {outcome.seed} done ({len(outcomes)} of {len(work)})")
    return outcomes


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def ranks(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The mean place of every search among all on the same task and seed; equal regrets share theirs."""
    places: dict[str, list[float]] = {}
    groups: dict[tuple[str, int], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.task, outcome.seed), []).append(outcome)
    for group in groups.values():
        for one in group:
            below = sum(other.regret < one.regret for other in group)
            equal = sum(other.regret == one.regret for other in group)
            places.setdefault(one.search, []).append(below + (equal + 1) / 2)
    return {search: statistics.fmean(values) for search, values in places.items()}


def summary(outcomes: Sequence[Outcome]) -> str:
    """A row a search: mean rank, regret, regret relative to the baseline's and by the model, seconds a suggestion."""
    by_search: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_search.setdefault(outcome.search, []).append(outcome)
    mean = {search: statistics.fmean(o.regret for o in group) for search, group in by_search.items()}
    order = ranks(outcomes)
    rows = []
    for search in sorted(by_search, key=order.__getitem__):
        relative = f"{mean[search] / mean[BASELINE]:.2f}" if mean.get(BASELINE) else "-"
        expected = statistics.fmean(o.expected for o in by_search[search])
        seconds = statistics.fmean(o.seconds for o in by_search[search])
        figures = [f"{order[search]:.2f}", f"{mean[search]:.4f}", relative, f"{expected:.4f}", f"{seconds:.3f}"]
        rows.append([search, *figures])
    columns = ["search", "mean rank", "regret", f"regret / {BASELINE}'s", "model's pick", "seconds a suggestion"]
    return table(columns, rows)


def by_task(outcomes: Sequence[Outcome]) -> str:
    """A row a task: each search's mean regret."""
    searches = list(dict.fromkeys(outcome.search for outcome in outcomes))
    regrets: dict[tuple[str, str], list[float]] = {}
    for outcome in outcomes:
        regrets.setdefault((outcome.task, outcome.search), []).append(outcome.regret)
    names = dict.fromkeys(outcome.task for outcome in outcomes)
    rows = [[name, *(f"{statistics.fmean(regrets[name, search]):.4f}" for search in searches)] for name in names]
    return table(["task", *searches], rows)


# compress(search="tuned") ---------------------------------------------------------------------------------------------


TUNED_ON = "spearman"


def on_minilm(text: str, calibration: int, held_out: int, trials: int, budget: float) -> str:
    """What a tuned compression of MiniLM spends its time on and gains.

    eval_fn is the recipe's own evaluation. `lee_pearson` is of other texts than the figure that is tuned on.
    """
    import panther
    from models import minilm

    recipe = minilm.build(text, calibration, held_out)
    given: dict[str, Any] = {
        "example_inputs": recipe.example_inputs,
        "calib_data": recipe.batches,
        "heal": "none",
        "verify": False,
    }
    plain = panther.compress(recipe.model, budget, **given)
    result = panther.compress(
        recipe.model,
        budget,
        search="tuned",
        n_trials=trials,
        eval_fn=lambda model: recipe.metrics(model)[TUNED_ON],
        **given,
    )
    tuning = result.report.tuning
    if tuning is None:
        raise RuntimeError("compress(search='tuned') kept no record of its trials")
    share, each = tuning.outside / tuning.seconds, tuning.outside / len(tuning.trials)
    figures = {
        "dense": recipe.metrics(recipe.model),
        "sensitivity plan": recipe.metrics(plain.model),
        "tuned plan": recipe.metrics(result.model),
    }
    columns = list(figures["dense"])
    rows = [[name, *(f"{found[column]:.4f}" for column in columns)] for name, found in figures.items()]
    lines = [
        f"MiniLM at {budget:.0%} of its sketchable weights, {trials} trials on {TUNED_ON}, unhealed; {recipe.notes}",
        f"{tuning.seconds:.0f} s, of it outside of eval_fn {tuning.outside:.1f} s or {share:.1%}: {each:.2f} s a trial",
        "",
        table(["", *columns], rows),
        "",
        f"licence of {recipe.name}: {recipe.licence}",
    ]
    return "\n".join(lines)


# The command line -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--record", action="store_true", help="train the networks of tasks that are not recorded yet")
    add("--minilm", action="store_true", help="time compress(search='tuned') instead")
    add("--tasks", nargs="*", metavar="NAME", help=f"of {', '.join(tasks())} (default: all)")
    add("--searches", nargs="*", default=list(SEARCHES), metavar="NAME", help=f"of {', '.join(SEARCHES)}")
    add("--seeds", type=int, default=SEEDS, help=f"how many (default: {SEEDS})")
    add("--first-seed", type=int, default=0, help="try changes on others than those that are reported")
    add("--evaluations", type=int, default=EVALUATIONS)
    add("--jobs", type=int, default=1, help="processes; the seconds a suggestion are right with as many cores")
    add("--save", type=Path, metavar="FILE", help="write every outcome there as JSON")
    add("--trials", type=int, default=40, help="of --minilm")
    add("--budget", type=float, default=0.5, help="of --minilm")
    add("--text", default="brown", help="of --minilm: brown or lee")
    add("--calibration", type=int, default=256, help="sentences, of --minilm")
    add("--held-out", type=int, default=512, help="sentences an evaluation, of --minilm")
    options = parser.parse_args(argv)
    if options.record:
        from benchmarks.tuner_record import record

        for path in record(TASKS, options.tasks or ()):
            say(f"wrote {path}")
        return 0
    if options.minilm:
        print(on_minilm(options.text, options.calibration, options.held_out, options.trials, options.budget))
        return 0
    names = options.tasks or list(tasks())
    unknown = [*set(names) - set(tasks()), *set(options.searches) - set(SEARCHES)]
    if unknown:
        parser.error(f"no such task or search: {', '.join(unknown)}")

    def keep(outcomes: list[Outcome]) -> None:
        if options.save:
            options.save.write_text(json.dumps([asdict(outcome) for outcome in outcomes]) + "\n", encoding="utf-8")

    seeds = range(options.first_seed, options.first_seed + options.seeds)
    outcomes = replay(names, options.searches, seeds, options.evaluations, options.jobs, keep)
    print(f"command: {command()}")
    print(f"{len(names)} tasks, {options.seeds} seeds, {options.evaluations} evaluations each")
    print("regret: of the point with the best answer, in units of a random point's")
    print("model's pick: the point where a Gaussian process fitted to the same answers is highest\n")
    print(summary(outcomes), by_task(outcomes), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
