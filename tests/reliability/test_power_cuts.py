"""A power cut at any moment, with any of what wasn't synced lost: every acknowledgement is still there.

A run is recorded once, from the first start on an empty disk through the rounds of a federation. Then the
power goes after every so many changes of files, and the server has to come back with all that the outside
world knew of until then (faults.md 43). Without any single one of its syncs it doesn't.
"""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from blindsum.aggregator import transport_authority
from blindsum.aggregator.store import file_blobs, sqlite_state
from blindsum.crypto.errors import BlindsumError
from federation_world import Broken, Template, World
from recorded_files import SQLITE, RecordedFiles, fresh

KEEP = (0.0, 0.4, 0.8)
"""How much of what wasn't synced survives: nothing, some, most. All of it is a killed process."""


class Run:
    """What a server did to its files, and who was in its federation."""

    def __init__(self, folder: Path, rounds: int = 2) -> None:
        world = World(folder)
        # SQLite moves its log into the database every thousand pages, which so short a run never reaches.
        world.server.store._writer.execute("PRAGMA wal_autocheckpoint = 12")
        self.ready: Template = world.found()
        for _ in range(rounds):
            world.settle()
        world.kill()
        self.files: RecordedFiles = world.files
        self.lines = len(self.files.log)
        world.close()

    def known_moments(self) -> list[int]:
        """How long the log is each time after the outside world learnt something."""
        return [i + 1 for i, change in enumerate(self.files.log) if change.kind == "acknowledged"]

    def comes_back(self, folder: Path, until: int, keep: float, seed: int = 0, without: str = "") -> None:
        """The power goes after `until` lines. Raises unless everything known by then is there again."""
        home = fresh(folder / "machine")
        self.files.power_cut(home, until=until, keep=keep, seed=seed, without=without)
        world = World(folder, ready=self.ready, home=home, start=False)
        try:
            world.recount(self.files.acknowledgements(until))
            world.start()
        finally:
            world.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("run"))


def test_fault_43_the_power_goes_at_any_moment(run: Run, tmp_path: Path) -> None:
    """Some hundred moments, all through the run, each with another choice of what is lost."""
    moments = [*range(1, run.lines, max(1, run.lines // 60)), run.lines]
    for number, until in enumerate(moments):
        run.comes_back(tmp_path, until, KEEP[number % 3], seed=number)
    # The moments of the greatest promises: an acknowledgement has just left, and nothing unsynced stays.
    for until in run.known_moments()[::4]:
        run.comes_back(tmp_path, until, 0.0)


@pytest.mark.slow
def test_fault_43_the_power_goes_after_every_change(run: Run, tmp_path: Path) -> None:
    """Every single moment, with everything unsynced lost and with four choices of what is."""
    for until in range(1, run.lines + 1):
        run.comes_back(tmp_path, until, 0.0)
        for seed in range(4):
            run.comes_back(tmp_path, until, KEEP[1 + seed % 2], seed=4 * until + seed)


def test_a_killed_process_loses_nothing_that_it_wrote(run: Run, tmp_path: Path) -> None:
    for until in range(1, run.lines, max(1, run.lines // 25)):
        run.comes_back(tmp_path, until, 1.0)


# Every sync is needed


def _calls(module: ModuleType) -> Iterator[str]:
    """Where a module asks for a sync, as the recorder names it: `file:line`."""
    source = Path(inspect.getfile(module))
    for outer in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if not isinstance(outer, ast.FunctionDef) or outer.name == "sync_directory":
            continue
        for node in ast.walk(outer):
            if isinstance(node, ast.Call):
                name = (
                    node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                )
                if name in ("fsync", "fdatasync", "sync_directory"):
                    yield f"{source.name}:{node.lineno}"


SITES = sorted({*_calls(file_blobs), *_calls(transport_authority)})
SQLITE_SITES = [f"{SQLITE} wal", f"{SQLITE} database"]


def _is_missed(run: Run, folder: Path, site: str) -> bool:
    """Whether something known is gone after some power cut, if the syncs of a site had never happened."""
    moments = run.known_moments()
    for until in [*moments[-1:], *moments[:: max(1, len(moments) // 40)]]:
        for keep in (0.0, 0.4):
            try:
                run.comes_back(folder, until, keep, seed=until, without=site)
            except (Broken, BlindsumError, OSError, ValueError):
                return True
    return False


def test_the_run_reaches_every_sync_in_the_source(run: Run) -> None:
    assert set(SITES) | set(SQLITE_SITES) <= run.files.sites()
    assert len(SITES) >= 7


@pytest.mark.parametrize("site", [*SITES, *SQLITE_SITES])
def test_without_any_single_sync_something_is_lost(run: Run, tmp_path: Path, site: str) -> None:
    assert _is_missed(run, tmp_path, site)


def test_a_weaker_setting_of_the_database_loses_acknowledgements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`synchronous=FULL` is what makes SQLite sync its log at each commit."""
    connect = sqlite_state.SqliteState._connect

    def weaker(self: sqlite_state.SqliteState) -> object:
        connection = connect(self)
        connection.execute("PRAGMA synchronous = NORMAL")
        return connection

    with monkeypatch.context() as patch:
        patch.setattr(sqlite_state.SqliteState, "_connect", weaker)
        folder = tmp_path / "weak"
        folder.mkdir()
        weak = Run(folder, rounds=1)
    assert _is_missed(weak, tmp_path, "")
