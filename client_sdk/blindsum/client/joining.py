"""How a device joins: keys are made here and stay here; the owner admits, the aggregator only relays."""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blindsum.client.member_folder import MemberFolder, Pin, certificate_request, transport_key
from blindsum.client.progress import OnProgress, silent
from blindsum.client.transport import DEFAULT, Backoff, EnrolmentLine, Patience
from blindsum.crypto.canonical import decode_document, encode_document
from blindsum.crypto.errors import DocumentError, RefusalReason, Refused
from blindsum.crypto.primitives.sealing import HpkeKey
from blindsum.crypto.primitives.signing import SigningKey
from blindsum.crypto.trust.documents import fingerprint
from blindsum.crypto.trust.joining import Invitation, JoinBody, request_id, sign_request
from blindsum.proto.v1 import enrolment_pb2

FOR_DAYS: Final = Patience(first=0.5, longest=30.0, total=None)
"""How to ask again when the owner has to answer, who is offline most of the time."""


def read_invitation(source: str | os.PathLike[str] | bytes) -> Invitation:
    """The invitation in a file or in bytes. Raises `Refused` (malformed)."""
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    return decode_document(data, Invitation, "the invitation")


def join(
    invitation: Invitation | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    organisation: str = "",
    wait: bool = True,
    on_progress: OnProgress = silent,
    patience: Patience = DEFAULT,
) -> str:
    """Make this device's keys in a new folder, and ask to be admitted; the identity key's fingerprint.

    With `wait`, returns once the owner has admitted this member, which may take days; without, call
    `poll` or `wait_for_admission` later, or just run the member.

    Asking again with a folder that was made before (the first call lost its connection) sends the same
    request. Raises `DocumentError` for an expired invitation, `FolderError` for a folder in use,
    `Unreachable`, `Refused`.
    """
    if not isinstance(invitation, Invitation):
        invitation = read_invitation(invitation)
    if time.time() > invitation.valid_until:
        raise DocumentError("this invitation has expired; ask the owner for a new one")
    path = Path(folder)
    if not (path / "federation.json").exists():
        _make(invitation, path, organisation)
    with MemberFolder(path) as opened:
        pin = opened.pin
        if (pin.federation, pin.member) != (invitation.federation, invitation.member):
            raise DocumentError(f"{path} belongs to {pin.member} of {pin.name}; choose a new folder")
        body = opened.join_body
        signature, token_mac = sign_request(opened.identity, invitation.token, body)
        line = EnrolmentLine(pin.enrolment_address, pin.ca, patience)
        try:
            line.call(
                line.stub.Join,
                enrolment_pb2.JoinRequest(
                    federation=pin.federation,
                    body=body,
                    signature=signature,
                    token_mac=token_mac,
                    token_id=invitation.token_id(),
                    csr=opened.certificate_request,
                ),
                what="asking to be admitted",
            )
        finally:
            line.close()
        mark = fingerprint(opened.identity.public)
    if wait:
        wait_for_admission(path, on_wait=lambda _: on_progress("waiting", 0, 0))
    return mark


def _make(invitation: Invitation, path: Path, organisation: str) -> None:
    identity, hpke, transport = SigningKey.generate(), HpkeKey.generate(), transport_key()
    body = encode_document(
        JoinBody(
            federation=invitation.federation,
            id=invitation.member,
            organisation=organisation,
            identity=identity.public,
            hpke=hpke.public,
            created=int(time.time()),
        )
    )
    pin = Pin(
        federation=invitation.federation,
        name=invitation.federation_name,
        owner=invitation.owner,
        member=invitation.member,
        organisation=organisation,
        enrolment_address=invitation.enrolment_address,
        member_address=invitation.member_address,
        ca=invitation.ca,
        request_id=request_id(body),
    )
    request = certificate_request(transport, invitation.member)
    MemberFolder.create(path, pin, identity, hpke, transport, body, request).close()


@dataclass(frozen=True)
class Admission:
    """What became of a request, as the aggregator says.

    `owner_looked` is when the owner last looked at the requests (Unix seconds; 0: not since the server
    started), `owner_watching` whether it does so all the time. Only the signed roster admits: a member
    checks that by itself before its first round.
    """

    admitted: bool
    owner_watching: bool = False
    owner_looked: int = 0

    def __str__(self) -> str:
        if self.admitted:
            return "admitted"
        if self.owner_watching:
            return "waiting; the owner's machine is watching and looks at requests as they come"
        if self.owner_looked:
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.owner_looked))
            return f"waiting at the server; the owner's machine isn't watching, it last looked at {when}"
        return "waiting at the server; the owner's machine isn't watching and hasn't looked yet"


def poll(folder: str | os.PathLike[str], *, patience: Patience = DEFAULT) -> bool:
    """Whether the owner has admitted this member; then its certificate is stored.

    Raises `Refused` (not_a_participant) when the owner said no.
    """
    return ask(folder, patience=patience).admitted


def ask(folder: str | os.PathLike[str], *, patience: Patience = DEFAULT) -> Admission:
    """What became of this member's request; once it is admitted, its certificate is stored.

    Raises `Refused` (not_a_participant) when the owner said no.
    """
    with MemberFolder(Path(folder)) as opened:
        pin = opened.pin
        line = EnrolmentLine(pin.enrolment_address, pin.ca, patience)
        try:
            answer = line.call(
                line.stub.PollJoin,
                enrolment_pb2.PollJoinRequest(federation=pin.federation, request_id=pin.request_id),
                what="asking for admission",
            )
        finally:
            line.close()
        if answer.state == enrolment_pb2.JOIN_STATE_REFUSED:
            raise Refused(RefusalReason.NOT_A_PARTICIPANT, f"the owner refused {pin.member}: {answer.reason}")
        if answer.state != enrolment_pb2.JOIN_STATE_ADMITTED:
            return Admission(False, answer.owner_watching, answer.owner_looked)
        opened.keep_certificate(answer.certificate)
        return Admission(True)


def wait_for_admission(
    folder: str | os.PathLike[str],
    *,
    patience: Patience = FOR_DAYS,
    stop: threading.Event | None = None,
    on_wait: Callable[[Admission], None] = lambda _: None,
) -> None:
    """Poll until the owner answers: the owner is offline most of the time, so this may take days.

    `on_wait` hears after each poll whether somebody watches. Raises `Refused` (not_a_participant) when the
    owner said no, or patience is at its end.
    """
    backoff = Backoff(patience, stop or threading.Event())
    while not (answer := ask(folder)).admitted:
        on_wait(answer)
        if not backoff.wait():
            raise Refused(RefusalReason.NOT_A_PARTICIPANT, "the owner hasn't answered yet; ask again later")
