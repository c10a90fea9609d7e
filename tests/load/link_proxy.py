"""A TCP proxy as a poor link: a rate, a delay, stalls and cuts. It counts what passes in each direction."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator, Sequence

PIECE = 16 * 1024
KERNEL_BUFFER = 64 * 1024


class Link:
    """A link to a port on loopback, in a thread of its own.

    `rate` in bytes a second and direction (None: as fast as it goes), `delay` in seconds each way. `cut_up`
    and `cut_down` are the bytes passed in a direction at which all connections are cut, without a farewell.
    """

    def __init__(
        self,
        target_port: int,
        *,
        rate: float | None = None,
        delay: float = 0.0,
        cut_up: Sequence[int] = (),
        cut_down: Sequence[int] = (),
    ) -> None:
        self.up = self.down = self.cuts = self.connections = 0
        self._target_port = target_port
        self._rate = rate
        self._delay = delay
        self._cut_at = {"up": list(cut_up), "down": list(cut_down)}
        self._free_at = {"up": 0.0, "down": 0.0}
        self._writers: set[asyncio.StreamWriter] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, KERNEL_BUFFER)
        self.port: int = self._listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))
        self._thread.start()

    async def _serve(self) -> None:
        self._stopping = asyncio.Event()
        server = await asyncio.start_server(self._connected, sock=self._listener, limit=PIECE)
        await self._stopping.wait()
        server.close()
        self._cut()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _connected(self, member: asyncio.StreamReader, to_member: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            server, to_server = await asyncio.open_connection("127.0.0.1", self._target_port, limit=PIECE)
        except OSError:
            to_member.transport.abort()
            return
        self._writers |= {to_member, to_server}
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(self._pass(member, to_server, "up"), self._pass(server, to_member, "down"))
        self._writers -= {to_member, to_server}

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: str) -> None:
        try:
            while data := await source.read(PIECE):
                await self._flowing.wait()
                if self._rate is not None:
                    now = self._loop.time()
                    self._free_at[way] = max(now, self._free_at[way]) + len(data) / self._rate
                    await asyncio.sleep(self._free_at[way] - now)
                if self._delay:
                    self._loop.call_later(self._delay, self._deliver, sink, data, way)
                else:
                    self._deliver(sink, data, way)
                    await sink.drain()
            if self._delay:
                await asyncio.sleep(self._delay)
            sink.close()
        except OSError:
            sink.transport.abort()

    def _deliver(self, sink: asyncio.StreamWriter, data: bytes, way: str) -> None:
        if sink.is_closing():
            return
        sink.write(data)
        if way == "up":
            self.up += len(data)
        else:
            self.down += len(data)
        passed, cuts = (self.up if way == "up" else self.down), self._cut_at[way]
        if cuts and passed >= cuts[0]:
            cuts.pop(0)
            self.cuts += 1
            self._cut()

    def _cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    def stall(self, stalled: bool) -> None:
        """Hold everything that comes from now on, or let it pass again."""
        self._loop.call_soon_threadsafe(self._flowing.clear if stalled else self._flowing.set)

    def close(self) -> None:
        """Cut what is connected and stop."""
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._loop.close()


@contextlib.contextmanager
def link(target_port: int, **options: object) -> Iterator[Link]:
    """A link that ends with the block."""
    opened = Link(target_port, **options)  # type: ignore[arg-type]
    try:
        yield opened
    finally:
        opened.close()
