"""Looks for what members hold in what the aggregator saw: the proof behind "ciphertext only".

A scan takes *needles* (secrets in every form they ever have at a member) and *haystacks* (captured
messages, the aggregator's files, logs and metrics) and reports every place where a window of a needle
occurs, at any byte offset. Besides, `correlations` decodes bulk payloads in every way a lane could be
read and correlates them with the update. A scan without a positive control proves nothing: feed it the
packed but unmasked upload first, and it must find it.
"""

import base64
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

WINDOW = 16
"""Bytes that must match for a hit."""

_PREFIX = 8
_MIN_DISTINCT = 6
"""Windows with fewer distinct bytes (runs of zeros, repeated values) would match by accident."""


@dataclass(frozen=True)
class Needle:
    """One form of one secret: its name (never its content) goes into reports."""

    name: str
    data: bytes


@dataclass(frozen=True)
class Hit:
    """A window of a needle, found in a haystack."""

    needle: str
    place: str
    offset: int


@dataclass(frozen=True)
class Correlation:
    """The strongest correlation of one payload's decodings with an update of n values."""

    place: str
    decoding: str
    value: float
    chance: float
    """What |value| stays below by chance: 6 / sqrt(n)."""

    @property
    def suspicious(self) -> bool:
        """Whether the payload tells something about the update."""
        return abs(self.value) > self.chance


def key_needles(name: str, secret: bytes) -> list[Needle]:
    """A key as raw bytes, hexadecimal in both cases, and base64 in both alphabets."""
    return [
        Needle(f"{name} (raw)", secret),
        Needle(f"{name} (hex)", secret.hex().encode()),
        Needle(f"{name} (HEX)", secret.hex().upper().encode()),
        Needle(f"{name} (base64)", base64.b64encode(secret).rstrip(b"=")),
        Needle(f"{name} (base64url)", base64.urlsafe_b64encode(secret).rstrip(b"=")),
    ]


def vector_needles(name: str, values: NDArray[np.floating]) -> list[Needle]:
    """A float vector as float32, float64 and float16, in both byte orders."""
    forms = []
    for kind in ("<f4", ">f4", "<f8", ">f8", "<f2"):
        with np.errstate(over="ignore"):
            forms.append(Needle(f"{name} ({kind})", np.asarray(values).astype(kind).tobytes()))
    return forms


def integer_needles(name: str, values: NDArray[np.integer]) -> list[Needle]:
    """An integer vector in each fixed width that holds it, little and big endian."""
    top = int(values.max(initial=0))
    return [
        Needle(f"{name} ({kind})", values.astype(kind).tobytes())
        for kind, limit in (("<u2", 2**16), (">u2", 2**16), ("<u4", 2**32), (">u4", 2**32), ("<u8", 2**64))
        if top < limit
    ]


def _windows(needle: Needle, limit: int) -> Iterator[tuple[int, bytes]]:
    """Up to `limit` windows spread over the needle, each with enough distinct bytes."""
    last = len(needle.data) - WINDOW
    if last < 0:
        return
    step = max(1, last // limit)
    for start in range(0, last + 1, step):
        window = needle.data[start : start + WINDOW]
        if len(set(window)) >= _MIN_DISTINCT:
            yield start, window


class Scanner:
    """Searches haystacks for windows of all needles at once.

    `windows` bounds the windows taken from one needle; a needle that occurs whole is found by any one.
    """

    def __init__(self, needles: Iterable[Needle], windows: int = 256) -> None:
        table: dict[int, list[tuple[str, bytes]]] = {}
        self.names: list[str] = []
        for needle in needles:
            found = False
            for _, window in _windows(needle, windows):
                key = int.from_bytes(window[:_PREFIX], "little")
                table.setdefault(key, []).append((needle.name, window))
                found = True
            if found:
                self.names.append(needle.name)
        self._table = table
        self._prefixes = np.array(sorted(table), dtype=np.uint64)

    def search(self, place: str, data: bytes) -> list[Hit]:
        """Every needle that occurs in `data`, with its first place."""
        hits: dict[str, Hit] = {}
        if not len(self._prefixes):
            return []
        for shift in range(_PREFIX):
            count = (len(data) - shift) // _PREFIX
            if count <= 0:
                continue
            words = np.frombuffer(data, np.dtype("<u8"), count, shift)
            at = np.searchsorted(self._prefixes, words)
            at[at == len(self._prefixes)] = 0
            for index in np.flatnonzero(self._prefixes[at] == words):
                offset = shift + int(index) * _PREFIX
                for name, window in self._table[int(words[index])]:
                    if data[offset : offset + WINDOW] == window:
                        hits.setdefault(name, Hit(name, place, offset))
        return list(hits.values())

    def search_files(self, root: Path) -> tuple[list[Hit], int, int]:
        """Hits in all files below `root`, the number of files read, and their bytes."""
        hits: list[Hit] = []
        files = size = 0
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            data = path.read_bytes()
            files += 1
            size += len(data)
            hits += self.search(str(path.relative_to(root)), data)
        return hits, files, size


def decodings(
    payload: bytes, widths: Iterable[tuple[int, int, int]] = ()
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Every way in which a payload could be read as a vector of numbers.

    `widths` are lane layouts as (guard bits, field bits, fields a lane) of uint64 lanes.
    """
    for kind in ("<u1", "<u2", "<u4", "<u8", ">u4", "<i4", "<f4", "<f8"):
        dtype = np.dtype(kind)
        with np.errstate(all="ignore"):
            values = np.frombuffer(payload, dtype, len(payload) // dtype.itemsize).astype(np.float64)
        yield kind, np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    lanes = np.frombuffer(payload, np.dtype("<u8"), len(payload) // 8)
    for guard, bits, fields in widths:
        columns = [
            (lanes >> np.uint64(guard + index * bits)) & np.uint64((1 << bits) - 1) for index in range(fields)
        ]
        name = f"lanes {guard}+{fields}x{bits}"
        yield f"{name} by plane", np.concatenate(columns).astype(np.float64)
        yield f"{name} by lane", np.stack(columns, axis=1).reshape(-1).astype(np.float64)
        for index, column in enumerate(columns):
            yield f"{name} field {index}", column.astype(np.float64)


def correlation(values: NDArray[np.float64], update: NDArray[np.float64]) -> float:
    """Pearson's correlation over the common length; 0 where either side is constant."""
    length = min(len(values), len(update))
    if length < 2:
        return 0.0
    left = np.clip(values[:length], -1e30, 1e30)
    left = left - left.mean()
    right = update[:length] - update[:length].mean()
    norm = float(np.sqrt((left @ left) * (right @ right)))
    return float(left @ right) / norm if norm > 0 else 0.0


def strongest_correlation(
    place: str,
    payload: bytes,
    update: NDArray[np.floating],
    widths: Iterable[tuple[int, int, int]] = (),
) -> Correlation:
    """The decoding of `payload` that correlates most with `update`, whole and by stride."""
    reference = np.asarray(update, dtype=np.float64)
    best = Correlation(place, "none", 0.0, 6 / np.sqrt(max(len(reference), 1)))
    for name, values in decodings(payload, widths):
        for stride in (1, 2, 3):
            for start in range(stride):
                for label, side, other in (
                    ("", values, reference[start::stride]),
                    (" strided payload", values[start::stride], reference),
                ):
                    common = min(len(side), len(other))
                    if common < 64:
                        continue
                    value = correlation(side, other)
                    chance = 6 / np.sqrt(common)
                    if abs(value) / chance > abs(best.value) / best.chance:
                        best = Correlation(place, f"{name}/{stride}+{start}{label}", value, chance)
    return best
