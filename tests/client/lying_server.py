"""An aggregator that lies: a real server whose answers a test changes on their way out."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from blindsum.aggregator.server import AggregatorServer
from blindsum.aggregator.settings import AggregatorSettings
from blindsum.proto.v1 import round_pb2

Lie = Callable[[str, str, Any], Any]
"""`lie(method, member, answer)` returns the answer that the member gets."""


class LyingInterceptor(grpc.aio.ServerInterceptor):
    def __init__(self) -> None:
        self.lie: Lie | None = None
        self.documents: dict[bytes, bytes] = {}
        self.calls: list[tuple[str, str]] = []

    def _told(self, method: str, context: Any, answer: Any) -> Any:
        names = context.auth_context().get("x509_subject_alternative_name") or [b"/"]
        member = names[0].decode().rpartition("/")[2]
        self.calls.append((method, member))
        return answer if self.lie is None else self.lie(method, member, answer)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        path: Any = handler_call_details.method
        method = str(path).rpartition("/")[2]
        if handler is None or not str(path).startswith("/blindsum."):
            return handler
        codec = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }

        async def unary(request: Any, context: Any) -> Any:
            if method == "GetDocument":
                digest = round_pb2.GetDocumentRequest.FromString(request).digest
                if digest in self.documents:
                    return round_pb2.GetDocumentResponse(document=self.documents[digest])
            answer = await (handler.unary_unary or handler.stream_unary)(request, context)
            return self._told(method, context, answer)

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            async for answer in handler.unary_stream(request, context):
                yield self._told(method, context, answer)

        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(unary, **codec)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(unary, **codec)
        return grpc.unary_stream_rpc_method_handler(stream, **codec)


class LyingServer:
    """`LyingServer()(settings)` makes the server; set `lie` at any time."""

    def __init__(self) -> None:
        self.interceptor = LyingInterceptor()

    def __call__(self, settings: AggregatorSettings) -> AggregatorServer:
        server = AggregatorServer(settings)
        server._interceptors.append(self.interceptor)
        return server

    def lies(self, lie: Lie) -> None:
        self.interceptor.lie = lie

    def serves(self, digest: bytes, document: bytes) -> None:
        """Answer GetDocument for this digest with a document of the test's own."""
        self.interceptor.documents[digest] = document

    def called(self, method: str, member: str) -> int:
        return self.interceptor.calls.count((method, member))
