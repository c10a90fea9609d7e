"""Sealing: HPKE to a member's public key (RFC 9180), AES-256-GCM under a shared key (SP 800-38D).

HPKE uses the hybrid KEM ML-KEM-768 + X25519 (FIPS 203, RFC 7748) in base mode: a sealed message proves
no sender, so whoever relies on one also needs a signature over it (`trust.envelope`).
"""

from collections.abc import Iterable, Iterator
from typing import NoReturn, Self

from blindsum.crypto.errors import OpeningFailed, RefusalReason, Refused
from blindsum.crypto.primitives.derivation import Random, derive_key, system_random
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

HPKE_PUBLIC_BYTES = 1216
HPKE_SECRET_BYTES = 96
NONCE_BYTES = 12
TAG_BYTES = 16
SALT_BYTES = 32
STREAM_CHUNK = 1 << 20

_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_ML_KEM_PUBLIC = 1184
_ML_KEM_SEED = 64


class HpkeKey:
    """A member's HPKE key pair: ML-KEM-768 and X25519. It doesn't print, pickle or compare.

    `public` has 1,216 bytes: the ML-KEM encapsulation key, then the X25519 public key.
    """

    __slots__ = ("_key", "_secret", "public")

    def __init__(self, secret: bytes) -> None:
        if len(secret) != HPKE_SECRET_BYTES:
            raise ValueError(f"an HPKE secret has {HPKE_SECRET_BYTES} bytes, not {len(secret)}")
        kem = MLKEM768PrivateKey.from_seed_bytes(secret[:_ML_KEM_SEED])
        curve = X25519PrivateKey.from_private_bytes(secret[_ML_KEM_SEED:])
        self._secret = bytes(secret)
        self._key = MLKEM768X25519PrivateKey(kem, curve)
        self.public = kem.public_key().public_bytes_raw() + curve.public_key().public_bytes_raw()

    @classmethod
    def generate(cls, random: Random = system_random) -> Self:
        """A fresh key from 96 bytes of `random`."""
        return cls(random(HPKE_SECRET_BYTES))

    def secret_bytes(self) -> bytes:
        """The 96 secret bytes (ML-KEM seed, X25519 scalar), for a key file with mode 0600."""
        return self._secret

    def open(self, sealed: bytes, info: bytes) -> bytes:
        """What `seal_to` sealed to this key under the same `info`. Raises `OpeningFailed`."""
        try:
            return _SUITE.decrypt(sealed, self._key, info)
        except (InvalidTag, ValueError):
            raise OpeningFailed("a message sealed with HPKE doesn't open with this key") from None

    def __repr__(self) -> str:
        return f"<HpkeKey {self.public[:8].hex()}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an HPKE key can't be pickled")


def seal_to(public: bytes, plaintext: bytes, info: bytes) -> bytes:
    """Seal to an HPKE public key (RFC 9180 base mode, one message), bound to `info`.

    The encapsulation draws from the operating system's generator; no other can be injected.
    Raises `Refused` (malformed) for a public key of the wrong size or form.
    """
    if len(public) != HPKE_PUBLIC_BYTES:
        raise Refused(RefusalReason.MALFORMED, f"an HPKE public key has {HPKE_PUBLIC_BYTES} bytes")
    try:
        key = MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(public[:_ML_KEM_PUBLIC]),
            X25519PublicKey.from_public_bytes(public[_ML_KEM_PUBLIC:]),
        )
        return _SUITE.encrypt(plaintext, key, info)
    except ValueError:
        raise Refused(RefusalReason.MALFORMED, "this HPKE public key isn't valid") from None


def seal(key: bytes, plaintext: bytes, associated: bytes, random: Random = system_random) -> bytes:
    """AES-256-GCM: a random 12-byte nonce, then the ciphertext and its 16-byte tag.

    Use each key for few messages only (random nonces: fewer than 2^32 a key).
    """
    nonce = random(NONCE_BYTES)
    return nonce + _cipher(key).encrypt(nonce, plaintext, associated)


def open_sealed(key: bytes, sealed: bytes, associated: bytes) -> bytes:
    """What `seal` sealed under the same key and associated data. Raises `OpeningFailed`."""
    if len(sealed) < NONCE_BYTES + TAG_BYTES:
        raise OpeningFailed("a sealed message is too short")
    try:
        return _cipher(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], associated)
    except InvalidTag:
        raise OpeningFailed("a sealed message doesn't open: another key, or it was changed") from None


def sealed_stream_bytes(length: int) -> int:
    """Bytes of a sealed stream that holds `length` bytes."""
    return SALT_BYTES + length + TAG_BYTES * max(1, -(-length // STREAM_CHUNK))


def seal_stream(
    key: bytes,
    pieces: Iterable[bytes | bytearray | memoryview],
    associated: bytes,
    random: Random = system_random,
) -> Iterator[bytes]:
    """Seal a long message piece by piece, holding one chunk of 1 MiB.

    A random 32-byte salt gives the stream a key of its own (HKDF, bound to `associated`); chunk i has
    nonce i and a flag that marks the last chunk, so that chunks can't be reordered, dropped or cut off
    (the STREAM construction of Hoang, Reyhanitabar, Rogaway and Vizár, CRYPTO 2015).
    """
    salt = random(SALT_BYTES)
    cipher = _cipher(derive_key(key, "sealed stream", salt, associated))
    yield salt
    buffer = bytearray()
    index = 0
    for piece in pieces:
        view = memoryview(piece).cast("B")
        for start in range(0, len(view), STREAM_CHUNK):
            buffer += view[start : start + STREAM_CHUNK]
            while len(buffer) > STREAM_CHUNK:
                yield cipher.encrypt(_stream_nonce(index, last=False), bytes(buffer[:STREAM_CHUNK]), None)
                del buffer[:STREAM_CHUNK]
                index += 1
    yield cipher.encrypt(_stream_nonce(index, last=True), bytes(buffer), None)


def open_stream(
    key: bytes, pieces: Iterable[bytes | bytearray | memoryview], associated: bytes
) -> Iterator[bytes]:
    """The chunks of what `seal_stream` sealed, from pieces cut anywhere.

    Act on nothing before the iterator has ended without an error: only then is the end proven.
    Raises `OpeningFailed`.
    """
    buffer = bytearray()
    cipher: AESGCM | None = None
    index = 0
    size = STREAM_CHUNK + TAG_BYTES
    for piece in pieces:
        view = memoryview(piece).cast("B")
        for start in range(0, len(view), STREAM_CHUNK):
            buffer += view[start : start + STREAM_CHUNK]
            if cipher is None and len(buffer) >= SALT_BYTES:
                cipher = _cipher(derive_key(key, "sealed stream", bytes(buffer[:SALT_BYTES]), associated))
                del buffer[:SALT_BYTES]
            while cipher is not None and len(buffer) > size:
                yield _open_chunk(cipher, index, bytes(buffer[:size]), last=False)
                del buffer[:size]
                index += 1
    if cipher is None:
        raise OpeningFailed("a sealed stream is too short")
    yield _open_chunk(cipher, index, bytes(buffer), last=True)


def _stream_nonce(index: int, *, last: bool) -> bytes:
    return index.to_bytes(8, "little") + (b"last" if last else b"more")


def _open_chunk(cipher: AESGCM, index: int, chunk: bytes, *, last: bool) -> bytes:
    if len(chunk) < TAG_BYTES:
        raise OpeningFailed("a sealed stream was cut off")
    try:
        return cipher.decrypt(_stream_nonce(index, last=last), chunk, None)
    except InvalidTag:
        raise OpeningFailed(f"chunk {index} of a sealed stream doesn't open") from None


def _cipher(key: bytes) -> AESGCM:
    if len(key) != 32:
        raise ValueError("an AES-256 key has 32 bytes")
    return AESGCM(key)
