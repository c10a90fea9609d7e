"""A whole federation in one process, under any fault: network, members that die, rogues, a server that lies.

A run is a list of `Operation`s applied to a `Simulation`. Numbers in an operation are taken modulo what
there is to choose from, so every list is a valid run, shrinks, and can be kept as a reproduction.
`operations(seed, count)` makes a list from a seed. One federation, one seed and one list give one trace,
byte for byte in masking; HE libraries draw their own randomness, so there the trace holds decisions,
errors and sums.

The server owns one or more `View`s: each is an honest aggregator's machine with its own accepted replies
and closes, and `fork` copies one. Two views that went different ways are how it equivocates: other lists,
other survivor sets, other results for different members, the same step asked twice. Beyond that it edits
any message, keeps every message for replay, counts uploads twice or never, and shifts sums.

Rogues are members whose identity keys the server has. They sign whatever it likes, but upload what they
should: a false input within range can't be noticed by anyone (docs), and whoever has the group key from a
rogue can forge the sum check, so the server hasn't got that.

What must hold is checked at every message that an honest member sends and every sum that it accepts, and
`BrokenInvariant` says what didn't.
"""

import gc
import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Literal, get_args

import msgspec
import numpy as np
from blindsum.crypto.canonical import encode_message
from blindsum.crypto.encoding.sum_check import PRIMES, SumCheck, join, split, tag_limbs
from blindsum.crypto.encoding.vector import summed_bits
from blindsum.crypto.errors import BlindsumError, RefusalReason, Refused, ServerViolation, SumCheckFailed
from blindsum.crypto.primitives.secret_sharing import SHARE_BYTES
from blindsum.crypto.schemes.base import (
    AggregatorRound,
    Complaint,
    FrameProtector,
    MemberKeys,
    MemberRound,
    RoundTerms,
    StepName,
    SumOpener,
    frame_digest,
    upload_digest,
)
from blindsum.crypto.schemes.masking.aggregator import MaskingAggregator
from blindsum.crypto.schemes.masking.bitmaps import to_bitmap
from blindsum.crypto.schemes.masking.member import MaskingMember
from blindsum.crypto.schemes.masking.messages import (
    BOX_BYTES,
    COMMITMENTS_BYTES,
    CONTENT_BYTES,
    OPENED_BYTES,
    BoxComplaint,
    Confirmation,
    ConfirmRequest,
    Revealed,
    RevealRequest,
    Shares,
    records,
)
from federation_driver import Federation, Inputs, plain_sum, powers_of_two, seeded
from numpy.typing import NDArray

Death = Literal["before_storing", "before_sending", "before_sealing", "in_upload"]
"""When a member dies in its next answer; an answer other than an upload knows only the first two."""

DEATHS: tuple[Death, ...] = get_args(Death)

BENIGN = ("ask", "deliver", "drop", "duplicate", "repeat", "exchange", "die", "restart", "restart_server")
"""What networks and power cuts do. However often, no member is lost but one whose upload was cut short."""

LIES = (
    "flip", "swap", "redirect", "replay", "other_round", "fork", "lose_state", "leave", "close", "result",
    "count_twice", "leave_out", "shift", "forget", "false_bitmap", "mixed_reveal",
    "rogue_confirm", "rogue_reveal", "rogue_shares", "rogue_complain", "rogue_name",
)  # fmt: skip
"""What a server that lies, rogues, and members that lose their state do."""

PROGRESS = ("progress", "step")
"""A step is played and closed: with everyone, or without some."""

KINDS = (*BENIGN, *LIES, *PROGRESS)


class BrokenInvariant(AssertionError):
    """Something happened that no fault may cause."""


@dataclass(frozen=True)
class Operation:
    """One thing that happens; `a`, `b`, `c` choose among what there is, `c` mostly the server's view."""

    kind: str
    a: int = 0
    b: int = 0
    c: int = 0


def operations(seed: str, count: int, kinds: Sequence[str] = KINDS) -> list[Operation]:
    """`count` operations from a seed; every fourth is progress, if `kinds` has it, so that rounds get on."""
    random = seeded(f"operations {seed}")
    made = []
    for _ in range(count):
        kind, a, b, c, turn = random(5)
        name = kinds[kind % len(kinds)]
        made.append(Operation("step" if turn % 4 == 0 and "step" in kinds else name, a, b, c))
    return made


@dataclass(frozen=True)
class Message:
    """A message under way: a request or result to `member`, or a reply from it."""

    kind: Literal["request", "reply", "result"]
    member: str
    step: StepName
    payload: bytes
    frames: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Accepted:
    """A sum that a member took for true."""

    survivors: tuple[str, ...]
    total: NDArray[np.uint64]
    h1: bytes


@dataclass
class SimulatedMember:
    """A member: its machine, its disk (`stored`, `outbox`), and what the world has seen of it."""

    name: str
    machine: MemberRound
    stored: bytes
    outbox: dict[StepName, Message] = field(default_factory=dict)
    requests: dict[StepName, bytes] = field(default_factory=dict)
    frames: tuple[bytes, ...] = ()
    h1: bytes = b""
    dies: Death | None = None
    gone: bool = False
    begun: bool = False
    cut: bool = False
    """Whether it died in its upload, so that it can't send one any more (masking)."""
    incarnation: int = 0
    emitted: list[bytes] = field(default_factory=list)
    accepted: Accepted | None = None
    secrets: set[bytes] = field(default_factory=set)
    shares: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    """By dealer's position: its shares of the dealer's self seed and mask root."""


@dataclass
class View:
    """One story that the server tells: an aggregator's machine and what was put into it."""

    machine: AggregatorRound
    history: list[tuple[str, bytes] | None] = field(default_factory=list)
    uploads: list[tuple[str, tuple[bytes, ...]]] = field(default_factory=list)
    shifts: list[tuple[int, int]] = field(default_factory=list)
    honest: bool = True
    """Whether its sum is that of the uploads it accepted."""


class _Died(Exception):
    pass


class Simulation:
    """One round of a federation. `seed` decides all randomness of the machines.

    `rogues` are the members that the server can sign for. `earlier` are messages of another round. A
    server that doesn't mind smaller cohorts than the header says goes by `server_n_min`.
    """

    def __init__(
        self,
        federation: Federation,
        *,
        seed: str = "simulation",
        rogues: Collection[str] = (),
        earlier: Sequence[Message] = (),
        server_n_min: int | None = None,
        make_member: Callable[[str, int], MemberRound] | None = None,
    ) -> None:
        self.federation = federation
        self.seed = seed
        self.masking = federation.scheme.name == "masking"
        self.rogues = tuple(rogues)
        self.earlier = earlier
        self.inputs = simulated_inputs(federation)
        self._make = make_member or self._new_machine
        self._server_terms = federation.terms
        if server_n_min is not None:
            lower = federation.with_header(n_min=server_n_min).header
            bound = replace(federation.terms.bound, header=lower)
            self._server_terms = replace(federation.terms, bound=bound)
        self.views = [View(federation.scheme.aggregator(self._server_terms))]
        self.network: list[Message] = []
        self.archive: list[Message] = []
        self._confirmations: list[Message] = []
        self._trace: list[bytes] = []
        self.members = {name: self._fresh(name, 0) for name in federation.members}

    # -- running -------------------------------------------------------------------------------------

    def run(self, operations: Iterable[Operation]) -> "Simulation":
        """Apply operations one after the other."""
        for operation in operations:
            self.apply(operation)
        return self

    def apply(self, operation: Operation) -> None:
        """Apply one operation; one that has nothing to choose from does nothing."""
        self._note("operation", operation.kind, operation.a, operation.b, operation.c)
        view = self.views[operation.c % len(self.views)]
        getattr(self, f"_do_{operation.kind}")(operation.a, operation.b, view)

    def settle(self) -> View:
        """Faults stop: every member comes back, and the first view plays to its end."""
        self._note("settle")
        view = self.views[0]
        for _ in self.federation.scheme.steps:
            self.finish_step(view)
        if view.machine.step is not None:
            raise BrokenInvariant(f"the round is still at {view.machine.step} after all of its steps")
        if view.machine.abort is not None and not view.machine.abort.reason:
            raise BrokenInvariant("the round was aborted without a reason")
        self.publish(view)
        if view.honest and view.machine.abort is None:
            self._check_served(view)
        return view

    def finish_step(self, view: View, absent: Collection[str] = ()) -> None:
        """Nobody dies any more: everyone but `absent` answers the open step, and it closes."""
        for member in self.members.values():
            member.dies = None
        self._play(view, absent)

    def publish(self, view: View) -> None:
        """Give the view's result to everyone."""
        if view.machine.step is None and view.machine.abort is None:
            for name in self.federation.members:
                self._receive(self._result(view, name))

    def end(self) -> "Simulation":
        """All members leave the round; checks what can only be known now."""
        for member in self.members.values():
            self._check_emitted(member)
        self._check_thresholds()
        for member in self.members.values():
            # A snapshot on the disk goes with the round (client_sdk), so the machine is what is left.
            member.machine.erase()
            self._check_forgotten(member, everything=True)
        return self

    @property
    def trace(self) -> bytes:
        """Everything that happened, in order."""
        return b"\n".join(self._trace)

    def accepted(self) -> dict[str, Accepted]:
        """Who took which sum for true."""
        return {m.name: m.accepted for m in self.members.values() if m.accepted is not None}

    def _note(self, *parts: object, data: Iterable[bytes] = ()) -> None:
        line = " ".join(map(str, parts)).encode()
        if self.masking:
            line += b"".join(b" " + hashlib.sha256(each).hexdigest().encode() for each in data)
        self._trace.append(line)

    # -- members -------------------------------------------------------------------------------------

    def _new_machine(self, name: str, incarnation: int) -> MemberRound:
        federation = self.federation
        random = seeded(f"{self.seed} {name} {incarnation}")
        return federation.scheme.member(federation.terms, federation.keys[name], random)

    def _fresh(self, name: str, incarnation: int) -> SimulatedMember:
        machine = self._make(name, incarnation)
        member = SimulatedMember(name, machine, machine.snapshot(), incarnation=incarnation)
        if isinstance(machine, MaskingMember):
            member.secrets |= set(records(machine._secrets, 32))
        return member

    def _pick(self, number: int) -> SimulatedMember:
        names = self.federation.members
        return self.members[names[number % len(names)]]

    def _restore(self, member: SimulatedMember) -> None:
        """The member's process starts again from its disk."""
        federation = self.federation
        random = seeded(f"{self.seed} {member.name} restored")
        member.machine = federation.scheme.restore_member(
            federation.terms, federation.keys[member.name], member.stored, random
        )
        if member.machine.snapshot() != member.stored:
            raise BrokenInvariant(f"{member.name} isn't the same after a restart")

    def _store(self, member: SimulatedMember) -> None:
        member.stored = member.machine.snapshot()

    def _receive(self, message: Message) -> list[Message]:
        """A request or result reaches a member: what it sends, if anything."""
        member = self.members[message.member]
        if member.gone:
            self._note("gone", member.name)
            return []
        try:
            if message.kind == "result":
                self._open(member, message)
                return []
            return [self._answered(member, message)]
        except _Died as death:
            self._note("died", member.name, message.step, *death.args)
            self._restore(member)
        except BlindsumError as error:
            self._store(member)
            self._note("refused", member.name, message.step, _error_name(error))
            if self.masking and isinstance(error, ServerViolation):
                self._check_forgotten(member)
        return []

    def _answered(self, member: SimulatedMember, message: Message) -> Message:
        dies, member.dies = member.dies, None
        if message.step == "upload":
            payload, frames = self._upload(member, message.payload, dies)
        else:
            payload, frames = member.machine.answer(message.step, message.payload), ()
        if dies == "before_storing":
            raise _Died(dies)
        reply = Message("reply", member.name, message.step, payload, frames)
        self._store(member)
        member.outbox.setdefault(message.step, reply)
        if dies == "before_sending":
            raise _Died(dies)
        self._check_answer(member, message, reply)
        self._note("sent", member.name, message.step, data=(payload, *frames))
        member.emitted += [payload, *frames]
        self.archive.append(reply)
        if message.step == "confirm":
            self._confirmations.append(reply)
        return reply

    def _upload(
        self, member: SimulatedMember, request: bytes, dies: Death | None
    ) -> tuple[bytes, tuple[bytes, ...]]:
        machine = member.machine
        try:
            started = machine.begin_upload(request)
        except Refused as refusal:
            sent = member.outbox.get("upload")
            asked = member.requests.get("upload")
            if refusal.reason is RefusalReason.WRONG_STEP and sent is not None and asked == request:
                return sent.payload, sent.frames
            if refusal.reason is RefusalReason.CONFLICT and member.frames:
                return self._sealed(member), member.frames
            raise
        if isinstance(started, Complaint):
            return started.reply, ()
        self._learn_shares(member)
        if dies == "before_storing":
            raise _Died(dies)
        self._store(member)
        member.requests["upload"] = request
        if self.masking and member.begun:
            raise BrokenInvariant(f"{member.name} masked a second vector with the same masks")
        member.begun = True
        frames = self._protected(started, member.name)
        member.h1 = started.h1
        if dies == "in_upload":
            member.cut = True
            member.emitted += frames
            raise _Died(dies)
        member.frames = frames
        if dies == "before_sealing":
            raise _Died(dies)
        return self._sealed(member), frames

    def _sealed(self, member: SimulatedMember) -> bytes:
        digest = upload_digest(member.h1, map(frame_digest, member.frames))
        return member.machine.seal_upload(digest)

    def _protected(self, protector: FrameProtector, name: str) -> tuple[bytes, ...]:
        fields = self.fields(name, protector.h1)
        layout = protector.layout
        return tuple(
            protector.protect(index, fields[slice(*layout.field_range(index))])
            for index in range(layout.frames)
        )

    def fields(self, name: str, h1: bytes) -> NDArray[np.uint64]:
        """A member's vector: its input, then the tags of the sum check."""
        bits, body = self.federation.header.bits, self.inputs[name]
        check = SumCheck(self.federation.keys[name].group_key.check_key(h1))
        tags = check.expected([name], check.partial(0, body, bits))
        limbs = [limb for tag in tags for limb in split(tag, bits, tag_limbs(bits))]
        return np.concatenate([body, np.array(limbs, dtype=np.uint64)])

    def _open(self, member: SimulatedMember, message: Message) -> None:
        opener = member.machine.open_sum(message.payload)
        if len(message.frames) != opener.layout.frames:
            raise Refused(RefusalReason.WRONG_SIZE, "frames of the sum are missing")
        total = np.concatenate([opener.open(index, frame) for index, frame in enumerate(message.frames)])
        accepted = Accepted(opener.survivors, self._checked(member, opener, total), opener.h1)
        self._note("accepted", member.name, *accepted.survivors, accepted.total.tolist())
        self._check_sum(member, accepted)
        member.accepted = accepted

    def _checked(
        self, member: SimulatedMember, opener: SumOpener, total: NDArray[np.uint64]
    ) -> NDArray[np.uint64]:
        header = self.federation.header
        check = SumCheck(self.federation.keys[member.name].group_key.check_key(opener.h1))
        width = tag_limbs(header.bits)
        body, tags = total[: -2 * width], total[-2 * width :].reshape(2, width)
        partial = check.partial(0, body, summed_bits(header.bits, header.n_max))
        expected = check.expected(opener.survivors, partial)
        if any(
            join(limbs.tolist(), header.bits) % prime != want
            for limbs, prime, want in zip(tags, PRIMES, expected, strict=True)
        ):
            raise SumCheckFailed("the opened sum isn't what these survivors sent")
        return body

    # -- the server ----------------------------------------------------------------------------------

    def _accept(self, view: View, message: Message) -> None:
        machine = view.machine
        try:
            if machine.check_reply(message.member, message.payload):
                digest = upload_digest(machine.h1, map(frame_digest, message.frames))
                if machine.expected_digest(message.payload) != digest:
                    raise Refused(RefusalReason.WRONG_DIGEST, "the frames aren't the promised ones")
                arithmetic = machine.arithmetic()
                if len(message.frames) != machine.layout.frames:
                    raise Refused(RefusalReason.WRONG_SIZE, "frames are missing")
                for index, frame in enumerate(message.frames):
                    arithmetic.check(index, frame)
                new = machine.accept(message.member, message.payload)
                view.uploads.append((message.member, message.frames))
            else:
                new = machine.accept(message.member, message.payload)
            if new:
                view.history.append((message.member, message.payload))
            self._note("took" if new else "had", message.member, message.step)
        except BlindsumError as error:
            self._note("not taken", message.member, message.step, _error_name(error))

    def _request(self, view: View, name: str) -> Message | None:
        step = view.machine.step
        if step is None or name not in view.machine.participants:
            return None
        return Message("request", name, step, view.machine.request(name))

    def _result(self, view: View, name: str) -> Message:
        machine, arithmetic = view.machine, view.machine.arithmetic()
        totals: list[bytearray | None] = [None] * machine.layout.frames
        for _, frames in view.uploads:
            for index, frame in enumerate(frames):
                totals[index] = arithmetic.add(index, totals[index], frame)
        published = []
        for index, total in enumerate(totals):
            done = bytearray(machine.finish_frame(index, total or bytes(machine.layout.sum_bytes(index))))
            for place, amount in view.shifts:
                done[place % len(done)] = (done[place % len(done)] + amount) % 256
            published.append(bytes(done))
        message = Message("result", name, "reveal", machine.result(), tuple(published))
        self.archive.append(message)
        return message

    def _close(self, view: View) -> None:
        machine = view.machine
        if machine.step is None:
            return
        machine.close()
        view.history.append(None)
        abort = machine.abort
        self._note("closed", machine.step, abort.reason if abort else "", *sorted(machine.named))
        for name, why in machine.named.items():
            # A complaint names two, of whom the server can't tell which is at fault.
            if name not in self.rogues and "box" not in why:
                raise BrokenInvariant(f"{name} is honest, but was named: {why}")

    def _replayed(self, view: View) -> AggregatorRound:
        machine = self.federation.scheme.aggregator(self._server_terms)
        for event in view.history:
            if event is None:
                machine.close()
            elif not machine.accept(*event):
                raise BrokenInvariant("the aggregator isn't the same after a restart")
        return machine

    # -- operations: network and power ---------------------------------------------------------------

    def _do_ask(self, a: int, _b: int, view: View) -> None:
        request = self._request(view, self._pick(a).name)
        if request is not None:
            self.archive.append(request)
            self.network.append(request)

    def _do_deliver(self, a: int, _b: int, view: View) -> None:
        if not self.network:
            return
        self._deliver(self.network.pop(a % len(self.network)), view)

    def _deliver(self, message: Message, view: View) -> None:
        if message.kind == "reply":
            self._accept(view, message)
        else:
            self.network += self._receive(message)

    def _deliver_all(self, request: Message, view: View) -> None:
        self.archive.append(request)
        for reply in self._receive(request):
            self._accept(view, reply)

    def _do_drop(self, a: int, _b: int, _view: View) -> None:
        if self.network:
            self.network.pop(a % len(self.network))

    def _do_duplicate(self, a: int, _b: int, _view: View) -> None:
        if self.network:
            self.network.append(self.network[a % len(self.network)])

    def _do_repeat(self, a: int, _b: int, view: View) -> None:
        """A message of any earlier time arrives once more, where it was meant to."""
        genuine = [message for message in self.archive if message.kind != "result"]
        if genuine:
            self._deliver(genuine[a % len(genuine)], view)

    def _do_exchange(self, a: int, _b: int, view: View) -> None:
        request = self._request(view, self._pick(a).name)
        if request is not None:
            self._deliver_all(request, view)

    def _do_die(self, a: int, b: int, _view: View) -> None:
        """It will die in its next answer, and come back with what is on its disk."""
        self._pick(a).dies = DEATHS[b % len(DEATHS)]

    def _do_restart(self, a: int, _b: int, _view: View) -> None:
        member = self._pick(a)
        if not member.gone:
            self._restore(member)

    def _do_restart_server(self, _a: int, _b: int, view: View) -> None:
        view.machine = self._replayed(view)

    # -- operations: progress ------------------------------------------------------------------------

    def _do_step(self, a: int, _b: int, view: View) -> None:
        """Everyone but one in eight choices of one member is asked and answers; the step closes."""
        absent = {self._pick(a >> 3).name} if a % 8 == 7 else set()
        self._play(view, absent)

    def _do_progress(self, a: int, b: int, view: View) -> None:
        """The members whose bit is set don't answer; the step closes."""
        bits = a & b
        self._play(view, {n for i, n in enumerate(self.federation.members) if bits >> (i % 8) & 1})

    def _play(self, view: View, absent: Collection[str]) -> None:
        for name in view.machine.participants:
            if name in absent or name in view.machine.replied:
                continue
            request = self._request(view, name)
            if request is not None:
                self._deliver_all(request, view)
        self._close(view)

    def _do_close(self, _a: int, _b: int, view: View) -> None:
        self._close(view)

    # -- operations: lies ----------------------------------------------------------------------------

    def _do_lose_state(self, a: int, _b: int, _view: View) -> None:
        """A member comes back with its keys but without its disk."""
        old = self._pick(a)
        if not old.gone:
            self._check_emitted(old)
            self.members[old.name] = self._fresh(old.name, old.incarnation + 1)
            self.members[old.name].accepted = old.accepted

    def _do_leave(self, a: int, _b: int, _view: View) -> None:
        self._pick(a).gone = True

    def _do_fork(self, _a: int, _b: int, view: View) -> None:
        if len(self.views) < 3:
            self.views.append(
                View(self._replayed(view), list(view.history), list(view.uploads), honest=view.honest)
            )

    def _do_forget(self, a: int, _b: int, view: View) -> None:
        """The server pretends never to have had a member's reply to the open step."""
        name = self._pick(a).name
        if view.machine.step is None or name not in view.machine.replied:
            return
        last = max(i for i, event in enumerate(view.history) if event is not None and event[0] == name)
        del view.history[last]
        if view.machine.step == "upload":
            view.uploads = [upload for upload in view.uploads if upload[0] != name]
        view.machine = self._replayed(view)

    def _do_result(self, a: int, _b: int, view: View) -> None:
        if view.machine.step is None and view.machine.abort is None:
            self._receive(self._result(view, self._pick(a).name))

    def _do_count_twice(self, a: int, _b: int, view: View) -> None:
        if view.uploads:
            view.uploads.append(view.uploads[a % len(view.uploads)])
            view.honest = False

    def _do_leave_out(self, a: int, _b: int, view: View) -> None:
        if view.uploads:
            view.uploads.pop(a % len(view.uploads))
            view.honest = False

    def _do_shift(self, a: int, b: int, view: View) -> None:
        view.shifts.append((a, 1 + b % 255))
        view.honest = False

    def _target(self, a: int, view: View) -> Message | None:
        """A message that the server holds: due to a member, just sent by it, a result, or an old one."""
        name = self._pick(a >> 2).name
        if a % 4 == 3:
            held = [*self.network, *self.archive[-16:]]
            return held[(a >> 2) % len(held)] if held else None
        if view.machine.step is None:
            return None if view.machine.abort else self._result(view, name)
        request = None if name in view.machine.replied else self._request(view, name)
        if request is None or a % 2 == 0:
            return request
        return next(iter(self._receive(request)), None)

    def _forge(self, a: int, view: View, edit: Callable[[Message], Message]) -> None:
        """An edited message arrives in place of the right one."""
        message = self._target(a, view)
        if message is None:
            return
        try:
            forged = edit(message)
        except msgspec.DecodeError:
            return
        self._note("forged", forged.kind, forged.member, forged.step, data=(forged.payload, *forged.frames))
        self._deliver(forged, view)

    def _do_flip(self, a: int, b: int, view: View) -> None:
        """One bit of a message, or of its frames, is turned."""

        def edit(message: Message) -> Message:
            parts = [message.payload, *message.frames]
            which = b % len(parts)
            part = bytearray(parts[which])
            if part:
                # Spread the few choices of b over the whole part, from its start and from its end.
                at = (b * 37) % (8 * len(part))
                part[at // 8] ^= 1 << (at % 8)
            parts[which] = bytes(part)
            return Message(message.kind, message.member, message.step, parts[0], tuple(parts[1:]))

        self._forge(a, view, edit)

    def _do_swap(self, a: int, b: int, view: View) -> None:
        """A field of a message is replaced by that of another message of its kind, from any round."""

        def edit(message: Message) -> Message:
            mine: list[Any] = msgspec.msgpack.decode(message.payload)
            seen = [*self.archive, *self.earlier]
            others = [m for m in seen if (m.kind, m.step) == (message.kind, message.step)]
            if not others:
                return message
            other: list[Any] = msgspec.msgpack.decode(others[b % len(others)].payload)
            if len(other) == len(mine):
                at = b % len(mine)
                mine[at] = other[at]
            payload = msgspec.msgpack.encode(mine)
            return Message(message.kind, message.member, message.step, payload, message.frames)

        self._forge(a, view, edit)

    def _do_redirect(self, a: int, b: int, view: View) -> None:
        """A message goes to another member, or is said to come from another."""
        name = self._pick(b).name
        self._forge(a, view, lambda m: Message(m.kind, name, m.step, m.payload, m.frames))

    def _do_replay(self, a: int, b: int, view: View) -> None:
        """A message of any earlier time arrives at, or as from, any member."""
        if self.archive:
            m = self.archive[a % len(self.archive)]
            self._deliver(Message(m.kind, self._pick(b).name, m.step, m.payload, m.frames), view)

    def _do_other_round(self, a: int, b: int, view: View) -> None:
        """A message of another round arrives where its like is waited for, if there is one."""
        machine = view.machine
        step = machine.step or "reveal"
        kinds = ("result",) if machine.step is None else ("request", "reply")
        alike = [m for m in self.earlier if m.step == step and m.kind in kinds]
        if alike:
            self._deliver(alike[(a + 256 * b) % len(alike)], view)

    def _do_false_bitmap(self, a: int, b: int, view: View) -> None:
        """A survivor set of the server's own making, from a view that is at confirm."""
        machine = view.machine
        if not isinstance(machine, MaskingAggregator) or machine.step != "confirm":
            return
        sharers, survivors = machine._sharing.copy(), machine._alive.copy()
        at = b % len(survivors)
        survivors[at] ^= True
        if b & 128:
            sharers[at] ^= True
        request = encode_message(ConfirmRequest(to_bitmap(sharers), to_bitmap(survivors)))
        self._deliver_all(Message("request", self._pick(a).name, "confirm", request), view)

    def _do_mixed_reveal(self, a: int, b: int, view: View) -> None:
        """A request to reveal with confirmations of whatever root the server could get."""
        machine = view.machine
        name = self._pick(a).name
        if not isinstance(machine, MaskingAggregator) or name not in machine._positions:
            return
        row = machine._table[machine._positions[name]]
        cohort = machine._known
        found: dict[str, bytes] = {}
        # Those that confirmed this view's survivors first; others fill up.
        here = {event for event in view.history if event is not None}
        for message in sorted(self._confirmations, key=lambda m: (m.member, m.payload) not in here):
            found.setdefault(message.member, message.payload)
        for rogue in self.rogues:
            found[rogue] = self._rogue_confirmation(rogue, machine)
        signers = np.array([cohort.id(position) in found for position in row.tolist()])
        if b % 8 == 7 and signers.any():
            signers[np.flatnonzero(signers)[-1]] = False
        ids = [cohort.id(position) for position in row[signers].tolist()]
        signatures = b"".join(msgspec.msgpack.decode(found[each])[1] for each in ids)
        request = encode_message(RevealRequest(to_bitmap(signers), signatures))
        self._deliver_all(Message("request", name, "reveal", request), view)

    # -- operations: rogues --------------------------------------------------------------------------

    def _rogue(self, number: int, view: View) -> tuple[str, MaskingAggregator, int] | None:
        """A rogue, the view's machine and the rogue's position, where the rogue is asked."""
        machine = view.machine
        if not self.rogues or not isinstance(machine, MaskingAggregator):
            return None
        name = self.rogues[number % len(self.rogues)]
        if name not in machine.participants or name not in machine._positions:
            return None
        return name, machine, machine._positions[name]

    def _sign(self, name: str, label: str, *fields: bytes) -> bytes:
        return self.federation.keys[name].identity.sign(label, *fields)

    def _rogue_says(self, view: View, name: str, value: object) -> None:
        step = view.machine.step
        assert step is not None
        message = Message("reply", name, step, encode_message(value))
        self.archive.append(message)
        self._accept(view, message)

    def _rogue_confirmation(self, name: str, machine: MaskingAggregator) -> bytes:
        signature = self._sign(name, "masking confirm", machine.h1, machine._root)
        return encode_message(Confirmation(signature))

    def _do_rogue_confirm(self, a: int, _b: int, view: View) -> None:
        """It confirms whatever it is asked to, in every view."""
        rogue = self._rogue(a, view)
        if rogue is not None and rogue[1].step == "confirm":
            name, machine, _ = rogue
            message = Message("reply", name, "confirm", self._rogue_confirmation(name, machine))
            self._confirmations.append(message)
            self._accept(view, message)

    def _do_rogue_reveal(self, a: int, b: int, view: View) -> None:
        """It reveals shares that nobody gave it."""
        rogue = self._rogue(a, view)
        if rogue is None or rogue[1].step != "reveal":
            return
        name, machine, position = rogue
        live = int(machine._sharing[machine._table[position]].sum())
        shares = bytes([b]) * (OPENED_BYTES * live)
        signed = self._sign(name, "masking reveal", machine.h1, name.encode(), machine._root, shares)
        self._rogue_says(view, name, Revealed(shares, signed))

    def _do_rogue_shares(self, a: int, b: int, view: View) -> None:
        """It deals boxes that nobody can open."""
        rogue = self._rogue(a, view)
        if rogue is None or rogue[1].step != "share":
            return
        name, machine, _ = rogue
        k = machine._known.k
        commitments, boxes = bytes([b]) * (COMMITMENTS_BYTES * k), bytes([b]) * (BOX_BYTES * k)
        signed = self._sign(name, "masking share", machine.h1, name.encode(), commitments, boxes)
        self._rogue_says(view, name, Shares(commitments, boxes, signed))

    def _do_rogue_complain(self, a: int, b: int, view: View) -> None:
        """It complains about a box that was good."""
        rogue = self._rogue(a, view)
        if rogue is None or rogue[1].step != "upload":
            return
        name, machine, position = rogue
        row = machine._table[position][machine._sharing[machine._table[position]]]
        accused = int(row[b % len(row)])
        other = machine._known.id(accused).encode()
        signed = self._sign(name, "masking complaint", machine.h1, name.encode(), other)
        self._rogue_says(view, name, BoxComplaint(accused, signed))

    def _do_rogue_name(self, a: int, b: int, view: View) -> None:
        """A reply is signed by a rogue instead of whoever sent it."""
        if not self.rogues:
            return
        signer = self.rogues[b % len(self.rogues)]

        def edit(message: Message) -> Message:
            if message.kind != "reply" or not self.masking:
                return message
            fields: list[Any] = msgspec.msgpack.decode(message.payload)
            name = (message.member if b & 1 else signer).encode()
            h0 = self.federation.terms.bound.h0
            if message.step == "advertise":
                keys = fields[1][:96]
                fields[1] = keys + self._sign(signer, "masking advertise", h0, name, keys)
            else:
                label = {"upload": "masking upload", "share": "masking share"}.get(
                    message.step, "masking reveal"
                )
                h1 = self.members[message.member].h1 or h0
                fields[-1] = self._sign(signer, label, h1, name, *filter(_is_bytes, fields[1:-1]))
            payload = msgspec.msgpack.encode(fields)
            return Message(message.kind, message.member, message.step, payload, message.frames)

        self._forge(4 * a + 1, view, edit)

    # -- what must hold ------------------------------------------------------------------------------

    def _honest(self, member: SimulatedMember) -> bool:
        return member.name not in self.rogues

    def _check_answer(self, member: SimulatedMember, request: Message, reply: Message) -> None:
        """One request is answered in a step, with the same bytes however often."""
        step = request.step
        asked = member.requests.setdefault(step, request.payload)
        if asked != request.payload:
            raise BrokenInvariant(f"{member.name} answered two different requests in {step}")
        if self.masking and member.outbox[step] != reply:
            raise BrokenInvariant(f"{member.name} gave two different replies in {step}")
        if self.masking and step == "reveal":
            for dealer, (seed, root) in member.shares.items():
                if (seed in reply.payload) == (root in reply.payload):
                    raise BrokenInvariant(f"{member.name} revealed both or no shares of position {dealer}")
        if self.masking and member.machine.waiting_for is None:
            self._check_forgotten(member)

    def _check_sum(self, member: SimulatedMember, accepted: Accepted) -> None:
        """The sum is that of at least n_min members, each once; and the whole cohort has the same."""
        header = self.federation.header
        survivors = accepted.survivors
        if len(set(survivors)) != len(survivors) or not header.n_min <= len(survivors) <= header.n_max:
            raise BrokenInvariant(f"{member.name} accepted a sum over {survivors}")
        if not (accepted.total == plain_sum(self.inputs, survivors)).all():
            raise BrokenInvariant(f"{member.name} accepted a sum that isn't the survivors'")
        if not self.masking:
            # Without a step to confirm, an HE server can show other lists to other members: the trust line
            # says so, and members notice when they compare the digest of the next state.
            return
        for other in self.accepted().values():
            if other.h1 == accepted.h1 and other.survivors != survivors:
                raise BrokenInvariant(f"{member.name} accepted {survivors}, others {other.survivors}")
            # Two cohorts of one header are two rounds in all but the number. Nobody honest is in both, but
            # who comes back without its disk, and so without its counter, could be.
            twice = {m.name for m in self.members.values() if self._honest(m) and not m.incarnation}
            if other.h1 != accepted.h1 and twice & set(other.survivors) & set(survivors):
                raise BrokenInvariant(f"{member.name} accepted {survivors}, another round {other.survivors}")

    def _check_served(self, view: View) -> None:
        """Of a round that finished honestly everyone has the sum who took part to its end."""
        closes = [i for i, event in enumerate(view.history) if event is None]
        last = view.history[closes[-2] + 1 if len(closes) > 1 else 0 :]
        for name, _ in filter(None, last):
            member = self.members[name]
            if member.gone or member.accepted is not None or not self._honest(member):
                continue
            if member.incarnation > 0 or bool(getattr(member.machine, "_violation", "")):
                continue  # it lost its state, or was lied to before or after
            raise BrokenInvariant(f"{name} took part to the end of an honest round and has no sum")

    def _learn_shares(self, member: SimulatedMember) -> None:
        """Notes the secrets that a masking member holds while it uploads."""
        machine = member.machine
        if not isinstance(machine, MaskingMember) or machine._protector is None:
            return
        cohort = machine._known
        live = np.unpackbits(np.frombuffer(machine._live, np.uint8), bitorder="little")[: cohort.k]
        dealers = cohort.graph.neighbours(machine._position)[live.astype(bool)].tolist()
        for dealer, content in zip(dealers, records(machine._received, CONTENT_BYTES), strict=True):
            seed, root = content[:OPENED_BYTES], content[OPENED_BYTES:]
            member.shares[dealer] = seed[:SHARE_BYTES], root[:SHARE_BYTES]
        member.secrets |= set(machine._protector._masks._keys)
        member.secrets |= set(records(machine._box_keys, 32))

    def _check_forgotten(self, member: SimulatedMember, everything: bool = False) -> None:
        """No secret of the round can be reached from a machine that has ended; the shares it gave out may."""
        held = held_bytes(member.machine) + member.machine.snapshot()
        if any(secret in held for secret in member.secrets):
            raise BrokenInvariant(f"{member.name} still holds a secret of the round")
        given = b"".join(member.emitted)
        reveal = member.outbox.get("reveal")
        given += reveal.payload if reveal is not None else b""
        for seed, root in member.shares.values():
            for share in (seed, root):
                if share in held and (everything or share not in given):
                    raise BrokenInvariant(f"{member.name} still holds a share that it didn't give")
        he_secret = self.federation.keys[member.name].he_secret
        if everything and he_secret and he_secret in held:
            raise BrokenInvariant(f"{member.name} still holds the HE key")

    def _check_emitted(self, member: SimulatedMember) -> None:
        """Of every neighbour at most one kind of share ever left, and no secret."""
        everything = b"".join(member.emitted)
        for dealer, (seed, root) in member.shares.items():
            if seed in everything and root in everything:
                raise BrokenInvariant(f"{member.name} revealed both shares of position {dealer}")
        if any(secret in everything for secret in member.secrets):
            raise BrokenInvariant(f"{member.name} sent a secret of its own")

    def _check_thresholds(self) -> None:
        """With all that rogues hold, the server never has t shares of both secrets of an honest member."""
        if not self.masking:
            return
        revealed: dict[tuple[bytes, int], list[int]] = {}
        limits: dict[bytes, tuple[int, int]] = {}
        names: dict[bytes, Callable[[int], str]] = {}
        for member in self.members.values():
            machine = member.machine
            if not self._honest(member) or not isinstance(machine, MaskingMember) or not member.shares:
                continue
            cohort = machine._known
            rogues = sum(cohort.id(position) in self.rogues for position in range(cohort.n))
            limits[cohort.h1] = cohort.t, rogues
            names[cohort.h1] = cohort.id
            everything = b"".join(member.emitted)
            for dealer, kinds in member.shares.items():
                counts = revealed.setdefault((cohort.h1, dealer), [0, 0])
                for kind, share in enumerate(kinds):
                    counts[kind] += share in everything
        for (h1, dealer), (seeds, roots) in revealed.items():
            t, rogues = limits[h1]
            if min(seeds, roots) + rogues >= t and names[h1](dealer) not in self.rogues:
                raise BrokenInvariant(f"the server can rebuild both secrets of {names[h1](dealer)}")


def simulated_inputs(federation: Federation) -> Inputs:
    """Distinct powers of two, in the fields that the tags of the sum check leave."""
    header = federation.header
    return powers_of_two(federation.with_header(fields=header.fields - 2 * tag_limbs(header.bits)))


def recorded(federation: Federation, seed: str = "recorded") -> tuple[Message, ...]:
    """Every message of an honest round, results too: for replays from another round."""
    simulation = Simulation(federation, seed=seed)
    simulation.settle()
    return tuple(simulation.archive)


_OPAQUE = (RoundTerms, MemberKeys, ModuleType, FunctionType, MethodType, BuiltinFunctionType, type)


def held_bytes(machine: object) -> bytes:
    """All bytes that can be reached from a machine, its terms and long-term keys aside."""
    seen: set[int] = set()
    waiting, found = [machine], []
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, _OPAQUE):
            continue
        seen.add(id(value))
        if isinstance(value, (bytes, bytearray, memoryview)):
            found.append(bytes(value))
        elif isinstance(value, np.ndarray):
            found.append(value.tobytes())
        waiting += gc.get_referents(value)
        waiting += list(getattr(value, "__dict__", {}).values())
    return b"|".join(found)


def _is_bytes(value: object) -> bool:
    return isinstance(value, bytes)


def _error_name(error: BlindsumError) -> str:
    detail = getattr(error, "check", "") or str(getattr(error, "reason", ""))
    return f"{type(error).__name__} {detail}".strip()
