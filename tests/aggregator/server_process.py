"""The server as its own process, which a test may kill."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class ServerProcess:
    """`python -m blindsum.aggregator.commands` on a data directory."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self._directory = directory
        self._environment = {f"BLINDSUM_{name.upper()}": str(value) for name, value in settings.items()}
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> tuple[int, int, bytes]:
        """Start it and wait until it is ready: enrolment port, member port, CA certificate."""
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "blindsum.aggregator.commands"),
                *("--data", str(self._directory), "--any-owner", "--ready-file=-"),
                *("--enrolment-port=0", "--member-port=0"),
            ],
            env={**os.environ, "BLINDSUM_LOG_LEVEL": "ERROR", **self._environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        enrolment_port, member_port = self._process.stdout.readline().split()
        certificate = ""
        while "END CERTIFICATE" not in certificate:
            line = self._process.stdout.readline()
            assert line, "the server ended before it was ready"
            certificate += line
        return int(enrolment_port), int(member_port), certificate.encode()

    def kill(self) -> None:
        """SIGKILL, and wait for it."""
        if self._process is not None:
            assert self._process.stdout is not None
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()
            self._process = None
