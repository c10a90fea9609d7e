"""What an encrypted answer costs: the real service, beside TenSEAL's own matrix product on the same work."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from blindsum.client.inference import CloudTail
from blindsum.crypto.inference.tail_model import TailModel
from blindsum.examples.clinics.inference_process import InferenceProcess
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TailCosts:
    """Figures of one tail; times in milliseconds.

    `server_cpu_ms` is user and system time of the service's processes for a question: TLS, decoding,
    evaluation. `mm_server_cpu_ms` is that of TenSEAL's `mm` for the arithmetic alone, and what it loads
    and saves. `agree` of `total` questions had the class of the clear evaluation. `round_trip_ms` is the
    median at the member, encryption and decryption included.
    """

    server_cpu_ms: float
    mm_server_cpu_ms: float
    up_bytes: int
    down_bytes: int
    keys_bytes: int
    agree: int
    total: int
    round_trip_ms: float


def measure_tail(
    service: InferenceProcess, cloud: CloudTail, tail: TailModel, features: Floats, mm_runs: int = 2
) -> TailCosts:
    """Ask about each of the raw features (n, d), one after the other."""
    cloud.ask(features[0])
    cpu = service.cpu_seconds()
    found, taken = [], []
    for feature in features:
        begin = time.perf_counter()
        found.append(cloud.ask(feature).logit)
        taken.append(time.perf_counter() - begin)
    cpu = service.cpu_seconds() - cpu
    clear = tail.logits(features)
    circuit = tail.circuit
    return TailCosts(
        server_cpu_ms=1000 * cpu / len(features),
        mm_server_cpu_ms=1000 * min(_mm_seconds(tail, features[:mm_runs])),
        up_bytes=circuit.request_bytes,
        down_bytes=circuit.answer_bytes,
        keys_bytes=circuit.keys_bytes,
        agree=int(((np.array(found) > 0) == (clear > 0)).sum()),
        total=len(features),
        round_trip_ms=1000 * float(np.median(taken)),
    )


def _mm_seconds(tail: TailModel, features: Floats) -> list[float]:
    """Processor times of the same tail with TenSEAL's `mm`, `square` and `dot`. The constant 1 carries the
    bias.
    """
    tenseal: Any = import_module("tenseal")
    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS, poly_modulus_degree=8192, coeff_mod_bit_sizes=[50, 36, 36, 36, 50]
    )
    context.global_scale = 2.0**36
    context.generate_galois_keys()
    public = tenseal.context_from(context.serialize(save_secret_key=False))
    rows = np.concatenate([tail.weights, tail.bias[:, None]], axis=1).T.tolist()
    taken = []
    for standard, clear in zip(tail.card.standardise(features), tail.logits(features), strict=True):
        frame = tenseal.ckks_vector(context, [*standard.tolist(), 1.0]).serialize()
        begin = time.process_time()
        hidden = tenseal.ckks_vector_from(public, frame).mm(rows)
        hidden.square_()
        answer = hidden.dot(tail.output.tolist()).serialize()
        taken.append(time.process_time() - begin)
        opened = tenseal.ckks_vector_from(context, answer).decrypt()[0] + tail.output_bias
        if abs(opened - clear) > 0.05 * max(1.0, abs(clear)):
            raise RuntimeError("TenSEAL's mm gave another logit: the comparison would be worth nothing")
    return taken
