"""Masks as streams of uint64 lanes: PRG(seed) by AES-256-CTR (protocols.md 1.5, NIST SP 800-38A).

The key is HKDF(seed, label, h1), never the seed; the counter block starts at zero and counts 16-byte
blocks, big-endian; the output is read as little-endian uint64. One key is one stream, so lane i of a
mask can be expanded without the lanes before it, and frames are independent of each other.

`update_into` with a chunk that stays in the cache is several times faster than `update` on the whole:
from 64 KiB on nothing is gained but calls, and 128 KiB saves half of them. All streams of a chunk are added
before the next chunk, so that the sum stays in the cache as well.
"""

import sys
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
from blindsum.crypto.primitives.derivation import derive_key
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

Lanes = NDArray[np.uint64]

LANE_BYTES = 8
CHUNK_LANES = 16384
_LANES_PER_BLOCK = 2
_CONTEXTS_KEPT = 1024
_ZEROS = memoryview(bytes(CHUNK_LANES * LANE_BYTES))

if sys.byteorder != "little":
    raise ImportError("blindsum reads key streams as little-endian lanes and needs such a machine")


def mask_key(seed: bytes, use: str, h1: bytes) -> bytes:
    """The AES key of PRG(seed) for one use in one round: 32 bytes."""
    return derive_key(seed, f"prg {use}", h1)


def _stream(key: bytes) -> CipherContext:
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()


def _counter(first_lane: int) -> bytes:
    if first_lane % _LANES_PER_BLOCK:
        raise ValueError("a range of lanes starts on a whole AES block")
    return (first_lane // _LANES_PER_BLOCK).to_bytes(16, "big")


class _Workspace:
    """What one thread needs: a buffer that stays in its cache, and cipher contexts made once."""

    __slots__ = ("buffer", "bytes", "contexts")

    def __init__(self, keys: Sequence[bytes]) -> None:
        self.buffer: Lanes = np.empty(CHUNK_LANES, dtype="<u8")
        self.bytes = memoryview(self.buffer.data).cast("B")
        self.contexts = [_stream(key) for key in keys[:_CONTEXTS_KEPT]]

    def combine(self, operation: np.ufunc, contexts: Sequence[CipherContext], chunk: Lanes) -> None:
        """Adds or subtracts what the streams give next."""
        stream = self.buffer[: len(chunk)]
        size = len(chunk) * LANE_BYTES
        raw, zeros = self.bytes[:size], _ZEROS[:size]
        for context in contexts:
            context.update_into(zeros, raw)
            operation(chunk, stream, chunk)


class MaskSet:
    """A signed sum of mask streams: those of `added` keys minus those of `subtracted` keys.

    `apply` may run on several threads at once. It doesn't print, pickle or compare.
    """

    __slots__ = ("_added", "_idle", "_keys")

    def __init__(self, added: Sequence[bytes], subtracted: Sequence[bytes] = ()) -> None:
        self._keys = (*added, *subtracted)
        self._added = len(added)
        self._idle: list[_Workspace] = []

    def apply(self, lanes: Lanes, first_lane: int = 0) -> None:
        """Adds lanes `first_lane`... of the signed sum to `lanes`, in place, mod 2^64."""
        start = _counter(first_lane)
        try:
            workspace = self._idle.pop()
        except IndexError:
            workspace = _Workspace(self._keys)
        for first in range(0, len(self._keys), _CONTEXTS_KEPT):
            contexts = workspace.contexts
            if first:  # a member has fewer streams than are kept
                contexts = [_stream(key) for key in self._keys[first : first + _CONTEXTS_KEPT]]
            for context in contexts:
                context.reset_nonce(start)
            added = max(0, self._added - first)
            for at in range(0, len(lanes), CHUNK_LANES):
                chunk = lanes[at : at + CHUNK_LANES]
                workspace.combine(np.add, contexts[:added], chunk)
                workspace.combine(np.subtract, contexts[added:], chunk)
        self._idle.append(workspace)

    def forget(self) -> None:
        """Drops the keys; the set is empty afterwards."""
        self._keys = ()
        self._added = 0
        self._idle.clear()

    def __repr__(self) -> str:
        return f"<MaskSet of {len(self._keys)} streams>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("masks can't be pickled")


def subtract_multiple(key: bytes, times: int, lanes: Lanes, first_lane: int = 0) -> None:
    """Subtracts `times` x the stream of `key` from `lanes`, in place, mod 2^64."""
    context = _stream(key)
    context.reset_nonce(_counter(first_lane))
    buffer: Lanes = np.empty(min(CHUNK_LANES, len(lanes)), dtype="<u8")
    factor = np.uint64(times)
    for at in range(0, len(lanes), CHUNK_LANES):
        chunk = lanes[at : at + CHUNK_LANES]
        stream = buffer[: len(chunk)]
        context.update_into(_ZEROS[: len(chunk) * LANE_BYTES], memoryview(stream.data).cast("B"))
        np.multiply(stream, factor, out=stream)
        np.subtract(chunk, stream, out=chunk)
