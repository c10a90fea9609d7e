"""The gate: which images the edge answers alone, by novelty first, then by calibrated confidence."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from blindsum.client.inference.calibration import (
    Floats,
    Labels,
    confidence,
    fit_temperature,
    threshold_for_risk,
)
from blindsum.crypto.errors import ParameterRefused


@dataclass(frozen=True)
class Judgement:
    """What the gate makes of an image: the edge's calibrated confidence, and whether to ask further."""

    confidence: float
    novel: bool
    doubtful: bool


@dataclass(frozen=True, repr=False)
class Gate:
    """Fitted on a site's own data with `fit`; holds numbers only, so it can be stored with numpy.

    Novelty is the Mahalanobis distance of a feature from those of the site's training images (Lee, Lee, Lee
    and Shin, NeurIPS 2018, section 2.1, one Gaussian), with the covariance shrunk towards its diagonal
    because a clinic has fewer images than a feature has entries.
    """

    temperature: float
    threshold: float
    mean: Floats
    precision: Floats
    largest_distance: float

    @classmethod
    def fit(
        cls,
        logits: Floats,
        features: Floats,
        labels: Labels,
        *,
        reference: Floats,
        target_risk: float = 0.05,
        most_sent: float = 0.5,
    ) -> Self:
        """A gate from held-out local examples: edge logits (n,), features (n, d), labels (n,) of 0 and 1.

        `reference` (m, d) are features of training images. The threshold is the lowest at which the confident
        answers meet `target_risk`, but never so high that more than the part `most_sent` of these examples
        would be sent. Raises `ParameterRefused` for shapes that don't fit or too few examples.
        """
        logits, features = np.asarray(logits, np.float64), np.asarray(features, np.float64)
        reference, labels = np.asarray(reference, np.float64), np.asarray(labels)
        if logits.ndim != 1 or logits.shape != labels.shape or features.shape[:1] != logits.shape:
            raise ParameterRefused("logits, features and labels are of different numbers of examples")
        if reference.ndim != 2 or reference.shape[1:] != features.shape[1:]:
            raise ParameterRefused("the reference features have another width than the features")
        if len(logits) < 8 or len(reference) < 8:
            raise ParameterRefused("a gate needs at least 8 held-out and 8 training examples")
        temperature = fit_temperature(logits, labels)
        sure = confidence(logits, temperature)
        threshold = threshold_for_risk(sure, (logits > 0) == (labels > 0), target_risk)
        allowed = np.sort(sure)[min(int(most_sent * len(sure)), len(sure) - 1)]
        mean, precision = _gaussian(reference)
        distances = _distances(features, mean, precision)
        return cls(
            temperature, min(threshold, float(allowed)), mean, precision, float(np.quantile(distances, 0.99))
        )

    def judge(self, logit: float, feature: Floats) -> Judgement:
        """What to make of one image's edge logit and feature (d,)."""
        sure = float(confidence(np.array([logit]), self.temperature)[0])
        distance = _distances(np.asarray(feature, np.float64)[None], self.mean, self.precision)[0]
        novel = not distance <= self.largest_distance
        return Judgement(sure, novel, novel or sure < self.threshold)


def _gaussian(reference: Floats) -> tuple[Floats, Floats]:
    count, width = reference.shape
    mean = reference.mean(axis=0)
    covariance = np.atleast_2d(np.cov(reference, rowvar=False))
    diagonal = np.diag(np.diag(covariance))
    shrunk = covariance + width / (count + width) * (diagonal - covariance)
    floor = 1e-3 * max(float(np.trace(covariance)) / width, 1e-12)
    return mean, np.asarray(np.linalg.inv(shrunk + floor * np.eye(width)))


def _distances(features: Floats, mean: Floats, precision: Floats) -> Floats:
    moved = features - mean
    return np.asarray(np.einsum("ni,ij,nj->n", moved, precision, moved))
