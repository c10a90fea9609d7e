"""The generated wire code is what the .proto files say, and runs with the versions that we ask for."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def generated(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text() for form in GENERATED for path in folder.rglob(form)
    }


def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    protos = sorted((ROOT / "proto").rglob("*.proto"))
    assert protos
    subprocess.run(
        [
            sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}",
            f"--plugin=protoc-gen-mypy={BIN / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={BIN / 'protoc-gen-mypy_grpc'}",
            *(f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")),
            *map(str, protos),
        ],
        check=True,
    )  # fmt: skip
    expected, found = generated(tmp_path), generated(ROOT / "proto")
    assert sorted(found) == sorted(expected)
    stale = [name for name in expected if found[name] != expected[name]]
    assert stale == [], "run `make proto`"


def test_buf_lint() -> None:
    run = subprocess.run([BIN / "buf", "lint"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_dependencies_are_no_older_than_the_generated_code_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest = {
        requirement.name: Version(next(iter(requirement.specifier)).version)
        for requirement in map(Requirement, project["dependencies"])
    }
    for text in generated(ROOT / "proto").values():
        for version in re.findall(r"^# Protobuf Python Version: (\S+)$", text, re.MULTILINE):
            assert lowest["protobuf"] >= Version(version)
        for version in re.findall(r"^GRPC_GENERATED_VERSION = '(\S+)'$", text, re.MULTILINE):
            assert lowest["grpcio"] >= Version(version)
