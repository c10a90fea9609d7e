"""The training state: the same bytes at every member, from the sum alone."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from blindsum.crypto.encoding.quantise import EXPONENT_MIN
from blindsum.crypto.errors import EncodingError, OpeningFailed, ParameterRefused, Refused, StateMismatch
from blindsum.crypto.trust.group_key import GroupKey
from blindsum.crypto.trust.strategy import Strategy
from blindsum.crypto.trust.training_state import (
    HISTORY,
    PastRound,
    TrainingState,
    check_arithmetic,
    next_exponents,
    open_checkpoint,
    seal_checkpoint,
    sealed_checkpoint_bytes,
)
from blindsum.crypto.trust.transcript import genesis
from small_federation import FEDERATION, MEMBERS, SmallFederation

FED = SmallFederation()
STRATEGIES = ("fedavg", "fedavgm", "fedadam")


def advanced(state, opened, strategy="fedavg", **settings):
    text = {f"server.{name}": str(value) for name, value in settings.items()}
    return state.advance(
        opened, number=12, strategy=Strategy.parse(strategy, text), transcript=bytes([5]) * 32, max_exponent=4
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_members_that_received_different_pieces_compute_equal_bytes(strategy):
    fed = SmallFederation(strategy)
    one = two = fed.state
    for _ in range(3):
        one = advanced(one, fed.opened(state=one), strategy)
        two = advanced(TrainingState.parse(two.to_bytes()), fed.opened(state=two), strategy)
        assert one.to_bytes() == two.to_bytes()
        assert one.digest(fed.group_key) == two.digest(fed.group_key)
    assert one.index == 3
    assert not np.array_equal(one.values, fed.state.values)


def test_the_bytes_of_a_state_do_not_change_between_versions():
    state = FED.state
    data = state.to_bytes()
    assert hashlib.sha256(data).hexdigest() == STATE_VECTOR
    assert state.digest(FED.group_key).hex() == DIGEST_VECTOR
    assert hashlib.sha256(advanced(state, FED.opened()).to_bytes()).hexdigest() == NEXT_VECTOR
    adam = SmallFederation("fedadam")
    after = advanced(adam.state, adam.opened(), "fedadam")
    assert hashlib.sha256(after.to_bytes()).hexdigest() == ADAM_VECTOR


STATE_VECTOR = "f9ac6c95b41d37a24e55934b78c69caf63112e17b5b7a5b34215aa224a80d368"
DIGEST_VECTOR = "a296485d8578a26522102c344bc8381006611980bc244f78b7ed09c8c204f638"
NEXT_VECTOR = "cdc12aec8df82401966bcacdebd6b3c178d61d490d71fd30e849964d863e2624"
ADAM_VECTOR = "539ca3c7967e2f912d16769ac633c4657ac71fbd16cf614617ec931256b5668b"


def test_a_state_remembers_metrics_and_its_length_tells_nothing_of_them():
    one, two = (
        replace(FED.opened(), metrics={"loss": 0.1}),
        replace(FED.opened(), metrics={"loss": 123.456789}),
    )
    states = [advanced(FED.state, opened) for opened in (one, two)]
    assert [state.history[-1].metrics(["loss"]) for state in states] == [{"loss": 0.1}, {"loss": 123.456789}]
    assert states[0].nbytes == states[1].nbytes
    assert TrainingState.parse(states[0].to_bytes()).history == states[0].history
    assert (states[0].history[-1].round, states[0].history[-1].survivors) == (12, len(MEMBERS))
    with pytest.raises(StateMismatch, match="other metrics"):
        states[0].history[-1].metrics(["loss", "accuracy"])


def test_a_state_remembers_a_bounded_number_of_rounds():
    past = PastRound.of(1, FED.opened())
    full = replace(FED.state, history=(past,) * HISTORY)
    after = advanced(full, FED.opened())
    assert len(after.history) == HISTORY
    assert after.history[-1].round == 12
    with pytest.raises(Refused):
        TrainingState.parse(replace(full, history=(past,) * (HISTORY + 1)).to_bytes())


def test_plain_averaging_adds_the_mean_update():
    opened = FED.opened()
    wanted = (FED.state.values.astype(np.float64) + opened.mean(0, 17)).astype(np.float32)
    assert np.array_equal(advanced(FED.state, opened).values, wanted)
    half = (FED.state.values.astype(np.float64) + 0.5 * opened.mean(0, 17)).astype(np.float32)
    assert np.array_equal(advanced(FED.state, opened, learning_rate=0.5).values, half)


def test_momentum_and_adam_follow_their_papers():
    fed = SmallFederation("fedavgm")
    mean = fed.opened().mean(0, 17)
    one = advanced(fed.state, fed.opened(), "fedavgm", momentum=0.5)
    two = advanced(one, fed.opened(state=one), "fedavgm", momentum=0.5)
    assert np.allclose(two.values - one.values, fed.opened(state=one).mean(0, 17) + 0.5 * mean, atol=1e-6)

    fed = SmallFederation("fedadam")
    one = advanced(fed.state, fed.opened(), "fedadam", epsilon=1e-9, learning_rate=0.01)
    assert np.allclose(one.values - fed.state.values, 0.01 * np.sign(mean), atol=1e-6)
    assert one.products == {"beta1": 0.9, "beta2": 0.99}
    two = advanced(one, fed.opened(state=one), "fedadam")
    assert two.products == {"beta1": 0.9 * 0.9, "beta2": 0.99 * 0.99}


def test_a_negative_zero_is_stored_as_zero():
    assert not np.any(np.signbit(FED.state.values[12:]))
    fed = SmallFederation("fedavgm")
    state = advanced(fed.state, fed.opened(scale=0.0), "fedavgm")
    assert not np.any(np.signbit(state.values[12:]))
    assert not np.any(np.signbit(state.moments["momentum"]))


def test_values_that_overflow_name_their_tensor():
    tensors = {"body": np.full((3, 4), 3.4e38, np.float32), "bias": np.zeros(5, np.float32)}
    state = TrainingState.initial(FEDERATION, FED.layout, tensors, exponents=(20, 0))
    opened = FED.opened(state=state, scale=1e6)
    with pytest.raises(EncodingError) as caught:
        advanced(state, opened, learning_rate=1e38)
    assert caught.value.name == "body"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_first_state_must_be_finite(value):
    with pytest.raises(EncodingError) as caught:
        TrainingState.initial(
            FEDERATION,
            FED.layout,
            {"body": np.zeros((3, 4), np.float32), "bias": np.full(5, value, np.float32)},
        )
    assert caught.value.name == "bias"


def test_a_sum_or_strategy_of_another_state_is_refused():
    state = advanced(FED.state, FED.opened(scale=5.0))
    assert state.exponents != FED.state.exponents
    with pytest.raises(ValueError, match="encoded"):
        advanced(state, FED.opened())
    with pytest.raises(ValueError, match="strategy"):
        advanced(FED.state, FED.opened(), "fedadam")


class TestBytes:
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_they_come_back(self, strategy):
        state = SmallFederation(strategy).state
        again = TrainingState.parse(state.to_bytes())
        assert again.to_bytes() == state.to_bytes()
        assert again.nbytes == len(state.to_bytes())
        assert again.transcript == genesis(FEDERATION)
        assert again.tensors()["body"].shape == (3, 4)

    def test_strict(self):
        data = SmallFederation("fedavgm").state.to_bytes()
        length = int.from_bytes(data[:8], "little")
        start = 8 + length + -length % 8
        nan = np.float32(np.nan).tobytes()
        negative_zero = np.float32(-0.0).tobytes()
        bad = [b"", data[:7], data[:-1], data + b"\0", data[:100], b"\xff" * 8 + data[8:]]
        bad += [data[:start] + value + data[start + 4 :] for value in (nan, negative_zero)]
        bad += [data[:-4] + value for value in (nan, negative_zero)]
        bad += [
            data[:8] + data[8:].replace(old, new, 1)
            for old, new in (
                (b'"index":0', b'"index":-'),
                (b'"index"', b'"indeks"'),
                (b'"moments":["momentum"]', b'"moments":["momentum" '),
                (b"[-2,0]", b"[-2,9]".replace(b"9]", b"99")),
                (b"[-2,0]", b"[-200]"),
                (b'"body"', b'"bias"'),
            )
        ]
        if start > 8 + length:
            bad.append(data[: start - 1] + b"\1" + data[start:])
        for wrong in bad:
            with pytest.raises(Refused):
                TrainingState.parse(wrong)

    def test_padding_must_be_zero(self):
        for extra in range(8):
            state = TrainingState(
                FEDERATION,
                10**extra,
                FED.layout,
                FED.state.values.copy(),
                FED.state.exponents,
                bytes(32),
            )
            data = state.to_bytes()
            length = int.from_bytes(data[:8], "little")
            if -length % 8:
                with pytest.raises(Refused, match="padding"):
                    TrainingState.parse(data[: 8 + length] + b"\1" + data[9 + length :])

    def test_the_digest_is_keyed_and_covers_every_part(self):
        digests = {FED.state.digest(FED.group_key), FED.state.digest(GroupKey(bytes(32), 1))}
        base = {
            "federation": FEDERATION,
            "index": 0,
            "layout": FED.layout,
            "values": FED.state.values,
            "exponents": (-2, 0),
            "transcript": genesis(FEDERATION),
        }
        changes = (
            {"federation": bytes(32)},
            {"index": 1},
            {"values": np.zeros(17, np.float32)},
            {"exponents": (-2, 1)},
            {"transcript": bytes(32)},
            {"counters": {"aborts": 1}},
            {"products": {"beta1": 1.0}},
            {"moments": {"momentum": np.zeros(17, np.float32)}},
        )
        for change in changes:
            digests.add(TrainingState(**(base | change)).digest(FED.group_key))
        assert len(digests) == 2 + len(changes)

    def test_vectors_are_read_only(self):
        with pytest.raises(ValueError, match="read-only"):
            FED.state.values[0] = 1


class TestRanges:
    def test_votes_need_more_than_half_of_the_survivors(self):
        exponents = (0, 0, 0, 0, 0, 0, 4, EXPONENT_MIN)
        votes = (5, 3, 2, -2, -3, -5, 5, -5)
        assert next_exponents(exponents, votes, 5, 4) == (1, 1, 0, 0, -1, -1, 4, EXPONENT_MIN)

    @pytest.mark.parametrize(("scale", "settled"), [(0.01, -6), (0.1, -3), (1.0, 0)])
    def test_ranges_find_the_updates_and_settle(self, scale, settled):
        state = FED.state
        seen = []
        for _ in range(12):
            state = advanced(state, FED.opened(state=state, scale=scale), learning_rate=1e-6)
            seen.append(state.exponents)
        assert len(set(seen[-5:])) == 1
        assert all(abs(exponent - settled) <= 1 for exponent in seen[-1])

    def test_a_mixed_cohort_never_oscillates(self):
        rng = np.random.default_rng(0)
        for _ in range(300):
            needed = rng.integers(-4, 5, 7)
            exponent, seen = int(rng.integers(-6, 7)), []
            for _ in range(30):
                votes = sum(int(need > exponent) - int(need < exponent) for need in needed)
                (exponent,) = next_exponents((exponent,), (votes,), 7, 10)
                seen.append(exponent)
            assert len(set(seen[-10:])) == 1


class TestCheckpoint:
    def sealed(self, state=FED.state, h1=bytes(32), key=FED.group_key):
        return list(seal_checkpoint(state, key, h1))

    def open(self, pieces, **changes):
        terms = {
            "key": FED.group_key,
            "h1": bytes(32),
            "federation": FEDERATION,
            "index": 0,
            "digest": FED.state.digest(FED.group_key),
        } | changes
        return open_checkpoint(pieces, terms.pop("key"), terms.pop("h1"), **terms)

    def test_it_opens_to_the_same_state(self):
        pieces = self.sealed()
        assert sum(map(len, pieces)) == sealed_checkpoint_bytes(FED.state)
        assert self.open(pieces).to_bytes() == FED.state.to_bytes()
        assert FED.state.values.tobytes() not in b"".join(pieces)

    def test_a_large_state_in_several_chunks(self):
        layout = FED.layout.of({"w": np.zeros(400_000, np.float32)})
        state = TrainingState.initial(
            FEDERATION, layout, {"w": np.arange(400_000, dtype=np.float32)}, exponents=(0,)
        )
        pieces = self.sealed(state)
        assert len(pieces) == 3
        opened = self.open(pieces, digest=state.digest(FED.group_key))
        assert np.array_equal(opened.values, state.values)

    @pytest.mark.parametrize(
        "changes",
        [
            {"key": GroupKey(bytes(32), 1)},
            {"h1": bytes([1]) * 32},
            {"federation": bytes(32)},
            {"index": 1},
            {"digest": bytes(32)},
        ],
    )
    def test_it_opens_for_its_round_and_digest_only(self, changes):
        with pytest.raises(OpeningFailed):
            self.open(self.sealed(), **changes)

    def test_a_member_that_seals_something_else_is_found_out(self):
        class Lying(TrainingState):
            def digest(self, key):
                return FED.state.digest(key)

        other = advanced(FED.state, FED.opened())
        lying = Lying(
            other.federation,
            0,
            other.layout,
            other.values.copy(),
            other.exponents,
            other.transcript,
        )
        with pytest.raises(StateMismatch):
            self.open(self.sealed(lying))


class TestStrategy:
    def test_settings_of_the_app_are_left_alone(self):
        strategy = Strategy.parse("fedavgm", {"epochs": "3", "server.momentum": "0.5"})
        assert strategy.settings == {"learning_rate": 1.0, "momentum": 0.5}

    @pytest.mark.parametrize(
        ("name", "settings"),
        [
            ("sgd", {}),
            ("fedavg", {"server.momentum": "0.5"}),
            ("fedavg", {"server.learning_rate": "fast"}),
            ("fedavg", {"server.learning_rate": "nan"}),
            ("fedavg", {"server.learning_rate": "0"}),
            ("fedavgm", {"server.momentum": "1.0"}),
            ("fedadam", {"server.beta2": "-0.1"}),
            ("fedadam", {"server.epsilon": "0"}),
        ],
    )
    def test_what_no_strategy_takes(self, name, settings):
        with pytest.raises(ParameterRefused):
            Strategy.parse(name, settings)


def test_this_machine_keeps_subnormal_numbers():
    check_arithmetic()


def test_a_machine_that_flushes_subnormal_numbers_is_refused(monkeypatch):
    monkeypatch.setattr(np, "add", lambda left, right: np.zeros_like(left))
    with pytest.raises(StateMismatch, match="subnormal"):
        check_arithmetic()


def test_the_survivors_are_those_of_the_sum():
    assert FED.opened().survivors == MEMBERS
