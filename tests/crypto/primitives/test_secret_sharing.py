"""Shamir's sharing against plain arithmetic."""

import hashlib
from itertools import combinations

import pytest
from blindsum.crypto.primitives.secret_sharing import (
    COEFFICIENT_BYTES,
    PRIME,
    SHARE_BYTES,
    LagrangeBasis,
    share_value,
    split,
)
from hypothesis import given, settings
from hypothesis import strategies as st


def uniform(threshold: int, seed: bytes = b"x") -> bytes:
    return hashlib.shake_256(seed).digest((threshold - 1) * COEFFICIENT_BYTES)


def values(shares: list[bytes]) -> list[int]:
    found = [share_value(share) for share in shares]
    assert None not in found
    return found  # type: ignore[return-value]


def test_the_field_is_prime_and_holds_every_secret() -> None:
    assert PRIME > 2**256
    assert all(pow(base, PRIME - 1, PRIME) == 1 for base in (2, 3, 5, 7, 11, 13))
    assert PRIME.bit_length() <= 8 * SHARE_BYTES


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, bytes(range(32)), b"\x01" + bytes(31)])
def test_any_threshold_of_shares_gives_the_very_bytes_back(secret: bytes) -> None:
    points = [1, 2, 5, 9, 100_000]
    shares = values(split(secret, 3, points, uniform(3)))
    for chosen in combinations(range(5), 3):
        basis = LagrangeBasis([points[i] for i in chosen])
        assert basis.combine([shares[i] for i in chosen]) == secret


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_shares_are_the_polynomial_at_the_points(data: st.DataObject) -> None:
    points = data.draw(st.lists(st.integers(1, 100_000), min_size=1, max_size=60, unique=True))
    threshold = data.draw(st.integers(1, len(points)))
    secret = data.draw(st.binary(min_size=32, max_size=32))
    noise = uniform(threshold, secret)
    descending = [
        int.from_bytes(noise[i : i + COEFFICIENT_BYTES], "little")
        for i in range(0, len(noise), COEFFICIENT_BYTES)
    ] + [int.from_bytes(secret, "little")]
    naive = [
        sum(c * pow(x, len(descending) - 1 - i, PRIME) for i, c in enumerate(descending)) % PRIME
        for x in points
    ]
    shares = values(split(secret, threshold, points, noise))
    assert shares == naive
    assert LagrangeBasis(points[:threshold]).combine(shares[:threshold]) == secret


def test_fewer_shares_than_the_threshold_fit_every_secret() -> None:
    shares = values(split(bytes(32), 3, [1, 2, 3], uniform(3)))
    # At points 1, 2, 3 the weights are 3, -3, 1: whatever the first two shares are, a third one makes
    # any secret of the two, so two say nothing.
    for target in (0, 12345, 2**256 - 1):
        third = (target - 3 * shares[0] + 3 * shares[1]) % PRIME
        assert LagrangeBasis([1, 2, 3]).combine([*shares[:2], third]) == target.to_bytes(32, "little")


def test_a_value_above_32_bytes_is_no_secret() -> None:
    assert LagrangeBasis([1]).combine([PRIME - 1]) is None
    assert LagrangeBasis([1]).combine([2**256 - 1]) == b"\xff" * 32


@pytest.mark.parametrize("share", [b"", bytes(32), bytes(34), PRIME.to_bytes(33, "little"), b"\xff" * 33])
def test_bytes_outside_the_field_are_no_share(share: bytes) -> None:
    assert share_value(share) is None


@pytest.mark.parametrize("points", [[], [0, 1], [1, 1], [-1, 2]])
def test_points_that_repeat_or_hold_the_secret_are_refused(points: list[int]) -> None:
    with pytest.raises(ValueError, match="points"):
        LagrangeBasis(points)
    if points:
        with pytest.raises(ValueError, match="points"):
            split(bytes(32), 1, points, b"")


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        split(bytes(31), 1, [1], b"")
    with pytest.raises(ValueError, match="coefficients"):
        split(bytes(32), 2, [1, 2], b"")
    with pytest.raises(ValueError, match="impossible"):
        split(bytes(32), 3, [1, 2], uniform(3))
    with pytest.raises(ValueError, match="needs 2 shares"):
        LagrangeBasis([1, 2]).combine([1])
