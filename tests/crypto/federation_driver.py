"""A whole federation in one process, for any scheme: the machines of schemes/base.py and nothing else.

`RoundDriver` plays the honest service and the honest SDK. It keeps the accepted replies and closes in
order, so that the aggregator can be rebuilt from them at any point, and takes members through snapshot
and restore when told to. Tests reach into single steps to lie.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from blindsum.crypto.primitives.derivation import Random
from blindsum.crypto.primitives.signing import SigningKey
from blindsum.crypto.schemes.base import (
    AggregatorRound,
    Complaint,
    Fields,
    FrameProtector,
    MemberKeys,
    MemberRound,
    RoundTerms,
    Scheme,
    StepName,
    frame_digest,
    upload_digest,
)
from blindsum.crypto.trust.group_key import GroupKey
from blindsum.crypto.trust.header import NO_KEY, BoundHeader, Header
from blindsum.crypto.trust.policy import SchemeName
from blindsum.crypto.trust.roster import Roster, RosterEntry
from numpy.typing import NDArray

Inputs = Mapping[str, Fields]


def seeded(seed: str) -> Random:
    """A generator for tests: SHAKE-256 of a seed, read on and on."""
    position = 0

    def read(count: int) -> bytes:
        nonlocal position
        position += 1
        return hashlib.shake_256(f"{seed}/{position}".encode()).digest(count)

    return read


@dataclass(frozen=True)
class Federation:
    """A scheme, a round's terms, and every member's keys."""

    scheme: Scheme
    terms: RoundTerms
    keys: dict[str, MemberKeys]

    @property
    def header(self) -> Header:
        return self.terms.bound.header

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(self.keys)

    def with_header(self, **changes: object) -> "Federation":
        """The same federation in a round whose header differs."""
        header = Header(
            **{**{name: getattr(self.header, name) for name in Header.__struct_fields__}, **changes}
        )
        return replace(self, terms=replace(self.terms, bound=BoundHeader.of(header)))


def make_federation(
    scheme: Scheme,
    size: int,
    *,
    fields: int = 10,
    bits: int = 16,
    n_min: int = 3,
    n_max: int = 16,
    gamma: int = 333,
    delta: int = 333,
    security: int = 80,
    number: int = 1,
    he_key: bytes = NO_KEY,
    he_parameters: str = "",
    he_public: bytes = b"",
    he_secret: bytes = b"",
) -> Federation:
    """`size` members m0000, m0001, ... under one roster, and the terms of round `number`."""
    group_key = GroupKey(hashlib.sha256(b"group key").digest(), 1)
    names = [f"m{index:04d}" for index in range(size)]
    identities = {name: SigningKey.generate(seeded(f"identity {name}")) for name in names}
    federation_id = hashlib.sha256(b"federation").digest()
    roster = Roster(
        federation=federation_id,
        version=1,
        valid_until=2_000_000_000,
        epoch=1,
        group_key=group_key.key_id,
        he_keys=(),
        members=tuple(
            RosterEntry(id=name, organisation="", identity=identities[name].public, hpke=bytes(1216))
            for name in names
        ),
    )
    scheme_name: SchemeName = scheme.name  # type: ignore[assignment]
    blank = bytes(32)
    header = Header(
        federation=federation_id,
        round=number,
        plan_name="test",
        scheme=scheme_name,
        gamma=gamma,
        delta=delta,
        security=security,  # type: ignore[arg-type]
        state=blank,
        state_round=number - 1,
        plan=blank,
        roster=blank,
        policy=blank,
        group_key=group_key.key_id,
        he_key=he_key,
        dimension=fields,
        layout=blank,
        bits=bits,
        fields=fields,
        n_min=n_min,
        n_max=n_max,
        deadline=1_900_000_000,
    )
    keys = {name: MemberKeys(name, identities[name], group_key, he_secret) for name in names}
    return Federation(scheme, RoundTerms(BoundHeader.of(header), roster, he_parameters, he_public), keys)


def powers_of_two(federation: Federation) -> dict[str, NDArray[np.uint64]]:
    """Inputs whose sum shows who was counted, and how often: a bit of its own for each member.

    Member i has bit i % bits in fields i // bits, i // bits + stride, ... and nothing elsewhere.
    """
    bits, fields = federation.header.bits, federation.header.fields
    stride = -(-len(federation.members) // bits)
    assert fields >= stride, "too few fields to tell so many members apart"
    inputs = {}
    for index, name in enumerate(federation.members):
        values = np.zeros(fields, dtype=np.uint64)
        values[index // bits :: stride] = 1 << (index % bits)
        inputs[name] = values
    return inputs


def plain_sum(inputs: Inputs, survivors: Collection[str]) -> NDArray[np.uint64]:
    """What an exact scheme must open to."""
    total: NDArray[np.uint64] = np.sum([inputs[name] for name in survivors], axis=0, dtype=np.uint64)
    return total


@dataclass
class RoundDriver:
    """One round of a federation.

    `restore`: take every member through snapshot and restore after each of its actions, and rebuild the
    aggregator from its accepted replies after each accept and close.
    """

    federation: Federation
    inputs: Inputs
    exclude: frozenset[str] = frozenset()
    restore: bool = False
    seed: str = "round"
    machines: dict[str, MemberRound] = field(init=False, default_factory=dict)
    aggregator: AggregatorRound = field(init=False)
    history: list[tuple[str, bytes] | None] = field(init=False, default_factory=list)
    uploads: dict[str, list[bytes]] = field(init=False, default_factory=dict)
    totals: list[bytearray | None] = field(init=False)
    tamper: Callable[[str, int, bytes], bytes] | None = None

    def __post_init__(self) -> None:
        self.aggregator = self.federation.scheme.aggregator(self.federation.terms, self.exclude)
        self.totals = [None] * self.aggregator.layout.frames
        for name in self.aggregator.participants:
            self.machines[name] = self.federation.scheme.member(
                self.federation.terms, self.federation.keys[name], seeded(f"{self.seed} {name}")
            )

    # -- members -------------------------------------------------------------------------------------

    def restored(self, name: str) -> MemberRound:
        """The member's machine as another process would restore it."""
        return self.federation.scheme.restore_member(
            self.federation.terms,
            self.federation.keys[name],
            self.machines[name].snapshot(),
            seeded(f"{self.seed} {name} restored"),
        )

    def _settle(self, name: str) -> None:
        if self.restore:
            self.machines[name] = self.restored(name)

    def answer(self, name: str) -> bytes:
        """The member's reply to the open step, whatever that is; an upload's frames are kept."""
        step = self.aggregator.step
        assert step is not None
        request = self.aggregator.request(name)
        if step != "upload":
            reply = self.machines[name].answer(step, request)
        else:
            started = self.machines[name].begin_upload(request)
            if isinstance(started, Complaint):
                self._settle(name)
                return started.reply
            frames = self.protect(started, name)
            self._settle(name)
            digest = upload_digest(started.h1, map(frame_digest, frames))
            reply = self.machines[name].seal_upload(digest)
        self._settle(name)
        return reply

    def protect(self, protector: FrameProtector, name: str) -> list[bytes]:
        """All frames of a member's upload, made in reverse order because any order must do."""
        layout, values = protector.layout, self.inputs[name]
        frames: dict[int, bytes] = {}
        for index in reversed(range(layout.frames)):
            start, end = layout.field_range(index)
            frames[index] = protector.protect(index, values[start:end])
            assert len(frames[index]) == layout.upload_bytes(index)
        self.uploads[name] = [frames[index] for index in range(layout.frames)]
        return self.uploads[name]

    # -- the aggregator ------------------------------------------------------------------------------

    def deliver(self, name: str, reply: bytes) -> bool:
        """Hand a reply to the aggregator, with its bulk where it has some."""
        aggregator = self.aggregator
        if aggregator.check_reply(name, reply):
            frames = self.uploads[name]
            digest = upload_digest(aggregator.h1, map(frame_digest, frames))
            assert aggregator.expected_digest(reply) == digest
            arithmetic = aggregator.arithmetic()
            for index, frame in enumerate(frames):
                sent = self.tamper(name, index, frame) if self.tamper else frame
                arithmetic.check(index, sent)
                self.totals[index] = arithmetic.add(index, self.totals[index], sent)
        new = aggregator.accept(name, reply)
        if new:
            self.history.append((name, reply))
            if self.restore:
                self.aggregator = self.replayed()
        return new

    def close(self) -> None:
        """Close the open step."""
        self.aggregator.close()
        self.history.append(None)
        if self.restore:
            self.aggregator = self.replayed()

    def replayed(self) -> AggregatorRound:
        """The aggregator rebuilt from its accepted replies and closes."""
        machine = self.federation.scheme.aggregator(self.federation.terms, self.exclude)
        for event in self.history:
            if event is None:
                machine.close()
            else:
                assert machine.accept(*event)
        return machine

    def step(self, absent: Collection[str] = ()) -> None:
        """Play the open step with everyone but `absent`, and close it."""
        for name in self.aggregator.participants:
            if name not in absent and self.aggregator.step is not None:
                self.deliver(name, self.answer(name))
        if self.aggregator.step is not None:
            self.close()

    def run(
        self, drop: Mapping[StepName, Collection[str]] | None = None, until: StepName | None = None
    ) -> None:
        """Play the round, or up to the step `until`. Who drops at a step is absent from then on."""
        gone: set[str] = set()
        while self.aggregator.step is not None and self.aggregator.step != until:
            gone |= set((drop or {}).get(self.aggregator.step, ()))
            self.step(gone)

    # -- the end -------------------------------------------------------------------------------------

    def published(self) -> list[bytes]:
        """The frames of the published sum."""
        frames = []
        for index in reversed(range(self.aggregator.layout.frames)):
            total = self.totals[index]
            assert total is not None
            frames.append(self.aggregator.finish_frame(index, total))
        return frames[::-1]

    def opened(self, name: str) -> NDArray[np.uint64]:
        """The sum as one member opens it."""
        opener = self.machines[name].open_sum(self.aggregator.result())
        assert opener.survivors == self.aggregator.survivors
        frames = self.published()
        return np.concatenate([opener.open(index, frame) for index, frame in enumerate(frames)])
