"""The operator's other commands: `blindsum audit`, `doctor`, `backup` and `restore`.

Exit codes as for every command; besides, `doctor` ends with 3 when there are warnings but no failure.
"""

import json
import sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from blindsum.aggregator.audit import AuditHead, as_json, verify
from blindsum.aggregator.backup import STATE, BackupContents, back_up, restore, set_aside
from blindsum.aggregator.doctor import Findings, examine
from blindsum.aggregator.settings import SettingsRefused, data_directory, load_settings
from blindsum.aggregator.store.records import EventRecord
from blindsum.aggregator.store.sqlite_reader import SqliteReader
from blindsum.crypto.errors import BlindsumError
from rich.console import Console
from rich.markup import escape

Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="The server's settings file; it names the data directory."),
]
Data = Annotated[Path | None, typer.Option("--data", help="The server's data directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]

audit_app = typer.Typer(help="Check and show the server's audit.", no_args_is_help=True)
doctor_app = typer.Typer()
backup_app = typer.Typer()
restore_app = typer.Typer()


@audit_app.command("verify")
def audit_verify(
    config: Config = None,
    data: Data = None,
    head: Annotated[
        str | None,
        typer.Option(help="A head noted earlier (SEQUENCE:DIGEST) that the audit must still continue."),
    ] = None,
    as_json_: Json = False,
) -> None:
    """Check that no event was changed, deleted, inserted or moved. Works beside a running server.

    Exit code 1 if the audit doesn't hold. Note the head that this prints somewhere else: with it, even a
    history that was written anew as a whole shows.
    """
    noted = None if head is None else AuditHead.parse(head)
    with SqliteReader(data_directory(config, data) / STATE) as reader:
        report = verify(reader, noted)
    if as_json_:
        typer.echo(
            json.dumps(
                {
                    "holds": report.holds,
                    "events": report.head.sequence,
                    "head": str(report.head),
                    "broken_at": report.broken_at,
                    "reason": report.reason,
                }
            )
        )
    elif report.holds:
        typer.echo(f"The audit holds: {report.head.sequence} events.\nhead {report.head}")
    else:
        typer.echo(
            f"THE AUDIT WAS TAMPERED WITH, from event {report.broken_at} on: {report.reason}", err=True
        )
    if not report.holds:
        raise typer.Exit(1)


@audit_app.command("show")
def audit_show(
    config: Config = None,
    data: Data = None,
    since: Annotated[int, typer.Option(help="Begin with this event.")] = 1,
    limit: Annotated[int | None, typer.Option(help="Show so many at most.")] = None,
    kind: Annotated[str | None, typer.Option(help='Only this kind, such as "round aborted".')] = None,
    federation: Annotated[
        str | None, typer.Option(help="Only this federation: the first hex digits of its id.")
    ] = None,
    as_json_: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Show what happened: who was admitted, which rounds ran, what was refused and why."""
    with SqliteReader(data_directory(config, data) / STATE) as reader:
        events = (
            one
            for one in reader.each(EventRecord)
            if one.sequence >= since
            and kind in (None, one.kind)
            and one.federation.hex().startswith(federation or "")
        )
        for one in islice(events, limit):
            row = as_json(one)
            if as_json_:
                typer.echo(json.dumps(row))
                continue
            detail = ", ".join(f"{name} {value}" for name, value in row["detail"].items() if value)
            typer.echo(
                f"{one.sequence:>6}  {row['time'][:19]}  {one.federation.hex()[:16]}  {one.kind}: {detail}"
            )


_MARKS = {
    "ok": "[green]ok[/green]     ",
    "warning": "[yellow]warning[/yellow]",
    "failure": "[red]FAILURE[/red]",
}


@doctor_app.command("doctor")
def doctor(config: Config = None, data: Data = None, as_json_: Json = False) -> None:
    """Look for what is wrong with the server, or soon will be, and say what to do about it.

    Give it the server's own settings file and environment, and run it as the server's user. It may run
    beside the server. Exit code 0: nothing to do; 3: warnings; 1: failures.
    """
    try:
        settings = load_settings(config, **({} if data is None else {"data_dir": data}))
        findings = examine(settings)
    except SettingsRefused as error:
        findings = Findings()
        findings.fail("settings", str(error), "correct them: the server won't start; see docs/operations.md")
    if as_json_:
        typer.echo(json.dumps([asdict(one) for one in findings.found], indent=1))
    else:
        console = Console(soft_wrap=True, highlight=False)
        for one in findings.found:
            console.print(f"{_MARKS[one.verdict]}  {escape(one.check)}: {escape(one.text)}")
            if one.advice:
                console.print(f"           -> {escape(one.advice)}")
    raise typer.Exit(findings.exit_code)


def _say(verb: str, contents: BackupContents, as_json_: bool, **more: str) -> None:
    if as_json_:
        row = {
            "file": str(contents.path),
            "files": contents.files,
            "bytes": contents.size,
            "audit_head": str(contents.head),
            "created": contents.created,
            **more,
        }
        typer.echo(json.dumps(row))
    else:
        typer.echo(f"{verb}: {contents.files} files, {contents.size / 1e6:.1f} MB, made {contents.created}.")
        typer.echo(f"audit head {contents.head}")


@backup_app.command("backup")
def backup(
    target: Annotated[Path, typer.Argument(help="The file to write; keep it as safe as the data directory.")],
    config: Config = None,
    data: Data = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace the file if it is there.")] = False,
    as_json_: Json = False,
) -> None:
    """Write the server's state, blobs and transport authority into one file. The server may go on running."""
    _say("Backed up", back_up(data_directory(config, data), target, replace=replace), as_json_)


@restore_app.command("restore")
def restore_command(
    source: Annotated[Path, typer.Argument(help="A file that `blindsum backup` wrote.")],
    config: Config = None,
    data: Data = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Move a data directory that is there aside, after asking.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    as_json_: Json = False,
) -> None:
    """Put a backup into a new data directory. Everything in it is checked first.

    Rounds that ended after the backup are lost here, and members don't go back: see docs/operations.md.
    """
    directory = data_directory(config, data)
    aside: Path | None = None
    if replace and directory.exists() and any(directory.iterdir()):
        question = f"Restore over {directory}? What is there now is kept beside it."
        if not yes and (not sys.stdin.isatty() or not typer.confirm(question)):
            raise BlindsumError(f"{directory} was left as it is; confirm, or say --yes")
        aside = set_aside(directory)
    try:
        contents = restore(source, directory)
    except BlindsumError:
        if aside is not None and not directory.exists():
            aside.rename(directory)
        raise
    _say("Restored", contents, as_json_, **({} if aside is None else {"replaced": str(aside)}))
    if aside is not None and not as_json_:
        typer.echo(f"What was there is in {aside}.")
