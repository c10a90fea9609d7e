"""What a run of the demo found: the data behind the table, the JSON file and the report."""

from dataclasses import asdict, dataclass, field
from typing import Any

WAYS: tuple[str, ...] = ("cloud_only", "cloud_finetuned", "edge_only", "fedavg", "personalised")

WAY_TITLES: dict[str, str] = {
    "cloud_only": "cloud only",
    "cloud_finetuned": "cloud + fine-tuned",
    "edge_only": "edge only",
    "fedavg": "plain FedAvg",
    "personalised": "collaborative, local head",
}

_IN_WORDS: dict[str, str] = {
    "cloud_only": "for the hospital's model as it is",
    "cloud_finetuned": "for the hospital's model fine-tuned on site",
    "edge_only": "for each clinic alone",
    "fedavg": "for one plain shared model",
}


@dataclass(frozen=True)
class SiteOutcome:
    """One site: its training images, and balanced accuracy (fraction of 1) on the test images by way."""

    name: str
    examples: int
    accuracy: dict[str, float]


@dataclass(frozen=True)
class RoundOutcome:
    """One secure round: its plan, survivors, bytes up of one member, and seconds by phase."""

    plan: str
    number: int
    survivors: int
    bytes_up: int
    seconds: dict[str, float]
    validation: dict[str, float]
    """Balanced accuracy on each site's validation images after the round."""
    check: str
    h1: str


@dataclass(frozen=True)
class LeakScan:
    """What was searched for in what the server saw, and what was found."""

    searched: list[str]
    places: list[str]
    files: int
    bytes: int
    hits: list[str]
    control_hits: list[str]
    correlation_update: float
    correlation_wire: float
    correlation_chance: float
    payloads: int
    update_picture: list[list[float]] = field(default_factory=list)
    wire_picture: list[list[float]] = field(default_factory=list)


@dataclass
class Outcome:
    """A whole run."""

    scheme: str
    rounds: int
    seed: int
    seconds: float
    sites: list[SiteOutcome]
    round_outcomes: list[RoundOutcome]
    bytes_up_per_param: float
    checkpoint_bytes_per_param: float
    dimension: int
    exact: bool
    exact_rounds: int
    max_error: float
    leak_scan: LeakScan
    trust_line: str
    receipts: list[dict[str, Any]]
    versions: dict[str, str]

    def mean_of_clinics(self, way: str) -> float:
        """Mean over clinic-1 to clinic-6."""
        values = [site.accuracy[way] for site in self.sites if site.name.startswith("clinic-")]
        return sum(values) / len(values)

    def site(self, name: str) -> SiteOutcome:
        """The site of that name."""
        return next(site for site in self.sites if site.name == name)

    def sentence(self) -> str:
        """One honest sentence on what the table shows."""
        rivals = [way for way in WAYS if way != "personalised" and self.has(way)]
        shared = self.mean_of_clinics("personalised") if self.has("personalised") else None
        best = max((way for way in WAYS if self.has(way)), key=self.mean_of_clinics)
        others = ", ".join(f"{100 * self.mean_of_clinics(way):.1f} % {_IN_WORDS[way]}" for way in rivals)
        if shared is None:
            return f"On the clinic mean: {others}. The best way in this run is {WAY_TITLES[best]!r}."
        against = f" against {others}" if others else ""
        return (
            f"On the clinic mean, training together with a local head reaches {100 * shared:.1f} % balanced "
            f"accuracy{against}; the best way in this run is {WAY_TITLES[best]!r}. One run with one seed: a "
            f"difference under 2 points may be chance."
        )

    def has(self, way: str) -> bool:
        """Whether every site has a figure for this way."""
        return all(way in site.accuracy for site in self.sites)

    def to_json(self) -> dict[str, Any]:
        """The document that `--json FILE` writes; accuracies are fractions of 1."""
        scan = asdict(self.leak_scan)
        del scan["update_picture"], scan["wire_picture"]
        return {
            "scheme": self.scheme,
            "rounds": self.rounds,
            "seed": self.seed,
            "seconds": round(self.seconds, 2),
            "sites": [
                {"name": site.name, "examples": site.examples}
                | {way: round(site.accuracy[way], 4) for way in WAYS if way in site.accuracy}
                for site in self.sites
            ],
            "bytes_up_per_param": round(self.bytes_up_per_param, 4),
            "checkpoint_bytes_per_param": round(self.checkpoint_bytes_per_param, 4),
            "dimension": self.dimension,
            "exact": self.exact,
            "exact_rounds": self.exact_rounds,
            "max_error": self.max_error,
            "leak_scan": scan,
            "trust_line": self.trust_line,
            "round_outcomes": [asdict(item) for item in self.round_outcomes],
            "receipts": self.receipts,
            "versions": self.versions,
        }
