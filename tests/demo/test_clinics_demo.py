"""The main job, small: real server process, real sites as processes, one round of each shared way."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.torch, pytest.mark.timeout(300)]

SITES = ["hospital", *(f"clinic-{number}" for number in range(1, 7)), "late-clinic"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "blindsum.cli", "demo", "clinics", *arguments]


def children_of(parent: int) -> set[int]:
    """Processes whose parent is `parent`, from /proc."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.add(int(path.parent.name))
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """One whole small run: its folder, its JSON, what it printed."""
    place = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        command("--rounds", "1", "--out", str(place / "out"), "--json", str(place / "demo.json")),
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "out", json.loads((place / "demo.json").read_text()), done.stdout


def test_the_json_holds_what_scripts_need(finished: tuple[Path, dict[str, Any], str]) -> None:
    _, result, _ = finished
    assert (result["scheme"], result["rounds"], result["seed"]) == ("masking", 1, 0)
    assert result["exact"] is True
    assert result["exact_rounds"] == 2
    assert [site["name"] for site in result["sites"]] == SITES
    assert [site["examples"] for site in result["sites"]] == [1600, 120, 80, 60, 100, 50, 40, 16]
    for site in result["sites"]:
        for way in ("cloud_only", "cloud_finetuned", "edge_only", "fedavg", "personalised"):
            assert 0 <= site[way] <= 1
    assert 4 < result["bytes_up_per_param"] < 5
    assert result["seconds"] > 0
    scan = result["leak_scan"]
    assert scan["hits"] == []
    assert len(scan["control_hits"]) >= 3
    assert scan["payloads"] == 16  # seven uploads and a checkpoint in each of two rounds
    assert abs(scan["correlation_wire"]) < scan["correlation_chance"] < scan["correlation_update"]


def test_the_report_stands_alone(finished: tuple[Path, dict[str, Any], str]) -> None:
    out, _, printed = finished
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 4
    assert page.count("data:image/png;base64,") == 2
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "<script" not in page
    assert "Who would have to collude" in page
    assert "late-clinic" in printed


def test_receipts_of_all_members_are_one_history(finished: tuple[Path, dict[str, Any], str]) -> None:
    out, _, _ = finished
    shown = subprocess.run(
        [
            *(sys.executable, "-m", "blindsum.cli", "receipt", "show"),
            *(str(out / "members" / "hospital" / "personalised"), "--json"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(shown.stdout)


def test_a_folder_that_is_not_the_demos_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    done = subprocess.run(
        command("--out", str(tmp_path)), capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert "choose another" in done.stdout + done.stderr
    assert (tmp_path / "precious").read_text() == "mine"


def test_ctrl_c_ends_every_process(tmp_path: Path) -> None:
    demo = subprocess.Popen(
        command("--rounds", "500", "--out", str(tmp_path / "out")),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    watchdog = threading.Timer(200, demo.kill)
    watchdog.start()
    try:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "round 1 of 500" in line:
                break
        started = children_of(demo.pid)
        assert len(started) == 8  # the aggregator and seven sites
        demo.send_signal(signal.SIGINT)
        assert demo.wait(60) == 130
    finally:
        watchdog.cancel()
        demo.kill()
    alive = {pid for pid in started if Path(f"/proc/{pid}").exists()}
    assert not alive
