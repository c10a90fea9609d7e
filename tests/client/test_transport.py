"""Retries, refusals and resumed bulk over connections that break."""

import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from blindsum.client import Member, Patience, Unreachable
from blindsum.client.member_folder import MemberFolder
from blindsum.client.owner import replace_document
from blindsum.client.private_files import write_private
from blindsum.client.testing import Federation, small_model
from blindsum.client.transport import Backoff, EnrolmentLine, MemberLine, Stopped
from blindsum.crypto.canonical import encode_document
from blindsum.crypto.errors import BlindsumError, RefusalReason, Refused
from blindsum.proto.v1 import enrolment_pb2, round_pb2
from cutting_proxy import CuttingProxy
from lying_server import LyingServer

Make = Callable[..., Federation]


def line_of(federation: Federation, name: str, **changes: Any) -> MemberLine:
    with MemberFolder(federation.path(name), read_only=True) as folder:
        values: dict[str, Any] = {
            "address": folder.pin.member_address,
            "ca": folder.pin.ca,
            "key": folder.transport_key,
            "certificate": folder.certificate,
            "patience": Patience(total=0.3),
            **changes,
        }
    return MemberLine(values.pop("address"), values.pop("ca"), **values)


def test_a_refusal_keeps_its_reason_and_is_not_retried(blindsum_federation: Make) -> None:
    federation = blindsum_federation(1)
    line = line_of(federation, "member-1", patience=Patience(total=None))
    with pytest.raises(Refused) as refusal:
        line.call(line.stub.GetStep, round_pb2.GetStepRequest(round=9, step="upload"), what="a step")
    assert refusal.value.reason is RefusalReason.WRONG_ROUND
    assert "round 9" in refusal.value.text
    line.close()


def test_strangers_do_not_get_in(blindsum_federation: Make) -> None:
    """faults.md 13: another CA at either end, and no certificate of a member."""
    federation, other = blindsum_federation(1), blindsum_federation(1)
    with MemberFolder(other.path("member-1"), read_only=True) as folder:
        foreign = {"key": folder.transport_key, "certificate": folder.certificate}
        foreign_ca = folder.pin.ca
    for changes in (foreign, {"ca": foreign_ca}):
        line = line_of(federation, "member-1", **changes)
        with pytest.raises(Unreachable):
            line.call(line.stub.GetEnvelopes, round_pb2.GetEnvelopesRequest(), what="getting envelopes")
        line.close()


def test_nobody_there_is_said_after_the_patience(free_port: int) -> None:
    line = EnrolmentLine(f"localhost:{free_port}", "", Patience(total=0.2))
    request = enrolment_pb2.GetFederationRequest()
    with pytest.raises(Unreachable, match="check the address"):
        line.call(line.stub.GetFederation, request, what="asking")
    line.close()


@pytest.fixture
def free_port() -> int:
    import socket  # noqa: PLC0415

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def test_closing_ends_a_wait_at_once() -> None:
    stop = threading.Event()
    backoff = Backoff(Patience(first=3600, longest=3600, total=None), stop)
    threading.Timer(0.05, stop.set).start()
    with pytest.raises(Stopped):
        backoff.wait()


def test_an_upload_goes_on_where_the_connection_broke(blindsum_federation: Make) -> None:
    server = LyingServer()
    model = {"weight": np.zeros(1_500_000, np.float32)}
    federation = blindsum_federation(3, make_server=server, model=model)
    contribution, checkpoint = 1_500_000 * 8 // 3, 1_500_000 * 4
    offsets: dict[bytes, list[int]] = {}

    def overhear(method: str, member: str, answer: Any) -> Any:
        if (method, member) == ("BeginUpload", "member-1"):
            begun = answer if isinstance(answer, bytes) else answer.SerializeToString()
            slot = round_pb2.BeginUploadResponse.FromString(begun).slot
            if slot.upload_id:
                offsets.setdefault(slot.upload_id, []).append(slot.offset)
        return answer

    server.lies(overhear)
    port = federation.server.member_port
    proxy = CuttingProxy(("127.0.0.1", port), [1_000_000, 2_000_000, 3_000_000])
    path = federation.path("member-1")
    with MemberFolder(path) as folder:
        pin = replace_document(folder.pin, member_address=f"localhost:{proxy.port}")
    write_private(path / "federation.json", encode_document(pin))

    def app(member: Member) -> Any:
        for rnd in member.rounds():
            after = {name: value + np.float32(0.01) for name, value in rnd.weights().items()}
            return rnd.submit(after, examples=1)
        return None

    receipts = federation.run(app)
    proxy.close()
    assert len({receipt.receipt for receipt in receipts.values()}) == 1
    assert not proxy.cuts, "every cut was made"
    # Any of the three may be the one that is asked for the sealed checkpoint afterwards.
    resumed, *others = offsets.values()
    assert len(resumed) >= 4
    assert resumed == sorted(resumed)
    assert resumed[0] == 0 < resumed[-1]
    # After the last cut nothing was sent that the aggregator had: from there on, and no more.
    assert proxy.sent < 3_000_000 + contribution - resumed[-1] + checkpoint * len(others) + 500_000


def test_no_secret_is_printed_logged_or_shown(
    blindsum_federation: Make, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """faults.md 50: a canary scan over what the SDK says while a federation runs, errors included."""
    caplog.set_level(logging.DEBUG, logger="blindsum.client")
    federation = blindsum_federation(3, model=small_model())
    said: list[str] = [repr(federation.owner)]

    def app(member: Member) -> None:
        said.append(repr(member) + repr(member._folder))
        for rnd in member.rounds():
            said.append(repr(rnd) + repr(rnd._session) + repr(rnd._session.record))
            said.append(str(member.receipts()))
            try:
                rnd.submit(
                    {"weight": np.full((10, 10), np.nan, np.float32), "bias": np.zeros(10)}, examples=1
                )
            except BlindsumError as error:
                said.append(repr(error))
            said.append(repr(rnd.submit(rnd.weights(), examples=1)))

    federation.run(app)
    out = capsys.readouterr()
    text = "\n".join([*said, caplog.text, out.out, out.err]).lower()
    secrets = {"owner key": (federation.folder / "owner" / "owner.key").read_bytes()}
    secrets["group key"] = (federation.folder / "owner" / "group-1.key").read_bytes()
    for name in federation.names:
        for kind in ("identity.key", "hpke.key", "transport.key"):
            secrets[f"{name} {kind}"] = (federation.path(name) / kind).read_bytes()
    for name, secret in secrets.items():
        for form in (secret.hex(), repr(secret)[2:-1].lower(), str(list(secret))[1:-1]):
            assert form not in text, f"{name} was shown"


def test_a_member_may_be_closed_while_another_thread_connects_it(
    blindsum_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = blindsum_federation(3, model=small_model())
    member = federation.open("member-1")
    failed: list[BaseException] = []
    closed = threading.Event()

    def close() -> None:
        try:
            member.close()
        except BaseException as error:
            failed.append(error)
        finally:
            closed.set()

    closer = threading.Thread(target=close)
    start = threading.Thread.start

    def late(thread: threading.Thread) -> None:
        if thread.name.startswith("blindsum-watch-"):
            start(closer)
            closed.wait(0.5)  # as long as it may come in between
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", late)
    member._connect()
    closer.join(30)
    assert closed.is_set()
    assert not failed
    assert not member._threads
