"""What the source may not contain: I/O in crypto, weak generators, loaders that run code, machines' paths."""

import ast
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIDES = ("crypto", "client_sdk", "aggregator_service", "proto")

# Deterministic generators and loaders that run code, nowhere near keys, masks or the wire.
NOWHERE = {
    "random",
    "numpy.random",
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
}
IO = {
    "asyncio", "concurrent", "datetime", "google", "grpc", "http", "io", "logging", "multiprocessing",
    "pathlib", "select", "shutil", "signal", "socket", "socketserver", "sqlite3", "ssl", "subprocess",
    "tempfile", "time", "torch", "urllib", "uuid", "warnings",
}  # fmt: skip
# The caller owns threads; what its threads share may still be guarded, or be each thread's own.
OF_THREE_MODULES = {
    "os": {"os.urandom"},
    "sys": {"sys.byteorder"},
    "threading": {"threading.Lock", "threading.local"},
}
# TenSEAL's binding of SEAL reads and writes by path only, so objects pass through nameless memory files.
MEMORY_FILES = {
    "os.MFD_CLOEXEC", "os.close", "os.memfd_create", "os.pread", "os.write",
}  # fmt: skip
HOMOMORPHIC = Path("crypto/blindsum/crypto/schemes/homomorphic")


def sources(*folders: str) -> list[Path]:
    return sorted(
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if not path.name.endswith(("_pb2.py", "_pb2_grpc.py"))
    )


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all that a module imports, at its top or in a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(word.value) for word in node.args if isinstance(word, ast.Constant))


def within(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def attributes(tree: ast.AST) -> Iterator[str]:
    """Dotted names such as np.random or os.urandom, with numpy's usual short name written out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{'numpy' if node.value.id == 'np' else node.value.id}.{node.attr}"


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def offences(text: str, *, sans_io: bool, allowed: frozenset[str] = frozenset()) -> list[str]:
    tree = ast.parse(text)
    found = [name for name in imports(tree) if within(name, NOWHERE | IO if sans_io else NOWHERE)]
    found += [name for name in attributes(tree) if within(name, NOWHERE)]
    for call in calls(tree):
        name = ast.unparse(call.func)
        if name in {"eval", "exec", "compile", "__import__"} or (
            sans_io and name in {"open", "print", "input"}
        ):
            found.append(f"{name}()")
        loads_safely = any(
            keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True"
            for keyword in call.keywords
        )
        if name == "torch.load" and not loads_safely:
            found.append("torch.load() without weights_only=True")
        if name.endswith("load") and any(
            keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False"
            for keyword in call.keywords
        ):
            found.append(f"{name}(allow_pickle=...)")
    if sans_io:
        named = {*attributes(tree), *imports(tree)}
        for module, fine in OF_THREE_MODULES.items():
            found += [name for name in named if name.startswith(f"{module}.") and name not in fine | allowed]
    return found


@pytest.mark.parametrize("path", sources(*SIDES), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_forbidden_imports_or_calls(path: Path) -> None:
    allowed = frozenset(MEMORY_FILES if path == ROOT / HOMOMORPHIC / "seal_wire.py" else ())
    assert offences(path.read_text(), sans_io=path.is_relative_to(ROOT / "crypto"), allowed=allowed) == []


@pytest.mark.parametrize(
    "text",
    [
        "import random",
        "from numpy import random",
        "import numpy as np\nx = np.random.default_rng(0)",
        "def f():\n    import pickle",
        "from importlib import import_module\nimport_module('torch')",
        "from time import monotonic",
        "import os\nos.getpid()",
        "from os import environ",
        "import threading\nthreading.Thread()",
        "open('key')",
        "eval('1')",
        "import torch\ntorch.load('x')",
    ],
)
def test_the_scan_finds_what_it_looks_for(text: str) -> None:
    assert offences(text, sans_io=True)


MEASURES_TENSEAL = Path("examples/blindsum/examples/clinics/tail_costs.py")
"""Runs the library's own matrix product, for comparison."""


def test_gpl_and_native_he_libraries_stay_in_their_modules() -> None:
    paillier = ("paillier.py", "paillier_parameters.py")
    lattice = ("bfv.py", "ckks.py", "seal_keys.py", "seal_member.py", "seal_wire.py")
    allowed = {"phe": paillier, "gmpy2": paillier, "tenseal": lattice}
    strays = [
        f"{path.relative_to(ROOT)}: {library}"
        for path in sources(*SIDES, "examples")
        for library, modules in allowed.items()
        if any(within(name, {library}) for name in imports(ast.parse(path.read_text())))
        and not (path.parent == ROOT / HOMOMORPHIC and path.name in modules)
        and path.relative_to(ROOT) != MEASURES_TENSEAL
    ]
    assert strays == []


def test_the_command_line_imports_no_side() -> None:
    tree = ast.parse((ROOT / "client_sdk/blindsum/cli.py").read_text())
    ours = {name for name in imports(tree) if name.startswith("blindsum")}
    assert all(within(name, {"blindsum.crypto.errors"}) for name in ours), ours


def test_namespace_has_no_init() -> None:
    tops = ("crypto", "client_sdk", "aggregator_service", "proto", "benchmarks", "examples")
    assert [
        top for top in tops for sub in (".", "blindsum") if (ROOT / top / sub / "__init__.py").exists()
    ] == []


def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        return [path for path in sources(*SIDES, "tests", "benchmarks", "examples") if path.is_file()]
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def test_no_machine_is_named_in_tracked_files() -> None:
    """No home folder, no checkout's place, no package index of whoever wrote a file."""
    hosts = {
        match.group(1)
        for name, value in os.environ.items()
        if "INDEX_URL" in name or "EXTRA_INDEX" in name
        for match in re.finditer(r"https?://(?:[^/@\s]*@)?([^/:\s]+)", value)
    } - {"pypi.org", "localhost", "127.0.0.1"}
    places = [
        re.escape(str(ROOT)),
        r"/(?:home|Users)/[a-z][\w.-]*/",
        r"(?<![\w.])/root/",
        *map(re.escape, hosts),
    ]
    pattern = re.compile("|".join(places).encode())
    hits = [
        f"{path.relative_to(ROOT)}: {match.group().decode()}"
        for path in tracked()
        if path != Path(__file__)
        and path.suffix not in {".npz", ".png"}
        and (match := pattern.search(path.read_bytes()))
    ]
    assert hits == []


def test_tracked_files_stay_small() -> None:
    large = [str(path.relative_to(ROOT)) for path in tracked() if path.stat().st_size > 6_000_000]
    assert large == []
