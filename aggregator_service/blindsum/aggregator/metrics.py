"""What the service measures of itself, for Prometheus.

Counts, times, sizes and states, by federation at most. No label names a member, and nothing is measured of
what members train: updates, keys, accuracy and example counts are sealed, so the server has none to show.
A federation's label is the first 16 hex digits of its id.
"""

import functools
import platform
from collections import Counter as Tally
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from blindsum.aggregator.clock import Clock
from blindsum.aggregator.engine import FederationEngine
from blindsum.aggregator.observed_state import ObservedState
from blindsum.aggregator.round_run import ABORTED, CONCLUDED, OPEN, PUBLISHED
from blindsum.aggregator.settings import AggregatorSettings
from blindsum.aggregator.store.blobs import ROOMS, BlobStore
from blindsum.aggregator.store.records import (
    CheckpointRecord,
    CloseRecord,
    ContributionRecord,
    EventRecord,
    RoundRecord,
)
from blindsum.aggregator.store.state import Advance, Append, Change, Delete, Insert, Put
from blindsum.crypto.errors import RefusalReason
from cryptography import x509
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

# A second series beside each counter that no dashboard asks for.
disable_created_metrics()  # type: ignore[no-untyped-call]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STATES = (OPEN, PUBLISHED, CONCLUDED, ABORTED)
_PHASE_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900, 3600, 14_400, 86_400)
_CALL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60, 600)


def federation_label(federation: bytes) -> str:
    """How a federation is named in metrics and logs."""
    return federation.hex()[:16]


class ServiceMetrics:
    """The metrics of one server, in a registry of their own. Everything runs on the server's event loop,
    `disk_usage` aside."""

    def __init__(
        self,
        settings: AggregatorSettings,
        clock: Clock,
        store: ObservedState,
        blobs: BlobStore,
        engines: Mapping[bytes, FederationEngine],
    ) -> None:
        self._clock = clock
        self._store = store
        self._blobs = blobs
        self._engines = engines
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"blindsum_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"blindsum_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"blindsum_{name}", text, labels, registry=registry, buckets=buckets)

        Info("blindsum_build", "Which release runs, on what.", registry=registry).info(
            {"version": version("blindsum"), "python": platform.python_version()}
        )
        self.ready = gauge("ready", "1 while the server can do its work, 0 while it can't or shuts down.")
        self._rounds = gauge("rounds", "Rounds in the state, by what became of them.", "federation", "state")
        self._outcomes = counter(
            "rounds_ended_total", "Rounds that ended since the start, by outcome.", "federation", "outcome"
        )
        self._refused_sums = counter(
            "sums_refused_total", "Sums that a survivor refused: look at the audit at once.", "federation"
        )
        self._phase = histogram(
            "phase_seconds", "How long a phase of a round was open.", _PHASE_BUCKETS, "phase"
        )
        self._round_seconds = histogram(
            "round_seconds", "From the opening of a round to its end.", _PHASE_BUCKETS, "outcome"
        )
        self._deadline = gauge(
            "round_deadline_timestamp_seconds", "When the open phase ends; 0 without one.", "federation"
        )
        self._participants = gauge(
            "round_participants", "Members asked in the open phase.", "federation", "phase"
        )
        self._replied = gauge("round_replied", "Members that replied in it.", "federation", "phase")
        self._paused = gauge("paused", "1 while no round opens after too many aborts.", "federation")
        self._connected = gauge("members_connected", "Members with an open watch stream.", "federation")
        self._enrolled = gauge("members_enrolled", "Members in the roster in force.", "federation")
        self._roster_until = gauge(
            "roster_valid_until_timestamp_seconds", "When the roster expires.", "federation"
        )
        self._policy_until = gauge(
            "policy_valid_until_timestamp_seconds", "When the policy expires.", "federation"
        )
        self._uploads = counter(
            "uploads_accepted_total", "Uploads that were made durable and acknowledged.", "federation", "kind"
        )
        self._deferred = counter("uploads_deferred_total", "Uploads that were told to ask again later.")
        self._slots = gauge("upload_slots", "Upload slots that there are.")
        self._slots.set(settings.upload_slots)
        self._slots_taken = gauge("upload_slots_taken", "Upload slots in use.")
        self._fold_waiting = gauge(
            "fold_waiting", "Accepted uploads that aren't part of the sum yet.", "federation"
        )
        self._fold_lag = gauge("fold_lag_seconds", "How long the oldest of them has waited.", "federation")
        self._commits = gauge("commits_in_flight", "Commits that wait for their fsync.")
        self._storage_failures = counter("storage_failures_total", "Commits that the storage refused.")
        self._disk_free = gauge("disk_free_bytes", "Room left on the disk of the data directory.")
        self._disk_reserve = gauge("disk_reserve_bytes", "Below this, uploads wait.")
        self._disk_reserve.set(settings.disk_reserve)
        self._blob_bytes = gauge("blob_bytes", "Stored blobs, by room.", "room")
        self._calls = histogram(
            "call_seconds", "How long calls took, by outcome.", _CALL_BUCKETS, "method", "outcome"
        )
        self._received = counter("received_bytes_total", "Bytes of messages that came.", "method")
        # Called for every chunk: finding a label's counter costs more than counting.
        self._received_by = functools.cache(self._received.labels)
        self._sent = counter("sent_bytes_total", "Bytes of messages that were sent.", "method")
        self._refusals = counter("refusals_total", "Calls that were refused, by reason.", "method", "reason")
        self._audit = gauge("audit_events", "Events in the audit.")
        self.audit_broken = gauge("audit_broken", "1 if the audit's chain didn't hold when last checked.")
        self._certificate_until = gauge(
            "server_certificate_not_after_timestamp_seconds", "When the listeners' certificate expires."
        )
        self._authority_until = gauge(
            "transport_authority_not_after_timestamp_seconds", "When the transport authority expires."
        )
        self._tally: dict[bytes, Tally[str]] = {}
        self._newest: dict[bytes, tuple[int, str]] = {}
        self._phase_since: dict[tuple[bytes, int], int] = {}
        self._accepted: dict[tuple[bytes, int, str], int] = {}
        self._failures_seen = self._deferred_seen = 0
        self._blobs_usage: dict[str, int] = {}
        store.observe(self._committed)

    def count_stored(self) -> None:
        """Take up what the state holds. Call it once, before anything is committed. Blocks."""
        for row in self._store.find(RoundRecord):
            self._tally.setdefault(row.federation, Tally())[row.state] += 1
            self._newest[row.federation] = (row.number, row.state)
            if row.state == OPEN:
                self._phase_since[row.federation, row.number] = row.opened_ms
            elif row.state == PUBLISHED:
                self._phase_since[row.federation, row.number] = row.published_ms
        for close in self._store.find(CloseRecord):
            key = (close.federation, close.round)
            if key in self._phase_since:
                self._phase_since[key] = max(self._phase_since[key], close.at_ms)
        now = self._clock.now_ms()
        for upload in self._store.find(ContributionRecord):
            key = (upload.federation, upload.round)
            if upload.folded is None and key in self._phase_since:
                self._accepted[*key, upload.member] = now

    # What was committed

    def _committed(self, changes: tuple[Change, ...]) -> None:
        for change in changes:
            if isinstance(change, Append):
                self._event(change.event)
            elif isinstance(change, Delete) and change.kind is ContributionRecord:
                # A member was removed while its upload waited.
                gone = dict(change.where)
                for place in list(self._accepted):
                    found = dict(zip(("federation", "round", "member"), place, strict=True))
                    if gone.items() <= found.items():
                        del self._accepted[place]
            elif isinstance(change, (Insert, Put, Advance)):
                record = change.record
                if isinstance(record, RoundRecord):
                    self._round(record)
                elif isinstance(record, CloseRecord):
                    self._end_phase(record.federation, record.round, record.step, record.at_ms)
                elif isinstance(record, ContributionRecord):
                    self._contribution(record)
                elif isinstance(record, CheckpointRecord) and not record.agreed:
                    self._uploads.labels(federation_label(record.federation), "checkpoint").inc()

    def _event(self, event: EventRecord) -> None:
        if event.kind == "sum refused":
            self._refused_sums.labels(federation_label(event.federation)).inc()

    def _round(self, record: RoundRecord) -> None:
        tally = self._tally.setdefault(record.federation, Tally())
        number, state = self._newest.get(record.federation, (0, ""))
        if number == record.number:
            tally[state] -= 1
        tally[record.state] += 1
        self._newest[record.federation] = (record.number, record.state)
        key = (record.federation, record.number)
        if record.state == OPEN:
            self._phase_since[key] = record.opened_ms
        elif record.state == PUBLISHED:
            self._end_phase(*key, "publish", record.published_ms)
        else:
            if record.state == CONCLUDED:
                self._end_phase(*key, "conclude", record.ended_ms)
            label = federation_label(record.federation)
            self._outcomes.labels(label, record.state).inc()
            self._round_seconds.labels(record.state).observe((record.ended_ms - record.opened_ms) / 1000)
            self._phase_since.pop(key, None)
            for place in [place for place in self._accepted if place[:2] == key]:
                del self._accepted[place]

    def _end_phase(self, federation: bytes, number: int, phase: str, at_ms: int) -> None:
        since = self._phase_since.get((federation, number))
        if since is not None:
            self._phase.labels(phase).observe(max(0, at_ms - since) / 1000)
            self._phase_since[federation, number] = at_ms

    def _contribution(self, record: ContributionRecord) -> None:
        place = (record.federation, record.round, record.member)
        if record.folded is None:
            self._uploads.labels(federation_label(record.federation), "contribution").inc()
            self._accepted[place] = self._clock.now_ms()
        else:
            self._accepted.pop(place, None)

    # Calls

    def received(self, method: str, size: int) -> None:
        """A message of so many bytes came."""
        self._received_by(method).inc(size)

    def sent(self, method: str, size: int) -> None:
        """A message of so many bytes was sent."""
        self._sent.labels(method).inc(size)

    def finished(self, method: str, outcome: str, seconds: float) -> None:
        """A call ended."""
        self._calls.labels(method, outcome).observe(seconds)

    def refused(self, method: str, caller: Any, reason: RefusalReason, text: str) -> None:  # noqa: ARG002
        """A call was refused. Who called, and what was said, is no metric: it is in the log."""
        self._refusals.labels(method, reason.value).inc()

    # What is shown

    def disk_usage(self) -> None:
        """Measure the disk, for the next `text`. Blocks."""
        usage = {"free": self._blobs.free_bytes()}
        for room in ROOMS:
            usage[room] = sum(self._blobs.size(name) or 0 for name in self._blobs.names(room))
        self._blobs_usage = usage

    def certificates(self, server: bytes, authority: bytes) -> None:
        """The certificates (PEM) that the listeners show."""
        for gauge, pem in ((self._certificate_until, server), (self._authority_until, authority)):
            gauge.set(x509.load_pem_x509_certificate(pem).not_valid_after_utc.timestamp())

    def text(self, slots_taken: int, deferred: int, audit_events: int) -> bytes:
        """Everything in Prometheus' text format, with gauges as they are now."""
        self._slots_taken.set(slots_taken)
        self._deferred.inc(deferred - self._deferred_seen)
        self._deferred_seen = deferred
        self._audit.set(audit_events)
        self._commits.set(self._store.in_flight)
        self._storage_failures.inc(self._store.failures - self._failures_seen)
        self._failures_seen = self._store.failures
        for name, size in self._blobs_usage.items():
            (self._disk_free if name == "free" else self._blob_bytes.labels(name)).set(size)
        self._participants.clear()
        self._replied.clear()
        now = self._clock.now_ms()
        for federation, engine in self._engines.items():
            self._federation(federation, engine, now)
        return generate_latest(self.registry)

    def _federation(self, federation: bytes, engine: FederationEngine, now: int) -> None:
        label = federation_label(federation)
        tally = self._tally.get(federation, Tally())
        for state in STATES:
            self._rounds.labels(label, state).set(tally[state])
        documents, run = engine.documents, engine.run
        self._paused.labels(label).set(bool(engine.paused))
        self._connected.labels(label).set(len(engine.presence.members()))
        roster, policy = documents.roster, documents.policy
        self._enrolled.labels(label).set(0 if roster is None else len(roster.members))
        self._roster_until.labels(label).set(0 if roster is None else roster.valid_until)
        self._policy_until.labels(label).set(0 if policy is None else policy.valid_until)
        waiting = [at for (owner, _, _), at in self._accepted.items() if owner == federation]
        self._fold_waiting.labels(label).set(len(waiting))
        self._fold_lag.labels(label).set(max(0, now - min(waiting)) / 1000 if waiting else 0)
        live = run is not None and run.record.state in (OPEN, PUBLISHED) and run.settled
        self._deadline.labels(label).set(run.deadline_ms / 1000 if run is not None and live else 0)
        if run is not None and live:
            phase = run.step or "conclude"
            asked = run.machine.participants if run.step else run.survivors
            replied = run.machine.replied if run.step else run.conclusions
            self._participants.labels(label, phase).set(len(asked))
            self._replied.labels(label, phase).set(len(replied))
