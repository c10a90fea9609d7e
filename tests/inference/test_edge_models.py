"""Gate, calibration, shadow evaluation and the edge's way of taking bad answers."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from blindsum.client.inference import Gate, ImplausibleAnswer, Shadow
from blindsum.client.inference.calibration import (
    TEMPERATURES,
    confidence,
    fit_temperature,
    threshold_for_risk,
)
from blindsum.crypto.errors import MissingExtra, ParameterRefused
from blindsum.crypto.inference.circuit import SQUARE
from linear_edge import edge_model, site_images
from lying_cloud import LyingCloud
from random_tails import random_tail

TAIL = random_tail()


def test_the_temperature_makes_confidence_true() -> None:
    stream = np.random.default_rng(0)
    logits = stream.normal(size=4000) * 2
    labels = stream.uniform(size=4000) < 1 / (1 + np.exp(-logits))
    assert fit_temperature(3 * logits, labels) == pytest.approx(3, rel=0.15)
    assert fit_temperature(logits, labels) == pytest.approx(1, rel=0.15)
    # A few images that happen to be right can't drive it beyond the grid.
    assert fit_temperature(np.ones(3), np.ones(3)) == TEMPERATURES[0] == 0.25
    assert fit_temperature(np.ones(3), np.zeros(3)) == TEMPERATURES[-1]
    sure = confidence(np.array([0.0, 50.0, -50.0]), 1.0)
    assert sure == pytest.approx([0.5, 1, 1])


def test_the_threshold_keeps_the_target_risk() -> None:
    stream = np.random.default_rng(1)
    sure = stream.uniform(0.5, 1, 2000)
    right = stream.uniform(size=2000) < sure
    threshold = threshold_for_risk(sure, right, 0.1)
    kept = sure >= threshold
    assert (~right[kept]).mean() <= 0.1
    assert kept.mean() > 0.2
    assert threshold_for_risk(sure, np.zeros(2000, bool), 0.1) > 1
    assert threshold_for_risk(sure[:4], np.ones(4, bool), 0.1) > 1  # four right answers prove little


def test_the_gate_sends_no_more_than_it_may_and_flags_the_novel() -> None:
    stream = np.random.default_rng(2)
    features = stream.normal(size=(200, 20))
    logits = stream.normal(size=200)
    labels = stream.integers(0, 2, 200)  # the edge is a coin: by risk alone all would be sent
    gate = Gate.fit(logits, features[:200], labels, reference=stream.normal(size=(100, 20)), most_sent=0.3)
    judged = [gate.judge(float(one), feature) for one, feature in zip(logits, features, strict=True)]
    assert sum(one.doubtful for one in judged) <= 0.32 * 200
    assert gate.judge(9.0, np.full(20, 9.0)).novel
    assert gate.judge(9.0, np.full(20, math.nan)).doubtful
    assert not gate.judge(9.0, features[0]).doubtful


def test_gates_refuse_what_does_not_fit() -> None:
    good = np.zeros((20, 3))
    with pytest.raises(ParameterRefused, match="numbers of examples"):
        Gate.fit(np.zeros(20), good, np.zeros(19), reference=good)
    with pytest.raises(ParameterRefused, match="width"):
        Gate.fit(np.zeros(20), good, np.zeros(20), reference=np.zeros((20, 4)))
    with pytest.raises(ParameterRefused, match="at least 8"):
        Gate.fit(np.zeros(5), good[:5], np.zeros(5), reference=good)


def test_the_shadow_wants_more_than_luck() -> None:
    shadow = Shadow()
    assert shadow.helps
    shadow.record(edge_right=False, cloud_right=True)
    assert not shadow.helps  # one image
    shadow.record(False, True)
    assert shadow.helps
    for _ in range(20):
        shadow.record(True, False)
        shadow.record(False, True)
    assert not shadow.helps  # 22 won and 20 lost
    shadow.forget()
    assert shadow.helps
    short = Shadow(window=3)
    for _ in range(10):
        short.record(True, False)
    for _ in range(3):
        short.record(False, True)
    assert short.helps


@pytest.mark.parametrize("lie", ["noise", "short", "huge", "own ciphertext"])
def test_an_implausible_answer_is_not_taken_and_the_cloud_is_not_told(tmp_path: Path, lie: str) -> None:
    """What an opened answer was like must not show in what the member does next: it would be an oracle."""
    body = SQUARE.answer_bytes - 16

    def answer(keys: bytes, feature: bytes) -> bytes:
        if lie == "own ciphertext":
            return feature[:16] + feature[80 : 80 + body]
        made = {"noise": os.urandom(body), "short": b"", "huge": b"\xff" * body}[lie]
        return keys[:16] + made

    cloud = LyingCloud(tmp_path, TAIL.card, answer)
    try:
        with cloud.member() as line:
            line.prepare()
            model = edge_model(TAIL, line)
            images, _ = site_images(TAIL, 30, seed=4)
            quiet = edge_model(TAIL, None)
            doubtful = [image for image in images if not quiet.answer(image).confirmed]
            answers = [model.answer(image) for image in doubtful]
            with pytest.raises(ImplausibleAnswer):
                line.ask(doubtful[0])
        assert [answer.answered_by for answer in answers] == ["edge"] * len(doubtful)
        assert not any(answer.confirmed for answer in answers)
        assert cloud.asked == len(doubtful) + 1
    finally:
        cloud.close()


def test_the_truth_of_an_answer_keeps_the_shadow_current() -> None:
    model = edge_model(TAIL, None)
    images, _ = site_images(TAIL, 5, seed=4)
    answer = model.answer(images[0])
    model.learn_truth(answer, "normal")
    assert not model.shadow.measured  # the edge answered: nothing is learnt of the cloud
    with pytest.raises(ParameterRefused, match="none of the labels"):
        model.learn_truth(answer, "cat")
    with pytest.raises(ParameterRefused, match="no cloud"):
        model.shadow_evaluate(images, np.zeros(5))


def test_an_edge_model_in_onnx_needs_neither_torch_nor_tenseal(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, kinds = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [
            helper.make_node("Identity", ["image"], ["feature"]),
            helper.make_node("ReduceSum", ["image", "axes"], ["logit"], keepdims=0),
        ],
        "edge",
        [helper.make_tensor_value_info("image", kinds.FLOAT, ["n", 4])],
        [
            helper.make_tensor_value_info("logit", kinds.FLOAT, ["n"]),
            helper.make_tensor_value_info("feature", kinds.FLOAT, ["n", 4]),
        ],
        [helper.make_tensor("axes", kinds.INT64, [1], [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "edge.onnx")
    script = """
import sys
for name in ("torch", "tenseal", "onnx", "sklearn"):
    sys.modules[name] = None
import numpy as np
from blindsum.client.inference import EdgeModel, Gate, OnnxBody
body = OnnxBody(sys.argv[1])
images = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
logits, features = body(images)
gate = Gate.fit(logits, features, logits > 0, reference=features[:20])
print(EdgeModel(body, gate, labels=("no", "yes"), version="3").answer(np.full(4, 0.5, np.float32)))
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "edge.onnx")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("yes (")
    assert "by edge 3, local" in run.stdout


def test_without_onnxruntime_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from blindsum.client.inference import OnnxBody  # noqa: PLC0415

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"blindsum\[edge\]"):
        OnnxBody(b"")
