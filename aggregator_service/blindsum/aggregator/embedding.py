"""A server in a thread of this process: for tests, and for `blindsum.client.testing`."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from blindsum.aggregator.server import AggregatorServer
from blindsum.aggregator.settings import AggregatorSettings
from blindsum.aggregator.structured_logs import configure_logs

__all__ = ["AggregatorServer", "AggregatorSettings", "ServerHandle", "configure_logs", "serve_in_thread"]

_START_SECONDS = 30.0


@dataclass
class ServerHandle:
    """A running server: its ports, its authority's certificate (PEM), and how to stop it."""

    enrolment_port: int
    member_port: int
    ca_pem: bytes
    server: AggregatorServer
    _loop: asyncio.AbstractEventLoop = field(repr=False)
    _thread: threading.Thread = field(repr=False)
    _stopping: asyncio.Event = field(repr=False)

    def stop(self) -> None:
        """Stop the server and wait until its thread has ended."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()

    def __enter__(self) -> "ServerHandle":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def serve_in_thread(
    settings: AggregatorSettings,
    make: Callable[[AggregatorSettings], AggregatorServer] = AggregatorServer,
) -> ServerHandle:
    """Start a server in a thread of its own and wait until it is ready. Raises what `start` raises."""
    started: list[ServerHandle | BaseException] = []
    ready = threading.Event()

    async def serve() -> None:
        stopping = asyncio.Event()
        server = make(settings)
        try:
            await server.start()
            started.append(
                ServerHandle(
                    server.enrolment_port,
                    server.member_port,
                    server.ca_pem,
                    server,
                    asyncio.get_running_loop(),
                    threading.current_thread(),
                    stopping,
                )
            )
        except BaseException as error:
            started.append(error)
            raise
        finally:
            ready.set()
        await stopping.wait()
        await server.stop(grace=0.2)

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException:
            if not started or isinstance(started[0], ServerHandle):
                raise

    thread = threading.Thread(target=run, name="blindsum-aggregator", daemon=True)
    thread.start()
    if not ready.wait(_START_SECONDS):
        raise TimeoutError("the aggregator didn't start in time")
    first = started[0]
    if isinstance(first, ServerHandle):
        return first
    thread.join()
    raise first
