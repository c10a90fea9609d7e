"""The state's interface: records read by key or equality, and changes committed all or none."""

import hashlib
from asyncio import Future
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from blindsum.aggregator.store.records import AuditHeadRecord, EventRecord, Record
from blindsum.crypto.errors import BlindsumError
from blindsum.crypto.primitives.derivation import labelled

R = TypeVar("R", bound=Record)

AUDIT = "audit"
"""The name of the audit's head."""


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

    def newest(self, kind: type[R], count: int, **equal: bytes | str | int) -> list[R]:
        """The last so many of them, last first."""

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
    broken = first_break(store.find(EventRecord), store.get(AuditHeadRecord, AUDIT))
    return None if broken is None else broken[0]


def first_break(events: Iterable[EventRecord], head: AuditHeadRecord | None) -> tuple[int, str] | None:
    """Where the audit was tampered with first (a sequence number), and how it shows; None if it holds."""
    previous, last = b"", 0
    for position, event in enumerate(events, start=1):
        if event.sequence != position:
            return position, f"event {position} is missing"
        expected = chained(event, position, previous)
        if event.previous != previous:
            return position, f"event {position} doesn't continue event {position - 1}"
        if expected != event:
            return position, f"event {position} isn't what was written"
        previous, last = event.digest, position
    if head is None:
        return None if last == 0 else (last, "the audit's head is gone")
    if head.sequence != last:
        return min(last, head.sequence) + 1, f"the audit ends at event {last}, its head says {head.sequence}"
    if head.digest != previous:
        return last, f"event {last} isn't the one that the audit's head names"
    return None
