"""Hostile bytes: refused with a type, or added as what they are; nothing dies (faults.md 35)."""

import subprocess
import sys

import numpy as np
import pytest
from blindsum.crypto.errors import RefusalReason, Refused
from blindsum.crypto.schemes.homomorphic.cipher import aggregator_cipher, choose_parameters, member_cipher
from blindsum.crypto.schemes.homomorphic.lattice import pack_bits, unpack_bits
from homomorphic_settings import Setting, make_setting
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SLOW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def frame_of(setting: Setting) -> bytes:
    return setting.member.encrypt(np.arange(7, dtype=np.uint32))


@pytest.mark.parametrize("cut", [0, 1, 15, 16, 17, -1])
def test_truncation_is_refused(setting: Setting, cut: int) -> None:
    with pytest.raises(Refused) as refusal:
        setting.aggregator.check(frame_of(setting)[:cut])
    assert refusal.value.reason is RefusalReason.WRONG_SIZE


def test_extension_is_refused(setting: Setting) -> None:
    with pytest.raises(Refused) as refusal:
        setting.aggregator.add(None, frame_of(setting) + b"\0")
    assert refusal.value.reason is RefusalReason.WRONG_SIZE


def test_a_result_is_not_an_upload_and_the_reverse() -> None:
    setting = make_setting(choose_parameters("bfv", 16, 7, length=1))
    frame = frame_of(setting)
    with pytest.raises(Refused):
        setting.member.decrypt(frame, 7, 1)
    with pytest.raises(Refused):
        setting.aggregator.add(None, setting.aggregator.finish(setting.aggregator.add(None, frame)))


def test_values_at_and_above_the_modulus_are_refused(setting: Setting) -> None:
    """The last coefficient or ciphertext set to its modulus and to all ones; one below is fine."""
    frame = frame_of(setting)
    ring = setting.parameters.ring
    if ring is None:
        size = setting.parameters.modulus_bits // 4
        n = int.from_bytes(setting.keys.public[len(setting.parameters.key_label) :][: size // 2], "big")
        cases = [n * n, (1 << 8 * size) - 1, 0, n]
        frames = [frame[:-size] + case.to_bytes(size, "big") for case in cases]
        good = frame[:-size] + (n * n - 1).to_bytes(size, "big")
    else:
        prime = ring.data[-1]
        width = prime.bit_length()
        size = setting.parameters.ciphertexts_per_frame * ring.degree * width // 8
        coefficients = unpack_bits(frame[-size:], width)

        def with_last(value: int) -> bytes:
            coefficients[-1] = value
            return frame[:-size] + pack_bits(coefficients, width)

        frames = [with_last(prime), with_last((1 << width) - 1)]
        good = with_last(prime - 1)
    setting.aggregator.check(good)
    for bad in frames:
        with pytest.raises(Refused) as refusal:
            setting.aggregator.check(bad)
        assert refusal.value.reason is RefusalReason.OUT_OF_RANGE
        with pytest.raises(Refused):
            setting.aggregator.add(None, bad)


def test_a_seed_used_twice_in_a_frame_is_refused() -> None:
    setting = make_setting(choose_parameters("bfv", 16, 7, length=9000))
    frame = frame_of(setting)
    with pytest.raises(Refused, match="one seed twice"):
        setting.aggregator.check(frame[:16] + frame[16:80] * 2 + frame[144:])


def test_a_damaged_running_sum_is_noticed(setting: Setting) -> None:
    total = setting.aggregator.add(None, frame_of(setting))
    with pytest.raises(Refused):
        setting.aggregator.add(total[:-1], frame_of(setting))
    with pytest.raises(Refused):
        setting.aggregator.finish(b"\0" * 16 + total[16:])
    if setting.parameters.ring is not None:
        total[-8:] = b"\xff" * 8
        with pytest.raises(Refused, match="damaged"):
            setting.aggregator.finish(total)


@pytest.mark.parametrize("scheme", ["bfv", "ckks"])
def test_a_negated_copy_stops_no_round(scheme: str) -> None:
    """SEAL refuses to add v and -v ("transparent"); our sum goes on, and the opening stays typed."""
    setting = make_setting(choose_parameters(scheme, 16, 7, form="public-key", length=1))
    ring = setting.parameters.ring
    assert ring is not None
    frame = frame_of(setting)
    width, prime = ring.data[0].bit_length(), np.uint64(ring.data[0])
    half = (len(frame) - 16) // 2
    parts = (unpack_bits(frame[start : start + half], width) for start in (16, 16 + half))
    negated = frame[:16] + b"".join(pack_bits((prime - part) % prime, width) for part in parts)
    total = setting.aggregator.add(setting.aggregator.add(None, frame), negated)
    assert not any(total[16:])
    honest = setting.aggregator.add(bytearray(total), frame)
    opened = setting.member.decrypt(setting.aggregator.finish(honest), 7, 3)
    assert opened.tolist() == list(range(7))
    cancelled = setting.member.decrypt(setting.aggregator.finish(total), 7, 2)
    assert cancelled.tolist() == [0] * 7


@pytest.mark.parametrize("position", [0, 5, 40, -1])
def test_mutated_keys_are_refused_or_do_not_open(setting: Setting, position: int) -> None:
    secret = bytearray(setting.keys.secret)
    secret[position] ^= 0xFF
    with pytest.raises(Refused):
        member_cipher(setting.parameters, setting.keys.public, bytes(secret[:-1]))
    public = bytearray(setting.keys.public)
    public[0] ^= 1
    with pytest.raises(Refused):
        aggregator_cipher(setting.parameters, bytes(public))
    with pytest.raises(Refused):
        aggregator_cipher(setting.parameters, setting.keys.public + b"\0")


@SLOW
@given(data=st.data())
def test_mutated_uploads_are_refused_or_added(setting: Setting, data: st.DataObject) -> None:
    frame = bytearray(frame_of(setting))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(frame) - 1))
        piece = data.draw(st.binary(min_size=1, max_size=16))
        frame[start : start + len(piece)] = piece[: len(frame) - start]
    try:
        setting.aggregator.check(bytes(frame))
    except Refused:
        with pytest.raises(Refused):
            setting.aggregator.add(None, bytes(frame))
        return
    total = setting.aggregator.add(None, bytes(frame))
    assert len(total) == setting.parameters.sum_frame_bytes
    assert len(setting.aggregator.finish(total)) == setting.parameters.result_frame_bytes


DECRYPT_MUTATIONS = """
import sys
import numpy as np
from blindsum.crypto.errors import OpeningFailed, Refused
from blindsum.crypto.schemes.homomorphic.cipher import (
    aggregator_cipher, choose_parameters, generate_keys, member_cipher)
generator = np.random.default_rng(5)
parameters = choose_parameters(sys.argv[1], 16, 7, length=1)
keys = generate_keys(parameters)
member = member_cipher(parameters, keys.public, keys.secret)
aggregator = aggregator_cipher(parameters, keys.public)
good = aggregator.finish(aggregator.add(None, member.encrypt(np.arange(9, dtype=np.uint32))))
counts = {"refused": 0, "failed": 0, "opened": 0}
cases = [good[:16] + bytes(len(good) - 16)]
for _ in range(300):
    frame = bytearray(good)
    for _ in range(generator.integers(1, 4)):
        frame[generator.integers(16, len(frame))] ^= int(generator.integers(1, 256))
    cases.append(bytes(frame))
for case in cases:
    try:
        opened = member.decrypt(case, 9, 1)
        assert opened.max() <= 65535
        counts["opened"] += 1
    except Refused:
        counts["refused"] += 1
    except OpeningFailed:
        counts["failed"] += 1
print(counts["refused"], counts["failed"], counts["opened"])
"""


@pytest.mark.parametrize("scheme", ["bfv", "ckks"])
def test_mutated_sums_fail_typed_in_the_native_library(scheme: str) -> None:
    """SEAL opens what a lying aggregator publishes; in its own process, so that a crash is seen."""
    ended = subprocess.run(
        [sys.executable, "-c", DECRYPT_MUTATIONS, scheme],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    refused, failed, opened = map(int, ended.stdout.split())
    assert refused + failed + opened == 301
    assert failed >= 150  # most reach SEAL and are caught after it
