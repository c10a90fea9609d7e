"""`blindsum owner`: found a federation, say who is in it, and sign what its members pin."""

import json
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from blindsum.client.admission import AdmissionList, Decision, Rule, Watch, WatchEvent, by_token, nobody
from blindsum.client.member_commands import write_model
from blindsum.client.owner import VALID_DAYS, Owner
from blindsum.client.owner_view import Application
from blindsum.client.paillier_guidance import WEAK_MODULUS
from blindsum.client.terminal import (
    QUICK,
    DryRun,
    Json,
    JsonLines,
    OwnerPath,
    Yes,
    console,
    date,
    go_ahead,
    literal,
    say,
    show,
    show_line,
)
from blindsum.client.train_commands import members_table, status_json
from blindsum.client.transport import Unreachable
from blindsum.crypto.canonical import encode_document
from blindsum.crypto.errors import DocumentError, PolicyViolation, RefusalReason, Refused
from blindsum.crypto.trust.documents import fingerprint
from blindsum.crypto.trust.policy import Policy, loosened
from rich.table import Table

owner_app = typer.Typer(
    help="Found a federation, invite and admit members, sign its policy.", no_args_is_help=True
)
policy_app = typer.Typer(help="The floors that every member pins.", no_args_is_help=True)
owner_app.add_typer(policy_app, name="policy")

Names = Annotated[list[str], typer.Argument(help="Members, by their names.")]
AtOnce = Annotated[bool, typer.Option("--at-once", help="Abort a running round instead of letting it end.")]
Wait = Annotated[bool, typer.Option(help="Wait until a running round has ended and the plan goes on.")]


@owner_app.command("init")
def owner_init(
    folder: Annotated[
        Path, typer.Argument(help="A new folder for the owner's keys. Keep it safe and backed up.")
    ],
    name: Annotated[str, typer.Option(help="The federation's name, as people know it.")],
    enrolment: Annotated[str, typer.Option(help="host:port where members enrol.")],
    members: Annotated[str, typer.Option(help="host:port that admitted members use.")],
    ca: Annotated[Path, typer.Option(help="The server's transport_ca.pem, from its operator.")],
    scheme: Annotated[list[str], typer.Option(help="Allow this scheme; repeat for more.")] = ["masking"],  # noqa: B006
    n_min: Annotated[int, typer.Option(help="Fewest members whose sum may be opened.")] = 3,
    n_max: Annotated[int, typer.Option(help="Most members in a round.")] = 128,
    paillier_bits: Annotated[
        int, typer.Option(help="Shortest Paillier modulus that members accept: 3072, or 2048 (112 bits).")
    ] = 3072,
    split_cohorts: Annotated[
        bool,
        typer.Option(
            "--split-cohorts",
            help="Allow rounds of no more than half of the roster; a lying server can then run two at once.",
        ),
    ] = False,
) -> None:
    """Found a federation: make the owner key, sign the first policy, register at the server."""
    with Owner.init(
        folder,
        name,
        enrolment_address=enrolment,
        member_address=members,
        ca=ca.read_text(),
        schemes=scheme,
        n_min=n_min,
        n_max=n_max,
        split_cohorts=split_cohorts,
        paillier_bits=paillier_bits,
        patience=QUICK,
    ) as owner:
        if paillier_bits < 3072:
            say(WEAK_MODULUS)
        say(f"Owner key of [bold]{owner.federation.name}[/bold]: {owner.public_key.hex()}")
        say(f"Fingerprint: {fingerprint(owner.public_key)}")
        _try_register(owner, folder)


def _try_register(owner: Owner, folder: Path) -> None:
    try:
        owner.register()
    except Unreachable as error:
        say(f"The server can't be reached ({literal(error)}).")
    except Refused as refusal:
        if refusal.reason is not RefusalReason.POLICY:
            raise
        say("The server doesn't know this owner key yet: its operator lists it in the setting `owners`.")
    else:
        say(f"Registered. Next: blindsum owner invite {folder} NAME")
        return
    say(f"Then: blindsum owner register {folder}")


@owner_app.command("register")
def owner_register(folder: OwnerPath) -> None:
    """Register the federation at the server, once its operator has allowed the owner key."""
    with Owner.open(folder) as owner:
        owner.register()
        say(f"Registered. Next: blindsum owner invite {folder} NAME")


# Who comes in


@owner_app.command("invite")
def owner_invite(
    folder: OwnerPath,
    names: Annotated[list[str], typer.Argument(help="Names of new members: a-z, 0-9 and hyphens.")],
    days: Annotated[int, typer.Option(help="How long the invitation is good.")] = 14,
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Write an invitation file for each member. It admits whoever holds it: hand it over safely."""
    with Owner.open(folder) as owner:
        again = sorted(set(names) & set(owner.invited()))
        if dry_run:
            say(f"Would invite {', '.join(names)} for {days} days.")
        if again:
            say(f"Open invitations would be replaced, and the old files admit nobody: {', '.join(again)}")
        if (again or dry_run) and not go_ahead("Replace them?", yes=yes, dry_run=dry_run):
            return
        for name in names:
            say(f"{name}: {owner.invite(name, days=days)}")
    say("On the member's device: blindsum join INVITATION FOLDER")


@owner_app.command("withdraw")
def owner_withdraw(folder: OwnerPath, names: Names, yes: Yes = False, dry_run: DryRun = False) -> None:
    """Withdraw open invitations, for example after a file was lost: their tokens admit nobody any more."""
    with Owner.open(folder) as owner:
        found = sorted(set(names) & set(owner.invited()))
        if not found:
            raise DocumentError(f"there is no open invitation for {', '.join(names)}")
        say(f"Open invitations to withdraw: {', '.join(found)}")
        if go_ahead("Withdraw them?", yes=yes, dry_run=dry_run):
            owner.withdraw(*found)
            say("Withdrawn.")


@owner_app.command("pending")
def owner_pending(folder: OwnerPath, as_json: Json = False) -> None:
    """Requests that wait for an answer, with the fingerprint to compare."""
    with Owner.look(folder) as owner:
        waiting = owner.pending()
    if as_json:
        show([_as_json(one) for one in waiting])
        return
    _print_applications(waiting)


def _as_json(one: Application) -> dict[str, str]:
    return {
        "member": one.member,
        "organisation": one.organisation,
        "fingerprint": one.fingerprint,
        "problem": one.problem,
    }


def _print_applications(waiting: list[Application]) -> None:
    table = Table("member", "organisation", "fingerprint", "problem")
    for one in waiting:
        table.add_row(one.member, literal(one.organisation), one.fingerprint, literal(one.problem))
    console.print(table if waiting else "Nobody is waiting.")


@owner_app.command("admit")
def owner_admit(
    folder: OwnerPath,
    names: Annotated[
        list[str] | None, typer.Argument(help="Whom to admit; all that are in order if none.")
    ] = None,
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Admit members: sign the next roster, seal the group key to each of them."""
    with Owner.open(folder) as owner:
        waiting = [one for one in owner.pending() if not names or one.member in names]
        _print_applications(waiting)
        missing = sorted(set(names or ()) - {one.member for one in waiting})
        if missing:
            raise DocumentError(f"{missing[0]!r} can't be admitted: it hasn't asked yet")
        fitting = [one for one in waiting if not one.problem]
        if not fitting:
            say("Nobody was admitted.")
            raise typer.Exit(1)
        members = len(owner.roster.members) + len({one.member for one in fitting})
        say(f"Roster version {owner.roster.version + 1} will have {members} members.")
        if not go_ahead("Admit those without a problem?", yes=yes, dry_run=dry_run):
            return
        admitted = owner.admit(*(names or ()), keys={one.fingerprint for one in fitting})
        say(f"Admitted: {', '.join(admitted)}" if admitted else "Nobody was admitted.")
        _warn_of_small_rounds(owner)


def _warn_of_small_rounds(owner: Owner) -> None:
    plan = owner.plan
    try:
        if plan is not None:
            plan.cohort_floor(owner.policy, len(owner.roster.members))
    except PolicyViolation as violation:
        say(f"No further round of this plan starts: {violation}")


@owner_app.command("refuse")
def owner_refuse(
    folder: OwnerPath,
    name: str,
    reason: Annotated[str, typer.Option(help="What the applicant is told.")],
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Refuse a request."""
    with Owner.open(folder) as owner:
        _print_applications([one for one in owner.pending() if one.member == name])
        if go_ahead(f"Refuse every request of {name}?", yes=yes, dry_run=dry_run):
            say(f"Refused {owner.refuse(name, reason)} request(s) of {name}.")


@owner_app.command("watch")
def owner_watch(
    folder: OwnerPath,
    listed: Annotated[
        Path | None,
        typer.Option("--list", help="Admit the members in this file: lines of NAME or NAME FINGERPRINT."),
    ] = None,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Admit whoever proves to hold an open invitation's token.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.2, max=600, help="Seconds between two looks.")] = 5.0,
    dry_run: DryRun = False,
    as_json: JsonLines = False,
) -> None:
    """Stay here and answer requests as they come: by a list, by the token, or by asking you.

    While nobody watches, requests wait at the server, and applicants are told so. Other owner commands
    work beside it. Ctrl-C ends it.
    """
    rule = _rule(listed, tokens, asks=not as_json and sys.stdin.isatty(), dry_run=dry_run)
    stop = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    if not as_json:
        how = "the list decides" if listed else "the token decides" if tokens else "you decide"
        say(f"Watching for requests ({'dry run' if dry_run else how}); Ctrl-C ends it.")
    try:
        for event in Watch(folder, rule, every=every, stop=stop).events():
            _tell(event, as_json)
    except KeyboardInterrupt:
        pass
    finally:
        stop.set()
        signal.signal(signal.SIGTERM, before)
    if not as_json:
        say("Nobody watches any more: requests wait at the server.")


def _rule(listed: Path | None, tokens: bool, *, asks: bool, dry_run: bool) -> Rule:
    if listed is not None and tokens:
        raise DocumentError("choose one of --list and --tokens")
    rule: Rule = _ask if asks else nobody
    if listed is not None:
        rule = AdmissionList.read(listed)
    elif tokens:
        rule = by_token
    if not dry_run:
        return rule
    if rule is _ask:
        return nobody

    def only_said(application: Application) -> Decision:
        decision = rule(application)
        return Decision("wait", f"would {decision.answer} (dry run) {decision.reason}".strip())

    return only_said


def _ask(one: Application) -> Decision:
    organisation = literal(one.organisation) or "no organisation given"
    say(f"[bold]{one.member}[/bold] ({organisation}) asks to be admitted.")
    say(f"Its device shows this fingerprint, if nobody is in between: {one.fingerprint}")
    answer = typer.prompt("Admit, refuse or later? [a/r/l]", default="l").strip().lower()[:1]
    if answer == "a":
        return Decision("admit")
    if answer == "r":
        return Decision("refuse", typer.prompt("What is the applicant told?", default="not expected"))
    return Decision("wait", "left for later")


def _tell(event: WatchEvent, as_json: bool) -> None:
    if as_json:
        values = {name: getattr(event, name) for name in event.__dataclass_fields__}
        show_line({"event": values.pop("kind"), **{name: value for name, value in values.items() if value}})
        return
    who = f" [bold]{event.member}[/bold]" if event.member else ""
    organisation = f" ({literal(event.organisation)})" if event.organisation else ""
    mark = f" {event.fingerprint}" if event.kind == "asked" else ""
    say(f"{event.kind}{who}{organisation}{mark}{': ' if event.text else ''}{literal(event.text)}")


# Who goes


@owner_app.command("remove")
def owner_remove(
    folder: OwnerPath,
    names: Names,
    at_once: AtOnce = False,
    wait: Wait = True,
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Remove members. Group key and HE keys change; a running plan goes on without them."""
    with Owner.open(folder) as owner:
        for name in names:
            owner.roster.entry(name)
        _say_rotation(owner, at_once, len(owner.roster.members) - len(set(names)))
        if go_ahead(f"Remove {', '.join(names)} and change all keys?", yes=yes, dry_run=dry_run):
            done = owner.remove(*names, wait=wait, at_once=at_once)
            say(f"Removed: {', '.join(names)}. What they learnt before stays known to them.")
            _say_rotated(done, folder)


@owner_app.command("rotate")
def owner_rotate(
    folder: OwnerPath, at_once: AtOnce = False, wait: Wait = True, yes: Yes = False, dry_run: DryRun = False
) -> None:
    """Change group key and HE keys, for example after a device was lost."""
    with Owner.open(folder) as owner:
        _say_rotation(owner, at_once, len(owner.roster.members))
        if go_ahead("Change all keys?", yes=yes, dry_run=dry_run):
            done = owner.rotate(wait=wait, at_once=at_once)
            say(f"The group key is now that of epoch {owner.roster.epoch}.")
            _say_rotated(done, folder)


def _say_rotation(owner: Owner, at_once: bool, members: int) -> None:
    roster, plan = owner.roster, owner.plan
    keys = ["the group key", *(f"the {key.scheme} key" for key in roster.he_keys)]
    say(f"Roster version {roster.version + 1} will have {members} members; new: {', '.join(keys)}.")
    if plan is not None and owner.round_running():
        say(
            "A round runs: it is aborted."
            if at_once
            else "A round runs: it ends under the old keys, without those who are removed."
        )


def _say_rotated(done: bool, folder: Path) -> None:
    if not done:
        say(f"The plan goes on once the running round has ended and `blindsum owner watch {folder}` runs.")


@owner_app.command("renew")
def owner_renew(
    folder: OwnerPath,
    days: Annotated[int, typer.Option(help="Valid for so many days from now.")] = VALID_DAYS,
    dry_run: DryRun = False,
) -> None:
    """Sign roster and policy again before they expire."""
    with Owner.open(folder) as owner:
        if dry_run:
            say(f"The roster is valid until {date(owner.roster.valid_until)}, the policy until "
                f"{date(owner.policy.valid_until)}; both would be signed again for {days} days. A running "
                "round is aborted and tried again.")  # fmt: skip
            return
        owner.renew(days)
        say(f"Valid until {date(owner.roster.valid_until)}.")


# Looking


@owner_app.command("status")
def owner_status(folder: OwnerPath, as_json: Json = False) -> None:
    """The federation in one view: documents, members, who is connected."""
    with Owner.look(folder, patience=QUICK) as owner:
        status, policy, roster = owner.status(), owner.policy, owner.roster
        invited = owner.invited()
        if as_json:
            show(
                {
                    "federation": owner.federation.name,
                    "owner": owner.public_key.hex(),
                    "key_epoch": roster.epoch,
                    "invited": invited,
                    **status_json(status),
                }
            )
            return
        say(f"[bold]{owner.federation.name}[/bold], owner {fingerprint(owner.public_key)[:17]}")
        say(f"policy {policy.version}, valid until {date(policy.valid_until)}: {', '.join(policy.schemes)}")
        say(f"roster {roster.version}, valid until {date(roster.valid_until)}, key epoch {roster.epoch}")
        if invited:
            say(f"open invitations: {', '.join(invited)}")
        if owner.rotation_unfinished:
            say("the keys have changed; the plan goes on under them once the running round has ended")
        console.print(members_table(status))


@owner_app.command("model")
def owner_model(
    folder: OwnerPath,
    out: Annotated[Path, typer.Option(help="Where to write the newest model (.npz).")],
) -> None:
    """Open the newest model with the owner's group key and write it down."""
    with Owner.look(folder) as owner:
        write_model(out, owner.model())
    say(f"Written to {out}.")


# Policy


@policy_app.command("show")
def policy_show(folder: OwnerPath, as_json: Json = False) -> None:
    """The policy in force."""
    with Owner.look(folder) as owner:
        policy, members = owner.policy, len(owner.roster.members)
    if as_json:
        typer.echo(encode_document(policy).decode())
        return
    table = Table("setting", "value")
    for name in policy.__struct_fields__:
        table.add_row(name, _shown(getattr(policy, name)))
    console.print(table)
    say(
        f"A round hides a member among {policy.honest_floor()} honest ones, if {policy.gamma / 10:g} % of "
        f"{policy.n_min} collude with the server."
    )
    say(f"With {members} members, a round needs at least {policy.cohort_floor(members)} of them.")


def _shown(value: Any) -> str:
    if isinstance(value, bytes):
        return value.hex()
    return ", ".join(value) if isinstance(value, tuple) else str(value)


@policy_app.command("set")
def policy_set(
    folder: OwnerPath,
    changes: Annotated[list[str], typer.Argument(help="NAME=VALUE, as `policy show` names them.")],
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Sign the next policy. Members never go back to an older one; a running round is aborted."""
    values = dict(_assignment(change) for change in changes)
    with Owner.open(folder) as owner:
        before, after = owner.policy, owner.next_policy(**values)
        _print_changes(before, after, sorted(values))
        if go_ahead(f"Sign a policy with {', '.join(changes)}?", yes=yes, dry_run=dry_run):
            policy = owner.set_policy(**values)
            say(f"Policy version {policy.version} is in force.")


def _print_changes(before: Policy, after: Policy, names: Sequence[str]) -> None:
    table = Table("setting", "now", "then")
    for name in names:
        table.add_row(name, _shown(getattr(before, name)), _shown(getattr(after, name)))
    console.print(table)
    weaker = loosened(before, after)
    if weaker:
        say(f"[bold]This protects members less than before:[/bold] {', '.join(weaker)}")


def _assignment(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if (
        not separator
        or name not in Policy.__struct_fields__
        or name in ("federation", "version", "valid_until")
    ):
        raise DocumentError(f"{text!r} isn't NAME=VALUE with a name that `policy show` lists")
    if name in ("schemes", "weightings"):
        return name, tuple(part.strip() for part in value.split(","))
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
