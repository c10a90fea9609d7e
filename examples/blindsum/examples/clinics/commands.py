"""`blindsum demo`: whole federations on this machine, with real data."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from blindsum.crypto.schemes.registry import SCHEME_NAMES
from blindsum.examples.clinics.demo import BITS, N_MAX, ClinicsDemo, Settings
from blindsum.examples.clinics.outcome import WAY_TITLES, WAYS, Outcome
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from blindsum.examples.clinics.edge_outcome import EdgeOutcome

Found = TypeVar("Found", "Outcome", "EdgeOutcome")

app = typer.Typer(help="A whole federation on this machine, with real data.", no_args_is_help=True)


@app.callback()
def demo() -> None:
    """A whole federation on this machine, with real data."""


@app.command()
def clinics(
    scheme: Annotated[str, typer.Option(help="masking, bfv, ckks or paillier.")] = "masking",
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of each shared way.")] = 25,
    seed: Annotated[
        int, typer.Option(help="Data split, first model, batch order, rounding; never a key or a mask.")
    ] = 0,
    ways: Annotated[list[str] | None, typer.Option(help="Only these ways; repeat. All by default.")] = None,
    out: Annotated[Path, typer.Option(help="A new or empty folder for everything the demo writes.")] = Path(
        "clinics-demo"
    ),
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the results here.")] = None,
) -> None:
    """A hospital and six clinics train a radiograph model through a server that can't read a thing.

    Starts a real aggregator with TLS on loopback and each site as its own process, compares five ways to
    train, checks every sum, searches all that the server saw, and writes report.html.
    """
    if scheme not in SCHEME_NAMES:
        raise typer.BadParameter(f"choose one of {', '.join(SCHEME_NAMES)}", param_hint="--scheme")
    chosen = tuple(way for way in WAYS if ways is None or way in ways)
    unknown = set(ways or ()) - set(WAYS)
    if unknown or not {"fedavg", "personalised"} & set(chosen):
        raise typer.BadParameter(
            f"choose among {', '.join(WAYS)}, at least one of fedavg and personalised", param_hint="--ways"
        )
    _make_room(out)
    console = Console()
    if scheme == "paillier":
        _say_estimate(console, rounds, len({"fedavg", "personalised"} & set(chosen)))
    demo = ClinicsDemo(Settings(scheme, rounds, seed, chosen, out), console)
    outcome = _run(demo.run, console, json_file)
    _show(console, outcome, out)
    _require_checks(console, outcome)


@app.command()
def edge(
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of each shared way.")] = 25,
    seed: Annotated[
        int, typer.Option(help="Data split, first model, batch order, rounding; never a key or a mask.")
    ] = 0,
    out: Annotated[Path, typer.Option(help="A new or empty folder for everything the demo writes.")] = Path(
        "edge-demo"
    ),
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the results here.")] = None,
) -> None:
    """The four ways of edge AI on the clinics: training together, models for devices, hard examples
    forwarded, and asking the cloud with an encrypted feature.

    Runs `demo clinics` first, then goes on with the same federation. About six minutes on two cores.
    """
    from blindsum.examples.clinics.edge_demo import EdgeDemo  # noqa: PLC0415

    _make_room(out)
    console = Console()
    demo = EdgeDemo(Settings("masking", rounds, seed, WAYS, out), console)
    outcome = _run(demo.run, console, json_file)
    _show(console, outcome.clinics, out)
    _show_edge(console, outcome)
    _require_checks(console, outcome.clinics)


def _show_edge(console: Console, outcome: "EdgeOutcome") -> None:
    table = Table(title="The hospital's model on a device")
    for title in ("back end", "bytes", "of float32", "points lost", "one answer, µs"):
        table.add_column(title, justify="right" if title != "back end" else "left")
    for row in outcome.devices.rows:
        table.add_row(
            row.backend,
            f"{row.bytes:,}",
            f"{row.bytes / row.fp32_bytes:.2f}",
            f"{100 * row.accuracy_drop:.1f}",
            f"{row.latency_us:.0f}",
        )
    console.print(table)
    hard, inference = outcome.hard, outcome.inference
    first, tail = inference.deployments[0], inference.tail
    console.print(
        f"Hard examples: {sum(hard.forwarded.values())} forwarded, the hospital's model"
        f" {100 * hard.gain:+.1f} points at the clinics; AUROC of errors {hard.errors_auroc:.2f},"
        f" another modality {hard.modality_auroc:.2f}, foreign scanners {hard.scanners_auroc:.2f}."
        f"\nAsking in doubt: {first.edge_model} at {first.site} {100 * first.edge:.1f} % alone,"
        f" {100 * first.cascade:.1f} % with {100 * first.share_sent:.0f} % of the images sent;"
        f" switched off where it gains nothing: {'yes' if inference.switched_off_where_no_gain else 'no'}."
        f"\nAn encrypted question: {tail.server_cpu_ms:.0f} ms of server CPU,"
        f" {tail.round_trip_ms:.0f} ms in all, {tail.agree} of {tail.total} answers as in the clear."
        f"\nRebuilding an image: correlation {inference.inversion.clear:.2f} from a clear feature,"
        f" {inference.inversion.encrypted:.2f} from the encrypted traffic.",
        highlight=False,
        soft_wrap=True,
    )


def _run(run: Callable[[], Found], console: Console, json_file: Path | None) -> Found:
    """What the run found, also written to `json_file`. SIGTERM ends a demo as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        outcome = run()
    except KeyboardInterrupt:
        console.print("Interrupted; every process of the demo has ended.")
        raise typer.Exit(130) from None
    if json_file is not None:
        json_file.write_text(json.dumps(outcome.to_json(), indent=1) + "\n", encoding="utf-8")
    return outcome


def _require_checks(console: Console, outcome: Outcome) -> None:
    """End with 1 where a sum wasn't exact, a secret was found, or the control found nothing."""
    if not outcome.exact or outcome.leak_scan.hits or not outcome.leak_scan.control_hits:
        console.print("[bold red]A check failed: see the report.[/]")
        raise typer.Exit(1)


def _make_room(out: Path) -> None:
    """The demo overwrites what an earlier demo left, and nothing else."""
    mark = out / ".blindsum-demo"
    if out.exists() and any(out.iterdir()):
        if not mark.exists():
            raise typer.BadParameter(
                f"{out} isn't empty and wasn't made by this demo; choose another folder", param_hint="--out"
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()


def _say_estimate(console: Console, rounds: int, shared_ways: int) -> None:
    """How long Paillier will take, measured on this machine before it starts."""
    import os  # noqa: PLC0415
    import time  # noqa: PLC0415

    from blindsum.crypto.schemes.homomorphic.cipher import choose_parameters  # noqa: PLC0415
    from blindsum.crypto.schemes.homomorphic.paillier import estimate_seconds  # noqa: PLC0415
    from blindsum.examples.clinics.model import initial_model  # noqa: PLC0415
    from blindsum.examples.clinics.sites import COHORT  # noqa: PLC0415

    parameters = choose_parameters("paillier", BITS["paillier"], N_MAX)
    size = sum(value.numel() for value in initial_model(0).state_dict().values())
    ciphertexts = -(-size // parameters.fields_per_unit)
    one = estimate_seconds(parameters.modulus_bits, ciphertexts, time.thread_time)
    # All members share this machine's cores; each of their workers makes its own tables, for each way.
    cores = os.cpu_count() or 1
    total = len(COHORT) * shared_ways * (one.round * rounds / cores + one.tables)
    console.print(
        f"Paillier is slow for a model of {size:,} parameters: {len(COHORT)} members on {cores} cores take "
        f"about {total:.0f} s of this run for its arithmetic alone. Masking or bfv take a few seconds."
    )


def _show(console: Console, outcome: Outcome, out: Path) -> None:
    ways = [way for way in WAYS if all(way in site.accuracy for site in outcome.sites)]
    table = Table(title="Balanced accuracy on the test images, %")
    table.add_column("site", no_wrap=True)
    table.add_column("images", justify="right")
    for way in ways:
        table.add_column(WAY_TITLES[way], justify="right")
    for site in outcome.sites:
        best = max(site.accuracy[way] for way in ways)
        cells: list[Any] = [
            f"[bold green]{100 * value:.1f}[/]"
            if (value := site.accuracy[way]) == best
            else f"{100 * value:.1f}"
            for way in ways
        ]
        table.add_row(site.name, str(site.examples), *cells, end_section=site.name == outcome.sites[-1].name)
    table.add_row("clinic mean", "", *(f"{100 * outcome.mean_of_clinics(way):.1f}" for way in ways))
    console.print(table)
    console.print(outcome.sentence(), soft_wrap=True)
    scan = outcome.leak_scan
    console.print(
        f"\nSums: {'exact, bit for bit, in' if outcome.exact else 'NOT EXACT over'} {outcome.exact_rounds}"
        " rounds"
        f" ({outcome.bytes_up_per_param:.2f} bytes up a parameter)."
        f"\nServer: {scan.files} files, {scan.bytes / 1e6:.0f} MB searched for {len(scan.searched)} forms of"
        f" secrets: {len(scan.hits)} found (the control found {len(scan.control_hits)})."
        f"\nWho would have to collude to learn an update: {outcome.trust_line}"
        f"\nReceipts: `blindsum receipt show {out}/members/hospital/personalised`"
        f"\nReport: {out / 'report.html'}   ({outcome.seconds:.0f} s)",
        highlight=False,
        soft_wrap=True,
    )
