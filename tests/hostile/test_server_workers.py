"""The server's worker processes for paillier: they may die, and are replaced."""

import os
import resource
import signal
from typing import Any

import numpy as np
import pytest
from blindsum.aggregator import native_worker, native_workers
from blindsum.client.testing import Federation

pytestmark = pytest.mark.paillier


def test_a_paillier_sum_is_exact_although_the_servers_workers_die(monkeypatch: pytest.MonkeyPatch) -> None:
    """One dies as it gets a frame to check, one with frames to add."""
    call, doomed, died = native_workers._Worker.call, {b"TEST", b"PLUS"}, []

    def call_or_die(worker: Any, operation: bytes, parts: Any, seconds: float) -> Any:
        limit, _ = resource.prlimit(worker.pid, resource.RLIMIT_AS)
        if operation in doomed and worker.terms is not None:
            assert limit < 4 * native_worker.MEMORY_BYTES
            doomed.remove(operation)
            died.append(worker.pid)
            os.kill(worker.pid, signal.SIGKILL)
        return call(worker, operation, parts, seconds)

    monkeypatch.setattr(native_workers._Worker, "call", call_or_die)
    model = {"weight": np.zeros(700, np.float32)}
    with Federation(3, scheme="paillier", model=model, policy={"paillier_bits": 2048}) as federation:
        federation.train(lambda name, _: {"weight": np.full(700, int(name[-1]) / 64, np.float32)})
        after = federation.owner.model()
    np.testing.assert_allclose(after["weight"], 2 / 64, atol=1e-3)
    assert len(died) == 2
