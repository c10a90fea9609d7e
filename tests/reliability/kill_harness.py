"""Real members upload to a real server process that is killed again and again: what came out, and the cost.

    python tests/reliability/kill_harness.py --seeds 5

The server is killed (SIGKILL) at named points of ingest, folding, commits and steps, and at random moments;
it starts again on its data. Members use the SDK's transport: they retry, and go on where the server is.
Every upload holds a power of two and its place in every field, so that the sum shows who was counted, how
often, and whether every byte lies where it belongs. Prints a JSON line for each seed.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent / "aggregator"))

import numpy as np
from blindsum.client.transport import MemberLine, Patience, Stopped
from blindsum.crypto.encoding.vector import field_count
from blindsum.crypto.errors import BlindsumError, Refused
from blindsum.crypto.schemes.base import frame_digest, upload_digest
from blindsum.crypto.trust.acceptance import sign_state
from blindsum.crypto.trust.header import BoundHeader
from blindsum.crypto.trust.plan import Deadlines
from blindsum.proto.v1 import round_pb2
from plain_scheme import FIELDS_PER_FRAME
from scripted_federation import Applicant, ScriptedOwner, state_after

PATIENT = Patience(first=0.02, longest=0.3, total=120.0)
DEADLINES = Deadlines(gather=60, advertise=600, share=600, upload=600, confirm=600, reveal=600, conclude=600)
MARK = 44
"""Above this bit a field tells its place."""
GIVE_UP = 300.0
MiB = 1 << 20


@dataclass
class Figures:
    """What came out of a run."""

    seed: int
    uploads: int = 0
    kills: int = 0
    points: list[str] = field(default_factory=list)
    exact_sums: int = 0
    rounds: int = 0
    acknowledged_asked_again: int = 0
    """Acknowledged uploads of rounds that went on, of which the server wanted bytes again."""
    payload_bytes: int = 0
    sent_bytes: int = 0
    seconds: float = 0.0

    @property
    def sent_ratio(self) -> float:
        """Bytes that members sent for each byte of payload."""
        return self.sent_bytes / self.payload_bytes


class KilledServer:
    """The server's process, which ends at a point of its own, or when told to."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self._directory = directory
        self._settings = {"enrolment_port": 0, "member_port": 0, **settings}
        self.pid = 0
        self._parent = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("killed_server_main.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, point: str = "", passing: int = 1) -> tuple[int, int, bytes] | None:
        """Start it; None if it died at its point before it was ready."""
        order = {
            "directory": str(self._directory),
            "settings": self._settings,
            "point": point,
            "passing": passing,
        }
        assert self._parent.stdin is not None
        self._parent.stdin.write(json.dumps(order) + "\n")
        self._parent.stdin.flush()
        self.pid = int(self._line()["forked"])
        self._handle = os.pidfd_open(self.pid)
        while True:
            if self.ended(0.0) and not self._readable():
                return None
            if self._readable(0.05):
                break
        ready = self._line()
        self._settings["enrolment_port"], self._settings["member_port"] = ready["ports"]
        return ready["ports"][0], ready["ports"][1], ready["ca"].encode()

    def _readable(self, seconds: float = 0.0) -> bool:
        assert self._parent.stdout is not None
        return bool(select.select([self._parent.stdout], [], [], seconds)[0])

    def _line(self) -> dict[str, Any]:
        assert self._parent.stdout is not None
        found: dict[str, Any] = json.loads(self._parent.stdout.readline())
        return found

    def ended(self, seconds: float) -> bool:
        """Whether it is gone, or is within so many seconds."""
        return bool(select.select([self._handle], [], [], seconds)[0])

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if not self.ended(0.0):
            os.kill(self.pid, signal.SIGKILL)
            self.ended(GIVE_UP)

    def close(self) -> None:
        """Kill what runs."""
        if self.pid:
            self.kill()
        with self._parent:
            self._parent.kill()


class HarnessMember:
    """A member's app on the SDK's transport, in a thread of its own."""

    def __init__(self, harness: "Harness", applicant: Applicant, certificate: bytes, index: int) -> None:
        self.name, self.index = applicant.name, index
        self._applicant = applicant
        self._harness = harness
        owner = harness.owner
        self._stop = threading.Event()
        self.line = MemberLine(
            f"localhost:{harness.member_port}",
            owner.ca_pem.decode(),
            key=applicant.transport[0],
            certificate=certificate,
            patience=PATIENT,
            stop=self._stop,
        )
        assert owner.plan is not None
        fields = field_count(owner.plan)
        values = (np.arange(fields, dtype="<u8") % 251 << MARK) + np.uint64(1 << index)
        self.bulk = harness.folder / f"{self.name}.bulk"
        self.bulk.write_bytes(values.tobytes())
        frame = 8 * FIELDS_PER_FRAME
        data = values.tobytes()
        self._digests = [frame_digest(data[start : start + frame]) for start in range(0, len(data), frame)]
        self.acknowledged: set[int] = set()
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            for notice in self.line.watch(lambda _: None):
                if notice.plan_finished:
                    return
                if notice.HasField("round"):
                    self._act(notice.round)
        except Stopped:
            pass
        except BaseException as error:
            self.failure = error
            self._harness.failed.set()

    def _act(self, said: Any) -> None:
        number = said.number
        try:
            if said.state == round_pb2.ROUND_STATE_OPEN and said.asked:
                if said.step == "upload":
                    self._upload(number, BoundHeader.parse(said.header))
                else:
                    self._answer(number, said.step)
            elif said.state == round_pb2.ROUND_STATE_PUBLISHED:
                self._conclude(number, BoundHeader.parse(said.header), said.checkpoint_wanted)
        except Refused as refusal:
            # A notice from before a kill may ask for what is done by now.
            if refusal.reason.value not in ("closed", "wrong_step", "wrong_round"):
                raise

    def _answer(self, number: int, step: str) -> None:
        request = round_pb2.AnswerRequest(round=number, step=step, reply=f"{step} {self.name}".encode())
        self.line.call(self.line.stub.Answer, request, what=step)

    def _upload(self, number: int, bound: BoundHeader) -> None:
        digest = upload_digest(bound.h0, self._digests)
        begin = round_pb2.BeginUploadRequest(
            round=number,
            kind=round_pb2.BULK_KIND_CONTRIBUTION,
            total=self.bulk.stat().st_size,
            digest=digest,
            reply=b"U" + digest,
        )
        if number in self.acknowledged:
            # An old notice; the server has to say that all is there.
            answer = self.line.call(self.line.stub.BeginUpload, begin, what="asking again")
            self._harness.count(asked_again=not answer.done)
            return
        stream = self.line._chunks

        def chunks(*arguments: Any) -> Any:
            for part in stream(*arguments):
                self._harness.count(sent=len(part.data))
                yield part

        self.line._chunks = chunks  # type: ignore[method-assign]
        self.line.upload(begin, self.bulk, lambda _done, _total: None)
        self.line._chunks = stream  # type: ignore[method-assign]
        self.acknowledged.add(number)
        self._harness.count(uploads=1)

    def _conclude(self, number: int, bound: BoundHeader, keeps: bool) -> None:
        harness = self._harness
        state = state_after(number)
        signature = sign_state(
            self._applicant.identity,
            federation=harness.owner.federation,
            h1=bound.h0,
            index=bound.header.state_round + 1,
            digest=state,
            survivors=harness.names,
        )
        if self.index == 0 and number not in harness.checked:
            total = harness.expected.nbytes
            pieces = self.line.download(
                round_pb2.BULK_KIND_SUM, number, total, what="the sum", on_bytes=lambda _done, _total: None
            )
            harness.check_sum(number, b"".join(pieces))
        # Without the others' words the round can't conclude before its sum was looked at.
        harness.wait_for_check(number)
        request = round_pb2.ConcludeRequest(round=number, state=state, signature=signature)
        self.line.call(self.line.stub.Conclude, request, what="concluding")
        if keeps:
            sealed = harness.folder / f"sealed-{number}"
            sealed.write_bytes(f"sealed after {number}".encode())
            begin = round_pb2.BeginUploadRequest(
                round=number,
                kind=round_pb2.BULK_KIND_CHECKPOINT,
                total=sealed.stat().st_size,
                digest=hashlib.sha256(sealed.read_bytes()).digest(),
                reply=state,
            )
            self.line.upload(begin, sealed, lambda _done, _total: None)

    def close(self) -> None:
        self._stop.set()
        self.line.end_watch()
        self.line.close()
        self.thread.join(20)


class Harness:
    """One run: `members` upload in each of `rounds`, and the server is killed `kills` times."""

    def __init__(
        self, folder: Path, seed: int, *, members: int, rounds: int, upload_bytes: int, slots: int
    ) -> None:
        self.folder = folder
        self.figures = Figures(seed, rounds=rounds)
        self.failed = threading.Event()
        self.checked: dict[int, bool] = {}
        self._lock = threading.Lock()
        self._looked = threading.Condition()
        self.server = KilledServer(folder / "data", presence_grace=600, fold_batch=4, upload_slots=slots)
        first = self.server.start()
        assert first is not None
        enrolment, self.member_port, ca = first
        self.owner = owner = ScriptedOwner(enrolment, ca)
        owner.found()
        owner.publish_policy(owner.policy(n_max=64))
        applicants = [Applicant(f"clinic-{index:02}") for index in range(members)]
        requests = [owner.join(applicant) for applicant in applicants]
        self.names = tuple(applicant.name for applicant in applicants)
        owner.publish_roster(list(self.names))
        certificates = [owner.poll(request).certificate for request in requests]
        owner.publish_plan(
            owner.make_plan(
                rounds=rounds,
                dimension=upload_bytes // 8,
                cohort_min=members,
                cohort_wanted=members,
                cohort_max=64,
                deadlines=DEADLINES,
            )
        )
        assert owner.plan is not None
        fields = field_count(owner.plan)
        places = np.arange(fields, dtype="<u8") % 251 << MARK
        self.expected = places * members + np.uint64((1 << members) - 1)
        self.figures.payload_bytes = 8 * fields * members * rounds
        self.members = [
            HarnessMember(self, applicant, certificate, index)
            for index, (applicant, certificate) in enumerate(zip(applicants, certificates, strict=True))
        ]

    def count(self, *, sent: int = 0, uploads: int = 0, asked_again: bool = False) -> None:
        """Members report."""
        with self._lock:
            self.figures.sent_bytes += sent
            self.figures.uploads += uploads
            self.figures.acknowledged_asked_again += asked_again

    def check_sum(self, number: int, data: bytes) -> None:
        """Whether a published sum is exact."""
        with self._looked:
            self.checked[number] = bool((np.frombuffer(data, "<u8") == self.expected).all())
            self.figures.exact_sums += self.checked[number]
            self._looked.notify_all()

    def wait_for_check(self, number: int) -> None:
        """Until the first member has compared the sum."""
        with self._looked:
            self._looked.wait_for(lambda: number in self.checked or self.failed.is_set(), GIVE_UP)

    def _finished(self) -> bool:
        return self.failed.is_set() or all(not member.thread.is_alive() for member in self.members)

    def run(self, kills: int, points: list[str], *, at_random: bool = True) -> Figures:
        """Kill at these points in turn, and between them at random moments, until all rounds are over."""
        choice = random.Random(self.figures.seed)
        started = time.monotonic()
        wanted = itertools.cycle(points)
        size = self.figures.payload_bytes / self.figures.rounds / len(self.members)
        self.server.kill()
        for member in self.members:
            member.thread.start()
        while not self._finished():
            assert time.monotonic() - started < GIVE_UP, "the rounds don't end"
            left = kills - self.figures.kills
            point, progress = "", 0
            if left > 0 and (left % 2 == 0 or not at_random):
                point = next(wanted)
            elif left > 0:
                # At random: after so many more bytes.
                progress = self.figures.sent_bytes + int(size * choice.uniform(0.5, 12.0))
            often = 40 if point == "a chunk is written" else 4
            ready = self.server.start(point, choice.randint(1, often) if at_random else 1)
            while ready is not None and not self.server.ended(0.01) and not self._finished():
                if progress and self.figures.sent_bytes >= progress:
                    self.server.kill()
            if point and self.server.ended(0.0):
                self.figures.points.append(point)
            if self.server.ended(0.0):
                self.figures.kills += 1
        self.figures.seconds = round(time.monotonic() - started, 1)
        for member in self.members:
            if member.failure is not None:
                raise BlindsumError(f"{member.name}: {member.failure}") from member.failure
        return self.figures

    def close(self) -> None:
        for member in self.members:
            member.close()
        self.server.close()


def run(
    folder: Path, seed: int, *, members: int, rounds: int, upload_bytes: int, kills: int, slots: int = 4
) -> Figures:
    """One run in an empty folder."""
    from killed_server_main import POINTS  # noqa: PLC0415

    points = list(POINTS)
    random.Random(seed).shuffle(points)
    harness = Harness(folder, seed, members=members, rounds=rounds, upload_bytes=upload_bytes, slots=slots)
    try:
        return harness.run(kills, points)
    finally:
        harness.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--members", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--upload-mb", type=int, default=4)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--slots", type=int, default=4, help="uploads that the server takes at once")
    options = parser.parse_args()
    good = True
    for seed in range(1, options.seeds + 1):
        with tempfile.TemporaryDirectory(prefix="kill-harness-") as folder:
            figures = run(
                Path(folder),
                seed,
                members=options.members,
                rounds=options.rounds,
                upload_bytes=options.upload_mb * 1_000_000,
                kills=options.kills,
                slots=options.slots,
            )
        sys.stdout.write(json.dumps({**asdict(figures), "sent_ratio": round(figures.sent_ratio, 3)}) + "\n")
        sys.stdout.flush()
        good &= figures.exact_sums == figures.rounds and not figures.acknowledged_asked_again
        good &= figures.sent_ratio <= 1.1
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
