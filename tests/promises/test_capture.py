"""Promise 1, ciphertext only: what the server saw is searched for all that members hold (faults.md 33).

Everything here is real: the server behind TLS, its files and logs, the members' folders. The capture is
taken after TLS, from the messages that the server's handlers receive and return.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blindsum.client.leak_scan import Needle, Scanner, key_needles, strongest_correlation
from blindsum.client.member import Member, Round
from blindsum.client.testing import Federation
from blindsum.crypto.encoding.lanes import LaneLayout
from blindsum.examples.clinics.outcome import LeakScan
from blindsum.examples.clinics.server_view import (
    Witness,
    captured_uploads,
    read_witness,
    scan_server,
    secrets_in,
    sums_are_exact,
)

SCHEMES = [
    "masking",
    pytest.param("bfv", marks=pytest.mark.he),
    pytest.param("ckks", marks=pytest.mark.he),
    pytest.param("paillier", marks=pytest.mark.paillier),
]
BITS = 16
N_MAX = 16
VALUES = 6000


def train(member: Member, rnd: Round, weights: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    """A made-up update with much structure: what a leak would show best."""
    number = int(member.name.rpartition("-")[2])
    wave = np.sin(np.arange(VALUES) / (7 + number)) * 0.05 * rnd.index
    return {"body": (weights["body"].reshape(-1) + wave).astype(np.float32).reshape(60, 100)}


def run(federation: Federation, seed: bytes | None = None) -> dict[str, list[int]]:
    """Two rounds at every member, with witnesses; the round numbers by member."""

    def app(member: Member) -> list[int]:
        numbers = []
        for rnd in member.rounds():
            state = train(member, rnd, rnd.weights())
            receipt = rnd.submit(state, examples=40 + 7 * rnd.index, metrics={"loss": 0.7312549})
            numbers.append(receipt.round)
        return numbers

    return federation.run(app, witness=True, rounding_seed=seed)


def federation(tmp_path: Path, scheme: str) -> Federation:
    return Federation(
        members=3,
        scheme=scheme,
        model={"body": np.zeros((60, 100), np.float32)},
        rounds=2,
        metrics={"loss": (0.0, 8.0)},
        plan={"bits": BITS, "cohort_max": N_MAX},
        server_settings={"capture_directory": tmp_path / "capture", "log_level": "DEBUG"},
        folder=tmp_path / "federation",
    )


def witnesses_of(folder: Path, numbers: dict[str, list[int]]) -> list[Witness]:
    found = [
        read_witness(member, folder / member, number)
        for member, rounds in numbers.items()
        for number in rounds
    ]
    assert None not in found
    return [one for one in found if one is not None]


@pytest.fixture(params=SCHEMES)
def seen(
    request: pytest.FixtureRequest, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> tuple[LeakScan, list[Witness], Path]:
    """The scan of two whole rounds under one scheme."""
    with federation(tmp_path, request.param) as running:
        numbers = run(running)
        witnesses = witnesses_of(running.folder, numbers)
        secrets = secrets_in([running.path(name) for name in running.names] + [running.folder / "owner"])
        logs = tmp_path / "logs"
        logs.mkdir()
        printed = capfd.readouterr()
        (logs / "server.log").write_text(printed.out + printed.err, encoding="utf-8")
        assert "round concluded" in printed.out + printed.err
        scan = scan_server(
            capture=tmp_path / "capture",
            server_data=running.folder / "server",
            server_logs=logs,
            witnesses=witnesses,
            secrets=secrets,
            bits=BITS,
            n_max=N_MAX,
            shown=witnesses[0],
        )
    return scan, witnesses, tmp_path / "capture"


def test_nothing_that_members_hold_is_found_in_what_the_server_saw(
    seen: tuple[LeakScan, list[Witness], Path],
) -> None:
    scan, witnesses, capture = seen
    assert scan.hits == []
    assert abs(scan.correlation_wire) < scan.correlation_chance
    # The control: the same search and correlation find an upload that wasn't protected, an update, a key.
    assert any("packed lanes" in name for name in scan.control_hits)
    assert any("update (<f4)" in name for name in scan.control_hits)
    assert any("base64" in name for name in scan.control_hits)
    assert scan.correlation_update > 0.99
    # It had all to search: each member's upload of each round, server files, logs, every kind of key.
    contributions = [one for one in captured_uploads(capture) if one.kind == 1]
    assert {(one.member, one.round) for one in contributions} == {(w.member, w.round) for w in witnesses}
    assert scan.files > 40
    for kind in ("identity.key", "hpke.key", "transport.key", "owner.key", "group-1.key", "state-"):
        assert any(kind in name for name in scan.searched), kind


def test_every_upload_is_uncorrelated_and_every_sum_exact(
    seen: tuple[LeakScan, list[Witness], Path],
) -> None:
    _, witnesses, capture = seen
    layout = LaneLayout.for_cohort(BITS, N_MAX)
    widths = [(layout.guard_bits, layout.field_bits, layout.fields_per_lane)]
    by_key = {(one.member, one.round): one for one in witnesses}
    for upload in captured_uploads(capture):
        if upload.kind == 1:
            found = strongest_correlation(
                upload.member, upload.data, by_key[upload.member, upload.round].update, widths
            )
            assert not found.suspicious, found
    for number in {one.round for one in witnesses}:
        assert sums_are_exact([one for one in witnesses if one.round == number])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_seed_gives_equal_sums_and_different_uploads(tmp_path: Path, scheme: str) -> None:
    sums, uploads = [], []
    for attempt in ("first", "second"):
        place = tmp_path / attempt
        with federation(place, scheme) as running:
            numbers = run(running, seed=bytes(range(32)))
            witnesses = witnesses_of(running.folder, numbers)
        coordinates = slice(0, VALUES)
        sums.append({(one.member, one.round): one.summed[coordinates].tobytes() for one in witnesses})
        uploads.append([one.data for one in captured_uploads(place / "capture") if one.kind == 1])
    assert sums[0] == sums[1]
    assert len(uploads[0]) == len(uploads[1]) == 6
    # Not even one aligned 16-byte block of a ciphertext comes again.
    blocks = [{data[i : i + 16] for data in run_ for i in range(64, len(data) - 16, 16)} for run_ in uploads]
    assert not blocks[0] & blocks[1]


def test_the_scanner_finds_a_secret_at_any_offset_and_in_any_form() -> None:
    secret = bytes(range(0xAA, 0xCA))
    scanner = Scanner([*key_needles("key", secret), Needle("zeros", bytes(64))])
    assert scanner.names == [f"key ({form})" for form in ("raw", "hex", "HEX", "base64", "base64url")]
    for offset in range(17):
        haystack = bytes(offset) + secret.hex().encode() + bytes(40)
        assert [hit.needle for hit in scanner.search("place", haystack)] == ["key (hex)"]
    assert scanner.search("place", bytes(500)) == []
