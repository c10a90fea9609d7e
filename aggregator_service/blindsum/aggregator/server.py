"""The server: two listeners, the engines, and what they stand on; start, readiness, stop."""

import asyncio
import contextlib
import fcntl
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from blindsum.aggregator.audit import AuditedCalls, AuditReport, head_of, verify
from blindsum.aggregator.capture import CaptureInterceptor
from blindsum.aggregator.clock import Clock, SystemClock
from blindsum.aggregator.engine import FederationEngine
from blindsum.aggregator.enrolment_service import EnrolmentService
from blindsum.aggregator.forwarded_examples import ExampleService
from blindsum.aggregator.ingest import TRANSPORT_OPTIONS, Ingest
from blindsum.aggregator.memory_allocator import keep_large_buffers, settle_collector
from blindsum.aggregator.metrics import ServiceMetrics
from blindsum.aggregator.native_workers import NativeWorkers
from blindsum.aggregator.observed_state import ObservedState
from blindsum.aggregator.operator_pages.recent_refusals import RecentRefusals
from blindsum.aggregator.peer_identity import PeerCheck
from blindsum.aggregator.published_models import ModelService
from blindsum.aggregator.readiness import Readiness
from blindsum.aggregator.retention import Retention
from blindsum.aggregator.round_run import Surroundings
from blindsum.aggregator.round_service import RoundService
from blindsum.aggregator.settings import AggregatorSettings
from blindsum.aggregator.store.file_blobs import FileBlobs
from blindsum.aggregator.store.records import FederationRecord
from blindsum.aggregator.store.sqlite_reader import SqliteReader
from blindsum.aggregator.store.sqlite_state import SqliteState
from blindsum.aggregator.store.state import StorageFailed
from blindsum.aggregator.structured_logs import logger
from blindsum.aggregator.tracing import tracing_interceptor
from blindsum.aggregator.transport_authority import TransportAuthority
from blindsum.aggregator.wire_handlers import strict_handler
from blindsum.crypto.errors import BlindsumError
from blindsum.crypto.schemes.base import Scheme
from blindsum.crypto.schemes.registry import scheme as registered_scheme
from blindsum.crypto.trust.roster import Roster
from blindsum.proto.v1 import enrolment_pb2, examples_pb2, models_pb2, round_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_health.v1._async import HealthServicer  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from blindsum.aggregator.admin_server import AdminServer

_REGISTRY = "blindsum.crypto.schemes.registry:scheme"
_THREADS = 16
LIVE, READY = "live", "ready"
_HANDSHAKE_MS = 10_000
_IDLE_MS = 300_000
"""Connections of strangers end after these; a member that waits has a watch stream open."""
_WORKING = ("", READY, "blindsum.proto.v1.RoundService", "blindsum.proto.v1.EnrolmentService")
"""Health services that serve only while the server is ready; `LIVE` serves as long as it answers."""


class StartedThreadPool(ThreadPoolExecutor):
    """A thread pool with all of its threads from the start: what the process holds is then the same on the
    first day and on any other.
    """

    def __init__(self, threads: int, name: str) -> None:
        super().__init__(threads, thread_name_prefix=name)
        together = threading.Barrier(threads)
        for _ in range(threads):
            self.submit(together.wait)


class AggregatorServer:
    """A standalone aggregator. `start` binds and recovers; `stop` drains and closes.

    `schemes` and `scheme_factory` (the same callable as `module:attribute`, for worker processes) are
    the registry's unless a test brings its own. With `settings.tracing`, spans go to `tracer_provider`
    (OpenTelemetry's), by default the process's own.
    """

    def __init__(
        self,
        settings: AggregatorSettings,
        *,
        clock: Clock | None = None,
        schemes: Callable[[str], Scheme] = registered_scheme,
        scheme_factory: str = _REGISTRY,
        tracer_provider: Any = None,
    ) -> None:
        self.settings = settings
        self.engines: dict[bytes, FederationEngine] = {}
        self.enrolment_port = 0
        self.member_port = 0
        self.admin_port = 0
        self.ca_pem = b""
        self._clock = clock or SystemClock()
        self._schemes = schemes
        self._scheme_factory = scheme_factory
        self._tracer_provider = tracer_provider
        self._interceptors: list[grpc.aio.ServerInterceptor] = []
        self._servers: list[grpc.aio.Server] = []
        self._health = HealthServicer()
        self._admin: AdminServer | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._following: set[asyncio.Task[None]] = set()
        self._opened = ExitStack()
        self._log = logger(part="server")

    async def start(self) -> None:
        """Open what is stored, take up its rounds, bind both ports. Raises `BlindsumError`."""
        try:
            await self._start()
        except BaseException:
            await self._close(0)
            raise

    async def _start(self) -> None:
        settings = self.settings
        keep_large_buffers()
        try:
            settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            if settings.data_dir.stat().st_mode & 0o077:
                raise StorageFailed(
                    f"others may read {settings.data_dir}, where the transport authority's key lives; "
                    "run chmod 700 on it"
                )
            self._opened.callback(os.close, _lock(settings.data_dir))
            self._authority = TransportAuthority(settings.data_dir / "authority")
        except OSError as error:
            raise StorageFailed(f"{settings.data_dir} can't be used: {error.strerror}") from error
        self.ca_pem = self._authority.pem
        self.store = SqliteState(settings.data_dir / "state.sqlite")
        self.observed = ObservedState(self.store)
        """The state as the service uses it; the operators' pages observe it."""
        self._opened.callback(self.store.close)
        self.blobs = FileBlobs(settings.data_dir / "blobs")
        self._workers = NativeWorkers(settings.native_workers, settings.native_seconds, self._scheme_factory)
        self._opened.callback(self._workers.close)
        self._executor = StartedThreadPool(_THREADS, "blindsum-work")
        self._opened.callback(self._executor.shutdown)
        self._around = Surroundings(
            self.observed, self.blobs, self._clock, self._executor, self._workers, settings.fold_batch
        )
        self._ingest = Ingest(settings, self._around)
        self.readiness = Readiness(
            self.observed, self.blobs, self._clock, self._executor, self._readiness_changed
        )
        self.metrics = ServiceMetrics(settings, self._clock, self.observed, self.blobs, self.engines)
        self.refusals = RecentRefusals(self.metrics, self._clock)
        await self._in_thread(self.metrics.count_stored)
        self.retention = Retention(
            settings, self._clock, self.observed, self.blobs, self.engines, self._executor
        )
        for record in self.store.find(FederationRecord):
            await self._add_federation(record)
        if settings.capture_directory is not None:
            self._log.warning(
                "every message is recorded: this fills the disk", directory=str(settings.capture_directory)
            )
            self._interceptors.append(CaptureInterceptor(settings.capture_directory))
        if settings.tracing:
            self._interceptors.append(tracing_interceptor(self._tracer_provider))
        self._calls = AuditedCalls(self.observed, self._clock, self.refusals)
        self._peer_check = PeerCheck(self.store, self, self._clock)
        settle_collector()
        await self._listen()
        await self._health.set(LIVE, health_pb2.HealthCheckResponse.SERVING)
        if settings.admin_port is not None:
            await self._start_admin(settings.admin_port)
        await self._show_readiness(False)
        self.readiness.serve()
        await asyncio.gather(*self._following)
        self._keep_running(self.readiness.keep_probing(settings.probe_seconds))
        self._log.info(
            "ready",
            enrolment_port=self.enrolment_port,
            member_port=self.member_port,
            admin_port=self.admin_port,
            federations=len(self.engines),
            audit_head=str(head_of(self.store)),
        )
        self._keep_running(self._check_audit())
        self._keep_running(self.retention.keep_sweeping(settings.retention_seconds))

    # What operators see

    async def _start_admin(self, port: int) -> None:
        # Imported only by servers that have such a port: start-up counts.
        from blindsum.aggregator.admin_server import (  # noqa: PLC0415
            AdminCredentials,
            AdminServer,
            admin_app,
        )
        from blindsum.aggregator.operator_pages.routes import OPEN_PATHS, OperatorPages  # noqa: PLC0415

        settings = self.settings
        credentials = AdminCredentials.from_file(
            settings.admin_token_file or settings.data_dir / "admin.token"
        )

        def readiness() -> tuple[bool, dict[str, str]]:
            return self.readiness.ready, self.readiness.checks

        pages = OperatorPages(credentials, self.engines, self.observed, self.refusals, readiness, self._clock)
        app = admin_app(credentials, readiness, self.exposition, pages.routes, OPEN_PATHS)
        admin = AdminServer(app, settings.admin_host, port)
        await admin.start()
        self._admin = admin
        self.admin_port = admin.port

    async def exposition(self) -> bytes:
        """The metrics in Prometheus' text format."""
        with contextlib.suppress(StorageFailed):
            await self._in_thread(self.metrics.disk_usage)
        ingest = self._ingest
        return self.metrics.text(ingest.slots_taken, ingest.deferred, head_of(self.store).sequence)

    async def _check_audit(self) -> None:
        """Once after the start; it takes its time when there are many events."""
        found: list[AuditReport] = []

        def check() -> None:
            with SqliteReader(self.settings.data_dir / "state.sqlite") as reader:
                found.append(verify(reader))

        try:
            await self._in_thread(check)
        except StorageFailed as error:
            self._log.error("the audit can't be checked", text=str(error))
            return
        self.metrics.audit_broken.set(not found[0].holds)
        if not found[0].holds:
            self._log.error("the audit was tampered with", place=found[0].broken_at, text=found[0].reason)

    def _readiness_changed(self, ready: bool) -> None:
        # Health streams are told in order: each news waits for the one before.
        before = tuple(self._following)

        async def show() -> None:
            if before:
                await asyncio.wait(before)
            await self._show_readiness(ready)

        task = asyncio.create_task(show())
        self._following.add(task)
        task.add_done_callback(self._following.discard)

    async def _show_readiness(self, ready: bool) -> None:
        self.metrics.ready.set(ready)
        answer = health_pb2.HealthCheckResponse
        for name in _WORKING:
            await self._health.set(name, answer.SERVING if ready else answer.NOT_SERVING)

    def _keep_running(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _in_thread(self, work: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def _add_federation(self, record: FederationRecord) -> None:
        engine = FederationEngine(record, self.settings, self._around, self._schemes, self._ingest.end_round)
        self.engines[record.federation] = engine
        await engine.start()

    def roster_in_force(self, federation: bytes) -> Roster | None:
        """The federation's roster, or None."""
        engine = self.engines.get(federation)
        return None if engine is None else engine.documents.roster

    def _published(self, engine: FederationEngine) -> None:
        """The owner published: streams of members that are no longer in the roster end."""
        roster = engine.documents.roster
        for member in self._ingest.members(engine.federation):
            if roster is None or member not in roster.position:
                self._ingest.end_member(engine.federation, member)

    async def _listen(self) -> None:
        settings = self.settings
        key, chain = self._authority.server_certificate(
            settings.server_names, settings.server_certificate_days
        )
        self.metrics.certificates(chain, self._authority.pem)
        anyone = grpc.ssl_server_credentials([(key, chain)])
        members = grpc.ssl_server_credentials(
            [(key, chain)], root_certificates=self._authority.pem, require_client_auth=True
        )
        enrolment = EnrolmentService(
            settings,
            self._around,
            self._authority,
            self.engines,
            self._schemes,
            self._add_federation,
            self._published,
        )
        rounds = RoundService(
            settings,
            self._around,
            self._authority,
            self.engines,
            self._ingest,
            self._peer_check.require_current,
        )
        examples = ExampleService(settings, self._around, self.engines)
        models = ModelService(settings, self._around, self.engines)
        await examples.delete_leftovers()
        await models.delete_leftovers()
        for_members = {
            round_pb2.DESCRIPTOR.services_by_name["RoundService"]: rounds,
            examples_pb2.DESCRIPTOR.services_by_name["ExampleService"]: examples,
            models_pb2.DESCRIPTOR.services_by_name["ModelService"]: models,
        }
        self.enrolment_port = await self._serve(
            [
                strict_handler(
                    enrolment_pb2.DESCRIPTOR.services_by_name["EnrolmentService"],
                    enrolment,
                    lambda _: None,
                    self._calls,
                )
            ],
            anyone,
            settings.enrolment_port,
            settings.enrolment_message_limit,
            settings.max_enrolment_calls,
        )
        self.member_port = await self._serve(
            [
                strict_handler(descriptor, service, self._peer_check, self._calls)
                for descriptor, service in for_members.items()
            ],
            members,
            settings.member_port,
            settings.message_limit,
            settings.max_calls,
        )

    async def _serve(
        self, handlers: list[Any], credentials: grpc.ServerCredentials, port: int, limit: int, calls: int
    ) -> int:
        server = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_metadata_size", 8192),
                ("grpc.max_concurrent_streams", 64),
                # More connections than calls are of no use to anyone who means to call.
                ("grpc.max_allowed_incoming_connections", self.settings.max_calls),
                ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
                ("grpc.max_connection_idle_ms", _IDLE_MS),
                # One process owns the port: a second server by mistake must fail, not share it.
                ("grpc.so_reuseport", 0),
                *TRANSPORT_OPTIONS,
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 20_000),
            ),
            interceptors=self._interceptors,
            maximum_concurrent_rpcs=calls,
        )
        server.add_generic_rpc_handlers(handlers)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (
            *(handler.service_name() for handler in handlers),
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
            reflection.SERVICE_NAME,
        )
        reflection.enable_server_reflection(names, server)
        host = f"[{self.settings.host}]" if ":" in self.settings.host else self.settings.host
        try:
            bound = server.add_secure_port(f"{host}:{port}", credentials)
        except RuntimeError:
            bound = 0
        if not bound:
            await server.stop(0)
            raise BlindsumError(
                f"port {port} on {self.settings.host} can't be bound; is another server running there?"
            )
        self._servers.append(server)
        await server.start()
        return bound

    async def stop(self, grace: float = 2.0, drain: float = 0.0, hurry: asyncio.Event | None = None) -> None:
        """Say that no more work is taken, let running uploads end for `drain` seconds (or until `hurry`) and
        other calls for `grace` seconds, close everything."""
        self.readiness.drain()
        for engine in self.engines.values():
            engine.drain()
        await asyncio.gather(*self._following)
        await self._drain(drain, hurry or asyncio.Event())
        await self._health.enter_graceful_shutdown()
        for engine in self.engines.values():
            engine.end_watches()
        self._ingest.close()
        for engine in self.engines.values():
            await engine.stop()
        head = ""
        with contextlib.suppress(StorageFailed):
            head = str(head_of(self.store))
        await self._close(grace)
        self._log.info("stopped", audit_head=head)

    async def _drain(self, seconds: float, hurry: asyncio.Event) -> None:
        waiting = {asyncio.create_task(self._ingest.drain()), asyncio.create_task(hurry.wait())}
        # Uploads that are over take a turn of the loop to say so.
        await asyncio.wait(waiting, timeout=seconds or 0.001, return_when=asyncio.FIRST_COMPLETED)
        if self._ingest.slots_taken:
            self._log.warning("uploads still ran and are cut; members go on with them later")
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)

    async def _close(self, grace: float) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(server.stop(grace) for server in self._servers))
        if self._admin is not None:
            await self._admin.stop()
        for engine in self.engines.values():
            await engine.stop()
        # The executor first, then the workers, then the state that both write to.
        self._opened.close()


def _lock(directory: Path) -> int:
    """Take a data directory for this process; the lock goes with the descriptor, however the process ends."""
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise BlindsumError(
            f"{directory} is in use by another server; stop that one, or give this one a directory of its own"
        ) from None
    return descriptor
