"""How members come in and how the owner publishes: what the aggregator relays, and what it refuses."""

import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from blindsum.aggregator.embedding import ServerHandle
from blindsum.crypto.primitives.signing import SigningKey
from blindsum.crypto.trust import policy as policies
from blindsum.crypto.trust import roster as rosters
from blindsum.crypto.trust.documents import sign_document
from blindsum.crypto.trust.envelope import seal_group_key
from blindsum.crypto.trust.joining import FEDERATION_KIND, REFUSAL_KIND, Federation, Refusal
from blindsum.crypto.trust.plan import Encoding
from blindsum.proto.v1 import enrolment_pb2 as wire
from blindsum.proto.v1 import round_pb2
from scripted_federation import Applicant, Scene, ScriptedOwner, Serve, Stage, reason_of, transport_request


def refusal(call: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **named)
    return reason_of(caught.value)


@pytest.fixture
def owner(server: ServerHandle) -> ScriptedOwner:
    owner = ScriptedOwner(server.enrolment_port, server.ca_pem)
    owner.found()
    return owner


def test_only_owners_that_the_operator_lists_found_a_federation(serve: Serve) -> None:
    known = SigningKey.generate()
    handle = serve(owners=(known.public.hex(),), allow_any_owner=False)
    owner = ScriptedOwner(handle.enrolment_port, handle.ca_pem)
    assert refusal(owner.found) == "policy"
    owner.key = known
    owner.document = Federation(name="ours", owner=known.public, founded=1, nonce=b"n" * 32)
    owner.federation = owner.document.id
    owner.found()
    owner.found()
    response = owner.stub.GetFederation(wire.GetFederationRequest(federation=owner.federation), timeout=5)
    assert response.owner_key == known.public


def test_a_federation_is_signed_by_the_owner_it_names(owner: ScriptedOwner) -> None:
    thief = SigningKey.generate()
    forged = sign_document(thief, FEDERATION_KIND, owner.document).to_bytes()
    assert refusal(owner.stub.CreateFederation, wire.CreateFederationRequest(document=forged)) == "signature"


def test_a_request_waits_for_the_owner_and_then_holds_a_certificate(owner: ScriptedOwner) -> None:
    applicant = Applicant("clinic-0")
    request = owner.join(applicant)
    assert owner.join(applicant) == request
    assert owner.poll(request).state == wire.JOIN_STATE_WAITING
    (pending,) = owner.stub.ListJoinRequests(
        wire.ListJoinRequestsRequest(proof=owner.proof("ListJoinRequests")), timeout=5
    ).pending
    assert (pending.request_id, pending.body) == (request, applicant.request(owner.federation).body)
    owner.publish_roster(["clinic-0"])
    answer = owner.poll(request)
    assert answer.state == wire.JOIN_STATE_ADMITTED
    assert owner.poll(request).certificate == answer.certificate
    assert not owner.stub.ListJoinRequests(
        wire.ListJoinRequestsRequest(proof=owner.proof("ListJoinRequests")), timeout=5
    ).pending


def test_the_aggregator_admits_nobody_with_other_keys(owner: ScriptedOwner) -> None:
    request = owner.join(Applicant("clinic-0"))
    owner.applicants["clinic-0"] = Applicant("clinic-0")
    owner.publish_roster(["clinic-0"])
    assert owner.poll(request).state == wire.JOIN_STATE_WAITING


def test_the_owners_refusal_reaches_the_applicant(owner: ScriptedOwner) -> None:
    request = owner.join(Applicant("clinic-0"))
    document = Refusal(federation=owner.federation, request_id=request, reason="who are you?")
    thief = SigningKey.generate()
    assert refusal(owner.publish, [sign_document(thief, REFUSAL_KIND, document).to_bytes()]) == "policy"
    owner.publish([sign_document(owner.key, REFUSAL_KIND, document).to_bytes()])
    answer = owner.poll(request)
    assert (answer.state, answer.reason) == (wire.JOIN_STATE_REFUSED, "who are you?")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"federation": b"x" * 32}, "unknown_member"),
        ({"signature": b"\0" * 64}, "signature"),
        ({"signature": b"short"}, "signature"),
        ({"body": b"{}"}, "malformed"),
        ({"body": b"x" * 20_000}, "wrong_size"),
        ({"token_mac": b"short"}, "wrong_size"),
        ({"token_id": b""}, "wrong_size"),
        ({"csr": b"nonsense"}, "malformed"),
        ({"csr": b"x" * 5000}, "wrong_size"),
    ],
)
def test_bad_requests_to_join_are_refused(
    owner: ScriptedOwner, change: dict[str, bytes], reason: str
) -> None:
    request = Applicant("clinic-0").request(owner.federation)
    for name, value in change.items():
        setattr(request, name, value)
    assert refusal(owner.stub.Join, request) == reason


def test_a_request_doesnt_change_its_transport_key(owner: ScriptedOwner) -> None:
    applicant = Applicant("clinic-0")
    owner.join(applicant)
    applicant.transport = transport_request()
    assert refusal(owner.join, applicant) == "conflict"


def test_one_invitation_doesnt_fill_the_queue(owner: ScriptedOwner) -> None:
    for _ in range(4):
        owner.join(Applicant("clinic-0"))
    assert refusal(owner.join, Applicant("clinic-0")) == "limit"


def test_only_the_owner_asks_and_only_now(owner: ScriptedOwner) -> None:
    thief = ScriptedOwner.__new__(ScriptedOwner)
    thief.__dict__.update(owner.__dict__)
    thief.key = SigningKey.generate()
    assert refusal(thief.status) == "signature"
    real, owner.now = owner.now, lambda: time.time() - 301
    assert refusal(owner.status) == "expired"
    owner.now = real
    proof = owner.proof("ListJoinRequests")
    assert refusal(owner.stub.GetStatus, wire.GetStatusRequest(proof=proof)) == "signature"
    assert not owner.status().rounds


@pytest.fixture
def scene(stage: Stage) -> Scene:
    return stage(watching=0)


def versions(scene: Scene) -> tuple[int, int, str]:
    status = scene.owner.status()
    return status.roster_version, status.policy_version, status.plan


def test_versions_only_grow(scene: Scene) -> None:
    owner = scene.owner
    names = [m.name for m in scene.members]
    document, envelopes = owner.make_roster(names)
    assert owner.roster is not None
    owner.publish([document], envelopes)
    owner.publish([document], envelopes)
    older, envelopes = owner.make_roster(names, version=1)
    assert refusal(owner.publish, [older], envelopes) == "policy"
    same, envelopes = owner.make_roster(names, version=2, valid_until=int(time.time()) + 99)
    assert refusal(owner.publish, [same], envelopes) == "policy"
    weaker = sign_document(owner.key, policies.KIND, owner.policy(version=1, n_max=15)).to_bytes()
    assert refusal(owner.publish, [weaker]) == "policy"
    assert versions(scene) == (2, 1, "job")


def test_a_removal_needs_a_new_group_key(scene: Scene) -> None:
    owner = scene.owner
    document, envelopes = owner.make_roster(["clinic-0", "clinic-1"], rotate=False)
    assert refusal(owner.publish, [document], envelopes) == "policy"
    assert versions(scene)[0] == 1


@pytest.mark.parametrize("fault", ["missing", "forged", "another roster's", "twice", "garbage"])
def test_every_member_gets_its_envelope_from_the_owner(scene: Scene, fault: str) -> None:
    owner = scene.owner
    names = [m.name for m in scene.members]
    _, old = owner.make_roster(names, version=7)
    document, envelopes = owner.make_roster(names, version=2)
    assert owner.roster is not None
    if fault == "missing":
        envelopes.pop()
    elif fault == "forged":
        envelopes[0] = seal_group_key(
            SigningKey.generate(), owner.group_key, owner.roster, owner.roster_digest, names[0]
        ).to_bytes()
    elif fault == "another roster's":
        envelopes[0] = old[0]
    elif fault == "twice":
        envelopes[0] = envelopes[1]
    else:
        envelopes[0] = b"\x90"
    expected = {"forged": "signature", "garbage": "malformed"}.get(fault, "policy")
    assert refusal(owner.publish, [document], envelopes) == expected
    assert versions(scene)[0] == 1
    mine = scene.members[0].stub.GetEnvelopes(round_pb2.GetEnvelopesRequest(), timeout=5)
    assert len(mine.envelopes) == 1


def test_all_or_none(scene: Scene) -> None:
    owner = scene.owner
    document, envelopes = owner.make_roster([m.name for m in scene.members])
    forged = sign_document(SigningKey.generate(), policies.KIND, owner.policy(version=2)).to_bytes()
    assert refusal(owner.publish, [document, forged], envelopes) == "policy"
    assert versions(scene) == (1, 1, "job")


@pytest.mark.parametrize(
    "change",
    [
        {"cohort_min": 3, "cohort_max": 17},
        {"encoding": Encoding(bits=30)},
        {"encoding": Encoding(bits=16, weight_ratio=99)},
        {"scheme": "paillier"},
        {"policy": b"p" * 32},
        {"federation": b"f" * 32},
        {"version": 1, "rounds": 99},
        {"initial_state": b"unknown state".ljust(32)},
    ],
)
def test_a_plan_that_undercuts_the_policy_is_refused(scene: Scene, change: dict[str, Any]) -> None:
    owner = scene.owner
    plan = owner.make_plan(**{"version": 2, **change})
    assert refusal(owner.publish_plan, plan, None) == "policy"


def test_expired_documents_are_refused(scene: Scene) -> None:
    owner = scene.owner
    policy = owner.policy(version=2, valid_until=int(time.time()) - 1)
    assert refusal(owner.publish_policy, policy) == "policy"


@pytest.mark.parametrize(
    ("documents", "reason"),
    [([], "malformed"), ([b""], "malformed"), ([b"\x93\xa1x"], "malformed"), ([b"\xff" * 100], "malformed")],
)
def test_garbage_isnt_published(scene: Scene, documents: list[bytes], reason: str) -> None:
    assert refusal(scene.owner.publish, documents) == reason


def test_a_documents_kind_is_signed_too(scene: Scene) -> None:
    owner = scene.owner
    signed = sign_document(owner.key, policies.KIND, owner.policy(version=2))
    moved = type(signed)(rosters.KIND, signed.body, signed.signature).to_bytes()
    assert refusal(owner.publish, [moved]) == "policy"


def test_he_keys_are_only_taken_when_the_roster_names_them(scene: Scene) -> None:
    owner = scene.owner
    document, envelopes = owner.make_roster([m.name for m in scene.members])
    assert refusal(owner.publish, [document], envelopes, [b"a public key"]) == "policy"


@pytest.mark.parametrize("fault", ["forged", "too long", "too short", "no start", "empty"])
def test_a_first_state_is_the_owners_and_as_long_as_it_says(scene: Scene, fault: str) -> None:
    owner = scene.owner
    state, sealed = b"s" * 32, b"0123456789"
    proof = owner.proof("PublishCheckpoint", state, len(sealed).to_bytes(8, "little"))
    if fault == "forged":
        proof.signature = b"\1" * 64
    start = wire.PublishCheckpointRequest(
        start=wire.PublishCheckpointStart(proof=proof, state=state, total=len(sealed))
    )
    part = wire.PublishCheckpointRequest
    stream = {
        "forged": [start, part(data=sealed)],
        "too long": [start, part(data=sealed + b"!")],
        "too short": [start, part(data=sealed[:-1])],
        "no start": [part(data=sealed)],
        "empty": [],
    }[fault]
    expected = {"forged": "signature", "no start": "malformed", "empty": "malformed"}.get(fault, "wrong_size")
    assert refusal(owner.stub.PublishCheckpoint, iter(stream)) == expected
    plan = owner.make_plan(version=2, initial_state=state)
    assert refusal(owner.publish_plan, plan, None) == "policy"


def test_the_owner_reads_the_newest_checkpoint(scene: Scene) -> None:
    owner = scene.owner
    parts = list(
        owner.stub.GetOwnerCheckpoint(
            wire.GetOwnerCheckpointRequest(proof=owner.proof("GetOwnerCheckpoint")), timeout=5
        )
    )
    assert parts[0].info.state_round == 0
    assert b"".join(part.data for part in parts[1:]) == b"sealed state 0"
