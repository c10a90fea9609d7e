"""The real service process over real TLS: answers, refusals, deaths, and what it gets to see."""

import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from blindsum.client.inference import CloudTail, CloudUnavailable
from blindsum.client.inference.cloud_tail import GRACE_SECONDS, KEY_SECONDS, ClearFeatureWarning
from blindsum.crypto.errors import ParameterRefused, Refused
from blindsum.crypto.inference.circuit import SQUARE
from blindsum.crypto.inference.tail_wire import keys_digest
from blindsum.inference.member_records import MemberRecords
from blindsum.proto.v1 import inference_pb2, inference_pb2_grpc
from linear_edge import LABELS, edge_model, site_images
from random_tails import random_features, random_tail
from service_process import ServiceProcess

TAIL = random_tail()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    running = ServiceProcess(
        tmp_path_factory.mktemp("service"), TAIL, "--capture", str(tmp_path_factory.mktemp("capture"))
    )
    yield running
    running.close()


@pytest.fixture
def cloud(service: ServiceProcess) -> Iterator[CloudTail]:
    with service.cloud() as line:
        line.prepare()
        yield line


def stub_of(service: ServiceProcess, member: str) -> inference_pb2_grpc.InferenceServiceStub:
    key, chain = service.credentials(member)
    credentials = grpc.ssl_channel_credentials(service.ca.encode(), key, chain)
    return inference_pb2_grpc.InferenceServiceStub(grpc.secure_channel(service.address, credentials))


def reason(error: pytest.ExceptionInfo[grpc.RpcError]) -> str:
    return dict(error.value.trailing_metadata())["blindsum-reason"]  # type: ignore[attr-defined]


def test_answers_are_the_clear_ones(cloud: CloudTail) -> None:
    features = random_features(TAIL, 10, seed=5)
    answers = [cloud.ask(feature) for feature in features]
    assert np.abs(np.array([answer.logit for answer in answers]) - TAIL.logits(features)).max() < 1e-3
    assert {answer.version for answer in answers} == {"v1"}


def test_sure_images_never_leave_and_doubtful_ones_are_answered_by_the_cloud(
    service: ServiceProcess, cloud: CloudTail
) -> None:
    model = edge_model(TAIL, cloud)
    images, labels = site_images(TAIL, 40, seed=6)
    before = questions_left(service)
    answers = [model.answer(image) for image in images]
    sent = [answer for answer in answers if answer.answered_by == "cloud"]
    assert before - questions_left(service) == len(sent)
    assert 0 < len(sent) < len(answers)
    for answer, label in zip(answers, labels, strict=True):
        assert answer.confirmed
        if answer.answered_by == "cloud":
            assert (answer.mode, answer.version, answer.label) == ("encrypted", "v1", LABELS[label])
        else:
            assert (answer.mode, answer.version) == ("local", "edge-1")
            assert answer.label == answer.edge_label
        assert 0.5 <= answer.confidence <= 1


def questions_left(service: ServiceProcess, member: str = "clinic-1") -> int:
    stub = stub_of(service, member)
    return int(stub.DescribeTail(inference_pb2.DescribeTailRequest()).questions_left)


def test_shadow_evaluation_keeps_a_cloud_that_helps_and_drops_one_that_does_not(cloud: CloudTail) -> None:
    images, labels = site_images(TAIL, 60, seed=7)
    poor = edge_model(TAIL, cloud, skill=0.0)
    report = poor.shadow_evaluate(images, labels)
    assert report.helps
    assert report.gain > 0.1
    assert report.sent <= 0.7
    assert poor.answer(doubtful_image(poor, images)).answered_by == "cloud"

    wrong = edge_model(TAIL, cloud, skill=0.0)
    # At a site where the cloud's labels are the wrong way round, it can only lose.
    logits, _ = wrong._body(images)
    report = wrong.shadow_evaluate(images, (logits > 0).astype(int))
    assert not report.helps
    assert report.gain < 0
    answer = wrong.answer(doubtful_image(wrong, images))
    assert (answer.answered_by, answer.mode, answer.confirmed) == ("edge", "local", False)


def doubtful_image(model: object, images: np.ndarray) -> np.ndarray:
    logits, features = model._body(images)  # type: ignore[attr-defined]
    judged = [model._gate.judge(a, b) for a, b in zip(logits, features, strict=True)]  # type: ignore[attr-defined]
    return images[next(i for i, one in enumerate(judged) if one.doubtful and not one.novel)]


def test_a_novel_image_is_doubtful_however_sure_the_edge_is(cloud: CloudTail) -> None:
    model = edge_model(TAIL, cloud, skill=1.0)
    answer = model.answer(TAIL.mean + 30 * TAIL.deviation)
    assert answer.novel
    assert answer.answered_by == "cloud"


def test_keys_are_registered_once_and_another_members_are_refused(
    service: ServiceProcess, cloud: CloudTail
) -> None:
    feature = random_features(TAIL, 1)[0]
    holder = cloud._session.holder
    assert holder is not None
    request = inference_pb2.InferEncryptedRequest(
        tail=TAIL.card.digest, keys=holder.digest, feature=holder.encrypt(feature)
    )
    with pytest.raises(grpc.RpcError) as error:
        stub_of(service, "clinic-2").InferEncrypted(request)
    assert reason(error) == "wrong_digest"
    # Registering again what is registered costs no upload: the answer comes before any key byte.
    begun = [
        inference_pb2.RegisterKeysRequest(
            start=inference_pb2.RegisterKeysStart(tail=TAIL.card.digest, digest=holder.digest)
        )
    ]
    stub_of(service, "clinic-1").RegisterKeys(iter(begun))


def test_the_key_is_replaced_after_a_day_without_holding_up_an_answer(service: ServiceProcess) -> None:
    now = [1000.0]
    feature = random_features(TAIL, 1)[0]
    with service.cloud("clinic-3", now=lambda: now[0]) as line:
        line.prepare()
        first = line.key_digest
        now[0] += KEY_SECONDS - 1
        line.ask(feature)
        assert line.key_digest == first
        now[0] += 2
        line.ask(feature)
        renewing = [t for t in threading.enumerate() if t.name == "blindsum-tail-key"]
        for thread in renewing:
            thread.join(60)
        assert line.key_digest not in (first, None)
        line.ask(feature)
        now[0] += KEY_SECONDS + GRACE_SECONDS
        with pytest.raises(CloudUnavailable, match="today's key"):
            line.ask(feature)
        for thread in [t for t in threading.enumerate() if t.name == "blindsum-tail-key"]:
            thread.join(60)


def test_a_killed_worker_is_replaced(service: ServiceProcess, cloud: CloudTail) -> None:
    feature = random_features(TAIL, 1)
    cloud.ask(feature[0])
    for worker in service.workers():
        worker.kill()
    assert cloud.ask(feature[0]).logit == pytest.approx(TAIL.logits(feature)[0], abs=1e-3)
    assert service.process.poll() is None


def test_a_slow_cloud_leaves_the_edges_answer_not_confirmed(service: ServiceProcess) -> None:
    images, _ = site_images(TAIL, 40, seed=8)
    with service.cloud("clinic-4", seconds=0.3) as line:
        line.prepare()
        model = edge_model(TAIL, line)
        image = doubtful_image(model, images)
        stopped = service.workers()
        for worker in stopped:
            worker.suspend()
        try:
            answer = model.answer(image)
        finally:
            for worker in stopped:
                worker.resume()
    assert (answer.answered_by, answer.confirmed, answer.mode) == ("edge", False, "local")
    assert "not confirmed" in str(answer)


def test_keys_survive_a_restart_and_a_dead_cloud_is_not_waited_for(tmp_path: Path) -> None:
    service = ServiceProcess(tmp_path, TAIL)
    images, _ = site_images(TAIL, 40, seed=9)
    try:
        with service.cloud(pause=0.0) as line:
            line.prepare()
            model = edge_model(TAIL, line)
            image = doubtful_image(model, images)
            assert model.answer(image).answered_by == "cloud"
            service.kill()
            assert not model.answer(image).confirmed
            service.start(service.port)
            deadline = time.monotonic() + 30
            while not (answer := model.answer(image)).confirmed:
                assert time.monotonic() < deadline
            assert answer.answered_by == "cloud"
    finally:
        service.close()


def test_a_pause_follows_a_failure(service: ServiceProcess) -> None:
    clock = [0.0]
    key, chain = service.credentials("clinic-1")
    nobody = CloudTail(
        "localhost:1", ca=service.ca, key=key, certificate=chain, pause=30, now=lambda: clock[0]
    )
    with nobody as line:
        with pytest.raises(CloudUnavailable, match="UNAVAILABLE"):
            line.prepare()
        line._quiet_until = 30.0
        with pytest.raises(CloudUnavailable, match="a moment ago"):
            line.ask(np.zeros(127))


def test_the_quota_ends_questions_but_not_answers(tmp_path: Path) -> None:
    service = ServiceProcess(tmp_path, TAIL, "--questions", "3")
    try:
        features = random_features(TAIL, 4)
        with service.cloud() as line:
            line.prepare()
            for feature in features[:3]:
                line.ask(feature)
            with pytest.raises(CloudUnavailable, match="used up"):
                line.ask(features[3])
        # Another day's questions can't be had by crashing the service; another member has its own.
        service.kill()
        service.start()
        assert questions_left(service) == 0
        assert questions_left(service, "clinic-2") == 3
    finally:
        service.close()


def test_features_in_the_clear_only_where_both_sides_want_it(service: ServiceProcess, tmp_path: Path) -> None:
    with pytest.warns(ClearFeatureWarning, match="rebuild"):
        line = service.cloud(mode="tls")
    with line, pytest.raises(CloudUnavailable, match="mode 'tls'"):
        line.prepare()
    with pytest.raises(ValueError, match="encrypted"):
        service.cloud(mode="local")
    open_service = ServiceProcess(tmp_path, TAIL, "--allow-clear")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ClearFeatureWarning)
            line = open_service.cloud(mode="tls")
        with line:
            line.prepare()
            features = random_features(TAIL, 3).astype(np.float32)
            found = [line.ask(feature).logit for feature in features]
            assert found == pytest.approx(TAIL.logits(features).tolist(), abs=1e-6)
            model = edge_model(TAIL, line)
            images, _ = site_images(TAIL, 40, seed=8)
            assert model.answer(doubtful_image(model, images)).mode == "tls"
    finally:
        open_service.close()


def test_strangers_are_refused(service: ServiceProcess, tmp_path: Path) -> None:
    key, chain = service.credentials("clinic-1", authority=tmp_path / "other")
    stranger = CloudTail(service.address, ca=service.ca, key=key, certificate=chain)
    with stranger, pytest.raises(CloudUnavailable, match="UNAVAILABLE"):
        stranger.prepare()


def test_members_of_other_federations_are_refused_where_one_is_named(tmp_path: Path) -> None:
    """An aggregator certifies the members of all its owners; each could ask as often as a day allows."""
    service = ServiceProcess(tmp_path, TAIL, "--federation", "ab" * 32)
    try:
        with pytest.raises(grpc.RpcError) as error:
            stub_of(service, "clinic-1").DescribeTail(inference_pb2.DescribeTailRequest())
        assert reason(error) == "unknown_member"
    finally:
        service.close()


def test_evaluation_keys_that_were_damaged_on_the_disk_can_be_registered_again(tmp_path: Path) -> None:
    records = MemberRecords(tmp_path)
    keys, tail = b"evaluation keys", bytes(32)
    digest = keys_digest(keys)
    records.keep_keys("clinic-1", tail, keys, 0)
    (tmp_path / "keys" / digest.hex()).write_bytes(b"eval")
    with pytest.raises(Refused, match="register them again"):
        records.keys(digest)
    assert not records.has_keys("clinic-1", tail, digest, 0), "or a member would be told that they are there"
    records.keep_keys("clinic-1", tail, keys, 0)
    assert records.keys(digest) == keys
    records.close()


def test_a_pinned_version_is_kept(service: ServiceProcess) -> None:
    with service.cloud(version="v2") as line, pytest.raises(CloudUnavailable, match="pinned is v2"):
        line.prepare()


def test_the_service_never_sees_feature_or_answer(tmp_path: Path) -> None:
    """Neither stands in what the handlers received and returned or logged, in any form they ever have."""
    capture = tmp_path / "capture"
    service = ServiceProcess(tmp_path, TAIL, "--capture", str(capture), "--allow-clear")
    try:
        feature = random_features(TAIL, 1, seed=21).astype(np.float32)
        with service.cloud() as line:
            line.prepare()
            answer = line.ask(feature[0]).logit
        seen = b"".join(path.read_bytes() for path in sorted(capture.iterdir())) + service.log.read_bytes()
        assert len(seen) > SQUARE.keys_bytes
        assert forms_found(seen, feature[0], answer) == []
        # The control: in mode tls the same scan finds the feature and the answer.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ClearFeatureWarning)
            line = service.cloud(mode="tls")
        with line:
            line.prepare()
            clear = line.ask(feature[0]).logit
        seen = b"".join(path.read_bytes() for path in sorted(capture.iterdir()))
        assert {"raw float32", "answer float64"} <= set(forms_found(seen, feature[0], clear))
    finally:
        service.close()


def forms_found(seen: bytes, feature: np.ndarray, answer: float) -> list[str]:
    """Forms in which four numbers of the feature in a row, or the answer, stand in the bytes.

    Single float32 numbers aren't looked for: four bytes stand in megabytes of ciphertext by chance.
    """
    standard = TAIL.card.standardise(feature[None].astype(np.float64))[0]
    scaled = np.rint(standard * 2.0**SQUARE.scale_bits)
    forms = {
        "raw float32": feature.astype("<f4")[:4].tobytes(),
        "raw float64": feature.astype("<f8")[:4].tobytes(),
        "standardised float32": standard.astype("<f4")[:4].tobytes(),
        "standardised float64": standard.astype("<f8")[:4].tobytes(),
        "scaled": scaled.astype("<i8")[:4].tobytes(),
        "text": repr(float(feature[0])).encode(),
        "answer float64": np.array([answer], "<f8").tobytes(),
        "answer text": repr(answer).encode(),
    }
    return [name for name, form in forms.items() if form in seen]


def test_features_that_do_not_fit_are_the_apps_mistake(cloud: CloudTail) -> None:
    with pytest.raises(ParameterRefused, match="127"):
        cloud.ask(np.zeros(5))


def test_the_service_ends_with_its_supervisor(tmp_path: Path) -> None:
    service = ServiceProcess(tmp_path, TAIL)
    workers = service.workers()
    assert workers
    os.kill(service.process.pid, signal.SIGTERM)
    assert service.process.wait(30) == 0
    assert psutil.wait_procs(workers, timeout=10)[1] == []
