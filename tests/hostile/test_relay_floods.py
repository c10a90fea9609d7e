"""Members that misuse what the server relays for them: models and forwarded examples."""

import hashlib
import queue
import shutil
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from blindsum.client.federation_view import FederationView
from blindsum.client.hard_examples import Intake
from blindsum.client.hard_examples.example_line import ExampleLine
from blindsum.client.hard_examples.sealed_example import SealedExample, new_id
from blindsum.client.testing import Federation
from blindsum.client.transport import refusal_of
from blindsum.crypto.errors import RefusalReason, Refused
from blindsum.proto.v1 import models_pb2 as wire
from blindsum.proto.v1.models_pb2_grpc import ModelServiceStub

MODEL = bytes(300_000)
QUICK = {"stall_seconds": 0.5, "upload_minimum_rate": 1 << 20}


@pytest.fixture(scope="module")
def federation() -> Iterator[Federation]:
    with Federation(["hospital", "clinic"], server_settings=QUICK) as made:
        yield made


@pytest.fixture
def clinic(federation: Federation) -> Iterator[FederationView]:
    with FederationView.open(federation.path("clinic")) as view:
        yield view


class Publishing:
    """A publication in progress, which sends a part whenever the test says so."""

    def __init__(self, view: FederationView, name: str) -> None:
        self._parts: queue.SimpleQueue[wire.PublishModelRequest | None] = queue.SimpleQueue()
        start = wire.PublishModelStart(
            name=name, version=1, total=len(MODEL), digest=hashlib.sha256(MODEL).digest()
        )
        self._parts.put(wire.PublishModelRequest(start=start))
        self._call = ModelServiceStub(view.line.channel).PublishModel.future(iter(self._parts.get, None))

    def send(self, size: int) -> None:
        self._parts.put(wire.PublishModelRequest(data=MODEL[:size]))

    def refused(self) -> Refused:
        """How the server ended it."""
        with pytest.raises(grpc.RpcError) as caught:
            self._call.result(timeout=30)
        self._parts.put(None)
        refusal = refusal_of(caught.value)
        assert refusal is not None, caught.value
        return refusal

    def cancel(self) -> None:
        self._parts.put(None)
        self._call.cancel()


def spools(folder: Path) -> list[Path]:
    return sorted((folder / "blobs/spool").iterdir())


def until_spooled(folder: Path, count: int) -> None:
    while sum(path.stat().st_size > 0 for path in spools(folder)) < count:
        pass


def test_a_publication_that_stalls_is_cut(federation: Federation, clinic: FederationView) -> None:
    stalled = Publishing(clinic, "stalled")
    stalled.send(1000)
    assert stalled.refused().reason is RefusalReason.LIMIT
    assert spools(federation.folder / "server") == []


def test_a_member_has_no_more_than_two_publications_in_progress(
    federation: Federation, clinic: FederationView
) -> None:
    """Each may have 256 MB on the disk before anybody looks at it."""
    running = [Publishing(clinic, f"model-{number}") for number in range(2)]
    for one in running:
        one.send(1000)
    until_spooled(federation.folder / "server", 2)
    third = Publishing(clinic, "model-2")
    assert "in progress" in third.refused().text
    for one in running:
        one.refused()


def test_what_a_killed_server_had_of_a_publication_is_deleted(
    federation: Federation, clinic: FederationView
) -> None:
    folder = federation.folder / "server"
    running = Publishing(clinic, "killed")
    running.send(1000)
    until_spooled(folder, 1)
    as_killed = federation.folder / "as-killed"
    shutil.copytree(folder, as_killed)
    running.cancel()
    assert len(spools(as_killed)) == 1
    federation.stop_server()
    shutil.rmtree(folder)
    as_killed.rename(folder)
    federation.start_server()
    assert spools(folder) == []


def test_a_member_cannot_fill_the_list_of_another(
    federation: Federation, clinic: FederationView, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is withdrawn stays listed until its receiver deleted it: it counts as what waits does."""
    monkeypatch.setattr("blindsum.aggregator.forwarded_examples.MAX_WAITING", 3)
    line = ExampleLine(clinic)

    def put_and_withdraw() -> None:
        example = SealedExample(new_id(), "hospital", bytes(2000))
        line.put(example)
        line.withdraw(example.id)

    for _ in range(3):
        put_and_withdraw()
    with pytest.raises(Refused) as caught:
        put_and_withdraw()
    assert caught.value.reason is RefusalReason.LIMIT
    with (
        FederationView.open(federation.path("hospital")) as hospital,
        Intake(tmp_path, purpose="any") as intake,
    ):
        intake.collect(hospital)
    put_and_withdraw()
