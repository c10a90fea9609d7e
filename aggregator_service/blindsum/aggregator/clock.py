"""Wall-clock time and timers, injected so that a simulation can own both."""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol


class Timer(Protocol):
    """A scheduled call that can be taken back."""

    def cancel(self) -> None:
        """Don't call any more."""


class Clock(Protocol):
    """Where the service reads the time; deadlines are stored in Unix milliseconds."""

    def now_ms(self) -> int:
        """Unix time in milliseconds."""

    def call_at(self, when_ms: int, callback: Callable[[], None]) -> Timer:
        """Call `callback` on the running event loop once `when_ms` is reached."""


class SystemClock:
    """The machine's clock and the running event loop's timers."""

    def now_ms(self) -> int:
        """Unix time in milliseconds."""
        return time.time_ns() // 1_000_000

    def call_at(self, when_ms: int, callback: Callable[[], None]) -> Timer:
        """Call `callback` on the running event loop once `when_ms` is reached."""
        # Half a millisecond late rather than a hair early, which would only wake the caller twice.
        delay = max(0.0, (when_ms - self.now_ms()) / 1000 + 0.0005)
        return asyncio.get_running_loop().call_later(delay, callback)
