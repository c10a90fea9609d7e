"""Each scheme through the real server: exact sums, equal receipts."""

from pathlib import Path

import pytest
from conformance_schemes import SCHEMES, Row
from process_federation import ProcessFederation

NUMBERS = (1, 2)


@pytest.mark.parametrize("row", SCHEMES)
def test_three_members_open_the_exact_sum_and_hold_equal_receipts(tmp_path: Path, row: Row) -> None:
    sum_is_exact(tmp_path, row, 3)


def test_seven_masking_members(tmp_path: Path) -> None:
    sum_is_exact(tmp_path, Row("masking", 20_001), 7)


def sum_is_exact(folder: Path, row: Row, members: int) -> None:
    with ProcessFederation(
        folder, scheme=row.scheme, size=row.size, rounds=len(NUMBERS), members=members
    ) as federation:
        federation.start()
        federation.finish()
        errors = [federation.check_sum(number) for number in NUMBERS]
        federation.check_receipts(dict.fromkeys(federation.names, NUMBERS))
        federation.check_nothing_was_said_in_two_versions()
        for name in federation.names:
            assert [receipt.survivors for receipt in federation.receipts(name)] == [members] * len(NUMBERS)
    if row.scheme == "ckks":
        assert 0 < max(errors) < 1 / 64, "far below the 1/4 at which members refuse"
    else:
        assert errors == [0.0] * len(NUMBERS)
