"""Files that only their owner may read: written whole or not at all, durable once written."""

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from blindsum.crypto.errors import BlindsumError


class FolderInUse(BlindsumError):
    """Another process, or another object in this one, has the folder open."""


class FolderError(BlindsumError):
    """A folder that isn't what it should be: missing, not empty, incomplete, or readable by others."""


def make_private_folder(path: Path) -> None:
    """Create the folder (mode 0700) with its parents. Raises `FolderError` for one that isn't empty."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(path.iterdir()):
        raise FolderError(f"{path} isn't empty; choose a new folder, keys are never overwritten")
    path.chmod(0o700)


def write_private(path: Path, pieces: bytes | Iterable[bytes | memoryview]) -> None:
    """Write `path` (mode 0600) through a temporary file, fsync and rename: whole or not at all."""
    temporary = path.with_name(path.name + ".new")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        for piece in (pieces,) if isinstance(pieces, bytes) else pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def read_private(path: Path) -> bytes:
    """The bytes of a file that must be private. Raises `FolderError` if missing or not private."""
    try:
        mode = path.stat().st_mode
        data = path.read_bytes()
    except FileNotFoundError:
        raise FolderError(f"{path} is missing; restore it from a backup, or join again") from None
    if stat.S_IMODE(mode) & 0o077:
        raise FolderError(f"others may read {path}; run: chmod 600 {path}")
    return data


def remove_private(path: Path) -> None:
    """Remove the file if it is there."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make renames and removals in the folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FolderLock:
    """Held while a folder is open; a second opener gets `FolderInUse`. The kernel frees it on any exit."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FolderError(f"there is no folder {folder}")
        self._descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise FolderInUse(
                f"{folder} is open elsewhere; a folder belongs to one process at a time. Close the other one"
            ) from None

    def release(self) -> None:
        """Let others open the folder; once is enough."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
