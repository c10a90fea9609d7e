"""The one interface of every scheme (architecture.md, "The scheme interface").

A round is a list of steps. In a step the aggregator has a request for each participant and wants one
reply from each; a step closes when all have replied, or at its deadline with a quorum, or the round
aborts with a reason. Exactly one step, `upload`, also carries bulk: a stream of frames.

A scheme is two state machines. Each is a pure function of (state, incoming bytes, injected
randomness): the caller owns sockets, files, clocks, threads and memory.

- A `MemberRound` answers requests. Its `snapshot` restores it in another process at every step.
- An `AggregatorRound` collects replies. It draws no randomness, so the accepted replies in order,
  with the closes between them, *are* its state: `Scheme.aggregator` plus a replay restores it.

Bulk: the vector of a round is one flat sequence of `header.fields` integer fields, each within
[0, 2^bits - 1] at a member. It is cut into frames of `fields_per_frame` fields (the last may be
shorter); frame i becomes exactly `upload_bytes(i)` bytes at a member, the running sum of frame i
exactly `sum_bytes(i)` bytes at the aggregator, the published sum `result_bytes(i)`. Frames are independent:
`FrameProtector.protect`, `FrameArithmetic.add`, `AggregatorRound.finish_frame` and `SumOpener.open`
may run on any thread, in any order, each frame once.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from blindsum.crypto.primitives.derivation import Random, labelled_hash
from blindsum.crypto.primitives.signing import SigningKey
from blindsum.crypto.trust.group_key import GroupKey
from blindsum.crypto.trust.header import BoundHeader
from blindsum.crypto.trust.roster import Roster
from numpy.typing import NDArray

StepName = Literal["advertise", "share", "upload", "confirm", "reveal"]

Fields = NDArray[np.uint32] | NDArray[np.uint64]
SummedFields = NDArray[np.uint64]


@dataclass(frozen=True)
class RoundTerms:
    """What both sides know of a round: the bound header, the roster it names, and the HE public key.

    `he_public` is the scheme's public key material, already checked against `header.he_key`; empty
    for masking. `he_parameters` is the parameter set's name from the roster, empty for masking.
    """

    bound: BoundHeader
    roster: Roster
    he_parameters: str = ""
    he_public: bytes = b""


@dataclass(frozen=True, repr=False)
class MemberKeys:
    """What one member holds: its name, identity key, the group key, and the HE secret key if any."""

    member: str
    identity: SigningKey
    group_key: GroupKey
    he_secret: bytes = b""


@dataclass(frozen=True)
class BulkLayout:
    """Exact sizes of the bulk step, known from the header before the first byte.

    All frames but the last hold `fields_per_frame` fields and have the same sizes; the last one holds
    the rest and has its own sizes (equal to the others' where a scheme pads).
    """

    fields: int
    fields_per_frame: int
    upload_frame: int
    upload_last: int
    sum_frame: int
    sum_last: int
    result_frame: int
    result_last: int

    @property
    def frames(self) -> int:
        """Number of frames."""
        return -(-self.fields // self.fields_per_frame)

    def field_range(self, index: int) -> tuple[int, int]:
        """First and one past the last field of frame `index`."""
        start = index * self.fields_per_frame
        return start, min(start + self.fields_per_frame, self.fields)

    def upload_bytes(self, index: int) -> int:
        """Bytes of frame `index` in an upload."""
        return self.upload_last if index == self.frames - 1 else self.upload_frame

    def sum_bytes(self, index: int) -> int:
        """Bytes of frame `index` in the running sum."""
        return self.sum_last if index == self.frames - 1 else self.sum_frame

    def result_bytes(self, index: int) -> int:
        """Bytes of frame `index` in the published sum."""
        return self.result_last if index == self.frames - 1 else self.result_frame

    @property
    def upload_total(self) -> int:
        """Bytes of a whole upload: exact, the same for every member."""
        return (self.frames - 1) * self.upload_frame + self.upload_last

    @property
    def sum_total(self) -> int:
        """Bytes of the whole running sum."""
        return (self.frames - 1) * self.sum_frame + self.sum_last

    @property
    def result_total(self) -> int:
        """Bytes of the whole published sum."""
        return (self.frames - 1) * self.result_frame + self.result_last


def frame_digest(frame: bytes | bytearray | memoryview) -> bytes:
    """SHA-256 of one frame's bytes: 32 bytes."""
    return hashlib.sha256(frame).digest()


def upload_digest(h1: bytes, digests: Iterable[bytes]) -> bytes:
    """The digest of a bulk stream under a round: over h1 and its frames' digests in order."""
    return labelled_hash("upload digest", h1, b"".join(digests))


class FrameProtector(Protocol):
    """A member's bulk step: turns fields into what may be sent, frame by frame, on any thread."""

    layout: BulkLayout
    h1: bytes

    def protect(self, index: int, fields: Fields) -> bytes:
        """Frame `index` of the upload: `layout.upload_bytes(index)` bytes.

        Raises `EncodingError` for a wrong count or a value above 2^bits - 1.
        """


@dataclass(frozen=True)
class Complaint:
    """Returned in place of a protector: `reply` goes out as the answer to the upload step."""

    reply: bytes
    accused: str


class FrameArithmetic(Protocol):
    """The aggregator's arithmetic on one frame; holds no secret; may live in a worker process."""

    native: bool
    """True where it calls libraries that may die on hostile bytes: run it in a worker process."""

    def check(self, index: int, frame: bytes | memoryview) -> None:
        """Strict parse of frame `index` of an upload. Raises `Refused`."""

    def add(self, index: int, total: bytearray | None, frame: bytes | memoryview) -> bytearray:
        """The sum of frame `index` with one more contribution; None is the empty sum.

        May change and return `total` itself. Raises `Refused` and leaves `total` as it was.
        """


class SumOpener(Protocol):
    """Opens the published sum at a member, frame by frame, on any thread."""

    survivors: tuple[str, ...]
    layout: BulkLayout
    h1: bytes
    max_error: float
    """Largest distance from an integer before rounding seen so far (ckks), else 0."""

    def open(self, index: int, frame: bytes | memoryview) -> SummedFields:
        """The summed fields of frame `index`.

        Raises `OpeningFailed` for guard bits, a field above |U3| (2^bits - 1), or a failed decryption.
        """


class MemberRound(Protocol):
    """One member's part in one round."""

    @property
    def waiting_for(self) -> StepName | None:
        """The step whose request it answers next; None once nothing more is asked of it."""

    def answer(self, step: StepName, request: bytes) -> bytes:
        """The reply to a message step. Persist the snapshot and the reply before sending it.

        Raises `ServerViolation` if the request fails a check (then answers nothing more), `Refused`
        for malformed bytes or a step out of order.
        """

    def begin_upload(self, request: bytes) -> FrameProtector | Complaint:
        """Check the upload request; the frames are made by the protector that this returns."""

    def seal_upload(self, digest: bytes) -> bytes:
        """The signed reply that goes with the bulk stream of `upload_digest` `digest`. Once only."""

    def open_sum(self, result: bytes) -> SumOpener:
        """Check the round's result message (survivors, signatures) and return its opener."""

    def snapshot(self) -> bytes:
        """Versioned bytes that `Scheme.restore_member` takes. They hold secrets: mode 0600."""

    def erase(self) -> None:
        """Forget every secret of the round, on success and abort alike."""


@dataclass(frozen=True)
class Abort:
    """Why a round ended without a sum, and who is left out of the retry."""

    reason: str
    exclude: tuple[str, ...] = ()


class AggregatorRound(Protocol):
    """The aggregator's part in one round. Deterministic: its accepted replies and closes are its state."""

    @property
    def step(self) -> StepName | None:
        """The open step; None once the round is finished or aborted."""

    @property
    def participants(self) -> tuple[str, ...]:
        """Who is asked in the open step, in roster order."""

    @property
    def replied(self) -> frozenset[str]:
        """Whose reply to the open step was accepted."""

    @property
    def quorum(self) -> int:
        """Replies without which the open step can't close at its deadline other than by aborting."""

    @property
    def abort(self) -> Abort | None:
        """Set when the round has ended without a sum."""

    @property
    def named(self) -> Mapping[str, str]:
        """Members found at fault so far (a lying share, a complaint), with the reason."""

    layout: BulkLayout

    def request(self, member: str) -> bytes:
        """The open step's request for a participant."""

    def accept(self, member: str, reply: bytes) -> bool:
        """Check a reply to the open step and record it; False if the same bytes were there already.

        In the upload step the reply is `MemberRound.seal_upload`'s, accepted only after the caller
        has every frame durably and `upload_digest` agrees with `expected_digest(reply)`; a complaint
        has no bulk. Raises `Refused`: nothing changed.
        """

    def check_reply(self, member: str, reply: bytes) -> bool:
        """What `accept` checks, changing nothing; True when bulk must follow (an upload, no complaint)."""

    def expected_digest(self, reply: bytes) -> bytes:
        """The upload digest that an upload reply promises."""

    @property
    def h1(self) -> bytes:
        """h1 of the round (h0 where the scheme has no other); known once the upload step is open."""

    def close(self) -> None:
        """Close the open step: on to the next one, to the end, or to `abort` (below quorum)."""

    @property
    def survivors(self) -> tuple[str, ...]:
        """The survivor set, in roster order; fixed when the upload step closes."""

    def arithmetic(self) -> FrameArithmetic:
        """The frame arithmetic, for use in this process."""

    def finish_frame(self, index: int, total: bytes | bytearray) -> bytes:
        """Frame `index` of the published sum, from the sum over all survivors. Only when finished."""

    def result(self) -> bytes:
        """The result message that goes with the published sum. Only when finished."""


class Scheme(Protocol):
    """A scheme: its name, what it needs, and its two machines."""

    name: str
    steps: tuple[StepName, ...]

    def trust_line(self, terms: RoundTerms) -> str:
        """Who would have to collude to learn an update: one sentence for policy, docs and receipts."""

    def check_terms(self, terms: RoundTerms) -> None:
        """Prove at set-up that (bits, n_max, parameters) can't overflow. Raises `ParameterRefused`."""

    def bulk_layout(self, terms: RoundTerms) -> BulkLayout:
        """Exact sizes of the bulk step."""

    def member(self, terms: RoundTerms, keys: MemberKeys, random: Random) -> MemberRound:
        """A member's machine at the start of a round."""

    def restore_member(
        self, terms: RoundTerms, keys: MemberKeys, snapshot: bytes, random: Random
    ) -> MemberRound:
        """A member's machine from a snapshot. Raises `Refused` (malformed)."""

    def aggregator(self, terms: RoundTerms, exclude: frozenset[str] = frozenset()) -> AggregatorRound:
        """The aggregator's machine at the start of a round; `exclude` isn't asked."""
