"""A scheme without secrets, for tests of the service alone: the sum of uint64 fields, in the clear.

It has a message step on either side of the upload, so that every kind of transition occurs. Contributions
of the tests are distinct powers of two: the sum itself shows who was counted, and how often.
"""

import os
from collections.abc import Mapping

import numpy as np
from blindsum.crypto.canonical import encode_message
from blindsum.crypto.errors import RefusalReason, Refused
from blindsum.crypto.schemes.base import Abort, AggregatorRound, BulkLayout, RoundTerms, StepName

STEPS: tuple[StepName, ...] = ("advertise", "upload", "confirm")
FIELDS_PER_FRAME = 4096


class PlainArithmetic:
    """uint64 addition; a frame that starts with all ones is out of range, `DIE` kills the process."""

    def __init__(self, layout: BulkLayout, native: bool) -> None:
        self._layout = layout
        self.native = native

    def check(self, index: int, frame: bytes | memoryview) -> None:
        if len(frame) != self._layout.upload_bytes(index):
            raise Refused(RefusalReason.WRONG_SIZE, "the frame has the wrong size")
        if bytes(frame[:8]) == b"\xff" * 8:
            raise Refused(RefusalReason.OUT_OF_RANGE, f"frame {index} is out of range")
        if self.native and bytes(frame[:3]) == b"DIE":
            os._exit(66)

    def add(self, index: int, total: bytearray | None, frame: bytes | memoryview) -> bytearray:
        if total is None:
            return bytearray(frame)
        np.frombuffer(total, "<u8")[:] += np.frombuffer(frame, "<u8")
        return total


class PlainRound:
    """The aggregator's machine."""

    def __init__(self, terms: RoundTerms, exclude: frozenset[str], native: bool) -> None:
        header = terms.bound.header
        frames = -(-header.fields // FIELDS_PER_FRAME)
        last = 8 * (header.fields - (frames - 1) * FIELDS_PER_FRAME)
        whole = 8 * FIELDS_PER_FRAME if frames > 1 else last
        self.layout = BulkLayout(header.fields, FIELDS_PER_FRAME, whole, last, whole, last, whole, last)
        self._n_min = header.n_min
        self._h0 = terms.bound.h0
        self._native = native
        self._position = 0
        self._participants = tuple(m.id for m in terms.roster.members if m.id not in exclude)
        self._replies: dict[str, bytes] = {}
        self.survivors: tuple[str, ...] = ()
        self.abort: Abort | None = None
        self.named: Mapping[str, str] = {}

    @property
    def step(self) -> StepName | None:
        return STEPS[self._position] if self._position < len(STEPS) and self.abort is None else None

    @property
    def participants(self) -> tuple[str, ...]:
        return self._participants

    @property
    def replied(self) -> frozenset[str]:
        return frozenset(self._replies)

    @property
    def quorum(self) -> int:
        return self._n_min

    @property
    def h1(self) -> bytes:
        return self._h0

    def request(self, member: str) -> bytes:
        return f"{self.step} {member} {len(self._participants)}".encode()

    def check_reply(self, member: str, reply: bytes) -> bool:
        if member not in self._participants:
            raise Refused(RefusalReason.NOT_A_PARTICIPANT, f"{member} isn't asked")
        if self.step == "upload":
            if reply == b"complaint":
                return False
            if len(reply) != 33 or reply[:1] != b"U":
                raise Refused(RefusalReason.MALFORMED, "an upload reply is U and a digest")
            return True
        if not reply.startswith(str(self.step).encode()):
            raise Refused(RefusalReason.MALFORMED, "the reply is for another step")
        return False

    def expected_digest(self, reply: bytes) -> bytes:
        return reply[1:]

    def accept(self, member: str, reply: bytes) -> bool:
        self.check_reply(member, reply)
        if member in self._replies:
            if self._replies[member] != reply:
                raise Refused(RefusalReason.CONFLICT, "another reply is there")
            return False
        self._replies[member] = reply
        if reply == b"complaint":
            self.abort = Abort(f"{member} complained", (member,))
        return True

    def close(self) -> None:
        if len(self._replies) < self._n_min:
            self.abort = Abort(f"{len(self._replies)} of {self._n_min} needed replied to {self.step}")
            return
        left = tuple(m for m in self._participants if m in self._replies)
        if self.step == "upload":
            self.survivors = left
        self._participants = left
        self._replies = {}
        self._position += 1

    def arithmetic(self) -> PlainArithmetic:
        return PlainArithmetic(self.layout, self._native)

    def finish_frame(self, index: int, total: bytes | bytearray) -> bytes:
        assert self.step is None
        return bytes(total)

    def result(self) -> bytes:
        return encode_message(list(self.survivors))


class PlainScheme:
    """Only the aggregator's half exists: the tests speak for the members."""

    name = "masking"
    steps = STEPS

    def __init__(self, native: bool = False) -> None:
        self._native = native

    def trust_line(self, terms: RoundTerms) -> str:
        return "The aggregator alone learns every update."

    def check_terms(self, terms: RoundTerms) -> None:
        if terms.bound.header.bits > 30:
            raise Refused(RefusalReason.OUT_OF_RANGE, "the lanes are too narrow")

    def bulk_layout(self, terms: RoundTerms) -> BulkLayout:
        return PlainRound(terms, frozenset(), self._native).layout

    def aggregator(self, terms: RoundTerms, exclude: frozenset[str] = frozenset()) -> AggregatorRound:
        return PlainRound(terms, exclude, self._native)

    def member(self, *_: object) -> object:
        raise NotImplementedError

    restore_member = member


def scheme(_name: str) -> PlainScheme:
    """The factory that a server takes in place of the registry."""
    return PlainScheme()


def native_scheme(_name: str) -> PlainScheme:
    """The same, its arithmetic in worker processes."""
    return PlainScheme(native=True)
