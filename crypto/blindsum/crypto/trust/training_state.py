"""The training state S_r: one value, the same bytes at every member (protocols.md 1.8).

S_r follows from S_(r-1) and the opened sum alone: numpy float64 + - * / sqrt, one ufunc at a time,
rounded to nearest even; no reductions, no fused operations, no powers; NaN refused, -0 stored as +0,
little-endian. Its keyed digest, which the next header carries, tells the server nothing.
"""

import hashlib
import hmac
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
import numpy as np
from blindsum.crypto.canonical import Document, decode_document, encode_document
from blindsum.crypto.encoding.layout import Layout, Vector
from blindsum.crypto.encoding.quantise import CHUNK, EXPONENT_MAX, EXPONENT_MIN
from blindsum.crypto.encoding.vector import OpenedSum
from blindsum.crypto.errors import EncodingError, RefusalReason, Refused, StateMismatch
from blindsum.crypto.primitives.derivation import Random, labelled, same, system_random
from blindsum.crypto.primitives.sealing import open_stream, seal_stream, sealed_stream_bytes
from blindsum.crypto.trust.documents import Count, Digest
from blindsum.crypto.trust.group_key import GroupKey
from blindsum.crypto.trust.strategy import Strategy
from blindsum.crypto.trust.transcript import genesis
from numpy.typing import NDArray

DEFAULT_EXPONENT = -3
"""Range exponent of every tensor in S_0 unless told otherwise: values up to 2^-3; it sets itself."""

HISTORY = 128
"""Rounds whose metrics a state remembers."""

_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 8
_META_MAX = 1 << 26
_FLOAT = np.dtype("<f4")
_DOUBLE = np.dtype("<f8")

Exponent = Annotated[int, msgspec.Meta(ge=EXPONENT_MIN, le=EXPONENT_MAX)]


class PastRound(Document, frozen=True, kw_only=True):
    """What a state remembers of a round that led to it: its number, how many survived, its metrics' means.

    `means` are float64 in the order in which the plan declares the metrics, as bytes: sealed states have
    the same length whatever the values are.
    """

    round: Count
    survivors: Count
    means: bytes

    @classmethod
    def of(cls, number: int, opened: OpenedSum) -> "PastRound":
        """The memory of round `number`, whose sum opened to `opened`."""
        means = np.array(list(opened.metrics.values()), _DOUBLE)
        return cls(round=number, survivors=len(opened.survivors), means=means.tobytes())

    def metrics(self, names: Sequence[str]) -> dict[str, float]:
        """The means by the plan's names. Raises `StateMismatch` when these aren't its metrics."""
        means = np.frombuffer(self.means, _DOUBLE) if len(self.means) % _DOUBLE.itemsize == 0 else ()
        if len(means) != len(names):
            raise StateMismatch(f"round {self.round} had other metrics than the plan's; ask the owner")
        return dict(zip(names, map(float, means), strict=True))


class _Meta(Document, frozen=True, kw_only=True):
    """All of a state but its arrays."""

    federation: Digest
    index: Count
    layout: Layout
    exponents: tuple[Exponent, ...]
    transcript: Digest
    counters: dict[str, Count]
    products: dict[str, float]
    moments: tuple[str, ...]
    history: Annotated[tuple[PastRound, ...], msgspec.Meta(max_length=HISTORY)] = ()


@dataclass(frozen=True, repr=False, eq=False)
class TrainingState:
    """S_r: model values and all that members share from round to round.

    `index` is r, `values` the flat float32 model, `exponents` each tensor's range exponent, `transcript`
    the digest of the federation's history up to here, `moments` flat float32 vectors of the strategy,
    `products` its running products, `counters` what else it counts, `history` the newest `HISTORY` rounds.
    Arrays are read-only.

    Raises `EncodingError` naming a tensor whose values aren't finite, `ValueError` for parts that don't
    fit each other.
    """

    federation: bytes
    index: int
    layout: Layout
    values: Vector
    exponents: tuple[int, ...]
    transcript: bytes
    counters: Mapping[str, int] = field(default_factory=dict)
    products: Mapping[str, float] = field(default_factory=dict)
    moments: Mapping[str, Vector] = field(default_factory=dict)
    history: tuple[PastRound, ...] = ()

    def __post_init__(self) -> None:
        if len(self.exponents) != len(self.layout.sizes):
            raise ValueError(f"{len(self.exponents)} exponents for {len(self.layout.sizes)} tensors")
        if not all(EXPONENT_MIN <= exponent <= EXPONENT_MAX for exponent in self.exponents):
            raise ValueError(f"a range exponent isn't within {EXPONENT_MIN}..{EXPONENT_MAX}")
        if not all(math.isfinite(product) for product in self.products.values()):
            raise ValueError("a running product isn't finite")
        for array in (self.values, *self.moments.values()):
            if array.shape != (self.layout.dimension,) or array.dtype != np.float32:
                raise ValueError(f"a state's vectors are float32 of {self.layout.dimension} values")
            self._require_finite(array)
            array.flags.writeable = False

    @classmethod
    def initial(
        cls,
        federation: bytes,
        layout: Layout,
        tensors: Mapping[str, NDArray[Any]],
        *,
        exponents: Sequence[int] | None = None,
        strategy: Strategy | None = None,
    ) -> "TrainingState":
        """S_0 of a plan, from a model's first tensors."""
        values = layout.flatten(tensors)
        np.add(values, np.float32(0), out=values)
        plain = strategy or Strategy.parse("fedavg", {})
        return cls(
            federation,
            0,
            layout,
            values,
            tuple(exponents) if exponents is not None else (DEFAULT_EXPONENT,) * len(layout.sizes),
            genesis(federation),
            products=dict.fromkeys(plain.products, 1.0),
            moments={name: np.zeros(layout.dimension, np.float32) for name in plain.moments},
        )

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The model as fresh arrays by name, in their shapes and dtypes."""
        return self.layout.unflatten(self.values)

    def pieces(self) -> Iterator[bytes | memoryview]:
        """The canonical bytes in pieces: the JSON part with its length before it and zeros up to a multiple
        of 8 after it, the values, the moments sorted by name."""
        meta = encode_document(
            _Meta(
                federation=self.federation,
                index=self.index,
                layout=self.layout,
                exponents=self.exponents,
                transcript=self.transcript,
                counters=dict(self.counters),
                products=dict(self.products),
                moments=tuple(sorted(self.moments)),
                history=self.history,
            )
        )
        yield _LENGTH.pack(len(meta)) + meta + bytes(-len(meta) % _ALIGNMENT)
        yield self.values.astype(_FLOAT, copy=False).data.cast("B")
        for name in sorted(self.moments):
            yield self.moments[name].astype(_FLOAT, copy=False).data.cast("B")

    def to_bytes(self) -> bytes:
        """The canonical bytes, in one piece."""
        return b"".join(self.pieces())

    @classmethod
    def parse(cls, data: bytes | bytearray) -> "TrainingState":
        """The state in `data`, strictly; its vectors stay views of `data`. Raises `Refused` (malformed)."""
        if len(data) < _LENGTH.size:
            raise _malformed("it is too short")
        (length,) = _LENGTH.unpack_from(data)
        end = _LENGTH.size + length
        start = end + -length % _ALIGNMENT
        if length > _META_MAX or start > len(data):
            raise _malformed("its JSON part is too long")
        if any(data[end:start]):
            raise _malformed("its padding isn't zero")
        meta = decode_document(bytes(data[_LENGTH.size : end]), _Meta, "a training state")
        if list(meta.moments) != sorted(set(meta.moments)):
            raise _malformed("its moments aren't sorted, each once")
        size = meta.layout.dimension * _FLOAT.itemsize
        if len(data) != start + size * (1 + len(meta.moments)):
            raise _malformed("it has the wrong length")
        arrays = []
        for index in range(1 + len(meta.moments)):
            array = np.frombuffer(data, _FLOAT, meta.layout.dimension, start + index * size)
            if bool(np.any(np.signbit(array) & (array == 0))):
                raise _malformed("it holds a negative zero")
            arrays.append(array.astype(np.float32, copy=False))
        try:
            return cls(
                meta.federation,
                meta.index,
                meta.layout,
                arrays[0],
                meta.exponents,
                meta.transcript,
                meta.counters,
                meta.products,
                dict(zip(meta.moments, arrays[1:], strict=True)),
                meta.history,
            )
        except (ValueError, EncodingError) as error:
            raise _malformed(str(error)) from None

    @property
    def nbytes(self) -> int:
        """Length of the canonical bytes."""
        return sum(len(piece) for piece in self.pieces())

    def digest(self, key: GroupKey) -> bytes:
        """HMAC-SHA-256 of the canonical bytes under the group key's state key."""
        tag = hmac.new(key.state_key(), labelled("training state"), hashlib.sha256)
        for piece in self.pieces():
            tag.update(piece)
        return tag.digest()

    def advance(
        self, opened: OpenedSum, *, number: int, strategy: Strategy, transcript: bytes, max_exponent: int
    ) -> "TrainingState":
        """S_(r+1), after round `number` whose sum opened to `opened` and whose history ends in `transcript`.

        Raises `EncodingError` naming a tensor whose next values aren't finite, `ValueError` when
        `opened` or the strategy doesn't belong to this state.
        """
        if opened.plan.sizes != self.layout.sizes or opened.exponents != self.exponents:
            raise ValueError("this sum wasn't encoded for this state")
        if set(strategy.moments) != set(self.moments) or set(strategy.products) != set(self.products):
            raise ValueError(f"this state wasn't made for the strategy {strategy.name}")
        check_arithmetic()
        products = {name: self.products[name] * strategy.settings[name] for name in self.products}
        values = np.empty_like(self.values)
        moments = {name: np.empty_like(values) for name in self.moments}
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            for start in range(0, values.size, CHUNK):
                stop = min(start + CHUNK, values.size)
                before = {name: array[start:stop].astype(np.float64) for name, array in self.moments.items()}
                step, after = strategy.step(opened.mean(start, stop), before, products)
                _store(values[start:stop], np.add(self.values[start:stop].astype(np.float64), step))
                for name, chunk in after.items():
                    _store(moments[name][start:stop], chunk)
        return TrainingState(
            self.federation,
            self.index + 1,
            self.layout,
            values,
            next_exponents(self.exponents, opened.votes, len(opened.survivors), max_exponent),
            transcript,
            self.counters,
            products,
            moments,
            (*self.history, PastRound.of(number, opened))[-HISTORY:],
        )

    def _require_finite(self, array: Vector) -> None:
        start = 0
        for name, size in zip(self.layout.names, self.layout.sizes, strict=True):
            part = array[start : start + size]
            if not (math.isfinite(float(part.max())) and math.isfinite(float(part.min()))):
                raise EncodingError(
                    name, "a value of the training state is NaN or infinite; lower the learning rate"
                )
            start += size

    def __repr__(self) -> str:
        return f"<TrainingState {self.index}, {self.layout.dimension} values>"


def next_exponents(
    exponents: Sequence[int], votes: Sequence[int], survivors: int, max_exponent: int
) -> tuple[int, ...]:
    """The next range exponent of each tensor, from the net votes of the round.

    A range doubles when the members that clipped too much outnumber those that would fit half of it by
    more than half of the survivors, and halves the other way round. Whoever clipped in a range never
    fits half of the doubled one, so on updates of constant spread a range that has doubled doesn't
    halve again and the other way round: it settles. Doubling ends at `max_exponent`.
    """
    following = []
    for exponent, vote in zip(exponents, votes, strict=True):
        if 2 * vote > survivors and exponent < max_exponent:
            following.append(exponent + 1)
        elif 2 * vote < -survivors and exponent > EXPONENT_MIN:
            following.append(exponent - 1)
        else:
            following.append(exponent)
    return tuple(following)


def check_arithmetic() -> None:
    """Start-up self-test: raises `StateMismatch` where subnormal numbers are flushed to zero.

    Some libraries switch a processor into that mode; states computed in it differ between members.
    """
    for dtype in (np.float32, np.float64):
        smallest = np.full(8, np.finfo(dtype).smallest_subnormal)
        doubled = np.add(smallest, smallest)
        halved = np.multiply(np.full(8, np.finfo(dtype).smallest_normal), dtype(0.5))
        if not (np.all(doubled > smallest) and np.all(halved > 0)):
            raise StateMismatch(
                "this process flushes subnormal numbers to zero, so its training states would differ from "
                "the other members'; switch that mode off (torch.set_flush_denormal(False))"
            )


def sealed_checkpoint_bytes(state: TrainingState) -> int:
    """Length of a sealed checkpoint."""
    return sealed_stream_bytes(state.nbytes)


def seal_checkpoint(
    state: TrainingState, key: GroupKey, h1: bytes, random: Random = system_random
) -> Iterator[bytes]:
    """The state sealed for members, in pieces: AES-256-GCM under the group key's model key.

    `h1` is that of the round which made the state, or the plan's digest for S_0. Bound to federation,
    index and digest.
    """
    associated = _associated(state.federation, state.index, state.digest(key))
    return seal_stream(key.model_key(h1), state.pieces(), associated, random)


def open_checkpoint(
    pieces: Iterable[bytes], key: GroupKey, h1: bytes, *, federation: bytes, index: int, digest: bytes
) -> TrainingState:
    """The state in a sealed checkpoint, cut anywhere; it has exactly this index and digest.

    Check the claim that comes with it first (`acceptance`). Raises `OpeningFailed`, `Refused`
    (malformed), or `StateMismatch` when a member sealed something else than it said.
    """
    data = bytearray()
    for chunk in open_stream(key.model_key(h1), pieces, _associated(federation, index, digest)):
        data += chunk
    state = TrainingState.parse(data)
    if (state.federation, state.index) != (federation, index) or not same(state.digest(key), digest):
        raise StateMismatch("the sealed checkpoint isn't the state that it was sealed as; get another one")
    return state


def _associated(federation: bytes, index: int, digest: bytes) -> bytes:
    return labelled("checkpoint", federation, index.to_bytes(8, "little"), digest)


def _store(out: Vector, chunk: NDArray[np.float64]) -> None:
    np.copyto(out, chunk, casting="same_kind")
    np.add(out, np.float32(0), out=out)  # -0 + 0 = +0


def _malformed(text: str) -> Refused:
    return Refused(RefusalReason.MALFORMED, f"a training state isn't valid: {text}")
