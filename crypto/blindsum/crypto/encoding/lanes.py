"""Packed lanes: integer fields in uint64 lanes whose sums can't overflow (protocols.md 2).

A lane has g guard bits at the bottom, then m fields of f bits. g = floor(log2 n_max) low bits carry no
data because |U3| * K has up to that many known zero bits there (protocols.md 1.7); f is the bit length of
n_max * (2^bits - 1), so a field never runs into the next one.

Fields are laid out by plane: a run of `count` fields fills L = ceil(count / m) lanes, and field
j * L + i is the j-th field of lane i. Each plane is contiguous, so packing runs at the speed of memory.
"""

from dataclasses import dataclass

import numpy as np
from blindsum.crypto.errors import EncodingError, OpeningFailed, ParameterRefused
from numpy.typing import NDArray

LANE_BITS = 64
MAX_FIELD_BITS = 53


def _field_bits(bits: int, n_max: int) -> int:
    return (n_max * ((1 << bits) - 1)).bit_length()


def _guard_bits(n_max: int) -> int:
    return n_max.bit_length() - 1


@dataclass(frozen=True)
class LaneLayout:
    """How fields of `bits` bits, summed over at most `n_max` members, share uint64 lanes."""

    bits: int
    n_max: int
    guard_bits: int
    field_bits: int
    fields_per_lane: int

    @classmethod
    def for_cohort(cls, bits: int, n_max: int) -> "LaneLayout":
        """The densest layout. Raises `ParameterRefused` when not even one field fits a lane."""
        if bits < 1 or n_max < 1:
            raise ParameterRefused(f"bits = {bits} and n_max = {n_max} must be at least 1")
        guard, field = _guard_bits(n_max), _field_bits(bits, n_max)
        room = LANE_BITS - guard
        limit = min(room, MAX_FIELD_BITS)
        if field > limit:
            fits = next((b for b in range(bits, 0, -1) if _field_bits(b, n_max) <= limit), 0)
            raise ParameterRefused(
                f"the sum of {n_max} values of {bits} bits needs {field} bits, but a lane has room for "
                f"{limit} above its {guard} guard bits; "
                + (f"use at most {fits} bits, or a smaller n_max" if fits else "use a smaller n_max")
            )
        return cls(bits, n_max, guard, field, room // field)

    @property
    def maximum(self) -> int:
        """Largest value of a field before summing."""
        return (1 << self.bits) - 1

    def lanes(self, count: int) -> int:
        """Lanes that hold a run of `count` fields."""
        return -(-count // self.fields_per_lane)

    def _shift(self, plane: int) -> np.uint64:
        return np.uint64(self.guard_bits + plane * self.field_bits)

    def pack(
        self,
        fields: NDArray[np.uint32] | NDArray[np.uint64],
        out: NDArray[np.uint64] | None = None,
    ) -> NDArray[np.uint64]:
        """Fields (uint32 or uint64, one dimension) as lanes with zero guard bits.

        `out`, if given, has `lanes(len(fields))` lanes, is filled and returned. Raises `EncodingError` for
        another dtype or shape, or a value above 2^bits - 1.
        """
        if fields.ndim != 1 or fields.dtype not in (np.dtype("<u4"), np.dtype("<u8")) or not len(fields):
            raise EncodingError("fields", "need a non-empty array of uint32 or uint64 with one dimension")
        if int(fields.max()) > self.maximum:
            raise EncodingError("fields", f"a value is above {self.maximum}, the largest of {self.bits} bits")
        length = self.lanes(len(fields))
        lanes: NDArray[np.uint64] = np.empty(length, dtype="<u8") if out is None else out
        # From the top plane down: shift what is there, put the next plane below it.
        top = self.fields_per_lane - 1
        part = fields[top * length :]
        lanes[: len(part)] = part
        lanes[len(part) :] = 0
        for plane in range(top - 1, -1, -1):
            np.left_shift(lanes, np.uint64(self.field_bits), out=lanes)
            part = fields[plane * length : (plane + 1) * length]
            target = lanes[: len(part)]
            np.bitwise_or(target, part, out=target)
        np.left_shift(lanes, np.uint64(self.guard_bits), out=lanes)
        return lanes

    def unpack(self, lanes: NDArray[np.uint64], count: int, members: int) -> NDArray[np.uint64]:
        """The `count` summed fields (uint64) of a sum over `members`.

        Raises `OpeningFailed` if guard, unused or padding bits are set, or a field is above
        `members` * (2^bits - 1): then the lanes aren't such a sum.
        """
        length = self.lanes(count)
        if len(lanes) != length:
            raise OpeningFailed(f"{count} summed fields need {length} lanes, got {len(lanes)}")
        used = self.guard_bits + self.fields_per_lane * self.field_bits
        outside = (1 << self.guard_bits) - 1
        if used < LANE_BITS:
            outside |= ((1 << LANE_BITS) - 1) ^ ((1 << used) - 1)
        # One pass finds every bit that is set in any lane.
        if int(np.bitwise_or.reduce(lanes)) & outside:
            raise OpeningFailed("bits outside the fields of the sum are set; the sum was discarded")
        mask = np.uint64((1 << self.field_bits) - 1)
        padded: NDArray[np.uint64] = np.empty(length * self.fields_per_lane, dtype="<u8")
        for plane in range(self.fields_per_lane):
            target = padded[plane * length : (plane + 1) * length]
            np.right_shift(lanes, self._shift(plane), out=target)
            np.bitwise_and(target, mask, out=target)
        fields = padded[:count]
        if padded[count:].any():
            raise OpeningFailed("padding of the sum is not zero; the sum was discarded")
        if int(fields.max()) > members * self.maximum:
            raise OpeningFailed(f"a summed field is above {members} times its maximum; the sum was discarded")
        return fields
