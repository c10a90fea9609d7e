"""What travels: evaluation keys, encrypted features and answers, in frames of one size each.

A frame is a key tag (the first 16 bytes of the SHA-256 of the member's evaluation keys) and bit-packed
residues, each below its prime, so a value has one encoding and SEAL never sees a byte that a peer composed.
In what a member sends, a 64-byte seed stands for each uniform polynomial.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from blindsum.crypto.errors import RefusalReason, Refused
from blindsum.crypto.inference.circuit import Circuit, SwitchingKey
from blindsum.crypto.schemes.homomorphic.blake2xb import SEED_BYTES, Words, expand_uniform
from blindsum.crypto.schemes.homomorphic.cipher import KEY_TAG_BYTES, check_envelope
from blindsum.crypto.schemes.homomorphic.lattice import pack_polynomials, unpack_polynomials

Component = tuple[bytes, Words]
"""The seed and the first polynomial, (primes, degree), of a part of an evaluation key."""


def keys_digest(keys: bytes) -> bytes:
    """What evaluation keys are registered by: SHA-256, 32 bytes."""
    return hashlib.sha256(keys).digest()


def key_tag_of(digest: bytes) -> bytes:
    """What each frame under the registered keys starts with."""
    return digest[:KEY_TAG_BYTES]


def pack_keys(circuit: Circuit, keys: Iterable[Sequence[Component]]) -> bytes:
    """Evaluation keys in the circuit's order; each holds at least the components that the circuit uses."""
    pieces = []
    for used, components in zip(circuit.keys, keys, strict=True):
        for seed, residues in components[: used.primes]:
            pieces += [seed, pack_polynomials(_kept(circuit, used, residues), circuit.key_primes(used))]
    return b"".join(pieces)


def _kept(circuit: Circuit, used: SwitchingKey, residues: Words) -> list[Words]:
    """The residues modulo the primes that the circuit uses of this key."""
    assert residues.shape[0] == len(circuit.ring.primes)
    return [*residues[: used.primes], residues[-1]]


def unpack_keys(circuit: Circuit, data: bytes) -> list[list[Words]]:
    """The components of each evaluation key as (2, primes, degree) residues over all primes of the ring.

    What the circuit doesn't use is zero. Raises `Refused`.
    """
    if len(data) != circuit.keys_bytes:
        raise Refused(
            RefusalReason.WRONG_SIZE, f"evaluation keys have {circuit.keys_bytes} bytes, not {len(data)}"
        )
    ring, view, offset = circuit.ring, memoryview(data), 0
    seeds: list[bytes] = []
    first: list[tuple[SwitchingKey, Words]] = []
    for used in circuit.keys:
        size = circuit.component_bytes(used)
        for _ in range(used.primes):
            seeds.append(bytes(view[offset : offset + SEED_BYTES]))
            packed = view[offset + SEED_BYTES : offset + size]
            residues = unpack_polynomials(
                packed, circuit.key_primes(used), 1, ring.degree, "an evaluation key"
            )
            first.append((used, np.concatenate(residues)))
            offset += size
    if len(set(seeds)) != len(seeds):
        raise Refused(RefusalReason.REPLAY, "the evaluation keys use one seed twice")
    second = np.stack(expand_uniform(seeds, ring.degree, ring.primes), axis=1)
    found: list[list[Words]] = []
    for (used, kept), expanded in zip(first, second, strict=True):
        if not found or len(found[-1]) == len(ring.data):
            found.append([])
        component: Words = np.zeros((2, len(ring.primes), ring.degree), np.uint64)
        for part, source in enumerate((kept, _kept_rows(used, expanded))):
            component[part, : used.primes] = source[:-1]
            component[part, -1] = source[-1]
        found[-1].append(component)
        if len(found[-1]) == used.primes:
            found[-1] += [np.zeros_like(component)] * (len(ring.data) - used.primes)
    return found


def _kept_rows(used: SwitchingKey, expanded: Words) -> Words:
    return np.concatenate([expanded[: used.primes], expanded[-1:]])


def pack_feature(circuit: Circuit, tag: bytes, seed: bytes, residues: Sequence[Words]) -> bytes:
    """The frame of an encrypted feature."""
    return tag + seed + pack_polynomials(residues, circuit.ring.data)


def unpack_feature(circuit: Circuit, tag: bytes, frame: bytes) -> list[list[Words]]:
    """Both polynomials of an encrypted feature, each a list of residues. Raises `Refused`."""
    body = check_envelope(frame, circuit.request_bytes, tag, "the encrypted feature")
    ring = circuit.ring
    seed = bytes(body[:SEED_BYTES])
    first = unpack_polynomials(body[SEED_BYTES:], ring.data, 1, ring.degree, "the encrypted feature")
    second = expand_uniform([seed], ring.degree, ring.data)
    return [[residues[0] for residues in part] for part in (first, second)]


def pack_answer(circuit: Circuit, tag: bytes, residues: Words) -> bytes:
    """The frame of an encrypted answer from its (2, degree) residues."""
    return tag + pack_polynomials([residues], circuit.ring.data[:1])


def unpack_answer(circuit: Circuit, tag: bytes, frame: bytes) -> Words:
    """The (2, degree) residues of an encrypted answer. Raises `Refused`."""
    body = check_envelope(frame, circuit.answer_bytes, tag, "the encrypted answer")
    ring = circuit.ring
    return unpack_polynomials(body, ring.data[:1], 2, ring.degree, "the encrypted answer")[0]
