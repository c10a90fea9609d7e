"""Labelled hashes, keys and MACs (protocols.md 1.5).

Every input starts with a fixed label that names protocol version and use, followed by fields, each
with its length in front, so that no two uses and no two splits of the same bytes ever collide.
"""

import hashlib
import hmac
import os
import struct
from collections.abc import Callable
from functools import lru_cache

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

Random = Callable[[int], bytes]
"""`random(n)` returns n unpredictable bytes."""

system_random: Random = os.urandom

VERSION = b"blindsum/v1/"

_length = struct.Struct("<Q").pack


def labelled(label: str, *fields: bytes) -> bytes:
    """The unambiguous bytes of a label and its fields: what is hashed, signed or derived from."""
    parts = [_prefix(label)]
    for field in fields:
        parts += _length(len(field)), field
    return b"".join(parts)


@lru_cache(maxsize=256)
def _prefix(label: str) -> bytes:
    """A label as `labelled` writes it: there are few, and they are written 100,000 times a round."""
    name = VERSION + label.encode("ascii")
    return _length(len(name)) + name


def labelled_hash(label: str, *fields: bytes) -> bytes:
    """SHA-256 over the label and its fields: 32 bytes."""
    return hashlib.sha256(labelled(label, *fields)).digest()


def derive_key(secret: bytes, label: str, *context: bytes, length: int = 32) -> bytes:
    """HKDF-SHA-256 (RFC 5869) of a secret of at least 256 bits, empty salt, info = label and context."""
    if len(secret) < 32:
        raise ValueError("a secret to derive keys from has at least 32 bytes")
    return HKDF(hashes.SHA256(), length, salt=None, info=labelled(label, *context)).derive(secret)


def mac(key: bytes, label: str, *fields: bytes) -> bytes:
    """HMAC-SHA-256 (RFC 2104) over the label and its fields: 32 bytes."""
    if len(key) < 32:
        raise ValueError("a MAC key has at least 32 bytes")
    return hmac.new(key, labelled(label, *fields), hashlib.sha256).digest()


def same(left: bytes, right: bytes) -> bool:
    """Whether two byte strings are equal, in constant time for equal lengths."""
    return hmac.compare_digest(left, right)
