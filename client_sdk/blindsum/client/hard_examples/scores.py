"""Two scores, since one isn't enough: doubt finds the model's own errors, novelty finds what it never saw.

A model is often sure of itself on images of a foreign scanner, so doubt is blind there; and a familiar image
can be hard, so novelty is blind there.
"""

import io
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
from blindsum.crypto.errors import RefusalReason, Refused
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
SHRINKAGE: Final = 0.01


def doubt(logits: ArrayLike) -> Floats:
    """Entropy of the softmax as a fraction of its largest value: float64 (n,), 0 for sure, 1 for no idea.

    `logits` is (n, classes); (n,) or (n, 1) for two classes. Temperature scaling before it doesn't change the
    order of two-class scores.
    """
    values = np.asarray(logits, dtype=np.float64)
    values = values.reshape(len(values), -1)
    if values.shape[1] == 1:
        values = np.concatenate((np.zeros_like(values), values), axis=1)
    shifted = values - values.max(axis=1, keepdims=True)
    log_chances = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    entropy: Floats = -(np.exp(log_chances) * log_chances).sum(axis=1) / np.log(values.shape[1])
    return entropy


@dataclass(frozen=True, eq=False)
class Novelty:
    """Mahalanobis distance to the nearest class of what the model was trained on (Lee et al., NeurIPS 2018,
    arXiv:1807.03888, section 2.1: class means, one covariance).

    Give it features that still show the scanner: a network that normalises its input hides exposure from its
    last layer, so add the image's mean and deviation or an early layer's statistics. `threshold` is the
    score below which `1 - expected` of familiar examples lie.
    """

    centre: Floats
    scale: Floats
    means: Floats
    precision: Floats
    threshold: float = float("inf")
    expected: float = 0.05

    @classmethod
    def fit(cls, features: ArrayLike, labels: ArrayLike, *, shrinkage: float = SHRINKAGE) -> Self:
        """From the training party's features (n, d) and labels (n,); `shrinkage` of the covariance is spread
        evenly over all directions. Raises `ValueError` for fewer than two examples a class.
        """
        values = np.asarray(features, dtype=np.float64)
        classes = np.asarray(labels)
        centre, scale = values.mean(axis=0), values.std(axis=0) + 1e-6
        values = (values - centre) / scale
        means, rests = [], []
        for one in np.unique(classes):
            of_class = values[classes == one]
            if len(of_class) < 2:
                raise ValueError(
                    f"novelty needs at least two examples of each class; {one} has {len(of_class)}"
                )
            means.append(of_class.mean(axis=0))
            rests.append(of_class - means[-1])
        covariance = np.atleast_2d(np.cov(np.concatenate(rests), rowvar=False))
        even = np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        precision = np.linalg.inv((1 - shrinkage) * covariance + shrinkage * even)
        return cls(centre, scale, np.array(means), precision)

    def with_threshold(self, familiar: ArrayLike, expected: float = 0.05) -> Self:
        """The same with a threshold from familiar features that weren't used in `fit`."""
        threshold = float(np.quantile(self.score(familiar), 1 - expected))
        return type(self)(self.centre, self.scale, self.means, self.precision, threshold, expected)

    def score(self, features: ArrayLike) -> Floats:
        """Squared distance of each row of features (n, d) to the nearest class: float64 (n,)."""
        values = (np.asarray(features, dtype=np.float64) - self.centre) / self.scale
        distances = []
        for mean in self.means:
            rest = values - mean
            distances.append(np.einsum("ij,jk,ik->i", rest, self.precision, rest))
        nearest: Floats = np.min(distances, axis=0)
        return nearest

    def is_flagged(self, features: ArrayLike) -> bool:
        """Whether so many of these examples lie beyond the threshold that it isn't chance (three standard
        deviations of the expected share): a site, or a class of a site, that the model doesn't know.
        """
        scores = self.score(features)
        if not len(scores):
            return False
        margin = 3 * np.sqrt(self.expected * (1 - self.expected) / len(scores))
        return bool(np.mean(scores > self.threshold) > self.expected + margin)

    def to_bytes(self) -> bytes:
        """What travels with a model to the sites: means and a covariance of features, no example."""
        buffer = io.BytesIO()
        limits = np.array([self.threshold, self.expected])
        np.savez(
            buffer,
            centre=self.centre,
            scale=self.scale,
            means=self.means,
            precision=self.precision,
            limits=limits,
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """What `to_bytes` wrote. Raises `Refused` (malformed)."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as stored:
                parts: dict[str, NDArray[Any]] = {name: stored[name] for name in stored.files}
            threshold, expected = parts.pop("limits")
            return cls(**parts, threshold=float(threshold), expected=float(expected))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Refused(
                RefusalReason.MALFORMED, f"this isn't a stored novelty score: {type(error).__name__}"
            ) from None


def auroc(familiar: ArrayLike, other: ArrayLike) -> float:
    """Chance that one of `other` scores higher than one of `familiar`, ties counted half (area under the ROC
    curve, by ranks; Hanley and McNeil 1982). Raises `ValueError` when either is empty.
    """
    low, high = np.asarray(familiar, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if not len(low) or not len(high):
        raise ValueError("an AUROC compares two groups, and one of them is empty")
    order = np.sort(low)
    below = np.searchsorted(order, high, side="left")
    ties = np.searchsorted(order, high, side="right") - below
    return float(np.mean(below + ties / 2) / len(low))
