"""Old sums, states and logs go; the newest state, the history and the audit stay."""

import asyncio
import threading
from collections.abc import Callable

import pytest
from blindsum.aggregator.embedding import ServerHandle
from blindsum.aggregator.retention import Retention
from blindsum.aggregator.store.records import (
    CloseRecord,
    ContributionRecord,
    EventRecord,
    InitialStateRecord,
    ReplyRecord,
    RoundRecord,
)
from blindsum.aggregator.store.state import broken_link
from blindsum.proto.v1 import round_pb2
from scripted_federation import Scene

Run = Callable[..., ServerHandle]
Build = Callable[..., Scene]
DAY_MS = 86_400_000


class Later:
    """The clock of a server, some days on."""

    def __init__(self, handle: ServerHandle, days: float) -> None:
        self._clock = handle.server._clock
        self._days = days

    def now_ms(self) -> int:
        return self._clock.now_ms() + int(self._days * DAY_MS)

    def call_at(self, *_: object) -> None:
        raise NotImplementedError


def sweep(handle: ServerHandle, days: float) -> int:
    """Sweep as if so many days had passed; how many blobs went."""
    server = handle.server
    retention = Retention(
        server.settings,
        Later(handle, days),  # type: ignore[arg-type]
        server.observed,
        server.blobs,
        server.engines,
        server._executor,
    )
    return asyncio.run_coroutine_threadsafe(retention.sweep(), handle._loop).result(20)


def blobs(handle: ServerHandle, room: str) -> int:
    return len(handle.server.blobs.names(room))


@pytest.fixture
def trained(run_server: Run, build: Build) -> tuple[ServerHandle, Scene]:
    """Three concluded rounds and a fourth that is open; every sum and state is kept by number."""
    handle = run_server(keep_rounds=10, keep_days=5)
    scene = build(handle, rounds=5)
    for number in (1, 2, 3):
        scene.run_steps(number)
        scene.conclude(number)
    for member in scene.members:
        member.until_asked("advertise", 4)
        member.answer(4, "advertise")
    for member in scene.members[:2]:
        member.until_asked("upload", 4)
        member.upload(4)
    return handle, scene


def test_what_is_young_stays(trained: tuple[ServerHandle, Scene]) -> None:
    handle, _ = trained
    sums, states = blobs(handle, "result"), blobs(handle, "checkpoint")
    assert (sums, states) == (3, 4)
    assert sweep(handle, days=4) == 0
    assert (blobs(handle, "result"), blobs(handle, "checkpoint")) == (sums, states)


def test_what_is_old_goes_but_the_newest_state_history_and_audit(
    trained: tuple[ServerHandle, Scene],
) -> None:
    handle, scene = trained
    store = handle.server.store
    events = len(store.find(EventRecord))
    assert sweep(handle, days=6) > 0
    assert blobs(handle, "result") == 0
    assert scene.members[0].download(round_pb2.BULK_KIND_CHECKPOINT, 3) == b"sealed after 3"
    assert [row.number for row in store.find(RoundRecord)] == [1, 2, 3, 4]
    # What is left is the log of the round that is open.
    for kind in (ReplyRecord, CloseRecord, ContributionRecord):
        assert {row.round for row in store.find(kind)} == {4}
    told = store.find(EventRecord)
    assert broken_link(store) is None
    assert [one.kind for one in told[events:]] == ["expired data deleted"]
    assert sweep(handle, days=6) == 0
    # And that round finishes with everything it had.
    scene.members[2].upload(4)
    for member in scene.members:
        member.until_asked("confirm", 4)
        member.answer(4, "confirm")
    scene.members[0].until_state(round_pb2.ROUND_STATE_PUBLISHED, 4)
    assert scene.members[0].sum(4) == {0b111}
    scene.conclude(4)


def test_a_restart_after_a_sweep_goes_on(trained: tuple[ServerHandle, Scene], run_server: Run) -> None:
    handle, scene = trained
    sweep(handle, days=6)
    handle.stop()
    again = run_server(keep_rounds=10, keep_days=5)
    scene.reconnect(again.enrolment_port, again.member_port, again.ca_pem)
    for member in scene.members:
        member.watch()
    scene.members[2].until_asked("upload", 4)
    scene.members[2].upload(4)
    for member in scene.members:
        member.until_asked("confirm", 4)
        member.answer(4, "confirm")
    scene.members[0].until_state(round_pb2.ROUND_STATE_PUBLISHED, 4)
    assert scene.members[0].sum(4) == {0b111}


def test_leftovers_go(trained: tuple[ServerHandle, Scene]) -> None:
    handle, scene = trained
    scene.owner.publish_first_state(b"u" * 32, b"a state that no plan names")
    prefix = f"spool/{scene.owner.federation.hex()[:32]}"
    for name in (f"{prefix}.2.clinic-0.aa", f"{prefix}.4.clinic-2.bb", f"{prefix}.first.cc"):
        spool = handle.server.blobs.spool(name)
        spool.append(b"x")
        spool.close()
    states = blobs(handle, "checkpoint")
    sweep(handle, days=4)
    left = [name.removeprefix(prefix) for name in handle.server.blobs.names("spool")]
    assert {".4.clinic-2.bb", ".first.cc"} <= set(left)
    assert ".2.clinic-0.aa" not in left
    assert len(handle.server.store.find(InitialStateRecord)) == 1
    sweep(handle, days=8)
    assert handle.server.store.find(InitialStateRecord) == []
    assert blobs(handle, "checkpoint") < states


def test_it_runs_by_itself(run_server: Run, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = run_server(retention_seconds=0.1, keep_days=1e-9)
    blobs_of_server = handle.server.blobs
    deleted = threading.Event()
    delete = blobs_of_server.delete

    def delete_and_tell(name: str) -> None:
        delete(name)
        deleted.set()

    monkeypatch.setattr(blobs_of_server, "delete", delete_and_tell)
    scene = build(handle, rounds=2)
    scene.run_steps(1)
    scene.conclude(1)
    scene.members[0].until_asked("advertise", 2)
    # The rows of a round go before its blobs.
    while blobs(handle, "result"):
        assert deleted.wait(20)
        deleted.clear()
    assert handle.server.store.find(ReplyRecord, round=1) == []
