"""An owner and members that speak to a real server, one call at a time, as a test scripts them."""

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import msgspec
import numpy as np
from blindsum.aggregator.embedding import AggregatorSettings, ServerHandle
from blindsum.crypto.canonical import encode_document
from blindsum.crypto.encoding.vector import field_count
from blindsum.crypto.primitives.sealing import HpkeKey
from blindsum.crypto.primitives.signing import SigningKey
from blindsum.crypto.schemes.base import frame_digest, upload_digest
from blindsum.crypto.trust import plan as plans
from blindsum.crypto.trust import policy as policies
from blindsum.crypto.trust import roster as rosters
from blindsum.crypto.trust.acceptance import sign_state
from blindsum.crypto.trust.documents import sign_document
from blindsum.crypto.trust.envelope import seal_group_key
from blindsum.crypto.trust.group_key import GroupKey
from blindsum.crypto.trust.header import BoundHeader
from blindsum.crypto.trust.joining import (
    FEDERATION_KIND,
    Federation,
    JoinBody,
    prove_owner,
    sign_request,
    token_id,
)
from blindsum.crypto.trust.plan import Deadlines, Encoding, Plan
from blindsum.crypto.trust.policy import Policy
from blindsum.crypto.trust.roster import Roster, RosterEntry
from blindsum.proto.v1 import enrolment_pb2, enrolment_pb2_grpc, round_pb2, round_pb2_grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from plain_scheme import FIELDS_PER_FRAME

CALL_SECONDS = 20
CHUNK = 256 * 1024


def reason_of(error: grpc.RpcError) -> str:
    """The refusal's reason in the trailing metadata."""
    return dict(error.trailing_metadata() or ()).get("blindsum-reason", "")


def settings_for(directory: Path, **changes: Any) -> AggregatorSettings:
    """Settings for a test server: free ports, short grace, little patience."""
    values: dict[str, Any] = {
        "data_dir": directory,
        "allow_any_owner": True,
        "enrolment_port": 0,
        "member_port": 0,
        "presence_grace": 0.1,
        "retry_pause": 0.05,
        "disk_reserve": 0,
        "log_level": "ERROR",
        "retry_after_ms": 10,
    }
    return AggregatorSettings(**{**values, **changes})


def transport_request() -> tuple[bytes, bytes]:
    """A transport key (PEM) and its signing request (DER)."""
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return pem, csr.public_bytes(serialization.Encoding.DER)


@dataclass
class Applicant:
    """A device's keys and its request."""

    name: str
    identity: SigningKey = field(default_factory=SigningKey.generate)
    hpke: HpkeKey = field(default_factory=HpkeKey.generate)
    transport: tuple[bytes, bytes] = field(default_factory=transport_request)

    @property
    def token(self) -> bytes:
        """The token of its invitation."""
        return hashlib.sha256(self.name.encode()).digest()

    @property
    def entry(self) -> RosterEntry:
        return RosterEntry(
            id=self.name, organisation="", identity=self.identity.public, hpke=self.hpke.public
        )

    def request(self, federation: bytes) -> enrolment_pb2.JoinRequest:
        body = encode_document(
            JoinBody(
                federation=federation,
                id=self.name,
                organisation="",
                identity=self.identity.public,
                hpke=self.hpke.public,
                created=1_700_000_000,
            )
        )
        signature, token_mac = sign_request(self.identity, self.token, body)
        return enrolment_pb2.JoinRequest(
            federation=federation,
            body=body,
            signature=signature,
            token_mac=token_mac,
            token_id=token_id(self.token),
            csr=self.transport[1],
        )


class ScriptedOwner:
    """Founds a federation and publishes for it."""

    def __init__(self, enrolment_port: int, ca_pem: bytes) -> None:
        self.key = SigningKey.generate()
        self.now: Callable[[], float] = time.time
        self.group_key = GroupKey.generate(1)
        self.document = Federation(
            name="test", owner=self.key.public, founded=int(time.time()), nonce=b"n" * 32
        )
        self.federation = self.document.id
        self.applicants: dict[str, Applicant] = {}
        self.roster: Roster | None = None
        self.roster_digest = b""
        self.policy_digest = b""
        self.plan: Plan | None = None
        self.plan_digest = b""
        self.connect(enrolment_port, ca_pem)

    def connect(self, enrolment_port: int, ca_pem: bytes) -> None:
        """To a server, or to one that came back on another port."""
        self.ca_pem = ca_pem
        self.channel = grpc.secure_channel(
            f"localhost:{enrolment_port}", grpc.ssl_channel_credentials(ca_pem)
        )
        self.stub = enrolment_pb2_grpc.EnrolmentServiceStub(self.channel)

    def found(self) -> None:
        signed = sign_document(self.key, FEDERATION_KIND, self.document)
        self.stub.CreateFederation(
            enrolment_pb2.CreateFederationRequest(document=signed.to_bytes()), timeout=CALL_SECONDS
        )

    def proof(self, verb: str, *fields: bytes) -> enrolment_pb2.OwnerProof:
        now = int(self.now())
        return enrolment_pb2.OwnerProof(
            federation=self.federation,
            time=now,
            signature=prove_owner(self.key, verb, self.federation, now, *fields),
        )

    def publish(
        self, documents: list[bytes], envelopes: list[bytes] | None = None, he: list[bytes] | None = None
    ) -> None:
        self.stub.Publish(
            enrolment_pb2.PublishRequest(
                federation=self.federation,
                documents=documents,
                envelopes=envelopes or [],
                he_public_keys=he or [],
            ),
            timeout=CALL_SECONDS,
        )

    def policy(self, **changes: Any) -> Policy:
        values: dict[str, Any] = {
            "federation": self.federation,
            "version": 1,
            "valid_until": int(time.time()) + 86_400,
            "schemes": ("masking",),
            "n_min": 3,
            "n_max": 16,
        }
        return Policy(**{**values, **changes})

    def publish_policy(self, policy: Policy) -> None:
        signed = sign_document(self.key, policies.KIND, policy)
        self.publish([signed.to_bytes()])
        self.policy_digest = signed.digest

    def make_roster(self, names: list[str], rotate: bool = True, **changes: Any) -> tuple[bytes, list[bytes]]:
        """A signed roster and its envelopes; a removal rotates the group key."""
        before = self.roster
        if rotate and before is not None and {entry.id for entry in before.members} - set(names):
            self.group_key = GroupKey.generate(before.epoch + 1)
        values: dict[str, Any] = {
            "federation": self.federation,
            "version": 1 if before is None else before.version + 1,
            "valid_until": int(time.time()) + 86_400,
            "epoch": self.group_key.epoch,
            "group_key": self.group_key.key_id,
            "he_keys": (),
            "members": tuple(self.applicants[name].entry for name in sorted(names)),
        }
        roster = Roster(**{**values, **changes})
        signed = sign_document(self.key, rosters.KIND, roster)
        self.roster, self.roster_digest = roster, signed.digest
        envelopes = [
            seal_group_key(self.key, self.group_key, roster, signed.digest, name).to_bytes()
            for name in sorted(names)
        ]
        return signed.to_bytes(), envelopes

    def publish_roster(self, names: list[str]) -> None:
        document, envelopes = self.make_roster(names)
        self.publish([document], envelopes)

    def make_plan(self, **changes: Any) -> Plan:
        values: dict[str, Any] = {
            "federation": self.federation,
            "name": "job",
            "version": 1,
            "policy": self.policy_digest,
            "scheme": "masking",
            "rounds": 3,
            "initial_state": hashlib.sha256(b"state 0").digest(),
            "layout": b"l" * 32,
            "dimension": 20_000,
            "tensors": 2,
            "cohort_min": 3,
            "cohort_wanted": 3,
            "cohort_max": 8,
            "encoding": Encoding(bits=16),
            "deadlines": Deadlines(
                gather=1, advertise=60, share=60, upload=60, confirm=60, reveal=60, conclude=60
            ),
        }
        return Plan(**{**values, **changes})

    def publish_plan(self, plan: Plan, first_state: bytes | None = b"sealed state 0") -> None:
        if first_state is not None:
            self.publish_first_state(plan.initial_state, first_state)
        signed = sign_document(self.key, plans.KIND, plan)
        self.publish([signed.to_bytes()])
        self.plan, self.plan_digest = plan, signed.digest

    def publish_first_state(self, state: bytes, sealed: bytes) -> None:
        size = len(sealed)
        start = enrolment_pb2.PublishCheckpointStart(
            proof=self.proof("PublishCheckpoint", state, size.to_bytes(8, "little")), state=state, total=size
        )
        parts = [enrolment_pb2.PublishCheckpointRequest(start=start)]
        parts += [enrolment_pb2.PublishCheckpointRequest(data=sealed[i : i + 7]) for i in range(0, size, 7)]
        self.stub.PublishCheckpoint(iter(parts), timeout=CALL_SECONDS)

    def status(self) -> enrolment_pb2.GetStatusResponse:
        return self.stub.GetStatus(
            enrolment_pb2.GetStatusRequest(proof=self.proof("GetStatus")), timeout=CALL_SECONDS
        )

    def join(self, applicant: Applicant) -> bytes:
        self.applicants[applicant.name] = applicant
        return self.stub.Join(applicant.request(self.federation), timeout=CALL_SECONDS).request_id

    def poll(self, request: bytes) -> enrolment_pb2.PollJoinResponse:
        return self.stub.PollJoin(
            enrolment_pb2.PollJoinRequest(federation=self.federation, request_id=request),
            timeout=CALL_SECONDS,
        )


Condition = Callable[[round_pb2.WatchResponse], bool]


class ScriptedMember:
    """One member on a connection of its own."""

    def __init__(
        self, owner: ScriptedOwner, applicant: Applicant, certificate: bytes, port: int, index: int
    ) -> None:
        self.owner = owner
        self.applicant = applicant
        self.name = applicant.name
        self.certificate = certificate
        self.index = index
        self.connect(port)

    def connect(self, port: int) -> None:
        """To a server, or to one that came back on another port."""
        credentials = grpc.ssl_channel_credentials(
            self.owner.ca_pem, self.applicant.transport[0], self.certificate
        )
        self.channel = grpc.secure_channel(f"localhost:{port}", credentials)
        self.stub = round_pb2_grpc.RoundServiceStub(self.channel)
        self._news: queue.Queue[round_pb2.WatchResponse | None] = queue.Queue()
        self._watch: Any = None
        self.latest: round_pb2.WatchResponse | None = None
        self.watch_error: grpc.RpcError | None = None

    def watch(self, ready: bool = True) -> None:
        """Open the watch stream; its responses wait for `until`."""
        old = self._watch
        self.latest = None
        self._news = news = queue.Queue()
        self._watch = call = self.stub.Watch(round_pb2.WatchRequest(ready=ready))

        def read() -> None:
            try:
                for response in call:
                    news.put(response)
            except grpc.RpcError as error:
                if self._watch is call:
                    self.watch_error = error
            news.put(None)

        threading.Thread(target=read, daemon=True).start()
        if old is not None:
            old.cancel()

    def until_refused(self) -> str:
        """Wait for the end of the watch stream; the reason it was refused with."""
        while self._news.get(timeout=CALL_SECONDS) is not None:
            pass
        assert self.watch_error is not None
        return reason_of(self.watch_error)

    def unwatch(self) -> None:
        self._watch.cancel()

    def close(self) -> None:
        self.channel.close()

    def until(self, condition: Condition) -> round_pb2.WatchResponse:
        """The first response, from the newest seen on, for which the condition holds."""
        if self.latest is not None and condition(self.latest):
            return self.latest
        while True:
            try:
                response = self._news.get(timeout=CALL_SECONDS)
            except queue.Empty:
                raise AssertionError(f"{self.name} waited in vain; the last news was {self.latest}") from None
            assert response is not None, f"the watch stream of {self.name} ended: {self.watch_error}"
            self.latest = response
            if condition(response):
                return response

    def until_asked(self, step: str, number: int = 0) -> int:
        """Wait until asked in this step, of this round or any; the round's number."""
        return self.until(
            lambda r: r.round.step == step and r.round.asked and number in (0, r.round.number)
        ).round.number

    def until_state(self, state: int, number: int = 0) -> round_pb2.RoundNotice:
        return self.until(lambda r: r.round.state == state and (not number or r.round.number == number)).round

    def answer(self, number: int, step: str, reply: bytes | None = None) -> round_pb2.AnswerResponse:
        return self.stub.Answer(
            round_pb2.AnswerRequest(
                round=number, step=step, reply=f"{step} {self.name}".encode() if reply is None else reply
            ),
            timeout=CALL_SECONDS,
        )

    def perform(self, number: int, step: str) -> None:
        """Do what the step asks for."""
        if step == "upload":
            self.upload(number)
        else:
            self.answer(number, step)

    def header(self) -> BoundHeader:
        assert self.latest is not None
        return BoundHeader.parse(self.latest.round.header)

    def contribution(self) -> bytes:
        """Every field is 2^index: the sum shows who is in it."""
        assert self.owner.plan is not None
        return np.full(field_count(self.owner.plan), 1 << self.index, "<u8").tobytes()

    def digest(self, bulk: bytes) -> bytes:
        size = 8 * FIELDS_PER_FRAME
        digests = [frame_digest(bulk[i : i + size]) for i in range(0, len(bulk), size)]
        return upload_digest(self.header().h0, digests)

    def begin(self, number: int, bulk: bytes, **changes: Any) -> round_pb2.BeginUploadResponse:
        digest = self.digest(bulk)
        values: dict[str, Any] = {
            "round": number,
            "kind": round_pb2.BULK_KIND_CONTRIBUTION,
            "total": len(bulk),
            "digest": digest,
            "reply": b"U" + digest,
        }
        return self.stub.BeginUpload(
            round_pb2.BeginUploadRequest(**{**values, **changes}), timeout=CALL_SECONDS
        )

    def send(self, slot: round_pb2.UploadSlot, bulk: bytes, end: int | None = None) -> int:
        return self.stub.Upload(chunks(slot, bulk, end), timeout=CALL_SECONDS).committed

    def upload(self, number: int, bulk: bytes | None = None) -> None:
        bulk = self.contribution() if bulk is None else bulk
        while True:
            begun = self.begin(number, bulk)
            if begun.WhichOneof("answer") == "slot":
                assert self.send(begun.slot, bulk) == len(bulk)
                return
            if begun.done:
                return

    def download(self, kind: int, number: int, offset: int = 0) -> bytes:
        call = self.stub.Download(
            round_pb2.DownloadRequest(kind=kind, round=number, offset=offset), timeout=CALL_SECONDS
        )
        return b"".join(part.data for part in call)

    def sum(self, number: int) -> set[int]:
        """The distinct values of the published sum's fields."""
        data = self.download(round_pb2.BULK_KIND_SUM, number)
        return {int(value) for value in np.unique(np.frombuffer(data, "<u8"))}

    def survivors(self, number: int) -> tuple[str, ...]:
        result = self.stub.GetResult(round_pb2.GetResultRequest(round=number), timeout=CALL_SECONDS)
        return tuple(msgspec.msgpack.decode(result.result))

    def conclude(self, number: int, state: bytes) -> round_pb2.ConcludeResponse:
        bound = self.header()
        signature = sign_state(
            self.applicant.identity,
            federation=self.owner.federation,
            h1=bound.h0,
            index=bound.header.state_round + 1,
            digest=state,
            survivors=self.survivors(number),
        )
        return self.stub.Conclude(
            round_pb2.ConcludeRequest(round=number, state=state, signature=signature), timeout=CALL_SECONDS
        )

    def refuse_sum(self, number: int, why: str) -> round_pb2.ConcludeResponse:
        signature = self.applicant.identity.sign("refused sum", self.header().h0, why.encode())
        return self.stub.Conclude(
            round_pb2.ConcludeRequest(round=number, refusal=why, signature=signature), timeout=CALL_SECONDS
        )

    def keep_checkpoint(self, number: int, state: bytes, sealed: bytes) -> None:
        begun = self.stub.BeginUpload(
            round_pb2.BeginUploadRequest(
                round=number,
                kind=round_pb2.BULK_KIND_CHECKPOINT,
                total=len(sealed),
                digest=hashlib.sha256(sealed).digest(),
                reply=state,
            ),
            timeout=CALL_SECONDS,
        )
        if begun.WhichOneof("answer") == "slot":
            self.send(begun.slot, sealed)
        else:
            assert begun.done


def chunks(
    slot: round_pb2.UploadSlot, bulk: bytes, end: int | None = None
) -> Iterator[round_pb2.UploadRequest]:
    """The chunks of an upload from the slot's offset on."""
    end = len(bulk) if end is None else end
    for offset in range(slot.offset, end, CHUNK):
        yield round_pb2.UploadRequest(
            upload_id=slot.upload_id, offset=offset, data=bulk[offset : min(end, offset + CHUNK)]
        )


def state_after(number: int) -> bytes:
    """The digest that the scripted members agree on after a round."""
    return hashlib.sha256(f"state after {number}".encode()).digest()


@dataclass
class Scene:
    """A federation that is ready to train."""

    owner: ScriptedOwner
    members: list[ScriptedMember]

    def reconnect(self, enrolment_port: int, member_port: int, ca_pem: bytes) -> None:
        self.owner.connect(enrolment_port, ca_pem)
        for member in self.members:
            member.close()
            member.connect(member_port)

    def close(self) -> None:
        for member in self.members:
            member.close()
        self.owner.channel.close()

    def run_steps(
        self,
        number: int = 0,
        members: list[ScriptedMember] | None = None,
        steps: tuple[str, ...] = ("advertise", "upload", "confirm"),
    ) -> int:
        """Everyone takes part up to the published sum; the round's number."""
        members = members or self.members
        for step in steps:
            for member in members:
                number = member.until_asked(step, number)
                member.perform(number, step)
        for member in members:
            member.until_state(round_pb2.ROUND_STATE_PUBLISHED, number)
        return number

    def conclude(self, number: int) -> None:
        """Everyone signs the next state; whoever is asked keeps its checkpoint."""
        for member in self.members:
            member.conclude(number, state_after(number))
        keeper = self.members[0]
        keeper.until(lambda r: r.round.checkpoint_wanted)
        keeper.keep_checkpoint(number, state_after(number), f"sealed after {number}".encode())
        for member in self.members:
            member.until(lambda r: r.state == state_after(number))


def build_scene(
    enrolment_port: int, member_port: int, ca_pem: bytes, count: int = 3, plan: dict[str, Any] | None = None
) -> Scene:
    """Found a federation, admit `count` members, publish a plan; nobody watches yet."""
    owner = ScriptedOwner(enrolment_port, ca_pem)
    owner.found()
    owner.publish_policy(owner.policy())
    applicants = [Applicant(f"clinic-{i}") for i in range(count)]
    requests = [owner.join(applicant) for applicant in applicants]
    owner.publish_roster([applicant.name for applicant in applicants])
    members = []
    for index, (applicant, request) in enumerate(zip(applicants, requests, strict=True)):
        answer = owner.poll(request)
        assert answer.state == enrolment_pb2.JOIN_STATE_ADMITTED
        members.append(ScriptedMember(owner, applicant, answer.certificate, member_port, index))
    owner.publish_plan(owner.make_plan(**(plan or {})))
    return Scene(owner, members)


Serve = Callable[..., ServerHandle]
Stage = Callable[..., Scene]
