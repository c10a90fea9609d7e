"""The inference service in a process of its own, members with certificates, and what a test asks of both."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from blindsum.aggregator.transport_authority import TransportAuthority
from blindsum.client.inference import CloudTail
from blindsum.client.member_folder import certificate_request, transport_key
from blindsum.crypto.inference.tail_model import TailModel

FEDERATION = bytes(range(32))


class ServiceProcess:
    """`blindsum infer serve` on loopback; `options` are its command-line options."""

    def __init__(self, folder: Path, tail: TailModel, *options: str) -> None:
        self.folder = folder
        self.tail = tail
        (folder / "tail.json").write_bytes(tail.to_bytes())
        self._options = options
        self.log = folder / "service.log"
        self.start()

    def start(self, port: int = 0) -> None:
        command = [
            sys.executable, "-c", "from blindsum.inference.commands import app; app()", "serve",
            "--data", str(self.folder / "data"), "--tail", str(self.folder / "tail.json"),
            "--port", str(port), "--ready-file", "-", "--while-stdin", *self._options,
        ]  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        assert first.strip(), self.log.read_text()
        self.port = int(first)
        self.ca = ""
        while "END CERTIFICATE" not in self.ca:
            self.ca += self.process.stdout.readline()

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    def credentials(self, member: str, authority: Path | None = None, days: int = 1) -> tuple[bytes, bytes]:
        key = transport_key()
        issuer = TransportAuthority(authority or self.folder / "data" / "authority")
        now_ms = time.time_ns() // 1_000_000
        issued = issuer.member_certificate(certificate_request(key, member), FEDERATION, member, days, now_ms)
        return key, issued.chain

    def cloud(self, member: str = "clinic-1", **options: Any) -> CloudTail:
        key, certificate = self.credentials(member)
        options.setdefault("seconds", 20.0)
        return CloudTail(self.address, ca=self.ca, key=key, certificate=certificate, **options)

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def memory(self) -> int:
        """Resident bytes of the service and its workers."""
        processes = [psutil.Process(self.process.pid), *self.workers()]
        return sum(process.memory_info().rss for process in processes)

    def cpu_seconds(self) -> float:
        processes = [psutil.Process(self.process.pid), *self.workers()]
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    def kill(self) -> None:
        for process in [*self.workers(), psutil.Process(self.process.pid)]:
            process.kill()
        self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait(30)
