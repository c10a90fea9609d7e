"""Fuzz target: bytes at an aggregator's and at a key holder's door, for bfv, ckks and paillier.

With atheris (`pip install atheris`; Linux, wheels for Python 3.11 to 3.13), from the repository's root:

    mkdir -p fuzzing && python tests/fuzz/fuzz_he_frames.py fuzzing tests/crypto/homomorphic/corpus \\
        -max_total_time=300 -max_len=40000 -rss_limit_mb=2048

`fuzzing` receives the inputs that reached something new; the corpus is only read. A crash leaves its
input as crash-*; run the target with that file alone to see it again.

An input is used twice: as an upload, as it is, under each corpus key; and as the seed of mutations of
good uploads and sums, which get past the parser (he_mutations.py).
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["blindsum"]):
    sys.path.insert(0, str(Path(__file__).parent))
    from he_frame_target import one_input

if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
