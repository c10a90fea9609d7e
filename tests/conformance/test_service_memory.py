"""Memory of server and members is bounded by what they have to hold, not by how many take part.

Peaks are what the kernel counted (VmHWM), minus what the process had when it was ready.

- The server reads and adds frame by frame: at most one sum and 200 MB, in both sizes.
- A member holds, as 32-bit floats, the training state and the next one while it is made, the app's own
  weights, the update, and the state's bytes on their way to or from a file; of the packed upload, which
  lies in a file, at most one; and a fixed part: frames in progress, a few a core, and what the libraries
  allocate at first use. No term has the number of members in it.
"""

from pathlib import Path

import numpy as np
import pytest
from conformance_children import add_update
from process_federation import ProcessFederation

MB = 1_000_000
VECTORS = 5
"""State, next state, the app's weights, the update, the state's bytes."""


def measure(folder: Path, scheme: str, size: int, fixed: int) -> None:
    with ProcessFederation(folder, scheme=scheme, size=size, rounds=1, capture=False) as federation:
        # What the server needed for the first state is another matter.
        federation.kill_server()
        federation.start_server()
        federation.server.forget_peak()
        idle = federation.server.resident()
        federation.start(witness=False, stops={1: "concluded"})
        idle_member = {}
        for name, member in federation.members.items():
            member.until("open")
            idle_member[name] = member.resident()
        for member in federation.members.values():
            member.until("stopped", 1, "concluded")
        server = federation.server.peak() - idle
        peaks = {name: member.peak() - idle_member[name] for name, member in federation.members.items()}
        uploads = [event[4] for event in federation.members["member-1"].events if event[2:3] == ("upload",)]
        (published,) = (folder / "server" / "blobs" / "result").iterdir()
        total = published.stat().st_size
        for member in federation.members.values():
            member.go_on()
        federation.finish()
        federation.check_receipts(dict.fromkeys(federation.names, (1,)))
        expected = np.zeros(size, np.float32)
        for name in federation.names:
            add_update(expected, name, 1)
        trained = federation.owner.model()["weight"]
    most = VECTORS * 4 * size + uploads[0] + fixed
    print(
        f"\n{scheme}, {size:,} values, MB above idle: server {server / MB:.0f} of at most "
        f"{(total + 200 * MB) / MB:.0f} (sum {total / MB:.1f}), member {max(peaks.values()) / MB:.0f} of at "
        f"most {most / MB:.0f} (upload {uploads[0] / MB:.1f})"
    )
    np.testing.assert_allclose(trained, expected / len(federation.names), atol=1e-4)
    assert server <= total + 200 * MB
    assert max(peaks.values()) <= most


SCHEMES = [
    pytest.param("masking", 60 * MB, id="masking"),
    # A member of bfv also holds keys, tables and a few ciphertexts a core.
    pytest.param("bfv", 120 * MB, id="bfv", marks=pytest.mark.he),
]


@pytest.mark.parametrize(("scheme", "fixed"), SCHEMES)
def test_a_million_values_in_bounded_memory(tmp_path: Path, scheme: str, fixed: int) -> None:
    measure(tmp_path, scheme, 1_000_003, fixed)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("scheme", "fixed"), SCHEMES)
def test_ten_million_values_in_bounded_memory(tmp_path: Path, scheme: str, fixed: int) -> None:
    measure(tmp_path, scheme, 10_000_019, fixed)
