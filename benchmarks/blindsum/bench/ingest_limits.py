"""What ingest could cost at least: receivers that do one more part of the work each, over the same mTLS.

The first reads the chunks from gRPC and drops them: no service on this library takes in more. The others
add what makes an upload durable and counted, with the service's own parts, but without rounds, signatures,
admissions, notices and commits. Each runs in a process of its own, so that its CPU is the receiver's alone,
and is started anew; members connect before anything is counted.
"""

import asyncio
import contextlib
import functools
import hashlib
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from blindsum.aggregator.frame_tags import FrameTags
from blindsum.aggregator.ingest import CHUNK_BYTES, TRANSPORT_OPTIONS
from blindsum.aggregator.memory_allocator import keep_large_buffers, settle_collector
from blindsum.aggregator.server import StartedThreadPool
from blindsum.aggregator.store.file_blobs import FileBlobs
from blindsum.aggregator.store.stages import Stage
from blindsum.aggregator.upload_chunk import decode_chunk
from blindsum.bench.ingest_tls import credentials
from blindsum.crypto.errors import BlindsumError
from blindsum.proto.v1 import round_pb2

PARTS = ("grpc", "sha256", "write", "fdatasync", "fold")
"""In this order, each receiver does all parts up to its own."""
_BATCH = 16
_THREADS = 16
_PATIENCE_S = 300.0


class _Receiver:
    """Takes uploads, and does with them all parts up to `most`."""

    def __init__(self, most: str, root: Path) -> None:
        self._level = PARTS.index(most)
        self._blobs = FileBlobs(root)
        self._executor = StartedThreadPool(_THREADS, "receiver")
        self._in_thread = functools.partial(asyncio.get_running_loop().run_in_executor, self._executor)
        self._tags: dict[str, list[bytes]] = {}
        self._key = FrameTags()
        self._waiting: list[str] = []
        self._folding: asyncio.Task[None] | None = None
        self._sums = 0

    async def take(self, stream: Any, _context: Any) -> bytes:
        """One upload."""
        if self._level == 0:
            total = 0
            async for raw in stream:
                total += len(raw)
            return total.to_bytes(8, "little")
        name = os.urandom(16).hex()
        spool = self._blobs.spool(f"spool/{name}")
        tags: list[bytes] = []
        stage: Stage | None = None
        writing: asyncio.Future[None] | None = None
        total = 0
        async for raw in stream:
            data = decode_chunk(raw).data
            total += data.nbytes
            hashlib.sha256(data).digest()
            if self._level >= PARTS.index("fold"):
                tags.append(self._key.tag(data))
            while self._level >= PARTS.index("write") and data.nbytes:
                stage = stage or Stage()
                data = stage.put(data)
                if stage.full:
                    if writing is not None:
                        await writing
                    writing, stage = self._in_thread(self._write, spool, stage), None
        if writing is not None:
            await writing
        if stage is not None:
            await self._in_thread(self._write, spool, stage)
        if self._level >= PARTS.index("fdatasync"):
            await self._in_thread(self._blobs.keep, spool, f"spool/{name}", f"contribution/{name}")
        spool.close()
        if self._level >= PARTS.index("fold"):
            self._tags[name] = tags
            self._fold(name)
        return total.to_bytes(8, "little")

    @staticmethod
    def _write(spool: Any, stage: Stage) -> None:
        spool.write(stage)
        stage.release()

    def _fold(self, name: str) -> None:
        self._waiting.append(name)
        if len(self._waiting) >= _BATCH and (self._folding is None or self._folding.done()):
            self._folding = asyncio.create_task(self._fold_waiting())

    async def _fold_waiting(self) -> None:
        while len(self._waiting) >= _BATCH:
            batch, self._waiting = self._waiting[:_BATCH], self._waiting[_BATCH:]
            await self._in_thread(self._add, batch)

    def _add(self, batch: list[str]) -> None:
        def frames() -> Any:
            for index in range(len(self._tags[batch[0]])):
                total = None
                for name, reader in readers.items():
                    start = index * CHUNK_BYTES
                    frame = reader.read(start, min(CHUNK_BYTES, reader.size - start))
                    if self._key.tag(frame) != self._tags[name][index]:
                        raise BlindsumError("a stored upload is damaged")
                    lanes = np.frombuffer(frame, "<u8", len(frame) // 8)
                    total = lanes.copy() if total is None else np.add(total, lanes, out=total)
                assert total is not None
                hashlib.sha256(total.data).digest()
                yield total.data.cast("B")

        with contextlib.ExitStack() as opened:
            readers = {
                name: opened.enter_context(self._blobs.open(f"contribution/{name}", once=True))
                for name in batch
            }
            self._blobs.write(f"sum/{self._sums + 1}", frames())
        self._blobs.delete(f"sum/{self._sums}")
        self._sums += 1
        for name in batch:
            self._blobs.delete(f"contribution/{name}")

    async def done(self) -> None:
        """Returns once nothing is left to add."""
        if self._folding is not None:
            await self._folding


class _Handlers(grpc.GenericRpcHandler):
    def __init__(self, take: Callable[..., Any]) -> None:
        self._take = take

    def service(self, details: Any) -> Any:
        if details.method == "/connect":
            return grpc.unary_unary_rpc_method_handler(self._connect)
        return grpc.stream_unary_rpc_method_handler(self._take)

    @staticmethod
    async def _connect(request: bytes, _context: Any) -> bytes:
        return request


async def _serve(pipe: Connection, chain: Path, secret: Path, part: str, root: Path) -> None:
    receiver = _Receiver(part, root)
    server = grpc.aio.server(options=(("grpc.max_receive_message_length", 4 << 20), *TRANSPORT_OPTIONS))
    server.add_generic_rpc_handlers([_Handlers(receiver.take)])
    proof = grpc.ssl_server_credentials(
        [(secret.read_bytes(), chain.read_bytes())], chain.read_bytes(), require_client_auth=True
    )
    port = server.add_secure_port("127.0.0.1:0", proof)
    await server.start()
    settle_collector()
    pipe.send(port)
    await asyncio.to_thread(pipe.recv)
    start = time.process_time()
    pipe.send(None)
    await asyncio.to_thread(pipe.recv)
    await receiver.done()
    pipe.send(time.process_time() - start)
    await asyncio.to_thread(pipe.recv)
    await server.stop(0)


def _receive(pipe: Connection, chain: Path, secret: Path, part: str, root: Path) -> None:
    keep_large_buffers()
    asyncio.run(_serve(pipe, chain, secret, part, root))


def receiver_cpu_s(part: str, size: int, uploads: int, at_once: int, directory: Path | None) -> float:
    """CPU seconds of a receiver of so many uploads of `size` bytes that does all parts up to this one."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    with credentials() as (chain, secret), tempfile.TemporaryDirectory(dir=directory) as folder:
        arguments = (there, chain, secret, part, Path(folder) / "blobs")
        process = context.Process(target=_receive, args=arguments, daemon=True)
        process.start()
        port = here.recv()
        crowd = _Crowd(port, chain, secret, size, uploads, at_once)
        here.send(None)
        here.recv()
        crowd.upload()
        here.send(None)
        seconds: float = here.recv()
        crowd.close()
        here.send(None)
        process.join()
    return seconds


class _Crowd:
    """Connections that upload, each in a thread of its own, so many at a time."""

    def __init__(self, port: int, chain: Path, secret: Path, size: int, uploads: int, at_once: int) -> None:
        proof = grpc.ssl_channel_credentials(chain.read_bytes(), secret.read_bytes(), chain.read_bytes())
        options = (("grpc.use_local_subchannel_pool", 1),)
        self._channels = [grpc.secure_channel(f"localhost:{port}", proof, options) for _ in range(uploads)]
        for channel in self._channels:
            connect: Any = channel.unary_unary("/connect")
            connect(b"", timeout=_PATIENCE_S)
        self._size = size
        self._slots = threading.Semaphore(at_once)
        self._data = os.urandom(CHUNK_BYTES)
        self._taken = 0

    def _chunks(self) -> Any:
        for offset in range(0, self._size, CHUNK_BYTES):
            data = self._data[: self._size - offset]
            yield round_pb2.UploadRequest(upload_id=bytes(16), offset=offset, data=data).SerializeToString()

    def _upload(self, channel: grpc.Channel) -> None:
        upload: Any = channel.stream_unary("/upload")
        with self._slots:
            answer: bytes = upload(self._chunks(), timeout=_PATIENCE_S)
        self._taken += int.from_bytes(answer, "little") >= self._size

    def upload(self) -> None:
        """Returns once every upload is answered."""
        threads = [threading.Thread(target=self._upload, args=(channel,)) for channel in self._channels]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._taken != len(self._channels):
            raise BlindsumError("uploads to a bare receiver failed")

    def close(self) -> None:
        """Close the connections."""
        for channel in self._channels:
            channel.close()
