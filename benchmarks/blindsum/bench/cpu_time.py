"""CPU seconds of a role: user + system of all its threads and of its child processes.

In a benchmark only one role of a process works at a time, so what the process uses meanwhile is that
role's. Garbage collection is off while a round runs, because one process holds all members' objects.
"""

import gc
import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from blindsum.client.frame_workers import worker_cpu_seconds


def process_cpu() -> float:
    """CPU seconds that this process, all of its threads, and its children used so far.

    Of the children that run, the frame workers of a member count, as of their last answers.
    """
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime + worker_cpu_seconds()


class StepClock:
    """CPU seconds by step of a round."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def running(self, step: str) -> Iterator[None]:
        """Charges what happens inside to `step`."""
        start = process_cpu()
        try:
            yield
        finally:
            self.seconds[step] += process_cpu() - start

    @property
    def total(self) -> float:
        """CPU seconds of all steps."""
        return sum(self.seconds.values())


@contextmanager
def without_collection() -> Iterator[None]:
    """No garbage collection inside."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
