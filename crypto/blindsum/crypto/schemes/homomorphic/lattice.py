"""Frames of bfv and ckks in numpy: bit-packed coefficients, strict parsing, and the sum.

A frame is the key tag followed by packed polynomials. An upload holds either, for each ciphertext, the
64-byte seed of its second polynomial, then the first polynomials; or both (public-key form). A result
always holds both. Polynomials are ordered (part, prime, ciphertext, coefficient); a coefficient takes
exactly as many bits as its prime has, and must be below it, so every frame has one encoding only.
The running sum never leaves the aggregator: it is the result in whole 64-bit words.

The aggregator adds residues modulo each prime and expands seeds itself (blake2xb.py). It never calls
a homomorphic library, and has no key that could open anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
from blindsum.crypto.errors import RefusalReason, Refused
from blindsum.crypto.schemes.homomorphic.blake2xb import SEED_BYTES, Words, expand_uniform
from blindsum.crypto.schemes.homomorphic.cipher import (
    KEY_TAG_BYTES,
    CipherParameters,
    Ring,
    check_envelope,
    key_tag,
    seed_digest,
)

# numpy shifts by an array without dimensions faster than by a number.
_SHIFTS = tuple(np.array(by, np.uint64) for by in range(64))
_NONCE_BYTES = 32

Polynomials = list[Words]
"""One (ciphertexts, degree) array of residues for each data prime."""


def pack_bits(values: Words, width: int) -> bytes:
    """Values below 2^width, their count a multiple of 64, in exactly `width` bits each.

    Values are taken as g = 64 / gcd(64, width) rows, the fewest that fill whole words; bit after bit, the
    rows of a column fill g * width / 64 words of that column, so that each step is one operation on a row.
    """
    group, filled = _shape(width)
    rows = values.reshape(group, -1)
    words = np.zeros((filled, rows.shape[1]), "<u8")
    shifted = np.empty(rows.shape[1], np.uint64)
    for i in range(group):
        word, offset = divmod(i * width, 64)
        np.left_shift(rows[i], _SHIFTS[offset], shifted)
        np.bitwise_or(words[word], shifted, words[word])
        if offset + width > 64:
            np.right_shift(rows[i], _SHIFTS[64 - offset], words[word + 1])
    return words.tobytes()


def unpack_bits(packed: memoryview | bytes, width: int) -> Words:
    """The inverse of `pack_bits`; a flat array."""
    group, filled = _shape(width)
    words = np.frombuffer(packed, "<u8").reshape(filled, -1)
    rows = np.empty((group, words.shape[1]), np.uint64)
    shifted = np.empty(words.shape[1], np.uint64)
    mask = np.array((1 << width) - 1, np.uint64)
    for i in range(group):
        row = rows[i]
        word, offset = divmod(i * width, 64)
        np.right_shift(words[word], _SHIFTS[offset], row)
        if offset + width > 64:
            np.left_shift(words[word + 1], _SHIFTS[64 - offset], shifted)
            np.bitwise_or(row, shifted, row)
        if offset + width != 64:
            np.bitwise_and(row, mask, row)
    return rows.ravel()


def _shape(width: int) -> tuple[int, int]:
    """Rows of values, and of the words that they fill."""
    group = 64 // gcd(64, width)
    return group, group * width // 64


def pack_polynomials(residues: Sequence[Words], primes: Sequence[int]) -> bytes:
    """Packed residues, one array for each prime."""
    return b"".join(pack_bits(r.ravel(), p.bit_length()) for r, p in zip(residues, primes, strict=True))


def unpack_polynomials(
    packed: memoryview, primes: Sequence[int], count: int, degree: int, what: str
) -> Polynomials:
    """`count` polynomials for each prime; raises `Refused` for a residue that isn't below its prime."""
    found: Polynomials = []
    start = 0
    for prime in primes:
        width = prime.bit_length()
        size = count * degree * width // 8
        residues = unpack_bits(packed[start : start + size], width)
        if int(residues.max()) >= prime:
            raise Refused(RefusalReason.OUT_OF_RANGE, f"{what} has a coefficient above its prime")
        found.append(residues.reshape(count, degree))
        start += size
    assert start == len(packed)
    return found


def polynomial_bytes(ring: Ring, count: int) -> int:
    """Bytes of `count` packed polynomials over the data primes."""
    return count * ring.degree * sum(prime.bit_length() for prime in ring.data) // 8


@dataclass(frozen=True)
class LatticePublic:
    """A parsed public key: its tag and, in the public-key form, two polynomials over all primes."""

    tag: bytes
    nonce: bytes
    polynomials: Polynomials | None


def public_bytes(label: str, nonce: bytes, packed: bytes) -> bytes:
    """Label, 32 bytes that name the key, and the packed public key (nothing in the seeded form)."""
    name = label.encode("ascii")
    return len(name).to_bytes(2, "little") + name + nonce + packed


def parse_public(parameters: CipherParameters, public: bytes) -> LatticePublic:
    """Strict parse; raises `Refused` for another chain, another form, or malformed bytes."""
    ring = parameters.ring
    assert ring is not None
    head = public_bytes(parameters.key_label, b"", b"")
    if public[: len(head)] != head:
        raise Refused(RefusalReason.MALFORMED, f"the public key isn't one for {parameters.key_label}")
    body = memoryview(public)[len(head) :]
    bits = sum(prime.bit_length() for prime in ring.primes)
    size = 0 if parameters.upload_form == "seeded" else 2 * ring.degree * bits // 8
    if len(body) != _NONCE_BYTES + size:
        raise Refused(RefusalReason.WRONG_SIZE, "the public key has another size than its label says")
    polynomials = None
    if size:
        polynomials = unpack_polynomials(body[_NONCE_BYTES:], ring.primes, 2, ring.degree, "the public key")
    return LatticePublic(key_tag(public), bytes(body[:_NONCE_BYTES]), polynomials)


def parse_upload(
    parameters: CipherParameters, tag: bytes, frame: bytes | memoryview
) -> tuple[list[bytes], Polynomials, Polynomials | None]:
    """Seeds and first polynomials, or no seeds and both. Raises `Refused`."""
    ring = parameters.ring
    assert ring is not None
    count = parameters.ciphertexts_per_frame
    seeds, body = split_upload(parameters, tag, frame)
    size = polynomial_bytes(ring, count)
    first = unpack_polynomials(body[:size], ring.data, count, ring.degree, "the frame")
    if seeds:
        return seeds, first, None
    return seeds, first, unpack_polynomials(body[size:], ring.data, count, ring.degree, "the frame")


def split_upload(
    parameters: CipherParameters, tag: bytes, frame: bytes | memoryview
) -> tuple[list[bytes], memoryview]:
    """Seeds (none in the public-key form) and packed polynomials. Raises `Refused`."""
    body = check_envelope(frame, parameters.upload_frame_bytes, tag, "the frame")
    if parameters.upload_form == "public-key":
        return [], body
    count = parameters.ciphertexts_per_frame
    seeds = [bytes(body[i * SEED_BYTES : (i + 1) * SEED_BYTES]) for i in range(count)]
    if len(set(seeds)) != count:
        raise Refused(RefusalReason.REPLAY, "the frame uses one seed twice")
    return seeds, body[count * SEED_BYTES :]


def parse_result(
    parameters: CipherParameters, tag: bytes, frame: bytes | memoryview
) -> tuple[Polynomials, Polynomials]:
    """Both polynomials of each ciphertext of a published sum. Raises `Refused`."""
    ring = parameters.ring
    assert ring is not None
    count = parameters.ciphertexts_per_frame
    body = check_envelope(frame, parameters.result_frame_bytes, tag, "the sum")
    size = polynomial_bytes(ring, count)
    return (
        unpack_polynomials(body[:size], ring.data, count, ring.degree, "the sum"),
        unpack_polynomials(body[size:], ring.data, count, ring.degree, "the sum"),
    )


class LatticeAggregator:
    """The aggregator of bfv and ckks: parses, expands seeds, adds. Public material only."""

    native = False

    def __init__(self, parameters: CipherParameters, public: bytes) -> None:
        assert parameters.ring is not None
        self.parameters = parameters
        self._ring = parameters.ring
        self._tag = parse_public(parameters, public).tag

    def check(self, frame: bytes | memoryview) -> None:
        """See `AggregatorCipher.check`."""
        parse_upload(self.parameters, self._tag, frame)

    def add(self, total: bytes | bytearray | None, frame: bytes | memoryview) -> bytearray:
        """See `AggregatorCipher.add`."""
        seeds, first, second = parse_upload(self.parameters, self._tag, frame)
        if total is None:
            total = self._tag + bytes(self.parameters.sum_frame_bytes - KEY_TAG_BYTES)
        check_envelope(total, self.parameters.sum_frame_bytes, self._tag, "the running sum")
        if second is None:
            second = expand_uniform(seeds, self._ring.degree, self._ring.data)
        running = total if isinstance(total, bytearray) else bytearray(total)
        words = np.frombuffer(running, "<u8", offset=KEY_TAG_BYTES).reshape(2, len(first), *first[0].shape)
        for part, added in zip(words, (first, second), strict=True):
            for residues, more, prime in zip(part, added, self._ring.data, strict=True):
                np.add(residues, more, residues)  # primes have at most 60 bits
                # Below the prime, the subtraction wraps around and loses.
                np.minimum(residues, residues - np.uint64(prime), out=residues)
        return running

    def finish(self, total: bytes | bytearray) -> bytes:
        """See `AggregatorCipher.finish`."""
        body = check_envelope(total, self.parameters.sum_frame_bytes, self._tag, "the running sum")
        primes = self._ring.data
        words = np.frombuffer(body, "<u8").reshape(2, len(primes), -1)
        for part in words:
            for residues, prime in zip(part, primes, strict=True):
                if int(residues.max()) >= prime:
                    raise Refused(RefusalReason.OUT_OF_RANGE, "the running sum is damaged")
        return self._tag + b"".join(pack_polynomials(list(part), primes) for part in words)

    def seeds(self, frame: bytes | memoryview) -> tuple[bytes, ...]:
        """See `AggregatorCipher.seeds`; empty in the public-key form, which has none."""
        return tuple(map(seed_digest, split_upload(self.parameters, self._tag, frame)[0]))
