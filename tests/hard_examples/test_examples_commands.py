"""`blindsum examples` from switching on to taking back, on the real server."""

import json
from pathlib import Path
from typing import Any

import pytest
from blindsum.client.hard_examples import ForwardingOff
from blindsum.client.testing import Federation
from typer.testing import CliRunner

pytest.importorskip("pydicom", reason="dicom isn't installed (nor torch)")
from blindsum.client.hard_examples.commands import app
from pydicom.data import get_testdata_file


def command(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_day_at_the_clinic(tmp_path: Path) -> None:
    with Federation(["hospital", "clinic", "other"]) as federation:
        clinic, hospital = federation.path("clinic"), federation.path("hospital")
        image: Any = get_testdata_file("CT_small.dcm")
        with pytest.raises(ForwardingOff):
            command("propose-dicom", clinic, image, "--label", 1)
        command("enable", clinic, "--recipient", "hospital", "--purpose", "study", "--quota", 3)
        command("propose-dicom", clinic, image, "--label", 1)
        (waiting,) = json.loads(command("list", clinic, "--json"))
        assert (waiting["state"], waiting["look"]) == ("proposed", True)
        identifier = waiting["id"][:12]
        command("show", clinic, identifier, "--out", tmp_path / "image.npy")
        command("approve", clinic, identifier, "--reference", "form 3", "--reviewer", "dr-b")
        assert "1 sent" in command("forward", clinic)
        assert "accepted" in command("collect", hospital, "--purpose", "study")
        assert "withdrawn" in command("withdraw", clinic, identifier)
        assert "deleted" in command("collect", hospital, "--purpose", "study")
        assert "the chain holds" in command("audit", clinic)
        assert "deleted" in command("audit", hospital, "--received")
        command("disable", clinic)
        assert "Forwarding is off" in command("list", clinic)
