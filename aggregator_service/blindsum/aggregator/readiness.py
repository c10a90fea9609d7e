"""Whether the server can do its work: live is not ready.

Live means that the process answers. Ready means that it can also keep what it acknowledges: its last commit
and its last write of a blob reached the disk. Any commit that fails makes it unready at once; a probe that
writes a row and a blob, every few seconds, finds out about a disk that nobody uses, and about one that came
back.
"""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Executor

from blindsum.aggregator.clock import Clock
from blindsum.aggregator.observed_state import ObservedState
from blindsum.aggregator.store.blobs import BlobStore
from blindsum.aggregator.store.records import ProbeRecord
from blindsum.aggregator.store.state import Put, StorageFailed
from blindsum.aggregator.structured_logs import logger

_PROBE_BLOB = "spool/readiness.probe"
_PROBE_BYTES = bytes(4096)
OK = "ok"


class Readiness:
    """The checks, and what they said last. `changed` is told when the server becomes ready or unready."""

    def __init__(
        self,
        store: ObservedState,
        blobs: BlobStore,
        clock: Clock,
        executor: Executor,
        changed: Callable[[bool], None],
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._clock = clock
        self._executor = executor
        self._changed = changed
        self._checks = {"server": "starting", "state": OK, "blobs": OK}
        self._log = logger(part="readiness")
        store.storage_changed = self._commit_ended

    @property
    def ready(self) -> bool:
        """Whether every check is ok."""
        return all(found == OK for found in self._checks.values())

    @property
    def checks(self) -> dict[str, str]:
        """Each check and what it found: "ok", or what is wrong."""
        return dict(self._checks)

    def serve(self) -> None:
        """The server is up."""
        self._found("server", OK)

    def drain(self) -> None:
        """The server shuts down."""
        self._found("server", "shutting down")

    def _found(self, check: str, result: str) -> None:
        before = self.ready
        if self._checks[check] == result:
            return
        self._checks[check] = result
        if self.ready != before:
            log = self._log.info if self.ready or check == "server" else self._log.error
            log("readiness changed", ready=self.ready, check=check, result=result)
            self._changed(self.ready)

    def _commit_ended(self, stored: bool) -> None:
        self._found("state", OK if stored else "the last commit failed; check the disk")

    async def probe(self) -> None:
        """Write a row and a blob, durably."""
        # `_commit_ended` hears of it if it fails.
        with contextlib.suppress(StorageFailed):
            await self._store.commit(Put(ProbeRecord("readiness", self._clock.now_ms())))
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._executor, self._write_blob)
        except (StorageFailed, OSError) as error:
            self._found("blobs", str(error))
        else:
            self._found("blobs", OK)

    def _write_blob(self) -> None:
        self._blobs.write(_PROBE_BLOB, [_PROBE_BYTES])
        self._blobs.delete(_PROBE_BLOB)

    async def keep_probing(self, seconds: float) -> None:
        """Probe until cancelled."""
        while True:
            await asyncio.sleep(seconds)
            await self.probe()
