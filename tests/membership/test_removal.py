"""Who is removed is a dropout of the running round, gets nothing more, and keeps what it had."""

import threading
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from blindsum.aggregator.peer_identity import PeerCheck
from blindsum.client import Member, Owner, Round
from blindsum.client.admission import Watch, nobody
from blindsum.client.member_folder import MemberFolder
from blindsum.client.owner import replace_document
from blindsum.client.receipts import known_rosters, verify_receipts
from blindsum.client.testing import Federation, small_model
from blindsum.crypto.errors import BlindsumError, DocumentError, OpeningFailed, Refused, ServerViolation
from blindsum.crypto.trust import roster as rosters
from blindsum.crypto.trust.documents import parse_signed
from blindsum.crypto.trust.group_key import GroupKey
from blindsum.crypto.trust.header import BoundHeader
from blindsum.crypto.trust.training_state import TrainingState, open_checkpoint, seal_checkpoint
from blindsum.proto.v1 import round_pb2
from lying_server import LyingServer

Make = Callable[..., Federation]
STEP = np.float32(0.01)


def add_step(rnd: Any) -> dict[str, Any]:
    return {name: value + STEP for name, value in rnd.weights().items()}


def outcomes(federation: Federation) -> list[str]:
    return [one.outcome for one in reversed(federation.owner.status().rounds)]


def wait_for_upload_step(member: Member, rnd: Round) -> None:
    """From here on the others can do without this member."""
    live = rnd._session.live
    member._wait(lambda: live.step == "upload" and live.asked)


def train_and_remove(federation: Federation, **how: Any) -> dict[str, list[Any]]:
    """All rounds of the plan; member-4 is removed while the first one waits for its update."""

    def app(member: Member) -> list[Any]:
        receipts = []
        try:
            for rnd in member.rounds():
                with rnd:
                    if member.name == "member-4":
                        wait_for_upload_step(member, rnd)
                        federation.owner.remove("member-4", **how)
                    receipts.append(rnd.submit(add_step(rnd), examples=1))
        except BlindsumError:
            if member.name != "member-4":
                raise
        return receipts

    return federation.run(app)


@pytest.mark.parametrize("scheme", ["masking", pytest.param("bfv", marks=pytest.mark.he)])
def test_a_removed_member_is_a_dropout_and_the_plan_goes_on_under_new_keys(
    blindsum_federation: Make, scheme: str
) -> None:
    federation = blindsum_federation(5, scheme=scheme, model=small_model("zeros"), rounds=3)
    old = federation.owner.roster
    results = train_and_remove(federation)
    assert results["member-4"] == []
    for name in ("member-1", "member-2", "member-3", "member-5"):
        assert [one.survivors for one in results[name]] == [4, 4, 4]
    assert outcomes(federation) == ["concluded"] * 3, "no round was aborted"
    np.testing.assert_allclose(federation.owner.model()["weight"], 3 * STEP, atol=1e-3)
    new = federation.owner.roster
    assert new.epoch == old.epoch + 1
    assert new.group_key != old.group_key
    assert {key.digest for key in new.he_keys}.isdisjoint(key.digest for key in old.he_keys)
    kept = sorted(path.name for path in federation.path("member-1").glob("he-*.key"))
    assert kept == [f"he-{key.digest.hex()}.key" for key in new.he_keys]
    assert not federation.owner.rotation_unfinished


def test_a_removal_at_once_aborts_the_round(blindsum_federation: Make) -> None:
    federation = blindsum_federation(4, model=small_model("zeros"), rounds=1)
    results = train_and_remove(federation, at_once=True)
    assert results["member-4"] == []
    assert [one.survivors for one in results["member-1"]] == [3]
    assert outcomes(federation)[0].startswith("aborted")


def test_a_removal_that_did_not_wait_is_finished_later(blindsum_federation: Make) -> None:
    """The owner's machine is switched off after it has removed a member: the plan rests until it is back."""
    federation = blindsum_federation(5, model=small_model("zeros"), rounds=2)
    owner = federation.owner

    def first(member: Member) -> int:
        done = 0
        try:
            for rnd in member.rounds():
                with rnd:
                    if member.name == "member-4":
                        wait_for_upload_step(member, rnd)
                        assert owner.remove("member-4", wait=False) is False
                    rnd.submit(add_step(rnd), examples=1)
                    done += 1
                    break
        except BlindsumError:
            assert member.name == "member-4"
        return done

    assert federation.run(first) == {name: int(name != "member-4") for name in federation.names}
    assert owner.rotation_unfinished
    assert "group key has changed" in owner.status().waits_for
    with federation.open("member-1") as member:
        np.testing.assert_allclose(member.latest_state()["weight"], STEP, atol=1e-3)
    owner.close()
    stop = threading.Event()
    for event in Watch(owner.path, nobody, every=0.1, stop=stop).events():
        assert event.kind == "training", event
        stop.set()
    federation.owner = owner = Owner.open(owner.path)
    assert not owner.rotation_unfinished
    federation.names.remove("member-4")

    def rest(member: Member) -> int:
        return sum(1 for rnd in member.rounds() if rnd.submit(add_step(rnd), examples=1))

    assert set(federation.run(rest).values()) == {1}
    np.testing.assert_allclose(owner.model()["weight"], 2 * STEP, atol=1e-3)


def test_open_streams_end_with_the_removal(blindsum_federation: Make) -> None:
    federation = blindsum_federation(4)
    with federation.open("member-4") as member:
        member._connect(watch=False)
        assert member._line is not None
        stream = member._line.watch(lambda _: None)
        next(stream)
        federation.owner.remove("member-4")
        with pytest.raises(Refused, match="isn't in the roster"):
            for _ in stream:
                pass
        with pytest.raises(Refused, match="isn't in the roster"):
            member._line.call(member._line.stub.GetEnvelopes, round_pb2.GetEnvelopesRequest(), what="keys")


def test_a_download_in_progress_ends_with_the_removal(blindsum_federation: Make) -> None:
    federation = blindsum_federation(4, model=small_model("zeros", size=4_000_000))
    with federation.open("member-4") as member:
        member._connect(watch=False)
        assert member._line is not None
        request = round_pb2.DownloadRequest(kind=round_pb2.BULK_KIND_CHECKPOINT)
        parts = iter(member._line.stub.Download(request))
        next(parts)
        federation.owner.remove("member-4")
        with pytest.raises(grpc.RpcError, match="isn't in the roster"):
            list(parts)


def test_old_states_stay_readable_and_new_ones_do_not(blindsum_federation: Make) -> None:
    federation = blindsum_federation(4, model=small_model(), rounds=2)
    owner = federation.owner

    def one_round(member: Member) -> None:
        for rnd in member.rounds():
            rnd.submit(add_step(rnd), examples=1)
            break

    federation.run(one_round)
    (info, sealed), before = owner._owner_checkpoint(), owner._newest_state()
    owner.remove("member-4", at_once=True)
    (later, resealed), after = owner._owner_checkpoint(), owner._newest_state()
    with MemberFolder(federation.path("member-4"), read_only=True) as folder:
        held = folder.group_key(1)
        assert folder.group_key(2) is None
    assert held is not None

    def opened(key: GroupKey, said: Any, pieces: list[bytes], index: int) -> TrainingState:
        return open_checkpoint(
            pieces,
            key,
            said.sealing_context,
            federation=owner.federation.id,
            index=index,
            digest=said.state,
        )

    assert np.array_equal(opened(held, info, sealed, 1).values, before.values)
    with pytest.raises(OpeningFailed):
        opened(held, later, resealed, 0)
    assert np.array_equal(opened(owner.group_key, later, resealed, 0).values, after.values)


def test_a_round_under_the_old_keys_is_refused_by_who_knows_of_the_new_ones(
    blindsum_federation: Make,
) -> None:
    server = LyingServer()
    federation = blindsum_federation(4, make_server=server, model=small_model(), rounds=2)
    old = federation.owner.roster
    federation.owner.remove("member-4")
    federation.names.remove("member-4")

    def lie(method: str, member: str, answer: Any) -> Any:
        if method != "Watch" or member != "member-1" or not answer.round.header:
            return answer
        changed = round_pb2.WatchResponse()
        changed.CopyFrom(answer)
        header = BoundHeader.parse(answer.round.header).header
        changed.round.header = replace_document(header, group_key=old.group_key).to_bytes()
        return changed

    server.lies(lie)
    errors = []

    def app(member: Member) -> None:
        try:
            for rnd in member.rounds():
                rnd.submit(add_step(rnd), examples=1)
        except ServerViolation as error:
            errors.append((member.name, error.check))
            raise

    with pytest.raises(ServerViolation):
        federation.run(app, seconds=30)
    assert errors == [("member-1", "group key")]


def test_an_older_roster_is_refused_even_though_the_owner_signed_it(blindsum_federation: Make) -> None:
    server = LyingServer()
    federation = blindsum_federation(4, make_server=server, model=small_model(), rounds=1)
    old = federation.owner.signed(rosters.KIND).to_bytes()
    federation.owner.remove("member-4")
    with federation.open("member-1") as member:
        member.latest_state()
    digest = parse_signed(old).digest
    server.serves(digest, old)

    def lie(method: str, member: str, answer: Any) -> Any:
        if method == "Watch":
            answer.roster = digest
        return answer

    server.lies(lie)
    with federation.open("member-1") as member, pytest.raises(DocumentError, match="doesn't follow version"):
        next(member.rounds())


def test_a_server_that_goes_on_serving_a_removed_member_gives_it_nothing(
    blindsum_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps the member connected and shows it the new roster: there is neither a place nor a key in it."""
    server = LyingServer()
    federation = blindsum_federation(4, make_server=server, model=small_model(), rounds=2)
    with federation.open("member-4") as member:
        member.latest_state()
    federation.owner.remove("member-4")
    monkeypatch.setattr(PeerCheck, "require_current", lambda _self, _peer: None)
    federation.stop_server()
    federation.start_server()
    with federation.open("member-4") as member, pytest.raises(DocumentError, match="isn't in roster version"):
        member.latest_state()


def test_a_finished_model_stays_readable_after_the_keys_changed(blindsum_federation: Make) -> None:
    federation = blindsum_federation(4, model=small_model("zeros"), rounds=1)
    federation.train(lambda name, index: dict.fromkeys(small_model(), STEP))
    federation.owner.remove("member-4")
    np.testing.assert_allclose(federation.owner.model()["weight"], STEP, atol=1e-3)
    with federation.open("member-1") as member:
        np.testing.assert_allclose(member.latest_state()["weight"], STEP, atol=1e-3)
    federation.admit("newcomer")
    with (
        federation.open("newcomer") as member,
        pytest.raises(DocumentError, match="before this member came"),
    ):
        member.latest_state()


def test_receipts_of_a_removed_member_still_verify(blindsum_federation: Make) -> None:
    federation = blindsum_federation(4, model=small_model(), rounds=2)

    def one_round(member: Member) -> list[bytes]:
        for rnd in member.rounds():
            return [rnd.submit(add_step(rnd), examples=1).signed]
        return []

    signed = federation.run(one_round)
    federation.owner.remove("member-4", at_once=True)
    with federation.open("member-1") as member:
        member.latest_state()
    with MemberFolder(federation.path("member-1"), read_only=True) as folder:
        known = known_rosters(folder)
    assert [roster.epoch for roster in known] == [1, 2]
    assert len(verify_receipts(signed["member-4"], known)) == 1
    with pytest.raises(DocumentError, match="member-4"):
        verify_receipts(signed["member-4"], known[-1:])


def test_sealing_is_bound_to_the_epoch(blindsum_federation: Make) -> None:
    """The same state under two epochs' keys: equal values, and neither digest nor bytes tell so."""
    federation = blindsum_federation(3, model=small_model())
    owner = federation.owner
    state, first = owner._newest_state(), owner.group_key
    owner.rotate()
    again, second = owner._newest_state(), owner.group_key
    assert np.array_equal(state.values, again.values)
    assert state.digest(first) != again.digest(second)
    one = b"".join(seal_checkpoint(state, first, bytes(32)))
    two = b"".join(seal_checkpoint(again, second, bytes(32)))
    assert len(one) == len(two)
    assert one != two
