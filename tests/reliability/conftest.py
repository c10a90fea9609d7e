"""Makes the modules beside this one, and those of tests/aggregator and tests/crypto, importable."""

import sys
from pathlib import Path

for folder in ("crypto", "aggregator"):
    sys.path.append(str(Path(__file__).parent.parent / folder))
