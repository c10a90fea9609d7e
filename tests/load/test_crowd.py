"""Many members on one server process: connected and waiting, told at once, uploading at once."""

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import pytest
from blindsum.crypto.encoding.vector import field_count
from blindsum.crypto.schemes.base import frame_digest, upload_digest
from blindsum.crypto.trust.header import BoundHeader
from blindsum.crypto.trust.plan import Deadlines
from blindsum.proto.v1 import enrolment_pb2, round_pb2, round_pb2_grpc
from plain_scheme import FIELDS_PER_FRAME
from scripted_federation import Applicant, ScriptedOwner, chunks

MB = 1_000_000
HERE = Path(__file__).parent
PATIENCE_S = 300


class ServerOfCrowd:
    """The server's process and its memory."""

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

    def peak_mb(self) -> float:
        """The most memory that the process ever had."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / MB

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


@pytest.fixture
def crowd_server(tmp_path: Path) -> Iterator[ServerOfCrowd]:
    server = ServerOfCrowd(tmp_path / "server")
    yield server
    server.close()


def admit(
    server: ServerOfCrowd, members: int, policy_max: int
) -> tuple[ScriptedOwner, list[Applicant], list[bytes]]:
    """A federation with so many members, and their certificates."""
    owner = ScriptedOwner(server.enrolment_port, server.ca)
    owner.found()
    owner.publish_policy(owner.policy(n_max=policy_max, split_cohorts=True))
    applicants = [Applicant(f"clinic-{index:04}") for index in range(members)]
    requests = [owner.join(applicant) for applicant in applicants]
    owner.publish_roster([applicant.name for applicant in applicants])
    answers = [owner.poll(request) for request in requests]
    assert {answer.state for answer in answers} == {enrolment_pb2.JOIN_STATE_ADMITTED}
    return owner, applicants, [answer.certificate for answer in answers]


@dataclass
class Watcher:
    """A member on a connection of its own, in this process' event loop."""

    index: int
    channel: grpc.aio.Channel
    notices: "asyncio.Queue[round_pb2.WatchResponse]" = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        self.stub = round_pb2_grpc.RoundServiceStub(self.channel)  # type: ignore[no-untyped-call]
        self.task = asyncio.create_task(self._read())
        self.latest = round_pb2.WatchResponse()

    async def _read(self) -> None:
        async for notice in self.stub.Watch(round_pb2.WatchRequest(ready=True), wait_for_ready=True):
            self.notices.put_nowait(notice)

    async def until(self, step: str) -> round_pb2.WatchResponse:
        """Wait until this step is open."""
        while self.latest.round.step != step:
            self.latest = await self.notices.get()
        return self.latest

    async def answer(self, step: str, name: str) -> None:
        notice = await self.until(step)
        await self.stub.Answer(
            round_pb2.AnswerRequest(round=notice.round.number, step=step, reply=f"{step} {name}".encode())
        )

    async def upload(self, fields: int) -> None:
        """Field values of 2^(index mod 50), in the scripted members' form."""
        notice = await self.until("upload")
        bulk = np.full(fields, 1 << self.index % 50, "<u8").tobytes()
        size = 8 * FIELDS_PER_FRAME
        frames = [frame_digest(bulk[at : at + size]) for at in range(0, len(bulk), size)]
        digest = upload_digest(BoundHeader.parse(notice.round.header).h0, frames)
        begin = round_pb2.BeginUploadRequest(
            round=notice.round.number,
            kind=round_pb2.BULK_KIND_CONTRIBUTION,
            total=len(bulk),
            digest=digest,
            reply=b"U" + digest,
        )
        while (begun := await self.stub.BeginUpload(begin)).WhichOneof("answer") != "slot":
            await asyncio.sleep(begun.retry_after_ms / 1000)

        async def parts() -> AsyncIterator[round_pb2.UploadRequest]:
            for chunk in chunks(begun.slot, bulk):
                yield chunk

        assert (await self.stub.Upload(parts())).committed == len(bulk)


async def take_part(
    server: ServerOfCrowd,
    owner: ScriptedOwner,
    applicants: list[Applicant],
    certificates: list[bytes],
    uploading: int,
) -> None:
    options = [("grpc.use_local_subchannel_pool", 1)]
    watchers = []
    for index, (applicant, certificate) in enumerate(zip(applicants, certificates, strict=True)):
        credentials = grpc.ssl_channel_credentials(server.ca, applicant.transport[0], certificate)
        channel = grpc.aio.secure_channel(f"localhost:{server.member_port}", credentials, options=options)
        watchers.append(Watcher(index, channel))
    began = time.perf_counter()
    for watcher in watchers:
        watcher.latest = await watcher.notices.get()
    took = time.perf_counter() - began
    print(f"{len(watchers)} members connected after {took:.1f} s; {server.peak_mb():.0f} MB")

    plan = owner.make_plan(
        dimension=4 * MB // 8,
        cohort_min=uploading,
        cohort_wanted=len(watchers) if len(watchers) == uploading else uploading,
        cohort_max=uploading,
        deadlines=Deadlines(
            gather=1, advertise=600, share=600, upload=600, confirm=600, reveal=600, conclude=600
        ),
    )
    fields = field_count(plan)
    began = time.perf_counter()
    await asyncio.to_thread(owner.publish_plan, plan)
    await asyncio.gather(*(watcher.until("advertise") for watcher in watchers))
    print(f"all told of the round after {time.perf_counter() - began:.1f} s; {server.peak_mb():.0f} MB")

    cohort = watchers[:uploading]
    names = [applicant.name for applicant in applicants]
    await asyncio.gather(*(w.answer("advertise", names[w.index]) for w in cohort))
    await asyncio.gather(*(w.until("upload") for w in cohort))
    began = time.perf_counter()
    await asyncio.gather(*(w.upload(fields) for w in cohort))
    print(f"{uploading} uploads of {8 * fields / MB:.1f} MB after {time.perf_counter() - began:.1f} s")
    await asyncio.gather(*(w.answer("confirm", names[w.index]) for w in cohort))
    first = cohort[0]
    while first.latest.round.state != round_pb2.ROUND_STATE_PUBLISHED:
        first.latest = await first.notices.get()
    number = first.latest.round.number
    call = first.stub.Download(round_pb2.DownloadRequest(kind=round_pb2.BULK_KIND_SUM, round=number))
    data = b"".join([part.data async for part in call])
    expected = sum(1 << w.index % 50 for w in cohort)
    assert (
        hashlib.sha256(data).digest() == hashlib.sha256(np.full(fields, expected, "<u8").tobytes()).digest()
    )
    # Everyone is still there.
    assert not any(watcher.task.done() for watcher in watchers)
    for watcher in watchers:
        watcher.task.cancel()
    await asyncio.gather(*(watcher.channel.close() for watcher in watchers))


def hold(server: ServerOfCrowd, members: int, uploading: int, most_mb: float) -> None:
    owner, applicants, certificates = admit(server, members, max(16, uploading))
    try:
        asyncio.run(
            asyncio.wait_for(take_part(server, owner, applicants, certificates, uploading), PATIENCE_S)
        )
    finally:
        owner.channel.close()
    peak = server.peak_mb()
    print(f"peak memory of the server: {peak:.0f} MB")
    assert peak <= most_mb


def test_sixty_members_wait_and_twelve_upload_at_once(crowd_server: ServerOfCrowd) -> None:
    hold(crowd_server, 60, 12, 600)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_thousand_members_wait_and_a_hundred_upload_at_once(crowd_server: ServerOfCrowd) -> None:
    hold(crowd_server, 1000, 100, 600)
