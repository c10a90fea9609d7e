"""What runs in the child processes: the server's own command, and a small app on the public SDK.

A child tells its parent what it does through a pipe, and ends when the parent's end of it closes.
"""

import os
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from blindsum.aggregator import commands
from blindsum.client import Member, Patience, Round

Array = np.ndarray[Any, Any]


class _Pipe:
    """Standard output of the server: `--ready-file -` writes there."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._text = ""

    def write(self, text: str) -> None:
        self._text += text

    def flush(self) -> None:
        self._connection.send(self._text)


def serve(connection: Connection, arguments: list[str], log: Path) -> None:
    """`blindsum serve` with these arguments; its log goes to a file."""
    _end_with_parent(connection)
    sys.stderr = log.open("a", buffering=1)
    sys.stdout = _Pipe(connection)
    sys.argv = ["blindsum serve", *arguments, "--ready-file", "-"]
    commands.main()


def _end_with_parent(connection: Connection, order: Any = None) -> None:
    def listen() -> None:
        try:
            while True:
                said = connection.recv()
                if order is not None:
                    order(said)
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=listen, daemon=True).start()


def point_of(phase: str, done: int, total: int) -> str:
    """The place in a round that a progress report stands for; empty if it is none where a test stops."""
    if phase in ("advertise", "share", "confirm", "reveal", "conclude"):
        # Reports of the SDK's own work carry no counts: the reply is durable, and hasn't been sent.
        return f"{phase} made" if total == 0 else ""
    if phase in ("protect", "upload", "open", "checkpoint"):
        if phase == "upload" and done == 0:
            return "upload begun"
        return f"{phase} sent" if done == total else f"{phase} half"
    return phase


def add_update(flat: Array, member: str, index: int) -> None:
    """Train: add to the weights what is smooth, the member's own, another each round; in little memory."""
    number = int(member.rpartition("-")[2])
    for start in range(0, flat.size, 65_536):
        part = flat[start : start + 65_536]
        steps = np.arange(start, start + part.size, dtype=np.float32)
        part += np.sin(steps / np.float32(7 + number)) * np.float32(0.03 * index)


class App:
    """A member's app: trains in no time, and stops where it is told to."""

    def __init__(self, connection: Connection, folder: Path, options: Mapping[str, Any]) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._stops: dict[int, str] = dict(options.get("stops", {}))
        self._go = threading.Semaphore(0)
        _end_with_parent(connection, lambda _: self._go.release())
        self._member = Member.open(
            folder,
            on_progress=self._progress,
            witness=options.get("witness", True),
            patience=Patience(total=60.0, longest=0.5),
        )

    def _tell(self, *what: Any) -> None:
        with self._sending:
            self._connection.send(what)

    def _progress(self, phase: str, done: int, total: int) -> None:
        number = self._member.last_round
        self._tell("progress", number, phase, done, total)
        self._maybe_stop(number, point_of(phase, done, total))

    def _maybe_stop(self, number: int, point: str) -> None:
        if point and self._stops.get(number) == point:
            del self._stops[number]
            self._tell("stopped", number, point)
            self._go.acquire()

    def run(self) -> None:
        """All rounds of the plan."""
        with self._member as member:
            self._tell("open")
            for rnd in member.rounds():
                with rnd:
                    self._take_part(rnd)
        self._tell("done")

    def _take_part(self, rnd: Round) -> None:
        self._tell("offered", rnd.number)
        self._maybe_stop(rnd.number, "training")
        weights = rnd.weights()
        name = next(iter(weights))
        flat = weights.pop(name).reshape(-1)
        add_update(flat, self._member.name, rnd.index)
        receipt = rnd.submit({name: flat}, examples=10 * rnd.index, metrics={"loss": 1 / rnd.index})
        self._tell("receipt", receipt.round, receipt.survivors)


def take_part(connection: Connection, folder: Path, options: Mapping[str, Any]) -> None:
    """Run the app in a member's folder until the plan is finished."""
    try:
        App(connection, folder, options).run()
    except Exception as error:
        connection.send(("failed", type(error).__name__, str(error)))
