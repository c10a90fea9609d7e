"""A site's edge model as tests need it: features come as they are, the logit is their weighted sum."""

import numpy as np
from blindsum.client.inference import CloudTail, EdgeModel, Gate
from blindsum.client.inference.calibration import Floats
from blindsum.crypto.inference.tail_model import TailModel
from random_tails import random_features

LABELS = ("normal", "pneumonia")


class LinearEdge:
    """Agrees with the tail's sign where `skill` is 1, and is a coin where it is 0."""

    def __init__(self, tail: TailModel, skill: float, seed: int = 3) -> None:
        self._tail = tail
        self._skill = skill
        self._direction = np.random.default_rng(seed).normal(size=tail.mean.size)

    def __call__(self, images: np.ndarray) -> tuple[Floats, Floats]:
        features = np.asarray(images, np.float64)
        noise = ((features - self._tail.mean) / self._tail.deviation) @ self._direction / 8
        return self._skill * self._tail.logits(features) + (1 - self._skill) * noise, features


def site_images(tail: TailModel, count: int, seed: int) -> tuple[Floats, np.ndarray]:
    """Images (here: features) and their true labels by the tail."""
    features = random_features(tail, count, seed)
    return features, (tail.logits(features) > 0).astype(np.int64)


def edge_model(
    tail: TailModel, cloud: CloudTail | None, *, skill: float = 0.3, most_sent: float = 0.5
) -> EdgeModel:
    body = LinearEdge(tail, skill)
    images, labels = site_images(tail, 80, seed=11)
    reference, _ = site_images(tail, 300, seed=12)
    logits, features = body(images)
    gate = Gate.fit(logits, features, labels, reference=reference, most_sent=most_sent)
    return EdgeModel(body, gate, labels=LABELS, version="edge-1", cloud=cloud)
