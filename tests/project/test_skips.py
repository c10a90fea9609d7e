"""With CI=true a skipped test is a failed one, unless its extra was left out on purpose."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

SKIPS = """
import pytest

@pytest.mark.torch
def test_marked():
    pass

def test_says_why():
    pytest.skip("no browser")

def test_runs():
    pass
"""
NEEDS_A_MODULE = """
import pytest

pytest.importorskip("module_of_an_extra")
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    conftest = (Path(__file__).parents[1] / "conftest.py").read_text()
    # The inner suite has no torch, whatever this environment has.
    pytester.makeconftest(conftest.replace('"torch": "torch"', '"torch": "module_of_an_extra"'))
    pytester.makeini("[pytest]\nmarkers =\n    torch: needs torch\n")
    for name in ("CI", "TESTS_WITHOUT", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):
        monkeypatch.delenv(name, raising=False)
    return pytester


def test_people_without_an_extra_see_a_skip_that_names_it(suite: pytest.Pytester) -> None:
    suite.makepyfile(SKIPS)
    result = suite.runpytest_subprocess("-rs")
    result.assert_outcomes(passed=1, skipped=2)
    result.stdout.fnmatch_lines(["*torch isn't installed: pip install 'blindsum[[]torch]'*"])


def test_ci_fails_on_every_skip(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    suite.makepyfile(test_single=SKIPS)
    result = suite.runpytest_subprocess()
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    outcomes = result.parseoutcomes()
    assert outcomes.pop("passed") == 1
    assert sum(outcomes.values()) == 2
    assert "skipped" not in outcomes


def test_ci_fails_on_a_module_that_cannot_be_imported(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "true")
    suite.makepyfile(test_module=NEEDS_A_MODULE)
    assert suite.runpytest_subprocess().ret == pytest.ExitCode.INTERRUPTED


def test_what_is_left_out_on_purpose_may_be_skipped(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv("TESTS_WITHOUT", "torch")
    suite.makepyfile(
        test_single=SKIPS.replace('pytest.skip("no browser")', "pass"), test_module=NEEDS_A_MODULE
    )
    suite.runpytest_subprocess().assert_outcomes(passed=2, skipped=2)
