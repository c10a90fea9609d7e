"""Writes `corpus/`: uploads as an aggregator gets them, good and hostile, the same bytes every time.

    python tests/crypto/homomorphic/make_corpus.py

A file is called CIPHER.OUTCOME.WHAT.bin; OUTCOME is "added" or the refusal's reason. CIPHER.key is the
public key. Nothing here needs a homomorphic library but paillier's, and no secret key is kept.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from blindsum.crypto.schemes.homomorphic.cipher import CipherParameters, choose_parameters, generate_keys
from blindsum.crypto.schemes.homomorphic.lattice import pack_polynomials
from blindsum.crypto.schemes.homomorphic.paillier import PaillierMember

CORPUS = Path(__file__).parent / "corpus"
OTHER_TAG = bytes(range(16))
# A well-formed message of TenSEAL's: 18 sizes, no ciphertexts. Adding it with TenSEAL ends the process.
SIZES_ONLY = bytes.fromhex("0a12") + b"\x01" * 18

CIPHERS: dict[str, CipherParameters] = {
    "bfv": choose_parameters("bfv", 32, 2, length=1),
    "ckks": choose_parameters("ckks", 1, 1, length=4097),
    "paillier": choose_parameters("paillier", 16, 7, length=1, modulus_bits=2048, minimum_security=112),
}


class FixedStream:
    """Bytes that look random and never change. For this corpus only: no key of it protects anything."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._drawn = 0

    def __call__(self, size: int) -> bytes:
        self._drawn += 1
        return hashlib.shake_256(f"{self._name} {self._drawn}".encode()).digest(size)


def corpus() -> Iterator[tuple[str, bytes]]:
    """Names and contents of all files."""
    for name, parameters in CIPHERS.items():
        make = _paillier if parameters.ring is None else _lattice
        for file, data in make(parameters, FixedStream(name)):
            yield f"{name}.{file}", data


def _common(frame: bytes, start: int = 16) -> Iterator[tuple[str, bytes]]:
    size = len(frame)
    yield "wrong_size.empty.bin", b""
    yield "wrong_size.sizes-only.bin", SIZES_ONLY
    yield "wrong_size.tag-only.bin", frame[:16]
    yield "wrong_size.one-byte-short.bin", frame[:-1]
    yield "wrong_size.one-byte-long.bin", frame + b"\0"
    yield "wrong_digest.other-key.bin", OTHER_TAG + frame[16:]
    # The header of SEAL's own objects, with a size of 2^63.
    native = bytes.fromhex("5ea110040600000000000000000000f0")
    yield "wrong_digest.native-header.bin", (native + frame)[:size]
    yield "out_of_range.all-ones.bin", frame[:start] + b"\xff" * (size - start)


def _lattice(parameters: CipherParameters, random: FixedStream) -> Iterator[tuple[str, bytes]]:
    ring = parameters.ring
    assert ring is not None
    keys = generate_keys(parameters, random)
    tag, count = keys.key_id[:16], parameters.ciphertexts_per_frame
    seeds = [random(64) for _ in range(count)]

    def frame(value: int, last: int, used: list[bytes] = seeds) -> bytes:
        residues = [np.full((count, ring.degree), value, np.uint64) for _ in ring.data]
        residues[-1][-1, -1] = last
        return tag + b"".join(used) + pack_polynomials(residues, ring.data)

    top = ring.data[-1]
    assert len(ring.data) == 1
    yield "key", keys.public
    yield "added.zeros.bin", frame(0, 0)
    yield "added.largest.bin", frame(top - 1, top - 1)
    yield "out_of_range.last-at-prime.bin", frame(0, top)
    if count > 1:
        yield "replay.one-seed-twice.bin", frame(0, 0, [seeds[0]] * count)
    yield from _common(frame(1, 2), 16 + 64 * count)


def _paillier(parameters: CipherParameters, random: FixedStream) -> Iterator[tuple[str, bytes]]:
    keys = generate_keys(parameters, random)
    size = parameters.modulus_bits // 4
    frame = PaillierMember(parameters, keys.public, keys.secret, random).encrypt(np.ones(5, np.uint32))
    tag = frame[:16]
    n = int.from_bytes(keys.public[len(parameters.key_label) :][: size // 2], "big")
    p = int.from_bytes(keys.secret[: size // 4], "big")
    yield "key", keys.public
    yield "added.encrypted.bin", frame
    yield "added.one.bin", tag + (1).to_bytes(size, "big")
    yield "added.minus-one.bin", tag + (n * n - 1).to_bytes(size, "big")
    yield "out_of_range.zero.bin", tag + bytes(size)
    yield "out_of_range.modulus.bin", tag + (n * n).to_bytes(size, "big")
    yield "out_of_range.multiple-of-n.bin", tag + (3 * n).to_bytes(size, "big")
    yield "out_of_range.shares-a-factor.bin", tag + (5 * p).to_bytes(size, "big")
    yield from _common(frame)


if __name__ == "__main__":
    CORPUS.mkdir(exist_ok=True)
    for old in CORPUS.iterdir():
        old.unlink()
    for file, data in corpus():
        (CORPUS / file).write_bytes(data)
