"""The frame ciphers of the homomorphic schemes: what they promise, and how to get one.

A vector is a flat sequence of integer fields, cut into frames of `fields_per_frame`. A member turns
each frame into exactly `upload_frame_bytes` bytes; the aggregator keeps exactly `sum_frame_bytes`
bytes a frame, whatever the number of members, and publishes `result_frame_bytes`. Every cipher can be
rebuilt in another process from a parameter set's name, (bits, n_max) and key bytes, and holds no state
between calls.

Frames start with the first 16 bytes of the key id, so that a sum under two keys is refused.
"""

import hashlib
import re
from dataclasses import dataclass, field
from typing import Literal, NoReturn, Protocol

import numpy as np
from blindsum.crypto.errors import EncodingError, ParameterRefused, RefusalReason, Refused
from blindsum.crypto.primitives.derivation import Random, labelled_hash, system_random
from numpy.typing import NDArray

SchemeName = Literal["bfv", "ckks", "paillier"]
UploadForm = Literal["seeded", "public-key"]
Fields = NDArray[np.uint32] | NDArray[np.uint64]

KEY_TAG_BYTES = 16
MINIMUM_SECURITY = 128
DEFAULT_CIPHERTEXTS = 8
LARGEST_COHORT = 1 << 20  # with 32 bits a sum has 52: below the 53 that every decoder holds exactly


@dataclass(frozen=True)
class Ring:
    """Z_q[x]/(x^degree + 1), q the product of `data`; `special` is SEAL's key-switching prime.

    No ciphertext of ours has a residue modulo `special`, but keys do, so security is counted with it.
    """

    degree: int
    data: tuple[int, ...]
    special: int

    @property
    def modulus(self) -> int:
        """q: the product of the data primes."""
        product = 1
        for prime in self.data:
            product *= prime
        return product

    @property
    def primes(self) -> tuple[int, ...]:
        """All primes of a key, the special one last."""
        return (*self.data, self.special)

    @property
    def chain(self) -> str:
        """Degree and prime sizes, as in '4096-60.49'."""
        return f"{self.degree}-" + ".".join(str(prime.bit_length()) for prime in self.primes)


@dataclass(frozen=True)
class CipherParameters:
    """A named, versioned parameter set, proved for (bits, n_max). Made only by `choose_parameters`.

    `fields_per_unit` fields of `field_bits` bits share a unit: a BFV coefficient, a CKKS complex slot
    or a Paillier plaintext. `noise_bound` stays below `noise_limit` after n_max additions (BFV: units
    of q; CKKS: quantisation steps; Paillier: both zero), except with probability at most
    2^`failure_log2` over a whole round of up to 2^30 fields; minus infinity means that it can't fail.
    """

    name: str
    scheme: SchemeName
    bits: int
    n_max: int
    security_bits: int
    upload_form: UploadForm
    key_label: str
    ciphertexts_per_frame: int
    fields_per_unit: int
    field_bits: int
    fields_per_frame: int
    upload_frame_bytes: int
    sum_frame_bytes: int
    result_frame_bytes: int
    noise_bound: float
    noise_limit: float
    failure_log2: float
    ring: Ring | None = None
    plain_bits: int = 0
    scale_bits: int = 0
    modulus_bits: int = 0

    @property
    def largest_value(self) -> int:
        """The largest field of one member."""
        return (1 << self.bits) - 1

    def frames(self, fields: int) -> int:
        """How many frames carry a vector of that many fields."""
        return -(-fields // self.fields_per_frame)


@dataclass(frozen=True, repr=False)
class KeyPair:
    """A homomorphic key: `public` for everyone, `secret` for members only, never for the aggregator."""

    public: bytes
    secret: bytes = field(repr=False)

    @property
    def key_id(self) -> bytes:
        """SHA-256 of the public part: what roster, header and frames name the key by."""
        return hashlib.sha256(self.public).digest()

    def __repr__(self) -> str:
        return f"KeyPair({self.key_id.hex()[:16]})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a homomorphic key pair is never pickled; seal its secret to a member instead")


class MemberCipher(Protocol):
    """A key holder's side of a scheme."""

    parameters: CipherParameters
    max_error: float
    """The largest distance from an integer seen before rounding, in steps; 0 for exact schemes."""

    def encrypt(self, fields: Fields) -> bytes:
        """A frame with fresh randomness from at most `fields_per_frame` fields (missing ones are 0).

        Raises `EncodingError` for values above `parameters.largest_value` or too many of them.
        """

    def decrypt(self, frame: bytes | memoryview, count: int, contributions: int) -> NDArray[np.uint64]:
        """The first `count` summed fields of a published sum frame to which `contributions` members added.

        Raises `Refused` for a malformed frame, `OpeningFailed` when it doesn't open to a possible sum.
        """


class AggregatorCipher(Protocol):
    """The aggregator's side of a scheme: public material only."""

    parameters: CipherParameters
    native: bool
    """Whether frames reach a native library: then a service does it in processes that may die."""

    def check(self, frame: bytes | memoryview) -> None:
        """Raises `Refused` unless the frame is one that `add` accepts."""

    def add(self, total: bytes | bytearray | None, frame: bytes | memoryview) -> bytearray:
        """The running sum with one more upload; None is the empty sum.

        May change and return a `total` that is a bytearray. Raises `Refused` and leaves it as it was.
        """

    def finish(self, total: bytes | bytearray) -> bytes:
        """The published form of a running sum: what `MemberCipher.decrypt` takes."""

    def seeds(self, frame: bytes | memoryview) -> tuple[bytes, ...]:
        """What must never repeat under a key (protocols.md section 4): a digest for each ciphertext."""


def choose_parameters(
    scheme: str,
    bits: int,
    n_max: int,
    *,
    form: UploadForm = "seeded",
    length: int | None = None,
    modulus_bits: int = 3072,
    minimum_security: int = MINIMUM_SECURITY,
) -> CipherParameters:
    """The cheapest parameter set that is exact for `n_max` members with fields of `bits` bits.

    `length` (fields of a vector) trims the frame so that short vectors aren't padded to a long frame.
    `modulus_bits` counts for paillier only; 2048 has 112 bits of security, so a policy that allows it
    passes `minimum_security=112`. Raises `ParameterRefused`, saying which bits would fit.
    """
    if not 1 <= n_max <= LARGEST_COHORT:
        raise ParameterRefused(f"n_max is between 1 and {LARGEST_COHORT}, not {n_max}")
    if length is not None and length < 1:
        raise ParameterRefused(f"a vector has at least one field, not {length}")
    chosen = _fitting(scheme, bits, n_max, form, length, modulus_bits)
    if isinstance(chosen, str):
        fits = next(
            (b for b in range(min(bits, 33) - 1, 0, -1) if not _fails(scheme, b, n_max, form, modulus_bits)),
            None,
        )
        hint = f"up to {fits} bits would fit" if fits else "no number of bits would fit; lower n_max"
        raise ParameterRefused(f"{scheme} with {bits} bits and {n_max} members: {chosen}; {hint}")
    return _secure(chosen, minimum_security)


def restore_parameters(
    name: str, bits: int, n_max: int, *, minimum_security: int = MINIMUM_SECURITY
) -> CipherParameters:
    """The set of that name, chosen and proved again for (bits, n_max). Raises `ParameterRefused`."""
    family, _, rest = name.partition("-")
    found = re.fullmatch(r"([0-9]{4})-.*-k([1-9][0-9]{0,2})(-seeded|-publickey)?/1", rest)
    chosen: CipherParameters | str = "unknown"
    if found is not None and int(found[2]) <= _default_ciphertexts(family):
        form: UploadForm = "seeded" if found[3] == "-seeded" else "public-key"
        chosen = _fitting(family, bits, n_max, form, None, int(found[1]), int(found[2]))
    if isinstance(chosen, str) or chosen.name != name:
        raise ParameterRefused(f"there is no parameter set {name[:80]!r} for {bits} bits and {n_max} members")
    return _secure(chosen, minimum_security)


def _secure(chosen: CipherParameters, minimum: int) -> CipherParameters:
    if chosen.security_bits < minimum:
        raise ParameterRefused(
            f"{chosen.name} has about {chosen.security_bits} bits of security, {minimum} are required"
        )
    return chosen


def _default_ciphertexts(scheme: str) -> int:
    return 256 if scheme == "paillier" else DEFAULT_CIPHERTEXTS


def _fails(scheme: str, bits: int, n_max: int, form: UploadForm, modulus_bits: int) -> bool:
    return isinstance(_fitting(scheme, bits, n_max, form, None, modulus_bits), str)


def _fitting(
    scheme: str,
    bits: int,
    n_max: int,
    form: UploadForm,
    length: int | None,
    modulus_bits: int,
    ciphertexts: int | None = None,
) -> CipherParameters | str:
    """A parameter set, or why there is none."""
    if scheme not in ("bfv", "ckks", "paillier"):
        raise ParameterRefused(f"there is no homomorphic scheme {scheme!r}; choose bfv, ckks or paillier")
    if not 1 <= bits <= 32:
        return f"a field has between 1 and 32 bits, not {bits}"
    count = ciphertexts or _default_ciphertexts(scheme)
    if scheme == "paillier":
        from blindsum.crypto.schemes.homomorphic import paillier_parameters  # noqa: PLC0415

        return paillier_parameters.choose(bits, n_max, modulus_bits, count, length)
    from blindsum.crypto.schemes.homomorphic import lattice_parameters  # noqa: PLC0415

    choose = lattice_parameters.choose_bfv if scheme == "bfv" else lattice_parameters.choose_ckks
    return choose(bits, n_max, form, count, length)


def trimmed(count: int, fields_per_ciphertext: int, length: int | None) -> int:
    """Ciphertexts a frame, at most `count`, so that the frames of a vector are evenly filled."""
    if length is None:
        return count
    needed = -(-length // fields_per_ciphertext)
    return -(-needed // -(-needed // count))


def generate_keys(parameters: CipherParameters, random: Random = system_random) -> KeyPair:
    """A fresh key pair, made by the owner. Raises `MissingExtra` without the scheme's extra."""
    if parameters.scheme == "paillier":
        from blindsum.crypto.schemes.homomorphic import paillier  # noqa: PLC0415

        return paillier.generate_keys(parameters, random)
    from blindsum.crypto.schemes.homomorphic import seal_keys  # noqa: PLC0415

    return seal_keys.generate_keys(parameters, random)


def member_cipher(parameters: CipherParameters, public: bytes, secret: bytes) -> MemberCipher:
    """A key holder's cipher from stored bytes. Raises `Refused` when they don't belong together."""
    if parameters.scheme == "paillier":
        from blindsum.crypto.schemes.homomorphic import paillier  # noqa: PLC0415

        return paillier.PaillierMember(parameters, public, secret)
    if parameters.scheme == "bfv":
        from blindsum.crypto.schemes.homomorphic import bfv  # noqa: PLC0415

        return bfv.BfvMember(parameters, public, secret)
    from blindsum.crypto.schemes.homomorphic import ckks  # noqa: PLC0415

    return ckks.CkksMember(parameters, public, secret)


def aggregator_cipher(parameters: CipherParameters, public: bytes) -> AggregatorCipher:
    """The aggregator's cipher. bfv and ckks need no extra here: the arithmetic is numpy's."""
    if parameters.scheme == "paillier":
        from blindsum.crypto.schemes.homomorphic import paillier  # noqa: PLC0415

        return paillier.PaillierAggregator(parameters, public)
    from blindsum.crypto.schemes.homomorphic import lattice  # noqa: PLC0415

    return lattice.LatticeAggregator(parameters, public)


def key_tag(public: bytes) -> bytes:
    """What each frame under a key starts with."""
    return hashlib.sha256(public).digest()[:KEY_TAG_BYTES]


def check_envelope(frame: bytes | bytearray | memoryview, size: int, tag: bytes, what: str) -> memoryview:
    """The body of a frame after its key tag. Raises `Refused` for another size or another key."""
    if len(frame) != size:
        raise Refused(RefusalReason.WRONG_SIZE, f"{what} has {len(frame)} bytes, {size} expected")
    if frame[:KEY_TAG_BYTES] != tag:
        raise Refused(RefusalReason.WRONG_DIGEST, f"{what} is under another key")
    return memoryview(frame)[KEY_TAG_BYTES:]


def check_fields(parameters: CipherParameters, fields: Fields) -> NDArray[np.uint64]:
    """The fields of one frame as uint64, padded with zeros to `fields_per_frame`."""
    if fields.ndim != 1 or fields.dtype not in (np.dtype(np.uint32), np.dtype(np.uint64)):
        raise EncodingError("frame", "fields are a flat array of uint32 or uint64")
    if fields.size > parameters.fields_per_frame:
        raise EncodingError("frame", f"{fields.size} fields, but a frame holds {parameters.fields_per_frame}")
    if fields.size and int(fields.max()) > parameters.largest_value:
        raise EncodingError("frame", f"a field is above {parameters.largest_value}")
    padded = np.zeros(parameters.fields_per_frame, np.uint64)
    padded[: fields.size] = fields
    return padded


def check_opening(parameters: CipherParameters, count: int, contributions: int) -> None:
    """Raises `ParameterRefused` for a request that no frame can answer."""
    if not 0 <= count <= parameters.fields_per_frame:
        raise ParameterRefused(f"a frame holds {parameters.fields_per_frame} fields, {count} were asked for")
    if not 1 <= contributions <= parameters.n_max:
        raise ParameterRefused(f"{contributions} contributions are outside 1 to {parameters.n_max}")


def seed_digest(seed: bytes) -> bytes:
    """A seed's entry in the list of those already seen under a key."""
    return labelled_hash("he seed", seed)
