"""Rounds without end and a fault in each: nothing grows, every sum is exact (faults.md 51)."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from blindsum.proto.v1 import round_pb2
from scripted_federation import CHUNK, Scene, ScriptedMember, build_scene, chunks

HERE = Path(__file__).parent
SEED = 51
SETTLE_S = 60.0
EVERYONE = 0b111


class SoakedServer:
    """A server process, and what it holds."""

    def __init__(self, directory: Path) -> None:
        paths = os.pathsep.join([str(HERE.parent / "aggregator"), str(HERE)])
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "crowd_server.py"), str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        assert self.process.stdout is not None
        self.enrolment_port, self.member_port, ca = json.loads(self.process.stdout.readline())
        self.ca = ca.encode()

    def holds(self) -> tuple[int, int]:
        """Descriptors and threads."""
        place = Path(f"/proc/{self.process.pid}")
        return len(list((place / "fd").iterdir())), len(list((place / "task").iterdir()))

    def resident_mb(self) -> float:
        """Memory that the process has now."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) / 1024

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


@pytest.fixture
def soaked(tmp_path: Path) -> Iterator[SoakedServer]:
    server = SoakedServer(tmp_path / "server")
    yield server
    server.close()


def send_twice(member: ScriptedMember, number: int) -> None:
    member.upload(number)
    assert member.begin(number, member.contribution()).done


def break_off(member: ScriptedMember, number: int) -> None:
    bulk = member.contribution()
    slot = member.begin(number, bulk).slot
    call = member.stub.Upload.future(chunks(slot, bulk, min(CHUNK, len(bulk) // 2)))
    call.cancel()
    member.upload(number)


def send_other_bytes(member: ScriptedMember, number: int) -> None:
    bulk = member.contribution()
    slot = member.begin(number, bulk).slot
    with pytest.raises(grpc.RpcError):
        member.send(slot, bulk[:-8] + b"\x01" * 8)
    member.upload(number)


def send_nonsense(member: ScriptedMember, number: int) -> None:
    for request in (
        round_pb2.AnswerRequest(round=number, step="upload", reply=b"nonsense"),
        round_pb2.AnswerRequest(round=number + 7, step="advertise", reply=b"advertise"),
    ):
        with pytest.raises(grpc.RpcError):
            member.stub.Answer(request)
    member.upload(number)


def come_back(member: ScriptedMember, number: int) -> None:
    member.close()
    member.connect(member.port)  # type: ignore[attr-defined]
    member.watch()
    member.until_asked("upload", number)
    member.upload(number)


FAULTS: tuple[Callable[[ScriptedMember, int], None], ...] = (
    send_twice, break_off, send_other_bytes, send_nonsense, come_back,
)  # fmt: skip


def one_round(scene: Scene, chance: random.Random) -> None:
    number = 0
    for member in scene.members:
        number = member.until_asked("advertise", number)
        member.answer(number, "advertise")
    unlucky = chance.choice(scene.members)
    for member in scene.members:
        member.until_asked("upload", number)
        (chance.choice(FAULTS) if member is unlucky else ScriptedMember.upload)(member, number)
    for member in scene.members:
        member.until_asked("confirm", number)
        member.answer(number, "confirm")
    for member in scene.members:
        member.until_state(round_pb2.ROUND_STATE_PUBLISHED, number)
    assert chance.choice(scene.members).sum(number) == {EVERYONE}, f"the sum of round {number}"
    scene.conclude(number)


def soak(server: SoakedServer, warm_up: int, rounds: int) -> None:
    chance = random.Random(SEED)
    scene = build_scene(
        server.enrolment_port, server.member_port, server.ca, 3, {"rounds": rounds + 1, "dimension": 20_000}
    )
    for member in scene.members:
        member.port = server.member_port  # type: ignore[attr-defined]
        member.watch()
    for _ in range(warm_up):
        one_round(scene, chance)
    before, memory = settled(server, None), server.resident_mb()
    for _ in range(rounds - warm_up):
        one_round(scene, chance)
    after, memory_after = settled(server, before), server.resident_mb()
    print(f"descriptors, threads: {before}, {after}; MiB: {memory:.1f}, {memory_after:.1f}")
    assert after == before
    assert memory_after <= 1.1 * memory
    scene.close()


def settled(server: SoakedServer, wanted: tuple[int, int] | None) -> tuple[int, int]:
    """What the server holds once it has stopped changing; connections and idle threads end a little later."""
    limit, last, same = time.monotonic() + SETTLE_S, (0, 0), 0
    while True:
        now = server.holds()
        same = same + 1 if now == last else 0
        last = now
        if now == wanted or (wanted is None and same == 20) or time.monotonic() > limit:
            return now
        time.sleep(0.1)


def test_sixty_rounds_with_faults_leave_nothing_behind(soaked: SoakedServer) -> None:
    soak(soaked, 30, 60)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_rounds_with_faults_leave_nothing_behind(soaked: SoakedServer) -> None:
    soak(soaked, 100, 1000)
