"""The sum check: a keyed linear tag that only an honest sum carries (protocols.md 1.9).

For each of two 31-bit primes p, every member derives from the group key a coefficient r_i for each
field and an offset a_u for each member. Its tag a_u + sum r_i x_i(u) mod p rides in fields of its own.
The sum of the tags must equal the sum over the survivors of a_u plus sum r_i X_i for the opened sum X.
Without the group key a false sum passes with probability at most 2^-60; who knows the key can forge.
"""

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from blindsum.crypto.encoding.keystream import READ_ROOM, Keystream
from blindsum.crypto.primitives.derivation import derive_key
from numpy.typing import NDArray

PRIMES = (2**31 - 1, 2**31 - 19)
TAG_BITS = 31

Tags = tuple[int, int]
"""One residue for each of `PRIMES`."""

_LIMB = 24
_CHUNK = 1 << 14
_COEFFICIENT = np.uint64(2**31 - 1)
_UPPER = np.uint64(33)


class SumCheck:
    """The coefficients and offsets of one round, from `GroupKey.check_key(h1)`."""

    def __init__(self, check_key: bytes) -> None:
        self._key = check_key
        self._stream = Keystream(check_key, "sum check coefficients")
        self._room = _Room()

    def partial(self, start: int, values: NDArray[Any], value_bits: int) -> Tags:
        """sum r_i x_i over fields start, start + 1, ... for unsigned `values` below 2^value_bits.

        Pure: parts may be computed on any thread and added with `add`.
        """
        first = second = 0
        for offset in range(0, values.size, _CHUNK):
            part = values[offset : offset + _CHUNK]
            one, two = self._chunk(start + offset, part, value_bits)
            first += one
            second += two
        return first % PRIMES[0], second % PRIMES[1]

    def offsets(self, member: str) -> Tags:
        """a_u of a member."""
        raw = derive_key(self._key, "sum check member", member.encode())
        return (
            int.from_bytes(raw[:16], "little") % PRIMES[0],
            int.from_bytes(raw[16:], "little") % PRIMES[1],
        )

    def expected(self, survivors: Iterable[str], body: Tags) -> Tags:
        """The tags that an honest sum over `survivors` carries, given the partial tags of its body."""
        total = body
        for member in survivors:
            total = add(total, self.offsets(member))
        return total

    def _chunk(self, start: int, values: NDArray[Any], value_bits: int) -> Tags:
        # Products of 31 bits and `limb` bits, as many summed as fit 64 bits before each reduction.
        limb = min(value_bits, _LIMB)
        terms = min(1 << (64 - 31 - limb), _CHUNK)
        count = values.size
        width = min(terms, count)
        padded = -(-count // width) * width
        room = self._room
        lanes = np.frombuffer(self._stream.read(8 * start, 8 * padded, room.stream), "<u8")
        two = np.right_shift(lanes, _UPPER, out=room.second[:padded]).reshape(-1, width)
        one = np.bitwise_and(lanes, _COEFFICIENT, out=lanes).reshape(-1, width)
        whole = room.values[:padded]
        whole[:count] = values
        whole[count:] = 0
        first = second = 0
        for low in range(0, value_bits, limb):
            part = whole if value_bits <= limb else (whole >> np.uint64(low)) & np.uint64((1 << limb) - 1)
            rows = part.reshape(-1, width)
            first += _reduce(one, rows, PRIMES[0]) << low
            second += _reduce(two, rows, PRIMES[1]) << low
        return first % PRIMES[0], second % PRIMES[1]


class _Room(threading.local):
    """Buffers of one thread, kept, because fresh pages would cost more than the arithmetic."""

    def __init__(self) -> None:
        self.stream = bytearray(READ_ROOM)
        self.second = np.empty(2 * _CHUNK, np.uint64)
        self.values = np.empty(2 * _CHUNK, np.uint64)


def add(left: Tags, right: Tags) -> Tags:
    """The sum of two partial tags."""
    return (left[0] + right[0]) % PRIMES[0], (left[1] + right[1]) % PRIMES[1]


def tag_limbs(bits: int) -> int:
    """Fields that one tag takes in limbs of `bits` bits."""
    return -(-TAG_BITS // bits)


def split(value: int, bits: int, limbs: int) -> list[int]:
    """Base-2^bits limbs of a non-negative integer, least significant first."""
    if not 0 <= value < 1 << (bits * limbs):
        raise ValueError(f"{value} doesn't fit {limbs} limbs of {bits} bits")
    mask = (1 << bits) - 1
    return [(value >> (bits * index)) & mask for index in range(limbs)]


def join(limbs: Sequence[int], bits: int) -> int:
    """The integer that (sums of) limbs stand for."""
    return sum(int(limb) << (bits * index) for index, limb in enumerate(limbs))


def _reduce(coefficients: NDArray[np.uint64], values: NDArray[np.uint64], prime: int) -> int:
    rows: NDArray[np.uint64] = np.einsum("ij,ij->i", coefficients, values)
    return sum(rows.tolist()) % prime if rows.size < 64 else int((rows % np.uint64(prime)).sum())
