"""A backup taken from a running server in the middle of a round: restored, the server goes on from there."""

import io
import json
import os
import sqlite3
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from blindsum import cli
from blindsum.aggregator.backup import ROUNDS_SKIPPED, back_up, restore
from blindsum.aggregator.embedding import ServerHandle
from blindsum.aggregator.store.records import EventRecord, RoundRecord
from blindsum.aggregator.store.sqlite_reader import SqliteReader
from blindsum.aggregator.store.state import StorageFailed
from blindsum.crypto.errors import BlindsumError
from blindsum.proto.v1 import round_pb2
from scripted_federation import Scene, state_after
from typer.testing import CliRunner

Run = Callable[..., ServerHandle]
Build = Callable[..., Scene]


def run(*arguments: str, answers: str | None = None) -> tuple[int, str]:
    done = CliRunner().invoke(cli.build(arguments[0]), list(arguments), input=answers)
    if isinstance(done.exception, BlindsumError):
        return 1, str(done.exception)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


@pytest.fixture
def midway(run_server: Run, build: Build) -> tuple[ServerHandle, Scene]:
    """A concluded round, and a second one with two of three uploads acknowledged, one of them folded."""
    handle = run_server(fold_batch=1)
    scene = build(handle, rounds=3)
    scene.run_steps(1)
    scene.conclude(1)
    for member in scene.members:
        member.until_asked("advertise", 2)
        member.answer(2, "advertise")
    for member in scene.members[:2]:
        member.until_asked("upload", 2)
        member.upload(2)
    return handle, scene


def come_back(scene: Scene, handle: ServerHandle) -> None:
    scene.reconnect(handle.enrolment_port, handle.member_port, handle.ca_pem)
    for member in scene.members:
        member.watch()


def finish(scene: Scene, number: int, remaining: list[int]) -> None:
    for index in remaining:
        scene.members[index].until_asked("upload", number)
        scene.members[index].upload(number)
    for member in scene.members:
        member.until_asked("confirm", number)
        member.answer(number, "confirm")
    for member in scene.members:
        member.until_state(round_pb2.ROUND_STATE_PUBLISHED, number)
        assert member.sum(number) == {0b111}
    scene.conclude(number)


def test_a_restored_server_goes_on_where_the_backup_was_made(
    midway: tuple[ServerHandle, Scene], run_server: Run, tmp_path: Path
) -> None:
    handle, scene = midway
    target = tmp_path / "backup.tar"
    code, output = run("backup", str(target), "--data", str(tmp_path / "data"), "--json")
    assert code == 0
    assert target.stat().st_mode & 0o777 == 0o600
    # The server wasn't held up: the round goes on, and then the machine is lost.
    finish(scene, 2, [2])
    handle.stop()
    code, restored = run("restore", str(target), "--data", str(tmp_path / "new"), "--json")
    assert code == 0
    assert json.loads(restored)["audit_head"] == json.loads(output)["audit_head"]
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    again = run_server(tmp_path / "new")
    assert again.ca_pem == handle.ca_pem
    come_back(scene, again)
    # Two uploads were acknowledged before the backup: they count, and nobody sends them again.
    finish(scene, 2, [2])
    final = scene.members[0].until(lambda r: r.state_round == 2)
    assert final.state == state_after(2)
    assert scene.members[0].download(round_pb2.BULK_KIND_CHECKPOINT, 2) == b"sealed after 2"
    # Numbers that may have been used after the backup aren't used again.
    assert scene.members[0].until_asked("advertise") == 2 + ROUNDS_SKIPPED + 1
    assert run("audit", "verify", "--data", str(tmp_path / "new"))[0] == 0


def test_backups_of_a_busy_server_are_all_whole(midway: tuple[ServerHandle, Scene], tmp_path: Path) -> None:
    _, scene = midway
    made = []
    for index, step in enumerate(["upload", "confirm", "publish", "conclude"]):
        if step == "upload":
            scene.members[2].until_asked("upload", 2)
            scene.members[2].upload(2)
        elif step == "confirm":
            for member in scene.members:
                member.until_asked("confirm", 2)
                member.answer(2, "confirm")
        elif step == "publish":
            scene.members[0].until_state(round_pb2.ROUND_STATE_PUBLISHED, 2)
        else:
            scene.conclude(2)
        target = tmp_path / f"{index}.tar"
        back_up(tmp_path / "data", target)
        restore(target, tmp_path / f"restored-{index}")
        with SqliteReader(tmp_path / f"restored-{index}" / "state.sqlite") as state:
            made.append((state.find(RoundRecord)[-1].state, len(state.find(EventRecord))))
    assert made[0][0] == "open"
    assert made[-1][0] in ("concluded", "open")
    assert [count for _, count in made] == sorted(count for _, count in made)


def test_nothing_is_overwritten_unasked(midway: tuple[ServerHandle, Scene], tmp_path: Path) -> None:
    handle, _ = midway
    data, target = tmp_path / "data", tmp_path / "backup.tar"
    assert run("backup", str(target), "--data", str(data))[0] == 0
    before = target.read_bytes()
    assert run("backup", str(target), "--data", str(data))[0] == 1
    assert target.read_bytes() == before
    assert run("backup", str(target), "--data", str(data), "--replace")[0] == 0
    code, output = run("restore", str(target), "--data", str(data))
    assert (code, "isn't empty" in output) == (1, True)
    code, output = run("restore", str(target), "--data", str(data), "--replace", "--yes")
    assert (code, "a server runs" in output) == (1, True)
    handle.stop()
    (data / "mark").touch()
    # Nobody there to ask: it stays as it is.
    code, output = run("restore", str(target), "--data", str(data), "--replace", answers="n\n")
    assert (code, "left as it is" in output) == (1, True)
    assert (data / "mark").exists()
    code, output = run("restore", str(target), "--data", str(data), "--replace", "--yes", "--json")
    assert code == 0
    assert not (data / "mark").exists()
    assert (Path(json.loads(output)["replaced"]) / "mark").exists()


def test_a_restore_that_fails_leaves_what_was_there(
    midway: tuple[ServerHandle, Scene], tmp_path: Path
) -> None:
    handle, _ = midway
    data, target = tmp_path / "data", tmp_path / "backup.tar"
    back_up(data, target)
    handle.stop()
    damaged = bytearray(target.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    target.write_bytes(damaged)
    assert run("restore", str(target), "--data", str(data), "--replace", "--yes")[0] == 1
    assert (data / "state.sqlite").exists()
    assert [path.name for path in tmp_path.iterdir() if "data" in path.name] == ["data"]


def test_damage_anywhere_is_refused(midway: tuple[ServerHandle, Scene], tmp_path: Path) -> None:
    target = tmp_path / "backup.tar"
    back_up(tmp_path / "data", target)
    whole = target.read_bytes()
    with tarfile.open(target) as archive:
        entries = [(e.name, e.offset_data, e.size) for e in archive if e.size]
    assert any(name.startswith("blobs/sum/") for name, _, _ in entries)
    flips = [start + size // 2 for _, start, size in entries]
    cuts = [start + size // 2 for _, start, size in entries]
    broken = tmp_path / "broken.tar"
    for place in flips:
        data = bytearray(whole)
        data[place] ^= 1
        broken.write_bytes(data)
        with pytest.raises(BlindsumError):
            restore(broken, tmp_path / "restored")
    for place in [0, 100, *cuts]:
        broken.write_bytes(whole[:place])
        with pytest.raises(BlindsumError):
            restore(broken, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()
    restore(target, tmp_path / "restored")


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "blobs/../../outside"])
def test_an_archive_that_leads_elsewhere_is_refused(
    midway: tuple[ServerHandle, Scene], tmp_path: Path, name: str
) -> None:
    target = tmp_path / "backup.tar"
    back_up(tmp_path / "data", target)
    with tarfile.open(target, "a") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = 4
        archive.addfile(entry, io.BytesIO(b"evil"))
    with pytest.raises(BlindsumError, match="isn't a backup"):
        restore(target, tmp_path / "deep" / "restored")
    assert list(tmp_path.rglob("outside")) == []


def test_what_a_killed_backup_left_is_removed_some_day(
    midway: tuple[ServerHandle, Scene], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    for name, age in (("backup-old", 2 * 86_400), ("backup-running", 60)):
        (data / name / "blobs").mkdir(parents=True)
        os.utime(data / name, (time.time() - age, time.time() - age))
    back_up(data, tmp_path / "backup.tar")
    assert [path.name for path in data.glob("backup-*")] == ["backup-running"]


def test_a_damaged_state_isnt_put_over_a_good_backup(
    midway: tuple[ServerHandle, Scene], tmp_path: Path
) -> None:
    handle, _ = midway
    handle.stop()
    data, target = tmp_path / "data", tmp_path / "backup.tar"
    back_up(data, target)
    good = target.read_bytes()
    with sqlite3.connect(data / "state.sqlite") as tampering:
        tampering.execute("DELETE FROM event WHERE sequence = 3")
    with pytest.raises(StorageFailed, match="isn't sound"):
        back_up(data, target, replace=True)
    assert target.read_bytes() == good
    assert list(data.glob("backup-*")) == []
