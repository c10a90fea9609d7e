"""The inference service as a process of its own, started with its command, and members who may ask it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from blindsum.client.inference import CloudTail
from blindsum.client.member_folder import certificate_request, transport_key
from blindsum.crypto.inference.tail_model import TailModel

_FEDERATION = "c1" * 32
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class InferenceProcess:
    """A running service on loopback; `capture` has every message that its handlers received and returned."""

    folder: Path
    port: int
    ca: str
    pid: int

    @property
    def capture(self) -> Path:
        """Where the service records its messages."""
        return self.folder / "capture"

    def member(self, name: str, seconds: float = 20.0) -> CloudTail:
        """A member's connection, in mode `encrypted`, with a certificate from the service's own authority."""
        key = transport_key()
        request = self.folder / f"{name}.csr"
        request.write_bytes(certificate_request(key, name))
        admit = ["admit", "--data", str(self.folder / "data"), "--federation", _FEDERATION]
        run = subprocess.run(  # noqa: S603
            [*_command(), *admit, "--member", name, str(request)], capture_output=True, check=True
        )
        return CloudTail(
            f"localhost:{self.port}", ca=self.ca, key=key, certificate=run.stdout, seconds=seconds
        )

    def cpu_seconds(self) -> float:
        """User and system time of the service and its worker processes."""
        return sum(_cpu_seconds(pid) for pid in _family(self.pid))


@contextmanager
def inference_process(folder: Path, tail: TailModel) -> Iterator[InferenceProcess]:
    """Start `blindsum infer serve` for a tail; it ends with the block, and with this process."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tail.json").write_bytes(tail.to_bytes())
    options = {
        "--data": folder / "data",
        "--tail": folder / "tail.json",
        "--capture": folder / "capture",
        "--port": 0,
        "--ready-file": "-",
        "--questions": 100_000,
    }
    arguments = [word for name, value in options.items() for word in (name, str(value))]
    with (folder / "service.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603
            [*_command(), "serve", *arguments, "--while-stdin"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        if not first.strip():
            raise RuntimeError(f"the inference service didn't start; see {folder / 'service.log'}")
        ca = ""
        while "END CERTIFICATE" not in ca:
            ca += process.stdout.readline()
        yield InferenceProcess(folder, int(first), ca, process.pid)
    finally:
        process.stdin.close()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _command() -> list[str]:
    return [sys.executable, "-m", "blindsum.cli", "infer"]


def _family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += _family(int(child))
    return found


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS
