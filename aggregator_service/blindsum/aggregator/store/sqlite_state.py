"""State in SQLite: WAL, synchronous=FULL, one writer thread that commits for everyone who waits.

While one fsync runs, the next commits queue up and share the one after: a few hundred transactions a
second become thousands of acknowledgements.
"""

import asyncio
import contextlib
import dataclasses
import functools
import operator
import queue
import sqlite3
import threading
import time
import types
import typing
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from blindsum.aggregator.store.records import TABLES, AuditHeadRecord, Record
from blindsum.aggregator.store.state import (
    AUDIT,
    Advance,
    Append,
    Change,
    Delete,
    Insert,
    StorageFailed,
    Taken,
    chained,
)

R = TypeVar("R", bound=Record)

SCHEMA_VERSION = 2
_GROUP = 48
"""Most in one commit: while it is made durable, those of the one before are heard and come back."""
_QUICK_GROUP = 22
_QUICK_S = 0.001
"""On a disk that takes less for a commit, more rows at once would take longer than their sync."""
_STATEMENTS = 512
"""Statements that a connection keeps prepared: those that store 1 to 48 rows, for some kinds of them."""
_BUSY_MS = 5000
_COLUMN = {bytes: "BLOB NOT NULL", str: "TEXT NOT NULL", int: "INTEGER NOT NULL"}


_names: Any = functools.cache(lambda kind: tuple(field.name for field in dataclasses.fields(kind)))


def _columns(kind: type[Record]) -> tuple[str, ...]:
    found: tuple[str, ...] = _names(kind)
    return found


def _table(kind: type[Record]) -> str:
    return f'"{kind.__name__.removesuffix("Record").lower()}"'


def _definition(kind: type[Record]) -> str:
    hints = typing.get_type_hints(kind)
    columns = []
    for name in _columns(kind):
        hint = hints[name]
        if isinstance(hint, types.UnionType):
            inner = next(part for part in typing.get_args(hint) if part is not type(None))
            columns.append(f"{name} {_COLUMN[inner].removesuffix(' NOT NULL')}")
        else:
            columns.append(f"{name} {_COLUMN[hint]}")
    key = ", ".join(kind.KEY)
    return f"CREATE TABLE IF NOT EXISTS {_table(kind)} ({', '.join(columns)}, PRIMARY KEY ({key}))"


_row: Any = functools.cache(lambda kind: operator.attrgetter(*_names(kind)))
"""What a record's columns hold."""


def _statement(verb: str, kind: type[Record], count: int) -> str:
    names = ", ".join(_columns(kind))
    marks = f"({', '.join('?' for _ in _columns(kind))})"
    return f"{verb} INTO {_table(kind)} ({names}) VALUES {', '.join([marks] * count)}"


_storing: Any = functools.cache(_statement)
"""The statement that stores so many records."""


def _where(names: typing.Iterable[str]) -> str:
    return " AND ".join(f"{name} = ?" for name in names) or "1"


@dataclasses.dataclass(slots=True)
class _Job:
    changes: tuple[Change, ...]
    loop: asyncio.AbstractEventLoop
    done: "asyncio.Future[None]"


class SqliteState:
    """A `StateStore` in one SQLite file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with contextlib.ExitStack() as opened:
            try:
                self._writer = self._connect()
                opened.callback(self._writer.close)
                self._writer.execute("PRAGMA journal_mode=WAL")
                self._prepare()
                self._reader = self._connect()
            except sqlite3.Error as error:
                raise StorageFailed(
                    f"the state in {path.name} can't be opened: {error}; check the disk and its permissions"
                ) from error
            opened.pop_all()
        self._read_lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self.groups = 0
        """Transactions committed so far; with the acknowledgements it says how well grouping works."""
        self._thread = threading.Thread(target=self._write, name="state-writer", daemon=True)
        self._start_writer()

    def _start_writer(self) -> None:
        self._thread.start()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, isolation_level=None, check_same_thread=False, cached_statements=_STATEMENTS
        )
        connection.execute(f"PRAGMA busy_timeout={_BUSY_MS}")
        connection.execute("PRAGMA synchronous=FULL")
        return connection

    def _prepare(self) -> None:
        (version,) = self._writer.execute("PRAGMA user_version").fetchone()
        if version not in (0, SCHEMA_VERSION):
            raise StorageFailed(
                f"the state in {self._path.name} has schema {version}, this server knows {SCHEMA_VERSION}; "
                "use the matching release"
            )
        self._writer.execute("BEGIN IMMEDIATE")
        for kind in TABLES:
            self._writer.execute(_definition(kind))
        self._writer.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        self._writer.execute("COMMIT")

    def commit(self, *changes: Change) -> "asyncio.Future[None]":
        """Queue the changes for the next group commit."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._jobs.put(_Job(changes, loop, done))
        return done

    def get(self, kind: type[R], *key: bytes | str | int) -> R | None:
        """The committed record with this key."""
        found = self._select(kind, kind.KEY, key)
        return found[0] if found else None

    def find(self, kind: type[R], **equal: bytes | str | int) -> list[R]:
        """Committed records whose fields equal these, in order of their key."""
        return self._select(kind, tuple(equal), tuple(equal.values()))

    def newest(self, kind: type[R], count: int, **equal: bytes | str | int) -> list[R]:
        """The last so many of the committed records whose fields equal these, last first."""
        last_first = f"{', '.join(f'{name} DESC' for name in kind.KEY)} LIMIT {count:d}"
        return self._select(kind, tuple(equal), tuple(equal.values()), last_first)

    def _select(
        self, kind: type[R], names: tuple[str, ...], values: tuple[bytes | str | int, ...], order: str = ""
    ) -> list[R]:
        # Table and column names come from the record classes, values are bound.
        sql = (
            f"SELECT {', '.join(_columns(kind))} FROM {_table(kind)} "  # noqa: S608
            f"WHERE {_where(names)} ORDER BY {order or ', '.join(kind.KEY)}"
        )
        try:
            with self._read_lock:
                rows = self._reader.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise StorageFailed(f"the state can't be read: {error}; check the disk") from error
        except OverflowError:
            # A number from the wire that is larger than any that could have been stored.
            return []
        return [kind(*row) for row in rows]

    def close(self) -> None:
        """Finish what was submitted, then close."""
        self._jobs.put(None)
        self._thread.join()
        self._writer.close()
        with self._read_lock:
            self._reader.close()

    def _write(self) -> None:
        stop = False
        most = _GROUP
        while not stop:
            group: list[_Job] = []
            job = self._jobs.get()
            while True:
                if job is None:
                    stop = True
                    break
                group.append(job)
                if len(group) == most:
                    break
                try:
                    job = self._jobs.get_nowait()
                except queue.Empty:
                    break
            if group:
                began = time.perf_counter()
                self._commit_group(group)
                most = _QUICK_GROUP if time.perf_counter() - began < _QUICK_S else _GROUP

    def _commit_group(self, group: list[_Job]) -> None:
        errors: list[Exception | None] = [None] * len(group)
        try:
            if not self._insert_together(group):
                errors = self._commit_one_by_one(group)
            self.groups += 1
        except Exception as error:
            # Whatever it is, the thread goes on: those who wait must hear of it.
            with contextlib.suppress(sqlite3.Error):
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
            failed = StorageFailed(f"the state can't be written: {error}; check the disk")
            errors = [failed] * len(group)
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[None], Exception | None]]] = {}
        for job, outcome in zip(group, errors, strict=True):
            by_loop.setdefault(job.loop, []).append((job.done, outcome))
        for loop, outcomes in by_loop.items():
            # The loop may be gone when a server is torn down in the middle of a commit.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_deliver, outcomes)

    def _insert_together(self, group: list[_Job]) -> bool:
        """Commit a group of nothing but new records, all or none; False if nothing was done.

        Most groups are such, and many rows in one statement cost a third of as many statements. Above all,
        between two statements this thread waits for the interpreter while the others use it.
        """
        rows: dict[type[Record], list[Record]] = {}
        for job in group:
            for change in job.changes:
                if not isinstance(change, Insert):
                    return False
                rows.setdefault(type(change.record), []).append(change.record)
        statements = [
            (_storing("INSERT", kind, len(part)), list(chain.from_iterable(map(_row(kind), part))))
            for kind, records in rows.items()
            for part in (records[at : at + _GROUP] for at in range(0, len(records), _GROUP))
        ]
        if len(statements) == 1:
            # A transaction by itself.
            statement, values = statements[0]
            try:
                self._writer.execute(statement, values)
            except (sqlite3.IntegrityError, OverflowError):
                return False
            return True
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            for statement, values in statements:
                self._writer.execute(statement, values)
        except (sqlite3.IntegrityError, OverflowError):
            # One by one, it shows whose record it is.
            self._writer.execute("ROLLBACK")
            return False
        self._writer.execute("COMMIT")
        return True

    def _commit_one_by_one(self, group: list[_Job]) -> list[Exception | None]:
        self._writer.execute("BEGIN IMMEDIATE")
        errors = [self._apply(job.changes) for job in group]
        self._writer.execute("COMMIT")
        return errors

    def _apply(self, changes: tuple[Change, ...]) -> Exception | None:
        # A single statement that fails changes nothing by itself; most acknowledgements are one.
        several = len(changes) > 1 or any(isinstance(change, Append) for change in changes)
        if several:
            self._writer.execute("SAVEPOINT job")
        try:
            for change in changes:
                self._apply_one(change)
        except (sqlite3.IntegrityError, Taken, OverflowError) as error:
            if several:
                self._writer.execute("ROLLBACK TO job")
                self._writer.execute("RELEASE job")
            if isinstance(error, OverflowError):
                return StorageFailed("a record holds a number that can't be stored")
            return error if isinstance(error, Taken) else Taken(f"a record is there already: {error}")
        if several:
            self._writer.execute("RELEASE job")
        return None

    def _apply_one(self, change: Change) -> None:
        if isinstance(change, Append):
            row = self._writer.execute(
                "SELECT sequence, digest FROM event ORDER BY sequence DESC LIMIT 1"
            ).fetchone()
            sequence, previous = row or (0, b"")
            event = chained(change.event, sequence + 1, previous)
            self._store("INSERT", event)
            self._store("INSERT OR REPLACE", AuditHeadRecord(AUDIT, event.sequence, event.digest))
        elif isinstance(change, Delete):
            names = tuple(name for name, _ in change.where)
            self._writer.execute(
                f"DELETE FROM {_table(change.kind)} WHERE {_where(names)}",  # noqa: S608
                tuple(value for _, value in change.where),
            )
        elif isinstance(change, Advance):
            record: Any = change.record
            kind = type(record)
            key = tuple(getattr(record, name) for name in kind.KEY)
            row = self._writer.execute(
                f"SELECT version FROM {_table(kind)} WHERE {_where(kind.KEY)}",  # noqa: S608
                key,
            ).fetchone()
            if row is None or row[0] != record.version - 1:
                raise Taken(f"the {_table(kind)} has moved on since it was read")
            self._store("INSERT OR REPLACE", record)
        else:
            self._store("INSERT" if isinstance(change, Insert) else "INSERT OR REPLACE", change.record)

    def _store(self, verb: str, record: Record) -> None:
        self._writer.execute(_storing(verb, type(record), 1), _row(type(record))(record))


def _deliver(outcomes: list[tuple["asyncio.Future[None]", Exception | None]]) -> None:
    for done, error in outcomes:
        if done.done():
            continue
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)
