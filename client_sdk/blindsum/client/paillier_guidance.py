"""What paillier will cost, said before it starts: nobody should find out in the middle of a round."""

import os
import time

from blindsum.crypto.encoding.vector import field_count
from blindsum.crypto.schemes.homomorphic.cipher import choose_parameters
from blindsum.crypto.trust.plan import Plan

TOO_LARGE_S = 60.0
"""CPU seconds a round at each member from which a model is called too large for paillier."""

WEAK_MODULUS = (
    "Warning: 2048-bit Paillier keys have about 112 bits of security, below the 128 of everything else here. "
    "Take them only where a rule of yours names 2048 bits; 3072 is the default."
)


def round_seconds(plan: Plan, modulus_bits: int) -> float:
    """CPU seconds of one member in a round of a paillier plan, measured on this machine (50 ms).

    Raises `MissingExtra`.
    """
    from blindsum.crypto.schemes.homomorphic.paillier import estimate_seconds  # noqa: PLC0415

    parameters = choose_parameters(
        "paillier", plan.encoding.bits, plan.cohort_max, modulus_bits=modulus_bits, minimum_security=112
    )
    ciphertexts = -(-field_count(plan) // parameters.fields_per_unit)
    return estimate_seconds(modulus_bits, ciphertexts, time.thread_time).round


def guidance(plan: Plan, modulus_bits: int) -> str:
    """What to expect of a paillier plan, and what to take instead. Raises `MissingExtra`."""
    each = round_seconds(plan, modulus_bits)
    cores = os.cpu_count() or 1
    said = (
        f"Paillier takes a member about {each:,.0f} s of CPU a round for {plan.dimension:,} values "
        f"({each / cores:,.0f} s on the {cores} cores of this machine), {plan.rounds} rounds: "
        f"{_duration(each * plan.rounds / cores)}."
    )
    if each > TOO_LARGE_S:
        said += " The model is too large for paillier: take masking or bfv, which take seconds."
    return said


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"
