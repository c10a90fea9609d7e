"""Uploads as the fault list has them: limits, stalls, disorder, repeats, strangers, damage, dead workers."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from blindsum.aggregator.embedding import ServerHandle
from blindsum.aggregator.folding import contribution_name
from blindsum.aggregator.ingest import Ingest
from blindsum.proto.v1 import round_pb2
from manual_clock import ManualClock
from scripted_federation import CHUNK, Scene, ScriptedMember, Serve, Stage, build_scene, chunks, reason_of

ABORTED = round_pb2.ROUND_STATE_ABORTED
BIG = 150_000
"""Fields of uploads that take several chunks: 1.2 MB."""


def reach_upload(scene: Scene) -> int:
    number = 0
    for member in scene.members:
        number = member.until_asked("advertise")
        member.answer(number, "advertise")
    for member in scene.members:
        member.until_asked("upload")
    return number


def finish(scene: Scene, number: int) -> None:
    for member in scene.members:
        member.until_asked("confirm")
        member.answer(number, "confirm")
    for member in scene.members:
        member.until_state(round_pb2.ROUND_STATE_PUBLISHED, number)


def refusal(call: object, *arguments: object) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments)  # type: ignore[operator]
    return reason_of(caught.value)


def complete(scene: Scene, number: int) -> None:
    """The others upload, everyone confirms, and the sum is exactly everyone's."""
    for member in scene.members:
        member.upload(number)
    finish(scene, number)
    assert scene.members[0].sum(number) == {(1 << len(scene.members)) - 1}


@pytest.mark.parametrize("off", [-8, -1, 1, 8, 1 << 40])
def test_an_upload_of_another_size_isnt_admitted(stage: Stage, off: int) -> None:
    scene = stage()
    number = reach_upload(scene)
    member = scene.members[0]
    bulk = member.contribution()
    with pytest.raises(grpc.RpcError) as caught:
        member.begin(number, bulk, total=len(bulk) + off)
    assert reason_of(caught.value) == "wrong_size"
    complete(scene, number)


def endless(slot: round_pb2.UploadSlot, bulk: bytes) -> Iterator[round_pb2.UploadRequest]:
    yield from chunks(slot, bulk)
    offset = len(bulk)
    while True:
        yield round_pb2.UploadRequest(upload_id=slot.upload_id, offset=offset, data=bytes(CHUNK))
        offset += CHUNK


@pytest.mark.parametrize("extra", ["a byte", "no end"])
def test_a_stream_that_is_too_long_is_cut(stage: Stage, extra: str) -> None:
    scene = stage()
    number = reach_upload(scene)
    member = scene.members[0]
    bulk = member.contribution()
    slot = member.begin(number, bulk).slot
    stream = chunks(slot, bulk + b"!") if extra == "a byte" else endless(slot, bulk)
    assert refusal(member.stub.Upload, stream) == "wrong_size"
    complete(scene, number)


def test_a_stalled_stream_loses_its_slot_and_others_are_served(
    serve: Serve, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived = threading.Event()
    feed = Ingest._feed

    def told(slot: Any, chunk: memoryview) -> None:
        feed(slot, chunk)
        arrived.set()

    monkeypatch.setattr(Ingest, "_feed", staticmethod(told))
    handle = serve(upload_slots=1)
    scene = build_scene(handle.enrolment_port, handle.member_port, handle.ca_pem, 3, {"dimension": BIG})
    for member in scene.members:
        member.watch()
    number = reach_upload(scene)
    slow, other, _ = scene.members
    bulk = slow.contribution()
    slot = slow.begin(number, bulk).slot
    release = threading.Event()

    def trickle() -> Iterator[round_pb2.UploadRequest]:
        yield round_pb2.UploadRequest(upload_id=slot.upload_id, offset=0, data=bulk[:1000])
        release.wait(30)

    call = slow.stub.Upload.future(trickle())
    assert other.begin(number, other.contribution()).retry_after_ms > 0
    # The first chunk has to be there before time moves, or an unused slot would end and no stream.
    assert arrived.wait(30)
    clock.advance(21)
    with pytest.raises(grpc.RpcError) as caught:
        call.result(timeout=20)
    assert reason_of(caught.value) == "limit"
    release.set()
    other.upload(number)
    # The stalled one goes on where it was.
    again = slow.begin(number, bulk)
    while again.WhichOneof("answer") != "slot":
        again = slow.begin(number, bulk)
    assert again.slot.offset == 1000
    complete(scene, number)
    scene.close()


def disordered(slot: round_pb2.UploadSlot, bulk: bytes, fault: str) -> list[round_pb2.UploadRequest]:
    parts = list(chunks(slot, bulk))
    first, second, third = parts[:3]
    return {
        "out of order": [second, first, third],
        "missing": [first, third],
        "duplicated": [first, first, second],
        "overlapping": [
            first,
            round_pb2.UploadRequest(upload_id=slot.upload_id, offset=CHUNK - 8, data=second.data),
        ],
        "another upload": [first, round_pb2.UploadRequest(upload_id=b"x" * 16, offset=CHUNK, data=b"1")],
        "empty chunk": [first, round_pb2.UploadRequest(upload_id=slot.upload_id, offset=CHUNK)],
        "cut short": [first, second],
        "huge chunk": [round_pb2.UploadRequest(upload_id=slot.upload_id, offset=0, data=bulk[: CHUNK + 1])],
        "unknown slot": [round_pb2.UploadRequest(upload_id=b"y" * 16, offset=0, data=bulk[:10])],
        "nothing": [],
    }[fault]


@pytest.mark.parametrize(
    ("fault", "reason", "kept"),
    [
        ("out of order", "wrong_offset", 0),
        ("missing", "wrong_offset", CHUNK),
        ("duplicated", "wrong_offset", CHUNK),
        ("overlapping", "wrong_offset", CHUNK),
        ("another upload", "conflict", CHUNK),
        ("empty chunk", "wrong_size", CHUNK),
        ("cut short", "wrong_size", 2 * CHUNK),
        ("huge chunk", "wrong_size", 0),
        ("unknown slot", "wrong_offset", 0),
        ("nothing", "wrong_size", 0),
    ],
)
def test_disorder_is_refused_and_the_upload_goes_on(stage: Stage, fault: str, reason: str, kept: int) -> None:
    scene = stage(dimension=BIG)
    number = reach_upload(scene)
    member = scene.members[0]
    bulk = member.contribution()
    slot = member.begin(number, bulk).slot
    assert refusal(member.stub.Upload, iter(disordered(slot, bulk, fault))) == reason
    again = member.begin(number, bulk).slot
    assert again.offset == kept
    assert member.send(again, bulk) == len(bulk)
    complete(scene, number)


def test_bytes_that_dont_match_the_digest_are_thrown_away(stage: Stage) -> None:
    scene = stage()
    number = reach_upload(scene)
    member = scene.members[0]
    bulk = member.contribution()
    slot = member.begin(number, bulk).slot
    wrong = bulk[:-1] + b"\x01"
    assert refusal(member.send, slot, wrong) == "wrong_digest"
    assert member.begin(number, bulk).slot.offset == 0
    complete(scene, number)


def test_the_digest_is_the_one_in_the_signed_reply(stage: Stage) -> None:
    scene = stage()
    number = reach_upload(scene)
    member = scene.members[0]
    bulk = member.contribution()
    for changes, reason in (
        ({"digest": b"d" * 32}, "wrong_digest"),
        ({"digest": b"d" * 31}, "wrong_size"),
        ({"reply": b"complaint"}, "wrong_step"),
        ({"reply": b"nonsense"}, "malformed"),
        ({"kind": round_pb2.BULK_KIND_SUM}, "malformed"),
        ({"kind": 99}, "malformed"),
        ({"kind": 0}, "malformed"),
        ({"round": number + 1}, "wrong_round"),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            member.begin(number, bulk, **changes)
        assert reason_of(caught.value) == reason
    complete(scene, number)


def test_a_frame_out_of_range_is_refused(stage: Stage) -> None:
    scene = stage()
    number = reach_upload(scene)
    member = scene.members[0]
    good = member.contribution()
    bad = good[: 8 * 4096] + b"\xff" * 8 + good[8 * 4096 + 8 :]
    slot = member.begin(number, bad).slot
    assert refusal(member.send, slot, bad) == "out_of_range"
    complete(scene, number)


@pytest.mark.parametrize("value", [0, (1 << 62) - 1])
def test_vectors_of_zeros_and_of_large_values_are_accepted(stage: Stage, value: int) -> None:
    scene = stage()
    number = reach_upload(scene)
    for member in scene.members:
        bulk = np.full(len(member.contribution()) // 8, value, "<u8").tobytes()
        member.upload(number, bulk)
    finish(scene, number)
    assert scene.members[0].sum(number) == {3 * value}


def test_the_same_upload_again_is_done_already_and_another_is_refused(stage: Stage) -> None:
    scene = stage()
    number = reach_upload(scene)
    member = scene.members[0]
    bulk = member.contribution()
    member.upload(number, bulk)
    assert member.begin(number, bulk).done
    other = np.full(len(bulk) // 8, 77, "<u8").tobytes()
    with pytest.raises(grpc.RpcError) as caught:
        member.begin(number, other)
    assert reason_of(caught.value) == "conflict"
    complete(scene, number)


def test_two_uploads_at_once_of_one_member_cant_both_come(stage: Stage) -> None:
    scene = stage()
    number = reach_upload(scene)
    member = scene.members[0]
    bulk = member.contribution()
    member.begin(number, bulk)
    other = np.full(len(bulk) // 8, 77, "<u8").tobytes()
    with pytest.raises(grpc.RpcError) as caught:
        member.begin(number, other)
    assert reason_of(caught.value) == "conflict"
    complete(scene, number)


def test_an_upload_isnt_taken_before_its_step_or_after(stage: Stage) -> None:
    scene = stage()
    member = scene.members[0]
    number = member.until_asked("advertise")
    bulk = member.contribution()
    with pytest.raises(grpc.RpcError) as caught:
        member.begin(number, bulk)
    assert reason_of(caught.value) == "wrong_step"
    assert number == reach_upload(scene)
    complete(scene, number)
    newcomer = np.full(len(bulk) // 8, 77, "<u8").tobytes()
    with pytest.raises(grpc.RpcError) as caught:
        member.begin(number, newcomer)
    assert reason_of(caught.value) in {"conflict", "closed"}


def test_an_upload_of_an_earlier_round_is_refused(stage: Stage) -> None:
    scene = stage(rounds=2)
    number = reach_upload(scene)
    old = scene.members[0].contribution()
    old_digest = scene.members[0].digest(old)
    complete(scene, number)
    scene.conclude(number)
    for member in scene.members:
        member.until_asked("advertise", number + 1)
    assert reach_upload(scene) == number + 1
    member = scene.members[0]
    # The same bytes hash to another digest under this round's header: the replay can't complete.
    assert old_digest != member.digest(old)
    slot = member.begin(number + 1, old, digest=old_digest, reply=b"U" + old_digest).slot
    assert refusal(member.send, slot, old) == "wrong_digest"


def test_another_members_slot_is_of_no_use(stage: Stage) -> None:
    scene = stage()
    number = reach_upload(scene)
    owner, thief = scene.members[:2]
    bulk = owner.contribution()
    slot = owner.begin(number, bulk).slot
    assert refusal(thief.send, slot, bulk) == "wrong_offset"
    complete(scene, number)


def test_a_broken_stream_goes_on_where_it_ended(stage: Stage) -> None:
    scene = stage(dimension=BIG)
    number = reach_upload(scene)
    member = scene.members[0]
    bulk = member.contribution()
    sent = 0
    for end in (CHUNK, 3 * CHUNK, 4 * CHUNK):
        slot = member.begin(number, bulk).slot
        hold = threading.Event()

        def part(
            slot: round_pb2.UploadSlot = slot, end: int = end, hold: threading.Event = hold
        ) -> Iterator[round_pb2.UploadRequest]:
            yield from chunks(slot, bulk, end)
            hold.wait(30)

        call = member.stub.Upload.future(part())
        # Coming back takes the upload over from the stream that the server still believes in.
        again = member.begin(number, bulk).slot
        sent += again.offset - slot.offset
        call.cancel()
        hold.set()
    slot = member.begin(number, bulk).slot
    assert slot.offset == sent
    assert member.send(slot, bulk) == len(bulk)
    complete(scene, number)


def test_when_all_slots_are_taken_the_member_is_told_to_wait(serve: Serve, clock: ManualClock) -> None:
    handle = serve(upload_slots=1)
    scene = build_scene(handle.enrolment_port, handle.member_port, handle.ca_pem, 3)
    for member in scene.members:
        member.watch()
    number = reach_upload(scene)
    first, second, _ = scene.members
    assert first.begin(number, first.contribution()).slot.upload_id
    assert second.begin(number, second.contribution()).retry_after_ms == 10
    # A slot that nobody uses is given back.
    clock.advance(21)
    complete(scene, number)
    scene.close()


def test_a_nearly_full_disk_lets_uploads_wait(serve: Serve) -> None:
    handle = serve()
    scene = build_scene(handle.enrolment_port, handle.member_port, handle.ca_pem, 3)
    for member in scene.members:
        member.watch()
    number = reach_upload(scene)
    blobs = handle.server.blobs
    blobs.free_bytes = lambda: 1000  # type: ignore[method-assign]
    member = scene.members[0]
    assert member.begin(number, member.contribution()).retry_after_ms > 0
    del blobs.free_bytes  # type: ignore[attr-defined]
    complete(scene, number)
    scene.close()


@pytest.mark.parametrize("damage", ["flipped", "cut", "swapped", "gone"])
def test_damage_on_the_disk_is_never_summed(
    stage: Stage, server: ServerHandle, tmp_path: Path, damage: str
) -> None:
    scene = stage()
    number = reach_upload(scene)
    first, second, third = scene.members
    paths = []
    for member in (first, second):
        bulk = member.contribution()
        member.upload(number, bulk)
        name = contribution_name(scene.owner.federation, number, member.name, member.digest(bulk))
        paths.append(tmp_path / "blobs" / name)
    data, other = (path.read_bytes() for path in paths)
    if damage == "flipped":
        paths[0].write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
    elif damage == "cut":
        paths[0].write_bytes(data[:-1])
    elif damage == "swapped":
        paths[0].write_bytes(other)
        paths[1].write_bytes(data)
    else:
        paths[0].unlink()
    third.upload(number)
    for member in scene.members:
        member.until_asked("confirm")
        member.answer(number, "confirm")
    notice = first.until_state(ABORTED, number)
    assert "stored upload" in notice.abort_reason or "is gone" in notice.abort_reason


def test_a_worker_that_dies_on_a_frame_is_replaced(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    handle = serve("plain_scheme:native_scheme")
    scene = build_scene(handle.enrolment_port, handle.member_port, handle.ca_pem, 3, {"dimension": 5_000})
    for member in scene.members:
        member.watch()
    number = reach_upload(scene)
    hostile: ScriptedMember = scene.members[0]
    good = hostile.contribution()
    bad = b"DIE" + good[3:]
    slot = hostile.begin(number, bad).slot
    assert refusal(hostile.send, slot, bad) == "malformed"
    complete(scene, number)
    scene.close()
