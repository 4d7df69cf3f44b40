"""A Report for people and for programs. To add a form, write its file and add its line to `RENDERERS`."""

from __future__ import annotations

from collections.abc import Callable

from panther.report import html, text
from panther.spec import Report

RENDERERS: dict[str, Callable[[Report], str]] = {
    "text": text.render,
    "html": html.render,
    "json": Report.to_json,
}

__all__ = ["RENDERERS"]
