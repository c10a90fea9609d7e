"""Tails with random weights, as tests need them."""

import numpy as np
from blindsum.crypto.inference.circuit import LINEAR, SQUARE, Circuit, Floats
from blindsum.crypto.inference.tail_model import TailModel


def random_tail(
    circuit: Circuit = SQUARE, inputs: int = 127, rows: int = 64, version: str = "v1", seed: int = 0
) -> TailModel:
    stream = np.random.default_rng(seed)
    if circuit is LINEAR:
        rows = 1
    return TailModel(
        circuit=circuit,
        version=version,
        mean=stream.normal(size=inputs),
        deviation=stream.uniform(0.5, 2, inputs),
        weights=stream.normal(size=(rows, inputs)) / np.sqrt(inputs),
        bias=stream.normal(size=rows) * 0.3,
        output=stream.normal(size=rows) / np.sqrt(rows) if circuit is SQUARE else np.zeros(0),
        output_bias=0.2 if circuit is SQUARE else 0.0,
    )


def random_features(tail: TailModel, count: int, seed: int = 1) -> Floats:
    stream = np.random.default_rng(seed)
    return stream.normal(size=(count, tail.mean.size)) * tail.deviation + tail.mean
