"""The vector of a round: encoding, summing and opening are exact, and what isn't a true sum is caught."""

import math
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from blindsum.crypto.encoding.quantise import CHUNK, WEIGHT_UNITS
from blindsum.crypto.encoding.vector import (
    OpenedSum,
    VectorDecoder,
    VectorEncoder,
    VectorPlan,
    field_count,
    prove_no_overflow,
    smallest_weight,
    summed_bits,
    summed_digest,
    weight_units,
)
from blindsum.crypto.errors import EncodingError, OpeningFailed, ParameterRefused, SumCheckFailed
from blindsum.crypto.trust.plan import Encoding, Metric, Plan
from hypothesis import given, settings
from hypothesis import strategies as st

KEY = bytes(range(32))
LOSS = Metric(name="loss", low=0.0, high=10.0, resolution=1e-4)
SCORE = Metric(name="score", low=-1.0, high=1.0, resolution=0.5)


def vector_plan(sizes=(5, 3), bits=16, n_max=8, **encoding) -> VectorPlan:
    encoding.setdefault("max_examples", 100)
    names = tuple(f"layer.{index}" for index in range(len(sizes)))
    return VectorPlan(names, tuple(sizes), Encoding(bits=bits, **encoding), n_max)


def encode(plan, update, member="m1", *, examples=50, metrics=None, exponents=None, seed=None, key=KEY):
    return VectorEncoder(
        plan,
        exponents or (0,) * len(plan.sizes),
        np.asarray(update, np.float32),
        examples=examples,
        metrics=metrics or {},
        check_key=key,
        member=member,
        rounding_seed=seed,
    )


def cohort(plan, members, rng, **kwargs):
    vectors = {}
    for index, member in enumerate(members):
        update = (rng.standard_normal(plan.dimension) * 0.3).astype(np.float32)
        examples = int(rng.integers(1, 100))
        encoder = encode(plan, update, member, examples=examples, seed=bytes([index]) * 32, **kwargs)
        vectors[member] = encoder.fields(0, plan.fields)
    return vectors


def add_up(vectors) -> np.ndarray:
    return sum((vector.astype(np.uint64) for vector in vectors), np.zeros(1, np.uint64))


def open_sum(plan, summed, survivors, *, exponents=None, key=KEY) -> OpenedSum:
    decoder = VectorDecoder(plan, exponents or (0,) * len(plan.sizes), check_key=key)
    decoder.absorb(0, summed)
    return decoder.finish(survivors)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    bits=st.integers(2, 32),
    count=st.integers(1, 6),
    frame=st.integers(1, 60),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_opens_is_the_integer_sum_whatever_the_frames_and_their_order(sizes, bits, count, frame, seed):
    rng = np.random.default_rng(seed)
    plan = vector_plan(sizes, bits, metrics=(LOSS, SCORE))
    members = [f"m{index}" for index in range(count)]
    total = np.zeros(plan.fields, np.uint64)
    units = 0
    for member in members:
        update = (rng.standard_normal(plan.dimension) * 0.5).astype(np.float32)
        examples = int(rng.integers(1, 101))
        units += weight_units(plan.encoding, examples)
        encoder = encode(plan, update, member, examples=examples, metrics={"loss": 2.5, "score": 0.5})
        starts = list(range(0, plan.fields, frame))
        tail = [start for start in starts if start + frame > plan.dimension]
        rng.shuffle(head := [start for start in starts if start not in tail])
        for start in head + tail:
            stop = min(start + frame, plan.fields)
            fields = encoder.fields(start, stop)
            assert fields.dtype == np.uint32
            assert int(fields.max()) <= 2**bits - 1
            total[start:stop] += fields
    decoder = VectorDecoder(plan, (0,) * len(sizes), check_key=KEY)
    starts = list(range(0, plan.fields, frame))
    rng.shuffle(starts)
    for start in starts:
        decoder.absorb(start, total[start : start + frame])
    opened = decoder.finish(members)
    assert np.array_equal(opened.sums, total[: plan.dimension])
    assert opened.weight == units
    assert opened.metrics["loss"] == pytest.approx(2.5, abs=1e-9)
    assert opened.metrics["score"] == pytest.approx(0.5)
    assert opened.digest == summed_digest(plan, total)


@pytest.mark.parametrize(("bits", "sizes"), [(16, (70_000, 10, 40_000)), (24, (40_000,)), (8, (100_000,))])
def test_the_mean_is_within_one_quantum_of_the_true_weighted_mean(bits, sizes):
    rng = np.random.default_rng(1)
    plan = vector_plan(sizes, bits, n_max=16, weighting="size")
    exponents = tuple(range(-2, -2 + len(sizes)))
    updates = [(rng.standard_normal(plan.dimension) * 0.02).astype(np.float32) for _ in range(5)]
    examples = [100, 7, 20, 33, 61]
    total = np.zeros(plan.fields, np.uint64)
    weights = []
    for index, (update, size) in enumerate(zip(updates, examples, strict=True)):
        encoder = encode(plan, update, f"m{index}", examples=size, exponents=exponents)
        assert all(report.clipped == 0 for report in encoder.reports)
        total += encoder.fields(0, plan.fields)
        weights.append(weight_units(plan.encoding, size) / WEIGHT_UNITS)
    opened = open_sum(plan, total, [f"m{index}" for index in range(5)], exponents=exponents)
    true = sum(w * update.astype(np.float64) for w, update in zip(weights, updates, strict=True)) / sum(
        weights
    )
    quantum = 2.0 ** (len(sizes) - 3) / (2 ** (bits - 1) - 1)
    error = np.abs(opened.mean_update() - true)
    assert error.max() <= 5 * quantum / sum(weights) + 1e-7
    assert abs(float((opened.mean_update() - true).mean())) < quantum / 20
    middle = opened.mean(sizes[0] - 3, sizes[0] + min(3, plan.dimension - sizes[0]))
    assert np.array_equal(
        middle.astype(np.float32), opened.mean_update()[sizes[0] - 3 : sizes[0] - 3 + middle.size]
    )


def test_all_zero_and_all_maximum_vectors_are_exact():
    plan = vector_plan((CHUNK + 7, 3), 16, n_max=3, weighting="equal")
    for value in (0.0, 1.0, -1.0):
        vectors = [
            encode(plan, np.full(plan.dimension, value), f"m{i}").fields(0, plan.fields) for i in range(3)
        ]
        assert set(vectors[0][: plan.dimension].tolist()) == {2**15 + int(value * (2**15 - 1))}
        opened = open_sum(plan, add_up(vectors), ["m0", "m1", "m2"])
        assert np.all(opened.mean(0, plan.dimension) == value)


def test_a_repeated_range_comes_back_the_same_and_counts_once():
    plan = vector_plan((CHUNK * 2 + 5,))
    encoder = encode(plan, np.linspace(-1, 1, plan.dimension))
    first = encoder.fields(100, CHUNK + 100)
    assert np.array_equal(encoder.fields(100, CHUNK + 100), first)
    assert np.array_equal(encoder.fields(50, 150)[50:], first[:50])
    whole = encoder.fields(0, plan.fields)
    assert np.array_equal(whole[100 : CHUNK + 100], first)
    open_sum(plan, whole.astype(np.uint64), ["m1"])


def test_a_tail_asked_for_first_covers_coordinates_that_come_later():
    plan = vector_plan((CHUNK + 9, 4))
    encoder = encode(plan, np.linspace(-1, 1, plan.dimension))
    tail = encoder.fields(plan.dimension, plan.fields)
    vector = np.concatenate([encoder.fields(0, plan.dimension), tail])
    open_sum(plan, vector.astype(np.uint64), ["m1"])


def test_frames_may_be_made_and_absorbed_on_many_threads():
    plan = vector_plan((300_000,))
    encoder = encode(plan, np.linspace(-1, 1, plan.dimension))
    decoder = VectorDecoder(plan, (0,), check_key=KEY)
    ranges = [(start, min(start + 7_001, plan.dimension)) for start in range(0, plan.dimension, 7_001)]

    def frame(bounds):
        decoder.absorb(bounds[0], encoder.fields(*bounds).astype(np.uint64))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(frame, ranges))
    frame((plan.dimension, plan.fields))
    assert decoder.finish(["m1"]).weight == weight_units(plan.encoding, 50)


class TestSumCheck:
    plan = vector_plan((40, 25), metrics=(LOSS,))
    members = ("ann", "bob", "cid", "dee")

    @pytest.fixture
    def vectors(self):
        return cohort(self.plan, self.members, np.random.default_rng(3), metrics={"loss": 1.0})

    def refused(self, summed, survivors, **kwargs):
        with pytest.raises(SumCheckFailed):
            open_sum(self.plan, summed, survivors, **kwargs)

    def test_the_true_sum_passes(self, vectors):
        assert open_sum(self.plan, add_up(vectors.values()), self.members).metrics == {"loss": 1.0}

    def test_every_field_is_covered_for_a_shift_and_a_flip_of_the_top_bit(self, vectors):
        for index in range(self.plan.fields):
            total = add_up(vectors.values())
            total[index] += 1
            self.refused(total, self.members)
            total = add_up(vectors.values())
            total[index] ^= np.uint64(1 << 17)
            self.refused(total, self.members)

    def test_another_set_of_survivors(self, vectors):
        total = add_up(vectors.values())
        self.refused(total, self.members[:3])
        self.refused(total, (*self.members[:3], "eve"))
        self.refused(total, (*self.members, "eve"))

    def test_a_missing_a_doubled_a_swapped_a_scaled_member(self, vectors):
        lists = [vectors[member] for member in self.members]
        self.refused(add_up(lists[:3]), self.members)
        self.refused(add_up([*lists, lists[0]]), self.members)
        self.refused(add_up([lists[0], *lists[:3]]), self.members)
        self.refused(add_up(lists) * np.uint64(2), self.members)
        self.refused(lists[0].astype(np.uint64), self.members)

    def test_another_round_or_group_key(self, vectors):
        self.refused(add_up(vectors.values()), self.members, key=bytes(32))

    def test_random_garbage(self):
        rng = np.random.default_rng(4)
        for _ in range(200):
            self.refused(rng.integers(4, 2**18, self.plan.fields, dtype=np.uint64), self.members)


class TestDecoder:
    plan = vector_plan((30,), weighting="size")

    def vector(self, member="m1"):
        return encode(self.plan, np.zeros(30), member, seed=bytes(32)).fields(0, self.plan.fields)

    def forged(self, change):
        """A vector by a member that knows the group key, so that its tags fit what it made up."""
        encoder = encode(self.plan, np.zeros(30))
        change(encoder)
        return encoder.fields(0, self.plan.fields).astype(np.uint64)

    def test_missing_fields(self):
        decoder = VectorDecoder(self.plan, (0,), check_key=KEY)
        vector = self.vector().astype(np.uint64)
        decoder.absorb(0, vector[:10])
        decoder.absorb(11, vector[11:])
        with pytest.raises(OpeningFailed, match=r"10\.\.10"):
            decoder.finish(["m1"])

    def test_a_range_twice_or_outside(self):
        decoder = VectorDecoder(self.plan, (0,), check_key=KEY)
        decoder.absorb(0, self.vector().astype(np.uint64)[:10])
        for start in (0, 5, self.plan.fields - 5):
            with pytest.raises(ValueError, match="fields"):
                decoder.absorb(start, np.ones(10, np.uint64))

    def test_a_field_that_no_cohort_reaches(self):
        decoder = VectorDecoder(self.plan, (0,), check_key=KEY)
        with pytest.raises(OpeningFailed, match="maximum"):
            decoder.absorb(0, np.full(1, 8 * (2**16 - 1) + 1, np.uint64))

    def test_survivors_that_no_cohort_has(self):
        for survivors in ((), ("m1", "m1"), tuple(f"m{i}" for i in range(9))):
            with pytest.raises(OpeningFailed, match="survivors"):
                open_sum(self.plan, self.vector().astype(np.uint64), survivors)

    @pytest.mark.parametrize(("weight", "text"), [(0, "zero"), (1, "out of range"), (2**21, "out of range")])
    def test_a_false_weight_of_a_member_that_knows_the_key(self, weight, text):
        def change(encoder):
            encoder._body_tail[1:3] = [weight & 0xFFFF, weight >> 16]

        with pytest.raises(OpeningFailed, match=text):
            open_sum(self.plan, self.forged(change), ["m1"])

    def test_a_false_vote(self):
        def change(encoder):
            encoder._body_tail[0] = 3

        with pytest.raises(OpeningFailed, match="votes"):
            open_sum(self.plan, self.forged(change), ["m1"])


class TestRefusedInput:
    plan = vector_plan((4, 3), metrics=(LOSS,))

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_a_value_that_is_not_finite_names_its_tensor(self, value):
        update = np.zeros(7, np.float32)
        update[5] = value
        with pytest.raises(EncodingError) as caught:
            encode(self.plan, update, metrics={"loss": 1.0})
        assert caught.value.name == "layer.1"

    @pytest.mark.parametrize("examples", [0, -1, 101, 2.5, True, None])
    def test_examples(self, examples):
        with pytest.raises(EncodingError) as caught:
            encode(self.plan, np.zeros(7), examples=examples, metrics={"loss": 1.0})
        assert caught.value.name == "weight"

    @pytest.mark.parametrize(
        ("metrics", "name"),
        [
            ({}, "loss"),
            ({"loss": -0.1}, "loss"),
            ({"loss": 10.1}, "loss"),
            ({"loss": math.nan}, "loss"),
            ({"loss": "high"}, "loss"),
            ({"loss": 1.0, "auc": 1.0}, "auc"),
        ],
    )
    def test_metrics(self, metrics, name):
        with pytest.raises(EncodingError) as caught:
            encode(self.plan, np.zeros(7), metrics=metrics)
        assert caught.value.name == name

    def test_vectors_of_another_shape_or_dtype(self):
        for update in (np.zeros(6, np.float32), np.zeros((7, 1), np.float32), np.zeros(7), [0.0] * 7):
            with pytest.raises(EncodingError):
                VectorEncoder(
                    self.plan, (0, 0), update, examples=1, metrics={"loss": 1}, check_key=KEY, member="m"
                )

    def test_exponents(self):
        for exponents in ((0,), (0, 21), (-31, 0)):
            with pytest.raises(ParameterRefused):
                encode(self.plan, np.zeros(7), metrics={"loss": 1.0}, exponents=exponents)

    def test_ranges(self):
        encoder = encode(self.plan, np.zeros(7), metrics={"loss": 1.0})
        for bounds in ((0, 0), (-1, 3), (3, self.plan.fields + 1), (5, 4)):
            with pytest.raises(ValueError, match="fields"):
                encoder.fields(*bounds)


def test_metrics_at_the_ends_of_their_range_and_off_the_grid():
    metric = Metric(name="m", low=-0.3, high=0.7, resolution=0.3)
    plan = vector_plan((1,), 8, metrics=(metric,))
    for value, wanted in ((-0.3, -0.3), (0.7, 0.7), (0.01, 0.0)):
        vector = encode(plan, np.zeros(1), metrics={"m": value}).fields(0, plan.fields)
        assert open_sum(plan, vector.astype(np.uint64), ["m1"]).metrics["m"] == pytest.approx(
            wanted, abs=0.16
        )


def test_weights_follow_the_plan_and_are_raised_to_the_smallest():
    size = Encoding(bits=16, weighting="size", max_examples=1600, weight_ratio=16)
    root = Encoding(bits=16, weighting="sqrt", max_examples=1600, weight_ratio=16)
    equal = Encoding(bits=16, weighting="equal")
    assert weight_units(size, 1600) == weight_units(root, 1600) == weight_units(equal, 5) == WEIGHT_UNITS
    assert weight_units(size, 800) == WEIGHT_UNITS // 2
    assert weight_units(root, 400) == WEIGHT_UNITS // 2
    assert weight_units(size, 1) == weight_units(root, 1) == smallest_weight(size) == WEIGHT_UNITS // 16


def test_the_smallest_weight_says_how_many_bits_it_keeps():
    plan = VectorPlan(("a",), (1,), Encoding(bits=16, max_examples=10, weight_ratio=40), 4)
    assert plan.effective_bits() == pytest.approx(16 - math.log2(40), abs=1e-4)


@pytest.mark.parametrize("bits", [2, 7, 8, 16, 31, 32])
def test_the_field_count_follows_from_the_plan_alone(bits):
    plan = Plan(
        federation=bytes(32),
        name="job",
        version=1,
        policy=bytes(32),
        scheme="masking",
        rounds=3,
        initial_state=bytes(32),
        layout=bytes(32),
        dimension=100,
        tensors=4,
        cohort_min=3,
        cohort_wanted=3,
        cohort_max=9,
        encoding=Encoding(bits=bits, metrics=(LOSS, SCORE)),
    )
    assert field_count(plan) == vector_plan((97, 1, 1, 1), bits, metrics=(LOSS, SCORE)).fields


class TestNoOverflow:
    def test_the_edge(self):
        assert summed_bits(16, 16) == 20
        prove_no_overflow(16, 2**37)
        prove_no_overflow(32, 2**21)
        with pytest.raises(ParameterRefused, match="at most 31 bits fit"):
            prove_no_overflow(32, 2**21 + 1)

    @pytest.mark.parametrize(("bits", "n_max"), [(1, 4), (33, 4), (16, 0)])
    def test_out_of_range(self, bits, n_max):
        with pytest.raises(ParameterRefused):
            prove_no_overflow(bits, n_max)

    def test_the_largest_sums_open_exactly(self):
        plan = vector_plan((3,), 32, n_max=2**21, weighting="equal")
        vector = encode(plan, np.ones(3)).fields(0, plan.fields)
        members = [f"m{index}" for index in range(8)]
        total = add_up([encode(plan, np.ones(3), member).fields(0, plan.fields) for member in members])
        assert total.max() == 8 * int(vector.max())
        assert np.all(open_sum(plan, total, members).mean(0, 3) == 1.0)


def test_memory_is_the_update_the_sum_and_a_few_chunks():
    plan = vector_plan((2_000_000,), 16)
    update = np.zeros(plan.dimension, np.float32)
    encode(plan, update).fields(0, plan.fields)
    frame = 1 << 17
    tracemalloc.start()
    try:
        encoder = encode(plan, update)
        for start in range(0, plan.fields, frame):
            encoder.fields(start, min(start + frame, plan.fields))
        encoding = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        decoder = VectorDecoder(plan, (0,), check_key=KEY)
        encoder = encode(plan, update)
        for start in range(0, plan.fields, frame):
            fields = encoder.fields(start, min(start + frame, plan.fields))
            decoder.absorb(start, fields.astype(np.uint64))
        opened = decoder.finish(["m1"])
        opened.mean(0, frame)
        decoding = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert encoding < 6 << 20
    assert decoding < 4 * plan.fields + (16 << 20)
