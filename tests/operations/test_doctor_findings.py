"""The doctor finds what is wrong, says what to do, and ends with the code that says how bad it is."""

import json
import os
import socket
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blindsum import cli
from blindsum.aggregator import doctor
from blindsum.aggregator.doctor import Finding, Findings, examine
from blindsum.aggregator.embedding import ServerHandle
from blindsum.aggregator.settings import AggregatorSettings
from scripted_federation import Scene, settings_for
from typer.testing import CliRunner

Run = Callable[..., ServerHandle]
Build = Callable[..., Scene]
DAY = 86_400
DISK_KIND = doctor._disk_kind


@pytest.fixture(autouse=True)
def _healthy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine's own clock service, limits and disk are like."""
    for name in list(os.environ):
        if name.upper().startswith("BLINDSUM_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(doctor, "_CLOCK_UNSYNCHRONISED", 99)
    monkeypatch.setattr(doctor, "_SLOW_FSYNC", 60.0)
    monkeypatch.setattr(doctor, "_disk_kind", lambda _: "ext4")


@pytest.fixture
def running(run_server: Run, build: Build) -> tuple[ServerHandle, Scene, AggregatorSettings]:
    """A healthy server, and the settings with which its operator would call the doctor."""
    handle = run_server(max_calls=64)
    scene = build(handle)
    scene.run_steps(1)
    scene.conclude(1)
    settings = settings_for(
        handle.server.settings.data_dir,
        max_calls=64,
        enrolment_port=handle.enrolment_port,
        member_port=handle.member_port,
        admin_port=handle.server.admin_port,
    )
    return handle, scene, settings


def trouble(findings: Findings) -> list[Finding]:
    return [one for one in findings.found if one.verdict != "ok"]


def only(findings: Findings, check: str, verdict: str) -> Finding:
    (found,) = trouble(findings)
    assert (found.check, found.verdict) == (check, verdict), found
    assert found.advice
    return found


def test_a_healthy_server_needs_nothing(running: tuple[ServerHandle, Scene, AggregatorSettings]) -> None:
    _, scene, settings = running
    findings = examine(settings)
    # The scripted owner signs for a day.
    assert {one.text.split(" expires")[0] for one in trouble(findings)} == {"the roster", "the policy"}
    assert findings.exit_code == 3
    checks = {one.check for one in findings.found}
    federation = f"federation {scene.owner.federation.hex()[:16]}"
    assert checks == {
        "settings", "versions", "clock", "limits", "directory", "ports", "certificates", "state", "audit",
        "disk", federation,
    }  # fmt: skip


def sign_for_longer(scene: Scene) -> None:
    """Roster and policy good for a year."""
    owner = scene.owner
    until = int(time.time()) + 365 * DAY
    owner.publish_policy(owner.policy(version=2, valid_until=until))
    document, envelopes = owner.make_roster(sorted(owner.applicants), valid_until=until)
    owner.publish([document], envelopes)
    owner.publish_plan(owner.make_plan(version=2, policy=owner.policy_digest), first_state=None)


Breaks = Callable[[ServerHandle, Scene, Path], dict[str, Any] | None]


def _readable_directory(handle: ServerHandle, _scene: Scene, data: Path) -> None:
    data.chmod(0o750)


def _readable_key(handle: ServerHandle, _scene: Scene, data: Path) -> None:
    (data / "authority" / "transport_ca.key").chmod(0o644)


def _readable_token(handle: ServerHandle, _scene: Scene, data: Path) -> None:
    (data / "admin.token").chmod(0o644)


def _other_ports(handle: ServerHandle, _scene: Scene, _data: Path) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"member_port": free.getsockname()[1]}


def _other_names(_handle: ServerHandle, _scene: Scene, _data: Path) -> dict[str, Any]:
    return {"server_names": ("aggregator.example.org",)}


def _full_disk(_handle: ServerHandle, _scene: Scene, _data: Path) -> dict[str, Any]:
    return {"disk_reserve": 1 << 60}


def _audit(handle: ServerHandle, _scene: Scene, data: Path) -> None:
    with sqlite3.connect(data / "state.sqlite") as tampering:
        tampering.execute("UPDATE event SET detail = '{}' WHERE sequence = 2")


def _clock_went_back(_handle: ServerHandle, _scene: Scene, _data: Path) -> dict[str, Any]:
    return {"_now": time.time() - 3600}


def _no_admin_port(_handle: ServerHandle, _scene: Scene, _data: Path) -> dict[str, Any]:
    return {"admin_port": None}


def _many_calls(_handle: ServerHandle, _scene: Scene, _data: Path) -> dict[str, Any]:
    return {"max_calls": 10_000_000}


def _authority_of_another(handle: ServerHandle, _scene: Scene, data: Path) -> None:
    from blindsum.aggregator.transport_authority import TransportAuthority  # noqa: PLC0415

    TransportAuthority(data.parent / "another")
    certificate = (data.parent / "another" / "transport_ca.pem").read_bytes()
    (data / "authority" / "transport_ca.pem").write_bytes(certificate)


BROKEN: dict[str, tuple[Breaks, str, str, str]] = {
    "others may read the directory": (_readable_directory, "directory", "failure", "chmod 700"),
    "others may read the authority's key": (_readable_key, "directory", "failure", "chmod 600"),
    "others may read the admin token": (_readable_token, "directory", "failure", "chmod 600"),
    "other settings than the server's": (_other_ports, "ports", "failure", "same file"),
    "other names than the certificate's": (_other_names, "certificates", "warning", "restart"),
    "no room": (_full_disk, "disk", "failure", "free some"),
    "a forged audit": (_audit, "audit", "failure", "noted heads"),
    "a clock that went back": (_clock_went_back, "clock", "failure", "set the clock"),
    "no admin port": (_no_admin_port, "ports", "warning", "admin_port = 8472"),
    "too few files": (_many_calls, "limits", "warning", "ulimit -n"),
    "another authority's certificate": (_authority_of_another, "certificates", "failure", "restore"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_each_trouble_is_found_alone(
    running: tuple[ServerHandle, Scene, AggregatorSettings], what: str
) -> None:
    handle, scene, settings = running
    sign_for_longer(scene)
    assert trouble(examine(settings)) == []
    assert examine(settings).exit_code == 0
    breaks, check, verdict, advice = BROKEN[what]
    changes = dict(breaks(handle, scene, settings.data_dir) or {})
    now = changes.pop("_now", None)
    changed = settings.model_copy(update=changes)
    findings = examine(changed) if now is None else examine(changed, now=lambda: now)
    assert advice in only(findings, check, verdict).advice
    assert findings.exit_code == (1 if verdict == "failure" else 3)


def test_documents_and_certificates_expire(running: tuple[ServerHandle, Scene, AggregatorSettings]) -> None:
    _, scene, settings = running
    sign_for_longer(scene)
    later = time.time() + 355 * DAY
    found = {one.text for one in trouble(examine(settings, now=lambda: later))}
    assert any("roster expires" in text for text in found)
    assert any("policy expires" in text for text in found)
    assert any("certificates of clinic-0, clinic-1, clinic-2 expired" in text for text in found)
    assert any("server certificate has expired" in text for text in found)
    much_later = time.time() + 4000 * DAY
    findings = examine(settings, now=lambda: much_later)
    assert any("transport authority has expired" in one.text for one in trouble(findings))
    assert any("roster has expired" in one.text for one in trouble(findings))


def test_a_stopped_server_is_examined_too(
    running: tuple[ServerHandle, Scene, AggregatorSettings],
) -> None:
    handle, scene, settings = running
    sign_for_longer(scene)
    handle.stop()
    assert trouble(examine(settings)) == []
    assert "is free" in next(one.text for one in examine(settings).found if one.check == "ports")
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", settings.member_port))
        other.listen()
        assert "another program" in only(examine(settings), "ports", "failure").text
    checkpoints = settings.data_dir / "blobs" / "checkpoint"
    (newest,) = [path for path in checkpoints.iterdir() if path.read_bytes() == b"sealed after 1"]
    newest.unlink()
    assert "blobs are gone" in only(examine(settings), "state", "failure").text
    (settings.data_dir / "state.sqlite").write_bytes(b"not a database" * 1000)
    assert examine(settings).exit_code == 1


@pytest.mark.parametrize(("kind", "verdict"), [("nfs4", "failure"), ("tmpfs", "warning")])
def test_the_kind_of_disk_matters(
    running: tuple[ServerHandle, Scene, AggregatorSettings],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    verdict: str,
) -> None:
    _, scene, settings = running
    sign_for_longer(scene)
    monkeypatch.setattr(doctor, "_disk_kind", lambda _: kind)
    assert kind in only(examine(settings), "directory", verdict).text


def test_the_kind_of_disk_is_read_from_the_system() -> None:
    assert DISK_KIND(Path("/proc/self")) == "proc"


def test_a_federation_that_cant_train_is_explained(
    running: tuple[ServerHandle, Scene, AggregatorSettings],
) -> None:
    _, scene, settings = running
    sign_for_longer(scene)
    document, envelopes = scene.owner.make_roster(
        ["clinic-1", "clinic-2"], valid_until=int(time.time()) + 365 * DAY
    )
    scene.owner.publish([document], envelopes)
    found = only(examine(settings), f"federation {scene.owner.federation.hex()[:16]}", "warning")
    assert "2 members, but the policy asks for 3" in found.text


def test_the_command_says_it_to_people_and_programs(
    running: tuple[ServerHandle, Scene, AggregatorSettings], tmp_path: Path
) -> None:
    _, _, settings = running
    config = tmp_path / "aggregator.toml"
    config.write_text(
        f'data_dir = "{settings.data_dir}"\nallow_any_owner = true\ndisk_reserve = 0\nmax_calls = 64\n'
        f"enrolment_port = {settings.enrolment_port}\nmember_port = {settings.member_port}\n"
        f"admin_port = {settings.admin_port}\n"
    )
    runner = CliRunner()
    done = runner.invoke(cli.build("doctor"), ["doctor", "-c", str(config), "--json"])
    assert done.exit_code == 3
    assert {row["verdict"] for row in json.loads(done.output)} == {"ok", "warning"}
    done = runner.invoke(cli.build("doctor"), ["doctor", "-c", str(config)])
    assert "-> ask the owner to sign the roster anew" in done.output
    config.write_text("uploadslots = 3\n")
    done = runner.invoke(cli.build("doctor"), ["doctor", "-c", str(config)])
    assert done.exit_code == 1
    assert "unknown settings: uploadslots" in done.output
