"""`ModelService`: published models, stored and relayed as they came. `caller` is the `PeerIdentity`.

A member publishes under its own name only, and versions only grow. Who is trusted, and whether the bytes are
what the publisher signed, is checked by those who open them; the aggregator can't read a sealed model.
"""

import asyncio
import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final, TypeVar

from blindsum.aggregator.described_stream import description, spooled
from blindsum.aggregator.engine import FederationEngine, event
from blindsum.aggregator.peer_identity import PeerIdentity
from blindsum.aggregator.round_run import Surroundings
from blindsum.aggregator.round_service import read_blob
from blindsum.aggregator.settings import AggregatorSettings
from blindsum.aggregator.store.blobs import Spool
from blindsum.aggregator.store.records import ModelRecord
from blindsum.aggregator.store.state import Delete, Insert
from blindsum.crypto.errors import RefusalReason, Refused
from blindsum.proto.v1 import models_pb2 as wire

T = TypeVar("T")

MAX_MODEL_BYTES: Final = 256 << 20
MAX_NAMES: Final = 16
"""Models of different names that one member may publish."""
KEEP_VERSIONS: Final = 3
MAX_AT_ONCE: Final = 2
"""Publications of one member in progress: one, and one whose connection was lost unnoticed."""
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


def blob_name(federation: bytes, digest: bytes) -> str:
    """Where a published model's bytes lie."""
    return f"model/{federation.hex()[:32]}.{digest.hex()}"


class ModelService:
    """One method a call of the service."""

    def __init__(
        self,
        settings: AggregatorSettings,
        around: Surroundings,
        engines: Mapping[bytes, FederationEngine],
    ) -> None:
        self._settings = settings
        self._around = around
        self._engines = engines
        self._publishing = asyncio.Lock()
        self._coming: Counter[tuple[bytes, str]] = Counter()

    async def PublishModel(  # noqa: N802
        self, requests: AsyncIterator[wire.PublishModelRequest], peer: PeerIdentity
    ) -> wire.PublishModelResponse:
        """Take a version. Idempotent for the same bytes; another model under a version that is there is
        refused.
        """
        start: wire.PublishModelStart = await description(requests, self._settings)
        if not _NAME.fullmatch(start.name) or not 0 < start.version < 1 << 53 or len(start.digest) != 32:
            raise Refused(
                RefusalReason.MALFORMED, "a model has a name, a version from 1 and a SHA-256 digest"
            )
        if not 0 < start.total <= MAX_MODEL_BYTES:
            raise Refused(RefusalReason.WRONG_SIZE, f"a model has 1 to {MAX_MODEL_BYTES} bytes")
        if self._is_there(start, peer):
            return wire.PublishModelResponse()
        caller = (peer.federation, peer.member)
        if self._coming[caller] >= MAX_AT_ONCE:
            raise Refused(
                RefusalReason.LIMIT, f"{MAX_AT_ONCE} publications of this member are in progress; let one end"
            )
        self._coming[caller] += 1
        try:
            await self._receive(start, requests, peer)
        finally:
            self._coming[caller] -= 1
            if not self._coming[caller]:
                del self._coming[caller]
        return wire.PublishModelResponse()

    async def _receive(
        self,
        start: wire.PublishModelStart,
        requests: AsyncIterator[wire.PublishModelRequest],
        peer: PeerIdentity,
    ) -> None:
        name = f"spool/{peer.federation.hex()[:32]}.model.{os.urandom(8).hex()}"
        async with spooled(requests, name, start.total, self._settings, self._around) as (spool, digest):
            if digest != start.digest:
                raise Refused(RefusalReason.WRONG_DIGEST, "the bytes aren't those that were announced")
            await asyncio.shield(asyncio.ensure_future(self._publish(start, peer, spool, name)))

    def _of(self, peer: PeerIdentity) -> list[ModelRecord]:
        return self._around.store.find(ModelRecord, federation=peer.federation, publisher=peer.member)

    def _is_there(self, start: wire.PublishModelStart, peer: PeerIdentity) -> bool:
        """Whether this very version was published before. Raises `Refused` when it can't be published."""
        rows = self._of(peer)
        same_name = [row for row in rows if row.name == start.name]
        if any(row.number == start.version and row.digest == start.digest for row in same_name):
            return True
        newest = max((row.number for row in same_name), default=0)
        if start.version <= newest:
            raise Refused(
                RefusalReason.CONFLICT, f"version {newest} of {start.name} is published; take a higher one"
            )
        if not same_name and len({row.name for row in rows}) >= MAX_NAMES:
            raise Refused(RefusalReason.LIMIT, f"a member publishes at most {MAX_NAMES} models")
        return False

    async def _publish(
        self, start: wire.PublishModelStart, peer: PeerIdentity, spool: Spool, spool_name: str
    ) -> None:
        # One at a time: bytes without a record, such as those of a model in the making, are deleted below.
        async with self._publishing:
            if self._is_there(start, peer):
                return
            target = blob_name(peer.federation, start.digest)
            await self._work(self._around.blobs.keep, spool, spool_name, target)
            now = self._around.clock.now_ms()
            row = ModelRecord(
                peer.federation, peer.member, start.name, start.version, start.total, start.digest, now
            )
            old = [one for one in self._of(peer) if one.name == start.name][: -(KEEP_VERSIONS - 1) or None]
            key = (("federation", peer.federation), ("publisher", peer.member), ("name", start.name))
            await self._around.store.commit(
                Insert(row),
                *(Delete(ModelRecord, (*key, ("number", one.number))) for one in old),
                event(
                    now, peer.federation, "model published",
                    publisher=peer.member, name=start.name, version=start.version,
                ),
            )  # fmt: skip
            await self.delete_leftovers()

    async def delete_leftovers(self) -> None:
        """Bytes of models that no record names are deleted."""
        wanted = {blob_name(row.federation, row.digest) for row in self._around.store.find(ModelRecord)}
        for name in await self._work(self._around.blobs.names, "model"):
            if name not in wanted:
                await self._work(self._around.blobs.delete, name)

    async def ListModels(  # noqa: N802
        self, _request: wire.ListModelsRequest, peer: PeerIdentity
    ) -> wire.ListModelsResponse:
        """The stored versions of every model of the federation."""
        rows = self._around.store.find(ModelRecord, federation=peer.federation)
        return wire.ListModelsResponse(
            items=[
                wire.ListModelsResponse.Item(
                    publisher=row.publisher,
                    name=row.name,
                    version=row.number,
                    total=row.total,
                    digest=row.digest,
                )
                for row in rows
            ]
        )

    async def GetModel(  # noqa: N802
        self, request: wire.GetModelRequest, peer: PeerIdentity
    ) -> AsyncIterator[wire.GetModelResponse]:
        """The bytes of a version."""
        row = self._around.store.get(
            ModelRecord, peer.federation, request.publisher, request.name, request.version
        )
        if row is None:
            raise Refused(RefusalReason.OUT_OF_RANGE, "there is no such model or version; list them again")
        async for data in read_blob(self._around, blob_name(row.federation, row.digest), 0, row.total):
            yield wire.GetModelResponse(data=data)

    async def _work(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._around.executor, call, *arguments)
