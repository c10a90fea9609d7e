"""Figures for people (tables, a progress bar on standard error) and for scripts (JSON)."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

STANDARD_OUTPUT = "-"

Report = Callable[[str, int, int], None]


@contextmanager
def progress_bar() -> Iterator[Report]:
    """A bar that is called with what is being done, how much of it is done, and of how much."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("setting up", total=None)

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield report


def write_json(figures: Mapping[str, Any], target: str | None) -> None:
    """The figures as JSON: to standard output for "-", else to that file."""
    if target is None:
        return
    text = json.dumps(figures, indent=1) + "\n"
    if target == STANDARD_OUTPUT:
        print(text, end="")
    else:
        Path(target).write_text(text, encoding="utf-8")


def show_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], console: Console | None = None
) -> None:
    """A table on standard output, the first column to the left."""
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right")
    for row in rows:
        table.add_row(*row)
    (console or Console()).print(table)


def seconds(value: float | None) -> str:
    """Seconds, or milliseconds below a tenth of one."""
    if value is None:
        return "-"
    return f"{1000 * value:.2f} ms" if value < 0.1 else f"{value:.3f} s"


def size(value: float | None) -> str:
    """Bytes in the unit that fits."""
    if value is None:
        return "-"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value:.0f} B"


def rate(value: float | None) -> str:
    """Parameters a second."""
    if value is None:
        return "-"
    for unit, scale in (("M/s", 1e6), ("k/s", 1e3)):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value:.1f} /s"
