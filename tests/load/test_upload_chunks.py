"""The bulk's own decoder says what protobuf says, and refuses what strict decoding refuses."""

import pytest
from blindsum.aggregator.upload_chunk import decode_chunk
from blindsum.crypto.errors import Refused
from blindsum.proto.v1 import round_pb2
from hypothesis import given
from hypothesis import strategies as st

ID = bytes(range(16))
PLAIN = round_pb2.UploadRequest(upload_id=ID, offset=300, data=b"data").SerializeToString()


@given(
    st.binary(max_size=20), st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 127, 128, 2**63]), st.binary()
)
def test_it_reads_what_was_written(upload_id: bytes, offset: int, data: bytes) -> None:
    message = round_pb2.UploadRequest(upload_id=upload_id, offset=offset, data=data)
    chunk = decode_chunk(message.SerializeToString())
    assert (chunk.upload_id, chunk.offset, bytes(chunk.data)) == (upload_id, offset, data)


@pytest.mark.parametrize(
    "raw",
    [
        PLAIN[:-1],
        PLAIN + b"!",
        PLAIN + PLAIN,
        PLAIN + b"\x22\x01x",  # an unknown field
        b"\x0a\x10" + ID + b"\x10\xac\x82\x00" + b"\x1a\x04data",  # a number longer than it has to be
        b"\x0a\x10" + ID + b"\x10\x00" + b"\x1a\x04data",  # a zero that is left out
        b"\x0a\x10" + ID + b"\x1a\x84\x00data",
        b"\x0a\x10" + ID + b"\x10" + b"\xff" * 10 + b"\x01\x1a\x04data",
        b"\x0a\x7f",
        b"\xff",
    ],
)
def test_it_refuses_what_isnt_plain(raw: bytes) -> None:
    with pytest.raises(Refused):
        decode_chunk(raw)


@given(st.binary(max_size=60) | st.binary(max_size=30).map(lambda tail: b"\x0a\x10" + ID + tail))
def test_random_bytes_are_refused_or_mean_what_they_say(raw: bytes) -> None:
    try:
        chunk = decode_chunk(raw)
    except Refused:
        return
    again = round_pb2.UploadRequest(upload_id=chunk.upload_id, offset=chunk.offset, data=bytes(chunk.data))
    assert again.SerializeToString() == raw
