"""The bulk step of masking: packed lanes in frames of 32 Ki lanes (256 KiB)."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
from blindsum.crypto.encoding.lanes import LaneLayout
from blindsum.crypto.errors import EncodingError, OpeningFailed, RefusalReason, Refused
from blindsum.crypto.primitives.mask_expansion import LANE_BYTES, Lanes, MaskSet, mask_key, subtract_multiple
from blindsum.crypto.schemes.base import BulkLayout, Fields, SummedFields
from blindsum.crypto.trust.group_key import GroupKey
from blindsum.crypto.trust.header import Header

FRAME_LANES = 1 << 15


@lru_cache(maxsize=64)
def _layouts(fields: int, bits: int, n_max: int) -> tuple[LaneLayout, BulkLayout]:
    lanes = LaneLayout.for_cohort(bits, n_max)
    per_frame = FRAME_LANES * lanes.fields_per_lane
    full = FRAME_LANES * LANE_BYTES
    rest = fields - (-(-fields // per_frame) - 1) * per_frame
    last = lanes.lanes(rest) * LANE_BYTES
    return lanes, BulkLayout(fields, per_frame, full, last, full, last, full, last)


def lane_layout(header: Header) -> LaneLayout:
    """How fields share lanes in a round. Raises `ParameterRefused`."""
    return _layouts(header.fields, header.bits, header.n_max)[0]


def bulk_layout(header: Header) -> BulkLayout:
    """Exact sizes of the bulk step of a round. Raises `ParameterRefused`."""
    return _layouts(header.fields, header.bits, header.n_max)[1]


def group_mask_key(group_key: GroupKey, h1: bytes) -> bytes:
    """The AES key of K, which seals the sum to the members (protocols.md 1.7)."""
    return mask_key(group_key.sum_key(h1), "masking sum", h1)


class LaneBuffers:
    """Frames of lanes that are used again: a fresh 256 KiB array a frame costs more than its packing."""

    def __init__(self) -> None:
        self._idle: list[Lanes] = []

    @contextmanager
    def borrow(self, lanes: int) -> Iterator[Lanes]:
        """A buffer of so many lanes, at most a frame, for one thread at a time."""
        try:
            buffer = self._idle.pop()
        except IndexError:
            buffer = np.empty(FRAME_LANES, dtype="<u8")
        try:
            yield buffer[:lanes]
        finally:
            self._idle.append(buffer)


class MaskingProtector:
    """A member's bulk step: packs a frame and adds K, the self mask and the pairwise masks."""

    def __init__(self, header: Header, h1: bytes, masks: MaskSet) -> None:
        self.layout = bulk_layout(header)
        self.h1 = h1
        self._lanes = lane_layout(header)
        self._masks = masks
        self._pending = set(range(self.layout.frames))
        self._buffers = LaneBuffers()

    @property
    def complete(self) -> bool:
        """Whether every frame was protected."""
        return not self._pending

    def protect(self, index: int, fields: Fields) -> bytes:
        """Frame `index` of the upload; each frame once, in any order, on any thread.

        A mask hides one value only, so a frame is never masked twice: persist what this returns.
        Raises `EncodingError` for a wrong count or a value above 2^bits - 1, `Refused` the second time.
        """
        if not 0 <= index < self.layout.frames:
            raise EncodingError("fields", f"there is no frame {index}")
        start, end = self.layout.field_range(index)
        if len(fields) != end - start:
            raise EncodingError("fields", f"frame {index} holds {end - start} fields, got {len(fields)}")
        with self._buffers.borrow(self._lanes.lanes(end - start)) as lanes:
            self._lanes.pack(fields, lanes)
            try:
                self._pending.remove(index)
            except KeyError:
                raise Refused(RefusalReason.CONFLICT, f"frame {index} was masked already") from None
            self._masks.apply(lanes, index * FRAME_LANES)
            return lanes.tobytes()

    def forget(self) -> None:
        """Drops the masks; no frame can be protected afterwards."""
        self._pending.clear()
        self._masks.forget()


class LaneArithmetic:
    """The aggregator's sum of frames, lane by lane, mod 2^64."""

    native = False

    def __init__(self, header: Header) -> None:
        self._layout = bulk_layout(header)

    def check(self, index: int, frame: bytes | memoryview) -> None:
        """Any lanes are valid; only the size can be wrong. Raises `Refused`."""
        if not 0 <= index < self._layout.frames:
            raise Refused(RefusalReason.OUT_OF_RANGE, f"there is no frame {index}")
        if len(frame) != self._layout.upload_bytes(index):
            expected = self._layout.upload_bytes(index)
            raise Refused(RefusalReason.WRONG_SIZE, f"frame {index} has {expected} bytes, got {len(frame)}")

    def add(self, index: int, total: bytearray | None, frame: bytes | memoryview) -> bytearray:
        """The sum of frame `index` with one more contribution, in place."""
        self.check(index, frame)
        if total is None:
            return bytearray(frame)
        if len(total) != len(frame):
            raise Refused(RefusalReason.WRONG_SIZE, f"the running sum of frame {index} has another size")
        lanes = np.frombuffer(total, dtype="<u8")
        np.add(lanes, np.frombuffer(frame, dtype="<u8"), out=lanes)
        return total


class MaskingOpener:
    """Opens the published sum at a member: subtracts |U3| * K and checks what must be zero."""

    max_error = 0.0

    def __init__(self, header: Header, h1: bytes, survivors: tuple[str, ...], group_key: GroupKey) -> None:
        self.layout = bulk_layout(header)
        self.h1 = h1
        self.survivors = survivors
        self._lanes = lane_layout(header)
        self._key = group_mask_key(group_key, h1)
        self._buffers = LaneBuffers()

    def open(self, index: int, frame: bytes | memoryview) -> SummedFields:
        """The summed fields of frame `index`, uint64. Raises `OpeningFailed`."""
        if not 0 <= index < self.layout.frames or len(frame) != self.layout.result_bytes(index):
            raise OpeningFailed(f"frame {index} of the sum has a wrong size; the sum was discarded")
        start, end = self.layout.field_range(index)
        with self._buffers.borrow(self._lanes.lanes(end - start)) as lanes:
            lanes[:] = np.frombuffer(frame, dtype="<u8")
            subtract_multiple(self._key, len(self.survivors), lanes, index * FRAME_LANES)
            return self._lanes.unpack(lanes, end - start, len(self.survivors))
