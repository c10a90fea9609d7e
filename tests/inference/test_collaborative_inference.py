"""The clinics infer together: costs, inversion and cascade by the real service, one seed."""

from pathlib import Path

import pytest

pytest.importorskip("torch")

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(1200)]


def test_the_figures_of_collaborative_inference(tmp_path: Path) -> None:
    from blindsum.examples.clinics.collaborative_inference import (  # noqa: PLC0415
        run_collaborative_inference,
    )

    found = run_collaborative_inference(0, tmp_path).json_parts()
    tail, inversion, cascade = found["tail"], found["inversion"], found["cascade"]
    assert tail["agree"] == tail["total"] == 200
    assert 20 * tail["server_cpu_ms"] <= tail["mm_server_cpu_ms"]
    assert tail["up_bytes"] <= 250_000
    assert tail["down_bytes"] <= 150_000
    assert tail["keys_bytes"] <= 15_000_000
    assert inversion["clear"] >= 0.7
    assert abs(inversion["encrypted"]) <= 0.1
    assert cascade["cascade"] - cascade["edge"] >= 0.07
    assert cascade["share_sent"] <= 0.5
    assert cascade["switched_off_where_no_gain"]
