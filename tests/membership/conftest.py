"""Whole federations with a real server; the server that lies is the one of the client's tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "client"))

from blindsum.client.pytest_plugin import blindsum_federation

__all__ = ["blindsum_federation"]
