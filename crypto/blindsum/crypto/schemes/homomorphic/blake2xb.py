"""The stream that SEAL expands a ciphertext's public seed into, without SEAL.

A seeded ciphertext carries 64 bytes in place of its second polynomial. SEAL (4.x, `Blake2xbPRNG` in
randomgen.cpp and `sample_poly_uniform` in util/rlwe.cpp) expands them with BLAKE2Xb: 4,096 bytes for
each value of a counter, then rejection sampling below each prime. Doing the same here means that an
aggregator parses and adds without any homomorphic library.

BLAKE2Xb comes in numpy, and twice as fast from the C function of that name which TenSEAL's binary
exports, where TenSEAL is installed. That function is a hash: it takes 72 bytes and fills 4,096.
"""

import ctypes
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

SEED_BYTES = 64
_REFILL_BYTES = 4096
_REFILL_WORDS = _REFILL_BYTES // 8
_BLOCKS = _REFILL_BYTES // 64
_ALL_ONES = (1 << 64) - 1

# BLAKE2b, RFC 7693 sections 2.6 and 2.7.
_IV = (
    0x6A09E667F3BCC908,
    0xBB67AE8584CAA73B,
    0x3C6EF372FE94F82B,
    0xA54FF53A5F1D36F1,
    0x510E527FADE682D1,
    0x9B05688C2B3E6C1F,
    0x1F83D9ABFB41BD6B,
    0x5BE0CD19137E2179,
)
_SIGMA = (
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
    (14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3),
    (11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4),
    (7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8),
    (9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13),
    (2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9),
    (12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11),
    (13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10),
    (6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5),
    (10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0),
)
# numpy converts an array without dimensions faster than a number.
_ROTATIONS = tuple(
    (np.array(right, np.uint64), np.array(64 - right, np.uint64)) for right in (32, 24, 16, 63)
)
# Roots expanded together: large enough to drown numpy's call overhead, small enough for the L2 cache.
_GROUP = 64

Stream = Callable[[Sequence[bytes], int], Words]
"""Seeds and a number of refills in, (seeds, refills * 512) little-endian words out."""


def expand_uniform(seeds: Sequence[bytes], degree: int, primes: Sequence[int]) -> list[Words]:
    """The uniform polynomials that SEAL derives from each seed.

    Returns one (len(seeds), degree) array for each prime, each coefficient below its prime, in the
    order in which SEAL stores them. `degree * len(primes) * 8` is a multiple of 4,096 for every
    ring in use.
    """
    need = degree * len(primes) * 8
    refills = need // _REFILL_BYTES
    assert refills * _REFILL_BYTES == need
    stream = (seal_stream() or numpy_stream)(seeds, refills).reshape(len(seeds), len(primes), degree)
    found = []
    bounds = [_ALL_ONES - _ALL_ONES % prime - 1 for prime in primes]
    rejected = [stream[:, j] >= np.uint64(bounds[j]) for j in range(len(primes))]
    for row in np.flatnonzero(np.any([mask.any(axis=1) for mask in rejected], axis=0)).tolist():
        fresh = _words_after(seeds[row], refills)
        for j, bound in enumerate(bounds):
            for position in np.flatnonzero(rejected[j][row]):
                stream[row, j, position] = next(word for word in fresh if word < bound)
    for j, prime in enumerate(primes):
        words = stream[:, j]
        modulus = np.uint64(prime)
        found.append(words - words // modulus * modulus)
    return found


def numpy_stream(seeds: Sequence[bytes], refills: int) -> Words:
    """BLAKE2Xb in numpy, for all seeds at once."""
    roots = b"".join(_root(seed, counter) for seed in seeds for counter in range(refills))
    return _expand_roots(roots).reshape(len(seeds), refills * _REFILL_WORDS)


@cache
def seal_stream() -> Stream | None:
    """BLAKE2Xb by TenSEAL's binary; None where that is missing or disagrees with numpy.

    Only the hash is called, and the library's Python side isn't imported.
    """
    spec = find_spec("_tenseal_cpp")
    if spec is None or spec.origin is None:
        return None
    try:
        blake2xb = ctypes.CDLL(spec.origin).blake2xb
    except (OSError, AttributeError):
        return None
    size, data = ctypes.c_size_t, ctypes.c_char_p
    blake2xb.argtypes = [ctypes.c_void_p, size, data, size, data, size]
    blake2xb.restype = ctypes.c_int

    def stream(seeds: Sequence[bytes], refills: int) -> Words:
        out = np.empty((len(seeds), refills * _REFILL_WORDS), np.uint64)
        address = out.ctypes.data
        for seed in seeds:
            assert len(seed) == SEED_BYTES
            for counter in range(refills):
                failed = blake2xb(address, _REFILL_BYTES, counter.to_bytes(8, "little"), 8, seed, SEED_BYTES)
                assert not failed
                address += _REFILL_BYTES
        return out

    probe = [bytes(range(SEED_BYTES)), bytes(SEED_BYTES)]
    return stream if np.array_equal(stream(probe, 2), numpy_stream(probe, 2)) else None


def _root(seed: bytes, counter: int) -> bytes:
    """The BLAKE2Xb root hash of one refill; the output length sits in the upper half of the offset."""
    return hashlib.blake2b(
        counter.to_bytes(8, "little"), key=seed, digest_size=64, node_offset=_REFILL_BYTES << 32
    ).digest()


def _words_after(seed: bytes, refill: int) -> Iterator[int]:
    while True:
        yield from _expand_roots(_root(seed, refill)).ravel().tolist()
        refill += 1


def _expand_roots(roots: bytes) -> Words:
    """64 bytes a root in, 4,096 bytes a root out, as a (roots, 512) array of little-endian words."""
    message = np.frombuffer(roots, "<u8").reshape(-1, 8)
    count = message.shape[0]
    out = np.empty((count, _BLOCKS, 8), np.uint64)
    for start in range(0, count, _GROUP):
        _compress(message[start : start + _GROUP], out[start : start + _GROUP])
    return out.reshape(count, -1)


def _compress(roots: Words, out: Words) -> None:
    """One BLAKE2b compression for each (root, block): the leaves of BLAKE2X, all of them 64 bytes."""
    count = roots.shape[0]
    size = count * _BLOCKS
    message = [np.repeat(roots[:, i], _BLOCKS) for i in range(8)]
    state = [np.full(size, word, np.uint64) for word in _IV]
    # Parameter block: digest 64, leaf length 64, node offset = block, output length, inner length 64.
    state[0] ^= np.uint64(64 | 64 << 32)
    state[1] ^= np.tile(np.arange(_BLOCKS, dtype=np.uint64) | np.uint64(_REFILL_BYTES << 32), count)
    state[2] ^= np.uint64(64 << 8)
    first = [word.copy() for word in state]
    state += [np.full(size, word, np.uint64) for word in _IV]
    state[12] ^= np.uint64(64)
    state[14] ^= np.uint64(_ALL_ONES)
    spare = np.empty(size, np.uint64)

    def rotate(word: Words, other: Words, by: int) -> None:
        right, left = _ROTATIONS[by]
        np.bitwise_xor(word, other, word)
        np.left_shift(word, left, spare)
        np.right_shift(word, right, word)
        np.bitwise_or(word, spare, word)

    def mix(a: Words, b: Words, c: Words, d: Words, x: int, y: int) -> None:
        for word, turn in ((x, 0), (y, 2)):
            np.add(a, b, a)
            if word < 8:  # the upper half of the message block is zero
                np.add(a, message[word], a)
            rotate(d, a, turn)
            np.add(c, d, c)
            rotate(b, c, turn + 1)

    for turn in range(12):
        order = _SIGMA[turn % 10]
        for i in range(4):
            mix(state[i], state[4 + i], state[8 + i], state[12 + i], order[2 * i], order[2 * i + 1])
        for i in range(4):
            b, c, d = 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4
            mix(state[i], state[b], state[c], state[d], order[8 + 2 * i], order[9 + 2 * i])
    flat = out.reshape(size, 8)
    for i in range(8):
        np.bitwise_xor(state[i], state[i + 8], spare)
        np.bitwise_xor(spare, first[i], flat[:, i])
