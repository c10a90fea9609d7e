"""A recording file layer: every change of files below a directory, and what a power cut leaves of it.

What a program does to files reaches the disk only where it says so: `fsync` and `fdatasync` for what is in
a file, `fsync` of the directory for names (new files, renames, deletions). `RecordedFiles` stands between
the program and the operating system, at Python's `os` and at SQLite's VFS (through ctypes, in the very
library that the `sqlite3` module uses), and writes down every change and every sync. `power_cut` then makes
the directory that a machine may find after the lights went out: all that was synced, and of the rest any
subset, so in any order. Writes may be cut short, too.

SQLite's files go through the same model: its locks and its shared memory are the real ones, its writes and
syncs are in the same log as those of the blobs.

The same layer makes disks that are full, read-only or dead (`hook`).
"""

import ctypes
import errno
import itertools
import os
import random
import shutil
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

Kind = Literal["name", "write", "truncate", "sync", "failed sync", "acknowledged"]
Hook = Callable[[str, Path], None]
"""Called before each change with its kind (`write`, `sync`, `rename`, ...); may raise `OSError`."""

SQLITE = "sqlite"
_IO_ERROR, _IO_FSYNC, _FULL = 10, 10 | (4 << 8), 13


@dataclass(frozen=True)
class Change:
    """One line of the log. `inode` is the file or directory that a sync of would make this durable."""

    kind: Kind
    inode: int
    name: str = ""
    target: int | None = None
    """Of a name: the inode it stands for from now on; None when it is gone."""
    offset: int = 0
    data: bytes = b""
    site: str = ""
    """Of a sync: where in the program it was asked for."""
    label: Any = None
    """Of an acknowledgement: what was acknowledged."""


@dataclass
class _Handle:
    path: Path
    inode: int


@dataclass
class _SqliteFile:
    path: Path
    inode: int
    methods: int
    new_journal: bool


@dataclass
class Disk:
    """What is on the disk: bytes of files, entries of directories; and what isn't there for sure yet."""

    contents: dict[int, bytearray] = field(default_factory=dict)
    entries: dict[int, dict[str, int]] = field(default_factory=dict)
    pending: dict[int, list[Change]] = field(default_factory=dict)

    def take(self, change: Change) -> None:
        """Apply one line of the log."""
        if change.kind == "sync":
            for waiting in self.pending.pop(change.inode, []):
                self.apply(waiting, waiting.data)
        elif change.kind == "failed sync":
            # Linux calls the pages clean all the same: no later sync will write them.
            self.pending.pop(change.inode, None)
        elif change.kind != "acknowledged":
            self.pending.setdefault(change.inode, []).append(change)

    def apply(self, change: Change, data: bytes) -> None:
        """Make a change durable, perhaps with less data."""
        if change.kind == "name":
            entries = self.entries.setdefault(change.inode, {})
            if change.target is None:
                entries.pop(change.name, None)
            else:
                entries[change.name] = change.target
            return
        content = self.contents.setdefault(change.inode, bytearray())
        if change.kind == "truncate":
            if change.offset < len(content):
                del content[change.offset :]
            else:
                content.extend(bytes(change.offset - len(content)))
            return
        if change.offset > len(content):
            content.extend(bytes(change.offset - len(content)))
        content[change.offset : change.offset + len(data)] = data


class RecordedFiles:
    """The changes below `root` from `recording` on."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log: list[Change] = []
        self.hook: Hook | None = None
        self.changes = 0
        """Changes and syncs that were asked for."""
        self._lock = threading.RLock()
        self._inodes: dict[Path, int] = {}
        self._directories: set[int] = set()
        self._handles: dict[int, _Handle] = {}
        self._sqlite: dict[int, _SqliteFile] = {}
        self._numbers = itertools.count(1)
        self._start = Disk()
        self._adopt(root)

    # What there was before

    def _adopt(self, directory: Path) -> int:
        number = self._new_inode(directory, directory=True)
        entries = self._start.entries.setdefault(number, {})
        for path in sorted(directory.iterdir()) if directory.exists() else []:
            if path.name.endswith("-shm"):
                continue
            if path.is_dir():
                entries[path.name] = self._adopt(path)
            else:
                entries[path.name] = inode = self._new_inode(path)
                self._start.contents[inode] = bytearray(path.read_bytes())
        return number

    def _new_inode(self, path: Path, directory: bool = False) -> int:
        number = next(self._numbers)
        self._inodes[path] = number
        if directory:
            self._directories.add(number)
        return number

    def _below(self, path: Any) -> Path | None:
        if isinstance(path, int):
            return None
        found = Path(os.fsdecode(path))
        return found if found == self.root or self.root in found.parents else None

    # Recording

    def _asked(self, kind: str, path: Path) -> None:
        self.changes += 1
        if self.hook is not None:
            self.hook(kind, path)

    def _ask_for_sync(self, path: Path, inode: int) -> None:
        try:
            self._asked("sync", path)
        except OSError:
            self.log.append(Change("failed sync", inode))
            raise

    def acknowledged(self, label: Any) -> None:
        """From here on the outside world counts on something."""
        with self._lock:
            self.log.append(Change("acknowledged", 0, label=label))

    def _name(self, path: Path, inode: int | None) -> None:
        parent = self._inodes[path.parent]
        self.log.append(Change("name", parent, path.name, inode))
        if inode is None:
            del self._inodes[path]
        else:
            self._inodes[path] = inode

    def _created(self, path: Path, directory: bool = False) -> int:
        inode = self._new_inode(path, directory)
        self._name(path, inode)
        return inode

    @contextmanager
    def recording(self) -> Iterator["RecordedFiles"]:
        """Record until the end of the block. Open SQLite connections must be closed inside of it."""
        real = {name: getattr(os, name) for name in _PATCHED}
        library = _SqliteShim(self)
        try:
            for name in _PATCHED:
                setattr(os, name, getattr(self, f"_os_{name}")(real[name]))
            library.install()
            yield self
        finally:
            for name, function in real.items():
                setattr(os, name, function)
            library.remove()

    def _os_open(self, real: Any) -> Any:
        def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            below = self._below(path)
            if below is None or dir_fd is not None:
                return int(real(path, flags, mode, dir_fd=dir_fd))
            with self._lock:
                new = bool(flags & os.O_CREAT) and below not in self._inodes
                if new or flags & os.O_TRUNC:
                    self._asked("create", below)
                handle = int(real(path, flags, mode))
                if new:
                    self._created(below)
                elif flags & os.O_TRUNC:
                    self.log.append(Change("truncate", self._inodes[below]))
                self._handles[handle] = _Handle(below, self._inodes[below])
                return handle

        return opened

    def _os_close(self, real: Any) -> Any:
        def closed(handle: int) -> None:
            with self._lock:
                self._handles.pop(handle, None)
                real(handle)

        return closed

    def _written(self, handle: int, write: Callable[[], int], data: Any, offset: int) -> int:
        with self._lock:
            file = self._handles.get(handle)
            if file is None:
                return write()
            self._asked("write", file.path)
            count = write()
            part = bytes(memoryview(data)[:count])
            self.log.append(Change("write", file.inode, offset=offset, data=part))
            return count

    def _os_pwrite(self, real: Any) -> Any:
        return lambda handle, data, offset: self._written(
            handle, lambda: int(real(handle, data, offset)), data, offset
        )

    def _os_write(self, real: Any) -> Any:
        def written(handle: int, data: Any) -> int:
            if handle not in self._handles:
                return int(real(handle, data))
            offset = os.lseek(handle, 0, os.SEEK_CUR)
            return self._written(handle, lambda: int(real(handle, data)), data, offset)

        return written

    def _os_ftruncate(self, real: Any) -> Any:
        def truncated(handle: int, size: int) -> None:
            with self._lock:
                file = self._handles.get(handle)
                if file is not None:
                    self._asked("truncate", file.path)
                real(handle, size)
                if file is not None:
                    self.log.append(Change("truncate", file.inode, offset=size))

        return truncated

    def _os_fsync(self, real: Any) -> Any:
        def synced(handle: int) -> None:
            with self._lock:
                file = self._handles.get(handle)
                if file is not None:
                    self._ask_for_sync(file.path, file.inode)
                # The model decides what is lost: nothing has to wait for the real disk.
                if file is None:
                    real(handle)
                else:
                    self.log.append(Change("sync", file.inode, site=_site(sys._getframe(1))))

        return synced

    _os_fdatasync = _os_fsync

    def _os_rename(self, real: Any) -> Any:
        def renamed(source: Any, target: Any, **options: Any) -> None:
            old, new = self._below(source), self._below(target)
            if old is None or new is None:
                real(source, target, **options)
                return
            with self._lock:
                self._asked("rename", new)
                real(source, target)
                inode = self._inodes[old]
                if self._inodes.get(new) == inode:
                    return
                self._name(new, inode)
                self._name(old, None)

        return renamed

    _os_replace = _os_rename

    def _os_unlink(self, real: Any) -> Any:
        def unlinked(path: Any, *, dir_fd: int | None = None) -> None:
            below = self._below(path)
            if below is None or dir_fd is not None:
                real(path, dir_fd=dir_fd)
                return
            with self._lock:
                if below in self._inodes:
                    self._asked("unlink", below)
                real(path)
                self._name(below, None)

        return unlinked

    _os_remove = _os_unlink

    def _os_mkdir(self, real: Any) -> Any:
        def made(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
            below = self._below(path)
            if below is None or dir_fd is not None:
                real(path, mode, dir_fd=dir_fd)
                return
            with self._lock:
                if below not in self._inodes:
                    self._asked("mkdir", below)
                real(path, mode)
                self._created(below, directory=True)

        return made

    # Power cuts

    def acknowledgements(self, until: int | None = None) -> list[Any]:
        """The labels of what was acknowledged in the first `until` lines of the log."""
        return [change.label for change in self.log[:until] if change.kind == "acknowledged"]

    def sites(self) -> set[str]:
        """Every place that asked for a sync."""
        return {change.site for change in self.log if change.kind == "sync"}

    def power_cut(
        self,
        target: Path,
        *,
        until: int | None = None,
        keep: float = 0.0,
        seed: int = 0,
        without: str = "",
    ) -> None:
        """Fill `target` with what the disk holds if the power goes after `until` lines of the log.

        Of what wasn't synced, `keep` says how much survives (0: nothing, 1: all of it), `seed` which.
        `without` is a site whose syncs never happened.
        """
        self._check_complete()
        disk = Disk(
            {inode: bytearray(data) for inode, data in self._start.contents.items()},
            {inode: dict(names) for inode, names in self._start.entries.items()},
        )
        for change in self.log[:until]:
            if change.kind != "sync" or change.site != without or not without:
                disk.take(change)
        choice = random.Random(seed)
        for waiting in disk.pending.values():
            for change in waiting:
                if choice.random() < keep:
                    cut = keep < 1 and choice.random() < 0.25
                    disk.apply(
                        change, change.data[: choice.randrange(len(change.data) + 1)] if cut else change.data
                    )
        self._fill(target, self._inodes[self.root], disk)

    def _fill(self, target: Path, inode: int, disk: Disk) -> None:
        if inode not in self._directories:
            target.write_bytes(disk.contents.get(inode, b""))
            target.chmod(0o600)
            return
        target.mkdir(mode=0o700)
        for name, child in disk.entries.get(inode, {}).items():
            self._fill(target / name, child, disk)

    def _check_complete(self) -> None:
        """Nothing may have gone past the recorder."""
        found = {
            path
            for path in (self.root, *self.root.rglob("*"))
            if path.exists() and not path.name.endswith("-shm")
        }
        assert found == set(self._inodes), found ^ set(self._inodes)


_PATCHED = (
    "open", "close", "write", "pwrite", "ftruncate", "fsync", "fdatasync",
    "rename", "replace", "unlink", "remove", "mkdir",
)  # fmt: skip


def _site(frame: FrameType | None) -> str:
    """The function and line, outside of `sync_directory`, that asked for a sync."""
    while frame is not None and frame.f_code.co_name in ("sync_directory", "_sync"):
        frame = frame.f_back
    if frame is None:
        return "?"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


# SQLite


class _Vfs(ctypes.Structure):
    _fields_ = [
        ("version", ctypes.c_int),
        ("file_size", ctypes.c_int),
        ("max_path", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("open", ctypes.c_void_p),
        ("delete", ctypes.c_void_p),
        ("others", ctypes.c_void_p * 14),
    ]


class _Methods(ctypes.Structure):
    _fields_ = [
        ("version", ctypes.c_int),
        ("close", ctypes.c_void_p),
        ("read", ctypes.c_void_p),
        ("write", ctypes.c_void_p),
        ("truncate", ctypes.c_void_p),
        ("sync", ctypes.c_void_p),
        ("others", ctypes.c_void_p * 13),
    ]


_OPEN = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p
)
_DELETE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
_CLOSE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_WRITE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
_TRUNCATE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int64)
_SYNC = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)

_CREATE, _MAIN_JOURNAL, _WAL = 0x4, 0x800, 0x80000


def _library() -> ctypes.CDLL:
    """The SQLite that Python's `sqlite3` is linked to."""
    assert sqlite3.sqlite_version
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    names = {line.split()[-1] for line in maps.splitlines() if "sqlite3" in line}
    # Either libsqlite3 itself, or a _sqlite3 module that has it inside.
    for name in sorted(names, key=lambda name: "libsqlite3" not in name):
        library = ctypes.CDLL(name)
        if hasattr(library, "sqlite3_vfs_find") and hasattr(library, "sqlite3_libversion"):
            library.sqlite3_libversion.restype = ctypes.c_char_p
            assert library.sqlite3_libversion().decode() == sqlite3.sqlite_version
            library.sqlite3_vfs_find.restype = ctypes.c_void_p
            library.sqlite3_vfs_register.argtypes = [ctypes.c_void_p, ctypes.c_int]
            library.sqlite3_vfs_unregister.argtypes = [ctypes.c_void_p]
            return library
    raise AssertionError("Python's SQLite doesn't show its functions, so its files can't be recorded")


def _code(error: OSError, otherwise: int) -> int:
    return _FULL if error.errno == errno.ENOSPC else otherwise


_shims: list["_SqliteShim"] = []


class _SqliteShim:
    """SQLite's own VFS with its changes of files recorded."""

    def __init__(self, files: RecordedFiles) -> None:
        self._files = files
        self._library = _library()
        self._original = self._library.sqlite3_vfs_find(None)
        self._vfs = _Vfs.from_buffer_copy(_Vfs.from_address(self._original))
        self._real_open = _OPEN(self._vfs.open)
        self._real_delete = _DELETE(self._vfs.delete)
        self._callbacks = [_OPEN(self._open), _DELETE(self._delete)]
        self._vfs.name = b"recorded"
        self._vfs.next = None
        self._vfs.open = ctypes.cast(self._callbacks[0], ctypes.c_void_p)
        self._vfs.delete = ctypes.cast(self._callbacks[1], ctypes.c_void_p)
        self._methods: dict[int, _Methods] = {}
        self._real: dict[int, _Methods] = {}
        # A connection that nobody closed may call these when it is collected, long after the recording.
        _shims.append(self)
        self._mine = (_CLOSE(self._close), _WRITE(self._write), _TRUNCATE(self._truncate), _SYNC(self._sync))

    def install(self) -> None:
        assert self._library.sqlite3_vfs_register(ctypes.addressof(self._vfs), 1) == 0

    def remove(self) -> None:
        self._library.sqlite3_vfs_register(self._original, 1)
        self._library.sqlite3_vfs_unregister(ctypes.addressof(self._vfs))

    def _open(self, _vfs: int, name: int | None, file: int, flags: int, out: int | None) -> int:
        path = None if not name else self._files._below(ctypes.string_at(name))
        if path is None:
            return int(self._real_open(self._original, name, file, flags, out))
        files = self._files
        with files._lock:
            new = path not in files._inodes
            try:
                if new and flags & _CREATE:
                    files._asked("create", path)
            except OSError:
                return 14
            result = int(self._real_open(self._original, name, file, flags, out))
            if result != 0:
                return result
            if new:
                files._created(path)
            pointer = ctypes.cast(file, ctypes.POINTER(ctypes.c_void_p))
            real = int(pointer[0])
            if real not in self._methods:
                self._real[real] = _Methods.from_address(real)
                changed = _Methods.from_buffer_copy(self._real[real])
                for field_name, callback in zip(
                    ("close", "write", "truncate", "sync"), self._mine, strict=True
                ):
                    setattr(changed, field_name, ctypes.cast(callback, ctypes.c_void_p))
                self._methods[real] = changed
            pointer[0] = ctypes.addressof(self._methods[real])
            # SQLite syncs the directory with the first sync of a journal that it may have made (os_unix.c).
            journal = bool(flags & _CREATE) and bool(flags & (_MAIN_JOURNAL | _WAL))
            files._sqlite[file] = _SqliteFile(path, files._inodes[path], real, journal)
            return 0

    def _delete(self, _vfs: int, name: int, sync_directory: int) -> int:
        path = self._files._below(ctypes.string_at(name))
        if path is None:
            return int(self._real_delete(self._original, name, sync_directory))
        files = self._files
        with files._lock:
            try:
                files._asked("unlink", path)
            except OSError:
                return _IO_ERROR
            result = int(self._real_delete(self._original, name, 0))
            if result == 0:
                files._name(path, None)
                if sync_directory:
                    files.log.append(Change("sync", files._inodes[path.parent], site=f"{SQLITE} directory"))
            return result

    def _close(self, file: int) -> int:
        known = self._files._sqlite.pop(file)
        return int(_CLOSE(self._real[known.methods].close)(file))

    def _write(self, file: int, data: int, size: int, offset: int) -> int:
        files = self._files
        known = files._sqlite[file]
        with files._lock:
            try:
                files._asked("write", known.path)
            except OSError as error:
                return _code(error, _IO_ERROR)
            result = int(_WRITE(self._real[known.methods].write)(file, data, size, offset))
            if result == 0:
                files.log.append(
                    Change("write", known.inode, offset=offset, data=ctypes.string_at(data, size))
                )
            return result

    def _truncate(self, file: int, size: int) -> int:
        files = self._files
        known = files._sqlite[file]
        with files._lock:
            try:
                files._asked("truncate", known.path)
            except OSError as error:
                return _code(error, _IO_ERROR)
            result = int(_TRUNCATE(self._real[known.methods].truncate)(file, size))
            if result == 0:
                files.log.append(Change("truncate", known.inode, offset=size))
            return result

    def _sync(self, file: int, _flags: int) -> int:
        files = self._files
        known = files._sqlite[file]
        with files._lock:
            try:
                files._ask_for_sync(known.path, known.inode)
            except OSError as error:
                return _code(error, _IO_FSYNC)
            kind = known.path.name.rpartition("-")[2] if "-" in known.path.name else "database"
            files.log.append(Change("sync", known.inode, site=f"{SQLITE} {kind}"))
            if known.new_journal:
                known.new_journal = False
                parent = files._inodes[known.path.parent]
                files.log.append(Change("sync", parent, site=f"{SQLITE} directory"))
            return 0


def fresh(path: Path) -> Path:
    """The path, with nothing there."""
    if path.exists():
        shutil.rmtree(path)
    return path
