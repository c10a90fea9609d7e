"""Paillier (EUROCRYPT 1999) with packed lanes, on phe's key classes.

Encryption is the short-exponent form of Damgard, Jurik and Nielsen (A generalization of Paillier's
public-key system, 2010, section 4.2): with p = q = 3 mod 4 and gcd(p - 1, q - 1) = 2, h = -x^2 and
h_s = h^n mod n^2, a ciphertext is (1 + m n) h_s^r mod n^2 for a fresh r of half the modulus' length.
Powers of h_s come from a fixed-base table: 8 bits of r a multiplication. A key holder knows the
factors and works modulo p^2 and q^2.

phe is GPL-3.0: nothing but this module imports it.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np
from blindsum.crypto.errors import MissingExtra, OpeningFailed, RefusalReason, Refused
from blindsum.crypto.primitives.derivation import Random, system_random
from blindsum.crypto.schemes.homomorphic.cipher import (
    CipherParameters,
    Fields,
    KeyPair,
    check_envelope,
    check_fields,
    check_opening,
    key_tag,
)
from numpy.typing import NDArray

try:
    import gmpy2
    import phe
except ImportError:  # the extra is missing; `_require_extra` says so
    gmpy2 = phe = None

_WINDOW_BITS = 8
_PRIME_ROUNDS = 40
_TIMED_PRODUCTS = 512
_TIMED_POWERS = 4

Integer = Any
"""gmpy2.mpz, which has no type information."""


def _require_extra() -> None:
    if gmpy2 is None:
        raise MissingExtra("paillier", "paillier")


def generate_keys(parameters: CipherParameters, random: Random = system_random) -> KeyPair:
    """A fresh key of `parameters.modulus_bits` bits. Takes seconds at 3072 bits."""
    _require_extra()
    half = parameters.modulus_bits // 2
    while True:
        p, q = _prime(half, random), _prime(half, random)
        if p != q and gmpy2.gcd(p - 1, q - 1) == 2:
            break
    n = p * q
    while True:
        x = gmpy2.mpz(int.from_bytes(random(parameters.modulus_bits // 8 + 16), "big")) % n
        if x > 1 and gmpy2.gcd(x, n) == 1:
            break
    h_s = gmpy2.powmod(-x * x % n, n, n * n)
    size = parameters.modulus_bits // 8
    public = parameters.key_label.encode() + _bytes(n, size) + _bytes(h_s, 2 * size)
    return KeyPair(public, _bytes(p, size // 2) + _bytes(q, size // 2))


def _prime(bits: int, random: Random) -> Integer:
    """A random prime, 3 modulo 4, its two top bits set so that a product of two has full length."""
    while True:
        candidate = gmpy2.mpz(int.from_bytes(random(bits // 8), "big")) | 3 << (bits - 2) | 3
        if gmpy2.is_prime(candidate, _PRIME_ROUNDS):
            return candidate


class _Public:
    """A parsed public key."""

    def __init__(self, parameters: CipherParameters, public: bytes) -> None:
        _require_extra()
        size = parameters.modulus_bits // 8
        label = parameters.key_label.encode()
        if public[: len(label)] != label:
            raise Refused(RefusalReason.MALFORMED, f"the public key isn't one for {parameters.key_label}")
        if len(public) != len(label) + 3 * size:
            raise Refused(RefusalReason.WRONG_SIZE, "the public key has another size than its label says")
        self.size = 2 * size
        self.tag = key_tag(public)
        self.n = gmpy2.mpz(int.from_bytes(public[len(label) : len(label) + size], "big"))
        self.h_s = gmpy2.mpz(int.from_bytes(public[len(label) + size :], "big"))
        self.square = self.n * self.n
        if self.n.bit_length() != parameters.modulus_bits or self.n % 4 != 1:
            raise Refused(RefusalReason.MALFORMED, "the public key's modulus isn't one of ours")
        if not 1 < self.h_s < self.square or gmpy2.gcd(self.h_s, self.n) != 1:
            raise Refused(RefusalReason.MALFORMED, "the public key's base isn't a unit")

    def parse(self, body: memoryview, what: str) -> list[Integer]:
        """Ciphertexts of a frame: units modulo n^2 in their one encoding. Raises `Refused`."""
        found = [
            gmpy2.mpz(int.from_bytes(body[i : i + self.size], "big")) for i in range(0, len(body), self.size)
        ]
        product = gmpy2.mpz(1)
        for ciphertext in found:
            if ciphertext >= self.square:
                raise Refused(RefusalReason.OUT_OF_RANGE, f"{what} has a ciphertext above its modulus")
            product = product * ciphertext % self.n
        # All are units exactly when their product is: one gcd a frame.
        if gmpy2.gcd(product, self.n) != 1:
            raise Refused(RefusalReason.OUT_OF_RANGE, f"{what} has a ciphertext that isn't a unit")
        return found

    def write(self, ciphertexts: list[Integer]) -> bytes:
        return self.tag + b"".join(_bytes(ciphertext, self.size) for ciphertext in ciphertexts)


class _FixedBase:
    """Powers of one base by a table of its powers: one multiplication for each 8 bits of exponent."""

    def __init__(self, base: Integer, modulus: Integer, exponent_bytes: int) -> None:
        self._modulus = modulus
        self._table = []
        for _ in range(exponent_bytes):
            row = [gmpy2.mpz(1)]
            for _ in range((1 << _WINDOW_BITS) - 1):
                row.append(row[-1] * base % modulus)
            self._table.append(row)
            base = row[-1] * base % modulus

    def power(self, exponent: bytes) -> Integer:
        """base^exponent, the exponent little-endian."""
        modulus = self._modulus
        result = gmpy2.mpz(1)
        for row, digit in zip(self._table, exponent, strict=True):
            result = result * row[digit] % modulus
        return result


_making_tables = threading.Lock()


@lru_cache(maxsize=2)
def _fixed_base(base: Integer, modulus: Integer, exponent_bytes: int) -> _FixedBase:
    """The table of a base: made once a process and key, not once a round.

    Both tables of the key used last are kept (40 MB at 3072 bits). They are as secret as the key, which
    a member keeps as well; another key's tables replace them.
    """
    return _FixedBase(base, modulus, exponent_bytes)


class PaillierMember:
    """A key holder of paillier. Exact: `max_error` stays 0.

    The first use of a key in a process makes its tables, half a CPU second at 3072 bits.
    """

    def __init__(
        self,
        parameters: CipherParameters,
        public: bytes,
        secret: bytes,
        random: Random = system_random,
    ) -> None:
        self.parameters = parameters
        self.max_error = 0.0
        self._public = _Public(parameters, public)
        self._random = random
        half = parameters.modulus_bits // 16
        if len(secret) != 2 * half:
            raise Refused(RefusalReason.WRONG_SIZE, "the secret key has a wrong size")
        p, q = (gmpy2.mpz(int.from_bytes(secret[i : i + half], "big")) for i in (0, half))
        if p * q != self._public.n:
            raise Refused(RefusalReason.WRONG_DIGEST, "the secret key belongs to another public key")
        self._exponent_bytes = half
        self._moduli = (p * p, q * q)
        self._inverse = gmpy2.invert(q * q, p * p)
        self._private = phe.PaillierPrivateKey(phe.PaillierPublicKey(int(self._public.n)), int(p), int(q))
        self._bases: tuple[_FixedBase, _FixedBase] | None = None

    def __repr__(self) -> str:
        return f"PaillierMember({self.parameters.name})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key holder's cipher is never pickled; build it from its key in the process")

    def encrypt(self, fields: Fields) -> bytes:
        """See `MemberCipher.encrypt`."""
        blocks = check_fields(self.parameters, fields).reshape(self.parameters.ciphertexts_per_frame, -1)
        n, square = self._public.n, self._public.square
        return self._public.write(
            [(1 + n * self._pack(block)) * self._obfuscator() % square for block in blocks]
        )

    def _obfuscator(self) -> Integer:
        """h_s^r for a fresh r of half the modulus' length, by the Chinese remainder theorem."""
        if self._bases is None:
            h_s, (p2, q2) = self._public.h_s, self._moduli
            size = self._exponent_bytes
            with _making_tables:  # several threads may need them first; one makes them
                self._bases = (_fixed_base(h_s % p2, p2, size), _fixed_base(h_s % q2, q2, size))
        p2, q2 = self._moduli
        r = self._random(self._exponent_bytes)
        by_p, by_q = (base.power(r) for base in self._bases)
        return by_q + q2 * ((by_p - by_q) * self._inverse % p2)

    def _pack(self, block: NDArray[np.uint64]) -> Integer:
        """Lanes side by side, the first one lowest."""
        width = self.parameters.field_bits
        bits = (block[:, None] >> np.arange(width, dtype=np.uint64)).astype(np.uint8) & 1
        return gmpy2.mpz(int.from_bytes(np.packbits(bits.ravel(), bitorder="little").tobytes(), "little"))

    def decrypt(self, frame: bytes | memoryview, count: int, contributions: int) -> NDArray[np.uint64]:
        """See `MemberCipher.decrypt`. With gmpy2 the powers release the interpreter lock."""
        parameters = self.parameters
        check_opening(parameters, count, contributions)
        body = check_envelope(frame, parameters.result_frame_bytes, self._public.tag, "the sum")
        lanes, width = parameters.fields_per_unit, parameters.field_bits
        needed = -(-count // lanes)
        opened = np.zeros((parameters.ciphertexts_per_frame, lanes), np.uint64)
        ciphertexts = self._public.parse(body, "the sum")[:needed]
        with gmpy2.context(gmpy2.get_context(), allow_release_gil=True):
            for row, ciphertext in zip(opened, ciphertexts, strict=False):
                plain = int(self._private.raw_decrypt(int(ciphertext)))
                if plain.bit_length() > lanes * width:
                    raise OpeningFailed("a summed plaintext overflows its lanes: damaged sum")
                row[:] = self._unpack(plain, lanes, width)
        if int(opened.max()) > contributions * parameters.largest_value:
            raise OpeningFailed("the opened sum has a field above what the contributions can add up to")
        return opened.ravel()[:count]

    @staticmethod
    def _unpack(plain: int, lanes: int, width: int) -> NDArray[np.uint64]:
        data = np.frombuffer(plain.to_bytes(-(-lanes * width // 8), "little"), np.uint8)
        bits = np.unpackbits(data, count=lanes * width, bitorder="little").reshape(lanes, width)
        weights = np.uint64(1) << np.arange(width, dtype=np.uint64)
        found: NDArray[np.uint64] = bits.astype(np.uint64) @ weights
        return found


class PaillierAggregator:
    """The aggregator of paillier: public material only; a sum is a product modulo n^2, by gmpy2."""

    native = True

    def __init__(self, parameters: CipherParameters, public: bytes) -> None:
        self.parameters = parameters
        self._public = _Public(parameters, public)

    def _parse(self, frame: bytes | bytearray | memoryview, what: str) -> list[Integer]:
        size = self.parameters.upload_frame_bytes
        return self._public.parse(check_envelope(frame, size, self._public.tag, what), what)

    def check(self, frame: bytes | memoryview) -> None:
        """See `AggregatorCipher.check`."""
        self._parse(frame, "the frame")

    def add(self, total: bytes | bytearray | None, frame: bytes | memoryview) -> bytearray:
        """See `AggregatorCipher.add`."""
        added = self._parse(frame, "the frame")
        if total is None:
            return bytearray(frame)
        square = self._public.square
        before = self._parse(total, "the sum")
        return bytearray(self._public.write([a * b % square for a, b in zip(before, added, strict=True)]))

    def finish(self, total: bytes | bytearray) -> bytes:
        """See `AggregatorCipher.finish`: the running sum as it is."""
        check_envelope(total, self.parameters.sum_frame_bytes, self._public.tag, "the running sum")
        return bytes(total)

    def seeds(self, frame: bytes | memoryview) -> tuple[bytes, ...]:
        """See `AggregatorCipher.seeds`: Paillier ciphertexts have none."""
        check_envelope(frame, self.parameters.upload_frame_bytes, self._public.tag, "the frame")
        return ()


@dataclass(frozen=True)
class PaillierSeconds:
    """CPU seconds that a member will take: its tables once, encrypting and opening in every round."""

    tables: float
    encrypt: float
    open: float

    @property
    def round(self) -> float:
        """CPU seconds a round."""
        return self.encrypt + self.open


def estimate_seconds(modulus_bits: int, ciphertexts: int, clock: Callable[[], float]) -> PaillierSeconds:
    """What a vector of so many ciphertexts will cost one member, before it starts.

    Times a few hundred multiplications and a few powers of the right size with the caller's clock, tens of
    milliseconds in all. Several cores share the work; several members on one machine share its cores.
    """
    _require_extra()
    size = modulus_bits // 8
    modulus = gmpy2.mpz(int.from_bytes(system_random(size), "big")) | 1 | 1 << (8 * size - 1)
    value = gmpy2.mpz(int.from_bytes(system_random(size), "big")) % modulus
    start = clock()
    for _ in range(_TIMED_PRODUCTS):
        value = value * value % modulus
    product = (clock() - start) / _TIMED_PRODUCTS
    exponent = gmpy2.mpz(int.from_bytes(system_random(size // 2), "big"))
    start = clock()
    for _ in range(_TIMED_POWERS):
        value = gmpy2.powmod(value + 2, exponent, modulus)
    power = (clock() - start) / _TIMED_POWERS
    # Modulo p^2 and q^2, as long as n: a table has 256 products for each byte of exponent, a ciphertext one
    # (and half of that for the rest), opening one a power of half the modulus' length (and a tenth).
    products = 2 * (size // 2)
    return PaillierSeconds(
        tables=product * products * (1 << _WINDOW_BITS),
        encrypt=1.5 * product * products * ciphertexts,
        open=2.2 * power * ciphertexts,
    )


def _bytes(number: Integer, size: int) -> bytes:
    return int(number).to_bytes(size, "big")
