"""Ed25519 signatures over labelled bytes (RFC 8032)."""

from typing import NoReturn, Self

from blindsum.crypto.errors import RefusalReason, Refused
from blindsum.crypto.primitives.derivation import Random, labelled, system_random
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64


class SigningKey:
    """A long-term Ed25519 identity key. It doesn't print, pickle or compare."""

    __slots__ = ("_key", "public")

    def __init__(self, secret: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(secret)
        self.public = self._key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls, random: Random = system_random) -> Self:
        """A fresh key from 32 bytes of `random`."""
        return cls(random(32))

    def secret_bytes(self) -> bytes:
        """The 32 secret bytes, for a key file with mode 0600 and nothing else."""
        return self._key.private_bytes_raw()

    def sign(self, label: str, *fields: bytes) -> bytes:
        """The 64-byte signature over the label and its fields."""
        return self._key.sign(labelled(label, *fields))

    def __repr__(self) -> str:
        return f"<SigningKey {self.public.hex()[:16]}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a signing key can't be pickled")


def verify(public: bytes, signature: bytes, label: str, *fields: bytes) -> bool:
    """Whether `signature` is `public`'s over the label and its fields; malformed keys are False."""
    if len(public) != PUBLIC_KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, labelled(label, *fields))
    except (InvalidSignature, ValueError):
        return False
    return True


def require_signature(public: bytes, signature: bytes, what: str, label: str, *fields: bytes) -> None:
    """Raises `Refused` (signature) naming `what` unless `verify` holds."""
    if not verify(public, signature, label, *fields):
        raise Refused(RefusalReason.SIGNATURE, f"the signature of {what} doesn't verify")
