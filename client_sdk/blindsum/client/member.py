"""A member of a federation, as an app embeds it.

    member = Member.open("clinic-3/")
    for rnd in member.rounds():
        with rnd:
            model.load_state_dict(rnd.weights())
            loss = train(model, loader)
            receipt = rnd.submit(model.state_dict(), examples=len(data), metrics={"loss": loss})

Two threads work for an open `rounds()`: one reads the aggregator's notices, one acts on them (verifies,
answers message steps) while the app trains. Bulk is encoded, sent, fetched and opened in the app's thread,
inside `submit`, on all cores.

**When a round aborts.** As long as this member hasn't helped to open the round's sum, `submit` carries the
same update into the retry by itself. Once it has (it answered `confirm`), the update may not be used again
(protocols.md 1.11): `submit` raises `RoundAborted`, and `rounds()` goes on with the same weights for the
app to train on fresh batches. `with rnd:` ends the block at that point without more ado. After two such
aborts from the same state the member stops and says so.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Self, cast

from blindsum.client.frame_workers import end_idle_workers
from blindsum.client.held_state import HeldState
from blindsum.client.layout import Framework, dress, portable, undress
from blindsum.client.member_folder import MemberFolder, StateMark, StoredReceipt
from blindsum.client.owner_documents import OwnerDocuments, RosterMovedOn
from blindsum.client.progress import OnProgress, Phase, silent
from blindsum.client.receipts import RoundReceipt
from blindsum.client.round_session import MESSAGE_STEPS, Contribution, RoundSession, is_too_late
from blindsum.client.training_round import Round
from blindsum.client.transport import DEFAULT, MemberLine, Patience, Stopped, Unreachable
from blindsum.client.transport_certificate import TransportCertificate
from blindsum.client.witness import Witness
from blindsum.crypto.encoding.vector import VectorPlan
from blindsum.crypto.errors import (
    BlindsumError,
    EncodingError,
    OpeningFailed,
    PolicyViolation,
    RefusalReason,
    Refused,
    RoundAborted,
    ServerViolation,
    StateMismatch,
    SumCheckFailed,
)
from blindsum.crypto.primitives.derivation import labelled_hash
from blindsum.crypto.trust.acceptance import sign_state
from blindsum.crypto.trust.header import BoundHeader, Header
from blindsum.crypto.trust.plan import Plan
from blindsum.crypto.trust.receipt import make_receipt, sign_receipt
from blindsum.crypto.trust.round_check import Pinned, check_header
from blindsum.crypto.trust.strategy import Strategy
from blindsum.crypto.trust.training_state import TrainingState, check_arithmetic
from blindsum.proto.v1 import round_pb2

__all__ = ["FRAMEWORK_SETTING", "Member", "Round"]

FRAMEWORK_SETTING: Final = "client.framework"
_ABORTS_BEFORE_STOP: Final = 2
_RENEWAL_LOOK_SECONDS: Final = 3600.0
_SUPERSEDED_SECONDS: Final = 3.0
_log = logging.getLogger("blindsum.client")


class Member:
    """An open member's folder; `open` it, iterate `rounds()`, `close` it (or use `with`)."""

    def __init__(
        self,
        folder: MemberFolder,
        *,
        on_progress: OnProgress = silent,
        arrays: Framework | None = None,
        patience: Patience = DEFAULT,
        witness: bool = False,
        rounding_seed: bytes | None = None,
    ) -> None:
        check_arithmetic()
        self._folder = folder
        self._on_progress = on_progress
        self._arrays = arrays
        self._patience = patience
        self._witness = witness
        self._rounding_seed = rounding_seed
        self._cond = threading.Condition()
        self._stop = threading.Event()
        self._certificate: TransportCertificate | None = None
        self._look_at_certificate = False
        self._line: MemberLine | None = None
        self._documents: OwnerDocuments | None = None
        self._connecting = threading.RLock()
        self._threads: list[threading.Thread] = []
        self._notice: round_pb2.WatchResponse | None = None
        self._arrived = 0
        self._session: RoundSession | None = None
        self._computing: RoundSession | None = None
        self._offered = 0
        self._failure: BaseException | None = None
        self._finished = False
        self._held: HeldState | None = None
        self._local: dict[str, Any] | None = None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        on_progress: OnProgress = silent,
        arrays: Framework | None = None,
        patience: Patience = DEFAULT,
        witness: bool = False,
        rounding_seed: bytes | None = None,
    ) -> Self:
        """Open the folder that `blindsum join` made, and lock it.

        `arrays` overrides the plan's kind of state dict ("torch", "numpy"). `patience` bounds the retries of
        single calls; waiting for rounds has no bound.

        For tests, demos and audits only: `witness` writes what was sent and what was opened, in the clear,
        to `witness/` in the folder; `rounding_seed` (32 bytes) makes stochastic rounding repeatable. It
        reaches nothing else: no key, mask, nonce or ciphertext.

        Raises `FolderInUse`, `FolderError`.
        """
        return cls(
            MemberFolder(Path(path)),
            on_progress=on_progress,
            arrays=arrays,
            patience=patience,
            witness=witness,
            rounding_seed=rounding_seed,
        )

    def close(self) -> None:
        """Stop taking part and unlock the folder. A round in progress can be gone on with after `open`."""
        self._disconnect()
        self._folder.close()
        end_idle_workers()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Member {self.name} of {self._folder.pin.name}>"

    @property
    def name(self) -> str:
        """The member's name in the roster."""
        return self._folder.pin.member

    @property
    def federation(self) -> str:
        """The federation's name."""
        return self._folder.pin.name

    @property
    def path(self) -> Path:
        """The folder."""
        return self._folder.path

    @property
    def last_round(self) -> int:
        """Number of the newest round that this member answered; 0 before the first."""
        return self._folder.number("last_round")

    def receipts(self) -> list[RoundReceipt]:
        """The receipts of all rounds that this member saw through, in order."""
        pending = self._folder.state_mark("pending")
        skip = pending.round if pending is not None else 0
        return [RoundReceipt.of(stored) for stored in self._folder.receipts() if stored.number != skip]

    # Rounds

    def rounds(self) -> Iterator[Round]:
        """Rounds in which this member's update is wanted, until the plan is finished.

        Waits for as long as it takes, reconnects, goes on after a restart; verifies the owner's documents,
        the header and the model before the app sees it. While the iterator is open, the member counts as
        ready. Raises `PolicyViolation`, `DocumentError`, `ServerViolation`, `StateMismatch` and others when
        something must be refused: the member then takes no further part.
        """
        self._connect()
        try:
            while True:
                session = self._next_session()
                if session is None:
                    return
                if session.sealed or session.seal_stored():
                    try:
                        self._see_through(session)
                    except RoundAborted as aborted:
                        _log.warning("%s", aborted)
                    continue
                with self._cond:
                    self._offered = session.number
                state = self._held_state().current()
                if not self._held_state().is_at(session.plan, session.bound.header.state):
                    continue
                self._report("training", 0, 0)
                yield Round(self, session, state, again=self._aborts_at(session) > 0)
        finally:
            self._disconnect()

    def latest_state(self) -> dict[str, Any]:
        """The federation's newest model, verified: what a newcomer starts with before its first round.

        Raises `StateMismatch` or `OpeningFailed` for one that can't be accepted, `Refused` before there is a
        plan.
        """
        connected = self._line is not None
        self._connect(watch=False)
        try:
            assert self._line is not None
            notice = self._line.first_notice()
            documents = self._documents
            assert documents is not None
            if not documents.follow(notice) or documents.plan is None or not notice.state:
                raise Refused(RefusalReason.WRONG_STEP, "the federation has no training plan yet")
            self._held_state().ensure(notice.state_round, notice.state)
            state = self._held_state().current()
            return dress(state.layout, state.tensors(), self.framework_for(documents.plan))
        finally:
            if not connected:
                self._disconnect()

    def framework_for(self, plan: Plan) -> Framework:
        """Which kind of state dict this member's app uses under a plan."""
        if self._arrays is not None:
            return self._arrays
        return "torch" if plan.settings.get(FRAMEWORK_SETTING) == "torch" else "numpy"

    def local_tensors(self, framework: Framework, shared: set[str]) -> dict[str, Any]:
        """The tensors that aren't shared, from the last submit."""
        stored = undress(self._folder.local(), framework) if self._local is None else self._local
        return {name: value for name, value in stored.items() if name not in shared}

    def rounding_seed(self, session: RoundSession) -> bytes | None:
        """The seed of a round's stochastic rounding where runs repeat; None: a fresh one each time."""
        if self._rounding_seed is None:
            return None
        header = session.bound.header
        place = (header.plan_name.encode(), header.state_round.to_bytes(8, "little"), self.name.encode())
        return labelled_hash("repeatable rounding", self._rounding_seed, *place)

    def forgive_aborts(self) -> None:
        """Let a member go on that stopped after late aborts. Ask the owner first why they happened."""
        self._folder.keep(late_aborts=b"")

    # Connection

    def _connect(self, watch: bool = True) -> None:
        with self._connecting:
            self._connect_now(watch)

    def _connect_now(self, watch: bool) -> None:
        if self._line is not None:
            if watch and self._threads:
                raise BlindsumError("rounds() is running already; a member takes part once at a time")
            return
        self._stop = threading.Event()
        folder = self._folder
        self._certificate = TransportCertificate(folder)
        self._certificate.ensure(self._patience, self._stop)
        self._line = self._certificate.line(self._patience, self._stop)
        self._documents = OwnerDocuments(folder, self._line)
        self._held = HeldState(folder, self._line, self._documents, self._report)
        self._failure, self._finished, self._offered = None, False, 0
        self._notice, self._arrived = None, 0
        self._session = self._computing = None
        if not watch:
            return
        record = folder.round()
        if record is not None:
            session = RoundSession.resume(folder, self._line, self._documents, record, self._report)
            if self._witness:
                session.witness = Witness(folder.path, session.number)
            if session.sealed or session.seal_stored():
                self._computing = session
            self._session = session
        self._report("waiting", 0, 0)
        for target, name in ((self._watch, "watch"), (self._work, "work")):
            thread = threading.Thread(target=target, name=f"blindsum-{name}-{self.name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _disconnect(self) -> None:
        # Whoever closes while another thread connects ends that first: it makes a `_stop` of its own.
        self._stop.set()
        while not self._connecting.acquire(timeout=0.1):
            self._stop.set()
        try:
            self._disconnect_now()
        finally:
            self._connecting.release()

    def _disconnect_now(self) -> None:
        self._stop.set()
        line = self._line
        if line is not None:
            line.end_watch()
            line.close()
        with self._cond:
            self._cond.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads = []
        self._line = None
        self._documents = None

    def _held_state(self) -> HeldState:
        if self._held is None:
            raise Stopped("the member isn't connected; iterate rounds()")
        return self._held

    def _report(self, phase: Phase, done: int, total: int) -> None:
        try:
            self._on_progress(phase, done, total)
        except Exception:
            _log.exception("on_progress failed")

    # The thread that reads notices

    def _watch(self) -> None:
        line = self._line
        assert line is not None
        try:
            for notice in line.watch(self._connection_changed):
                with self._cond:
                    self._notice = notice
                    self._arrived += 1
                    self._cond.notify_all()
        except Exception as error:
            self._fail(error)

    def _connection_changed(self, connected: bool) -> None:
        if not connected:
            _log.info("the connection to the aggregator broke; connecting again")
            with self._cond:
                # The machine may have slept past the certificate's end.
                self._look_at_certificate = True
                self._cond.notify_all()

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, Stopped) or self._stop.is_set():
            return
        with self._cond:
            self._failure = self._failure or error
            self._cond.notify_all()

    # The thread that acts on notices

    def _work(self) -> None:
        handled = 0
        while not self._stop.is_set():
            with self._cond:
                if not (self._stop.is_set() or self._arrived > handled or self._look_at_certificate):
                    self._cond.wait(self._seconds_to_renewal())
                if self._stop.is_set():
                    return
                self._look_at_certificate = False
                notice, new = self._notice, self._arrived > handled
                handled = self._arrived
            try:
                self._keep_certificate_fresh()
                if notice is None or not new:
                    continue
                self._act_on(notice)
            except RosterMovedOn as error:
                # Harmless if a newer notice follows; else somebody holds the keys back.
                if not self._newer_than(handled, _SUPERSEDED_SECONDS):
                    self._fail(error)
                    return
            except Unreachable as error:
                _log.warning("%s", error)
                with self._cond:
                    self._arrived += 1  # the same notice again, unless a newer one comes
            except Refused as refusal:
                if not is_too_late(refusal):
                    self._fail(refusal)
                    return
                _log.info("too late: %s", refusal)
            except Exception as error:
                self._fail(error)
                return

    def _seconds_to_renewal(self) -> float:
        certificate = self._certificate
        left = _RENEWAL_LOOK_SECONDS if certificate is None else certificate.seconds_left()
        return min(left, _RENEWAL_LOOK_SECONDS)

    def _keep_certificate_fresh(self) -> None:
        """Renew the certificate of a member that has been running for weeks, without a stop."""
        line, certificate = self._line, self._certificate
        if line is not None and certificate is not None:
            certificate.renew_in(line, self._stop)

    def _newer_than(self, handled: int, seconds: float) -> bool:
        with self._cond:
            return self._cond.wait_for(lambda: self._arrived > handled or self._stop.is_set(), seconds)

    def _act_on(self, notice: round_pb2.WatchResponse) -> None:
        documents = self._documents
        assert documents is not None
        self._tell_of_round(notice)
        complete = documents.follow(notice)
        if not complete:
            return
        if not self._wait_for_computing(notice):
            return
        self._settle(notice)
        if notice.HasField("round"):
            self._answer(notice)
        with self._cond:
            self._finished = notice.plan_finished
            self._cond.notify_all()

    def _tell_of_round(self, notice: round_pb2.WatchResponse) -> None:
        """Let the app's thread know what became of the round that it is in."""
        session = self._session
        if session is None:
            return
        if not notice.HasField("round"):
            return
        said = notice.round
        if said.number == session.number and said.header != session.record.header:
            raise ServerViolation("header", f"round {said.number} has another header than it began with")
        with self._cond:
            live = session.live
            if said.number == session.number:
                live.state, live.step, live.asked = said.state, said.step, said.asked
                live.reason, live.checkpoint_wanted = said.abort_reason, said.checkpoint_wanted
            elif said.number > session.number:
                live.gone = True
                live.passed = notice.state_round > session.bound.header.state_round
            self._cond.notify_all()
        if said.number == session.number and said.participants and said.step != "upload":
            self._report(_phase_of(said), said.replied, said.participants)

    def _wait_for_computing(self, notice: round_pb2.WatchResponse) -> bool:
        """Hold a newer round back while the app's thread finishes the one before; False when stopped."""
        with self._cond:
            session = self._computing
            if session is None or not (notice.HasField("round") and notice.round.number > session.number):
                return not self._stop.is_set()
            self._cond.wait_for(lambda: self._computing is not session or self._stop.is_set())
            return not self._stop.is_set()

    def _settle(self, notice: round_pb2.WatchResponse) -> None:
        held = self._held
        assert held is not None
        with self._cond:
            if held.settle(notice):
                self._cond.notify_all()

    def _answer(self, notice: round_pb2.WatchResponse) -> None:
        said, session = notice.round, self._session
        if said.state != round_pb2.ROUND_STATE_OPEN or not said.asked:
            return
        if session is None or session.number != said.number:
            if said.taking_part:
                return  # an earlier process answered, and its folder isn't this one's any more
            session = self._enter(notice)
            if session is None:
                return
        if said.step in MESSAGE_STEPS and not session.lost:
            session.answer(said.step)

    def _enter(self, notice: round_pb2.WatchResponse) -> RoundSession | None:
        """Check everything about a new round, and begin it."""
        documents, folder, line = self._documents, self._folder, self._line
        assert documents is not None
        assert line is not None
        assert documents.policy is not None
        assert documents.plan is not None
        assert documents.roster is not None
        assert documents.group_key is not None
        said = notice.round
        bound = BoundHeader.parse(said.header)
        header = bound.header
        if header.round != said.number:
            raise ServerViolation("round", f"the notice says round {said.number}, its header {header.round}")
        if header.roster != documents.roster_digest and header.federation == folder.pin.federation:
            _log.info("round %d is under another roster; waiting for the next one", said.number)
            return None
        last = folder.number("last_round")
        if header.round > last:
            self._held_state().ensure(header.state_round, header.state)
        state = self._held_state().current()
        check_header(
            bound,
            Pinned(
                member=self.name,
                policy=documents.policy,
                policy_digest=documents.policy_digest,
                plan=documents.plan,
                plan_digest=documents.plan_digest,
                roster=documents.roster,
                roster_digest=documents.roster_digest,
                group_key_id=documents.group_key.key_id,
                state_index=state.index,
                state_digest=state.digest(documents.group_key),
                exponents=state.exponents,
                last_round=last,
                last_h0=folder.fact("last_h0"),
            ),
            now=time.time(),
        )
        if header.round == last:
            return None  # answered already, and left: a message is never computed twice under one h
        if folder.fact("refused_he_key") == header.he_key:
            raise PolicyViolation(
                "a sum under this HE key was false; no round goes on under it. Ask the owner for a new key"
            )
        if self._late_aborts(header) >= _ABORTS_BEFORE_STOP:
            raise RoundAborted(
                header.round,
                "two rounds from this state were aborted after this member had helped to open their sums; "
                "it stops, for repeated openings give differences away. Ask the owner; then forgive_aborts()",
            )
        if documents.plan.layout != state.layout.digest(documents.group_key):
            raise StateMismatch("the model's tensors aren't those of the plan; ask the owner")
        VectorPlan.of(documents.plan, state.layout)
        Strategy.of(documents.plan)
        session = RoundSession.enter(folder, line, documents, bound, self._report)
        if self._witness:
            session.witness = Witness(folder.path, session.number)
        with self._cond:
            self._session = session
            live = session.live
            live.state, live.step, live.asked = said.state, said.step, said.asked
            self._cond.notify_all()
        return session

    # The app's thread

    def _wait(self, until: Callable[[], bool]) -> None:
        """Wait until something holds. Raises what the other threads failed with, or `Stopped`."""
        with self._cond:
            self._cond.wait_for(lambda: until() or self._failure is not None or self._stop.is_set())
            if self._failure is not None and not until():
                raise self._failure
            if self._stop.is_set():
                raise Stopped("the member was closed")

    def _next_session(self) -> RoundSession | None:
        found: list[RoundSession | None] = []

        def ready() -> bool:
            session = self._session
            found.clear()
            if session is not None and session.number > self._offered and not session.lost:
                live = session.live
                known = live.state != 0 or live.gone
                dropped = live.step in ("confirm", "reveal") or (live.step == "upload" and not live.asked)
                open_ = live.state == round_pb2.ROUND_STATE_OPEN and not live.gone and not dropped
                if known and (open_ or session is self._computing):
                    found.append(session)
                    return True
            if self._finished and self._computing is None:
                found.append(None)
                return True
            return False

        self._report("waiting", 0, 0)
        self._wait(ready)
        return found[0]

    def contribute(
        self, session: RoundSession, state: TrainingState, contribution: Contribution
    ) -> RoundReceipt:
        """Send a round's contribution and see the round through; `Round.submit` is the way for apps."""
        while True:
            try:
                return self._contribute(session, state, contribution)
            except RoundAborted as aborted:
                if session.confirmed or session.live.passed:
                    raise
                _log.info("%s; the same update goes into the retry", aborted)
                session = self._retry_of(session, aborted)

    def _retry_of(self, session: RoundSession, aborted: RoundAborted) -> RoundSession:
        """The next round from the same state."""
        found: list[RoundSession] = []

        def begun() -> bool:
            newer = self._session
            if newer is not None and newer.number > session.number and not newer.lost:
                found[:] = [newer]
            return bool(found) or self._finished

        self._wait(begun)
        if not found or found[0].bound.header.state != session.bound.header.state:
            raise aborted
        with self._cond:
            self._offered = max(self._offered, found[0].number)
        return found[0]

    def _contribute(
        self, session: RoundSession, state: TrainingState, contribution: Contribution
    ) -> RoundReceipt:
        live = session.live
        self._wait(
            lambda: (
                live.gone
                or live.state not in (0, round_pb2.ROUND_STATE_OPEN)
                or (live.step == "upload" and live.asked)
                or live.step in ("confirm", "reveal")
            )
        )
        if live.gone or live.state != round_pb2.ROUND_STATE_OPEN or live.step != "upload":
            session.erase()
            raise self._ended(session)
        with self._cond:
            self._computing = session
        try:
            complaint = session.protect(contribution, state.layout, state.exponents)
            if complaint is not None:
                session.complain(complaint)
                self._wait(lambda: live.gone or live.state != round_pb2.ROUND_STATE_OPEN)
                session.erase()
                raise self._ended(session)
        except Refused as refusal:
            self._computed(session)
            if not is_too_late(refusal):
                raise
            session.erase()
            raise RoundAborted(
                session.number, "its upload step closed before this member was ready"
            ) from None
        except BaseException:
            self._computed(session)
            raise
        return self._see_through(session)

    def _computed(self, session: RoundSession) -> None:
        with self._cond:
            if self._computing is session:
                self._computing = None
            self._cond.notify_all()

    def _see_through(self, session: RoundSession) -> RoundReceipt:
        """Everything after the upload was sealed: send it, open the sum, agree on the next state."""
        with self._cond:
            self._offered = max(self._offered, session.number)
            self._computing = session
        live = session.live
        try:
            if self._held_state().pending_of(session.number) is None:
                self._deliver(session)
                self._wait(lambda: live.gone or live.state not in (0, round_pb2.ROUND_STATE_OPEN))
                if live.state == round_pb2.ROUND_STATE_ABORTED or (live.gone and not live.passed):
                    raise self._ended(session)
                self._open(session)
        except RoundAborted:
            self._count_abort(session)
            session.erase()
            raise
        except Unreachable:
            # The update is sealed and stays: rounds() goes on with it.
            with self._cond:
                self._offered = session.number - 1
            raise
        except Refused as refusal:
            if not is_too_late(refusal) and refusal.reason is not RefusalReason.NOT_A_PARTICIPANT:
                raise
            session.erase()
            raise RoundAborted(
                session.number, f"it went on without this member's update: {refusal.text}"
            ) from None
        finally:
            self._computed(session)
        return self._conclude(session)

    def _deliver(self, session: RoundSession) -> None:
        live = session.live
        self._wait(lambda: live.gone or live.state != 0)
        if not live.gone and live.state == round_pb2.ROUND_STATE_OPEN and live.step in ("", "upload"):
            session.upload()

    def _open(self, session: RoundSession) -> None:
        """Open and check the sum, and compute the next state; a false sum is refused before all members."""
        state, documents = self._held_state().current(), self._documents
        assert documents is not None
        assert documents.policy is not None
        h1 = session.record.h1
        try:
            opened, h1, max_error = session.open_sum(state.layout, state.exponents)
            receipt = make_receipt(
                session.bound,
                h1,
                opened,
                session.keys.group_key,
                parameters=session.terms.he_parameters,
                trust=session.scheme.trust_line(session.terms),
                previous=state.transcript,
            )
            following = state.advance(
                opened,
                number=session.number,
                strategy=Strategy.of(session.plan),
                transcript=receipt.transcript(),
                max_exponent=documents.policy.max_range_exponent,
            )
        except (SumCheckFailed, OpeningFailed, ServerViolation, EncodingError) as error:
            self._refuse_sum(session, h1, error)
            raise
        if session.witness is not None:
            session.witness.write(opened.survivors, max_error)
        signed = sign_receipt(self._folder.identity, self.name, receipt).to_bytes()
        self._folder.keep_receipt(
            StoredReceipt(session.number, signed, dict(opened.metrics), opened.digest, max_error)
        )
        self._folder.keep(survivors="\n".join(opened.survivors).encode(), h1=h1)
        self._held_state().keep_pending(following, session.plan, session.keys.group_key, session.number)

    def _refuse_sum(self, session: RoundSession, h1: bytes, error: BlindsumError) -> None:
        header, line = session.bound.header, session.line
        if header.scheme != "masking":
            self._folder.keep(refused_he_key=header.he_key)
        # What failed, never what it held.
        reason = type(error).__name__
        try:
            line.call(
                line.stub.Conclude,
                round_pb2.ConcludeRequest(
                    round=session.number,
                    refusal=reason,
                    signature=self._folder.identity.sign("refused sum", h1, reason.encode()),
                ),
                what="refusing the sum",
                patience=Patience(total=5.0),
            )
        except BlindsumError as second:
            _log.warning("the refusal of round %d wasn't delivered: %s", session.number, second)
        self._count_abort(session)
        session.erase()

    def _conclude(self, session: RoundSession) -> RoundReceipt:
        """Sign the new state, send its checkpoint if asked, and wait until the federation has agreed."""
        folder, live, held = self._folder, session.live, self._held_state()
        pending = held.pending_of(session.number)
        if pending is not None:
            self._sign_state(session, pending)
            if self._notice is not None:
                # The others may have agreed while this member still computed; no later notice need follow.
                self._settle(self._notice)
            while True:
                self._wait(lambda: live.checkpoint_wanted or held.pending_of(session.number) is None)
                if held.pending_of(session.number) is None:
                    break
                held.send_checkpoint(pending, session.keys.group_key, folder.fact("h1"))
                with self._cond:
                    live.checkpoint_wanted = False
        # A state that was dropped took its receipt along.
        stored = next((stored for stored in folder.receipts() if stored.number == session.number), None)
        if stored is None:
            self._count_abort(session)
            session.erase()
            raise self._ended(session)
        session.erase()
        self._report("concluded", 0, 0)
        return RoundReceipt.of(stored)

    def _sign_state(self, session: RoundSession, mark: StateMark) -> None:
        folder, line = self._folder, session.line
        signature = sign_state(
            folder.identity,
            federation=folder.pin.federation,
            h1=folder.fact("h1"),
            index=mark.index,
            digest=mark.digest,
            survivors=tuple(folder.fact("survivors").decode().split("\n")),
        )
        self._report("conclude", 0, 0)
        request = round_pb2.ConcludeRequest(round=session.number, state=mark.digest, signature=signature)
        try:
            line.call(line.stub.Conclude, request, what="signing the new state")
        except Refused as refusal:
            if not is_too_late(refusal):
                raise

    def _ended(self, session: RoundSession) -> RoundAborted:
        live = session.live
        if live.passed:
            text = "the others concluded it without this member; train from the new weights"
        elif session.confirmed:
            text = f"{live.reason or 'it ended'}. Its sum was opened, so train again on fresh batches"
        else:
            text = live.reason or "it ended before this member's update was in"
        self._report("aborted", 0, 0)
        return RoundAborted(session.number, text)

    # Late aborts

    def _count_abort(self, session: RoundSession) -> None:
        if session.confirmed:
            header = session.bound.header
            count = self._late_aborts(header) + 1
            self._folder.keep(late_aborts=header.state + count.to_bytes(8, "little"))

    def _late_aborts(self, header: Header) -> int:
        stored = self._folder.fact("late_aborts")
        return int.from_bytes(stored[32:], "little") if stored[:32] == header.state else 0

    def _aborts_at(self, session: RoundSession) -> int:
        return self._late_aborts(session.bound.header)

    # Local tensors

    def keep_local(self, tensors: dict[str, Any]) -> None:
        """Store the tensors that aren't shared, for the next round."""
        self._local = tensors
        self._folder.keep_local(portable(tensors))


def _phase_of(said: round_pb2.RoundNotice) -> Phase:
    return cast(Phase, said.step) if said.step else "conclude"
