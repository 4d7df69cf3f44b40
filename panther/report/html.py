"""A Report as one HTML page that needs no other file: the lines and tables of the text."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from rich.table import Table

from panther.report.text import parts
from panther.spec import Report

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222; }
p { margin: 0.2em 0; }
p.limit { margin-left: 1.5em; }
p.note { color: #8a4b00; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2em 0.8em; text-align: left; border-bottom: 1px solid #ddd; overflow-wrap: anywhere; }
th { border-bottom: 2px solid #888; }
.right { text-align: right; }
"""


def render(report: Report, more: Sequence[str] = ()) -> str:
    """The page; more: lines behind the report's own."""
    lines = [*parts(report), *more]
    body = "\n".join(_table(part) if isinstance(part, Table) else _line(part) for part in lines if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>panther report</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>panther report</h1>\n{body}\n</body>\n</html>\n"
    )


def _line(text: str) -> str:
    kind = "note" if text.startswith("note: ") else "limit" if text.startswith("  ") else ""
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{escape(text.strip())}</p>"


def _table(table: Table) -> str:
    sides = [' class="right"' if column.justify == "right" else "" for column in table.columns]
    head = [str(column.header) for column in table.columns]
    cells = zip(*(map(str, column.cells) for column in table.columns), strict=True)
    rows = "\n".join(_row("td", sides, row) for row in cells)
    return f"<table>\n<thead>\n{_row('th', sides, head)}\n</thead>\n<tbody>\n{rows}\n</tbody>\n</table>"


def _row(tag: str, sides: list[str], texts: list[str] | tuple[str, ...]) -> str:
    return "<tr>" + "".join(f"<{tag}{s}>{escape(t)}</{tag}>" for s, t in zip(sides, texts, strict=True)) + "</tr>"
