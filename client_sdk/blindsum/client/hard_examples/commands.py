"""`blindsum examples`: the review queue of a site, and the intake of a training party."""

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from blindsum.client.federation_view import FederationView
from blindsum.client.hard_examples.audit_trail import AuditLine
from blindsum.client.hard_examples.dicom import read_dicom
from blindsum.client.hard_examples.intake import Intake
from blindsum.client.hard_examples.review_queue import DAY, QueuedExample, ReviewQueue, WrongState
from blindsum.client.hard_examples.sealed_example import Consent, Example
from blindsum.client.terminal import QUICK, Json, MemberPath, console, literal, printable
from rich.table import Table

app = typer.Typer(
    help="Forward hard examples: review, consent, send sealed, take back; receive and check.",
    no_args_is_help=True,
)

ExampleId = Annotated[str, typer.Argument(help="The example's id, or as much of it as is unique.")]
Reviewer = Annotated[str, typer.Option(help="Who decides; stands in the audit.")]
Purpose = Annotated[str, typer.Option(help="What the images may be used for.")]


@app.command("enable")
def enable_command(
    folder: MemberPath,
    recipient: Annotated[str, typer.Option(help="The member that may get examples.")],
    purpose: Purpose,
    quota: Annotated[int, typer.Option(min=1, help="At most so many examples.")],
    days: Annotated[int, typer.Option(min=1, help="For so long.")] = 30,
) -> None:
    """Switch forwarding on. It is off until then: raw images leave the site here, and nowhere else."""
    with ReviewQueue(folder) as queue:
        setting = queue.enable(recipient, purpose, quota=quota, days=days)
    typer.echo(f"On until {_date(setting.until)}: at most {quota} examples to {recipient}.")


@app.command("disable")
def disable_command(folder: MemberPath) -> None:
    """Switch forwarding off."""
    with ReviewQueue(folder) as queue:
        queue.disable()
    typer.echo("Off. What has left can still be taken back: blindsum examples withdraw")


@app.command("propose-dicom")
def propose_dicom_command(
    folder: MemberPath,
    file: Annotated[Path, typer.Argument(help="A DICOM file with one grey image.")],
    label: Annotated[int, typer.Option(min=0, help="The image's class.")],
    reason: Annotated[str, typer.Option(help="Why it is proposed.")] = "chosen by hand",
) -> None:
    """Put an image from a DICOM file into the queue: the pixels, and of the tags modality and view alone."""
    image = read_dicom(file)
    with ReviewQueue(folder) as queue:
        identifier = queue.propose(
            Example.of(image.pixels, label, image.tags),
            doubt=0.0,
            novelty=0.0,
            reason=reason,
            model="none",
            model_version=0,
            look=image.burned_in_unknown,
        )
    typer.echo(f"Proposed as {identifier.hex()[:16]}.")


@app.command("list")
def list_command(folder: MemberPath, as_json: Json = False) -> None:
    """The queue: what waits, what left, what was taken back."""
    with ReviewQueue(folder) as queue:
        found, setting, used = queue.examples(), queue.forwarding, queue.used
    if as_json:
        typer.echo(json.dumps([_queued(one) for one in found], indent=2))
        return
    table = Table("id", "state", "label", "doubt", "novelty", "reason", "proposed", "look at the pixels")
    for one in found:
        table.add_row(
            one.id.hex()[:16],
            one.state,
            str(one.label),
            f"{one.doubt:.2f}",
            f"{one.novelty:.0f}",
            literal(one.reason),
            _date(one.proposed),
            "yes, for burned-in text" if one.look else "",
        )
    console.print(table)
    if setting is None:
        typer.echo("Forwarding is off.")
    else:
        typer.echo(f"Forwarding to {setting.recipient} is on, {used} of {setting.quota} used.")


@app.command("show")
def show_command(
    folder: MemberPath,
    example: ExampleId,
    out: Annotated[Path, typer.Option(help="Where to write the image (.npy), to look at it.")],
) -> None:
    """Write an example's image down for the reviewer."""
    with ReviewQueue(folder) as queue:
        one = _find(queue, example)
    if one.example is None:
        raise WrongState(f"example {example} is {one.state}; its image isn't here any more")
    np.save(out, one.example.array(), allow_pickle=False)
    typer.echo(f"Written to {out}.")


@app.command("approve")
def approve_command(
    folder: MemberPath,
    example: ExampleId,
    reference: Annotated[str, typer.Option(help="Where the consent is recorded: a form's number, no name.")],
    reviewer: Reviewer,
    days: Annotated[int, typer.Option(min=1, help="The consent is good for so long.")] = 30,
) -> None:
    """Let an example leave: you have looked at it, and the consent for this recipient and purpose is on
    record.
    """
    now = int(time.time())
    with ReviewQueue(folder) as queue:
        one, setting = _find(queue, example), queue.forwarding
        purpose = setting.purpose if setting is not None else ""
        consent = Consent(
            content=one.digest,
            recipient=one.recipient,
            purpose=purpose,
            reference=reference,
            given=now,
            until=now + days * DAY,
        )
        queue.approve(one.id, consent, reviewer=reviewer)
    typer.echo("Approved. Next: blindsum examples forward")


@app.command("refuse")
def refuse_command(folder: MemberPath, example: ExampleId, reviewer: Reviewer) -> None:
    """Keep an example here; the queue forgets its image."""
    with ReviewQueue(folder) as queue:
        queue.refuse(_find(queue, example).id, reviewer=reviewer)
    typer.echo("It stays here.")


@app.command("forward")
def forward_command(folder: MemberPath) -> None:
    """Send what was approved, sealed to the recipient."""
    with ReviewQueue(folder) as queue, FederationView.open(folder, patience=QUICK) as view:
        sent = queue.forward(view)
    typer.echo(f"{len(sent)} sent.")


@app.command("withdraw")
def withdraw_command(folder: MemberPath, example: ExampleId) -> None:
    """Take an example back: deleted at the server now, at the recipient when it next looks."""
    with ReviewQueue(folder) as queue, FederationView.open(folder, patience=QUICK) as view:
        state = queue.withdraw(_find(queue, example).id, view)
    typer.echo(f"It is {state}. What was trained on it isn't unlearnt.")


@app.command("audit")
def audit_command(
    folder: MemberPath,
    received: Annotated[bool, typer.Option("--received", help="The intake's audit.")] = False,
) -> None:
    """Verify and print the record of everything that happened to examples here."""
    if received:
        with Intake(folder, purpose="") as intake:
            found = intake.audit()
    else:
        with ReviewQueue(folder) as queue:
            found = queue.audit()
    for line in found:
        typer.echo(_audit_text(line))
    typer.echo(f"{len(found)} lines, the chain holds.")


@app.command("collect")
def collect_command(
    folder: MemberPath,
    purpose: Purpose,
    own: Annotated[
        Path | None, typer.Option(help=".npy of one's own images (n, rows, columns), to find copies.")
    ] = None,
) -> None:
    """Fetch what waits for this member, check it, and delete what was taken back."""
    known = np.load(own, allow_pickle=False) if own is not None else ()
    with (
        Intake(folder, purpose=purpose, own=known) as intake,
        FederationView.open(folder, patience=QUICK) as view,
    ):
        changed = intake.collect(view)
    for one in changed:
        typer.echo(f"{one.id.hex()[:16]} from {printable(one.sender)}: {one.state}, {printable(one.reason)}")
    typer.echo(f"{len(changed)} new.")


@app.command("decide")
def decide_command(
    folder: MemberPath,
    example: ExampleId,
    reviewer: Reviewer,
    accept: Annotated[bool, typer.Option("--accept/--reject", help="Train on it, or not.")],
) -> None:
    """Decide on a received example that was held because its label is odd."""
    with Intake(folder, purpose="") as intake:
        found = [one for one in intake.examples("held") if one.id.hex().startswith(example)]
        if len(found) != 1:
            raise WrongState(f"{len(found)} held examples have an id that starts with {example}")
        intake.decide(found[0].id, accept=accept, reviewer=reviewer)
    typer.echo("Accepted." if accept else "Rejected, and deleted here.")


def _find(queue: ReviewQueue, start: str) -> QueuedExample:
    found = [one for one in queue.examples() if one.id.hex().startswith(start)]
    if len(found) != 1:
        raise WrongState(
            f"{len(found)} examples have an id that starts with {start!r}; see `blindsum examples list`"
        )
    return found[0]


def _queued(one: QueuedExample) -> dict[str, object]:
    return {
        "id": one.id.hex(),
        "state": one.state,
        "label": one.label,
        "doubt": one.doubt,
        "novelty": one.novelty,
        "reason": one.reason,
        "recipient": one.recipient,
        "proposed": one.proposed,
        "look": one.look,
    }


def _audit_text(line: AuditLine) -> str:
    return f"{line.sequence:5} {_date(line.at)} {line.kind:16} {line.detail}"


def _date(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")
