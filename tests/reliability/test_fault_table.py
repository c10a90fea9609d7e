"""docs/reliability.md names a test for each fault, and each of those tests exists."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
ROW = re.compile(r"^\| (\d+) \|.*\|(.*)\|$", re.MULTILINE)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
FAULTS = {*range(1, 15), *range(40, 52)}


def table() -> dict[int, list[tuple[str, str]]]:
    """The tests of each fault, by its number."""
    return {int(number): TEST.findall(cells) for number, cells in ROW.findall(PAGE.read_text())}


def _tests_of(path: Path) -> set[str]:
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_")
    }


def test_every_fault_has_a_test() -> None:
    assert {number for number, tests in table().items() if tests} == FAULTS


def test_every_test_that_is_named_exists() -> None:
    named = {pair for tests in table().values() for pair in tests}
    missing = [
        f"{path}::{name}"
        for path, name in sorted(named)
        if not (ROOT / path).exists() or name not in _tests_of(ROOT / path)
    ]
    assert missing == []


def test_a_test_that_is_named_after_a_fault_is_in_its_row() -> None:
    rows = table()
    slow = {
        "test_fault_43_the_power_goes_after_every_change",
        "test_fault_43_killed_before_every_change_of_a_file",
    }
    slow |= {"test_fault_43_two_hundred_uploads_and_ten_kills"}
    for path in sorted((ROOT / "tests" / "reliability").glob("test_*.py")):
        for name in _tests_of(path):
            found = re.match(r"test_fault_(\d+)_", name)
            if found and name not in slow:
                assert (f"tests/reliability/{path.name}", name) in rows[int(found.group(1))], name
