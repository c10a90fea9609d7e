"""Quantising: unbiased rounding, clipping in the order that the protocol says, and the range votes."""

import numpy as np
import pytest
from blindsum.crypto.encoding.keystream import Keystream
from blindsum.crypto.encoding.quantise import CHUNK, WEIGHT_UNITS, Quantiser


def quantiser(values, *, bits=16, exponent=0, units=WEIGHT_UNITS, tolerance=1000, seed=bytes(32)):
    update = np.asarray(values, np.float32)
    return Quantiser(
        update,
        names=["t"],
        sizes=[update.size],
        exponents=[exponent],
        bits=bits,
        units=units,
        clip_tolerance=tolerance,
        rounding=Keystream(seed, "stochastic rounding"),
    )


def quantised(values, **kwargs) -> np.ndarray:
    out = np.empty(len(values), np.uint32)
    quantiser(values, **kwargs).quantise(0, len(values), out)
    return out


@pytest.mark.parametrize("bits", [2, 4, 8, 16, 17, 24, 32])
def test_every_value_lands_on_a_neighbour_within_the_range(bits):
    rng = np.random.default_rng(bits)
    values = rng.uniform(-1.2, 1.2, 5000).astype(np.float32)
    out = quantised(values, bits=bits).astype(np.float64)
    assert out.min() >= 1
    assert out.max() <= 2**bits - 1
    true = np.clip(values.astype(np.float64), -1, 1) * (2 ** (bits - 1) - 1) + 2 ** (bits - 1)
    assert np.abs(out - true).max() < 1 + 2.0 ** (bits - 24)


@pytest.mark.parametrize("bits", [4, 16, 20])
def test_rounding_is_unbiased_and_exact_values_stay_exact(bits):
    half = 2 ** (bits - 1) - 1
    for fraction in (0.0, 0.25, 0.9):
        count = 200_000
        value = np.float32((1 + fraction) / half)
        out = quantised(np.full(count, value), bits=bits).astype(np.int64) - 2 ** (bits - 1)
        mean = float(value) * half
        assert abs(out.mean() - mean) < 5 * 0.5 / count**0.5 + 1e-4
        assert set(out.tolist()) <= {1, 2}
    assert set(quantised(np.zeros(1000), bits=bits).tolist()) == {2 ** (bits - 1)}
    assert set(quantised(np.full(10, -0.0), bits=bits).tolist()) == {2 ** (bits - 1)}


def test_the_weight_comes_before_the_clip():
    half = 2**15 - 1
    out = quantised([3.0, 2.0, -4.0], units=WEIGHT_UNITS // 2).astype(np.int64) - 2**15
    assert out.tolist() == [half, half, -half]
    assert quantised([1.0], units=WEIGHT_UNITS // 2)[0] - 2**15 in (half // 2, half // 2 + 1)


def test_the_range_exponent_scales():
    half = 2**15 - 1
    assert quantised([2.0**-7], exponent=-7)[0] == 2**15 + half
    assert quantised([16.0, -16.0], exponent=4).tolist() == [2**15 + half, 1]


def test_one_seed_gives_one_stream_wherever_it_is_read():
    values = np.random.default_rng(0).uniform(-1, 1, CHUNK * 2 + 77).astype(np.float32)
    whole = quantised(values)
    machine = quantiser(values)
    for start, stop in ((0, 5), (3, CHUNK + 9), (CHUNK * 2 - 1, values.size)):
        part = np.empty(stop - start, np.uint32)
        machine.quantise(start, stop, part)
        assert np.array_equal(part, whole[start:stop])
    assert not np.array_equal(quantised(values, seed=bytes([1]) * 32), whole)


@pytest.mark.parametrize(
    ("outside", "scale", "tolerance", "vote"),
    [
        (0, 0.9, 1000, 1),
        (0, 0.4, 1000, 0),
        (0, 0.0, 1000, 1),
        (9, 0.4, 1000, 1),
        (11, 0.4, 1000, 2),
        (1, 0.4, 0, 2),
        (0, 0.5, 0, 0),
        (0, 1.0, 0, 1),
    ],
)
def test_the_vote_doubles_halves_or_keeps(outside, scale, tolerance, vote):
    values = np.full(10_000, scale, np.float32)
    values[:outside] = -1.5
    report = quantiser(values, tolerance=tolerance).reports[0]
    assert (report.clipped, report.vote) == (outside, vote)


def test_the_vote_counts_weighted_values():
    assert quantiser([1.8] * 10, units=WEIGHT_UNITS // 2).reports[0].vote == 1
    assert quantiser([1.8] * 10).reports[0].vote == 2


def test_values_beside_the_largest_float_are_clipped():
    largest = float(np.finfo(np.float32).max)
    assert quantised([largest, -largest], exponent=20, units=1).tolist() == [2**16 - 1, 1]
