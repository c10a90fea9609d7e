"""The operator's command: `blindsum serve`."""

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from blindsum.aggregator.server import AggregatorServer
from blindsum.aggregator.settings import AggregatorSettings, load_settings, sample_settings
from blindsum.aggregator.structured_logs import configure_logs
from blindsum.crypto.errors import BlindsumError

app = typer.Typer(help="Run the aggregator, the server that adds up ciphertext.", no_args_is_help=False)


async def _run(settings: AggregatorSettings, ready_file: Path | None, while_stdin: bool) -> None:
    server = AggregatorServer(settings)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    hurry = asyncio.Event()

    def told_to_stop() -> None:
        (hurry if stopping.is_set() else stopping).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told_to_stop)
    if while_stdin:

        def read() -> None:
            if not os.read(sys.stdin.fileno(), 4096):
                loop.remove_reader(sys.stdin.fileno())
                stopping.set()

        loop.add_reader(sys.stdin.fileno(), read)
    await server.start()
    if ready_file is not None:
        text = f"{server.enrolment_port} {server.member_port}\n{server.ca_pem.decode()}"
        if str(ready_file) == "-":
            sys.stdout.write(text)
            sys.stdout.flush()
        else:
            aside = ready_file.with_name(ready_file.name + ".new")
            aside.write_text(text, encoding="ascii")
            aside.rename(ready_file)
    await stopping.wait()
    await server.stop(drain=settings.drain_seconds, hurry=hurry)


@app.command()
def serve(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="TOML file with settings (names as below).")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Directory for keys, state and blobs; made with mode 0700.")
    ] = None,
    owner: Annotated[
        list[str] | None,
        typer.Option("--owner", help="Owner key (64 hex digits) that may found a federation."),
    ] = None,
    any_owner: Annotated[
        bool, typer.Option("--any-owner", help="Let any owner found a federation; on loopback only.")
    ] = False,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 by default.")] = None,
    name: Annotated[
        list[str] | None, typer.Option("--name", help="DNS name or address that members use to reach you.")
    ] = None,
    enrolment_port: Annotated[
        int | None, typer.Option(help="Port for joining and publishing; 0 picks one.")
    ] = None,
    member_port: Annotated[int | None, typer.Option(help="Port for rounds, mutual TLS; 0 picks one.")] = None,
    admin_port: Annotated[
        int | None, typer.Option(help="Port on loopback for health, metrics and the operators' page.")
    ] = None,
    capture: Annotated[
        Path | None,
        typer.Option("--capture", help="Record here every message that the server receives and returns."),
    ] = None,
    ready_file: Annotated[
        Path | None,
        typer.Option(
            help="Written once ready: both ports, then the CA certificate for invitations; - is stdout."
        ),
    ] = None,
    while_stdin: Annotated[
        bool, typer.Option("--while-stdin", help="Stop when standard input closes: for supervisors.")
    ] = False,
    print_sample_settings: Annotated[
        bool, typer.Option("--print-sample-settings", help="Print a commented settings file and exit.")
    ] = False,
) -> None:
    """Run the aggregator until SIGINT or SIGTERM; running uploads may then end, unless a second one comes.

    It needs a data directory and the keys of the owners it works for. Every setting can also stand in
    the TOML file or in an environment variable BLINDSUM_<NAME>; options win over both.
    """
    if print_sample_settings:
        sys.stdout.write(sample_settings())
        return
    overrides: dict[str, Any] = {
        "data_dir": data,
        "owners": tuple(owner) if owner else None,
        "allow_any_owner": any_owner or None,
        "host": host,
        "server_names": tuple(name) if name else None,
        "enrolment_port": enrolment_port,
        "member_port": member_port,
        "admin_port": admin_port,
        "capture_directory": capture,
    }
    settings = load_settings(config, **{key: value for key, value in overrides.items() if value is not None})
    configure_logs(settings.log_level, settings.log_json)
    asyncio.run(_run(settings, ready_file, while_stdin))


def main() -> None:
    """The command on its own: `python -m blindsum.aggregator.commands`."""
    try:
        app()
    except BlindsumError as error:
        typer.echo(f"blindsum serve: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
