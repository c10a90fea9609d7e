"""`blindsum serve` as a process to measure: its CPU and peak memory, its own and its workers'."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from blindsum.crypto.errors import BlindsumError


@dataclass
class MeasuredServer:
    """A running aggregator and where it keeps its files."""

    pid: int
    data: Path
    enrolment_port: int
    member_port: int
    ca: str
    start_s: float
    """From the start of the process to ready."""

    @property
    def blobs(self) -> Path:
        """The directory of its blobs."""
        return self.data / "blobs"

    def processes(self) -> list[int]:
        """The server's process and all that it started."""
        found = [self.pid]
        for pid in found:
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text(encoding="ascii").split()]
        return found

    def cpu_s(self) -> float:
        """CPU seconds of all threads of all of its processes."""
        # Linux names the CPU clock of another process by its id (clock_getcpuclockid).
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in self.processes())

    def memory(self, name: str = "VmHWM") -> int:
        """Bytes of all of its processes, each one's `VmRSS` or the most that it ever was (`VmHWM`)."""
        return sum(_status(pid, name) for pid in self.processes())

    def forget_peak(self) -> None:
        """Begin a new measurement of the peak."""
        for pid in self.processes():
            Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")

    def threads(self) -> int:
        """Threads of the server's own process."""
        return _status(self.pid, "Threads", 1)

    def descriptors(self) -> int:
        """Open descriptors of the server's own process."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))


def _status(pid: int, name: str, unit: int = 1024) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * unit
    raise BlindsumError(f"/proc/{pid}/status has no {name}; this benchmark needs Linux")


@contextmanager
def measured_server(data: Path, **settings: str | int | float) -> Iterator[MeasuredServer]:
    """Start `blindsum serve` on loopback with these settings, and stop it in the end."""
    config = data.with_name(data.name + ".toml")
    values = {"presence_grace": 600, "retry_pause": 0.1, "disk_reserve": 0, "log_level": "ERROR", **settings}
    config.write_text(
        "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()), encoding="utf-8"
    )
    started = time.perf_counter()
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "blindsum.cli", "serve", "--config", str(config), "--data", str(data)),
            *("--any-owner", "--enrolment-port", "0", "--member-port", "0"),
            *("--ready-file", "-", "--while-stdin"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            ports = process.stdout.readline().split()
            start_s = time.perf_counter() - started
            if len(ports) != 2:
                raise BlindsumError("the aggregator didn't start; its error is above")
            ca = _certificate(process.stdout)
            yield MeasuredServer(process.pid, data, int(ports[0]), int(ports[1]), ca, start_s)
        finally:
            process.stdin.close()
            process.stdout.close()
            process.wait()


def _certificate(lines: IO[str]) -> str:
    text = ""
    for line in lines:
        text += line
        if line.startswith("-----END"):
            return text
    raise BlindsumError("the aggregator ended before it was ready; its error is above")
