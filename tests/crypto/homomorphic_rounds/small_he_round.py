"""A round of a homomorphic scheme with few members, in one process."""

import hashlib

import numpy as np
from blindsum.crypto.encoding.vector import OpenedSum, VectorDecoder, VectorEncoder, VectorPlan
from blindsum.crypto.primitives.derivation import system_random
from blindsum.crypto.primitives.signing import SigningKey
from blindsum.crypto.schemes.base import MemberKeys, RoundTerms, frame_digest, upload_digest
from blindsum.crypto.schemes.homomorphic.cipher import choose_parameters, generate_keys
from blindsum.crypto.schemes.registry import scheme
from blindsum.crypto.trust.group_key import GroupKey
from blindsum.crypto.trust.header import BoundHeader, Header
from blindsum.crypto.trust.plan import Encoding, Metric
from blindsum.crypto.trust.roster import HeKey, Roster, RosterEntry

MEMBERS = ("ann", "bob", "cid", "dee", "eve")
UPLOADING = MEMBERS[:4]
DIGEST = hashlib.sha256(b"some document").digest()
EXPONENTS = (-2, 0)


class SmallHeRound:
    """Terms, keys, fields and whole rounds of one scheme; `he_keys` are made once."""

    def __init__(self, name: str, number: int = 7, like: "SmallHeRound | None" = None) -> None:
        self.name = name
        self.scheme = scheme(name)
        size = 260 if name == "paillier" else 9_000
        encoding = Encoding(
            bits=16, max_examples=100, metrics=(Metric(name="loss", low=0.0, high=5.0, resolution=1e-3),)
        )
        self.vector = VectorPlan(("body", "bias"), (size, 13), encoding, 6)
        self.parameters = choose_parameters(
            name, 16, 6, length=self.vector.fields // 2 + 1, modulus_bits=2048, minimum_security=112
        )
        self.he_keys = like.he_keys if like else generate_keys(self.parameters)
        self.group_key = GroupKey(bytes([2]) * 32, 1)
        self.identities = {member: SigningKey(hashlib.sha256(member.encode()).digest()) for member in MEMBERS}
        key = HeKey(
            scheme=name, parameters=self.parameters.name, bits=16, n_max=6, digest=self.he_keys.key_id
        )
        roster = Roster(
            federation=DIGEST,
            version=1,
            valid_until=2**33,
            epoch=1,
            group_key=self.group_key.key_id,
            he_keys=(key,),
            members=tuple(
                RosterEntry(
                    id=member, organisation="", identity=self.identities[member].public, hpke=bytes(1216)
                )
                for member in MEMBERS
            ),
        )
        header = Header(
            federation=DIGEST,
            round=number,
            plan_name="chest",
            scheme=name,
            gamma=333,
            delta=333,
            security=80,
            state=DIGEST,
            state_round=0,
            plan=DIGEST,
            roster=DIGEST,
            policy=DIGEST,
            group_key=self.group_key.key_id,
            he_key=key.digest,
            dimension=self.vector.dimension,
            layout=DIGEST,
            bits=16,
            fields=self.vector.fields,
            n_min=3,
            n_max=4,
            deadline=2**33,
        )
        self.terms = RoundTerms(BoundHeader.of(header), roster, self.parameters.name, self.he_keys.public)

    @property
    def h1(self) -> bytes:
        return self.terms.bound.h0

    def keys(self, member: str) -> MemberKeys:
        return MemberKeys(member, self.identities[member], self.group_key, self.he_keys.secret)

    def member(self, name: str):
        return self.scheme.member(self.terms, self.keys(name), system_random)

    def restored(self, name: str, snapshot: bytes):
        return self.scheme.restore_member(self.terms, self.keys(name), snapshot, system_random)

    def fields(self, member: str) -> np.ndarray:
        rng = np.random.default_rng(list(member.encode()))
        update = (rng.standard_normal(self.vector.dimension) * 0.1).astype(np.float32)
        encoder = VectorEncoder(
            self.vector,
            EXPONENTS,
            update,
            examples=int(rng.integers(1, 100)),
            metrics={"loss": 1.25},
            check_key=self.group_key.check_key(self.h1),
            member=member,
            rounding_seed=hashlib.sha256(member.encode()).digest(),
        )
        return encoder.fields(0, self.vector.fields)

    def plain_sum(self, members=UPLOADING) -> np.ndarray:
        return sum((self.fields(member).astype(np.uint64) for member in members), np.zeros(1, np.uint64))

    def upload(self, machine, member: str, aggregator) -> tuple[list[bytes], bytes]:
        """Frames and reply of one member."""
        protector = machine.begin_upload(aggregator.request(member))
        fields = self.fields(member)
        layout = protector.layout
        frames = [
            protector.protect(index, fields[slice(*layout.field_range(index))])
            for index in range(layout.frames)
        ]
        digest = upload_digest(protector.h1, map(frame_digest, frames))
        return frames, machine.seal_upload(digest)

    def run(self, members=UPLOADING, change=None):
        """A whole round up to the published sum; `change` edits each member's frames on the server."""
        aggregator = self.scheme.aggregator(self.terms)
        machines = {member: self.member(member) for member in MEMBERS}
        arithmetic = aggregator.arithmetic()
        totals: list[bytearray | None] = [None] * aggregator.layout.frames
        for member in members:
            frames, reply = self.upload(machines[member], member, aggregator)
            assert aggregator.expected_digest(reply) == upload_digest(
                aggregator.h1, map(frame_digest, frames)
            )
            assert aggregator.accept(member, reply)
            times = change(member) if change else 1
            for _ in range(times):
                for index, frame in enumerate(frames):
                    arithmetic.check(index, frame)
                    totals[index] = arithmetic.add(index, totals[index], frame)
        aggregator.close()
        published = [aggregator.finish_frame(index, total) for index, total in enumerate(totals)]
        return aggregator, machines, published

    def open(self, machine, result: bytes, published: list[bytes]) -> tuple[OpenedSum, float]:
        opener = machine.open_sum(result)
        decoder = VectorDecoder(self.vector, EXPONENTS, check_key=self.group_key.check_key(opener.h1))
        for index, frame in enumerate(published):
            decoder.absorb(opener.layout.field_range(index)[0], opener.open(index, frame))
        return decoder.finish(opener.survivors), opener.max_error
