"""Hostile bytes end in a refusal or a useless answer of the one size; the service goes on."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from blindsum.client.inference import CloudTail
from blindsum.client.transport import refusal_of
from blindsum.crypto.errors import RefusalReason, Refused
from blindsum.crypto.inference.circuit import LINEAR, SQUARE
from blindsum.crypto.inference.key_holder import TailKeyHolder
from blindsum.crypto.inference.tail_wire import key_tag_of, keys_digest, unpack_answer
from blindsum.inference.evaluation_workers import EvaluationWorkers
from blindsum.proto.v1 import inference_pb2, inference_pb2_grpc
from hostile_questions import crude, hostile_keys, structured
from random_tails import random_features, random_tail
from service_process import ServiceProcess

TAIL = random_tail()
DIGEST = TAIL.card.digest


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    running = ServiceProcess(tmp_path_factory.mktemp("hostile"), TAIL, "--questions", "1000000")
    yield running
    running.close()


@pytest.fixture(scope="module")
def line(service: ServiceProcess) -> Iterator[CloudTail]:
    with service.cloud() as opened:
        opened.prepare()
        yield opened


def reason_of(error: grpc.RpcError) -> RefusalReason:
    refused = refusal_of(error)
    assert refused is not None, error
    return refused.reason


class Attacker:
    """A member with a good key, who sends what it likes."""

    def __init__(self, service: ServiceProcess, line: CloudTail) -> None:
        session = line._session
        assert session is not None
        assert session.holder is not None
        self.holder = session.holder
        key, chain = service.credentials("clinic-1")
        credentials = grpc.ssl_channel_credentials(service.ca.encode(), key, chain)
        self.stub = inference_pb2_grpc.InferenceServiceStub(grpc.secure_channel(service.address, credentials))

    def ask(self, feature: bytes, keys: bytes | None = None) -> bytes | RefusalReason:
        request = inference_pb2.InferEncryptedRequest(
            tail=DIGEST, keys=keys or self.holder.digest, feature=feature
        )
        try:
            return bytes(self.stub.InferEncrypted(request, timeout=60).answer)
        except grpc.RpcError as error:
            return reason_of(error)

    def register(self, keys: bytes, digest: bytes | None = None) -> RefusalReason | None:
        start = inference_pb2.RegisterKeysStart(tail=DIGEST, digest=digest or keys_digest(keys))
        parts = [inference_pb2.RegisterKeysRequest(start=start)]
        parts += [
            inference_pb2.RegisterKeysRequest(data=keys[at : at + 262_144])
            for at in range(0, len(keys), 262_144)
        ]
        try:
            self.stub.RegisterKeys(iter(parts), timeout=60)
        except grpc.RpcError as error:
            return reason_of(error)
        return None


@pytest.fixture
def attacker(service: ServiceProcess, line: CloudTail) -> Attacker:
    return Attacker(service, line)


def still_answers(line: CloudTail) -> None:
    feature = random_features(TAIL, 1, seed=77)
    assert line.ask(feature[0]).logit == pytest.approx(TAIL.logits(feature)[0], abs=1e-3)


def assault(attacker: Attacker, count: int, seed: int) -> tuple[int, int]:
    """How many hostile questions were refused, and how many reached the evaluation."""
    stream = np.random.default_rng(seed)
    good, other = (attacker.holder.encrypt(one) for one in random_features(TAIL, 2))
    refused = evaluated = 0
    for number in range(count):
        frame = structured(good, other, stream) if number % 5 < 3 else crude(good, stream)
        answer = attacker.ask(frame)
        if isinstance(answer, RefusalReason):
            refused += 1
        else:
            # Whatever it is, it is a ciphertext of the one size, every residue below its prime.
            unpack_answer(SQUARE, key_tag_of(attacker.holder.digest), answer)
            evaluated += 1
    return refused, evaluated


def test_mutated_questions(service: ServiceProcess, line: CloudTail, attacker: Attacker) -> None:
    workers = {worker.pid for worker in service.workers()}
    refused, evaluated = assault(attacker, 100, seed=1)
    assert refused >= 20
    assert evaluated >= 50
    still_answers(line)
    assert {worker.pid for worker in service.workers()} == workers


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_mutated_questions(service: ServiceProcess, line: CloudTail, attacker: Attacker) -> None:
    refused, evaluated = assault(attacker, 10_000, seed=2)
    assert evaluated >= 5000
    assert refused + evaluated == 10_000
    still_answers(line)


def test_mutated_keys_never_bring_the_workers_down() -> None:
    stream = np.random.default_rng(3)
    good = TailKeyHolder(TAIL.card)
    workers = EvaluationWorkers(TAIL, 1, 30, cached=2)
    try:
        workers.start()
        pids = workers.pids
        loaded = 0
        for _ in range(20):
            keys = hostile_keys(good.evaluation_keys, stream)
            try:
                digest = workers.register(keys)
            except Refused:
                continue
            loaded += 1
            frame = keys_digest(keys)[:16] + good.encrypt(random_features(TAIL, 1)[0])[16:]
            assert len(workers.evaluate(digest, frame, lambda keys=keys: keys)) == SQUARE.answer_bytes  # type: ignore[misc]
        assert loaded >= 8
        assert workers.pids == pids
    finally:
        workers.close()


def test_other_parameters_other_keys_and_lies_about_digests(line: CloudTail, attacker: Attacker) -> None:
    linear = TailKeyHolder(random_tail(LINEAR).card)
    assert attacker.register(linear.evaluation_keys) is RefusalReason.WRONG_SIZE
    padded = linear.evaluation_keys + bytes(SQUARE.keys_bytes - LINEAR.keys_bytes)
    # Read at other offsets its coefficients are noise; and the padding repeats a seed of zeros.
    assert attacker.register(padded) in (RefusalReason.OUT_OF_RANGE, RefusalReason.REPLAY)
    assert attacker.register(padded, digest=bytes(32)) is RefusalReason.WRONG_DIGEST
    assert attacker.register(attacker.holder.evaluation_keys + b"\0") is RefusalReason.WRONG_SIZE
    assert attacker.register(b"", digest=bytes(32)) is RefusalReason.WRONG_DIGEST
    feature = random_features(TAIL, 1)[0]
    stranger = TailKeyHolder(TAIL.card)
    assert attacker.ask(stranger.encrypt(feature)) is RefusalReason.WRONG_DIGEST
    assert attacker.ask(stranger.encrypt(feature), stranger.digest) is RefusalReason.WRONG_DIGEST
    assert attacker.ask(attacker.holder.encrypt(feature), b"../../etc/passwd") is RefusalReason.WRONG_DIGEST
    still_answers(line)


def test_registrations_are_limited(service: ServiceProcess) -> None:
    with service.cloud("greedy") as line:
        line.prepare()
        attacker = Attacker(service, line)
        key, chain = service.credentials("greedy")
        credentials = grpc.ssl_channel_credentials(service.ca.encode(), key, chain)
        attacker.stub = inference_pb2_grpc.InferenceServiceStub(
            grpc.secure_channel(service.address, credentials)
        )
        reasons = [attacker.register(bytes([number])) for number in range(10)]
    assert reasons[0] is RefusalReason.WRONG_SIZE
    assert reasons[-1] is RefusalReason.LIMIT


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_questions_of_eight_members(tmp_path: Path) -> None:
    """No error, and memory stays where it was once every member's keys are loaded."""
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415

    service = ServiceProcess(tmp_path, TAIL)
    try:
        lines = [service.cloud(f"clinic-{number}", seconds=120.0) for number in range(1, 9)]
        features = random_features(TAIL, 25)
        clear = TAIL.logits(features)

        def ask(line: CloudTail) -> float:
            return max(
                abs(line.ask(feature).logit - logit) for feature, logit in zip(features, clear, strict=True)
            )

        for line in lines:
            line.prepare()
        with ThreadPoolExecutor(8) as threads:
            errors = list(threads.map(ask, lines))
            before = service.memory()
            for _ in range(5):
                errors += threads.map(ask, lines)
            after = service.memory()
        assert max(errors) < 1e-3
        assert after < before * 1.05, (before, after)
        for line in lines:
            line.close()
    finally:
        service.close()
