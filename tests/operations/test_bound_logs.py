"""Log lines of calls and rounds carry federation, member and round; no line carries a secret."""

import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import structlog
from blindsum.aggregator.embedding import ServerHandle, configure_logs
from blindsum.crypto.errors import RefusalReason
from scripted_federation import Scene

Run = Callable[..., ServerHandle]
Build = Callable[..., Scene]


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """Everything that is logged, as the server would write it."""
    written = io.StringIO()
    configure_logs("DEBUG", json=True)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(written))
    yield written
    configure_logs("ERROR", json=False)


def lines(written: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written.getvalue().splitlines()]


def test_what_is_logged_of_calls_and_rounds_is_bound(log: io.StringIO, run_server: Run, build: Build) -> None:
    handle = run_server()
    scene = build(handle)
    scene.run_steps(1)
    with pytest.raises(grpc.RpcError):
        scene.members[1].answer(1, "advertise", b"something else")
    scene.conclude(1)
    handle.stop()
    federation = scene.owner.federation.hex()[:16]
    told = lines(log)
    for line in told:
        assert {"event", "level", "timestamp", "part"} <= set(line), line
    (refused,) = [line for line in told if line["event"] == "refused"]
    bound = {name: refused[name] for name in ("method", "member", "federation", "round", "reason")}
    assert bound == {
        "method": "Answer",
        "member": "clinic-1",
        "federation": federation,
        "round": 1,
        "reason": RefusalReason.CONFLICT.value,
    }
    of_rounds = [line for line in told if line["part"] == "engine"]
    assert {"round opened", "step closed", "round concluded"} <= {line["event"] for line in of_rounds}
    assert all(line["federation"] == federation and line["round"] >= 1 for line in of_rounds)


def test_what_fails_inside_a_call_is_bound_too(log: io.StringIO, run_server: Run, build: Build) -> None:
    handle = run_server()
    scene = build(handle)
    member = scene.members[2]
    number = member.until_asked("advertise")
    handle.server.store._writer.execute("PRAGMA query_only = ON")
    with pytest.raises(grpc.RpcError):
        member.answer(number, "advertise")
    handle.server.store._writer.execute("PRAGMA query_only = OFF")
    failed = next(line for line in lines(log) if line["event"] == "storage failed")
    assert (failed["member"], failed["round"], failed["method"]) == ("clinic-2", number, "Answer")
    assert failed["level"] == "error"


def test_one_call_leaves_nothing_bound_to_the_next(log: io.StringIO, run_server: Run, build: Build) -> None:
    handle = run_server()
    scene = build(handle)
    scene.run_steps(1)
    for member in scene.members:
        with pytest.raises(grpc.RpcError):
            member.answer(1, "advertise", b"something else")
    with pytest.raises(grpc.RpcError):
        scene.owner.poll(b"x" * 32)
    refused = [line for line in lines(log) if line["event"] == "refused"]
    assert [line.get("member") for line in refused] == ["clinic-0", "clinic-1", "clinic-2", None]
    assert "round" not in refused[-1]


def test_no_secret_is_logged(log: io.StringIO, run_server: Run, build: Build) -> None:
    handle = run_server()
    scene = build(handle)
    scene.run_steps(1)
    scene.conclude(1)
    handle.stop()
    text = log.getvalue()
    member = scene.members[0]
    secrets = {
        "group key": scene.owner.group_key.secret_bytes(),
        "invitation's token": member.applicant.token,
        "transport key": member.applicant.transport[0],
        "an upload": member.contribution()[:32],
        "admin token": (handle.server.settings.data_dir / "admin.token").read_bytes().strip(),
        "authority's key": (handle.server.settings.data_dir / "authority" / "transport_ca.key").read_bytes(),
    }
    forms = {
        what: (value.hex(), repr(value)[2:-1], value.decode("latin-1")) for what, value in secrets.items()
    }
    assert [what for what, ways in forms.items() if any(way in text for way in ways)] == []
    # Bytes that reach a logger are never shown, whoever passes them.
    structlog.get_logger().info("control", value=b"secret", public=scene.owner.federation.hex()[:16])
    assert '"value": "<6 bytes>"' in log.getvalue()
    assert scene.owner.federation.hex()[:16] in text
