"""Servers for the tests: in a thread with the plain scheme, on a clock that the test moves."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blindsum.aggregator.embedding import ServerHandle, serve_in_thread
from blindsum.aggregator.server import AggregatorServer
from blindsum.aggregator.settings import AggregatorSettings
from blindsum.aggregator.structured_logs import configure_logs
from manual_clock import ManualClock
from scripted_federation import Scene, Serve, Stage, build_scene, settings_for

configure_logs("ERROR", json=False)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def serve(tmp_path: Path, clock: ManualClock) -> Iterator[Serve]:
    """Start a server on the test's data directory; a second call after `stop` takes the same data up."""
    handles = []

    def start(factory: str = "plain_scheme:scheme", schemes: Any = None, **changes: Any) -> ServerHandle:
        import plain_scheme  # noqa: PLC0415

        def make(settings: AggregatorSettings) -> AggregatorServer:
            found = schemes or getattr(plain_scheme, factory.partition(":")[2])
            return AggregatorServer(settings, clock=clock, schemes=found, scheme_factory=factory)

        handle = serve_in_thread(settings_for(tmp_path, **changes), make)
        handles.append(handle)
        return handle

    yield start
    for handle in handles:
        handle.stop()


@pytest.fixture
def server(serve: Serve) -> ServerHandle:
    return serve()


@pytest.fixture
def stage(server: ServerHandle, clock: ManualClock) -> Iterator[Stage]:
    """Build a federation on the server and let everyone watch."""
    scenes = []

    def build(count: int = 3, watching: int | None = None, **plan: Any) -> Scene:
        scene = build_scene(server.enrolment_port, server.member_port, server.ca_pem, count, plan)
        scene.owner.now = lambda: clock.now_ms() / 1000
        scenes.append(scene)
        for member in scene.members[:watching]:
            member.watch()
        return scene

    yield build
    for scene in scenes:
        scene.close()
