"""Members that upload to a real server: the SDK's folders, transport and files, the real masking scheme.

They differ from a member's app in that each phase waits for the benchmark's word: everything is masked
and stored before the first upload begins, and nobody confirms before the measurement is over.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from blindsum.bench.ingest_server import MeasuredServer
from blindsum.client.joining import join, poll
from blindsum.client.member_folder import MemberFolder
from blindsum.client.owner import Owner
from blindsum.client.owner_documents import OwnerDocuments
from blindsum.client.transport import MemberLine
from blindsum.crypto.errors import BlindsumError
from blindsum.crypto.primitives.derivation import system_random
from blindsum.crypto.schemes.base import BulkLayout, MemberKeys, RoundTerms, frame_digest, upload_digest
from blindsum.crypto.schemes.masking import scheme
from blindsum.crypto.trust.header import BoundHeader
from blindsum.crypto.trust.plan import Deadlines
from blindsum.proto.v1 import round_pb2

_HOUR = 3600
_PATIENCE_S = 600.0


def found(server: MeasuredServer, folder: Path, members: int, dimension: int) -> Owner:
    """An owner with so many admitted members (folders `m0`, `m1`, ...) and a plan of that dimension."""
    owner = Owner.init(
        folder / "owner",
        "bench",
        enrolment_address=f"localhost:{server.enrolment_port}",
        member_address=f"localhost:{server.member_port}",
        ca=server.ca,
        schemes=("masking",),
        n_max=max(16, members),
    )
    owner.register()
    for index in range(members):
        join(owner.invite(f"m{index}"), folder / f"m{index}", wait=False)
    owner.admit()
    for index in range(members):
        if not poll(folder / f"m{index}"):
            raise BlindsumError("a member of the benchmark wasn't admitted")
    limits = dict.fromkeys(("gather", "advertise", "share", "upload", "confirm", "reveal", "conclude"), _HOUR)
    owner.start_plan("bench", {"w": np.zeros(dimension, np.float32)}, rounds=1, deadlines=Deadlines(**limits))
    return owner


class BulkMember:
    """One member. It sends 2^(index mod 16) in every field, so that the sum shows who is in it."""

    def __init__(self, path: Path, index: int, gates: "Gates") -> None:
        self._folder = MemberFolder(path)
        pin = self._folder.pin
        self._line = MemberLine(
            pin.member_address, pin.ca, key=self._folder.transport_key, certificate=self._folder.certificate
        )
        self._documents = OwnerDocuments(self._folder, self._line)
        self._index = index
        self._gates = gates
        self._machine: Any = None
        self._spool = path / "upload.bin"
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def value(self) -> int:
        """What it sends in every field."""
        return 1 << self._index % 16

    def _run(self) -> None:
        try:
            answered: set[str] = set()
            for notice in self._line.watch(lambda _: None):
                if not self._documents.follow(notice) or not notice.HasField("round"):
                    continue
                said = notice.round
                if said.state == round_pb2.ROUND_STATE_PUBLISHED:
                    self._gates.published.set()
                    return
                if said.state == round_pb2.ROUND_STATE_ABORTED:
                    raise BlindsumError(f"the round was aborted: {said.abort_reason}")
                if said.asked and said.step not in answered:
                    answered.add(said.step)
                    self._perform(said)
        except Exception as error:
            self._gates.fail(error)

    def _perform(self, said: round_pb2.RoundNotice) -> None:
        if said.step == "advertise":
            self._begin(BoundHeader.parse(said.header))
        if said.step == "confirm":
            self._gates.measured.wait(_PATIENCE_S)
        stub, line = self._line.stub, self._line
        asked = round_pb2.GetStepRequest(round=said.number, step=said.step)
        request = bytes(line.call(stub.GetStep, asked, what="getting a step").request)
        if said.step == "upload":
            self._upload(said.number, request)
            return
        reply = self._machine.answer(said.step, request)
        answer = round_pb2.AnswerRequest(round=said.number, step=said.step, reply=reply)
        line.call(stub.Answer, answer, what="answering")

    def _begin(self, bound: BoundHeader) -> None:
        documents = self._documents
        assert documents.roster is not None
        assert documents.group_key is not None
        keys = MemberKeys(self._folder.pin.member, self._folder.identity, documents.group_key)
        self._machine = scheme("masking").member(RoundTerms(bound, documents.roster), keys, system_random)

    def _upload(self, number: int, request: bytes) -> None:
        protector = self._machine.begin_upload(request)
        layout: BulkLayout = protector.layout
        digests = []
        with self._gates.masking, self._spool.open("wb") as file:
            for index in range(layout.frames):
                start, stop = layout.field_range(index)
                frame = protector.protect(index, np.full(stop - start, self.value, np.uint32))
                digests.append(frame_digest(frame))
                file.write(frame)
        digest = upload_digest(protector.h1, digests)
        begin = round_pb2.BeginUploadRequest(
            round=number,
            kind=round_pb2.BULK_KIND_CONTRIBUTION,
            total=layout.upload_total,
            digest=digest,
            reply=self._machine.seal_upload(digest),
        )
        self._gates.prepared(layout.upload_total)
        with self._gates.uploading:
            self._line.upload(begin, self._spool, lambda *_: None)
        self._gates.acknowledged.release()

    def opened(self, number: int = 1) -> set[int]:
        """The distinct values of the opened sum's fields."""
        line = self._line
        asked = round_pb2.GetResultRequest(round=number)
        answer = line.call(line.stub.GetResult, asked, what="getting the result")
        opener = self._machine.open_sum(answer.result)
        data = b"".join(
            line.download(
                round_pb2.BULK_KIND_SUM, number, answer.total, what="the sum", on_bytes=lambda *_: None
            )
        )
        values: set[int] = set()
        offset = 0
        for index in range(opener.layout.frames):
            size = opener.layout.result_bytes(index)
            values |= set(np.unique(opener.open(index, data[offset : offset + size])).tolist())
            offset += size
        return values

    def close(self) -> None:
        """Close the connection, forget the upload."""
        self._line.stop.set()
        self._line.end_watch()
        self._line.close()
        self._folder.close()
        self._spool.unlink(missing_ok=True)


class Gates:
    """What the members wait for, and what the benchmark waits for."""

    def __init__(self, members: int, at_once: int) -> None:
        self._members = members
        self._ready = threading.Semaphore(0)
        self._go = threading.Event()
        self.masking = threading.Semaphore(2)
        self.uploading = threading.Semaphore(at_once)
        self.acknowledged = threading.Semaphore(0)
        self.measured = threading.Event()
        self.published = threading.Event()
        self.upload_bytes = 0
        self._failure: Exception | None = None

    def prepared(self, total: int) -> None:
        """An upload is stored; returns when it may go out."""
        self.upload_bytes = total
        self._ready.release()
        self._go.wait(_PATIENCE_S)

    def fail(self, error: Exception) -> None:
        """A member failed: wake the benchmark."""
        self._failure = self._failure or error
        for _ in range(self._members):
            self._ready.release()
            self.acknowledged.release()
        self.published.set()

    def _wait(self, gate: threading.Semaphore, tick: Callable[[int], None]) -> None:
        for done in range(self._members):
            if not gate.acquire(timeout=_PATIENCE_S) or self._failure is not None:
                raise self._failure or BlindsumError("the members of the benchmark are stuck")
            tick(done + 1)

    def wait_prepared(self, tick: Callable[[int], None]) -> None:
        """Until every upload is masked and stored."""
        self._wait(self._ready, tick)

    def go(self) -> None:
        """Let the uploads begin."""
        self._go.set()

    def wait_acknowledged(self, tick: Callable[[int], None]) -> None:
        """Until every upload is acknowledged."""
        self._wait(self.acknowledged, tick)

    def wait_published(self) -> None:
        """Let everyone confirm; until the sum is there."""
        self.measured.set()
        if not self.published.wait(_PATIENCE_S) or self._failure is not None:
            raise self._failure or BlindsumError("the sum of the benchmark's round wasn't published")
