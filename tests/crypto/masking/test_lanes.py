"""Packed lanes: no overflow, nothing lost, nothing accepted that isn't a sum."""

import numpy as np
import pytest
from blindsum.crypto.encoding.lanes import LaneLayout
from blindsum.crypto.errors import EncodingError, OpeningFailed, ParameterRefused
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray


@pytest.mark.parametrize(
    ("n_max", "bits", "fields_per_lane"),
    [(16, 16, 3), (16, 17, 2), (16, 26, 2), (16, 27, 1), (128, 12, 3), (128, 13, 2), (128, 21, 2),
     (1000, 8, 3), (1000, 9, 2), (1000, 17, 2)],
)  # fmt: skip
def test_the_densities_of_the_specification(n_max: int, bits: int, fields_per_lane: int) -> None:
    assert LaneLayout.for_cohort(bits, n_max).fields_per_lane == fields_per_lane


@given(st.integers(1, 32), st.integers(1, 100_000))
def test_a_full_cohort_of_maxima_fits_or_is_refused(bits: int, n_max: int) -> None:
    try:
        layout = LaneLayout.for_cohort(bits, n_max)
    except ParameterRefused:
        needed = (n_max * (2**bits - 1)).bit_length()
        assert needed > 53 or needed + n_max.bit_length() - 1 > 64
        return
    assert layout.guard_bits + layout.fields_per_lane * layout.field_bits <= 64
    assert n_max * layout.maximum < 1 << layout.field_bits
    # No |U3| up to n_max has more factors of two than there are guard bits (protocols.md 1.7).
    assert 2 ** (layout.guard_bits + 1) > n_max


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_sum_of_packed_lanes_is_the_packed_sum(data: st.DataObject) -> None:
    n_max = data.draw(st.integers(1, 1000))
    bits = data.draw(st.integers(2, 24))
    count = data.draw(st.integers(1, 40))
    members = data.draw(st.integers(1, min(n_max, 6)))
    layout = LaneLayout.for_cohort(bits, n_max)
    value = st.one_of(st.just(0), st.just(layout.maximum), st.integers(0, layout.maximum))
    rows = [
        np.array(data.draw(st.lists(value, min_size=count, max_size=count)), dtype=np.uint32)
        for _ in range(members)
    ]
    total = np.zeros(layout.lanes(count), dtype=np.uint64)
    for row in rows:
        packed = layout.pack(row)
        assert not (packed & np.uint64((1 << layout.guard_bits) - 1)).any()
        assert (layout.pack(row.astype(np.uint64)) == packed).all()
        total += packed
    assert layout.unpack(total, count, members).tolist() == np.sum(rows, axis=0, dtype=np.uint64).tolist()


def test_n_max_maxima_fill_a_field_without_touching_the_next() -> None:
    layout = LaneLayout.for_cohort(16, 16)
    total = layout.pack(np.array([layout.maximum, 0, layout.maximum], dtype=np.uint32)) * np.uint64(16)
    assert layout.unpack(total, 3, 16).tolist() == [16 * 65535, 0, 16 * 65535]


@pytest.mark.parametrize(
    "fields",
    [
        np.array([1 << 16], dtype=np.uint32),
        np.array([2**63], dtype=np.uint64),
        np.array([1.0]),
        np.array([1], dtype=np.int64),
        np.array([[1]], dtype=np.uint32),
        np.array([], dtype=np.uint32),
    ],
)
def test_what_cannot_be_packed(fields: NDArray[np.uint32]) -> None:
    with pytest.raises(EncodingError):
        LaneLayout.for_cohort(16, 16).pack(fields)


@pytest.mark.parametrize("bit", range(64))
def test_every_bit_that_no_sum_sets_is_refused(bit: int) -> None:
    layout = LaneLayout.for_cohort(22, 16)  # 4 guard bits, 2 x 26, 8 unused
    lanes = np.zeros(3, dtype=np.uint64)
    lanes[1] = np.uint64(1 << bit)
    # Five fields in three lanes: the second plane of the last lane is padding.
    inside = 4 <= bit < 4 + 52
    if inside and 1 << ((bit - 4) % 26) <= 7 * layout.maximum:
        assert int(layout.unpack(lanes, 5, 7).sum()) == 1 << ((bit - 4) % 26)
    else:
        with pytest.raises(OpeningFailed):
            layout.unpack(lanes, 5, 7)


def test_padding_and_sizes_are_checked() -> None:
    layout = LaneLayout.for_cohort(22, 16)
    lanes = np.zeros(3, dtype=np.uint64)
    lanes[2] = np.uint64(1 << 30)
    assert layout.unpack(lanes, 6, 7)[5] == 1
    with pytest.raises(OpeningFailed, match="padding"):
        layout.unpack(lanes, 5, 7)
    with pytest.raises(OpeningFailed, match="lanes"):
        layout.unpack(lanes, 7, 7)


@pytest.mark.parametrize("members", [2, 4, 8, 16])
def test_no_bit_of_a_sealed_lane_is_known_and_depends_on_the_fields(members: int) -> None:
    """Fault 37: |U3| * K has as many known zero bits as |U3| has factors of two; no field reaches them."""
    layout = LaneLayout.for_cohort(16, 16)
    known = np.uint64(members - 1)
    key = np.arange(1, 41, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for value in (0, 1, layout.maximum):
        total = layout.pack(np.full(120, value, dtype=np.uint32)) * np.uint64(members)
        sealed = total + np.uint64(members) * key
        assert not (sealed & known).any()
        assert not (total & known).any()
