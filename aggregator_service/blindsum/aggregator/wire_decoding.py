"""Strict decoding: a message is exactly one plain encoding of known fields, or it is refused."""

from typing import TypeVar

from blindsum.crypto.errors import RefusalReason, Refused
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

M = TypeVar("M", bound=Message)


def decode_strictly(kind: type[M], data: bytes) -> M:
    """The message in `data`. Raises `Refused` (malformed) unless `data` is a plain encoding of it."""
    message = kind()
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise Refused(RefusalReason.MALFORMED, f"the bytes aren't a {kind.DESCRIPTOR.name}") from None
    # A repeated singular field, a nested unknown field or an over-long integer is shorter when encoded again.
    known = len(UnknownFieldSet(message)) == 0
    if known:
        message.DiscardUnknownFields()
    if not known or message.ByteSize() != len(data):
        raise Refused(
            RefusalReason.MALFORMED,
            f"the {kind.DESCRIPTOR.name} has unknown or repeated fields; update one side",
        )
    return message
