"""A federation of a few members, for the tests of trust."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import msgspec
import numpy as np
from blindsum.crypto.encoding.layout import Layout
from blindsum.crypto.encoding.vector import OpenedSum, VectorDecoder, VectorEncoder, VectorPlan, field_count
from blindsum.crypto.primitives.sealing import HpkeKey
from blindsum.crypto.primitives.signing import SigningKey
from blindsum.crypto.trust.documents import document_digest, sign_document
from blindsum.crypto.trust.group_key import GroupKey
from blindsum.crypto.trust.header import NO_KEY, BoundHeader, Header
from blindsum.crypto.trust.plan import Encoding, Plan
from blindsum.crypto.trust.policy import Policy
from blindsum.crypto.trust.roster import Roster, RosterEntry
from blindsum.crypto.trust.round_check import Pinned
from blindsum.crypto.trust.strategy import Strategy
from blindsum.crypto.trust.training_state import TrainingState

NOW = 1_800_000_000
FEDERATION = hashlib.sha256(b"a federation").digest()
MEMBERS = ("ann", "bob", "cid", "dee", "eve")


def replaced(document, **changes):
    return msgspec.structs.replace(document, **changes)


@dataclass(frozen=True)
class SmallFederation:
    """Owner, members, documents and a first state; everything derives from fixed bytes."""

    strategy: str = "fedavg"

    owner = SigningKey(bytes([1]) * 32)
    group_key = GroupKey(bytes([2]) * 32, 1)

    @cached_property
    def identities(self) -> dict[str, SigningKey]:
        return {name: SigningKey(hashlib.sha256(name.encode()).digest()) for name in MEMBERS}

    @cached_property
    def hpke(self) -> dict[str, HpkeKey]:
        return {name: HpkeKey(hashlib.sha512(name.encode()).digest() + bytes([7]) * 32) for name in MEMBERS}

    @cached_property
    def policy(self) -> Policy:
        return Policy(
            federation=FEDERATION,
            version=2,
            valid_until=NOW + 1000,
            schemes=("masking", "bfv", "paillier"),
            n_min=3,
            n_max=8,
        )

    @cached_property
    def roster(self) -> Roster:
        return Roster(
            federation=FEDERATION,
            version=3,
            valid_until=NOW + 1000,
            epoch=1,
            group_key=self.group_key.key_id,
            he_keys=(),
            members=tuple(
                RosterEntry(
                    id=name,
                    organisation="",
                    identity=self.identities[name].public,
                    hpke=self.hpke[name].public,
                )
                for name in MEMBERS
            ),
        )

    @cached_property
    def layout(self) -> Layout:
        return Layout.of({"body": np.zeros((3, 4), np.float32), "bias": np.zeros(5, np.float32)})

    @cached_property
    def state(self) -> TrainingState:
        tensors = {
            "body": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
            "bias": np.full(5, -0.0, np.float32),
        }
        return TrainingState.initial(
            FEDERATION, self.layout, tensors, strategy=Strategy.parse(self.strategy, {}), exponents=(-2, 0)
        )

    @cached_property
    def plan(self) -> Plan:
        return Plan(
            federation=FEDERATION,
            name="chest",
            version=1,
            policy=document_digest("policy", sign_document(self.owner, "policy", self.policy).body),
            scheme="masking",
            rounds=4,
            initial_state=self.state.digest(self.group_key),
            layout=self.layout.digest(self.group_key),
            dimension=self.layout.dimension,
            tensors=2,
            cohort_min=3,
            cohort_wanted=4,
            cohort_max=8,
            encoding=Encoding(bits=16, max_examples=100),
            first_round=10,
            strategy=self.strategy,
        )

    def digest(self, kind: str, document) -> bytes:
        return sign_document(self.owner, kind, document).digest

    @cached_property
    def roster_digest(self) -> bytes:
        return self.digest("roster", self.roster)

    @cached_property
    def header(self) -> Header:
        return Header(
            federation=FEDERATION,
            round=12,
            plan_name="chest",
            scheme="masking",
            gamma=333,
            delta=333,
            security=80,
            state=self.plan.initial_state,
            state_round=0,
            plan=self.digest("plan", self.plan),
            roster=self.roster_digest,
            policy=self.plan.policy,
            group_key=self.group_key.key_id,
            he_key=NO_KEY,
            dimension=self.plan.dimension,
            layout=self.plan.layout,
            bits=16,
            fields=field_count(self.plan),
            n_min=3,
            n_max=8,
            deadline=NOW + 60,
        )

    @cached_property
    def bound(self) -> BoundHeader:
        return BoundHeader.of(self.header)

    @cached_property
    def pinned(self) -> Pinned:
        return Pinned(
            member="bob",
            policy=self.policy,
            policy_digest=self.plan.policy,
            plan=self.plan,
            plan_digest=self.header.plan,
            roster=self.roster,
            roster_digest=self.roster_digest,
            group_key_id=self.group_key.key_id,
            state_index=0,
            state_digest=self.plan.initial_state,
            exponents=self.state.exponents,
            last_round=11,
            last_h0=bytes(32),
        )

    def header_with(self, **changes) -> BoundHeader:
        return BoundHeader.of(replaced(self.header, **changes))

    def pinned_with(self, **changes) -> Pinned:
        return replace(self.pinned, **changes)

    def opened(self, survivors=MEMBERS, scale: float = 0.1, state: TrainingState | None = None) -> OpenedSum:
        """The opened sum of a round in which every survivor sends its own update."""
        state = state or self.state
        vector = VectorPlan.of(self.plan, self.layout)
        key = self.group_key.check_key(self.bound.h0)
        total = np.zeros(vector.fields, np.uint64)
        for name in survivors:
            rng = np.random.default_rng(list(name.encode()))
            update = (rng.standard_normal(vector.dimension) * scale).astype(np.float32)
            encoder = VectorEncoder(
                vector,
                state.exponents,
                update,
                examples=40,
                metrics={},
                check_key=key,
                member=name,
                rounding_seed=hashlib.sha256(name.encode()).digest(),
            )
            total += encoder.fields(0, vector.fields)
        decoder = VectorDecoder(vector, state.exponents, check_key=key)
        decoder.absorb(0, total)
        return decoder.finish(survivors)
