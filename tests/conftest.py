"""A test is skipped only because an extra isn't installed, and says which; with CI=true that is a failure.

Test modules that can't be imported without an extra start with `pytest.importorskip`; single tests carry
the extra's marker (`torch`, `he`, `paillier`). `make test-core` sets TESTS_WITHOUT=torch: what it
leaves out on purpose is no failure.
"""

import os
import signal
from collections.abc import Generator
from importlib.util import find_spec

import pytest

MODULES = {"torch": "torch", "he": "tenseal", "paillier": "phe"}
LEFT_OUT = frozenset(os.environ.get("TESTS_WITHOUT", "").split(",")) - {""}
STRICT = os.environ.get("CI") == "true"

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the processor: a thread pool of torch or a BLAS in each of them only gets in the way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what it puts in the background this way, and tests that press Ctrl-C would wait forever.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {extra for extra, module in MODULES.items() if find_spec(module) is None}
    for item in items:
        for extra in sorted(missing):
            if item.get_closest_marker(extra):
                item.add_marker(pytest.mark.skip(f"{extra} isn't installed: pip install 'blindsum[{extra}]'"))


def _may_skip(reason: str) -> bool:
    return not STRICT or any(extra in reason or MODULES.get(extra, extra) in reason for extra in LEFT_OUT)


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    return str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and not _may_skip(_reason(report)):
        report.longrepr = f"CI=true: a test may not be skipped. {_reason(report)}"
        report.outcome = "failed"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped and not _may_skip(_reason(report)):
        report.longrepr = f"CI=true: a test module may not be skipped. {_reason(report)}"
        report.outcome = "failed"
    return report
