"""Bulk uploads: admitted through slots, appended to a spool, checked frame by frame, made durable.

An upload is never in memory: one stage of it is being filled and one is being written. Its exact length
is known before the first byte. A stream that breaks leaves its spool, from which the next one goes on; a
stream that stalls loses its slot, so that others get their turn.
"""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from blindsum.aggregator.clock import Timer
from blindsum.aggregator.folding import RoundArithmetic
from blindsum.aggregator.round_run import Surroundings
from blindsum.aggregator.settings import AggregatorSettings
from blindsum.aggregator.store.blobs import Spool
from blindsum.aggregator.store.stages import BLOCK, Stage
from blindsum.aggregator.store.state import StorageFailed
from blindsum.aggregator.structured_logs import logger
from blindsum.aggregator.upload_chunk import UploadChunk
from blindsum.crypto.errors import RefusalReason, Refused
from blindsum.crypto.schemes.base import BulkLayout, upload_digest

CHUNK_BYTES = 256 * 1024
TRANSPORT_OPTIONS = (
    # gRPC reads what is there in pieces of a chunk: by default it asks for less, and more often.
    ("grpc.experimental.tcp_read_chunk_size", CHUNK_BYTES),
    ("grpc.experimental.tcp_min_read_chunk_size", CHUNK_BYTES),
    # A stream may be this far ahead before its speed has been measured: 64 KiB would stop it all the time.
    ("grpc.http2.lookahead_bytes", 2 * CHUNK_BYTES),
)
"""For the listener that takes uploads: a fifth less CPU for the same bytes, and less memory."""
_READ_BYTES = 1 << 20


class FrameDigests:
    """SHA-256 of every frame of an upload, fed in any pieces; checks each frame once it is complete.

    Also makes the frames' tags, by which folding knows them again at a fraction of SHA-256's cost.
    """

    def __init__(self, layout: BulkLayout, h1: bytes, arithmetic: RoundArithmetic) -> None:
        self._layout = layout
        self._h1 = h1
        self._arithmetic = arithmetic
        self.blocks = arithmetic.native
        """Whether `feed` waits for a worker; if not, a thread of its own would cost more than it."""
        self.restart()

    def restart(self) -> None:
        """Begin with the first byte again."""
        self._digests: list[bytes] = []
        self._tags: list[bytes] = []
        self.seeds: list[bytes] = []
        """What must never come twice under an HE key."""
        self._running = hashlib.sha256()
        self._parts: list[memoryview] = []
        self._left = self._layout.upload_bytes(0)

    def feed(self, data: memoryview) -> None:
        """The next bytes. Raises `Refused` for a bad frame."""
        while data.nbytes:
            part = data[: self._left]
            self._running.update(part)
            self._parts.append(part)
            self._left -= part.nbytes
            data = data[part.nbytes :]
            if self._left == 0:
                self._complete()

    def _complete(self) -> None:
        index = len(self._digests)
        # A frame that came in one piece is used where it is.
        frame = self._parts[0] if len(self._parts) == 1 else memoryview(b"".join(self._parts))
        self._parts.clear()
        self._arithmetic.check(index, frame)
        self.seeds += self._arithmetic.seeds(index, frame)
        self._tags.append(self._arithmetic.tags.tag(frame))
        self._digests.append(self._running.digest())
        self._running = hashlib.sha256()
        if index + 1 < self._layout.frames:
            self._left = self._layout.upload_bytes(index + 1)

    def matches(self, digest: bytes) -> bool:
        """Whether the whole upload has this digest."""
        if len(self._digests) != self._layout.frames or upload_digest(self._h1, self._digests) != digest:
            return False
        self._arithmetic.tags.keep(digest, self._tags)
        return True

    @property
    def frames(self) -> bytes:
        """The frames' digests, one after the other."""
        return b"".join(self._digests)


class PlainDigest:
    """SHA-256 of a whole upload: for sealed checkpoints."""

    blocks = False

    def __init__(self) -> None:
        self.frames = b""
        self.restart()

    def restart(self) -> None:
        """Begin with the first byte again."""
        self._running = hashlib.sha256()

    def feed(self, data: memoryview) -> None:
        """The next bytes."""
        self._running.update(data)

    def matches(self, digest: bytes) -> bool:
        """Whether the whole upload has this digest."""
        return self._running.digest() == digest


@dataclass(eq=False)
class UploadJob:
    """What an upload is for: where it goes, and what happens once it is durable."""

    federation: bytes
    round: int
    member: str
    total: int
    digest: bytes
    spool_name: str
    blob_name: str
    digests: FrameDigests | PlainDigest
    commit: Callable[[bytes], Awaitable[object]]
    """Called with the frames' digests; returns once the acknowledgement may go out."""
    busy: Callable[[bool], None]
    """Told when a stream of this upload begins (True) and ends."""


@dataclass(eq=False)
class _Slot:
    job: UploadJob
    id: bytes
    spool: Spool | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    task: "asyncio.Task[object] | None" = None
    cut: Refused | None = None
    idle: Timer | None = None
    filling: Stage | None = None
    """What came and isn't being written yet."""
    unchecked: list[memoryview] = field(default_factory=list)
    """Chunks of `filling` that a worker has to look at."""
    writing: "asyncio.Future[None] | None" = None
    spoiled: bool = False
    """A frame or the whole was refused: nothing of it can be used."""
    superseded: bool = False
    """Another stream takes the slot over."""
    broken: bool = False
    """A chunk couldn't be written: whoever comes back reads anew what is there."""
    found: int = 0
    """Bytes that were in the spool already, perhaps from before a power cut."""

    def end_stream(self, refusal: Refused) -> None:
        """Make the stream that uses the slot fail with this."""
        if self.cut is None:
            self.cut = refusal
        if self.task is not None:
            self.task.cancel()


@dataclass(frozen=True)
class Admission:
    """A slot and where to go on; or that all is there already, or when to ask again."""

    upload_id: bytes = b""
    offset: int = 0
    retry_after_ms: int = 0
    done: bool = False


class Ingest:
    """The upload slots of a server."""

    def __init__(self, settings: AggregatorSettings, around: Surroundings) -> None:
        self._settings = settings
        self._around = around
        self._slots: dict[bytes, _Slot] = {}
        self._by_spool: dict[str, _Slot] = {}
        self._admitting: set[str] = set()
        self._draining = False
        self.deferred = 0
        """How often an upload was told to ask again later."""
        self._emptied = asyncio.Event()
        self._log = logger(part="ingest")

    @property
    def slots_taken(self) -> int:
        """Slots in use."""
        return len(self._slots)

    def _in_thread(self, work: Callable[..., None], *arguments: object) -> "asyncio.Future[None]":
        return asyncio.get_running_loop().run_in_executor(self._around.executor, work, *arguments)

    async def begin(self, job: UploadJob) -> Admission:
        """Admit an upload, or take up one that broke off. Raises `Refused`."""
        if job.spool_name in self._admitting:
            self.deferred += 1
            return Admission(retry_after_ms=self._settings.retry_after_ms)
        self._admitting.add(job.spool_name)
        try:
            admission = await self._begin(job)
        finally:
            self._admitting.discard(job.spool_name)
        self.deferred += admission.retry_after_ms > 0
        return admission

    async def _begin(self, job: UploadJob) -> Admission:
        for other in self._by_spool.values():
            same_place = (other.job.federation, other.job.round, other.job.member) == (
                job.federation,
                job.round,
                job.member,
            )
            rooms_equal = type(other.job.digests) is type(job.digests)
            if same_place and rooms_equal and other.job.digest != job.digest:
                raise Refused(
                    RefusalReason.CONFLICT,
                    f"{job.member} is sending another upload for round {job.round} already",
                )
        slot = self._by_spool.get(job.spool_name)
        if slot is None and self._draining:
            return Admission(retry_after_ms=self._settings.retry_after_ms)
        if slot is not None:
            # The member lost its connection and is back before the server noticed.
            if slot.task is not None:
                slot.superseded = True
                slot.end_stream(Refused(RefusalReason.CONFLICT, "the upload goes on in another stream"))
            async with slot.lock:
                if slot.id not in self._slots:
                    return Admission(retry_after_ms=self._settings.retry_after_ms)
                slot.cut = None
                slot.superseded = False
                return await self._admit(slot)
        if len(self._slots) + len(self._admitting) > self._settings.upload_slots or not self._room_for(job):
            return Admission(retry_after_ms=self._settings.retry_after_ms)
        slot = _Slot(job, os.urandom(16))
        self._slots[slot.id] = self._by_spool[job.spool_name] = slot
        try:
            await self._in_thread(self._take_up, slot)
        except BaseException:
            self._release(slot)
            raise
        async with slot.lock:
            return await self._admit(slot)

    async def _admit(self, slot: _Slot) -> Admission:
        size = self._spool_of(slot).size
        if size < slot.job.total:
            self._await_stream(slot)
            return Admission(slot.id, size)
        # Every byte came before its stream or the server broke off: only the end is missing.
        finishing = asyncio.create_task(self._finish_and_release(slot))
        await asyncio.shield(finishing)
        return Admission(done=True)

    async def _finish_and_release(self, slot: _Slot) -> int:
        try:
            return await self._finish(slot)
        finally:
            if slot.spoiled:
                await self._in_thread(self._around.blobs.delete, slot.job.spool_name)
            self._release(slot)

    def _room_for(self, job: UploadJob) -> bool:
        expected = sum(slot.job.total for slot in self._slots.values())
        try:
            free = self._around.blobs.free_bytes()
        except StorageFailed:
            free = 0
        if free - expected < job.total + self._settings.disk_reserve:
            self._log.error("the disk is nearly full: uploads wait", free=free, wanted=job.total)
            return False
        return True

    def _take_up(self, slot: _Slot) -> None:
        """Open the spool, and read what an earlier stream left in it. Blocks."""
        job = slot.job
        spool = self._around.blobs.spool(job.spool_name)
        slot.spool = spool
        try:
            if spool.size > job.total:
                raise Refused(RefusalReason.WRONG_SIZE, "more was sent before than the upload has")
            for start in range(0, spool.size, _READ_BYTES):
                data = spool.read(start, min(_READ_BYTES, spool.size - start))
                job.digests.feed(memoryview(data))
            if spool.size == job.total and not job.digests.matches(job.digest):
                raise Refused(RefusalReason.WRONG_DIGEST, "the bytes aren't those that were announced")
            slot.found = spool.size
        except Refused as refusal:
            # After a power cut a spool may hold anything; that is no fault of the member's.
            self._log.warning("what a broken upload left isn't usable", member=job.member, text=refusal.text)
            spool.close()
            self._around.blobs.delete(job.spool_name)
            job.digests.restart()
            slot.spool = self._around.blobs.spool(job.spool_name)

    @staticmethod
    def _spool_of(slot: _Slot) -> Spool:
        assert slot.spool is not None
        return slot.spool

    def _await_stream(self, slot: _Slot) -> None:
        """A slot that nobody uses is given to someone else."""
        if slot.idle is not None:
            slot.idle.cancel()
        when = self._around.clock.now_ms() + int(1000 * self._settings.stall_seconds)
        slot.idle = self._around.clock.call_at(when, lambda: self._expire(slot))

    def _expire(self, slot: _Slot) -> None:
        if slot.task is None and not slot.lock.locked():
            self._release(slot)

    def _release(self, slot: _Slot) -> None:
        if slot.idle is not None:
            slot.idle.cancel()
        if slot.spool is not None:
            slot.spool.close()
        self._slots.pop(slot.id, None)
        if not self._slots:
            self._emptied.set()
        if self._by_spool.get(slot.job.spool_name) is slot:
            del self._by_spool[slot.job.spool_name]

    def end_round(self, federation: bytes, number: int) -> None:
        """The round takes no more uploads: end its streams, forget its slots."""
        for slot in list(self._slots.values()):
            if (slot.job.federation, slot.job.round) == (federation, number):
                self._end(slot, Refused(RefusalReason.CLOSED, f"uploads of round {number} are closed"))

    def members(self, federation: bytes) -> frozenset[str]:
        """Members of a federation that hold a slot."""
        return frozenset(s.job.member for s in self._slots.values() if s.job.federation == federation)

    def end_member(self, federation: bytes, member: str) -> None:
        """The member was removed: end its streams."""
        for slot in list(self._slots.values()):
            if (slot.job.federation, slot.job.member) == (federation, member):
                self._end(slot, Refused(RefusalReason.UNKNOWN_MEMBER, f"{member} was removed"))

    def _end(self, slot: _Slot, refusal: Refused) -> None:
        slot.end_stream(refusal)
        if slot.task is None and not slot.lock.locked():
            self._release(slot)

    async def stream(self, federation: bytes, member: str, messages: AsyncIterator[UploadChunk]) -> int:
        """Take a stream of chunks to its end; bytes committed. Raises `Refused`."""
        try:
            first = await asyncio.wait_for(anext(messages), self._settings.stall_seconds)
        except StopAsyncIteration:
            raise Refused(RefusalReason.WRONG_SIZE, "the upload stream is empty") from None
        except TimeoutError:
            raise Refused(RefusalReason.LIMIT, "the upload stream sent nothing; begin again") from None
        slot = self._slots.get(first.upload_id)
        if slot is None or (slot.job.federation, slot.job.member) != (federation, member):
            raise Refused(RefusalReason.WRONG_OFFSET, "there is no such upload slot (any more); begin again")
        if slot.lock.locked():
            raise Refused(RefusalReason.CONFLICT, "another stream uses this upload slot; begin again")
        async with slot.lock:
            if slot.idle is not None:
                slot.idle.cancel()
            slot.job.busy(True)
            try:
                return await self._receive(slot, first, messages)
            finally:
                slot.job.busy(False)

    async def _receive(self, slot: _Slot, first: UploadChunk, messages: AsyncIterator[UploadChunk]) -> int:
        task = asyncio.current_task()
        assert task is not None
        slot.task = task
        watch = _RateWatch(slot, self._settings, self._around)
        finishing: asyncio.Task[int] | None = None
        try:
            try:
                await self._take_chunks(slot, first, messages, watch)
            except asyncio.CancelledError:
                if slot.cut is None:
                    raise
                task.uncancel()
                raise slot.cut from None
            finally:
                watch.stop()
                slot.task = None
                await self._keep_what_came(slot)
            # A member that hangs up now is acknowledged by its next BeginUpload.
            finishing = asyncio.create_task(self._finish(slot))
            return await asyncio.shield(finishing)
        finally:
            if finishing is not None:
                await asyncio.wait({finishing})
            if slot.spoiled:
                await self._in_thread(self._around.blobs.delete, slot.job.spool_name)
            given_up = slot.spoiled or slot.broken or finishing is not None
            if given_up or (slot.cut is not None and not slot.superseded):
                self._release(slot)
            else:
                # It broke off in between: the member gets a while to come back to its slot.
                self._await_stream(slot)

    async def _take_chunks(
        self,
        slot: _Slot,
        message: UploadChunk,
        messages: AsyncIterator[UploadChunk],
        watch: "_RateWatch",
    ) -> None:
        job = slot.job
        expected = self._spool_of(slot).size
        while True:
            offset = message.offset
            data = message.data
            if message.upload_id != slot.id:
                raise Refused(RefusalReason.CONFLICT, "a stream belongs to one upload")
            if not data or len(data) > CHUNK_BYTES:
                raise Refused(RefusalReason.WRONG_SIZE, f"a chunk has between 1 and {CHUNK_BYTES} bytes")
            if offset != expected:
                raise Refused(RefusalReason.WRONG_OFFSET, f"a chunk is at {offset}, but {expected} is next")
            if expected + len(data) > job.total:
                raise Refused(
                    RefusalReason.WRONG_SIZE, f"the stream is longer than the {job.total} bytes agreed"
                )
            expected += len(data)
            watch.received += len(data)
            if job.digests.blocks:
                slot.unchecked.append(data)
            else:
                self._feed(slot, data)
            # Copied and let go at once: gRPC puts the next chunk into the same, still cached memory.
            while data.nbytes:
                stage = self._stage(slot)
                data = stage.put(data)
                if stage.full:
                    await self._written(slot)
                    self._start_writing(slot)
            del message, data
            try:
                message = await anext(messages)
            except StopAsyncIteration:
                break
        await self._written(slot)
        self._start_writing(slot)
        await self._written(slot)
        if expected != job.total:
            raise Refused(
                RefusalReason.WRONG_SIZE,
                f"the stream ended at {expected} of {job.total} bytes; go on from there",
            )

    def _stage(self, slot: _Slot) -> Stage:
        if slot.filling is None:
            # Behind a stage that is being written, and thus was full, a block begins.
            begin = self._spool_of(slot).size % BLOCK if slot.writing is None else 0
            slot.filling = Stage(begin)
        return slot.filling

    def _start_writing(self, slot: _Slot) -> None:
        stage, slot.filling = slot.filling, None
        if stage is not None:
            unchecked, slot.unchecked = slot.unchecked, []
            slot.writing = self._in_thread(self._write, slot, stage, unchecked)

    async def _written(self, slot: _Slot) -> None:
        if slot.writing is not None:
            # Shielded: a cancelled stream must not leave a write behind that nobody waits for.
            await asyncio.shield(slot.writing)
            slot.writing = None

    async def _keep_what_came(self, slot: _Slot) -> None:
        """Write what is waiting, so that a stream that broke goes on exactly where it ended."""
        if slot.writing is not None:
            await asyncio.wait({slot.writing})
            slot.writing = None
        self._start_writing(slot)
        if slot.writing is not None:
            await asyncio.wait({slot.writing})
            failed, slot.writing = slot.writing.exception(), None
            if failed is not None:
                self._log.info("the end of a broken stream wasn't kept", error=type(failed).__name__)

    def _write(self, slot: _Slot, stage: Stage, unchecked: list[memoryview]) -> None:
        try:
            if slot.spoiled or slot.broken:
                return
            try:
                self._spool_of(slot).write(stage)
            except StorageFailed:
                slot.broken = True
                raise
        finally:
            stage.release()
        for chunk in unchecked:
            self._feed(slot, chunk)

    @staticmethod
    def _feed(slot: _Slot, chunk: memoryview) -> None:
        try:
            slot.job.digests.feed(chunk)
        except Refused:
            slot.spoiled = True
            raise

    async def _finish(self, slot: _Slot) -> int:
        job = slot.job
        if not job.digests.matches(job.digest):
            slot.spoiled = True
            if slot.found:
                raise Refused(RefusalReason.WRONG_OFFSET, "what a broken upload left is damaged; begin again")
            raise Refused(
                RefusalReason.WRONG_DIGEST, "the bytes aren't those that were announced; send them again"
            )
        spool = self._spool_of(slot)
        blobs = self._around.blobs
        await self._in_thread(blobs.keep, spool, job.spool_name, job.blob_name)
        try:
            await job.commit(job.digests.frames)
        except Refused:
            await self._in_thread(blobs.delete, job.blob_name)
            raise
        return job.total

    async def drain(self) -> None:
        """Admit nothing new, and wait until every upload that was admitted has ended."""
        self._draining = True
        self._emptied.clear()
        if self._slots:
            await self._emptied.wait()

    def close(self) -> None:
        """End every stream; spools stay for a later resume."""
        for slot in list(self._slots.values()):
            slot.end_stream(Refused(RefusalReason.LIMIT, "the aggregator is shutting down; go on later"))
            if slot.task is None:
                self._release(slot)


class _RateWatch:
    """Ends a stream that doesn't move its minimum within each window."""

    def __init__(self, slot: _Slot, settings: AggregatorSettings, around: Surroundings) -> None:
        self._slot = slot
        self._around = around
        self._window_ms = int(1000 * settings.stall_seconds)
        self._minimum = settings.upload_minimum_rate * settings.stall_seconds
        self.received = 0
        self._timer = self._next()

    def _next(self) -> Timer:
        return self._around.clock.call_at(self._around.clock.now_ms() + self._window_ms, self._look)

    def _look(self) -> None:
        if self.received < self._minimum:
            self._slot.end_stream(
                Refused(RefusalReason.LIMIT, "the upload stalled; begin again where it stopped")
            )
            return
        self.received = 0
        self._timer = self._next()

    def stop(self) -> None:
        self._timer.cancel()
