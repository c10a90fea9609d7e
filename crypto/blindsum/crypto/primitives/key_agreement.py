"""X25519 key agreement (RFC 7748), with secrets of exactly one round."""

from typing import NoReturn

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

PUBLIC_KEY_BYTES = 32
SECRET_BYTES = 32


class AgreementKey:
    """An X25519 pair made from 32 secret bytes. It doesn't print, pickle or compare."""

    __slots__ = ("_key", "public")

    def __init__(self, secret: bytes) -> None:
        self._key = X25519PrivateKey.from_private_bytes(secret)
        self.public = self._key.public_key().public_bytes_raw()

    def exchange(self, public: bytes) -> bytes:
        """The 32-byte shared secret, to derive keys from and never to use itself.

        Raises `ValueError` for a key of the wrong length or of small order (the all-zero output that
        RFC 7748 section 6.1 tells to refuse).
        """
        return self._key.exchange(X25519PublicKey.from_public_bytes(public))

    def __repr__(self) -> str:
        return f"<AgreementKey {self.public.hex()[:16]}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an agreement key can't be pickled")


# Multiplying by the cofactor is part of every X25519 scalar, so any scalar finds the small-order points.
_PROBE = AgreementKey(b"\x01" * SECRET_BYTES)


def is_small_order(public: bytes) -> bool:
    """Whether a public key would give everyone the same, all-zero, shared secret."""
    try:
        _PROBE.exchange(public)
    except ValueError:
        return True
    return False
