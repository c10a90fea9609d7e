"""`blindsum demo clinics`: a hospital and six clinics train together, each in a process of its own.

The demo plays the owner and the operator: it starts the aggregator as its own process, founds two
federations on it (one for training together with a local head, one for the rival, plain FedAvg by
size, whose policy allows a larger weight ratio), invites and admits the sites, signs the plans, and at
the end puts the table, the checks and the report together.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from blindsum.aggregator.capture import RECEIVED, read_capture
from blindsum.client.owner import Owner
from blindsum.crypto.trust.plan import Deadlines, Encoding, Metric
from blindsum.examples.clinics.child_processes import ChildProcesses
from blindsum.examples.clinics.live_view import LiveView
from blindsum.examples.clinics.model import initial_model
from blindsum.examples.clinics.outcome import WAYS, Outcome, RoundOutcome, SiteOutcome
from blindsum.examples.clinics.report import write_report
from blindsum.examples.clinics.server_view import captured_uploads, exact_rounds, read_witness, scan_server
from blindsum.examples.clinics.sites import COHORT, FEDERATION, HOSPITAL, LATE_CLINIC, site_spec
from blindsum.examples.clinics.ways import shared_state, way_named
from blindsum.proto.v1 import round_pb2
from rich.console import Console

N_MAX = 16
BITS = {"masking": 22, "bfv": 16, "ckks": 16, "paillier": 16}
"""Bits of a quantised coordinate: what fits each scheme best for up to 16 members."""

_TOGETHER = ("personalised", "fedavg")
_SECONDS = 120.0
"""How long the demo waits for a child to say something before it gives up."""


@dataclass
class Settings:
    """What the user chose."""

    scheme: str
    rounds: int
    seed: int
    ways: tuple[str, ...]
    folder: Path
    json_file: Path | None = None


@dataclass
class Collected:
    """What the sites said."""

    rounds: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    validation: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict)
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)


class ClinicsDemo:
    """One run of the demo."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self._settings = settings
        self._console = console
        self._out = settings.folder
        self._capture = self._out / "server-saw"
        self._collected = Collected()
        self._owners: dict[str, Owner] = {}
        self._sites = list(COHORT)

    def run(self) -> Outcome:
        """Run everything and write the report. Every process that was started has ended afterwards."""
        started = time.monotonic()
        settings = self._settings
        with (
            ChildProcesses(self._out / "logs") as children,
            LiveView(self._console, [s.name for s in FEDERATION], settings.rounds, self._bytes_up) as view,
        ):
            self._children, self._view = children, view
            view.stage("starting the aggregator and the sites, each in its own process")
            self._start_server()
            for site in self._sites:
                self._start_site(site)
            self._wait_all("ready", self._sites)
            for way in self._together():
                view.stage(f"{way_named(way).title}: founding the federation, inviting, admitting")
                self._found(way)
                self._admit(way, self._sites)
                view.stage(f"{way_named(way).title}: training through the server ({settings.scheme})")
                self._train(way)
            view.stage("each site alone, then the hospital's model at the clinics")
            self._alone()
            view.stage("the late clinic joins")
            self._late_clinic()
            view.stage("testing every model on the test images, once")
            self._each(self._sites, {"do": "evaluate"})
            for site in self._sites:
                children.end(site)
            children.end("aggregator")
            view.stage("checking every sum, and searching what the server saw")
            outcome = self._outcome(started)
        write_report(outcome, self._out / "report.html")
        outcome.seconds = time.monotonic() - started
        if settings.json_file is not None:
            settings.json_file.write_text(json.dumps(outcome.to_json(), indent=1) + "\n", encoding="utf-8")
        return outcome

    def _together(self) -> list[str]:
        return [way for way in _TOGETHER if way in self._settings.ways]

    def _bytes_up(self) -> int:
        return sum(path.stat().st_size for path in self._capture.glob("*-Upload.capture"))

    # The operator's part

    def _start_server(self) -> None:
        ready = self._out / "aggregator.ready"
        arguments = ["blindsum.aggregator.commands", "--data", str(self._out / "aggregator")]
        arguments += ["--any-owner", "--enrolment-port", "0", "--member-port", "0"]
        arguments += ["--capture", str(self._capture), "--ready-file", str(ready)]
        self._children.start("aggregator", arguments)
        deadline = time.monotonic() + _SECONDS
        while not ready.exists():
            if time.monotonic() > deadline or not self._children.alive("aggregator"):
                raise self._children.failure("aggregator")
            time.sleep(0.05)
        ports, ca = ready.read_text(encoding="ascii").split("\n", 1)
        self._ports = [int(port) for port in ports.split()]
        self._ca = ca

    def _start_site(self, site: str) -> None:
        self._children.start(
            site,
            [
                "blindsum.examples.clinics.member_process",
                site,
                *("--folder", str(self._out / "members" / site)),
                *("--published", str(self._out / "hospital-model.pt")),
                *("--seed", str(self._settings.seed)),
                *("--rounds", str(self._settings.rounds)),
            ],
        )

    # The owner's part

    def _found(self, way: str) -> None:
        raise NotImplementedError
