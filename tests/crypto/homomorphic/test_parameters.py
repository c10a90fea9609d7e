"""Parameter sets: what is chosen, what is refused, and what the refusal says."""

from collections.abc import Mapping

import pytest
from blindsum.crypto.errors import OpeningFailed, ParameterRefused
from blindsum.crypto.schemes.homomorphic.cipher import (
    Ring,
    UploadForm,
    choose_parameters,
    generate_keys,
    restore_parameters,
)
from blindsum.crypto.schemes.homomorphic.seal_wire import SealContext

COHORTS = [(16, 2), (16, 7), (16, 128), (16, 1000), (22, 16), (22, 128), (8, 7), (1, 1), (12, 100_000)]


@pytest.mark.parametrize(("bits", "n_max"), COHORTS)
@pytest.mark.parametrize("form", ["seeded", "public-key"])
@pytest.mark.parametrize("scheme", ["bfv", "ckks", "paillier"])
def test_sets_are_secure_proved_and_restored_by_name(
    scheme: str, form: UploadForm, bits: int, n_max: int
) -> None:
    chosen = choose_parameters(scheme, bits, n_max, form=form)
    assert restore_parameters(chosen.name, bits, n_max) == chosen
    assert chosen.security_bits >= 128
    assert chosen.noise_bound <= chosen.noise_limit
    assert chosen.failure_log2 <= -40
    assert (1 << chosen.field_bits) > n_max * chosen.largest_value
    assert chosen.upload_frame_bytes <= 1 << 20
    assert chosen.sum_frame_bytes <= 16 + (1 << 20)
    if chosen.ring is not None:
        # Homomorphic Encryption Standard, table 1: 109 bits in all at degree 4096.
        assert chosen.ring.degree == 4096
        assert sum(prime.bit_length() for prime in chosen.ring.primes) <= 109
        assert len(set(chosen.ring.primes)) == len(chosen.ring.primes)
        assert all(prime % 8192 == 1 for prime in chosen.ring.primes)
        if scheme == "bfv":
            # The largest sum fits below t, and t * 4 * noise below q.
            assert chosen.fields_per_unit * chosen.field_bits == chosen.plain_bits
            assert chosen.noise_bound * (4 << chosen.plain_bits) <= chosen.ring.modulus


@pytest.mark.parametrize(
    ("scheme", "form", "n_max", "most"),
    [
        ("bfv", "seeded", 128, 4.1),
        ("bfv", "public-key", 128, 8.1),
        ("bfv", "seeded", 1000, 5.6),
        ("ckks", "seeded", 128, 8.2),
        ("paillier", "public-key", 128, 6.5),
    ],
)
def test_bytes_of_a_million_16_bit_fields(scheme: str, form: UploadForm, n_max: int, most: float) -> None:
    chosen = choose_parameters(scheme, 16, n_max, form=form)
    assert chosen.frames(1_000_000) * chosen.upload_frame_bytes <= most * 1_000_000


def test_the_design_chain_is_chosen_for_128_members() -> None:
    assert choose_parameters("bfv", 16, 128).name == "bfv-4096-60.49-t46x2-k8-seeded/1"


def test_a_short_vector_gets_a_short_frame() -> None:
    whole = choose_parameters("bfv", 16, 7)
    short = choose_parameters("bfv", 16, 7, length=9000)
    assert (whole.ciphertexts_per_frame, short.ciphertexts_per_frame) == (8, 2)
    assert restore_parameters(short.name, 16, 7) == short
    long = choose_parameters("bfv", 16, 7, length=9 * 8192)
    assert (long.ciphertexts_per_frame, long.frames(9 * 8192)) == (5, 2)


@pytest.mark.parametrize(
    ("scheme", "bits", "n_max", "options", "says"),
    [
        ("bfv", 33, 2, {}, "up to 32 bits would fit"),
        ("bfv", 0, 2, {}, "between 1 and 32"),
        ("bfv", 16, 0, {}, "n_max is between"),
        ("bfv", 32, 1 << 22, {}, "n_max is between"),
        ("ckks", 32, 128, {}, r"double-precision.*up to \d+ bits would fit"),
        ("paillier", 16, 7, {"modulus_bits": 2048}, "112 bits of security, 128 are required"),
        ("paillier", 16, 7, {"modulus_bits": 1024}, "modulus_bits is one of"),
        ("plaintext", 16, 7, {}, "no homomorphic scheme"),
        ("bfv", 16, 7, {"length": 0}, "at least one field"),
    ],
)
def test_refusals_say_what_would_fit(
    scheme: str, bits: int, n_max: int, options: Mapping[str, int], says: str
) -> None:
    with pytest.raises(ParameterRefused, match=says):
        choose_parameters(scheme, bits, n_max, **options)  # type: ignore[arg-type]


def test_2048_bits_need_a_policy_that_says_so() -> None:
    chosen = choose_parameters("paillier", 16, 7, modulus_bits=2048, minimum_security=112)
    assert restore_parameters(chosen.name, 16, 7, minimum_security=112) == chosen
    with pytest.raises(ParameterRefused, match="112"):
        restore_parameters(chosen.name, 16, 7)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "bfv",
        "bfv-4096-60.49-t46x2-k8-seeded/2",
        "bfv-4096-60.49-t46x2-k9-seeded/1",
        "bfv-4096-60.49-t46x2-k0-seeded/1",
        "bfv-2048-60.49-t46x2-k8-seeded/1",
        "bfv-4096-60.60-t46x2-k8-seeded/1",
        "bfv-4096-60.50-t46x2-k8-seeded/1",
        "bfv-8192-60.49-t46x2-k8-seeded/1",
        "ckks-4096-60.49-t46x2-k8-seeded/1",
        "paillier-1024-l44x23-k256/1",
        "bfv-4096-60.49-t46x2-k8-seeded/1\n",
    ],
)
def test_only_proved_sets_have_a_name(name: str) -> None:
    with pytest.raises(ParameterRefused):
        restore_parameters(name, 16, 128)


def test_a_set_is_bound_to_its_cohort() -> None:
    with pytest.raises(ParameterRefused):
        restore_parameters(choose_parameters("bfv", 16, 7).name, 16, 128)


def test_a_key_pair_hides_its_secret() -> None:
    keys = generate_keys(choose_parameters("bfv", 16, 7))
    assert keys.secret.hex()[:32] not in repr(keys)
    assert repr(keys) == f"KeyPair({keys.key_id.hex()[:16]})"
    with pytest.raises(TypeError, match="never pickled"):
        keys.__reduce__()


@pytest.mark.parametrize("scheme", ["bfv", "ckks"])
def test_seal_itself_refuses_a_chain_below_128_bits(scheme: str) -> None:
    """Our choice is checked again by the library's own table when a key holder opens its key."""
    good = choose_parameters(scheme, 16, 128).ring
    assert good is not None
    # The largest 60-bit and 50-bit primes that are 1 modulo 8192: one bit more than the standard's 109.
    weak = Ring(4096, (1152921504606830593,), 1125899906826241)
    assert sum(prime.bit_length() for prime in weak.primes) == 110
    assert SealContext.create(good, scheme, 20).ring == good
    with pytest.raises(OpeningFailed, match="SEAL refuses the parameter set"):
        SealContext.create(weak, scheme, 20)


@pytest.mark.parametrize("modulus_bits", [512, 1024, 2047, 2048])
def test_short_paillier_moduli_are_refused(modulus_bits: int) -> None:
    with pytest.raises(ParameterRefused):
        choose_parameters("paillier", 16, 7, modulus_bits=modulus_bits)
