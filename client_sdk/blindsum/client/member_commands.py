"""`blindsum join` and `blindsum member`: a device comes in, and takes part."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from blindsum.client.joining import ask, read_invitation, wait_for_admission
from blindsum.client.joining import join as ask_to_join
from blindsum.client.layout import StateDict, portable
from blindsum.client.member import Member
from blindsum.client.member_folder import MemberFolder
from blindsum.client.paillier_guidance import guidance
from blindsum.client.progress import Phase
from blindsum.client.receipts import RoundReceipt
from blindsum.client.terminal import Json, MemberPath, console, date, literal, say, show
from blindsum.client.training_round import Round
from blindsum.crypto.errors import DocumentError
from blindsum.crypto.trust import policy as policies
from blindsum.crypto.trust import roster as rosters
from blindsum.crypto.trust.documents import fingerprint, open_document, parse_signed
from blindsum.crypto.trust.policy import Policy
from blindsum.crypto.trust.roster import Roster
from cryptography import x509
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

join_app = typer.Typer(help="Make this device's keys and ask to be admitted.")
member_app = typer.Typer(help="Take part in training.", no_args_is_help=True)


@join_app.command("join")
def join_command(
    invitation: Annotated[Path, typer.Argument(help="The invitation file from the owner.")],
    folder: Annotated[Path, typer.Argument(help="A new folder for this member's keys.")],
    organisation: Annotated[str, typer.Option(help="Shown to the owner.")] = "",
    wait: Annotated[bool, typer.Option(help="Wait until the owner has answered.")] = True,
) -> None:
    """Make this device's keys and ask to be admitted. The keys never leave the folder."""
    opened = read_invitation(invitation)
    say(f"Federation [bold]{literal(opened.federation_name)}[/bold], owner {fingerprint(opened.owner)}")
    mark = ask_to_join(opened, folder, organisation=organisation, wait=False)
    say(
        f"Asked to be admitted as [bold]{opened.member}[/bold]. "
        "This device's fingerprint, for the owner to compare:"
    )
    say(mark)
    if wait:
        later = "(Ctrl-C: ask again later)"
        with console.status(f"Waiting for the owner {later}") as line:
            wait_for_admission(folder, on_wait=lambda said: line.update(f"The request is {said} {later}"))
    answer = ask(folder)
    if answer.admitted:
        say(f"Admitted. Next: blindsum member run {folder} --app MODULE:FUNCTION")
    else:
        say(f"The request is {answer}. `blindsum join {invitation} {folder}` asks again.")


@member_app.command("run")
def member_run(
    folder: MemberPath,
    app: Annotated[
        str,
        typer.Option(
            help="MODULE:FUNCTION; called as f(round) for each round, returns (state, examples, metrics)."
        ),
    ],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Take part until the plan is finished: your function trains, everything else is done for you.

    The function gets a round (`round.weights()`, `round.index`, `round.settings`) and returns the state dict
    after training, the number of examples, and a dictionary of the plan's metrics.
    """
    train = app_function(app)
    told = ""
    shown = None if quiet else _Bar()
    with Member.open(folder, on_progress=shown.report if shown else lambda *_: None) as member:
        try:
            for rnd in member.rounds():
                if rnd.plan.scheme == "paillier" and rnd.plan.name != told:
                    told = rnd.plan.name
                    say(guidance(rnd.plan, int(rnd.he_parameters.split("-")[1])))
                with rnd:
                    _run_round(rnd, train)
        finally:
            if shown:
                shown.stop()
    say("The plan is finished.")


def _run_round(rnd: Round, train: Callable[[Round], tuple[StateDict, int, dict[str, float]]]) -> None:
    state, examples, metrics = train(rnd)
    receipt = rnd.submit(state, examples=examples, metrics=metrics)
    means = ", ".join(f"{name} {value:.4g}" for name, value in receipt.metrics.items())
    say(f"round {rnd.index}/{rnd.total}: {receipt.survivors} members{', ' if means else ''}{means}")


def app_function(name: str) -> Callable[..., Any]:
    """The function that MODULE:FUNCTION names. Raises `DocumentError`."""
    module, separator, attribute = name.partition(":")
    if not separator:
        raise DocumentError(f"{name!r} isn't MODULE:FUNCTION")
    sys.path.insert(0, str(Path.cwd()))
    found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return found


class _Bar:
    """One line that shows what a member does."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID = self._progress.add_task("starting", total=None)
        self._progress.start()

    def report(self, phase: Phase, done: int, total: int) -> None:
        """What `on_progress` is."""
        self._progress.update(self._task, description=phase, completed=done, total=total or None)

    def stop(self) -> None:
        """Take the line away."""
        self._progress.stop()


@member_app.command("status")
def member_status(folder: MemberPath, as_json: Json = False) -> None:
    """What this folder is, and how far it is. Works while the member runs."""
    with MemberFolder(folder, read_only=True) as opened:
        pin = opened.pin
        receipts = [RoundReceipt.of(stored) for stored in opened.receipts()]
        values = {
            "federation": pin.name,
            "member": pin.member,
            "organisation": pin.organisation,
            "owner": fingerprint(pin.owner),
            "fingerprint": fingerprint(opened.identity.public),
            "admitted": bool(opened.certificate),
            **_documents(opened),
            "last_round": opened.number("last_round"),
            "rounds_seen_through": len(receipts),
            "transcript": receipts[-1].transcript if receipts else "",
            "last_metrics": dict(receipts[-1].metrics) if receipts else {},
        }
    if as_json:
        show(values)
        return
    table = Table(show_header=False)
    for name, value in values.items():
        table.add_row(name.replace("_", " "), literal(value))
    console.print(table)


def _documents(opened: MemberFolder) -> dict[str, Any]:
    """Which of the owner's documents are in force here, and until when the certificate is good."""
    owner, known = opened.pin.owner, opened.rosters()
    found: dict[str, Any] = {}
    if opened.certificate:
        end = x509.load_pem_x509_certificate(opened.certificate).not_valid_after_utc
        found["certificate_until"] = date(end.timestamp())
    if known:
        roster = open_document(parse_signed(known[-1]), owner, rosters.KIND, Roster)
        found |= {"roster_version": roster.version, "key_epoch": roster.epoch}
    if stored := opened.fact("policy"):
        found["policy_version"] = open_document(parse_signed(stored), owner, policies.KIND, Policy).version
    return found


@member_app.command("model")
def member_model(
    folder: MemberPath, out: Annotated[Path, typer.Option(help="Where to write the model (.npz).")]
) -> None:
    """Get the federation's newest model, verified: what a newcomer starts with."""
    with Member.open(folder) as member:
        write_model(out, member.latest_state())
    say(f"Written to {out}.")


def write_model(path: Path, state: StateDict) -> None:
    """Write a model as .npz with mode 0600."""
    arrays = portable(state)
    with path.open("wb") as file:
        path.chmod(0o600)
        np.savez(file, allow_pickle=False, **arrays)
