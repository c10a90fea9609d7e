"""The tags: plain modular arithmetic in the end, whatever the chunks and widths."""

import numpy as np
import pytest
from blindsum.crypto.encoding.keystream import READ_ROOM, Keystream
from blindsum.crypto.encoding.sum_check import PRIMES, SumCheck, add, join, split, tag_limbs
from hypothesis import given, settings
from hypothesis import strategies as st

KEY = bytes(range(32))


def coefficients(start: int, count: int) -> tuple[list[int], list[int]]:
    stream = Keystream(KEY, "sum check coefficients")
    lanes = np.frombuffer(stream.read(8 * start, 8 * count, bytearray(READ_ROOM)), "<u8").tolist()
    return [lane & (2**31 - 1) for lane in lanes], [lane >> 33 for lane in lanes]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 53), st.integers(1, 700), st.integers(0, 2**40), st.integers(0, 2**32 - 1))
def test_partial_tags_equal_big_integer_arithmetic(bits, count, start, seed):
    values = np.random.default_rng(seed).integers(0, 2**bits, count, dtype=np.uint64)
    values[0] = 2**bits - 1
    first, second = coefficients(start, count)
    exact = (
        sum(r * x for r, x in zip(first, values.tolist(), strict=True)) % PRIMES[0],
        sum(r * x for r, x in zip(second, values.tolist(), strict=True)) % PRIMES[1],
    )
    assert SumCheck(KEY).partial(start, values, bits) == exact


@pytest.mark.parametrize("bits", [1, 16, 22, 24, 25, 32, 53])
def test_the_largest_values_do_not_overflow_between_reductions(bits):
    count = 40_000
    values = np.full(count, 2**bits - 1, np.uint64)
    check = SumCheck(KEY)
    halves = add(check.partial(0, values[:12_345], bits), check.partial(12_345, values[12_345:], bits))
    exact = tuple(0 for _ in PRIMES)
    for start in range(0, count, 20_000):
        first, second = coefficients(start, 20_000)
        exact = (exact[0] + sum(first), exact[1] + sum(second))
    top = 2**bits - 1
    assert check.partial(0, values, bits) == halves
    assert halves == (exact[0] * top % PRIMES[0], exact[1] * top % PRIMES[1])


def test_the_moduli_are_primes_with_a_product_of_at_least_60_bits():
    for prime in PRIMES:
        assert all(prime % divisor for divisor in range(2, 46_342))
    assert PRIMES[0] * PRIMES[1] >= 2**60


def test_offsets_differ_by_member_and_round():
    seen = {SumCheck(key).offsets(member) for key in (KEY, bytes(32)) for member in ("ann", "bob")}
    assert len(seen) == 4


@given(st.integers(0, 2**31 - 1), st.integers(2, 32))
def test_limbs_come_together_again(value, bits):
    limbs = split(value, bits, tag_limbs(bits))
    assert all(0 <= limb < 2**bits for limb in limbs)
    assert join(limbs, bits) == value


def test_a_value_that_does_not_fit_its_limbs():
    with pytest.raises(ValueError, match="limbs"):
        split(2**16, 8, 2)


def test_a_stream_reads_the_same_at_every_offset():
    stream = Keystream(KEY, "label", b"context")
    whole = bytes(stream.read(0, 1000, bytearray(READ_ROOM)))
    for offset, length in ((0, 16), (1, 15), (17, 200), (999, 1), (32, 968)):
        assert bytes(stream.read(offset, length, bytearray(READ_ROOM))) == whole[offset : offset + length]
    assert bytes(Keystream(KEY, "label").read(0, 16, bytearray(READ_ROOM))) != whole[:16]
