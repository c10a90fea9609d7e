"""One worker process of a member: encrypts and decrypts pieces of frames, and may die without harm.

What the aggregator published reaches native code (SEAL, GMP) here and nowhere else of the SDK.

Started by `frame_workers` as a file of its own, so that it loads what it works with and no more of the SDK.
Jobs come on standard input, answers go to standard output; both are messages of our own: a 4-byte
operation, a count, and length-prefixed parts. Nothing is unpickled. The key comes in the first job, in
no argument and no file. It ends when its input does, or when there was nothing to do for a while. Memory
is limited here, time by whoever asked, sizes and counts on both sides of the pipe.
"""

import os
import resource
import select
import signal
import struct
import sys
import time
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from blindsum.crypto.errors import BlindsumError
from blindsum.crypto.schemes.homomorphic.worker_cipher import WorkerCipher

IDLE_SECONDS = 300

MEMORY_BYTES = 1 << 30
"""Address space of a worker above what its libraries take when it starts. A job needs a few megabytes,
paillier's tables 40."""

_HEAD = struct.Struct("<4sI")
_LENGTH = struct.Struct("<Q")
_OPENING = struct.Struct("<QQ")
_REAL = struct.Struct("<d")
_MAX_PARTS = 8
_MAX_PART = 1 << 28


def write_message(out: BinaryIO, operation: bytes, parts: Sequence[bytes | memoryview]) -> None:
    """One message: operation (4 bytes), number of parts, each part with its length in front."""
    out.write(_HEAD.pack(operation, len(parts)))
    for part in parts:
        out.write(_LENGTH.pack(len(part)))
        out.write(part)
    out.flush()


def read_message(stream: BinaryIO) -> tuple[bytes, list[bytes]]:
    """The next message. Raises `EOFError` at the end, `ValueError` for lengths out of bounds."""
    operation, count = _HEAD.unpack(_exactly(stream, _HEAD.size))
    if count > _MAX_PARTS:
        raise ValueError("too many parts")
    parts = []
    for _ in range(count):
        (length,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
        if length > _MAX_PART:
            raise ValueError("a part is too long")
        parts.append(_exactly(stream, length))
    return operation, parts


def _exactly(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise EOFError
    return data


def opening(count: int, contributions: int) -> bytes:
    """The first part of an OPEN job."""
    return _OPENING.pack(count, contributions)


def real_of(part: bytes) -> float:
    """A part that is one number: CPU seconds, or the largest rounding error of an OPEN job."""
    (number,) = _REAL.unpack(part)
    return float(number)


def _serve(jobs: BinaryIO, answers: BinaryIO) -> None:
    cipher: WorkerCipher | None = None
    # A job is asked for only after the last one was answered: what waits is in the pipe, not in a buffer.
    while select.select([jobs], [], [], IDLE_SECONDS)[0]:
        operation, parts = read_message(jobs)
        done: list[bytes] = []
        try:
            if operation == b"SPEC":
                cipher = WorkerCipher(parts[0])
            elif operation == b"SEAL":
                assert cipher is not None
                done = [cipher.encrypt(np.frombuffer(parts[1], "<u8" if parts[0] == b"8" else "<u4"))]
            else:
                assert cipher is not None
                fields, error = cipher.decrypt(parts[1], *_OPENING.unpack(parts[0]))
                done = [fields.astype("<u8").tobytes(), _REAL.pack(error)]
        except (BlindsumError, ValueError) as error:
            # The texts of these errors never carry a secret.
            failed = [_cpu(), type(error).__name__.encode(), str(error).encode()]
            write_message(answers, b"FAIL", failed)
        else:
            write_message(answers, b"DONE", [_cpu(), *done])


def _cpu() -> bytes:
    """CPU seconds of this process so far."""
    return _REAL.pack(time.process_time())


def _limit_memory() -> None:
    """A job that wants more than `MEMORY_BYTES` fails here, and nothing else of the machine with it."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - not a file of ours
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    """Work until standard input ends."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold the key
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the app to act on
    answers = os.fdopen(os.dup(1), "wb")
    # Whatever a library prints must not get between the answers.
    os.dup2(2, 1)
    if sys.platform == "linux":
        _limit_memory()
    try:
        _serve(sys.stdin.buffer, answers)
    except (EOFError, BrokenPipeError):
        return


if __name__ == "__main__":
    main()
