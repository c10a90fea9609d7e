"""The service's settings: typed, from a TOML file and BLINDSUM_* environment variables.

Unknown names and unsafe values are refused with the reason, before anything is opened or bound.
"""

import ipaddress
import os
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from blindsum.crypto.errors import BlindsumError
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

MIB = 1 << 20


class SettingsRefused(BlindsumError):
    """Settings with which the service would be unsafe or wouldn't work; the text says which and why."""


class AggregatorSettings(BaseSettings):
    """What an operator decides. Sizes in bytes, times in seconds unless the name says otherwise."""

    model_config = SettingsConfigDict(
        env_prefix="BLINDSUM_", extra="forbid", frozen=True, env_ignore_empty=True
    )

    data_dir: Path
    """Where keys of the transport authority, state and blobs live; only the service's user may read it."""
    owners: tuple[str, ...] = ()
    """Owner keys (64 hex digits) that may create a federation here."""
    allow_any_owner: bool = False
    """Let any owner key create a federation: only for a server that strangers can't reach."""
    host: str = "127.0.0.1"
    enrolment_port: int = Field(default=8470, ge=0, le=65535)
    member_port: int = Field(default=8471, ge=0, le=65535)
    server_names: tuple[str, ...] = ("localhost", "127.0.0.1")
    """DNS names and addresses that the server's certificate is for."""

    admin_port: int | None = Field(default=None, ge=0, le=65535)
    """Health, metrics and the operators' page over HTTP; 0 picks a port, none means no such port."""
    admin_host: str = "127.0.0.1"
    admin_token_file: Path | None = None
    """The token that the admin port asks for; `admin.token` in the data directory if none is named."""
    admin_behind_proxy: bool = False
    """A proxy that speaks TLS stands before the admin port, which may then listen beyond loopback."""
    member_certificate_days: int = Field(default=30, ge=1)
    server_certificate_days: int = Field(default=90, ge=2)

    presence_grace: float = Field(default=3.0, ge=0.05, le=600)
    """A member without a watch stream for so long is no longer waited for, if the quorum is there."""
    retry_pause: float = Field(default=1.0, ge=0.05, le=600)
    """Rest between an aborted round and the next attempt."""
    aborts_before_pause: int = Field(default=5, ge=1, le=1000)

    upload_slots: int = Field(default=64, ge=1, le=1024)
    stall_seconds: float = Field(default=20.0, ge=0.1, le=3600)
    """Window in which an upload has to move `upload_minimum_rate` x window bytes, or loses its slot."""
    upload_minimum_rate: int = Field(default=2048, ge=1)
    retry_after_ms: int = Field(default=500, ge=10, le=60_000)
    fold_batch: int = Field(default=16, ge=1, le=1024)
    """Accepted uploads that are added to the sum in one go."""
    disk_reserve: int = Field(default=256 * MIB, ge=0)
    """Bytes that must stay free on the disk; uploads beyond wait."""
    keep_rounds: int = Field(default=2, ge=1, le=1000)
    """Published sums and checkpoints of so many of the newest rounds are kept."""
    keep_days: float | None = Field(default=None, gt=0)
    """Of those, sums of rounds that ended longer ago go too; the newest training state always stays."""
    drain_seconds: float = Field(default=30.0, ge=0, le=3600)
    """On SIGTERM, running uploads get so long to end; nothing new is admitted meanwhile."""
    probe_seconds: float = Field(default=10.0, ge=0.05, le=3600)
    """How often a row and a blob are written to see whether the storage works."""
    retention_seconds: float = Field(default=3600.0, ge=0.05)
    """How often what retention no longer keeps is deleted."""

    message_limit: int = Field(default=1 * MIB, ge=512 * 1024, le=8 * MIB)
    enrolment_message_limit: int = Field(default=16 * MIB, ge=1 * MIB, le=64 * MIB)
    max_calls: int = Field(default=4096, ge=16)
    """Calls in progress on the members' listener, watch streams included."""
    max_enrolment_calls: int = Field(default=64, ge=4, le=1024)
    max_pending_joins: int = Field(default=1000, ge=1)
    native_workers: int = Field(default=1, ge=1, le=64)
    native_seconds: float = Field(default=60.0, gt=0, le=3600)

    capture_directory: Path | None = None
    """Record every message that the handlers receive and return: for privacy officers and tests."""
    log_level: str = "INFO"
    log_json: bool = True
    tracing: bool = False
    """OpenTelemetry spans of every call, to where the OTEL_* variables say; needs the extra `otel`."""

    @field_validator("owners")
    @classmethod
    def _owner_keys(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for key in value:
            if len(key) != 64 or any(c not in "0123456789abcdef" for c in key):
                raise ValueError("an owner key has 64 lower-case hex digits; `blindsum owner init` prints it")
        return value

    @field_validator("log_level")
    @classmethod
    def _known_level(cls, value: str) -> str:
        if value not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            raise ValueError("choose DEBUG, INFO, WARNING or ERROR")
        return value

    @field_validator("server_names")
    @classmethod
    def _some_name(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or any(not name.strip() or len(name) > 253 for name in value):
            raise ValueError("name at least one DNS name or address by which members reach the server")
        return value

    @model_validator(mode="after")
    def _safe(self) -> "AggregatorSettings":
        if not self.owners and not self.allow_any_owner:
            raise ValueError(
                "owners is empty: name the owner keys that may create a federation here (or set "
                "allow_any_owner = true on a server that strangers can't reach)"
            )
        if self.allow_any_owner and not _loopback(self.host):
            raise ValueError(f"allow_any_owner with host {self.host!r} would let strangers fill the disk")
        if self.enrolment_port == self.member_port != 0:
            raise ValueError("enrolment_port and member_port must differ: their TLS rules do")
        if self.admin_port and self.admin_port in (self.enrolment_port, self.member_port):
            raise ValueError("admin_port must be a port of its own: it isn't for members")
        if not _loopback(self.admin_host) and not self.admin_behind_proxy:
            raise ValueError(
                f"admin_host {self.admin_host!r} would send the admin token over the network in the clear; "
                "keep it on loopback, or put a proxy with TLS before it and set admin_behind_proxy = true"
            )
        if self.member_certificate_days > 90:
            raise ValueError(
                "member_certificate_days is above 90: there is no revocation list, so keep it short"
            )
        if self.server_certificate_days > 398:
            raise ValueError("server_certificate_days is above 398; renewals are automatic, keep it short")
        if self.upload_minimum_rate * self.stall_seconds < 64:
            raise ValueError(
                "upload_minimum_rate x stall_seconds is below 64 bytes: a stalled upload would hold its slot"
            )
        if not _loopback(self.host) and set(self.server_names) <= {"localhost", "127.0.0.1", "::1"}:
            raise ValueError(
                f"host is {self.host!r} but server_names only has loopback names: no member could connect; "
                "add the name members use"
            )
        return self


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load_settings(file: Path | None = None, **overrides: Any) -> AggregatorSettings:
    """Settings from overrides, then the environment, then a TOML file.

    Raises `SettingsRefused` naming each setting at fault.
    """
    values = _read(file)
    unknown = sorted(set(values) | set(overrides))
    unknown = [name for name in unknown if name not in AggregatorSettings.model_fields]
    unknown += _unknown_environment()
    if unknown:
        raise SettingsRefused(f"unknown settings: {', '.join(unknown)}; check the spelling")
    for name in list(values):
        if _environment_name(name) in _environment():
            del values[name]
    try:
        return AggregatorSettings(**{**values, **overrides})
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            place = ".".join(str(part) for part in problem["loc"]) or "settings"
            lines.append(f"{place}: {problem['msg'].removeprefix('Value error, ')}")
        raise SettingsRefused("; ".join(lines)) from None
    except SettingsError as error:
        raise SettingsRefused(
            f'{error}: in the environment a list is written as JSON, such as ["a", "b"]'
        ) from None


def data_directory(file: Path | None, data: Path | None) -> Path:
    """The data directory that an option, the environment or a settings file names.

    For commands that need nothing else: the other settings aren't looked at. Raises `SettingsRefused`.
    """
    named = data or _environment().get("BLINDSUM_DATA_DIR") or _read(file).get("data_dir")
    if not isinstance(named, (str, Path)) or not named:
        raise SettingsRefused("name the server's data directory with --data, or its settings with --config")
    return Path(named)


def _read(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsRefused(f"{file}: can't be read as TOML: {error}") from None


def sample_settings() -> str:
    """A commented settings file with every setting and its default."""
    return resources.files("blindsum.aggregator").joinpath("sample_settings.toml").read_text("utf-8")


def _environment() -> dict[str, str]:

    return {name.upper(): value for name, value in os.environ.items() if name.upper().startswith("BLINDSUM_")}


def _environment_name(name: str) -> str:
    return f"BLINDSUM_{name.upper()}"


def _unknown_environment() -> list[str]:
    known = {_environment_name(name) for name in AggregatorSettings.model_fields}
    return sorted(set(_environment()) - known)
