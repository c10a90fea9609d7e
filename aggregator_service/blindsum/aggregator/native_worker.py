"""One worker process: frame arithmetic that may die on hostile bytes without taking the server along.

Started by `native_workers` with the schemes' factory as its argument. It reads jobs from standard input
and writes answers to standard output; both are frames of our own: a 4-byte operation, a count, and
length-prefixed parts. Nothing is unpickled. Memory is limited here, time by the server, sizes and counts on
both sides of the pipe.
"""

import os
import resource
import struct
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from blindsum.crypto.canonical import decode_document
from blindsum.crypto.errors import BlindsumError, Refused
from blindsum.crypto.schemes.base import FrameArithmetic, RoundTerms
from blindsum.crypto.trust.documents import document_digest
from blindsum.crypto.trust.header import BoundHeader
from blindsum.crypto.trust.roster import KIND, Roster

_HEAD = struct.Struct("<4sI")
_LENGTH = struct.Struct("<Q")
_MAX_PARTS = 4096
_MAX_PART = 1 << 28

MEMORY_BYTES = 1 << 30
"""Address space of a worker above what it has when it starts; adding a frame takes a few megabytes."""


def write_parts(out: BinaryIO, operation: bytes, parts: Sequence[bytes | bytearray | memoryview]) -> None:
    """One message: operation (4 bytes), number of parts, each part with its length in front."""
    out.write(_HEAD.pack(operation, len(parts)))
    for part in parts:
        out.write(_LENGTH.pack(len(part)))
        out.write(part)
    out.flush()


def _exactly(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise EOFError
    return data


def read_parts(stream: BinaryIO) -> tuple[bytes, list[bytes]]:
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


def factory(path: str) -> Any:
    """The callable named `module:attribute`."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def _arithmetic(schemes: Any, parts: list[bytes]) -> FrameArithmetic:
    header, roster_body, parameters, public = parts
    bound = BoundHeader.parse(header)
    if document_digest(KIND, roster_body) != bound.header.roster:
        raise ValueError("the roster isn't the header's")
    roster = decode_document(roster_body, Roster, "the roster")
    terms = RoundTerms(bound, roster, parameters.decode(), public)
    machine = schemes(bound.header.scheme).aggregator(terms)
    arithmetic: FrameArithmetic = machine.arithmetic()
    return arithmetic


def _serve(schemes: Any, jobs: BinaryIO, answers: BinaryIO) -> None:
    arithmetic: FrameArithmetic | None = None
    while True:
        operation, parts = read_parts(jobs)
        try:
            if operation == b"OPEN":
                arithmetic = _arithmetic(schemes, parts)
                result = b""
            else:
                assert arithmetic is not None
                index = int.from_bytes(parts[0], "little")
                if operation == b"TEST":
                    arithmetic.check(index, parts[1])
                    result = b""
                else:
                    total = bytearray(parts[1]) if parts[1] else None
                    for frame in parts[2:]:
                        total = arithmetic.add(index, total, frame)
                    result = bytes(total or b"")
        except Refused as refusal:
            write_parts(answers, b"DENY", [refusal.reason.value.encode(), refusal.text.encode()])
        except (BlindsumError, ValueError) as error:
            write_parts(answers, b"FAIL", [type(error).__name__.encode()])
        else:
            write_parts(answers, b"DONE", [result])


def _limit_memory() -> None:
    """A frame that wants more than `MEMORY_BYTES` ends this process, and nothing else of the machine."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    """Work until standard input ends."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        _limit_memory()
    answers = os.fdopen(os.dup(1), "wb")
    # Whatever a library prints must not get between the answers.
    os.dup2(2, 1)
    try:
        _serve(factory(sys.argv[1]), sys.stdin.buffer, answers)
    except EOFError:
        return


if __name__ == "__main__":
    main()
