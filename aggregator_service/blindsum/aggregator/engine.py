"""The one round engine for all schemes: when rounds open, steps close, and rounds end.

One engine a federation, one task an engine (`_drive`). Calls of members and the owner change the state
and wake the task; the task decides what follows, does it, and sleeps until the next event or the next
deadline. Nothing polls.

A round opens once enough members are ready; a step closes when all have replied, when those who haven't
are gone and the quorum is there, or at its deadline; after the last step the sum is published, and the
round concludes when more than half of the survivors have signed the same next state and its sealed
checkpoint is durable. Everything else aborts, with a reason, and the next attempt starts from the old
state.
"""

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import replace

from blindsum.aggregator.clock import Timer
from blindsum.aggregator.folding import result_name
from blindsum.aggregator.presence import Presence, WatchStream
from blindsum.aggregator.round_header import DocumentsInForce, next_header, round_terms
from blindsum.aggregator.round_run import ABORTED, CONCLUDED, OPEN, PUBLISHED, RoundRun, Surroundings
from blindsum.aggregator.settings import AggregatorSettings
from blindsum.aggregator.store.records import (
    CheckpointRecord,
    ConclusionRecord,
    DocumentRecord,
    EventRecord,
    FederationRecord,
    RoundFloorRecord,
    RoundRecord,
)
from blindsum.aggregator.store.state import Advance, Append, Change, Insert, Put, StorageFailed
from blindsum.aggregator.structured_logs import logger
from blindsum.crypto.canonical import decode_document
from blindsum.crypto.errors import BlindsumError, PolicyViolation, RefusalReason, Refused
from blindsum.crypto.primitives.derivation import labelled_hash
from blindsum.crypto.primitives.signing import require_signature
from blindsum.crypto.schemes.base import Scheme
from blindsum.crypto.trust import plan as plans
from blindsum.crypto.trust import policy as policies
from blindsum.crypto.trust import roster as rosters
from blindsum.crypto.trust.acceptance import StateClaim, StateSignature, verify_state_signature
from blindsum.crypto.trust.documents import parse_signed
from blindsum.crypto.trust.header import BoundHeader
from blindsum.crypto.trust.plan import Plan

_NOW = -1
"""What the parts of `_advance` return to go on at once."""
_STORAGE_RETRY_MS = 1000
MAX_REFUSAL_TEXT = 500


def chain_of(plan: Plan) -> bytes:
    """Names the chain of training states that a plan continues: its name and its first state."""
    return labelled_hash("state chain", plan.name.encode(), plan.initial_state)


def checkpoint_name(federation: bytes, sealed_digest: bytes) -> str:
    """Where a sealed training state lies."""
    return f"checkpoint/{federation.hex()[:32]}.{sealed_digest.hex()}"


def event(at_ms: int, federation: bytes, kind: str, **detail: object) -> Append:
    """One line for the audit: names, numbers and reasons, never bytes of a message."""
    return Append(EventRecord(at_ms, federation, kind, json.dumps(detail, sort_keys=True)))


def checkpoint_limit(plan: Plan) -> int:
    """The most bytes that a sealed training state of a plan may have: weights, moments, bookkeeping."""
    return 64 * plan.dimension + 8192 * plan.tensors + (1 << 20)


class FederationEngine:
    """The rounds of one federation."""

    def __init__(
        self,
        record: FederationRecord,
        settings: AggregatorSettings,
        around: Surroundings,
        schemes: Callable[[str], Scheme],
        round_closed: Callable[[bytes, int], None],
    ) -> None:
        self.record = record
        self.documents = DocumentsInForce()
        self.state: CheckpointRecord | None = None
        """The newest agreed training state of the plan's chain."""
        self.run: RoundRun | None = None
        """The newest round, also after its end."""
        self.paused = ""
        """Why no round opens, after too many aborts in a row."""
        self._settings = settings
        self._around = around
        self._schemes = schemes
        self._round_closed = round_closed
        self.presence = Presence(around.clock, self.wake)
        self._started_ms = around.clock.now_ms()
        self._last_number = 0
        self._taken_up = 0
        """The round that an earlier process left."""
        self._aborts = 0
        self._draining = False
        self._exclude_next: frozenset[str] = frozenset()
        self._not_before_ms = 0
        self._gathering_since: int | None = None
        self._ready_at_pause: frozenset[str] = frozenset()
        self._epochs: dict[bytes, int] = {}
        self._checkpoint: CheckpointRecord | None = None
        """The published round's sealed state, durable but not agreed on yet."""
        self._keeper = ""
        self._keeper_since_ms = 0
        self._keepers_failed: set[str] = set()
        self.checkpoint_uploads: set[str] = set()
        """Members that upload a checkpoint at this moment."""
        self._awake = asyncio.Event()
        self._timer: Timer | None = None
        self._task: asyncio.Task[None] | None = None
        self._log = logger(part="engine", federation=record.federation.hex()[:16])

    # Life

    @property
    def federation(self) -> bytes:
        """The federation's id."""
        return self.record.federation

    async def start(self) -> None:
        """Take up where the stored state is, and go on."""
        self.load_documents()
        newest = self._rounds()
        floor = self._around.store.get(RoundFloorRecord, self.federation)
        self._last_number = max(newest[-1].number if newest else 0, floor.number if floor else 0)
        for row in reversed(newest):
            if row.state == CONCLUDED:
                break
            if row.state == ABORTED:
                self._aborts += 1
        if newest:
            self._exclude_next = frozenset(filter(None, newest[-1].exclude_next.split(" ")))
            await self._restore_round(newest[-1])
        await self._in_thread(self._clean_up)
        self._task = asyncio.get_running_loop().create_task(self._drive())

    def drain(self) -> None:
        """Let the running round go on, and open no other: the server is shutting down."""
        self._draining = True

    async def stop(self) -> None:
        """Stop deciding; what is running stays as stored."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._timer is not None:
            self._timer.cancel()

    def end_watches(self) -> None:
        """End every watch stream: the server is shutting down."""
        self.presence.end_all()

    def _document(self, digest: bytes) -> bytes:
        found = self._around.store.get(DocumentRecord, self.federation, digest)
        if found is None:
            raise StorageFailed("a document in force is missing from the state; restore a backup")
        return found.body

    def _body(self, digest: bytes) -> bytes:
        return parse_signed(self._document(digest)).body

    def load_documents(self) -> None:
        """Read the documents in force and the newest state of the plan's chain."""
        stored = self._around.store.get(FederationRecord, self.federation)
        assert stored is not None
        self.record = record = stored
        self.documents = DocumentsInForce(
            roster=decode_document(self._body(record.roster), rosters.Roster, "the roster")
            if record.roster
            else None,
            roster_digest=record.roster,
            policy=decode_document(self._body(record.policy), policies.Policy, "the policy")
            if record.policy
            else None,
            policy_digest=record.policy,
            plan=decode_document(self._body(record.plan), plans.Plan, "the plan") if record.plan else None,
            plan_digest=record.plan,
        )
        self.state = self.newest_state()

    def newest_state(self) -> CheckpointRecord | None:
        """The newest agreed state of the plan in force."""
        plan = self.documents.plan
        if plan is None:
            return None
        rows = self._around.store.newest(
            CheckpointRecord, 1, federation=self.federation, chain=chain_of(plan), agreed=1
        )
        return rows[0] if rows else None

    async def _restore_round(self, record: RoundRecord) -> None:
        try:
            bound = BoundHeader.parse(record.header)
        except Refused as error:
            raise StorageFailed(
                f"the stored header of round {record.number} is damaged ({error.text}); restore a backup"
            ) from error
        run = self._make_run(record, bound)
        self.run = run
        self._taken_up = record.number
        try:
            await run.rebuild(first=True)
        except StorageFailed:
            raise
        except BlindsumError as error:
            if record.state == OPEN:
                run.failure = error
            else:
                self._log.error("an ended round can't be read", round=record.number, text=str(error))
        if record.state == PUBLISHED:
            found = self._around.store.find(
                CheckpointRecord, federation=self.federation, chain=record.chain, round=record.number
            )
            self._checkpoint = found[0] if found else None
        if record.state in (OPEN, PUBLISHED) and run.failure is None:
            # The owner may have published in the moment before this server went down.
            in_force = self.documents
            changed = [
                name
                for name, bound_to, now in (
                    ("policy", bound.header.policy, in_force.policy_digest),
                    ("plan", bound.header.plan, in_force.plan_digest),
                )
                if bound_to != now
            ]
            if changed:
                run.failure = BlindsumError(f"the owner published another {changed[0]}")

    def _make_run(self, record: RoundRecord, bound: BoundHeader) -> RoundRun:
        header = bound.header
        roster_body = self._body(header.roster)
        roster = decode_document(roster_body, rosters.Roster, "the roster")
        plan = decode_document(self._body(header.plan), plans.Plan, "the plan")
        he_key = roster.he_key(header.scheme)
        he_public = b"" if he_key is None else self._document(he_key.digest)
        terms = round_terms(bound, roster, he_public)
        scheme = self._schemes(header.scheme)
        return RoundRun(record, terms, roster_body, plan, scheme, self._around, self._run_changed)

    # What wakes the engine

    def wake(self) -> None:
        """Something changed: look again."""
        self._awake.set()

    def _run_changed(self, member: str | None) -> None:
        if member is not None:
            self.presence.notify(member)
        self.wake()

    def open_watch(self, member: str, ready: bool) -> WatchStream:
        """A member's new watch stream."""
        return self.presence.open(member, ready)

    def documents_changed(self) -> None:
        """The owner published: read again, let removed members go, look again."""
        before = self.documents
        self.load_documents()
        self._aborts = 0
        self.paused = ""
        roster = self.documents.roster
        for member in self.presence.members():
            if roster is None or member not in roster.position:
                self.presence.notify(member)
        run = self.run
        if run is not None and run.record.state in (OPEN, PUBLISHED):
            changed = [
                name
                for name, old, new in (
                    ("policy", before.policy_digest, self.documents.policy_digest),
                    ("plan", before.plan_digest, self.documents.plan_digest),
                )
                if old != new
            ]
            if changed and run.failure is None:
                run.failure = BlindsumError(f"the owner published another {changed[0]}")
        self.presence.notify()
        self.wake()

    # The task

    async def _drive(self) -> None:
        while True:
            self._awake.clear()
            try:
                again_ms = await self._advance()
            except StorageFailed as error:
                self._log.error("storage failed; trying again", text=str(error))
                if self.run is not None and self.run.record.state == OPEN:
                    self.run.stale = True
                again_ms = self._around.clock.now_ms() + _STORAGE_RETRY_MS
            except asyncio.CancelledError:
                raise
            except Exception as error:
                self._log.exception("the engine failed", error=type(error).__name__)
                if self.run is not None and self.run.record.state == OPEN:
                    self.run.failure = BlindsumError("the aggregator failed in this round")
                again_ms = self._around.clock.now_ms() + _STORAGE_RETRY_MS
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if again_ms is not None:
                self._timer = self._around.clock.call_at(again_ms, self.wake)
            await self._awake.wait()

    async def _advance(self) -> int | None:
        """Do what is due; when to look again (Unix ms) if nothing happens before."""
        while True:
            run = self.run
            if run is None or run.record.state in (CONCLUDED, ABORTED):
                again = await self._gather()
            elif run.record.state == OPEN:
                again = await self._advance_open(run)
            else:
                again = await self._advance_published(run)
            if again != _NOW:
                return again

    # Between rounds

    def _not_due(self, now: int) -> str:
        """Why no round can open; empty when one can."""
        if self._draining:
            return "the aggregator is shutting down"
        documents, plan = self.documents, self.documents.plan
        if documents.roster is None or documents.policy is None or plan is None:
            return "no plan"
        if self.state is None:
            return "the plan's first state isn't there"
        if self.state.state_round >= plan.rounds:
            return "the plan has run all of its rounds"
        if now // 1000 > min(documents.roster.valid_until, documents.policy.valid_until):
            return "roster or policy has expired; the owner has to renew it"
        if plan.policy != documents.policy_digest:
            return "the plan was made under another policy; the owner has to sign it anew"
        if self.state.roster and self._epoch(self.state.roster) != documents.roster.epoch:
            return "the group key has changed; the owner has to sign the plan anew under it"
        try:
            plan.cohort_floor(documents.policy, len(documents.roster.members))
        except PolicyViolation as violation:
            return str(violation)
        return ""

    def _epoch(self, roster: bytes) -> int:
        """The key epoch of the roster with this digest, under which a training state was agreed on."""
        if roster not in self._epochs:
            self._epochs[roster] = decode_document(self._body(roster), rosters.Roster, "the roster").epoch
        return self._epochs[roster]

    def waits_for(self) -> str:
        """Why no round runs, in words for people; empty while one runs."""
        if self.run is not None and self.run.record.state in (OPEN, PUBLISHED):
            return ""
        documents, plan = self.documents, self.documents.plan
        reason = self._not_due(self._around.clock.now_ms()) or self.paused
        if reason or documents.roster is None or documents.policy is None or plan is None:
            return reason
        floor = plan.cohort_floor(documents.policy, len(documents.roster.members))
        ready = len(self.eligible())
        return f"{ready} of at least {floor} members are ready" if ready < floor else ""

    @property
    def plan_finished(self) -> bool:
        """The plan has run all of its rounds."""
        plan = self.documents.plan
        return plan is not None and self.state is not None and self.state.state_round >= plan.rounds

    def eligible(self) -> frozenset[str]:
        """Members that could take part in a round that opens now."""
        roster = self.documents.roster
        if roster is None:
            return frozenset()
        return frozenset(m for m in self.presence.ready() if m in roster.position) - self._exclude_next

    async def _gather(self) -> int | None:
        now = self._around.clock.now_ms()
        if self._not_due(now):
            self._gathering_since = None
            return None
        plan = self.documents.plan
        assert plan is not None
        eligible = self.eligible()
        if self.paused:
            if eligible == self._ready_at_pause:
                return None
            # Somebody came or went: one more attempt.
            self.paused, self._aborts = "", self._settings.aborts_before_pause - 1
        assert self.documents.policy is not None
        assert self.documents.roster is not None
        if len(eligible) < plan.cohort_floor(self.documents.policy, len(self.documents.roster.members)):
            self._gathering_since = None
            return None
        if self._gathering_since is None:
            self._gathering_since = now
        due = self._gathering_since + 1000 * plan.deadlines.gather
        if len(eligible) >= plan.cohort_wanted:
            due = now
        due = max(due, self._not_before_ms)
        if now < due:
            return due
        await self._open_round(now)
        return _NOW

    async def _open_round(self, now: int) -> None:
        plan, state = self.documents.plan, self.state
        assert plan is not None
        assert state is not None
        scheme = self._schemes(plan.scheme)
        number = max(self._last_number + 1, plan.first_round)
        bound = next_header(
            self.federation, number, self.documents, scheme, state.state, state.state_round, now
        )
        record = RoundRecord(
            federation=self.federation,
            number=number,
            version=1,
            chain=chain_of(plan),
            header=bound.body,
            state=OPEN,
            excluded=" ".join(sorted(self._exclude_next)),
            opened_ms=now,
        )
        run = self._make_run(record, bound)
        await self._around.store.commit(
            Insert(record), event(now, self.federation, "round opened", round=number, scheme=plan.scheme)
        )
        self._last_number = number
        self._gathering_since = None
        self._exclude_next = frozenset()
        self._checkpoint = None
        self._keeper = ""
        self._keepers_failed.clear()
        self.run = run
        self._log.info("round opened", round=number, scheme=plan.scheme, state_round=state.state_round)
        self.presence.notify()

    # An open round

    async def _advance_open(self, run: RoundRun) -> int | None:
        if run.stale and run.failure is None:
            try:
                await run.rebuild()
            except StorageFailed:
                raise
            except BlindsumError as error:
                run.failure = error
            # Whoever heard that its reply was there, before its commit failed, is asked again.
            self.presence.notify()
        if run.failure is not None:
            return await self._abort(run, str(run.failure))
        removed = self._removed(run)
        if removed:
            try:
                await run.revoke(removed)
            except StorageFailed:
                raise
            except BlindsumError as error:
                return await self._abort(run, str(error))
            self._log.info(
                "members removed from the running round", round=run.number, members=sorted(removed)
            )
            self.presence.notify()
        machine = run.machine
        if machine.abort is not None:
            return await self._abort(run, machine.abort.reason, machine.abort.exclude)
        if machine.step is None:
            return await self._publish(run)
        now = self._around.clock.now_ms()
        deadline = run.deadline_ms
        missing = self._missing(run)
        if not missing or now >= deadline:
            return await self._close(run)
        again = deadline
        if len(machine.replied) >= self._quorum(run):
            gone = [self.presence.absent_since(member, self._started_ms) for member in missing]
            if all(since is not None for since in gone):
                grace = int(1000 * self._settings.presence_grace)
                over = max(since for since in gone if since is not None) + grace
                if now >= over:
                    return await self._close(run)
                again = min(again, over)
        return again

    def _removed(self, run: RoundRun) -> frozenset[str]:
        now_in_force = self.documents.roster
        removed = set()
        for entry in run.terms.roster.members:
            index = None if now_in_force is None else now_in_force.position.get(entry.id)
            if (
                now_in_force is None
                or index is None
                or now_in_force.members[index].identity != entry.identity
            ) and entry.id not in run.revoked:
                removed.add(entry.id)
        return frozenset(removed)

    def _quorum(self, run: RoundRun) -> int:
        return max(run.machine.quorum, run.terms.bound.header.n_min if run.step == run.first_step else 0)

    def _missing(self, run: RoundRun) -> list[str]:
        """Who the open step waits for."""
        machine = run.machine
        expected = set(machine.participants) - machine.replied - run.revoked
        if run.step == run.first_step:
            if len(machine.replied) >= run.terms.bound.header.n_max:
                return []
            expected &= self.presence.ready() | self._coming_back(run, expected)
            if not expected and len(machine.replied) < self._quorum(run):
                # Nobody who is there is missing, but there are too few: wait for others, or the deadline.
                return sorted(set(machine.participants) - machine.replied - run.revoked) or [""]
        return sorted(expected)

    def _coming_back(self, run: RoundRun, members: set[str]) -> set[str]:
        """Of a round that an earlier process opened: who hasn't had the time to connect to this one."""
        until = self._started_ms + int(1000 * self._settings.presence_grace)
        if run.number != self._taken_up or self._around.clock.now_ms() >= until:
            return set()
        return {member for member in members if self.presence.absent_since(member, -1) == -1}

    async def _close(self, run: RoundRun) -> int | None:
        step = run.step
        await run.close_step()
        if run.stale:
            return _NOW
        self._log.info("step closed", round=run.number, step=step, following=run.machine.step)
        if step == "upload":
            self._round_closed(self.federation, run.number)
        self.presence.notify()
        return _NOW

    async def _publish(self, run: RoundRun) -> int | None:
        try:
            record = await run.publish()
        except StorageFailed:
            raise
        except BlindsumError as error:
            return await self._abort(run, str(error))
        await self._around.store.commit(
            Advance(record),
            event(
                record.published_ms,
                self.federation,
                "sum published",
                round=run.number,
                survivors=list(run.machine.survivors),
                named=dict(run.machine.named),
            ),
        )
        run.record = record
        self._log.info("sum published", round=run.number, survivors=len(run.survivors))
        await self._in_thread(run.drop_blobs, ("contribution", "sum", "spool"))
        self.presence.notify()
        return _NOW

    # A published round

    def leading_state(self, run: RoundRun) -> tuple[bytes, list[ConclusionRecord]]:
        """The state that most survivors signed, and their signatures in order of arrival."""
        by_state: dict[bytes, list[ConclusionRecord]] = {}
        for row in run.conclusions.values():
            if row.state:
                by_state.setdefault(row.state, []).append(row)
        if not by_state:
            return b"", []
        state = max(by_state, key=lambda digest: len(by_state[digest]))
        return state, by_state[state]

    def _has_checkpoint(self, state: bytes) -> bool:
        """Whether the sealed state is here; one that was led by a single early signature doesn't count."""
        return self._checkpoint is not None and self._checkpoint.state == state

    def _agreed(self, run: RoundRun) -> bool:
        survivors = len(run.survivors)
        _, signed = self.leading_state(run)
        policy = self.documents.policy
        # What members ask of a checkpoint: more than half of the survivors, and the policy's n_min.
        floor = survivors if policy is None else min(policy.n_min, survivors)
        return 2 * len(signed) > survivors and len(signed) >= floor

    async def _advance_published(self, run: RoundRun) -> int | None:
        if run.failure is not None:
            return await self._abort(run, str(run.failure))
        now = self._around.clock.now_ms()
        state, signed = self.leading_state(run)
        agreed = self._agreed(run)
        if agreed and self._has_checkpoint(state):
            return await self._conclude(run, now)
        heard = len(run.conclusions)
        undecided = len(run.survivors) - heard
        if undecided == 0 and not agreed:
            return await self._abort(run, "the survivors don't agree on the next state")
        deadline = run.deadline_ms
        if agreed:
            # Signatures are there; what is left is one upload of the whole state.
            deadline += 1000 * run.plan.deadlines.upload
        if now >= deadline:
            text = (
                "no checkpoint of the next state came"
                if agreed
                else "too few survivors signed the next state"
            )
            return await self._abort(run, text)
        patience = self._choose_keeper(now, signed)
        return deadline if patience is None else min(deadline, patience)

    def _choose_keeper(self, now: int, signed: list[ConclusionRecord]) -> int | None:
        """Ask one survivor for the checkpoint; when to ask another one."""
        names = [row.member for row in signed]
        if not names or self._has_checkpoint(signed[0].state):
            return None
        patience = int(1000 * self._settings.stall_seconds)
        if self._keeper in names:
            busy = self._keeper in self.checkpoint_uploads
            late = now >= self._keeper_since_ms + patience
            if busy or (self.presence.present(self._keeper) and not late):
                return None if busy else self._keeper_since_ms + patience
            self._keepers_failed.add(self._keeper)
        candidates = [name for name in names if self.presence.present(name)]
        fresh = [name for name in candidates if name not in self._keepers_failed]
        if not fresh:
            self._keepers_failed.clear()
            fresh = candidates
        before = self._keeper
        self._keeper = fresh[0] if fresh else ""
        self._keeper_since_ms = now
        self.presence.notify(*filter(None, (before, self._keeper)))
        return now + patience if self._keeper else None

    def checkpoint_wanted(self, member: str) -> bool:
        """Whether this member is asked to upload the checkpoint of the new state."""
        run = self.run
        return (
            run is not None
            and run.record.state == PUBLISHED
            and not self._has_checkpoint(self.leading_state(run)[0])
            and self._keeper == member
        )

    async def _conclude(self, run: RoundRun, now: int) -> int | None:
        checkpoint = self._checkpoint
        assert checkpoint is not None
        agreed = replace(checkpoint, agreed=1)
        record = replace(
            run.record,
            version=run.record.version + 1,
            state=CONCLUDED,
            ended_ms=now,
            new_state=checkpoint.state,
        )
        await self._around.store.commit(
            Advance(record),
            Put(agreed),
            event(now, self.federation, "round concluded", round=run.number, state_round=agreed.state_round),
        )
        run.record = record
        self._aborts = 0
        self.state = self.newest_state()
        self._log.info("round concluded", round=run.number, state_round=agreed.state_round)
        await self._in_thread(self._retire)
        self.presence.notify()
        return _NOW

    async def _abort(self, run: RoundRun, reason: str, exclude: tuple[str, ...] = ()) -> int | None:
        now = self._around.clock.now_ms()
        record = replace(
            run.record,
            version=run.record.version + 1,
            state=ABORTED,
            ended_ms=now,
            reason=reason[:MAX_REFUSAL_TEXT],
            exclude_next=" ".join(exclude),
        )
        await self._around.store.commit(
            Advance(record),
            event(now, self.federation, "round aborted", round=run.number, reason=reason, exclude=exclude),
        )
        run.record = record
        self._exclude_next = frozenset(exclude)
        self._aborts += 1
        self._not_before_ms = now + int(1000 * self._settings.retry_pause)
        self._log.warning("round aborted", round=run.number, reason=reason, exclude=exclude)
        if self._aborts >= self._settings.aborts_before_pause:
            self.paused = f"{self._aborts} rounds in a row were aborted, the last one because {reason}"
            self._ready_at_pause = self.eligible()
            self._log.error("paused", reason=self.paused)
        self._round_closed(self.federation, run.number)
        await run.folder.stop()
        await self._in_thread(run.drop_blobs, ("contribution", "sum", "spool", "result"))
        self.presence.notify()
        return _NOW

    async def _in_thread(self, work: Callable[..., None], *arguments: object) -> None:
        """Housekeeping whose failure must not end a round."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._around.executor, work, *arguments)
        except StorageFailed as error:
            self._log.error("cleaning up failed", text=str(error))

    def _clean_up(self) -> None:
        """Delete what ended rounds left when the server went down before it could. Blocks."""
        states = {row.number: row.state for row in self._rounds()}
        start = self.federation.hex()[:32] + "."
        for room in ("spool", "contribution", "sum", "result"):
            for name in self._around.blobs.names(room):
                if not name.startswith(f"{room}/{start}"):
                    continue
                number = name.removeprefix(f"{room}/{start}").partition(".")[0]
                state = states.get(int(number)) if number.isdigit() else None
                # A published round's spools may be checkpoints on the way, its result is what members get.
                ended = state == ABORTED or (state in (PUBLISHED, CONCLUDED) and room != "result")
                # Spools of first states and published models hang on no round, and no call is in progress.
                broken_off = room == "spool" and not number.isdigit()
                if broken_off or (ended and not (state == PUBLISHED and room == "spool")):
                    self._around.blobs.delete(name)

    def _rounds(self) -> list[RoundRecord]:
        return self._around.store.find(RoundRecord, federation=self.federation)

    def _retire(self) -> None:
        """Delete published sums and checkpoints beyond those that are kept. Blocks."""
        store, blobs, keep = self._around.store, self._around.blobs, self._settings.keep_rounds
        # Read are the records that are kept, not all there ever were: a round costs as much as any other.
        rows = store.newest(RoundRecord, keep, federation=self.federation, state=CONCLUDED)
        kept = {result_name(self.federation, row.number) for row in rows}
        if self.run is not None:
            kept.add(result_name(self.federation, self.run.number))
        for name in blobs.names("result"):
            if name.startswith(f"result/{self.federation.hex()[:32]}.") and name not in kept:
                blobs.delete(name)
        for name in blobs.names("checkpoint"):
            if name.startswith(f"checkpoint/{self.federation.hex()[:32]}.") and self._expired(name):
                blobs.delete(name)

    def _expired(self, checkpoint: str) -> bool:
        """Whether a stored training state is older than the newest `keep_rounds` of every chain it is in."""
        store, keep = self._around.store, self._settings.keep_rounds
        waiting = self._checkpoint
        if waiting is not None and checkpoint == checkpoint_name(self.federation, waiting.sealed_digest):
            return False
        digest = bytes.fromhex(checkpoint.rpartition(".")[2])
        states = store.find(CheckpointRecord, federation=self.federation, sealed_digest=digest, agreed=1)
        for row in states:
            kept = store.newest(CheckpointRecord, keep, federation=self.federation, chain=row.chain, agreed=1)
            if any(other.sealed_digest == digest for other in kept):
                return False
        # S_0s that wait for their plan have no record yet.
        return bool(states)

    # Members' calls about rounds

    def running(self, number: int) -> RoundRun:
        """The newest round, if it has this number. Raises `Refused` (wrong_round)."""
        if self.run is None or self.run.number != number:
            newest = self.run.number if self.run is not None else 0
            raise Refused(RefusalReason.WRONG_ROUND, f"round {number} isn't running; the newest is {newest}")
        return self.run

    def claim(self, checkpoint: CheckpointRecord) -> StateClaim:
        """What members check before they accept a checkpoint."""
        if checkpoint.state_round == 0:
            return StateClaim(self.federation, checkpoint.sealing_context, 0, checkpoint.state, (), ())
        record = self._around.store.get(RoundRecord, self.federation, checkpoint.round)
        assert record is not None
        rows = self._around.store.find(ConclusionRecord, federation=self.federation, round=checkpoint.round)
        return StateClaim(
            self.federation,
            checkpoint.h1,
            checkpoint.state_round,
            checkpoint.state,
            tuple(filter(None, record.survivors.split(" "))),
            tuple(StateSignature(r.member, r.signature) for r in rows if r.state == checkpoint.state),
        )

    async def conclude(self, member: str, number: int, state: bytes, signature: bytes, refusal: str) -> bool:
        """A survivor's word on a published round; True if it was there already. Raises `Refused`."""
        if self.run is None or self.run.number > number:
            return self._conclude_late(member, number, state)
        run = self.running(number)
        await run.wait_settled()
        if run.record.state not in (PUBLISHED, CONCLUDED):
            raise Refused(RefusalReason.WRONG_STEP, f"round {number} has no published sum to conclude")
        if member not in run.survivors:
            raise Refused(RefusalReason.NOT_A_PARTICIPANT, f"{member} is no survivor of round {number}")
        if bool(state) == bool(refusal) or (state and len(state) != 32):
            raise Refused(RefusalReason.MALFORMED, "give either the new state's digest or why it was refused")
        if len(refusal) > MAX_REFUSAL_TEXT:
            raise Refused(RefusalReason.WRONG_SIZE, f"a refusal has at most {MAX_REFUSAL_TEXT} characters")
        index = run.terms.bound.header.state_round + 1
        if state:
            claim = StateClaim(self.federation, run.record.h1, index, state, run.survivors, ())
            try:
                word = StateSignature(member, signature)
                valid = verify_state_signature(claim, word, run.terms.roster)
            except (TypeError, ValueError):
                valid = False
            if not valid:
                raise Refused(RefusalReason.SIGNATURE, "the signature of the new state doesn't verify")
        else:
            identity = run.terms.roster.entry(member).identity
            require_signature(
                identity, signature, "the refusal", "refused sum", run.record.h1, refusal.encode()
            )
        row = ConclusionRecord(
            self.federation, number, member, len(run.conclusions) + 1, state, signature, refusal
        )
        known = run.conclusions.get(member)
        if known is not None:
            if (known.state, known.refusal) != (state, refusal):
                raise Refused(
                    RefusalReason.CONFLICT,
                    f"{member} concluded round {number} otherwise; the first word counts",
                )
            return True
        changes: list[Change] = [Insert(row)]
        now = self._around.clock.now_ms()
        if refusal:
            changes.append(
                event(now, self.federation, "sum refused", round=number, member=member, reason=refusal)
            )
        elif run.record.state == CONCLUDED and state != run.record.new_state:
            changes.append(event(now, self.federation, "state differs", round=number, member=member))
        await asyncio.shield(self._around.store.commit(*changes))
        run.conclusions[member] = row
        self._run_changed(member)
        return False

    def _conclude_late(self, member: str, number: int, state: bytes) -> bool:
        """A word on a round that others have concluded already: it changes nothing any more."""
        record = self._around.store.get(RoundRecord, self.federation, number)
        if record is None or record.state != CONCLUDED:
            raise Refused(RefusalReason.WRONG_ROUND, f"round {number} has no sum to conclude")
        if member not in record.survivors.split(" "):
            raise Refused(RefusalReason.NOT_A_PARTICIPANT, f"{member} is no survivor of round {number}")
        if state != record.new_state:
            raise Refused(RefusalReason.CONFLICT, f"round {number} was concluded with another state")
        return True

    def check_checkpoint(self, member: str, number: int, state: bytes, total: int) -> bool:
        """Whether the round's checkpoint is there already. Raises `Refused` unless it may come."""
        run = self.running(number)
        if run.record.state == CONCLUDED and run.record.new_state == state:
            return True
        if run.record.state != PUBLISHED:
            raise Refused(RefusalReason.WRONG_STEP, f"round {number} waits for no checkpoint")
        word = run.conclusions.get(member)
        if word is None or word.state != state or not state:
            raise Refused(
                RefusalReason.NOT_A_PARTICIPANT, "only who signed this state uploads its checkpoint"
            )
        leading, _ = self.leading_state(run)
        if state != leading:
            raise Refused(RefusalReason.CONFLICT, "most survivors signed another state")
        if not 0 < total <= checkpoint_limit(run.plan):
            raise Refused(RefusalReason.WRONG_SIZE, f"a checkpoint of this plan can't have {total} bytes")
        return self._has_checkpoint(state)

    async def accept_checkpoint(
        self, member: str, number: int, state: bytes, total: int, sealed_digest: bytes
    ) -> None:
        """The sealed state is durable: record it."""
        if self.check_checkpoint(member, number, state, total):
            return
        run = self.running(number)
        header = run.terms.bound.header
        record = CheckpointRecord(
            federation=self.federation,
            chain=run.record.chain,
            state_round=header.state_round + 1,
            round=number,
            state=state,
            sealing_context=run.record.h1,
            total=total,
            sealed_digest=sealed_digest,
            agreed=0,
            header=run.record.header,
            h1=run.record.h1,
            roster=header.roster,
            survivors=len(run.survivors),
        )
        await asyncio.shield(self._around.store.commit(Put(record)))
        self._checkpoint = record
        self.presence.notify(member)
        self.wake()
