"""Progress of long work, on stderr, so that stdout holds results only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """Says what runs and how far it is; silent when not enabled."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def say(self, text: str) -> None:
        """One line that stays."""
        if self.enabled:
            from rich.console import Console

            Console(stderr=True, highlight=False).print(text, soft_wrap=True, markup=False)

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """The items, with a bar that vanishes at the end (and no bar where stderr is not a terminal)."""
        if not self.enabled:
            yield from items
            return
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)
        yield from track(
            items, description=label, total=total, console=console, transient=True, disable=not console.is_terminal
        )

    @contextmanager
    def bar(self, label: str) -> Iterator[Callable[[float, str], None]]:
        """A bar that is moved by calling it with (share done, text); it vanishes at the end."""
        if not self.enabled:
            yield lambda _share, _text: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
            task = shown.add_task(label, total=1.0, text="")
            yield lambda share, text: shown.update(task, completed=share, text=text)
