"""`blindsum train`: sign and start a job, and watch it with the metrics that only key holders open."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import typer
from blindsum.client.layout import StateDict
from blindsum.client.member_commands import app_function
from blindsum.client.owner import Owner
from blindsum.client.owner_view import OwnerView, RoundMetrics
from blindsum.client.paillier_guidance import TOO_LARGE_S, WEAK_MODULUS, guidance, round_seconds
from blindsum.client.terminal import (
    QUICK,
    DryRun,
    Json,
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
from blindsum.client.transport import Unreachable
from blindsum.crypto.errors import BlindsumError, DocumentError
from blindsum.crypto.trust.plan import Plan
from blindsum.proto.v1 import enrolment_pb2
from rich.console import Group
from rich.live import Live
from rich.table import Table

train_app = typer.Typer(help="Sign and start a training job; see how far it is.", no_args_is_help=True)

_SHOWN_ROUNDS: Final = 12
Status = enrolment_pb2.GetStatusResponse


@train_app.command("start")
def train_start(
    folder: OwnerPath,
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
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Sign a training job and publish it. Members begin as soon as enough are ready."""
    metrics = dict(_metric(text) for text in metric or ())
    settings = {text.partition("=")[0]: text.partition("=")[2] for text in setting or ()}
    with Owner.open(folder) as owner:
        options: dict[str, Any] = {
            "rounds": rounds,
            "scheme": scheme,
            "shared": shared,
            "weighting": weighting,
            "max_examples": max_examples,
            "bits": bits,
            "metrics": metrics,
            "strategy": strategy,
            "settings": settings,
        }
        first = _first_weights(model)
        too_large = False
        unfinished = _unfinished(owner)
        if unfinished or dry_run or scheme == "paillier":
            planned = owner.start_plan(name, first, dry_run=True, **options)
            _say_plan(planned)
            too_large = scheme == "paillier" and _say_paillier(planned, owner.policy.paillier_bits)
        if unfinished or dry_run or too_large:
            if unfinished:
                say(f"It takes the place of plan {unfinished}, of which a running round is aborted.")
            if not go_ahead("Sign it and publish it?", yes=yes, dry_run=dry_run):
                return
        _say_plan(owner.start_plan(name, first, **options))


def _say_plan(plan: Plan) -> None:
    say(
        f"Plan [bold]{plan.name}[/bold]: {plan.rounds} rounds of {plan.scheme}, {plan.dimension} shared "
        f"values in {plan.tensors} tensors, {plan.cohort_min} to {plan.cohort_max} members a round."
    )


def _say_paillier(plan: Plan, modulus_bits: int) -> bool:
    """Say what paillier will cost; whether the model is too large for it."""
    if modulus_bits < 3072:
        say(WEAK_MODULUS)
    say(guidance(plan, modulus_bits))
    return round_seconds(plan, modulus_bits) > TOO_LARGE_S


def _unfinished(owner: Owner) -> str:
    """The running plan with its progress; empty if there is none."""
    plan = owner.plan
    if plan is None:
        return ""
    status = owner.status()
    done = f"{status.state_round} of {status.plan_rounds} rounds done"
    return f"{plan.name!r} ({done})" if status.state_round < status.plan_rounds else ""


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
    made = app_function(source)()
    state: StateDict = made.state_dict() if hasattr(made, "state_dict") else made
    return state


class TrainingView:
    """What the owner sees of a plan: the aggregator's word on rounds, and metrics opened here.

    Metrics come from the newest training state, which is fetched and opened whenever a round has
    concluded: as many bytes as the model has.
    """

    def __init__(self, owner: OwnerView, with_metrics: bool) -> None:
        self._owner = owner
        self._with_metrics = with_metrics
        self._opened: tuple[str, int] | None = None
        self.status = Status()
        self.history: list[RoundMetrics] = []
        self.problem = ""

    def refresh(self) -> None:
        """Ask again. Raises `Unreachable`, `Refused`."""
        self.status = status = self._owner.status()
        at = (status.plan, status.state_round)
        if self._with_metrics and status.plan and at != self._opened:
            try:
                self.history, self.problem = self._owner.history(), ""
            except Unreachable:
                raise
            except BlindsumError as error:
                self.problem = f"the metrics can't be opened: {error}"
            self._opened = at

    def as_json(self) -> dict[str, Any]:
        """Everything, for scripts."""
        return {
            **status_json(self.status),
            "metrics": [
                {"round": one.round, "survivors": one.survivors, "means": dict(one.means)}
                for one in self.history
            ],
            **({"problem": self.problem} if self.problem else {}),
        }

    def as_group(self) -> Group:
        """Everything, for people."""
        status = self.status
        parts: list[Any] = [
            f"plan {literal(status.plan or '-')}: {status.state_round} of {status.plan_rounds} rounds done"
            + (f"; {literal(status.waits_for)}" if status.waits_for else "")
        ]
        parts += [members_table(status), self._rounds()]
        if self.problem:
            parts.append(literal(self.problem))
        return Group(*parts)

    def _rounds(self) -> Table:
        opened = {one.round: one.means for one in self.history}
        names: Sequence[str] = list(self.history[-1].means) if self.history else []
        table = Table("round", "started", "step", "in", "left", "survivors", "outcome", *names)
        for one in list(self.status.rounds)[:_SHOWN_ROUNDS]:
            means = opened.get(one.number, {})
            left = max(0, one.deadline - int(time.time())) if one.deadline else 0
            table.add_row(
                str(one.number),
                date(one.started),
                literal(one.step),
                f"{one.replied}/{one.participants}" if one.participants else "",
                f"{left} s" if left else "",
                str(one.survivors or ""),
                literal(one.outcome),
                *(f"{means[name]:.4g}" if name in means else "" for name in names),
            )
        return table


@train_app.command("status")
def train_status(
    folder: OwnerPath,
    watch: Annotated[bool, typer.Option("--watch", help="Go on showing it until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.1, max=600, help="Seconds between two looks.")] = 1.0,
    metrics: Annotated[
        bool, typer.Option(help="Open the metrics: fetches the sealed model after each round.")
    ] = True,
    as_json: Json = False,
) -> None:
    """The running plan: which round, which step, who is in, and the metrics, opened on this machine.

    With --watch it goes on until Ctrl-C; with --watch --json it prints a line whenever something changes.
    """
    with Owner.look(folder, patience=QUICK) as owner:
        view = TrainingView(owner, metrics)
        view.refresh()
        if not watch:
            if as_json:
                show(view.as_json())
            else:
                console.print(view.as_group())
            return
        try:
            if as_json:
                _watch_lines(view, every)
            else:
                _watch_live(view, every)
        except KeyboardInterrupt:
            return


def _watch_lines(view: TrainingView, every: float) -> None:
    shown: dict[str, Any] = {}
    pause = threading.Event()
    while True:
        values = view.as_json()
        if values != shown:
            show_line(values)
            shown = values
        pause.wait(every)
        _refresh(view)


def _watch_live(view: TrainingView, every: float) -> None:
    pause = threading.Event()
    with Live(view.as_group(), console=console) as live:
        while True:
            pause.wait(every)
            _refresh(view)
            live.update(view.as_group())


def _refresh(view: TrainingView) -> None:
    """Look again; a server that is away for a while doesn't end a watch."""
    try:
        view.refresh()
    except Unreachable as error:
        view.problem = str(error)
    else:
        if not view.problem.startswith("the metrics"):
            view.problem = ""


def status_json(status: Status) -> dict[str, Any]:
    """The aggregator's word, for scripts."""
    return {
        "roster_version": status.roster_version,
        "policy_version": status.policy_version,
        "plan": status.plan,
        "state_round": status.state_round,
        "plan_rounds": status.plan_rounds,
        "waits_for": status.waits_for,
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
                "deadline": one.deadline,
                "survivors": one.survivors,
                "outcome": one.outcome,
            }
            for one in status.rounds
        ],
    }


def members_table(status: Status) -> Table:
    """Who is there, as the aggregator says."""
    members = Table("member", "connected", "last round")
    for one in status.members:
        members.add_row(literal(one.id), "yes" if one.connected else "no", str(one.last_round or ""))
    return members
