"""A federation whose server and members are processes of their own, which a test may kill.

Children are forked from a process that has imported everything (multiprocessing's fork server), so that
each starts at once.
"""

import contextlib
import multiprocessing
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

import conformance_children
import numpy as np
from blindsum.aggregator.capture import RECEIVED, read_capture
from blindsum.client import Member, Owner, RoundReceipt, join
from blindsum.client.joining import poll
from blindsum.client.receipts import verify_receipts
from blindsum.crypto.trust.plan import Deadlines
from blindsum.proto.v1 import round_pb2

PATIENCE = 60.0
"""Seconds after which a test gives up; nothing waits for it to pass."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["__main__", "blindsum.aggregator.commands", "blindsum.client", "blindsum.crypto.schemes.masking"]
)


class Child:
    """A child process and its end of the pipe."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        self.connection, there = _context.Pipe()
        self.process: BaseProcess = _context.Process(target=target, args=(there, *arguments), daemon=True)
        self.process.start()
        there.close()

    @property
    def pid(self) -> int:
        """The process's id."""
        assert self.process.pid is not None
        return self.process.pid

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.join()
        assert self.process.exitcode == -signal.SIGKILL

    def resident(self) -> int:
        """Bytes of memory that the process has now."""
        return _memory(self.pid, "VmRSS")

    def peak(self) -> int:
        """The most bytes of memory that the process ever had, since `forget_peak`."""
        return _memory(self.pid, "VmHWM")

    def forget_peak(self) -> None:
        """Begin a new measurement of `peak`."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5", encoding="ascii")


def _memory(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/{pid}/status has no {name}")


class MemberProcess(Child):
    """A member's app; see `conformance_children.App`."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(conformance_children.take_part, folder, options)
        self.name = folder.name
        self.events: list[tuple[Any, ...]] = []
        """All that it said; `until` has looked at the first `seen` of them."""
        self.seen = 0
        self._ended = False
        self._news = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            while True:
                event = self.connection.recv()
                with self._news:
                    self.events.append(event)
                    self._news.notify_all()
        except (EOFError, OSError):
            with self._news:
                self._ended = True
                self._news.notify_all()

    def until(self, *what: Any) -> tuple[Any, ...]:
        """Wait until it says something that begins with these values. Fails if it fails or ends before."""
        limit = time.monotonic() + PATIENCE
        while True:
            with self._news:
                self._news.wait_for(
                    lambda: self._ended or self.seen < len(self.events), limit - time.monotonic()
                )
                if self.seen == len(self.events):
                    raise AssertionError(f"{self.name}: no {what}; last came {self.events[-5:]}")
                event = self.events[self.seen]
                self.seen += 1
            if event[: len(what)] == what:
                return event
            assert event[0] not in ("failed", "done"), f"{self.name}: {event} before {what}"

    def go_on(self) -> None:
        """Let it go on from where it stopped."""
        self.connection.send("go")


class ProcessFederation:
    """Owner (in this process), server and members (their own), in one folder.

    `start` starts the members. `plan`, `policy`: as in `Owner.start_plan`, `Owner.init`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        scheme: str,
        size: int,
        rounds: int,
        members: int = 3,
        policy: Mapping[str, Any] | None = None,
        capture: bool = True,
        deadlines: Mapping[str, int] | None = None,
        presence_grace: float = 3.0,
    ) -> None:
        self.folder = folder
        self.capture = folder / "capture"
        self.members: dict[str, MemberProcess] = {}
        self._settings = {
            "allow_any_owner": "true",
            "presence_grace": presence_grace,
            "retry_pause": 0.1,
            "disk_reserve": 0,
        }
        if capture:
            self._settings["capture_directory"] = f'"{self.capture}"'
        self._ports = (0, 0)
        self._owner: Owner | None = None
        try:
            ca = self.start_server()
            self._owner = Owner.init(
                folder / "owner",
                "conformance",
                enrolment_address=f"localhost:{self._ports[0]}",
                member_address=f"localhost:{self._ports[1]}",
                ca=ca,
                **{"schemes": (scheme,), "paillier_bits": 2048, **(policy or {})},
            )
            self.owner.register()
            self.names = tuple(f"member-{number + 1}" for number in range(members))
            for name in self.names:
                join(self.owner.invite(name), self.path(name), wait=False)
            self.owner.admit()
            for name in self.names:
                assert poll(self.path(name))
            limits = {"gather": 30, "conclude": 30, "upload": 60, **(deadlines or {})}
            self.owner.start_plan(
                "conformance",
                {"weight": np.zeros(size, np.float32)},
                rounds=rounds,
                scheme=scheme,  # type: ignore[arg-type]
                metrics={"loss": (0.0, 8.0)},
                deadlines=Deadlines(**limits),
            )
        except BaseException:
            self.close()
            raise

    @property
    def owner(self) -> Owner:
        """The federation's owner."""
        assert self._owner is not None
        return self._owner

    def path(self, name: str) -> Path:
        """A member's folder."""
        return self.folder / name

    # The server

    def serve(self, ports: Sequence[int], log: str) -> Child:
        """A server on the federation's data."""
        config = self.folder / "server.toml"
        config.write_text("".join(f"{name} = {value}\n" for name, value in self._settings.items()))
        arguments = ["--config", str(config), "--data", str(self.folder / "server")]
        arguments += ["--enrolment-port", str(ports[0]), "--member-port", str(ports[1])]
        return Child(conformance_children.serve, arguments, self.folder / log)

    def start_server(self) -> str:
        """Start it, on the ports it had before if any, and wait until it is ready; its CA certificate."""
        self.server = self.serve(self._ports, "server.log")
        if not self.server.connection.poll(PATIENCE):
            raise AssertionError("the server isn't ready")
        try:
            first, _, ca = self.server.connection.recv().partition("\n")
        except EOFError:
            log = (self.folder / "server.log").read_text(encoding="utf-8")
            raise AssertionError(f"the server ended: {log[-2000:]}") from None
        enrolment, member = first.split()
        self._ports = (int(enrolment), int(member))
        return str(ca)

    def kill_server(self) -> None:
        """SIGKILL."""
        self.server.kill()

    # The members

    def start(self, *names: str, **options: Any) -> None:
        """Start members' apps (all of them, if none is named)."""
        for name in names or self.names:
            self.members[name] = MemberProcess(self.path(name), **options)

    def wait_for_replies(self, number: int, step: str, count: int) -> None:
        """Until so many replies to a step are durable at the server; only then are they acknowledged."""
        query = "SELECT count(*) FROM reply WHERE round = ? AND step = ?"
        state = sqlite3.connect(f"file:{self.folder}/server/state.sqlite?mode=ro", uri=True)
        limit = time.monotonic() + PATIENCE
        with contextlib.closing(state):
            while state.execute(query, (number, step)).fetchone()[0] < count:
                assert time.monotonic() < limit, f"{step} of round {number} has no {count} replies"
                time.sleep(0.005)

    def replied(self, number: int, step: str) -> int:
        """How many replies the server says that it has, in the running round's open step."""
        newest = self.owner.status().rounds[0]
        assert (newest.number, newest.step) == (number, step)
        return int(newest.replied)

    def finish(self) -> None:
        """Wait until every running member's app is done."""
        for member in self.members.values():
            member.until("done")
            member.process.join(PATIENCE)

    # What came of it

    def receipts(self, name: str) -> list[RoundReceipt]:
        """The receipts in a member's folder."""
        with Member.open(self.path(name)) as member:
            return member.receipts()

    def witness(self, name: str, number: int) -> Mapping[str, Any]:
        """What a member wrote down of a round."""
        with np.load(self.path(name) / "witness" / f"round-{number:06d}.npz", allow_pickle=False) as data:
            return {key: data[key] for key in data.files}

    def check_sum(self, number: int, survivors: Sequence[str] | None = None) -> float:
        """The sum that each survivor opened is the plain sum of what they encoded, bit for bit.

        Returns the largest rounding error (ckks).
        """
        names = tuple(survivors or self.names)
        found = {name: self.witness(name, number) for name in names}
        total = np.sum([one["fields"].astype(np.uint64) for one in found.values()], axis=0, dtype=np.uint64)
        for name, one in found.items():
            assert set(one["survivors"].tolist()) == set(names), f"round {number} at {name}"
            assert np.array_equal(one["summed"], total), f"the sum of round {number} at {name}"
        return max(float(one["max_error"]) for one in found.values())

    def check_receipts(self, expected: Mapping[str, Sequence[int]]) -> None:
        """Members have receipts of just these rounds, signed, chained, and equal at all of them."""
        signed = []
        for name, numbers in expected.items():
            receipts = self.receipts(name)
            assert [receipt.round for receipt in receipts] == list(numbers), name
            signed += [receipt.signed for receipt in receipts]
        # Raises if a signature, the chain or two members' receipts of a round are wrong.
        assert len(verify_receipts(signed, [self.owner.roster])) == len(signed)

    def sent(self) -> Iterator[tuple[str, int, str, bytes]]:
        """Every signed message that members sent in rounds: (member, round, step, bytes)."""
        for path in sorted(self.capture.glob("*.capture")):
            _, method, member = path.stem.split("-", 2)
            if method not in ("Answer", "BeginUpload"):
                continue
            for direction, data in read_capture(path):
                if direction != RECEIVED:
                    continue
                if method == "Answer":
                    answer = round_pb2.AnswerRequest.FromString(data)
                    yield member, answer.round, answer.step, answer.reply
                else:
                    begin = round_pb2.BeginUploadRequest.FromString(data)
                    if begin.kind == round_pb2.BULK_KIND_CONTRIBUTION:
                        yield member, begin.round, "upload", begin.reply + begin.digest

    def check_nothing_was_said_in_two_versions(self) -> None:
        """Restarts and retries sent the same bytes: one version of each message of each round."""
        versions: dict[tuple[str, int, str], set[bytes]] = {}
        for member, number, step, data in self.sent():
            versions.setdefault((member, number, step), set()).add(data)
        assert versions
        assert [place for place, found in versions.items() if len(found) > 1] == []

    # Life

    def close(self) -> None:
        """Kill what runs."""
        for child in (*self.members.values(), *([self.server] if hasattr(self, "server") else [])):
            child.process.kill()
            child.process.join()
        if self._owner is not None:
            self._owner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
