"""Backup of a running server into one file, and restoring it into an empty directory.

A backup holds one consistent state, the blobs that this state names, and the transport authority's key: keep
it as safe as the data directory. It holds nothing that opens an update or a model. Uploads in progress aren't
in it; their members go on from the first byte.

Blobs never change under their names, but folding and retention delete them. So the state is copied first,
then every blob that it names is linked aside; if one is gone by then, all of it is done again.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from blindsum.aggregator.audit import AuditHead, head_of, verify
from blindsum.aggregator.engine import checkpoint_name
from blindsum.aggregator.folding import contribution_name, result_name, sum_name
from blindsum.aggregator.round_run import CONCLUDED, OPEN, PUBLISHED
from blindsum.aggregator.store.file_blobs import sync_directory
from blindsum.aggregator.store.records import (
    CheckpointRecord,
    ContributionRecord,
    FederationRecord,
    InitialStateRecord,
    RoundFloorRecord,
    RoundRecord,
    SumRecord,
)
from blindsum.aggregator.store.sqlite_reader import SqliteReader
from blindsum.aggregator.store.state import StorageFailed
from blindsum.crypto.errors import BlindsumError

FORMAT = 1
STATE = "state.sqlite"
MANIFEST = "manifest.json"
ROUNDS_SKIPPED = 1000
"""After restoring, round numbers go on so far above the newest one in the backup."""
_AUTHORITY = ("transport_ca.key", "transport_ca.pem")
_WHOLE_ROOMS = ("example", "model")
"""What lies there doesn't hang on a round: all of it goes in."""
_ASIDE = "backup-"
_DAY = 86_400
_TRIES = 20
_PART = 1 << 20


@dataclass(frozen=True)
class BackupContents:
    """What a backup holds."""

    path: Path
    files: int
    size: int
    head: AuditHead
    created: str


def named_blobs(state: SqliteReader) -> dict[str, bool]:
    """Every blob that a state names; False for sums that retention may have deleted already."""
    names: dict[str, bool] = {}
    for row in state.each(RoundRecord):
        if row.state == OPEN:
            key: dict[str, bytes | int] = {"federation": row.federation, "round": row.number}
            for upload in state.each(ContributionRecord, **key):
                if upload.folded is None:
                    names[contribution_name(row.federation, row.number, upload.member, upload.digest)] = True
            for total in state.each(SumRecord, **key):
                names[sum_name(row.federation, row.number, total.generation)] = True
        elif row.state in (PUBLISHED, CONCLUDED):
            names[result_name(row.federation, row.number)] = row.state == PUBLISHED
    newest: dict[tuple[bytes, bytes], int] = {}
    states = state.find(CheckpointRecord)
    for found in states:
        if found.agreed:
            place = (found.federation, found.chain)
            newest[place] = max(newest.get(place, 0), found.state_round)
    for found in states:
        needed = found.agreed == 1 and newest[found.federation, found.chain] == found.state_round
        name = checkpoint_name(found.federation, found.sealed_digest)
        names[name] = needed or names.get(name, False)
    for waiting in state.each(InitialStateRecord):
        names[checkpoint_name(waiting.federation, waiting.sealed_digest)] = True
    return names


def back_up(data: Path, target: Path, *, replace: bool = False) -> BackupContents:
    """Write a backup of the server's data directory into `target` (mode 0600), while it runs or not.

    Raises `StorageFailed`, also if the state or its audit is damaged: such a state is kept for a look, not
    put over a good backup.
    """
    if target.exists() and not replace:
        raise BlindsumError(f"{target} is there already; name a new file, or say --replace")
    try:
        for left in data.glob(f"{_ASIDE}*"):
            # Links of a backup that was killed: they keep deleted blobs on the disk.
            if time.time() - left.stat().st_mtime > _DAY:
                shutil.rmtree(left, ignore_errors=True)
        aside = Path(tempfile.mkdtemp(prefix=_ASIDE, dir=data))
    except OSError as error:
        raise StorageFailed(f"{data} can't be written: {error.strerror}") from None
    try:
        for _ in range(_TRIES):
            if _gather(data, aside):
                return _pack(data, aside, target)
        raise StorageFailed("the server deletes blobs faster than they can be linked; try again")
    except OSError as error:
        raise StorageFailed(f"the backup can't be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _gather(data: Path, aside: Path) -> bool:
    """The state and links to its blobs in `aside`; False if a blob that it needs went away meanwhile."""
    shutil.rmtree(aside)
    aside.mkdir(mode=0o700)
    with SqliteReader(data / STATE) as state:
        damage = state.damage()
        report = verify(state)
        if damage or not report.holds:
            raise StorageFailed(f"the state isn't sound, so it isn't backed up: {damage or report.reason}")
        state.copy_to(aside / STATE)
        names = named_blobs(state)
    for room in _WHOLE_ROOMS:
        for path in (data / "blobs" / room).glob("*"):
            names.setdefault(f"{room}/{path.name}", False)
    for name, needed in names.items():
        link = aside / "blobs" / name
        link.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            os.link(data / "blobs" / name, link)
        except FileNotFoundError:
            if needed:
                return False
    return True


def _pack(data: Path, aside: Path, target: Path) -> BackupContents:
    with SqliteReader(aside / STATE) as state:
        head = head_of(state)
    files: dict[str, dict[str, Any]] = {}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    fresh = target.with_name(target.name + ".new")
    fresh.unlink(missing_ok=True)
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(handle, "wb") as out:
            with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
                for name, path in _members(data, aside):
                    files[name] = _add(archive, name, path)
                manifest = {
                    "format": FORMAT,
                    "version": version("blindsum"),
                    "created": created,
                    "audit_head": str(head),
                    "files": files,
                }
                body = json.dumps(manifest, indent=1, sort_keys=True).encode()
                entry = tarfile.TarInfo(MANIFEST)
                entry.size, entry.mode = len(body), 0o600
                archive.addfile(entry, BytesIO(body))
            out.flush()
            os.fsync(out.fileno())
        fresh.rename(target)
        sync_directory(target.parent)
    finally:
        fresh.unlink(missing_ok=True)
    return BackupContents(target, len(files), sum(entry["size"] for entry in files.values()), head, created)


def _members(data: Path, aside: Path) -> Iterator[tuple[str, Path]]:
    yield STATE, aside / STATE
    for name in _AUTHORITY:
        yield f"authority/{name}", data / "authority" / name
    for path in sorted((aside / "blobs").rglob("*")):
        if path.is_file():
            yield str(path.relative_to(aside)), path


class _Hashed:
    """A file that is digested as it is read or written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.digest.update(data)
        self.size += len(data)
        return data


def _add(archive: tarfile.TarFile, name: str, path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = os.fstat(file.fileno()).st_size, 0o600
        hashed = _Hashed(file)
        archive.addfile(entry, hashed)
    return {"size": hashed.size, "sha256": hashed.digest.hexdigest()}


def restore(backup: Path, data: Path) -> BackupContents:
    """Put a backup into a data directory that isn't there yet, or is empty.

    Everything is compared with the manifest before the directory gets its name. Raises `BlindsumError`.
    """
    if data.exists() and (not data.is_dir() or any(data.iterdir())):
        raise BlindsumError(f"{data} isn't empty: --replace moves what is there aside")
    data.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{data.name}.", dir=data.parent))
    try:
        manifest = _unpack(backup, aside)
        head = AuditHead.parse(manifest["audit_head"])
        with SqliteReader(aside / STATE) as state:
            report = verify(state, head)
            if state.damage() or not report.holds:
                raise BlindsumError(f"{backup} isn't sound: {state.damage() or report.reason}")
            missing = [
                name
                for name, needed in named_blobs(state).items()
                if needed and not (aside / "blobs" / name).is_file()
            ]
        if missing:
            raise BlindsumError(f"{backup} lacks {missing[0]}, which its state names")
        _raise_floors(aside / STATE)
        for folder in {path.parent for path in aside.rglob("*")}:
            sync_directory(folder)
        if data.exists():
            data.rmdir()
        aside.rename(data)
        sync_directory(data.parent)
    except (OSError, tarfile.TarError, sqlite3.Error, KeyError, TypeError, ValueError) as error:
        raise BlindsumError(f"{backup} can't be restored: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    files = manifest["files"]
    return BackupContents(
        backup, len(files), sum(entry["size"] for entry in files.values()), head, manifest["created"]
    )


def set_aside(data: Path) -> Path:
    """Rename a data directory that is in the way of a restore; its new name.

    Raises `BlindsumError` while a server runs on it.
    """
    if is_running(data):
        raise BlindsumError(f"a server runs on {data}; stop it first")
    aside = data.with_name(f"{data.name}.replaced-{datetime.now(UTC):%Y%m%dT%H%M%S%f}")
    try:
        data.rename(aside)
        sync_directory(data.parent)
    except OSError as error:
        raise StorageFailed(f"{data} can't be renamed: {error.strerror}") from error
    return aside


def is_running(data: Path) -> bool:
    """Whether a server runs on a data directory."""
    try:
        handle = os.open(data / "lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _unpack(backup: Path, aside: Path) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {}
    manifest: dict[str, Any] | None = None
    with tarfile.open(backup, "r:") as archive:
        for entry in archive:
            source = archive.extractfile(entry) if entry.isreg() else None
            if source is None or entry.name in found or manifest is not None:
                raise BlindsumError(f"{backup} isn't a backup: {entry.name!r:.100} doesn't belong into one")
            if entry.name == MANIFEST:
                manifest = json.loads(source.read())
                continue
            path = aside / entry.name
            if not path.resolve().is_relative_to(aside.resolve()):
                raise BlindsumError(f"{backup} isn't a backup: {entry.name!r:.100} leads out of it")
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            found[entry.name] = _write(_Hashed(source), path)
    if manifest is None or manifest.get("format") != FORMAT:
        raise BlindsumError(f"{backup} isn't a whole backup of this format; it may be cut short")
    if found != manifest["files"]:
        wrong = sorted(n for n in {*found, *manifest["files"]} if found.get(n) != manifest["files"].get(n))
        raise BlindsumError(f"{backup} is damaged: {wrong[0]} isn't what was backed up")
    return manifest


def _write(source: _Hashed, path: Path) -> dict[str, Any]:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        while data := source.read(_PART):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"size": source.size, "sha256": source.digest.hexdigest()}


def _raise_floors(state: Path) -> None:
    """Members refuse a round number that they have seen: go on above what may have run after the backup."""
    with SqliteReader(state) as reader:
        newest = {row.federation: 0 for row in reader.each(FederationRecord)}
        for floor in reader.each(RoundFloorRecord):
            newest[floor.federation] = floor.number
        for row in reader.each(RoundRecord):
            newest[row.federation] = max(newest[row.federation], row.number)
    with sqlite3.connect(state) as writer:
        writer.executemany(
            "INSERT OR REPLACE INTO roundfloor (federation, number) VALUES (?, ?)",
            [(federation, number + ROUNDS_SKIPPED) for federation, number in newest.items()],
        )
    writer.close()
