"""What the owner sees on its own machine: training metrics opened from sealed states, live."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blindsum.client import Member, Owner
from blindsum.client.commands import train_app
from blindsum.client.testing import Federation, small_model
from typer.testing import CliRunner

Make = Callable[..., Federation]
METRICS = {"loss": (0.0, 4.0, 2.0**-16), "accuracy": (0.0, 1.0, 2.0**-16)}
LOSSES = {"member-1": 0.5, "member-2": 1.0, "member-3": 3.0}


def train(federation: Federation, rounds: int) -> None:
    """So many rounds; the mean loss falls by 0.25 in each, the accuracy rises by 0.125."""

    def app(member: Member) -> None:
        for rnd in member.rounds():
            loss = LOSSES[member.name] - 0.25 * (rnd.index - 1)
            metrics = {"loss": loss, "accuracy": 0.125 * rnd.index}
            rnd.submit(rnd.weights(), examples=7, metrics=metrics)
            if rnd.index == rounds:
                return

    federation.run(app)


@pytest.mark.parametrize("scheme", ["masking", pytest.param("ckks", marks=pytest.mark.he)])
def test_the_owner_opens_the_metrics_of_every_round(blindsum_federation: Make, scheme: str) -> None:
    federation = blindsum_federation(3, scheme=scheme, model=small_model(), rounds=3, metrics=METRICS)
    assert federation.owner.history() == []
    train(federation, 3)
    history = federation.owner.history()
    assert [(one.round, one.survivors) for one in history] == [(1, 3), (2, 3), (3, 3)]
    assert [one.means["loss"] for one in history] == pytest.approx([1.5, 1.25, 1.0], abs=1e-4)
    assert [one.means["accuracy"] for one in history] == pytest.approx([0.125, 0.25, 0.375], abs=1e-4)


def test_metrics_outlast_a_change_of_keys(blindsum_federation: Make) -> None:
    federation = blindsum_federation(3, model=small_model(), rounds=3, metrics=METRICS)
    train(federation, 2)
    federation.owner.rotate(at_once=True)
    assert [one.means["loss"] for one in federation.owner.history()] == pytest.approx([1.5, 1.25], abs=1e-4)


def test_the_command_shows_them_while_another_has_the_folder_open(blindsum_federation: Make) -> None:
    federation = blindsum_federation(3, model=small_model(), rounds=2, metrics=METRICS)
    train(federation, 2)
    folder = str(federation.folder / "owner")

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(train_app, ["status", folder, *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    said = json.loads(run("--json"))
    assert [one["means"]["loss"] for one in said["metrics"]] == pytest.approx([1.5, 1.25], abs=1e-4)
    assert "1.25" in run()
    assert json.loads(run("--json", "--no-metrics"))["metrics"] == []


def test_watching_follows_training_round_by_round(blindsum_federation: Make) -> None:
    """`train status --watch --json` as a process of its own, while members train."""
    federation = blindsum_federation(3, model=small_model(), rounds=3, metrics=METRICS)
    folder = federation.folder / "owner"
    command = [Path(sys.executable).with_name("blindsum"), "train", "status", folder]
    process = subprocess.Popen(
        [*command, "--watch", "--json", "--every", "0.1"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "NO_COLOR": "1"},
    )
    try:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        assert first["metrics"] == []
        assert first["waits_for"] == "0 of at least 3 members are ready"
        train(federation, 3)
        for line in process.stdout:
            said: dict[str, Any] = json.loads(line)
            if said["state_round"] == 3:
                break
        assert [one["means"]["loss"] for one in said["metrics"]] == pytest.approx([1.5, 1.25, 1.0], abs=1e-4)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_looking_changes_nothing(blindsum_federation: Make) -> None:
    federation = blindsum_federation(3)
    folder = federation.folder / "owner"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with Owner.look(folder) as owner:
        assert owner.status().roster_version == owner.roster.version
        signing = ("invite", "withdraw", "admit", "refuse", "remove", "rotate", "set_policy", "start_plan")
        assert [name for name in signing if hasattr(owner, name)] == []
        assert all(hasattr(Owner, name) for name in signing)
        assert (owner.history(), owner.pending(), owner.invited()) == ([], [], [])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_sealed_state_says_nothing_of_the_metrics(blindsum_federation: Make) -> None:
    """Two federations that differ in their metrics alone: what the server keeps has equal lengths."""
    sizes = []
    for loss in (0.5, 1.2345):
        federation = blindsum_federation(3, model=small_model(), metrics=METRICS)
        federation.train(
            lambda name, index: dict.fromkeys(small_model(), np.float32(0)),
            metrics={"loss": loss, "accuracy": 0.1},
        )
        info, sealed = federation.owner._owner_checkpoint()
        sizes.append((info.state_round, sum(map(len, sealed))))
    assert sizes[0] == sizes[1]
