"""What must hold for any bytes at an aggregator's and at a key holder's door: bfv, ckks and paillier.

Only typed refusals; `add` accepts what `check` accepts, and nothing else; a refusal leaves the running sum
alone; what a key holder opens is within what the contributions can add up to.
"""

import hashlib
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
CORPUS = HERE.parent / "crypto" / "homomorphic" / "corpus"
sys.path[:0] = [str(HERE), str(CORPUS.parent)]

from blindsum.crypto.errors import OpeningFailed, Refused  # noqa: E402
from blindsum.crypto.schemes.homomorphic.cipher import AggregatorCipher, aggregator_cipher  # noqa: E402
from he_mutations import mutate  # noqa: E402
from homomorphic_settings import Setting, make_setting  # noqa: E402
from make_corpus import CIPHERS  # noqa: E402


@cache
def corpus_aggregators() -> dict[str, tuple[AggregatorCipher, bytes]]:
    """An aggregator for each key of the corpus, with a good running sum."""
    found = {}
    for name, parameters in CIPHERS.items():
        aggregator = aggregator_cipher(parameters, (CORPUS / f"{name}.key").read_bytes())
        good = next(CORPUS.glob(f"{name}.added.*.bin")).read_bytes()
        found[name] = (aggregator, bytes(aggregator.add(None, good)))
    return found


@cache
def fresh(name: str) -> tuple[Setting, tuple[bytes, bytes], tuple[bytes, bytes]]:
    """A key of our own, two good uploads, and two good sums of one upload each."""
    setting = make_setting(CIPHERS[name])
    top = setting.parameters.largest_value
    left, right = (setting.member.encrypt(np.full(9, value, np.uint64)) for value in (1, top))
    sums = tuple(setting.aggregator.finish(setting.aggregator.add(None, frame)) for frame in (left, right))
    return setting, (left, right), (sums[0], sums[1])


def offer(aggregator: AggregatorCipher, running: bytes, frame: bytes) -> bool:
    """Whether the frame was accepted. Fails if `check` and `add` disagree or a refusal changes the sum."""
    total = bytearray(running)
    try:
        aggregator.check(frame)
    except Refused:
        with pytest.raises(Refused):
            aggregator.add(total, frame)
        assert total == running
        return False
    assert len(aggregator.finish(aggregator.add(total, frame))) == aggregator.parameters.result_frame_bytes
    return True


def open_sum(setting: Setting, frame: bytes) -> str:
    """'refused' by our parser, 'failed' behind it, or 'opened'."""
    count = setting.parameters.fields_per_frame
    try:
        opened = setting.member.decrypt(frame, count, 1)
    except Refused:
        return "refused"
    except OpeningFailed:
        return "failed"
    assert opened.size == count
    assert int(opened.max()) <= setting.parameters.largest_value
    return "opened"


def one_input(data: bytes) -> None:
    """What the fuzzer calls."""
    for aggregator, running in corpus_aggregators().values():
        offer(aggregator, running, data)
    generator = np.random.default_rng(np.frombuffer(hashlib.sha256(data).digest(), "<u4"))
    name = list(CIPHERS)[data[0] % len(CIPHERS)] if data else "bfv"
    setting, uploads, sums = fresh(name)
    running = bytes(setting.aggregator.add(None, uploads[0]))
    offer(setting.aggregator, running, mutate(setting.parameters, *uploads, generator, result=False))
    open_sum(setting, mutate(setting.parameters, *sums, generator, result=True))
