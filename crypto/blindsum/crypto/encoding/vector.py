"""One flat vector of integer fields, and what opens again from its sum (protocols.md 2).

    [coordinates][range votes, one a tensor][weight][metrics][two tags of the sum check]

Every field is in [0, 2^b - 1] at a member, so that the sum over at most n_max members is never negative
and never leaves its f = bit length of n_max (2^b - 1) bits. What is wider (weight, metrics, tags) is
split into base-2^b limbs, one field each. Divisions happen after opening.
"""

import hashlib
import math
import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from blindsum.crypto.encoding.keystream import Keystream
from blindsum.crypto.encoding.layout import Layout, Vector
from blindsum.crypto.encoding.quantise import (
    CHUNK,
    EXPONENT_MAX,
    EXPONENT_MIN,
    WEIGHT_UNITS,
    Quantiser,
    RangeReport,
)
from blindsum.crypto.encoding.sum_check import PRIMES, SumCheck, add, join, split, tag_limbs
from blindsum.crypto.errors import EncodingError, OpeningFailed, ParameterRefused, SumCheckFailed
from blindsum.crypto.primitives.derivation import Random, labelled, system_random
from blindsum.crypto.trust.plan import Encoding, Metric, Plan
from blindsum.crypto.trust.policy import Weighting
from numpy.typing import NDArray

SUM_BITS_MAX = 53
"""Bits that a summed field may take: what a float64 holds exactly."""

_WEIGHT_BITS = WEIGHT_UNITS.bit_length()


def field_count(plan: Plan) -> int:
    """Fields of a round's vector, from the plan alone: what `Header.fields` must be.

    Raises `ParameterRefused` where a sum over `cohort_max` members could overflow.
    """
    prove_no_overflow(plan.encoding.bits, plan.cohort_max)
    return plan.dimension + plan.tensors + _tail_limbs(plan.encoding)


def summed_bits(bits: int, n_max: int) -> int:
    """f: bits of the sum of one field over `n_max` members."""
    return (n_max * ((1 << bits) - 1)).bit_length()


def prove_no_overflow(bits: int, n_max: int) -> None:
    """Raises `ParameterRefused` unless every kind of field stays exact when `n_max` members are summed.

    Coordinates lie in [1, 2^b - 1], votes in [0, 2] (hence b >= 2), limbs in [0, 2^b - 1]; so each sum
    is at most n_max (2^b - 1), and that must stay below 2^53. The recombined sums of limbs are Python
    integers, which have no bound.
    """
    if not 2 <= bits <= 32:
        raise ParameterRefused(f"bits = {bits} isn't within 2..32")
    if n_max < 1:
        raise ParameterRefused(f"n_max = {n_max} isn't positive")
    if summed_bits(bits, n_max) > SUM_BITS_MAX:
        fits = max(b for b in range(1, 33) if summed_bits(b, n_max) <= SUM_BITS_MAX) if n_max < 2**52 else 0
        raise ParameterRefused(
            f"{n_max} members of {bits} bits need {summed_bits(bits, n_max)} bits a sum, more than "
            f"{SUM_BITS_MAX}; at most {fits} bits fit"
        )


def metric_steps(metric: Metric) -> int:
    """The largest integer that the metric takes: the number of its steps."""
    return math.ceil((metric.high - metric.low) / metric.resolution)


def weight_units(encoding: Encoding, examples: int) -> int:
    """A member's weight in units of W_max / 2^20, from its number of examples.

    A weight below W_max / ratio is raised to it. Raises `EncodingError` for less than one example, or
    more than the plan's `max_examples`.
    """
    if isinstance(examples, bool) or not isinstance(examples, (int, np.integer)) or examples < 1:
        raise EncodingError("weight", f"examples = {examples!r}: give a whole number, at least 1")
    if encoding.weighting == "equal":
        return WEIGHT_UNITS
    if examples > encoding.max_examples:
        raise EncodingError(
            "weight",
            f"more examples than the plan's max_examples = {encoding.max_examples}; give at most that many, "
            "or ask the owner for a new plan",
        )
    share = int(examples) / encoding.max_examples
    units = round((math.sqrt(share) if encoding.weighting == "sqrt" else share) * WEIGHT_UNITS)
    return max(units, smallest_weight(encoding))


def smallest_weight(encoding: Encoding) -> int:
    """The smallest weight in units: W_max / ratio, rounded up."""
    if encoding.weighting == "equal":
        return WEIGHT_UNITS
    return -(-WEIGHT_UNITS // encoding.weight_ratio)


@dataclass(frozen=True)
class VectorPlan:
    """What each field of a round's vector is.

    Raises `ParameterRefused` where a sum could overflow, and where layout and plan disagree.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    encoding: Encoding
    n_max: int

    def __post_init__(self) -> None:
        prove_no_overflow(self.encoding.bits, self.n_max)
        if len(self.names) != len(self.sizes) or not self.sizes or min(self.sizes) < 1:
            raise ParameterRefused("a vector needs at least one tensor, none of them empty")

    @classmethod
    def of(cls, plan: Plan, layout: Layout) -> Self:
        """The vector of a plan, for the layout that it names by digest."""
        if layout.dimension != plan.dimension or len(layout.sizes) != plan.tensors:
            raise ParameterRefused(
                f"the layout has {layout.dimension} values in {len(layout.sizes)} tensors, "
                f"but the plan says {plan.dimension} in {plan.tensors}"
            )
        return cls(layout.names, layout.sizes, plan.encoding, plan.cohort_max)

    @property
    def bits(self) -> int:
        """b: bits of a field at a member."""
        return self.encoding.bits

    @property
    def weighting(self) -> Weighting:
        """What a member's weight follows."""
        return self.encoding.weighting

    @cached_property
    def dimension(self) -> int:
        """Coordinates."""
        return sum(self.sizes)

    @cached_property
    def votes(self) -> slice:
        """Fields of the range votes."""
        return slice(self.dimension, self.dimension + len(self.sizes))

    @cached_property
    def weight(self) -> slice:
        """Fields of the weight."""
        return slice(self.votes.stop, self.votes.stop + _limbs(_WEIGHT_BITS, self.bits))

    @cached_property
    def metrics(self) -> tuple[slice, ...]:
        """Fields of each metric."""
        start = self.weight.stop
        slices = []
        for metric in self.encoding.metrics:
            slices.append(slice(start, start + _limbs(metric_steps(metric).bit_length(), self.bits)))
            start = slices[-1].stop
        return tuple(slices)

    @cached_property
    def tags(self) -> tuple[slice, slice]:
        """Fields of the two tags of the sum check."""
        start = self.metrics[-1].stop if self.metrics else self.weight.stop
        each = tag_limbs(self.bits)
        return slice(start, start + each), slice(start + each, start + 2 * each)

    @cached_property
    def fields(self) -> int:
        """The whole number of fields."""
        return int(self.tags[1].stop)

    @cached_property
    def sum_bits(self) -> int:
        """f: bits of a summed field."""
        return summed_bits(self.bits, self.n_max)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First coordinate of each tensor."""
        starts = [0]
        for size in self.sizes[:-1]:
            starts.append(starts[-1] + size)
        return tuple(starts)

    def effective_bits(self) -> float:
        """Bits that the update of a member with the smallest weight keeps: say it at set-up."""
        return self.bits - math.log2(WEIGHT_UNITS / smallest_weight(self.encoding))

    def check_exponents(self, exponents: Sequence[int]) -> None:
        """Raises `ParameterRefused` unless there is a range exponent for each tensor, within bounds."""
        if len(exponents) != len(self.sizes):
            raise ParameterRefused(f"{len(exponents)} range exponents for {len(self.sizes)} tensors")
        for name, exponent in zip(self.names, exponents, strict=True):
            if not EXPONENT_MIN <= exponent <= EXPONENT_MAX:
                raise ParameterRefused(
                    f"range exponent {exponent} of {name} isn't within {EXPONENT_MIN}..{EXPONENT_MAX}"
                )


class VectorEncoder:
    """One member's fields of one round, made range by range.

    `update` is the flat float32 update (new weights minus the round's), which must not change until the
    upload has ended; `examples` and `metrics` ride in the same vector. Coordinates may be asked for in
    any order and on any thread, and again (the same values come back); the tail, which holds the tags,
    only when no other range is being made. Beside `update` it holds a few chunks.

    `rounding_seed`: 32 bytes for stochastic rounding, for demos and tests that repeat a run; one for each
    round, independent of every key. Without it they come from `random`.

    Raises `EncodingError` naming the tensor, the weight or the metric at fault; then nothing was made.
    """

    def __init__(
        self,
        plan: VectorPlan,
        exponents: Sequence[int],
        update: Vector,
        *,
        examples: int,
        metrics: Mapping[str, float],
        check_key: bytes,
        member: str,
        random: Random = system_random,
        rounding_seed: bytes | None = None,
    ) -> None:
        plan.check_exponents(exponents)
        if not isinstance(update, np.ndarray) or update.dtype.newbyteorder("=") != np.float32:
            raise EncodingError("update", "the flat update must be a float32 array; use Layout.flatten")
        if update.shape != (plan.dimension,):
            raise EncodingError("update", f"expected {plan.dimension} values, got shape {update.shape}")
        self.plan = plan
        self._member = member
        self._check = SumCheck(check_key)
        units = weight_units(plan.encoding, examples)
        tail = [0] * len(plan.sizes) + split(units, plan.bits, plan.weight.stop - plan.weight.start)
        for metric, steps in _metric_integers(plan.encoding.metrics, metrics):
            tail += split(steps, plan.bits, _limbs(metric_steps(metric).bit_length(), plan.bits))
        self._quantiser = Quantiser(
            update,
            names=plan.names,
            sizes=plan.sizes,
            exponents=exponents,
            bits=plan.bits,
            units=units,
            clip_tolerance=plan.encoding.clip_tolerance,
            rounding=Keystream(
                random(32) if rounding_seed is None else rounding_seed, "stochastic rounding", member.encode()
            ),
        )
        tail[: len(plan.sizes)] = [report.vote for report in self._quantiser.reports]
        self._body_tail = tail
        self._tail: NDArray[np.uint32] | None = None
        self._lock = threading.Lock()
        self._absorbed = _Ranges()
        self._making = 0
        self._tags = (0, 0)

    @property
    def reports(self) -> tuple[RangeReport, ...]:
        """How each tensor sat in its range."""
        return self._quantiser.reports

    def fields(self, start: int, stop: int) -> NDArray[np.uint32]:
        """Fields [start, stop) as a fresh uint32 array, each within [0, 2^b - 1].

        A range that reaches into the tail first takes the coordinates that weren't asked for yet into
        the tags. Raises `ValueError` for a range outside the vector, or when the tail is asked for
        while another thread makes coordinates.
        """
        if not 0 <= start < stop <= self.plan.fields:
            raise ValueError(f"fields [{start}, {stop}) aren't within 0..{self.plan.fields}")
        out = np.empty(stop - start, np.uint32)
        dimension = self.plan.dimension
        if start < dimension:
            self._coordinates(start, min(stop, dimension), out)
        if stop > dimension:
            first = max(start, dimension)
            out[first - start :] = self._finished_tail()[first - dimension : stop - dimension]
        return out

    def _coordinates(self, start: int, stop: int, out: NDArray[np.uint32]) -> None:
        with self._lock:
            fresh = self._absorbed.claim(start, stop)
            self._making += 1
        tags = (0, 0)
        try:
            for first in range(start, stop, CHUNK):
                last = min(first + CHUNK, stop)
                part = out[first - start : last - start]
                self._quantiser.quantise(first, last, part)
                for bounds in fresh:
                    low, high = max(bounds[0], first), min(bounds[1], last)
                    if low < high:
                        piece = part[low - first : high - first]
                        tags = add(tags, self._check.partial(low, piece, self.plan.bits))
        finally:
            with self._lock:
                self._tags = add(self._tags, tags)
                self._making -= 1

    def _finished_tail(self) -> NDArray[np.uint32]:
        with self._lock:
            if self._tail is not None:
                return self._tail
            if self._making:
                raise ValueError("the tail was asked for while coordinates are being made")
            missing = self._absorbed.missing(self.plan.dimension)
        spare = np.empty(CHUNK, np.uint32)
        for low, high in missing:
            for first in range(low, high, CHUNK):
                last = min(first + CHUNK, high)
                self._coordinates(first, last, spare[: last - first])
        plan = self.plan
        body = np.array(self._body_tail, np.uint32)
        with self._lock:
            tags = add(self._tags, self._check.partial(plan.dimension, body, plan.bits))
            tags = add(tags, self._check.offsets(self._member))
            limbs = [limb for tag in tags for limb in split(tag, plan.bits, tag_limbs(plan.bits))]
            self._tail = np.concatenate([body, np.array(limbs, np.uint32)])
            return self._tail

    def __repr__(self) -> str:
        return f"<VectorEncoder of {self._member}, {self.plan.fields} fields>"


@dataclass(frozen=True, repr=False)
class OpenedSum:
    """The opened and checked sum of a round: only members hold one.

    `sums` are the integer sums of the coordinates (uint32, or uint64 where they need it), `weight` the
    sum of the weights in units, `votes` for each tensor how many more members would double its range
    than halve it, `metrics` the plain mean of each metric over the survivors. `digest` is SHA-256 over
    all summed fields.
    """

    plan: VectorPlan
    exponents: tuple[int, ...]
    survivors: tuple[str, ...]
    sums: NDArray[np.uint32] | NDArray[np.uint64]
    weight: int
    votes: tuple[int, ...]
    metrics: Mapping[str, float]
    digest: bytes

    @property
    def total_weight(self) -> float:
        """Sum of the weights in units of the largest one, W_max."""
        return self.weight / WEIGHT_UNITS

    def mean(self, start: int, stop: int) -> NDArray[np.float64]:
        """Coordinates [start, stop) of the weighted mean update, float64.

        One rounded operation at a time on exact integers: the same bits at every member.
        """
        plan = self.plan
        if not 0 <= start < stop <= plan.dimension:
            raise ValueError(f"coordinates [{start}, {stop}) aren't within 0..{plan.dimension}")
        out = self.sums[start:stop].astype(np.float64)
        np.subtract(out, float(len(self.survivors) << (plan.bits - 1)), out=out)
        for index in range(bisect_right(plan.starts, start) - 1, len(plan.starts)):
            low = max(plan.starts[index], start)
            high = min(plan.starts[index] + plan.sizes[index], stop)
            if low >= stop:
                break
            part = out[low - start : high - start]
            np.multiply(part, self._factor(self.exponents[index]), out=part)
        return out

    def mean_update(self) -> Vector:
        """The whole weighted mean update, float32, made chunk by chunk."""
        out = np.empty(self.plan.dimension, np.float32)
        for start in range(0, out.size, CHUNK):
            stop = min(start + CHUNK, out.size)
            out[start:stop] = self.mean(start, stop)
        return out

    def _factor(self, exponent: int) -> float:
        quantum = math.ldexp(1.0, exponent) / float((1 << (self.plan.bits - 1)) - 1)
        return quantum * (float(WEIGHT_UNITS) / float(self.weight))

    def __repr__(self) -> str:
        return f"<OpenedSum over {len(self.survivors)} survivors, {self.plan.dimension} coordinates>"


class VectorDecoder:
    """Takes summed fields in any order and on any thread; `finish` checks and opens them.

    Holds the sum once: 4 bytes a coordinate where n_max (2^b - 1) < 2^32, else 8.
    """

    def __init__(self, plan: VectorPlan, exponents: Sequence[int], *, check_key: bytes) -> None:
        plan.check_exponents(exponents)
        self.plan = plan
        self._exponents = tuple(exponents)
        self._check = SumCheck(check_key)
        self._body_stop = plan.tags[0].start
        self._summed = np.empty(plan.fields, _sum_dtype(plan))
        self._lock = threading.Lock()
        self._absorbed = _Ranges()
        self._tags = (0, 0)

    def absorb(self, start: int, summed: NDArray[np.uint64]) -> None:
        """Take the summed fields [start, start + len(summed)), each range once.

        Raises `OpeningFailed` for a value that no sum of n_max members reaches, `ValueError` for a range
        that is outside the vector or was taken already.
        """
        stop = start + summed.size
        if summed.ndim != 1 or summed.dtype.kind != "u":
            raise ValueError("summed fields are a flat array of unsigned integers")
        if not 0 <= start < stop <= self.plan.fields:
            raise ValueError(f"fields [{start}, {stop}) aren't within 0..{self.plan.fields}")
        if int(summed.max()) > self.plan.n_max * ((1 << self.plan.bits) - 1):
            raise OpeningFailed("a summed field is above n_max times its maximum; nothing was output")
        with self._lock:
            if self._absorbed.claim(start, stop) != [(start, stop)]:
                raise ValueError(f"fields [{start}, {stop}) were taken already")
        tags = (0, 0)
        for first in range(start, stop, CHUNK):
            last = min(first + CHUNK, stop)
            part = summed[first - start : last - start]
            self._summed[first:last] = part
            if first < self._body_stop:
                checked = part[: self._body_stop - first]
                tags = add(tags, self._check.partial(first, checked, self.plan.sum_bits))
        with self._lock:
            self._tags = add(self._tags, tags)

    def finish(self, survivors: Sequence[str]) -> OpenedSum:
        """Check the sum against the survivor set and open it.

        Raises `OpeningFailed` when fields are missing or a sum is outside what the survivors can have
        sent (one of them, or the aggregator, is at fault), `SumCheckFailed` when this isn't their sum.
        """
        plan = self.plan
        count = len(survivors)
        if not 1 <= count <= plan.n_max or len(set(survivors)) != count:
            raise OpeningFailed(f"{count} survivors, each once, aren't within 1..{plan.n_max}")
        with self._lock:
            missing = self._absorbed.missing(plan.fields)
            body = self._tags
        if missing:
            raise OpeningFailed(f"fields {missing[0][0]}..{missing[0][1] - 1} of the sum are missing")
        expected = self._check.expected(survivors, body)
        for prime, want, fields in zip(PRIMES, expected, plan.tags, strict=True):
            if join(self._summed[fields].tolist(), plan.bits) % prime != want:
                raise SumCheckFailed(
                    "the opened sum isn't the sum of what these survivors sent; nothing was output. "
                    "The aggregator, or a member, is at fault: compare transcripts and tell the owner"
                )
        return self._open(tuple(survivors))

    def _open(self, survivors: tuple[str, ...]) -> OpenedSum:
        plan, summed, count = self.plan, self._summed, len(survivors)
        coordinates = summed[: plan.dimension]
        if int(coordinates.max()) > count * ((1 << plan.bits) - 1) or int(coordinates.min()) < count:
            raise OpeningFailed("a summed coordinate is out of range: a member sent a false value")
        votes = summed[plan.votes].astype(np.int64)
        if int(votes.max()) > 2 * count:
            raise OpeningFailed("the range votes are out of range: a member sent a false value")
        weight = join(summed[plan.weight].tolist(), plan.bits)
        if weight == 0:
            raise OpeningFailed("the sum of the weights is zero; nothing was output")
        if not count * smallest_weight(plan.encoding) <= weight <= count * WEIGHT_UNITS:
            raise OpeningFailed("the sum of the weights is out of range: a member sent a false weight")
        metrics = {}
        for metric, fields in zip(plan.encoding.metrics, plan.metrics, strict=True):
            steps = join(summed[fields].tolist(), plan.bits)
            if steps > count * metric_steps(metric):
                raise OpeningFailed(f"metric {metric.name} is out of range: a member sent a false value")
            metrics[metric.name] = min(metric.low + (steps / count) * metric.resolution, metric.high)
        return OpenedSum(
            plan=plan,
            exponents=self._exponents,
            survivors=survivors,
            sums=coordinates,
            weight=weight,
            votes=tuple((votes - count).tolist()),
            metrics=metrics,
            digest=summed_digest(plan, summed),
        )

    def __repr__(self) -> str:
        return f"<VectorDecoder of {self.plan.fields} fields>"


def summed_digest(plan: VectorPlan, summed: NDArray[Any]) -> bytes:
    """SHA-256 over all summed fields in order, as `OpenedSum.digest` has it.

    Whoever adds up encoded vectors by another way compares the result with a receipt through this.
    """
    if summed.shape != (plan.fields,):
        raise ValueError(f"expected {plan.fields} summed fields, got shape {summed.shape}")
    digest = hashlib.sha256(labelled("summed fields", plan.fields.to_bytes(8, "little")))
    dtype = _sum_dtype(plan)
    for start in range(0, plan.fields, CHUNK):
        digest.update(summed[start : start + CHUNK].astype(dtype.newbyteorder("<")).data)
    return digest.digest()


class _Ranges:
    """A set of disjoint ranges of indices, sorted."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []

    def claim(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Take [start, stop) in; returns the parts of it that weren't in yet."""
        fresh = list(_gaps(self._ranges, start, stop))
        touching = [(low, high) for low, high in self._ranges if low <= stop and high >= start]
        if touching:
            start, stop = min(start, touching[0][0]), max(stop, touching[-1][1])
            self._ranges = [part for part in self._ranges if part[1] < start or part[0] > stop]
        self._ranges.append((start, stop))
        self._ranges.sort()
        return fresh

    def missing(self, end: int) -> list[tuple[int, int]]:
        """The parts of [0, end) that aren't in."""
        return list(_gaps(self._ranges, 0, end))


def _gaps(ranges: Sequence[tuple[int, int]], start: int, stop: int) -> Iterator[tuple[int, int]]:
    for low, high in ranges:
        if high <= start:
            continue
        if low >= stop:
            break
        if start < low:
            yield start, low
        start = max(start, high)
    if start < stop:
        yield start, stop


def _metric_integers(declared: Sequence[Metric], given: Mapping[str, float]) -> Iterator[tuple[Metric, int]]:
    unknown = given.keys() - {metric.name for metric in declared}
    if unknown:
        raise EncodingError(min(unknown), "the plan declares no such metric")
    for metric in declared:
        if metric.name not in given:
            raise EncodingError(metric.name, "the plan declares this metric, but none was given")
        try:
            value = float(given[metric.name])
        except (TypeError, ValueError):
            raise EncodingError(metric.name, "the metric isn't a number") from None
        if not metric.low <= value <= metric.high:
            raise EncodingError(
                metric.name, f"the metric isn't within its declared range {metric.low}..{metric.high}"
            )
        yield metric, min(round((value - metric.low) / metric.resolution), metric_steps(metric))


def _limbs(value_bits: int, bits: int) -> int:
    return -(-value_bits // bits)


def _tail_limbs(encoding: Encoding) -> int:
    bits = encoding.bits
    metrics = sum(_limbs(metric_steps(metric).bit_length(), bits) for metric in encoding.metrics)
    return _limbs(_WEIGHT_BITS, bits) + metrics + 2 * tag_limbs(bits)


def _sum_dtype(plan: VectorPlan) -> np.dtype[Any]:
    return np.dtype(np.uint32) if plan.sum_bits <= 32 else np.dtype(np.uint64)
