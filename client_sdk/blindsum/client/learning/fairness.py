"""Fairness between members from secure sums alone: no site is named, nobody's figure is seen.

Each member submits its accuracy and its square as metrics of a round; their means over the survivors give
mean and spread. A histogram is one-hot counts, for cohorts of at least 20: in a small one it is nearly the
list of everyone's accuracy.

    owner.start_plan(..., metrics=fairness_ranges())
    receipt = rnd.submit(..., metrics=fairness_metrics(accuracy))
    report = FairnessReport.of(receipt.metrics)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from blindsum.crypto.errors import EncodingError, ParameterRefused

HISTOGRAM_COHORT_MIN: Final = 20
_ACCURACY: Final = "accuracy"
_SQUARED: Final = "accuracy squared"
_RESOLUTION: Final = 2.0**-20


def fairness_ranges(*, bins: int = 0, cohort_min: int = 0) -> dict[str, tuple[float, float, float]]:
    """The metrics to declare in a plan: name -> (low, high, resolution).

    With `bins`, a histogram of as many equal parts of [0, 1]; `cohort_min` must then be the plan's own, at
    least 20. Raises `ParameterRefused` for a smaller cohort, and for one bin or more than 20.
    """
    ranges = {_ACCURACY: (0.0, 1.0, _RESOLUTION), _SQUARED: (0.0, 1.0, _RESOLUTION)}
    if not bins:
        return ranges
    if not 2 <= bins <= 20:
        raise ParameterRefused(f"a histogram has 2 to 20 bins, not {bins}")
    if cohort_min < HISTOGRAM_COHORT_MIN:
        raise ParameterRefused(
            f"a histogram over {cohort_min} members is nearly the list of their accuracies; it needs "
            f"cohort_min >= {HISTOGRAM_COHORT_MIN}. Mean and spread work for every cohort"
        )
    return ranges | {_bin_name(i, bins): (0.0, 1.0, _RESOLUTION) for i in range(bins)}


def fairness_metrics(accuracy: float, *, bins: int = 0) -> dict[str, float]:
    """What a member submits: its accuracy, a fraction of 1, on its own held-out data.

    Raises `EncodingError` for one outside [0, 1].
    """
    if not 0 <= accuracy <= 1:
        raise EncodingError(_ACCURACY, "an accuracy is a fraction of 1")
    own = min(int(accuracy * bins), bins - 1) if bins else -1
    return {_ACCURACY: accuracy, _SQUARED: accuracy * accuracy} | {
        _bin_name(i, bins): float(i == own) for i in range(bins)
    }


@dataclass(frozen=True)
class FairnessReport:
    """Mean and spread (standard deviation over the survivors) of the members' accuracy, as fractions of 1.

    `histogram` holds the share of members in each bin, or nothing where none was declared.
    """

    mean: float
    spread: float
    histogram: tuple[float, ...] = ()

    @classmethod
    def of(cls, metrics: Mapping[str, float]) -> "FairnessReport":
        """From the opened metrics of a receipt. Raises `ParameterRefused` if the plan declares none."""
        missing = {_ACCURACY, _SQUARED} - metrics.keys()
        if missing:
            raise ParameterRefused(f"the plan declares no metric {min(missing)!r}; see fairness_ranges()")
        mean = metrics[_ACCURACY]
        # Both means are rounded, so equal accuracies may leave a tiny negative difference.
        variance = max(metrics[_SQUARED] - mean * mean, 0.0)
        bins = sum(name.startswith(f"{_ACCURACY} bin ") for name in metrics)
        histogram = tuple(metrics[_bin_name(i, bins)] for i in range(bins))
        return cls(mean, math.sqrt(variance), histogram)

    def standing(self, accuracy: float, alone: float) -> str:
        """What only this member sees: its accuracy, the federation's, and its gain over training alone."""
        return (
            f"here {100 * accuracy:.1f} %, federation {100 * self.mean:.1f} % +- {100 * self.spread:.1f}; "
            f"{100 * (accuracy - alone):+.1f} points over training alone"
        )


def _bin_name(index: int, bins: int) -> str:
    return f"{_ACCURACY} bin {index + 1} of {bins}"
