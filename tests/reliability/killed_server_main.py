"""Started once by `KilledServer`; forks a server for every line on standard input, as `server_main` does.

A line may name a point at which that server kills itself (SIGKILL), and at which passing of it. The points
are patched in here: the server knows nothing of them.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import wraps
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent / "aggregator"))

import plain_scheme
from blindsum.aggregator.embedding import AggregatorServer
from blindsum.aggregator.engine import FederationEngine
from blindsum.aggregator.folding import Folder
from blindsum.aggregator.round_run import RoundRun
from blindsum.aggregator.store import sqlite_state
from blindsum.aggregator.store.file_blobs import FileBlobs, FileSpool
from blindsum.aggregator.store.sqlite_state import SqliteState
from blindsum.aggregator.structured_logs import configure_logs
from scripted_federation import settings_for

POINTS: dict[str, tuple[Any, str, str]] = {
    "a chunk is written": (FileSpool, "append", "after"),
    "an upload is to be synced": (FileSpool, "sync", "before"),
    "an upload is synced, not renamed": (FileSpool, "sync", "after"),
    "an upload is durable, not committed": (FileBlobs, "keep", "after"),
    "a group is to be committed": (SqliteState, "_commit_group", "before"),
    "a group is committed, nobody told": (sqlite_state, "_deliver", "before"),
    "a batch is to be added": (Folder, "_write_sum", "before"),
    "a sum is written, not committed": (Folder, "_write_sum", "after"),
    "a sum is committed, its uploads there": (Folder, "_drop", "before"),
    "the added uploads are deleted": (Folder, "_drop", "after"),
    "a step is to be closed": (RoundRun, "close_step", "before"),
    "a step is closed": (RoundRun, "close_step", "after"),
    "the published sum is written": (Folder, "publish", "after"),
    "the sum is published": (FederationEngine, "_publish", "after"),
    "the next state is kept": (FederationEngine, "accept_checkpoint", "after"),
    "a round is concluded": (FederationEngine, "_conclude", "after"),
}
"""Where, in the words of a test; whose method; and whether before or after it."""


def kill_at(point: str, passing: int) -> None:
    """Die the `passing`-th time that the server comes to this point."""
    owner, name, when = POINTS[point]
    real: Callable[..., Any] = getattr(owner, name)
    left = [passing]

    def reached() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if iscoroutinefunction(real):

        @wraps(real)
        async def passed(*arguments: Any, **named: Any) -> Any:
            if when == "before":
                reached()
            result = await real(*arguments, **named)
            if when == "after":
                reached()
            return result

    else:

        @wraps(real)
        def passed(*arguments: Any, **named: Any) -> Any:
            if when == "before":
                reached()
            result = real(*arguments, **named)
            if when == "after":
                reached()
            return result

    setattr(owner, name, passed)


async def serve(directory: str, settings: dict[str, Any], point: str, passing: int) -> None:
    """Serve until killed; says on standard output where."""
    if point:
        kill_at(point, passing)
    server = AggregatorServer(
        settings_for(Path(directory), **settings),
        schemes=plain_scheme.scheme,
        scheme_factory="plain_scheme:scheme",
    )
    await server.start()
    line = {"pid": os.getpid(), "ports": [server.enrolment_port, server.member_port]}
    sys.stdout.write(json.dumps({**line, "ca": server.ca_pem.decode()}) + "\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


def main() -> None:
    configure_logs("CRITICAL", json=False)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            asyncio.run(serve(**json.loads(line)))
            os._exit(0)
        sys.stdout.write(json.dumps({"forked": pid}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
