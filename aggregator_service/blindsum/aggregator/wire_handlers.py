"""Between gRPC and the services: strict decoding in, typed refusals out, one wrapper for every call.

gRPC hands over raw bytes; a message that isn't exactly one encoding of known fields (leftover bytes, an
unknown field, a singular field given twice) is refused before a service sees it. Refusals become status
and trailing metadata by the table in `refusal_status`. Anything unexpected is INTERNAL, logged by type
and place, never with the bytes that caused it.
"""

import asyncio
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, Protocol, TypeAlias, TypeVar

import grpc
import structlog
from blindsum.aggregator.refusal_status import REASON_KEY, STATUS
from blindsum.aggregator.store.state import StorageFailed, Taken
from blindsum.aggregator.structured_logs import logger
from blindsum.crypto.errors import BlindsumError, RefusalReason, Refused
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.unknown_fields import UnknownFieldSet

M = TypeVar("M", bound=Message)
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_log = logger(part="rpc")


def decode_strictly(kind: type[M], data: bytes) -> M:
    """The message in `data`. Raises `Refused` (malformed) unless `data` is a plain encoding of it."""
    message = kind()
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise Refused(RefusalReason.MALFORMED, f"the bytes aren't a {kind.DESCRIPTOR.name}") from None
    # A repeated singular field, a nested unknown field or an over-long integer is shorter when encoded again.
    known = len(UnknownFieldSet(message)) == 0
    if known:
        message.DiscardUnknownFields()
    if not known or message.ByteSize() != len(data):
        raise Refused(
            RefusalReason.MALFORMED,
            f"the {kind.DESCRIPTOR.name} has unknown or repeated fields; update one side",
        )
    return message


class Gate(Protocol):
    """Who calls: checked before every call and handed to the service; None on the enrolment side."""

    def __call__(self, context: Context) -> Any:
        """The caller. Raises `Refused`."""


async def _refuse(context: Context, refusal: Refused, method: str, caller: Any) -> NoReturn:
    _log.info(
        "refused", method=method, caller=str(caller or ""), reason=refusal.reason.value, text=refusal.text
    )
    await context.abort(
        STATUS[refusal.reason], refusal.text, trailing_metadata=((REASON_KEY, refusal.reason.value),)
    )
    raise AssertionError("abort raises")


async def _fail(context: Context, error: BaseException, method: str, caller: Any) -> NoReturn:
    if isinstance(error, Refused):
        await _refuse(context, error, method, caller)
    if isinstance(error, (StorageFailed, Taken)):
        _log.error("storage failed", method=method, text=str(error))
        await context.abort(
            grpc.StatusCode.UNAVAILABLE, "the aggregator can't write at the moment; try again"
        )
    if isinstance(error, BlindsumError):
        await _refuse(context, Refused(RefusalReason.POLICY, str(error)), method, caller)
    place = traceback.extract_tb(error.__traceback__)[-1]
    _log.error("failed", method=method, error=type(error).__name__, place=f"{place.name}:{place.lineno}")
    await context.abort(grpc.StatusCode.INTERNAL, "the aggregator failed on this call; its log says where")
    raise AssertionError("abort raises")


def _wrap(method: MethodDescriptor, service: Any, gate: Gate) -> "grpc.RpcMethodHandler[Any, Any]":
    request_kind: type[Message] = GetMessageClass(method.input_type)
    call: Callable[..., Any] = getattr(service, method.name)
    name = method.name

    async def admitted(context: Context) -> Any:
        structlog.contextvars.clear_contextvars()
        try:
            return gate(context)
        except Exception as error:
            await _fail(context, error, name, None)

    async def decoded(raw: bytes, context: Context, caller: Any) -> Message:
        try:
            return decode_strictly(request_kind, raw)
        except Refused as refusal:
            await _refuse(context, refusal, name, caller)

    async def messages(stream: AsyncIterator[bytes]) -> AsyncIterator[Message]:
        async for raw in stream:
            yield decode_strictly(request_kind, raw)

    async def answer_one(work: Awaitable[Message], context: Context, caller: Any) -> Message:
        try:
            return await work
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:
            await _fail(context, error, name, caller)

    async def answer_many(
        work: AsyncIterator[Message], context: Context, caller: Any
    ) -> AsyncIterator[Message]:
        try:
            async for item in work:
                yield item
        except (asyncio.CancelledError, GeneratorExit, grpc.aio.AbortError):
            raise
        except Exception as error:
            await _fail(context, error, name, caller)

    async def unary_unary(raw: bytes, context: Context) -> Message:
        caller = await admitted(context)
        return await answer_one(call(await decoded(raw, context, caller), caller), context, caller)

    async def stream_unary(stream: AsyncIterator[bytes], context: Context) -> Message:
        caller = await admitted(context)
        return await answer_one(call(messages(stream), caller), context, caller)

    async def unary_stream(raw: bytes, context: Context) -> AsyncIterator[Message]:
        caller = await admitted(context)
        request = await decoded(raw, context, caller)
        async for item in answer_many(call(request, caller), context, caller):
            yield item

    make: Any = {
        (False, False): (grpc.unary_unary_rpc_method_handler, unary_unary),
        (True, False): (grpc.stream_unary_rpc_method_handler, stream_unary),
        (False, True): (grpc.unary_stream_rpc_method_handler, unary_stream),
    }[(method.client_streaming, method.server_streaming)]
    register, behaviour = make
    handler: grpc.RpcMethodHandler[Any, Any] = register(
        behaviour, request_deserializer=None, response_serializer=lambda message: message.SerializeToString()
    )
    return handler


def strict_handler(descriptor: ServiceDescriptor, service: Any, gate: Gate) -> Any:
    """Handlers of every method of a service. `service` has a coroutine (or, where the response is a
    stream, an async generator) of the same name for each: `Method(request, caller)`."""
    handlers = {method.name: _wrap(method, service, gate) for method in descriptor.methods}
    return grpc.method_handlers_generic_handler(descriptor.full_name, handlers)
