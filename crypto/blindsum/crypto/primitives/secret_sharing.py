"""Shamir's sharing of 32-byte secrets, byte-exact (Shamir, CACM 1979).

The field is the integers modulo 2^256 + 297, the smallest prime above every secret: nothing is reduced,
and a share is 33 bytes, little-endian. Points are small positive integers (a position plus one), which
the arithmetic uses: Horner's rule multiplies a long integer by a short one and reduces now and then,
and the Lagrange denominators are products of short differences.
"""

import math
from collections.abc import Sequence
from operator import mul

import numpy as np

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33
COEFFICIENT_BYTES = 48
"""Uniform bytes behind each coefficient: reduced mod PRIME they are uniform to within 2^-127."""

_REDUCE_EVERY = 24


def split(secret: bytes, threshold: int, points: Sequence[int], uniform: bytes) -> list[bytes]:
    """A share of `secret` for each point; any `threshold` of them give it back, fewer say nothing.

    `uniform` holds (threshold - 1) * COEFFICIENT_BYTES bytes that are unpredictable and never used for
    another polynomial. Points are distinct and at least 1.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a shared secret has {SECRET_BYTES} bytes")
    if len(uniform) != (threshold - 1) * COEFFICIENT_BYTES:
        raise ValueError(f"{threshold - 1} coefficients need {COEFFICIENT_BYTES} bytes each")
    if not 1 <= threshold <= len(points):
        raise ValueError(f"{threshold} of {len(points)} shares is impossible")
    if len(set(points)) != len(points) or min(points) < 1:
        raise ValueError("points are distinct and at least 1")
    descending = [
        int.from_bytes(uniform[start : start + COEFFICIENT_BYTES], "little") % PRIME
        for start in range(0, len(uniform), COEFFICIENT_BYTES)
    ]
    descending.append(int.from_bytes(secret, "little"))
    runs = [descending[start : start + _REDUCE_EVERY] for start in range(0, threshold, _REDUCE_EVERY)]
    shares = []
    for point in points:
        value = 0
        for run in runs:
            for coefficient in run:
                value = value * point + coefficient
            value %= PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "little"))
    return shares


def share_value(share: bytes) -> int | None:
    """The field element in 33 bytes, or None if they hold none."""
    value = int.from_bytes(share, "little")
    return value if len(share) == SHARE_BYTES and value < PRIME else None


class LagrangeBasis:
    """The weights that turn the shares at `points` into the secret at 0.

    Computed once for all secrets that are rebuilt from the same points: one modular inverse in all.
    """

    __slots__ = ("_weights", "points")

    def __init__(self, points: Sequence[int]) -> None:
        if not points or len(set(points)) != len(points) or min(points) < 1:
            raise ValueError("points are distinct and at least 1")
        self.points = tuple(points)
        numerator = math.prod(self.points) % PRIME
        denominators = _denominators(self.points)
        # Montgomery's trick: one inverse of the product instead of one for each denominator.
        running = [1]
        for denominator in denominators:
            running.append(running[-1] * denominator % PRIME)
        inverse = pow(running[-1], -1, PRIME)
        weights = [0] * len(denominators)
        for index in range(len(denominators) - 1, -1, -1):
            weights[index] = numerator * (running[index] * inverse % PRIME) % PRIME
            inverse = inverse * denominators[index] % PRIME
        self._weights = weights

    def combine(self, shares: Sequence[int]) -> bytes | None:
        """The secret behind the shares, in the order of `points`; None if it isn't one of 32 bytes."""
        if len(shares) != len(self.points):
            raise ValueError(f"needs {len(self.points)} shares, got {len(shares)}")
        value = sum(map(mul, self._weights, shares)) % PRIME
        return value.to_bytes(SECRET_BYTES, "little") if value < 1 << 256 else None


def _denominators(points: tuple[int, ...]) -> list[int]:
    """x_j * product over m != j of (x_m - x_j), mod PRIME, for each j.

    Differences are multiplied in groups that fit int64 first, so that few long products are left.
    """
    count = len(points)
    group = max(1, 62 // max(points).bit_length())
    x = np.array(points, dtype=np.int64)
    differences = np.ones((count, -(-count // group) * group), dtype=np.int64)
    np.subtract(x[None, :], x[:, None], out=differences[:, :count])
    np.fill_diagonal(differences, 1)
    products = differences.reshape(count, -1, group).prod(axis=2)
    return [math.prod(row) * own % PRIME for row, own in zip(products.tolist(), points, strict=True)]
