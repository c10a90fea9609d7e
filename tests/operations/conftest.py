"""A server with an admin port, in a thread and with the plain scheme, or as the process an operator runs."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "aggregator"))

from blindsum.aggregator.embedding import ServerHandle, configure_logs, serve_in_thread
from blindsum.aggregator.server import AggregatorServer
from scripted_federation import Scene, build_scene, settings_for

configure_logs("ERROR", json=False)


@pytest.fixture
def run_server(tmp_path: Path) -> Iterator[Callable[..., ServerHandle]]:
    """Start a server on `tmp_path / "data"`; after `stop`, a second call takes the same data up."""
    import plain_scheme  # noqa: PLC0415

    handles = []

    def start(directory: Path | None = None, tracer_provider: Any = None, **changes: Any) -> ServerHandle:
        settings = settings_for(directory or tmp_path / "data", **{"admin_port": 0, **changes})
        handle = serve_in_thread(
            settings,
            lambda found: AggregatorServer(
                found,
                schemes=plain_scheme.scheme,
                scheme_factory="plain_scheme:scheme",
                tracer_provider=tracer_provider,
            ),
        )
        handles.append(handle)
        return handle

    yield start
    for handle in handles:
        handle.stop()


@pytest.fixture
def build() -> Iterator[Callable[..., Scene]]:
    """Build a federation on a server, with every member watching."""
    scenes = []

    def make(handle: ServerHandle, count: int = 3, **plan: Any) -> Scene:
        scene = build_scene(handle.enrolment_port, handle.member_port, handle.ca_pem, count, plan)
        scenes.append(scene)
        for member in scene.members:
            member.watch()
        return scene

    yield make
    for scene in scenes:
        scene.close()
