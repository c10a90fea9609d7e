"""A look at the state from outside the server: read-only, also while the server runs."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from blindsum.aggregator.store.records import Record
from blindsum.aggregator.store.sqlite_state import SCHEMA_VERSION, _columns, _table, _where
from blindsum.aggregator.store.state import StorageFailed

R = TypeVar("R", bound=Record)


class SqliteReader:
    """The records in a state file. Sees one consistent state from the first read to `close`."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise StorageFailed(f"there is no state in {path.parent}; name the server's data directory")
        self._name = path.name
        try:
            # By URI, so that nothing is made or changed; the path may hold ? or %.
            self._connection = sqlite3.connect(
                f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None
            )
            self._connection.execute("PRAGMA busy_timeout=5000")
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            self._connection.execute("BEGIN")
        except sqlite3.Error as error:
            raise StorageFailed(f"the state in {path.name} can't be read: {error}") from error
        self.schema: int = version
        if version != SCHEMA_VERSION:
            self._connection.close()
            raise StorageFailed(
                f"the state in {path.name} has schema {version}, this release knows {SCHEMA_VERSION}; "
                "use the matching release"
            )

    def each(self, kind: type[R], **equal: bytes | str | int) -> Iterator[R]:
        """Records whose fields equal these, in order of their key, one at a time."""
        # Table and column names come from the record classes, values are bound.
        sql = (
            f"SELECT {', '.join(_columns(kind))} FROM {_table(kind)} "  # noqa: S608
            f"WHERE {_where(equal)} ORDER BY {', '.join(kind.KEY)}"
        )
        try:
            for row in self._connection.execute(sql, tuple(equal.values())):
                yield kind(*row)
        except sqlite3.Error as error:
            raise StorageFailed(f"the state in {self._name} can't be read: {error}") from error

    def find(self, kind: type[R], **equal: bytes | str | int) -> list[R]:
        """The same as a list."""
        return list(self.each(kind, **equal))

    def get(self, kind: type[R], *key: bytes | str | int) -> R | None:
        """The record with this key."""
        return next(self.each(kind, **dict(zip(kind.KEY, key, strict=True))), None)

    def damage(self) -> str:
        """What SQLite's own check finds; empty if nothing."""
        try:
            (found,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.Error as error:
            return str(error)
        return "" if found == "ok" else str(found)

    def copy_to(self, target: Path) -> None:
        """Write this very state into a new file."""
        try:
            with sqlite3.connect(target) as copy:
                self._connection.backup(copy)
            copy.close()
        except sqlite3.Error as error:
            raise StorageFailed(f"the state can't be copied: {error}") from error

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _place: TracebackType | None
    ) -> None:
        self.close()
