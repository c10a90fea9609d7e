"""What the commands say of paillier before it starts: how long it takes, and when to take something else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blindsum.client import commands
from blindsum.client.testing import Federation
from typer import Typer
from typer.testing import CliRunner, Result

Make = Callable[..., Federation]

pytestmark = pytest.mark.paillier


def invoke(app: Typer, *arguments: object, **options: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def start(folder: Path, model: Path, *more: str, **options: Any) -> Result:
    return invoke(
        commands.train_app, "start", folder, "--model", model, "--scheme", "paillier", *more, **options
    )


def test_a_model_that_is_too_large_is_asked_about(blindsum_federation: Make, tmp_path: Path) -> None:
    federation = blindsum_federation(3, scheme="paillier")
    owner, folder = federation.owner, federation.folder / "owner"
    owner.close()
    np.savez(tmp_path / "large.npz", weight=np.zeros(2_000_000, np.float32))
    refused = start(folder, tmp_path / "large.npz", "--rounds", "10", input="n\n")
    assert refused.exit_code == 1
    assert "too large for paillier: take masking or bfv" in " ".join(refused.output.split())
    assert "a member about" in refused.output
    status = invoke(commands.owner_app, "status", folder, "--json")
    assert '"plan": ""' in status.output

    np.savez(tmp_path / "small.npz", weight=np.zeros(300, np.float32))
    started = start(folder, tmp_path / "small.npz")
    assert started.exit_code == 0, started.output
    assert "a member about" in started.output
    assert "too large" not in started.output


def test_short_keys_come_with_a_warning(blindsum_federation: Make, tmp_path: Path) -> None:
    served = blindsum_federation(0)
    ca = tmp_path / "ca.pem"
    ca.write_bytes(served.server.ca_pem)
    place = served.owner.place
    where = ("--enrolment", place.enrolment_address, "--members", place.member_address, "--ca", ca)
    weak = invoke(
        commands.owner_app, "init", tmp_path / "weak", "--name", "w", *where, "--paillier-bits", 2048
    )
    assert "about 112 bits of security" in " ".join(weak.output.split())
    usual = invoke(commands.owner_app, "init", tmp_path / "usual", "--name", "u", *where)
    assert usual.exit_code == weak.exit_code == 0
    assert "Warning" not in usual.output
    none = invoke(commands.owner_app, "init", tmp_path / "no", "--name", "n", *where, "--paillier-bits", 1024)
    assert none.exit_code != 0
