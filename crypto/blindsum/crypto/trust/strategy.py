"""What the members make of an opened mean update: plain averaging, momentum or Adam.

Sources: McMahan et al., AISTATS 2017 (FedAvg); Reddi et al., ICLR 2021 (FedAvgM, FedAdam). Settings of
a plan that start with `server.` belong here and are checked; all others are the app's.

Elementwise float64 + - * / sqrt only, one rounded operation at a time, and running products in place
of powers, so that every member computes the same bits (protocols.md 1.8).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from blindsum.crypto.errors import ParameterRefused
from blindsum.crypto.trust.plan import Plan
from numpy.typing import NDArray

Chunk = NDArray[np.float64]

PREFIX = "server."
NEEDS_SINGLE_UPDATES = frozenset({"krum", "multi-krum", "median", "trimmed mean", "bulyan"})
"""Strategies of the literature that compare single updates; under secure aggregation nobody has them."""

_DEFAULTS: dict[str, dict[str, float]] = {
    "fedavg": {"learning_rate": 1.0},
    "fedavgm": {"learning_rate": 1.0, "momentum": 0.9},
    "fedadam": {"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-3},
}
_MOMENTS: dict[str, tuple[str, ...]] = {
    "fedavg": (),
    "fedavgm": ("momentum",),
    "fedadam": ("first", "second"),
}


@dataclass(frozen=True)
class Strategy:
    """A server optimiser that every member runs for itself on the opened sum."""

    name: str
    settings: Mapping[str, float]

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """The plan's strategy. Raises `ParameterRefused` for unknown names and values out of range."""
        return cls.parse(plan.strategy, plan.settings)

    @classmethod
    def parse(cls, name: str, settings: Mapping[str, str]) -> Self:
        """The strategy of a name with its `server.` settings as text."""
        if name in NEEDS_SINGLE_UPDATES:
            raise ParameterRefused(
                f"{name} compares the members' single updates, and under secure aggregation nobody has them: "
                f"only sums exist. Choose one of {', '.join(_DEFAULTS)}"
            )
        if name not in _DEFAULTS:
            raise ParameterRefused(f"there is no strategy {name!r}; choose one of {', '.join(_DEFAULTS)}")
        values = dict(_DEFAULTS[name])
        for key, text in settings.items():
            if not key.startswith(PREFIX):
                continue
            setting = key.removeprefix(PREFIX)
            if setting not in values:
                known = ", ".join(PREFIX + known for known in values)
                raise ParameterRefused(f"{name} has no setting {key!r}; it has {known}")
            values[setting] = _number(key, setting, text)
        return cls(name, values)

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of the moment vectors that ride in the training state."""
        return _MOMENTS[self.name]

    @property
    def products(self) -> tuple[str, ...]:
        """Names of the running products that ride in the training state."""
        return ("beta1", "beta2") if self.name == "fedadam" else ()

    def step(
        self, mean: Chunk, moments: Mapping[str, Chunk], products: Mapping[str, float]
    ) -> tuple[Chunk, dict[str, Chunk]]:
        """What is added to the values for a chunk of the mean update, and the chunk's new moments.

        `products` are those after this step.
        """
        rate = self.settings["learning_rate"]
        if self.name == "fedavg":
            return np.multiply(mean, rate), {}
        if self.name == "fedavgm":
            kept = np.multiply(moments["momentum"], self.settings["momentum"])
            momentum = np.add(kept, mean)
            return np.multiply(momentum, rate), {"momentum": momentum}
        beta1, beta2 = self.settings["beta1"], self.settings["beta2"]
        first = np.add(np.multiply(moments["first"], beta1), np.multiply(mean, 1.0 - beta1))
        square = np.multiply(mean, mean)
        second = np.add(np.multiply(moments["second"], beta2), np.multiply(square, 1.0 - beta2))
        unbiased = np.divide(first, 1.0 - products["beta1"])
        spread = np.sqrt(np.divide(second, 1.0 - products["beta2"]))
        moved = np.divide(unbiased, np.add(spread, self.settings["epsilon"]))
        return np.multiply(moved, rate), {"first": first, "second": second}


def _number(key: str, setting: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ParameterRefused(f"{key} = {text!r} isn't a number") from None
    share = setting in ("momentum", "beta1", "beta2")
    if not math.isfinite(value) or (share and not 0 <= value < 1) or (not share and value <= 0):
        raise ParameterRefused(
            f"{key} = {text} is out of range: {'within [0, 1)' if share else 'above zero'} is needed"
        )
    return value
