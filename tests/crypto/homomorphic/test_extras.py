"""What is needed where: an aggregator of bfv and ckks needs no extra, a key holder is told which one."""

import os
import subprocess
import sys

import pytest
from blindsum.crypto.errors import MissingExtra, UnsupportedPlatform
from blindsum.crypto.schemes.homomorphic import paillier
from blindsum.crypto.schemes.homomorphic.cipher import choose_parameters, generate_keys, member_cipher

AGGREGATE = """
import sys
from blindsum.crypto.schemes.homomorphic.cipher import aggregator_cipher, restore_parameters
name, public, frame = sys.argv[1], bytes.fromhex(sys.stdin.readline()), bytes.fromhex(sys.stdin.readline())
aggregator = aggregator_cipher(restore_parameters(name, 16, 7), public)
aggregator.finish(aggregator.add(aggregator.add(None, frame), frame))
print(sorted({"tenseal", "phe", "gmpy2", "zstandard"} & set(sys.modules)))
"""


@pytest.mark.parametrize("scheme", ["bfv", "ckks"])
def test_the_aggregator_loads_no_native_library(scheme: str) -> None:
    parameters = choose_parameters(scheme, 16, 7, length=1)
    keys = generate_keys(parameters)
    frame = bytearray(parameters.upload_frame_bytes)
    frame[:16] = keys.key_id[:16]
    ended = subprocess.run(
        [sys.executable, "-c", AGGREGATE, parameters.name],
        input=f"{keys.public.hex()}\n{frame.hex()}\n",
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.stdout == "[]\n", ended.stderr


@pytest.mark.parametrize("module", ["tenseal.sealapi", "zstandard"])
def test_a_key_holder_without_the_extra_is_told_its_name(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = choose_parameters("bfv", 16, 7, length=1)
    keys = generate_keys(parameters)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=r"blindsum\[he\]"):
        member_cipher(parameters, keys.public, keys.secret)


def test_a_key_holder_without_memory_files_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = choose_parameters("bfv", 16, 7, form="public-key", length=1)
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(UnsupportedPlatform, match="Linux"):
        generate_keys(parameters)


def test_paillier_without_the_extra_is_told_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = choose_parameters("paillier", 16, 7, length=1)
    monkeypatch.setattr(paillier, "gmpy2", None)
    with pytest.raises(MissingExtra, match=r"blindsum\[paillier\]"):
        generate_keys(parameters)
