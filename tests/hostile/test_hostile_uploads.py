"""Hostile ciphertexts through the running server: correctly signed uploads of admitted members.

10,000 of them for each scheme: `pytest tests/hostile -m slow --timeout 3600 -s`.
"""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from blindsum.crypto.schemes.homomorphic.blake2xb import SEED_BYTES
from blindsum.crypto.schemes.homomorphic.cipher import (
    KEY_TAG_BYTES,
    choose_parameters,
    generate_keys,
    member_cipher,
)
from hostile_federation import ACCEPTED, HeFederation, build_he_federation
from server_process import ServerProcess

Build = Callable[..., HeFederation]


@pytest.fixture
def process(tmp_path: Path) -> Iterator[ServerProcess]:
    process = ServerProcess(
        tmp_path / "data", presence_grace=0.1, retry_pause=0.05, fold_batch=2, aborts_before_pause=1000
    )
    yield process
    process.close()


@pytest.fixture
def build(process: ServerProcess) -> Iterator[Build]:
    built = []

    def make(name: str, hostile: int = 3, honest: int = 3) -> HeFederation:
        built.append(build_he_federation(process, name, hostile, honest))
        return built[-1]

    yield make
    for federation in built:
        federation.close()


def assault(federation: HeFederation, attempts: int, each: int, poisoned: int, seed: int) -> str:
    """Rounds in turn, clean and poisoned, until that many hostile uploads were sent."""
    while federation.attempts < attempts:
        federation.clean_round(each, seed)
        for _ in range(poisoned):
            federation.poisoned_round(seed)
    return (
        f"{federation.name}: {federation.attempts} hostile uploads in {federation.number} rounds; "
        f"{federation.at_parser} reached the parser, {federation.past_parser} passed it, "
        f"{federation.added} were added; {dict(federation.outcomes)}; "
        f"{federation.honest_count} honest members in every sum, opened {dict(federation.openings)}"
    )


@pytest.mark.parametrize(("name", "attempts"), [("bfv", 120), ("ckks", 60), ("paillier", 60)])
def test_hostile_uploads_change_no_sum_and_stop_no_one(build: Build, name: str, attempts: int) -> None:
    """Each answer is what the parser says; the published sum is bit for bit that of the counted uploads.

    In rounds where nothing hostile was counted all members open the exact sum. Where valid ciphertext of
    nonsense was, honest members output nothing.
    """
    federation = build(name)
    assault(federation, attempts, each=attempts // 3, poisoned=1, seed=1)
    federation.clean_round(0, 0)
    assert federation.at_parser >= attempts // 2
    assert federation.past_parser >= attempts // 2
    assert federation.openings["opened"] >= 2 * federation.honest_count
    assert sum(federation.openings.values()) > federation.openings["opened"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attempts"), [("bfv", 10_000), ("ckks", 10_000), ("paillier", 10_000)])
def test_ten_thousand_hostile_uploads(
    build: Build, process: ServerProcess, name: str, attempts: int, capsys: pytest.CaptureFixture[str]
) -> None:
    federation = build(name, hostile=8)
    said = assault(federation, attempts, each=20, poisoned=3, seed=2)
    federation.clean_round(0, 0)
    peak = next(
        line
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    with capsys.disabled():
        sys.stdout.write(f"\n{said}; server's peak memory {peak.split(':')[1].strip()}\n")
    assert federation.at_parser >= attempts // 2
    assert federation.past_parser >= attempts // 2


def copied(frames: list[bytes], changed: int = 0) -> list[bytes]:
    """Somebody's frames with the seed of the first frame moved to the last, or as they are."""
    if not changed:
        return list(frames)
    seed = slice(KEY_TAG_BYTES, KEY_TAG_BYTES + SEED_BYTES)
    last = bytearray(frames[-1])
    last[seed] = frames[0][seed]
    return [*frames[:-1], bytes(last)]


@pytest.mark.parametrize("name", ["bfv", "ckks"])
def test_a_seed_seen_before_under_a_key_is_refused(build: Build, process: ServerProcess, name: str) -> None:
    """In the same upload, in the same round, in a later one, and after the server was killed."""
    federation = build(name, hostile=2)
    number = federation.open_round()
    copier, cloned = federation.hostile
    assert copier.offer(number, copied(copier.frames, changed=1)) == "replay"
    for member in federation.honest:
        member.upload_honestly(number)
    victim = federation.honest[0].frames
    assert copier.offer(number, copied(victim)) == "replay"
    # One seed in common is enough.
    assert copier.offer(number, [copier.frames[0], *victim[1:]]) == "replay"
    copier.upload_honestly(number)
    cloned.upload_honestly(number)
    federation.close_round()
    earlier = cloned.frames

    number = federation.open_round()
    assert cloned.offer(number, earlier) == "replay"
    process.kill()
    federation.connect(*process.start())
    for member in federation.members:
        member.until_asked("upload", number)
    assert cloned.offer(number, earlier) == "replay"
    for member in federation.members:
        member.upload_honestly(number)
    federation.close_round()
    assert federation.openings == {"opened": 2 * federation.honest_count}


def test_two_uploads_with_one_seed_at_the_same_time_count_once(build: Build) -> None:
    federation = build("bfv", hostile=2)
    number = federation.open_round()
    twins = federation.hostile
    with ThreadPoolExecutor(2) as threads:
        offers = [threads.submit(twin.offer, number, twins[0].frames) for twin in twins]
        outcomes = [offer.result() for offer in offers]
    assert sorted(outcomes) == [ACCEPTED, "replay"]
    first, late = (twins[outcomes.index(outcome)] for outcome in (ACCEPTED, "replay"))
    first.sent = twins[0].frames
    if late is twins[0]:
        # Its seeds are spent; it comes back with a fresh upload.
        late.start(number)
    late.upload_honestly(number)
    for member in federation.honest:
        member.upload_honestly(number)
    federation.close_round()
    assert federation.openings.total() == federation.honest_count


def test_a_copy_of_a_paillier_upload_is_found_by_the_sum_check(build: Build) -> None:
    """Paillier has no seeds; a copy in another's name is valid ciphertext, and no member opens the sum."""
    federation = build("paillier", hostile=1)
    number = federation.open_round()
    copier, victim = federation.hostile[0], federation.honest[0]
    for member in federation.honest:
        member.upload_honestly(number)
    assert copier.offer(number, copied(victim.frames)) == ACCEPTED
    copier.sent = copied(victim.frames)
    federation.close_round()
    assert federation.openings == {"SumCheckFailed": federation.honest_count}


@pytest.mark.parametrize("name", ["bfv", "paillier"])
def test_ciphertext_of_another_key_or_another_set_is_refused(build: Build, name: str) -> None:
    federation = build(name, hostile=1)
    number = federation.open_round()
    stranger = federation.hostile[0]
    parameters = federation.parameters
    others = generate_keys(parameters)
    foreign = member_cipher(parameters, others.public, others.secret).encrypt(np.ones(5, np.uint32))
    frames = stranger.frames
    assert stranger.offer(number, [foreign] * len(frames)) == "wrong_digest"
    other_set = choose_parameters(name, 12, 3, length=1, modulus_bits=2048, minimum_security=112)
    keys = generate_keys(other_set)
    small = member_cipher(other_set, keys.public, keys.secret).encrypt(np.ones(1, np.uint32))
    assert stranger.offer(number, [small] * len(frames)) in ("wrong_size", "wrong_digest")
    # Under our key's name it is ciphertext of noise: where it counts, the members output nothing.
    noise = [frame[:KEY_TAG_BYTES] + foreign[KEY_TAG_BYTES:] for frame in frames[:1]] + frames[1:]
    answer = stranger.offer(number, noise)
    if answer == ACCEPTED:
        stranger.sent = noise
    else:
        assert answer == "out_of_range"
        stranger.upload_honestly(number)
    for member in federation.honest:
        member.upload_honestly(number)
    federation.close_round()
    assert sum(federation.openings.values()) == federation.honest_count
    assert (federation.openings["opened"] == 0) is (answer == ACCEPTED)
