"""A Report as plain text: what was asked for, a row a layer, both models' totals, and what to beware of."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from panther.chains import CHANNELS, PIVOTED
from panther.spec import Figures, Healed, LayerReport, LimitReport, Report, Tuning

WIDTH = 110


def render(report: Report) -> str:
    """The report as lines of at most 110 characters, without colour codes.

    Names that do not fit are folded into several lines, never cut.
    """
    console = Console(
        file=io.StringIO(), width=WIDTH, color_system=None, force_terminal=False, highlight=False, emoji=False
    )
    for part in parts(report):
        console.print(part, markup=False)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]  # the StringIO of two lines above
    return "\n".join(line.rstrip() for line in text.splitlines())


def parts(report: Report) -> Iterator[str | Table]:
    """Its lines and tables, in order; empty lines lie between what does not belong together."""
    sketched = [row for row in report.layers if row.scheme != "dense"]
    dense = [row for row in report.layers if row.scheme == "dense"]
    yield f"target: {report.target}" if report.target else "target: none"
    yield "budget met: " + ("yes" if report.budget_met else "NO - this is the best that was found")
    yield from map(_limit, report.limits)
    fewer = sum(row.channels > 0 for row in sketched)
    how = f", {fewer} of them with fewer channels" if fewer else ""
    yield f"{len(sketched)} of {len(report.layers)} dense layers are smaller{how} (found by {report.capture_way})"
    yield ""
    if sketched:
        yield _sketched(sketched)
        yield "kept: share of the layer's weights that remain" + (
            "; bytes: of what they take in the file" if any(row.stored for row in sketched) else ""
        )
        yield (
            "error: predicted share of the layer's output energy that is lost, weighted by how strongly the model's "
            "output reacts to it (without calibration data: of the weight's energy)"
        )
        if any(row.in_sample for row in sketched):
            yield "~: of the rows that the layer was fitted to, fewer than its inputs; on others it is larger"
        yield ""
    if dense:
        yield _left_dense(dense)
        yield ""
    yield _totals(report)
    if report.baselines:
        yield _baselines(report)
    yield ""
    yield from _quality(report)
    if report.tuning is not None:
        yield from _tuning(report.tuning)
    if report.seconds:
        yield "seconds: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report.seconds.items())
    if report.environment:
        yield "measured with: " + ", ".join(f"{key} {value}" for key, value in report.environment.items())
    for note in report.notes:
        yield f"note: {note}"


# Divisor and name of the units that people write.
_UNITS = {"numbers": (1e6, " M"), "FLOPs": (1e9, " GFLOPs"), "bytes": (1e6, " MB")}


def _limit(limit: LimitReport) -> str:
    """ "  latency 11.9 of 12 ms: met"."""
    divisor, unit = _UNITS.get(limit.unit, (1.0, f" {limit.unit}".rstrip()))
    got = "not measured" if limit.got is None else f"{limit.got / divisor:.4g}"
    return f"  {limit.name} {got} of {limit.limit / divisor:.4g}{unit}: {'met' if limit.met else 'NOT met'}"


def _table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 0, 0, 1))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _sketched(rows: Sequence[LayerReport]) -> Table:
    with_bytes = any(row.stored for row in rows)
    numbers = ("kept", *(("bytes",) if with_bytes else ()), "rank", "terms", "error", "MFLOPs")
    table = _table("layer", "shape", "scheme", *numbers, right=numbers)
    for row in rows:
        table.add_row(
            row.name,
            row.shape,
            ", ".join(_how(row)),
            f"{100 * row.kept:.1f} %",
            *([f"{100 * row.after.size_bytes / row.before.size_bytes:.1f} %"] if with_bytes else []),
            " x ".join(map(str, row.ranks)),
            str(row.terms),
            ("~" if row.in_sample else "") + _share(row.error),
            f"{_millions(row.before.flops)} -> {_millions(row.after.flops)}",
        )
    return table


def _how(row: LayerReport) -> Iterator[str]:
    """What was done to a layer; one that only has fewer channels shows them as its rank."""
    yield row.scheme
    if row.packing == PIVOTED:
        yield row.packing
    if row.stored:
        yield row.stored
    if row.channels and row.scheme != CHANNELS:
        yield f"{row.channels} channels"


def _left_dense(rows: Sequence[LayerReport]) -> Table:
    table = _table("left dense", "shape", "MFLOPs", "why", right=("MFLOPs",))
    for row in rows:
        table.add_row(row.name, row.shape, _millions(row.before.flops), row.reason)
    return table


def _millions(flops: int) -> str:
    return f"{flops / 1e6:,.0f}" if flops >= 1e8 else f"{flops / 1e6:.3g}"


def _share(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 or value == 0 else f"{value:.0e}"


def _totals(report: Report) -> Table:
    table = _table("", "dense", "compressed", "ratio", right=("dense", "compressed", "ratio"))
    for label, digits, scale, better, field in _QUANTITIES:
        dense, compressed = _scaled(report.dense, field, scale), _scaled(report.compressed, field, scale)
        if dense is not None and compressed is not None:
            table.add_row(label, _number(dense, digits), _number(compressed, digits), _ratio(dense, compressed, better))
    return table


def _baselines(report: Report) -> Table:
    """What storing the same layers in whole numbers does by itself, beside what was done."""
    figure = next((name for name in ("top1", "cosine") if name in report.agreement), "")
    columns = ("file, MB", "GFLOPs", "latency", figure.replace("_", " "))
    table = _table("for comparison", *columns, right=columns)
    rows = [("this model", report.compressed, report.agreement)]
    rows += [(f"{b.name} alone, by the weights only", b.figures, b.agreement) for b in report.baselines]
    for name, figures, agreed in rows:
        ms = None if figures.latency_ms is None else f"{figures.latency_ms:.2f} ms"
        table.add_row(
            name,
            _number(figures.size_bytes / 1e6, 3),
            _number(figures.flops / 1e9, 3),
            ms or "",
            f"{agreed[figure]:.4f}" if figure in agreed else "",
        )
    return table


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}" if value >= 1 else f"{value:.3g}"


# Label, decimals, divisor, what the ratio says, field of Figures.
_QUANTITIES = (
    ("parameters and buffers, M", 3, 1e6, "kept", "params"),
    ("saved file, MB", 3, 1e6, "kept", "size_bytes"),
    ("GFLOPs of the dense layers", 3, 1e9, "kept", "flops"),
    ("latency, ms (median)", 2, 1.0, "faster", "latency_ms"),
    ("peak memory, MB", 1, 1e6, "kept", "peak_memory_bytes"),
)


def _scaled(figures: Figures, field: str, scale: float) -> float | None:
    value = getattr(figures, field)
    return None if value is None else value / scale


def _ratio(dense: float, compressed: float, better: str) -> str:
    if not dense or not compressed:
        return ""
    if better == "kept":
        return f"{100 * compressed / dense:.1f} % kept"
    speed = dense / compressed
    return f"{speed:.2f}x " + ("faster" if round(speed, 2) > 1 else "as fast" if round(speed, 2) == 1 else "(slower)")


def _quality(report: Report) -> Iterator[str]:
    if report.agreement:
        batches = f"{report.agreement_batches} batch" + ("" if report.agreement_batches == 1 else "es")
        kind = "held-out" if report.agreement_held_out else "not held-out"
        yield f"agreement with the dense model, {batches} ({kind}): " + ", ".join(
            f"{name.replace('_', ' ')} {value:.4f}" for name, value in report.agreement.items()
        )
    else:
        yield "agreement with the dense model: not measured"
    if report.healing is not None:
        yield _healing(report.healing)
    if report.metric is not None:
        dense, compressed = report.metric
        yield f"eval_fn: dense {dense:.4f}, compressed {compressed:.4f} ({compressed - dense:+.4f})"


def _healing(healed: Healed) -> str:
    """ "healed 112 s: refit .371 -> .311, distill -> .158 of the held-out loss; 840 steps"."""
    reached = {stage: figure for _, stage, figure in healed.history if stage != "before"}  # the last of each stage
    before = f"{_figure(healed.before)} -> "
    parts = [
        f"{stage} {before if i == 0 else '-> '}{_figure(figure)}" for i, (stage, figure) in enumerate(reached.items())
    ]
    steps = f"; {healed.steps:,} steps" if healed.steps else ""
    said = ", ".join(parts) or f"nothing was done at {_figure(healed.before)}"
    return f"healed {healed.seconds:.0f} s: {said} of the held-out loss{steps}"


def _tuning(tuning: Tuning) -> Iterator[str | Table]:
    """What the search gained, and a row a trial."""
    name = "eval_fn" if tuning.objective == "eval_fn" else "closeness to the dense model (minus the divergence)"
    yield ""
    yield (
        f"tuned on {name}: {_outcome(tuning)}; {len(tuning.trials)} plans in {tuning.seconds:.0f} s, "
        f"{tuning.outside / max(tuning.seconds, 1e-9):.0%} of it outside of the evaluations; {_ENDS[tuning.stopped_by]}"
    )
    table = _table("trial", "by", "score", "kept", "knobs", right=("trial", "score", "kept"))
    for trial in tuning.trials:
        score = trial.error if trial.score is None else f"{trial.score:.5g}"
        knobs = ", ".join(f"{knob} {value:.2g}" for knob, value in trial.knobs.items() if knob != "kept" and value)
        table.add_row(str(trial.number), trial.phase, score, f"{100 * trial.kept:.1f} %", knobs)
    yield table
    yield ""


_ENDS = {
    "trials": "all trials were made",
    "timeout": "ended by the timeout",
    "interrupt": "ended by Ctrl-C",
    "nothing new": "no other plan was found",
}


def _outcome(tuning: Tuning) -> str:
    """ "best 0.8812, sensitivity plan 0.8756 (+0.0056)"."""
    (start, start_kept), (best, kept) = tuning.start, tuning.best
    if tuning.is_smallest:
        gain = 100 * (kept - start_kept)
        return f"smallest plan keeps {kept:.2%}, sensitivity plan {start_kept:.2%} ({gain:+.2f} points)"
    if best is None or start is None:
        return f"best {'none' if best is None else f'{best:.5g}'}, the sensitivity plan could not be scored"
    return f"best {best:.5g}, sensitivity plan {start:.5g} ({best - start:+.3g})"


def _figure(loss: float) -> str:
    """Three places, or two digits of what is smaller; 1 is the loss of a constant answer."""
    return f"{loss:.3f}".removeprefix("0") if loss >= 0.01 else f"{loss:.2g}"
