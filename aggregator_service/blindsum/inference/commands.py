"""The operator's command: `blindsum infer`."""

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from blindsum.aggregator.structured_logs import configure_logs
from blindsum.aggregator.transport_authority import TransportAuthority
from blindsum.crypto.errors import BlindsumError
from blindsum.inference.server import InferenceServer
from blindsum.inference.settings import InferenceSettings, load_settings

app = typer.Typer(
    help="Run the inference service, which answers on encrypted features.", no_args_is_help=True
)


async def _run(settings: InferenceSettings, ready_file: Path | None, while_stdin: bool) -> None:
    server = InferenceServer(settings)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    if while_stdin:

        def read() -> None:
            if not os.read(sys.stdin.fileno(), 4096):
                loop.remove_reader(sys.stdin.fileno())
                stopping.set()

        loop.add_reader(sys.stdin.fileno(), read)
    await server.start()
    text = f"{server.port}\n{server.ca_pem.decode()}"
    if str(ready_file) == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
    elif ready_file is not None:
        aside = ready_file.with_name(ready_file.name + ".new")
        aside.write_text(text, encoding="ascii")
        aside.rename(ready_file)
    await stopping.wait()
    await server.stop()


@app.command()
def serve(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="TOML file with settings (names as below).")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Directory for keys and counts; made with mode 0700.")
    ] = None,
    tail: Annotated[Path | None, typer.Option("--tail", help="The exported tail.")] = None,
    client_ca: Annotated[
        Path | None,
        typer.Option(
            "--client-ca",
            help="PEM of the authority of members' certificates: an aggregator's authority/transport_ca.pem.",
        ),
    ] = None,
    federation: Annotated[
        list[str] | None,
        typer.Option("--federation", help="Serve members of this federation (64 hex digits); else all."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 by default.")] = None,
    name: Annotated[
        list[str] | None, typer.Option("--name", help="DNS name or address that members use to reach you.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port, mutual TLS; 0 picks one.")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes; 1 by default.")] = None,
    questions: Annotated[
        int | None, typer.Option("--questions", help="Features that a member may send in a day.")
    ] = None,
    allow_clear: Annotated[
        bool,
        typer.Option("--allow-clear", help="Take features in the clear too: an image can be rebuilt."),
    ] = False,
    capture: Annotated[
        Path | None, typer.Option("--capture", help="Record here every message received and returned.")
    ] = None,
    ready_file: Annotated[
        Path | None,
        typer.Option(help="Written once ready: the port, then the CA certificate for members; - is stdout."),
    ] = None,
    while_stdin: Annotated[
        bool, typer.Option("--while-stdin", help="Stop when standard input closes: for supervisors.")
    ] = False,
) -> None:
    """Answer members' encrypted features until SIGINT or SIGTERM."""
    overrides: dict[str, Any] = {
        "data_dir": data,
        "tail": tail,
        "client_ca": client_ca,
        "federations": tuple(federation) if federation else None,
        "host": host,
        "server_names": tuple(name) if name else None,
        "port": port,
        "workers": workers,
        "questions_a_day": questions,
        "allow_clear": allow_clear or None,
        "capture_directory": capture,
    }
    settings = load_settings(config, **{key: value for key, value in overrides.items() if value is not None})
    configure_logs(settings.log_level, settings.log_json)
    asyncio.run(_run(settings, ready_file, while_stdin))


@app.command()
def admit(
    data: Annotated[Path, typer.Option("--data", help="The service's data directory.")],
    federation: Annotated[str, typer.Option(help="The federation's id, 64 hex digits.")],
    member: Annotated[str, typer.Option(help="The member's id.")],
    request: Annotated[Path, typer.Argument(help="The member's certificate request (DER).")],
    days: Annotated[int, typer.Option(min=1, max=90, help="How long the certificate is valid.")] = 30,
) -> None:
    """Print a certificate for a member's transport key: where no aggregator issues them."""
    try:
        identity = bytes.fromhex(federation)
    except ValueError:
        identity = b""
    if len(identity) != 32:
        raise BlindsumError("a federation's id has 64 hex digits")
    authority = TransportAuthority(data / "authority")
    issued = authority.member_certificate(
        request.read_bytes(), identity, member, days, time.time_ns() // 1_000_000
    )
    typer.echo(issued.chain.decode(), nl=False)
