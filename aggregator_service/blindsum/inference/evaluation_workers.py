"""The worker processes that evaluate the tail; one that dies or hangs is replaced, the service stays.

A member's requests go to one worker, which keeps its evaluation keys in SEAL's form. Calls block: make them
from threads.
"""

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

from blindsum.aggregator.native_worker import read_parts, write_parts
from blindsum.aggregator.structured_logs import logger
from blindsum.crypto.errors import BlindsumError, RefusalReason, Refused
from blindsum.crypto.inference.tail_model import TailModel
from blindsum.crypto.inference.tail_wire import keys_digest

_log = logger(part="evaluation workers")


class WorkerDied(BlindsumError):
    """A worker process died or ran out of time."""


class _Worker:
    """A process, started when it is first needed and again after it died."""

    def __init__(self, tail: Sequence[bytes], seconds: float) -> None:
        self._tail = tail
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def call(self, operation: bytes, parts: Sequence[bytes]) -> tuple[bytes, list[bytes]]:
        if self._process is not None and self._process.poll() is not None:
            self.stop()  # it died while it had nothing to do
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "blindsum.inference.evaluation_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            kind, answer = self._exchange(self._process, b"TAIL", self._tail)
            if kind != b"DONE":
                self.stop()
                raise BlindsumError(f"a worker can't load the tail: {answer[0].decode()}")
        return self._exchange(self._process, operation, parts)

    def _exchange(
        self, process: "subprocess.Popen[bytes]", operation: bytes, parts: Sequence[bytes]
    ) -> tuple[bytes, list[bytes]]:
        assert process.stdin is not None
        assert process.stdout is not None
        # The time limit ends the process, which ends the blocking read with it.
        guard = threading.Timer(self._seconds, process.kill)
        guard.daemon = True
        guard.start()
        try:
            write_parts(process.stdin, operation, parts)  # type: ignore[arg-type]
            return read_parts(process.stdout)  # type: ignore[arg-type]
        except (EOFError, OSError, ValueError) as error:
            self.stop()
            raise WorkerDied("an evaluation worker died or ran out of time") from error
        finally:
            guard.cancel()

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        process.wait()


class EvaluationWorkers:
    """`count` processes for one tail; each keeps the evaluation keys of `cached` members ready."""

    def __init__(self, model: TailModel, count: int, seconds: float, cached: int) -> None:
        tail = (model.to_bytes(), cached.to_bytes(4, "little"))
        self._workers = [_Worker(tail, seconds) for _ in range(count)]

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    def start(self) -> None:
        """Start all processes and give them the tail. Raises `BlindsumError` if they can't load it."""
        for worker in self._workers:
            with worker.lock:
                worker.call(b"EVAL", (bytes(32), b""))

    def register(self, keys: bytes) -> bytes:
        """Load evaluation keys; their digest. Raises `Refused`."""
        digest = keys_digest(keys)
        worker = self._of(digest)
        with worker.lock:
            try:
                self._answer(worker.call(b"LOAD", (keys,)))
            except WorkerDied:
                _log.error("a worker died while loading evaluation keys")
                raise Refused(RefusalReason.MALFORMED, "the evaluation keys can't be loaded") from None
        return digest

    def evaluate(self, digest: bytes, frame: bytes, keys: Callable[[], bytes]) -> bytes:
        """The encrypted answer to a frame; `keys` fetches the evaluation keys. Raises `Refused`."""
        worker = self._of(digest)
        with worker.lock:
            for _ in range(2):  # the first death may have been an accident
                try:
                    return self._evaluated(worker, digest, frame, keys)
                except WorkerDied:
                    _log.error("a worker died while evaluating")
        raise Refused(RefusalReason.MALFORMED, "the encrypted feature can't be evaluated")

    def _evaluated(self, worker: _Worker, digest: bytes, frame: bytes, keys: Callable[[], bytes]) -> bytes:
        answer = self._answer(worker.call(b"EVAL", (digest, frame)))
        if answer is None:
            self._answer(worker.call(b"LOAD", (keys(),)))
            answer = self._answer(worker.call(b"EVAL", (digest, frame)))
        if answer is None:
            raise Refused(RefusalReason.WRONG_DIGEST, "these evaluation keys aren't what was registered")
        return answer

    @staticmethod
    def _answer(reply: tuple[bytes, list[bytes]]) -> bytes | None:
        kind, parts = reply
        if kind == b"DENY":
            raise Refused(RefusalReason(parts[0].decode()), parts[1].decode())
        if kind == b"FAIL":
            raise Refused(RefusalReason.MALFORMED, "a worker can't compute on this")
        return None if kind == b"MISS" else parts[0]

    def _of(self, digest: bytes) -> _Worker:
        return self._workers[int.from_bytes(digest[:4], "little") % len(self._workers)]

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            with worker.lock:
                worker.stop()
