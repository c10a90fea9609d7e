"""An inference service that speaks the protocol and answers with whatever a test wants."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from blindsum.aggregator.transport_authority import TransportAuthority
from blindsum.client.inference import CloudTail
from blindsum.client.member_folder import certificate_request, transport_key
from blindsum.crypto.canonical import encode_document
from blindsum.crypto.inference.tail_model import TailCard
from blindsum.proto.v1 import inference_pb2, inference_pb2_grpc


class LyingCloud(inference_pb2_grpc.InferenceServiceServicer):
    """`answer(request)` makes each answer; `asked` counts the questions."""

    def __init__(self, folder: Path, card: TailCard, answer: Callable[[bytes, bytes], bytes]) -> None:
        self.asked = 0
        self._card = card
        self._answer = answer
        self._authority = TransportAuthority(folder / "authority")
        key, chain = self._authority.server_certificate(("localhost",), 2)
        self._server = grpc.server(ThreadPoolExecutor(2))
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, self._server)
        credentials = grpc.ssl_server_credentials([(key, chain)], self._authority.pem, True)
        self.port = self._server.add_secure_port("localhost:0", credentials)
        self._server.start()

    def DescribeTail(self, request: Any, context: Any) -> inference_pb2.DescribeTailResponse:  # noqa: N802
        return inference_pb2.DescribeTailResponse(card=encode_document(self._card), questions_left=1)

    def RegisterKeys(self, requests: Iterator[Any], context: Any) -> Any:  # noqa: N802
        for _ in requests:
            pass
        return inference_pb2.RegisterKeysResponse()

    def InferEncrypted(self, request: Any, context: Any) -> inference_pb2.InferEncryptedResponse:  # noqa: N802
        self.asked += 1
        return inference_pb2.InferEncryptedResponse(answer=self._answer(request.keys, request.feature))

    def member(self) -> CloudTail:
        key = transport_key()
        request = certificate_request(key, "clinic-1")
        issued = self._authority.member_certificate(
            request, bytes(32), "clinic-1", 1, time.time_ns() // 1_000_000
        )
        return CloudTail(
            f"localhost:{self.port}", ca=self._authority.pem.decode(), key=key, certificate=issued.chain
        )

    def close(self) -> None:
        self._server.stop(0).wait()
