"""The audit says who came, what ran and what was refused; any change to it shows."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from blindsum import cli
from blindsum.aggregator.audit import AuditHead, verify
from blindsum.aggregator.embedding import ServerHandle
from blindsum.aggregator.store.records import AuditHeadRecord, EventRecord
from blindsum.aggregator.store.sqlite_reader import SqliteReader
from blindsum.aggregator.store.state import chained
from blindsum.crypto.errors import BlindsumError
from blindsum.crypto.trust.documents import sign_document
from blindsum.crypto.trust.joining import REFUSAL_KIND, Refusal
from scripted_federation import Applicant, Scene
from typer.testing import CliRunner

Run = Callable[..., ServerHandle]
Build = Callable[..., Scene]


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli.build(arguments[0]), list(arguments))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


@pytest.fixture
def data(run_server: Run, build: Build, tmp_path: Path) -> Path:
    """The data of a server with some history, still running."""
    handle = run_server()
    scene = build(handle, rounds=3)
    owner = scene.owner
    unwanted = owner.join(Applicant("stranger"))
    refusal = Refusal(federation=owner.federation, request_id=unwanted, reason="never heard of them")
    owner.publish([sign_document(owner.key, REFUSAL_KIND, refusal).to_bytes()])
    scene.run_steps(1)
    scene.conclude(1)
    scene.run_steps(2)
    for member in scene.members:
        member.refuse_sum(2, "the check failed")
    number = 0
    for member in scene.members:
        number = member.until_asked("advertise", 3)
        member.answer(number, "advertise")
    first = scene.members[0]
    for _ in range(3):
        with pytest.raises(grpc.RpcError):
            first.answer(number, "advertise", b"something else")
    owner.publish_roster(["clinic-1", "clinic-2"])
    scene.members[0].until_refused()
    return tmp_path / "data"


def events(data: Path) -> list[EventRecord]:
    with SqliteReader(data / "state.sqlite") as state:
        return state.find(EventRecord)


def test_it_says_who_came_what_ran_and_what_was_refused(data: Path) -> None:
    told = [(one.kind, json.loads(one.detail)) for one in events(data)]
    kinds = [kind for kind, _ in told]
    for kind in (
        "federation created",
        "join requested",
        "certificate issued",
        "round opened",
        "sum published",
        "round concluded",
        "round aborted",
    ):
        assert kind in kinds, kind
    (admitted,) = [detail for kind, detail in told if kind == "members admitted"]
    assert set(admitted["identities"]) == {"clinic-0", "clinic-1", "clinic-2"}
    assert all(len(key) == 64 for key in admitted["identities"].values())
    (removed,) = [detail for kind, detail in told if kind == "members removed"]
    assert (set(removed["identities"]), removed["roster"]) == ({"clinic-0"}, 2)
    (refused,) = [detail for kind, detail in told if kind == "join refused"]
    assert refused == {"member": "stranger", "reason": "never heard of them"}
    assert [detail["reason"] for kind, detail in told if kind == "sum refused"] == ["the check failed"] * 3
    aborted = next(detail for kind, detail in told if kind == "round aborted")
    assert aborted["round"] == 2
    assert aborted["reason"]
    # Three tries of the same, one event: nobody can fill the disk with refusals.
    (call,) = [detail for kind, detail in told if kind == "call refused"]
    assert (call["member"], call["method"], call["reason"]) == ("clinic-0", "Answer", "conflict")


def test_it_holds_beside_a_running_server(data: Path) -> None:
    code, output = run("audit", "verify", "--data", str(data), "--json")
    report = json.loads(output)
    assert (code, report["holds"], report["events"]) == (0, True, len(events(data)))
    code, output = run("audit", "verify", "--data", str(data), "--head", report["head"])
    assert code == 0
    assert report["head"] in output


def test_it_is_shown(data: Path) -> None:
    code, output = run("audit", "show", "--data", str(data), "--json", "--kind", "round aborted")
    rows = [json.loads(line) for line in output.splitlines()]
    assert code == 0
    assert {row["kind"] for row in rows} == {"round aborted"}
    assert rows[0]["detail"]["round"] == 2
    code, output = run("audit", "show", "--data", str(data), "--since", "3", "--limit", "2")
    assert [line.split()[0] for line in output.splitlines()] == ["3", "4"]
    assert run("audit", "show", "--data", str(data), "--federation", "zz") == (0, "")


TAMPERED = {
    "a detail": ("UPDATE event SET detail = '{}' WHERE sequence = 5", 5),
    "a time": ("UPDATE event SET at_ms = at_ms + 1 WHERE sequence = 5", 5),
    "a kind": ("UPDATE event SET kind = 'round concluded' WHERE sequence = 5", 5),
    "a federation": ("UPDATE event SET federation = zeroblob(32) WHERE sequence = 5", 5),
    "a digest": ("UPDATE event SET digest = zeroblob(32) WHERE sequence = 5", 5),
    "one deleted": ("DELETE FROM event WHERE sequence = 5", 5),
    "the first deleted": ("DELETE FROM event WHERE sequence = 1", 1),
    "the last deleted": ("DELETE FROM event WHERE sequence = (SELECT max(sequence) FROM event)", None),
    "the last three deleted": (
        "DELETE FROM event WHERE sequence > (SELECT max(sequence) - 3 FROM event)",
        None,
    ),
    "all deleted": ("DELETE FROM event", 1),
    "the head deleted": ("DELETE FROM audithead", None),
    "the head turned back": ("UPDATE audithead SET sequence = sequence - 1", None),
    "two exchanged": (
        "UPDATE event SET sequence = -5 WHERE sequence = 5;"
        "UPDATE event SET sequence = 5 WHERE sequence = 6;"
        "UPDATE event SET sequence = 6 WHERE sequence = -5",
        5,
    ),
    "deleted and closed up": (
        "DELETE FROM event WHERE sequence = 5;"
        "UPDATE event SET sequence = -sequence WHERE sequence > 5;"
        "UPDATE event SET sequence = -sequence - 1 WHERE sequence < 0",
        5,
    ),
    "one doubled at the end": (
        "INSERT INTO event SELECT at_ms, federation, kind, detail, (SELECT max(sequence) + 1 FROM event), "
        "previous, digest FROM event WHERE sequence = 5",
        None,
    ),
}


def test_any_change_shows(data: Path, tmp_path: Path) -> None:
    found = {}
    for how, (script, _) in TAMPERED.items():
        copy = tmp_path / how
        copy.mkdir()
        with SqliteReader(data / "state.sqlite") as state:
            state.copy_to(copy / "state.sqlite")
        assert run("audit", "verify", "--data", str(copy))[0] == 0
        with sqlite3.connect(copy / "state.sqlite") as tampering:
            tampering.executescript(script)
        code, output = run("audit", "verify", "--data", str(copy), "--json")
        report = json.loads(output)
        assert (code, report["holds"]) == (1, False), how
        assert report["reason"], how
        found[how] = report["broken_at"]
    assert found == {how: place or found[how] for how, (_, place) in TAMPERED.items()}


def test_a_history_written_anew_shows_against_a_noted_head(data: Path) -> None:
    with SqliteReader(data / "state.sqlite") as state:
        noted = verify(state).head
        kept = [one for one in state.find(EventRecord) if one.kind != "round aborted"]
    previous, forged = b"", []
    for position, one in enumerate(kept, start=1):
        forged.append(chained(one, position, previous))
        previous = forged[-1].digest
    with sqlite3.connect(data / "state.sqlite") as tampering:
        tampering.execute("DELETE FROM event")
        for one in forged:
            tampering.execute(
                "INSERT INTO event VALUES (?, ?, ?, ?, ?, ?, ?)",
                (one.at_ms, one.federation, one.kind, one.detail, one.sequence, one.previous, one.digest),
            )
        tampering.execute("UPDATE audithead SET sequence = ?, digest = ?", (len(forged), previous))
    with SqliteReader(data / "state.sqlite") as state:
        assert state.get(AuditHeadRecord, "audit") is not None
        assert verify(state).holds
        report = verify(state, noted)
    assert not report.holds
    assert run("audit", "verify", "--data", str(data), "--head", str(noted))[0] == 1
    earlier = AuditHead(forged[1].sequence, forged[1].digest)
    assert run("audit", "verify", "--data", str(data), "--head", str(earlier))[0] == 0


@pytest.mark.parametrize("text", ["", "5", "x:00", "5:00", f"-1:{'00' * 32}", f"5:{'0g' * 32}"])
def test_a_head_that_isnt_one_is_refused(text: str) -> None:
    with pytest.raises(BlindsumError, match="SEQUENCE:DIGEST"):
        AuditHead.parse(text)
