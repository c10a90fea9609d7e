"""Started once by `ServerProcess`; forks a server for every line on standard input.

A fork of a process that has imported everything is ready at once: a test can afford to kill it often.
"""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from blindsum.aggregator.embedding import AggregatorServer
from blindsum.aggregator.structured_logs import configure_logs
from blindsum.crypto.schemes import masking
from scripted_federation import settings_for

PRELOADED = masking
"""The registry would import it only when a round opens."""


async def serve(directory: str, settings: dict[str, Any]) -> None:
    """Serve until killed; says on standard output where."""
    server = AggregatorServer(settings_for(Path(directory), **settings))
    await server.start()
    line = {"pid": os.getpid(), "ports": [server.enrolment_port, server.member_port]}
    sys.stdout.write(json.dumps({**line, "ca": server.ca_pem.decode()}) + "\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


def main() -> None:
    configure_logs("ERROR", json=False)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if os.fork() == 0:
            asyncio.run(serve(**json.loads(line)))
            os._exit(0)


if __name__ == "__main__":
    main()
