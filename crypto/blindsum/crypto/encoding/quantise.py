"""Floats to integers: weight, clip, scale, round, in this order (protocols.md 2).

v = clip(w / W_max * delta, +-2^e) for a tensor with range exponent e, then
x = 2^(b-1) + SR(v * (2^(b-1) - 1) / 2^e), within [1, 2^b - 1]; an exact zero stays exact.
SR is stochastic rounding: up with the probability of the fraction, taken to 15 bits.
"""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from blindsum.crypto.encoding.keystream import READ_ROOM, Keystream
from blindsum.crypto.encoding.layout import Vector
from blindsum.crypto.errors import EncodingError
from numpy.typing import NDArray

WEIGHT_UNITS = 1 << 20
"""The largest weight W_max in weight units; every weight is an integer number of them."""

EXPONENT_MIN = -30
EXPONENT_MAX = 20

CHUNK = 1 << 15
"""Values worked on at a time: what stays in a core's cache."""

_FRACTION = 15
_NARROW_BITS = 16
_INTEGER_ONLY = 1.5 * 2.0**52
_TOLERANCE_SCALE = 1_000_000


@dataclass(frozen=True)
class RangeReport:
    """How a tensor's weighted values sat in its range: what `status` shows, and the vote in the sum.

    `vote` is 2 when more than the tolerance was clipped (double the range), 0 when not even a quarter
    of the tolerance would be in half the range (halve it), else 1. A tensor of zeros votes 1.
    """

    name: str
    clipped: int
    vote: int


@dataclass(frozen=True)
class _Run:
    """Neighbouring tensors with the same range exponent."""

    start: int
    stop: int
    scale: float


class Quantiser:
    """Quantises one member's flat update, chunk by chunk, the same at every call and on any thread.

    `update` is float32 of sum(sizes) values and must not change meanwhile; `units` is the member's
    weight; `rounding` the stream that stochastic rounding draws from, 16 bits a value. Finding a value
    that isn't finite, the constructor raises `EncodingError` naming the tensor.
    """

    def __init__(
        self,
        update: Vector,
        *,
        names: Sequence[str],
        sizes: Sequence[int],
        exponents: Sequence[int],
        bits: int,
        units: int,
        clip_tolerance: int,
        rounding: Keystream,
    ) -> None:
        self._update = update
        self._bits = bits
        self._rounding = rounding
        self._room = _Room()
        self._limit = float(((1 << (bits - 1)) - 1) << _FRACTION)
        self._runs: list[_Run] = []
        reports = []
        ratio = units / WEIGHT_UNITS
        start = 0
        for name, size, exponent in zip(names, sizes, exponents, strict=True):
            reports.append(
                _survey(name, update[start : start + size], math.ldexp(1.0, exponent) / ratio, clip_tolerance)
            )
            self._append(start, start + size, ratio * math.ldexp(self._limit, -exponent))
            start += size
        self.reports: tuple[RangeReport, ...] = tuple(reports)

    def quantise(self, start: int, stop: int, out: NDArray[np.uint32]) -> None:
        """Write coordinates [start, stop) to `out`."""
        for run in self._runs:
            low, high = max(start, run.start), min(stop, run.stop)
            for first in range(low, high, CHUNK):
                last = min(first + CHUNK, high)
                self._chunk(first, last, run.scale, out[first - start : last - start])

    def _append(self, start: int, stop: int, scale: float) -> None:
        if self._runs and self._runs[-1].scale == scale:
            start = self._runs.pop().start
        self._runs.append(_Run(start, stop, scale))

    def _chunk(self, start: int, stop: int, scale: float, out: NDArray[np.uint32]) -> None:
        # Fixed point with 15 fraction bits; adding 15 random bits and shifting rounds up with exactly
        # the probability of the fraction. 16 bits and less fit int32 and lose nothing in float32.
        count = stop - start
        dither = np.frombuffer(self._rounding.read(2 * start, 2 * count, self._room.stream), "<u2")
        np.right_shift(dither, 16 - _FRACTION, out=dither)
        if self._bits > _NARROW_BITS:
            self._wide(self._update[start:stop], scale, dither, out)
            return
        # In place: what doesn't touch another buffer doesn't push it out of the cache.
        real, fixed = out.view(np.float32), out.view(np.int32)
        np.multiply(self._update[start:stop], np.float32(scale), out=real)
        np.clip(real, np.float32(-self._limit), np.float32(self._limit), out=real)
        np.rint(real, out=real)
        np.copyto(fixed, real, casting="unsafe")
        np.add(fixed, dither, out=fixed)
        np.right_shift(fixed, _FRACTION, out=fixed)
        np.add(fixed, 1 << (self._bits - 1), out=fixed)

    def _wide(
        self, values: Vector, scale: float, dither: NDArray[np.uint16], out: NDArray[np.uint32]
    ) -> None:
        # In 1.5 * 2^52 + y the low bits of a float64 are y, rounded to the nearest integer, ties to even
        # like `rint`. Everything that isn't y lies above the 32 + 15 bits that are looked at. The middle
        # of the range is added in the same step: an even number, so that ties stay as they are.
        real = self._room.real[: values.size]
        np.multiply(values, np.float64(scale), out=real, dtype=np.float64)
        np.clip(real, -self._limit, self._limit, out=real)
        np.add(real, _INTEGER_ONLY + float(1 << (self._bits - 1 + _FRACTION)), out=real)
        fixed = real.view(np.int64)
        np.add(fixed, dither, out=fixed)
        np.right_shift(fixed, _FRACTION, out=fixed)
        np.copyto(out, fixed, casting="unsafe")


class _Room(threading.local):
    """Buffers of one thread, kept, because fresh pages would cost more than the arithmetic."""

    def __init__(self) -> None:
        self.stream = bytearray(READ_ROOM)
        self.real = np.empty(CHUNK, np.float64)


def _survey(name: str, values: Vector, limit: float, tolerance: int) -> RangeReport:
    size = np.empty(min(values.size, CHUNK), np.float32)
    bound, half = _as_float32(limit), _as_float32(limit / 2)
    largest, clipped, outer = 0.0, 0, 0
    for start in range(0, values.size, CHUNK):
        part = values[start : start + CHUNK]
        sizes = np.abs(part, out=size[: part.size])
        highest = float(sizes.max())
        if not math.isfinite(highest):
            raise EncodingError(name, "a value is NaN or infinite; nothing was sent. Check the training step")
        largest = max(largest, highest)
        if highest > half:
            outer += int(np.count_nonzero(sizes > half))
        if highest > bound:
            clipped += int(np.count_nonzero(sizes > bound))
    if largest == 0.0:
        return RangeReport(name, 0, 1)
    if clipped * _TOLERANCE_SCALE > tolerance * values.size:
        return RangeReport(name, clipped, 2)
    narrow = 4 * outer * _TOLERANCE_SCALE <= tolerance * values.size
    return RangeReport(name, clipped, 0 if narrow else 1)


def _as_float32(limit: float) -> np.float32:
    return np.float32(min(limit, float(np.finfo(np.float32).max)))
