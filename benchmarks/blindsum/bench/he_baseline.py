"""What users run today: CKKS 8192 [60,40,40] at scale 2^40 by TenSEAL's own API, and textbook Paillier.

Both carry the same integers as our schemes, so that errors mean the same: `max_error` in steps of the
grid, `grid_mismatches` the sums that don't round to the integer. Neither has headers, signatures or a
sum check: only their ciphertexts are counted.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from statistics import median
from typing import Any

import numpy as np
from blindsum.bench.cpu_time import process_cpu
from blindsum.crypto.errors import MissingExtra
from numpy.typing import NDArray

CKKS_LARGEST = 1_000_000
"""Parameters that the CKKS default is measured on at most: more in one vector takes gigabytes."""

PAILLIER_SAMPLE = 24
_MEMBERS = 3


@dataclass
class _Peer:
    """A library's scheme as four functions."""

    encrypt: Callable[[NDArray[np.int64]], bytes]
    add: Callable[[Any, bytes], Any]
    publish: Callable[[Any], bytes]
    decrypt: Callable[[bytes], NDArray[np.float64]]


def ckks_default(dimension: int, bits: int, runs: int) -> dict[str, Any]:
    """The widely used default, as one flat vector. Raises `MissingExtra`."""
    try:
        ts = import_module("tenseal")
    except ImportError as error:
        raise MissingExtra("he", "the CKKS baseline") from error

    def fresh() -> _Peer:
        secret = ts.context(ts.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 40])
        secret.global_scale = 2**40
        public = ts.context_from(
            secret.serialize(save_secret_key=False, save_galois_keys=False, save_relin_keys=False)
        )

        def add(total: Any, data: bytes) -> Any:
            vector = ts.ckks_vector_from(public, data)
            return vector if total is None else total.add_(vector)

        return _Peer(
            lambda values: bytes(ts.ckks_vector(public, values.tolist()).serialize()),
            add,
            lambda total: bytes(total.serialize()),
            lambda data: np.array(ts.ckks_vector_from(secret, data).decrypt()),
        )

    name = "8192 [60,40,40], scale 2^40, public key"
    with _quiet_library():
        return _measured(fresh, "ckks", name, 128, min(dimension, CKKS_LARGEST), bits, runs)


@contextmanager
def _quiet_library() -> Iterator[None]:
    """Nothing on standard output: TenSEAL writes warnings there, where the figures go."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def textbook_paillier(bits: int, runs: int, modulus_bits: int = 3072) -> dict[str, Any]:
    """One value a ciphertext, by phe, on `PAILLIER_SAMPLE` values. Raises `MissingExtra`."""
    try:
        paillier = import_module("phe").paillier
    except ImportError as error:
        raise MissingExtra("paillier", "the Paillier baseline") from error
    size = modulus_bits // 4

    def fresh() -> _Peer:
        public, secret = paillier.generate_paillier_keypair(n_length=modulus_bits)

        def numbers(data: bytes) -> list[Any]:
            return [
                paillier.EncryptedNumber(public, int.from_bytes(data[at : at + size], "big"))
                for at in range(0, len(data), size)
            ]

        def joined(values: Sequence[Any]) -> bytes:
            return b"".join(value.ciphertext().to_bytes(size, "big") for value in values)

        return _Peer(
            lambda values: joined([public.encrypt(value) for value in values.tolist()]),
            lambda total, data: (
                numbers(data)
                if total is None
                else [one + two for one, two in zip(total, numbers(data), strict=True)]
            ),
            joined,
            lambda data: np.array([secret.decrypt(value) for value in numbers(data)], np.float64),
        )

    security = {2048: 112, 3072: 128}.get(modulus_bits, 0)
    name = f"{modulus_bits} bits, one value a ciphertext"
    return _measured(fresh, "paillier", name, security, PAILLIER_SAMPLE, bits, runs)


def _measured(
    fresh: Callable[[], _Peer],
    scheme: str,
    parameters: str,
    security: int,
    dimension: int,
    bits: int,
    runs: int,
) -> dict[str, Any]:
    """The least of `runs` runs, each under a fresh key."""
    encrypt, add, decrypt = [], [], []
    up = down = mismatches = 0
    error = 0.0
    for run in range(runs):
        peer = fresh()
        vectors = [
            np.random.default_rng(100 * run + index).integers(0, 1 << bits, dimension)
            for index in range(_MEMBERS)
        ]
        times, adding, total = [], 0.0, None
        for vector in vectors:
            start = process_cpu()
            data = peer.encrypt(vector)
            times.append(process_cpu() - start)
            up = len(data)
            start = process_cpu()
            total = peer.add(total, data)
            adding += process_cpu() - start
        published = peer.publish(total)
        down = len(published)
        start = process_cpu()
        opened = peer.decrypt(published)
        decrypt.append(process_cpu() - start)
        encrypt.append(median(times))
        add.append(adding / _MEMBERS)
        wanted = np.sum(vectors, axis=0)
        error = max(error, float(np.abs(opened - wanted).max()))
        mismatches += int(np.count_nonzero(np.rint(opened) != wanted))
    return {
        "scheme": scheme,
        "parameters": parameters,
        "security_bits": security,
        "dim": dimension,
        "members": _MEMBERS,
        "bytes_up_per_param": up / dimension,
        "bytes_down_per_param": down / dimension,
        "encrypt_params_per_s": dimension / min(encrypt),
        "aggregate_params_per_s": dimension / min(add),
        "decrypt_params_per_s": dimension / min(decrypt),
        "max_error": error,
        "grid_mismatches": mismatches,
        "exact": mismatches == 0 and error == 0.0,
    }
