"""Bytes that aren't exactly one encoding of a message are refused before any service sees them."""

import random

import grpc
import pytest
from blindsum.aggregator.embedding import ServerHandle
from blindsum.aggregator.refusal_status import STATUS
from blindsum.aggregator.wire_decoding import decode_strictly
from blindsum.crypto.errors import RefusalReason, Refused
from blindsum.proto.v1 import enrolment_pb2, round_pb2
from scripted_federation import Stage, reason_of

GOOD = round_pb2.AnswerRequest(round=7, step="share", reply=b"reply bytes").SerializeToString()


def test_every_reason_has_a_status() -> None:
    assert set(STATUS) == set(RefusalReason)


def test_a_plain_encoding_is_decoded() -> None:
    assert decode_strictly(round_pb2.AnswerRequest, GOOD).reply == b"reply bytes"
    assert decode_strictly(round_pb2.AnswerRequest, b"") == round_pb2.AnswerRequest()


@pytest.mark.parametrize(
    "data",
    [
        GOOD[:-1],
        GOOD + b"\x00",
        GOOD + b"\x08\x08",  # the round's number twice
        GOOD + b"\x1a\x05other",  # the reply twice
        GOOD + b"\x78\x01",  # field 15 is unknown
        b"\x08\x87\x00" + GOOD[2:],  # an integer in more bytes than it needs
        b"\xff" * 20,
    ],
    ids=["truncated", "trailing", "repeated number", "repeated bytes", "unknown", "overlong", "random"],
)
def test_anything_else_is_malformed(data: bytes) -> None:
    with pytest.raises(Refused) as caught:
        decode_strictly(round_pb2.AnswerRequest, data)
    assert caught.value.reason is RefusalReason.MALFORMED


def test_nested_unknown_fields_are_malformed() -> None:
    proof = enrolment_pb2.OwnerProof(federation=b"f", time=3).SerializeToString() + b"\x78\x01"
    data = b"\x0a" + bytes([len(proof)]) + proof
    with pytest.raises(Refused):
        decode_strictly(enrolment_pb2.GetStatusRequest, data)


def call_raw(channel: grpc.Channel, name: str, data: bytes) -> None:
    path = f"/blindsum.proto.v1.RoundService/{name}"
    if name == "Upload":
        channel.stream_unary(path)(iter([data]), timeout=10)
    elif name in ("Watch", "Download"):
        list(channel.unary_stream(path)(data, timeout=10))
    else:
        channel.unary_unary(path)(data, timeout=10)


def test_random_bytes_change_nothing_and_break_nothing(stage: Stage, server: ServerHandle) -> None:
    scene = stage()
    member = scene.members[0]
    number = member.until_asked("advertise")
    stream = random.Random(5)
    good = round_pb2.AnswerRequest(round=number, step="advertise", reply=b"advertise clinic-0")
    methods = [method.name for method in round_pb2.DESCRIPTOR.services_by_name["RoundService"].methods]
    for name in methods:
        for _ in range(12):
            data = bytearray(good.SerializeToString() + stream.randbytes(4))
            data[stream.randrange(len(data))] ^= 1 << stream.randrange(8)
            with pytest.raises(grpc.RpcError) as caught:
                call_raw(member.channel, name, bytes(data))
            assert reason_of(caught.value) == "malformed"
    for other in scene.members:
        other.until_asked("advertise")
        assert not other.answer(number, "advertise").duplicate
    member.until_asked("upload")


def test_a_message_above_the_limit_is_refused(stage: Stage) -> None:
    scene = stage()
    member = scene.members[0]
    number = member.until_asked("advertise")
    with pytest.raises(grpc.RpcError) as caught:
        member.answer(number, "advertise", b"x" * (2 << 20))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not member.answer(number, "advertise").duplicate


def test_an_unknown_method_is_unimplemented(stage: Stage) -> None:
    scene = stage()
    with pytest.raises(grpc.RpcError) as caught:
        scene.members[0].channel.unary_unary("/blindsum.proto.v1.RoundService/Nothing")(b"", timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
