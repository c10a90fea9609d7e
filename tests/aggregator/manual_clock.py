"""A clock that stands still until a test moves it."""

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class ManualTimer:
    """A call that waits for its time."""

    when_ms: int
    callback: Callable[[], None]
    loop: asyncio.AbstractEventLoop
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


class ManualClock:
    """Time moves only through `advance`; timers then fire on their own event loops, in order."""

    def __init__(self) -> None:
        self._now_ms = time.time_ns() // 1_000_000
        self._lock = threading.Lock()
        self._timers: list[tuple[int, int, ManualTimer]] = []
        self._count = itertools.count()

    def now_ms(self) -> int:
        return self._now_ms

    def call_at(self, when_ms: int, callback: Callable[[], None]) -> ManualTimer:
        timer = ManualTimer(when_ms, callback, asyncio.get_running_loop())
        if when_ms <= self._now_ms:
            timer.loop.call_soon(callback)
        else:
            with self._lock:
                self._timers.append((when_ms, next(self._count), timer))
        return timer

    def advance_to(self, when_ms: int) -> None:
        """Move on to this time (Unix ms); timers up to it fire."""
        with self._lock:
            due = sorted(entry for entry in self._timers if entry[0] <= when_ms)
            self._timers = [entry for entry in self._timers if entry[0] > when_ms]
            self._now_ms = max(self._now_ms, when_ms)
        for _, _, timer in due:
            if not timer.cancelled:
                timer.loop.call_soon_threadsafe(timer.callback)

    def advance(self, seconds: float) -> None:
        """Move on by so many seconds."""
        self.advance_to(self._now_ms + int(1000 * seconds))
