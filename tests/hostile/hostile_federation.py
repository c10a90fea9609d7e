"""A federation of honest and hostile members under one HE key, on a real server in its own process.

Hostile members are admitted like the others: certificate, identity key, the owner's HE key. They sign what
they send, so that it gets as far as bytes can.
"""

import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import grpc
import numpy as np
from blindsum.crypto.canonical import encode_message
from blindsum.crypto.encoding.vector import VectorDecoder, VectorEncoder, VectorPlan
from blindsum.crypto.errors import BlindsumError, Refused
from blindsum.crypto.primitives.derivation import system_random
from blindsum.crypto.schemes.base import MemberKeys, RoundTerms, frame_digest, upload_digest
from blindsum.crypto.schemes.homomorphic.cipher import (
    CipherParameters,
    KeyPair,
    MemberCipher,
    aggregator_cipher,
    choose_parameters,
    generate_keys,
    member_cipher,
    restore_parameters,
)
from blindsum.crypto.schemes.homomorphic.rounds import SignedUpload
from blindsum.crypto.schemes.registry import scheme
from blindsum.crypto.trust.envelope import seal_he_key
from blindsum.crypto.trust.plan import Plan
from blindsum.crypto.trust.roster import HeKey
from blindsum.proto.v1 import enrolment_pb2, round_pb2
from he_mutations import mutate
from scripted_federation import (
    CALL_SECONDS,
    Applicant,
    ScriptedMember,
    ScriptedOwner,
    chunks,
    reason_of,
)
from server_process import ServerProcess

EXPONENTS = (-2, 0)
N_MAX = 12
FIELDS = {"bfv": 12_000, "ckks": 6_000, "paillier": 500}
ACCEPTED = "accepted"


@dataclass
class Attempt:
    """One hostile upload: its frames, what our own parser says of it here, and what the server said."""

    frames: list[bytes]
    expected: str
    lie: bool = False
    """The signed digest is another upload's."""
    outcome: str = ""
    at_parser: bool = False
    """A frame of it was complete at the server."""


class HeMember(ScriptedMember):
    """A member that does what the SDK does, with its upload in its hands."""

    federation: "HeFederation"

    def start(self, number: int) -> None:
        """Make this round's upload."""
        fed, header = self.federation, self.header()
        assert self.owner.roster is not None
        terms = RoundTerms(header, self.owner.roster, fed.key.parameters, fed.pair.public)
        keys = MemberKeys(self.name, self.applicant.identity, self.owner.group_key, fed.pair.secret)
        self.terms = terms
        self.machine = cast(Any, scheme(fed.name).member(terms, keys, system_random))
        self.machine._cipher = fed.cipher  # paillier's table of powers is made once
        request = self.stub.GetStep(
            round_pb2.GetStepRequest(round=number, step="upload"), timeout=CALL_SECONDS
        ).request
        self.protector = self.machine.begin_upload(request)
        encoder = VectorEncoder(
            fed.vector,
            EXPONENTS,
            np.full(fed.vector.dimension, (self.index - 4) / 64, np.float32),
            examples=1,
            metrics={},
            check_key=self.owner.group_key.check_key(header.h0),
            member=self.name,
            rounding_seed=hashlib.sha256(self.name.encode()).digest(),
        )
        self.fields = encoder.fields(0, fed.vector.fields)
        layout = self.protector.layout
        self.frames = [
            self.protector.protect(i, self.fields[slice(*layout.field_range(i))])
            for i in range(layout.frames)
        ]
        self.sent = self.frames

    def digest_of(self, frames: list[bytes]) -> bytes:
        return upload_digest(self.header().h0, map(frame_digest, frames))

    def signed(self, digest: bytes) -> bytes:
        """An upload reply for that digest, as any member can sign it."""
        h1 = self.header().h0
        signature = self.applicant.identity.sign("he upload", h1, self.name.encode(), digest)
        return encode_message(SignedUpload(self.name, h1, digest, signature))

    def offer(self, number: int, frames: list[bytes], digest: bytes = b"", total: int = 0) -> str:
        """Send an upload; 'accepted', or the reason of the refusal. `total` is what is announced."""
        bulk = b"".join(frames)
        digest = digest or self.digest_of(frames)
        total = total or len(bulk)
        self.at_parser = False
        while True:
            reason = self._offer_once(number, bulk, digest, total)
            if reason == "retry":
                continue
            if reason != "wrong_size" or len(bulk) == total:
                return reason
            # The stream ended early, or went too far; from there it may go on, and does.
            bulk = bulk[:total].ljust(total, b"\0")

    def _offer_once(self, number: int, bulk: bytes, digest: bytes, total: int) -> str:
        try:
            begun = self.begin(number, bulk, digest=digest, reply=self.signed(digest), total=total)
            answer = begun.WhichOneof("answer")
            if answer == "slot":
                self.at_parser = self.at_parser or len(bulk) >= len(self.frames[0])
                self.stub.Upload(chunks(begun.slot, bulk), timeout=CALL_SECONDS)
            return "retry" if answer == "retry_after_ms" else ACCEPTED
        except grpc.RpcError as error:
            reason: str = reason_of(error)
            if not reason:
                raise
            return reason

    def open(self, number: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """The opened sum's fields. Raises what an SDK's member would: nothing is output then."""
        fed = self.federation
        result = self.stub.GetResult(round_pb2.GetResultRequest(round=number), timeout=CALL_SECONDS).result
        opener = self.machine.open_sum(result)
        data = self.download(round_pb2.BULK_KIND_SUM, number)
        decoder = VectorDecoder(fed.vector, EXPONENTS, check_key=self.owner.group_key.check_key(opener.h1))
        opened, size = [], opener.layout.result_frame
        for index in range(opener.layout.frames):
            fields = opener.open(index, data[index * size : (index + 1) * size])
            decoder.absorb(opener.layout.field_range(index)[0], fields)
            opened.append(fields)
        decoder.finish(opener.survivors)
        return np.concatenate(opened)

    def upload_honestly(self, number: int) -> None:
        assert self.machine.seal_upload(self.digest_of(self.frames))
        assert self.offer(number, self.frames) == ACCEPTED


@dataclass
class HeFederation:
    """Honest members first, then hostile ones."""

    name: str
    owner: ScriptedOwner
    pair: KeyPair
    key: HeKey
    vector: VectorPlan
    members: list[HeMember] = field(default_factory=list)
    honest_count: int = 3
    number: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    attempts: int = 0
    at_parser: int = 0
    past_parser: int = 0
    added: int = 0
    openings: Counter[str] = field(default_factory=Counter)

    @property
    def honest(self) -> list[HeMember]:
        return self.members[: self.honest_count]

    @property
    def hostile(self) -> list[HeMember]:
        return self.members[self.honest_count :]

    @cached_property
    def parameters(self) -> CipherParameters:
        return restore_parameters(self.key.parameters, self.key.bits, self.key.n_max, minimum_security=112)

    @cached_property
    def cipher(self) -> MemberCipher:
        return member_cipher(self.parameters, self.pair.public, self.pair.secret)

    def connect(self, enrolment_port: int, member_port: int, ca_pem: bytes) -> None:
        """Connect everyone again, to a server that came back."""
        self.owner.connect(enrolment_port, ca_pem)
        for member in self.members:
            member.close()
            member.connect(member_port)
            member.watch()

    def open_round(self) -> int:
        """Wait for a new round and let everyone make an upload; its number."""
        before = self.number
        found = self.members[0].until(
            lambda r: r.round.step == "upload" and r.round.asked and r.round.number > before
        )
        self.number = found.round.number
        for member in self.members:
            member.until_asked("upload", self.number)
            member.start(self.number)
        return self.number

    def close_round(self) -> None:
        """Everyone opens the published sum, compares, and asks for another round from the same state."""
        number = self.number
        for member in self.members:
            member.until_state(round_pb2.ROUND_STATE_PUBLISHED, number)
        self._check_sum()
        for member in self.members:
            member.refuse_sum(number, "the test goes on")
        for member in self.members:
            member.until(lambda r: r.round.state == round_pb2.ROUND_STATE_ABORTED or r.round.number > number)

    def _check_sum(self) -> None:
        """Bit for bit the sum of what was counted; members open it to the right fields or to nothing."""
        machine = scheme(self.name).aggregator(self.honest[0].terms)
        arithmetic, layout = machine.arithmetic(), machine.layout
        cipher = aggregator_cipher(self.parameters, self.pair.public)
        published = self.honest[0].download(round_pb2.BULK_KIND_SUM, self.number)
        for index in range(layout.frames):
            total = None
            for member in self.members:
                total = arithmetic.add(index, total, member.sent[index])
            assert total is not None
            at = index * layout.result_frame
            assert published[at : at + layout.result_frame] == cipher.finish(total)
        right = sum(member.fields.astype(np.uint64) for member in self.members)
        poisoned = any(member.sent is not member.frames for member in self.members)
        for member in self.honest:
            try:
                opened = member.open(self.number)
            except BlindsumError as error:
                if not poisoned:
                    raise
                self.openings[type(error).__name__] += 1
            else:
                assert np.array_equal(opened, right)
                self.openings["opened"] += 1

    # Attacks

    def attack(self, member: HeMember, generator: np.random.Generator) -> Attempt:
        """A mutation of the member's own upload."""
        frames = list(member.frames)
        at = int(generator.integers(0, len(frames)))
        other = frames[at - 1]
        frames[at] = mutate(self.parameters, frames[at], other, generator, result=False)
        return Attempt(frames, self.verdict(member, frames))

    def verdict(self, member: HeMember, frames: list[bytes]) -> str:
        """What our own parser says here."""
        arithmetic = scheme(self.name).aggregator(member.terms).arithmetic()
        sizes = member.protector.layout
        if len(b"".join(frames)) != sizes.upload_total:
            return "wrong_size"
        for index, frame in enumerate(frames):
            try:
                arithmetic.check(index, frame)
            except Refused as refusal:
                return refusal.reason.value
        return ACCEPTED

    def send(self, member: HeMember, attempt: Attempt, generator: np.random.Generator) -> None:
        """Send it, and compare the server's answer with the verdict."""
        total = member.protector.layout.upload_total
        digest = member.digest_of(attempt.frames)
        announced = total
        if attempt.expected == "wrong_size":
            # Half of them say so, the others stream another length than they announced.
            announced = sum(map(len, attempt.frames)) if generator.random() < 0.5 else total
        if attempt.lie:
            digest = hashlib.sha256(digest).digest()
        attempt.outcome = member.offer(self.number, attempt.frames, digest, announced)
        attempt.at_parser = member.at_parser
        self.note(attempt)
        if attempt.lie:
            assert attempt.outcome == "wrong_digest"
        elif attempt.expected != "wrong_size":
            assert attempt.outcome == attempt.expected
        else:
            # What is cut or filled up to the right length is refused for what it then is.
            assert attempt.outcome != ACCEPTED

    def note(self, attempt: Attempt) -> None:
        self.attempts += 1
        self.outcomes[attempt.outcome] += 1
        self.at_parser += attempt.at_parser
        self.past_parser += attempt.expected == ACCEPTED
        self.added += attempt.outcome == ACCEPTED

    def clean_round(self, each: int, seed: int) -> None:
        """Every hostile member sends `each` uploads that must be refused, then a good one."""
        self.open_round()

        def assault(member: HeMember) -> None:
            generator = np.random.default_rng([seed, self.number, member.index])
            for _ in range(each):
                attempt = self.attack(member, generator)
                attempt.lie = attempt.expected == ACCEPTED
                self.send(member, attempt, generator)
            member.upload_honestly(self.number)

        self._everyone(assault)
        self.close_round()

    def poisoned_round(self, seed: int) -> None:
        """Every hostile member sends mutations until one is valid ciphertext, and counts."""
        self.open_round()

        def assault(member: HeMember) -> None:
            generator = np.random.default_rng([seed, self.number, member.index])
            while True:
                attempt = self.attack(member, generator)
                self.send(member, attempt, generator)
                if attempt.outcome == ACCEPTED:
                    member.sent = attempt.frames
                    return

        self._everyone(assault)
        self.close_round()

    def _everyone(self, assault: Any) -> None:
        """The hostile members attack while the honest ones upload."""
        with ThreadPoolExecutor(len(self.members)) as threads:
            work = [threads.submit(assault, member) for member in self.hostile]
            work += [threads.submit(member.upload_honestly, self.number) for member in self.honest]
            for done in work:
                done.result()

    def close(self) -> None:
        for member in self.members:
            member.close()
        self.owner.channel.close()


def build_he_federation(process: ServerProcess, name: str, hostile: int, honest: int = 3) -> HeFederation:
    """Found it, make the key, admit everyone, publish a plan; all watch."""
    enrolment_port, member_port, ca_pem = process.start()
    owner = ScriptedOwner(enrolment_port, ca_pem)
    owner.found()
    owner.publish_policy(owner.policy(schemes=(name,), n_max=N_MAX, paillier_bits=2048))
    applicants = [Applicant(f"clinic-{i:02}") for i in range(honest + hostile)]
    requests = [owner.join(applicant) for applicant in applicants]
    names = [applicant.name for applicant in applicants]
    fields = FIELDS[name]
    parameters = choose_parameters(
        name, 16, N_MAX, length=fields // 2 + 1, modulus_bits=2048, minimum_security=112
    )
    pair = generate_keys(parameters)
    key = HeKey(scheme=name, parameters=parameters.name, bits=16, n_max=N_MAX, digest=pair.key_id)
    document, envelopes = owner.make_roster(names, he_keys=(key,))
    assert owner.roster is not None
    envelopes += [
        seal_he_key(owner.key, name, pair.secret, owner.roster, owner.roster_digest, member).to_bytes()
        for member in names
    ]
    owner.publish([document], envelopes, [pair.public])
    plan: Plan = owner.make_plan(
        scheme=name, dimension=fields, tensors=2, cohort_wanted=len(names), cohort_max=N_MAX
    )
    federation = HeFederation(
        name, owner, pair, key, VectorPlan(("body", "bias"), (fields - 13, 13), plan.encoding, N_MAX)
    )
    federation.honest_count = honest
    for index, (applicant, request) in enumerate(zip(applicants, requests, strict=True)):
        answer = owner.poll(request)
        assert answer.state == enrolment_pb2.JOIN_STATE_ADMITTED
        member = HeMember(owner, applicant, answer.certificate, member_port, index)
        member.federation = federation
        federation.members.append(member)
    owner.publish_plan(plan)
    for member in federation.members:
        member.watch()
    return federation
