"""What is deleted, and when: sums, old states, logs of rounds that are over. The audit and the history stay.

The engine itself keeps the published sums and training states of the newest `keep_rounds` rounds. Every
`retention_seconds` this deletes what only time tells:

- with `keep_days`, published sums and training states older than that, but never a chain's newest state;
- replies, step closes and upload digests of rounds that are over: what an open round is rebuilt from;
- states of rounds that were aborted, first states that no plan named within a week, spools of other rounds;
- digests of encryption seeds under an HE key that the roster no longer names. Under a key in force they stay:
  a seed must never come twice under a key. A key that left the roster is never taken back (publishing.py).
"""

import asyncio
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field

from blindsum.aggregator.clock import Clock
from blindsum.aggregator.engine import FederationEngine, checkpoint_name, event
from blindsum.aggregator.folding import result_name
from blindsum.aggregator.round_run import ABORTED, CONCLUDED
from blindsum.aggregator.settings import AggregatorSettings
from blindsum.aggregator.store.blobs import BlobStore
from blindsum.aggregator.store.records import (
    CheckpointRecord,
    CloseRecord,
    ContributionRecord,
    InitialStateRecord,
    Record,
    ReplyRecord,
    RevocationRecord,
    RoundRecord,
    SeedRecord,
    SumRecord,
)
from blindsum.aggregator.store.state import Change, Delete, StateStore, StorageFailed
from blindsum.aggregator.structured_logs import logger
from blindsum.crypto.trust.header import NO_KEY, BoundHeader

_DAY_MS = 86_400_000
_UNNAMED_STATE_MS = 7 * _DAY_MS
_ROUND_LOG: tuple[type[Record], ...] = (
    ReplyRecord,
    CloseRecord,
    RevocationRecord,
    ContributionRecord,
    SumRecord,
)


@dataclass
class Expired:
    """What a sweep found: blobs to delete, and changes of the state."""

    blobs: list[str] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    rounds: int = 0


class Retention:
    """Deletes what no longer has to be kept, for every federation of a server."""

    def __init__(
        self,
        settings: AggregatorSettings,
        clock: Clock,
        store: StateStore,
        blobs: BlobStore,
        engines: Mapping[bytes, FederationEngine],
        executor: Executor,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._store = store
        self._blobs = blobs
        self._engines = engines
        self._executor = executor
        self._logs_dropped: dict[bytes, int] = {}
        self._he_keys: dict[bytes, set[bytes]] = {}
        self._log = logger(part="retention")

    async def keep_sweeping(self, seconds: float) -> None:
        """Sweep until cancelled."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.sweep()
            except StorageFailed as error:
                self._log.error("cleaning up failed", text=str(error))

    async def sweep(self) -> int:
        """Delete what has expired by now; how many blobs that were. Raises `StorageFailed`."""
        loop = asyncio.get_running_loop()
        deleted = 0
        for federation, engine in list(self._engines.items()):
            # Whatever round is newest now, and later ones, are left alone.
            newest = 0 if engine.run is None else engine.run.number
            found = await loop.run_in_executor(self._executor, self._expired, federation, newest)
            await self._drop_seeds(federation, engine)
            if found.changes or found.blobs:
                now = self._clock.now_ms()
                noted = event(
                    now, federation, "expired data deleted", blobs=len(found.blobs), rounds=found.rounds
                )
                await self._store.commit(*found.changes, noted)
                await loop.run_in_executor(self._executor, self._delete, found.blobs)
                self._log.info(
                    "expired data deleted",
                    federation=federation.hex()[:16],
                    blobs=len(found.blobs),
                    rounds=found.rounds,
                )
            self._logs_dropped[federation] = newest
            deleted += len(found.blobs)
        return deleted

    async def _drop_seeds(self, federation: bytes, engine: FederationEngine) -> None:
        """Drop the seeds seen under keys that neither the roster nor the newest round is under."""
        used = self._he_keys.get(federation, set())
        roster = engine.documents.roster
        kept = {NO_KEY} | (set() if roster is None else {key.digest for key in roster.he_keys})
        if engine.run is not None:
            kept.add(engine.run.terms.bound.header.he_key)
        for key in used - kept:
            where = (("federation", federation), ("he_key", key))
            await self._store.commit(Delete(SeedRecord, where))
            used.discard(key)

    def _delete(self, names: list[str]) -> None:
        for name in names:
            self._blobs.delete(name)

    def _expired(self, federation: bytes, newest: int) -> Expired:
        found = Expired()
        rounds = {
            row.number: row
            for row in self._store.find(RoundRecord, federation=federation)
            if row.number < newest and row.state in (CONCLUDED, ABORTED)
        }
        for number, row in rounds.items():
            if number >= self._logs_dropped.get(federation, 0):
                he_key = BoundHeader.parse(row.header).header.he_key
                self._he_keys.setdefault(federation, set()).add(he_key)
                where = (("federation", federation), ("round", number))
                logged = [
                    kind for kind in _ROUND_LOG if self._store.find(kind, federation=federation, round=number)
                ]
                found.changes += [Delete(kind, where) for kind in logged]
                found.rounds += bool(logged)
        now = self._clock.now_ms()
        days = self._settings.keep_days
        before = 0 if days is None else now - int(days * _DAY_MS)
        found.blobs += self._old_results(federation, rounds, before)
        self._old_states(found, federation, rounds, before)
        for waiting in self._store.find(InitialStateRecord, federation=federation):
            if waiting.created_ms < now - _UNNAMED_STATE_MS:
                key = (("federation", federation), ("state", waiting.state))
                found.changes.append(Delete(InitialStateRecord, key))
                found.blobs.append(checkpoint_name(federation, waiting.sealed_digest))
        prefix = f"spool/{federation.hex()[:32]}."
        for name in self._blobs.names("spool"):
            owner = name.removeprefix(prefix).partition(".")[0]
            if name.startswith(prefix) and owner.isdecimal() and int(owner) < newest:
                found.blobs.append(name)
        return found

    def _old_results(self, federation: bytes, rounds: Mapping[int, RoundRecord], before: int) -> list[str]:
        stored = set(self._blobs.names("result"))
        return [
            name
            for row in rounds.values()
            if row.ended_ms < before and (name := result_name(federation, row.number)) in stored
        ]

    def _old_states(
        self, found: Expired, federation: bytes, rounds: Mapping[int, RoundRecord], before: int
    ) -> None:
        states = self._store.find(CheckpointRecord, federation=federation)
        newest: dict[bytes, int] = {}
        for state in states:
            if state.agreed:
                newest[state.chain] = max(newest.get(state.chain, 0), state.state_round)
        stored = set(self._blobs.names("checkpoint"))
        needed: set[str] = set()
        expired: set[str] = set()
        for state in states:
            name = checkpoint_name(federation, state.sealed_digest)
            row = rounds.get(state.round)
            old = row is not None and row.ended_ms < before
            if state.agreed and old and state.state_round < newest[state.chain]:
                expired.add(name)
            elif not state.agreed and row is not None:
                expired.add(name)
                key = (
                    ("federation", federation),
                    ("chain", state.chain),
                    ("state_round", state.state_round),
                    ("round", state.round),
                )
                found.changes.append(Delete(CheckpointRecord, key))
            else:
                needed.add(name)
        found.blobs += sorted((expired - needed) & stored)
