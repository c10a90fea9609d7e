"""The processes that the demo starts, each with JSON lines on its standard output, all ended at the end."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class Event:
    """One JSON line of a child, or its end: kind "exit" with its `code`."""

    child: str
    kind: str
    values: Mapping[str, Any]


class ChildFailed(RuntimeError):
    """A child ended on its own; the text holds the last lines of its log."""


class ChildProcesses:
    """Starts children, reads their events, and ends every one of them on exit.

    A child's standard error goes to `<name>/stderr.log` in `logs`. Children read commands from their standard
    input, and end when it is closed: so they end with the demo even if it is killed.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._children: dict[str, subprocess.Popen[str]] = {}
        self.events: queue.Queue[Event] = queue.Queue()

    def start(self, name: str, arguments: Sequence[str]) -> None:
        """Start `python -m arguments...` as the child `name`."""
        self.log(name).parent.mkdir(parents=True, exist_ok=True)
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with self.log(name).open("a", encoding="utf-8") as log:
            child = subprocess.Popen(  # noqa: S603
                [sys.executable, "-u", "-m", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env=os.environ | threads,
                # Its own session: Ctrl-C reaches the demo, which then ends its children in order.
                start_new_session=True,
            )
        self._children[name] = child
        threading.Thread(target=self._read, args=(name, child), daemon=True).start()

    def _read(self, name: str, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            try:
                values = json.loads(line)
                kind = values.pop("event")
            except (ValueError, KeyError, AttributeError):
                continue
            self.events.put(Event(name, kind, values))
        self.events.put(Event(name, "exit", {"code": child.wait()}))

    def log(self, name: str) -> Path:
        """Where a child's standard error goes."""
        return self._logs / name / "stderr.log"

    def alive(self, name: str) -> bool:
        """Whether the child still runs."""
        return self._children[name].poll() is None

    def tell(self, name: str, command: str) -> None:
        """Send one line to a child. A child that has ended is left alone; its exit event says so."""
        stdin = self._children[name].stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError):
            stdin.write(command + "\n")
            stdin.flush()

    def failure(self, name: str) -> ChildFailed:
        """What to raise when a child ended: its exit code and the end of its log."""
        log = self.log(name)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:] if log.exists() else []
        tail = "\n  ".join(lines)
        code = self._children[name].poll()
        return ChildFailed(f"{name} ended with code {code}; the end of {log}:\n  {tail}")

    def kill(self, name: str) -> None:
        """SIGKILL: what a power cut does to a child."""
        self._children[name].kill()
        self._children[name].wait()

    def end(self, name: str, patience: float = 10.0) -> None:
        """Ask a child to end, then make it."""
        child = self._children[name]
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(patience)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children.values():
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
        for name in self._children:
            self.end(name)
