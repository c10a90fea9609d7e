"""The SQLite file behind a review queue or an intake: private, durable, and overwriting what it deletes."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from blindsum.client.hard_examples.audit_trail import AUDIT_SCHEMA
from blindsum.client.private_files import FolderError, read_private

_VERSION: Final = 1


def open_database(path: Path, schema: str) -> sqlite3.Connection:
    """The database, made with `schema` and the audit if it is new. Raises `FolderError`."""
    if not path.parent.is_dir():
        raise FolderError(f"there is no folder {path.parent}")
    if not path.exists():
        path.touch(mode=0o600)
    read_private(path)
    database = sqlite3.connect(path, isolation_level=None, timeout=10.0)
    database.execute("PRAGMA secure_delete = ON")
    database.execute("PRAGMA journal_mode = DELETE")
    database.execute("PRAGMA synchronous = FULL")
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version == 0:
        database.executescript(f"BEGIN; {schema} {AUDIT_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
    elif version != _VERSION:
        database.close()
        raise FolderError(f"{path} was written by another version of blindsum; update blindsum")
    return database


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """All or nothing."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        database.rollback()
        raise
    database.commit()
