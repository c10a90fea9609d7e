"""One masking round of a large cohort on this machine, as JSON: exact or not, and CPU by role.

    python tests/simulation/large_cohort.py 1000 10000

Every machine is real and every message is made, checked and added up. The members stand in as many
processes as there are cores, the aggregator in this one. Members live side by side only here, so those
of a process share one copy of the cohort's list, which each has checked before. CPU is that of the one
thread that a role works in; a member's runs from its float vector to its last message, opening the sum
not included.
"""

import gc
import json
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from blindsum.crypto.encoding.sum_check import PRIMES, SumCheck, join, split, tag_limbs
from blindsum.crypto.encoding.vector import summed_bits
from blindsum.crypto.schemes.base import Complaint, MemberRound, frame_digest, upload_digest
from blindsum.crypto.schemes.masking import scheme
from blindsum.crypto.schemes.masking.aggregator import MaskingAggregator
from blindsum.crypto.schemes.masking.cohort import Cohort
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


def own_bit(federation: Federation, index: int) -> NDArray[np.uint64]:
    """A power of two that no other member has: the sum shows who was counted, and how often."""
    stride = -(-len(federation.members) // BITS)
    values = np.zeros(PARAMETERS, dtype=np.uint64)
    values[index // BITS :: stride] = 1 << (index % BITS)
    return values


class _Members:
    """Some members of the round, in a process of their own."""

    def __init__(self, federation: Federation, d: RoundDriver) -> None:
        self._federation = federation
        self._machines = d.machines
        self._order = {name: index for index, name in enumerate(federation.members)}
        self._cohort: Cohort | None = None
        self._spent: dict[str, float] = {}

    def serve(self, line: Connection) -> None:
        """Answers commands until there is None."""
        while (command := line.recv()) is not None:
            name, *arguments = command
            line.send(getattr(self, name)(*arguments))

    def answer(self, name: str, step: Any, request: bytes) -> tuple[bytes, list[bytes]]:
        """A member's reply, and the frames of its upload."""
        start = time.thread_time()
        machine, frames = self._machines[name], []
        if step == "upload":
            reply, frames = self._upload(name, machine, request)
        else:
            reply = machine.answer(step, request)
        self._spent[name] = self._spent.get(name, 0.0) + time.thread_time() - start
        if step == "share" and isinstance(machine, MaskingMember):
            self._cohort = self._cohort or machine._cohort
            assert self._cohort is not None
            assert machine._known.members == self._cohort.members
            assert machine._known.leaves == self._cohort.leaves
            machine._cohort = self._cohort
        return reply, frames

    def seconds(self) -> dict[str, float]:
        """CPU seconds of each member."""
        return self._spent

    def checked(
        self, name: str, result: bytes, frames: Sequence[bytes], expected: NDArray[np.uint64]
    ) -> bool:
        """Whether a member opens exactly the survivors' sum, and the sum check holds."""
        opener = self._machines[name].open_sum(result)
        total = np.concatenate([opener.open(index, frame) for index, frame in enumerate(frames)])
        body, tags = total[:PARAMETERS], total[PARAMETERS:].reshape(2, -1)
        check = SumCheck(self._federation.keys[name].group_key.check_key(opener.h1))
        partial = check.partial(0, body, summed_bits(BITS, len(self._federation.members)))
        wanted = check.expected(opener.survivors, partial)
        holds = all(join(t.tolist(), BITS) % p == w for t, p, w in zip(tags, PRIMES, wanted, strict=True))
        return holds and bool((body == expected).all())

    def _upload(self, name: str, machine: MemberRound, request: bytes) -> tuple[bytes, list[bytes]]:
        protector = machine.begin_upload(request)
        assert not isinstance(protector, Complaint)
        check = SumCheck(self._federation.keys[name].group_key.check_key(protector.h1))
        body = own_bit(self._federation, self._order[name])
        tags = check.expected([name], check.partial(0, body, BITS))
        limbs = [limb for tag in tags for limb in split(tag, BITS, tag_limbs(BITS))]
        fields = np.concatenate([body, np.array(limbs, dtype=np.uint64)])
        layout = protector.layout
        frames = [protector.protect(i, fields[slice(*layout.field_range(i))]) for i in range(layout.frames)]
        return machine.seal_upload(upload_digest(protector.h1, map(frame_digest, frames))), frames


class _Shard:
    """The line to one process of members, used by one thread at a time."""

    def __init__(self, federation: Federation, d: RoundDriver, names: Sequence[str]) -> None:
        # Forked, so that it begins with the machines that are there already.
        context = multiprocessing.get_context("fork")
        self.names = names
        self._line, other = context.Pipe()
        self._process = context.Process(target=_Members(federation, d).serve, args=(other,))
        self._process.start()
        other.close()

    def call(self, *command: object) -> Any:
        """The answer to a command."""
        self._line.send(command)
        return self._line.recv()

    def stop(self) -> None:
        """Ends the process."""
        self._line.send(None)
        self._process.join()


class _Aggregator:
    """The aggregator's side: one thread at a time uses it."""

    def __init__(self, d: RoundDriver) -> None:
        self.d = d
        self.spent = 0.0
        self._lock = threading.Lock()

    def step_with(self, shard: _Shard, step: str, asked: frozenset[str]) -> None:
        """Play the open step with those members of a shard that are asked."""
        for name in shard.names:
            if name not in asked:
                continue
            with self._lock:
                start = time.thread_time()
                request = self.d.aggregator.request(name)
                self.spent += time.thread_time() - start
            reply, frames = shard.call("answer", name, step, request)
            with self._lock:
                start = time.thread_time()
                self.d.uploads[name] = frames
                self.d.deliver(name, reply)
                self.spent += time.thread_time() - start
                self.d.uploads.clear()
                self.d.history.clear()

    def close(self) -> None:
        """Close the open step."""
        start = time.thread_time()
        self.d.close()
        self.spent += time.thread_time() - start

    def published(self) -> list[bytes]:
        """The frames of the published sum."""
        start = time.thread_time()
        frames = self.d.published()
        self.spent += time.thread_time() - start
        return frames


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
    gone = frozenset(federation.members[::drop_every])
    survivors = [name for name in federation.members if name not in gone]
    count = len(os.sched_getaffinity(0))
    shards = [_Shard(federation, d, federation.members[at::count]) for at in range(count)]
    d.machines.clear()
    gc.collect()
    side = _Aggregator(d)
    with ThreadPoolExecutor(count) as threads:
        while (step := d.aggregator.step) is not None:
            asked = frozenset(d.aggregator.participants)
            if step in ("upload", "confirm", "reveal"):
                asked -= gone
            list(threads.map(lambda shard, s=step, a=asked: side.step_with(shard, s, a), shards))
            side.close()
    assert d.aggregator.abort is None, d.aggregator.abort
    assert list(d.aggregator.survivors) == survivors
    expected: NDArray[np.uint64] = np.zeros(PARAMETERS, dtype=np.uint64)
    for index, name in enumerate(federation.members):
        if name not in gone:
            expected += own_bit(federation, index)
    frames, result = side.published(), d.aggregator.result()
    exact = all(
        shards[federation.members.index(name) % count].call("checked", name, result, frames, expected)
        for name in (survivors[0], survivors[-1], min(gone))
    )
    spent = {name: cpu for shard in shards for name, cpu in shard.call("seconds").items()}
    for shard in shards:
        shard.stop()
    assert isinstance(d.aggregator, MaskingAggregator)
    cohort = d.aggregator._known
    of_survivors = [spent[name] for name in survivors]
    return LargeRound(
        members=members,
        parameters=PARAMETERS,
        neighbours=cohort.k,
        threshold=cohort.t,
        dropped=len(gone),
        exact=exact,
        member_cpu_s=round(statistics.median(of_survivors), 5),
        member_cpu_max_s=round(max(of_survivors), 5),
        aggregator_cpu_s=round(side.spent, 2),
        wall_s=round(time.monotonic() - started, 1),
    )


def main() -> None:
    """Plays the cohorts of the given sizes, smallest first."""
    for size in sorted(map(int, sys.argv[1:])):
        sys.stdout.write(json.dumps(asdict(play(size))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
