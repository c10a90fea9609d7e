"""Server and members are killed (SIGKILL) at every step of a round, in every scheme (faults.md 40, 42, 43).

One federation lives through a plan with a kill in each round. A member stops where the table says, which
holds the round at that place; then somebody is killed and started again, and the very same round has to
finish with everybody's update in an exact sum.
"""

from pathlib import Path

import pytest
from blindsum.client.member_folder import MemberFolder
from conformance_schemes import SCHEMES, Row
from process_federation import ProcessFederation

VICTIM = "member-1"
OTHERS = ("member-2", "member-3")

MESSAGES = ("advertise", "share", "confirm", "reveal")
HOMOMORPHIC = ("training", "upload begun", "upload sent", "download", "conclude made")
SEVERAL_FRAMES = ("protect half", "upload half", "open half")
MASKING = (
    "advertise made", "share made", "training", "upload half", "upload sent", "confirm made", "reveal made",
    "download", "conclude made",
)  # fmt: skip


def points(row: Row) -> dict[int, str]:
    """Where round after round is interrupted; the end of the last one ends the plan."""
    names = MASKING if row.masking else HOMOMORPHIC
    if not row.masking and row.scheme != "paillier":  # with which several frames would take too long
        names += SEVERAL_FRAMES
    return dict(enumerate((*names, "concluded"), start=1))


@pytest.mark.parametrize("row", SCHEMES)
def test_the_server_is_killed_at_every_step(tmp_path: Path, row: Row) -> None:
    stops = points(row)
    with ProcessFederation(tmp_path, scheme=row.scheme, size=row.size, rounds=len(stops)) as federation:
        federation.start(*OTHERS)
        federation.start(VICTIM, stops=stops)
        victim = federation.members[VICTIM]
        for number, point in stops.items():
            victim.until("stopped", number, point)
            step = point.split()[0]
            acknowledged = step in (*MESSAGES, "upload")
            if acknowledged:
                federation.wait_for_replies(number, step, len(OTHERS))
            before = {name: len(federation.members[name].events) for name in OTHERS}
            federation.kill_server()
            federation.start_server()
            if acknowledged:
                assert federation.replied(number, step) >= len(OTHERS), "an acknowledged reply was lost"
            victim.go_on()
            if step == "upload":
                for name in OTHERS:
                    member = federation.members[name]
                    member.until("receipt", number)
                    later = [event for event in member.events[before[name] :] if event[1:3] == (number, step)]
                    # All at once is the answer to a question; a byte less would be a new stream.
                    assert all(event[3] == event[4] for event in later), (
                        "an acknowledged upload was sent again"
                    )
        federation.finish()
        for number in stops:
            federation.check_sum(number)
        federation.check_receipts(dict.fromkeys(federation.names, tuple(stops)))
        federation.check_nothing_was_said_in_two_versions()
        assert federation.owner.status().state_round == len(stops)


@pytest.mark.parametrize("row", SCHEMES)
def test_a_member_is_killed_at_every_step_and_comes_back(tmp_path: Path, row: Row) -> None:
    stops = points(row)
    stored: dict[tuple[int, str], bytes] = {}
    with ProcessFederation(tmp_path, scheme=row.scheme, size=row.size, rounds=len(stops)) as federation:
        federation.start(*OTHERS)
        federation.start(VICTIM, stops=stops)
        for number, point in stops.items():
            victim = federation.members[VICTIM]
            victim.until("stopped", number, point)
            victim.kill()
            with MemberFolder(federation.path(VICTIM), read_only=True) as folder:
                for step in MESSAGES:
                    reply = folder.reply(number, step)
                    if reply is not None:
                        stored[number, step] = reply
                round_ = folder.round()
                if round_ is not None and round_.upload:
                    stored[number, "upload"] = round_.upload + round_.upload_digest
            left = {later: where for later, where in stops.items() if later > number}
            federation.start(VICTIM, stops=left)
        federation.finish()
        for number in stops:
            federation.check_sum(number)
        federation.check_receipts(dict.fromkeys(federation.names, tuple(stops)))
        federation.check_nothing_was_said_in_two_versions()
        sent = {(number, step): data for member, number, step, data in federation.sent() if member == VICTIM}
        assert stored.keys() <= sent.keys()
        assert {place: sent[place] for place in stored} == stored, "what was stored before is what was sent"
        for name in federation.names:
            assert {receipt.survivors for receipt in federation.receipts(name)} == {3}


DROPOUTS = {
    1: ("advertise made", 6),
    2: ("share made", 6),
    3: ("training", 6),
    4: ("upload half", 6),
    5: ("confirm made", 7),
    6: ("reveal made", 7),
}
"""Where the last of seven masking members dies, and how many are in the sum."""


def test_masking_goes_on_without_a_member_that_was_killed(tmp_path: Path) -> None:
    """The others finish with the exact sum of the survivors; the next round has the member again."""
    stops = {number: point for number, (point, _) in DROPOUTS.items()}
    last = len(stops) + 1
    with ProcessFederation(
        tmp_path, scheme="masking", size=200_003, rounds=last, members=7, presence_grace=0.5
    ) as federation:
        *others, dies = federation.names
        federation.start(*others)
        federation.start(dies, stops=stops)
        for number, point in stops.items():
            victim = federation.members[dies]
            victim.until("stopped", number, point)
            victim.kill()
            for name in others:
                federation.members[name].until("receipt", number, DROPOUTS[number][1])
            left = {later: where for later, where in stops.items() if later > number}
            federation.start(dies, stops=left)
        federation.finish()
        for number, (_, survivors) in DROPOUTS.items():
            if survivors == len(others):
                federation.check_sum(number, others)
        federation.check_sum(last)
        expected = dict.fromkeys(others, tuple(range(1, last + 1)))
        federation.check_receipts(expected)
        federation.check_nothing_was_said_in_two_versions()


def test_a_member_that_lost_its_masks_is_a_dropout_and_comes_back_in_the_next_round(tmp_path: Path) -> None:
    """Killed while it protects: masks are never applied twice, so it can't take part any more (42)."""
    with ProcessFederation(
        tmp_path, scheme="masking", size=200_003, rounds=2, members=7, deadlines={"upload": 4}
    ) as federation:
        *others, dies = federation.names
        federation.start(*others)
        federation.start(dies, stops={1: "protect half"})
        federation.members[dies].until("stopped", 1)
        federation.members[dies].kill()
        federation.start(dies)
        federation.finish()
        federation.check_sum(1, others)
        federation.check_sum(2)
        federation.check_receipts({**dict.fromkeys(others, (1, 2)), dies: (2,)})
        federation.check_nothing_was_said_in_two_versions()


def test_three_masking_members_bear_no_dropout_and_say_why(tmp_path: Path) -> None:
    """The round is aborted with the reason; the next one has all three, with the updates made before."""
    with ProcessFederation(
        tmp_path, scheme="masking", size=200_003, rounds=1, deadlines={"upload": 3}
    ) as federation:
        federation.start(*OTHERS)
        federation.start(VICTIM, stops={1: "upload half"})
        federation.members[VICTIM].until("stopped", 1)
        federation.members[VICTIM].kill()
        for name in OTHERS:
            federation.members[name].until("progress", 1, "aborted")
        first = federation.owner.status().rounds[-1]
        assert first.outcome.startswith("aborted")
        assert "upload" in first.outcome
        federation.start(VICTIM)
        federation.finish()
        (receipt,) = federation.receipts(VICTIM)
        federation.check_sum(receipt.round)
        federation.check_receipts(dict.fromkeys(federation.names, (receipt.round,)))
        for name in OTHERS:
            offered = [event for event in federation.members[name].events if event[0] == "offered"]
            assert offered == [("offered", 1)], "the app trained once"
        federation.check_nothing_was_said_in_two_versions()
