"""Hostile ciphertexts through the running server: correctly signed uploads of admitted members (faults.md 35).

10,000 of them: `pytest tests/hostile -m slow --timeout 3600 -s`.
"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from blindsum.crypto.schemes.homomorphic.cipher import generate_keys, member_cipher
from hostile_federation import ACCEPTED, HeFederation, build_he_federation
from server_process import ServerProcess

Build = Callable[..., HeFederation]


@pytest.fixture
def process(tmp_path: Path) -> Iterator[ServerProcess]:
    process = ServerProcess(
        tmp_path / "data", presence_grace=0.1, retry_pause=0.05, fold_batch=2, aborts_before_pause=1000
    )
    yield process
    process.close()


@pytest.fixture
def build(process: ServerProcess) -> Iterator[Build]:
    built = []

    def make(name: str, hostile: int = 3, honest: int = 3) -> HeFederation:
        built.append(build_he_federation(process, name, hostile, honest))
        return built[-1]

    yield make
    for federation in built:
        federation.close()


def assault(federation: HeFederation, attempts: int, each: int, seed: int) -> str:
    """Rounds in turn, clean and poisoned, until that many hostile uploads were sent."""
    while federation.attempts < attempts:
        federation.clean_round(each, seed)
        federation.poisoned_round(seed)
    return (
        f"{federation.name}: {federation.attempts} hostile uploads in {federation.number} rounds; "
        f"{federation.at_parser} reached the parser, {federation.past_parser} passed it, "
        f"{federation.added} were added; {dict(federation.outcomes)}; "
        f"{federation.honest_count} honest members in every sum, opened {dict(federation.openings)}"
    )


@pytest.mark.parametrize(("name", "attempts"), [("bfv", 120), ("ckks", 60), ("paillier", 60)])
def test_hostile_uploads_change_no_sum_and_stop_no_one(
    build: Build, process: ServerProcess, name: str, attempts: int
) -> None:
    """Each answer is what the parser says; the published sum is bit for bit that of the counted uploads.

    In rounds where nothing hostile was counted all members open the exact sum. Where valid ciphertext of
    nonsense was, honest members output nothing.
    """
    federation = build(name)
    handle = os.pidfd_open(process.pid)
    assault(federation, attempts, each=attempts // 6, seed=1)
    federation.clean_round(0, 0)
    assert federation.at_parser >= attempts // 2
    assert federation.past_parser >= attempts // 2
    assert federation.openings["opened"] >= 2 * federation.honest_count
    assert sum(federation.openings.values()) > federation.openings["opened"]
    os.close(handle)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attempts"), [("bfv", 10_000), ("ckks", 2_000), ("paillier", 2_000)])
def test_ten_thousand_hostile_uploads(
    build: Build, process: ServerProcess, name: str, attempts: int, capsys: pytest.CaptureFixture[str]
) -> None:
    federation = build(name, hostile=8)
    before = process.pid
    said = assault(federation, attempts, each=40, seed=2)
    federation.clean_round(0, 0)
    peak = next(
        line for line in Path(f"/proc/{before}/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    with capsys.disabled():
        sys.stdout.write(f"\n{said}; server's peak memory {peak.split(':')[1].strip()}\n")
    assert federation.at_parser >= attempts // 2
    assert federation.past_parser >= attempts // 2
