"""The site's side: what is proposed, what people decide, what leaves.

A raw image leaves the site here, the one place where it does. So forwarding is off until someone switches it
on for one recipient and one purpose; every example waits in this queue for a person; it leaves only with a
consent that names it, checked again at the moment of sending; a quota bounds how many; every step is a line
of the audit; and an example can be taken back.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

import msgspec
from blindsum.client.federation_view import FederationView
from blindsum.client.hard_examples import audit_trail
from blindsum.client.hard_examples.example_line import ExampleLine
from blindsum.client.hard_examples.example_store import open_database, transaction
from blindsum.client.hard_examples.sealed_example import (
    Consent,
    ConsentMissing,
    Example,
    Letter,
    SealedExample,
    new_id,
    seal_example,
)
from blindsum.crypto.canonical import decode_document, decode_message, encode_document, encode_message
from blindsum.crypto.errors import BlindsumError, RefusalReason, Refused

FILE: Final = "examples-out.db"
DAY: Final = 86_400

State = Literal["proposed", "approved", "refused", "forwarded", "withdrawn", "deleted"]

_SCHEMA: Final = """
CREATE TABLE setting (only INTEGER PRIMARY KEY CHECK (only = 1), value BLOB NOT NULL) STRICT;
CREATE TABLE example (
    id BLOB PRIMARY KEY, digest BLOB NOT NULL, state TEXT NOT NULL, content BLOB NOT NULL,
    label INTEGER NOT NULL, doubt REAL NOT NULL, novelty REAL NOT NULL, reason TEXT NOT NULL,
    model TEXT NOT NULL, model_version INTEGER NOT NULL, proposed INTEGER NOT NULL, look INTEGER NOT NULL,
    consent BLOB NOT NULL, recipient TEXT NOT NULL, sealed BLOB NOT NULL) STRICT;
"""


class ForwardingOff(BlindsumError):
    """Forwarding isn't switched on here."""


class QuotaReached(BlindsumError):
    """As many examples have left as were allowed."""


class WrongState(BlindsumError):
    """The example isn't in a state in which this can be done; the text says which one it is in."""


class Forwarding(msgspec.Struct, frozen=True, kw_only=True):
    """What was switched on: to whom, what for, at most how many until when (seconds since 1970).

    `used` counts the examples that have left under it, or may have.
    """

    recipient: str
    purpose: str
    quota: int
    since: int
    until: int
    used: int = 0


@dataclass(frozen=True)
class QueuedExample:
    """An example in the queue. `example` is None once its image has left this file (forwarded or refused).

    `look` says that a program couldn't tell whether text is burned into the pixels.
    """

    id: bytes
    digest: bytes
    state: State
    label: int
    doubt: float
    novelty: float
    reason: str
    proposed: int
    look: bool
    recipient: str
    example: Example | None


class ReviewQueue:
    """An open queue in a member's folder; `close` it, or use `with`. For one thread."""

    def __init__(self, folder: str | os.PathLike[str], *, now: Callable[[], float] = time.time) -> None:
        self._db = open_database(Path(folder) / FILE, _SCHEMA)
        self._now = now

    # Switching on and off

    def enable(self, recipient: str, purpose: str, *, quota: int, days: int = 30) -> Forwarding:
        """Allow proposals and forwarding of at most `quota` examples to one member for one purpose.

        A new switch counts anew. Raises `ValueError` for a quota or days below 1.
        """
        if quota < 1 or days < 1:
            raise ValueError(f"a quota and days are at least 1, not {quota} and {days}")
        now = self._time()
        setting = Forwarding(
            recipient=recipient, purpose=purpose, quota=quota, since=now, until=now + days * DAY
        )
        with transaction(self._db):
            self._keep_setting(setting)
            self._log("enabled", recipient=recipient, purpose=purpose, quota=quota, until=setting.until)
        return setting

    def _keep_setting(self, setting: Forwarding) -> None:
        self._db.execute("INSERT OR REPLACE INTO setting VALUES (1, ?)", (msgspec.json.encode(setting),))

    def disable(self) -> None:
        """Switch it off: nothing is proposed or sent any more. What has left can still be withdrawn."""
        with transaction(self._db):
            self._db.execute("DELETE FROM setting")
            self._log("disabled")

    @property
    def forwarding(self) -> Forwarding | None:
        """What is switched on, or None: that is how it starts."""
        row = self._db.execute("SELECT value FROM setting").fetchone()
        setting = None if row is None else msgspec.json.decode(row[0], type=Forwarding)
        return setting if setting is not None and self._now() < setting.until else None

    def _require_on(self) -> Forwarding:
        setting = self.forwarding
        if setting is None:
            raise ForwardingOff(
                "forwarding is off, as it is until someone switches it on: `blindsum examples enable`"
            )
        return setting

    # The queue

    def propose(
        self,
        example: Example,
        *,
        doubt: float,
        novelty: float,
        reason: str,
        model: str,
        model_version: int,
        look: bool = False,
    ) -> bytes:
        """Put an example into the queue for a person to decide on; its id. The same image is taken once.

        Raises `ForwardingOff`, `WrongState` for an image that was proposed before.
        """
        setting = self._require_on()
        digest = example.digest()
        known = self._db.execute("SELECT state FROM example WHERE digest = ?", (digest,)).fetchone()
        if known is not None:
            raise WrongState(f"this image was proposed before and is {known[0]}")
        identifier = new_id()
        with transaction(self._db):
            self._db.execute(
                "INSERT INTO example VALUES (?, ?, 'proposed', ?, ?, ?, ?, ?, ?, ?, ?, ?, x'', ?, x'')",
                (
                    identifier, digest, encode_message(example), example.label, doubt, novelty, reason, model,
                    model_version, self._time(), int(look), setting.recipient,
                ),
            )  # fmt: skip
            self._log("proposed", id=identifier.hex(), digest=digest.hex(), reason=reason)
        return identifier

    def examples(self, state: State | None = None) -> list[QueuedExample]:
        """The queue in the order of proposal; those in one state, or all."""
        return self._queued(state=state)

    def one(self, identifier: bytes) -> QueuedExample:
        """The example of this id. Raises `WrongState` if there is none."""
        for example in self._queued(identifier=identifier):
            return example
        raise WrongState(f"the queue has no example {identifier.hex()[:16]}")

    def _queued(self, state: State | None = None, identifier: bytes | None = None) -> list[QueuedExample]:
        query = (
            "SELECT id, digest, state, label, doubt, novelty, reason, proposed, look, recipient, content"
            " FROM example WHERE coalesce(?, state) = state AND coalesce(?, id) = id ORDER BY proposed, rowid"
        )
        return [_queued(row) for row in self._db.execute(query, (state, identifier))]

    def approve(self, identifier: bytes, consent: Consent, *, reviewer: str) -> None:
        """A person has looked at it and has the consent for it to leave.

        Raises `ForwardingOff`, `ConsentMissing` for a consent that doesn't cover it, `WrongState`.
        """
        setting = self._require_on()
        example = self._in_state(identifier, "proposed")
        consent.require(example.digest, example.recipient, setting.purpose, self._now())
        with transaction(self._db):
            self._db.execute(
                "UPDATE example SET state = 'approved', consent = ? WHERE id = ?",
                (encode_document(consent), identifier),
            )
            self._log("approved", id=identifier.hex(), reviewer=reviewer, consent=consent.reference)

    def refuse(self, identifier: bytes, *, reviewer: str) -> None:
        """It stays here; the queue forgets the image. Raises `WrongState` once it has left, or may have."""
        self._in_state(identifier, "proposed", "approved")
        if self._may_have_left(identifier):
            raise WrongState(
                f"example {identifier.hex()[:16]} was sent, and the answer was lost: withdraw it instead"
            )
        with transaction(self._db):
            self._db.execute(
                "UPDATE example SET state = 'refused', content = x'', consent = x'', sealed = x''"
                " WHERE id = ?",
                (identifier,),
            )
            self._log("refused", id=identifier.hex(), reviewer=reviewer)

    # What leaves

    @property
    def used(self) -> int:
        """Examples that have left under what is switched on, or may have."""
        setting = self.forwarding
        return 0 if setting is None else setting.used

    def forward(self, view: FederationView) -> list[bytes]:
        """Send every approved example; the ids that were sent. What was sent, this file no longer holds.

        Each one's consent is checked again now; one that isn't in force any more goes back to the proposed,
        or is withdrawn if it may have left before. After a broken connection call it again: the same bytes
        are sent. Raises `ForwardingOff`, `ConsentMissing` after the others were sent, `QuotaReached` before
        any more is sent, and what the line raises.
        """
        self._require_on()
        line = ExampleLine(view)
        sent, missing = [], ""
        query = "SELECT id FROM example WHERE state = 'approved' ORDER BY proposed, rowid"
        for (identifier,) in self._db.execute(query).fetchall():
            try:
                with transaction(self._db):
                    sealed = self._sealed(identifier, view)
            except ConsentMissing as error:
                missing = str(error)
                self._without_consent(identifier, line)
                continue
            line.put(sealed)
            with transaction(self._db):
                self._db.execute(
                    "UPDATE example SET state = 'forwarded', content = x'', sealed = x'' WHERE id = ?",
                    (identifier,),
                )
                self._log(
                    "forwarded",
                    id=identifier.hex(),
                    recipient=sealed.recipient,
                    ciphertext=sealed.digest.hex(),
                )
            sent.append(identifier)
        if missing:
            raise ConsentMissing(missing)
        return sent

    def _without_consent(self, identifier: bytes, line: ExampleLine) -> None:
        if self._may_have_left(identifier) and self._recalled(identifier, line) is not None:
            return
        with transaction(self._db):
            self._db.execute(
                "UPDATE example SET state = 'proposed', consent = x'', sealed = x'' WHERE id = ?",
                (identifier,),
            )
            self._log("consent missing", id=identifier.hex())

    def _may_have_left(self, identifier: bytes) -> bool:
        """Whether it was sealed and its acknowledgement didn't come."""
        row = self._db.execute("SELECT length(sealed) FROM example WHERE id = ?", (identifier,)).fetchone()
        return row is not None and row[0] > 0

    def _sealed(self, identifier: bytes, view: FederationView) -> SealedExample:
        """The example's ciphertext, made once, counted, and kept until it is acknowledged."""
        setting = self._require_on()
        row = self._db.execute(
            "SELECT content, doubt, novelty, reason, model, model_version, consent, recipient, sealed"
            " FROM example WHERE id = ?",
            (identifier,),
        ).fetchone()
        content, doubt, novelty, reason, model, version, consent_bytes, recipient, sealed = row
        example = decode_message(content, Example, "a queued example")
        consent = decode_document(consent_bytes, Consent, "a consent")
        consent.require(example.digest(), recipient, setting.purpose, self._now())
        if recipient != setting.recipient:
            raise ConsentMissing(
                f"forwarding is on for {setting.recipient}, and this was approved for {recipient}"
            )
        if sealed:
            return SealedExample(identifier, recipient, bytes(sealed))
        if setting.used >= setting.quota:
            raise QuotaReached(
                f"{setting.quota} examples have left, as many as were allowed; switch it on anew for more"
            )
        letter = Letter(
            federation=view.roster.federation,
            id=identifier,
            sender=view.name,
            recipient=recipient,
            model=model,
            model_version=version,
            example=example,
            doubt=doubt,
            novelty=novelty,
            reason=reason,
            consent=bytes(consent_bytes),
            sent=self._time(),
        )
        made = seal_example(letter, view.identity, view.roster)
        self._db.execute("UPDATE example SET sealed = ? WHERE id = ?", (made.sealed, identifier))
        self._keep_setting(msgspec.structs.replace(setting, used=setting.used + 1))
        return made

    def withdraw(self, identifier: bytes, view: FederationView) -> State:
        """Take an example back: the aggregator deletes it now, the receiver when it next looks.

        What was trained on it isn't unlearnt. Raises `WrongState` unless it has left, or may have, and what
        the line raises.
        """
        if not self._may_have_left(identifier):
            self._in_state(identifier, "forwarded", "withdrawn", "deleted")
        if self._recalled(identifier, ExampleLine(view)) is None:
            self._keep_state(identifier, "deleted")  # it never arrived: nobody has it
        return self.one(identifier).state

    def _recalled(self, identifier: bytes, line: ExampleLine) -> State | None:
        """Its state once the aggregator took it back; None if the aggregator never got it."""
        with transaction(self._db):
            self._log("withdrawal asked", id=identifier.hex())
        try:
            answer = line.withdraw(identifier)
        except Refused as refusal:
            if refusal.reason is RefusalReason.OUT_OF_RANGE and self._may_have_left(identifier):
                return None
            raise
        state: State = "deleted" if answer == "deleted" else "withdrawn"
        self._keep_state(identifier, state)
        return state

    def refresh(self, view: FederationView) -> None:
        """Ask the aggregator which withdrawn examples the receiver has deleted by now."""
        for identifier, state in ExampleLine(view).forwarded().items():
            row = self._db.execute("SELECT state FROM example WHERE id = ?", (identifier,)).fetchone()
            if row is not None and row[0] == "withdrawn" and state == "deleted":
                self._keep_state(identifier, "deleted")

    def _keep_state(self, identifier: bytes, state: State) -> None:
        if self.one(identifier).state == state:
            return
        with transaction(self._db):
            self._db.execute(
                "UPDATE example SET state = ?, content = x'', sealed = x'' WHERE id = ?", (state, identifier)
            )
            self._log(state, id=identifier.hex())

    # Record

    def audit(self) -> list[audit_trail.AuditLine]:
        """What happened here, in order. Raises `AuditBroken`."""
        return audit_trail.lines(self._db)

    def _log(self, kind: str, **detail: object) -> None:
        audit_trail.append(self._db, self._time(), kind, **detail)

    def _in_state(self, identifier: bytes, *states: State) -> QueuedExample:
        example = self.one(identifier)
        if example.state not in states:
            raise WrongState(
                f"example {identifier.hex()[:16]} is {example.state}; this needs one that is {states[0]}"
            )
        return example

    def _time(self) -> int:
        return int(self._now())

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _queued(row: tuple[Any, ...]) -> QueuedExample:
    identifier, digest, state, label, doubt, novelty, reason, proposed, look, recipient, content = row
    example = decode_message(content, Example, "a queued example") if content else None
    return QueuedExample(
        identifier, digest, state, label, doubt, novelty, reason, proposed, bool(look), recipient, example
    )
