"""Confidence that means what it says: one temperature, fitted on local data.

Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks" (ICML 2017), section 4.2, with the
temperature from a bounded grid: a handful of images can't drive it to an extreme.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Labels = NDArray[Any]

TEMPERATURES: Final = np.geomspace(0.25, 8, 61)


def fit_temperature(logits: Floats, labels: Labels) -> float:
    """The temperature from the grid with the least mean log loss of logits (n,) on labels (n,) of 0 and 1.

    1.0 without any data.
    """
    if not len(logits):
        return 1.0
    signs = np.where(np.asarray(labels) > 0, 1.0, -1.0)
    losses = np.logaddexp(0, -signs * np.asarray(logits, np.float64) / TEMPERATURES[:, None]).mean(axis=1)
    return float(TEMPERATURES[int(losses.argmin())])


def confidence(logits: Floats, temperature: float) -> Floats:
    """The probability (n,) of the class that each logit stands for, between 0.5 and 1."""
    return np.asarray(1 / (1 + np.exp(-np.abs(np.asarray(logits, np.float64)) / temperature)))


def threshold_for_risk(confidences: Floats, right: NDArray[np.bool_], target_risk: float) -> float:
    """The lowest confidence from which on answers were wrong at most in the part `target_risk`.

    One error more than was seen is counted, since few examples may show none by luck. Above 1 where no part
    of the examples is that good: then every answer is doubtful.
    """
    order = np.argsort(-confidences, kind="stable")
    wrong = np.cumsum(~np.asarray(right)[order]) + 1
    good = np.flatnonzero(wrong / (np.arange(len(order)) + 2) <= target_risk)
    return float(confidences[order[good[-1]]]) if len(good) else 1.01
