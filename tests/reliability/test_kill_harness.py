"""A real server process killed at named points and at random while real members upload (faults.md 43)."""

from pathlib import Path

import kill_harness
import pytest
from kill_harness import Figures, Harness
from killed_server_main import POINTS


def check(figures: Figures) -> None:
    assert figures.exact_sums == figures.rounds, "every sum is exact"
    assert figures.acknowledged_asked_again == 0, "no acknowledged upload is asked for again"


def test_fault_43_killed_at_random_and_at_points_every_sum_is_exact(tmp_path: Path) -> None:
    figures = kill_harness.run(
        tmp_path, seed=1, members=6, rounds=3, upload_bytes=1_000_000, kills=6, slots=2
    )
    assert figures.kills >= 3
    assert figures.uploads >= 18
    check(figures)


@pytest.mark.parametrize("points", [list(POINTS)[::2], list(POINTS)[1::2]])
def test_fault_43_killed_at_every_point_of_ingest_folding_commits_and_steps(
    tmp_path: Path, points: list[str]
) -> None:
    """Each start of the server has the next point; the federation goes on through all of them."""
    harness = Harness(tmp_path, 1, members=5, rounds=6, upload_bytes=300_000, slots=4)
    try:
        figures = harness.run(len(points), points, at_random=False)
    finally:
        harness.close()
    check(figures)
    assert set(figures.points) == set(points), "each of the points was reached"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_fault_43_two_hundred_uploads_and_ten_kills(
    tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """200 uploads of 4 MB, 4 of them at a time, and 10 kills: at most 1.1 times the bytes."""
    figures = kill_harness.run(tmp_path, seed, members=20, rounds=10, upload_bytes=4_000_000, kills=10)
    with capsys.disabled():
        print(f"\n{figures} ratio {figures.sent_ratio:.3f}")
    check(figures)
    assert figures.kills == 10
    assert figures.sent_ratio <= 1.1
