"""The inference service's settings: typed, from a TOML file and BLINDSUM_INFER_* environment variables."""

import tomllib
from pathlib import Path
from typing import Annotated, Any

from blindsum.aggregator.settings import SettingsRefused
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict


class InferenceSettings(BaseSettings):
    """What an operator decides. Sizes in bytes, times in seconds unless the name says otherwise."""

    model_config = SettingsConfigDict(
        env_prefix="BLINDSUM_INFER_", extra="forbid", frozen=True, env_ignore_empty=True
    )

    data_dir: Path
    """Where the transport authority, evaluation keys and counts live; only the service's user may read it."""
    tail: Path
    """The exported tail, in the clear: it is the operator's own."""
    client_ca: Path | None = None
    """PEM of the authority that issued members' certificates; by default the service's own."""
    host: str = "127.0.0.1"
    port: int = Field(default=8472, ge=0, le=65535)
    server_names: tuple[str, ...] = ("localhost", "127.0.0.1")
    server_certificate_days: int = Field(default=90, ge=2, le=398)
    federations: tuple[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], ...] = ()
    """Federations whose members are served, in hexadecimal; all whose members `client_ca` certifies if empty:
    an aggregator's authority certifies those of each of its owners.
    """
    refused_members: tuple[str, ...] = ()
    """Members that are shut out, as `<id>` or `<federation hex>/<id>`."""
    questions_a_day: int = Field(default=2000, ge=1)
    """Features that a member may send in a day; who asks often enough can copy the tail."""
    registrations_a_day: int = Field(default=8, ge=1, le=1000)
    allow_clear: bool = False
    """Take features in the clear too (mode `tls`): only where members trust this server with their images."""
    workers: int = Field(default=1, ge=1, le=64)
    worker_seconds: float = Field(default=20.0, gt=0, le=600)
    cached_members: int = Field(default=16, ge=1, le=1024)
    """Members whose evaluation keys a worker keeps ready, about 35 MB each."""
    queue: int = Field(default=64, ge=1, le=4096)
    """Features that may wait; more are refused at once, so that members answer at the edge."""
    max_calls: int = Field(default=256, ge=8)
    capture_directory: Path | None = None
    """Record every message that the handlers receive and return: for privacy officers and tests."""
    log_level: str = Field(default="INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$")
    log_json: bool = True


def load_settings(file: Path | None = None, **overrides: Any) -> InferenceSettings:
    """Settings from overrides, then a TOML file, then the environment. Raises `SettingsRefused`."""
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SettingsRefused(f"{file}: can't be read as TOML: {error}") from None
    try:
        return InferenceSettings(**{**values, **overrides})
    except ValidationError as error:
        problems = (
            f"{'.'.join(map(str, problem['loc'])) or 'settings'}: {problem['msg']}"
            for problem in error.errors()
        )
        raise SettingsRefused("; ".join(problems)) from None
