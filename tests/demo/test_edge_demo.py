"""`blindsum demo edge`, whole: every way, on real servers."""

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.torch, pytest.mark.he, pytest.mark.slow, pytest.mark.timeout(1300)]


def test_a_short_run_shows_all_four_ways(tmp_path):
    out, figures = tmp_path / "out", tmp_path / "edge.json"
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "blindsum.cli",
            "demo",
            "edge",
            "--rounds",
            "2",
            "--out",
            out,
            "--json",
            figures,
        ],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(figures.read_text())
    assert [site["name"] for site in found["sites"]] == [
        "hospital",
        *(f"clinic-{number}" for number in range(1, 7)),
        "late-clinic",
    ]
    assert found["exact"]
    assert found["leak_scan"]["hits"] == []
    assert found["tail"]["agree"] == found["tail"]["total"] == 200
    assert found["inversion"]["clear"] > 0.7
    assert abs(found["inversion"]["encrypted"]) < 0.1
    assert found["cascade"]["share_sent"] <= 0.5
    assert {row["backend"] for row in found["devices"]} == {"onnx-fp32", "onnx-int8"}
    assert set(found["hard"]) == {"errors_auroc", "modality_auroc", "scanners_auroc", "gain"}
    page = (out / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page.replace("https://matplotlib.org", "")
