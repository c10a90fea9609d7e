"""AES-256-GCM under a key that seals exactly one message (NIST SP 800-38D).

The key is derived from everything that names the message (round, sender, receiver, direction), so a
fixed nonce is right and there are no associated data: another context is another key.
"""

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

OVERHEAD = 16
"""Bytes that a box is longer than its content."""

_NONCE = bytes(12)


def seal_once(key: bytes, content: bytes) -> bytes:
    """The box around `content`. `key` has 32 bytes and never seals anything else."""
    return AESGCM(key).encrypt(_NONCE, content, None)


def open_box(key: bytes, box: bytes) -> bytes | None:
    """The content of a box, or None if it isn't one made with `key`."""
    if len(box) < OVERHEAD:
        return None
    try:
        return AESGCM(key).decrypt(_NONCE, box, None)
    except InvalidTag:
        return None
