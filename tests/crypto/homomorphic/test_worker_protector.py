"""Frames made in worker processes from a spec, without pickling anything."""

import multiprocessing
from multiprocessing.connection import Connection

import numpy as np
import pytest
from blindsum.crypto.errors import EncodingError, ParameterRefused, Refused
from blindsum.crypto.schemes.homomorphic.cipher import choose_parameters
from blindsum.crypto.schemes.homomorphic.worker_protector import WorkerProtector, protector_spec
from homomorphic_settings import Setting, make_setting

H1 = bytes(range(32))


def spec_of(setting: Setting, fields: int, bits: int = 16) -> bytes:
    keys = setting.keys
    return protector_spec(setting.parameters, keys.public, keys.secret, fields=fields, bits=bits, h1=H1)


def serve_frames(channel: Connection) -> None:
    protector = WorkerProtector(channel.recv_bytes()).warm_up()
    while request := channel.recv_bytes():
        fields = np.frombuffer(request, "<u4", offset=8)
        channel.send_bytes(protector.protect(int.from_bytes(request[:8], "little"), fields))


def test_two_workers_make_one_upload(setting: Setting) -> None:
    """Two processes that start from nothing but bytes; the sum of their frames is exact."""
    per_frame = setting.parameters.fields_per_frame
    fields = np.random.default_rng(3).integers(0, 1 << 16, 2 * per_frame - 5, dtype=np.uint32)
    spec = spec_of(setting, fields.size)
    context = multiprocessing.get_context("spawn")
    channels, workers = [], []
    for index in range(2):
        ours, theirs = context.Pipe()
        workers.append(context.Process(target=serve_frames, args=(theirs,)))
        workers[-1].start()
        theirs.close()
        ours.send_bytes(spec)
        ours.send_bytes(index.to_bytes(8, "little") + fields[index * per_frame :][:per_frame].tobytes())
        channels.append(ours)
    frames = [channel.recv_bytes() for channel in channels]
    for channel, worker in zip(channels, workers, strict=True):
        channel.send_bytes(b"")
        worker.join()
        assert worker.exitcode == 0
    opened = []
    for frame in frames:
        total = setting.aggregator.add(setting.aggregator.add(None, frame), frame)
        opened.append(setting.member.decrypt(setting.aggregator.finish(total), per_frame, 2))
    np.testing.assert_array_equal(np.concatenate(opened)[: fields.size], 2 * fields)
    assert not np.concatenate(opened)[fields.size :].any()


def test_a_worker_keeps_the_rounds_layout_and_limits() -> None:
    setting = make_setting(choose_parameters("bfv", 16, 7, length=5000))
    protector = WorkerProtector(spec_of(setting, 9000, bits=12))
    assert (protector.h1, protector.layout.fields, protector.layout.frames) == (H1, 9000, 2)
    whole = np.full(8192, 4095, np.uint32)
    assert protector.protect(0, whole) != protector.protect(0, whole)
    for index, fields in (
        (0, whole + 1),
        (0, whole[:-1]),
        (1, whole),
        (2, whole[:1]),
        (-1, whole),
        (0, whole.astype(np.int64)),
    ):
        with pytest.raises(EncodingError):
            protector.protect(index, fields)  # type: ignore[arg-type]


def test_other_bytes_make_no_protector() -> None:
    setting = make_setting(choose_parameters("bfv", 16, 7, length=1))
    other = make_setting(setting.parameters)
    spec = spec_of(setting, 10)
    for bad in (b"", spec[:-1], spec + b"\0", spec.replace(setting.keys.secret, other.keys.secret)):
        with pytest.raises(Refused):
            WorkerProtector(bad)
    with pytest.raises(ParameterRefused):
        WorkerProtector(spec.replace(b"-k1-", b"-k9-"))


def test_a_protector_neither_prints_nor_pickles_its_key() -> None:
    setting = make_setting(choose_parameters("bfv", 16, 7, length=1))
    protector = WorkerProtector(spec_of(setting, 10))
    assert repr(protector) == "<WorkerProtector of 1 frames>"
    with pytest.raises(TypeError, match="never pickled"):
        protector.__reduce__()
