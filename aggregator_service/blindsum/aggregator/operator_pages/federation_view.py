"""What the pages show, made from the engines and the state: plain values, nothing that can be changed.

Everything here is what the server knows anyway. Updates, example counts, accuracy and other metrics are
sealed, so they can't be shown; the pages say so.
"""

import datetime as dt
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from blindsum.aggregator.engine import FederationEngine
from blindsum.aggregator.operator_pages.recent_refusals import SeenRefusal
from blindsum.aggregator.round_run import ABORTED, CONCLUDED, OPEN, PUBLISHED, RoundRun
from blindsum.aggregator.store.records import (
    CertificateRecord,
    ContributionRecord,
    EventRecord,
    JoinRecord,
    RoundRecord,
)
from blindsum.aggregator.store.state import StateStore
from blindsum.crypto.trust.header import BoundHeader

HISTORY_ROWS = 50
EVENT_ROWS = 50
_LONG_HEX = re.compile(r"[0-9a-f]{32,}")


@dataclass(frozen=True)
class Phase:
    """One phase of the running round: "done", "open" or "next"."""

    name: str
    state: str


@dataclass(frozen=True)
class RunningRound:
    """The newest round while it isn't over."""

    number: int
    scheme: str
    phases: tuple[Phase, ...]
    phase: str
    asked: int
    replied: int
    missing: tuple[str, ...]
    deadline: str
    seconds_left: int
    opened: str
    accepted_bytes: int


@dataclass(frozen=True)
class MemberRow:
    """A member of the roster, as the server sees it."""

    name: str
    organisation: str
    state: str
    since: str
    certificate_until: str
    certificate_soon: bool
    in_round: str


@dataclass(frozen=True)
class RoundRow:
    """A round that ran."""

    number: int
    state: str
    scheme: str
    opened: str
    duration: str
    survivors: int
    sum_bytes: int
    h1: str
    next_state: str
    reason: str


@dataclass(frozen=True)
class EventRow:
    """One line of the audit."""

    sequence: int
    at: str
    kind: str
    detail: str


@dataclass(frozen=True)
class FederationView:
    """A federation on the pages. `ident` is its id in hexadecimal."""

    ident: str
    label: str
    plan: str
    scheme: str
    rounds_done: int
    rounds_planned: int
    enrolled: int
    connected: int
    ready: int
    waiting: int
    roster_version: int
    roster_until: str
    policy_version: int
    policy_until: str
    attention: tuple[str, ...]
    running: RunningRound | None


def federation_view(engine: FederationEngine, store: StateStore, now_ms: int) -> FederationView:
    """The head of a federation's page, and its card on the overview."""
    documents, record = engine.documents, engine.record
    roster, policy, plan = documents.roster, documents.policy, documents.plan
    requests = store.find(JoinRecord, federation=engine.federation)
    waiting = sum(1 for row in requests if row.refusal is None and not row.certificate)
    return FederationView(
        ident=engine.federation.hex(),
        label=engine.federation.hex()[:16],
        plan="" if plan is None else plan.name,
        scheme="" if plan is None else plan.scheme,
        rounds_done=0 if engine.state is None else engine.state.state_round,
        rounds_planned=0 if plan is None else plan.rounds,
        enrolled=0 if roster is None else len(roster.members),
        connected=len(engine.presence.members()),
        ready=len(engine.presence.ready()),
        waiting=waiting,
        roster_version=record.roster_version,
        roster_until="" if roster is None else _day(roster.valid_until),
        policy_version=record.policy_version,
        policy_until="" if policy is None else _day(policy.valid_until),
        attention=tuple(_attention(engine, waiting, now_ms)),
        running=_running(engine.run, store, now_ms),
    )


def member_rows(engine: FederationEngine, store: StateStore, now_ms: int) -> list[MemberRow]:
    """Every member of the roster in force, in its order."""
    roster = engine.documents.roster
    if roster is None:
        return []
    certificates: dict[str, int] = {}
    for row in store.find(CertificateRecord, federation=engine.federation):
        certificates[row.member] = max(certificates.get(row.member, 0), row.not_after_ms)
    ready, run = engine.presence.ready(), engine.run
    rows = []
    for entry in roster.members:
        since = engine.presence.absent_since(entry.id, 0)
        until = certificates.get(entry.id, 0)
        if since is None:
            state, absent = ("ready" if entry.id in ready else "connected"), ""
        else:
            state, absent = "absent", ("" if not since else _when(since))
        rows.append(
            MemberRow(
                name=entry.id,
                organisation=entry.organisation,
                state=state,
                since=absent,
                certificate_until="none issued" if not until else _when(until)[:10],
                certificate_soon=bool(until) and until - now_ms < 7 * 86_400_000,
                in_round=_part_in_round(run, entry.id),
            )
        )
    return rows


def round_rows(engine: FederationEngine, store: StateStore) -> list[RoundRow]:
    """The newest rounds that are over, newest first."""
    newest = store.newest(RoundRecord, HISTORY_ROWS + 1, federation=engine.federation)
    return [_round_row(row) for row in newest if row.state in (CONCLUDED, ABORTED)][:HISTORY_ROWS]


def event_rows(store: StateStore, federation: bytes) -> list[EventRow]:
    """The newest lines of the audit about a federation, newest first."""
    rows = store.newest(EventRecord, EVENT_ROWS, federation=federation)
    return [EventRow(row.sequence, _when(row.at_ms), row.kind, _detail(row.detail)) for row in rows]


def refusals_of(seen: Iterable[SeenRefusal], federation: bytes) -> list[tuple[str, SeenRefusal]]:
    """Refusals that concern a federation, or nobody known, with their time as text; newest first."""
    return [(_when(one.at_ms), one) for one in seen if one.federation in (federation, b"")]


def _attention(engine: FederationEngine, waiting: int, now_ms: int) -> Iterable[str]:
    if engine.paused:
        yield f"No round opens: {engine.paused}. The owner's next plan or policy goes on."
    if waiting:
        yield f"{waiting} {'request waits' if waiting == 1 else 'requests wait'} for the owner's admission."
    roster, policy = engine.documents.roster, engine.documents.policy
    for name, until in (
        ("roster", None if roster is None else roster.valid_until),
        ("policy", None if policy is None else policy.valid_until),
    ):
        if until is not None and until * 1000 - now_ms < 14 * 86_400_000:
            verb = "expired" if until * 1000 <= now_ms else "expires"
            yield f"The {name} {verb} on {_day(until)}; the owner has to sign a new one."


def _running(run: RoundRun | None, store: StateStore, now_ms: int) -> RunningRound | None:
    if run is None or run.record.state not in (OPEN, PUBLISHED):
        return None
    names = (*run.scheme.steps, "conclude")
    if not run.settled:
        phase, asked, replied = "", frozenset[str](), frozenset[str]()
    elif run.step is not None:
        phase = run.step
        asked, replied = frozenset(run.machine.participants), frozenset(run.machine.replied)
    else:
        phase = "conclude"
        asked, replied = frozenset(run.survivors), frozenset(run.conclusions)
    at = names.index(phase) if phase in names else -1
    uploads = len(store.find(ContributionRecord, federation=run.federation, round=run.number))
    return RunningRound(
        number=run.number,
        scheme=run.plan.scheme,
        phases=tuple(
            Phase(name, "done" if i < at else "open" if i == at else "next") for i, name in enumerate(names)
        ),
        phase=phase or "between two phases",
        asked=len(asked),
        replied=len(replied),
        missing=tuple(sorted(asked - replied - run.revoked)),
        deadline=_when(run.deadline_ms) if run.deadline_ms else "",
        seconds_left=max(0, (run.deadline_ms - now_ms) // 1000) if run.deadline_ms else 0,
        opened=_when(run.record.opened_ms),
        accepted_bytes=uploads * run.layout.upload_total,
    )


def _part_in_round(run: RoundRun | None, member: str) -> str:
    if run is None or run.record.state not in (OPEN, PUBLISHED) or not run.settled:
        return ""
    if member in run.revoked:
        return "removed"
    if run.step is None:
        return "signed" if member in run.conclusions else "computing" if member in run.survivors else "out"
    if member in run.machine.replied:
        return f"{run.step}: done"
    return f"{run.step}: asked" if member in run.machine.participants else "out"


def _round_row(row: RoundRecord) -> RoundRow:
    return RoundRow(
        number=row.number,
        state=row.state,
        scheme=BoundHeader.parse(row.header).header.scheme,
        opened=_when(row.opened_ms),
        duration=f"{(row.ended_ms - row.opened_ms) / 1000:.1f} s" if row.ended_ms else "",
        survivors=len(row.survivors.split()),
        sum_bytes=row.result_total,
        h1=row.h1.hex()[:16],
        next_state=row.new_state.hex()[:16],
        reason=row.reason,
    )


def _detail(text: str) -> str:
    values = json.loads(text)
    return "; ".join(
        f"{name} {_plain(value)}" for name, value in values.items() if value not in ("", [], {}, None)
    )


def _plain(value: object) -> str:
    """A value of an event as text; long hexadecimal digests and keys are cut."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_plain(one)}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(one) for one in value)
    text = str(value)
    return f"{text[:16]}…" if _LONG_HEX.fullmatch(text) else text


def _when(at_ms: int) -> str:
    return dt.datetime.fromtimestamp(at_ms / 1000, dt.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _day(at: int) -> str:
    return dt.datetime.fromtimestamp(at, dt.UTC).strftime("%Y-%m-%d")
