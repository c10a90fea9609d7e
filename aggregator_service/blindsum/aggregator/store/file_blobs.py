"""Blobs as files of one data directory: written aside, fdatasync, rename, fsync of the directory.

What is written once and read once goes around the page cache (O_DIRECT) in whole blocks: the first touch
of a page costs more CPU than everything else that happens to its bytes, and bulk would drive out what is
needed again.
"""

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from blindsum.aggregator.store.blobs import ROOMS, Data, Spool
from blindsum.aggregator.store.stages import BLOCK, Stage
from blindsum.aggregator.store.state import StorageFailed

_ASIDE = ".aside"
_LEAST_DIRECT = 64 * 1024


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


def _open_direct(path: Path, flags: int) -> int | None:
    """A second descriptor around the page cache; None where system or file system has no such thing."""
    try:
        return os.open(path, flags | os.O_CLOEXEC | os.O_DIRECT)
    except (OSError, AttributeError):
        return None


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


class OnceReader(FileReader):
    """A blob file that is read from front to back, by one thread, a stage ahead, around the page cache."""

    def __init__(self, handle: int, direct: int, stage: memoryview) -> None:
        super().__init__(handle)
        self._direct = direct
        self._stage = stage
        self._start = self._end = 0

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`."""
        if offset < self._start or offset + length > self._end:
            with _disk("reading a blob"):
                self._start = offset // BLOCK * BLOCK
                self._end = self._start + os.preadv(self._direct, [self._stage], self._start)
        if offset + length > self._end:
            # Longer than the stage, or cut short.
            return super().read(offset, length)
        return bytes(self._stage[offset - self._start : offset + length - self._start])


class FileSpool:
    """An open spool file, appended to."""

    def __init__(self, path: Path) -> None:
        with _disk("opening a spool"):
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self.size = os.fstat(self._handle).st_size
        self._direct = _open_direct(path, os.O_WRONLY)
        self.path = path
        self._open = True

    def append(self, *parts: Data) -> None:
        """Write behind what is there, all or nothing."""
        stage = Stage(self.size % BLOCK)
        try:
            with self._all_or_nothing():
                for part in parts:
                    view = memoryview(part).cast("B")
                    while view.nbytes:
                        view = stage.put(view)
                        if stage.full:
                            self._write_out(stage)
                            stage.begin = stage.end = 0
                self._write_out(stage)
        finally:
            stage.release()

    def write(self, stage: Stage) -> None:
        """Write a stage behind what is there, all or nothing."""
        with self._all_or_nothing():
            self._write_out(stage)

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """So that whoever appends knows what is there."""
        start = self.size
        with _disk("writing an upload"):
            try:
                yield
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._handle, start)
                    self.size = start
                raise

    def _write_out(self, stage: Stage) -> None:
        begin, end, view = stage.begin, stage.end, stage.view
        first, last = -(-begin // BLOCK) * BLOCK, end // BLOCK * BLOCK
        if self._direct is None or last - first < _LEAST_DIRECT:
            self._write(self._handle, view[begin:end])
            return
        self._write(self._handle, view[begin:first])
        self._write(self._direct, view[first:last])
        self._write(self._handle, view[last:end])

    def _write(self, handle: int, view: memoryview) -> None:
        while view.nbytes:
            written = os.pwrite(handle, view, self.size)
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
            if self._direct is not None:
                os.close(self._direct)


class FileBlobs:
    """A `BlobStore` under one directory, one sub-directory a room."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lost: set[str] = set()
        with _disk("preparing the blob directory"):
            for room in ROOMS:
                (root / room).mkdir(mode=0o700, parents=True, exist_ok=True)
            sync_directory(root)
            # The data directory: all that a first start made in it before now.
            sync_directory(root.parent)
            with contextlib.suppress(PermissionError):
                sync_directory(root.parent.parent)
        for name in self.names("spool"):
            if name.endswith(_ASIDE):
                self.delete(name)

    def _path(self, name: str) -> Path:
        room, _, rest = name.partition("/")
        if room not in ROOMS or not rest or "/" in rest or rest.startswith("."):
            raise ValueError(f"{name!r} isn't a blob name")
        return self._root / room / rest

    def spool(self, name: str) -> FileSpool:
        """The spool of that name, with what it holds already; made if there is none."""
        if name in self._lost:
            self.delete(name)
            self._lost.discard(name)
        return FileSpool(self._path(name))

    def spooled(self, name: str) -> int | None:
        """Bytes in the spool of that name, or None."""
        return self.size(name)

    def keep(self, spool: Spool, spool_name: str, name: str) -> None:
        """Make the spool's bytes durable under `name` and close it."""
        assert isinstance(spool, FileSpool)
        try:
            spool.sync()
        except StorageFailed:
            # The system may have dropped what it couldn't write and call the rest synced: a second attempt
            # would succeed without the bytes. So they have to come again.
            self._lost.add(spool_name)
            with contextlib.suppress(StorageFailed):
                self.delete(spool_name)
            raise
        finally:
            spool.close()
        target = self._path(name)
        with _disk("keeping an upload"):
            self._path(spool_name).rename(target)
            sync_directory(target.parent)

    def reopen(self, name: str, spool_name: str) -> None:
        """What was kept under `name` is a spool again."""
        with _disk("taking an upload back"):
            self._path(name).rename(self._path(spool_name))

    def write(self, name: str, parts: Iterable[Data]) -> None:
        """Make these bytes durable under `name`."""
        aside = "spool/" + name.replace("/", ".") + _ASIDE
        self.delete(aside)
        spool = self.spool(aside)
        try:
            for part in parts:
                spool.append(part)
            self.keep(spool, aside, name)
        except BaseException:
            spool.close()
            with contextlib.suppress(StorageFailed):
                self.delete(aside)
            raise

    @contextlib.contextmanager
    def open(self, name: str, once: bool = False) -> Iterator[FileReader]:
        """The blob for reading; `once`: nobody will read it again soon."""
        path = self._path(name)
        with _disk("opening a blob"):
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        direct = _open_direct(path, os.O_RDONLY) if once else None
        try:
            if direct is None:
                yield FileReader(handle)
            else:
                stage = Stage()
                try:
                    yield OnceReader(handle, direct, stage.view)
                finally:
                    stage.release()
        finally:
            os.close(handle)
            if direct is not None:
                os.close(direct)

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
