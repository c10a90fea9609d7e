"""How the commands of owner and members talk: one console, JSON for scripts, a question before what can't
be undone."""

import json
import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from blindsum.client.transport import Patience
from rich.console import Console
from rich.markup import escape

OwnerPath = Annotated[Path, typer.Argument(help="The owner's folder, made by `blindsum owner init`.")]
MemberPath = Annotated[Path, typer.Argument(help="The member's folder, made by `blindsum join`.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print JSON, one line for each change.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask for confirmation.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen, and do nothing.")]

QUICK: Final = Patience(total=15.0)
console = Console()


def say(text: str) -> None:
    """A line for people."""
    console.print(text, highlight=False, soft_wrap=True)


def literal(text: object) -> str:
    """What others wrote, for the screen: no markup, and nothing that moves the cursor."""
    return escape(printable(str(text)))


def printable(text: str) -> str:
    """The text with a ? in place of each control character."""
    return "".join(one if one.isprintable() else "?" for one in text)


def show(value: Any) -> None:
    """A value for scripts."""
    typer.echo(json.dumps(value, indent=2, sort_keys=True))


def show_line(value: Any) -> None:
    """One change for scripts, on one line, at once."""
    print(json.dumps(value, sort_keys=True), flush=True)


def date(seconds: float) -> str:
    """A moment in local time; empty for 0."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else ""


def go_ahead(question: str, *, yes: bool, dry_run: bool) -> bool:
    """Whether to do what can't be undone: not in a dry run; a "no", or no terminal, ends the command."""
    if dry_run:
        say("Nothing was done (dry run).")
        return False
    if not yes and not typer.confirm(question):
        say("Nothing was done.")
        raise typer.Exit(1)
    return True
