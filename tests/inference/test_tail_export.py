"""A torch tail comes out as what the service evaluates, and what can't be exported is refused."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from blindsum.client.inference.tail_export import EncryptableTail, Square, export_tail  # noqa: E402
from blindsum.crypto.errors import ParameterRefused  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("hidden", [64, 5, 0])
def test_an_export_computes_what_torch_computes(hidden: int) -> None:
    torch.manual_seed(0)
    features = torch.randn(30, 127) * 4 + 1
    tail = EncryptableTail(127, hidden)
    tail.standardise_by(features)
    exported = export_tail(tail, features, "v9")
    expected = tail(features).detach().double().numpy()
    assert np.abs(exported.logits(features.double().numpy()) - expected).max() < 1e-4
    assert exported.version == "v9"


def test_other_layers_are_refused() -> None:
    tail = EncryptableTail(10, 4)
    tail.layers[1] = torch.nn.ReLU()
    with pytest.raises(ParameterRefused, match="ReLU"):
        export_tail(tail, torch.randn(4, 10), "v1")
    with pytest.raises(ParameterRefused, match="some features"):
        export_tail(EncryptableTail(10, 4), torch.randn(0, 10), "v1")
    broken = EncryptableTail(10, 4)
    broken.layers[0].weight.data.fill_(float("nan"))
    with pytest.raises(ParameterRefused, match="not finite"):
        export_tail(broken, torch.randn(4, 10), "v1")
    assert isinstance(tail.layers, torch.nn.Sequential)
    assert isinstance(EncryptableTail(10, 4).layers[1], Square)
