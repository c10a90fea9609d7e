"""Examples from a clinic's review queue to the hospital's intake, through the real server."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from blindsum.client.federation_view import FederationView
from blindsum.client.hard_examples import (
    AuditBroken,
    Consent,
    ConsentMissing,
    Example,
    ForwardingOff,
    Intake,
    QuotaReached,
    ReviewQueue,
    WrongState,
)
from blindsum.client.hard_examples.example_line import ExampleLine
from blindsum.client.hard_examples.sealed_example import BLOCK, Letter, SealedExample, new_id, seal_example
from blindsum.client.testing import Federation
from blindsum.crypto.canonical import encode_document
from blindsum.crypto.errors import RefusalReason, Refused

PURPOSE = "improve the pneumonia model"


@pytest.fixture(scope="module")
def federation() -> Iterator[Federation]:
    with Federation(["hospital", "clinic", "other"]) as made:
        yield made


@pytest.fixture
def site(federation: Federation, tmp_path: Path) -> Iterator[Any]:
    """A clinic's queue and the hospital's intake in fresh folders, with both members' lines."""
    (tmp_path / "clinic").mkdir()
    (tmp_path / "hospital").mkdir()
    (tmp_path / "earlier").mkdir()
    clock = SimpleNamespace(now=time.time())
    with (
        FederationView.open(federation.path("clinic")) as clinic,
        FederationView.open(federation.path("hospital")) as hospital,
        ReviewQueue(tmp_path / "clinic", now=lambda: clock.now) as queue,
        Intake(tmp_path / "hospital", purpose=PURPOSE, shape=(28, 28)) as intake,
    ):
        with Intake(tmp_path / "earlier", purpose="nothing") as earlier:
            earlier.collect(hospital)  # what earlier tests left
        yield SimpleNamespace(
            clinic=clinic, hospital=hospital, queue=queue, intake=intake, folder=tmp_path, clock=clock
        )


def image(seed: int, label: int = 1) -> Example:
    return Example.of(np.random.default_rng(seed).random((28, 28)), label)


def put_in(queue: ReviewQueue, example: Example) -> bytes:
    return queue.propose(
        example, doubt=0.5, novelty=80.0, reason="most doubtful", model="chest", model_version=1
    )


def consent(queue: ReviewQueue, identifier: bytes, **changes: Any) -> Consent:
    values: dict[str, Any] = {
        "content": queue.one(identifier).digest,
        "recipient": "hospital",
        "purpose": PURPOSE,
        "reference": "form 17",
        "given": int(time.time()) - 10,
        "until": int(time.time()) + 3600,
    }
    return Consent(**{**values, **changes})


def approve(queue: ReviewQueue, identifier: bytes) -> None:
    queue.approve(identifier, consent(queue, identifier), reviewer="dr-b")


def stored(federation: Federation) -> bytes:
    """Every byte that the server keeps."""
    files = [path for path in (federation.folder / "server").rglob("*") if path.is_file()]
    return b"".join(path.read_bytes() for path in files)


def blobs(federation: Federation) -> list[Path]:
    return sorted((federation.folder / "server/blobs/example").iterdir())


def test_an_example_goes_from_queue_to_intake_and_the_server_has_only_ciphertext(
    federation: Federation, site: Any
) -> None:
    site.queue.enable("hospital", PURPOSE, quota=5)
    example = image(1)
    identifier = put_in(site.queue, example)
    approve(site.queue, identifier)
    assert site.queue.forward(site.clinic) == [identifier]
    seen = stored(federation)
    assert site.queue.one(identifier).example is None, "what was sent isn't kept"
    assert example.pixels[:64] not in seen
    assert b"form 17" not in seen
    assert PURPOSE.encode() not in seen
    assert identifier in seen, "the scan sees what the server does store"
    (changed,) = site.intake.collect(site.hospital)
    (letter,) = site.intake.accepted()
    assert (changed.state, letter.sender, letter.example) == ("accepted", "clinic", example)
    assert np.array_equal(letter.example.array(), example.array())
    assert not any(identifier.hex() in path.name for path in blobs(federation)), "the server let go of it"
    assert site.intake.collect(site.hospital) == []
    kinds = [line.kind for line in site.queue.audit()]
    assert kinds == ["enabled", "proposed", "approved", "forwarded"]


def test_forwarding_is_off_until_it_is_switched_on(site: Any) -> None:
    with pytest.raises(ForwardingOff):
        put_in(site.queue, image(2))
    site.queue.enable("hospital", PURPOSE, quota=5)
    identifier = put_in(site.queue, image(2))
    approve(site.queue, identifier)
    site.queue.disable()
    with pytest.raises(ForwardingOff):
        site.queue.forward(site.clinic)
    assert ExampleLine(site.clinic).forwarded().get(identifier) is None


def test_what_nobody_approved_stays(site: Any) -> None:
    site.queue.enable("hospital", PURPOSE, quota=5)
    waiting, refused = put_in(site.queue, image(3)), put_in(site.queue, image(4))
    site.queue.refuse(refused, reviewer="dr-b")
    assert site.queue.forward(site.clinic) == []
    assert site.queue.one(waiting).state == "proposed"
    assert site.queue.one(refused).example is None
    with pytest.raises(WrongState, match="proposed before"):
        put_in(site.queue, image(4))


@pytest.mark.parametrize(
    "changes",
    [
        {"content": bytes(32)},
        {"recipient": "other"},
        {"purpose": "sell it"},
        {"until": int(time.time()) - 5},
        {"given": int(time.time()) + 3600, "until": int(time.time()) + 7200},
    ],
    ids=["another image", "another recipient", "another purpose", "over", "not yet"],
)
def test_a_consent_that_does_not_cover_the_example_is_none(site: Any, changes: dict[str, Any]) -> None:
    site.queue.enable("hospital", PURPOSE, quota=5)
    identifier = put_in(site.queue, image(5))
    with pytest.raises(ConsentMissing):
        site.queue.approve(identifier, consent(site.queue, identifier, **changes), reviewer="dr-b")
    assert site.queue.forward(site.clinic) == []


def test_consent_is_checked_again_when_it_leaves(site: Any) -> None:
    site.queue.enable("hospital", PURPOSE, quota=5)
    identifier = put_in(site.queue, image(6))
    approve(site.queue, identifier)
    site.clock.now += 2 * 3600
    with pytest.raises(ConsentMissing):
        site.queue.forward(site.clinic)
    assert site.queue.one(identifier).state == "proposed"
    assert ExampleLine(site.clinic).forwarded().get(identifier) is None


def test_the_quota_holds(site: Any) -> None:
    site.queue.enable("hospital", PURPOSE, quota=2)
    for seed in (7, 8, 9):
        approve(site.queue, put_in(site.queue, image(seed)))
    with pytest.raises(QuotaReached):
        site.queue.forward(site.clinic)
    assert (len(site.queue.examples("forwarded")), len(site.queue.examples("approved"))) == (2, 1)
    assert site.queue.used == 2


def test_what_was_proposed_under_an_earlier_switch_counts_too(site: Any) -> None:
    site.queue.enable("hospital", PURPOSE, quota=5)
    for seed in (60, 61, 62):
        approve(site.queue, put_in(site.queue, image(seed)))
    site.clock.now += 60
    site.queue.enable("hospital", PURPOSE, quota=1)
    with pytest.raises(QuotaReached):
        site.queue.forward(site.clinic)
    assert (len(site.queue.examples("forwarded")), site.queue.used) == (1, 1)


def test_withdrawal_deletes_at_both_ends(federation: Federation, site: Any) -> None:
    site.queue.enable("hospital", PURPOSE, quota=5)
    before, after = put_in(site.queue, image(10)), put_in(site.queue, image(11))
    for identifier in (before, after):
        approve(site.queue, identifier)
    site.queue.forward(site.clinic)
    assert site.queue.withdraw(before, site.clinic) == "withdrawn"
    assert not any(before.hex() in path.name for path in blobs(federation)), "deleted at the server at once"
    site.intake.collect(site.hospital)
    assert [letter.id for letter in site.intake.accepted()] == [after], "the withdrawn one never arrived"
    pixels = site.intake.one(after).letter.example.pixels
    site.queue.withdraw(after, site.clinic)
    site.intake.collect(site.hospital)
    assert site.intake.accepted() == []
    assert site.intake.one(after).letter is None
    assert pixels[:64] not in (site.folder / "hospital/examples-in.db").read_bytes()
    site.queue.refresh(site.clinic)
    assert [site.queue.one(one).state for one in (before, after)] == ["deleted", "deleted"]
    assert sorted(line.kind for line in site.intake.audit()) == ["accepted", "deleted", "deleted"]


def test_withdrawn_between_fetching_and_confirming(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site.queue.enable("hospital", PURPOSE, quota=5)
    identifier = put_in(site.queue, image(12))
    approve(site.queue, identifier)
    site.queue.forward(site.clinic)
    fetch = ExampleLine.get

    def fetch_then_withdraw(line: ExampleLine, wanted: bytes) -> bytes:
        data = fetch(line, wanted)
        site.queue.withdraw(identifier, site.clinic)
        return data

    monkeypatch.setattr(ExampleLine, "get", fetch_then_withdraw)
    site.intake.collect(site.hospital)
    assert site.intake.accepted() == []
    site.queue.refresh(site.clinic)
    assert site.queue.one(identifier).state == "deleted"


def send(site: Any, example: Example, sender: FederationView, **changes: Any) -> bytes:
    """Straight to the wire, past the queue: what a careless or hostile member could send."""
    word = Consent(
        content=example.digest(), recipient="hospital", purpose=PURPOSE, reference="x", given=1, until=1 << 39
    )
    values: dict[str, Any] = {
        "federation": sender.roster.federation, "id": new_id(), "sender": sender.name,
        "recipient": "hospital",
        "model": "chest", "model_version": 1, "example": example, "doubt": 0.5, "novelty": 1.0,
        "reason": "x",
        "consent": encode_document(word), "sent": 1,
    }  # fmt: skip
    letter = Letter(**{**values, **changes})
    ExampleLine(sender).put(seal_example(letter, sender.identity, sender.roster))
    return letter.id


def test_intake_refuses_copies_and_holds_disagreement(federation: Federation, site: Any) -> None:
    own = np.random.default_rng(20).random((1, 28, 28), dtype=np.float32)
    sure = {"predict": lambda _: np.array([0.99, 0.01]), "novelty_threshold": 10.0, "own": own}
    (site.folder / "checked").mkdir()
    with (
        Intake(site.folder / "checked", purpose=PURPOSE, **sure) as intake,
        FederationView.open(federation.path("other")) as other,
    ):
        good = send(site, image(21, label=0), site.clinic)
        foreign = send(site, image(22, label=1), site.clinic, novelty=50.0)
        odd = send(site, image(23, label=1), site.clinic, novelty=2.0)
        copy = send(site, Example.of(own[0] * 0.9, 0), site.clinic)
        intake.collect(site.hospital)
        again = send(site, image(21, label=0), other)
        intake.collect(site.hospital)
        other_label = send(site, image(21, label=1), other)
        no_consent = send(site, image(24), site.clinic, consent=encode_document(_consent_for(image(25))))
        intake.collect(site.hospital)
        state = {one.id: one.state for one in intake.examples()}
        assert [state[one] for one in (good, foreign)] == ["accepted", "accepted"]
        assert [state[one] for one in (odd, other_label)] == ["held", "held"]
        assert [state[one] for one in (copy, again, no_consent)] == ["refused", "refused", "refused"]
        assert all(intake.one(one).letter is None for one in (copy, again, no_consent))
        intake.decide(odd, accept=True, reviewer="dr-h")
        assert odd in [letter.id for letter in intake.accepted()]


def _consent_for(example: Example) -> Consent:
    return Consent(
        content=example.digest(), recipient="hospital", purpose=PURPOSE, reference="x", given=1, until=1 << 39
    )


def test_a_forged_sender_is_refused(federation: Federation, site: Any) -> None:
    """A member that seals in another's name: the signature inside isn't that other's."""
    with FederationView.open(federation.path("other")) as other:
        example = image(30)
        letter = Letter(
            other.roster.federation, new_id(), "clinic", "hospital", "m", 1, example, 0.5, 1.0, "x",
            encode_document(_consent_for(example)), 1,
        )  # fmt: skip
        sealed = seal_example(letter, other.identity, other.roster)
        ExampleLine(other).put(sealed)
        (received,) = site.intake.collect(site.hospital)
    assert received.state == "refused"
    assert site.intake.accepted() == []


def test_the_server_keeps_members_apart(federation: Federation, site: Any) -> None:
    identifier = send(site, image(31), site.clinic)
    with FederationView.open(federation.path("other")) as other:
        line = ExampleLine(other)
        assert line.waiting() == []
        for call in (line.get, line.withdraw, line.confirm_taken):
            with pytest.raises(Refused) as caught:
                call(identifier)
            assert caught.value.reason is RefusalReason.OUT_OF_RANGE
    site.intake.collect(site.hospital)


def test_the_server_refuses_what_cannot_be_ciphertext(site: Any) -> None:
    line = ExampleLine(site.clinic)
    for sealed, reason in (
        (b"x" * 100, RefusalReason.WRONG_SIZE),
        (b"x" * (600 * 1024), RefusalReason.WRONG_SIZE),
    ):
        with pytest.raises(Refused) as caught:
            line.put(SealedExample(new_id(), "hospital", sealed))
        assert caught.value.reason is reason
    for recipient in ("nobody", "clinic"):
        with pytest.raises(Refused) as caught:
            line.put(SealedExample(new_id(), recipient, bytes(4096)))
        assert caught.value.reason is RefusalReason.UNKNOWN_MEMBER
    with pytest.raises(TypeError):
        line.put(image(1))  # type: ignore[arg-type]


def test_the_same_bytes_are_stored_once_and_others_under_the_id_are_refused(site: Any) -> None:
    line, identifier = ExampleLine(site.clinic), new_id()
    line.put(SealedExample(identifier, "hospital", bytes(4096)))
    line.put(SealedExample(identifier, "hospital", bytes(4096)))
    with pytest.raises(Refused) as caught:
        line.put(SealedExample(identifier, "hospital", b"1" * 4096))
    assert caught.value.reason is RefusalReason.CONFLICT
    line.withdraw(identifier)
    site.intake.collect(site.hospital)


def test_the_size_says_nothing_of_the_image(site: Any) -> None:
    sizes = set()
    for shape in ((28, 28), (29, 28), (31, 27)):
        example = Example.of(np.zeros(shape), 1, {"Modality": "CR"})
        letter = Letter(
            site.clinic.roster.federation,
            new_id(),
            "clinic",
            "hospital",
            "m",
            1,
            example,
            0.5,
            1.0,
            "x",
            b"",
            1,
        )
        sizes.add(len(seal_example(letter, site.clinic.identity, site.clinic.roster).sealed))
    assert len(sizes) == 1
    assert (sizes.pop() - 1136) % BLOCK == 0


def test_the_server_forgets_after_a_restart_what_it_had_let_go(federation: Federation, site: Any) -> None:
    site.queue.enable("hospital", PURPOSE, quota=5)
    identifier = put_in(site.queue, image(40))
    approve(site.queue, identifier)
    site.queue.forward(site.clinic)
    federation.stop_server()
    leftover = federation.folder / "server/blobs/example/0123.leftover"
    leftover.write_bytes(b"x")
    federation.start_server()
    site.intake.collect(site.hospital)
    assert [letter.id for letter in site.intake.accepted()] == [identifier], "an acknowledged one survives"
    assert not leftover.exists()


def test_the_audit_cannot_be_changed_unseen(site: Any) -> None:
    site.queue.enable("hospital", PURPOSE, quota=5)
    site.queue.disable()
    database = site.queue._db
    with pytest.raises(Exception, match="append-only"):
        database.execute("DELETE FROM audit WHERE sequence = 1")
    database.execute("DROP TRIGGER audit_unchanged")
    database.execute("UPDATE audit SET detail = '{}' WHERE sequence = 1")
    with pytest.raises(AuditBroken, match="line 1"):
        site.queue.audit()


def test_nothing_is_sent_twice_when_the_answer_was_lost(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site.queue.enable("hospital", PURPOSE, quota=1)
    identifier = put_in(site.queue, image(50))
    approve(site.queue, identifier)
    put = ExampleLine.put

    def put_and_break(line: ExampleLine, example: SealedExample) -> None:
        put(line, example)
        raise ConnectionError

    monkeypatch.setattr(ExampleLine, "put", put_and_break)
    with pytest.raises(ConnectionError):
        site.queue.forward(site.clinic)
    monkeypatch.undo()
    assert site.queue.forward(site.clinic) == [identifier], "the same bytes again, within the quota"
    assert len(site.intake.collect(site.hospital)) == 1


@pytest.fixture
def left_unnoticed(site: Any, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """An example whose acknowledgement was lost: the server has it, the queue doesn't know."""
    site.queue.enable("hospital", PURPOSE, quota=5)
    identifier = put_in(site.queue, image(70))
    approve(site.queue, identifier)
    put = ExampleLine.put

    def put_and_break(line: ExampleLine, example: SealedExample) -> None:
        put(line, example)
        raise ConnectionError

    with monkeypatch.context() as patched:
        patched.setattr(ExampleLine, "put", put_and_break)
        with pytest.raises(ConnectionError):
            site.queue.forward(site.clinic)
    return identifier


def test_what_may_have_left_is_withdrawn_not_refused(site: Any, left_unnoticed: bytes) -> None:
    with pytest.raises(WrongState, match="withdraw"):
        site.queue.refuse(left_unnoticed, reviewer="dr-b")
    assert site.queue.withdraw(left_unnoticed, site.clinic) == "withdrawn"
    site.intake.collect(site.hospital)
    assert site.intake.accepted() == []


def test_what_may_have_left_is_taken_back_when_its_consent_ends(site: Any, left_unnoticed: bytes) -> None:
    site.clock.now += 2 * 3600
    with pytest.raises(ConsentMissing):
        site.queue.forward(site.clinic)
    assert site.queue.one(left_unnoticed).state == "withdrawn"
    site.intake.collect(site.hospital)
    assert site.intake.accepted() == []


def test_a_withdrawal_of_what_never_arrived(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site.queue.enable("hospital", PURPOSE, quota=5)
    identifier = put_in(site.queue, image(71))
    approve(site.queue, identifier)

    def break_off(*_: object) -> None:
        raise ConnectionError

    with monkeypatch.context() as patched:
        patched.setattr(ExampleLine, "put", break_off)
        with pytest.raises(ConnectionError):
            site.queue.forward(site.clinic)
    assert site.queue.withdraw(identifier, site.clinic) == "deleted"
    assert site.queue.forward(site.clinic) == []
