"""Panther beside other methods at the same amount of work, and what each of its techniques is worth.

`python -m benchmarks.fidelity` compresses MiniLM and CREPE to 3/4, 1/2 and 1/3 of the FLOPs of their Linear and Conv
layers, with every method, unhealed and healed for the same minutes by the same label-free distiller. Every cell is
printed and stored as soon as it is measured; a run that was stopped goes on with --resume. Needs the Brown corpus
(python -m benchmarks.fetch_data); peers are installed from PyPI into an environment of their own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

import panther
from benchmarks import crepe, minilm
from benchmarks.ablation import Fits, compress_as, variants
from benchmarks.common import METHODS, Format, Method, built, header, table
from benchmarks.peers import PEERS
from benchmarks.peers.base import EXCLUDED, MODELS, STATES, Cell, Compressed, Job, Task, cells, load, measured
from benchmarks.peers.environment import Peer, run_peer
from benchmarks.peers.random_basis import with_random_bases
from models.data import CHECKOUT, MissingDataError
from models.minilm import SOURCES
from panther.spec import Budget, Heal

SHARES = (0.75, 0.5, 1 / 3)
ABLATION_SHARES = (0.5,)
PLAIN, WHITENED = METHODS[:2]
RESULTS = CHECKOUT / "out"
FORMATS: dict[str, tuple[str, Format]] = {
    "minilm": next(iter(minilm.FORMATS.items())),
    "crepe": next(iter(crepe.FORMATS.items())),
}
QUICK = {"text": "lee", "calibration": 64, "held_out": 64, "batch_size": 8}  # a tenth of the batches is held out
QUICK_MINUTES = 1 / 6
SETTINGS = ("text", "calibration", "held_out", "tones", "minutes", "seed", "ablation", "quick")  # one file, one set

Row = Callable[[float, Sequence[str]], Iterator[Cell]]  # share, states -> cells


# Results --------------------------------------------------------------------------------------------------------------


class Results:
    """Cells by what they are of, in a file that has one a line, below a line with the settings they belong to."""

    def __init__(self, path: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        """Start the file, or read what it holds.

        Raises: ValueError when it is there and is not to be gone on with, or belongs to other settings.
        """
        self.path = path
        self.cells: dict[tuple[str, str, float, str], Cell] = {}
        if path.exists():
            self._read(json.loads(json.dumps(settings)), resume=resume)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings) + "\n", encoding="utf-8")

    def _read(self, settings: Mapping[str, Any], *, resume: bool) -> None:
        if not resume:
            raise ValueError(f"{self.path} is there already: give --resume to go on with it, or another --results")
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a run that was killed may have left half a line
        first, *lines = whole.splitlines() or [""]
        if not first or json.loads(first) != settings:
            raise ValueError(f"{self.path} holds results of other settings ({first}): give another --results")
        if whole != text:
            self.path.write_text(whole, encoding="utf-8")
        for cell in map(Cell.from_json, lines):
            self.cells[cell.key] = cell

    def add(self, cell: Cell) -> None:
        self.cells[cell.key] = cell
        with self.path.open("a", encoding="utf-8") as file:
            file.write(cell.to_json() + "\n")

    def missing(self, job: Job, row: str, share: float, states: Sequence[str]) -> list[str]:
        """States that have not been measured; those that failed are tried again."""
        found = [self.cells.get((job.task.model, row, share, state)) for state in states]
        return [state for state, cell in zip(states, found, strict=True) if cell is None or cell.why]


# Rows -----------------------------------------------------------------------------------------------------------------


def rows_of(job: Job, names: Sequence[str] | None = None) -> dict[str, Row]:
    """Every row but the dense one, by its label; `names` are those wanted.

    Raises: ValueError for a name that no row has.
    """
    fits = Fits(job.of, job.task.seed)
    rows: dict[str, Row] = {
        "random basis (the paper's layer)": partial(_random_cells, job, fits),
        PLAIN.label: partial(_svd_cells, job, fits, PLAIN),
        WHITENED.label: partial(_svd_cells, job, fits, WHITENED),
        **{name: partial(_peer_cells, job, name, peer) for name, peer in PEERS.items()},
        "panther": partial(_panther_cells, job),
    }
    unknown = set(names or ()) - set(rows)
    if unknown:
        raise ValueError(f"--rows: no row is called {', '.join(sorted(unknown))}; there are {', '.join(rows)}")
    return {name: row for name, row in rows.items() if names is None or name in names}


def _svd_cells(job: Job, fits: Fits, method: Method, share: float, states: Sequence[str]) -> Iterator[Cell]:
    def compress(job: Job, share: float) -> Compressed:
        plan = fits.plan(method.how, method.search, share, method.packings)
        return Compressed(built(job.of, fits(method.how), plan))

    return cells(job, method.label, share, states, compress)


def _random_cells(job: Job, fits: Fits, share: float, states: Sequence[str]) -> Iterator[Cell]:
    def compress(job: Job, share: float) -> Compressed:
        plan = fits.plan(PLAIN.how, PLAIN.search, share, PLAIN.packings)
        return Compressed(with_random_bases(job.of.model, plan, job.task.seed))

    return cells(job, "random basis (the paper's layer)", share, states, compress)


def _peer_cells(job: Job, name: str, peer: Peer, share: float, states: Sequence[str]) -> Iterator[Cell]:
    return run_peer(peer, job.task, name, share, states)


def _panther_cells(job: Job, share: float, states: Sequence[str]) -> Iterator[Cell]:
    """Panther as its users run it; its own healing takes the place of the distiller that the others get."""
    ways: dict[str, str | Heal] = {"unhealed": "refit", "healed": Heal("auto", time_limit=60 * job.task.minutes)}
    for state in states:
        yield from cells(job, "panther", share, [state], partial(_panther, ways[state]), healing=_nothing_more)


def _panther(heal: str | Heal, job: Job, share: float) -> Compressed:
    result = panther.compress(
        job.of.model,
        Budget(flops=share),
        example_inputs=job.recipe.example_inputs,
        calib_data=job.recipe.batches,
        exclude=EXCLUDED[job.task.model],
        heal=heal,
        seed=job.task.seed,
        progress=False,
        verify=False,
    )
    return Compressed(result.model, tuple(result.report.notes))


def _nothing_more(job: Job, model: nn.Module) -> tuple[str, ...]:
    return ()


def ablation_rows(job: Job) -> dict[str, Row]:
    """A row for each variant; healing is one of the techniques, so that none is healed besides."""
    fits = Fits(job.of, job.task.seed)

    def row(label: str, compress: Any) -> Row:
        return lambda share, states: cells(job, label, share, states, compress)

    return {variant.label: row(variant.label, compress_as(variant, fits)) for variant in variants(job.of)}


def measure(
    job: Job, rows: Mapping[str, Row], shares: Sequence[float], states: Sequence[str], results: Results
) -> Iterator[Cell]:
    """Every cell that the results do not have yet, stored before it is given out; the dense model first."""
    if results.missing(job, "dense", 1.0, ["unhealed"]):
        dense = measured(job, Cell(job.task.model, "dense", 1.0, "unhealed"), job.of.model)
        results.add(dense)
        yield dense
    for label, row in rows.items():
        for share in shares:
            missing = results.missing(job, label, share, states)
            for cell in row(share, missing) if missing else ():
                results.add(cell)
                yield cell


# Printing -------------------------------------------------------------------------------------------------------------


def line_of(cell: Cell) -> str:
    """A cell on one line, as it is printed when it has been measured."""
    where = f"{cell.model} {named(cell.share)} {labelled(cell.row, cell.state)}"
    if cell.why:
        return f"{where}: not run: {cell.why}"
    _, read = FORMATS[cell.model]
    told = f"{where}: {read(cell.figures)}, FLOPs {cell.layer_flops:.3f} ({cell.seconds:.0f} s)"
    return "; ".join([told, *cell.notes])


def labelled(row: str, state: str) -> str:
    return row if state == "unhealed" else f"{row}, {state}"


def named(share: float) -> str:
    """1/3 rather than 0.333."""
    return str(Fraction(share).limit_denominator(100))


def comparison(
    job: Job, rows: Iterable[str], shares: Sequence[float], states: Sequence[str], results: Results, *, markdown: bool
) -> str:
    """All rows as one table, and below it why cells are empty."""
    title, read = FORMATS[job.task.model]
    columns = [title, *(text for share in shares for text in (f"{named(share)} of the FLOPs", "really"))]
    found = {key: cell for key, cell in results.cells.items() if key[0] == job.task.model}
    dense = found[job.task.model, "dense", 1.0, "unhealed"]
    lines = [["dense", *([read(dense.figures), "1"] * len(shares))]]
    for row in rows:
        for state in states:
            line = [labelled(row, state)]
            for share in shares:
                cell = found.get((job.task.model, row, share, state))
                line += ["-", "-"] if cell is None or cell.why else [read(cell.figures), f"{cell.layer_flops:.3f}"]
            lines.append(line)
    reasons = dict.fromkeys(f"{cell.row}: not run: {cell.why}" for cell in found.values() if cell.why)
    return "\n".join([table(columns, lines) if markdown else fixed_width(columns, lines), "", *reasons])


def fixed_width(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text: the first column to the left, the others to the right."""
    widths = [max(len(line[index]) for line in [columns, *rows]) for index in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        texts = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *texts[1:]]).rstrip()

    return "\n".join([line(columns), "-" * len(line(rows[0])), *map(line, rows)])


def heading(job: Job, *, ablation: bool) -> str:
    """What a reader needs to know beside the figures, and to measure them again."""
    minutes = f"{job.task.minutes:.3g} minutes"
    healed = (
        f"blocks and distillation take {minutes} each time, refit as long as it needs"
        if ablation
        else f"healed: {minutes} without labels, the others by panther's distiller and panther by heal='auto'"
    )
    layers = len(job.of.found.sketchable)
    peers = "; ".join(f"{' '.join(p.requirements)} ({p.licence}): {p.method}" for p in PEERS.values())
    what = [
        f"{job.recipe.name}: {job.recipe.notes}",
        f"calibration and healing: {job.of.samples} inputs, the same for every row; panther holds out a tenth of them",
        f"FLOPs: {job.dense.layers / 1e9:.4g} G in {layers} layers at the example inputs, counted as each model runs",
        healed,
        *([] if ablation else [f"peers: {peers}"]),
    ]
    return header([job.recipe], what, job.task.seed)


# Command line ---------------------------------------------------------------------------------------------------------


def tasks_of(given: argparse.Namespace) -> list[Task]:
    """The models to compress, with the data that the command line asks for."""
    minutes, seed = given.minutes, given.seed
    if given.quick:
        return [Task("minilm", QUICK, QUICK_MINUTES, seed)]
    options = {
        "minilm": {"text": given.text, "calibration": given.calibration, "held_out": given.held_out},
        "crepe": {"calibration": given.calibration, "count": given.tones},
    }
    return [Task(name, options[name], minutes, seed) for name in given.models]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="which (both)")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="labels of the rows to measure (all)")
    parser.add_argument("--shares", nargs="+", type=_share, metavar="SHARE", help="of the FLOPs (3/4 1/2 1/3)")
    parser.add_argument("--states", nargs="+", choices=STATES, default=list(STATES), help="of each row (both)")
    parser.add_argument("--minutes", type=float, default=3.0, help="of healing, a row and size (3)")
    parser.add_argument("--text", choices=sorted(SOURCES), default="brown")
    parser.add_argument("--calibration", type=int, default=3072, help="calibration texts and frames (3072)")
    parser.add_argument("--held-out", type=int, default=512, help="texts that are compared (512)")
    parser.add_argument("--tones", type=int, default=1000, help="check tones a noise level (1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ablation", action="store_true", help="panther's techniques instead of other methods")
    parser.add_argument("--quick", action="store_true", help="MiniLM at 1/2 on 64 texts, 10 s of healing: a trial")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--results", type=Path, help="file that cells are stored in, one a line (in out/)")
    parser.add_argument("--resume", action="store_true", help="go on with that file")
    return parser


def _share(text: str) -> float:
    """1/3 or 0.333."""
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a share between 0 and 1, as in 1/2 or 0.5")
    return value


def results_of(given: argparse.Namespace) -> Results:
    """The file of the command line, or one in out/ for each kind of run; a trial always starts anew.

    Raises: ValueError as Results.
    """
    kind = "-quick" if given.quick else "-ablation" if given.ablation else ""
    path: Path = given.results or RESULTS / f"fidelity{kind}.jsonl"
    if given.quick and not given.resume:
        path.unlink(missing_ok=True)
    return Results(path, {name: getattr(given, name) for name in SETTINGS}, resume=given.resume)


def main() -> int:
    given = arguments().parse_args()
    tasks = tasks_of(given)
    states = ["unhealed"] if given.ablation else given.states
    shares = given.shares or (ABLATION_SHARES if given.ablation or given.quick else SHARES)
    try:
        results = results_of(given)
        for task in tasks:
            job = load(task)
            rows = ablation_rows(job) if given.ablation else rows_of(job, given.rows)
            print(heading(job, ablation=given.ablation), flush=True)
            for cell in measure(job, rows, shares, states, results):
                print(line_of(cell), flush=True)
            print(f"\n{comparison(job, rows, shares, states, results, markdown=given.markdown)}\n", flush=True)
    except (MissingDataError, ValueError) as error:
        print(f"fidelity: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
