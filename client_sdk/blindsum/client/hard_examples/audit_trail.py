"""What happened to examples, one line each, chained by hash: lines can be added, not changed or taken out."""

import json
import sqlite3
from dataclasses import dataclass
from typing import Final

from blindsum.crypto.errors import BlindsumError
from blindsum.crypto.primitives.derivation import labelled_hash

AUDIT_SCHEMA: Final = """
CREATE TABLE audit (
    sequence INTEGER PRIMARY KEY, at INTEGER NOT NULL, kind TEXT NOT NULL, detail TEXT NOT NULL,
    previous BLOB NOT NULL, digest BLOB NOT NULL) STRICT;
CREATE TRIGGER audit_unchanged BEFORE UPDATE ON audit
BEGIN SELECT RAISE(ABORT, 'the audit is append-only'); END;
CREATE TRIGGER audit_kept BEFORE DELETE ON audit
BEGIN SELECT RAISE(ABORT, 'the audit is append-only'); END;
"""


class AuditBroken(BlindsumError):
    """A line of the audit was changed, taken out or put in; the text says where."""


@dataclass(frozen=True)
class AuditLine:
    """One event. `at` is in seconds since 1970, `detail` JSON of names, numbers and digests, never pixels."""

    sequence: int
    at: int
    kind: str
    detail: str
    previous: bytes
    digest: bytes


def append(database: sqlite3.Connection, at: int, kind: str, **detail: object) -> None:
    """Add a line, in the caller's transaction."""
    last = database.execute("SELECT sequence, digest FROM audit ORDER BY sequence DESC LIMIT 1").fetchone()
    sequence, previous = (last[0] + 1, bytes(last[1])) if last else (1, b"")
    text = json.dumps(detail, sort_keys=True)
    digest = _digest(sequence, at, kind, text, previous)
    database.execute(
        "INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?)", (sequence, at, kind, text, previous, digest)
    )


def lines(database: sqlite3.Connection) -> list[AuditLine]:
    """All lines in order. Raises `AuditBroken` where the chain doesn't hold.

    Compare the last digest with one that was written down elsewhere: whoever can rewrite the whole file can
    also make a new chain.
    """
    found = []
    previous = b""
    query = "SELECT sequence, at, kind, detail, previous, digest FROM audit ORDER BY sequence"
    for position, row in enumerate(database.execute(query), start=1):
        line = AuditLine(*row)
        expected = _digest(position, line.at, line.kind, line.detail, previous)
        if (line.sequence, line.previous, line.digest) != (position, previous, expected):
            raise AuditBroken(
                f"line {position} of the audit doesn't continue the chain; keep the file as evidence"
            )
        previous = line.digest
        found.append(line)
    return found


def _digest(sequence: int, at: int, kind: str, detail: str, previous: bytes) -> bytes:
    return labelled_hash(
        "example audit",
        sequence.to_bytes(8, "little"),
        at.to_bytes(8, "little"),
        kind.encode(),
        detail.encode(),
        previous,
    )
