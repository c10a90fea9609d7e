"""Channels to the aggregator: pinned TLS, retries with backoff and jitter, resumable bulk.

Every call here is idempotent on the server, so that a call whose answer was lost is simply made again.
Refusals (a `blindsum-reason` in the trailing metadata) come back as `Refused` and are never retried.
"""

import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
from blindsum.crypto.errors import BlindsumError, RefusalReason, Refused
from blindsum.proto.v1 import enrolment_pb2_grpc, round_pb2, round_pb2_grpc

T = TypeVar("T")

REASON_KEY: Final = "blindsum-reason"
CHUNK_BYTES: Final = 256 * 1024
CALL_SECONDS: Final = 60.0

_RETRYABLE: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.ABORTED,
        # A connection that dies in a stream can surface as INTERNAL (grpc issue 36066).
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        # A dying server cancels what it serves.
        grpc.StatusCode.CANCELLED,
    }
)
_OPTIONS: Final = (
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    # One connection a member, even where many members live in one process.
    ("grpc.use_local_subchannel_pool", 1),
)
_log = logging.getLogger("blindsum.client")
_jitter = secrets.SystemRandom()


class Unreachable(BlindsumError):
    """The aggregator didn't answer for as long as the caller was willing to try."""


class Stopped(BlindsumError):
    """The member was closed while it waited."""


@dataclass(frozen=True)
class Patience:
    """How to retry: waits double from `first` to `longest` seconds, cut at random; `total` seconds in all.

    `total` None goes on until the caller is stopped.
    """

    first: float = 0.05
    longest: float = 5.0
    total: float | None = 60.0


DEFAULT: Final = Patience()
ENDLESS: Final = Patience(total=None)


class Backoff:
    """The waits of one series of attempts; `stop` ends a wait at once."""

    def __init__(self, patience: Patience, stop: threading.Event) -> None:
        self._patience = patience
        self._stop = stop
        self._next = patience.first
        self._left = patience.total

    def restart(self) -> None:
        """Something went well: the next wait is short again."""
        self._next = self._patience.first
        self._left = self._patience.total

    def wait(self, at_least: float = 0.0) -> bool:
        """Wait before the next attempt; False when patience is at its end. Raises `Stopped`."""
        if self._left is not None and self._left <= 0:
            return False
        pause = max(at_least, self._next * _jitter.uniform(0.5, 1.0))
        self._next = min(self._next * 2, self._patience.longest)
        if self._left is not None:
            pause = min(pause, self._left)
            self._left -= pause
        if self._stop.wait(pause):
            raise Stopped("the member was closed")
        return True


def refusal_of(error: grpc.RpcError) -> Refused | None:
    """The refusal that a failed call carries, or None."""
    metadata: Any = error.trailing_metadata() if isinstance(error, grpc.Call) else None
    for key, value in metadata or ():
        if key == REASON_KEY:
            text = error.details() if isinstance(error, grpc.Call) else None
            try:
                return Refused(RefusalReason(str(value)), text or "the aggregator refused the call")
            except ValueError:
                return Refused(RefusalReason.POLICY, text or "the aggregator refused the call")
    return None


def is_retryable(error: grpc.RpcError) -> bool:
    """Whether the same call may succeed later."""
    return isinstance(error, grpc.Call) and error.code() in _RETRYABLE


def _failure(error: grpc.RpcError, what: str) -> BlindsumError:
    code = error.code() if isinstance(error, grpc.Call) else None
    details = error.details() if isinstance(error, grpc.Call) else None
    name = code.name if code is not None else "UNKNOWN"
    return Unreachable(f"{what} failed: {details or 'no details'} ({name})")


class Line:
    """A channel to one listener, with the rule by which its calls are retried."""

    def __init__(
        self, address: str, credentials: grpc.ChannelCredentials, patience: Patience, stop: threading.Event
    ) -> None:
        self.address = address
        self.patience = patience
        self.stop = stop
        self.channel = grpc.secure_channel(address, credentials, options=_OPTIONS)

    def call(
        self,
        method: Any,
        request: Any,
        *,
        what: str,
        seconds: float = CALL_SECONDS,
        patience: Patience | None = None,
    ) -> Any:
        """The answer to an idempotent unary call.

        Raises `Refused`, `Unreachable` when patience is at its end, `Stopped` when the member is closed.
        """

        def attempt() -> Any:
            return method(request, timeout=seconds)

        return self.retry(attempt, what=what, patience=patience)

    def retry(self, attempt: Callable[[], T], *, what: str, patience: Patience | None = None) -> T:
        """What `attempt` returns, tried again after failures of the connection."""
        backoff = Backoff(patience or self.patience, self.stop)
        while True:
            if self.stop.is_set():
                raise Stopped("the member was closed")
            try:
                return attempt()
            except grpc.RpcError as error:
                refused = refusal_of(error)
                if refused is not None:
                    raise refused from None
                if not is_retryable(error):
                    raise _failure(error, what) from None
                _log.debug("%s, trying again", _failure(error, what))
                if not backoff.wait():
                    raise Unreachable(
                        f"the aggregator at {self.address} doesn't answer ({what}: {_failure(error, what)}); "
                        "check the address, the network and the server"
                    ) from None
            except ValueError:
                self._require_open()
                raise

    def _require_open(self) -> None:
        """grpc raises `ValueError` for a channel that was closed meanwhile."""
        if self.stop.is_set():
            raise Stopped("the member was closed") from None

    def _gone(self, what: str) -> Unreachable:
        return Unreachable(f"{what} broke off and the aggregator at {self.address} doesn't come back")

    def close(self) -> None:
        """Close the channel; calls in progress fail."""
        self.channel.close()


class EnrolmentLine(Line):
    """The enrolment listener: the server's certificate is checked against the pinned CA."""

    def __init__(
        self, address: str, ca: str, patience: Patience = DEFAULT, stop: threading.Event | None = None
    ) -> None:
        credentials = grpc.ssl_channel_credentials(root_certificates=ca.encode())
        super().__init__(address, credentials, patience, stop or threading.Event())
        self.stub = enrolment_pb2_grpc.EnrolmentServiceStub(self.channel)


class MemberLine(Line):
    """The members' listener: mutual TLS with the member's transport certificate."""

    def __init__(
        self,
        address: str,
        ca: str,
        *,
        key: bytes,
        certificate: bytes,
        patience: Patience = DEFAULT,
        stop: threading.Event | None = None,
    ) -> None:
        credentials = grpc.ssl_channel_credentials(ca.encode(), key, certificate)
        super().__init__(address, credentials, patience, stop or threading.Event())
        self.stub = round_pb2_grpc.RoundServiceStub(self.channel)
        self._ca = ca
        self._retired: list[grpc.Channel] = []
        self._stream: Any = None

    def use_certificate(self, key: bytes, certificate: bytes) -> None:
        """Make all further calls with another certificate; calls in progress end as they are."""
        self._retired.append(self.channel)
        credentials = grpc.ssl_channel_credentials(self._ca.encode(), key, certificate)
        self.channel = grpc.secure_channel(self.address, credentials, options=_OPTIONS)
        self.stub = round_pb2_grpc.RoundServiceStub(self.channel)
        self.end_watch()

    def close(self) -> None:
        """Close the channels; calls in progress fail."""
        for channel in (*self._retired, self.channel):
            channel.close()

    def watch(self, on_connection: Callable[[bool], None]) -> Iterator[round_pb2.WatchResponse]:
        """The aggregator's notices, for ever: a broken stream is opened again.

        Ends when the member is closed. Raises `Refused` when the member is refused for good.
        """
        backoff = Backoff(ENDLESS, self.stop)
        while not self.stop.is_set():
            stream = None
            try:
                stream = self.stub.Watch(round_pb2.WatchRequest(ready=True))
                # Closing cancels the stream, or the iteration below would wait for the next notice.
                self._cancel_on_stop(stream)
                for notice in stream:
                    backoff.restart()
                    on_connection(True)
                    yield notice
            except grpc.RpcError as error:
                if self.stop.is_set():
                    return
                refused = refusal_of(error)
                # An expired certificate is renewed by whoever watches; then this goes on.
                later = (RefusalReason.LIMIT, RefusalReason.EXPIRED)
                if refused is not None and refused.reason not in later:
                    raise refused from None
                if refused is None and not is_retryable(error):
                    raise _failure(error, "watching") from None
            except ValueError:
                if self.stop.is_set():
                    return
                raise
            finally:
                if stream is not None:
                    stream.cancel()
            on_connection(False)
            try:
                backoff.wait()
            except Stopped:
                return

    def first_notice(self) -> round_pb2.WatchResponse:
        """What the aggregator says now, without taking part."""

        def ask() -> round_pb2.WatchResponse:
            stream = self.stub.Watch(round_pb2.WatchRequest(ready=False), timeout=CALL_SECONDS)
            try:
                notice: round_pb2.WatchResponse = next(iter(stream))
                return notice
            finally:
                stream.cancel()

        return self.retry(ask, what="asking for the federation's state")

    def _cancel_on_stop(self, stream: Any) -> None:
        self._stream = stream
        if self.stop.is_set():
            stream.cancel()

    def end_watch(self) -> None:
        """Cancel the open watch stream, if any."""
        stream = self._stream
        if stream is not None:
            stream.cancel()

    def upload(
        self,
        begin: round_pb2.BeginUploadRequest,
        path: Path,
        on_bytes: Callable[[int, int], None],
        *,
        patience: Patience | None = None,
    ) -> None:
        """Send the file's bytes until the aggregator has them durably, from where it already is.

        Raises `Refused`, `Unreachable`, `Stopped`.
        """
        total = path.stat().st_size
        backoff = Backoff(patience or self.patience, self.stop)
        best = -1
        while True:
            answer = self.call(self.stub.BeginUpload, begin, what="beginning the upload", patience=patience)
            kind = answer.WhichOneof("answer")
            if kind == "done":
                on_bytes(total, total)
                return
            if kind == "retry_after_ms":
                # Waiting for a slot isn't a failure: it costs no patience.
                if self.stop.wait(answer.retry_after_ms / 1000 * _jitter.uniform(1.0, 1.5)):
                    raise Stopped("the member was closed")
                continue
            slot = answer.slot
            if slot.offset > best:
                best = slot.offset
                backoff.restart()
            on_bytes(slot.offset, total)
            try:
                self.stub.Upload(self._chunks(slot, path, total, on_bytes))
                return
            except ValueError:
                self._require_open()
                raise
            except grpc.RpcError as error:
                self._require_open()
                refused = refusal_of(error)
                again = (RefusalReason.LIMIT, RefusalReason.WRONG_OFFSET)
                if refused is not None and refused.reason not in again:
                    raise refused from None
                if refused is None and not is_retryable(error):
                    raise _failure(error, "the upload") from None
                if not backoff.wait():
                    raise self._gone("the upload") from None

    def _chunks(
        self, slot: round_pb2.UploadSlot, path: Path, total: int, on_bytes: Callable[[int, int], None]
    ) -> Iterator[round_pb2.UploadRequest]:
        offset = slot.offset
        with path.open("rb") as file:
            file.seek(offset)
            while not self.stop.is_set():
                data = file.read(CHUNK_BYTES)
                if not data:
                    return
                yield round_pb2.UploadRequest(upload_id=slot.upload_id, offset=offset, data=data)
                offset += len(data)
                on_bytes(offset, total)

    def download(
        self,
        kind: "round_pb2.BulkKind.ValueType",
        number: int,
        total: int,
        *,
        what: str,
        on_bytes: Callable[[int, int], None],
        patience: Patience | None = None,
    ) -> Iterator[bytes]:
        """Exactly `total` bytes in pieces; goes on from the last byte after a broken connection.

        Raises `Refused` (wrong_size) when the aggregator sends more or less.
        """
        backoff = Backoff(patience or self.patience, self.stop)
        offset = 0
        while offset < total:
            try:
                request = round_pb2.DownloadRequest(kind=kind, round=number, offset=offset)
                for part in self.stub.Download(request):
                    data = part.data
                    offset += len(data)
                    if offset > total:
                        raise Refused(RefusalReason.WRONG_SIZE, f"{what} is longer than {total} bytes")
                    backoff.restart()
                    on_bytes(offset, total)
                    yield data
                if offset < total:
                    raise Refused(RefusalReason.WRONG_SIZE, f"{what} ended after {offset} of {total} bytes")
            except ValueError:
                self._require_open()
                raise
            except grpc.RpcError as error:
                self._require_open()
                refused = refusal_of(error)
                if refused is not None:
                    raise refused from None
                if not is_retryable(error):
                    raise _failure(error, what) from None
                if not backoff.wait():
                    raise self._gone(what) from None
