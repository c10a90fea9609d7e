"""What a member refuses of an aggregator that lies (faults.md 26-28, 36): a typed error, and no output."""

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from blindsum.client import Member
from blindsum.client.owner import replace_document
from blindsum.client.testing import Federation, small_model
from blindsum.crypto.canonical import decode_message, encode_message
from blindsum.crypto.errors import (
    BlindsumError,
    DocumentError,
    OpeningFailed,
    PolicyViolation,
    Refused,
    ServerViolation,
    StateMismatch,
    SumCheckFailed,
)
from blindsum.crypto.primitives.signing import SigningKey
from blindsum.crypto.schemes.homomorphic import rounds as he_rounds
from blindsum.crypto.trust import policy as policies
from blindsum.crypto.trust import roster as rosters
from blindsum.crypto.trust.acceptance import StateClaim
from blindsum.crypto.trust.documents import document_digest, open_document, parse_signed, sign_document
from blindsum.crypto.trust.envelope import KeyEnvelope, seal_group_key
from blindsum.crypto.trust.header import BoundHeader
from blindsum.crypto.trust.plan import Deadlines
from blindsum.crypto.trust.policy import Policy
from blindsum.crypto.trust.roster import Roster
from blindsum.proto.v1 import round_pb2
from lying_server import Lie, LyingServer

Make = Callable[..., Federation]
VICTIM = "member-1"


def one_round(member: Member) -> Any:
    for rnd in member.rounds():
        after = {name: value + np.float32(0.01) for name, value in rnd.weights().items()}
        return rnd.submit(after, examples=1)
    return None


def what_the_victim_says(
    make: Make, lie: Lie, *, members: int = 3, scheme: str = "masking", **options: Any
) -> tuple[BlindsumError, LyingServer, Federation]:
    """Run a federation whose server tells the victim lies; the error that the victim stops with."""
    server = LyingServer()
    federation = make(members, make_server=server, scheme=scheme, model=small_model(), **options)
    server.lies(lambda method, member, answer: lie(method, member, answer) if member == VICTIM else answer)
    errors: list[BlindsumError] = []

    def app(member: Member) -> None:
        try:
            one_round(member)
        except BlindsumError as error:
            if member.name == VICTIM:
                errors.append(error)
            assert member.receipts() == []
            raise

    with pytest.raises(BlindsumError):
        federation.run(app, seconds=30)
    assert errors, "the victim didn't refuse"
    return errors[0], server, federation


def with_header(change: Callable[[Any], Any]) -> Lie:
    """A notice whose header was changed."""

    def lie(method: str, member: str, answer: Any) -> Any:
        if method == "Watch" and answer.round.header:
            changed = round_pb2.WatchResponse()
            changed.CopyFrom(answer)
            header = BoundHeader.parse(answer.round.header).header
            changed.round.header = change(header).to_bytes()
            return changed
        return answer

    return lie


LYING_HEADERS: list[tuple[str, Any, type[BlindsumError], str]] = [
    ("n_min", 2**20, PolicyViolation, "n_min"),
    ("n_max", 120, PolicyViolation, "n_max"),
    ("gamma", 1, PolicyViolation, "gamma"),
    ("delta", 0, PolicyViolation, "delta"),
    ("security", 40, PolicyViolation, "security"),
    ("scheme", "bfv", PolicyViolation, "scheme"),
    ("bits", 8, ServerViolation, "bits"),
    ("fields", 7, ServerViolation, "fields"),
    ("dimension", 7, ServerViolation, "dimension"),
    ("layout", bytes(32), ServerViolation, "layout"),
    ("group_key", bytes(32), ServerViolation, "group key"),
    ("he_key", bytes(32), ServerViolation, "HE key"),
    ("policy", bytes(32), ServerViolation, "policy"),
    ("plan", bytes(32), ServerViolation, "plan"),
    ("federation", bytes(32), ServerViolation, "federation"),
    ("round", 77, ServerViolation, "round"),
    ("deadline", 1, ServerViolation, "deadline"),
    ("plan_name", "another", ServerViolation, "plan"),
]


def test_headers_that_undercut_or_lie(blindsum_federation: Make) -> None:
    """One federation: the victim comes to the same open round again and again, and never answers."""
    server = LyingServer()
    patient = Deadlines(advertise=300)
    federation = blindsum_federation(3, make_server=server, model=small_model(), plan={"deadlines": patient})
    others = [federation.open(name) for name in federation.names if name != VICTIM]
    waiting = [threading.Thread(target=lambda m=m: next(m.rounds(), None), daemon=True) for m in others]
    for thread in waiting:
        thread.start()
    for field, value, kind, text in LYING_HEADERS:
        change = {field: value}
        lie = with_header(lambda header, change=change: replace_document(header, **change))
        server.lies(
            lambda method, member, answer, lie=lie: (
                lie(method, member, answer) if member == VICTIM else answer
            )
        )
        with federation.open(VICTIM) as member, pytest.raises(BlindsumError, match=text) as refusal:
            next(member.rounds())
        assert isinstance(refusal.value, kind), field
        assert server.called("Answer", VICTIM) == 0, f"{field}: something was sent"
    server.lies(lambda method, member, answer: answer)
    with federation.open(VICTIM) as member:
        assert next(member.rounds()).index == 1, "told the truth, it takes part"
    for thread in waiting:
        thread.join(20)


def test_a_header_that_changes_within_the_round(blindsum_federation: Make) -> None:
    seen: list[int] = []

    def lie(method: str, member: str, answer: Any) -> Any:
        if method == "Watch" and answer.round.header:
            seen.append(1)
            if len(seen) > 1:
                change = with_header(lambda header: replace_document(header, deadline=header.deadline + 1))
                return change(method, member, answer)
        return answer

    refusal, _, _ = what_the_victim_says(blindsum_federation, lie)
    assert isinstance(refusal, ServerViolation)
    assert refusal.check == "header"


def test_another_state_digest(blindsum_federation: Make) -> None:
    lie = with_header(lambda header: replace_document(header, state=b"x" * 32))
    refusal, server, _ = what_the_victim_says(blindsum_federation, lie)
    assert isinstance(refusal, (StateMismatch, DocumentError))
    assert server.called("Answer", VICTIM) == 0


def test_a_state_other_than_the_one_held(blindsum_federation: Make) -> None:
    server = LyingServer()
    federation = blindsum_federation(3, make_server=server, model=small_model(), rounds=2)
    lie = with_header(
        lambda header: replace_document(header, state=b"x" * 32) if header.state_round == 1 else header
    )
    server.lies(lambda method, member, answer: lie(method, member, answer) if member == VICTIM else answer)

    def app(member: Member) -> None:
        rounds = member.rounds()
        rnd = next(rounds)
        rnd.submit(rnd.weights(), examples=1)
        if member.name == VICTIM:
            with pytest.raises(StateMismatch, match="isn't the one computed here"):
                next(rounds)
        else:
            next(rounds)

    federation.run(app, seconds=30)


@pytest.mark.parametrize("part", ["claim", "bytes"])
def test_a_model_that_is_not_the_state(blindsum_federation: Make, part: str) -> None:
    def lie(method: str, member: str, answer: Any) -> Any:
        if method == "GetCheckpoint" and part == "claim":
            claim = StateClaim.parse(answer.info.claim)
            forged = StateClaim(claim.federation, claim.h1, claim.index, b"y" * 32, (), ())
            answer.info.claim = forged.to_bytes()
        if method == "Download" and part == "bytes":
            answer.data = answer.data[:-1] + bytes([answer.data[-1] ^ 1])
        return answer

    refusal, server, _ = what_the_victim_says(blindsum_federation, lie)
    assert isinstance(refusal, (StateMismatch, OpeningFailed))
    assert server.called("Answer", VICTIM) == 0


def test_a_checkpoint_signed_by_too_few(blindsum_federation: Make) -> None:
    server = LyingServer()
    federation = blindsum_federation(3, make_server=server, model=small_model(), rounds=3)
    federation.run(one_round)
    federation.admit("newcomer")

    def lie(method: str, member: str, answer: Any) -> Any:
        if method == "GetCheckpoint" and member == "newcomer":
            claim = StateClaim.parse(answer.info.claim)
            fewer = StateClaim(
                claim.federation,
                claim.h1,
                claim.index,
                claim.digest,
                claim.survivors,
                claim.signatures[:1],
            )
            answer.info.claim = fewer.to_bytes()
        return answer

    server.lies(lie)
    with federation.open("newcomer") as member, pytest.raises(StateMismatch, match="signed this checkpoint"):
        member.latest_state()
    server.lies(lambda method, member, answer: answer)
    with federation.open("newcomer") as member:
        assert np.array_equal(member.latest_state()["weight"], federation.owner.model()["weight"])


def signed_again(federation: Federation, key: SigningKey, kind: str, **changes: Any) -> bytes:
    form: Any = {policies.KIND: Policy, rosters.KIND: Roster}[kind]
    body = open_document(federation.owner.signed(kind), federation.owner.public_key, kind, form)
    return sign_document(key, kind, replace_document(body, **changes)).to_bytes()


def serving(server: LyingServer, document: bytes, kind: str) -> Lie:
    """A notice that names another document of a kind, which is then served."""
    digest = parse_signed(document).digest
    server.serves(digest, document)

    def lie(method: str, member: str, answer: Any) -> Any:
        if method != "Watch":
            return answer
        changed = round_pb2.WatchResponse()
        changed.CopyFrom(answer)
        setattr(changed, kind, digest)
        return changed

    return lie


@pytest.mark.parametrize("kind", ["policy", "roster"])
def test_a_document_of_someone_else(blindsum_federation: Make, kind: str) -> None:
    server = LyingServer()
    federation = blindsum_federation(3, make_server=server, model=small_model())
    forged = signed_again(federation, SigningKey.generate(), kind, version=9)
    server.lies(serving(server, forged, kind))
    with federation.open(VICTIM) as member, pytest.raises(DocumentError, match="isn't signed by the owner"):
        next(member.rounds())


def test_an_older_policy_than_the_one_pinned(blindsum_federation: Make) -> None:
    server = LyingServer()
    federation = blindsum_federation(3, make_server=server, model=small_model())
    first = federation.owner.signed(policies.KIND).to_bytes()
    federation.owner.set_policy(n_min=3, max_weight_ratio=32)
    federation.run(one_round)
    server.lies(serving(server, first, policies.KIND))
    with federation.open(VICTIM) as member, pytest.raises(DocumentError, match="doesn't follow the pinned"):
        next(member.rounds())


def test_another_document_than_its_digest_says(blindsum_federation: Make) -> None:
    server = LyingServer()
    federation = blindsum_federation(3, make_server=server, model=small_model())
    other = signed_again(federation, federation.owner._key, "policy", version=9)
    server.serves(federation.owner.signed(policies.KIND).digest, other)
    with federation.open(VICTIM) as member, pytest.raises(Refused, match="another document"):
        next(member.rounds())


def test_an_expired_roster(blindsum_federation: Make) -> None:
    server = LyingServer()
    federation = blindsum_federation(3, make_server=server, model=small_model())
    expired = signed_again(federation, federation.owner._key, "roster", valid_until=int(time.time()) - 5)
    roster = open_document(parse_signed(expired), federation.owner.public_key, rosters.KIND, Roster)
    digest = document_digest(rosters.KIND, parse_signed(expired).body)
    envelope = seal_group_key(federation.owner._key, federation.owner.group_key, roster, digest, VICTIM)

    def lie(method: str, member: str, answer: Any) -> Any:
        if method == "GetEnvelopes":
            return round_pb2.GetEnvelopesResponse(envelopes=[envelope.to_bytes()])
        answer = serving(server, expired, rosters.KIND)(method, member, answer)
        return with_header(lambda header: replace_document(header, roster=digest))(method, member, answer)

    server.lies(lambda method, member, answer: lie(method, member, answer) if member == VICTIM else answer)

    def app(member: Member) -> None:
        if member.name == VICTIM:
            with pytest.raises(PolicyViolation, match="roster has expired"):
                next(member.rounds())
            assert server.called("Answer", VICTIM) == 0
        else:
            next(member.rounds())

    federation.run(app, seconds=30)


def test_a_group_key_that_the_server_made(blindsum_federation: Make) -> None:
    def lie(method: str, member: str, answer: Any) -> Any:
        if method == "GetEnvelopes":
            forger = SigningKey.generate()
            envelope = decode_message(answer.envelopes[0], KeyEnvelope, "an envelope")
            terms = (envelope.federation, envelope.sealed)
            forged = KeyEnvelope(
                envelope.federation,
                envelope.epoch,
                envelope.member,
                envelope.roster,
                envelope.purpose,
                envelope.key_id,
                envelope.sealed,
                forger.sign("key envelope", *terms),
            )
            return round_pb2.GetEnvelopesResponse(envelopes=[encode_message(forged)])
        return answer

    refusal, server, federation = what_the_victim_says(blindsum_federation, lie)
    assert isinstance(refusal, DocumentError)
    assert "isn't signed by the owner" in str(refusal)
    assert server.called("Answer", VICTIM) == 0
    assert not list(federation.path(VICTIM).glob("group-*.key"))


def test_key_envelopes_that_never_come(blindsum_federation: Make) -> None:
    def lie(method: str, member: str, answer: Any) -> Any:
        return round_pb2.GetEnvelopesResponse() if method == "GetEnvelopes" else answer

    refusal, _, _ = what_the_victim_says(blindsum_federation, lie)
    assert isinstance(refusal, DocumentError)


def test_a_replayed_round(blindsum_federation: Make) -> None:
    server = LyingServer()
    federation = blindsum_federation(3, make_server=server, model=small_model(), rounds=3)
    notices: list[round_pb2.WatchResponse] = []

    def keep(method: str, member: str, answer: Any) -> Any:
        if method == "Watch" and member == VICTIM and answer.round.asked and answer.round.step == "advertise":
            copy = round_pb2.WatchResponse()
            copy.CopyFrom(answer)
            notices.append(copy)
        return answer

    server.lies(keep)

    def two_rounds(member: Member) -> None:
        for done, rnd in enumerate(member.rounds()):
            rnd.submit(rnd.weights(), examples=1)
            if done == 1:
                break

    federation.run(two_rounds)
    first = notices[0]
    before = server.called("Answer", VICTIM)
    server.lies(lambda method, member, answer: first if (method, member) == ("Watch", VICTIM) else answer)
    with federation.open(VICTIM) as member, pytest.raises((ServerViolation, StateMismatch)):
        next(member.rounds())
    assert server.called("Answer", VICTIM) == before, "nothing was answered twice"


# A sum that isn't the sum: the lie is told to all, as an aggregator would.


def lanes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, "<u8").copy()


def test_a_shifted_sum(blindsum_federation: Make) -> None:
    def lie(method: str, member: str, answer: Any) -> Any:
        if method == "Download":
            shifted = lanes(answer.data)
            # One more in the highest field of the first lane: a plausible sum, but not the members'.
            shifted[0] += np.uint64(1 << 40)
            answer.data = shifted.tobytes()
        return answer

    armed = {"on": False}

    def sums_only(method: str, member: str, answer: Any) -> Any:
        if method == "GetResult":
            armed["on"] = True
        return lie(method, member, answer) if armed["on"] else answer

    refusal, _, federation = what_the_victim_says(blindsum_federation, sums_only)
    assert isinstance(refusal, (SumCheckFailed, OpeningFailed))
    with federation.open(VICTIM) as member:
        assert member.receipts() == []
    assert not list((federation.path(VICTIM)).glob("state-1-*.bin")), "no output"


@pytest.mark.parametrize("factor", [0, 2])
def test_a_member_dropped_from_the_sum_or_doubled(
    blindsum_federation: Make, factor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server leaves one upload out of the sum that it publishes, or adds it twice."""
    pytest.importorskip("tenseal", reason="tenseal isn't installed: pip install 'blindsum[he]'")
    add = he_rounds.HomomorphicArithmetic.add
    state = {"done": False}

    def lying_add(self: Any, index: int, total: Any, frame: Any) -> Any:
        if total is not None and not state["done"]:
            state["done"] = True
            if factor == 0:
                return total
            return add(self, index, add(self, index, total, frame), frame)
        return add(self, index, total, frame)

    monkeypatch.setattr(he_rounds.HomomorphicArithmetic, "add", lying_add)
    federation = blindsum_federation(3, scheme="bfv", model=small_model())
    errors = []

    def app(member: Member) -> None:
        try:
            one_round(member)
        except BlindsumError as error:
            errors.append(error)
            assert member.receipts() == []

    federation.run(app, seconds=40)
    assert len(errors) == 3
    assert all(isinstance(error, (SumCheckFailed, OpeningFailed)) for error in errors)
    # Repeated false sums would be a decryption oracle: no round under this key any more.
    stubborn = [federation.open(name) for name in ("member-2", "member-3")]
    waiting = [threading.Thread(target=lambda m=m: m._connect(), daemon=True) for m in stubborn]
    for thread in waiting:
        thread.start()
    with federation.open(VICTIM) as member, pytest.raises(PolicyViolation, match="new key"):
        next(member.rounds())
