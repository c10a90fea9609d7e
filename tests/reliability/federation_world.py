"""A federation in one process on a clock that stands still: the real server, engine and store, real masking.

The server is the real `AggregatorServer` with its services, strict decoding, SQLite and files. Only its
surroundings are the world's: calls reach its handlers without sockets, its threads are this one, its clock
moves when told to, and every change of its files goes through `RecordedFiles`, so that it can die at any of
them, or the machine's power can go. Members are the real masking machines, with a disk (`Notes`) on which
every reply lies before it is sent. Inputs are distinct powers of two: a sum shows who was counted, and how
often.

What must hold is checked whenever something was acknowledged, accepted, or started again; `Broken` says
what didn't.
"""

import asyncio
import atexit
import contextlib
import hashlib
import itertools
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import msgspec
import numpy as np
from blindsum.aggregator import server as server_module
from blindsum.aggregator.folding import contribution_name, result_name, sum_name
from blindsum.aggregator.server import AggregatorServer
from blindsum.aggregator.store.records import (
    CheckpointRecord,
    ConclusionRecord,
    ContributionRecord,
    DocumentRecord,
    ReplyRecord,
    RevocationRecord,
    RoundRecord,
    SumRecord,
)
from blindsum.aggregator.store.sqlite_state import SqliteState
from blindsum.aggregator.store.state import Change, broken_link
from blindsum.aggregator.structured_logs import configure_logs
from blindsum.aggregator.transport_authority import member_uri
from blindsum.crypto.errors import BlindsumError
from blindsum.crypto.schemes.base import Complaint, MemberKeys, RoundTerms, frame_digest, upload_digest
from blindsum.crypto.schemes.masking import scheme as masking_scheme
from blindsum.crypto.trust.acceptance import sign_state
from blindsum.crypto.trust.group_key import GroupKey
from blindsum.crypto.trust.header import BoundHeader
from blindsum.crypto.trust.plan import Deadlines
from blindsum.crypto.trust.roster import Roster
from blindsum.proto.v1 import round_pb2
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from federation_driver import seeded
from recorded_files import Hook, RecordedFiles
from scripted_federation import Applicant, ScriptedOwner, settings_for

MEMBERS = 5
CHUNK = 64
"""Bytes of a chunk here: a small upload is a stream of several."""
SECONDS = Deadlines(gather=1, advertise=20, share=20, upload=40, confirm=20, reveal=20, conclude=20)
MASKING = masking_scheme("masking")
ROUND, ENROLMENT = "blindsum.proto.v1.RoundService", "blindsum.proto.v1.EnrolmentService"
PUBLISHED, CONCLUDED, ABORTED = (
    round_pb2.ROUND_STATE_PUBLISHED,
    round_pb2.ROUND_STATE_CONCLUDED,
    round_pb2.ROUND_STATE_ABORTED,
)


class Broken(AssertionError):
    """Something happened that no fault may cause."""


class Lost(Exception):
    """A call brought no answer: the member doesn't know whether it arrived."""


class CallRefused(grpc.aio.AbortError):
    """The server ended a call with a status."""

    def __init__(self, code: grpc.StatusCode, reason: str, details: str) -> None:
        super().__init__(f"{code.name} {reason}: {details}")
        self.code = code
        self.reason = reason


class StillClock:
    """Time moves only through `advance`."""

    def __init__(self) -> None:
        self.ms = time.time_ns() // 1_000_000
        self._timers: list[list[Any]] = []
        self._count = itertools.count()

    def now_ms(self) -> int:
        return self.ms

    def call_at(self, when_ms: int, callback: Callable[[], None]) -> Any:
        entry = [when_ms, next(self._count), callback, asyncio.get_running_loop()]
        self._timers.append(entry)
        clock = self

        class Timer:
            def cancel(self) -> None:
                if entry in clock._timers:
                    clock._timers.remove(entry)

        if when_ms <= self.ms:
            self._fire()
        return Timer()

    def next_ms(self) -> int | None:
        """When the next timer is due."""
        return min((entry[0] for entry in self._timers), default=None)

    def advance_to(self, when_ms: int) -> None:
        self.ms = max(self.ms, when_ms)
        self._fire()

    def _fire(self) -> None:
        due = sorted(entry for entry in self._timers if entry[0] <= self.ms)
        self._timers = [entry for entry in self._timers if entry[0] > self.ms]
        for _, _, callback, loop in due:
            loop.call_soon(callback)

    def forget(self) -> None:
        """The process that waited is gone."""
        self._timers.clear()


class SameThread(Executor):
    """Work is done at once, in this thread: one order of events for one list of operations."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> "Future[Any]":
        done: Future[Any] = Future()
        try:
            done.set_result(work(*arguments, **named))
        except BaseException as error:
            done.set_exception(error)
        return done


class SameThreadState(SqliteState):
    """The real store, whose group commits run in the event loop's thread."""

    def _start_writer(self) -> None:
        pass

    def commit(self, *changes: Change) -> "asyncio.Future[None]":
        done = super().commit(*changes)
        asyncio.get_running_loop().call_soon(self._pump)
        return done

    def _pump(self) -> None:
        group = []
        while not self._jobs.empty():
            job = self._jobs.get()
            if job is not None:
                group.append(job)
        if group:
            self._commit_group(group)

    def close(self) -> None:
        self._writer.close()
        self._reader.close()


class _Details:
    def __init__(self, method: str) -> None:
        self.method = method
        self.invocation_metadata = ()


class _Context:
    """What a handler sees of a call."""

    def __init__(self, uri: str, pem: bytes) -> None:
        self._auth = {"x509_subject_alternative_name": [uri.encode()], "x509_pem_cert": [pem]}

    def auth_context(self) -> dict[str, list[bytes]]:
        return self._auth if self._auth["x509_pem_cert"] != [b""] else {}

    def peer(self) -> str:
        return "loopback"

    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        raise CallRefused(code, dict(trailing_metadata or ()).get("blindsum-reason", ""), details)


class LoopbackServer(AggregatorServer):
    """The server without sockets: its handlers are called directly."""

    handlers: dict[str, Any]

    async def _serve(self, handlers: Any, *_: Any, **__: Any) -> int:
        known = {handler.service_name(): handler for handler in handlers}
        self.handlers = {**getattr(self, "handlers", {}), **known}
        return 1

    def rpc(self, service: str, method: str) -> Any:
        return self.handlers[service].service(_Details(f"/{service}/{method}"))


class _OwnerStub:
    """The owner's calls, which are never lost here."""

    def __init__(self, world: "World") -> None:
        self._world = world

    def __getattr__(self, method: str) -> Any:
        def call(request: Any, timeout: float = 0) -> Any:
            context = _Context("", b"")

            async def run() -> Any:
                rpc = self._world.server.rpc(ENROLMENT, method)
                if rpc.request_streaming:

                    async def parts() -> AsyncIterator[bytes]:
                        for part in request:
                            yield part.SerializeToString()

                    return await rpc.stream_unary(parts(), context)
                return await rpc.unary_unary(request.SerializeToString(), context)

            return self._world.run(run())

        return call


class WorldOwner(ScriptedOwner):
    """The owner; `connect` to a world."""

    world: "World"

    def connect(self, enrolment_port: int, ca_pem: bytes) -> None:
        self.stub = _OwnerStub(self.world)  # type: ignore[assignment]


@dataclass
class Notes:
    """A member's disk: of the round that it is in."""

    number: int = 0
    header: bytes = b""
    snapshot: bytes = b""
    replies: dict[str, bytes] = field(default_factory=dict)
    bulk: bytes = b""
    digest: bytes = b""
    state: bytes = b""
    """What it computed from the sum."""
    sealed: bytes = b""


class WorldMember:
    """A member's process and its disk."""

    def __init__(self, world: "World", applicant: Applicant, certificate: bytes, index: int) -> None:
        self.world = world
        self.name = applicant.name
        self.applicant = applicant
        self.index = index
        pem = x509.load_pem_x509_certificate(certificate)
        self._pem = pem.public_bytes(Encoding.PEM)
        self.notes = Notes()
        self.machine: Any = None
        self.latest: round_pb2.WatchResponse | None = None
        self.watching = False
        self.faults: list[str] = []
        """What happens to its next calls."""

    # Connection

    def context(self) -> _Context:
        return _Context(member_uri(self.world.owner.federation, self.name), self._pem)

    def watch(self) -> None:
        """Open the watch stream, if the server is there and it isn't open."""
        if not self.watching and self.world.alive:
            self.watching = True
            self.world.spawn(self._read())

    async def _read(self) -> None:
        server = self.world.server
        rpc = server.rpc(ROUND, "Watch")
        raw = round_pb2.WatchRequest(ready=True).SerializeToString()
        try:
            async for notice in rpc.unary_stream(raw, self.context()):
                if self.world.server is server and self.world.alive:
                    self.latest = notice
        except CallRefused:
            pass
        finally:
            if self.world.server is server:
                self.watching = False

    async def call(self, method: str, request: Any) -> Any:
        """One unary call through whatever the network does to it."""
        return await self._through(method, request, lambda: self.world.unary(self, method, request))

    async def _through(self, method: str, request: Any, go: Callable[[], Any]) -> Any:
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "drop request" or not self.world.alive:
            raise Lost
        if fault == "delay":
            self.world.delayed.append((self, method, request))
            raise Lost
        if fault == "duplicate":
            both = await asyncio.gather(go(), go(), return_exceptions=True)
            answer = both[-1]
            if isinstance(answer, BaseException):
                raise answer
        else:
            answer = await go()
        if fault == "drop response" or not self.world.alive:
            raise Lost
        return answer

    # Life

    def restart(self) -> None:
        """The process dies and comes back with its disk."""
        self.faults.clear()
        if self.notes.snapshot:
            terms, keys = self._terms(BoundHeader.parse(self.notes.header))
            self.machine = MASKING.restore_member(
                terms, keys, self.notes.snapshot, seeded(f"{self.world.seed} {self.name} restored")
            )

    def _terms(self, bound: BoundHeader) -> tuple[RoundTerms, MemberKeys]:
        roster, group_key = self.world.rosters[bound.header.roster]
        return RoundTerms(bound, roster), MemberKeys(self.name, self.applicant.identity, group_key)

    def _keep(self, step: str = "", reply: bytes = b"") -> None:
        self.notes.snapshot = self.machine.snapshot()
        if step:
            self.notes.replies[step] = reply

    async def act(self) -> None:
        """Do what the newest notice asks for."""
        with contextlib.suppress(Lost):
            try:
                await self._act()
            except CallRefused as refused:
                if refused.code is grpc.StatusCode.INTERNAL:
                    raise Broken(f"the server failed on a call of {self.name}: {refused}") from None
                self.world.refusals.append(str(refused))

    async def _act(self) -> None:
        notice = self.latest
        if notice is None or not notice.HasField("round"):
            return
        said = notice.round
        if said.state == round_pb2.ROUND_STATE_OPEN and said.asked:
            if said.number > self.notes.number:
                if said.taking_part:
                    raise Broken(f"{self.name} is said to take part in round {said.number}")
                self._enter(said)
            if said.number == self.notes.number and said.step in MASKING.steps:
                self.world.check_header(said.number, said.header)
                if said.header != self.notes.header:
                    raise Broken(f"round {said.number} has two headers")
                await self._answer(said.number, said.step)
        elif said.state in (PUBLISHED, CONCLUDED) and said.number == self.notes.number:
            await self._conclude(said)

    def _enter(self, said: Any) -> None:
        bound = BoundHeader.parse(said.header)
        terms, keys = self._terms(bound)
        random = seeded(f"{self.world.seed} {self.name} {bound.h0.hex()}")
        self.machine = MASKING.member(terms, keys, random)
        self.notes = Notes(said.number, said.header)
        self._keep()

    async def _answer(self, number: int, step: str) -> None:
        if step == "upload":
            await self._upload(number)
            return
        reply = self.notes.replies.get(step)
        if reply is None:
            asked = await self.call("GetStep", round_pb2.GetStepRequest(round=number, step=step))
            try:
                reply = self.machine.answer(step, asked.request)
            except BlindsumError as error:
                raise Broken(f"{self.name} was asked in {step} what it must refuse: {error}") from None
            self._keep(step, reply)
        await self.call("Answer", round_pb2.AnswerRequest(round=number, step=step, reply=reply))

    async def _upload(self, number: int) -> None:
        notes = self.notes
        if "upload" not in notes.replies:
            if notes.bulk:
                raise Broken("an upload without its reply")
            asked = await self.call("GetStep", round_pb2.GetStepRequest(round=number, step="upload"))
            begun = self.machine.begin_upload(asked.request)
            if isinstance(begun, Complaint):
                raise Broken(f"{self.name} complains about an honest member")
            layout = begun.layout
            values = np.full(layout.fields, 1 << self.index, np.uint32)
            frames = [begun.protect(i, values[slice(*layout.field_range(i))]) for i in range(layout.frames)]
            notes.digest = upload_digest(begun.h1, map(frame_digest, frames))
            notes.bulk = b"".join(frames)
            self._keep("upload", self.machine.seal_upload(notes.digest))
        begin = round_pb2.BeginUploadRequest(
            round=number,
            kind=round_pb2.BULK_KIND_CONTRIBUTION,
            total=len(notes.bulk),
            digest=notes.digest,
            reply=notes.replies["upload"],
        )
        await self._send(begin, notes.bulk)

    async def _send(self, begin: Any, bulk: bytes) -> None:
        begun = await self.call("BeginUpload", begin)
        if begun.WhichOneof("answer") != "slot":
            return
        fault = self.faults.pop(0) if self.faults else ""
        if fault in ("drop request", "delay") or not self.world.alive:
            raise Lost
        end = len(bulk) // 2 if fault in ("cut", "duplicate") else len(bulk)
        self.world.sent_bytes += max(0, end - begun.slot.offset)
        answer = await self.world.stream(self, begin, begun.slot, bulk[:end])
        if fault == "drop response" or not self.world.alive or answer is None:
            raise Lost

    async def _conclude(self, said: Any) -> None:
        notes, number = self.notes, said.number
        if not notes.state:
            found = await self.call("GetResult", round_pb2.GetResultRequest(round=number))
            opener = self.machine.open_sum(found.result)
            data = await self.world.download(self, number)
            if data is None or len(data) != found.total:
                raise Lost
            total, offset = [], 0
            for index in range(opener.layout.frames):
                size = opener.layout.result_bytes(index)
                total.append(opener.open(index, data[offset : offset + size]))
                offset += size
            self.world.check_sum(self, number, opener.survivors, np.concatenate(total))
            notes.state = self.next_state(opener.h1, data)
            signature = sign_state(
                self.applicant.identity,
                federation=self.world.owner.federation,
                h1=opener.h1,
                index=BoundHeader.parse(notes.header).header.state_round + 1,
                digest=notes.state,
                survivors=opener.survivors,
            )
            self._keep("conclude", signature)
        conclusion = round_pb2.ConcludeRequest(
            round=number, state=notes.state, signature=notes.replies["conclude"]
        )
        await self.call("Conclude", conclusion)
        if self.latest is not None and self.latest.round.checkpoint_wanted:
            await self._keep_checkpoint(number)

    def next_state(self, h1: bytes, data: bytes) -> bytes:
        """The digest of the state that follows from a sum."""
        return hashlib.sha256(b"state" + h1 + data).digest()

    async def _keep_checkpoint(self, number: int) -> None:
        notes = self.notes
        notes.sealed = notes.sealed or os.urandom(150) + notes.state
        begin = round_pb2.BeginUploadRequest(
            round=number,
            kind=round_pb2.BULK_KIND_CHECKPOINT,
            total=len(notes.sealed),
            digest=hashlib.sha256(notes.sealed).digest(),
            reply=notes.state,
        )
        await self._send(begin, notes.sealed)


class World:
    """One federation and everything around it: `ready` is a template's copy, else an empty disk. `close` it.

    `home` is the machine's disk, if there is one already.
    """

    def __init__(
        self,
        folder: Path,
        seed: str = "world",
        *,
        ready: "Template | None" = None,
        home: Path | None = None,
        start: bool = True,
        **settings: Any,
    ) -> None:
        self.folder = folder
        self.seed = seed
        self.clock = StillClock()
        self.settings = {"fold_batch": 2, "presence_grace": 3.0, "retry_pause": 1.0, **settings}
        self.acknowledged: dict[tuple[int, str, str], bytes] = {}
        self.accepted: dict[int, tuple[tuple[str, ...], int]] = {}
        self.headers: dict[int, bytes] = {}
        self.ended: dict[int, str] = {}
        self.results: dict[int, bytes] = {}
        self.documents: set[bytes] = set()
        self.authority: set[bytes] = set()
        self.damaged: set[int] = set()
        """Rounds whose stored bytes were changed: they may abort, and lose what they had."""
        self.revoked: set[str] = set()
        self.rosters: dict[bytes, tuple[Roster, GroupKey]] = {}
        self.delayed: list[tuple[WorldMember, str, Any]] = []
        self.history: list[tuple[WorldMember, str, Any]] = []
        self.refusals: list[str] = []
        self.sent_bytes = 0
        self.dead = False
        self.dies_in = -1
        self.full = False
        self.fails: Hook | None = None
        """Another fault of the disk: called before each change, may raise `OSError`."""
        self._cuts = itertools.count(1)
        self._versions = itertools.count(2)
        self._to_publish: list[Callable[[], None]] = []
        self._recording = contextlib.ExitStack()
        self.loop = asyncio.new_event_loop()
        self.server: LoopbackServer = None  # type: ignore[assignment]
        configure_logs("CRITICAL", json=False)
        self.members: list[WorldMember] = []
        self.owner = WorldOwner.__new__(WorldOwner)
        self.owner.world = self
        home = home or folder / "machine-0"
        if ready is None:
            home.mkdir(mode=0o700)
            self.owner.__init__(0, b"")  # type: ignore[misc]
        else:
            if not home.exists():
                shutil.copytree(ready.home, home)
            self.clock.ms = ready.now_ms
            self.owner.__dict__.update(ready.owner.__dict__, world=self)
            self.owner.connect(0, b"")
            self._know_members(ready.members)
        self.owner.now = lambda: self.clock.ms / 1000
        self._record(home)
        if start:
            self.start()

    def _know_members(self, members: list[tuple[Applicant, bytes]]) -> None:
        assert self.owner.roster is not None
        self.rosters[self.owner.roster_digest] = (self.owner.roster, self.owner.group_key)
        self.members = [
            WorldMember(self, applicant, certificate, index)
            for index, (applicant, certificate) in enumerate(members)
        ]

    def found(self, count: int = MEMBERS) -> "Template":
        """Found a federation that is ready to train."""
        owner = self.owner
        owner.found()
        owner.publish_policy(owner.policy())
        self._counts_on("document", owner.policy_digest)
        applicants = [Applicant(f"clinic-{index}") for index in range(count)]
        requests = [owner.join(applicant) for applicant in applicants]
        owner.publish_roster([applicant.name for applicant in applicants])
        self._counts_on("document", owner.roster_digest)
        members = [
            (applicant, owner.poll(request).certificate)
            for applicant, request in zip(applicants, requests, strict=True)
        ]
        self._counts_on("authority", self.server.ca_pem)
        owner.publish_plan(
            owner.make_plan(
                rounds=1000, dimension=20, cohort_min=3, cohort_wanted=count, cohort_max=8, deadlines=SECONDS
            )
        )
        self._counts_on("document", owner.plan_digest)
        self._know_members(members)
        return Template(self.home, owner, members, self.clock.ms)

    # The machine

    def _record(self, home: Path) -> None:
        self.home = home
        self._recording.close()
        self.files = RecordedFiles(home)
        self.files.hook = self._change_of_files
        self._recording.enter_context(self.files.recording())

    def _change_of_files(self, kind: str, path: Path) -> None:
        if self.dies_in == 0:
            self.dead = True
        self.dies_in -= 1
        if self.dead:
            raise OSError(5, "the process is dead")
        if self.full and kind in ("write", "create", "mkdir"):
            raise OSError(28, "No space left on device")
        if self.fails is not None:
            self.fails(kind, path)

    @property
    def alive(self) -> bool:
        """Whether there is a server that answers."""
        return self.server is not None and not self.dead

    def start(self) -> None:
        """Start the server on what is on its disk."""
        assert not self.alive
        self.dead = False
        settings = settings_for(self.home / "data", log_level="ERROR", **self.settings)
        self.server = LoopbackServer(settings, clock=self.clock)
        with (
            mock.patch.object(server_module, "StartedThreadPool", SameThread),
            mock.patch.object(server_module, "SqliteState", SameThreadState),
        ):
            try:
                self.run(self.server.start())
            except (BlindsumError, OSError):
                if not (self.dead or self.full):
                    raise
                self.dead = True
        if self.dead:
            # It died while it started, or refused to.
            self.kill()
            return
        self.check_store()
        for member in self.members:
            if member.name not in self.revoked:
                member.watch()
        self.idle()

    def kill(self) -> None:
        """SIGKILL: nothing more happens in the server, and nothing more is written."""
        self.dies_in = -1
        if self.server is None:
            return
        server, self.dead = self.server, True
        for _ in range(3):
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.idle()
        self.clock.forget()
        ingest = getattr(server, "_ingest", None)
        for slot in list(ingest._slots.values()) if ingest is not None else []:
            if slot.spool is not None:
                slot.spool.close()
        with contextlib.suppress(sqlite3.Error, OSError):
            server._opened.close()
        self.server = None  # type: ignore[assignment]
        self.loop.close()
        self.loop = asyncio.new_event_loop()
        for member in self.members:
            member.watching = False
            member.latest = None

    def restart(self) -> None:
        """Start the server if it is dead."""
        if not self.alive:
            self.kill()
            self.full = False
            self.start()

    def power_cut(self, keep: float, seed: int) -> None:
        """The machine's power goes; it comes up again with what its disk holds."""
        self.kill()
        home = self.folder / f"machine-{next(self._cuts)}"
        self.files.power_cut(home, keep=keep, seed=seed)
        shutil.rmtree(self.home)
        self._record(home)

    def close(self) -> None:
        """End everything."""
        self.kill()
        self._recording.close()
        self.loop.close()

    # Running

    def spawn(self, work: Any) -> "asyncio.Task[Any]":
        return self.loop.create_task(work)

    def idle(self) -> None:
        """Go on until nothing more happens without time, calls or news."""
        for _ in range(20_000):
            self.loop.call_soon(self.loop.stop)
            self.loop.run_forever()
            if not self.loop._ready:  # type: ignore[attr-defined]
                return
        raise Broken("the server never rests")

    def run(self, work: Any) -> Any:
        """Run to its end, and until everything rests."""
        task = self.spawn(work)
        self.idle()
        if not task.done():
            if self.dead:
                task.cancel()
                self.idle()
                return None
            raise Broken(f"a call hangs: {work}")
        return task.result()

    def act(self, member: WorldMember) -> None:
        """A member does what it is asked for; if the server dies meanwhile, it is gone afterwards."""
        member.watch()
        self.idle()
        with contextlib.suppress(asyncio.CancelledError):
            self.run(member.act())
        self._bury()

    def _bury(self) -> None:
        if self.dead and self.server is not None:
            self.kill()
        elif self.alive:
            self.check_engine()

    def everyone_acts(self) -> None:
        """Each member does what it is asked for."""
        for member in self.members:
            if member.name not in self.revoked:
                self.act(member)

    def until(self, done: Callable[[], bool]) -> None:
        """Members act until something is so, without any time going by."""
        for _ in range(20):
            if done():
                return
            self.everyone_acts()
        raise Broken("nothing moves")

    def run_of_rounds(self) -> Any:
        """The engine's newest round."""
        found = self.server.engines[self.owner.federation].run
        assert found is not None
        return found

    def advance(self, milliseconds: int) -> None:
        """Let time go by."""
        self.clock.advance_to(self.clock.ms + milliseconds)
        self.idle()
        self._bury()

    # Calls

    async def unary(self, member: WorldMember, method: str, request: Any) -> Any:
        """A call as it arrives at the server."""
        if not self.alive:
            raise Lost
        server = self.server
        self.history.append((member, method, request))
        rpc = server.rpc(ROUND, method)
        answer = await rpc.unary_unary(request.SerializeToString(), member.context())
        if self.server is not server or self.dead:
            raise Lost
        if method == "Answer":
            self._took((request.round, request.step, member.name), request.reply)
        elif method == "BeginUpload" and answer.done:
            self._took_upload(member, request)
        elif method == "Conclude":
            self._took((request.round, "conclude", member.name), request.state)
        return answer

    async def stream(self, member: WorldMember, begin: Any, slot: Any, bulk: bytes) -> Any:
        """A stream of chunks; None if it ended before its end."""
        server = self.server

        async def chunks() -> AsyncIterator[bytes]:
            for offset in range(slot.offset, len(bulk), CHUNK):
                yield round_pb2.UploadRequest(
                    upload_id=slot.upload_id, offset=offset, data=bulk[offset : offset + CHUNK]
                ).SerializeToString()
                await asyncio.sleep(0)

        rpc = server.rpc(ROUND, "Upload")
        answer = await rpc.stream_unary(chunks(), member.context())
        if self.server is not server or self.dead:
            raise Lost
        if answer.committed == begin.total:
            self._took_upload(member, begin)
        return answer

    async def download(self, member: WorldMember, number: int) -> bytes | None:
        rpc = self.server.rpc(ROUND, "Download")
        request = round_pb2.DownloadRequest(kind=round_pb2.BULK_KIND_SUM, round=number)
        data = b""
        async for part in rpc.unary_stream(request.SerializeToString(), member.context()):
            data += part.data
        if not self.alive:
            return None
        digest = hashlib.sha256(data).digest()
        if number not in self.results:
            self.results[number] = digest
            self._counts_on("result", (number, digest))
        if self.results[number] != digest:
            raise Broken(f"the sum of round {number} was published in two versions")
        return data

    def deliver(self, which: int) -> None:
        """A delayed call arrives after all."""
        if self.delayed and self.alive:
            member, method, request = self.delayed.pop(which % len(self.delayed))
            self._late(member, method, request)

    def replay(self, which: int, sender: WorldMember) -> None:
        """A call of any earlier time arrives once more, perhaps as another member's."""
        if self.history and self.alive:
            _, method, request = self.history[which % len(self.history)]
            self._late(sender, method, request)

    def _late(self, member: WorldMember, method: str, request: Any) -> None:
        async def arrive() -> None:
            with contextlib.suppress(Lost, CallRefused):
                await self.unary(member, method, request)

        self.run(arrive())
        self._bury()

    # What must hold

    def _took(self, place: tuple[int, str, str], what: bytes) -> None:
        before = self.acknowledged.setdefault(place, what)
        if before != what:
            raise Broken(f"two versions of {place} were acknowledged")
        self._counts_on("reply", (place, what))

    def _counts_on(self, kind: str, what: Any) -> None:
        """The outside world knows of something from now on."""
        self.files.acknowledged((kind, what))

    def recount(self, known: list[tuple[str, Any]]) -> None:
        """Count on just this: what was known at an earlier time."""
        self.acknowledged = dict(what for kind, what in known if kind == "reply")
        self.headers = dict(what for kind, what in known if kind == "header")
        self.ended = dict(what for kind, what in known if kind == "ended")
        self.results = dict(what for kind, what in known if kind == "result")
        self.documents = {what for kind, what in known if kind == "document"}
        self.authority = {what for kind, what in known if kind == "authority"}

    def _took_upload(self, member: WorldMember, begin: Any) -> None:
        if begin.kind == round_pb2.BULK_KIND_CONTRIBUTION:
            self._took((begin.round, "upload", member.name), begin.digest)
        else:
            # Any survivor's sealed copy of the state will do.
            self._took((begin.round, "checkpoint", begin.reply.hex()), begin.reply)

    def check_header(self, number: int, header: bytes) -> None:
        """A round's header never changes."""
        if number not in self.headers:
            self.headers[number] = header
            self._counts_on("header", (number, header))
        if self.headers[number] != header:
            raise Broken(f"round {number} has two headers")

    def check_sum(self, member: WorldMember, number: int, survivors: tuple[str, ...], total: Any) -> None:
        """The sum is that of the survivors, each once; all members have the same; nobody is missing."""
        expected = sum(1 << one.index for one in self.members if one.name in survivors)
        values = set(np.unique(total).tolist())
        if values != {expected}:
            raise Broken(f"round {number}: {values} isn't the sum of {survivors}")
        first = self.accepted.setdefault(number, (survivors, expected))
        if first != (survivors, expected):
            raise Broken(f"round {number} has two survivor sets: {first[0]}, {survivors}")
        uploaded = {name for (n, step, name) in self.acknowledged if (n, step) == (number, "upload")}
        lost = uploaded - set(survivors) - self.revoked
        if lost:
            raise Broken(f"round {number} was summed without {lost}, whose uploads were acknowledged")

    def check_store(self) -> None:
        """Nothing that was acknowledged is gone, and no round went back."""
        if not self.alive:
            return
        store, federation = self.server.store, self.owner.federation
        if broken_link(store) is not None:
            raise Broken("the audit's chain is broken")
        if self.authority - {self.server.ca_pem}:
            raise Broken("the transport authority is another one: no member can connect any more")
        for digest in self.documents:
            if store.get(DocumentRecord, federation, digest) is None:
                raise Broken("a document that the owner published is gone")
        rounds = {row.number: row for row in store.find(RoundRecord, federation=federation)}
        for number, header in self.headers.items():
            if number not in rounds or rounds[number].header != header:
                raise Broken(f"round {number} is gone")
        for number, ended in self.ended.items():
            if rounds[number].state != ended:
                raise Broken(f"round {number} was {ended} and is {rounds[number].state}")
        self._check_results(rounds)
        for (number, step, name), what in self.acknowledged.items():
            row = rounds.get(number)
            if row is None:
                raise Broken(f"round {number} is gone")
            if row.state == "aborted":
                continue
            if step == "conclude":
                word = store.get(ConclusionRecord, federation, number, name)
                if word is None or word.state != what:
                    raise Broken(f"the conclusion of {name} in round {number} is gone")
            elif step == "checkpoint":
                kept = store.find(CheckpointRecord, federation=federation, round=number)
                newest = self.server.engines[federation].state
                needed = row.state == "published" or (newest is not None and newest.round == number)
                size = self.server.blobs.size(_checkpoint(federation, kept[0])) if kept else None
                if not kept or (needed and size != kept[0].total):
                    raise Broken(f"the checkpoint of round {number} is gone")
            else:
                self._check_reply(row, step, name, what)

    def _check_results(self, rounds: dict[int, RoundRecord]) -> None:
        for number, digest in self.results.items():
            row = rounds[number]
            if row.state == "aborted":
                continue
            if row.state not in ("published", "concluded"):
                raise Broken(f"round {number} was published and is {row.state}")
            if row.state == "published":
                with self.server.blobs.open(result_name(self.owner.federation, number)) as reader:
                    if hashlib.sha256(reader.read(0, row.result_total)).digest() != digest:
                        raise Broken(f"the published sum of round {number} has changed")

    def _check_reply(self, row: RoundRecord, step: str, name: str, what: bytes) -> None:
        store, federation, number = self.server.store, self.owner.federation, row.number
        if store.get(RevocationRecord, federation, number, name) is not None:
            return
        reply = store.get(ReplyRecord, federation, number, step, name)
        if reply is None or (step != "upload" and reply.body != what):
            raise Broken(f"the acknowledged {step} of {name} in round {number} is gone")
        if step != "upload" or row.state != "open" or number in self.damaged:
            return
        stored = store.get(ContributionRecord, federation, number, name)
        if stored is None or stored.digest != what:
            raise Broken(f"the acknowledged upload of {name} in round {number} has no row")
        run = self.server.engines[federation].run
        assert run is not None
        if stored.folded is not None:
            kept = store.find(SumRecord, federation=federation, round=number)[-1]
            name, sizes, digests = (
                sum_name(federation, number, kept.generation),
                run.layout.sum_bytes,
                kept.frames,
            )
        else:
            name = contribution_name(federation, number, name, stored.digest)
            sizes, digests = run.layout.upload_bytes, stored.frames
        offset = 0
        with self.server.blobs.open(name) as reader:
            for index in range(run.layout.frames):
                frame = reader.read(offset, sizes(index))
                offset += len(frame)
                if frame_digest(frame) != digests[32 * index : 32 * index + 32]:
                    raise Broken(f"{name} isn't what was acknowledged")

    def check_engine(self) -> None:
        """Whoever was acknowledged isn't asked again; rounds that ended stay as they ended."""
        engine = self.server.engines[self.owner.federation]
        run = engine.run
        if run is None:
            return
        if run.record.state in ("aborted", "concluded"):
            if run.number not in self.ended:
                self.ended[run.number] = run.record.state
                self._counts_on("ended", (run.number, run.record.state))
            if self.ended[run.number] != run.record.state:
                raise Broken(f"round {run.number} was {self.ended[run.number]} and is {run.record.state}")
        for (number, step, name), _ in self.acknowledged.items():
            if number == run.number and step == run.step and run.settled and run.is_asked(name):
                raise Broken(f"{name} is asked for its {step} of round {number} again")

    # Faults

    def corrupt(self, which: int, how: str) -> None:
        """Bytes on the server's disk change under it."""
        found = [
            path
            for room in ("contribution", "sum", "spool")
            for path in sorted((self.home / "data" / "blobs" / room).iterdir())
        ]
        if not found:
            return
        path = found[which % len(found)]
        data = path.read_bytes()
        other = found[(which + 1) % len(found)].read_bytes()
        if how == "flip" and data:
            at = which % len(data)
            data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        elif how == "cut":
            data = data[:-1]
        elif how == "swap":
            data = other
        path.write_bytes(data)
        self.damaged.add(int(path.name.split(".")[1]) if path.name.split(".")[1].isdigit() else 0)

    def revoke(self, which: int) -> None:
        """The owner removes a member."""
        names = [member.name for member in self.members if member.name not in self.revoked]
        if not self.alive or len(names) <= 3:
            return
        gone = names[which % len(names)]
        self.revoked.add(gone)
        document, envelopes = self.owner.make_roster([name for name in names if name != gone])
        assert self.owner.roster is not None
        self.rosters[self.owner.roster_digest] = (self.owner.roster, self.owner.group_key)
        self._to_publish.append(lambda: self.owner.publish([document], envelopes))
        self.publish()

    def sign_plan_anew(self) -> None:
        """The owner goes on with a new version of the plan: after a removal, under the new group key."""
        assert self.owner.plan is not None
        version = next(self._versions)
        state = hashlib.sha256(b"first state" + version.to_bytes(2, "little")).digest()
        plan = msgspec.structs.replace(self.owner.plan, version=version, initial_state=state)
        self._to_publish.append(lambda: self.owner.publish_plan(plan))
        self.publish()

    def publish(self) -> None:
        """A call of the owner's that brought no answer is made again, with the very same bytes."""
        while self._to_publish and self.alive:
            try:
                self._to_publish[0]()
            except CallRefused as refused:
                if refused.code is not grpc.StatusCode.UNAVAILABLE:
                    raise Broken(f"the owner's call was refused: {refused}") from None
                return
            finally:
                self._bury()
            if self.alive:
                self._to_publish.pop(0)

    # Faults stop

    def settle(self) -> None:
        """Everything works again: the running round ends by its deadline, and another one concludes."""
        self.full, self.fails = False, None
        self.dies_in = -1
        self.delayed.clear()
        self.restart()
        self.publish()
        for member in self.members:
            member.faults.clear()
        engine = self.server.engines[self.owner.federation]
        self.run(_yield())
        first = engine.run.number if engine.run is not None else 0
        everything = 1000 * sum(getattr(SECONDS, name) for name in SECONDS.__struct_fields__)
        # Twice: a round's checkpoint may take another `upload`, a retry its pause.
        limit = self.clock.ms + 2 * everything + 10_000
        self._go_on(lambda: engine.run is None or engine.run.number > first or _over(engine.run), limit)
        limit = self.clock.ms + 3 * everything + 60_000
        newest = engine.state
        assert newest is not None
        if newest.roster and newest.roster != self.owner.roster_digest:
            self.sign_plan_anew()
        before = self._concluded()
        self._go_on(lambda: self._concluded() > before, limit)
        self.check_store()

    def _concluded(self) -> int:
        found = self.server.store.find(RoundRecord, federation=self.owner.federation, state="concluded")
        return len(found)

    def _go_on(self, done: Callable[[], bool], limit: int) -> None:
        while not done():
            before = self._progress()
            self.everyone_acts()
            if done():
                return
            if self._progress() == before:
                following = self.clock.next_ms()
                if following is None or self.clock.ms > limit:
                    engine = self.server.engines[self.owner.federation]
                    run = engine.run
                    raise Broken(
                        f"round {run and run.number} is {run and run.record.state} at {run and run.step}, "
                        f"{engine.paused or 'not paused'}; refusals: {self.refusals[-3:]}"
                    )
                self.advance(max(0, following - self.clock.ms))

    def _progress(self) -> object:
        run = self.server.engines[self.owner.federation].run
        if run is None:
            return None
        return run.number, run.record.version, run.step, len(run.machine.replied), len(run.conclusions)


async def _yield() -> None:
    await asyncio.sleep(0)


def _over(run: Any) -> bool:
    return run.record.state in ("concluded", "aborted")


def _checkpoint(federation: bytes, row: CheckpointRecord) -> str:
    return f"checkpoint/{federation.hex()[:32]}.{row.sealed_digest.hex()}"


@dataclass
class Template:
    """A server's data with a federation that is ready to train, and who is in it: made once, copied often."""

    home: Path
    owner: WorldOwner
    members: list[tuple[Applicant, bytes]]
    now_ms: int


@cache
def template() -> Template:
    """A federation with a plan of many rounds, whose first round is open."""
    folder = Path(tempfile.mkdtemp(prefix="reliability-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    world = World(folder)
    made = world.found()
    world.close()
    return made
