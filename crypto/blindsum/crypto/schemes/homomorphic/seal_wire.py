"""SEAL's serialised objects, written and read here, so that SEAL only ever loads bytes that we built.

Layout of SEAL 4.x: a 16-byte header (magic a15e, header size 16, version 4.x, compression, zero,
total size), then an object's members; coefficient arrays are nested objects of their own. SEAL always
compresses what it saves with Zstandard and takes uncompressed objects when it loads.

TenSEAL's `sealapi` reads and writes by path only. Objects pass through an anonymous memory file
(memfd_create, Linux), which has no name in any file system and is gone when it is closed.
"""

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, Self

import numpy as np
from blindsum.crypto.errors import MissingExtra, OpeningFailed, UnsupportedPlatform
from blindsum.crypto.schemes.homomorphic.blake2xb import SEED_BYTES, Words
from blindsum.crypto.schemes.homomorphic.cipher import Ring

_HEADER = struct.Struct("<2sBBBBHQ")
_MAGIC = b"\x5e\xa1"
_UNCOMPRESSED, _ZSTANDARD = 0, 2
_CIPHERTEXT = struct.Struct(
    "<32s?QQQdQ"
)  # parms id, NTT form, polynomials, degree, primes, scale, correction
_PLAINTEXT = struct.Struct("<32sQd")  # parms id, coefficients, scale
_COUNT = struct.Struct("<Q")
_SEED_MARK = b"\x01"  # Blake2xb
_LARGEST_OBJECT = 1 << 24

Native = Any
"""An object of TenSEAL's `sealapi`, which has no type information."""


def load_sealapi() -> ModuleType:
    """TenSEAL's binding of SEAL. Raises `MissingExtra` or `UnsupportedPlatform`."""
    if not hasattr(os, "memfd_create"):
        raise UnsupportedPlatform("a key holder of bfv or ckks needs Linux (memfd_create)")
    try:
        import_module("zstandard")
        return import_module("tenseal.sealapi")
    except ImportError as error:
        raise MissingExtra("he", "a key holder of bfv or ckks") from error


@dataclass(frozen=True)
class SealContext:
    """A SEAL context for a ring, refused unless SEAL's own table calls it 128-bit secure."""

    api: ModuleType
    ring: Ring
    native: Native
    data_id: bytes
    key_id: bytes
    version: tuple[int, int]

    @classmethod
    def create(cls, ring: Ring, scheme: str, plain_bits: int) -> Self:
        """A context of scheme 'bfv' (t = 2^plain_bits) or 'ckks'. Raises `OpeningFailed`."""
        api = load_sealapi()
        kind = api.SCHEME_TYPE.BFV if scheme == "bfv" else api.SCHEME_TYPE.CKKS
        settings = api.EncryptionParameters(kind)
        settings.set_poly_modulus_degree(ring.degree)
        settings.set_coeff_modulus([api.Modulus(prime) for prime in ring.primes])
        if scheme == "bfv":
            settings.set_plain_modulus(1 << plain_bits)
        native = api.SEALContext(settings, True, api.SEC_LEVEL_TYPE.TC128)
        if not native.parameters_set():
            raise OpeningFailed(f"SEAL refuses the parameter set: {native.parameters_error_message()}")
        saved = _save(settings)
        return cls(
            api,
            ring,
            native,
            _parms_id(native.first_parms_id()),
            _parms_id(native.key_parms_id()),
            (saved[3], saved[4]),
        )

    def _object(self, body: bytes) -> bytes:
        return _HEADER.pack(_MAGIC, 16, *self.version, _UNCOMPRESSED, 0, 16 + len(body)) + body

    def _array(self, words: bytes) -> bytes:
        return self._object(_COUNT.pack(len(words) // 8) + words)

    def load_plaintext(self, coefficients: Words) -> Native:
        """A plaintext modulo t from its coefficients."""
        words = coefficients.astype("<u8").tobytes()
        body = _PLAINTEXT.pack(bytes(32), coefficients.size, 1.0) + self._array(words)
        return self._load(self.api.Plaintext(), self._object(body))

    def read_plaintext(self, plaintext: Native) -> Words:
        """The coefficients of a plaintext modulo t, padded to the ring's degree."""
        body = _save_body(plaintext)
        found = np.frombuffer(body[_PLAINTEXT.size + _HEADER.size + 8 :], "<u8")
        coefficients = np.zeros(self.ring.degree, np.uint64)
        coefficients[: found.size] = found
        return coefficients

    def load_secret(self, transformed: Words) -> Native:
        """A secret key from its (primes, degree) residues in NTT form."""
        words = transformed.astype("<u8").tobytes()
        body = _PLAINTEXT.pack(self.key_id, transformed.size, 1.0) + self._array(words)
        return self._load(self.api.SecretKey(), self._object(body))

    def read_transformed(self, plaintext: Native) -> Words:
        """The (primes, degree) residues of a plaintext in NTT form at the key level."""
        body = _save_body(plaintext)
        found = np.frombuffer(body[_PLAINTEXT.size + _HEADER.size + 8 :], "<u8")
        return found.reshape(len(self.ring.primes), self.ring.degree).copy()

    def load_ciphertext(
        self, parts: Sequence[Sequence[Words]], *, transformed: bool, scale: float = 1.0
    ) -> Native:
        """A ciphertext from its two polynomials, each a list of residues for each data prime."""
        body = self._ciphertext(parts, self.data_id, len(self.ring.data), transformed, scale)
        return self._load(self.api.Ciphertext(), body)

    def load_public_key(self, parts: Sequence[Sequence[Words]]) -> Native:
        """A public key from its two polynomials over all primes."""
        body = self._ciphertext(parts, self.key_id, len(self.ring.primes), True, 1.0)
        return self._load(self.api.PublicKey(), body)

    def _ciphertext(
        self,
        parts: Sequence[Sequence[Words]],
        parms_id: bytes,
        primes: int,
        transformed: bool,
        scale: float,
    ) -> bytes:
        words = b"".join(residues.astype("<u8").tobytes() for part in parts for residues in part)
        head = _CIPHERTEXT.pack(parms_id, transformed, 2, self.ring.degree, primes, scale, 1)
        return self._object(head + self._array(words))

    def read_ciphertext(self, ciphertext: Native, *, key_level: bool = False) -> list[list[Words]]:
        """Both polynomials, each a list of residues for each prime."""
        primes = len(self.ring.primes if key_level else self.ring.data)
        words, _ = self._read(ciphertext, 2 * primes)
        return [list(part) for part in words.reshape(2, primes, self.ring.degree)]

    def read_seeded(self, ciphertext: Native) -> tuple[bytes, list[Words]]:
        """The seed and the first polynomial of SEAL's half-size symmetric ciphertext."""
        words, rest = self._read(ciphertext, len(self.ring.data))
        mark = rest[_HEADER.size : -SEED_BYTES]
        if len(rest) != _HEADER.size + 1 + SEED_BYTES or mark != _SEED_MARK:
            raise OpeningFailed("SEAL wrote a seed of an unknown kind; use a tested TenSEAL version")
        return rest[-SEED_BYTES:], list(words)

    def load_reduced(self, parts: Sequence[Words], *, scale: float) -> Native:
        """A ciphertext over the first data prime alone, what is left after all rescaling, in NTT form."""
        parms_id = _parms_id(self.native.last_parms_id())
        body = self._ciphertext([[part] for part in parts], parms_id, 1, True, scale)
        return self._load(self.api.Ciphertext(), body)

    def read_reduced(self, ciphertext: Native) -> Words:
        """The (2, degree) residues of a ciphertext over the first data prime alone."""
        return self._read(ciphertext, 2)[0]

    def read_switching_keys(self, keys: Native) -> list[list[tuple[bytes, Words]]]:
        """Each key of seeded relinearisation or Galois keys, in SEAL's order.

        A key is a list with one (64-byte seed, (primes, degree) first polynomial) for each data prime.
        """
        body = _save_body(keys)
        (count,) = _COUNT.unpack_from(body, 32)
        offset = 32 + _COUNT.size
        found = []
        for _ in range(count):
            (components,) = _COUNT.unpack_from(body, offset)
            offset += _COUNT.size
            key = []
            for _ in range(components):
                seed, residues, offset = self._read_component(body, offset)
                key.append((seed, residues))
            if key:
                found.append(key)
        if offset != len(body):
            raise OpeningFailed("SEAL wrote an unexpected layout; use a tested TenSEAL version")
        return found

    def _read_component(self, body: bytes, offset: int) -> tuple[bytes, Words, int]:
        (size,) = _COUNT.unpack_from(body, offset + _HEADER.size - 8)
        start = offset + _HEADER.size + _CIPHERTEXT.size + _HEADER.size + 8
        end = offset + size
        words = len(self.ring.primes) * self.ring.degree * 8
        sized = end - start == words + _HEADER.size + 1 + SEED_BYTES and end <= len(body)
        if not sized or body[end - SEED_BYTES - 1 : end - SEED_BYTES] != _SEED_MARK:
            raise OpeningFailed("SEAL wrote an unexpected layout; use a tested TenSEAL version")
        residues = np.frombuffer(body[start : start + words], "<u8").reshape(-1, self.ring.degree)
        return body[end - SEED_BYTES : end], residues, end

    def load_switching_keys(self, target: Native, keys: Mapping[int, Sequence[Words]]) -> Native:
        """SEAL's relinearisation or Galois keys, by their place in SEAL's list.

        A key has one (2, primes, degree) array of residues over all primes for each data prime.
        """
        pieces = [self.key_id, _COUNT.pack(max(keys) + 1)]
        for place in range(max(keys) + 1):
            components = keys.get(place, ())
            pieces.append(_COUNT.pack(len(components)))
            for part in components:
                pieces.append(
                    self._ciphertext(list(map(list, part)), self.key_id, len(self.ring.primes), True, 1.0)
                )
        return self._load(target, self._object(b"".join(pieces)))

    def reload(self, source: Native, target: Native) -> None:
        """Load what an object saves into another: this is how SEAL expands a half-size ciphertext."""
        self._load(target, _save(source))

    def _read(self, ciphertext: Native, polynomials: int) -> tuple[Words, bytes]:
        body = _save_body(ciphertext)
        start = _CIPHERTEXT.size + _HEADER.size + 8
        end = start + polynomials * self.ring.degree * 8
        if len(body) < end:
            raise OpeningFailed("SEAL wrote an unexpected layout; use a tested TenSEAL version")
        words = np.frombuffer(body[start:end], "<u8").reshape(polynomials, self.ring.degree)
        return words, body[end:]

    def _load(self, target: Native, data: bytes) -> Native:
        descriptor = os.memfd_create("blindsum", os.MFD_CLOEXEC)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            target.load(self.native, f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
        return target


def _parms_id(words: Sequence[int]) -> bytes:
    return struct.pack("<4Q", *words)


def _save(source: Native) -> bytes:
    descriptor = os.memfd_create("blindsum", os.MFD_CLOEXEC)
    try:
        source.save(f"/proc/self/fd/{descriptor}")
        data = b""
        while piece := os.pread(descriptor, _LARGEST_OBJECT, len(data)):
            data += piece
        return data
    finally:
        os.close(descriptor)


def _save_body(source: Native) -> bytes:
    """What SEAL saves, without its outer header and compression."""
    data = _save(source)
    magic, header, _, _, compression, _, size = _HEADER.unpack_from(data)
    if magic != _MAGIC or header != _HEADER.size or size != len(data):
        raise OpeningFailed("SEAL wrote an unexpected header; use a tested TenSEAL version")
    if compression == _UNCOMPRESSED:
        return data[_HEADER.size :]
    if compression != _ZSTANDARD:
        raise OpeningFailed("SEAL wrote an unknown compression; use a tested TenSEAL version")
    import zstandard  # noqa: PLC0415

    return zstandard.ZstdDecompressor().decompressobj().decompress(data[_HEADER.size :])
