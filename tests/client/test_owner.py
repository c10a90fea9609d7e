"""The owner's side against the real server: who comes in, who goes, what is signed."""

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blindsum.client import FolderInUse, Member, Owner, join
from blindsum.client.joining import poll, read_invitation
from blindsum.client.owner import replace_document
from blindsum.client.testing import Federation, small_model
from blindsum.crypto.canonical import encode_document
from blindsum.crypto.errors import (
    DocumentError,
    EncodingError,
    ParameterRefused,
    PolicyViolation,
    Refused,
)
from blindsum.crypto.primitives.derivation import system_random

Make = Callable[..., Federation]


def push(name: str, index: int) -> dict[str, Any]:
    return {"weight": np.float32(0.01), "bias": np.float32(0.01)}


def test_the_owners_files_are_private_and_open_once(blindsum_federation: Make) -> None:
    federation = blindsum_federation(3, model=small_model())
    for path in (federation.folder / "owner").rglob("*"):
        wanted = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path
    with pytest.raises(FolderInUse):
        Owner.open(federation.folder / "owner")


def test_a_request_without_the_invitations_token_is_not_admitted(
    blindsum_federation: Make, tmp_path: Path
) -> None:
    federation = blindsum_federation(0)
    path = federation.owner.invite("clinic")
    stolen = replace_document(read_invitation(path), token=system_random(32))
    (tmp_path / "forged.json").write_bytes(encode_document(stolen))
    join(tmp_path / "forged.json", tmp_path / "thief", wait=False)
    (pending,) = federation.owner.pending()
    assert pending.problem == "there is no such invitation"
    with pytest.raises(DocumentError, match="no such invitation"):
        federation.owner.admit("clinic")
    assert federation.owner.admit() == []
    join(path, tmp_path / "clinic", wait=False)
    assert federation.owner.admit() == ["clinic"]
    assert poll(tmp_path / "clinic")
    assert federation.owner.invited() == []


def test_asking_again_sends_the_same_request(blindsum_federation: Make, tmp_path: Path) -> None:
    federation = blindsum_federation(0)
    invitation = federation.owner.invite("clinic")
    first = join(invitation, tmp_path / "clinic", wait=False)
    assert join(invitation, tmp_path / "clinic", wait=False) == first
    assert len(federation.owner.pending()) == 1
    assert federation.owner.pending()[0].fingerprint == first


def test_an_expired_or_foreign_invitation_is_refused(blindsum_federation: Make, tmp_path: Path) -> None:
    federation = blindsum_federation(0)
    expired = federation.owner.invite("clinic", days=-1)
    with pytest.raises(DocumentError, match="expired"):
        join(expired, tmp_path / "clinic", wait=False)
    join(federation.owner.invite("one"), tmp_path / "one", wait=False)
    with pytest.raises(DocumentError, match="belongs to one"):
        join(federation.owner.invite("two"), tmp_path / "one", wait=False)


def test_a_refused_applicant_hears_why(blindsum_federation: Make, tmp_path: Path) -> None:
    federation = blindsum_federation(0)
    join(federation.owner.invite("clinic"), tmp_path / "clinic", wait=False)
    assert not poll(tmp_path / "clinic")
    assert federation.owner.refuse("clinic", "wrong telephone number") == 1
    with pytest.raises(Refused, match="wrong telephone number"):
        poll(tmp_path / "clinic")


def test_a_newcomer_starts_from_the_current_model(blindsum_federation: Make) -> None:
    federation = blindsum_federation(3, model=small_model(), rounds=3)

    def first_round(member: Member) -> None:
        for rnd in member.rounds():
            after = {name: value + np.float32(0.01) for name, value in rnd.weights().items()}
            rnd.submit(after, examples=1)
            break

    federation.run(first_round)
    federation.admit("newcomer")
    model = federation.owner.model()
    with federation.open("newcomer") as member:
        assert np.array_equal(member.latest_state()["weight"], model["weight"])

    def rest(member: Member) -> list[Any]:
        receipts = []
        for rnd in member.rounds():
            with rnd:
                receipts.append(rnd.submit(rnd.weights(), examples=1))
        return receipts

    results = federation.run(rest)
    receipts = {name: results[name][-1].receipt for name in federation.names}
    assert len(set(receipts.values())) == 1


def test_removal_changes_the_keys_and_training_goes_on(blindsum_federation: Make) -> None:
    federation = blindsum_federation(4, model=small_model("zeros"), rounds=3)

    def some(member: Member) -> None:
        for rnd in member.rounds():
            after = {name: value + np.float32(0.01) for name, value in rnd.weights().items()}
            rnd.submit(after, examples=1)
            break

    federation.run(some)
    before = federation.owner.model()
    old_key = federation.owner.group_key.key_id
    federation.owner.remove("member-4")
    assert federation.owner.group_key.key_id != old_key
    np.testing.assert_array_equal(federation.owner.model()["weight"], before["weight"])
    with federation.open("member-4") as member, pytest.raises(Refused, match="member-4"):
        next(member.rounds())
    federation.names.remove("member-4")

    def rest(member: Member) -> int:
        done = 0
        for rnd in member.rounds():
            with rnd:
                after = {name: value + np.float32(0.01) for name, value in rnd.weights().items()}
                rnd.submit(after, examples=1)
                done += 1
        return done

    assert set(federation.run(rest).values()) == {2}
    np.testing.assert_allclose(federation.owner.model()["weight"], 0.03, atol=1e-3)


def test_a_new_policy_takes_a_running_plan_along(blindsum_federation: Make) -> None:
    federation = blindsum_federation(3, model=small_model())
    policy = federation.owner.set_policy(max_weight_ratio=32)
    assert policy.version == 2
    assert len(federation.train(push)["member-1"]) == 1
    federation.owner.renew()
    assert federation.owner.policy.version == 3


def test_a_second_plan_follows_the_first(blindsum_federation: Make) -> None:
    federation = blindsum_federation(3, model=small_model())
    federation.train(push)
    federation.start(small_model("zeros"), name="second", rounds=1)
    results = federation.train(push)
    assert results["member-1"][0].receipt.plan_name == "second"
    np.testing.assert_allclose(federation.owner.model()["bias"], 0.01, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"rounds": 0}, ParameterRefused, "rounds"),
        ({"rounds": 1, "scheme": "plain"}, ParameterRefused, "scheme"),
        ({"rounds": 1, "scheme": "bfv"}, PolicyViolation, "scheme"),
        ({"rounds": 1, "bits": 32}, PolicyViolation, "bits"),
        ({"rounds": 1, "cohort_min": 2}, ParameterRefused, "cohort_min"),
        ({"rounds": 1, "cohort_max": 1000}, PolicyViolation, "cohort_max"),
        ({"rounds": 1, "weight_ratio": 100}, PolicyViolation, "weight_ratio"),
        ({"rounds": 1, "strategy": "median"}, ParameterRefused, "median"),
        ({"rounds": 1, "shared": ["nothing.*"]}, EncodingError, "nothing"),
        ({"rounds": 1, "metrics": {"loss": (1.0, 0.0)}}, ParameterRefused, "loss"),
    ],
)
def test_plans_that_make_no_sense_are_refused_before_they_are_signed(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], text: str
) -> None:
    with Owner.init(
        tmp_path / "owner",
        "f",
        enrolment_address="localhost:1",
        member_address="localhost:2",
        ca="",
        schemes=["masking"],
    ) as owner:
        with pytest.raises(error, match=text):
            owner.start_plan("p", small_model(), **changes)
        assert owner.plan is None


@pytest.mark.parametrize(
    "policy",
    [{"n_min": 1}, {"n_min": 5, "n_max": 4}, {"schemes": ["plain"]}, {"schemes": []}, {"gamma": 1000}],
)
def test_policies_that_are_unsafe_are_refused(tmp_path: Path, policy: dict[str, Any]) -> None:
    with pytest.raises(ParameterRefused):
        Owner.init(
            tmp_path / "owner",
            "f",
            enrolment_address="localhost:1",
            member_address="localhost:2",
            ca="",
            **policy,
        )
    assert not (tmp_path / "owner").exists()


def test_a_lost_answer_to_a_publication_is_no_problem(
    blindsum_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner's process dies after the server has taken a roster: the next command goes on from there."""
    federation = blindsum_federation(3, model=small_model())
    owner = federation.owner
    version = owner.roster.version

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(owner._folder, "keep", die)
    with pytest.raises(KeyboardInterrupt):
        owner.renew()
    monkeypatch.undo()
    owner.renew()
    assert owner.roster.version > version
    assert owner.status().roster_version == owner.roster.version


def test_a_token_admits_once_even_if_the_answer_to_the_admission_was_lost(
    blindsum_federation: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = blindsum_federation(0)
    owner = federation.owner
    invitation = owner.invite("clinic")
    join(invitation, tmp_path / "clinic", wait=False)

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(owner._folder, "keep", die)
    with pytest.raises(KeyboardInterrupt):
        owner.admit("clinic")
    monkeypatch.undo()
    join(invitation, tmp_path / "copy", wait=False)
    assert owner.admit() == []
    assert owner.invited() == []
    assert [one.problem for one in owner.pending()] == ["there is no such invitation"]
