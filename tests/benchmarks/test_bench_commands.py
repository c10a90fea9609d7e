"""Each benchmark command at a tiny size: its keys, exact sums, figures that fit each other. No timings."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blindsum import cli

pytest.importorskip("tenseal", reason="he")
pytest.importorskip("phe", reason="paillier")

from blindsum.bench import flower_peer, he_baseline
from blindsum.bench.aes_limit import measure_limit
from blindsum.bench.aggregator_process import AggregatorProcess
from blindsum.bench.comparison import round_seconds
from blindsum.bench.federation_round import MeasuredRound, run_round
from blindsum.bench.federation_setup import Work, cohort_class, found_federation
from blindsum.crypto.encoding.lanes import LaneLayout
from blindsum.crypto.errors import ParameterRefused

MASKING_KEYS = {
    "members", "dim", "dropout", "member_cpu_s", "aggregator_cpu_s", "bytes_up_per_param", "bytes_up_total",
    "member_limit_s", "aggregator_limit_s", "member_peak_bytes_per_param", "aggregator_peak_bytes", "exact",
    "sum_check_cpu_s",
}  # fmt: skip
HE_KEYS = {
    "scheme", "parameters", "security_bits", "bytes_up_per_param", "bytes_down_per_param",
    "encrypt_params_per_s", "aggregate_params_per_s", "decrypt_params_per_s", "max_error", "grid_mismatches",
    "exact",
}  # fmt: skip
STEPS = ["advertise", "share", "upload", "confirm", "reveal", "finish"]


def bench(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """What `blindsum bench ... --json -` writes to standard output."""
    monkeypatch.setattr(sys, "argv", ["blindsum", "bench", *arguments, "--runs", "1", "--json", "-"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capfd.readouterr()
    assert not ended.value.code, err
    return json.loads(out)


@pytest.mark.parametrize("dropped", [0, 2])
def test_masking(dropped: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    members, dim = 8, 3000
    figures = bench(
        capfd, monkeypatch, "masking", "--members", "8", "--dim", "3000", "--dropout", str(dropped / 8)
    )
    assert figures.keys() >= MASKING_KEYS
    assert figures["exact"] is True
    assert (figures["members"], figures["dim"], figures["survivors"]) == (members, dim, members - dropped)
    assert all(figures[key] > 0 for key in MASKING_KEYS - {"dropout"})
    assert figures["member_cpu_max_s"] >= figures["member_cpu_s"]
    # Lanes of the body, and of the few fields behind it.
    lanes = LaneLayout.for_cohort(16, 16)
    assert lanes.lanes(dim) * 8 < figures["upload_frames_bytes"] < lanes.lanes(dim + 30) * 8
    sent = figures["bytes_up_per_param"] * dim
    assert figures["upload_frames_bytes"] < sent < figures["upload_frames_bytes"] + 4000
    assert sent * (members - dropped) <= figures["bytes_up_total"] < sent * members + 1
    assert list(figures["steps"]) == STEPS
    assert sum(row["bytes_up"] for row in figures["steps"].values()) == pytest.approx(sent)
    pairs = dropped * (members - dropped)
    assert figures["aggregator_streams"] == members - dropped + pairs


@pytest.mark.parametrize("scheme", ["bfv", "ckks", "paillier"])
def test_he(scheme: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(he_baseline, "PAILLIER_SAMPLE", 2)
    baseline = "--baseline" if scheme == "bfv" else "--no-baseline"
    options = ["--scheme", scheme, "--dim", "500", "--n-max", "7", "--modulus", "2048", baseline]
    figures = bench(capfd, monkeypatch, "he", *options)
    assert figures.keys() >= HE_KEYS
    assert figures["exact"] is True
    assert figures["grid_mismatches"] == 0
    assert figures["scheme"] == scheme
    assert figures["max_error"] < 0.25
    assert (figures["max_error"] > 0) == (scheme == "ckks")
    assert all(figures[key] > 0 for key in HE_KEYS if key.endswith(("per_s", "per_param", "bits")))
    sent = figures["bytes_up_per_param"] * 500
    assert figures["upload_frames_bytes"] < sent < figures["upload_frames_bytes"] + 1000
    assert figures["bytes_up_total"] == pytest.approx(3 * sent)
    if baseline == "--baseline":
        for key in ("baseline", "baseline_paillier"):
            assert figures[key].keys() >= HE_KEYS
            assert figures[key]["grid_mismatches"] == 0
            assert figures[key]["bytes_up_per_param"] > figures["bytes_up_per_param"]


def test_all(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    options = ["--sizes", "400,200", "--members", "3", "--paillier-max", "200", "--bandwidths", "1,8"]
    options += ["--modulus", "2048"]
    figures = bench(capfd, monkeypatch, "all", *options, "--html", str(page))
    names = ["plaintext", "masking", "bfv", "ckks", "paillier"]
    assert [(one["scheme"], one["dim"]) for one in figures["results"]] == [
        (name, size) for size in (200, 400) for name in names
    ]
    assert [one["exact"] for one in figures["results"]] == [name != "plaintext" for name in names] * 2
    assert list(figures["trust"]) == names
    small, large = (one for one in figures["results"] if one["scheme"] == "paillier")
    assert (small["estimated"], large["estimated"], large["measured_dim"]) == (False, True, 200)
    assert large["member_cpu_s"] == pytest.approx(2 * small["member_cpu_s"])
    for one in figures["results"]:
        moved = one["bytes_up_per_param"] + one["bytes_down_per_param"]
        slower = one["round_s"]["1"] - one["round_s"]["8"]
        assert slower == pytest.approx(8 * moved * one["dim"] * (1 - 1 / 8) / 1e6)
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 4 + 2
    assert "http://" not in text.replace("http://www.w3.org/", "").replace("http://purl.org/", "").replace(
        "http://creativecommons.org/", ""
    )
    assert "<script" not in text
    assert all(line[:40] in text.replace("&#39;", "'") for line in figures["trust"].values())


def test_sizes_that_are_no_numbers_are_wrong_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["blindsum", "bench", "all", "--sizes", "ten"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2


def test_a_false_sum_is_seen() -> None:
    """The exactness check counts every field that differs from the plain sum."""
    federation = found_federation(Work("masking", 3, 100, 16, 16))
    with AggregatorProcess(federation.terms, 1) as aggregator, ThreadPoolExecutor(1) as pool:
        measured = MeasuredRound(federation, aggregator, pool, 1)
        measured._plain[[3, 50]] += np.uint64(1)
        assert measured.run().mismatches == 2


def test_a_round_below_quorum_fails() -> None:
    federation = found_federation(Work("masking", 4, 10, 16, 16, dropout=0.5))
    with pytest.raises(RuntimeError, match="given up"):
        run_round(federation, 1)


def test_limit() -> None:
    limit = measure_limit(3, 5000)
    assert limit.seconds > 0
    assert limit.gigabytes_per_s == pytest.approx(15_000 / limit.seconds / 1e9)


@pytest.mark.parametrize(
    ("members", "n_max"), [(3, 16), (16, 16), (17, 128), (1000, 1000), (200_000, 200_000)]
)
def test_cohort_class(members: int, n_max: int) -> None:
    assert cohort_class(members) == n_max


def test_a_round_at_a_bandwidth() -> None:
    entry = {
        "dim": 1000,
        "bytes_up_per_param": 3.0,
        "bytes_down_per_param": 5.0,
        "member_cpu_s": 0.5,
        "aggregator_cpu_s": 0.25,
        "member_open_cpu_s": 0.125,
    }
    assert round_seconds(entry, 0.064) == pytest.approx(0.875 + 1.0)


def test_the_peer_refuses_what_it_does_not_run(tmp_path: Path) -> None:
    work = Work("masking", 201, 10, 16, 1000, gamma=50, delta=50)
    with pytest.raises(ParameterRefused, match="--peer"):
        flower_peer.measure(tmp_path / "python", work)


def test_a_peer_that_fails_says_why(tmp_path: Path) -> None:
    """The script that runs in the peer's environment, here in one without flwr."""
    with pytest.raises(flower_peer.PeerFailed, match="flwr"):
        flower_peer.measure(Path(sys.executable), Work("masking", 3, 10, 16, 16))
