"""What is stored, one frozen dataclass a table; apart from what travels and what the engine holds.

`KEY` names the fields that identify a record. Times are Unix milliseconds. Ids and digests are bytes.
"""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Record:
    """Base of everything stored: the class is the table, its fields are the columns."""

    KEY: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True)
class FederationRecord(Record):
    """A federation: its founding document, and the digests of the documents in force."""

    KEY = ("federation",)
    federation: bytes
    document: bytes
    owner: bytes
    roster: bytes = b""
    policy: bytes = b""
    plan: bytes = b""
    roster_version: int = 0
    policy_version: int = 0
    plan_version: int = 0
    created_ms: int = 0


@dataclass(frozen=True)
class DocumentRecord(Record):
    """Something addressed by digest: a signed document, or an HE public key."""

    KEY = ("federation", "digest")
    federation: bytes
    digest: bytes
    kind: str
    body: bytes


@dataclass(frozen=True)
class JoinRecord(Record):
    """A request to be admitted, as it came, and the owner's refusal if there is one."""

    KEY = ("federation", "request")
    federation: bytes
    request: bytes
    member: str
    token: bytes
    body: bytes
    signature: bytes
    token_mac: bytes
    csr: bytes
    created_ms: int
    refusal: str | None = None
    certificate: bytes = b""


@dataclass(frozen=True)
class CertificateRecord(Record):
    """A transport certificate that was issued; it stands for one identity key of one member."""

    KEY = ("serial",)
    serial: bytes
    federation: bytes
    member: str
    identity: bytes
    not_after_ms: int


@dataclass(frozen=True)
class EnvelopeRecord(Record):
    """A key envelope for one member under one roster."""

    KEY = ("federation", "roster", "member", "position")
    federation: bytes
    roster: bytes
    member: str
    position: int
    body: bytes


@dataclass(frozen=True)
class RoundRecord(Record):
    """A round: what it is bound to, how far it is, how it ended."""

    KEY = ("federation", "number")
    federation: bytes
    number: int
    version: int
    chain: bytes
    header: bytes
    state: str
    excluded: str
    opened_ms: int
    h1: bytes = b""
    survivors: str = ""
    result: bytes = b""
    result_total: int = 0
    published_ms: int = 0
    ended_ms: int = 0
    reason: str = ""
    exclude_next: str = ""
    new_state: bytes = b""


@dataclass(frozen=True)
class ReplyRecord(Record):
    """An accepted reply of one member to one step. With closes and revocations, in order of `sequence`,
    these *are* the round's state."""

    KEY = ("federation", "round", "step", "member")
    federation: bytes
    round: int
    step: str
    member: str
    sequence: int
    body: bytes


@dataclass(frozen=True)
class CloseRecord(Record):
    """A step was closed; the next step's deadline counts from `at_ms`."""

    KEY = ("federation", "round", "step")
    federation: bytes
    round: int
    step: str
    sequence: int
    at_ms: int


@dataclass(frozen=True)
class RevocationRecord(Record):
    """A member left the federation while the round ran; its reply to `step` no longer counts."""

    KEY = ("federation", "round", "member")
    federation: bytes
    round: int
    member: str
    step: str
    sequence: int


@dataclass(frozen=True)
class ContributionRecord(Record):
    """An accepted upload: its digest, its frames' digests, and the sum it is part of, if any yet."""

    KEY = ("federation", "round", "member")
    federation: bytes
    round: int
    member: str
    digest: bytes
    frames: bytes
    folded: int | None = None


@dataclass(frozen=True)
class SeedRecord(Record):
    """The digest of an encryption seed that came under an HE key: a second time would show a difference."""

    KEY = ("federation", "he_key", "seed")
    federation: bytes
    he_key: bytes
    seed: bytes


@dataclass(frozen=True)
class SumRecord(Record):
    """A folded checkpoint of the sum: the digests of its frames, and who is part of it."""

    KEY = ("federation", "round", "generation")
    federation: bytes
    round: int
    generation: int
    frames: bytes
    members: str


@dataclass(frozen=True)
class ConclusionRecord(Record):
    """A survivor's signature over the state it computed, or over its refusal of the sum."""

    KEY = ("federation", "round", "member")
    federation: bytes
    round: int
    member: str
    sequence: int
    state: bytes
    signature: bytes
    refusal: str


@dataclass(frozen=True)
class CheckpointRecord(Record):
    """A sealed training state. `agreed` is 1 once its round has concluded (S_0: once a plan names it)."""

    KEY = ("federation", "chain", "state_round", "round")
    federation: bytes
    chain: bytes
    state_round: int
    round: int
    state: bytes
    sealing_context: bytes
    total: int
    sealed_digest: bytes
    agreed: int
    header: bytes = b""
    h1: bytes = b""
    roster: bytes = b""
    survivors: int = 0


@dataclass(frozen=True)
class InitialStateRecord(Record):
    """A sealed S_0 that waits for the plan that names it."""

    KEY = ("federation", "state")
    federation: bytes
    state: bytes
    total: int
    sealed_digest: bytes
    created_ms: int


@dataclass(frozen=True)
class ExampleRecord(Record):
    """A sealed example from one member to another; its bytes are a blob as long as it is waiting."""

    KEY = ("federation", "example")
    federation: bytes
    example: bytes
    sender: str
    recipient: str
    digest: bytes
    size: int
    state: str
    created_ms: int
    changed_ms: int


@dataclass(frozen=True)
class ModelRecord(Record):
    """A published version of a model; its bytes are a blob."""

    KEY = ("federation", "publisher", "name", "number")
    federation: bytes
    publisher: str
    name: str
    number: int
    total: int
    digest: bytes
    created_ms: int


@dataclass(frozen=True)
class EventRecord(Record):
    """One line of the append-only audit, chained by hash to the line before.

    The store fills in `sequence`, `previous` and `digest`.
    """

    KEY = ("sequence",)
    at_ms: int
    federation: bytes
    kind: str
    detail: str
    sequence: int = 0
    previous: bytes = b""
    digest: bytes = b""


@dataclass(frozen=True)
class AuditHeadRecord(Record):
    """Where the audit ends, moved with every event: without it, nobody would miss its last lines."""

    KEY = ("name",)
    name: str
    sequence: int
    digest: bytes


@dataclass(frozen=True)
class RoundFloorRecord(Record):
    """Rounds of a restored federation start above this number: lower ones may have run after the backup."""

    KEY = ("federation",)
    federation: bytes
    number: int


@dataclass(frozen=True)
class ProbeRecord(Record):
    """Written again and again to find out whether the state can be written."""

    KEY = ("name",)
    name: str
    at_ms: int


TABLES: tuple[type[Record], ...] = (
    FederationRecord,
    DocumentRecord,
    JoinRecord,
    CertificateRecord,
    EnvelopeRecord,
    RoundRecord,
    ReplyRecord,
    CloseRecord,
    RevocationRecord,
    ContributionRecord,
    SeedRecord,
    SumRecord,
    ConclusionRecord,
    CheckpointRecord,
    InitialStateRecord,
    ExampleRecord,
    ModelRecord,
    EventRecord,
    AuditHeadRecord,
    RoundFloorRecord,
    ProbeRecord,
)
