"""What masking can't be faster than: AES-256-CTR over the masks' bytes, one addition each (protocols.md 5).

`update_into` on a preallocated buffer, chunk by chunk, then one in-place uint64 addition of the chunk:
measured with the chunk that is fastest on this machine, in the run that it is compared with.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from blindsum.bench.cpu_time import process_cpu
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

CHUNKS = tuple(1 << power for power in range(14, 21))
"""16 KiB to 1 MiB."""

REPEATS = 5
_SAMPLE_BYTES = 1 << 25
_LANE_BYTES = 8


@dataclass(frozen=True)
class Limit:
    """CPU seconds of `streams` masks over `range_bytes` packed bytes each, additions included."""

    seconds: float
    streams: int
    range_bytes: int
    chunk_bytes: int

    @property
    def per_stream(self) -> float:
        """CPU seconds of one stream."""
        return self.seconds / self.streams

    @property
    def gigabytes_per_s(self) -> float:
        """10^9 bytes of mask expanded and added in a CPU second."""
        return self.streams * self.range_bytes / self.seconds / 1e9


def measure_limit(streams: int, range_bytes: int) -> Limit:
    """The best of `REPEATS` with the best chunk, for `streams` masks over `range_bytes` bytes each."""
    lanes = np.zeros(-(-range_bytes // _LANE_BYTES), np.uint64)
    few = max(1, min(streams, _SAMPLE_BYTES // max(range_bytes, 1)))
    sample = lanes[: _SAMPLE_BYTES // _LANE_BYTES]
    chunk = min(CHUNKS, key=lambda size: min(_pass(sample, few, size) for _ in range(3)))
    seconds = min(_pass(lanes, streams, chunk) for _ in range(REPEATS))
    return Limit(seconds, streams, range_bytes, chunk)


def _pass(lanes: NDArray[np.uint64], streams: int, chunk: int) -> float:
    contexts = [_context() for _ in range(min(streams, 64))]
    zeros = bytes(chunk)
    buffer = np.empty(chunk // _LANE_BYTES, np.uint64)
    start = process_cpu()
    for at in range(0, lanes.size, buffer.size):
        part = lanes[at : at + buffer.size]
        stream = buffer[: part.size]
        _add_streams(part, stream, stream.data.cast("B"), zeros, contexts, streams)
    return process_cpu() - start


def _add_streams(
    part: NDArray[np.uint64],
    stream: NDArray[np.uint64],
    raw: memoryview,
    zeros: bytes,
    contexts: Sequence[CipherContext],
    streams: int,
) -> None:
    source = memoryview(zeros)[: len(raw)]
    for index in range(streams):
        contexts[index % len(contexts)].update_into(source, raw)
        np.add(part, stream, out=part)


def _context() -> CipherContext:
    return Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16))).encryptor()
