"""Group commit: how many acknowledgements share a transaction, beside a bare loop on the same disk.

The bare loop commits one row at a time with the same SQLite settings and nothing else, so it shows how
often the disk makes a transaction durable. A second one commits twenty of the store's rows at a time, as
fast as one thread can. The store is the server's own, with so many acknowledgements
in flight as there are members that wait. All take turns; the medians count.
"""

import asyncio
import os
import sqlite3
import statistics
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

from blindsum.aggregator.store.records import ReplyRecord
from blindsum.aggregator.store.sqlite_state import SqliteState
from blindsum.aggregator.store.state import Insert
from blindsum.bench.figures_output import Report, show_table
from blindsum.bench.machine import machine
from rich.console import Console

_FEDERATION = bytes(32)
_REPLY = os.urandom(400)
_TURNS = 3
_LEAST = 20


def bench_commits(in_flight: int, seconds: float, directory: Path | None, progress: Report) -> dict[str, Any]:
    """Figures of `seconds` of each kind, in turns, with so many acknowledgements in flight."""
    bare, bare_groups, grouped = [], [], []
    with tempfile.TemporaryDirectory(prefix="blindsum-", dir=directory) as folder:
        for turn in range(_TURNS):
            progress("commits", turn, _TURNS)
            bare.append(_bare(Path(folder) / f"bare-{turn}.sqlite", seconds / _TURNS))
            bare_groups.append(_bare_groups(Path(folder) / f"groups-{turn}.sqlite", seconds / _TURNS))
            state = SqliteState(Path(folder) / f"store-{turn}.sqlite")
            try:
                grouped.append(asyncio.run(_grouped(state, in_flight, seconds / _TURNS)))
            finally:
                state.close()
    commits = statistics.median(rate for rate, _ in grouped)
    return {
        "in_flight": in_flight,
        "bare_commits_per_s": statistics.median(bare),
        "bare_commits_of_20_per_s": statistics.median(bare_groups),
        "commits_per_s": commits,
        "acknowledgements_per_s": statistics.median(acknowledged for _, acknowledged in grouped),
        "acknowledgements_per_commit": statistics.median(acked / rate for rate, acked in grouped),
        "of_bare": commits / statistics.median(bare),
        "machine": machine(),
    }


def _bare(path: Path, seconds: float) -> float:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("CREATE TABLE row (id INTEGER PRIMARY KEY, body BLOB NOT NULL)")
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        connection.execute("INSERT INTO row (body) VALUES (?)", (_REPLY,))
        done += 1
    rate = done / (time.perf_counter() - start)
    connection.close()
    return rate


def _bare_groups(path: Path, seconds: float) -> float:
    """What is the most: groups of 20 acknowledgements, one after the other, that nobody waits for."""
    SqliteState(path).close()
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA synchronous=FULL")
    statement = f"INSERT INTO reply VALUES {', '.join(['(?, ?, ?, ?, ?, ?)'] * _LEAST)}"  # noqa: S608
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        rows = ((_FEDERATION, done, "upload", f"m{index}", done, _REPLY) for index in range(_LEAST))
        connection.execute(statement, list(chain.from_iterable(rows)))
        done += 1
    rate = done / (time.perf_counter() - start)
    connection.close()
    return rate


async def _grouped(state: SqliteState, in_flight: int, seconds: float) -> tuple[float, float]:
    """Commits and acknowledgements a second."""
    start, acknowledged, groups = time.perf_counter(), 0, state.groups

    async def member(index: int) -> None:
        nonlocal acknowledged
        sequence = 0
        while time.perf_counter() - start < seconds:
            sequence += 1
            row = ReplyRecord(_FEDERATION, sequence, "upload", f"m{index}", sequence, _REPLY)
            await state.commit(Insert(row))
            acknowledged += 1

    await asyncio.gather(*(member(index) for index in range(in_flight)))
    took = time.perf_counter() - start
    return (state.groups - groups) / took, acknowledged / took


def show_commits(figures: dict[str, Any], console: Console) -> None:
    """A table for people."""
    row = (
        f"{figures['bare_commits_per_s']:.0f}",
        f"{figures['bare_commits_of_20_per_s']:.0f}",
        f"{figures['commits_per_s']:.0f}",
        f"{figures['of_bare']:.2f}",
        f"{figures['acknowledgements_per_commit']:.0f}",
        f"{figures['acknowledgements_per_s']:.0f}",
    )
    columns = (
        "bare commits per s",
        "bare, 20 rows",
        "commits per s",
        "of bare",
        "acks per commit",
        "acks per s",
    )
    show_table(f"SQLite, synchronous=FULL, {figures['in_flight']} in flight", columns, [row], console)
