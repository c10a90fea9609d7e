"""Keys of bfv and ckks.

The secret is a uniform ternary polynomial, sampled here from the injected randomness and stored with
two bits a coefficient next to the key's 32-byte name; SEAL gets it in its own transformed form. The
public part carries that name and, in the public-key form only, SEAL's public key. Relinearisation and
Galois keys are never made: sums need neither.
"""

import numpy as np
from blindsum.crypto.errors import RefusalReason, Refused
from blindsum.crypto.primitives.derivation import Random, same, system_random
from blindsum.crypto.schemes.homomorphic.blake2xb import Words
from blindsum.crypto.schemes.homomorphic.cipher import CipherParameters, KeyPair, Ring
from blindsum.crypto.schemes.homomorphic.lattice import LatticePublic, pack_polynomials, public_bytes
from blindsum.crypto.schemes.homomorphic.seal_wire import Native, SealContext
from numpy.typing import NDArray

_NONCE_BYTES = 32
_TRANSFORM_PLAIN_BITS = 20


def generate_keys(parameters: CipherParameters, random: Random = system_random) -> KeyPair:
    """A fresh key for the parameter set's ring. In the seeded form the public part only names the key."""
    ring = parameters.ring
    assert ring is not None
    secret = sample_ternary(ring.degree, random)
    nonce = random(_NONCE_BYTES)
    packed = b""
    if parameters.upload_form == "public-key":
        context = SealContext.create(ring, parameters.scheme, parameters.plain_bits)
        native = load_secret_key(context, secret)
        public_key = context.api.PublicKey()
        context.api.KeyGenerator(context.native, native).create_public_key(public_key)
        parts = context.read_ciphertext(public_key, key_level=True)
        packed = pack_polynomials([np.stack(pair) for pair in zip(*parts, strict=True)], ring.primes)
    return KeyPair(public_bytes(parameters.key_label, nonce, packed), nonce + _pack_ternary(secret))


def parse_secret(ring: Ring, public: LatticePublic, secret: bytes) -> NDArray[np.uint8]:
    """Ternary coefficients (2 stands for -1). Raises `Refused` for another key or malformed bytes."""
    if len(secret) != _NONCE_BYTES + ring.degree // 4:
        raise Refused(RefusalReason.WRONG_SIZE, "the secret key has a wrong size")
    if not same(secret[:_NONCE_BYTES], public.nonce):
        raise Refused(RefusalReason.WRONG_DIGEST, "the secret key belongs to another public key")
    packed = np.frombuffer(secret, np.uint8, offset=_NONCE_BYTES)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)
    coefficients = (packed[:, None] >> shifts).astype(np.uint8).ravel() & np.uint8(3)
    if int(coefficients.max()) > 2:
        raise Refused(RefusalReason.MALFORMED, "the secret key is not ternary")
    return coefficients


def load_secret_key(context: SealContext, secret: NDArray[np.uint8]) -> Native:
    """SEAL's secret key: the ternary polynomial transformed modulo each prime.

    The transform is SEAL's own, by way of a plaintext whose coefficient t - 1 lifts to -1.
    """
    helper = SealContext.create(context.ring, "bfv", _TRANSFORM_PLAIN_BITS)
    minus_one = np.uint64((1 << _TRANSFORM_PLAIN_BITS) - 1)
    lifted: Words = np.where(secret == 2, minus_one, secret.astype(np.uint64))
    plaintext = helper.load_plaintext(lifted)
    evaluator = helper.api.Evaluator(helper.native)
    evaluator.transform_to_ntt_inplace(plaintext, helper.native.key_parms_id())
    return context.load_secret(helper.read_transformed(plaintext))


def sample_ternary(degree: int, random: Random) -> NDArray[np.uint8]:
    """Uniform coefficients over {0, 1, 2}, where 2 stands for -1: bytes of 252 and above are drawn again."""
    found: NDArray[np.uint8] = np.empty(0, np.uint8)
    while found.size < degree:
        drawn = np.frombuffer(random(degree + 256), np.uint8)
        found = np.concatenate([found, drawn[drawn < 252] % np.uint8(3)])
    return found[:degree]


def _pack_ternary(coefficients: NDArray[np.uint8]) -> bytes:
    groups = coefficients.reshape(-1, 4)
    packed = groups[:, 0] | groups[:, 1] << 2 | groups[:, 2] << 4 | groups[:, 3] << 6
    return packed.astype(np.uint8).tobytes()
