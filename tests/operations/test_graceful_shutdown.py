"""SIGTERM to the command that an operator runs: nothing new, running uploads end, exit 0."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from blindsum.aggregator.store.records import ContributionRecord
from blindsum.aggregator.store.sqlite_reader import SqliteReader
from blindsum.proto.v1 import round_pb2
from masking_members import MaskingMember, build_masking_scene
from scripted_federation import CHUNK, Scene, chunks


class Server:
    """`blindsum serve` in a process of its own."""

    def __init__(self, folder: Path, drain: float) -> None:
        self.data = folder / "data"
        self.log = folder / "log"
        config = folder / "aggregator.toml"
        config.write_text(
            f'data_dir = "{self.data}"\nallow_any_owner = true\nenrolment_port = 0\nmember_port = 0\n'
            f"admin_port = 0\ndisk_reserve = 0\nretry_after_ms = 10\ndrain_seconds = {drain}\n"
        )
        command = [sys.executable, "-m", "blindsum.aggregator.commands", "-c", str(config)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--ready-file", "-"], stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.process.stdout is not None
        first = self.process.stdout.readline().split()
        self.enrolment_port, self.member_port = int(first[0]), int(first[1])
        pem = ""
        while "END CERTIFICATE" not in pem:
            pem += self.process.stdout.readline()
        self.ca_pem = pem.encode()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def uploading(folder: Path, drain: float) -> Iterator[tuple[Server, Scene, list[MaskingMember], int]]:
    """A server with a round in which everyone is asked to upload."""
    server = Server(folder, drain)
    try:
        scene = build_masking_scene(
            server.enrolment_port, server.member_port, server.ca_pem, 3, dimension=400_000
        )
        members = [member for member in scene.members if isinstance(member, MaskingMember)]
        for member in members:
            member.watch()
        number = 0
        for step in ("advertise", "share"):
            for member in members:
                number = member.until_asked(step, number)
                member.perform(number, step)
        for member in members:
            member.until_asked("upload", number)
            member.prepare(number, "upload")
        yield server, scene, members, number
        scene.close()
    finally:
        server.close()


def kept(server: Server, member: MaskingMember) -> list[int]:
    """Sizes of what the server has of a member's broken or running uploads."""
    return [
        path.stat().st_size
        for path in (server.data / "blobs" / "spool").iterdir()
        if member.name in path.name
    ]


def half_sent(
    server: Server, member: MaskingMember, number: int
) -> tuple[threading.Event, threading.Thread, list[int]]:
    """Start an upload that stops in the middle until it may go on; what the server said at its end."""
    slot = member.admitted(number).slot
    begun, go_on = threading.Event(), threading.Event()
    committed: list[int] = []

    def parts() -> Iterator[round_pb2.UploadRequest]:
        for position, chunk in enumerate(chunks(slot, member.bulk)):
            if position == 2:
                begun.set()
                go_on.wait(30)
            yield chunk

    def send() -> None:
        with contextlib.suppress(Exception):
            committed.append(member.stub.Upload(parts(), timeout=30).committed)

    thread = threading.Thread(target=send)
    thread.start()
    assert begun.wait(20)
    # Taken from the client isn't received by the server. Two chunks fill a stage, which is written when full.
    limit = time.monotonic() + 20
    while kept(server, member) != [2 * CHUNK]:
        assert time.monotonic() < limit
        time.sleep(0.01)
    return go_on, thread, committed


def contributions(data: Path) -> set[str]:
    with SqliteReader(data / "state.sqlite") as state:
        return {row.member for row in state.find(ContributionRecord)}


def test_a_running_upload_ends_and_nothing_new_begins(tmp_path: Path) -> None:
    with uploading(tmp_path, drain=30) as (server, _, members, number):
        go_on, thread, committed = half_sent(server, members[0], number)
        server.process.send_signal(signal.SIGTERM)
        late = members[1].admitted(number)
        while late.WhichOneof("answer") == "slot":
            # The signal is still on its way: this slot is given back by an upload that ends.
            members[1].stub.Upload(chunks(late.slot, members[1].bulk), timeout=20)
            late = members[2].admitted(number)
        assert late.retry_after_ms > 0
        assert server.process.poll() is None
        go_on.set()
        thread.join(30)
        assert committed == [len(members[0].bulk)]
        assert server.process.wait(30) == 0
        assert members[0].name in contributions(server.data)
        assert '"event": "stopped"' in server.log.read_text()


@pytest.mark.parametrize("how", ["limit", "second signal"])
def test_an_upload_that_doesnt_end_is_cut(tmp_path: Path, how: str) -> None:
    with uploading(tmp_path, drain=0.2 if how == "limit" else 60) as (server, _, members, number):
        go_on, thread, committed = half_sent(server, members[0], number)
        server.process.send_signal(signal.SIGTERM)
        if how != "limit":
            while members[1].admitted(number).WhichOneof("answer") != "retry_after_ms":
                pass
            server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        go_on.set()
        thread.join(30)
        assert committed == []
        # What it sent is kept for when it goes on.
        assert kept(server, members[0]) == [2 * CHUNK]


def test_an_idle_server_ends_at_once_with_0(tmp_path: Path) -> None:
    server = Server(tmp_path, drain=60)
    try:
        os.kill(server.process.pid, signal.SIGINT)
        assert server.process.wait(20) == 0
    finally:
        server.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.enrolment_port), timeout=5)
