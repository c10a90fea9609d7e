"""Parameter sets for paillier: how many lanes a plaintext has."""

from math import inf

from blindsum.crypto.schemes.homomorphic.cipher import KEY_TAG_BYTES, CipherParameters, trimmed

# NIST SP 800-57 part 1, table 2: factoring-based keys.
SECURITY = {2048: 112, 3072: 128}


def choose(
    bits: int, n_max: int, modulus_bits: int, count: int, length: int | None
) -> CipherParameters | str:
    """Lanes side by side below the modulus. The bits of a lane above `bits` are the guard: n_max
    additions fill them and never reach the next lane."""
    security = SECURITY.get(modulus_bits)
    if security is None:
        return f"modulus_bits is one of {', '.join(map(str, SECURITY))}, not {modulus_bits}"
    field_bits = (n_max * ((1 << bits) - 1)).bit_length()
    lanes = (modulus_bits - 1) // field_bits
    count = trimmed(count, lanes, length)
    frame = KEY_TAG_BYTES + count * modulus_bits // 4
    return CipherParameters(
        name=f"paillier-{modulus_bits}-l{lanes}x{field_bits}-k{count}/1",
        scheme="paillier",
        bits=bits,
        n_max=n_max,
        security_bits=security,
        upload_form="public-key",
        key_label=f"paillier-{modulus_bits}/1",
        ciphertexts_per_frame=count,
        fields_per_unit=lanes,
        field_bits=field_bits,
        fields_per_frame=count * lanes,
        upload_frame_bytes=frame,
        sum_frame_bytes=frame,
        result_frame_bytes=frame,
        noise_bound=0.0,
        noise_limit=0.0,
        failure_log2=-inf,
        modulus_bits=modulus_bits,
    )
