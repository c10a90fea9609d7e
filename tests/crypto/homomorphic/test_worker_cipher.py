"""Frames made and opened in pieces by other processes, which start from a spec and nothing else."""

import multiprocessing
from multiprocessing.connection import Connection

import numpy as np
import pytest
from blindsum.crypto.errors import OpeningFailed, ParameterRefused, Refused
from blindsum.crypto.schemes.homomorphic.cipher import CipherParameters, choose_parameters
from blindsum.crypto.schemes.homomorphic.worker_cipher import (
    PIECE_CIPHERTEXTS,
    PieceWork,
    WorkerCipher,
    piece_parameters,
)
from homomorphic_settings import Setting, make_setting


def work_of(setting: Setting) -> PieceWork:
    return PieceWork(setting.parameters, setting.keys.public, setting.keys.secret)


def long_paillier(ciphertexts: int) -> CipherParameters:
    lanes = choose_parameters("paillier", 16, 7, modulus_bits=2048, minimum_security=112).fields_per_unit
    chosen = choose_parameters(
        "paillier", 16, 7, length=ciphertexts * lanes, modulus_bits=2048, minimum_security=112
    )
    assert chosen.ciphertexts_per_frame == ciphertexts
    return chosen


@pytest.fixture(scope="module")
def long() -> Setting:
    """A paillier frame that doesn't divide into equal pieces."""
    return make_setting(long_paillier(2 * PIECE_CIPHERTEXTS + 3))


def serve_pieces(channel: Connection) -> None:
    cipher = WorkerCipher(channel.recv_bytes()).warm_up()
    while request := channel.recv_bytes():
        channel.send_bytes(cipher.encrypt(np.frombuffer(request, "<u4", offset=1)))


def test_two_workers_make_one_upload(setting: Setting) -> None:
    """Two processes that start from nothing but bytes; the sum of their frames is exact."""
    per_frame = setting.parameters.fields_per_frame
    fields = np.random.default_rng(3).integers(0, 1 << 16, 2 * per_frame - 5, dtype=np.uint32)
    spec = work_of(setting).spec
    context = multiprocessing.get_context("spawn")
    channels, workers = [], []
    for index in range(2):
        ours, theirs = context.Pipe()
        workers.append(context.Process(target=serve_pieces, args=(theirs,)))
        workers[-1].start()
        theirs.close()
        ours.send_bytes(spec)
        ours.send_bytes(b"F" + fields[index * per_frame :][:per_frame].tobytes())
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


def test_pieces_make_a_frame_like_any_other(long: Setting) -> None:
    """Made in pieces and opened whole, made whole and opened in pieces: the same fields."""
    work, parameters = work_of(long), long.parameters
    assert work.pieces == 3
    cipher = WorkerCipher(work.spec)
    fields = np.random.default_rng(4).integers(0, 1 << 16, parameters.fields_per_frame - 7, dtype=np.uint32)
    made = work.join_upload([cipher.encrypt(part) for part in work.cut_fields(fields)])
    long.aggregator.check(made)
    total = long.aggregator.add(long.aggregator.add(None, made), long.member.encrypt(fields))
    published = long.aggregator.finish(total)
    whole = long.member.decrypt(published, fields.size, 2)
    pieces = [cipher.decrypt(piece, count, 2) for piece, count in work.cut_sum(published, fields.size)]
    np.testing.assert_array_equal(whole, 2 * fields)
    np.testing.assert_array_equal(np.concatenate([part for part, _ in pieces]), whole)


def test_a_short_frame_is_padded_in_pieces_too(long: Setting) -> None:
    work = work_of(long)
    cipher = WorkerCipher(work.spec)
    made = work.join_upload([cipher.encrypt(part) for part in work.cut_fields(np.array([5, 6], np.uint32))])
    opened = long.member.decrypt(made, long.parameters.fields_per_frame, 1)
    assert opened[:2].tolist() == [5, 6]
    assert not opened[2:].any()


def test_damage_in_any_piece_of_a_sum_is_found(long: Setting) -> None:
    """Also in ciphertexts that hold none of the fields: what a whole frame refuses, its pieces refuse."""
    work = work_of(long)
    cipher = WorkerCipher(work.spec)
    good = long.member.encrypt(np.array([1, 2], np.uint32))
    size = long.parameters.modulus_bits // 4
    for start in (16, 16 + 20 * size, len(good) - size):
        damaged = good[:start] + b"\xff" * size + good[start + size :]
        failed = 0
        for piece, count in work.cut_sum(damaged, 2):
            try:
                cipher.decrypt(piece, count, 1)
            except OpeningFailed:
                failed += 1
        assert failed == 1


def test_another_keys_sum_does_not_open(setting: Setting) -> None:
    other = make_setting(setting.parameters)
    frame = setting.aggregator.finish(
        setting.aggregator.add(None, setting.member.encrypt(np.ones(3, np.uint32)))
    )
    work = work_of(other)
    cipher = WorkerCipher(work.spec)
    with pytest.raises(OpeningFailed, match="another key"):
        [cipher.decrypt(piece, count, 1) for piece, count in work.cut_sum(frame, 3)]


def test_rounding_errors_are_each_pieces_own() -> None:
    setting = make_setting(choose_parameters("ckks", 16, 7, length=5000))
    cipher = WorkerCipher(work_of(setting).spec)
    sums = [setting.aggregator.finish(setting.aggregator.add(None, setting.member.encrypt(
        np.full(4000, value, np.uint32)))) for value in (65_535, 0)]  # fmt: skip
    errors = [cipher.decrypt(frame, 4000, 1)[1] for frame in (*sums, sums[0])]
    assert errors[0] == errors[2] > 0
    assert errors[1] != errors[0]


def test_only_paillier_frames_are_cut() -> None:
    assert piece_parameters(long_paillier(40)).ciphertexts_per_frame < 40
    bfv = choose_parameters("bfv", 16, 7)
    assert piece_parameters(bfv) == bfv


def test_other_bytes_make_no_cipher() -> None:
    setting = make_setting(choose_parameters("bfv", 16, 7, length=1))
    other = make_setting(setting.parameters)
    spec = work_of(setting).spec
    for bad in (b"", spec[:-1], spec + b"\0", spec.replace(setting.keys.secret, other.keys.secret)):
        with pytest.raises(Refused):
            WorkerCipher(bad)
    with pytest.raises(ParameterRefused):
        WorkerCipher(spec.replace(b"-k1-", b"-k9-"))


def test_neither_prints_nor_pickles_its_key() -> None:
    setting = make_setting(choose_parameters("bfv", 16, 7, length=1))
    work = work_of(setting)
    cipher = WorkerCipher(work.spec)
    for holder in (work, cipher):
        assert repr(holder) == f"<{type(holder).__name__} of {setting.parameters.name}>"
        with pytest.raises(TypeError, match="never pickled"):
            holder.__reduce__()
