"""One worker process: SEAL's arithmetic, which may die on hostile input without taking the service along.

Started by `evaluation_workers`. Jobs come on standard input, answers go to standard output, both as parts
with lengths (`blindsum.aggregator.native_worker`); nothing is unpickled. A worker holds the tail and the
evaluation keys that were used last, and asks for others with MISS.
"""

import os
import resource
import sys
from collections import OrderedDict
from typing import BinaryIO

from blindsum.aggregator.native_worker import read_parts, write_parts
from blindsum.crypto.errors import BlindsumError, Refused
from blindsum.crypto.inference.evaluator import EvaluationKeys, TailEvaluator
from blindsum.crypto.inference.tail_model import TailModel


class _Bench:
    """The tail, and the evaluation keys used last."""

    def __init__(self, model: bytes, cached: int) -> None:
        self._evaluator = TailEvaluator(TailModel.from_bytes(model))
        self._cached = cached
        self._keys: OrderedDict[bytes, EvaluationKeys] = OrderedDict()

    def load(self, data: bytes) -> None:
        """Take evaluation keys; those unused for longest make room first."""
        while len(self._keys) >= self._cached:
            self._keys.popitem(last=False)
        keys = self._evaluator.load_keys(data)
        self._keys[keys.digest] = keys

    def evaluate(self, digest: bytes, frame: bytes) -> bytes | None:
        """The answer, or None without these keys."""
        keys = self._keys.get(digest)
        if keys is None:
            return None
        self._keys.move_to_end(digest)
        return self._evaluator.evaluate(keys, frame)


def _serve(jobs: BinaryIO, answers: BinaryIO) -> None:
    bench: _Bench | None = None
    while True:
        operation, parts = read_parts(jobs)
        kind, result = b"DONE", b""
        try:
            if operation == b"TAIL":
                bench = _Bench(parts[0], int.from_bytes(parts[1], "little"))
            elif operation == b"LOAD":
                assert bench is not None
                bench.load(parts[0])
            else:
                assert bench is not None
                answer = bench.evaluate(parts[0], parts[1])
                kind, result = (b"MISS", b"") if answer is None else (b"DONE", answer)
        except Refused as refusal:
            write_parts(answers, b"DENY", [refusal.reason.value.encode(), refusal.text.encode()])
        except (BlindsumError, ValueError) as error:
            write_parts(answers, b"FAIL", [str(error).encode()])
        else:
            write_parts(answers, kind, [result])


def main() -> None:
    """Work until standard input ends."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "wb")
    # Whatever a library prints must not get between the answers.
    os.dup2(2, 1)
    try:
        _serve(sys.stdin.buffer, answers)
    except EOFError:
        return


if __name__ == "__main__":
    main()
