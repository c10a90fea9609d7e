"""The state in SQLite and the blobs in files: group commits, all or none, restarts, failures."""

import asyncio
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from blindsum.aggregator.store.file_blobs import FileBlobs
from blindsum.aggregator.store.records import (
    CloseRecord,
    ContributionRecord,
    EventRecord,
    ReplyRecord,
    RoundRecord,
)
from blindsum.aggregator.store.sqlite_state import SqliteState
from blindsum.aggregator.store.state import (
    Advance,
    Append,
    Delete,
    Insert,
    Put,
    StorageFailed,
    Taken,
    broken_link,
)

FEDERATION = b"f" * 32


def reply(member: str, body: bytes = b"body", sequence: int = 1) -> ReplyRecord:
    return ReplyRecord(FEDERATION, 1, "upload", member, sequence, body)


def a_round(version: int, state: str = "open") -> RoundRecord:
    return RoundRecord(FEDERATION, 1, version, b"c", b"h", state, "", 5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteState]:
    store = SqliteState(path)
    yield store
    store.close()


def commit(store: SqliteState, *changes: object) -> None:
    async def run() -> None:
        await store.commit(*changes)  # type: ignore[arg-type]

    asyncio.run(run())


def test_what_was_acknowledged_is_there_after_a_restart(path: Path) -> None:
    store = SqliteState(path)
    contribution = ContributionRecord(FEDERATION, 1, "a", b"d" * 32, b"f" * 64)
    commit(store, Insert(reply("a")), Insert(contribution))
    store.close()
    store = SqliteState(path)
    assert store.find(ReplyRecord, federation=FEDERATION, round=1) == [reply("a")]
    assert store.get(ContributionRecord, FEDERATION, 1, "a") == contribution
    assert store.get(ContributionRecord, FEDERATION, 1, "b") is None
    store.close()


def test_many_acknowledgements_share_a_commit(store: SqliteState) -> None:
    async def run() -> None:
        await asyncio.gather(*(store.commit(Insert(reply(f"m{i}"))) for i in range(400)))

    before = store.groups
    asyncio.run(run())
    assert len(store.find(ReplyRecord)) == 400
    assert store.groups - before <= 20


def test_one_that_fails_takes_no_other_along(store: SqliteState) -> None:
    commit(store, Insert(reply("taken")))

    async def run() -> list[object]:
        return await asyncio.gather(
            store.commit(Insert(reply("x"))),
            store.commit(Insert(reply("y")), Insert(reply("taken", b"other"))),
            store.commit(Insert(reply("z"))),
            return_exceptions=True,
        )

    first, second, third = asyncio.run(run())
    assert (first, third) == (None, None)
    assert isinstance(second, Taken)
    assert [row.member for row in store.find(ReplyRecord)] == ["taken", "x", "z"]
    assert store.get(ReplyRecord, FEDERATION, 1, "upload", "taken") == reply("taken")


def test_in_full_groups_of_two_kinds_only_those_fail_that_came_second(store: SqliteState) -> None:
    def both(member: str, sequence: int) -> tuple[Insert, Insert]:
        contribution = ContributionRecord(FEDERATION, 1, member, bytes([sequence % 256]) * 32, b"f" * 64)
        return Insert(reply(member, sequence=sequence)), Insert(contribution)

    async def run() -> list[object]:
        # Every member twice, and one whose number can't be stored.
        jobs = [both(f"m{i % 150}", i) for i in range(300)]
        jobs.insert(70, both("huge", 1 << 63))
        return await asyncio.gather(*(store.commit(*job) for job in jobs), return_exceptions=True)

    outcomes = asyncio.run(run())
    assert isinstance(outcomes.pop(70), StorageFailed)
    assert outcomes[:150] == [None] * 150
    assert all(isinstance(outcome, Taken) for outcome in outcomes[150:])
    assert sorted(row.sequence for row in store.find(ReplyRecord)) == list(range(150))
    assert sorted(row.member for row in store.find(ContributionRecord)) == sorted(f"m{i}" for i in range(150))


def test_compare_and_set_moves_a_version_once(store: SqliteState) -> None:
    commit(store, Insert(a_round(1)))
    commit(store, Advance(a_round(2, "published")))
    for stale in (a_round(2, "aborted"), a_round(4)):
        with pytest.raises(Taken):
            commit(store, Advance(stale))
    assert store.get(RoundRecord, FEDERATION, 1) == a_round(2, "published")


def test_commits_apply_in_the_order_they_came(store: SqliteState) -> None:
    async def run() -> None:
        futures = [store.commit(Put(CloseRecord(FEDERATION, 1, "s", i, i))) for i in range(50)]
        futures.append(store.commit(Delete(CloseRecord, (("federation", FEDERATION), ("round", 1)))))
        futures.append(store.commit(Put(CloseRecord(FEDERATION, 1, "s", 99, 99))))
        await asyncio.gather(*futures)

    asyncio.run(run())
    assert [row.sequence for row in store.find(CloseRecord)] == [99]


def test_the_audit_is_chained_and_shows_tampering(store: SqliteState, path: Path) -> None:
    for i in range(5):
        commit(store, Append(EventRecord(i, FEDERATION, "round opened", f'{{"round": {i}}}')))
    assert broken_link(store) is None
    with sqlite3.connect(path) as other:
        other.execute("UPDATE event SET detail = '{}' WHERE sequence = 3")
    assert broken_link(store) == 3
    with sqlite3.connect(path) as other:
        other.execute("DELETE FROM event WHERE sequence = 3")
    assert broken_link(store) == 3


def test_a_locked_state_fails_after_a_while_and_works_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blindsum.aggregator.store.sqlite_state._BUSY_MS", 50)
    store = SqliteState(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageFailed, match="locked"):
        commit(store, Insert(reply("a")))
    other.execute("ROLLBACK")
    other.close()
    commit(store, Insert(reply("a")))
    assert store.find(ReplyRecord) == [reply("a")]
    store.close()


def test_a_full_disk_fails_the_commit_and_keeps_what_was_there(store: SqliteState) -> None:
    commit(store, Insert(reply("a")))
    store._writer.execute("PRAGMA max_page_count = 1")
    with pytest.raises(StorageFailed, match="full"):
        commit(store, Insert(reply("b", bytes(1 << 22))))
    store._writer.execute("PRAGMA max_page_count = 1000000")
    commit(store, Insert(reply("c")))
    assert [row.member for row in store.find(ReplyRecord)] == ["a", "c"]


def test_another_schema_isnt_touched(path: Path) -> None:
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version = 99")
    with pytest.raises(StorageFailed, match="schema 99"):
        SqliteState(path)


def test_a_spool_goes_on_where_it_ended(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path)
    spool = blobs.spool("spool/one")
    spool.append(b"first ")
    spool.close()
    spool = FileBlobs(tmp_path).spool("spool/one")
    assert (spool.size, spool.read(0, 6)) == (6, b"first ")
    spool.append(memoryview(b"second"))
    blobs.keep(spool, "spool/one", "contribution/one")
    assert blobs.size("spool/one") is None
    with blobs.open("contribution/one") as reader:
        assert (reader.size, reader.read(3, 9)) == (12, b"st second")
        with pytest.raises(StorageFailed):
            reader.read(10, 3)
    assert blobs.names("contribution") == ["contribution/one"]


def test_nothing_half_written_gets_a_name(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path)

    def parts() -> Iterator[bytes]:
        yield b"half"
        raise StorageFailed("no more")

    with pytest.raises(StorageFailed):
        blobs.write("sum/one", parts())
    assert blobs.names("sum") == []
    assert blobs.names("spool") == []


@pytest.mark.parametrize("name", ["sum/../../etc", "elsewhere/x", "sum/", "sum", "sum/.hidden", "sum/a/b"])
def test_names_stay_in_their_rooms(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="isn't a blob name"):
        FileBlobs(tmp_path).delete(name)
