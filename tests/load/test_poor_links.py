"""Bulk over links that are slow, far away, broken or stuck (faults.md 2, 3, 5, 46)."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import plain_scheme
import pytest
from blindsum.aggregator.embedding import AggregatorServer, ServerHandle, serve_in_thread
from blindsum.aggregator.structured_logs import configure_logs
from blindsum.client.transport import MemberLine, Patience
from blindsum.crypto.trust.plan import Deadlines
from blindsum.proto.v1 import round_pb2
from link_proxy import link
from scripted_federation import Scene, ScriptedMember, build_scene, settings_for

configure_logs("ERROR", json=False)

MB = 1_000_000
LONG = Deadlines(gather=1, advertise=60, share=60, upload=600, confirm=60, reveal=60, conclude=60)
UPLOAD_CALL = "/blindsum.proto.v1.RoundService/Upload"


@pytest.fixture
def scene_of(tmp_path: Path) -> Iterator[Callable[..., tuple[ServerHandle, Scene, int]]]:
    """A federation in whose round the upload step is open: server, scene, the round's number."""
    opened: list[Any] = []

    def build(
        dimension: int, interceptors: tuple[Any, ...] = (), **settings: Any
    ) -> tuple[ServerHandle, Scene, int]:
        def make(values: Any) -> AggregatorServer:
            server = AggregatorServer(
                values, schemes=plain_scheme.scheme, scheme_factory="plain_scheme:scheme"
            )
            server._interceptors += interceptors
            return server

        handle = serve_in_thread(settings_for(tmp_path / "server", presence_grace=60, **settings), make)
        plan = {"dimension": dimension, "deadlines": LONG}
        scene = build_scene(handle.enrolment_port, handle.member_port, handle.ca_pem, 3, plan)
        opened.extend((scene.close, handle.stop))
        for member in scene.members:
            member.watch()
        number = 0
        for member in scene.members:
            number = member.until_asked("advertise")
            member.answer(number, "advertise")
        for member in scene.members:
            member.until_asked("upload")
        return handle, scene, number

    yield build
    for close in opened:
        close()


def line_of(member: ScriptedMember, port: int, **changes: Any) -> MemberLine:
    """The SDK's transport, with this member's certificate."""
    return MemberLine(
        f"localhost:{port}",
        member.owner.ca_pem.decode(),
        key=member.applicant.transport[0],
        certificate=member.certificate,
        **{"patience": Patience(total=60.0), **changes},
    )


class Progress:
    """What `on_bytes` was told: where each attempt began, and the furthest byte."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.seen: list[int] = []

    def __call__(self, done: int, total: int) -> None:
        if not self.seen or done <= self.seen[-1]:
            self.begun.append(done)
        self.seen.append(done)
        assert done <= total


def send(
    member: ScriptedMember, port: int, number: int, folder: Path, on_bytes: Callable[[int, int], None]
) -> bytes:
    """Upload a member's contribution through the SDK over this port; its bytes."""
    bulk = member.contribution()
    path = folder / f"{member.name}.bin"
    path.write_bytes(bulk)
    digest = member.digest(bulk)
    line = line_of(member, port)
    begin = round_pb2.BeginUploadRequest(
        round=number,
        kind=round_pb2.BULK_KIND_CONTRIBUTION,
        total=len(bulk),
        digest=digest,
        reply=b"U" + digest,
    )
    try:
        line.upload(begin, path, on_bytes)
    finally:
        line.close()
    return bulk


def publish(scene: Scene, number: int, *uploaded: ScriptedMember) -> None:
    """The others upload, everyone confirms, and everyone is in the sum once."""
    for member in scene.members:
        if member not in uploaded:
            member.upload(number)
    for member in scene.members:
        member.until_asked("confirm")
        member.answer(number, "confirm")
    for member in scene.members:
        member.until_state(round_pb2.ROUND_STATE_PUBLISHED, number)


def break_an_upload(
    scene_of: Callable[..., tuple[ServerHandle, Scene, int]],
    folder: Path,
    size: int,
    cuts: list[int],
) -> None:
    handle, scene, number = scene_of(size // 8)
    member, progress = scene.members[0], Progress()
    with link(handle.member_port, rate=4 * MB, cut_up=cuts) as slow:
        bulk = send(member, slow.port, number, folder, progress)
    assert slow.cuts == len(cuts)
    # Every attempt went on from where the one before had come to, and each cut made just one.
    assert progress.begun == sorted(progress.begun)
    assert len(progress.begun) == len(cuts) + 1
    assert all(begun > cut - 2 * MB for begun, cut in zip(progress.begun[1:], cuts, strict=True)), (
        progress.begun
    )
    print(f"{slow.cuts} cuts, {slow.up / len(bulk):.4f} x the bytes")
    assert slow.up <= 1.05 * len(bulk), f"{slow.up / len(bulk):.3f} x the bytes"
    assert progress.seen[-1] == len(bulk)
    publish(scene, number, member)
    assert scene.members[1].sum(number) == {0b111}


def test_40_mb_at_4_mb_a_second_broken_five_times_come_whole(
    scene_of: Callable[..., tuple[ServerHandle, Scene, int]],
    tmp_path: Path,
) -> None:
    cuts = [5 * MB, 12 * MB, 20 * MB, 28 * MB, 36 * MB]
    break_an_upload(scene_of, tmp_path, 40 * MB, cuts)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_400_mb_at_4_mb_a_second_broken_five_times_come_whole(
    scene_of: Callable[..., tuple[ServerHandle, Scene, int]],
    tmp_path: Path,
) -> None:
    cuts = [50 * MB, 120 * MB, 200 * MB, 280 * MB, 360 * MB]
    break_an_upload(scene_of, tmp_path, 400 * MB, cuts)


def test_a_download_goes_on_after_every_cut(
    scene_of: Callable[..., tuple[ServerHandle, Scene, int]],
) -> None:
    handle, scene, number = scene_of(1_000_000)
    publish(scene, number)
    member, progress = scene.members[0], Progress()
    total = len(member.contribution())
    with link(handle.member_port, rate=10 * MB, delay=0.005, cut_down=[MB, 3 * MB, 6 * MB]) as slow:
        line = line_of(member, slow.port)
        pieces = line.download(round_pb2.BULK_KIND_SUM, number, total, what="the sum", on_bytes=progress)
        data = b"".join(pieces)
        line.close()
    assert slow.cuts == 3
    assert np.array_equal(np.frombuffer(data, "<u8"), np.full(total // 8, 0b111, np.uint64))
    # Nothing that had arrived was asked for again.
    assert progress.seen == sorted(set(progress.seen))


def test_a_stalled_link_loses_its_slot_and_goes_on_when_it_moves_again(
    scene_of: Callable[..., tuple[ServerHandle, Scene, int]], tmp_path: Path
) -> None:
    """faults.md 3, with the real clock: the server's deadline frees the slot while the link stands still."""
    handle, scene, number = scene_of(1_000_000, stall_seconds=0.5, upload_slots=1)
    member, other = scene.members[:2]
    half, served = threading.Event(), threading.Event()
    with link(handle.member_port, rate=20 * MB) as slow:

        def on_bytes(done: int, total: int) -> None:
            if done >= total // 4 and not half.is_set():
                half.set()
                slow.stall(True)

        def serve_the_other() -> None:
            half.wait(30)
            other.upload(number)  # asks again until the only slot is free
            served.set()
            slow.stall(False)

        helper = threading.Thread(target=serve_the_other)
        helper.start()
        send(member, slow.port, number, tmp_path, on_bytes)
        helper.join()
    assert served.is_set()
    publish(scene, number, member, other)
    assert scene.members[2].sum(number) == {0b111}


class Fails(grpc.aio.ServerInterceptor):
    """Ends uploads with INTERNAL after some chunks, as aio does when a connection dies (grpc issue 36066)."""

    def __init__(self, times: int) -> None:
        self.left = times

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if details.method != UPLOAD_CALL or not self.left:
            return handler
        self.left -= 1

        async def fail(requests: Any, context: Any) -> Any:
            await anext(requests)
            await context.abort(grpc.StatusCode.INTERNAL, "Internal error from Core: execute_batch")

        return grpc.stream_unary_rpc_method_handler(fail)


def test_the_sdk_survives_the_internal_error_of_a_dying_connection(
    scene_of: Callable[..., tuple[ServerHandle, Scene, int]], tmp_path: Path
) -> None:
    fails = Fails(3)
    handle, scene, number = scene_of(200_000, (fails,))
    member = scene.members[0]
    send(member, handle.member_port, number, tmp_path, Progress())
    assert fails.left == 0
    publish(scene, number, member)
    assert scene.members[1].sum(number) == {0b111}
