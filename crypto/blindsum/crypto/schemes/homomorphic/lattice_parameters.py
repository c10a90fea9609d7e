"""Parameter sets for bfv and ckks: chosen, not listed, each with its proof for (bits, n_max).

Security is that of the Homomorphic Encryption Standard (Albrecht et al., 2018, table 1, ternary
secret): at degree 4096 all primes together, the key-switching one included, have at most 109 bits for
128-bit security. Within that, the ciphertext modulus is made no larger than the sum needs, because a
coefficient travels with exactly as many bits as its prime has.

Noise, for SEAL 4 (util/rlwe.cpp): errors are centred binomials of at most 21, so a symmetric
encryption has a hard bound. A public-key encryption divides by the special prime and rounds; its
rounding errors are independent uniforms on [-1/2, 1/2] (the polynomial before division is
pseudo-random modulo the special prime), weighted by a ternary secret, and Hoeffding's inequality
bounds their sum: less than 2^-70 a coefficient, so less than 2^-40 for a round of 2^30 fields.
"""

from functools import cache
from math import ceil, inf, log, log2, sqrt

from blindsum.crypto.schemes.homomorphic.cipher import (
    KEY_TAG_BYTES,
    MINIMUM_SECURITY,
    CipherParameters,
    Ring,
    UploadForm,
    trimmed,
)

DEGREE = 4096
_STANDARD_BITS = 109
_LARGEST_PRIME_BITS = 60
_SMALLEST_SPECIAL_BITS = 30
_LARGEST_PLAIN_BITS = 59  # SEAL takes plain moduli of at most 60 bits, and 2^59 has 60
_ERROR_MAX = 21
_HOEFFDING = 71 * log(2) / 2  # 2 exp(-2 x^2 / w) <= 2^-70 for x = sqrt(w * _HOEFFDING)
_PUBLIC_FAILURE = -40.0
_CKKS_TARGET = 1 / 32
_SEED_BYTES = 64
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def choose_bfv(
    bits: int, n_max: int, form: UploadForm, count: int, length: int | None
) -> CipherParameters | str:
    """Integers packed into coefficients modulo t = 2^k, several a coefficient.

    Sums need no slots, so t needn't be a prime and no plaintext is transformed. With total error v,
    decryption is exact while v < q / (2t); the limit here is q / (4t), so that SEAL's noise budget of
    a good sum is never zero.
    """
    field_bits = (n_max * ((1 << bits) - 1)).bit_length()
    best: tuple[float, int, Ring, float] | None = None
    for lanes in range(_LARGEST_PLAIN_BITS // field_bits, 0, -1):
        plain_bits = lanes * field_bits
        for ring in _rings():
            noise = _bfv_noise(n_max, form, ring)
            if ceil(noise) * (4 << plain_bits) > ring.modulus:
                continue
            # A second prime costs CPU: it must save a tenth of the bytes.
            cost = _data_bits(ring) / lanes * (1.1 if len(ring.data) > 1 else 1.0)
            if best is None or cost < best[0]:
                best = (cost, lanes, ring, noise)
            break
    if best is None:
        return "the noise of that many additions leaves no room"
    _, lanes, ring, noise = best
    plain_bits = lanes * field_bits
    return _assemble(
        "bfv",
        bits,
        n_max,
        form,
        ring,
        detail=f"t{plain_bits}x{lanes}",
        units=DEGREE,
        fields_per_unit=lanes,
        field_bits=field_bits,
        noise_bound=noise,
        noise_limit=ring.modulus / (4 << plain_bits),
        plain_bits=plain_bits,
        count=count,
        length=length,
    )


def choose_ckks(
    bits: int, n_max: int, form: UploadForm, count: int, length: int | None
) -> CipherParameters | str:
    """Two integers a complex slot. The scale keeps the proved error at most 1/32 of a step.

    A slot's error is the error polynomial at a root of unity: at most the sum of its coefficients.
    """
    field_bits = (n_max * ((1 << bits) - 1)).bit_length()
    largest = n_max * ((1 << bits) - 1) * sqrt(2)
    # Two double-precision transforms of `degree` points (Higham, Accuracy and Stability, section 24.1).
    floating = 2.0**-53 * 16 * log2(DEGREE) * sqrt(DEGREE) * largest
    if floating > _CKKS_TARGET / 2:
        return "double-precision slots can't hold the sum exactly"
    for ring in _rings():
        noise = _ckks_noise(n_max, form, ring)
        scale_bits = max(1, ceil(log2(noise / (_CKKS_TARGET - floating))))
        # Coefficients of the scaled sum, its error and SEAL's rounding stay below q / 2.
        if 2 * (2.0**scale_bits * largest * 1.001 + noise) < ring.modulus:
            return _assemble(
                "ckks",
                bits,
                n_max,
                form,
                ring,
                detail=f"s{scale_bits}",
                units=DEGREE // 2,
                fields_per_unit=2,
                field_bits=field_bits,
                noise_bound=noise / 2.0**scale_bits + floating,
                noise_limit=0.25,
                scale_bits=scale_bits,
                count=count,
                length=length,
            )
    return "no modulus within 128-bit security holds the scaled sum"


def _bfv_noise(n_max: int, form: UploadForm, ring: Ring) -> float:
    """The largest coefficient error after n_max additions, message rounding (at most 1) included."""
    if form == "seeded":
        return n_max * (_ERROR_MAX + 1.0)
    weight = n_max * (ring.degree + 1)
    return n_max * (1 + _divided(ring)) + sqrt(weight * _HOEFFDING)


def _ckks_noise(n_max: int, form: UploadForm, ring: Ring) -> float:
    """The largest slot error after n_max additions, before division by the scale."""
    if form == "seeded":
        return n_max * ring.degree * (_ERROR_MAX + 1.0)
    weight = n_max * ring.degree * (ring.degree**2 + 1)
    return n_max * ring.degree * (1 + _divided(ring)) + sqrt(weight * _HOEFFDING)


def _divided(ring: Ring) -> float:
    """What is left of u * e + e0 + e1 * s (u, s ternary) after division by the special prime."""
    return _ERROR_MAX * (2 * ring.degree + 1) / ring.special


def _assemble(
    scheme: str,
    bits: int,
    n_max: int,
    form: UploadForm,
    ring: Ring,
    *,
    detail: str,
    units: int,
    fields_per_unit: int,
    field_bits: int,
    noise_bound: float,
    noise_limit: float,
    count: int,
    length: int | None,
    plain_bits: int = 0,
    scale_bits: int = 0,
) -> CipherParameters:
    per_ciphertext = units * fields_per_unit
    count = trimmed(count, per_ciphertext, length)
    polynomial = _data_bits(ring) * ring.degree // 8
    upload = polynomial + _SEED_BYTES if form == "seeded" else 2 * polynomial
    label = f"{scheme}-{ring.chain}"
    return CipherParameters(
        name=f"{label}-{detail}-k{count}-{form.replace('-', '')}/1",
        scheme="bfv" if scheme == "bfv" else "ckks",
        bits=bits,
        n_max=n_max,
        security_bits=MINIMUM_SECURITY,
        upload_form=form,
        key_label=f"{label}-{form}/1",
        ciphertexts_per_frame=count,
        fields_per_unit=fields_per_unit,
        field_bits=field_bits,
        fields_per_frame=count * per_ciphertext,
        upload_frame_bytes=KEY_TAG_BYTES + count * upload,
        sum_frame_bytes=KEY_TAG_BYTES + count * 2 * len(ring.data) * ring.degree * 8,
        result_frame_bytes=KEY_TAG_BYTES + count * 2 * polynomial,
        noise_bound=noise_bound,
        noise_limit=noise_limit,
        failure_log2=-inf if form == "seeded" else _PUBLIC_FAILURE,
        ring=ring,
        plain_bits=plain_bits,
        scale_bits=scale_bits,
    )


def _data_bits(ring: Ring) -> int:
    return sum(prime.bit_length() for prime in ring.data)


@cache
def _rings() -> tuple[Ring, ...]:
    """All chains on offer, the smallest ciphertext modulus first; one data prime wherever it suffices."""
    rings = []
    for bits in range(30, _STANDARD_BITS - _SMALLEST_SPECIAL_BITS + 1):
        sizes = [bits] if bits <= _LARGEST_PRIME_BITS else [(bits + 1) // 2, bits // 2]
        sizes.append(min(_LARGEST_PRIME_BITS, _STANDARD_BITS - bits))
        primes: list[int] = []
        for size in sizes:
            primes.append(_largest_prime(size, frozenset(primes)))
        rings.append(Ring(DEGREE, tuple(primes[:-1]), primes[-1]))
    return tuple(rings)


def _largest_prime(bits: int, taken: frozenset[int]) -> int:
    """The largest prime of that size which is 1 modulo 2 * DEGREE and not taken."""
    step = 2 * DEGREE
    candidate = (1 << bits) - step + 1
    while candidate in taken or not _is_prime(candidate):
        candidate -= step
    assert candidate.bit_length() == bits
    return candidate


def _is_prime(number: int) -> bool:
    """Miller-Rabin with the first 12 primes: a proof below 3.3e24 (Sorenson and Webster, 2015)."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for witness in _WITNESSES:
        power = pow(witness, odd, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True
