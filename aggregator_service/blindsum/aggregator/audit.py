"""The audit: an append-only, hash-chained record of who was admitted, which rounds ran, what was refused.

Each event's digest covers the one before (`store.state.chained`), and the audit's head moves in the same
transaction, so an event that was changed, deleted, inserted or moved shows, at either end too. Whoever may
write the data directory could still write a whole new history: against that, note the head (sequence and
digest) somewhere else and verify against it. The server logs it at start and stop, and backups carry it.

Events hold names, numbers and reasons. Nothing of what members train is in them.
"""

import asyncio
import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from blindsum.aggregator.clock import Clock
from blindsum.aggregator.engine import event
from blindsum.aggregator.peer_identity import PeerIdentity
from blindsum.aggregator.store.records import AuditHeadRecord, EventRecord
from blindsum.aggregator.store.sqlite_reader import SqliteReader
from blindsum.aggregator.store.state import AUDIT, StateStore, first_break
from blindsum.aggregator.wire_handlers import CallObserver
from blindsum.crypto.errors import BlindsumError, RefusalReason

NOTED_REFUSALS = frozenset(
    {
        RefusalReason.MALFORMED,
        RefusalReason.WRONG_SIZE,
        RefusalReason.OUT_OF_RANGE,
        RefusalReason.SIGNATURE,
        RefusalReason.CONFLICT,
        RefusalReason.REPLAY,
        RefusalReason.WRONG_DIGEST,
    }
)
"""Refusals that an honest, healthy member doesn't meet. The others are the ordinary course of a round."""
_ONCE_MS = 3600 * 1000
_REMEMBERED = 4096


@dataclass(frozen=True)
class AuditHead:
    """Where an audit ends: how many events, and the last one's digest."""

    sequence: int
    digest: bytes

    def __str__(self) -> str:
        return f"{self.sequence}:{self.digest.hex()}"

    @classmethod
    def parse(cls, text: str) -> "AuditHead":
        """What `str` gave. Raises `BlindsumError`."""
        sequence, _, digest = text.strip().partition(":")
        try:
            head = cls(int(sequence), bytes.fromhex(digest))
        except ValueError:
            head = cls(-1, b"")
        if head.sequence < 0 or len(head.digest) != (32 if head.sequence else 0):
            raise BlindsumError("an audit's head is written SEQUENCE:DIGEST, with 64 hex digits")
        return head


def head_of(store: StateStore | SqliteReader) -> AuditHead:
    """The head that the state names."""
    found = store.get(AuditHeadRecord, AUDIT)
    return AuditHead(0, b"") if found is None else AuditHead(found.sequence, found.digest)


@dataclass(frozen=True)
class AuditReport:
    """What `verify` found."""

    head: AuditHead
    broken_at: int | None = None
    reason: str = ""

    @property
    def holds(self) -> bool:
        """Whether the audit is what was written."""
        return self.broken_at is None


def verify(reader: SqliteReader, noted: AuditHead | None = None) -> AuditReport:
    """Check every link of the audit, and that it still holds the event of a head noted earlier."""
    seen: dict[int, bytes] = {}

    def events() -> Iterator[EventRecord]:
        for one in reader.each(EventRecord):
            if noted is not None and one.sequence == noted.sequence:
                seen[one.sequence] = one.digest
            yield one

    broken = first_break(events(), reader.get(AuditHeadRecord, AUDIT))
    head = head_of(reader)
    if broken is not None:
        return AuditReport(head, *broken)
    if noted is not None and noted.sequence and seen.get(noted.sequence) != noted.digest:
        lost = noted.sequence not in seen
        text = (
            f"the noted head is event {noted.sequence}, but the audit ends at {head.sequence}"
            if lost
            else f"event {noted.sequence} has another digest than the one noted: history was written anew"
        )
        return AuditReport(head, min(noted.sequence, head.sequence), text)
    return AuditReport(head)


def as_json(one: EventRecord) -> dict[str, Any]:
    """An event for people and programs."""
    return {
        "sequence": one.sequence,
        "time": datetime.fromtimestamp(one.at_ms / 1000, UTC).isoformat(timespec="milliseconds"),
        "federation": one.federation.hex(),
        "kind": one.kind,
        "detail": json.loads(one.detail),
        "digest": one.digest.hex(),
    }


class AuditedCalls:
    """Puts refusals that honest members don't meet into the audit, once an hour each; passes all calls on."""

    def __init__(self, store: StateStore, clock: Clock, following: CallObserver) -> None:
        self._store = store
        self._clock = clock
        self._following = following
        self._noted: OrderedDict[tuple[bytes, str, str, RefusalReason], int] = OrderedDict()
        self.received = following.received
        self.sent = following.sent
        self.finished = following.finished

    def refused(self, method: str, caller: Any, reason: RefusalReason, text: str) -> None:
        """A call was refused. Strangers aren't noted: they could fill the disk."""
        self._following.refused(method, caller, reason, text)
        if not isinstance(caller, PeerIdentity) or reason not in NOTED_REFUSALS:
            return
        place = (caller.federation, caller.member, method, reason)
        now = self._clock.now_ms()
        if now - self._noted.get(place, -_ONCE_MS) < _ONCE_MS:
            return
        self._noted[place] = now
        self._noted.move_to_end(place)
        if len(self._noted) > _REMEMBERED:
            self._noted.popitem(last=False)
        append = event(
            now,
            caller.federation,
            "call refused",
            member=caller.member,
            method=method,
            reason=reason.value,
            text=text,
        )
        self._store.commit(append).add_done_callback(_heard)


def _heard(done: "asyncio.Future[None]") -> None:
    """A refusal that couldn't be noted is logged by its call, and the failed commit by readiness."""
    if not done.cancelled():
        done.exception()
