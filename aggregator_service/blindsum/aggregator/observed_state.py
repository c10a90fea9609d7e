"""The state, seen by those who only watch: metrics, the operators' page, readiness.

What rounds do is known from what they commit. So nothing in the engine counts for a dashboard: observers
get every change once it is durable, and hear of every commit that failed.
"""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from blindsum.aggregator.store.records import Record
from blindsum.aggregator.store.state import Change, StateStore, StorageFailed
from blindsum.aggregator.structured_logs import logger

R = TypeVar("R", bound=Record)

Observer = Callable[[tuple[Change, ...]], None]
"""Called on the event loop with the changes of a commit that is durable; it must not block."""


class ObservedState:
    """A `StateStore` that passes everything on, and tells observers what was committed."""

    def __init__(self, inner: StateStore) -> None:
        self._inner = inner
        self._observers: list[Observer] = []
        self.in_flight = 0
        """Commits that wait for their fsync."""
        self.failures = 0
        """Commits that the storage refused, since the start."""
        self.storage_changed: Callable[[bool], None] | None = None
        """Told after each commit whether the storage took it."""
        self._log = logger(part="state")

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Tell this observer of every commit from now on; the call that is returned ends it."""
        self._observers.append(observer)
        return lambda: self._observers.remove(observer)

    def commit(self, *changes: Change) -> "asyncio.Future[None]":
        """Queue the changes for the next group commit."""
        done = self._inner.commit(*changes)
        self.in_flight += 1
        done.add_done_callback(lambda future: self._committed(future, changes))
        return done

    def _committed(self, done: "asyncio.Future[None]", changes: tuple[Change, ...]) -> None:
        self.in_flight -= 1
        error = None if done.cancelled() else done.exception()
        if isinstance(error, StorageFailed):
            self.failures += 1
        if self.storage_changed is not None and not done.cancelled():
            self.storage_changed(not isinstance(error, StorageFailed))
        if error is not None or done.cancelled():
            return
        for observer in tuple(self._observers):
            try:
                observer(changes)
            except Exception as failure:
                # Whoever only watches can't end a round.
                self._log.exception("an observer failed", error=type(failure).__name__)

    def get(self, kind: type[R], *key: bytes | str | int) -> R | None:
        """The committed record with this key."""
        return self._inner.get(kind, *key)

    def find(self, kind: type[R], **equal: bytes | str | int) -> list[R]:
        """Committed records whose fields equal these, in order of their key."""
        return self._inner.find(kind, **equal)

    def newest(self, kind: type[R], count: int, **equal: bytes | str | int) -> list[R]:
        """The last so many of them, last first."""
        return self._inner.newest(kind, count, **equal)

    def close(self) -> None:
        """Finish what was submitted, then close."""
        self._inner.close()
