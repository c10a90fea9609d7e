"""Sets of positions as bitmaps: bit i of byte i // 8, lowest first, padding bits zero."""

from typing import Any

import numpy as np
from blindsum.crypto.errors import RefusalReason, Refused
from numpy.typing import NDArray

Flags = NDArray[np.bool_]


def to_bitmap(flags: Flags) -> bytes:
    """The bitmap of a boolean array."""
    return np.packbits(flags, bitorder="little").tobytes()


def from_bitmap(bitmap: bytes, length: int, what: str) -> Flags:
    """The boolean array of `length` in a bitmap. Raises `Refused` (wrong size, or padding bits set)."""
    if len(bitmap) != -(-length // 8):
        raise Refused(RefusalReason.WRONG_SIZE, f"{what} isn't a bitmap of {length} bits")
    bits: NDArray[Any] = np.unpackbits(np.frombuffer(bitmap, dtype=np.uint8), bitorder="little")
    if bits[length:].any():
        raise Refused(RefusalReason.MALFORMED, f"{what} has padding bits set")
    return bits[:length].astype(np.bool_)
