"""What can't be undone is asked first, and can be rehearsed; errors say what to do, with exit code 1."""

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blindsum.cli import main
from blindsum.client import join
from blindsum.client.commands import join_app, owner_app, train_app
from blindsum.client.joining import poll, read_invitation
from blindsum.client.owner import replace_document
from blindsum.client.testing import Federation, small_model
from typer import Typer
from typer.testing import CliRunner

Make = Callable[..., Federation]
COMMAND = Path(sys.executable).with_name("blindsum")


@pytest.fixture
def federation(blindsum_federation: Make) -> Federation:
    made = blindsum_federation(3, model=small_model(), rounds=5)
    join(made.owner.invite("clinic"), made.path("clinic"), wait=False)
    made.owner.invite("late")
    np.savez(made.folder / "first.npz", **small_model())
    made.owner.close()
    return made


def run(app: Typer, arguments: list[str], said: str | None = None) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments, input=said, catch_exceptions=False)
    return result.exit_code, result.output


def everything(federation: Federation) -> dict[str, bytes]:
    """The owner's files, and what the aggregator says."""
    folder = federation.folder / "owner"
    files = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with type(federation.owner).look(folder) as owner:
        status = owner.status()
        files["status"] = f"{status.roster_version} {status.policy_version} {status.plan_rounds}".encode()
        files["waiting"] = " ".join(one.member for one in owner.pending()).encode()
    return files


COMMANDS: list[tuple[Typer, list[str], str]] = [
    (owner_app, ["admit", "FOLDER", "clinic"], "Roster version 3 will have 4 members"),
    (owner_app, ["refuse", "FOLDER", "clinic", "--reason", "no"], "clinic"),
    (owner_app, ["remove", "FOLDER", "member-3"], "Roster version 3 will have 2 members"),
    (owner_app, ["rotate", "FOLDER"], "new: the group key"),
    (owner_app, ["withdraw", "FOLDER", "late"], "late"),
    (owner_app, ["invite", "FOLDER", "late"], "replaced"),
    (owner_app, ["policy", "set", "FOLDER", "n_max=64", "gamma=200"], "less than before: gamma"),
    (train_app, ["start", "FOLDER", "--model", "FIRST", "--rounds", "9"], "takes the place of plan 'test'"),
]


@pytest.mark.parametrize("how", ["dry run", "no", "nobody there"])
def test_nothing_changes_without_a_yes(federation: Federation, how: str) -> None:
    before = everything(federation)
    places = {"FOLDER": str(federation.folder / "owner"), "FIRST": str(federation.folder / "first.npz")}
    for app, form, text in COMMANDS:
        arguments = [places.get(one, one) for one in form]
        if how == "dry run":
            code, output = run(app, [*arguments, "--dry-run"])
            assert code == 0, output
            assert "dry run" in output
        else:
            code, output = run(app, arguments, "n\n" if how == "no" else "")
            assert code == 1, output
        assert text in " ".join(output.split()), output
        assert everything(federation) == before, form


def test_with_a_yes_each_of_them_works(federation: Federation) -> None:
    folder, first = str(federation.folder / "owner"), str(federation.folder / "first.npz")
    steps: list[tuple[Typer, list[str], str]] = [
        (owner_app, ["invite", folder, "late", "--yes"], "late.json"),
        (owner_app, ["withdraw", folder, "late", "--yes"], "Withdrawn"),
        (owner_app, ["admit", folder, "--yes"], "Admitted: clinic"),
        (owner_app, ["policy", "set", folder, "n_max=64", "--yes"], "version 2 is in force"),
        (train_app, ["start", folder, "--model", first, "--rounds", "9", "--yes"], "9 rounds of masking"),
        (owner_app, ["remove", folder, "member-3", "--yes"], "Removed: member-3"),
        (owner_app, ["rotate", folder, "--yes"], "epoch 3"),
        (owner_app, ["renew", folder], "Valid until"),
    ]
    for app, arguments, text in steps:
        code, output = run(app, arguments)
        assert (code, text in output) == (0, True), output
    assert poll(federation.path("clinic"))


MISTAKES: list[tuple[list[str], int, str]] = [
    (["remove", "FOLDER", "stranger", "--yes"], 1, "isn't in roster version 2"),
    (["admit", "FOLDER", "late", "--yes"], 1, "hasn't asked yet"),
    (["withdraw", "FOLDER", "clinic-9", "--yes"], 1, "no open invitation"),
    (["policy", "set", "FOLDER", "n_max=2", "--yes"], 1, "n_max"),
    (["policy", "set", "FOLDER", "n_maximum=2", "--yes"], 1, "policy show"),
    (["watch", "FOLDER", "--tokens", "--list", "nothing.txt"], 1, "one of --list and --tokens"),
    (["watch", "FOLDER", "--list", "nothing.txt"], 1, "can't be read as a list"),
    (["status", "nowhere"], 1, "isn't an owner's folder"),
    (["remove", "FOLDER"], 2, "names"),
]


def test_errors_are_one_line_that_says_what_to_do(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(federation.folder / "owner")
    for arguments, code, text in MISTAKES:
        given = [folder if one == "FOLDER" else one for one in arguments]
        monkeypatch.setattr(sys, "argv", ["blindsum", "owner", *given])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr().err
        assert ended.value.code == code, said
        assert text in " ".join(said.split())
        assert "Traceback" not in said


def test_a_person_at_the_terminal_is_asked_while_watching(federation: Federation) -> None:
    """The command with a real terminal: it shows the fingerprint, and does what is typed."""
    here, there = pty.openpty()
    process = subprocess.Popen(
        [COMMAND, "owner", "watch", federation.folder / "owner", "--every", "0.2"],
        stdin=there,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "400"},
    )
    said: list[str] = []
    try:
        assert process.stdout is not None
        os.write(here, b"a\n")
        for line in process.stdout:
            said.append(line)
            if "admitted clinic" in line:
                break
        assert any("Its device shows this fingerprint" in line for line in said), said
        assert poll(federation.path("clinic"))
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(here)
        os.close(there)


def test_the_applicant_is_told_that_nobody_watches(federation: Federation, tmp_path: Path) -> None:
    invitation = federation.folder / "owner" / "invitations" / "late.json"
    arguments: list[Any] = [str(invitation), str(tmp_path / "late"), "--no-wait"]
    code, output = run(join_app, arguments)
    assert code == 0
    assert "the owner's machine isn't watching" in " ".join(output.split())


NASTY = "[/bold] [link=http://x]y\n\x1b[2A\x1b[31m\u202eclinic\x9b1m"


def test_what_an_applicant_writes_cannot_draw_on_the_owners_screen(
    federation: Federation, tmp_path: Path
) -> None:
    """No token is needed to send this: it must neither end the owner's commands nor hide a fingerprint."""
    folder = str(federation.folder / "owner")
    invitation = read_invitation(federation.folder / "owner/invitations/late.json")
    stranger = replace_document(invitation, token=bytes(32))
    mark = join(stranger, tmp_path / "stranger", organisation=NASTY, wait=False)
    for arguments in (
        ["pending", folder],
        ["admit", folder, "--dry-run"],
        ["refuse", folder, "late", "--reason", "x", "--dry-run"],
    ):
        code, output = run(owner_app, arguments)
        assert code == 0, output
        assert "[/bold]" in "".join(output.split())
        assert mark[:8] in output
        assert not any(one in output for one in "\x1b\u202e\x9b")


def test_what_a_watching_owner_is_told_cannot_draw_either(federation: Federation, tmp_path: Path) -> None:
    invitation = federation.folder / "owner/invitations/late.json"
    mark = join(invitation, tmp_path / "late", organisation=NASTY, wait=False)
    process = subprocess.Popen(
        [COMMAND, "owner", "watch", federation.folder / "owner", "--every", "0.2", "--tokens"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "400"},
    )
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if "admitted late" in line:
                break
        text = "".join(said)
        assert "admitted late" in text, text
        assert mark in text
        assert not any(one in text for one in "\x1b\u202e\x9b")
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_an_error_cannot_draw_on_the_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Errors carry texts of the server."""
    monkeypatch.setattr(sys, "argv", ["blindsum", "owner", "status", "no\x1b[2Awhere\u202e"])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert "isn't an owner's folder" in said
    assert not any(one in said for one in "\x1b\u202e")
