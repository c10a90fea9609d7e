"""From the invitation to the roster: by a person, a list or the token, and past a server that lies."""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blindsum.client import Member, join
from blindsum.client.admission import AdmissionList, Decision, Rule, Watch, WatchEvent, by_token
from blindsum.client.joining import ask, poll, read_invitation
from blindsum.client.member_folder import MemberFolder
from blindsum.client.testing import Federation, small_model
from blindsum.crypto.canonical import decode_document, encode_document
from blindsum.crypto.errors import DocumentError, Refused
from blindsum.crypto.primitives.signing import SigningKey
from blindsum.crypto.trust.joining import JoinBody, sign_request
from blindsum.proto.v1 import enrolment_pb2
from lying_server import LyingServer

Make = Callable[..., Federation]


class Watching:
    """`Watch` in a thread; what it said, and a way to wait for it."""

    def __init__(self, folder: Path, rule: Rule) -> None:
        self.stop = threading.Event()
        self.said: list[WatchEvent] = []
        self._changed = threading.Condition()
        self._watch = Watch(folder, rule, every=0.1, stop=self.stop)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for event in self._watch.events():
            with self._changed:
                self.said.append(event)
                self._changed.notify_all()

    def wait_for(self, kind: str, member: str = "") -> WatchEvent:
        def found() -> list[WatchEvent]:
            return [one for one in self.said if one.kind == kind and member in ("", one.member)]

        with self._changed:
            assert self._changed.wait_for(found, 30), self.said
            return found()[0]

    def end(self) -> None:
        self.stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()


@contextmanager
def watching(federation: Federation, rule: Rule) -> Iterator[Watching]:
    watch = Watching(federation.folder / "owner", rule)
    try:
        yield watch
    finally:
        watch.end()


def unlocked(federation: Federation) -> Path:
    """The owner's folder, which the test's own `Owner` no longer holds open."""
    federation.owner.close()
    return federation.folder / "owner"


def apply(federation: Federation, invitations: dict[str, Path], name: str) -> str:
    return join(invitations[name], federation.path(name), organisation=f"Clinic {name}", wait=False)


def test_while_nobody_watches_requests_wait_and_the_applicant_is_told(blindsum_federation: Make) -> None:
    federation = blindsum_federation(0)
    invitations = {"clinic": federation.owner.invite("clinic")}
    apply(federation, invitations, "clinic")
    federation.stop_server()
    federation.start_server()  # it only knows of looks since its start
    answer = ask(federation.path("clinic"))
    assert not answer.admitted
    assert "isn't watching and hasn't looked yet" in str(answer)
    federation.owner.pending()
    answer = ask(federation.path("clinic"))
    assert (answer.owner_watching, answer.owner_looked > 0) == (False, True)
    assert "it last looked at" in str(answer)
    unlocked(federation)
    with watching(federation, lambda _: Decision("wait", "asleep")) as watch:
        watch.wait_for("waiting", "clinic")
        assert "is watching" in str(ask(federation.path("clinic")))
    with watching(federation, by_token) as watch:
        watch.wait_for("admitted", "clinic")
        assert poll(federation.path("clinic"))


def test_a_list_admits_its_members_with_their_fingerprints_and_nobody_else(blindsum_federation: Make) -> None:
    federation = blindsum_federation(0)
    names = ["listed", "named", "other", "wrong"]
    invitations = {name: federation.owner.invite(name) for name in names}
    marks = {name: apply(federation, invitations, name) for name in names}
    rule = AdmissionList(
        f"""# agreed on the telephone
        listed {marks["listed"]}
        named
        wrong {marks["listed"].replace(" ", "").upper()}   # a digit was misread
        """
    )
    unlocked(federation)
    with watching(federation, rule) as watch:
        assert watch.wait_for("waiting", "other").text == "it isn't on the list"
        assert "fingerprint" in watch.wait_for("waiting", "wrong").text
        watch.wait_for("admitted", "listed")
        watch.wait_for("admitted", "named")
    assert [poll(federation.path(name)) for name in names] == [True, True, False, False]


@pytest.mark.parametrize("text", ["Clinic", "clinic 1234", "clinic\nclinic", "clinic " + "x" * 64])
def test_a_list_that_makes_no_sense_names_its_line(text: str) -> None:
    with pytest.raises(DocumentError, match="line"):
        AdmissionList(text)


def test_an_invitation_that_two_devices_hold_admits_neither(blindsum_federation: Make) -> None:
    federation = blindsum_federation(0)
    invitation = federation.owner.invite("clinic")
    join(invitation, federation.path("clinic"), wait=False)
    join(invitation, federation.path("thief"), wait=False)
    unlocked(federation)
    with watching(federation, by_token) as watch:
        assert "2 devices" in watch.wait_for("problem", "clinic").text
    assert not poll(federation.path("clinic"))
    assert not poll(federation.path("thief"))


def test_a_person_decides_and_a_refused_applicant_hears_why(blindsum_federation: Make) -> None:
    federation = blindsum_federation(0)
    invitations = {name: federation.owner.invite(name) for name in ("one", "two")}
    for name in invitations:
        apply(federation, invitations, name)
    unlocked(federation)
    answers = {"one": Decision("admit"), "two": Decision("refuse", "wrong fingerprint")}
    with watching(federation, lambda application: answers[application.member]) as watch:
        watch.wait_for("admitted", "one")
        watch.wait_for("refused", "two")
    with pytest.raises(Refused, match="wrong fingerprint"):
        poll(federation.path("two"))


def test_a_watch_survives_a_server_that_is_away_and_a_folder_in_use(blindsum_federation: Make) -> None:
    federation = blindsum_federation(0)
    invitations = {"clinic": federation.owner.invite("clinic")}
    with watching(federation, by_token) as watch:
        apply(federation, invitations, "clinic")
        watch.wait_for("busy")  # the test's own Owner holds the folder
        unlocked(federation)
        watch.wait_for("admitted", "clinic")


def test_the_command_watches_until_it_is_ended(blindsum_federation: Make) -> None:
    federation = blindsum_federation(0)
    invitations = {"clinic": federation.owner.invite("clinic")}
    folder = unlocked(federation)
    command = [Path(sys.executable).with_name("blindsum"), "owner", "watch", folder]
    process = subprocess.Popen(
        [*command, "--tokens", "--json", "--every", "0.2"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "NO_COLOR": "1"},
    )
    try:
        assert process.stdout is not None
        mark = apply(federation, invitations, "clinic")
        lines = [json.loads(process.stdout.readline()) for _ in range(2)]
        assert [line["event"] for line in lines] == ["asked", "admitted"]
        assert {line["fingerprint"] for line in lines} == {mark}
        assert poll(federation.path("clinic"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_the_aggregator_cannot_admit_by_saying_so(blindsum_federation: Make) -> None:
    """It tells an applicant that it is in, with a certificate of its own authority: the roster decides."""
    server = LyingServer()
    federation = blindsum_federation(3, make_server=server, model=small_model())
    join(federation.owner.invite("clinic"), federation.path("clinic"), wait=False)
    chain = (federation.path("member-1") / "certificate.pem").read_bytes()

    def lie(method: str, member: str, answer: Any) -> Any:
        if method == "PollJoin":
            return enrolment_pb2.PollJoinResponse(state=enrolment_pb2.JOIN_STATE_ADMITTED, certificate=chain)
        return answer

    server.lies(lie)
    assert poll(federation.path("clinic")), "it believes the certificate, which means nothing for trust"
    # With the certificate and the TLS key of another: the server now lets it see the signed documents.
    (federation.path("clinic") / "transport.key").write_bytes(
        (federation.path("member-1") / "transport.key").read_bytes()
    )
    with federation.open("clinic") as member, pytest.raises(DocumentError, match="isn't in roster version"):
        member.latest_state()
    with MemberFolder(federation.path("clinic"), read_only=True) as folder:
        assert folder.group_key(1) is None


@pytest.mark.parametrize("forgery", ["keys", "name", "not a request"])
def test_the_aggregator_cannot_put_its_own_keys_into_a_request(
    blindsum_federation: Make, forgery: str
) -> None:
    server = LyingServer()
    federation = blindsum_federation(0, make_server=server)
    for name in ("clinic", "other"):
        join(federation.owner.invite(name), federation.path(name), wait=False)
    mine = SigningKey.generate()

    def lie(method: str, member: str, answer: Any) -> Any:
        if method != "ListJoinRequests":
            return answer
        told = enrolment_pb2.ListJoinRequestsResponse()
        told.CopyFrom(answer)
        for pending in told.pending:
            body = decode_document(pending.body, JoinBody, "a request")
            values = {name: getattr(body, name) for name in body.__struct_fields__}
            if forgery == "not a request":
                pending.body = b"{}"
                continue
            values |= {"identity": mine.public} if forgery == "keys" else {"id": "other"}
            forged = encode_document(JoinBody(**values))
            if forged == pending.body:
                continue
            pending.body = forged
            pending.signature, _ = sign_request(mine, bytes(32), forged)
        return told

    server.lies(lie)
    assert federation.owner.admit() == (["other"] if forgery == "name" else [])
    for one in federation.owner.pending():
        assert one.problem or forgery == "name"
    assert all(entry.identity != mine.public for entry in federation.owner.roster.members)


def test_the_applicants_keys_and_token_never_reach_the_server(blindsum_federation: Make) -> None:
    federation = blindsum_federation(0)
    invitation = federation.owner.invite("clinic")
    token = read_invitation(invitation).token
    join(invitation, federation.path("clinic"), wait=False)
    federation.owner.admit("clinic")
    assert poll(federation.path("clinic"))
    federation.stop_server()
    stored = b"".join(
        path.read_bytes() for path in (federation.folder / "server").rglob("*") if path.is_file()
    )

    def is_there(value: bytes) -> bool:
        return any(form in stored for form in (value, value.hex().encode(), base64.b64encode(value)))

    with MemberFolder(federation.path("clinic"), read_only=True) as folder:
        assert is_there(folder.identity.public), "the public key is found, so a secret one would be"
        secrets = [folder.identity.secret_bytes(), folder.hpke.secret_bytes(), token]
    assert not any(map(is_there, secrets))


def test_a_newcomer_gets_the_model_at_once_while_a_round_runs(blindsum_federation: Make) -> None:
    federation = blindsum_federation(3, model=small_model("zeros"), rounds=2)
    arrived = threading.Event()
    got: list[Any] = []

    def app(member: Member) -> None:
        for rnd in member.rounds():
            if rnd.index == 2 and member.name == "member-1":
                federation.admit("newcomer")
                with federation.open("newcomer") as newcomer:
                    got.append(newcomer.latest_state()["weight"])
                arrived.set()
            if rnd.index == 2:
                assert arrived.wait(30)
            after = {name: value + np.float32(0.01) for name, value in rnd.weights().items()}
            rnd.submit(after, examples=1)

    federation.run(app, ["member-1", "member-2", "member-3"])
    np.testing.assert_allclose(got[0], 0.01, atol=1e-3)
    assert federation.owner.status().state_round == 2, "the running round wasn't disturbed"
