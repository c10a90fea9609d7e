"""The loop on the clinics with the real server: devices, ten forwarded images, a better model."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript", reason="optimize isn't installed (torch, onnxscript)")
pytest.importorskip("pydicom", reason="dicom isn't installed (nor torch)")
from blindsum.client.federation_view import FederationView  # noqa: E402
from blindsum.client.testing import Federation  # noqa: E402
from blindsum.examples.clinics.device_models import device_models, publish_hospital_model  # noqa: E402
from blindsum.examples.clinics.hard_examples import hard_examples  # noqa: E402
from blindsum.examples.clinics.sites import COHORT, HOSPITAL, load_site  # noqa: E402
from blindsum.examples.clinics.training import TrainingPlan  # noqa: E402
from blindsum.examples.clinics.ways import EDGE_ONLY, start_model, train_alone  # noqa: E402


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_loop_is_closed(tmp_path: Path) -> None:
    """Figures of one seed with margins; docs/edge/hard-examples.md has three."""
    model = start_model(EDGE_ONLY, 0)
    train_alone(model, load_site(HOSPITAL, 0), EDGE_ONLY, seed=0, plan=TrainingPlan())
    with Federation(list(COHORT)) as federation:
        folders = {name: federation.path(name) for name in COHORT}
        with FederationView.open(folders[HOSPITAL]) as view:
            publish_hospital_model(model.state_dict(), 1, view, "trained alone")
        first = device_models(folders, seed=0, work=tmp_path)
        found = hard_examples(model.state_dict(), folders, seed=0, work=tmp_path)
    for outcome in (first, found.device):
        fp32, int8 = outcome.as_json()
        assert int8["bytes"] <= 0.35 * fp32["bytes"]
        assert int8["fp32_bytes"] == fp32["bytes"]
        assert abs(int8["accuracy_drop"]) <= 0.01
    assert (first.manifest.version, found.device.manifest.version) == (1, 2)
    assert found.errors_auroc >= 0.75
    assert found.modality_auroc >= 0.95
    assert found.scanners_auroc >= 0.8
    assert max(found.forwarded.values()) == 10
    assert "clinic-1" not in found.flagged, "its scanner is the hospital's"
    assert found.gain >= 0.02
    assert set(found.as_json()) == {"errors_auroc", "modality_auroc", "scanners_auroc", "gain"}
