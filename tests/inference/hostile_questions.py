"""Hostile versions of good questions and keys, most of them well-formed enough for the native code."""

from collections.abc import Callable

import numpy as np
from blindsum.crypto.inference.circuit import SQUARE
from blindsum.crypto.schemes.homomorphic.blake2xb import SEED_BYTES, Words
from blindsum.crypto.schemes.homomorphic.cipher import KEY_TAG_BYTES
from blindsum.crypto.schemes.homomorphic.lattice import pack_polynomials, unpack_polynomials

_RING = SQUARE.ring
_HEAD = KEY_TAG_BYTES + SEED_BYTES


def crude(frame: bytes, stream: np.random.Generator) -> bytes:
    """Another size, other bytes, sizes without ciphertexts, another library's header."""
    kind = stream.integers(0, 5)
    if kind == 0:
        return (frame + frame)[: int(stream.integers(0, 2 * len(frame)))]
    if kind == 1:
        return frame[:_HEAD]
    if kind == 2:
        return b"\x5e\xa1\x10\x04\x02\x00\x00\x00" + frame[8:]
    if kind == 3:
        return bytes(16) + frame[16:]
    changed = bytearray(frame)
    for _ in range(int(stream.integers(1, 9))):
        start = int(stream.integers(0, len(frame)))
        piece = stream.bytes(int(stream.integers(1, 17)))
        changed[start : start + len(piece)] = piece[: len(frame) - start]
    return bytes(changed)


def structured(frame: bytes, other: bytes, stream: np.random.Generator) -> bytes:
    """Right size, right key, every residue below its prime: it reaches SEAL."""
    head = bytearray(frame[:_HEAD])
    mine, theirs = (
        unpack_polynomials(memoryview(data)[_HEAD:], _RING.data, 1, _RING.degree, "a frame")
        for data in (frame, other)
    )
    changes: tuple[Callable[[Words, Words, int], Words], ...] = (
        lambda a, b, p: np.zeros_like(a),
        lambda a, b, p: np.full_like(a, p - 1),
        lambda a, b, p: (np.uint64(p) - a) % np.uint64(p),  # negated
        lambda a, b, p: b,
        lambda a, b, p: stream.integers(0, p, a.shape, dtype=np.uint64),
        lambda a, b, p: np.roll(a, int(stream.integers(1, a.size))),
        lambda a, b, p: (a + b) % np.uint64(p),
        lambda a, b, p: np.where(stream.random(a.shape) < 0.01, np.uint64(p - 1), a),
    )
    for _ in range(int(stream.integers(1, 4))):
        place = int(stream.integers(0, len(_RING.data)))
        change = changes[int(stream.integers(0, len(changes)))]
        mine[place] = change(mine[place], theirs[place], _RING.data[place])
    if stream.random() < 0.3:
        head[KEY_TAG_BYTES:] = stream.choice([bytes(64), b"\xff" * 64, other[16:80], stream.bytes(64)])
    return bytes(head) + pack_polynomials(mine, _RING.data)


def hostile_keys(keys: bytes, stream: np.random.Generator) -> bytes:
    """Evaluation keys with parts zeroed, swapped, or other seeds: loadable, and useless."""
    used = SQUARE.keys[0]
    size = SQUARE.component_bytes(used)
    changed = bytearray(keys)
    a, b = (int(place) * size for place in stream.choice(8 * 3, 2, replace=False))
    kind = int(stream.integers(0, 4))
    if kind == 0:
        changed[a + SEED_BYTES : a + size] = bytes(size - SEED_BYTES)
    elif kind == 1:
        changed[a : a + size], changed[b : b + size] = keys[b : b + size], keys[a : a + size]
    elif kind == 2:
        changed[a : a + SEED_BYTES] = stream.bytes(SEED_BYTES)
    else:
        return crude(keys, stream)
    return bytes(changed)
