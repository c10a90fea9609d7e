"""Blobs as files of one data directory: written aside, fdatasync, rename, fsync of the directory."""

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from blindsum.aggregator.store.blobs import ROOMS, Data, Spool
from blindsum.aggregator.store.state import StorageFailed


@contextlib.contextmanager
def _disk(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise StorageFailed(f"{what} failed: {reason}; check the disk and its permissions") from error


def sync_directory(path: Path) -> None:
    """Make renames and new names in a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_exactly(handle: int, offset: int, length: int) -> bytes:
    data = os.pread(handle, length, offset)
    while len(data) < length:
        more = os.pread(handle, length - len(data), offset + len(data))
        if not more:
            raise StorageFailed(f"a stored blob ends at {offset + len(data)}, before {offset + length}")
        data += more
    return data


class FileReader:
    """An open blob file."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self.size = os.fstat(handle).st_size

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`."""
        with _disk("reading a blob"):
            return _read_exactly(self._handle, offset, length)


class FileSpool:
    """An open spool file, appended to."""

    def __init__(self, path: Path) -> None:
        with _disk("opening a spool"):
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self.size = os.fstat(self._handle).st_size
        self.path = path
        self._open = True

    def append(self, data: Data) -> None:
        """Write behind what is there."""
        view = memoryview(data)
        with _disk("writing an upload"):
            while view.nbytes:
                written = os.pwrite(self._handle, view, self.size)
                self.size += written
                view = view[written:]

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes of what is there."""
        with _disk("reading an upload"):
            return _read_exactly(self._handle, offset, length)

    def sync(self) -> None:
        """Make the bytes durable."""
        with _disk("syncing an upload"):
            os.fdatasync(self._handle)

    def close(self) -> None:
        """Let go of it; what was appended stays."""
        if self._open:
            self._open = False
            os.close(self._handle)


class FileBlobs:
    """A `BlobStore` under one directory, one sub-directory a room."""

    def __init__(self, root: Path) -> None:
        self._root = root
        with _disk("preparing the blob directory"):
            for room in ROOMS:
                (root / room).mkdir(mode=0o700, parents=True, exist_ok=True)
            sync_directory(root)

    def _path(self, name: str) -> Path:
        room, _, rest = name.partition("/")
        if room not in ROOMS or not rest or "/" in rest or rest.startswith("."):
            raise ValueError(f"{name!r} isn't a blob name")
        return self._root / room / rest

    def spool(self, name: str) -> FileSpool:
        """The spool of that name, with what it holds already; made if there is none."""
        return FileSpool(self._path(name))

    def spooled(self, name: str) -> int | None:
        """Bytes in the spool of that name, or None."""
        return self.size(name)

    def keep(self, spool: Spool, spool_name: str, name: str) -> None:
        """Make the spool's bytes durable under `name` and close it."""
        assert isinstance(spool, FileSpool)
        spool.sync()
        spool.close()
        target = self._path(name)
        with _disk("keeping an upload"):
            self._path(spool_name).rename(target)
            sync_directory(target.parent)

    def write(self, name: str, parts: Iterable[Data]) -> None:
        """Make these bytes durable under `name`."""
        aside = "spool/" + name.replace("/", ".") + ".aside"
        self.delete(aside)
        spool = self.spool(aside)
        try:
            for part in parts:
                spool.append(part)
            self.keep(spool, aside, name)
        except BaseException:
            spool.close()
            self.delete(aside)
            raise

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[FileReader]:
        """The blob for reading."""
        with _disk("opening a blob"):
            handle = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield FileReader(handle)
        finally:
            os.close(handle)

    def size(self, name: str) -> int | None:
        """Bytes of the blob, or None."""
        try:
            return self._path(name).stat().st_size
        except FileNotFoundError:
            return None

    def delete(self, name: str) -> None:
        """Remove the blob or spool, if it is there."""
        with _disk("deleting a blob"):
            self._path(name).unlink(missing_ok=True)

    def names(self, room: str) -> list[str]:
        """Every name in a room."""
        with _disk("listing blobs"):
            return sorted(f"{room}/{entry.name}" for entry in os.scandir(self._root / room))

    def free_bytes(self) -> int:
        """Room left on the disk."""
        with _disk("asking for disk space"):
            return shutil.disk_usage(self._root).free
