"""The committed sample: every setting with its real default, accepted by the server as it is."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from blindsum.aggregator.settings import (
    AggregatorSettings,
    SettingsRefused,
    data_directory,
    load_settings,
    sample_settings,
)

OWNER = "ab" * 32
NOT_DEFAULTS = {"data_dir", "owners", "admin_port", "admin_token_file", "keep_days", "capture_directory"}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("BLINDSUM_"):
            monkeypatch.delenv(name)


def uncommented() -> dict[str, Any]:
    return tomllib.loads(re.sub(r"^# (?=[a-z_]+ = )", "", sample_settings(), flags=re.MULTILINE))


def test_every_setting_is_in_it_with_its_default() -> None:
    sample = uncommented()
    fields = AggregatorSettings.model_fields
    assert set(sample) == set(fields)
    for name in set(fields) - NOT_DEFAULTS:
        default = fields[name].default
        assert sample[name] == (list(default) if isinstance(default, tuple) else default), name


def test_each_setting_is_explained() -> None:
    lines = sample_settings().splitlines()
    for position, line in enumerate(lines):
        if re.match(r"(# )?[a-z_]+ = ", line):
            # A comment stands before it, or before the group of settings that it is in.
            above = lines[:position]
            while re.match(r"(# )?[a-z_]+ = ", above[-1]):
                above.pop()
            assert above[-1].startswith("# "), line


def test_the_server_takes_it_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "aggregator.toml"
    done = subprocess.run(
        [sys.executable, "-m", "blindsum.aggregator.commands", "--print-sample-settings"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == sample_settings()
    file.write_text(done.stdout.replace("0" * 64, OWNER))
    settings = load_settings(file)
    assert settings.admin_port == 8472
    assert settings.owners == (OWNER,)
    assert data_directory(file, None) == settings.data_dir
    # With every line uncommented too, but for a server beyond loopback.
    whole = re.sub(r"^# (?=[a-z_]+ = )", "", done.stdout, flags=re.MULTILINE)
    file.write_text(whole.replace("0" * 64, OWNER))
    assert load_settings(file).keep_days == 30


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"admin_host": "0.0.0.0"}, "in the clear"),
        ({"admin_host": "aggregator.example.org"}, "in the clear"),
        ({"admin_port": 8471}, "port of its own"),
        ({"admin_port": 70_000}, "admin_port"),
        ({"keep_days": 0}, "keep_days"),
        ({"keep_days": -1}, "keep_days"),
        ({"keep_rounds": 0}, "keep_rounds"),
        ({"drain_seconds": -1}, "drain_seconds"),
        ({"probe_seconds": 0}, "probe_seconds"),
        ({"tracing": "perhaps"}, "tracing"),
        ({"admin_user": "me"}, "unknown settings: admin_user"),
    ],
)
def test_unsafe_values_of_operations_are_refused(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingsRefused, match=text):
        load_settings(None, **{"data_dir": tmp_path, "owners": (OWNER,), **changes})


def test_a_proxy_may_stand_before_the_admin_port(tmp_path: Path) -> None:
    values = {"data_dir": tmp_path, "owners": (OWNER,), "admin_host": "0.0.0.0", "admin_behind_proxy": True}
    assert load_settings(None, **values).admin_host == "0.0.0.0"


def test_the_environment_alone_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BLINDSUM_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("BLINDSUM_OWNERS", f'["{OWNER}"]')
    monkeypatch.setenv("BLINDSUM_ADMIN_PORT", "9000")
    monkeypatch.setenv("BLINDSUM_KEEP_DAYS", "2.5")
    settings = load_settings()
    assert (settings.admin_port, settings.keep_days, settings.owners) == (9000, 2.5, (OWNER,))
    assert data_directory(None, None) == tmp_path
    monkeypatch.setenv("BLINDSUM_OWNERS", OWNER)
    with pytest.raises(SettingsRefused, match=r"owners.*JSON"):
        load_settings()


def test_a_data_directory_must_be_named() -> None:
    with pytest.raises(SettingsRefused, match="--data"):
        data_directory(None, None)
