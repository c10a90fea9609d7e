"""The command `blindsum`: what it lists, loads and says when something is missing or goes wrong."""

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, version

import pytest
import typer
from blindsum import cli
from blindsum.crypto.errors import OpeningFailed
from typer.testing import CliRunner

OURS = ["owner", "join", "member", "train", "receipt", "serve", "infer", "demo", "bench"]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs `blindsum` in this process: exit code, standard output, standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["blindsum", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        out, err = capsys.readouterr()
        code = exit_info.value.code
        return (code if isinstance(code, int) else int(code is not None)), out, err

    return call


def register(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    monkeypatch.setattr(cli, "commands", lambda: {"extra": EntryPoint("extra", target, cli.GROUP)})


def test_help_lists_every_subcommand_without_importing_a_side(
    run: Callable[..., tuple[int, str, str]],
) -> None:
    before = {name for name in sys.modules if name.startswith(("blindsum.", "torch", "grpc"))}
    code, out, _ = run("--help")
    after = {name for name in sys.modules if name.startswith(("blindsum.", "torch", "grpc"))}
    assert code == 0
    assert [name for name in OURS if name not in out] == []
    assert after == before


@pytest.mark.parametrize("name", OURS)
def test_every_entry_point_resolves_and_teaches(name: str) -> None:
    result = CliRunner().invoke(cli.build(name), [name, "--help"])
    assert result.exit_code == 0, result.output
    assert f"blindsum {name}" in result.output


def test_version(run: Callable[..., tuple[int, str, str]]) -> None:
    assert run("--version")[:2] == (0, f"blindsum {version('blindsum')}\n")


def test_an_unknown_subcommand_is_wrong_use(run: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = run("plaintext")
    assert code == 2
    assert "plaintext" in err


@pytest.mark.parametrize(
    ("module", "extra"),
    [("grpc_health.v1", "server"), ("tenseal", "he"), ("phe", "paillier"), ("matplotlib.pyplot", "demo")],
)
def test_a_missing_extra_is_named(
    module: str,
    extra: str,
    run: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (module.partition(".")[0], module):
        monkeypatch.setitem(sys.modules, name, None)
    register(monkeypatch, f"{module}:app")
    code, _, err = run("extra")
    assert code == 2
    assert f"pip install 'blindsum[{extra}]'" in err
    assert "Traceback" not in err


def test_without_typer_the_command_says_what_to_install(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    code, _, err = run("--help")
    assert code == 2
    assert "pip install 'blindsum[cli]'" in err


def test_a_typed_error_is_one_line(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, f"{__name__}:failing")
    code, out, err = run("extra")
    assert (code, out, err) == (1, "", "blindsum: the envelope didn't open; ask the owner\n")


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, f"{__name__}:failing")
    monkeypatch.setattr(sys, "argv", ["blindsum", "--debug", "extra"])
    with pytest.raises(OpeningFailed):
        cli.main()


def test_a_defect_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, "blindsum.no_such_module:app")
    monkeypatch.setattr(sys, "argv", ["blindsum", "extra"])
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        cli.main()


def _fail() -> None:
    raise OpeningFailed("the envelope didn't open;\nask the owner")


failing = typer.Typer()
failing.command("extra")(_fail)
