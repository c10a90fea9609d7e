"""One whole round, measured: every member's machine here, the aggregator's in a process of its own.

Everything that a member sends or gets is the service's own serialised message (`round.proto`), and is
counted and charged as such; TLS and HTTP/2 framing aren't. Members work one after the other, frames on
as many threads as there are cores, ciphertexts in the SDK's worker processes.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median

import numpy as np
from blindsum.bench.aggregator_process import AggregatorProcess
from blindsum.bench.cpu_time import StepClock, process_cpu, without_collection
from blindsum.bench.federation_setup import EXAMPLES, RANGE_EXPONENT, Federation
from blindsum.bench.peak_memory import PeakMemory, peak_resident
from blindsum.client.frame_workers import spread_opener, spread_protector, worker_cpu_seconds, worker_pids
from blindsum.crypto.encoding.sum_check import SumCheck
from blindsum.crypto.encoding.vector import VectorDecoder, VectorEncoder
from blindsum.crypto.primitives.derivation import system_random
from blindsum.crypto.schemes.base import (
    Complaint,
    FrameProtector,
    MemberRound,
    frame_digest,
    upload_digest,
)
from blindsum.crypto.schemes.registry import scheme
from blindsum.proto.v1 import round_pb2
from numpy.typing import NDArray

UPLOAD_CHUNK = 1 << 18
_SUM_CHECK_CHUNK = 1 << 15

Progress = Callable[[str, int, int], None]
"""Called with a step, how many members are through it, and of how many."""


def within(progress: Progress, what: str) -> Progress:
    """Reports steps as steps of `what`."""

    def report(step: str, done: int, total: int) -> None:
        progress(f"{what}: {step}", done, total)

    return report


@dataclass
class MemberCost:
    """What one member used in the round: CPU seconds and bytes by step, and those of `protect`."""

    clock: StepClock = field(default_factory=StepClock)
    bytes_up: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    bytes_down: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    protect_cpu_s: float = 0.0


@dataclass
class RoundCost:
    """What a round cost. `survivors` are the members whose upload is in the sum."""

    members: dict[str, MemberCost]
    survivors: tuple[str, ...]
    aggregator_cpu_s: dict[str, float]
    aggregate_cpu_s: float
    aggregator_peaks: dict[str, int | None]
    member_peak: int | None
    worker_peak: int | None
    open_cpu_s: float
    decrypt_cpu_s: float
    sum_check_cpu_s: float
    mismatches: int
    max_error: float
    wall_s: float

    def member_seconds(self) -> list[float]:
        """CPU seconds of each survivor, from its float vector to its last message."""
        return [self.members[name].clock.total for name in self.survivors]

    def step_seconds(self, step: str) -> float:
        """The median survivor's CPU seconds in a step."""
        return median(self.members[name].clock.seconds.get(step, 0.0) for name in self.survivors)

    def bytes_up(self) -> list[int]:
        """Bytes that each survivor sent."""
        return [sum(self.members[name].bytes_up.values()) for name in self.survivors]

    def bytes_down(self) -> list[int]:
        """Bytes that each survivor got, the published sum included."""
        return [sum(self.members[name].bytes_down.values()) for name in self.survivors]


class MeasuredRound:
    """Runs one round of a federation."""

    def __init__(
        self, federation: Federation, aggregator: AggregatorProcess, pool: ThreadPoolExecutor, threads: int
    ) -> None:
        self._federation = federation
        self._aggregator = aggregator
        self._pool = pool
        self._threads = threads
        self._scheme = scheme(federation.work.scheme)
        self._machines: dict[str, MemberRound] = {}
        self._costs = {name: MemberCost() for name in federation.keys}
        # Written through, so that its pages are there before any member's memory is looked at.
        self._plain: NDArray[np.uint64] = np.full(federation.vector.fields, 0, np.uint64)
        self._watched = False
        self._member_peak: int | None = None
        self._sum_check_cpu_s = 0.0

    def run(self, progress: Progress = lambda *_: None) -> RoundCost:
        """The cost of the round. Raises `RuntimeError` if it didn't end with a sum."""
        started = time.perf_counter()
        with without_collection():
            while True:
                step, asked, reason = self._aggregator.call("state")
                if step is None:
                    break
                going = [name for name in asked if not self._left(name, step)]
                for place, name in enumerate(going):
                    self._answer(name, step)
                    progress(step, place + 1, len(going))
                self._aggregator.call("close")
            if reason:
                raise RuntimeError(f"the round was given up: {reason}")
            return self._finish(started)

    def _left(self, name: str, step: str) -> bool:
        return name in self._federation.dropouts and step not in ("advertise", "share")

    def _answer(self, name: str, step: str) -> None:
        cost = self._costs[name]
        raw: bytes = self._aggregator.call("request", name)
        cost.bytes_down[step] += len(raw)
        if step == "upload":
            self._upload(name, raw)
            return
        with cost.clock.running(step):
            if name not in self._machines:
                self._machines[name] = self._machine(name)
            machine = self._machines[name]
            reply = machine.answer(
                step,  # type: ignore[arg-type]
                round_pb2.GetStepResponse.FromString(raw).request,
            )
            machine.snapshot()
            message = round_pb2.AnswerRequest(round=1, step=step, reply=reply).SerializeToString()
        cost.bytes_up[step] += len(message)
        self._aggregator.call("answer", name, message)

    def _machine(self, name: str) -> MemberRound:
        federation = self._federation
        return self._scheme.member(federation.terms, federation.keys[name], system_random)

    def _upload(self, name: str, raw: bytes) -> None:
        federation, cost = self._federation, self._costs[name]
        update = federation.update(list(federation.keys).index(name))
        # One member's memory stands for all.
        memory = None if self._watched else PeakMemory()
        self._watched = True
        with cost.clock.running("upload"):
            if name not in self._machines:
                self._machines[name] = self._machine(name)
            machine = self._machines[name]
            begun = machine.begin_upload(round_pb2.GetStepResponse.FromString(raw).request)
            if isinstance(begun, Complaint):
                raise RuntimeError(f"{name} complains about {begun.accused}")
            protector = spread_protector(begun)
            machine.snapshot()
            encoder = VectorEncoder(
                federation.vector,
                (RANGE_EXPONENT,),
                update,
                examples=EXAMPLES,
                metrics={},
                check_key=federation.keys[name].group_key.check_key(protector.h1),
                member=name,
            )
        frames = _Frames(encoder, protector)
        workers_before = worker_cpu_seconds()
        digests: list[bytes] = []
        for window in frames.windows(self._threads):
            with cost.clock.running("upload"):
                made = (
                    list(self._pool.map(frames.make, window)) if len(window) > 1 else [frames.make(window[0])]
                )
            for index, frame in zip(window, made, strict=True):
                start, stop = protector.layout.field_range(index)
                part = self._plain[start:stop]
                np.add(part, frame.fields, out=part)
                digests.append(frame.digest)
                cost.protect_cpu_s += frame.protect_cpu_s
            chunks = [chunk for frame in made for chunk in frame.chunks]
            cost.bytes_up["upload"] += sum(map(len, chunks))
            self._aggregator.send("chunks", chunks)
        cost.protect_cpu_s += worker_cpu_seconds() - workers_before
        with cost.clock.running("upload"):
            digest = upload_digest(protector.h1, digests)
            reply = machine.seal_upload(digest)
            machine.snapshot()
            message = round_pb2.BeginUploadRequest(
                round=1,
                kind=round_pb2.BULK_KIND_CONTRIBUTION,
                total=protector.layout.upload_total,
                digest=digest,
                reply=reply,
            ).SerializeToString()
        cost.bytes_up["upload"] += len(message)
        if memory is not None:
            self._member_peak = memory.above
            self._sum_check_cpu_s = _sum_check_cost(encoder, protector)
        del frames, encoder, protector
        self._aggregator.call("commit", name, message)

    def _finish(self, started: float) -> RoundCost:
        federation = self._federation
        raw: bytes = self._aggregator.call("result")
        survivors = tuple(name for name in federation.keys if name not in federation.dropouts)
        name = survivors[0]
        clock, decrypt = StepClock(), StepClock()
        with clock.running("open"):
            result = round_pb2.GetResultResponse.FromString(raw).result
            opener = spread_opener(self._machines[name].open_sum(result))
            decoder = VectorDecoder(
                federation.vector,
                (RANGE_EXPONENT,),
                check_key=federation.keys[name].group_key.check_key(opener.h1),
            )
        down = len(raw)
        mismatches = 0
        layout = opener.layout
        for first in range(0, layout.frames, 2 * self._threads):
            window = range(first, min(first + 2 * self._threads, layout.frames))
            pieces: list[list[bytes]] = self._aggregator.call("results", window.start, window.stop)
            down += sum(len(piece) for frame in pieces for piece in frame)
            with clock.running("open"):
                frames = [
                    b"".join(round_pb2.DownloadResponse.FromString(piece).data for piece in frame)
                    for frame in pieces
                ]
                with decrypt.running("open"):
                    opened = list(self._pool.map(opener.open, window, frames))
                for index, fields in zip(window, opened, strict=True):
                    decoder.absorb(layout.field_range(index)[0], fields)
            for index, fields in zip(window, opened, strict=True):
                start, stop = layout.field_range(index)
                mismatches += int(np.count_nonzero(fields != self._plain[start:stop]))
        with clock.running("open"):
            decoder.finish(opener.survivors)
        report = self._aggregator.call("report")
        for survivor in survivors:
            self._costs[survivor].bytes_down["result"] = down
        if opener.survivors != survivors:
            raise RuntimeError("the sum is over another survivor set than the members that uploaded")
        return RoundCost(
            members=self._costs,
            survivors=survivors,
            aggregator_cpu_s=report["cpu_s"],
            aggregate_cpu_s=report["aggregate_cpu_s"],
            aggregator_peaks=report["peak_bytes"],
            member_peak=self._member_peak,
            worker_peak=peak_resident(worker_pids()),
            open_cpu_s=clock.total,
            decrypt_cpu_s=decrypt.total,
            sum_check_cpu_s=self._sum_check_cpu_s,
            mismatches=mismatches,
            max_error=float(opener.max_error),
            wall_s=time.perf_counter() - started,
        )


@dataclass(frozen=True)
class _Frame:
    fields: NDArray[np.uint32]
    digest: bytes
    chunks: list[bytes]
    protect_cpu_s: float


class _Frames:
    """Makes the frames of one upload, on any thread."""

    def __init__(self, encoder: VectorEncoder, protector: FrameProtector) -> None:
        self._encoder = encoder
        self._protector = protector
        self._layout = protector.layout
        self._upload_id = bytes(16)

    def windows(self, threads: int) -> list[list[int]]:
        """Frames that may be made at the same time: the tail's alone, after all others."""
        frames = range(self._layout.frames)
        dimension = self._encoder.plan.dimension
        body = [index for index in frames if self._layout.field_range(index)[1] <= dimension]
        size = 2 * threads
        together = [body[at : at + size] for at in range(0, len(body), size)]
        return together + [[index] for index in frames[len(body) :]]

    def make(self, index: int) -> _Frame:
        """One frame, cut into the messages that carry it."""
        layout = self._layout
        fields = self._encoder.fields(*layout.field_range(index))
        start = time.thread_time()
        frame = self._protector.protect(index, fields)
        spent = time.thread_time() - start
        offset = index * layout.upload_frame
        chunks = [
            round_pb2.UploadRequest(
                upload_id=self._upload_id, offset=offset + at, data=frame[at : at + UPLOAD_CHUNK]
            ).SerializeToString()
            for at in range(0, len(frame), UPLOAD_CHUNK)
        ]
        return _Frame(fields, frame_digest(frame), chunks, spent)


def _sum_check_cost(encoder: VectorEncoder, protector: FrameProtector) -> float:
    """CPU seconds of the sum check's part of encoding, done once more on its own in the same chunks."""
    plan = encoder.plan
    check = SumCheck(protector.h1)
    spent = 0.0
    for start in range(0, plan.dimension, _SUM_CHECK_CHUNK):
        values = encoder.fields(start, min(start + _SUM_CHECK_CHUNK, plan.dimension))
        before = process_cpu()
        check.partial(start, values, plan.bits)
        spent += process_cpu() - before
    return spent


def run_round(federation: Federation, threads: int, progress: Progress = lambda *_: None) -> RoundCost:
    """One measured round of `federation`, with `threads` threads a role."""
    with (
        AggregatorProcess(federation.terms, threads) as aggregator,
        ThreadPoolExecutor(threads) as pool,
    ):
        pool.submit(int).result()
        return MeasuredRound(federation, aggregator, pool, threads).run(progress)
