"""The training party's side: fetches, checks, keeps and, when asked, deletes forwarded examples.

An example is trained on only if it is accepted: signed by a member of the roster, with a consent for this
party, not seen before, and not contradicting what is known. What is odd is held for a person, what is broken
is refused.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np
from blindsum.client.federation_view import FederationView
from blindsum.client.hard_examples import audit_trail
from blindsum.client.hard_examples.example_line import ExampleLine, Waiting
from blindsum.client.hard_examples.example_store import open_database, transaction
from blindsum.client.hard_examples.sealed_example import Letter, Pixels, open_example
from blindsum.crypto.canonical import decode_message, encode_message
from blindsum.crypto.errors import BlindsumError, DocumentError, OpeningFailed, RefusalReason, Refused
from numpy.typing import NDArray

FILE: Final = "examples-in.db"
SURE: Final = 0.95
"""A model that gives another class so much disagrees with the label."""
NEARLY_THE_SAME: Final = 0.995
"""Correlation of two images from which on they are taken for copies of each other."""

State = Literal["accepted", "held", "refused", "deleted"]
Predict = Callable[[Pixels], NDArray[Any]]
"""One image (rows, columns) to the probabilities of the classes."""

_SCHEMA: Final = """
CREATE TABLE example (
    id BLOB PRIMARY KEY, sender TEXT NOT NULL, digest BLOB NOT NULL, state TEXT NOT NULL,
    reason TEXT NOT NULL, letter BLOB NOT NULL, received INTEGER NOT NULL) STRICT;
"""


class NotHeld(BlindsumError):
    """Only a held example waits for a decision."""


@dataclass(frozen=True)
class ReceivedExample:
    """An example at the training party. `letter` is None once it was refused or deleted."""

    id: bytes
    sender: str
    state: State
    reason: str
    received: int
    letter: Letter | None


class Intake:
    """An open intake in a member's folder; `close` it, or use `with`. For one thread.

    `purpose` is what this party takes examples for: a consent for another purpose is refused. `shape` is the
    images' size, if only one is usable. `own` are the party's own images, so that copies are found.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        purpose: str,
        shape: tuple[int, int] | None = None,
        own: Sequence[Pixels] | Pixels = (),
        predict: Predict | None = None,
        novelty_threshold: float = float("inf"),
        now: Callable[[], float] = time.time,
    ) -> None:
        self._db = open_database(Path(folder) / FILE, _SCHEMA)
        self._purpose = purpose
        self._shape = shape
        self._own = _rows(own)
        self._predict = predict
        self._novelty_threshold = novelty_threshold
        self._now = now

    def collect(self, view: FederationView) -> list[ReceivedExample]:
        """Fetch what waits, obey withdrawals; what changed. After a broken connection call it again.

        Raises what the line raises; a broken example is refused and doesn't stop the others.
        """
        line = ExampleLine(view)
        changed = []
        for waiting in line.waiting():
            if waiting.state == "withdrawn":
                self._delete(waiting)
                line.confirm_deleted(waiting.id)
            elif self._state(waiting.id) is None:
                self._receive(waiting, line.get(waiting.id), view)
                self._confirm_taken(line, waiting)
            else:
                self._confirm_taken(line, waiting)
            changed.append(self.one(waiting.id))
        return changed

    def _confirm_taken(self, line: ExampleLine, waiting: Waiting) -> None:
        try:
            line.confirm_taken(waiting.id)
        except Refused as refusal:
            if refusal.reason is not RefusalReason.WRONG_STEP:
                raise
            # Taken back between the list and now.
            self._delete(waiting)
            line.confirm_deleted(waiting.id)

    def _receive(self, waiting: Waiting, sealed: bytes, view: FederationView) -> None:
        try:
            letter = open_example(
                sealed,
                identifier=waiting.id,
                sender=waiting.sender,
                recipient=view.name,
                hpke=view.hpke,
                roster=view.roster,
            )
            digest = letter.example.digest()
            consent = letter.parsed_consent()
            consent.require(digest, view.name, self._purpose, self._now())
            if self._shape is not None and letter.example.shape != self._shape:
                raise Refused(
                    RefusalReason.WRONG_SIZE, f"images here are {self._shape}, this is {letter.example.shape}"
                )
        except (BlindsumError, OpeningFailed, DocumentError) as error:
            self._keep(waiting, bytes(32), "refused", str(error), b"")
            return
        state, reason = self._judged(letter)
        self._keep(waiting, digest, state, reason, b"" if state == "refused" else encode_message(letter))

    def _judged(self, letter: Letter) -> tuple[State, str]:
        """Duplicates are refused, disagreement is held for a person."""
        pixels = letter.example.array()
        twins = [
            (other.letter.example.label, other.sender)
            for other in self.examples()
            if other.letter is not None
            and _correlation(_rows([other.letter.example.array()]), pixels) >= NEARLY_THE_SAME
        ]
        for label, sender in twins:
            if label != letter.example.label:
                return "held", f"{sender} sent the same image with the label {label}"
        if twins:
            return "refused", f"a copy of an image that {twins[0][1]} sent"
        if _correlation(self._own, pixels) >= NEARLY_THE_SAME:
            return "refused", "a copy of an image that is here already"
        if self._predict is not None and letter.novelty <= self._novelty_threshold:
            # On a foreign scanner a sure and wrong model is expected; on a familiar one it is odd.
            chances = np.asarray(self._predict(pixels), dtype=np.float64).reshape(-1)
            best = int(chances.argmax())
            if best != letter.example.label and chances[best] >= SURE:
                return "held", f"the model is sure of class {best} ({chances[best]:.2f}) on a familiar image"
        return "accepted", letter.reason

    def _keep(self, waiting: Waiting, digest: bytes, state: State, reason: str, letter: bytes) -> None:
        with transaction(self._db):
            self._db.execute(
                "INSERT INTO example VALUES (?, ?, ?, ?, ?, ?, ?)",
                (waiting.id, waiting.sender, digest, state, reason, letter, int(self._now())),
            )
            self._log(state, id=waiting.id.hex(), sender=waiting.sender, digest=digest.hex(), reason=reason)

    def _delete(self, waiting: Waiting) -> None:
        known = self._state(waiting.id)
        if known == "deleted":
            return
        with transaction(self._db):
            if known is None:
                self._db.execute(
                    "INSERT INTO example VALUES (?, ?, zeroblob(32), 'deleted', 'withdrawn', x'', ?)",
                    (waiting.id, waiting.sender, int(self._now())),
                )
            else:
                self._db.execute(
                    "UPDATE example SET state = 'deleted', reason = 'withdrawn', digest = zeroblob(32),"
                    " letter = x'' WHERE id = ?",
                    (waiting.id,),
                )
            self._log("deleted", id=waiting.id.hex(), sender=waiting.sender)

    # What is here

    def examples(self, state: State | None = None) -> list[ReceivedExample]:
        """What was received, in order; those in one state, or all."""
        return self._received(state=state)

    def one(self, identifier: bytes) -> ReceivedExample:
        """The example of this id. Raises `NotHeld` if there is none."""
        for example in self._received(identifier=identifier):
            return example
        raise NotHeld(f"there is no example {identifier.hex()[:16]} here")

    def _received(self, state: State | None = None, identifier: bytes | None = None) -> list[ReceivedExample]:
        query = (
            "SELECT id, sender, state, reason, received, letter FROM example"
            " WHERE coalesce(?, state) = state AND coalesce(?, id) = id ORDER BY received, rowid"
        )
        return [
            ReceivedExample(
                known,
                sender,
                kept,
                reason,
                received,
                decode_message(letter, Letter, "a received example") if letter else None,
            )
            for known, sender, kept, reason, received, letter in self._db.execute(query, (state, identifier))
        ]

    def accepted(self) -> list[Letter]:
        """What may be trained on."""
        return [one.letter for one in self.examples("accepted") if one.letter is not None]

    def decide(self, identifier: bytes, *, accept: bool, reviewer: str) -> None:
        """A person's word on a held example. Raises `NotHeld`."""
        if self.one(identifier).state != "held":
            raise NotHeld(f"example {identifier.hex()[:16]} isn't held; only those wait for a decision")
        with transaction(self._db):
            if accept:
                self._db.execute("UPDATE example SET state = 'accepted' WHERE id = ?", (identifier,))
            else:
                self._db.execute(
                    "UPDATE example SET state = 'refused', letter = x'' WHERE id = ?", (identifier,)
                )
            self._log("released" if accept else "refused", id=identifier.hex(), reviewer=reviewer)

    def audit(self) -> list[audit_trail.AuditLine]:
        """What happened here, in order. Raises `AuditBroken`."""
        return audit_trail.lines(self._db)

    def _state(self, identifier: bytes) -> str | None:
        row = self._db.execute("SELECT state FROM example WHERE id = ?", (identifier,)).fetchone()
        return None if row is None else str(row[0])

    def _log(self, kind: str, **detail: object) -> None:
        audit_trail.append(self._db, int(self._now()), kind, **detail)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _rows(images: Sequence[Pixels] | Pixels) -> NDArray[np.float64]:
    """Images as rows of mean 0 and length 1; a flat image is a row of zeros."""
    if not len(images):
        return np.zeros((0, 0))
    rows = np.stack([np.asarray(image, dtype=np.float64).reshape(-1) for image in images])
    rows = rows - rows.mean(axis=1, keepdims=True)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    scaled: NDArray[np.float64] = rows / np.where(length == 0, 1, length)
    return scaled


def _correlation(rows: NDArray[np.float64], pixels: Pixels) -> float:
    """The largest correlation with any of the rows; 0 without rows of this size."""
    if not len(rows) or rows.shape[1] != pixels.size:
        return 0.0
    return float((rows @ _rows([pixels])[0]).max())
