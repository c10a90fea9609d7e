"""The service's benchmark commands at a tiny size: their keys, exact sums, figures that fit. No timings."""

import json
import sys
from typing import Any

import pytest
from blindsum import cli


def bench(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["blindsum", "bench", *arguments, "--json", "-"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capfd.readouterr()
    assert not ended.value.code, err
    return json.loads(out)


def test_ingest(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    figures = bench(capfd, monkeypatch, "ingest", "--uploads", "1:16")
    assert figures["exact"] is True
    run = figures["sizes"]["1"]
    assert (run["uploads"], round(run["upload_mb"])) == (16, 1)
    assert (
        figures["mb_per_cpu_s"] == run["mb_per_cpu_s"] == pytest.approx(16 * run["upload_mb"] / run["cpu_s"])
    )
    assert 0 < run["cpu_s_until_acknowledged"] <= run["cpu_s"]
    assert figures["raw_tls_mb_per_cpu_s"] > 0
    assert set(run["limits_mb_per_cpu_s"]) == {"grpc", "sha256", "write", "fdatasync", "fold"}
    assert figures["bare_grpc_mb_per_cpu_s"] == run["limits_mb_per_cpu_s"]["grpc"] > 0
    assert figures["peak_rss_mb"] > 20


def test_commits(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    figures = bench(capfd, monkeypatch, "commits", "--seconds", "0.3")
    assert figures["in_flight"] == 100
    assert 1 < figures["acknowledgements_per_commit"] <= 100
    assert figures["of_bare"] == pytest.approx(figures["commits_per_s"] / figures["bare_commits_per_s"])


def test_rounds(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    figures = bench(capfd, monkeypatch, "round", "--members", "3", "--dim", "100", "--rounds", "2")
    assert (figures["members"], figures["dim"], figures["rounds"]) == (3, 100, 2)
    assert 0 < figures["round_s"] <= figures["slowest_round_s"]
    assert figures["server_start_s"] > 0
