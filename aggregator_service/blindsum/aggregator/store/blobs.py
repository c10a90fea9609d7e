"""The blobs' interface: bytes by name, durable once kept; and what an upload in progress appends to.

A name is `<room>/<rest>`; rooms are fixed. Nothing half-written ever has a name outside the spool.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Protocol

from blindsum.aggregator.store.stages import Stage

Data = bytes | bytearray | memoryview

ROOMS = ("spool", "contribution", "sum", "result", "checkpoint", "example", "model")


class Reader(Protocol):
    """An open blob; may be used from several threads."""

    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`. Raises `StorageFailed` when the blob is shorter."""


class Spool(Protocol):
    """An upload in progress. One writer at a time."""

    size: int

    def append(self, *parts: Data) -> None:
        """Write behind what is there, all or nothing. Raises `StorageFailed`."""

    def write(self, stage: Stage) -> None:
        """Write a stage, whose `begin` is `size` modulo `BLOCK`, behind what is there, all or nothing."""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes of what is there."""

    def close(self) -> None:
        """Let go of it; what was appended stays for a later resume."""


class BlobStore(Protocol):
    """Bytes by name. Every method may block: call it from a worker thread."""

    def spool(self, name: str) -> Spool:
        """The spool of that name, with what it holds already; made if there is none."""

    def spooled(self, name: str) -> int | None:
        """Bytes in the spool of that name, or None."""

    def keep(self, spool: Spool, spool_name: str, name: str) -> None:
        """Make the spool's bytes durable under `name` and close it. Replaces nothing but equal bytes."""

    def reopen(self, name: str, spool_name: str) -> None:
        """What was kept under `name` is a spool again: it came whole, but nobody was told so."""

    def write(self, name: str, parts: Iterable[Data]) -> None:
        """Make these bytes durable under `name`."""

    def open(self, name: str, once: bool = False) -> AbstractContextManager[Reader]:
        """The blob for reading; `once`: by one thread, from front to back, and by nobody else soon.

        Raises `StorageFailed` when there is none.
        """

    def size(self, name: str) -> int | None:
        """Bytes of the blob, or None."""

    def delete(self, name: str) -> None:
        """Remove the blob or spool, if it is there."""

    def names(self, room: str) -> list[str]:
        """Every name in a room."""

    def free_bytes(self) -> int:
        """Room left on the disk."""
