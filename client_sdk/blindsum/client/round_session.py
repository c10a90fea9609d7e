"""One round at one member: the scheme's machine with its files, its calls and its threads.

Every reply is made durable together with the machine's snapshot before it is sent, and only those bytes
are ever sent again. The bulk is protected into a spool file, sealed, and sent from there.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
from blindsum.client.frame_workers import spread_opener, spread_protector
from blindsum.client.member_folder import MemberFolder, StoredRound
from blindsum.client.owner_documents import OwnerDocuments, restored_plan, restored_roster
from blindsum.client.private_files import write_private
from blindsum.client.progress import OnProgress, Phase
from blindsum.client.transport import MemberLine
from blindsum.client.witness import Witness
from blindsum.crypto.encoding.layout import Layout, Vector
from blindsum.crypto.encoding.vector import OpenedSum, VectorDecoder, VectorEncoder, VectorPlan
from blindsum.crypto.errors import BlindsumError, RefusalReason, Refused, ServerViolation
from blindsum.crypto.primitives.derivation import system_random
from blindsum.crypto.schemes.base import (
    BulkLayout,
    Complaint,
    FrameProtector,
    MemberKeys,
    MemberRound,
    RoundTerms,
    StepName,
    frame_digest,
    upload_digest,
)
from blindsum.crypto.schemes.registry import scheme
from blindsum.crypto.trust.header import BoundHeader
from blindsum.crypto.trust.plan import Plan
from blindsum.crypto.trust.roster import Roster
from blindsum.proto.v1 import round_pb2

A = TypeVar("A")
B = TypeVar("B")

_log = logging.getLogger("blindsum.client")

MESSAGE_STEPS: frozenset[str] = frozenset({"advertise", "share", "confirm", "reveal"})
_WORKERS = max(2, min(8, os.cpu_count() or 2))


@dataclass(frozen=True, repr=False)
class Contribution:
    """What an app submitted: the flat update, the number of examples, the metrics."""

    update: Vector
    examples: int
    metrics: dict[str, float]
    rounding_seed: bytes | None = None

    def encoder(
        self, plan: VectorPlan, exponents: tuple[int, ...], check_key: bytes, member: str
    ) -> VectorEncoder:
        """The encoder of this contribution. Raises `EncodingError` naming what can't be encoded."""
        return VectorEncoder(
            plan,
            exponents,
            self.update,
            examples=self.examples,
            metrics=self.metrics,
            check_key=check_key,
            member=member,
            rounding_seed=self.rounding_seed,
        )


@dataclass
class Live:
    """What the aggregator last said of a round. `state` 0: nothing yet; `gone`: it speaks of a newer one."""

    state: int = 0
    step: str = ""
    asked: bool = False
    reason: str = ""
    checkpoint_wanted: bool = False
    gone: bool = False
    passed: bool = False
    """Gone, and the federation's state has moved on since this round began."""


class RoundSession:
    """A round that this member is in; made by `enter` or `resume`."""

    def __init__(
        self,
        folder: MemberFolder,
        line: MemberLine,
        record: StoredRound,
        terms: RoundTerms,
        keys: MemberKeys,
        plan: Plan,
        plan_digest: bytes,
        machine: MemberRound,
        report: OnProgress,
    ) -> None:
        self.folder = folder
        self.line = line
        self.record = record
        self.terms = terms
        self.keys = keys
        self.plan = plan
        self.plan_digest = plan_digest
        self.scheme = scheme(terms.bound.header.scheme)
        self.layout: BulkLayout = self.scheme.bulk_layout(terms)
        self.live = Live()
        self.witness: Witness | None = None
        self._machine = machine
        self._report = report
        self._lock = threading.RLock()

    @classmethod
    def enter(
        cls,
        folder: MemberFolder,
        line: MemberLine,
        documents: OwnerDocuments,
        bound: BoundHeader,
        report: OnProgress,
    ) -> "RoundSession":
        """Begin a round whose header was checked. From here on its number and h0 are spent."""
        assert documents.roster is not None
        assert documents.plan is not None
        terms, keys = _terms(folder, documents, bound, documents.roster)
        proto = scheme(bound.header.scheme)
        proto.check_terms(terms)
        machine = proto.member(terms, keys, system_random)
        record = StoredRound(
            bound.header.round, bound.body, documents.roster_bytes, documents.plan_bytes, machine.snapshot()
        )
        folder.enter_round(record, bound.h0)
        return cls(folder, line, record, terms, keys, documents.plan, documents.plan_digest, machine, report)

    @classmethod
    def resume(
        cls,
        folder: MemberFolder,
        line: MemberLine,
        documents: OwnerDocuments,
        record: StoredRound,
        report: OnProgress,
    ) -> "RoundSession":
        """The round that an earlier process was in, from its snapshot."""
        bound = BoundHeader.parse(record.header)
        terms, keys = _terms(folder, documents, bound, restored_roster(folder, record.roster))
        plan, plan_digest = restored_plan(folder, record.plan)
        machine = scheme(bound.header.scheme).restore_member(terms, keys, record.snapshot, system_random)
        return cls(folder, line, record, terms, keys, plan, plan_digest, machine, report)

    @property
    def number(self) -> int:
        """The round's number."""
        return self.record.number

    @property
    def bound(self) -> BoundHeader:
        """The round's header."""
        return self.terms.bound

    @property
    def spool(self) -> Path:
        """Where the protected upload lies."""
        return self.folder.spool(self.number)

    @property
    def lost(self) -> bool:
        """Whether a restart in the middle of masking took this member out: masks are never applied twice."""
        return (
            self.bound.header.scheme == "masking"
            and bool(self.record.h1)
            and not self.sealed
            and not self.spool.exists()
        )

    @property
    def sealed(self) -> bool:
        """Whether the upload is made: from here on the app isn't needed any more."""
        return bool(self.record.upload)

    @property
    def confirmed(self) -> bool:
        """Whether this member helped to open the round's sum: its update may not be used again."""
        return self.record.confirmed

    def vector_plan(self, layout: Layout) -> VectorPlan:
        """What each field of the round's vector is."""
        return VectorPlan.of(self.plan, layout)

    # Message steps

    def answer(self, step: str) -> None:
        """Reply to the open message step: with the stored bytes, or with new ones, stored first.

        Raises `ServerViolation` (the machine has stopped), `Refused`, `Unreachable`.
        """
        reply = self.folder.reply(self.number, step)
        if reply is None:
            reply = self._make_reply(cast(StepName, step))
        self._report(cast(Phase, step), 0, 0)
        self._send_answer(step, reply)

    def _make_reply(self, step: StepName) -> bytes:
        request = self._request(step)
        with self._lock:
            try:
                reply = self._machine.answer(step, request)
            except ServerViolation:
                self.record.snapshot = self._machine.snapshot()
                self.folder.keep_round(self.record)
                raise
            self.record.snapshot = self._machine.snapshot()
            self.record.confirmed = self.record.confirmed or step in ("confirm", "reveal")
            self.folder.keep_round(self.record, step, reply)
        return reply

    def _request(self, step: str) -> bytes:
        asked = round_pb2.GetStepRequest(round=self.number, step=step)
        answer = self.line.call(self.line.stub.GetStep, asked, what=f"getting the {step} request")
        return bytes(answer.request)

    def _send_answer(self, step: str, reply: bytes) -> None:
        self.line.call(
            self.line.stub.Answer,
            round_pb2.AnswerRequest(round=self.number, step=step, reply=reply),
            what=f"answering {step}",
        )

    # Bulk out

    def protect(
        self,
        contribution: Contribution,
        layout: Layout,
        exponents: tuple[int, ...],
    ) -> Complaint | None:
        """Encode and protect the contribution into the spool file, and seal it. Nothing is sent yet.

        Returns the complaint that goes out in place of an upload, if a neighbour's share was bad.
        """
        with self._lock:
            stored = self.folder.reply(self.number, "upload")
            if stored is not None:
                return Complaint(stored, "")
            if not self.spool.exists():
                begun = self._machine.begin_upload(self._request("upload"))
                self.record.snapshot = self._machine.snapshot()
                if isinstance(begun, Complaint):
                    self.folder.keep_round(self.record, "upload", begun.reply)
                    return begun
                self.record.h1 = begun.h1
                self.folder.keep_round(self.record)
                check_key = self.keys.group_key.check_key(begun.h1)
                encoder = contribution.encoder(
                    self.vector_plan(layout), exponents, check_key, self.keys.member
                )
                digests: list[bytes] = []
                write_private(self.spool, self._protected(spread_protector(begun), encoder, digests))
                if self.witness is not None:
                    self.witness.sent(contribution.update, encoder.fields(0, encoder.plan.fields))
                self._seal(upload_digest(begun.h1, digests))
            else:
                self.seal_stored()
        return None

    def seal_stored(self) -> bool:
        """Seal a spool file that an earlier process completed but didn't seal; False if there is none."""
        with self._lock:
            if self.sealed:
                return True
            if not self.record.h1 or not self.spool.exists():
                return False
            self._seal(upload_digest(self.record.h1, self._spooled_digests()))
            return True

    def _seal(self, digest: bytes) -> None:
        self.record.upload = self._machine.seal_upload(digest)
        self.record.upload_digest = digest
        self.record.snapshot = self._machine.snapshot()
        self.folder.keep_round(self.record)

    def _spooled_digests(self) -> Iterator[bytes]:
        with self.spool.open("rb") as file:
            for index in range(self.layout.frames):
                yield frame_digest(file.read(self.layout.upload_bytes(index)))

    def _protected(
        self, protector: FrameProtector, encoder: VectorEncoder, digests: list[bytes]
    ) -> Iterator[bytes]:
        layout, frames = self.layout, self.layout.frames

        def make(index: int) -> tuple[bytes, bytes]:
            frame = protector.protect(index, encoder.fields(*layout.field_range(index)))
            return frame, frame_digest(frame)

        # Frames that reach into the tail come last and alone: the tail holds tags over all the others.
        body = sum(layout.field_range(index)[1] <= encoder.plan.dimension for index in range(frames))
        for frame, digest in chain(_in_order(make, range(body)), map(make, range(body, frames))):
            digests.append(digest)
            yield frame
            self._report("protect", len(digests), frames)

    def upload(self) -> None:
        """Send the spooled upload, from where the aggregator already has it, until it is durable there.

        Raises `Refused` (closed, wrong step or round: the round went on without this member).
        """
        begin = round_pb2.BeginUploadRequest(
            round=self.number,
            kind=round_pb2.BULK_KIND_CONTRIBUTION,
            total=self.layout.upload_total,
            digest=self.record.upload_digest,
            reply=self.record.upload,
        )
        self.line.upload(begin, self.spool, lambda done, total: self._report("upload", done, total))

    def complain(self, complaint: Complaint) -> None:
        """Send a complaint as the answer to the upload step."""
        self._send_answer("upload", complaint.reply)

    # Bulk in

    def open_sum(self, layout: Layout, exponents: tuple[int, ...]) -> tuple[OpenedSum, bytes, float]:
        """Download, open and check the published sum: the sum, h1, and the largest rounding error (ckks).

        Raises `ServerViolation`, `OpeningFailed` or `SumCheckFailed`: then nothing is output.
        """
        answer = self.line.call(
            self.line.stub.GetResult, round_pb2.GetResultRequest(round=self.number), what="getting the result"
        )
        if answer.total != self.layout.result_total:
            raise ServerViolation(
                "sum size", f"the published sum has {answer.total} bytes, not {self.layout.result_total}"
            )
        with self._lock:
            checked = self._machine.open_sum(answer.result)
            self.record.confirmed = True
            self.record.snapshot = self._machine.snapshot()
            self.folder.keep_round(self.record)
        opener = spread_opener(checked)
        check_key = self.keys.group_key.check_key(opener.h1)
        decoder = VectorDecoder(self.vector_plan(layout), exponents, check_key=check_key)
        pieces = self.line.download(
            round_pb2.BULK_KIND_SUM,
            self.number,
            answer.total,
            what="the published sum",
            on_bytes=lambda done, total: self._report("download", done, total),
        )
        frames = self.layout.frames
        witness = self.witness
        if witness is not None:
            witness.summed = np.empty(decoder.plan.fields, np.uint64)

        def take(numbered: tuple[int, bytes]) -> None:
            index, frame = numbered
            start, stop = self.layout.field_range(index)
            summed = opener.open(index, frame)
            decoder.absorb(start, summed)
            if witness is not None and witness.summed is not None:
                witness.summed[start:stop] = summed

        sizes = (self.layout.result_bytes(index) for index in range(frames))
        for done, _ in enumerate(_in_order(take, enumerate(_cut(pieces, sizes)))):
            self._report("open", done + 1, frames)
        return decoder.finish(opener.survivors), opener.h1, opener.max_error

    def erase(self) -> None:
        """Forget the round's secrets, in memory and on disk."""
        with self._lock:
            self._machine.erase()
            self.record.snapshot = b""
            self.folder.leave_round(self.number)

    def __repr__(self) -> str:
        return f"<RoundSession {self.number} of {self.keys.member}>"


def is_too_late(refusal: Refused) -> bool:
    """Whether a refusal only says that a step closed in the meantime."""
    return refusal.reason in (RefusalReason.CLOSED, RefusalReason.WRONG_STEP, RefusalReason.WRONG_ROUND)


def _terms(
    folder: MemberFolder, documents: OwnerDocuments, bound: BoundHeader, roster: Roster
) -> tuple[RoundTerms, MemberKeys]:
    header = bound.header
    group_key = folder.group_key(roster.epoch)
    if group_key is None:
        raise BlindsumError(
            f"the group key of epoch {roster.epoch} isn't in the folder; restore it, or join again"
        )
    key = roster.he_key(header.scheme)
    if key is None:
        return RoundTerms(bound, roster), MemberKeys(folder.pin.member, folder.identity, group_key)
    terms = RoundTerms(bound, roster, key.parameters, documents.he_public(key.digest))
    secret = folder.he_secret(key.digest)
    return terms, MemberKeys(folder.pin.member, folder.identity, group_key, secret)


def _cut(pieces: Iterable[bytes], sizes: Iterable[int]) -> Iterator[bytes]:
    """The stream cut into frames of these sizes."""
    source = iter(pieces)
    buffer = bytearray()
    for size in sizes:
        while len(buffer) < size:
            buffer += next(source)
        yield bytes(buffer[:size])
        del buffer[:size]


def _in_order(work: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """Results of `work` in order, made by all cores, a few ahead."""
    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="blindsum-frames") as executor:
        pending: list[Future[B]] = []
        try:
            for item in items:
                pending.append(executor.submit(work, item))
                if len(pending) > 2 * _WORKERS:
                    yield pending.pop(0).result()
            while pending:
                yield pending.pop(0).result()
        finally:
            for future in pending:
                future.cancel()
