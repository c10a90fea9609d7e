"""What only paillier has: its key, its table, its estimate."""

import itertools

import gmpy2
import numpy as np
import phe
import pytest
from blindsum.crypto.errors import Refused
from blindsum.crypto.schemes.homomorphic.cipher import (
    CipherParameters,
    KeyPair,
    aggregator_cipher,
    choose_parameters,
    generate_keys,
    member_cipher,
)
from blindsum.crypto.schemes.homomorphic.paillier import PaillierMember, PaillierSeconds, estimate_seconds


@pytest.fixture(scope="module")
def parameters() -> CipherParameters:
    return choose_parameters("paillier", 16, 128, length=200)


@pytest.fixture(scope="module")
def keys(parameters: CipherParameters) -> KeyPair:
    return generate_keys(parameters)


def split(parameters: CipherParameters, keys: KeyPair) -> tuple[int, int, int, int]:
    size = parameters.modulus_bits // 8
    body = keys.public[len(parameters.key_label) :]
    half = len(keys.secret) // 2
    return (
        int.from_bytes(body[:size], "big"),
        int.from_bytes(body[size:], "big"),
        int.from_bytes(keys.secret[:half], "big"),
        int.from_bytes(keys.secret[half:], "big"),
    )


def test_the_key_is_one_for_short_exponents(parameters: CipherParameters, keys: KeyPair) -> None:
    n, h_s, p, q = split(parameters, keys)
    assert n == p * q
    assert n.bit_length() == 3072
    assert p % 4 == q % 4 == 3
    assert gmpy2.is_prime(p)
    assert gmpy2.is_prime(q)
    assert gmpy2.gcd(p - 1, q - 1) == 2
    # h_s is an n-th power: its order divides (p - 1)(q - 1), and h = -x^2 has Jacobi symbol 1.
    assert pow(h_s, (p - 1) * (q - 1) // 2, n * n) == 1
    assert gmpy2.jacobi(h_s, n) == 1


def test_phe_alone_decrypts_our_ciphertext(parameters: CipherParameters, keys: KeyPair) -> None:
    n, _, p, q = split(parameters, keys)
    frame = member_cipher(parameters, keys.public, keys.secret).encrypt(np.array([5, 7], np.uint32))
    private = phe.PaillierPrivateKey(phe.PaillierPublicKey(n), p, q)
    plain = private.raw_decrypt(int.from_bytes(frame[16 : 16 + 768], "big"))
    assert plain == 5 | 7 << parameters.field_bits


def test_an_obfuscator_is_the_power_it_should_be(parameters: CipherParameters, keys: KeyPair) -> None:
    """The table and the Chinese remainder theorem against one plain power."""
    n, h_s, _, _ = split(parameters, keys)
    calls = itertools.count(1)

    def counted(size: int) -> bytes:
        return next(calls).to_bytes(2, "little") * (size // 2)

    member = PaillierMember(parameters, keys.public, keys.secret, counted)
    frame = member.encrypt(np.zeros(1, np.uint32))
    for i in range(parameters.ciphertexts_per_frame):
        r = int.from_bytes((i + 1).to_bytes(2, "little") * 96, "little")
        found = int.from_bytes(frame[16 + 768 * i : 16 + 768 * (i + 1)], "big")
        assert found == pow(h_s, r, n * n)


def test_copies_add_up_to_the_whole_cohort(parameters: CipherParameters, keys: KeyPair) -> None:
    """128 members at their largest values: no carry leaves a lane."""
    member = member_cipher(parameters, keys.public, keys.secret)
    aggregator = aggregator_cipher(parameters, keys.public)
    size = parameters.fields_per_frame
    frame = member.encrypt(np.full(size, parameters.largest_value, np.uint32))
    total = None
    for _ in range(parameters.n_max):
        total = aggregator.add(total, frame)
    assert total is not None
    opened = member.decrypt(aggregator.finish(total), size, parameters.n_max)
    assert set(opened.tolist()) == {parameters.n_max * parameters.largest_value}


def test_a_public_key_with_a_bad_base_or_modulus_is_refused(
    parameters: CipherParameters, keys: KeyPair
) -> None:
    head = len(parameters.key_label)
    size = parameters.modulus_bits // 8
    for public in (
        keys.public[: head + size] + bytes(2 * size),
        keys.public[: head + size] + b"\xff" * (2 * size),
        keys.public[:head] + bytes(size) + keys.public[head + size :],
        keys.public[: head + size - 1] + b"\0" + keys.public[head + size :],
    ):
        with pytest.raises(Refused):
            aggregator_cipher(parameters, public)


def test_the_estimate_follows_the_clock_and_the_size() -> None:
    def taking(step: float, ciphertexts: int) -> PaillierSeconds:
        ticks = itertools.count()
        return estimate_seconds(2048, ciphertexts, lambda: next(ticks) * step)

    one, slow, long = taking(0.001, 100), taking(0.002, 100), taking(0.001, 1000)
    assert slow.round == pytest.approx(2 * one.round)
    assert long.round == pytest.approx(10 * one.round)
    assert long.tables == one.tables > 0
