"""The plan: one training job, signed by the owner (protocols.md 1.2)."""

from typing import Annotated

import msgspec
from blindsum.crypto.canonical import Document
from blindsum.crypto.errors import PolicyViolation
from blindsum.crypto.trust.documents import Count, Digest
from blindsum.crypto.trust.policy import Policy, SchemeName, Weighting

KIND = "plan"

Seconds = Annotated[int, msgspec.Meta(ge=1, le=30 * 86_400)]


class Metric(Document, frozen=True, kw_only=True):
    """A training metric that rides inside the sum: its declared range and resolution."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    low: float
    high: float
    resolution: float

    def __post_init__(self) -> None:
        if not self.low < self.high or not 0 < self.resolution <= self.high - self.low:
            raise ValueError(f"metric {self.name}: needs low < high and 0 < resolution <= high - low")
        if (self.high - self.low) / self.resolution > 2**40:
            raise ValueError(f"metric {self.name}: more than 2^40 steps; choose a coarser resolution")


class Encoding(Document, frozen=True, kw_only=True):
    """How a member's update becomes integers (protocols.md 2).

    `bits` a quantised coordinate; `max_examples` is the sample count that weighs most (W_max);
    `weight_ratio` = W_max over the smallest weight; `clip_tolerance` is the share of a tensor's values,
    in parts per million, that may be clipped before its range is doubled.
    """

    bits: Annotated[int, msgspec.Meta(ge=2, le=32)]
    weighting: Weighting = "sqrt"
    max_examples: Annotated[int, msgspec.Meta(ge=1, lt=2**40)] = 1
    weight_ratio: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 16
    clip_tolerance: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 1000
    metrics: tuple[Metric, ...] = ()

    def __post_init__(self) -> None:
        names = [metric.name for metric in self.metrics]
        if len(set(names)) != len(names):
            raise ValueError("a metric is declared twice")


class Deadlines(Document, frozen=True, kw_only=True):
    """Seconds that each step may take; `gather` is how long a round waits for more members to come."""

    gather: Seconds = 10
    advertise: Seconds = 30
    share: Seconds = 30
    upload: Seconds = 3600
    confirm: Seconds = 30
    reveal: Seconds = 30
    conclude: Seconds = 60


class Plan(Document, frozen=True, kw_only=True):
    """One training job.

    `initial_state` is the keyed digest of S_0, `dimension` the number of shared coordinates, `layout`
    the keyed digest of names, shapes and dtypes. `strategy` and its settings are what the apps use.
    The cohort of a round is at least `cohort_min`; it waits `deadlines.gather` for `cohort_wanted`;
    never more than `cohort_max`.
    """

    federation: Digest
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    version: Annotated[int, msgspec.Meta(ge=1)]
    policy: Digest
    scheme: SchemeName
    rounds: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
    initial_state: Digest
    layout: Digest
    dimension: Annotated[int, msgspec.Meta(ge=1, lt=2**40)]
    tensors: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    cohort_min: Annotated[int, msgspec.Meta(ge=3)]
    cohort_wanted: Annotated[int, msgspec.Meta(ge=3)]
    cohort_max: Annotated[int, msgspec.Meta(ge=3)]
    encoding: Encoding
    first_round: Count = 1
    deadlines: Deadlines = Deadlines()
    strategy: str = "fedavg"
    settings: dict[str, str] = {}

    def __post_init__(self) -> None:
        if not self.cohort_min <= self.cohort_wanted <= self.cohort_max:
            raise ValueError("needs cohort_min <= cohort_wanted <= cohort_max")

    def cohort_floor(self, policy: Policy, members: int) -> int:
        """Fewest members of a round, with so many in the roster.

        Raises `PolicyViolation` when that is more than the plan allows in a round.
        """
        floor = max(self.cohort_min, policy.cohort_floor(members))
        if floor > self.cohort_max:
            raise PolicyViolation(
                f"plan {self.name!r} undercuts the policy: cohort_max: {self.cohort_max} is no more than "
                f"half of the {members} members, and a lying server could run two such rounds at once. Raise "
                "it, or let the policy allow that with split_cohorts"
            )
        return floor

    def check_against(self, policy: Policy) -> None:
        """Raises `PolicyViolation` naming the first setting that undercuts the policy."""
        checks = (
            (self.federation == policy.federation, "federation", "another federation's"),
            (self.scheme in policy.schemes, "scheme", f"{self.scheme} isn't among {policy.schemes}"),
            (self.cohort_min >= policy.n_min, "cohort_min", f"{self.cohort_min} < n_min {policy.n_min}"),
            (self.cohort_max <= policy.n_max, "cohort_max", f"{self.cohort_max} > n_max {policy.n_max}"),
            (
                policy.bits_min <= self.encoding.bits <= policy.bits_max,
                "encoding.bits",
                f"{self.encoding.bits} isn't within {policy.bits_min}..{policy.bits_max}",
            ),
            (
                self.encoding.weighting in policy.weightings,
                "encoding.weighting",
                f"{self.encoding.weighting} isn't among {policy.weightings}",
            ),
            (
                self.encoding.weight_ratio <= policy.max_weight_ratio,
                "encoding.weight_ratio",
                f"{self.encoding.weight_ratio} > {policy.max_weight_ratio}",
            ),
        )
        for holds, name, text in checks:
            if not holds:
                raise PolicyViolation(f"plan {self.name!r} undercuts the policy: {name}: {text}")
