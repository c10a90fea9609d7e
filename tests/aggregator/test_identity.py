"""Who may call: mutual TLS, the roster at each call, expiry, renewal; health and reflection beside it."""

import datetime
from pathlib import Path

import grpc
import pytest
from blindsum.aggregator.embedding import ServerHandle
from blindsum.aggregator.transport_authority import TransportAuthority
from blindsum.proto.v1 import enrolment_pb2, round_pb2, round_pb2_grpc
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from manual_clock import ManualClock
from scripted_federation import Applicant, ScriptedMember, Stage, reason_of, transport_request


def call(member: ScriptedMember) -> grpc.RpcError:
    """The error of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        member.stub.GetEnvelopes(round_pb2.GetEnvelopesRequest(), timeout=5)
    return caught.value


def again(member: ScriptedMember, server: ServerHandle, certificate: bytes) -> ScriptedMember:
    """The same member with another certificate."""
    return ScriptedMember(member.owner, member.applicant, certificate, server.member_port, member.index)


def issue(authority: TransportAuthority, member: ScriptedMember, name: str, clock: ManualClock) -> bytes:
    csr = member.applicant.transport[1]
    return authority.member_certificate(csr, member.owner.federation, name, 30, clock.now_ms()).chain


def test_another_authoritys_certificate_fails_the_handshake(
    stage: Stage, server: ServerHandle, clock: ManualClock, tmp_path: Path
) -> None:
    scene = stage()
    foreign = TransportAuthority(tmp_path / "foreign")
    member = again(scene.members[0], server, issue(foreign, scene.members[0], "clinic-0", clock))
    assert call(member).code() is grpc.StatusCode.UNAVAILABLE


def test_without_a_certificate_the_handshake_fails(stage: Stage, server: ServerHandle) -> None:
    scene = stage()
    member = scene.members[0]
    channel = grpc.secure_channel(
        f"localhost:{server.member_port}", grpc.ssl_channel_credentials(scene.owner.ca_pem)
    )
    member.stub = round_pb2_grpc.RoundServiceStub(channel)
    assert call(member).code() is grpc.StatusCode.UNAVAILABLE
    channel.close()


@pytest.mark.parametrize("name", ["clinic-1", "nobody"])
def test_a_certificate_that_wasnt_handed_out_is_unknown(
    stage: Stage, server: ServerHandle, clock: ManualClock, tmp_path: Path, name: str
) -> None:
    # The right authority's key, but a certificate that the server never recorded.
    scene = stage()
    authority = TransportAuthority(tmp_path / "authority")
    member = again(scene.members[0], server, issue(authority, scene.members[0], name, clock))
    assert reason_of(call(member)) == "unknown_member"


def test_a_member_sees_only_its_own_federation(stage: Stage, server: ServerHandle) -> None:
    first, second = stage(), stage()
    member = first.members[0]
    stolen = ScriptedMember(second.owner, member.applicant, member.certificate, server.member_port, 0)
    # It stands for the first federation and sees only that one.
    envelopes = stolen.stub.GetEnvelopes(round_pb2.GetEnvelopesRequest(), timeout=5).envelopes
    mine = first.members[0].stub.GetEnvelopes(round_pb2.GetEnvelopesRequest(), timeout=5).envelopes
    assert list(envelopes) == list(mine)
    with pytest.raises(grpc.RpcError) as caught:
        stolen.stub.GetDocument(round_pb2.GetDocumentRequest(digest=second.owner.roster_digest), timeout=5)
    assert reason_of(caught.value) == "wrong_digest"


def test_an_expired_certificate_is_refused_and_polling_gives_a_new_one(
    stage: Stage, clock: ManualClock
) -> None:
    scene = stage()
    member = scene.members[0]
    member.until(lambda r: bool(r.plan))
    expires = x509.load_pem_x509_certificate(member.certificate).not_valid_after_utc
    clock.advance_to(int(expires.timestamp() * 1000) - 1)
    member.stub.GetEnvelopes(round_pb2.GetEnvelopesRequest(), timeout=5)
    clock.advance_to(int(expires.timestamp() * 1000))
    assert reason_of(call(member)) == "expired"
    answer = scene.owner.poll(scene.owner.join(member.applicant))
    assert answer.state == enrolment_pb2.JOIN_STATE_ADMITTED
    assert x509.load_pem_x509_certificate(answer.certificate).not_valid_after_utc > expires


def test_a_certificate_is_renewed_by_proof_of_the_identity_key(stage: Stage, server: ServerHandle) -> None:
    scene = stage()
    member, other = scene.members[:2]
    transport = transport_request()

    def renew(signature: bytes) -> bytes:
        request = round_pb2.RenewCertificateRequest(csr=transport[1], signature=signature)
        return member.stub.RenewCertificate(request, timeout=5).certificate

    with pytest.raises(grpc.RpcError) as caught:
        renew(other.applicant.identity.sign("certificate request", transport[1]))
    assert reason_of(caught.value) == "signature"
    certificate = renew(member.applicant.identity.sign("certificate request", transport[1]))
    member.applicant.transport = transport
    again(member, server, certificate).stub.GetEnvelopes(round_pb2.GetEnvelopesRequest(), timeout=5)


def test_a_name_given_to_someone_else_shuts_the_old_certificate_out(stage: Stage) -> None:
    scene = stage(4, watching=0)
    old = scene.members[3]
    names = [m.name for m in scene.members]
    scene.owner.publish_roster(names[:3])
    assert reason_of(call(old)) == "unknown_member"
    scene.owner.applicants[old.name] = Applicant(old.name)
    scene.owner.publish_roster(names)
    assert reason_of(call(old)) == "unknown_member"


def test_server_certificates_are_short_lived_and_for_the_names(tmp_path: Path) -> None:
    authority = TransportAuthority(tmp_path / "authority")
    _, chain = authority.server_certificate(("clinic.example", "10.1.2.3"), 90)
    certificate = x509.load_pem_x509_certificate(chain)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["clinic.example"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["10.1.2.3"]
    assert certificate.not_valid_after_utc - certificate.not_valid_before_utc < datetime.timedelta(days=91)
    assert (tmp_path / "authority" / "transport_ca.key").stat().st_mode & 0o777 == 0o600
    assert TransportAuthority(tmp_path / "authority").pem == authority.pem


def test_health_tells_ready_from_live(server: ServerHandle) -> None:
    with grpc.secure_channel(
        f"localhost:{server.enrolment_port}", grpc.ssl_channel_credentials(server.ca_pem)
    ) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "ready", "live", "blindsum.proto.v1.EnrolmentService"):
            response = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert response.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="nonsense"), timeout=5)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services(server: ServerHandle) -> None:
    with grpc.secure_channel(
        f"localhost:{server.enrolment_port}", grpc.ssl_channel_credentials(server.ca_pem)
    ) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (response,) = stub.ServerReflectionInfo(iter([request]), timeout=5)
        names = {service.name for service in response.list_services_response.service}
        assert {"blindsum.proto.v1.EnrolmentService", "grpc.health.v1.Health"} <= names
