"""`RoundService`: a member's side of the rounds. `caller` is the `PeerIdentity` of the certificate."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

from blindsum.aggregator.engine import FederationEngine, checkpoint_name, event
from blindsum.aggregator.folding import blob_prefix, contribution_name, result_name
from blindsum.aggregator.ingest import CHUNK_BYTES, FrameDigests, Ingest, PlainDigest, UploadJob
from blindsum.aggregator.peer_identity import PeerIdentity
from blindsum.aggregator.presence import WatchStream
from blindsum.aggregator.round_run import CONCLUDED, OPEN, PUBLISHED, Surroundings
from blindsum.aggregator.settings import AggregatorSettings
from blindsum.aggregator.store.records import (
    CertificateRecord,
    CheckpointRecord,
    DocumentRecord,
    EnvelopeRecord,
    RoundRecord,
)
from blindsum.aggregator.store.state import Insert, StorageFailed
from blindsum.aggregator.transport_authority import TransportAuthority
from blindsum.aggregator.upload_chunk import UploadChunk
from blindsum.crypto.errors import RefusalReason, Refused
from blindsum.crypto.primitives.signing import require_signature
from blindsum.proto.v1 import enrolment_pb2
from blindsum.proto.v1 import round_pb2 as wire

_READ_BYTES = 1 << 20
_STATES = {
    OPEN: wire.ROUND_STATE_OPEN,
    PUBLISHED: wire.ROUND_STATE_PUBLISHED,
    CONCLUDED: wire.ROUND_STATE_CONCLUDED,
}


def checkpoint_info(engine: FederationEngine, state: CheckpointRecord) -> enrolment_pb2.CheckpointInfo:
    """What goes with a sealed training state."""
    claim = engine.claim(state)
    return enrolment_pb2.CheckpointInfo(
        state_round=state.state_round,
        state=state.state,
        sealing_context=state.sealing_context,
        total=state.total,
        sealed_digest=state.sealed_digest,
        header=state.header,
        h1=state.h1,
        signatures=[
            enrolment_pb2.StateSignature(member=word.member, signature=word.signature)
            for word in claim.signatures
        ],
        roster=state.roster,
        survivors=state.survivors,
        claim=claim.to_bytes(),
    )


async def read_blob(around: Surroundings, name: str, offset: int, total: int) -> AsyncIterator[bytes]:
    """The blob's bytes from an offset, in chunks; read a little ahead, never whole."""
    loop = asyncio.get_running_loop()

    def part(start: int) -> bytes:
        with around.blobs.open(name) as reader:
            return reader.read(start, min(_READ_BYTES, total - start))

    while offset < total:
        data = await loop.run_in_executor(around.executor, part, offset)
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]
        offset += len(data)


class RoundService:
    """One method a call of the service."""

    def __init__(
        self,
        settings: AggregatorSettings,
        around: Surroundings,
        authority: TransportAuthority,
        engines: Mapping[bytes, FederationEngine],
        ingest: Ingest,
        require_current: Callable[[PeerIdentity], None],
    ) -> None:
        self._settings = settings
        self._around = around
        self._authority = authority
        self._engines = engines
        self._ingest = ingest
        self._require_current = require_current

    def _engine(self, peer: PeerIdentity) -> FederationEngine:
        return self._engines[peer.federation]

    # Watching

    def _response(self, engine: FederationEngine, member: str) -> wire.WatchResponse:
        state, run = engine.state, engine.run
        response = wire.WatchResponse(
            roster=engine.record.roster,
            policy=engine.record.policy,
            plan=engine.record.plan,
            state_round=state.state_round if state is not None else 0,
            state=state.state if state is not None else b"",
            plan_finished=engine.plan_finished,
        )
        if run is None:
            return response
        notice = response.round
        notice.number = run.number
        notice.header = run.record.header
        notice.state = _STATES.get(run.record.state, wire.ROUND_STATE_ABORTED)
        notice.taking_part = run.takes_part(member)
        notice.abort_reason = run.record.reason
        notice.checkpoint_wanted = engine.checkpoint_wanted(member)
        if run.record.state == OPEN and run.settled and run.step is not None:
            notice.step = run.step
            notice.asked = run.is_asked(member)
            notice.step_deadline_ms = run.deadline_ms
            notice.participants = len(run.machine.participants)
            notice.replied = len(run.machine.replied)
        elif run.record.state == PUBLISHED:
            notice.step_deadline_ms = run.deadline_ms
            notice.participants = len(run.survivors)
            notice.replied = len(run.conclusions)
        return response

    async def Watch(  # noqa: N802
        self, request: wire.WatchRequest, peer: PeerIdentity
    ) -> AsyncIterator[wire.WatchResponse]:
        """The current state, and again whenever it changes; a slow reader gets only the latest."""
        engine = self._engine(peer)
        stream: WatchStream = engine.open_watch(peer.member, request.ready)
        last: bytes | None = None
        try:
            while not stream.ended:
                stream.changed.clear()
                self._require_current(peer)
                run = engine.run
                if run is not None and not run.settled:
                    await run.wait_settled()
                response = self._response(engine, peer.member)
                # Others' replies alone are no news: a broadcast for each would be quadratic.
                news = wire.WatchResponse()
                news.CopyFrom(response)
                if news.HasField("round"):
                    news.round.replied = 0
                seen = news.SerializeToString(deterministic=True)
                if seen != last:
                    last = seen
                    yield response
                await stream.changed.wait()
        finally:
            engine.presence.close(stream)

    # Documents

    async def GetDocument(  # noqa: N802
        self, request: wire.GetDocumentRequest, peer: PeerIdentity
    ) -> wire.GetDocumentResponse:
        """A signed document or HE public key of the caller's federation."""
        found = self._around.store.get(DocumentRecord, peer.federation, request.digest)
        if found is None:
            raise Refused(RefusalReason.WRONG_DIGEST, "there is no document with this digest")
        return wire.GetDocumentResponse(document=found.body)

    async def GetEnvelopes(  # noqa: N802
        self, _request: wire.GetEnvelopesRequest, peer: PeerIdentity
    ) -> wire.GetEnvelopesResponse:
        """The caller's key envelopes under the current roster."""
        rows = self._around.store.find(
            EnvelopeRecord,
            federation=peer.federation,
            roster=self._engine(peer).record.roster,
            member=peer.member,
        )
        return wire.GetEnvelopesResponse(envelopes=[row.body for row in rows])

    # Steps

    async def GetStep(  # noqa: N802
        self, request: wire.GetStepRequest, peer: PeerIdentity
    ) -> wire.GetStepResponse:
        """The request of the open step to the caller."""
        run = self._engine(peer).running(request.round)
        return wire.GetStepResponse(request=await run.request(peer.member, request.step))

    async def Answer(self, request: wire.AnswerRequest, peer: PeerIdentity) -> wire.AnswerResponse:  # noqa: N802
        """The reply to a message step. Acknowledged once durable; idempotent."""
        run = self._engine(peer).running(request.round)
        duplicate = await run.answer(peer.member, request.step, request.reply)
        return wire.AnswerResponse(duplicate=duplicate)

    # Bulk

    async def BeginUpload(  # noqa: N802
        self, request: wire.BeginUploadRequest, peer: PeerIdentity
    ) -> wire.BeginUploadResponse:
        """Admit a bulk upload, or say when to ask again, or that it is there already. Idempotent."""
        if len(request.digest) != 32:
            raise Refused(RefusalReason.WRONG_SIZE, "an upload's digest has 32 bytes")
        engine = self._engine(peer)
        if request.kind == wire.BULK_KIND_CONTRIBUTION:
            job = await self._contribution(engine, request, peer.member)
        elif request.kind == wire.BULK_KIND_CHECKPOINT:
            job = self._checkpoint(engine, request, peer.member)
        else:
            raise Refused(RefusalReason.MALFORMED, "only contributions and checkpoints are uploaded")
        if job is None:
            return wire.BeginUploadResponse(done=True)
        admission = await self._ingest.begin(job)
        if admission.done:
            return wire.BeginUploadResponse(done=True)
        if not admission.upload_id:
            return wire.BeginUploadResponse(retry_after_ms=admission.retry_after_ms)
        return wire.BeginUploadResponse(
            slot=wire.UploadSlot(upload_id=admission.upload_id, offset=admission.offset)
        )

    async def _contribution(
        self, engine: FederationEngine, request: wire.BeginUploadRequest, member: str
    ) -> UploadJob | None:
        run = engine.running(request.round)
        reply, digest = request.reply, request.digest
        if await run.check_upload(member, reply):
            return None
        if run.machine.expected_digest(reply) != digest:
            raise Refused(RefusalReason.WRONG_DIGEST, "the signed reply promises another upload")
        layout = run.layout
        if request.total != layout.upload_total:
            raise Refused(
                RefusalReason.WRONG_SIZE,
                f"an upload of round {run.number} has {layout.upload_total} bytes, not {request.total}",
            )

        def busy(begins: bool) -> None:
            (engine.presence.begin_transfer if begins else engine.presence.end_transfer)(member)

        federation = engine.federation
        digests = FrameDigests(layout, run.machine.h1, run.arithmetic)
        return UploadJob(
            federation=federation,
            round=run.number,
            member=member,
            total=layout.upload_total,
            digest=digest,
            spool_name=f"spool/{blob_prefix(federation, run.number)}{member}.{digest.hex()}",
            blob_name=contribution_name(federation, run.number, member, digest),
            digests=digests,
            commit=lambda frames: run.accept_upload(member, reply, digest, frames, digests.seeds),
            busy=busy,
        )

    def _checkpoint(
        self, engine: FederationEngine, request: wire.BeginUploadRequest, member: str
    ) -> UploadJob | None:
        number, state, total, digest = request.round, request.reply, request.total, request.digest
        if engine.check_checkpoint(member, number, state, total):
            return None

        def busy(begins: bool) -> None:
            if begins:
                engine.presence.begin_transfer(member)
                engine.checkpoint_uploads.add(member)
            else:
                engine.checkpoint_uploads.discard(member)
                engine.presence.end_transfer(member)

        return UploadJob(
            federation=engine.federation,
            round=number,
            member=member,
            total=total,
            digest=digest,
            spool_name=f"spool/{blob_prefix(engine.federation, number)}{member}.state.{digest.hex()}",
            blob_name=checkpoint_name(engine.federation, digest),
            digests=PlainDigest(),
            commit=lambda _frames: engine.accept_checkpoint(member, number, state, total, digest),
            busy=busy,
        )

    async def Upload(  # noqa: N802
        self, requests: AsyncIterator[UploadChunk], peer: PeerIdentity
    ) -> wire.UploadResponse:
        """The bulk, from the offset that BeginUpload named. Answered only once it is durable."""
        committed = await self._ingest.stream(peer.federation, peer.member, requests)
        return wire.UploadResponse(committed=committed)

    # Results

    def _published(self, engine: FederationEngine, number: int) -> RoundRecord:
        record = self._around.store.get(RoundRecord, engine.federation, number)
        if record is None or record.state not in (PUBLISHED, CONCLUDED):
            raise Refused(RefusalReason.WRONG_ROUND, f"round {number} has no published sum")
        return record

    def _require_survivor(self, record: RoundRecord, member: str) -> None:
        if member not in record.survivors.split(" "):
            raise Refused(
                RefusalReason.NOT_A_PARTICIPANT,
                f"{member} is no survivor of round {record.number}; get the checkpoint instead",
            )

    async def GetResult(  # noqa: N802
        self, request: wire.GetResultRequest, peer: PeerIdentity
    ) -> wire.GetResultResponse:
        """The result message of a published round, for its survivors."""
        record = self._published(self._engine(peer), request.round)
        self._require_survivor(record, peer.member)
        return wire.GetResultResponse(result=record.result, total=record.result_total)

    async def Download(  # noqa: N802
        self, request: wire.DownloadRequest, peer: PeerIdentity
    ) -> AsyncIterator[wire.DownloadResponse]:
        """A published sum or a sealed checkpoint, from an offset."""
        engine = self._engine(peer)
        if request.kind == wire.BULK_KIND_SUM:
            record = self._published(engine, request.round)
            self._require_survivor(record, peer.member)
            name, total = result_name(engine.federation, record.number), record.result_total
        elif request.kind == wire.BULK_KIND_CHECKPOINT:
            state = engine.state
            if state is None or state.state_round != request.round:
                raise Refused(RefusalReason.WRONG_ROUND, f"{request.round} isn't the newest training state")
            name, total = checkpoint_name(engine.federation, state.sealed_digest), state.total
        else:
            raise Refused(RefusalReason.MALFORMED, "only sums and checkpoints are downloaded")
        if request.offset > total:
            raise Refused(RefusalReason.WRONG_OFFSET, f"the download has {total} bytes")
        if self._around.blobs.size(name) != total:
            raise StorageFailed(f"{name} isn't there as it was stored; restore a backup")
        async for data in read_blob(self._around, name, request.offset, total):
            self._require_current(peer)
            yield wire.DownloadResponse(data=data)

    async def Conclude(  # noqa: N802
        self, request: wire.ConcludeRequest, peer: PeerIdentity
    ) -> wire.ConcludeResponse:
        """A survivor's word on the sum. Idempotent."""
        duplicate = await self._engine(peer).conclude(
            peer.member, request.round, request.state, request.signature, request.refusal
        )
        return wire.ConcludeResponse(duplicate=duplicate)

    async def GetCheckpoint(  # noqa: N802
        self, _request: wire.GetCheckpointRequest, peer: PeerIdentity
    ) -> wire.GetCheckpointResponse:
        """The newest agreed training state, sealed, and its signatures."""
        engine = self._engine(peer)
        if engine.state is None:
            raise Refused(RefusalReason.WRONG_STEP, "there is no training state yet")
        return wire.GetCheckpointResponse(info=checkpoint_info(engine, engine.state))

    async def RenewCertificate(  # noqa: N802
        self, request: wire.RenewCertificateRequest, peer: PeerIdentity
    ) -> wire.RenewCertificateResponse:
        """A new certificate for a transport key, by proof of the identity key."""
        require_signature(
            peer.identity,
            request.signature,
            "the certificate request",
            "certificate request",
            request.csr,
        )
        now = self._around.clock.now_ms()
        made = self._authority.member_certificate(
            request.csr, peer.federation, peer.member, self._settings.member_certificate_days, now
        )
        await asyncio.shield(
            self._around.store.commit(
                Insert(
                    CertificateRecord(
                        made.serial, peer.federation, peer.member, peer.identity, made.not_after_ms
                    )
                ),
                event(now, peer.federation, "certificate renewed", member=peer.member),
            )
        )
        return wire.RenewCertificateResponse(certificate=made.chain)
