"""Worker processes for bfv, ckks and paillier: native code on all cores, in processes that may die.

One pool for all members of a process, so that each worker makes its key's context or table of powers once.
A worker that dies, hangs or runs out of memory is replaced, and its piece, which nobody has seen, is made
again by another; a piece that several die on ends as a typed error. Workers end by themselves when there
is nothing to do for a while, and with the process that they work for.
"""

import atexit
import contextlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from blindsum.client import frame_worker
from blindsum.client.frame_worker import opening, read_message, real_of, write_message
from blindsum.crypto.errors import BlindsumError, OpeningFailed
from blindsum.crypto.schemes.base import Fields, FrameProtector, SummedFields, SumOpener
from blindsum.crypto.schemes.homomorphic.rounds import HomomorphicOpener, HomomorphicProtector
from blindsum.crypto.schemes.homomorphic.worker_cipher import PieceWork

_log = logging.getLogger("blindsum.client")

_MOST_WORKERS = 8
_PIECE_SECONDS = 120.0
"""A piece takes milliseconds to a fifth of a second, paillier's table a second or two."""

_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Nothing of a worker uses threads, and their stacks would count as its memory."""
_ATTEMPTS = 3


class WorkerDied(BlindsumError):
    """Worker processes died or ran out of time on the same piece several times."""


class _Worker:
    def __init__(self) -> None:
        # As a file of its own it doesn't load the SDK; -P keeps its folder from being searched for modules.
        self._process = subprocess.Popen(  # noqa: S603 - our own module, no arguments
            [sys.executable, "-P", str(Path(frame_worker.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env=os.environ | _ENVIRONMENT,
        )
        self.spec = b""
        self.cpu_seconds = 0.0

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def call(self, operation: bytes, parts: Sequence[bytes | memoryview]) -> list[bytes]:
        """The answer's parts. Raises `EOFError`, `OSError` or `ValueError` if there is none."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # The time limit ends the process, which ends the blocking read with it.
        guard = threading.Timer(_PIECE_SECONDS, self._process.kill)
        guard.daemon = True
        guard.start()
        try:
            write_message(self._process.stdin, operation, parts)  # type: ignore[arg-type]
            kind, answer = read_message(self._process.stdout)  # type: ignore[arg-type]
        finally:
            guard.cancel()
        if not answer:
            raise ValueError("an answer without its CPU seconds")
        self.cpu_seconds = real_of(answer[0])
        if kind == b"DONE":
            return answer[1:]
        name, text = (part.decode() for part in answer[1:])
        if name == OpeningFailed.__name__:
            raise OpeningFailed(text)
        raise BlindsumError(f"a worker process failed: {text} ({name})")

    def stop(self) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.wait()


class FrameWorkers:
    """At most `count` worker processes, started when first needed."""

    def __init__(self, count: int) -> None:
        self._free: list[_Worker | None] = [None] * count
        self._freed = threading.Condition()
        self._running: set[_Worker] = set()
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="blindsum-workers")
        self._count = count

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that have nothing to do at the moment."""
        with self._freed:
            return [worker.pid for worker in self._free if worker is not None]

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of the workers that run, as of their last answers; those that ended aren't in it."""
        with self._freed:
            return sum(worker.cpu_seconds for worker in self._running)

    def start(self, work: PieceWork, most: int = _MOST_WORKERS) -> None:
        """Start workers and give them the key: all that a frame keeps busy, at most so many.

        Raises `WorkerDied` where processes can't be started.
        """
        count = min(self._count, most)
        list(self._threads.map(lambda _: self._call(work.spec, b"", ()), range(count)))

    def encrypt(self, work: PieceWork, fields: Fields) -> bytes:
        """A frame, its pieces encrypted by all workers. Raises `WorkerDied`."""

        def piece(part: Fields) -> bytes:
            kind = b"8" if part.dtype == np.uint64 else b"4"
            data = np.ascontiguousarray(part, f"<u{kind.decode()}").tobytes()
            return self._call(work.spec, b"SEAL", (kind, data))[0]

        return work.join_upload(list(self._threads.map(piece, work.cut_fields(fields))))

    def decrypt(
        self, work: PieceWork, frame: bytes | memoryview, count: int, contributions: int
    ) -> tuple[SummedFields, float]:
        """The summed fields of a frame and the largest rounding error. `OpeningFailed`, `WorkerDied`."""

        def piece(part: tuple[bytes, int]) -> list[bytes]:
            return self._call(work.spec, b"OPEN", (opening(part[1], contributions), part[0]))

        answers = list(self._threads.map(piece, work.cut_sum(frame, count)))
        summed = np.frombuffer(b"".join(fields for fields, _ in answers), "<u8").astype(np.uint64)
        if summed.size != count:
            raise OpeningFailed(f"a worker opened {summed.size} fields instead of {count}")
        return summed, max(real_of(error) for _, error in answers)

    def _call(self, spec: bytes, operation: bytes, parts: Sequence[bytes]) -> list[bytes]:
        failure: Exception = EOFError()
        for _ in range(_ATTEMPTS):
            worker = self._take(spec)
            try:
                if worker is None:
                    worker = _Worker()
                    with self._freed:
                        self._running.add(worker)
                if worker.spec != spec:
                    worker.call(b"SPEC", (spec,))
                    worker.spec = spec
                return worker.call(operation, parts) if operation else []
            except (EOFError, OSError, ValueError) as error:
                failure = error
                _log.warning("a worker process died or ran out of time; its piece goes to another")
                if worker is not None:
                    self._stop(worker)
                    worker = None
            finally:
                with self._freed:
                    self._free.append(worker)
                    self._freed.notify()
        raise WorkerDied(
            "worker processes died or ran out of time on the same piece; is there memory for them?"
        ) from failure

    def _take(self, spec: bytes) -> _Worker | None:
        """A free place, if possible one whose worker has this key."""
        with self._freed:
            self._freed.wait_for(lambda: self._free)
            worker = next((w for w in self._free if w is not None and w.spec == spec), self._free[0])
            self._free.remove(worker)
        if worker is not None and not worker.alive:
            # It had nothing to do for long.
            self._stop(worker)
            return None
        return worker

    def _stop(self, worker: _Worker) -> None:
        with self._freed:
            self._running.discard(worker)
        worker.stop()

    def end_idle(self) -> None:
        """End the workers that have nothing to do, and forget the key with them."""
        with self._freed:
            idle = self._free
            self._free = [None] * len(idle)
        for worker in idle:
            if worker is not None:
                self._stop(worker)

    def close(self) -> None:
        """End all workers once their pieces are done."""
        self._threads.shutdown()
        self.end_idle()


class _Shared:
    """The pool of this process, made when first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._workers: FrameWorkers | None = None
        self._useless = False

    def started(self, work: PieceWork, most: int) -> FrameWorkers | None:
        """The workers, at most so many ready with the key; None where one process must do."""
        if not sys.executable or self._useless:
            return None
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with self._lock:
            if self._workers is None:
                self._workers = FrameWorkers(min(_MOST_WORKERS, cores))
            workers = self._workers
        try:
            workers.start(work, most)
        except WorkerDied as error:
            _log.warning("working in one process: %s", error)
            self._useless = True
            return None
        return workers

    @property
    def pids(self) -> list[int]:
        return [] if self._workers is None else self._workers.pids

    @property
    def cpu_seconds(self) -> float:
        return 0.0 if self._workers is None else self._workers.cpu_seconds

    def end_idle(self) -> None:
        if self._workers is not None:
            self._workers.end_idle()

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()

    def forget(self) -> None:
        """In a forked child: the pipes are the parent's, and so are the answers."""
        self.__dict__.update(_Shared().__dict__)


_shared = _Shared()
atexit.register(_shared.close)
os.register_at_fork(after_in_child=_shared.forget)


def end_idle_workers() -> None:
    """End the workers of this process that have nothing to do; they are started again when needed."""
    _shared.end_idle()


def start_workers(work: PieceWork) -> FrameWorkers | None:
    """The workers of this process, all started and ready with a key; None where none can be started."""
    return _shared.started(work, _MOST_WORKERS)


def worker_pids() -> list[int]:
    """Process ids of this process' workers that have nothing to do at the moment."""
    return _shared.pids


def worker_cpu_seconds() -> float:
    """CPU seconds of this process' workers that still run, as of their last answers."""
    return _shared.cpu_seconds


def spread_protector(protector: FrameProtector) -> FrameProtector:
    """The protector, or for a scheme with native code one whose frames are encrypted by worker processes."""
    if isinstance(protector, HomomorphicProtector):
        workers = _shared.started(protector.work, protector.work.pieces)
        if workers is not None:
            return _SpreadProtector(protector, workers)
    return protector


def spread_opener(opener: SumOpener) -> SumOpener:
    """The opener, or for a scheme with native code one whose frames are decrypted by worker processes."""
    if isinstance(opener, HomomorphicOpener):
        workers = _shared.started(opener.work, opener.work.pieces)
        if workers is not None:
            return _SpreadOpener(opener, workers)
    return opener


class _SpreadProtector:
    def __init__(self, protector: HomomorphicProtector, workers: FrameWorkers) -> None:
        self.layout, self.h1 = protector.layout, protector.h1
        self._protector = protector
        self._workers = workers

    def protect(self, index: int, fields: Fields) -> bytes:
        """See `FrameProtector.protect`."""
        self._protector.hand_over(index, fields)
        return self._workers.encrypt(self._protector.work, fields)


class _SpreadOpener:
    def __init__(self, opener: HomomorphicOpener, workers: FrameWorkers) -> None:
        self.survivors, self.layout, self.h1 = opener.survivors, opener.layout, opener.h1
        self.max_error = 0.0
        self._opener = opener
        self._workers = workers

    def open(self, index: int, frame: bytes | memoryview) -> SummedFields:
        """See `SumOpener.open`. A frame on which workers keep dying doesn't open."""
        count = self._opener.hand_over(index, frame)
        try:
            summed, error = self._workers.decrypt(self._opener.work, frame, count, len(self.survivors))
        except WorkerDied as death:
            raise OpeningFailed(f"frame {index} of the sum doesn't open: {death}") from death
        self.max_error = max(self.max_error, error)
        return self._opener.take_back(index, summed)
