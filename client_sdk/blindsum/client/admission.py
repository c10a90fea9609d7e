"""Who decides about requests to join while `blindsum owner watch` runs: a person, a list, or the token.

A rule sees applications that are in order (signature, invitation, token and date were checked) and says
what becomes of each. The decision is always the owner's machine's: it signs the next roster.
"""

import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from blindsum.client.owner import Owner
from blindsum.client.owner_view import Application, OwnerView
from blindsum.client.private_files import FolderInUse
from blindsum.client.transport import Patience, Unreachable
from blindsum.crypto.errors import BlindsumError, DocumentError

_FINGERPRINT: Final = re.compile(r"[0-9a-f]{64}")
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_PATIENCE: Final = Patience(total=15.0)


@dataclass(frozen=True)
class Decision:
    """What becomes of an application: `wait` leaves it for a later look, with the reason."""

    answer: Literal["admit", "refuse", "wait"]
    reason: str = ""


Rule: TypeAlias = Callable[[Application], Decision]


def by_token(_application: Application) -> Decision:
    """Admit whoever holds an open invitation's token: hand invitations over safely."""
    return Decision("admit")


def nobody(_application: Application) -> Decision:
    """Admit nobody: only say who asks."""
    return Decision("wait", "`blindsum owner admit` decides")


class AdmissionList:
    """A rule that admits the members of a list, each with the fingerprint that was agreed on, if any.

    One member a line: its name, then the fingerprint that its device showed (spaces are ignored), or
    nothing. Empty lines and what follows a # don't count.

    Raises `DocumentError` naming the line at fault.
    """

    def __init__(self, text: str) -> None:
        self._listed: dict[str, str] = {}
        for number, line in enumerate(text.splitlines(), 1):
            name, _, mark = line.partition("#")[0].strip().partition(" ")
            mark = mark.replace(" ", "").lower()
            if not name:
                continue
            if not _NAME.fullmatch(name) or (mark and not _FINGERPRINT.fullmatch(mark)):
                raise DocumentError(f"line {number} of the list isn't NAME or NAME FINGERPRINT")
            if name in self._listed:
                raise DocumentError(f"line {number} of the list names {name} again")
            self._listed[name] = mark

    @classmethod
    def read(cls, path: Path) -> "AdmissionList":
        """The list in a file."""
        try:
            return cls(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DocumentError(f"{path} can't be read as a list of members: {error}") from None

    def __call__(self, application: Application) -> Decision:
        """Admit a listed member with the listed fingerprint; others wait."""
        mark = self._listed.get(application.member)
        if mark is None:
            return Decision("wait", "it isn't on the list")
        if mark and mark != application.fingerprint.replace(" ", ""):
            return Decision("wait", "its fingerprint isn't the one on the list")
        return Decision("admit")


@dataclass(frozen=True)
class WatchEvent:
    """Something that `watch` saw or did. `kind` is what, `member` whom it is about, `text` why.

    asked: a request came; waiting: the rule leaves it; problem: it can't be admitted; admitted, refused:
    done; training: a plan goes on under new keys; unreachable, reachable: the aggregator; busy: another
    command has the owner's folder open; failed: something else didn't work, and is tried again.
    """

    kind: Literal[
        "asked",
        "waiting",
        "problem",
        "admitted",
        "refused",
        "training",
        "unreachable",
        "reachable",
        "busy",
        "failed",
    ]
    member: str = ""
    fingerprint: str = ""
    organisation: str = ""
    text: str = ""


class Watch:
    """The owner's machine watching for requests: what `blindsum owner watch` runs.

    It looks every `every` seconds without locking the folder, so that other owner commands work beside
    it; only to sign does it open the folder for a moment. Iterate `events()`; setting `stop` ends it.
    """

    def __init__(self, folder: Path, rule: Rule, *, every: float = 5.0, stop: threading.Event) -> None:
        self._folder = folder
        self._rule = rule
        self._every = every
        self._stop = stop
        self._decided: dict[bytes, Decision] = {}
        self._said: set[bytes] = set()
        self._trouble = ""

    def events(self) -> Iterator[WatchEvent]:
        """What happens, as it happens, until `stop` is set."""
        with Owner.look(self._folder, patience=_PATIENCE, stop=self._stop) as owner:
            while not self._stop.is_set():
                yield from self._look(owner)
                self._stop.wait(self._every)

    def _look(self, owner: OwnerView) -> Iterator[WatchEvent]:
        try:
            waiting = owner.pending(again_within=max(1, round(self._every)))
            yield from self._over("reachable")
            yield from self._decide(waiting)
            if owner.rotation_unfinished:
                yield from self._finish_rotation()
        except Unreachable as error:
            yield from self._in_trouble("unreachable", error)
        except FolderInUse as error:
            yield from self._in_trouble("busy", error)
        except BlindsumError as error:
            if not self._stop.is_set():
                yield from self._in_trouble("failed", error)

    def _in_trouble(
        self, kind: Literal["unreachable", "busy", "failed"], error: BlindsumError
    ) -> Iterator[WatchEvent]:
        if self._trouble != kind:
            self._trouble = kind
            yield WatchEvent(kind, text=str(error))

    def _over(self, kind: Literal["reachable"]) -> Iterator[WatchEvent]:
        if self._trouble == "unreachable":
            yield WatchEvent(kind)
        self._trouble = ""

    def _decide(self, waiting: list[Application]) -> Iterator[WatchEvent]:
        for one in waiting:
            if one.request_id not in self._said:
                self._said.add(one.request_id)
                kind: Literal["problem", "asked"] = "problem" if one.problem else "asked"
                yield _event(kind, one, one.problem)
            if not one.problem and one.request_id not in self._decided:
                self._decided[one.request_id] = decision = self._rule(one)
                if decision.answer == "wait":
                    yield _event("waiting", one, decision.reason)
        self._decided = {
            one.request_id: self._decided[one.request_id]
            for one in waiting
            if one.request_id in self._decided
        }
        admitted = [one for one in waiting if self._answer_to(one) == "admit"]
        for name in {one.member for one in admitted}:
            same = [one for one in admitted if one.member == name]
            if len(same) > 1:
                # Two devices hold one token: at least one of them wasn't meant to.
                for one in same:
                    self._decided[one.request_id] = Decision("wait")
                    admitted.remove(one)
                text = f"{len(same)} devices asked with this invitation's token; refuse them and invite again"
                yield _event("problem", same[0], text)
        refused = [one for one in waiting if self._answer_to(one) == "refuse"]
        if not admitted and not refused:
            return
        with Owner.open(self._folder, patience=_PATIENCE, stop=self._stop) as owner:
            for one in refused:
                reason = self._decided[one.request_id].reason
                if owner.refuse(one.member, reason, one.fingerprint):
                    yield _event("refused", one, reason)
            if admitted:
                there = owner.admit(
                    *(one.member for one in admitted), keys={one.fingerprint for one in admitted}
                )
                yield from (_event("admitted", one) for one in admitted if one.member in there)

    def _answer_to(self, one: Application) -> str:
        decision = self._decided.get(one.request_id)
        return "" if decision is None or one.problem else decision.answer

    def _finish_rotation(self) -> Iterator[WatchEvent]:
        with Owner.open(self._folder, patience=_PATIENCE, stop=self._stop) as owner:
            if owner.finish_rotation(wait=False):
                yield WatchEvent("training", text="the plan goes on under the new keys")


def _event(
    kind: Literal["asked", "waiting", "problem", "admitted", "refused"], one: Application, text: str = ""
) -> WatchEvent:
    return WatchEvent(kind, one.member, one.fingerprint, one.organisation, text)
