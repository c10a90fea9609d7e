"""The pytest fixture `blindsum_federation`: `pytest_plugins = ["blindsum.client.pytest_plugin"]`."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from blindsum.client.testing import Federation


@pytest.fixture
def blindsum_federation() -> Iterator[Callable[..., Federation]]:
    """Makes federations (arguments as for `Federation`) that are closed after the test."""
    made: list[Federation] = []

    def make(*arguments: Any, **options: Any) -> Federation:
        federation = Federation(*arguments, **options)
        made.append(federation)
        return federation

    yield make
    for federation in made:
        federation.close()
