"""OpenTelemetry spans of real calls, with the method and outcome, and nothing of what was said."""

from collections.abc import Callable

import grpc
import pytest
from blindsum.aggregator.embedding import ServerHandle
from blindsum.aggregator.tracing import tracing_interceptor
from blindsum.crypto.errors import MissingExtra
from scripted_federation import Scene

pytest.importorskip("opentelemetry.sdk", reason="otel isn't installed: pip install 'blindsum[otel]'")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

Run = Callable[..., ServerHandle]
Build = Callable[..., Scene]


def test_calls_become_spans_without_what_was_said(run_server: Run, build: Build) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    handle = run_server(tracing=True, tracer_provider=provider)
    scene = build(handle)
    scene.run_steps(1)
    with pytest.raises(grpc.RpcError):
        scene.members[0].answer(1, "advertise", b"something else")
    scene.close()
    handle.stop()
    spans = exporter.get_finished_spans()
    names = [span.name.rpartition("/")[2] for span in spans]
    # One member's answers to two steps each, and the one that was refused.
    assert names.count("Answer") == 7
    assert names.count("Upload") == 3
    assert {"Publish", "Join", "PollJoin", "BeginUpload", "Watch"} <= set(names)
    codes = [
        dict(span.attributes or {})["rpc.grpc.status_code"]
        for span, name in zip(spans, names, strict=True)
        if name == "Answer"
    ]
    assert codes.count(0) == 6
    text = "".join(span.to_json() for span in spans)
    member = scene.members[0]
    secrets = [scene.owner.group_key.secret_bytes(), member.applicant.token, member.contribution()[:32]]
    shown = [form for one in secrets for form in (one.hex(), repr(one)[2:-1]) if form in text]
    assert shown == []
    assert "RoundService" in text


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.instrumentation.grpc", None)
    with pytest.raises(MissingExtra, match=r"blindsum\[otel\]"):
        tracing_interceptor()
