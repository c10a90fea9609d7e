"""One running round: the scheme's machine in memory, and the log from which it is rebuilt.

The machine is a function of the accepted replies in order and the closes between them. So a reply is
accepted in memory, its row committed, and only then acknowledged; a step is closed by committing a close
row behind all replies, and only then in memory. After a crash, or a commit that failed, the machine is
built again from the rows. Nothing that hangs on a row leaves the server before the row is durable.
"""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from blindsum.aggregator.clock import Clock
from blindsum.aggregator.folding import DIGEST_BYTES, Folder, RoundArithmetic, StoredDamage, blob_prefix
from blindsum.aggregator.native_workers import NativeWorkers, worker_terms
from blindsum.aggregator.round_header import step_seconds
from blindsum.aggregator.store.blobs import BlobStore
from blindsum.aggregator.store.records import (
    CloseRecord,
    ConclusionRecord,
    ContributionRecord,
    ReplyRecord,
    RevocationRecord,
    RoundRecord,
    SeedRecord,
)
from blindsum.aggregator.store.state import Change, Delete, Insert, StateStore
from blindsum.crypto.errors import BlindsumError, RefusalReason, Refused
from blindsum.crypto.schemes.base import AggregatorRound, RoundTerms, Scheme, upload_digest
from blindsum.crypto.trust.plan import Plan

OPEN, PUBLISHED, CONCLUDED, ABORTED = "open", "published", "concluded", "aborted"


@dataclass
class AcceptedReply:
    """A reply of this process or of the log: its digest, and the commit that it waits for, if any."""

    digest: bytes
    commit: "asyncio.Future[None] | None" = None


@dataclass(frozen=True)
class Surroundings:
    """What every round of a server works with."""

    store: StateStore
    blobs: BlobStore
    clock: Clock
    executor: Executor
    workers: NativeWorkers
    fold_batch: int


class RoundRun:
    """A round that isn't over, or that is over but still listened to (late conclusions)."""

    def __init__(
        self,
        record: RoundRecord,
        terms: RoundTerms,
        roster_body: bytes,
        plan: Plan,
        scheme: Scheme,
        around: Surroundings,
        changed: Callable[[str | None], None],
    ) -> None:
        self.record = record
        self.terms = terms
        self.plan = plan
        self.scheme = scheme
        self.failure: BlindsumError | None = None
        """Why the round can't go on: damage on disk, or a commit that failed."""
        self.stale = False
        """A commit failed: what is in memory isn't what is stored."""
        self.revoked: frozenset[str] = frozenset()
        self.conclusions: dict[str, ConclusionRecord] = {}
        self._roster_body = roster_body
        self._around = around
        self._changed = changed
        self._sequence = 0
        self._replies: dict[tuple[str, str], AcceptedReply] = {}
        self._uploads: dict[str, bytes] = {}
        self._commits: set[asyncio.Future[None]] = set()
        self._seeds_committing: set[bytes] = set()
        self._closing = False
        self._last_close_ms = record.opened_ms
        self._settled = asyncio.Event()
        self._settled.set()
        self._excluded = frozenset(filter(None, record.excluded.split(" ")))
        self.machine: AggregatorRound = scheme.aggregator(terms, self._excluded)
        self.layout = self.machine.layout
        self.arithmetic = RoundArithmetic(
            self.machine, around.workers, worker_terms(terms, roster_body), around.executor
        )
        self.folder = self._new_folder()

    @property
    def number(self) -> int:
        """The round's number."""
        return self.record.number

    @property
    def federation(self) -> bytes:
        """The federation's id."""
        return self.record.federation

    @property
    def step(self) -> str | None:
        """The open step."""
        return self.machine.step if self.record.state == OPEN else None

    @property
    def first_step(self) -> str:
        """The step in which members come in."""
        return self.scheme.steps[0]

    @property
    def deadline_ms(self) -> int:
        """When the open step closes, or the conclusion is due; a reply at this very millisecond is late."""
        if self.record.state == PUBLISHED:
            return self.record.published_ms + 1000 * step_seconds(self.plan, "conclude")
        step = self.step
        return 0 if step is None else self._last_close_ms + 1000 * step_seconds(self.plan, step)

    @property
    def settled(self) -> bool:
        """False while the machine is being moved or rebuilt."""
        return self._settled.is_set()

    def _new_folder(self) -> Folder:
        return Folder(
            self.federation,
            self.number,
            self.layout,
            self.arithmetic,
            self._around.store,
            self._around.blobs,
            self._around.fold_batch,
            self._folding_failed,
        )

    def _folding_failed(self, error: BlindsumError) -> None:
        self.failure = self.failure or error
        self._changed(None)

    # Members' calls

    async def wait_settled(self) -> None:
        """Wait while the machine is being moved."""
        # Between its setting and this task's turn it may have been cleared again.
        while not self._settled.is_set():
            await self._settled.wait()

    def is_asked(self, member: str) -> bool:
        """Whether the open step waits for this member's reply."""
        if self.step is None or not self.settled or self._closing or member in self.revoked:
            return False
        machine = self.machine
        if member not in machine.participants or member in machine.replied:
            return False
        return self.step != self.first_step or len(machine.replied) < self.terms.bound.header.n_max

    def takes_part(self, member: str) -> bool:
        """Whether the member's reply to the first step was accepted."""
        return (self.first_step, member) in self._replies

    async def request(self, member: str, step: str) -> bytes:
        """The open step's request for a member. Raises `Refused`."""
        await self.wait_settled()
        self._require_open(member, step)
        return self.machine.request(member)

    def _require_open(self, member: str, step: str) -> None:
        if step not in self.scheme.steps:
            raise Refused(RefusalReason.WRONG_STEP, f"{self.plan.scheme} has no step {step!r:.40}")
        if self.record.state != OPEN or self.step is None:
            raise Refused(RefusalReason.CLOSED, f"round {self.number} takes no more replies")
        if member in self.revoked:
            raise Refused(RefusalReason.UNKNOWN_MEMBER, f"{member} was removed while round {self.number} ran")
        if self.step != step:
            earlier = self.scheme.steps.index(step) < self.scheme.steps.index(self.step)
            reason = RefusalReason.CLOSED if earlier else RefusalReason.WRONG_STEP
            raise Refused(reason, f"{self.step} is open in round {self.number}, not {step}")
        if self._closing or self._around.clock.now_ms() >= self.deadline_ms:
            raise Refused(RefusalReason.CLOSED, f"{step} of round {self.number} is closed")
        if member not in self.machine.participants:
            raise Refused(
                RefusalReason.NOT_A_PARTICIPANT, f"{member} isn't asked in {step} of round {self.number}"
            )

    def _require_room(self, member: str) -> None:
        header = self.terms.bound.header
        if self.step == self.first_step and len(self.machine.replied - {member}) >= header.n_max:
            raise Refused(RefusalReason.LIMIT, f"round {self.number} has its {header.n_max} members")

    async def _known(self, member: str, step: str, reply: bytes) -> bool:
        known = self._replies.get((step, member))
        if known is None:
            return False
        if known.digest != hashlib.sha256(reply).digest():
            raise Refused(
                RefusalReason.CONFLICT,
                f"{member} gave another reply to {step} of round {self.number}; the first one counts",
            )
        if known.commit is not None:
            await asyncio.shield(known.commit)
        return True

    async def answer(self, member: str, step: str, reply: bytes) -> bool:
        """Accept a reply to a message step; True if it was there already. Returns once it is durable."""
        await self.wait_settled()
        if await self._known(member, step, reply):
            return True
        self._require_open(member, step)
        self._require_room(member)
        if step == "upload" and self.machine.check_reply(member, reply):
            raise Refused(RefusalReason.WRONG_STEP, "bulk goes with this reply: begin an upload with it")
        await self._accept(member, step, reply)
        return False

    async def check_upload(self, member: str, reply: bytes) -> bool:
        """Whether the upload that goes with this reply is committed already. Raises `Refused`."""
        await self.wait_settled()
        if await self._known(member, "upload", reply):
            return True
        self._require_open(member, "upload")
        self._require_room(member)
        if not self.machine.check_reply(member, reply):
            raise Refused(RefusalReason.WRONG_STEP, "a complaint carries no bulk: answer the step with it")
        return False

    async def accept_upload(
        self, member: str, reply: bytes, digest: bytes, frames: bytes, seeds: Sequence[bytes] = ()
    ) -> bool:
        """Accept an upload whose bulk is durable; True if it was there already.

        `seeds` are digests of the seeds in its ciphertexts, refused if one was seen under the HE key.
        """
        await self.wait_settled()
        if await self._known(member, "upload", reply):
            return True
        self._require_open(member, "upload")
        self._require_room(member)
        he_key = self.terms.bound.header.he_key
        rows = [SeedRecord(self.federation, he_key, seed) for seed in seeds]
        if (
            len(set(seeds)) != len(rows)
            or not self._seeds_committing.isdisjoint(seeds)
            or any(self._around.store.get(SeedRecord, self.federation, he_key, seed) for seed in seeds)
        ):
            raise Refused(
                RefusalReason.REPLAY,
                f"{member} encrypted with randomness that was used before under this key; "
                "is it a cloned machine?",
            )
        record = ContributionRecord(self.federation, self.number, member, digest, frames)
        await self._accept(member, "upload", reply, record, rows)
        return False

    async def _accept(
        self,
        member: str,
        step: str,
        reply: bytes,
        contribution: ContributionRecord | None = None,
        seeds: Sequence[SeedRecord] = (),
    ) -> None:
        # Accepting may verify signatures that were already verified; a refusal changes nothing.
        if not self.machine.accept(member, reply):
            raise Refused(RefusalReason.REPLAY, f"{member} has replied to {step} already")
        self._sequence += 1
        row = ReplyRecord(self.federation, self.number, step, member, self._sequence, reply)
        changes: list[Change] = [Insert(row), *map(Insert, seeds)]
        if contribution is not None:
            changes.append(Insert(contribution))
        commit = self._around.store.commit(*changes)
        self._replies[step, member] = AcceptedReply(hashlib.sha256(reply).digest(), commit)
        self._commits.add(commit)
        committing = {row.seed for row in seeds}
        self._seeds_committing |= committing
        commit.add_done_callback(lambda _: self._seeds_committing.difference_update(committing))
        commit.add_done_callback(lambda done: self._committed(done, member, contribution))
        await asyncio.shield(commit)

    def _committed(
        self, commit: "asyncio.Future[None]", member: str, contribution: ContributionRecord | None
    ) -> None:
        # Runs before anyone who waits for the commit, so that a rebuild finds the folder complete.
        self._commits.discard(commit)
        if commit.cancelled() or commit.exception() is not None:
            self.stale = True
        elif contribution is not None:
            self.folder.add(contribution)
        self._changed(member)

    # The engine's calls

    async def close_step(self) -> None:
        """Close the open step: durable first, then in memory."""
        step = self.step
        assert step is not None
        self._closing = True
        try:
            while self._commits:
                await asyncio.wait(set(self._commits))
            if self.stale:
                return
            now = self._around.clock.now_ms()
            self._sequence += 1
            row = CloseRecord(self.federation, self.number, step, self._sequence, now)
            await self._around.store.commit(Insert(row))
            self._settled.clear()
            self._last_close_ms = now
            # Rebuilding secrets from shares takes its time in large cohorts.
            await asyncio.get_running_loop().run_in_executor(self._around.executor, self.machine.close)
        finally:
            self._closing = False
            self._settled.set()

    async def revoke(self, members: frozenset[str]) -> None:
        """Members left the federation: dropouts, unless their contribution must stay.

        Raises `BlindsumError` (the round has to be aborted) when an upload is part of the sum already
        although the survivor set is still open.
        """
        step = self.step
        if step is None:
            return
        before_survivors = step in (self.first_step, "upload")
        # Others' calls wait meanwhile; nothing is closed.
        self._settled.clear()
        try:
            while self._commits:
                await asyncio.wait(set(self._commits))
            for member in sorted(members - self.revoked):
                withdrawn = before_survivors and member in self.machine.replied
                if withdrawn and step == "upload" and not await self.folder.withdraw(member):
                    raise BlindsumError(f"{member} was removed after its upload had been added")
                self._sequence += 1
                key = (("federation", self.federation), ("round", self.number), ("member", member))
                changes: list[Change] = [
                    Insert(
                        RevocationRecord(
                            self.federation, self.number, member, step if withdrawn else "", self._sequence
                        )
                    )
                ]
                if withdrawn and step == "upload":
                    changes.append(Delete(ContributionRecord, key))
                await self._around.store.commit(*changes)
            await self.rebuild()
        finally:
            self._settled.set()

    async def rebuild(self, first: bool = False) -> None:
        """Build the machine again from the log: after a restart (`first`), a failed commit, a revocation.

        Raises `StoredDamage` when uploads aren't those that their members signed.
        """
        self._settled.clear()
        try:
            while self._commits:
                await asyncio.wait(set(self._commits))
            if self.folder.generation or self.folder.waiting:
                # A batch that runs belongs to the folder that is given up.
                await self.folder.stop()
            loop = asyncio.get_running_loop()
            self.folder = self._new_folder()
            self.machine = await loop.run_in_executor(self._around.executor, self._replay)
            stored = self._around.store.get(RoundRecord, self.federation, self.number)
            assert stored is not None
            self.record = stored
            if self.record.state == OPEN:
                self._check_contributions()
                await loop.run_in_executor(self._around.executor, self.folder.restore, first)
            self.conclusions = {
                row.member: row
                for row in sorted(
                    self._around.store.find(ConclusionRecord, federation=self.federation, round=self.number),
                    key=lambda row: row.sequence,
                )
            }
            self.stale = False
        finally:
            self._settled.set()

    def _replay(self) -> AggregatorRound:
        store = self._around.store
        key: dict[str, bytes | int] = {"federation": self.federation, "round": self.number}
        revocations = {row.member: row for row in store.find(RevocationRecord, **key)}
        rows: list[ReplyRecord | CloseRecord | RevocationRecord] = [
            *store.find(ReplyRecord, **key),
            *store.find(CloseRecord, **key),
            *revocations.values(),
        ]
        rows.sort(key=lambda row: row.sequence)
        machine = self.scheme.aggregator(self.terms, self._excluded)
        # A published round has all it needs in its record.
        live = self.record.state == OPEN
        replies: dict[tuple[str, str], AcceptedReply] = {}
        self._uploads = {}
        self._last_close_ms = self.record.opened_ms
        for row in rows:
            if isinstance(row, CloseRecord):
                self._last_close_ms = row.at_ms
                if live:
                    machine.close()
            elif isinstance(row, ReplyRecord):
                withdrawn = revocations.get(row.member)
                if withdrawn is None or withdrawn.step != row.step:
                    if live:
                        machine.accept(row.member, row.body)
                    replies[row.step, row.member] = AcceptedReply(hashlib.sha256(row.body).digest())
                    if row.step == "upload":
                        self._uploads[row.member] = row.body
        self._sequence = rows[-1].sequence if rows else 0
        self._replies = replies
        self.revoked = frozenset(revocations)
        return machine

    def _check_contributions(self) -> None:
        """Compare the rows of uploads with what their members signed: a swapped row is found here."""
        machine = self.machine
        if machine.abort is not None:
            return
        found = self._around.store.find(ContributionRecord, federation=self.federation, round=self.number)
        if {row.member for row in found} != set(self._uploads):
            raise StoredDamage(f"the uploads of round {self.number} aren't those that were accepted")
        for row in found:
            digests = [row.frames[i : i + DIGEST_BYTES] for i in range(0, len(row.frames), DIGEST_BYTES)]
            promised = machine.expected_digest(self._uploads[row.member])
            if not promised == row.digest == upload_digest(machine.h1, digests):
                raise StoredDamage(f"the digests of {row.member}'s upload aren't those that it signed")

    async def publish(self) -> RoundRecord:
        """Fold what is left and write the published sum; the record to commit with it."""
        survivors = self.machine.survivors
        await self.folder.finish(survivors)
        total = await asyncio.get_running_loop().run_in_executor(
            self._around.executor, self.folder.publish, self.machine
        )
        return replace(
            self.record,
            version=self.record.version + 1,
            state=PUBLISHED,
            h1=self.machine.h1,
            survivors=" ".join(survivors),
            result=self.machine.result(),
            result_total=total,
            published_ms=self._around.clock.now_ms(),
        )

    @property
    def survivors(self) -> tuple[str, ...]:
        """The survivor set of a published round, in roster order."""
        return tuple(filter(None, self.record.survivors.split(" ")))

    def drop_blobs(self, rooms: tuple[str, ...]) -> None:
        """Delete the round's blobs in these rooms. Blocks."""
        prefix = blob_prefix(self.federation, self.number)
        for room in rooms:
            for name in self._around.blobs.names(room):
                if name.startswith(f"{room}/{prefix}"):
                    self._around.blobs.delete(name)
