"""Worker processes of members: exact, replaced when they die, and nothing of a key where it may not be."""

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.extend(
    str(Path(__file__).parents[1] / "crypto" / folder) for folder in ("homomorphic", "homomorphic_rounds")
)

from blindsum.client import frame_worker, frame_workers
from blindsum.client.frame_workers import FrameWorkers, WorkerDied
from blindsum.client.testing import Federation
from blindsum.crypto.errors import BlindsumError, EncodingError, OpeningFailed, Refused
from blindsum.crypto.schemes.homomorphic import worker_cipher
from blindsum.crypto.schemes.homomorphic.cipher import aggregator_cipher, choose_parameters
from blindsum.crypto.schemes.homomorphic.rounds import HomomorphicProtector
from blindsum.crypto.schemes.homomorphic.worker_cipher import PieceWork
from homomorphic_settings import Setting, make_setting
from small_he_round import MEMBERS, SmallHeRound

SCHEMES = [
    pytest.param("bfv", marks=pytest.mark.he),
    pytest.param("ckks", marks=pytest.mark.he),
    pytest.param("paillier", marks=pytest.mark.paillier),
]


@pytest.fixture(scope="module", params=SCHEMES)
def key(request: pytest.FixtureRequest) -> Setting:
    """bfv and ckks with one piece a frame, paillier with several."""
    parameters = choose_parameters(request.param, 16, 7, length=5000, modulus_bits=2048, minimum_security=112)
    several = parameters.ciphertexts_per_frame > 2 * worker_cipher.PIECE_CIPHERTEXTS
    assert several == (request.param == "paillier")
    return make_setting(parameters)


@pytest.fixture
def work(key: Setting) -> PieceWork:
    return PieceWork(key.parameters, key.keys.public, key.keys.secret)


@pytest.fixture(scope="module")
def workers() -> Iterator[FrameWorkers]:
    pool = FrameWorkers(2)
    yield pool
    pool.close()


@pytest.fixture
def fields(key: Setting) -> np.ndarray[Any, np.dtype[np.uint32]]:
    count: int = key.parameters.fields_per_frame - 3
    return np.random.default_rng(1).integers(0, 1 << 16, count, dtype=np.uint32)


def test_frames_are_exact_and_fresh(
    key: Setting, work: PieceWork, workers: FrameWorkers, fields: Any
) -> None:
    frames = [workers.encrypt(work, fields), workers.encrypt(work, fields.astype(np.uint64))]
    assert frames[0] != frames[1]
    aggregator = aggregator_cipher(key.parameters, key.keys.public)
    total = None
    for frame in frames:
        aggregator.check(frame)
        total = aggregator.add(total, frame)
    assert total is not None
    summed, error = workers.decrypt(work, aggregator.finish(total), fields.size, 2)
    np.testing.assert_array_equal(summed, 2 * fields.astype(np.uint64))
    assert error == 0 if key.parameters.scheme != "ckks" else 0 < error < 0.25
    assert 1 <= len(workers.pids) <= 2
    assert workers.cpu_seconds > 0


def aggregated(key: Setting, frame: bytes) -> bytes:
    """The published sum of one upload."""
    return key.aggregator.finish(key.aggregator.add(None, frame))


def test_a_worker_that_dies_is_replaced(
    key: Setting, work: PieceWork, workers: FrameWorkers, fields: Any
) -> None:
    workers.start(work)
    before = workers.pids
    for pid in before:
        os.kill(pid, signal.SIGSTOP)  # it is killed in the middle of its piece, not between two

    def kill() -> None:
        for pid in before:
            os.kill(pid, signal.SIGKILL)

    timer = threading.Timer(0.2, kill)
    timer.start()
    frame = workers.encrypt(work, fields)
    timer.join()
    summed, _ = workers.decrypt(work, aggregated(key, frame), fields.size, 1)
    np.testing.assert_array_equal(summed, fields)
    assert not set(before) & set(workers.pids)


def test_a_sum_that_does_not_open_leaves_the_workers_alive(
    key: Setting, work: PieceWork, workers: FrameWorkers, fields: Any
) -> None:
    frame = workers.encrypt(work, fields)
    before = sorted(workers.pids)
    published = aggregated(key, frame)
    damaged = published[:5000] + b"\xff" * 600 + published[5600:]
    for bad in (damaged, bytes(16) + published[16:]):
        with pytest.raises(OpeningFailed):
            workers.decrypt(work, bad, fields.size, 1)
    summed, _ = workers.decrypt(work, published, fields.size, 1)
    np.testing.assert_array_equal(summed, fields)
    assert sorted(workers.pids) == before


def test_workers_take_another_key_and_come_back(
    key: Setting, work: PieceWork, workers: FrameWorkers, fields: Any
) -> None:
    other = make_setting(key.parameters)
    theirs = workers.encrypt(PieceWork(key.parameters, other.keys.public, other.keys.secret), fields)
    ours = workers.encrypt(work, fields)
    np.testing.assert_array_equal(other.member.decrypt(aggregated(other, theirs), fields.size, 1), fields)
    np.testing.assert_array_equal(key.member.decrypt(aggregated(key, ours), fields.size, 1), fields)


def test_nothing_of_the_key_is_in_arguments_or_environment(
    key: Setting, work: PieceWork, workers: FrameWorkers
) -> None:
    workers.start(work)
    secret = key.keys.secret
    assert workers.pids
    for pid in workers.pids:
        for name in ("cmdline", "environ"):
            seen = Path(f"/proc/{pid}/{name}").read_bytes()
            assert secret not in seen
            assert secret.hex().encode() not in seen


def test_a_worker_has_a_memory_limit(work: PieceWork, workers: FrameWorkers) -> None:
    workers.start(work)
    for pid in workers.pids:
        limit, hard = resource.prlimit(pid, resource.RLIMIT_AS)
        assert limit == hard < 4 * frame_worker.MEMORY_BYTES
        assert resource.prlimit(pid, resource.RLIMIT_CORE) == (0, 0)
    greedy = (
        "from blindsum.client import frame_worker as one\n"
        "one._limit_memory()\n"
        "kept = bytearray(one.MEMORY_BYTES // 2)\n"
        "try:\n    bytearray(one.MEMORY_BYTES)\n"
        "except MemoryError:\n    print('refused')\n"
    )
    said = subprocess.run([sys.executable, "-c", greedy], capture_output=True, text=True, check=True)
    assert said.stdout == "refused\n"


def test_idle_workers_end_on_request(work: PieceWork, fields: Any) -> None:
    pool = FrameWorkers(2)
    pool.start(work)
    handles = [os.pidfd_open(pid) for pid in pool.pids]
    pool.end_idle()
    assert pool.pids == []
    for handle in handles:
        with pytest.raises(ProcessLookupError):
            signal.pidfd_send_signal(handle, 0)
        os.close(handle)
    assert pool.encrypt(work, fields)
    pool.close()
    assert pool.cpu_seconds == 0


def test_a_piece_that_kills_every_worker_is_a_typed_error(
    work: PieceWork, fields: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deadly = tmp_path / "deadly.py"
    deadly.write_text("import os\nos.abort()\n")
    monkeypatch.setattr(frame_worker, "__file__", str(deadly))
    pool = FrameWorkers(1)
    with pytest.raises(WorkerDied):
        pool.encrypt(work, fields)
    assert issubclass(WorkerDied, BlindsumError)
    pool.close()


@pytest.fixture(scope="module", params=SCHEMES)
def small(request: pytest.FixtureRequest) -> SmallHeRound:
    """A round of two frames."""
    return SmallHeRound(request.param)


def test_spread_frames_are_made_once_and_sealed_only_when_all_are(small: SmallHeRound) -> None:
    aggregator = small.scheme.aggregator(small.terms)
    machine = small.member("ann")
    begun = machine.begin_upload(aggregator.request("ann"))
    assert isinstance(begun, HomomorphicProtector)
    protector = frame_workers.spread_protector(begun)
    assert protector is not begun
    layout, fields = protector.layout, small.fields("ann")
    for index in range(layout.frames):
        with pytest.raises(Refused, match="haven't been protected"):
            machine.seal_upload(bytes(32))
        part = fields[slice(*layout.field_range(index))]
        with pytest.raises(EncodingError):
            protector.protect(index, part[:-1])
        with pytest.raises(EncodingError):
            protector.protect(index, part + np.uint32(1 << 16))
        protector.protect(index, part)
        with pytest.raises(Refused, match="already"):
            protector.protect(index, part)
    machine.seal_upload(bytes(32))


def test_a_spread_sum_opens_like_any_other(small: SmallHeRound) -> None:
    aggregator, machines, published = small.run()
    for member in MEMBERS[:2]:
        opener = machines[member].open_sum(aggregator.result())
        spread = frame_workers.spread_opener(opener)
        assert spread is not opener
        assert (spread.survivors, spread.h1, spread.layout) == (opener.survivors, opener.h1, opener.layout)
        for index, frame in enumerate(published):
            np.testing.assert_array_equal(spread.open(index, frame), opener.open(index, frame))
        for bad in (published[0][:-1], b"\0" * 16 + published[0][16:]):
            messages = set()
            for either in (opener, spread):
                with pytest.raises(OpeningFailed) as failure:
                    either.open(0, bad)
                messages.add(str(failure.value))
            assert len(messages) == 1
        with pytest.raises(OpeningFailed):
            spread.open(len(published), published[0])


def test_where_processes_cannot_start_one_does_the_work(
    small: SmallHeRound, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deadly = tmp_path / "deadly.py"
    deadly.write_text("raise SystemExit(1)\n")
    monkeypatch.setattr(frame_worker, "__file__", str(deadly))
    monkeypatch.setattr(frame_workers, "_shared", frame_workers._Shared())
    aggregator = small.scheme.aggregator(small.terms)
    begun = small.member("ann").begin_upload(aggregator.request("ann"))
    assert isinstance(begun, HomomorphicProtector)
    assert frame_workers.spread_protector(begun) is begun
    frame_workers._shared.close()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_round_is_exact_although_workers_die(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real members, real server. One worker dies as it gets a piece to encrypt, one with one to open."""
    spread: list[bool] = []
    for name in ("spread_protector", "spread_opener"):
        real = getattr(frame_workers, name)

        def seen(given: Any, real: Any = real) -> Any:
            used = real(given)
            spread.append(used is not given)
            return used

        monkeypatch.setattr(f"blindsum.client.round_session.{name}", seen)
    call, doomed, died = frame_workers._Worker.call, {b"SEAL", b"OPEN"}, []

    def call_or_die(worker: Any, operation: bytes, parts: Any) -> list[bytes]:
        if operation in doomed:
            doomed.remove(operation)
            died.append(worker.pid)
            os.kill(worker.pid, signal.SIGKILL)
        return call(worker, operation, parts)

    monkeypatch.setattr(frame_workers._Worker, "call", call_or_die)
    model = {"weight": np.zeros(700, np.float32)}
    policy = {"paillier_bits": 2048} if scheme == "paillier" else {}
    with Federation(3, scheme=scheme, model=model, policy=policy) as federation:  # type: ignore[arg-type]
        federation.train(lambda name, _: {"weight": np.full(700, int(name[-1]) / 64, np.float32)})
        after = federation.owner.model()
    np.testing.assert_allclose(after["weight"], 2 / 64, atol=1e-3)
    assert spread == [True] * 6
    assert len(died) == 2
