"""Between gRPC and the services: strict decoding in, typed refusals out, one wrapper for every call.

gRPC hands over raw bytes; a message that isn't exactly one encoding of known fields (leftover bytes, an
unknown field, a singular field given twice) is refused before a service sees it. Refusals become status
and trailing metadata by the table in `refusal_status`. Anything unexpected is INTERNAL, logged by type
and place, never with the bytes that caused it. Whatever is logged in a call carries its method, federation,
member and round.
"""

import asyncio
import contextlib
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import Any, NoReturn, Protocol, TypeAlias

import grpc
import structlog
from blindsum.aggregator.refusal_status import REASON_KEY, STATUS
from blindsum.aggregator.store.state import StorageFailed, Taken
from blindsum.aggregator.structured_logs import logger
from blindsum.aggregator.upload_chunk import decode_chunk
from blindsum.aggregator.wire_decoding import decode_strictly
from blindsum.crypto.errors import BlindsumError, RefusalReason, Refused
from blindsum.proto.v1 import round_pb2
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_log = logger(part="rpc")


class CallObserver(Protocol):
    """Told about every call; it must neither block nor raise."""

    def received(self, method: str, size: int) -> None:
        """A message of so many bytes came."""

    def sent(self, method: str, size: int) -> None:
        """A message of so many bytes was sent."""

    def finished(self, method: str, outcome: str, seconds: float) -> None:
        """A call ended: ok, refused, storage, failed or cancelled."""

    def refused(self, method: str, caller: Any, reason: RefusalReason, text: str) -> None:
        """A call was refused. `caller` is None while nobody is known."""


class _Nobody:
    def received(self, method: str, size: int) -> None:
        pass

    def sent(self, method: str, size: int) -> None:
        pass

    def finished(self, method: str, outcome: str, seconds: float) -> None:
        pass

    def refused(self, method: str, caller: Any, reason: RefusalReason, text: str) -> None:
        pass


class Gate(Protocol):
    """Who calls: checked before every call and handed to the service; None on the enrolment side."""

    def __call__(self, context: Context) -> Any:
        """The caller. Raises `Refused`."""


CALLS_PER_MEMBER = 48
"""Calls of one member in progress at a time, on all of its connections; the SDK needs five."""


class _Callers:
    """How many calls each member has in progress, so that one can't take up what is there for all."""

    def __init__(self) -> None:
        self._calls: Counter[tuple[bytes, str]] = Counter()

    @contextlib.contextmanager
    def one_more(self, caller: Any) -> Iterator[None]:
        """A call of this member. Raises `Refused` (limit); callers without a certificate aren't counted."""
        if caller is None:
            yield
            return
        key = (caller.federation, caller.member)
        if self._calls[key] >= CALLS_PER_MEMBER:
            raise Refused(
                RefusalReason.LIMIT, f"{caller.member} has {CALLS_PER_MEMBER} calls in progress; end some"
            )
        self._calls[key] += 1
        try:
            yield
        finally:
            self._calls[key] -= 1
            if not self._calls[key]:
                del self._calls[key]


class _Call:
    """One call: what is bound to its log lines, and how it ends."""

    def __init__(self, method: str, context: Context, observer: CallObserver, callers: _Callers) -> None:
        self._callers = callers
        self._counted = contextlib.ExitStack()
        self._method = method
        self._context = context
        self._observer = observer
        self._caller: Any = None
        self._began = time.monotonic()
        self._outcome = "cancelled"
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(method=method)

    def __enter__(self) -> "_Call":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._counted.close()
        outcome = "ok" if kind is None else self._outcome
        self._observer.finished(self._method, outcome, time.monotonic() - self._began)

    async def admit(self, gate: Gate) -> Any:
        """The caller, by whom the log lines of this call are known from now on."""
        try:
            self._caller = caller = gate(self._context)
            self._counted.enter_context(self._callers.one_more(caller))
        except Exception as error:
            await self.fail(error)
        if caller is not None:
            structlog.contextvars.bind_contextvars(
                member=caller.member, federation=caller.federation.hex()[:16]
            )
        return caller

    async def decode(self, kind: type[Message], raw: bytes) -> Message:
        """A request of the wire."""
        self._observer.received(self._method, len(raw))
        try:
            message = decode_strictly(kind, raw)
        except Refused as refusal:
            await self.refuse(refusal)
        number = getattr(message, "round", 0)
        if isinstance(number, int) and number:
            structlog.contextvars.bind_contextvars(round=number)
        return message

    async def refuse(self, refusal: Refused) -> NoReturn:
        """End the call with a refusal."""
        self._outcome = "refused"
        _log.info("refused", reason=refusal.reason.value, text=refusal.text)
        self._observer.refused(self._method, self._caller, refusal.reason, refusal.text)
        await self._context.abort(
            STATUS[refusal.reason], refusal.text, trailing_metadata=((REASON_KEY, refusal.reason.value),)
        )
        raise AssertionError("abort raises")

    async def fail(self, error: BaseException) -> NoReturn:
        """End the call with what went wrong."""
        if isinstance(error, Refused):
            await self.refuse(error)
        if isinstance(error, (StorageFailed, Taken)):
            self._outcome = "storage"
            _log.error("storage failed", text=str(error))
            await self._context.abort(
                grpc.StatusCode.UNAVAILABLE, "the aggregator can't write at the moment; try again"
            )
        if isinstance(error, BlindsumError):
            await self.refuse(Refused(RefusalReason.POLICY, str(error)))
        self._outcome = "failed"
        place = traceback.extract_tb(error.__traceback__)[-1]
        _log.error("failed", error=type(error).__name__, place=f"{place.name}:{place.lineno}")
        await self._context.abort(
            grpc.StatusCode.INTERNAL, "the aggregator failed on this call; its log says where"
        )
        raise AssertionError("abort raises")


def _wrap(
    method: MethodDescriptor, service: Any, gate: Gate, observer: CallObserver, callers: _Callers
) -> "grpc.RpcMethodHandler[Any, Any]":
    request_kind: type[Message] = GetMessageClass(method.input_type)
    behaviour_of: Callable[..., Any] = getattr(service, method.name)
    name = method.name

    # Bulk is decoded by hand: see `upload_chunk`.
    is_bulk = method.input_type == round_pb2.UploadRequest.DESCRIPTOR
    part: Callable[[bytes], Any] = decode_chunk if is_bulk else partial(decode_strictly, request_kind)

    async def messages(stream: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for raw in stream:
            observer.received(name, len(raw))
            yield part(raw)

    async def answer_one(work: Awaitable[Message], call: _Call) -> Message:
        try:
            return await work
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:
            await call.fail(error)

    async def unary_unary(raw: bytes, context: Context) -> Message:
        with _Call(name, context, observer, callers) as call:
            caller = await call.admit(gate)
            return await answer_one(behaviour_of(await call.decode(request_kind, raw), caller), call)

    async def stream_unary(stream: AsyncIterator[bytes], context: Context) -> Message:
        with _Call(name, context, observer, callers) as call:
            caller = await call.admit(gate)
            return await answer_one(behaviour_of(messages(stream), caller), call)

    async def unary_stream(raw: bytes, context: Context) -> AsyncIterator[Message]:
        with _Call(name, context, observer, callers) as call:
            caller = await call.admit(gate)
            request = await call.decode(request_kind, raw)
            try:
                async for item in behaviour_of(request, caller):
                    yield item
            except (asyncio.CancelledError, GeneratorExit, grpc.aio.AbortError):
                raise
            except Exception as error:
                await call.fail(error)

    def serialize(message: Message) -> bytes:
        data = message.SerializeToString()
        observer.sent(name, len(data))
        return data

    make: Any = {
        (False, False): (grpc.unary_unary_rpc_method_handler, unary_unary),
        (True, False): (grpc.stream_unary_rpc_method_handler, stream_unary),
        (False, True): (grpc.unary_stream_rpc_method_handler, unary_stream),
    }[(method.client_streaming, method.server_streaming)]
    register, behaviour = make
    handler: grpc.RpcMethodHandler[Any, Any] = register(
        behaviour, request_deserializer=None, response_serializer=serialize
    )
    return handler


def strict_handler(
    descriptor: ServiceDescriptor, service: Any, gate: Gate, observer: CallObserver | None = None
) -> Any:
    """Handlers of every method of a service. `service` has a coroutine (or, where the response is a
    stream, an async generator) of the same name for each: `Method(request, caller)`."""
    callers = _Callers()
    handlers = {
        method.name: _wrap(method, service, gate, observer or _Nobody(), callers)
        for method in descriptor.methods
    }
    return grpc.method_handlers_generic_handler(descriptor.full_name, handlers)
