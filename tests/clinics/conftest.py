"""Where torch isn't installed, the modules that need it aren't collected; the split is tested everywhere."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

HAS_TORCH = find_spec("torch") is not None
collect_ignore = [] if HAS_TORCH else ["test_clinics_training.py", "test_clinics_ways.py"]


@pytest.fixture(autouse=HAS_TORCH, scope="session")
def one_torch_thread() -> Iterator[None]:
    """As in a member process: small batches gain nothing from threads, and processes share the cores."""
    import torch  # noqa: PLC0415 - not installed everywhere

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
