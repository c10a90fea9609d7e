"""Records every message that the server's handlers receive and return, after TLS.

It is how a privacy officer sees what the server sees, and what the capture test and the demo's panel
"what the server saw" read. It records ciphertext, public keys and signed documents, because nothing
else reaches the handlers; it is off unless `capture_directory` is set.
"""

import itertools
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message

_HEAD = struct.Struct("<BQ")
RECEIVED, RETURNED = 0, 1


class CaptureInterceptor(grpc.aio.ServerInterceptor):
    """Writes one file a call: `<number>-<method>-<member>.capture`, its messages in order.

    The member is the one of the certificate; "anyone" where none is asked for.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._numbers = itertools.count(1 + sum(1 for _ in directory.glob("*.capture")))
        self._lock = threading.Lock()

    def _file(self, method: str, context: Any) -> Path:
        with self._lock:
            number = next(self._numbers)
        names = context.auth_context().get("x509_subject_alternative_name", ())
        member = names[0].decode().rpartition("/")[2] if names else "anyone"
        return self._directory / f"{number:07d}-{method.rsplit('/', 1)[-1]}-{member}.capture"

    @staticmethod
    def _record(path: Path, direction: int, message: Message | bytes) -> None:
        # Requests come as raw bytes: the handlers decode them, strictly, themselves.
        data = message if isinstance(message, bytes) else message.SerializeToString()
        with path.open("ab") as file:
            file.write(_HEAD.pack(direction, len(data)) + data)

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], "Awaitable[grpc.RpcMethodHandler[Any, Any] | None]"
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Wrap the handler of each call; the call itself is as without."""
        handler = await continuation(handler_call_details)
        method: Any = handler_call_details.method
        if isinstance(method, bytes):
            method = method.decode()
        if handler is None or not str(method).startswith("/blindsum."):
            return handler
        return self._wrapped(handler, str(method))

    def _wrapped(self, handler: Any, method: str) -> "grpc.RpcMethodHandler[Any, Any]":
        record = self._record

        async def received(requests: AsyncIterator[Message], path: Path) -> AsyncIterator[Message]:
            async for request in requests:
                record(path, RECEIVED, request)
                yield request

        async def unary_unary(request: Message, context: Any) -> Message:
            path = self._file(method, context)
            record(path, RECEIVED, request)
            response: Message = await handler.unary_unary(request, context)
            record(path, RETURNED, response)
            return response

        async def stream_unary(requests: AsyncIterator[Message], context: Any) -> Message:
            path = self._file(method, context)
            response: Message = await handler.stream_unary(received(requests, path), context)
            record(path, RETURNED, response)
            return response

        async def unary_stream(request: Message, context: Any) -> AsyncIterator[Message]:
            path = self._file(method, context)
            record(path, RECEIVED, request)
            async for response in handler.unary_stream(request, context):
                record(path, RETURNED, response)
                yield response

        codec = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(unary_unary, **codec)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(stream_unary, **codec)
        return grpc.unary_stream_rpc_method_handler(unary_stream, **codec)


def read_capture(path: Path) -> Iterator[tuple[int, bytes]]:
    """The messages of one captured call: (RECEIVED or RETURNED, serialised protobuf)."""
    data = path.read_bytes()
    offset = 0
    while offset < len(data):
        direction, size = _HEAD.unpack_from(data, offset)
        offset += _HEAD.size
        yield direction, data[offset : offset + size]
        offset += size
