"""Members that die and come back, servers that do, rounds that abort (faults.md 10, 40, 42)."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from blindsum.client import Member
from blindsum.client.member_folder import MemberFolder
from blindsum.client.testing import Federation, small_model
from blindsum.client.transport import Stopped
from blindsum.crypto.errors import RoundAborted
from blindsum.crypto.trust.plan import Deadlines
from blindsum.proto.v1 import round_pb2
from lying_server import LyingServer

Make = Callable[..., Federation]
VICTIM = "member-1"


class Died(BaseException):
    """Stands for the end of a process."""


def submit_all(member: Member) -> list[Any]:
    receipts = []
    for rnd in member.rounds():
        with rnd:
            after = {name: value + np.float32(0.01) for name, value in rnd.weights().items()}
            receipts.append(rnd.submit(after, examples=1))
    return receipts


class Threads:
    """Members' apps in threads, each of which may be started at another time."""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation
        self.results: dict[str, Any] = {}
        self._threads: dict[str, threading.Thread] = {}

    def start(self, name: str, app: Callable[[Member], Any] = submit_all, **options: Any) -> None:
        def run() -> None:
            with self.federation.open(name, **options) as member:
                try:
                    self.results[name] = app(member)
                except BaseException as error:
                    self.results[name] = error

        self._threads[name] = threading.Thread(target=run, daemon=True)
        self._threads[name].start()

    def join(self, *names: str) -> None:
        for name in names or tuple(self._threads):
            self._threads[name].join(40)
            assert not self._threads[name].is_alive(), f"{name} isn't done"


@pytest.mark.parametrize("phase", ["training", "protect", "upload", "confirm", "reveal", "open", "conclude"])
def test_a_member_that_dies_goes_on_with_the_same_bytes(blindsum_federation: Make, phase: str) -> None:
    """A member dies when a phase begins; after a restart it finishes the round, if it may."""
    server = LyingServer()
    federation = blindsum_federation(3, make_server=server, model=small_model())
    replies: dict[str, set[bytes]] = {}
    line_dead = threading.Event()

    def app(member: Member) -> Any:
        for rnd in member.rounds():
            if phase == "training":
                line_dead.set()
                raise Died
            return rnd.submit(rnd.weights(), examples=1)
        return None

    def die(now: str, done: int, total: int) -> None:
        if now == phase and not line_dead.is_set():
            line_dead.set()
            threading.Thread(target=lambda: members[0]._disconnect(), daemon=True).start()

    def remember(folder: MemberFolder) -> None:
        for step in ("advertise", "share", "confirm", "reveal"):
            reply = folder.reply(1, step)
            if reply is not None:
                replies.setdefault(step, set()).add(reply)
        stored = folder.round()
        if stored is not None and stored.upload:
            replies.setdefault("upload", set()).add(stored.upload)
            replies.setdefault("spool", set()).add(folder.spool(1).read_bytes())

    threads = Threads(federation)
    for name in ("member-2", "member-3"):
        threads.start(name)
    members = [federation.open(VICTIM, on_progress=die)]
    with pytest.raises((Died, Stopped)):
        app(members[0])
    assert line_dead.wait(20)
    members[0].close()
    with MemberFolder(federation.path(VICTIM), read_only=True) as folder:
        remember(folder)

    with federation.open(VICTIM) as member:
        seen: list[int] = []
        for rnd in member.rounds():
            seen.append(rnd.number)
            remember(member._folder)
            rnd.submit(rnd.weights(), examples=1)
        assert member.receipts(), "the restarted member saw the plan through"
        first = member.receipts()[0]
    threads.join()
    if phase in ("upload", "confirm", "reveal", "open", "conclude"):
        assert first.round == 1
        assert 1 not in seen, "the app isn't asked to train again for a round whose update is sealed"
    for step, bytes_ in replies.items():
        assert len(bytes_) == 1, f"{step} was made twice under one header"
    receipts = [threads.results[name][0].receipt for name in ("member-2", "member-3")]
    assert receipts[0] == receipts[1] == first.receipt


def test_a_server_that_restarts_in_the_middle_finishes_the_round(blindsum_federation: Make) -> None:
    federation = blindsum_federation(3, model=small_model(), rounds=2)
    training = threading.Event()
    back = threading.Event()

    def app(member: Member) -> list[Any]:
        receipts = []
        for rnd in member.rounds():
            training.set()
            assert back.wait(30)
            receipts.append(rnd.submit(rnd.weights(), examples=1))
        return receipts

    threads = Threads(federation)
    for name in federation.names:
        threads.start(name, app)
    assert training.wait(20)
    federation.stop_server()
    federation.start_server()
    back.set()
    threads.join()
    for position in range(2):
        assert len({threads.results[name][position].receipt for name in federation.names}) == 1


def test_survivors_finish_without_the_member_that_went(blindsum_federation: Make) -> None:
    federation = blindsum_federation(5, model=small_model(), plan={"cohort_min": 3})

    def leave(member: Member) -> None:
        next(member.rounds())

    threads = Threads(federation)
    for name in federation.names:
        threads.start(name, leave if name == VICTIM else submit_all)
    threads.join()
    survivors = {threads.results[name][0].survivors for name in federation.names if name != VICTIM}
    assert survivors == {4}


def test_an_abort_before_confirm_carries_the_update_into_the_retry(blindsum_federation: Make) -> None:
    """Three members bear no dropout: one that leaves aborts the round; the others' apps train once."""
    short = Deadlines(gather=1, advertise=3, share=3, upload=3)
    federation = blindsum_federation(3, model=small_model(), plan={"deadlines": short})
    trained: dict[str, list[int]] = {}
    first, aborted = threading.Event(), threading.Event()

    def app(member: Member) -> Any:
        for rnd in member.rounds():
            trained.setdefault(member.name, []).append(rnd.number)
            if member.name == VICTIM and not first.is_set():
                first.set()
                return None
            return rnd.submit(rnd.weights(), examples=1)
        return None

    def report(phase: str, done: int, total: int) -> None:
        if phase == "aborted":
            aborted.set()

    threads = Threads(federation)
    for name in federation.names:
        threads.start(name, app, on_progress=report)
    assert first.wait(20)
    assert aborted.wait(20)
    threads.join(VICTIM)
    threads.start(VICTIM, app)
    threads.join()
    assert len(trained["member-2"]) == 1, "the update went into the retry by itself"
    numbers = {threads.results[name].round for name in federation.names}
    assert len(numbers) == 1
    assert min(numbers) > trained["member-2"][0]


def test_an_abort_after_reveal_means_training_again_and_twice_means_stop(blindsum_federation: Make) -> None:
    """The server aborts each round after it has published: members mustn't send the same update again."""
    server = LyingServer()
    short = Deadlines(gather=1, conclude=1)
    federation = blindsum_federation(3, make_server=server, model=small_model(), plan={"deadlines": short})

    def lie(method: str, member: str, answer: Any) -> Any:
        if method == "Watch" and answer.round.state == round_pb2.ROUND_STATE_PUBLISHED:
            changed = round_pb2.WatchResponse()
            changed.CopyFrom(answer)
            changed.round.state = round_pb2.ROUND_STATE_ABORTED
            changed.round.abort_reason = "no reason"
            return changed
        return answer

    server.lies(lie)
    again: dict[str, list[bool]] = {}

    def app(member: Member) -> int:
        aborts = 0
        for rnd in member.rounds():
            again.setdefault(member.name, []).append(rnd.again)
            with pytest.raises(RoundAborted, match="train again"):
                rnd.submit(rnd.weights(), examples=1)
            aborts += 1
        return aborts

    threads = Threads(federation)
    for name in federation.names:
        threads.start(name, app, arrays="numpy")
    threads.join()
    for name in federation.names:
        assert isinstance(threads.results[name], RoundAborted)
        assert "stops" in str(threads.results[name])
        assert again[name] == [False, True]
    server.lies(lambda method, member, answer: answer)
    for name in federation.names:
        with federation.open(name) as member:
            member.forgive_aborts()
    assert all(
        len(receipts) == 1
        for receipts in federation.train(lambda name, index: {"weight": 0, "bias": 0}).values()
    )
