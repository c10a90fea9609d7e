"""One value, one encoding: strict decoding of signed documents and step messages.

Documents that people sign are JSON with sorted keys; step messages are MessagePack arrays. Decoding
checks types, refuses unknown or repeated fields, and encodes the result again: bytes that aren't the
one canonical encoding of the value they hold (leftover bytes, wider integers than needed, repeated
keys, another order) are refused before anything else looks at them.
"""

from typing import Any, TypeVar

import msgspec
from blindsum.crypto.errors import RefusalReason, Refused

T = TypeVar("T")


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the signed documents and the header: canonical JSON; bytes fields are base64."""


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of step messages: canonical MessagePack, fields in order of declaration, no names."""


def encode_document(value: Document) -> bytes:
    """The canonical JSON of a document, UTF-8, keys sorted, no white space."""
    return msgspec.json.encode(value, order="sorted")


def decode_document(data: bytes, kind: type[T], what: str) -> T:
    """The document in `data`; `what` names it in errors. Raises `Refused` (malformed)."""
    try:
        value = msgspec.json.decode(data, type=kind, strict=True)
    except (msgspec.DecodeError, RecursionError) as error:
        raise Refused(RefusalReason.MALFORMED, f"{what} isn't valid: {error}") from None
    if msgspec.json.encode(value, order="sorted") != data:
        raise Refused(RefusalReason.MALFORMED, f"{what} isn't in canonical form")
    return value


def encode_message(value: Any) -> bytes:
    """The canonical MessagePack of a step message."""
    return msgspec.msgpack.encode(value)


def decode_message(data: bytes, kind: type[T], what: str) -> T:
    """The message in `data`; `what` names it in errors. Raises `Refused` (malformed)."""
    try:
        value = msgspec.msgpack.decode(data, type=kind, strict=True)
    except (msgspec.DecodeError, RecursionError) as error:
        raise Refused(RefusalReason.MALFORMED, f"{what} isn't valid: {error}") from None
    if msgspec.msgpack.encode(value) != data:
        raise Refused(RefusalReason.MALFORMED, f"{what} isn't in canonical form")
    return value
