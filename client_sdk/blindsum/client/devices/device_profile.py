"""What a device offers and asks for, from a TOML file.

name = "Raspberry Pi 4"
ram_mb = 256            # memory of the whole inference process
flash_kb = 512          # the artefact
latency_ms = 20.0       # one answer, 95 of 100 times
backends = ["onnx-fp32", "onnx-int8"]
threads = 1
slower = 4.0            # how much slower the device is than the machine that measures; 1 on the device itself
"""

import hashlib
import os
import tomllib
from pathlib import Path
from typing import Annotated

import msgspec
from blindsum.crypto.errors import BlindsumError

Positive = Annotated[float, msgspec.Meta(gt=0)]


class ProfileRefused(BlindsumError):
    """A device profile that can't be used; the text names the line at fault."""


class DeviceProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A device. `ram_mb` in MiB (resident memory of the inference process), `flash_kb` in KiB (the artefact),
    `latency_ms` in milliseconds (95th percentile of one answer).
    """

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    ram_mb: Positive
    flash_kb: Positive
    latency_ms: Positive
    backends: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)] = ("onnx-fp32", "onnx-int8")
    threads: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    slower: Positive = 1.0

    @property
    def digest(self) -> str:
        """SHA-256 of the profile, hex: names it in an artefact's manifest."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()


def read_profile(path: str | os.PathLike[str]) -> DeviceProfile:
    """The profile in a TOML file. Raises `ProfileRefused`."""
    file = Path(path)
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
        return msgspec.convert(values, DeviceProfile)
    except OSError as error:
        raise ProfileRefused(f"{file} can't be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ProfileRefused(f"{file} isn't TOML: {error}") from None
    except msgspec.ValidationError as error:
        raise ProfileRefused(f"{file}: {error}") from None
