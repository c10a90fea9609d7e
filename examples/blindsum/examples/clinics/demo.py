"""`blindsum demo clinics`: a hospital and six clinics train together, each in a process of its own.

The demo plays the owner and the operator: it starts the aggregator as its own process, founds two
federations on it (one for training together with a local head, one for the rival, plain FedAvg by
size, whose policy allows a larger weight ratio), invites and admits the sites, signs the plans, and at
the end puts the table, the checks and the report together.
"""

import json
import queue
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from blindsum.client.owner import Owner
from blindsum.crypto.trust.plan import Deadlines, Plan
from blindsum.examples.clinics.child_processes import ChildProcesses, Event
from blindsum.examples.clinics.live_view import LiveView
from blindsum.examples.clinics.model import initial_model
from blindsum.examples.clinics.outcome import LeakScan, Outcome, RoundOutcome, SiteOutcome
from blindsum.examples.clinics.report import write_report
from blindsum.examples.clinics.server_view import (
    Witness,
    read_witness,
    received_bytes,
    scan_server,
    secrets_in,
    sums_are_exact,
)
from blindsum.examples.clinics.sites import COHORT, FEDERATION, HOSPITAL, LATE_CLINIC
from blindsum.examples.clinics.ways import WAYS, shared_state, way_named
from rich.console import Console

N_MAX = 16
BITS = {"masking": 22, "bfv": 16, "ckks": 16, "paillier": 16}
"""Bits of a quantised coordinate: what fits each scheme best for up to 16 members."""

MAX_EXAMPLES = 1600
"""The hospital's images: what weighs most."""

_WEIGHT_RATIO = {"personalised": 16, "fedavg": 128}
"""Plain FedAvg weighs by size, and 1,600 images are 40 times 40; so its federation has its own policy."""

_VERSIONS = ("blindsum", "torch", "numpy", "grpcio", "cryptography")

_LIMIT = 900.0
"""Seconds without a word from any child after which the demo gives up."""


@dataclass(frozen=True)
class Settings:
    """What the user chose."""

    scheme: str
    rounds: int
    seed: int
    ways: tuple[str, ...]
    folder: Path


@dataclass
class Collected:
    """What the sites said."""

    rounds: dict[tuple[str, int], dict[str, dict[str, Any]]] = field(default_factory=dict)
    """(way, index) -> site -> its round event."""
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)


class ClinicsDemo:
    """One run of the demo. `while_served` is called when the sites are done and the aggregator still runs."""

    def __init__(
        self, settings: Settings, console: Console, while_served: Callable[[], None] = lambda: None
    ) -> None:
        self._settings = settings
        self._while_served = while_served
        self._out = settings.folder
        self._capture = self._out / "server-saw"
        self._said = Collected()
        self._plans: dict[str, Plan] = {}
        self._children = ChildProcesses(self._out / "logs")
        self._view = LiveView(console, [s.name for s in FEDERATION], settings.rounds, self._bytes_received)
        self._backlog: list[Event] = []
        self._shared = [way for way in ("fedavg", "personalised") if way in settings.ways]

    def run(self) -> Outcome:
        """Run everything and write the report. Every process that was started has ended afterwards."""
        started = time.monotonic()
        view = self._view
        with self._children, view:
            view.stage("starting the aggregator and the sites, each a process of its own")
            self._start_server()
            for site in COHORT:
                self._start_site(site)
            self._wait("ready", COHORT)
            for way in self._shared:
                title = way_named(way).title
                view.stage(f"{title}: founding the federation, inviting, admitting")
                with self._found(way) as owner:
                    self._admit(owner, way, COHORT)
                    view.stage(
                        f"{way_named(way).title}: training through the server ({self._settings.scheme})"
                    )
                    self._plans[way] = self._start_plan(owner, way)
                    self._each(COHORT, {"do": "together", "way": way, "federation": way})
            self._start_site(LATE_CLINIC)
            view.stage("each site alone, for comparison")
            self._tell(COHORT, {"do": "alone", "way": "edge_only"})
            self._late_clinic()
            self._wait_done("alone", COHORT)
            sites = [spec.name for spec in FEDERATION]
            if {"cloud_only", "cloud_finetuned"} & set(self._settings.ways):
                view.stage("the hospital's model at every site")
                for cloud in ("cloud_only", "cloud_finetuned"):
                    if cloud in self._settings.ways:
                        self._each(sites, {"do": "from_hospital", "way": cloud})
            view.stage("testing every model on the test images, once")
            self._each(sites, {"do": "evaluate"})
            for site in sites:
                self._children.end(site)
            self._while_served()
            self._children.end("aggregator")
            view.stage("checking every sum, and searching what the server saw")
            outcome = self._outcome()
        outcome.seconds = time.monotonic() - started
        write_report(outcome, self._out / "report.html")
        return outcome

    def _bytes_received(self) -> int:
        return sum(path.stat().st_size for path in self._capture.glob("*-Upload-*.capture"))

    # The operator's part

    def _start_server(self) -> None:
        ready = self._out / "aggregator.ready"
        self._children.start(
            "aggregator",
            [
                "blindsum.aggregator.commands",
                *("--data", str(self._out / "aggregator"), "--any-owner", "--while-stdin"),
                *("--enrolment-port", "0", "--member-port", "0"),
                *("--capture", str(self._capture), "--ready-file", str(ready)),
            ],
        )
        deadline = time.monotonic() + 60
        while not ready.exists():
            if time.monotonic() > deadline or not self._children.alive("aggregator"):
                raise self._children.failure("aggregator")
            time.sleep(0.02)
        ports, self._ca = ready.read_text(encoding="ascii").split("\n", 1)
        self._enrolment, self._members = (f"localhost:{port}" for port in ports.split())

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

    def _found(self, way: str) -> Owner:
        owner = Owner.init(
            self._out / "owners" / way,
            f"radiographs, {way_named(way).title}",
            enrolment_address=self._enrolment,
            member_address=self._members,
            ca=self._ca,
            schemes=(self._settings.scheme,),
            n_min=5,
            n_max=N_MAX,
            max_weight_ratio=_WEIGHT_RATIO[way],
        )
        owner.register()
        return owner

    def _admit(self, owner: Owner, way: str, sites: Iterable[str]) -> None:
        """Invite the sites, wait until their devices have asked, admit them, wait until they know."""
        sites = tuple(sites)
        for site in sites:
            invitation = owner.invite(site)
            self._tell((site,), {"do": "join", "invitation": str(invitation), "federation": way})
        waiting = set(sites)
        while waiting:
            # The owner has no open line to the server: it asks, as `blindsum owner admit` does.
            self._take_events(0.1)
            waiting = set(sites) - {one.member for one in owner.pending() if not one.problem}
        owner.admit(*sites)
        self._wait_done("join", sites)

    def _start_plan(self, owner: Owner, way: str) -> Plan:
        return owner.start_plan(
            way,
            self._first_state(way),
            rounds=self._settings.rounds,
            scheme=self._settings.scheme,  # type: ignore[arg-type]
            weighting="sqrt" if way_named(way).weight == "sqrt" else "size",
            weight_ratio=_WEIGHT_RATIO[way],
            max_examples=MAX_EXAMPLES,
            bits=BITS[self._settings.scheme],
            metrics={"loss": (0.0, 16.0)},
            cohort_min=5,
            cohort_wanted=len(COHORT),
            cohort_max=N_MAX,
            deadlines=Deadlines(gather=20, advertise=60, share=60, upload=600, confirm=60, reveal=60),
        )

    def _first_state(self, way: str) -> dict[str, Any]:
        return dict(shared_state(initial_model(self._settings.seed), way_named(way)))

    def _late_clinic(self) -> None:
        """The late clinic comes after training: it joins, takes what the others learnt, and adapts."""
        late = (LATE_CLINIC,)
        self._wait("ready", late)
        for way in self._shared:
            with Owner.open(self._out / "owners" / way) as owner:
                self._admit(owner, way, late)
            self._each(late, {"do": "newcomer", "way": way, "federation": way})
        self._each(late, {"do": "alone", "way": "edge_only"})

    # What the children say

    def _tell(self, sites: Iterable[str], order: dict[str, str]) -> None:
        for site in sites:
            self._view.phase(site, order["do"].replace("_", " "))
            self._children.tell(site, json.dumps(order))

    def _each(self, sites: Iterable[str], order: dict[str, str]) -> None:
        """Give an order to the sites and wait until all have done it."""
        sites = tuple(sites)
        self._tell(sites, order)
        self._wait_done(order["do"], sites)

    def _wait_done(self, what: str, sites: Iterable[str]) -> None:
        self._wait_for(sites, lambda event: event.kind == "done" and event.values["order"]["do"] == what)

    def _wait(self, kind: str, sites: Iterable[str]) -> None:
        self._wait_for(sites, lambda event: event.kind == kind)

    def _wait_for(self, sites: Iterable[str], holds: Callable[[Event], bool]) -> None:
        missing = set(sites)
        kept: list[Event] = []
        while missing:
            event = self._backlog.pop(0) if self._backlog else self._next_event(_LIMIT)
            if event.child in missing and holds(event):
                missing.discard(event.child)
            elif event.kind in ("ready", "done"):
                kept.append(event)
        self._backlog = kept + self._backlog

    def _take_events(self, seconds: float) -> None:
        """Keep what the children said in the meantime for later."""
        try:
            self._backlog.append(self._next_event(seconds))
        except TimeoutError:
            return

    def _next_event(self, seconds: float) -> Event:
        try:
            event = self._children.events.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError("no child has said anything for a long time; see the logs") from None
        if event.kind == "exit":
            raise self._children.failure(event.child)
        self._note(event)
        return event

    def _note(self, event: Event) -> None:
        values, site = dict(event.values), event.child
        if event.kind == "phase":
            self._view.phase(site, f"{values['phase']}")
        elif event.kind == "round":
            self._said.rounds.setdefault((values["way"], values["count"]), {})[site] = values
            self._view.round_done(site, values)
        elif event.kind == "accuracies":
            self._said.accuracy[site] = values["accuracy"]
        elif event.kind == "ready":
            self._said.examples[site] = values["examples"]
        elif event.kind == "done":
            self._view.phase(site, "done")

    # The end

    def _outcome(self) -> Outcome:
        settings, said = self._settings, self._said
        witnesses = self._witnesses()
        exact = [sums_are_exact(witnesses.get(key, [])) for key in said.rounds]
        received, checkpoints = received_bytes(self._capture)
        dimension = max((plan.dimension for plan in self._plans.values()), default=0)
        uploads = sum(self._plans[way].dimension * len(by_site) for (way, _), by_site in said.rounds.items())
        per_param = (received - checkpoints) / uploads if uploads else 0.0
        rounds = [self._round_outcome(way, by_site, per_param) for (way, _), by_site in said.rounds.items()]
        return Outcome(
            scheme=settings.scheme,
            rounds=settings.rounds,
            seed=settings.seed,
            seconds=0.0,
            sites=[
                SiteOutcome(spec.name, said.examples[spec.name], self._accuracy(spec.name))
                for spec in FEDERATION
            ],
            round_outcomes=rounds,
            bytes_up_per_param=per_param,
            checkpoint_bytes_per_param=checkpoints / uploads if uploads else 0.0,
            dimension=dimension,
            exact=bool(exact) and all(exact),
            exact_rounds=len(exact),
            max_error=max(
                (one["max_error"] for said_ in said.rounds.values() for one in said_.values()), default=0.0
            ),
            leak_scan=self._scan(witnesses),
            trust_line=next(
                (one["trust"] for by_site in said.rounds.values() for one in by_site.values()), ""
            ),
            receipts=[
                {
                    "plan": item.plan,
                    "round": item.number,
                    "survivors": item.survivors,
                    "check": item.check,
                    "h1": item.h1,
                }
                for item in rounds
            ],
            versions={
                name: version(name) for name in ("blindsum", "torch", "numpy", "grpcio", "cryptography")
            },
        )

    def _accuracy(self, site: str) -> dict[str, float]:
        accuracy = dict(self._said.accuracy[site])
        if site == HOSPITAL and "edge_only" in accuracy:
            accuracy.setdefault("cloud_only", accuracy["edge_only"])
        return {way.name: accuracy[way.name] for way in WAYS if way.name in self._settings.ways}

    def _round_outcome(self, way: str, by_site: dict[str, dict[str, Any]], per_param: float) -> RoundOutcome:
        one = by_site.get(HOSPITAL) or next(iter(by_site.values()))
        return RoundOutcome(
            plan=way,
            number=one["number"],
            survivors=one["survivors"],
            bytes_up=round(per_param * self._plans[way].dimension),
            seconds=one["seconds"],
            validation={site: values["validation"] for site, values in sorted(by_site.items())},
            check=one["check"],
            h1=one["h1"],
        )

    def _witnesses(self) -> dict[tuple[str, int], list[Witness]]:
        found: dict[tuple[str, int], list[Witness]] = {}
        for (way, index), by_site in self._said.rounds.items():
            number = next(iter(by_site.values()))["number"]
            for site in COHORT:
                witness = read_witness(site, self._out / "members" / site / way, number)
                if witness is not None:
                    found.setdefault((way, index), []).append(witness)
        return found

    def _scan(self, witnesses: dict[tuple[str, int], list[Witness]]) -> LeakScan:
        """The leak scan over the first and the last round of each way, all members."""
        chosen = [
            witness
            for way in self._shared
            for index in sorted({1, self._settings.rounds})
            for witness in witnesses.get((way, index), [])
        ]
        way = self._shared[-1]
        shown = next(one for one in witnesses[way, 1] if one.member == HOSPITAL)
        return scan_server(
            capture=self._capture,
            server_data=self._out / "aggregator",
            server_logs=self._children.log("aggregator").parent,
            witnesses=chosen,
            secrets=secrets_in([self._out / "members", self._out / "owners"]),
            bits=BITS[self._settings.scheme],
            n_max=N_MAX,
            shown=shown,
        )
