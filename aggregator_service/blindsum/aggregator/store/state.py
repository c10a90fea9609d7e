"""The state's interface: records read by key or equality, and changes committed all or none."""

import hashlib
from asyncio import Future
from dataclasses import dataclass
from typing import Protocol, TypeVar

from blindsum.aggregator.store.records import EventRecord, Record
from blindsum.crypto.errors import BlindsumError
from blindsum.crypto.primitives.derivation import labelled

R = TypeVar("R", bound=Record)


class StorageFailed(BlindsumError):
    """The state or a blob couldn't be written or read; what was acknowledged before is intact."""


class Taken(BlindsumError):
    """A record with this key is there already, or has moved on; nothing of the commit happened."""


@dataclass(frozen=True)
class Insert:
    """A new record; the commit fails with `Taken` if its key exists."""

    record: Record


@dataclass(frozen=True)
class Put:
    """A record, new or in place of the one with its key."""

    record: Record


@dataclass(frozen=True)
class Advance:
    """Compare-and-set of a record with a `version`: only if the stored one is the version before."""

    record: Record


@dataclass(frozen=True)
class Delete:
    """Every record of a kind whose fields equal these."""

    kind: type[Record]
    where: tuple[tuple[str, bytes | str | int], ...]


@dataclass(frozen=True)
class Append:
    """One more line of the audit; sequence and chain are filled in at the commit."""

    event: EventRecord


Change = Insert | Put | Advance | Delete | Append


class StateStore(Protocol):
    """Durable records. Commits are applied in the order in which they were submitted."""

    def commit(self, *changes: Change) -> "Future[None]":
        """Apply all changes or none; done only once they are durable.

        The future raises `Taken` or `StorageFailed`.
        """

    def get(self, kind: type[R], *key: bytes | str | int) -> R | None:
        """The committed record with this key."""

    def find(self, kind: type[R], **equal: bytes | str | int) -> list[R]:
        """Committed records whose fields equal these, in order of their key."""

    def close(self) -> None:
        """Finish what was submitted, then close."""


def chained(event: EventRecord, sequence: int, previous: bytes) -> EventRecord:
    """The event with its place in the chain: digest over everything, the previous digest included."""
    digest = hashlib.sha256(
        labelled(
            "audit event",
            sequence.to_bytes(8, "little"),
            previous,
            event.at_ms.to_bytes(8, "little"),
            event.federation,
            event.kind.encode(),
            event.detail.encode(),
        )
    ).digest()
    return EventRecord(
        at_ms=event.at_ms,
        federation=event.federation,
        kind=event.kind,
        detail=event.detail,
        sequence=sequence,
        previous=previous,
        digest=digest,
    )


def broken_link(store: StateStore) -> int | None:
    """The sequence number of the first audit event that doesn't continue the chain, or None."""
    previous = b""
    for position, event in enumerate(store.find(EventRecord), start=1):
        if event.sequence != position or chained(event, position, previous) != event:
            return position
        previous = event.digest
    return None
