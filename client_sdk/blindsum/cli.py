"""The command `blindsum`. It imports no side: each side registers its subcommands as entry points.

An entry point of the group `blindsum.commands` names a `typer.Typer`: one with a single command and no
callback becomes the subcommand itself, any other a group. Only the subcommand that was asked for is
imported, so that help is quick and no side needs another side's dependencies.

Exit codes: 0 done; 1 a typed error (`BlindsumError`), shown as one line; 2 wrong use of the command, or
an extra that isn't installed; 130 interrupted.
"""

import os
import sys
from importlib.metadata import EntryPoint, entry_points, version
from typing import TYPE_CHECKING, NoReturn

from blindsum.crypto.errors import BlindsumError, MissingExtra

if TYPE_CHECKING:
    import typer

GROUP = "blindsum.commands"

_HELP = (
    "Train a model together; the server adds up what it cannot read.\n\n"
    "A federation has an owner, members, and an aggregator that nobody has to trust with data. "
    "Try it all on one machine with [bold]blindsum demo clinics[/bold]."
)

_SUMMARIES = {
    "owner": "Found a federation, invite and admit members, sign its policy.",
    "join": "Make this device's keys and ask to be admitted.",
    "member": "Take part in training.",
    "train": "Sign and start a training job; see how far it is.",
    "receipt": "Show and verify what a member's rounds were.",
    "model": "Publish models, signed and sealed; fetch those of others.",
    "optimize": "Make a published model fit a device: measure candidates, choose, sign.",
    "examples": "Forward hard examples: review, consent, send sealed, take back; receive and check.",
    "serve": "Run the aggregator, the server that adds up ciphertext.",
    "doctor": "Look for what is wrong with a server, or soon will be.",
    "audit": "Check and show what happened on a server.",
    "backup": "Write a server's data into one file, while it runs.",
    "restore": "Put a backup into a new data directory.",
    "infer": "Run the inference service, which answers on encrypted features.",
    "demo": "A whole federation on this machine, with real data.",
    "bench": "Measure schemes and the service.",
}
"""What `blindsum --help` says of subcommands that it doesn't import, in the order of its list."""

_EXTRAS = {
    "gmpy2": "paillier",
    "grpc_health": "server",
    "grpc_reflection": "server",
    "jinja2": "demo",
    "matplotlib": "demo",
    "onnx": "optimize",
    "onnxruntime": "edge",
    "onnxscript": "optimize",
    "opentelemetry": "otel",
    "phe": "paillier",
    "pydicom": "dicom",
    "pydantic_settings": "server",
    "rich": "cli",
    "safetensors": "optimize",
    "prometheus_client": "server",
    "starlette": "server",
    "structlog": "server",
    "tenseal": "he",
    "torch": "torch",
    "typer": "cli",
    "uvicorn": "server",
    "zstandard": "he",
}


def commands() -> dict[str, EntryPoint]:
    """The registered subcommands by name: ours in the order of a federation's life, then others'."""
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    known = [name for name in _SUMMARIES if name in found]
    return {name: found[name] for name in [*known, *sorted(found.keys() - known)]}


def missing_extra(error: ModuleNotFoundError, what: str) -> MissingExtra | None:
    """The extra that carries the module which wasn't found, or None if it is none of our extras'."""
    extra = _EXTRAS.get((error.name or "").partition(".")[0])
    return MissingExtra(extra, what) if extra else None


def build(wanted: str | None, everything: bool = False) -> "typer.Typer":
    """The command with the subcommand `wanted` imported (all of them if `everything`), the others listed.

    Raises `MissingExtra` if `wanted` needs an extra that isn't installed.
    """
    import typer  # noqa: PLC0415  (the extra may be missing)

    app = typer.Typer(
        name="blindsum",
        help=_HELP,
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def show_version(value: bool) -> None:
        if value:
            typer.echo(f"blindsum {version('blindsum')}")
            raise typer.Exit

    @app.callback()
    def root(
        _version: bool = typer.Option(
            False, "--version", callback=show_version, is_eager=True, help="Show the version and exit."
        ),
        _debug: bool = typer.Option(False, "--debug", help="Show the whole traceback of an error."),
    ) -> None:
        pass

    for name, entry in commands().items():
        if everything or name == wanted:
            _add(app, name, _load(entry))
        else:
            app.command(name, help=_SUMMARIES.get(name, f"From {entry.module}."))(_not_imported)
    return app


def _load(entry: EntryPoint) -> "typer.Typer":
    try:
        loaded: typer.Typer = entry.load()
    except ModuleNotFoundError as error:
        raise missing_extra(error, f"`blindsum {entry.name}`") or error from None
    return loaded


def _add(app: "typer.Typer", name: str, loaded: "typer.Typer") -> None:
    single = len(loaded.registered_commands) == 1 and not loaded.registered_groups
    if single and loaded.registered_callback is None:
        command = loaded.registered_commands[0]
        command.name = name
        command.help = command.help or loaded.info.help or _SUMMARIES.get(name)
        app.registered_commands.append(command)
    else:
        app.add_typer(loaded, name=name)


def _not_imported() -> None:
    """Stands in a list of subcommands for one that isn't asked for."""
    raise AssertionError("a subcommand ran that wasn't imported")


def main() -> NoReturn:
    """Run `blindsum` with the arguments of this process."""
    arguments = sys.argv[1:]
    at = next((i for i, argument in enumerate(arguments) if not argument.startswith("-")), len(arguments))
    debug = "--debug" in arguments[:at]
    wanted = arguments[at] if at < len(arguments) else None
    try:
        build(wanted, everything="_BLINDSUM_COMPLETE" in os.environ)(prog_name="blindsum")
    except BlindsumError as error:
        if debug:
            raise
        _fail(str(error), 2 if isinstance(error, MissingExtra) else 1)
    except ModuleNotFoundError as error:
        missing = missing_extra(error, f"`blindsum {wanted}`" if wanted else "the command `blindsum`")
        if missing is None or debug:
            raise
        _fail(str(missing), 2)
    raise SystemExit(0)


def _fail(text: str, code: int) -> NoReturn:
    # Errors carry texts of servers: nothing in them may draw on the screen.
    words = "".join(one if one.isprintable() else "?" for one in " ".join(text.split()))
    line = f"blindsum: {words}"
    if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        line = f"\x1b[31m{line}\x1b[0m"
    print(line, file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
