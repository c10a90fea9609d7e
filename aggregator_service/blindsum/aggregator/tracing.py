"""OpenTelemetry: a span for every call, with the method and its outcome. Needs the extra `otel`.

Spans carry what gRPC knows of a call: its method, the status and its text (as in the log, a refusal may name
the member), the peer's address. No message and no key is ever in one. Where they go is up to the standard
variables (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, ...).
"""

from typing import Any

import grpc
from blindsum.crypto.errors import MissingExtra


def tracing_interceptor(provider: Any = None) -> grpc.aio.ServerInterceptor:
    """The interceptor that makes the spans; under `provider`, or the process's own, made here if need be.

    Raises `MissingExtra` without the extra `otel`.
    """
    try:
        from opentelemetry import trace  # noqa: PLC0415
        from opentelemetry.instrumentation.grpc import aio_server_interceptor  # noqa: PLC0415
    except ModuleNotFoundError:
        raise MissingExtra("otel", "tracing = true") from None
    if provider is None:
        provider = trace.get_tracer_provider()
        if isinstance(provider, trace.ProxyTracerProvider):
            provider = _exporting_provider()
            trace.set_tracer_provider(provider)
    make: Any = aio_server_interceptor
    interceptor: grpc.aio.ServerInterceptor = make(tracer_provider=provider)
    return interceptor


def _exporting_provider() -> Any:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    # The variables win over the name given here.
    provider = TracerProvider(resource=Resource.create({"service.name": "blindsum-aggregator"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
