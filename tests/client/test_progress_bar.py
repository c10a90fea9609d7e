"""What somebody sees who runs a member on a terminal."""

import os
import pty
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from blindsum.client.testing import Federation, small_model

APP = "def train(rnd):\n    return dict(rnd.weights()), 1, {}\n"


def test_a_member_shows_its_upload_on_a_terminal(
    blindsum_federation: Callable[..., Federation], tmp_path: Path
) -> None:
    federation = blindsum_federation(3, model=small_model(), rounds=1)
    (tmp_path / "mine.py").write_text(APP)
    shown = threading.Event()

    def take_part(name: str) -> None:
        with federation.open(name) as member:
            for rnd in member.rounds():
                # Until then the first member has sent its upload and waits for this one.
                shown.wait(60)
                rnd.submit(dict(rnd.weights()), examples=1)

    first, *others = federation.names
    threads = [threading.Thread(target=take_part, args=(name,)) for name in others]
    for thread in threads:
        thread.start()
    screen, terminal = pty.openpty()
    command = [sys.executable, "-m", "blindsum.cli", "member", "run", str(federation.path(first))]
    with subprocess.Popen(
        [*command, "--app", "mine:train"],
        cwd=tmp_path,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"},
    ) as process:
        os.close(terminal)
        seen = b""
        while True:
            try:
                part = os.read(screen, 65536)
            except OSError:
                # A terminal ends with an error once nobody writes to it.
                break
            if not part:
                break
            seen += part
            if b"upload" in seen:
                shown.set()
        shown.set()
        assert process.wait(60) == 0, seen.decode(errors="replace")
    os.close(screen)
    for thread in threads:
        thread.join(60)
    text = seen.decode(errors="replace")
    assert "upload" in text
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in text
    assert "round 1/1: 3 members" in text
    assert "The plan is finished." in text
