"""A pool of worker processes for frame arithmetic in a native library: paillier's gmpy2.

A worker that dies or takes too long is replaced and its job tried again; a frame that two die on is refused,
the server stays.
Calls block: make them from worker threads.
"""

import contextlib
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence

from blindsum.aggregator.native_worker import read_parts, write_parts
from blindsum.aggregator.structured_logs import logger
from blindsum.crypto.errors import BlindsumError, RefusalReason, Refused
from blindsum.crypto.schemes.base import RoundTerms

_log = logger(part="native workers")

Terms = tuple[bytes, bytes, bytes, bytes]


class WorkerDied(BlindsumError):
    """A worker process died or ran out of time on a job that isn't one member's fault alone."""


class _Worker:
    def __init__(self, factory: str) -> None:
        self._process = subprocess.Popen(  # noqa: S603 - our own module, fixed arguments
            [sys.executable, "-m", "blindsum.aggregator.native_worker", factory],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.terms: Terms | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(
        self, operation: bytes, parts: Sequence[bytes | bytearray | memoryview], seconds: float
    ) -> tuple[bytes, list[bytes]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # The time limit ends the process, which ends the blocking read with it.
        guard = threading.Timer(seconds, self._process.kill)
        guard.daemon = True
        guard.start()
        try:
            write_parts(self._process.stdin, operation, parts)  # type: ignore[arg-type]
            return read_parts(self._process.stdout)  # type: ignore[arg-type]
        except (EOFError, OSError, ValueError) as error:
            self.stop()
            raise WorkerDied("the arithmetic worker died or ran out of time") from error
        finally:
            guard.cancel()

    def stop(self) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.wait()


class NativeWorkers:
    """At most `count` worker processes, started when first needed."""

    def __init__(self, count: int, seconds: float, factory: str) -> None:
        self._factory = factory
        self._seconds = seconds
        self._places: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(count):
            self._places.put(None)
        self._count = count

    def pids(self) -> list[int]:
        """Process ids of the workers that idle at the moment."""
        with self._places.mutex:
            return [worker.pid for worker in self._places.queue if worker is not None]

    def _call(self, terms: Terms, operation: bytes, parts: Sequence[bytes | bytearray | memoryview]) -> bytes:
        worker = self._places.get()
        alive: _Worker | None = None
        try:
            if worker is None:
                worker = _Worker(self._factory)
            if worker.terms != terms:
                kind, answer = worker.call(b"OPEN", terms, self._seconds)
                if kind != b"DONE":
                    worker.stop()
                    raise WorkerDied("the arithmetic worker couldn't open the round's terms")
                worker.terms = terms
            kind, answer = worker.call(operation, parts, self._seconds)
            alive = worker
        finally:
            self._places.put(alive)
        if kind == b"DENY":
            raise Refused(RefusalReason(answer[0].decode()), answer[1].decode())
        if kind != b"DONE":
            raise Refused(RefusalReason.MALFORMED, "the frame isn't valid ciphertext")
        return answer[0]

    def _call_again(
        self, terms: Terms, operation: bytes, parts: Sequence[bytes | bytearray | memoryview]
    ) -> bytes:
        """`_call`, once more after a death: it may have been an accident, such as a machine out of memory."""
        try:
            return self._call(terms, operation, parts)
        except WorkerDied:
            _log.error("a worker died, its job is tried again", operation=operation.decode())
            return self._call(terms, operation, parts)

    def check(self, terms: Terms, index: int, frame: bytes | memoryview) -> None:
        """`FrameArithmetic.check` in a worker; a frame that two die on is malformed. Raises `Refused`."""
        try:
            self._call_again(terms, b"TEST", [index.to_bytes(8, "little"), frame])
        except WorkerDied:
            _log.error("workers died while checking a frame", frame=index)
            raise Refused(RefusalReason.MALFORMED, f"frame {index} can't be read as ciphertext") from None

    def add(self, terms: Terms, index: int, total: bytes | None, frames: Sequence[bytes]) -> bytes:
        """The sum of frame `index` with these contributions. Raises `Refused`, `WorkerDied`."""
        return self._call_again(terms, b"PLUS", [index.to_bytes(8, "little"), total or b"", *frames])

    def close(self) -> None:
        """End the processes."""
        for _ in range(self._count):
            worker = self._places.get()
            if worker is not None:
                worker.stop()


def worker_terms(terms: RoundTerms, roster_body: bytes) -> Terms:
    """What a worker needs to know of a round: only public bytes."""
    return (terms.bound.body, roster_body, terms.he_parameters.encode(), terms.he_public)
