"""A stream of which the first part describes the rest: its bytes go to a spool, as many as it announced."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from blindsum.aggregator.ingest import CHUNK_BYTES
from blindsum.aggregator.round_run import Surroundings
from blindsum.aggregator.settings import AggregatorSettings
from blindsum.aggregator.store.blobs import Spool
from blindsum.crypto.errors import RefusalReason, Refused

T = TypeVar("T")


async def _next(requests: AsyncIterator[T], settings: AggregatorSettings) -> T:
    """The next part. Raises `StopAsyncIteration`, `Refused` (limit) if none comes for as long as the slowest
    member needs for one.
    """
    seconds = settings.stall_seconds + CHUNK_BYTES / settings.upload_minimum_rate
    try:
        return await asyncio.wait_for(anext(requests), seconds)
    except TimeoutError:
        raise Refused(RefusalReason.LIMIT, "the stream stalled; send it again") from None


async def description(requests: AsyncIterator[Any], settings: AggregatorSettings) -> Any:
    """The description, which comes first. Raises `Refused`."""
    try:
        first = await _next(requests, settings)
    except StopAsyncIteration:
        raise Refused(RefusalReason.MALFORMED, "the stream is empty") from None
    if first.WhichOneof("part") != "start":
        raise Refused(RefusalReason.MALFORMED, "the stream starts with its description")
    return first.start


@asynccontextmanager
async def spooled(
    requests: AsyncIterator[Any], name: str, total: int, settings: AggregatorSettings, around: Surroundings
) -> AsyncIterator[tuple[Spool, bytes]]:
    """The rest of the stream in the spool `name`, and its SHA-256; what isn't kept meanwhile is deleted.

    Raises `Refused` unless it has exactly `total` bytes and there is room for them.
    """
    blobs = around.blobs
    if blobs.free_bytes() < total + settings.disk_reserve:
        raise Refused(RefusalReason.LIMIT, "the aggregator's disk is nearly full; tell its operator")
    spool = blobs.spool(name)
    digest = hashlib.sha256()

    def write(data: bytes) -> None:
        spool.append(data)
        digest.update(data)

    try:
        while True:
            try:
                part = await _next(requests, settings)
            except StopAsyncIteration:
                break
            data = part.data if part.WhichOneof("part") == "data" else b""
            if not data:
                raise Refused(RefusalReason.MALFORMED, "after its description the stream is data")
            if spool.size + len(data) > total:
                raise Refused(RefusalReason.WRONG_SIZE, "the stream is longer than it said")
            await asyncio.get_running_loop().run_in_executor(around.executor, write, data)
        if spool.size != total:
            raise Refused(RefusalReason.WRONG_SIZE, "the stream is shorter than it said; send it again")
        yield spool, digest.digest()
    finally:
        spool.close()
        blobs.delete(name)
