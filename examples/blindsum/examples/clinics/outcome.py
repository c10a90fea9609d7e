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
        local, shared = self.mean_of_clinics("edge_only"), self.mean_of_clinics("personalised")
        plain, tuned = self.mean_of_clinics("fedavg"), self.mean_of_clinics("cloud_finetuned")
        best = max(WAYS, key=self.mean_of_clinics)
        return (
            f"On the clinic mean, training together with a local head reaches {100 * shared:.1f} % balanced "
            f"accuracy against {100 * local:.1f} % for each clinic alone, {100 * plain:.1f} % for one plain "
            f"shared model and {100 * tuned:.1f} % for the hospital's model fine-tuned on site; the best way "
            f"in this run is {WAY_TITLES[best]!r}. One run with one seed: a difference under 2 points may be "
            f"chance."
        )

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
