"""The code on the pages about devices and hard examples runs as it stands there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blindsum.client.federation_view import FederationView
from blindsum.client.hard_examples import Novelty
from blindsum.client.testing import Federation

PAGES = Path(__file__).parents[2] / "docs" / "edge"


def code_of(page: str) -> str:
    (code,) = [part.split("```")[0] for part in (PAGES / page).read_text().split("```python\n")[1:]]
    return code


def names_on(page: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(code_of(page), page, "exec"), names)
    return names


@pytest.fixture(scope="module")
def federation() -> Any:
    with Federation(["hospital", "clinic", "other"]) as made:
        yield made


def test_the_page_on_hard_examples(federation: Federation) -> None:
    page, draws = names_on("hard-examples.md"), np.random.default_rng(0)
    labels = np.arange(60) % 2
    novelty = Novelty.fit(draws.normal(0, 1, (60, 4)), labels, draws.normal(0, 1, (40, 4)))
    images = draws.random((60, 9, 9), dtype=np.float32)
    clinic, hospital = federation.path("clinic"), federation.path("hospital")
    page["queue_up"](clinic, draws.normal(0, 1, 60), draws.normal(3, 1, (60, 4)), images, labels, novelty)
    with FederationView.open(clinic) as view:
        assert len(page["review_and_send"](clinic, view, "form 17")) == 10
    with FederationView.open(hospital) as view:
        received = page["take_in"](hospital, view, own=())
    assert len(received) == 10
    assert all(any(np.array_equal(pixels, one) for one in images) for pixels, _ in received)


@pytest.mark.torch
def test_the_page_on_cloud_training(federation: Federation, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript", reason="optimize isn't installed (torch, onnxscript)")
    page, draws = names_on("cloud-training.md"), np.random.default_rng(0)
    network = torch.nn.Linear(16, 1)
    with torch.no_grad():
        network.weight.copy_(torch.linspace(-1, 1, 16).unsqueeze(0))
        network.bias.zero_()
    inputs = draws.normal(0, 1, (200, 16)).astype(np.float32)
    labels = (inputs @ np.linspace(-1, 1, 16) > 0).astype(int)
    with FederationView.open(federation.path("hospital")) as hospital:
        page["publish_weights"](hospital, network.state_dict(), 1)
    with FederationView.open(federation.path("clinic")) as clinic:
        model = page["install"](
            clinic, torch.nn.Linear(16, 1), (inputs[:100], labels[:100]), inputs[100:], tmp_path / "m.model"
        )
    assert np.mean((model.probabilities(inputs)[:, 1] > 0.5) == labels) > 0.97


@pytest.mark.parametrize("page", ["cloud-training.md", "hard-examples.md"])
def test_the_code_of_a_page_is_short(page: str) -> None:
    assert len([line for line in code_of(page).splitlines() if line.strip()]) <= 30
