"""Flower's SecAgg+ as the peer: an environment of its own, made once and kept, and a round in it."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

from blindsum.bench.federation_round import Progress
from blindsum.bench.federation_setup import Work
from blindsum.crypto.errors import BlindsumError, ParameterRefused
from blindsum.crypto.schemes.masking.thresholds import COMPLETE_UP_TO, thresholds

PACKAGE = "flwr==1.41.0"
_WORK = Path(__file__).with_name("flower_work.py")


class PeerFailed(BlindsumError):
    """The peer couldn't be installed or run. The text says why."""


def default_cache() -> Path:
    """Where environments of peers are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blindsum" / "bench"


def prepare(cache: Path, progress: Progress) -> Path:
    """The Python of an environment below `cache` that has `PACKAGE`. Raises `PeerFailed`."""
    folder = cache / f"{PACKAGE.replace('==', '-')}-py{sys.version_info[0]}.{sys.version_info[1]}"
    python = folder / "bin" / "python"
    if python.exists():
        return python
    progress(f"installing {PACKAGE}", 0, 1)
    cache.mkdir(parents=True, exist_ok=True)
    # Whoever is interrupted leaves no half-made environment under the name that is looked for; scripts of
    # the environment name its place, so it is used through its Python only.
    draft = Path(tempfile.mkdtemp(prefix="draft-", dir=cache))
    try:
        venv.create(draft, with_pip=True, symlinks=True)
        install = [str(draft / "bin" / "python"), "-m", "pip", "install", "--quiet", PACKAGE]
        done = subprocess.run(install, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PeerFailed(f"pip can't install {PACKAGE}: {done.stderr.strip()[-500:]}")
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return python


def measure(python: Path, work: Work) -> dict[str, Any]:
    """One round of the same work. Raises `PeerFailed`, `ParameterRefused` above `COMPLETE_UP_TO` members."""
    if work.members > COMPLETE_UP_TO:
        raise ParameterRefused(f"the peer runs all-to-all, up to {COMPLETE_UP_TO} members; leave out --peer")
    limits = thresholds(work.members, work.gamma, work.delta, work.security)
    told = {
        "members": work.members,
        "dim": work.dimension,
        "bits": work.bits,
        "dropped": work.dropped,
        "shares": limits.shares,
    }
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["FLWR_TELEMETRY_ENABLED"] = "0"
    done = subprocess.run(
        [python, _WORK, json.dumps(told)], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise PeerFailed(f"Flower's SecAgg+ failed: {done.stderr.strip()[-1000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures
