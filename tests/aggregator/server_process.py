"""The server as its own process, which a test may kill."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


class ServerProcess:
    """An `AggregatorServer` on a data directory, alone in a process; see `server_main`."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self._order = json.dumps({"directory": str(directory), "settings": settings}) + "\n"
        self._pid = 0
        self._parent = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server_main.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self) -> tuple[int, int, bytes]:
        """Start it and wait until it is ready: enrolment port, member port, CA certificate."""
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(self._order)
        self._parent.stdin.flush()
        ready = json.loads(self._parent.stdout.readline())
        self._pid = ready["pid"]
        return ready["ports"][0], ready["ports"][1], ready["ca"].encode()

    @property
    def pid(self) -> int:
        """The server's process id; 0 while it isn't running."""
        return self._pid

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                handle = os.pidfd_open(self._pid)
                os.kill(self._pid, signal.SIGKILL)
                select.select([handle], [], [])
                os.close(handle)
            self._pid = 0

    def close(self) -> None:
        """Kill what runs."""
        self.kill()
        with self._parent:
            self._parent.kill()
