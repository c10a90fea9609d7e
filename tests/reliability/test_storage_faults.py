"""Disks that are full, read-only, failing or damaged, and processes that die at any change of a file.

Faults 43 to 46 and 12 of faults.md, each against the real server in `federation_world`.
"""

import asyncio
import contextlib
import hashlib
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from blindsum.aggregator.store.records import CloseRecord, ContributionRecord, RoundRecord
from blindsum.aggregator.store.sqlite_state import SqliteState
from blindsum.aggregator.store.state import Insert, StorageFailed
from blindsum.crypto.errors import BlindsumError
from blindsum.proto.v1 import round_pb2
from federation_world import Broken, CallRefused, SameThreadState, World, template

EVERYONE = tuple(f"clinic-{index}" for index in range(5))
ALL = (EVERYONE, 0b11111)
STEPS = ("advertise", "share", "upload", "confirm", "reveal")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path, ready=template(), aborts_before_pause=1000)
    yield made
    made.close()


def state_of(world: World, number: int = 1) -> RoundRecord:
    found = world.server.store.get(RoundRecord, world.owner.federation, number)
    assert found is not None
    return found


def reach(world: World, step: str) -> None:
    """Everyone answers up to a step of the first round, which is then open."""
    world.until(lambda: world.run_of_rounds().step == step)


def finish(world: World) -> None:
    """The first round ends with everybody's update in it."""
    world.settle()
    assert world.accepted[1] == ALL
    assert state_of(world).state == "concluded"


# -- 43: killed anywhere ---------------------------------------------------------------------------------


def changes_of_a_round(folder: Path) -> int:
    """How often a server touches its disk in a round."""
    (folder / "counted").mkdir()
    world = World(folder / "counted", ready=template())
    before = world.files.changes
    world.until(lambda: state_of(world).state == "concluded")
    count = world.files.changes - before
    world.close()
    return count


def die_and_finish(folder: Path, changes: int) -> None:
    """The server dies before one of its changes of files; the same round then ends with everyone in it."""
    world = World(folder, ready=template(), aborts_before_pause=1000)
    try:
        world.dies_in = changes
        for _ in range(20):
            if not world.alive:
                break
            world.everyone_acts()
        assert not world.alive
        world.start()
        finish(world)
    finally:
        world.close()
        shutil.rmtree(folder)


def test_fault_43_killed_before_a_change_of_a_file_the_round_ends_with_everyone(tmp_path: Path) -> None:
    """Every fsync, write, rename and deletion in turn, of a whole round: a choice of them."""
    count = changes_of_a_round(tmp_path)
    for changes in range(0, count, max(1, count // 14)):
        folder = tmp_path / str(changes)
        folder.mkdir()
        die_and_finish(folder, changes)


@pytest.mark.slow
def test_fault_43_killed_before_every_change_of_a_file(tmp_path: Path) -> None:
    for changes in range(changes_of_a_round(tmp_path)):
        folder = tmp_path / str(changes)
        folder.mkdir()
        die_and_finish(folder, changes)


@pytest.mark.parametrize("step", [*STEPS, "published"])
def test_fault_43_killed_at_every_state_of_a_round(world: World, step: str) -> None:
    """Before and after everyone has answered, it comes back to the same state."""
    if step == "published":
        world.until(lambda: state_of(world).state == "published")
    else:
        reach(world, step)
    for member in world.members[:4]:
        world.act(member)
        before = (state_of(world).state, world.run_of_rounds().step, world.run_of_rounds().machine.replied)
        world.kill()
        world.start()
        after = (state_of(world).state, world.run_of_rounds().step, world.run_of_rounds().machine.replied)
        assert after == before
    finish(world)


def test_what_ended_rounds_left_behind_is_deleted_at_the_next_start(world: World) -> None:
    reach(world, "upload")
    for member in world.members[:3]:
        world.act(member)
    # Dies when the abort is durable, before it could clean up.
    blobs = world.home / "data" / "blobs"

    def no_deletions(kind: str, path: Path) -> None:
        if kind == "unlink" and blobs in path.parents:
            raise OSError(5, "dying")

    world.fails = no_deletions
    world.advance(40_000)
    assert state_of(world).state == "aborted"
    assert any((blobs / "contribution").iterdir())
    world.kill()
    world.fails = None
    world.start()
    left = [path for room in ("spool", "contribution", "sum", "result") for path in (blobs / room).iterdir()]
    assert left == []


# -- 44: disks that are full, read-only, failing ---------------------------------------------------------


def full(kind: str, _: Path) -> None:
    if kind in ("write", "create", "mkdir"):
        raise OSError(28, "No space left on device")


def read_only(_kind: str, _path: Path) -> None:
    raise OSError(30, "Read-only file system")


def no_commits(kind: str, path: Path) -> None:
    if kind == "sync" and path.name.endswith("-wal"):
        raise OSError(5, "Input/output error")


def no_blobs(kind: str, path: Path) -> None:
    if "blobs" in path.parts and kind in ("write", "sync"):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("disk", [full, read_only, no_commits, no_blobs])
@pytest.mark.parametrize("step", STEPS)
def test_fault_44_nothing_is_acknowledged_by_a_disk_that_fails_and_nothing_is_lost(
    world: World, disk: Callable[[str, Path], None], step: str
) -> None:
    reach(world, step)
    world.act(world.members[0])
    world.act(world.members[1])
    acknowledged = dict(world.acknowledged)
    world.fails = disk
    for member in world.members[2:]:
        world.act(member)
    if disk is not no_blobs or step == "upload":
        assert world.acknowledged == acknowledged, "an acknowledgement without a commit"
        assert any("UNAVAILABLE" in refusal for refusal in world.refusals)
    world.fails = None
    world.advance(2_000)
    world.check_store()
    finish(world)


def test_fault_44_a_server_on_a_failing_disk_says_that_it_is_not_ready(world: World) -> None:
    reach(world, "share")
    world.fails = full
    world.act(world.members[0])
    assert not world.server.readiness.ready
    assert "check the disk" in " ".join(world.server.readiness.checks.values())
    world.fails = None
    world.act(world.members[0])
    world.run(world.server.readiness.probe())
    assert world.server.readiness.ready


@pytest.mark.parametrize("disk", [full, read_only])
def test_fault_44_a_server_does_not_start_on_such_a_disk_and_says_why(
    world: World, disk: Callable[[str, Path], None]
) -> None:
    world.kill()
    world.fails = disk
    with pytest.raises(BlindsumError, match="check the disk"):
        world.start()
    world.kill()
    world.fails = None
    world.start()
    finish(world)


def test_fault_44_while_the_disk_is_full_the_sum_waits_and_no_round_is_lost(world: World) -> None:
    """Uploads are there, adding them up fails: the round goes on once there is room."""
    reach(world, "upload")
    for member in world.members:
        world.act(member)

    def no_sums(kind: str, path: Path) -> None:
        if kind in ("write", "create") and "sum." in path.name:
            raise OSError(28, "No space left on device")

    world.fails = no_sums
    world.kill()
    world.start()
    for _ in range(4):
        world.everyone_acts()
    assert state_of(world).state == "open"
    assert world.run_of_rounds().step is None, "only the sum is missing"
    world.fails = None
    world.advance(2_000)
    finish(world)


def test_fault_44_bytes_whose_sync_failed_have_to_come_again(world: World) -> None:
    """After a failed fsync the system may call the lost pages clean: a second fsync proves nothing."""
    reach(world, "upload")
    failed = []

    def once(kind: str, path: Path) -> None:
        if kind == "sync" and path.parent.name == "spool" and not failed:
            failed.append(path)
            raise OSError(5, "Input/output error")

    world.fails = once
    world.act(world.members[0])
    assert failed
    assert not any(step == "upload" for _, step, _ in world.acknowledged)
    before = world.sent_bytes
    world.act(world.members[0])
    assert world.sent_bytes - before == len(world.members[0].notes.bulk)
    world.fails = None
    world.power_cut(keep=0.0, seed=1)
    world.start()
    finish(world)


def test_fault_44_a_chunk_that_could_not_be_written_comes_again(world: World) -> None:
    reach(world, "upload")
    left = [2]

    def third_write(kind: str, path: Path) -> None:
        if kind == "write" and path.parent.name == "spool":
            left[0] -= 1
            if left[0] == 0:
                raise OSError(28, "No space left on device")

    for number, member in enumerate(world.members):
        left[0] = 1 + number % 2
        world.fails = third_write
        member.faults = ["", "", "cut"] if number % 2 else []
        world.act(member)
    world.fails = None
    finish(world)


# -- 45: damage ------------------------------------------------------------------------------------------


def tampered(world: World, *statements: str) -> None:
    """The server is down, and its database says something else when it comes back."""
    world.kill()
    world.dead = False
    with contextlib.closing(sqlite3.connect(world.home / "data" / "state.sqlite")) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()
    world.damaged.add(1)


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        (
            "UPDATE contribution SET frames = (SELECT frames FROM contribution WHERE member = 'clinic-1') "
            "WHERE member = 'clinic-0'",
            "aren't those that it signed",
        ),
        (
            "UPDATE contribution SET (digest, frames) = "
            "(SELECT digest, frames FROM contribution WHERE member = 'clinic-1') WHERE member = 'clinic-0'",
            "aren't those that it signed",
        ),
        ("DELETE FROM contribution WHERE member = 'clinic-0'", "aren't those that were accepted"),
        ("UPDATE contribution SET folded = 7 WHERE member = 'clinic-0'", "marked as its members"),
        ("UPDATE sum SET members = ''", "marked as its members"),
        ("UPDATE reply SET body = substr(body, 2) WHERE step = 'upload' AND member = 'clinic-0'", ""),
    ],
)
def test_fault_45_rows_that_were_changed_or_swapped_are_never_summed(
    world: World, statement: str, reason: str
) -> None:
    """Three uploads: two in the sum already, one that waits."""
    reach(world, "upload")
    for member in (world.members[1], world.members[2], world.members[0]):
        world.act(member)
    assert world.run_of_rounds().folder.folded == {"clinic-1", "clinic-2"}
    tampered(world, statement)
    world.acknowledged.clear()
    world.start()
    world.advance(1)
    aborted = state_of(world)
    assert aborted.state == "aborted"
    assert reason in aborted.reason
    assert 1 not in world.accepted
    world.settle()


@pytest.mark.parametrize("room", ["contribution", "sum"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_fault_45_blobs_that_were_changed_are_never_summed(world: World, room: str, damage: str) -> None:
    reach(world, "upload")
    for member in world.members[:3]:
        world.act(member)
    (path,) = (world.home / "data" / "blobs" / room).iterdir()
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flip" else data[:-1])
    world.damaged.add(1)
    for _ in range(6):
        world.everyone_acts()
    aborted = state_of(world)
    assert aborted.state == "aborted"
    assert 1 not in world.accepted
    world.settle()


def test_fault_45_a_damaged_database_is_not_opened(world: World) -> None:
    reach(world, "upload")
    world.kill()
    world.dead = False
    with contextlib.closing(sqlite3.connect(world.home / "data" / "state.sqlite")) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    path = world.home / "data" / "state.sqlite"
    data = bytearray(path.read_bytes())
    data[100:4096] = bytes(3996)
    path.write_bytes(data)
    with pytest.raises(StorageFailed, match="check the disk"):
        world.start()


def test_fault_45_a_spool_that_a_power_cut_damaged_is_sent_again(world: World) -> None:
    reach(world, "upload")
    member = world.members[0]
    member.faults = ["", "", "cut"]
    world.act(member)
    (spool,) = (world.home / "data" / "blobs" / "spool").iterdir()
    assert 0 < spool.stat().st_size < len(member.notes.bulk)
    world.kill()
    spool.write_bytes(bytes(spool.stat().st_size))
    world.start()
    world.act(member)
    finish(world)


# -- 46: calls lost, doubled, late -----------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["drop request", "drop response", "duplicate", "delay", "cut"])
def test_fault_46_at_every_call_of_a_member_the_result_is_the_same(tmp_path: Path, fault: str) -> None:
    """One call and then another is the one that goes wrong; delayed ones arrive in the end."""
    for call in range(1, 12, 2):
        folder = tmp_path / str(call)
        folder.mkdir()
        world = World(folder, ready=template(), aborts_before_pause=1000)
        member = world.members[2]
        member.faults = [""] * call + [fault]
        world.until(lambda world=world: world.run_of_rounds().number > 1 or state_of(world).state != "open")  # type: ignore[misc]
        for late in range(len(world.delayed)):
            world.deliver(late)
        world.settle()
        assert world.accepted[1] == ALL, f"call {call}"
        assert state_of(world).state == "concluded"
        world.close()
        shutil.rmtree(folder)


def test_fault_46_a_call_that_comes_thirty_seconds_late_changes_nothing(world: World) -> None:
    reach(world, "share")
    late = world.members[0]
    late.faults = ["", "delay"]
    world.act(late)
    for member in world.members[1:]:
        world.act(member)
    world.advance(20_000)
    assert world.run_of_rounds().step == "upload"
    world.advance(10_000)
    world.deliver(0)
    world.settle()
    survivors, total = world.accepted[1]
    assert survivors == EVERYONE[1:]
    assert total == 0b11110


# -- 12: at the edges of a step --------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "counted"), [(1, True), (0, False)])
def test_fault_12_an_upload_counts_until_the_millisecond_before_the_deadline(
    world: World, before: int, counted: bool
) -> None:
    reach(world, "upload")
    for member in world.members[:4]:
        world.act(member)
    last = world.members[4]
    # Everything but the acknowledgement is there.
    last.faults = ["", "", "cut"]
    world.act(last)
    world.clock.ms = world.run_of_rounds().deadline_ms - before
    world.act(last)
    world.advance(1)
    world.settle()
    assert world.accepted[1][0] == (EVERYONE if counted else EVERYONE[:4])


# -- what was found --------------------------------------------------------------------------------------


def test_found_a_removal_at_any_moment_of_another_members_upload_loses_nothing(tmp_path: Path) -> None:
    """A rebuild used to delete uploads whose commit was still on its way."""
    for turns in range(0, 44, 4):
        folder = tmp_path / str(turns)
        folder.mkdir()
        world = World(folder, ready=template(), aborts_before_pause=1000, fold_batch=16)
        reach(world, "upload")
        upload = world.spawn(world.members[0].act())
        for _ in range(turns):
            world.loop.call_soon(world.loop.stop)
            world.loop.run_forever()
        world.revoke(4)
        world.idle()
        assert upload.done()
        world.act(world.members[0])
        world.check_store()
        world.settle()
        assert world.accepted[1] == (EVERYONE[:4], 0b1111), f"after {turns} turns of the loop"
        world.close()
        shutil.rmtree(folder)


def test_found_a_plan_published_in_the_moment_before_a_crash_ends_the_round(world: World) -> None:
    reach(world, "upload")
    owner = world.owner
    assert owner.plan is not None
    state = hashlib.sha256(b"another first state").digest()
    owner.publish_first_state(state, b"sealed")
    commit = world.server.store.commit

    def die_after(*changes: object) -> "asyncio.Future[None]":
        done = commit(*changes)  # type: ignore[arg-type]
        done.add_done_callback(lambda _: setattr(world, "dead", True))
        return done

    # The plan is durable, and nothing has followed from it yet.
    world.server.store.commit = die_after  # type: ignore[method-assign]
    plan = msgspec.structs.replace(owner.plan, version=2, initial_state=state)
    owner.publish_plan(plan, first_state=None)
    world.kill()
    world.start()
    world.advance(1)
    assert world.server.engines[owner.federation].documents.plan == plan
    assert state_of(world).state == "aborted"
    assert "another plan" in state_of(world).reason


def test_found_one_wrong_early_state_does_not_keep_the_majoritys_checkpoint_out(world: World) -> None:
    liar = world.members[0]
    liar.next_state = lambda _h1, _data: b"w" * 32  # type: ignore[method-assign]
    world.until(lambda: state_of(world).state == "published")
    world.act(liar)
    world.act(liar)
    world.until(lambda: state_of(world).state != "published")
    assert state_of(world).state == "concluded"
    assert state_of(world).new_state != b"w" * 32


def test_found_a_round_number_beyond_what_can_be_stored_is_refused(world: World) -> None:
    async def ask() -> None:
        request = round_pb2.GetResultRequest(round=(1 << 64) - 1)
        with pytest.raises(CallRefused, match="wrong_round"):
            await world.unary(world.members[0], "GetResult", request)

    world.run(ask())


def test_found_a_record_that_cannot_be_stored_fails_alone(tmp_path: Path) -> None:
    store = SqliteState(tmp_path / "state.sqlite")

    async def commits() -> list[object]:
        return await asyncio.gather(
            store.commit(Insert(CloseRecord(b"f", 1, "a", 1, 1))),
            store.commit(Insert(CloseRecord(b"f", 1 << 70, "b", 1, 1))),
            store.commit(Insert(CloseRecord(b"f", 1, "c", 1, 1))),
            return_exceptions=True,
        )

    first, second, third = asyncio.run(commits())
    assert (first, third) == (None, None)
    assert isinstance(second, StorageFailed)
    assert len(store.find(CloseRecord)) == 2
    store.close()


# -- controls: the checks find what is broken ------------------------------------------------------------


def test_control_an_acknowledgement_before_its_commit_is_found(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def early(self: SameThreadState, *changes: object) -> "asyncio.Future[None]":
        done = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    reach(world, "share")
    monkeypatch.setattr(SameThreadState, "commit", early)
    world.act(world.members[0])
    monkeypatch.undo()
    world.kill()
    with pytest.raises(Broken, match="is gone"):
        world.start()


def test_control_an_upload_that_was_deleted_is_found(world: World) -> None:
    reach(world, "upload")
    world.act(world.members[0])
    row = world.server.store.find(ContributionRecord)[0]
    assert row.folded is None
    (path,) = (world.home / "data" / "blobs" / "contribution").iterdir()
    path.unlink()
    with pytest.raises((Broken, StorageFailed)):
        world.check_store()
