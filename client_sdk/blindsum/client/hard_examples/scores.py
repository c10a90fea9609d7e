"""Two scores, since one isn't enough: doubt finds the model's own errors, novelty finds what it never saw.

A model is often sure of itself on images of a foreign scanner, so doubt is blind there; and a familiar image
can be hard, so novelty is blind there.
"""

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Self

import numpy as np
from blindsum.crypto.errors import RefusalReason, Refused
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Features = ArrayLike | Mapping[str, ArrayLike]
"""One group of features (n, d), or several by name."""
SHRINKAGE: Final = 0.01
ONE_PER_CENT: Final = 2.326
"""Standard deviations beyond which chance goes once in a hundred times (one-sided)."""
FEWEST: Final = 8
"""Examples below which a rank test says nothing."""


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
class _Distance:
    """Mahalanobis distance to the nearest class mean, standardised by what familiar examples have."""

    centre: Floats
    scale: Floats
    means: Floats
    precision: Floats
    middle: float
    spread: float

    def raw(self, features: Floats) -> Floats:
        values = (features - self.centre) / self.scale
        distances = []
        for mean in self.means:
            rest = values - mean
            distances.append(np.einsum("ij,jk,ik->i", rest, self.precision, rest))
        nearest: Floats = np.sqrt(np.maximum(np.min(distances, axis=0), 0))
        return nearest

    def score(self, features: Floats) -> Floats:
        return (self.raw(features) - self.middle) / self.spread


@dataclass(frozen=True, eq=False)
class Novelty:
    """Mahalanobis distance to the nearest class of what the model was trained on (Lee et al., NeurIPS 2018,
    arXiv:1807.03888, section 2: class means, one covariance, several layers).

    Features come in named groups, one a layer; a group's distance counts in units of its spread over familiar
    examples, and the groups' add up. Give it a group that still shows the scanner: a network that normalises
    its input hides exposure from every layer, so the image's own mean and deviation are a group too.
    """

    parts: dict[str, _Distance]
    familiar: Floats

    @classmethod
    def fit(
        cls, features: Features, labels: ArrayLike, familiar: Features, *, shrinkage: float = SHRINKAGE
    ) -> Self:
        """From the training party's features, (n, d) a group, and labels (n,). `familiar` are features of its
        own examples that the model wasn't trained on. `shrinkage` of each covariance is spread evenly over
        all directions. Raises `ValueError` for fewer than two examples a class, or groups that differ.
        """
        groups, held_out = _groups(features), _groups(familiar)
        if set(groups) != set(held_out):
            raise ValueError("the familiar examples have other groups of features than the training examples")
        classes = np.asarray(labels)
        parts = {name: _fitted(groups[name], classes, held_out[name], shrinkage) for name in groups}
        scores = sum((parts[name].score(held_out[name]) for name in parts), np.zeros(()))
        return cls(parts, np.sort(np.asarray(scores, dtype=np.float64)))

    def score(self, features: Features) -> Floats:
        """How novel each example is: float64 (n,), about 0 for familiar ones. `features` has the groups of
        `fit`.

        Raises `ValueError` for other groups.
        """
        groups = _groups(features)
        if set(groups) != set(self.parts):
            raise ValueError(f"this score needs the groups {', '.join(sorted(self.parts))}")
        total: Floats = np.sum([part.score(groups[name]) for name, part in self.parts.items()], axis=0)
        return total

    @property
    def threshold(self) -> float:
        """The score that 95 of 100 familiar examples stay below."""
        return float(np.quantile(self.familiar, 0.95))

    def is_flagged(self, features: Features) -> bool:
        """Whether these examples, of a site or of a class of it, are more novel than familiar ones by more
        than chance: a one-sided rank test (Mann and Whitney 1947) at one per cent.
        """
        scores = self.score(features)
        if len(scores) < FEWEST:
            return False
        deviation = np.sqrt((len(scores) + len(self.familiar) + 1) / (12 * len(scores) * len(self.familiar)))
        return auroc(self.familiar, scores) - 0.5 > ONE_PER_CENT * float(deviation)

    def to_bytes(self) -> bytes:
        """What travels with a model to the sites: means and covariances of features, no example."""
        arrays: dict[str, Floats] = {"familiar": self.familiar}
        for name, part in self.parts.items():
            for field in fields(part):
                arrays[f"{name}/{field.name}"] = np.asarray(getattr(part, field.name), dtype=np.float64)
        buffer = io.BytesIO()
        # By position: a name in the archive is a file name, and a group may be called anything.
        np.savez(buffer, np.array("\n".join(arrays)), *arrays.values())
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """What `to_bytes` wrote. Raises `Refused` (malformed)."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as stored:
                names = str(stored["arr_0"]).split("\n")
                arrays = {name: stored[f"arr_{place}"] for place, name in enumerate(names, start=1)}
            familiar = arrays.pop("familiar")
            found: dict[str, dict[str, Any]] = {}
            for key, value in arrays.items():
                group, _, name = key.rpartition("/")
                found.setdefault(group, {})[name] = value if value.ndim else float(value)
            return cls({group: _Distance(**part) for group, part in found.items()}, familiar)
        except (EOFError, OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise Refused(
                RefusalReason.MALFORMED, f"this isn't a stored novelty score: {type(error).__name__}"
            ) from None


def of_rows(features: Features, rows: ArrayLike) -> dict[str, Floats]:
    """The features of some examples, by group."""
    return {name: values[np.asarray(rows)] for name, values in _groups(features).items()}


def _groups(features: Features) -> dict[str, Floats]:
    """The groups as float64 (n, d); a bare array is one group."""
    groups = features if isinstance(features, Mapping) else {"features": features}
    found = {name: np.asarray(values, dtype=np.float64) for name, values in groups.items()}
    if any(values.ndim != 2 for values in found.values()) or len({len(v) for v in found.values()}) != 1:
        raise ValueError("features are (n, d) in every group, with the same n")
    return found


def _fitted(features: Floats, classes: NDArray[Any], familiar: Floats, shrinkage: float) -> _Distance:
    centre, scale = features.mean(axis=0), features.std(axis=0) + 1e-6
    values = (features - centre) / scale
    means, rests = [], []
    for one in np.unique(classes):
        of_class = values[classes == one]
        if len(of_class) < 2:
            raise ValueError(f"novelty needs two examples of each class, and class {one} has {len(of_class)}")
        means.append(of_class.mean(axis=0))
        rests.append(of_class - means[-1])
    covariance = np.atleast_2d(np.cov(np.concatenate(rests), rowvar=False))
    even = np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    precision = np.linalg.inv((1 - shrinkage) * covariance + shrinkage * even)
    unscaled = _Distance(centre, scale, np.array(means), precision, 0.0, 1.0)
    raw = unscaled.raw(familiar)
    return replace(unscaled, middle=float(np.median(raw)), spread=float(raw.std()) + 1e-12)


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
