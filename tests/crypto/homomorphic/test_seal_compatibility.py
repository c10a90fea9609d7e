"""Our seed expansion against SEAL's own, and SEAL's layout as we read it."""

import ctypes
import hashlib
import os
from collections.abc import Iterator

import numpy as np
import pytest
from blindsum.crypto.schemes.homomorphic import blake2xb
from blindsum.crypto.schemes.homomorphic.blake2xb import expand_uniform, numpy_stream, seal_stream
from blindsum.crypto.schemes.homomorphic.cipher import choose_parameters, generate_keys
from blindsum.crypto.schemes.homomorphic.lattice import parse_public
from blindsum.crypto.schemes.homomorphic.seal_keys import load_secret_key, parse_secret
from blindsum.crypto.schemes.homomorphic.seal_wire import SealContext


@pytest.fixture(params=["numpy", "binary"])
def either_stream(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """BLAKE2Xb in numpy, as without TenSEAL, and by TenSEAL's binary."""
    if request.param == "numpy":
        monkeypatch.setattr(blake2xb, "seal_stream", lambda: None)
    else:
        assert seal_stream() is not None


@pytest.fixture
def uncached() -> Iterator[None]:
    seal_stream.cache_clear()
    yield
    seal_stream.cache_clear()


@pytest.mark.usefixtures("either_stream")
def test_the_stream_is_seals_own() -> None:
    """Known answer: words of SEAL's Blake2xbPRNG, across a refill."""
    sealapi = pytest.importorskip("tenseal.sealapi")
    seed = hashlib.sha512(b"a fixed seed").digest()
    factory = sealapi.Blake2xbPRNGFactory(
        [int.from_bytes(seed[i : i + 8], "little") for i in range(0, 64, 8)]
    )
    generator = factory.create()
    native = [generator.generate() | generator.generate() << 32 for _ in range(1024)]
    # Below a prime this close to 2^60, reduction leaves the words' lower bits.
    (ours,) = expand_uniform([seed], 1024, [(1 << 60) - (1 << 14) + 1])
    assert ours[0].tolist() == [word % ((1 << 60) - (1 << 14) + 1) for word in native]


@pytest.mark.usefixtures("either_stream")
def test_rejected_words_are_drawn_again_in_order() -> None:
    """With a modulus just above 2^63 nearly half of the words are rejected; compare a plain model."""
    prime = (1 << 63) + 29
    seed = bytes(range(64))
    (wide,) = expand_uniform([seed], 4096, [(1 << 64) - 59])
    stream = iter(wide[0].tolist())
    words = [next(stream) for _ in range(512)]
    bound = (1 << 64) - 1 - ((1 << 64) - 1) % prime - 1
    expected = [(word if word < bound else next(w for w in stream if w < bound)) % prime for word in words]
    (ours,) = expand_uniform([seed], 512, [prime])
    assert ours[0].tolist() == expected


@pytest.mark.usefixtures("either_stream")
@pytest.mark.parametrize(("scheme", "n_max"), [("bfv", 7), ("bfv", 1000), ("ckks", 128)])
def test_seal_expands_a_seeded_ciphertext_to_the_same_polynomials(scheme: str, n_max: int) -> None:
    parameters = choose_parameters(scheme, 16, n_max)
    ring = parameters.ring
    assert ring is not None
    keys = generate_keys(parameters)
    context = SealContext.create(ring, scheme, parameters.plain_bits)
    secret = parse_secret(ring, parse_public(parameters, keys.public), keys.secret)
    encryptor = context.api.Encryptor(context.native, load_secret_key(context, secret))
    half = encryptor.encrypt_zero_symmetric()
    seed, first = context.read_seeded(half)
    whole = context.api.Ciphertext()
    context.reload(half, whole)
    parts = context.read_ciphertext(whole)
    np.testing.assert_array_equal(np.stack(parts[0]), np.stack(first))
    expanded = expand_uniform([seed], ring.degree, ring.data)
    np.testing.assert_array_equal(np.stack(parts[1]), np.stack([e[0] for e in expanded]))


def test_both_streams_are_the_same() -> None:
    stream = seal_stream()
    assert stream is not None
    seeds = [os.urandom(64) for _ in range(3)] + [bytes(64)]
    np.testing.assert_array_equal(stream(seeds, 9), numpy_stream(seeds, 9))


class _Liar:
    """A library whose function of that name does something else."""

    def __init__(self, path: str) -> None:
        self.blake2xb = lambda out, size, *rest: ctypes.memset(out, 7, size) and 0


class _Empty:
    def __init__(self, path: str) -> None:
        self.path = path


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("library", [_Liar, _Empty])
def test_a_binary_without_that_hash_is_not_used(library: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", library)
    assert seal_stream() is None


@pytest.mark.usefixtures("uncached")
def test_a_missing_binary_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blake2xb, "find_spec", lambda name: None)
    assert seal_stream() is None
    (words,) = expand_uniform([bytes(64)], 512, [(1 << 60) - (1 << 14) + 1])
    assert words.shape == (1, 512)
