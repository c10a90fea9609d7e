"""`EnrolmentService`: how members come in, and how the owner publishes. Server-authenticated TLS only.

Each message proves itself: by the owner's signature, or by the applicant's. The aggregator relays; it
neither admits nor forges.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from blindsum.aggregator.described_stream import description, spooled
from blindsum.aggregator.engine import FederationEngine, checkpoint_name, event
from blindsum.aggregator.publishing import Publication
from blindsum.aggregator.round_run import Surroundings
from blindsum.aggregator.round_service import checkpoint_info, read_blob
from blindsum.aggregator.settings import AggregatorSettings
from blindsum.aggregator.store.records import (
    CertificateRecord,
    FederationRecord,
    InitialStateRecord,
    JoinRecord,
    RoundRecord,
)
from blindsum.aggregator.store.state import Insert, Put, Taken
from blindsum.aggregator.structured_logs import logger
from blindsum.aggregator.transport_authority import TransportAuthority, parse_csr
from blindsum.crypto.canonical import decode_document
from blindsum.crypto.errors import DocumentError, RefusalReason, Refused
from blindsum.crypto.schemes.base import Scheme
from blindsum.crypto.trust.documents import open_document, parse_signed
from blindsum.crypto.trust.joining import (
    FEDERATION_KIND,
    Federation,
    JoinBody,
    check_owner_proof,
    check_request_signature,
    request_id,
)
from blindsum.proto.v1 import enrolment_pb2 as wire

MAX_JOIN_BYTES = 16 * 1024
MAX_FIRST_STATE_BYTES = 1 << 40
JOINS_PER_TOKEN = 4
LONGEST_WATCH_SECONDS = 3600
ROUNDS_IN_STATUS = 100


def _exactly(value: bytes, size: int, what: str) -> bytes:
    if len(value) != size:
        raise Refused(RefusalReason.WRONG_SIZE, f"{what} has {size} bytes, not {len(value)}")
    return value


@dataclass(frozen=True)
class OwnerLook:
    """When an owner last looked at the requests of its federation, and by when it said it looks again."""

    at_ms: int
    again_ms: int


class EnrolmentService:
    """One method a call of the service; `caller` is None, for nobody is known here."""

    def __init__(
        self,
        settings: AggregatorSettings,
        around: Surroundings,
        authority: TransportAuthority,
        engines: Mapping[bytes, FederationEngine],
        schemes: Callable[[str], Scheme],
        add_federation: Callable[[FederationRecord], Any],
        published: Callable[[FederationEngine], None],
    ) -> None:
        self._settings = settings
        self._around = around
        self._authority = authority
        self._engines = engines
        self._schemes = schemes
        self._add_federation = add_federation
        self._published = published
        self._publishing = asyncio.Lock()
        self._issuing = asyncio.Lock()
        self._looks: dict[bytes, OwnerLook] = {}
        self._log = logger(part="enrolment")

    def _engine(self, federation: bytes) -> FederationEngine:
        engine = self._engines.get(federation)
        if engine is None:
            raise Refused(RefusalReason.UNKNOWN_MEMBER, "there is no such federation here")
        return engine

    def _proven(self, proof: wire.OwnerProof, verb: str, *fields: bytes) -> FederationEngine:
        engine = self._engine(proof.federation)
        if not 0 <= proof.time < 2**62:
            raise Refused(RefusalReason.OUT_OF_RANGE, "the time of the owner's query is out of range")
        now = self._around.clock.now_ms() // 1000
        check_owner_proof(
            engine.record.owner, proof.signature, verb, proof.federation, proof.time, now, *fields
        )
        return engine

    async def GetFederation(  # noqa: N802
        self, request: wire.GetFederationRequest, _caller: None
    ) -> wire.GetFederationResponse:
        """Who owns a federation, and how far it is."""
        record = self._engine(request.federation).record
        return wire.GetFederationResponse(
            owner_key=record.owner,
            roster_version=record.roster_version,
            policy_version=record.policy_version,
        )

    async def CreateFederation(  # noqa: N802
        self, request: wire.CreateFederationRequest, _caller: None
    ) -> wire.CreateFederationResponse:
        """Register a federation, for an owner key that the operator allows. Idempotent."""
        if len(request.document) > MAX_JOIN_BYTES:
            raise Refused(RefusalReason.WRONG_SIZE, "a federation's document is small")
        signed = parse_signed(request.document)
        if signed.kind != FEDERATION_KIND:
            raise Refused(RefusalReason.MALFORMED, "the document isn't a federation's")
        # The owner's key stands in the document that it signs: read, then verify under it.
        claimed = decode_document(signed.body, Federation, "the federation")
        if not self._settings.allow_any_owner and claimed.owner.hex() not in self._settings.owners:
            raise Refused(
                RefusalReason.POLICY, "this server doesn't know the owner key; its operator has to list it"
            )
        try:
            federation = open_document(signed, claimed.owner, FEDERATION_KIND, Federation)
        except DocumentError as error:
            raise Refused(RefusalReason.SIGNATURE, str(error)) from None
        known = self._engines.get(federation.id)
        if known is not None:
            return wire.CreateFederationResponse()
        now = self._around.clock.now_ms()
        record = FederationRecord(
            federation=federation.id, document=request.document, owner=federation.owner, created_ms=now
        )
        await asyncio.shield(self._create(record, now))
        self._log.info("federation created", federation=federation.id.hex()[:16])
        return wire.CreateFederationResponse()

    async def _create(self, record: FederationRecord, now: int) -> None:
        try:
            await self._around.store.commit(
                Insert(record), event(now, record.federation, "federation created", owner=record.owner.hex())
            )
        except Taken:
            return
        await self._add_federation(record)

    async def Join(self, request: wire.JoinRequest, _caller: None) -> wire.JoinResponse:  # noqa: N802
        """Keep a request for the owner. Idempotent for the same bytes."""
        engine = self._engine(request.federation)
        if len(request.body) > MAX_JOIN_BYTES:
            raise Refused(RefusalReason.WRONG_SIZE, f"a join request has at most {MAX_JOIN_BYTES} bytes")
        _exactly(request.token_mac, 32, "the token's MAC")
        _exactly(request.token_id, 32, "the token's id")
        body = decode_document(request.body, JoinBody, "the join request")
        if body.federation != request.federation:
            raise Refused(RefusalReason.MALFORMED, "the join request is for another federation")
        check_request_signature(body.identity, request.signature, request.body)
        parse_csr(request.csr)
        identifier = request_id(request.body)
        federation = engine.federation
        known = self._around.store.get(JoinRecord, federation, identifier)
        if known is not None:
            if known.csr != request.csr or known.token != request.token_id:
                raise Refused(
                    RefusalReason.CONFLICT,
                    "this request came before with another transport key; make a new one",
                )
            return wire.JoinResponse(request_id=identifier)
        waiting = self._waiting(engine)
        if len(waiting) >= self._settings.max_pending_joins:
            raise Refused(RefusalReason.LIMIT, "too many requests wait for the owner; try again later")
        if sum(row.token == request.token_id for row in waiting) >= JOINS_PER_TOKEN:
            raise Refused(RefusalReason.LIMIT, "too many requests under this invitation wait for the owner")
        now = self._around.clock.now_ms()
        row = JoinRecord(
            federation=federation,
            request=identifier,
            member=body.id,
            token=request.token_id,
            body=request.body,
            signature=request.signature,
            token_mac=request.token_mac,
            csr=request.csr,
            created_ms=now,
        )
        await asyncio.shield(
            self._around.store.commit(Put(row), event(now, federation, "join requested", member=body.id))
        )
        self._log.info("join requested", federation=federation.hex()[:16], member=body.id)
        return wire.JoinResponse(request_id=identifier)

    def _admitted(self, engine: FederationEngine, row: JoinRecord) -> bool:
        roster = engine.documents.roster
        index = None if roster is None else roster.position.get(row.member)
        if roster is None or index is None:
            return False
        body = decode_document(row.body, JoinBody, "the join request")
        entry = roster.members[index]
        return (entry.identity, entry.hpke) == (body.identity, body.hpke)

    def _waiting(self, engine: FederationEngine) -> list[JoinRecord]:
        rows = self._around.store.find(JoinRecord, federation=engine.federation)
        return [
            row
            for row in rows
            if row.refusal is None and not row.certificate and not self._admitted(engine, row)
        ]

    async def PollJoin(  # noqa: N802
        self, request: wire.PollJoinRequest, _caller: None
    ) -> wire.PollJoinResponse:
        """Whether the owner has answered; once admitted, a certificate that is still good for a while."""
        engine = self._engine(request.federation)
        row = self._around.store.get(JoinRecord, engine.federation, request.request_id)
        if row is None:
            raise Refused(RefusalReason.UNKNOWN_MEMBER, "there is no such join request; send it again")
        if row.refusal is not None:
            return wire.PollJoinResponse(state=wire.JOIN_STATE_REFUSED, reason=row.refusal)
        if not self._admitted(engine, row):
            if row.certificate:
                return wire.PollJoinResponse(
                    state=wire.JOIN_STATE_REFUSED, reason="the owner has removed this member"
                )
            return self._still_waiting(engine)
        async with self._issuing:
            certificate = await self._certificate(row)
        return wire.PollJoinResponse(state=wire.JOIN_STATE_ADMITTED, certificate=certificate)

    def _still_waiting(self, engine: FederationEngine) -> wire.PollJoinResponse:
        look = self._looks.get(engine.federation)
        now = self._around.clock.now_ms()
        return wire.PollJoinResponse(
            state=wire.JOIN_STATE_WAITING,
            owner_looked=0 if look is None else look.at_ms // 1000,
            owner_watching=look is not None and now <= look.again_ms,
        )

    async def _certificate(self, row: JoinRecord) -> bytes:
        """The stored certificate while more than a third of its life is left, else a new one."""
        current = self._around.store.get(JoinRecord, row.federation, row.request)
        assert current is not None
        days = self._settings.member_certificate_days
        now = self._around.clock.now_ms()
        if current.certificate:
            serial, chain = current.certificate[:20], current.certificate[20:]
            issued = self._around.store.get(CertificateRecord, serial)
            if issued is not None and issued.not_after_ms - now > days * 86_400_000 // 3:
                return chain
        body = decode_document(row.body, JoinBody, "the join request")
        made = self._authority.member_certificate(row.csr, row.federation, row.member, days, now)
        await asyncio.shield(
            self._around.store.commit(
                Put(replace(current, certificate=made.serial + made.chain)),
                Insert(
                    CertificateRecord(
                        made.serial, row.federation, row.member, body.identity, made.not_after_ms
                    )
                ),
                event(now, row.federation, "certificate issued", member=row.member),
            )
        )
        return made.chain

    async def ListJoinRequests(  # noqa: N802
        self, request: wire.ListJoinRequestsRequest, _caller: None
    ) -> wire.ListJoinRequestsResponse:
        """Requests that wait for the owner."""
        engine = self._proven(request.proof, "ListJoinRequests")
        now = self._around.clock.now_ms()
        # Twice the time it said: a look may come late without anybody having gone.
        again_ms = 2000 * min(request.again_within, LONGEST_WATCH_SECONDS)
        self._looks[engine.federation] = OwnerLook(now, now + again_ms if again_ms else 0)
        return wire.ListJoinRequestsResponse(
            pending=[
                wire.ListJoinRequestsResponse.Pending(
                    request_id=row.request,
                    body=row.body,
                    signature=row.signature,
                    token_mac=row.token_mac,
                    token_id=row.token,
                )
                for row in self._waiting(engine)
            ]
        )

    async def Publish(self, request: wire.PublishRequest, _caller: None) -> wire.PublishResponse:  # noqa: N802
        """Take what the owner signed, all or none."""
        engine = self._engine(request.federation)
        await asyncio.shield(asyncio.ensure_future(self._publish(engine, request)))
        return wire.PublishResponse()

    async def _publish(self, engine: FederationEngine, request: wire.PublishRequest) -> None:
        async with self._publishing:
            publication = Publication(
                self._around.store,
                self._schemes,
                engine.record,
                engine.documents,
                self._around.clock.now_ms(),
            )
            changes = await asyncio.get_running_loop().run_in_executor(
                self._around.executor,
                publication.changes,
                list(request.documents),
                list(request.envelopes),
                list(request.he_public_keys),
            )
            await self._around.store.commit(*changes)
            engine.documents_changed()
            self._published(engine)

    async def PublishCheckpoint(  # noqa: N802
        self, requests: AsyncIterator[wire.PublishCheckpointRequest], _caller: None
    ) -> wire.PublishCheckpointResponse:
        """Take a sealed S_0, before the plan that names it."""
        start: wire.PublishCheckpointStart = await description(requests, self._settings)
        _exactly(start.state, 32, "a state's digest")
        engine = self._proven(
            start.proof, "PublishCheckpoint", start.state, start.total.to_bytes(8, "little")
        )
        if not 0 < start.total <= MAX_FIRST_STATE_BYTES:
            raise Refused(RefusalReason.WRONG_SIZE, "a first state is neither empty nor endless")
        name = f"spool/{engine.federation.hex()[:32]}.first.{os.urandom(8).hex()}"
        async with spooled(requests, name, start.total, self._settings, self._around) as (spool, sealed):
            target = checkpoint_name(engine.federation, sealed)
            await asyncio.get_running_loop().run_in_executor(
                self._around.executor, self._around.blobs.keep, spool, name, target
            )
        now = self._around.clock.now_ms()
        await asyncio.shield(
            self._around.store.commit(
                Put(InitialStateRecord(engine.federation, start.state, start.total, sealed, now))
            )
        )
        return wire.PublishCheckpointResponse()

    async def GetStatus(  # noqa: N802
        self, request: wire.GetStatusRequest, _caller: None
    ) -> wire.GetStatusResponse:
        """What runs, for the owner."""
        engine = self._proven(request.proof, "GetStatus")
        store = self._around.store
        roster, plan = engine.documents.roster, engine.documents.plan
        rows = store.find(RoundRecord, federation=engine.federation)
        last_round: dict[str, int] = {}
        for row in rows:
            for member in filter(None, row.survivors.split(" ")):
                last_round[member] = row.number
        members = [] if roster is None else [entry.id for entry in roster.members]
        response = wire.GetStatusResponse(
            roster_version=engine.record.roster_version,
            policy_version=engine.record.policy_version,
            plan=plan.name if plan is not None else "",
            state_round=engine.state.state_round if engine.state is not None else 0,
            plan_rounds=plan.rounds if plan is not None else 0,
            waits_for=engine.waits_for(),
            members=[
                wire.GetStatusResponse.Member(
                    id=member,
                    connected=engine.presence.present(member),
                    last_round=last_round.get(member, 0),
                )
                for member in members
            ],
        )
        for row in reversed(rows[-ROUNDS_IN_STATUS:]):
            item = response.rounds.add(
                number=row.number,
                started=row.opened_ms // 1000,
                survivors=len(row.survivors.split()),
                outcome=f"{row.state}: {row.reason}" if row.reason else row.state,
            )
            run = engine.run
            if run is not None and run.number == row.number and run.settled:
                item.step = run.step or ""
                item.deadline = run.deadline_ms // 1000
                if run.step is not None:
                    item.participants = len(run.machine.participants)
                    item.replied = len(run.machine.replied)
        if engine.paused and response.rounds:
            response.rounds[0].outcome += f" (paused: {engine.paused})"
        return response

    async def GetOwnerCheckpoint(  # noqa: N802
        self, request: wire.GetOwnerCheckpointRequest, _caller: None
    ) -> AsyncIterator[wire.GetOwnerCheckpointResponse]:
        """The newest agreed state, sealed, with its signatures."""
        engine = self._proven(request.proof, "GetOwnerCheckpoint")
        state = engine.state
        if state is None:
            raise Refused(RefusalReason.WRONG_STEP, "there is no training state yet")
        yield wire.GetOwnerCheckpointResponse(info=checkpoint_info(engine, state))
        name = checkpoint_name(engine.federation, state.sealed_digest)
        async for data in read_blob(self._around, name, 0, state.total):
            yield wire.GetOwnerCheckpointResponse(data=data)
