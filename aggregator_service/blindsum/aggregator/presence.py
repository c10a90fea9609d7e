"""Who is there: members with a watch stream, whether they can train, and since when others are absent."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from blindsum.aggregator.clock import Clock

STREAMS_PER_MEMBER = 4


@dataclass(eq=False)
class WatchStream:
    """One open watch stream of a member. `changed` is set whenever there may be news."""

    member: str
    ready: bool
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False

    def end(self) -> None:
        """Close the stream at its next step."""
        self.ended = True
        self.changed.set()


class Presence:
    """The watch streams of one federation."""

    def __init__(self, clock: Clock, changed: Callable[[], None]) -> None:
        self._clock = clock
        self._changed = changed
        self._streams: dict[str, list[WatchStream]] = {}
        self._absent_since: dict[str, int] = {}
        self._busy: Counter[str] = Counter()

    def open(self, member: str, ready: bool) -> WatchStream:
        """A new stream of a member; beyond four, the oldest ends."""
        stream = WatchStream(member, ready)
        streams = self._streams.setdefault(member, [])
        streams.append(stream)
        if len(streams) > STREAMS_PER_MEMBER:
            streams[0].end()
        self._absent_since.pop(member, None)
        self._changed()
        return stream

    def close(self, stream: WatchStream) -> None:
        """The stream is gone."""
        streams = self._streams.get(stream.member, [])
        if stream in streams:
            streams.remove(stream)
        if not streams:
            self._streams.pop(stream.member, None)
            self._absent_since[stream.member] = self._clock.now_ms()
        self._changed()

    def present(self, member: str) -> bool:
        """Whether the member has a watch stream."""
        return member in self._streams or self._busy[member] > 0

    def begin_transfer(self, member: str) -> None:
        """The member sends bulk: it is there, whatever becomes of its watch stream."""
        self._busy[member] += 1

    def end_transfer(self, member: str) -> None:
        """The transfer is over."""
        self._busy[member] -= 1
        if self._busy[member] <= 0:
            del self._busy[member]
        if member not in self._streams:
            self._absent_since[member] = self._clock.now_ms()
        self._changed()

    def ready(self) -> frozenset[str]:
        """Members whose newest stream says that they can train."""
        return frozenset(member for member, streams in self._streams.items() if streams[-1].ready)

    def absent_since(self, member: str, otherwise: int) -> int | None:
        """Since when (Unix ms) the member has had no stream; None while it has one.

        `otherwise` stands for a member that this process never saw.
        """
        if self.present(member):
            return None
        return self._absent_since.get(member, otherwise)

    def notify(self, *members: str) -> None:
        """There is news: for these members, or for everyone."""
        for member in members or tuple(self._streams):
            for stream in self._streams.get(member, ()):
                stream.changed.set()

    def end_all(self) -> None:
        """End every stream."""
        for streams in self._streams.values():
            for stream in streams:
                stream.end()

    def members(self) -> tuple[str, ...]:
        """Everyone with a stream."""
        return tuple(self._streams)
