"""A chunk of an upload, read from its message without copying the bulk.

protobuf copies a bytes field when it parses and again when it is asked for. The encoding of an
`UploadRequest` is known, so its head is compared here and the bulk stays where gRPC put it. Whatever
doesn't look exactly like that goes the common way and is refused there.
"""

from dataclasses import dataclass

from blindsum.aggregator.wire_decoding import decode_strictly
from blindsum.proto.v1 import round_pb2

UPLOAD_ID_BYTES = 16
_ID_HEAD = bytes((0x0A, UPLOAD_ID_BYTES))
_OFFSET_TAG, _DATA_TAG = 0x10, 0x1A


@dataclass(frozen=True, slots=True)
class UploadChunk:
    """What an `UploadRequest` says; `data` is a view of the message."""

    upload_id: bytes
    offset: int
    data: memoryview


def decode_chunk(raw: bytes) -> UploadChunk:
    """The chunk in a message. Raises `Refused` (malformed) unless it is a plain `UploadRequest`."""
    found = _read_plainly(raw)
    if found is not None:
        return found
    message = decode_strictly(round_pb2.UploadRequest, raw)
    return UploadChunk(message.upload_id, message.offset, memoryview(message.data))


def _read_plainly(raw: bytes) -> UploadChunk | None:
    """The chunk of a message with an id of the usual length and data, in the order of their numbers."""
    at = len(_ID_HEAD) + UPLOAD_ID_BYTES
    if not raw.startswith(_ID_HEAD) or len(raw) <= at:
        return None
    offset = 0
    if raw[at] == _OFFSET_TAG:
        offset, at = _varint(raw, at + 1)
        if offset == 0:
            return None
    if at >= len(raw) or raw[at] != _DATA_TAG:
        return None
    length, at = _varint(raw, at + 1)
    if length == 0 or at + length != len(raw):
        return None
    return UploadChunk(raw[2 : 2 + UPLOAD_ID_BYTES], offset, memoryview(raw)[at:])


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """A number in its shortest encoding, below 2^63, and where it ends; (0, ...) if it is none."""
    value = shift = 0
    while at < len(raw) and shift < 63:
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (0 if byte == 0 and shift else value), at
        shift += 7
    return 0, at
