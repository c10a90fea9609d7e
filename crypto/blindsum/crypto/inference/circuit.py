"""The two circuits of an encrypted tail: rings, rotations, and where values lie in the slots.

`square`: 127 features -> 64 hidden units -> square -> 1 logit, ring degree 8192, primes
[50, 36, 36, 36 | 50]. `linear`: 127 features -> 1 logit, degree 4096, [40, 28 | 40]. Both are 128-bit secure
by the Homomorphic Encryption Standard (Albrecht et al., 2018, table 1): 208 of 218 bits, 108 of 109.

A feature is a block of 128 entries, the last of them 1, which carries the bias; the block is repeated over
all slots. The matrix product is the hybrid one of Juvekar, Vaikuntanathan and Chandrakasan (GAZELLE, USENIX
Security 2018, section 6.2): two plain products hold all 64 rows, one rotation folds the second into the
first so that each run of 64 slots belongs to one hidden unit, and six more rotations add up the runs. After
the square, a masked product keeps the first slot of each run, and six rotations add those.
"""

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from blindsum.crypto.errors import ParameterRefused
from blindsum.crypto.schemes.homomorphic.blake2xb import SEED_BYTES
from blindsum.crypto.schemes.homomorphic.cipher import KEY_TAG_BYTES, Ring
from numpy.typing import NDArray

Floats = NDArray[np.float64]
CircuitName = Literal["square-8192/1", "linear-4096/1"]

BLOCK: Final = 128
"""Slots of one copy of the feature, the constant included."""
LARGEST_INPUT: Final = BLOCK - 1
LARGEST_HIDDEN: Final = 64
_RUN: Final = 64


@dataclass(frozen=True)
class SwitchingKey:
    """A relinearisation key (`step` 0) or the key of a rotation to the left by `step` slots.

    It is used only where the ciphertext has `primes` data primes left, so only what that takes is sent: one
    component for each of these primes, each modulo these primes and the special one.
    """

    step: int
    primes: int


@dataclass(frozen=True)
class Circuit:
    """A fixed circuit with its parameters; sizes in bytes.

    A feature is encrypted at scale 2^`scale_bits`, the answer comes at 2^`answer_scale_bits`. The logit,
    times the tail's answer scale, stays below 2^`answer_bits`; what hides the other slots is uniform below
    2^`mask_bits`. Coefficients of both together stay below half of the first prime: what hides would have
    to exceed 20 standard deviations of a coefficient.
    """

    name: CircuitName
    ring: Ring
    scale_bits: int
    answer_scale_bits: int
    answer_bits: int
    mask_bits: int
    keys: tuple[SwitchingKey, ...]

    @property
    def slots(self) -> int:
        """Slots of a ciphertext."""
        return self.ring.degree // 2

    def galois_element(self, step: int) -> int:
        """The automorphism X -> X^e that rotates slots to the left by `step`: e = 3^step modulo 2 N."""
        return pow(3, step, 2 * self.ring.degree)

    def key_primes(self, key: SwitchingKey) -> tuple[int, ...]:
        """The primes of the residues that are sent of a key."""
        return (*self.ring.data[: key.primes], self.ring.special)

    def component_bytes(self, key: SwitchingKey) -> int:
        """Bytes of one component of a key: a seed and one polynomial."""
        bits = sum(prime.bit_length() for prime in self.key_primes(key))
        return SEED_BYTES + self.ring.degree * bits // 8

    @property
    def keys_bytes(self) -> int:
        """Bytes of all evaluation keys of a member."""
        return sum(key.primes * self.component_bytes(key) for key in self.keys)

    @property
    def request_bytes(self) -> int:
        """Bytes of an encrypted feature."""
        bits = sum(prime.bit_length() for prime in self.ring.data)
        return KEY_TAG_BYTES + SEED_BYTES + self.ring.degree * bits // 8

    @property
    def answer_bytes(self) -> int:
        """Bytes of an encrypted answer."""
        return KEY_TAG_BYTES + 2 * self.ring.degree * self.ring.data[0].bit_length() // 8


_FOLD: Final = (32, 16, 8, 4, 2, 1)

SQUARE: Final = Circuit(
    name="square-8192/1",
    ring=Ring(8192, (0x3FFFFFFFCC001, 0xFFFFC4001, 0xFFFF00001, 0xFFFEEC001), 0x3FFFFFFFFC001),
    scale_bits=36,
    answer_scale_bits=38,
    answer_bits=14,
    mask_bits=13,
    keys=(
        SwitchingKey(0, 3),
        *(SwitchingKey(step, 3) for step in (_RUN, *_FOLD)),
        *(SwitchingKey(step, 1) for step in (2048, 1024, 512, 256, 128)),
    ),
)
LINEAR: Final = Circuit(
    name="linear-4096/1",
    ring=Ring(4096, (0xFFFFFC6001, 0xFFF0001), 0xFFFFFDC001),
    scale_bits=28,
    answer_scale_bits=30,
    answer_bits=7,
    mask_bits=10,
    keys=tuple(SwitchingKey(step, 1) for step in (_RUN, *_FOLD)),
)
_CIRCUITS: Final = {circuit.name: circuit for circuit in (SQUARE, LINEAR)}


def circuit_named(name: str) -> Circuit:
    """The circuit called `name`. Raises `ParameterRefused`."""
    for circuit in _CIRCUITS.values():
        if circuit.name == name:
            return circuit
    raise ParameterRefused(f"there is no circuit {name[:40]!r}; update the older side")


def lay_out_feature(circuit: Circuit, feature: Floats) -> Floats:
    """A standardised feature of at most 127 entries as the slots of a ciphertext."""
    block = np.zeros(BLOCK)
    block[: feature.size] = feature
    block[LARGEST_INPUT] = 1.0
    return np.tile(block, circuit.slots // BLOCK)


def lay_out_rows(weights: Floats, bias: Floats) -> tuple[Floats, Floats]:
    """The two plain factors of the square circuit, from weights (64, 127) and bias (64,).

    Block j of the first holds the halves of the rows j and 32 + j that stay in their places; block j of the
    second what the rotation by 64 slots brings to them.
    """
    rows = np.concatenate([weights, bias[:, None]], axis=1)
    low, high = rows[: LARGEST_HIDDEN // 2], rows[LARGEST_HIDDEN // 2 :]
    stays = np.concatenate([low[:, :_RUN], high[:, _RUN:]], axis=1)
    comes = np.concatenate([np.roll(high, 1, axis=0)[:, :_RUN], low[:, _RUN:]], axis=1)
    return stays.ravel(), comes.ravel()


def lay_out_output(weights: Floats) -> Floats:
    """The masked factor after the square: the weight of each hidden unit (64,) in the first slot of its
    run.
    """
    slots = np.zeros(SQUARE.slots)
    half = LARGEST_HIDDEN // 2
    slots[:: 2 * _RUN] = weights[:half]
    slots[_RUN :: 2 * _RUN] = weights[half:]
    return slots


def lay_out_row(weights: Floats, bias: float) -> Floats:
    """The plain factor of the linear circuit, from weights (127,)."""
    return np.tile(np.append(weights, bias), LINEAR.slots // BLOCK)
