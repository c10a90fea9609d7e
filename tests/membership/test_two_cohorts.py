"""A lying server can't run two cohorts at once: a round needs more than half of the roster (faults 36)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from blindsum.client import Member
from blindsum.client.owner import replace_document
from blindsum.client.testing import Federation, small_model
from blindsum.crypto.errors import PolicyViolation
from blindsum.crypto.trust.header import BoundHeader
from blindsum.proto.v1 import round_pb2
from lying_server import LyingServer

Make = Callable[..., Federation]


def smaller_cohorts(floor: int) -> Callable[[str, str, Any], Any]:
    """Every member is told of a round that as few as `floor` members may finish."""

    def lie(method: str, member: str, answer: Any) -> Any:
        if method != "Watch" or not answer.round.header:
            return answer
        changed = round_pb2.WatchResponse()
        changed.CopyFrom(answer)
        header = BoundHeader.parse(answer.round.header).header
        changed.round.header = replace_document(header, n_min=floor).to_bytes()
        return changed

    return lie


def test_no_member_enters_a_round_of_half_of_the_roster(blindsum_federation: Make) -> None:
    server = LyingServer()
    federation = blindsum_federation(6, make_server=server, model=small_model())
    server.lies(smaller_cohorts(3))
    refused = []

    def app(member: Member) -> None:
        with pytest.raises(PolicyViolation, match="n_min: 3 < 4"):
            next(member.rounds())
        refused.append(member.name)

    federation.run(app)
    assert sorted(refused) == federation.names
    assert all(server.called("Answer", name) == 0 for name in federation.names), "nothing was sent"


def test_an_honest_server_asks_for_more_than_half(blindsum_federation: Make) -> None:
    """The policy's n_min is 3; with 6 members no round opens for 3 of them, one opens for 4."""
    federation = blindsum_federation(6, model=small_model())
    floors = []

    def app(member: Member) -> None:
        for rnd in member.rounds():
            floors.append(rnd._session.bound.header.n_min)
            receipt = rnd.submit(rnd.weights(), examples=1)
            assert receipt.survivors >= 4

    three = [federation.open(name) for name in federation.names[:3]]
    for member in three:
        member._connect()
        member._wait(lambda member=member: member._notice is not None)
    assert federation.owner.status().waits_for == "3 of at least 4 members are ready"
    for member in three:
        member.close()
    federation.run(app, federation.names[:5])
    assert set(floors) == {4}


def test_the_owner_may_allow_small_cohorts_and_members_follow(blindsum_federation: Make) -> None:
    federation = blindsum_federation(6, model=small_model("zeros"), policy={"split_cohorts": True})

    def app(member: Member) -> int:
        counts = []
        for rnd in member.rounds():
            after = {name: value + np.float32(0.01) for name, value in rnd.weights().items()}
            counts.append(rnd.submit(after, examples=1).survivors)
        return counts[0]

    assert set(federation.run(app, federation.names[:3]).values()) == {3}


def test_a_plan_for_small_cohorts_is_refused_before_it_is_signed(blindsum_federation: Make) -> None:
    federation = blindsum_federation(6)
    with pytest.raises(PolicyViolation, match="cohort_max: 3 is no more than half of the 6 members"):
        federation.start(small_model(), cohort_max=3)
    assert federation.owner.plan is None
    federation.owner.set_policy(split_cohorts=True)
    federation.start(small_model(), cohort_max=3)
    with pytest.raises(PolicyViolation, match="no more than half"):
        federation.owner.set_policy(split_cohorts=False)


def test_members_that_come_later_raise_the_floor(blindsum_federation: Make) -> None:
    federation = blindsum_federation(3, model=small_model(), plan={"cohort_max": 3})
    federation.admit("member-4", "member-5")
    assert "at least 3 members" in federation.owner.status().waits_for
    federation.admit("member-6")
    assert "no more than half of the 6 members" in federation.owner.status().waits_for
