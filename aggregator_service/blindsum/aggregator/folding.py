"""From accepted uploads to the sum: the accept log and its folded checkpoint (stack.md).

Accepted contributions are added in batches. A batch makes a new file `sum.<generation + 1>` out of the
old one and the batch, frame by frame, so that memory holds one frame of the sum and one contribution's
frame at a time. Every frame read from disk is compared with the digest that was committed with it, before
it is added. One transaction then moves the round's generation and the membership; only after it the
folded files go away. A crash anywhere leaves the old generation with its uploads, or the new one.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import replace

from blindsum.aggregator.frame_tags import FrameTags
from blindsum.aggregator.native_workers import NativeWorkers, Terms
from blindsum.aggregator.store.blobs import BlobStore, Reader
from blindsum.aggregator.store.records import ContributionRecord, SumRecord
from blindsum.aggregator.store.state import Change, Delete, Insert, Put, StateStore, StorageFailed
from blindsum.aggregator.structured_logs import logger
from blindsum.crypto.errors import BlindsumError
from blindsum.crypto.schemes.base import AggregatorRound, BulkLayout, FrameArithmetic, frame_digest

DIGEST_BYTES = 32


class StoredDamage(BlindsumError):
    """A stored contribution or sum isn't what was committed; it is never summed."""


class RoundArithmetic:
    """Frame arithmetic of one round, in this process or in workers where it is native."""

    def __init__(
        self, machine: AggregatorRound, workers: NativeWorkers, terms: Terms, executor: Executor
    ) -> None:
        self._here: FrameArithmetic = machine.arithmetic()
        self._workers = workers
        self._terms = terms
        self.executor = executor
        self.native = self._here.native
        self.tags = FrameTags()

    def check(self, index: int, frame: bytes | memoryview) -> None:
        """Strict parse of frame `index`. Raises `Refused`. Blocks."""
        if self.native:
            self._workers.check(self._terms, index, bytes(frame))
        else:
            self._here.check(index, frame)

    def seeds(self, index: int, frame: bytes | memoryview) -> tuple[bytes, ...]:
        """Digests of the seeds in frame `index` that must never come twice under a key; none in masking."""
        find = getattr(self._here, "seeds", None)
        return () if find is None else tuple(find(index, bytes(frame)))

    def add_all(self, index: int, total: bytes | None, frames: Iterator[bytes]) -> bytes | bytearray:
        """Frame `index` of the sum with every one of `frames`. Blocks."""
        if self.native:
            return self._workers.add(self._terms, index, total, list(frames))
        running = None if total is None else bytearray(total)
        for frame in frames:
            running = self._here.add(index, running, frame)
        assert running is not None
        return running


def blob_prefix(federation: bytes, number: int) -> str:
    """What names of a round's blobs start with, after the room."""
    return f"{federation.hex()[:32]}.{number}."


def contribution_name(federation: bytes, number: int, member: str, digest: bytes) -> str:
    """Where an accepted upload lies; the digest keeps a different upload from replacing it.

    While it comes, it has the same name in the room `spool`.
    """
    return f"contribution/{blob_prefix(federation, number)}{member}.{digest.hex()}"


def sum_name(federation: bytes, number: int, generation: int) -> str:
    """Where a generation of the sum lies."""
    return f"sum/{blob_prefix(federation, number)}{generation}"


def result_name(federation: bytes, number: int) -> str:
    """Where the published sum lies."""
    return f"result/{blob_prefix(federation, number)}published"


class Folder:
    """The sum of one round. Its batches run one after the other in worker threads."""

    def __init__(
        self,
        federation: bytes,
        number: int,
        layout: BulkLayout,
        arithmetic: RoundArithmetic,
        store: StateStore,
        blobs: BlobStore,
        batch: int,
        failed: Callable[[BlindsumError], None],
    ) -> None:
        self._federation = federation
        self._number = number
        self._layout = layout
        self._arithmetic = arithmetic
        self._store = store
        self._blobs = blobs
        self._batch = batch
        self._failed = failed
        self._waiting: list[ContributionRecord] = []
        self._members: list[str] = []
        self._generation = 0
        self._sum: SumRecord | None = None
        self._turn = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._log = logger(part="folding", federation=federation.hex()[:16], round=number)

    @property
    def generation(self) -> int:
        """The committed generation of the sum; 0 is the empty sum."""
        return self._generation

    @property
    def folded(self) -> frozenset[str]:
        """Who is part of the committed sum."""
        return frozenset(self._members)

    @property
    def waiting(self) -> frozenset[str]:
        """Who is accepted but not yet part of the sum."""
        return frozenset(record.member for record in self._waiting)

    def restore(self, first: bool) -> None:
        """Take up the committed sum and what isn't folded yet; `first`: in this process. Blocks.

        Uploads without a row are then in the spool again: nobody was told that they are here, but what came
        needn't come twice. Later on they are left alone, for their commits may be on the way.

        Raises `StoredDamage` when the sum and its members don't belong together.
        """
        sums = self._store.find(SumRecord, federation=self._federation, round=self._number)
        if sums:
            self._sum = sums[-1]
            self._generation = self._sum.generation
        for record in self._store.find(ContributionRecord, federation=self._federation, round=self._number):
            if record.folded is None:
                self._waiting.append(record)
            else:
                self._members.append(record.member)
        if sorted(self._members) != sorted(filter(None, sums[-1].members.split(" ") if sums else [])):
            raise StoredDamage("the stored sum isn't that of the uploads that are marked as its members")
        if first:
            self._clean_up()

    def _clean_up(self) -> None:
        kept = sum_name(self._federation, self._number, self._generation) if self._generation else ""
        prefix = blob_prefix(self._federation, self._number)
        for name in self._blobs.names("sum"):
            if name.startswith(f"sum/{prefix}") and name != kept:
                self._blobs.delete(name)
        waiting = {self._contribution(record) for record in self._waiting}
        for name in self._blobs.names("contribution"):
            if not name.startswith(f"contribution/{prefix}") or name in waiting:
                continue
            member = name.removeprefix(f"contribution/{prefix}").rpartition(".")[0]
            if member in self._members:
                self._blobs.delete(name)
            else:
                self._blobs.reopen(name, "spool/" + name.removeprefix("contribution/"))

    def _contribution(self, record: ContributionRecord) -> str:
        return contribution_name(self._federation, self._number, record.member, record.digest)

    def add(self, record: ContributionRecord) -> None:
        """Queue a committed contribution; a full batch starts folding in the background."""
        self._waiting.append(record)
        if len(self._waiting) >= self._batch and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._fold_in_background())

    async def stop(self) -> None:
        """Fold no more; returns once no batch runs."""
        self._waiting.clear()
        if self._task is not None and not self._task.done():
            await asyncio.wait({self._task})

    async def withdraw(self, member: str) -> bool:
        """Leave out a member whose contribution isn't folded yet; False if it is part of the sum."""
        async with self._turn:
            if member in self._members:
                return False
            self._waiting = [record for record in self._waiting if record.member != member]
            return True

    async def _fold_in_background(self) -> None:
        try:
            while len(self._waiting) >= self._batch:
                await self._fold(self._batch)
        except StorageFailed as error:
            # Nothing is lost: the next upload or the end of the round tries again.
            self._log.error("uploads can't be added up at the moment", text=str(error))
        except BlindsumError as error:
            self._failed(error)

    async def finish(self, survivors: tuple[str, ...]) -> None:
        """Fold all that waits. Raises `StoredDamage`, also when the members aren't exactly the survivors."""
        if self._task is not None:
            await asyncio.wait({self._task})
        while self._waiting:
            await self._fold(self._batch)
        if sorted(self._members) != sorted(survivors):
            raise StoredDamage("the members in the sum aren't the survivors")

    async def _fold(self, most: int) -> None:
        async with self._turn:
            batch = self._waiting[:most]
            if not batch:
                return
            loop = asyncio.get_running_loop()
            following = await loop.run_in_executor(self._arithmetic.executor, self._write_sum, batch)
            where = (("federation", self._federation), ("round", self._number))
            changes: list[Change] = [Delete(SumRecord, where), Insert(following)]
            changes += [Put(replace(record, folded=following.generation)) for record in batch]
            await self._store.commit(*changes)
            old = self._generation
            self._sum = following
            self._generation = following.generation
            self._members += [record.member for record in batch]
            del self._waiting[: len(batch)]
            await loop.run_in_executor(self._arithmetic.executor, self._drop, old, batch)

    def _drop(self, old: int, batch: list[ContributionRecord]) -> None:
        try:
            if old:
                self._blobs.delete(sum_name(self._federation, self._number, old))
            for record in batch:
                self._blobs.delete(self._contribution(record))
        except StorageFailed as error:
            # They go with the round.
            self._log.error("uploads that were added up can't be deleted", text=str(error))

    def _write_sum(self, batch: list[ContributionRecord]) -> SumRecord:
        layout = self._layout
        for record in batch:
            if len(record.frames) != layout.frames * DIGEST_BYTES:
                raise StoredDamage(f"the frame digests of {record.member} are damaged")
        digests: list[bytes] = []

        def frames_of_sum() -> Iterator[bytes | bytearray]:
            for index in range(layout.frames):
                total = self._arithmetic.add_all(
                    index,
                    None if base is None else self._sum_frame(base, index),
                    self._frames(readers, batch, index),
                )
                if len(total) != layout.sum_bytes(index):
                    raise StoredDamage(f"frame {index} of the sum has {len(total)} bytes")
                digests.append(frame_digest(total))
                yield total

        with contextlib.ExitStack() as opened:
            base: Reader | None = None
            try:
                if self._generation:
                    name = sum_name(self._federation, self._number, self._generation)
                    base = opened.enter_context(self._blobs.open(name, once=True))
                readers = [
                    opened.enter_context(self._blobs.open(self._contribution(r), once=True)) for r in batch
                ]
            except StorageFailed as error:
                raise StoredDamage(f"an accepted upload or the sum is gone: {error}") from error
            following = self._generation + 1
            self._blobs.write(sum_name(self._federation, self._number, following), frames_of_sum())
        members = " ".join([*self._members, *(record.member for record in batch)])
        return SumRecord(self._federation, self._number, following, b"".join(digests), members)

    def _frames(self, readers: list[Reader], batch: list[ContributionRecord], index: int) -> Iterator[bytes]:
        offset, length = index * self._layout.upload_frame, self._layout.upload_bytes(index)
        for reader, record in zip(readers, batch, strict=True):
            try:
                frame = reader.read(offset, length)
            except StorageFailed as error:
                raise StoredDamage(f"the stored upload of {record.member} is cut short") from error
            if not self._is_intact(record, index, frame):
                raise StoredDamage(f"the stored upload of {record.member} is damaged in frame {index}")
            yield frame

    def _is_intact(self, record: ContributionRecord, index: int, frame: bytes) -> bool:
        tags = self._arithmetic.tags.of(record.digest)
        if tags is not None:
            return self._arithmetic.tags.tag(frame) == tags[index]
        return frame_digest(frame) == record.frames[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]

    def _sum_frame(self, reader: Reader, index: int) -> bytes:
        assert self._sum is not None
        try:
            frame = reader.read(index * self._layout.sum_frame, self._layout.sum_bytes(index))
        except StorageFailed as error:
            raise StoredDamage("the stored sum is cut short") from error
        if frame_digest(frame) != self._sum.frames[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]:
            raise StoredDamage(f"the stored sum is damaged in frame {index}")
        return frame

    def publish(self, machine: AggregatorRound) -> int:
        """Write the published sum from the folded one; its size in bytes. Blocks."""

        def finished() -> Iterator[bytes]:
            for index in range(self._layout.frames):
                frame = machine.finish_frame(index, self._sum_frame(reader, index))
                if len(frame) != self._layout.result_bytes(index):
                    raise StoredDamage(f"frame {index} of the published sum has {len(frame)} bytes")
                yield frame

        name = sum_name(self._federation, self._number, self._generation)
        if self._blobs.size(name) is None:
            raise StoredDamage("the stored sum is gone")
        with self._blobs.open(name) as reader:
            self._blobs.write(result_name(self._federation, self._number), finished())
        return self._layout.result_total
