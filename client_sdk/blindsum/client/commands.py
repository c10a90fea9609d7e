"""The members' and the owner's part of the command `blindsum`: owner, join, member, train, receipt."""

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from blindsum.client.joining import join as ask_to_join
from blindsum.client.joining import poll, read_invitation, wait_for_admission
from blindsum.client.layout import StateDict, portable
from blindsum.client.member import Member, Round
from blindsum.client.member_folder import MemberFolder
from blindsum.client.owner import Application, Owner
from blindsum.client.progress import Phase
from blindsum.client.receipts import RoundReceipt, gaps, verify_receipts
from blindsum.client.transport import Patience, Unreachable
from blindsum.crypto.canonical import encode_document
from blindsum.crypto.errors import DocumentError, RefusalReason, Refused
from blindsum.crypto.trust import roster as rosters
from blindsum.crypto.trust.documents import fingerprint, open_document, parse_signed
from blindsum.crypto.trust.policy import Policy
from blindsum.crypto.trust.receipt import Receipt
from blindsum.crypto.trust.roster import Roster
from blindsum.proto.v1 import enrolment_pb2
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

owner_app = typer.Typer(
    help="Found a federation, invite and admit members, sign its policy.", no_args_is_help=True
)
policy_app = typer.Typer(help="The floors that every member pins.", no_args_is_help=True)
owner_app.add_typer(policy_app, name="policy")
join_app = typer.Typer(help="Make this device's keys and ask to be admitted.")
member_app = typer.Typer(help="Take part in training.", no_args_is_help=True)
train_app = typer.Typer(help="Sign and start a training job; see how far it is.", no_args_is_help=True)
receipt_app = typer.Typer(help="Show and verify what a member's rounds were.", no_args_is_help=True)

OwnerFolder = Annotated[Path, typer.Argument(help="The owner's folder, made by `blindsum owner init`.")]
MemberPath = Annotated[Path, typer.Argument(help="The member's folder, made by `blindsum join`.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask for confirmation.")]

_console = Console()
_QUICK = Patience(total=15.0)


def _say(text: str) -> None:
    _console.print(text, highlight=False, soft_wrap=True)


def _show(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, sort_keys=True))


# owner


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
        patience=_QUICK,
    ) as owner:
        _say(f"Owner key of [bold]{owner.federation.name}[/bold]: {owner.public_key.hex()}")
        _say(f"Fingerprint: {fingerprint(owner.public_key)}")
        _try_register(owner, folder)


def _try_register(owner: Owner, folder: Path) -> None:
    try:
        owner.register()
    except Unreachable as error:
        _say(f"The server can't be reached ({error}).")
    except Refused as refusal:
        if refusal.reason is not RefusalReason.POLICY:
            raise
        _say("The server doesn't know this owner key yet: its operator lists it in the setting `owners`.")
    else:
        _say(f"Registered. Next: blindsum owner invite {folder} NAME")
        return
    _say(f"Then: blindsum owner register {folder}")


@owner_app.command("register")
def owner_register(folder: OwnerFolder) -> None:
    """Register the federation at the server, once its operator has allowed the owner key."""
    with Owner.open(folder) as owner:
        owner.register()
        _say(f"Registered. Next: blindsum owner invite {folder} NAME")


@owner_app.command("invite")
def owner_invite(
    folder: OwnerFolder,
    names: Annotated[list[str], typer.Argument(help="Names of new members: a-z, 0-9 and hyphens.")],
    days: Annotated[int, typer.Option(help="How long the invitation is good.")] = 14,
) -> None:
    """Write an invitation file for each member. It admits whoever holds it: hand it over safely."""
    with Owner.open(folder) as owner:
        for name in names:
            _say(f"{name}: {owner.invite(name, days=days)}")
    _say("On the member's device: blindsum join INVITATION FOLDER")


@owner_app.command("pending")
def owner_pending(folder: OwnerFolder, as_json: Json = False) -> None:
    """Requests that wait for an answer, with the fingerprint to compare."""
    with Owner.open(folder) as owner:
        waiting = owner.pending()
    if as_json:
        _show([_as_json(one) for one in waiting])
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
        table.add_row(one.member, one.organisation, one.fingerprint, one.problem)
    _console.print(table if waiting else "Nobody is waiting.")


@owner_app.command("admit")
def owner_admit(
    folder: OwnerFolder,
    names: Annotated[
        list[str] | None, typer.Argument(help="Whom to admit; all that are in order if none.")
    ] = None,
    yes: Yes = False,
) -> None:
    """Admit members: sign the next roster, seal the group key to each of them."""
    with Owner.open(folder) as owner:
        if not yes:
            waiting = [one for one in owner.pending() if not names or one.member in names]
            _print_applications(waiting)
            if not waiting or not typer.confirm("Admit those without a problem?"):
                raise typer.Exit(1)
        admitted = owner.admit(*(names or ()))
    _say(f"Admitted: {', '.join(admitted)}" if admitted else "Nobody was admitted.")


@owner_app.command("refuse")
def owner_refuse(
    folder: OwnerFolder, name: str, reason: Annotated[str, typer.Option(help="What the applicant is told.")]
) -> None:
    """Refuse a request."""
    with Owner.open(folder) as owner:
        _say(f"Refused {owner.refuse(name, reason)} request(s) of {name}.")


@owner_app.command("remove")
def owner_remove(folder: OwnerFolder, names: list[str], yes: Yes = False) -> None:
    """Remove members. Group key and HE keys change; a running plan goes on without them."""
    if not yes and not typer.confirm(f"Remove {', '.join(names)} and change all keys?"):
        raise typer.Exit(1)
    with Owner.open(folder) as owner:
        owner.remove(*names)
    _say(f"Removed: {', '.join(names)}. What they learnt before stays known to them.")


@owner_app.command("rotate")
def owner_rotate(folder: OwnerFolder) -> None:
    """Change group key and HE keys, for example after a device was lost."""
    with Owner.open(folder) as owner:
        owner.rotate()
        _say(f"The group key is now that of epoch {owner.roster.epoch}.")


@owner_app.command("renew")
def owner_renew(
    folder: OwnerFolder, days: Annotated[int, typer.Option(help="Valid for so many days from now.")] = 30
) -> None:
    """Sign roster and policy again before they expire."""
    with Owner.open(folder) as owner:
        owner.renew(days)
        _say(f"Valid until {_date(owner.roster.valid_until)}.")


@owner_app.command("status")
def owner_status(folder: OwnerFolder, as_json: Json = False) -> None:
    """The federation in one view: documents, members, who is connected."""
    with Owner.open(folder, patience=_QUICK) as owner:
        status, policy, roster = owner.status(), owner.policy, owner.roster
        if as_json:
            _show(
                {"federation": owner.federation.name, "owner": owner.public_key.hex(), **_status_json(status)}
            )
            return
        _say(f"[bold]{owner.federation.name}[/bold], owner {fingerprint(owner.public_key)[:17]}")
        _say(f"policy {policy.version}, valid until {_date(policy.valid_until)}: {', '.join(policy.schemes)}")
        _say(f"roster {roster.version}, valid until {_date(roster.valid_until)}, key epoch {roster.epoch}")
        _console.print(_members_table(status))


@owner_app.command("model")
def owner_model(
    folder: OwnerFolder,
    out: Annotated[Path, typer.Option(help="Where to write the newest model (.npz).")],
) -> None:
    """Open the newest model with the owner's group key and write it down."""
    with Owner.open(folder) as owner:
        _write_model(out, owner.model())
    _say(f"Written to {out}.")


@policy_app.command("show")
def policy_show(folder: OwnerFolder, as_json: Json = False) -> None:
    """The policy in force."""
    with Owner.open(folder) as owner:
        policy = owner.policy
    if as_json:
        typer.echo(encode_document(policy).decode())
        return
    table = Table("setting", "value")
    for name in policy.__struct_fields__:
        value = getattr(policy, name)
        table.add_row(name, value.hex() if isinstance(value, bytes) else str(value))
    _console.print(table)
    _say(
        f"A round hides a member among {policy.honest_floor()} honest ones, if {policy.gamma / 10:g} % of "
        f"{policy.n_min} collude with the server."
    )


@policy_app.command("set")
def policy_set(
    folder: OwnerFolder,
    changes: Annotated[list[str], typer.Argument(help="NAME=VALUE, as `policy show` names them.")],
    yes: Yes = False,
) -> None:
    """Sign the next policy. Members pin it: they never go back to an older one."""
    values = dict(_assignment(change) for change in changes)
    with Owner.open(folder) as owner:
        if not yes and not typer.confirm(f"Sign a policy with {', '.join(changes)}?"):
            raise typer.Exit(1)
        policy = owner.set_policy(**values)
    _say(f"Policy version {policy.version} is in force.")


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


# join


@join_app.command("join")
def join_command(
    invitation: Annotated[Path, typer.Argument(help="The invitation file from the owner.")],
    folder: Annotated[Path, typer.Argument(help="A new folder for this member's keys.")],
    organisation: Annotated[str, typer.Option(help="Shown to the owner.")] = "",
    wait: Annotated[bool, typer.Option(help="Wait until the owner has answered.")] = True,
) -> None:
    """Make this device's keys and ask to be admitted. The keys never leave the folder."""
    opened = read_invitation(invitation)
    _say(f"Federation [bold]{opened.federation_name}[/bold], owner {fingerprint(opened.owner)}")
    mark = ask_to_join(opened, folder, organisation=organisation, wait=False)
    _say(
        f"Asked to be admitted as [bold]{opened.member}[/bold]. "
        "This device's fingerprint, for the owner to compare:"
    )
    _say(mark)
    if wait:
        with _console.status("Waiting for the owner to admit this member (Ctrl-C: ask later)"):
            wait_for_admission(folder)
    if poll(folder):
        _say(f"Admitted. Next: blindsum member run {folder} --app MODULE:FUNCTION")
    else:
        _say(f"Not answered yet. `blindsum member run {folder} ...` asks again.")


# member


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
    train = _function(app)
    shown = None if quiet else _Bar()
    with Member.open(folder, on_progress=shown.report if shown else lambda *_: None) as member:
        try:
            for rnd in member.rounds():
                with rnd:
                    _run_round(rnd, train)
        finally:
            if shown:
                shown.stop()
    _say("The plan is finished.")


def _run_round(rnd: Round, train: Callable[[Round], tuple[StateDict, int, dict[str, float]]]) -> None:
    state, examples, metrics = train(rnd)
    receipt = rnd.submit(state, examples=examples, metrics=metrics)
    means = ", ".join(f"{name} {value:.4g}" for name, value in receipt.metrics.items())
    _say(f"round {rnd.index}/{rnd.total}: {receipt.survivors} members{', ' if means else ''}{means}")


def _function(name: str) -> Callable[..., Any]:
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
            console=_console,
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
            "last_round": opened.number("last_round"),
            "rounds_seen_through": len(receipts),
            "transcript": receipts[-1].transcript if receipts else "",
            "last_metrics": dict(receipts[-1].metrics) if receipts else {},
        }
    if as_json:
        _show(values)
        return
    table = Table(show_header=False)
    for name, value in values.items():
        table.add_row(name.replace("_", " "), str(value))
    _console.print(table)


@member_app.command("model")
def member_model(
    folder: MemberPath, out: Annotated[Path, typer.Option(help="Where to write the model (.npz).")]
) -> None:
    """Get the federation's newest model, verified: what a newcomer starts with."""
    with Member.open(folder) as member:
        _write_model(out, member.latest_state())
    _say(f"Written to {out}.")


def _write_model(path: Path, state: StateDict) -> None:
    arrays = portable(state)
    with path.open("wb") as file:
        path.chmod(0o600)
        np.savez(file, allow_pickle=False, **arrays)


# train


@train_app.command("start")
def train_start(
    folder: OwnerFolder,
    model: Annotated[
        str, typer.Option(help="First weights: a .npz file, a .pt state dict, or MODULE:FUNCTION.")
    ],
    name: Annotated[str, typer.Option(help="The job's name.")] = "training",
    rounds: Annotated[int, typer.Option(help="How many rounds.")] = 25,
    scheme: Annotated[str, typer.Option(help="masking, bfv, ckks or paillier.")] = "masking",
    shared: Annotated[list[str], typer.Option(help="Pattern of tensors trained together; repeat.")] = ["*"],  # noqa: B006
    weighting: Annotated[str, typer.Option(help="sqrt, size or equal.")] = "sqrt",
    max_examples: Annotated[
        int, typer.Option(help="The largest number of examples a member may have.")
    ] = 4096,
    bits: Annotated[int, typer.Option(help="Bits of a quantised value.")] = 16,
    metric: Annotated[list[str] | None, typer.Option(help="NAME=LOW:HIGH[:RESOLUTION]; repeat.")] = None,
    strategy: Annotated[str, typer.Option(help="fedavg, fedavgm or fedadam.")] = "fedavg",
    setting: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE for apps; repeat.")] = None,
) -> None:
    """Sign a training job and publish it. Members begin as soon as enough are ready."""
    metrics = dict(_metric(text) for text in metric or ())
    settings = {text.partition("=")[0]: text.partition("=")[2] for text in setting or ()}
    with Owner.open(folder) as owner:
        plan = owner.start_plan(
            name,
            _first_weights(model),
            rounds=rounds,
            scheme=scheme,  # type: ignore[arg-type]  # checked by the plan's own type
            shared=shared,
            weighting=weighting,  # type: ignore[arg-type]
            max_examples=max_examples,
            bits=bits,
            metrics=metrics,
            strategy=strategy,
            settings=settings,
        )
    _say(
        f"Plan [bold]{plan.name}[/bold]: {plan.rounds} rounds of {plan.scheme}, {plan.dimension} shared "
        f"values in {plan.tensors} tensors, {plan.cohort_min} to {plan.cohort_max} members a round."
    )


def _metric(text: str) -> tuple[str, tuple[float, float] | tuple[float, float, float]]:
    name, _, bounds = text.partition("=")
    try:
        values = [float(part) for part in bounds.split(":")]
    except ValueError:
        values = []
    if len(values) == 2:
        return name, (values[0], values[1])
    if len(values) == 3:
        return name, (values[0], values[1], values[2])
    raise DocumentError(f"{text!r} isn't NAME=LOW:HIGH or NAME=LOW:HIGH:RESOLUTION")


def _first_weights(source: str) -> StateDict:
    path = Path(source)
    if path.suffix == ".npz":
        with np.load(path) as stored:
            return {name: stored[name] for name in stored.files}
    if path.suffix in (".pt", ".pth"):
        import torch  # noqa: PLC0415

        loaded: StateDict = torch.load(path, weights_only=True, map_location="cpu")
        return loaded
    made = _function(source)()
    state: StateDict = made.state_dict() if hasattr(made, "state_dict") else made
    return state


@train_app.command("status")
def train_status(
    folder: OwnerFolder,
    watch: Annotated[bool, typer.Option("--watch", help="Go on showing it until Ctrl-C.")] = False,
    as_json: Json = False,
) -> None:
    """The running plan: which round, which step, who is in."""
    with Owner.open(folder, patience=_QUICK) as owner:
        if as_json:
            _show(_status_json(owner.status()))
            return
        if not watch:
            _console.print(_status_view(owner.status()))
            return
        with Live(_status_view(owner.status()), console=_console) as live:
            try:
                while True:
                    time.sleep(1)
                    live.update(_status_view(owner.status()))
            except KeyboardInterrupt:
                return


def _status_json(status: enrolment_pb2.GetStatusResponse) -> dict[str, Any]:
    return {
        "roster_version": status.roster_version,
        "policy_version": status.policy_version,
        "plan": status.plan,
        "state_round": status.state_round,
        "plan_rounds": status.plan_rounds,
        "members": [
            {"id": one.id, "connected": one.connected, "last_round": one.last_round} for one in status.members
        ],
        "rounds": [
            {
                "number": one.number,
                "step": one.step,
                "participants": one.participants,
                "replied": one.replied,
                "started": one.started,
                "survivors": one.survivors,
                "outcome": one.outcome,
            }
            for one in status.rounds
        ],
    }


def _status_view(status: enrolment_pb2.GetStatusResponse) -> Group:
    rounds = Table("round", "started", "step", "in", "survivors", "outcome")
    for one in list(status.rounds)[:10]:
        rounds.add_row(
            str(one.number),
            _date(one.started),
            one.step,
            f"{one.replied}/{one.participants}" if one.participants else "",
            str(one.survivors or ""),
            one.outcome,
        )
    head = f"plan {status.plan or '-'}: {status.state_round} of {status.plan_rounds} rounds done"
    return Group(head, _members_table(status), rounds)


def _members_table(status: enrolment_pb2.GetStatusResponse) -> Table:
    members = Table("member", "connected", "last round")
    for one in status.members:
        members.add_row(one.id, "yes" if one.connected else "no", str(one.last_round or ""))
    return members


def _date(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else ""


# receipt


@receipt_app.command("show")
def receipt_show(
    folder: MemberPath,
    number: Annotated[int | None, typer.Option("--round", help="Only this round, in full.")] = None,
    as_json: Json = False,
) -> None:
    """What happened in each round: how many members, which scheme, who could learn an update."""
    with MemberFolder(folder, read_only=True) as opened:
        receipts = [RoundReceipt.of(stored) for stored in opened.receipts()]
    if number is not None:
        receipts = [receipt for receipt in receipts if receipt.round == number]
        if not receipts:
            raise DocumentError(f"there is no receipt of round {number} in {folder}")
    if as_json:
        _show([_receipt_json(receipt) for receipt in receipts])
        return
    if number is not None:
        table = Table(show_header=False)
        for name, value in _receipt_json(receipts[0]).items():
            table.add_row(name.replace("_", " "), str(value))
        _console.print(table)
        return
    table = Table("round", "scheme", "members", "sum check", "transcript")
    for one in receipts:
        table.add_row(
            str(one.round), one.receipt.scheme, str(one.survivors), one.receipt.sum_check, one.transcript[:16]
        )
    _console.print(table)
    if receipts:
        _say(f"Who would have to collude to learn an update: {receipts[-1].trust}")


def _receipt_json(one: RoundReceipt) -> dict[str, Any]:
    receipt = one.receipt
    fields = {name: getattr(receipt, name) for name in receipt.__struct_fields__}
    plain = {name: value.hex() if isinstance(value, bytes) else value for name, value in fields.items()}
    return {**plain, "transcript": one.transcript, "metrics": dict(one.metrics), "max_error": one.max_error}


@receipt_app.command("export")
def receipt_export(
    folder: MemberPath, out: Annotated[Path, typer.Option(help="Where to write the signed receipts.")]
) -> None:
    """Write this member's signed receipts, for someone else to verify. They hold no secret and no metric."""
    with MemberFolder(folder, read_only=True) as opened:
        out.write_text(json.dumps([stored.body.hex() for stored in opened.receipts()]))
    _say(f"Written to {out}.")


@receipt_app.command("verify")
def receipt_verify(
    folder: MemberPath,
    others: Annotated[list[Path] | None, typer.Argument(help="Exported receipts of other members.")] = None,
) -> None:
    """Check signatures and the chain of all receipts, here and in other members' exports."""
    with MemberFolder(folder, read_only=True) as opened:
        stored = opened.fact("roster")
        if not stored:
            raise DocumentError(f"{folder} has seen no roster yet; run the member first")
        roster = open_document(parse_signed(stored), opened.pin.owner, rosters.KIND, Roster)
        own = [one.body for one in opened.receipts()]
    found = _verify(str(folder), own, roster)
    for path in others or ():
        try:
            bodies = [bytes.fromhex(line) for line in json.loads(path.read_text())]
        except (ValueError, TypeError):
            raise DocumentError(f"{path} isn't an export of receipts") from None
        _verify(str(path), bodies, roster)
        verify_receipts([*own, *bodies], roster)
    if found and others:
        _say("All of them tell the same history.")


def _verify(name: str, bodies: list[bytes], roster: Roster) -> list[Receipt]:
    receipts = verify_receipts(bodies, roster)
    if not receipts:
        _say(f"{name}: no receipts yet")
        return []
    missing = gaps(receipts)
    text = f"; not seen through: something before round {', '.join(map(str, missing))}" if missing else ""
    _say(
        f"{name}: {len(receipts)} receipts verified, transcript {receipts[-1].transcript().hex()[:16]}{text}"
    )
    return receipts
