"""The admin port: who gets in; live is not ready; storage that fails makes the server unready, and back."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import httpx
import pytest
from blindsum.aggregator.admin_server import SESSION_COOKIE, SESSION_SECONDS, AdminCredentials
from blindsum.aggregator.embedding import ServerHandle
from blindsum.crypto.errors import BlindsumError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from scripted_federation import Scene

Run = Callable[..., ServerHandle]
Build = Callable[..., Scene]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def get(handle: ServerHandle, path: str, **headers: str) -> httpx.Response:
    return httpx.get(f"http://127.0.0.1:{handle.server.admin_port}{path}", headers=headers)


def token(handle: ServerHandle) -> str:
    return (handle.server.settings.data_dir / "admin.token").read_text().strip()


def health(handle: ServerHandle, service: str) -> int:
    channel = grpc.secure_channel(
        f"localhost:{handle.enrolment_port}", grpc.ssl_channel_credentials(handle.ca_pem)
    )
    with channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=20).status


def test_health_is_open_and_everything_else_asks_for_the_token(run_server: Run) -> None:
    handle = run_server()
    assert get(handle, "/livez").status_code == 200
    assert get(handle, "/readyz").json()["ready"] is True
    for path in ("/metrics", "/", "/livez/", "/nothing", "//metrics", "/livez/../metrics", "/%6detrics"):
        assert get(handle, path).status_code == 401, path
    good = f"Bearer {token(handle)}"
    assert get(handle, "/metrics", Authorization=good).status_code == 200
    for bad in ("Bearer", good[:-1], good + "0", f"Basic {token(handle)}", token(handle)):
        assert get(handle, "/metrics", Authorization=bad).status_code == 401, bad
    assert get(handle, "/nothing", Authorization=good).status_code == 404


@pytest.mark.parametrize("host", ["x/livez?", "x/livez#", "x\\livez?", "/livez?", "evil@x/login?", ""])
def test_a_host_header_opens_nothing(run_server: Run, host: str) -> None:
    """What a caller writes there must not become part of the path that is looked up."""
    handle = run_server()
    address = ("127.0.0.1", handle.server.admin_port)
    with socket.create_connection(address, 20) as line:
        line.sendall(f"GET /metrics HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        answer = line.makefile("rb").read()
    assert answer.split(b" ", 2)[1] in (b"400", b"401"), answer[:200]


def test_the_token_is_made_once_and_only_for_the_owner_of_the_file(run_server: Run, tmp_path: Path) -> None:
    handle = run_server()
    first = token(handle)
    assert len(first) == 64
    file = tmp_path / "data" / "admin.token"
    assert file.stat().st_mode & 0o777 == 0o600
    handle.stop()
    assert token(run_server()) == first
    file.chmod(0o640)
    with pytest.raises(BlindsumError, match="chmod 600"):
        AdminCredentials.from_file(file)
    file.chmod(0o600)
    file.write_text("short\n")
    with pytest.raises(BlindsumError, match="shorter"):
        AdminCredentials.from_file(file)


def test_a_session_ends_and_belongs_to_its_token(run_server: Run) -> None:
    handle = run_server()
    cookie = AdminCredentials(token(handle)).new_session()
    assert get(handle, "/metrics", Cookie=f"{SESSION_COOKIE}={cookie}").status_code == 200
    later = AdminCredentials(token(handle), clock=lambda: time.time() - SESSION_SECONDS - 1).new_session()
    forged = [
        later,
        AdminCredentials("another token").new_session(),
        f"9999999999.{cookie.partition('.')[2]}",
        cookie[:-1],
        "",
        ".",
    ]
    for bad in forged:
        assert get(handle, "/metrics", Cookie=f"{SESSION_COOKIE}={bad}").status_code == 401, bad


def test_an_admin_port_that_is_taken_is_refused(run_server: Run, tmp_path: Path) -> None:
    handle = run_server()
    with pytest.raises(BlindsumError, match=r"admin port .* can't be bound"):
        run_server(tmp_path / "second", admin_port=handle.server.admin_port)


class HealthNews:
    """What a health stream says of a service, until it says what a test waits for."""

    def __init__(self, handle: ServerHandle, service: str) -> None:
        self._channel = grpc.secure_channel(
            f"localhost:{handle.enrolment_port}", grpc.ssl_channel_credentials(handle.ca_pem)
        )
        self._news = health_pb2_grpc.HealthStub(self._channel).Watch(
            health_pb2.HealthCheckRequest(service=service), timeout=30
        )

    def until(self, status: int) -> None:
        for answer in self._news:
            if answer.status == status:
                return

    def close(self) -> None:
        self._channel.close()


@pytest.mark.parametrize("failing", ["state", "blobs"])
def test_storage_that_fails_makes_it_unready_but_not_dead(
    run_server: Run, tmp_path: Path, failing: str
) -> None:
    handle = run_server(probe_seconds=0.1)
    news = HealthNews(handle, "ready")
    news.until(SERVING)
    spool = tmp_path / "data" / "blobs" / "spool"
    if failing == "state":
        handle.server.store._writer.execute("PRAGMA query_only = ON")
    else:
        spool.rename(spool.with_name("aside"))
        spool.touch()
    news.until(NOT_SERVING)
    answer = get(handle, "/readyz")
    assert answer.status_code == 503
    assert {name for name, found in answer.json()["checks"].items() if found != "ok"} == {failing}
    assert get(handle, "/livez").status_code == 200
    assert health(handle, "live") == SERVING
    for name in ("", "blindsum.proto.v1.RoundService", "blindsum.proto.v1.EnrolmentService"):
        assert health(handle, name) == NOT_SERVING
    metrics = get(handle, "/metrics", Authorization=f"Bearer {token(handle)}").text
    assert "blindsum_ready 0.0" in metrics
    if failing == "state":
        handle.server.store._writer.execute("PRAGMA query_only = OFF")
    else:
        spool.unlink()
        spool.with_name("aside").rename(spool)
    news.until(SERVING)
    assert get(handle, "/readyz").status_code == 200
    news.close()


def test_one_commit_that_fails_is_enough(run_server: Run, build: Build) -> None:
    handle = run_server(probe_seconds=3600)
    scene = build(handle)
    number = scene.members[0].until_asked("advertise")
    news = HealthNews(handle, "ready")
    news.until(SERVING)
    handle.server.store._writer.execute("PRAGMA query_only = ON")
    with pytest.raises(grpc.RpcError) as refused:
        scene.members[0].answer(number, "advertise")
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    news.until(NOT_SERVING)
    handle.server.store._writer.execute("PRAGMA query_only = OFF")
    for member in scene.members:
        member.answer(number, "advertise")
    news.until(SERVING)
    news.close()


def test_shutting_down_shows_before_the_port_closes(run_server: Run, build: Build) -> None:
    handle = run_server()
    scene = build(handle, dimension=400_000)
    number = 0
    for member in scene.members:
        number = member.until_asked("advertise")
        member.answer(number, "advertise")
    member = scene.members[0]
    member.until_asked("upload")
    slot = member.begin(number, member.contribution()).slot
    news = HealthNews(handle, "ready")
    news.until(SERVING)
    server, loop = handle.server, handle._loop
    stopped = threading.Event()

    async def stop() -> None:
        await server.stop(grace=0.2, drain=30)
        stopped.set()

    asyncio.run_coroutine_threadsafe(stop(), loop)
    news.until(NOT_SERVING)
    assert get(handle, "/readyz").json()["checks"]["server"] == "shutting down"
    assert get(handle, "/livez").status_code == 200
    # Who was admitted may send; who comes now is told to come back.
    assert scene.members[1].begin(number, scene.members[1].contribution()).retry_after_ms > 0
    assert not stopped.is_set()
    assert member.send(slot, member.contribution()) == len(member.contribution())
    assert stopped.wait(20)
