"""The encrypted tail computes what the tail computes, and frames are taken only in their one form."""

import pickle
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
from blindsum.crypto.errors import OpeningFailed, ParameterRefused, RefusalReason, Refused
from blindsum.crypto.inference.circuit import LINEAR, SQUARE, Circuit
from blindsum.crypto.inference.evaluator import EvaluationKeys, TailEvaluator
from blindsum.crypto.inference.key_holder import TailKeyHolder
from blindsum.crypto.inference.tail_model import CLIP, TailCard, TailModel
from blindsum.crypto.schemes.homomorphic.seal_wire import SealContext
from random_tails import random_features, random_tail

TAIL = random_tail()


@pytest.fixture(scope="module")
def holder() -> TailKeyHolder:
    return TailKeyHolder(TAIL.card)


@pytest.fixture(scope="module")
def evaluator() -> TailEvaluator:
    return TailEvaluator(TAIL)


@pytest.fixture(scope="module")
def keys(holder: TailKeyHolder, evaluator: TailEvaluator) -> EvaluationKeys:
    return evaluator.load_keys(holder.evaluation_keys)


@pytest.mark.parametrize(
    ("circuit", "inputs", "rows", "error"),
    [(SQUARE, 127, 64, 2e-4), (SQUARE, 60, 7, 2e-4), (SQUARE, 1, 1, 2e-4), (LINEAR, 127, 1, 5e-3)],
)
def test_the_answer_is_the_clear_logit(circuit: Circuit, inputs: int, rows: int, error: float) -> None:
    tail = random_tail(circuit, inputs, rows)
    holder, evaluator = TailKeyHolder(tail.card), TailEvaluator(tail)
    keys = evaluator.load_keys(holder.evaluation_keys)
    features = random_features(tail, 4)
    features[3] += 40 * tail.deviation  # cut at the clip
    found = [holder.decrypt(evaluator.evaluate(keys, holder.encrypt(feature))) for feature in features]
    assert np.abs(np.array(found) - tail.logits(features)).max() < error


def test_frames_have_the_promised_sizes(
    holder: TailKeyHolder, evaluator: TailEvaluator, keys: EvaluationKeys
) -> None:
    frame = holder.encrypt(random_features(TAIL, 1)[0])
    assert len(frame) == SQUARE.request_bytes <= 250_000
    assert len(evaluator.evaluate(keys, frame)) == SQUARE.answer_bytes <= 150_000
    assert len(holder.evaluation_keys) == SQUARE.keys_bytes <= 15_000_000


def test_the_other_slots_hold_fresh_numbers_each_time(
    holder: TailKeyHolder, evaluator: TailEvaluator, keys: EvaluationKeys
) -> None:
    """Without them a key holder would read partial sums of the weights."""
    frame = holder.encrypt(random_features(TAIL, 1)[0])

    def slots(answer: bytes) -> np.ndarray:
        from blindsum.crypto.inference.tail_wire import key_tag_of, unpack_answer  # noqa: PLC0415

        residues = unpack_answer(SQUARE, key_tag_of(holder.digest), answer)
        ciphertext = holder._context.load_reduced(list(residues), scale=2.0**SQUARE.answer_scale_bits)
        plaintext = holder._context.api.Plaintext()
        holder._decryptor.decrypt(ciphertext, plaintext)
        return np.array(holder._encoder.decode_complex(plaintext))

    first, second = (slots(evaluator.evaluate(keys, frame)) for _ in range(2))
    assert first[0].real == pytest.approx(second[0].real, abs=1e-3)
    for parts in (first.real[1:] - second.real[1:], first.imag - second.imag):
        assert np.abs(parts).min() > 1e-3
        assert parts.std() > 0.5 * 2**SQUARE.mask_bits
    # A control: without what hides, most of the other slots are nothing but the circuit's error.
    silent = TailEvaluator(TAIL, random=bytes)
    bare = slots(silent.evaluate(silent.load_keys(holder.evaluation_keys), frame))
    assert np.median(np.abs(bare)) < 1e-2


def test_ciphertexts_of_one_feature_differ(holder: TailKeyHolder) -> None:
    feature = random_features(TAIL, 1)[0]
    assert holder.encrypt(feature) != holder.encrypt(feature)


def test_another_members_key_opens_nothing(
    holder: TailKeyHolder, evaluator: TailEvaluator, keys: EvaluationKeys
) -> None:
    other = TailKeyHolder(TAIL.card)
    feature = random_features(TAIL, 1)[0]
    answer = evaluator.evaluate(keys, holder.encrypt(feature))
    with pytest.raises(Refused) as refusal:
        other.decrypt(answer)
    assert refusal.value.reason is RefusalReason.WRONG_DIGEST
    with pytest.raises(OpeningFailed):
        other.decrypt(other._tag + answer[16:])
    with pytest.raises(Refused):
        evaluator.evaluate(keys, other.encrypt(feature))


@pytest.mark.parametrize("change", ["short", "long", "tag", "range", "empty"])
def test_malformed_features_are_refused(
    change: str, holder: TailKeyHolder, evaluator: TailEvaluator, keys: EvaluationKeys
) -> None:
    frame = holder.encrypt(random_features(TAIL, 1)[0])
    bad = {
        "short": frame[:-1],
        "long": frame + b"\0",
        "tag": bytes(16) + frame[16:],
        "range": frame[:80] + b"\xff" * (len(frame) - 80),
        "empty": b"",
    }[change]
    with pytest.raises(Refused):
        evaluator.evaluate(keys, bad)


@pytest.mark.parametrize("change", ["short", "range", "seed twice", "native"])
def test_malformed_keys_are_refused(change: str, holder: TailKeyHolder, evaluator: TailEvaluator) -> None:
    good = holder.evaluation_keys
    size = SQUARE.component_bytes(SQUARE.keys[0])
    bad = {
        "short": good[:-1],
        "range": good[:64] + b"\xff" * 200_000 + good[200_064:],
        "seed twice": good[:size] + good[:64] + good[size + 64 :],
        "native": b"\x5e\xa1\x10\x04" + good,
    }[change]
    with pytest.raises(Refused):
        evaluator.load_keys(bad)


def test_the_rings_are_128_bit_secure_by_seals_table() -> None:
    for circuit in (SQUARE, LINEAR):
        SealContext.create(circuit.ring, "ckks", 0)  # raises unless SEAL's 128-bit table takes it
    bits = sum(prime.bit_length() for prime in SQUARE.ring.primes)
    assert bits == 50 + 3 * 36 + 50


def test_a_key_neither_prints_nor_pickles(holder: TailKeyHolder) -> None:
    assert repr(holder) == f"<TailKeyHolder {holder.digest.hex()[:16]}>"
    with pytest.raises(TypeError):
        pickle.dumps(holder)


def test_the_secret_is_drawn_from_the_injected_randomness() -> None:
    counter = count()

    def fixed(size: int) -> bytes:
        return bytes((next(counter) * 7 + i) % 251 for i in range(size))

    holder = TailKeyHolder(random_tail(LINEAR).card, random=fixed)
    assert next(counter) >= 1
    # Errors and seeds are SEAL's own, so the evaluation keys differ all the same.
    counter = count()
    assert TailKeyHolder(random_tail(LINEAR).card, random=fixed).digest != holder.digest


def test_a_tail_comes_back_from_its_bytes() -> None:
    again = TailModel.from_bytes(TAIL.to_bytes())
    features = random_features(TAIL, 8)
    assert (again.logits(features) == TAIL.logits(features)).all()
    assert again.card.digest == TAIL.card.digest
    assert repr(TAIL) == "<TailModel v1 square-8192/1>"


@pytest.mark.parametrize(
    "change",
    [
        {"weights": np.zeros((64, 127))},
        {"output": np.zeros(64)},
        {"weights": np.full((64, 127), 1e3), "output": np.full(64, 1.0)},
        {"weights": np.full((64, 127), 1e4), "output": np.full(64, 1e-9)},
        {"deviation": np.zeros(127)},
        {"bias": np.full(64, np.nan)},
        {"mean": np.zeros(5)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_tails_that_cannot_be_computed_are_refused(change: dict[str, np.ndarray]) -> None:
    with pytest.raises(ParameterRefused):
        replace(TAIL, **change)


def test_large_logits_are_scaled_and_come_back_whole() -> None:
    tail = replace(TAIL, output=TAIL.output * 200)
    assert tail.answer_scale < 1
    holder, evaluator = TailKeyHolder(tail.card), TailEvaluator(tail)
    feature = random_features(tail, 1)
    answer = evaluator.evaluate(evaluator.load_keys(holder.evaluation_keys), holder.encrypt(feature[0]))
    assert holder.decrypt(answer) == pytest.approx(tail.logits(feature)[0], abs=0.05)


def test_the_worst_feature_stays_within_the_bound() -> None:
    signs = np.sign(TAIL.weights[0]) * CLIP * 5
    worst = (signs * TAIL.deviation + TAIL.mean)[None]
    logit = TAIL.logits(worst)[0] * TAIL.answer_scale
    assert abs(logit) <= 2.0**SQUARE.answer_bits


@pytest.mark.parametrize(
    "change",
    [
        {"deviation": [1.0] * 126},
        {"deviation": [0.0] * 127},
        {"mean": [float("1e309")] * 127},
        {"answer_scale": 2.0},
        {"mean": [0.0] * 200, "deviation": [1.0] * 200},
    ],
)
def test_a_card_from_a_lying_cloud_is_refused(change: dict[str, object]) -> None:
    import msgspec  # noqa: PLC0415

    card = msgspec.structs.replace(TAIL.card, **change)
    with pytest.raises(Refused):
        TailCard.parse(msgspec.json.encode(card, order="sorted"))


def test_features_that_do_not_fit_are_refused(holder: TailKeyHolder) -> None:
    with pytest.raises(ParameterRefused, match="127"):
        holder.encrypt(np.zeros(126))
    with pytest.raises(ParameterRefused, match="finite"):
        holder.encrypt(np.full(127, np.nan))
