"""The calls of the inference service. None of them sees a feature or an answer, `InferClear` aside."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from blindsum.crypto.canonical import encode_document
from blindsum.crypto.errors import RefusalReason, Refused
from blindsum.crypto.inference.tail_model import TailModel
from blindsum.crypto.inference.tail_wire import keys_digest
from blindsum.inference.evaluation_workers import EvaluationWorkers
from blindsum.inference.member_records import MemberRecords
from blindsum.inference.peer_members import CallingMember
from blindsum.inference.settings import InferenceSettings
from blindsum.proto.v1 import inference_pb2

T = TypeVar("T")

QUESTIONS, REGISTRATIONS = "questions", "registrations of keys"


def _now() -> int:
    return int(time.time())


class InferenceService:
    """Handlers of `blindsum.proto.v1.InferenceService`."""

    def __init__(
        self,
        settings: InferenceSettings,
        model: TailModel,
        records: MemberRecords,
        workers: EvaluationWorkers,
        executor: ThreadPoolExecutor,
        now: Callable[[], int] = _now,
    ) -> None:
        self._settings = settings
        self._model = model
        self._card = encode_document(model.card)
        self._tail = model.card.digest
        self._records = records
        self._workers = workers
        self._executor = executor
        self._now = now
        self._waiting = 0

    async def DescribeTail(  # noqa: N802
        self, _request: inference_pb2.DescribeTailRequest, caller: CallingMember
    ) -> inference_pb2.DescribeTailResponse:
        """The tail's card and what the member may still ask."""
        left = self._records.left(str(caller), QUESTIONS, self._settings.questions_a_day, self._now())
        return inference_pb2.DescribeTailResponse(
            card=self._card, questions_left=max(0, left), clear_allowed=self._settings.allow_clear
        )

    async def RegisterKeys(  # noqa: N802
        self, requests: AsyncIterator[inference_pb2.RegisterKeysRequest], caller: CallingMember
    ) -> inference_pb2.RegisterKeysResponse:
        """Take evaluation keys. The same keys again change nothing."""
        start: inference_pb2.RegisterKeysStart | None = None
        data = bytearray()
        size = self._model.circuit.keys_bytes
        async for request in requests:
            part = request.WhichOneof("part")
            if start is None:
                if part != "start":
                    raise Refused(RefusalReason.MALFORMED, "a registration begins with its start")
                start = request.start
                self._require_tail(start.tail)
                if self._records.has_keys(str(caller), self._tail, start.digest, self._now()):
                    return inference_pb2.RegisterKeysResponse()
                self._records.count(
                    str(caller), REGISTRATIONS, self._settings.registrations_a_day, self._now()
                )
            elif part != "data" or len(data) + len(request.data) > size:
                raise Refused(RefusalReason.WRONG_SIZE, f"evaluation keys have {size} bytes")
            else:
                data += request.data
        if start is None:
            raise Refused(RefusalReason.MALFORMED, "the registration is empty")
        keys = bytes(data)
        if keys_digest(keys) != start.digest:
            raise Refused(RefusalReason.WRONG_DIGEST, "the evaluation keys aren't what their digest says")
        await self._off_loop(self._workers.register, keys)
        self._records.keep_keys(str(caller), self._tail, keys, self._now())
        return inference_pb2.RegisterKeysResponse()

    async def InferEncrypted(  # noqa: N802
        self, request: inference_pb2.InferEncryptedRequest, caller: CallingMember
    ) -> inference_pb2.InferEncryptedResponse:
        """Evaluate the tail on an encrypted feature."""
        self._require_tail(request.tail)
        digest = request.keys
        if not self._records.has_keys(str(caller), self._tail, digest, self._now()):
            raise Refused(RefusalReason.WRONG_DIGEST, "these evaluation keys aren't registered")
        size = self._model.circuit.request_bytes
        if len(request.feature) != size:
            raise Refused(RefusalReason.WRONG_SIZE, f"an encrypted feature has {size} bytes")
        self._records.count(str(caller), QUESTIONS, self._settings.questions_a_day, self._now())
        answer = await self._off_loop(
            self._workers.evaluate, digest, request.feature, lambda: self._records.keys(digest)
        )
        return inference_pb2.InferEncryptedResponse(answer=answer)

    async def InferClear(  # noqa: N802
        self, request: inference_pb2.InferClearRequest, caller: CallingMember
    ) -> inference_pb2.InferClearResponse:
        """Evaluate the tail on a feature in the clear, from which this service could rebuild the image."""
        if not self._settings.allow_clear:
            raise Refused(RefusalReason.POLICY, "this service takes encrypted features only")
        self._require_tail(request.tail)
        if len(request.feature) != 4 * self._model.mean.size:
            raise Refused(RefusalReason.WRONG_SIZE, f"a feature has {self._model.mean.size} float32 numbers")
        feature = np.frombuffer(request.feature, "<f4").astype(np.float64)
        if not np.isfinite(feature).all():
            raise Refused(RefusalReason.OUT_OF_RANGE, "a feature has numbers that aren't finite")
        self._records.count(str(caller), QUESTIONS, self._settings.questions_a_day, self._now())
        return inference_pb2.InferClearResponse(logit=float(self._model.logits(feature[None])[0]))

    def _require_tail(self, tail: bytes) -> None:
        if tail != self._tail:
            raise Refused(RefusalReason.CONFLICT, "the tail has changed; ask for its card again")

    async def _off_loop(self, work: Callable[..., T], *arguments: Any) -> T:
        """Work in a thread, unless too much waits already."""
        if self._waiting >= self._settings.queue:
            raise Refused(RefusalReason.LIMIT, "too many features wait here; answer at the edge")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work, *arguments)
        finally:
            self._waiting -= 1
