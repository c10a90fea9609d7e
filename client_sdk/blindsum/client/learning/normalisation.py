"""Mean and variance of the federation's inputs by one secure sum, before training starts.

    owner.start_plan("input statistics", statistics_model(channels=1), **statistics_plan(largest=1600))
    for rnd in member.rounds():
        rnd.submit(statistics_of(images, low=0, high=1), examples=len(images))
    statistics = InputStatistics.of(member.latest_state(), low=0, high=1)

Every example counts once, but for members with fewer than `largest / weight_ratio` examples, which count as
if they had as many; the policy bounds the ratio. The range must be known beforehand and the same at all
members: a range taken from the data would give it away.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from blindsum.client.layout import arrays
from blindsum.crypto.errors import EncodingError, ParameterRefused
from numpy.typing import ArrayLike, NDArray

_MEAN, _SQUARE = "mean", "mean square"


@dataclass(frozen=True)
class InputStatistics:
    """Mean and standard deviation of each channel over all examples of all members, float64 (channels,)."""

    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]

    @classmethod
    def of(cls, state: Mapping[str, Any], *, low: float, high: float) -> "InputStatistics":
        """From the opened state of a statistics plan. Raises `EncodingError` naming what is missing."""
        centre, half = _range(low, high)
        opened = arrays(state, (_MEAN, _SQUARE))
        mean = opened[_MEAN].astype(np.float64)
        variance = np.maximum(opened[_SQUARE].astype(np.float64) - mean * mean, 0.0)
        return cls(centre + half * mean, half * np.sqrt(variance))

    def standardise(self, examples: ArrayLike) -> NDArray[np.float32]:
        """Examples (n, channels, ...), mean 0 and variance 1 in each channel over the federation, float32.

        A channel that is the same everywhere becomes 0.
        """
        values = np.asarray(examples)
        shape = (1, -1) + (1,) * (values.ndim - 2)
        scale = np.where(self.deviation > 0, self.deviation, 1.0)
        return ((values - self.mean.reshape(shape)) / scale.reshape(shape)).astype(np.float32)


def statistics_model(channels: int) -> dict[str, NDArray[np.float32]]:
    """The state dict of a statistics plan: zeros. Raises `ParameterRefused` for less than one channel."""
    if channels < 1:
        raise ParameterRefused(f"inputs have at least one channel, not {channels}")
    return {_MEAN: np.zeros(channels, np.float32), _SQUARE: np.zeros(channels, np.float32)}


def statistics_plan(largest: int, weight_ratio: int = 16) -> dict[str, Any]:
    """Arguments for `Owner.start_plan` of a statistics plan; no member has more than `largest` examples."""
    return {
        "rounds": 1,
        "weighting": "size",
        "max_examples": largest,
        "weight_ratio": weight_ratio,
        "bits": 22,
        "range_exponent": 0,
    }


def statistics_of(examples: ArrayLike, *, low: float, high: float) -> dict[str, NDArray[np.float32]]:
    """What a member submits: means of its examples (n, channels, ...) scaled from [low, high] to [-1, 1].

    Raises `EncodingError` for values outside the range or not finite, and for no examples.
    """
    centre, half = _range(low, high)
    values = np.asarray(examples, dtype=np.float64)
    if values.ndim < 2 or values.size == 0:
        raise EncodingError("examples", "give an array of at least one example, (n, channels, ...)")
    if not (np.isfinite(values).all() and values.min() >= low and values.max() <= high):
        raise EncodingError("examples", f"a value isn't within {low}..{high}")
    scaled = (values - centre) / half
    across = tuple(axis for axis in range(values.ndim) if axis != 1)
    return {
        _MEAN: scaled.mean(axis=across).astype(np.float32),
        _SQUARE: np.square(scaled).mean(axis=across).astype(np.float32),
    }


def _range(low: float, high: float) -> tuple[float, float]:
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise ParameterRefused(f"a range needs low < high, not {low}..{high}")
    return (low + high) / 2, (high - low) / 2
