"""The newest refusals, for the operators' page: who was refused what, and why. In memory, bounded."""

import re
from collections import deque
from dataclasses import dataclass
from typing import Any

from blindsum.aggregator.clock import Clock
from blindsum.aggregator.wire_handlers import CallObserver
from blindsum.crypto.errors import RefusalReason

KEPT = 200
_MAX_TEXT = 200
_UNPRINTABLE = re.compile(r"[^ -~\u00a1-\uffff]")


@dataclass(frozen=True)
class SeenRefusal:
    """One refused call. `member` and `federation` are empty where nobody was known yet."""

    at_ms: int
    method: str
    federation: bytes
    member: str
    reason: str
    text: str


class RecentRefusals:
    """A call observer that passes everything on to another, and remembers the newest refusals."""

    def __init__(self, inner: CallObserver, clock: Clock) -> None:
        self._inner = inner
        self._clock = clock
        self._seen: deque[SeenRefusal] = deque(maxlen=KEPT)

    @property
    def newest(self) -> tuple[SeenRefusal, ...]:
        """Newest first."""
        return tuple(reversed(self._seen))

    def received(self, method: str, size: int) -> None:
        """A message of so many bytes came."""
        self._inner.received(method, size)

    def sent(self, method: str, size: int) -> None:
        """A message of so many bytes was sent."""
        self._inner.sent(method, size)

    def finished(self, method: str, outcome: str, seconds: float) -> None:
        """A call ended."""
        self._inner.finished(method, outcome, seconds)

    def refused(self, method: str, caller: Any, reason: RefusalReason, text: str) -> None:
        """A call was refused."""
        self._inner.refused(method, caller, reason, text)
        known = caller is not None
        self._seen.append(
            SeenRefusal(
                self._clock.now_ms(),
                method,
                caller.federation if known else b"",
                caller.member if known else "",
                reason.value,
                _UNPRINTABLE.sub("?", text)[:_MAX_TEXT],
            )
        )
