"""Caps, so that strangers and a member that overdoes it can't starve the others (faults.md 4)."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import plain_scheme
import pytest
from blindsum.aggregator.embedding import AggregatorServer, ServerHandle, serve_in_thread
from blindsum.aggregator.structured_logs import configure_logs
from blindsum.aggregator.wire_handlers import CALLS_PER_MEMBER
from blindsum.proto.v1 import round_pb2
from scripted_federation import CALL_SECONDS, Scene, build_scene, reason_of, settings_for

configure_logs("ERROR", json=False)

CALLS = 64


@pytest.fixture
def handle(tmp_path: Path) -> Iterator[ServerHandle]:
    def make(values: object) -> AggregatorServer:
        return AggregatorServer(values, schemes=plain_scheme.scheme, scheme_factory="plain_scheme:scheme")  # type: ignore[arg-type]

    with serve_in_thread(settings_for(tmp_path, max_calls=CALLS, presence_grace=60), make) as served:
        yield served


@pytest.fixture
def scene(handle: ServerHandle) -> Iterator[Scene]:
    built = build_scene(handle.enrolment_port, handle.member_port, handle.ca_pem, 3)
    for member in built.members:
        member.watch()
        member.until(lambda _: True)
    yield built
    built.close()


def run_a_round(scene: Scene) -> None:
    number = scene.run_steps()
    assert scene.members[0].sum(number) == {0b111}


def test_idle_strangers_are_cut_at_the_cap_and_a_round_goes_on(handle: ServerHandle, scene: Scene) -> None:
    strangers = [socket.create_connection(("127.0.0.1", handle.member_port)) for _ in range(10 * CALLS)]
    # Those beyond the cap hear the end at once; the others wait for a handshake that never comes.
    strangers[-1].settimeout(CALL_SECONDS)
    assert strangers[-1].recv(1) == b""
    run_a_round(scene)
    for stranger in strangers:
        stranger.close()


def test_a_member_with_too_many_calls_is_refused_and_the_others_are_served(scene: Scene) -> None:
    greedy, other = scene.members[:2]
    hold = threading.Event()

    def never() -> Iterator[round_pb2.UploadRequest]:
        hold.wait(CALL_SECONDS)
        yield from ()

    calls = [greedy.stub.Upload.future(never()) for _ in range(CALLS_PER_MEMBER + 8)]
    refused = threading.Semaphore(0)
    for call in calls:
        call.add_done_callback(lambda _: refused.release())
    # The watch stream counts too.
    for _ in range(8 + 1):
        assert refused.acquire(timeout=CALL_SECONDS)
    assert {reason_of(call) for call in calls if call.done()} == {"limit"}
    assert other.stub.GetEnvelopes(round_pb2.GetEnvelopesRequest(), timeout=CALL_SECONDS).envelopes
    for call in calls:
        call.cancel()
    hold.set()
    # What has ended is forgotten, and the greedy one takes part like any other.
    run_a_round(scene)


def test_headers_beyond_the_limit_are_refused_and_the_connection_lives(scene: Scene) -> None:
    member, request = scene.members[0], round_pb2.GetEnvelopesRequest()
    with pytest.raises(grpc.RpcError) as refused:
        member.stub.GetEnvelopes(request, metadata=(("x-large", "x" * 100_000),), timeout=CALL_SECONDS)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert member.stub.GetEnvelopes(request, timeout=CALL_SECONDS).envelopes
    run_a_round(scene)
