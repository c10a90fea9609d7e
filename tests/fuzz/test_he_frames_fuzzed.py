"""The corpus's outcomes, the fuzz target over the corpus, and 10,000 mutations (slow)."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "crypto" / "homomorphic"))

from blindsum.crypto.errors import Refused
from he_frame_target import CORPUS, corpus_aggregators, fresh, offer, one_input, open_sum
from he_mutations import mutate
from make_corpus import CIPHERS, corpus

FRAMES = sorted(path.name for path in CORPUS.glob("*.bin"))


def test_the_corpus_is_what_its_script_makes() -> None:
    kept = {path.name: path.read_bytes() for path in CORPUS.iterdir()}
    assert kept == dict(corpus())


@pytest.mark.parametrize("name", FRAMES)
def test_a_corpus_upload_ends_as_its_name_says(name: str) -> None:
    cipher, outcome, *_ = name.split(".")
    aggregator, running = corpus_aggregators()[cipher]
    frame = (CORPUS / name).read_bytes()
    assert offer(aggregator, running, frame) is (outcome == "added")
    if outcome == "added":
        return
    with pytest.raises(Refused) as refusal:
        aggregator.check(frame)
    assert refusal.value.reason == outcome


def test_the_fuzz_target_takes_the_corpus_and_noise() -> None:
    generator = np.random.default_rng(11)
    inputs = [(CORPUS / name).read_bytes() for name in FRAMES]
    for data in [*inputs, *(generator.bytes(int(generator.integers(0, 300))) for _ in range(60))]:
        one_input(data)


@pytest.mark.slow
@pytest.mark.parametrize("name", CIPHERS)
def test_ten_thousand_mutations_end_typed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Half of them uploads at the aggregator, half sums at a key holder; most get past the parser.

    The process that runs this is the one that would die.
    """
    setting, uploads, sums = fresh(name)
    running = bytes(setting.aggregator.add(None, uploads[0]))
    generator = np.random.default_rng(12)
    counts = {"added": 0, "kept out": 0, "refused": 0, "failed": 0, "opened": 0}
    for _ in range(5000):
        hostile = mutate(setting.parameters, *uploads, generator, result=False)
        counts["added" if offer(setting.aggregator, running, hostile) else "kept out"] += 1
        counts[open_sum(setting, mutate(setting.parameters, *sums, generator, result=True))] += 1
    with capsys.disabled():
        print(f"\n{name}: {counts}")
    assert sum(counts.values()) == 10_000
    assert counts["added"] >= 2500
    assert counts["failed"] + counts["opened"] >= 2500
    # After all that, a good sum still opens to its value.
    assert setting.member.decrypt(sums[0], 9, 1).tolist() == [1] * 9
