"""The code on the page about collaborative inference is short, and runs against the real service."""

import re
from pathlib import Path

import numpy as np
import pytest
from blindsum.client.inference import Answer
from linear_edge import LABELS, LinearEdge, site_images
from random_tails import random_tail
from service_process import ServiceProcess

PAGE = Path(__file__).parents[2] / "docs/edge/collaborative-inference.md"


def test_the_pages_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(code.splitlines()) <= 30
    tail = random_tail(inputs=20)
    names: dict[str, object] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    names["OnnxBody"] = lambda _: LinearEdge(tail, 0.0)
    service = ServiceProcess(tmp_path, tail)
    try:
        key, certificate = service.credentials("clinic-1")
        images, labels = site_images(tail, 60, seed=2)
        asked, _ = site_images(tail, 12, seed=3)
        call = names["answer_all"]
        assert callable(call)
        local = {"images": images, "labels": labels}
        answers: list[Answer] = call("edge.onnx", service.address, service.ca, key, certificate, local, asked)
    finally:
        service.close()
    assert {answer.answered_by for answer in answers} == {"edge", "cloud"}
    truth = np.array(LABELS)[(tail.logits(asked) > 0).astype(int)]
    from_cloud = [
        (answer.label, true)
        for answer, true in zip(answers, truth, strict=True)
        if answer.mode == "encrypted"
    ]
    assert from_cloud
    assert all(given == true for given, true in from_cloud)
