"""Makes `federation_driver` of tests/crypto and the modules beside this one importable by these tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "crypto"))
