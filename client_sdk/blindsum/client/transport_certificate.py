"""A member's transport certificate: fetched once it is admitted, renewed before it expires.

It opens a TLS connection and means nothing for trust. A running member renews it over its own connection
when less than a third of its life is left; one that was off for too long polls its join request again,
which the aggregator answers with a fresh one for as long as the roster holds the member.
"""

import logging
import threading
import time
from typing import Final

from blindsum.client.member_folder import MemberFolder, certificate_request
from blindsum.client.transport import EnrolmentLine, MemberLine, Patience, Unreachable
from blindsum.crypto.errors import RefusalReason, Refused
from blindsum.proto.v1 import enrolment_pb2, round_pb2
from cryptography import x509

RENEWAL_LIFE: Final = 1 / 3
_RENEWAL_PATIENCE: Final = Patience(total=5.0)
_AGAIN_SECONDS: Final = 60.0
"""After a renewal that failed, the longest wait for the next attempt."""
_log = logging.getLogger("blindsum.client")


class TransportCertificate:
    """The certificate in a member's folder, and when it is due."""

    def __init__(self, folder: MemberFolder) -> None:
        self._folder = folder
        self._due = self._expires = 0.0
        self._read()

    def _read(self) -> None:
        chain = self._folder.certificate
        if not chain:
            return
        certificate = x509.load_pem_x509_certificate(chain)
        start = certificate.not_valid_before_utc.timestamp()
        self._expires = certificate.not_valid_after_utc.timestamp()
        self._due = self._expires - RENEWAL_LIFE * (self._expires - start)

    def seconds_left(self) -> float:
        """Until it should be renewed; 0 when it should be by now."""
        return max(0.0, self._due - time.time())

    def line(self, patience: Patience, stop: threading.Event) -> MemberLine:
        """A new line to the members' listener with the certificate as it is."""
        pin, folder = self._folder.pin, self._folder
        return MemberLine(
            pin.member_address,
            pin.ca,
            key=folder.transport_key,
            certificate=folder.certificate,
            patience=patience,
            stop=stop,
        )

    def ensure(self, patience: Patience, stop: threading.Event) -> None:
        """Have one that is good for a while. Raises `Refused` (not_a_participant), `Unreachable`."""
        if self.seconds_left() > 0:
            return
        if self._expires > time.time():
            self.renew(stop)
        else:
            self._poll(patience, stop)

    def renew_in(self, line: MemberLine, stop: threading.Event) -> None:
        """Renew it if it is due, and let a line in use go on with the new one.

        What fails is tried again later: the old one is good for another third of its life.
        """
        if self.seconds_left() > 0:
            return
        if self._expires > time.time():
            renewed = self.renew(stop)
        else:
            try:
                self._poll(_RENEWAL_PATIENCE, stop)
                renewed = True
            except Unreachable as error:
                _log.warning("the certificate has expired and couldn't be renewed yet: %s", error)
                self._due = time.time() + _AGAIN_SECONDS
                renewed = False
        if renewed:
            line.use_certificate(self._folder.transport_key, self._folder.certificate)

    def renew(self, stop: threading.Event) -> bool:
        """Ask for a new one by proof of the identity key; False if the aggregator can't be reached."""
        folder, pin = self._folder, self._folder.pin
        line = self.line(_RENEWAL_PATIENCE, stop)
        try:
            request = certificate_request(folder.transport_key, pin.member)
            answer = line.call(
                line.stub.RenewCertificate,
                round_pb2.RenewCertificateRequest(
                    csr=request, signature=folder.identity.sign("certificate request", request)
                ),
                what="renewing the certificate",
            )
            self._keep(answer.certificate)
        except Unreachable as error:
            _log.warning("the certificate couldn't be renewed yet: %s", error)
            now = time.time()
            self._due = now + min(_AGAIN_SECONDS, max(0.1, (self._expires - now) / 10))
            return False
        finally:
            line.close()
        _log.info("the transport certificate was renewed")
        return True

    def _poll(self, patience: Patience, stop: threading.Event) -> None:
        pin = self._folder.pin
        line = EnrolmentLine(pin.enrolment_address, pin.ca, patience, stop)
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
            raise Refused(
                RefusalReason.NOT_A_PARTICIPANT,
                f"the owner hasn't admitted {pin.member} yet; ask for it, then try again",
            )
        self._keep(answer.certificate)

    def _keep(self, chain: bytes) -> None:
        try:
            x509.load_pem_x509_certificate(chain)
        except ValueError:
            raise Refused(
                RefusalReason.MALFORMED, "the aggregator sent a certificate that can't be read"
            ) from None
        self._folder.keep_certificate(chain)
        self._read()
