"""benchmarks/tuner.py: tasks that are what they say, fair rows, and a command line that runs."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Self

import numpy as np
import pytest

from benchmarks import tuner, tuner_record
from benchmarks.tuner import Outcome, by_task, main, ranks, replayed, summary, tasks

SOON = {"count": 7}  # evaluations


def test_there_are_at_least_ten_recorded_tasks_with_several_seeds_a_point() -> None:
    paths = sorted(tuner.TASKS.glob("*.json"))
    assert len(paths) >= 10 and {path.stem for path in paths} == set(tuner_record.RECIPES)
    for path in paths:
        data = json.loads(path.read_text())
        points = list(tuner._grid(data["axes"]))
        assert len(data["accuracy"]) == len(data["kept"]) == len(points) >= 60
        assert all(len(row) >= 2 and all(0 <= score <= 1 for score in row) for row in data["accuracy"])
        assert data["axes"] == {
            name: [min(values), max(values)] for name, values in tuner_record.RECIPES[path.stem].axes.items()
        }


@pytest.mark.parametrize("name", sorted(tasks()))
def test_a_task_has_a_best_point_and_noise_around_the_truth(name: str) -> None:
    task, rng = tasks()[name], np.random.default_rng(0)
    points = [task.space.sample(rng) for _ in range(300)]
    regrets = [task.regret(point) for point in points]
    assert min(regrets) >= -1e-9 and 0.5 < statistics.fmean(regrets) < 1.5
    answers = [task.observe(points[0], rng) for _ in range(200)]
    spread = max(statistics.stdev(answers), 1e-6)
    assert abs(statistics.fmean(answers) - task.truth(points[0])) < 0.5 * spread + 1e-9


@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("branin", {"x0": np.pi, "x1": 2.275}),
        ("hartmann 3", {"x0": 0.114614, "x1": 0.555649, "x2": 0.852547}),
        (
            "hartmann 6",
            {"x0": 0.20169, "x1": 0.150011, "x2": 0.476874, "x3": 0.275332, "x4": 0.311652, "x5": 0.6573},
        ),
        ("rosenbrock 4, whole numbers", dict.fromkeys(("x0", "x1", "x2", "x3"), 1)),
        ("ackley 5, whole numbers", dict.fromkeys(("x0", "x1", "x2", "x3", "x4"), 0)),
    ],
)
def test_the_functions_have_their_known_optimum(name: str, point: dict[str, float]) -> None:
    assert tasks()[name].regret(point) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("search", list(tuner.SEARCHES))
@pytest.mark.parametrize("name", ["one_layer", "hartmann 3"])
def test_every_search_replays_every_kind_of_task(search: str, name: str) -> None:
    if search.startswith("Optuna"):
        pytest.importorskip("optuna")
    first, again = (replayed(name, search, seed=1, **SOON) for _ in range(2))
    assert first.regret == again.regret >= 0 and first.seconds >= 0


def test_the_same_question_has_the_same_answer_in_every_search(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[list[float]] = []

    def asks(space, answer, count, seed):
        points = [space.sample(np.random.default_rng(i)) for i in (3, 4, 3, 3, 3, 3, 3)]
        heard.append([answer(point) for point in points])
        return points, heard[-1], 0.0

    monkeypatch.setattr(tuner, "SEARCHES", {"one": asks, "other": asks})
    for search in ("one", "other"):
        replayed("one_layer_short", search, 0, 7)
    assert heard[0] == heard[1]
    assert len({heard[0][0], *heard[0][2:]}) > 1  # one question has the answers of several seeds


def outcomes() -> list[Outcome]:
    regrets = {"panther auto": (0.1, 0.2), "hyperopt TPE": (0.3, 0.2), "random": (0.5, 0.9)}
    return [Outcome("task", s, seed, r, r / 2, 0.01) for s, pair in regrets.items() for seed, r in enumerate(pair)]


def test_ranks_are_means_over_tasks_and_seeds_and_ties_share_a_place() -> None:
    assert ranks(outcomes()) == {"panther auto": 1.25, "hyperopt TPE": 1.75, "random": 3.0}


def test_the_summary_is_sorted_by_rank_and_relative_to_hyperopt() -> None:
    rows = summary(outcomes()).splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == ["panther auto", "hyperopt TPE", "random"]
    assert [cell.strip() for cell in rows[0].split("|")[2:-1]] == ["1.25", "0.1500", "0.60", "0.0750", "0.010"]
    assert "| task | " in by_task(outcomes())


def test_the_command_prints_both_tables_and_saves_outcomes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "all.json"
    given = ["--seeds", "2", "--first-seed", "7", "--evaluations", "6", "--searches", "random", "hyperopt TPE"]
    assert main(["--tasks", "one_layer", "--save", str(file), *given]) == 0
    out = capsys.readouterr().out
    assert "mean rank" in out and "| hyperopt TPE |" in out
    saved = json.loads(file.read_text())
    assert [(one["search"], one["seed"]) for one in saved] == [
        (s, n) for n in (7, 8) for s in ("random", "hyperopt TPE")
    ]


def test_a_run_that_is_cut_off_has_saved_whole_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Here:
        """Of ProcessPoolExecutor what is used, in this process."""

        def __init__(self, *_: object, **__: object) -> None: ...
        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None: ...

        map = staticmethod(map)

    def one(task: str, search: str, seed: int, _count: int) -> Outcome:
        if seed == 2:
            raise KeyboardInterrupt
        return Outcome(task, search, seed, 0.1, 0.1, 0.0)

    monkeypatch.setattr(tuner, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(tuner, "replayed", one)
    kept: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        tuner.replay(["a", "b"], ["c"], range(5), 3, 1, lambda outcomes: kept.append(len(outcomes)))
    assert kept == [2, 4]


def test_the_models_pick_is_judged_beside_the_best_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tasks()["branin"]
    monkeypatch.setattr(tuner, "expected_best", lambda trials, *_: trials[3])
    outcome = replayed("branin", "random", 0, 12)
    points, _scores, _ = tuner.SEARCHES["random"](task.space, lambda _: 0.0, 12, 0)
    assert outcome.expected == task.regret(points[3]) != outcome.regret


def test_unknown_tasks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--tasks", "nothing"])
    assert "no such task or search: nothing" in capsys.readouterr().err


def test_recording_trains_networks_and_writes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    recipe = tuner_record.Recipe(
        {"num_terms": [1, 2], "low_rank": [1, 4]}, tuner_record.sketched(tuner_record.one(), 64 * 128, 1), 0.1, seeds=2
    )
    cut = tuner_record.Recipe({"rank_1": [1, 20], "rank_2": [10]}, tuner_record.cut((64, 20, 10), 2), 0.1, seeds=2)
    monkeypatch.setattr(tuner_record, "RECIPES", {"small": recipe, "cut": cut})
    paths = list(tuner_record.record(tmp_path, ()))
    assert [path.stem for path in paths] == ["small", "cut"] and not list(tuner_record.record(tmp_path, ()))
    table = json.loads(paths[0].read_text())
    assert table["kept"] == [round(2 * rank * 192 / 8192, 5) for rank in (1, 4, 2, 8)]
    assert all(len(row) == 2 for row in table["accuracy"])
    low, high = (statistics.fmean(row) for row in json.loads(paths[1].read_text())["accuracy"])
    assert low < high
