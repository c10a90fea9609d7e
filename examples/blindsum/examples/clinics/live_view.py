"""What the demo shows while it runs: round, phase, who is in, bytes, time."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


class LiveView:
    """A live table on a terminal; elsewhere one line for each thing that happens."""

    def __init__(self, console: Console, sites: list[str], rounds: int, bytes_up: Callable[[], int]) -> None:
        self._console = console
        self._rounds = rounds
        self._bytes_up = bytes_up
        self._started = time.monotonic()
        self._title = ""
        self._counts: dict[str, int] = {}
        self._phases: dict[str, str] = dict.fromkeys(sites, "starting")
        self._live = Live(self, console=console, refresh_per_second=6, transient=True)

    def __enter__(self) -> "LiveView":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def stage(self, title: str) -> None:
        """The demo begins something new."""
        self._title = title
        self._counts.clear()
        self._console.print(Text(f"{self._elapsed()}  {title}"), soft_wrap=True)

    def phase(self, site: str, phase: str) -> None:
        """A site goes on to another phase."""
        self._phases[site] = phase

    def round_done(self, site: str, values: Mapping[str, Any]) -> None:
        """A site has finished a round."""
        before = max(self._counts.values(), default=0)
        self._counts[site] = int(values["count"])
        if self._counts[site] > before and not self._console.is_terminal:
            self._console.print(
                f"{self._elapsed()}  round {self._counts[site]} of {self._rounds}: "
                f"{values['survivors']} members in the sum, sum check {values['check']}, "
                f"{self._bytes_up() / 1e6:.1f} MB received by the server",
                soft_wrap=True,
            )

    def _elapsed(self) -> str:
        seconds = int(time.monotonic() - self._started)
        return f"{seconds // 60}:{seconds % 60:02d}"

    def __rich__(self) -> RenderableType:
        done = max(self._counts.values(), default=0)
        table = Table.grid(padding=(0, 2))
        for site, phase in self._phases.items():
            table.add_row(site, Text(phase, "dim" if phase in ("done", "waiting") else "cyan"))
        head = Table.grid(padding=(0, 2))
        head.add_row(Text(self._elapsed(), "bold"), self._title)
        if done:
            head.add_row(
                f"round {done}/{self._rounds}", ProgressBar(total=self._rounds, completed=done, width=30)
            )
        head.add_row("received", f"{self._bytes_up() / 1e6:.1f} MB by the server, all of it sealed or signed")
        return Group(head, table)
