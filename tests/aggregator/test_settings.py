"""Settings: from file and environment; unknown names and unsafe values are refused with the reason."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from blindsum.aggregator.embedding import AggregatorServer, serve_in_thread
from blindsum.aggregator.settings import SettingsRefused, load_settings
from blindsum.aggregator.store.state import StorageFailed
from blindsum.crypto.errors import BlindsumError
from scripted_federation import settings_for

KEY = "ab" * 32


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("BLINDSUM_"):
            monkeypatch.delenv(name)


def test_options_win_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "aggregator.toml"
    file.write_text(
        f'data_dir = "here"\nowners = ["{KEY}"]\nupload_slots = 3\nfold_batch = 4\nmember_port = 5\n'
    )
    monkeypatch.setenv("BLINDSUM_FOLD_BATCH", "40")
    monkeypatch.setenv("BLINDSUM_MEMBER_PORT", "50")
    settings = load_settings(file, member_port=500)
    assert (settings.upload_slots, settings.fold_batch, settings.member_port) == (3, 40, 500)
    assert settings.owners == (KEY,)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"owners": ()}, "owners is empty"),
        ({"owners": ("xyz",)}, "64 lower-case hex digits"),
        ({"n_min": 1}, "unknown settings: n_min"),
        ({"allow_any_owner": True, "host": "0.0.0.0", "server_names": ("a.example",)}, "strangers"),
        ({"host": "0.0.0.0"}, "server_names"),
        ({"host": "10.0.0.1", "server_names": ()}, "at least one DNS name"),
        ({"enrolment_port": 9000, "member_port": 9000}, "must differ"),
        ({"enrolment_port": 70_000}, "enrolment_port"),
        ({"member_certificate_days": 365}, "no revocation list"),
        ({"server_certificate_days": 3650}, "398"),
        ({"upload_minimum_rate": 1, "stall_seconds": 1}, "stalled upload"),
        ({"upload_slots": 0}, "upload_slots"),
        ({"presence_grace": 0}, "presence_grace"),
        ({"log_level": "LOUD"}, "DEBUG"),
        ({"message_limit": 1 << 30}, "message_limit"),
        ({"plaintext": True}, "unknown settings: plaintext"),
    ],
)
def test_unsafe_values_are_refused_with_the_reason(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(SettingsRefused, match=text):
        load_settings(None, **{"data_dir": tmp_path, "owners": (KEY,), **changes})


def test_unknown_names_in_file_and_environment_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "aggregator.toml"
    file.write_text(f'data_dir = "here"\nowners = ["{KEY}"]\nupload_slot = 3\n')
    with pytest.raises(SettingsRefused, match="upload_slot"):
        load_settings(file)
    monkeypatch.setenv("BLINDSUM_FOLD_BACH", "40")
    with pytest.raises(SettingsRefused, match="BLINDSUM_FOLD_BACH"):
        load_settings(None, data_dir=tmp_path, owners=(KEY,))


def test_a_file_that_isnt_toml_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "aggregator.toml"
    file.write_text("upload_slots: 3")
    with pytest.raises(SettingsRefused, match="can't be read as TOML"):
        load_settings(file)


def test_the_command_refuses_to_start_and_says_why(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "blindsum.aggregator.commands", "--data", str(tmp_path / "data")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "owners is empty" in done.stderr
    assert not (tmp_path / "data").exists()


def test_a_directory_that_others_may_read_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(StorageFailed, match="chmod 700"):
        serve_in_thread(settings_for(tmp_path))


def test_a_port_that_is_taken_is_refused(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with (
        serve_in_thread(settings_for(first)) as handle,
        pytest.raises(BlindsumError, match="can't be bound"),
    ):
        serve_in_thread(settings_for(second, member_port=handle.member_port))


def test_an_old_state_with_a_newer_server_isnt_guessed_at(tmp_path: Path) -> None:
    (tmp_path / "state.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(StorageFailed, match=r"state\.sqlite"):
        serve_in_thread(settings_for(tmp_path), AggregatorServer)
