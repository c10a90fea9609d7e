"""Uploads replayed from an earlier round, another member or another federation are refused (faults.md 11)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blindsum.aggregator.store.records import ContributionRecord
from blindsum.proto.v1 import round_pb2
from federation_world import CallRefused, World, WorldMember, template

ALL = tuple(f"clinic-{index}" for index in range(5))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path, ready=template())
    yield made
    made.close()


def reach_upload(world: World, number: int = 1) -> None:
    run = world.run_of_rounds
    world.until(lambda: (run().number, run().step) == (number, "upload"))


def begun(member: WorldMember, number: int) -> Any:
    """What a member sends to begin its upload, as if of round `number`."""
    return round_pb2.BeginUploadRequest(
        round=number,
        kind=round_pb2.BULK_KIND_CONTRIBUTION,
        total=len(member.notes.bulk),
        digest=member.notes.digest,
        reply=member.notes.replies["upload"],
    )


def refused(world: World, sender: WorldMember, request: Any) -> None:
    """The call is refused and changes nothing."""
    store = world.server.store
    before = store.find(ContributionRecord)

    async def send() -> None:
        with pytest.raises(CallRefused) as caught:
            await world.unary(sender, "BeginUpload", request)
        assert caught.value.reason

    world.run(send())
    assert store.find(ContributionRecord) == before


def test_fault_11_an_upload_of_another_member(world: World) -> None:
    reach_upload(world)
    first, second = world.members[:2]
    world.act(first)
    refused(world, second, begun(first, 1))
    world.settle()
    assert world.accepted[1][0] == ALL


def test_fault_11_an_upload_of_an_earlier_round(world: World) -> None:
    reach_upload(world)
    member = world.members[0]
    world.act(member)
    old = member.notes
    world.settle()
    number = world.run_of_rounds().number
    assert number > 1
    reach_upload(world, number)
    mine, member.notes = member.notes, old
    request = begun(member, number)
    member.notes = mine
    refused(world, member, request)
    world.settle()
    assert world.accepted[number][0] == ALL


def test_fault_11_an_upload_of_another_federation(world: World, tmp_path: Path) -> None:
    """Its reply is refused of a member of this one, and its members aren't known here at all."""
    folder = tmp_path / "other"
    folder.mkdir()
    other = World(folder)
    other.found()
    for member in other.members:
        member.watch()
    other.idle()
    reach_upload(other)
    foreign = other.members[0]
    other.act(foreign)
    request = begun(foreign, 1)
    other.close()
    reach_upload(world)
    refused(world, world.members[0], request)
    refused(world, foreign, request)
    world.settle()
    assert world.accepted[1][0] == ALL
