"""Hostile versions of a good ciphertext frame, most of them well-formed enough to pass the parser.

A mutation that only flips bits mostly dies at the first check. These know the layout: they keep size and
key, put coefficients at their limits, swap polynomials, take pieces of another frame and negate, so that
what lies behind the parser gets its share.
"""

import numpy as np
from blindsum.crypto.schemes.homomorphic.blake2xb import SEED_BYTES
from blindsum.crypto.schemes.homomorphic.cipher import KEY_TAG_BYTES, CipherParameters
from blindsum.crypto.schemes.homomorphic.lattice import pack_polynomials, polynomial_bytes, unpack_polynomials


def mutate(
    parameters: CipherParameters, frame: bytes, other: bytes, generator: np.random.Generator, *, result: bool
) -> bytes:
    """A changed `frame`; `other` is a second good one of the same kind, `result` says a published sum."""
    if generator.random() < 0.2:
        return _resized(frame, generator)
    if generator.random() < 0.15:
        return _overwritten(frame, generator)
    if parameters.ring is None:
        return _paillier(parameters, frame, other, generator)
    return _lattice(parameters, frame, other, generator, result)


def _resized(frame: bytes, generator: np.random.Generator) -> bytes:
    size = int(generator.integers(0, 2 * len(frame)))
    return (frame + frame)[:size]


def _overwritten(frame: bytes, generator: np.random.Generator) -> bytes:
    changed = bytearray(frame)
    for _ in range(int(generator.integers(1, 9))):
        start = int(generator.integers(0, len(frame)))
        piece = generator.bytes(int(generator.integers(1, 17)))
        changed[start : start + len(piece)] = piece[: len(frame) - start]
    return bytes(changed)


def _lattice(
    parameters: CipherParameters, frame: bytes, other: bytes, generator: np.random.Generator, result: bool
) -> bytes:
    ring = parameters.ring
    assert ring is not None
    count = parameters.ciphertexts_per_frame
    seeded = parameters.upload_form == "seeded" and not result
    start = KEY_TAG_BYTES + (count * SEED_BYTES if seeded else 0)
    size = polynomial_bytes(ring, count)
    head = bytearray(frame[:start])
    parts = [
        [unpack_polynomials(memoryview(data)[at : at + size], ring.data, count, ring.degree, "a frame")
         for at in range(start, len(frame), size)]
        for data in (frame, other)
    ]  # fmt: skip
    mine, theirs = parts
    for _ in range(int(generator.integers(1, 4))):
        part = int(generator.integers(0, len(mine)))
        j = int(generator.integers(0, len(ring.data)))
        prime = ring.data[j]
        residues = mine[part][j]
        match int(generator.integers(0, 8)):
            case 0:  # limits, the prime itself among them: the parser's to refuse
                place = generator.integers(0, residues.size, 5)
                residues.flat[place] = generator.choice([0, 1, prime // 2, prime - 1, prime], 5).astype(
                    np.uint64
                )
            case 1:
                residues[...] = generator.integers(0, prime, residues.shape, dtype=np.uint64)
            case 2:
                residues[...] = 0
            case 3:
                residues[...] = prime - 1
            case 4:  # negated
                residues[...] = (np.uint64(prime) - residues) % np.uint64(prime)
            case 5:  # a piece of someone else's
                residues[...] = theirs[part][j]
            case 6:
                mine.reverse()
            case _:
                if seeded:
                    head[KEY_TAG_BYTES : KEY_TAG_BYTES + SEED_BYTES] = generator.bytes(SEED_BYTES)
                else:
                    residues[...] = np.roll(residues, int(generator.integers(1, ring.degree)), axis=-1)
    return bytes(head) + b"".join(pack_polynomials(part, ring.data) for part in mine)


def _paillier(
    parameters: CipherParameters, frame: bytes, other: bytes, generator: np.random.Generator
) -> bytes:
    size = parameters.modulus_bits // 4
    start = KEY_TAG_BYTES + size * int(generator.integers(0, parameters.ciphertexts_per_frame))
    top = frame[start]
    replacements = (
        bytes(size),
        (1).to_bytes(size, "big"),
        b"\xff" * size,
        bytes([top // 2]) + generator.bytes(size - 1),
        other[start : start + size],
        frame[start : start + size][::-1],
    )
    chosen = replacements[int(generator.integers(0, len(replacements)))]
    return frame[:start] + chosen + frame[start + size :]
