"""What is wrong with a server, or soon will be, and what to do about it.

Looks at the settings, the data directory, the disk, the clock, certificates, ports, versions, the state and
the owners' documents in it. Changes nothing but a probe file that it removes; the server may run or not.
"""

import contextlib
import ctypes
import os
import resource
import shutil
import socket
import sqlite3
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, TypeVar

from blindsum.aggregator.audit import verify
from blindsum.aggregator.backup import STATE, is_running, named_blobs
from blindsum.aggregator.engine import checkpoint_limit
from blindsum.aggregator.settings import AggregatorSettings
from blindsum.aggregator.store.records import (
    CertificateRecord,
    DocumentRecord,
    EventRecord,
    FederationRecord,
    RoundRecord,
)
from blindsum.aggregator.store.sqlite_reader import SqliteReader
from blindsum.crypto.canonical import decode_document
from blindsum.crypto.errors import BlindsumError
from blindsum.crypto.trust.documents import parse_signed
from blindsum.crypto.trust.plan import Plan
from blindsum.crypto.trust.policy import Policy
from blindsum.crypto.trust.roster import Roster
from cryptography import x509
from cryptography.hazmat.primitives import serialization

D = TypeVar("D", Plan, Policy, Roster)
Verdict = Literal["ok", "warning", "failure"]
_DAY = 86_400
_SLOW_FSYNC = 0.1
_RELEASED = 1_767_225_600
"""This release is younger than 2026-01-01: a clock before that is wrong."""
_AHEAD = 60
"""Seconds by which the audit may be ahead of the clock."""
_NETWORK_DISKS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "ceph", "glusterfs", "afs"}
_CLOCK_UNSYNCHRONISED = 5
_OLDEST_SQLITE = (3, 37, 0)


@dataclass(frozen=True)
class Finding:
    """One check: what was found, and what to do if it isn't ok."""

    check: str
    verdict: Verdict
    text: str
    advice: str = ""


@dataclass
class Findings:
    """Every check, in the order in which they were made."""

    found: list[Finding] = field(default_factory=list)

    def ok(self, check: str, text: str) -> None:
        """All is well."""
        self.found.append(Finding(check, "ok", text))

    def warn(self, check: str, text: str, advice: str) -> None:
        """It works, for now."""
        self.found.append(Finding(check, "warning", text, advice))

    def fail(self, check: str, text: str, advice: str) -> None:
        """It doesn't work, or isn't safe."""
        self.found.append(Finding(check, "failure", text, advice))

    @property
    def exit_code(self) -> int:
        """0: nothing to do; 3: warnings; 1: failures."""
        verdicts = {one.verdict for one in self.found}
        return 1 if "failure" in verdicts else 3 if "warning" in verdicts else 0


def examine(settings: AggregatorSettings, now: Callable[[], float] = time.time) -> Findings:
    """Every check on a server with these settings."""
    findings = Findings()
    findings.ok("settings", "no unknown names, no unsafe values")
    _versions(findings)
    _clock(findings, now())
    _limits(findings, settings)
    running = _directory(findings, settings)
    _ports(findings, settings, running)
    _certificates(findings, settings, now(), running)
    with _state(findings, settings) as state:
        if state is not None:
            _stored(findings, settings, state, now())
            _disk(findings, settings, _needed_bytes(state))
            for record in state.find(FederationRecord):
                _documents(findings, state, record, now())
        else:
            _disk(findings, settings, 0)
    return findings


def _versions(findings: Findings) -> None:
    names = ("blindsum", "grpcio", "protobuf", "cryptography")
    found = []
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    text = f"Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}, {', '.join(found)}"
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        findings.warn("versions", text, "this release is tested with Python 3.11 to 3.13: use one of them")
    elif sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        findings.warn("versions", text, "use a Python that comes with SQLite 3.37 or newer")
    else:
        findings.ok("versions", text)


def _clock(findings: Findings, now: float) -> None:
    if now < _RELEASED:
        findings.fail(
            "clock",
            f"the clock says {_day(now)}, before this release was made",
            "set the clock and keep it by NTP: deadlines and certificates depend on it",
        )
        return
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        # struct timex is about 200 bytes; modes = 0 only reads.
        unsynchronised = libc.adjtimex(ctypes.create_string_buffer(1024)) == _CLOCK_UNSYNCHRONISED
    except (OSError, AttributeError):
        unsynchronised = False
    if unsynchronised:
        findings.warn(
            "clock",
            "the system says that nothing keeps the clock in step",
            "run an NTP service (chrony, systemd-timesyncd); in a container or virtual machine, on its host",
        )
    else:
        findings.ok("clock", f"{datetime.fromtimestamp(now, UTC):%Y-%m-%d %H:%M} UTC")


def _limits(findings: Findings, settings: AggregatorSettings) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # A connection a call at worst, an upload's spool, and what the process has open anyway.
    wanted = settings.max_calls + settings.max_enrolment_calls + settings.upload_slots + 128
    if soft != resource.RLIM_INFINITY and soft < wanted:
        findings.warn(
            "limits",
            f"this shell may open {soft} files; max_calls = {settings.max_calls} may need {wanted}",
            f"start the server with ulimit -n {wanted} (systemd: LimitNOFILE={wanted}), or lower max_calls",
        )
    else:
        findings.ok("limits", f"{'any number of' if soft == resource.RLIM_INFINITY else soft} open files")


def _directory(findings: Findings, settings: AggregatorSettings) -> bool:
    """Whether a server runs on the data directory."""
    data = settings.data_dir
    if not data.exists():
        findings.warn(
            "directory", f"{data} isn't there yet", "it is made when the server starts for the first time"
        )
        return False
    mode, owner = data.stat().st_mode, data.stat().st_uid
    if mode & 0o077:
        findings.fail("directory", f"others may read {data}, with the authority's key", f"chmod 700 {data}")
    elif owner != os.geteuid():
        findings.warn(
            "directory",
            f"{data} belongs to user {owner}, doctor runs as {os.geteuid()}",
            "run doctor as the service's user, to see what the service sees",
        )
    else:
        findings.ok("directory", f"{data} is private")
    for name in ("authority/transport_ca.key", "admin.token", STATE):
        path = data / name
        if path.exists() and path.stat().st_mode & 0o077 and name != STATE:
            findings.fail("directory", f"others may read {path}", f"chmod 600 {path}")
    kind = _disk_kind(data)
    if kind in _NETWORK_DISKS:
        findings.fail(
            "directory",
            f"{data} is on a network disk ({kind}); the state's log needs a local one",
            "move the directory to a local disk, and back up to the network",
        )
    elif kind in ("tmpfs", "ramfs"):
        findings.warn(
            "directory", f"{data} is in memory ({kind}): gone after a restart", "use a disk that stays"
        )
    return is_running(data)


def _disk_kind(path: Path) -> str:
    """The type of the file system that holds a path."""
    with contextlib.suppress(OSError, ValueError):
        best, kind = "", ""
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, place, found, *_ = line.split(" ")
            place = place.replace("\\040", " ")
            if path.resolve().is_relative_to(place) and len(place) >= len(best):
                best, kind = place, found
        return kind
    return ""


def _ports(findings: Findings, settings: AggregatorSettings, running: bool) -> None:
    listeners = [
        ("enrolment_port", settings.host, settings.enrolment_port),
        ("member_port", settings.host, settings.member_port),
    ]
    if settings.admin_port is not None:
        listeners.append(("admin_port", settings.admin_host, settings.admin_port))
    else:
        findings.warn(
            "ports",
            "there is no admin port: no metrics, no health over HTTP, no operators' page",
            "set admin_port = 8472",
        )
    for name, host, port in listeners:
        if port == 0:
            findings.warn(
                "ports", f"{name} = 0 takes another port at each start", "give members an address that stays"
            )
            continue
        taken = _answers(host, port)
        if running and taken:
            findings.ok("ports", f"{name} {port} answers")
        elif running:
            findings.fail(
                "ports",
                f"a server runs, but nothing answers on {name} {port}",
                "was it started with other settings? give doctor the same file and environment",
            )
        elif taken or not _bindable(host, port):
            findings.fail(
                "ports", f"{name} {port} is taken by another program", f"stop that, or choose another {name}"
            )
        else:
            findings.ok("ports", f"{name} {port} is free")


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((_reachable(host), port), timeout=2):
            return True
    except OSError:
        return False


def _bindable(host: str, port: int) -> bool:
    with socket.socket(_family(host)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError:
            return False
    return True


def _certificates(findings: Findings, settings: AggregatorSettings, now: float, running: bool) -> None:
    folder = settings.data_dir / "authority"
    if not (folder / "transport_ca.pem").exists():
        if (settings.data_dir / STATE).exists():
            findings.fail(
                "certificates",
                "the transport authority is gone: members' certificates are worth nothing",
                "restore the folder authority from a backup",
            )
        return
    try:
        authority = x509.load_pem_x509_certificate((folder / "transport_ca.pem").read_bytes())
        key = serialization.load_pem_private_key((folder / "transport_ca.key").read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        findings.fail(
            "certificates", f"the transport authority can't be read: {error}", "restore it from a backup"
        )
        return
    if key.public_key() != authority.public_key():
        findings.fail(
            "certificates",
            "the transport authority's key and certificate don't belong together",
            "restore the folder authority from a backup",
        )
        return
    _until(
        findings,
        "transport authority",
        authority.not_valid_after_utc.timestamp(),
        now,
        180,
        "plan new invitations: members have its certificate from theirs",
    )
    if running and settings.enrolment_port and _answers(settings.host, settings.enrolment_port):
        _served_certificate(findings, settings, folder / "transport_ca.pem", now)


def _served_certificate(findings: Findings, settings: AggregatorSettings, ca: Path, now: float) -> None:
    context = ssl.create_default_context(cafile=str(ca))
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    address = (_reachable(settings.host), settings.enrolment_port)
    try:
        with (
            socket.create_connection(address, timeout=2) as plain,
            context.wrap_socket(plain) as secure,
        ):
            der = secure.getpeercert(binary_form=True)
    except (OSError, ValueError) as error:
        findings.fail(
            "certificates",
            f"the enrolment port's certificate doesn't verify under this authority: {error}",
            "is that another server's port, or a proxy that ends TLS? Both ports need TLS passed through",
        )
        return
    assert der is not None
    served = x509.load_der_x509_certificate(der)
    _until(
        findings,
        "server certificate",
        served.not_valid_after_utc.timestamp(),
        now,
        settings.server_certificate_days / 9,
        "restart the server: it makes a new one",
    )
    names = served.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    have = {str(name.value) for name in names}
    if have != set(settings.server_names):
        findings.warn(
            "certificates",
            f"the running server's certificate is for {', '.join(sorted(have))}",
            "restart the server, so that it has the names that the settings say now",
        )


def _until(findings: Findings, what: str, until: float, now: float, days: float, advice: str) -> None:
    left = (until - now) / _DAY
    if left <= 0:
        findings.fail("certificates", f"the {what} has expired on {_day(until)}", advice)
    elif left < days:
        findings.warn("certificates", f"the {what} expires on {_day(until)}", advice)
    else:
        findings.ok("certificates", f"the {what} is good until {_day(until)}")


def _day(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d}"


@contextlib.contextmanager
def _state(findings: Findings, settings: AggregatorSettings) -> Iterator[SqliteReader | None]:
    path = settings.data_dir / STATE
    if not path.exists():
        yield None
        return
    try:
        reader = SqliteReader(path)
    except BlindsumError as error:
        findings.fail("state", str(error), "restore a backup with `blindsum restore`")
        yield None
        return
    with reader:
        yield reader


def _stored(findings: Findings, settings: AggregatorSettings, state: SqliteReader, now: float) -> None:
    damage = state.damage()
    if damage:
        findings.fail("state", f"SQLite finds damage: {damage}", "restore a backup; have the disk checked")
        return
    missing = [
        name
        for name, needed in named_blobs(state).items()
        if needed and not (settings.data_dir / "blobs" / name).exists()
    ]
    if missing and not is_running(settings.data_dir):
        findings.fail("state", f"{len(missing)} blobs are gone, {missing[0]} first", "restore a backup")
    else:
        rounds = sum(1 for _ in state.each(RoundRecord))
        findings.ok("state", f"schema {state.schema}, {rounds} rounds, no damage")
    report = verify(state)
    if report.holds:
        findings.ok("audit", f"{report.head.sequence} events, unbroken")
    else:
        findings.fail(
            "audit",
            f"the audit was tampered with: {report.reason}",
            "find out who could write the data directory; compare with a backup and with noted heads",
        )
    newest = max((one.at_ms / 1000 for one in state.each(EventRecord)), default=0.0)
    if newest > now + _AHEAD:
        findings.fail(
            "clock",
            f"the clock is behind the audit's newest event by {newest - now:.0f} s: it went back",
            "set the clock; until it has caught up, deadlines and certificates are wrong",
        )


def _needed_bytes(state: SqliteReader) -> int:
    """Roughly what a round of the largest plan writes: an upload a member, two sums, two training states."""
    most = 0
    for record in state.find(FederationRecord):
        plan = _document(state, record, record.plan, Plan)
        if plan is not None:
            # Never more than 8 bytes a value in masking; homomorphic ciphertexts are up to 8 times that.
            value = 8 if plan.scheme == "masking" else 64
            most = max(most, value * plan.dimension * (plan.cohort_max + 2) + 2 * checkpoint_limit(plan) // 8)
    return most


def _disk(findings: Findings, settings: AggregatorSettings, needed: int) -> None:
    data = settings.data_dir
    place = data if data.exists() else next(p for p in data.resolve().parents if p.exists())
    free = shutil.disk_usage(place).free
    text = f"{free / 1e9:.1f} GB free"
    if free < settings.disk_reserve:
        findings.fail("disk", f"{text}, below disk_reserve: uploads wait", "free some, or move the data")
    elif free < settings.disk_reserve + needed:
        findings.warn(
            "disk",
            f"{text}; a round of the plan in force may need {needed / 1e9:.1f} GB",
            "free some, lower keep_rounds or keep_days, or move the data",
        )
    else:
        findings.ok("disk", text)
    if not data.exists():
        return
    probe = data / f"doctor.{os.getpid()}"
    began = time.monotonic()
    try:
        handle = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(handle, bytes(4096))
            os.fsync(handle)
        finally:
            os.close(handle)
            probe.unlink()
    except OSError as error:
        findings.fail("disk", f"{data} can't be written: {error.strerror}", "check the disk and its mount")
        return
    took = time.monotonic() - began
    if took > _SLOW_FSYNC:
        findings.warn(
            "disk",
            f"a write took {1000 * took:.0f} ms to reach the disk",
            "every acknowledgement waits for that: use a faster disk, or one with less to do",
        )


def _document(state: SqliteReader, record: FederationRecord, digest: bytes, kind: type[D]) -> D | None:
    if not digest:
        return None
    found = state.get(DocumentRecord, record.federation, digest)
    return None if found is None else decode_document(parse_signed(found.body).body, kind, "the document")


def _documents(findings: Findings, state: SqliteReader, record: FederationRecord, now: float) -> None:
    check = f"federation {record.federation.hex()[:16]}"
    roster = _document(state, record, record.roster, Roster)
    policy = _document(state, record, record.policy, Policy)
    plan = _document(state, record, record.plan, Plan)
    if roster is None or policy is None:
        findings.warn(check, "it has no roster or no policy yet", "the owner publishes them")
        return
    for what, until in (("roster", roster.valid_until), ("policy", policy.valid_until)):
        left = (until - now) / _DAY
        advice = f"ask the owner to sign the {what} anew: no round opens after that"
        if left <= 0:
            findings.fail(check, f"the {what} has expired on {_day(until)}", advice)
        elif left < 14:
            findings.warn(check, f"the {what} expires on {_day(until)}", advice)
    members = len(roster.members)
    if members < policy.n_min:
        findings.warn(
            check,
            f"{members} members, but the policy asks for {policy.n_min} in a sum",
            "no round can open until the owner admits more",
        )
    elif plan is not None and plan.cohort_min > members:
        findings.warn(
            check,
            f"{members} members, but the plan asks for {plan.cohort_min} in a round",
            "no round can open until the owner admits more or signs another plan",
        )
    elif plan is not None and plan.policy != record.policy:
        findings.fail(check, "the plan was signed under another policy", "the owner signs the plan anew")
    else:
        findings.ok(check, f"{members} members, roster and policy in force")
    _member_certificates(findings, check, state, roster, now)


def _member_certificates(
    findings: Findings, check: str, state: SqliteReader, roster: Roster, now: float
) -> None:
    newest: dict[str, int] = {}
    for issued in state.each(CertificateRecord, federation=roster.federation):
        newest[issued.member] = max(newest.get(issued.member, 0), issued.not_after_ms)
    expired = [e.id for e in roster.members if e.id in newest and newest[e.id] / 1000 < now]
    if expired:
        findings.warn(
            check,
            f"certificates of {', '.join(expired[:5])}{' and others' if len(expired) > 5 else ''} expired",
            "they renew them when they are next online; the owner can remove who never comes back",
        )
