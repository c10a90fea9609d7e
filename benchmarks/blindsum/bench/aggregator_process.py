"""The aggregator of a measured round, in a process of its own: its CPU and memory are nobody else's.

    python -m blindsum.bench.aggregator_process

Commands come on standard input, answers go to standard output: 8 bytes of length, little-endian, then a
MessagePack array. Only work on decoded commands is charged, not reading and writing them. Pieces of an
upload are decoded by the service's own parser, and a frame is hashed once it is complete, as in the service;
the upload that is being received is held in memory, where the service holds it on disk.
"""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import IO, Any, Self, TypeVar

import msgspec
from blindsum.aggregator.memory_allocator import keep_large_buffers
from blindsum.aggregator.upload_chunk import decode_chunk
from blindsum.bench.cpu_time import StepClock, without_collection
from blindsum.bench.peak_memory import PeakMemory
from blindsum.crypto.canonical import decode_document, encode_document
from blindsum.crypto.schemes.base import RoundTerms, frame_digest, upload_digest
from blindsum.crypto.schemes.registry import scheme
from blindsum.crypto.trust.header import BoundHeader
from blindsum.crypto.trust.roster import Roster
from blindsum.proto.v1 import round_pb2

_DOWNLOAD_CHUNK = 1 << 18

T = TypeVar("T")


def _write(stream: IO[bytes], value: Any) -> None:
    data = msgspec.msgpack.encode(value)
    stream.write(len(data).to_bytes(8, "little"))
    stream.write(data)
    stream.flush()


def _read(stream: IO[bytes]) -> Any:
    length = stream.read(8)
    if len(length) < 8:
        return None
    return msgspec.msgpack.decode(stream.read(int.from_bytes(length, "little")))


class _Server:
    """The commands, by name."""

    def __init__(self, header: bytes, roster: bytes, he_parameters: str, he_public: bytes, threads: int):
        bound = BoundHeader.parse(header)
        terms = RoundTerms(bound, decode_document(roster, Roster, "the roster"), he_parameters, he_public)
        self._pool = ThreadPoolExecutor(threads)
        self._pool.submit(int).result()
        self._clock = StepClock()
        self._aggregate = StepClock()
        self._peaks: dict[str, int | None] = {}
        chosen = scheme(bound.header.scheme)  # imports its modules: not the round's cost
        self._memory = PeakMemory()
        with self._clock.running("advertise" if bound.header.scheme == "masking" else "upload"):
            self._round = chosen.aggregator(terms)
            self._arithmetic = self._round.arithmetic()
        self._number = bound.header.round
        self._sums: list[bytearray | None] = [None] * self._round.layout.frames
        self._threads = threads
        self._frames: list[bytes | memoryview] = []
        self._digests: list[bytes] = []
        self._pieces: list[memoryview] = []
        self._piece_bytes = 0

    def state(self) -> tuple[str | None, tuple[str, ...], str]:
        """The open step, whom it asks, and why the round was given up, if it was."""
        abort = self._round.abort
        return self._round.step, self._round.participants, abort.reason if abort else ""

    def request(self, member: str) -> bytes:
        """The serialised request of the open step."""
        with self._clock.running(str(self._round.step)):
            request = self._round.request(member)
            return round_pb2.GetStepResponse(request=request).SerializeToString()

    def answer(self, member: str, message: bytes) -> None:
        """A serialised reply to a message step."""
        with self._clock.running(str(self._round.step)):
            self._round.accept(member, round_pb2.AnswerRequest.FromString(message).reply)

    def chunks(self, messages: list[bytes]) -> None:
        """Serialised pieces of the upload that is coming in."""
        with self._clock.running("upload"):
            for message in messages:
                self._take(decode_chunk(message).data)

    def _take(self, piece: memoryview) -> None:
        self._pieces.append(piece)
        self._piece_bytes += len(piece)
        if self._piece_bytes == self._round.layout.upload_bytes(len(self._frames)):
            whole = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
            self._frames.append(whole)
            self._digests.append(frame_digest(whole))
            self._pieces.clear()
            self._piece_bytes = 0

    def commit(self, member: str, message: bytes) -> None:
        """The serialised reply to the upload step: the frames before it are checked, accepted and added."""
        with self._clock.running("upload"):
            reply = round_pb2.BeginUploadRequest.FromString(message).reply
            if upload_digest(self._round.h1, self._digests) != self._round.expected_digest(reply):
                raise ValueError(f"the frames of {member} aren't those that it signed")
            with self._aggregate.running("check"):
                for index, frame in enumerate(self._frames):
                    self._arithmetic.check(index, frame)
            self._round.accept(member, reply)
            with self._aggregate.running("add"):
                self._spread(self._add, range(len(self._frames)))
            self._frames.clear()
            self._digests.clear()

    def _spread(self, work: Callable[[int], T], frames: range) -> list[T]:
        """The work on every frame, each thread on a stretch of its own."""
        each = -(-len(frames) // self._threads)
        stretches = [frames[at : at + each] for at in range(0, len(frames), each)]
        return list(chain.from_iterable(self._pool.map(lambda part: list(map(work, part)), stretches)))

    def _add(self, index: int) -> None:
        self._sums[index] = self._arithmetic.add(index, self._sums[index], self._frames[index])

    def close(self) -> None:
        """Close the open step."""
        step = str(self._round.step)
        with self._clock.running(step):
            self._round.close()
        self._peaks[step] = self._memory.above
        self._memory.restart()

    def result(self) -> bytes:
        """The serialised result message."""
        with self._clock.running("finish"):
            message = round_pb2.GetResultResponse(
                result=self._round.result(), total=self._round.layout.result_total
            )
            return message.SerializeToString()

    def results(self, start: int, stop: int) -> list[list[bytes]]:
        """Frames of the published sum, each as serialised pieces."""
        with self._clock.running("finish"):
            pieces = self._spread(self._finish, range(start, stop))
        self._peaks["finish"] = self._memory.above
        return pieces

    def _finish(self, index: int) -> list[bytes]:
        total = self._sums[index]
        assert total is not None
        frame = self._round.finish_frame(index, total)
        return [
            round_pb2.DownloadResponse(data=frame[at : at + _DOWNLOAD_CHUNK]).SerializeToString()
            for at in range(0, len(frame), _DOWNLOAD_CHUNK)
        ]

    def report(self) -> dict[str, Any]:
        """CPU seconds by step, those of checking and adding frames, and peak bytes above the idle server."""
        return {
            "cpu_s": dict(self._clock.seconds),
            "aggregate_cpu_s": self._aggregate.total,
            "peak_bytes": self._peaks,
        }


def main() -> None:
    """Serves commands until standard input ends."""
    source, target = sys.stdin.buffer, sys.stdout.buffer
    keep_large_buffers()  # as the service does
    server = _Server(*_read(source))
    _write(target, None)
    with without_collection():
        while (command := _read(source)) is not None:
            name, *arguments = command
            handler: Callable[..., Any] = getattr(server, name)
            answer = handler(*arguments)
            if name != "chunks":
                _write(target, answer)


class AggregatorProcess:
    """The other end: starts the process and calls its commands."""

    def __init__(self, terms: RoundTerms, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._out, self._in = self._process.stdin, self._process.stdout
        roster = encode_document(terms.roster)
        _write(self._out, (terms.bound.body, roster, terms.he_parameters, terms.he_public, threads))
        self._answer()

    def call(self, name: str, *arguments: Any) -> Any:
        """The answer to a command."""
        self.send(name, *arguments)
        return self._answer()

    def send(self, name: str, *arguments: Any) -> None:
        """A command that has no answer."""
        _write(self._out, (name, *arguments))

    def _answer(self) -> Any:
        length = self._in.read(8)
        if len(length) < 8:
            raise RuntimeError("the aggregator's process ended; its error is above")
        return msgspec.msgpack.decode(self._in.read(int.from_bytes(length, "little")))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()
        self._process.wait()
        self._in.close()


if __name__ == "__main__":
    main()
