"""The line to the inference service: today's key, encrypted questions, and no waiting for a cloud that is
away.
"""

import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

import grpc
import numpy as np
from blindsum.client.inference.calibration import Floats
from blindsum.client.private_files import read_private
from blindsum.client.transport import CHUNK_BYTES, refusal_of
from blindsum.crypto.errors import BlindsumError, OpeningFailed, RefusalReason, Refused
from blindsum.crypto.inference.key_holder import TailKeyHolder
from blindsum.crypto.inference.tail_model import TailCard
from blindsum.proto.v1 import inference_pb2, inference_pb2_grpc

Mode = Literal["encrypted", "tls"]

KEY_SECONDS: Final = 24 * 3600
"""A key's life; after it, a new one is made while the old one serves on."""
GRACE_SECONDS: Final = 3600
_REGISTER_SECONDS: Final = 120.0
_log = logging.getLogger("blindsum.client")


class CloudUnavailable(BlindsumError):
    """The inference service is away, slow, or refuses; the edge answers alone."""


class ImplausibleAnswer(BlindsumError):
    """An answer that no honest evaluation gives. Never tell the service: that would be a decryption
    oracle.
    """


class ClearFeatureWarning(UserWarning):
    """Mode `tls`: the service's operator can rebuild the image from the feature."""


@dataclass(frozen=True)
class CloudAnswer:
    """The cloud's logit, and the version of the tail that gave it."""

    logit: float
    version: str


@dataclass(frozen=True)
class _Session:
    card: TailCard
    holder: TailKeyHolder | None
    made: float


class CloudTail:
    """A member's connection to the inference service, over mutual TLS.

    `mode` is `encrypted` (the service sees neither feature nor answer) or, only for a server inside the
    member's trust, `tls` (with a `ClearFeatureWarning`). A question waits at most `seconds`; after a
    failure none is asked for `pause` seconds. `version` pins the tail that may answer. The member's key is
    made here, kept in memory only, and replaced every day.
    """

    def __init__(
        self,
        address: str,
        *,
        ca: str,
        key: bytes,
        certificate: bytes,
        mode: Mode = "encrypted",
        seconds: float = 2.0,
        pause: float = 30.0,
        version: str | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        if mode not in ("encrypted", "tls"):
            raise ValueError(f"a cloud answers in mode 'encrypted' or 'tls', not {mode!r}")
        if mode == "tls":
            warnings.warn(
                f"features go to {address} in the clear inside TLS: its operator can rebuild the images",
                ClearFeatureWarning,
                stacklevel=2,
            )
        self.address = address
        self.mode: Mode = mode
        self._seconds, self._pause, self._version, self._now = seconds, pause, version, now
        credentials = grpc.ssl_channel_credentials(ca.encode(), key, certificate)
        self._channel = grpc.secure_channel(
            address, credentials, options=(("grpc.use_local_subchannel_pool", 1),)
        )
        self._stub: Any = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._session: _Session | None = None
        self._quiet_until = 0.0
        self._preparing = threading.Lock()
        self._closed = False

    @classmethod
    def of_member(cls, folder: Path, address: str, ca: str, **options: Any) -> Self:
        """With the transport key and certificate in a member's folder; `options` as in the constructor.

        Raises `FolderError` where they are missing.
        """
        certificate = read_private(folder / "certificate.pem")
        key = read_private(folder / "transport.key")
        return cls(address, ca=ca, key=key, certificate=certificate, **options)

    @property
    def card(self) -> TailCard | None:
        """The tail's card, once `prepare` got it."""
        session = self._session
        return None if session is None else session.card

    @property
    def key_digest(self) -> bytes | None:
        """Digest of the evaluation keys in use."""
        session = self._session
        return None if session is None or session.holder is None else session.holder.digest

    def prepare(self) -> TailCard:
        """Fetch the card; in mode `encrypted`, make today's key and register its evaluation keys.

        Takes a second or two and 5 MB up, once a day. Raises `CloudUnavailable`.
        """
        with self._preparing:
            card, clear_allowed = self._fetch_card()
            holder = None
            if self.mode == "encrypted":
                holder = TailKeyHolder(card)
                self._call(self._stub.RegisterKeys, self._registration(holder), _REGISTER_SECONDS)
            elif not clear_allowed:
                raise CloudUnavailable(f"the service at {self.address} takes no features in mode 'tls'")
            self._session = _Session(card, holder, self._now())
            return card

    def _fetch_card(self) -> tuple[TailCard, bool]:
        described = self._call(
            self._stub.DescribeTail, inference_pb2.DescribeTailRequest(), _REGISTER_SECONDS
        )
        try:
            card = TailCard.parse(described.card)
        except Refused as refusal:
            raise CloudUnavailable(f"the service at {self.address} sent a bad card: {refusal.text}") from None
        if self._version is not None and card.version != self._version:
            raise CloudUnavailable(f"the service has tail {card.version}, pinned is {self._version}")
        return card, described.clear_allowed

    @staticmethod
    def _registration(holder: TailKeyHolder) -> Iterator[inference_pb2.RegisterKeysRequest]:
        start = inference_pb2.RegisterKeysStart(tail=holder.card.digest, digest=holder.digest)
        yield inference_pb2.RegisterKeysRequest(start=start)
        keys = holder.evaluation_keys
        for offset in range(0, len(keys), CHUNK_BYTES):
            yield inference_pb2.RegisterKeysRequest(data=keys[offset : offset + CHUNK_BYTES])

    def ask(self, feature: Floats) -> CloudAnswer:
        """The cloud's answer to one raw feature (d,), within `seconds`.

        Raises `CloudUnavailable`, `ImplausibleAnswer`; `ParameterRefused` for a feature that doesn't fit
        the tail.
        """
        now = self._now()
        if now < self._quiet_until:
            raise CloudUnavailable(f"the service at {self.address} failed a moment ago")
        session = self._current(now)
        tail = session.card.digest
        try:
            if session.holder is None:
                session.card.standardise(np.asarray(feature)[None])
                data = np.asarray(feature, "<f4").tobytes()
                request = inference_pb2.InferClearRequest(tail=tail, feature=data)
                logit = self._call(self._stub.InferClear, request, self._seconds).logit
            else:
                frame = session.holder.encrypt(feature)
                asked = inference_pb2.InferEncryptedRequest(
                    tail=tail, keys=session.holder.digest, feature=frame
                )
                answer = self._call(self._stub.InferEncrypted, asked, self._seconds).answer
                logit = self._opened(session.holder, answer)
        except CloudUnavailable as error:
            cause = error.__cause__
            known = isinstance(cause, Refused) and cause.reason in (
                RefusalReason.WRONG_DIGEST,
                RefusalReason.CONFLICT,
            )
            if known:  # the tail has changed, or the service lost the keys
                self._session = None
            else:
                self._quiet_until = self._now() + self._pause
            raise
        if not np.isfinite(logit):
            raise ImplausibleAnswer("the cloud's answer is no number")
        return CloudAnswer(float(logit), session.card.version)

    @staticmethod
    def _opened(holder: TailKeyHolder, answer: bytes) -> float:
        try:
            return holder.decrypt(answer)
        except (Refused, OpeningFailed):
            raise ImplausibleAnswer("the cloud's answer doesn't open to a possible logit") from None

    def _current(self, now: float) -> _Session:
        """Today's session; a new one is made in the background, without holding up an answer."""
        session = self._session
        age = 0.0 if session is None or session.holder is None else now - session.made
        if session is None or age >= KEY_SECONDS:
            threading.Thread(target=self._prepare_quietly, daemon=True, name="blindsum-tail-key").start()
        if session is None or age >= KEY_SECONDS + GRACE_SECONDS:
            raise CloudUnavailable("today's key isn't registered yet; call prepare() ahead of images")
        return session

    def _prepare_quietly(self) -> None:
        if self._closed or self._preparing.locked():
            return
        try:
            self.prepare()
        except BlindsumError as error:
            self._quiet_until = self._now() + self._pause
            _log.warning("the cloud isn't ready to answer: %s", error)

    def _call(self, method: Any, request: Any, seconds: float) -> Any:
        try:
            return method(request, timeout=seconds)
        except grpc.RpcError as error:
            refused = refusal_of(error)
            if refused is not None:
                raise CloudUnavailable(f"the service refuses: {refused.text}") from refused
            code = error.code().name if isinstance(error, grpc.Call) else "UNKNOWN"
            raise CloudUnavailable(f"the service at {self.address} doesn't answer ({code})") from error
        except ValueError:
            raise CloudUnavailable("the connection to the cloud was closed") from None

    def close(self) -> None:
        """Close the connection and forget the key."""
        self._closed = True
        self._session = None
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
