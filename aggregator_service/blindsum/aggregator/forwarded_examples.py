"""`ExampleService`: sealed hard examples between two members. `caller` is the `PeerIdentity` of the
certificate.

The aggregator has the ciphertext until the receiver has taken it, and learns who sends how many to whom, and
when. An example's record stays after its bytes are gone, without them: so that a withdrawal reaches the
receiver, and its sender sees that it did.
"""

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final, TypeVar

from blindsum.aggregator.engine import FederationEngine, event
from blindsum.aggregator.peer_identity import PeerIdentity
from blindsum.aggregator.round_run import Surroundings
from blindsum.aggregator.settings import AggregatorSettings
from blindsum.aggregator.store.records import ExampleRecord
from blindsum.aggregator.store.state import Append, Put
from blindsum.crypto.errors import RefusalReason, Refused
from blindsum.proto.v1 import examples_pb2 as wire

T = TypeVar("T")

ID_BYTES: Final = 32
MIN_SEALED_BYTES: Final = 1136
"""What HPKE adds: the encapsulated key (ML-KEM-768 ciphertext and X25519 key) and the tag. Less is no
ciphertext.
"""
MAX_SEALED_BYTES: Final = 512 * 1024
MAX_WAITING: Final = 1000
"""Examples of one sender that wait for their receivers: to be taken, or to be deleted after a withdrawal."""
MAX_WAITING_BYTES: Final = 64 << 20

_State = wire.ExampleState
_NAMES: Final = {
    wire.EXAMPLE_STATE_WAITING: "waiting",
    wire.EXAMPLE_STATE_TAKEN: "taken",
    wire.EXAMPLE_STATE_WITHDRAWN: "withdrawn",
    wire.EXAMPLE_STATE_DELETED: "deleted",
}
_LISTED: Final = (wire.EXAMPLE_STATE_WAITING, wire.EXAMPLE_STATE_WITHDRAWN)
"""What its receiver has to deal with."""


def blob_name(federation: bytes, example: bytes) -> str:
    """Where an example's sealed bytes lie."""
    return f"example/{federation.hex()[:32]}.{example.hex()}"


class ExampleService:
    """One method a call of the service."""

    def __init__(
        self,
        settings: AggregatorSettings,
        around: Surroundings,
        engines: Mapping[bytes, FederationEngine],
    ) -> None:
        self._settings = settings
        self._around = around
        self._engines = engines
        self._changing = asyncio.Lock()

    async def PutExample(  # noqa: N802
        self, request: wire.PutExampleRequest, peer: PeerIdentity
    ) -> wire.PutExampleResponse:
        """Keep a sealed example for its receiver. Idempotent for the same bytes."""
        _identifier(request.example)
        if not MIN_SEALED_BYTES <= len(request.sealed) <= MAX_SEALED_BYTES:
            raise Refused(
                RefusalReason.WRONG_SIZE,
                f"a sealed example has {MIN_SEALED_BYTES} to {MAX_SEALED_BYTES} bytes; send a smaller image",
            )
        roster = self._engines[peer.federation].documents.roster
        if roster is None or request.recipient not in roster.position or request.recipient == peer.member:
            raise Refused(
                RefusalReason.UNKNOWN_MEMBER, "the receiver isn't another member of this federation"
            )
        await asyncio.shield(asyncio.ensure_future(self._put(request, peer)))
        return wire.PutExampleResponse()

    async def _put(self, request: wire.PutExampleRequest, peer: PeerIdentity) -> None:
        digest = hashlib.sha256(request.sealed).digest()
        around = self._around
        async with self._changing:
            known = around.store.get(ExampleRecord, peer.federation, request.example)
            if known is not None:
                if (known.sender, known.recipient, known.digest) == (peer.member, request.recipient, digest):
                    return
                raise Refused(RefusalReason.CONFLICT, "another example has this id; draw a new one")
            rows = around.store.find(ExampleRecord, federation=peer.federation, sender=peer.member)
            listed = [row for row in rows if _state(row) in _LISTED]
            stored = sum(row.size for row in rows if _state(row) == wire.EXAMPLE_STATE_WAITING)
            if len(listed) >= MAX_WAITING or stored + len(request.sealed) > MAX_WAITING_BYTES:
                raise Refused(
                    RefusalReason.LIMIT, "too many examples of this member wait for their receivers already"
                )
            if around.blobs.free_bytes() < len(request.sealed) + self._settings.disk_reserve:
                raise Refused(RefusalReason.LIMIT, "the aggregator's disk is nearly full; tell its operator")
            name = blob_name(peer.federation, request.example)
            await self._work(around.blobs.write, name, [request.sealed])
            now = around.clock.now_ms()
            row = ExampleRecord(
                federation=peer.federation,
                example=request.example,
                sender=peer.member,
                recipient=request.recipient,
                digest=digest,
                size=len(request.sealed),
                state=_NAMES[wire.EXAMPLE_STATE_WAITING],
                created_ms=now,
                changed_ms=now,
            )
            await around.store.commit(Put(row), self._event("example stored", row, now))

    async def ListExamples(  # noqa: N802
        self, _request: wire.ListExamplesRequest, peer: PeerIdentity
    ) -> wire.ListExamplesResponse:
        """What this member is to fetch or to delete."""
        rows = self._around.store.find(ExampleRecord, federation=peer.federation, recipient=peer.member)
        return wire.ListExamplesResponse(
            items=[
                wire.ListExamplesResponse.Item(
                    example=row.example, sender=row.sender, state=state, size=row.size
                )
                for row in sorted(rows, key=lambda row: row.created_ms)
                if (state := _state(row)) in _LISTED
            ]
        )

    async def GetExample(  # noqa: N802
        self, request: wire.GetExampleRequest, peer: PeerIdentity
    ) -> wire.GetExampleResponse:
        """The sealed bytes, for the receiver."""
        row = self._row(request.example, peer)
        if row.recipient != peer.member or _state(row) != wire.EXAMPLE_STATE_WAITING:
            raise Refused(RefusalReason.WRONG_STEP, "no example of this id waits for this member")
        name = blob_name(peer.federation, row.example)

        def read() -> bytes:
            with self._around.blobs.open(name) as reader:
                return reader.read(0, row.size)

        return wire.GetExampleResponse(sender=row.sender, sealed=await self._work(read))

    async def ConfirmExample(  # noqa: N802
        self, request: wire.ConfirmExampleRequest, peer: PeerIdentity
    ) -> wire.ConfirmExampleResponse:
        """The receiver has taken an example, or deleted a withdrawn one. Idempotent."""
        row = self._row(request.example, peer)
        if row.recipient != peer.member:
            raise Refused(RefusalReason.NOT_A_PARTICIPANT, "only the receiver confirms")
        before = {
            wire.EXAMPLE_STATE_TAKEN: wire.EXAMPLE_STATE_WAITING,
            wire.EXAMPLE_STATE_DELETED: wire.EXAMPLE_STATE_WITHDRAWN,
        }.get(request.state)
        if before is None:
            raise Refused(RefusalReason.MALFORMED, "a receiver confirms that it took or deleted an example")
        async with self._changing:
            now = _state(self._row(request.example, peer))
            if now != request.state:
                if now != before:
                    raise Refused(RefusalReason.WRONG_STEP, f"the example is {_NAMES[now]}; list them again")
                await asyncio.shield(self._move(row, request.state))
        return wire.ConfirmExampleResponse()

    async def WithdrawExample(  # noqa: N802
        self, request: wire.WithdrawExampleRequest, peer: PeerIdentity
    ) -> wire.WithdrawExampleResponse:
        """Delete the bytes here, and leave word for the receiver. Idempotent."""
        row = self._row(request.example, peer)
        if row.sender != peer.member:
            raise Refused(RefusalReason.NOT_A_PARTICIPANT, "only the sender withdraws an example")
        async with self._changing:
            row = self._row(request.example, peer)
            if _state(row) in (wire.EXAMPLE_STATE_WAITING, wire.EXAMPLE_STATE_TAKEN):
                # Also while it waits: the receiver may have fetched it and not confirmed yet.
                await asyncio.shield(self._move(row, wire.EXAMPLE_STATE_WITHDRAWN))
                return wire.WithdrawExampleResponse(state=wire.EXAMPLE_STATE_WITHDRAWN)
            return wire.WithdrawExampleResponse(state=_state(row))

    async def ListForwarded(  # noqa: N802
        self, _request: wire.ListForwardedRequest, peer: PeerIdentity
    ) -> wire.ListForwardedResponse:
        """The caller's own examples and how far each is."""
        rows = self._around.store.find(ExampleRecord, federation=peer.federation, sender=peer.member)
        return wire.ListForwardedResponse(
            items=[
                wire.ListForwardedResponse.Item(
                    example=row.example, recipient=row.recipient, state=_state(row)
                )
                for row in rows
            ]
        )

    async def _move(self, row: ExampleRecord, state: "_State.ValueType") -> None:
        """The record first, then the bytes: after a crash between the two, the start deletes them."""
        now = self._around.clock.now_ms()
        moved = replace(row, state=_NAMES[state], changed_ms=now)
        await self._around.store.commit(Put(moved), self._event(f"example {_NAMES[state]}", moved, now))
        await self._work(self._around.blobs.delete, blob_name(row.federation, row.example))

    async def delete_leftovers(self) -> None:
        """At the start: bytes that no waiting record owns are deleted."""
        wanted = {
            blob_name(row.federation, row.example)
            for row in self._around.store.find(ExampleRecord, state=_NAMES[wire.EXAMPLE_STATE_WAITING])
        }
        for name in await self._work(self._around.blobs.names, "example"):
            if name not in wanted:
                await self._work(self._around.blobs.delete, name)

    def _row(self, example: bytes, peer: PeerIdentity) -> ExampleRecord:
        _identifier(example)
        row = self._around.store.get(ExampleRecord, peer.federation, example)
        if row is None or peer.member not in (row.sender, row.recipient):
            raise Refused(RefusalReason.OUT_OF_RANGE, "this member has no example of this id")
        return row

    async def _work(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._around.executor, call, *arguments)

    def _event(self, kind: str, row: ExampleRecord, now: int) -> Append:
        return event(
            now, row.federation, kind, example=row.example.hex(), sender=row.sender, recipient=row.recipient
        )


def _identifier(example: bytes) -> None:
    if len(example) != ID_BYTES:
        raise Refused(RefusalReason.WRONG_SIZE, f"an example's id has {ID_BYTES} bytes")


def _state(row: ExampleRecord) -> "_State.ValueType":
    return next(state for state, name in _NAMES.items() if name == row.state)
