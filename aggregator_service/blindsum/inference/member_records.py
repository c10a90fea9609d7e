"""What the service remembers of members: registered evaluation keys, and how often each asked today.

Evaluation keys are public material, kept as files by their digest. The counts survive a restart, so that
nobody gets another day's questions by crashing the service.
"""

import sqlite3
from pathlib import Path
from typing import Final

from blindsum.crypto.errors import RefusalReason, Refused
from blindsum.crypto.inference.tail_wire import keys_digest

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS registration (
    member TEXT NOT NULL, digest BLOB NOT NULL, tail BLOB NOT NULL, registered INTEGER NOT NULL,
    PRIMARY KEY (member, digest)) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS asked (
    member TEXT NOT NULL, kind TEXT NOT NULL, day INTEGER NOT NULL, count INTEGER NOT NULL,
    PRIMARY KEY (member, kind)) STRICT, WITHOUT ROWID;
"""
_DAY: Final = 86_400
KEPT_SECONDS: Final = 2 * _DAY
"""Members make new keys every day; older ones are forgotten."""
KEPT_SETS: Final = 2


class MemberRecords:
    """The records in `directory`; times are Unix seconds, a member is `<federation>/<id>`.

    For one thread, `keys` aside, which any may call.
    """

    def __init__(self, directory: Path) -> None:
        self._folder = directory / "keys"
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._database = sqlite3.connect(
            directory / "members.sqlite", isolation_level=None, check_same_thread=False
        )
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=NORMAL")
        self._database.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def count(self, member: str, kind: str, limit: int, now: int) -> int:
        """Count one question or registration; how many are left today. Raises `Refused` (limit)."""
        left = self.left(member, kind, limit, now)
        if left <= 0:
            raise Refused(RefusalReason.LIMIT, f"today's {limit} {kind} are used up; go on tomorrow")
        day = now // _DAY
        self._database.execute(
            "INSERT INTO asked VALUES (?, ?, ?, 1) ON CONFLICT (member, kind) DO UPDATE SET "
            "count = CASE WHEN day = excluded.day THEN count + 1 ELSE 1 END, day = excluded.day",
            (member, kind, day),
        )
        return left - 1

    def left(self, member: str, kind: str, limit: int, now: int) -> int:
        """How many of `limit` a member has left today (UTC)."""
        row = self._database.execute(
            "SELECT count FROM asked WHERE member = ? AND kind = ? AND day = ?", (member, kind, now // _DAY)
        ).fetchone()
        return limit - (int(row[0]) if row else 0)

    def keep_keys(self, member: str, tail: bytes, keys: bytes, now: int) -> None:
        """Register evaluation keys for a tail; the member's oldest beyond two sets, and old ones, go."""
        digest = keys_digest(keys)
        path = self._path(digest)
        if not path.exists():
            aside = path.with_suffix(".new")
            aside.write_bytes(keys)
            aside.rename(path)
        self._database.execute(
            "INSERT OR REPLACE INTO registration VALUES (?, ?, ?, ?)", (member, digest, tail, now)
        )
        self.forget_old(now)
        rows = self._database.execute(
            "SELECT digest FROM registration WHERE member = ? ORDER BY registered DESC, digest = ? DESC",
            (member, digest),
        ).fetchall()
        for (old,) in rows[KEPT_SETS:]:
            self._database.execute("DELETE FROM registration WHERE member = ? AND digest = ?", (member, old))
            self._drop(old)

    def has_keys(self, member: str, tail: bytes, digest: bytes, now: int) -> bool:
        """Whether the member registered these keys for this tail, and not too long ago."""
        row = self._database.execute(
            "SELECT registered FROM registration WHERE member = ? AND digest = ? AND tail = ?",
            (member, digest, tail),
        ).fetchone()
        return row is not None and now - int(row[0]) < KEPT_SECONDS and self._path(digest).exists()

    def keys(self, digest: bytes) -> bytes:
        """Registered evaluation keys. Raises `Refused` if they are gone or damaged."""
        try:
            data = self._path(digest).read_bytes()
        except OSError:
            data = b""
        if keys_digest(data) != digest:
            # Damaged, as after a power cut: without the file they can be registered again.
            self._path(digest).unlink(missing_ok=True)
            raise Refused(RefusalReason.WRONG_DIGEST, "the evaluation keys aren't here; register them again")
        return data

    def forget_old(self, now: int) -> None:
        """Remove keys that were registered more than two days ago."""
        rows = self._database.execute(
            "SELECT DISTINCT digest FROM registration WHERE registered <= ?", (now - KEPT_SECONDS,)
        ).fetchall()
        self._database.execute("DELETE FROM registration WHERE registered <= ?", (now - KEPT_SECONDS,))
        for (digest,) in rows:
            self._drop(digest)

    def _drop(self, digest: bytes) -> None:
        row = self._database.execute("SELECT 1 FROM registration WHERE digest = ?", (digest,)).fetchone()
        if row is None:
            self._path(digest).unlink(missing_ok=True)

    def _path(self, digest: bytes) -> Path:
        return self._folder / digest.hex()
