"""The command line of owner and members, against the real server."""

import json
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blindsum.client import commands
from blindsum.client.member import Round
from blindsum.client.testing import Federation, small_model
from blindsum.crypto.errors import DocumentError
from typer import Typer
from typer.testing import CliRunner, Result

Make = Callable[..., Federation]


def run(app: Typer, *arguments: object) -> str:
    result: Result = CliRunner().invoke(
        app, [str(argument) for argument in arguments], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result.output


def one_step(rnd: Round) -> tuple[dict[str, Any], int, dict[str, float]]:
    """What a member's own training function looks like."""
    return {name: value + np.float32(0.01) for name, value in rnd.weights().items()}, 3, {"loss": 0.5}


def test_a_federation_from_the_command_line(blindsum_federation: Make, tmp_path: Path) -> None:
    served = blindsum_federation(0)
    ca = tmp_path / "ca.pem"
    ca.write_bytes(served.server.ca_pem)
    owner, names = tmp_path / "owner", ["clinic-1", "clinic-2", "clinic-3"]
    said = run(
        commands.owner_app, "init", owner, "--name", "clinics", "--ca", ca,
        "--enrolment", served.owner.place.enrolment_address, "--members", served.owner.place.member_address,
    )  # fmt: skip
    assert "Registered" in said
    secret = (owner / "owner.key").read_bytes().hex()
    assert secret not in said
    run(commands.owner_app, "invite", owner, *names)
    for name in names:
        invitation = owner / "invitations" / f"{name}.json"
        said = run(commands.join_app, invitation, tmp_path / name, "--no-wait", "--organisation", name)
        assert "fingerprint" in said
    waiting = json.loads(run(commands.owner_app, "pending", owner, "--json"))
    assert [one["member"] for one in waiting] == names
    assert "Admitted: clinic-1, clinic-2, clinic-3" in run(commands.owner_app, "admit", owner, "--yes")

    np.savez(tmp_path / "first.npz", **small_model())
    said = run(
        commands.train_app, "start", owner, "--model", tmp_path / "first.npz", "--rounds", 2,
        "--name", "lungs", "--metric", "loss=0:1",
    )  # fmt: skip
    assert "2 rounds of masking" in said
    # Called without the runner: that replaces the standard output of the whole process.
    app = f"{__name__}:one_step"
    threads = [
        threading.Thread(target=commands.member_run, args=(tmp_path / name, app, True), daemon=True)
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()

    status = json.loads(run(commands.train_app, "status", owner, "--json"))
    assert (status["state_round"], status["plan_rounds"], status["plan"]) == (2, 2, "lungs")
    mine = json.loads(run(commands.member_app, "status", tmp_path / "clinic-1", "--json"))
    assert mine["rounds_seen_through"] == 2
    assert mine["last_metrics"]["loss"] == pytest.approx(0.5, abs=0.01)

    receipts = json.loads(run(commands.receipt_app, "show", tmp_path / "clinic-1", "--json"))
    assert [receipt["round"] for receipt in receipts] == [1, 2]
    assert "collude" in run(commands.receipt_app, "show", tmp_path / "clinic-1")
    exported = tmp_path / "exported.json"
    run(commands.receipt_app, "export", tmp_path / "clinic-2", "--out", exported)
    said = run(commands.receipt_app, "verify", tmp_path / "clinic-1", exported)
    assert "same history" in said.replace("\n", " ")

    model = tmp_path / "model.npz"
    run(commands.owner_app, "model", owner, "--out", model)
    assert stat.S_IMODE(model.stat().st_mode) == 0o600
    with np.load(model) as stored:
        np.testing.assert_allclose(stored["weight"], small_model()["weight"] + 0.02, atol=1e-3)


def test_forged_receipts_are_found(blindsum_federation: Make, tmp_path: Path) -> None:
    federation = blindsum_federation(3, model=small_model())
    federation.train(lambda name, index: {"weight": 0, "bias": 0})
    exported = tmp_path / "exported.json"
    run(commands.receipt_app, "export", federation.path("member-2"), "--out", exported)
    (body,) = json.loads(exported.read_text())
    forged = bytearray.fromhex(body)
    forged[-1] ^= 1
    exported.write_text(json.dumps([bytes(forged).hex()]))
    result = CliRunner().invoke(
        commands.receipt_app, ["verify", str(federation.path("member-1")), str(exported)]
    )
    assert result.exit_code != 0
    assert "signature" in str(result.exception)


def test_policy_commands(blindsum_federation: Make) -> None:
    federation = blindsum_federation(3)
    federation.owner.close()
    folder = federation.folder / "owner"
    assert json.loads(run(commands.policy_app, "show", folder, "--json"))["n_min"] == 3
    assert "honest" in run(commands.policy_app, "show", folder)
    assert "version 2" in run(commands.policy_app, "set", folder, "n_min=4", "schemes=masking,bfv", "--yes")
    shown = json.loads(run(commands.policy_app, "show", folder, "--json"))
    assert (shown["n_min"], shown["schemes"]) == (4, ["masking", "bfv"])
    with pytest.raises(DocumentError, match="NAME=VALUE"):
        run(commands.policy_app, "set", folder, "federation=x", "--yes")
    with pytest.raises(Exception, match="n_min"):
        run(commands.policy_app, "set", folder, "n_min=1", "--yes")


def test_removal_asks_first(blindsum_federation: Make) -> None:
    federation = blindsum_federation(3)
    federation.owner.close()
    folder = federation.folder / "owner"
    result = CliRunner().invoke(commands.owner_app, ["remove", str(folder), "member-3"], input="n\n")
    assert result.exit_code == 1
    run(commands.owner_app, "remove", folder, "member-3", "--yes")
    status = json.loads(run(commands.owner_app, "status", folder, "--json"))
    assert [member["id"] for member in status["members"]] == ["member-1", "member-2"]


@pytest.mark.parametrize("app", ["owner_app", "join_app", "member_app", "train_app", "receipt_app"])
def test_help_teaches(app: str) -> None:
    said = run(getattr(commands, app), "--help")
    assert len(said.splitlines()) > 8
