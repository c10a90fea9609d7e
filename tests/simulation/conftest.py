"""Makes `federation_driver` of tests/crypto and the modules beside this one importable by these tests."""

import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest
from blindsum.crypto.primitives import signing
from blindsum.crypto.schemes.masking import member

sys.path.insert(0, str(Path(__file__).parent.parent / "crypto"))


@pytest.fixture(scope="session", autouse=True)
def _signatures_checked_once() -> Iterator[None]:
    """All neighbours check the same signatures; with every member in one process, each is checked once.

    `verify` is a function of its arguments alone, so nothing else changes.
    """
    checked = lru_cache(maxsize=4096)(signing.verify)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signing, "verify", checked)
        patch.setattr(member, "verify", checked)
        yield
