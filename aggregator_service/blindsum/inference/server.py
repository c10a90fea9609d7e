"""The inference server: one listener with mutual TLS, its workers and records; start, readiness, stop."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import grpc
from blindsum.aggregator.capture import CaptureInterceptor
from blindsum.aggregator.structured_logs import logger
from blindsum.aggregator.transport_authority import TransportAuthority
from blindsum.aggregator.wire_handlers import strict_handler
from blindsum.crypto.errors import BlindsumError
from blindsum.crypto.inference.tail_model import TailModel
from blindsum.inference.evaluation_workers import EvaluationWorkers
from blindsum.inference.inference_service import InferenceService
from blindsum.inference.member_records import MemberRecords
from blindsum.inference.peer_members import MemberCheck
from blindsum.inference.settings import InferenceSettings
from blindsum.proto.v1 import inference_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_health.v1._async import HealthServicer  # type: ignore[import-untyped]

_MESSAGE_LIMIT = 1 << 20
_log = logger(part="inference server")


class InferenceServer:
    """A standalone inference service for one tail. `start` binds, `stop` drains and closes."""

    def __init__(self, settings: InferenceSettings) -> None:
        self.settings = settings
        self.port = 0
        self.ca_pem = b""
        self.workers: EvaluationWorkers | None = None
        self._server: grpc.aio.Server | None = None
        self._health = HealthServicer()
        self._opened = ExitStack()

    async def start(self) -> None:
        """Load the tail, start the workers, bind the port. Raises `BlindsumError`."""
        try:
            await self._start()
        except BaseException:
            await self.stop(0)
            raise

    async def _start(self) -> None:
        settings = self.settings
        try:
            model = TailModel.from_bytes(settings.tail.read_bytes())
            settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            if settings.data_dir.stat().st_mode & 0o077:
                raise BlindsumError(f"others may read {settings.data_dir}; run chmod 700 on it")
            authority = TransportAuthority(settings.data_dir / "authority")
            client_ca = settings.client_ca.read_bytes() if settings.client_ca else authority.pem
        except OSError as error:
            raise BlindsumError(f"{error.filename or settings.data_dir}: {error.strerror}") from error
        self.ca_pem = authority.pem
        records = MemberRecords(settings.data_dir)
        self._opened.callback(records.close)
        workers = EvaluationWorkers(model, settings.workers, settings.worker_seconds, settings.cached_members)
        self.workers = workers
        self._opened.callback(workers.close)
        workers.start()
        executor = ThreadPoolExecutor(settings.workers + 1, thread_name_prefix="blindsum-inference")
        self._opened.callback(executor.shutdown, cancel_futures=True)
        service = InferenceService(settings, model, records, workers, executor)
        interceptors: list[grpc.aio.ServerInterceptor] = []
        if settings.capture_directory is not None:
            _log.warning("every message is recorded", directory=str(settings.capture_directory))
            interceptors.append(CaptureInterceptor(settings.capture_directory))
        key, chain = authority.server_certificate(settings.server_names, settings.server_certificate_days)
        self._server = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", _MESSAGE_LIMIT),
                ("grpc.max_metadata_size", 8192),
                ("grpc.max_concurrent_streams", 64),
                # One process owns the port: a second server by mistake must fail, not share it.
                ("grpc.so_reuseport", 0),
            ),
            interceptors=interceptors,
            maximum_concurrent_rpcs=settings.max_calls,
        )
        descriptor = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
        check = MemberCheck(frozenset(settings.refused_members), frozenset(settings.federations))
        self._server.add_generic_rpc_handlers((strict_handler(descriptor, service, check),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        credentials = grpc.ssl_server_credentials(
            [(key, chain)], root_certificates=client_ca, require_client_auth=True
        )
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        try:
            self.port = self._server.add_secure_port(f"{host}:{settings.port}", credentials)
        except RuntimeError:
            self.port = 0
        if not self.port:
            raise BlindsumError(
                f"port {settings.port} on {settings.host} can't be bound; is another server running there?"
            )
        await self._server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        await self._health.set(descriptor.full_name, health_pb2.HealthCheckResponse.SERVING)
        _log.info("ready", port=self.port, tail=model.version, circuit=model.circuit.name, pid=os.getpid())

    async def stop(self, grace: float = 2.0) -> None:
        """Take no more work, let calls finish for `grace` seconds, close everything."""
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            await self._server.stop(grace)
        self._opened.close()
