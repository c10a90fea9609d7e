"""One masking round of a large cohort in this process, as JSON: exact or not, and CPU by role.

    python tests/simulation/large_cohort.py 1000 10000

Every machine is real and every message is made, checked and added up. Members live side by side only
here, so they share one copy of the cohort's list, which each has checked before. CPU is the process's,
one thread; a member's runs from its float vector to its last message, opening the sum not included.
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from blindsum.crypto.encoding.sum_check import PRIMES, SumCheck, join, split, tag_limbs
from blindsum.crypto.encoding.vector import summed_bits
from blindsum.crypto.schemes.base import Complaint, MemberRound, frame_digest, upload_digest
from blindsum.crypto.schemes.masking import scheme
from blindsum.crypto.schemes.masking.member import MaskingMember
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent.parent / "crypto"))

from federation_driver import Federation, RoundDriver, make_federation

BITS = 12
PARAMETERS = 1_000
TAGS = 2 * tag_limbs(BITS)


@dataclass(frozen=True)
class LargeRound:
    """What a round of a large cohort gave and took."""

    members: int
    parameters: int
    neighbours: int
    threshold: int
    dropped: int
    exact: bool
    member_cpu_s: float
    member_cpu_max_s: float
    aggregator_cpu_s: float
    wall_s: float


class _Clock:
    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    @contextmanager
    def of(self, role: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.spent[role] = self.spent.get(role, 0.0) + time.process_time() - start


def own_bit(federation: Federation, index: int) -> NDArray[np.uint64]:
    """A power of two that no other member has: the sum shows who was counted, and how often."""
    stride = -(-len(federation.members) // BITS)
    values = np.zeros(PARAMETERS, dtype=np.uint64)
    values[index // BITS :: stride] = 1 << (index % BITS)
    return values


def play(members: int, drop_every: int = 50) -> LargeRound:
    """A round of `members` at (.05, .05), security 80; every `drop_every`th leaves before it uploads."""
    started = time.monotonic()
    federation = make_federation(
        scheme("masking"),
        members,
        fields=PARAMETERS + TAGS,
        bits=BITS,
        n_min=members // 2,
        n_max=members,
        gamma=50,
        delta=50,
    )
    d = RoundDriver(federation, {})
    clock = _Clock()
    gone = set(federation.members[::drop_every])
    order = {name: index for index, name in enumerate(federation.members)}
    cohort = None
    while d.aggregator.step is not None:
        step = d.aggregator.step
        for name in d.aggregator.participants:
            if step in ("upload", "confirm", "reveal") and name in gone:
                continue
            machine = d.machines[name]
            with clock.of("aggregator"):
                request = d.aggregator.request(name)
            with clock.of(name):
                if step == "upload":
                    reply = _upload(federation, d, machine, order[name], request)
                else:
                    reply = machine.answer(step, request)
            if step == "share" and isinstance(machine, MaskingMember):
                cohort = cohort or machine._cohort
                assert cohort is not None
                assert machine._known.members == cohort.members
                assert machine._known.leaves == cohort.leaves
                machine._cohort = cohort
            with clock.of("aggregator"):
                d.deliver(name, reply)
            d.uploads.clear()
            d.history.clear()
        with clock.of("aggregator"):
            d.close()
        gc.collect()
    assert d.aggregator.abort is None, d.aggregator.abort
    survivors = [name for name in federation.members if name not in gone]
    assert list(d.aggregator.survivors) == survivors
    expected: NDArray[np.uint64] = np.zeros(PARAMETERS, dtype=np.uint64)
    for name in survivors:
        expected += own_bit(federation, order[name])
    with clock.of("aggregator"):
        d.published()
    exact = all(_checked(federation, d, name, expected) for name in (survivors[0], survivors[-1], min(gone)))
    aggregator = clock.spent.pop("aggregator")
    spent = [clock.spent[name] for name in survivors]
    assert cohort is not None
    return LargeRound(
        members=members,
        parameters=PARAMETERS,
        neighbours=cohort.k,
        threshold=cohort.t,
        dropped=len(gone),
        exact=exact,
        member_cpu_s=round(statistics.median(spent), 5),
        member_cpu_max_s=round(max(spent), 5),
        aggregator_cpu_s=round(aggregator, 2),
        wall_s=round(time.monotonic() - started, 1),
    )


def _upload(
    federation: Federation, d: RoundDriver, machine: MemberRound, index: int, request: bytes
) -> bytes:
    protector = machine.begin_upload(request)
    assert not isinstance(protector, Complaint)
    name = federation.members[index]
    check = SumCheck(federation.keys[name].group_key.check_key(protector.h1))
    body = own_bit(federation, index)
    tags = check.expected([name], check.partial(0, body, BITS))
    limbs = [limb for tag in tags for limb in split(tag, BITS, tag_limbs(BITS))]
    fields = np.concatenate([body, np.array(limbs, dtype=np.uint64)])
    layout = protector.layout
    frames = [protector.protect(i, fields[slice(*layout.field_range(i))]) for i in range(layout.frames)]
    d.uploads[name] = frames
    return machine.seal_upload(upload_digest(protector.h1, map(frame_digest, frames)))


def _checked(federation: Federation, d: RoundDriver, name: str, expected: NDArray[np.uint64]) -> bool:
    """Whether this member opens exactly the survivors' sum, and the sum check holds."""
    opener = d.machines[name].open_sum(d.aggregator.result())
    total = np.concatenate([opener.open(i, frame) for i, frame in enumerate(d.published())])
    body, tags = total[:PARAMETERS], total[PARAMETERS:].reshape(2, -1)
    check = SumCheck(federation.keys[name].group_key.check_key(opener.h1))
    partial = check.partial(0, body, summed_bits(BITS, len(federation.members)))
    wanted = check.expected(opener.survivors, partial)
    holds = all(join(t.tolist(), BITS) % p == w for t, p, w in zip(tags, PRIMES, wanted, strict=True))
    return holds and bool((body == expected).all())


def main() -> None:
    """Plays the cohorts of the given sizes, smallest first."""
    for size in sorted(map(int, sys.argv[1:])):
        sys.stdout.write(json.dumps(asdict(play(size))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
