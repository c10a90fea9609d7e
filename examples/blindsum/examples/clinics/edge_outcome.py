"""What `blindsum demo edge` found: all four ways of edge AI on one federation."""

from dataclasses import dataclass
from typing import Any

from blindsum.examples.clinics.collaborative_inference import CollaborativeInference
from blindsum.examples.clinics.device_models import DeviceOutcome
from blindsum.examples.clinics.hard_examples import HardOutcome
from blindsum.examples.clinics.outcome import Outcome


@dataclass(frozen=True)
class EdgeOutcome:
    """The parts of a run, each as its own module measured it; `seconds` of wall time for all."""

    clinics: Outcome
    devices: DeviceOutcome
    hard: HardOutcome
    inference: CollaborativeInference
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The document that `--json FILE` writes; accuracies and gains are fractions of 1."""
        document = self.clinics.to_json()
        return {
            "seed": document["seed"],
            "rounds": document["rounds"],
            "scheme": document["scheme"],
            "seconds": round(self.seconds, 2),
            "sites": document["sites"],
            "exact": document["exact"],
            "leak_scan": document["leak_scan"],
            **self.inference.json_parts(),
            "devices": self.devices.as_json(),
            "hard": self.hard.as_json(),
            "versions": document["versions"],
        }
